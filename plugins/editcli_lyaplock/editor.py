"""LyapLock: least squares whose anchor grows heavier as reference text drifts (2025)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Dense, Editor, EditRequest, Problem, SavedState, Session, State, Update, option

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Lock:
    """The state of one site: what earlier edits reached, and the queue that weighs the anchor."""

    values: Tensor
    """H_vk, the sum of (W k) k^T over earlier batches, each with the W that it left, (d_out, d_in) float64."""
    keys: Tensor
    """H_kk, the sum of k k^T, (d_in, d_in) float64."""
    first: float = 0.0
    """p_0, the loss of reference text after the first batch that changed it; 0 before."""
    queue: float = 0.0
    """Z."""

    def anchor(self, alpha: float) -> float:
        """Return a Z, the factor on the weight w of the reference text; 1 before the first batch."""
        return self.queue / (alpha * self.first) ** 0.5 if self.first else 1.0

    def after(self, loss: float, alpha: float) -> tuple[float, float]:
        """Return p_0 and Z once the loss of reference text is ``loss``."""
        if not self.first:
            return loss, (alpha * loss) ** 0.5
        least = (alpha * self.first) ** 0.5
        return self.first, max(self.queue + (loss - alpha * self.first) / least, least)


@dataclass(frozen=True)
class _Numbers:
    """What a snapshot holds of a site beside tensors."""

    first: float
    queue: float

    def __post_init__(self) -> None:
        if not (0 <= self.first < math.inf and 0 <= self.queue < math.inf):
            raise ValueError("first and queue must not be negative")


class LyapLock(Editor):
    """Write each batch by least squares, and hold the pretrained mapping by a weight that follows what it has lost.

    With S = C the second moment on reference text, p(W) = tr((W - W_0) S (W - W_0)^T) what the edits cost there, and
    p_0 its value after the first batch, a queue Z asks for p(W) <= alpha p_0 in the long run ::

        first     D = (R K^T + w (W_0 - W) S) (K K^T + w S)^-1
        later     D = (V (R K^T + H_vk - W H_kk) + a Z w (W_0 - W) S) (V (K K^T + H_kk) + a Z w S)^-1
                  Z <- max(Z + a (p(W) - alpha p_0), Z_max),    a = 1 / sqrt(alpha p_0),    Z_max = sqrt(alpha p_0)

    It is RLSEdit whose mu^2 w is a Z w / V, w at first and more as the text drifts, with old facts held at the values
    that they reached. The weight changes with every batch, so each one solves a whole (d_in, d_in) system.
    """

    name: ClassVar[str] = "lyaplock"
    reference: ClassVar[str] = "arXiv:2505.15702"
    tempered_by: ClassVar[str] = "raise lyaplock.mom2_update_weight or lower lyaplock.alpha"
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """The weight of reference text, and how much of it may be lost."""

        mom2_update_weight: float = option(1000.0, "weight w of the reference text against the edits at the beginning")
        alpha: float = option(60.0, "how often the first batch's loss of reference text may be lost in all")
        v: float = option(1.0, "weight V of the edits against the queue")

        def __post_init__(self) -> None:
            if not (self.mom2_update_weight > 0 and self.alpha > 0 and self.v > 0):
                raise ValueError("mom2_update_weight, alpha and v must be greater than 0")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.locks: dict[str, Lock] = {}
        """The state of each site by module name."""
        self._moments: dict[str, Tensor] = {}

    def prepare(self, session: Session) -> None:
        for site in session.sites:
            self._moments[site.module] = moment = session.second_moment(site)
            rows, columns = session.weight(site).shape
            self.locks[site.module] = Lock(moment.new_zeros(rows, columns), moment.new_zeros(columns, columns))

    def solve(self, session: Session, problem: Problem) -> Update:
        from editcli.plugin import InverseGram

        lock, moment = self.locks[problem.site.module], self._moments[problem.site.module]
        keys, residual = problem.keys.to(moment), problem.residual.to(moment)
        weight, base = (part.to(moment) for part in (session.weight(problem.site), session.baseline(problem.site)))
        anchor = lock.anchor(self.options.alpha) * self.options.mom2_update_weight * moment
        wanting = residual @ keys.T + lock.values - weight @ lock.keys
        held = self.options.v * (keys @ keys.T + lock.keys) + anchor
        inverse = InverseGram.inverting(
            held, site=problem.site.module, device=moment.device, reporter=session.reporter
        ).matrix.to(moment)
        return Dense((self.options.v * wanting + (base - weight) @ anchor) @ inverse)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        for problem in problems:
            module = problem.site.module
            lock, moment = self.locks[module], self._moments[module]
            keys, weight = problem.keys.to(moment), session.weight(problem.site).to(moment)
            change = weight - session.baseline(problem.site).to(moment)
            first, queue = lock.after(float(((change @ moment) * change).sum()), self.options.alpha)
            values, gram = lock.values + (weight @ keys) @ keys.T, lock.keys + keys @ keys.T
            self.locks[module] = Lock(values, gram, first, queue)

    def state(self) -> State:
        """Return H_vk as ``<module>.values`` and H_kk as ``<module>.keys``, and p_0 and Z by module."""
        parts = {f"{m}.{name}": getattr(lock, name) for m, lock in self.locks.items() for name in ("values", "keys")}
        return State(parts, {m: {"first": lock.first, "queue": lock.queue} for m, lock in self.locks.items()})

    def load_state(self, session: Session, state: State) -> None:
        self.prepare(session)
        saved = SavedState(self.name, state)
        numbers = saved.fields(dict[str, _Numbers])
        for module, lock in self.locks.items():
            if module not in numbers:
                raise saved.refusal(f"{module} is missing")
            values, keys = (saved.tensor(f"{module}.{name}", getattr(lock, name).shape) for name in ("values", "keys"))
            one = numbers[module]
            self.locks[module] = Lock(values.to(lock.values), keys.to(lock.keys), first=one.first, queue=one.queue)

    def record(self) -> dict[str, Any]:
        """Return, per site, the factor a Z that the weight of the reference text has grown by."""
        return {"anchor": {module: lock.anchor(self.options.alpha) for module, lock in self.locks.items()}}
