"""Check an edits file against a model's tokenizer, without loading weights: what ``apply`` would refuse, and doubts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from editcli.edits import EditRequest, read_edits
from editcli.errors import RequestError
from editcli.evaluation import questions
from editcli.evaluation.scoring import encode_probes
from editcli.formats import Format
from editcli.models.architectures import skeleton
from editcli.models.checkpoint import Checkpoint
from editcli.models.choice import has_weights, is_fetched
from editcli.models.fit import check_fit
from editcli.models.loading import load_config, load_tokens, resolve_model
from editcli.models.tokens import Encoded, Tokens
from editcli.report import Reporter, Silent
from editcli.request import FIELDS


@dataclass(frozen=True, slots=True)
class CheckedEdit:
    """Where one edit sits in its tokens."""

    id: str
    line: int | None
    prompt: str
    subject: str
    lookup: str
    """The token at which the fact is written: the subject's last one."""
    position: int
    """The lookup token's position, counted from 0, special tokens included."""
    target: tuple[str, ...]
    """The target's tokens."""
    length: int
    """Tokens of prompt and target."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What ``check`` found; the file is usable when nothing was rejected."""

    source: str
    model: str
    edits: tuple[CheckedEdit, ...]
    rejected: tuple[RequestError, ...]
    warnings: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        return {
            "edits_file": self.source,
            "model": self.model,
            "usable": len(self.edits),
            "rejected": [{"file": e.file, "line": e.line, "reason": e.reason} for e in self.rejected],
            "warnings": list(self.warnings),
            "edits": [asdict(edit) for edit in self.edits],
        }


def check(
    edits: str | Path,
    *,
    model: str | Path | None = None,
    revision: str | None = None,
    formats: Sequence[Format] = (),
    limit: int | None = None,
    chat_template: bool = False,
    trust_remote_code: bool = False,
    reporter: Reporter | None = None,
) -> CheckReport:
    """Check every edit of a file; only an unreadable file or model raises, bad edits are collected."""
    source = resolve_model(model, revision=revision)
    config = load_config(source, trust_remote_code=trust_remote_code)
    tokens = load_tokens(source, config, chat_template=chat_template, trust_remote_code=trust_remote_code)
    bare = skeleton(config, trust_remote_code)
    tokens = tokens.of_model(bare)
    if has_weights(source.folder) and (source.commit is None or is_fetched(source.folder)):
        check_fit(Checkpoint(source.folder), bare, reporter or Silent())
    file = read_edits(edits, skip_bad=True, limit=limit, formats=formats)
    checked: list[CheckedEdit] = []
    rejected = list(file.rejected)
    with (reporter or Silent()).phase("Checking", len(file.requests), "edits") as advance:
        for request in file.requests:
            try:
                checked.append(check_edit(request, tokens))
            except RequestError as error:
                rejected.append(error)
            advance(1)
    rejected.sort(key=lambda error: error.line or 0)
    return CheckReport(file.source, source.name, tuple(checked), tuple(rejected), file.warnings)


def check_edit(request: EditRequest, tokens: Tokens) -> CheckedEdit:
    """Return where an edit sits in its tokens; raise :class:`RequestError` when it cannot be edited or measured."""
    encoded = tokens.check(request)
    asked = [probe for question in questions(request, {"counterfact"}) for probe in question.probes]
    try:
        encode_probes(tokens, asked)
    except RequestError as error:
        raise request.refusal(error.reason) from error
    return CheckedEdit(
        id=request.id,
        line=request.line,
        prompt=request.prompt,
        subject=request.subject,
        lookup=tokens.decode([encoded.ids[encoded.lookup]]),
        position=encoded.lookup,
        target=tuple(tokens.decode([identifier]) for identifier in encoded.target_ids),
        length=len(encoded.ids),
        warnings=tuple(_doubts(request, encoded, tokens)),
    )


def _doubts(request: EditRequest, encoded: Encoded, tokens: Tokens) -> Iterator[str]:
    """Yield what is allowed and probably not meant."""
    if request.target_true is not None and request.target_true.strip() == request.target_new.strip():
        yield "target_new and target_true are the same, so there is nothing to change"
    if request.prompt[-1:].isspace():
        yield "the prompt ends in white space, which most tokenizers put into the answer's first token; remove it"
    lookup = tokens.decode([encoded.ids[encoded.lookup]]).strip()
    # A part of a character has no text of its own and decodes to the replacement mark.
    if "\ufffd" not in lookup and not request.subject.rstrip().endswith(lookup):
        yield f"the subject's last token {lookup!r} reaches beyond the subject into the text after it"
    if request.target_true is None and any(near.target is None for near in request.neighborhood_prompts):
        yield "neighborhood_prompts without an answer are not measured; add target_true, or a target to each"
    if any(near.target is None for near in request.locality):
        yield "locality without an answer is measured against the base model's own, by 'eval --base' alone"
    if any(request.subject in near.prompt for near in request.neighborhood_prompts):
        yield "a neighborhood prompt is about the edited subject itself, where the answer may well change"
    for name in request.extra.keys() - set(FIELDS):
        close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85)
        if close:
            yield f"the field {name!r} is not read; did you mean {close[0]!r}?"
