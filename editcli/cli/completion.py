"""``editcli completion``: let the shell complete commands, options and names."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from editcli.cli.app import App
from editcli.cli.command import command

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_EDITCLI_COMPLETE"
"""The variable with which the script asks the program for completions."""


@command(json=False, config=False)
@click.argument("shell", metavar="SHELL", type=click.Choice(SHELLS))
def completion(app: App, /, shell: str) -> None:
    """Print the script that lets SHELL complete editcli's commands, options, editors, stabilizers and models.

    SHELL is bash, zsh or fish.

    \b
    bash: add to ~/.bashrc   eval "$(editcli completion bash)"
    zsh:  add to ~/.zshrc    eval "$(editcli completion zsh)"
    fish: run once           editcli completion fish > ~/.config/fish/completions/editcli.fish
    """
    root = click.get_current_context().find_root()
    shell_class = get_completion_class(shell)
    assert shell_class is not None, "click supports these shells itself"
    script = shell_class(root.command, {}, root.info_name or "editcli", VARIABLE)
    # Filled in here, because click's own source() starts a bash to ask for its version.
    click.echo(script.source_template % script.source_vars())
