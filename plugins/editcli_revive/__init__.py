"""REVIVE as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_stabilizers():
    from editcli_revive.stabilizer import Revive

    return [Revive]
