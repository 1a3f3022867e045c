"""The rooms of the package and which of them a room may import, read from the syntax trees of all its files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.places import ROOT

PACKAGE = ROOT / "editcli"

LAYERS = (
    ("errors", "reporting", "formatting", "heap", "lazy"),
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
DOORS = ("", "plugin")
"""Packages whose public names load on demand, from their stubs: the whole package, and what a plugin may import."""


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


@pytest.mark.parametrize("door", DOORS)
def test_a_door_only_lists_names_and_is_used_by_no_room(door: str) -> None:
    """What a room imported through a door would be loaded behind the back of the table of layers."""
    stub = ast.parse((PACKAGE / door / "__init__.pyi").read_text("utf-8")).body
    listed = {alias.name for node in stub if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert all(isinstance(node, (ast.ImportFrom, ast.AnnAssign)) for node in stub)
    package = ".".join(filter(None, ("editcli", door)))
    for path in PACKAGE.rglob("*.py"):
        through = {name for _, name in imports(path) if name.rpartition(".")[0] == package}
        assert not listed & {name.rpartition(".")[2] for name in through}, path


def test_the_door_of_plugins_holds_nothing_but_its_names() -> None:
    body = ast.parse((PACKAGE / "plugin" / "__init__.py").read_text("utf-8")).body
    assert [type(node).__name__ for node in body] == ["Expr", "ImportFrom", "Assign"]
    assert ast.unparse(body[-1]).endswith("= attach(__name__, __file__)")


def outside() -> list[Path]:
    """Return the modules and templates of everything that is written as a third party writes it."""
    paths = [
        *(ROOT / "plugins").rglob("*.py"),
        *(path for path in (ROOT / "examples").rglob("*.py") if path.parent.name != "api"),
        *(path for path in (PACKAGE / "scaffold" / "templates").rglob("*.tmpl") if "import" in path.read_text("utf-8")),
    ]
    assert len(paths) > 30
    return sorted(paths)


@pytest.mark.parametrize("path", outside(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_plugin_imports_only_the_door_of_plugins_and_in_tests_the_contracts(path: Path) -> None:
    found = re.findall(r"^\s*(?:from|import) (editcli(?:\.[\w.]+)?)(?=\s)", path.read_text("utf-8"), re.MULTILINE)
    allowed = {"editcli.plugin"} | ({"editcli.testing"} if "test" in path.name else set())
    assert set(found) <= allowed


@pytest.mark.parametrize(
    "room", [room for room in rooms() if (PACKAGE / room).is_dir() and room not in ("testing", *DOORS)]
)
def test_the_file_of_a_package_holds_no_code(room: str) -> None:
    """A name has its home in a module that says what it holds; ``editcli.testing`` lists its public names."""
    body = ast.parse((PACKAGE / room / "__init__.py").read_text("utf-8")).body
    assert [type(node).__name__ for node in body] == ["Expr"], room


@pytest.mark.parametrize("folder", ["editcli", "plugins"])
def test_no_function_is_longer_than_a_screen(folder: str) -> None:
    functions = [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", (node.end_lineno or node.lineno) - node.lineno + 1)
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert [name for name, lines in functions if lines > 50] == []
