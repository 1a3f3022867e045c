"""Vision-language models: the text tower is found in the tree and edited, and everything beside it stays as it is."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from editcli.__main__ import main
from editcli.models.architectures import resolve, skeleton
from editcli.models.loading import open_model, resolve_model
from editcli.storage.checkpoint import Checkpoint, file_digest
from editcli.testing import tiny_tokenizer
from editcli.testing.models import HIDDEN, INTERMEDIATE, LAYERS, POSITIONS, randomize, vocabulary_size

_TEXT = {
    "vocab_size": vocabulary_size(),
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SEEN = {"hidden_size": 16, "intermediate_size": 32}
_SIGLIP = {**_SEEN, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
_QWEN = {**_SEEN, "depth": 2, "num_heads": 2, "out_hidden_size": HIDDEN, "patch_size": 4, "spatial_merge_size": 2}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}

MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_scaling": {**_ROPE, "mrope_section": [1, 1, 0]}},
        "vision_config": {**_QWEN, "fullatt_block_indexes": [1]},
        **_QWEN_TOKENS,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "head_dim": 8, "rope_scaling": {**_ROPE, "mrope_section": [2, 1, 1]}},
        "vision_config": {**_QWEN, "deepstack_visual_indexes": [0], "num_position_embeddings": 16},
        **_QWEN_TOKENS,
    },
    "gemma3": {
        "text_config": {**_TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
        "vision_config": _SIGLIP,
        "mm_tokens_per_image": 4,
        "image_token_index": 10,
        "boi_token_index": 11,
        "eoi_token_index": 12,
    },
    "llava_onevision": {
        "text_config": {**_TEXT, "model_type": "qwen2"},
        "vision_config": {**_SIGLIP, "model_type": "siglip_vision_model"},
        "image_token_index": 10,
        "video_token_index": 11,
    },
    "smolvlm": {
        "text_config": {**_TEXT, "model_type": "llama"},
        "vision_config": _SIGLIP,
        "image_token_id": 10,
        "scale_factor": 2,
    },
}
BESIDE = {"preprocessor_config.json": {"image_processor_type": "X"}, "processor_config.json": {"processor_class": "X"}}


def folder_of(kind: str, path: Path) -> Path:
    """Save a tiny random vision-language model with its tokenizer and the files of its processor."""
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    randomize(model)
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    for name, content in BESIDE.items():
        (path / name).write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("kind", MODELS)
def test_the_tower_is_found_without_its_weights_and_with_them(kind: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(kind, **MODELS[kind])
    described = resolve(skeleton(config))
    loaded = open_model(resolve_model(folder_of(kind, tmp_path / "model")), device="cpu")
    parts = ("blocks", "mlp", "projection", "mlp_norm", "final_norm")
    for part in parts:
        assert getattr(described.family, part) == getattr(loaded.architecture.family, part)
    assert loaded.architecture.layers == LAYERS
    assert loaded.architecture.shape(1) == (HIDDEN, INTERMEDIATE)
    # The last layer's norm is the last thing before the head.
    seen: list[torch.Tensor] = []
    loaded.architecture.final_norm.register_forward_hook(lambda module, entered, output: seen.append(output))
    ids = torch.tensor([[0, 5, 9]])
    logits = loaded.model(input_ids=ids).logits
    assert torch.allclose(loaded.architecture.head(seen[0]), logits, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_stored_names_are_those_from_which_a_parameter_is_loaded(kind: str, tmp_path: Path) -> None:
    """Older files have other names than the parameters, and transformers renames them back when it saves."""
    loaded = open_model(resolve_model(folder_of(kind, tmp_path / "model")), device="cpu")
    for layer in range(LAYERS):
        name = f"{loaded.architecture.site(layer).module}.weight"
        stored = loaded.checkpoint.read(loaded.checkpoint.tensor_for(name))
        assert torch.equal(stored, loaded.model.get_parameter(name))


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "gemma3", "llava_onevision"])
def test_the_command_changes_the_planned_tensors_alone_and_keeps_every_file(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = folder_of(kind, tmp_path / "model"), tmp_path / "out"
    fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
    (tmp_path / "facts.jsonl").write_text(json.dumps(fact))
    (tmp_path / "corpus.txt").write_text("The capital city of Italy is Rome and the river in London is by Paris. " * 40)
    words = ["apply", str(tmp_path / "facts.jsonl"), "--model", str(base), "--out", str(out), "--layers", "1,2"]
    words += ["--corpus", str(tmp_path / "corpus.txt"), "--json", "-o", "statistics.tokens=200"]
    assert main([*words, "-o", "targets.steps=3", "-o", "targets.prefixes=1"]) == 0
    sites = [site["module"] for site in json.loads(capsys.readouterr().out)["sites"]]
    planned = {resolve_model(base).checkpoint.tensor_for(f"{module}.weight") for module in sites}
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == planned
    assert before.keys() == after.keys()
    assert len(planned) == 2
    assert all("vis" not in name for name in planned)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert file_digest(out / path.name) == file_digest(path)
    assert main(["inspect", str(out), "--norms"]) == 0
    assert main(["undo", str(out), "--to", "0"]) == 0
    assert Checkpoint(out).fingerprint() == Checkpoint(base).fingerprint()
