"""The example of a published plugin: used from the command line, resumed, undone, and missed when it is gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from editcli.__main__ import main
from editcli.plugin.manager import load_plugins
from editcli.testing import tiny_model_folder
from tests.support.facts import CAPITALS, write_lines
from tests.support.places import ROOT

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "examples" / "editcli-orthogonal"
QUICK = ("--layers", "1-2", "--device", "cpu", "--no-eval", "--batch-size", "1", "--checkpoint-every", "1")
QUICKER = ("-o", "targets.steps=1", "-o", "targets.prefixes=1", "-o", "targets.prefix_tokens=2")
STACK = ("--stabilizer", "orthogonal", "-o", "orthogonal.warmup=2", "-o", "orthogonal.deviations=0")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the example for this test: its package and its entry point on ``sys.path``; return that folder."""
    site = tmp_path / "site"
    info = site / "editcli_orthogonal-0.1.0.dist-info"
    info.mkdir(parents=True)
    (site / "editcli_orthogonal").symlink_to(EXAMPLE / "src" / "editcli_orthogonal")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: editcli-orthogonal\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[editcli]\northogonal = editcli_orthogonal\n")
    monkeypatch.syspath_prepend(str(site))
    return site


@pytest.fixture
def apply(tmp_path: Path, corpus_text: str) -> Callable[..., Path]:
    """Apply edits to a tiny model and return the run's folder."""
    model, edits, corpus = tmp_path / "model", tmp_path / "facts.jsonl", tmp_path / "corpus.txt"
    tiny_model_folder(model, "llama")
    corpus.write_text(corpus_text)
    write_lines(edits, CAPITALS)

    def apply(out: str, *arguments: str, code: int = 0, stack: tuple[str, ...] = STACK) -> Path:
        given = ("--model", str(model), "--corpus", str(corpus), "--out", str(tmp_path / out))
        assert main(["-q", "apply", str(edits), *given, *QUICK, *QUICKER, *stack, *arguments]) == code
        return tmp_path / out

    return apply


def weights(run: Path) -> dict[str, bytes]:
    """Return the bytes of every saved tensor: the model's, and those of the stream's state."""
    files = (*run.glob("model*.safetensors"), run / "editcli" / "state.safetensors")
    tensors = {f"{file.name}:{name}": tensor for file in files for name, tensor in load_file(file).items()}
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}


def test_its_own_tests_pass() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=EXAMPLE, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_names_the_plugin_and_a_resumed_one_is_the_same_bytes(example: Path, apply: Callable[..., Path]) -> None:
    whole, broken = apply("whole"), apply("broken", "--limit", "4")
    record = json.loads((whole / "editcli" / "run.json").read_text())
    assert {"name": "orthogonal", "distribution": "editcli-orthogonal", "version": "0.1.0"} in record["provenance"][
        "plugins"
    ]
    figures = record["components"]["orthogonal"]["sites"].values()
    assert [site["batches"] for site in figures] == [8, 8]
    assert all(0 < site["exceptional"] < 8 for site in figures)
    assert weights(whole) != weights(broken)
    apply("broken", "--resume")
    assert weights(whole) == weights(broken)


def test_an_undone_stream_is_the_one_that_stopped_there(example: Path, apply: Callable[..., Path]) -> None:
    stopped, undone = apply("stopped", "--limit", "5"), apply("undone")
    assert main(["-q", "undo", str(undone), "--batches", "3"]) == 0
    figures = [json.loads((run / "editcli/run.json").read_text())["components"] for run in (stopped, undone)]
    assert figures[0] == figures[1]
    for run in (stopped, undone):
        apply(run.name, "--resume")
    assert weights(stopped) == weights(undone)


def test_a_missing_plugin_is_named_with_the_command_that_installs_it(
    example: Path, apply: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = apply("run", "--limit", "2")
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(example)])
    assert "orthogonal" not in load_plugins().all("stabilizer")
    before = weights(run)
    capsys.readouterr()
    apply("run", "--resume", code=1)
    apply("run", "--resume", code=1, stack=())
    assert main(["-q", "undo", str(run), "--batches", "1"]) == 1
    assert main(["-q", "apply", "--repeat", str(run / "editcli/run.json"), "--out", str(run.with_name("again"))]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4
    for line in errors:
        assert "was made with 'orthogonal' of editcli-orthogonal 0.1.0" in line
        assert line.endswith("; pip install editcli-orthogonal==0.1.0")
    assert weights(run) == before


def test_a_plugin_that_broke_since_is_named_with_the_reason(
    example: Path, apply: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = apply("run", "--limit", "2")
    (example / "editcli_orthogonal").unlink()
    (example / "editcli_orthogonal.py").write_text("editcli_api = 3\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "editcli_orthogonal"]:
        monkeypatch.delitem(sys.modules, name)
    capsys.readouterr()
    apply("run", "--resume", code=1)
    warning, error = capsys.readouterr().err.splitlines()
    said = "editcli-orthogonal 0.1.0 is written for version 3 of the plugin interface"
    assert warning.startswith("warning: plugin 'orthogonal'")
    assert said in warning
    assert error.startswith(f"error: {run} was made with 'orthogonal' of editcli-orthogonal 0.1.0")
    assert said in error
