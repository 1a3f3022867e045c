"""The sections about speed and memory of the benchmarks' page, each from one result file.

A section takes the whole JSON document of its benchmark and yields lines of Markdown. :data:`SECTIONS` has them in the
order of the page, by the name of the result file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks.markdown import table

IDEAS_LEFT = """The counts predict well what skipping layers and logits gives. Starting at the lookup token gives less
than its count, because products over more tokens at a time are faster for each of them. Sharing chunks of equal width
no longer pays on these models; it is what keeps one long text from padding all others.

Taken out again: torch's plain attention instead of the fused one for few tokens. It gave 1 to 2 % (rows above), and the
switch is one of the whole process, so that threads which edit models of their own left it turned.

Without effect: transparent huge pages (0.97 to 1.04 times); products written as convolutions of width 1. Not tried
on a CPU: `torch.compile`. Not done: chunks on threads of their own. Two threads that share each operation give 1.5 to
1.6 times one, two processes that share the batch 1.8 times, so there is up to a fifth to be had on two cores; forward
passes that several threads may enter at once would be the price."""


def targets(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe target optimisation against the published procedure, and what it costs as the work grows."""
    yield from ("## Target optimisation", "")
    yield "The published procedure is measured as it is published, which takes the head's product twice in every step,"
    yield from ('and without that repetition ("one head").', "")
    yield from _targets(document, "python -m benchmarks.targets")


def large_targets(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe the same on a model that is large for a CPU, with few edits."""
    yield from ("## Target optimisation: a model of a billion parameters", "")
    yield from _targets(
        document, "python -m benchmarks.targets --model llama-1b --batch 1 --batch 10 --plain-edits 1 --steps 5"
    )


def _targets(document: Mapping[str, Any], command: str) -> Iterator[str]:
    found = document["result"]
    yield f"Edits per second of the published one-at-a-time procedure and of ours, {found['steps']} steps each, no"
    yield f"early stop, {found['threads']} threads, median of {found['repeats']} interleaved rounds; each ratio is"
    yield from ("taken within one round.", f"`{command}`.", "")
    ways = list(found["rows"][0]["edits_per_second"])
    rows = [
        [
            row["model"],
            f"{row['layer']} of {row['layers']}",
            row["batch"],
            *(f"{row['edits_per_second'][way]:.2f}" for way in ways),
            f"{row['ratio']:.1f}",
            f"{row['ratio_one_head']:.1f}",
        ]
        for row in found["rows"]
    ]
    yield from table(("model", "layer", "batch", *ways, f"ours / {ways[0]}", f"ours / {ways[1]}"), rows)
    for axis, points in found.get("curves", {}).items():
        yield from (f"Edits per CPU second of ours as {axis} grow:", "")
        yield from table(
            [axis, *(f"{point[axis]:,}" for point in points)],
            [["edits per second", *(f"{point['edits_per_second']:.2f}" for point in points)]],
        )


def heap(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe what keeping freed memory gives."""
    found = document["result"]
    yield from ("## Freed memory kept for the next pass", "")
    yield f"One batch of {found['batch']} targets on the {found['model']} model, {found['threads']} threads, each way"
    yield f"in processes of its own, median of {found['repeats']}: {found['ratio']:.2f} times as fast where glibc keeps"
    yield "what is freed until the batch ends. The program `editcli` does that unless `MALLOC_*` or `GLIBC_TUNABLES`"
    yield "are set, and the tables above have it on both sides; the Python interface leaves its host's heap alone."
    yield from ("`python -m benchmarks.heap`.", "")
    rows = [
        [way, f"{row['seconds']:.2f}", f"{row['pages']:,.0f}", f"{row['peak_bytes'] / 1e9:.2f}"]
        for way, row in found["ways"].items()
    ]
    yield from table(("freed memory is", "seconds", "pages cleared", "peak memory [GB]"), rows)


def equality(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe what the published optimisation and ours lead to."""
    found = document["result"]
    efficacy, specificity = found["efficacy_accuracy"], found["specificity_accuracy"]
    yield from ("## The same edits either way", "")
    yield f"{found['edits']} edits in batches of {found['batch_size']} with MEMIT's preset, with target values of the"
    yield "published procedure and with ours."
    yield f"The first batch's target values differ by {found['targets']:.0e}, relative,"
    yield f"the edited matrices by {found['weights']:.0e}; {found['answered_alike']} edits are answered alike."
    yield from ("`python -m benchmarks.equality`.", "")
    rows = [
        [way, f"{efficacy[way]:.3f}", "n/a" if specificity[way] is None else f"{specificity[way]:.3f}"]
        for way in efficacy
    ]
    yield from table(("target values", "efficacy_accuracy", "specificity_accuracy"), rows)


def profile(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe where the time of target optimisation goes, and what each idea gives."""
    yield from ("## What each idea gives", "")
    yield from ("CPU seconds of one thread. `python -m benchmarks.profile_targets`.", "")
    for name, model in document["result"]["models"].items():
        spent = model["ms_per_edit"]
        phases = dict.fromkeys(phase for way in spent.values() for phase in way)
        yield from (f"Milliseconds per edit, {name}:", "")
        rows = [[phase, *(f"{way.get(phase, 0):.1f}" for way in spent.values())] for phase in phases]
        yield from table(("phase", *spent), rows)
        yield f"How many times longer ours takes without one of its ideas, {name}; predicted by counting the"
        yield from ("multiplications with weights that the idea saves, where it saves any:", "")
        counted = model.get("predicted", {})
        rows = [
            [idea, f"{counted[idea]:.2f}" if idea in counted else "", f"{cost:.2f}"]
            for idea, cost in model["cost_without"].items()
        ]
        yield from table(("without", "predicted", "measured"), rows)
    yield from (IDEAS_LEFT, "")


def sites(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe reading and writing the sites of a batch."""
    found = document["result"]
    yield from ("## Keys and residuals of all sites", "")
    yield f"CPU seconds to read and write every site of a batch of {found['batch_size']}: each read from token zero,"
    yield from ("and going on from the last written site. The bytes are the same. `python -m benchmarks.sites`.", "")
    rows = [
        [row["model"], row["sites"], f"{row['zero']:.2f}", f"{row['going_on']:.2f}", f"{row['ratio']:.1f}"]
        for row in found["rows"]
    ]
    yield from table(("model", "sites", "from token zero [s]", "going on [s]", "ratio"), rows)


def solve(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe the solve of a batch."""
    found = document["result"]
    yield from ("## One batch's solve", "")
    yield f"{found['edits']} edits, d_out {found['d_out']:,}, {found['dtype']} on {found['device']}. The published form"
    yield "solves a (d_in, d_in) system for every batch; ours keeps the inverse and, where an editor remembers,"
    yield from ("down-dates it. `python -m benchmarks.solve`.", "")
    rows = [
        [
            row["d_in"],
            *(f"{row[name]:.3f}" for name in ("published", "inverse_gram", "downdate")),
            f"{row['ratio']:.1f}",
            f"{row['with_downdate']:.1f}",
            f"{row['apart']:.0e}",
        ]
        for row in found["rows"]
    ]
    times = ("torch.linalg.solve [s]", "inverse Gram [s]", "down-date [s]")
    yield from table(("d_in", *times, "ratio", "ratio with down-date", "relative difference"), rows)


def saving(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe saving."""
    found = document["result"]
    yield from (f"## Saving a sharded {found['bytes'] / 1e9:.1f} GB model with one edited layer", "")
    yield f"Median of {found['repeats']} interleaved rounds, each way in a process of its own; ours includes reopening"
    yield from ("and comparing every tensor. `python -m benchmarks.saving`.", "")
    names = {
        "theirs": "load, save_pretrained",
        "parsed": "write the changed shard anew, copy the others",
        "unverified": "editcli, without verifying",
        "ours": "editcli",
    }
    rows = [
        [names[how], f"{way['seconds']:.1f}", f"{way['cpu_seconds']:.1f}", f"{way['peak_bytes'] / 1e9:.2f}"]
        for how, way in found["ways"].items()
    ]
    yield from table(("way", "seconds", "CPU seconds", "peak memory [GB]"), rows)


def stream(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe time, memory and the cost of safety along a stream."""
    found = document["result"]
    method = " + ".join((found["editor"], *found["stabilizers"]))
    yield from ("## Cost along a stream", "")
    yield f"{found['edits']:,} edits end to end with {method} in batches of {found['batch_size']}, no evaluation."
    yield from ("`python -m benchmarks.stream`.", "")
    rows = [[f"seconds: {phase}", f"{seconds:.0f}"] for phase, seconds in found.get("phases", {}).items()]
    if found.get("edits_per_second_by_quarter"):
        rates = ", ".join(f"{rate:.2f}" for rate in found["edits_per_second_by_quarter"])
        rows.append(["edits per second, by quarter", rates])
    rows.append(["time per batch, last quarter / first", f"{found['last_over_first_quarter']:.2f}"])
    rows += [
        [f"resident memory after {int(count):,} edits [GB]", f"{size / 1e9:.3f}"]
        for count, size in found["resident_bytes"].items()
    ]
    if found.get("peak_bytes"):
        rows.append(["peak memory [GB]", f"{found['peak_bytes'] / 1e9:.2f}"])
    rows += [[f"share of the time: {what}", f"{found[f'{what}_share']:.1%}"] for what in ("snapshot", "journal")]
    rows.append(["bytes on disk per edit", f"{found['bytes_per_edit']:,}"])
    rows.append(["the same, computed for Llama-3-8B with five sites", f"{found['llama_3_8b_bytes_per_edit']:,}"])
    yield from table(("figure", "value"), rows)


def reading(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe gathering second moments."""
    found = document["result"]
    yield from ("## Second moments of reference text", "")
    yield f"Tokens per CPU second on the {found['model']} model, {found['sites']} sites, {found['tokens']:,} tokens:"
    yield "one text at a time through the whole model with a hook on every site, as published, and ours. Peak memory"
    yield from (f"{found['peak_bytes'] / 1e9:.2f} GB. `python -m benchmarks.moments`.", "")
    rates = found["tokens_per_second"]
    yield from table(
        (*rates, "ratio", "relative difference"),
        [[*(f"{rate:,.0f}" for rate in rates.values()), f"{found['ratio']:.1f}", f"{found['apart']:.0e}"]],
    )


def inspecting(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe the memory that ``inspect`` takes."""
    found = document["result"]
    yield from ("## Memory of inspect", "")
    yield f"Peak resident memory on a random checkpoint of {found['bytes'] / 2**30:.2f} GiB, {found['shards']} shards,"
    yield f"matrices up to {found['hidden']:,} x {found['intermediate']:,}, and what importing alone takes."
    yield from ("`python -m benchmarks.inspect_memory`.", "")
    rows = [[what, f"{run['gib']:.2f}", f"{run['seconds']:.0f}"] for what, run in found["runs"].items()]
    yield from table(("command", "GiB", "seconds"), rows)


def gpu(document: Mapping[str, Any]) -> Iterator[str]:
    """Describe real shapes on an accelerator."""
    found = document["result"]
    yield from (f"## Real shapes on {found['device']}", "")
    yield f"Random bfloat16 weights and {found['steps']} steps for every edit, which is the worst case: edits of a real"
    yield "model stop when they reach their target. *Shipped* is what the program does on this device, *compiled* the"
    yield "same with the MLPs through `torch.compile`, *eager* the same without recorded steps, *exact* the layout and"
    yield "kernels of a CPU. The speed-up is over the published procedure, one edit at a time, on the same card in the"
    yield "same run; the matrix share is the least operations of the targets over the card's own rate of matrix"
    yield from ("products. Held memory includes recordings' scratch memory. `python -m benchmarks.gpu`.", "")
    heading = ("shape", "way", "batch", "edits/s", "speed-up", "matrix share", "busy", "shapes", "padding")
    heading = (*heading, "peak memory", "held memory")
    rows = []
    for shape in found["shapes"].values():
        for row in shape["rows"]:
            shares = [row["matrix_share"], row["busy"]]
            memory = [row["peak_bytes"], row["reserved_bytes"]]
            rows.append(
                [row["shape"], row["way"], str(row["batch_size"])]
                + [f"{row['edits_per_second']:.1f}", f"{row['speedup']:.1f}"]
                + ["n/a" if share is None else f"{share:.0%}" for share in shares]
                + [str(row["shapes"]), f"{row['padding']:.0%}"]
                + ["n/a" if size is None else f"{size / 1e9:.1f} GB" for size in memory]
            )
    yield from table(heading, rows)
    yield ""
    for name, shape in found["shapes"].items():
        yield f"- {name}, layers {', '.join(map(str, shape['layers']))}: the published procedure takes"
        yield f"  {shape['published_seconds']:.2f} s an edit."


SECTIONS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[str]]] = {
    "targets": targets,
    "targets-large": large_targets,
    "heap": heap,
    "equality": equality,
    "profile_targets": profile,
    "gpu": gpu,
    "sites": sites,
    "solve": solve,
    "moments": reading,
    "saving": saving,
    "stream": stream,
    "inspect_memory": inspecting,
}
"""The sections in the order of the page."""
