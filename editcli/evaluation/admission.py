"""Which edits a run accepts: the same rules for ``check`` and ``apply``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from editcli.errors import RequestError
from editcli.evaluation.questions import questions
from editcli.evaluation.scoring import encode_probes
from editcli.models.tokens import Encoded, Tokens
from editcli.plugin.interfaces import Editor
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions

ROOM = 4
"""Tokens of a prefix beyond the generated ones: its first word, and the full stop and space at its end."""


@dataclass(frozen=True, slots=True)
class Gate:
    """The conditions that an edit must meet for one tokenizer and one editor."""

    tokens: Tokens
    editor: Editor
    targets: TargetOptions
    without_subject: tuple[str, ...] = ()
    """Installed editors that need no subject."""
    without_targets: tuple[str, ...] = ()
    """Installed editors that optimise no target values, so that a target may be as long as the context."""
    measured: bool = True
    """Whether the edit's prompts are measured as well."""

    def admit(self, request: EditRequest) -> Encoded:
        """Return the edit's tokens; raise :class:`RequestError` at its line when it cannot be written or measured."""
        self._refuse_missing_subject(request)
        encoded = self.tokens.check(request)
        self._refuse_long(request, encoded)
        if self.measured:
            check_questions(request, self.tokens)
        return encoded

    def _refuse_missing_subject(self, request: EditRequest) -> None:
        if request.has_subject or not self.editor.needs_subject:
            return
        raise request.refusal(
            f"the edit has no subject, and {self.editor.name} writes a fact at its subject's last token; "
            f"add 'subject'{_or_take('an editor that needs none', self.without_subject)}"
        )

    def _refuse_long(self, request: EditRequest, encoded: Encoded) -> None:
        """Refuse a target that is too long for one value, or for the context once the optimisation adds a prefix."""
        if not self.editor.needs_values:
            return
        others = _or_take("an editor that optimises no targets", self.without_targets)
        tokens, longest = len(encoded.target_ids), self.targets.longest
        if longest is not None and tokens > longest:
            raise request.refusal(
                f"the target has {tokens} tokens, and {self.editor.name} writes at most {longest} with one value; "
                f"raise targets.longest{others}"
            )
        limit, length = self.tokens.max_length, len(encoded.ids) + self.targets.prefix_tokens + ROOM
        if limit is not None and self.targets.prefixes and length > limit:
            raise request.refusal(
                f"after a prefix the prompt and target may have {length} tokens, more than the model's context of "
                f"{limit}; lower targets.prefix_tokens or shorten the prompt{others}"
            )


def check_questions(request: EditRequest, tokens: Tokens) -> None:
    """Raise :class:`RequestError` at the request's line when one of its prompts cannot be measured."""
    try:
        encode_probes(tokens, [probe for question in questions(request, ("counterfact",)) for probe in question.probes])
    except RequestError as error:
        raise request.refusal(error.reason) from error


def without_subject(editors: Iterable[type[Editor]]) -> tuple[str, ...]:
    """Return the names of the editors that need no subject."""
    return tuple(sorted(editor.name for editor in editors if not editor.needs_subject))


def without_targets(editors: Iterable[type[Editor]]) -> tuple[str, ...]:
    """Return the names of the editors that optimise no target values."""
    return tuple(sorted(editor.name for editor in editors if not editor.needs_values))


def _or_take(kind: str, names: Sequence[str]) -> str:
    """Return the end of a sentence that names other editors; empty where none is installed."""
    return f", or take {kind}: {' or '.join(f'--editor {name}' for name in names)}" if names else ""


def thinking_warning(tokens: Tokens) -> str | None:
    """Return a warning where the chat template leaves the model thinking when the answer begins."""
    mark = None if tokens.conversation is None else tokens.conversation.opened_thought()
    if mark is None:
        return None
    return (
        f"the chat template opens a thinking block ({mark}) in front of the answer, so targets become thoughts; "
        "pass --template-args '{\"enable_thinking\": false}' if the template knows that"
    )
