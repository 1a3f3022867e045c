"""Freed memory is kept for the next pass where the program may decide that, and handed back when it says so."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import types

import psutil
import pytest

from editcli import heap

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be asked to")

FAULTS = """
import resource
from editcli.heap import keep_freed
{call}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def pieces():
    return [bytearray(1 << 20) for _ in range(16)]
pieces()
before = faults()
for _ in range(20):
    pieces()
print(faults() - before)
"""


def faults(call: str, **variables: str) -> int:
    """Return the pages that the system had to clear for 20 times the same 16 pieces of 1 MiB."""
    environment = {name: value for name, value in os.environ.items() if name not in heap._OWN_CHOICES}
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    done = subprocess.run(command, env={**environment, **variables}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_pieces_asked_for_again_cost_the_system_nothing() -> None:
    usual = faults("")
    assert faults("keep_freed()") < usual / 10
    assert usual > 20 * 8 * (1 << 20) / resource.getpagesize(), "the measurement sees pages"


@glibc
def test_who_chose_for_himself_keeps_his_choice() -> None:
    chosen = {"MALLOC_MMAP_THRESHOLD_": "65536"}
    assert faults("keep_freed()", **chosen) > faults("", **chosen) / 2


@glibc
def test_freed_memory_is_given_back() -> None:
    own = psutil.Process().memory_info
    # Pieces below the size that glibc maps apart, the last of which keeps the heap from shrinking by itself.
    pieces = [bytearray(60_000) for _ in range(2_000)]
    full, last = own().rss, pieces[-1]
    pieces = [last]
    heap.give_back()
    assert own().rss < full - 80_000_000


def test_a_system_that_cannot_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.keep_freed({})
    heap.give_back()


def asked(monkeypatch: pytest.MonkeyPatch, most: int) -> list[tuple[int, int]]:
    """Return what a C library whose mapping threshold may be at most ``most`` bytes was told and took."""
    taken = []

    def mallopt(option: int, value: int) -> int:
        accepted = option != heap._MMAP_THRESHOLD or value <= most
        if accepted:
            taken.append((option, value))
        return int(accepted)

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    heap.keep_freed({})
    return taken


def test_an_older_glibc_is_told_the_greatest_threshold_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (heap._MMAP_THRESHOLD, 1 << 25) in asked(monkeypatch, 1 << 25)


def test_where_no_threshold_is_taken_glibc_goes_on_adapting_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, 1 << 19) == []
