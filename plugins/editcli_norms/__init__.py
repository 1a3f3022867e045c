"""Norms of every batch's updates, as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_diagnostics():
    from editcli_norms.diagnostic import Norms

    return [Norms]
