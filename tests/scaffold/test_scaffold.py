"""``plugins new``: what it writes works as it is, and it never writes over anything."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

import editcli.testing
from editcli import API_VERSION
from editcli.__main__ import main
from editcli.errors import OptionError, PluginError
from editcli.plugin import hookspecs
from editcli.plugin.manager import KINDS as COMPONENTS
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import describe
from editcli.scaffold.names import choose_names
from editcli.scaffold.package import KINDS, LICENSES, scaffold
from tests.support.places import ROOT

PLUGINS = Plugins()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return one generated package of each kind."""
    folder = tmp_path_factory.mktemp("generated")
    return {kind: scaffold(f"my-{kind}", PLUGINS, kind=kind, out=folder / kind).folder for kind in KINDS}


def python(*arguments: str, path: list[Path], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the interpreter with ``path`` in front of what it imports from."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "COLUMNS": "80"}
    environment.pop("PYTEST_ADDOPTS", None)
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )


def install(folder: Path) -> Path:
    """Make a generated package look installed: its entry points beside its module; return what goes on the path."""
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / "src" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    entries = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["editcli"].items())
    (info / "entry_points.txt").write_text(f"[editcli]\n{entries}")
    return folder / "src"


@pytest.mark.slow
def test_what_is_generated_passes_its_own_tests(generated: dict[str, Path]) -> None:
    """All kinds in one process, which is what takes the time, with warnings as errors as their own settings have it."""
    sources = [folder / "src" for folder in generated.values()]
    tests = [str(folder / "tests") for folder in generated.values()]
    flags = ("-q", "-p", "no:cacheprovider", "-W", "error", "--import-mode=importlib", "-c", os.devnull)
    done = python("-m", "pytest", *flags, *tests, path=sources, cwd=generated["editor"].parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (passed,) = re.findall(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert int(passed) > 10 * len(KINDS)


@pytest.mark.slow
def test_its_own_settings_are_enough_to_run_its_tests(generated: dict[str, Path]) -> None:
    folder = generated["format"]
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", path=[], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_package_is_what_an_index_takes(generated: dict[str, Path], kind: str) -> None:
    folder = generated[kind]
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["entry-points"]["editcli"] == {f"my_{kind}": f"editcli_my_{kind}"}
    assert all(re.fullmatch(r"[a-z]+>=[\d.]+", bound) for bound in project["dependencies"])
    assert f"editcli>={importlib.metadata.version('editcli')}" in project["dependencies"]
    assert (folder / project["readme"]).read_text(encoding="utf-8").startswith(f"# {project['name']}\n")
    assert "Apache License" in (folder / project["license-files"][0]).read_text(encoding="utf-8")
    package = folder / "src" / f"editcli_my_{kind}"
    assert f"editcli_api = {API_VERSION}\n" in (package / "__init__.py").read_text(encoding="utf-8")
    assert len((package / f"{kind}.py").read_text(encoding="utf-8").splitlines()) <= 45
    for file in filter(Path.is_file, folder.rglob("*")):
        if file.name != "test.yml" and file.suffix != ".pyc":
            assert "$" not in file.read_text(encoding="utf-8"), file
    workflow = (folder / ".github/workflows/test.yml").read_text(encoding="utf-8")
    assert workflow.count("${{ matrix.python }}") == 1
    assert workflow.count("$") == 1


def test_what_is_generated_is_found_and_listing_it_imports_no_torch(generated: dict[str, Path]) -> None:
    code = (
        "import sys; from editcli.__main__ import main; sys.exit(main(['plugins', '--json']) or 'torch' in sys.modules)"
    )
    path = [install(folder) for folder in generated.values()]
    done = python("-c", code, path=path, cwd=generated["editor"].parent)
    assert (done.returncode, done.stderr) == (0, "")
    rows = {row["name"]: row for row in json.loads(done.stdout)["plugins"]}
    for kind in KINDS:
        row = rows[f"my_{kind}"]
        origin = (row["kind"], row["distribution"], row["version"], row["api"])
        assert origin == (kind, f"editcli-my-{kind}", "0.1.0", API_VERSION)
        assert row["summary"]
        assert bool(row["options"]) == (kind in COMPONENTS)


@pytest.mark.parametrize(
    ("text", "kind", "name", "distribution", "cls"),
    [
        ("halve", "editor", "halve", "editcli-halve", "HalveEditor"),
        ("editcli-halve", "format", "halve", "editcli-halve", "HalveFormat"),
        (
            "My.Little--thing_2",
            "stabilizer",
            "my_little_thing_2",
            "editcli-my-little-thing-2",
            "MyLittleThing2Stabilizer",
        ),
        ("my-editor", "editor", "my_editor", "editcli-my-editor", "MyEditor"),
        ("editor", "editor", "editor", "editcli-editor", "EditorEditor"),
        ("class", "editor", "class", "editcli-class", "ClassEditor"),
    ],
)
def test_names_follow_from_the_one_that_is_chosen(text: str, kind: str, name: str, distribution: str, cls: str) -> None:
    names = choose_names(text, kind)
    assert (names.name, names.distribution, names.cls) == (name, distribution, cls)
    assert names.module == f"editcli_{name}"


@pytest.mark.parametrize(
    "name",
    ["", "a b", "-a", "a-", "../a", "a/b", "2fast", "editcli-2", "naïve", "a\n", "\u212a", "new", "targets", "a" * 61],
)
def test_a_name_that_cannot_be_used_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"choose another|cannot name"):
        scaffold(name, PLUGINS, kind="editor", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["nas", "NAS", "editcli-memit", "norms", "zsre", "formats"])
def test_a_name_that_is_installed_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match="from editcli already; choose another name"):
        scaffold(name, load_plugins(), kind="editor", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_broken_plugin_or_of_a_module_is_refused(tmp_path: Path) -> None:
    plugins = Plugins()
    plugins.broken["halve"] = "ImportError"
    with pytest.raises(PluginError, match="cannot be loaded; choose another"):
        scaffold("halve", plugins, kind="editor", out=tmp_path / "out")
    with pytest.raises(PluginError, match="module named 'editcli_nas'"):
        scaffold("nas", PLUGINS, kind="editor", out=tmp_path / "out")


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    full, file, empty = tmp_path / "full", tmp_path / "file", tmp_path / "empty"
    full.mkdir()
    empty.mkdir()
    (full / "kept").write_text("mine")
    file.write_text("mine")
    for taken in (full, file):
        with pytest.raises(OptionError, match=rf"{taken.name} exists already .* --out"):
            scaffold("halve", PLUGINS, kind="editor", out=taken)
    assert [path.name for path in full.iterdir()] == ["kept"]
    assert file.read_text() == "mine"
    scaffold("halve", PLUGINS, kind="editor", out=empty)
    with pytest.raises(OptionError, match="exists already"):
        scaffold("halve", PLUGINS, kind="editor", out=empty)


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot be written: .*; choose another with --out"):
        scaffold("halve", PLUGINS, kind="editor", out=tmp_path / "file" / "below")


@pytest.mark.parametrize("license", LICENSES)
def test_licence_and_author_are_the_chosen_ones(license: str, tmp_path: Path) -> None:
    author = 'Ann "Bob" \\ Öz'
    folder = scaffold("halve", PLUGINS, kind="editor", out=tmp_path / "out", license=license, author=author).folder
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["authors"]) == (license, [{"name": author}])
    text = (folder / "LICENSE").read_text(encoding="utf-8")
    assert author in text or license == "Apache-2.0"
    with pytest.raises(OptionError, match="in one line"):
        scaffold("halve", PLUGINS, kind="editor", out=tmp_path / "other", author="Ann\nBob")


@pytest.mark.parametrize(
    ("kind", "license", "said"), [("editr", "MIT", "'editor'"), ("editor", "GPL", "licence 'GPL'")]
)
def test_an_unknown_kind_or_licence_is_refused(kind: str, license: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=said):
        scaffold("halve", PLUGINS, kind=kind, license=license, out=tmp_path / "out")


def test_the_command_says_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plugins", "new", "halve", "--kind", "stabilizer", "--license", "mit"]) == 0
    shown = capsys.readouterr().out
    assert "cd editcli-halve\n" in shown
    assert "editcli apply facts.jsonl --stabilizer halve\n" in shown
    assert (tmp_path / "editcli-halve/src/editcli_halve/stabilizer.py").is_file()
    assert main(["plugins", "new", "halve", "--kind", "stabilizer"]) == 1
    assert "editcli-halve exists already" in capsys.readouterr().err
    assert main(["plugins", "new", "quarter", "--kind", "format", "--json", "--out", "q"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["name"], document["folder"], document["distribution"]) == ("quarter", "q", "editcli-quarter")
    assert all((tmp_path / "q" / file).is_file() for file in document["files"])


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["new"], 2, "Missing argument 'NAME'"),
        (["new", "halve"], 2, "Missing option '--kind'"),
        (["new", "halve", "--kind", "x"], 2, "'stabilizer'"),
        (["nas", "memit"], 2, "unexpected extra argument"),
        (["nas", "--kind", "editor"], 2, "No such option"),
        (["nsa"], 1, "did you mean 'nas'"),
    ],
)
def test_a_slip_is_one_line(arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", *arguments]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["nas", "--json"], ["--json", "nas"], ["-q", "nas", "--json"], ["--json", "nas", "-q"]]
)
def test_a_name_is_shown_wherever_the_options_stand(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugins", *arguments]) == 0
    (row,) = json.loads(capsys.readouterr().out)["plugins"]
    assert (row["name"], row["kind"], row["api"]) == ("nas", "stabilizer", API_VERSION)


def guide(language: str, containing: str) -> str:
    """Return the guide's code block of a language that contains a text."""
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    (found,) = [text for text in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if containing in text]
    return found


def test_the_guides_plugin_in_two_files_works(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "editcli_halve.py").write_text(guide("python", "class Halve"), encoding="utf-8")
    project = tomllib.loads(guide("toml", "entry-points"))["project"]
    (module,) = project["entry-points"]["editcli"].values()
    plugins = Plugins()
    plugins.register(importlib.import_module(module), "halve")
    found = plugins.find("stabilizer", "halve")
    assert (found.api, describe(found.component.Options)[0]["name"]) == (API_VERSION, "share")
    assert f"editcli>={importlib.metadata.version('editcli')}" in project["dependencies"]


def test_the_guide_names_every_hook_kind_and_contract() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    names = [name for name in vars(hookspecs) if name.startswith("editcli_")]
    names += [*KINDS, *(name for name in vars(editcli.testing) if name.endswith("Contract"))]
    assert len(names) >= 14
    assert [name for name in names if f"`{name}`" not in page] == []
    assert f"`editcli_api = {API_VERSION}`" in page


def test_help_fits_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--help"], ["new", "--help"]):
        assert main(["plugins", *arguments]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) < 80
        assert any("new" in line for line in lines)
