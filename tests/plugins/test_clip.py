import pytest
import torch

from editcli.errors import OptionError
from editcli.plugin.interfaces import LowRank, Problem
from editcli.plugin.options import build
from editcli_clip.stabilizer import Clip
from editcli_memit.editor import Memit
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, assert_close, write_batch


@pytest.mark.parametrize("what", ["weight", "update"])
def test_the_bound_holds_throughout_a_stream(session, what):
    editor, clip = Memit(Memit.Options(mom2_update_weight=0.01)), Clip(Clip.Options(rho=1.2, what=what))
    editor.prepare(session)
    for number in range(30):
        write_batch(session, editor, requests_of(f"b{number}", 4), [clip])
        for site in session.sites:
            # A stiff system has factors much larger than their product, which is what rounding them to float32 costs.
            assert session.weight(site).double().norm() <= 1.2 * (1 + 1e-4) * session.baseline(site).double().norm()
    assert sum(clip.record()["clipped"].values()) > 0


@pytest.mark.parametrize("what", ["weight", "update"])
def test_an_update_within_the_bound_is_left_alone(session, what):
    update = LowRank(
        1e-3 * session.random("a", size=(session.shape[0], 2)), session.random("b", size=(session.shape[1], 2))
    )
    clip = Clip(Clip.Options(what=what))
    assert (
        clip.stabilize_update(session, session.sites[0], update, Problem(session.sites[0], update.right, update.left))
        is update
    )
    assert clip.record() == {"clipped": {}}


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_a_clipped_update_reaches_its_bound_in_its_own_direction(scale, seed):
    session = FakeSession((6, 9), seed=seed)
    site = session.sites[0]
    update = LowRank(scale * session.random("a", size=(6, 2)), session.random("b", size=(9, 2)))
    clip = Clip(Clip.Options(rho=1.1, what="update"))
    out = clip.stabilize_update(session, site, update, Problem(site, update.right, update.left))
    bound = 1.1 * float(session.baseline(site).norm())
    norm = float((session.weight(site) + out.dense()).norm())
    assert norm <= bound
    if out is not update:
        assert norm == pytest.approx(bound, rel=1e-4)
        assert torch.allclose(out.dense() / out.norm(), update.dense() / update.norm(), atol=1e-9)


def test_a_clipped_weight_keeps_its_direction(session):
    site, clip = session.sites[0], Clip(Clip.Options(rho=1.0))
    update = LowRank(
        10 * session.random("a", size=(session.shape[0], 2)), session.random("b", size=(session.shape[1], 2))
    )
    out = clip.stabilize_update(session, site, update, Problem(site, update.right, update.left))
    wanted = session.weight(site) + update.dense()
    assert_close(session.weight(site) + out.dense(), wanted * (session.baseline(site).norm() / wanted.norm()), 1e-5)


def test_a_bound_below_the_unedited_norm_is_refused():
    with pytest.raises(OptionError, match="rho"):
        build(Clip.Options, {"rho": 0.5}, owner="clip")
