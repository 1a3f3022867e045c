"""The benchmarks run, small: what takes a big machine must not be found broken there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from benchmarks import (
    gpu,
    heap,
    horizon,
    horizon_page,
    interference,
    key_drift,
    lost,
    moments,
    predictors,
    profile_targets,
    real_models,
    sites,
    solve,
)
from benchmarks.common import run_folders
from benchmarks.document import SECTIONS, page
from benchmarks.speed import SECTIONS as SPEED
from benchmarks.stream import quarters
from editcli.linalg import spectra
from editcli.linalg.directions import change_along

pytestmark = pytest.mark.slow


def run(command: click.Command, out: Path, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(command, [*arguments, "--out", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    return json.loads(out.read_text())["result"]


SMALL = ("--shapes", "tiny", "--device", "cpu", "--layers", "1,2", "--steps", "2")


@pytest.fixture(scope="module")
def small_gpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    return run(gpu.main, out, *SMALL, "--batches", "1,3", "--ways", "shipped,eager,exact")


def test_the_script_for_an_accelerator_runs_on_a_cpu(small_gpu: dict[str, Any]) -> None:
    shape = small_gpu["shapes"]["tiny"]
    assert [(row["way"], row["batch_size"]) for row in shape["rows"]] == [
        ("shipped", 1),
        ("shipped", 3),
        ("eager", 3),
        ("exact", 3),
    ]
    for row in shape["rows"]:
        assert set(row["seconds_per_batch"]) == {"targets", "keys", "solve", "write"}
        assert all(seconds > 0 for seconds in row["seconds_per_batch"].values())
        expected = row["batch_size"] / sum(row["seconds_per_batch"].values())
        assert row["edits_per_second"] == pytest.approx(expected)
        assert row["speedup"] == pytest.approx(expected * shape["published_seconds"])
        assert 0 < row["matrix_share"] < 1
        assert row["peak_bytes"] is None
    shipped, eager, exact = shape["rows"][1:]
    assert shipped["padding"] == exact["padding"] < eager["padding"]
    assert eager["engine"] == "eager, grouped-attention"


def test_nothing_is_started_after_the_limit(tmp_path: Path) -> None:
    rows = run(gpu.main, tmp_path / "gpu.json", *SMALL, "--batches", "1,3", "--limit", "0")["shapes"]["tiny"]["rows"]
    assert [row["batches"] for row in rows] == [1]


def test_the_solves_agree(tmp_path: Path) -> None:
    found = run(solve.main, tmp_path / "solve.json", "--width", "48", "--edits", "5", "--rows", "16", "--repeats", "1")
    assert found["rows"][0]["apart"] < 1e-9


def test_the_ways_to_gather_second_moments_agree(tmp_path: Path) -> None:
    arguments = ("--model", "tiny", "--sites", "2", "--tokens", "300", "--repeats", "1")
    assert run(moments.main, tmp_path / "moments.json", *arguments)["apart"] < 1e-4


def test_every_idea_can_be_left_out_and_the_counted_ones_are_predicted(tmp_path: Path) -> None:
    arguments = ("--model", "tiny", "--edits", "2", "--steps", "2", "--repeats", "1")
    found = run(profile_targets.main, tmp_path / "profile.json", *arguments)["models"]["tiny"]
    assert set(found["cost_without"]) == set(profile_targets.without())
    assert all(cost > 0 for cost in found["cost_without"].values())
    assert set(found["predicted"]) < set(found["cost_without"])
    assert all(cost > 1 for cost in found["predicted"].values())


def test_freed_memory_is_measured_both_ways(tmp_path: Path) -> None:
    arguments = ("--batch", "2", "--steps", "2", "--repeats", "1")
    found = run(heap.main, tmp_path / "heap.json", *arguments)
    assert set(found["ways"]) == set(heap.WAYS)
    assert found["ratio"] > 0


def test_sites_are_timed_both_ways(tmp_path: Path) -> None:
    (row,) = run(sites.main, tmp_path / "sites.json", "--model", "tiny", "--batch-size", "3", "--repeats", "1")["rows"]
    assert row["zero"] > 0
    assert row["going_on"] > 0


def test_the_figures_of_the_weights_are_those_of_the_library() -> None:
    base, step = (torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)).double() for seed in (0, 1))
    figures = predictors.Decomposed.of(base.numpy()).figures((base + 0.3 * step).numpy(), 4)
    before, after = spectra.spectrum(base), spectra.spectrum(base + 0.3 * step, vectors=20)
    alike = spectra.similarity(before, after, before.k(predictors.TAU))
    assert figures["change"] == pytest.approx(change_along(base, base + 0.3 * step))
    assert figures["change_per_edit"] == pytest.approx(figures["change"] / 2)
    assert figures["drift"] == pytest.approx(float(0.3 * step.norm() / base.norm()))
    assert (figures["ls"], figures["ss"]) == pytest.approx((alike.ls, alike.ss))


def test_ranks_are_correlated_over_all_within_stacks_and_among_them() -> None:
    pytest.importorskip("scipy")
    rows = {
        stack: [
            dict.fromkeys(predictors.NAMES, n + place) | {"edits": n, "efficacy_accuracy": place - n} for n in range(4)
        ]
        for place, stack in enumerate("abcd")
    }
    found = predictors.correlations(rows)["efficacy_accuracy"]["ratio"]
    assert (found["within"], found["among"]) == (-1, 1)
    assert found["together"] == pytest.approx(0, abs=0.1)


def test_a_stream_is_cut_into_quarters() -> None:
    assert quarters([10] * 8, [1.0] * 4 + [2.0] * 4) == [10, 10, 5, 5]
    assert quarters([10, 10], [1.0, 4.0]) == [10, 2.5]


def test_the_page_leaves_out_what_was_not_measured(tmp_path: Path) -> None:
    assert "##" not in page(tmp_path)


def test_every_result_that_is_kept_has_its_section() -> None:
    results = Path(gpu.__file__).parent / "results"
    for name, section in {**SECTIONS, **SPEED}.items():
        path = results / f"{name}.json"
        if path.is_file():
            lines = list(section(json.loads(path.read_text())))
            assert lines[0].startswith("## ")
            assert all(isinstance(line, str) for line in lines)


def test_fresh_results_have_their_section(small_gpu: dict[str, Any]) -> None:
    lines = list(SPEED["gpu"]({"result": small_gpu}))
    assert lines[0] == "## Real shapes on cpu"
    assert sum(line.startswith("| tiny |") for line in lines) == 4


@dataclass(frozen=True, slots=True)
class Sleeper(horizon.Job):
    """A stack that takes a minute."""

    def command(self, shared: Sequence[str]) -> list[str]:
        return [sys.executable, "-c", "import time; time.sleep(60)"]


def test_an_interrupted_horizon_ends_its_stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[subprocess.Popen[bytes]] = []

    class Watched(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            began.append(self)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    jobs = [Sleeper("memit", (), tmp_path / "memit")]
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "Popen", Watched)
        patch.setattr(time, "sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            horizon.run(jobs, (), at_once=1, console=Console(quiet=True))
    assert [process.wait(timeout=20) < 0 for process in began] == [True]


def test_a_stack_that_is_named_twice_runs_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[horizon.Job] = []
    monkeypatch.setattr(horizon, "run", lambda jobs, shared, **options: ran.extend(jobs))
    result = run(horizon.main, tmp_path / "horizon.json", str(tmp_path), str(tmp_path), "memit", "rlsedit", "memit")
    assert [job.stack for job in ran] == ["memit", "rlsedit"]
    assert result["stacks"] == {}


def test_runs_of_a_bench_and_of_a_horizon_are_named_by_their_stacks(tmp_path: Path) -> None:
    runs = [tmp_path / "memit+nas", tmp_path / "rlsedit_targets.prefixes=1" / "rlsedit"]
    for run in runs:
        (run / "editcli").mkdir(parents=True)
    (tmp_path / "not a run").mkdir()
    assert run_folders(tmp_path) == {"memit+nas": runs[0], "rlsedit_targets.prefixes=1": runs[1]}


def test_what_a_later_batch_adds_at_an_edits_key_is_counted_against_its_own() -> None:
    keys = np.eye(3)[:, :2]
    first = interference.Batch(keys=keys, residual=keys, left=keys, right=keys)
    # The second batch takes half of the first edit back and leaves the other alone.
    second = interference.Batch(keys=keys[:, :1], residual=keys[:, :1], left=-keys[:, :1] / 2, right=keys[:, :1])
    figures = lost.of_batch([[first, second]], 0)
    assert figures["written"].tolist() == [1, 1]
    assert figures["disturbed"].tolist() == [0.5, 0]
    assert figures["taken_back"].tolist() == [0.5, 0]
    assert figures["likeness"].tolist() == [1, 0]
    assert lost.of_batch([[first, second]], 1)["disturbed"].tolist() == [0]


def test_a_figure_that_tells_lost_edits_has_an_area_of_one() -> None:
    assert lost.area([2, 3], [0, 1]) == 1
    assert lost.area([1], [1]) == 0.5
    assert lost.area([], [1]) is None


def test_a_stack_is_titled_by_the_options_that_not_all_have() -> None:
    curves = [{"stack": "memit", "options": ["a.b=1"]}, {"stack": "rlsedit", "options": ["a.b=1", "c.d=2"]}]
    common = horizon_page.shared_options([*curves, {"stack": "locft", "options": []}])
    assert [horizon_page.title(curve, common) for curve in curves] == ["memit", "rlsedit c.d=2"]


def test_a_moved_key_changes_the_output_though_the_weights_hold_the_recorded_one() -> None:
    base, once = torch.zeros(2, 2), torch.eye(2)
    recorded, moved = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[1.0], [0.5]]).double()
    stayed = key_drift.figures(base, (once, recorded), (once, moved))
    assert stayed == {"moved": 0.5, "same_key": 0, "moved_key": 0.5, "together": 0.5}
    taken_back = key_drift.figures(base, (once, recorded), (base, recorded))
    assert taken_back == {"moved": 0, "same_key": 1, "moved_key": 0, "together": 1}


def test_a_figure_that_ranks_stacks_as_accuracy_does_is_fully_correlated() -> None:
    rows = [{"efficacy_accuracy": n / 4, "stream": {"ls": n**3, "ss": -n, "drift": None}} for n in range(4)]
    assert real_models.likeness(rows, "ls") == pytest.approx(1)
    assert real_models.likeness(rows, "ss") == pytest.approx(-1)
    assert real_models.likeness(rows, "drift") is None
    assert real_models.ranks([5, 1, 5]).tolist() == [1.5, 0, 1.5]
