"""What a run will hold in memory, known before any weight is loaded, and refused when it is certain not to fit.

Certain is only what is there all the time: the weights, the float32 masters of the edited matrices, and the (d_in,
d_in) matrix that an inverse-Gram editor keeps for each of them. Everything else comes and goes or depends on
micro-batches that shrink when memory is short, so it is estimated, shown, and at most warned about.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from editcli.errors import ModelError
from editcli.formatting import size
from editcli.linalg.precision import working_dtype
from editcli.models.loading import LoadedModel, choose_device, choose_dtype
from editcli.models.memory import free_bytes
from editcli.plugin.editors import InverseGramEditor
from editcli.reporting import Reporter
from editcli.storage.checkpoint import Checkpoint, torch_dtype

if TYPE_CHECKING:
    from editcli.runs.planning import Planned

UNCHECKED = "EDITCLI_UNCHECKED_MEMORY"
"""Environment variable: any value but nothing turns the refusal into a warning."""

_SINGLE, _DOUBLE = 4, 8


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes on the device of a run, by what they are for."""

    device: str
    weights: int
    masters: int
    inverse_gram: int
    """What the editor keeps per site for its solves."""
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
        """What is certain to be held at the same time."""
        return self.weights + self.masters + self.inverse_gram

    @property
    def expected(self) -> int:
        """What is held at the worst moment, estimates included."""
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
    inner = [columns for _, columns in planned.shapes]
    spread = recipe.device_map is not None or recipe.parallel == "tensor"
    # What lives on a device of its own does not take this one's memory.
    here = recipe.solve_device is None or choose_device(recipe.solve_device) == device
    solves = isinstance(planned.editor, InverseGramEditor) and here
    own = working_dtype(device).itemsize if solves else 0
    entries = [base.checkpoint.entries[base.checkpoint.tensor_for(f"{site.module}.weight")] for site in planned.sites]
    return Footprint(
        device="several devices" if spread else str(device),
        weights=_parameters(base) * dtype.itemsize,
        masters=planned.state_bytes if here else 0,
        inverse_gram=sum(own * columns**2 for columns in inner),
        statistics=sum(_DOUBLE * columns**2 for columns in inner) if solves else 0,
        activations=_activations(planned, base, dtype.itemsize) if planned.editor.needs_values else 0,
        state=sum(torch.Size(entry.shape).numel() * torch_dtype(entry).itemsize for entry in entries) if here else 0,
        free=None if spread else free_bytes(device),
    )


def check_memory(planned: Planned, base: LoadedModel, reporter: Reporter) -> Footprint:
    """Return what a run will hold; raise :class:`ModelError` when it cannot fit, warn when it may not."""
    found = footprint(planned, base)
    if found.free is None or found.fits:
        return found
    if found.needed <= found.free:
        what = "use a smaller --dtype, fewer --layers or --device-map auto"
        reporter.warn(f"this run may not fit the memory; {what} ({found.sentence()})")
        return found
    sentence = (
        f"the model in {planned.source.name} cannot fit: weights, float32 masters of {len(planned.sites)} matrices and "
        f"the editor's own take {size(found.needed)} on {found.device}, which has {size(found.free)} free; use a "
        f"smaller --dtype, fewer --layers, another --device or --device-map auto ({UNCHECKED}=1 tries it all the same)"
    )
    if not os.environ.get(UNCHECKED):
        raise ModelError(sentence)
    reporter.warn(sentence)
    return found


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
    layers = base.architecture.layers - planned.layers[-1] - 1
    through = tokens * layers * (8 * outer + 3 * inner) * itemsize
    return int(through + 3 * _SINGLE * rows * config.vocab_size)
