"""``editcli stats``: computed once, kept, shown, and refused for another model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from editcli.__main__ import main
from editcli.testing import INTERMEDIATE, tiny_model_folder
from editcli.testing.models import EXPERT, EXPERTS, SHARED
from tests.support.families import needs_packed_experts


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """Two tiny models of the same shape."""
    folder = tmp_path_factory.mktemp("models")
    return {seed: str(tiny_model_folder(folder / str(seed), "llama", seed=seed)) for seed in (0, 1)}


@pytest.fixture
def stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], corpus_text: str) -> Any:
    """Run ``editcli stats ... --json`` in a folder with a corpus and return the document."""
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text(corpus_text)

    def stats(*arguments: str) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["stats", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return stats


def compute(stats: Any, model: str, *arguments: str) -> dict[str, Any]:
    return stats("compute", model, "--corpus", "corpus.txt", "--layers", "1-2", "--device", "cpu", *arguments)


def test_what_was_computed_is_kept_and_shown(stats: Any, models: dict[int, str]) -> None:
    first = compute(stats, models[0])
    assert [site["computed"] for site in first["sites"]] == [True, True]
    assert {site["width"] for site in first["sites"]} == {INTERMEDIATE}
    assert all(Path(site["path"]).is_file() for site in first["sites"])
    again = compute(stats, models[0])
    assert [site["computed"] for site in again["sites"]] == [False, False]
    shown = stats("show", models[0])["sites"]
    assert [site["module"] for site in shown] == [f"model.layers.{layer}.mlp.down_proj" for layer in (1, 2)]
    assert stats("show", models[1])["sites"] == []
    assert len(stats("show")["sites"]) == 2


def test_everything_that_matters_is_part_of_the_key(stats: Any, models: dict[int, str]) -> None:
    compute(stats, models[0])
    for changed in (["--tokens", "100"], ["--max-length", "16"]):
        assert all(site["computed"] for site in compute(stats, models[0], *changed)["sites"])
    assert all(site["computed"] for site in compute(stats, models[1])["sites"])


def test_a_file_serves_its_own_model_and_no_other(
    stats: Any, models: dict[int, str], capsys: pytest.CaptureFixture[str]
) -> None:
    compute(stats, models[0], "--out", "moments.safetensors")
    Path("facts.jsonl").write_text('{"prompt": "{} is in", "subject": "Rome", "target_new": "France"}\n')
    quick = ["--layers", "1-2", "-o", "targets.steps=3", "-o", "targets.prefixes=0", "--no-eval", "--device", "cpu"]
    command = ["apply", "facts.jsonl", "--stats", "moments.safetensors", *quick]
    assert main([*command, "--model", models[1]]) == 1
    assert "moments.safetensors" in capsys.readouterr().err
    assert not Path("facts-edited").exists()
    assert main([*command, "--model", models[0]]) == 0


def test_a_table_is_shown_to_people(stats: Any, models: dict[int, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "show"]) == 0
    assert "There are no second moments yet" in capsys.readouterr().out
    compute(stats, models[0])
    assert main(["stats", "show", models[0]]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert max(len(line) for line in shown.splitlines()[:-2]) <= 80


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--layers", "9"], "layer 9 does not exist"),
        (["--corpus", "none.txt"], "there is no corpus file none.txt"),
        (["--out", "no/such/folder/x.safetensors"], "cannot write"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    stats: Any, models: dict[int, str], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    command = ["stats", "compute", models[0], "--corpus", "corpus.txt", "--layers", "1", "--device", "cpu", *arguments]
    assert main(command) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert said in line


@needs_packed_experts
def test_a_layer_with_two_kinds_of_experts_has_statistics_of_each(
    stats: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model_folder(tmp_path / "model", "qwen2_moe"))
    Path("facts.jsonl").write_text('{"prompt": "{} is in", "subject": "Rome", "target_new": "France"}\n')
    command = ["apply", "facts.jsonl", "--model", model, "--layers", "1-2", "--stats", "moments.safetensors", "-q"]
    command += ["-e", "moeedit", "-o", "targets.steps=3", "-o", "targets.prefixes=0", "--no-eval", "--device", "cpu"]
    quick = ["--tokens", "200", "--out", "moments.safetensors"]
    shared = compute(stats, model, *quick)["sites"]
    assert {site["width"] for site in shared} == {SHARED}
    assert main(command) == 1
    assert "editcli stats compute --experts" in capsys.readouterr().err
    routed = compute(stats, model, "--experts", *quick)["sites"]
    assert {site["width"] for site in routed} == {EXPERTS * EXPERT}
    assert main(command) == 0
    assert {site["module"] for site in stats("show", model)["sites"]} == {s["module"] for s in shared + routed}
    # The first layer of this model is dense.
    assert main(["stats", "compute", model, "--experts", "--layers", "0", "--corpus", "corpus.txt"]) == 1
    assert "layer 0 has no routed experts" in capsys.readouterr().err
