"""Tables about plugins."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from editcli.formatting import plural
from editcli.render.tables import table

if TYPE_CHECKING:
    from editcli.scaffold.package import Scaffolded


PAPER = 17
"""Most characters of a line in the column of papers."""


def plugins_table(rows: Sequence[Mapping[str, Any]], broken: Mapping[str, str]) -> RenderableType:
    """Draw one line for each component under the name of its kind, then the plugins that could not be loaded."""
    components = table("name", "from", "paper", "options")
    # In a narrow terminal the options, whose names are long, get the room.
    components.columns[2].max_width = PAPER
    for kind in dict.fromkeys(row["kind"] for row in rows):
        components.add_row(Text(f"{kind}s", style="bold"))
        for row in rows:
            if row["kind"] == kind:
                options = row.get("stack") or ", ".join(option["name"] for option in row["options"])
                origin = f"{row['distribution']} {row['version']}".strip()
                components.add_row(Text(f"  {row['name']}"), origin, Text(row["paper"]), Text(options))
    hint = Text("'editcli plugins NAME' explains the options; set one with -o NAME.KEY=VALUE.", style="dim")
    return Group(components, _broken(broken), hint)


def plugin_detail(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Draw all details of the components of one name."""
    return Group(*(_detail(row) for row in rows))


def scaffolded(made: Scaffolded) -> RenderableType:
    """Draw the files that were written and the next commands."""
    method = next(path for path in made.files if path.endswith(f"/{made.kind}.py"))
    commands = (
        f"cd {shlex.quote(str(made.folder))}",
        "pip install -e '.[test]' && pytest",
        f"editcli plugins {made.name}",
        made.usage,
    )
    files = plural(len(made.files), "file")
    lines = [f"Wrote {made.folder}: {files}, {made.kind} {made.name!r}, which works as it is.", ""]
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
        options = table("option", "type", "default", "what it does")
        for option in row["options"]:
            options.add_row(*(Text(_shown(option[key])) for key in ("name", "type", "default", "help")))
        lines.append(options)
    elif "stack" in row:
        lines += [Text("It stands for:", style="dim"), Text(f"  {row['stack']}")]
    else:
        lines.append(Text("It has no options.", style="dim"))
    return Group(*lines)


def _broken(broken: Mapping[str, str]) -> RenderableType:
    lines = [Text(f"{name}: could not be loaded: {reason}", style="yellow") for name, reason in broken.items()]
    return Group(*lines)


def _shown(value: Any) -> str:
    """Return a value as it is written after ``-o NAME.KEY=``."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
