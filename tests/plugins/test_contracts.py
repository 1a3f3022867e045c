"""Every registered component keeps its contract; a plugin that is installed is tested without being named here."""

import pytest

from editcli.plugin.manager import load_plugins
from editcli.testing import DiagnosticContract, EditorContract, StabilizerContract
from tests.support.families import needs_packed_experts

CONTRACTS = {"editor": EditorContract, "stabilizer": StabilizerContract, "diagnostic": DiagnosticContract}
OPTIONS = {
    "memit": {"remember": True},
    "nse": {"bounds_kind": "relative", "met": 0.05, "lost": 20.0},
    "spectra": {"every": 2},
}
"""What gives a component state, or turns one on that does nothing by default."""
QUICK = {"memit", "rlsedit", "nas", "revive", "norms"}
"""With state and without, of every kind; the others are left to the whole suite."""


def _classes():
    plugins = load_plugins()
    for kind, contract in CONTRACTS.items():
        for name, found in plugins.all(kind).items():
            title = f"Test{name.title()}"
            body = {"component": found.component, "options": OPTIONS.get(name, {}), "__module__": __name__}
            cls = type(title, (contract,), body)
            if getattr(found.component, "writes_experts", False):
                cls = needs_packed_experts(cls)
            yield title, cls if name in QUICK else pytest.mark.slow(cls)


globals().update(_classes())
