"""A simulated line of jobs with its own clock. Jobs arrive and leave, and tests set how long work takes.

Stages work in parallel with the passes: an encoder of texts and uploads, a decoder, a checker of images, and one that
encodes answers. The line keeps its own record of all work, to check the scheduler's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count, cycle, takewhile
from math import inf

from hypothesis import strategies as st

from model.rows import Group
from service.engine.admission import earliest_promise
from service.engine.bounds import MARGIN, SHARED
from service.engine.costs import Costs, Machine, PerValue, Speed
from service.engine.jobs import Batch, Job
from service.engine.scheduler import Scheduler
from service.engine.stage_work import StageWork
from service.engine.turns import Stage, must_wait
from service.engine.waves import RowState

SOON = 1e-6  # seconds, for rounding
LARGEST = 100  # values of a piece of an answer

Image = tuple[int, ...]  # steps, and forward rows of a step; perhaps also the first and the last line with so many
Images = tuple[Image, ...]

ONE = Group(1, 1)  # the group of jobs where there is only one
GROUPS = (ONE, Group(2, 2), Group(3, 3))


def lines_of(image: Image) -> tuple[int, ...]:
    """The forward rows of each line of an image. Lines outside of the first and the last take one."""
    steps, forwards, *within = image
    first, last = within or (0, steps)
    return tuple(forwards if first <= line < last else 1 for line in range(steps))


def machine_of(
    *tables: Mapping[int, float],
    decode: Mapping[int, float] | None = None,
    encode: float | None = None,
    answer: PerValue | None = None,
    text: float | None = None,
    check: float | None = None,
) -> Machine:
    """A machine with a group for each table of seconds of passes. Each stage costs the same in all groups."""
    speeds = Speed(), Speed(), Speed(), Speed()
    groups = GROUPS[: len(tables)]
    return Machine(
        {group: Costs(table, speeds[0]) for group, table in zip(groups, tables, strict=True)},
        {} if decode is None else {group: Costs(decode, speeds[1]) for group in groups},
        {} if encode is None else {group: Costs({1: encode}, speeds[2]) for group in groups},
        answer,
        None if text is None else Costs({1: text}, speeds[2]),
        {} if check is None else {group: Costs({1: check}, speeds[3]) for group in groups},
    )


def job_of(images: Images, machine: Machine, stages: StageWork | None = None, group: Group = ONE) -> Job:
    return Job(group, map(lines_of, images), machine, stages)


@dataclass(frozen=True)
class Arrival:
    """A job to come.

    Attributes:
        at: the time of arrival.
        images: of the job.
        within: the seconds that the job may take; otherwise it is refused.
        hurry: the same, as a multiple of the shortest promise possible at arrival.
        leaves: seconds from arrival until the job is cancelled, unless it is done.
        decoded: whether its images are decoded, if there is a decoder.
        group: its index in GROUPS, modulo the number of the machine's groups.
        texts: how many texts are encoded first, if there is an encoder of texts.
        uploads: how many uploads are encoded first, if there is an encoder.
        checked: whether its images are checked, if there is a check.
        values: of its answer.
    """

    at: float
    images: Images
    within: float = inf
    hurry: float = inf
    leaves: float = inf
    decoded: bool = True
    group: int = 0
    texts: int = 0
    uploads: int = 0
    checked: bool = True
    values: tuple[int, int] | None = None


@dataclass(eq=False)
class Ticket:
    """A job that has arrived, and its history.

    Attributes:
        ran: for each image, the pass number and the branch of each of its forward rows.
        to_encode: the texts that wait for the encoder, 0 and up, and the uploads, −1 and down.
        undecoded: the images that wait for decoding.
        unchecked: the images that wait for their check.
        unanswered: the images that wait to be encoded for the answer, and None for the whole.
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
    to_encode: set[int] = field(default_factory=set)
    undecoded: set[int] = field(default_factory=set)
    unchecked: set[int] = field(default_factory=set)
    unanswered: set[int | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.tables = [lines_of(image) for image in self.arrival.images]
        self.ran = [[] for _ in self.tables]

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
        return sum(map(sum, self.tables))

    @property
    def left(self) -> int:
        """The number of forward rows left."""
        return self.size - sum(map(len, self.ran))

    @property
    def due(self) -> int:
        """The number of forward rows that could run now."""
        return 0 if self.to_encode else sum(map(_due, self.tables, self.ran))

    @property
    def unfinished(self) -> list[int]:
        """The images with forward rows left."""
        return [i for i, (table, ran) in enumerate(zip(self.tables, self.ran, strict=True)) if len(ran) < sum(table)]


def _due(table: tuple[int, ...], ran: Sequence[object]) -> int:
    n = len(ran)
    for forwards in table:
        if n < forwards:
            return forwards - n
        n -= forwards
    return 0


@dataclass(frozen=True)
class Pass:
    """A pass: the ticket, the image and the branch of each forward row.

    Attributes:
        due: the number of forward rows of its group that could have run.
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
class Done:
    """A piece of a stage's work, or a batch: the ticket of each, and its image, its text or its upload.

    None stands for a whole answer.
    """

    began: float
    ended: float
    images: list[tuple[Ticket, int | None]]


class Worker:
    """A stage: it works on one piece or batch after the other, the earliest promise first."""

    def __init__(self, line: "Line", stage: Stage, times: Iterable[float]) -> None:
        self.line = line
        self.stage = stage
        self.batches: list[Done] = []
        self.works = False
        self._times = cycle(times)
        self._waiting: list[tuple[float, float, float, Ticket, int | None]] = []  # in this order

    def put(self, ticket: Ticket, image: int | None) -> None:
        heappush(self._waiting, (ticket.promise, ticket.job.number, inf if image is None else image, ticket, image))

    def begin(self) -> float | None:
        """Start the next piece, if there is one. Returns the time of its end."""
        if self.works:
            return None
        line, machine = self.line, self.line.machine
        self._waiting = sorted(one for one in self._waiting if one[3].present)
        ready = [one for one in self._waiting if not must_wait(line.scheduler.by_promise, self.stage, one[3].job)]
        if not ready:
            return None
        first = ready[0][3].job.group
        most = machine.decode[first].width if self.stage == "decode" else 1
        batch = [*takewhile(lambda one: one[3].job.group == first, ready)][:most]
        for one in batch:
            self._waiting.remove(one)
        *_, ticket, image = batch[0]
        if self.stage != "answer":
            costs = self._costs(first, image)
            seconds, speed = costs.ceilings[len(batch)], costs.speed
        else:
            assert ticket.arrival.values is not None
            seconds, speed = machine.answer.seconds(ticket.arrival.values[image is None]), 1.0
        line.scheduler.began(self.stage, seconds, [one[3].job for one in batch])
        self.works = True
        ended = line.now + next(self._times) * seconds * speed
        self.batches.append(Done(line.now, ended, [(ticket, image) for *_, ticket, image in batch]))
        return ended

    def _costs(self, group: Group, piece: int | None) -> Costs:
        machine = self.line.machine
        if self.stage == "encode" and piece is not None and piece >= 0:
            assert machine.text is not None
            return machine.text
        return {"encode": machine.encode, "decode": machine.decode, "check": machine.check}[self.stage][group]

    def end(self) -> None:
        """End the piece."""
        self.works = False
        self.line.scheduler.ended(self.stage)
        for ticket, image in self.batches[-1].images:
            if ticket.present:
                self.line.has_done(self.stage, ticket, image)


class Line:
    """A scheduler, its clock, and a record of all arrivals and passes.

    Args:
        machine: what work costs.
        max_started: the scheduler's, of each group.
        times: durations of passes, repeated in turn, as multiples of the duration expected now.
        promises: whether jobs get promises.
        follows: whether costs follow the measured passes.
        decode_times: the same for batches of decoding, and for the pieces of the other stages.
    """

    def __init__(
        self,
        machine: Machine,
        max_started: int = 1000,
        times: Iterable[float] = (1.0,),
        promises: bool = True,
        follows: bool = False,
        decode_times: Iterable[float] = (1.0,),
        scheduler: type[Scheduler] = Scheduler,
    ) -> None:
        self.machine = machine
        self.scheduler = scheduler(machine, dict.fromkeys(machine.passes, max_started))
        self.now = 0.0
        self.tickets: list[Ticket] = []
        self.passes: list[Pass] = []
        self.finished: list[tuple[Ticket, int]] = []  # images
        self._times = cycle(times)
        self._promises = promises
        self._follows = follows
        self._of: dict[Job, Ticket] = {}
        self._began: tuple[Batch, float] | None = None
        decode_times = list(decode_times)
        self.encoder = Worker(self, "encode", decode_times)
        self.decoder = Worker(self, "decode", decode_times)
        self.checker = Worker(self, "check", decode_times)
        self.answerer = Worker(self, "answer", decode_times)
        self.workers = (self.encoder, self.decoder, self.checker, self.answerer)

    @property
    def costs(self) -> Costs:
        """Of passes of the first group."""
        return self.machine.passes[ONE]

    @property
    def present(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.present]

    @property
    def images(self) -> list[tuple[Ticket, int]]:
        """Images in line that have steps left, or take their last one in the current pass."""
        last = len(self.passes) if self._began is not None and self._began[0] else inf
        return [
            (ticket, index)
            for ticket in self.present
            for index, ran in enumerate(ticket.ran)
            if index in ticket.unfinished or (ran and ran[-1][0] == last)
        ]

    def came(self, arrival: Arrival) -> Ticket:
        """A job arrives now."""
        group = list(self.machine.passes)[arrival.group % len(self.machine.passes)]
        texts = 0 if self.machine.text is None else arrival.texts
        uploads = arrival.uploads if self.machine.encode else 0
        decoded = bool(self.machine.decode) and arrival.decoded
        checked = bool(self.machine.check) and arrival.checked
        stages = StageWork(texts, uploads, decoded, checked, arrival.values)
        job = Job(group, map(lines_of, arrival.images), self.machine, stages)
        latest = self.now + arrival.within
        if arrival.hurry < inf:
            earliest = earliest_promise(job, self.scheduler, self.now, self.now)
            latest = min(latest, earliest + (arrival.hurry - 1) * (earliest - self.now))
        promise = earliest_promise(job, self.scheduler, self.now, latest) if self._promises else inf
        ticket = Ticket(arrival, job, self.now, latest, promise, False)
        self.tickets.append(ticket)
        assert promise < inf or not self._promises
        if promise > latest:
            return ticket
        ticket.present = True
        ticket.to_encode = {*range(-uploads, texts)}
        ticket.undecoded = set(range(len(arrival.images))) if decoded else set()
        ticket.unchecked = set(range(len(arrival.images))) if checked else set()
        if arrival.values is not None:
            ticket.unanswered = {*range(len(arrival.images)), None}
        self._of[job] = ticket
        self.scheduler.add(job, promise)
        for piece in ticket.to_encode:
            self.encoder.put(ticket, piece)
        if not ticket.to_encode:
            self._without_steps(ticket)
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
            costs = batch[0][0].job.costs
            seconds = next(self._times) * costs.ceilings[len(batch)] * costs.speed
            rows = [(self._of[row.job], row.index, branch) for row, branch in batch]
            jobs = sum(ticket.left > 0 for ticket in tickets)
            due = sum(ticket.due for ticket in tickets if ticket.job.costs is costs)
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
            batch[0][0].job.costs.follow(len(batch), self.now - began)
        for row in finished:
            ticket = self._of[row.job]
            self.finished.append((ticket, row.index))
            self._stepped(ticket, row.index)
        return finished

    def _without_steps(self, ticket: Ticket) -> None:
        """The images of a job that take no steps go to the stages."""
        for index, table in enumerate(ticket.tables):
            if not table:
                self._stepped(ticket, index)

    def _stepped(self, ticket: Ticket, index: int) -> None:
        if index in ticket.undecoded:
            self.decoder.put(ticket, index)
        else:
            self._made(ticket, index)
        self._leave_if_done(ticket)

    def _made(self, ticket: Ticket, index: int) -> None:
        """An image is finished."""
        if index in ticket.unchecked:
            self.checker.put(ticket, index)
        elif ticket.unanswered:
            self.answerer.put(ticket, index)

    def has_done(self, stage: Stage, ticket: Ticket, image: int | None) -> None:
        """A stage has done a piece of a job that is in line."""
        if stage == "encode":
            assert image is not None
            ticket.to_encode.remove(image)
            (self.scheduler.upload_encoded if image < 0 else self.scheduler.text_encoded)(ticket.job)
            if not ticket.to_encode:
                self._without_steps(ticket)
        elif stage == "decode":
            assert image is not None
            ticket.undecoded.remove(image)
            self.scheduler.decoded(ticket.job)
            self._made(ticket, image)
        elif stage == "check":
            assert image is not None
            ticket.unchecked.remove(image)
            self.scheduler.checked(ticket.job)
            self._made(ticket, image)
        else:
            ticket.unanswered.remove(image)
            self.scheduler.answered(ticket.job)
            if ticket.unanswered == {None}:
                self.answerer.put(ticket, None)
        self._leave_if_done(ticket)

    def _leave_if_done(self, ticket: Ticket) -> None:
        last = len(self.passes) if self._began is not None and self._began[0] else inf
        in_last_pass = any(ran and ran[-1][0] == last for ran in ticket.ran)
        in_stages = ticket.to_encode or ticket.undecoded or ticket.unchecked or ticket.unanswered
        if not (ticket.left or in_last_pass or in_stages):
            ticket.done, ticket.present = self.now, False

    def begin_batch(self) -> float | None:
        """Start the decoder's next batch, if possible. Returns the time of its end."""
        return self.decoder.begin()

    def end_batch(self) -> None:
        """End the decoder's batch."""
        self.decoder.end()

    @property
    def batches(self) -> list[Done]:
        """The decoder's."""
        return self.decoder.batches

    def moments(self, arrivals: Iterable[Arrival]) -> Iterator[None]:
        """Play all arrivals until nothing is left. Yields after each event."""
        number = count()
        events: list[tuple[float, int, Arrival | Ticket | Worker]] = [(a.at, next(number), a) for a in arrivals]
        heapify(events)

        def work() -> None:
            for worker in self.workers:
                if (until := worker.begin()) is not None:
                    heappush(events, (until, next(number), worker))

        def happen(until: float) -> Iterator[None]:
            while events and events[0][0] <= until:
                at, _, event = heappop(events)
                self.now = max(self.now, at)
                if isinstance(event, Worker):
                    event.end()
                    work()
                elif isinstance(event, Ticket):
                    self.left(event)
                    work()
                else:
                    ticket = self.came(event)
                    work()
                    if ticket.present and event.leaves < inf:
                        heappush(events, (self.now + event.leaves, next(number), ticket))
                yield

        while True:
            work()
            yield from happen(self.now)
            batch = self.begin()
            yield
            if batch:
                yield from happen(self.passes[-1].ended)
            self.end()
            work()
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


def play_and_check_promises(line: Line, arrivals: Iterable[Arrival]) -> None:
    """Play all arrivals. Each job ends in one of three ways, and all that are done have kept their promises."""
    for ticket in line.play(arrivals):
        assert (ticket.done is not None) + ticket.refused + ticket.cancelled == 1
        if ticket.done is not None:
            assert ticket.done <= ticket.promise + SOON
            assert ticket.promise <= ticket.latest


def played(
    machine: Machine,
    arrivals: Sequence[Arrival],
    times: Sequence[float] = (1.0,),
    decode_times: Sequence[float] = (1.0,),
) -> Line:
    """A line after all arrivals have been played."""
    line = Line(machine, times=times, decode_times=decode_times)
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


@st.composite
def decoding_machines(draw: st.DrawFn) -> Machine:
    """One group, with a decoder."""
    return machine_of(draw(cost_tables), decode=draw(cost_tables))


class _Shown(Machine):
    """A machine that failing examples can show."""

    def __repr__(self) -> str:
        kinds = (self.passes, self.decode, self.encode, self.check)
        text = None if self.text is None else self.text.by_width
        return repr([text, *({group: costs.by_width for group, costs in kind.items()} for kind in kinds)])


@st.composite
def machines(draw: st.DrawFn, tables: st.SearchStrategy[dict[int, float]] = cost_tables) -> Machine:
    """One group to three. Each stage may be missing. Costs of a stage differ between the groups.

    Args:
        tables: seconds of passes.
    """
    groups = GROUPS[: draw(st.integers(1, 3))]
    speeds = Speed(), Speed(), Speed(), Speed()
    has_decoder, has_encoder = draw(st.sampled_from(((False, False), (True, False), (True, True))))
    has_texts, has_check = draw(st.booleans()), draw(st.booleans())
    return _Shown(
        {group: Costs(draw(tables), speeds[0]) for group in groups},
        {group: Costs(draw(cost_tables), speeds[1]) for group in groups} if has_decoder else {},
        {group: Costs({1: draw(_pass_seconds)}, speeds[2]) for group in groups} if has_encoder else {},
        PerValue(draw(st.floats(0.001, 0.1)), draw(st.floats(0.001, 0.1))),
        Costs({1: draw(_pass_seconds)}, speeds[2]) if has_texts else None,
        {group: Costs({1: draw(_pass_seconds)}, speeds[3]) for group in groups} if has_check else {},
    )


any_images: st.SearchStrategy[Images] = st.one_of(
    st.lists(st.tuples(st.integers(1, 12), st.sampled_from((1, 2))), min_size=1, max_size=12).map(tuple),
    st.builds(alike, st.integers(1, 12), st.integers(1, 12), st.sampled_from((1, 2))),
    st.just(((1, 1),)),
)


@st.composite
def _guided_in_part(draw: st.DrawFn) -> Image:
    steps = draw(st.integers(1, 12))
    first, last = sorted((draw(st.integers(0, steps)), draw(st.integers(0, steps))))
    return steps, draw(st.integers(1, 3)), first, last


varied_images: st.SearchStrategy[Images] = st.one_of(
    any_images,
    st.lists(_guided_in_part(), min_size=1, max_size=6).map(tuple),
    st.builds(lambda image, images: (image,) * images, _guided_in_part(), st.integers(1, 12)),
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
    stages: bool = False,
) -> list[Arrival]:
    """Jobs in bursts and alone. Some are in a hurry, some leave, and some may not be decoded.

    Args:
        stages: of all groups, with texts, uploads, checks and answers, and jobs without steps.
    """
    at, arrivals = 0.0, []
    for _ in range(draw(st.integers(1, max_size))):
        at += draw(st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(0.0, 20.0)))
        hurry = draw(st.sampled_from((inf, inf, 1.0, 1.0, 1.0, 1.1, 1.5, 3.0, 0.9))) if deadlines else inf
        leaves = draw(st.one_of(st.just(inf), st.just(inf), st.floats(0.0, 20.0)))
        arrival = Arrival(at, draw(images), hurry=hurry, leaves=leaves, decoded=not (latents and draw(st.booleans())))
        if stages:
            values = draw(st.one_of(st.none(), st.tuples(st.integers(0, 20), st.integers(0, LARGEST))))
            no_steps = ((0, 1),) * draw(st.integers(1, 3))
            arrival = replace(
                arrival,
                images=draw(st.sampled_from((arrival.images,) * 5 + (no_steps,))),
                group=draw(st.integers(0, 2)),
                texts=draw(st.integers(0, 3)),
                uploads=draw(st.integers(0, 2)),
                checked=draw(st.booleans()),
                values=values,
            )
        arrivals.append(arrival)
    return arrivals
