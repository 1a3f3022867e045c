"""Options of the core, which no plugin owns; never imports torch, so that a shell can complete them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from editcli.plugin.options import option

BATCH_TOKENS = 24576
"""Most tokens of a forward pass of targets where no one chose another number."""


@dataclass(frozen=True)
class TargetOptions:
    """The optimisation of target values; the names are those of the published configurations where they have one."""

    steps: int = option(25, "most evaluations of the loss for one edit (published: v_num_grad_steps)")
    lr: float = option(0.2, "Adam's learning rate (published: v_lr)")
    lr_kind: Literal["absolute", "relative"] = option(
        "relative", "relative: in units of ||h|| / sqrt(d), which no model's scale changes; absolute: as published"
    )
    clamp: float = option(0.75, "largest ||delta|| as a share of ||h|| (published: clamp_norm_factor)")
    norm_clamp: float = option(5.0, "the same where a norm follows the MLP, so that only direction counts")
    v_weight_decay: float = option(0.0, "weight of the size of delta in the loss")
    decay_kind: Literal["absolute", "relative"] = option(
        "relative", "absolute: the size is ||delta|| / ||h||^2; relative: ||delta|| / ||h||, which no scale changes"
    )
    kl_factor: float = option(0.0078125, "weight of the divergence on '{subject} is a'")
    stop_loss: float = option(0.05, "an edit whose loss is below this is done")
    stop: Literal["loss", "greedy"] = option(
        "loss", "greedy: an edit is also done once its target is the greedy answer in all its contexts (ENCORE's MPES)"
    )
    stop_patience: int = option(2, "with stop=greedy, more steps in a row at which the target has to stay that answer")
    per_layer: bool = option(
        False, "write the first and the last of the layers alone, each with a target of its own (BLUE)"
    )
    merge: bool = option(True, "edits of one subject in one batch share one offset (MEMIT-Merge)")
    longest: int | None = option(100, "most tokens of a target that one offset is asked for; none: any number")
    prefixes: int = option(5, "generated prefixes that each prompt is also optimised behind")
    prefix_tokens: int = option(10, "tokens of each generated prefix")
    batch_tokens: int = option(
        BATCH_TOKENS, "most tokens in one forward pass; at this default an accelerator takes what its free memory holds"
    )
    cached: bool = option(True, "reuse attention keys and values before the subject's last token")

    def __post_init__(self) -> None:
        if self.steps < 1 or self.lr <= 0 or min(self.clamp, self.norm_clamp) <= 0 or self.prefixes < 0:
            raise ValueError("steps must be at least 1, lr and clamp positive, prefixes not negative")
        if self.stop_patience < 0:
            raise ValueError("stop_patience must not be negative")
        if self.longest is not None and self.longest < 1:
            raise ValueError("longest must be at least 1, or none")


@dataclass(frozen=True)
class StatisticsOptions:
    """The amount of reference text to read."""

    tokens_per_dim: int = option(
        10, "tokens read for each dimension of a key; half suffice where the package's text has no more"
    )
    tokens: int | None = option(None, "tokens read in total, instead of tokens_per_dim times the key's width")
    max_length: int = option(512, "most tokens of one sequence, and no more than the model's context")
    batch_tokens: int = option(8192, "tokens in one forward pass")


CORE: Mapping[str, type[Any]] = {"targets": TargetOptions, "statistics": StatisticsOptions}
"""Sections of settings that belong to the core, with their options."""
