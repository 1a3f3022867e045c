"""The text tower of a vision-language model: a decoder inside a larger tree, edited as a causal LM is.

Given text alone, such a model is its text tower with a head. Which module that is, its config says: the tower is the
outermost module with the config of the text model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import transformers
from transformers import PreTrainedModel

from editcli.errors import ModelError
from editcli.plugin.families import Family


def is_multimodal(config: Any) -> bool:
    """Tell whether a config holds the config of its text model in a part of its own."""
    return config.get_text_config() is not config


def auto_class(config: Any) -> Any:
    """Return the class of transformers that builds the model of a config; :class:`ModelError` where text is no input.

    A model that reads images as well is built whole, so that its files are loaded under the names that they have.
    """
    if not is_multimodal(config):
        return transformers.AutoModelForCausalLM
    if type(config) in transformers.AutoModelForImageTextToText._model_mapping:
        return transformers.AutoModelForImageTextToText
    raise ModelError(
        f"a model of type {config.model_type!r} is multimodal, and transformers does not answer text with it; choose a "
        "text-only causal language model"
    )


def tower_of(model: PreTrainedModel) -> str:
    """Return the path of the text tower; empty for a model that is nothing else. Raises :class:`ModelError`."""
    if not is_multimodal(model.config):
        return ""
    kind = type(model.config.get_text_config())
    for name, module in model.named_modules():
        if name and isinstance(module, PreTrainedModel) and type(module.config) is kind:
            return name
    raise ModelError(f"no text tower was found in this {type(model).__name__}; choose a text-only model")


def inside(family: Family, tower: str) -> Family:
    """Return a family of text models whose backbone lies at ``tower`` in a larger tree."""
    if not tower:
        return family
    paths = {name: getattr(family, name).partition(".")[2] for name in ("blocks", "final_norm")}
    return replace(family, **{name: f"{tower}.{path}" for name, path in paths.items()})
