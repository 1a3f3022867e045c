"""Train the byte-level BPE tokenizer on the words of the world."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tools.bundled_model.names import read_parts
from tools.bundled_model.plain import Grammar
from tools.bundled_model.world import World, invented_relations

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"


def training_lines(world: World, grammar: Grammar, *, seed: int, repeats: int = 8) -> Iterator[str]:
    """Yield the words to learn: invented names only in parts, so that a name becomes first name, start, ending."""
    for fact in world.real:
        for sentence in fact.say_all():
            yield f"{sentence.text} {sentence.text}"
    for relation in invented_relations():
        for answer in relation.answers * repeats:
            for phrasing in relation.phrasings:
                yield phrasing.format(s="Mira", a=answer) + " " + phrasing.format(s="Mira", a=answer)
    parts = read_parts()
    for _ in range(repeats * 4):
        yield from parts.endings
        yield from parts.first + parts.companies
        yield from (f" {part}" for part in parts.starts + parts.first + parts.companies)
    random = Random(seed)
    for _ in range(2000):
        yield " ".join(grammar.story(random))


def train_tokenizer(world: World, grammar: Grammar, *, size: int, seed: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `size` tokens that puts a begin token before every text, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_lines(world, grammar, seed=seed), trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
