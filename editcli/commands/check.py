"""Check an edits file against a model's tokenizer, without loading weights: what ``apply`` would refuse, and doubts."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from editcli.editing.sinks import begins
from editcli.errors import RequestError
from editcli.evaluation.admission import Gate, thinking_warning
from editcli.models.fit import check_fit
from editcli.models.tokens import Encoded, Tokens
from editcli.plugin.manager import Plugins, load_plugins
from editcli.reporting import Reporter, Silent
from editcli.requests.formats import Format
from editcli.requests.reader import EditFile, read_edits
from editcli.requests.schema import FIELDS, EditRequest
from editcli.requests.subjects import by_subject
from editcli.requests.superseding import supersede
from editcli.runs import planning
from editcli.settings.recipe import Recipe
from editcli.storage.choice import has_weights, is_fetched

NAMED = 3
"""Subjects that a warning about several edits of one subject names."""


@dataclass(frozen=True, slots=True)
class CheckedEdit:
    """The positions of one edit in its tokens."""

    id: str
    line: int | None
    prompt: str
    subject: str
    lookup: str
    """The token at which the fact is written: the subject's last one."""
    position: int
    """The lookup token's position, counted from 0, special tokens included."""
    target: tuple[str, ...]
    """The target's tokens as text; those that only together are whole characters are one."""
    length: int
    """Tokens of prompt and target."""
    joint: str = ""
    """The text between prompt and target."""
    target_length: int = 0
    """Tokens of the target; a character that takes several is one text of ``target``."""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The usable and the rejected edits of a file; the file is usable when nothing was rejected."""

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
    editor: str | None = None,
    preset: str | Mapping[str, Any] | None = None,
    formats: Sequence[Format] = (),
    limit: int | None = None,
    chat_template: bool = False,
    system: str | None = None,
    template_args: Mapping[str, Any] | None = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    trust_remote_code: bool = False,
    plugins: Plugins | None = None,
    reporter: Reporter | None = None,
) -> CheckReport:
    """Check every edit of a file as ``apply`` does; only an unreadable file or model raises, bad edits are collected.

    ``editor``, ``preset`` and ``settings`` are those of the run that the edits are meant for; by default the ones that
    ``apply`` takes for this model.
    """
    plugins, reporter = plugins or load_plugins(), reporter or Silent()
    recipe = Recipe(
        edits=str(edits),
        model=None if model is None else str(model),
        revision=revision,
        editor=editor,
        preset=preset,
        settings=settings or {},
        chat_template=chat_template,
        system=system,
        template_args=template_args,
        trust_remote_code=trust_remote_code,
    ).resolved(plugins)
    source = planning.located(recipe, weights=False)
    base = planning.described(recipe, source, plugins)
    if has_weights(source.folder) and (source.commit is None or is_fetched(source.folder)):
        check_fit(base.checkpoint, base.model, reporter)
    gate = planning.gate_of(recipe, base, plugins)
    return _report(read_edits(edits, skip_bad=True, limit=limit, formats=formats), source.name, gate, reporter)


def _report(file: EditFile, model: str, gate: Gate, reporter: Reporter) -> CheckReport:
    checked: list[CheckedEdit] = []
    usable: list[EditRequest] = []
    rejected = list(file.rejected)
    with reporter.phase("Checking", len(file.requests), "edits") as advance:
        for request in file.requests:
            try:
                checked.append(check_edit(request, gate))
                usable.append(request)
            except RequestError as error:
                rejected.append(error)
            advance(1)
    rejected.sort(key=lambda error: error.line or 0)
    thinking = thinking_warning(gate.tokens)
    warnings = (*file.warnings, *((thinking,) if thinking else ()), *_of_one_subject(supersede(usable)[0], gate))
    return CheckReport(file.source, model, tuple(checked), tuple(rejected), warnings)


def _of_one_subject(requests: Sequence[EditRequest], gate: Gate) -> Iterator[str]:
    """Yield a warning of edits of one subject that one batch of the usual size would hold."""
    size = planning.DEFAULT_BATCH
    if gate.editor.single_site or not gate.editor.needs_values:
        # Its batches are of one edit, or it optimises no targets.
        return
    batches = [requests[start : start + size] for start in range(0, len(requests), size)]
    groups = [[batch[at] for at in group] for batch in batches for group in by_subject(batch) if len(group) > 1]
    if not groups:
        return
    shown = [f"{group[0].subject!r} ({', '.join(edit.line_name for edit in group)})" for group in groups[:NAMED]]
    named = "; ".join(shown) + (f"; {len(groups) - NAMED} more" if len(groups) > NAMED else "")
    outcome = (
        "share one target, which has to serve all of them"
        if gate.targets.merge
        else "have nearly the same key and different targets, so few of them will hold; set targets.merge=true"
    )
    yield f"edits of one subject in one batch ({size} edits unless --batch-size says otherwise) {outcome}: {named}"


def check_edit(request: EditRequest, gate: Gate) -> CheckedEdit:
    """Return where an edit sits in its tokens; raise :class:`RequestError` when it cannot be edited or measured."""
    encoded, tokens = gate.admit(request), gate.tokens
    text = tokens.locate(request, request.target_new)
    start = len(text.text) if text.target is None else text.target[0]
    return CheckedEdit(
        id=request.id,
        line=request.line,
        prompt=request.prompt,
        subject=request.subject,
        lookup=tokens.character_at(encoded, encoded.lookup) if request.has_subject else "",
        position=encoded.lookup,
        target=tokens.characters(encoded.target_ids),
        length=len(encoded.ids),
        joint=text.text[start - text.joint : start],
        target_length=len(encoded.target_ids),
        warnings=tuple(_doubts(request, encoded, tokens)),
    )


def _doubts(request: EditRequest, encoded: Encoded, tokens: Tokens) -> Iterator[str]:
    """Yield what is allowed and probably not meant."""
    bare = tokens.encode([tokens.locate(request)])[0].ids
    if not request.prompt[-1:].isspace() and encoded.ids[: len(bare)] != bare and encoded.target.start < len(bare):
        yield "the target's first token reaches into the prompt, so the bare prompt is read otherwise; see 'join'"
    special = set(encoded.target_ids) & set(tokens.tokenizer.all_special_ids)
    specials = sorted(tokens.tokenizer.convert_ids_to_tokens(i) for i in special)
    if specials:
        yield f"the target holds special tokens ({', '.join(specials)}), which end a text or are not shown"
    if request.target_true is not None and request.target_true.strip() == request.target_new.strip():
        yield "target_new and target_true are the same, so there is nothing to change"
    if request.prompt[-1:].isspace():
        yield "the prompt ends in white space, which most tokenizers put into the answer's first token; remove it"
    lookup = tokens.character_at(encoded, encoded.lookup).strip() if request.has_subject else ""
    # A part of a character decodes to the replacement mark.
    if "\ufffd" not in lookup and not request.subject.endswith(lookup):
        yield f"the subject's last token {lookup!r} reaches beyond the subject into the text after it"
    if begins(encoded):
        yield (
            "the subject is the first token of the text, where many models have the same key for every subject; put a "
            "word before the subject, as in 'The company Microsoft'"
        )
    if request.target_true is None and any(near.target is None for near in request.neighborhood_prompts):
        yield "neighborhood_prompts without an answer are not measured; add target_true, or a target to each"
    if any(near.target is None for near in request.locality):
        yield "locality without an answer is measured against the base model's own, by 'eval --base' alone"
    if request.has_subject and any(request.subject in near.prompt for near in request.neighborhood_prompts):
        yield "a neighborhood prompt is about the edited subject itself, where the answer may well change"
    for name in request.extra.keys() - set(FIELDS):
        close = difflib.get_close_matches(name, FIELDS, n=1, cutoff=0.85)
        if close:
            yield f"the field {name!r} is not read; did you mean {close[0]!r}?"
