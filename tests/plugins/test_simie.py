import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch

from editcli.cli.config import refuse_idle_options
from editcli.editing.pipeline import commit, edit_batch
from editcli.errors import OptionError, RequestError
from editcli.plugin.interfaces import Dense
from editcli.plugin.manager import load_plugins
from editcli.plugin.options import build
from editcli.plugin.wrapping import give_wrapped
from editcli.reporting import Silent
from editcli.runs import planning
from editcli.runs.planning import component
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import Recipe
from editcli.testing import EditorContract, tiny_requests, tiny_session
from editcli_simie.editor import SimIE
from tests.plugins.test_stacks import EDITORS
from tests.support.facts import CAPITALS, requests_of, write_lines
from tests.support.sessions import FakeSession, Witness, assert_close, write_batch

PLUGINS = load_plugins()
RIDGE, W = 3.0, 5.0
SETTINGS = {"memit": {"mom2_update_weight": W}, "ultraedit": {"lr": 0.01}, "nse": {"met": 0.0}}


def make(**options: Any) -> SimIE:
    settings = {**SETTINGS, "simie": {"ridge": RIDGE, **options}}
    return component(PLUGINS, "editor", "simie", settings)


def ready(session: Any, **options: Any) -> SimIE:
    editor = make(**options)
    editor.prepare(session)
    return editor


def alone(session: FakeSession, batch: Any) -> dict[Any, torch.Tensor]:
    """Return W~ of each site: MEMIT with explicit inverses, on the unedited model."""
    values = session.values(batch)
    with session.under({}, unedited=True):
        for site in session.sites:
            K, R = session.keys(batch, site), session.residual(batch, site, values)
            update = R @ K.T @ torch.linalg.inv(W * session.second_moment(site) + K @ K.T)
            session.weights[site] = session.weights[site] + update.float()
        return dict(session.weights)


def test_a_stream_of_batches_equals_the_published_update(session):
    editor = ready(session)
    gram = {site: RIDGE * torch.eye(session.shape[1]).double() for site in session.sites}
    for number in range(4):
        batch, before = requests_of(f"b{number}", 3), session.masters()
        ideal, seen = alone(session, batch), session.gradients(batch, positions="all").sites
        write_batch(session, editor, batch, [witness := Witness()])
        for site in session.sites:
            K = seen[site].inputs
            gram[site] = gram[site] + K @ K.T
            towards = ideal[site].double() - before[site].double()
            assert_close(witness.updates[site].dense(), towards @ K @ K.T @ torch.linalg.inv(gram[site]), 1e-5)
    for site in session.sites:
        assert_close(editor.memory[site.module].matrix, torch.linalg.inv(gram[site]), 1e-5)


@pytest.mark.parametrize("per_layer", [False, True])
def test_the_order_of_the_batches_makes_no_difference(tmp_path, per_layer):
    """What the wrapped editor makes of a batch, and what the sites read, depend on nothing that was written before."""
    weights = []
    for order in ((0, 1, 2), (2, 0, 1)):
        session = tiny_session(tmp_path)
        session.options = TargetOptions(steps=3, prefixes=1, prefix_tokens=2, per_layer=per_layer)
        editor = ready(session)
        for number in order:
            written = edit_batch(session, editor, (), tiny_requests(number), lambda *_: None)
            commit(session, editor, (), tiny_requests(number), written)
        weights.append([session.weight(site) - session.baseline(site) for site in session.sites])
    for one, other in zip(*weights, strict=True):
        assert float(one.norm()) > 0
        assert_close(one, other, 1e-3)


def test_the_wrapped_editor_starts_afresh_with_every_batch(session):
    """MEMIT with its memory is MEMIT without, since it never writes a second batch."""
    other, batches = FakeSession(session.shape, small=session.small), [requests_of(f"b{n}", 3) for n in range(3)]
    remembering = component(PLUGINS, "editor", "simie", {**SETTINGS, "memit": {**SETTINGS["memit"], "remember": True}})
    plain = component(PLUGINS, "editor", "simie", SETTINGS)
    for one, editor in ((session, plain), (other, remembering)):
        editor.prepare(one)
        for batch in batches:
            write_batch(one, editor, batch)
    assert all(torch.equal(session.weight(site), other.weight(site)) for site in session.sites)


@pytest.mark.parametrize("name", [name for name in EDITORS if name != "simie"])
def test_it_wraps_every_editor(session, name):
    editor = make(editor=name)
    inner = PLUGINS.find("editor", name).component
    assert isinstance(editor.wrapped, inner)
    session.sites = session.sites[-1:] if editor.single_site else session.sites
    editor.prepare(session)
    for number in range(2):
        written = write_batch(session, editor, requests_of(f"b{number}", 3))
        assert bool(written.problems) is editor.needs_values
        assert all(0 < update.norm() < float("inf") for update in written.updates.values())


def test_an_edit_that_the_model_answers_is_already_true_until_the_stream_has_written(session):
    """Its loss is that on the unedited model, which says nothing about the weights of a stream."""
    batch = requests_of("b", 2)
    settings = {**SETTINGS, "simie": {"editor": "ft"}, "ft": {"stop_loss": 1e9}}
    editor = component(PLUGINS, "editor", "simie", settings)
    editor.prepare(session)
    first = write_batch(session, editor, batch)
    assert first.already_true == ("b-0", "b-1")
    assert all(update.norm() == 0 for update in first.updates.values())
    session.write(session.sites[0], Dense(torch.ones(session.shape)))
    assert write_batch(session, editor, batch).already_true == ()


def test_an_edit_that_was_given_up_moves_nothing_and_is_not_remembered(session, monkeypatch):
    values = session.values
    monkeypatch.setattr(session, "values", lambda requests: values(requests).drop({1: "given up"}))
    editor, batch = ready(session), requests_of("b", 2)
    problem = write_batch(session, editor, batch).problems[session.sites[0]]
    seen = session.gradients(batch, positions="all").sites[session.sites[0]]
    gram = RIDGE * torch.eye(session.shape[1]).double() + seen.inputs[:, :3] @ seen.inputs[:, :3].T
    assert_close(editor.memory[session.sites[0].module].matrix, torch.linalg.inv(gram), 1e-5)
    assert not problem.residual[:, 3:].any()


def test_a_relative_ridge_is_in_units_of_the_keys(session, monkeypatch):
    one = ready(session, ridge_kind="relative")
    moment, mean = session.second_moment, session.second_moment(session.sites[0]).diagonal().mean()
    module = session.sites[0].module
    assert_close(one.memory[module].matrix, torch.eye(session.shape[1]).double() / (RIDGE * mean))
    monkeypatch.setattr(session, "second_moment", lambda site: 100 * moment(site))
    assert_close(ready(session, ridge_kind="relative").memory[module].matrix, one.memory[module].matrix / 100)


def test_a_batch_of_many_tokens_is_recorded_as_one_matrix():
    session = FakeSession((6, 11))
    editor = ready(session)
    few, many = (write_batch(session, editor, requests_of(f"b{n}", n)).updates for n in (1, 4))
    assert all(set(update.parts) == {"left", "right"} for update in few.values())
    assert all(set(update.parts) == {"dense"} for update in many.values())


def test_an_editor_that_cannot_be_wrapped_is_refused(session):
    with pytest.raises(OptionError, match=r"simie\.editor: simie wraps an editor itself"):
        make(editor="simie")
    with pytest.raises(OptionError, match=r"simie\.editor: there is no editor named 'memti'; did you mean 'memit'"):
        make(editor="memti")
    with pytest.raises(OptionError, match=r"simie\.editor: 'encore' is a named stack"):
        make(editor="encore")
    with pytest.raises(OptionError, match=r"simie\.editor: moeedit writes routed experts"):
        make(editor="moeedit")
    with pytest.raises(OptionError, match="without the editor"):
        SimIE().prepare(session)
    with pytest.raises(OptionError, match="ridge"):
        build(SimIE.Options, {"ridge": 0.0}, owner="simie")


def test_only_an_editor_that_wraps_is_given_another():
    memit = component(PLUGINS, "editor", "memit", {})
    give_wrapped(memit, {}, PLUGINS)
    assert memit.wrapped is None


def test_a_run_takes_the_options_and_the_layers_of_the_wrapped_editor(tmp_path):
    """And records them, so that a resumed run has to have the same."""
    file = write_lines(tmp_path / "edits.jsonl", CAPITALS)
    settings = {"simie": {"editor": "ultraedit"}, "ultraedit": {"lr": 0.5}}
    recipe = Recipe(edits=str(file), editor="simie", settings=settings, out=str(tmp_path / "out"))
    refuse_idle_options(recipe, ["simie.editor=ultraedit", "ultraedit.lr=0.5"], PLUGINS)
    with pytest.raises(OptionError, match=r"simie, which wraps ultraedit; add -o simie\.editor=memit"):
        refuse_idle_options(recipe, ["memit.ridge=1"], PLUGINS)
    planned = planning.check(recipe, PLUGINS, Silent())
    alone = planning.check(dataclasses.replace(recipe, editor="ultraedit", settings={}), PLUGINS, Silent())
    assert planned.layers == alone.layers
    assert [part.name for part in planned.components] == ["simie", "ultraedit"]
    assert planned.components[1].options.lr == 0.5


def test_a_run_takes_the_edits_that_the_wrapped_editor_takes(tmp_path):
    """One without a subject, and with a target of any length, where that editor optimises no targets."""
    edits = [{"prompt": "Where does the train to Rome stop?", "target_new": "Lyon " * 120}]
    file = write_lines(tmp_path / "edits.jsonl", edits)
    settings = {"simie": {"editor": "ft"}}
    recipe = Recipe(edits=str(file), editor="simie", settings=settings, out=str(tmp_path / "out"))
    assert len(planning.check(recipe, PLUGINS, Silent()).requests) == 1
    with pytest.raises(RequestError, match="simie writes a fact at its subject's last token"):
        planning.check(dataclasses.replace(recipe, settings={}), PLUGINS, Silent())


@pytest.mark.slow
class TestOverAnEditorWithoutTargets(EditorContract):
    """An undo begins such a batch again."""

    component = SimIE
    options: ClassVar[Mapping[str, Any]] = {"editor": "ft"}
