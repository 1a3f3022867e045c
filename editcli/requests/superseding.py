"""Edits that contradict each other: one prompt cannot have two answers, so the last one that was asked for holds."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from editcli.requests.schema import EditRequest
from editcli.requests.texts import squeezed


@dataclass(frozen=True, slots=True)
class Superseded:
    """An edit whose prompt a later edit gives another target, and the first later edit with the target that holds."""

    request: EditRequest
    by: EditRequest

    @property
    def reason(self) -> str:
        """Why the edit is not in force, as one sentence."""
        where = "" if self.by.place == self.by.file else f" on {self.by.line_name}"
        return f"superseded by the edit {self.by.id!r}{where}, which gives the same prompt another target"


def supersede(
    requests: Iterable[EditRequest], *, given_up: Container[str] = ()
) -> tuple[list[EditRequest], list[Superseded]]:
    """Return the edits that are in force, in order, and those that a later one contradicts.

    Edits whose ids are in ``given_up`` were not written, so they contradict no other.

    Two edits contradict each other when their prompts, with the subjects filled in, look the same and their targets do
    not. Writing both in one batch would leave it to the solve which of them holds.
    """
    holding: dict[str, tuple[str, EditRequest]] = {}
    in_force: list[EditRequest] = []
    replaced: list[Superseded] = []
    # Backwards, because the last edit of a prompt decides.
    for request in reversed(list(requests)):
        prompt, target = squeezed(request.prompt), squeezed(request.target_new)
        holds, by = holding.get(prompt, (target, request))
        if holds == target:
            if request.id not in given_up:
                holding[prompt] = (target, request)
            in_force.append(request)
        else:
            replaced.append(Superseded(request, by))
    return in_force[::-1], replaced[::-1]
