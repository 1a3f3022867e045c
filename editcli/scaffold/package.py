"""Write a package for a plugin: a working method, its tests and everything that publishing it needs.

The files are templates of :class:`string.Template`, so that a plugin author needs nothing besides this package.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from importlib.metadata import requires, version
from importlib.resources import files
from pathlib import Path
from string import Template

from editcli.errors import OptionError, near_miss
from editcli.plugin.hookspecs import API_VERSION
from editcli.plugin.manager import Plugins
from editcli.scaffold.names import Names, choose_names, refuse_clash


@dataclass(frozen=True, slots=True)
class Kind:
    """The differences between the kinds; ``texts`` are templates that the files' templates fill in."""

    texts: Mapping[str, str]
    imports: tuple[str, ...] = ()
    """Packages besides editcli that the method imports."""


_FIND = 'plugins.find("$kind", "$name").component is $cls'

KINDS: Mapping[str, Kind] = {
    "editor": Kind(
        {
            "article": "an",
            "hook": "editcli_editors",
            "contract": "EditorContract",
            "contract_body": "",
            "summary": "An editor for editcli: writes each batch by damped least squares.",
            "usage": "editcli apply facts.jsonl --editor $name",
            "found": _FIND,
        },
        imports=("torch",),
    ),
    "stabilizer": Kind(
        {
            "article": "a",
            "hook": "editcli_stabilizers",
            "contract": "StabilizerContract",
            "contract_body": "",
            "summary": "A stabilizer for editcli: keeps every batch's update small against the unedited weight.",
            "usage": "editcli apply facts.jsonl --stabilizer $name",
            "found": _FIND,
        }
    ),
    "diagnostic": Kind(
        {
            "article": "a",
            "hook": "editcli_diagnostics",
            "contract": "DiagnosticContract",
            "contract_body": "",
            "summary": "A diagnostic for editcli: the largest single change that each batch makes to a weight.",
            "usage": "editcli apply facts.jsonl  # its figures are in facts-edited/editcli/journal.jsonl",
            "found": _FIND,
        }
    ),
    "format": Kind(
        {
            "article": "a",
            "hook": "editcli_formats",
            "contract": "FormatContract",
            "contract_body": "\n    records = (RECORD,)",
            "summary": "A reader of edit files for editcli: questions about an entity, with new and old answers.",
            "usage": "editcli convert questions.jsonl --from $name",
            "found": "[type(form) for form in plugins.formats()] == [$cls]",
        }
    ),
}


LICENSES = ("Apache-2.0", "BSD-3-Clause", "MIT")
"""Licences by their SPDX names; the first is editcli's own."""


@dataclass(frozen=True, slots=True)
class Scaffolded:
    """The written package: its folder, its files relative to it, the name of the plugin and how to use it."""

    folder: Path
    files: tuple[str, ...]
    name: str
    kind: str
    distribution: str
    usage: str


def scaffold(
    name: str,
    plugins: Plugins,
    *,
    kind: str,
    out: str | Path | None = None,
    license: str = LICENSES[0],
    author: str | None = None,
) -> Scaffolded:
    """Write a plugin of ``kind`` into ``out``, by default a folder called as its distribution.

    Raises :class:`OptionError` for an unusable name, kind, licence or folder, and :class:`PluginError` when something
    of that name is installed. A file that exists is never written.
    """
    if kind not in KINDS:
        raise OptionError(f"there is no kind of plugin {kind!r}{near_miss(kind, KINDS)}")
    if license not in LICENSES:
        raise OptionError(f"there is no text of the licence {license!r} here{near_miss(license, LICENSES)}")
    names = choose_names(name, kind)
    refuse_clash(names, plugins)
    values = _values(names, KINDS[kind], license=license, author=author or f"The {names.distribution} contributors")
    texts = dict(sorted(_render(names, KINDS[kind], values).items()))
    folder = Path(out) if out is not None else Path(names.distribution)
    _write(folder, texts)
    return Scaffolded(folder, tuple(texts), names.name, kind, names.distribution, values["usage"])


def _values(names: Names, kind: Kind, *, license: str, author: str) -> dict[str, str]:
    """Return what the templates fill in."""
    if not author.strip() or not author.isprintable():
        raise OptionError(f"{author!r} cannot stand in a licence; pass the author's name in one line")
    plain = {
        "name": names.name,
        "kind": names.kind,
        "title": names.title,
        "cls": names.cls,
        "module": names.module,
        "distribution": names.distribution,
        "license": license,
        "author": author,
        # A TOML string in quotation marks is written as JSON writes one.
        "author_toml": json.dumps(author, ensure_ascii=False),
        "year": str(date.today().year),
        "api": str(API_VERSION),
        "dependencies": ", ".join(json.dumps(text) for text in (f"editcli>={version('editcli')}", *_bounds(kind))),
    }
    filled = {name: Template(text).substitute(plain) for name, text in kind.texts.items()}
    return {**plain, **filled}


def _bounds(kind: Kind) -> list[str]:
    """Return the packages that the method imports itself, with editcli's own lower bounds."""
    return [text for text in requires("editcli") or () if text.partition(">=")[0] in kind.imports]


def _render(names: Names, kind: Kind, values: Mapping[str, str]) -> dict[str, str]:
    """Return the text of every file by its path in the package's folder."""
    parts = {part: _fill(f"{names.kind}/{part}", values).rstrip("\n") for part in ("test_imports", "test_body")}
    package = f"src/{names.module}"
    return {
        "pyproject.toml": _fill("pyproject.toml", values),
        "README.md": _fill("README.md", values),
        "LICENSE": _fill(f"licenses/{values['license']}", values),
        ".gitignore": _fill("gitignore", values),
        ".github/workflows/test.yml": _fill("workflow.yml", values),
        f"{package}/__init__.py": _fill("init.py", values),
        f"{package}/{names.kind}.py": _fill(f"{names.kind}/method.py", values),
        f"tests/test_{names.name}.py": _fill("test.py", {**values, **parts}),
    }


def _fill(template: str, values: Mapping[str, str]) -> str:
    text = (files("editcli.scaffold") / "templates" / f"{template}.tmpl").read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _write(folder: Path, texts: Mapping[str, str]) -> None:
    """Write the files into a folder that is new or empty."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError(f"{folder} exists already and is never overwritten; choose another with --out")
        for path, text in texts.items():
            file = folder / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("x", encoding="utf-8", newline="\n") as opened:
                opened.write(text)
    except OSError as error:
        raise OptionError(
            f"{folder} cannot be written: {error.strerror or error}; choose another with --out"
        ) from error
