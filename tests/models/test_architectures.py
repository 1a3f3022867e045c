"""Architectures: the right modules for every family, proven by what an offset does; clear refusals for the rest."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from editcli.errors import ModelError
from editcli.models.architectures import FAMILIES, Architecture, Family, resolve, skeleton
from editcli.models.experts import refuse_unpacked
from editcli.testing import HIDDEN, INTERMEDIATE, LAYERS, MIXTURES, TINY, tiny_config, tiny_model, vocabulary_size

POST_NORM = {"gemma2", "gemma3", "olmo2", "exaone4", "glm4"}
PARALLEL = {"gptj", "gpt_neox", "phi", "stablelm-parallel", "falcon-parallel", "falcon-new"}
TOKEN = 3


@functools.cache
def shared_model(name: str) -> PreTrainedModel:
    """Return one model for all tests that only look at it."""
    return tiny_model(name)


def tensor_of(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def replaced_outputs(module: nn.Module, change: Any) -> Iterator[None]:
    """Pass the module's output, as (length, d), through ``change``."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        values = tensor_of(output).clone()
        change(values.view(-1, values.shape[-1]))
        return (values, *output[1:]) if isinstance(output, tuple) else values

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def run(model: PreTrainedModel, *modules: nn.Module) -> list[Tensor]:
    """Return the outputs (length, d) of ``modules`` on one text."""
    seen: dict[nn.Module, Tensor] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = tensor_of(output).detach().clone().flatten(0, -2)

    handles = [module.register_forward_hook(record) for module in modules]
    model(input_ids=torch.tensor([[5, 11, 300, 40, 7]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return [seen[module] for module in modules]


@pytest.fixture(scope="module", params=TINY)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    return resolve(shared_model(request.param))


@pytest.mark.parametrize("name", TINY)
def test_every_tiny_family_has_a_row(name: str) -> None:
    assert resolve(shared_model(name)).family in FAMILIES


def test_every_row_has_a_tiny_family() -> None:
    assert {family.name for family in FAMILIES} == {name.partition("-")[0] for name in (*TINY, *MIXTURES)}


def test_parts(architecture: Architecture) -> None:
    model = architecture.model
    assert architecture.layers == LAYERS
    assert architecture.head is model.get_output_embeddings()
    assert architecture.shape(1) == (HIDDEN, INTERMEDIATE)
    assert all(parameter.ndim == 1 for parameter in architecture.final_norm.parameters())
    site = architecture.site(2)
    assert site.layer == 2
    assert model.get_submodule(site.module) is architecture.projection(2)
    assert site.transposed == (model.config.model_type == "gpt2")


def test_final_norm_feeds_the_head(architecture: Architecture) -> None:
    inputs: list[Tensor] = []
    handle = architecture.head.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    (normed,) = run(architecture.model, architecture.final_norm)
    handle.remove()
    assert torch.equal(inputs[0].flatten(0, -2), normed)


@pytest.mark.parametrize("layer", [0, LAYERS - 1])
def test_an_offset_on_the_projection_arrives_in_the_stream(architecture: Architecture, layer: int) -> None:
    """h = rest + residual_scale * mlp_norm(m), at one token, whatever the order of attention and MLP."""
    model, block, mlp = architecture.model, architecture.block(layer), architecture.mlp(layer)
    offset = torch.linspace(-0.5, 0.5, HIDDEN)
    before, contribution = run(model, block, mlp)

    def shift(values: Tensor) -> None:
        values[TOKEN] += offset

    with replaced_outputs(architecture.projection(layer), shift):
        after, shifted = run(model, block, mlp)
    torch.testing.assert_close(shifted[TOKEN] - contribution[TOKEN], offset)
    norm = architecture.mlp_norm(layer) or nn.Identity()
    with torch.no_grad():
        expected = norm(shifted[TOKEN]) - norm(contribution[TOKEN])
    torch.testing.assert_close(
        after[TOKEN] - before[TOKEN], architecture.residual_scale(layer) * expected, atol=1e-5, rtol=1e-4
    )
    assert torch.equal(before[:TOKEN], after[:TOKEN])
    assert torch.equal(before[TOKEN + 1 :], after[TOKEN + 1 :])


@pytest.mark.parametrize("name", TINY)
def test_norms_scales_and_parallel_blocks(name: str) -> None:
    found = resolve(shared_model(name))
    assert (found.mlp_norm(0) is not None) == (name in POST_NORM)
    assert found.residual_scale(0) == (0.5 if name == "granite" else 1.0)
    assert found.parallel == (name in PARALLEL)


@pytest.mark.parametrize("name", TINY)
def test_skeleton_has_the_same_sites_and_no_memory(name: str) -> None:
    model = skeleton(tiny_config(name))
    assert all(parameter.is_meta for parameter in model.parameters())
    bare, loaded = resolve(model), resolve(shared_model(name))
    for layer in range(LAYERS):
        assert bare.site(layer) == loaded.site(layer)
        assert bare.shape(layer) == loaded.shape(layer)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_orientation_of_a_square_projection_is_decided_by_type(name: str) -> None:
    found = resolve(tiny_model(name, square=True))
    assert found.shape(0) == (HIDDEN, HIDDEN)
    assert found.site(0).transposed == (name == "gpt2")


@pytest.mark.parametrize("layer", [-1, LAYERS])
def test_a_layer_that_does_not_exist_is_named(layer: int) -> None:
    with pytest.raises(ModelError, match=rf"layer {layer} does not exist: the model has layers 0-{LAYERS - 1}"):
        resolve(tiny_model()).site(layer)


def test_registered_families_come_first() -> None:
    mine = Family("mine", ("llama",), mlp="mlp.down_proj")
    assert resolve(tiny_model(), [mine]).family is mine


def test_a_family_with_wrong_paths_is_an_error_that_names_it() -> None:
    with pytest.raises(ModelError, match=r"'mine' does not fit this LlamaForCausalLM: .*feed_forward"):
        resolve(tiny_model(), [Family("mine", ("llama",), mlp="feed_forward")])


class TestUnknownFamilies:
    @pytest.mark.parametrize("name", [name for name in TINY if name not in {*POST_NORM, "granite"}])
    def test_discovery_agrees_with_the_table(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = shared_model(name)
        known = resolve(model)
        monkeypatch.setattr("editcli.models.architectures.FAMILIES", ())
        found = resolve(model)
        assert found.mlp(1) is known.mlp(1)
        assert found.final_norm is known.final_norm
        assert [found.site(layer) for layer in range(LAYERS)] == [known.site(layer) for layer in range(LAYERS)]

    @pytest.mark.parametrize("name", ["gemma2", "olmo2", "granite"])
    def test_what_is_not_a_plain_sum_is_refused(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = shared_model(name)
        monkeypatch.setattr("editcli.models.architectures.FAMILIES", ())
        with pytest.raises(ModelError, match="do not simply add their MLP's output"):
            resolve(model)

    def test_wide_attention_is_not_taken_for_the_mlp(self) -> None:
        """As many heads times their width as make attention look like an MLP with a gate."""
        model = tiny("cohere", head_dim=8, intermediate_size=48)
        assert resolve(model).site(0).module == "model.layers.0.mlp.down_proj"

    def test_a_norm_without_weights_is_found(self) -> None:
        found = resolve(tiny("olmo"))
        assert found.final_norm is found.model.get_submodule("model.norm")

    def test_a_model_that_cannot_run_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny("cohere", head_dim=8)

        def refuse(**inputs: Any) -> None:
            raise ValueError("You have to specify pixel_values")

        monkeypatch.setattr(model, "forward", refuse)
        with pytest.raises(ModelError, match="could not be run on plain text: You have to specify pixel_values"):
            resolve(model)

    def test_layers_without_an_mlp_are_refused(self) -> None:
        with pytest.raises(ModelError, match="no MLP could be recognised"):
            resolve(tiny("mamba", state_size=4))


def tiny(model_type: str, **config: Any) -> PreTrainedModel:
    sizes = {
        "vocab_size": vocabulary_size(),
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return tiny_model(AutoConfig.for_model(model_type, **{**sizes, **config}))


class TestRefusals:
    def test_a_mixture_of_experts_of_no_known_family(self) -> None:
        with pytest.raises(ModelError, match="mixture of experts of no family"):
            resolve(tiny("phimoe", num_local_experts=4))

    def test_experts_that_are_not_held_in_one_parameter(self) -> None:
        with pytest.raises(ModelError, match=r"layers\.1\.mlp\.experts in one parameter.*transformers>=5"):
            refuse_unpacked(nn.ModuleList([nn.Linear(2, 2)]), "layers.1.mlp.experts")

    def test_stacked_experts_are_not_taken_for_an_mlp(self) -> None:
        """A configuration may call its experts anything; their weights still show what they are."""
        model = tiny("phimoe", num_local_experts=4)
        model.config.num_local_experts = model.config.num_experts_per_tok = 0
        with pytest.raises(ModelError, match="no MLP could be recognised"):
            resolve(model)

    def test_encoder_decoder(self) -> None:
        with pytest.raises(ModelError, match="an encoder and a decoder"):
            skeleton(AutoConfig.for_model("t5"))

    def test_quantised_configuration(self) -> None:
        model = tiny_model(quantization_config={"quant_method": "gptq", "bits": 4})
        with pytest.raises(ModelError, match="quantised"):
            resolve(model)

    def test_quantised_weights(self) -> None:
        model = tiny_model()
        model.get_submodule("model.layers.1.mlp.down_proj").weight.data = torch.zeros(HIDDEN, INTERMEDIATE).to(
            torch.float8_e4m3fn
        )
        with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.down_proj holds torch\.float8_e4m3fn"):
            resolve(model)

    def test_multimodal(self) -> None:
        with pytest.raises(ModelError, match="multimodal"):
            skeleton(AutoConfig.for_model("clip"))

    def test_not_a_causal_language_model(self) -> None:
        with pytest.raises(ModelError, match=r"no causal language model can be built .* 'vit'"):
            skeleton(AutoConfig.for_model("vit"))

    def test_norm_after_the_sum(self) -> None:
        with pytest.raises(ModelError, match="normalises the residual stream after"):
            resolve(tiny_model("opt", do_layer_norm_before=False))

    def test_projection_of_an_unknown_type(self) -> None:
        class Custom(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.zeros(HIDDEN, INTERMEDIATE))

        model = tiny_model()
        model.get_submodule("model.layers.0.mlp").down_proj = Custom()
        with pytest.raises(ModelError, match="is a Custom; only Linear and Conv1D"):
            resolve(model)


def test_a_config_that_the_models_class_asserts_against_is_one_sentence() -> None:
    config = tiny_config("llama")
    config.pad_token_id = config.vocab_size + 5
    with pytest.raises(ModelError, match="no causal language model can be built"):
        skeleton(config)
