"""One model whose matrices are split between two processes is edited like a whole one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from editcli.errors import ModelError
from editcli.models.sharded import loading_options
from editcli.testing import tiny_config
from tests.distributed.test_runs import same_run
from tests.support.workshop import STACKS

pytestmark = pytest.mark.slow

SPLIT = ("--parallel", "tensor")
MORE = {**STACKS, "ft": ("--editor", "ft")}


@pytest.mark.parametrize("stack", ["memit", "alphaedit", "ultraedit", "ft"])
def test_a_split_model_is_edited_like_a_whole_one(crew: Any, unbroken: Callable[..., Path], stack: str) -> None:
    leader, other = crew.run(2, "out", *MORE[stack], *SPLIT)
    assert (leader.code, other.code, other.out, other.err) == (0, 0, "", ""), leader.err
    same_run(unbroken(*MORE[stack]), crew.shop.folder / "out")


def test_a_stream_that_was_split_goes_on_whole(crew: Any, unbroken: Callable[..., Path]) -> None:
    ended = crew.run(2, "out", *STACKS["memit"], *SPLIT, "--limit", "3")
    assert [one.code for one in ended] == [0, 0], ended[0].err
    assert crew.alone("out", *STACKS["memit"], "--resume").code == 0
    expected = crew.alone("whole", *STACKS["memit"], "--limit", "3")
    assert expected.code == 0
    assert crew.alone("whole", *STACKS["memit"], "--resume").code == 0
    same_run(crew.shop.folder / "whole", crew.shop.folder / "out")


def test_what_cannot_be_split_is_refused(crew: Any) -> None:
    alone = crew.alone("out", *STACKS["memit"], *SPLIT)
    assert alone.code == 1
    refusal = "error: --parallel tensor splits a model over several processes; start them with torchrun"
    assert alone.err.splitlines()[-1] == refusal
    with pytest.raises(ModelError, match="no tensor-parallel plan for 'gpt_neo'"):
        loading_options(tiny_config("gpt_neo"))
