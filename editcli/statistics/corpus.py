"""Reference text for second moments: a file, a data set, or text that the model writes itself."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from editcli.distributed.team import Team
from editcli.errors import StatisticsError
from editcli.models.checkpoint import file_digest
from editcli.models.loading import LoadedModel, bundled_folder

SELF = "self"
_SELF_BATCH, _SELF_LENGTH = 32, 256


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
    for text in texts():
        ids = loaded.tokens.tokenizer(text, verbose=False)["input_ids"]
        for start in range(0, len(ids), max_length):
            piece = ids[start : start + max_length]
            if len(piece) > 1:
                yield piece


def _file_texts(path: Path) -> Callable[[], Iterator[str]]:
    def texts() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _json_text(line, path, number) if path.suffix == ".jsonl" else line.strip()

    return texts


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
            begin = torch.randint(0, len(tokenizer), (_SELF_BATCH, 1))
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
