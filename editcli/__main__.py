"""The program: load the plugins, run one command, report an error in one line with an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Sequence

import click

from editcli.cli import libraries
from editcli.cli.app import App
from editcli.cli.completion import VARIABLE
from editcli.cli.main import build_cli
from editcli.distributed.launch import Launch
from editcli.errors import EditError, RankError
from editcli.formatting import printable
from editcli.heap import keep_freed
from editcli.plugin.manager import Plugins, load_plugins

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells report it (128 + SIGINT)."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``editcli`` and return its exit code."""
    keep_freed()
    libraries.quieten()
    _accept_any_text()
    app: App | None = None
    launch = Launch()
    try:
        launch = Launch.read(os.environ)
        app = App(load_plugins(), launch)
        group = build_cli(app.plugins)
        # During completion a warning would be drawn into the line being typed.
        if launch.leads and VARIABLE not in os.environ:
            _warn_broken(app.plugins)
        code = group.main(args=_or_help(arguments), prog_name="editcli", obj=app, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except EditError as error:
        if isinstance(error, RankError) and error.told:
            return error.exit_code
        if app is not None and app.verbosity > 0:
            traceback.print_exc()
        return _fail(str(error), error.exit_code)
    except click.ClickException as error:
        # Every process has the same command line, so only rank 0 reports what is wrong with it.
        return _usage_error(error) if launch.leads else error.exit_code
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED) if launch.leads else INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has exited, as in `editcli plugins | head -1`; the flush at exit must not fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except PermissionError as error:
        # Even a test whether a file exists fails in a folder that this user may not enter.
        if app is not None and app.verbosity > 0:
            traceback.print_exc()
        return _fail(f"there is no permission for {error.filename or error}; change it, or name another path", 1)
    except Exception as error:
        if not _was_interrupted(error):
            raise
        return _fail("interrupted", INTERRUPTED) if launch.leads else INTERRUPTED


def _was_interrupted(error: BaseException) -> bool:
    """Tell whether Ctrl-C caused an error; a library that is interrupted while it is imported raises its own."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, KeyboardInterrupt):
            return True
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return False


def _or_help(arguments: Sequence[str] | None) -> Sequence[str]:
    return (sys.argv[1:] if arguments is None else arguments) or ["--help"]


def _fail(message: str, code: int) -> int:
    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    return code


def _usage_error(error: click.ClickException) -> int:
    """Show a usage error in one line, with the file or variable of a bad value."""
    context = getattr(error, "ctx", None)
    hint = ""
    if isinstance(context, click.Context):
        hint = f" (see '{context.command_path} --help')"
        hint = _origin(context, getattr(error, "param", None)) + hint
    return _fail(error.format_message().rstrip(".") + hint, error.exit_code)


def _origin(context: click.Context, parameter: click.Parameter | None) -> str:
    if parameter is None or parameter.name is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    if source is click.core.ParameterSource.DEFAULT_MAP:
        return f", read from {context.meta.get('editcli.settings.config', 'editcli.toml')}"
    if source is click.core.ParameterSource.ENVIRONMENT:
        return f", read from the variable {parameter.envvar}"
    return ""


def _warn_broken(plugins: Plugins) -> None:
    """Warn of every broken plugin, now or when its hook is called."""

    def warn(name: str, reason: str) -> None:
        first_line = printable(" ".join(reason.split()))
        click.echo(f"warning: plugin {name!r} could not be loaded and is left out: {first_line}", err=True)

    for name, reason in plugins.broken.items():
        warn(name, reason)
    plugins.on_broken = warn


def _accept_any_text() -> None:
    """Escape text that stdout cannot encode, such as a file name that is not UTF-8, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
