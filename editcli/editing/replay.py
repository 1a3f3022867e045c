"""Run a function of tensors many times: call by call, or by replaying one recording of its kernels.

On a small piece of work an accelerator waits for the program, which issues every kernel from Python. A CUDA graph
records the kernels once and issues them in one call. It reads and writes fixed addresses, so a recording has inputs of
its own, into which each call copies its tensors. It holds for tensors of the same shapes and types, and as long as the
model's weights stay where they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from editcli.models.frozen_cache import FrozenCache

ALIGNMENT = 256
"""Bytes between the starts of two tensors in an arena are a multiple of this."""

Outputs = tuple[Tensor, ...]
Outlined = tuple[tuple[Hashable, ...], list[Tensor]]
"""An object's description with the kinds of its tensors, and the tensors."""


class Replays(Protocol):
    """A way to run functions of tensors."""

    @property
    def name(self) -> str:
        """The name for the record of a run."""
        ...

    def __call__(self, key: Hashable, function: Callable[..., Outputs], constant: object, *varying: Tensor) -> Outputs:
        """Return ``function(constant, *varying)``.

        ``key`` names the function with all that it depends on besides its arguments; ``constant`` is an object of
        tensors that many calls share.
        """
        ...

    def clear(self) -> None:
        """Free all memory that later calls do not need."""
        ...


class Eager:
    """Calls the function."""

    name = "eager"

    def __call__(self, key: Hashable, function: Callable[..., Outputs], constant: object, *varying: Tensor) -> Outputs:
        """Return the function's result."""
        return function(constant, *varying)

    def clear(self) -> None:
        """Nothing is held."""


class NotReplayableError(Exception):
    """An argument holds an object whose tensors are not known."""


@dataclass(eq=False)
class Arena:
    """Memory for the inputs of recordings, one after the other: it holds those of the recording that ran last."""

    memory: Tensor
    """(bytes,)"""
    held: Callable[[], Any] = lambda: None
    """A weak reference to the object whose tensors are there."""

    def views(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors of the shapes and types of ``tensors`` in this memory."""
        views, start = list[Tensor](), 0
        for tensor in tensors:
            part = self.memory[start : start + tensor.numel() * tensor.element_size()]
            views.append(part.view(tensor.dtype).view(tensor.shape))
            start += _aligned(tensor)
        return views


def _aligned(tensor: Tensor) -> int:
    """Return a tensor's bytes, rounded up so that the next one may be of any type and fast to read."""
    return -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT


@dataclass(slots=True)
class Recording:
    """A recorded function with inputs in an arena, other inputs of its own, and outputs."""

    arena: Arena
    shared: list[Tensor]
    own: list[Tensor]
    outputs: Outputs
    replay: Callable[[], None]

    def __call__(self, constant: Any, tensors: Sequence[Tensor], varying: Sequence[Tensor]) -> Outputs:
        """Copy the arguments that are not there yet, replay, and return copies of the outputs."""
        if self.arena.held() is not constant:
            for held, tensor in zip(self.shared, tensors, strict=True):
                held.copy_(tensor)
            self.arena.held = weakref.ref(constant)
        for held, tensor in zip(self.own, varying, strict=True):
            held.copy_(tensor)
        self.replay()
        return tuple(output.clone() for output in self.outputs)


Record = Callable[[Callable[[], Outputs]], tuple[Outputs, Callable[[], None]]]
"""Runs a function of no arguments while it records it; returns the outputs and what replays it into them."""


class Recorded:
    """Records each function once for each shape of its arguments; where that fails, calls it from then on."""

    def __init__(self, model: nn.Module, record: Record, *, name: str):
        self.failure: str | None = None
        """Why nothing is recorded any more."""
        self._model, self._record, self._name = model, record, name
        self._recordings: dict[Hashable, Recording] = {}
        self._too_large: set[Hashable] = set()
        """Names of the calls whose recordings do not fit the memory."""
        self._arenas: list[Arena] = []
        self._outlines: weakref.WeakKeyDictionary[Any, tuple[tuple[Hashable, ...], list[Tensor]]] = (
            weakref.WeakKeyDictionary()
        )
        self._held: tuple[Hashable, ...] = ()
        """The model's attention and the addresses of its weights when the recordings were made."""

    @property
    def name(self) -> str:
        """The name for the record of a run: that of the plain way once a recording failed."""
        return self._name if self.failure is None else Eager.name

    def __call__(self, key: Hashable, function: Callable[..., Outputs], constant: object, *varying: Tensor) -> Outputs:
        """Return the function's result, from a recording if there is one for these shapes."""
        if self.failure is not None:
            return function(constant, *varying)
        try:
            outline, tensors = self._outlined(constant)
        except NotReplayableError as reason:
            self._give_up(str(reason))
            return function(constant, *varying)
        name = (key, outline, *(_kind(tensor) for tensor in varying))
        if name in self._recordings:
            return self._recordings[name](constant, tensors, varying)
        # The call itself prepares the libraries, which must not happen while kernels are recorded.
        result = function(constant, *varying)
        if name not in self._too_large:
            self._add(name, function, constant, varying)
        return result

    def clear(self) -> None:
        """Drop all recordings with their memory."""
        self._recordings.clear()
        self._too_large.clear()
        self._arenas.clear()

    def _outlined(self, constant: object) -> Outlined:
        """Return an object's outline with the kinds of its tensors, and the tensors; a new object is walked once."""
        if constant not in self._outlines:
            self._forget_changed_model()
            tensors: list[Tensor] = []
            outline = _outline(constant, tensors, {})
            self._outlines[constant] = (outline, tuple(_kind(tensor) for tensor in tensors)), tensors
        return self._outlines[constant]

    def _add(self, name: Any, function: Callable[..., Outputs], constant: object, varying: Sequence[Tensor]) -> None:
        outlined, tensors = self._outlines[constant]
        try:
            arena = self._arena(tensors)
            shared, own = arena.views(tensors), [tensor.clone() for tensor in varying]
            for held, tensor in zip(shared, tensors, strict=True):
                held.copy_(tensor)
            arena.held = weakref.ref(constant)
            rebuilt = _rebuild(outlined[0], shared, {})
            outputs, replay = self._record(lambda: function(rebuilt, *own))
        # The call itself fitted, and a piece of work that fills the memory keeps the device busy without a recording.
        except torch.OutOfMemoryError:
            self.clear()
            self._too_large.add(name)
        # Every model's own code runs here, and what cannot be recorded is its to say: the plain way always works.
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            self._give_up(next(iter(str(error).splitlines()), type(error).__name__))
        else:
            self._recordings[name] = Recording(arena, shared, own, outputs, replay)

    def _arena(self, tensors: Sequence[Tensor]) -> Arena:
        """Return memory that holds copies of ``tensors``: the widest chunk comes first, so one is mostly enough."""
        size, device = sum(_aligned(tensor) for tensor in tensors), tensors[0].device
        for arena in self._arenas:
            if len(arena.memory) >= size and arena.memory.device == device:
                return arena
        self._arenas.append(Arena(torch.empty(size, dtype=torch.uint8, device=device)))
        return self._arenas[-1]

    def _give_up(self, reason: str) -> None:
        self.failure = reason
        self.clear()

    def _forget_changed_model(self) -> None:
        """Drop the recordings if a weight lies elsewhere than when they were made, or the attention is another."""
        attention = getattr(getattr(self._model, "config", None), "_attn_implementation", None)
        now = attention, *(parameter.data_ptr() for parameter in self._model.parameters())
        if now != self._held:
            self.clear()
            self._held = now


def _kind(tensor: Tensor) -> Hashable:
    return tuple(tensor.shape), tensor.dtype, tensor.device


class CudaGraphs:
    """Records kernels as CUDA graphs; all graphs share one pool of scratch memory, since none runs beside another."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool: Any = None
        self._graphs: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, function: Callable[[], Outputs]) -> tuple[Outputs, Callable[[], None]]:
        """Return the outputs of ``function``, which were not computed yet, and the replay that computes them."""
        with torch.cuda.device(self._device):
            if not self._graphs:
                # torch refuses to share a pool with graphs that are all gone while it still holds some of its memory.
                self._pool = torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                outputs = function()
            self._graphs.add(graph)
        return outputs, graph.replay


def replays_for(model: nn.Module, device: torch.device) -> Replays:
    """Return how to run the steps of ``model`` on ``device``."""
    kinds = {parameter.device for parameter in model.parameters()}
    # accelerate's hooks move tensors between devices, which a graph cannot hold.
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    if device.type != "cuda" or len(kinds) != 1 or hooked:
        return Eager()
    return Recorded(model, CudaGraphs(device), name="cuda-graphs")


def _outline(value: Any, tensors: list[Tensor], seen: dict[int, int]) -> Hashable:
    """Return a description of ``value`` without its tensors, which are appended to ``tensors``, each once."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = len(tensors)
            tensors.append(value)
        return ("tensor", seen[id(value)])
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        return ("plain", value)
    if isinstance(value, (tuple, list)):
        return (type(value), *(_outline(item, tensors, seen) for item in value))
    if type(value) is dict:
        return (dict, *((key, _outline(item, tensors, seen)) for key, item in value.items()))
    if isinstance(value, FrozenCache):
        return (FrozenCache, _outline(value.pairs, tensors, seen), value.apart)
    if is_dataclass(value):
        return (type(value), *(_outline(getattr(value, field.name), tensors, seen) for field in fields(value)))
    raise NotReplayableError(f"a block of the model takes an argument of the type {type(value).__name__}")


def _rebuild(outline: Any, tensors: Sequence[Tensor], made: dict[Any, Any]) -> Any:
    """Return the object of an outline on other tensors; a cache that occurs twice stays one object."""
    kind, *parts = outline
    if kind == "tensor":
        return tensors[parts[0]]
    if kind == "plain":
        return parts[0]
    if kind is dict:
        return {key: _rebuild(item, tensors, made) for key, item in parts}
    if kind is FrozenCache:
        if outline not in made:
            made[outline] = FrozenCache(_rebuild(parts[0], tensors, made), apart=parts[1])
        return made[outline]
    items = [_rebuild(item, tensors, made) for item in parts]
    return kind(items) if kind in (tuple, list) else kind(*items)
