"""Compute a model's second moments ahead of time, and list the cache: the library part of ``stats``."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path
from safetensors import SafetensorError

from editcli.distributed.team import Team, agree_on_inputs, agree_on_models
from editcli.errors import EditError, StatisticsError
from editcli.models.architectures import Family
from editcli.models.hub import lacks_weights
from editcli.models.loading import Loading, describe_model, open_model, resolve_model
from editcli.plugin.interfaces import Site
from editcli.presets.loader import load_preset
from editcli.reporting import Reporter, Silent
from editcli.settings.recipes import MomentsRecipe
from editcli.statistics.moments import Identity, SecondMoments
from editcli.storage.checkpoint import opened_tensors


@dataclass(frozen=True, slots=True)
class Stored:
    """The second moment of one site, as it lies on disk."""

    module: str
    width: int
    """d_in, the width of a key."""
    tokens: int
    corpus: str
    """Identity of the text: the hash of a file, or ``hf:...``, or ``self:...``."""
    dtype: str
    bytes: int
    path: str
    computed: bool = False
    """True when this call computed it, False when it was there."""


@dataclass(frozen=True, slots=True)
class MomentsReport:
    """Second moments of one model, or of all models for ``model`` None."""

    model: str | None
    sites: tuple[Stored, ...]
    seconds: float = 0.0
    out: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        sites = [asdict(site) for site in self.sites]
        return {"model": self.model, "sites": sites, "seconds": round(self.seconds, 3), "out": self.out}


def compute(
    recipe: MomentsRecipe,
    families: Sequence[Family] = (),
    reporter: Reporter | None = None,
    *,
    team: Team | None = None,
) -> MomentsReport:
    """Compute what is missing, in one pass over the text, and return where everything lies.

    Every process of ``team`` calls this alike and reads a share of the text; rank 0 alone writes, and keeps the cache.
    """
    team = team or Team()
    reporter = reporter if reporter is not None and team.leads else Silent()
    source = resolve_model(recipe.model, revision=recipe.revision, code=recipe.trust_remote_code)
    loaded = open_model(source, Loading.of(recipe), families=families, reporter=reporter)
    layers = recipe.layers or load_preset(loaded.model.config, loaded.architecture, recipe.preset).layers
    loaded = replace(loaded, architecture=replace(loaded.architecture, routed=recipe.experts))
    sites = [loaded.architecture.site(layer) for layer in layers]
    dense = next((site.layer for site in sites if recipe.experts and not site.experts), None)
    if dense is not None:
        raise StatisticsError(f"layer {dense} has no routed experts; choose other --layers or leave out --experts")
    moments = SecondMoments(
        loaded, options=recipe.options, corpus=recipe.corpus, reporter=reporter, seed=recipe.seed, team=team
    )
    agree_on_inputs(team, "recipe and text", {"recipe": asdict(recipe), "text": moments.corpus.identity})
    if team.size > 1:
        # Hashing the checkpoint is only needed to compare ranks.
        agree_on_models(team, [loaded.checkpoint.fingerprint()])
    started = time.perf_counter()
    missing = moments.missing(sites)
    if missing and recipe.out is None and not all(team.lead("cache", lambda: [moments.files.is_writable()])):
        raise StatisticsError(f"the cache {moments.cache} cannot be written; write to a file with --out FILE")
    if missing:
        moments.compute(missing)
    seconds = time.perf_counter() - started
    if recipe.out is not None:
        _save(moments, Path(recipe.out), sites)
    cached = team.lead("cached moments", lambda: [asdict(stored) for stored in _of(moments, sites, recipe.out)])
    by_module = {item["module"]: Stored(**item) for item in cached}
    stored = [replace(by_module[s.module], computed=s in missing) for s in sites if s.module in by_module]
    return MomentsReport(source.name, tuple(stored), seconds, recipe.out)


def show(
    model: str | None,
    *,
    revision: str | None = None,
    families: Sequence[Family] = (),
    trust_remote_code: bool = False,
) -> MomentsReport:
    """List the second moments in the cache: those of ``model``, or of every model for None. Loads no weights."""
    if model is None:
        return MomentsReport(None, tuple(stored for stored, _ in _cached(cache_folder())))
    source = resolve_model(model, revision=revision, weights=False, code=trust_remote_code)
    if lacks_weights(source.folder):
        # No moments were computed from weights that were never downloaded; do not fetch them to report that.
        return MomentsReport(source.name, ())
    loaded = describe_model(source, Loading(trust_remote_code=trust_remote_code), families)
    moments = SecondMoments(loaded)
    architectures = [replace(loaded.architecture, routed=routed) for routed in (False, True)]
    sites = [one.site(layer) for one in architectures for layer in range(one.layers)]
    cached = {identity.module for _, identity in _cached(moments.cache)}
    models = {moments.identity(site).model for site in sites if site.module in cached}
    stored = [stored for stored, identity in _cached(moments.cache) if identity.model in models]
    return MomentsReport(source.name, tuple(stored))


def cache_folder() -> Path:
    """Return the folder of the cache."""
    return user_cache_path("editcli") / "second-moments"


def _save(moments: SecondMoments, path: Path, sites: Sequence[Site]) -> None:
    try:
        moments.save(path, sites)
    except OSError as error:
        raise StatisticsError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error


def _of(moments: SecondMoments, sites: Sequence[Site], out: str | None) -> Iterator[Stored]:
    """Yield what there is on ``sites``: in the cache, or only in the file ``out`` where the cache cannot be written."""
    fingerprints = {moments.identity(site).fingerprint for site in sites}
    yield from (stored for stored, identity in _cached(moments.cache) if identity.fingerprint in fingerprints)
    if out is None:
        return
    for site, moment in moments.uncached.items():
        identity, size = moments.identity(site), moment.numel() * moment.element_size()
        yield Stored(site.module, _width(moment.shape), identity.tokens, identity.corpus, identity.dtype, size, out)


def _cached(folder: Path) -> Iterator[tuple[Stored, Identity]]:
    """Yield what lies in the cache, by module; skip files that cannot be read."""
    items = [item for path in folder.glob("*.safetensors") if (item := _read(path)) is not None]
    yield from sorted(items, key=lambda item: (item[1].tokenizer, item[1].corpus, natural(item[0].module)))


def natural(name: str) -> list[tuple[int, str]]:
    """Return a sort key that puts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _width(shape: Sequence[int]) -> int:
    """Return d_in of a second moment; that of experts counts their tokens in a row and a column more."""
    return shape[0] if len(shape) == 2 else shape[0] * (shape[1] - 1)


def _read(path: Path) -> tuple[Stored, Identity] | None:
    try:
        with opened_tensors(path) as file:
            identity = Identity(**json.loads((file.metadata() or {})["identity"]))
            (name,) = file.keys()
            width = _width(file.get_slice(name).get_shape())
    except (SafetensorError, EditError, OSError, ValueError, KeyError, TypeError):
        return None
    stored = Stored(
        module=identity.module,
        width=width,
        tokens=identity.tokens,
        corpus=identity.corpus,
        dtype=identity.dtype,
        bytes=path.stat().st_size,
        path=str(path),
    )
    return stored, identity
