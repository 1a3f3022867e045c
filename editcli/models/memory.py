"""The memory that a device has left, as far as the system reports it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

_CONTROL_GROUPS = Path("/sys/fs/cgroup")
_SELF = Path("/proc/self/cgroup")


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that ``device`` could still hand out, swap included; None where nothing can be asked."""
    if device.type != torch.device("cpu").type:
        ask = getattr(torch.get_device_module(device), "mem_get_info", None)
        return None if ask is None else int(ask(device)[0])
    with warnings.catch_warnings():
        # A container may hide the use of the swap, but its size is still known.
        warnings.simplefilter("ignore", RuntimeWarning)
        swap = psutil.swap_memory().free
    return min([psutil.virtual_memory().available + swap, *_group_bytes(_groups())])


def _groups() -> list[Path]:
    """Return the folders of this process's control groups, its own first; empty where the system has none.

    A limit may be set on any group above, so all of them count. Version 1 keeps memory in a tree of its own.
    """
    try:
        lines = [line.split(":", 2) for line in _SELF.read_text().splitlines()]
    except OSError:
        return []
    folders = []
    for _, controllers, path in lines:
        if controllers in ("", "memory"):
            root = _CONTROL_GROUPS / controllers
            group = root / path.lstrip("/")
            folders += [group, *group.parents[: len(group.parts) - len(root.parts)]]
    return folders


def _group_bytes(groups: Iterable[Path]) -> list[int]:
    """Return what each control group with a limit has left; files that it caches can be dropped, so they are free."""
    left = []
    for group in groups:
        for limit, usage, cached in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            try:
                most, used = int((group / limit).read_text()), int((group / usage).read_text())
                facts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                left.append(max(0, most - used + int(facts.get(cached, 0))))
            # "max" is no number; a group without this file has no limit of its own.
            except (OSError, ValueError):
                continue
    return left
