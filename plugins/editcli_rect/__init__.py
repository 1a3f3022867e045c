"""RECT as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_stabilizers():
    from editcli_rect.stabilizer import Rect

    return [Rect]
