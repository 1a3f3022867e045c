"""Write docs/benchmarks.md from the results of the benchmarks: ``python -m benchmarks.document``.

Each section is left out while its result file is missing, so the page never shows a figure that was not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

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


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(str(cell) for cell in row)} |"
    yield ""


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


def targets(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe target optimisation against the published procedure."""
    found = result["result"]
    yield from ("## Target optimisation", "")
    yield f"Edits per second of the published one-at-a-time procedure and of ours, {found['steps']} steps each, no"
    yield f"early stop, {found['threads']} threads, median of {found['repeats']} interleaved rounds."
    yield from ("`python -m benchmarks.targets`.", "")
    rows = []
    for row in found["rows"]:
        rates = [f"{row['edits_per_second'][how]:.2f}" for how in ("plain", "uncached", "ours")]
        rows.append([row["model"], row["batch"], *rates, f"{row['ratio']:.1f}"])
    yield from table(("model", "batch", "published", "batched, no cache", "ours", "ours / published"), rows)


def solve(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the solve of a batch."""
    found = result["result"]
    yield from ("## One batch's solve", "")
    yield f"{found['edits']} edits, {found['rows']} rows, {found['dtype']}. `python -m benchmarks.solve`."
    yield ""
    rows = [
        [
            row["d_in"],
            f"{row['published']:.3f}",
            f"{row['inverse_gram']:.3f}",
            f"{row['downdate']:.3f}",
            f"{row['published'] / row['inverse_gram']:.0f}",
        ]
        for row in found["rows_"]
    ]
    yield from table(("d_in", "torch.linalg.solve [s]", "inverse Gram [s]", "down-date [s]", "ratio"), rows)


def saving(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe saving."""
    yield from ("## Saving a sharded 2.5 GB model with one edited layer", "")
    yield "`python -m benchmarks.saving`; ours includes reopening and comparing every tensor."
    yield ""
    ways = {"theirs": "load, save_pretrained", "ours": "editcli"}
    rows = [
        [ways[how], f"{run['seconds']:.1f}", f"{run['peak_bytes'] / 1e9:.2f}"] for how, run in result["result"].items()
    ]
    yield from table(("way", "seconds", "peak memory [GB]"), rows)


def stream(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the cost along a stream."""
    found = result["result"]
    seconds = ", ".join(f"{phase} {value:.0f}" for phase, value in found["seconds"].items())
    yield from ("## Cost along a stream", "")
    yield f"{found['edits']:,} edits end to end, no evaluation, seconds: {seconds}. Time per batch in the last quarter"
    yield f"over the first: {found['last_over_first_quarter']:.2f}. Peak memory {found['peak_bytes'] / 1e9:.2f} GB."
    yield from ("`python -m benchmarks.stream`.", "")


def memory(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what safety costs along a stream."""
    found = result["result"]
    first, last = found["resident_bytes_at_500"], found["resident_bytes_at_end"]
    yield from ("## What a safe stream costs", "")
    yield f"2,000 edits in batches of {found['batch_size']}: resident memory {first / 1e9:.3f} GB after 500 edits and"
    yield f"{last / 1e9:.3f} GB after all; time per batch in the last quarter over the first"
    yield f"{found['last_over_first_quarter']:.2f}; snapshots took {found['snapshot_share']:.1%} of the time, journal"
    yield f"and segments {found['journal_share']:.1%}. On disk {found['bytes_per_edit'] / 1e3:.1f} kB per edit here,"
    yield f"{found['llama_3_8b_bytes_per_edit'] / 1e3:.0f} kB computed for a Llama-3-8B with five sites."
    yield from ("`python -m benchmarks.stream_memory`.", "")


def soak(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the soak of killed streams."""
    yield from ("## Killed and resumed", "")
    yield "`python -m benchmarks.soak` kills streams on the bundled model (memit, alphaedit, rlsedit, each with nas and"
    yield "revive) at random moments and at random writes, syncs and renames, and resumes them until they are done."
    yield from ("", "```json", json.dumps(result["result"], indent=1), "```", "")


SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "stacks": stacks,
    "bench": proof,
    "targets": targets,
    "solve": solve,
    "saving": saving,
    "stream": stream,
    "stream_memory": memory,
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
