"""Generate text with a model and measure its fluency and consistency.

Prompts of one token length are generated together, so nothing is padded and the positions of every family are right.
Every prompt has its own random generator, so neither order nor batching changes the texts.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.models.generate import continue_rows
from editcli.models.tokens import Encoded
from editcli.reporting import Reporter, Silent

if TYPE_CHECKING:
    from editcli.models.loading import LoadedModel

TOKENS = 100
"""Tokens generated per prompt."""
TOP_K = 5
"""Sampling among the five most probable tokens, as in ROME's evaluation (arXiv:2202.05262)."""

_WORDS = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True, slots=True)
class Generation:
    """The text that a model generated after a prompt."""

    prompt: str
    text: str


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    tokens: int = TOKENS,
    top_k: int = TOP_K,
    seed: int = 0,
    batch_tokens: int = 8192,
    to_end: bool = False,
    reporter: Reporter | None = None,
    team: Team | None = None,
) -> dict[str, Generation]:
    """Continue each prompt by ``tokens`` tokens, or as many as the context holds; ``top_k=1`` is greedy.

    With ``to_end`` a text stops at the model's end of text; else it continues, as the measure of fluency requires. The
    batches are shared out over ``team``, and every rank gets all texts.
    """
    team = team or Team()
    unique = list(dict.fromkeys(prompts))
    rows = loaded.tokens.encode([loaded.tokens.open_prompt(prompt) for prompt in unique])
    batches = list(_same_length(rows, max(1, batch_tokens // (tokens + 1))))
    # Share whole batches: sampling depends on low-order bits of the logits, which depend on batch composition.
    assigned = [batches[number] for number in team.share([len(batch) for batch in batches])]
    written: dict[str, Generation] = {}
    end = loaded.tokens.tokenizer.eos_token_id
    with (reporter or Silent()).phase("Generating", sum(map(len, assigned)), "texts") as advance:
        for batch in assigned:
            names = [unique[index] for index in batch]
            sources = [_generator(prompt, seed) for prompt in names]
            count = min(tokens, (loaded.tokens.max_length or math.inf) - len(rows[batch[0]].ids))
            begin = torch.tensor([rows[index].ids for index in batch])
            ids = continue_rows(loaded, begin, partial(_sample, sources=sources, top_k=top_k), count=int(count))
            for prompt, row in zip(names, ids.tolist(), strict=True):
                text = list(takewhile(lambda token: token != end, row)) if to_end else row
                written[prompt] = Generation(prompt, loaded.tokens.decode(text))
            advance(len(batch))
    return written if team.parts == 1 else _of_all(written, [unique[i] for b in batches for i in b], team)


def _of_all(written: Mapping[str, Generation], order: Sequence[str], team: Team) -> dict[str, Generation]:
    """Return the texts of all ranks, in the order of a single process."""
    texts: dict[str, str] = {}
    for part in team.exchange("texts", {prompt: generation.text for prompt, generation in written.items()}):
        texts |= part
    return {prompt: Generation(prompt, texts[prompt]) for prompt in order}


def fluency(texts: Mapping[str, Sequence[str]]) -> float | None:
    """Return the mean entropy of all texts that have any (bits); None without texts."""
    values = [value for group in texts.values() for text in group if (value := text_entropy(text)) is not None]
    return fmean(values) if values else None


def text_entropy(text: str) -> float | None:
    """Return the mean of the words' bigram and trigram entropies, weighted 2/3 and 4/3 (bits); None below 3 words."""
    words = _WORDS.findall(text)
    if len(words) < 3:
        return None
    return (ngram_entropy(words, 2) * 2 / 3 + ngram_entropy(words, 3) * 4 / 3) / 2


def ngram_entropy(items: Sequence[Hashable], length: int) -> float:
    """Return the entropy of the distribution of n-grams of ``items``, in bits."""
    counts = Counter(tuple(items[i : i + length]) for i in range(len(items) - length + 1))
    total = sum(counts.values())
    return -sum(count / total * math.log2(count / total) for count in counts.values())


def consistency(texts: Mapping[str, Sequence[str]], references: Mapping[str, Sequence[str]]) -> float | None:
    """Return the mean TF-IDF cosine between an edit's texts and its references; None where there are no references.

    Document frequencies are counted over all reference texts; weights are (1 + ln((1 + n) / (1 + df))) per occurrence.
    """
    documents = [_terms(text) for group in references.values() for text in group]
    spread = Counter(term for document in documents for term in document)
    weights = {term: 1 + math.log((1 + len(documents)) / (1 + count)) for term, count in spread.items()}
    pairs = [(texts[key], group) for key, group in references.items() if group and texts.get(key)]
    return fmean(_cosine(_terms(*a), _terms(*b), weights) for a, b in pairs) if pairs else None


def _terms(*texts: str) -> Counter[str]:
    return Counter(word.lower() for text in texts for word in _WORDS.findall(text) if len(word) > 1)


def _cosine(left: Mapping[str, int], right: Mapping[str, int], weights: Mapping[str, float]) -> float:
    # Words that no reference contains have no weight, as in a vocabulary learnt from the references.
    a = {term: count * weights[term] for term, count in left.items() if term in weights}
    b = {term: count * weights[term] for term, count in right.items() if term in weights}
    norms = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(value * b[term] for term, value in a.items() if term in b) / norms if norms else 0.0


def _same_length(rows: Sequence[Encoded], size: int) -> Iterator[list[int]]:
    groups: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(len(row.ids), []).append(index)
    for _, group in sorted(groups.items()):
        yield from (group[start : start + size] for start in range(0, len(group), size))


def _generator(prompt: str, seed: int) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _sample(logits: Tensor, *, sources: Sequence[torch.Generator], top_k: int) -> Tensor:
    """Sample one of each row's ``top_k`` most probable tokens, (n,): the largest after adding Gumbel noise."""
    best, tokens = logits.float().cpu().topk(min(top_k, logits.shape[1]), dim=1)
    noise = torch.stack([torch.rand(best.shape[1], generator=source) for source in sources])
    return tokens.gather(1, (best - noise.clamp_min(1e-20).log().neg().log()).argmax(1, keepdim=True))[:, 0]
