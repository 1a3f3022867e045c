"""Build the example plugin and a generated one of every kind, install their wheels beside editcli and use them.

``python tools/check_plugins.py [--python PYTHON]`` takes the interpreter of an environment that holds editcli and its
``test`` extra. A new environment is laid over that one, so that torch is not installed again: it holds the plugins'
wheels, and sees what the other one holds. Everything is written into a temporary folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from editcli import API_VERSION

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "editcli-orthogonal"
FACTS = ROOT / "sample_edits" / "facts.jsonl"
KINDS = ("editor", "stabilizer", "diagnostic", "format")
NAMES = {"orthogonal": "stabilizer", **{f"my_{kind}": kind for kind in KINDS}}
RECORD = {"dataset": "my_format", "question": "Where is Rome?", "entity": "Rome", "answer": "Spain"}
PACKAGES = "import sysconfig; print(sysconfig.get_path('purelib'), sysconfig.get_path('platlib'), sep='\\n')"


class Bench:
    """A folder to work in, the interpreter that was given, and the one of an environment laid over it."""

    def __init__(self, folder: Path, base: str):
        self.folder, self.base, self.started = folder, base, time.monotonic()
        self.python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"

    def step(self, title: str) -> None:
        """Say what is done next."""
        print(f"-- {title} ({time.monotonic() - self.started:.0f}s)", flush=True)

    def run(self, *command: str | Path, code: int = 0) -> str:
        """Run a command in the folder; return its output, or what it said on stderr where it is to fail."""
        foreign = ("EDITCLI_", "PYTEST_", "PYTHONPATH")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        environment |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        line = [str(part) for part in command]
        done = subprocess.run(line, cwd=self.folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != code:
            raise SystemExit(f"{done.stdout}\n{done.stderr}\n{' '.join(line)}: exit code {done.returncode}, not {code}")
        return done.stderr if code else done.stdout

    def editcli(self, *arguments: str | Path, code: int = 0) -> str:
        """Run editcli in the new environment."""
        return self.run(self.python, "-m", "editcli", *arguments, code=code)

    def pip(self, *arguments: str | Path) -> None:
        """Run the other environment's pip on the new one."""
        self.run(self.base, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "-q", *arguments)

    def overlay(self) -> None:
        """Make the environment, which sees the other one's packages through a path file."""
        self.run(self.base, "-m", "venv", "--without-pip", self.folder / "env")
        (own, *_) = self.run(self.python, "-c", PACKAGES).splitlines()
        # addsitedir reads the other's path files as well, which is how an editable install is found.
        found = dict.fromkeys(self.run(self.base, "-c", PACKAGES).splitlines())
        lines = "".join(f"import site; site.addsitedir({path!r})\n" for path in found)
        (Path(own) / "other-environment.pth").write_text(lines, encoding="utf-8")

    def wheels(self, folders: list[Path]) -> list[Path]:
        """Build the wheels of ``folders`` with one build backend, which is installed where there is none."""
        probe = subprocess.run([self.python, "-c", "import hatchling"], capture_output=True, check=False)
        if probe.returncode:
            self.pip("install", "hatchling>=1.24")
        options = ("--no-deps", "--no-build-isolation", "--no-cache-dir", "-w", self.folder / "wheels")
        self.pip("wheel", *options, *folders)
        return sorted((self.folder / "wheels").glob("*.whl"))


def check_listing(bench: Bench) -> None:
    """Every plugin is listed under its kind, with the distribution and version of its wheel."""
    rows = json.loads(bench.editcli("plugins", "--json"))
    assert not rows["broken"], rows["broken"]
    found = {row["name"]: row for row in rows["plugins"]}
    for name, kind in NAMES.items():
        row = found[name]
        assert (row["kind"], row["version"], row["api"]) == (kind, "0.1.0", API_VERSION), row
        assert row["distribution"] == f"editcli-{name.replace('_', '-')}", row
    assert "arXiv:2505.07899" in bench.editcli("plugins", "orthogonal")


def check_run(bench: Bench) -> None:
    """All of them take part in a run, whose record names them; a format's records become edits."""
    stack = ("--editor", "my_editor", "--stabilizer", "orthogonal", "--stabilizer", "my_stabilizer")
    bench.editcli(
        "-q", "apply", FACTS, "--limit", "3", "--batch-size", "1", *stack, "--out", "out", "-o", "targets.prefixes=1"
    )
    record = json.loads((bench.folder / "out/editcli/run.json").read_text("utf-8"))
    brought = {part["name"]: part["version"] for part in record["provenance"]["plugins"]}
    assert brought == dict.fromkeys(("my_editor", "orthogonal", "my_stabilizer"), "0.1.0"), brought
    assert record["status"] == "done"
    (bench.folder / "questions.jsonl").write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    converted = bench.editcli("convert", "questions.jsonl", "--from", "my_format")
    assert json.loads(converted)["subject"] == "Rome", converted
    journal = (bench.folder / "out/editcli/journal.jsonl").read_text("utf-8")
    assert "my_diagnostic/layer" in journal


def check_missing(bench: Bench) -> None:
    """Once the example is gone, the run that needs it says how to get it back."""
    bench.pip("uninstall", "-y", "editcli-orthogonal")
    said = bench.editcli("-q", "apply", FACTS, "--resume", "--out", "out", code=1)
    assert said.rstrip().endswith("; pip install editcli-orthogonal==0.1.0"), said


def check(bench: Bench) -> None:
    """Do everything, step by step."""
    bench.step("an environment over the one of " + bench.base)
    bench.overlay()
    bench.step("generate a plugin of every kind")
    for kind in KINDS:
        bench.editcli("plugins", "new", f"my-{kind}", "--kind", kind, "--out", kind)
    folders = [EXAMPLE, *(bench.folder / kind for kind in KINDS)]
    bench.step("build wheels")
    wheels = bench.wheels(folders)
    assert len(wheels) == len(folders), wheels
    bench.step("install them, with their lower bounds met by what is there")
    bench.pip("install", "--no-index", *wheels)
    bench.step("list them")
    check_listing(bench)
    bench.step("run their own tests")
    flags = ("-q", "-p", "no:cacheprovider", "-W", "error", "--import-mode=importlib", "-c", os.devnull)
    said = bench.run(bench.python, "-m", "pytest", *flags, *(folder / "tests" for folder in folders))
    print(said.splitlines()[-1])
    bench.step("use them")
    check_run(bench)
    check_missing(bench)
    bench.step("done")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="interpreter of an environment that holds editcli")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        check(Bench(Path(folder), arguments.python))


if __name__ == "__main__":
    main()
