"""Second moments against a plain pass, and the cache that must never serve another model."""

from __future__ import annotations

import itertools
import json
import sys
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from editcli.commands.stats import MomentsRecipe, compute
from editcli.editing.session import ModelSession
from editcli.errors import StatisticsError
from editcli.models.forward import hooked
from editcli.models.loading import LoadedModel, open_model, resolve_model
from editcli.settings.core import StatisticsOptions
from editcli.statistics import corpus as corpora
from editcli.statistics.corpus import open_corpus
from editcli.statistics.moments import SecondMoments
from editcli.testing import tiny_model_folder
from tests.support.reporters import Listener

TEXT = [
    "The capital city of France is Paris",
    "Bob works",
    "In Spain the river is by the tower",
    "Ann lives in Rome",
] * 9


def opened(folder: Path) -> LoadedModel:
    return open_model(resolve_model(folder))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(TEXT), encoding="utf-8")
    return path


def moments(loaded: LoadedModel, corpus: Path | str, cache: Path, **choices: object) -> SecondMoments:
    options = StatisticsOptions(**{"tokens": 120, "batch_tokens": 32, **choices})  # pyright: ignore[reportArgumentType]
    return SecondMoments(loaded, options=options, corpus=str(corpus), cache=cache, reporter=Listener())


def sites(loaded: LoadedModel, *layers: int):
    return [loaded.architecture.site(layer) for layer in layers]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_equals_the_mean_outer_product_of_the_keys(family: str, corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model", family))
    found = moments(loaded, corpus, tmp_path / "cache")
    found.plan(sites(loaded, 0, 2))
    for site in sites(loaded, 0, 2):
        keys: list[torch.Tensor] = []

        def see(owner: object, entered: torch.Tensor, output: object, keys: list[torch.Tensor] = keys) -> None:
            keys.append(entered.detach().reshape(-1, entered.shape[-1]).double())

        read = 0
        for text in TEXT:
            ids = loaded.tokens.tokenizer(text)["input_ids"][: 120 - read]
            read += len(ids)
            with torch.no_grad(), hooked(loaded.architecture.projection(site.layer), see):
                loaded.model(input_ids=torch.tensor([ids]))
            if read >= 120:
                break
        stacked = torch.cat(keys)
        assert len(stacked) == 120
        torch.testing.assert_close(found(site), stacked.T @ stacked / 120, rtol=1e-4, atol=1e-6)
        assert found(site).dtype == torch.float64


@pytest.fixture
def three_sites(corpus: Path, tmp_path: Path) -> SecondMoments:
    """The moments of a model of which three sites were planned, and then asked for."""
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, tmp_path / "cache")
    found.plan(sites(loaded, 0, 1, 2))
    for site in sites(loaded, 0, 1, 2):
        found(site)
    return found


def test_sites_that_were_planned_are_computed_in_one_pass(three_sites: SecondMoments) -> None:
    found = three_sites
    assert isinstance(found.reporter, Listener)
    assert found.reporter.phases == ["Second moments"]


def test_the_cache_gives_the_same_bytes_without_computing(corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    computed = moments(loaded, corpus, tmp_path / "cache")(site)
    again = moments(loaded, corpus, tmp_path / "cache")
    torch.testing.assert_close(again(site), computed, rtol=0, atol=0)
    assert isinstance(again.reporter, Listener)
    assert again.reporter.phases == []


@pytest.mark.parametrize("change", ["weights", "corpus", "tokens", "max_length"])
def test_whatever_a_moment_depends_on_is_in_its_key(change: str, corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    before = moments(loaded, corpus, tmp_path / "cache")
    before(site)
    choices: dict[str, object] = {}
    if change == "weights":
        loaded = opened(tiny_model_folder(tmp_path / "other" / "model", seed=1))
    elif change == "corpus":
        corpus.write_text("\n".join(reversed(TEXT)), encoding="utf-8")
    else:
        choices[change] = 60 if change == "tokens" else 5
    assert not moments(loaded, corpus, tmp_path / "cache", **choices).is_cached(site)


def test_layers_above_the_site_do_not_matter(corpus: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny_model_folder(tmp_path / "model")
    loaded = opened(folder)
    low, high = sites(loaded, 0, 2)
    found = moments(loaded, corpus, tmp_path / "cache")
    before = [found.identity(site).fingerprint for site in (low, high)]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    changed = moments(opened(folder), corpus, tmp_path / "cache")
    after = [changed.identity(site).fingerprint for site in (low, high)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_a_statistics_file_of_another_model_is_refused(corpus: Path, tmp_path: Path) -> None:
    """Same shape, same folder name, other weights: the published tools accept such a file silently."""
    loaded = opened(tiny_model_folder(tmp_path / "a" / "model"))
    (site,) = sites(loaded, 1)
    found = moments(loaded, corpus, tmp_path / "cache")
    found.save(tmp_path / "stats.safetensors", [site])
    own = SecondMoments(loaded, corpus=str(corpus), file=tmp_path / "stats.safetensors", cache=tmp_path / "none")
    torch.testing.assert_close(own(site), found(site), rtol=0, atol=0)
    other = opened(tiny_model_folder(tmp_path / "b" / "model", seed=1))
    wrong = SecondMoments(other, corpus=str(corpus), file=tmp_path / "stats.safetensors", cache=tmp_path / "none")
    with pytest.raises(StatisticsError, match="was made for another model"):
        wrong(site)
    with pytest.raises(StatisticsError, match="has nothing on"):
        own(sites(loaded, 2)[0])


@pytest.mark.slow
def test_text_of_the_models_own_needs_no_file_and_repeats(tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    first = moments(loaded, "self", tmp_path / "one")(site)
    again = moments(loaded, "self", tmp_path / "two")(site)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert bool((torch.linalg.eigvalsh(first) > -1e-9).all())


def default(loaded: LoadedModel, cache: Path, **choices: object) -> SecondMoments:
    options = StatisticsOptions(**choices)  # pyright: ignore[reportArgumentType]
    return SecondMoments(loaded, options=options, cache=cache, reporter=Listener())


def test_a_model_without_text_of_its_own_reads_the_packages_prose(tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    found = default(loaded, tmp_path / "cache", tokens=500)
    moment = found(site)
    assert isinstance(found.reporter, Listener)
    assert found.reporter.phases == ["Second moments"], "the model writes nothing"
    by_name = SecondMoments(loaded, options=StatisticsOptions(tokens=500), corpus="english", cache=tmp_path / "cache")
    assert by_name.is_cached(site)
    record = found.record([site])
    assert record == {**record, "corpus": "english", "tokens": 500, "written_by_the_model": 0}
    other_seed = SecondMoments(loaded, options=StatisticsOptions(tokens=500), cache=tmp_path / "cache", seed=1)
    assert other_seed.is_cached(site), "text that is not needed is not in the key"
    plain = SecondMoments(loaded, options=StatisticsOptions(tokens=500), corpus=str(corpora.english_file()))
    torch.testing.assert_close(plain(site), moment, rtol=0, atol=0)


def test_the_bundled_model_keeps_its_text(tmp_path: Path) -> None:
    loaded = open_model(resolve_model(None), device="cpu")
    assert default(loaded, tmp_path).record([loaded.architecture.site(0)])["corpus"] == "reference.txt"


def test_a_model_writes_only_what_the_prose_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = tmp_path / "english.txt"
    prose.write_text("\n".join(TEXT), encoding="utf-8")
    monkeypatch.setattr(corpora, "english_file", lambda: prose)
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    length = default(loaded, tmp_path).corpus.length
    needed = {tokens: default(loaded, tmp_path, tokens=tokens) for tokens in (length, length + 100)}
    identities = {tokens: found.identity(site).corpus for tokens, found in needed.items()}
    assert identities[length + 100] == f"{identities[length]}+self:0:256"
    assert [found.record([site])["written_by_the_model"] for found in needed.values()] == [0, 100]
    rows = list(itertools.islice(needed[length + 100].corpus.read(length + 100), len(TEXT) + 1))
    assert rows[: len(TEXT)] == list(needed[length].corpus.read(length))
    written = next(open_corpus("self", loaded, max_length=512).rows())
    assert rows[-1] == written
    said = (["Second moments"], ["Second moments", "Writing reference text"])
    for found, phases in zip(needed.values(), said, strict=True):
        assert isinstance(found.reporter, Listener)
        found.reporter.phases.clear()
        found(site)
        assert found.reporter.phases == phases


def test_short_prose_serves_down_to_half_of_what_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = tmp_path / "english.txt"
    prose.write_text("\n".join(TEXT), encoding="utf-8")
    monkeypatch.setattr(corpora, "english_file", lambda: prose)
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    width = loaded.architecture.shape(1)[1]
    length = default(loaded, tmp_path).corpus.length
    few, enough, many = (length // width, 2 * (length // width), 2 * (length // width) + 4)
    read = [default(loaded, tmp_path, tokens_per_dim=count).record([site]) for count in (few, enough, many)]
    assert [record["tokens"] for record in read] == [few * width, length, many * width // 2]
    assert [record["written_by_the_model"] for record in read] == [0, 0, many * width // 2 - length]
    file = moments(loaded, prose, tmp_path, tokens=None, tokens_per_dim=many)
    assert file.tokens_for(site) == many * width, "a text of the user's is read as far as it goes"


def test_the_prose_is_long_enough_and_one_paragraph_a_line() -> None:
    text = corpora.english_file().read_text("utf-8")
    assert len(text) >= 100_000
    paragraphs = text.splitlines()
    assert len(set(paragraphs)) == len(paragraphs) > 100
    assert all(paragraph == paragraph.strip() for paragraph in paragraphs)


def test_reading_ends_at_the_last_site(corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, tmp_path / "cache")
    found.plan(sites(loaded, 0, 1))
    called: list[str] = []
    watched = {"the next block": loaded.architecture.block(2), "the head": loaded.architecture.head}
    with ExitStack() as stack:
        for name, module in watched.items():
            stack.enter_context(hooked(module, lambda *parts, name=name: called.append(name)))
        found(sites(loaded, 0)[0])
    assert called == []


def test_sequences_stay_short_whatever_context_the_model_claims(tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model", max_position_embeddings=131072))
    corpus = tmp_path / "long.txt"
    corpus.write_text(" ".join(TEXT * 40), encoding="utf-8")
    longest = 0

    def see(owner: object, entered: torch.Tensor, output: object) -> None:
        nonlocal longest
        longest = max(longest, entered.shape[1])

    with hooked(loaded.architecture.block(0), see):
        moments(loaded, corpus, tmp_path / "cache", tokens=3000, max_length=512, batch_tokens=600)(sites(loaded, 1)[0])
    assert longest == 512


ENDINGS = "one\r\ntwo\rthree\n\n \u00a0\n\ufeff four\u2028and\x85five \x0b six\n\tseven eight"


@pytest.mark.parametrize("text", [ENDINGS, "\ufeff" + ENDINGS + "\n", "", "\n", "x" * 5000 + "\n" + "y z " * 3000])
def test_the_texts_of_an_ordinary_corpus_are_its_lines(text: str, tmp_path: Path) -> None:
    """Statistics that were computed before lines had a bound stay what they are."""
    plain, records = tmp_path / "corpus.txt", tmp_path / "corpus.jsonl"
    plain.write_text(text, encoding="utf-8", newline="")
    with plain.open(encoding="utf-8") as file:
        lines = [line.strip() for line in file if line.strip()]
    assert list(corpora._file_texts(plain)()) == lines
    written = "".join(f"{json.dumps({'text': f' {line} '}, ensure_ascii=False)}\n\n" for line in lines)
    records.write_text(written.removesuffix("\n\n"), encoding="utf-8")
    assert list(corpora._file_texts(records)()) == [f" {line} " for line in lines]
    assert all(list(corpora._pieces(line)) == [line] for line in lines)


@pytest.mark.parametrize("line", ["a bc def ghij " * 9, "x" * 95, " " * 70 + "end", "a" + "b" * 20 + " c" * 30])
@pytest.mark.parametrize("after", ["", "\n", "\nlast", "\r\n\nlast\n"])
def test_a_long_line_is_cut_at_spaces_and_nothing_is_lost(
    line: str, after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpora, "PIECE", 16)
    path = tmp_path / "corpus.txt"
    path.write_text(line + after, encoding="utf-8", newline="")
    found = list(corpora._file_texts(path)())
    assert max(map(len, found)) <= 16
    assert "".join("".join(found).split()) == "".join((line + after).split())
    if "x" not in line and "b" * 20 not in line:
        assert [word for text in found for word in text.split()] == (line + after).split()


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
def test_a_file_without_line_breaks_does_not_fill_the_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 24
    monkeypatch.setattr(corpora, "PIECE", 1 << 14)
    monkeypatch.setattr(corpora, "MAX_RECORD", 1 << 14)
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    path = tmp_path / name
    path.write_bytes(b"Paris Rome Spain" * (size // 16))
    rows = open_corpus(str(path), loaded, max_length=64).rows()
    tracemalloc.start()
    try:
        if name.endswith("jsonl"):
            with pytest.raises(StatisticsError, match=r"corpus\.jsonl:1: the line is longer than 16,384 characters"):
                next(rows)
        else:
            assert [len(next(rows)) for _ in range(20)] == [64] * 20
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size // 4


@pytest.mark.parametrize("name", ["corpus.txt", "corpus.jsonl"])
def test_a_corpus_in_another_encoding_is_refused_with_a_sentence(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes('"Caf\u00e9 au lait"\n'.encode("latin-1"))
    with pytest.raises(StatisticsError, match=f"{name} is not UTF-8 text"):
        list(corpora._file_texts(path)())


def test_a_record_of_the_largest_size_is_read_whole_and_tokenised_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    path = tmp_path / "corpus.jsonl"
    line = json.dumps(" ".join(TEXT))
    path.write_text(f"{line}\n{line}")
    monkeypatch.setattr(corpora, "MAX_RECORD", len(line))
    whole = [token for row in open_corpus(str(path), loaded, max_length=10_000).rows() for token in row]
    monkeypatch.setattr(corpora, "PIECE", 100)
    rows = list(open_corpus(str(path), loaded, max_length=10_000).rows())
    assert 2 * len(line) // 100 <= len(rows)
    parts = [loaded.tokens.tokenizer.decode(row, skip_special_tokens=True) for row in [whole, *rows]]
    assert "".join(parts[0].split()) == "".join("".join(parts[1:]).split())


def test_a_corpus_that_ends_early_is_said(corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, tmp_path / "cache", tokens=100_000)
    found(sites(loaded, 1)[0])
    assert isinstance(found.reporter, Listener)
    assert any("ended" in text and "early" in text for text in found.reporter.said)


def test_a_damaged_cache_file_is_named(corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, tmp_path / "cache")
    (site,) = sites(loaded, 1)
    found(site)
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StatisticsError, match=path.name):
        moments(loaded, corpus, tmp_path / "cache")(site)


def test_a_decomposition_is_cached_by_the_content_of_its_moment(corpus: Path, tmp_path: Path) -> None:
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    (site,) = sites(loaded, 1)
    found = moments(loaded, corpus, tmp_path / "cache")

    def session(moment: SecondMoments) -> ModelSession:
        return ModelSession(loaded, (1,), prefixes=(), second_moment=moment, cache=tmp_path / "cache")

    values, vectors = session(found).decomposition(site)
    torch.testing.assert_close((vectors * values) @ vectors.T, found(site), rtol=1e-5, atol=1e-7)
    again = session(moments(loaded, corpus, tmp_path / "cache")).decomposition(site)
    assert all(torch.equal(one, other) for one, other in zip((values, vectors), again, strict=True))
    assert len(list((tmp_path / "cache").glob("eigen-*"))) == 1
    session(moments(loaded, corpus, tmp_path / "cache", tokens=60)).decomposition(site)
    (old, new) = sorted((tmp_path / "cache").glob("eigen-*"))
    old.write_bytes(b"damaged")
    new.write_bytes(b"damaged")
    with pytest.raises(StatisticsError, match="delete it"):
        session(found).decomposition(site)


@pytest.mark.parametrize("spec", ["nowhere.txt", "hf:some/dataset"])
def test_a_corpus_that_cannot_be_had_is_one_sentence(
    spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # As if the extra were not installed.
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    with pytest.raises(StatisticsError, match=r"nowhere\.txt|datasets"):
        moments(loaded, spec, tmp_path / "cache")(sites(loaded, 1)[0])


@pytest.fixture
def no_cache(tmp_path: Path) -> Path:
    """A cache folder that nobody can make, whatever the rights of who runs the tests."""
    (tmp_path / "file").write_text("in the way", "utf-8")
    return tmp_path / "file" / "cache"


def test_a_cache_that_cannot_be_written_is_mentioned_once(corpus: Path, no_cache: Path, tmp_path: Path) -> None:
    """Nothing is computed twice for that, and what is computed of the moments says no more."""
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, no_cache)
    found.plan(sites(loaded, 0, 1))
    session = ModelSession(loaded, (0, 1), prefixes=(), second_moment=found, cache=found.files, reporter=found.reporter)
    cached = moments(loaded, corpus, tmp_path / "cache")
    for site in (*sites(loaded, 0, 1), *sites(loaded, 0, 1)):
        session.decomposition(site)
        assert torch.equal(found(site), cached(site))
    assert isinstance(found.reporter, Listener)
    assert found.reporter.phases.count("Second moments") == 1
    (warning,) = (text for text in found.reporter.said if "cache" in text)
    assert str(no_cache) in warning
    assert "XDG_CACHE_HOME" in warning


def test_statistics_that_cannot_be_cached_need_a_file(
    corpus: Path, no_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before anything is computed; with a file the command does its work."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(no_cache))
    folder = tiny_model_folder(tmp_path / "model")
    recipe = MomentsRecipe(model=str(folder), layers=(1,), corpus=str(corpus), options=StatisticsOptions(tokens=60))
    with pytest.raises(StatisticsError, match=r"cannot be written; write to a file with --out"):
        compute(recipe)
    report = compute(replace(recipe, out=str(tmp_path / "stats.safetensors")))
    assert [(site.path, site.computed) for site in report.sites] == [(str(tmp_path / "stats.safetensors"), True)]
    loaded = opened(folder)
    SecondMoments(loaded, file=tmp_path / "stats.safetensors")(*sites(loaded, 1))


def test_an_account_without_a_home_folder_gets_no_folder_of_that_name(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = opened(tiny_model_folder(tmp_path / "model"))
    found = moments(loaded, corpus, Path("~/.cache/editcli"))
    found(*sites(loaded, 1))
    assert not (tmp_path / "~").exists()
    assert isinstance(found.reporter, Listener)
    assert any("no home folder" in text for text in found.reporter.said)


def test_what_is_cached_does_not_stay_in_memory(three_sites: SecondMoments) -> None:
    assert not three_sites._computed


def test_a_text_longer_than_the_models_context_is_read_in_pieces(tmp_path: Path) -> None:
    """Learned positions end where the context does; pieces are as short as the context, not as the option."""
    loaded = opened(tiny_model_folder(tmp_path / "model", "gpt2"))
    context = loaded.tokens.max_length
    assert context is not None
    assert context < StatisticsOptions().max_length
    (tmp_path / "long.txt").write_text("The city of London is on the river. " * context)
    asked = [
        moments(loaded, tmp_path / "long.txt", tmp_path / str(n), tokens=600, max_length=n) for n in (512, context)
    ]
    (site,) = sites(loaded, 1)
    one, other = (each(site) for each in asked)
    assert torch.equal(one, other)
    assert asked[0].identity(site) == asked[1].identity(site)
