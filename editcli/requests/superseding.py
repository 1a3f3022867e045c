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


def edit_of(request: EditRequest) -> tuple[str, str]:
    """Return the prompt and the target of an edit as they look."""
    return squeezed(request.prompt), squeezed(request.target_new)


class Prompts:
    """The edits of a stream by their prompts as they look."""

    def __init__(self, requests: Iterable[EditRequest] = ()):
        self._by_prompt: dict[str, list[EditRequest]] = {}
        self.add(requests)

    def add(self, requests: Iterable[EditRequest]) -> None:
        """Take the edits of a batch."""
        for request in requests:
            self._by_prompt.setdefault(edit_of(request)[0], []).append(request)

    def contradicted(self, requests: Iterable[EditRequest]) -> list[Superseded]:
        """Return the edits whose prompts ``requests`` give other targets, in the order of ``requests``."""
        named = [(edit_of(request), request) for request in requests]
        return [
            Superseded(earlier, request)
            for (prompt, target), request in named
            for earlier in self._by_prompt.get(prompt, ())
            if edit_of(earlier)[1] != target
        ]


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
        prompt, target = edit_of(request)
        holds, by = holding.get(prompt, (target, request))
        if holds == target:
            if request.id not in given_up:
                holding[prompt] = (target, request)
            in_force.append(request)
        else:
            replaced.append(Superseded(request, by))
    return in_force[::-1], replaced[::-1]
