"""A session on a tiny model, three edits a batch and the simplest editor: what contract tests are run on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from editcli.editing.session import ModelSession, PilotSource
from editcli.models.loading import open_model, resolve_model
from editcli.plugin.interfaces import Editor, Problem, Site, Update
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

SUBJECTS = ("Paris", "Rome", "Berlin", "Tokyo", "Ann", "Bob", "France", "Italy", "Spain")


class PlainEditor(Editor):
    """The simplest editor there is, to test stabilizers and diagnostics on: least squares with C = I."""

    name: ClassVar[str] = "plain"
    reference: ClassVar[str] = "ridge regression"

    def solve(self, problem: Problem) -> Update:
        keys = problem.keys.double()
        system = keys.T @ keys + torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
        return Update(problem.residual.double() @ torch.linalg.inv(system), keys)


def tiny_session(
    folder: Path, family: str = "llama", *, layers: Sequence[int] = (0, 1), square: bool = False
) -> ModelSession:
    """Open a session on a tiny random model in ``folder``, with made-up second moments and three pilot edits.

    ``family`` is a name of :data:`editcli.testing.TINY`; ``square`` makes the MLP as wide as the stream.
    """
    from editcli.testing.models import tiny_model_folder

    path = folder / (f"{family}-square" if square else family)
    if not path.exists():
        tiny_model_folder(path, family, square=square)
    loaded = open_model(resolve_model(path), device="cpu")
    session = ModelSession(
        loaded,
        layers,
        options=TargetOptions(steps=3, prefixes=1, prefix_tokens=2),
        second_moment=lambda site: tiny_second_moment(session.weight(site).shape[1], seed=site.layer),
        pilots=PilotSource(tuple(tiny_requests(9)), "made for tests"),
    )
    return session


def tiny_second_moment(size: int, *, seed: int = 0) -> Tensor:
    """Return a made-up Cov, (size, size) float64, positive definite with eigenvalues from 0.001 to 1."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    return (basis * torch.logspace(-3, 0, size, dtype=torch.float64)) @ basis.T


def tiny_requests(number: int) -> list[EditRequest]:
    """Return the three edits of batch ``number``."""
    subjects = [SUBJECTS[(3 * number + offset) % len(SUBJECTS)] for offset in range(3)]
    return [EditRequest(f"{number}-{s}", "The city of ", s, " is in", "Greece") for s in subjects]


def tiny_problem(session: ModelSession, site: Site, *, edits: int = 3, seed: int = 0) -> Problem:
    """Return made-up keys and residuals of ``edits`` edits at ``site``, float32."""
    rows, columns = session.weight(site).shape
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(size, edits, generator=generator) for size in (columns, rows))
    return Problem(site, *draw)


def through_bytes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take tensors through the file format in which snapshots are kept."""
    return load(save({name: tensor.cpu().contiguous() for name, tensor in state.items()}))


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two states hold the same tensors under the same names, bit by bit."""
    return set(one) == set(other) and all(_same(tensor, other[name]) for name, tensor in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
