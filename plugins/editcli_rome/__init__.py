"""ROME as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_editors():
    from editcli_rome.editor import Rome

    return [Rome]
