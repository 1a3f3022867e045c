"""Compare an edited model with its base: tensor by tensor, and by their continuations of the same prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError
from editcli.evaluation.generation import generate
from editcli.linalg import krylov, spectra
from editcli.linalg.ratios import ratio
from editcli.models.architectures import Family, skeleton
from editcli.models.fit import check_fit
from editcli.models.loading import ModelSource, load_config, open_model, resolve_model
from editcli.reporting import Reporter, Silent
from editcli.storage.checkpoint import Checkpoint

RANK_PROBE, RANK_LIMIT = 64, 1024
"""Singular values of a large difference that are looked at first, and at most; their number doubles in between."""
ROUNDING_MARGIN = 2.0
"""Multiples of the largest singular value that rounding alone is expected to leave; what is above counts as rank."""


@dataclass(frozen=True, slots=True)
class TensorDiff:
    """One tensor that differs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    base_dtype: str
    norm: float
    """||B - A||_F."""
    relative: float | None
    """||B - A||_F / ||A||_F; None for a base of zeros."""
    ratio: float | None
    """||B||_F / ||A||_F."""
    largest: float
    """Largest absolute change of one number."""
    rank: int | None
    """Numerical rank of the difference, above what rounding to the stored dtype leaves; None where it is not known."""

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        record = {name: getattr(self, name) for name in self.__slots__}
        return {**record, "shape": list(self.shape)}


@dataclass(frozen=True, slots=True)
class Spoken:
    """The continuations of one prompt by both models."""

    prompt: str
    base: str
    edited: str


@dataclass(frozen=True, slots=True)
class Diff:
    """The result of ``diff``; :meth:`to_json` is the contract of ``--json``."""

    base: str
    edited: str
    compared: int
    """Tensors that both have in one shape."""
    tensors: tuple[TensorDiff, ...]
    missing: tuple[str, ...]
    """Tensors that only the base has."""
    added: tuple[str, ...]
    """Tensors that only the edited model has."""
    reshaped: tuple[str, ...]
    """Tensors of both that cannot be compared, for their shapes differ."""
    generations: tuple[Spoken, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object."""
        return {
            "base": self.base,
            "edited": self.edited,
            "compared": self.compared,
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "missing": list(self.missing),
            "added": list(self.added),
            "reshaped": list(self.reshaped),
            "generations": [{"prompt": s.prompt, "base": s.base, "edited": s.edited} for s in self.generations],
        }


def diff(
    base: str | Path,
    edited: str | Path,
    *,
    ranks: bool = True,
    device: torch.device | None = None,
    reporter: Reporter | None = None,
) -> Diff:
    """Compare two checkpoints tensor by tensor, one pair in memory at a time; raises :class:`ModelError`."""
    reporter = reporter or Silent()
    sources = resolve_model(base), resolve_model(edited)
    before, after = (_checked(source, reporter) for source in sources)
    names = [name for name in before.names() if name in after.entries]
    if not names:
        raise ModelError(f"{sources[0].name} and {sources[1].name} have no tensor in common; compare related models")
    same = [name for name in names if before.shape(name) == after.shape(name)]
    changed = []
    with reporter.phase("Comparing", len(same), "tensors") as advance:
        for name in same:
            first, second = before.read(name), after.read(name)
            if not _equal(first, second):
                kinds = before.stored_as(name), after.stored_as(name)
                changed.append(_tensor_diff(name, first, second, kinds=kinds, ranks=ranks, device=device))
            advance(1)
    return Diff(
        base=sources[0].name,
        edited=sources[1].name,
        compared=len(same),
        tensors=tuple(changed),
        missing=tuple(name for name in before.names() if name not in after.entries),
        added=tuple(name for name in after.names() if name not in before.entries),
        reshaped=tuple(name for name in names if name not in set(same)),
    )


def _checked(source: ModelSource, reporter: Reporter) -> Checkpoint:
    """Return a checkpoint, and warn when it is not the whole model: the comparison may show the reason."""
    checkpoint = source.checkpoint
    try:
        bare = skeleton(load_config(source))
    except ModelError:
        # Tensors can be compared of every checkpoint, also of a model that cannot be edited or needs code to be built.
        for text in checkpoint.remarks():
            reporter.warn(text)
        return checkpoint
    try:
        check_fit(checkpoint, bare, reporter)
    except ModelError as error:
        reporter.warn(str(error))
    return checkpoint


def rounding_level(matrix: Tensor, dtype: torch.dtype) -> float:
    """Return the largest singular value to expect of the rounding of ``matrix`` (rows, columns) to ``dtype``.

    Rounding moves each number by up to half a unit in its last place, which is close to noise of deviation
    eps |w| / sqrt(12) times a factor below one; noise of deviation s has a spectral norm near s (sqrt m + sqrt n).
    """
    rows, columns = matrix.shape
    deviation = torch.finfo(dtype).eps * spectra.frobenius(matrix) / math.sqrt(12 * rows * columns)
    return deviation * (math.sqrt(rows) + math.sqrt(columns))


def numerical_rank(difference: Tensor, floor: float, *, device: torch.device | None = None) -> int | None:
    """Return how many singular values of a float matrix exceed ``floor`` and its own rounding.

    None when both sides and the rank are above :data:`RANK_LIMIT`: such a difference is not of low rank.
    """
    size = min(difference.shape)
    if size <= spectra.NORM_LIMIT:
        values = spectra.singular_values(difference, device=device)
        return int((values > _floor(values, floor, difference)).sum())
    narrow = difference.to(device or torch.device("cpu"), torch.float32)
    count = RANK_PROBE
    while count <= RANK_LIMIT:
        values = krylov.leading(narrow, count).values.cpu()
        rank = int((values > _floor(values, floor, narrow)).sum())
        if rank < count:
            return rank
        count *= 2
    return None


def _floor(values: Tensor, floor: float, difference: Tensor) -> float:
    rounding = float(values[0]) * max(difference.shape) * torch.finfo(difference.dtype).eps if len(values) else 0.0
    return max(floor, rounding)


def _equal(first: Tensor, second: Tensor) -> bool:
    """Compare bit by bit, so that equal patterns of NaN are equal and -0 differs from 0."""
    if first.dtype != second.dtype:
        return False
    return torch.equal(first.reshape(-1).view(torch.uint8), second.reshape(-1).view(torch.uint8))


def _tensor_diff(
    name: str, first: Tensor, second: Tensor, *, kinds: tuple[str, str], ranks: bool, device: torch.device | None
) -> TensorDiff:
    norm, before = spectra.distance(second, first), spectra.frobenius(first)
    wide = torch.float64 if torch.float64 in (first.dtype, second.dtype) else torch.float32
    difference = second.to(wide) - first.to(wide)
    rank = None
    if ranks and first.ndim == 2 and second.is_floating_point() and math.isfinite(norm):
        rank = numerical_rank(difference, ROUNDING_MARGIN * rounding_level(second, second.dtype), device=device)
    return TensorDiff(
        name=name,
        shape=tuple(first.shape),
        dtype=kinds[1],
        base_dtype=kinds[0],
        norm=norm,
        relative=ratio(norm, before),
        ratio=ratio(spectra.frobenius(second), before),
        largest=float(difference.abs().max()) if difference.numel() else 0.0,
        rank=rank,
    )


def speak(
    report: Diff,
    prompts: Sequence[str],
    *,
    tokens: int = 20,
    device: str = "auto",
    families: Sequence[Family] = (),
    reporter: Reporter | None = None,
) -> Diff:
    """Return ``report`` with both models' greedy continuations of each prompt; one model is in memory at a time."""
    said = []
    for name in (report.base, report.edited):
        loaded = open_model(resolve_model(name), device=device, families=families)
        said.append(generate(loaded, prompts, tokens=tokens, top_k=1, reporter=reporter))
        del loaded  # The next model needs the room.
    spoken = tuple(Spoken(prompt, said[0][prompt].text, said[1][prompt].text) for prompt in dict.fromkeys(prompts))
    return replace(report, generations=spoken)
