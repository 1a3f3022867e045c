"""The audit of dependencies: what a release mends fails it, and silence is never taken for an answer."""

from __future__ import annotations

from typing import Any

import pytest

from tools.audit import judge

GOOD: dict[str, Any] = {"name": "click", "version": "8.1.0", "vulns": []}
BAD: dict[str, Any] = {
    "name": "jinja2",
    "version": "3.1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.6"]}, {"id": "GHSA-2", "fix_versions": []}],
}
OPEN: dict[str, Any] = {"name": "x", "version": "1", "vulns": [{"id": "GHSA-3", "fix_versions": []}]}
UNASKED: dict[str, Any] = {"name": "torch", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("packages", "code", "said"),
    [
        ([GOOD], 0, ["audit: nothing known against 1 packages"]),
        ([GOOD, UNASKED], 0, ["audit: nothing known against 1 packages; could not be looked up: torch"]),
        ([GOOD, BAD, UNASKED], 1, ["jinja2 3.1.0: GHSA-2, PYSEC-1; fixed in 3.1.6"]),
        ([GOOD, OPEN], 0, ["x 1: GHSA-3; fixed in no release yet"]),
    ],
)
def test_what_is_known_is_named(packages: list[dict[str, Any]], code: int, said: list[str]) -> None:
    assert judge(packages) == (code, said)


@pytest.mark.parametrize("packages", [[], [UNASKED]])
def test_an_audit_that_asked_nobody_does_not_say_that_nothing_is_known(packages: list[dict[str, Any]]) -> None:
    code, (line,) = judge(packages)
    assert code == 0
    assert line.startswith("audit skipped")
