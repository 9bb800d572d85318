"""The ways to choose the rows of a pass. All rows of a pass are of one group. Pure Python."""

from collections.abc import Callable, Collection, Iterable, Sequence

from model.rows import Group
from service.engine.bounds import MARGIN
from service.engine.costs import Costs
from service.engine.jobs import Batch, Job

_MUCH_LONGER = 4.0  # times the work left of another job, or the seconds of another pass
_KEEPS_PACE = 1.25  # times the seconds of a pass


def shortest_first(
    by_work: Iterable[Job], may_start: Callable[[Group], int], keeps_pace: bool, width: int | None = None
) -> Batch:
    """The least work first, up to the width that pays, or narrower if a wide pass would slow a short job.

    Args:
        by_work: the jobs, the least work first. The first one with a row that may run picks the group.
        may_start: how many rows of a group may start.
        keeps_pace: whether a short job keeps its pace.
        width: the most rows instead of the width that pays.
    """
    batch: Batch = []
    costs: Costs | None = None
    limit = starting = 0
    for job in by_work:
        if job.waits or not (costs is None or job.costs is costs):
            continue
        if not batch:
            costs, limit, starting = job.costs, width or job.costs.width, may_start(job.group)
        elif keeps_pace:
            limit = pace_limit(job.costs, limit, len(batch), batch[0][0].job.left, job.left)
        starting -= fill(batch, job, limit, starting)
        if not batch:
            costs = None  # none of its rows may start
        if len(batch) >= limit:
            break
    return batch


def full_pass(by_work: Sequence[Job], may_start: Callable[[Group], int], instead: Batch) -> Batch | None:
    """A full pass of another group, if one has work for it and takes not much longer than this pass, else None."""
    own = instead[0][0].job.costs
    limit = _MUCH_LONGER * own.ceilings[len(instead)]
    others = dict.fromkeys(job.costs for job in by_work if job.costs is not own and not job.waits)
    for costs in others:
        if costs.ceilings[costs.width] <= limit:
            batch = shortest_first((job for job in by_work if job.costs is costs), may_start, False)
            if len(batch) == costs.width:
                return batch
    return None


def trial(batch: Batch, by_work: Sequence[Job], may_start: Callable[[Group], int], left: float) -> Batch | None:
    """A pass of the same group at another width, if one is worth a trial and takes no more than the time `left`."""
    costs = batch[0][0].job.costs
    width = costs.to_try()
    if width is None:
        return None
    tried = shortest_first((job for job in by_work if job.costs is costs), may_start, False, width)
    if len(tried) < width or at_most(tried) > left:
        return None
    costs.trials.begin(width)
    return tried


def filled(by_promise: Sequence[Job], one_by_one: Collection[Costs]) -> Batch:
    """The next pass of the plan `together`, where the jobs of these groups run one after the other."""
    batch: Batch = []
    first = next(job for job in by_promise if job.left and not job.waits)
    if first.costs in one_by_one:
        return first_alone(by_promise)
    for job in by_promise:
        if job.costs is first.costs and not job.waits:
            fill(batch, job, job.costs.width, len(job.rows))
            if len(batch) >= job.costs.width:
                break
    return batch


def first_alone(by_promise: Sequence[Job]) -> Batch:
    """The next pass of the plan `alone`."""
    first = next(job for job in by_promise if job.left and not job.waits)
    rows = first.furthest_behind()
    return [(row, branch) for row in rows for branch in row.branches][: first.costs.width]


def pace_limit(costs: Costs, limit: int, rows: int, least: float, left: float) -> int:
    """How wide a pass with `rows` may become, if the next job has `left` forward rows and the first job the `least`."""
    if left > _MUCH_LONGER * least:
        ceilings = costs.ceilings
        while limit > rows and ceilings[limit] > _KEEPS_PACE * ceilings[rows]:
            limit -= 1
    return limit


def fill(batch: Batch, job: Job, limit: int, may_start: int) -> int:
    """Fill the room of a batch with forward rows of a job. Returns how many rows start."""
    starting = 0
    for row in job.behind_first():
        if len(batch) >= limit:
            break
        if not row.started:
            if starting == may_start:
                continue
            starting += 1
        batch += [(row, branch) for branch in row.branches[: limit - len(batch)]]
    return starting


def at_most(batch: Batch) -> float:
    """The seconds of a pass at the most, margin included."""
    costs = batch[0][0].job.costs
    return costs.ceilings[len(batch)] * costs.speed * (1 + MARGIN)
