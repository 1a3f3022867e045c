"""Spectra of the edited weights during a run, as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_diagnostics():
    from editcli_spectra.diagnostic import Spectra

    return [Spectra]
