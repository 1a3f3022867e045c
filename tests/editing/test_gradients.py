"""Gradients of targets and of reference text, against autograd on a real tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from editcli.editing.curvature import GradientMoments
from editcli.editing.session import ModelSession
from editcli.errors import StatisticsError
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.settings.core import StatisticsOptions
from editcli.statistics.moments import SecondMoments
from editcli.testing import tiny_model_folder, tiny_session
from editcli.testing.sessions import tiny_requests


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelSession:
    """A session on a tiny model, one for each way round in which weights are stored."""
    return tiny_session(tmp_path_factory.mktemp("model"), request.param)


def slopes(loaded: LoadedModel, ids: list[int], start: int, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return dL/dW of the mean cross-entropy of the tokens from ``start`` on, by transformers and autograd."""
    row = torch.tensor([ids])
    labels = row.clone()
    labels[:, :start] = -100
    for weight in weights:
        weight.requires_grad_(True)
    try:
        return list(torch.autograd.grad(loaded.model(input_ids=row, labels=labels).loss, weights))
    finally:
        for weight in weights:
            weight.requires_grad_(False)


@pytest.mark.parametrize("ended", [False, True])
def test_the_gradient_is_autograds_with_the_end_of_the_text_where_it_is_learned(
    session: ModelSession, ended: bool
) -> None:
    loaded, batch = session.loaded, tiny_requests(0)[:1]
    (text,) = loaded.tokens.encode([loaded.tokens.locate(batch[0], batch[0].target_new)])
    end = [loaded.tokens.tokenizer.eos_token_id] if ended else []
    assert end != [None]
    weights = [loaded.architecture.projection(site.layer).weight for site in session.sites]
    expected = slopes(loaded, [*text.ids[: text.target.stop], *end], text.target.start, weights)
    measured = session.gradients(batch, positions="all", ended=ended)
    for site, slope in zip(session.sites, expected, strict=True):
        found = measured.sites[site].gradients @ measured.sites[site].inputs.T
        torch.testing.assert_close(found, slope.T if site.transposed else slope, rtol=1e-4, atol=1e-6)


def test_a_target_that_ends_with_the_end_of_the_text_is_not_ended_twice(session: ModelSession) -> None:
    tokens, request = session.loaded.tokens, tiny_requests(0)[0]
    (text,) = tokens.encode([tokens.locate(request, request.target_new)])
    once = tokens.ended(text)
    assert len(once.target) == len(text.target) + 1
    assert once.ids[once.target.stop - 1] == once.target_ids[-1] == tokens.tokenizer.eos_token_id
    assert tokens.ended(once) is once


@pytest.fixture
def moments(tmp_path: Path) -> SecondMoments:
    """Statistics of a tiny model on a short text."""
    (tmp_path / "text.txt").write_text("The city of Paris is in France\nAnn was born in Rome\n" * 3)
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", "llama")), device="cpu")
    options = StatisticsOptions(tokens=20)
    return SecondMoments(loaded, options=options, corpus=str(tmp_path / "text.txt"), cache=tmp_path / "cache")


def test_moments_of_gradients_are_those_of_the_texts_summed_loss(moments: SecondMoments) -> None:
    """The reference differentiates the sum of the cross-entropies of every row with respect to a zero offset."""
    loaded = moments.loaded
    sites = [loaded.architecture.site(layer) for layer in (0, 1)]
    sums, left, seen = dict.fromkeys(sites), 20, 0
    for ids in moments.corpus.read(20):
        ids, left = ids[:left], left - len(ids[:left])
        if len(ids) < 2:
            break
        seen += len(ids) - 1
        row, offsets, hooks = torch.tensor([ids]), {}, []
        for site in sites:
            offsets[site] = torch.zeros(len(ids), loaded.architecture.shape(site.layer)[0], requires_grad=True)
            module = loaded.architecture.projection(site.layer)
            hooks.append(module.register_forward_hook(lambda m, i, o, add=offsets[site]: o + add))
        with torch.enable_grad():
            logits = loaded.model(input_ids=row).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum")
            gradients = torch.autograd.grad(loss, list(offsets.values()))
        for hook in hooks:
            hook.remove()
        for site, gradient in zip(sites, gradients, strict=True):
            outer = gradient.double().T @ gradient.double()
            sums[site] = outer if sums[site] is None else sums[site] + outer
    measure = GradientMoments(loaded, sites, moments)
    for site in sites:
        torch.testing.assert_close(measure(site), sums[site] / seen, rtol=1e-3, atol=1e-6)


def test_moments_of_gradients_are_kept_for_the_next_run(
    moments: SecondMoments, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = [moments.loaded.architecture.site(layer) for layer in (0, 1)]
    first = {site: GradientMoments(moments.loaded, sites, moments)(site) for site in sites}
    monkeypatch.setattr(GradientMoments, "_measure", lambda self: pytest.fail("it is measured again"))
    again = GradientMoments(moments.loaded, sites, moments)
    assert all(torch.equal(again(site), first[site]) for site in sites)


def test_an_edited_model_has_no_moments(tmp_path: Path) -> None:
    session = tiny_session(tmp_path)
    site = session.sites[0]
    assert session.gradient_moment(site).shape == (session.weight(site).shape[0],) * 2
    session.set_weight(site, 2 * session.weight(site))
    with pytest.raises(StatisticsError, match="unedited"):
        session.gradient_moment(site)
