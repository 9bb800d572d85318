"""Counts of the work in the queue, and its seconds. Pure Python."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from model.rows import Group
from service.engine.costs import Machine
from service.engine.jobs import Job


class Outstanding:
    """The work that is accepted and not done, by group.

    Args:
        machine: what work costs.

    Attributes:
        forwards: forward rows still to run, without those of the present pass.
        runnable: the forward rows of jobs that may run.
        images: rows still to be decoded.
        uploads: uploads still to be encoded.
        texts: texts still to be encoded, of all groups.
        decoding: the rows of `images` that have ended their last step.
        unchecked: images still to be checked.
        checking: the images of `unchecked` that are finished.
        pieces, values: pieces of answers still to be encoded, and their values.
        ready_pieces, ready_values: the pieces that can be encoded now, and their values.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        # All groups from the start: metrics read without the lock, and a group that comes later would disturb them.
        self.forwards: Counter[Group] = Counter(dict.fromkeys(machine.passes, 0))
        self.images = self.forwards.copy()
        self.uploads = self.forwards.copy()
        self.decoding = self.forwards.copy()
        self.unchecked = self.forwards.copy()
        self.checking = self.forwards.copy()
        self.texts = self.runnable = self.pieces = self.values = self.ready_pieces = self.ready_values = 0

    def add(self, job: Job, sign: int = 1) -> None:
        """Count what is left of a job; with the sign −1, count it no longer."""
        self.forwards[job.group] += sign * job.left
        self.images[job.group] += sign * job.undecoded
        self.uploads[job.group] += sign * job.uploads
        self.texts += sign * job.texts
        self.runnable += 0 if job.waits else sign * job.left
        self.pieces += sign * job.unanswered
        self.values += sign * job.unanswered_values
        self.decoding[job.group] += sign * job.decoding
        self.unchecked[job.group] += sign * job.unchecked
        self.checking[job.group] += sign * job.checking
        pieces, values = job.ready
        self.ready_pieces += sign * pieces
        self.ready_values += sign * values

    @contextmanager
    def changing(self, job: Job) -> Iterator[None]:
        """Count a job anew after something of it was done."""
        self.add(job, -1)
        yield
        self.add(job)

    def ran(self, job: Job, forwards: int) -> None:
        """Count forward rows of a job as run."""
        self.forwards[job.group] -= forwards
        self.runnable -= forwards

    @property
    def encode_s(self) -> float:
        """Seconds to encode all texts and uploads, at speed 1."""
        machine = self._machine
        uploads_s = sum(n * machine.encode[group].ceilings[1] for group, n in self.uploads.items() if n)
        return uploads_s if machine.text is None else uploads_s + self.texts * machine.text.ceilings[1]

    @property
    def check_s(self) -> float:
        """Seconds of all checks, at speed 1."""
        return sum(n * self._machine.check[group].ceilings[1] for group, n in self.unchecked.items() if n)

    @property
    def answer_s(self) -> float:
        """Seconds of all pieces of answers."""
        return self._machine.answer.seconds(self.values, self.pieces)

    @property
    def seconds(self) -> float:
        """The expected seconds of all work: passes, and each stage."""
        machine = self._machine
        passes_s = sum(n * machine.passes[group].seconds_per_row for group, n in self.forwards.items())
        decode_s = sum(n * machine.decode[group].seconds_per_row for group, n in self.images.items() if n)
        encode_s = sum(n * machine.encode[group].seconds_per_row for group, n in self.uploads.items() if n)
        texts_s = 0.0 if machine.text is None else self.texts * machine.text.seconds_per_row
        check_s = sum(n * machine.check[group].seconds_per_row for group, n in self.unchecked.items() if n)
        return passes_s + decode_s + encode_s + texts_s + check_s + self.answer_s


class Busy:
    """The piece of work that each stage has under way."""

    def __init__(self) -> None:
        self._now: dict[str, tuple[float, frozenset[Job]]] = {}

    def began(self, stage: str, seconds: float, jobs: frozenset[Job]) -> None:
        """Note that a stage begins a piece or a batch of these jobs. `seconds` are at speed 1."""
        self._now[stage] = seconds, jobs

    def ended(self, stage: str) -> None:
        self._now.pop(stage, None)

    def left(self, job: Job) -> None:
        """A job has left the queue. What it has under way goes on."""
        for stage, (seconds, jobs) in self._now.items():
            if job in jobs:
                self._now[stage] = seconds, jobs - {job}

    def orphan_s(self, stage: str) -> float:
        """The seconds of the piece that a stage has under way, if all of its jobs have left; else 0."""
        seconds, jobs = self._now.get(stage, (0.0, frozenset()))
        return 0.0 if jobs else seconds

    def other_s(self, stage: str, ahead: Sequence[Job]) -> float:
        """The seconds of the piece that a stage has under way, unless it belongs to one of these jobs."""
        seconds, jobs = self._now.get(stage, (0.0, frozenset()))
        return 0.0 if any(job in jobs for job in ahead) else seconds
