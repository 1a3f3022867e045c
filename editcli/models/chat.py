"""Render prompts in a model's chat template, and find in the rendered text what was put in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

from editcli.errors import ModelError, OptionError, near_miss
from editcli.models.chat_settings import NAME, ChatSettings

_THOUGHT = re.compile(
    r"[<\[]\|?(?P<end>/|end_of_)?(?:\w+:|begin_of_)?(?:think|thinking|thought|reasoning)\|?[>\]]", re.I
)
"""How templates mark where a model thinks: <think>, [THINK], <seed:think>, <|begin_of_thought|>, and their ends."""
_CLOCK = "strftime_now"
"""The function by which a template reads date and time."""
_DIRECTIVES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ%"
"""Directives of strftime."""
_FIXED_CLOCK = """\
{%- macro strftime_now(format) -%}
{%- set state = namespace(key=none) -%}
{%- for character in format -%}
{%- if state.key is none -%}
{%- if character == '%' -%}{%- set state.key = '' -%}{%- else -%}{{ character }}{%- endif -%}
{%- elif character in '-#' and not state.key -%}{%- set state.key = character -%}
{%- else -%}{{ editcli_clock[state.key ~ character] }}{%- set state.key = none -%}
{%- endif -%}
{%- endfor -%}
{%- endmacro %}
"""
"""A clock that stands still, to be written in front of a template: transformers lets no function into one.

It reads the value of each directive from a table. Its last line feed belongs to it, so that the template begins a line.
"""
_PROBE = "What is the capital of France?"


class TemplateError(ValueError):
    """A template cannot be used with a prompt; the text is the reason."""


class Conversation:
    """A tokenizer's chat template with its settings: one system message at most, one prompt, the answer's beginning."""

    def __init__(self, tokenizer: Any, settings: ChatSettings):
        """Choose the template; raise :class:`ModelError` or :class:`OptionError` when there is none to choose."""
        self._tokenizer, self.settings = tokenizer, settings
        self._arguments = dict(settings.arguments)
        template = getattr(tokenizer, "chat_template", None)
        if not template:
            raise ModelError("--chat-template was asked for, but this model's tokenizer has no chat template")
        if isinstance(template, Mapping):
            self._arguments[NAME] = _choose(template, self._arguments.get(NAME))
        elif NAME in self._arguments:
            raise OptionError(f"--template-args names a {NAME}, but this model has a single one; leave it out")

    @property
    def template(self) -> str:
        """The template's text."""
        templates = self._tokenizer.chat_template
        return str(templates[self._arguments[NAME]] if isinstance(templates, Mapping) else templates)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that decide how a prompt is rendered, as JSON values; the template's text by its hash."""
        return {**self.settings.to_json(), "template": hashlib.sha256(self.template.encode()).hexdigest()}

    def render(self, prompt: str) -> str:
        """Return the conversation up to where the answer begins; raise :class:`TemplateError` with the reason."""
        messages = [{"role": "user", "content": prompt}]
        if self.settings.system is not None:
            messages.insert(0, {"role": "system", "content": self.settings.system})
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **{**self._arguments, **self._clock()}
            )
        # A template is a program of the model's author: it raises its own errors, and any that Python has.
        except Exception as error:
            hint = "pass --system TEXT" if self.settings.system is None else "change --system"
            reason = str(error).strip().splitlines()
            raise TemplateError(
                f"the model's chat template refuses it ({reason[0] if reason else type(error).__name__}); {hint} or "
                "--template-args, or leave out --chat-template"
            ) from error

    def _clock(self) -> dict[str, Any]:
        """Return what makes a template that reads the clock read the settings' time."""
        if _CLOCK not in self.template:
            return {}
        now = self.settings.now
        table = {directive: now.strftime(f"%{directive}") for directive in _DIRECTIVES}
        # The forms without a leading zero are the platform's own; templates were written where they are spelt %-d.
        table |= {f"{flag}{name}": table[name].lstrip("0") or "0" for flag in "-#" for name in "dHIjmMSUVWy"}
        return {NAME: _FIXED_CLOCK + self.template, "editcli_clock": table}

    def find(self, rendered: str, prompt: str, span: tuple[int, int]) -> tuple[int, int]:
        """Return where ``span`` of ``prompt`` is in what was rendered; raise :class:`TemplateError` when that is open.

        Many templates trim the prompt. Where one changes it otherwise, what is in the span has to be there once.
        """
        start, stop = span
        for whole in (prompt, prompt.strip()):
            place = rendered.rfind(whole)
            if place >= 0:
                shift = place - prompt.index(whole)
                return start + shift, stop + shift
        part = prompt[start:stop]
        if rendered.count(part) != 1:
            raise TemplateError(
                f"the model's chat template changes the prompt's text, and {part!r} is in the result "
                f"{rendered.count(part)} times, so it cannot be located; leave out --chat-template"
            )
        place = rendered.index(part)
        return place, place + len(part)

    def opened_thought(self) -> str | None:
        """Return the mark with which the template leaves the model thinking; None when the answer comes at once."""
        try:
            rendered = self.render(_PROBE)
        except TemplateError:
            # Each edit is refused with the reason.
            return None
        marks = list(_THOUGHT.finditer(rendered, rendered.rfind(_PROBE) + len(_PROBE)))
        return marks[-1][0] if marks and not marks[-1]["end"] else None


def _choose(templates: Mapping[str, str], name: Any) -> str:
    """Return the name of the template to use."""
    if name is None and "default" not in templates:
        names = ", ".join(sorted(templates))
        raise ModelError(
            f"this model has several chat templates and no default one ({names}); choose with "
            f'--template-args \'{{"{NAME}": "{min(templates)}"}}\''
        )
    if name is not None and name not in templates:
        raise OptionError(f"this model has no chat template {name!r}{near_miss(str(name), templates)}")
    return "default" if name is None else str(name)
