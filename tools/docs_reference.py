"""Write what the code says of itself into the pages: ``python -m tools.docs_reference``; ``--check`` only compares.

Public names and their docstrings, hooks, the options of every method, the fields of the schemas, settings, exit codes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import editcli
import editcli.plugin
from editcli import errors
from editcli.cli.apply import apply
from editcli.cli.options import OTHER, Option
from editcli.errors import EditError
from editcli.health.verdict import Thresholds
from editcli.plugin import hookspecs
from editcli.plugin.manager import Plugins, load_plugins
from editcli.plugin.options import describe
from editcli.presets.loader import all_presets
from editcli.settings.core import CORE
from tools.docs_blocks import DOCS, ROOT, finish, replaced

SCHEMAS = ROOT / "editcli" / "schemas"
FOREIGN = {
    "API_VERSION": "Version of the plugin interface, which a plugin declares as `editcli_api`.",
    "hookimpl": "Mark a function of a plugin as one of the hooks below: pluggy's decorator for this program.",
}
"""Descriptions of names that carry none of ours: other libraries' objects and constants."""


def pages() -> dict[Path, str]:
    """Return the text of every page that holds such a part, as it should be."""
    plugins = load_plugins()
    parts = {
        "reference.md": {"names": _names(), "hooks": _hooks(), "options": _options(plugins)},
        "formats.md": {path.name.partition(".")[0]: _fields(path) for path in sorted(SCHEMAS.glob("*.json"))},
        "configuration.md": {"settings": _settings(), "exits": _exits()},
        "methods.md": {"presets": _presets()},
    }
    found = {}
    for name, blocks in parts.items():
        text = (DOCS / name).read_text("utf-8")
        for block, content in blocks.items():
            text = replaced(text, block, content)
        found[DOCS / name] = text
    return found


def _names() -> str:
    """Describe every public name, of the package and for plugins, in alphabetical order."""
    listed = dict.fromkeys(editcli.plugin.__all__, editcli.plugin) | dict.fromkeys(editcli.__all__, editcli)
    return "\n\n".join(_name(listed[name], name) for name in sorted(listed, key=str.lower))


def _presets() -> str:
    """Return a table of the presets: what they fit, and how far to trust them."""
    rows = []
    for preset in all_presets():
        match, layers = preset.match, preset.layers
        assert match is not None, "every preset that ships names its model"
        sizes = f"{match.model_type}, {match.layers} layers of {match.hidden} and {match.intermediate}"
        vocabulary = "" if match.vocab is None else f", vocabulary {match.vocab}"
        named = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
        rows.append(f"| {preset.name} | {sizes}{vocabulary} | {preset.label} | {named} |")
    return "\n".join(["| preset | fits | label | layers |", "|---|---|---|---|", *rows])


def _is_ours(value: Any) -> bool:
    return getattr(value, "__module__", "").partition(".")[0] == "editcli"


def _hooks() -> str:
    """Return a table of the hooks that a plugin may implement."""
    found = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("editcli_")}
    rows = [f"| `{name}()` | {_markdown(inspect.cleandoc(hook.__doc__ or ''))} |" for name, hook in found.items()]
    return "\n".join(["| hook | |", "|---|---|", *rows])


def _name(package: ModuleType, name: str) -> str:
    value = getattr(package, name)
    if not _is_ours(value):
        return f"### {name}\n\n{FOREIGN[name]}"
    lines = [f"### {name}", "", f"```python\n{_signature(f'{package.__name__}.{name}', value)}\n```"]
    lines += ["", _markdown(value.__doc__)] if value.__doc__ else []
    if inspect.isclass(value) and not issubclass(value, Exception):
        lines += _members(value)
    return "\n".join(lines)


def _signature(name: str, value: Any) -> str:
    """Return how a public name is called, one parameter a line when that is long."""
    if not callable(value) or (inspect.isclass(value) and issubclass(value, Exception)):
        return name
    signature = inspect.signature(value)
    parts, starred = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred = starred or parameter.kind is parameter.VAR_POSITIONAL
        parts.append(_parameter(parameter))
    returned = f" -> {_annotation(signature.return_annotation)}" if not inspect.isclass(value) else ""
    whole = f"{name}({', '.join(parts)}){returned}"
    lines = "".join(f"    {part},\n" for part in parts)
    return whole if len(whole) < 90 else f"{name}(\n{lines}){returned}"


def _parameter(parameter: inspect.Parameter) -> str:
    stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = stars + parameter.name
    if parameter.annotation is not parameter.empty:
        text += f": {_annotation(parameter.annotation)}"
    if parameter.default is not parameter.empty:
        # A default that is an object, such as the environment, belongs to the machine that makes the page.
        plain = isinstance(parameter.default, (str, int, float, bool, tuple, type(None)))
        text += f" = {parameter.default!r}" if plain else " = ..."
    return text


def _annotation(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))


def _members(owner: type) -> list[str]:
    """Describe the public methods and properties of a class and of the classes of ours that it extends."""
    rows = []
    ours = [cls for cls in reversed(owner.__mro__) if cls.__module__.partition(".")[0] == "editcli"]
    for name, member in {name: member for cls in ours for name, member in vars(cls).items()}.items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.isfunction(function) or not function.__doc__:
            continue
        summary = _markdown(function.__doc__.strip().partition("\n\n")[0]).replace("\n", " ").replace("|", "\\|")
        call = name if isinstance(member, property) else f"{name}({_parameters(function)})"
        rows.append(f"| `{call}` | {summary} |")
    return ["", "| member | |", "|---|---|", *rows] if rows else []


def _parameters(function: Any) -> str:
    return ", ".join(name for name in inspect.signature(function).parameters if name not in ("self", "cls"))


def _markdown(text: str) -> str:
    """Return a docstring of ours as Markdown: roles become code, literal blocks become fences, tables too."""
    text = inspect.cleandoc(text)
    text = re.sub(r":\w+:`~?([^`]+)`", lambda match: f"`{match[1]}`", text)
    text = re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)
    return "\n".join(_fenced(text.splitlines()))


def _fenced(lines: Iterable[str]) -> Iterator[str]:
    """Fence what is indented behind a line that ends in two colons."""
    waiting = inside = False
    held: list[str] = []
    for line in lines:
        if inside and line.strip() and not line.startswith(" "):
            yield from ("```", *held)
            inside, held = False, []
        if waiting and line.startswith("    "):
            waiting, inside = False, True
            yield "```text"
        if inside and not line.strip():
            held.append(line)
            continue
        yield from (*held, line[4:] if inside else re.sub(r"\s?::$", ":", line))
        held = []
        waiting = waiting or line.endswith("::")
    if inside:
        yield "```"


def _options(plugins: Plugins) -> str:
    sections = [f"### {name}\n\n{_table(describe(options), name)}" for name, options in CORE.items()]
    for kind in plugins.kinds:
        for name, registered in plugins.all(kind).items():
            rows = describe(registered.component.Options)
            # Whatever else is installed where the page is made has pages of its own.
            if rows and registered.distribution == "editcli":
                sections.append(f"### {name}, {kind}\n\n{_table(rows, name)}")
    sections.append(f"### Thresholds of `inspect` and `report`\n\n{_table(describe(Thresholds), '')}")
    return "\n\n".join(sections)


def _table(rows: list[dict[str, Any]], owner: str) -> str:
    lines = ["| option | type | default | |", "|---|---|---|---|"]
    for row in rows:
        name = f"{owner}.{row['name']}" if owner else row["name"]
        kind, default = _cell(row["type"].replace("|", " | ")), row["default"]
        shown = str(default).lower() if default is None or isinstance(default, bool) else default
        lines.append(f"| `{name}` | {kind} | `{shown}` | {_cell(row['help'])} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Return a text as a table's cell: neither its bars nor its angle brackets mean anything."""
    return text.replace("|", "\\|").replace("<", "&lt;")


def _fields(path: Path) -> str:
    """Return a table of the fields of one schema, those of its lists' objects behind a dot."""
    schema = json.loads(path.read_text("utf-8"))
    rows = [f"| `{name}` | {needed} | {text} |" for name, needed, text in _walk(schema, schema, "")]
    return "\n".join([f"{schema['description']}", "", "| field | | |", "|---|---|---|", *rows])


def _walk(node: dict[str, Any], schema: dict[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in node.get("properties", {}).items():
        parts = [_resolved(part, schema) for part in (field, *field.get("anyOf", ()))]
        text = next((str(part["description"]) for part in (field, *parts) if "description" in part), "")
        yield prefix + name, "required" if name in node.get("required", ()) else "", _cell(text)
        for part in parts:
            if "properties" in part:
                yield from _walk(part, schema, f"{prefix}{name}.")
            elif "items" in part and "properties" in _resolved(part["items"], schema):
                yield from _walk(_resolved(part["items"], schema), schema, f"{prefix}{name}[].")


def _resolved(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    return schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node


def _settings() -> str:
    lines = ["| command line | `editcli.toml` | variable | |", "|---|---|---|---|"]
    for option in (parameter for parameter in apply.params if isinstance(parameter, Option)):
        if getattr(option, "section", OTHER) == OTHER:
            continue
        flag = max(option.opts, key=len)
        settable = option.envvar and not option.cli_only
        key, variable = (f"`{flag[2:]}`" if settable else "", f"`{option.envvar}`" if option.envvar else "")
        lines.append(f"| `{flag}` | {key} | {variable} | {_cell(option.help or '')} |")
    return "\n".join(lines)


def _exits() -> str:
    """Return which exit code each kind of error has."""
    lines = ["| error | exit code | |", "|---|---|---|"]
    for error in [EditError, *EditError.__subclasses__()]:
        if error.__module__ == errors.__name__:
            summary = (error.__doc__ or "").partition(";")[0].strip().rstrip(".")
            lines.append(f"| `{error.__name__}` | {error.exit_code} | {summary} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(finish(pages(), sys.argv[1:]))
