"""Named stacks: an editor, its stabilizers and their options, as data.

A method that only combines others needs no code. It is one TOML file ::

    name = "encore"
    summary = "What it does, in one sentence."
    reference = "arXiv:2502.01636"
    editor = "rlsedit"
    stabilizers = ["nas"]

    [targets]
    stop = "greedy"

whose tables hold the options of its components and of the core. ``--editor encore`` then means all of it; what the
user sets stands over it, and it stands over the model's preset. This module never imports torch.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from editcli.errors import OptionError, near_miss
from editcli.storage.opening import SETTINGS, expanded, read_bytes

TEXTS = ("name", "summary", "reference", "editor")
FACTS = (*TEXTS, "stabilizers")
"""Keys of a stack that are not tables of options."""
SUFFIX = ".toml"
"""The end of a file's name, where an editor is named by a file."""


@dataclass(frozen=True, slots=True)
class NamedStack:
    """An editor with its stabilizers and their options, under a name of its own."""

    name: str
    editor: str
    stabilizers: tuple[str, ...] = ()
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``{component: {option: value}}``."""
    summary: str = ""
    reference: str = ""

    @property
    def written_out(self) -> str:
        """The options of the command line that the name stands for."""
        stabilizers = [f"--stabilizer {name}" for name in self.stabilizers]
        pairs = [(f"{name}.{key}", value) for name, table in self.settings.items() for key, value in table.items()]
        options = [f"-o {path}={str(value).lower() if isinstance(value, bool) else value}" for path, value in pairs]
        return " ".join([f"--editor {self.editor}", *stabilizers, *options])


def parse_stack(text: str, *, origin: str, name: str = "") -> NamedStack:
    """Build a stack from the text of its TOML file; raise :class:`OptionError` that names ``origin`` and the key.

    ``name`` stands for one that the file leaves out.
    """
    try:
        record: dict[str, Any] = {"name": name, **tomli.loads(text)}
    except (ValueError, RecursionError) as error:
        raise OptionError(f"{origin} is not valid TOML: {error or 'nested too deeply'}") from error
    settings = {key: value for key, value in record.items() if key not in FACTS}
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            raise OptionError(f"{origin}: there is no key {key!r} in a stack{near_miss(key, FACTS)}")
    for key in TEXTS:
        if not isinstance(record.get(key, ""), str):
            raise OptionError(f"{origin}: {key} must be a text, not {record[key]!r}")
    if not (record["name"] and record.get("editor")):
        raise OptionError(f'{origin}: a stack needs a name and an editor; add for instance editor = "rlsedit"')
    stabilizers = record.get("stabilizers", [])
    if not isinstance(stabilizers, list) or not all(isinstance(one, str) for one in stabilizers):
        raise OptionError(f"{origin}: stabilizers must be a list of names, not {stabilizers!r}")
    texts = {key: record[key] for key in TEXTS if key in record}
    return NamedStack(**texts, stabilizers=tuple(stabilizers), settings=settings)


def read_stack(file: Path) -> NamedStack:
    """Read a stack from a file of the user's, which is called after its file where it gives itself no name."""
    try:
        text = read_bytes(expanded(file), SETTINGS).decode("utf-8-sig")
    except OSError as error:
        raise OptionError(f"the stack {file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise OptionError(f"the stack {file} is not UTF-8 text; save it as UTF-8") from error
    return parse_stack(text, origin=str(file), name=file.stem)


def stacks_in(package: str) -> Sequence[NamedStack]:
    """Return the stacks of all TOML files in the folder of a plugin's ``package``, by the files' names."""
    files = [file for file in importlib.resources.files(package).iterdir() if file.name.endswith(SUFFIX)]
    return [
        parse_stack(file.read_text("utf-8"), origin=file.name) for file in sorted(files, key=lambda file: file.name)
    ]
