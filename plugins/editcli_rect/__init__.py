"""RECT as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_stabilizers():
    from editcli_rect.stabilizer import Rect

    return [Rect]
