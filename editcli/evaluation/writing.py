"""Let a model write freely after a prompt: greedy, from cached keys and values, until a stop rule ends the text.

Prompts of similar length are written together: they are padded behind their last token, the padding is masked, and the
positions of what follows are those of the unpadded text. A model that does not take such a cache writes prompts of
exactly one length together.

A text depends on its prompt alone, in float32. Rounding differs between batches, so where the two most probable tokens
come close to each other (:data:`CLOSE`), the prompt is written again on its own, which no batch can influence. Of
exactly equal tokens the one with the lowest id is taken. In half precision texts are not written again, because the
format itself makes ties; they are counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import DynamicCache

from editcli.distributed.team import Team
from editcli.models.forward import head_only_at, positions
from editcli.models.kv_cache import cache_of, cache_options, with_cache
from editcli.models.matmul import quick_linears
from editcli.models.tokens import Encoded
from editcli.reporting import Reporter, Silent
from editcli.settings.stopping import StopRules

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

WIDTH = 8
"""Largest difference of length between prompts that are written together."""
ROWS = 64
"""Most prompts that are written together on a CPU; on other devices four times as many."""
CLOSE = 1e-4
"""Two tokens are close when their logits differ by less than this share of the larger one (or of 1)."""

Ending = Literal["end", "newline", "sentence", "length", "tie"]


@dataclass(frozen=True, slots=True)
class Written:
    """The text that a model wrote after a prompt."""

    text: str
    """Without white space around it."""
    tokens: int
    """New tokens that were written, the one that ended the text included."""
    ending: Ending
    """The rule that ended it: the model's end of text, a newline, a sentence's end, or the most tokens."""
    close: bool = False
    """Whether two tokens came so close somewhere that rounding might have decided in a batch."""

    def to_json(self) -> dict[str, Any]:
        """Return the text with how it ended."""
        return asdict(self)


def write_freely(
    loaded: LoadedModel,
    prompts: Sequence[str],
    rules: StopRules | None = None,
    *,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> dict[str, Written]:
    """Return what the model writes after each prompt, in its chat template where the model was loaded with it.

    The batches are shared out over ``team``, whose ranks all get every text.
    """
    rules, team = rules or StopRules(), team or Team()
    unique = list(dict.fromkeys(prompts))
    rows = loaded.tokens.encode([loaded.tokens.open_prompt(prompt) for prompt in unique])
    writer = _Writer(loaded, rules)
    batches = list(writer.batches(rows))
    assigned = [batches[number] for number in team.share([len(batch) for batch in batches])]
    written: dict[str, Written] = {}
    with (
        (reporter or Silent()).phase("Writing", sum(map(len, assigned)), "texts") as advance,
        quick_linears(loaded.model),
    ):
        for batch in assigned:
            for index, text in zip(batch, writer.write([rows[i] for i in batch]), strict=True):
                written[unique[index]] = text
            advance(len(batch))
    parts = team.exchange("texts", {prompt: text.to_json() for prompt, text in written.items()})
    texts = {prompt: Written(**text) for part in parts for prompt, text in part.items()}
    return {prompt: texts[prompt] for prompt in unique}


@dataclass(slots=True)
class _Row:
    """A text that is being written."""

    ids: list[int] = field(default_factory=list)
    ending: Ending | None = None
    text: str = ""
    close: bool = False
    free: int = 0
    """Characters of the text in which no stop rule applies."""


class _Writer:
    """Writes batches of prompts with one model."""

    def __init__(self, loaded: LoadedModel, rules: StopRules):
        self.loaded, self.rules = loaded, rules
        self.ends = end_tokens(loaded)
        self.device = loaded.input_device
        self.padded = loaded.supports_kv_cache
        self.window = getattr(loaded.model.config.get_text_config(), "sliding_window", None) or math.inf
        self.alone = next(loaded.model.parameters()).dtype == torch.float32
        """Whether a text in which two tokens come close is written again alone."""

    def batches(self, rows: Sequence[Encoded]) -> Iterator[list[int]]:
        """Yield indices of prompts that are written together."""
        most = ROWS if self.device.type == "cpu" else 4 * ROWS
        group: list[int] = []
        for index in sorted(range(len(rows)), key=lambda index: (len(rows[index].ids), index)):
            if group and (len(group) == most or not self._together(len(rows[group[0]].ids), len(rows[index].ids))):
                yield group
                group = []
            group.append(index)
        if group:
            yield group

    def _together(self, shortest: int, longest: int) -> bool:
        if shortest == longest:
            return True
        # A window counts columns, padding included; and the end of the context must not depend on the others.
        room = min(self.window, self.loaded.tokens.max_length or math.inf)
        return self.padded and longest - shortest <= WIDTH and longest + self.rules.most <= room

    def write(self, rows: Sequence[Encoded]) -> list[Written]:
        """Return the texts of one batch."""
        written = self._continue(rows)
        if self.alone and len(rows) > 1:
            for index, row in enumerate(written):
                if row.close:
                    (written[index],) = self._continue(rows[index : index + 1])
                    written[index].close = True
        return [self._finished(row) for row in written]

    def _finished(self, row: _Row) -> Written:
        return Written(row.text, len(row.ids), row.ending or "length", row.close)

    @torch.no_grad()
    def _continue(self, rows: Sequence[Encoded]) -> list[_Row]:
        """Write a batch token by token; a row is dropped from it as soon as it has ended."""
        lengths = [len(row.ids) for row in rows]
        room = (self.loaded.tokens.max_length or math.inf) - max(lengths)
        texts = [_Row() for _ in rows]
        active = list(range(len(rows)))
        state = _State(self.loaded, rows, padded=self.padded)
        for step in range(int(min(self.rules.most, room))):
            tokens, close = self._choose(state.logits(), step)
            for index, token, near in zip(active, tokens.tolist(), close.tolist(), strict=True):
                if texts[index].ending is None:
                    self._add(texts[index], token, near, leave=self.alone and len(rows) > 1)
            places = [place for place, index in enumerate(active) if texts[index].ending is None]
            if not places:
                break
            if self.padded:
                active = [active[place] for place in places]
            state.follow(tokens, places)
        return texts

    def _choose(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Return the most probable token of each row and whether another one comes close, (rows,) each, on the CPU."""
        logits = logits.float()
        if step < self.rules.least:
            logits[:, list(self.ends)] = -math.inf
        # The first of equal maxima is taken, which is the lowest id.
        best = logits.argmax(dim=1, keepdim=True)
        top = logits.gather(1, best)
        second = logits.scatter(1, best, -math.inf).amax(dim=1, keepdim=True)
        close = top - second < CLOSE * top.abs().clamp_min(1)
        return best[:, 0].cpu(), close[:, 0].cpu()

    def _add(self, row: _Row, token: int, close: bool, *, leave: bool) -> None:
        """Add a token to a text and end it where a rule says so; with ``leave`` a close call ends it in this batch."""
        row.ids.append(token)
        row.close |= close
        if token in self.ends:
            row.ending = "end"
            return
        if len(row.ids) == self.rules.least:
            row.free = len(self.loaded.tokens.decode(row.ids))
        text = self.loaded.tokens.decode(row.ids)
        free = row.free if len(row.ids) >= self.rules.least else len(text)
        row.text, row.ending = self.rules.cut(text, free)
        if close and leave:
            row.ending = "tie"


class _State:
    """Keys, values and columns of the texts of a batch that are still being written."""

    def __init__(self, loaded: LoadedModel, rows: Sequence[Encoded], *, padded: bool):
        self.loaded, self.padded = loaded, padded
        self.device = loaded.input_device
        # What is written follows the longest text, whatever length a device would rather have.
        width = max(len(row.ids) for row in rows)
        self.ids = loaded.tokens.pad(rows, self.device)[:, :width]
        self.mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows])
        self.last = [len(row.ids) - 1 for row in rows]
        self.cache: Any = DynamicCache() if padded else None

    def logits(self) -> Tensor:
        """Run the model on what it has not read; return the logits of the next token, (rows, vocabulary)."""
        places = positions(list(enumerate(self.last)), self.device)
        options = with_cache(self.loaded.model, self.cache)
        if self.padded:
            options = cache_options(self.loaded.model, self.mask, self.ids.shape[1], self.cache, self.device)
        with head_only_at(self.loaded.architecture.head, *places):
            output = self.loaded.model(input_ids=self.ids, **options)
        self.cache = cache_of(output)
        return output.logits[0]

    def follow(self, tokens: Tensor, places: Sequence[int]) -> None:
        """Go on with the rows at ``places``, each followed by its token of ``tokens``, (rows,).

        Only a plain cache of keys and values can give up rows; a model of another kind goes on with all of them.
        """
        if self.padded and len(places) < len(tokens):
            chosen = torch.tensor(places)
            tokens, self.mask = tokens[chosen], self.mask[chosen]
            # On the CPU they select on every device that layers lie on.
            self.cache.batch_select_indices(chosen)
        column = tokens[:, None].to(self.device)
        # A model without a cache reads its texts again from the first token; they are of one length.
        self.ids = torch.cat([self.ids, column], dim=1) if self.cache is None else column
        self.last = [self.ids.shape[1] - 1] * len(tokens)
        self.mask = torch.cat([self.mask, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)


def end_tokens(loaded: LoadedModel) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's, and those that the model's generation settings name."""
    settings = getattr(loaded.model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    many = named if isinstance(named, (list, tuple)) else [named]
    return frozenset(id for id in (loaded.tokens.tokenizer.eos_token_id, *many) if id is not None)
