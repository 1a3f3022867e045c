"""Runs that stay in memory: on a model that a program holds already, or on one that is loaded and never saved.

They take the same path as runs into a folder; only what would be written is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from editcli.editing.session import ModelSession
from editcli.errors import ModelError, StateError
from editcli.evaluation.metrics import Evaluation
from editcli.models.architectures import Family, resolve
from editcli.models.chat_settings import ChatSettings
from editcli.models.loading import LoadedModel, ModelSource, refuse_unopenable
from editcli.models.offload import replace_weight
from editcli.models.tokens import Tokens
from editcli.plugin.interfaces import Site
from editcli.plugin.manager import Plugins
from editcli.reporting import Reporter, RunReport
from editcli.runs import planning
from editcli.runs.apply import Run, writing
from editcli.runs.clock import Clock
from editcli.runs.folder import ReadOnlyFolder
from editcli.runs.outcome import provenance
from editcli.runs.output import Verified, stored_tensors, verify, write_model
from editcli.runs.planning import Planned
from editcli.runs.stream import Stream
from editcli.storage.checkpoint import DTYPES, Checkpoint, TensorEntry
from editcli.storage.files import tensors_digest
from editcli.storage.folders import new_folder

MEMORY = "(memory)"
"""What stands where a run that is kept would name its folder or its base."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HeldWeights(Checkpoint):
    """The weights of a model in memory, in the place of its files; the edited ones as they were at the start."""

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

    @cached_property
    def files(self) -> tuple[str, ...]:
        """No file: a model in memory has none that could be trusted to hold the same weights."""
        return ()

    def keep(self, names: Iterable[str]) -> None:
        """Copy tensors that are about to be edited, so that they can be read as they were."""
        self._copies.update({name: self._parameters[name].detach().clone() for name in names})

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Return one tensor as it was at the start."""
        return self._copies.get(name, self._parameters[name]).detach().to(device)

    def fingerprint(self) -> str:
        """Return nothing: without files there is nothing that a later run could be compared with."""
        return ""

    def digest_of(self, names: Iterable[str]) -> str:
        """Return a sha256 over the named tensors and the tokenizer, on which cached statistics depend."""
        named = ((name, self.read(name)) for name in sorted(names))
        return tensors_digest(named, salt=self._tokenizer.backend_tokenizer.to_str())


@dataclass(frozen=True)
class HeldModel(LoadedModel):
    """A model that a program holds: its baseline is what it was when it was handed over."""

    weights: HeldWeights = field(kw_only=True)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The weights at the start."""
        return self.weights


def hold(
    model: Any, tokenizer: Any, *, families: Sequence[Family] = (), chat_template: bool | ChatSettings = False
) -> HeldModel:
    """Take a loaded transformers model and its tokenizer as they are; raises :class:`ModelError`."""
    if not isinstance(model, PreTrainedModel):
        what = "pass a loaded transformers model (merge an adapter into it first), a folder or a hub id"
        raise ModelError(f"a {type(model).__name__} cannot be edited; {what}")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ModelError("part of the model is not in memory but offloaded; load it whole, or pass its folder")
    strange = next((p.dtype for p in model.parameters() if p.dtype not in _NAMES), None)
    if strange is not None:
        raise ModelError(f"the model has weights of type {strange}, which editcli cannot read; load it unquantised")
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = Tokens(tokenizer, max_length=length, chat_template=chat_template).of_model(model)
    name = str(model.config.name_or_path or MEMORY)
    source = ModelSource(name, Path(name))
    return HeldModel(model, tokens, resolve(model, families), source, weights=HeldWeights(model, tokenizer))


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Put a model into the state in which it is edited, and its modes and gradients back afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module in training:
            # Set one by one, because train() would also reach parts that the program had frozen.
            module.training = True
        for parameter in wanted:
            parameter.requires_grad_(True)


class Unrecorded(ReadOnlyFolder):
    """The folder of a run that stays in memory."""

    def __init__(self) -> None:
        super().__init__(Path(MEMORY))

    @property
    def is_run(self) -> bool:
        """Never: there is nothing to go on with."""
        return False


class Saved(Run):
    """A run into a folder whose model a program goes on with."""

    weights: Mapping[Site, Tensor]
    """The edited weights as they are read out, once the run has ended."""
    idle: bool = False
    """Whether every edit was true already, so that those weights are the base's."""

    def stream(self) -> Stream:
        """Return the stream, and remember its session."""
        stream = super().stream()
        self.session, self.weights = stream.session, {}
        return stream

    def save(self, session: ModelSession, weights: Mapping[Site, Tensor], *, idle: bool = False) -> Verified | None:
        """Write the model folder, and remember what was written."""
        self.weights, self.idle = weights, idle
        return super().save(session, weights, idle=idle)

    def export(self, folder: Path) -> Path:
        """Write the model as it is read out into a new folder."""
        if not self.weights:
            raise StateError("there is no edit in this model, so there is nothing to save")
        with writing(folder), new_folder(folder) as partial:
            self.write_plain(partial)
        return folder

    def write_plain(self, folder: Path) -> None:
        """Copy the base's files with the edited tensors replaced, and verify the copy."""
        tensors = stored_tensors(self.session, self.weights)
        write_model(self.loaded.checkpoint, folder, tensors)
        verify(self.loaded.checkpoint, folder, tensors, idle=self.idle)
        refuse_unopenable(folder, trust_remote_code=self.recipe.trust_remote_code)


class Unsaved(Saved):
    """A run whose result is the model in memory: the one that is held, or else the plan's, loaded for it."""

    def __init__(
        self, planned: Planned, plugins: Plugins, reporter: Reporter, clock: Clock, *, held: HeldModel | None = None
    ):
        super().__init__(planned, Unrecorded(), plugins, reporter, clock)
        self._held = held

    def open(self) -> None:
        """Take the model that is held, or load the plan's."""
        with self.clock.spent("load"):
            self.loaded = self._held or planning.open_planned(self.planned)
            if self._held is not None:
                stored = self._held.weights.tensor_for
                self._held.weights.keep(stored(f"{site.module}.weight") for site in self.planned.sites)
            self.provenance = provenance(self.planned, self.plugins, self.loaded)

    def mark_running(self) -> None:
        """Say nothing: nobody else can see this run."""

    def leave(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """End as a run that is done does: there is nothing to resume."""
        return self.finish(stream, before)

    def save(self, session: ModelSession, weights: Mapping[Site, Tensor], *, idle: bool = False) -> Verified | None:
        """Write nothing."""
        self.weights, self.idle = weights, idle

    def write_plain(self, folder: Path) -> None:
        """Let a model that came from no files write itself."""
        if self._held is None:
            super().write_plain(folder)
        else:
            self._held.model.save_pretrained(folder)
            self._held.tokens.tokenizer.save_pretrained(folder)

    def _save_base(self) -> None:
        """Write nothing."""

    def document(self, stream: Stream, report: RunReport, after: Evaluation | None) -> None:
        """Write nothing."""

    def finish(self, stream: Stream, before: Evaluation | None) -> RunReport:
        """Measure the model as it is read out; the report names no folder."""
        return replace(super().finish(stream, before), out="")


def put_back(loaded: LoadedModel, sites: Iterable[Site]) -> None:
    """Give edited matrices the values that they had at the start, bit by bit."""
    for site in sites:
        stored = loaded.checkpoint.read(loaded.checkpoint.tensor_for(f"{site.module}.weight"))
        replace_weight(loaded.architecture.projection(site.layer), stored)
