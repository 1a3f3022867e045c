"""The team itself, with ranks that are threads of this process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editcli.distributed.launch import Launch
from editcli.distributed.team import Team, balanced
from editcli.editing.session import ModelSession
from editcli.editing.shared_session import TeamSession
from editcli.errors import EditError, ModelError, OptionError, RankError, StateError
from editcli.models.loading import open_model, resolve_model
from editcli.requests.schema import EditRequest, from_record
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder

COSTS = st.lists(st.integers(1, 100), max_size=40)


@dataclass
class Meeting:
    """Where the threads of a team put what they tell each other."""

    size: int
    board: dict[int, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=10)

    def swap(self, rank: int, value: Any) -> list[Any]:
        self.board[rank] = value
        self.barrier.wait()
        found = [self.board[other] for other in range(self.size)]
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class ThreadLink:
    """The link of a rank that is a thread."""

    meeting: Meeting
    rank: int
    device = torch.device("cpu")

    def exchange(self, text: str) -> list[str]:
        return self.meeting.swap(self.rank, text)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        tensor.copy_(self.meeting.swap(self.rank, tensor.clone())[source])

    def total(self, tensor: torch.Tensor) -> None:
        tensor.copy_(sum(self.meeting.swap(self.rank, tensor.clone())))


def together(size: int, work: Callable[[Team], Any]) -> list[Any]:
    """Run ``work`` on every rank of a team, inside its guard; return what each returned or raised."""
    meeting = Meeting(size)

    def one(rank: int) -> Any:
        team = Team(rank, size, ThreadLink(meeting, rank))
        try:
            with team.guard():
                return work(team)
        except Exception as error:  # Whatever a rank raises is what the test looks at.
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))


@given(costs=COSTS, size=st.integers(1, 6))
def test_shares_are_balanced_and_complete(costs: list[int], size: int) -> None:
    shares = balanced(costs, size)
    assert len(shares) == size
    assert sorted(item for share in shares for item in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(costs[item] for item in share) for share in shares]
    # A share that is the largest was the smallest before its last item came to it.
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(costs=COSTS, size=st.integers(1, 4))
def test_what_is_spread_comes_back_in_order(costs: list[int], size: int) -> None:
    def work(team: Team) -> Any:
        def rows(own: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
            items = torch.tensor(own, dtype=torch.float64)
            return items, torch.stack([items, items * 2], dim=1)

        return team.spread("rows", costs, rows)

    for items, pairs in together(size, work):
        assert items.tolist() == list(range(len(costs)))
        assert pairs.tolist() == [[item, 2 * item] for item in range(len(costs))]


@given(costs=COSTS, size=st.integers(1, 4), count=st.integers(1, 3))
def test_items_that_belong_together_are_dealt_to_one_rank(costs: list[int], size: int, count: int) -> None:
    groups = [list(range(number, len(costs), count)) for number in range(min(count, len(costs)))]

    def work(team: Team) -> Any:
        dealt: list[list[int]] = []

        def rows(own: Sequence[int]) -> tuple[torch.Tensor]:
            dealt.append(list(own))
            return (torch.tensor(own, dtype=torch.float64),)

        return team.spread("rows", costs, rows, groups=groups), dealt

    found = together(size, work)
    assert all(items.tolist() == list(range(len(costs))) for (items,), _ in found)
    shares = [set(own) for _, dealt in found for own in dealt]
    assert all(sum(not share.isdisjoint(group) for share in shares) == 1 for group in groups)


def test_ranks_gather_tensors_of_any_shape_and_sum_to_the_same_bits() -> None:
    def work(team: Team) -> Any:
        parts = team.gather("parts", [torch.full((rank, 2), rank) for rank in range(team.rank)])
        whole = torch.full((3,), 0.1 * (team.rank + 1), dtype=torch.float64)
        team.total("sum", [whole])
        return [[tuple(part.shape) for part in own] for own in parts], whole, team.lead("lead", lambda: {"a": [1]})

    found = together(3, work)
    for shapes, whole, led in found:
        assert shapes == [[], [(0, 2)], [(0, 2), (1, 2)]]
        assert torch.equal(whole, found[0][1])
        assert led == {"a": [1]}


def test_ranks_that_disagree_all_stop_and_say_who() -> None:
    found = together(3, lambda team: team.agree("hashes", team.rank == 2, remedy="mend it"))
    assert isinstance(found[0], StateError)
    assert str(found[0]) == "hashes differ between process 0 and process 2; mend it"
    assert all(isinstance(error, RankError) and error.told for error in found[1:])


@pytest.mark.parametrize(("error", "sentence"), [(ModelError("no room"), "no room"), (KeyError("x"), "KeyError: 'x'")])
def test_a_failure_ends_the_waiting_of_the_others(error: Exception, sentence: str) -> None:
    def work(team: Team) -> None:
        if team.rank == 1:
            raise error
        team.any("interrupts", False)
        team.exchange("never reached")

    leader, failed, other = together(3, work)
    assert isinstance(leader, RankError)
    assert "process 1 of 3" in str(leader)
    assert sentence in str(leader)
    assert not leader.told
    assert isinstance(other, RankError)
    assert other.told
    # A bug keeps its traceback where it happened; what the user can mend is told by rank 0 alone.
    assert (failed is error) != (isinstance(failed, RankError) and failed.told)


def test_ranks_that_came_apart_find_out() -> None:
    found = together(2, lambda team: team.exchange("here" if team.leads else "there"))
    assert all("came apart" in str(error) for error in found)


def test_one_process_is_a_team_that_sends_nothing() -> None:
    team = Team()
    rows = torch.arange(3.0)
    (same,) = team.spread("rows", [1, 1, 1], lambda own: (rows,))
    assert same is rows
    assert team.lead("lead", lambda: (1, 2)) == [1, 2]
    team.agree("anything", 1, remedy="")
    with pytest.raises(ModelError), team.guard():
        raise ModelError("as it was raised")


def test_a_launcher_is_recognised_by_all_its_variables() -> None:
    assert Launch.read({"WORLD_SIZE": "8"}) == Launch()
    told = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "host"}
    assert Launch.read({**told, "EDITCLI_RANK_TIMEOUT": "7.5"}) == Launch(3, 8, 1, 2, 7.5)
    for wrong in ({"RANK": "8"}, {"RANK": "one"}, {"EDITCLI_RANK_TIMEOUT": "0"}):
        with pytest.raises(OptionError):
            Launch.read({**told, **wrong})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("team") / "model", "gpt2")


def test_a_session_of_a_team_reads_what_one_reads_and_each_rank_does_its_part(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = TargetOptions(steps=2, prefixes=2)
    prefixes = ("The city. ", "It was in Rome. ")
    requests = [_request(name) for name in ("France", "London", "Tokyo", "Paris and Berlin", "Rome")]

    def measured(session: ModelSession) -> list[torch.Tensor]:
        values = session.values(requests)
        found = [values.target, values.initial, values.written, values.loss]
        for site in session.sites:
            seen = session.gradients(requests, positions="all").sites[site]
            found += [session.keys(requests, site), session.residual(requests, site, values)]
            found += [seen.inputs, seen.gradients, seen.owner]
        return found

    # Loading is not made for threads, so every rank finds its model loaded.
    models = [open_model(resolve_model(folder), device="cpu") for _ in range(2)]
    expected = measured(ModelSession(models[0], (1, 2), options=options, prefixes=prefixes))
    counts: set[int] = set()

    def counted(self: ModelSession, edits: Any, site: Any, real: Any = ModelSession.keys) -> torch.Tensor:
        counts.add(len(edits))
        return real(self, edits, site)

    monkeypatch.setattr(ModelSession, "keys", counted)

    def work(team: Team) -> list[torch.Tensor]:
        return measured(TeamSession(models[team.rank], (1, 2), team=team, options=options, prefixes=prefixes))

    found = together(2, work)
    assert counts == {2, 3}
    for tensors in found:
        assert not isinstance(tensors, EditError), tensors
        for mine, other, first in zip(tensors, expected, found[0], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
            assert torch.equal(mine, first)


def _request(name: str) -> EditRequest:
    record = {"id": name, "prompt": "The capital of {} is", "subject": name, "target_new": "Greece and Spain"}
    return from_record(record, file="test", line=1)


def test_a_rank_without_room_for_what_comes_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def full(*arguments: Any, **options: Any) -> torch.Tensor:
        if threading.current_thread().name.endswith("_1"):
            raise torch.OutOfMemoryError("full")
        return empty(*arguments, **options)

    def work(team: Team) -> Any:
        threading.current_thread().name = f"rank_{team.rank}"
        return team.lead_tensors("moments", lambda: [torch.zeros(1000)])

    monkeypatch.setattr("editcli.distributed.team._LARGE", 1000)
    monkeypatch.setattr(torch, "empty", full)
    leader, failed, other = together(3, work)
    assert isinstance(failed, torch.OutOfMemoryError)
    for error in (leader, other):
        assert isinstance(error, RankError)
        assert "process 1 of 3: it stopped on an internal error, OutOfMemoryError" in str(error)
