"""Turn a checkpoint of torch's pickle files into safetensors, reading nothing of the pickles but tensors.

A pickle may run anything when it is read. Torch's reader with ``weights_only=True`` knows how to rebuild tensors and
refuses everything else. It is asked only where the user asks for it, and writes into another folder.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError
from editcli.formatting import shorten, size
from editcli.storage.checkpoint import DTYPES
from editcli.storage.choice import INDEX, SINGLE, is_weights, read_index
from editcli.storage.files import copy_file, write_json, write_safetensors
from editcli.storage.opening import BESIDE, PICKLE, check, is_own

WHOLE, PARTS = "pytorch_model.bin", "pytorch_model.bin.index.json"
"""The files that transformers reads, in its order."""


def has_pickles(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint of pickles that transformers would read."""
    return any((folder / name).is_file() for name in (WHOLE, PARTS))


def convert_pickles(folder: Path, out: Path) -> None:
    """Write the model in ``folder`` to ``out`` with safetensors in place of its pickles, one file in memory at a time.

    Raises :class:`ModelError` where a file holds anything but named tensors, or does not fit the disk.
    """
    shards, index = _shards(folder)
    for name in shards:
        check(folder / name, PICKLE, folder=folder)
    needed, free = sum((folder / name).stat().st_size for name in shards), shutil.disk_usage(out).free
    if free < needed:
        raise ModelError(
            f"converting {folder} needs {size(needed)} in {out.parent}, which has {size(free)} free; set TMPDIR to a "
            "folder with more room"
        )
    for path in sorted(folder.iterdir()):
        if path.is_file() and not is_weights(path) and not path.name.startswith(".") and is_own(path, folder):
            check(path, BESIDE, folder=folder)
            copy_file(path, out / path.name)
    names: dict[str, str] = {}
    for number, name in enumerate(shards, start=1):
        target = SINGLE if index is None else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = _tensors(folder / name)
        names |= dict.fromkeys(tensors, target)
        write_safetensors(out / target, tensors, {"format": "pt"})
    if index is not None:
        write_json(out / INDEX, {"metadata": index.get("metadata") or {}, "weight_map": names})


def _shards(folder: Path) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """Return the names of the pickles, and the index that names them if there are several."""
    if (folder / WHOLE).is_file():
        return (WHOLE,), None
    index = read_index(folder / PARTS)
    names = tuple(sorted(set(index["weight_map"].values())))
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise ModelError(f"{folder} lacks the file {missing} that its {PARTS} names; download it again")
    return names, index


def _tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of one file; raise :class:`ModelError` for one that holds anything else."""
    try:
        read = _loaded(path)
    # Torch raises errors of many kinds for a file that is damaged, and this one for what is no tensor.
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} holds more than tensors, and reading it would run code; it is refused (convert it elsewhere if "
            "you trust it)"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError, TypeError, IndexError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path} cannot be read as tensors: {lines[0]}; download or copy it again") from error
    if not isinstance(read, dict):
        raise ModelError(f"{path} holds a {type(read).__name__} and not tensors by their names; save the model again")
    known = set(DTYPES.values())
    for name, tensor in read.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.dtype not in known:
            raise ModelError(f"{path} holds {shorten(repr(name))}, which is no plain tensor; save the model again")
    return {name: tensor.detach() for name, tensor in read.items()}


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
        # Files of versions before 1.6 are no archives and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True)
