"""``run.json``: the recipe of a run, its sources and its outcome; decoded once, into types.

Nothing here imports torch, so that a record can be checked before a model is thought of.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from editcli.errors import FileError, StateError
from editcli.records.decoding import (
    Count,
    Figures,
    Options,
    Size,
    TooLargeError,
    UnreadableError,
    encode,
    later,
    optional,
    read_json,
    refuse_nul,
    to_text,
)
from editcli.reporting import Rejection, RunReport, SiteReport
from editcli.storage.conversion import convert
from editcli.storage.opening import is_there

RUNNING, DONE, STOPPED, INTERRUPTED = "running", "done", "stopped", "interrupted"
ENDED = (DONE, STOPPED)
"""States of a run whose weights were saved as a result."""
RECORD = Path("editcli", "run.json")
"""Where a run folder, a patch and an adapter keep their record."""
LISTED = (None, 100_000, 10_000, 1_000, 0)
"""Edits that were not written that a record lists at most, the first number that keeps it readable; None for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EditCounts:
    """Number of edits."""

    read: Count
    """Of all files that the run read."""
    applied: Count
    """In the model now."""
    rejected: Count
    """Could not be used, were given up by a stabilizer, or are superseded by a later edit of the same prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Efficacy:
    """efficacy_accuracy and efficacy_success, each null where nothing was measured."""

    before: Figures | None
    """On the base."""
    immediate: Figures | None
    """Each edit right after its own batch."""
    retained: Figures | None
    """Every edit on the final model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BeforeAfter:
    """One figure before and after the run."""

    before: Size | None
    """On the base."""
    after: Size | None
    """On the final model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generality:
    """Success before and after, and accuracy."""

    before: Size | None
    """Success on the base."""
    after: Size | None
    """Success on the final model."""
    accuracy: BeforeAfter = later(BeforeAfter(before=None, after=None))
    """The share of greedy answers that are right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricRef:
    """The way in which a metric was taken."""

    protocol: str
    """teacher_forced, generated, choice or distribution."""
    scorer: str
    """How an answer became a number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedSite:
    """An edited matrix as it was saved."""

    module: str
    """Path of the module in the model."""
    layer: Count
    """Its layer, counted from 0."""
    ratio: Size | None
    """R_n = ||W_n||_F / ||W_0||_F; null for a base of zeros."""
    drift: Size | None
    """||W_n - W_0||_F / ||W_0||_F; null for a base of zeros."""
    cast_loss: Size = later(0.0)
    """Relative error of the cast to the file's type."""
    relative_change: Size | None = later()
    """Mean of |u_i^T (W_n - W_0) v_i| / sigma_i over the base's 16 leading singular directions; null for a base of
    zeros."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetCounts:
    """How the optimisation of targets ended; null for an editor without targets."""

    optimised: Count
    """Edits whose target was optimised."""
    reached: Count
    """Those whose loss fell below targets.stop_loss; with targets.stop=greedy also those whose target is the greedy
    answer in all contexts."""
    clamped: Count
    """Those whose offset ended at targets.clamp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """How the routers of a mixture of experts chose on the neighbours of the edits; null where nothing was measured."""

    prompts: Count
    """Neighbours that were looked at."""
    changed: Size
    """Share of the chosen experts that are others than the unedited model's, the mean over the layers."""
    layers: Mapping[str, Size]
    """The same of each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PresetRef:
    """Name, label and layers of the preset; of a preset file also its path and sha256."""

    name: str
    """Its name."""
    label: str = later("")
    """tuned, published or guessed."""
    layers: tuple[Count, ...] = later(())
    """The layers that were edited."""
    file: str | None = later()
    """The preset file; null for a preset that ships with editcli."""
    sha256: str | None = later()
    """Hash of that file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """An edit that could not be used, was given up, or is superseded."""

    id: str
    """Its id."""
    line: Count | None
    """Line of its file."""
    reason: str
    """Why."""
    superseded_by: str | None = optional()
    """The later edit that gives the same prompt another target, where that is why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseRef:
    """Name, folder, revision, commit and fingerprint of the base; licence and language that its card names."""

    name: str
    """As it was named."""
    folder: str | None = optional()
    """Where it was read from; an export does not say."""
    revision: str | None = later()
    """The revision that was asked for."""
    commit: str | None = later()
    """The commit of the hub that was read."""
    fingerprint: str
    """Hash of its files."""
    card: Mapping[str, Any] = later(factory=dict)
    """Licence and language of its card."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where it may be: the folder that it was read from, then the name that it was given."""
        known = (self.folder, f"{self.name}@{self.commit}" if self.commit else self.name)
        return tuple(dict.fromkeys(place for place in known if place))


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRef:
    """A file with its sha256."""

    file: str
    """As it was named."""
    sha256: str
    """Hash of it; empty for edits that came from a program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PilotsRef:
    """The first edits file of a run, and how many of its edits were read at most."""

    file: str
    """As it was named."""
    sha256: str
    """Hash of it; empty for edits that came from a program."""
    limit: Count | None = later()
    """Largest number of edits to read; null for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The reference text of the statistics: corpus, identity, tokens, and how many of these the model wrote itself; or
    the statistics file and its sha256."""

    file: str | None = optional()
    """The statistics file."""
    sha256: str | None = optional()
    """Hash of that file."""
    corpus: str | None = optional()
    """The reference text by name."""
    identity: str | None = optional()
    """Hash of the text that was read."""
    tokens: Count | None = optional()
    """Number of tokens read."""
    written_by_the_model: Count | None = optional()
    """Number of these tokens that the model wrote itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Requirement:
    """A component that a run was made with, and the distribution that brought it."""

    name: str
    """Name of the component."""
    distribution: str
    """The package that brought it."""
    version: str
    """The version of that package."""

    @property
    def installation(self) -> str:
        """The command that installs it; empty for one that came from no distribution."""
        return f"pip install {self.distribution}=={self.version}" if self.version else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """The sources of a run."""

    base: BaseRef
    edits: FileRef
    """The last edits file and its sha256."""
    plugins: tuple[Requirement, ...]
    """Name, distribution and version of each."""
    options: Options = later(factory=dict)
    """The options of every component, as they were in force."""
    targets: Mapping[str, Any] = later(factory=dict)
    """The same of the targets' optimisation."""
    statistics: Mapping[str, Any] = later(factory=dict)
    """The same of the reference text."""
    layers: tuple[Count, ...] = later(())
    """The layers that were edited."""
    batch_size: Count | None = later()
    """Edits of a batch."""
    versions: Mapping[str, str]
    """Of editcli, torch, transformers and Python."""
    device: str = later("")
    """Device that held the model."""
    dtype: str = later("")
    """Type in which it was loaded."""
    threads: Count | None = later()
    """Threads of the processor."""
    kernels: tuple[str, ...] = later(())
    """Ways in which targets were computed: `eager`, `cuda-graphs`, `grouped-attention`."""
    written: str = later("")
    """When the run began."""
    pilots: PilotsRef | None = optional()
    """The first edits file, which components calibrate on."""
    reference: Reference | None = optional()
    """The reference text of the statistics, where the run read any."""
    weights: Mapping[str, str] | None = optional()
    """Hash of every edited tensor as it was saved."""
    consumed: str | None = optional()
    """Rolling hash over all edits that were read."""

    def to_json(self) -> dict[str, Any]:
        """Return the object of ``run.json``."""
        return encode(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """One JSON object. `apply --json` prints all of it but `recipe` and `provenance`. While a run is under way only
    `status`, `recipe` and `provenance` are there."""

    status: Literal["done", "stopped", "interrupted", "running"]
    """done, stopped (by a guard), interrupted, or running: also what a run that was killed says."""
    model: str | None = optional()
    """The base, as it was named."""
    editor: str | None = optional()
    """Name of the editor."""
    stabilizers: tuple[str, ...] | None = optional()
    """Names, in the order in which they act."""
    edits: EditCounts | None = optional()
    rejected: tuple[Rejected, ...] | None = optional()
    """Edits that could not be used, and why; the first ones where a record of all would be larger than 40 MiB
    (`rejected.jsonl` has all)."""
    already_true: tuple[str, ...] | None = optional()
    """Edits whose target the model gave before their batch; where all are, the weights are the base's."""
    efficacy: Efficacy | None = optional()
    generalization: Generality | None = optional()
    """Success before and after, and accuracy; null without paraphrase_prompts."""
    specificity: Generality | None = optional()
    """Success before and after, and accuracy; null without neighborhood_prompts."""
    protocols: Mapping[str, MetricRef] | None = optional()
    """Protocol and scorer of each metric, those of the journal's batches included."""
    sites: tuple[RecordedSite, ...] | None = optional()
    """The edited matrices."""
    seconds: Mapping[str, Size | None] | None = optional()
    """Time per phase: load, prepare, targets, solve, eval, save, total."""
    out: str | None = optional()
    """The folder, as it was named."""
    stopped_by: str | None = optional()
    """Which guard stopped the run, at which value and edits; null when none did."""
    verdict: str | None = optional()
    """The same as `stopped_by`, under its older name; how the matrices fare is what `inspect` says."""
    targets: TargetCounts | None = optional()
    components: Options | None = optional()
    """The record of each editor and stabilizer, by component."""
    preset: PresetRef | None = optional()
    routing: Routing | None = optional()
    recipe: Mapping[str, Any]
    """Every setting of the command; runs it again. `preset` is the whole content of the preset file, with its name and
    sha256."""
    provenance: Provenance
    source: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False, metadata={"unwritten": True})
    """The decoded JSON object; it holds the fields that this version does not know."""

    @classmethod
    def from_json(cls, value: Any) -> RunRecord:
        """Decode a parsed ``run.json``; raise :class:`UnreadableError`."""
        source = {name: item for name, item in value.items() if name != "source"} if isinstance(value, dict) else value
        refuse_nul(source)
        return dataclasses.replace(convert(source, cls), source=source)

    def to_json(self) -> dict[str, Any]:
        """Return the object of ``run.json``, with every field that it was read with and this version does not know."""
        return encode(self, self.source)

    @property
    def ended(self) -> bool:
        """Whether the folder holds the result of the run, and the record all its figures."""
        return self.status in ENDED and None not in (self.model, self.editor, self.edits, self.sites)

    @property
    def report(self) -> RunReport:
        """The report of a run that :attr:`ended`."""
        assert self.edits is not None
        return RunReport(
            status=self.status,
            model=self.model or "",
            editor=self.editor or "",
            stabilizers=self.stabilizers or (),
            read=self.edits.read,
            applied=self.edits.applied,
            rejected=tuple(Rejection(r.id, r.reason, r.line, r.superseded_by) for r in self.rejected or ()),
            efficacy=encode(self.efficacy) or {},
            generalization=encode(self.generalization),
            specificity=encode(self.specificity),
            protocols=encode(self.protocols) or {},
            sites=tuple(SiteReport(**encode(site)) for site in self.sites or ()),
            seconds={name: value or 0.0 for name, value in (self.seconds or {}).items()},
            out=self.out or "",
            stopped_by=self.stopped_by or self.verdict,
            already_true=self.already_true or (),
        )


def record_text(value: Mapping[str, Any]) -> str:
    """Return the text of ``run.json``; raise :class:`UnreadableError` where it could not be read again.

    Where hundreds of thousands of edits were not written, it names the first ones: ``rejected.jsonl`` has them all, and
    the journal those that were true already.
    """
    for listed in LISTED:
        shorter = {name: value[name][:listed] for name in ("rejected", "already_true") if value.get(name)}
        try:
            return to_text({**value, **shorter}, RunRecord.from_json)
        except TooLargeError:
            if listed == LISTED[-1]:
                raise
    raise AssertionError("the last one returns or raises")


def refuse_link(path: Path) -> None:
    """Raise :class:`StateError` where a part of the record is a link: what it leads to would be written to."""
    if path.is_symlink():
        raise StateError(f"{path} is a symbolic link, which editcli does not follow to write; put a copy there")


def record_to_resume(folder: Path) -> RunRecord | None:
    """Return the record of a run that is to go on; raise :class:`StateError` where it cannot be read.

    The stream itself does not need it. But a run that went on would write another one in its place, without the first
    edits file, the reference text and the fields that only a newer version knows.
    """
    for path in (folder / RECORD, (folder / RECORD).parent):
        refuse_link(path)
    try:
        return read_record(folder)
    except StateError as error:
        raise StateError(f"{error}, or remove that file to go on without it") from error


def read_record(folder: Path) -> RunRecord | None:
    """Return the record of a folder, None where there is none; raise :class:`StateError` where it cannot be read."""
    path = folder / RECORD
    try:
        return RunRecord.from_json(read_json(path, folder=folder)) if is_there(path) else None
    except FileError as error:
        raise StateError(str(error)) from error
    except UnreadableError as error:
        raise StateError(
            f"{path} is not a record of a run that this editcli can read: {error}; restore it from a backup"
        ) from error
