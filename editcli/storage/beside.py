"""The small files of a model folder that transformers opens by their names, checked before it does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from editcli.storage.opening import CONFIG, INDEX, TEMPLATE, TOKENIZER, Kind, check

TEMPLATES = "additional_chat_templates"
"""The folder of a model's further chat templates."""

_OPENED: Mapping[str, Kind] = {
    "config.json": CONFIG,
    "generation_config.json": CONFIG,
    "adapter_config.json": CONFIG,
    "preprocessor_config.json": CONFIG,
    "processor_config.json": CONFIG,
    "special_tokens_map.json": CONFIG,
    "added_tokens.json": CONFIG,
    "chat_template.json": CONFIG,
    "*.py": CONFIG,
    "*.index.json": INDEX,
    "tokenizer*.json": TOKENIZER,
    "tekken.json": TOKENIZER,
    "vocab.json": TOKENIZER,
    "vocab.txt": TOKENIZER,
    "merges.txt": TOKENIZER,
    "*.model": TOKENIZER,
    "*.tiktoken": TOKENIZER,
    "*.jinja": TEMPLATE,
    f"{TEMPLATES}/*.jinja": TEMPLATE,
}


def check_small_files(folder: Path) -> None:
    """Raise :class:`FileError` for the first file that transformers would open and that is none, or is too large."""
    for pattern, kind in _OPENED.items():
        for path in sorted(folder.glob(pattern)):
            check(path, kind, folder=folder)
