"""Dynamic orthogonality: the stabilizer, its options and its state."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import Problem, SavedState, Session, Site, Stabilizer, State, Update, option

from editcli_orthogonal.noise import Noise

if TYPE_CHECKING:
    from torch import Tensor


class Orthogonal(Stabilizer):
    """Write what would collide with earlier edits orthogonally to them.

    With C = W - W_0, everything written so far, a new edit with key k starts from the noise C k that earlier edits
    leave on it: as a share of what C could do to it, ||C k|| / (||C|| ||k||). Where the mean of that over a batch is
    exceptional for the stream, more than ``deviations`` standard deviations above its running mean, the batch's update
    is written into the complement of what the earlier ones mostly wrote:

        D <- (I - U_r U_r^T) D

    with U_r the leading left singular vectors of C that carry ``share`` of ||C||^2. All other updates stay as they are.

    After DeltaEdit, which constrains the search for target values instead and looks at one edit at a time; see the
    README for the differences.
    """

    name: ClassVar[str] = "orthogonal"
    reference: ClassVar[str] = "arXiv:2505.07899"
    acts_on: ClassVar[Collection[str]] = {"problems"}
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """What is exceptional, and how much is protected from it."""

        deviations: float = option(2.0, "project when the noise is this many deviations above its running mean")
        share: float = option(0.5, "share of the square of what was written that is protected")
        decay: float = option(0.9, "weight of the past in the running mean and variance")
        warmup: int = option(5, "batches to watch before anything is projected, at least 2")

        def __post_init__(self) -> None:
            if not (self.deviations >= 0 and 0 < self.share <= 1 and 0 <= self.decay < 1 and self.warmup >= 2):
                raise ValueError(
                    "deviations must not be negative, share must be greater than 0 and at most 1, decay at least 0 "
                    "and less than 1, and warmup at least 2"
                )

    def __init__(self, options: Any = None):
        super().__init__(options)
        self.noise: dict[str, Noise] = {}
        """What is usual at each site, by module name."""

    def prepare(self, session: Session) -> None:
        self.noise = {site.module: Noise() for site in session.sites}

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        """Project the update if the noise on its keys is exceptional; the state advances in ``remember`` alone."""
        if problem is None:  # Without target values there are no keys of edits to measure noise on.
            return update
        change = _change(session, site)
        if not self._is_exceptional(site, _overlap(change, problem.keys)):
            return update
        basis = leading(change, self.options.share)

        def outside(columns: Tensor) -> Tensor:
            """Return the part of ``columns``, of length d_out, that is orthogonal to the basis."""
            return columns - basis.to(columns) @ (basis.to(columns).T @ columns)

        # A second pass removes what rounding left of a component much larger than the rest.
        return update.mapped(outside).mapped(outside)

    def remember(self, session: Session, problems: Sequence[Problem], updates: Mapping[Site, Update]) -> None:
        """Count the batch in; an undo calls this with the recorded batches, so only what they hold is used."""
        for problem in problems:
            before = _change(session, problem.site) - updates[problem.site].dense()
            noise = _overlap(before, problem.keys)
            self.noise[problem.site.module] = self.noise[problem.site.module].counting(
                noise, decay=self.options.decay, exceptional=self._is_exceptional(problem.site, noise)
            )

    def state(self) -> State:
        """Return each site's figures by module name."""
        return State(json={module: asdict(seen) for module, seen in self.noise.items()})

    def load_state(self, session: Session, state: State) -> None:
        saved = SavedState(self.name, state)
        noise = saved.fields(dict[str, Noise])
        for site in session.sites:
            if site.module not in noise:
                raise saved.refusal(f"it has nothing for {site.module}")
            self.noise[site.module] = noise[site.module]

    def record(self) -> dict[str, Any]:
        """Return what is usual at each site, and how many batches were exceptional."""
        return {"sites": {module: asdict(seen) for module, seen in self.noise.items()}}

    def _is_exceptional(self, site: Site, noise: float) -> bool:
        options = self.options
        return self.noise[site.module].is_exceptional(noise, deviations=options.deviations, warmup=options.warmup)


def leading(change: Tensor, share: float) -> Tensor:
    """Return the fewest leading left singular vectors of ``change`` that carry ``share`` of its square, (d_out, r)."""
    import torch

    # The left singular vectors of C are the eigenvectors of C C^T, which is small and square; ascending.
    squares, vectors = torch.linalg.eigh((change @ change.T).double())
    carried = squares.clamp_min(0).flip(0).cumsum(0)
    count = int((carried < share * carried[-1]).sum()) + 1
    return vectors.flip(1)[:, :count]


def _change(session: Session, site: Site) -> Tensor:
    """Return C = W - W_0, (d_out, d_in)."""
    weight = session.weight(site)
    return weight - session.baseline(site).to(weight)


def _overlap(change: Tensor, keys: Tensor) -> float:
    """Return the mean over the columns k of ||C k|| / (||C|| ||k||), from 0 to 1; 0 where nothing was written."""
    keys = keys.to(change)
    most = change.norm() * keys.norm(dim=0)
    return float(((change @ keys).norm(dim=0) / most).nan_to_num(0.0).mean())
