"""GGUF files made of ordinary model folders of the types Llama and GPT-2, as llama.cpp's converter makes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.torch import load_file

Kinds = Callable[[str], str]
"""The block type of a tensor by its name in the file."""


def all_of(kind: str, **others: str) -> Kinds:
    """Return the types of a model whose matrices are of one type; ``others`` are those of layers, as ``layer2``."""

    def choose(name: str) -> str:
        _, layer, part = (*name.split("."), "", "")[:3]
        return others.get(f"layer{layer}", kind) if part == "ffn_down" else kind

    return choose


def gguf_of(folder: Path, path: Path, kinds: Kinds | str = "F16") -> Path:
    """Write the model in ``folder`` as one GGUF and return its path."""
    chosen = all_of(kinds) if isinstance(kinds, str) else kinds
    config = json.loads((folder / "config.json").read_text("utf-8"))
    kind = config["model_type"]
    writer = GGUFWriter(path, kind)
    _describe(writer, config)
    _tokens(writer, json.loads((folder / "tokenizer.json").read_text("utf-8")), config)
    names = gguf.get_tensor_name_map(MODEL_ARCH[kind.upper()], _first(config, "num_hidden_layers", "n_layer"))
    for name, tensor in load_file(folder / "model.safetensors").items():
        own = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert own is not None, name
        _add(writer, own, _ordered(own, tensor.float().numpy(), config), chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_name("facts")
    width, heads = _first(config, "hidden_size", "n_embd"), _first(config, "num_attention_heads", "n_head")
    writer.add_block_count(_first(config, "num_hidden_layers", "n_layer"))
    writer.add_context_length(_first(config, "max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(_first(config, "intermediate_size", "n_inner"))
    writer.add_head_count(heads)
    if config["model_type"] == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        return
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(width // heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _first(config: dict[str, Any], *keys: str) -> int:
    return next(int(config[key]) for key in keys if key in config)


def _tokens(writer: GGUFWriter, tokenizer: dict[str, Any], config: dict[str, Any]) -> None:
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    kinds = [TokenType.CONTROL if index in special else TokenType.NORMAL for index in range(len(vocabulary))]
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_pad_token_id(config["pad_token_id"])
    writer.add_add_bos_token(True)


def _ordered(name: str, numbers: Any, config: dict[str, Any]) -> Any:
    """Return the rows of q and k in llama.cpp's order, the halves of each head interleaved; GPT-2's matrices turned."""
    if config["model_type"] == "gpt2":
        turned = numbers.ndim == 2 and name.startswith("blk.")
        return numpy.ascontiguousarray(numbers.T) if turned else numbers
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    part = name.split(".")[2] if name.startswith("blk.") else ""
    if part not in heads:
        return numbers
    halves = numbers.reshape(heads[part], 2, -1, numbers.shape[1])
    return numpy.ascontiguousarray(halves.swapaxes(1, 2)).reshape(numbers.shape)


def _add(writer: GGUFWriter, name: str, numbers: Any, kinds: Kinds) -> None:
    kind = GGMLQuantizationType[kinds(name) if numbers.ndim == 2 else "F32"]
    writer.add_tensor(name, gguf.quantize(numbers, kind), raw_dtype=kind)
