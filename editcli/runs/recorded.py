"""Read from a run's ``run.json`` what it takes to repeat the run, with everything spelled out that a preset decided."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from editcli.errors import OptionError, StateError
from editcli.options import merge
from editcli.recipe import DTYPES, Recipe

ENDED = ("done", "stopped")
"""States of a run whose weights were saved as a result."""
ENVIRONMENT = ("versions", "plugins", "device", "dtype", "threads")
"""What may make two runs of one recipe round differently."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """A run as its record tells it: what was asked for, of what, and what came out."""

    file: Path
    recipe: Recipe
    """The run's own recipe, for an output folder of its own."""
    base: str
    """Fingerprint of the base model."""
    edits: str
    """sha256 of the edits file; empty when the edits came from a program."""
    consumed: str
    """Rolling hash over the edits in force."""
    weights: Mapping[str, str]
    """sha256 of every edited tensor as saved, by its name in the checkpoint."""
    environment: Mapping[str, Any]


def read_recorded(file: Path) -> Recorded:
    """Read a ``run.json``; raises :class:`StateError` where it does not tell enough to repeat the run."""
    try:
        record = json.loads(file.read_text("utf-8"))
        return _recorded(file, record, record["provenance"])
    except OSError as error:
        raise StateError(f"{file} cannot be read: {error.strerror or error}; pass OUT/editcli/run.json") from error
    except KeyError as error:
        raise StateError(
            f"{file} does not record {error}, so the run cannot be repeated from it; repeat it with the editcli that "
            "wrote it"
        ) from error
    except (ValueError, TypeError, AttributeError, RecursionError, OptionError) as error:
        raise StateError(f"{file} is not the record of a run: {error}") from error


def _recorded(file: Path, record: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recorded:
    if record["status"] not in ENDED:
        raise StateError(f"the run of {file} did not end; finish it with 'editcli apply' and --resume first")
    if not provenance["weights"]:
        raise StateError(f"the run of {file} holds no edit, so there is nothing to repeat")
    if provenance["pilots"]["sha256"] != provenance["edits"]["sha256"]:
        raise StateError(f"the run of {file} read several edits files, so no single recipe repeats it")
    return Recorded(
        file=file,
        recipe=_recipe(record, provenance),
        base=provenance["base"]["fingerprint"],
        edits=provenance["edits"]["sha256"],
        consumed=provenance["consumed"],
        weights=dict(provenance["weights"]),
        environment={name: provenance[name] for name in ENVIRONMENT},
    )


def _recipe(record: Mapping[str, Any], provenance: Mapping[str, Any]) -> Recipe:
    """Return the recipe with the layers, sizes and options that were in force."""
    recipe, base = Recipe.from_json(record["recipe"]), provenance["base"]
    own = {name: provenance[name] for name in ("targets", "statistics")}
    return replace(
        recipe,
        # A recorded folder is where the model was; a hub id and its commit find it elsewhere too.
        model=base["folder"] if recipe.model is not None and Path(base["folder"]).is_dir() else recipe.model,
        revision=base.get("commit") or recipe.revision,
        editor=record["editor"],
        layers=tuple(provenance["layers"]),
        batch_size=provenance["batch_size"],
        dtype=provenance["dtype"] if provenance["dtype"] in DTYPES else recipe.dtype,
        settings=merge(recipe.settings, provenance["options"], own),
        out=f"{recipe.folder.name}-repeated",
        resume=False,
        overwrite=False,
        # A record may come from a stranger, and whether a model's own code may run is not for it to say.
        trust_remote_code=False,
    )
