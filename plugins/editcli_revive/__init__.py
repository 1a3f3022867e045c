"""REVIVE as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_stabilizers():
    from editcli_revive.stabilizer import Revive

    return [Revive]
