"""Going on with a stream: what it takes up, what must be the same, what it refuses; and the stream for programs."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import editcli
from editcli.errors import EditError, GuardError, NumericalError, RequestError, StateError
from editcli.records.record import Provenance
from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.requests.schema import from_record
from editcli.runs.outcome import rounded_differently
from editcli.runs.stream import Stack, Stream
from editcli.storage.conversion import convert
from tests.support.facts import CAPITALS, capital
from tests.support.reporters import Listener
from tests.support.workshop import STOP_AFTER, same_stream

ANCHORED = ("--editor", "rlsedit", "--stabilizer", "nas", "-o", "nas.anchor=5", "-o", "nas.guard=100")
UNNAMED = [
    {"prompt": "The river in {} is", "subject": name, "target_new": "Rome"} for name in ("Spain", "Italy", "Bob")
]


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "editcli/run.json").read_text())


def ids(out: Path) -> list[str]:
    return [request.id for request in recover(RunFolder(out)).requests]


def test_lines_added_to_the_file_are_picked_up(shop: Any) -> None:
    shop.edits("facts.jsonl", CAPITALS[:4])
    out = shop.unbroken("out", *ANCHORED)
    shop.edits("facts.jsonl", CAPITALS)
    assert shop.apply("out", *ANCHORED, "--resume").code == 0
    same_stream(out, shop.unbroken("once", *ANCHORED))
    assert record(out)["edits"] == {"read": 8, "applied": 8, "rejected": 0}


@pytest.mark.slow
def test_another_file_is_appended_even_after_a_kill_in_its_middle(shop: Any) -> None:
    shop.edits("first.jsonl", UNNAMED[:2])
    shop.edits("second.jsonl", [{**edit, "target_new": "Paris"} for edit in UNNAMED])
    out = shop.unbroken("out", *ANCHORED, edits="first.jsonl")
    killed = STOP_AFTER.format(step=2, signal="SIGKILL")
    assert shop.apply("out", *ANCHORED, "--resume", edits="second.jsonl", prelude=killed).code == -9
    assert record(out)["status"] == "running"
    for edits in ("second.jsonl", "second.jsonl", "first.jsonl"):
        assert shop.apply("out", *ANCHORED, "--resume", edits=edits).code == 0
        assert ids(out) == ["line-1", "line-2", "second:line-1", "second:line-2", "second:line-3"]
    # The second file gives the prompts of the first other targets.
    assert record(out)["edits"] == {"read": 5, "applied": 3, "rejected": 2}
    assert record(out)["status"] == "done"


def test_a_file_that_was_changed_where_it_was_read_is_refused(shop: Any) -> None:
    shop.unbroken("out", *ANCHORED)
    changed = [*CAPITALS[:2], {**CAPITALS[2], "target_new": "Athens"}, *CAPITALS[3:]]
    for edits in (changed, [{**UNNAMED[0], "id": "new"}, *CAPITALS]):
        shop.edits("facts.jsonl", edits)
        ended = shop.apply("out", *ANCHORED, "--resume")
        assert ended.code == 1
        assert "is in the stream already, but this file does not start with what was applied" in ended.err


@pytest.mark.slow
def test_edits_that_cannot_be_used_are_counted_over_all_files(shop: Any) -> None:
    for name, edits in (("first.jsonl", CAPITALS[:2]), ("second.jsonl", CAPITALS[2:3])):
        shop.edits(name, [*edits, {"id": "bad", "prompt": "{}", "subject": "", "target_new": "x"}])
    options = (*ANCHORED, "--on-error", "skip")
    out = shop.unbroken("out", *options, edits="first.jsonl")
    for edits in ("first.jsonl", "second.jsonl", "second.jsonl"):
        assert shop.apply("out", *options, "--resume", edits=edits).code == 0
    assert record(out)["edits"] == {"read": 5, "applied": 3, "rejected": 2}
    lines = [json.loads(line) for line in (out / "editcli/rejected.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [("first.jsonl", 3), ("second.jsonl", 2)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--editor", "memit"), "made with editor = rlsedit, not memit"),
        (("--stabilizer", "revive"), "made with stabilizers = ['nas'], not ['nas', 'revive']"),
        (("-o", "nas.anchor=2"), "options = nas: anchor: 5.0, not nas: anchor: 2.0"),
        (("-o", "targets.steps=2"), "targets = steps: 1, not steps: 2"),
        (("--layers", "1"), "made with layers = [1, 2], not [1]"),
        (("--seed", "5"), "made with seed = 0, not 5"),
        (("--save-dtype", "bfloat16"), "made with save_dtype = auto, not bfloat16"),
        (("--dtype", "bfloat16"), "made with dtype = torch.float32, not torch.bfloat16"),
        (("--corpus", "other.txt"), "made with other reference text or statistics"),
    ],
)
def test_what_must_be_the_same_is_named(
    shop: Any, anchored: Path, corpus_text: str, options: tuple[str, ...], said: str
) -> None:
    shutil.copytree(anchored, shop.folder / "out")
    (shop.folder / "other.txt").write_text(f"{corpus_text} More.")
    ended = shop.apply("out", *ANCHORED, "--resume", *options)
    assert ended.code == 1
    assert said in ended.err.splitlines()[-1]


@pytest.fixture(scope="session")
def anchored(tmp_path_factory: pytest.TempPathFactory, shop_in: Callable[[Path], Any]) -> Path:
    """A finished run of ANCHORED, not to be changed."""
    return shop_in(tmp_path_factory.mktemp("anchored")).unbroken("out", *ANCHORED)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("model.safetensors", "from a base model whose files have changed since"),
        ("tokenizer.json", "with a tokenizer that has changed since"),
        (None, "there is no model folder"),
    ],
)
def test_a_base_that_changed_is_refused_and_nothing_is_lost(
    shop: Any, anchored: Path, model: Path, change: str | None, said: str
) -> None:
    shutil.copytree(anchored, shop.folder / "out")
    before = {path: path.read_bytes() for path in (shop.folder / "out").rglob("*") if path.is_file()}
    shop.model = shutil.copytree(model, shop.folder / "base")
    if change is None:
        (shop.folder / "base/corpus.txt").rename(shop.folder / "corpus.txt")
        shutil.rmtree(shop.model)
    elif change == "tokenizer.json":
        path = shop.model / change
        path.write_text(json.dumps(json.loads(path.read_text())))
    else:
        data = bytearray((shop.model / change).read_bytes())
        data[-1] ^= 1
        (shop.model / change).write_bytes(data)
    ended = shop.apply("out", *ANCHORED, "--resume")
    assert ended.code == 1
    assert said in ended.err.splitlines()[-1]
    assert {path: path.read_bytes() for path in (shop.folder / "out").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["whole", "recipe"])
def test_a_run_goes_on_without_its_record_only_when_the_user_removes_it(shop: Any, anchored: Path, change: str) -> None:
    """Another record in its place would not name the first edits file, the reference text and what is new in it."""
    out = Path(shutil.copytree(anchored, shop.folder / "out"))
    path = out / "editcli/run.json"
    path.write_text("{" if change == "whole" else json.dumps({**record(out), "recipe": {"edits": 5}}))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    ended = shop.apply("out", *ANCHORED, "--resume")
    assert ended.code == 1
    (sentence,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert str(Path("out/editcli/run.json")) in sentence
    assert "remove that file" in sentence
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    path.unlink()
    assert shop.apply("out", *ANCHORED, "--resume").code == 0
    assert record(out)["status"] == "done"


def test_other_versions_are_warned_of(shop: Any, anchored: Path) -> None:
    out = Path(shutil.copytree(anchored, shop.folder / "out"))
    changed = record(out)
    changed["provenance"]["versions"]["torch"] = "1.0"
    (out / "editcli/run.json").write_text(json.dumps(changed))
    said = shop.apply("out", *ANCHORED, "--resume").err
    assert "made with other versions (torch was 1.0, now " in said
    assert "{" not in said, "what is the same is left out, and nothing reads like a program"


def test_a_record_that_says_nothing_of_versions_warns_of_nothing() -> None:
    nothing = {"base": {"name": "base", "fingerprint": ""}, "edits": {"file": "facts.jsonl", "sha256": ""}}
    theirs = convert({**nothing, "plugins": [], "versions": {}}, Provenance)
    made = {"versions": {"torch": "2"}, "plugins": [{"name": "b", "distribution": "d", "version": "1"}]}
    assert list(rounded_differently(theirs, convert({**nothing, **made, "device": "cpu"}, Provenance))) == []


def test_another_editor_is_refused_without_a_word_about_digits(shop: Any, anchored: Path) -> None:
    shutil.copytree(anchored, shop.folder / "out")
    asked = [*ANCHORED, "--resume"]
    asked[asked.index("--editor") + 1] = "memit"
    said = shop.apply("out", *asked).err
    assert "resume with the same" in said
    assert "last digits" not in said


def test_what_an_edit_says_survives_the_segment(tmp_path: Path) -> None:
    run, chooser = RunFolder(tmp_path), random.Random(0)
    run.create()
    parts = ["{", "}", "{}", "a", " ", "ä", "\n"]
    for _ in range(300):
        prompt = "".join(chooser.choices(parts, k=chooser.randint(1, 6)))
        try:
            edit = from_record({"prompt": prompt, "subject": chooser.choice(parts), "target_new": "x"}, line=3)
        except RequestError:
            continue
        assert from_record(edit.to_json()).digest == edit.digest


# The stream for programs.


EDITS = [capital(name) for name in "ABCDEF"]


@pytest.fixture
def choices(model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """Settings of a quick stream."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.fsync", lambda descriptor: None)
    targets = {"targets": {"steps": 1, "prefixes": 0}, "nas": {"anchor": 5.0, "guard": 100.0}}
    common = {"model": str(model), "layers": (1, 2), "corpus": str(model / "corpus.txt"), "device": "cpu"}
    return {**common, "editor": "rlsedit", "stabilizers": ("nas",), "settings": targets}


def test_a_program_can_go_on_with_its_stream(choices: dict[str, Any]) -> None:
    with editcli.EditStream("once", **choices) as stream:
        for batch in (EDITS[:2], EDITS[2:5], EDITS[5:]):
            assert stream.apply(batch).edits == tuple(edit["id"] for edit in batch)
        assert stream.model.config.num_hidden_layers == 4
    with editcli.EditStream("twice", **choices) as stream:
        stream.apply(EDITS[:2])
        with pytest.raises(StateError, match="in use"), editcli.EditStream("twice", **choices, overwrite=True):
            pass
    listener = Listener()
    with editcli.EditStream("twice", **choices, resume=True, reporter=listener) as stream:
        # A program has no file that its first edits could be gone from.
        assert not [text for text in listener.warnings if "no longer has" in text]
        assert [edit.id for edit in stream.edits] == ["A", "B"]
        stream.apply(EDITS[2:5])
        report = stream.save()
        assert (report.applied, report.status) == (5, "done")
        stream.apply(EDITS[5:])
    same_stream(Path("once"), Path("twice"))
    with pytest.raises(StateError, match="not open"):
        stream.apply(EDITS)


def test_a_program_that_fails_loses_nothing(choices: dict[str, Any]) -> None:
    def program() -> None:
        with editcli.EditStream("out", **choices) as stream:
            stream.apply(EDITS[:3])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        program()
    assert recover(RunFolder(Path("out"))).snapshot.step == 1


@pytest.mark.parametrize(
    ("batch", "error"),
    [
        ([], StateError),
        (EDITS[:1], RequestError),
        ([EDITS[3], EDITS[3]], RequestError),
        ([{"prompt": "no place", "subject": "A", "target_new": "x"}], RequestError),
    ],
)
def test_a_batch_that_cannot_be_used_changes_nothing(
    choices: dict[str, Any], batch: list[dict[str, Any]], error: type[EditError]
) -> None:
    with editcli.EditStream("out", **choices) as stream:
        stream.apply(EDITS[:2])
        with pytest.raises(error):
            stream.apply(batch)
        stream.apply(EDITS[2:4])
        assert [edit.id for edit in stream.edits] == ["A", "B", "C", "D"]


def test_an_editor_that_fails_while_it_remembers_closes_the_stream(
    choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from editcli_rlsedit.editor import RlsEdit

    def half(self: RlsEdit, session: Any, requests: Any, problems: Any) -> None:
        self.advance(problems[0].site, problems[0].keys)
        raise NumericalError("lost", site=problems[1].site.module)

    def program() -> None:
        with editcli.EditStream("out", **choices, checkpoint_every=1) as stream:
            stream.apply(EDITS[:2])
            monkeypatch.setattr(RlsEdit, "remember", half)
            with pytest.raises(NumericalError):
                stream.apply(EDITS[2:4])
            stream.apply(EDITS[4:])

    with pytest.raises(StateError, match="failed half-way"):
        program()
    assert recover(RunFolder(Path("out"))).snapshot.step == 1


def test_a_guard_leaves_a_program_its_stream(choices: dict[str, Any]) -> None:
    with editcli.EditStream("out", **choices, stop_if=("drift>1e-9",)) as stream:
        with pytest.raises(GuardError, match=r"drift>1e-09: drift would be .* at model.layers.1.mlp.down_proj"):
            stream.apply(EDITS[:2])
        assert stream.edits == ()
    with editcli.EditStream("out", **choices, resume=True) as stream:
        stream.apply(EDITS[:2])
    with editcli.EditStream("never", **choices) as stream:
        stream.apply(EDITS[:2])
    same_stream(Path("out"), Path("never"))


def test_a_batch_that_moves_a_norm_too_far_is_refused_before_it_is_kept(choices: dict[str, Any]) -> None:
    """Without any --stop-if: the sentence names the settings, and weights, journal and memory stay as they were."""
    wild = {**choices["settings"], "targets": {"steps": 2, "prefixes": 0, "lr": 1e3, "clamp": 1e3}}
    settings = {**wild, "alphaedit": {"threshold_kind": "directions", "nullspace_threshold": 0.4, "l2": 1e-6}}
    reckless: dict[str, Any] = {**choices, "editor": "alphaedit", "stabilizers": (), "settings": settings}
    with editcli.EditStream("out", **reckless) as stream:
        before = {name: weight.clone() for name, weight in stream.model.state_dict().items()}
        said = r"jump>0.5: jump would be .* at model.layers.1.mlp.down_proj .*lower alphaedit.nullspace_threshold"
        with pytest.raises(GuardError, match=said):
            stream.apply(EDITS[:2])
        assert stream.edits == ()
        assert all(torch.equal(weight, before[name]) for name, weight in stream.model.state_dict().items())
    assert recover(RunFolder(Path("out"))).snapshot.step == 0
    with editcli.EditStream("allowed", **reckless, stop_if=("jump>1e9",)) as stream:
        assert stream.apply(EDITS[:2]).sites[0].ratio > 1.5


def test_how_targets_ended_is_journaled(choices: dict[str, Any]) -> None:
    settings = {**choices["settings"], "targets": {"steps": 2, "prefixes": 0, "lr": 1e3, "stop_loss": 1e-9}}
    loose: dict[str, Any] = {**choices, "settings": settings, "stop_if": ("jump>1e9",)}
    with editcli.EditStream("out", **loose) as stream:
        expected = {"optimised": 2, "reached": 0, "clamped": 2}
        assert stream.apply(EDITS[:2]).targets == expected
        assert stream.save().targets == expected
    # What a resumed run reports covers the batches of before.
    with editcli.EditStream("out", **loose, resume=True) as stream:
        stream.apply(EDITS[2:4])
        assert stream.save().targets == {"optimised": 4, "reached": 0, "clamped": 4}
    assert record(Path("out"))["targets"] == {"optimised": 4, "reached": 0, "clamped": 4}


def test_figures_that_are_not_finite_reach_the_journal_as_null(
    choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stream, "_observe", lambda self, written: {"diagnostics": {"wild": float("inf")}})
    with editcli.EditStream("out", **choices) as stream:
        assert stream.apply(EDITS[:2]).metrics["diagnostics"]["wild"] is None


def test_what_components_draw_while_they_calibrate_hangs_on_the_seed_alone(
    choices: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, prepare = [], Stack.prepare

    def drawing(self: Stack, session: Any) -> None:
        drawn.append(torch.rand(1).item())
        prepare(self, session)

    monkeypatch.setattr(Stack, "prepare", drawing)
    for number, seed in enumerate((1, 1, 2)):
        with editcli.EditStream(f"out-{number}", **{**choices, "seed": seed}):
            pass
    assert drawn[0] == drawn[1] != drawn[2]
