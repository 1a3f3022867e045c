"""An accelerator pads texts to a few lengths: no figure and no text depends on that."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from editcli.evaluation.ability import general_drift
from editcli.evaluation.scoring import Probe, score
from editcli.evaluation.writing import write_freely
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.models.tokens import Encoded, Tokens
from editcli.settings.stopping import StopRules
from editcli.testing import tiny_model_folder

PROMPTS = ("The capital of France is", "Bob", "In Spain, Ann Smith wrote the")


@pytest.fixture(params=[True, False], ids=["cached", "uncached"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    model = open_model(resolve_model(tiny_model_folder(tmp_path / "model")))
    monkeypatch.setattr(LoadedModel, "supports_kv_cache", request.param)
    return model


def wider(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Tensor] = Tokens.pad

    def pad(self: Tokens, rows: Sequence[Encoded], device: torch.device | str) -> Tensor:
        ids = real(self, rows, device)
        return torch.cat([ids, ids[:, -1:].expand(-1, 3)], dim=1)

    monkeypatch.setattr(Tokens, "pad", pad)


def test_what_is_written_and_measured_is_the_same(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    probes = [Probe(prompt, "Rome") for prompt in PROMPTS]

    def everything() -> tuple[object, list[float], float]:
        texts = write_freely(loaded, PROMPTS, StopRules(most=6))
        likely = [one.logprob for one in score(loaded, probes)]
        return texts, likely, general_drift(loaded, loaded, ["Ann Smith is in London.", *PROMPTS]).perplexity

    texts, likely, perplexity = everything()
    wider(monkeypatch)
    others = everything()
    assert others[0] == texts
    assert others[1] == pytest.approx(likely, rel=1e-5)
    assert others[2] == pytest.approx(perplexity, rel=1e-5)
