"""MoEEdit against the paper's notation, and what a session knows of experts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editcli.editing.pipeline import Written, commit, edit_batch
from editcli.editing.session import ModelSession
from editcli.errors import OptionError
from editcli.requests.schema import EditRequest
from editcli.testing import EXPERTS, tiny_requests, tiny_session
from editcli_moeedit.editor import MoEEdit
from editcli_moeedit.mixture import Mixture, filled
from tests.support.families import needs_packed_experts
from tests.support.sessions import assert_close

pytestmark = needs_packed_experts

OPTIONS: dict[str, Any] = {"threshold_kind": "median", "nullspace_threshold": 1.0, "l2": 0.1}


def write_batch(session: ModelSession, editor: MoEEdit, requests: Sequence[EditRequest]) -> Written:
    """Write a batch as the program does."""
    written = edit_batch(session, editor, (), requests, lambda *_: None)
    commit(session, editor, (), requests, written)
    return written


@pytest.fixture(params=["mixtral", "gpt_oss"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> ModelSession:
    return tiny_session(tmp_path, request.param, routed=True)


def projectors(session: ModelSession, floor: float = 2.0) -> list[list[Tensor]]:
    """Return P_j of every expert of every site, from the moments as the session gives them."""
    every = []
    for site in session.sites:
        moments, tokens = session.expert_moments(site)
        size = moments.shape[-1]
        mean = sum(n * moment for n, moment in zip(tokens, moments, strict=True)) / tokens.sum()
        chosen = []
        for n, moment in zip(tokens, moments, strict=True):
            whole = max(float(n), floor * size)
            values, vectors = torch.linalg.eigh((n * moment + (whole - n) * mean) / whole)
            null = vectors[:, values < values.median()]
            chosen.append(null @ null.T)
        every.append(chosen)
    return every


def by_expert(keys: Tensor) -> list[Tensor]:
    """Return K_j with the gates in it, (d, n) of every expert."""
    return list(keys.double().unflatten(0, (EXPERTS, -1)))


def test_the_update_minimises_the_paper_s_objective(mixed: ModelSession) -> None:
    """One batch: the joint ridge problem over all experts, solved as one dense system of all unknowns."""
    editor = MoEEdit(MoEEdit.Options(**OPTIONS))
    editor.prepare(mixed)
    expected = projectors(mixed)
    written = write_batch(mixed, editor, tiny_requests(0))
    for site, chosen in zip(mixed.sites, expected, strict=True):
        problem = written.problems[site]
        # v_t = (g_t1 P_1 k_t1, ..., g_tE P_E k_tE); the unknown is [X_1 ... X_E].
        v = torch.cat([p @ k for p, k in zip(chosen, by_expert(problem.keys), strict=True)])
        x = problem.residual.double() @ v.T @ torch.linalg.inv(v @ v.T + 0.1 * torch.eye(len(v), dtype=v.dtype))
        update = x @ torch.block_diag(*chosen)
        assert_close(written.updates[site].dense(), update)


def test_later_batches_are_penalised_by_what_each_expert_was_written(mixed: ModelSession) -> None:
    editor = MoEEdit(MoEEdit.Options(**OPTIONS))
    editor.prepare(mixed)
    chosen = projectors(mixed)
    past = [[torch.zeros_like(p) for p in each] for each in chosen]
    for number in range(3):
        written = write_batch(mixed, editor, tiny_requests(number))
        for place, site in enumerate(mixed.sites):
            problem, keys = written.problems[site], by_expert(written.problems[site].keys)
            n = problem.keys.shape[1]
            inverses = [
                torch.linalg.inv(p @ h @ p + 0.1 * torch.eye(len(p), dtype=p.dtype)) @ p
                for p, h in zip(chosen[place], past[place], strict=True)
            ]
            joint = torch.eye(n, dtype=torch.float64)
            joint += sum((k.T @ c @ k for k, c in zip(keys, inverses, strict=True)), torch.zeros_like(joint))
            left = problem.residual.double() @ torch.linalg.inv(joint)
            update = torch.cat([left @ k.T @ c for k, c in zip(keys, inverses, strict=True)], dim=1)
            assert_close(written.updates[site].dense(), update, 1e-5)
            past[place] = [h + k @ k.T for h, k in zip(past[place], keys, strict=True)]


def test_block_coordinate_descent_converges_to_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(5, 8, 8, generator=generator, dtype=torch.float64)
    memory = Mixture(roots @ roots.mT, "site")
    keys = torch.randn(40, 6, generator=generator, dtype=torch.float64).unflatten(0, (5, 8))
    # Each edit is routed to two of the first four experts; nothing reads the last.
    for edit in range(6):
        keys[[e for e in range(5) if e not in (edit % 4, (edit + 1) % 4)], :, edit] = 0
    keys, residual = keys.flatten(0, 1), torch.randn(7, 6, generator=generator, dtype=torch.float64)
    exact = memory.solve(keys, residual).dense()
    errors = []
    for passes in (1, 10, 2000):
        update = memory.descend(keys, residual, [memory.active(keys)] * passes).dense()
        errors.append(float((update - exact).norm() / exact.norm()))
    assert memory.active(keys) == [0, 1, 2, 3]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8
    assert not exact[:, 32:].any()


def test_experts_that_no_edit_is_routed_to_stay_bit_by_bit(mixed: ModelSession) -> None:
    editor = MoEEdit(MoEEdit.Options(**OPTIONS))
    editor.prepare(mixed)
    written = write_batch(mixed, editor, tiny_requests(0)[:1])
    for site in mixed.sites:
        active = editor.memory[site.module].active(written.problems[site].keys)
        assert 0 < len(active) < EXPERTS
        same = (mixed.weight(site) == mixed.baseline(site)).unflatten(1, (EXPERTS, -1)).all(dim=2).all(dim=0)
        assert [expert for expert in range(EXPERTS) if not same[expert]] == active


def test_a_rarely_used_expert_is_given_the_mean_of_the_layer() -> None:
    moments = torch.stack([torch.eye(3) * scale for scale in (1.0, 5.0, 100.0)]).double()
    tokens = torch.tensor([60.0, 20.0, 0.0], dtype=torch.float64)
    mean = (60 * 1 + 20 * 5) / 80
    got = filled(moments, tokens, 40.0)
    assert torch.allclose(got.diagonal(dim1=1, dim2=2).mean(dim=1), torch.tensor([1, (5 + mean) / 2, mean]).double())
    assert torch.equal(filled(moments, tokens, 0.0)[:2], moments[:2])


def test_a_threshold_that_leaves_nothing_or_everything_is_refused(mixed: ModelSession) -> None:
    for threshold, what in ((1e-9, "no direction"), (1e9, "every direction")):
        editor = MoEEdit(MoEEdit.Options(nullspace_threshold=threshold))
        with pytest.raises(OptionError, match=what):
            editor.prepare(mixed)
