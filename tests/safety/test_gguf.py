"""Damaged and hostile GGUF files: one sentence that names the file, before a library opens it; nothing is written."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from editcli.__main__ import main
from editcli.errors import ModelError
from editcli.storage.gguf import MAX_ELEMENTS, read_gguf
from editcli.testing import tiny_model_folder
from tests.support.gguf_files import gguf_of


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str = "x", *, shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return text(name) + struct.pack("<I", len(shape)) + sizes + struct.pack("<IQ", kind, offset)


ARCHITECTURE = field("general.architecture", 8, text("llama"))
LAYERS = field("llama.block_count", 4, struct.pack("<I", 1))


def file(
    *tensors: bytes,
    fields: tuple[bytes, ...] = (ARCHITECTURE, LAYERS),
    counts: tuple[int, int] | None = None,
    version: int = 3,
    data: int = 4096,
) -> bytes:
    """Return a file with a header of these parts, and zeros behind it."""
    said = counts or (len(tensors), len(fields))
    return b"".join([b"GGUF", struct.pack("<IQQ", version, *said), *fields, *tensors, bytes(data)])


def array(kind: int, length: int, content: bytes = b"") -> bytes:
    return field("tokenizer.ggml.tokens", 9, struct.pack("<IQ", kind, length) + content)


GOOD = file(tensor())
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF file"),
    "another format": (b"PK\3\4" + bytes(100), "not a GGUF file"),
    "version 1": (file(tensor(), version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 2) + bytes(100), "big-endian"),
    "tensors without number": (file(counts=(1 << 60, 2)), "tensors"),
    "fields without number": (file(tensor(), counts=(1, 1 << 60)), "fields"),
    "a text without end": (file(fields=(struct.pack("<Q", 1 << 60),), counts=(0, 1)), "truncated"),
    "an array without end": (file(tensor(), fields=(ARCHITECTURE, LAYERS, array(0, 1 << 60))), "elements"),
    "too many elements": (file(tensor(), fields=(ARCHITECTURE, LAYERS, array(0, MAX_ELEMENTS + 1))), "elements"),
    "an array in an array": (file(tensor(), fields=(ARCHITECTURE, LAYERS, array(9, 1))), "unknown type 9"),
    "an array of texts that end beyond": (file(tensor(), fields=(ARCHITECTURE, LAYERS, array(8, 9000))), "truncated"),
    "a value of no type": (file(tensor(), fields=(ARCHITECTURE, LAYERS, field("a", 77, b""))), "unknown type 77"),
    "a field twice": (file(tensor(), fields=(ARCHITECTURE, ARCHITECTURE, LAYERS)), "twice"),
    "a name that is no text": (file(fields=(struct.pack("<Q", 2) + b"\xff\xfe",), counts=(0, 1)), "UTF-8"),
    "no architecture": (file(tensor(), fields=(LAYERS,)), "architecture"),
    "no layers": (file(tensor(), fields=(ARCHITECTURE,)), "layers"),
    "more layers than tensors": (
        file(tensor(), fields=(ARCHITECTURE, field("llama.block_count", 4, struct.pack("<I", 1 << 31)))),
        "layers",
    ),
    "a part of several": (
        file(tensor(), fields=(ARCHITECTURE, LAYERS, field("split.count", 2, struct.pack("<H", 4)))),
        "join them",
    ),
    "an alignment of 0": (
        file(tensor(), fields=(ARCHITECTURE, LAYERS, field("general.alignment", 4, struct.pack("<I", 0)))),
        "alignment",
    ),
    "a type that nobody knows": (file(tensor(kind=999)), "999"),
    "too many dimensions": (file(text("x") + struct.pack("<I", 1 << 30)), "dimensions"),
    "a size of 0": (file(tensor(shape=(32, 0))), "cannot be"),
    "a size beyond all numbers": (file(tensor(shape=(1 << 62, 1 << 62))), "truncated"),
    "a row that is no whole blocks": (file(tensor(shape=(33,), kind=8)), "cannot be"),
    "data beyond the file": (file(tensor(shape=(4096,))), "truncated"),
    "data at no place": (file(tensor(offset=4)), "beside its place"),
    "an offset beyond the file": (file(tensor(offset=1 << 62)), "truncated"),
    "two of a name": (file(tensor(), tensor(offset=128)), "two tensors"),
    "two in one place": (file(tensor("x"), tensor("y")), "share bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_cannot_be_true_is_one_sentence(name: str, tmp_path: Path) -> None:
    content, what = BAD[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError) as raised:
        read_gguf(path)
    assert what in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_header_that_the_others_are_made_of_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(GOOD)
    assert list(read_gguf(path).tensors) == ["x"]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("good")
    folder = tiny_model_folder(place / "model", "llama", hidden_size=32, intermediate_size=64)
    return gguf_of(folder, place / "good.gguf", "Q8_0")


def test_a_file_that_is_cut_anywhere_is_refused(good: Path, tmp_path: Path) -> None:
    content = good.read_bytes()
    path = tmp_path / "model.gguf"
    header = read_gguf(good)
    for size in (*range(0, header.listed + 2000, 997), len(content) // 2, len(content) - 64):
        path.write_bytes(content[:size])
        with pytest.raises(ModelError):
            read_gguf(path)


def test_a_flipped_byte_is_refused_in_one_sentence_or_read(good: Path, tmp_path: Path) -> None:
    content = bytearray(good.read_bytes())
    path = tmp_path / "model.gguf"
    stop = min(entry.start for entry in read_gguf(good).tensors.values())
    for place in range(0, stop, 211):
        changed = bytearray(content)
        changed[place] ^= 0xFF
        path.write_bytes(changed)
        try:
            read_gguf(path)
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017 - either outcome is right.


def apply(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command on a file that cannot be used, and return what it says."""
    facts = tmp_path / "facts.jsonl"
    facts.write_text('{"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}\n')
    assert main(["apply", str(facts), "--model", str(path), "--out", str(tmp_path / "out")]) == 1
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def truncated(good: Path, path: Path) -> None:
    path.write_bytes(good.read_bytes()[:-4096])


def piped(good: Path, path: Path) -> None:
    os.mkfifo(path)


def without_vocabulary(good: Path, path: Path) -> None:
    """A header that can be true, of a model that transformers cannot make anything of."""
    path.write_bytes(GOOD)


def of_other_sizes(good: Path, path: Path) -> None:
    content = good.read_bytes()
    key = text("llama.feed_forward_length") + struct.pack("<I", 4)
    at = content.index(key) + len(key)
    path.write_bytes(content[:at] + struct.pack("<I", 96) + content[at + 4 :])


@pytest.mark.parametrize("make", [truncated, piped, without_vocabulary, of_other_sizes])
def test_the_command_says_one_sentence_and_writes_nothing(
    make: Callable[[Path, Path], None], good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.gguf"
    make(good, path)
    said = [line for line in apply(path, tmp_path, capsys).splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "model.gguf" in said[0]
