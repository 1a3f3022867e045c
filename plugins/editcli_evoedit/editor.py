"""EvoEdit: a null space that loses the directions of every edit (2025)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from editcli.plugin import (
    InverseGramEditor,
    NullSpaceOptions,
    Problem,
    SavedState,
    Session,
    Site,
    State,
    Update,
    null_space,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JUMP = 0.5
"""Most that one batch may change R_n through a null space of less than half of the directions."""
SMALLEST = 1e-10
"""Singular values of P K below this are zero, as in the paper's code."""


@dataclass(frozen=True)
class _Fields:
    """What a snapshot holds beside P."""

    l2: dict[str, float]

    def __post_init__(self) -> None:
        if not all(0 < value < math.inf for value in self.l2.values()):
            raise ValueError("l2 must be greater than 0")


class EvoEdit(InverseGramEditor):
    """Write along directions that neither reference text nor any earlier edit uses.

    With P the projector on the eigenvectors of C whose eigenvalue is small ::

        D = R (K^T P K + L2 I)^-1 (P K)^T          P <- P - U U^T,    U the left singular vectors of P K

    AlphaEdit weighs the keys of earlier edits against the new ones; here their directions are closed. An earlier edit
    is then never disturbed, a second edit of its subject is hardly written, and every edit uses up one direction: rank
    (P) edits at most. This is arXiv 2510.13851, not the method of the same name in 2512.04545. Its code adds another
    1e-6 to L2 and skips layers whose residual is small already, which changes nothing here.
    """

    name: ClassVar[str] = "evoedit"
    reference: ClassVar[str] = "arXiv:2510.13851"
    tempered_by: ClassVar[str] = "lower evoedit.nullspace_threshold or raise evoedit.l2"

    @dataclass(frozen=True)
    class Options(NullSpaceOptions):
        """The unused directions, and the weight of a small update."""

    def __init__(self, options: object = None):
        super().__init__(options)
        self._l2: dict[str, float] = {}

    @property
    def releases(self) -> bool:
        """Return False: a closed direction stays closed."""
        return False

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        null = null_space(session, site, self.options, owner=self.name)
        self._l2[site.module] = null.l2
        return null.vectors @ null.vectors.T

    def solve(self, session: Session, problem: Problem) -> Update:
        from editcli.plugin import ridge

        image, root = self._image(problem.site, problem.keys), self._l2[problem.site.module] ** 0.5
        # K^T P K = (P K)^T P K, which rounding cannot make indefinite.
        update = ridge(image / root, problem.residual, site=problem.site.module, reporter=session.reporter)
        return update.scaled(1 / root)

    def advance(self, site: Site, keys: Tensor, *, released: Tensor | None = None) -> None:
        """Close the directions of ``keys`` (d_in, n); a direction once closed stays so, and nothing is released."""
        import torch

        from editcli.plugin import InverseGram, double

        gram = self.memory[site.module]
        image = self._image(site, keys)
        left, values, _ = torch.linalg.svd(double(image, torch.device("cpu")), full_matrices=False)
        # The keys are single precision, and so is what tells their directions apart.
        floor = max(max(image.shape) * torch.finfo(torch.float32).eps * float(values[0]), SMALLEST)
        used = left[:, values > floor].to(gram.matrix)
        matrix = gram.matrix - used @ used.T
        self.memory[site.module] = InverseGram((matrix + matrix.T) / 2, gram.site, gram.reporter)

    def largest_jump(self, site: Site) -> float | None:
        """Return LARGEST_JUMP where edits may use less than half of the directions."""
        return LARGEST_JUMP if 2 * self._rank(site.module) < len(self.memory[site.module].matrix) else None

    def state(self) -> State:
        """Return P as ``<module>.inverse_gram``, and L2 by module as ``l2``."""
        return State(super().state().tensors, {"l2": self._l2})

    def load_state(self, session: Session, state: State) -> None:
        super().load_state(session, state)
        saved = SavedState(self.name, state)
        l2 = saved.fields(_Fields).l2
        if set(l2) != {site.module for site in session.sites}:
            raise saved.refusal("l2 has other sites")
        self._l2 = l2

    def record(self) -> dict[str, Any]:
        """Return rank(P), the number of directions that are left, and rank(P) / d_in per site."""
        ranks = {module: self._rank(module) for module in self.memory}
        sizes = {module: len(gram.matrix) for module, gram in self.memory.items()}
        return {"nullspace": {m: {"rank": rank, "share": rank / sizes[m]} for m, rank in ranks.items()}}

    def _rank(self, module: str) -> int:
        """Return trace(P), which is the rank of a projector."""
        return round(float(self.memory[module].matrix.trace()))

    def _image(self, site: Site, keys: Tensor) -> Tensor:
        """Return P K, (d_in, n)."""
        matrix = self.memory[site.module].matrix
        return matrix @ keys.to(matrix)
