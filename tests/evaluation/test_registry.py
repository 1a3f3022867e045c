"""Every figure that is reported has one entry, and figures of two protocols are never mixed."""

from __future__ import annotations

import pytest

from editcli.evaluation.registry import (
    METRICS,
    PROTOCOLS,
    differences,
    metric_of,
    one_protocol,
    paths,
    protocols_of,
    value_at,
)


def test_every_metric_has_one_entry_with_a_protocol_and_a_scorer():
    names = [metric.name for metric in METRICS]
    assert len(set(names)) == len(names)
    assert all(metric.protocol in PROTOCOLS and metric.scorer and metric.meaning for metric in METRICS)


def test_a_star_stands_for_one_level():
    assert metric_of("zsre.locality").scorer == "right_tokens"
    for name in ("zsre", "zsre.locality.more", "nothing"):
        with pytest.raises(KeyError, match="no registered metric"):
            metric_of(name)


def test_figures_of_one_protocol_may_be_averaged_and_those_of_two_may_not():
    assert one_protocol(["efficacy_success", "specificity_success"]) == "teacher_forced"
    with pytest.raises(ValueError, match="different protocols"):
        one_protocol(["efficacy_success", "fluency"])


def test_paths_and_values_of_nested_figures():
    figures = {"efficacy_success": 0.5, "zsre": {"efficacy": None, "locality": 1}, "counts": {"edits": 3}, "edits": 3}
    assert list(paths(figures)) == ["efficacy_success", "zsre.efficacy", "zsre.locality"]
    assert value_at(figures, "zsre.locality") == 1
    assert value_at(figures, "zsre.efficacy") is value_at(figures, "zsre.none") is value_at(figures, "score") is None


def test_two_records_that_were_taken_differently_are_named():
    ours = protocols_of(["efficacy_success", "fluency"])
    assert differences(ours, protocols_of(["efficacy_success", "score"])) == ()
    theirs = {"efficacy_success": {"protocol": "generated", "scorer": "exact_match"}}
    (text,) = differences(ours, theirs)
    assert text == "efficacy_success is teacher_forced (more_probable) here and generated (exact_match) there"
