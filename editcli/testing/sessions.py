"""A session on a tiny model, three edits a batch and the simplest editor: what contract tests are run on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from editcli.editing.session import ModelSession, PilotSource
from editcli.models.loading import open_model, resolve_model
from editcli.plugin.interfaces import Editor, Gradients, LowRank, Problem, Session, Site, State, Update
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

SUBJECTS = ("Paris", "Rome", "Berlin", "Tokyo", "Ann", "Bob", "France", "Italy", "Spain")


class PlainEditor(Editor):
    """The simplest editor there is, to test stabilizers and diagnostics on: least squares with Q = I."""

    name: ClassVar[str] = "plain"
    reference: ClassVar[str] = "ridge regression"

    def solve(self, session: Session, problem: Problem) -> Update:
        keys = problem.keys.double()
        system = keys.T @ keys + torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
        return LowRank(problem.residual.double() @ torch.linalg.inv(system), keys)


def tiny_session(
    folder: Path,
    family: str = "llama",
    *,
    layers: Sequence[int] = (0, 1),
    square: bool = False,
    routed: bool = False,
) -> ModelSession:
    """Open a session on a tiny random model in ``folder``, with made-up second moments and three pilot edits.

    ``family`` is a name of :data:`editcli.testing.TINY` or :data:`editcli.testing.MIXTURES`, whose routed experts are
    the sites with ``routed``; ``square`` makes the MLP as wide as the stream.
    """
    from editcli.testing.models import tiny_model_folder

    path = folder / (f"{family}-square" if square else family)
    if not path.exists():
        tiny_model_folder(path, family, square=square)
    loaded = open_model(resolve_model(path), device="cpu")
    loaded = replace(loaded, architecture=replace(loaded.architecture, routed=routed))
    session = ModelSession(
        loaded,
        layers,
        options=TargetOptions(steps=3, prefixes=1, prefix_tokens=2),
        second_moment=lambda site: _tiny_moment(site, session.weight(site).shape[1]),
        gradient_moment=lambda site: tiny_second_moment(session.weight(site).shape[0], seed=site.layer),
        pilots=PilotSource(tuple(tiny_requests(9)), "made for tests"),
    )
    return session


class ScaledGradients:
    """A session whose gradients are ``factor`` times those of another, and which is that one otherwise."""

    def __init__(self, session: ModelSession, factor: float):
        self._session, self._factor = session, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def gradients(self, requests: Sequence[EditRequest], **options: Any) -> Gradients:
        """Return the session's gradients times the factor; see :meth:`editcli.plugin.Session.gradients`."""
        measured = self._session.gradients(requests, **options)
        sites = {site: replace(seen, gradients=self._factor * seen.gradients) for site, seen in measured.sites.items()}
        return Gradients(measured.loss, sites)


def _tiny_moment(site: Site, size: int) -> Tensor:
    """Return the made-up second moment of a site, or what the statistics hold of its experts."""
    if not site.experts:
        return tiny_second_moment(size, seed=site.layer)
    size //= site.experts
    sums = torch.zeros(site.experts, size + 1, size + 1, dtype=torch.float64)
    for expert in range(site.experts):
        # The last expert reads next to no text.
        tokens = 1000.0 if expert < site.experts - 1 else 3.0
        sums[expert, :-1, :-1] = tokens * tiny_second_moment(size, seed=10 * site.layer + expert)
        sums[expert, -1, -1] = tokens
    return sums


def tiny_second_moment(size: int, *, seed: int = 0) -> Tensor:
    """Return a made-up second moment C, (size, size) float64, positive definite with eigenvalues from 0.001 to 1."""
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


def through_bytes(state: State) -> State:
    """Take a state through the file formats of a snapshot."""
    tensors = load(save({name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}))
    return State(tensors, json.loads(json.dumps(state.json, allow_nan=False)))


def same_state(one: State, other: State) -> bool:
    """Tell whether two states are the same, bit by bit."""
    return same_tensors(one.tensors, other.tensors) and one.json == other.json


def same_tensors(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Tell whether two states hold the same tensors under the same names, bit by bit."""
    return set(one) == set(other) and all(_same(tensor, other[name]) for name, tensor in one.items())


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
