"""The page about scaling: docs/scaling.md, written by ``python -m benchmarks.scaling`` from results alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.costs import (
    DOUBLE,
    HALF,
    SINGLE,
    Batch,
    Plan,
    Shape,
    batch_messages,
    evaluation_flops,
    held_bytes,
    read_flops,
    segment_bytes,
    snapshot_bytes,
    solve_bytes,
    solve_flops,
    statistics_flops,
    target_flops,
    write_bytes,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
PROSE = Path(__file__).with_name("scaling.md")


@dataclass(frozen=True, slots=True)
class Device:
    """Published peak figures of a device, per second and in bytes; none of them was measured by us."""

    name: str
    half: float
    single: float
    memory: float
    size: float
    network: float
    link: float
    per_machine: int = 8


DEVICES = (
    Device("H100 80 GB", 989e12, 67e12, 3.35e12, 80e9, 50e9, 450e9),
    Device("H200 141 GB", 989e12, 67e12, 4.8e12, 141e9, 50e9, 450e9),
)
"""NVIDIA's data sheets, dense rates; the network is one 400 Gbit/s port a device."""
PLANS = (
    Plan(Shape("8B", 4096, 14336, 32, 32, 8, 128256), (4, 5, 6, 7, 8)),
    Plan(Shape("70B", 8192, 28672, 80, 64, 8, 128256), (18, 19, 20, 21, 22)),
    Plan(Shape("405B", 16384, 53248, 126, 128, 8, 128256), (31, 32, 33, 34, 35)),
)
"""Llama 3's shapes; the layers of the larger two lie as deep, relatively, as those published for the 8B."""
GPUS = (1, 8, 16, 32, 64)
STREAMS = (20_000, 1_000_000)
BATCH = 100
ASSUMED_SHARE, ASSUMED_SOLVE_SHARE, ASSUMED_MEMORY_SHARE, LINK_SHARE = 0.30, 0.60, 0.60, 0.60
"""Shares of the published peaks that are reached, where no benchmark of an accelerator says better."""
MESSAGE, DISK = 1e-3, 2e9
"""Seconds of one exchange of short texts, and bytes a second that reach the disk."""
USABLE = 0.92
"""Share of a device's memory that a run may fill."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a stream on some devices would take; seconds of one batch by part."""

    replicas: int
    devices_each: int
    parts: Mapping[str, float]
    start: float
    evaluation: float

    def hours(self, edits: int) -> float:
        """Return the hours of a whole stream, start and two evaluations included."""
        batches = math.ceil(edits / BATCH)
        return (batches * sum(self.parts.values()) + self.start + 2 * edits * self.evaluation) / 3600


def predict(plan: Plan, device: Device, count: int, share: float) -> Prediction | None:
    """Predict on ``count`` devices; None where one replica does not fit them.

    A replica that needs several devices is one process with ``--device-map auto``: its devices work one after the
    other, and it takes a machine, or several times the memory of one is not there at all.
    """
    batch = Batch.typical(BATCH)
    each = _devices_each(plan, device, batch)
    if each is None or each > count:
        return None
    replicas = count // each
    rate, mine = share * device.half, Batch.typical(math.ceil(BATCH / replicas))
    bandwidth = ASSUMED_MEMORY_SHARE * device.memory
    # A step reads every weight above the last edited layer twice, whatever the batch.
    streamed = mine.steps * 2 * 2 * plan.shape.block * (plan.shape.layers - 1 - plan.last) / bandwidth
    solve = max(solve_flops(plan, batch) / (ASSUMED_SOLVE_SHARE * device.single), solve_bytes(plan, SINGLE) / bandwidth)
    messages, bytes_ = batch_messages(plan, batch)
    talk = 0.0 if replicas == 1 else messages * MESSAGE + bytes_ / device.network
    parts = {
        "targets": max(target_flops(plan, mine) / rate, streamed),
        "reads": read_flops(plan, mine) / rate,
        "solves": solve,
        "writes": write_bytes(plan) / bandwidth,
        "talk": talk,
        "record": segment_bytes(plan) * BATCH / DISK,
    }
    start = statistics_flops(plan) / (rate * replicas)
    start += len(plan.layers) * 10.0 * plan.shape.inner**3 / (ASSUMED_SOLVE_SHARE * device.single)
    return Prediction(replicas, each, parts, start, evaluation_flops(plan, 1) / (rate * replicas))


def predict_split(plan: Plan, device: Device, share: float) -> Prediction | None:
    """Predict on one machine whose devices hold the model together; None where Q and masters do not fit beside a part.

    Every block then sums up twice on the way forward and twice on the way back, each device at its own link's rate.
    """
    batch, count = Batch.typical(BATCH), device.per_machine
    whole, weights = held_bytes(plan, batch), 2 * plan.shape.weights
    if whole - weights + weights / count > USABLE * device.size:
        return None
    # What one device would take if it had the room.
    alone = predict(plan, replace(device, size=math.inf), 1, share)
    assert alone is not None
    above = plan.shape.layers - 1 - plan.last
    sums = batch.steps * above * 4 * batch.again + 2 * plan.shape.layers * batch.once
    parts = {name: seconds / (count if name in ("targets", "reads") else 1) for name, seconds in alone.parts.items()}
    # Summing on a ring sends every number twice.
    parts["talk"] += 2 * sums * plan.shape.hidden * HALF / (LINK_SHARE * device.link)
    return Prediction(1, count, parts, alone.start / count, alone.evaluation / count)


def _devices_each(plan: Plan, device: Device, batch: Batch) -> int | None:
    held = held_bytes(plan, batch)
    if held <= USABLE * device.size:
        return 1
    return device.per_machine if held <= USABLE * device.size * device.per_machine else None


def page(found: Mapping[str, Any]) -> str:
    """Return the page: the prose, with the tables where it names them."""
    sections = {
        "coefficients": coefficients(found["scaling"]),
        "errors": errors(found["scaling"]),
        "checks": checks(found),
        "shares": shares(found["gpu"]),
        "memory": memory(),
        "times": times(found["gpu"]),
        "disk": disk(),
        "parts": parts(found["gpu"]),
    }
    text = PROSE.read_text("utf-8")
    for name, lines in sections.items():
        text = text.replace(f"<!-- {name} -->", "\n".join(lines).rstrip())
    return text


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table."""
    yield f"| {' | '.join(heading)} |"
    yield f"|{'---|' * len(heading)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def coefficients(result: Mapping[str, Any]) -> Iterator[str]:
    """Show what was measured on this machine."""
    rows = []
    for part, found in result["parts"].items():
        share = "" if found["share"] is None else f"{found['share']:.2f}"
        unit = f"{1 / found['unit'] / 1e9:.1f} G{'B' if part == 'writes' else 'FLOP'}/s"
        rows.append((part, unit, share, f"{found['call'] * 1e3:.2f} ms" if found["call"] else ""))
    yield from table(("part", "rate", "share of the matrix rate", "a layer and step besides"), rows)


def errors(result: Mapping[str, Any]) -> Iterator[str]:
    """Show how far the model is off at every size that was measured."""
    rows = []
    for row in result["rows"]:
        off = [f"{found['errors'][row['shape']]:+.0%}" for found in result["parts"].values()]
        size = f"{row['hidden']} x {row['inner']} x {row['layers']}"
        whole = sum(
            row[part]["seconds"] * (1 + found["errors"][row["shape"]]) for part, found in result["parts"].items()
        ) / sum(row[part]["seconds"] for part in result["parts"])
        rows.append((row["shape"], size, *off, f"{whole - 1:+.0%}"))
    yield from table(("model", "d x d_in x layers", *result["parts"], "whole batch"), rows)


def checks(found: Mapping[str, Any]) -> Iterator[str]:
    """Compare with what other benchmarks measured."""
    bundled = Plan(Shape("bundled", 128, 1536, 8, 4, 4, 8192, 32), (0, 1))
    rows = []
    if found["stream"]:
        measured, computed = found["stream"]["bytes_per_edit"], segment_bytes(bundled)
        rows.append(
            ("bytes of an edit's segment, bundled model", str(computed), str(measured), _off(computed, measured))
        )
        measured, computed = (
            found["stream"]["state_bytes"],
            snapshot_bytes(Plan(bundled.shape, (0, 1), False), 0),
        )
        rows.append(("bytes of a snapshot without Q, the same", str(computed), str(measured), _off(computed, measured)))
    if found["distributed"]:
        result = found["distributed"]
        ideal, ratio = float(result["processes"]), result["ratio"]
        rows.append(
            (f"targets on {result['processes']} processes", f"{ideal:.2f} x", f"{ratio:.2f} x", _off(ideal, ratio))
        )
    yield from table(("figure", "computed", "measured", "error"), rows)


def shares(gpu: Mapping[str, Any] | None) -> Iterator[str]:
    """Say which shares of the peaks the predictions use, and where they come from."""
    share = share_of(gpu)
    known = "assumed" if gpu is None else f"measured by `python -m benchmarks.gpu` on {gpu['device']}"
    rows = [
        ("passes of the model, of the bfloat16 peak", f"{share:.2f}", known),
        ("products with Q, of the float32 peak", f"{ASSUMED_SOLVE_SHARE:.2f}", "assumed"),
        ("memory traffic, of the bandwidth", f"{ASSUMED_MEMORY_SHARE:.2f}", "assumed"),
        ("links within a machine, of their rate", f"{LINK_SHARE:.2f}", "assumed"),
        ("a message", f"{MESSAGE * 1e3:.0f} ms", "assumed; gloo on one machine takes as long"),
        ("the disk of process 0", f"{DISK / 1e9:.0f} GB/s", "assumed"),
    ]
    yield from table(("of the published figures", "taken", "source"), rows)


def share_of(gpu: Mapping[str, Any] | None) -> float:
    """Return the share of the peak that passes of the model reach: an accelerator's own figure where there is one."""
    if gpu is None or gpu["device"].startswith("cpu"):
        return ASSUMED_SHARE
    rows = [row for shape in gpu["shapes"].values() for row in shape["rows"] if row["way"] == "shipped"]
    return max(row["matrix_share"] for row in rows)


def memory() -> Iterator[str]:
    """Show what a replica holds, by shape."""
    rows = []
    for plan in PLANS:
        batch = Batch.typical(BATCH)
        weights = 2 * plan.shape.weights
        grams = len(plan.layers) * SINGLE * plan.shape.inner**2
        fits = []
        for device in DEVICES:
            each = _devices_each(plan, device, batch)
            fits.append("no machine of 8" if each is None else str(each))
        moments = DOUBLE * plan.shape.inner**2
        sizes = (weights, grams, moments, held_bytes(plan, batch))
        rows.append((plan.shape.name, *(f"{size / 1e9:,.0f} GB" for size in sizes), *fits))
    heading = ("model", "weights", "Q, 5 sites", "one second moment", "a replica, all in all")
    yield from table((*heading, *(f"{device.name}s for it" for device in DEVICES)), rows)


def times(gpu: Mapping[str, Any] | None) -> Iterator[str]:
    """Show the hours of both streams on every number of devices."""
    rows = []
    for device in DEVICES:
        for plan in PLANS:
            for edits in STREAMS:
                cells = []
                for count in GPUS:
                    found = predict(plan, device, count, share_of(gpu))
                    cells.append("-" if found is None else _duration(found.hours(edits)))
                split = predict_split(plan, device, share_of(gpu))
                cells.append("-" if split is None else _duration(split.hours(edits)))
                rows.append((device.name, plan.shape.name, f"{edits:,}", *cells))
    heading = (f"{count} GPU{'s' * (count > 1)}" for count in GPUS)
    yield from table(("device", "model", "edits", *heading, "8 GPUs, `--parallel tensor`"), rows)


def parts(gpu: Mapping[str, Any] | None) -> Iterator[str]:
    """Show where a batch's time goes on one replica and on 64 devices."""
    rows = []
    for plan in PLANS:
        for count in (1, 8, 64):
            found = predict(plan, DEVICES[1], count, share_of(gpu))
            if found is not None:
                cells = [f"{seconds:.3f}" for seconds in found.parts.values()]
                rows.append(
                    (plan.shape.name, str(count), str(found.replicas), *cells, f"{sum(found.parts.values()):.2f}")
                )
        split = predict_split(plan, DEVICES[1], share_of(gpu))
        if split is not None:
            cells = [f"{seconds:.3f}" for seconds in split.parts.values()]
            rows.append((plan.shape.name, "8", "1, split", *cells, f"{sum(split.parts.values()):.2f}"))
    names = ("targets", "reads", "solves", "writes", "talk", "record")
    yield from table(("model", "GPUs", "replicas", *(f"{name}, s" for name in names), "batch, s"), rows)


def disk() -> Iterator[str]:
    """Show what a stream leaves on disk."""
    rows = []
    for plan in PLANS:
        snapshot = snapshot_bytes(plan, SINGLE)
        cells = [f"{edits * segment_bytes(plan) / 1e9:,.0f} GB" for edits in STREAMS]
        snapshots = [
            f"{size / 1e9:,.1f} GB" for size in (snapshot_bytes(Plan(plan.shape, plan.layers, False), 0), snapshot)
        ]
        rows.append((plan.shape.name, f"{segment_bytes(plan) / 1e6:.2f} MB", *cells, *snapshots))
    heading = ("model", "an edit", *(f"{edits:,} edits" for edits in STREAMS), "snapshot", "snapshot with Q")
    yield from table(heading, rows)


def _off(computed: float, measured: float) -> str:
    return f"{computed / measured - 1:+.1%}"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.0f} days"
