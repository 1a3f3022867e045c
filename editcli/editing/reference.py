"""The published procedure for one edit, plainly: what :mod:`editcli.editing.targets` must equal, and is timed against.

Full texts through all layers in float32, one edit after the other, torch's own Adam and softmax.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editcli.editing.targets import TargetOptions
from editcli.edits import EditRequest
from editcli.models.forward import first, tapped, with_first
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded


@dataclass(frozen=True, slots=True)
class PlainTarget:
    """The target value z = h + delta of one edit, (d,) each, and the loss at which it stopped."""

    target: Tensor
    initial: Tensor
    written: Tensor
    loss: float


def plain_target(
    loaded: LoadedModel, request: EditRequest, prefixes: Sequence[str], layer: int, options: TargetOptions
) -> PlainTarget:
    """Optimise one edit's target value; for families without a norm behind the MLP."""
    tokens = loaded.tokens
    texts = [tokens.locate(request.in_context(prefix), request.target_new) for prefix in ("", *prefixes)]
    prompts = tokens.encode(texts)
    (essence,) = tokens.encode([tokens.locate(replace(request, before="", after=" is a"))])
    run = _Steered(loaded, layer)
    h, m = run.observe(prompts[0])
    before = run.logs([essence], torch.zeros_like(h))[0, essence.lookup].detach()
    delta = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([delta], lr=options.lr)
    last = float("inf")
    for step in range(options.steps):
        logs = run.logs([*prompts, essence], delta)
        told = [_surprise(logs[row], text) for row, text in enumerate(prompts)]
        now = logs[len(prompts), essence.lookup]
        divergence = torch.nn.functional.kl_div(now, before, log_target=True, reduction="sum")
        decay = options.v_weight_decay * delta.norm() / h.norm() ** 2
        loss = torch.stack(told).mean() + options.kl_factor * divergence + decay
        last = float(loss.detach())
        if last < options.stop_loss or step == options.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            bound = options.clamp * h.norm()
            if delta.norm() > bound:
                delta.mul_(bound / delta.norm())
    return PlainTarget(h + delta.detach(), h, m, last)


def _surprise(logs: Tensor, text: Encoded) -> Tensor:
    """Return the mean negative log-probability of a text's target tokens."""
    told = [logs[place, token] for place, token in zip(text.predicting, text.target_ids, strict=True)]
    return -torch.stack(told).mean()


class _Steered:
    """A model with delta added to one layer's output at each text's lookup token."""

    def __init__(self, loaded: LoadedModel, layer: int):
        self.loaded, self.block, self.mlp = loaded, loaded.architecture.block(layer), loaded.architecture.mlp(layer)
        self.scale = loaded.architecture.residual_scale(layer)

    @torch.no_grad()
    def observe(self, text: Encoded) -> tuple[Tensor, Tensor]:
        """Return h and m at a text's lookup token."""
        seen: dict[str, Tensor] = {}

        def see_block(module: object, entered: Tensor, output: object) -> None:
            seen["h"] = first(output)[0, text.lookup]

        def see_mlp(module: object, entered: Tensor, output: object) -> None:
            seen["m"] = first(output).reshape(len(text.ids), -1)[text.lookup] * self.scale

        with tapped(self.block, see_block), tapped(self.mlp, see_mlp):
            self._run([text])
        return seen["h"], seen["m"]

    def logs(self, texts: Sequence[Encoded], delta: Tensor) -> Tensor:
        """Return log-probabilities at every position, (rows, length, vocabulary)."""

        def steer(module: object, entered: Tensor, output: object) -> object:
            hidden = first(output)
            where = torch.zeros(hidden.shape[:2], device=hidden.device)
            where[range(len(texts)), [text.lookup for text in texts]] = 1
            return with_first(output, hidden + where[:, :, None] * delta)

        with tapped(self.block, steer):
            return torch.log_softmax(self._run(texts), dim=-1)

    def _run(self, texts: Sequence[Encoded]) -> Tensor:
        ids = self.loaded.tokens.pad(texts, self.loaded.input_device)
        return self.loaded.model(input_ids=ids, use_cache=False).logits.float()
