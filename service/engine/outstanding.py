"""Counts of the work in the queue, and its seconds. Pure Python."""

from collections import Counter

from service.engine.costs import Group, Machine
from service.engine.jobs import Job


class Outstanding:
    """The work that is accepted and not done, by group.

    Args:
        machine: what work costs.

    Attributes:
        forwards: forward rows still to run, without those of the present pass.
        runnable: those of jobs that may run: their uploads are encoded.
        images: rows still to be decoded.
        uploads: uploads still to be encoded.
        pieces, values: pieces of answers still to be encoded, and their values.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.forwards: Counter[Group] = Counter()
        self.images: Counter[Group] = Counter()
        self.uploads: Counter[Group] = Counter()
        self.runnable = self.pieces = self.values = 0

    def add(self, job: Job, sign: int = 1) -> None:
        """Count what is left of a job; with the sign −1, count it no longer."""
        self.forwards[job.group] += sign * job.left
        self.images[job.group] += sign * job.undecoded
        self.uploads[job.group] += sign * job.encoding
        self.runnable += 0 if job.encoding else sign * job.left
        self.pieces += sign * job.unanswered
        self.values += sign * job.unanswered_values

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
        return passes_s + decode_s + encode_s + self.answer_s


class Busy:
    """The piece of work that each stage has under way."""

    def __init__(self) -> None:
        self._now: dict[str, tuple[float, frozenset[Job]]] = {}

    def began(self, stage: str, seconds: float, jobs: frozenset[Job]) -> None:
        """A stage begins a piece or a batch of these jobs, of so many seconds at speed 1."""
        self._now[stage] = seconds, jobs

    def ended(self, stage: str) -> None:
        self._now.pop(stage, None)

    def seconds(self, stage: str) -> float:
        """The seconds of the piece under way; 0 if there is none."""
        return self._now[stage][0] if stage in self._now else 0.0

    def has(self, stage: str, job: Job) -> bool:
        """Whether the piece under way belongs to this job."""
        return stage in self._now and job in self._now[stage][1]
