"""Norms of every batch's updates, as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_diagnostics():
    from editcli_norms.diagnostic import Norms

    return [Norms]
