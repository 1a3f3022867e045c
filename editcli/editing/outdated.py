"""Edits that a later batch contradicts: their keys leave the memory before the batch is written.

A memory of past keys holds W k where it is for every edit of the stream, also for one whose prompt now gets another
target, so that old and new fact are averaged. "The Labyrinth and the Thread" (arXiv 2605.26670, Prop. 3.5) takes the
overlapping old keys K_o out of the past, M = K_p K_p^T + K K^T - K_o K_o^T; for Q = M^-1 that is the opposite of the
step by which it remembers, see :meth:`editcli.plugin.leastsquares.InverseGram.released`.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from editcli.plugin.interfaces import Editor, Session, Site


@dataclass(frozen=True, slots=True)
class Outdated:
    """An edit that an edit of the batch contradicts, with the keys by which the editor remembers it."""

    id: str
    by: str
    """Id of the edit in the batch."""
    keys: Mapping[str, Tensor]
    """(d_in,) float32 by module name."""


def release(
    session: Session, editor: Editor, site: Site, outdated: Sequence[Outdated], *, given_up: Container[str]
) -> tuple[Tensor | None, tuple[str, ...]]:
    """Return the keys (d_in, m) that leave the memory of ``site``, None for none, and the ids of their edits.

    Edits that are contradicted only by ones that were ``given_up`` stay. A key that the memory cannot let go of stays
    as well, and is named in a warning.
    """
    leaving = [one for one in outdated if one.by not in given_up and site.module in one.keys]
    if not leaving:
        return None, ()
    keys = torch.stack([one.keys[site.module] for one in leaving], dim=1).to(session.weight(site).device)
    possible = set(editor.releasable(session, site, keys))
    for column, one in enumerate(leaving):
        if column not in possible:
            session.reporter.warn(
                f"{site.module}: the memory of {editor.name} cannot let go of the edit {one.id!r}, since it would lose "
                f"definiteness; it holds against the edit {one.by!r}"
            )
    columns = sorted(possible)
    return (keys[:, columns].contiguous() if columns else None), tuple(leaving[column].id for column in columns)
