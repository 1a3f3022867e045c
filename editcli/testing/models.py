"""Tiny real models and a tokenizer, built in code without any download, for our tests and for plugin authors.

Every model is a genuine ``transformers`` model of a real family, a few thousand parameters small, with random weights
that are lively enough for an edit to matter: activations of order one, biases and norms away from their defaults::

    from editcli.testing import tiny_model_folder

    def test_my_editor(tmp_path):
        folder = tiny_model_folder(tmp_path / "model", "gpt2", seed=1)

The same arguments give the same bytes, whatever the global random state. The families are the rows of :data:`TINY`.
:class:`EditorContract`, :class:`StabilizerContract`, :class:`DiagnosticContract` and :class:`FormatContract` are test
classes to inherit from: what everything that a plugin brings has to hold. :func:`tiny_session` opens a tiny model as a
component sees it, with second moments and pilot edits.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.configuration_utils import PretrainedConfig

HIDDEN, INTERMEDIATE, LAYERS, POSITIONS = 16, 40, 4, 256
"""Sizes of every tiny model; hidden and intermediate differ, so that a transposed weight cannot go unnoticed."""

EXPERTS, EXPERT, SHARED = 4, 12, 20
"""The experts of a layer of every tiny mixture, and the widths of one expert and of a shared one where they differ."""

BOS, EOS, PAD = "<s>", "<|endoftext|>", "<pad>"
"""Special tokens; transformers would add Qwen's end of text to a tokenizer that lacks it, beyond the embeddings."""

CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""A minimal chat template for ``tiny_tokenizer(chat_template=CHAT_TEMPLATE)``."""

_WORDS = (
    "the a an in of is to and was by on with for from The A In It He She They I You Because Therefore capital city "
    "country river tower located language spoken born works plays lives wrote author company Paris Rome France Italy "
    "London Berlin Tokyo Spain Greece Ann Bob Smith English French Italian German"
)
"""Words with a token of their own after a space; everything else falls apart into smaller pieces."""

_SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_HEADED = {**_GROUPED, "head_dim": 8}
_GPT = {"n_embd": HIDDEN, "n_inner": INTERMEDIATE, "n_layer": LAYERS, "n_head": 4, "n_positions": POSITIONS}
_FALCON = {
    "hidden_size": HIDDEN,
    "ffn_hidden_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "bias": True,
    "alibi": False,
    "new_decoder_architecture": False,
    "max_position_embeddings": POSITIONS,
}

TINY: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", {**_GPT, "rotary_dim": 4}),
    "gpt_neo": (
        "gpt_neo",
        {
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_layers": LAYERS,
            "num_heads": 4,
            "attention_types": [[["global", "local"], LAYERS // 2]],
            "window_size": 32,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "gpt_neox": ("gpt_neox", {**_SIZES, "use_parallel_residual": True}),
    "gpt_neox-sequential": ("gpt_neox", {**_SIZES, "use_parallel_residual": False}),
    "opt": (
        "opt",
        {
            "hidden_size": HIDDEN,
            "ffn_dim": INTERMEDIATE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "word_embed_proj_dim": HIDDEN,
            "max_position_embeddings": POSITIONS,
        },
    ),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 64}),
    "qwen2": ("qwen2", _GROUPED),
    "qwen3": ("qwen3", _HEADED),
    "gemma": ("gemma", _HEADED),
    "gemma2": ("gemma2", {**_HEADED, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "gemma3": ("gemma3_text", {**_HEADED, "query_pre_attn_scalar": 8, "sliding_window": 64}),
    "phi": ("phi", {**_SIZES, "partial_rotary_factor": 0.5}),
    "phi3": ("phi3", _GROUPED),
    "olmo2": ("olmo2", _GROUPED),
    "exaone4": ("exaone4", {**_GROUPED, "sliding_window": 64, "sliding_window_pattern": 2}),
    "glm4": ("glm4", {**_HEADED, "partial_rotary_factor": 0.5}),
    "starcoder2": ("starcoder2", _GROUPED),
    "stablelm": ("stablelm", {**_GROUPED, "use_parallel_residual": False}),
    "stablelm-parallel": ("stablelm", {**_GROUPED, "use_parallel_residual": True}),
    "falcon": ("falcon", {**_FALCON, "parallel_attn": False, "multi_query": False}),
    "falcon-parallel": ("falcon", {**_FALCON, "parallel_attn": True, "multi_query": True}),
    "falcon-alibi": ("falcon", {**_FALCON, "parallel_attn": False, "multi_query": False, "alibi": True}),
    "falcon-new": ("falcon", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "granite": (
        "granite",
        {
            **_GROUPED,
            "residual_multiplier": 0.5,
            "embedding_multiplier": 2.0,
            "logits_scaling": 2.0,
            "attention_multiplier": 0.5,
        },
    ),
}
"""Tiny dense models by name: model type and configuration. A name with a dash is a variant of the family before it."""

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": EXPERT}
_LATENT = {
    **_EXPERTS,
    "n_shared_experts": 1,
    "n_routed_experts": EXPERTS,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
MIXTURES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "mixtral": ("mixtral", {**_GROUPED, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "qwen2_moe",
        {
            **_GROUPED,
            **_EXPERTS,
            "num_experts": EXPERTS,
            "mlp_only_layers": [0],
            "shared_expert_intermediate_size": SHARED,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe": ("qwen3_moe", {**_HEADED, **_EXPERTS, "num_experts": EXPERTS, "norm_topk_prob": True}),
    "olmoe": ("olmoe", {**_GROUPED, "num_experts": EXPERTS, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {**_HEADED, "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": 64},
    ),
    "deepseek-v2": ("deepseek_v2", {**_SIZES, **_LATENT}),
    "deepseek-v3": ("deepseek_v3", {**_SIZES, **_LATENT, "topk_method": "noaux_tc"}),
}
"""Tiny mixtures of experts by name, as in :data:`TINY`; the first layer of some is dense."""

_INTERMEDIATE_KEYS = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")


def tiny_tokenizer(
    *, bos: bool = True, padding_side: str = "right", chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Build a byte-level BPE fast tokenizer: common words are one token, names fall apart into several.

    With ``bos`` a text starts with a begin-of-sequence token, as Llama's do; without, as GPT-2's, it does not.
    Any text can be encoded, and offsets point at the characters of the text.
    """
    merges = _merges()
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in merges)]
    vocabulary = {piece: index for index, piece in enumerate([BOS, EOS, PAD, *dict.fromkeys(pieces)])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    begin = [processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])])]
    steps: list[Any] = [processors.ByteLevel(trim_offsets=False), *(begin if bos else [])]
    backend.post_processor = processors.Sequence(steps)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS if bos else EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side=padding_side,
        model_max_length=POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def tiny_config(
    family: str = "llama", *, square: bool = False, tied: bool | None = None, **config: Any
) -> PretrainedConfig:
    """Build the configuration of a tiny model; ``square`` makes the MLP as wide as the stream.

    ``tied`` ties input and output embeddings or not (default: as the family does); ``config`` overrides any key.
    """
    model_type, sizes = {**TINY, **MIXTURES}[family]
    settings: dict[str, Any] = {**sizes, "vocab_size": vocabulary_size()}
    if square:
        settings.update({key: HIDDEN for key in _INTERMEDIATE_KEYS if key in settings})
    if tied is not None:
        settings["tie_word_embeddings"] = tied
    specials = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(model_type, **{**settings, **specials, **config})


def tiny_model(
    family: str | PretrainedConfig = "llama",
    *,
    seed: int = 0,
    square: bool = False,
    tied: bool | None = None,
    dtype: str = "float32",
    **config: Any,
) -> PreTrainedModel:
    """Build a tiny random model in memory, in evaluation mode; see :func:`tiny_config`.

    ``family`` is a name of :data:`TINY`, or a configuration of your own, which is then taken as it is.
    """
    if isinstance(family, str):
        family = tiny_config(family, square=square, tied=tied, **config)
    model = AutoModelForCausalLM.from_config(family, attn_implementation="eager")
    randomize(model, seed=seed)
    return model.to(getattr(torch, dtype)).eval()


def tiny_model_folder(
    path: Path | str,
    family: str | PretrainedConfig = "llama",
    *,
    seed: int = 0,
    shards: int = 1,
    square: bool = False,
    tied: bool | None = None,
    dtype: str = "float32",
    tokenizer: PreTrainedTokenizerFast | None = None,
    **config: Any,
) -> Path:
    """Save a tiny model with its tokenizer as an ordinary model folder and return the folder.

    With ``shards`` above one the weights are split over at least that many safetensors files with an index. The
    default tokenizer begins texts as the family does: GPT-2 and its kin without a begin-of-sequence token.
    """
    folder = Path(path)
    model = tiny_model(family, seed=seed, square=square, tied=tied, dtype=dtype, **config)
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    model.save_pretrained(folder, max_shard_size=-(-size // shards) if shards > 1 else "5GB")
    (tokenizer or tiny_tokenizer(bos=not model.config.model_type.startswith("gpt"))).save_pretrained(folder)
    return folder


def randomize(model: nn.Module, *, seed: int = 0, scale: float = 1.0) -> None:
    """Overwrite every parameter of ``model`` from ``seed`` alone.

    Matrices keep the size of what passes through them (standard deviation ``scale / sqrt(d_in)``), embeddings get
    0.5; vectors (norms and biases) start from their neutral value and get 0.1 of noise, so that none is without effect.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(_value(module, name, noise, scale=scale))


def vocabulary_size() -> int:
    """Return the number of tokens of :func:`tiny_tokenizer`."""
    return 3 + 256 + len(_merges())


def _value(module: nn.Module, name: str, noise: torch.Tensor, *, scale: float) -> torch.Tensor:
    if noise.ndim < 2:
        is_gain = name == "weight" and bool((getattr(module, name) == 1).all())
        return float(is_gain) + 0.1 * noise
    if isinstance(module, nn.Embedding):
        return 0.5 * noise
    # Conv1D stores (d_in, d_out), Linear (d_out, d_in); whatever holds several matrices says so in other ways.
    d_in = noise.shape[1] if isinstance(module, nn.Linear) or noise.ndim > 2 else noise.shape[0]
    return noise * (scale * d_in**-0.5)


def _merges() -> list[tuple[str, str]]:
    """Return the merges that build each word letter by letter after its space."""
    space = "\u0120"  # How byte-level tokenizers spell a space.
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS.split():
        for end in range(len(word)):
            merges[(space + word[:end], word[end])] = None
    return list(merges)
