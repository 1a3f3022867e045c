"""``targets.per_layer``: the first and the last layer alone, each with a target of its own (BLUE, arXiv 2502.03748)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.reference import plain_target
from editcli.editing.pipeline import Written, commit, edit_batch
from editcli.editing.session import ModelSession, PilotSource
from editcli.models.forward import first, hooked
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import Editor, Stabilizer
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder
from editcli.testing.sessions import tiny_requests, tiny_second_moment
from editcli_ft.editor import FineTuning
from editcli_memit.editor import Memit
from editcli_nas.stabilizer import Nas
from editcli_revive.stabilizer import Revive
from tests.support.facts import REQUESTS

PREFIXES = ("Bob. ", "The river in London is. ")
OPTIONS = TargetOptions(steps=5, prefixes=2, per_layer=True)
WEIGHT = 5.0


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / request.param, request.param)


def opened(folder: Path) -> LoadedModel:
    return open_model(resolve_model(folder), device="cpu")


def session(folder: Path, layers: tuple[int, ...] = (0, 2), options: TargetOptions = OPTIONS) -> ModelSession:
    loaded = opened(folder)
    return ModelSession(
        loaded,
        layers,
        options=options,
        prefixes=PREFIXES,
        second_moment=lambda site: tiny_second_moment(loaded.architecture.shape(site.layer)[1], seed=site.layer),
        pilots=PilotSource(tuple(tiny_requests(9)), "made for tests"),
    )


def write(session: ModelSession, editor: Editor, *stabilizers: Stabilizer) -> Written:
    for part in (editor, *stabilizers):
        part.prepare(session)
    written = edit_batch(session, editor, stabilizers, REQUESTS, lambda *_: None)
    commit(session, editor, stabilizers, REQUESTS, written)
    return written


def at_lookup(loaded: LoadedModel, request: EditRequest, module: torch.nn.Module, *, output: bool) -> Tensor:
    (encoded,) = loaded.tokens.encode([loaded.tokens.locate(request)])
    seen: list[Tensor] = []
    with torch.no_grad(), hooked(module, lambda _, entered, made: seen.append(first(made) if output else entered)):
        loaded.model(input_ids=torch.tensor([encoded.ids]), use_cache=False)
    return seen[0].reshape(len(encoded.ids), -1)[encoded.lookup].double()


def key(loaded: LoadedModel, request: EditRequest, layer: int) -> Tensor:
    projection = loaded.architecture.projection(layer)
    bare, *others = (
        at_lookup(loaded, request.in_context(context), projection, output=False) for context in ("", *PREFIXES)
    )
    return (bare + torch.stack(others).mean(dim=0)) / 2


def test_a_batch_is_the_papers_procedure(folder: Path) -> None:
    """For l in order: the target of l on the model as written so far, the whole residual, one least-squares update."""
    own = session(folder)
    written = write(own, Memit(Memit.Options(mom2_update_weight=WEIGHT)))
    loaded = opened(folder)
    for layer in (0, 2):
        targets = [plain_target(loaded, request, PREFIXES, layer, OPTIONS).target for request in REQUESTS]
        block = loaded.architecture.block(layer)
        now = [at_lookup(loaded, request, block, output=True) for request in REQUESTS]
        residual = torch.stack(targets, dim=1).double() - torch.stack(now, dim=1)
        keys = torch.stack([key(loaded, request, layer) for request in REQUESTS], dim=1)
        moment = WEIGHT * tiny_second_moment(keys.shape[0], seed=layer)
        update = residual @ keys.T @ torch.linalg.inv(moment + keys @ keys.T)
        site = loaded.architecture.site(layer)
        assert float((written.updates[site].dense() - update).norm()) < 2e-3 * float(update.norm())
        weight = loaded.architecture.projection(layer).weight
        weight.data += (update.T if site.transposed else update).to(weight)


def test_every_stage_counts_its_targets_and_what_is_known_is_known_before_the_first(folder: Path) -> None:
    own = session(folder, options=replace(OPTIONS, stop_loss=1e9))
    written = write(own, Memit(), Revive())
    assert written.targets == {"optimised": 2 * len(REQUESTS), "reached": 2 * len(REQUESTS), "clamped": 0}
    assert written.already_true == tuple(request.id for request in REQUESTS)
    assert all(torch.equal(own.weight(site), own.baseline(site)) for site in own.sites)


def test_nas_has_an_anchor_for_every_layer(folder: Path) -> None:
    own, nas = session(folder), Nas()
    written = write(own, Memit(), nas)
    alone = {}
    for site in own.sites:
        single = Nas()
        single.prepare(session(folder, (site.layer,), replace(OPTIONS, per_layer=False)))
        alone[site.module] = single.anchor
    assert {module: figures["anchor"] for module, figures in nas.layers.items()} == pytest.approx(alone)
    assert len(set(alone.values())) == len(own.sites)
    assert set(nas.record()["layers"]) == set(alone)
    resumed = Nas()
    resumed.load_state(own, nas.state())
    assert resumed.state() == nas.state()
    assert written.dropped == {}


def test_an_edit_that_one_layer_writes_is_not_given_up(folder: Path) -> None:
    class Refuses(Stabilizer):
        """Gives the first edit up at one layer, and the second at both."""

        def stabilize_values(self, session, values):
            return values.drop({1: "refused"} if session.sites[-1].layer else {0: "refused", 1: "refused"})

    written = write(session(folder), Memit(), Refuses())
    assert written.dropped == {REQUESTS[1].id: "refused"}


def test_an_editor_without_targets_has_one_stage(folder: Path) -> None:
    own, plain = session(folder), session(folder, options=replace(OPTIONS, per_layer=False))
    for one in (own, plain):
        write(one, FineTuning())
    assert all(torch.equal(own.weight(site), plain.weight(site)) for site in own.sites)
