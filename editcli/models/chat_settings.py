"""The inputs of a chat template besides the prompt; imports neither torch nor transformers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from editcli.errors import OptionError

NAME = "chat_template"
"""The argument that chooses one of several named templates."""
_OURS = (
    *("conversation", "messages", "tokenize", "add_generation_prompt", "continue_final_message", "padding"),
    *("truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
"""Arguments of transformers' ``apply_chat_template`` that are no variables of a template."""


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """The system message before the prompt, the template's variables, and the time that the template reads."""

    system: str | None = None
    """The system message; None for none."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Variables of the template, for instance ``{"enable_thinking": False}``."""
    clock: str | None = None
    """Date and time that the template reads, in ISO 8601; None is the machine's own."""

    def __post_init__(self) -> None:
        check_arguments(self.arguments)
        if self.clock is not None:
            _read_clock(self.clock)

    @property
    def now(self) -> datetime:
        """Date and time as the template sees them."""
        return datetime.now() if self.clock is None else _read_clock(self.clock)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as a JSON object."""
        return {"system": self.system, "arguments": dict(self.arguments), "clock": self.clock}


def check_arguments(arguments: Any) -> None:
    """Raise :class:`OptionError` unless ``arguments`` can be given to a template."""
    if not isinstance(arguments, Mapping):
        raise OptionError('--template-args must be a JSON object, for instance {"enable_thinking": false}')
    for name in arguments:
        if name in _OURS or not str(name).isidentifier():
            raise OptionError(f"--template-args cannot set {name!r}; it takes the variables of the template alone")
    try:
        json.dumps(arguments, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise OptionError(f"--template-args cannot be written as JSON: {error}") from error


def parse_arguments(text: str) -> dict[str, Any]:
    """Read ``--template-args``; raise :class:`OptionError` when it is no JSON object."""
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise OptionError(
            f'--template-args is not JSON ({error}); write for instance {{"enable_thinking": false}}'
        ) from (error)
    check_arguments(arguments)
    return arguments


def _read_clock(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"template_clock must be a date and time such as 2026-01-31T12:00:00, not {text!r}"
        ) from error
