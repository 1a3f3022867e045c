"""Locate a fact in a tokenised text: the subject's last token and the target's tokens, by offset mapping.

The whole text is tokenised once. Nothing is tokenised in parts, because BPE merges across the border and special tokens
would be counted twice; nothing depends on the tokenizer's padding side, because rows are padded here.

Whether a space separates a prompt from its target is decided by the properties of the two characters that meet, not by
language: the line breaking classes of Unicode Standard Annex #14 say which scripts are written without spaces, and
which marks attach to the word before or after.
"""

from __future__ import annotations

import copy
import itertools
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import regex
import torch
from torch import Tensor

from editcli.errors import ModelError, RequestError
from editcli.models.chat import Conversation, TemplateError
from editcli.models.chat_settings import ChatSettings
from editcli.models.hub import first_line
from editcli.models.sizes import text_size
from editcli.requests.schema import EditRequest

_UNSPACED = regex.compile(
    r"(?V1)[[\p{lb=ID}\p{lb=CJ}\p{lb=NS}\p{lb=SA}\p{lb=AK}\p{lb=AP}\p{lb=AS}\p{lb=VF}\p{lb=VI}]"
    r"--\p{Extended_Pictographic}]"
)
"""Ideographs and kana, and the scripts whose words only a dictionary can tell apart (Thai, Lao, Khmer, ...)."""
_STICKS_TO_THE_LEFT = regex.compile(
    r"[\p{lb=CL}\p{lb=CP}\p{lb=EX}\p{lb=IS}\p{lb=SY}\p{lb=CM}\p{lb=ZWJ}\p{lb=WJ}\p{lb=GL}\p{lb=BA}\p{lb=PO}\p{lb=IN}]"
)
"""Closing and separating marks, and what is written behind a number."""
_STICKS_TO_THE_RIGHT = regex.compile(
    r"(?V1)[[\p{lb=OP}\p{lb=SY}\p{lb=WJ}\p{lb=GL}\p{lb=BA}\p{lb=BB}\p{Sc}\p{Pc}#@]--\p{Sentence_Terminal}]"
)
"""Opening marks, marks within a word, and what is written in front of a number or a name."""
_STRAIGHT = "\"'"
_APOSTROPHES = "'\u2019"


def wants_space(prompt: str, target: str) -> bool:
    """Tell whether a space belongs between ``prompt`` and ``target``: both are words of a script that uses spaces."""
    if not prompt or not target or prompt[-1].isspace() or target[0].isspace():
        return False
    return _ends_a_word(prompt) and _begins_a_word(target, prompt)


def _begins_a_word(target: str, prompt: str) -> bool:
    first, rest = target[0], target[1:]
    if _UNSPACED.match(first):
        return False
    if unicodedata.category(first) == "Pd":
        number = rest[:1].isnumeric() and not prompt[-1].isnumeric()
        return number or rest[:1].isspace()
    if first in _STRAIGHT:
        # A mark that comes again opens a quotation; one alone closes what the prompt opened, or is an apostrophe.
        return first in rest and prompt.count(first) % 2 == 0
    if unicodedata.category(first) in ("Pi", "Pf"):
        return unicodedata.category(first) == "Pi"
    return not _STICKS_TO_THE_LEFT.match(first)


def _ends_a_word(prompt: str) -> bool:
    last, before = prompt[-1], prompt[:-1]
    kind = unicodedata.category(last)
    if _UNSPACED.match(last) or (kind.startswith("P") and unicodedata.east_asian_width(last) in "WF"):
        return False
    if kind in ("Pd", "Sm"):
        # Standing free they separate words; attached they join them, or close a tag.
        return before[-1:].isspace()
    if last in _APOSTROPHES and before[-1:].isalpha():
        # An elided article is written together with its noun; the plural's genitive ends a word.
        return before[-1] == "s" and before[-2:-1].isalpha()
    if last in _STRAIGHT:
        return prompt.count(last) % 2 == 0 and _is_spaced(before)
    if kind == "Pi" or _STICKS_TO_THE_RIGHT.match(last):
        return False
    return _is_spaced(prompt)


def _is_spaced(text: str) -> bool:
    """Tell whether the last letter of a text, if there is one, is of a script that separates words by spaces."""
    letter = next((character for character in reversed(text) if character.isalpha()), None)
    return letter is None or not _UNSPACED.match(letter)


@contextmanager
def panics_refused() -> Iterator[None]:
    """Raise :class:`ModelError` where a tokenizer panics over the content of its files.

    The tokenizers library is written in Rust, and its panics are no Exception in Python.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        reason = first_line(error)
        raise ModelError(f"the tokenizer cannot be used ({reason}); take its files from the model's source") from error


LONGEST = 4
"""Bytes of a character, and so tokens that it may take, at the most."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One tokenised text."""

    ids: tuple[int, ...]
    lookup: int
    """Position of the last token that overlaps the subject; -1 where the text has no subject."""
    target: range
    """Positions of the target's tokens; empty where the text has no target."""
    target_ids: tuple[int, ...] = ()
    """The target's token ids."""

    @property
    def predicting(self) -> range:
        """Positions whose next token is a target token."""
        return range(self.target.start - 1, self.target.stop - 1)

    def up_to_lookup(self) -> Encoded:
        """Return the text cut after the lookup token: a causal model cannot see further anyway."""
        return Encoded(self.ids[: self.lookup + 1], self.lookup, range(0))

    def without_last(self) -> Encoded:
        """Return the text without its last token, which predicts nothing that is asked for."""
        return replace(self, ids=self.ids[:-1])


@dataclass(frozen=True, slots=True)
class Text:
    """A text with the character spans that matter in it."""

    text: str
    subject: tuple[int, int] | None
    target: tuple[int, int] | None
    joint: int = 0
    """Characters between prompt and target: a model that is asked the prompt has to say them too."""


class RowlessTokenError(ModelError):
    """A text has a token that the model's embedding has no row for."""


class Tokens:
    """A fast tokenizer with the conventions that editing needs."""

    def __init__(self, tokenizer: Any, *, max_length: int | None = None, chat_template: bool | ChatSettings = False):
        """Take a tokenizer; ``chat_template`` puts every prompt into its template, with settings of its own if given.

        Raises :class:`ModelError` for a slow tokenizer or a template that is not there.
        """
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                "this model has no fast tokenizer, so the subject cannot be located by character offsets; "
                "add a tokenizer.json to its folder (AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained)"
            )
        self.tokenizer, self.max_length, self.chat_template = tokenizer, max_length, bool(chat_template)
        settings = chat_template if isinstance(chat_template, ChatSettings) else ChatSettings()
        self.conversation = Conversation(tokenizer, settings) if chat_template else None
        self.rows: int | None = None
        """Rows of the model's embedding; None where no model is known. A tokenizer may have more tokens than that."""

    @property
    def pad_id(self) -> int:
        """A token that can stand where nothing does."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((id for id in known if id is not None and self._has_row(id)), 0)

    def of_model(self, model: Any) -> Tokens:
        """Return these conventions for a model, or its skeleton: tokens without a row in its embedding are refused."""
        bound = copy.copy(self)
        bound.rows = int(model.get_input_embeddings().weight.shape[0])
        return bound

    def refuse_rowless(self, ids: Iterable[int]) -> None:
        """Raise :class:`RowlessTokenError` for a token id that the embedding has no row for."""
        lost = next((id for id in ids if not self._has_row(id)), None)
        if lost is not None and self.rows is not None:
            token = self.tokenizer.convert_ids_to_tokens(lost)
            raise RowlessTokenError(
                f"the token {token!r} ({lost}) has no row in the model's embedding, which ends at {self.rows - 1}; "
                "use the tokenizer that belongs to the model"
            )

    def locate(self, request: EditRequest, target: str | None = None) -> Text:
        """Return the text of ``request`` followed by ``target``, with both spans; raise :class:`RequestError`."""
        span = (request.subject_end - len(request.subject), request.subject_end)
        try:
            prompt = self._render(request.prompt)
            subject = None
            if request.has_subject:
                subject = self.conversation.find(prompt, request.prompt, span) if self.conversation else span
        except TemplateError as error:
            raise request.refusal(str(error)) from error
        if target is None:
            return Text(prompt, subject, None)
        text, start = self.join(prompt, target, between=request.join)
        return Text(text, subject, (start, len(text)), start - len(prompt))

    def open_prompt(self, prompt: str) -> Text:
        """Return a plain prompt as the model is given it; raise :class:`RequestError` when its template refuses it."""
        try:
            return Text(self._render(prompt), None, None)
        except TemplateError as error:
            raise RequestError(f"{prompt!r}: {error}") from error

    def continue_with(self, prompt: str, target: str, *, between: str | None = None) -> Text:
        """Return a plain prompt followed by ``target``, with the target's span."""
        prompt = self.open_prompt(prompt).text
        text, start = self.join(prompt, target, between=between)
        return Text(text, None, (start, len(text)), start - len(prompt))

    def join(self, prompt: str, target: str, *, between: str | None = None) -> tuple[str, int]:
        """Write ``target`` after ``prompt``; return the text and the offset where the target starts.

        ``between`` decides where it is given, and both texts then stay as they are. Else one space goes between them
        where the target begins with one or both are words of a script that separates words by spaces; none where the
        prompt ends in white space, a chat template was rendered, or the tokenizer's round trip shows that it does not
        keep such a space (its convention is to write none). Spaces around the target are no part of it; other white
        space is.
        """
        if between is not None:
            return prompt + between + target, len(prompt) + len(between)
        bare = target.strip(" ")
        asked = target.startswith(" ") or wants_space(prompt, bare)
        if self.chat_template or prompt[-1:].isspace() or not asked:
            return prompt + bare, len(prompt)
        spaced = f"{prompt} {bare}"
        if self._round_trip(spaced) == prompt + bare:
            return prompt + bare, len(prompt)
        return spaced, len(prompt) + 1

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Tokenise texts and turn their character spans into token positions.

        Raises :class:`RowlessTokenError` for a token that the model cannot read.
        """
        if not texts:
            return []
        with panics_refused():
            batch = self.tokenizer(
                [text.text for text in texts],
                return_offsets_mapping=True,
                add_special_tokens=not self.chat_template,
                truncation=False,
                padding=False,
                # A text longer than the tokenizer's model_max_length is refused by check(); its own warning says less.
                verbose=False,
            )
        self.refuse_rowless(itertools.chain.from_iterable(batch["input_ids"]))
        rows = zip(texts, batch["input_ids"], batch["offset_mapping"], strict=True)
        return [_place(text, ids, offsets) for text, ids, offsets in rows]

    def ended(self, text: Encoded) -> Encoded:
        """Return ``text`` with the end of text behind its target, as the target's last token; nothing follows it.

        The text stays as it is where the tokenizer has no such token or the target ends with it already.
        """
        end = self.tokenizer.eos_token_id
        if end is None or not self._has_row(end) or text.target_ids[-1:] == (end,):
            return text
        start, stop = text.target.start, text.target.stop
        return Encoded((*text.ids[:stop], end), text.lookup, range(start, stop + 1), (*text.target_ids, end))

    def check(self, request: EditRequest) -> Encoded:
        """Tokenise a request with its target; raise :class:`RequestError` when it cannot be edited."""
        try:
            (encoded,) = self.encode([self.locate(request, request.target_new)])
        except RowlessTokenError as error:
            raise request.refusal(str(error)) from error
        if request.has_subject and encoded.lookup < 0:
            raise request.refusal(f"the subject {request.subject!r} has no token of its own in this tokenizer")
        if not encoded.target:
            raise request.refusal(f"the target {request.target_new!r} is empty after tokenisation")
        if request.has_subject and encoded.target.start <= encoded.lookup:
            raise request.refusal("the target shares a token with the subject; put some text between them")
        self._refuse_unknown(request, encoded)
        if encoded.target.start < 1:
            raise request.refusal("the target has no token before it to be predicted from")
        if self.max_length is not None and len(encoded.ids) > self.max_length:
            raise request.refusal(
                f"prompt and target have {len(encoded.ids)} tokens, more than the model's context of {self.max_length}"
            )
        return encoded

    def pad(self, rows: Sequence[Encoded], device: torch.device | str) -> Tensor:
        """Pad token ids on the right to one (rows, length) tensor.

        With a causal model, what follows a token cannot change it, so no attention mask is needed, and a row's own last
        token does for padding. An accelerator gets few lengths.
        """
        length = max(len(row.ids) for row in rows)
        if torch.device(device).type != "cpu":
            size = text_size(length)
            length = size if self.max_length is None else max(length, min(size, self.max_length))
        padded = [[*row.ids, *[row.ids[-1]] * (length - len(row.ids))] for row in rows]
        return torch.tensor(padded, device=device)

    def characters(self, ids: Sequence[int]) -> tuple[str, ...]:
        """Return the texts of tokens; those that are only together whole characters are one text.

        A byte-level tokenizer may cut a character into several tokens.
        """
        texts, begun = [], 0
        for stop in range(1, len(ids) + 1):
            text = self.tokenizer.decode(list(ids[begun:stop]), clean_up_tokenization_spaces=False)
            if "\ufffd" not in text or stop == len(ids):
                texts.append(text)
                begun = stop
        return tuple(texts)

    def character_at(self, encoded: Encoded, position: int) -> str:
        """Return the text of a token, together with the tokens before it that its first character began in."""
        for start in range(position, max(position - LONGEST, -1), -1):
            text = self.decode(encoded.ids[start : position + 1])
            if "\ufffd" not in text:
                return text
        return self.decode([encoded.ids[position]])

    def ids(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token ids of a text, with the tokenizer's ``special`` ones or without.

        Raises :class:`RowlessTokenError` for a token that the model cannot read.
        """
        with panics_refused():
            ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        self.refuse_rowless(ids)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens."""
        with panics_refused():
            return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _has_row(self, id: int) -> bool:
        return self.rows is None or id < self.rows

    def _round_trip(self, text: str) -> str:
        with panics_refused():
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.decode(ids)

    def _refuse_unknown(self, request: EditRequest, encoded: Encoded) -> None:
        """Raise where the tokenizer reads subject or target as its mark for text that it does not know."""
        unknown, mark = self.tokenizer.unk_token_id, self.tokenizer.unk_token
        if unknown is None:
            return
        if unknown in encoded.target_ids and mark not in request.target_new:
            raise request.refusal(
                f"this tokenizer has no token for a part of the target {request.target_new!r}; the model could only "
                f"say {mark}"
            )
        if request.has_subject and encoded.ids[encoded.lookup] == unknown and mark not in request.subject:
            raise request.refusal(
                f"this tokenizer has no token for the end of the subject {request.subject!r}; {mark} there stands for "
                "any text that it does not know"
            )

    def _render(self, prompt: str) -> str:
        """Put the prompt into the chat template when asked to."""
        return prompt if self.conversation is None else self.conversation.render(prompt)


def _place(text: Text, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Encoded:
    subject = _overlapping(offsets, text.subject)
    target = _overlapping(offsets, text.target)
    if target and text.target is not None:
        # Some tokenizers give the space in front of a number or a rare capital a token of its own.
        target = _overlapping(offsets, (text.target[0] - text.joint, text.target[1]))
    span = range(target[0], target[-1] + 1) if target else range(0)
    return Encoded(tuple(ids), subject[-1] if subject else -1, span, tuple(ids[span.start : span.stop]))


def _overlapping(offsets: Sequence[tuple[int, int]], span: tuple[int, int] | None) -> list[int]:
    if span is None:
        return []
    start, stop = span
    # Special tokens have an empty span of characters and never overlap anything.
    return [i for i, (first, last) in enumerate(offsets) if first < last and first < stop and last > start]
