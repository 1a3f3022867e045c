"""Write docs/benchmarks.md from the results of the benchmarks: ``python -m benchmarks.document``.

Each section is left out while its result file is missing, so the page never shows a figure that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.markdown import table
from benchmarks.speed import SECTIONS as SPEED
from benchmarks.stacks import markdown as stacks_markdown

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"

INTRODUCTION = """# Benchmarks

Everything here was produced by a committed command on a machine with two shared CPU cores and no accelerator; absolute
times are that machine's, ratios are what to look at. `python -m benchmarks.document` writes this page from
`benchmarks/results/`.
"""


READING = """How to read it. Plain MEMIT overwrites what it wrote: at the end the last quarter of its edits is answered,
most of the first is not, and its largest R_n has quadrupled. RLSEdit, the same solve with memory, keeps early
and late edits alike; AlphaEdit keeps the early ones best. NAS slows the growth of R_n and keeps more edits
and neighbours.

What does not come out like the papers: no stack falls below 0.60 efficacy_success within 2,000 edits, so
CP@60 is not reached; success asks only that the new answer beats the old one, exact answers fall to two
thirds. REVIVE does not help here: the edited matrices' spectra are flat (effective rank 126 of 128), so there
is no dominant subspace to protect. Specificity falls for every stack to about a half in exact answers.
Nothing was tuned on this stream.
"""


def stacks(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the grid of editors and stabilizers."""
    yield from ("## Every editor with every stabilizer", "")
    yield "The first 200 edits of `sample_edits/stream.jsonl` on the bundled model, batches of 100 (ROME: 1);"
    yield "accuracies at the end, and the largest R_n of any edited matrix. `python -m benchmarks.stacks`."
    yield from ("", stacks_markdown(result))


def proof(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the long stream."""
    yield from ("## A long stream", "")
    yield f"`editcli bench --edits sample_edits/stream.jsonl -b {result['batch_size']} --every 2`: retained figures on"
    yield "a fixed sample at the end of the stream. CP@60 is the number of edits after which retained efficacy_success"
    yield "first fell below 0.60; early and late are the shares of the first and last quarter's edits answered at last."
    yield ""
    rows = []
    for curve in result["curves"]:
        last, cohorts = curve["points"][-1], curve["cohorts"] or [None]
        figures = [_share(last["figures"].get(name)) for name in ("efficacy_accuracy", "efficacy_success")]
        figures += [_share(last["figures"].get(f"{name}_accuracy")) for name in ("generalization", "specificity")]
        collapse = curve["collapse"] or "-"
        ends = (_share(cohorts[0]), _share(cohorts[-1]))
        rows.append([curve["stack"], last["edits"], *figures, f"{last['ratio']:.2f}", collapse, *ends])
    heading = ("stack", "edits", "efficacy_accuracy", "efficacy_success", "generalization", "specificity")
    yield from table((*heading, "R_n", "CP@60", "early", "late"), rows)
    yield from ("![Curves along the stream](bench.png)", "", READING)


def soak(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the soak of killed streams."""
    yield from ("## Killed and resumed", "")
    yield "`python -m benchmarks.soak` kills streams on the bundled model (memit, alphaedit, rlsedit, each with nas and"
    yield "revive) at random moments and at random writes, syncs and renames, and resumes them until they are done."
    yield from ("", "```json", json.dumps(result["result"], indent=1), "```", "")


SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "stacks": stacks,
    "bench": proof,
    **SPEED,
    "soak": soak,
}


def page(results: Path) -> str:
    """Return the page for the results in a folder."""
    lines = [INTRODUCTION]
    for name, section in SECTIONS.items():
        path = results / f"{name}.json"
        if path.is_file():
            lines += section(json.loads(path.read_text("utf-8")))
    return "\n".join(lines).rstrip() + "\n"


def _share(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


@click.command()
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
@click.option("--out", type=click.Path(path_type=Path), default=PAGE)
def main(results: Path, out: Path) -> None:
    """Write the page."""
    out.write_text(page(results), "utf-8")
    click.echo(f"wrote {out}")


if __name__ == "__main__":
    main()
