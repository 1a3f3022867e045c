"""Constrained fine-tuning as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_editors():
    from editcli_ft.editor import FineTuning

    return [FineTuning]
