import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from editcli.editing.session import ModelSession, PilotSource
from editcli.errors import NumericalError, OptionError, StateError
from editcli.models.loading import open_model, resolve_model
from editcli.plugin.interfaces import Problem, Site, State, Update, Values
from editcli.plugin.leastsquares import ridge
from editcli.plugin.options import build
from editcli.reporting import Silent
from editcli.settings.core import TargetOptions
from editcli.testing import through_bytes, tiny_model_folder
from editcli.testing.sessions import tiny_requests
from editcli_nas.stabilizer import Nas, trimmed_mean
from tests.support.facts import requests_of


def random(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def values_of(contribution, *, written=None, initial=None):
    """Values whose contribution m + delta is ``contribution``."""
    written = random(*contribution.shape, seed=7) if written is None else written
    initial = random(*contribution.shape, seed=8) if initial is None else initial
    return Values(initial - written + contribution, initial, written, {}, torch.zeros(contribution.shape[1]))


def test_anchor_is_the_mean_norm_without_the_longest(session):
    nas = Nas(Nas.Options(pilots=40, trim=0.05))
    nas.prepare(session)
    requests, source = session.pilots(40)
    norms = session.values(requests, prefixed=False).contribution.norm(dim=0).sort().values
    assert nas.anchor == pytest.approx(float(norms[:38].mean()))
    assert nas.record() == {"anchor": nas.anchor, "standard_error": nas.error, "pilots": 40, "source": source}


def test_the_error_is_that_of_the_mean_where_nothing_is_trimmed():
    norms = random(40).abs()
    mean, error = trimmed_mean(norms, 0.0)
    assert mean == pytest.approx(float(norms.mean()))
    assert error == pytest.approx(float(norms.std()) / 40**0.5)


def test_the_error_of_a_trimmed_mean_is_its_spread_over_samples():
    generator = torch.Generator().manual_seed(0)
    samples = [torch.empty(64, dtype=torch.float64).log_normal_(generator=generator) for _ in range(3000)]
    means, errors = zip(*(trimmed_mean(sample, 0.1) for sample in samples), strict=True)
    assert sum(errors) / len(errors) == pytest.approx(float(torch.tensor(means).std()), rel=0.1)


@pytest.mark.parametrize(("spread", "served"), [(0.01, 32), (0.2, 64), (5.0, 100)])
def test_pilots_are_measured_until_the_anchor_is_sure(session, monkeypatch, spread, served):
    requests = requests_of("pilot", 100)
    norms = 3 + spread * random(100)
    asked = []

    def values(batch, *, prefixed):
        asked.append(len(batch))
        at = [requests.index(request) for request in batch]
        return values_of(torch.stack([norms[at].abs(), torch.zeros(len(at)).double()]))

    monkeypatch.setattr(session, "pilots", lambda count: (requests[:count], "made for this test"))
    monkeypatch.setattr(session, "values", values)
    nas = Nas()
    nas.prepare(session)
    assert (nas.pilots, sum(asked)) == (served, served)
    assert asked == ([32] if served == 32 else [32, served - 32])
    assert nas.anchor == pytest.approx(trimmed_mean(norms[:served].abs(), 0.05)[0])
    assert (nas.record()["standard_error"] < 0.01 * nas.anchor) == (spread < 1)


def test_an_anchor_is_measured_once_for_all_runs(tmp_path, monkeypatch):
    """Another model, layer or setting of the targets, or other pilots, are measured anew."""
    folders = [tiny_model_folder(tmp_path / f"model{seed}" / "model", seed=seed) for seed in (0, 1)]
    measured = []

    def anchor(model=0, *, layers=(0, 1), pilots=9, **targets):
        loaded = open_model(resolve_model(folders[model]), device="cpu")
        source = PilotSource(tuple(tiny_requests(pilots)), "made for this test")
        options = TargetOptions(**{"steps": 2, **targets})
        session = ModelSession(loaded, layers, options=options, prefixes=(), pilots=source, cache=tmp_path / "cache")
        unwatched = session.values
        monkeypatch.setattr(session, "values", lambda *a, **k: (measured.append(1), unwatched(*a, **k))[1])
        nas = Nas()
        nas.prepare(session)
        return nas.state()

    first, again = anchor(), anchor()
    assert len(measured) == 1
    assert first == again
    for change in ({"model": 1}, {"layers": (0, 2)}, {"pilots": 8}, {"lr": 0.1}):
        anchor(**change)
    assert len(measured) == 5


@given(seed=st.integers(0, 50), scale=st.floats(0.01, 1.9))
def test_contributions_get_the_anchor_norm_and_keep_their_direction(seed, scale):
    nas = Nas(Nas.Options(anchor=3.0))
    nas.prepare(session=None)  # pyright: ignore[reportArgumentType]
    contribution = random(9, 5, seed=seed)
    contribution *= scale * 3.0 / contribution.norm(dim=0)
    out = nas.stabilize_values(None, values_of(contribution))  # pyright: ignore[reportArgumentType]
    assert torch.allclose(out.contribution.norm(dim=0), torch.tensor(3.0).double(), rtol=1e-4)
    assert torch.allclose(out.contribution / 3.0, contribution / contribution.norm(dim=0), atol=1e-9)
    assert out.dropped == {}


def test_float32_values_with_a_long_residual_stream_still_get_the_anchor_norm():
    nas = Nas(Nas.Options(anchor=2.0))
    nas.prepare(session=None)  # pyright: ignore[reportArgumentType]
    contribution = random(64, 5)
    contribution *= 2.5 / contribution.norm(dim=0)
    initial = 30 * random(64, 5, seed=3)
    parts = [part.float() for part in (contribution, random(64, 5, seed=4), initial)]
    values = values_of(parts[0], written=parts[1], initial=parts[2])
    out = nas.stabilize_values(None, values)  # pyright: ignore[reportArgumentType]
    assert torch.allclose(out.contribution.norm(dim=0), torch.tensor(2.0), rtol=1e-4)


def test_a_contribution_beyond_the_guard_is_dropped_and_the_others_are_not():
    nas = Nas(Nas.Options(anchor=1.0, guard=2.0))
    nas.prepare(session=None)  # pyright: ignore[reportArgumentType]
    contribution = random(9, 4)
    contribution *= torch.tensor([1.0, 2.5, 0.0, float("nan")]) / contribution.norm(dim=0)
    written, initial = random(9, 4, seed=1), random(9, 4, seed=2)
    # So that the third contribution is zero exactly and not just up to rounding.
    written[:, 2] = initial[:, 2] = 0
    values = values_of(contribution, written=written, initial=initial)
    out = nas.stabilize_values(None, values)  # pyright: ignore[reportArgumentType]
    assert set(out.dropped) == {1, 2, 3}
    assert "nas.guard=2" in out.dropped[1]
    assert torch.equal(out.target[:, [1, 2, 3]], values.initial[:, [1, 2, 3]])
    assert torch.allclose(out.contribution[:, 0].norm(), torch.tensor(1.0).double())
    assert bool(out.target.isfinite().all())


@pytest.mark.parametrize("shape", [(6, 11), (11, 6), (8, 8)])
def test_norm_identity_and_bound_over_a_stream(shape):
    """Q = I, one edit: ||W'||^2 - ||W||^2 = (||v_new||^2 - ||v_old||^2) / ||k||^2, so ||v_new|| = a bounds it."""
    anchor, site = 2.0, Site(0, "block.0", False)
    nas = Nas(Nas.Options(anchor=anchor, guard=1e9))
    nas.prepare(session=None)  # pyright: ignore[reportArgumentType]
    weight, keys = random(*shape), random(shape[1], 5, seed=1)
    bound = float((anchor / keys.norm(dim=0)).square().sum())
    start = float(weight.square().sum())
    for step in range(200):
        key = keys[:, step % 5 : step % 5 + 1]
        old = weight @ key
        wanted = old + 5 * random(shape[0], 1, seed=100 + step)
        values = nas.stabilize_values(None, values_of(wanted, written=old))  # pyright: ignore[reportArgumentType]
        problem = Problem(site, key * 1e6, (values.contribution - old) * 1e6)
        update: Update = ridge(problem.keys, problem.residual, site=site.module, reporter=Silent())
        after = weight + update.dense()
        gain = float(after.square().sum() - weight.square().sum())
        expected = (anchor**2 - float(old.square().sum())) / float(key.square().sum())
        assert gain == pytest.approx(expected, rel=1e-6, abs=1e-6)
        weight = after
        # The edit's output has the anchor's norm, whatever was written before it.
        assert float((weight @ key).norm()) == pytest.approx(anchor, rel=1e-6)
        assert float(weight.square().sum()) <= start + 200 * bound


def test_anchor_is_never_measured_again(session, monkeypatch):
    nas, resumed = Nas(), Nas()
    nas.prepare(session)
    monkeypatch.setattr(session, "values", None)
    resumed.load_state(session, through_bytes(nas.state()))
    assert resumed.anchor == nas.anchor
    assert resumed.record() == nas.record()


def test_a_state_that_an_earlier_version_saved_as_tensors_is_read(session):
    nas = Nas()
    source = torch.tensor(list("drawn by löt".encode()), dtype=torch.uint8)
    tensors = {"anchor": torch.tensor(1.5).double(), "pilots": torch.tensor(7), "source": source}
    nas.load_state(session, State(tensors))
    assert nas.record() == {"anchor": 1.5, "standard_error": None, "pilots": 7, "source": "drawn by löt"}
    nas.load_state(session, State({**tensors, "error": torch.tensor(0.25).double()}))
    assert nas.record()["standard_error"] == 0.25


def test_an_anchor_set_by_hand_measures_nothing():
    nas = Nas(Nas.Options(anchor=1.25))
    nas.prepare(session=None)  # pyright: ignore[reportArgumentType]
    assert nas.record() == {"anchor": 1.25, "standard_error": None, "pilots": 0, "source": "set by hand"}


def test_what_cannot_be_measured_says_what_to_do(session, monkeypatch):
    with pytest.raises(StateError, match="start a new run"):
        Nas().load_state(session, State())
    monkeypatch.setattr(session, "pilots", lambda count: ((), "none"))
    with pytest.raises(OptionError, match=r"set nas\.anchor"):
        Nas().prepare(session)
    with pytest.raises(OptionError, match="trim"):
        build(Nas.Options, {"trim": "1.0"}, owner="nas")


def test_an_anchor_that_is_not_finite_is_refused(session, monkeypatch):
    bad = values_of(torch.full((session.shape[0], 32), float("nan"), dtype=torch.float64))
    monkeypatch.setattr(session, "values", lambda requests, prefixed: bad)
    with pytest.raises(NumericalError, match="anchor"):
        Nas().prepare(session)
