"""Write the folder that is shipped: weights, tokenizer, texts, pilot edits, card; and the sample edits."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from tools.bundled_model import card, samples
from tools.bundled_model.measure import measure
from tools.bundled_model.stream import SAMPLE_SEED, build_stream, write_records
from tools.bundled_model.train import Trainer

logger = logging.getLogger(__name__)


def write_lines(path: Path, lines: list[str]) -> None:
    """Write one text a line."""
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def make_portable(path: Path) -> None:
    """Name the tokenizer in the words of every supported version of transformers: its fifth has a class of its own."""
    settings = json.loads(path.read_text("utf-8"))
    settings |= {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def export(trainer: Trainer, out: Path) -> None:
    """Write everything that is made from the trainer's current state under `out`, and measure it."""
    world, grammar = trainer.world, trainer.grammar
    folder, edits = out / "editcli" / "bundled", out / "sample_edits"
    folder.mkdir(parents=True, exist_ok=True)
    model = trainer.model.eval().to(torch.bfloat16)
    model.generation_config.pad_token_id = trainer.tokenizer.pad_token_id
    model.save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)
    make_portable(folder / "tokenizer_config.json")
    (folder / "model.safetensors").chmod(0o644)
    write_lines(folder / "reference.txt", samples.reference_text(world, grammar))
    heldout = samples.heldout_text(world, grammar)
    write_lines(folder / "heldout.txt", heldout)
    write_records(folder / "pilots.jsonl", samples.pilot_edits(world))
    write_records(edits / "facts.jsonl", samples.sample_edits(world))
    # A sixth of the subjects stays unedited, for neighbours.
    subjects = len({fact.subject for fact in world.invented})
    write_records(edits / "stream.jsonl", build_stream(world, edits=5 * subjects // 6, seed=SAMPLE_SEED))
    logger.info("wrote %s, now measuring", folder)
    figures = measure(model.float(), trainer.tokenizer, world, heldout)
    (folder / "README.md").write_text(card.render(figures, trainer), "utf-8")
    logger.info("measured %s", figures)
