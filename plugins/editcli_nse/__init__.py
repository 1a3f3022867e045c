"""NSE as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_editors():
    from editcli_nse.editor import Nse

    return [Nse]
