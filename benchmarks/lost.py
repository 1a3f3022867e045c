"""Which edits of a stream are lost, and what tells them from the others: ``python -m benchmarks.lost BENCH``.

BENCH is the folder of an ``editcli bench`` or of a horizon that came to its end. An edit is lost when the model that a
run ended with does not answer it. Every figure of an edit is computed with NumPy in float64 from the keys, residuals
and factors that the run kept. The table holds how well each figure tells lost edits from retained ones: the
probability that a lost edit has the larger figure than a retained one (the area under the ROC curve; 0.5 says
nothing).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from benchmarks.common import run_folders, write_result
from benchmarks.interference import Batch, Matrix, read_batches, read_run
from benchmarks.markdown import table
from editcli.records.edits import OutcomeLine, read_table
from editcli.records.history import History

NAMES: Mapping[str, str] = {
    "written": "share of its residual that its own batch wrote, last site",
    "disturbed": "what later batches add at its key, over what its own wrote, all sites",
    "taken_back": "share of what its own batch wrote that later ones take back, last site",
    "likeness": "largest cosine of its key and a later one, first site",
    "residual": "norm of its residual, first site: how far its target is",
    "key": "norm of its key, first site",
    "prompts": "later edits of the same prompt",
    "length": "characters of its target",
    "place": "its place in the stream",
}
"""Figures of an edit."""


def figures(history: History) -> list[dict[str, float]]:
    """Return, for every edit that was measured, its figures and whether it was lost (1) or retained (0)."""
    batches = list(read_batches(history).values())
    if not batches:
        return []
    answers = {line.id: line for line in read_table(history.folder.outcomes, OutcomeLine).lines}
    requests = history.requests()
    names = [name for batch in history.batches for name in batch.edits]
    prompts = Counter((request.before, request.after) for request in requests.values())
    rows, place = [], 0
    for step, batch in enumerate(history.batches):
        columns = of_batch(batches, step)
        for at, name in enumerate(batch.edits):
            request = requests[name]
            # What is left of a prompt's count is the number of its later edits.
            prompt = (request.before, request.after)
            prompts[prompt] -= 1
            place += 1
            if name in answers and answers[name].efficacy:
                rows.append(
                    {
                        "lost": float(not answers[name].efficacy[0].exact),
                        **{figure: float(values[at]) for figure, values in columns.items()},
                        "prompts": float(prompts[prompt]),
                        "length": float(len(request.target_new)),
                        "place": place / len(names),
                    }
                )
    return rows


def of_batch(sites: Sequence[Sequence[Batch]], step: int) -> dict[str, Matrix]:
    """Return the figures of a batch's edits that keys, residuals and updates tell, one number for each edit."""
    first, last = sites[0], sites[-1]
    own = [site[step].answer(site[step].keys) for site in sites]
    later = [
        np.sum([batch.answer(site[step].keys) for batch in site[step + 1 :]], axis=0)
        + np.zeros_like(site[step].residual)
        for site in sites
    ]
    unit = first[step].keys / np.linalg.norm(first[step].keys, axis=0)
    after = [batch.keys / np.linalg.norm(batch.keys, axis=0) for batch in first[step + 1 :]]
    residual = last[step].residual
    return {
        "written": (own[-1] * residual).sum(0) / np.square(residual).sum(0),
        "disturbed": np.sqrt(squares(later) / squares(own)),
        "taken_back": -(later[-1] * own[-1]).sum(0) / np.square(own[-1]).sum(0),
        "likeness": (unit.T @ np.concatenate(after, 1)).max(1) if after else np.zeros(unit.shape[1]),
        "residual": np.linalg.norm(first[step].residual, axis=0),
        "key": np.linalg.norm(first[step].keys, axis=0),
    }


def squares(parts: Sequence[Matrix]) -> Matrix:
    """Return the sum over all parts of the squared norm of each column."""
    return np.sum([np.square(part).sum(0) for part in parts], axis=0)


def area(lost: Sequence[float], retained: Sequence[float]) -> float | None:
    """Return the probability that a lost edit's figure exceeds a retained one's, ties counting half."""
    if not lost or not retained:
        return None
    apart = np.subtract.outer(np.array(lost), np.array(retained))
    return float((apart > 0).mean() + (apart == 0).mean() / 2)


def examine(history: History) -> dict[str, Any] | None:
    """Return how many edits of a run were lost and what tells them from the others; None without keys."""
    rows = figures(history)
    if not rows:
        return None
    lost, retained = ([row for row in rows if row["lost"] == share] for share in (1, 0))
    parts = {name: ([row[name] for row in lost], [row[name] for row in retained]) for name in NAMES}
    return {
        "edits": len(rows),
        "lost": len(lost),
        "area": {name: area(*part) for name, part in parts.items()},
        "median_lost": {name: median(part[0]) for name, part in parts.items()},
        "median_retained": {name: median(part[1]) for name, part in parts.items()},
    }


def median(values: Sequence[float]) -> float | None:
    """Return the median; None of nothing."""
    return float(np.median(values)) if values else None


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe which edits were lost."""
    yield from ("## Which edits are lost", "")
    yield "`python -m benchmarks.lost FOLDER`: the probability that a lost edit has the larger figure than a retained"
    yield "one (0.5 says nothing), and both medians, lost / retained."
    yield ""
    stacks = result["result"]
    heading = ("figure of an edit", *(f"{name}: {one['lost']} of {one['edits']} lost" for name, one in stacks.items()))
    yield from table(heading, [(text, *(_cell(one, name) for one in stacks.values())) for name, text in NAMES.items()])


def _cell(one: Mapping[str, Any], name: str) -> str:
    share, lost, retained = (one[part][name] for part in ("area", "median_lost", "median_retained"))
    return "-" if share is None else f"{share:.2f} ({lost:.2f} / {retained:.2f})"


@click.command()
@click.argument("bench", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path))
def main(bench: Path, out: Path | None) -> None:
    """Tell the lost edits of every run in BENCH from the retained ones."""
    runs = {name: examine(read_run(path)) for name, path in run_folders(bench).items()}
    result = {name: one for name, one in runs.items() if one is not None}
    write_result("lost", result, out)
    click.echo("\n".join(section({"result": result})))


if __name__ == "__main__":
    main()
