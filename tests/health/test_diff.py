"""``diff``: which tensors differ, by how much, and of which rank; what both models say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from editcli.cli.app import App
from editcli.cli.main import build_cli
from editcli.errors import ModelError
from editcli.health.diff import RANK_LIMIT, diff, numerical_rank, speak
from editcli.plugin.manager import Plugins
from editcli.testing import tiny_model_folder

NAME = "model.layers.1.mlp.down_proj.weight"


def changed(base: Path, target: Path, change) -> Path:
    """Copy a model folder and change its tensors."""
    shutil.copytree(base, target)
    tensors = load_file(base / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def low_rank(shape: tuple[int, int], rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(shape[0], rank, generator=generator)
    return left @ torch.randn(rank, shape[1], generator=generator)


def test_a_model_does_not_differ_from_itself(base):
    found = diff(base, base)
    assert found.tensors == ()
    assert found.compared > 20


def test_only_the_changed_tensor_differs(base, tmp_path):
    update = low_rank((16, 40), 3)
    edited = changed(base, tmp_path / "edited", lambda tensors: tensors.update({NAME: tensors[NAME] + 0.01 * update}))
    (found,) = diff(base, edited).tensors
    before = load_file(base / "model.safetensors")[NAME]
    assert found.name == NAME
    assert found.norm == pytest.approx(float(0.01 * update.norm()), rel=1e-4)
    assert found.relative == pytest.approx(float(0.01 * update.norm() / before.norm()), rel=1e-4)
    assert found.largest == pytest.approx(float(0.01 * update.abs().max()), rel=1e-4)
    assert found.rank == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [1, 5])
def test_the_rank_is_seen_through_rounding(tmp_path, dtype, rank):
    base = tiny_model_folder(tmp_path / "base", dtype=str(dtype).removeprefix("torch."))
    update = low_rank((16, 40), rank)

    def change(tensors):
        tensors[NAME] = (tensors[NAME].float() + update).to(dtype)

    (found,) = diff(base, changed(base, tmp_path / "edited", change)).tensors
    assert found.rank == rank


def test_a_single_bit_counts(base, tmp_path):
    def change(tensors):
        tensors[NAME].view(torch.int32)[0, 0] ^= 1

    (found,) = diff(base, changed(base, tmp_path / "edited", change)).tensors
    assert 0 < found.relative < 1e-6
    assert found.rank == 0


def test_another_dtype_is_a_difference(base, tmp_path):
    edited = changed(base, tmp_path / "edited", lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}))
    (found,) = diff(base, edited).tensors
    assert (found.base_dtype, found.dtype) == ("float32", "bfloat16")
    assert found.rank == 0


def test_tensors_without_a_counterpart_are_listed(base, tmp_path):
    def change(tensors):
        del tensors[NAME]
        tensors["extra"] = torch.zeros(3)
        tensors["model.norm.weight"] = torch.zeros(5)

    found = diff(base, changed(base, tmp_path / "edited", change))
    assert (found.missing, found.added, found.reshaped) == ((NAME,), ("extra",), ("model.norm.weight",))


def test_a_base_of_zeros_has_no_relative_norm(base, tmp_path):
    zeros = changed(base, tmp_path / "zeros", lambda tensors: tensors[NAME].zero_())
    found = diff(zeros, base)
    assert [tensor.relative for tensor in found.tensors] == [None]
    json.dumps(found.to_json(), allow_nan=False)


def test_shards_do_not_matter(tmp_path):
    whole, parts = tiny_model_folder(tmp_path / "whole"), tiny_model_folder(tmp_path / "parts", shards=3)
    assert diff(whole, parts).tensors == ()


def test_unrelated_models_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no tensor in common"):
        diff(tiny_model_folder(tmp_path / "a", "llama"), tiny_model_folder(tmp_path / "b", "gpt2"))


def test_a_large_low_rank_difference_is_found_without_a_full_decomposition(monkeypatch):
    monkeypatch.setattr("editcli.linalg.spectra.NORM_LIMIT", 10)
    assert numerical_rank(low_rank((150, 200), 7), 0.0) == 7
    assert numerical_rank(low_rank((150, 200), 70), 0.0) == 70
    monkeypatch.setattr("editcli.health.diff.RANK_LIMIT", 64)
    assert RANK_LIMIT > 64
    assert numerical_rank(low_rank((150, 200), 140), 0.0) is None


def test_a_run_differs_in_its_sites_only(make_run, base):
    found = diff(base, make_run(batch=2))
    assert [tensor.name for tensor in found.tensors] == [
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in (1, 2)
    ]
    assert [tensor.rank for tensor in found.tensors] == [6, 6]


def test_both_models_speak(base, tmp_path):
    edited = tiny_model_folder(tmp_path / "edited", seed=5)
    found = speak(diff(base, edited), ["Paris is in", "The city", "Paris is in"], tokens=4, device="cpu")
    assert [spoken.prompt for spoken in found.generations] == ["Paris is in", "The city"]
    assert any(spoken.base != spoken.edited for spoken in found.generations)
    same = speak(diff(base, base), ["Paris is in"], tokens=4, device="cpu").generations[0]
    assert same.base == same.edited


def test_the_command(base, tmp_path):
    edited = tiny_model_folder(tmp_path / "edited", seed=5)
    app = App(Plugins())
    arguments = ["diff", str(base), str(edited), "--prompt", "[red]Paris[/red] is", "--tokens", "2"]

    def run(*more: str):
        return CliRunner().invoke(build_cli(app.plugins), [*arguments, *more], obj=app, standalone_mode=False)

    table, document = run(), json.loads(run("--json").stdout)
    assert table.exit_code == 0
    assert "[red]Paris[/red] is" in " ".join(table.stdout.split()) or "[red]Paris" in table.stdout
    assert document["compared"] == len(document["tensors"])
    assert set(document["tensors"][0]) >= {"name", "shape", "norm", "relative", "rank"}
    assert document["generations"][0]["prompt"] == "[red]Paris[/red] is"
