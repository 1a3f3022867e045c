"""The model card that goes beside the weights: it names the base model and no path of the machine."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from editcli.health.verdict import Thresholds, judge
from editcli.linalg.ratios import shown
from editcli.reporting import RunReport
from editcli.settings.recipe import Recipe
from editcli.storage.opening import CONFIG, check

_NOT_REPEATED = ("edits", "settings", "out", "overwrite", "template_clock")
"""Settings that say where a run is and not what it does. A resumed run shows --resume: it continued a stream."""
_FILES = ("edits", "stats", "corpus")
_CARRIED = ("license", "license_name", "license_link", "language")
"""What a base model's card says that holds for its edited copy as well."""
_FLAGS = {"stabilizers": "stabilizer", "evaluate": "no-eval"}


def model_card(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], *, diagnostics: Mapping[str, float | None]
) -> str:
    """Return the README.md of an edited model: what was done, with what, and what it measured."""
    return "\n".join(_lines(report, recipe, provenance, diagnostics)) + "\n"


def carried(folder: Path) -> dict[str, Any]:
    """Return what the card in a base model's folder says of licence and language; empty where it says nothing."""
    from huggingface_hub import metadata_load

    path = folder / "README.md"
    if not path.is_file():
        return {}
    try:
        check(path, CONFIG, folder=folder)
        said = metadata_load(path) or {}
    # A card is written for people: one that no program can read, in whatever way, is no reason not to edit the model.
    except Exception:
        return {}
    return {name: said[name] for name in _CARRIED if _is_public(said.get(name))}


def front_matter(base: Mapping[str, Any], *, library: str, tags: tuple[str, ...]) -> list[str]:
    """Return the lines of a card that programs read: base model, licence, library and tags."""
    from huggingface_hub import ModelCardData

    said = base.get("card") or {}
    data = ModelCardData(
        # The hub refuses a card whose base_model is not a repository.
        base_model=public_name(base) if base.get("commit") else None,
        library_name=library,
        tags=["model-editing", "editcli", *tags],
        **{name: said[name] for name in _CARRIED if _is_public(said.get(name))},
    )
    return ["---", *data.to_yaml(line_break="\n").splitlines(), "---", ""]


def public_name(base: Mapping[str, Any]) -> str:
    """Return the name of a recorded base for other people: a hub id, or the last part of a folder's path."""
    name = str(base["name"])
    if base.get("commit"):
        return name
    last = Path(name).name
    return last if last not in ("", "..") else Path(str(base.get("folder") or name)).name or name


def shareable(recipe: Recipe, base: Mapping[str, Any]) -> Recipe:
    """Return a recipe for other people: names of files and folders in place of where they are on this machine."""
    files = {name: file_name(value) for name in _FILES if (value := getattr(recipe, name)) is not None}
    settings = {section: shareable_options(options) for section, options in recipe.settings.items()}
    # The out folder is not part of the command; an empty one would be filled in from the edits file.
    recipe = dataclasses.replace(recipe, **files, preset=shareable_preset(recipe.preset), settings=settings)
    if recipe.model is None:
        return recipe
    return dataclasses.replace(recipe, model=public_name(base), revision=base.get("commit") or recipe.revision)


def shareable_preset(preset: str | Mapping[str, Any] | None) -> str | dict[str, Any] | None:
    """Return a preset file's name without its folder; of the record of a preset all but the folder of its file."""
    if preset is None or isinstance(preset, str):
        return None if preset is None else file_name(preset)
    return {**preset, "file": file_name(str(preset["file"]))} if preset.get("file") else dict(preset)


def shareable_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a component with names of files in place of absolute paths."""
    return {key: _without_folder(value) for key, value in options.items()}


def file_name(text: str) -> str:
    """Return the last part of a path; a data set of the hub (``hf:ID``) has no path."""
    return text if text.startswith("hf:") else Path(text).name or text


def _without_folder(value: Any) -> Any:
    return file_name(value) if isinstance(value, str) and Path(value).expanduser().is_absolute() else value


def _is_public(value: Any) -> bool:
    """Tell whether a card's value is a text, or texts, and no path of somebody's machine."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(
        isinstance(text, str) and text and not text.startswith(("/", "~", "file:")) for text in texts
    )


def command_line(recipe: Recipe) -> str:
    """Return the command that repeats a run, with every setting that is not the default."""
    parts = ["editcli", "apply", recipe.edits]
    for setting in dataclasses.fields(Recipe):
        value = getattr(recipe, setting.name)
        if setting.name not in _NOT_REPEATED and value != setting.default:
            parts += _arguments(setting.name, value)
    for section, settings in recipe.settings.items():
        for key, value in settings.items():
            parts += ["-o", f"{section}.{key}={value}"]
    return shlex.join(parts)


def _arguments(name: str, value: Any) -> list[str]:
    """Return one setting as it is written on the command line."""
    flag = "--" + _FLAGS.get(name, name).replace("_", "-")
    if name == "preset" and isinstance(value, Mapping):
        # A recipe that was read from a record holds the preset itself; its file may be gone.
        value = value.get("file") or value.get("name")
    if name == "template_args":
        return [flag, json.dumps(value)]
    if name == "layers":
        return [flag, ",".join(map(str, value))]
    if isinstance(value, tuple):
        return [text for one in value for text in (flag, str(one))]
    return [flag] if isinstance(value, bool) else [flag, str(value)]


def _lines(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], diagnostics: Mapping[str, float | None]
) -> Iterator[str]:
    base = provenance["base"]
    yield from front_matter(base, library="transformers", tags=())
    yield f"# {public_name(base)}, with {counted(report.applied)}"
    yield ""
    yield from card_body(report, recipe, provenance, diagnostics)


def counted(applied: int) -> str:
    """Return a number of edits in words."""
    return f"{applied:,} edited fact{'' if applied == 1 else 's'}"


def _origin(base: Mapping[str, Any]) -> str:
    """Say which model was edited, and under which licence it is."""
    commit = f" at commit {base['commit']}" if base.get("commit") else ""
    licence = (base.get("card") or {}).get("license_name") or (base.get("card") or {}).get("license")
    said = f"Its licence, which holds for this copy as well: {licence}." if licence else "Its card names no licence."
    return f"The base model is `{public_name(base)}`{commit}. {said}"


def card_body(
    report: RunReport, recipe: Recipe, provenance: Mapping[str, Any], diagnostics: Mapping[str, float | None]
) -> Iterator[str]:
    """Yield the lines below a card's title."""
    method = " + ".join((report.editor, *report.stabilizers))
    yield f"Facts were rewritten inside the weights with [editcli](https://pypi.org/project/editcli/) ({method})."
    yield _origin(provenance["base"])
    command = command_line(shareable(recipe, provenance["base"]))
    yield from ("", "```", command, "```", "", "## Measured", "")
    yield from ("| figure | before | after |", "|---|---|---|")
    efficacy = report.efficacy
    for name in ("efficacy_accuracy", "efficacy_success"):
        yield f"| {name} | {_cell(efficacy.get('before'), name)} | {_cell(efficacy.get('retained'), name)} |"
    for name, figures in (("generalization", report.generalization), ("specificity", report.specificity)):
        if figures is not None:
            yield f"| {name}_success | {_cell(figures, 'before')} | {_cell(figures, 'after')} |"
            accuracy = figures["accuracy"]
            yield f"| {name}_accuracy | {_cell(accuracy, 'before')} | {_cell(accuracy, 'after')} |"
    yield from ("", "## Edited matrices", "", "R_n is the norm against the base's, drift the norm of the change.", "")
    yield from ("| module | R_n | drift | lost by the cast | verdict |", "|---|---|---|---|---|")
    for site in report.sites:
        word = judge(Thresholds(), ratio=site.ratio, drift=site.drift).word or "n/a"
        figures = " | ".join((shown(site.ratio, ".4f"), shown(site.drift, ".4f"), f"{site.cast_loss:.1e}"))
        yield f"| `{site.module}` | {figures} | {word} |"
    if diagnostics:
        yield from ("", "## Diagnostics of the last batch", "", "| figure | value |", "|---|---|")
        yield from (f"| {name} | {_figure(value)} |" for name, value in diagnostics.items())
    yield from ("", "## Options in force", "", "```json")
    options = {"targets": provenance["targets"], **provenance["options"]}
    yield json.dumps({name: shareable_options(section) for name, section in options.items()}, indent=2)
    yield from ("```", "", "## Known limits", "")
    yield "The edits are associations at the subject's last token: paraphrases that name the subject otherwise, and"
    yield "facts that follow from the edited ones, may still be answered as before. Everything was measured on the"
    yield "prompts of the edits file only; general ability was not. `editcli/run.json` has the full record."


def _figure(value: float | None) -> str:
    """Write a figure; the journal keeps one that is not finite as null."""
    return "n/a" if value is None else f"{value:.4g}"


def _cell(figures: Mapping[str, Any] | None, name: str) -> str:
    value = None if figures is None else figures.get(name)
    return "n/a" if value is None else f"{value:.3f}"
