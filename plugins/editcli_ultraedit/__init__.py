"""UltraEdit as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_editors():
    from editcli_ultraedit.editor import UltraEdit

    return [UltraEdit]
