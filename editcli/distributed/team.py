"""The processes of a run as the rest of the library sees them.

Every method of :class:`Team` that sends something is called by all ranks in the same order. Each call begins with an
exchange of short texts that say where a rank is and whether it failed, so a rank that fails ends the others' waiting,
and ranks that came apart find out instead of waiting for each other. Before a run begins the ranks compare their
inputs, and its work is dealt out so that no rank has much more of it than another.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor

from editcli.errors import EditError, RankError, StateError


def balanced(costs: Sequence[float], size: int) -> list[list[int]]:
    """Deal items out to ``size`` ranks: the costliest first, each to the rank that has the least so far.

    Returns the items of every rank, ascending. The same costs give the same shares everywhere; ties go to the item and
    the rank with the smaller number. No share exceeds 4/3 of the best possible (Graham, 1969).
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0.0] * size
    for item in sorted(range(len(costs)), key=lambda number: (-costs[number], number)):
        rank = min(range(size), key=lambda number: (loads[number], number))
        shares[rank].append(item)
        loads[rank] += costs[item]
    return [sorted(share) for share in shares]


_LARGE = 1 << 26
"""Bytes from which on all ranks wait until each of them has the memory for what is sent."""


class Link(Protocol):
    """How the processes reach each other; :class:`RankError` when one cannot be reached."""

    @property
    def device(self) -> torch.device | None:
        """The device that tensors are sent from and received on; None where none are sent."""
        ...

    def exchange(self, text: str) -> list[str]:
        """Return the texts of all ranks, in their order."""
        ...

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite ``tensor`` by the one of rank ``source``."""
        ...

    def total(self, tensor: Tensor) -> None:
        """Overwrite ``tensor`` by the sum over all ranks, the same bits on each."""
        ...


class Loopback:
    """The link of a process that is alone."""

    device = None

    def exchange(self, text: str) -> list[str]:
        return [text]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        return None

    def total(self, tensor: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class Team:
    """This process and those it works with; without arguments, a process on its own."""

    rank: int = 0
    size: int = 1
    link: Link = field(default_factory=Loopback)
    divided: bool = True
    """False where the ranks hold one model together: then every rank takes part in all of the model's work."""

    @property
    def parts(self) -> int:
        """In how many parts the model's work is divided."""
        return self.size if self.divided else 1

    @property
    def part(self) -> int:
        """The index of this rank among them."""
        return self.rank if self.divided else 0

    @property
    def leads(self) -> bool:
        """Whether this is rank 0: the one that writes files and speaks to the user."""
        return self.rank == 0

    def share(self, costs: Sequence[float]) -> list[int]:
        """Return which of the items with these ``costs`` are this rank's, ascending; all ranks must pass the same."""
        return balanced(costs, self.parts)[self.part]

    def exchange(self, what: str, value: Any = None) -> list[Any]:
        """Return the values of all ranks, as JSON makes of them; raise :class:`RankError` when one of them failed."""
        return [item["value"] for item in self._checked(what, {"what": what, "value": value})]

    def lead(self, what: str, action: Callable[[], Any]) -> Any:
        """Have rank 0 alone do something; return what it returned, which must be JSON's, on every rank."""
        return self.exchange(what, action() if self.leads else None)[0]

    def lead_model(self, what: str, action: Callable[[], Any]) -> Any:
        """Do as :meth:`lead` does with something that runs the model: with a model held together, all run it."""
        value = action() if self.leads or not self.divided else None
        return self.exchange(what, value)[0]

    def any(self, what: str, flag: bool) -> bool:
        """Tell whether ``flag`` is set on any rank."""
        return any(self.exchange(what, flag))

    def agree(self, what: str, value: Any, *, remedy: str) -> None:
        """Raise :class:`StateError` unless ``value`` is the same on every rank; this is a barrier as well."""
        values = self.exchange(what, value)
        others = [str(rank) for rank, other in enumerate(values) if other != values[0]]
        if others:
            raise StateError(f"{what} differ between process 0 and process {', '.join(others)}; {remedy}")

    def gather(self, what: str, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        """Return the tensors of all parts, in their order; ranks may have different ones, or none."""
        return self._gathered(what, tensors) if self.parts > 1 else [tuple(tensors)]

    def _gathered(self, what: str, tensors: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        kinds = self.exchange(what, [(str(t.dtype), list(t.shape), t.device.type == "cpu") for t in tensors])
        if self.size == 1:
            return [tuple(tensors)]
        gathered: list[tuple[Tensor, ...]] = []
        for rank, kind in enumerate(kinds):
            parts = []
            for place, (dtype, shape, on_cpu) in enumerate(kind):
                device = torch.device("cpu") if on_cpu else self.link.device
                if rank == self.rank:
                    parts.append(tensors[place].detach().to(device).contiguous())
                else:
                    element = getattr(torch, dtype.removeprefix("torch."))
                    parts.append(torch.empty(shape, dtype=element, device=device))
            gathered.append(tuple(parts))
        if sum(part.nbytes for parts in gathered for part in parts) > _LARGE:
            # A rank without the room for them can say so here, but no longer once the others send.
            self.exchange(f"room for {what}")
        for rank, parts in enumerate(gathered):
            for part in parts:
                self.link.broadcast(part, rank)
        return gathered

    def lead_tensors(self, what: str, action: Callable[[], Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Have rank 0 alone make tensors; return them, or none, on every rank."""
        return self._gathered(what, action() if self.leads else ())[0]

    def spread(
        self,
        what: str,
        costs: Sequence[float],
        work: Callable[[Sequence[int]], Sequence[Tensor]],
        *,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> tuple[Tensor, ...]:
        """Do ``work`` on all items, each rank on its share; return its tensors, one row per item, on every rank.

        ``work`` takes the numbers of items and returns tensors with a row for each. The results for an item must not
        depend on the other items, but for those of the same one of ``groups``, which go to one rank.
        """
        groups = [[item] for item in range(len(costs))] if groups is None else groups
        dealt = balanced([sum(costs[item] for item in group) for group in groups], self.parts)
        shares = [sorted(item for number in share for item in groups[number]) for share in dealt]
        items = shares[self.part]
        results = tuple(work(items)) if items or not costs else ()
        if self.parts == 1:
            return results
        parts = [part for part in self.gather(what, results) if part]
        back = torch.argsort(torch.tensor([item for share in shares for item in share]))
        return tuple(torch.cat(column)[back.to(column[0].device)] for column in zip(*parts, strict=True))

    def total(self, what: str, tensors: Sequence[Tensor]) -> None:
        """Overwrite each tensor, of one shape on all ranks, by its sum over the parts: the same bits on every rank."""
        self.exchange(what, len(tensors))
        for tensor in tensors if self.parts > 1 else ():
            self.link.total(tensor)

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks when this one fails, so that they fail too; rank 0 alone is left to tell the user."""
        try:
            yield
        except RankError as error:
            # The rank that failed has told the others already.
            raise RankError(str(error), told=not self.leads) from error
        except EditError as error:
            self._tell(str(error))
            if self.leads:
                raise
            raise RankError(str(error), told=True) from error
        except Exception as error:
            # A bug: its traceback appears where it happened, and the other ranks must not wait for this one.
            self._tell(f"it stopped on an internal error, {type(error).__name__}: {error}; see its traceback")
            raise

    def _tell(self, sentence: str) -> None:
        # The failure matters more than the answers of the others, or that they are gone.
        with suppress(RankError):
            self._checked("", {"what": "", "failed": sentence})

    def _checked(self, what: str, message: dict[str, Any]) -> list[dict[str, Any]]:
        if self.size == 1:
            return [{"value": json.loads(json.dumps(message.get("value")))}]
        heard = [json.loads(text) for text in self.link.exchange(json.dumps(message))]
        for rank, item in enumerate(heard):
            if "failed" in item:
                raise RankError(f"process {rank} of {self.size}: {item['failed']}")
        for rank, item in enumerate(heard):
            if item["what"] != heard[0]["what"]:
                places = f"process 0 is at {heard[0]['what']!r}, process {rank} at {item['what']!r}"
                raise RankError(
                    f"the processes came apart: {places}; start again, 'apply' with --resume, and report this"
                )
        return heard


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    return {
        "editcli": version("editcli"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def agree_on_inputs(team: Team, what: str, parts: Mapping[str, Any]) -> None:
    """Raise :class:`StateError` unless all ranks were asked for the same and read the same, as JSON tells it."""
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
    team.agree(what, digest, remedy="start them with the same command and files")


def agree_on_models(team: Team, fingerprints: Sequence[str], others: Any = None) -> None:
    """Raise :class:`StateError` unless all ranks have these model files, and the same versions of all packages."""
    team.agree("model files", list(fingerprints), remedy="give every machine the same copy of the model")
    team.agree("versions", [versions(), others], remedy="install the same packages on every machine")
