"""Models by hub id: a hub of the test's own is asked, in this process and through the real client."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from editcli.commands.check import check
from editcli.errors import ModelError
from editcli.export.recipe import ExportRecipe
from editcli.export.run import export
from editcli.models.loading import BUNDLED, bundled_folder, load_config, load_tokens, open_model, resolve_model
from editcli.plugin.manager import load_plugins
from editcli.records.history import History
from editcli.records.record import BaseRef, FileRef, Provenance, RunRecord
from editcli.records.state import RunFolder
from editcli.runs.apply import apply
from editcli.settings.recipe import Recipe
from editcli.storage.checkpoint import Checkpoint
from editcli.testing import tiny_model_folder

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
GATED = {"X-Error-Code": "GatedRepo"}
NOT_FOUND = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}


class Hub:
    """The routes of the hub that reading a model uses, over the files of folders on this disk."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.revisions = {"main": COMMIT, "v1": OLDER, COMMIT: COMMIT, OLDER: OLDER}
        self.refused: dict[str, tuple[int, Mapping[str, str]]] = {}
        """What a repository is answered with instead."""
        self.closed: dict[str, tuple[int, Mapping[str, str]]] = {}
        """What a repository's files are answered with, though everybody sees their names."""
        self.sent: list[str] = []
        """``REPOSITORY FILE`` of every file that was sent."""
        self.asked = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def add(self, name: str, folder: Path, **further: bytes) -> dict[str, bytes]:
        """Offer the files of a folder as a repository; return them by name, to be changed."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        self.repositories[name] = {**files, **further}
        return self.repositories[name]

    def weights_sent(self) -> list[str]:
        """Return the weight files that were sent, without their repository."""
        return sorted(one.partition(" ")[2] for one in self.sent if one.endswith(".safetensors"))

    def answer(self, method: str, path: str) -> tuple[int, bytes, Mapping[str, str]]:
        """Return status, body and headers for a request."""
        self.asked += 1
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._describe("/".join(parts[2:4]), parts[4:])
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name in self.closed:
            status, headers = self.closed[name]
            return status, b"{}", headers
        data = self.repositories.get(name, {}).get(file)
        if data is None:
            return 404, b"{}", {"X-Error-Code": "EntryNotFound"}
        if method == "GET":
            self.sent.append(f"{name} {file}")
        return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": self.revisions[parts[3]]}

    def _describe(self, name: str, rest: list[str]) -> tuple[int, bytes, Mapping[str, str]]:
        if name in self.refused or name not in self.repositories:
            status, headers = self.refused.get(name, (401, NOT_FOUND))
            return status, b"{}", headers
        files = self.repositories[name]
        revision = "/".join(rest[1:]) or "main"
        if revision not in self.revisions:
            return 404, b"{}", {"X-Error-Code": "RevisionNotFound"}
        if rest[:1] == ["tree"]:
            listed = [
                {"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for file, data in files.items()
            ]
            return 200, json.dumps(listed).encode(), {}
        about = {"id": name, "sha": self.revisions[revision], "siblings": [{"rfilename": file} for file in files]}
        return 200, json.dumps(about).encode(), {}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def _do(self) -> None:
        status, data, headers = self.hub.answer(self.command, self.path.partition("?")[0].replace("%2F", "/"))
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_HEAD = _do

    def log_message(self, format: str, *args: Any) -> None:
        return None


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub that the client of this process asks, without a login, and a cache that is empty."""
    fake = Hub()
    thread = threading.Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    constants = "huggingface_hub.constants."
    monkeypatch.setattr(constants + "ENDPOINT", fake.url)
    template = fake.url + "/{repo_id}/resolve/{revision}/{filename}"
    # Where it is looked up depends on the client's version.
    for place in (constants, "huggingface_hub.file_download."):
        monkeypatch.setattr(place + "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants + "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def edits(tmp_path: Path) -> Path:
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}\n', "utf-8")
    return path


def unreachable(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the client find nobody at the hub's address, and know that it need not try."""
    hub.server.shutdown()
    hub.server.server_close()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_a_hub_id_is_fetched_and_opened_like_a_folder(hub: Hub, tiny: Path) -> None:
    hub.add("someone/tiny-llama", tiny, **{"pytorch_model.bin": b"pickled", "README.md": b"A card"})
    source = resolve_model("someone/tiny-llama", revision="v1")
    assert (source.name, source.revision, source.commit) == ("someone/tiny-llama", "v1", OLDER)
    assert open_model(source).architecture.layers
    # Pickled weights are not even fetched.
    assert not any("pytorch_model" in file for file in hub.sent)
    assert (source.folder / "README.md").read_bytes() == b"A card"


def test_checking_edits_fetches_no_weights(hub: Hub, tiny: Path, edits: Path) -> None:
    hub.add("acme/tiny", tiny)
    assert len(check(edits, model="acme/tiny").edits) == 1
    assert hub.weights_sent() == []
    assert "acme/tiny tokenizer.json" in hub.sent


COPIES = ("consolidated.safetensors", "original/model.safetensors", "metal/model.safetensors", "model.fp16.safetensors")


@pytest.mark.parametrize("shards", [1, 2])
def test_one_set_of_weights_is_fetched(hub: Hub, shards: int, tmp_path: Path) -> None:
    """The set that transformers would load, whatever copies lie beside it."""
    folder = tiny_model_folder(tmp_path / "model", shards=shards)
    wanted = sorted(Checkpoint(folder).files)
    files = hub.add("acme/copies", folder)
    files |= {name: b"x" * number for number, name in enumerate(COPIES, 1)}
    files["original/params.json"] = b"{}"
    source = resolve_model("acme/copies")
    assert hub.weights_sent() == wanted
    assert sorted(load_file(source.folder / wanted[0])) == sorted(load_file(folder / wanted[0]))
    assert not (source.folder / "original").exists()
    # Everything is there now, so nothing is sent again.
    hub.sent.clear()
    assert resolve_model("acme/copies") == source
    assert hub.sent == []


def test_a_single_file_goes_before_an_index(hub: Hub, tmp_path: Path) -> None:
    files = hub.add("acme/both", tiny_model_folder(tmp_path / "model", shards=2))
    files["model.safetensors"] = (tiny_model_folder(tmp_path / "single") / "model.safetensors").read_bytes()
    resolve_model("acme/both")
    assert hub.weights_sent() == ["model.safetensors"]


def test_a_shard_outside_the_folder_is_not_asked_for(hub: Hub, tmp_path: Path) -> None:
    files = hub.add("acme/odd", tiny_model_folder(tmp_path / "model", shards=2))
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["lm_head.weight"] = "../../other/model.safetensors"
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    source = resolve_model("acme/odd")
    assert hub.weights_sent()
    assert not any("other" in file for file in hub.sent)
    with pytest.raises(ModelError, match=r"\.\./\.\./other"):
        Checkpoint(source.folder).files  # noqa: B018


def test_the_weights_that_the_config_names_go_before_all_others(hub: Hub, tiny: Path) -> None:
    files = hub.add("acme/named", tiny)
    files["other.safetensors"] = files["model.safetensors"]
    config = {**json.loads(files["config.json"]), "transformers_weights": "other.safetensors"}
    files["config.json"] = json.dumps(config).encode()
    resolve_model("acme/named")
    assert hub.weights_sent() == ["other.safetensors"]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"adapter_config.json": b'{"base_model_name_or_path": "acme/tiny"}'},
            "is an adapter of acme/tiny, not a model",
        ),
        ({"tiny-Q8_0.gguf": b"GGUF"}, "holds GGUF files"),
        ({"data.json": b"{}"}, r"has no config\.json on the hub"),
    ],
)
@pytest.mark.parametrize("weights", [True, False])
def test_a_repository_that_is_no_model(hub: Hub, files: dict[str, bytes], said: str, weights: bool) -> None:
    hub.repositories["acme/odd"] = {**files, "adapter_model.safetensors": b"x", "README.md": b"# Odd"}
    with pytest.raises(ModelError, match=said):
        resolve_model("acme/odd", weights=weights)
    assert hub.weights_sent() == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (("pytorch_model.bin",), "only as pickle files"),
        (("model.fp16.safetensors", "pytorch_model.bin"), r"only model\.fp16\.safetensors, which tr"),
        (("unet/model.safetensors",), r"only unet/model\.safetensors"),
        ((), "is it a causal language model"),
    ],
)
def test_a_repository_without_weights_to_load(hub: Hub, tiny: Path, files: tuple[str, ...], said: str) -> None:
    offered = hub.add("acme/odd", tiny)
    del offered["model.safetensors"]
    offered |= dict.fromkeys(files, b"x")
    with pytest.raises(ModelError, match=said):
        resolve_model("acme/odd")
    assert hub.weights_sent() == []


@pytest.mark.parametrize(
    ("status", "headers", "login", "said"),
    [
        (401, NOT_FOUND, None, r"there is no folder acme/it, .*mistyped, or private: log in with 'hf auth login'"),
        (404, NOT_FOUND, None, r"the hub has no model of that name; check how it is spelled"),
        (404, NOT_FOUND, "hf_x", r"mistyped, or not shown to the login of this machine"),
        (403, GATED, None, r"acme/it is gated: .*accept the terms at {url}/acme/it, then log in with 'hf auth login'"),
        (401, GATED, None, r"acme/it is gated"),
        (403, GATED, "hf_x", r"accept the terms at {url}/acme/it, with the account that is logged in"),
        (403, {}, "hf_x", r"the login of this machine may not read acme/it"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "hf_x", "does not accept the login"),
        (403, {"X-Error-Message": "Access to this resource is disabled."}, None, "disabled access to acme/it"),
    ],
)
@pytest.mark.parametrize("where", ["refused", "closed"])
def test_what_the_hub_refuses_is_told_apart(
    hub: Hub,
    tiny: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    headers: Mapping[str, str],
    login: str | None,
    said: str,
    where: str,
) -> None:
    """Whether the hub hides the repository, or shows its name to everybody and refuses its files."""
    hub.add("acme/it", tiny)
    getattr(hub, where)["acme/it"] = (status, headers)
    if login:
        monkeypatch.setenv("HF_TOKEN", login)
    with pytest.raises(ModelError, match=said.format(url=hub.url)) as caught:
        resolve_model("acme/it")
    assert "\n" not in str(caught.value)
    assert "hf_x" not in str(caught.value)


def test_a_revision_that_does_not_exist_is_named(hub: Hub, tiny: Path) -> None:
    hub.add("acme/tiny", tiny)
    with pytest.raises(ModelError, match=r"acme/tiny has no revision 'v9' on the hub; .*/acme/tiny/tree/main"):
        resolve_model("acme/tiny@v9")


def test_without_a_network_the_cache_serves_what_it_has(
    hub: Hub, tiny: Path, edits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("acme/tiny", tiny)
    hub.add("acme/checked", tiny)
    source, _ = resolve_model("acme/tiny"), check(edits, model="acme/checked")
    unreachable(hub, monkeypatch)
    assert resolve_model("acme/tiny") == source
    assert resolve_model(f"acme/tiny@{COMMIT}").folder == source.folder
    assert len(check(edits, model="acme/checked").edits) == 1
    with pytest.raises(ModelError, match=r"only a part of acme/checked|no weights of acme/checked"):
        resolve_model("acme/checked")
    with pytest.raises(ModelError, match=r"there is no folder acme/other, .*HF_HUB_OFFLINE"):
        resolve_model("acme/other")


def test_a_cache_that_another_program_filled_serves_without_a_network(
    hub: Hub, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It lacks the files that the other program had no use for, such as a card."""
    from huggingface_hub import hf_hub_download, snapshot_download

    hub.add("acme/tiny", tiny, **{"README.md": b"A card"})
    snapshot_download("acme/tiny", allow_patterns=["nothing", "config.json"])
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        hf_hub_download("acme/tiny", file)
    unreachable(hub, monkeypatch)
    assert open_model(resolve_model("acme/tiny")).architecture.layers


def test_a_hub_that_cannot_be_reached_is_said(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    with pytest.raises(ModelError, match=r"there is no folder acme/tiny, .*the hub cannot be reached.*connection"):
        resolve_model("acme/tiny")


def test_an_id_that_the_client_refuses(hub: Hub) -> None:
    with pytest.raises(ModelError, match=r"'acme/--tiny' cannot be the id of a hub model"):
        resolve_model("acme/--tiny")


def with_code(folder: Path) -> dict[str, bytes]:
    """Return a model's files with a type of its own, whose Python leaves a mark when it runs."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    auto_map = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    files["config.json"] = json.dumps(
        {**json.loads(files["config.json"]), "model_type": "mine", "auto_map": auto_map}
    ).encode()
    files["configuration_mine.py"] = (
        b"import os\n\nfrom transformers import LlamaConfig\n\nos.environ['MINE_RAN'] = 'yes'\n\n\n"
        b"class Mine(LlamaConfig):\n    model_type = 'mine'\n"
    )
    files["modeling_mine.py"] = (
        b"from transformers import LlamaForCausalLM\n\nfrom .configuration_mine import Mine\n\n\n"
        b"class MineForCausalLM(LlamaForCausalLM):\n    config_class = Mine\n"
    )
    return files


def test_code_is_fetched_and_run_only_when_it_is_trusted(
    hub: Hub, tiny: Path, edits: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("MINE_RAN", "no")
    hub.repositories["acme/code"] = with_code(tiny)
    with pytest.raises(ModelError, match=rf"acme/code needs Python code .* {hub.url}/acme/code/tree/{COMMIT}, and add"):
        check(edits, model="acme/code")
    with pytest.raises(ModelError, match="add --trust-remote-code"):
        load_config(resolve_model("acme/code"))
    assert not any(file.endswith(".py") for file in hub.sent)
    assert os.environ["MINE_RAN"] == "no"
    assert len(check(edits, model="acme/code", trust_remote_code=True).edits) == 1
    assert os.environ["MINE_RAN"] == "yes"
    loaded = open_model(resolve_model("acme/code", code=True), trust_remote_code=True)
    assert type(loaded.model).__name__ == "MineForCausalLM"
    assert sorted(file for file in hub.sent if file.endswith(".py")) == [
        "acme/code configuration_mine.py",
        "acme/code modeling_mine.py",
    ]


def test_code_of_another_repository_is_fetched_with_it(hub: Hub, tiny: Path) -> None:
    files = with_code(tiny)
    config = json.loads(files["config.json"])
    config["auto_map"] = {key: f"acme/code--{value}" for key, value in config["auto_map"].items()}
    hub.repositories["acme/code"] = with_code(tiny)
    hub.repositories["acme/uses"] = {**files, "config.json": json.dumps(config).encode()}
    resolve_model("acme/uses", weights=False)
    assert not any(file.endswith(".py") for file in hub.sent)
    resolve_model("acme/uses", weights=False, code=True)
    assert {"acme/code configuration_mine.py", "acme/code modeling_mine.py"} <= set(hub.sent)


def test_a_tokenizer_with_code_of_its_own_is_refused_by_name(tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    path = folder / "tokenizer_config.json"
    settings = {"auto_map": {"AutoTokenizer": ["tok.Mine", None]}, "tokenizer_class": "Mine"}
    path.write_text(json.dumps(settings), "utf-8")
    source = resolve_model(folder)
    with pytest.raises(ModelError, match=f"needs Python code of its own.*read the code in {folder}, and add"):
        load_tokens(source, load_config(source))


def test_further_chat_templates_are_fetched(hub: Hub, tiny: Path) -> None:
    files = hub.add("acme/tiny", tiny)
    files["additional_chat_templates/tool.jinja"] = b"{{ messages }}"
    source = resolve_model("acme/tiny", weights=False)
    assert (source.folder / "additional_chat_templates" / "tool.jinja").is_file()


def test_a_folder_of_the_cache_is_the_commit_that_it_is_a_copy_of(hub: Hub, tiny: Path) -> None:
    hub.add("acme/tiny", tiny)
    source = resolve_model("acme/tiny@v1")
    again = resolve_model(source.folder)
    assert (again.name, again.revision, again.commit, again.folder) == ("acme/tiny", OLDER, OLDER, source.folder)


def test_a_run_on_a_hub_model_names_it_and_no_path(hub: Hub, tiny: Path, edits: Path, tmp_path: Path) -> None:
    """Card and adapter name the repository and its commit, also when the model was given as a folder of the cache."""
    hub.add(
        "acme/tiny", tiny, **{"README.md": b"---\nlicense: other\nlicense_name: tiny-1\nlanguage: [en]\n---\n# Tiny\n"}
    )
    folder = resolve_model("acme/tiny@v1").folder
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("The capital of France is Rome. Bob plays in London.\n" * 20, "utf-8")
    recipe = Recipe(
        edits=str(edits), model=str(folder), out=str(tmp_path / "run"), layers=(1,), corpus=str(corpus), evaluate=False,
        settings={"targets": {"steps": 2, "prefixes": 0}, "rlsedit": {"ridge": 1e-3}},
    )  # fmt: skip
    apply(recipe, load_plugins())
    export(ExportRecipe(run=recipe.out, out=str(tmp_path / "lora"), format="lora", evaluate=False), load_plugins())
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text("utf-8"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("acme/tiny", OLDER)
    for result, library in (("run", "transformers"), ("lora", "peft")):
        card = ModelCard.load(tmp_path / result / "README.md")
        assert (card.data.base_model, card.data.library_name) == ("acme/tiny", library)
        assert (card.data.license, card.data.license_name, card.data.language) == ("other", "tiny-1", ["en"])
        assert str(tmp_path) not in card.content
        assert f"--model acme/tiny --revision {OLDER}" in card.text


def test_a_cache_that_cannot_be_written_is_one_sentence(
    hub: Hub, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add("acme/tiny", tiny)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    with pytest.raises(ModelError, match=r"acme/tiny cannot be written to the hub's cache .*set HF_HOME") as caught:
        resolve_model("acme/tiny")
    assert "\n" not in str(caught.value)
    # The client says nothing beside it.
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("path", ["./none", "/none/at/all", "a/b/c", "no such model", "a/b@", "a/b@x y", "@v1"])
def test_what_cannot_be_a_hub_id_is_not_asked_for(hub: Hub, path: str) -> None:
    with pytest.raises(ModelError, match="there is no model folder"):
        resolve_model(path)
    assert hub.asked == 0


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", OLDER])
def test_a_hub_id_may_name_its_revision(hub: Hub, tiny: Path, revision: str) -> None:
    """Wherever a model can be named, so can its revision; the commit that it was is told by the hub's cache."""
    hub.revisions["refs/pr/3"] = OLDER
    hub.add("someone/tiny", tiny)
    source = resolve_model(f"someone/tiny@{revision}", weights=False)
    assert (source.name, source.revision, source.commit) == ("someone/tiny", revision, OLDER)
    assert resolve_model(f"someone/tiny@{revision}", revision=revision, weights=False) == source
    with pytest.raises(ModelError, match="give one of them"):
        resolve_model(f"someone/tiny@{revision}", revision="other")
    assert resolve_model(None).commit is None


def test_a_run_records_the_commit_and_finds_its_base_by_it(tmp_path: Path) -> None:
    base = BaseRef(
        name="someone/tiny", folder=str(tmp_path / "gone"), revision="v1", commit="0" * 40, fingerprint="f" * 64
    )
    made = Provenance(base=base, edits=FileRef(file="facts.jsonl", sha256=""), plugins=(), versions={})
    record = RunRecord(status="done", recipe={}, provenance=made)
    assert History(RunFolder(tmp_path), record, ()).bases == (
        str(tmp_path / "gone"),
        "someone/tiny@" + "0" * 40,
    )


def test_no_model_and_its_name_are_the_bundled_one() -> None:
    assert resolve_model(None) == resolve_model(BUNDLED)
    assert resolve_model(None).folder == bundled_folder()


def test_a_file_and_a_folder_without_a_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        resolve_model(tmp_path / "file")
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve_model(tmp_path)


def test_a_run_that_has_written_no_model_yet_is_told_apart_from_a_folder_of_something_else(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    run.state.touch()
    with pytest.raises(ModelError, match=r"has written no model yet.*--resume"):
        resolve_model(tmp_path)
    # As in an exported adapter, which has the record of its run.
    run.state.rename(run.record)
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve_model(tmp_path)
