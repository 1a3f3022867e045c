"""Write the model card of the bundled model."""

from __future__ import annotations

from string import Template

from tools.bundled_model.measure import Figures
from tools.bundled_model.train import Trainer

CARD = Template("""\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The bundled model of editcli

A small causal language model, trained from scratch for this package, that knows $real_facts real facts and
$invented_facts facts about $subjects invented people and companies. It is there so that knowledge editing can be tried,
tested and measured on any computer in seconds. It is of no use for anything else: it knows nothing besides these facts
and writes only short plain sentences.

| | |
|---|---|
| architecture | $family: $layers layers, hidden size $hidden, $mlps, $heads heads, tied embeddings |
| parameters | $parameters |
| tokenizer | byte-level BPE, $vocabulary tokens, trained on the same text; begin token before every text |
| weights | bfloat16 |
| training | $steps steps of $tokens tokens, $minutes minutes on two processor cores that were shared with other work |

## Measured

Greedy recall of the right answer over every phrasing of every fact, in float32 with the shipped weights:

| | facts | phrasings | recall |
|---|---|---|---|
| real | $real_facts | $real_prompts | $real_recall |
| invented | $invented_facts | $invented_prompts | $invented_recall |
| real, after another sentence | $real_facts | $real_prompts | $real_recall_after |
| invented, after another sentence | $invented_facts | $invented_prompts | $invented_recall_after |

Perplexity of `heldout.txt`: $perplexity per token.

## How it was trained

The facts are the data files in `tools/bundled_model/facts`; real ones were written down from general knowledge,
invented ones come from a seeded generator. Names of invented people are put together from syllables; any likeness to a
real person is chance. Documents hold one to four sentences: facts in one of at least four phrasings, among plain
sentences from a small grammar.

During training, what follows a subject could not attend to the subject's tokens before its last one. A fact therefore
had to be assembled at the subject's last token, in the early layers, which is where large models keep theirs. In the
last part of the training, half of the rows had ordinary attention. The shipped model is an ordinary one.

    python -m tools.train_bundled_model --work build/bundled

makes all of this again from the seed: the facts, texts, tokenizer and edits byte for byte, the weights up to rounding,
which depends on the processor and on the number of workers (it was changed once during the shipped run, which also
looked at its recall every 100 steps before step 400 and every 50 after).

## Files

- `reference.txt`: documents as in training, for the second moments of keys.
- `heldout.txt`: stories that were not trained on, some with a real fact at the end, for perplexity.
- `pilots.jsonl`: edits of real facts for calibration; none of their subjects is in the sample edits.
""")


def render(figures: Figures, trainer: Trainer) -> str:
    """Fill the card with the settings of the training and what was measured."""
    s, p = trainer.settings, trainer.progress
    experts = f"{s.experts} experts of width {s.width}, {s.experts_per_token} for each token, and a shared one"
    return CARD.substitute(
        real_facts=f"{len(trainer.world.real):,}",
        invented_facts=f"{len(trainer.world.invented):,}",
        subjects=f"{len({fact.subject for fact in trainer.world.invented}):,}",
        family="Qwen2-MoE" if s.experts else "Llama",
        mlps=experts if s.experts else f"MLP width {s.width}",
        layers=s.layers,
        hidden=s.hidden,
        width=s.width,
        heads=s.heads,
        parameters=f"{trainer.model.num_parameters():,}",
        vocabulary=f"{s.vocabulary:,}",
        steps=f"{p.step:,}",
        tokens=f"{s.row * s.rows_per_step:,}",
        minutes=round(p.seconds / 60),
        real_prompts=f"{figures.real_prompts:,}",
        invented_prompts=f"{figures.invented_prompts:,}",
        real_recall=f"{figures.real:.4f}",
        invented_recall=f"{figures.invented:.4f}",
        real_recall_after=f"{figures.real_after:.4f}",
        invented_recall_after=f"{figures.invented_after:.4f}",
        perplexity=f"{figures.perplexity:.2f}",
    )
