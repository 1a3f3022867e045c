"""PRUNE as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_stabilizers():
    from editcli_prune.stabilizer import Prune

    return [Prune]
