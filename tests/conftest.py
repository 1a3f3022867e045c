"""Keep every test offline, single-threaded and away from the user's own files."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from tests.support.run_folders import base, make_run
from tests.support.workshop import finished, model, server, shop, shop_in

__all__ = ["base", "finished", "make_run", "model", "server", "shop", "shop_in"]


class AsWarning(logging.Handler):
    """Raises what a library logs about its deprecated names as a warning, so that it is collected like the others."""

    def emit(self, record: logging.LogRecord) -> None:
        """Warn of a record that speaks of a deprecation."""
        text = record.getMessage()
        if "deprecated" in text or "will be removed" in text:
            warnings.warn(text, FutureWarning, stacklevel=2)


@pytest.fixture(scope="session", autouse=True)
def logged_deprecations() -> None:
    """Collect the deprecations that transformers logs instead of raising them."""
    import transformers

    transformers.utils.logging.set_verbosity_warning()
    logging.getLogger("transformers").addHandler(AsWarning())


@pytest.fixture(autouse=True)
def heard_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the program from silencing libraries in this process, where pytest collects what they say."""
    monkeypatch.setattr(sys, "warnoptions", ["default"])


# How long an example takes says something about the machine alone.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Take SIGINT as a terminal would send it: whoever starts the tests in the background has it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Run torch on one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_arithmetic() -> Iterator[None]:
    """Check that a test leaves torch's switches for the whole process alone: later tests would round differently."""
    yield
    import torch

    kernels = torch.backends.cuda
    fused = (kernels.flash_sdp_enabled(), kernels.mem_efficient_sdp_enabled(), kernels.math_sdp_enabled())
    assert (*fused, torch.backends.mkldnn.enabled, torch.get_num_threads()) == (True, True, True, True, 1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give every test a home and a cache of its own and none of the caller's ``EDITCLI_*`` settings."""
    home = tmp_path_factory.mktemp("home")
    for name in list(os.environ):
        if name.startswith("EDITCLI_"):
            monkeypatch.delenv(name)
    for name, folder in (("HOME", "."), ("XDG_CACHE_HOME", "cache"), ("XDG_CONFIG_HOME", "config")):
        monkeypatch.setenv(name, str(home / folder))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    return home


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """Text with enough variety for the second moments of a tiny model to be invertible."""
    names = ["France", "Italy", "Spain", "Greece", "Bob", "Ann", "Smith", "Rome", "London"]
    words = [
        "The",
        "capital",
        "city",
        "river",
        "of",
        "in",
        "by",
        "was",
        "is",
        "plays",
        "works",
        "lives",
        "born",
        *names,
    ]
    chooser = random.Random(0)
    return "\n".join(" ".join(chooser.choices(words, k=40)) for _ in range(20))
