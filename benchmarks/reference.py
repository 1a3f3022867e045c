"""The published procedure for one edit, plainly: what :mod:`editcli.editing.targets` must equal, and is timed against.

It costs what the code published with MEMIT (arXiv 2210.07229) costs, on which that of the later methods is built. For
one edit at a time, in every step: all prompts and the row "{subject} is a" as one padded batch through all layers, with
the head at every position; from the last hidden states of the prompts the head a second time and a log-softmax over the
whole vocabulary at every position; then torch's own backward pass, without gradients for weights, and torch's Adam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editcli.models.forward import first, hooked, with_first
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions


@dataclass(frozen=True, slots=True)
class PlainTarget:
    """The target value z = h + delta of one edit, (d,) each, and the loss at which it stopped."""

    target: Tensor
    initial: Tensor
    written: Tensor
    loss: float


def plain_target(
    loaded: LoadedModel,
    request: EditRequest,
    prefixes: Sequence[str],
    layer: int,
    options: TargetOptions,
    *,
    second_head: bool = False,
) -> PlainTarget:
    """Optimise one edit's target value; for families without a norm behind the MLP.

    ``second_head`` makes the second product with the head that the published code makes. It leaves out whatever a
    family does behind its head, so it is only right where that is nothing.
    """
    tokens = loaded.tokens
    texts = [tokens.locate(request.in_context(prefix), request.target_new) for prefix in ("", *prefixes)]
    prompts = [text.without_last() for text in tokens.encode(texts)]
    (essence,) = tokens.encode([tokens.locate(replace(request, before="", after=" is a"))])
    run = _Steered(loaded, layer)
    h, m = run.observe(prompts[0])
    before = None
    # The published procedure takes absolute steps: delta itself is what Adam moves.
    unit = h.norm() / len(h) ** 0.5 if options.lr_kind == "relative" else torch.ones(())
    scale = h.norm() ** (2 if options.decay_kind == "absolute" else 1)
    steered = torch.zeros_like(h, requires_grad=True)
    adam = torch.optim.Adam([steered], lr=options.lr)
    last, streak = float("inf"), 0
    for step in range(options.steps):
        delta = unit * steered
        logits, hidden = run.logits([*prompts, essence], delta)
        told = run.head(hidden[:-1]).float() if second_head else logits[:-1]
        logs = torch.log_softmax(told, dim=-1)
        surprise = torch.stack([_surprise(logs[row], text) for row, text in enumerate(prompts)]).mean()
        now = torch.log_softmax(logits[-1, essence.lookup], dim=-1)
        before = now.detach() if before is None else before
        divergence = torch.nn.functional.kl_div(now, before, log_target=True, reduction="sum")
        decay = options.v_weight_decay * delta.norm() / scale
        loss = surprise + options.kl_factor * divergence + decay
        last = float(loss.detach())
        missed = [text for row, text in enumerate(prompts) if not _is_greedy(logs[row].detach(), text)]
        streak = 0 if missed or options.stop == "loss" else streak + 1
        if last < options.stop_loss or streak > options.stop_patience or step == options.steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            bound = options.clamp * h.norm() / unit
            if steered.norm() > bound:
                steered.mul_(bound / steered.norm())
    return PlainTarget(h + unit * steered.detach(), h, m, last)


def _surprise(logs: Tensor, text: Encoded) -> Tensor:
    """Return the mean negative log-probability of a text's target tokens."""
    told = [logs[place, token] for place, token in zip(text.predicting, text.target_ids, strict=True)]
    return -torch.stack(told).mean()


def _is_greedy(logs: Tensor, text: Encoded) -> bool:
    """Tell whether every target token of a text is the likeliest one at its place."""
    return logs[list(text.predicting)].argmax(dim=-1).tolist() == list(text.target_ids)


class _Steered:
    """A model with delta added to one layer's output at each text's lookup token."""

    def __init__(self, loaded: LoadedModel, layer: int):
        self.loaded, self.block, self.mlp = loaded, loaded.architecture.block(layer), loaded.architecture.mlp(layer)
        self.scale, self.head = loaded.architecture.residual_scale(layer), loaded.architecture.head

    @torch.no_grad()
    def observe(self, text: Encoded) -> tuple[Tensor, Tensor]:
        """Return h and m at a text's lookup token."""
        seen: dict[str, Tensor] = {}

        def see_block(module: object, entered: Tensor, output: object) -> None:
            seen["h"] = first(output)[0, text.lookup]

        def see_mlp(module: object, entered: Tensor, output: object) -> None:
            flat = first(output).flatten(0, -2)
            seen["m"] = flat[text.lookup] * self.scale

        with hooked(self.block, see_block), hooked(self.mlp, see_mlp):
            self._run([text])
        return seen["h"], seen["m"]

    def logits(self, texts: Sequence[Encoded], delta: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits at every position, (rows, length, vocabulary), and what the head read, (rows, length, d)."""
        read: list[Tensor] = []

        def steer(module: object, entered: Tensor, output: object) -> object:
            hidden = first(output)
            where = torch.zeros(hidden.shape[:2], device=hidden.device)
            where[range(len(texts)), [text.lookup for text in texts]] = 1
            return with_first(output, hidden + (where[:, :, None] * delta).to(hidden.dtype))

        def see_head(module: object, entered: Tensor, output: object) -> None:
            read.append(entered)

        with hooked(self.block, steer), hooked(self.head, see_head):
            return self._run(texts), read[0]

    def _run(self, texts: Sequence[Encoded]) -> Tensor:
        ids = self.loaded.tokens.pad(texts, self.loaded.input_device)
        return self.loaded.model(input_ids=ids, use_cache=False).logits.float()
