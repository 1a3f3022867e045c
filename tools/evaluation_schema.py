"""The JSON schema of ``eval --json``, from the registry of metrics: each figure with its protocol and scorer."""

from __future__ import annotations

from typing import Any

from editcli.evaluation.registry import METRICS, PROTOCOLS, Metric

_COUNT, _TEXT = {"type": "integer", "minimum": 0}, {"type": "string"}
_OBJECT_OR_NULL = {"type": ["object", "null"]}
MODEL = "Figures"
"""Name of the definition of what is measured on one model."""


def evaluation_schema() -> dict[str, Any]:
    """Return the schema of ``eval --json``, which is also ``figures`` of ``evaluation.json``."""
    own = _nested([metric for metric in METRICS if metric.name.split(".")[0] not in ("judge", "distribution", "drift")])
    own = {**own, "counts": {"description": "Answers behind the figures.", "additionalProperties": _COUNT}}
    shown = {**_head(), **own, "harness": _OBJECT_OR_NULL, **_beside(), **_protocols()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "urn:editcli:evaluation:1",
        "title": "eval --json",
        "description": "Figures of edits on a model. A metric without data, or that was not asked for, is null.",
        "type": "object",
        "required": list(shown),
        "properties": shown,
        "additionalProperties": True,
        "$defs": {MODEL: {"type": "object", "required": list(own), "properties": own}},
    }


def _head() -> dict[str, Any]:
    gone = {"type": "object", "required": ["id", "superseded_by"]}
    return {
        "model": {"description": "The measured model, as it was named.", **_TEXT},
        "edits_file": {"description": "The file of the edits; null without edits.", "type": ["string", "null"]},
        "edits": {"description": "Edits that were measured.", **_COUNT},
        "rejected": {"description": "Why edits were left out, a sentence each.", "type": "array", "items": _TEXT},
        "superseded": {"description": "Edits that later ones replace, not measured.", "type": "array", "items": gone},
    }


def _beside() -> dict[str, Any]:
    """Return what stands beside the model's figures: other models, and what compares two of them."""
    # Pages list the fields of "properties" and "anyOf"; those of a second model would only repeat the first one's.
    model = {"oneOf": [{"type": "null"}, {"$ref": f"#/$defs/{MODEL}"}]}
    copy = {"allOf": [{"$ref": f"#/$defs/{MODEL}"}], "required": ["as", "library", "tensors"]}
    compared = _nested(
        [metric for metric in METRICS if metric.name.split(".")[0] in ("judge", "distribution", "drift")]
    )
    cohort = {"type": "object", "required": ["first", "last", "edits", "efficacy_accuracy", "efficacy_success"]}
    return {
        "base": {"description": "The same figures of the base.", **model},
        "in_context": {"description": "The base with the fact in front of every prompt.", **model},
        **compared,
        "cohorts": {"description": "What each tenth of the run retains.", "type": "array", "items": cohort},
        "quantised": {"description": "The same figures of quantised copies.", "type": "array", "items": copy},
    }


def _protocols() -> dict[str, Any]:
    fields = {"protocol": {"enum": list(PROTOCOLS)}, "scorer": _TEXT}
    one = {"type": "object", "required": list(fields), "properties": fields}
    return {
        "protocols": {
            "description": "Protocol and scorer of every metric above, by its path.",
            "type": "object",
            "additionalProperties": one,
        },
        "protocol_settings": {"description": "What decides the figures of each protocol.", "type": "object"},
    }


def _nested(metrics: list[Metric], prefix: str = "") -> dict[str, Any]:
    """Return the schemas of metrics below a path by the level's names; ``*`` stands for any name."""
    fields: dict[str, Any] = {}
    for name in dict.fromkeys(metric.name.removeprefix(prefix).partition(".")[0] for metric in metrics):
        path = f"{prefix}{name}"
        leaf = next((metric for metric in metrics if metric.name == path), None)
        below = [metric for metric in metrics if metric.name.startswith(f"{path}.")]
        fields[name] = _level(_nested(below, f"{path}.")) if leaf is None else _figure(leaf)
    return fields


def _level(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an object of figures, which is null where nothing was measured."""
    named = {name: field for name, field in fields.items() if name != "*"}
    rest = {"additionalProperties": fields["*"]} if "*" in fields else {}
    return {**_OBJECT_OR_NULL, **({"properties": named} if named else {}), **rest}


def _figure(metric: Metric) -> dict[str, Any]:
    bounds = {"minimum": 0, "maximum": 1} if metric.unit == "share" and metric.scorer != "tfidf_cosine" else {}
    text = f"{metric.protocol}, {metric.scorer}: {metric.meaning}."
    return {"description": text, "type": ["number", "null"], **bounds}
