"""The contracts refuse what they are there to refuse: each of these components breaks one promise."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from editcli.editing.pipeline import edit_batch
from editcli.errors import GuardError
from editcli.plugin.interfaces import Diagnostic, Editor, LowRank, Problem, Stabilizer, State, Update
from editcli.plugin.plain import recorded
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
from tests.support.reporters import Listener

NAMES = {"name": "broken", "reference": "none", "__doc__": "Break a promise."}


class Mutates(PlainEditor):
    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        problem.residual.zero_()
        return update


class Forgets(PlainEditor):
    def __init__(self, options: Any = None):
        super().__init__(options)
        self.count = 1.0

    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        return LowRank(update.left / self.count, update.right)

    def remember(self, session: Any, requests: Any, problems: Any) -> None:
        self.count += 1


class Invents(PlainEditor):
    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        return LowRank(update.left.nan_to_num(), update.right)


class WritesAnyway(PlainEditor):
    def solve(self, session: Any, problem: Problem) -> Update:
        return LowRank(torch.ones_like(problem.residual), problem.keys)


class WritesBackwards(PlainEditor):
    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        return LowRank(-update.left, update.right)


class Rolls(PlainEditor):
    def prepare(self, session: Any) -> None:
        self.noise = float(torch.rand(1))

    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        return LowRank(update.left * (1 + self.noise), update.right)


class Transposes(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return LowRank(update.right, update.left)


class InPlace(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        update.left.mul_(0.5)
        return update


class AdvancesEarly(Stabilizer):
    def __init__(self, options: Any = None):
        super().__init__(options)
        self.seen = 0

    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        self.seen += 1
        return LowRank(update.left / self.seen, update.right)

    def state(self) -> State:
        return State(json={"seen": self.seen})

    def load_state(self, session: Any, state: State) -> None:
        self.seen = state.json["seen"]


class RemembersUndeclared(AdvancesEarly):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return update

    def remember(self, session: Any, problems: Any, updates: Any) -> None:
        self.seen += 1


class ActsUndeclared(Stabilizer):
    acts_on = ("values",)

    def stabilize_weight(self, session: Any, site: Any, weight: Any) -> Any:
        return weight


class DropsOnPaper(Stabilizer):
    def stabilize_values(self, session: Any, values: Any) -> Any:
        return replace(values, dropped={1: "too long"})


class NeedsFactors(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return LowRank(update.left / 2, update.right)


class NeedsAProblem(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return update if problem.keys.isfinite().all() else update.scaled(0.0)


class RecordsATensor(Stabilizer):
    def record(self) -> dict[str, Any]:
        return {"sites": [{"norm": torch.tensor(1.0)}]}


class RecordsNaN(PlainEditor):
    def record(self) -> dict[str, Any]:
        return {"norm": float("nan")}


class KeepsAScalarOfNumpy(Diagnostic):
    def state(self) -> State:
        return State(json={"seen": np.float64(1.0)})

    def load_state(self, session: Any, state: State) -> None:
        pass


class Mixes(Stabilizer):
    def stabilize_values(self, session: Any, values: Any) -> Any:
        return values.with_contribution(values.contribution / values.contribution.norm())


class Adds(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return LowRank(update.left + 1, update.right)


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
    (RemembersUndeclared, "test_a_state_that_advances", AssertionError),
    (ActsUndeclared, "test_it_acts_on_what", AssertionError),
    (DropsOnPaper, "test_an_edit_that_failed", AssertionError),
    (NeedsFactors, "test_it_maps_each_type", AttributeError),
    (NeedsAProblem, "test_it_maps_each_type", AttributeError),
    (RecordsATensor, "test_what_it_records", AssertionError),
    (RecordsNaN, "test_what_it_records", AssertionError),
    (KeepsAScalarOfNumpy, "test_what_it_records", AssertionError),
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


HEAVY = """
import torch
from editcli.plugin import Stabilizer

class Heavy(Stabilizer):
    "Import torch at once."
    name = "heavy"
    reference = "none"
"""


def test_a_module_that_imports_torch_when_it_is_listed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    test = "test_listing_it_does_not_import_torch"
    for name, code in (("heavy_one", HEAVY), ("light_one", HEAVY.replace("import torch\n", ""))):
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
        component = importlib.import_module(name).Heavy
        made = type("Made", (StabilizerContract,), {"component": component})()
        with pytest.raises(AssertionError) if name == "heavy_one" else nullcontext():
            getattr(made, test)()


def test_a_record_that_json_cannot_hold_costs_a_warning_and_not_the_run() -> None:
    class Raises(Stabilizer):
        name = "raises"

        def record(self) -> dict[str, Any]:
            raise ZeroDivisionError("no edits")

    class Mixed(Stabilizer):
        name = "mixed"

        def record(self) -> dict[str, Any]:
            bad = {"t": torch.tensor(1), "n": [1.0, float("inf")], 3: "three", "f": np.float64(2)}
            return {"good": (1, True, None, "a", 0.5), **bad}  # pyright: ignore[reportReturnType]

    listener = Listener()
    assert recorded(Raises(), listener) == {}
    kept = {"good": [1, True, None, "a", 0.5], "t": None, "n": [1.0, None], "f": None}
    assert recorded(Mixed(), listener) == kept
    assert listener.warnings == [
        "raises could not record its figures: ZeroDivisionError: no edits",
        "mixed records what JSON cannot hold, which is left out: it has the key 3, which is no text; t is a "
        "torch.Tensor; n[1] is inf; f is a numpy.float64",
    ]


class GivesNaN(PlainEditor):
    def solve(self, session: Any, problem: Problem) -> Update:
        update = super().solve(session, problem)
        return LowRank(update.left.clone().index_fill_(0, torch.tensor([0]), float("nan")), update.right)


class HidesNaN(Stabilizer):
    def stabilize_update(self, session: Any, site: Any, update: Any, problem: Any) -> Update:
        return LowRank(update.left.nan_to_num(), update.right)


def test_an_update_that_is_not_finite_is_refused_before_a_stabilizer_can_hide_it(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    with pytest.raises(GuardError, match=r"the update is not finite at model\.layers\.0"):
        edit_batch(session, GivesNaN(), [HidesNaN()], tiny_requests(0), lambda *_: None)
    assert all(torch.equal(session.weight(site), session.baseline(site)) for site in session.sites)


@pytest.mark.parametrize("prefix", sorted({prefix for item, prefix, _ in BROKEN if issubclass(item, Editor)}))
def test_a_sound_editor_passes_the_same_tests(prefix: str, tmp_path: Path) -> None:
    contract_test(PlainEditor, prefix)(tmp_path)
