"""Dynamic orthogonality as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_stabilizers():
    # Imported here, so that starting editcli stays quick.
    from editcli_orthogonal.stabilizer import Orthogonal

    return [Orthogonal]
