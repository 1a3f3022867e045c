"""Every registered component keeps its contract; a plugin that is installed is tested without being named here."""

from editcli.plugins import load_plugins
from editcli.testing import EditorContract, StabilizerContract

CONTRACTS = {"editor": EditorContract, "stabilizer": StabilizerContract}


def _classes():
    plugins = load_plugins()
    for kind, contract in CONTRACTS.items():
        for name, found in plugins.all(kind).items():
            title = f"Test{name.title()}"
            yield title, type(title, (contract,), {"component": found.component, "__module__": __name__})


globals().update(_classes())
