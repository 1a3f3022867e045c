"""One model under edit: keys, residuals, values and weights, always (d_out, d_in).

Edited weights live here as float32 masters. The model holds their cast to the dtype of the file that they will be saved
to, so that what is evaluated is what is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from editcli.editing import gradients, targets
from editcli.editing.activations import Activations, Tap
from editcli.errors import StateError, StatisticsError
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
from editcli.storage.checkpoint import file_digest

PREFIX_STARTS = ("The", "Therefore", "Because", "I", "You")
"""What the generated prefixes start with, as in ROME's code."""

LIKELY = 10
"""How many of the likeliest tokens a prefix is sampled from: few enough to keep it readable."""

SecondMoment = Callable[[Site], Tensor]


@dataclass(frozen=True, slots=True)
class PilotSource:
    """Edits to calibrate on, and one line on where they come from."""

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
    """Implements :class:`editcli.plugin.interfaces.Session`, plus the writing that components may not do."""

    def __init__(
        self,
        loaded: LoadedModel,
        layers: Sequence[int],
        *,
        options: TargetOptions | None = None,
        prefixes: Sequence[str] | None = None,
        second_moment: SecondMoment | None = None,
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
        # One cache for all, so that it is mentioned once when it cannot be written.
        self._files = cache if isinstance(cache, Cache) else Cache(cache, self.reporter)
        self._decompose = Decompositions(self._files, self.reporter)
        self._activations = Activations(loaded, batch_tokens=self.options.batch_tokens, reporter=self.reporter)
        self._rows: tuple[Sequence[EditRequest], dict[tuple[str, ...], list[Encoded]]] = ((), {})
        self._moments: dict[Site, Tensor] = {}
        self._baselines: dict[Site, Tensor] = {}
        self._masters: dict[Site, Tensor] = {site: self._loaded_weight(site) for site in self.sites}
        self.written = False
        """True once anything was written: from then on nothing may be measured as if on the unedited model."""

    @property
    def device(self) -> torch.device:
        """Where linear algebra belongs: the device chosen for it, else where the last edited layer lives."""
        return self._home(self.sites[-1])

    def weight(self, site: Site) -> Tensor:
        """Return the current W, (d_out, d_in) float32."""
        return self._masters[site]

    def baseline(self, site: Site) -> Tensor:
        """Return W_0, (d_out, d_in) float32, from the base checkpoint's files."""
        if site not in self._baselines:
            stored = self.loaded.checkpoint.read(self.stored_name(site), device=self._home(site))
            # Kept as stored, so that a half-precision baseline costs half of a master.
            self._baselines[site] = stored.T.contiguous() if site.transposed else stored
        return self._baselines[site].float()

    def stored_name(self, site: Site) -> str:
        """Return the checkpoint's name of a site's weight."""
        return self.loaded.checkpoint.tensor_for(f"{site.module}.weight")

    def second_moment(self, site: Site) -> Tensor:
        """Return Cov = E[k k^T], (d_in, d_in) float64, of the unedited model."""
        if self.written:
            raise StatisticsError(f"{site.module}: statistics belong to the unedited model, but it was edited already")
        if self._second_moment is None:
            raise StatisticsError(f"{site.module}: this session was opened without reference-text statistics")
        if site not in self._moments:
            found = self._second_moment(site)
            self._moments[site] = found if self._solve_device is None else found.to(self._solve_device)
        return self._moments[site]

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the ascending eigenvalues and the eigenvectors of Cov in float64, from the cache when it has them."""
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
        """Return what ``measure`` returns on the unedited model; read from disk where it was measured before."""
        key, identity = self._calibration(name, parts)
        kept = self._files.read(key)
        return self._measured(key, identity, measure) if kept is None else kept["calibration"]

    def _calibration(self, name: str, parts: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the key of a calibration in the cache, and what the calibration depends on."""
        if self.written:
            raise StatisticsError(f"{name} is calibrated on the unedited model, but the model was edited already")
        checkpoint, tokenizer = self.loaded.checkpoint, self.loaded.source.folder / "tokenizer.json"
        conversation = self.loaded.tokens.conversation
        identity = {
            "component": name,
            # A model that a program holds has no files, and its tensors are compared instead.
            "model": checkpoint.fingerprint() or checkpoint.digest_of(checkpoint.names()),
            "tokenizer": file_digest(tokenizer) if tokenizer.is_file() else "",
            "chat": None if conversation is None else conversation.identity,
            "dtype": str(next(self.loaded.model.parameters()).dtype),
            "modules": [site.module for site in self.sites],
            "targets": asdict(self.options),
            "parts": dict(parts),
        }
        return f"{name}-{fingerprint(identity)}", identity

    def _measured(self, key: str, identity: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        found = measure()
        self._files.write(key, {"calibration": found}, identity)
        return found

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Optimise target values for a batch on the current model."""
        # The optimisation needs the memory more than the last batch's reads do.
        self.forget_reads()
        label = "Optimising targets" if prefixed else "Measuring the anchor"
        prefixes = self.prefixes if prefixed else ()
        return targets.optimise(
            self.loaded, requests, prefixes, self.layers[-1], self.options, self.reporter, label=label
        )

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: Literal["target", "all"] = "target",
        trial: Mapping[Site, Tensor] | None = None,
    ) -> Gradients:
        """Run one forward and backward pass of the targets' cross-entropy, on bare prompts; writes nothing."""
        found = gradients.measure(
            self.loaded,
            self.sites,
            requests,
            every_position=positions == "all",
            trial=trial or {},
            batch_tokens=self.options.batch_tokens,
        )
        return found if self._solve_device is None else found.to(self._solve_device)

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        """Return K, (d_in, n): mean of the bare prompt's key and the mean key of the prefixed prompts."""
        mlp, projection = self.loaded.architecture.mlp(site.layer), self._projection(site)
        tap = Tap(projection, output=False, within=None if mlp is projection else mlp)
        (keys,) = self._activations.read(self._lookup_rows(requests, ("",)), site.layer, [tap])
        if self.prefixes:
            (prefixed,) = self._activations.read(self._lookup_rows(requests, self.prefixes), site.layer, [tap])
            prefixed = prefixed.reshape(len(requests), len(self.prefixes), -1).mean(dim=1)
            keys = (keys + prefixed) / 2
        return keys.T.contiguous().to(self._home(site))

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        """Return R, (d_out, n): what this site's output must gain, z minus h spread over the sites that remain."""
        remaining = len(self.sites) - self.sites.index(site)
        architecture = self.loaded.architecture
        taps = [
            Tap(architecture.mlp(site.layer), output=True),
            Tap(architecture.block(self.layers[-1]), output=True),
        ]
        own, last = self._activations.read(self._lookup_rows(requests, ("",)), site.layer, taps)
        goal = values.initial - self._joined(values.written) + self._joined(values.contribution)
        share = (goal - last.T.to(goal.device)) / remaining
        return self._at_output(site, own.T.to(goal.device), share).to(self._masters[site].device)

    def forget_reads(self) -> None:
        """Free what reading a batch's keys and residuals left behind for its next site."""
        self._activations.forget()
        self._rows = ((), {})

    def write(self, site: Site, update: Update) -> None:
        """Add an update to a site's weight."""
        master = self._masters[site]
        self.set_weight(site, torch.addmm(master, update.left.to(master), update.right.to(master).T))

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Replace a site's weight, (d_out, d_in), in the master and in the model."""
        self.written = True
        master = weight.to(device=self._masters[site].device, dtype=torch.float32)
        self._masters[site] = master
        cast = master.to(self.save_dtype(site))
        replace_weight(self._projection(site), cast.T if site.transposed else cast)
        self._activations.forget(above=site.layer)

    def restore(self, masters: Mapping[Site, Tensor]) -> None:
        """Put back weights that :meth:`masters` returned earlier."""
        for site, weight in masters.items():
            if weight is not self._masters[site]:
                self.set_weight(site, weight)

    @contextmanager
    def read_out(self, stabilizers: Sequence[Stabilizer]) -> Iterator[Mapping[Site, Tensor]]:
        """Hold the weights as they are saved, after every stabilizer's read-out; afterwards the stream's own again."""
        before = self.masters()
        try:
            for site in self.sites:
                weight = before[site]
                for stabilizer in stabilizers:
                    weight = stabilizer.stabilize_weight(weight, site, self)
                if weight is not before[site]:
                    self.set_weight(site, weight)
            yield self.masters()
        finally:
            self.restore(before)

    def save_dtype(self, site: Site) -> torch.dtype:
        """Return the dtype in which a site's weight will be saved."""
        return self._save_dtype or self.loaded.checkpoint.dtype(self.stored_name(site))

    def masters(self) -> Mapping[Site, Tensor]:
        """Return all current weights; replaced, never changed in place, by later writes."""
        return dict(self._masters)

    def _projection(self, site: Site) -> Any:
        return self.loaded.architecture.projection(site.layer)

    def _home(self, site: Site) -> torch.device:
        """Return where a site's master, its statistics and what is to be written at it are kept."""
        return self._solve_device or device_of(self._projection(site))

    def _loaded_weight(self, site: Site) -> Tensor:
        weight = read_weight(self._projection(site)).to(self._home(site))
        if weight.dtype.itemsize < self.loaded.checkpoint.dtype(self.stored_name(site)).itemsize:
            # The file is more exact than what the model runs in, and the master is what will be saved.
            return self.baseline(site).clone()
        return (weight.T if site.transposed else weight).float().clone(memory_format=torch.contiguous_format)

    def _lookup_rows(self, requests: Sequence[EditRequest], contexts: tuple[str, ...]) -> list[Encoded]:
        """Return each request in each context, cut after its lookup token; a batch is tokenised once for all sites."""
        of, found = self._rows
        if list(of) != list(requests):
            self._rows = of, found = tuple(requests), {}
        if contexts not in found:
            tokens = self.loaded.tokens
            for request in requests:
                if not request.has_subject:
                    raise request.refusal("the edit has no subject, so there is no token to read a key at")
            texts = [tokens.locate(request.in_context(context)) for request in requests for context in contexts]
            found[contexts] = [text.up_to_lookup() for text in tokens.encode(texts)]
        return found[contexts]

    def _joined(self, outputs: Tensor) -> Tensor:
        """Return what MLP outputs of the last layer, (d, n), add to the residual stream."""
        return _through(self.loaded.architecture.mlp_norm(self.layers[-1]), outputs)

    def _at_output(self, site: Site, own: Tensor, wanted: Tensor) -> Tensor:
        """Turn a change of the residual stream, (d, n), into a change of the projection's output ``own``.

        Behind a norm only the direction of the output counts: u* = (norm(u) + R) / gamma, brought to the size of u.
        """
        architecture = self.loaded.architecture
        norm = architecture.mlp_norm(site.layer)
        if norm is None:
            return wanted / architecture.residual_scale(site.layer)
        gain = _through(norm, torch.ones_like(own[:, :1]))
        # What the norm multiplies by zero joins no stream, so such a coordinate stays as it is.
        direction = torch.where(gain == 0, own / own.square().mean(dim=0).sqrt(), (_through(norm, own) + wanted) / gain)
        return direction * (own.norm(dim=0) / direction.norm(dim=0).clamp_min(1e-30)) - own


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
    """Generate the prefixes of section "target values": a few sampled words that end in a full stop and a space."""
    starts = [PREFIX_STARTS[index % len(PREFIX_STARTS)] for index in range(options.prefixes)]
    rows = [tuple(loaded.tokens.tokenizer(start)["input_ids"]) for start in starts]
    loaded.tokens.refuse_rowless(token for row in rows for token in row)
    generator = torch.Generator().manual_seed(seed)
    # All noise is drawn in the order of the prefixes, so that how they are batched does not change them.
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
        # A special token would end the text, or vanish from it when it is decoded. Some tokenizers have more of them
        # than the model has logits.
        barred = torch.tensor([token for token in self.special if token < logits.shape[1]], dtype=torch.long)
        plain = logits.float().cpu().index_fill(1, barred, -torch.inf)
        best, tokens = torch.topk(plain, k=min(LIKELY, plain.shape[1]), dim=1)
        noise, self.step = self.noise[:, self.step, : best.shape[1]], self.step + 1
        return tokens.gather(1, (torch.softmax(best, dim=1) / noise).argmax(dim=1, keepdim=True))[:, 0]
