"""Presets: matched by type and sizes, every key known to its component, and a sensible guess for all other models."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from editcli.editing.targets import TargetOptions
from editcli.models.architectures import resolve, skeleton
from editcli.models.loading import bundled_folder
from editcli.options import build
from editcli.plugins import Plugins, load_plugins
from editcli.presets import Preset, Sizes, all_presets, guess, load_preset, sizes_of
from editcli.recipe import check_section
from editcli.testing import HIDDEN, INTERMEDIATE, LAYERS, tiny_config, tiny_model

NAMES = ("bundled", "gpt-j-6b", "gpt2-xl", "llama-2-7b", "llama-3-8b", "llama-3.2-3b", "qwen2.5-7b")

REAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16}),
    "llama-3-8b": ("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336}),
    "llama-2-7b": ("llama", {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008}),
    "llama-3.2-3b": ("llama", {"hidden_size": 3072, "num_hidden_layers": 28, "intermediate_size": 8192}),
    "qwen2.5-7b": ("qwen2", {"hidden_size": 3584, "num_hidden_layers": 28, "intermediate_size": 18944}),
}
"""The sizes of the real models, as their configurations spell them."""


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def test_all_presets_are_there() -> None:
    assert tuple(preset.name for preset in all_presets()) == NAMES


@pytest.mark.parametrize("preset", [*all_presets(), guess(Sizes("x", 32, 64, 256))], ids=lambda preset: preset.name)
def test_every_key_of_a_preset_is_known(preset: Preset, plugins: Plugins) -> None:
    for name, settings in preset.settings.items():
        check_section(name, settings, plugins)
    build(TargetOptions, preset.settings["targets"], owner="targets")
    assert preset.editor is None or plugins.find("editor", preset.editor)


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_a_preset_is_sound(preset: Preset) -> None:
    assert preset.label == ("tuned" if preset.name == "bundled" else "published")
    assert preset.source
    assert preset.match is not None
    assert list(preset.layers) == sorted(set(preset.layers))
    assert 0 <= preset.layers[0] <= preset.layers[-1] < preset.match.layers - 1


def test_no_two_presets_fit_the_same_model() -> None:
    for one, other in itertools.combinations(all_presets(), 2):
        assert one.match is not None
        assert other.match is not None
        assert not one.match.fits(dataclasses.replace(other.match, vocab=one.match.vocab))


@pytest.mark.parametrize("name", REAL)
def test_real_models_find_their_preset_by_sizes(name: str) -> None:
    model_type, sizes = REAL[name]
    config = AutoConfig.for_model(model_type, **sizes)
    assert load_preset(config, resolve(skeleton(config))).name == name


def test_another_size_of_the_same_type_gets_a_guess() -> None:
    config = AutoConfig.for_model("gpt2")
    config.name_or_path = "gpt2-xl"
    preset = load_preset(config, resolve(skeleton(config)))
    assert preset.label == "guessed"
    assert preset.settings["memit"]["mom2_update_weight"] == 3072


def test_sizes_do_not_depend_on_the_orientation() -> None:
    for name in ("gpt2", "llama"):
        sizes = sizes_of(tiny_config(name), resolve(tiny_model(name)))
        assert (sizes.layers, sizes.hidden, sizes.intermediate) == (LAYERS, HIDDEN, INTERMEDIATE)


def test_the_bundled_model_finds_its_preset() -> None:
    config = AutoConfig.from_pretrained(bundled_folder())
    assert load_preset(config, resolve(skeleton(config))).name == "bundled"
    # Another vocabulary is another model, however alike the rest.
    config.vocab_size += 8
    assert load_preset(config, resolve(skeleton(config))).label == "guessed"


def test_a_guess_at_32_layers_is_the_published_choice() -> None:
    preset = guess(Sizes("x", 32, 4096, 14336))
    assert preset.label == "guessed"
    assert preset.layers == (4, 5, 6, 7, 8)
    assert preset.settings["memit"]["mom2_update_weight"] == pytest.approx(15000, rel=0.1)


def test_a_guess_behind_norms_writes_one_layer() -> None:
    assert guess(Sizes("x", 32, 64, 256), behind_norm=True).layers == (8,)
    config = tiny_config("gemma2")
    assert len(load_preset(config, resolve(tiny_model("gemma2"))).layers) == 1


def test_a_guess_depends_on_no_scale() -> None:
    """Every figure of a guess that has a unit is relative, or a function of the width."""
    for behind_norm in (False, True):
        settings = guess(Sizes("x", 32, 64, 256), behind_norm=behind_norm).settings
        targets = build(TargetOptions, settings["targets"], owner="targets")
        assert (targets.lr_kind, targets.decay_kind) == ("relative", "relative")
        assert (settings["alphaedit"]["threshold_kind"], settings["alphaedit"]["l2_kind"]) == ("directions", "relative")
        assert settings["alphaedit"]["nullspace_threshold"] == 0.7
        assert "lambda_reg" not in settings["rlsedit"]
        # In front of a norm only the direction counts, and 0.75 would not let it turn by a right angle.
        assert targets.norm_clamp > 1


def test_published_presets_keep_absolute_rates() -> None:
    published = [preset for preset in all_presets() if preset.label == "published"]
    assert published
    for preset in published:
        targets = build(TargetOptions, preset.settings["targets"], owner="targets")
        assert (targets.lr_kind, targets.decay_kind) == ("absolute", "absolute")
        assert preset.settings.get("alphaedit", {}).get("threshold_kind", "absolute") == "absolute"


def test_an_editor_may_have_layers_of_its_own() -> None:
    config = AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32, intermediate_size=14336)
    preset = load_preset(config, resolve(skeleton(config)))
    assert preset.layers_for("ultraedit") == (29, 30)
    assert preset.layers_for("memit") == preset.layers == (4, 5, 6, 7, 8)
    assert guess(Sizes("x", 32, 64, 14336)).settings["ultraedit"]["lr"] == pytest.approx(1e-6, rel=0.01)


@given(st.integers(1, 300), st.integers(1, 100_000))
def test_a_guess_lies_in_the_first_third(layers: int, width: int) -> None:
    preset = guess(Sizes("x", layers, 64, width))
    chosen = preset.layers
    assert preset.layers_for("ultraedit")[-1] <= max(layers - 2, 0)
    assert 1 <= len(chosen) <= 5
    assert list(chosen) == list(range(chosen[0], chosen[-1] + 1))
    assert 0 <= chosen[0] <= chosen[-1] <= layers / 3


def test_presets_do_not_import_torch() -> None:
    code = "import sys; from editcli import presets; presets.all_presets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
