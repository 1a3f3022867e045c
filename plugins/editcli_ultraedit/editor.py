"""UltraEdit: one forward and backward pass per edit, no optimisation (Gu et al., 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editcli.plugin import (
    Editor,
    EditRequest,
    Gradients,
    OptionError,
    Problem,
    SavedState,
    Session,
    Site,
    SiteGradients,
    State,
    Update,
    option,
)

if TYPE_CHECKING:
    from torch import Tensor

    from editcli_ultraedit.moments import Moments


class UltraEdit(Editor):
    """Step each site along normalised gradients, by least squares over the positions that predict the target.

    Over those positions, k is what the projection reads and g the gradient of the loss with respect to its output.
    Every coordinate of [k, g] is normalised by its mean and deviation over all edits so far ("lifelong
    normalisation"); with the normalised k^ and g^ ::

        v = -lr ||k^||^2 g^          D = V (I + K^T K)^-1 K^T

    over the batch. The paper's code shares the statistics between sites of one shape; here each site has its own.

    StableEdit (arXiv:2605.11836) changes two things: once more than d_out + 1 positions were seen, ``whiten`` takes the
    gradients' whole covariance, g^ = Cov^(-1/2) (g - mean), and ``alpha`` takes the place of the 1 in I. It also writes
    2,000 training edits before the stream; here ``pilots`` are counted into the statistics, and none is written.
    """

    name: ClassVar[str] = "ultraedit"
    reference: ClassVar[str] = "arXiv:2505.14679"
    tempered_by: ClassVar[str] = "lower ultraedit.lr"
    needs_values: ClassVar[bool] = False
    needs_subject: ClassVar[bool] = False
    remembers: bool = True

    @dataclass(frozen=True)
    class Options:
        """How far to step."""

        lr: float = option(1e-6, "step size; ||k^||^2 is about d_in, so a small model needs a larger one")
        pilots: int = option(0, "pilot edits counted into the statistics before the first batch (published: 0)")
        whiten: bool = option(False, "normalise gradients by their covariance once enough were seen (StableEdit)")
        alpha: float = option(1.0, "weight of keeping the update small in the least squares (StableEdit: 10)")

        def __post_init__(self) -> None:
            if not (self.lr > 0 and self.alpha > 0 and self.pilots >= 0):
                raise ValueError("lr and alpha must be greater than 0 and pilots must not be negative")

    def __init__(self, options: object = None):
        super().__init__(options)
        self.moments: dict[str, Moments] = {}
        """Count, mean and spread of [k, g] so far, by module name."""
        self._staged: dict[str, Moments] = {}
        self._measured: Gradients | None = None

    def prepare(self, session: Session) -> None:
        requests = session.pilots(self.options.pilots)[0] if self.options.pilots else ()
        if requests:
            for site, seen in session.gradients(requests).sites.items():
                self.moments[site.module] = self._counted(site, seen)

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        """Measure keys and gradients of all sites in one pass."""
        self._measured = session.gradients(requests)
        self._staged = {site.module: self._counted(site, seen) for site, seen in self._measured.sites.items()}

    def update(self, session: Session, site: Site) -> Update:
        from editcli.plugin import ridge

        assert self._measured is not None, "begin() measures a batch before its updates"
        seen, moments = self._measured.sites[site], self._staged[site.module]
        if moments.count < 2:
            raise OptionError(
                "ultraedit normalises over the positions it has seen and has seen only one; use a larger --batch-size "
                "or set ultraedit.pilots=100"
            )
        normalised = moments.normalise(_features(seen))
        key, gradient = normalised.split([len(seen.inputs), len(seen.gradients)])
        whitened = moments.whitened(seen.gradients) if self.options.whiten else None
        gradient = gradient if whitened is None else whitened
        step = -self.options.lr * key.square().sum(dim=0) * gradient
        # Row by row: kernels round by the layout of what they multiply.
        keys, root = seen.inputs.contiguous(), self.options.alpha**0.5
        if root == 1:
            return ridge(keys, step, site=site.module, reporter=session.reporter)
        # (K K^T + alpha I)^-1 K is ridge of K / sqrt(alpha), over sqrt(alpha).
        return ridge(keys / root, step, site=site.module, reporter=session.reporter).scaled(1 / root)

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        self.moments = {**self.moments, **self._staged}

    def state(self) -> State:
        """Return ``<module>.count``, ``<module>.mean`` and ``<module>.squares`` of [k, g] for each site.

        With ``whiten`` also ``<module>.scatter`` of g.
        """
        parts = {f"{module}.{name}": part for module, m in self.moments.items() for name, part in m.tensors().items()}
        return State(parts)

    def load_state(self, session: Session, state: State) -> None:
        """Take the statistics back, (d_in + d_out,) each; raise :class:`StateError` where they do not fit."""
        from editcli_ultraedit.moments import Moments

        saved = SavedState(self.name, state)
        for site in session.sites:
            # Before the first batch nothing has been counted.
            if not any(f"{site.module}.{part}" in saved for part in ("count", "mean", "squares")):
                self.moments[site.module] = Moments()
                continue
            size = (sum(session.weight(site).shape),)
            mean = saved.tensor(f"{site.module}.mean", size, types=("float64",))
            squares = saved.tensor(f"{site.module}.squares", size, types=("float64",), least=0)
            rows, scatter = session.weight(site).shape[0], None
            if self.options.whiten:
                scatter = saved.tensor(f"{site.module}.scatter", (rows, rows), types=("float64",))
            self.moments[site.module] = Moments(saved.count(f"{site.module}.count"), mean, squares, scatter)

    def _counted(self, site: Site, seen: SiteGradients) -> Moments:
        """Return the site's statistics with what was just seen counted in."""
        from editcli_ultraedit.moments import Moments

        last = len(seen.gradients) if self.options.whiten else 0
        return self.moments.get(site.module, Moments()).counting(_features(seen), last=last)


def _features(seen: SiteGradients) -> Tensor:
    """Return [k, g], (d_in + d_out, t)."""
    import torch

    return torch.cat([seen.inputs, seen.gradients])
