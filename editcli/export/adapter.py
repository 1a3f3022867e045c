"""Write and read a LoRA adapter in PEFT's layout, without PEFT.

A pair (A, B) of rank r stands for the update ``alpha / r * B A`` of a module's weight; alpha equals r everywhere, so
that servers which know one alpha for the whole adapter scale no module by anything but one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from editcli.errors import ModelError
from editcli.export.changes import SiteChange
from editcli.records.decoding import UnreadableError, read_json
from editcli.storage.checkpoint import opened_tensors
from editcli.storage.conversion import convert
from editcli.storage.files import write_json, write_safetensors
from editcli.storage.opening import CONFIG as CONFIG_KIND

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class _Config:
    """The fields that are read of an adapter's configuration."""

    target_modules: tuple[str, ...]


def write_adapter(folder: Path, changes: Sequence[SiteChange], *, base: str, revision: str | None) -> None:
    """Write the two files of an adapter; ``base`` is what a loader would open when it is given no model."""
    tensors: dict[str, Tensor] = {}
    for change in changes:
        stem = f"{_PREFIX}{change.site.module}"
        tensors[f"{stem}.lora_A.weight"] = change.right.T.contiguous()
        tensors[f"{stem}.lora_B.weight"] = change.left.contiguous()
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    write_json(folder / CONFIG, adapter_config(changes, base=base, revision=revision))


def adapter_config(changes: Sequence[SiteChange], *, base: str, revision: str | None) -> dict[str, Any]:
    """Return PEFT's description of an adapter; modules whose rank is not the largest are in the patterns."""
    ranks = {change.site.module: change.left.shape[1] for change in changes}
    largest = max(ranks.values())
    pattern = {_tail(module): rank for module, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": changes[0].site.transposed,
        # Whole paths, since the same names occur in the layers that were not edited.
        "target_modules": list(ranks),
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def read_adapter(folder: Path) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return ``{module: (B, A)}`` of an adapter that :func:`write_adapter` wrote, (d_out, r) and (r, d_in)."""
    path = folder / CONFIG
    try:
        modules = convert(read_json(path, CONFIG_KIND, folder=folder), _Config).target_modules
        with opened_tensors(folder / WEIGHTS, folder=folder) as file:
            return {
                module: tuple(file.get_tensor(f"{_PREFIX}{module}.lora_{side}.weight") for side in "BA")
                for module in modules
            }
    except (OSError, SafetensorError, UnreadableError, ModelError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read: {error}; export it again") from error


def _tail(module: str) -> str:
    """Return a module's path without its first part.

    PEFT has matched patterns with and without requiring something before them; a proper tail fits both.
    """
    return module.partition(".")[2] or module
