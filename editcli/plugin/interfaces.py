"""The seam: what a plugin gives us (abstract classes) and what we give it (a protocol and frozen data).

Shapes use the papers' letters: a site's weight W is (d_out, d_in), the layer computes W k; K is (d_in, n) with one
column per edit, R is (d_out, n). A batch goes through these stages:

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

A stabilizer maps a type to itself and its default is the identity; only the editor turns one type into another.
This module never imports torch at run time, so that listing plugins stays fast.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

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


@dataclass(frozen=True, slots=True)
class Values:
    """Optimised target values of a batch at the last edited layer, (d, n) each, float32.

    ``target`` is z = h + delta, ``initial`` is h, ``written`` is m, the output of that layer's MLP.
    """

    target: Tensor
    initial: Tensor
    written: Tensor
    dropped: Mapping[int, str]
    """Columns that a stabilizer gave up, with the reason: such an edit keeps its place and changes nothing."""
    loss: Tensor
    """(n,) the loss at which each edit's optimisation stopped."""
    reached: Tensor | None = None
    """(n,) bool: whose loss fell below ``targets.stop_loss``; with ``targets.stop=greedy`` also whose target is the
    greedy answer in all its contexts. None where nobody counted."""
    clamped: Tensor | None = None
    """(n,) bool: whose offset ended at ``targets.clamp``; None where nobody counted."""

    @property
    def contribution(self) -> Tensor:
        """What the MLP would have to output, v = m + delta, (d, n)."""
        return self.target - self.initial + self.written

    def with_contribution(self, contribution: Tensor) -> Values:
        """Return the values whose MLP outputs ``contribution``: z = (h - m) + v."""
        return replace(self, target=self.initial - self.written + contribution)

    def drop(self, columns: Mapping[int, str]) -> Values:
        """Return the values with ``columns`` given up, each for its reason."""
        return replace(self, dropped={**self.dropped, **columns}) if columns else self


@dataclass(frozen=True, slots=True)
class Problem:
    """What one site is asked to write: find D with D K close to R. ``keys`` (d_in, n), ``residual`` (d_out, n)."""

    site: Site
    keys: Tensor
    residual: Tensor


@dataclass(frozen=True, slots=True)
class Update:
    """What a site's weight gains: D = left @ right.T with ``left`` (d_out, r) and ``right`` (d_in, r)."""

    left: Tensor
    right: Tensor

    @classmethod
    def from_dense(cls, matrix: Tensor) -> Update:
        """Wrap a dense (d_out, d_in) update without losing anything: an identity on the smaller side."""
        rows, columns = matrix.shape
        if rows <= columns:
            return cls(left=matrix.new_ones(rows).diag(), right=matrix.T)
        return cls(left=matrix, right=matrix.new_ones(columns).diag())

    def dense(self) -> Tensor:
        """Return D as a (d_out, d_in) matrix."""
        return self.left @ self.right.T

    def norm(self) -> float:
        """Return ||D||_F from the factors, without forming D."""
        gram = (self.left.double().T @ self.left.double()) * (self.right.double().T @ self.right.double())
        return float(gram.sum().clamp_min(0).sqrt())


@dataclass(frozen=True, slots=True)
class SiteGradients:
    """What one site saw and was asked for, one column per token position: ``t`` positions of all edits together."""

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

    def second_moment(self, site: Site) -> Tensor:
        """Return Cov = E[k k^T], (d_in, d_in) float64, of the unedited model; raises after the first write."""
        ...

    def decomposition(self, site: Site) -> tuple[Tensor, Tensor]:
        """Return Cov's eigenvalues (d_in,), ascending, and eigenvectors (d_in, d_in) in float64; cached on disk."""
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
    ) -> Gradients:
        """Run one forward and backward pass of the targets' cross-entropy, on bare prompts; writes nothing.

        The loss of an edit is the mean over its target's tokens; the pass differentiates the sum over the edits.
        ``positions`` chooses the columns: ``"target"`` those whose output predicts a token of the target (the
        prompt's last token up to the target's last but one), ``"all"`` every token of prompt and target that is not
        padding, so that dL/dW = gradients @ inputs.T. ``trial`` maps sites to (d_out, d_in) weights that stand in
        for the current ones during this pass only; other sites keep theirs. Columns come edit by edit, left to right.
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


class Component(ABC):
    """What editors and stabilizers have in common.

    A component is built with its options, prepared once on the unedited model, and may keep state: whatever
    ``state_dict`` returns is saved with the run and handed back to ``load_state_dict`` when a stream is resumed.
    """

    name: ClassVar[str]
    """The name used on the command line."""
    reference: ClassVar[str]
    """The paper, for instance ``arXiv:2210.07229``."""

    Options: ClassVar[type[Any]] = NoOptions
    """A frozen dataclass, usually nested in the component's class; its fields are declared by ``option``."""

    def __init__(self, options: Any = None):
        self.options: Any = options if options is not None else self.Options()

    # The methods below are hooks with a useful default, so they are neither abstract nor more than a docstring.
    def prepare(self, session: Session) -> None:  # noqa: B027
        """Measure whatever the method needs on the unedited model; called once, before the first write."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors that a resumed run needs to go on as if unbroken."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor], session: Session) -> None:
        """Take back what ``state_dict`` returned; called instead of ``prepare``, also on the unedited model.

        The default, for a component without state, prepares it again.
        """
        self.prepare(session)

    def record(self) -> dict[str, Any]:
        """Return the figures of this component that belong in ``run.json``."""
        return {}


class Editor(Component):
    """Turns what should be written into weight updates.

    Implement :meth:`solve`; everything else has the default of the locate-and-edit methods.
    """

    needs_values: ClassVar[bool] = True
    """False for an editor that optimises no target values; stabilizers of values then have nothing to act on."""
    needs_subject: ClassVar[bool] = True
    """False for an editor that takes edits without a subject: it must ask a session for neither keys nor values."""
    single_site: ClassVar[bool] = False
    """True for an editor that writes the last site only (ROME)."""
    tempered_by: ClassVar[str] = ""
    """What makes this editor's updates smaller, as a clause ("raise mine.weight"); said when a guard refuses one."""
    suggests: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Settings of other components that the papers use with this editor, ``{component: {option: value}}``."""

    def largest_jump(self, site: Site) -> float | None:
        """Return the most that one batch may change R_n of ``site`` if the user gives no limit; None for any."""
        return None

    def values(self, session: Session, requests: Sequence[EditRequest]) -> Values | None:
        """Optimise the batch's target values on the current model; called once per batch, before the first write.

        An editor without values may measure here, for all sites at once, what its :meth:`problem` will need.
        """
        return session.values(requests) if self.needs_values else None

    def problem(self, session: Session, site: Site, requests: Sequence[EditRequest], values: Values | None) -> Problem:
        """Return what ``site`` is asked to write, on the model as written so far."""
        if values is None:
            raise TypeError(f"{type(self).__name__} computes no values, so it must override problem()")
        return Problem(site, session.keys(requests, site), session.residual(requests, site, values))

    def already_true(self, requests: Sequence[EditRequest]) -> Sequence[int]:
        """Return which edits of the batch had a low loss before the first step, by their places from 0.

        Asked after :meth:`values`, of an editor without target values; of any other, the values tell. The default, for
        an editor that measures no loss, names none.
        """
        return ()

    @abstractmethod
    def solve(self, problem: Problem) -> Update:
        """Return the update that writes ``problem``; changes nothing, neither the model nor this editor."""

    def remember(self, session: Session, requests: Sequence[EditRequest], problems: Sequence[Problem]) -> None:
        """Advance this editor's own state after a batch was written; the only place where it may."""


class Stabilizer(Component):
    """Keeps a stream of edits from wrecking the model. Override what you need; the defaults are the identity."""

    @classmethod
    def acts_on_values_alone(cls) -> bool:
        """Tell whether target values are all that this stabilizer acts on, so that it needs an editor with values."""
        updates = cls.stabilize_update is not Stabilizer.stabilize_update
        return not updates and cls.stabilize_weight is Stabilizer.stabilize_weight

    def stabilize_values(self, values: Values, session: Session) -> Values:
        """Return the values that shall be written instead."""
        return values

    def stabilize_update(self, update: Update, problem: Problem, session: Session) -> Update:
        """Return the update that shall be written instead."""
        return update

    def remember(self, session: Session, problems: Sequence[Problem], updates: Mapping[Site, Update]) -> None:
        """Advance this stabilizer's own state after a batch was written; the only place where it may.

        ``updates`` is what was written, after every stabilizer. An undo rebuilds the state: it prepares the stabilizer
        and calls this with the recorded problems and updates, so use nothing that was measured elsewhere.
        """

    def stabilize_weight(self, weight: Tensor, site: Site, session: Session) -> Tensor:
        """Return the (d_out, d_in) weight to save instead of ``weight``; applied once, at read-out.

        ``weight`` is the accumulated W of ``site`` as the stabilizers before this one left it.
        """
        return weight


class Diagnostic(Component):
    """Watches a run: returns numbers for the journal after each batch."""

    def observe(self, session: Session, updates: Mapping[Site, Update]) -> dict[str, float]:
        """Return ``{name: number}`` for the batch that was just written.

        What it counts up here belongs in ``state_dict``; an undo then calls this again for every batch that is kept.
        """
        return {}
