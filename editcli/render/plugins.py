"""Tables about plugins."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from editcli.scaffold.package import Scaffolded


def plugins_table(rows: Sequence[Mapping[str, Any]], broken: Mapping[str, str]) -> RenderableType:
    """Draw one line for each component, then the plugins that could not be loaded."""
    table = _table("name", "kind", "from", "paper", "options")
    for row in rows:
        options = ", ".join(option["name"] for option in row["options"])
        origin = f"{row['distribution']} {row['version']}".strip()
        table.add_row(Text(row["name"], style="bold"), row["kind"], origin, Text(row["paper"]), Text(options))
    hint = Text("'editcli plugins NAME' explains the options; set one with -o NAME.KEY=VALUE.", style="dim")
    return Group(table, _broken(broken), hint)


def plugin_detail(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw everything that is known about the components of one name."""
    return Group(*(_detail(row) for row in rows))


def scaffolded(made: Scaffolded) -> RenderableType:
    """Draw what was written and the commands to go on with."""
    method = next(path for path in made.files if path.endswith(f"/{made.kind}.py"))
    commands = (
        f"cd {shlex.quote(str(made.folder))}",
        "pip install -e '.[test]' && pytest",
        f"editcli plugins {made.name}",
        made.usage,
    )
    lines = [f"Wrote {made.folder}: {len(made.files)} files, {made.kind} {made.name!r}, which works as it is.", ""]
    lines += [f"  {command}" for command in commands]
    lines += ["", f"Replace the method in {method} by yours."]
    # A command that is broken into two lines cannot be copied.
    return Text("\n".join(lines), no_wrap=True, overflow="ignore")


def _detail(row: Mapping[str, Any]) -> RenderableType:
    origin = f"{row['kind']} from {row['distribution']} {row['version']}".strip()
    paper = f" ({row['paper']})" if row["paper"] else ""
    heading = Text.assemble((row["name"], "bold"), f", {origin}", (f", plugin interface {row['api']}", "dim"))
    lines: list[RenderableType] = [heading, Text(row["summary"] + paper)]
    if row["options"]:
        table = _table("option", "type", "default", "what it does")
        for option in row["options"]:
            table.add_row(*(Text(_shown(option[key])) for key in ("name", "type", "default", "help")))
        lines.append(table)
    else:
        lines.append(Text("It has no options.", style="dim"))
    return Group(*lines)


def _table(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table


def _broken(broken: Mapping[str, str]) -> RenderableType:
    lines = [Text(f"{name}: could not be loaded: {reason}", style="yellow") for name, reason in broken.items()]
    return Group(*lines)


def _shown(value: Any) -> str:
    """Return a value as one would write it after ``-o NAME.KEY=``."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
