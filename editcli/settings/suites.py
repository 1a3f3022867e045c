"""Named sets of lm-evaluation-harness tasks, so that two people who say "standard" ran the same; never imports torch.

A set has a version, which rises whenever its tasks change. Prompts, shots and metrics of a task are the harness's own,
whose version and whose tasks' versions are recorded with the results.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Suite:
    """A named set of tasks."""

    name: str
    version: int
    tasks: tuple[str, ...]
    """Tasks that every supported version of the harness knows."""
    optional: tuple[str, ...] = ()
    """Tasks that are run where the installed harness, or a folder of --harness-include, knows them."""

    def to_json(self, left_out: tuple[str, ...]) -> dict[str, Any]:
        """Return what a record says of the set; ``left_out`` are the optional tasks that were not known."""
        tasks = [task for task in (*self.tasks, *self.optional) if task not in left_out]
        return {"name": self.name, "version": self.version, "tasks": tasks, "left_out": list(left_out)}


SUITES: Mapping[str, Suite] = {
    "standard": Suite(
        "standard",
        1,
        # Knowledge, arithmetic, following instructions, reasoning, truthfulness; then refusing too much.
        ("mmlu", "gsm8k", "ifeval", "arc_challenge", "truthfulqa_mc2"),
        optional=("xstest",),
    )
}
"""The sets of ``eval --suite``."""
