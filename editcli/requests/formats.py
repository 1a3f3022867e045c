"""Readers of edit files in other formats: what one is, and finding the one for a record.

A plugin brings :class:`Format` classes with the hook ``editcli_formats``. ``apply``, ``eval`` and ``check`` read a
JSONL file whose records a format recognises as it stands; ``convert`` turns any of them into our schema.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from editcli.errors import PluginError, near_miss


class Format(ABC):
    """Reads one record of a foreign edit file; the first line of a subclass's docstring describes the format.

    A record becomes any number of objects of the edits schema (``prompt``, ``subject``, ``target_new``, ...). Give each
    an ``id`` where one record makes several edits. Fields that the schema does not know may be added: they are kept.
    """

    name: ClassVar[str]
    """The name used with ``convert --from``."""
    reference: ClassVar[str] = ""
    """The source of the format."""

    @abstractmethod
    def sniff(self, record: Mapping[str, Any]) -> bool:
        """Return whether ``record`` is of this format and of no other, ours included."""

    @abstractmethod
    def read(self, record: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        """Yield objects of the edits schema; raise ValueError with the reason when the record is unusable."""


def find_format(name: str, formats: Iterable[Format]) -> Format:
    """Return the format called ``name``; raise :class:`PluginError` with the near miss."""
    by_name = {form.name: form for form in formats}
    if name not in by_name:
        raise PluginError(f"there is no format {name!r}{near_miss(name, by_name)}")
    return by_name[name]
