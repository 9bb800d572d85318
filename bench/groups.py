"""What several groups cost, on a virtual clock: shared passes, waiting, and promises.

    python -m bench.groups

Requests of one image and 10 or 50 steps arrive at random. Each group gets an equal share of the work. A pass of the
next group takes four times as long, and gains as much from width or little.
"""

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.engine.admission import earliest_promise
from service.engine.costs import Costs, Machine, Speed
from service.engine.engine import STARTED_PER_ROW
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler

NUMBER = 3000  # requests
LOAD = 0.7  # of what full passes can do
STEPS = (10, 50)
GAINS = {1: 0.002, 2: 0.003, 4: 0.005, 8: 0.008}
GAINS_LITTLE = {1: 0.002, 2: 0.0038, 4: 0.0074, 8: 0.0146}
PATIENCE = 300.0  # seconds; timeout_s of all requests
HURRY = 20.0  # times the seconds alone; timeout_s in the second column of accepted requests


@dataclass
class Found:
    """What a line of requests got.

    Attributes:
        filled: seconds of the rows in full passes, as a share of the seconds of all passes.
        slower: mean time of requests with 10 steps in the first group, as a multiple of that alone.
        promised: mean promise of all accepted requests, as a multiple of their time alone.
        accepted: share of requests.
        kept: share of the accepted ones' promises.
    """

    filled: float
    slower: float
    promised: float
    accepted: float
    kept: float


def played(tables: Sequence[Mapping[int, float]], load: float, hurry: float | None = None) -> Found:
    """Play requests of groups with these costs. Passes take exactly their expected time."""
    speed, draw = Speed(), random.Random(0)
    machine = Machine({group: Costs(table, speed) for group, table in enumerate(tables)})
    line = Scheduler(machine, {group: STARTED_PER_ROW * max(table) for group, table in enumerate(tables)})
    work = [statistics.mean(STEPS) * costs.seconds_per_row for costs in machine.passes.values()]
    shares = [1 / seconds for seconds in work]
    gap = sum(share * seconds for share, seconds in zip(shares, work, strict=True)) / sum(shares) / load
    now = at = all_s = full_s = 0.0
    here: dict[Job, float] = {}
    slower, promised, kept, came = [], [], [], 0
    while came < NUMBER or here:
        while came < NUMBER and at <= now:
            [group], steps = draw.choices(range(len(tables)), shares), draw.choice(STEPS)
            job = Job(group, [(1,) * steps], machine)
            latest = at + (PATIENCE if hurry is None else hurry * job.seconds)
            promise = earliest_promise(job, line, at, latest)
            if promise <= latest:
                promised.append((promise - at) / job.seconds)
                line.add(job, promise)
                here[job] = at
            came, at = came + 1, at + draw.expovariate(1 / gap)
        batch = line.next_batch(now)
        if not batch:
            now = at
            continue
        costs = batch[0][0].job.costs
        now += costs.seconds(len(batch))
        all_s, full_s = all_s + costs.seconds(len(batch)), full_s + len(batch) * costs.seconds_per_row
        for row in line.advance(batch):
            job, since = row.job, here.pop(row.job)
            kept.append(now <= job.promise)
            if job.group == 0 and row.steps == STEPS[0]:
                slower.append((now - since) / (row.steps * costs.seconds(1)))
    return Found(
        full_s / all_s,
        statistics.mean(slower),
        statistics.mean(promised),
        len(promised) / NUMBER,
        statistics.mean(kept),
    )


def main() -> None:
    print("| groups | passes filled | 10 steps, times alone | promise, times alone | accepted in a hurry | kept |")
    print("|---|---|---|---|---|---|")
    for name, table in (("gain", GAINS), ("gain little", GAINS_LITTLE)):
        for groups in (1, 2, 3):
            larger = [{n: 4**i * seconds for n, seconds in table.items()} for i in range(1, groups)]
            patient, hurried = played([GAINS, *larger], LOAD), played([GAINS, *larger], 1.2, HURRY)
            print(
                f"| {groups}, larger ones {name} | {patient.filled:.0%} | {patient.slower:.1f} "
                f"| {patient.promised:.0f} | {hurried.accepted:.0%} | {patient.kept:.1%} and {hurried.kept:.1%} |"
            )


if __name__ == "__main__":
    main()
