"""Attention sinks: where the first token of a text is no place for a fact.

Many models that put no start token in front of a text park their attention at its first token (Xiao et al., arXiv
2309.17453). There the keys of all tokens are about the same: in SmolLM2-135M, layers 4 to 8, two first tokens have keys
with a cosine of 0.9, the same tokens behind other text one of 0.2, and ||h|| is seven times as large. What is written
at such a key is written for every text, and no subject is recognised by it (Yang et al., arXiv 2406.11263, found that
such edits make ROME collapse a model).

So where the first token is a sink and the subject is that token, the bare text takes no part in the edit. Target value
and key are read behind the generated contexts alone, as Yang et al. do, and the first of them stands in for the bare
text. The fact is then written for running text: on SmolLM2-135M, 10 of 10 such facts are answered behind other words,
where reading the sink gave 7 and a spectral norm a third larger. At the very start of a text they may be
answered as before (2 of 10), because no key there says which subject it was. The token behind the subject says it too
weakly to be written at: 5 of 10 there, and 8 behind other words.

The sink may reach the next tokens too. In SmolLM2-135M four of 500 subjects that end at the second or third token of a
text have a hidden state three to six times as long as usual, which says nothing of what it takes to turn them into
another fact. A target value lies at most a share of ||h|| from h, so that one such edit made up two fifths of the
energy of its batch's update. So the usual length stands in for theirs (:func:`usual_length`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from editcli.editing.activations import Activations, Hook
from editcli.models.loading import LoadedModel
from editcli.models.tokens import Encoded, RowlessTokenError, Text, Tokens
from editcli.reporting import Silent

WORDS = ("The", "Because", "I", "You", "In", "We", "A", "When")
"""Words whose last tokens are compared as first tokens of a text and behind others."""
CONTEXT = "In short. "
"""The text before the words where they are not first."""
ALIKE = 0.25
"""A first token is a sink where keys of first tokens differ by less than this share of what they differ by elsewhere.

Measured on SmolLM2-135M: 0.6 in layer 0, where no sink has formed yet, and 0.01 to 0.25 in every later layer.
"""

OUTLIER = 2.0
"""A hidden state that is more than this many times as long as usual is one of an attention sink.

Subjects of 500 edits each, in usual lengths: at most 1.7 on the bundled model, SmolLM2-135M and a small GPT-2, and on
SmolLM2-135M four of 2.9, 3.5, 3.7 and 6.5. A length so close to the threshold that rounding decides counts as either.
"""


def first_is_sink(loaded: LoadedModel, layers: Sequence[int], *, batch_tokens: int) -> bool:
    """Tell whether the first token of a text is a sink at one of the edited ``layers``, ascending."""
    behind = [ids for word in WORDS if (ids := tuple(loaded.tokens.ids(CONTEXT + word, special=False)))]
    if len(behind) < 2:
        return False
    rows = [Encoded(ids, len(ids) - 1, range(0)) for text in behind for ids in (text[-1:], text)]
    hooks = [Hook(keys=layer) for layer in layers]
    read = Activations(loaded, batch_tokens=batch_tokens, reporter=Silent()).read(rows, layers[0], hooks)
    return any(spread(keys[0::2].T) < ALIKE * spread(keys[1::2].T) for keys in read)


def usual_length(loaded: LoadedModel, layer: int, *, batch_tokens: int) -> float:
    """Return ||h|| behind the block of ``layer`` at ordinary tokens: the median over words that are not first.

    Infinity, so that no length is an outlier, where the model can read none of the words, and behind an MLP's norm,
    where lengths are those of the MLP's output.
    """
    rows = list(_words(loaded.tokens)) if loaded.architecture.mlp_norm(layer) is None else []
    if not rows:
        return math.inf
    activations = Activations(loaded, batch_tokens=batch_tokens, reporter=Silent())
    (states,) = activations.read(rows, layer, [Hook(loaded.architecture.block(layer))])
    return float(states.norm(dim=1).median())


def without_outliers(length: Tensor, usual: float) -> Tensor:
    """Return lengths ||h|| (n,) with the ``usual`` one in place of those of an attention sink."""
    return torch.where(length > OUTLIER * usual, usual, length)


def _words(tokens: Tokens) -> Iterator[Encoded]:
    """Yield each of the words that the model can read, behind other text and cut after it, as an edit's subject is."""
    for word in WORDS:
        text = CONTEXT + word
        with suppress(RowlessTokenError):
            (encoded,) = tokens.encode([Text(text, (len(CONTEXT), len(text)), None)])
            if encoded.lookup >= 0:
                yield encoded.up_to_lookup()


def spread(keys: Tensor) -> float:
    """Return how much keys (d_in, n) differ: one less the mean cosine of two of them."""
    unit = keys.double() / keys.double().norm(dim=0).clamp_min(1e-30)
    count = unit.shape[1]
    return 1 - (float(unit.sum(dim=1).square().sum()) - count) / (count * (count - 1))


def begins(text: Encoded) -> bool:
    """Tell whether the subject of a text ends at its first token."""
    return text.lookup == 0
