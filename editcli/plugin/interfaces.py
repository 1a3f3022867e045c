"""The seam: what a plugin gives us (abstract classes) and what we give it (a protocol and frozen data).

Shapes use the papers' letters: a site's weight W is (d_out, d_in), the layer computes W k; K is (d_in, n) with one
column per edit, R is (d_out, n), and C = E[k k^T] is (d_in, d_in), the second moment of keys on reference text. The
shared solve of :mod:`editcli.plugin.leastsquares` adds Q, (d_in, d_in), an inverse. A batch goes through these stages:

=====================  ======================  =======================
stage                  owner                   in -> out
=====================  ======================  =======================
calibrate              ``prepare(session)``    once, on the unedited model
optimise targets       core (editor may)       requests -> Values
stabilise values       stabilizers in order    Values -> Values
keys and residual      core (editor may)       -> Problem, for each site
solve                  editor                  Problem -> Update
stabilise update       stabilizers in order    Update -> Update
write                  core                    adds the update
remember               editor, stabilizers     batch -> their own state
=====================  ======================  =======================

An editor without target values measures the batch in ``begin`` and returns each site's Update from ``update``; there
are then neither Values nor Problems. A stabilizer maps a type to itself and its default is the identity; only the
editor turns one type into another. Arguments come in one order: session, requests, site, then the rest.
This module never imports torch at run time, so that listing plugins stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

from editcli.plugin.saved import SavedState
from editcli.requests.schema import EditRequest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from editcli.reporting import Reporter


@dataclass(frozen=True, slots=True)
class Site:
    """One editable matrix: the output projection of a layer's MLP."""

    layer: int
    module: str
    """Dotted path of the module in the model, for instance ``model.layers.3.mlp.down_proj``."""
    transposed: bool
    """True when the module stores (d_in, d_out), as GPT-2's Conv1D does; decided by module type."""
    experts: int = 0
    """The number of routed experts whose last maps make up the matrix; 0 for the map of one MLP.

    A mixture's output is sum_j g_j W_j k_j, with k_j the key inside expert j and g_j its gate, 0 unless the token is
    routed there. So W = [W_1 ... W_E], (d_out, E d), with the key k = (g_1 k_1, ..., g_E k_E), is one linear map.
    """

    def oriented(self, stored: Tensor) -> Tensor:
        """Return a weight in the model's layout as (d_out, d_in); a view where it can be one."""
        if not self.experts:
            return stored.T if self.transposed else stored
        return stored.permute(2, 0, 1).flatten(1) if self.transposed else stored.permute(1, 0, 2).flatten(1)

    def stored(self, weight: Tensor) -> Tensor:
        """Return a (d_out, d_in) weight in the model's layout: the inverse of :meth:`oriented`."""
        if not self.experts:
            return weight.T if self.transposed else weight
        split = weight.unflatten(1, (self.experts, -1))
        return split.permute(1, 2, 0) if self.transposed else split.permute(1, 0, 2)

    def moment_shape(self, width: int) -> tuple[int, ...]:
        """Return the shape in which the second moment of keys of ``width`` = d_in numbers is kept: (d_in, d_in).

        Of E routed experts it is (E, d + 1, d + 1) with d = d_in / E: one for each, with the count of its tokens.
        """
        each = width // self.experts + 1 if self.experts else width
        return (self.experts, each, each) if self.experts else (each, each)


@dataclass(frozen=True, slots=True)
class Values:
    """Optimised target values of a batch at the last layer of its stage, (d, n) each, float32.

    ``target`` is z = h + delta, ``initial`` is h, ``written`` is m, the output of that layer's MLP.
    """

    target: Tensor
    initial: Tensor
    written: Tensor
    dropped: Mapping[int, str]
    """Columns that a stabilizer gave up, with the reason: such an edit keeps its column and z = h there."""
    loss: Tensor
    """(n,) the loss at which each edit's optimisation stopped."""
    reached: Tensor | None = None
    """(n,) bool: whose loss fell below ``targets.stop_loss``; with ``targets.stop=greedy`` also whose target is the
    greedy answer in all its contexts. None if not counted."""
    clamped: Tensor | None = None
    """(n,) bool: whose offset ended at ``targets.clamp``; None if not counted."""

    @property
    def contribution(self) -> Tensor:
        """The MLP output that reaches the targets, v = m + delta, (d, n)."""
        return self.target - self.initial + self.written

    def with_contribution(self, contribution: Tensor) -> Values:
        """Return the values whose MLP outputs ``contribution``: z = (h - m) + v."""
        return replace(self, target=self.initial - self.written + contribution)

    def drop(self, columns: Mapping[int, str]) -> Values:
        """Return the values with ``columns`` given up, each for its reason: z = h there, so nothing is written."""
        if not columns:
            return self
        target, where = self.target.clone(), list(columns)
        target[:, where] = self.initial[:, where]
        return replace(self, target=target, dropped={**self.dropped, **columns})


@dataclass(frozen=True, slots=True)
class Problem:
    """The equation to solve at one site: find D with D K close to R. ``keys`` (d_in, n), ``residual`` (d_out, n)."""

    site: Site
    keys: Tensor
    residual: Tensor
    """One column per edit, or more: an editor may ask for several things of one edit, and sets :attr:`held` then."""
    released: Tensor | None = None
    """(d_in, m) keys that the editor's memory lets go of before it solves: those of edits that this batch contradicts;
    None for none."""
    held: Tensor | None = None
    """(d_in, n) keys by which the batch is remembered, one column per edit, where they are not ``keys``; see
    :meth:`Editor.completed`."""

    @property
    def remembered(self) -> Tensor:
        """The keys by which the batch is remembered, (d_in, n)."""
        return self.keys if self.held is None else self.held

    @property
    def parts(self) -> Mapping[str, Tensor]:
        """The tensors that it is made of, by the names of its fields; a run records them."""
        parts = {"keys": self.keys, "residual": self.residual, "released": self.released, "held": self.held}
        return {name: part for name, part in parts.items() if part is not None}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Problem:
        """Return the problem with every tensor changed by ``change``, which keeps shapes."""
        return Problem(self.site, **{name: change(part) for name, part in self.parts.items()})


class Update(ABC):
    """The change of a site's weight, D (d_out, d_in): :class:`LowRank` or :class:`Dense`."""

    __slots__ = ()

    @property
    @abstractmethod
    def parts(self) -> Mapping[str, Tensor]:
        """The tensors that it is made of, by the names of its fields; a run records them."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Return D as a (d_out, d_in) matrix."""

    @abstractmethod
    def added_to(self, weight: Tensor) -> Tensor:
        """Return ``weight`` + D, (d_out, d_in), in the precision and on the device of ``weight``."""

    @abstractmethod
    def norm(self) -> float:
        """Return ||D||_F."""

    @abstractmethod
    def scaled(self, factor: float) -> Update:
        """Return ``factor`` D."""

    @abstractmethod
    def mapped(self, outer: LinearMap | None = None, inner: LinearMap | None = None) -> Update:
        """Return outer(D inner^T): ``outer`` maps columns of length d_out and ``inner`` those of length d_in.

        Both are linear, so they act on the factors of an update that has factors. None is the identity.
        """


LinearMap = Callable[["Tensor"], "Tensor"]
"""A linear map of the columns of a matrix."""


@dataclass(frozen=True, slots=True)
class LowRank(Update):
    """D = left @ right.T with ``left`` (d_out, r) and ``right`` (d_in, r)."""

    left: Tensor
    right: Tensor

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"left": self.left, "right": self.right}

    def dense(self) -> Tensor:
        return self.left @ self.right.T

    def added_to(self, weight: Tensor) -> Tensor:
        return weight.addmm(self.left.to(weight), self.right.to(weight).T)

    def norm(self) -> float:
        """Return ||D||_F from the factors, without forming D unless that is less work."""
        left, right = self.left.double(), self.right.double()
        (d_out, rank), d_in = left.shape, len(right)
        if rank * (d_out + d_in) > d_out * d_in:
            return float((left @ right.T).norm())
        gram = (left.T @ left) * (right.T @ right)
        return float(gram.sum().clamp_min(0).sqrt())

    def scaled(self, factor: float) -> LowRank:
        return LowRank(self.left * factor, self.right)

    def mapped(self, outer: LinearMap | None = None, inner: LinearMap | None = None) -> LowRank:
        return LowRank(outer(self.left) if outer else self.left, inner(self.right) if inner else self.right)


@dataclass(frozen=True, slots=True)
class Dense(Update):
    """D as one (d_out, d_in) matrix, for an update that has no factors of low rank."""

    matrix: Tensor

    @property
    def parts(self) -> Mapping[str, Tensor]:
        return {"dense": self.matrix}

    def dense(self) -> Tensor:
        return self.matrix

    def added_to(self, weight: Tensor) -> Tensor:
        return weight + self.matrix.to(weight)

    def norm(self) -> float:
        return float(self.matrix.double().norm())

    def scaled(self, factor: float) -> Dense:
        return Dense(self.matrix * factor)

    def mapped(self, outer: LinearMap | None = None, inner: LinearMap | None = None) -> Dense:
        matrix = outer(self.matrix) if outer else self.matrix
        return Dense(inner(matrix.T).T if inner else matrix)


def update_of(parts: Mapping[str, Tensor]) -> Update:
    """Return the update of the given :attr:`Update.parts`; raises KeyError where one is missing."""
    return Dense(parts["dense"]) if "dense" in parts else LowRank(parts["left"], parts["right"])


@dataclass(frozen=True, slots=True)
class SiteGradients:
    """Inputs and output gradients of one site, one column per token position: ``t`` positions of all edits together."""

    inputs: Tensor
    """(d_in, t) float32, k: what the projection read."""
    gradients: Tensor
    """(d_out, t) float32, g: gradient, with respect to the projection's output, of the summed loss of the batch."""
    owner: Tensor
    """(t,) int64: the edit, counted from 0 in the order of the requests, that each position belongs to."""


@dataclass(frozen=True, slots=True)
class Gradients:
    """One forward and backward pass of a batch: ``loss`` (n,) per edit, and what each site saw."""

    loss: Tensor
    sites: Mapping[Site, SiteGradients]

    def to(self, device: torch.device) -> Gradients:
        """Return the same on another device."""
        seen = self.sites.items()
        moved = {s: SiteGradients(g.inputs.to(device), g.gradients.to(device), g.owner.to(device)) for s, g in seen}
        return Gradients(self.loss.to(device), moved)


class Session(Protocol):
    """The model under edit as a component sees it: it can read everything and write nothing."""

    @property
    def sites(self) -> Sequence[Site]:
        """The edited sites in the order they are written."""
        ...

    @property
    def stages(self) -> Sequence[Session]:
        """The parts of a batch that have targets of their own, in the order they are written: sessions of some sites.

        One with all sites; with ``targets.per_layer`` one for each site. The last site of a stage is where its target
        values are.
        """
        ...

    @property
    def reporter(self) -> Reporter:
        """Where to report progress."""
        ...

    @property
    def device(self) -> torch.device:
        """Where linear algebra belongs."""
        ...

    def weight(self, site: Site) -> Tensor:
        """Return the current W, (d_out, d_in), as its float32 master. Do not change it in place."""
        ...

    def baseline(self, site: Site) -> Tensor:
        """Return W_0, (d_out, d_in) float32, read from the base checkpoint's files."""
        ...

    def under(self, weights: Mapping[Site, Tensor], *, unedited: bool = False) -> AbstractContextManager[None]:
        """Let everything that is read inside the ``with`` be read under other weights, (d_out, d_in) by site.

        Sites without a weight here have their current one, with ``unedited`` that of the base: a batch is measured so
        on the unedited model in the middle of a stream. The current weights are back afterwards, bit by bit.
        """
        ...

    def second_moment(self, site: Site) -> Tensor:
        """Return C = E[k k^T], (d_in, d_in) float64, of the unedited model; raises after the first write.

        All callers share this matrix: do not change it in place.
        """
        ...

    def gradient_moment(self, site: Site) -> Tensor:
        """Return B = E[g g^T], (d_out, d_out) float64, of the unedited model; raises after the first write.

        g is the gradient of the reference text's summed cross-entropy with respect to the projection's output, so
        that C and B are the factors of that loss's curvature in W (K-FAC).
        """
        ...

    def expert_moments(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return C_j = E[k_j k_j^T] of each routed expert over the tokens that it reads, and the number of those.

        (E, d, d) and (E,) float64, of the unedited model; zeros for an expert that reads none. Keys are not multiplied
        by gates. Raises after the first write, and for a site without experts.
        """
        ...

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return the eigenvalues of C, (d_in,) ascending, and its eigenvectors, (d_in, d_in), in float64.

        They are cached on disk, and shared as :meth:`second_moment` is.
        """
        ...

    def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
        """Return K, (d_in, n): each edit's key averaged over the bare prompt and the mean of the prefixed ones."""
        ...

    def residual(self, requests: Sequence[EditRequest], site: Site, values: Values) -> Tensor:
        """Return R, (d_out, n): z minus the current h at the last site, spread over the sites that remain."""
        ...

    def values(self, requests: Sequence[EditRequest], *, prefixed: bool = True) -> Values:
        """Optimise target values for a batch on the current model; without ``prefixed``, on bare prompts only."""
        ...

    def gradients(
        self,
        requests: Sequence[EditRequest],
        *,
        positions: Literal["target", "all"] = "target",
        trial: Mapping[Site, Tensor] | None = None,
        ended: bool = False,
    ) -> Gradients:
        """Run one forward and backward pass of the targets' cross-entropy, on bare prompts; writes nothing.

        The loss of an edit is the mean over its target's tokens; the pass differentiates the sum over the edits.
        ``positions`` chooses the columns: ``"target"`` those whose output predicts a token of the target (the
        prompt's last token up to the target's last but one), ``"all"`` every token of prompt and target that is not
        padding, so that dL/dW = gradients @ inputs.T. ``trial`` maps sites to (d_out, d_in) weights that stand in
        for the current ones during this pass only; other sites keep theirs. ``ended`` appends the tokenizer's end of
        text to every target, where it has one. Columns come edit by edit, left to right.
        """
        ...

    def pilots(self, count: int) -> tuple[Sequence[EditRequest], str]:
        """Return up to ``count`` edits to calibrate on, and where they came from."""
        ...

    def calibrated(self, name: str, parts: Mapping[str, Any], measure: Callable[[], Tensor]) -> Tensor:
        """Return what ``measure`` returns on the unedited model; read from disk where it was measured before.

        ``name`` is the component's. ``parts`` (JSON values) hold what the result depends on besides the model, the
        sites and the options of the target optimisation. Raises after the first write.
        """
        ...


@dataclass(frozen=True)
class NoOptions:
    """The options of a component that has none."""


class State(NamedTuple):
    """The state of a component between batches: tensors, and JSON values beside them."""

    tensors: Mapping[str, Tensor] = {}
    json: Mapping[str, Any] = {}
    """Finite JSON values: text, whole numbers, flags, None, floats (kept to the last bit), lists and objects."""


class Component(ABC):
    """The common base of editors, stabilizers and diagnostics.

    A component is built with its options, prepared once on the unedited model, and may keep state: whatever ``state``
    returns is saved with the run and handed back to ``load_state`` when a stream is resumed.
    """

    name: ClassVar[str]
    """The name used on the command line."""
    reference: ClassVar[str]
    """The paper, for instance ``arXiv:2210.07229``."""
    remembers: bool = False
    """Whether its state advances with every batch; an undo then rebuilds it batch by batch."""

    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass, usually nested in the component's class; its fields are declared by ``option``."""

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.Options()

    # The methods below are hooks with a useful default, so they are neither abstract nor more than a docstring.
    def prepare(self, session: Session) -> None:  # noqa: B027
        """Measure whatever the method needs on the unedited model; called once, before the first write."""

    def state(self) -> State:
        """Return what a resumed run needs to continue as if unbroken."""
        return State()

    def load_state(self, session: Session, state: State) -> None:
        """Take back what :meth:`state` returned; called instead of ``prepare``, also on the unedited model.

        The default, for a component without state, prepares it again.
        """
        self.prepare(session)

    def record(self) -> dict[str, Any]:
        """Return the figures of this component that belong in ``run.json``, as finite JSON values.

        Called once the run has ended. A value that is not finite JSON is left out with a warning.
        """
        return {}


class Editor(Component):
    """Turns facts into weight updates.

    Implement :meth:`solve`; everything else has the default of the locate-and-edit methods. An editor without target
    values sets :attr:`needs_values` to False and implements :meth:`begin` and :meth:`update` instead.
    """

    needs_values: ClassVar[bool] = True
    """False for an editor without target values; stabilizers of values then have nothing to act on."""
    needs_subject: ClassVar[bool] = True
    """False for an editor that takes edits without a subject: it must ask a session for neither keys nor values."""
    writes_experts: ClassVar[bool] = False
    """True for an editor of the routed experts of a mixture: :attr:`Site.experts`. Every other editor writes dense MLPs
    and shared experts."""
    single_site: ClassVar[bool] = False
    """True for an editor that writes the last site only (ROME)."""
    on_base: ClassVar[bool] = False
    """True for an editor whose target values are those of the unedited model: in the middle of a stream z = h then does
    not say that there is nothing to write."""
    wraps: ClassVar[str] = ""
    """The option that names the editor which this one wraps; empty for an editor that wraps none."""
    wrapped: Editor | None = None
    """The editor that it wraps."""
    tempered_by: ClassVar[str] = ""
    """How to make this editor's updates smaller, as a clause ("raise mine.weight"); shown when a guard refuses one."""
    suggests: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of other components that the papers use with this editor, ``{component: {option: value}}``."""

    def largest_jump(self, site: Site) -> float | None:
        """Return the most that one batch may change R_n of ``site`` if the user gives no limit; None for any."""
        return None

    def wrap(self, editor: Editor) -> None:
        """Take the editor that the option :attr:`wraps` names, built with its own options, once and before all else.

        It acts where this one does: on its layers, and on the same edits.
        """
        self.wrapped = editor
        flags = {name: getattr(editor, name) for name in ("needs_values", "needs_subject", "single_site")}
        vars(self).update(flags)

    def values(self, session: Session, requests: Sequence[EditRequest]) -> Values:
        """Optimise the batch's target values on the current model; called once per stage, before its first write."""
        return session.values(requests)

    def problem(self, session: Session, requests: Sequence[EditRequest], site: Site, values: Values) -> Problem:
        """Return the problem of ``site``, on the model as written so far."""
        return Problem(site, session.keys(requests, site), session.residual(requests, site, values))

    def solve(self, session: Session, problem: Problem) -> Update:
        """Return the update that writes ``problem``; changes nothing, neither the model nor this editor."""
        raise NotImplementedError(f"{type(self).__name__} must implement solve()")

    @property
    def releases(self) -> bool:
        """Whether its memory can let go of the keys of edits that a later batch contradicts: :meth:`releasable`."""
        return False

    def releasable(self, session: Session, site: Site, keys: Tensor) -> Sequence[int]:
        """Return the columns of ``keys`` (d_in, m), remembered earlier, that the memory of ``site`` can let go of.

        :meth:`solve` and :meth:`remember` find these keys in :attr:`Problem.released` then. Called if :attr:`releases`.
        """
        return ()

    def completed(self, session: Session, requests: Sequence[EditRequest], problem: Problem) -> Problem:
        """Return a problem with what :meth:`remember` reads from the model once all sites of its batch are written.

        It is recorded, so that an undo and a later release have the same keys. The default adds nothing.
        """
        return problem

    def begin(self, session: Session, requests: Sequence[EditRequest]) -> None:
        """Measure a batch on the current model, before its first write; for an editor without target values."""
        raise NotImplementedError(f"{type(self).__name__} needs no values, so it must implement begin()")

    def update(self, session: Session, site: Site) -> Update:
        """Return the update of ``site`` from what :meth:`begin` measured; changes nothing."""
        raise NotImplementedError(f"{type(self).__name__} needs no values, so it must implement update()")

    def already_true(self, requests: Sequence[EditRequest]) -> Sequence[int]:
        """Return the columns, from 0, of the edits whose loss was low before the first step.

        Called after :meth:`begin`; of an editor with target values, the values show it. The default, for an editor
        that measures no loss, is none.
        """
        return ()

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        """Advance this editor's own state after a batch was written; the only place where it may.

        Set :attr:`remembers`. There are no ``problems`` without target values; an undo calls :meth:`begin` first then.
        """


class Stabilizer(Component):
    """Keeps a stream of edits from wrecking the model. Override what you need; the defaults are the identity."""

    acts_on: ClassVar[Collection[str]] = {"values", "updates", "weights"}
    """Which of ``values``, ``problems``, ``updates`` and ``weights`` it acts on.

    ``problems`` are updates that it judges by their keys or residual. An editor without target values has neither
    values nor problems, and a run with one warns of a stabilizer that acts on nothing else.
    """
    mixes_inputs: ClassVar[bool] = False
    """Whether what it returns may change inputs that an update leaves alone. Then it is refused on routed experts, of
    which an update changes those alone that the edits are routed to."""
    feeds_back: bool = False
    """Whether the next batch is given what :meth:`stabilize_update` took from this one: error feedback.

    See :mod:`editcli.editing.feedback`. Set :attr:`remembers` as well. It is of no use to a linear projection, which
    takes the same part from every update and would take it again.
    """

    lost: Mapping[str, Tensor] = MappingProxyType({})
    """f(D) - D of the last batch by module name, (d_out, d_in) float32 each; empty unless :attr:`feeds_back`."""

    def state(self) -> State:
        """Return :attr:`lost` as ``<module>.lost``; a stabilizer with more state adds to it."""
        return State({f"{module}.lost": lost for module, lost in self.lost.items()})

    def load_state(self, session: Session, state: State) -> None:
        """Take :attr:`lost` back, and prepare the rest again; raise :class:`StateError` where it does not fit."""
        self.prepare(session)
        saved, names = SavedState(self.name, state), {site: f"{site.module}.lost" for site in session.sites}
        # Before the first batch nothing was lost; a batch writes every site.
        if not self.feeds_back or not any(name in saved for name in names.values()):
            return
        for site, name in names.items():
            weight = session.weight(site)
            self.lost = {**self.lost, site.module: saved.tensor(name, weight.shape).to(weight.device)}

    def stabilize_values(self, session: Session, values: Values) -> Values:
        """Return the values to write instead."""
        return values

    def stabilize_update(self, session: Session, site: Site, update: Update, problem: Problem | None) -> Update:
        """Return the update to write instead; ``problem`` is None for an editor without target values."""
        return update

    def remember(self, session: Session, problems: Sequence[Problem], updates: Mapping[Site, Update]) -> None:
        """Advance this stabilizer's own state after a batch was written; the only place where it may.

        Set :attr:`remembers`. ``updates`` is what was written, after every stabilizer; there are no ``problems`` for
        an editor without target values. An undo rebuilds the state: it prepares the stabilizer and calls this with
        the recorded problems and updates, so use nothing that was measured elsewhere.
        """

    def stabilize_weight(self, session: Session, site: Site, weight: Tensor) -> Tensor:
        """Return the (d_out, d_in) weight to save instead of ``weight``; applied once, at read-out.

        ``weight`` is the accumulated W of ``site`` as the stabilizers before this one left it.
        """
        return weight


class Diagnostic(Component):
    """Watches a run: returns numbers for the journal after each batch."""

    def observe(self, session: Session, updates: Mapping[Site, Update]) -> dict[str, float]:
        """Return ``{name: number}`` for the batch that was just written.

        A count of earlier batches belongs in ``state``: set :attr:`remembers`, and an undo calls this again for every
        batch that stays.
        """
        return {}
