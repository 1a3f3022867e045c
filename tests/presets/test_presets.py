"""Presets: matched by type and sizes, every key known to its component, and a sensible guess for all other models."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from editcli.__main__ import main
from editcli.errors import OptionError
from editcli.models.architectures import resolve, skeleton
from editcli.models.loading import bundled_folder
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import build
from editcli.presets.loader import all_presets, guess, load_preset, sizes_of
from editcli.presets.record import LABELS, Preset, Sizes, given_preset, preset_text, read_preset
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import Recipe, check_section
from editcli.testing import HIDDEN, INTERMEDIATE, LAYERS, tiny_config, tiny_model, tiny_model_folder


def _sizes(layers: int, hidden: int, intermediate: int, *, heads: int) -> dict[str, int]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": intermediate}
    return {**sizes, "num_attention_heads": heads, "pad_token_id": 0}


REAL: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16}),
    "llama-3-8b": ("llama", {**_sizes(32, 4096, 14336, heads=32), "vocab_size": 128256}),
    "llama-2-7b": ("llama", {**_sizes(32, 4096, 11008, heads=32), "vocab_size": 32000}),
    "llama-3.2-1b": ("llama", {**_sizes(16, 2048, 8192, heads=32), "vocab_size": 128256}),
    "llama-3.2-3b": ("llama", {**_sizes(28, 3072, 8192, heads=24), "vocab_size": 128256}),
    "mistral-7b": ("mistral", {**_sizes(32, 4096, 14336, heads=32), "vocab_size": 32768}),
    "qwen2.5-0.5b": ("qwen2", {**_sizes(24, 896, 4864, heads=14), "vocab_size": 151936}),
    "qwen2.5-1.5b": ("qwen2", {**_sizes(28, 1536, 8960, heads=12), "vocab_size": 151936}),
    "qwen2.5-7b": ("qwen2", {**_sizes(28, 3584, 18944, heads=28), "vocab_size": 152064}),
    "qwen3-0.6b": ("qwen3", {**_sizes(28, 1024, 3072, heads=16), "head_dim": 128, "vocab_size": 151936}),
    "qwen3-1.7b": ("qwen3", {**_sizes(28, 2048, 6144, heads=16), "head_dim": 128, "vocab_size": 151936}),
    "qwen3-4b": ("qwen3", {**_sizes(36, 2560, 9728, heads=32), "head_dim": 128, "vocab_size": 151936}),
    "qwen3-8b": ("qwen3", {**_sizes(36, 4096, 12288, heads=32), "head_dim": 128, "vocab_size": 151936}),
    "gemma-3-270m": ("gemma3_text", {**_sizes(18, 640, 2048, heads=4), "head_dim": 256, "vocab_size": 262144}),
    "gemma-3-1b": ("gemma3_text", {**_sizes(26, 1152, 6912, heads=4), "head_dim": 256, "vocab_size": 262144}),
    "gemma-3-4b": ("gemma3_text", {**_sizes(34, 2560, 10240, heads=8), "head_dim": 256, "vocab_size": 262208}),
    "phi-3-mini": ("phi3", {**_sizes(32, 3072, 8192, heads=32), "vocab_size": 32064}),
    "phi-4-mini": ("phi3", {**_sizes(32, 3072, 8192, heads=24), "vocab_size": 200064}),
    "smollm2-135m": ("llama", {**_sizes(30, 576, 1536, heads=9), "vocab_size": 49152}),
    "smollm2-360m": ("llama", {**_sizes(32, 960, 2560, heads=15), "vocab_size": 49152}),
    "smollm2-1.7b": ("llama", {**_sizes(24, 2048, 8192, heads=32), "vocab_size": 49152}),
    "olmo-2-1b": ("olmo2", {**_sizes(16, 2048, 8192, heads=16), "vocab_size": 100352}),
    "olmo-2-7b": ("olmo2", {**_sizes(32, 4096, 11008, heads=32), "vocab_size": 100352}),
    "olmo-2-13b": ("olmo2", {**_sizes(40, 5120, 13824, heads=40), "vocab_size": 100352}),
    "olmo-2-32b": ("olmo2", {**_sizes(64, 5120, 27648, heads=40), "vocab_size": 100352}),
}
"""The sizes of the real models, as their configurations spell them."""

NORMED = ("gemma3_text", "olmo2")
"""Types of models that norm their MLPs' output."""


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


def test_all_presets_are_there() -> None:
    assert {preset.name for preset in all_presets()} == {"bundled", *REAL}


@pytest.mark.parametrize("preset", [*all_presets(), guess(Sizes("x", 32, 64, 256))], ids=lambda preset: preset.name)
def test_every_key_of_a_preset_is_known(preset: Preset, plugins: Plugins) -> None:
    for name, settings in preset.settings.items():
        check_section(name, settings, plugins)
    build(TargetOptions, preset.settings["targets"], owner="targets")
    assert preset.editor is None or plugins.find("editor", preset.editor)


@pytest.mark.parametrize("preset", all_presets(), ids=lambda preset: preset.name)
def test_a_preset_is_sound(preset: Preset) -> None:
    assert preset.label in LABELS
    # What is published has a paper to look it up in.
    assert preset.source
    assert preset.label != "published" or "arXiv" in preset.source
    assert preset.match is not None
    assert list(preset.layers) == sorted(set(preset.layers))
    assert 0 <= preset.layers[0] <= preset.layers[-1] < preset.match.layers - 1


def test_no_two_presets_fit_the_same_model() -> None:
    for one, other in itertools.combinations(all_presets(), 2):
        assert one.match is not None
        assert other.match is not None
        assert not one.match.fits(dataclasses.replace(other.match, vocab=other.match.vocab or one.match.vocab))


@pytest.mark.parametrize("name", REAL)
def test_real_models_find_their_preset_by_sizes(name: str) -> None:
    model_type, sizes = REAL[name]
    config = AutoConfig.for_model(model_type, **sizes)
    architecture = resolve(skeleton(config))
    preset = load_preset(config, architecture)
    assert preset.name == name
    fitting = [one.name for one in all_presets() if one.match and one.match.fits(sizes_of(config, architecture))]
    assert fitting == [name]
    # Behind a norm several sites cannot share a residual, so the guess writes one of them.
    normed = architecture.mlp_norm(0) is not None
    assert normed == (model_type in NORMED)
    assert not normed or len(preset.layers) == 1


@pytest.mark.parametrize("name", REAL)
def test_a_model_of_other_sizes_gets_no_preset_of_another(name: str) -> None:
    match = next(preset.match for preset in all_presets() if preset.name == name)
    assert match is not None
    for field, more in (("layers", 1), ("hidden", 64), ("intermediate", 8)):
        other = dataclasses.replace(match, vocab=match.vocab or 1000, **{field: getattr(match, field) + more})
        assert not any(preset.match and preset.match.fits(other) for preset in all_presets())
    assert match.fits(dataclasses.replace(match, vocab=match.vocab or 123_456))


def test_a_preset_file_says_all_that_it_was_written_from(tmp_path: Path) -> None:
    for preset in all_presets():
        file = tmp_path / f"{preset.name}.toml"
        file.write_text(preset_text(preset, comment="two\nlines"), "utf-8")
        read = read_preset(file)
        assert dataclasses.replace(read, file=None, sha256=None) == preset
        assert given_preset(read.to_record()) == read
        assert read.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


MATCH = '[match]\nmodel_type = "llama"\nlayers = 4\nhidden = 16\nintermediate = 40\n'


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("layers = [1", "not valid TOML"),
        ("", "which layers to edit"),
        ("layers = [2, 1]", "layers must be layer numbers in ascending order"),
        ("layers = [true]", "layers must be"),
        ("layers = [1]\nlabl = 'tuned'", "no key 'labl' in a preset; did you mean 'label'?"),
        ("layers = [1]\nlabel = 'best'", "label must be one of"),
        ("layers = [1]\nname = 3", "name must be a text"),
        ("layers = [1]\neditor = 'memt'", "did you mean 'memit'?"),
        ("layers = [1]\nlayers_for = 3", "layers_for must be a table"),
        ("layers = [1]\n[targets]\nstep = 3", "targets has no option 'step'; did you mean 'steps'?"),
        ("layers = [1]\n[targets]\nlr = 'much'", "targets.lr must be a number"),
        ("layers = [1]\n[memitt]\nridge = 1", "did you mean 'memit'?"),
        ("layers = [1]\n[match]\nlayers = 4", "match needs model_type and hidden and intermediate"),
        ("layers = [1]\n[match]\nhiden = 4", "match has no key 'hiden'; did you mean 'hidden'?"),
        ("layers = [1]\n[match]\nhidden = 'big'", "match.hidden must be a whole number"),
        ("layers = [1]\n" + MATCH.replace("16", "32"), "match.hidden is 32, but the model's is 16"),
        ("layers = [1]\n" + MATCH.replace("llama", "gpt2"), "match.model_type is gpt2, but the model's is llama"),
        ("layers = [1]\n" + MATCH + "vocab = 7", "match.vocab is 7"),
        ("layers = [2, 4]\n" + MATCH, "layers names layer 4, but the model has 0-3"),
        ("layers = [1]\n[layers_for]\nrome = [9]", "layers_for.rome names layer 9"),
    ],
)
def test_a_preset_file_that_does_not_fit_is_one_sentence(
    text: str, sentence: str, plugins: Plugins, tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(text, "utf-8")
    model = (tiny_config("llama"), resolve(tiny_model("llama")))

    def use() -> None:
        Recipe(edits="edits.jsonl", preset=str(file)).check(plugins)
        load_preset(*model, str(file))

    with pytest.raises(OptionError) as caught:
        use()
    assert sentence in str(caught.value)
    assert "mine.toml" in str(caught.value)


def test_a_preset_file_that_is_not_there_is_one_sentence(plugins: Plugins) -> None:
    with pytest.raises(OptionError, match=r"the preset none.toml cannot be read"):
        Recipe(edits="edits.jsonl", preset="none.toml").check(plugins)


def test_a_preset_file_replaces_the_models_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("layers = [2]\n[targets]\nlr = 0.25\n", "utf-8")
    preset = load_preset(tiny_config("llama"), resolve(tiny_model("llama")), str(file))
    assert (preset.name, preset.layers, preset.settings) == ("mine", (2,), {"targets": {"lr": 0.25}})
    assert preset.layers_for("memit") == (2,)


@pytest.mark.parametrize(
    ("text", "layers", "others"),
    [
        ('editor = "ultraedit"\n', (0, 3), (0, 3)),
        ('editor = "ultraedit"\n[layers_for]\nultraedit = [1]\n', (1,), (0, 3)),
        ('editor = "memit"\n', (2,), (0, 3)),
    ],
)
def test_the_layers_of_a_preset_file_are_those_of_the_editor_it_names(
    text: str, layers: tuple[int, ...], others: tuple[int, ...], tmp_path: Path
) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("layers = [0, 3]\n" + text, "utf-8")
    preset = load_preset(tiny_config("llama"), resolve(tiny_model("llama")), str(file))
    assert preset.layers_for("ultraedit") == layers
    assert preset.layers_for("memit") == others


def test_inspect_and_stats_take_the_layers_of_a_preset_file(
    tmp_path: Path, corpus_text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tiny_model_folder(tmp_path / "model"))
    (tmp_path / "corpus.txt").write_text(corpus_text)
    file = tmp_path / "mine.toml"
    file.write_text("layers = [0, 3]\n", "utf-8")
    assert main(["inspect", model, "--preset", str(file), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["preset"] == {"name": "mine", "label": "guessed", "layers": [0, 3]}
    assert [site["layer"] for site in shown["sites"] if site["in_preset"]] == [0, 3]
    text = ["--corpus", str(tmp_path / "corpus.txt")]
    assert main(["stats", "compute", model, "--preset", str(file), *text, "--json"]) == 0
    sites = json.loads(capsys.readouterr().out)["sites"]
    assert [site["module"].split(".")[2] for site in sites] == ["0", "3"]
    file.write_text("layers = [4]\n", "utf-8")
    for command in (["inspect", model], ["stats", "compute", model, *text]):
        assert main([*command, "--preset", str(file)]) == 1
        assert "layers names layer 4, but the model has 0-3" in capsys.readouterr().err


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
    code = "import sys; from editcli.presets import loader; loader.all_presets(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
