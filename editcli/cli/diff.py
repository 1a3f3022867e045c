"""``editcli diff``: how an edited model differs from its base."""

from __future__ import annotations

import click

from editcli.cli.common import App, Command, json_option, option, print_json
from editcli.cli.settings import config_option


@click.command(cls=Command)
@click.argument("base")
@click.argument("edited")
@option(
    "--ranks/--no-ranks",
    default=True,
    show_default=True,
    section="Comparison",
    help="Find the numerical rank of each difference.",
)
@option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    section="Generation",
    help="Show what both say to this; repeat it.",
)
@option(
    "--tokens",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    section="Generation",
    help="Tokens to write after each prompt.",
)
@option("--device", default="auto", show_default=True, metavar="DEVICE", section="Run", help="Where to compute.")
@json_option
@config_option
@click.pass_obj
def diff(
    app: App,
    /,
    base: str,
    edited: str,
    prompts: tuple[str, ...],
    tokens: int,
    ranks: bool,
    device: str,
    as_json: bool,
) -> None:
    """Show which tensors of EDITED differ from BASE and by how much, and what both say to the same prompts.

    The checkpoints are compared tensor by tensor; models are loaded, one after the other, only for --prompt.
    """
    # Torch takes seconds to import, so it waits until the command line has been read.
    from editcli.health import diff as diffs
    from editcli.models.loading import choose_device

    found = diffs.diff(base, edited, ranks=ranks, device=choose_device(device), reporter=app.reporter)
    if prompts:
        families = app.plugins.families()
        found = diffs.speak(found, prompts, tokens=tokens, device=device, families=families, reporter=app.reporter)
    if as_json:
        print_json(found.to_json())
        return
    from editcli.render.diff import diff_view

    app.show(diff_view(found))
