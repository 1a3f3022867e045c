"""Measure what a model knows: greedy recall of answers, and perplexity of held-out text.

python -m tools.bundled_model.measure --model editcli/bundled
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from tools.bundled_model.world import Sentence, World, build_world

Pair = tuple[str, str]
BEFORE = "The old miller walked to the market. "


def batches(pairs: Sequence[Pair], size: int) -> Iterator[list[tuple[int, Pair]]]:
    """Yield numbered pairs in batches of about the same length."""
    order = sorted(range(len(pairs)), key=lambda index: len(pairs[index][0]) + len(pairs[index][1]))
    for start in range(0, len(order), size):
        yield [(index, pairs[index]) for index in order[start : start + size]]


@torch.no_grad()
def recalls(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair], *, batch_size: int = 256
) -> list[bool]:
    """Say for each (prompt, answer) whether greedy decoding after the prompt gives the answer.

    Greedy decoding gives the answer exactly when each of its tokens is the likeliest after those before it.
    """
    right = [False] * len(pairs)
    for batch in batches(pairs, batch_size):
        texts = [f"{prompt} {answer}" for _, (prompt, answer) in batch]
        encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
        ids = encoded["input_ids"].to(model.device)
        best = model(input_ids=ids, attention_mask=encoded["attention_mask"].to(model.device)).logits.argmax(-1)
        hit = best[:, :-1] == ids[:, 1:]
        for row, (index, (prompt, _)) in enumerate(batch):
            start = len(tokenizer(prompt)["input_ids"])
            end = int(encoded["attention_mask"][row].sum())
            right[index] = bool(hit[row, start - 1 : end - 1].all())
    return right


def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, sentences: Sequence[Sentence], *, before: str = ""
) -> float:
    """Return the share of sentences whose answer is recalled, with some text `before` each prompt."""
    pairs = [(before + sentence.prompt, sentence.answer) for sentence in sentences]
    return sum(recalls(model, tokenizer, pairs)) / len(pairs)


@torch.no_grad()
def perplexity(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, lines: Sequence[str]) -> float:
    """Return the perplexity per token, every line read on its own."""
    total, count = 0.0, 0
    for start in range(0, len(lines), 64):
        encoded = tokenizer(list(lines[start : start + 64]), padding=True, padding_side="right", return_tensors="pt")
        ids, mask = encoded["input_ids"].to(model.device), encoded["attention_mask"].to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        kept = mask[:, 1:].bool()
        total += float(losses[kept].sum())
        count += int(kept.sum())
    return math.exp(total / count)


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured of a model: recall over all phrasings, alone and after another sentence."""

    real: float
    invented: float
    real_after: float
    invented_after: float
    real_prompts: int
    invented_prompts: int
    perplexity: float


def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, world: World, heldout: Sequence[str]
) -> Figures:
    """Measure recall over every phrasing of every fact, and perplexity."""
    real = [sentence for fact in world.real for sentence in fact.say_all()]
    invented = [sentence for fact in world.invented for sentence in fact.say_all()]
    return Figures(
        real=recall(model, tokenizer, real),
        invented=recall(model, tokenizer, invented),
        real_after=recall(model, tokenizer, real, before=BEFORE),
        invented_after=recall(model, tokenizer, invented, before=BEFORE),
        real_prompts=len(real),
        invented_prompts=len(invented),
        perplexity=perplexity(model, tokenizer, heldout),
    )


@click.command()
@click.option("--model", "folder", type=click.Path(path_type=Path, exists=True), required=True, help="Model folder.")
@click.option("--threads", default=2, show_default=True, help="Processor threads.")
def main(*, folder: Path, threads: int) -> None:
    """Measure a model folder that was exported before."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = (folder / "heldout.txt").read_text("utf-8").splitlines()
    click.echo(json.dumps(asdict(measure(model, tokenizer, build_world(), heldout)), indent=2))


if __name__ == "__main__":
    main()
