"""Settings from ``editcli.toml`` and from ``EDITCLI_*`` variables.

Weakest first: defaults, preset, ``editcli.toml``, variables, command line. An unknown key of the file is an error,
because a mistyped setting that is silently ignored gives a wrong result without a trace.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli

from editcli.errors import OptionError, near_miss
from editcli.formatting import shorten
from editcli.plugin.options import parse_assignments
from editcli.storage.opening import SETTINGS, is_there, read_bytes

FILE_NAME = "editcli.toml"
OPTIONS_VARIABLE = "EDITCLI_OPTIONS"


@dataclass(frozen=True, slots=True)
class Config:
    """One settings file: top-level values by option name, and tables by component or command name."""

    source: str | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def check(self, *, options: Collection[str], tables: Collection[str], cli_only: Collection[str]) -> None:
        """Raise :class:`OptionError` for the first key or table that is not known, naming the file.

        A file must not set the options in ``cli_only``: they delete, or run a stranger's code.
        """
        for key in self.values:
            if key in cli_only:
                flag = key.replace("_", "-").removeprefix("as-")
                raise OptionError(f"{self.source}: --{flag} is only taken from the command line; remove {key!r}")
            if key not in options:
                raise OptionError(f"{self.source}: there is no setting {key!r}{near_miss(key, options)}")
        for name in self.tables:
            if name not in tables:
                raise OptionError(f"{self.source}: there is no table [{name}]{near_miss(name, tables)}")


def load_config(path: Path | None = None) -> Config:
    """Read ``path``, or ``editcli.toml`` in the working folder when there is one."""
    chosen = path if path is not None else Path(FILE_NAME)
    if path is None and not is_there(chosen):
        return Config()
    try:
        document = tomli.loads(read_bytes(chosen, SETTINGS).decode("utf-8-sig"))
        _refuse_infinite(document, chosen)
    except OSError as error:
        raise OptionError(f"{chosen}: cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise OptionError(f"{chosen}: is nested too deeply for TOML") from error
    except ValueError as error:
        raise OptionError(f"{chosen}: is not valid TOML: {error}") from error
    values = {_plain(key): value for key, value in document.items() if not isinstance(value, dict)}
    tables = {key: _plain_keys(value) for key, value in document.items() if isinstance(value, dict)}
    return Config(str(chosen), values, tables)


def _refuse_infinite(table: Mapping[str, Any], file: Path) -> None:
    """Raise :class:`OptionError` for NaN and infinity: TOML has them, no setting does."""
    for key, value in table.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, float) and not math.isfinite(item):
                raise OptionError(f"{file}: {shorten(key)} = {item} is not a number that a setting can have")
        if isinstance(value, dict):
            _refuse_infinite(value, file)


def environment_settings(environ: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Read component options from ``EDITCLI_OPTIONS="memit.remember=true nas.guard=2"``."""
    try:
        assignments = shlex.split(environ.get(OPTIONS_VARIABLE, ""))
    except ValueError as error:
        raise OptionError(f"the variable {OPTIONS_VARIABLE} cannot be read: {error}") from error
    return parse_assignments(assignments)


def _plain(key: str) -> str:
    return key.replace("-", "_")


def _plain_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    return {_plain(key): value for key, value in table.items()}
