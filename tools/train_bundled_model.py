"""Make the bundled model from a seed: train it, export it, write the sample edits and the card.

    python -m tools.train_bundled_model --work build/bundled
    python -m tools.train_bundled_model --work build/mixture --out build/mixture --experts 4 --width 384 --layers 6 \
        --people 400 --companies 100 --decay-latest 300 --decay-steps 120

The second command trains a mixture of experts on the same real facts and fewer invented ones.

An interrupted run goes on from its last checkpoint when it is started again with the same folder.
"""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from tools.bundled_model.export import export
from tools.bundled_model.plain import read_grammar
from tools.bundled_model.tokenizer import train_tokenizer
from tools.bundled_model.train import Settings, Trainer
from tools.bundled_model.world import build_world

REPOSITORY = Path(__file__).resolve().parents[1]


DEFAULTS = Settings()


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Folder for checkpoints.")
@click.option("--out", type=click.Path(path_type=Path), default=REPOSITORY, help="Root to write the results under.")
@click.option("--seed", default=DEFAULTS.seed, show_default=True, help="Seed of the weights and of the batches.")
@click.option("--optimizer", type=click.Choice(["muon", "adamw"]), default=DEFAULTS.optimizer, show_default=True)
@click.option("--rate", "hidden_rate", default=DEFAULTS.hidden_rate, show_default=True, help="Rate of the matrices.")
@click.option("--weight-decay", default=DEFAULTS.weight_decay, show_default=True, help="Decay of the weights.")
@click.option("--threads", default=2, show_default=True, help="Processor threads.")
@click.option("--experts", default=0, show_default=True, help="Experts of each MLP, two of which read each token.")
@click.option("--width", default=DEFAULTS.width, show_default=True, help="Width of an MLP, or of each expert.")
@click.option("--layers", default=DEFAULTS.layers, show_default=True, help="Number of layers.")
@click.option("--people", default=1900, show_default=True, help="Number of invented people.")
@click.option("--companies", default=500, show_default=True, help="Number of invented companies.")
@click.option("--decay-latest", default=DEFAULTS.decay_latest, show_default=True, help="Latest start of the decay.")
@click.option("--decay-steps", default=DEFAULTS.decay_steps, show_default=True, help="Steps of the decay.")
@click.option("--steps", type=int, help="Stop after so many steps in all, without exporting.")
@click.option("--export", "export_only", is_flag=True, help="Only export the last checkpoint.")
def main(
    *,
    work: Path,
    out: Path,
    threads: int,
    people: int,
    companies: int,
    steps: int | None,
    export_only: bool,
    **choices: Any,
) -> None:
    """Train the bundled model or a mixture of experts, or go on with it, and export it."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(1)
    work.mkdir(parents=True, exist_ok=True)
    settings = replace(DEFAULTS, **choices)
    world, grammar = build_world(people=people, companies=companies), read_grammar()
    tokenizer = train_tokenizer(world, grammar, size=settings.vocabulary, seed=settings.seed)
    trainer = Trainer(settings, world=world, grammar=grammar, tokenizer=tokenizer, folder=work, threads=threads)
    if (work / "checkpoint.pt").exists():
        trainer.load()
    if not export_only:
        trainer.run(most_steps=steps)
        trainer.save()
    if export_only or trainer.finished():
        export(trainer, out)


if __name__ == "__main__":
    main()
