"""RECT as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_stabilizers():
    from editcli_rect.stabilizer import Rect

    return [Rect]
