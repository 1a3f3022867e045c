"""Tokenise documents and pack them into rows that are ready for the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from tools.bundled_model.text import Document, Plain
from tools.bundled_model.world import Sentence

# What a token's loss counts: names cannot be predicted, answers are what is to be learnt. The full stop of a
# sentence that was cut off is not to be learnt at all.
ANSWER_WEIGHT, NAME_WEIGHT, OTHER_WEIGHT = 1.0, 0.1, 0.3
NO_LIMIT = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens of one sentence: ids, loss weights, and the last position that may look at each token, or no limit."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]
    visible: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row; every array has one entry for each position."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    visible: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int16]
    positions: npt.NDArray[np.int16]


class Encoder:
    """Encode sentences, each once: the tokenizer splits at spaces, so sentences can be joined as tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Keep the tokenizer and start with nothing encoded."""
        self._tokenizer = tokenizer
        self._pieces: dict[tuple[Sentence, bool], Piece] = {}

    def piece(self, part: Sentence | Plain, *, first: bool) -> Piece:
        """Encode one sentence, with a space before it unless it is the first of its document."""
        if isinstance(part, Plain):
            return self._plain(part, first=first)
        key = (part, first)
        if key not in self._pieces:
            self._pieces[key] = self._sentence(part, first=first)
        return self._pieces[key]

    def _plain(self, part: Plain, *, first: bool) -> Piece:
        text = part.text if first else " " + part.text
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        weights = [OTHER_WEIGHT] * len(ids)
        if part.cut:
            weights[-1] = 0.0
        return Piece(tuple(ids), tuple(weights), (NO_LIMIT,) * len(ids))

    def _sentence(self, part: Sentence, *, first: bool) -> Piece:
        shift = 0 if first else 1
        encoded = self._tokenizer(" " * shift + part.text, add_special_tokens=False, return_offsets_mapping=True)
        spans = encoded["offset_mapping"]
        start, end = part.subject_start + shift, part.subject_end + shift
        name = [index for index, (left, right) in enumerate(spans) if left < end and right > start]
        weights = [OTHER_WEIGHT] * len(spans)
        visible = [NO_LIMIT] * len(spans)
        for index in name:
            weights[index] = NAME_WEIGHT
            visible[index] = name[-1]
        visible[name[-1]] = NO_LIMIT
        for index, (_, right) in enumerate(spans):
            if len(part.prompt) + shift < right <= len(part.prompt) + shift + 1 + len(part.answer):
                weights[index] = ANSWER_WEIGHT
        return Piece(tuple(encoded["input_ids"]), tuple(weights), tuple(visible))

    def document(self, document: Document) -> Piece:
        """Encode a document between the begin and the end token."""
        ids, weights, visible = [self._tokenizer.bos_token_id], [0.0], [NO_LIMIT]
        for index, part in enumerate(document):
            piece = self.piece(part, first=index == 0)
            visible += [min(limit + len(ids), NO_LIMIT) for limit in piece.visible]
            ids += piece.ids
            weights += piece.weights
        return Piece((*ids, self._tokenizer.eos_token_id), (*weights, OTHER_WEIGHT), (*visible, NO_LIMIT))


def fill(documents: Iterable[Piece], *, length: int, waiting: int = 64) -> Iterator[list[Piece]]:
    """Fill rows of `length` tokens with whole documents, the longest of those waiting that still fits first."""
    queue: list[Piece] = []
    row: list[Piece] = []
    room = length
    stream = iter(documents)
    while True:
        while len(queue) < waiting and (document := next(stream, None)) is not None:
            if len(document.ids) <= length:
                queue.append(document)
        fitting = [index for index, document in enumerate(queue) if len(document.ids) <= room]
        if fitting:
            # The oldest document goes first into an empty row, so that none waits for ever.
            index = max(fitting, key=lambda at: len(queue[at].ids)) if row else 0
            row.append(queue.pop(index))
            room -= len(row[-1].ids)
            continue
        if not row:
            return
        yield row
        row, room = [], length


def pack(documents: Sequence[Piece], *, length: int, pad: int) -> Row:
    """Lay documents side by side in one row; positions start again with each document."""
    row = Row(
        ids=np.full(length, pad, np.int32),
        weights=np.zeros(length, np.float32),
        visible=np.full(length, NO_LIMIT, np.int32),
        documents=np.full(length, -1, np.int16),
        positions=np.zeros(length, np.int16),
    )
    start = 0
    for number, document in enumerate(documents):
        end = start + len(document.ids)
        row.ids[start:end] = document.ids
        row.weights[start:end] = document.weights
        row.visible[start:end] = np.minimum(np.array(document.visible) + start, NO_LIMIT)
        row.documents[start:end] = number
        row.positions[start:end] = np.arange(end - start)
        start = end
    return row


def attention(rows: Sequence[Row], bottleneck: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return which position may look at which, (rows, 1, length, length); `bottleneck` chooses the rows with it.

    With the bottleneck, what comes after a subject sees only the subject's last token.
    """
    documents = np.stack([row.documents for row in rows])
    visible = np.stack([row.visible for row in rows])
    visible = np.where(bottleneck[:, None], visible, NO_LIMIT)
    at = np.arange(documents.shape[1])
    same = documents[:, :, None] == documents[:, None, :]
    causal = at[:, None] >= at[None, :]
    seen = at[None, :, None] <= visible[:, None, :]
    return (same & causal & seen)[:, None]
