"""The protocol ``distribution``: how far the whole distribution of the next token moved from the base model's.

"Same answer" hardly follows how strongly a model was changed; KL(base || edited) of the next token does. It is measured
at the end of each edit's own neighbours, where an edit should change nothing, and at the end of unrelated texts. Base
and edited model read the same batches, so a model that equals its base has a divergence of exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.evaluation.scoring import BATCH_TOKENS, last_logits
from editcli.models.forward import batches, pass_tokens
from editcli.models.matmul import quick_linears
from editcli.models.tokens import Text
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

WORST = 10
"""Prompts with the largest divergences that are named."""
UNRELATED = 100
"""Unrelated texts."""
TEXT_TOKENS = 24
"""Tokens of an unrelated text."""
CACHE_BYTES = 128 * 2**20
"""Most memory that stored distributions of the base may take."""


@dataclass(frozen=True, slots=True)
class Named:
    """A prompt with the edit that it belongs to; an unrelated text belongs to none."""

    prompt: str
    edit: str | None = None
    ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(base || edited) of the token after one prompt, in nats."""

    prompt: str
    edit: str | None
    kl: float


@dataclass(frozen=True, slots=True)
class Spread:
    """Divergences over a set of prompts."""

    prompts: int
    median: float
    p90: float
    """The 90th percentile, linearly interpolated."""
    worst: tuple[Divergence, ...]
    """The largest, the largest first."""


@dataclass(frozen=True, slots=True)
class Divergences:
    """What edits did to the distribution of the next token, on two sets of prompts; None for a set without any."""

    neighbors: Spread | None
    unrelated: Spread | None
    values: tuple[Divergence, ...] = ()
    """Every divergence, those of the neighbours first."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as a JSON object, without the single values but the largest."""
        sets = {"neighbors": self.neighbors, "unrelated": self.unrelated}
        return {name: None if one is None else asdict(one) for name, one in sets.items()}

    @property
    def figures(self) -> dict[str, float]:
        """The figures by the names of the registry."""
        sets = {"neighbors": self.neighbors, "unrelated": self.unrelated}
        return {
            f"distribution.{name}.{figure}": getattr(spread, figure)
            for name, spread in sets.items()
            if spread is not None
            for figure in ("median", "p90")
        }


def neighbor_prompts(loaded: LoadedModel, requests: Iterable[EditRequest]) -> list[Named]:
    """Return the neighbours of each edit as the model reads them; a prompt that several edits share comes once."""
    first: dict[str, str] = {}
    for request in requests:
        for near in request.neighborhood_prompts:
            first.setdefault(near.prompt, request.id)
    rows = loaded.tokens.encode([loaded.tokens.open_prompt(prompt) for prompt in first])
    return [Named(prompt, edit, row.ids) for (prompt, edit), row in zip(first.items(), rows, strict=True)]


def unrelated_prompts(loaded: LoadedModel, texts: Iterable[str], *, count: int = UNRELATED) -> list[Named]:
    """Return the beginnings of at most ``count`` of ``texts``, spread evenly over them."""
    known = [text for text in dict.fromkeys(texts) if text.strip()]
    chosen = known[:: max(1, len(known) // count)][:count]
    rows = loaded.tokens.encode([Text(text, None, None) for text in chosen])
    cut = [row.ids[:TEXT_TOKENS] for row in rows]
    return [Named(loaded.tokens.decode(ids).strip(), None, ids) for ids in cut if ids]


def divergences(
    edited: LoadedModel,
    base: LoadedModel,
    prompts: Sequence[Named],
    *,
    batch_tokens: int = BATCH_TOKENS,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> list[Divergence]:
    """Return KL(base || edited) after each prompt, in their order; the work is shared out over ``team``."""

    def work(assigned: Sequence[int]) -> tuple[Tensor]:
        table = torch.zeros(len(assigned), 1, dtype=torch.float64)
        mine = [prompts[item] for item in assigned]
        with (reporter or Silent()).phase("Comparing distributions", len(mine), "prompts") as advance:
            for batch in _batches(edited, mine, batch_tokens):
                rows = [mine[index].ids for index in batch]
                table[batch, 0] = kl(_logits(edited, rows), _logits(base, rows))
                advance(len(batch))
        return (table,)

    (table,) = (team or Team()).spread("divergences", [len(one.ids) for one in prompts], work)
    return [Divergence(one.prompt, one.edit, value) for one, value in zip(prompts, table[:, 0].tolist(), strict=True)]


class BaseDistributions:
    """The base model's distributions after some prompts, for comparing many edited versions of the model with it.

    They are stored on the CPU in float32 as far as :data:`CACHE_BYTES` go: ``vocabulary * 4`` bytes a prompt, 200 kB
    for a vocabulary of 50,000. Prompts beyond are left out evenly; :attr:`prompts` holds the others.
    """

    def __init__(self, loaded: LoadedModel, prompts: Sequence[Named], *, batch_tokens: int = BATCH_TOKENS):
        size = 4 * len(loaded.model.get_input_embeddings().weight)
        step = max(1, math.ceil(len(prompts) * size / CACHE_BYTES))
        self.prompts = tuple(prompts[::step])
        self._parts = [
            (batch, _logits(loaded, [self.prompts[index].ids for index in batch]).cpu())
            for batch in _batches(loaded, self.prompts, batch_tokens)
        ]

    def divergences(self, loaded: LoadedModel) -> list[Divergence]:
        """Return KL(base || edited) after each stored prompt, in their order."""
        values = torch.zeros(len(self.prompts), dtype=torch.float64)
        for batch, before in self._parts:
            values[batch] = kl(_logits(loaded, [self.prompts[index].ids for index in batch]), before)
        return [
            Divergence(one.prompt, one.edit, value) for one, value in zip(self.prompts, values.tolist(), strict=True)
        ]


def kl(edited: Tensor, base: Tensor) -> Tensor:
    """Return KL(base || edited) = sum_t P(t) (ln P(t) - ln Q(t)) of each row of logits, (n,) float64 on the CPU.

    P is the base's distribution and Q the edited model's. Where Q gives 0 to a token that P allows it is infinite.
    """
    ours, theirs = (logits.float().log_softmax(dim=1) for logits in (edited, base.to(edited.device)))
    # A token that the base rules out adds nothing, whatever the edited model gives it.
    terms = torch.where(theirs == -math.inf, 0, theirs.exp() * (theirs - ours))
    # Rounding may give two nearly equal distributions a tiny negative divergence.
    return terms.double().sum(dim=1).clamp_min(0).cpu()


def spread(values: Iterable[Divergence]) -> Spread | None:
    """Return median, 90th percentile and the largest divergences; None without any.

    A divergence that is not a number, from a wrecked model, counts as infinite.
    """
    known = [one if one.kl == one.kl else Divergence(one.prompt, one.edit, math.inf) for one in values]
    if not known:
        return None
    ordered = sorted(known, key=lambda one: (-one.kl, one.edit or "", one.prompt))
    numbers = [one.kl for one in known]
    p90 = quantiles(numbers, n=10, method="inclusive")[-1] if len(numbers) > 1 else numbers[0]
    return Spread(len(known), median(numbers), p90, tuple(ordered[:WORST]))


def compare_distributions(
    edited: LoadedModel,
    base: LoadedModel,
    requests: Iterable[EditRequest],
    texts: Iterable[str],
    *,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> Divergences:
    """Compare the distributions of an edited model and its base on the edits' neighbours and on unrelated texts."""
    near, far = neighbor_prompts(edited, requests), unrelated_prompts(edited, texts)
    values = divergences(edited, base, [*near, *far], reporter=reporter, team=team)
    return Divergences(spread(values[: len(near)]), spread(values[len(near) :]), tuple(values))


def _batches(loaded: LoadedModel, prompts: Sequence[Named], budget: int) -> Iterator[list[int]]:
    return batches([len(one.ids) for one in prompts], budget=pass_tokens(budget, loaded.input_device))


def _logits(loaded: LoadedModel, rows: Sequence[tuple[int, ...]]) -> Tensor:
    with quick_linears(loaded.model):
        return last_logits(loaded, rows)
