"""How much an update changes R_n = ||W_n|| / ||W_0|| of its site."""

from __future__ import annotations

from editcli.editing.session import ModelSession
from editcli.interfaces import Site, Update
from editcli.ratios import jump, ratio


def jump_of(session: ModelSession, site: Site, update: Update) -> float | None:
    """Return |R_n+1 - R_n| of ``site``, to which ``update`` is not added yet; None where W_0 is zero."""
    weight, base = session.weight(site), float(session.baseline(site).norm())
    after = weight.addmm(update.left.to(weight), update.right.to(weight).T)
    return jump(ratio(float(weight.norm()), base), ratio(float(after.norm()), base))
