"""The contract of every reader of edit files; import :class:`FormatContract` through :mod:`editcli.testing`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from editcli.errors import RequestError
from editcli.plugin.manager import load_plugins
from editcli.requests.formats import Format
from editcli.requests.reader import translate
from editcli.requests.schema import from_record
from editcli.testing.listing import heavy_imports

FILE, PLACE = "contract.jsonl", "contract.jsonl:1"
OURS: Mapping[str, Any] = {"prompt": "The capital of {} is", "subject": "France", "target_new": "Lyon"}
JUNK: tuple[Any, ...] = (None, 3, "", [], {}, [[]], [None], {"prompt": []})
"""Values that a field may hold in a file that somebody else made."""


class FormatContract:
    """The properties that every format must have; set :attr:`component` and :attr:`records`, its real records."""

    component: ClassVar[type[Format]]
    records: ClassVar[Sequence[Mapping[str, Any]]]

    def test_it_names_and_describes_itself(self) -> None:
        assert self.component.name.isidentifier()
        assert self.component.name == self.component.name.lower()
        assert self.component.__doc__
        assert isinstance(self.component.reference, str)

    def test_listing_it_does_not_import_torch(self) -> None:
        """Every command lists the plugins, so importing the module of one at the start must be quick."""
        assert heavy_imports(self.component.__module__) == []

    def test_it_knows_its_own_records_and_no_others(self) -> None:
        form = self.component()
        assert self.records
        assert not form.sniff(OURS)
        others = [other for other in load_plugins().formats() if other.name != form.name]
        for record in self.records:
            assert form.sniff(record)
            assert not [other.name for other in others if other.sniff(record)]

    def test_what_it_reads_are_edits_with_ids_of_their_own(self) -> None:
        form = self.component()
        for record in self.records:
            # An edit without an id is named by its line, so one without may stand alone only.
            edits = [from_record(edit, file=FILE, line=1) for edit in form.read(record)]
            assert edits
            assert len({edit.id for edit in edits}) == len(edits)

    def test_reading_leaves_the_record_alone_and_can_be_repeated(self) -> None:
        form = self.component()
        for record in self.records:
            before = copy.deepcopy(record)
            assert list(form.read(record)) == list(form.read(record))
            assert record == before

    def test_sniffing_never_fails(self) -> None:
        """Every record of every file is sniffed, so what a format says of a foreign one is yes or no."""
        form = self.component()
        for record in ({}, {"": None}, *({"prompt": value, "subject": value} for value in JUNK), *self._broken()):
            assert form.sniff(record) in (True, False)

    def test_a_broken_record_is_refused_with_a_reason(self) -> None:
        """A field that is missing or of another type makes a refusal with a reason, or an edit without it."""
        for record in filter(self.component().sniff, self._broken()):
            refusal = self._refusal(record)
            assert refusal is None or refusal.startswith(f"{PLACE}: ")

    def _refusal(self, record: Mapping[str, Any]) -> str | None:
        """Read a record as ``apply`` does; return why it was refused. Anything but a refusal escapes."""
        try:
            for edit in translate(record, self.component(), file=FILE, line=1):
                from_record(edit, file=FILE, line=1)
        except RequestError as error:
            return str(error)
        return None

    def _broken(self) -> Iterator[Mapping[str, Any]]:
        for record in self.records:
            for field in record:
                yield {name: value for name, value in record.items() if name != field}
                yield from ({**record, field: value} for value in JUNK)
