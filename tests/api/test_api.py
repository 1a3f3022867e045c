"""The library's front door: editing a folder or a model in memory, all at once or batch by batch."""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import editcli
from editcli.errors import EditError, ModelError, NumericalError, OptionError, RequestError, StateError
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.settings.recipe import Choices, Recipe
from editcli.storage.checkpoint import Checkpoint, file_digest
from editcli.testing import tiny_config, tiny_model, tiny_model_folder, tiny_tokenizer
from tests.support.facts import capital, write_lines
from tests.support.places import ROOT

EDITS = [capital(name) for name in ("France", "Italy", "Spain", "Greece")]
QUICK: dict[str, Any] = {
    "layers": (1, 2),
    "settings": {"targets": {"steps": 2, "prefixes": 0}, "nas": {"anchor": 5.0, "guard": 100.0}},
}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, so that what a call writes is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    return folder


@pytest.fixture
def choices(tmp_path: Path, corpus_text: str) -> Any:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(corpus_text)
    return {**QUICK, "corpus": str(corpus), "evaluate": False}


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tiny_model_folder(tmp_path / "model", request.param)


def held(folder: Path) -> tuple[PreTrainedModel, Any]:
    """Load a folder as a program would."""
    loaded = editcli.open_model(editcli.resolve_model(folder))
    return loaded.model, loaded.tokens.tokenizer


def copies(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: PreTrainedModel, before: Mapping[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def edited_names(model: PreTrainedModel) -> set[str]:
    pattern = "transformer.h.{}.mlp.c_proj.weight" if model.config.model_type == "gpt2" else None
    pattern = pattern or "model.layers.{}.mlp.down_proj.weight"
    return {pattern.format(layer) for layer in QUICK["layers"]}


def test_a_model_in_memory_is_edited_in_place_and_nothing_is_written(
    folder: Path, choices: Any, workplace: Path
) -> None:
    model, tokenizer = held(folder)
    before = copies(model)
    edited = editcli.edit(
        model, EDITS, tokenizer=tokenizer, editor="memit", stabilizers=["nas"], **(choices | {"evaluate": True})
    )
    assert edited.model is model
    assert edited.tokenizer is tokenizer
    assert changed(model, before) == edited_names(model)
    assert (edited.report.applied, edited.report.status, edited.report.out) == (4, "done", "")
    assert repr(edited) == f"<Edited {edited.report.model}: 4 of 4 edits with memit+nas, done>"
    assert edited.report.efficacy["retained"] is not None
    assert isinstance(edited.complete("The capital of France is", tokens=3), str)
    assert list(workplace.iterdir()) == []
    edited.undo()
    assert changed(model, before) == set()
    with pytest.raises(StateError, match="nothing to save"):
        edited.save("saved")
    assert list(workplace.iterdir()) == []


@pytest.mark.parametrize("stabilizers", [(), ("nas", "clip")])
def test_memory_and_folder_give_the_same_weights(
    folder: Path, choices: Any, stabilizers: tuple[str, ...], workplace: Path
) -> None:
    """Also where a stabilizer acts at read-out: the model then holds what is saved."""
    model, tokenizer = held(folder)
    editcli.edit(model, EDITS, tokenizer=tokenizer, stabilizers=stabilizers, batch_size=2, **choices)
    loaded = editcli.edit(folder, EDITS, stabilizers=stabilizers, batch_size=2, **choices)
    assert list(workplace.iterdir()) == []
    kept = editcli.edit(str(folder), EDITS, stabilizers=stabilizers, batch_size=2, out="out", **choices)
    assert [request.id for request in recover(RunFolder(Path("out"))).requests] == [edit["id"] for edit in EDITS]
    assert loaded.save("saved") == Path("saved")
    assert {path.name for path in Path("saved").iterdir()} == {path.name for path in folder.iterdir()}
    for name in edited_names(model):
        expected = Checkpoint("out").read(name)
        for found in (model, loaded.model, kept.model):
            assert torch.equal(found.get_parameter(name), expected)
    written = [file_digest(where / "model.safetensors") for where in (Path("out"), Path("saved"))]
    assert written[0] == written[1]


def test_a_half_precision_model_keeps_its_dtype_and_comes_back_exactly(choices: Any) -> None:
    model, tokenizer = tiny_model("llama", dtype="bfloat16"), tiny_tokenizer()
    before = copies(model)
    edited = editcli.edit(model, EDITS[:2], tokenizer=tokenizer, **choices)
    assert changed(model, before) == edited_names(model)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    edited.undo()
    assert changed(model, before) == set()


def test_a_second_edit_starts_from_the_first(choices: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    editcli.edit(model, EDITS[:2], tokenizer=tokenizer, **choices)
    between = copies(model)
    second = editcli.edit(model, EDITS[2:], tokenizer=tokenizer, **choices)
    assert changed(model, between) == edited_names(model)
    second.undo()
    assert changed(model, between) == set()


def test_modes_and_gradients_are_given_back(choices: Any) -> None:
    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    model.get_submodule("model.layers.0").eval()
    model.get_parameter("lm_head.weight").requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    editcli.edit(model, EDITS[:1], tokenizer=tokenizer, **choices)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_run_that_fails_leaves_the_model_as_it_was(choices: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from editcli.runs.stream import Stream

    model, tokenizer = tiny_model("llama").train(), tiny_tokenizer()
    before, apply = copies(model), Stream.apply

    def failing(self: Stream, requests: Any) -> Any:
        if self.position.step == 1:
            assert changed(model, before)
            raise NumericalError("lost", site="here")
        return apply(self, requests)

    monkeypatch.setattr(Stream, "apply", failing)
    with pytest.raises(NumericalError):
        editcli.edit(model, EDITS, tokenizer=tokenizer, batch_size=2, **choices)
    assert changed(model, before) == set()
    assert model.training


def test_a_result_that_cannot_be_written_leaves_the_model_as_it_was(
    choices: Any, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = copies(model)

    def full(folder: Path) -> None:
        (folder / "half").write_text("written")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(StateError, match="No space left"):
        editcli.edit(model, EDITS, tokenizer=tokenizer, out="out", **choices)
    assert changed(model, before) == set()
    # Nor is there half a folder that stands in the way of the next attempt.
    assert list(workplace.iterdir()) == []


def test_a_batch_that_fails_at_its_end_leaves_a_model_in_memory_as_before(
    choices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from editcli.runs import stream as streams

    model, tokenizer = tiny_model("llama"), tiny_tokenizer()

    def failing(*arguments: Any) -> None:
        raise NumericalError("lost", site="here")

    def program() -> None:
        with editcli.Stream(model=model, tokenizer=tokenizer, **choices) as stream:
            stream.apply(EDITS[:2])
            kept.update(copies(model))
            monkeypatch.setattr(streams, "commit", failing)
            with pytest.raises(NumericalError):
                stream.apply(EDITS[2:])

    kept: dict[str, Tensor] = {}
    with pytest.raises(StateError, match="failed half-way; its weights are as before; open another"):
        program()
    assert changed(model, kept) == set()


def test_a_stream_that_could_not_be_saved_is_not_open(
    folder: Path, choices: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = editcli.Stream("out", model=folder, **choices)

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    def program() -> None:
        with stream:
            stream.apply(EDITS[:2])
            monkeypatch.setattr("editcli.runs.output.write_model", full)

    with pytest.raises(StateError, match="No space left"):
        program()
    with pytest.raises(StateError, match="not open"):
        stream.apply(EDITS[2:])


def test_a_guard_keeps_the_batches_before(choices: Any) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = copies(model)
    edited = editcli.edit(model, EDITS, tokenizer=tokenizer, stop_if="drift>1e-9", **choices)
    assert edited.report.status == "stopped"
    assert "drift>1e-09" in (edited.report.stopped_by or "")
    assert changed(model, before) == set()


def test_a_model_in_memory_can_be_saved_at_once(choices: Any, workplace: Path) -> None:
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer(bos=False)
    editcli.edit(model, EDITS[:2], tokenizer=tokenizer, out="out", **choices)
    again = AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32)
    assert changed(again, copies(model)) == set()
    assert (workplace / "out" / "tokenizer.json").is_file()
    before = copies(model)
    with pytest.raises(StateError, match="not an empty folder"):
        editcli.edit(model, EDITS[2:], tokenizer=tokenizer, out="out", **choices)
    assert changed(model, before) == set()


@pytest.mark.slow
def test_edits_may_be_a_file_requests_or_objects(folder: Path, choices: Any, tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    write_lines(file, EDITS)
    ways: list[Any] = [file, str(file), editcli.read_edits(file).requests, [*EDITS], tuple(EDITS)]
    names: set[bytes] = set()
    for number, edits in enumerate(ways):
        edited = editcli.edit(folder, edits, **choices)
        names.add((edited.save(f"saved-{number}") / "model.safetensors").read_bytes())
    assert len(names) == 1


@pytest.mark.parametrize(
    ("edits", "said"),
    [
        ([], "there is no edit"),
        (EDITS[0], "must be a list"),
        (["France"], r"edits\[0\]: an edit is an object of the edits schema, not a text"),
        ([EDITS[0], {"prompt": "no place", "subject": "A", "target_new": "x"}], r"edits\[1\]: the subject 'A'"),
        ([EDITS[0], EDITS[0]], "already used on edits"),
        ([{**EDITS[0], "note": object()}], "cannot be written as JSON"),
        ([{**EDITS[0], "note": float("nan")}], "cannot be written as JSON"),
    ],
)
def test_edits_that_cannot_be_used_are_named(folder: Path, choices: Any, edits: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        editcli.edit(folder, edits, **choices)


def test_unusable_edits_can_be_skipped(folder: Path, choices: Any) -> None:
    bad = {"prompt": "no place", "subject": "A", "target_new": "x"}
    edited = editcli.edit(folder, [bad, *EDITS[:2]], on_error="skip", **choices)
    assert (edited.report.read, edited.report.applied, len(edited.report.rejected)) == (3, 2, 1)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"editer": "memit"}, OptionError, "did you mean 'editor'"),
        ({"editor": "memot"}, EditError, "did you mean 'memit'"),
        ({"stabilizers": "nsa"}, EditError, "did you mean 'nas'"),
        ({"layers": "8-4"}, OptionError, "runs backwards"),
        ({"tokenizer": object()}, OptionError, "has its own"),
        ({"resume": True}, OptionError, "resume= belongs to a run folder"),
        ({"checkpoint_every": 2}, OptionError, "pass out="),
        ({"parallel": "tensor"}, OptionError, "needs several processes"),
    ],
)
def test_settings_that_make_no_sense_are_refused(folder: Path, given: Any, error: type[EditError], said: str) -> None:
    with pytest.raises(error, match=said):
        editcli.edit(folder, EDITS, **given)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({}, ModelError, "pass tokenizer="),
        ({"tokenizer": object()}, ModelError, "no fast tokenizer"),
        ({"tokenizer": tiny_tokenizer(), "device": "cpu"}, OptionError, "device= says how editcli loads"),
        ({"tokenizer": tiny_tokenizer(), "out": "out", "resume": True}, OptionError, "resume="),
    ],
)
def test_what_does_not_go_with_a_loaded_model_is_refused(given: Any, error: type[EditError], said: str) -> None:
    with pytest.raises(error, match=said):
        editcli.edit(tiny_model("llama"), EDITS, **given)


def test_only_a_whole_transformers_model_can_be_edited() -> None:
    module: Any = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="a Linear cannot be edited"):
        editcli.edit(module, EDITS, tokenizer=tiny_tokenizer())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config("llama"))
    with pytest.raises(ModelError, match="offloaded"):
        editcli.edit(empty, EDITS, tokenizer=tiny_tokenizer())


def test_a_stream_may_live_in_memory(choices: Any, workplace: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    before = copies(model)
    with editcli.Stream(model=model, tokenizer=tokenizer, editor="rlsedit", stabilizers=["clip"], **choices) as stream:
        assert stream.apply(EDITS[:2]).edits == ("France", "Italy")
        stream.apply(EDITS[2:])
        assert [edit.id for edit in stream.edits] == [edit["id"] for edit in EDITS]
        assert stream.model is model
        assert stream.tokenizer is tokenizer
        assert stream.save().applied == 4
        assert repr(stream) == "<Stream in (memory): 4 edits>"
    assert repr(stream) == "<Stream in (memory): not open>"
    assert changed(model, before) == edited_names(model)
    assert list(workplace.iterdir()) == []
    with pytest.raises(StateError, match="not open"):
        stream.apply(EDITS)
    once = tiny_model("llama")
    editcli.edit(
        once, EDITS, tokenizer=tokenizer, batch_size=2, **(choices | {"editor": "rlsedit", "stabilizers": "clip"})
    )
    assert changed(once, copies(model)) == set()


def test_a_stream_into_a_folder_needs_files_to_start_from(choices: Any) -> None:
    with pytest.raises(OptionError, match="reads its base from files"):
        editcli.Stream("out", model=tiny_model("llama"), tokenizer=tiny_tokenizer(), **choices)


def test_the_typed_settings_are_those_of_a_recipe() -> None:
    fields = {field.name for field in dataclasses.fields(Recipe)}
    # The stack is named as the editor; the recipe records what it was.
    assert set(Choices.__annotations__) == fields - {"edits", "model", "out", "stack"}


def test_the_earlier_name_of_the_stream_still_works() -> None:
    assert editcli.EditStream is editcli.Stream


@pytest.mark.slow
def test_the_example_does_what_it_says(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundled model knows facts, so here the words that come out are meant."""
    example = ROOT / "examples" / "api" / "edit.py"
    monkeypatch.setattr("sys.argv", [str(example), "made"])
    runpy.run_path(str(example), run_name="__main__")
    said = capsys.readouterr().out
    assert "2 edits applied" in said
    assert said.count("The Eiffel Tower is in Rome") == 2
    assert "The capital of Australia is Vienna" in said
    assert "The Eiffel Tower is in Paris" in said
    assert [path.name for path in workplace.iterdir()] == ["made"]
    assert [request.id for request in recover(RunFolder(Path("made"))).requests] == ["fact-0", "fact-1"]
