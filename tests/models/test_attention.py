"""Grouped attention against torch's own, and the models that may use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from editcli.models.attention import NAME, REPLACED, grouped, grouped_agrees, grouped_attention
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.norms import fusable_norms, replaced_norms
from editcli.testing import tiny_model_folder
from tests.support.families import families

ROWS, HEADS, TOKENS, PAST, WIDTH = 3, 4, 5, 7, 8


def tensors(key_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(ROWS, HEADS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    key, value = torch.randn(2, ROWS, key_heads, PAST + TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    return query, key, value


def reference(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """softmax(q_i k_j scaling) v_j over the columns that are seen, one query at a time."""
    output = torch.zeros(ROWS, TOKENS, HEADS, WIDTH, dtype=torch.float64)
    share = HEADS // key.shape[1]
    for row in range(ROWS):
        for head in range(HEADS):
            for token in range(TOKENS):
                columns = seen[row, token].nonzero().flatten()
                products = key[row, head // share, columns] @ query[row, head, token] * scaling
                output[row, token, head] = products.softmax(dim=0) @ value[row, head // share, columns]
    return output


def masks() -> Tensor:
    """Causal, and the first row has fewer past columns."""
    seen = torch.ones(ROWS, TOKENS, PAST + TOKENS, dtype=torch.bool).tril(PAST)
    seen[0, :, :3] = False
    return seen


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bool", "added", "per head"])
def test_it_is_softmax_of_the_products(key_heads: int, kind: str) -> None:
    query, key, value = tensors(key_heads)
    seen, scaling = masks(), 0.3
    mask = seen[:, None]
    if kind == "added":
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -1e30)
    if kind == "per head":
        mask = mask.expand(ROWS, HEADS, TOKENS, PAST + TOKENS)
    output, weights = grouped(nn.Identity(), query, key, value, mask, scaling=scaling)
    assert weights is None
    # The softmax is computed in single precision.
    torch.testing.assert_close(output, reference(query, key, value, seen, scaling), rtol=1e-5, atol=1e-6)


def test_without_a_mask_no_token_sees_a_later_one() -> None:
    query, key, value = (tensor[:, :, -TOKENS:] for tensor in tensors(2))
    seen = torch.ones(ROWS, TOKENS, TOKENS, dtype=torch.bool).tril()
    output, _ = grouped(nn.Identity(), query, key, value, None)
    torch.testing.assert_close(output, reference(query, key, value, seen, WIDTH**-0.5), rtol=1e-5, atol=1e-6)
    everything, _ = grouped(nn.Identity(), query, key, value, None, is_causal=False)
    torch.testing.assert_close(
        everything, reference(query, key, value, torch.ones_like(seen), WIDTH**-0.5), rtol=1e-5, atol=1e-6
    )


def opened(folder: Path, family: str) -> LoadedModel:
    return open_model(resolve_model(tiny_model_folder(folder, family)))


@pytest.mark.parametrize("family", families())
def test_a_family_that_would_compute_something_else_keeps_its_own(family: str, tmp_path: Path) -> None:
    loaded = opened(tmp_path, family)
    ids = torch.arange(6)[None] + 3
    with torch.no_grad():
        plain = loaded.model(input_ids=ids).logits
        if grouped_agrees(loaded.model, "cpu"):
            with grouped_attention(loaded.model) as used, replaced_norms(fusable_norms(loaded.model)):
                assert used
                assert loaded.model.config._attn_implementation == NAME
                torch.testing.assert_close(loaded.model(input_ids=ids).logits, plain, rtol=1e-4, atol=1e-4)
    assert loaded.model.config._attn_implementation in (REPLACED, "eager")
    torch.testing.assert_close(loaded.model(input_ids=ids).logits, plain, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_who_uses_it(family: str, tmp_path: Path) -> None:
    assert grouped_agrees(opened(tmp_path, family).model, "cpu")


def test_a_model_that_would_compute_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened(tmp_path, "llama").model

    def backwards(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *others: Any, **more: Any) -> Any:
        return grouped(module, query, key, value.flip(2), *others, **more)

    monkeypatch.setattr("editcli.models.attention.grouped", backwards)
    assert not grouped_agrees(model, "cpu")
    assert not grouped_agrees(model, "cpu", apart=True)


def test_the_choice_is_the_models(tmp_path: Path) -> None:
    """No switch of the process: another model that runs at the same time keeps its own attention."""
    one, other = opened(tmp_path / "one", "llama"), opened(tmp_path / "other", "llama")
    with grouped_attention(one.model):
        assert other.model.config._attn_implementation == REPLACED


def test_each_part_of_a_model_gets_its_own_attention_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower for images may run an attention of its own."""
    loaded = opened(tmp_path, "llama")
    config: Any = loaded.model.config
    monkeypatch.setattr(type(config), "sub_configs", {"vision_config": PretrainedConfig})
    config.vision_config = PretrainedConfig()
    config.vision_config._attn_implementation = "eager"
    with grouped_attention(loaded.model) as used:
        assert used
    assert config._attn_implementation == REPLACED
    assert config.vision_config._attn_implementation == "eager"


class Root(nn.Module):
    """An RMS norm as families write it; with a gate it computes more."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, width), requires_grad=False)
        self.eps = 1e-5

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        normed = self.weight * hidden * (hidden.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return normed if gate is None else normed * gate


class AlwaysGated(Root):
    """A norm that fails without its gate."""

    def forward(self, hidden: Tensor, gate: Tensor | None = None) -> Tensor:
        return super().forward(hidden) * nn.functional.silu(gate)  # pyright: ignore[reportArgumentType]


def test_a_norm_that_gets_a_gate_keeps_it() -> None:
    model, hidden, gate = nn.ModuleList([Root(6)]), torch.randn(3, 6), torch.randn(3, 6)
    plain, gated = model[0](hidden), model[0](hidden, gate=gate)
    with replaced_norms(fusable_norms(model)):
        assert "forward" in model[0].__dict__
        torch.testing.assert_close(model[0](hidden), plain)
        assert torch.equal(model[0](hidden, gate=gate), gated)
        assert torch.equal(model[0](hidden, gate), gated)


def test_a_norm_that_cannot_be_tried_stays_as_it_is() -> None:
    assert fusable_norms(nn.ModuleList([AlwaysGated(6)])) == []


def test_a_norm_follows_a_weight_that_is_replaced() -> None:
    model, hidden = nn.ModuleList([Root(6)]), torch.randn(3, 6)
    norms = fusable_norms(model)
    model[0].weight = nn.Parameter(torch.full((6,), 3.0), requires_grad=False)
    expected = model[0](hidden)
    with replaced_norms(norms):
        torch.testing.assert_close(model[0](hidden), expected)


def test_a_norm_that_was_given_another_forward_keeps_it() -> None:
    model, hidden = nn.ModuleList([Root(6)]), torch.randn(3, 6)
    norms = fusable_norms(model)
    model[0].forward = lambda hidden: hidden
    with replaced_norms(norms):
        assert torch.equal(model[0](hidden), hidden)
