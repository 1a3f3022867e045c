"""PRUNE as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_stabilizers():
    from editcli_prune.stabilizer import Prune

    return [Prune]
