"""Keys, residuals and weights of a session against plain forward passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from editcli.editing import activations
from editcli.editing.session import ModelSession, generate_prefixes
from editcli.errors import ModelError, StatisticsError
from editcli.models.chat_settings import ChatSettings
from editcli.models.forward import first, hooked
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.plugin.interfaces import LowRank, Site, Values
from editcli.settings.core import TargetOptions
from editcli.testing import CHAT_TEMPLATE, tiny_model_folder, tiny_tokenizer
from tests.support.facts import REQUESTS
from tests.support.families import families
from tests.support.reporters import Listener

PREFIXES = ("Bob. ", "The river in London is. ")


@pytest.fixture(params=["llama", "gpt2", "gpt2-square"])
def loaded(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedModel:
    family, _, square = request.param.partition("-")
    return open_model(resolve_model(tiny_model_folder(tmp_path / "model", family, square=bool(square))))


def session(loaded: LoadedModel, layers: tuple[int, ...] = (1, 2)) -> ModelSession:
    return ModelSession(loaded, layers, options=TargetOptions(prefixes=2), prefixes=PREFIXES)


def random_values(loaded: LoadedModel, count: int) -> Values:
    size = loaded.architecture.shape(0)[0]
    draw = torch.Generator().manual_seed(0)
    target, initial, written = (torch.randn(size, count, generator=draw) for _ in range(3))
    return Values(target=target, initial=initial, written=written, dropped={}, loss=torch.zeros(count))


def seen_at_lookup(loaded: LoadedModel, text: str, subject: str, module: torch.nn.Module, *, output: bool) -> Tensor:
    """Run the whole text and read a module's input or output at the subject's last token."""
    batch = loaded.tokens.tokenizer(text, return_offsets_mapping=True)
    end = text.rindex(subject) + len(subject)  # A prefix may name the subject too.
    place = max(i for i, (a, b) in enumerate(batch["offset_mapping"]) if a < end and b > end - len(subject))
    found: list[Tensor] = []

    def see(owner: object, entered: Tensor, produced: object) -> None:
        found.append(first(produced) if output else entered)

    with torch.no_grad(), hooked(module, see):
        loaded.model(input_ids=torch.tensor([batch["input_ids"]]), use_cache=False)
    return found[0].reshape(len(batch["input_ids"]), -1)[place]


def test_keys_are_the_mean_of_the_bare_and_the_prefixed_prompts(loaded: LoadedModel) -> None:
    own = session(loaded)
    for site in own.sites:
        keys = own.keys(REQUESTS, site)
        projection = loaded.architecture.projection(site.layer)
        for column, request in enumerate(REQUESTS):
            texts = [prefix + request.prompt for prefix in ("", *PREFIXES)]
            bare, *prefixed = (seen_at_lookup(loaded, t, request.subject, projection, output=False) for t in texts)
            expected = (bare + torch.stack(prefixed).mean(dim=0)) / 2
            torch.testing.assert_close(keys[:, column], expected, rtol=1e-4, atol=1e-5)


def test_the_residual_is_spread_over_the_sites_that_remain(loaded: LoadedModel) -> None:
    own, values = session(loaded), random_values(loaded, len(REQUESTS))
    block = loaded.architecture.block(2)
    h = torch.stack([seen_at_lookup(loaded, r.prompt, r.subject, block, output=True) for r in REQUESTS], dim=1)
    for site, remaining in zip(own.sites, (2, 1), strict=True):
        residual = own.residual(REQUESTS, site, values)
        torch.testing.assert_close(residual, (values.target - h) / remaining, rtol=1e-4, atol=1e-4)


def test_writing_adds_left_times_right_in_the_models_orientation(loaded: LoadedModel) -> None:
    own = session(loaded)
    site = own.sites[0]
    rows, columns = loaded.architecture.shape(site.layer)
    before = own.weight(site).clone()
    key = own.keys(REQUESTS, site)[:, 0]
    update = LowRank(left=torch.randn(rows, 2), right=torch.randn(columns, 2))
    projection = loaded.architecture.projection(site.layer)
    read = REQUESTS[0]
    was = seen_at_lookup(loaded, read.prompt, read.subject, projection, output=True)
    k = seen_at_lookup(loaded, read.prompt, read.subject, projection, output=False)
    own.write(site, update)
    assert key.shape == (columns,)
    torch.testing.assert_close(own.weight(site), before + update.left @ update.right.T)
    now = seen_at_lookup(loaded, read.prompt, read.subject, projection, output=True)
    torch.testing.assert_close(now - was, update.left @ (update.right.T @ k), rtol=1e-3, atol=1e-4)


def test_restoring_gives_back_the_same_weights_and_the_baseline_never_moves(loaded: LoadedModel) -> None:
    own = session(loaded)
    site = own.sites[0]
    before, base = own.masters(), own.baseline(site)
    torch.testing.assert_close(before[site], base, rtol=0, atol=0)
    rows, columns = base.shape
    own.write(site, LowRank(torch.ones(rows, 1), torch.ones(columns, 1)))
    torch.testing.assert_close(own.baseline(site), base, rtol=0, atol=0)
    own.restore(before)
    torch.testing.assert_close(own.weight(site), base, rtol=0, atol=0)
    stored = loaded.architecture.projection(site.layer).weight
    torch.testing.assert_close(stored.T if site.transposed else stored, base, rtol=0, atol=0)


def test_a_batch_is_read_under_the_unedited_weights_in_the_middle_of_a_stream(loaded: LoadedModel) -> None:
    """Bit by bit what was read before the first write; afterwards the stream's own weights, the same objects."""
    own = session(loaded)
    unedited = [own.keys(REQUESTS, site) for site in own.sites], own.values(REQUESTS).target
    for site in own.sites:
        rows, columns = own.weight(site).shape
        own.write(site, LowRank(torch.ones(rows, 1), torch.ones(columns, 1)))
    edited, before = [own.keys(REQUESTS, site) for site in own.sites], own.masters()
    with own.under({}, unedited=True):
        again = [own.keys(REQUESTS, site) for site in own.sites], own.values(REQUESTS).target
        assert all(torch.equal(own.weight(site), own.baseline(site)) for site in own.sites)
        with pytest.raises(StatisticsError, match="belong to the unedited model"):
            own.second_moment(own.sites[0])
    assert all(torch.equal(one, other) for one, other in zip(unedited[0], again[0], strict=True))
    assert torch.equal(unedited[1], again[1])
    assert all(own.weight(site) is before[site] for site in own.sites)
    assert not torch.equal(edited[1], unedited[0][1])
    assert all(torch.equal(own.keys(REQUESTS, s), keys) for s, keys in zip(own.sites, edited, strict=True))


def test_weights_come_back_after_an_error_and_the_model_counts_as_unedited_still(loaded: LoadedModel) -> None:
    own = session(loaded)
    first, second = own.sites
    before, doubled = own.masters(), 2 * own.weight(second)
    keys = own.keys(REQUESTS, second)

    def interrupted() -> None:
        with own.under({first: 2 * before[first], second: doubled}):
            assert torch.equal(own.weight(second), doubled)
            assert not torch.equal(own.keys(REQUESTS, second), keys)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(own.weight(site) is before[site] for site in own.sites)
    assert torch.equal(own.keys(REQUESTS, second), keys)
    assert not own.written


def test_statistics_are_refused_after_the_first_write(loaded: LoadedModel) -> None:
    own = ModelSession(loaded, (1,), prefixes=(), second_moment=lambda site: torch.eye(3))
    site = own.sites[0]
    assert own.second_moment(site).shape == (3, 3)
    own.write(site, LowRank(torch.zeros(own.weight(site).shape[0], 1), torch.zeros(own.weight(site).shape[1], 1)))
    with pytest.raises(StatisticsError, match="belong to the unedited model"):
        own.second_moment(site)


def test_a_half_precision_file_is_what_the_model_holds(tmp_path: Path) -> None:
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", dtype="bfloat16")))
    own = session(loaded)
    site = own.sites[0]
    own.write(site, LowRank(torch.full((own.weight(site).shape[0], 1), 1e-3), torch.ones(own.weight(site).shape[1], 1)))
    held = loaded.architecture.projection(site.layer).weight
    assert held.dtype == torch.float32
    torch.testing.assert_close(held, own.weight(site).to(torch.bfloat16).float(), rtol=0, atol=0)


def test_a_file_more_exact_than_the_model_keeps_its_digits(tmp_path: Path) -> None:
    """A float32 checkpoint that runs in bfloat16 is saved as float32, so its masters must not be rounded."""
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model")), dtype="bfloat16")
    own = session(loaded)
    for site in own.sites:
        assert loaded.architecture.projection(site.layer).weight.dtype == torch.bfloat16
        torch.testing.assert_close(own.weight(site), own.baseline(site), rtol=0, atol=0)


def test_prefixes_depend_on_the_seed_alone(loaded: LoadedModel) -> None:
    first_run, again, other = (generate_prefixes(loaded, TargetOptions(), seed=seed) for seed in (1, 1, 2))
    assert first_run == again != other
    assert [text.split()[0].rstrip(".") for text in first_run if text[0] == "T"]
    assert all(text.endswith(". ") and "{" not in text for text in first_run)


class TestGoingOnFromTheLastSite:
    """Reads go on from what entered the last written block; starting at token zero must give the same bytes."""

    LAYERS = (0, 1, 3)
    """The first layer, a neighbour, and one further up, of four."""

    def written(self, loaded: LoadedModel, *, anew: bool) -> list[Tensor]:
        """Write one batch as the pipeline does, reading keys once more at the end as AlphaEdit does."""
        own, values = session(loaded, self.LAYERS), random_values(loaded, len(REQUESTS))
        seen: list[Tensor] = []

        def read(site: Site) -> list[Tensor]:
            found = []
            for one in (own.keys, lambda requests, site: own.residual(requests, site, values)):
                if anew:
                    own.forget_reads()
                found.append(one(REQUESTS, site))
            return found

        for site in own.sites:
            keys, residual = read(site)
            own.write(site, LowRank(residual, keys / keys.square().sum(dim=0)))
            seen += [keys, residual, own.weight(site)]
        return [*seen, *(tensor for site in own.sites for tensor in read(site))]

    @pytest.mark.parametrize("name", families())
    def test_every_family_reads_the_same_bytes(self, name: str, tmp_path: Path) -> None:
        folder = tiny_model_folder(tmp_path / "model", name)
        going_on, anew = (
            self.written(open_model(resolve_model(folder), device="cpu"), anew=anew) for anew in (False, True)
        )
        assert all(torch.equal(one, other) for one, other in zip(going_on, anew, strict=True))
        keys_before, keys_after = going_on[3], going_on[3 * len(self.LAYERS) + 2]
        assert torch.equal(keys_before, keys_after)
        assert not torch.equal(going_on[1], going_on[3 * len(self.LAYERS) + 1])

    def test_no_block_below_the_site_runs_again(self, loaded: LoadedModel) -> None:
        own, ran = session(loaded, (1, 2, 3)), []
        for layer in range(loaded.architecture.layers):
            inside = loaded.architecture.projection(layer)
            inside.register_forward_hook(lambda *a, layer=layer: ran.append(layer))
        values = random_values(loaded, len(REQUESTS))
        for site in own.sites:
            own.keys(REQUESTS, site)
            own.residual(REQUESTS, site, values)
            own.write(site, LowRank(own.weight(site)[:, :1], own.weight(site).T[:, :1]))
        bare_and_prefixed = 2
        assert ran.count(0) == bare_and_prefixed
        # Keys stop inside the site's own block; what a written block puts out is computed once for each list of texts.
        assert ran.count(1) == bare_and_prefixed + 1 + bare_and_prefixed

    def test_a_batch_that_does_not_fit_is_halved(self, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
        listener = Listener()
        own = ModelSession(loaded, (1, 2), prefixes=PREFIXES, reporter=listener)
        expected = own.keys(REQUESTS, own.sites[0])
        own.forget_reads()
        real = activations.run

        def small(model: Any, ids: Tensor) -> Any:
            if len(ids) > 2:
                raise torch.OutOfMemoryError("full")
            return real(model, ids)

        monkeypatch.setattr(activations, "run", small)
        torch.testing.assert_close(own.keys(REQUESTS, own.sites[0]), expected, rtol=1e-5, atol=1e-6)
        assert any("do not fit the memory" in note for note in listener.notes)
        monkeypatch.setattr(activations, "run", lambda model, ids: small(model, ids.new_zeros(3, 1)))
        with pytest.raises(ModelError, match=r"one text does not fit the memory at .*layers\.1\.|h\.1\."):
            own.keys(REQUESTS, own.sites[0])


def test_what_a_norm_silences_is_left_alone(tmp_path: Path) -> None:
    """A gain of zero behind the MLP: that coordinate joins no stream, so there is nothing to write, and no infinity."""
    loaded = open_model(resolve_model(tiny_model_folder(tmp_path / "model", "gemma2")))
    norm = loaded.architecture.mlp_norm(2)
    assert norm is not None
    with torch.no_grad():
        dict(norm.named_parameters())["weight"][3] = -1.0
    opened = session(loaded, (2,))
    site, values = opened.sites[0], random_values(loaded, len(REQUESTS))
    residual = opened.residual(REQUESTS, site, values)
    assert bool(residual.isfinite().all())
    taps = [activations.Hook(loaded.architecture.mlp(2))]
    (own,) = opened._activations.read(opened._lookup_rows(REQUESTS, ("",)), 2, taps)
    # Only the common factor that keeps the output's length reaches the silent coordinate.
    written = own.T + residual
    assert bool((written[3] / own.T[3] > 0).all())
    torch.testing.assert_close(written.norm(dim=0), own.T.norm(dim=0), rtol=1e-4, atol=1e-6)


def test_a_calibration_is_kept_for_one_system_message_alone(tmp_path: Path) -> None:
    """Another system message gives other hidden states, so what was measured in its place must not be read."""
    folder = tiny_model_folder(tmp_path / "model", tokenizer=tiny_tokenizer(chat_template=CHAT_TEMPLATE))
    measured: list[str] = []

    def anchor(system: str) -> float:
        loaded = open_model(resolve_model(folder), device="cpu", chat_template=ChatSettings(system=system))
        session = ModelSession(loaded, (1,), prefixes=(), cache=tmp_path / "cache")

        def measure() -> torch.Tensor:
            measured.append(system)
            return torch.tensor(float(len(system)))

        return float(session.calibrated("nas", {}, measure))

    assert [anchor("Be short."), anchor("Be very kind."), anchor("Be short.")] == [9, 13, 9]
    assert measured == ["Be short.", "Be very kind."]
