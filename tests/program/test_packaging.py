"""The package and its README: declared as used, and what the README says is so."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import editcli
import editcli.plugin
from editcli import API_VERSION, __version__
from editcli.cli.main import COMMANDS
from editcli.lazy import public_names
from editcli.plugin.manager import load_plugins
from editcli.requests.schema import from_record
from tests.support.places import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def block(language: str, containing: str) -> str:
    """Return the README's code block of a language that contains a text."""
    found = [
        text for text in re.findall(rf"```{language}(?: title=\S+)?\n(.*?)```", README, re.DOTALL) if containing in text
    ]
    assert found, f"README.md has no {language} block with {containing!r}"
    return found[0]


def imported_roots() -> set[str]:
    roots: set[str] = set()
    for folder in ("editcli", "plugins"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    roots |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    roots.add(node.module.partition(".")[0])
    return roots


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[<>=\[; ]", name)[0]).lower()


def test_every_import_is_declared_and_every_declared_dependency_is_used() -> None:
    own = {"editcli", *(path.name for path in (ROOT / "plugins").iterdir())}
    brought = packages_distributions()
    used = {plain(d) for root in imported_roots() - own - sys.stdlib_module_names for d in brought.get(root, [root])}
    required = {plain(text) for text in PROJECT["dependencies"]}
    extras = PROJECT["optional-dependencies"]
    optional = {plain(text) for name in extras for text in extras[name]}
    assert used <= required | optional
    # Torch hands weights over as numpy arrays, though nothing of ours imports numpy.
    assert required <= used | {"numpy"}


def test_dependencies_have_lower_bounds_only() -> None:
    for text in PROJECT["dependencies"]:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+>=[0-9.]+", text), text


def test_the_version_is_the_packages_and_in_the_changelog() -> None:
    assert __version__ == PROJECT["version"]
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert API_VERSION == 2


def test_every_public_name_can_be_imported_and_is_known_to_type_checkers() -> None:
    """Both facades serve what their stubs declare, and a plugin's author finds the interfaces in either."""
    for package in (editcli, editcli.plugin):
        assert package.__file__ is not None
        declared = public_names(Path(package.__file__).with_suffix(".pyi"))
        assert declared
        for name, module in declared.items():
            assert getattr(package, name) is getattr(importlib.import_module(module), name)
            assert name in dir(package)
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = package.no_such_name


def test_ci_runs_the_readmes_own_commands() -> None:
    lines = README.splitlines()
    assert "pip install '.[test]' && pytest" in lines
    assert "pip install . && editcli apply sample_edits/facts.jsonl --stabilizer nas" in lines
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme_command \"pip install '.\\[test\\]'\"" in ci
    assert 'eval "$test_command"' in ci
    assert 'readme_command "pip install . &&"' in ci


def test_the_readme_lists_every_command_and_every_method() -> None:
    assert set(re.findall(r"^\| `editcli ([\w-]+)` \|", README, re.MULTILINE)) == set(COMMANDS)
    plugins = load_plugins()
    for kind in ("editor", "stabilizer"):
        listed = dict(re.findall(rf"^\| `(\w+)` \| {kind} \|.*?\]\(https://([^)\s]+)\)", README, re.MULTILINE))
        references = {name: registered.component.reference for name, registered in plugins.all(kind).items()}
        assert listed.keys() == references.keys()
        for name, reference in references.items():
            # A paper outside of arXiv is named by its title, and its row links to its code.
            if reference.startswith("arXiv:"):
                assert listed[name] == f"arxiv.org/abs/{reference.removeprefix('arXiv:')}"


def test_the_readmes_edit_is_one() -> None:
    import json

    assert from_record(json.loads(block("json", "target_new"))).prompt == "The capital of France is"


def test_the_readmes_plugin_works_as_it_stands(tmp_path: Path) -> None:
    (tmp_path / "editcli_halve.py").write_text(block("python", "class Halve"))
    entry = tomllib.loads(block("toml", "entry-points"))["project"]["entry-points"]["editcli"]
    info = tmp_path / "halve-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halve\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[editcli]\n" + "".join(f"{k} = {v}\n" for k, v in entry.items()))
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from editcli.__main__ import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "plugins", "halve"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "halve, stabilizer from halve 1.0" in done.stdout
    assert "share" in done.stdout


def test_the_readmes_settings_file_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from editcli.__main__ import main

    (tmp_path / "editcli.toml").write_text(block("toml", "stabilizers"))
    monkeypatch.chdir(tmp_path)
    # The settings are read before the edits file, which is not there.
    assert main(["apply", "none.jsonl", "--model", str(tmp_path)]) == 2
