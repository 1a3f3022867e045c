"""Dynamic orthogonality as an editcli plugin."""

from editcli import hookimpl

editcli_api = 1


@hookimpl
def editcli_stabilizers():
    # Imported here, so that starting editcli stays quick.
    from editcli_orthogonal.stabilizer import Orthogonal

    return [Orthogonal]
