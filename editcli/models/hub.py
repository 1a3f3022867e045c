"""Fetch a model from the hub into the hub's own cache: its small files, and one set of weights when they are needed.

A repository may hold its weights several times (in another precision, for another program, in shards and whole). Only
the set that transformers would load is fetched: ``model.safetensors``, else the shards that its index names. Refusals
of the hub and of its client are put into plain words.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from editcli.errors import EditError, ModelError
from editcli.formatting import shorten
from editcli.storage.choice import INDEX, SINGLE, is_plain_name
from editcli.storage.opening import CONFIG, read_text
from editcli.storage.opening import INDEX as INDEX_KIND


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

    A first line that ends in a colon is joined with the second one.
    """
    lines = [line.strip() for line in str(error).strip().splitlines()]
    if len(lines) > 1 and lines[0].endswith(":"):
        lines[0] = f"{lines[0]} {lines[1]}"
    return lines[0].rstrip(" :.") if lines else type(error).__name__


def page(name: str) -> str:
    """Return the address of a repository's page."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}"


_COMMIT = re.compile(r"^[0-9a-f]{40}$")
_PREFIX = "models--"
_SMALL = ("*.json", "*.txt", "*.model", "*.jinja", "*.md", "LICENSE*", "LICENCE*", "NOTICE*")
"""Files beside the weights: config, tokenizer, chat template, card and licence."""
_BELOW = "*/*"
_ADAPTER = "adapter_config.json"
_AN_INDEX = ".safetensors.index.json"
_FURTHER = ("editcli/run.json", "additional_chat_templates/*.jinja")
"""The files in subfolders that are needed."""
_CODE = "*.py"
_PATCH = ("*.json", "*.safetensors", "*.md")
_PICKLES = ("*.bin", "*.pt", "*.pth")


def is_hub_copy(folder: Path) -> bool:
    """Tell whether a folder is a commit of a hub repository in the hub's cache."""
    return folder.parent.name == "snapshots" and bool(_COMMIT.match(folder.name))


def repository_of(folder: Path) -> str | None:
    """Return the id of the repository that a folder of the hub's cache is a commit of; None for any other folder."""
    name = folder.parent.parent.name
    if not is_hub_copy(folder) or not name.startswith(_PREFIX):
        return None
    return name.removeprefix(_PREFIX).replace("--", "/")


def lacks_weights(folder: Path) -> bool:
    """Tell whether a folder is a hub copy of which only the small files were fetched."""
    return is_hub_copy(folder) and not any(folder.glob("*.safetensors"))


def fetch(name: str, revision: str | None = None, *, weights: bool = True, code: bool = False) -> Path:
    """Return the folder of a hub model in the hub's cache; raise :class:`ModelError` when it cannot be had.

    Without ``weights`` only the small files are fetched. Python files are fetched with ``code`` alone: without trust
    they are of no use.
    """
    with asking(name, revision):
        folder = _small_files(name, revision)
    at = folder.name if is_hub_copy(folder) else revision
    with asking(name, revision, folder):
        _refuse_other(name, at, folder)
        # The commit, so that everything is of one state of the repository.
        _download(name, at, [*_FURTHER, *([_CODE] if code else [])])
        if weights:
            _fetch_weights(name, at, folder)
        if code:
            _fetch_foreign_code(name, folder)
    return folder


def fetch_patch(name: str, revision: str | None = None) -> Path:
    """Return the folder of a patch of the hub in the hub's cache; raise :class:`ModelError` when it cannot be had."""
    with asking(name, revision):
        return _download(name, revision, _PATCH)


def _small_files(name: str, revision: str | None) -> Path:
    """Return the folder of a repository with its small files, as far as they can be had.

    A cache that another program filled may lack a card or a licence. Without a network it still serves.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        return _download(name, revision, _SMALL, ignore=_BELOW)
    except LocalEntryNotFoundError:
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            raise
        return Path(config).parent


def _fetch_weights(name: str, commit: str | None, folder: Path) -> None:
    """Fetch one set of weights in the order of transformers; raise :class:`ModelError` where there is none."""
    named = _read_object(folder / "config.json").get("transformers_weights")
    candidates = [str(named)] if is_plain_name(named) else [SINGLE, INDEX]
    for file in candidates:
        _download(name, commit, [_exactly(file)], bars=True)
        if (folder / file).is_file():
            break
    else:
        raise ModelError(_no_weights(name, commit, folder, candidates))
    if file.endswith(_AN_INDEX):
        _fetch_shards(name, commit, folder / file)


def _fetch_shards(name: str, commit: str | None, index: Path) -> None:
    """Fetch the shards that an index names, those that may be files of its folder."""
    try:
        shards = {
            str(file) for file in json.loads(read_text(index, INDEX_KIND, folder=index.parent))["weight_map"].values()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index.name} of {name} on the hub is not a usable shard index: {error}") from error
    missing = sorted(file for file in shards if is_plain_name(file) and not (index.parent / file).is_file())
    if missing:
        _download(name, commit, [_exactly(file) for file in missing], bars=True)


def _refuse_other(name: str, commit: str | None, folder: Path) -> None:
    """Raise :class:`ModelError` for a repository that is no model of transformers, saying what it is instead."""
    if (folder / "config.json").is_file():
        return
    if (folder / _ADAPTER).is_file():
        base = _read_object(folder / _ADAPTER).get("base_model_name_or_path")
        of = f" of {shorten(base)}" if isinstance(base, str) else ""
        raise ModelError(
            f"{name} on the hub is an adapter{of}, not a model; merge it into its base (merge_and_unload of peft, then "
            "save_pretrained) and pass the merged folder"
        )
    files = _listed(name, commit)
    if files is None:
        raise ModelError(f"the hub's cache lacks config.json of {name}, and the hub cannot be reached to fetch it")
    if any(file.endswith(".gguf") for file in files):
        raise ModelError(
            f"{name} holds GGUF files; fetch the one to edit with 'hf download {name} FILE' and pass that file, or "
            "choose the repository with safetensors that they were made from"
        )
    raise ModelError(f"{name} has no config.json on the hub, so it is no model of transformers")


def _no_weights(name: str, commit: str | None, folder: Path, candidates: list[str]) -> str:
    """Say why no weights of a repository can be used, as exactly as the hub's list of its files allows."""
    files, lacks = _listed(name, commit), f"has no {' and no '.join(candidates)} on the hub"
    if files is None:
        return f"the hub's cache has no weights of {name} in {folder}, and the hub cannot be reached to fetch them"
    if other := [file for file in files if file.endswith(".safetensors")]:
        shown = ", ".join(other[:3]) + (", ..." if len(other) > 3 else "")
        return (
            f"{name} {lacks}, only {shown}, which transformers does not load by itself; load the model as its card "
            "says, save it with save_pretrained, and pass that folder"
        )
    if any(fnmatch(file, pattern) for file in files if "/" not in file for pattern in _PICKLES):
        return (
            f"{name} has its weights on the hub only as pickle files; fetch them with 'hf download "
            f"{name}' and pass that folder with --convert-bin"
        )
    return f"{name} {lacks}; is it a causal language model of transformers?"


def _listed(name: str, commit: str | None) -> list[str] | None:
    """Return the names of a repository's files; None without a network."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return list(HfApi().list_repo_files(name, revision=commit))
    except HfHubHTTPError:
        raise
    except (OfflineModeIsEnabled, OSError):
        return None


def _fetch_foreign_code(name: str, folder: Path) -> None:
    """Fetch the Python files that a model's configuration names in other repositories (``ID--module.Class``)."""
    for other in sorted(set(_foreign_code(folder)) - {name}):
        with asking(other, None):
            _download(other, None, [_CODE, "config.json"])


def _foreign_code(folder: Path) -> Iterator[str]:
    for file in ("config.json", "tokenizer_config.json"):
        for path in _code_of(folder / file):
            repository, separated, _ = path.partition("--")
            if separated:
                yield repository


def names_code(file: Path) -> bool:
    """Tell whether a configuration names Python code that reads it."""
    return any(_code_of(file))


def _code_of(file: Path) -> Iterator[str]:
    """Yield the classes of a configuration's ``auto_map``."""
    named = _read_object(file).get("auto_map")
    for classes in named.values() if isinstance(named, dict) else ():
        yield from (str(path) for path in (classes if isinstance(classes, list) else [classes]) if path)


def _read_object(file: Path) -> dict[str, Any]:
    """Return a file's JSON object; an empty one where it cannot be read, which its loader reports."""
    try:
        document = json.loads(read_text(file, CONFIG, folder=file.parent))
    except (OSError, ValueError, RecursionError):
        return {}
    return document if isinstance(document, dict) else {}


def _download(
    name: str, revision: str | None, allow: Iterable[str], *, ignore: str | None = None, bars: bool = False
) -> Path:
    """Fetch the files of a repository that fit; ``bars`` show the progress of large ones to a person who waits."""
    from huggingface_hub import snapshot_download

    with _without_remarks(), nullcontext() if bars and sys.stderr.isatty() else without_bars():
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(allow), ignore_patterns=ignore))


@contextmanager
def without_bars() -> Iterator[None]:
    """Keep the client's own progress bars off a stream that is not theirs to draw on."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence the warnings of the client: a failure is reported in one sentence, and a success needs none."""
    from huggingface_hub.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _exactly(file: str) -> str:
    """Return the pattern that fits one name alone."""
    return re.sub(r"([*?[])", r"[\1]", file)
