"""A peer that differs only in its scheduler: Stepwise with a common scheduler.

    SCHEDULER=one STEPWISE_WEIGHTS=FOLDER STEPWISE_PORT=9101 python -m bench.peers.schedulers_server

`one` runs a request to its end, then the next. `batches` makes a batch of all waiting requests, up to the widest pass,
and runs it to its end. It is kinder than common servers: rows with different numbers of steps share a batch, and rows
that are done leave it.
"""

import os
from functools import partial

from service import __main__, build
from service.engine.choosing import fill
from service.engine.engine import Engine
from service.engine.jobs import Batch
from service.engine.scheduler import Scheduler


class OneAtATime(Scheduler):
    def choose(self, now: float) -> Batch:
        batch: Batch = []
        for job in sorted(self.by_work, key=lambda job: job.number)[:1]:
            fill(batch, job, job.costs.width, may_start=job.costs.width)
        return batch


class Batches(Scheduler):
    def choose(self, now: float) -> Batch:
        batch: Batch = []
        begun = self.running > 0
        for job in sorted(self.by_work, key=lambda job: job.number):
            fill(batch, job, job.costs.width, may_start=0 if begun else job.costs.width)
        return batch


if __name__ == "__main__":
    chosen = {"one": OneAtATime, "batches": Batches}[os.environ["SCHEDULER"]]
    setattr(build, "Engine", partial(Engine, scheduler=chosen))  # noqa: B010
    __main__.main()
