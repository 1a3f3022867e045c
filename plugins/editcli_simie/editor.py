"""SimIE: a stream that follows what another editor makes of the unedited model (2025)."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from editcli.plugin import (
    Dense,
    Editor,
    EditRequest,
    InverseGramEditor,
    OptionError,
    Problem,
    Session,
    Site,
    State,
    Update,
    Values,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor


class SimIE(InverseGramEditor):
    """Wrap an editor: let it write each batch into the unedited weights W_0, and move the stream towards the result.

    With W~_t what the wrapped editor makes of W_0 for batch t alone, and K_t what the site reads in W_0 at every token
    of the batch's prompts and targets, the weight does on the tokens of each batch about what its W~_i does ::

        W_t = W_{t-1} + (W~_t - W_{t-1}) K_t K_t^T (l I + sum_{i <= t} K_i K_i^T)^-1

    This is D = R (I + K^T Q K)^-1 K^T Q with R = (W~_t - W_{t-1}) K_t and Q = I / l at the start. The wrapped editor
    remembers nothing, since it never writes two batches. The paper writes one edit at a time.
    """

    name: ClassVar[str] = "simie"
    reference: ClassVar[str] = "Towards Lifelong Model Editing via Simulating Ideal Editor (ICML 2025)"
    tempered_by: ClassVar[str] = "raise simie.ridge"
    on_base: ClassVar[bool] = True
    wraps: ClassVar[str] = "editor"

    @dataclass(frozen=True)
    class Options:
        """The wrapped editor, and how slowly the stream follows it."""

        editor: str = option("memit", "editor to wrap; its own options are set under its own name")
        ridge: float = option(10.0, "weight l of staying where the stream is (published: 10 with memit, 1e4 with rome)")
        ridge_kind: Literal["absolute", "relative"] = option(
            "absolute", "relative: in units of the mean square of an input on reference text"
        )

        def __post_init__(self) -> None:
            if not self.ridge > 0:
                raise ValueError("ridge must be greater than 0")

    def __init__(self, options: object = None):
        super().__init__(options)
        self._ideal: dict[Site, Tensor] = {}
        """W~ of each site, as far as the batch has come."""
        self._inputs: dict[Site, Tensor] = {}
        """K of each site, (d_in, tokens)."""

    @property
    def _inner(self) -> Editor:
        if self.wrapped is None:
            raise OptionError("simie was built without the editor that it wraps; give it one with wrap()")
        return self.wrapped

    @property
    def releases(self) -> bool:
        """False: an edit has as many keys in the memory as it has tokens."""
        return False

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        import torch

        unit = 1.0 if self.options.ridge_kind == "absolute" else float(session.second_moment(site).diagonal().mean())
        return torch.eye(session.weight(site).shape[1], dtype=torch.float64) / (self.options.ridge * unit)

    def prepare(self, session: Session) -> None:
        self._inner.prepare(session)
        super().prepare(session)

    def load_state(self, session: Session, state: State) -> None:
        self._inner.prepare(session)
        super().load_state(session, state)

    def values(self, session: Session, requests: Sequence[EditRequest]) -> Values:
        with session.under(self._earlier(session), unedited=True):
            return self._inner.values(session, requests)

    def problem(self, session: Session, requests: Sequence[EditRequest], site: Site, values: Values) -> Problem:
        if site == session.sites[0]:
            self._write_alone(session, requests, values)
        return self._towards(session, site)

    def solve(self, session: Session, problem: Problem) -> Update:
        update = super().solve(session, problem)
        (rows, columns), tokens = session.weight(problem.site).shape, problem.keys.shape[1]
        # A batch has more tokens than edits, so its factors may be larger than the whole matrix.
        return Dense(update.dense()) if tokens * (rows + columns) > rows * columns else update

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        with session.under({}, unedited=True):
            self._inner.begin(session, requests)
            self._read(session, requests)
            for site in session.sites:
                self._ideal[site] = self._inner.update(session, site).added_to(session.weight(site))

    def already_true(self, requests: Sequence[EditRequest]) -> Sequence[int]:
        return self._inner.already_true(requests)

    def update(self, session: Session, site: Site) -> Update:
        return self.solve(session, self._towards(session, site))

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        # Without target values there are no problems, and an undo has begun the batch again.
        problems = problems or [self._towards(session, site) for site in session.sites]
        super().remember(session, requests, problems)

    def _write_alone(self, session: Session, requests: Sequence[EditRequest], values: Values) -> None:
        """Let the wrapped editor write the sites of a stage into the unedited model, one after the other."""
        with ExitStack() as written:
            written.enter_context(session.under(self._earlier(session), unedited=True))
            self._read(session, requests, given_up=values.dropped)
            for site in session.sites:
                update = self._inner.solve(session, self._inner.problem(session, requests, site, values))
                self._ideal[site] = update.added_to(session.weight(site))
                written.enter_context(session.under({site: self._ideal[site]}))

    def _earlier(self, session: Session) -> Mapping[Site, Tensor]:
        """Return W~ of the stages of this batch before the one of ``session``."""
        return {site: ideal for site, ideal in self._ideal.items() if site.layer < session.sites[0].layer}

    def _read(self, session: Session, requests: Sequence[EditRequest], *, given_up: Container[int] = ()) -> None:
        """Read the inputs of each site at every token, on the model as it stands; 0 at edits that were given up."""
        for site, seen in session.gradients(requests, positions="all").sites.items():
            written = [edit not in given_up for edit in seen.owner.tolist()]
            self._inputs[site] = seen.inputs * seen.inputs.new_tensor(written)

    def _towards(self, session: Session, site: Site) -> Problem:
        """Return the problem of moving a site from where the stream is to where the batch alone leads."""
        weight = session.weight(site)
        keys = self._inputs[site].to(weight)
        return Problem(site, keys, (self._ideal[site] - weight) @ keys)
