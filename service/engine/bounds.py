"""The plans that keep promises, and their bounds. Pure Python.

Two plans run the jobs in the order of their promises. Each plan bounds the completion time of every job:

- alone: one job after the other, each in waves of rows that fill a pass. Job k has taken its steps after the `seconds`
  of the jobs up to k.
- together: each pass is of the group of the first job, and filled with rows of that group in the order of promises, up
  to the width w of the group. For group h, let R be the forward rows that its jobs up to k have left, S the most steps
  left of one of them, and F the seconds of a full pass. All w rows of a pass belong to the jobs up to k, or the pass
  has all their due rows and S falls by 1. So the passes of group h take at most F·(R/w + S·(1 − 1/w)), and job k
  has taken its steps after the sum over the groups. In job k's own group its own steps are enough for S. (R. L. Graham,
  "Bounds on multiprocessing timing anomalies", 1969.) Where there are several groups, the jobs of a group that gains
  little from width run one after the other here, too. The sum of their `seconds` is then the term of that group.

Stages work beside the passes, one piece after the other, the earliest promise first:

- Texts and uploads are encoded first, one piece after the other. When their job may run at last, a pass may be under
  way. In `together`, the steps of jobs that may not run yet are added to S, because their number does not fall while
  others step.
- Rows that have taken their steps are decoded in batches of one group, of up to w rows. One batch may be under way.
  Where there is one group, each later batch is full of rows of the jobs up to k, except for the batch with the last
  row of job k. Where there are several, a batch has no row that goes after a waiting row of another group (stage.py).
  So while a row of job k waits, no batch of another group has rows of later jobs. But a batch may be of one row only.
- Images are checked one by one, and the answer is encoded piece by piece. One piece of another job may be under way in
  each of these two stages.

A job ahead may have no room for a piece of a later job that may be under way. Then that piece waits for it (turns.py).

A stage beside passes gets half of the machine. The bounds of a job's stages are added up. Once a job has taken its
steps, it waits only for stages, whatever passes run.

If the bounds of a plan keep all promises with a margin, the promises hold as long as the plan is followed. Passes
outside the plan make no bound longer, and neither do jobs that leave. So the scheduler may spend a plan's spare time
freely.
"""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from service.engine.costs import Costs, Machine
from service.engine.jobs import Job

MARGIN = 0.25  # work may take longer than expected by this share, and all promises hold
SHARED = 2.0  # times the seconds of a stage alone, while passes run beside it
ROUNDING = 1e-9  # seconds


class Spare(NamedTuple):
    """The seconds that each plan can lose and still keep all promises. Negative if the plan may break one."""

    alone: float
    together: float


class Images(NamedTuple):
    """Bounds of decoding images of one group, in seconds.

    Attributes:
        image: the most that an image takes: in a full batch, and where there are several groups in any batch.
        full: a full batch.
    """

    image: float
    full: float


class Bounds:
    """The plans' bounds in seconds, for one state of the costs, margin included.

    Attributes:
        rows, steps: for the passes of each group, the bound for a forward row and for a step in `together`.
        one_by_one: the groups whose jobs run one after the other in `together`, too.
        images: of decoding, for each group of passes.
        decode, encode, check, answer: factors from seconds at speed 1 to a bound.
    """

    def __init__(self, machine: Machine) -> None:
        self.one_by_one = machine.one_by_one
        self.rows: dict[Costs, float] = {}
        self.steps: dict[Costs, float] = {}
        self.images: dict[Costs, Images] = {}
        self.decode = self.encode = self.check = self.answer = SHARED * (1 + MARGIN)
        for costs in machine.passes.values():
            self.unit = costs.speed * (1 + MARGIN)
            full = costs.ceilings[costs.width] * self.unit
            self.rows[costs] = full / costs.width
            self.steps[costs] = full - full / costs.width
        for group, costs in machine.decode.items():
            self.decode = costs.speed * SHARED * (1 + MARGIN)
            ceilings = [seconds * self.decode for seconds in costs.ceilings[: costs.width + 1]]
            image = ceilings[-1] / costs.width
            if len(machine.decode) > 1:
                image = max(seconds / n for n, seconds in enumerate(ceilings) if n)
            self.images[machine.passes[group]] = Images(image, ceilings[-1])
        for costs in (*machine.encode.values(), *(() if machine.text is None else (machine.text,))):
            self.encode = costs.speed * SHARED * (1 + MARGIN)
        for costs in machine.check.values():
            self.check = costs.speed * SHARED * (1 + MARGIN)

    def filling(self, job: Job) -> tuple[float, float]:
        """What a job adds to the bound of the plan `together`: for its forward rows, and for its steps."""
        if job.costs in self.one_by_one:
            return self.unit * job.seconds, 0.0
        return self.rows[job.costs] * job.left, self.steps[job.costs] * job.steps


class _Rate:
    """Bounds of one group, and what its jobs so far have left.

    Attributes:
        row, step: bounds for a forward row and for a step.
        one_by_one: whether the jobs run one after the other.
        most: the bound for the most steps of a job that may run.
        held: the bound for the steps of jobs that may not run yet.
    """

    __slots__ = ("decode", "held", "most", "one_by_one", "row", "step")

    def __init__(self, row: float, step: float, one_by_one: bool, decode: Images) -> None:
        self.row, self.step, self.one_by_one, self.decode = row, step, one_by_one, decode
        self.most = self.held = 0.0


class Look(NamedTuple):
    """What the plans leave to a line of jobs.

    Attributes:
        spare: of the plans.
        alone: alone[i] is the bound of the plan `alone` for the first i jobs.
        others: others[i] is the bound of the plan `together` for the first i jobs, as it is for a new job of the group
            without steps of its own.
        most: most[i] is the bound for the most steps left of a job of the group, among the first i jobs that may run.
        left: for each plan, left[plan][i] is what job number i has to spare, also if it only waits for stages.
    """

    spare: Spare
    alone: list[float]
    others: list[float]
    most: list[float]
    left: tuple[list[float], list[float]]


def look(line: Sequence[Job], bounds: Bounds, start: float, group: Costs | None = None) -> Look:
    """Look at a line of jobs, for a new job whose passes have these costs."""
    unit, check, answer, nothing = bounds.unit, bounds.check, bounds.answer, Images(0.0, 0.0)
    rates = {
        costs: _Rate(row, bounds.steps[costs], costs in bounds.one_by_one, bounds.images.get(costs, nothing))
        for costs, row in bounds.rows.items()
    }
    ours = next(iter(rates.values())) if group is None else rates[group]
    alone = total = decoded = checked = answered = 0.0
    spare_alone = spare_together = inf
    alones, others, most = [0.0], [0.0], [0.0]
    left_alone: list[float] = []
    left_together: list[float] = []
    for job in line:  # up to a thousand jobs, before each pass
        rate = rates[job.costs]
        have = job.promise - start
        if job.undecoded:
            image, full = rate.decode
            decoded += job.undecoded * image
            have -= decoded - image + full + bounds.decode * job.blocks.decode
        if job.unchecked:
            checked += job.check_s
            have -= check * (checked + job.blocks.check)
        if job.unanswered:
            answered += job.answer_s
            have -= answer * (answered + job.blocks.answer)
        if job.waits and job.free_by > start:
            have -= job.free_by - start
        if job.left:
            alone += unit * job.seconds
            if rate.one_by_one:
                steps = 0.0
                total += unit * job.seconds
            else:
                steps = rate.step * job.steps
                total += rate.row * job.left
            if job.waits:
                rate.held += steps
                total += steps
            elif steps > rate.most:
                total += steps - rate.most
                rate.most = steps
            a, t = have - alone, have - total + rate.most + rate.held - steps
            is_free = not job.waits  # other passes take nothing from a job that cannot run yet
            if a < spare_alone and (is_free or a < -ROUNDING):
                spare_alone = a
            if t < spare_together and (is_free or t < -ROUNDING):
                spare_together = t
            left_alone.append(a)
            left_together.append(t)
        else:
            left_alone.append(have)
            left_together.append(have)
        alones.append(alone)
        others.append(total - ours.most - ours.held)
        most.append(ours.most)
    return Look(Spare(spare_alone, spare_together), alones, others, most, (left_alone, left_together))


def spare(line: Sequence[Job], machine: Machine, start: float) -> Spare:
    """The spare seconds of the plans. `line` is in the order of promises, and its first pass begins at `start`.

    A job whose rows have all taken their steps loses nothing, whatever passes run. A job whose texts or uploads are not
    encoded yet loses nothing either. But if a plan would break the promise of such a job, its spare time is negative.
    """
    return look(line, Bounds(machine), start).spare
