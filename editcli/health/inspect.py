"""The editable matrices of a model and their health; read from its files, without loading the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from editcli.errors import ModelError, OptionError
from editcli.health.verdict import FINE, UNKNOWN, Thresholds, Verdict, judge, parse_thresholds, since, worst
from editcli.linalg import spectra
from editcli.linalg.directions import change_along
from editcli.linalg.ratios import ratio
from editcli.linalg.spectra import Method, Similarity
from editcli.models.architectures import Architecture, Family, resolve, skeleton
from editcli.models.fit import check_fit
from editcli.models.loading import ModelSource, first_model, load_config, resolve_model
from editcli.plugin.interfaces import Site
from editcli.presets.loader import load_preset
from editcli.presets.record import Preset
from editcli.records.faults import faults, journal_faults
from editcli.records.history import History, TopEdit, read_history
from editcli.reporting import Reporter, Silent

BASE_TOLERANCE = 0.02
"""Relative difference of R_n, recorded against measured, above which the base must be another model."""
TOP_VALUES = 8
"""Leading singular values that are shown; charts get up to :data:`CURVE_POINTS` of them."""
CURVE_POINTS = 512
"""Singular values that are kept per matrix for a chart."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The figures to compute beyond the bare view; ``spectral`` includes ``norms``."""

    norms: bool = False
    spectral: bool = False
    tau: float = 0.1
    method: Method = "auto"
    layers: tuple[int, ...] | None = None
    """Only these layers; None is every layer of a model, every edited layer of a run."""
    thresholds: Thresholds = field(default_factory=Thresholds)

    def __post_init__(self) -> None:
        if not 0 < self.tau <= 1:
            raise OptionError(f"tau is a share of the singular values, above 0 and at most 1, not {self.tau}")


def wanted_from(values: Mapping[str, Any], *, plot: bool = False) -> Wanted:
    """Build :class:`Wanted` from the command's options; a base or a plot without figures asks for norms."""
    spectral = bool(values["spectral"])
    return Wanted(
        norms=bool(values["norms"] or values["base"] or plot or spectral),
        spectral=spectral,
        tau=values["tau"],
        method=values["svd"],
        layers=values["layers"],
        thresholds=parse_thresholds(values["thresholds"]),
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """Norms of one matrix, and its spectrum where asked for."""

    frobenius: float
    spectral: float
    error: float
    """Relative error of what is not exact; 0 when everything is."""
    effective_rank: float | None = None
    stable_rank: float | None = None
    k_tau: int | None = None
    values: tuple[float, ...] = ()
    """Leading singular values, descending."""
    curve: tuple[tuple[int, float], ...] = ()
    """Singular values for a chart: (index from 1, value), evenly thinned."""


@dataclass(frozen=True, slots=True)
class SiteInspection:
    """One editable matrix; figures that were not asked for, or have nothing to compare with, are None."""

    site: Site
    shape: tuple[int, int]
    """(d_out, d_in), whichever way round it is stored."""
    dtype: str
    in_preset: bool
    now: Figures | None = None
    base: Figures | None = None
    drift: float | None = None
    relative_change: float | None = None
    """Mean of |u_i^T (W_n - W_0) v_i| / sigma_i over the base's leading singular directions."""
    similarity: Similarity | None = None
    verdict: Verdict = UNKNOWN
    since: tuple[int, str] | None = None
    """The batch from which on the site is no longer fine, counted from 1, and its first edit; None when it is."""

    @property
    def ratio(self) -> float | None:
        """R_n = ||W_n|| / ||W_0||."""
        return _share(self.now and self.now.frobenius, self.base and self.base.frobenius)


@dataclass(frozen=True, slots=True)
class Inspection:
    """The result of ``inspect``; :meth:`to_json` is the contract of ``--json``."""

    model: str
    base: str | None
    family: str
    layers: int
    tied: bool
    preset: Preset
    sites: tuple[SiteInspection, ...]
    wanted: Wanted
    history: History | None = None
    top_edits: tuple[TopEdit, ...] = ()
    problems: tuple[str, ...] = ()
    """What cannot be read of the run's record, and is not shown."""

    @property
    def verdict(self) -> str | None:
        """The worst verdict of all sites."""
        return worst(site.verdict.word for site in self.sites)

    @property
    def statistics_bytes(self) -> int:
        """Memory for the second moments of the preset's sites, float64."""
        shapes = [one.site.moment_shape(one.shape[1]) for one in self.sites if one.in_preset]
        return sum(8 * math.prod(shape) for shape in shapes)

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON object (``schemas/inspect.schema.json``)."""
        return {
            "model": self.model,
            "base": self.base,
            "verdict": self.verdict,
            "family": self.family,
            "layers": self.layers,
            "tied_embeddings": self.tied,
            "preset": {"name": self.preset.name, "label": self.preset.label, "layers": list(self.preset.layers)},
            "statistics_bytes": self.statistics_bytes,
            "tau": self.wanted.tau if self.wanted.spectral else None,
            "sites": [_site_json(site) for site in self.sites],
            "top_edits": [edit.to_json() for edit in self.top_edits],
            "problems": list(self.problems),
        }


def inspect(
    model: str | Path | None,
    *,
    wanted: Wanted = Wanted(),
    base: str | Path | None = None,
    preset: str | None = None,
    device: torch.device | None = None,
    families: Sequence[Family] = (),
    reporter: Reporter | None = None,
) -> Inspection:
    """Inspect a model or a run folder; one tensor (and its base) is in memory at a time.

    ``preset`` is a preset file that is shown instead of the model's own preset.
    Raises :class:`ModelError` where the folder is no readable checkpoint or ``base`` is a model of other shapes.
    """
    reporter = reporter or Silent()
    source = resolve_model(model)
    history = read_history(source.folder)
    problems = _problems(history, wanted)
    for problem in problems:
        reporter.warn(problem)
    config = load_config(source)
    architecture = resolve(skeleton(config), families)
    check_fit(source.checkpoint, architecture.model, reporter)
    chosen = load_preset(config, architecture, preset)
    before = _base_source(base, history, reporter) if wanted.norms or wanted.spectral else None
    architecture = architecture.recorded(history.sites) if history else architecture
    reader = _Reader(source, before, architecture, wanted, device)
    layers = _layers(wanted, history, architecture)
    with reporter.phase("inspect", len(layers), "sites") as advance:
        sites = []
        for layer in layers:
            site = reader.site(layer, in_preset=layer in chosen.layers)
            sites.append(_dated(site, history, wanted.thresholds))
            advance(1)
    if base is None and history is not None and before is not None:
        _warn_of_other_base(history, sites, before, reporter)
    return Inspection(
        model=source.name,
        base=before.name if before else None,
        family=architecture.family.name,
        layers=architecture.layers,
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        preset=chosen,
        sites=tuple(sites),
        wanted=wanted,
        history=history,
        top_edits=history.top_edits() if history and (wanted.norms or wanted.spectral) else (),
        problems=problems,
    )


def _problems(history: History | None, wanted: Wanted) -> tuple[str, ...]:
    """Return what cannot be read of a run's record, as far as the figures that are asked for need it."""
    if history is None:
        return ()
    return tuple(faults(history)) if wanted.norms or wanted.spectral else tuple(journal_faults(history))


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads one site after the other, in the orientation (d_out, d_in)."""

    source: ModelSource
    base: ModelSource | None
    architecture: Architecture
    selection: Wanted
    device: torch.device | None

    def site(self, layer: int, *, in_preset: bool) -> SiteInspection:
        """Return one site with the selected figures."""
        site, shape = self.architecture.site(layer), self.architecture.shape(layer)
        checkpoint = self.source.checkpoint
        dtype = checkpoint.stored_as(checkpoint.weight_of(site.module))
        bare = SiteInspection(site, shape, dtype, in_preset)
        if not (self.selection.norms or self.selection.spectral):
            return bare
        weight = read_site(self.source, site, shape)
        if not bool(weight.isfinite().all()):
            return _nonfinite(bare)
        if self.base is None:
            return replace(bare, now=self._figures(weight, 0)[0])
        original = read_site(self.base, site, shape)
        drift = _share(spectra.distance(weight, original), spectra.frobenius(original))
        change = change_along(original, weight, device=self.device) if self.selection.spectral else None
        before, spectrum_before = self._figures(original, 0)
        del original  # Only the figures of the base are needed while the edited matrix is decomposed.
        now, spectrum_now = self._figures(weight, before.k_tau or 0)
        similarity = None
        if spectrum_before and spectrum_now and before.k_tau:
            similarity = spectra.similarity(spectrum_before, spectrum_now, before.k_tau)
        return replace(
            bare,
            now=now,
            base=before,
            drift=drift,
            relative_change=change,
            similarity=similarity,
            verdict=_verdict(self.selection.thresholds, now, before, drift),
        )

    def _figures(self, weight: Tensor, vectors: int) -> tuple[Figures, spectra.Spectrum | None]:
        """Return the figures of one matrix, with its spectrum when the selection asks for it."""
        selection = self.selection
        if not selection.spectral:
            value, error = spectra.spectral_norm(weight, method=selection.method, device=self.device)
            return Figures(spectra.frobenius(weight), value, error), None
        spectrum = spectra.spectrum(
            weight, tau=selection.tau, vectors=vectors, method=selection.method, device=self.device
        )
        return Figures(
            frobenius=spectrum.frobenius,
            spectral=spectrum.spectral,
            error=spectrum.error,
            effective_rank=spectrum.effective_rank,
            stable_rank=spectrum.stable_rank,
            k_tau=spectrum.k(selection.tau),
            values=tuple(spectrum.values[:TOP_VALUES].tolist()),
            curve=_thin(spectrum.values),
        ), spectrum


def read_site(source: ModelSource, site: Site, shape: tuple[int, int]) -> Tensor:
    """Read one editable matrix as stored, turned to (d_out, d_in); raise :class:`ModelError` on another shape."""
    checkpoint = source.checkpoint
    weight = checkpoint.read(checkpoint.weight_of(site.module))
    weight = site.oriented(weight)
    if tuple(weight.shape) != shape:
        raise ModelError(
            f"{site.module} of {source.name} is {tuple(weight.shape)}, not {shape}: this is another model; "
            "compare a model with the one it was edited from"
        )
    return weight


def _base_source(base: str | Path | None, history: History | None, reporter: Reporter) -> ModelSource | None:
    """Return the model to compare with: the one asked for, else the one that the run records."""
    if base is not None:
        return resolve_model(base)
    known = history.bases if history else ()
    source = first_model(known, convert=history is not None and history.converts)
    if source is None and known:
        reporter.warn(f"the base of this run, {known[-1]}, is not where it was; pass --base to compare with it")
    return source


def _warn_of_other_base(
    history: History, sites: Sequence[SiteInspection], base: ModelSource, reporter: Reporter
) -> None:
    """Warn when the model in the recorded place is not the one that was edited: then no comparison means anything."""
    for site in sites:
        recorded = history.recorded_ratio(site.site.module)
        if recorded and site.ratio is not None and not math.isclose(site.ratio, recorded, rel_tol=BASE_TOLERANCE):
            reporter.warn(
                f"R_n of {site.site.module} was {recorded:.4g} when the run was saved and is {site.ratio:.4g} now: "
                f"{base.name} is not the model that was edited any more; pass --base with the right one"
            )
            return


def _layers(selection: Wanted, history: History | None, architecture: Architecture) -> tuple[int, ...]:
    if selection.layers is not None:
        return selection.layers
    if history is not None and history.layers:
        return history.layers
    return tuple(range(architecture.layers))


def _verdict(thresholds: Thresholds, now: Figures, base: Figures, drift: float | None) -> Verdict:
    return judge(
        thresholds,
        ratio=_share(now.frobenius, base.frobenius),
        drift=drift,
        spectral=_share(now.spectral, base.spectral),
        rank=_share(now.effective_rank, base.effective_rank),
    )


def _dated(site: SiteInspection, history: History | None, thresholds: Thresholds) -> SiteInspection:
    """Add the batch since which a site is no longer fine."""
    if history is None or site.verdict.word in (None, FINE):
        return site
    batch = since(history.batches, site.site.module, thresholds)
    return site if batch is None else replace(site, since=(batch.step, batch.edits[0]))


def _nonfinite(bare: SiteInspection) -> SiteInspection:
    return replace(bare, verdict=judge(Thresholds(), ratio=math.nan))


def _share(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else ratio(part, whole)


def _thin(values: Tensor) -> tuple[tuple[int, float], ...]:
    """Keep at most :data:`CURVE_POINTS` values, the first and the last among them."""
    count = min(len(values), CURVE_POINTS)
    places = torch.linspace(0, len(values) - 1, count).round().long().unique().tolist() if count else []
    return tuple((place + 1, float(values[place])) for place in places)


def _site_json(site: SiteInspection) -> dict[str, Any]:
    now, base, similarity = site.now, site.base, site.similarity
    return {
        "module": site.site.module,
        "layer": site.site.layer,
        "shape": list(site.shape),
        "frobenius": now and now.frobenius,
        "spectral": now and now.spectral,
        "base_frobenius": base and base.frobenius,
        "ratio": site.ratio,
        "drift": site.drift,
        "relative_change": site.relative_change,
        "effective_rank": now and now.effective_rank,
        "stable_rank": now and now.stable_rank,
        "k_tau": now and now.k_tau,
        "ls": similarity and similarity.ls,
        "ss": similarity and similarity.ss,
        "dtype": site.dtype,
        "in_preset": site.in_preset,
        "verdict": site.verdict.word,
        "reasons": list(site.verdict.reasons),
        "since": site.since and {"step": site.since[0], "edit": site.since[1]},
        "error": None if now is None else max(now.error, base.error if base else 0.0),
        "singular_values": list(now.values) if now and now.values else None,
        "base_spectral": base and base.spectral,
        "base_effective_rank": base and base.effective_rank,
        "base_stable_rank": base and base.stable_rank,
        "base_k_tau": base and base.k_tau,
        "ss_left": similarity and similarity.ss_left,
        "ss_right": similarity and similarity.ss_right,
        "principal_angles": similarity and _angles_json(similarity),
    }


def _angles_json(similarity: Similarity) -> dict[str, float]:
    """Return the principal angles' means and maxima, in degrees."""
    left, right = similarity.angles_left, similarity.angles_right
    return {
        "left_mean": sum(left) / len(left),
        "left_largest": left[-1],
        "right_mean": sum(right) / len(right),
        "right_largest": right[-1],
    }
