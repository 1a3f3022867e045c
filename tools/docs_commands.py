"""Write the help of every command into its page: ``python -m tools.docs_commands``; ``--check`` only compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from editcli.cli.main import COMMANDS, build_cli
from editcli.plugin.manager import load_plugins
from tools.docs_blocks import DOCS, finish, replaced

WIDTH = 80
FOLDER = DOCS / "commands"
TEMPLATE = """# editcli {name}

{summary}

## Help

<!-- help: begin -->
<!-- help: end -->
"""


def pages() -> dict[Path, str]:
    """Return the text of every command's page, and of their list, as it should be."""
    group = build_cli(load_plugins())
    index = FOLDER / "index.md"
    rows = [f"| [`editcli {name}`]({name}.md) | {summary} |" for name, (_, summary) in COMMANDS.items()]
    listed = replaced(index.read_text("utf-8"), "commands", "\n".join(["| command | does |", "|---|---|", *rows]))
    found = {index: replaced(listed, "help", _shown(group, "editcli", None))}
    for name, (_, summary) in COMMANDS.items():
        path = FOLDER / f"{name}.md"
        text = path.read_text("utf-8") if path.is_file() else TEMPLATE.format(name=name, summary=summary)
        found[path] = replaced(text, "help", "\n\n".join(_helps(group, name)))
    return found


def _helps(group: click.Group, name: str) -> Iterator[str]:
    """Yield the help of one command, then of its subcommands."""
    parent = _context(group, "editcli", None)
    command = group.get_command(parent, name)
    assert command is not None, f"the table of commands names {name}, which is none"
    yield _shown(command, name, parent)
    if isinstance(command, click.Group):
        context = _context(command, name, parent)
        for part in command.list_commands(context):
            child = command.get_command(context, part)
            assert child is not None, f"{name} lists {part}, which is none"
            yield f"### editcli {name} {part}\n\n{_shown(child, part, context)}"


def _shown(command: click.Command, name: str, parent: click.Context | None) -> str:
    return f"```text\n{command.get_help(_context(command, name, parent)).rstrip()}\n```"


def _context(command: click.Command, name: str, parent: click.Context | None) -> click.Context:
    settings = {} if parent is not None else command.context_settings
    return click.Context(command, info_name=name, parent=parent, terminal_width=WIDTH, **settings)


if __name__ == "__main__":
    sys.exit(finish(pages(), sys.argv[1:]))
