"""Second moments E[k k^T] of the keys on reference text, always of the unedited model.

Ten tokens per key dimension are enough (arXiv 2506.04226). A result is cached under the user's cache folder, keyed by
everything it depends on: the weights up to the site, the tokenizer, the corpus and how much of it was read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from platformdirs import user_cache_path
from torch import Tensor

from editcli.distributed.team import Team
from editcli.errors import StatisticsError
from editcli.linalg.precision import double, double_device
from editcli.models.experts import routed
from editcli.models.forward import chunks, hooked_call, pass_tokens, run
from editcli.models.keys import read_keys
from editcli.models.loading import LoadedModel
from editcli.models.matmul import gram, quick_linears
from editcli.models.offload import device_of
from editcli.models.tokens import Encoded
from editcli.plugin.interfaces import Site
from editcli.reporting import Reporter, Silent
from editcli.settings.core import StatisticsOptions
from editcli.statistics.cache import Cache, fingerprint, load
from editcli.statistics.corpus import Corpus, open_corpus
from editcli.storage.checkpoint import file_digest
from editcli.storage.files import write_safetensors

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Identity:
    """The inputs that determine a second moment of a site."""

    weights: str
    tokenizer: str
    dtype: str
    module: str
    corpus: str
    tokens: int
    max_length: int
    format: int = FORMAT

    @property
    def fingerprint(self) -> str:
        """Hash of all fields."""
        return fingerprint(asdict(self))

    @property
    def model(self) -> str:
        """Hash of the fields that say which model this is."""
        parts = (self.weights, self.tokenizer, self.module)
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


class SecondMoments:
    """Second moments of one model: from the cache, from a file that the user names, or computed."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        options: StatisticsOptions | None = None,
        corpus: str | None = None,
        file: Path | None = None,
        cache: Path | None = None,
        reporter: Reporter | None = None,
        seed: int = 0,
        team: Team | None = None,
    ):
        self.loaded, self.options, self.team = loaded, options or StatisticsOptions(), team or Team()
        # Learned positions end where the context does.
        self.max_length = min(self.options.max_length, loaded.tokens.max_length or self.options.max_length)
        self.file, self.reporter = file, reporter or Silent()
        self.corpus: Corpus = open_corpus(
            corpus, loaded, max_length=self.max_length, seed=seed, team=self.team, reporter=self.reporter
        )
        self.cache = cache if cache is not None else user_cache_path("editcli") / "second-moments"
        self.files = Cache(self.cache, self.reporter)
        """The files in the folder ``cache``."""
        self._uncached: dict[Site, Tensor] = {}
        self._digests: dict[str, str] = {}
        self._computed: dict[Site, Tensor] = {}
        self._planned: tuple[Site, ...] = ()
        self.asked = False
        """Whether any second moment was read: some editors use no reference text."""

    def plan(self, sites: Sequence[Site]) -> None:
        """Announce the sites that will be read, so that the missing ones are computed in one pass over the corpus."""
        self._planned = tuple(sites)

    def __call__(self, site: Site) -> Tensor:
        """Return C = E[k k^T] of ``site``, (d_in, d_in) float64.

        Of a site of E routed experts, the sums of (k, 1) (k, 1)^T over the tokens that each reads, (E, d + 1, d + 1):
        the corner is the number of those tokens.
        """
        self.asked = True
        stored = self.team.lead_tensors("second moments", lambda: self._stored(site))
        if not stored:
            if site not in self._computed:
                self.compute(self.missing(sorted({*self._planned, site}, key=lambda s: s.layer)))
            stored = (self._computed[site],)
        # A moment that was computed with others and then read from the cache would stay in memory to the end.
        self._computed.pop(site, None)
        device = device_of(self.loaded.architecture.projection(site.layer))
        # In single precision, as on disk, so that a run that reads the cache equals the run that filled it.
        return double(stored[0].float(), device)

    def is_cached(self, site: Site) -> bool:
        """Tell whether a site's second moment can be read instead of computed."""
        return self.file is not None or site in self._uncached or self.files.has(self.identity(site).fingerprint)

    def missing(self, sites: Sequence[Site]) -> list[Site]:
        """Return those of ``sites`` that the cache of rank 0 lacks."""
        flags = self.team.lead("missing", lambda: [not self.is_cached(site) for site in sites])
        return [site for site, is_missing in zip(sites, flags, strict=True) if is_missing]

    @property
    def uncached(self) -> Mapping[Site, Tensor]:
        """The computed moments that could not be cached: they stay in memory."""
        return self._uncached

    def tokens_for(self, site: Site) -> int:
        """Return how many tokens are read for a site.

        If the text of the package is too short, half as many tokens suffice: on a model of 135M parameters, five tokens
        per dimension disturbed held-out text a fifth more than ten, one and a half four times as much, one without
        bound. Below that the model generates the rest, which takes many times as long as reading.
        """
        if self.options.tokens:
            return self.options.tokens
        target = self.options.tokens_per_dim * self.loaded.architecture.shape(site.layer)[1]
        if site.experts:
            # Each token is read by some of the experts alone.
            target //= self.loaded.architecture.experts_per_token
        return target if self.corpus.more is None else min(target, max(self.corpus.length, target // 2))

    def identity(self, site: Site) -> Identity:
        """Return everything that a site's second moment depends on."""
        return Identity(
            weights=self._weights_digest(site),
            tokenizer=self.loaded.source.tokenizer_digest,
            dtype=str(next(self.loaded.model.parameters()).dtype),
            module=site.module,
            corpus=self.corpus.identity_of(self.tokens_for(site)),
            tokens=self.tokens_for(site),
            max_length=self.max_length,
        )

    def record(self, sites: Sequence[Site]) -> dict[str, Any]:
        """Return the text that the second moments of ``sites`` are computed on, for ``run.json``."""
        if self.file is not None:
            return {"file": str(self.file), "sha256": file_digest(self.file)}
        tokens = max(self.tokens_for(site) for site in sites)
        written = tokens - self.corpus.length if len(self.corpus.parts(tokens)) > 1 else 0
        record = {"corpus": self.corpus.name, "identity": self.corpus.identity_of(tokens), "tokens": tokens}
        return {**record, "written_by_the_model": written}

    def compute(self, sites: Sequence[Site]) -> None:
        """Read the corpus once and compute the second moments of ``sites``; store them in the cache."""
        total = max(self.tokens_for(site) for site in sites)
        self.reporter.note(
            f"Computing second moments of {len(sites)} sites on {total:,} tokens of {self.corpus.name}, once"
        )
        moments = self._accumulate(sites, total)
        for site, moment in moments.items():
            self._computed[site] = moment
            if self.team.leads:
                identity = self.identity(site)
                tensors = {f"{site.module}.second_moment": moment}
                if not self.files.write(identity.fingerprint, tensors, asdict(identity)):
                    self._uncached[site] = moment

    def save(self, path: Path, sites: Sequence[Site]) -> None:
        """Have rank 0 write the second moments of ``sites`` to one file that ``--stats`` accepts."""
        tensors = {f"{site.module}.second_moment": self(site).float().cpu() for site in sites}
        if not self.team.leads:
            return
        identities = {site.module: asdict(self.identity(site)) for site in sites}
        models = {site.module: self.identity(site).model for site in sites}
        metadata = {"format": str(FORMAT), "identities": json.dumps(identities), "models": json.dumps(models)}
        write_safetensors(path, tensors, metadata)

    def _accumulate(self, sites: Sequence[Site], total: int) -> dict[Site, Tensor]:
        sums = {site: self._zeros(site) for site in sites}
        budget = pass_tokens(self.options.batch_tokens, self.loaded.input_device)
        with self.reporter.phase("Second moments", total, "tokens") as advance, quick_linears(self.loaded.model):
            for number, batch in enumerate(_batches(self.corpus.read(total), total, budget)):
                # Batches have about the same number of tokens, so taking turns is even.
                if number % self.team.parts == self.team.part:
                    self._add(batch, sums)
                advance(sum(len(row.ids) for row in batch))
                total -= sum(len(row.ids) for row in batch)
        self.team.total("sums of second moments", list(sums.values()))
        if total > 0:
            self.reporter.warn(f"the corpus {self.corpus.name} ended {total:,} tokens early: statistics are less exact")
        read = max(self.tokens_for(site) for site in sites) - total
        if read <= 0:
            raise StatisticsError(f"the corpus {self.corpus.name} holds no text of at least two tokens")
        return {site: (outer if site.experts else outer / read).float().cpu() for site, outer in sums.items()}

    def _zeros(self, site: Site) -> Tensor:
        """Return zeros for a site's sum in float64, where the model computes or on the CPU."""
        architecture = self.loaded.architecture
        size = site.moment_shape(architecture.shape(site.layer)[1])
        device = double_device(device_of(architecture.projection(site.layer)))
        return torch.zeros(size, dtype=torch.float64, device=device)

    @torch.no_grad()
    def _add(self, batch: Sequence[Encoded], sums: Mapping[Site, Tensor]) -> None:
        """Add k k^T over a batch's tokens to the sum of every site, in float64 where the device has it."""
        architecture = self.loaded.architecture
        last = max(sums, key=lambda site: site.layer)
        ids = self.loaded.tokens.pad(batch, self.loaded.input_device)
        real = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(batch):
            real[row, : len(text.ids)] = True

        def summing(site: Site) -> Any:
            def add(entered: Tensor) -> None:
                keys = entered.reshape(-1, entered.shape[-1])[real.flatten().to(entered.device)].float()
                outer = gram(keys)
                sums[site].add_(double(outer, outer.device))

            def add_routed(owner: Any, args: tuple[Any, ...]) -> None:
                add_routed_moments(sums[site], owner, args, real.flatten())

            if site.experts:
                return hooked_call(architecture.projection(site.layer), add_routed, stop=site == last)
            return read_keys(architecture, site.layer, add, stop=site == last)

        with ExitStack() as stack:
            for site in sums:
                stack.enter_context(summing(site))
            run(self.loaded.model, ids)

    def _stored(self, site: Site) -> tuple[Tensor, ...]:
        """Return a site's moment from the user's file or the cache; nothing if it has to be computed."""
        if self.file is not None:
            return (self._from_file(site),)
        if site in self._uncached:
            # The cache did not take it; computing it again for every reader would take minutes.
            return (self._uncached[site],)
        tensors = self.files.read(self.identity(site).fingerprint)
        return () if tensors is None else (tensors[f"{site.module}.second_moment"],)

    def _from_file(self, site: Site) -> Tensor:
        assert self.file is not None
        tensors, metadata = load(self.file)
        models = json.loads(metadata.get("models", "{}"))
        if site.module not in models:
            also = " --experts" if site.experts else ""
            raise StatisticsError(
                f"{self.file} has nothing on {site.module}; compute it with: editcli stats compute{also}"
            )
        if models[site.module] != self.identity(site).model:
            raise StatisticsError(
                f"{self.file} was made for another model (its weights up to {site.module} differ from "
                f"{self.loaded.source.name}'s); compute it again with: editcli stats compute"
            )
        return tensors[f"{site.module}.second_moment"]

    def _weights_digest(self, site: Site) -> str:
        """Hash the tensors that a site's keys depend on: everything but the blocks above it."""
        checkpoint = self.loaded.checkpoint
        blocks = re.escape(site.module.split(f".{site.layer}.")[0].split(".")[-1])
        block = re.compile(rf"(?:^|\.){blocks}\.(\d+)\.")
        combined = hashlib.sha256()
        for name in sorted(checkpoint.names()):
            match = block.search(name)
            if match is None or int(match.group(1)) <= site.layer:
                if name not in self._digests:
                    self._digests[name] = checkpoint.digest_of([name])
                combined.update(self._digests[name].encode())
        return combined.hexdigest()


def _batches(rows: Iterator[list[int]], total: int, budget: int) -> Iterator[list[Encoded]]:
    """Yield batches of similar length until ``total`` tokens were read; the last row is cut to fit."""
    while total > 0:
        window: list[Encoded] = []
        size = 0
        for ids in rows:
            piece = ids[: total - size]
            window.append(Encoded(tuple(piece), -1, range(0)))
            size += len(piece)
            if size >= min(total, 8 * budget):
                break
        if not window:
            return
        total -= size
        for group in chunks(window, budget=budget):
            yield [window[index] for index in islice(group, None)]


def add_routed_moments(sums: Tensor, module: Any, args: tuple[Any, ...], real: Tensor) -> None:
    """Add (k, 1) (k, 1)^T over the tokens that each expert reads to ``sums``, (E, d + 1, d + 1) in float64.

    ``args`` are those of the module of the experts; tokens that are not ``real`` do not count.
    """
    for part in routed(module, *args):
        keys = part.keys[real.to(part.tokens.device)[part.tokens]].float()
        outer = gram(torch.nn.functional.pad(keys, (0, 1), value=1.0))
        sums[part.expert].add_(double(outer, sums.device))
