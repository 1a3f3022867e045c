"""Which files of a model folder transformers loads the weights from, decided in its own order.

A folder may hold several checkpoints: shards beside the single file that replaced them, pickles, variants, files of
other programs. ``AutoModelForCausalLM.from_pretrained(folder)`` takes one of them and says nothing of the others, so
everything that reads or writes weights asks here. The order is that of ``_get_resolved_checkpoint_files`` in
transformers' ``modeling_utils.py``, the same in 4.57.1 and 5.24: the file that ``transformers_weights`` of the config
names, ``model.safetensors``, ``model.safetensors.index.json``, and only then pickles, which editcli opens on request.
Shards are read in the order of their names, and of a tensor that several of them hold, the last one counts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from editcli.errors import ModelError
from editcli.formatting import shorten
from editcli.storage.opening import CONFIG as CONFIG_KIND
from editcli.storage.opening import INDEX as INDEX_KIND
from editcli.storage.opening import is_own, is_there, read_text

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
CONFIG = "config.json"

_SAFE, _SAFE_INDEX = ".safetensors", ".safetensors.index.json"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".ckpt")
_WHOLE = ".gguf"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_AN_INDEX = re.compile(r"\.(safetensors|bin|h5|msgpack)\.index(\.[\w-]+)?\.json$")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$")
_PLAIN_NAME = re.compile(r"(?!\.{1,2}$)[^/\\\0]{1,250}$")
_LISTED = 3


@dataclass(frozen=True, slots=True)
class Choice:
    """The files that hold the weights of a folder's model."""

    files: tuple[str, ...]
    """Names of safetensors files, in the order in which transformers reads them."""
    index: str | None = None
    """Name of the index that names the files; None for a single file."""
    mapped: Mapping[str, str] = field(default_factory=dict)
    """The file of each tensor, as the index has it."""

    @property
    def names(self) -> frozenset[str]:
        """All files that belong to the checkpoint, its index included."""
        return frozenset(self.files if self.index is None else (*self.files, self.index))


def choose(folder: Path) -> Choice:
    """Return the checkpoint that transformers loads from ``folder``; raise :class:`ModelError` if there is none.

    A folder whose checkpoint depends on the version of transformers or on what else is installed is refused as well.
    """
    refuse_adapter(folder)
    _refuse_distributed(folder)
    named = _named_by_config(folder)
    for name in (SINGLE, INDEX) if named is None else (named,):
        path = folder / name
        if path.is_file() and name.endswith(_SAFE_INDEX):
            return _sharded(path)
        if path.is_file() and name.endswith(_SAFE):
            _refuse_link_out(path)
            return Choice((name,))
    raise _no_checkpoint(folder, named)


def refuse_adapter(folder: Path) -> None:
    """Raise :class:`ModelError` where an adapter lies in the folder.

    Beside a model it changes what is loaded: without peft transformers ignores it, with peft 5.24 puts it on top of
    the model, and 4.57 loads the base that it names instead.
    """
    path = folder / ADAPTER
    if not is_there(path):
        return
    if not is_there(folder / CONFIG):
        raise ModelError(
            f"{folder} is an adapter ({ADAPTER}), not a model; merge it into its base (merge_and_unload of peft, then "
            "save_pretrained) and pass the merged model"
        )
    raise ModelError(
        f"{folder} holds an adapter beside its weights ({ADAPTER}), and whether transformers loads it depends on peft "
        f"and on its version; remove {ADAPTER} if the adapter is merged already, otherwise merge it first"
    )


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds files of weights at all, of whatever kind."""
    return any(path.suffix in _WEIGHTS and path.is_file() for path in folder.iterdir())


def has_safetensors(folder: Path) -> bool:
    """Tell whether a folder holds a checkpoint that transformers prefers to pickles."""
    return any((folder / name).is_file() for name in (SINGLE, INDEX))


def is_fetched(folder: Path) -> bool:
    """Tell whether all shards that an index names are there; of a hub model they may not have been needed yet."""
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return True
    return all((folder / name).is_file() for name in set(read_index(index)["weight_map"].values()))


def is_weights(path: Path) -> bool:
    """Tell by its name whether a file holds weights, or is an index of such files."""
    return path.suffix in _WEIGHTS or _AN_INDEX.search(path.name) is not None


def left_out(folder: Path, choice: Choice) -> tuple[str, ...]:
    """Return the names of the files of weights that do not belong to the chosen checkpoint."""
    paths = (path for path in folder.iterdir() if is_weights(path) and not path.name.startswith("."))
    return tuple(sorted(path.name for path in paths if path.is_file() and path.name not in choice.names))


def is_plain_name(name: object) -> bool:
    """Tell whether what a record calls a file's name is one, and leads to no other folder."""
    return isinstance(name, str) and _PLAIN_NAME.match(name) is not None


def listed(names: tuple[str, ...]) -> str:
    """Write names as a list, the first ones of a long one."""
    shown = [shorten(name) for name in names[: _LISTED if len(names) > _LISTED + 1 else len(names)]]
    rest = len(names) - len(shown)
    if rest:
        return f"{', '.join(shown)} and {rest:,} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _named_by_config(folder: Path) -> str | None:
    """Return the file of weights that the config names, which few do; a config that cannot be read names none."""
    try:
        fields = json.loads(read_text(folder / CONFIG, CONFIG_KIND, folder=folder))
    except (OSError, ValueError, RecursionError):
        # Building the model reads the config as well, and refuses it with its reason.
        return None
    name = fields.get("transformers_weights") if isinstance(fields, dict) else None
    if name is not None and not is_plain_name(name):
        raise ModelError(
            f"{folder / CONFIG} names the weights {shorten(repr(name))} (transformers_weights), which is not a plain "
            "file name; refused"
        )
    return name


def _sharded(path: Path) -> Choice:
    folder, index = path.parent, read_index(path)
    mapped: Mapping[str, str] = index["weight_map"]
    for name in sorted(set(mapped.values())):
        if not (folder / name).is_file():
            raise ModelError(f"{folder} lacks the shard {name} that its index names; download it again")
        if not name.endswith(_SAFE):
            raise ModelError(f"{path} names the shard {name}, which is not a safetensors file; save the model again")
        _refuse_link_out(folder / name)
    if not mapped:
        raise ModelError(f"{path} is not a usable shard index: it names no tensor; download it again")
    if not isinstance(index.get("metadata"), dict):
        raise ModelError(f'{path} lacks the object "metadata", which transformers needs; add "metadata": {{}} to it')
    return Choice(tuple(sorted(set(mapped.values()))), path.name, mapped)


def read_index(path: Path) -> Mapping[str, Any]:
    """Return an index whose map names plain files."""
    try:
        index = json.loads(read_text(path, INDEX_KIND, folder=path.parent))
        names = sorted(set(index["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{path} is not a usable shard index: {error}") from error
    for name in names:
        # A shard named ../../x would make us read, and later write, outside the folder.
        if not is_plain_name(name):
            raise ModelError(f"{path} names the shard {shorten(repr(name))}, which is not a plain file name; refused")
    return index


def _refuse_link_out(path: Path) -> None:
    """Refuse a link out of the folder: it may lead to a private file, and its content would be copied."""
    if not is_own(path):
        raise ModelError(f"{path} is a link to {path.resolve()}, out of its folder; put a copy of the file there")


def _refuse_distributed(folder: Path) -> None:
    """Refuse torch's distributed checkpoints, which newer versions of transformers prefer to everything else."""
    if not folder.is_dir():
        return
    shard = next((path.name for path in folder.iterdir() if _DISTRIBUTED.match(path.name)), None)
    if shard is not None:
        raise ModelError(
            f"{folder} holds a distributed checkpoint ({shard}), which editcli does not read; load it with "
            "transformers and save it with save_pretrained"
        )


def _no_checkpoint(folder: Path, named: str | None) -> ModelError:
    """Return the error for a folder without a checkpoint that can be loaded, saying what is there instead."""
    if named is not None:
        return ModelError(
            f"{folder / CONFIG} names the weights {named} (transformers_weights), which is not a safetensors file of "
            "the folder; correct the config"
        )
    others: tuple[Any, ...] = left_out(folder, Choice(())) if folder.is_dir() else ()
    safe = tuple(name for name in others if name.endswith(_SAFE))
    if safe:
        return ModelError(
            f"{folder} has no {SINGLE} and no {INDEX}, and transformers does not load {listed(safe)} by itself; load "
            "the model in the way that it needs (variant=...) and save it with save_pretrained"
        )
    whole = tuple(name for name in others if name.endswith(_WHOLE))
    if whole:
        return ModelError(f"{folder} has no {SINGLE}, but {listed(whole)}; pass the path of that file itself")
    if any(name.endswith(_PICKLES) for name in others):
        return ModelError(
            f"{folder} has its weights only as pickle files, which editcli does not open by itself; add --convert-bin "
            "to 'editcli apply', which edits a temporary copy in safetensors and reads nothing but tensors"
        )
    return ModelError(f"{folder} has no {SINGLE} and no {INDEX}; is it a Hugging Face model folder?")
