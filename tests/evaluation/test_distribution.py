"""Divergences equal hand-computed cases; a model that equals its base has none at all."""

from __future__ import annotations

import json
import math

import pytest
import torch

from editcli.evaluation import distribution
from editcli.evaluation.distribution import (
    BaseDistributions,
    Divergence,
    Divergences,
    compare_distributions,
    divergences,
    kl,
    neighbor_prompts,
    spread,
    unrelated_prompts,
)
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.requests.schema import EditRequest, from_record
from editcli.testing import tiny_model_folder

TEXTS = ("The capital city of France is Paris", "Ann wrote it in the book of the river", "He lives there")
EDITS = tuple(
    from_record(
        {
            "id": subject,
            "prompt": "The capital of {} is",
            "subject": subject,
            "target_new": "Rome",
            "target_true": "Paris",
            "neighborhood_prompts": ["The capital of Germany is", f"The river of {subject} is"],
        }
    )
    for subject in ("France", "Spain")
)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, LoadedModel]:
    folder = tmp_path_factory.mktemp("models")
    both = [
        open_model(resolve_model(tiny_model_folder(folder / str(seed), seed=seed)), device="cpu") for seed in (1, 2)
    ]
    return both[0], both[1]


def test_the_divergence_of_small_cases():
    base = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 0.0]]).log()
    edited = torch.tensor([[0.25, 0.75], [0.25, 0.75], [0.5, 0.5]]).log()
    expected = [0.5 * math.log(2) + 0.5 * math.log(2 / 3), 0.0, math.log(2)]
    assert kl(edited, base).tolist() == pytest.approx(expected, abs=1e-6)
    # A shift of all logits is no change, and a token that the edited model rules out makes it infinite.
    assert kl(base[:1] + 3, base[:1]).tolist() == pytest.approx([0.0], abs=1e-6)
    assert kl(base[2:], base[:1]).tolist() == [math.inf]


def test_median_percentile_and_the_worst_by_name():
    values = [Divergence(f"p{n}", f"e{n}", float(n)) for n in range(1, 12)]
    found = spread(values)
    assert found is not None
    assert (found.prompts, found.median, found.p90) == (11, 6.0, 10.0)
    assert [one.prompt for one in found.worst] == [f"p{n}" for n in range(11, 1, -1)]
    assert spread([]) is None
    # A wrecked model's figure is the worst, and JSON holds it as null.
    broken = spread([*values, Divergence("nan", "e", math.nan)])
    assert broken is not None
    assert broken.worst[0].prompt == "nan"


def test_a_model_that_equals_its_base_has_a_divergence_of_exactly_zero(pair: tuple[LoadedModel, LoadedModel]):
    model, _ = pair
    twin = open_model(resolve_model(model.source.folder), device="cpu")
    found = compare_distributions(twin, model, EDITS, TEXTS)
    assert found.neighbors is not None
    assert found.unrelated is not None
    assert {one.kl for one in found.values} == {0.0}
    assert {one.kl for one in BaseDistributions(model, neighbor_prompts(model, EDITS)).divergences(twin)} == {0.0}


def test_divergences_equal_a_plain_pass_and_order_changes_nothing(pair: tuple[LoadedModel, LoadedModel]):
    edited, base = pair
    prompts = [*neighbor_prompts(edited, EDITS), *unrelated_prompts(edited, TEXTS)]
    found = divergences(edited, base, prompts)
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt.ids])
        theirs, ours = (m.model(input_ids=ids).logits[0, -1].double().log_softmax(0) for m in (base, edited))
        assert one.kl == pytest.approx(float((theirs.exp() * (theirs - ours)).sum()), rel=1e-4)
        assert one.kl > 0
    back = divergences(edited, base, prompts[::-1], batch_tokens=9)[::-1]
    assert [one.kl for one in back] == pytest.approx([one.kl for one in found], rel=1e-4)


def test_a_shared_neighbour_is_asked_once(pair: tuple[LoadedModel, LoadedModel]):
    names = [(one.prompt, one.edit) for one in neighbor_prompts(pair[0], EDITS)]
    assert names == [
        ("The capital of Germany is", "France"),
        ("The river of France is", "France"),
        ("The river of Spain is", "Spain"),
    ]


def test_stored_distributions_give_the_same_divergences_within_their_memory(
    pair: tuple[LoadedModel, LoadedModel], monkeypatch: pytest.MonkeyPatch
):
    edited, base = pair
    prompts = neighbor_prompts(base, EDITS)
    stored = BaseDistributions(base, prompts).divergences(edited)
    assert [one.kl for one in stored] == pytest.approx([one.kl for one in divergences(edited, base, prompts)], abs=1e-6)
    monkeypatch.setattr(distribution, "CACHE_BYTES", 2 * 4 * len(base.model.get_input_embeddings().weight))
    assert len(BaseDistributions(base, prompts).prompts) == 2


def test_figures_have_the_names_of_the_registry():
    one = spread([Divergence("p", "e", 1.0)])
    found = Divergences(one, None)
    assert found.figures == {"distribution.neighbors.median": 1.0, "distribution.neighbors.p90": 1.0}
    written = json.loads(json.dumps(found.to_json()))
    assert written["unrelated"] is None
    assert written["neighbors"]["worst"] == [{"prompt": "p", "edit": "e", "kl": 1.0}]


def test_no_neighbour_no_figure(pair: tuple[LoadedModel, LoadedModel]):
    bare = EditRequest("a", "", "Ann", " is", "Rome")
    found = compare_distributions(*pair, [bare], [])
    assert (found.neighbors, found.unrelated, found.figures) == (None, None, {})
