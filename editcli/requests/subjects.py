"""Facts of one subject: their keys at the subject's last token are nearly the same."""

from __future__ import annotations

from collections.abc import Sequence

from editcli.requests.schema import EditRequest
from editcli.requests.texts import squeezed


def by_subject(requests: Sequence[EditRequest]) -> list[list[int]]:
    """Return the numbers of the requests in groups whose subjects look the same, in the order of their first ones.

    A request without a subject is a group of its own.
    """
    groups: dict[str | int, list[int]] = {}
    for number, request in enumerate(requests):
        groups.setdefault(squeezed(request.subject) if request.has_subject else number, []).append(number)
    return list(groups.values())
