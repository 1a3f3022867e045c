"""Spectra of the edited weights during a run, as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_diagnostics():
    from editcli_spectra.diagnostic import Spectra
    from editcli_spectra.directions import RelativeChange

    return [Spectra, RelativeChange]
