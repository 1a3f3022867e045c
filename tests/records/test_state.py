"""A run folder with damage: what is read from it is what was written, or an error that names the file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from editcli.errors import EditError, StateError
from editcli.records.recovery import Recovered, recover
from editcli.records.state import RunFolder, Snapshot, weights_digest
from editcli.storage.checkpoint import DTYPES
from editcli.storage.files import write_safetensors

ANY_TENSOR = st.builds(
    lambda dtype, shape, seed: torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype),
    st.sampled_from([dtype for name, dtype in DTYPES.items() if not name.startswith("F8")]),
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(0, 9),
)


@pytest.fixture
def run(tmp_path: Path, finished: Callable[[str], Path]) -> RunFolder:
    """A run of four batches that may be damaged."""
    shutil.copytree(finished("rlsedit"), tmp_path / "run")
    return RunFolder(tmp_path / "run")


def same(one: Recovered, other: Recovered) -> bool:
    tensors, others = one.snapshot.tensors, other.snapshot.tensors
    return (
        (one.entries, one.requests, one.redo) == (other.entries, other.requests, other.redo)
        and (one.snapshot.step, one.snapshot.settings) == (other.snapshot.step, other.snapshot.settings)
        and set(tensors) == set(others)
        and all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    )


@given(data=st.data())
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.slow
def test_no_flipped_bit_and_no_cut_changes_what_is_resumed(run: RunFolder, data: st.DataObject) -> None:
    whole = recover(run)
    paths = [path for path in sorted(run.folder.rglob("*")) if path.is_file() and path != run.lock]
    path = data.draw(st.sampled_from(paths))
    content = path.read_bytes()
    position = data.draw(st.integers(0, max(0, len(content) - 1)))
    damaged = bytearray(content)
    if data.draw(st.booleans()) and content:
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del damaged[position:]
    try:
        path.write_bytes(damaged)
        refused, found = None, whole
        try:
            found = recover(run)
        except EditError as error:
            refused = str(error)
        assert str(run.folder) in (refused or str(run.folder))
        assert same(found, whole)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("tail", [b'{"sequence": 5, "kind"', b"\x00" * 40, b"garbage\n", b"{}\n{}\n"])
def test_what_follows_the_snapshot_in_the_journal_is_not_trusted(run: RunFolder, tail: bytes) -> None:
    whole = recover(run)
    with run.journal.open("ab") as file:
        file.write(tail)
    found = recover(run)
    assert same(found, whole)
    run.cut_journal(found.lines)
    assert [entry for entry, _ in run.read_journal()] == list(whole.entries)


def test_the_snapshot_makes_up_for_the_last_line(run: RunFolder) -> None:
    whole, lines = recover(run), run.journal.read_bytes().splitlines(keepends=True)
    run.journal.write_bytes(b"".join(lines[:-1]))
    assert same(recover(run), whole)
    run.journal.write_bytes(b"".join(lines[:-2]))
    with pytest.raises(StateError, match=r"journal.jsonl has 2 of the 4 lines"):
        recover(run)


def test_lines_that_changed_places_are_refused(run: RunFolder) -> None:
    first, second, *rest = run.journal.read_bytes().splitlines(keepends=True)
    run.journal.write_bytes(b"".join([second, first, *rest]))
    with pytest.raises(StateError, match=r"journal.jsonl:1"):
        run.read_journal()


@pytest.mark.parametrize(("change", "said"), [("format", "reads format 1"), ("missing", "nothing to resume from")])
def test_a_state_that_cannot_be_used_is_refused_with_a_sentence(run: RunFolder, change: str, said: str) -> None:
    if change == "missing":
        run.state.unlink()
    else:
        data = run.state.read_bytes()
        run.state.write_bytes(data.replace(b'"format": "1"', b'"format": "0"'))
    with pytest.raises(StateError, match=said):
        recover(run)


def test_a_lost_segment_is_named(run: RunFolder) -> None:
    (run.updates / "000002.safetensors").unlink()
    with pytest.raises(StateError, match=r"000002.safetensors, which the journal names"):
        recover(run)


@given(
    st.dictionaries(st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"), ANY_TENSOR, max_size=4)
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensor_files_are_what_the_library_reads(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "some.safetensors"
    write_safetensors(path, tensors, {"a": "b"})
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_snapshot_is_read_back_bit_by_bit(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.create()
    tensors = {"master/a": torch.randn(3, 4), "component/x/n": torch.tensor(3), "component/x/e": torch.empty(0)}
    run.write_snapshot(Snapshot(3, 4, "c", tensors, {"layers": [1], "ä": "ö"}, "line"))
    found = run.read_snapshot()
    assert (found.step, found.sequence, found.settings) == (3, 4, {"layers": [1], "ä": "ö"})
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())


def test_the_checksum_of_weights_sees_single_bits_and_swaps() -> None:
    first, second = torch.randn(300, 7), torch.randn(300, 7)
    known = weights_digest([first, second])
    assert weights_digest([first.clone(), second.T.contiguous().T]) == known
    changed = first.clone()
    changed.view(torch.int32)[299, 6] ^= 1
    rows = first.clone()
    rows[[0, 1]] = rows[[1, 0]]
    for other in ([changed, second], [second, first], [rows, second], [first, -second], [first]):
        assert weights_digest(other) != known


def test_the_lock_of_a_dead_holder_is_no_lock(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.folder.mkdir()
    run.lock.write_text("12345")
    with run.locked(), pytest.raises(StateError, match="in use by another"), RunFolder(tmp_path).locked():
        pass
    with run.locked():
        pass


def test_a_refused_process_leaves_the_folder_of_the_other_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "out")

    def somebody_was_quicker(lock: FileLock, **options: Any) -> None:
        raise StateError("in use")

    monkeypatch.setattr(FileLock, "acquire", somebody_was_quicker)
    with pytest.raises(StateError), run.locked():
        pass
    assert run.folder.is_dir()


def test_journal_lines_hold_no_figure_that_json_lacks(run: RunFolder) -> None:
    for line in run.journal.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_what_rounding_changes_does_not_cancel_in_the_checksum() -> None:
    """Opposite steps in columns, rows or both whose numbers are multiples of each other."""
    weight = torch.randn(8, 8)
    known = weights_digest([weight])
    for steps in ({(0, 0): 2, (0, 1): -1}, {(1, 0): -2, (3, 0): 1}, {(0, 1): 1, (1, 0): -1}):
        changed = weight.clone()
        for (row, column), step in steps.items():
            changed.view(torch.int32)[row, column] += step
        assert weights_digest([changed]) != known


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on the size of files")
def test_a_journal_line_that_does_not_fit_leaves_no_part_of_itself(tmp_path: Path) -> None:
    import resource

    run = RunFolder(tmp_path)
    run.folder.mkdir()
    run.append("first")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            run.append("a line that is longer than the room that is left")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert run.journal.read_bytes() == b"first\n"
