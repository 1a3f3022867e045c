"""Predict the memory and the time that a run takes.

Memory is known before any weight is loaded, and a run that is certain not to fit is refused. Certain is only what is
there all the time: the weights, the float32 masters of the edited matrices, and the (d_in, d_in) matrix that an
inverse-Gram editor keeps for each of them. Everything else comes and goes or depends on micro-batches that shrink when
memory is short, so it is estimated, shown, and at most warned about. Time is measured on a few edits, and a long run is
announced with the settings that shorten it most.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from editcli.editing import targets
from editcli.editing.targets import target_costs
from editcli.errors import ModelError
from editcli.formatting import duration, plural, size
from editcli.linalg.precision import working_dtype
from editcli.models.loading import LoadedModel, choose_device, choose_dtype
from editcli.models.memory import free_bytes
from editcli.plugin.editors import InverseGramEditor
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions
from editcli.storage.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    from editcli.runs.planning import Planned

UNCHECKED = "EDITCLI_UNCHECKED_MEMORY"
"""Environment variable: any value but nothing turns the refusal into a warning."""

_SINGLE, _DOUBLE = 4, 8

LONG = 600.0
"""Seconds from which on a run is announced as a long one."""
SLOW = 5e9
"""Multiplications a second that any CPU does: what is short at this speed needs no measurement."""
SAMPLE, SAMPLE_STEPS = 8, 2
"""Edits and steps that are timed."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device of a run, by what they are for."""

    device: str
    weights: int
    masters: int
    inverse_gram: int
    """The matrices that the editor solves with, one per site."""
    statistics: int
    """Second moments while components are prepared; an estimate."""
    activations: int
    """One micro-batch of target optimisation; an estimate."""
    state: int
    """The base's edited matrices, which edited ones are compared with; an estimate."""
    free: int | None
    """None where nothing can be asked or the model is spread over devices."""

    @property
    def needed(self) -> int:
        """Bytes that are certain to be held at the same time."""
        return self.weights + self.masters + self.inverse_gram

    @property
    def expected(self) -> int:
        """Bytes held at the worst moment, estimates included."""
        return self.needed + self.state + max(self.statistics, self.activations)

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against it, as far as is known."""
        return self.free is None or self.expected <= self.free

    def to_json(self) -> dict[str, int]:
        """Return the figures for the ``bytes`` of a plan; ``free`` is left out where it is not known."""
        names = ("weights", "masters", "inverse_gram", "statistics", "activations", "state", "needed", "expected")
        figures = {name: int(getattr(self, name)) for name in names}
        return figures if self.free is None else {**figures, "free": self.free}

    def summary(self) -> str:
        """Say in a few words how much is needed of what is there."""
        free = "" if self.free is None else f" of the {size(self.free)} free"
        return f"about {size(self.expected)}{free} on {self.device}"

    def sentence(self) -> str:
        """Say what is needed, and what for, in one line."""
        parts = (
            (self.weights, "weights"),
            (self.masters, "float32 masters"),
            (self.inverse_gram, "solver matrices"),
            (self.statistics, "statistics at the start"),
            (self.activations, "activations"),
            (self.state, "base matrices"),
        )
        listed = ", ".join(f"{size(count)} {name}" for count, name in parts if count)
        return f"{self.summary()}: {listed}"


def footprint(planned: Planned, base: LoadedModel) -> Footprint:
    """Return what ``planned`` will hold; ``base`` is its model, loaded or described."""
    recipe = planned.recipe
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.dtype, planned.config, device)
    sized = [(site, columns) for site, (_, columns) in zip(planned.sites, planned.shapes, strict=True)]
    # Of experts, each has a matrix of its own.
    inner = [columns // (site.experts or 1) for site, columns in sized for _ in range(site.experts or 1)]
    spread = recipe.device_map is not None or recipe.parallel == "tensor"
    # Masters and solves on another device take none of this one's memory.
    here = recipe.solve_device is None or choose_device(recipe.solve_device) == device
    # An editor of routed experts solves with one matrix for each of them.
    solves = here and (planned.editor.writes_experts or isinstance(planned.editor, InverseGramEditor))
    itemsize = working_dtype(device).itemsize if solves else 0
    moments = [site.moment_shape(columns) for site, columns in sized]
    stored = base.checkpoint.tensors_of(base.checkpoint.weight_of(site.module) for site in planned.sites)
    entries = [base.checkpoint.entries[name] for name in stored]
    return Footprint(
        device="several devices" if spread else str(device),
        weights=_parameters(base) * dtype.itemsize,
        masters=planned.state_bytes if here else 0,
        inverse_gram=sum(itemsize * columns**2 for columns in inner),
        statistics=sum(_DOUBLE * torch.Size(shape).numel() for shape in moments) if solves else 0,
        activations=_activations(planned, base, dtype.itemsize) if planned.editor.needs_values else 0,
        state=sum(torch.Size(entry.shape).numel() * torch_dtype(entry).itemsize for entry in entries) if here else 0,
        free=None if spread else free_bytes(device),
    )


def check_memory(planned: Planned, base: LoadedModel, reporter: Reporter) -> Footprint:
    """Return what a run will hold; raise :class:`ModelError` when it cannot fit, warn when it may not."""
    forecast = footprint(planned, base)
    if forecast.free is None or forecast.fits:
        return forecast
    if forecast.needed <= forecast.free:
        what = "use a smaller --dtype, fewer --layers or --device-map auto"
        reporter.warn(f"this run may not fit the memory; {what} ({forecast.sentence()})")
        return forecast
    sentence = (
        f"the model in {planned.source.name} cannot fit: weights, float32 masters of {len(planned.sites)} matrices and "
        f"the editor's own take {size(forecast.needed)} on {forecast.device}, which has {size(forecast.free)} free; "
        "use a smaller --dtype, fewer --layers, another --device or --device-map auto "
        f"({UNCHECKED}=1 tries it all the same)"
    )
    if not os.environ.get(UNCHECKED):
        raise ModelError(sentence)
    reporter.warn(sentence)
    return forecast


def _parameters(base: LoadedModel) -> int:
    """Return the least number of weights that the model can have in memory.

    A described model may show tied weights twice, and a checkpoint may hold buffers that no parameter needs.
    """
    described = sum(parameter.numel() for parameter in base.model.parameters())
    return min(described, _stored(base.checkpoint))


def _stored(checkpoint: Checkpoint) -> int:
    return sum(torch.Size(entry.shape).numel() for entry in checkpoint.entries.values())


def _activations(planned: Planned, base: LoadedModel, itemsize: int) -> int:
    """Estimate what one micro-batch keeps for its backward pass through the layers above the last edited one.

    Per token and layer about eight tensors of the stream's width and three of the MLP's stay alive; above them stand
    float32 logits, with their gradient, at the tokens of the targets.
    """
    config: Any = base.model.config.get_text_config()
    options, count = planned.targets, max(1, len(planned.requests))
    rows = min(planned.batch_size, count) * (1 + options.prefixes)
    length = planned.target_tokens / count + options.prefix_tokens
    tokens = min(options.batch_tokens, rows * length)
    outer, inner = planned.shapes[-1]
    # A token passes through a few experts, though the matrix of a site is that of all of them.
    experts = planned.sites[-1].experts
    inner = inner // experts * base.architecture.experts_per_token if experts else inner
    layers = base.architecture.layers - planned.target_layers[0] - 1
    through = tokens * layers * (8 * outer + 3 * inner) * itemsize
    return int(through + 3 * _SINGLE * rows * config.vocab_size)


@dataclass(frozen=True, slots=True)
class Foresight:
    """The longest time that targets take, in seconds, and settings that would shorten it."""

    seconds: float
    remedies: tuple[tuple[str, float], ...]
    """Up to two settings, written as on the command line, and the seconds with each of them; the shortest first."""


def warn_of_long_work(
    loaded: LoadedModel, planned: Planned, requests: Sequence[EditRequest], reporter: Reporter, *, parts: int = 1
) -> None:
    """Warn of targets that will keep a CPU busy for long, with the settings that help most."""
    if loaded.input_device.type != "cpu" or not requests or not planned.editor.needs_values:
        return
    with reporter.phase("Measuring the speed of this machine", 1) as advance:
        ahead = foresee(loaded, requests, planned.target_layers, planned.targets, parts=parts)
        advance(1)
    if ahead is not None:
        shorter = [f"up to {duration(seconds)} with -o {setting}" for setting, seconds in ahead.remedies]
        what = f"the targets of {plural(len(requests), 'edit')} take up to {duration(ahead.seconds)} on this CPU"
        reporter.warn("; ".join([what, *shorter]))


def foresee(
    loaded: LoadedModel,
    requests: Sequence[EditRequest],
    layers: Sequence[int],
    options: TargetOptions,
    *,
    parts: int = 1,
) -> Foresight | None:
    """Predict the time of optimising targets at ``layers``, shared by ``parts`` processes; None where it is short.

    The work is that of :func:`editcli.editing.targets.target_costs`, in which every edit takes all steps, and the speed
    is measured on a few edits and steps; so edits that stop early need less.
    """

    def work(chosen: TargetOptions, edits: Sequence[EditRequest], contexts: int) -> int:
        return sum(sum(target_costs(loaded, edits, contexts, layer, chosen)) for layer in layers)

    whole = work(options, requests, options.prefixes + 1) / parts
    if whole / SLOW < LONG:
        return None
    brief, sample = replace(options, steps=SAMPLE_STEPS, stop_loss=0.0, stop="loss"), requests[:SAMPLE]
    started = time.perf_counter()
    for layer in layers:
        targets.optimise(loaded, sample, (), layer, brief, Silent())
    speed = work(brief, sample, 1) / (time.perf_counter() - started)
    if whole / speed < LONG:
        return None
    changed = ((f"targets.{name}={value}", replace(options, **{name: value})) for name, value in _choices(options))
    remedies = [(text, work(other, requests, other.prefixes + 1) / parts / speed) for text, other in changed]
    shortest = sorted(remedies, key=lambda remedy: remedy[1])[:2]
    return Foresight(whole / speed, tuple(remedy for remedy in shortest if remedy[1] < 0.9 * whole / speed))


def _choices(options: TargetOptions) -> Iterator[tuple[str, int | bool]]:
    """Yield settings that make targets cheaper and still give usable ones."""
    if options.prefixes > 1:
        yield "prefixes", 1
    if options.steps > 10:
        yield "steps", max(10, options.steps // 2)
    if not options.cached:
        yield "cached", True
