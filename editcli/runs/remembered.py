"""The keys by which an editor remembers the edits of a stream: in the run's segments, or in memory without a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from editcli.distributed.team import Team
from editcli.editing.outdated import Outdated
from editcli.plugin.interfaces import Problem, Site
from editcli.records.journal import BatchRecord
from editcli.records.state import RunFolder
from editcli.requests.schema import EditRequest
from editcli.requests.superseding import Prompts, Superseded


class RememberedKeys:
    """Finds the edits in force that a batch contradicts, and their keys."""

    def __init__(self, folder: RunFolder, sites: Sequence[Site], team: Team, *, writes: bool):
        self._folder, self._team = folder, team
        self._modules = [site.module for site in sites]
        self._prompts = Prompts()
        self._reports: dict[str, BatchRecord] = {}
        self._released: set[str] = set()
        # Rank 0 of a stream without a folder has to keep what the segments would.
        self._here: dict[str, Mapping[str, Tensor]] | None = None if writes or not team.leads else {}

    def take(self, reports: Sequence[BatchRecord], requests: Sequence[EditRequest]) -> None:
        """Begin with the batches in force."""
        self._prompts, self._released = Prompts(requests), set()
        self._reports = {}
        for report in reports:
            self._note(report)

    def add(self, report: BatchRecord, requests: Sequence[EditRequest], problems: Mapping[Site, Problem]) -> None:
        """Take a batch that was recorded."""
        self._prompts.add(requests)
        self._note(report)
        if self._here is None:
            return
        kept = {site.module: problem.remembered.cpu() for site, problem in problems.items()}
        for column, request in enumerate(requests):
            self._here[request.id] = {module: keys[:, column].clone() for module, keys in kept.items()}

    def outdated(self, requests: Sequence[EditRequest]) -> list[Outdated]:
        """Return the edits that ``requests`` contradict and whose keys are still in the memory; the same on every rank.

        Raises :class:`editcli.errors.StateError` where the segment of one cannot be read.
        """
        pairs = [one for one in self._prompts.contradicted(requests) if one.request.id not in self._released]
        if not pairs:
            return []
        tensors = self._team.lead_tensors("earlier keys", lambda: self._read(pairs))
        columns = [
            {module: tensor[:, column] for module, tensor in zip(self._modules, tensors, strict=True)}
            for column in range(len(pairs))
        ]
        return [Outdated(one.request.id, one.by.id, keys) for one, keys in zip(pairs, columns, strict=True)]

    def _note(self, report: BatchRecord) -> None:
        self._reports |= dict.fromkeys(report.edits, report)
        self._released |= set(report.released or ())

    def _read(self, pairs: Sequence[Superseded]) -> list[Tensor]:
        """Return the keys of the contradicted edits for each matrix, (d_in, m)."""
        if self._here is not None:
            found = [self._here[one.request.id] for one in pairs]
        else:
            found = [self._recorded(one.request.id) for one in pairs]
        return [torch.stack([keys[module] for keys in found], dim=1) for module in self._modules]

    def _recorded(self, edit: str) -> Mapping[str, Tensor]:
        report = self._reports[edit]
        return self._folder.read_segment(report).remembered(self._modules, report.edits.index(edit))
