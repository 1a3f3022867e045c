"""Matrices that are split between processes by a family's own plan in transformers (tensor parallelism).

Every process runs every pass, on its part of the matrices; the plan's hooks put the parts of a result together. What
editing needs whole is put together here: the weight of a projection, and what enters it. All processes must ask alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from editcli.errors import ModelError


def loading_options(config: Any) -> dict[str, Any]:
    """Return what makes transformers split a model over the processes; raise :class:`ModelError` without a plan."""
    if not getattr(config.get_text_config(), "base_model_tp_plan", None):
        raise ModelError(
            f"transformers has no tensor-parallel plan for {config.model_type!r}; leave out --parallel tensor, or use "
            "--device-map auto with one process"
        )
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        return {"distributed_config": DistributedConfig(tp_plan="auto")}
    # Older versions take the plan itself, and have no such class or one without this field.
    except (ImportError, TypeError):
        return {"tp_plan": "auto"}


def is_split(weight: Tensor) -> bool:
    """Tell whether a weight is spread over processes."""
    return getattr(weight, "device_mesh", None) is not None


def any_split(model: nn.Module) -> bool:
    """Tell whether any weight of a model is spread over processes."""
    return any(is_split(parameter) for parameter in model.parameters())


def whole_weight(weight: Any) -> Tensor:
    """Return a weight in one piece."""
    return weight.full_tensor() if is_split(weight) else weight


def parted(value: Tensor, like: Any) -> Tensor:
    """Return ``value`` split as the weight ``like`` is; each process already holds all of it."""
    if not is_split(like):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole_input(module: nn.Module, entered: Tensor) -> Tensor:
    """Return what enters a projection in one piece, (..., d_in), with its gradients."""
    weight: Any = module.get_parameter("weight")
    if not is_split(weight) or entered.shape[-1] == weight.shape[1]:
        return entered
    from torch.distributed.tensor import DTensor, Shard

    return DTensor.from_local(entered, weight.device_mesh, [Shard(entered.ndim - 1)]).full_tensor()
