"""The contract of every diagnostic; import :class:`DiagnosticContract` through :mod:`editcli.testing`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from editcli.editing.pipeline import Written, edit_batch
from editcli.editing.session import ModelSession
from editcli.requests.schema import EditRequest
from editcli.testing.contracts import Contract
from editcli.testing.sessions import PlainEditor, same_tensors, through_bytes, tiny_requests


class DiagnosticContract(Contract):
    """The properties that every diagnostic must have; it watches the updates of :class:`PlainEditor`.

    A diagnostic that is off by default needs :attr:`options` that turn it on.
    """

    def apply(self, session: ModelSession, component: Any, batch: Sequence[EditRequest]) -> Written:
        written = edit_batch(session, PlainEditor(), (), batch, lambda *_: None)
        component.observe(session, written.updates)
        return written

    def figures(self, session: ModelSession, diagnostic: Any, number: int) -> dict[str, float]:
        """Write batch ``number`` and return what the diagnostic says of it."""
        written = edit_batch(session, PlainEditor(), (), tiny_requests(number), lambda *_: None)
        return diagnostic.observe(session, written.updates)

    def test_it_gives_named_numbers(self, tmp_path: Path) -> None:
        session, diagnostic = self.ready(tmp_path)
        observed = [self.figures(session, diagnostic, number) for number in range(3)]
        assert any(observed), "it never says anything; set options that turn it on"
        for figures in observed:
            assert all(isinstance(name, str) and name for name in figures)
            # A tensor of one element would print alike and could not be written into the journal.
            assert all(type(value) is float for value in figures.values())

    def test_watching_changes_nothing(self, tmp_path: Path) -> None:
        session, diagnostic = self.ready(tmp_path)
        written = edit_batch(session, PlainEditor(), (), tiny_requests(0), lambda *_: None)
        weights = {site: weight.clone() for site, weight in session.masters().items()}
        copies = {site: {k: t.clone() for k, t in u.parts.items()} for site, u in written.updates.items()}
        diagnostic.observe(session, written.updates)
        for site in session.sites:
            assert torch.equal(session.weight(site), weights[site])
            assert same_tensors(written.updates[site].parts, copies[site])

    def test_a_resumed_stream_is_watched_as_an_unbroken_one(self, tmp_path: Path) -> None:
        """Two batches, a snapshot through bytes, two more: the same figures as of four batches in a row."""
        (unbroken, whole), (broken, first), second = self.ready(tmp_path), self.ready(tmp_path), self.make()
        for number in range(2):
            self.figures(unbroken, whole, number)
            self.figures(broken, first, number)
        state = through_bytes(first.state())
        if any(state):
            second.load_state(self.session(tmp_path), state)
        else:
            second.prepare(self.session(tmp_path))
        for number in (2, 3):
            assert self.figures(unbroken, whole, number) == self.figures(broken, second, number)
