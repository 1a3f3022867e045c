"""Freed memory is kept for the next pass where the program may decide that, and handed back when it says so."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import types

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


def faults(call: str) -> int:
    """Return the pages that the system had to clear for 20 times the same 16 pieces of 1 MiB, in a new process."""
    environment = {name: value for name, value in os.environ.items() if name not in heap._OWN_CHOICES}
    command = [sys.executable, "-c", FAULTS.format(call=call)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_pieces_asked_for_again_cost_the_system_nothing() -> None:
    usual = faults("")
    assert faults("keep_freed()") < usual / 10
    assert usual > 20 * 8 * (1 << 20) / resource.getpagesize(), "the measurement sees pages"


def test_a_system_that_cannot_be_asked_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: object())
    heap.keep_freed({})
    heap.give_back()


def asked(monkeypatch: pytest.MonkeyPatch, most: int = 1 << 40, **environment: str) -> list[tuple[int, int]]:
    """Return what a C library whose mapping threshold may be at most ``most`` bytes was told and took."""
    taken = []

    def mallopt(option: int, value: int) -> int:
        accepted = option != heap._MMAP_THRESHOLD or value <= most
        if accepted:
            taken.append((option, value))
        return int(accepted)

    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: types.SimpleNamespace(mallopt=mallopt))
    heap.keep_freed(environment)
    return taken


@pytest.mark.parametrize("variable", heap._OWN_CHOICES)
def test_who_chose_for_himself_keeps_his_choice(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    assert len(asked(monkeypatch)) == 2
    assert asked(monkeypatch, **{variable: "1"}) == []


def test_an_older_glibc_is_told_the_greatest_threshold_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (heap._MMAP_THRESHOLD, 1 << 25) in asked(monkeypatch, 1 << 25)


def test_where_no_threshold_is_taken_glibc_goes_on_adapting_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, 1 << 19) == []


def test_all_freed_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to the last byte: the padding that the C library is asked to keep is 0."""
    asked_for: list[int] = []
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda name: types.SimpleNamespace(malloc_trim=asked_for.append))
    heap.give_back()
    assert asked_for == [0]
