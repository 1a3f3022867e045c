"""Write docs/benchmarks.md from the results of the benchmarks: ``python -m benchmarks.document``.

Each section is left out while its result file is missing, so the page never shows a figure that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.horizon_page import SECTIONS as HORIZON
from benchmarks.patients import section as patients
from benchmarks.predictors import section as predictors
from benchmarks.proof_page import SECTIONS as PROOF
from benchmarks.real_models import section as real_models
from benchmarks.speed import SECTIONS as SPEED
from benchmarks.stacks import markdown as stacks_markdown

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Everything here was produced by a committed command on a machine with two shared CPU cores; absolute
times are that machine's, ratios are what to look at. `python -m benchmarks.document` writes this page from
`benchmarks/results/`.
"""


def stacks(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the grid of editors and stabilizers."""
    yield from ("## Editors with stabilizers", "")
    yield "The first 200 edits of `sample_edits/stream.jsonl` on the bundled model, batches of 100 (ROME: 1);"
    yield "accuracies at the end, the largest R_n of any edited matrix, and seconds of one core. An empty cell was not"
    yield "measured. `python -m benchmarks.stacks`."
    yield from ("", stacks_markdown(result))


def soak(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the soak of struck commands."""
    yield from ("## Killed and started again", "")
    yield "`python -m benchmarks.soak` strikes every command that writes, on a tiny model: SIGKILL and a full disk at"
    yield "a random write, sync or rename; SIGKILL, SIGTERM and SIGSTOP at a random moment; SIGKILL while a second"
    yield "process wants the same folder. It starts the command again until it is done. Then no edit is lost, no file"
    yield "is left over, and every file that two unbroken commands write alike has the same bytes."
    yield from ("", "```json", json.dumps(result["result"], indent=1), "```", "")


def hostile(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the attack on records."""
    yield from ("## Records from strangers", "")
    yield "`python -m benchmarks.hostile` makes a run of three stacks, an undo in each, and a patch. Each example"
    yield "changes one record: any JSON value at any place, a whole file, a tensor's shape, type or numbers, a"
    yield "journal line or a segment with all hashes made right again, a value in a model's config, tokenizer or"
    yield "weights' header. One command then reads it. It must end with exit code 0, 1 or 3, in one sentence where it"
    yield "is not 0, within a minute and within 1 GB of the memory that the command takes otherwise, and leave no"
    yield "half folder and no temporary file."
    yield from ("", "```json", json.dumps(result["result"], indent=1), "```", "")


def special_files(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what is no file in the place of every file."""
    yield from ("## Files that are none", "")
    yield "`python -m benchmarks.special_files` puts a named pipe, an endless device, a socket, a folder, a sparse"
    yield "file of 12 GB, a link out of the folder and a file without permissions in the place of each file of a"
    yield "model, a run and a patch, and of what a user passes, and runs every command that reads it (`cases`, of"
    yield "which `run` were run). Exit code 0 is a command that does without the file, 2 one that does not take it as"
    yield "the value of an option or as an edits file. Each ends in one sentence, within 1 GB of the memory that it"
    yield "takes otherwise."
    yield from ("", "```json", json.dumps(result["result"], indent=1), "```", "")


SECTIONS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "stacks": stacks,
    "real_models": real_models,
    **HORIZON,
    "patients": patients,
    **PROOF,
    **SPEED,
    "predictors": predictors,
    "soak": soak,
    "hostile": hostile,
    "special_files": special_files,
}


def page(results: Path) -> str:
    """Return the page for the results in a folder."""
    lines = [INTRODUCTION]
    for name, section in SECTIONS.items():
        path = results / f"{name}.json"
        if path.is_file():
            lines += section(json.loads(path.read_text("utf-8")))
    return "\n".join(lines).rstrip() + "\n"


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--out", type=click.Path(path_type=Path), default=PAGE)
def main(results: Path, out: Path) -> None:
    """Write the page."""
    out.write_text(page(results), "utf-8")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
