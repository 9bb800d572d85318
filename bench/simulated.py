"""Schedulers on a virtual clock: their effect on latency, without waiting and without the machine's noise."""

from collections.abc import Mapping, Sequence

from bench.load import Load, Outcome, arrivals
from service.engine.admission import earliest_promise
from service.engine.costs import Costs, Machine
from service.engine.engine import STARTED_PER_ROW
from service.engine.jobs import Job
from service.engine.scheduler import Scheduler

GROUP = "images"
PATIENCE = 300.0  # seconds; timeout_s of all requests


def simulated(
    scheduler: type[Scheduler], costs: Mapping[int, float], rate: float, steps: Sequence[int], number: int
) -> Load:
    """Poisson arrivals of single rows. Passes take exactly their expected time.

    Args:
        scheduler: chooses the passes.
        costs: seconds of a pass by width.
        rate: arrivals a second.
        steps: numbers of steps, equally frequent.
        number: number of arrivals.
    """
    machine = Machine({GROUP: Costs(costs)})
    line = scheduler(machine, {GROUP: STARTED_PER_ROW * max(costs)})
    waiting = arrivals(number, rate, [{"num_inference_steps": n} for n in steps], seed=0)[::-1]
    here: dict[Job, tuple[float, int]] = {}
    outcomes: list[Outcome] = []
    now = 0.0
    while waiting or here:
        while waiting and waiting[-1].at <= now:
            request = waiting.pop()
            n = int(str(request.fields["num_inference_steps"]))
            job = Job(GROUP, [(1,) * n], machine)
            line.add(job, earliest_promise(job, line, request.at, request.at + PATIENCE))
            here[job] = request.at, n
        batch = line.next_batch(now)
        if not batch:
            now = waiting[-1].at
            continue
        now += machine.passes[GROUP].seconds(len(batch))
        for row in line.advance(batch):
            at, n = here.pop(row.job)
            outcomes.append(Outcome(n, now - at))
    return Load(outcomes, now)
