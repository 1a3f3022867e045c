"""What docs/benchmarks.md says about long streams on a real model.

The figures are those of :mod:`benchmarks.horizon`, :mod:`benchmarks.interference`, :mod:`benchmarks.key_drift` and
:mod:`benchmarks.lost`, all of the same runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks import key_drift, lost
from benchmarks.markdown import table

RETAINED = {
    "efficacy accuracy": "efficacy_accuracy",
    "efficacy success": "efficacy_success",
    "generalization success": "generalization_success",
    "specificity success": "specificity_success",
}
"""Headings, and retained figures of a curve."""

MODELS = {"smollm2": "SmolLM2-135M-Instruct"}
"""Names of models by the folders that results name."""


def section(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe what every stack retained."""
    horizon = result["result"]
    curves: Mapping[str, Mapping[str, Any]] = horizon["stacks"]
    common = shared_options(curves.values())
    yield from ("## The long horizon, on a real model", "")
    model = MODELS.get(horizon["model"], horizon["model"])
    yield f"`python -m benchmarks.horizon`, {horizon['limit']:,} edits of CounterFact in batches of"
    yield f"{horizon['batch_size']} on {model}, every stack with"
    yield f"{' and '.join(f'`{one}`' for one in common) or 'the preset alone'}."
    yield ""
    edits = sorted({point["edits"] for curve in curves.values() for point in curve["points"]})
    after = " / ".join(f"{count:,}" for count in edits)
    yield f"Figures after {after} edits, of those in a fixed sample of 200. *Retained* is the efficacy accuracy of all"
    yield "edits at the end; that of their first and last quarter, R_n and the divergence on unrelated text (nats,"
    yield "median) are of the end as well. CP@60 is the number of edits after which retained efficacy first fell below"
    yield "0.60, by success / accuracy; - where it never did. *clamped*: targets that ended at `targets.clamp`."
    yield ""
    rows = [(title(curve, common), *cells(curve)) for curve in curves.values()]
    heading = ("stack", *RETAINED, "CP@60", "retained", "first / last quarter", "R_n", "divergence", "clamped")
    yield from table(heading, rows)


def shared_options(curves: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the options that every stack with options has."""
    sets = [curve["options"] for curve in curves if curve["options"]]
    return [option for option in (sets[0] if sets else []) if all(option in others for others in sets)]


def title(curve: Mapping[str, Any], common: Sequence[str]) -> str:
    """Return a stack's name with the options that are its own."""
    return " ".join([curve["stack"], *(option for option in curve["options"] if option not in common)])


def cells(curve: Mapping[str, Any]) -> Iterator[str]:
    """Yield the cells of a stack's row."""
    points = curve["points"]
    for name in RETAINED.values():
        yield " / ".join(number(point["figures"].get(name)) for point in points)
    yield " / ".join("-" if edits is None else f"{edits:,}" for edits in curve["collapse"].values())
    yield from cohorts(curve)
    yield number(points[-1]["ratio"] if points else None)
    yield number(curve["divergence"][-1] if curve["divergence"] else None, digits=3)
    targets = curve["targets"]
    yield f"{targets['clamped'] / targets['optimised']:.0%}" if targets.get("optimised") else ""


def cohorts(curve: Mapping[str, Any]) -> tuple[str, str]:
    """Return efficacy accuracy at the end: of all edits, and of the first and the last quarter."""
    quarters = curve["cohorts"].get("efficacy_accuracy")
    if not quarters:
        return "n/a", "n/a"
    return number(fmean(quarters)), f"{number(quarters[0])} / {number(quarters[-1])}"


def number(value: float | None, *, digits: int = 2) -> str:
    """Return a figure as text."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def interference(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe the spectra of the edited weights, and what batches did to each other."""
    yield from ("## Is there a dominant subspace on the real model?", "")
    yield "`python -m benchmarks.interference FOLDER`, tau = 0.1: the directions that REVIVE protects, the share of the"
    yield "weight's energy in them, and two figures of flatness. A random matrix of this shape has 37 such directions"
    yield "with 0.15 of the energy, effective rank 545 and largest over median 1.7."
    yield ""
    rows = [
        (
            layer_of(site),
            f"{flat['k']} of {flat['of']}",
            f"{flat['energy']:.2f}",
            f"{flat['effective_rank']:.0f}",
            f"{flat['largest_over_median']:.1f}",
        )
        for site, flat in result["spectra"].items()
    ]
    yield from table(("layer", "protected", "energy", "effective rank", "largest / median"), rows)
    yield "The first batch, as in the section on the bundled model below: what it did not write, what all later batches"
    yield "added at its recorded keys over what it wrote, and the share of that addition which acts on the protected"
    yield "directions. The last column is the share of the residuals, of all batches, in protected output directions."
    yield ""
    names = ("unwritten", "later_over_own", "removable", "residual_protected")
    lines = [
        (short(row["stack"]), layer_of(row["site"]), *(f"{row[name]:.2f}" for name in names))
        for row in result["stacks"]
    ]
    yield from table(("stack", "layer", "not written", "later / own", "removable", "residual protected"), lines)


def moved(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe how far keys moved."""
    yield from key_drift.section({"result": {short(name): sites for name, sites in result["result"].items()}})


def losses(result: Mapping[str, Any]) -> Iterator[str]:
    """Describe which edits were lost, and say what all of it means."""
    yield from lost.section({"result": {short(name): one for name, one in result["result"].items()}})
    yield from (MEANING, "")


def layer_of(site: str) -> str:
    """Return the number in a site's name."""
    return next(part for part in site.split(".") if part.isdigit())


def short(run: str) -> str:
    """Return a stack's name without the options in the name of its run."""
    return run.partition("_")[0]


MEANING = """\
How to read the four sections above, and the [streams of 400](#smollm2-135m-instruct-stacks-on-a-stream-of-400) in the
section on real models. All are edits of CounterFact in batches of 100 on SmolLM2-135M-Instruct. Unless a point says
otherwise, they have the guess, one prefix and targets that stop early (`targets.stop=greedy`: MPES, most-probable
early stopping). *Retained* is the share of all edits that the model answers exactly at the end. Italics name a claim
of the papers or a topic; what was measured here follows.

- *Memory of keys dominates.* It does. MEMIT and RLSEdit write the first batch alike: 0.30 to 0.35 of its residual is
  left. After 800 edits MEMIT answers 0.32 of its first quarter and 0.61 of all, RLSEdit 0.69 and 0.84, and both
  answer 0.92 or more of the last. What later batches add at the first batch's keys is 0.87 to 1.00 of what it wrote
  with MEMIT, 0.28 to 0.31 with RLSEdit.
- *MEMIT's norms grow and it collapses.* R_n grows to 1.22, with a memory to 1.25, and exact answers fall evenly, to
  0.61 after 800 edits. Success stays at 0.93, so MEMIT does not collapse as the papers count it (CP@60). A target is
  at most `targets.clamp` away from h, and h does not grow, so nothing feeds back.
- *NAS moves the collapse point fourfold.* There is no such point within 800 edits. After 400 MEMIT retains 0.81 with
  NAS and 0.83 without, after 800 0.65 and 0.61, with R_n 1.19 in place of 1.22. With a memory of keys it costs 0.03:
  RLSEdit retains 0.89 of 400 with NAS and 0.92 without.
- *Null-space methods run out.* Not within 400 edits: AlphaEdit with the guessed threshold leaves 1,075 of 1,536
  directions free, retains 0.92, as RLSEdit does, and answers 0.96 of its last quarter.
- *The weights have a dominant subspace.* There is none to protect: the edited weights are nearly as flat as random
  matrices. Effective rank is 526 to 531 of 576 (random: 545), and the protected directions have 0.16 to 0.18 of the
  energy (random: 0.15). With MEMIT a tenth of what later batches do to the first acts on them, as on the bundled
  model; with RLSEdit a quarter to a third, of much less.
- *REVIVE preserves that subspace, and helps.* It preserves it and does not help: after 400 edits 0.81 of MEMIT's are
  retained with it and 0.83 without, 0.67 of the neighbours in place of 0.71, R_n is 1.15 in place of 1.12, and 0.47
  of the first batch is not written in place of 0.30. The edited weight does what the base did along the protected
  directions. Its leading directions are others all the same (SS 0.03), since the edits add more than so small a head
  holds.
- *LS and SS.* No figure of the spectrum ranks the stacks of 400 edits as accuracy does: over those measured before
  outliers were bounded, rank correlation is 0.42 for LS, 0.27 for SS and -0.21 for drift. These figures do not show
  what memory does: MEMIT and RLSEdit have LS 0.36 and 0.37, drift 0.67 and 0.68, SS 0.10 and 0.10, R_n 1.12 and 1.13,
  and lose 67 and 32 of 400 edits.
- *Which edits are lost.* Early ones whose key is like a later one's, and which later batches disturbed most; with
  MEMIT also those whose prompt comes again. How far the target is, how long it is and how much of it was written at
  once say little. So edits are lost because they are overwritten, and not because a target is out of reach.
- *What the memory does not hold.* Half of what still happens to an early edit with RLSEdit comes from keys that
  moved: later batches change layers 4 to 7 and thereby what enters layer 8 (0.37 of the key's norm after 800 edits;
  0.84 with MEMIT). The other half comes from the key that is remembered: the mean of the bare prompt's key and of
  those behind prefixes. At that mean later batches add 0.28 to 0.31 of what was written, at the bare prompt's key,
  which is asked, 0.44 to 0.46.
- *RLSEdit without prefixes* (`targets.prefixes=0`). The remembered key is then the one that is asked, and targets are
  nearer, as they have to hold in one context alone. It retains 0.96 of 400 edits at R_n 1.10, with one prefix 0.92 at
  1.13, and answers 0.69 of the neighbours (before the edits 0.73). After 800 edits it is 0.90 and 0.84. On [400 other
  records](#smollm2-135m-instruct-other-records), which nothing was chosen on, it retained 0.97, with one prefix 0.95,
  already before outliers were bounded. Of the paraphrases, which stand behind other text, it answers 0.83, with one
  prefix 0.91. So it is not the default: prefixes serve facts that are asked in running text, and the questions here
  are bare prompts. On the bundled model it changes nothing (1,000 edits: 0.99, with one prefix 1.00).
- *Outliers.* Four of the first 500 subjects ("rococo", "Mount Foster", "Crossfire", "Francisco Franco") end at the
  second or third token of their text, where this model's attention sink, the first token, still shows. Their ||h|| is
  2.9 to 6.5 times the usual one, the median over ordinary words; that of all others is 0.9 to 1.7 times. A target may
  move by a share of ||h||, so one of them was 0.40 of the energy of the second batch's update at layer 8. Now the
  usual length stands in for theirs. Before, RLSEdit without prefixes retained 0.94 of 400 edits in place of 0.96 and
  0.88 of 800 in place of 0.90; with one prefix 0.83 of 800 in place of 0.84, at R_n 1.33 in place of 1.25; MEMIT 0.57
  in place of 0.61, at R_n 1.30 in place of 1.22. The points below are from before, and so are all [streams of
  400](#smollm2-135m-instruct-stacks-on-a-stream-of-400) that are not in the [section on
  it](#smollm2-135m-instruct-with-the-length-of-outliers-bounded).
- *Less weight of reference text.* A tenth of it (`mom2_update_weight` 150) writes 0.97 of the first batch and lets
  later ones add 0.02 at its recorded keys. Yet only 0.84 of 400 edits are retained with one prefix, since more is
  written in all, and the rest of it falls on the bare keys. Without prefixes, and with outliers bounded, a third of
  it (500) retains 0.87 of 800 edits in place of 0.90.
- *RLSEdit at layer 8 alone.* No key moves there. At that tenth of the weight it has to write three times the norm,
  and retains 0.71 of 400 edits in place of 0.84.
- *A target for each layer* (`targets.per_layer`, BLUE). It retains 0.80 of 400 edits in place of 0.91. Each layer
  writes its whole residual, so that ||D|| of a batch is 101 to 150 in place of about 70. More of the earlier edits is
  overwritten.
- *ENCORE's ridge.* With outliers bounded it retains 0.92 of 400 edits at R_n 1.12, and 0.92 at 1.13 without the
  ridge.
- *LyapLock.* It retains 0.83 of 400 edits. Its smaller weight of reference text writes 0.98 of the first batch and
  moves other text more (divergence 0.12, with RLSEdit 0.04).
- *SimIE* over MEMIT retains 0.46 of 400 edits, and of the last quarter 0.47: what MEMIT writes into the unedited
  weights does not answer in those of the stream.
- *CrispEdit.* It retains 0.70 of 400 edits and all of the last quarter, but answers 0.45 of the neighbours in place
  of 0.73, and 0.51 of the paraphrases.
- *NSE.* Two passes towards targets of the unedited weights retain 0.48 of 400 edits at R_n 1.42. Its targets are
  those of weights that the stream has left, and ||D|| of a batch is 94 to 139 in place of about 70.
- *Fine-tuning.* LocFT-BF answers 50 of 50 edits and 0.76 of their paraphrases, but of the neighbours 0.36 in place of
  0.80. Of 200 edits in two batches it retains 0.71, of the first batch 0.42, and the divergence on unrelated text is
  0.49.
- *Tried and left out.* No command here repeats these two, which were tried before outliers were bounded and are not
  in the program. A memory that holds the bare key and the mean of the prefixed ones, each with half the weight,
  retains 0.93 of 400 edits with one prefix in place of 0.91. Rehearsal writes earlier edits once more with every
  batch, at the keys that they have by then, so that they stay where their own batch left them. Without prefixes it
  retains 0.96 of 400 in place of 0.94 and 0.90 of 800 in place of 0.88. On the bundled model it retains 0.92 of 2,000
  edits in place of 0.95, as the last ones can no longer be written.
- *On a GPU.* 1,000 edits were measured once, on one H200, with older guesses (an absolute rate of 0.5, 20 steps, two
  prefixes, lambda 300). Accuracy after 200 / 400 / 600 / 800 edits was 0.94 / 0.73 / 0.63 / 0.51 with MEMIT, 0.94 /
  0.71 / 0.70 / 0.53 with MEMIT and NAS, 0.97 / 0.79 / 0.72 / 0.53 with MEMIT and REVIVE, and 0.97 / 0.91 / 0.89 /
  0.82 with RLSEdit. Success stayed above 0.92.
"""

SECTIONS: Mapping[str, Callable[[Any], Iterator[str]]] = {
    "horizon": section,
    "interference-smollm2": interference,
    "key_drift": moved,
    "lost": losses,
}
"""The page's sections about long streams on a real model, by the names of their results."""
