"""Gradients of the targets' cross-entropy with respect to the outputs of the edited sites, in one pass.

For editors that optimise no target values (fine-tuning, UltraEdit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from editcli.models.forward import chunks, first, head_only_at, hooked, run
from editcli.models.forward import positions as index_pairs
from editcli.models.loading import LoadedModel
from editcli.models.sharded import whole_input
from editcli.models.tokens import Encoded
from editcli.plugin.interfaces import Gradients, Site, SiteGradients
from editcli.requests.schema import EditRequest


def measure(
    loaded: LoadedModel,
    sites: Sequence[Site],
    requests: Sequence[EditRequest],
    *,
    every_position: bool,
    ended: bool,
    trial: Mapping[Site, Tensor],
    batch_tokens: int,
) -> Gradients:
    """Return the gradients of the summed losses with respect to the sites' outputs; see ``Session.gradients``."""
    tokens = loaded.tokens
    texts = tokens.encode([tokens.locate(r, r.target_new) for r in requests])
    rows = [(tokens.ended(text) if ended else text).without_last() for text in texts]
    spans = [range(len(row.ids)) if every_position else row.predicting for row in rows]
    losses: dict[int, Tensor] = {}
    measured: dict[Site, dict[int, tuple[Tensor, Tensor]]] = {site: {} for site in sites}
    for group in chunks(rows, budget=batch_tokens):
        members = [rows[index] for index in group]
        loss, at_sites = one_pass(loaded, sites, members, trial)
        losses.update(zip(group, loss, strict=True))
        for site, (inputs, gradients) in at_sites.items():
            for row, edit in enumerate(group):
                span = list(spans[edit])
                measured[site][edit] = (inputs[row, span], gradients[row, span])
    return Gradients(
        loss=torch.stack([losses[edit] for edit in range(len(requests))]),
        sites={site: _columns(measured[site]) for site in sites},
    )


def _columns(rows: Mapping[int, tuple[Tensor, Tensor]]) -> SiteGradients:
    """Join the (positions, features) inputs and gradients of all edits as columns, in the order of the edits."""
    edits = sorted(rows)
    inputs = torch.cat([rows[edit][0] for edit in edits])
    owner = torch.cat([torch.full((len(rows[edit][0]),), edit) for edit in edits])
    gradients = torch.cat([rows[edit][1] for edit in edits])
    return SiteGradients(inputs=inputs.T, gradients=gradients.T, owner=owner.to(inputs.device))


def one_pass(
    loaded: LoadedModel, sites: Sequence[Site], texts: Sequence[Encoded], trial: Mapping[Site, Tensor]
) -> tuple[Tensor, dict[Site, tuple[Tensor, Tensor]]]:
    """Return each row's loss and, for every site, its (rows, length, features) inputs and gradients."""
    ids = loaded.tokens.pad(texts, loaded.input_device)
    inputs: dict[Site, Tensor] = {}
    outputs: dict[Site, Tensor] = {}

    def offset_at(site: Site) -> Any:
        def hook(module: Any, entered: Tensor, output: Any) -> Any:
            entered = whole_input(module, entered)
            inputs[site] = entered.detach().reshape(*ids.shape, -1).float()
            produced = first(output)
            if site in trial:
                weight = trial[site].to(entered)
                produced = torch.nn.functional.linear(entered, weight, module.bias)
            # An offset of zero is a leaf: its gradient is the gradient with respect to the output.
            offset = torch.zeros_like(produced, dtype=torch.float32, requires_grad=True)
            outputs[site] = offset
            return produced + offset.to(produced.dtype)

        return hooked(loaded.architecture.projection(site.layer), hook)

    pairs = [(row, column) for row, text in enumerate(texts) for column in text.predicting]
    head_rows, head_columns = index_pairs(pairs, ids.device)
    with torch.enable_grad(), ExitStack() as stack:
        for site in sites:
            stack.enter_context(offset_at(site))
        stack.enter_context(head_only_at(loaded.architecture.head, head_rows, head_columns))
        logits = run(loaded.model, ids).logits[0].float()
        target = torch.tensor([token for text in texts for token in text.target_ids], device=logits.device)
        weight = torch.tensor([1.0 / len(text.target) for text in texts for _ in text.target], device=logits.device)
        nll = (torch.logsumexp(logits, dim=1) - logits.gather(1, target[:, None]).squeeze(1)) * weight
        owner = torch.tensor([row for row, _ in pairs], device=logits.device)
        loss = torch.zeros(len(texts), device=logits.device).index_add(0, owner, nll)
        gradients = torch.autograd.grad(loss.sum(), [outputs[site] for site in sites])
    at_sites = {
        site: (inputs[site], gradient.reshape(*ids.shape, -1)) for site, gradient in zip(sites, gradients, strict=True)
    }
    return loss.detach(), at_sites
