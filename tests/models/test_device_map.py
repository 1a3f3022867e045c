"""A model spread over several places is edited like one in one place: part of it in memory, part of it offloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from editcli.editing.session import ModelSession
from editcli.errors import ModelError
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import LowRank, Problem
from editcli.settings.core import TargetOptions
from editcli.testing import INTERMEDIATE, LAYERS, tiny_model_folder
from tests.support.facts import REQUESTS


def spread(folder: Path, *, offloaded: set[int]) -> LoadedModel:
    """Open a tiny llama with some blocks left in the checkpoint's files until they run."""
    places: dict[str, Any] = {f"model.layers.{i}": "disk" if i in offloaded else "cpu" for i in range(LAYERS)}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    return open_model(resolve_model(folder), device_map={**places, **rest})


def edited(loaded: LoadedModel, **choices: Any) -> list[torch.Tensor]:
    """Write one batch into layers 1 and 2, and return the weights and what the model says afterwards."""
    session = ModelSession(loaded, (1, 2), options=TargetOptions(steps=4, lr=0.1, prefixes=2), seed=3, **choices)
    values = session.values(REQUESTS)
    for site in session.sites:
        problem = Problem(site, session.keys(REQUESTS, site), session.residual(REQUESTS, site, values))
        session.write(site, LowRank(problem.residual, problem.keys))
    ids = loaded.tokens.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return [*session.masters().values(), loaded.model(input_ids=ids).logits]


@pytest.mark.parametrize("offloaded", [{2, 3}, {0, 1}, {1}, {0, 1, 2, 3}])
def test_editing_a_spread_model_equals_editing_it_whole(offloaded: set[int], tmp_path: Path) -> None:
    folder = tiny_model_folder(tmp_path / "model")
    whole, parts = edited(open_model(resolve_model(folder))), edited(spread(folder, offloaded=offloaded))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_a_missing_accelerate_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'editcli\[sharding\]'"):
        spread(tiny_model_folder(tmp_path / "model"), offloaded={1})


def test_an_offloaded_weight_can_be_replaced_again_and_again(tmp_path: Path) -> None:
    loaded = spread(tiny_model_folder(tmp_path / "model"), offloaded={1})
    session = ModelSession(loaded, (1,), prefixes=())
    (site,) = session.sites
    before = session.masters()
    for value in (1.0, 2.0):
        session.set_weight(site, torch.full_like(before[site], value))
        seen = ModelSession(loaded, (1,), prefixes=()).weight(site)
        assert bool((seen == value).all())
    session.restore(before)
    torch.testing.assert_close(ModelSession(loaded, (1,), prefixes=()).weight(site), session.baseline(site))


def test_a_map_of_one_device_puts_no_hooks_on_the_modules(tmp_path: Path) -> None:
    """Weights are read straight onto an accelerator in this way, and everything must still be where it was."""
    folder = tiny_model_folder(tmp_path / "model")
    loaded = open_model(resolve_model(folder), device_map={"": torch.device("cpu")})
    assert not [name for name, module in loaded.model.named_modules() if hasattr(module, "_hf_hook")]
    for one, other in zip(edited(open_model(resolve_model(folder))), edited(loaded), strict=True):
        assert torch.equal(one, other)


def test_linear_algebra_lives_on_the_device_chosen_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that a component is given is asked onto that device, whatever the model computes on."""
    place = torch.device("cpu")
    folder = tiny_model_folder(tmp_path / "model")
    loaded = spread(folder, offloaded={1})
    choices: dict[str, Any] = {
        "options": TargetOptions(steps=1),
        "prefixes": (),
        "second_moment": lambda site: torch.eye(INTERMEDIATE),
    }
    chosen = ModelSession(loaded, (1, 2), solve_device=place, **choices)
    asked: list[Any] = []
    real = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda *given, **more: asked.append(given[1:]) or real(*given, **more))
    site = chosen.sites[0]
    for ask in (chosen.second_moment, chosen.weight, chosen.baseline, lambda s: chosen.keys(REQUESTS, s)):
        assert ask(site).device == place
    assert {seen.inputs.device for seen in chosen.gradients(REQUESTS).sites.values()} == {place}
    assert chosen.device is place
    assert asked.count((place,)) >= 4
    monkeypatch.undo()
    for one, other in zip(edited(loaded), edited(spread(folder, offloaded={1}), solve_device=place), strict=True):
        assert torch.equal(one, other)
