"""What an edit's target costs, against counting the multiplications of the passes that are really made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from editcli.editing.targets import optimise, target_costs
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.reporting import Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions
from editcli.testing import tiny_model_folder

PREFIXES = ("The river is long. ", "Bob was born. ")
LAYER = 1
EDITS = [
    EditRequest("short", "", "Rome", " is", "Paris"),
    EditRequest(
        "long behind", "", "Rome", " is the capital of the country in which the people like the river and", "Paris"
    ),
    EditRequest(
        "long in front", "The capital of the country in which the people like the river and ", "Rome", " is", "Paris"
    ),
    EditRequest("long target", "", "Rome", " is", "the capital of the country in which the people like the river"),
]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder: Path = tiny_model_folder(tmp_path_factory.mktemp("effort") / "model", "llama")
    return open_model(resolve_model(folder), device="cpu")


def counted(loaded: LoadedModel, edit: EditRequest, options: TargetOptions) -> int:
    """Return the multiplications with weights of optimising one edit: twice where gradients flow back."""
    total = 0

    def count(module: nn.Linear, entered: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        rows = output.numel() // output.shape[-1]
        total += (2 if output.requires_grad else 1) * rows * module.weight.numel()

    hooks = [module.register_forward_hook(count) for module in loaded.model.modules() if isinstance(module, nn.Linear)]
    try:
        optimise(loaded, [edit], PREFIXES, LAYER, options, Silent())
    finally:
        for hook in hooks:
            hook.remove()
    return total


@pytest.mark.slow
@pytest.mark.parametrize("cached", [True, False])
def test_costs_are_in_proportion_to_what_is_computed(loaded: LoadedModel, cached: bool) -> None:
    options = TargetOptions(steps=25, stop_loss=0.0, cached=cached)
    costs = target_costs(loaded, EDITS, len(PREFIXES) + 1, LAYER, options)
    found = [counted(loaded, edit, options) for edit in EDITS]
    shares = [cost / count for cost, count in zip(costs, found, strict=True)]
    assert max(found) > 4 * min(found), "the edits differ"
    assert max(shares) < 1.7 * min(shares)
