"""An edit that contradicts an earlier one releases its key before it writes (arXiv 2605.26670, Prop. 3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from editcli.editing.outdated import Outdated, release
from editcli.editing.pipeline import Written, commit, edit_batch
from editcli.plugin.interfaces import Site, Values
from editcli.requests.schema import EditRequest
from editcli_alphaedit.editor import AlphaEdit
from editcli_memit.editor import Memit
from editcli_rlsedit.editor import RlsEdit
from editcli_rome.editor import Rome
from tests.support.facts import requests_of
from tests.support.sessions import FakeSession, assert_close


def write(session: FakeSession, editor: Any, batch: Sequence[EditRequest], *old: Outdated) -> Written:
    real = cast(Any, session)
    written = edit_batch(real, editor, (), batch, lambda *_: None, outdated=old)
    commit(real, editor, (), batch, written)
    return written


def old_of(written: Written, batch: Sequence[EditRequest], column: int, by: str) -> Outdated:
    keys = {site.module: problem.remembered[:, column] for site, problem in written.problems.items()}
    return Outdated(batch[column].id, by, keys)


@pytest.mark.parametrize("shape", [(6, 11), (11, 6)])
def test_the_batch_is_solved_as_if_the_old_key_had_not_been_there(shape: tuple[int, int]) -> None:
    """M = w C + K_p K_p^T + K K^T - K_o K_o^T, with explicit inverses."""
    session, weight = FakeSession(shape), 0.5
    editor = RlsEdit(RlsEdit.Options(mom2_update_weight=weight))
    editor.prepare(cast(Any, session))
    gram = {site: weight * session.second_moment(site) for site in session.sites}
    first, second = requests_of("first", 4), requests_of("second", 3)
    earlier = write(session, editor, first)
    for site, problem in earlier.problems.items():
        gram[site] = gram[site] + problem.keys.double() @ problem.keys.double().T
    before = session.masters()
    later = write(session, editor, second, *(old_of(earlier, first, column, second[0].id) for column in (1, 3)))
    assert later.released == (first[1].id, first[3].id)
    for site, problem in later.problems.items():
        keys, old = problem.keys.double(), earlier.problems[site].keys[:, [1, 3]].double()
        gram[site] = gram[site] + keys @ keys.T - old @ old.T
        expected = problem.residual.double() @ keys.T @ torch.linalg.inv(gram[site])
        assert_close(session.weight(site) - before[site], expected, 1e-4)
        assert_close(editor.memory[site.module].matrix, torch.linalg.inv(gram[site]), 1e-5)


def test_a_new_fact_is_written_where_the_old_one_held_it_back() -> None:
    """With a memory that outweighs the new edit, the same key gets half of its residual; once released, all of it."""
    shares = []
    for released in (False, True):
        session, editor = FakeSession((6, 11), sites=1), Memit(Memit.Options(mom2_update_weight=1e-3, remember=True))
        (site,) = session.sites
        editor.prepare(cast(Any, session))
        first = requests_of("a", 1)
        earlier = write(session, editor, first)
        old = (old_of(earlier, first, 0, first[0].id),) if released else ()
        before = session.weight(site)
        problem = write(session, editor, first, *old).problems[site]
        wrote = (session.weight(site) - before).double() @ problem.keys.double()
        shares.append(float((wrote * problem.residual).sum() / problem.residual.double().square().sum()))
    assert shares[0] < 0.55
    assert shares[1] > 0.95


def test_alphaedit_lets_go_of_the_keys_that_it_remembers() -> None:
    """It reads them again once all sites are written; the record has those, so that they go without a rest."""

    class Moves(FakeSession):
        """Every read of a key finds it a little longer."""

        reads = 0

        def keys(self, requests: Sequence[EditRequest], site: Site) -> Tensor:
            self.reads += 1
            return (1 + 0.01 * self.reads) * super().keys(requests, site)

    session = Moves((6, 11), small=5)
    editor = AlphaEdit(AlphaEdit.Options(l2=0.1))
    editor.prepare(cast(Any, session))
    start = {module: gram.matrix for module, gram in editor.memory.items()}
    batch, later = requests_of("a", 2), requests_of("b", 2)
    written = write(session, editor, batch)
    assert all(problem.held is not None for problem in written.problems.values())
    old = [old_of(written, batch, column, later[0].id) for column in range(2)]
    for site in session.sites:
        keys, ids = release(cast(Any, session), editor, site, old, given_up=())
        assert keys is not None
        assert ids == ("a-0", "a-1")
        assert_close(editor.memory[site.module].released(keys).matrix, start[site.module], 1e-6)


def test_an_edit_that_is_given_up_releases_nothing() -> None:
    class GivesUp(Memit):
        def values(self, session: Any, requests: Any) -> Values:
            return session.values(requests).drop({0: "refused"})

    session, editor = FakeSession((6, 11)), GivesUp(Memit.Options(remember=True))
    editor.prepare(cast(Any, session))
    first, second = requests_of("first", 2), requests_of("second", 2)
    earlier = write(session, editor, first)
    later = write(session, editor, second, *(old_of(earlier, first, at, second[at].id) for at in (0, 1)))
    assert later.released == (first[1].id,)
    assert all(problem.released is not None and problem.released.shape[1] == 1 for problem in later.problems.values())


def test_a_key_that_cannot_go_is_named_and_stays() -> None:
    session, editor = FakeSession((6, 11)), RlsEdit(RlsEdit.Options(mom2_update_weight=0.5))
    editor.prepare(cast(Any, session))
    first, second = requests_of("first", 2), requests_of("second", 2)
    write(session, editor, first)
    strange = Outdated("gone", second[0].id, {site.module: 9 * torch.ones(session.shape[1]) for site in session.sites})
    later = write(session, editor, second, strange)
    assert later.released == ()
    assert all(problem.released is None for problem in later.problems.values())
    assert [said.partition(":")[0] for said in session.reporter.warnings] == [site.module for site in session.sites]
    assert all("'gone'" in said for said in session.reporter.warnings)


def test_only_an_editor_with_a_memory_releases() -> None:
    assert RlsEdit().releases
    assert Memit(Memit.Options(remember=True)).releases
    assert not Memit().releases
    assert not Rome().releases
