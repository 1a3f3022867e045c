"""AlphaEdit as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_editors():
    from editcli_alphaedit.editor import AlphaEdit

    return [AlphaEdit]
