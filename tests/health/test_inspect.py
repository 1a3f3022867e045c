"""``inspect``: figures from files alone, in both orientations, against numpy; verdicts; runs; the JSON contract."""

from __future__ import annotations

import json
import sys
from importlib.resources import files
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from editcli.cli.app import App
from editcli.cli.main import build_cli
from editcli.errors import ModelError, OptionError
from editcli.health.inspect import Wanted, inspect
from editcli.health.verdict import Thresholds, judge, parse_thresholds, worst
from editcli.plugin.manager import Plugins
from editcli.render.inspect import inspection_view, layer_ranges, sparkline
from editcli.testing import tiny_model_folder

NORMS, SPECTRAL = Wanted(norms=True), Wanted(spectral=True, norms=True)
SCHEMA = json.loads((files("editcli") / "schemas" / "inspect.schema.json").read_text("utf-8"))


class Listening:
    """A reporter that keeps what it was told."""

    def __init__(self) -> None:
        from editcli.reporting import Silent

        self.warnings: list[str] = []
        self.phase, self.note = Silent().phase, Silent().note

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def edited_copy(base: Path, target: Path, changes: dict[str, torch.Tensor]) -> Path:
    """Copy a model folder with some tensors replaced."""
    target.mkdir()
    for path in base.iterdir():
        if path.name != "model.safetensors":
            (target / path.name).write_bytes(path.read_bytes())
    save_file({**load_file(base / "model.safetensors"), **changes}, target / "model.safetensors", {"format": "pt"})
    return target


def run_cli(*arguments: str | Path):
    app = App(Plugins())
    return CliRunner().invoke(build_cli(app.plugins), [str(a) for a in arguments], obj=app, standalone_mode=False)


@pytest.mark.parametrize(("family", "transposed"), [("llama", False), ("gpt2", True)])
@pytest.mark.parametrize("shards", [1, 3])
def test_figures_equal_numpy_in_both_orientations(tmp_path, family, transposed, shards):
    folder = tiny_model_folder(tmp_path / "model", family, shards=shards)
    found = inspect(folder, wanted=SPECTRAL)
    assert len(found.sites) == 4
    stored = {}
    for path in folder.glob("*.safetensors"):
        stored |= load_file(path)
    for site in found.sites:
        name = next(name for name in stored if name.endswith(f"{site.site.module.partition('.')[2]}.weight"))
        weight = stored[name].double().numpy()
        weight = weight.T if transposed else weight
        sigma = np.linalg.svd(weight, compute_uv=False)
        share = sigma / sigma.sum()
        assert site.site.transposed == transposed
        assert site.shape == weight.shape == (16, 40)
        assert site.now.frobenius == pytest.approx(np.linalg.norm(weight), rel=1e-6)
        assert site.now.spectral == pytest.approx(sigma[0], rel=1e-6)
        assert site.now.effective_rank == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
        assert site.now.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, rel=1e-6)
        np.testing.assert_allclose(site.now.values, sigma[:8], rtol=1e-6)
        assert site.base is None
        assert site.verdict.word is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("square", [False, True])
def test_ratio_and_drift_equal_numpy(tmp_path, family, square):
    base = tiny_model_folder(tmp_path / "base", family, square=square)
    other = tiny_model_folder(tmp_path / "other", family, seed=1, square=square)
    for site in inspect(other, wanted=SPECTRAL, base=base).sites:
        name = f"{site.site.module}.weight"
        before, after = (load_file(path / "model.safetensors") for path in (base, other))
        name = name if name in before else name.partition(".")[2]
        first, second = before[name].double().numpy(), after[name].double().numpy()
        assert site.ratio == pytest.approx(np.linalg.norm(second) / np.linalg.norm(first), rel=1e-6)
        assert site.drift == pytest.approx(np.linalg.norm(second - first) / np.linalg.norm(first), rel=1e-6)
        assert site.similarity.k == site.base.k_tau
        if site.site.transposed:
            first, second = first.T, second.T
        left, sigma, right = np.linalg.svd(first, full_matrices=False)
        written = np.diag(left.T @ (second - first) @ right.T)[:16]
        assert site.relative_change == pytest.approx(np.mean(np.abs(written) / sigma[:16]), rel=1e-6)
        u0, u1 = (np.linalg.svd(weight)[0][:, : site.similarity.k] for weight in (first, second))
        assert site.similarity.ss_left == pytest.approx(np.abs((u0 * u1).sum(0)).mean(), rel=1e-6)


def test_an_unchanged_model_is_fine(base):
    found = inspect(base, wanted=SPECTRAL, base=base)
    assert found.verdict == "fine"
    for site in found.sites:
        assert (site.ratio, site.drift, site.relative_change) == (1, 0, 0)
        assert site.similarity.ls == pytest.approx(1)
        assert max(site.similarity.angles_left) < 1e-3


def test_the_bare_view_reads_no_weight(base, monkeypatch):
    monkeypatch.setattr("editcli.storage.checkpoint.Checkpoint.read", lambda *_: pytest.fail("a tensor was read"))
    found = inspect(base)
    assert (found.family, found.layers, len(found.sites)) == ("llama", 4, 4)
    assert found.preset.label == "guessed"
    assert found.statistics_bytes == sum(8 * 40**2 for site in found.sites if site.in_preset)
    assert all(site.now is None and site.dtype == "float32" for site in found.sites)


def test_the_model_is_never_built_with_weights(base, monkeypatch):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    inspect(base, wanted=SPECTRAL, base=base)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_named(tmp_path, tied):
    assert inspect(tiny_model_folder(tmp_path / "model", tied=tied)).tied == tied


def test_a_run_knows_its_base_and_its_sites(make_run, base):
    run = make_run()
    found = inspect(run, wanted=SPECTRAL)
    assert found.base == str(base)
    assert [site.site.layer for site in found.sites] == [1, 2]
    for site in found.sites:
        assert site.ratio == pytest.approx(found.history.series(site.site.module, "ratio")[-1], rel=1e-5)
        assert site.drift == pytest.approx(found.history.series(site.site.module, "drift")[-1], rel=1e-5)


def test_the_edits_that_wrote_most_come_first(make_run):
    found = inspect(make_run(), wanted=NORMS)
    norms = [edit.norm for edit in found.top_edits]
    assert sorted(norms, reverse=True) == norms
    assert len(norms) == 6
    first = load_file(found.history.folder.updates / "000001.safetensors")
    expected = sum(
        (
            first[f"model.layers.{n}.mlp.down_proj.left"][:, 0].norm()
            * first[f"model.layers.{n}.mlp.down_proj.right"][:, 0].norm()
        )
        ** 2
        for n in (1, 2)
    )
    mine = next(edit for edit in found.top_edits if edit.id == "e0")
    assert mine.norm == pytest.approx(float(expected) ** 0.5, rel=1e-5)
    assert (mine.prompt, mine.target, mine.step) == ("Person 0 lives in", "Town 0", 1)


def test_a_batch_that_was_undone_is_no_part_of_the_history(make_run):
    from editcli.records.journal import UndoRecord, journal_line

    run = make_run()
    found = inspect(run, wanted=NORMS)
    last = found.history.batches[-1]
    text = found.history.folder.journal.read_text("utf-8").splitlines()[-1]
    found.history.folder.append(journal_line(UndoRecord(sequence=last.sequence + 1, step=last.step - 1), text))
    again = inspect(run, wanted=NORMS)
    assert [batch.step for batch in again.history.batches] == [1, 2]


def test_a_base_that_was_replaced_is_noticed(make_run, tmp_path):
    run = make_run()
    record = json.loads((run / "editcli" / "run.json").read_text())
    other = tiny_model_folder(tmp_path / "other", seed=9, tied=True)
    weight = load_file(other / "model.safetensors")
    save_file({name: 3 * tensor for name, tensor in weight.items()}, other / "model.safetensors", {"format": "pt"})
    record["provenance"]["base"] |= {"folder": str(other)}
    (run / "editcli" / "run.json").write_text(json.dumps(record))
    reporter = Listening()
    inspect(run, wanted=NORMS, reporter=reporter)
    assert any("not the model that was edited" in text for text in reporter.warnings)


def test_a_run_whose_base_is_gone_is_shown_without_comparison(make_run):
    run = make_run()
    path = run / "editcli" / "run.json"
    path.write_text(
        path.read_text().replace("model", "model-that-is-gone", 1).replace('"folder": "', '"folder": "/nowhere')
    )
    record = json.loads(path.read_text())
    record["provenance"]["base"] |= {"name": "/nowhere/model", "folder": "/nowhere/model"}
    path.write_text(json.dumps(record))
    reporter = Listening()
    found = inspect(run, wanted=NORMS, reporter=reporter)
    assert found.base is None
    assert found.verdict is None
    assert "pass --base" in reporter.warnings[0]


def test_a_damaged_journal_costs_the_curves_only(make_run):
    run = make_run()
    journal = run / "editcli" / "journal.jsonl"
    journal.write_bytes(b"garbage\n" + journal.read_bytes())
    reporter = Listening()
    found = inspect(run, wanted=NORMS, reporter=reporter)
    assert found.history.batches == ()
    assert all(site.ratio is not None for site in found.sites)
    assert "journal" in reporter.warnings[0]


def test_a_weight_that_is_not_finite_is_collapsing(base, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    weight = load_file(base / "model.safetensors")[name]
    weight[0, 0] = float("nan")
    found = inspect(edited_copy(base, tmp_path / "broken", {name: weight}), wanted=SPECTRAL, base=base)
    assert found.verdict == "collapsing"
    assert [site.verdict.word for site in found.sites] == ["fine", "collapsing", "fine", "fine"]
    json.dumps(found.to_json(), allow_nan=False)


def test_another_model_as_base_is_refused(base, tmp_path):
    other = tiny_model_folder(tmp_path / "other", square=True)
    with pytest.raises(ModelError, match="another model"):
        inspect(base, wanted=NORMS, base=other)


@pytest.mark.parametrize(
    "arguments", [(), ("--norms",), ("--spectral",), ("--spectral", "--base", "BASE"), ("RUN", "--spectral")]
)
def test_json_fits_the_schema(make_run, base, arguments):
    model = make_run() if "RUN" in arguments else base
    given = [base if argument == "BASE" else argument for argument in arguments if argument != "RUN"]
    result = run_cli("inspect", model, *given, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    jsonschema.validate(document, SCHEMA)
    site = document["sites"][0]
    wanted = {
        "frobenius": bool(given),
        "effective_rank": "--spectral" in given,
        "ratio": "--base" in given or model != base,
    }
    assert {name: site[name] is not None for name in wanted} == wanted


def test_the_schema_is_itself_valid():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_tables_say_what_matters(make_run):
    result = run_cli("inspect", make_run(scale=3.0), "--spectral")
    assert result.exit_code == 0, result.output
    for text in (
        "verdict: collapsing",
        "R_n over the run",
        "█",
        "effective rank",
        "inferred",
        "Edits that wrote most",
        "Town 3",
    ):
        assert text in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_it_is_known_since_which_edit_a_site_is_not_fine(make_run):
    run = make_run(scale=0.35)
    found = inspect(run, wanted=NORMS)
    for site in found.sites:
        words = [
            judge(Thresholds(), ratio=ratio, drift=drift).word
            for ratio, drift in zip(
                *(found.history.series(site.site.module, name) for name in ("ratio", "drift")), strict=True
            )
        ]
        fine = words.count("fine")
        assert words == ["fine"] * fine + words[fine:]
        expected = (fine + 1, f"e{2 * fine}") if fine < len(words) else None
        assert site.since == expected
    assert any(site.since for site in found.sites)
    assert "no longer fine since batch" in " ".join(run_cli("inspect", run, "--norms").stdout.split())
    assert inspect(make_run(scale=1e-4, name="calm"), wanted=NORMS).sites[0].since is None


def test_thresholds_can_be_changed(make_run):
    run = make_run(scale=3.0)
    limits = [f"collapsing_{name}=1e9" for name in ("ratio", "drift", "spectral")]
    found = inspect(run, wanted=Wanted(norms=True, thresholds=parse_thresholds(limits)))
    assert found.verdict == "drifting"


@pytest.mark.parametrize(
    ("text", "reason"),
    [("collapsing_ratoi=3", "collapsing_ratio"), ("collapsing_ratio", "NAME=VALUE"), ("drifting_ratio=9", "not above")],
)
def test_a_bad_threshold_is_named(text, reason):
    with pytest.raises(OptionError, match=reason):
        parse_thresholds([text])


def test_verdicts():
    limits = Thresholds()
    assert judge(limits).word is None
    assert judge(limits, ratio=1.0, drift=0.1).word == "fine"
    assert judge(limits, ratio=1.0, drift=0.1).reasons == ()
    assert judge(limits, ratio=1.3).word == judge(limits, ratio=1 / 1.3).word == "drifting"
    assert (
        judge(limits, ratio=2.6).word == judge(limits, ratio=0.3).word == judge(limits, ratio=0.0).word == "collapsing"
    )
    assert judge(limits, rank=0.95).word == "fine"
    assert judge(limits, rank=0.4).word == "collapsing"
    assert judge(limits, ratio=float("nan")).reasons == ("R_n is not finite",)
    assert worst(["fine", None, "drifting"]) == "drifting"


@pytest.mark.parametrize("tau", [0, -1, 1.5])
def test_tau_is_a_share(tau):
    with pytest.raises(OptionError, match="tau"):
        Wanted(tau=tau)


def test_a_layer_that_does_not_exist_is_refused(base):
    with pytest.raises(ModelError, match="layer 9"):
        inspect(base, wanted=Wanted(layers=(9,)))


def test_a_sparkline_ends_where_the_run_ends():
    assert sparkline([]) == sparkline([None]) == ""
    assert sparkline([1.0]) == "▁"
    assert sparkline([1, 2, 3, 4, 5, 6, 7, 8]) == "▁▂▃▄▅▆▇█"
    assert len(sparkline([float(i) for i in range(1000)])) <= 16
    assert sparkline([0.0] * 999 + [1.0])[-1] == "█"


def test_layers_are_written_as_ranges():
    assert layer_ranges([4, 5, 6, 9]) == "4-6, 9"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["png", "svg", "html"])
def test_plots_are_drawn(make_run, tmp_path, form):
    pytest.importorskip("matplotlib", reason="plots need editcli[report]")
    target = tmp_path / f"plot.{form}"
    result = run_cli("inspect", make_run(), "--spectral", "--plot", target)
    assert result.exit_code == 0, result.output
    start = {"png": b"\x89PNG", "svg": b"<?xml", "html": b"<!doctype html>"}[form]
    assert target.read_bytes().startswith(start)
    if form == "html":
        assert "R_n per site" in target.read_text("utf-8")


@pytest.mark.parametrize(("target", "reason"), [("plot.pdf", ".png"), ("missing/plot.png", "no folder")])
def test_a_plot_that_cannot_be_written_is_refused_first(base, tmp_path, target, reason):
    result = run_cli("inspect", base, "--plot", tmp_path / target)
    assert isinstance(result.exception, OptionError)
    assert reason in str(result.exception)


def test_a_missing_matplotlib_is_one_sentence(base, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = run_cli("inspect", base, "--plot", tmp_path / "plot.png")
    assert isinstance(result.exception, OptionError)
    assert "editcli[report]" in str(result.exception)


def test_the_view_draws_without_a_run(base):
    assert inspection_view(inspect(base, wanted=NORMS)).renderables
