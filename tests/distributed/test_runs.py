"""Runs of two and three processes against runs of one: the same edits with the same outcome, whoever falls over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from editcli.records.recovery import recover
from editcli.records.state import RunFolder
from editcli.testing import tiny_model_folder
from tests.support.workshop import STACKS

pytestmark = pytest.mark.slow

Unbroken = Callable[..., Path]

IN_BATCH = """
from editcli.editing.shared_session import TeamSession
calls = []
def values(self, requests, real=TeamSession.values, **choices):
    # Pilots are measured on bare prompts, in as many calls as they need, or not at all where they are cached.
    calls.extend([requests] if choices.get("prefixed", True) else [])
    if len(calls) == {call}:
        {strike}
    return real(self, requests, **choices)
TeamSession.values = values
"""
"""A prelude: something happens to a process when it is about to optimise the targets of a batch."""

PERTURBED = """
from editcli.editing.shared_session import TeamSession
def write(self, site, update, real=TeamSession.write):
    real(self, site, update)
    if site == self.sites[-1] and len(seen) == 1:
        self.set_weight(site, self.weight(site) * 1.0001)
    seen.extend([site] if site == self.sites[-1] else [])
seen = []
TeamSession.write = write
"""
"""A prelude: a process comes to another weight than the others in the second batch."""

STOPPED = """
import os, signal
from editcli.runs.stream import Stream
def apply(self, requests, real=Stream.apply):
    report = real(self, requests)
    if report.step == 1:
        os.kill(os.getpid(), signal.{signal})
    return report
Stream.apply = apply
"""


def distance(one: Path, other: Path) -> float:
    """Return the largest relative difference of two models' tensors."""
    first, second = (load_file(out / "model.safetensors") for out in (one, other))
    assert set(first) == set(second)
    return max(float((first[name] - second[name]).norm() / first[name].norm()) for name in first)


def outcomes(out: Path) -> list[Any]:
    """Return what each edit's evaluation found, without the digits that depend on how prompts were batched."""
    lines = [json.loads(line) for line in RunFolder(out).outcomes.read_text().splitlines()]
    return [[line["id"], [(a["prompt"], a["exact"], a["success"]) for a in line["efficacy"]]] for line in lines]


def same_run(one: Path, other: Path) -> None:
    """Assert that two runs hold the same edits with the same outcomes, and weights that differ by rounding alone."""
    first, second = (recover(RunFolder(out)) for out in (one, other))
    assert [request.digest for request in first.requests] == [request.digest for request in second.requests]
    assert outcomes(one) == outcomes(other)
    assert distance(one, other) < 1e-5


@pytest.mark.parametrize("size", [2, 3])
def test_several_processes_do_what_one_does(crew: Any, unbroken: Unbroken, size: int) -> None:
    leader, *others = crew.run(size, "out", *STACKS["memit"], "--json")
    assert leader.code == 0, leader.err
    assert json.loads(leader.out)["edits"]["applied"] == 8
    assert all((other.code, other.out, other.err) == (0, "", "") for other in others)
    same_run(unbroken(*STACKS["memit"]), crew.shop.folder / "out")


@pytest.mark.parametrize("stack", ["alphaedit", "rlsedit", "ultraedit"])
def test_no_editor_can_tell(crew: Any, unbroken: Unbroken, stack: str) -> None:
    ended = crew.run(2, "out", *STACKS[stack])
    assert [one.code for one in ended] == [0, 0], ended[0].err
    same_run(unbroken(*STACKS[stack]), crew.shop.folder / "out")


def test_the_launcher_that_everybody_uses(crew: Any, unbroken: Unbroken) -> None:
    shop = crew.shop
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "editcli")
    from tests.distributed.conftest import EDITS

    command = shop.command("out", *EDITS, *STACKS["memit"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(shop.folder / "cache")}
    ended = subprocess.run(
        [*launcher, "-q", *command], cwd=shop.folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("8 of 8 edits applied") == 1
    same_run(unbroken(*STACKS["memit"]), shop.folder / "out")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_run_and_one_process_finishes_it(crew: Any, unbroken: Unbroken, victim: int) -> None:
    kill = IN_BATCH.format(call=2, strike="import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    ended = crew.run(2, "out", *STACKS["memit"], "--checkpoint-every", "1", preludes={victim: kill})
    assert ended[victim].code == -signal.SIGKILL
    other = ended[1 - victim]
    assert other.code == 1
    if victim == 1:
        assert other.err.splitlines()[-1].startswith("error: another process of this run died")
        assert "Traceback" not in other.err
    # One batch was kept and the second was under way.
    out = crew.shop.folder / "out"
    assert recover(RunFolder(out)).snapshot.step == 1
    finished = crew.alone("out", *STACKS["memit"], "--resume")
    assert finished.code == 0, finished.err
    same_run(unbroken(*STACKS["memit"]), out)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interrupt_of_any_process_saves_the_state_for_another_number_of_them(
    crew: Any, unbroken: Unbroken, name: str
) -> None:
    ended = crew.run(2, "out", *STACKS["memit"], preludes={1: STOPPED.format(signal=name)})
    assert [one.code for one in ended] == [130, 130], ended[0].err
    out = crew.shop.folder / "out"
    assert recover(RunFolder(out)).snapshot.step == 1
    assert [one.code for one in crew.run(3, "out", *STACKS["memit"], "--resume")] == [0, 0, 0]
    same_run(unbroken(*STACKS["memit"]), out)


def test_other_model_files_are_refused_at_the_start(
    crew: Any, shop_in: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory, model: Path
) -> None:
    shops = [shop_in(tmp_path_factory.mktemp(f"machine-{rank}")) for rank in range(2)]
    for seed, shop in enumerate(shops):
        tiny_model_folder(shop.folder / "model", seed=seed)
        shutil.copy(model / "corpus.txt", shop.folder / "model")
        shop.model = Path("model")
    leader, other = crew.run(2, "out", *STACKS["memit"], shops=shops)
    assert (leader.code, other.code, other.err) == (1, 1, "")
    assert leader.err.splitlines()[-1].startswith("error: model files differ between process 0 and process 1")
    assert not (shops[0].folder / "out").exists()


def test_a_rank_that_comes_to_other_weights_stops_the_run(crew: Any, unbroken: Unbroken) -> None:
    ended = crew.run(2, "out", *STACKS["memit"], "--checkpoint-every", "1", preludes={1: PERTURBED})
    assert [one.code for one in ended] == [1, 1]
    assert "after batch 2, the edited weights differ between process 0 and process 1" in ended[0].err
    out = crew.shop.folder / "out"
    assert recover(RunFolder(out)).snapshot.step == 1
    assert [one.code for one in crew.run(2, "out", *STACKS["memit"], "--resume")] == [0, 0]
    same_run(unbroken(*STACKS["memit"]), out)


def test_what_fails_on_another_rank_is_told_by_rank_0(crew: Any) -> None:
    strike = "from editcli.errors import ModelError; raise ModelError('one edit does not fit')"
    leader, other = crew.run(2, "out", *STACKS["memit"], preludes={1: IN_BATCH.format(call=1, strike=strike)})
    assert (leader.code, leader.err.splitlines()[-1]) == (1, "error: process 1 of 2: one edit does not fit")
    assert (other.code, other.out, other.err) == (1, "", "")


def test_nobody_waits_for_ever_for_a_rank_that_hangs(crew: Any) -> None:
    hang = IN_BATCH.format(call=1, strike="import time; time.sleep(600)")
    leader, other = crew.start(2, "out", *STACKS["memit"], preludes={1: hang}, timeout=4)
    ended = leader.wait()
    os.kill(other.id, signal.SIGKILL)
    other.wait()
    assert ended.code == 1
    assert "was waited for longer than EDITCLI_RANK_TIMEOUT allows" in ended.err


def test_two_ranks_find_the_second_moments_that_one_finds(crew: Any) -> None:
    """Each run has a cache of its own, so that nothing is read that another computed."""
    found = {}
    for size in (1, 2):
        cache = crew.shop.folder / f"cache-{size}"
        prelude = f"import os; os.environ['XDG_CACHE_HOME'] = {str(cache)!r}\n"
        limited = (*STACKS["memit"], "--limit", "1", "-o", "statistics.batch_tokens=64")
        ended = crew.run(size, f"out-{size}", *limited, preludes=dict.fromkeys(range(size), prelude))
        assert [one.code for one in ended] == [0] * size, ended[0].err
        files = [path for path in sorted(cache.rglob("*.safetensors")) if not path.name.startswith("nas-")]
        found[size] = {path.name: load_file(path) for path in files}
    assert len(found[1]) == 2
    assert set(found[1]) == set(found[2])
    for name, tensors in found[1].items():
        for key, tensor in tensors.items():
            torch.testing.assert_close(found[2][name][key], tensor, rtol=1e-6, atol=1e-9)


def test_what_cannot_be_done_together_is_refused_once(crew: Any) -> None:
    launched = "import os; os.environ.update(RANK='{rank}', WORLD_SIZE='2', MASTER_ADDR='nowhere')"
    leader, other = (crew.shop.run("stats", "show", prelude=launched.format(rank=rank)) for rank in range(2))
    assert (leader.code, other.code, other.err) == (2, 2, "")
    assert leader.err.startswith("error: 2 processes cannot run 'editcli stats show' together; run it without")
    piped = crew.run(2, "out", edits="-")
    assert [one.code for one in piped] == [1, 1]
    assert piped[0].err.startswith("error: 2 processes cannot share the standard input")
