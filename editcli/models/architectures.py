"""Where the editable matrices of a model are: the only module that knows names of modules.

A family is a row of facts (:data:`FAMILIES`, or a plugin's ``editcli_architectures`` hook); :func:`resolve` finds the
row of a model, or reads the facts off a regular module tree, and returns an :class:`Architecture`. What to know:

- h, the residual stream after a layer, is that block's output, also where attention and MLP run in parallel.
- m is the output of :meth:`Architecture.mlp`; it joins the stream as ``h = rest + residual_scale * mlp_norm(m)``.
- Some blocks (Falcon) add to the MLP's output in place: a forward hook that records m must clone it.
- Some blocks (OPT) flatten batch and positions before the MLP: its input and output may be (batch * length, d).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from editcli.errors import ModelError
from editcli.models.discovery import discover
from editcli.models.experts import EXPERTS_WEIGHT, edited_parameter, is_packed, refuse_unpacked, unpacked
from editcli.models.towers import auto_class, inside, tower_of
from editcli.plugin.families import MAX_LAYERS, Family
from editcli.plugin.interfaces import Site

_GPT_STYLE: dict[str, Any] = {"blocks": "transformer.h", "final_norm": "transformer.ln_f"}

FAMILIES: tuple[Family, ...] = (
    Family("gpt2", ("gpt2",), projection="mlp.c_proj", **_GPT_STYLE),
    Family("gptj", ("gptj",), projection="mlp.fc_out", parallel=True, **_GPT_STYLE),
    Family("gpt_neo", ("gpt_neo",), projection="mlp.c_proj", **_GPT_STYLE),
    Family(
        "gpt_neox",
        ("gpt_neox",),
        blocks="gpt_neox.layers",
        projection="mlp.dense_4h_to_h",
        final_norm="gpt_neox.final_layer_norm",
        parallel=("use_parallel_residual",),
    ),
    Family(
        "opt",
        ("opt",),
        blocks="model.decoder.layers",
        mlp="fc2",
        projection="fc2",
        final_norm="model.decoder.final_layer_norm",
        refused=(("do_layer_norm_before", False, "normalises the residual stream after adding the MLP's output"),),
    ),
    Family("llama", ("llama",)),
    Family("mistral", ("mistral",)),
    Family("qwen2", ("qwen2",)),
    Family("qwen3", ("qwen3",)),
    Family("gemma", ("gemma",)),
    Family("gemma2", ("gemma2",), mlp_norm="post_feedforward_layernorm"),
    Family("gemma3", ("gemma3_text",), mlp_norm="post_feedforward_layernorm"),
    Family("phi", ("phi",), projection="mlp.fc2", final_norm="model.final_layernorm", parallel=True),
    Family("phi3", ("phi3",)),
    Family("olmo2", ("olmo2", "olmo3"), mlp_norm="post_feedforward_layernorm"),
    Family("starcoder2", ("starcoder2",), projection="mlp.c_proj"),
    Family("stablelm", ("stablelm",), parallel=("use_parallel_residual",)),
    Family(
        "falcon",
        ("falcon",),
        projection="mlp.dense_4h_to_h",
        parallel=("new_decoder_architecture", "parallel_attn"),
        **_GPT_STYLE,
    ),
    Family("exaone4", ("exaone4",), mlp_norm="post_feedforward_layernorm"),
    Family("glm4", ("glm4",), mlp_norm="post_mlp_layernorm"),
    Family("mixtral", ("mixtral",), experts="mlp.experts"),
    Family("qwen3_moe", ("qwen3_moe",), experts="mlp.experts"),
    Family("olmoe", ("olmoe",), experts="mlp.experts"),
    Family("gpt_oss", ("gpt_oss",), experts="mlp.experts"),
    Family(
        "qwen2_moe",
        ("qwen2_moe",),
        experts="mlp.experts",
        shared="mlp.shared_expert.down_proj",
        shared_gate="mlp.shared_expert_gate",
    ),
    Family("deepseek", ("deepseek_v2", "deepseek_v3"), experts="mlp.experts", shared="mlp.shared_experts.down_proj"),
    Family("granite", ("granite", "hyperclovax"), residual_multiplier="residual_multiplier"),
)
"""The built-in families."""

EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts", "num_experts_per_tok")
"""Configuration keys whose value above one says that a model is a mixture of experts."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """The parts of one model that editing needs, by layer; layers count from 0."""

    family: Family
    model: PreTrainedModel
    routed: bool = False
    """Whether the routed experts are edited where a layer has some; else the shared expert is, where there is one."""

    @property
    def layers(self) -> int:
        """Return the number of decoder blocks."""
        return len(cast(nn.ModuleList, self.model.get_submodule(self.family.blocks)))

    @property
    def parallel(self) -> bool:
        """Return whether attention and MLP read the same residual stream."""
        keys = self.family.parallel
        if isinstance(keys, bool):
            return keys
        return any(getattr(self.model.config.get_text_config(), key, False) for key in keys)

    @property
    def final_norm(self) -> nn.Module:
        """Return the norm before the head."""
        return self.model.get_submodule(self.family.final_norm)

    @property
    def head(self) -> nn.Module:
        """Return the module that turns the stream into logits."""
        # The head was renamed between releases of transformers (gpt_neox); its role was not.
        return self.model.get_output_embeddings() or self.model.get_submodule(self.family.head)

    def block(self, layer: int) -> nn.Module:
        """Return a decoder block; its output (or the first item of it) is h, (batch, length, d)."""
        return self.model.get_submodule(self._path(layer))

    def mlp(self, layer: int) -> nn.Module:
        """Return the module whose output is m, (batch, length, d) or (batch * length, d)."""
        return self.model.get_submodule(self._path(layer, self.family.mlp))

    def projection(self, layer: int) -> nn.Module:
        """Return the module whose weight is edited: the MLP's last linear map, of a mixture that of an expert.

        That is the shared expert, or the module that holds all routed ones: :attr:`routed`. What its key is says
        :func:`editcli.models.keys.read_keys`.
        """
        return self.model.get_submodule(self._projection_path(layer))

    def experts(self, layer: int) -> nn.Module | None:
        """Return the module that holds all routed experts of a layer; None for a layer that is no mixture."""
        name = self.family.experts
        return _submodule(self.block(layer), name) if name else None

    def packed_experts(self, layer: int) -> nn.Module | None:
        """Return the module of :meth:`experts` where its arguments are tokens, chosen experts and gates; else None."""
        experts = self.experts(layer)
        return experts if experts is not None and is_packed(experts) else None

    def shared_gate(self, layer: int) -> nn.Module | None:
        """Return the map whose sigmoid scales the edited expert's output, where a shared expert with one is edited."""
        gate, shared = self.family.shared_gate, self.family.shared
        if gate is None or self._projection_path(layer) != self._path(layer, shared or ""):
            return None
        return self.model.get_submodule(self._path(layer, gate))

    def edits_experts(self, layer: int) -> bool:
        """Return whether the layer's editable matrix is that of all its routed experts."""
        return self.family.experts is not None and self.projection(layer) is self.experts(layer)

    @property
    def experts_per_token(self) -> int:
        """Return how many routed experts read a token."""
        return max(1, _count(getattr(self.model.config.get_text_config(), "num_experts_per_tok", 1)))

    def recorded(self, modules: Collection[str]) -> Architecture:
        """Return the architecture whose sites a run wrote to, by the names of their modules."""
        routed = replace(self, routed=True)
        named = any(routed.site(layer).module in modules for layer in range(self.layers) if self.experts(layer))
        return routed if named else self

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """Return the norm on the MLP's output before it joins the stream, or None."""
        name = self.family.mlp_norm
        return self.model.get_submodule(self._path(layer, name)) if name else None

    def residual_scale(self, layer: int) -> float:
        """Return the factor on the MLP's output when it joins the stream (1.0 but for Granite)."""
        self._path(layer)
        key = self.family.residual_multiplier
        return float(getattr(self.model.config.get_text_config(), key)) if key else 1.0

    def site(self, layer: int) -> Site:
        """Return the layer's editable matrix; raise :class:`ModelError` if its module type has no known orientation."""
        path = self._projection_path(layer)
        if self.edits_experts(layer):
            experts = self.projection(layer)
            refuse_unpacked(experts, path)
            count = len(experts.get_parameter(EXPERTS_WEIGHT))
            transposed = bool(experts.is_transposed)
            return Site(layer=layer, module=f"{path}.{EXPERTS_WEIGHT}", transposed=transposed, experts=count)
        return Site(layer=layer, module=path, transposed=_is_transposed(self.model.get_submodule(path), path))

    def shape(self, layer: int) -> tuple[int, int]:
        """Return the shape (d_out, d_in) of the layer's editable matrix, whatever way round it is stored."""
        *experts, rows, columns = edited_parameter(self.projection(layer)).shape
        rows, columns = (columns, rows) if self.site(layer).transposed else (rows, columns)
        return rows, columns * (experts[0] if experts else 1)

    def _projection_path(self, layer: int) -> str:
        """Return the path of :meth:`projection`: dense layers have no choice, mixtures have one of two experts."""
        family, block = self.family, self.block(layer)
        if family.experts is None or _submodule(block, family.projection) is not None:
            return self._path(layer, family.projection)
        is_shared = family.shared is not None and _submodule(block, family.shared) is not None
        return self._path(layer, (family.shared if is_shared and not self.routed else None) or family.experts)

    def _path(self, layer: int, name: str = "") -> str:
        if not 0 <= layer < self.layers:
            raise ModelError(f"layer {layer} does not exist: the model has layers 0-{self.layers - 1}")
        return f"{self.family.blocks}.{layer}" + (f".{name}" if name else "")


def resolve(model: PreTrainedModel, families: Sequence[Family] = ()) -> Architecture:
    """Find what ``model`` (loaded, or on the meta device) calls its parts.

    ``families`` come first, then :data:`FAMILIES`, then the module tree itself. Raises :class:`ModelError` for a model
    that cannot be edited: a mixture of experts of no known family, encoder-decoder, quantised, or of an irregular
    build. Of a model that reads images as well, the parts are those of its text tower.
    """
    refuse_config(model.config)
    whole, text = model.config.model_type, model.config.get_text_config().model_type
    all_families = (*families, *FAMILIES)
    known = next((family for family in all_families if whole in family.model_types), None)
    if known is None:
        inner = next((family for family in all_families if text in family.model_types), None)
        known = inner and inside(inner, tower_of(model))
    if known is None or known.experts is None:
        _refuse_mixture(model.config)
    architecture = Architecture(known or _discovered(model), model)
    if known is not None:
        _check_paths(architecture)
    _check_weights(architecture)
    return architecture


def skeleton(config: PretrainedConfig, trust_remote_code: bool = False) -> PreTrainedModel:
    """Build the module tree of ``config`` on the meta device: every name and shape, no memory and no weights."""
    refuse_config(config)
    refuse_depth(config)
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    # A value of the wrong kind or size fails wherever the model's class first computes with it, with errors of many
    # libraries.
    except Exception as error:
        raise ModelError(
            f"no causal language model can be built from a configuration of type {config.model_type!r}: {error}"
        ) from error


def refuse_config(config: PretrainedConfig) -> None:
    """Raise :class:`ModelError` if the configuration alone says that the model cannot be edited."""
    what = f"a model of type {config.model_type!r}"
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{what} has an encoder and a decoder; choose a decoder-only causal language model")
    packed = getattr(config, "quantization_config", None)
    if packed is not None:
        said = packed if isinstance(packed, dict) else getattr(packed, "__dict__", {})
        raise ModelError(
            f"the model's weights are quantised ({said.get('quant_method', 'in an unknown way')}), which editcli does "
            "not pack anew; edit the unquantised checkpoint that they were made from, and quantise the result"
        )
    auto_class(config)


def _refuse_mixture(config: PretrainedConfig) -> None:
    """Raise :class:`ModelError` for a mixture of experts of no known family."""
    parts = (config, config.get_text_config())
    if any(_count(getattr(part, key, None)) > 1 for part in parts for key in EXPERT_KEYS):
        raise ModelError(
            f"a model of type {config.model_type!r} is a mixture of experts of no family that editcli knows; describe "
            "it in a plugin with the editcli_architectures hook, or choose another model"
        )


def refuse_depth(config: PretrainedConfig) -> None:
    """Raise :class:`ModelError` where building the layers of a configuration would take hours."""
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        layers = _count(getattr(part, "num_hidden_layers", None))
        if layers > MAX_LAYERS:
            raise ModelError(
                f"the model's configuration counts {layers:,} layers, and no model has more than {MAX_LAYERS:,}; "
                "correct num_hidden_layers in config.json"
            )


def _discovered(model: PreTrainedModel) -> Family:
    layout = discover(model, tower_of(model))
    return Family(
        model.config.model_type,
        (model.config.model_type,),
        blocks=layout.blocks,
        mlp=layout.mlp,
        projection=layout.projection,
        final_norm=layout.final_norm,
    )


def _count(value: Any) -> int:
    return value if isinstance(value, int) else 0


def _check_paths(architecture: Architecture) -> None:
    """Raise :class:`ModelError` where the family's facts do not hold for this model."""
    family, config = architecture.family, architecture.model.config.get_text_config()
    for key, value, what in family.refused:
        if getattr(config, key, None) == value:
            raise ModelError(f"this {family.name} model {what} ({key}={value}), so its MLPs cannot be edited")
    try:
        for part in (architecture.block, architecture.mlp, architecture.projection, architecture.mlp_norm):
            part(0)
    except AttributeError as error:
        if family.experts is not None:
            # The fifth release of transformers renamed the parts of some mixtures when it stacked their experts.
            raise unpacked(type(architecture.model).__name__) from error
        raise ModelError(
            f"the family {family.name!r} does not fit this {type(architecture.model).__name__}: {error}; "
            "correct the family's paths"
        ) from error


def _check_weights(architecture: Architecture) -> None:
    """Raise :class:`ModelError` unless every projection is a plain matrix of floating-point numbers."""
    for layer in range(architecture.layers):
        site = architecture.site(layer)
        dtype = edited_parameter(architecture.projection(layer)).dtype
        if not dtype.is_floating_point or dtype.itemsize < 2:
            raise ModelError(f"{site.module} holds {dtype} numbers; choose the checkpoint before it was quantised")


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    """Return a module inside a block; None where this block has none of that name."""
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None


def _is_transposed(module: nn.Module, path: str) -> bool:
    if isinstance(module, Conv1D):
        return True
    if isinstance(module, nn.Linear):
        return False
    raise ModelError(f"{path} is a {type(module).__name__}; only Linear and Conv1D projections can be edited")
