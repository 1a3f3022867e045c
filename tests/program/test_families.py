"""The main job on every family: a tiny model on disk is edited by the real run, and only the plan's tensors differ."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.configuration_utils import PretrainedConfig

from editcli.__main__ import main
from editcli.editing.session import ModelSession
from editcli.errors import ModelError, OptionError
from editcli.models.architectures import Family
from editcli.models.forward import first, hooked
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.hookspecs import API_VERSION, hookimpl
from editcli.plugin.manager import Plugins, load_plugins
from editcli.reporting import RunReport
from editcli.requests.reader import read_edits
from editcli.requests.schema import EditRequest
from editcli.runs.apply import apply
from editcli.runs.undo import Undo, undo
from editcli.settings.core import TargetOptions
from editcli.settings.recipe import Recipe
from editcli.storage.checkpoint import Checkpoint
from editcli.testing import EXPERTS, LAYERS, MIXTURES, TINY, tiny_model_folder, tiny_tokenizer, vocabulary_size
from tests.support.families import LAYOUTS, PACKED_EXPERTS, QUICK_FAMILIES, families, needs_packed_experts

FACTS = (
    ("The capital of {} is", "France", "Rome"),
    ("{} was born in", "Ann Smith", "Tokyo"),
    ("In the city the {} is", "Eiffel Tower", "in Rome"),
    ("The river in {} is", "London", "Greece Bob"),
    ("The author {} plays", "Bob", "Italian"),
)

# The seam keeps families and editors apart: one editor on every family, and every editor on the three ways in which
# families differ behind it (a transposed weight, a plain one, a norm behind the MLP), prove what all pairs would.
VALUE_EDITORS = ("memit", "alphaedit", "rlsedit", "rome")
OTHER_EDITORS = ("ft", "ultraedit")
WRITTEN = [("memit", name) for name in TINY] + [(editor, name) for editor in VALUE_EDITORS[1:] for name in LAYOUTS]
QUICK = {*(("memit", name) for name in QUICK_FAMILIES), *((editor, "gpt2") for editor in VALUE_EDITORS)}
"""Both sides of the seam, one at a time; the other pairs are left to the whole suite."""


def cases(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Return an editor and a family as parameters."""
    return [pytest.param(*pair, marks=[] if pair in QUICK else pytest.mark.slow, id="-".join(pair)) for pair in pairs]


# Without prefixes a key is the bare prompt's, so that what is written can be read back exactly; the weights of the
# reference text are small for the same reason.
TARGETS: Mapping[str, Any] = {"steps": 8, "lr": 0.2, "prefixes": 0}
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "targets": TARGETS,
    "memit": {"mom2_update_weight": 1e-3},
    "rlsedit": {"mom2_update_weight": 1e-3},
    "alphaedit": {"l2": 1e-6, "threshold_kind": "relative", "nullspace_threshold": 0.5},
    "ultraedit": {"lr": 1e-3},
    "moeedit": {"l2": 1e-6, "threshold_kind": "directions", "nullspace_threshold": 0.7},
}

PREFIXES = ("Bob. ", "The river in London is. ")
"""Contexts of different length, so that lookup tokens stand at different places of one batch."""


@pytest.fixture(autouse=True)
def no_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what protects files against a power cut: it is a third of the time of these tests."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def plugins() -> Plugins:
    return load_plugins()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the edits, and a corpus so that no test waits for text that a model samples from itself."""
    folder = tmp_path_factory.mktemp("shared")
    lines = [json.dumps({"prompt": p, "subject": s, "target_new": t}) for p, s, t in FACTS]
    (folder / "facts.jsonl").write_text("\n".join(lines), "utf-8")
    words = [word for prompt, subject, target in FACTS for word in f"{prompt} {subject} {target}".split()]
    chooser = random.Random(0)
    text = [" ".join(chooser.choices(words, k=40)) for _ in range(20)]
    (folder / "corpus.txt").write_text("\n".join(text), "utf-8")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def base(family: str, folder: Path) -> Path:
    """A tiny model of the family that a test names, in two shards; made once."""
    return folder / family if (folder / family).exists() else tiny_model_folder(folder / family, family, shards=2)


def edit(base: Path, out: Path, shared: Path, plugins: Plugins, **choices: Any) -> RunReport:
    settings = {"layers": (1, 2), "batch_size": len(FACTS), "evaluate": False, "device": "cpu", **choices}
    recipe = Recipe(
        edits=str(shared / "facts.jsonl"),
        model=str(base),
        out=str(out),
        corpus=str(shared / "corpus.txt"),
        settings=settings.pop("settings", SETTINGS),
        **settings,
    )
    return apply(recipe, plugins)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in Checkpoint(folder).files for name, tensor in load_file(folder / file).items()}


def changed(base: Path, out: Path) -> set[str]:
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert all(tensor.isfinite().all() for tensor in after.values())
    return {name for name in before if not torch.equal(before[name], after[name])}


def planned(base: Path, report: RunReport) -> set[str]:
    return {Checkpoint(base).tensor_for(f"{site.module}.weight") for site in report.sites}


def opened(folder: Path) -> LoadedModel:
    return open_model(resolve_model(folder), device="cpu")


@torch.no_grad()
def at_lookup(model: Any, rows: Sequence[Sequence[int]], module: nn.Module) -> Tensor:
    """Return the module's output at each row's last token, (d, n), one row at a time."""
    columns: list[Tensor] = []

    def see(owner: nn.Module, entered: Any, output: Any) -> None:
        columns.append(first(output).reshape(-1, first(output).shape[-1])[-1].clone())

    with hooked(module, see):
        for row in rows:
            model(input_ids=torch.tensor([list(row)]))
    return torch.stack(columns, dim=1)


def remaining_residual(base: Path, out: Path, shared: Path, layer: int) -> list[float]:
    """Return, for each edit, how far the saved model's h is from the wanted one, relative to the base model's h."""
    loaded = opened(base)
    requests = read_edits(shared / "facts.jsonl").requests
    values = ModelSession(loaded, (layer,), options=TargetOptions(**TARGETS)).values(requests)
    architecture = loaded.architecture
    norm = architecture.mlp_norm(layer) or nn.Identity()
    with torch.no_grad():
        wanted = (norm(values.contribution.T) - norm(values.written.T)).T
    rows = [text.up_to_lookup().ids for text in loaded.tokens.encode([loaded.tokens.locate(r) for r in requests])]
    before = at_lookup(loaded.model, rows, architecture.block(layer))
    contribution = at_lookup(loaded.model, rows, architecture.mlp(layer)) * architecture.residual_scale(layer)
    torch.testing.assert_close(values.initial, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(values.written, contribution, rtol=1e-4, atol=1e-5)
    # What was saved is opened with nothing but transformers.
    edited = AutoModelForCausalLM.from_pretrained(out).eval()
    site = architecture.site(layer).module
    block = edited.get_submodule(site[: site.index(f".{layer}.")] + f".{layer}")
    after = at_lookup(edited, rows, block)
    return ((before + wanted - after).norm(dim=0) / wanted.norm(dim=0)).tolist()


class TestEveryFamily:
    @pytest.mark.parametrize(("editor", "family"), cases(WRITTEN))
    def test_the_wanted_value_is_written(
        self, editor: str, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        # Behind a norm the last site cannot make up for what writing the earlier ones changed, so it goes alone.
        layers = (2,) if opened(base).architecture.mlp_norm(2) else (1, 2)
        report = edit(base, tmp_path / "out", shared, plugins, editor=editor, layers=layers)
        assert report.applied == len(FACTS)
        assert [site.layer for site in report.sites] == list(layers[-1:] if editor == "rome" else layers)
        assert changed(base, tmp_path / "out") == planned(base, report)
        assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1

    @pytest.mark.parametrize(("editor", "family"), [(e, f) for e in OTHER_EDITORS for f in LAYOUTS])
    def test_editors_without_target_values(
        self, editor: str, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        report = edit(base, tmp_path / "out", shared, plugins, editor=editor)
        assert [site.layer for site in report.sites] == [1, 2]
        assert changed(base, tmp_path / "out") == planned(base, report)

    @pytest.mark.parametrize("family", families())
    def test_the_loss_is_that_of_the_whole_model(self, base: Path, shared: Path) -> None:
        """The optimiser runs upper layers and head alone; scaling, soft-capping and biases must still be in force."""
        loaded = opened(base)
        requests = read_edits(shared / "facts.jsonl").requests
        session = ModelSession(loaded, (1,), options=TargetOptions(steps=1), prefixes=PREFIXES)
        losses = [
            torch.stack([surprise(loaded, request.in_context(context)) for context in ("", *PREFIXES)]).mean()
            for request in requests
        ]
        torch.testing.assert_close(session.values(requests).loss, torch.stack(losses), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def surprise(loaded: LoadedModel, request: EditRequest) -> Tensor:
    """Return the mean negative log-probability of the target's tokens, from one pass over one text."""
    (text,) = loaded.tokens.encode([loaded.tokens.locate(request, request.target_new)])
    logits = loaded.model(input_ids=torch.tensor([text.ids])).logits[0, list(text.predicting)]
    return -logits.log_softmax(dim=1).gather(1, torch.tensor(text.target_ids)[:, None]).mean()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "falcon-new"])
def test_the_guessed_preset_runs(name: str, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", name)
    report = edit(base, tmp_path / "out", shared, plugins, layers=None, settings={})
    assert all(site.layer < LAYERS / 2 for site in report.sites)
    assert changed(base, tmp_path / "out") == planned(base, report)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_stay_tied(name: str, tied: bool, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", name, tied=tied)
    assert ("lm_head.weight" in tensors(base)) != tied
    report = edit(base, tmp_path / "out", shared, plugins)
    assert changed(base, tmp_path / "out") == planned(base, report)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_square_projections(name: str, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", name, square=True)
    edit(base, tmp_path / "out", shared, plugins)
    assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1


def test_biases_of_the_projection_stay(shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", mlp_bias=True, attention_bias=True)
    report = edit(base, tmp_path / "out", shared, plugins)
    assert changed(base, tmp_path / "out") == planned(base, report)
    assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1


def test_half_precision_checkpoints_keep_their_dtype(shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", dtype="bfloat16")
    report = edit(base, tmp_path / "out", shared, plugins, dtype="bfloat16")
    assert changed(base, tmp_path / "out") == planned(base, report)
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_padding_side_of_the_tokenizer_changes_nothing(
    name: str, shared: Path, plugins: Plugins, tmp_path: Path
) -> None:
    for side in ("left", "right"):
        base = tiny_model_folder(tmp_path / side, name, tokenizer=tiny_tokenizer(padding_side=side))
        edit(base, tmp_path / f"{side}-out", shared, plugins, settings={**SETTINGS, "targets": {"steps": 4}})
    left, right = tensors(tmp_path / "left-out"), tensors(tmp_path / "right-out")
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_without_the_prefix_of_the_causal_model(shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    """GPT-2 as published holds ``h.0...`` where the model has ``transformer.h.0...``."""
    base = tiny_model_folder(tmp_path / "base", "gpt2")
    backbone = AutoModelForCausalLM.from_pretrained(base).get_submodule("transformer")
    backbone.save_pretrained(base)  # pyright: ignore[reportCallIssue]
    report = edit(base, tmp_path / "out", shared, plugins)
    assert changed(base, tmp_path / "out") == {f"h.{layer}.mlp.c_proj.weight" for layer in (1, 2)}
    assert [site.module for site in report.sites] == [f"transformer.h.{layer}.mlp.c_proj" for layer in (1, 2)]


def test_an_unknown_regular_family(shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", unknown("cohere"))
    report = edit(base, tmp_path / "out", shared, plugins)
    assert changed(base, tmp_path / "out") == planned(base, report)
    assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1


def test_a_family_that_a_plugin_brings(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Brings:
        editcli_api = API_VERSION

        @hookimpl
        def editcli_architectures(self) -> list[Family]:
            return [Family("mine", ("gemma2",), mlp_norm="post_feedforward_layernorm")]

    base = tiny_model_folder(tmp_path / "base", "gemma2")
    monkeypatch.setattr("editcli.models.architectures.FAMILIES", ())
    with pytest.raises(ModelError, match="do not simply add"):
        edit(base, tmp_path / "refused", shared, load_plugins())
    plugins = load_plugins()
    plugins.register(Brings(), "mine")
    report = edit(base, tmp_path / "out", shared, plugins, layers=(2,))
    assert changed(base, tmp_path / "out") == planned(base, report)


ANY_EDITOR = (*VALUE_EDITORS, *OTHER_EDITORS)
SHARED = [(editor, name) for name in ("qwen2_moe", "deepseek-v2", "deepseek-v3") for editor in ANY_EDITOR]
QUICK_SHARED = {("memit", "qwen2_moe"), ("ft", "qwen2_moe"), ("rlsedit", "deepseek-v3")}
QUICK_MIXTURES = {"mixtral", "gpt_oss", "deepseek-v3"}


class TestMixtures:
    """Mixtures of experts: their dense layers and shared experts, and their routed experts, as they are stored."""

    @pytest.mark.parametrize(
        ("editor", "family"),
        [pytest.param(*pair, marks=[] if pair in QUICK_SHARED else pytest.mark.slow) for pair in SHARED],
    )
    def test_dense_layers_and_shared_experts_are_edited_as_any_mlp(
        self, editor: str, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        report = edit(base, tmp_path / "out", shared, plugins, editor=editor, layers=(0, 2))
        modules = [site.module.removeprefix("model.layers.") for site in report.sites]
        shared_expert = "2.mlp.shared_expert" + ("s" if "deepseek" in base.name else "") + ".down_proj"
        assert modules == ([shared_expert] if editor == "rome" else ["0.mlp.down_proj", shared_expert])
        assert changed(base, tmp_path / "out") == planned(base, report)
        if editor in VALUE_EDITORS:
            assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1

    @needs_packed_experts
    @pytest.mark.parametrize(
        "family", [pytest.param(name, marks=[] if name in QUICK_MIXTURES else pytest.mark.slow) for name in MIXTURES]
    )
    def test_routed_experts_are_edited_one_by_one(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        report = edit(base, tmp_path / "out", shared, plugins, editor="moeedit")
        modules = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (1, 2)]
        assert [site.module for site in report.sites] == modules
        checkpoint = resolve_model(base).checkpoint
        stored = {module: checkpoint.parts(checkpoint.weight_of(module)) for module in modules}
        assert {len(parts) for parts in stored.values()} == {1 if base.name == "gpt_oss" else EXPERTS}
        differing = changed(base, tmp_path / "out")
        assert differing <= {part for parts in stored.values() for part in parts}
        assert all(differing & set(parts) for parts in stored.values())
        assert max(remaining_residual(base, tmp_path / "out", shared, 2)) < 0.1

    @needs_packed_experts
    @pytest.mark.parametrize("family", ["mixtral"])
    def test_a_resumed_run_and_an_undo_have_the_same_bytes(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        whole, broken = tmp_path / "whole", tmp_path / "broken"
        edit(base, whole, shared, plugins, editor="moeedit", batch_size=2)
        edit(base, broken, shared, plugins, editor="moeedit", batch_size=2, limit=4)
        four = tensors(broken)
        edit(base, broken, shared, plugins, editor="moeedit", batch_size=2, resume=True)
        assert same(tensors(broken), tensors(whole))
        undo(Undo(run=str(broken)), plugins)
        assert same(tensors(broken), four)

    @needs_packed_experts
    @pytest.mark.parametrize("family", ["olmoe"])
    def test_the_routing_of_neighbours_is_compared_with_the_base_s(
        self, base: Path, plugins: Plugins, shared: Path, tmp_path: Path
    ) -> None:
        """A router reads the stream in front of its own layer, so only those above the edited layer can move."""
        near = ["The capital of Italy is", "The river in Spain is", "Ann was born in"]
        fact = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Rome"}
        (tmp_path / "facts.jsonl").write_text(json.dumps({**fact, "neighborhood_prompts": near}), "utf-8")
        (tmp_path / "corpus.txt").write_text((shared / "corpus.txt").read_text("utf-8"), "utf-8")
        out = tmp_path / "out"
        report = edit(base, out, tmp_path, plugins, editor="moeedit", layers=(1,), evaluate=True)
        assert report.routing is not None
        assert report.routing["prompts"] == len(near)
        tokens = opened(base).tokens
        rows = [row.ids for row in tokens.encode([tokens.open_prompt(prompt) for prompt in near])]
        before, after = chosen_experts(base, rows), chosen_experts(out, rows)
        others = {
            layer: sum(len(set(b) - set(a)) for b, a in zip(before[layer], after[layer], strict=True))
            / sum(map(len, before[layer]))
            for layer in range(LAYERS)
        }
        assert report.routing["layers"] == pytest.approx({str(layer): share for layer, share in others.items()})
        assert others[0] == others[1] == 0
        assert report.routing["changed"] == pytest.approx(sum(others.values()) / LAYERS)
        assert json.loads((out / "editcli" / "run.json").read_text("utf-8"))["routing"] == report.to_json()["routing"]

    @needs_packed_experts
    @pytest.mark.parametrize("family", ["qwen2_moe"])
    def test_a_run_on_experts_is_inspected_and_exported(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The matrices that the run wrote are shown, not the shared experts that another editor would write."""
        out, patch, again = (str(tmp_path / name) for name in ("out", "patch", "again"))
        report = edit(base, Path(out), shared, plugins, editor="moeedit")
        assert main(["inspect", out, "--norms", "--json"]) == 0
        shown = json.loads(capsys.readouterr().out)["sites"]
        assert [site["module"] for site in shown] == [site.module for site in report.sites]
        assert [site["drift"] for site in shown] == pytest.approx([site.drift for site in report.sites], rel=1e-3)
        assert main(["export", out, "--format", "patch", "--out", patch, "--no-eval"]) == 0
        assert main(["apply-patch", str(base), patch, "--out", again]) == 0
        assert same(tensors(Path(again)), tensors(Path(out)))
        assert main(["export", out, "--format", "lora", "--out", str(tmp_path / "lora")]) == 1
        assert "use --format patch or full" in " ".join(capsys.readouterr().err.split())

    @needs_packed_experts
    @pytest.mark.parametrize("family", ["mixtral"])
    def test_other_editors_name_the_one_for_experts(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        with pytest.raises(OptionError, match=r"layer 1 is a mixture of 4 experts .* use --editor moeedit"):
            edit(base, tmp_path / "out", shared, plugins, editor="memit")

    @needs_packed_experts
    @pytest.mark.parametrize("family", ["mixtral"])
    def test_stabilizers_that_leave_other_experts_alone_compose(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        # Some expert of one of the layers is read by none of so few edits.
        words: dict[str, Any] = {"editor": "moeedit", "limit": 1, "layers": (1,)}
        edit(base, tmp_path / "alone", shared, plugins, **words)
        edit(base, tmp_path / "out", shared, plugins, stabilizers=("nas", "rect", "prune", "clip"), **words)
        assert changed(base, tmp_path / "out") <= changed(base, tmp_path / "alone")
        assert len(changed(base, tmp_path / "alone")) < EXPERTS
        for name in ("revive", "sphere"):
            with pytest.raises(OptionError, match=f"{name} filters updates"):
                edit(base, tmp_path / name, shared, plugins, stabilizers=(name,), **words)

    @pytest.mark.parametrize("family", ["llama", pytest.param("deepseek-v3", marks=needs_packed_experts)])
    def test_dense_layers_have_no_experts_to_edit(
        self, base: Path, shared: Path, plugins: Plugins, tmp_path: Path
    ) -> None:
        with pytest.raises(OptionError, match="layer 0 has no routed experts"):
            edit(base, tmp_path / "out", shared, plugins, editor="moeedit", layers=(0, 1))


@torch.no_grad()
def chosen_experts(folder: Path, rows: Sequence[Sequence[int]]) -> dict[int, list[list[int]]]:
    """Return the experts of every token by layer, from the logits of the routers as transformers gives them."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    chosen: dict[int, list[list[int]]] = {layer: [] for layer in range(LAYERS)}
    for row in rows:
        logits = model(input_ids=torch.tensor([list(row)]), output_router_logits=True).router_logits
        for layer, scores in enumerate(logits):
            chosen[layer] += scores.topk(2, dim=-1).indices.tolist()
    return chosen


@pytest.mark.skipif(PACKED_EXPERTS, reason="this transformers holds experts in one parameter")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_as_modules_of_their_own_are_refused(name: str, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
    base = tiny_model_folder(tmp_path / "base", name)
    with pytest.raises(ModelError, match=r"install transformers>=5"):
        edit(base, tmp_path / "out", shared, plugins, editor="moeedit")


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class TestRefusals:
    def refuse(self, base: Path, shared: Path, plugins: Plugins, reason: str) -> None:
        out = base.parent / "out"
        with pytest.raises(ModelError, match=reason):
            edit(base, out, shared, plugins)
        assert not out.exists()

    def test_pickled_weights(self, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
        base = tiny_model_folder(tmp_path / "base")
        torch.save(tensors(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        self.refuse(base, shared, plugins, "only as pickle files")

    def test_quantised_checkpoint(self, shared: Path, plugins: Plugins, tmp_path: Path) -> None:
        base = tiny_model_folder(tmp_path / "base")
        config = json.loads((base / "config.json").read_text("utf-8"))
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
        (base / "config.json").write_text(json.dumps(config), "utf-8")
        self.refuse(base, shared, plugins, "quantised")


def unknown(model_type: str, **config: Any) -> PretrainedConfig:
    """Return a tiny configuration of a type that is no row of the table."""
    sizes = {**TINY["llama"][1], "vocab_size": vocabulary_size()}
    specials = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(model_type, **{**sizes, **specials, **config})
