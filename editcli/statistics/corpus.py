"""Reference text for second moments: a file, a data set, or text that the model writes itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

from editcli.distributed.team import Team
from editcli.errors import StatisticsError
from editcli.models.checkpoint import file_digest
from editcli.models.loading import LoadedModel, bundled_folder

SELF = "self"
_SELF_BATCH, _SELF_LENGTH = 32, 256
PIECE = 1 << 22
"""Most characters of a text that are tokenised at once: a file without line breaks must not exhaust memory."""
MAX_RECORD = 1 << 26
"""Most characters of a JSONL line; whole books are shorter."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """A source of texts: ``identity`` changes whenever the texts do, ``rows`` yields token ids afresh on each call."""

    name: str
    identity: str
    rows: Callable[[], Iterator[list[int]]]


def open_corpus(
    spec: str | None, loaded: LoadedModel, *, max_length: int, seed: int = 0, team: Team | None = None
) -> Corpus:
    """Return the corpus for ``spec``: a text or JSONL file, ``hf:ID[:CONFIG]``, ``self``, or None for the default.

    The default is the bundled reference text for the bundled model, else ``self``, which needs no download; its text
    is written by all of ``team`` together.
    """
    if spec is None:
        bundled = bundled_folder() / "reference.txt"
        spec = str(bundled) if loaded.source.folder == bundled_folder() and bundled.is_file() else SELF
    if spec == SELF:
        length = min(max_length, _SELF_LENGTH)
        return Corpus(SELF, f"self:{seed}:{length}", lambda: _self_rows(loaded, length, seed, team or Team()))
    if spec.startswith("hf:"):
        texts, identity = _dataset_texts(spec), spec
    else:
        path = Path(spec).expanduser()
        if not path.is_file():
            raise StatisticsError(f"there is no corpus file {spec}; pass a text or JSONL file, hf:ID or 'self'")
        texts, identity = _file_texts(path), file_digest(path)
    return Corpus(Path(spec).name, identity, lambda: _tokenised(loaded, texts, max_length))


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
            with path.open(encoding="utf-8") as file:
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


def _self_rows(loaded: LoadedModel, length: int, seed: int, team: Team) -> Iterator[list[int]]:
    """Yield texts that the model samples from itself, at temperature 1, from its own start token.

    Ranks take turns at the batches, each of which has a seed of its own, so the texts do not depend on their number.
    """
    for turn in itertools.count():
        rows = _self_batch(loaded, length, seed, turn * team.parts + team.part)
        for batch in team.gather("reference text", [rows.cpu()]):
            yield from _texts(batch[0], loaded.tokens.tokenizer.eos_token_id)


@torch.no_grad()
def _self_batch(loaded: LoadedModel, length: int, seed: int, batch: int) -> torch.Tensor:
    """Return the token ids of one batch of sampled texts, (rows, tokens)."""
    tokenizer, start = loaded.tokens.tokenizer, loaded.tokens.tokenizer.bos_token_id
    devices = [d for d in {loaded.input_device} if d.type != "cpu"]
    with torch.random.fork_rng(devices=devices, device_type=devices[0].type if devices else "cpu"):
        torch.manual_seed(seed * 1_000_003 + batch)
        if start is None:
            begin = torch.randint(0, min(len(tokenizer), loaded.tokens.rows or len(tokenizer)), (_SELF_BATCH, 1))
        else:
            begin = torch.full((_SELF_BATCH, 1), start)
        return _sample(loaded.model, begin.to(loaded.input_device), length, loaded.tokens.pad_id)


def _texts(rows: torch.Tensor, eos: int | None) -> Iterator[list[int]]:
    """Yield each row up to where its text ends."""
    for row in rows.tolist():
        stop = row.index(eos, 1) if eos in row[1:] else len(row)
        if stop > 1:
            yield row[:stop]


def _sample(model: Any, begin: torch.Tensor, length: int, pad_id: int) -> torch.Tensor:
    return model.generate(
        begin,
        attention_mask=torch.ones_like(begin),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length - 1,
        pad_token_id=pad_id,
    )
