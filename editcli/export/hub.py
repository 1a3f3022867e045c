"""Push a folder to the hub as one commit, with the login of the hub's own client.

Only the client reads the token; this module asks no more than whether there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from editcli.errors import EditError, ModelError
from editcli.export.report import Pushed
from editcli.models.hub import without_bars
from editcli.reporting import Reporter

MAIN = "main"


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository that may be written to."""

    repo: str
    """With its owner."""
    exists: bool
    private: bool
    revision: str | None


def check_destination(repo: str, *, private: bool, revision: str | None) -> Destination:
    """Ask the hub whether ``repo`` may be written to; raise :class:`ModelError` with one sentence if not.

    An existing repository is refused unless ``revision`` names the branch to write to. With ``private`` a public one
    is refused as well.
    """
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise ModelError("there is no login for the hub on this machine; log in with 'hf auth login', or set HF_TOKEN")
    api = HfApi()
    with _asking(repo):
        owner = api.whoami()["name"]
        full = repo if "/" in repo else f"{owner}/{repo}"
        exists = api.repo_exists(full)
        public = exists and private and not api.repo_info(full).private
    if public:
        raise ModelError(f"the repository {full} is public, and pushing does not make it --private; use another one")
    if exists and revision is None:
        raise ModelError(
            f"the repository {full} exists on the hub already; push to a new one, or name the branch to write to with "
            f"--revision (--revision {MAIN} adds a commit to what is there)"
        )
    return Destination(full, exists, private, revision)


def push(folder: Path, to: Destination, message: str, reporter: Reporter) -> Pushed:
    """Create the repository or branch if it is missing, and commit every file of ``folder`` at once."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _asking(to.repo, folder), without_bars(), reporter.phase("Pushing", 1) as advance:
        if not to.exists:
            # None leaves the choice to the settings of the owner.
            api.create_repo(to.repo, private=to.private or None)
        if to.revision not in (None, MAIN):
            api.create_branch(to.repo, branch=str(to.revision), exist_ok=True)
        commit = api.upload_folder(repo_id=to.repo, folder_path=folder, commit_message=message, revision=to.revision)
        advance(1)
    return Pushed(to.repo, to.revision or MAIN, commit.oid, commit.commit_url)


@contextmanager
def _asking(repo: str, folder: Path | None = None) -> Iterator[None]:
    """Turn what the hub and its client raise into one sentence."""
    from huggingface_hub.utils import HfHubHTTPError, HFValidationError

    where = "" if folder is None else f"; the result is in {folder}"
    try:
        yield
    except (EditError, TypeError, AttributeError, NameError):
        # The last three indicate a bug in editcli, so they propagate.
        raise
    except HFValidationError as error:
        raise ModelError(f"{repo!r} cannot be a repository of the hub; write OWNER/NAME") from error
    # The client's HTTP library, and so its errors without a network, depend on its version.
    except Exception as error:
        # A failed upload of a file wraps the hub's answer into another error.
        answer = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        if isinstance(answer, HfHubHTTPError):
            raise ModelError(f"{_refusal(answer, repo)}{where}") from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ModelError(
            f"the hub cannot be reached to push to {repo} ({reason}); check your connection{where}"
        ) from error


def _refusal(error: Exception, repo: str) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the login of this machine; log in again with 'hf auth login'"
    if status == 403:
        return f"the login of this machine may not write to {repo}; use a token with write access, or another owner"
    if status == 404:
        return f"the hub has no {repo}, or does not show it to you; check the name and its owner"
    if status == 409:
        return f"the repository {repo} exists on the hub already; push to a new one, or add --revision BRANCH"
    said = getattr(error, "server_message", None) or type(error).__name__
    return f"the hub refused to take {repo} (status {status}): {str(said).splitlines()[0]}"
