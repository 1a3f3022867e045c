"""RLSEdit as an editcli plugin."""

from editcli.hookspecs import hookimpl


@hookimpl
def editcli_editors():
    from editcli_rlsedit.editor import RlsEdit

    return [RlsEdit]
