"""``editcli completion``: let the shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from editcli.cli.common import Command

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_EDITCLI_COMPLETE"
"""What the script sets when it asks the program what fits."""


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, /, shell: str) -> None:
    """Print the script that lets SHELL complete editcli's commands, options, editors, stabilizers and models.

    SHELL is bash, zsh or fish.

    \b
    bash: add to ~/.bashrc   eval "$(editcli completion bash)"
    zsh:  add to ~/.zshrc    eval "$(editcli completion zsh)"
    fish: run once           editcli completion fish > ~/.config/fish/completions/editcli.fish
    """
    root = context.find_root()
    found = get_completion_class(shell)
    assert found is not None, "click brings these shells itself"
    script = found(root.command, {}, root.info_name or "editcli", VARIABLE)
    # Filled in here, because click's own source() starts a bash to ask for its version.
    click.echo(script.source_template % script.source_vars())
