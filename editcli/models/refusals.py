"""What the hub and its client answer when a model cannot be fetched, in plain words."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from editcli.errors import EditError, ModelError


@contextmanager
def asking(name: str, revision: str | None, folder: Path | None = None) -> Iterator[None]:
    """Turn what the hub and its client raise into one sentence; ``folder`` is what the cache has of the model."""
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (EditError, TypeError, AttributeError, NameError):
        # The last three are errors in this program.
        raise
    except HFValidationError as error:
        raise ModelError(f"{name!r} cannot be the id of a hub model; write OWNER/NAME, or a folder's path") from error
    except LocalEntryNotFoundError as error:
        answer = _answer(error)
        what = _unreachable(name, revision, folder) if answer is None else _refusal(answer, name, revision)
        raise ModelError(what) from error
    except HfHubHTTPError as error:
        raise ModelError(_refusal(error, name, revision)) from error
    # Which HTTP library the client uses, and so what it raises without a network, depends on its version.
    except Exception as error:
        if isinstance(error, OSError) and error.errno and not isinstance(error, (ConnectionError, TimeoutError)):
            raise ModelError(_unwritable(error, name)) from error
        raise ModelError(f"{_unreachable(name, revision, folder)} ({first_line(error)})") from error


def _answer(error: BaseException) -> Any:
    """Return the hub's refusal that made the client look into its cache; None when the hub could not be asked."""
    from huggingface_hub.utils import HfHubHTTPError

    cause = error.__cause__
    return cause if isinstance(cause, HfHubHTTPError) else None


def _refusal(error: Any, name: str, revision: str | None) -> str:
    """Say in plain words what the hub answered, and what to do about it."""
    from huggingface_hub import get_token, utils

    status = getattr(getattr(error, "response", None), "status_code", None)
    login = "log in with 'hf auth login' or set HF_TOKEN"
    logged_in = get_token() is not None
    if isinstance(error, utils.RevisionNotFoundError):
        return f"{name} has no revision {revision!r} on the hub; its branches and tags are at {page(name)}/tree/main"
    if isinstance(error, utils.GatedRepoError):
        then = "with the account that is logged in on this machine" if logged_in else f"then {login}"
        return f"{name} is gated: its owner asks for consent first; accept the terms at {page(name)}, {then}"
    if isinstance(error, utils.DisabledRepoError):
        return f"the hub has disabled access to {name}; see {page(name)}"
    if isinstance(error, utils.RepositoryNotFoundError):
        private = "not shown to the login of this machine" if logged_in else f"private: {login}"
        if status == 404 and not logged_in:
            return f"there is no folder {name}, and the hub has no model of that name; check how it is spelled"
        return f"there is no folder {name}, and the hub shows no model of that name: it is mistyped, or {private}"
    if status == 401:
        return f"the hub does not accept the login of this machine to read {name}; log in again with 'hf auth login'"
    if status == 403:
        return f"the login of this machine may not read {name}; use a token with read access to it, or see {page(name)}"
    said = str(getattr(error, "server_message", None) or first_line(error)).splitlines()[0]
    return f"the hub did not send {name} (status {status}: {said}); try again later"


def _unreachable(name: str, revision: str | None, folder: Path | None) -> str:
    """Say that the hub cannot be asked, and what of the model the cache has."""
    from huggingface_hub import constants

    offline = bool(constants.HF_HUB_OFFLINE)
    why = "HF_HUB_OFFLINE forbids to ask the hub" if offline else "the hub cannot be reached"
    advice = "unset it" if offline else "check your connection"
    if folder is not None:
        return f"the hub's cache has only a part of {name}, and {why}; {advice} to fetch the rest"
    what = f"{name} in revision {revision}" if revision else name
    return f"there is no folder {name}, the hub's cache has no {what}, and {why}; check the path, or {advice}"


def _unwritable(error: OSError, name: str) -> str:
    from huggingface_hub import constants

    where = error.filename or constants.HF_HUB_CACHE
    return (
        f"{name} cannot be written to the hub's cache ({where}: {error.strerror}); set HF_HOME to a folder that can be "
        "written and has room for it"
    )


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text without the punctuation at its end, or the name of its type.

    A first line that ends in a colon goes on with the second one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1]}"
    return lines[0].rstrip(" :.") if lines else type(error).__name__


def page(name: str) -> str:
    """Return the address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"
