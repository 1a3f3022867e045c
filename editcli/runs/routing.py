"""How far edits moved the routers of a mixture of experts, on the neighbours of the edits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from editcli.editing.session import ModelSession
from editcli.evaluation.distribution import neighbor_prompts
from editcli.evaluation.routing import changed_share, routes
from editcli.requests.schema import EditRequest

PROMPTS = 200
"""Neighbours that are looked at."""


def routing_drift(session: ModelSession, requests: Sequence[EditRequest]) -> dict[str, Any] | None:
    """Return the share of the routers' choices on tokens of neighbours that are others than the unedited model's.

    None for a model without experts and for edits without neighbours. The model is as before afterwards.
    """
    loaded = session.loaded
    rows = [prompt.ids for prompt in neighbor_prompts(loaded, requests)[:PROMPTS]]
    after = routes(loaded, rows)
    if not after:
        return None
    edited = session.masters()
    try:
        session.restore({site: session.baseline(site) for site in session.sites})
        before = routes(loaded, rows)
    finally:
        session.restore(edited)
    shares = {str(layer): changed_share(before[layer], after[layer]) for layer in after}
    return {"prompts": len(rows), "changed": sum(shares.values()) / len(shares), "layers": shares}
