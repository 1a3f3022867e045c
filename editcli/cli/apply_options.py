"""The options of ``editcli apply``, in the sections in which ``--help`` shows them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from editcli.cli.common import CommaSeparated, JsonObject, LayerRange, option, split_commas
from editcli.settings.recipe import DTYPES, ON_ERROR, PARALLEL

COUNT = click.IntRange(min=1)


def model_options(command: Any) -> Any:
    """Add which model to edit and how to load it."""
    return _stack(command, source_options, device_options, parallel_option, code_options)


def source_options(command: Any) -> Any:
    """Add which model to take."""
    return _stack(
        command,
        option(
            "--model", "-m", metavar="MODEL", section="Model", help="Folder or hub id.  [default: the bundled model]"
        ),
        option("--revision", metavar="REVISION", section="Model", help="Branch, tag or commit of a hub id."),
    )


def device_options(command: Any) -> Any:
    """Add where and how a model is loaded."""
    return _stack(
        command,
        option(
            "--device",
            default="auto",
            show_default=True,
            metavar="DEVICE",
            section="Model",
            help="Where to compute: auto, cpu, cuda, cuda:1, mps.",
        ),
        option(
            "--device-map",
            metavar="MAP",
            section="Model",
            help="Spread the model over devices: auto, balanced, sequential (needs accelerate).",
        ),
        option(
            "--dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            section="Model",
            help="Type to run in; auto is float32 on a CPU, else the checkpoint's. Edited matrices are float32 anyway.",
        ),
    )


def parallel_option(command: Any) -> Any:
    """Add what several processes share."""
    return option(
        "--parallel",
        type=click.Choice(PARALLEL),
        default="data",
        show_default=True,
        section="Model",
        help="What the processes of torchrun share: the edits, or the matrices of a model too large for one device.",
    )(command)


def code_options(command: Any) -> Any:
    """Add how the model's own files are used."""
    return _stack(
        command,
        option(
            "--chat-template/--no-chat-template",
            section="Model",
            help="Edit and measure inside the model's chat template.",
        ),
        option(
            "--system",
            metavar="TEXT",
            section="Model",
            help="System message in the chat template, in front of every prompt.",
        ),
        option(
            "--template-args",
            type=JsonObject(),
            metavar="JSON",
            section="Model",
            help="Variables of the chat template, such as '{\"enable_thinking\": false}'.",
        ),
        trust_options,
    )


def trust_options(command: Any) -> Any:
    """Add whether a model's own code may run; never taken from a file or a variable."""
    return option(
        "--trust-remote-code",
        is_flag=True,
        env=False,
        section="Model",
        help="Run the code that comes with the model. It can do anything you can.",
    )(command)


def method_options(command: Any) -> Any:
    """Add how to edit."""
    return editing_options("100; 1 for rome")(command)


def editing_options(batches: str) -> Callable[[Any], Any]:
    """Return the options on how to edit, for a command whose batches are of ``batches`` edits by default."""
    return lambda command: _stack(
        command,
        editor_option,
        option(
            "--stabilizer",
            "-s",
            "stabilizers",
            type=CommaSeparated(),
            callback=split_commas,
            multiple=True,
            section="Method",
            help="What keeps a stream of edits from wrecking the model; repeat it: they act in the order given.",
        ),
        preset_option("Method"),
        option(
            "--layers",
            type=LayerRange(),
            section="Method",
            help="Layers to edit, such as 4-8 or 4-8,10.  [default: the preset's]",
        ),
        option(
            "--batch-size",
            "-b",
            type=COUNT,
            section="Method",
            help=f"Edits written at once.  [default: {batches}]",
        ),
        assignments_option,
        option(
            "--stats",
            metavar="FILE",
            section="Method",
            help="Statistics file to use instead of computing or looking one up.",
        ),
        option(
            "--solve-device",
            metavar="DEVICE",
            section="Method",
            help="Device for the edited matrices and their solves.  [default: where the edited layers are]",
        ),
        option(
            "--corpus",
            metavar="TEXT",
            section="Method",
            help="Text of the statistics: english, a file, hf:ID[:CONFIG], or self, which the model writes.",
        ),
        seed_option("Method"),
    )


def editor_option(command: Any) -> Any:
    """Add which editor writes."""
    return option(
        "--editor",
        "-e",
        metavar="NAME",
        section="Method",
        help="What turns facts into updates.  [default: the preset's, or rlsedit]",
    )(command)


def assignments_option(command: Any) -> Any:
    """Add the options of methods."""
    return option(
        "-o",
        "--option",
        "assignments",
        multiple=True,
        env=False,
        metavar="NAME.KEY=VALUE",
        section="Method",
        help="Set an option of a method; repeat it. 'editcli plugins NAME' lists them.",
    )(command)


def preset_option(section: str) -> Callable[[Any], Any]:
    """Return the option for a preset file."""
    return option(
        "--preset",
        metavar="FILE",
        section=section,
        help="Preset file with layers and settings, as tune writes it.  [default: the model's own preset]",
    )


def seed_option(section: str) -> Callable[[Any], Any]:
    """Return the option for what is drawn at random."""
    return option(
        "--seed", type=click.IntRange(min=0), default=0, show_default=True, section=section, help="Random seed."
    )


def tau_option(section: str) -> Callable[[Any], Any]:
    """Return the option for how much of a spectrum counts as dominant."""
    return option(
        "--tau",
        type=float,
        default=0.1,
        show_default=True,
        metavar="SHARE",
        section=section,
        help="Share of the spectrum for k(tau).",
    )


def output_options(command: Any) -> Any:
    """Add where the result goes."""
    return _stack(
        command,
        option(
            "--out",
            default="",
            metavar="DIR",
            section="Output",
            help="Folder to write.  [default: <edits stem>-edited]",
        ),
        option(
            "--overwrite", is_flag=True, env=False, section="Output", help="Replace DIR if an earlier run wrote it."
        ),
        option(
            "--resume",
            is_flag=True,
            env=False,
            section="Output",
            help="Continue the run in DIR, with the same edits or more.",
        ),
        option(
            "--save-dtype",
            type=click.Choice(DTYPES),
            default="auto",
            show_default=True,
            section="Output",
            help="Type of the edited tensors in the file; auto is the checkpoint's own.",
        ),
    )


def run_options(command: Any) -> Any:
    """Add how the run goes."""
    return _stack(
        command,
        option(
            "--dry-run", is_flag=True, env=False, section="Run", help="Check everything, print the plan, write nothing."
        ),
        reading_options,
        option("--checkpoint-every", type=COUNT, section="Run", help="Save the state every N batches."),
        option(
            "--stop-if",
            multiple=True,
            type=CommaSeparated(),
            callback=split_commas,
            metavar="EXPR",
            section="Run",
            help="Stop, with exit code 3, before writing a batch that makes this true; repeat it: ratio>2.5, drift>1, "
            "retained<0.6, efficacy<0.5, jump>0.5 (the change of R_n by one batch).",
        ),
        option(
            "--eval/--no-eval",
            "evaluate",
            envvar="EDITCLI_EVAL",
            default=True,
            show_default=True,
            section="Run",
            help="Measure before and after.",
        ),
        option("--eval-every", type=COUNT, section="Run", help="Measure what is retained every N batches."),
        option("--diagnose-every", type=COUNT, section="Run", help="Look at spectra every N batches."),
    )


def repeat_option(command: Any) -> Any:
    """Add the record of a run to repeat."""
    return option(
        "--recipe",
        "repeated",
        type=click.Path(dir_okay=False, path_type=Path),
        env=False,
        metavar="RUN.JSON",
        section="Run",
        help="Repeat the run of OUT/editcli/run.json and compare the weights.",
    )(command)


def reading_options(command: Any) -> Any:
    """Add which edits of a file to take."""
    return _stack(
        command,
        option("--limit", type=COUNT, section="Run", help="Take only the first N edits."),
        option(
            "--on-error",
            type=click.Choice(ON_ERROR),
            default="stop",
            show_default=True,
            section="Run",
            help="What to do with an edit that cannot be used: stop before writing anything, or skip and list it.",
        ),
    )


def _stack(command: Any, *options: Callable[[Any], Any]) -> Any:
    """Apply decorators so that the options appear in the order in which they are written here."""
    for decorate in reversed(options):
        command = decorate(command)
    return command
