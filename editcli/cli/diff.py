"""``editcli diff``: compare an edited model with its base."""

from __future__ import annotations

from editcli.cli.app import App
from editcli.cli.command import command
from editcli.cli.options import COUNT, argument, option, options_of
from editcli.settings.recipe import LoadingSettings


@command()
@argument("base", "BASE", "model")
@argument("edited", "EDITED", "model")
@option(
    "--ranks/--no-ranks", default=True, section="Comparison", help="Estimate the numerical rank of each difference."
)
@option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    section="Generation",
    help="Show both models' continuations of TEXT; repeatable.",
)
@option("--tokens", type=COUNT, default=20, section="Generation", help="Tokens to write after each prompt.")
@options_of(LoadingSettings, "device", device={"section": "Run"})
def diff(app: App, /, base: str, edited: str, prompts: tuple[str, ...], tokens: int, ranks: bool, device: str) -> None:
    """Show which tensors of EDITED differ from BASE and by how much, and both models' answers to the same prompts.

    The checkpoints are compared tensor by tensor; models are loaded, one after the other, only for --prompt.
    """
    # Torch takes seconds to import, so the command line is read first.
    from editcli.health import diff as diffs
    from editcli.models.loading import choose_device
    from editcli.render.diff import diff_view

    report = diffs.diff(base, edited, ranks=ranks, device=choose_device(device), reporter=app.reporter)
    if prompts:
        families = app.plugins.families()
        report = diffs.speak(report, prompts, tokens=tokens, device=device, families=families, reporter=app.reporter)
    app.emit(report, diff_view)
