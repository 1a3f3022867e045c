"""One model under edit: keys, residuals, values and weights, always (d_out, d_in).

Edited weights are float32 masters. The model holds their cast to the dtype in which they are saved, so that the
evaluated weights are the saved ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from editcli.editing import gradients, targets
from editcli.editing.activations import Activations, Hook
from editcli.editing.engine import engine_for
from editcli.editing.sinks import begins, first_is_sink, usual_length
from editcli.errors import StateError, StatisticsError
from editcli.linalg.precision import double
from editcli.models.generate import continue_rows
from editcli.models.loading import LoadedModel
from editcli.models.offload import device_of, read_weight, replace_weight
from editcli.models.tokens import Encoded
from editcli.plugin.interfaces import Gradients, Site, Stabilizer, Update, Values
from editcli.reporting import Reporter, Silent
from editcli.requests.schema import EditRequest
from editcli.settings.core import TargetOptions
from editcli.statistics.cache import Cache, fingerprint
from editcli.statistics.decompositions import Decompositions
from editcli.storage.packing import Stored, value_of

PREFIX_STARTS = ("The", "Therefore", "Because", "I", "You")
"""First words of the generated prefixes, as in ROME's code."""

LIKELY = 10
"""Tokens of a prefix are sampled from this many likeliest ones: few, so that it stays readable."""

SecondMoment = Callable[[Site], Tensor]


@dataclass(frozen=True, slots=True)
class PilotSource:
    """Edits to calibrate on, and one line on their origin."""

    requests: tuple[EditRequest, ...]
    origin: str
    lost: str | None = None
    """Why the edits cannot be read any more; None where they can."""

    def first(self, count: int) -> Sequence[EditRequest]:
        """Return up to ``count`` of the edits; raise :class:`StateError` where they are lost."""
        if self.lost is not None:
            raise StateError(self.lost)
        return self.requests[:count]


class ModelSession:
    """Implements :class:`editcli.plugin.interfaces.Session`, and writes weights, which components may not do."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[int],
        *,
        options: TargetOptions | None = None,
        prefixes: Sequence[str] | None = None,
        second_moment: SecondMoment | None = None,
        gradient_moment: SecondMoment | None = None,
        pilots: PilotSource | None = None,
        save_dtype: torch.dtype | None = None,
        cache: Path | Cache | None = None,
        reporter: Reporter | None = None,
        seed: int = 0,
        solve_device: torch.device | None = None,
    ):
        self._solve_device = solve_device
        self.loaded, self.layers, self.seed = loaded, tuple(sorted(layers)), seed
        self.options = options or TargetOptions()
        self.reporter: Reporter = reporter or Silent()
        self.sites = tuple(loaded.architecture.site(layer) for layer in self.layers)
        if prefixes is None:
            prefixes = generate_prefixes(loaded, self.options, seed=seed, reporter=self.reporter)
        self.prefixes = tuple(prefixes)
        self._second_moment, self._pilots, self._save_dtype = second_moment, pilots, save_dtype
        self._gradient_moment = gradient_moment
        # One cache for all, so that a failure to write is reported once.
        self._files = cache if isinstance(cache, Cache) else Cache(cache, self.reporter)
        self._decompose = Decompositions(self._files, self.reporter)
        self._activations = Activations(loaded, batch_tokens=self.options.batch_tokens, reporter=self.reporter)
        self._rows: tuple[Sequence[EditRequest], dict[tuple[str, ...], list[Encoded]]] = ((), {})
        self._sinks: list[bool] | None = None
        """Whose bare text among those requests has its subject in an attention sink; None until it is asked for."""
        self._moments: dict[Site, Tensor] = {}
        self._baselines: dict[Site, Tensor] = {}
        self._masters: dict[Site, Tensor] = {site: self._loaded_weight(site) for site in self.sites}
        self.engine = engine_for(loaded)
        self.written = False
        """Whether any weight was written: from then on nothing may be measured as on the unedited model."""

    @property
    def stages(self) -> tuple[ModelSession, ...]:
        """The session itself; with ``targets.per_layer`` one for each site, which shares everything else with it."""
        return tuple(self._of(site) for site in self.sites) if self.options.per_layer else (self,)

    def _of(self, site: Site) -> ModelSession:
        """Return this session with one site alone: its last layer is where targets are optimised and measured."""
        alone = copy.copy(self)
        alone.sites, alone.layers = (site,), (site.layer,)
        return alone

    @property
    def device(self) -> torch.device:
        """The device for linear algebra: the chosen one, else that of the last edited layer."""
        return self._home(self.sites[-1])

    def weight(self, site: Site) -> Tensor:
        """Return the current W, (d_out, d_in) float32."""
        return self._masters[site]

    def baseline(self, site: Site) -> Tensor:
        """Return W_0, (d_out, d_in) float32, from the base checkpoint's files."""
        if site not in self._baselines:
            stored = self.loaded.checkpoint.read(self.stored_name(site), device=self._home(site))
            # In its stored dtype, so that a half-precision baseline costs half of a master.
            self._baselines[site] = site.oriented(stored).contiguous()
        return self._baselines[site].float()

    def stored_name(self, site: Site) -> str:
        """Return the checkpoint's name of a site's weight."""
        return self.loaded.checkpoint.weight_of(site.module)

    def second_moment(self, site: Site) -> Tensor:
        """Return C = E[k k^T], (d_in, d_in) float64, of the unedited model; do not change it in place."""
        if site.experts:
            raise StatisticsError(f"{site.module} has a second moment for each expert; ask for expert_moments")
        return self._moment(site)

    def _moment(self, site: Site) -> Tensor:
        if self.written:
            raise StatisticsError(f"{site.module}: statistics belong to the unedited model, but it was edited already")
        if self._second_moment is None:
            raise StatisticsError(f"{site.module}: this session was opened without reference-text statistics")
        if site not in self._moments:
            moment = self._second_moment(site)
            self._moments[site] = moment if self._solve_device is None else moment.to(self._solve_device)
        return self._moments[site]

    def gradient_moment(self, site: Site) -> Tensor:
        """Return B = E[g g^T], (d_out, d_out) float64, of the unedited model on reference text."""
        if self.written:
            raise StatisticsError(f"{site.module}: statistics belong to the unedited model, but it was edited already")
        if self._gradient_moment is None:
            raise StatisticsError(f"{site.module}: this session was opened without reference-text statistics")
        return double(self._gradient_moment(site), self._home(site))

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the ascending eigenvalues and the eigenvectors of C in float64, from the cache if it has them."""
        return self._decompose(self.second_moment(site), site, self._home(site))

    def forget_moments(self) -> None:
        """Drop the second moments from memory once every component is prepared."""
        self._moments.clear()

    def pilots(self, count: int) -> tuple[Sequence[EditRequest], str]:
        """Return up to ``count`` edits to calibrate on, and where they came from."""
        if self._pilots is None:
            return (), "none"
        return self._pilots.first(count), self._pilots.origin

    def calibrated(self, name: str, parts: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        """Return the result of ``measure`` on the unedited model, from disk if it was measured before."""
        key, identity = self._calibration(name, parts)
        cached = self._files.read(key)
        return self._measured(key, identity, measure) if cached is None else cached["calibration"]

    def _calibration(self, name: str, parts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the key of a calibration in the cache, and the values that it depends on."""
        if self.written:
            raise StatisticsError(f"{name} is calibrated on the unedited model, but the model was edited already")
        checkpoint = self.loaded.checkpoint
        conversation = self.loaded.tokens.conversation
        identity = {
            "component": name,
            # A model in memory has no files, so its tensors are hashed instead.
            "model": checkpoint.fingerprint() or checkpoint.digest_of(checkpoint.names()),
            "tokenizer": self.loaded.source.tokenizer_digest,
            "chat": None if conversation is None else conversation.identity,
            "dtype": str(next(self.loaded.model.parameters()).dtype),
            "modules": [site.module for site in self.sites],
            "targets": asdict(self.options),
            "parts": dict(parts),
        }
        return f"{name}-{fingerprint(identity)}", identity

    def _measured(self, key: str, identity: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        calibration = measure()
        self._files.write(key, {"calibration": calibration}, identity)
        return calibration

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Optimise target values for a batch on the current model."""
        # The optimisation needs the memory more than the last batch's reads do.
        self.forget_reads()
        label = "Optimising targets" if prefixed else "Measuring the anchor"
        prefixes = self.prefixes if prefixed else ()
        sink = bool(prefixes) and any(self.in_sink(requests))
        layer = self.layers[-1]
        return targets.optimise(
            self.loaded,
            requests,
            prefixes,
            layer,
            self.options,
            self.reporter,
            label=label,
            sink=sink,
            usual=usual_length(self.loaded, layer, batch_tokens=self.options.batch_tokens),
            engine=self.engine,
        )

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: Literal["target", "all"] = "target",
        trial: Mapping[Site, Tensor] | None = None,
        ended: bool = False,
    ) -> Gradients:
        """Run one forward and backward pass of the targets' cross-entropy, on bare prompts; writes nothing."""
        measured = gradients.measure(
            self.loaded,
            self.sites,
            requests,
            every_position=positions == "all",
            ended=ended,
            trial=trial or {},
            batch_tokens=self.options.batch_tokens,
        )
        return measured if self._solve_device is None else measured.to(self._solve_device)

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        """Return K, (d_in, n): mean of the bare prompt's key and the mean key of the prefixed prompts.

        The first prefixed prompt stands in for a bare one whose key is that of an attention sink.
        """
        mlp, projection = self.loaded.architecture.mlp(site.layer), self._projection(site)
        hook = Hook(keys=site.layer, within=None if mlp is projection else mlp)
        (keys,) = self._activations.read(self._first_rows(requests), site.layer, [hook])
        if self.prefixes:
            (prefixed,) = self._activations.read(self._lookup_rows(requests, self.prefixes), site.layer, [hook])
            prefixed = prefixed.reshape(len(requests), len(self.prefixes), -1).mean(dim=1)
            keys = (keys + prefixed) / 2
        return keys.T.contiguous().to(self._home(site))

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        """Return R, (d_out, n), the change of this site's output: z minus h, spread over the remaining sites."""
        remaining = len(self.sites) - self.sites.index(site)
        architecture = self.loaded.architecture
        hooks = [
            Hook(architecture.mlp(site.layer)),
            Hook(architecture.block(self.layers[-1])),
        ]
        output, last = self._activations.read(self._first_rows(requests), site.layer, hooks)
        goal = values.initial - self._joined(values.written) + self._joined(values.contribution)
        change = (goal - last.T.to(goal.device)) / remaining
        return self._at_output(site, output.T.to(goal.device), change).to(self._masters[site].device)

    def expert_moments(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return C_j (E, d, d) of each routed expert, and how many tokens of the reference text it reads, (E,)."""
        if not site.experts:
            raise StatisticsError(f"{site.module} has no routed experts")
        sums = self._moment(site)
        tokens = sums[:, -1, -1]
        return sums[:, :-1, :-1] / tokens.clamp_min(1)[:, None, None], tokens

    def forget_reads(self) -> None:
        """Free the hidden states and texts that reads of a batch have stored for its next site."""
        self._activations.forget()
        self._rows, self._sinks = ((), {}), None

    def in_sink(self, requests: Sequence[EditRequest]) -> list[bool]:
        """Tell of each request whether its bare text has the subject in an attention sink, as the model stands."""
        tokens = self.loaded.tokens
        first = [begins(text) for text in tokens.encode([tokens.locate(request) for request in requests])]
        sink = any(first) and first_is_sink(self.loaded, self.layers, batch_tokens=self.options.batch_tokens)
        return [sink and one for one in first]

    def write(self, site: Site, update: Update) -> None:
        """Add an update to a site's weight."""
        self.set_weight(site, update.added_to(self._masters[site]))

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace a site's weight, (d_out, d_in), in the master and in the model."""
        self.written = True
        master = weight.to(device=self._masters[site].device, dtype=torch.float32)
        self._masters[site] = master
        replace_weight(self._projection(site), value_of(self.encoded(site, master)))
        self._activations.forget(above=site.layer)

    def restore(self, masters: Mapping[Site, Tensor]) -> None:
        """Put back weights that :meth:`masters` returned earlier."""
        for site, weight in masters.items():
            if weight is not self._masters[site]:
                self.set_weight(site, weight)

    @contextmanager
    def under(self, weights: Mapping[Site, Tensor], *, unedited: bool = False) -> Iterator[None]:
        """Hold other weights, (d_out, d_in) by site, inside the ``with``; afterwards the current ones, bit by bit."""
        before, written = self.masters(), self.written
        base = {site: self.baseline(site) for site in before} if unedited else {}
        (batch, _), sinks = self._rows, self._sinks
        if unedited:
            # Of another model; what a batch writes itself leaves its sinks as they were decided.
            self._sinks = None
        try:
            for site, weight in {**base, **weights}.items():
                # A weight that was never written stays as it was loaded, not as it would be saved.
                if not torch.equal(weight.to(before[site]), before[site]):
                    self.set_weight(site, weight)
            yield
        finally:
            self.restore(before)
            self.written = written
            if unedited:
                self._sinks = sinks if self._rows[0] is batch else None

    @contextmanager
    def read_out(self, stabilizers: Sequence[Stabilizer]) -> Iterator[Mapping[Site, Tensor]]:
        """Hold the weights as they are saved, after every stabilizer's read-out; then restore the stream's weights."""
        before = self.masters()
        try:
            for site in self.sites:
                weight = before[site]
                for stabilizer in stabilizers:
                    weight = stabilizer.stabilize_weight(self, site, weight)
                if weight is not before[site]:
                    self.set_weight(site, weight)
            yield self.masters()
        finally:
            self.restore(before)

    def save_dtype(self, site: Site) -> torch.dtype:
        """Return the dtype in which a site's weight will be saved."""
        return self._save_dtype or self.loaded.checkpoint.dtype(self.stored_name(site))

    def encoded(self, site: Site, weight: Tensor) -> Stored:
        """Return a site's weight, (d_out, d_in), as the checkpoint stores it, in the layout of the model."""
        return self.loaded.checkpoint.encode(self.stored_name(site), site.stored(weight), self._save_dtype)

    def as_saved(self, site: Site, weight: Tensor) -> Tensor:
        """Return the numbers that a reader of the saved file gets of a weight, (d_out, d_in)."""
        return site.oriented(value_of(self.encoded(site, weight)).to(weight.device))

    def masters(self) -> Mapping[Site, Tensor]:
        """Return all current weights; replaced, never changed in place, by later writes."""
        return dict(self._masters)

    def _projection(self, site: Site) -> Any:
        return self.loaded.architecture.projection(site.layer)

    def _home(self, site: Site) -> torch.device:
        """Return the device of a site's master, its statistics and its updates."""
        return self._solve_device or device_of(self._projection(site))

    def _loaded_weight(self, site: Site) -> Tensor:
        weight = read_weight(self._projection(site)).to(self._home(site))
        if weight.dtype.itemsize < self.loaded.checkpoint.dtype(self.stored_name(site)).itemsize:
            # The file is more exact than the model's dtype, and the master is saved.
            return self.baseline(site).clone()
        return site.oriented(weight).float().clone(memory_format=torch.contiguous_format)

    def _first_rows(self, requests: Sequence[EditRequest]) -> list[Encoded]:
        """Return each request's bare text, cut after its lookup token; behind the first prefix where that is a sink."""
        bare = self._lookup_rows(requests, ("",))
        if not self.prefixes:
            return bare
        # Decided once for all sites of a batch: those written first may change what the later ones read.
        if self._sinks is None:
            self._sinks = self.in_sink(requests)
        if not any(self._sinks):
            return bare
        behind = self._lookup_rows(requests, self.prefixes[:1])
        return [other if sink else plain for plain, other, sink in zip(bare, behind, self._sinks, strict=True)]

    def _lookup_rows(self, requests: Sequence[EditRequest], contexts: tuple[str, ...]) -> list[Encoded]:
        """Return each request in each context, cut after its lookup token; a batch is tokenised once for all sites."""
        batch, rows = self._rows
        if list(batch) != list(requests):
            self._rows = batch, rows = tuple(requests), {}
            self._sinks = None
        if contexts not in rows:
            tokens = self.loaded.tokens
            for request in requests:
                if not request.has_subject:
                    raise request.refusal("the edit has no subject, so there is no token to read a key at")
            texts = [tokens.locate(request.in_context(context)) for request in requests for context in contexts]
            rows[contexts] = [text.up_to_lookup() for text in tokens.encode(texts)]
        return rows[contexts]

    def _joined(self, outputs: Tensor) -> Tensor:
        """Return the contribution of MLP outputs of the last layer, (d, n), to the residual stream."""
        return _through(self.loaded.architecture.mlp_norm(self.layers[-1]), outputs)

    def _at_output(self, site: Site, output: Tensor, change: Tensor) -> Tensor:
        """Turn a change of the residual stream, (d, n), into a change of the projection's ``output``.

        With a norm after it, only the direction of the output counts: u* = (norm(u) + R) / gamma, scaled to the size
        of u.
        """
        architecture = self.loaded.architecture
        norm = architecture.mlp_norm(site.layer)
        if norm is None:
            return change / architecture.residual_scale(site.layer)
        gain = _through(norm, torch.ones_like(output[:, :1]))
        # A coordinate with gain 0 never joins the stream, so it stays as it is.
        unit = output / output.square().mean(dim=0).sqrt()
        direction = torch.where(gain == 0, unit, (_through(norm, output) + change) / gain)
        return direction * (output.norm(dim=0) / direction.norm(dim=0).clamp_min(1e-30)) - output


def _through(norm: Any, columns: Tensor) -> Tensor:
    """Apply a norm module to (d, n) columns in its own dtype; the identity without one."""
    if norm is None:
        return columns
    weight = next(norm.parameters())
    with torch.no_grad():
        return norm(columns.T.to(weight)).T.to(columns)


def generate_prefixes(
    loaded: LoadedModel, options: TargetOptions, *, seed: int, reporter: Reporter | None = None
) -> list[str]:
    """Generate the prefixes of target values: a few sampled words that end in a full stop and a space."""
    starts = [PREFIX_STARTS[index % len(PREFIX_STARTS)] for index in range(options.prefixes)]
    rows = [tuple(loaded.tokens.ids(start)) for start in starts]
    generator = torch.Generator().manual_seed(seed)
    # All noise is drawn in the order of the prefixes, so that batching does not change them.
    noise = torch.stack([_exponentials(options.prefix_tokens, generator) for _ in rows]) if rows else torch.empty(0)
    texts = [""] * len(rows)
    with (reporter or Silent()).phase("Writing prefixes", len(rows), "prefixes") as advance:
        for length in sorted({len(row) for row in rows}):
            alike = [index for index, row in enumerate(rows) if len(row) == length]
            begin = torch.tensor([rows[index] for index in alike])
            choose = _Likely(loaded.tokens.tokenizer.all_special_ids, noise[alike])
            written = continue_rows(loaded, begin, choose, count=options.prefix_tokens)
            for index, ids in zip(alike, torch.cat([begin, written], dim=1).tolist(), strict=True):
                text = loaded.tokens.decode(ids)
                texts[index] = " ".join(text.replace("{", " ").replace("}", " ").split()) + ". "
            advance(len(alike))
    return texts


def _exponentials(steps: int, generator: torch.Generator) -> Tensor:
    """Draw the noise of one prefix, (steps, LIKELY): the sample is the token with the largest p / noise."""
    draws = [torch.empty(LIKELY).exponential_(generator=generator) for _ in range(steps)]
    return torch.stack(draws) if draws else torch.empty(0, LIKELY)


class _Likely:
    """Samples one of the likeliest tokens that are not special, with noise (rows, steps, LIKELY) drawn before."""

    def __init__(self, special: Sequence[int], noise: Tensor):
        self.special, self.noise, self.step = special, noise, 0

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the next token of each row; on the CPU it is the same on every device."""
        # A special token would end the text, or vanish when the text is decoded. Some of them may have no logit.
        excluded = torch.tensor([token for token in self.special if token < logits.shape[1]], dtype=torch.long)
        plain = logits.float().cpu().index_fill(1, excluded, -torch.inf)
        best, tokens = torch.topk(plain, k=min(LIKELY, plain.shape[1]), dim=1)
        noise, self.step = self.noise[:, self.step, : best.shape[1]], self.step + 1
        return tokens.gather(1, (torch.softmax(best, dim=1) / noise).argmax(dim=1, keepdim=True))[:, 0]
