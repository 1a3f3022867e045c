"""Where the files of the project lie that tests read."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The folder of pyproject.toml."""

SAMPLES = ROOT / "sample_edits"
"""The edits that the README works with."""
