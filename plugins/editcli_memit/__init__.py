"""MEMIT as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_editors():
    from editcli_memit.editor import Memit

    return [Memit]
