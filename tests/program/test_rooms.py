"""The rooms of the package and which of them a room may import, read from the syntax trees of all its files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "editcli"

LAYERS = (
    ("errors", "reporting", "formatting", "heap"),
    ("storage", "linalg"),
    ("requests",),
    ("plugin",),
    ("models", "records"),
    ("distributed", "presets"),
    ("settings",),
    ("statistics", "evaluation"),
    ("editing", "health"),
    ("runs",),
    ("commands",),
    ("api", "export", "tuning", "testing", "scaffold", "pages"),
    ("render",),
    ("cli",),
)
"""Rooms from the ground up: a room imports from the layers below its own, never sideways or upwards."""

LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
FACADES = ("__init__", "__main__")
"""The package's public names and the program stand outside of the layers: they may name any room."""


def rooms() -> list[str]:
    """Return the packages and modules at the top of the package."""
    names = [path.stem for path in PACKAGE.glob("*.py")]
    return sorted({*names, *(path.parent.name for path in PACKAGE.glob("*/__init__.py"))} - set(FACADES))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and the dotted name of everything of ours that a file imports, inside functions as well."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def arrows(room: str) -> Iterator[tuple[str, str]]:
    """Yield the room that each import of a room names, with the place of the import."""
    folder = PACKAGE / room
    for path in sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]:
        for line, name in imports(path):
            first, *rest = name.split(".")
            if first == "editcli" and rest:
                yield rest[0], f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("room", rooms())
def test_a_room_imports_only_from_the_layers_below(room: str) -> None:
    assert room in LEVEL, f"say in LAYERS where the new room {room!r} stands"
    wrong = [f"{place} imports {other}" for other, place in arrows(room) if other in LEVEL and other != room]
    wrong = [text for text in wrong if LEVEL[text.rpartition(" ")[2]] >= LEVEL[room]]
    assert not wrong, "\n".join(wrong)


def test_the_main_job_reads_like_a_table_of_contents() -> None:
    """Its module names the phases of a run; a dozen modules are enough for that."""
    names = [name for _, name in imports(PACKAGE / "runs" / "apply.py") if name.startswith("editcli.")]
    modules = {name if name == "editcli.runs.planning" else name.rpartition(".")[0] for name in names}
    assert len(modules) <= 12, sorted(modules)


def test_every_layer_names_rooms_that_exist() -> None:
    assert sorted(LEVEL) == rooms()


def test_the_facade_of_the_package_is_imported_by_no_room_but_for_the_version() -> None:
    """A room that imported a public name would load another room behind the table's back."""
    for room in rooms():
        names = {other for other, _ in arrows(room)} - set(LEVEL)
        assert names <= {"__version__"}, (room, names)


@pytest.mark.parametrize("room", [room for room in rooms() if (PACKAGE / room).is_dir() and room != "testing"])
def test_the_file_of_a_package_holds_no_code(room: str) -> None:
    """A name has its home in a module that says what it holds; ``editcli.testing`` lists its public names."""
    body = ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8")).body
    assert [type(node).__name__ for node in body] == ["Expr"], room
