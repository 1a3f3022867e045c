"""Everything that can go wrong for a user, as one tree.

::

    EditError                one sentence for the user, exit code 1
    ├── RequestError         a line of an edits file is unusable (file, line, column), exit code 2
    ├── PluginError          a plugin is missing, broken or clashes with another
    ├── OptionError          an option is unknown or has an unusable value
    ├── ModelError           a model cannot be read, edited or written
    ├── StatisticsError      reference-text statistics are missing or belong to another model
    ├── StateError           a run folder cannot be used as asked
    ├── FileError            a file cannot be read, or is none: a pipe, a device, too large, a link out of its folder
    ├── NumericalError       a linear system lost definiteness (site, condition)
    ├── RankError            another process of a run with several failed, or cannot be reached
    └── GuardError           a guard stopped the run before a batch was written, exit code 3

Anything else that escapes is a bug and shows its traceback. The tree is caught in one place, the command line.
Messages say what happened, to what, and what to do.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Iterable
from typing import ClassVar


class EditError(Exception):
    """Something the user can act on; its text is one sentence."""

    exit_code: ClassVar[int] = 1


class RequestError(EditError):
    """A line of an edits file is unusable; ``str()`` is ``file:line[:column]: reason``."""

    exit_code: ClassVar[int] = 2

    def __init__(self, reason: str, *, file: str = "<edits>", line: int | None = None, column: int | None = None):
        self.reason, self.file, self.line, self.column = reason, file, line, column
        place = ":".join(str(part) for part in (file, line, column) if part is not None)
        super().__init__(f"{place}: {reason}")


class PluginError(EditError):
    """A plugin is missing, broken or clashes with another."""


class OptionError(EditError):
    """An option is unknown or has an unusable value."""


class ModelError(EditError):
    """A model cannot be read, edited or written."""


class StatisticsError(EditError):
    """Reference-text statistics are missing or belong to another model."""


class StateError(EditError):
    """A run folder cannot be used as asked."""


class FileError(EditError, OSError):
    """A file cannot be read; ``str()`` is ``cannot read FILE: reason``, and the reason says what to do.

    It is an OSError as well, with the reason as its ``strerror``, so that who reads a file for a purpose can name the
    purpose.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, number: int | None = None):
        OSError.__init__(self, number or errno.EINVAL, reason, os.fspath(path))
        self.path, self.reason = os.fspath(path), reason

    def __str__(self) -> str:
        return f"cannot read {self.path}: {self.reason}"


class MissingFileError(FileError, FileNotFoundError):
    """There is no such file."""


class NumericalError(EditError):
    """A linear system lost definiteness; carries the site's module name and the condition number."""

    def __init__(self, reason: str, *, site: str, condition: float | None = None):
        self.site, self.condition = site, condition
        known = "" if condition is None else f" (condition number {condition:.3g})"
        super().__init__(f"{site}: {reason}{known}")


class RankError(EditError):
    """Another process of the run failed or cannot be reached; ``told`` when that process or another tells the user."""

    def __init__(self, reason: str, *, told: bool = False):
        self.told = told
        super().__init__(reason)


class GuardError(EditError):
    """A guard stopped the run before the offending batch was written."""

    exit_code: ClassVar[int] = 3


LISTED = 30
"""Names that an error lists at the most; the edits of a run may be thousands."""


def near_miss(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, else the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names)
    if close:
        # Letters that changed places are a likelier slip than another letter that is as close.
        likely = next((other for other in close if sorted(other) == sorted(name)), close[0])
        return f"; did you mean {likely!r}?"
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"; known: {', '.join(names[:LISTED])}{more}" if names else ""
