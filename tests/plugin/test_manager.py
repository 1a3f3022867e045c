"""Loading plugins: found through entry points, clashes refused, a broken one costs one line."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from editcli import API_VERSION, Editor, Stabilizer, hookimpl
from editcli.errors import PluginError
from editcli.plugin.interfaces import LowRank, Problem, Update
from editcli.plugin.manager import Plugins, load_plugins
from tests.support.places import ROOT


class Other(Editor):
    """Write nothing."""

    name = "other"
    reference = "none"

    def solve(self, session: Any, problem: Problem) -> Update:
        """Return nothing to write."""
        return LowRank(problem.residual * 0, problem.keys)


def plugin(**hooks: Any) -> types.SimpleNamespace:
    """Return an object that implements ``hooks``."""
    return types.SimpleNamespace(
        editcli_api=API_VERSION, **{name: hookimpl(function) for name, function in hooks.items()}
    )


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on ``sys.path`` where a test can install distributions."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("thirdparty"):
            del sys.modules[name]


def install(site: Path, distribution: str, entries: dict[str, str], code: str = "", *, version: str = "1.2") -> None:
    """Install a distribution made of one module with ``code`` and of entry points."""
    module = "thirdparty_" + distribution.replace("-", "_")
    (site / f"{module}.py").write_text(code, encoding="utf-8")
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    lines = [f"{name} = {target or module}" for name, target in entries.items()]
    (info / "entry_points.txt").write_text("[editcli]\n" + "\n".join(lines) + "\n")


def installed(site: Path) -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions(path=[str(site)]))


GOOD = """
from editcli.plugin import Stabilizer, hookimpl

editcli_api = {api}

class Quiet(Stabilizer):
    "Do nothing."
    name = "{name}"
    reference = "none"

@hookimpl
def editcli_stabilizers():
    return [Quiet]
"""


def test_an_installed_plugin_is_found_with_its_distribution_and_version(site: Path) -> None:
    install(site, "quiet-plugin", {"quiet": ""}, GOOD.format(name="quiet", api=API_VERSION))
    found = load_plugins(installed(site), {}).find("stabilizer", "quiet")
    assert issubclass(found.component, Stabilizer)
    assert (found.distribution, found.version, found.plugin) == ("quiet-plugin", "1.2", "quiet")


def test_two_distributions_with_one_plugin_name_are_refused_by_name(site: Path) -> None:
    install(site, "first-dist", {"quiet": ""}, GOOD.format(name="quiet", api=API_VERSION))
    install(site, "second-dist", {"quiet": ""}, GOOD.format(name="loud", api=API_VERSION))
    with pytest.raises(PluginError, match=r"(?s)first-dist.*second-dist|second-dist.*first-dist"):
        load_plugins(installed(site), {})


def test_two_plugins_with_one_component_name_are_refused_by_name(site: Path) -> None:
    install(site, "first-dist", {"one": ""}, GOOD.format(name="quiet", api=API_VERSION))
    install(site, "second-dist", {"two": ""}, GOOD.format(name="quiet", api=API_VERSION))
    with pytest.raises(PluginError, match=r"first-dist.*second-dist.*EDITCLI_DISABLE=two"):
        load_plugins(installed(site), {})
    assert load_plugins(installed(site), {"EDITCLI_DISABLE": "two"}).find("stabilizer", "quiet").plugin == "one"


def test_one_distribution_seen_twice_is_no_clash(site: Path) -> None:
    install(site, "quiet-plugin", {"quiet": ""}, GOOD.format(name="quiet", api=API_VERSION))
    twice = [*installed(site), *installed(site)]
    assert "quiet" in load_plugins(twice, {}).all("stabilizer")


HOOK = "from editcli.plugin import hookimpl\neditcli_api = 2\n"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("raise SystemExit(3)", "SystemExit"),
        ("1 +", "SyntaxError"),
        (HOOK + "@hookimpl\ndef editcli_editor(): return []", "unknown hook"),
        (
            HOOK + "@hookimpl\ndef editcli_editors(): raise ValueError('boom')",
            "boom",
        ),
        (HOOK + "@hookimpl\ndef editcli_editors(): return 3", "not iterable"),
        (
            HOOK + "@hookimpl\ndef editcli_editors(): return [int]",
            "not a named subclass",
        ),
        ("editcli_api = 2\ndef editcli_editors(): return []", "hookimpl"),
    ],
)
def test_a_broken_plugin_is_left_out_and_says_why(site: Path, code: str, reason: str) -> None:
    install(site, "broken-plugin", {"broken": ""}, code)
    install(site, "quiet-plugin", {"quiet": ""}, GOOD.format(name="quiet", api=API_VERSION))
    plugins = load_plugins(installed(site), {})
    assert reason in plugins.broken["broken"]
    assert "quiet" in plugins.all("stabilizer")
    with pytest.raises(PluginError, match="could not be loaded"):
        plugins.find("editor", "broken")
    with pytest.raises(PluginError, match="'broken' could not be loaded"):
        load_plugins(installed(site), {"EDITCLI_STRICT_PLUGINS": "1"})
    assert not load_plugins(installed(site), {"EDITCLI_DISABLE": " broken ,x"}).broken


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ("3", r"quiet-plugin 1\.2 is written for version 3 of the .* has version 2; .*pip install -U editcli\)"),
        ("1", r"quiet-plugin 1\.2 is written for version 1 of the .* has version 2; .*pip install -U quiet-plugin\)"),
        ("0", "declares editcli_api = 0, which is no version"),
        ("'1'", "declares editcli_api = '1', which is no version"),
        ("True", "declares editcli_api = True"),
    ],
)
def test_a_plugin_for_another_interface_is_left_out_and_says_what_to_do(site: Path, declared: str, said: str) -> None:
    install(site, "quiet-plugin", {"quiet": ""}, GOOD.format(name="quiet", api=declared))
    install(site, "loud-plugin", {"loud": ""}, GOOD.format(name="loud", api=API_VERSION))
    plugins = load_plugins(installed(site), {})
    assert re.search(said, plugins.broken["quiet"])
    assert list(plugins.all("stabilizer")) == ["loud"]
    with pytest.raises(PluginError, match=said):
        plugins.find("stabilizer", "quiet")
    with pytest.raises(PluginError, match=said):
        load_plugins(installed(site), {"EDITCLI_STRICT_PLUGINS": "1"})


def test_a_plugin_for_an_older_interface_is_the_one_to_upgrade(site: Path) -> None:
    for declared in ("1", "None"):
        code = GOOD.format(name="quiet", api=declared).replace("editcli_api = None\n", "")
        install(site, f"quiet-plugin{len(declared)}", {f"quiet{len(declared)}": ""}, code)
    broken = load_plugins(installed(site), {}).broken
    assert len(broken) == 2
    for name, reason in broken.items():
        assert f"install a newer {name.replace('quiet', 'quiet-plugin')} (pip install -U" in reason


def test_the_declared_interface_is_known(site: Path) -> None:
    install(site, "quiet-plugin", {"quiet": ""}, GOOD.format(name="quiet", api=API_VERSION))
    plugins = load_plugins(installed(site), {})
    assert plugins.find("stabilizer", "quiet").api == plugins.source("quiet").api == API_VERSION


def test_every_built_in_plugin_declares_its_interface() -> None:
    assert {getattr(plugin, "editcli_api", None) for _, plugin in load_plugins().manager.list_name_plugin()} == {
        API_VERSION
    }


def test_an_unknown_name_mentions_plugins_that_were_not_loaded(site: Path) -> None:
    install(site, "broken-plugin", {"broken": ""}, "raise ValueError('boom')")
    with pytest.raises(PluginError, match=r"no stabilizer named 'quiet'.*not loaded: broken"):
        load_plugins(installed(site), {}).find("stabilizer", "quiet")


def test_a_misspelt_hook_is_refused_when_it_is_registered() -> None:
    plugins = Plugins()
    with pytest.raises(PluginError, match="editcli_stabilisers"):
        plugins.register(plugin(editcli_stabilisers=lambda: [Other]), "misspelt")
    plugins.register(plugin(editcli_editors=lambda: [Other]), "other")
    assert "other" in plugins.all("editor")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("editor", "memitt", "did you mean 'memit'"),
        ("stabilizer", "memit", "is an editor, not a stabilizer; pass it as --editor"),
        ("editor", "zzzz", "known: "),
    ],
)
def test_an_unknown_name_gets_the_near_miss(kind: str, name: str, said: str) -> None:
    with pytest.raises(PluginError, match=said):
        load_plugins().find(kind, name)


def test_folders_declarations_and_registered_plugins_agree() -> None:
    folders = {path.parent.name for path in (ROOT / "plugins").glob("*/__init__.py")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = project["entry-points"]["editcli"]
    plugins = load_plugins()
    assert not plugins.broken
    registered = {name for name, _ in plugins.manager.list_name_plugin()}
    assert folders == set(declared.values())
    assert {f"editcli_{name}" for name in declared} == set(declared.values())
    assert set(declared) <= registered


def test_every_component_names_its_paper_and_helps_with_each_option() -> None:
    plugins = load_plugins()
    for kind in plugins.kinds:
        for registered in plugins.all(kind).values():
            assert registered.component.reference
            assert registered.component.__doc__
            for name, field in getattr(registered.component.Options, "__dataclass_fields__", {}).items():
                assert field.metadata.get("help"), f"{registered.name}.{name} has no help"


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_the_core_never_imports_a_plugin_and_plugins_never_import_each_other() -> None:
    names = {path.name for path in (ROOT / "plugins").iterdir() if path.is_dir()}
    for folder in (ROOT / "editcli", ROOT / "plugins"):
        for path in folder.rglob("*.py"):
            foreign = names - {path.parent.name}
            assert not foreign & {module.partition(".")[0] for module in imported_modules(path)}, path


def test_only_the_command_line_imports_click_and_only_renderers_import_rich() -> None:
    for path in (ROOT / "editcli").rglob("*.py"):
        roots = {module.partition(".")[0] for module in imported_modules(path)}
        assert "click" not in roots or path.parent.name == "cli" or path.name == "__main__.py", path
        assert "rich" not in roots or path.parent.name == "render", path


PROBE = """
import sys
from editcli import Editor, Recipe, __version__
from editcli.__main__ import main
from editcli.cli.main import COMMANDS
from editcli.presets.loader import all_presets

all_presets()
commands = [["--help"], ["--version"], ["plugins"], ["plugins", "--json"], *([name, "--help"] for name in COMMANDS)]
for arguments in [sys.argv[1:]] if sys.argv[1:] else commands:
    code = main(arguments)
    loaded = sorted({"torch", "transformers", "numpy", "matplotlib", "optuna"} & set(sys.modules))
    if code or loaded:
        sys.exit(f"{arguments} ended with {code} and imported {loaded}")
"""
"""Run the command of the arguments, or without any the help of every command and all listings."""


def test_help_and_listing_import_nothing_that_takes_long() -> None:
    """Neither do presets, nor the names of the package."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def run(site: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "editcli", *arguments],
        env={**os.environ, "PYTHONPATH": str(site), **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_broken_plugin_costs_one_warning_line(site: Path) -> None:
    install(site, "broken-plugin", {"broken": ""}, "raise ValueError('line one\\nline two')")
    done = run(site, "plugins", "--json")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "warning: plugin 'broken' could not be loaded and is left out: ValueError: line one line two"
    ]
    document = json.loads(done.stdout)
    assert "broken" in document["broken"]
    assert "memit" in {row["name"] for row in document["plugins"]}
    strict = run(site, "plugins", EDITCLI_STRICT_PLUGINS="1")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert strict.stderr.startswith("error: plugin 'broken'")
    assert run(site, "plugins", EDITCLI_DISABLE="broken").stderr == ""


COMMAND = """
import click
from editcli.plugin import hookimpl

editcli_api = 2

@click.command(name="{name}")
@click.option("--loud", is_flag=True)
def command(loud):
    "Say hello."
    click.echo("HELLO" if loud else "hello")

@hookimpl
def editcli_commands():
    return [command]
"""


HOOKS = """
from editcli.plugin import hookimpl

editcli_api = 2

@hookimpl
def {hook}():
    {body}
"""


@pytest.mark.parametrize(
    ("hook", "body", "arguments", "reason"),
    [
        ("editcli_architectures", "raise SystemExit(3)", ("plugins",), "SystemExit: 3"),
        ("editcli_architectures", "return ['llama']", ("inspect", "--json"), "'llama' is not a Family"),
        ("editcli_formats", "raise ValueError('boom')", ("convert", "none.jsonl"), "ValueError: boom"),
        (
            "editcli_formats",
            "return [int]",
            ("convert", "none.jsonl"),
            "<class 'int'> is not a named subclass of Format",
        ),
        ("editcli_commands", "return [3]", ("--help",), "3 is not a named click command"),
    ],
)
def test_a_hook_that_breaks_late_costs_one_warning_line_or_is_an_error_where_strict(
    site: Path, hook: str, body: str, arguments: tuple[str, ...], reason: str
) -> None:
    install(site, "broken-plugin", {"broken": ""}, HOOKS.format(hook=hook, body=body))
    warning = f"warning: plugin 'broken' could not be loaded and is left out: {reason}"
    assert run(site, *arguments).stderr.splitlines()[0] == warning
    strict = run(site, *arguments, EDITCLI_STRICT_PLUGINS="1")
    assert (strict.returncode, strict.stdout) == (1, "")
    assert strict.stderr == f"error: plugin 'broken' could not be loaded: {reason}\n"


def test_listing_a_family_does_not_import_torch(site: Path) -> None:
    body = "from editcli.plugin import Family; return [Family('mine', ('mine',))]"
    install(site, "family-plugin", {"mine": ""}, HOOKS.format(hook="editcli_architectures", body=body))
    environ = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-c", PROBE, "plugins", "mine"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "mine, architecture from family-plugin" in done.stdout


def test_a_plugin_can_bring_a_command(site: Path) -> None:
    install(site, "greeter", {"greet": ""}, COMMAND.format(name="greet"))
    assert "Say hello." in run(site, "--help").stdout
    assert run(site, "greet", "--loud").stdout == "HELLO\n"


def test_a_plugin_cannot_take_a_built_in_command(site: Path) -> None:
    install(site, "greeter", {"greet": ""}, COMMAND.format(name="apply"))
    done = run(site, "apply", "--help")
    assert "EDITS" in done.stdout
    assert "already taken" in done.stderr
