"""Pushing a result: one commit of just its files, with a token that is written nowhere; the hub is a local server."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from editcli.errors import ModelError
from editcli.export.record import portable
from editcli.export.source import open_run
from editcli.models.loading import BUNDLED
from editcli.records.record import RunRecord
from tests.support.exports import files

# The hub's client uses its HTTP library in a way that the library's next release drops.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")]

TOKEN = "hf_" + "verysecretindeed"


class FakeHub:
    """The few routes of the hub that creating a repository and committing to it use."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        """``{repo: {branch: {path: content}}}``."""
        self.created: list[dict[str, Any]] = []
        self.tokens: set[str] = set()
        """What requests were authorised with."""
        self.refuse: dict[str, int] = {}
        """``{part of a path: status}``."""
        self.blobs: dict[str, bytes] = {}
        self.private: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Return the status and the JSON document for a request."""
        for part, status in self.refuse.items():
            if part in path:
                return status, {"error": "made up"}
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}, "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if method == "PUT":
            self.blobs[path.rpartition("/")[2]] = body
            return 200, {}
        if found := re.fullmatch(r"/(\w+/[\w-]+)\.git/info/lfs/objects/batch", path):
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._lfs(found[1], one) for one in objects]}
        if found := re.fullmatch(r"/api/models/(\w+/[\w-]+)(?:/(\w+)/([\w.-]+))?", path):
            return self._repo(found[1], found[2], found[3], body)
        return 404, {"error": f"the fake has no {method} {path}"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo"}
        self.repos[name] = {"main": {}}
        self.created.append(wanted)
        return 200, {"url": f"{self.url}/{name}", "id": name, "name": name}

    def _lfs(self, repo: str, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/upload/{wanted['oid']}"}}}

    def _repo(self, name: str, what: str | None, branch: str | None, body: bytes) -> tuple[int, Any]:
        repo = self.repos.get(name)
        if repo is None:
            return 404, {"error": "Repository not found"}
        if what is None:
            private = name in self.private
            return 200, {"id": name, "modelId": name, "sha": "0" * 40, "siblings": [], "private": private}
        assert branch is not None
        if what == "branch":
            repo[branch] = dict(repo["main"])
            return 200, {}
        if branch not in repo:
            return 404, {"error": "Revision not found"}
        if what == "preupload":
            return 200, {"files": [self._mode(one["path"]) for one in json.loads(body)["files"]]}
        assert what == "commit"
        self._commit(repo[branch], [json.loads(line) for line in body.splitlines()])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""}

    def _mode(self, path: str) -> dict[str, Any]:
        mode = "lfs" if path.endswith(".safetensors") else "regular"
        return {"path": path, "uploadMode": mode, "shouldIgnore": False}

    def _commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
                assert hashlib.sha256(files[value["path"]]).hexdigest() == value["oid"]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def _do(self) -> None:
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        body = b"".join(self._chunks()) if chunked else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization"):
            self.hub.tokens.add(self.headers["Authorization"])
        status, document = self.hub.answer(self.command, self.path.partition("?")[0], body)
        data = json.dumps(document).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _chunks(self) -> Iterator[bytes]:
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    do_GET = do_POST = do_PUT = _do

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that this process talks to, with a login."""
    fake = FakeHub()
    thread = threading.Thread(target=fake.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    # The fake takes files in the older of the client's two ways.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def holds_token(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


@pytest.mark.parametrize("form", ["lora", "patch", "full"])
def test_every_file_is_committed_at_once_to_a_new_repository(
    form: str,
    hub: FakeHub,
    runs: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
    workshop: Path,
) -> None:
    report = make(runs("linear"), form, push="edited", private=True)
    assert hub.repos["me/edited"]["main"] == files(tmp_path / "out")
    (created,) = hub.created
    assert created.get("visibility") == "private" or created.get("private") is True
    assert (report.pushed.repo, report.pushed.revision, report.pushed.commit) == ("me/edited", "main", "1" * 40)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert holds_token(tmp_path) == []
    # What leaves this machine does not say where anything was on it.
    assert all(str(workshop).encode() not in data for data in hub.repos["me/edited"]["main"].values())
    card = hub.repos["me/edited"]["main"]["README.md"].decode()
    assert "4 edited facts" in card
    assert "rlsedit" in card


def test_a_repository_that_exists_is_left_alone_unless_a_branch_is_named(
    hub: FakeHub, runs: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path
) -> None:
    hub.repos["me/edited"] = {"main": {"mine.txt": b"mine"}}
    with pytest.raises(ModelError, match=r"me/edited exists on the hub already.* --revision"):
        make(runs("linear"), "patch", push="me/edited")
    # It was refused before anything was written.
    assert not (tmp_path / "out").exists()
    make(runs("linear"), "patch", push="me/edited", revision="v1", out="branch")
    assert hub.repos["me/edited"]["main"] == {"mine.txt": b"mine"}
    assert hub.repos["me/edited"]["v1"] == {"mine.txt": b"mine", **files(tmp_path / "branch")}
    make(runs("linear"), "patch", push="me/edited", revision="main", out="main")
    assert set(hub.repos["me/edited"]["main"]) == {"mine.txt", *files(tmp_path / "main")}


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("whoami", 401, "does not accept the login"),
        ("whoami", 500, "refused to take me/edited .status 500."),
        ("repos/create", 403, "may not write to me/edited.*the result is in"),
        ("repos/create", 409, "me/edited exists on the hub already"),
        ("commit", 403, "may not write to me/edited.*the result is in"),
        ("preupload", 404, "has no me/edited, or does not show it"),
        ("/upload/", 403, "may not write to me/edited.*the result is in"),
    ],
)
def test_what_the_hub_refuses_is_one_sentence(
    hub: FakeHub, runs: Callable[[str], Path], make: Callable[..., Any], path: str, status: int, said: str
) -> None:
    hub.refuse[path] = status
    with pytest.raises(ModelError, match=said) as caught:
        make(runs("linear"), "patch", push="me/edited")
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_without_a_login_a_network_or_a_name_nothing_is_begun(
    hub: FakeHub, runs: Callable[[str], Path], make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="cannot be a repository of the hub"):
        make(runs("linear"), "patch", push="me/ed ited")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        make(runs("linear"), "patch", push="me/edited")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="the hub cannot be reached"):
        make(runs("linear"), "patch", push="me/edited")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="no login for the hub"):
        make(runs("linear"), "patch", push="me/edited")
    assert not (tmp_path / "out").exists()
    assert hub.repos == {}


def test_the_command_pushes_and_says_where_and_never_shows_the_token(
    hub: FakeHub, runs: Callable[[str], Path], tmp_path: Path
) -> None:
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    arguments = ["export", str(runs("linear")), "--format", "patch", "--out", "out", "--push", "edited", "--json", "-v"]
    done = subprocess.run(
        [sys.executable, "-m", "editcli", *arguments],
        cwd=tmp_path,
        env={**environment, "HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pushed"]["repo"] == "me/edited"
    assert hub.repos["me/edited"]["main"] == files(tmp_path / "out")
    assert TOKEN not in done.stdout + done.stderr
    assert holds_token(tmp_path) == []
    assert holds_token(runs("linear")) == []


def test_what_is_to_be_private_does_not_go_where_everybody_reads(
    hub: FakeHub, runs: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path
) -> None:
    hub.repos["me/open"] = {"main": {}}
    with pytest.raises(ModelError, match="me/open is public"):
        make(runs("linear"), "patch", push="me/open", revision="main", private=True)
    assert not (tmp_path / "out").exists()
    assert hub.repos["me/open"] == {"main": {}}
    hub.private.add("me/open")
    make(runs("linear"), "patch", push="me/open", revision="main", private=True)
    assert hub.repos["me/open"]["main"]


@dataclass(frozen=True)
class FakeRun:
    """What the record of a run is made portable from."""

    record: RunRecord
    path: str


def test_a_record_does_not_say_where_the_bundled_model_is_installed(runs: Callable[[str], Path]) -> None:
    run = open_run(str(runs("linear")))
    provenance = run.record.provenance
    bundled = replace(run.record, provenance=replace(provenance, base=replace(provenance.base, name=BUNDLED)))
    assert provenance.base.folder is not None
    assert provenance.base.folder not in json.dumps(portable(FakeRun(bundled, run.path)).to_json())


def test_a_record_names_every_file_without_its_folder(runs: Callable[[str], Path]) -> None:
    run = open_run(str(runs("linear")))
    preset = {"file": "/home/me/tune/preset.toml", "name": "mine", "layers": [1]}
    files = {"stats": "/home/me/moments.safetensors", "corpus": "/home/me/text.txt", "preset": preset}
    settings = {"plugin": {"table": "/home/me/table.bin", "share": 0.5}}
    record = run.record.to_json()
    changed = {
        **record,
        "preset": preset,
        "components": settings,
        "recipe": {**record["recipe"], **files, "settings": settings, "system": "/no_think", "chat_template": True},
        "provenance": {
            **record["provenance"],
            "options": settings,
            "reference": {"file": files["stats"], "sha256": "0"},
        },
    }
    shared = portable(FakeRun(RunRecord.from_json(changed), run.path)).to_json()
    assert "/home/me" not in json.dumps(shared)
    assert shared["recipe"]["preset"] == {**preset, "file": "preset.toml"}
    assert shared["provenance"]["reference"] == {"file": "moments.safetensors", "sha256": "0"}
    assert shared["provenance"]["options"]["plugin"] == {"table": "table.bin", "share": 0.5}
    # A system message may begin as a path does.
    assert shared["recipe"]["system"] == "/no_think"
