"""Optimise target values for a whole batch at once: the hot loop of the program.

For every edit an offset delta is added to h, the output of the last edited layer at the subject's last token, and

    loss(delta) = mean_c NLL(target | c + prompt, h += delta) / (target length)
                  + kl_factor * KL( p_0(. | "{subject} is a") || p_delta )
                  + v_weight_decay * ||delta|| / ||h||^2

is minimised by Adam; after each step ||delta|| is projected to at most clamp * ||h|| (ROME, arXiv 2202.05262; MEMIT,
2210.07229). Edits are independent of each other: each has its own loss and stops on its own, so a batch gives what one
edit at a time would give, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from editcli.edits import EditRequest
from editcli.errors import NumericalError
from editcli.forward import first, head_only_at, positions, replaced_forward, run, tapped, with_first
from editcli.interfaces import Values
from editcli.model import LoadedModel
from editcli.options import option
from editcli.report import Reporter
from editcli.tokens import Encoded

ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8


@dataclass(frozen=True)
class TargetOptions:
    """How target values are optimised; the names are those of the published configurations where they have one."""

    steps: int = option(25, "most evaluations of the loss for one edit (published: v_num_grad_steps)")
    lr: float = option(0.5, "Adam's learning rate (published: v_lr)")
    clamp: float = option(0.75, "largest ||delta|| as a share of ||h|| (published: clamp_norm_factor)")
    v_weight_decay: float = option(0.5, "weight of ||delta|| / ||h||^2 in the loss")
    kl_factor: float = option(0.0625, "weight of the divergence on '{subject} is a'")
    stop_loss: float = option(0.05, "an edit whose loss is below this is done")
    prefixes: int = option(5, "generated prefixes that each prompt is also optimised behind")
    prefix_tokens: int = option(10, "tokens of each generated prefix")
    batch_tokens: int = option(24576, "most tokens in one forward pass")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clamp <= 0 or self.prefixes < 0:
            raise ValueError("steps must be at least 1, lr and clamp positive, prefixes not negative")


@dataclass(frozen=True, slots=True)
class _Row:
    """One text of one edit: ``edit`` is its index in the batch, ``weight`` the share of a target token in its loss."""

    text: Encoded
    edit: int
    weight: float
    is_essence: bool


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows of the edits that are still being optimised, as tensors."""

    ids: Tensor
    hidden: Tensor
    lookup: tuple[Tensor, Tensor]
    edit: Tensor
    head: tuple[Tensor, Tensor]
    token: Tensor
    token_weight: Tensor
    token_edit: Tensor
    essence_edit: Tensor


def optimise(
    loaded: LoadedModel,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    layer: int,
    options: TargetOptions,
    reporter: Reporter,
    *,
    label: str = "Optimising targets",
) -> Values:
    """Return target values of ``requests`` at ``layer``, (d, n) each, float32."""
    rows = _rows(loaded, requests, prefixes)
    parts: list[tuple[list[int], tuple[Tensor, Tensor, Tensor, Tensor]]] = []
    with reporter.phase(label, len(requests), "edits") as advance:
        for edits in _micro_batches(rows, options.batch_tokens):
            optimiser = _Optimiser(loaded, [rows[edit] for edit in edits], layer, options)
            parts.append((edits, optimiser.run(advance)))
    order = torch.tensor([edit for edits, _ in parts for edit in edits])
    back = torch.argsort(order)
    target, initial, written, loss = (torch.cat(columns, dim=0)[back] for columns in zip(*(p for _, p in parts), strict=True))
    _check_finite(target, requests, loaded, layer)
    return Values(target=target.T, initial=initial.T, written=written.T, dropped={}, loss=loss)


def _check_finite(target: Tensor, requests: Sequence[EditRequest], loaded: LoadedModel, layer: int) -> None:
    bad = (~target.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        site = loaded.architecture.site(layer).module
        raise NumericalError(f"the target value of edit {requests[bad[0]].id!r} is not finite; lower targets.lr", site=site)


def _rows(loaded: LoadedModel, requests: Sequence[EditRequest], prefixes: Sequence[str]) -> list[list[_Row]]:
    """Return the texts of each edit: its prompt bare and behind every prefix, then "{subject} is a"."""
    tokens = loaded.tokens
    contexts = ("", *prefixes)
    texts = [tokens.locate(r.in_context(c), r.target_new) for r in requests for c in contexts]
    essences = [tokens.locate(replace(r, before="", after=" is a")) for r in requests]
    encoded = [text.without_last() for text in tokens.encode(texts)]
    closing = [text.up_to_lookup() for text in tokens.encode(essences)]
    rows = []
    for edit in range(len(requests)):
        own = encoded[edit * len(contexts) : (edit + 1) * len(contexts)]
        prompts = [_Row(text, edit, 1.0 / (len(contexts) * len(text.target)), False) for text in own]
        rows.append([*prompts, _Row(closing[edit], edit, 0.0, True)])
    return rows


def _micro_batches(rows: Sequence[Sequence[_Row]], budget: int) -> list[list[int]]:
    """Group edits by length so that a group's padded rows stay within ``budget`` tokens."""
    width = [max(len(row.text.ids) for row in own) for own in rows]
    groups: list[list[int]] = [[]]
    for edit in sorted(range(len(rows)), key=lambda index: (width[index], index)):
        if groups[-1] and width[edit] * len(rows[edit]) * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(edit)
    return groups


class _Optimiser:
    """Optimises the edits of one micro-batch; indices of edits are local to it."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[Sequence[_Row]], layer: int, options: TargetOptions):
        self.loaded, self.layer, self.options = loaded, layer, options
        self.count = len(rows)
        self.rows = [replace(row, edit=edit) for edit, own in enumerate(rows) for row in own]
        self.bare = [edit * len(rows[0]) for edit in range(self.count)]
        self.example: Any = None

    def run(self, advance: Callable[[int], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (target, initial, written, loss), the first three (n, d)."""
        ids, hidden, initial, written = self._observe()
        norm = written.norm(dim=1) if self._normed else initial.norm(dim=1)
        delta = torch.zeros_like(initial)
        loss = torch.full((self.count,), float("inf"), device=initial.device)
        moments = (torch.zeros_like(delta), torch.zeros_like(delta))
        active = torch.arange(self.count, device=initial.device)
        before: Tensor | None = None
        block = self._gather(ids, hidden, active)
        for step in range(self.options.steps):
            own = delta[active].requires_grad_(True)
            parts, essence = self._loss(block, own, written[active], norm[active], before)
            if before is None:
                before = essence.detach()
            (gradient,) = torch.autograd.grad(parts.sum(), own)
            parts = parts.detach()
            loss[active] = parts
            going = parts >= self.options.stop_loss
            if step == self.options.steps - 1 or not going.any():
                break
            # A finished edit keeps the delta at which its loss was measured.
            if not going.all():
                advance(int((~going).sum()))
                active, gradient, before = active[going], gradient[going], before[going]
                block = self._gather(ids, hidden, active)
            self._adam(delta, gradient, moments, active, norm, step + 1)
        advance(len(active))
        return initial + delta, initial, written, loss

    @property
    def _normed(self) -> bool:
        return self.loaded.architecture.mlp_norm(self.layer) is not None

    def _adam(
        self,
        delta: Tensor,
        gradient: Tensor,
        moments: tuple[Tensor, Tensor],
        active: Tensor,
        norm: Tensor,
        step: int,
    ) -> None:
        """Take one Adam step on the active rows of ``delta`` and project them into the ball of clamp * ||h||."""
        first_beta, second_beta = ADAM_BETAS
        mean = moments[0][active].lerp(gradient, 1 - first_beta)
        square = moments[1][active].mul(second_beta).addcmul(gradient, gradient, value=1 - second_beta)
        moments[0][active], moments[1][active] = mean, square
        denominator = (square / (1 - second_beta**step)).sqrt() + ADAM_EPSILON
        moved = delta[active] - self.options.lr * (mean / (1 - first_beta**step)) / denominator
        bound = self.options.clamp * norm[active]
        length = moved.norm(dim=1)
        delta[active] = moved * (bound / length.clamp_min(1e-30)).clamp_max(1.0)[:, None]

    def _observe(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Run the lower layers once; return ids, the block's outputs, and h and m at the bare prompts' lookup."""
        architecture, seen = self.loaded.architecture, {}
        ids = self.loaded.tokens.pad([row.text for row in self.rows], self.loaded.input_device)

        def see_block(module: Any, entered: Tensor, output: Any) -> None:
            seen["block"], self.example = first(output), output

        def see_mlp(module: Any, entered: Tensor, output: Any) -> None:
            seen["mlp"] = first(output)

        with torch.no_grad(), tapped(architecture.mlp(self.layer), see_mlp):
            with tapped(architecture.block(self.layer), see_block, stop=True):
                run(self.loaded.model, ids)
        where = [(row, self.rows[row].text.lookup) for row in self.bare]
        rows, columns = positions(where, seen["block"].device)
        initial = seen["block"][rows, columns].float()
        # Some families flatten (rows, tokens) inside their MLP; the hidden states have the same order either way.
        outputs = seen["mlp"].reshape(seen["block"].shape)
        scale = architecture.residual_scale(self.layer)
        return ids, seen["block"], initial, outputs[rows, columns].float() * scale

    def _gather(self, ids: Tensor, hidden: Tensor, active: Tensor) -> _Block:
        """Return the rows of the active edits as tensors."""
        local = {edit: place for place, edit in enumerate(active.tolist())}
        chosen = [index for index, row in enumerate(self.rows) if row.edit in local]
        rows = [self.rows[index] for index in chosen]
        width = max(len(row.text.ids) for row in rows)
        pick = torch.tensor(chosen, device=hidden.device)
        heads: list[tuple[int, int]] = []
        table: list[tuple[int, float, int]] = []
        for place, row in enumerate(rows):
            if not row.is_essence:
                heads += [(place, column) for column in row.text.predicting]
                table += [(token, row.weight, local[row.edit]) for token in row.text.target_ids]
        essences = [(place, row) for place, row in enumerate(rows) if row.is_essence]
        heads += [(place, row.text.lookup) for place, row in essences]
        device = hidden.device
        return _Block(
            ids=ids[pick.to(ids.device), :width],
            hidden=hidden[pick, :width],
            lookup=positions([(place, row.text.lookup) for place, row in enumerate(rows)], device),
            edit=torch.tensor([local[row.edit] for row in rows], device=device),
            head=positions(heads, device),
            token=torch.tensor([token for token, _, _ in table], device=device),
            token_weight=torch.tensor([weight for _, weight, _ in table], device=device),
            token_edit=torch.tensor([edit for _, _, edit in table], device=device),
            essence_edit=torch.tensor([local[row.edit] for _, row in essences], device=device),
        )

    def _loss(
        self, block: _Block, delta: Tensor, written: Tensor, norm: Tensor, before: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return each active edit's loss, (n,), and its log-probabilities at the essence prompt, (n, vocabulary)."""
        logits = self._logits(block, delta, written)
        device = delta.device
        logits = logits.to(device)
        told = len(block.token)
        chosen = logits[:told].gather(1, block.token[:, None]).squeeze(1)
        surprise = (torch.logsumexp(logits[:told], dim=1) - chosen) * block.token_weight
        loss = torch.zeros(len(delta), device=device).index_add(0, block.token_edit, surprise)
        essence = torch.log_softmax(logits[told:], dim=1)[torch.argsort(block.essence_edit)]
        reference = essence.detach() if before is None else before
        divergence = (reference.exp() * (reference - essence)).sum(dim=1)
        decay = self.options.v_weight_decay * delta.norm(dim=1) / norm**2
        return loss + self.options.kl_factor * divergence + decay, essence

    def _logits(self, block: _Block, delta: Tensor, written: Tensor) -> Tensor:
        """Run the upper layers from the stored hidden states plus delta; return float32 logits at the head positions."""
        architecture = self.loaded.architecture
        hidden = block.hidden.clone()
        shift = self._shift(delta, written)
        hidden[block.lookup] = (hidden[block.lookup].float() + shift[block.edit]).to(hidden.dtype)
        with ExitStack() as stack:
            for layer in range(self.layer):
                stack.enter_context(replaced_forward(architecture.block(layer), self._pass_through))
            steered = with_first(self.example, hidden)
            stack.enter_context(replaced_forward(architecture.block(self.layer), lambda *a, **k: steered))
            stack.enter_context(head_only_at(architecture.head, *block.head))
            return run(self.loaded.model, block.ids).logits[0].float()

    def _pass_through(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Stand in for a lower block: nothing it computes is used, since the last edited block's output is stored."""
        return with_first(self.example, hidden)

    def _shift(self, delta: Tensor, written: Tensor) -> Tensor:
        """Return what delta adds to the residual stream, (n, d).

        Where a family norms the MLP's output before it joins the stream, only what that norm can produce can be
        written, so delta is added in front of the norm.
        """
        norm = self.loaded.architecture.mlp_norm(self.layer)
        if norm is None:
            return delta
        kind = next(norm.parameters()).dtype
        return norm((written + delta).to(kind)).float() - norm(written.to(kind)).float()
