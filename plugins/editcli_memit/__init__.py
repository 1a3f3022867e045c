"""MEMIT as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_editors():
    from editcli_memit.editor import Memit

    return [Memit]
