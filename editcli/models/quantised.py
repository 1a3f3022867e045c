"""Open a model and quantise it in memory, as the library does that people quantise with.

``gguf:TYPE`` takes every matrix through the ``gguf`` package and back. The types are those that llama.cpp's
``llama-quantize`` chooses, as far as the package can write them:

- TYPE for the weights of linear maps and for the token embedding, in blocks along the input dimension;
- Q8_0 for the output head, also where it is the token embedding (llama.cpp takes Q6_K there if a row is a multiple of
  256 long, which the package does not write);
- F16 for rows that are not a multiple of a block long;
- position embeddings, norms and biases stay as they are.

``int8`` and ``nf4`` are loaded by transformers with bitsandbytes: all linear maps but the output head. Weights are
then multiplied as bitsandbytes does it, so ``int8`` rounds activations as well; ``gguf`` computes in the model's dtype.
"""

from __future__ import annotations

import importlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from editcli.models.loading import (
    LoadedModel,
    Loading,
    ModelSource,
    choose_device,
    choose_dtype,
    load_config,
    open_model,
)
from editcli.models.offload import read_weight, replace_weight
from editcli.models.quantisation import GGUF, INT8, Quantisation
from editcli.plugin.families import Family
from editcli.reporting import Reporter, Silent

HEAD_TYPE, FALLBACK_TYPE = "Q8_0", "F16"
"""GGUF types of the output head, and of rows that no block divides."""
_ROWS = 4096
"""Rows that are quantised at a time, so that a large embedding takes little memory."""


@dataclass(frozen=True, slots=True)
class QuantisedModel:
    """A model whose weights were quantised in memory, and what was done to them."""

    loaded: LoadedModel
    library: str
    """The package that quantised, with its version."""
    tensors: Mapping[str, tuple[str, ...]]
    """The matrices by the type in which they are now; ``*`` in a name stands for every number."""


def open_quantised(
    source: ModelSource,
    quantisation: Quantisation,
    *,
    loading: Loading,
    families: Sequence[Family] = (),
    reporter: Reporter | None = None,
) -> QuantisedModel:
    """Load a model anew and quantise it; its files stay as they are.

    Raises :class:`OptionError` where the package that quantises is missing, :class:`ModelError` as
    :func:`~editcli.models.loading.open_model` does.
    """
    quantisation.require()
    if quantisation.kind == GGUF:
        loaded = open_model(source, loading, families=families, reporter=reporter)
        return QuantisedModel(loaded, f"gguf {version('gguf')}", _round_trip(loaded, quantisation.type, reporter))
    kinds = _bitsandbytes_layers()
    config = _bitsandbytes_config(source, quantisation, loading)
    loaded = open_model(source, replace(loading, quantisation=config), families=families, reporter=reporter)
    tensors = _grouped((_type_of(module, kinds, quantisation), name) for name, module in _matrices(loaded.model))
    return QuantisedModel(loaded, f"bitsandbytes {version('bitsandbytes')}", tensors)


@contextmanager
def quiet_kernels() -> Iterator[None]:
    """Keep bitsandbytes from saying at every product in which dtype it computes."""
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def through_gguf(weight: Tensor, type: str) -> Tensor:
    """Return a matrix (rows, columns) after quantising its rows to a GGUF type and back, float32 on the CPU."""
    # An extra brings the package; nothing else needs it.
    import gguf

    kind = gguf.GGMLQuantizationType[type]
    out = torch.empty(weight.shape, dtype=torch.float32)
    for start in range(0, len(weight), _ROWS):
        rows = weight[start : start + _ROWS].detach().to("cpu", torch.float32).contiguous().numpy()
        out[start : start + _ROWS] = torch.from_numpy(gguf.dequantize(gguf.quantize(rows, kind), kind))
    return out


def _round_trip(loaded: LoadedModel, type: str, reporter: Reporter | None) -> Mapping[str, tuple[str, ...]]:
    """Quantise the matrices of a loaded model to GGUF and back; return them by type."""
    plan = list(_plan(loaded, type))
    with (reporter or Silent()).phase("Quantising", len(plan), "matrices") as advance:
        for _, module, chosen in plan:
            if chosen is not None:
                weight = read_weight(module)
                turned = weight.T if isinstance(module, Conv1D) else weight
                value = through_gguf(turned, chosen)
                replace_weight(module, (value.T if isinstance(module, Conv1D) else value).to(weight))
            advance(1)
    return _grouped((chosen or _dtype_name(module), name) for name, module, chosen in plan)


def _plan(loaded: LoadedModel, type: str) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield each matrix with its GGUF type; None for one that stays as it is."""
    import gguf

    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type]][0]
    embedding, head = loaded.model.get_input_embeddings(), loaded.architecture.head
    for name, module in _matrices(loaded.model):
        weight = module.get_parameter("weight")
        if not isinstance(module, (nn.Linear, Conv1D)) and module is not embedding:
            yield name, module, None
            continue
        width = weight.shape[0] if isinstance(module, Conv1D) else weight.shape[1]
        is_head = weight is head.get_parameter("weight")
        yield name, module, FALLBACK_TYPE if width % block else HEAD_TYPE if is_head else type


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module with a weight of two dimensions, a weight that several share once."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and id(weight) not in seen:
            seen.add(id(weight))
            yield name, module


def _bitsandbytes_layers() -> tuple[type[Any], ...]:
    """Import bitsandbytes and return its linear maps."""
    missing = object()
    before = sys.modules.get("kernels", missing)
    # While it is imported, bitsandbytes fetches code from a hub if the package kernels is there. Nothing is fetched
    # unless the user names it, so the package is out of sight meanwhile.
    if before is missing:
        sys.modules["kernels"] = None  # pyright: ignore[reportArgumentType]
    try:
        with quiet_kernels():
            layers: Any = importlib.import_module("bitsandbytes.nn")
    finally:
        if before is missing:
            del sys.modules["kernels"]
    return layers.Linear4bit, layers.Linear8bitLt


def _bitsandbytes_config(source: ModelSource, quantisation: Quantisation, loading: Loading) -> Any:
    if quantisation.kind == INT8:
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    config = load_config(source, trust_remote_code=loading.trust_remote_code)
    dtype = choose_dtype(loading.dtype, config, choose_device(loading.device))
    # Products are taken in the dtype of the unquantised measurement, so that quantisation is all that differs.
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantisation.kind, bnb_4bit_compute_dtype=dtype
    )


def _type_of(module: nn.Module, kinds: tuple[type[Any], ...], quantisation: Quantisation) -> str:
    return quantisation.kind if isinstance(module, kinds) else _dtype_name(module)


def _dtype_name(module: nn.Module) -> str:
    return str(module.get_parameter("weight").dtype).removeprefix("torch.")


def _grouped(pairs: Iterator[tuple[str, str]]) -> Mapping[str, tuple[str, ...]]:
    """Return names by type, with ``*`` for their numbers, each once and in order."""
    groups: dict[str, dict[str, None]] = {}
    for type, name in pairs:
        groups.setdefault(type, {})[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] = None
    return {type: tuple(names) for type, names in groups.items()}
