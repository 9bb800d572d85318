"""Several groups and all stages: promises hold, nobody starves, and a pass serves one group."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.costs import Machine
from tests.lines import Arrival, Line, any_arrivals, any_decode_times, any_times, machines, varied_images
from tests.properties import examples

SOON = 1e-6  # seconds, for rounding
MANY = 1000


@examples(400)
@given(
    machines(),
    any_arrivals(images=varied_images, latents=True, stages=True),
    any_times,
    any_decode_times,
    st.sampled_from((1, 4, MANY)),
)
def test_every_promise_is_kept_while_all_work_stays_within_its_margin(
    machine: Machine, arrivals: list[Arrival], times: list[float], decode_times: list[float], max_started: int
) -> None:
    line = Line(machine, max_started, times, decode_times=decode_times)
    for ticket in line.play(arrivals):
        assert (ticket.done is not None) + ticket.refused + ticket.cancelled == 1
        if ticket.done is not None:
            assert ticket.done <= ticket.promise + SOON
            assert ticket.promise <= ticket.latest
