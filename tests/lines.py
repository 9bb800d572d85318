"""A simulated line of jobs with its own clock. Jobs arrive and leave, and tests set how long passes take.

A decoder may work in parallel with the passes. The line keeps its own record of all passes, to check the
scheduler's.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import count, cycle
from math import inf

from hypothesis import strategies as st

from service.engine.admission import earliest_promise
from service.engine.costs import Costs
from service.engine.jobs import Batch, Job, RowState
from service.engine.promises import MARGIN, SHARED
from service.engine.scheduler import Scheduler

Images = tuple[tuple[int, int], ...]  # for each image its steps, and the forward rows of a step


@dataclass(frozen=True)
class Arrival:
    """A job to come.

    Attributes:
        at: the time of arrival.
        images: for each image its steps, and the forward rows of a step.
        within: the seconds that the job may take; otherwise it is refused.
        hurry: the same, as a multiple of the shortest promise possible at arrival.
        leaves: seconds from arrival until the job is cancelled, unless it is done.
        decoded: whether its images are decoded, if there is a decoder.
    """

    at: float
    images: Images
    within: float = inf
    hurry: float = inf
    leaves: float = inf
    decoded: bool = True


@dataclass(eq=False)
class Ticket:
    """A job that has arrived, and its history.

    Attributes:
        ran: for each image, the pass number and the branch of each of its forward rows.
        undecoded: the images that wait for decoding.
        present: whether the job is in line: not refused, cancelled or done.
    """

    arrival: Arrival
    job: Job
    came: float
    latest: float
    promise: float
    present: bool
    done: float | None = None
    ran: list[list[tuple[int, int]]] = field(default_factory=list)
    undecoded: set[int] = field(default_factory=set)

    @property
    def refused(self) -> bool:
        return self.promise > self.latest

    @property
    def cancelled(self) -> bool:
        return not self.present and not self.refused and self.done is None

    @property
    def seconds(self) -> float:
        """Seconds from arrival until done."""
        assert self.done is not None, "it is not done"
        return self.done - self.came

    @property
    def size(self) -> int:
        return sum(steps * forwards for steps, forwards in self.arrival.images)

    @property
    def left(self) -> int:
        """The number of forward rows left."""
        return self.size - sum(map(len, self.ran))

    @property
    def due(self) -> int:
        """The number of forward rows that could run now."""
        images = zip(self.arrival.images, self.ran, strict=True)
        return sum(forwards - len(ran) % forwards for (steps, forwards), ran in images if len(ran) < steps * forwards)

    @property
    def unfinished(self) -> list[int]:
        """The images with forward rows left."""
        images = enumerate(zip(self.arrival.images, self.ran, strict=True))
        return [i for i, ((steps, forwards), ran) in images if len(ran) < steps * forwards]


@dataclass(frozen=True)
class Pass:
    """A pass: the ticket, the image and the branch of each forward row.

    Attributes:
        due: the number of forward rows that could have run.
        jobs: the jobs in line with forward rows left.
    """

    began: float
    ended: float
    rows: list[tuple[Ticket, int, int]]
    due: int
    jobs: int

    @property
    def tickets(self) -> list[Ticket]:
        return list(dict.fromkeys(ticket for ticket, _, _ in self.rows))


@dataclass(frozen=True)
class Decoded:
    """A batch of decoding: the ticket and the image of each."""

    began: float
    ended: float
    images: list[tuple[Ticket, int]]


class Line:
    """A scheduler, its clock, and a record of all arrivals and passes.

    Args:
        costs: of passes, and of decoding if there is a decoder.
        max_started: the scheduler's.
        times: durations of passes, repeated in turn, as multiples of the duration expected now.
        promises: whether jobs get promises.
        follows: whether costs follow the measured passes.
        decode_times: the same for batches of decoding.
    """

    def __init__(
        self,
        costs: Costs,
        max_started: int = 1000,
        times: Iterable[float] = (1.0,),
        promises: bool = True,
        follows: bool = False,
        decode_times: Iterable[float] = (1.0,),
    ) -> None:
        self.costs = costs
        self.scheduler = Scheduler(costs, max_started)
        self.now = 0.0
        self.tickets: list[Ticket] = []
        self.passes: list[Pass] = []
        self.finished: list[tuple[Ticket, int]] = []  # images
        self._times = cycle(times)
        self._promises = promises
        self._follows = follows
        self._at_most = [seconds * costs.speed for seconds in costs.ceilings]
        self._of: dict[Job, Ticket] = {}
        self._began: tuple[Batch, float] | None = None
        self.batches: list[Decoded] = []
        self._decode_times = cycle(decode_times)
        self._to_decode: list[tuple[float, float, int, Ticket]] = []  # in this order
        self._decodes = False

    @property
    def present(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.present]

    @property
    def images(self) -> list[tuple[Ticket, int]]:
        """Jobs in line that are not done, or will be done when the current pass ends."""
        last = len(self.passes) if self._began is not None and self._began[0] else inf
        return [
            (ticket, index)
            for ticket in self.present
            for index, ran in enumerate(ticket.ran)
            if index in ticket.unfinished or ran[-1][0] == last
        ]

    def came(self, arrival: Arrival) -> Ticket:
        """A job arrives now."""
        decoded = self.costs.decoding is not None and arrival.decoded
        job, latest = Job(arrival.images, self.costs, decoded), self.now + arrival.within
        if arrival.hurry < inf:
            earliest = earliest_promise(job, self.scheduler, self.now, self.now)
            late = (arrival.hurry - 1) * (earliest - self.now)
            latest = min(latest, earliest + late)
        promise = earliest_promise(job, self.scheduler, self.now, latest) if self._promises else inf
        ticket = Ticket(arrival, job, self.now, latest, promise, promise <= latest, ran=[[] for _ in arrival.images])
        ticket.undecoded = set(range(len(arrival.images))) if decoded else set()
        self.tickets.append(ticket)
        self._of[job] = ticket
        if ticket.present:
            self.scheduler.add(job, promise)
        return ticket

    def left(self, ticket: Ticket) -> None:
        """A job is cancelled now, if it is still in line."""
        ticket.present = False
        self.scheduler.remove(ticket.job)

    def begin(self) -> Batch:
        """Start the next pass."""
        tickets = self.present
        batch = self.scheduler.next_batch(self.now)
        self._began = batch, self.now
        if batch:
            seconds = next(self._times) * self._at_most[len(batch)]
            rows = [(self._of[row.job], row.index, branch) for row, branch in batch]
            jobs = sum(ticket.left > 0 for ticket in tickets)
            due = sum(ticket.due for ticket in tickets)
            self.passes.append(Pass(self.now, self.now + seconds, rows, due, jobs))
            for ticket, index, branch in rows:
                ticket.ran[index].append((len(self.passes), branch))
        return batch

    def end(self) -> list[RowState]:
        """The pass has ended."""
        assert self._began is not None, "no pass has begun"
        (batch, began), self._began = self._began, None
        if batch:
            self.now = self.passes[-1].ended
        finished = self.scheduler.advance(batch)
        if batch and self._follows:
            self.costs.follow(len(batch), self.now - began)
        for row in finished:
            ticket = self._of[row.job]
            self.finished.append((ticket, row.index))
            if ticket.undecoded:
                heappush(self._to_decode, (ticket.promise, ticket.job.number, row.index, ticket))
            elif not ticket.left:
                ticket.done, ticket.present = self.now, False
        return finished

    def begin_batch(self) -> float | None:
        """Start the decoder's next batch, if possible. Returns the time of its end."""
        decoding = self.costs.decoding
        if decoding is None or self._decodes:
            return None
        images: list[tuple[Ticket, int]] = []
        while self._to_decode and len(images) < decoding.width:
            *_, index, ticket = heappop(self._to_decode)
            if ticket.present:
                images.append((ticket, index))
        if not images:
            return None
        self._decodes = True
        seconds = next(self._decode_times) * decoding.ceilings[len(images)] * decoding.speed
        self.batches.append(Decoded(self.now, self.now + seconds, images))
        return self.now + seconds

    def end_batch(self) -> None:
        """End the batch."""
        self._decodes = False
        for ticket, index in self.batches[-1].images:
            self.scheduler.decoded(ticket.job)
            if ticket.present:
                ticket.undecoded.remove(index)
                if not ticket.undecoded:
                    ticket.done, ticket.present = self.now, False

    def moments(self, arrivals: Iterable[Arrival]) -> Iterator[None]:
        """Play all arrivals until nothing is left. Yields after each event."""
        number = count()
        events: list[tuple[float, int, Arrival | Ticket | None]] = [(a.at, next(number), a) for a in arrivals]
        heapify(events)

        def decode() -> None:
            if (until := self.begin_batch()) is not None:
                heappush(events, (until, next(number), None))

        def happen(until: float) -> Iterator[None]:
            while events and events[0][0] <= until:
                at, _, event = heappop(events)
                self.now = max(self.now, at)
                if event is None:
                    self.end_batch()
                    decode()
                elif isinstance(event, Ticket):
                    self.left(event)
                else:
                    ticket = self.came(event)
                    if ticket.present and event.leaves < inf:
                        heappush(events, (self.now + event.leaves, next(number), ticket))
                yield

        while True:
            decode()
            yield from happen(self.now)
            batch = self.begin()
            yield
            if batch:
                yield from happen(self.passes[-1].ended)
            self.end()
            decode()
            yield
            if not batch:
                if not events:
                    return
                yield from happen(events[0][0])

    def play(self, arrivals: Iterable[Arrival]) -> list[Ticket]:
        """Play all arrivals until nothing is left. Returns the jobs in order of arrival."""
        for _ in self.moments(arrivals):
            pass
        return self.tickets


def alike(images: int, steps: int, forwards: int = 1) -> Images:
    """`images` equal images."""
    return ((steps, forwards),) * images


def played(
    costs: Costs, arrivals: Sequence[Arrival], times: Sequence[float] = (1.0,), decode_times: Sequence[float] = (1.0,)
) -> Line:
    """A line after all arrivals have been played."""
    line = Line(costs, times=times, decode_times=decode_times)
    line.play(arrivals)
    return line


# Strategies.

_pass_seconds = st.one_of(st.floats(0.01, 1.0), st.sampled_from((0.125, 0.25, 0.5, 1.0)))


def _rising(seconds: list[float]) -> dict[int, float]:
    return dict(enumerate(sorted(seconds), 1))


cost_tables: st.SearchStrategy[dict[int, float]] = st.one_of(
    st.lists(_pass_seconds, min_size=1, max_size=9).map(lambda some: dict(enumerate(some, 1))),  # in any order
    st.lists(_pass_seconds, min_size=1, max_size=9).map(_rising),
    st.lists(_pass_seconds, min_size=5, max_size=5).map(lambda some: dict(zip((1, 2, 4, 8, 16), some, strict=True))),
    st.lists(_pass_seconds, min_size=5, max_size=5).map(
        lambda some: dict(zip((1, 2, 4, 8, 16), sorted(some), strict=True))
    ),
    st.tuples(st.integers(1, 9), _pass_seconds).map(lambda one: {one[0]: one[1]}),
    st.tuples(st.integers(1, 9), _pass_seconds).map(lambda one: {n: n * one[1] for n in range(1, one[0] + 1)}),
    st.just({1: 2.0, 2: 3.0, 3: 4.0, 4: 4.5, 5: 6.0, 6: 7.0, 7: 8.75, 8: 7.5}),  # 8 are cheaper than 7
)

costs_with_decoding = st.builds(lambda passes, decoding: Costs(passes, Costs(decoding)), cost_tables, cost_tables)

any_images: st.SearchStrategy[Images] = st.one_of(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from((1, 2))), min_size=1, max_size=12).map(tuple),
    st.builds(alike, st.integers(1, 12), st.integers(1, 12), st.sampled_from((1, 2))),
    st.just(((1, 1),)),
)

any_times = st.lists(
    st.one_of(st.sampled_from((1 + MARGIN, 1 + MARGIN, 1.0, 0.01)), st.floats(0.01, 1 + MARGIN)), min_size=1, max_size=6
)


any_decode_times = any_times.map(lambda times: [SHARED * some for some in times])


@st.composite
def any_arrivals(
    draw: st.DrawFn,
    max_size: int = 12,
    deadlines: bool = True,
    images: st.SearchStrategy[Images] = any_images,
    latents: bool = False,
) -> list[Arrival]:
    """Jobs in bursts and alone. Some are in a hurry, some leave, and some may not be decoded."""
    at, arrivals = 0.0, []
    for _ in range(draw(st.integers(1, max_size))):
        at += draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(0.0, 20.0)))
        hurry = draw(st.sampled_from((inf, inf, 1.0, 1.0, 1.0, 1.1, 1.5, 3.0, 0.9))) if deadlines else inf
        leaves = draw(st.one_of(st.just(inf), st.just(inf), st.floats(0.0, 20.0)))
        arrivals.append(
            Arrival(at, draw(images), hurry=hurry, leaves=leaves, decoded=not (latents and draw(st.booleans())))
        )
    return arrivals
