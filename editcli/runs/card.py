"""The model card that goes beside the weights: it names the base model and no path of the machine."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from editcli.formatting import number, plural
from editcli.health.verdict import Thresholds, judge
from editcli.records.record import BaseRef, Provenance
from editcli.reporting import RunReport
from editcli.settings.recipe import Recipe
from editcli.settings.setting import Setting, settings_of
from editcli.storage.opening import CONFIG, check, expanded

_FILES = ("edits", "stats", "corpus")
_CARRIED = ("license", "license_name", "license_link", "language")
"""Fields of a base model's card that hold for its edited copy as well."""


def model_card(
    report: RunReport, recipe: Recipe, provenance: Provenance, *, diagnostics: Mapping[str, float | None]
) -> str:
    """Return the README.md of an edited model: what was done, with what, and what it measured."""
    base = provenance.base
    title = f"# {public_name(base)}, with {plural(report.applied, 'edited fact')}"
    body = [title, "", *card_body(report, recipe, provenance, diagnostics)]
    return card_text(base, body, library="transformers")


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


def card_text(base: BaseRef, body: Iterable[str], *, library: str, tags: tuple[str, ...] = ()) -> str:
    """Return a card: base model, licence, library and tags for programs, then the lines of ``body`` for people."""
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        # The hub refuses a card whose base_model is not a repository.
        base_model=public_name(base) if base.commit else None,
        library_name=library,
        tags=["model-editing", "editcli", *tags],
        **{name: base.card[name] for name in _CARRIED if _is_public(base.card.get(name))},
    )
    front = data.to_yaml(line_break="\n")
    return str(ModelCard("\n".join(["---", front, "---", "", *body, ""])))


def public_name(base: BaseRef) -> str:
    """Return the name of a recorded base for other people: a hub id, or the last part of a folder's path."""
    if base.commit:
        return base.name
    last = Path(base.name).name
    return last if last not in ("", "..") else Path(base.folder or base.name).name or base.name


def shareable(recipe: Recipe, base: BaseRef) -> Recipe:
    """Return a recipe for other people: names of files and folders in place of where they are on this machine."""
    files = {name: file_name(value) for name in _FILES if (value := getattr(recipe, name)) is not None}
    settings = {section: shareable_options(options) for section, options in recipe.settings.items()}
    # The out folder is not part of the command; an empty one would be filled in from the edits file.
    recipe = dataclasses.replace(recipe, **files, preset=shareable_preset(recipe.preset), settings=settings)
    if recipe.model is None:
        return recipe
    return dataclasses.replace(recipe, model=public_name(base), revision=base.commit or recipe.revision)


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
    return file_name(value) if isinstance(value, str) and expanded(value).is_absolute() else value


def _is_public(value: Any) -> bool:
    """Tell whether a card's value is a text, or texts, and no path of somebody's machine."""
    texts = value if isinstance(value, list) else [value]
    return bool(texts) and all(
        isinstance(text, str) and text and not text.startswith(("/", "~", "file:")) for text in texts
    )


def command_line(recipe: Recipe) -> str:
    """Return the command that repeats a run elsewhere, with every setting that is not the default.

    A resumed run shows ``--resume``: it continued a stream.
    """
    parts = ["editcli", "apply", recipe.edits]
    for name, setting in settings_of(Recipe).items():
        value = getattr(recipe, name)
        elsewhere = setting.place and setting.folder
        if setting.default is not ... and value != setting.default and not elsewhere:
            parts += _arguments(setting, value)
    for section, settings in recipe.settings.items():
        for key, value in settings.items():
            parts += ["-o", f"{section}.{key}={value}"]
    return shlex.join(parts)


def _arguments(setting: Setting, value: Any) -> list[str]:
    """Return one setting as it is written on the command line."""
    name, flag = setting.name, setting.flag
    if name == "preset" and isinstance(value, Mapping):
        # A recipe that was read from a record holds the preset itself; its file may be gone.
        value = value.get("file") or value.get("name")
    if name == "template_args":
        return [flag, json.dumps(value)]
    if name == "layers":
        return [flag, ",".join(map(str, value))]
    if isinstance(value, tuple):
        return [text for one in value for text in (flag, str(one))]
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    return [flag, str(value)]


def _origin(base: BaseRef) -> str:
    """Say which model was edited, and under which licence it is."""
    commit = f" at commit {base.commit}" if base.commit else ""
    licence = base.card.get("license_name") or base.card.get("license")
    said = f"Its licence, which holds for this copy as well: {licence}." if licence else "Its card names no licence."
    return f"The base model is `{public_name(base)}`{commit}. {said}"


def card_body(
    report: RunReport, recipe: Recipe, provenance: Provenance, diagnostics: Mapping[str, float | None]
) -> Iterator[str]:
    """Yield the lines below a card's title."""
    method = " + ".join((report.editor, *report.stabilizers))
    yield f"Facts were rewritten inside the weights with [editcli](https://pypi.org/project/editcli/) ({method})."
    yield _origin(provenance.base)
    command = command_line(shareable(recipe, provenance.base))
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
        figures = " | ".join((number(site.ratio, ".4f"), number(site.drift, ".4f"), f"{site.cast_loss:.1e}"))
        yield f"| `{site.module}` | {figures} | {word} |"
    if diagnostics:
        yield from ("", "## Diagnostics of the last batch", "", "| figure | value |", "|---|---|")
        yield from (f"| {name} | {_figure(value)} |" for name, value in diagnostics.items())
    yield from ("", "## Options in force", "", "```json")
    options = {"targets": provenance.targets, **provenance.options}
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
