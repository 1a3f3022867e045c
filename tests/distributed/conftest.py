"""Runs of several processes, started by hand as a launcher would; the workshop is that of the streams' tests."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from tests.support.workshop import Child, Ended, Workshop

EDITS = (*("--eval", "--batch-size", "3"), *("-o", "targets.steps=3"))
"""The eight edits of the workshop in batches of 3, 3 and 2: the last is uneven, and smaller than three ranks."""


class Crew:
    """Starts the ranks of one run; the prelude of a rank runs in its process before the command."""

    def __init__(self, shop: Workshop):
        self.shop = shop

    def start(self, size: int, out: str, *arguments: str, edits: str = "facts.jsonl", **choices: Any) -> list[Child]:
        return self.launch(size, lambda shop: shop.command(out, *EDITS, *arguments, edits=edits), **choices)

    def launch(
        self,
        size: int,
        command: Callable[[Workshop], Sequence[str]],
        *,
        preludes: dict[int, str] | None = None,
        shops: Sequence[Workshop] | None = None,
        timeout: float = 60,
    ) -> list[Child]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(size):
            shop = shops[rank] if shops else self.shop
            launch = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
            launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "EDITCLI_RANK_TIMEOUT": timeout}
            prelude = f"import os; os.environ.update({ {name: str(value) for name, value in launch.items()} })\n"
            prelude += (preludes or {}).get(rank, "")
            ranks.append(shop.start(*command(shop), prelude=prelude))
        return ranks

    def run(self, size: int, out: str, *arguments: str, **choices: Any) -> list[Ended]:
        return [child.wait() for child in self.start(size, out, *arguments, **choices)]

    def call(self, size: int, *command: str, **choices: Any) -> list[Ended]:
        """Run any command; a crew of one is a process that nobody launched together with others."""
        return [child.wait() for child in self.launch(size, lambda shop: command, **choices)]

    def alone(self, out: str, *arguments: str, prelude: str = "") -> Ended:
        return self.shop.apply(out, *EDITS, *arguments, prelude=prelude)


@pytest.fixture
def crew(shop: Workshop) -> Crew:
    """A crew in a workshop of its own."""
    return Crew(shop)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shop_in: Callable[..., Workshop]) -> Callable[..., Any]:
    """Return the folder of a run of one process with the given arguments, made once; not to be changed."""
    crew = Crew(shop_in(tmp_path_factory.mktemp("unbroken")))
    made: dict[tuple[str, ...], Any] = {}

    def unbroken(*arguments: str) -> Any:
        if arguments not in made:
            out = f"run-{len(made)}"
            ended = crew.alone(out, *arguments)
            assert ended.code == 0, ended.err
            made[arguments] = crew.shop.folder / out
        return made[arguments]

    return unbroken
