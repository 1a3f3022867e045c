"""Families without a row of their own: their module tree alone says what can be edited.

The complete job is tried on the families of ``tests/program/test_families.py``. Here the tree is built without
weights, which takes milliseconds, so that every further family of transformers that was edited once stays recognised.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoConfig

from editcli.models.architectures import FAMILIES, resolve, skeleton

WIDTH, MLP = 16, 40
SPECIALS = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIZES = {**SPECIALS, "hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 4}
GROUPED = {**SIZES, "intermediate_size": MLP, "num_key_value_heads": 2, "head_dim": 4}
DOWN = "model.layers.1.mlp.down_proj"

REGULAR = (
    *(
        "arcee",
        "bitnet",
        "cohere",
        "cohere2",
        "cwm",
        "diffllama",
        "ernie4_5",
        "hunyuan_v1_dense",
        "internlm3",
    ),
    *("jais2", "ministral", "ministral3", "nemotron", "olmo", "seed_oss", "smollm3"),
)
"""Types whose layers are Llama's."""
OTHERS: dict[str, tuple[dict[str, Any], str, int]] = {
    "biogpt": ({**SIZES, "intermediate_size": MLP}, "biogpt.layers.1.fc2", MLP),
    "bloom": (SIZES, "transformer.h.1.mlp.dense_4h_to_h", 4 * WIDTH),
    "codegen": ({**SIZES, "n_inner": MLP, "rotary_dim": 4}, "transformer.h.1.mlp.fc_out", MLP),
    "ctrl": ({**SIZES, "dff": MLP}, "transformer.h.1.ffn.2", MLP),
    "glm": ({**GROUPED, "partial_rotary_factor": 0.5}, DOWN, MLP),
    "gpt_bigcode": ({**SIZES, "n_inner": MLP}, "transformer.h.1.mlp.c_proj", MLP),
    "gpt_neox_japanese": (SIZES, "gpt_neox_japanese.layers.1.mlp.dense_4h_to_h", 4 * WIDTH),
    "helium": (GROUPED, DOWN, MLP),
    "modernbert-decoder": (
        {**SIZES, "intermediate_size": MLP, "cls_token_id": 0, "sep_token_id": 1},
        "model.layers.1.mlp.Wo",
        MLP,
    ),
    "mpt": (
        {**SPECIALS, "d_model": WIDTH, "n_heads": 4, "n_layers": 4},
        "transformer.blocks.1.ffn.down_proj",
        4 * WIDTH,
    ),
    "nanochat": (GROUPED, "model.layers.1.mlp.fc2", MLP),
    "persimmon": ({**SIZES, "intermediate_size": MLP}, "model.layers.1.mlp.dense_4h_to_h", MLP),
    "qwen3_5_text": (GROUPED, DOWN, MLP),
    "recurrent_gemma": (GROUPED, "model.layers.1.mlp_block.down_proj", MLP // 2),
    "vaultgemma": (GROUPED, DOWN, MLP),
    "xglm": ({**SIZES, "ffn_dim": MLP}, "model.layers.1.fc2", MLP),
}


@pytest.mark.parametrize(
    ("kind", "config", "module", "width"),
    [
        *((kind, GROUPED, DOWN, MLP) for kind in REGULAR),
        *((kind, config, module, width) for kind, (config, module, width) in OTHERS.items()),
    ],
)
def test_a_regular_family_is_recognised_by_its_modules(
    kind: str, config: dict[str, Any], module: str, width: int
) -> None:
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"this version of transformers has no models of type {kind}")
    assert not any(kind in family.model_types for family in FAMILIES)
    architecture = resolve(skeleton(AutoConfig.for_model(kind, **config)))
    assert architecture.layers == 4
    assert architecture.site(1).module == module
    assert architecture.shape(1) == (WIDTH, width)
