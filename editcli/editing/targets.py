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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from editcli.editing.steering import Layout, Row, Steering
from editcli.edits import EditRequest
from editcli.errors import ModelError, NumericalError
from editcli.interfaces import Values
from editcli.models.forward import positions
from editcli.models.loading import LoadedModel
from editcli.options import option
from editcli.report import Reporter

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
    cached: bool = option(True, "reuse attention keys and values before the subject's last token")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or self.clamp <= 0 or self.prefixes < 0:
            raise ValueError("steps must be at least 1, lr and clamp positive, prefixes not negative")


@dataclass(frozen=True, slots=True)
class _Block:
    """The rows of the edits that are still being optimised, as tensors; edits are numbered among themselves."""

    layout: Layout
    edit: Tensor
    """(rows,) the edit of each row."""
    head: tuple[Tensor, Tensor]
    """Where logits are needed: first at every target token's predecessor, then at the essences' lookup tokens."""
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
        pending = _micro_batches(rows, options.batch_tokens)[::-1]
        while pending:
            edits = pending.pop()
            try:
                optimiser = _Optimiser(loaded, [rows[edit] for edit in edits], layer, options)
                parts.append((edits, optimiser.run(advance)))
            except torch.OutOfMemoryError as error:
                pending += _halves(edits, loaded, layer, reporter, error)
    order = torch.tensor([edit for edits, _ in parts for edit in edits])
    back = torch.argsort(order)
    columns = zip(*(values for _, values in parts), strict=True)
    target, initial, written, loss = (torch.cat(column, dim=0)[back] for column in columns)
    _check_finite(torch.cat([target, loss[:, None]], dim=1), requests, loaded, layer)
    return Values(target=target.T, initial=initial.T, written=written.T, dropped={}, loss=loss)


def _halves(
    edits: list[int], loaded: LoadedModel, layer: int, reporter: Reporter, error: torch.OutOfMemoryError
) -> list[list[int]]:
    """Split a micro-batch that did not fit; edits are independent, so the result stays the same."""
    if len(edits) == 1:
        site = loaded.architecture.site(layer).module
        raise ModelError(f"one edit does not fit the memory at {site}; use a smaller --dtype or --device") from error
    middle = len(edits) // 2
    reporter.note(
        f"{len(edits)} edits at a time do not fit the memory: going on with {middle}; see targets.batch_tokens"
    )
    return [edits[middle:], edits[:middle]]


def _check_finite(figures: Tensor, requests: Sequence[EditRequest], loaded: LoadedModel, layer: int) -> None:
    bad = (~figures.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        site = loaded.architecture.site(layer).module
        edit = requests[bad[0]].id
        reason = f"the target value of edit {edit!r} or its loss is not finite; lower targets.lr or use --dtype float32"
        raise NumericalError(reason, site=site)


def _rows(loaded: LoadedModel, requests: Sequence[EditRequest], prefixes: Sequence[str]) -> list[list[Row]]:
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
        prompts = [Row(text, edit, 1.0 / (len(contexts) * len(text.target)), False) for text in own]
        rows.append([*prompts, Row(closing[edit], edit, 0.0, True)])
    return rows


def _micro_batches(rows: Sequence[Sequence[Row]], budget: int) -> list[list[int]]:
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

    def __init__(self, loaded: LoadedModel, rows: Sequence[Sequence[Row]], layer: int, options: TargetOptions):
        self.options = options
        self.norm = loaded.architecture.mlp_norm(layer)
        self.rows = [replace(row, edit=edit) for edit, own in enumerate(rows) for row in own]
        self.steering = Steering(loaded, self.rows, layer, cached=options.cached)
        bare = [edit * len(rows[0]) for edit in range(len(rows))]
        self.initial, self.written = self.steering.at_lookup()[bare], self.steering.outputs[bare]
        # Where a norm stands between delta and the stream, delta is measured against what it is added to.
        self.length = (self.initial if self.norm is None else self.written).norm(dim=1)
        # In front of a norm the length of what delta is added to is arbitrary, so steps are taken relative to it.
        self.unit = torch.ones_like(self.length) if self.norm is None else self.length / self.initial.shape[1] ** 0.5

    def run(self, advance: Callable[[int], None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (target, initial, written, loss), the first three (n, d)."""
        delta = torch.zeros_like(self.initial)
        loss = torch.full((len(delta),), float("inf"), device=delta.device)
        moments = (torch.zeros_like(delta), torch.zeros_like(delta))
        active = torch.arange(len(delta), device=delta.device)
        block, before = self._gather(active), None
        for step in range(1, self.options.steps + 1):
            own = delta[active].requires_grad_(True)
            parts, essence = self._loss(block, own, active, before)
            before = essence.detach() if before is None else before
            (gradient,) = torch.autograd.grad(parts.sum(), own)
            loss[active] = parts.detach()
            going = parts.detach() >= self.options.stop_loss
            if step == self.options.steps or not going.any():
                break
            # A finished edit keeps the delta at which its loss was measured.
            if not going.all():
                advance(int((~going).sum()))
                active, gradient, before = active[going], gradient[going], before[going]
                block = self._gather(active)
            self._adam(delta, gradient, moments, active, step)
        advance(len(active))
        return self.initial + delta, self.initial, self.written, loss

    def _adam(self, delta: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], active: Tensor, step: int) -> None:
        """Take one Adam step on the active rows of ``delta`` and project them into the ball of clamp * ||h||."""
        first_beta, second_beta = ADAM_BETAS
        mean = moments[0][active].lerp(gradient, 1 - first_beta)
        square = moments[1][active].mul(second_beta).addcmul(gradient, gradient, value=1 - second_beta)
        moments[0][active], moments[1][active] = mean, square
        denominator = (square / (1 - second_beta**step)).sqrt() + ADAM_EPSILON
        rate = self.options.lr * self.unit[active][:, None]
        moved = delta[active] - rate * (mean / (1 - first_beta**step)) / denominator
        bound = self.options.clamp * self.length[active]
        delta[active] = moved * (bound / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)[:, None]

    def _gather(self, active: Tensor) -> _Block:
        """Return the rows of the active edits as tensors."""
        local = {edit: place for place, edit in enumerate(active.tolist())}
        chosen = [index for index, row in enumerate(self.rows) if row.edit in local]
        rows = [self.rows[index] for index in chosen]
        told = [(place, row) for place, row in enumerate(rows) if not row.is_essence]
        essences = [(place, row) for place, row in enumerate(rows) if row.is_essence]
        columns = self.steering.columns
        heads = [(place, column) for place, row in told for column in columns(row, row.text.predicting)]
        heads += [(place, columns(row, [row.text.lookup])[0]) for place, row in essences]
        device = self.initial.device
        return _Block(
            layout=self.steering.layout.select(torch.tensor(chosen), max(map(self.steering.width, rows))),
            edit=torch.tensor([local[row.edit] for row in rows], device=device),
            head=positions(heads, device),
            token=torch.tensor([token for _, row in told for token in row.text.target_ids], device=device),
            token_weight=torch.tensor([row.weight for _, row in told for _ in row.text.target_ids], device=device),
            token_edit=torch.tensor([local[row.edit] for _, row in told for _ in row.text.target_ids], device=device),
            essence_edit=torch.tensor([local[row.edit] for _, row in essences], device=device),
        )

    def _loss(self, block: _Block, delta: Tensor, active: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return each active edit's loss, (n,), and its log-probabilities at the essence prompt, (n, vocabulary)."""
        shift = self._shift(delta, self.written[active])
        logits = self.steering.logits(block.layout, shift[block.edit], block.head).to(delta.device)
        told = len(block.token)
        chosen = logits[:told].gather(1, block.token[:, None]).squeeze(1)
        surprise = (torch.logsumexp(logits[:told], dim=1) - chosen) * block.token_weight
        loss = torch.zeros(len(delta), device=delta.device).index_add(0, block.token_edit, surprise)
        essence = torch.log_softmax(logits[told:], dim=1)[torch.argsort(block.essence_edit)]
        reference = essence.detach() if before is None else before
        divergence = (reference.exp() * (reference - essence)).sum(dim=1)
        decay = self.options.v_weight_decay * delta.norm(dim=1) / self.length[active] ** 2
        return loss + self.options.kl_factor * divergence + decay, essence

    def _shift(self, delta: Tensor, written: Tensor) -> Tensor:
        """Return what delta adds to the residual stream, (n, d).

        Where a family norms the MLP's output before it joins the stream, only what that norm can produce can be
        written, so delta is added in front of the norm.
        """
        if self.norm is None:
            return delta
        kind = next(self.norm.parameters()).dtype
        return self.norm((written + delta).to(kind)).float() - self.norm(written.to(kind)).float()
