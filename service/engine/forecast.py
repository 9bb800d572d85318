"""What a request takes on an idle server. Pure Python."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

from model.rows import Row
from service.engine.arrivals import Arrivals
from service.engine.costs import Machine
from service.engine.eta import outlook
from service.engine.jobs import job_of
from service.engine.promises import seconds_alone
from service.engine.scheduler import Scheduler


class Forecast(NamedTuple):
    """Seconds of a request on an idle server.

    Attributes:
        expected_s: until it is done.
        promise_s: of the earliest promise.
    """

    expected_s: float
    promise_s: float


def forecast(rows: Sequence[Row], values: tuple[int, int], machine: Machine) -> Forecast:
    """Forecast a request that needs all of its texts encoded.

    Args:
        values: of its answer, see service.engine.requests.Encoding.
    """
    texts = {text for row in rows for text in row.texts}
    job = job_of(rows, machine, values, len(texts), uploads=0)
    idle = Scheduler(machine, dict.fromkeys(machine.passes, len(rows)))
    expected_s = outlook(job, idle, Arrivals(0.0), 0.0, inf).eta()
    return Forecast(expected_s, seconds_alone(job, machine))
