"""Read the variables that a launcher (``torchrun``, ``accelerate launch``) sets in each process, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from editcli.errors import OptionError

TIMEOUT_VARIABLE = "EDITCLI_RANK_TIMEOUT"
DEFAULT_TIMEOUT = 1800.0
"""Seconds to wait for the other processes; what one does alone for longest is to write a large model."""

_REQUIRED = ("RANK", "WORLD_SIZE", "MASTER_ADDR")


@dataclass(frozen=True, slots=True)
class Launch:
    """This process among those that were launched together; ``local_rank`` and ``local_size`` count on this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    timeout: float = DEFAULT_TIMEOUT

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks to the user."""
        return self.rank == 0

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Launch:
        """Read the launcher's variables; a process that was not launched is alone. Raises :class:`OptionError`."""
        timeout = _number(environment, TIMEOUT_VARIABLE, DEFAULT_TIMEOUT)
        if timeout <= 0:
            raise OptionError(f"{TIMEOUT_VARIABLE} must be a number of seconds above 0")
        if not all(environment.get(name) for name in _REQUIRED):
            return cls(timeout=timeout)
        rank, size = int(_number(environment, "RANK")), int(_number(environment, "WORLD_SIZE"))
        local_rank = int(_number(environment, "LOCAL_RANK", rank))
        local_size = int(_number(environment, "LOCAL_WORLD_SIZE", size))
        if not 0 <= rank < size:
            raise OptionError(f"the launcher's RANK={rank} does not fit its WORLD_SIZE={size}; use torchrun")
        return cls(rank, size, local_rank, local_size, timeout)


def _number(environment: Mapping[str, str], name: str, default: float | None = None) -> float:
    text = environment.get(name, "")
    if not text and default is not None:
        return default
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"the variable {name}={text!r} is not a number") from error
