"""UltraEdit as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_editors():
    from editcli_ultraedit.editor import UltraEdit

    return [UltraEdit]
