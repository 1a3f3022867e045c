"""The kinds of plugin that can be scaffolded: hook, contract, and what the files of each say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Kind:
    """What differs between the kinds; ``texts`` are templates that the files' templates fill in."""

    texts: Mapping[str, str]
    imports: tuple[str, ...] = ()
    """Packages besides editcli that the method imports."""


_FIND = 'plugins.find("$kind", "$name").component is $cls'

KINDS: Mapping[str, Kind] = {
    "editor": Kind(
        {
            "article": "an",
            "hook": "editcli_editors",
            "contract": "EditorContract",
            "contract_body": "",
            "summary": "An editor for editcli: writes each batch by damped least squares.",
            "usage": "editcli apply facts.jsonl --editor $name",
            "found": _FIND,
        },
        imports=("torch",),
    ),
    "stabilizer": Kind(
        {
            "article": "a",
            "hook": "editcli_stabilizers",
            "contract": "StabilizerContract",
            "contract_body": "",
            "summary": "A stabilizer for editcli: keeps every batch's update small against the unedited weight.",
            "usage": "editcli apply facts.jsonl --stabilizer $name",
            "found": _FIND,
        }
    ),
    "diagnostic": Kind(
        {
            "article": "a",
            "hook": "editcli_diagnostics",
            "contract": "DiagnosticContract",
            "contract_body": "",
            "summary": "A diagnostic for editcli: the largest single change that each batch makes to a weight.",
            "usage": "editcli apply facts.jsonl  # its figures are in facts-edited/editcli/journal.jsonl",
            "found": _FIND,
        }
    ),
    "format": Kind(
        {
            "article": "a",
            "hook": "editcli_formats",
            "contract": "FormatContract",
            "contract_body": "\n    records = (RECORD,)",
            "summary": "A reader of edit files for editcli: questions about an entity, with new and old answers.",
            "usage": "editcli convert questions.jsonl --from $name",
            "found": "[type(form) for form in load_formats(plugins)] == [$cls]",
        }
    ),
}
