"""Join the processes that a launcher started: NCCL or its like on accelerators, gloo on CPUs and for short texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from editcli.distributed.launch import TIMEOUT_VARIABLE, Launch
from editcli.distributed.team import Team
from editcli.errors import ModelError, RankError
from editcli.models.loading import choose_device

_CPU = torch.device("cpu")
_LOST = (
    "another process of this run died, cannot be reached or was waited for longer than "
    f"{TIMEOUT_VARIABLE} allows; what was saved is whole: start it again, 'apply' with --resume"
)
_NEVER_FOUND = (
    "the processes of this run did not find each other; check that all were started and that MASTER_ADDR and "
    "MASTER_PORT of the launcher can be reached"
)


@dataclass(frozen=True, slots=True)
class GroupLink:
    """The link through torch's default process group, which must have a backend for CPU tensors."""

    device: torch.device

    def exchange(self, text: str) -> list[str]:
        data = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        size = dist.get_world_size()
        with _reached():
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
            dist.all_gather(lengths, torch.tensor([len(data)]))
            longest = max(int(length) for length in lengths)
            parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
            dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
        texts = [bytes(part[: int(length)].numpy()) for part, length in zip(parts, lengths, strict=True)]
        return [text.decode() for text in texts]

    def broadcast(self, tensor: Tensor, source: int) -> None:
        with _reached():
            dist.broadcast(tensor, src=source)

    def total(self, tensor: Tensor) -> None:
        # Summed in one place and handed back, so that no rank can round differently.
        with _reached():
            dist.reduce(tensor, dst=0)
            dist.broadcast(tensor, src=0)


@contextmanager
def joined(
    launch: Launch, *, device: str = "auto", device_map: str | None = None, divided: bool = True
) -> Iterator[Team]:
    """Hold the team of a launch for as long as the context lasts; a team of one where nothing was launched.

    ``divided`` is :attr:`Team.divided`.

    An error inside ends the other processes too, and only rank 0 reports it. Raises :class:`RankError` when
    the processes do not find each other and :class:`ModelError` when one has no device for itself.
    """
    if launch.size == 1:
        yield Team()
        return
    place = _own_device(launch, device, device_map)
    wait = timedelta(seconds=launch.timeout)
    with _reached(_NEVER_FOUND):
        dist.init_process_group(backends(place), rank=launch.rank, world_size=launch.size, timeout=wait)
    team = Team(launch.rank, launch.size, GroupLink(place), divided)
    with team.guard():
        yield team
        team.exchange("the end")
    # After a failure the group is left to the end of the process, since closing it may wait for the dead.
    dist.destroy_process_group()


def backends(place: torch.device) -> str:
    """Return torch's name for the backends of a rank that computes on ``place``; texts always go through gloo."""
    if place.type == _CPU.type:
        return "gloo"
    return f"cpu:gloo,{place.type}:{dist.get_default_backend_for_device(place)}"


def _own_device(launch: Launch, device: str, device_map: str | None) -> torch.device:
    """Return the device of this rank and make it the current one."""
    place = choose_device(device)
    if launch.local_size > 1 and device_map:
        raise ModelError(
            "--device-map spreads one process over all devices of a machine, so it goes with one process per machine: "
            "use --nproc-per-node 1 or leave out --device-map"
        )
    if place.type == _CPU.type:
        return place
    if launch.local_size > 1 and place.index is not None:
        raise ModelError(f"--device {device} would be shared by {launch.local_size} processes; name no number")
    count = torch.accelerator.device_count()
    if launch.local_rank >= count:
        raise ModelError(
            f"{launch.local_size} processes on a machine with {count} devices; use --nproc-per-node {count}"
        )
    index = launch.local_rank if place.index is None else place.index
    torch.accelerator.set_device_index(index)
    return torch.device(place.type, index)


@contextmanager
def _reached(sentence: str = _LOST) -> Iterator[None]:
    """Turn a peer that cannot be reached into one sentence."""
    try:
        yield
    # Torch raises RuntimeError, or a subclass, for a peer that is gone or too slow.
    except RuntimeError as error:
        raise RankError(sentence) from error
