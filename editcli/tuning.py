"""``editcli tune``: search the layers and settings with which a stack of methods edits one model best.

The modules, in the order in which they depend on each other: ``space`` (what is searched), ``objective`` (what is
maximised), ``probes`` (facts to edit where the user has none), ``workbench`` (edit in memory, measure, restore),
``study`` (the record of the trials, with Optuna), ``search`` (all of it together) and ``report``.
"""

SOURCE = "(bundled probes)"
"""Stands where an edits file is named when the edits are made from bundled probes."""
