"""Optimise target values for a whole batch at once: the hot loop of the program.

For every edit an offset delta is added to h, the output of the last edited layer at the subject's last token, and

    loss(delta) = mean_c NLL(target | c + prompt, h += delta) / (target length)
                  + kl_factor * KL( p_0(. | "{subject} is a") || p_delta )
                  + v_weight_decay * ||delta|| / ||h||^2

is minimised by Adam; after each step ||delta|| is projected to at most clamp * ||h|| (ROME, arXiv 2202.05262; MEMIT,
2210.07229). Edits are independent of each other: each has its own loss and stops on its own, so a batch gives what one
edit at a time would give, up to rounding. Where h lies in an attention sink, ||h|| is that of ordinary tokens, see
:mod:`editcli.editing.sinks`. With ``merge`` that holds for the edits of one subject together: they have
one delta, see :mod:`editcli.editing.merging`.

With ``stop = "greedy"`` an edit also stops once its target has been the greedy answer in all its contexts, at this
evaluation and the ``stop_patience`` ones before it: most-probable early stopping (ENCORE, arXiv 2502.01636).

Adam moves every coordinate by about its rate, and ||h|| differs between models by more than ten times, so a published
rate holds for the model it was chosen on. ``lr_kind = "relative"`` takes steps in units of ||h|| / sqrt(d): Adam
minimises over u, delta = u ||h|| / sqrt(d), and a step moves delta by about lr * ||h||. With ``decay_kind =
"relative"`` the last term is v_weight_decay * ||delta|| / ||h||. Then no part of the procedure depends on the scale of
the stream: where that is multiplied by a factor and the model's answers stay the same, delta is multiplied by it.

Both parts of the loss are cross-entropies: of one token at a target's position, and of the whole distribution before
the edit at "{subject} is a", whose divergence is the cross-entropy less its value at delta = 0. Logits are the largest
tensor of a step, so their softmax overwrites them, and their gradient overwrites that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from editcli.editing.engine import Engine, engine_for
from editcli.editing.layout import Group
from editcli.editing.merging import members, merged
from editcli.editing.replay import Eager, Replays
from editcli.editing.sinks import begins, without_outliers
from editcli.editing.steering import Chunk, Row, Steering
from editcli.errors import ModelError, NumericalError
from editcli.models.forward import positions
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Text, Tokens
from editcli.plugin.interfaces import Values
from editcli.reporting import Reporter
from editcli.requests.schema import EditRequest
from editcli.requests.subjects import by_subject
from editcli.settings.core import TargetOptions


def cross_entropies(logits: Tensor, tokens: Tensor, distributions: Tensor) -> Tensor:
    """Return the cross-entropy of each row of ``logits`` (n, vocabulary), (n,) float32; overwrites ``logits``.

    The targets of the first rows are ``tokens`` (t,), of the others ``distributions`` (n - t, vocabulary).
    """
    return cast(Tensor, _CrossEntropies.apply(logits, tokens, distributions))


def greedy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Tell of each of the first rows of ``logits`` whether its token (t,) is the likeliest, (t,) bool.

    Call it before :func:`cross_entropies`, which overwrites the logits.
    """
    return logits[: len(tokens)].argmax(dim=1) == tokens


class _CrossEntropies(torch.autograd.Function):
    """Log-sum-exp minus the target's logit; autograd raises if an earlier operation still needs the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, distributions: Tensor) -> Tensor:
        num_targets = len(tokens)
        at_tokens = logits[:num_targets].gather(1, tokens[:, None]).squeeze(1)
        chosen = torch.cat([at_tokens, torch.linalg.vecdot(distributions, logits[num_targets:])])
        largest = logits.amax(dim=1, keepdim=True)
        exponentials = logits.sub_(largest).exp_()
        total = exponentials.sum(dim=1)
        ctx.exponentials, ctx.total, ctx.tokens, ctx.distributions = exponentials.detach(), total, tokens, distributions
        return total.log() + largest.squeeze(1) - chosen

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        upstream, num_targets = gradients[0], len(ctx.tokens)
        gradient = ctx.exponentials.mul_((upstream / ctx.total)[:, None])
        gradient[torch.arange(num_targets, device=upstream.device), ctx.tokens] -= upstream[:num_targets]
        gradient[num_targets:] -= upstream[num_targets:, None] * ctx.distributions
        return gradient, None, None


ADAM_BETAS, ADAM_EPSILON = (0.9, 0.999), 1e-8
AT_CLAMP = 1 - 1e-4
"""Fraction of the clamp from which an offset counts as at the clamp: projecting rounds."""


@dataclass(frozen=True, eq=False)
class _Losses:
    """The tensors from which offsets of a chunk's rows give its losses.

    Positions that pad the logits are real ones of the chunk with the factor 0.
    """

    chunk: Chunk
    head: tuple[Tensor, Tensor]
    """Positions of the logits: first every target token's predecessor, then the essences' lookup tokens."""
    token: Tensor
    """(t,) the target tokens."""
    weight: Tensor
    """(t + essences,) the factor of each position in its edit's loss."""
    before: tuple[Tensor, Tensor] | None
    """The essences' distributions at delta = 0, (essences, vocabulary), and their entropies, (essences,).

    None where they are not known yet: then delta is 0.
    """


@dataclass(frozen=True, slots=True)
class _Part:
    """A group of rows and the losses of its logits; edits have their numbers in the micro-batch."""

    group: Group
    losses: _Losses
    edit: Tensor
    """(rows,) the edit of each row."""
    owner: Tensor
    """(t + essences,) the edit of each position."""


def optimise(
    loaded: LoadedModel,
    requests: Sequence[EditRequest],
    prefixes: Sequence[str],
    layer: int,
    options: TargetOptions,
    reporter: Reporter,
    *,
    label: str = "Optimising targets",
    sink: bool = False,
    usual: float = math.inf,
    engine: Engine | None = None,
) -> Values:
    """Return target values of ``requests`` at ``layer``, (d, n) each, float32.

    ``sink`` says that the first token of a text is an attention sink: subjects there are steered behind the prefixes
    alone, see :mod:`editcli.editing.sinks`. ``usual`` is ||h|| of ordinary tokens, which stands in for the length of an
    attention sink; infinity takes every length as it is. ``engine`` holds what several batches share.
    """
    engine = engine or engine_for(loaded)
    groups = by_subject(requests) if options.merge else [[edit] for edit in range(len(requests))]
    rows = merged(_rows(loaded, requests, prefixes, options, sink=sink), groups)
    parts: list[tuple[list[int], tuple[Tensor, ...]]] = []
    with reporter.phase(label, len(requests), "edits") as advance, engine.running():
        budget = engine.most_tokens(options, layer)
        pending, progress = _micro_batches(rows, budget)[::-1], _Progress(advance)
        while pending:
            edits = pending.pop()
            progress.restart_at(sum(len(finished) for finished, _ in parts))
            try:
                # Not bound to a name, so that its caches are freed before the next micro-batch allocates its own.
                some = [rows[edit] for edit in edits]
                parts.append((edits, _Optimiser(engine, some, layer, options, usual=usual).run(progress)))
            except torch.OutOfMemoryError as error:
                engine.replays.clear()
                pending += _halves(edits, loaded, layer, reporter, error)
        progress(len(requests) - len(rows))
    order = torch.tensor([edit for numbers, _ in parts for number in numbers for edit in groups[number]])
    back = torch.argsort(order)
    columns = zip(*(values for _, values in parts), strict=True)
    target, initial, written, loss, reached, clamped = (torch.cat(column, dim=0)[back] for column in columns)
    _check_finite(torch.cat([target, loss[:, None]], dim=1), requests, loaded, layer)
    return Values(target.T, initial.T, written.T, dropped={}, loss=loss, reached=reached, clamped=clamped)


def _halves(
    edits: list[int], loaded: LoadedModel, layer: int, reporter: Reporter, error: torch.OutOfMemoryError
) -> list[list[int]]:
    """Halve a micro-batch that did not fit; edits are independent, so the result stays the same."""
    if len(edits) == 1:
        site = loaded.architecture.site(layer).module
        raise ModelError(f"one edit does not fit the memory at {site}; use a smaller --dtype or --device") from error
    middle = len(edits) // 2
    reporter.note(
        f"{len(edits)} edits at a time do not fit the memory: continuing with {middle}; see targets.batch_tokens"
    )
    return [edits[middle:], edits[:middle]]


def _check_finite(figures: Tensor, requests: Sequence[EditRequest], loaded: LoadedModel, layer: int) -> None:
    bad = (~figures.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        site = loaded.architecture.site(layer).module
        edit = requests[bad[0]].id
        reason = f"the target value of edit {edit!r} or its loss is not finite; lower targets.lr or use --dtype float32"
        raise NumericalError(reason, site=site)


def _rows(
    loaded: LoadedModel, requests: Sequence[EditRequest], prefixes: Sequence[str], options: TargetOptions, *, sink: bool
) -> list[list[Row]]:
    """Return the texts of each edit: its prompt bare and after every prefix, then "{subject} is a".

    h is read at the first row. With ``sink``, that is the first prefix's where the subject begins its text.
    """
    tokens = loaded.tokens
    contexts = ("", *prefixes)
    texts = [text for request in requests for text in _located(tokens, request, contexts)]
    encoded = [text.without_last() for text in tokens.encode(texts)]
    starts = [1 if sink and prefixes and begins(bare) else 0 for bare in encoded[:: len(contexts)]]
    opened = [replace(r, before=contexts[start], after=" is a") for r, start in zip(requests, starts, strict=True)]
    closing = [text.up_to_lookup() for text in tokens.encode([tokens.locate(essence) for essence in opened])]
    rows = []
    for edit, (request, start) in enumerate(zip(requests, starts, strict=True)):
        texts_of_edit = encoded[edit * len(contexts) + start : (edit + 1) * len(contexts)]
        prompts = [
            Row(text, edit, 1.0 / (len(texts_of_edit) * len(text.target)), False, (context, (context, request.before)))
            for context, text in zip(contexts[start:], texts_of_edit, strict=True)
        ]
        stems = (contexts[start], (contexts[start], "")) if start else (None, None)
        rows.append([*prompts, Row(closing[edit], edit, options.kl_factor, True, stems)])
        longest = max(len(row.text.ids) for row in rows[-1])
        if tokens.max_length is not None and longest > tokens.max_length:
            raise request.refusal(
                f"after a prefix the prompt and target have {longest} tokens, more than the model's context of "
                f"{tokens.max_length}; lower targets.prefix_tokens"
            )
    return rows


def _located(tokens: Tokens, request: EditRequest, contexts: Sequence[str]) -> list[Text]:
    """Return the text of an edit in each context; the space before its target is found out once, on the bare one."""
    bare = tokens.locate(request.in_context(contexts[0]), request.target_new)
    assert bare.target is not None
    start = bare.target[0]
    joint, target = bare.text[start - bare.joint : start], bare.text[start:]
    others = [replace(request.in_context(context), join=joint) for context in contexts[1:]]
    return [bare, *(tokens.locate(other, target) for other in others)]


def _micro_batches(rows: Sequence[Sequence[Row]], budget: int) -> list[list[int]]:
    """Group edits by length so that a group's padded rows stay within ``budget`` tokens."""
    width = [max(len(row.text.ids) for row in texts) for texts in rows]
    groups: list[list[int]] = [[]]
    for edit in sorted(range(len(rows)), key=lambda index: (width[index], index)):
        if groups[-1] and width[edit] * len(rows[edit]) * (len(groups[-1]) + 1) > budget:
            groups.append([])
        groups[-1].append(edit)
    return groups


class _Progress:
    """Reports each finished edit once, also those of a micro-batch that failed half-way and is repeated."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance, self._done, self._reported = advance, 0, 0

    def restart_at(self, done: int) -> None:
        """Set the number of finished edits; edits that were reported already are not reported again."""
        self._done = done

    def __call__(self, count: int) -> None:
        self._done += count
        if self._done > self._reported:
            self._advance(self._done - self._reported)
            self._reported = self._done


class _Optimiser:
    """Optimises the edits of one micro-batch; indices of edits are local to it."""

    def __init__(
        self,
        engine: Engine,
        rows: Sequence[Sequence[Row]],
        layer: int,
        options: TargetOptions,
        *,
        usual: float,
    ):
        self.engine, self.options = engine, options
        loaded = engine.loaded
        self.norm = loaded.architecture.mlp_norm(layer)
        self.rows = [replace(row, edit=edit) for edit, texts in enumerate(rows) for row in texts]
        self.steering = Steering(
            loaded,
            self.rows,
            layer,
            cached=options.cached,
            budget=engine.most_tokens(options, layer),
            layout=engine.layout,
            apart=engine.apart,
        )
        self.members = members(rows)
        first = [sum(map(len, rows[:edit])) for edit in range(len(rows))]
        self.initial, self.written = self.steering.at_lookup()[first], self.steering.outputs[first]
        # With a norm between delta and the stream, delta is measured against the MLP's output, to which it is added.
        length = (self.initial if self.norm is None else self.written).norm(dim=1)
        self.length = without_outliers(length, usual)
        self.bound = self.length * (options.clamp if self.norm is None else options.norm_clamp)
        absolute = options.lr_kind == "absolute" and self.norm is None
        # Before a norm the length of the MLP's output is arbitrary, so steps are relative to it.
        self.unit = torch.ones_like(self.length) if absolute else self.length / self.initial.shape[1] ** 0.5
        self.decay = options.v_weight_decay / self.length ** (2 if options.decay_kind == "absolute" else 1)
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        """For each essence row: its distribution at delta = 0 and that distribution's entropy."""

    def run(self, advance: Callable[[int], None]) -> tuple[Tensor, ...]:
        """Return (target, initial, written, loss, reached, clamped), the first three (n, d), the others (n,)."""
        delta, options = torch.zeros_like(self.initial), self.options
        loss = torch.full_like(self.length, float("inf"))
        moments = (torch.zeros_like(delta), torch.zeros_like(delta))
        # At how many evaluations in a row each edit's target was the greedy answer; 0 where that stops no edit.
        streak = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
        active = torch.ones(len(delta), dtype=torch.bool, device=delta.device)
        self._check()
        groups = self.steering.groups(range(len(self.rows)))
        parts, left = self._parts(groups), len(delta)
        for step in range(1, options.steps + 1):
            last = step == options.steps
            losses, gradient, missed = self._evaluate(parts, delta, with_gradient=not last)
            loss = torch.where(active, losses, loss)
            if options.stop == "greedy":
                streak = torch.where(active, torch.where(missed == 0, streak + 1, 0), streak)
            if last:
                break
            # A finished edit keeps the delta at which its loss was measured.
            active = active & (losses >= options.stop_loss) & (streak <= options.stop_patience)
            # The count waits for the device, and a device that is not the processor had better not stop every step.
            if step % self.engine.layout.patience == 0 and (remaining := int(active.sum())) < left:
                advance(left - remaining)
                left = remaining
                if not left:
                    break
                parts = self._smaller(parts, active)
            self._adam(delta, gradient, moments, active, step)
        advance(left)
        clamped = delta.norm(dim=1) >= AT_CLAMP * self.bound
        # An edit that runs out of steps while it is patient is answered as much as one that stops.
        reached = (loss < options.stop_loss) | (streak > 0)
        return self._each(delta, loss, reached, clamped)

    def _each(self, delta: Tensor, *figures: Tensor) -> tuple[Tensor, ...]:
        """Return (target, initial, written) of every edit, and the figures of its group."""
        first, group = self.members
        initial, written = self.steering.at_lookup()[first], self.steering.outputs[first]
        return initial + delta[group], initial, written, *(figure[group] for figure in figures)

    def _adam(self, delta: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], active: Tensor, step: int) -> None:
        """Take one Adam step on the active rows of ``delta`` and project them into the ball of clamp * ||h||.

        The step is one on u, delta = unit * u, so that the constant in Adam's denominator is scale-free too. The
        moments of finished edits move on, but nothing reads them.
        """
        unit = self.unit[:, None]
        gradient = gradient * unit
        first_beta, second_beta = ADAM_BETAS
        mean, square = moments
        mean.lerp_(gradient, 1 - first_beta)
        square.mul_(second_beta).addcmul_(gradient, gradient, value=1 - second_beta)
        denominator = (square / (1 - second_beta**step)).sqrt() + ADAM_EPSILON
        moved = delta - self.options.lr * unit * (mean / (1 - first_beta**step)) / denominator
        moved = moved * (self.bound / moved.norm(dim=1).clamp_min(1e-30)).clamp_max(1.0)[:, None]
        delta.copy_(torch.where(active[:, None], moved, delta))

    def _smaller(self, parts: list[_Part], active: Tensor) -> list[_Part]:
        """Return the parts of the rows of active edits, or all of ``parts`` if that saves too little work."""
        edits = set(active.nonzero().flatten().tolist())
        groups = self.steering.groups([index for index, row in enumerate(self.rows) if row.edit in edits])
        now = [part.group for part in parts]
        return (
            self._parts(groups) if self.engine.layout.shrinks(now, groups, allowance=self.steering.allowance) else parts
        )

    def _parts(self, groups: Sequence[Group]) -> list[_Part]:
        return [self._part(group) for group in groups]

    def _part(self, group: Group) -> _Part:
        device, layout = self.initial.device, self.engine.layout
        rows = [(number, self.rows[row]) for number, row in enumerate(group.members)]
        told = [(number, row, at) for number, row in rows if not row.is_essence for at in row.text.predicting]
        essences = [(number, row, row.text.lookup) for number, row in rows if row.is_essence]
        columns = [self.steering.columns(group.members[number], [at])[0] for number, _, at in (*told, *essences)]
        heads = list(zip([number for number, _, _ in (*told, *essences)], columns, strict=True))
        spare = _unused(heads, group)
        # A position that is read twice would get its gradient twice, so the padding uses each position once.
        second = list(islice(spare, layout.logits(len(essences), group) - len(essences)))
        first = list(islice(spare, layout.logits(len(told), group) - len(told)))
        heads = [*heads[: len(told)], *first, *heads[len(told) :], *second]
        owners = [*(row for _, row, _ in told), *[None] * len(first), *(row for _, row, _ in essences)]
        owners += [None] * len(second)
        tokens = [token for _, row in rows if not row.is_essence for token in row.text.target_ids]
        edits = [self.rows[row].edit for row in group.members]
        losses = _Losses(
            chunk=self.steering.chunk(group),
            head=positions(heads, device),
            token=torch.tensor([*tokens, *[0] * len(first)], dtype=torch.long, device=device),
            weight=torch.tensor([0.0 if row is None else row.weight for row in owners], device=device),
            before=self._before([row for row in group.members if self.rows[row].is_essence], len(second)),
        )
        return _Part(
            group,
            losses,
            edit=torch.tensor([*edits, *[edits[0]] * (group.rows - len(edits))], device=device),
            owner=torch.tensor([0 if row is None else row.edit for row in owners], device=device),
        )

    def _before(self, essences: Sequence[int], padding: int) -> tuple[Tensor, Tensor] | None:
        """Return the distributions and entropies of some essence rows, and zeros behind them."""
        if not self.before or not essences:
            return None
        probs, entropies = (torch.stack(each) for each in zip(*(self.before[row] for row in essences), strict=True))
        return pad(probs, (0, 0, 0, padding)), pad(entropies, (0, padding))

    def _remember(self, part: _Part, before: tuple[Tensor, Tensor]) -> _Part:
        """Keep the distributions of a part's essences, and return the part with them."""
        essences = [row for row in part.group.members if self.rows[row].is_essence]
        for row, distribution, entropy in zip(essences, *before, strict=False):
            self.before[row] = distribution, entropy
        return replace(part, losses=replace(part.losses, before=before))

    @torch.enable_grad()
    def _evaluate(self, parts: list[_Part], delta: Tensor, *, with_gradient: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return each edit's loss, (n,), its gradient, (n, d), if ``with_gradient``, and its misses, (n,).

        A miss is a target token that is not the greedy answer; they are counted if ``targets.stop`` is greedy. Rows of
        edits that are not in ``parts`` are undefined. The first evaluation adds the essences' distributions to them.
        """
        variable = delta.clone().requires_grad_(True)
        shift = self._shift(variable)
        decay = self.decay * variable.norm(dim=1)
        upstream, loss = torch.zeros_like(delta), torch.zeros_like(self.length)
        missed = torch.zeros(len(delta), dtype=torch.long, device=delta.device)
        function = self._with_gradient if with_gradient else self._losses
        key = (function.__name__, self.steering.layer, self.options.stop)
        for number, part in enumerate(parts):
            # One backward pass per chunk, so that the activations of only one chunk are held.
            way = self._way()
            each, misses, *others = way(key, function, part.losses, shift.detach()[part.edit])
            # Named after the call, in which a recording may fail.
            self.engine.used.add(way.name)
            loss.index_add_(0, part.owner, each)
            missed.index_add_(0, part.owner[: len(misses)], misses)
            if with_gradient:
                upstream.index_add_(0, part.edit, others.pop(0))
            if others:
                parts[number] = self._remember(part, (others[0], others[1]))
        (gradient,) = torch.autograd.grad((shift * upstream).sum() + decay.sum(), variable)
        return loss + decay.detach(), gradient, missed

    def _way(self) -> Replays:
        """Return how to run a step; the model's own forward pass is never recorded."""
        return Eager() if self.steering.whole else self.engine.replays

    def _with_gradient(self, losses: _Losses, offset: Tensor) -> tuple[Tensor, ...]:
        """Return :meth:`_losses` with the gradient of their sum with respect to ``offset``, (rows, d), as the third."""
        offset = offset.detach().requires_grad_(True)
        each, misses, *before = self._losses(losses, offset)
        return each.detach(), misses, torch.autograd.grad(each.sum(), offset)[0], *before

    def _losses(self, losses: _Losses, offset: Tensor) -> tuple[Tensor, ...]:
        """Return the weighted cross-entropies of target tokens and divergences of essences, and the misses.

        Misses, (t,), are 1 where another token is likelier than the target; empty unless ``targets.stop`` is greedy.
        Where the essences' distributions are not known yet, they and their entropies follow.
        """
        logits = self.steering.logits(losses.chunk, offset, losses.head).to(offset.device)
        num_targets = len(losses.token)
        checked = losses.token[: num_targets if self.options.stop == "greedy" else 0]
        misses = ~greedy(logits.detach(), checked) & (losses.weight[: len(checked)] != 0)
        known = losses.before is not None
        probs, entropies = losses.before or _distributions(logits.detach()[num_targets:])
        nll = cross_entropies(logits, losses.token, probs)
        nll = torch.cat([nll[:num_targets], nll[num_targets:] - entropies])
        found = () if known or not len(entropies) else (probs, entropies)
        return nll * losses.weight, misses.long(), *found

    @torch.no_grad()
    def _check(self) -> None:
        """See once whether the blocks can be called alone: on the first row, in a chunk of its own."""
        steering, known = self.steering, self.engine.whole
        name = (steering.layer, self.options.cached)
        if name not in known:
            (group,) = steering.groups([0])
            losses = self._part(group).losses
            steering.check(losses.chunk, losses.head)
            known[name] = steering.whole
        steering.whole = known[name]

    def _shift(self, delta: Tensor) -> Tensor:
        """Return the change of the residual stream by delta, (n, d).

        If a family norms the MLP's output before it joins the stream, only outputs of that norm can be written, so
        delta is added before the norm.
        """
        if self.norm is None:
            return delta
        kind = next(self.norm.parameters()).dtype
        return self.norm((self.written + delta).to(kind)).float() - self.norm(self.written.to(kind)).float()


def _distributions(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distributions of rows of ``logits``, (n, vocabulary), and their entropies, (n,)."""
    probs = logits.log_softmax(dim=1).exp()
    return probs, torch.logsumexp(logits, dim=1) - torch.linalg.vecdot(probs, logits)


def _unused(heads: Sequence[tuple[int, int]], group: Group) -> Iterator[tuple[int, int]]:
    """Yield the positions (row, column) of a group that are not among ``heads``."""
    used = set(heads)
    return (at for at in product(range(group.rows), range(group.columns)) if at not in used)


def target_costs(
    loaded: LoadedModel, requests: Sequence[EditRequest], contexts: int, layer: int, options: TargetOptions
) -> list[int]:
    """Estimate the multiplications with weights for each request's target value, to share a batch out evenly.

    A request has ``contexts`` texts. Every step runs the tokens from the lookup token on through the blocks above
    ``layer``, and the head at the target's positions, forward and backward: twice the multiplications, since weights
    have no gradients. The tokens before the lookup token run once through all blocks. The estimate assumes that every
    edit needs all steps and that a batch shares no work between its edits.
    """
    architecture = loaded.architecture
    block = sum(parameter.numel() for parameter in architecture.block(layer).parameters())
    head = sum(parameter.numel() for parameter in architecture.head.parameters())
    above = (architecture.layers - 1 - layer) * block
    tokens = loaded.tokens
    texts = tokens.encode([tokens.locate(request, request.target_new) for request in requests])
    cached = options.cached and loaded.supports_kv_cache
    behind = 0 if cached else (contexts - 1) * options.prefix_tokens
    costs = []
    for text in texts:
        again = contexts * (len(text.ids) - 1 - (text.lookup if cached else 0)) + behind
        # Of "{subject} is a" only the tokens up to its lookup token are needed.
        step = (again + 1) * above + (contexts * len(text.target) + 1) * head
        costs.append(2 * options.steps * step + contexts * text.lookup * architecture.layers * block)
    return costs
