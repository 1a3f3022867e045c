"""The address of a judge; never imports torch."""

from __future__ import annotations

from urllib.parse import urlsplit

from editcli.errors import OptionError


def check_address(url: str) -> None:
    """Raise :class:`OptionError` unless ``url`` is a plain HTTP address without a key in it."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError as error:
        raise OptionError(f"--judge {url} is no address: {error}") from error
    if parts.username or parts.password or parts.query or parts.fragment:
        # The address is recorded, and a key must not be.
        raise OptionError(
            "--judge takes an address without user, query or fragment, since it is recorded; a key belongs in the "
            "variable EDITCLI_JUDGE_KEY"
        )
    if not usable:
        raise OptionError(f"--judge {url} is no address; write http://HOST:PORT/v1 or https://HOST/v1")
