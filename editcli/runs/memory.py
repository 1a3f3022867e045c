"""A model that a program holds: its weights as they were when it was handed over, and how it is given back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editcli.errors import ModelError
from editcli.models.architectures import Family, resolve
from editcli.models.chat_settings import ChatSettings
from editcli.models.loading import LoadedModel, ModelSource
from editcli.models.offload import replace_weight
from editcli.models.tokens import Tokens
from editcli.plugin.interfaces import Site
from editcli.storage.checkpoint import DTYPES, Checkpoint, TensorEntry
from editcli.storage.files import tensors_digest

MEMORY = "(memory)"
"""The name of the folder and of the base of a run in memory."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HeldWeights(Checkpoint):
    """The weights of a model in memory, read like a checkpoint; copied ones are as they were at the start."""

    def __init__(self, model: PreTrainedModel, tokenizer: Any):
        super().__init__(Path(model.config.name_or_path or MEMORY))
        self._parameters = dict(model.named_parameters())
        self._tokenizer = tokenizer
        self._copies: dict[str, Tensor] = {}

    @cached_property
    def entries(self) -> Mapping[str, TensorEntry]:
        """All tensors by name; they lie in no file."""
        known = self._parameters.items()
        return {name: TensorEntry(name, "", _NAMES[p.dtype], tuple(p.shape), 0, 0) for name, p in known}

    def copy(self, names: Iterable[str]) -> None:
        """Copy tensors that are about to be edited, so that they can be read as they were."""
        self._copies.update({name: self._parameters[name].detach().clone() for name in names})

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one tensor as it was at the start."""
        return self._copies.get(name, self._parameters[name]).detach().to(device)

    def fingerprint(self) -> str:
        """Return an empty text: a later run could be compared with files only."""
        return ""

    def digest_of(self, names: Iterable[str]) -> str:
        """Return a sha256 over the named tensors and the tokenizer, on which cached statistics depend."""
        named = ((name, self.read(name)) for name in sorted(names))
        return tensors_digest(named, salt=self._tokenizer.backend_tokenizer.to_str())


def unedited(held: LoadedModel, sites: Iterable[Site]) -> LoadedModel:
    """Return a model of :func:`hold` with copies of the weights at ``sites``, which are about to be edited."""
    weights = held.checkpoint
    assert isinstance(weights, HeldWeights), "hold() makes no other"
    weights.copy(weights.weight_of(site.module) for site in sites)
    return held


def hold(
    model: Any, tokenizer: Any, *, families: Sequence[Family] = (), chat_template: bool | ChatSettings = False
) -> LoadedModel:
    """Take a loaded transformers model and its tokenizer as they are; raises :class:`ModelError`."""
    if not isinstance(model, PreTrainedModel):
        remedy = "pass a loaded transformers model (merge an adapter into it first), a folder or a hub id"
        raise ModelError(f"a {type(model).__name__} cannot be edited; {remedy}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("part of the model is not in memory but offloaded; load it whole, or pass its folder")
    strange = next((p.dtype for p in model.parameters() if p.dtype not in _NAMES), None)
    if strange is not None:
        raise ModelError(f"the model has weights of type {strange}, which editcli cannot read; load it unquantised")
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = Tokens(tokenizer, max_length=length, chat_template=chat_template).of_model(model)
    name = str(model.config.name_or_path or MEMORY)
    source = ModelSource(name, Path(name))
    return LoadedModel(model, tokens, resolve(model, families), source, HeldWeights(model, tokenizer))


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Put a model into the state in which it is edited, and its modes and gradients back afterwards."""
    training = [module for module in model.modules() if module.training]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            # Set one by one, because train() would also reach parts that the program had frozen.
            module.training = True
        for parameter in trained:
            parameter.requires_grad_(True)


def put_back(loaded: LoadedModel, sites: Iterable[Site]) -> None:
    """Give edited matrices the values that they had at the start, bit by bit."""
    for site in sites:
        stored = loaded.checkpoint.read(loaded.checkpoint.weight_of(site.module))
        replace_weight(loaded.architecture.projection(site.layer), stored)
