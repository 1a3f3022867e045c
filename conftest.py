"""The selections of tests, and what the dependencies say of their future.

A plain ``pytest`` leaves out the tests marked ``slow``, which are many like cases of what the others show; ``--all``
runs them, and so does naming their file or folder. ``--deprecations FILE`` writes down which calls newer versions of
the dependencies will take away; such a warning fails no test.

This file lies beside pyproject.toml because the workers of pytest-xdist read options from here alone.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import pytest

# Tools, benchmarks and tests.support are used but not installed; last on the path, so that the installed editcli wins.
sys.path.append(str(Path(__file__).parent))
# Two threads that fight for one core made the tests of a numerical program many times slower than one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Libraries read these when they are imported, which is before any fixture runs.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Helpers with assertions show what they compared, as tests do.
pytest.register_assert_rewrite("tests.support")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run the tests marked slow as well")
    parser.addoption("--real-model", type=Path, metavar="FOLDER", help="real weights for tests/real, see there")
    parser.addoption("--deprecations", type=Path, metavar="FILE", help="write the dependencies' deprecations to FILE")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--all") or config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]


class Deprecations:
    """Writes down each deprecation that tests met, once, with the test that met it first."""

    def __init__(self, file: Path):
        self.file = file
        self.first: dict[str, str] = {}
        file.write_text("", encoding="utf-8")

    def pytest_warning_recorded(self, warning_message: warnings.WarningMessage, nodeid: str) -> None:
        """Note a warning; pytest calls this in the process that gathers the results of all workers."""
        if issubclass(warning_message.category, (DeprecationWarning, PendingDeprecationWarning, FutureWarning)):
            text = " ".join(str(warning_message.message).split())
            if text not in self.first:
                self.first[text] = nodeid
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(f"{text}\n    first met in {nodeid}\n")


def pytest_configure(config: pytest.Config) -> None:
    file = config.getoption("--deprecations")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Deprecations(file), "deprecations")
