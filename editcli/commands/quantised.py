"""``eval --as``: measure the edits on quantised copies of the model, beside the model itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from editcli.evaluation.metrics import Evaluation
from editcli.models.loading import LoadedModel
from editcli.models.quantisation import Quantisation
from editcli.models.quantised import QuantisedModel, quiet_kernels


@dataclass(frozen=True, slots=True)
class QuantisedEvaluation:
    """The metrics of a model that was quantised in memory."""

    name: str
    """The spelling of ``--as``."""
    library: str
    """The package that quantised, with its version."""
    tensors: Mapping[str, tuple[str, ...]]
    """The matrices by type; ``*`` in a name stands for every number."""
    evaluation: Evaluation

    def to_json(self) -> dict[str, Any]:
        """Return the metrics as a JSON object."""
        tensors = {type: list(names) for type, names in self.tensors.items()}
        return {"as": self.name, "library": self.library, "tensors": tensors, **self.evaluation.to_json()}


def measure_quantised(
    quantisations: Iterable[Quantisation],
    load: Callable[[Quantisation], QuantisedModel],
    measure: Callable[[LoadedModel], Evaluation],
) -> tuple[QuantisedEvaluation, ...]:
    """Return what ``measure`` says of each copy that ``load`` makes; one copy is in memory at a time."""
    return tuple(_measure(one, load(one), measure) for one in quantisations)


def _measure(
    quantisation: Quantisation, model: QuantisedModel, measure: Callable[[LoadedModel], Evaluation]
) -> QuantisedEvaluation:
    with quiet_kernels():
        evaluation = measure(model.loaded)
    return QuantisedEvaluation(quantisation.name, model.library, model.tensors, evaluation)
