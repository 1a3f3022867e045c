"""Methods that are other methods with settings of their own: one TOML file each in this folder."""

from editcli.plugin import hookimpl

editcli_api = 2


@hookimpl
def editcli_stacks():
    from editcli.plugin import stacks_in

    return stacks_in(__name__)
