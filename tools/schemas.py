"""Write the JSON schemas of ``run.json`` and of the journal's lines from the types that they are decoded into.

That of ``eval --json`` comes from the registry of metrics.

``python -m tools.schemas`` writes them, with the docstrings of the fields as descriptions; ``--check`` says which of
them are out of date and ends with 1 where any is.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

import click
import msgspec

from editcli.records.journal import BatchRecord, UndoRecord
from editcli.records.record import RunRecord
from tools.evaluation_schema import evaluation_schema

FOLDER = Path(__file__).parents[1] / "editcli" / "schemas"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
WIDTH = 240
"""Characters of a line of a schema."""
PREVIOUS = {"description": "sha256 of the line before; 64 zeros for the first.", "type": "string"}


def run_schema() -> dict[str, Any]:
    """Return the schema of ``run.json``."""
    defs = _definitions(RunRecord)
    head = {"$schema": _DIALECT, "$id": "urn:editcli:run:1", "title": "editcli/run.json of a run"}
    return {**head, **defs.pop("RunRecord"), "additionalProperties": True, "$defs": defs}


def journal_schema() -> dict[str, Any]:
    """Return the schema of a line of the journal, which is a batch or an undo."""
    defs = {**_definitions(BatchRecord), **_definitions(UndoRecord)}
    batch, undo = defs.pop("BatchRecord"), defs.pop("UndoRecord")
    fields = {name: _either(batch["properties"].get(name), field) for name, field in undo["properties"].items()}
    return {
        "$schema": _DIALECT,
        "$id": "urn:editcli:journal:1",
        "title": "One line of editcli/journal.jsonl",
        "description": "One JSON object a line, never rewritten; each names the hash of the line before it.",
        "type": "object",
        "required": [*(name for name in batch["required"] if name in undo["required"]), "previous"],
        "properties": {**batch["properties"], **fields, "previous": PREVIOUS},
        "additionalProperties": True,
        "$defs": defs,
    }


def _definitions(kind: type[Any]) -> dict[str, Any]:
    """Return the schemas of a type and of the types inside it, by name."""
    _, components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    types = _types(kind)
    return {name: _described(schema, types[name]) for name, schema in components.items()}


def _types(kind: Any) -> dict[str, type[Any]]:
    """Return the dataclasses in the annotations of ``kind``, itself among them."""
    module = vars(sys.modules[kind.__module__])
    known = {name: value for name, value in module.items() if isinstance(value, type)}
    return {name: value for name, value in known.items() if dataclasses.is_dataclass(value)}


def _described(schema: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """Return one schema with the docstrings of its fields, and what every record of this version has as required."""
    texts = _docstrings(kind)
    known = {field.name: field.metadata for field in dataclasses.fields(kind)}
    names = [name for name, metadata in known.items() if "unwritten" not in metadata]
    properties = {name: _plain(schema["properties"][name]) for name in names}
    return {
        "description": " ".join((kind.__doc__ or "").split()),
        "type": "object",
        "required": [name for name in names if not {"optional", "later"} & known[name].keys()],
        "properties": {
            name: {**({"description": texts[name]} if name in texts else {}), **field}
            for name, field in properties.items()
        },
    }


def _docstrings(kind: type[Any]) -> dict[str, str]:
    """Return the text below each field of a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    texts: dict[str, str] = {}
    name = None
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            name = line.target.id
        elif name and isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant):
            texts[name] = " ".join(str(line.value.value).split())
        else:
            name = None
    return texts


def _plain(field: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in field.items() if key != "default"}


def _either(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a field that two kinds of lines have."""
    if first is None or first == second:
        return second
    text = first.get("description", "")
    parts = [{key: value for key, value in part.items() if key != "description"} for part in (first, second)]
    if all("enum" in part for part in parts):
        return {"description": "batch, or undo.", "enum": [value for part in parts for value in part["enum"]]}
    return {"description": text, "anyOf": parts}


def _layout(value: Any, indent: str = "") -> str:
    """Return JSON with a field on each line, whose own fields stand on it as well where they fit."""
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict) or len(indent) + len(text) <= WIDTH:
        return text
    inner = f"{indent}  "
    parts = (f"{inner}{json.dumps(name)}: {_layout(item, inner)}" for name, item in value.items())
    return "{\n" + ",\n".join(parts) + f"\n{indent}}}"


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; end with 1 where a schema is out of date.")
def main(check: bool) -> None:
    """Write the schemas."""
    stale = []
    for name, schema in (("run", run_schema()), ("journal", journal_schema()), ("evaluation", evaluation_schema())):
        path = FOLDER / f"{name}.schema.json"
        text = _layout(schema) + "\n"
        if check and (not path.exists() or path.read_text("utf-8") != text):
            stale.append(path.name)
        elif not check:
            path.write_text(text, "utf-8")
    if stale:
        raise click.ClickException(f"out of date: {', '.join(stale)}; run python -m tools.schemas")


if __name__ == "__main__":
    main()
