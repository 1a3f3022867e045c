"""The table of commands and the group that they make."""

from __future__ import annotations

import click

from editcli.cli.command import LazyGroup, add_plugin_commands
from editcli.plugin.manager import Plugins

COMMANDS = {
    "apply": ("editcli.cli.apply:apply", "Edit a model: the main job."),
    "eval": ("editcli.cli.eval:eval_", "Measure edits: efficacy, generalization, specificity, ability."),
    "check": ("editcli.cli.check:check", "Validate edits against a model's tokenizer; loads no weights."),
    "convert": ("editcli.cli.convert:convert", "Turn other tools' edit files into ours."),
    "inspect": ("editcli.cli.inspect:inspect", "Show the editable matrices, and the health of an edited model."),
    "diff": ("editcli.cli.diff:diff", "Compare two checkpoints tensor by tensor, and their answers."),
    "export": ("editcli.cli.export:export", "Convert a run into an adapter, a patch or a plain folder."),
    "apply-patch": ("editcli.cli.apply_patch:apply_patch", "Rebuild an edited model from its base and a patch."),
    "report": ("editcli.cli.report:report", "Write one self-contained page about a run."),
    "undo": ("editcli.cli.undo:undo", "Take back the last batches of a run, or single edits."),
    "bench": ("editcli.cli.bench:bench", "Compare stacks on one stream: retention and collapse."),
    "tune": ("editcli.cli.tune:tune", "Search the layers and settings that edit a model best."),
    "stats": ("editcli.cli.stats:stats", "Compute and show the reference-text statistics of a model."),
    "plugins": ("editcli.cli.plugins:plugins", "List editors, stabilizers and formats with options and papers."),
    "completion": ("editcli.cli.completion:completion", "Let the shell complete commands, options and names."),
}
"""Every built-in command: where it lives and what ``--help`` says, so that showing the list imports none of them."""


def build_cli(plugins: Plugins) -> click.Group:
    """Return the command group with the built-in commands and those that plugins bring."""
    group = LazyGroup(
        name="editcli",
        commands_table=COMMANDS,
        help="Rewrite facts inside a causal language model's weights, and see what that did to it.",
        epilog="Most options can also be set in editcli.toml or as EDITCLI_<OPTION>; the command line wins.",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    click.version_option(package_name="editcli", message="editcli %(version)s")(group)
    add_plugin_commands(group, plugins)
    return group
