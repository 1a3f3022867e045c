"""Read the facts of an unknown family off its module tree, by types and shapes, never by names.

A regular decoder is one list of blocks of one class; each block has one MLP: linear maps from the stream's width to a
wider space and one map back. On a model with weights the guess is proven: an offset on the MLP's output must reappear
unchanged in the block's output.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from editcli.errors import ModelError
from editcli.models.forward import first, hooked, run, with_first

_ADVICE = "describe the family in a plugin with the editcli_architectures hook"


@dataclass(frozen=True, slots=True)
class Layout:
    """Paths as in :class:`~editcli.models.architectures.Family`, read off a module tree."""

    blocks: str
    mlp: str
    projection: str
    final_norm: str


def discover(model: PreTrainedModel, tower: str = "") -> Layout:
    """Return the layout of ``model``; raise :class:`ModelError` if the tree does not show it beyond doubt.

    ``tower`` is the module inside that reads text, where the model has others beside it.
    """
    path, blocks = _find_blocks(model, tower)
    embeddings = cast(Tensor, model.get_input_embeddings().weight)
    layouts = {_find_mlp(block, embeddings.shape[-1]) for block in blocks}
    if len(layouts) > 1 or None in layouts:
        raise ModelError(f"no MLP could be recognised in every layer of {_name(model)}; {_ADVICE}")
    mlp, projection = cast(tuple[str, str], layouts.pop())
    if not embeddings.is_meta:
        block = blocks[len(blocks) // 2]
        _prove(model, block, block.get_submodule(mlp))
    return Layout(blocks=path, mlp=mlp, projection=projection, final_norm=_find_final_norm(model, path))


def _find_blocks(model: PreTrainedModel, tower: str) -> tuple[str, nn.ModuleList]:
    """Return the outermost list of modules that holds most of the model, or of its tower."""
    modules = model.get_submodule(tower).named_modules(prefix=tower)
    lists = [(name, module) for name, module in modules if isinstance(module, nn.ModuleList) and module]
    outermost = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    regular = [(n, m) for n, m in outermost if len({type(block) for block in m}) == 1]
    if len(outermost) != 1 or not regular:
        raise ModelError(f"{_name(model)} is not one regular list of decoder layers; {_ADVICE}")
    return regular[0]


def _find_mlp(block: nn.Module, width: int) -> tuple[str, str] | None:
    """Return the paths of the MLP and of its last map within a block, or None if there is not exactly one."""
    candidates = list(_candidates(block, width))
    widest = max((wide for wide, _, _ in candidates), default=0)
    chosen = [(mlp, projection) for wide, mlp, projection in candidates if wide == widest]
    return chosen[0] if len(chosen) == 1 else None


def _candidates(block: nn.Module, width: int) -> Iterator[tuple[int, str, str]]:
    for name, child in block.named_children():
        maps = _linear_maps(child)
        if len(maps) in (2, 3) and _owns_only(child, maps) and _is_mlp(list(maps.values()), width):
            yield _shape(list(maps.values())[-1])[0], name, f"{name}.{list(maps)[-1]}"
    # Some blocks hold the two maps of their MLP themselves; then the last one's output is the MLP's.
    direct = [(name, child) for name, child in block.named_children() if isinstance(child, (nn.Linear, Conv1D))]
    if len(direct) == 2 and _is_mlp([child for _, child in direct], width):
        yield _shape(direct[-1][1])[0], direct[-1][0], direct[-1][0]


def _linear_maps(module: nn.Module) -> dict[str, nn.Module]:
    return {name: part for name, part in module.named_modules() if name and isinstance(part, (nn.Linear, Conv1D))}


def _owns_only(module: nn.Module, maps: dict[str, nn.Module]) -> bool:
    """Tell whether all matrices of ``module`` belong to ``maps``: convolutions and stacked experts are no MLP."""
    inside = {id(parameter) for part in maps.values() for parameter in part.parameters()}
    return all(parameter.ndim < 2 or id(parameter) in inside for parameter in module.parameters())


def _is_mlp(maps: list[nn.Module], width: int) -> bool:
    """Tell whether ``maps`` lead from the stream into one inner space, perhaps twice (a gate), and back."""
    inner, back = _shape(maps[-1])
    entries = [_shape(part) for part in maps[:-1]]
    total = sum(out for _, out in entries)
    return back == width and total in (inner, 2 * inner) and all(into == width for into, _ in entries)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (d_in, d_out) of a linear map."""
    rows, columns = cast(Tensor, module.weight).shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def _find_final_norm(model: PreTrainedModel, blocks: str) -> str:
    """Return the path of the last module beside the blocks that holds vectors only, else of the one after them."""
    parent, _, last = blocks.rpartition(".")
    children = list(model.get_submodule(parent).named_children())
    names = [name for name, _ in children]
    norms = [name for name, part in children if _is_norm(part)]
    after = names[names.index(last) + 1 :]
    if not (norms or after):
        raise ModelError(f"no norm was found after the layers of {_name(model)}; {_ADVICE}")
    return f"{parent}.{norms[-1] if norms else after[0]}".lstrip(".")


def _is_norm(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and all(parameter.ndim == 1 for parameter in parameters)


def _prove(model: PreTrainedModel, block: nn.Module, mlp: nn.Module) -> None:
    """Raise :class:`ModelError` unless an offset on the MLP's output moves the block's output by that offset."""
    before = _block_output(model, block)
    # The offset is as large as the stream itself, so that 16-bit rounding cannot hide or fake the effect.
    offset = torch.full_like(before[0, -1], float(before.float().square().mean().sqrt()))
    offset[::2] *= -1

    def shift(owner: nn.Module, entered: Any, output: Any) -> Any:
        shifted = first(output).clone()
        shifted[..., -1, :] += offset
        return with_first(output, shifted)

    with hooked(mlp, shift):
        moved = _block_output(model, block) - before
    error = float((moved[0, -1] - offset).float().norm() / offset.float().norm())
    if not error < 0.05:
        raise ModelError(
            f"the layers of {_name(model)} do not simply add their MLP's output to the residual stream; {_ADVICE}"
        )


def _block_output(model: PreTrainedModel, block: nn.Module) -> Tensor:
    """Return a block's output, (1, 3, d), on three tokens."""
    seen: list[Tensor] = []

    def record(owner: nn.Module, entered: Any, output: Any) -> None:
        seen.append(first(output).detach().clone())

    training = model.training
    tokens = torch.arange(3, device=cast(Tensor, model.get_input_embeddings().weight).device)
    try:
        with torch.no_grad(), hooked(block, record, stop=True):
            run(model.eval(), tokens[None])
    # A model that fails here needs more input than text, so facts cannot be written into it as text.
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"{_name(model)} could not be run on plain text: {error}") from error
    finally:
        model.train(training)
    return seen[0]


def _name(model: PreTrainedModel) -> str:
    return f"a model of the unknown type {model.config.model_type!r}"
