"""Matrices of zeros, as block expansion inserts them, have norms and no ratios, in everything that shows figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editcli.__main__ import main
from editcli.formatting import number
from editcli.health.diff import diff
from editcli.health.inspect import Wanted, inspect
from editcli.health.verdict import Thresholds, judge, since
from editcli.linalg.ratios import ratio
from editcli.linalg.spectra import spectral_norm, spectrum
from editcli.records.history import read_history
from editcli.storage.choice import SINGLE
from tests.support.facts import EDIT

ZERO, ORDINARY = "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj"


@pytest.fixture(scope="module")
def base(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copytree(model, tmp_path_factory.mktemp("zero") / "base"))
    weights = load_file(path / SINGLE)
    weights[f"{ZERO}.weight"] = torch.zeros_like(weights[f"{ZERO}.weight"])
    save_file(weights, path / SINGLE, metadata={"format": "pt"})
    (path.parent / "edits.jsonl").write_text(json.dumps(EDIT))
    return path


@pytest.fixture(scope="module")
def run(base: Path, model: Path) -> Path:
    """A run that writes into a matrix of zeros and an ordinary one, under guards that watch both."""
    out, edits = base.parent / "out", base.parent / "edits.jsonl"
    given = ("--model", str(base), "--corpus", str(model / "corpus.txt"), "--out", str(out), "--device", "cpu")
    quick = ("-o", "targets.steps=2", "-o", "targets.prefixes=1", "--layers", "1,2", "--diagnose-every", "1")
    assert main(["-q", "apply", str(edits), *given, *quick, "--stop-if", "drift>1e6", "--stop-if", "ratio>1e6"]) == 0
    return out


def test_a_ratio_to_nothing_is_no_figure() -> None:
    assert ratio(3, 2) == 1.5
    assert ratio(3, 0) is None
    assert ratio(0, 0) is None
    assert (number(1.5, ".2f"), number(None, ".2f")) == ("1.50", "n/a")
    assert (number(-0.001, ".2f"), number(-0.01, ".2f"), number(0.0, ".2f")) == ("0.00", "-0.01", "0.00")
    assert number(float("-inf"), ".2f") == "-inf"


def test_the_run_writes_both_and_gives_ratios_of_one(run: Path, base: Path) -> None:
    sites = {site["module"]: site for site in json.loads((run / "editcli" / "run.json").read_text())["sites"]}
    assert (sites[ZERO]["ratio"], sites[ZERO]["drift"]) == (None, None)
    assert sites[ORDINARY]["ratio"] > 0
    assert load_file(run / SINGLE)[f"{ZERO}.weight"].norm() > 0
    assert f"| `{ZERO}` | n/a | n/a |" in (run / "README.md").read_text()
    history = read_history(run)
    assert history is not None
    assert history.series(ZERO, "ratio") == [None]
    assert since(history.batches, ZERO, Thresholds()) is None
    diagnostics = history.batches[0].diagnostics
    assert "spectral_growth/layer 2" in diagnostics
    assert not any("share" in name or "growth" in name for name in diagnostics if name.endswith("layer 1"))


def test_a_guard_does_not_look_at_a_ratio_that_is_none(run: Path, base: Path, model: Path, tmp_path: Path) -> None:
    """The ordinary site stops the run; the one without a ratio would never let it begin, or never stop it."""
    edits = base.parent / "edits.jsonl"
    given = ("--model", str(base), "--corpus", str(model / "corpus.txt"), "--device", "cpu", "--no-eval")
    quick = ("-o", "targets.steps=1", "-o", "targets.prefixes=0")
    for layer, code in (("1", 0), ("2", 3)):
        watched = ("--stop-if", "drift>1e-9", "--layers", layer, "--out", str(tmp_path / layer))
        assert main(["-q", "apply", str(edits), *given, *quick, *watched]) == code


@pytest.mark.parametrize("spectral", [False, True])
def test_inspect_and_diff_show_norms_and_no_ratios(spectral: bool, run: Path, base: Path) -> None:
    found = inspect(run, base=base, wanted=Wanted(norms=True, spectral=spectral, layers=(1, 2)))
    zero, ordinary = found.sites
    assert (zero.ratio, zero.drift, zero.verdict.word) == (None, None, None)
    assert zero.now is not None
    assert zero.now.frobenius > 0
    assert ordinary.ratio is not None
    (changed,) = [tensor for tensor in diff(base, run).tensors if tensor.name == f"{ZERO}.weight"]
    assert (changed.relative, changed.ratio) == (None, None)
    assert changed.norm == pytest.approx(zero.now.frobenius, rel=1e-5)


def test_tables_and_pages_are_drawn(run: Path, base: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["-q", "inspect", str(run), "--norms", "--base", str(base)]) == 0
    assert main(["-q", "inspect", str(base), "--spectral"]) == 0
    assert main(["-q", "diff", str(base), str(run)]) == 0
    assert main(["-q", "report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_the_spectrum_of_zeros_is_zero_whatever_its_size() -> None:
    zeros = torch.zeros(40, 300)
    assert spectral_norm(zeros, method="randomized") == (0.0, 0.0)
    found = spectrum(zeros, method="randomized")
    assert (found.spectral, found.nuclear, found.effective_rank, found.stable_rank) == (0.0, 0.0, 0.0, 0.0)


def test_a_site_without_figures_has_no_verdict() -> None:
    assert judge(Thresholds(), ratio=None, drift=None).word is None


@pytest.mark.parametrize("name", ["alphaedit", "rlsedit", "ft", "rome"])
def test_editors_take_a_matrix_of_zeros(name: str, base: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    """Fine-tuning is bound to a share of the weight's norm, which here is nothing, and says that nothing changed."""
    given = ("--model", str(base), "--corpus", str(model / "corpus.txt"), "--device", "cpu", "--no-eval")
    quick = ("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--layers", "1", "--editor", name)
    code = main(["-q", "apply", str(base.parent / "edits.jsonl"), *given, *quick, "--out", str(tmp_path / "out")])
    said = " ".join(capsys.readouterr().err.split())
    assert code == (1 if name == "ft" else 0), said
    assert "Traceback" not in said


@pytest.mark.parametrize("name", ["prune", "clip", "rect", "revive", "nas"])
def test_stabilizers_take_a_matrix_of_zeros(name: str, base: Path, model: Path, tmp_path: Path, capsys: Any) -> None:
    given = ("--model", str(base), "--corpus", str(model / "corpus.txt"), "--device", "cpu", "--no-eval")
    quick = ("-o", "targets.steps=1", "-o", "targets.prefixes=0", "--layers", "1,2", "--stabilizer", name)
    code = main(["-q", "apply", str(base.parent / "edits.jsonl"), *given, *quick, "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(tmp_path / "out" / SINGLE).values())
