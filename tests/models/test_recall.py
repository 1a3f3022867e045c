"""A model takes keys and values under the name that its forward declares, whatever a version calls it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from editcli.evaluation.generation import generate
from editcli.evaluation.writing import write_freely
from editcli.models.kv_cache import cache_argument, supports_kv_cache
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.testing import tiny_model_folder

NAMES = ("cache", "past_key_values", "cache_params")
TOKENS = 6


def installed_name() -> str:
    """Return what the installed version of transformers calls keys and values."""
    name = cache_argument(LlamaForCausalLM)
    assert name is not None
    return name


class Renamed(LlamaForCausalLM):
    """A model of a version that renamed the argument: any other name is refused, as by a forward without it."""

    def _call(self, values: Any, kwargs: dict[str, Any]) -> Any:
        assert not set(kwargs) & set(NAMES), f"unexpected keyword {set(kwargs) & set(NAMES)}"
        return super().forward(**{installed_name(): values}, **kwargs)


class TakesOnlyCache(Renamed):
    def forward(self, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        return self._call(cache, {"input_ids": input_ids, **kwargs})


class TakesOnlyPastKeyValues(Renamed):
    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        return self._call(past_key_values, {"input_ids": input_ids, **kwargs})


class TakesNone(LlamaForCausalLM):
    def forward(self, input_ids: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        assert not set(kwargs) & set(NAMES)
        return super().forward(input_ids, attention_mask=attention_mask, **{**kwargs, "use_cache": False})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("recall") / "llama", "llama")


def opened(folder: Path, family: type = LlamaForCausalLM) -> LoadedModel:
    loaded = open_model(resolve_model(folder), device="cpu")
    loaded.model.__class__ = family
    return loaded


@pytest.mark.parametrize(
    ("family", "name"), [(TakesOnlyCache, "cache"), (TakesOnlyPastKeyValues, "past_key_values"), (TakesNone, None)]
)
def test_the_forward_says_its_own_name(family: type, name: str | None) -> None:
    assert cache_argument(family) == name


@pytest.mark.parametrize("family", [TakesOnlyCache, TakesOnlyPastKeyValues])
def test_a_model_of_another_version_resumes_and_writes_the_same_texts(folder: Path, family: type) -> None:
    prompts = ["The capital of France is", "The river"]
    plain, renamed = opened(folder), opened(folder, family)
    assert supports_kv_cache(renamed.model, renamed.input_device)
    assert generate(renamed, prompts, tokens=TOKENS) == generate(plain, prompts, tokens=TOKENS)
    assert write_freely(renamed, prompts) == write_freely(plain, prompts)


def test_a_model_without_a_cache_reads_its_text_again(folder: Path) -> None:
    prompts = ["The capital of France is", "The river", "The river of France"]
    plain, bare = opened(folder), opened(folder, TakesNone)
    assert not supports_kv_cache(bare.model, bare.input_device)
    assert generate(bare, prompts, tokens=TOKENS) == generate(plain, prompts, tokens=TOKENS)
    # Its rows end at different tokens, and it goes on with all of them.
    assert write_freely(bare, prompts) == write_freely(plain, prompts)


def test_a_cache_is_extended_by_each_step(folder: Path) -> None:
    """Writing with a cache runs the model on one new token at a time, not on the text again."""
    loaded, widths = opened(folder), []
    handle = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    with torch.no_grad():
        generate(loaded, ["The capital of France is"], tokens=3)
    handle.remove()
    assert widths[1:] == [1, 1]


def test_libraries_are_silent_until_the_user_asks_and_warn_once_then() -> None:
    code = (
        "import warnings; from editcli.cli import libraries\n"
        "libraries.quieten(); warnings.warn('old name', FutureWarning)\n"
        "libraries.show(); [warnings.warn('new name', FutureWarning) for _ in range(3)]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "old name" not in done.stderr
    assert done.stderr.count("FutureWarning: new name") == 1
