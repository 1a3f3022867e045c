"""``eval`` and ``stats compute`` in two and three processes against one: the same figures, and one voice."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from editcli.__main__ import main
from editcli.cli.main import COMMANDS
from editcli.cli.stats import COMMANDS as STATS_COMMANDS
from editcli.testing import tiny_model_folder

pytestmark = pytest.mark.slow

SHARED = {"apply", "eval", "stats compute"}
"""What a launcher's processes can do together."""

CITIES = ("Paris", "London", "Berlin", "Tokyo", "Greece")
EDITS = [
    {
        "id": str(number),
        "prompt": "The capital of {} is",
        "subject": subject,
        "target_new": CITIES[number],
        "target_true": CITIES[number - 1],
        "paraphrase_prompts": [f"{subject} has the capital", f"People in {subject} call the capital"],
        "neighborhood_prompts": [{"prompt": f"The capital of {CITIES[number - 2]} is", "target": CITIES[number - 2]}],
        "locality": [{"prompt": f"The {what} of {subject} is"} for what in ("food", "flag")],
        "generation_prompts": [f"{subject} is", f"The food of {subject} is known for its"],
    }
    for number, subject in enumerate(("France", "Italy", "Spain"))
]

SHORT_ANSWERS = "import editcli.evaluation.locality as baseline; baseline.TOKENS = 1"
"""A prelude: five tokens that a random model writes are hardly ever a text that is read back as the same five."""

ON_RANK = """
import editcli.evaluation.scoring as scoring
from editcli.errors import ModelError
def fail(*arguments):
    raise ModelError('a probe does not fit')
scoring._score_rows = fail
"""
"""A prelude: one rank fails while it scores."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokens, as a base."""
    return tiny_model_folder(tmp_path_factory.mktemp("base") / "base", seed=1)


def moments(crew: Any, size: int, *arguments: str, **choices: Any) -> Any:
    """Compute second moments with a cache for each number of processes and rank."""
    caches = [str(crew.shop.folder / f"cache-{size}-{rank}") for rank in range(size)]
    # Small batches, of which every process then has some.
    variables = [{"XDG_CACHE_HOME": cache, "EDITCLI_OPTIONS": "statistics.batch_tokens=64"} for cache in caches]
    preludes = {rank: f"os.environ.update({given!r})\n" for rank, given in enumerate(variables)}
    model = str(crew.shop.model)
    text = ("--corpus", f"{model}/corpus.txt", "--layers", "1-2", "--device", "cpu", "--json")
    quick = ("--tokens", "800", "--max-length", "64", "--out", f"moments-{size}.safetensors")
    return crew.call(size, "stats", "compute", model, *text, *quick, *arguments, preludes=preludes, **choices)


def facts(crew: Any) -> str:
    crew.shop.edits("rich.jsonl", EDITS)
    return "rich.jsonl"


def measured(crew: Any, size: int, base: Path, *arguments: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate on ``size`` processes; return the document and the raw lines."""
    out = f"raw-{size}.jsonl"
    # Enough text for three batches.
    (crew.shop.folder / "text.txt").write_text((crew.shop.folder / crew.shop.model / "corpus.txt").read_text() * 6)
    given = ("--metrics", "counterfact,zsre,fluency", f"--base={base}", "--text", "text.txt")
    given += ("--device", "cpu", "--out", out, "--json")
    command = ("eval", str(crew.shop.model), facts(crew), *given, *arguments)
    leader, *others = crew.call(size, *command, preludes=dict.fromkeys(range(size), SHORT_ANSWERS))
    assert leader.code == 0, leader.err
    assert all((other.code, other.out, other.err) == (0, "", "") for other in others)
    lines = (crew.shop.folder / out).read_text().splitlines()
    return json.loads(leader.out), [json.loads(line) for line in lines]


def close(one: Any, other: Any) -> bool:
    """Tell whether two documents are the same, numbers within 1e-5."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(close(*pair) for pair in zip(one, other, strict=True))
    if isinstance(one, float):
        return one == pytest.approx(other, rel=1e-5, abs=1e-5)
    return one == other


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_find_the_moments_that_one_finds(crew: Any, size: int) -> None:
    found = {}
    for number in (1, size):
        leader, *others = moments(crew, number)
        assert leader.code == 0, leader.err
        assert all((other.code, other.out, other.err) == (0, "", "") for other in others)
        assert [site["computed"] for site in json.loads(leader.out)["sites"]] == [True, True]
        found[number] = load_file(crew.shop.folder / f"moments-{number}.safetensors")
    assert len(found[1]) == 2
    assert found[1].keys() == found[size].keys()
    for name, tensor in found[1].items():
        # They are summed in float64 and kept in float32, whose last digit is all that the order can change.
        torch.testing.assert_close(found[size][name], tensor, rtol=2e-7, atol=1e-12)
    folders = [crew.shop.folder / f"cache-{size}-{rank}" for rank in range(size)]
    assert [len(list(folder.rglob("*.safetensors"))) for folder in folders] == [2] + [0] * (size - 1)


def test_what_process_0_has_kept_is_not_computed_again(crew: Any) -> None:
    assert [ended.code for ended in moments(crew, 2)] == [0, 0]
    written = load_file(crew.shop.folder / "moments-2.safetensors")
    (crew.shop.folder / "moments-2.safetensors").unlink()
    leader, other = moments(crew, 2)
    assert (leader.code, other.code) == (0, 0), leader.err
    assert [site["computed"] for site in json.loads(leader.out)["sites"]] == [False, False]
    again = load_file(crew.shop.folder / "moments-2.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in written.items())


def test_a_file_that_process_0_cannot_write_ends_both(crew: Any) -> None:
    leader, other = moments(crew, 2, "--out", "nowhere/moments.safetensors")
    assert (leader.code, other.code, other.out, other.err) == (1, 1, "", "")
    assert leader.err.startswith("error: cannot write nowhere/moments.safetensors")
    assert len(leader.err.splitlines()) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_measure_what_one_measures(crew: Any, base: Path, size: int) -> None:
    alone, lines = measured(crew, 1, base)
    together, shared = measured(crew, size, base)
    assert alone["fluency"] is not None
    assert alone["zsre"]["locality"] is not None
    assert alone["drift"]["kl"] > 0
    assert close(together, alone)
    assert close(shared, lines)
    assert all(len(line["generations"]) == 2 and len(line["efficacy"]) == 1 for line in lines)


def test_more_processes_than_prompts(crew: Any) -> None:
    crew.shop.edits("one.jsonl", [{"prompt": "The capital of {} is", "subject": "France", "target_new": "Paris"}])
    given = ("eval", str(crew.shop.model), "one.jsonl", "--device", "cpu", "--json")
    (alone,), (leader, *_) = crew.call(1, *given), crew.call(3, *given)
    assert (alone.code, leader.code) == (0, 0), leader.err
    assert close(json.loads(leader.out), json.loads(alone.out))


def test_what_fails_on_another_process_is_told_by_process_0(crew: Any) -> None:
    given = ("eval", str(crew.shop.model), facts(crew), "--device", "cpu")
    leader, other = crew.call(2, *given, preludes={1: ON_RANK})
    assert (leader.code, leader.out, leader.err) == (1, "", "error: process 1 of 2: a probe does not fit\n")
    assert (other.code, other.out, other.err) == (1, "", "")


def test_a_process_that_dies_is_not_waited_for(crew: Any) -> None:
    strike = "import os, signal\nscoring._score_rows = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)"
    given = ("eval", str(crew.shop.model), facts(crew), "--device", "cpu", "--out", "raw.jsonl")
    leader, other = crew.call(2, *given, preludes={1: f"import editcli.evaluation.scoring as scoring\n{strike}"})
    assert (leader.code, other.code) == (1, -signal.SIGKILL)
    assert leader.err.startswith("error: another process of this run died")
    assert len(leader.err.splitlines()) == 1
    assert not (crew.shop.folder / "raw.jsonl").exists()


def test_what_is_wrong_for_all_is_told_once(crew: Any) -> None:
    leader, other = moments(crew, 2, "--layers", "77")
    assert (leader.code, other.code, other.err) == (1, 1, "")
    assert len(leader.err.splitlines()) == 1
    leader, other = crew.call(2, "eval", str(crew.shop.model), "missing.jsonl", "--device", "cpu")
    # A file that is missing is a usage error, which process 0 has found itself.
    assert (leader.code, other.code, other.err) == (2, 1, "")
    assert len(leader.err.splitlines()) == 1


def test_other_files_are_refused_at_the_start(crew: Any, shop_in: Any, tmp_path_factory: Any) -> None:
    shops = [shop_in(tmp_path_factory.mktemp(f"machine-{rank}")) for rank in range(2)]
    for seed, shop in enumerate(shops):
        tiny_model_folder(shop.folder / "model", seed=seed)
        (shop.folder / "text.txt").write_text(f"There are {seed} words here.\n" * 50)
    compute = ("stats", "compute", "model", "--layers", "1", "--tokens", "50", "--device", "cpu", "--corpus")
    refused = {
        "model files": [("eval", "model", "facts.jsonl", "--device", "cpu"), (*compute, "self")],
        "recipe and text": [(*compute, "text.txt")],
    }
    for what, commands in refused.items():
        for command in commands:
            leader, other = crew.call(2, *command, shops=shops)
            assert (leader.code, other.code, other.out, other.err) == (1, 1, "", "")
            assert leader.err.startswith(f"error: {what} differ between process 0 and process 1")
    shops[1].edits("facts.jsonl", EDITS)
    leader, other = crew.call(2, *refused["model files"][0], shops=shops)
    assert (leader.code, other.code, other.err) == (1, 1, "")
    assert leader.err.startswith("error: recipe, edits and text differ between process 0 and process 1")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("facts.jsonl", "--harness", "any"), "error: --harness and --suite run in one process, not in 2"),
        (("-",), "error: 2 processes cannot share the standard input"),
    ],
)
def test_what_eval_does_in_one_process_only(crew: Any, arguments: tuple[str, ...], sentence: str) -> None:
    leader, other = crew.call(2, "eval", str(crew.shop.model), *arguments, "--device", "cpu")
    assert (leader.code, other.code, other.err) == (1, 1, "")
    assert leader.err.startswith(sentence)


def test_every_other_command_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = {*COMMANDS, *(f"stats {name}" for name in STATS_COMMANDS)} - {"stats"}
    assert names > SHARED
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    for name in sorted(names):
        assert main([*name.split(), "--no-such-option"]) == 2
        refused = f"2 processes cannot run 'editcli {name}" in capsys.readouterr().err
        assert refused == (name not in SHARED), name
