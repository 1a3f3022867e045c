"""CrispEdit as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_editors():
    from editcli_crispedit.editor import CrispEdit

    return [CrispEdit]
