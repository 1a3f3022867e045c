import pytest
import torch

from editcli.errors import OptionError, StateError
from editcli.plugin.interfaces import State
from editcli.plugin.options import build
from editcli.testing import same_state, through_bytes
from editcli_crispedit.curvature import small
from editcli_crispedit.editor import CrispEdit
from tests.plugins.test_locft import adam
from tests.support.facts import requests_of
from tests.support.sessions import assert_close, write_batch

GAMMA = 0.6


def flat_of(A, B, gamma=GAMMA):
    """Return the published projection, from the factors and an explicit count of the descending products."""
    (a, U_A), (b, U_B) = torch.linalg.eigh(A), torch.linalg.eigh(B)
    products = b[:, None] * a[None, :]
    value, held = 0.0, 0.0
    for value in sorted(products.flatten().tolist(), reverse=True):
        held += value
        if held >= gamma * float(products.sum()):
            break
    mask = (products < value).double()
    return lambda gradient: U_B @ ((U_B.T @ gradient @ U_A) * mask) @ U_A.T


def ready(session, **options):
    editor = CrispEdit(CrispEdit.Options(gamma=GAMMA, stop_loss=-1.0, epochs=5, **options))
    editor.prepare(session)
    return editor


def factors(session):
    return {site: (session.second_moment(site), session.gradient_moment(site)) for site in session.sites}


def test_a_batch_is_trained_along_the_flat_directions(session):
    editor, batch = ready(session, sequential=False), requests_of("b", 4)
    flat = {site: flat_of(A, B) for site, (A, B) in factors(session).items()}
    direction = lambda site, gradient: flat[site](gradient)  # noqa: E731
    expected = adam(session, batch, [range(4)] * 5, lr=editor.options.lr, direction=direction)
    write_batch(session, editor, batch)
    for site in session.sites:
        assert_close(session.change(site), expected[site], 1e-5)
    assert not any(editor.state())


def test_later_batches_count_the_curvature_of_earlier_ones(session):
    """A and B of the reference text, of 10 d_in tokens, and of each batch's first epoch are averaged by tokens."""
    editor, means, tokens = ready(session), factors(session), 10 * session.shape[1]
    for number in range(3):
        batch = requests_of(f"b{number}", 4)
        seen = session.gradients(batch, positions="all", ended=True).sites
        flat = {site: flat_of(A, B) for site, (A, B) in means.items()}
        before = {site: session.weight(site).double() for site in session.sites}
        direction = lambda site, gradient, flat=flat: flat[site](gradient)  # noqa: E731
        expected = adam(session, batch, [range(4)] * 5, lr=editor.options.lr, direction=direction)
        write_batch(session, editor, batch)
        count = seen[session.sites[0]].inputs.shape[1]
        for site in session.sites:
            assert_close(session.weight(site).double() - before[site], expected[site], 1e-5)
            pairs = zip(means[site], (seen[site].inputs, seen[site].gradients), strict=True)
            means[site] = tuple((tokens * mean + new @ new.T) / (tokens + count) for mean, new in pairs)
        tokens += count
    assert editor.record()["sites"][session.sites[0].module]["tokens"] == tokens


def test_the_mask_leaves_out_the_share_that_it_is_asked_for():
    b, a = torch.tensor([4.0, 1.0]).double(), torch.tensor([3.0, 1.0]).double()
    # The products are 12, 4, 3 and 1.
    assert small(b, a, 0.5).tolist() == [[False, True], [True, True]]
    assert small(b, a, 0.8).tolist() == [[False, False], [True, True]]
    assert small(b, a, 0.95).tolist() == [[False, False], [False, True]]


def test_its_state_is_the_curvature(session):
    editor, other = ready(session), CrispEdit(CrispEdit.Options(gamma=GAMMA))
    write_batch(session, editor, requests_of("a", 3))
    saved = through_bytes(editor.state())
    other.load_state(session, saved)
    assert same_state(other.state(), saved)
    gradient = session.random("g", size=session.shape)
    for site in session.sites:
        one, two = (each.direction(session, site, gradient) for each in (editor, other))
        assert torch.equal(one, two)
    with pytest.raises(StateError, match="crispedit"):
        other.load_state(session, State({}, {"tokens": {}}))


def test_unusable_options_are_refused():
    with pytest.raises(OptionError, match="gamma"):
        build(CrispEdit.Options, {"gamma": 1}, owner="crispedit")
