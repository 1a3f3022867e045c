"""The contracts refuse what they are there to refuse: each of these components breaks one promise."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from editcli.editing.pipeline import edit_batch
from editcli.errors import GuardError
from editcli.plugin.interfaces import Diagnostic, Editor, Problem, Stabilizer, Update
from editcli.requests.formats import Format
from editcli.testing import (
    DiagnosticContract,
    EditorContract,
    FormatContract,
    PlainEditor,
    StabilizerContract,
    tiny_requests,
    tiny_session,
)
from editcli.testing import models as testing

NAMES = {"name": "broken", "reference": "none", "__doc__": "Break a promise."}


class Mutates(PlainEditor):
    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        problem.residual.zero_()
        return update


class Forgets(PlainEditor):
    def __init__(self, options: Any = None):
        super().__init__(options)
        self.count = 1.0

    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        return Update(update.left / self.count, update.right)

    def remember(self, session: Any, requests: Any, problems: Any) -> None:
        self.count += 1


class Invents(PlainEditor):
    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        return Update(update.left.nan_to_num(), update.right)


class WritesAnyway(PlainEditor):
    def solve(self, problem: Problem) -> Update:
        return Update(torch.ones_like(problem.residual), problem.keys)


class WritesBackwards(PlainEditor):
    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        return Update(-update.left, update.right)


class Rolls(PlainEditor):
    def prepare(self, session: Any) -> None:
        self.noise = float(torch.rand(1))

    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        return Update(update.left * (1 + self.noise), update.right)


class Transposes(Stabilizer):
    def stabilize_update(self, update: Update, problem: Problem, session: Any) -> Update:
        return Update(update.right, update.left)


class InPlace(Stabilizer):
    def stabilize_update(self, update: Update, problem: Problem, session: Any) -> Update:
        update.left.mul_(0.5)
        return update


class AdvancesEarly(Stabilizer):
    def __init__(self, options: Any = None):
        super().__init__(options)
        self.seen = 0

    def stabilize_update(self, update: Update, problem: Problem, session: Any) -> Update:
        self.seen += 1
        return Update(update.left / self.seen, update.right)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"seen": torch.tensor(self.seen)}

    def load_state_dict(self, state: Mapping[str, torch.Tensor], session: Any) -> None:
        self.seen = int(state["seen"])


class Mixes(Stabilizer):
    def stabilize_values(self, values: Any, session: Any) -> Any:
        return values.with_contribution(values.contribution / values.contribution.norm())


class Adds(Stabilizer):
    def stabilize_update(self, update: Update, problem: Problem, session: Any) -> Update:
        return Update(update.left + 1, update.right)


class Unexplained(Stabilizer):
    @dataclass
    class Options:
        share: float = 0.5


class GivesTensors(Diagnostic):
    def observe(self, session: Any, updates: Any) -> Any:
        return {"norm": next(iter(updates.values())).left.norm()}


class Silent(Diagnostic):
    pass


class Counts(Diagnostic):
    count = 0

    def observe(self, session: Any, updates: Any) -> dict[str, float]:
        self.count += 1
        return {"count": float(self.count)}


class KnowsEverything(Format):
    def sniff(self, record: Mapping[str, Any]) -> bool:
        return True

    def read(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        yield {"prompt": record["q"], "subject": record["s"], "target_new": record["a"]}


class Fragile(KnowsEverything):
    def sniff(self, record: Mapping[str, Any]) -> bool:
        return "@" in record["q"]


class Pops(KnowsEverything):
    def sniff(self, record: Mapping[str, Any]) -> bool:
        return "q" in record

    def read(self, record: Any) -> Iterator[dict[str, Any]]:
        yield {"prompt": record["q"], "subject": record["s"], "target_new": record.pop("a")}


class Escapes(Pops):
    def read(self, record: Any) -> Iterator[dict[str, Any]]:
        raise OSError(record)


BROKEN = [
    (Mutates, "test_solving_changes_nothing", AssertionError),
    (Forgets, "test_a_resumed_stream", AssertionError),
    (Invents, "test_what_is_not_finite", AssertionError),
    (WritesAnyway, "test_nothing_to_write", AssertionError),
    (WritesBackwards, "test_the_update_points", AssertionError),
    (Rolls, "test_the_same_edits", AssertionError),
    (Transposes, "test_it_maps_each_type", AssertionError),
    (InPlace, "test_it_maps_each_type", AssertionError),
    (AdvancesEarly, "test_only_remember", AssertionError),
    (AdvancesEarly, "test_an_undo", AssertionError),
    (Mixes, "test_an_edit_that_failed", AssertionError),
    (Adds, "test_nothing_to_write", AssertionError),
    (Unexplained, "test_options_are_frozen", AssertionError),
    (GivesTensors, "test_it_gives_named_numbers", AssertionError),
    (Silent, "test_it_gives_named_numbers", AssertionError),
    (Counts, "test_a_resumed_stream_is_watched", AssertionError),
    (KnowsEverything, "test_it_knows_its_own", AssertionError),
    (Fragile, "test_sniffing_never_fails", KeyError),
    (Pops, "test_reading_leaves_the_record", KeyError),
    (Escapes, "test_a_broken_record", OSError),
]
"""What breaks a promise, the test that notices it, and how: an assertion of the contract, or the plugin's own error."""
CONTRACTS = {
    Editor: EditorContract,
    Stabilizer: StabilizerContract,
    Diagnostic: DiagnosticContract,
    Format: FormatContract,
}


def contract_test(component: type, prefix: str) -> Callable[..., None]:
    """Return the test of ``component``'s contract whose name starts with ``prefix``."""
    contract = next(contract for base, contract in CONTRACTS.items() if issubclass(component, base))
    named = type(component.__name__, (component,), NAMES)
    records = ({"q": "The capital of {} is", "s": "France", "a": "Lyon"},)
    made = type("Made", (contract,), {"component": named, "records": records})()
    (name,) = [name for name in dir(made) if name.startswith(prefix)]
    return getattr(made, name)


@pytest.mark.parametrize(("component", "prefix", "error"), BROKEN, ids=lambda item: getattr(item, "__name__", None))
def test_a_broken_promise_is_noticed(component: type, prefix: str, error: type[Exception], tmp_path: Path) -> None:
    test = contract_test(component, prefix)
    arguments = (tmp_path,) if inspect.signature(test).parameters else ()
    with pytest.raises(error) as caught:
        test(*arguments)
    assert caught.type is error
    # A component that fails by accident, say by an assertion of torch's, proves nothing about the contract.
    room = Path(testing.__file__).parent if error is AssertionError else Path(__file__).parent
    assert Path(str(caught.traceback[-1].path)).parent == room


class GivesNaN(PlainEditor):
    def solve(self, problem: Problem) -> Update:
        update = super().solve(problem)
        return Update(update.left.clone().index_fill_(0, torch.tensor([0]), float("nan")), update.right)


class HidesNaN(Stabilizer):
    def stabilize_update(self, update: Update, problem: Problem, session: Any) -> Update:
        return Update(update.left.nan_to_num(), update.right)


def test_an_update_that_is_not_finite_is_refused_before_a_stabilizer_can_hide_it(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    with pytest.raises(GuardError, match=r"the update is not finite at model\.layers\.0"):
        edit_batch(session, GivesNaN(), [HidesNaN()], tiny_requests(0), lambda *_: None)
    assert all(torch.equal(session.weight(site), session.baseline(site)) for site in session.sites)


@pytest.mark.parametrize("prefix", sorted({prefix for item, prefix, _ in BROKEN if issubclass(item, Editor)}))
def test_a_sound_editor_passes_the_same_tests(prefix: str, tmp_path: Path) -> None:
    contract_test(PlainEditor, prefix)(tmp_path)
