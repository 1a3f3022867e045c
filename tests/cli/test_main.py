"""The program itself: exit codes, one line for an error, what goes to stdout and what to stderr."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from editcli import __main__ as program
from editcli.cli.app import App
from editcli.cli.command import Command
from editcli.cli.main import COMMANDS, build_cli
from editcli.errors import GuardError, NumericalError, RequestError, near_miss
from editcli.plugin.manager import Plugins, load_plugins


def run(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "editcli", *arguments],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def main_raising(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run ``editcli boom``, a command that raises what it is given."""

    def main(error: BaseException, *arguments: str) -> int:
        def build(plugins: Plugins) -> click.Group:
            group = build_cli(plugins)

            @click.command(name="boom")
            def boom() -> None:
                raise error

            group.add_command(boom)
            return group

        monkeypatch.setattr(program, "build_cli", build)
        return program.main([*arguments, "boom"])

    return main


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RequestError("bad", file="e.jsonl", line=3, column=4), 2, "error: e.jsonl:3:4: bad"),
        (GuardError("stopped by ratio>2"), 3, "error: stopped by ratio>2"),
        (NumericalError("lost definiteness", site="m.0", condition=1e9), 1, "error: m.0: lost definiteness"),
        (PermissionError(13, "Permission denied", "/home/x/run"), 1, "error: there is no permission for /home/x/run"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (click.UsageError("no"), 2, "error: no"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    main_raising: Any, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    assert main_raising(error) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    # Click ends the line of a terminal's ^C first.
    (line,) = filter(None, captured.err.splitlines())
    assert line.startswith(said)


def test_an_error_lists_no_more_names_than_can_be_read() -> None:
    assert near_miss("x", ["b", "a"]) == "; known: a, b"
    said = near_miss("nothing", [f"s{number:05}" for number in range(20_000)])
    assert len(said) < 300
    assert said.endswith(" and 19,970 more")


def test_an_error_of_several_lines_is_shown_as_one(main_raising: Any, capsys: pytest.CaptureFixture[str]) -> None:
    main_raising(GuardError("first\n  second"))
    assert capsys.readouterr().err == "error: first second\n"


def test_verbose_shows_where_an_error_came_from(main_raising: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main_raising(GuardError("stopped"), "-v") == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_shows_its_traceback(main_raising: Any) -> None:
    with pytest.raises(ZeroDivisionError):
        main_raising(ZeroDivisionError())


def test_without_arguments_the_help_is_shown() -> None:
    done = run()
    assert (done.returncode, done.stderr) == (0, "")
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["aply"], "there is no command 'aply'; did you mean 'apply'?"),
        (["stats", "shw"], "there is no command 'shw'; did you mean 'show'?"),
        (["apply"], "Missing argument 'EDITS.jsonl'"),
        (["plugins", "--jsn"], "--json"),
        (["--colour"], "--colour"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_a_hint(arguments: list[str], said: str) -> None:
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line


def test_every_command_in_the_list_exists_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    group = build_cli(load_plugins())
    context = click.Context(group, obj=App(Plugins()))
    modules = {path.stem for path in Path(program.__file__).parent.joinpath("cli").glob("*.py")}
    for name, (place, short) in COMMANDS.items():
        command = group.get_command(context, name)
        assert command is not None
        assert place.partition(":")[0].rpartition(".")[2] in modules
        assert short.endswith(".")
        assert program.main([name, "--help"]) == 0
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help, f"{name} {parameter.opts} has no help"
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["stats"], ["-v"]])
def test_a_missing_command_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(arguments) == 2
    assert re.fullmatch(r"error: Missing command \(see 'editcli( stats)? --help'\)\n", capsys.readouterr().err)


def test_a_bench_without_a_stream_says_which_option_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program.main(["bench"]) == 2
    assert "pass a stream of edits with --edits" in capsys.readouterr().err
    assert program.main(["bench", "--edits", "none.jsonl"]) == 2
    assert "none.jsonl: cannot be read: there is no such file" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_options_stand_in_their_sections(capsys: pytest.CaptureFixture[str]) -> None:
    program.main(["apply", "--help"])
    shown = capsys.readouterr().out
    titles = [
        line[:-1] for line in shown.splitlines() if line and not line.startswith((" ", "Usage")) and line[-1] == ":"
    ]
    assert titles == ["Model", "Method", "Output", "Run", "Other options"]


def test_help_fits_a_terminal_of_80_columns_with_one_line_for_each_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ([], *([name] for name in COMMANDS)):
        program.main([*command, "--help"])
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if len(line) > 80 and "~/.config" not in line] == []
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", shown, re.MULTILINE), (
            f"the summary of {name} is too long"
        )


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("plugins", "stats", "completion")])
def test_sections_that_all_commands_have_come_last_and_in_one_order(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    program.main([name, "--help"])
    titles = re.findall(r"^(\w[\w ]*):$", capsys.readouterr().out, re.MULTILINE)
    shared = [title for title in ("Output", "Hub", "Run", "Other options") if title in titles]
    assert titles[-len(shared) :] == shared
    assert {"Output", "Run", "Other options"} <= set(titles)


def test_every_option_can_be_set_by_a_variable_unless_it_is_dangerous_or_of_the_moment() -> None:
    from editcli.cli.apply import apply

    assert isinstance(apply, Command)
    without = {p.name for p in apply.params if isinstance(p, click.Option) and not p.envvar}
    expected = {"assignments", "overwrite", "resume", "repeated", "dry_run", "trust_remote_code", "as_json"}
    expected |= {"verbose", "quiet", "convert_bin"}
    assert without - {"help"} <= expected


def test_plugins_lists_everything_with_options_and_papers() -> None:
    done = run("plugins", "--json")
    rows = {row["name"]: row for row in json.loads(done.stdout)["plugins"]}
    memit = rows["memit"]
    assert (memit["kind"], memit["distribution"], memit["paper"]) == ("editor", "editcli", "arXiv:2210.07229")
    remember = next(option for option in memit["options"] if option["name"] == "remember")
    assert (remember["type"], remember["default"]) == ("true|false", False)
    assert remember["help"]


def test_plugins_explains_one_component(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["plugins", "nas"]) == 0
    shown = capsys.readouterr().out
    assert "guard" in shown
    assert "arXiv:2602.02543" in shown
    assert program.main(["plugins", "nsa"]) == 1
    assert "did you mean 'nas'" in capsys.readouterr().err


def test_a_table_that_is_not_on_a_terminal_has_no_colour_codes() -> None:
    assert "\x1b" not in run("plugins").stdout


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = f"{sys.executable} -m editcli plugins --json | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout == "{\n0\n"
    assert done.stderr == ""


def test_quiet_and_verbose_work_before_and_after_the_command() -> None:
    for arguments in (["-q", "plugins"], ["plugins", "-q"], ["-v", "plugins"], ["plugins", "--verbose"]):
        assert run(*arguments).returncode == 0


@pytest.mark.slow
def test_text_that_the_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    (tmp_path / "facts.jsonl").write_text('{"prompt": "{} is", "subject": "\u6771\u4eac", "target_new": "Rome"}')
    done = run("check", str(tmp_path / "facts.jsonl"), PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u6771" in done.stdout


def test_an_interrupt_that_an_import_turned_into_its_own_error_is_an_interrupt(main_raising: Any, capsys: Any) -> None:
    error = ModuleNotFoundError("Could not import module 'PreTrainedModel'")
    error.__cause__ = ImportError("initialization failed")
    error.__cause__.__context__ = KeyboardInterrupt()
    assert main_raising(error) == 130
    assert "error: interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("e.jsonl",), ("e.jsonl", "--dry-run"), ("e.jsonl", "--model", "small")])
def test_apply_names_the_model_before_it_imports_torch(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """The import takes seconds, and a first line within two is what tells a user that something happens."""
    blocked = (
        "import sys; sys.modules['torch'] = None; from editcli.__main__ import main; main(sys.argv[1:])",
        "apply",
        *arguments,
    )
    found, quiet = (
        subprocess.run(
            [sys.executable, "-c", *blocked, *more], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        for more in ((), ("-q",))
    )
    for process in (found, quiet):
        assert "torch" in process.stderr.splitlines()[-1], "it came as far as the import"
    named = "small" if "small" in arguments else "the model that ships with editcli"
    assert found.stderr.splitlines()[0] == f"Loading {named}"
    assert not quiet.stderr.startswith("Loading")
