"""What the shell offers when Tab is pressed, and the scripts that ask for it."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete
from click.types import STRING

from editcli.__main__ import main
from editcli.cli.app import App
from editcli.cli.completion import SHELLS, VARIABLE
from editcli.cli.main import COMMANDS, build_cli
from editcli.cli.values import CommaSeparated
from editcli.errors import EditError
from editcli.plugin.manager import load_plugins
from editcli.plugin.options import build, parse_assignments
from editcli.settings.core import CORE


def offered(*words: str) -> list[tuple[str, str]]:
    """Return type and value of what is offered for the last of ``words``."""
    app = App(load_plugins())
    complete = ShellComplete(build_cli(app.plugins), {"obj": app}, "editcli", VARIABLE)
    return [(item.type, item.value) for item in complete.get_completions(list(words[:-1]), words[-1])]


def values(*words: str) -> list[str]:
    return [value for kind, value in offered(*words) if kind == "plain"]


def test_commands_and_flags_are_offered() -> None:
    assert set(values("")) >= set(COMMANDS)
    assert "apply" in values("ap")
    assert {"--editor", "--stabilizer", "--repeat"} <= set(values("apply", "--"))


def test_names_are_those_of_the_installed_plugins() -> None:
    plugins = load_plugins()
    assert values("apply", "--editor", "") == [*plugins.all("editor"), *plugins.stacks()]
    assert values("apply", "-e", "mem") == ["memit"]
    assert values("apply", "--stabilizer", "na") == ["nas"]
    assert values("apply", "-s", "clip,na") == ["clip,nas"]
    assert values("apply", "--editor", "nothing") == []


COMPANIONS = {"prune.feedback=true": ["prune.when=batch"], "nse.bounds_kind=relative": ["nse.met=0.1"]}
"""Options that make sense beside another only."""


def test_every_option_that_is_offered_can_be_given() -> None:
    plugins = load_plugins()
    found = values("apply", "-o", "")
    assert {"memit.remember=true", "memit.remember=false"} <= set(found)
    assert values("apply", "-o", "memit.re") == ["memit.remember=true", "memit.remember=false"]
    components = {name: part.component.Options for kind in plugins.kinds for name, part in plugins.all(kind).items()}
    for text in found:
        ((name, settings),) = parse_assignments([text, *COMPANIONS.get(text, [])]).items()
        try:
            build({**components, **CORE}[name], settings, owner=name)
        except EditError as error:
            pytest.fail(f"{text} is offered, but {error}")


@pytest.mark.parametrize("section", ["targets", "statistics"])
def test_the_options_of_the_core_are_offered_as_those_of_methods_are(section: str) -> None:
    found = values("apply", "-o", f"{section}.")
    assert {text.partition("=")[0] for text in found} == {
        f"{section}.{field.name}" for field in dataclasses.fields(CORE[section])
    }
    assert values("apply", "-o", "targets.cac") == ["targets.cached=true", "targets.cached=false"]
    assert values("apply", "-o", "statistics.tokens=") == ["statistics.tokens=none"]


def test_models_are_the_bundled_one_cached_ones_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = tmp_path / "hub"
    for name in ("models--some--model", "models--gpt2", "datasets--some--text"):
        (hub / name).mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    assert offered("apply", "--model", "") == [
        ("dir", ""),
        ("plain", "bundled"),
        ("plain", "gpt2"),
        ("plain", "some/model"),
    ]
    assert offered("inspect", "some/") == [("dir", "some/"), ("plain", "some/model")]
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "missing"))
    assert values("apply", "--model", "") == ["bundled"]


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (("apply", ""), "file"),
        (("check", "fac"), "file"),
        (("convert", ""), "file"),
        (("undo", ""), "dir"),
        (("report", ""), "dir"),
        (("apply", "--out", ""), "dir"),
        (("convert", "--out", ""), "file"),
        (("apply", "--stats", ""), "file"),
        (("apply", "--config", ""), "file"),
    ],
)
def test_the_shell_completes_files_and_folders(words: tuple[str, ...], kind: str) -> None:
    assert offered(*words)[0][0] == kind


def test_what_has_no_fixed_values_offers_nothing() -> None:
    assert offered("apply", "--seed", "") == []
    assert offered("undo", "run", "--edit", "") == []


def test_nothing_that_has_values_is_left_without() -> None:
    """A new option that takes text either has a completion or is named here."""
    free = {"revision", "thresholds", "author", "metrics", "harness", "push", "name", "prompts", "system"}
    free |= {"judge", "judge_model"}
    group = build_cli(load_plugins())
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        assert command is not None
        plain = [p for p in command.params if p.type is STRING or isinstance(p.type, CommaSeparated)]
        bare = {str(p.name) for p in plain if p._custom_shell_complete is None}
        assert {text for text in bare if f"{name} {text}" != "undo edits"} <= free, name


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_asks_this_program(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"{VARIABLE}={shell}_complete" in script
    assert "%(" not in script


def test_another_shell_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    assert "'bash', 'zsh', 'fish'" in capsys.readouterr().err


@pytest.mark.parametrize(("typed", "answer"), [("--editor me", "memit"), ("-o targets.clamp", "targets.clamp=0.75")])
def test_an_answer_is_quick_and_quiet(typed: str, answer: str) -> None:
    """In a process of its own, as a shell asks; a broken plugin does not draw into the line being typed."""
    ask = (
        "import sys, importlib.metadata as m\n"
        "import editcli.__main__ as main\n"
        "from editcli.plugin.manager import Plugins\n"
        "load = main.load_plugins\n"
        "def loaded():\n"
        "    plugins = load()\n"
        "    plugins.broken['bad'] = 'cannot be imported'\n"
        "    return plugins\n"
        "main.load_plugins = loaded\n"
        "try:\n"
        "    main.main([])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    line = {"COMP_WORDS": f"editcli apply {typed}", "COMP_CWORD": "3", VARIABLE: "bash_complete"}
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, env={**os.environ, **line})
    assert (done.returncode, done.stdout, done.stderr) == (0, f"plain,{answer}\n", "")
