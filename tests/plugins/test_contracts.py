"""Every registered component keeps its contract; a plugin that is installed is tested without being named here."""

from editcli.plugins import load_plugins
from editcli.testing import DiagnosticContract, EditorContract, StabilizerContract

CONTRACTS = {"editor": EditorContract, "stabilizer": StabilizerContract, "diagnostic": DiagnosticContract}
OPTIONS = {"spectra": {"every": 2}}
"""What turns a component on that does nothing by default."""


def _classes():
    plugins = load_plugins()
    for kind, contract in CONTRACTS.items():
        for name, found in plugins.all(kind).items():
            title = f"Test{name.title()}"
            body = {"component": found.component, "options": OPTIONS.get(name, {}), "__module__": __name__}
            yield title, type(title, (contract,), body)


globals().update(_classes())
