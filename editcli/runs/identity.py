"""The identity of a run: compared by processes that work together, and when a run is resumed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from editcli.editing.session import ModelSession
from editcli.errors import ModelError
from editcli.records.record import Provenance
from editcli.records.state import ReferenceSettings, StreamSettings
from editcli.runs.planning import Planned
from editcli.statistics.moments import SecondMoments
from editcli.storage.checkpoint import file_digest, read_header
from editcli.storage.opening import expanded, is_there


def plan_parts(planned: Planned) -> dict[str, Any]:
    """Return the recipe, the edits and what was made of them, as far as JSON can tell them."""
    return {
        "recipe": planned.recipe.to_json(),
        "file": planned.file.sha256,
        "edits": [request.digest for request in planned.requests],
        "sites": [site.module for site in planned.sites],
        "batch_size": planned.batch_size,
    }


def stream_settings(
    planned: Planned, session: ModelSession, moments: SecondMoments, provenance: Provenance
) -> StreamSettings:
    """Return the settings of a run's stream."""
    return StreamSettings(
        base=provenance.base.fingerprint,
        editor=planned.editor.name,
        stabilizers=tuple(part.name for part in planned.stabilizers),
        options=provenance.options,
        targets=provenance.targets,
        layers=tuple(planned.layers),
        seed=planned.recipe.seed,
        tokenizer=session.loaded.source.tokenizer_digest,
        reference=_reference(moments),
        save_dtype=planned.recipe.save_dtype,
        dtype=str(next(session.loaded.model.parameters()).dtype),
        chat_template=planned.recipe.chat_template,
        chat=_chat(planned),
        prefixes=tuple(session.prefixes),
    )


def statistics_file(text: str) -> Path:
    """Return the file that ``--stats`` names; raise :class:`ModelError` when there is none that can be read."""
    path = expanded(text)
    if not is_there(path):
        raise ModelError(f"there is no statistics file {text}; make one with: editcli stats compute")
    # All of it is hashed later, which a file of terabytes must not get to.
    read_header(path)
    return path


def _chat(planned: Planned) -> dict[str, Any] | None:
    """Return the chat template by its hash, with its settings."""
    conversation = planned.gate.tokens.conversation
    return None if conversation is None else conversation.identity


def _reference(moments: SecondMoments) -> ReferenceSettings:
    if moments.file is not None:
        return ReferenceSettings(file=file_digest(moments.file))
    return ReferenceSettings(corpus=moments.corpus.identity, options=asdict(moments.options))
