"""Whether a checkpoint holds the tensors of its architecture, from its headers, and whether its weights are finite.

A missing tensor is no error in transformers: it fills the parameter with new random numbers at every load. Which ones
are missing depends on its renaming of old names, on prefixes and on tied weights, so the check lets transformers load
a checkpoint of the same names and shapes whose tensors take no memory, and reads its report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel

from editcli.errors import ModelError
from editcli.models.hollow import hollow, joined_hollow
from editcli.models.offload import read_offloaded
from editcli.models.sharded import is_split
from editcli.reporting import Reporter
from editcli.storage.checkpoint import DTYPES, Checkpoint, TensorEntry
from editcli.storage.choice import listed

COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""The dtypes that torch multiplies matrices of; whatever else weights are stored in needs a rule of its own."""

UNUSABLE = (
    *(OSError, ValueError, LookupError, RuntimeError, ImportError, TypeError, AttributeError, ArithmeticError),
    # torch's modules assert their arguments.
    *(AssertionError, SafetensorError),
)
"""What transformers and safetensors raise for a model folder that cannot be used."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How the names and shapes of a checkpoint fit a model; names are the model's own."""

    missing: tuple[str, ...]
    """Parameters for which nothing is stored; tied ones and buffers are none."""
    reshaped: tuple[str, ...]
    """Parameters that are stored in another shape."""
    unused: tuple[str, ...]
    """Stored tensors that no part of the model takes, but for those that its class knows to be there."""


def check_fit(checkpoint: Checkpoint, model: PreTrainedModel, reporter: Reporter) -> None:
    """Refuse a checkpoint that does not fit ``model``, whose names and shapes are enough; warn of oddities."""
    fit = examine(checkpoint, model)
    refuse_misfit(fit, checkpoint, model)
    for text in remarks(fit, checkpoint):
        reporter.warn(text)


def examine(checkpoint: Checkpoint, model: PreTrainedModel) -> Fit:
    """Return how a checkpoint fits ``model``, of which only the class, the config and the names are looked at.

    Reads headers only and allocates nothing for what is stored; raises :class:`ModelError` where transformers cannot
    load such a checkpoint at all.
    """
    return fit_of(rehearse(checkpoint, model), model)


def fit_of(info: Mapping[str, Any], model: PreTrainedModel) -> Fit:
    """Return the fit that transformers reports with ``output_loading_info=True``."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    # The entries are names in older versions, and names with both shapes in newer ones.
    reshaped = {entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]}
    return Fit(
        missing=tuple(sorted(name for name in set(info["missing_keys"]) - reshaped if name in parameters)),
        reshaped=tuple(sorted(reshaped)),
        unused=tuple(sorted(info["unexpected_keys"])),
    )


def refuse_misfit(fit: Fit, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """Raise :class:`ModelError` unless every parameter of the model is stored, in its shape and a usable dtype."""
    place, said = checkpoint.place, checkpoint.described_by
    remedy = f"download the checkpoint again, or correct its {said}"
    odd = [entry for entry in checkpoint.entries.values() if not _is_computed(entry)]
    names = _stored_names(model) if odd else frozenset()
    unusable = next((entry for entry in odd if entry.name in names), None)
    if unusable is not None:
        raise ModelError(
            f"{unusable.name} of {place} is stored as {unusable.dtype}, in which torch does not compute; choose the "
            "checkpoint that it was made from, or convert it to bfloat16"
        )
    if fit.reshaped:
        raise ModelError(f"{place} does not fit its {said}: {_shapes(fit.reshaped[0], checkpoint, model)}; {remedy}")
    if fit.missing:
        count = len(fit.missing)
        what = "a tensor" if count == 1 else f"{count:,} tensors"
        raise ModelError(
            f"{place} lacks {what} that its {said} asks for, and transformers would fill in random numbers: "
            f"{listed(fit.missing)}; {remedy}"
        )


def remarks(fit: Fit, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return what is strange about a checkpoint and does not keep the model from loading, one sentence each."""
    # Older versions report what an index names, whether it is there or not; that has a sentence of its own.
    unused = tuple(name for name in fit.unused if name in checkpoint.entries or name not in checkpoint.choice.mapped)
    if not unused:
        return checkpoint.remarks()
    what = f"{checkpoint.description} describes a model that does not use {listed(unused)} of its weights"
    return (*checkpoint.remarks(), what)


def is_ordinary(checkpoint: Checkpoint) -> bool:
    """Tell whether an index is right and everything is stored in a dtype that can be computed in."""
    return checkpoint.is_indexed_exactly and all(map(_is_computed, checkpoint.entries.values()))


def rehearse(checkpoint: Checkpoint, model: PreTrainedModel) -> Mapping[str, Any]:
    """Have transformers load a checkpoint of the same names and shapes, and return what it reports.

    Tensors in a dtype that cannot be computed in are held back, so that they count as missing.
    """
    return _loaded_hollow(checkpoint, model)[1]


def stored_names(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Return the stored name of every parameter of ``model`` that transformers loads as it is, under whatever name.

    One that transformers stacks, as it does the matrices of experts, has the names of its parts, in their order.

    Transformers loads a checkpoint in which every tensor holds its own number and nothing else, and the numbers that
    the parameters have afterwards tell the names. Allocates nothing for what is stored.
    """
    loaded, _ = _loaded_hollow(checkpoint, model)
    stored, names = list(checkpoint.entries.values()), dict[str, tuple[str, ...]]()
    for name, parameter in loaded.named_parameters(remove_duplicate=False):
        if parameter.is_meta or not parameter.numel():
            continue
        whole = _stored_in(parameter.detach(), stored)
        parts = (whole,) if whole else _parts_in(parameter.detach(), stored)
        if parts:
            names[name] = tuple(part.name for part in parts)
    return names


def _parts_in(values: Tensor, stored: Sequence[TensorEntry]) -> tuple[TensorEntry, ...]:
    """Return the tensors that a parameter stacks; none where it was put together in another way."""
    parts: list[TensorEntry] = []
    for one in values:
        part = _stored_in(one, stored)
        if part is None:
            # Numbers of several tensors are in one part. The others, as many as a matrix has rows, tell nothing more.
            return ()
        parts.append(part)
    return tuple(parts)


def _stored_in(values: Tensor, stored: Sequence[TensorEntry]) -> TensorEntry | None:
    """Return the tensor whose number and shape a parameter has; None where there is none."""
    number = _numbered(values)
    entry = stored[number - 1] if 0 < number <= len(stored) else None
    return entry if entry is not None and entry.shape == tuple(values.shape) else None


def _numbered(values: Tensor) -> int:
    """Return the number that the first and the last element of a tensor have; 0 where they differ."""
    if not values.numel():
        return 0
    # A tensor that repeats its numbers would be written out to be flattened.
    first, last = values[(0,) * values.ndim], values[(-1,) * values.ndim]
    return int(first) if bool(first == last) else 0


def _loaded_hollow(checkpoint: Checkpoint, model: PreTrainedModel) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Have transformers load the names and shapes of a checkpoint; every tensor holds its number, counted from 1."""
    # A checkpoint of any size takes a few bytes so.
    entries = enumerate(checkpoint.entries.values(), start=1)
    tensors = {entry.name: hollow(n, entry.shape) for n, entry in entries if _is_computed(entry)}
    kind: Any = _uninitialised(type(model))
    try:
        with quiet(), joined_hollow():
            loaded, info = kind.from_pretrained(
                None,
                config=model.config,
                state_dict=tensors,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    # Transformers raises many kinds of errors for an unusable checkpoint; the user can correct it.
    except UNUSABLE as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"transformers cannot load the checkpoint in {checkpoint.place}: {lines[0]}") from error
    return loaded, info


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' own reports and progress bars off a stream that is not theirs to write on."""
    log = transformers.utils.logging
    shown, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if shown:
            log.enable_progress_bar()


def _uninitialised(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a model class that does not fill in what is missing, which would take the memory and time that it does."""
    return type(kind.__name__, (kind,), {"_initialize_missing_keys": _leave, "__module__": kind.__module__})


def _leave(model: PreTrainedModel, *which: Any) -> None:
    """Leave parameters as they are."""


def _is_computed(entry: TensorEntry) -> bool:
    return DTYPES.get(entry.dtype) in COMPUTED


def _stored_names(model: PreTrainedModel) -> frozenset[str]:
    """Return the names under which a model's parameters may be stored: with the backbone's prefix and without."""
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    return frozenset((*names, *(name.removeprefix(prefix) for name in names), *(prefix + name for name in names)))


def _shapes(name: str, checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    needed = " x ".join(map(str, model.get_parameter(name).shape))
    try:
        stored = checkpoint.shape(checkpoint.tensor_for(name))
    except ModelError:
        # It was renamed since it was stored, and only transformers knows how.
        return f"{name} should be {needed} and is stored in another shape"
    return f"{name} should be {needed} and is stored as {' x '.join(map(str, stored))}"


def refuse_nonfinite(model: Any, checkpoint: Checkpoint) -> None:
    """Raise :class:`ModelError` naming the first parameter that holds a NaN or an infinite number.

    One NaN makes every later activation NaN, and the first error of such a run would not name the cause. The check is
    one pass over the weights in memory and allocates nothing.
    """
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            # A tied matrix is one parameter under two names.
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if not _is_finite(_value(module, name, parameter)):
                raise _refusal(f"{path}.{name}".lstrip("."), parameter, checkpoint)


def _is_finite(values: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite, in memory for two numbers only."""
    if values.numel() == 0 or not values.is_floating_point():
        return True
    # The extremes of numbers with a NaN among them are NaN.
    lowest, highest = torch.aminmax(values)
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))


def _value(module: torch.nn.Module, name: str, parameter: Tensor) -> Tensor:
    if is_split(parameter):
        split: Any = parameter
        return split.to_local()
    return read_offloaded(module, name) if parameter.is_meta else parameter


def _refusal(name: str, parameter: Tensor, checkpoint: Checkpoint) -> ModelError:
    """Return the error for a parameter; a value that is finite in its file has overflowed in the model's dtype."""
    try:
        stored = checkpoint.tensor_for(name)
        overflowed = _is_finite(checkpoint.read(stored))
    except ModelError:
        stored, overflowed = name, False
    if overflowed:
        kind = str(parameter.dtype).removeprefix("torch.")
        return ModelError(f"{stored} of {checkpoint.place} overflows in {kind}; use --dtype bfloat16 or float32")
    return ModelError(
        f"{stored} of {checkpoint.place} holds numbers that are not finite (NaN or infinite), so the model computes "
        "nothing; download it again or choose another checkpoint"
    )
