"""RLSEdit: editing as recursive least squares (2026)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from editcli.plugin import InverseGramEditor, Session, Site, option

if TYPE_CHECKING:
    from torch import Tensor


class RlsEdit(InverseGramEditor):
    """Write each batch as one step of recursive least squares, anchored at the pretrained weight and mapping.

    The weight after t batches minimises ::

        lambda^2 ||W - W_0||^2 + mu^2 ||W K_0 - V_0||^2 + sum_{i <= t} ||W K_i - V_i||^2

    with the pretrained mapping V_0 = W_0 K_0 on reference text, K_0 K_0^T = w C, and the targets V = W K + R::

        W <- W + (V - W K) K^T Q_t,    Q_t = Q_{t-1} - Q_{t-1} K (I + K^T Q_{t-1} K)^-1 K^T Q_{t-1}
        Q_0 = (lambda^2 I + mu^2 w C)^-1

    This is the paper's method, which calls Q_t "C_t". Its released code differs twice: it takes the residual R for the
    absolute target (subtracting W K from it), and it does not carry Q from batch to batch. At lambda = 0 and mu = 1 it
    is MEMIT with history.
    """

    name: ClassVar[str] = "rlsedit"
    reference: ClassVar[str] = "arXiv:2601.15686"
    tempered_by: ClassVar[str] = "raise rlsedit.mom2_update_weight or rlsedit.lambda_reg"

    @dataclass(frozen=True)
    class Options:
        """How strongly the pretrained weight and the pretrained mapping are kept."""

        lambda_reg: float = option(0.0, "weight lambda of staying at the pretrained weight")
        mu_reg: float = option(1.0, "weight mu of keeping the pretrained mapping on reference text")
        mom2_update_weight: float = option(15000.0, "weight w of the reference text: K_0 K_0^T = w C")
        ridge: float = option(0.0, "share of each input's second moment to add, for a moment that is singular")

        def __post_init__(self) -> None:
            if min(self.lambda_reg, self.mu_reg, self.mom2_update_weight, self.ridge) < 0:
                raise ValueError("lambda_reg, mu_reg, mom2_update_weight and ridge must not be negative")
            if self.lambda_reg == 0 and self.mu_reg * self.mom2_update_weight == 0:
                raise ValueError(
                    "nothing anchors the weight; set lambda_reg, or mu_reg and mom2_update_weight, above 0"
                )

    def initial_inverse(self, session: Session, site: Site) -> Tensor:
        gram = self.options.mu_reg**2 * self.options.mom2_update_weight * session.second_moment(site)
        gram.diagonal().add_(self.options.lambda_reg**2)
        return self.invert(session, site, gram, ridge=self.options.ridge)
