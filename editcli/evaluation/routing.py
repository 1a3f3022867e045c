"""Which experts read a text: the choices of the routers of a mixture, before and after its edits.

No router is edited, but one chooses by the stream that it reads, and the stream is moved by edits of lower layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from editcli.models.forward import chunks, hooked_call, run
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded

BATCH_TOKENS = 1024


@torch.no_grad()
def routes(loaded: LoadedModel, rows: Sequence[Sequence[int]]) -> Mapping[int, Tensor]:
    """Return the experts that read each token of texts, by layer: (tokens, k) indices, ascending in each row.

    ``rows`` are token ids. Empty for a model without mixtures that transformers keeps in one module for all experts.
    """
    architecture = loaded.architecture
    packed = {layer: architecture.packed_experts(layer) for layer in range(architecture.layers)}
    modules = {layer: module for layer, module in packed.items() if module is not None}
    seen: dict[int, list[Tensor]] = {layer: [] for layer in modules}
    encoded = [Encoded(tuple(row), -1, range(0)) for row in rows]
    for group in chunks(encoded, budget=BATCH_TOKENS) if modules else ():
        texts = [encoded[index] for index in group]
        ids = loaded.tokens.pad(texts, loaded.input_device)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(texts):
            real[row, : len(text.ids)] = True
        with ExitStack() as stack:
            for layer, module in modules.items():

                def record(owner: Any, args: tuple[Any, ...], layer: int = layer, real: Tensor = real) -> None:
                    seen[layer].append(args[1].cpu()[real.flatten()].sort(dim=1).values)

                stack.enter_context(hooked_call(module, record))
            run(loaded.model, ids)
    return {layer: torch.cat(parts) for layer, parts in seen.items() if parts}


def changed_share(before: Tensor, after: Tensor) -> float:
    """Return the share of choices that are others afterwards; (tokens, k) indices each."""
    stayed = (before[:, :, None] == after[:, None, :]).any(dim=2)
    return 1 - float(stayed.double().mean())
