"""``export``: a finished run becomes an adapter, a patch or a plain folder; ``apply_patch`` is the way back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from editcli.errors import ModelError, StateError
from editcli.export.adapter import write_adapter
from editcli.export.changes import SHARE, SiteChange, find_change
from editcli.export.efficacy import measure_adapter
from editcli.export.hub import check_destination, push
from editcli.export.patch import model_files, read_manifest, read_tensors, refuse_other_base, write_patch
from editcli.export.recipe import FULL, LORA, PATCH, ExportRecipe, PatchRecipe
from editcli.export.record import portable, read_record, write_card, write_record
from editcli.export.report import ExportReport, Measured, PatchReport, SiteExport, listed
from editcli.export.source import Edited, FinishedRun, open_run, with_base
from editcli.linalg.precision import double_device
from editcli.models.architectures import Family
from editcli.models.hub import fetch_patch
from editcli.models.loading import choose_device, refuse_unopenable, resolve_model
from editcli.plugin.manager import Plugins
from editcli.records.record import STOPPED
from editcli.reporting import Reporter, Silent
from editcli.runs.context import writing
from editcli.runs.output import needed_bytes, verify, write_model
from editcli.runs.planning import check_disk
from editcli.storage.checkpoint import Checkpoint
from editcli.storage.folders import new_folder, refuse_taken
from editcli.storage.opening import expanded


def export(recipe: ExportRecipe, plugins: Plugins, reporter: Reporter | None = None) -> ExportReport:
    """Write what ``recipe`` asks for, verified, and push it if asked; raises an :class:`~editcli.errors.EditError`."""
    reporter = reporter or Silent()
    # Refuse a taken folder before anything is computed.
    refuse_taken(recipe.folder)
    run = open_run(recipe.run)
    if run.status == STOPPED:
        reporter.note(f"The run in {recipe.run} was stopped by a guard; its last good state is exported")
    to = None
    if recipe.push is not None:
        to = check_destination(recipe.push, private=recipe.private, revision=recipe.revision)
    with writing(recipe.folder), new_folder(recipe.folder) as folder:
        report = _Export(recipe, run, folder, plugins.families(), reporter).write()
        run.refuse_changed()
    if to is None:
        return report
    message = f"{report.status.capitalize()}: {run.record.report.applied} edits as {recipe.format}"
    return replace(report, pushed=push(recipe.folder, to, message, reporter))


def apply_patch(recipe: PatchRecipe, reporter: Reporter | None = None) -> PatchReport:
    """Rebuild the edited model from its base and a patch, verified; raises an :class:`~editcli.errors.EditError`."""
    reporter = reporter or Silent()
    refuse_taken(recipe.folder)
    patch = _patch_folder(recipe.patch)
    manifest, record = read_manifest(patch), read_record(patch)
    source = resolve_model(recipe.base, code=recipe.trust_remote_code)
    base = source.checkpoint
    with reporter.phase("Checking", 2, "steps") as advance:
        refuse_other_base(base, source.name, manifest)
        advance(1)
        tensors = read_tensors(patch, manifest)
        advance(1)
    with writing(recipe.folder):
        check_disk(recipe.folder, needed_bytes(base))
        with new_folder(recipe.folder) as folder, reporter.phase("Writing", 2, "steps") as advance:
            write_model(base, folder, tensors)
            write_record(folder, record)
            write_card(folder, FULL, record)
            advance(1)
            verify(base.reopened(), folder, tensors)
            refuse_unopenable(folder, trust_remote_code=recipe.trust_remote_code)
            written = model_files(base.copy_in(folder))
            advance(1)
            files = listed(folder)
    different = sorted({name for name, _ in written.items() ^ manifest.files.items()})
    if different:
        reporter.warn(
            f"the base has other files than the run's beside the tensors that were checked ({', '.join(different)}), "
            "so the result is not the run's folder byte for byte"
        )
    return PatchReport(
        base=source.name,
        patch=recipe.patch,
        out=str(recipe.folder),
        files=files,
        tensors=tuple(tensors),
        different=tuple(different),
    )


class _Export:
    """One export into an empty folder."""

    def __init__(
        self,
        recipe: ExportRecipe,
        run: FinishedRun,
        folder: Path,
        families: tuple[Family, ...],
        reporter: Reporter,
    ):
        self.recipe, self.run, self.folder = recipe, run, folder
        self.families, self.reporter = families, reporter
        self.record = portable(run)
        self.sites: tuple[SiteExport, ...] = ()
        self.measured: Measured | None = None

    def write(self) -> ExportReport:
        """Write one of the formats and report it."""
        tensors = {LORA: self._lora, PATCH: self._patch, FULL: self._full}[self.recipe.format]()
        write_record(self.folder, self.record)
        write_card(self.folder, self.recipe.format, self.record, self.sites)
        return ExportReport(
            format=self.recipe.format,
            run=self.recipe.run,
            status=self.run.status,
            out=str(self.recipe.folder),
            base=self.record.provenance.base.name,
            files=listed(self.folder),
            tensors=tensors,
            sites=self.sites,
            efficacy=self.measured,
        )

    def _lora(self) -> tuple[str, ...]:
        edited = self._with_base()
        refuse_experts(edited)
        changes = [change for change in self._changes(edited) if change.report.rank]
        if not changes:
            raise StateError(f"what {self.run.path} changed is not above rounding, so there is nothing for an adapter")
        write_adapter(self.folder, changes, base=self._base_of(edited), revision=edited.source.commit)
        self.sites = tuple(change.report for change in changes)
        self._warn_truncated()
        if self.recipe.evaluate:
            self.measured = measure_adapter(
                edited, self.folder, self.recipe, families=self.families, reporter=self.reporter
            )
        return edited.changed

    def _changes(self, edited: Edited) -> list[SiteChange]:
        device = double_device(choose_device(self.recipe.device))
        layers, changes = self.run.history.layers, []
        with self.reporter.phase("Factoring", len(layers), "sites") as advance:
            for layer in layers:
                changes.append(find_change(edited, edited.architecture.site(layer), self.recipe.rank, device=device))
                advance(1)
        return changes

    def _warn_truncated(self) -> None:
        worst = max(self.sites, key=lambda site: site.relative_error)
        if all(site.exact for site in self.sites):
            return
        why = "--rank" if self.recipe.rank is not None else f"{SHARE:.0%} of a matrix's size"
        self.reporter.warn(
            f"the adapter holds the leading part of the change, up to {why}: relative error {worst.relative_error:.2g} "
            f"at {worst.module}; a higher --rank or --format patch loses less"
        )

    def _base_of(self, edited: Edited) -> str:
        """Return what an adapter names as its base: an id, or a path unless it leaves this machine."""
        if edited.source.commit is not None:
            return edited.source.name
        return str(edited.source.folder) if self.recipe.push is None else edited.source.folder.name

    def _patch(self) -> tuple[str, ...]:
        edited = self._with_base()
        write_patch(self.folder, edited, self.record)
        read_tensors(self.folder, read_manifest(self.folder))
        return edited.changed

    def _full(self) -> tuple[str, ...]:
        after = self.run.after
        check_disk(self.recipe.folder, needed_bytes(after))
        with self.reporter.phase("Copying", 2, "steps") as advance:
            write_model(after, self.folder, {})
            advance(1)
            if model_files(after.copy_in(self.folder)) != model_files(after):
                raise ModelError(f"what was written is not {self.run.path}; the disk may be faulty, export again")
            refuse_unopenable(self.folder, trust_remote_code=self.recipe.trust_remote_code)
            advance(1)
        return after.tensors_of(after.weight_of(module) for module in self.run.history.sites)

    def _with_base(self) -> Edited:
        refuse_packed(self.run.after, self.recipe.format)
        return with_base(
            self.run,
            self.recipe.base,
            self.reporter,
            families=self.families,
            trust_remote_code=self.recipe.trust_remote_code,
        )


def refuse_experts(edited: Edited) -> None:
    """Raise :class:`ModelError` for a run that edited routed experts: an adapter adds to the matrix of one module."""
    sites = [edited.architecture.site(layer) for layer in edited.run.history.layers]
    mixed = next((site for site in sites if site.experts), None)
    if mixed is not None:
        raise ModelError(
            f"{mixed.module} holds the matrices of {mixed.experts} experts, and an adapter adds to the matrix of one "
            "module; use --format patch or full"
        )


def refuse_packed(checkpoint: Checkpoint, form: str) -> None:
    """Raise :class:`ModelError` for a model whose weights are not plain tensors, which adapters and patches are for."""
    if type(checkpoint) is not Checkpoint:
        raise ModelError(
            f"the weights in {checkpoint.place} are packed, and a {form} belongs to plain ones; use --format full, or "
            "pass on the folder as it is"
        )


def _patch_folder(patch: str) -> Path:
    """Return the folder of a patch, fetched when it is a hub id."""
    folder = expanded(patch)
    if folder.exists() or "/" not in patch or patch.startswith((".", "/", "~")):
        return folder
    id, _, revision = patch.partition("@")
    return fetch_patch(id, revision or None)
