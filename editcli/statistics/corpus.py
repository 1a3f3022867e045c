"""Reference text for second moments: the text of the package, a file, a data set, or text that the model writes."""

from __future__ import annotations

import importlib.resources
import io
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import IO, TextIO, cast

import torch

from editcli.distributed.team import Team
from editcli.errors import StatisticsError
from editcli.models.generate import continue_rows
from editcli.models.loading import LoadedModel, bundled_folder
from editcli.reporting import Reporter, Silent
from editcli.storage.checkpoint import file_digest
from editcli.storage.opening import CORPUS, is_there, open_regular

ENGLISH, SELF = "english", "self"
_SELF_BATCH, _SELF_LENGTH = 32, 256
PIECE = 1 << 22
"""Most characters of a text that are tokenised at once: a file without line breaks must not exhaust memory."""
MAX_RECORD = 1 << 26
"""Most characters of a JSONL line; whole books are shorter."""


@dataclass(frozen=True)
class Corpus:
    """A source of texts: ``identity`` changes whenever the texts do, ``rows`` yields token ids afresh on each call."""

    name: str
    identity: str
    rows: Callable[[], Iterator[list[int]]]
    more: Corpus | None = None
    """What is read once these texts have ended."""

    @cached_property
    def length(self) -> int:
        """Return the number of tokens of these texts, without :attr:`more`."""
        return sum(map(len, self.rows()))

    def parts(self, tokens: int) -> tuple[Corpus, ...]:
        """Return what is read for ``tokens`` tokens, in this order; text that is not needed leaves no trace."""
        enough = self.more is None or self.length >= tokens
        return (self,) if enough or self.more is None else (self, *self.more.parts(tokens - self.length))

    def identity_of(self, tokens: int) -> str:
        """Return what the first ``tokens`` tokens depend on."""
        return "+".join(part.identity for part in self.parts(tokens))

    def read(self, tokens: int) -> Iterator[list[int]]:
        """Yield the rows that hold the first ``tokens`` tokens, and more where the last row is longer."""
        return itertools.chain.from_iterable(part.rows() for part in self.parts(tokens))


def open_corpus(
    spec: str | None,
    loaded: LoadedModel,
    *,
    max_length: int,
    seed: int = 0,
    team: Team | None = None,
    reporter: Reporter | None = None,
) -> Corpus:
    """Return the corpus for ``spec``: a file, ``hf:ID[:CONFIG]``, ``english``, ``self``, or None for the default.

    The default is the bundled model's reference text for the bundled model, else ``english``, the prose that ships with
    the package; where a key is wider than that serves, the model writes the rest. Text of the model (``self``) is
    written by all of ``team`` together.
    """
    if spec is None:
        bundled = bundled_folder() / "reference.txt"
        spec = str(bundled) if loaded.source.folder == bundled_folder() and bundled.is_file() else ENGLISH
    if spec in (ENGLISH, SELF):
        length = min(max_length, _SELF_LENGTH)
        writer = _Writer(loaded, length, seed, team or Team(), reporter or Silent())
        own = Corpus(SELF, f"{SELF}:{seed}:{length}", writer.rows)
        return own if spec == SELF else replace(_file_corpus(english_file(), loaded, max_length, ENGLISH), more=own)
    if spec.startswith("hf:"):
        texts = _dataset_texts(spec)
        return Corpus(Path(spec).name, spec, lambda: _tokenised(loaded, texts, max_length))
    path = Path(spec).expanduser()
    if not is_there(path):
        raise StatisticsError(
            f"there is no corpus file {spec}; pass a text or JSONL file, hf:ID, '{ENGLISH}' or '{SELF}'"
        )
    return _file_corpus(path, loaded, max_length, path.name)


def english_file() -> Path:
    """Return the reference text that ships with the package: English prose, one paragraph a line."""
    path = Path(str(importlib.resources.files("editcli") / "corpora" / "english.txt"))
    if not path.is_file():
        raise StatisticsError(f"{path} is missing; install editcli again, or pass a text as --corpus")
    return path


def _file_corpus(path: Path, loaded: LoadedModel, max_length: int, name: str) -> Corpus:
    texts = _file_texts(path)
    return Corpus(name, file_digest(path, CORPUS), lambda: _tokenised(loaded, texts, max_length))


def _tokenised(loaded: LoadedModel, texts: Callable[[], Iterator[str]], max_length: int) -> Iterator[list[int]]:
    for text in itertools.chain.from_iterable(map(_pieces, texts())):
        ids = loaded.tokens.tokenizer(text, verbose=False)["input_ids"]
        loaded.tokens.refuse_rowless(ids)
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:
                yield piece


def _file_texts(path: Path) -> Callable[[], Iterator[str]]:
    def texts() -> Iterator[str]:
        try:
            with io.TextIOWrapper(cast(IO[bytes], open_regular(path, CORPUS)), encoding="utf-8") as file:
                yield from _record_texts(file, path) if path.suffix == ".jsonl" else _line_texts(file)
        except UnicodeDecodeError as error:
            raise StatisticsError(f"the corpus {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error

    return texts


def _line_texts(file: TextIO) -> Iterator[str]:
    """Yield the lines that are not blank; one that would fill the memory comes in pieces."""
    rest = ""
    while read := file.readline(PIECE):
        *whole, rest = _pieces(rest + read)
        if read.endswith("\n"):
            whole, rest = [*whole, rest], ""
        yield from (text.strip() for text in whole if text.strip())
    if rest.strip():
        yield rest.strip()


def _record_texts(file: TextIO, path: Path) -> Iterator[str]:
    """Yield the text of each line's JSON; a line that would fill the memory cannot be read in pieces."""
    for number in itertools.count(1):
        line = file.readline(MAX_RECORD + 1)
        if not line:
            return
        if len(line) > MAX_RECORD and not line.endswith("\n"):
            raise StatisticsError(
                f"{path}:{number}: the line is longer than {MAX_RECORD:,} characters; split its text over several lines"
            )
        if line.strip():
            yield _json_text(line, path, number)


def _pieces(text: str) -> Iterator[str]:
    """Yield a text in pieces of at most :data:`PIECE` characters, cut in front of a space where there is one."""
    while len(text) > PIECE:
        end = text.rfind(" ", 1, PIECE)
        end = end if end > 0 else PIECE
        yield text[:end]
        text = text[end:]
    yield text


def _json_text(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise StatisticsError(f"{path}:{number}: not valid JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else record
    if not isinstance(text, str):
        raise StatisticsError(f"{path}:{number}: a corpus line needs a text, plain or in the field 'text'")
    return text


def _dataset_texts(spec: str) -> Callable[[], Iterator[str]]:
    _, name, *config = spec.split(":")
    try:
        from datasets import load_dataset  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise StatisticsError(f"{spec} needs the 'datasets' package: pip install datasets") from error

    def texts() -> Iterator[str]:
        for record in load_dataset(name, *config, split="train", streaming=True):
            yield record["text"]

    return texts


class _Writer:
    """Has a model write texts of up to ``length`` tokens, at temperature 1, from its own start token."""

    def __init__(self, loaded: LoadedModel, length: int, seed: int, team: Team, reporter: Reporter):
        self.loaded, self.length, self.seed, self.team, self.reporter = loaded, length, seed, team, reporter

    def rows(self) -> Iterator[list[int]]:
        """Yield texts without end.

        Ranks take turns at the batches, each of which has a seed of its own, so the texts do not depend on their
        number.
        """
        for turn in itertools.count():
            rows = self._batch(turn * self.team.parts + self.team.part)
            for batch in self.team.gather("reference text", [rows]):
                yield from _texts(batch[0], self.loaded.tokens.tokenizer.eos_token_id)

    def _batch(self, number: int) -> torch.Tensor:
        """Return the token ids of one batch of texts, (rows, tokens) on the CPU."""
        tokenizer, device = self.loaded.tokens.tokenizer, self.loaded.input_device
        start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
        generator = torch.Generator(device).manual_seed(self.seed * 1_000_003 + number)
        begin = torch.full((_SELF_BATCH, 1), start or 0, device=device)
        if start is None:
            known = min(len(tokenizer), self.loaded.tokens.rows or len(tokenizer))
            begin = torch.randint(0, known, begin.shape, generator=generator, device=device)
        count = self.length - 1
        with self.reporter.phase("Writing reference text", _SELF_BATCH * count, "tokens") as advance:

            def choose(logits: torch.Tensor) -> torch.Tensor:
                advance(len(logits))
                # The head of a model on several devices may compute on another one than the generator is on.
                shares = torch.softmax(logits.to(device, torch.float32), dim=1)
                return torch.multinomial(shares, 1, generator=generator)[:, 0]

            written = continue_rows(self.loaded, begin, choose, count=count, end=end)
        return torch.cat([begin.cpu(), written], dim=1)


def _texts(rows: torch.Tensor, eos: int | None) -> Iterator[list[int]]:
    """Yield each row up to where its text ends."""
    for row in rows.tolist():
        stop = row.index(eos, 1) if eos in row[1:] else len(row)
        if stop > 1:
            yield row[:stop]
