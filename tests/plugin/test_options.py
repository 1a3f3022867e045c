"""Options: from text, TOML or Python to a frozen dataclass, with an error for everything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from editcli.errors import OptionError
from editcli.plugin.options import build, describe, merge, option, parse_assignments


@dataclass(frozen=True)
class Sample:
    """Options of every kind that a component may declare."""

    count: int = option(3, "how many")
    weight: float = option(0.5, "how much")
    remember: bool = option(False, "whether to remember")
    basis: Literal["base", "current"] = option("base", "which weight")
    anchor: float | None = option(None, "a fixed anchor")
    label: str = option("", "a name")

    def __post_init__(self) -> None:
        if self.count < 0:
            raise ValueError("count must not be negative")


def sample(**settings: Any) -> Sample:
    return build(Sample, settings, owner="sample")


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        ({"count": "7"}, "count", 7),
        ({"count": 7.0}, "count", 7),
        ({"weight": "1e-3"}, "weight", 0.001),
        ({"weight": 2}, "weight", 2.0),
        ({"remember": "yes"}, "remember", True),
        ({"remember": "OFF"}, "remember", False),
        ({"remember": True}, "remember", True),
        ({"basis": "current"}, "basis", "current"),
        ({"anchor": "none"}, "anchor", None),
        ({"anchor": "2.5"}, "anchor", 2.5),
        ({"label": "x=y"}, "label", "x=y"),
    ],
)
def test_a_value_is_converted_to_the_declared_type(settings: dict[str, Any], name: str, value: Any) -> None:
    built = getattr(sample(**settings), name)
    assert built == value
    assert type(built) is type(value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"count": "2.5"}, "sample.count must be a whole number"),
        ({"count": 2.5}, "sample.count must be a whole number"),
        ({"count": True}, "sample.count must be a whole number"),
        ({"weight": "much"}, "sample.weight must be a number"),
        ({"remember": "maybe"}, "sample.remember must be true or false"),
        ({"remember": 1}, "sample.remember must be true or false"),
        ({"basis": "other"}, "sample.basis must be one of base, current"),
        ({"label": 3}, "sample.label must be text"),
        ({"count": float("inf")}, "sample.count must be a whole number"),
        ({"count": 2**63}, "sample.count must be a whole number up to 9223372036854775807"),
        ({"count": "-1" + "0" * 400}, "sample.count must be a whole number up to"),
        ({"count": [1]}, "sample.count must be a whole number"),
        ({"count": -1}, "sample: count must not be negative"),
        ({"rember": True}, "did you mean 'remember'"),
        ({"zzz": True}, "known: anchor, basis, count"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError, match=said):
        sample(**settings)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match=r"sample\.weight"):
        sample(weight=text)


def test_assignments_are_grouped_by_component_and_the_later_one_wins() -> None:
    texts = ["memit.remember=true", "nas.guard=2", "memit.remember=false", "memit.mom2-update-weight=5"]
    assert parse_assignments(texts) == {
        "memit": {"remember": "false", "mom2_update_weight": "5"},
        "nas": {"guard": "2"},
    }


def test_a_value_may_hold_dots_and_equals_signs() -> None:
    assert parse_assignments(["a.b=c.d=e"]) == {"a": {"b": "c.d=e"}}


@pytest.mark.parametrize("text", ["", "memit", "memit=1", "memit.=1", ".remember=1", "memit.remember", "="])
def test_an_assignment_that_cannot_be_read_shows_the_form(text: str) -> None:
    with pytest.raises(OptionError, match=r"write NAME\.KEY=VALUE"):
        parse_assignments([text])


def test_stronger_layers_win_key_by_key() -> None:
    assert merge({"a": {"x": 1, "y": 1}}, {"a": {"y": 2}, "b": {"z": 3}}) == {"a": {"x": 1, "y": 2}, "b": {"z": 3}}


def test_the_description_names_type_default_and_help() -> None:
    rows = {row["name"]: row for row in describe(Sample)}
    assert rows["count"] == {"name": "count", "type": "a whole number", "default": 3, "help": "how many"}
    assert rows["basis"]["type"] == "base|current"
    assert rows["anchor"]["type"] == "a number or none"


@given(st.dictionaries(st.sampled_from(["count", "weight", "remember", "basis", "anchor", "label", "x"]), st.text()))
def test_any_text_is_either_taken_or_refused_as_an_option_error(settings: dict[str, str]) -> None:
    try:
        built = sample(**settings)
    except OptionError:
        return
    assert isinstance(built, Sample)
