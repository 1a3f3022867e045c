"""ROME as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_editors():
    from editcli_rome.editor import Rome

    return [Rome]
