"""The loss of target optimisation from logits, in the memory of the logits themselves.

Both its parts are cross-entropies: of one token at a target's position, of the whole distribution before the edit at
"{subject} is a", whose divergence is the cross-entropy less its value at delta = 0. Logits are the largest tensor of a
step, so their softmax overwrites them, and their gradient overwrites that.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor


def cross_entropies(logits: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
    """Return the cross-entropy of each row of ``logits`` (n, vocabulary), (n,) float32; the logits are used up.

    The first rows are compared with ``tokens`` (t,), the others with the distributions ``wanted`` (n - t, vocabulary).
    """
    return cast(Tensor, _CrossEntropies.apply(logits, tokens, wanted))


class _CrossEntropies(torch.autograd.Function):
    """Log-sum-exp minus what was wanted; autograd refuses to go on if an earlier operation still needs the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, wanted: Tensor) -> Tensor:
        told = len(tokens)
        known = logits[:told].gather(1, tokens[:, None]).squeeze(1)
        chosen = torch.cat([known, torch.linalg.vecdot(wanted, logits[told:])])
        largest = logits.amax(dim=1, keepdim=True)
        shares = logits.sub_(largest).exp_()
        total = shares.sum(dim=1)
        ctx.shares, ctx.total, ctx.tokens, ctx.wanted = shares.detach(), total, tokens, wanted
        return total.log() + largest.squeeze(1) - chosen

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        slope, told = slopes[0], len(ctx.tokens)
        gradient = ctx.shares.mul_((slope / ctx.total)[:, None])
        gradient[torch.arange(told, device=slope.device), ctx.tokens] -= slope[:told]
        gradient[told:] -= slope[told:, None] * ctx.wanted
        return gradient, None, None
