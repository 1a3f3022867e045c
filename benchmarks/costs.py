"""What a batch of edits costs: operations, bytes and communication, counted from shapes alone.

Every count is of the program as it is written; :mod:`benchmarks.scaling` measures what an operation takes.
"""

from __future__ import annotations

from dataclasses import dataclass

SINGLE, DOUBLE, HALF = 4, 8, 2
"""Bytes of a number."""
DOWNDATE_PASSES = 6
"""Times that C goes through memory in one solve and down-date: two products, one update, one symmetrisation."""
WRITE_PASSES = 10
"""Times that an edited matrix goes through memory when it is written, judged and summed up."""


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder-only model with gated MLPs; widths as in its configuration."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_width: int | None = None

    @property
    def block(self) -> int:
        """Weights of one block that multiply every token."""
        width = self.head_width or self.hidden // self.heads
        attention = 2 * self.hidden * width * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.inner

    @property
    def weights(self) -> int:
        """Weights of the whole model, embeddings and head counted apart."""
        return self.layers * self.block + 2 * self.hidden * self.vocabulary


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch of edits, in tokens summed over its edits and their contexts."""

    edits: int
    once: int
    """In front of the lookup tokens, computed once; a beginning that texts share counts once for all of them."""
    lookups: int
    """Of the same up to the subject's last token."""
    bare: int
    """Of the bare prompts up to the subject's last token."""
    again: int
    """That every step computes again: from the subject's last token on."""
    told: int
    """Positions whose logits a step needs."""
    steps: int

    @classmethod
    def typical(cls, edits: int, steps: int = 25) -> Batch:
        """Return a batch like CounterFact's: 5 prefixes of 12 tokens, 8 of prompt, the subject ends at the 4th."""
        contexts, prefix, prompt, lookup, target = 6, 12, 8, 4, 2
        rows = contexts * edits
        once = (contexts - 1) * prefix + rows * lookup
        lookups = (contexts - 1) * prefix * edits + rows * lookup
        again = rows * (prompt - lookup + target) + edits
        return cls(edits, once, lookups, lookup * edits, again, rows * target + edits, steps)


@dataclass(frozen=True, slots=True)
class Plan:
    """Which layers of a shape are edited, and whether the editor remembers."""

    shape: Shape
    layers: tuple[int, ...]
    remembers: bool = True

    @property
    def last(self) -> int:
        """The last edited layer."""
        return self.layers[-1]


def target_flops(plan: Plan, batch: Batch) -> float:
    """Count the optimisation of target values: one pass over all texts, then every step from the last edited layer on.

    A step runs forward and back through the layers above and the head, without gradients of weights: 4 operations a
    weight and token.
    """
    shape = plan.shape
    first = 2.0 * shape.block * (shape.layers * batch.once + (plan.last + 1) * batch.again)
    above = shape.block * (shape.layers - 1 - plan.last) * batch.again
    head = shape.hidden * shape.vocabulary * batch.told
    return first + batch.steps * 4.0 * (above + head)


def read_flops(plan: Plan, batch: Batch) -> float:
    """Count reading keys and residuals at every site, each read going on from the site before."""
    blocks, before = 0.0, -1
    for layer in plan.layers:
        blocks += (layer - before) * batch.lookups + (plan.last - layer + 1) * batch.bare
        before = layer
    return 2.0 * plan.shape.block * blocks


def solve_flops(plan: Plan, batch: Batch) -> float:
    """Count solves and down-dates with Q at all sites."""
    products = 3 if plan.remembers else 1
    return len(plan.layers) * products * 2.0 * plan.shape.inner**2 * batch.edits


def solve_bytes(plan: Plan, width: int) -> float:
    """Count what goes through memory for that, with ``width`` bytes a number of C."""
    return float(len(plan.layers) * DOWNDATE_PASSES * width * plan.shape.inner**2)


def write_bytes(plan: Plan) -> float:
    """Count what goes through memory to write and judge all sites."""
    return float(len(plan.layers) * WRITE_PASSES * SINGLE * plan.shape.inner * plan.shape.hidden)


def evaluation_flops(plan: Plan, edits: int, rows: int = 26, tokens: int = 10) -> float:
    """Count one evaluation of edits with paraphrases and neighbours: so many scored texts an edit."""
    return 2.0 * plan.shape.layers * plan.shape.block * edits * rows * tokens


def statistics_flops(plan: Plan, tokens_per_dim: int = 10) -> float:
    """Count the second moments of all sites: the passes and the outer products."""
    tokens = tokens_per_dim * plan.shape.inner
    return tokens * (2.0 * plan.shape.block * (plan.last + 1) + len(plan.layers) * 2.0 * plan.shape.inner**2)


def batch_messages(plan: Plan, batch: Batch) -> tuple[int, float]:
    """Count a batch's exchanges between ranks and the bytes that every rank ends up with: targets, keys, residuals."""
    shape, sites = plan.shape, len(plan.layers)
    targets = SINGLE * batch.edits * (3 * shape.hidden + 1)
    reads = SINGLE * batch.edits * sites * (shape.inner + shape.hidden)
    # One for the targets, two a site, one each for interrupts, digests and immediate efficacy.
    return 4 + 2 * sites, float(targets + reads)


def segment_bytes(plan: Plan) -> int:
    """Count the bytes of one edit on disk: key, residual and both factors of its update at every site."""
    return len(plan.layers) * SINGLE * 2 * (plan.shape.inner + plan.shape.hidden)


def snapshot_bytes(plan: Plan, width: int) -> int:
    """Count the bytes of one snapshot: the masters, and Q where the editor remembers."""
    masters = SINGLE * plan.shape.inner * plan.shape.hidden
    return len(plan.layers) * (masters + (width * plan.shape.inner**2 if plan.remembers else 0))


def held_bytes(plan: Plan, batch: Batch, *, model: int = HALF, width: int = SINGLE) -> int:
    """Count what one replica holds: weights, masters, baselines, C, and the activations of one edit's step at least.

    The program halves a micro-batch of targets until it fits, so no more than that is needed.
    """
    shape, sites = plan.shape, len(plan.layers)
    masters = sites * (SINGLE + model) * shape.inner * shape.hidden
    memory = sites * width * shape.inner**2
    # A step keeps about 16 widths and 4 inner widths a token and layer for its way back, and float32 logits twice.
    step = (shape.layers - 1 - plan.last) * batch.again * (16 * shape.hidden + 4 * shape.inner) * model
    step += 2 * SINGLE * batch.told * shape.vocabulary
    return model * shape.weights + masters + memory + step // batch.edits
