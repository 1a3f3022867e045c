"""What optimising targets costs, edit by edit, so that a batch can be shared out evenly."""

from __future__ import annotations

from collections.abc import Sequence

from editcli.models.loading import LoadedModel
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions


def target_costs(
    loaded: LoadedModel, requests: Sequence[EditRequest], contexts: int, layer: int, options: TargetOptions
) -> list[int]:
    """Return about how many multiplications with weights the target value of each request takes.

    A request stands in ``contexts`` texts. Every step runs the tokens from the lookup token on through the blocks above
    ``layer``, and the head at the target's positions, forward and backward: twice the multiplications, since weights
    have no gradients. What precedes the lookup token runs once through all blocks. Every edit is taken to need all
    steps; what a batch shares between its edits is left out.
    """
    architecture = loaded.architecture
    block = sum(parameter.numel() for parameter in architecture.block(layer).parameters())
    head = sum(parameter.numel() for parameter in architecture.head.parameters())
    above = (architecture.layers - 1 - layer) * block
    tokens = loaded.tokens
    texts = tokens.encode([tokens.locate(request, request.target_new) for request in requests])
    resumes = options.cached and loaded.resumes
    behind = 0 if resumes else (contexts - 1) * options.prefix_tokens
    costs = []
    for text in texts:
        again = contexts * (len(text.ids) - 1 - (text.lookup if resumes else 0)) + behind
        # "{subject} is a" ends, as far as it is needed, with its lookup token.
        step = (again + 1) * above + (contexts * len(text.target) + 1) * head
        costs.append(2 * options.steps * step + contexts * text.lookup * architecture.layers * block)
    return costs
