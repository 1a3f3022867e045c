"""SPHERE as an editcli plugin."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_stabilizers():
    from editcli_sphere.stabilizer import Sphere

    return [Sphere]
