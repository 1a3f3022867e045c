"""The baseline that edits nothing: the fact stands in front of every prompt, and the unedited model reads it.

It beats most editors on most benchmarks (arXiv:2502.11177 reports 60 against 24 on a sequence of zsRE edits), so its
figures belong beside those of an edited model. The text is that of in-context editing without demonstrations
(IKE, arXiv:2305.12740).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from editcli.models.tokens import Tokens
from editcli.requests.schema import EditRequest, Neighbor

TEXT = "New fact: {fact}\n"
"""Written before each prompt."""


def stated(request: EditRequest, tokens: Tokens) -> EditRequest:
    """Return ``request`` with its own fact written before each of its prompts, those of neighbours included."""
    fact = tokens.join(request.prompt, request.target_new, between=request.join)[0]
    prefix = TEXT.format(fact=fact if fact.endswith((".", "!", "?")) else f"{fact}.")

    def before(prompts: Iterable[Neighbor]) -> tuple[Neighbor, ...]:
        return tuple(replace(near, prompt=prefix + near.prompt) for near in prompts)

    return replace(
        request.in_context(prefix),
        paraphrase_prompts=tuple(prefix + prompt for prompt in request.paraphrase_prompts),
        generation_prompts=tuple(prefix + prompt for prompt in request.generation_prompts),
        neighborhood_prompts=before(request.neighborhood_prompts),
        locality=before(request.locality),
        portability=before(request.portability),
    )
