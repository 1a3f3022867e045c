"""A LoRA adapter of a run: what PEFT makes of it is the edited model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from editcli.errors import StateError
from editcli.export.adapter import read_adapter, write_adapter
from editcli.export.changes import SHARE, SiteChange, share_rank
from editcli.export.efficacy import put_on
from editcli.export.report import SiteExport
from editcli.models.loading import open_model, resolve_model
from editcli.plugin.interfaces import Site
from editcli.runs.undo import Undo, undo
from editcli.storage.checkpoint import Checkpoint
from tests.support.exports import KINDS, SITES, logits, model_of
from tests.support.reporters import Listener

# PEFT still asks transformers in a way that its next release drops.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")]

EXACT = ("linear", "conv1d", "square", "tied", "sharded", "read out")
"""Kinds that are saved in float32, so that the folder holds just what the adapter gives."""


def on_base(base: Path, adapter: Path) -> Any:
    """Load a base with an adapter as PEFT does."""
    return peft.PeftModel.from_pretrained(model_of(base), adapter).eval()


def change(run: Path, base: Path, module: str, *, transposed: bool = False) -> torch.Tensor:
    """Return what a run added to a matrix, (d_out, d_in) float64, as the two folders tell it."""
    name = f"{module}.weight"
    found = Checkpoint(run).read(name).double() - Checkpoint(base).read(name).double()
    return found.T if transposed else found


@pytest.mark.parametrize("kind", EXACT)
def test_peft_gives_the_edited_model_on_the_untouched_base(
    kind: str,
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    report = make(runs(kind), "lora")
    assert report.exact
    assert [site.module for site in report.sites] == KINDS[kind].modules
    # Four edits wrote four directions; no rank is spent on rounding.
    assert all(0 < site.rank <= 4 for site in report.sites)
    base, edited = bases(kind), runs(kind)
    wanted = logits(model_of(edited), base)
    found = logits(on_base(base, tmp_path / "out"), base)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert float((logits(model_of(base), base) - wanted).abs().max()) > 1e-2


def test_only_the_edited_modules_get_an_adapter(
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    make(runs("conv1d"), "lora")
    model = on_base(bases("conv1d"), tmp_path / "out")
    with_pairs = {name for name, module in model.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert with_pairs == set(KINDS["conv1d"].modules)


@pytest.mark.parametrize("kind", ["bfloat16", "saved as bfloat16"])
def test_in_half_precision_the_merged_adapter_rounds_to_the_edited_folder(
    kind: str,
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    """The adapter holds what the run computed in float32; the folder holds that, rounded."""
    report = make(runs(kind), "lora")
    assert report.exact
    for site in report.sites:
        assert site.relative_error < 1e-5 < site.saved_error < 0.2
    merged = on_base(bases(kind), tmp_path / "out").merge_and_unload()
    saved = Checkpoint(runs(kind))
    for module in KINDS[kind].modules:
        weight = merged.get_submodule(module).weight.detach().to(torch.bfloat16)
        assert float((weight != saved.read(f"{module}.weight")).float().mean()) < 1e-3


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_a_smaller_rank_is_the_best_of_that_rank_and_says_what_it_loses(
    kind: str,
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    listener = Listener()
    report = make(runs(kind), "lora", rank=2, listener=listener)
    assert not report.exact
    (warning,) = listener.warnings
    assert "relative error" in warning
    assert "--rank" in warning
    pairs = read_adapter(tmp_path / "out")
    for site in report.sites:
        delta = change(runs(kind), bases(kind), site.module, transposed=kind == "conv1d")
        values = torch.linalg.svdvals(delta)
        best = float(values[2:].norm() / values.norm())
        assert best > 0.01
        assert site.relative_error == pytest.approx(best, rel=1e-4)
        left, right = pairs[site.module]
        assert (left.shape[1], right.shape[0]) == (2, 2)
        assert float((left.double() @ right.double() - delta).norm() / delta.norm()) == pytest.approx(best, rel=1e-4)
        assert site.needed is not None
        assert site.needed > 2


def test_a_larger_rank_than_needed_is_not_used(runs: Callable[[str], Path], make: Callable[..., Any]) -> None:
    assert all(site.rank == site.needed for site in make(runs("linear"), "lora", rank=30).sites)


def test_dense_updates_are_cut_at_a_share_of_the_matrix(
    edit: Callable[..., Path], make: Callable[..., Any], tmp_path: Path
) -> None:
    """RECT's updates have full rank: no adapter of a sensible size holds them."""
    run = edit("linear", tmp_path / "run", stabilizers=("rect",))
    listener = Listener()
    report = make(run, "lora", listener=listener)
    assert len(listener.warnings) == 1
    for site in report.sites:
        rows, columns = site.shape
        assert site.rank == share_rank(rows, columns)
        assert site.rank * (rows + columns) <= SHARE * rows * columns
        assert not site.exact
        assert 0 < site.relative_error < 1


def test_an_adapter_after_an_undo_holds_what_is_left(
    run: Path,
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    plugins: Any,
    tmp_path: Path,
) -> None:
    undo(Undo(run=str(run), batches=3), plugins)
    report = make(run, "lora")
    assert all(site.rank == 1 for site in report.sites)
    wanted = logits(model_of(run), run)
    torch.testing.assert_close(logits(on_base(bases("linear"), tmp_path / "out"), run), wanted, rtol=0, atol=1e-4)
    undo(Undo(run=str(run), to=0), plugins)
    with pytest.raises(StateError, match=r"nothing in .* differs from its base"):
        make(run, "lora", out="nothing")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("lost", ["updates", "state.safetensors"])
def test_what_a_run_lost_is_found_in_its_weights(
    lost: str,
    large: bool,
    run: Path,
    runs: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Factors save work, and the state says what was not rounded; the change itself is in the folder."""
    if large:
        # Matrices above this size are not decomposed whole.
        monkeypatch.setattr("editcli.linalg.spectra.NORM_LIMIT", 4)
    path = run / "editcli" / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    whole, part = make(runs("linear"), "lora", out="whole"), make(run, "lora", out="part")
    assert [site.rank for site in part.sites] == [site.rank for site in whole.sites]
    first, second = read_adapter(tmp_path / "whole"), read_adapter(tmp_path / "part")
    for module, (left, right) in first.items():
        torch.testing.assert_close(second[module][0] @ second[module][1], left @ right, rtol=0, atol=1e-6)


def test_each_module_may_have_a_rank_of_its_own(bases: Callable[[str], Path], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    base = model_of(bases("linear"))
    wanted = model_of(bases("linear"))
    changes = []
    for layer, rank in ((0, 3), (1, 1), (2, 2)):
        module = SITES["llama"].format(layer)
        weight = wanted.get_submodule(module).weight
        left, right = (0.1 * torch.randn(size, rank, generator=generator) for size in weight.shape)
        weight.data += left @ right.T
        shape = (weight.shape[0], weight.shape[1])
        report = SiteExport(module, layer, shape, rank, rank, relative_error=0.0, saved_error=0.0)
        changes.append(SiteChange(Site(layer, module, transposed=False), left, right, report))
    write_adapter(tmp_path, changes, base="somewhere", revision=None)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (3, 3)
    assert (
        config["rank_pattern"]
        == config["alpha_pattern"]
        == {
            "layers.1.mlp.down_proj": 1,
            "layers.2.mlp.down_proj": 2,
        }
    )
    found = logits(peft.PeftModel.from_pretrained(base, tmp_path).eval(), bases("linear"))
    torch.testing.assert_close(found, logits(wanted, bases("linear")), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_what_is_measured_is_the_base_with_the_file_that_was_written(
    kind: str,
    runs: Callable[[str], Path],
    bases: Callable[[str], Path],
    make: Callable[..., Any],
    tmp_path: Path,
) -> None:
    report = make(runs(kind), "lora", evaluate=True, sample=3)
    assert report.efficacy is not None
    assert (report.efficacy.edits, report.efficacy.of, report.efficacy.run) == (3, 4, None)
    assert set(report.efficacy.adapter) == {"efficacy_accuracy", "efficacy_success"}
    assert report.efficacy.adapter["efficacy_accuracy"] is not None
    loaded = open_model(resolve_model(bases(kind)), device="cpu")
    put_on(loaded, tmp_path / "out")
    wanted = logits(model_of(runs(kind)), bases(kind))
    torch.testing.assert_close(logits(loaded.model, bases(kind)), wanted, rtol=0, atol=1e-4)


def test_the_base_is_named_by_its_folder_and_no_file_holds_another_path(
    runs: Callable[[str], Path], bases: Callable[[str], Path], make: Callable[..., Any], tmp_path: Path, workshop: Path
) -> None:
    make(runs("linear"), "lora")
    config = tmp_path / "out" / "adapter_config.json"
    assert json.loads(config.read_text())["base_model_name_or_path"] == str(bases("linear"))
    others = [path for path in (tmp_path / "out").rglob("*") if path.is_file() and path != config]
    assert len(others) == 3
    assert all(str(workshop).encode() not in path.read_bytes() for path in others)
