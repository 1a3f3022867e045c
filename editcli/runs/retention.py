"""What is followed along a stream: the same fixed sample of its edits, every time it is asked."""

from __future__ import annotations

import random
from collections.abc import Sequence

from editcli.requests.schema import EditRequest

SAMPLED_EDITS = 200
"""Edits in the sample: enough for a share to be known to a few percent, few enough to ask often."""

METRICS = (
    "efficacy_accuracy",
    "efficacy_success",
    "generalization_accuracy",
    "generalization_success",
    "specificity_accuracy",
    "specificity_success",
)


def retention_sample(requests: Sequence[EditRequest], seed: int) -> frozenset[str]:
    """Return the ids of the edits whose retention is followed."""
    ids = [request.id for request in requests]
    return frozenset(random.Random(seed).sample(ids, min(SAMPLED_EDITS, len(ids))))


def sampled(applied: Sequence[EditRequest], planned: Sequence[EditRequest], seed: int) -> list[EditRequest]:
    """Return those of the ``applied`` edits that are in the sample of the ``planned`` ones.

    A resumed stream may have been given another file since: edits that it does not name are always in.
    """
    chosen, known = retention_sample(planned, seed), {request.id for request in planned}
    return [request for request in applied if request.id in chosen or request.id not in known]
