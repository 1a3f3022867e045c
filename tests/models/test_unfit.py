"""A checkpoint that is not the model that its config describes is refused by name, by every command alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from editcli.__main__ import main
from editcli.commands.check import check
from editcli.errors import ModelError
from editcli.models.architectures import skeleton
from editcli.models.fit import examine
from editcli.models.loading import ModelSource, load_config, open_model, resolve_model
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.choice import ADAPTER, SINGLE
from editcli.testing import TINY, tiny_model_folder, vocabulary_size
from tests.support.facts import EDIT
from tests.support.reporters import Listener

HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
QUERY, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"


def without(*names: str) -> Callable[[Any], None]:
    def build(folder: Any) -> None:
        folder.single({key: tensor for key, tensor in folder.weights.items() if key not in names})

    return build


def in_dtype(dtype: torch.dtype) -> Callable[[Any], None]:
    def build(folder: Any) -> None:
        folder.single({**folder.weights, DOWN: folder.weights[DOWN].to(dtype)})

    return build


def complex_numbers(folder: Any) -> None:
    """Older versions of safetensors do not write them, so whole numbers of the same size are given another name."""
    folder.single({**folder.weights, DOWN: folder.weights[DOWN].to(torch.int64)})
    path = folder.path / SINGLE
    path.write_bytes(path.read_bytes().replace(b'"I64"', b'"C64"', 1))


def configured(**fields: Any) -> Callable[[Any], None]:
    def build(folder: Any) -> None:
        folder.single()
        folder.configure(**fields)

    return build


def template_without_its_token(folder: Any) -> None:
    """The tokenizers library opens such a file, and panics over the first text."""
    folder.single()
    path = folder.path / "tokenizer.json"
    described = json.loads(path.read_text("utf-8"))
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    start = {"SpecialToken": {"id": "<none>", "type_id": 0}}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, second],
        "special_tokens": {},
    }
    path.write_text(json.dumps(described), "utf-8")


def lost_from_shard(folder: Any) -> None:
    mapped = folder.shards({key: tensor for key, tensor in folder.weights.items() if key != QUERY})
    folder.index({**mapped, QUERY: mapped[DOWN]})


UNFIT: dict[str, tuple[Callable[[Any], None], str]] = {
    "no head": (without(HEAD), f"lacks a tensor .* random numbers: {HEAD}"),
    "no matrix": (without(QUERY), f"lacks a tensor .*: {QUERY}"),
    "no norm": (without(NORM), f"lacks a tensor .*: {NORM}"),
    "two gone": (without(NORM, QUERY), f"lacks 2 tensors .*: {QUERY} and {NORM}"),
    "only in the index": (lost_from_shard, f"lacks a tensor .*: {QUERY}"),
    "more layers": (configured(num_hidden_layers=5), r"lacks 9 tensors .*: model\.layers\.4.* and 6 more"),
    "another width": (configured(intermediate_size=24), r"model\.layers\.0\.mlp\..* should be .* and is stored as"),
    "another vocabulary": (configured(vocab_size=9), f"{HEAD} should be 9 x 16 and is stored as"),
    "float8": (in_dtype(torch.float8_e4m3fn), f"{DOWN} of .* is stored as F8_E4M3, in which torch does not compute"),
    "int8": (in_dtype(torch.int8), f"{DOWN} of .* is stored as I8"),
    "complex": (complex_numbers, f"{DOWN} of .* is stored as C64"),
    "a dtype that is none": (configured(dtype="float8_e4m3fn", torch_dtype="float8_e4m3fn"), "gives the dtype float8"),
    "whole numbers": (configured(dtype="int8", torch_dtype="int8"), "gives the dtype int8"),
    "more layers than can be built": (configured(num_hidden_layers=2**63), "counts 9,223,.* correct num_hidden_layers"),
    "a tokenizer that panics": (template_without_its_token, r"the tokenizer cannot be used \(no entry found for key\)"),
    "layers as a word": (
        configured(num_hidden_layers="four"),
        "num_hidden_layers|configuration|an integer",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_it_is_refused_by_name_before_and_while_loading(case: str, folder: Any, model: Path, tmp_path: Path) -> None:
    build, said = UNFIT[case]
    build(folder)
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps(EDIT))
    with pytest.raises(ModelError, match=said) as by_names:
        check(edits, model=folder.path)
    with pytest.raises(ModelError, match=said) as by_loading:
        open_model(resolve_model(folder.path), device="cpu")
    if case != "layers as a word":
        assert str(by_loading.value) == str(by_names.value)
    assert "\n" not in str(by_names.value)


def test_every_command_gives_the_same_verdict(
    folder: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without(HEAD)(folder)
    monkeypatch.chdir(tmp_path)
    Path("edits.jsonl").write_text(json.dumps(EDIT))
    corpus, path = str(model / "corpus.txt"), str(folder.path)
    for arguments in (
        ("check", "edits.jsonl", "--model", path),
        ("apply", "edits.jsonl", "--model", path, "--corpus", corpus, "--out", "out", "--device", "cpu"),
        ("eval", path, "edits.jsonl", "--device", "cpu"),
        ("inspect", path, "--norms"),
        ("stats", "compute", path, "--corpus", corpus, "--device", "cpu"),
    ):
        assert main(["-q", *arguments]) == 1, arguments
        assert f"random numbers: {HEAD}; download" in " ".join(capsys.readouterr().err.split())
    assert not Path("out").exists()
    # Comparing may be how somebody finds out what is wrong.
    assert main(["-q", "diff", str(model), path]) == 0
    assert f"random numbers: {HEAD}; download" in " ".join(capsys.readouterr().err.split())


def test_tensors_that_the_model_does_not_use_are_said(folder: Any) -> None:
    """As of layers that the config cuts off: transformers leaves them out, and so does the model that is edited."""
    configured(num_hidden_layers=3)(folder)
    base = open_model(resolve_model(folder.path), device="cpu", reporter=(listener := Listener()))
    assert base.architecture.layers == 3
    (text,) = listener.warnings
    assert "does not use model.layers.3." in text


@pytest.mark.parametrize("family", [name for name in TINY if "-" not in name])
def test_no_family_lacks_what_transformers_saved_of_it(family: str, tmp_path: Path) -> None:
    """Tied weights, buffers, and names that are stored otherwise than the model has them, are no gap."""
    path = tiny_model_folder(tmp_path / "model", family)
    bare = skeleton(load_config(ModelSource("tiny", path)))
    found = examine(Checkpoint(path), bare)
    assert (found.missing, found.reshaped, found.unused) == ((), (), ())


def test_examining_fills_in_nothing(folder: Any) -> None:
    """A checkpoint that lacks a shard may lack more than fits the memory, and filling it in would take minutes."""
    without(EMBEDDING)(folder)
    bare = skeleton(load_config(ModelSource("gap", folder.path)))
    before = torch.get_rng_state()
    assert examine(Checkpoint(folder.path), bare).missing == (EMBEDDING,)
    assert torch.equal(torch.get_rng_state(), before)


class TestAdapters:
    """An adapter that was left beside a merged model changes what is loaded, with peft alone."""

    def test_beside_a_model_it_is_refused_by_all(self, folder: Any, model: Path, tmp_path: Path) -> None:
        folder.single()
        (folder.path / ADAPTER).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"}))
        for open_it in (resolve_model, lambda path: Checkpoint(path).names()):
            with pytest.raises(ModelError, match=f"remove {ADAPTER} if the adapter is merged already"):
                open_it(folder.path)

    def test_alone_it_is_no_model(self, folder: Any) -> None:
        (folder.path / ADAPTER).write_text("{}")
        (folder.path / "config.json").unlink()
        with pytest.raises(ModelError, match="is an adapter"):
            resolve_model(folder.path)


class TestNumbers:
    """A base that is not finite is refused by the name of the tensor."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("name", [EMBEDDING, NORM, QUERY])
    def test_one_number_is_enough(self, name: str, value: float, folder: Any) -> None:
        broken = folder.weights[name].clone()
        broken.view(-1)[3] = value
        folder.single({**folder.weights, name: broken})
        with pytest.raises(ModelError, match=f"{name} of .* holds numbers that are not finite"):
            open_model(resolve_model(folder.path), device="cpu")

    def test_what_overflows_in_the_dtype_asked_for_says_so(self, folder: Any) -> None:
        folder.single({**folder.weights, QUERY: folder.weights[QUERY] * 1e6})
        with pytest.raises(ModelError, match=f"{QUERY} of .* overflows in float16; use --dtype bfloat16"):
            open_model(resolve_model(folder.path), device="cpu", dtype="float16")
        open_model(resolve_model(folder.path), device="cpu", dtype="bfloat16")


class TestEmbeddingRows:
    """Tokens that the embedding has no row for are refused at the line of the edit."""

    ROWS = vocabulary_size() - 40

    @pytest.fixture
    def short(self, folder: Any) -> Path:
        cut = {name: folder.weights[name][: self.ROWS] for name in (EMBEDDING, HEAD)}
        folder.single({**folder.weights, **cut})
        folder.configure(vocab_size=self.ROWS)
        AutoModelForCausalLM.from_pretrained(folder.path)
        return folder.path

    def test_check_and_apply_and_eval_agree(
        self, short: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        monkeypatch.chdir(tmp_path)
        readable = {**EDIT, "prompt": "a {}", "subject": "x", "target_new": "y"}
        lost = {**EDIT, "id": "b", "target_new": "German"}
        Path("edits.jsonl").write_text(f"{json.dumps(readable)}\n{json.dumps(lost)}\n")
        found = check("edits.jsonl", model=short)
        assert [edit.id for edit in found.edits] == ["a"]
        (refused,) = found.rejected
        said = f"edits.jsonl:2: {refused.reason}"
        assert "has no row in the model's embedding" in said
        corpus = str(model / "corpus.txt")
        given = ("--model", str(short), "--corpus", corpus, "--out", "out", "--device", "cpu")
        assert main(["-q", "apply", "edits.jsonl", *given]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert main(["-q", "eval", str(short), "edits.jsonl", "--device", "cpu"]) == 2
        assert said in " ".join(capsys.readouterr().err.split())

    def test_a_reference_text_is_refused_too(self, short: Path, tmp_path: Path, capsys: Any) -> None:
        text = tmp_path / "text.txt"
        text.write_text("a German Italian\n" * 10)
        given = (str(short), "--corpus", str(text), "--device", "cpu", "--layers", "1")
        assert main(["-q", "stats", "compute", *given]) == 1
        assert "has no row in the model's embedding" in " ".join(capsys.readouterr().err.split())


def test_check_does_not_ask_for_shards_of_a_hub_model_that_were_not_fetched(folder: Any, tmp_path: Path) -> None:
    """A folder of the user's own that lacks them is refused."""
    edits = tmp_path / "edits.jsonl"
    edits.write_text(json.dumps(EDIT))
    mapped = folder.shards()
    (folder.path / max(mapped.values())).unlink()
    with pytest.raises(ModelError, match="lacks the shard"):
        check(edits, model=folder.path)
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    folder.path.rename(snapshot)
    assert len(check(edits, model=snapshot).edits) == 1
