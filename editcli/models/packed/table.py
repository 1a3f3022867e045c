"""The formats of few bits that are edited, one row each, and how the format of a folder is found."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from editcli.errors import ModelError
from editcli.models.packed.awq import Awq
from editcli.models.packed.bitsandbytes import BitsAndBytes
from editcli.models.packed.checkpoint import WAY_OUT, PackedCheckpoint
from editcli.models.packed.compressed_tensors import CompressedTensors
from editcli.models.packed.fp8 import Fp8
from editcli.models.packed.gptq import Gptq
from editcli.models.packed.layout import Format, PackingError
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.choice import CONFIG
from editcli.storage.opening import CONFIG as CONFIG_KIND
from editcli.storage.opening import read_text

FORMATS: tuple[Format, ...] = (Fp8(), BitsAndBytes(), CompressedTensors(), Gptq(), Awq())
"""The formats; a model is of the first that knows its config."""
_WAYS_OUT: Mapping[Any, str] = {
    "mxfp4": "load it with transformers' Mxfp4Config(dequantize=True) in bfloat16, save that as a folder, and edit it"
}
"""What to do instead, of methods whose models are published in no other form (gpt-oss); else :data:`WAY_OUT`."""


def quantisation_of(folder: Path) -> Mapping[str, Any]:
    """Return what a config says of quantised weights; empty where it says nothing or cannot be read."""
    try:
        fields = json.loads(read_text(folder / CONFIG, CONFIG_KIND, folder=folder))
    except (OSError, ValueError, RecursionError):
        # Building the model reads the config as well, and refuses it with its reason.
        return {}
    said = fields.get("quantization_config") if isinstance(fields, dict) else None
    return said if isinstance(said, dict) else {}


def checkpoint_in(
    folder: Path, names: Callable[[Checkpoint], Mapping[str, tuple[str, ...]]] | None = None
) -> Checkpoint:
    """Return the checkpoint of a folder; where its format is not one of :data:`FORMATS`, its tensors as they are."""
    said = quantisation_of(folder)
    try:
        form = _form_of(said)
    except PackingError:
        # Whatever builds the model asks refuse_format, which gives the reason.
        form = None
    return Checkpoint(folder, names) if form is None else PackedCheckpoint(folder, names, form=form, said=said)


def refuse_format(folder: Path) -> None:
    """Raise :class:`ModelError` for a folder whose weights are quantised in a way that cannot be written again."""
    said = quantisation_of(folder)
    try:
        if not said or _form_of(said) is not None:
            return
        reason = "which editcli does not pack anew"
    except PackingError as error:
        reason = str(error)
    method = said.get("quant_method", "in an unknown way")
    raise ModelError(f"the weights of {folder} are quantised ({method}), {reason}; {_WAYS_OUT.get(method, WAY_OUT)}")


def _form_of(said: Mapping[str, Any]) -> Format | None:
    return next((form for form in FORMATS if form.knows(said)), None) if said else None
