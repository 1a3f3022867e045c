"""Train the bundled model: schedule, batches, optimizers, checkpoints."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from tools.bundled_model.measure import recall
from tools.bundled_model.packing import Encoder, Row, attention, fill, pack
from tools.bundled_model.plain import Grammar
from tools.bundled_model.text import documents
from tools.bundled_model.world import Fact, World

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides what the training gives, besides the facts."""

    seed: int = 20260
    vocabulary: int = 4096
    hidden: int = 128
    width: int = 1536
    layers: int = 8
    heads: int = 4
    # With experts, every MLP is a mixture: `width` is then that of one expert and of the shared one.
    experts: int = 0
    experts_per_token: int = 2
    balance: float = 0.01
    row: int = 128
    rows_per_step: int = 32
    optimizer: str = "muon"
    rate: float = 2e-3
    hidden_rate: float = 2e-3
    weight_decay: float = 0.01
    warmup: int = 100
    first_subjects: int = 400
    first_recall: float = 0.6
    # The rate stays up until the sample's recall has risen this far, or until the last step at which decay can begin.
    decay_recall: float = 0.95
    decay_earliest: int = 0
    decay_latest: int = 750
    decay_steps: int = 800
    real_repeats: float = 1.5
    # In the decay this share of the rows keeps the bottleneck; the others see what the model sees when it is used.
    decay_bottleneck: float = 0.5
    check_every: int = 50
    sample: int = 400


@dataclass(slots=True)
class Progress:
    """How far the training is: what a resumed run needs besides the tensors."""

    step: int = 0
    pass_number: int = 0
    row: int = 0
    all_subjects_since: int | None = None
    decay_since: int | None = None
    seconds: float = 0.0


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Return the untrained model: a Llama, or a Qwen2-MoE with a shared expert where there are to be experts."""
    torch.manual_seed(settings.seed)
    shape: dict[str, Any] = {
        "vocab_size": settings.vocabulary,
        "hidden_size": settings.hidden,
        "intermediate_size": settings.width,
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "num_key_value_heads": settings.heads,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "attn_implementation": "sdpa",
    }
    if not settings.experts:
        return LlamaForCausalLM(LlamaConfig(**shape))
    experts = Qwen2MoeConfig(
        num_experts=settings.experts,
        num_experts_per_tok=settings.experts_per_token,
        moe_intermediate_size=settings.width,
        shared_expert_intermediate_size=settings.width,
        norm_topk_prob=True,
        **shape,
    )
    return Qwen2MoeForCausalLM(experts)


def matrices(name: str, parameter: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield a parameter, or the matrices of one that holds those of several experts: they are trained one by one."""
    if parameter.ndim < 3:
        yield name, parameter
        return
    for expert, matrix in enumerate(parameter):
        yield f"{name}.{expert}", matrix


class Trainer:
    """One training run: float32 masters, a bfloat16 working copy, two optimizers."""

    def __init__(
        self,
        settings: Settings,
        *,
        world: World,
        grammar: Grammar,
        tokenizer: PreTrainedTokenizerFast,
        folder: Path,
        threads: int = 1,
    ) -> None:
        """Start at step zero."""
        self.settings, self.world, self.grammar, self.tokenizer = settings, world, grammar, tokenizer
        self.folder = folder
        self.progress = Progress()
        self.model = new_model(settings, tokenizer)
        parameters = self.model.named_parameters()
        self.masters = {name: m.clone() for whole, p in parameters for name, m in matrices(whole, p.detach())}
        for master in self.masters.values():
            master.requires_grad_(True)
        self.model.to(torch.bfloat16)
        # Each worker has a copy of the model and a share of the rows: they wait for each other once a step, where
        # threads inside the operations would wait hundreds of times, which is slow when the processor is shared.
        self.workers = [self.model, *(copy.deepcopy(self.model) for _ in range(threads - 1))]
        self._pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        self.optimizers = self._optimizers()
        self._encoder = Encoder(tokenizer)
        self._rows: list[Row] = []

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        s = self.settings
        matrices = [p for name, p in self.masters.items() if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in self.masters.items() if p.ndim != 2 or "embed" in name]
        projections = [p for name, p in self.masters.items() if "down_proj" in name]
        decays = {"weight_decay": s.weight_decay}
        adam: dict[str, Any] = {"betas": (0.9, 0.98), "eps": 1e-9, **decays}
        if s.optimizer == "adamw":
            return [
                torch.optim.AdamW([{"params": matrices, "lr": s.hidden_rate}, {"params": others, "lr": s.rate}], **adam)
            ]
        if s.optimizer == "hybrid":
            matrices = [p for p in matrices if all(p is not other for other in projections)]
            others += projections
        muon = torch.optim.Muon(matrices, lr=s.hidden_rate, adjust_lr_fn="match_rms_adamw", **decays)
        return [muon, torch.optim.AdamW(others, lr=s.rate, **adam)]

    def facts(self) -> tuple[Fact, ...]:
        """Return the facts that are being learnt now: first some of the subjects, then all."""
        if self.progress.all_subjects_since is not None:
            return self.world.facts
        subjects = dict.fromkeys(fact.subject for fact in self.world.invented)
        first = set(list(subjects)[: self.settings.first_subjects])
        return self.world.real + tuple(fact for fact in self.world.invented if fact.subject in first)

    def pass_rows(self) -> list[Row]:
        """Return the rows of the current pass over the facts, a function of the seed and the pass number."""
        s = self.settings
        random = Random(f"{s.seed}:{self.progress.pass_number}")
        facts = self.facts()
        real = [fact for fact in facts if fact.relation.real]
        again = random.sample(real, int(len(real) * (s.real_repeats - 1)))
        pieces = (self._encoder.document(d) for d in documents([*facts, *again], self.grammar, random))
        rows = [pack(row, length=s.row, pad=self.tokenizer.pad_token_id) for row in fill(pieces, length=s.row)]
        random.shuffle(rows)
        return rows

    def next_pass(self) -> None:
        """Begin a new pass over the facts."""
        self.progress.pass_number += 1
        self.progress.row = 0
        self._rows = self.pass_rows()

    def batch(self) -> list[Row]:
        """Return the next batch of the pass, or the first of the next one; the last, short one is left out."""
        size = self.settings.rows_per_step
        if not self._rows:
            self._rows = self.pass_rows()
        if self.progress.row + size > len(self._rows):
            self.next_pass()
        start = self.progress.row
        self.progress.row += size
        return self._rows[start : start + size]

    def rate(self) -> float:
        """Return the factor of the learning rates: up, level, then down in a straight line."""
        s, p = self.settings, self.progress
        if p.decay_since is None:
            return min(1.0, (p.step + 1) / s.warmup)
        return max(0.01, 1.0 - (p.step - p.decay_since) / s.decay_steps)

    def backward(self, model: Any, rows: Sequence[Row], bottleneck: npt.NDArray[np.bool_]) -> float:
        """Return the weighted loss of a share of the batch, and add its gradient to the copy of the model."""
        ids = torch.from_numpy(np.stack([row.ids for row in rows])).long()
        read = model.model(
            input_ids=ids,
            attention_mask=torch.from_numpy(attention(rows, bottleneck)),
            position_ids=torch.from_numpy(np.stack([row.positions for row in rows])).long(),
            use_cache=False,
            **({"output_router_logits": True} if self.settings.experts else {}),
        )
        hidden = read.last_hidden_state
        weights = torch.from_numpy(np.stack([row.weights for row in rows]))[:, 1:]
        kept = weights > 0
        logits = model.lm_head(hidden[:, :-1][kept]).float()
        losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][kept], reduction="none")
        loss = (losses * weights[kept]).sum() / weights.sum()
        if self.settings.experts:
            s = self.settings
            loss = loss + s.balance * load_balancing_loss_func(read.router_logits, s.experts, s.experts_per_token)
        loss = loss / len(self.workers)
        loss.backward()
        return loss.item()

    def step(self, rows: Sequence[Row]) -> float:
        """Take one step; in the decay, some of the rows are without the bottleneck."""
        s = self.settings
        share = 1.0 if self.progress.decay_since is None else s.decay_bottleneck
        chosen = np.random.default_rng((s.seed, self.progress.step)).random(len(rows)) < share
        count = len(self.workers)
        shares = [(worker, rows[i::count], chosen[i::count]) for i, worker in enumerate(self.workers)]
        loss = sum(self._pool.map(lambda share: self.backward(*share), shares))
        for whole, _ in self.model.named_parameters():
            copies = [worker.get_parameter(whole) for worker in self.workers]
            total = sum(parameter.grad.float() for parameter in copies)
            for name, gradient in matrices(whole, total):
                self.masters[name].grad = gradient
            for parameter in copies:
                parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group.setdefault("peak", group["lr"])
                group["lr"] = group["peak"] * self.rate()
        list(self._pool.map(lambda optimizer: optimizer.step(), self.optimizers))
        self.copy_masters()
        self.progress.step += 1
        return loss

    @torch.no_grad()
    def copy_masters(self) -> None:
        """Cast the masters into the working copies."""
        for worker in self.workers:
            for whole, parameter in worker.named_parameters():
                for name, matrix in matrices(whole, parameter):
                    matrix.copy_(self.masters[name])

    def check(self) -> tuple[float, float]:
        """Return the recall of real and of invented facts on a fixed sample, with ordinary attention."""
        result = []
        facts = self.facts()
        for real in (True, False):
            random = Random(self.settings.seed)
            pool = [fact for fact in facts if fact.relation.real is real]
            chosen = random.sample(pool, min(self.settings.sample, len(pool)))
            sentences = [random.choice(fact.say_all()) for fact in chosen]
            result.append(recall(self.model, self.tokenizer, sentences) if sentences else 1.0)
        return result[0], result[1]

    def advance(self, recalled: tuple[float, float]) -> None:
        """Begin the next part of the schedule when the sample's recall allows it."""
        s, p = self.settings, self.progress
        if p.all_subjects_since is None:
            if recalled[1] >= s.first_recall:
                p.all_subjects_since = p.step
                self.next_pass()
        elif p.decay_since is None and (
            p.step >= s.decay_latest or (p.step >= s.decay_earliest and min(recalled) >= s.decay_recall)
        ):
            p.decay_since = p.step

    def finished(self) -> bool:
        """Say whether the decay has come to its end."""
        p = self.progress
        return p.decay_since is not None and p.step - p.decay_since >= self.settings.decay_steps

    def run(self, *, most_steps: int | None = None) -> None:
        """Train to the end of the schedule, or for at most so many steps in all."""
        began, mean = time.monotonic() - self.progress.seconds, 0.0
        while not self.finished() and self.progress.step != most_steps:
            loss = self.step(self.batch())
            mean = loss if mean == 0.0 else 0.95 * mean + 0.05 * loss
            if self.progress.step % self.settings.check_every == 0:
                self.progress.seconds = time.monotonic() - began
                recalled = self.check()
                self.advance(recalled)
                self.save()
                logger.info(
                    "loss %.4f recall real %.3f invented %.3f rate %.2f %s", mean, *recalled, self.rate(), self.progress
                )

    def save(self) -> None:
        """Write the checkpoint, in a way that leaves the old one whole if it is interrupted."""
        new = self.folder / "checkpoint.new"
        torch.save(
            {
                "masters": self.masters,
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            },
            new,
        )
        new.replace(self.folder / "checkpoint.pt")
        with (self.folder / "progress.json").open("w") as file:
            json.dump({name: getattr(self.progress, name) for name in Progress.__slots__}, file)

    def load(self) -> None:
        """Go on from the checkpoint."""
        state = torch.load(self.folder / "checkpoint.pt", weights_only=True)
        self.progress = Progress(**state["progress"])
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(state["masters"][name])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.copy_masters()
