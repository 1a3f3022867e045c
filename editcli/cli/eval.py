"""``editcli eval``: measure edits on a model."""

from __future__ import annotations

from typing import Any

import click

from editcli.cli.apply_options import COUNT, code_options, device_options, reading_options, seed_option
from editcli.cli.common import App, Command, CommaSeparated, json_option, option, print_json, split_commas
from editcli.cli.settings import config_option

METRICS_HELP = (
    "counterfact, zsre, knowedit, fluency, consistency; repeat it.  [default: what the records have fields for]"
)
BASE_HELP = (
    "Measure the base as well, and what the edits cost in general ability. A run knows its base: a bare --base, after "
    "the arguments, is enough; else --base=MODEL."
)
HARNESS_HELP = (
    "Run a task of lm-evaluation-harness as well, its name or YAML file, on the base too with --base; repeat it. EDITS "
    "may then be left out."
)


@click.command(cls=Command, shared=True)
@click.argument("model", metavar="MODEL")
@click.argument("edits", metavar="[EDITS.jsonl]", required=False)
@option("--base", is_flag=False, flag_value="own", env=False, metavar="[MODEL]", section="Measure", help=BASE_HELP)
@option(
    "--metrics",
    multiple=True,
    type=CommaSeparated(),
    callback=split_commas,
    metavar="NAME",
    section="Measure",
    help=METRICS_HELP,
)
@option("--sample", type=COUNT, section="Measure", help="Measure N edits, drawn by --seed, not all.")
@option("--text", metavar="FILE", section="Measure", help="Text for --base.  [default: the bundled held-out text]")
@option(
    "--harness",
    multiple=True,
    env=False,
    type=CommaSeparated(),
    callback=split_commas,
    metavar="TASK",
    section="Measure",
    help=HARNESS_HELP,
)
@option(
    "--harness-include",
    multiple=True,
    env=False,
    type=click.Path(exists=True, file_okay=False),
    metavar="DIR",
    section="Measure",
    help="Folder with more tasks; repeat it. A task's file may bring code, which then runs.",
)
@seed_option("Measure")
@reading_options
@device_options
@code_options
@option("--out", env=False, metavar="FILE", section="Output", help="Write every edit's raw numbers as JSON lines.")
@json_option
@config_option
@click.pass_obj
def eval_(app: App, /, as_json: bool, **values: Any) -> None:
    """Measure the edits of EDITS.jsonl on MODEL, a folder, a hub id or 'bundled': nothing is changed.

    Every number stands under its protocol's name; one whose fields the file does not have is null.
    """
    if values["edits"] is None and not (values["harness"] or values["base"]):
        raise click.UsageError("give EDITS.jsonl, or what else to measure: --harness or --base")
    from editcli.commands.evaluate import EvalRecipe, measure
    from editcli.distributed.group import joined

    with joined(app.launch, device=values["device"], device_map=values["device_map"]) as team:
        found = measure(EvalRecipe(**values), app.plugins, app.reporter, team=team)
    if not app.launch.leads:
        return
    if as_json:
        print_json(found.to_json())
        return
    from editcli.render.eval import evaluation_table

    app.show(evaluation_table(found))
