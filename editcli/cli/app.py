"""The context of every command: the plugins, this process, settings of components, and where output goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import click

from editcli.cli import libraries
from editcli.distributed.launch import Launch
from editcli.formatting import finite
from editcli.plugin.manager import Plugins
from editcli.plugin.options import merge, parse_assignments
from editcli.settings.config import environment_settings

if TYPE_CHECKING:
    from editcli.render.console import RichReporter


class App:
    """The first argument of every command."""

    def __init__(self, plugins: Plugins, launch: Launch | None = None):
        self.plugins, self.launch = plugins, launch or Launch()
        self.verbosity = 0
        """-1 quiet, 0 normal, 1 verbose."""
        self.as_json = False
        """Whether results are printed as one JSON document instead of tables."""
        self.tables: Mapping[str, Mapping[str, Any]] = {}
        """Options of components from the settings file, ``{component: {option: value}}``."""

    @cached_property
    def reporter(self) -> RichReporter:
        """Progress, notes and warnings, on stderr."""
        from editcli.render.console import RichReporter

        return RichReporter(verbosity=lambda: self.verbosity)

    def set_verbosity(self, level: int) -> None:
        """Set how much is reported; above 0, other libraries warn as well."""
        self.verbosity = level
        if level > 0:
            libraries.show()

    def settings(self, assignments: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
        """Return options of components: the file's tables, then ``EDITCLI_OPTIONS``, then ``-o``."""
        return merge(self.tables, environment_settings(os.environ), parse_assignments(assignments))

    def announce(self, model: str | None) -> None:
        """Name the model before its libraries are imported: the import alone takes seconds."""
        if self.launch.leads:
            self.reporter.note(f"Loading {model or 'the model that ships with editcli'}")

    def emit(self, report: Any, view: Callable[[Any], Any]) -> None:
        """Print a report on stdout: its JSON object (``--json``), or what ``view`` draws of it. Only rank 0 prints."""
        if not self.launch.leads:
            return
        if self.as_json:
            print_json(report if isinstance(report, Mapping) else report.to_json())
            return
        from editcli.render.console import stdout

        stdout().print(view(report))


def print_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout; NaN and infinity become null."""
    text = json.dumps(finite(document), indent=2, ensure_ascii=False)
    # JSON escapes the first 32 control characters; terminals obey these as well, and they can only be inside texts.
    click.echo(text.translate({code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}))
