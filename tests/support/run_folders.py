"""Run folders as ``apply`` leaves them, made in code: real files and figures, without the cost of real edits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from editcli.plugin.interfaces import LowRank, Problem, Site
from editcli.records.decoding import encode
from editcli.records.journal import START, BatchRecord, SiteFigures, consume, journal_line
from editcli.records.state import RunFolder
from editcli.requests.schema import EditRequest, from_record
from editcli.testing import tiny_model_folder

LAYERS = (1, 2)
MODULE = "model.layers.{}.mlp.down_proj"


def requests_of(count: int) -> list[EditRequest]:
    """Return edits of invented facts."""
    records = (
        {
            "id": f"e{i}",
            "prompt": "{} lives in",
            "subject": f"Person {i}",
            "target_new": f"Town {i}",
            "target_true": "Rome",
        }
        for i in range(count)
    )
    return [from_record(record) for record in records]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model to edit."""
    return tiny_model_folder(tmp_path_factory.mktemp("base") / "model", "llama")


@pytest.fixture
def make_run(base: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return a function that makes the run folder of a stream of edits."""

    def make(requests: Sequence[EditRequest] = (), *, batch: int = 2, scale: float = 0.1, name: str = "run") -> Path:
        return _make(base, tmp_path / name, list(requests or requests_of(6)), batch=batch, scale=scale)

    return make


def _make(base: Path, out: Path, requests: list[EditRequest], *, batch: int, scale: float) -> Path:
    shutil.copytree(base, out)
    run = RunFolder(out)
    run.create()
    tensors = load_file(out / "model.safetensors")
    originals = {layer: tensors[f"{MODULE.format(layer)}.weight"].clone() for layer in LAYERS}
    generator = torch.Generator().manual_seed(0)
    line, consumed, sites = "", START, []
    for step, start in enumerate(range(0, len(requests), batch), start=1):
        edits = requests[start : start + batch]
        problems, updates, sites = {}, {}, []
        for layer, original in originals.items():
            site, name = Site(layer, MODULE.format(layer), False), f"{MODULE.format(layer)}.weight"
            left = scale * torch.randn(original.shape[0], len(edits), generator=generator)
            right = torch.randn(original.shape[1], len(edits), generator=generator)
            problems[site], updates[site] = Problem(site, right.clone(), left.clone()), LowRank(left, right)
            tensors[name] = tensors[name] + left @ right.T
            norm = float(original.norm())
            figures = {
                "ratio": float(tensors[name].norm()) / norm,
                "drift": float((tensors[name] - original).norm()) / norm,
            }
            sites.append(SiteFigures(module=site.module, layer=layer, **figures, update_norm=updates[site].norm()))
        segment, digest = run.write_segment(step, edits, problems, updates)
        consumed = consume(consumed, edits)
        efficacy = {"efficacy_accuracy": 0.9, "efficacy_success": 1.0}
        metrics = {"immediate": efficacy, "retained": {"efficacy_accuracy": 0.8}, "diagnostics": {"norms/layer 1": 0.5}}
        entry = BatchRecord(
            sequence=step,
            step=step,
            edits=tuple(edit.id for edit in edits),
            segment=segment,
            sha256=digest,
            consumed=consumed,
            sites=tuple(sites),
            metrics=metrics,
            seconds={"targets": 0.5, "solve": 0.1},
        )
        line = journal_line(entry, line)
        run.append(line)
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    run.write_record(_record(base, out, len(requests), [encode(site) for site in sites]))
    return out


def _record(base: Path, out: Path, count: int, sites: list[dict[str, Any]]) -> dict[str, Any]:
    efficacy = {"efficacy_accuracy": 0.75, "efficacy_success": 0.875}
    return {
        "status": "done",
        "model": str(base),
        "editor": "memit",
        "stabilizers": ["nas"],
        "edits": {"read": count + 1, "applied": count, "rejected": 1},
        "efficacy": {"before": dict.fromkeys(efficacy, 0.0), "immediate": efficacy, "retained": efficacy},
        "generalization": None,
        "specificity": {"before": 1.0, "after": 0.9, "accuracy": {"before": 0.95, "after": 0.85}},
        "sites": [{**site, "cast_loss": 0.0} for site in sites],
        "seconds": {"total": 12.5},
        "out": str(out),
        "stopped_by": None,
        "verdict": None,
        "recipe": {"edits": "facts.jsonl", "model": str(base), "stabilizers": ["nas"]},
        "provenance": {
            "base": {"name": str(base), "folder": str(base), "revision": None, "fingerprint": "f" * 64},
            "edits": {"file": "facts.jsonl", "sha256": "a" * 64},
            "plugins": [{"name": "memit", "distribution": "editcli", "version": "0.1.0"}],
            "options": {"memit": {"remember": False}},
            "targets": {"steps": 25},
            "versions": {"editcli": "0.1.0"},
            "device": "cpu",
            "written": "2026-01-01T00:00:00+00:00",
        },
    }
