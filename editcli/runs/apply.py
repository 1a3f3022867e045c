"""The main job: read edits, edit a model, save and verify it. Needs nothing but a recipe and the loaded plugins."""

from __future__ import annotations

from editcli.distributed.team import Team, agree_on_inputs
from editcli.errors import GuardError, OptionError
from editcli.plugin.manager import Plugins
from editcli.records.record import DONE, INTERRUPTED, STOPPED
from editcli.reporting import Reporter, RunReport
from editcli.runs import planning
from editcli.runs.context import Context, Interrupts
from editcli.runs.ending import Finished, finish
from editcli.runs.identity import plan_parts
from editcli.runs.opening import Batches, Job, Opened, begin, claimed, load
from editcli.runs.remarks import announce, look_ahead
from editcli.settings.recipe import Recipe


def apply(recipe: Recipe, plugins: Plugins, reporter: Reporter | None = None, *, team: Team | None = None) -> RunReport:
    """Run ``recipe`` from the edits file to the saved, verified folder; raises an :class:`EditError`.

    Every process of ``team`` calls this alike and returns the same report; rank 0 alone writes and reports.
    """
    context = Context.of(plugins, reporter, team)
    team = context.team
    if recipe.parallel == "tensor" and team.size == 1:
        raise OptionError("--parallel tensor splits a model over several processes; start them with torchrun")
    if recipe.edits == "-" and team.size > 1:
        raise OptionError(f"{team.size} processes cannot share the standard input; pass the edits as a file")
    recipe = planning.with_clock(recipe.with_preset_read(), team)
    with context.clock.spent("load"):
        planned = planning.check(recipe, plugins, context.reporter)
    planning.tell_conflicts(planned, context.reporter)
    # No process checks any more that the folder is free once rank 0 has taken it.
    agree_on_inputs(team, "recipe and edits", plan_parts(planned))
    with claimed(planned, context) as job:
        return run(job).report


def run(job: Job) -> Finished:
    """Load the model of ``job``, write the edits of its schedule, save and report."""
    planned, context = job.planned, job.context
    announce(planned, new=job.schedule.recovered is None, reporter=context.reporter)
    base = load(job)
    batches = job.schedule.batches
    ahead = [request for batch in batches for request in batch]
    look_ahead(base.loaded, planned, ahead, context)
    before = base.measuring.before([*job.schedule.done, *ahead])
    opened = begin(job, base)
    read = opened.stream.taken + len(ahead) + len(opened.record.rejections.all)
    status, stopped_by = _edit(opened, batches)
    opened.stream.save()
    return finish(opened, read=read, before=before, status=status, stopped_by=stopped_by)


def _edit(opened: Opened, batches: Batches) -> tuple[str, str | None]:
    """Write the batches; return how that ended and the guard that stopped it."""
    context = opened.job.context
    edits = sum(map(len, batches))
    with Interrupts(context.reporter) as interrupts, context.reporter.phase("Editing", edits, "edits") as advance:
        for batch in batches:
            # A signal reaches the processes at different moments, and they must stop after the same batch.
            if context.team.any("interrupts", interrupts.asked):
                return INTERRUPTED, None
            try:
                report = opened.stream.apply(batch)
            except GuardError as error:
                return STOPPED, str(error)
            for phase, seconds in report.seconds.items():
                context.clock.seconds[phase] += seconds
            advance(len(batch))
        return (INTERRUPTED if context.team.any("interrupts", interrupts.asked) else DONE), None
