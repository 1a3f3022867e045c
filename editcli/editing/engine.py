"""How one model's target values are computed on its device: layout, replays, attention and norms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from editcli.editing.layout import Layout, layout_for
from editcli.editing.replay import Replays, replays_for
from editcli.models.attention import grouped_agrees, grouped_attention
from editcli.models.loading import LoadedModel
from editcli.models.matmul import quick_linears
from editcli.models.norms import Fused, fusable_norms, replaced_norms
from editcli.models.sharded import any_split
from editcli.settings.core import BATCH_TOKENS, TargetOptions

SHARE = 0.4
"""The part of a device's free memory that a micro-batch may take by estimate; the rest is for what is not counted."""

SPARE = 0.1
"""The part of a device's memory that has to be free after a batch; else its recordings are given back."""


@dataclass(slots=True)
class Engine:
    """What the batches of one model share."""

    loaded: LoadedModel
    layout: Layout
    replays: Replays
    quick: bool
    """Whether to use the kernels for an accelerator."""
    whole: dict[tuple[int, bool], bool] = field(default_factory=dict)
    """By layer and use of a cache: whether the model does more between its blocks than call one after the other."""
    agrees: tuple[bool, bool] | None = None
    """Whether the model computes the same with grouped attention, and with past keys and values left where they lie.

    None until it was tried.
    """
    apart: bool = False
    """Whether past keys and values are left where they lie, which grouped attention alone reads."""
    norms: list[tuple[nn.Module, Fused]] = field(default_factory=list)
    """The norms that torch computes in one kernel, with the forward that does."""
    used: set[str] = field(default_factory=set)
    """Names of the ways in which batches were computed, for the record of a run."""

    def most_tokens(self, options: TargetOptions, layer: int) -> int:
        """Return the most tokens of a micro-batch: ``targets.batch_tokens``, or at its default what fits a device."""
        if not self.quick or options.batch_tokens != BATCH_TOKENS:
            return options.batch_tokens
        # The devices of processes that share a model differ in free memory, and their micro-batches must not.
        if any_split(self.loaded.model):
            return BATCH_TOKENS
        return max(BATCH_TOKENS, fitting_tokens(self.loaded, layer))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Compute with the fastest kernels for the device that give the same results."""
        with ExitStack() as stack:
            stack.enter_context(quick_linears(self.loaded.model))
            if self.quick:
                self._quicken(stack)
            yield
        # Recordings keep their memory from every other phase.
        memory = free_memory(torch.device(self.loaded.input_device)) if self.quick else None
        if memory is not None and memory.free < SPARE * memory.total:
            self.replays.clear()

    def _quicken(self, stack: ExitStack) -> None:
        """Use the kernels for an accelerator, as far as the model computes the same with them."""
        model, device = self.loaded.model, self.loaded.input_device
        if self.agrees is None:
            self.norms = fusable_norms(model)
            alike = grouped_agrees(model, device)
            self.agrees = alike, alike and grouped_agrees(model, device, apart=True)
        stack.enter_context(replaced_norms(self.norms))
        alike, apart = self.agrees
        # The model's attention may have been changed since it was tried; another one would miss the past.
        grouped = alike and stack.enter_context(grouped_attention(model))
        self.apart = grouped and apart
        if grouped:
            self.used.add("grouped-attention")


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory, in bytes."""

    free: int
    unused: int
    """What torch holds without a use for it now."""
    total: int


def free_memory(device: torch.device) -> Memory | None:
    """Return the memory of a device; None where the device cannot say."""
    module = torch.get_device_module(device)
    ask = getattr(module, "mem_get_info", None)
    if ask is None:
        return None
    try:
        free, total = ask(device)
    # Some drivers have the question and no answer.
    except RuntimeError:
        return None
    return Memory(free, module.memory_reserved(device) - module.memory_allocated(device), total)


def fitting_tokens(loaded: LoadedModel, layer: int) -> int:
    """Estimate how many tokens of target optimisation above ``layer`` fit a part of the device's free memory.

    Per token and layer about eight tensors of the stream's width and four of the MLP's live until the backward pass;
    about every fourth token has float32 logits, with their gradient.
    """
    memory = free_memory(torch.device(loaded.input_device))
    if memory is None:
        return 0
    architecture = loaded.architecture
    outer, inner = architecture.shape(layer)
    weight = architecture.head.get_parameter("weight")
    through = (architecture.layers - layer - 1) * (8 * outer + 4 * inner) * weight.element_size()
    return int(SHARE * (memory.free + memory.unused) / (through + len(weight) * 3))


def engine_for(loaded: LoadedModel) -> Engine:
    """Return the engine for the device on which a model computes."""
    device = torch.device(loaded.input_device)
    layout, replays = layout_for(device.type), replays_for(loaded.model, device)
    return Engine(loaded, layout, replays, quick=device.type != "cpu")
