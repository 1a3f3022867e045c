"""RLSEdit as an editcli plugin."""

from editcli.plugin.hookspecs import hookimpl

editcli_api = 1


@hookimpl
def editcli_editors():
    from editcli_rlsedit.editor import RlsEdit

    return [RlsEdit]
