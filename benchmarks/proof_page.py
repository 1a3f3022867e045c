"""What docs/benchmarks.md says about the long-horizon proof; :mod:`benchmarks.proof` measures it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.markdown import table

LAWS = ("exponential", "linear", "power", "square root")

NAMES = """Every pair is success / accuracy: efficacy_success is the share of edits whose new answer is more
probable than the old one, efficacy_accuracy the share whose new answer is the greedy one, token for token;
generalization is the same on paraphrases, specificity the true answer on neighbours that were never edited. All
are retained figures: all edits so far, or a fixed sample of 200 of them, asked at the end. CP@60 is the number of
edits after which retained efficacy first fell below 0.60, in both forms; the papers' is that of success. First and
last quarter: both efficacies of the stream's first and last quarter of edits, asked at its end.
"""

FITS = """How R_n grew, the largest of any matrix, over all batches: the straight line through ln R_n (its slope,
the edits in which it doubles, its r^2), and what share of the variance of R_n itself each law explains. "Square
root" is R_n^2 = a + b n: updates of one size that have nothing to do with each other.
"""


def batch100(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the stream in batches of 100."""
    yield from ("## The proof: 2,000 edits in batches of 100", "")
    yield "`python -m benchmarks.proof OUT` runs this section and the next two: the shipped stream on the bundled"
    yield "model, the preset's settings for every stack. Nothing was tuned on this stream; the preset was chosen on one"
    yield "of another seed. On one otherwise idle core a stack takes 6 to 8 minutes, a third of them for measuring;"
    yield "some ran beside other work, so their times are not compared."
    yield from ("", NAMES)
    yield from _retained(result)
    yield from (
        FITS,
        *_growth(result),
        "General ability on a quarter of the held-out text, after all edits:",
        "",
        *_ability(result),
    )
    yield from ("![Curves along the stream](proof-batch100.png)", "", BATCH100)


def batch1(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the stream edit by edit."""
    yield from ("## The proof: 500 edits, one at a time", "")
    yield from _retained(result)
    yield from _growth(result)
    yield from ("![Curves along the stream](proof-batch1.png)", "", BATCH1)


def long(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the stream that is longer than what the editors can hold."""
    yield from ("## The proof: 4,000 edits", "")
    yield "A stream of another seed over 2,000 subjects, the first fact of each and then the second (`python -m"
    yield "tools.bundled_model.stream --seed 5 --facts 3 --edits 6000`, its first 4,000), in batches of 100, target"
    yield "values over one generated context instead of five, measured every 400 edits."
    yield ""
    yield from _retained(result)
    yield from _growth(result)
    yield from ("![Curves along the stream](proof-long.png)", "", LONG)


def interference(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what batches do to each other, and what REVIVE can do about it."""
    yield from ("## Why edits are forgotten, and why REVIVE does not help here", "")
    yield "`python -m benchmarks.interference OUT/batch100 --stats FILE...` reads the factors that the runs above kept"
    yield "and computes from the papers' equations alone, in float64."
    yield ""
    rows = [
        (
            row["stack"],
            row["site"].removeprefix("model.layers.").split(".")[0],
            f"{row['unwritten']:.2f}",
            f"{row['later_over_own']:.2f}",
            f"{row['removable']:.0%}",
            f"{row['residual_protected']:.0%}",
            f"{row['touched']:.1e}",
        )
        for row in result["stacks"]
    ]
    heading = ("stack", "layer", "not written", "later / own", "removable", "residual protected", "touched")
    yield from table(heading, rows)
    yield COLUMNS
    worst = max((row["relative_error"] for row in result["checks"]), default=None)
    if worst is not None:
        yield f"The recorded updates of MEMIT and of MEMIT with REVIVE equal the published equations to {worst:.0e}."
    flat = ", ".join(
        f"layer {site.split('.')[2]}: k = {found['k']} of {found['of']}, effective rank {found['effective_rank']:.0f}, "
        f"largest over median {found['largest_over_median']:.2f}"
        for site, found in result["spectra"].items()
    )
    yield from (f"Singular values at tau = 0.1: {flat}.", "", INTERFERENCE)


def tau(result: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe the sweep of REVIVE's share."""
    yield from ("## How much REVIVE should protect", "")
    yield f"REVIVE's tau on a tuning stream (seed {result[0]['seed']}, {result[0]['edits']:,} edits, batches of 100,"
    yield "one generated context; `python -m tools.sweep_preset revive`), retained at the end:"
    yield ""
    rows = [("none" if row["tau"] is None else row["tau"], *_single(row)) for row in result]
    yield from table(("tau", "efficacy", "specificity", "generalization_accuracy", "R_n"), rows)
    yield TAU


def weights(result: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe the sweep of MEMIT's weight at batch size 1."""
    yield from ("## MEMIT's weight, one edit at a time", "")
    yield "The preset's `mom2_update_weight` was chosen for batches of 100. 200 edits of the tuning stream, one at a"
    yield "time (`python -m tools.sweep_preset grid --batch 1 --edits 200 --layers 0-1 --clamp 1 --stack memit`):"
    yield ""
    rows = [(f"{row['weight']:,.0f}", *_single(row)) for row in sorted(result, key=lambda row: row["weight"])]
    yield from table(("weight", "efficacy", "specificity", "generalization_accuracy", "R_n"), rows)
    yield "Three times more or less changes R_n a little and efficacy not at all: this is not why MEMIT does not"
    yield "collapse."
    yield ""


def stacks(result: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Describe the choice of a default, with the stacks that were compared on a tuning stream."""
    yield from ("## Which stack to take", "")
    yield f"On the tuning stream (seed {result[0]['seed']}, {result[0]['edits']:,} edits, batches of 100, one generated"
    yield "context; `python -m tools.sweep_preset stacks`), retained at the end:"
    yield ""
    rows = [(row["stack"], *_single(row)) for row in result]
    yield from table(("stack", "efficacy", "specificity", "generalization_accuracy", "R_n"), rows)
    yield CHOICE


def _single(row: Mapping[str, Any]) -> tuple[str, ...]:
    efficacy = f"{row['efficacy_success']:.3f} / {row['efficacy']:.3f}"
    specificity = f"{row['specificity_success']:.3f} / {row['specificity']:.3f}"
    return (efficacy, specificity, f"{row['generalization']:.3f}", f"{row['ratio']:.2f}")


def _retained(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of what every stack retains."""
    rows = []
    for curve in result["curves"]:
        last, cohorts = curve["points"][-1]["figures"], curve["cohorts"]
        figures = [_pair(last, name) for name in ("efficacy", "generalization", "specificity")]
        collapse = " / ".join("-" if edits is None else f"{edits:,}" for edits in curve["collapse"].values())
        ends = [_pair({name: shares[at] for name, shares in cohorts.items()}, "efficacy") for at in (0, -1)]
        rows.append((curve["stack"], *figures, collapse, *ends))
    heading = ("stack", "efficacy", "generalization", "specificity", "CP@60", "first quarter", "last quarter")
    yield from table(heading, rows)


def _growth(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of how R_n grew."""
    rows = []
    for curve in result["curves"]:
        growth, ratio = curve["growth"], curve["points"][-1]["ratio"]
        shares = {law: f"{growth['r2'][law]:.3f}" for law in LAWS}
        shares[curve["law"]] = f"**{shares[curve['law']]}**"
        line = (f"{growth['slope'] * 1000:.2f}", f"{growth['doubling']:,.0f}", f"{growth['log_r2']:.3f}")
        rows.append((curve["stack"], f"{ratio:.2f}", *line, *shares.values()))
    heading = ("stack", "R_n", "ln R_n per 1,000 edits", "doubling", "r^2 of the line")
    yield from table((*heading, *LAWS), rows)


def _ability(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of general ability."""
    drifts = {curve["stack"]: curve["drift"] for curve in result["curves"] if curve["drift"]}
    rows = [
        (name, f"{d['perplexity_base']:.2f}", f"{d['perplexity']:.2f}", f"{d['kl']:.3f}") for name, d in drifts.items()
    ]
    yield from table(("stack", "perplexity before", "after", "KL to the base, nats a token"), rows)


def _pair(figures: Mapping[str, float | None], name: str) -> str:
    values = (figures.get(f"{name}_{form}") for form in ("success", "accuracy"))
    return " / ".join("n/a" if value is None else f"{value:.2f}" for value in values)


COLUMNS = """Not written: ||D K - R|| / ||R|| of the first batch. Later / own: what all later batches add to the
outputs for the first batch's keys, over what that batch wrote there. Removable: the share of that addition's
energy which acts on the directions that REVIVE protects. Residual protected: the share of the residuals' energy
that lies in them. Touched: the largest share of an update's norm on them.
"""

BATCH100 = """How to read it. Plain MEMIT overwrites what it wrote: at the end 95 % of its last quarter of edits is
answered and 44 % of its first. RLSEdit, the same solve with a memory of past keys, keeps both, and damages general
ability most (KL 0.29); AlphaEdit keeps the early ones best and has less and less room for new ones. NAS keeps more
neighbours with either editor, slows R_n, and saves most of the general ability: KL 0.21 becomes 0.09 with MEMIT,
0.29 becomes 0.11 with RLSEdit, which then pays with its newest edits (last quarter 0.87 instead of 0.98). RLSEdit
ends at efficacy 1.00 / 0.96 with specificity 0.92 / 0.48, RLSEdit with NAS at 0.95 / 0.91 with 0.95 / 0.62: at
least 0.9 of the edits in both forms, and 0.8 of the neighbours in the papers' form (success), not in exact
answers.

What does not come out like the papers:

- No stack falls below 0.60 within 2,000 edits in either form, so there is no collapse point to move; see the
  longer stream.
- R_n of plain MEMIT does not grow exponentially here: a line explains 91 % of the variance of ln R_n, the square
  root all of that of R_n. Its updates are of nearly one size (30 % larger at the end) and add up like independent
  vectors. An exponential needs updates that grow with the weights they are added to; that feedback begins late on
  this model.
- REVIVE does not help (efficacy 0.92 / 0.64 against 0.97 / 0.72, general ability the same); the reason is below.
"""

BATCH1 = """One at a time the picture is the same as in batches, and milder than in the papers: where theirs lose
Llama-3-8B after some 400 edits, this model still answers 95 % or more of its 500. The order is theirs: RLSEdit,
AlphaEdit, MEMIT with NAS, MEMIT; and REVIVE equals MEMIT. R_n of MEMIT follows the square root again.
"""

LONG = """This is more than the model can hold. RLSEdit holds longest: 0.96 of the exact answers after 2,000 edits, and
below 0.60 only at the last measurement (0.595 after 4,000). MEMIT's efficacy_accuracy is below 0.60 after 2,800 edits;
its efficacy_success is at 0.82 after 4,000 and has not collapsed in the papers' sense, nor has any other.
AlphaEdit falls below 0.60 with MEMIT, from the other end: its first quarter of edits is kept (0.71)
and its last is not (0.25) since its null space is used up.

With NAS MEMIT's accuracy is mostly higher (0.48 against 0.38 at the end) but crosses 0.60 at the same measurement
(0.598 against 0.515), so NAS does not move that collapse point by 4 times here, or at all. What it does move is what
it acts on: MEMIT's updates nearly double in size along the stream (layer 1: ||D|| 25 after 400 edits, 45 after 4,000)
and R_n rises past 6, straight and no longer flattening; with NAS they stay at 23 and R_n levels off below 4, as its
bound says. Neighbours follow the norms: specificity_success 0.71 without NAS, 0.85 with it.

The reason why NAS does not save MEMIT's exact answers is in the next section: they are lost because later keys
overlap with earlier ones, at whatever norm. RLSEdit, which remembers keys, loses them later and keeps its early ones.
"""

INTERFERENCE = """So the implementation does what the paper says, and the reason lies in the model. Its spectra are
flat, as matrices trained with Muon are: the "dominant" tenth of the sum of singular values takes 10 or 11 of 128
directions, hardly larger than the others. Later batches disturb the first batch's answers by one and a half times
what was written there, and a tenth of that acts on the protected directions, as much as on any other directions;
REVIVE removes that tenth, leaves the rest, and doubles what every update fails to write (0.33 of the residual
instead of 0.17). Forgetting here is overlap of keys, which a memory of keys (RLSEdit, AlphaEdit: 0.4 to 0.6
instead of 1.5) takes away and a fixed subspace does not.
"""

TAU = """The more is protected, the fewer edits stay and the more neighbours do: no tau is better than none at keeping
edits, and the published 0.1 is not the reason for the difference. R_n does not fall with tau either.
"""

CHOICE = """RLSEdit with NAS is what to take for a stream: of all stacks that keep nine of ten edits, it keeps most
neighbours and most general ability (2,000 edits: KL 0.11 against 0.29 for RLSEdit alone and 0.21 for MEMIT), for
the cost of MEMIT. RLSEdit alone is the choice where only the edits count: it keeps 0.96 of them instead of 0.91,
and the first thousand equally well. AlphaEdit keeps its earliest edits, but runs out of room for new ones. REVIVE
trades edits for neighbours here and is worth trying on a model whose spectrum has a head; look at `editcli inspect
--spectral` first: where the effective rank is near the full one, there is nothing to protect.

For a few hundred edits all stacks are nearly equal on this model; beyond, RLSEdit keeps most, here and on a real model,
which is why it is the editor that is taken without `--editor`. A longer stream whose neighbours matter should add
`--stabilizer nas`.
"""

SECTIONS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "proof-batch100": batch100,
    "proof-batch1": batch1,
    "proof-long": long,
    "interference": interference,
    "proof-tau": tau,
    "proof-weights": weights,
    "proof-stacks": stacks,
}
"""The page's sections about the proof, by the names of their results."""
