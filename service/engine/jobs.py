"""Jobs, as the scheduler sees them: the rows of a request, and what is left of their work. Pure Python.

A job's work is a chain of pieces: its texts and uploads are encoded; each row takes its steps in passes; each row is
decoded; each image is checked; each image is encoded for the answer, and then the answer as a whole. A job may lack any
of these.
"""

from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

from model.rows import Group, Row
from service.engine.costs import Costs, Machine
from service.engine.stage_work import Blocks, Staged, StageWork
from service.engine.waves import RowState, Wave

Batch = list[tuple[RowState, int]]  # the forward rows of a pass, each as row and branch


class Rest(NamedTuple):
    """What is left of a job, as estimates see it.

    Attributes:
        costs: of its passes.
        left: forward rows.
        decode: the costs of decoding; None if its rows are not decoded.
        check: the costs of checks; None if its images are not checked.
        image_s, whole_s: seconds to encode an image for the answer, and the whole.
        waves: for each wave the number of rows, the forward rows of one step of all of them, and the forward rows left.
    """

    costs: Costs
    left: int
    decode: Costs | None
    check: Costs | None
    image_s: float
    whole_s: float
    waves: list[tuple[int, int, float]]


class Job(Staged):
    """The rows of a request.

    Args:
        group: of its rows.
        rows: for each row, the forward rows of each line of its table. A row without lines takes no steps.
        machine: what work costs.
        stages: its work outside of passes.

    Attributes:
        costs: of passes of its group.
        rows: all rows of the job.
        promise: the time by which the answer is ready.
        number: in the order of arrival; infinite before the job enters the queue.
        size: forward rows of the whole job.
        left: forward rows that are not chosen yet.
        steps: the most steps left of one row.
        work: the seconds of the forward rows left, in full passes at speed 1. The least work goes first.
        seconds: an upper bound for the passes of the job alone, at speed 1. Its waves run one after the other.
    """

    __slots__ = (
        "_rest",
        "_shown",
        "_waves",
        "costs",
        "left",
        "number",
        "promise",
        "rows",
        "seconds",
        "size",
        "steps",
        "work",
    )

    def __init__(
        self, group: Group, rows: Iterable[tuple[int, ...]], machine: Machine, stages: StageWork | None = None
    ) -> None:
        tables = list(rows)
        unstepped = sum(bool(forwards) for forwards in tables)
        super().__init__(group, len(tables), unstepped, machine, StageWork() if stages is None else stages)
        self.promise = self.number = inf
        self.rows: list[RowState] = []
        self.costs = costs = machine.passes[group]
        self._rest: Rest | None = None
        most = max(max(forwards, default=1) for forwards in tables)
        together = max(1, costs.width // most)
        self._waves: list[Wave] = []
        for index, forwards in enumerate(tables):
            if index % together == 0:
                self._waves.append(Wave())
            self.rows.append(RowState(self, index, self._waves[-1], forwards))
            self._waves[-1].add(self.rows[-1])
        self.size = self.left = sum(wave.left for wave in self._waves)
        self._shown = 0.0
        self._weigh_passes()

    def on(self, machine: Machine) -> "Job":
        """The same job on another machine, before its first piece of work."""
        return Job(self.group, (row.forwards for row in self.rows), machine, self.stages)

    @property
    def is_done(self) -> bool:
        """Whether no work is left but that of the present pass."""
        return not (self.left or self.is_staged)

    @property
    def kind(self) -> tuple[Group, int, StageWork]:
        """What equal jobs have in common. Of equal jobs, the first to come gets the earliest promise."""
        return self.group, self.size, self.stages

    @property
    def fraction(self) -> float:
        """The share of the job's seconds in all stages that is done, 0 … 1. It never falls."""
        if self.is_done:
            return 1.0
        row_s, (all_s, done_s) = self.costs.row, self.seconds_of_stages
        self._shown = max(self._shown, (done_s + (self.size - self.left) * row_s) / (all_s + self.size * row_s))
        return self._shown

    @property
    def rest(self) -> Rest:
        """What is left of the job. The result is kept until the job changes, because each admission asks many jobs."""
        if self._rest is None:
            waves = [(len(wave.rows), wave.at_once, float(wave.left)) for wave in self._waves]
            decode = self._machine.decode[self.group] if self.undecoded else None
            check = self._machine.check[self.group] if self.unchecked else None
            image_s = whole_s = 0.0
            if self.stages.values is not None:
                image_s, whole_s = map(self._machine.answer.seconds, self.stages.values)
            self._rest = Rest(self.costs, self.left, decode, check, image_s, whole_s, waves)
        return self._rest

    def behind_first(self) -> Iterable[RowState]:
        """Rows with steps left, wave after wave. In a wave, the rows furthest behind go first."""
        for wave in self._waves:
            yield from sorted(wave.rows, key=lambda row: -row.steps_left)

    def furthest_behind(self) -> list[RowState]:
        """The rows of the first wave with the most steps left."""
        rows = self._waves[0].rows
        most = max(row.steps_left for row in rows)
        return [row for row in rows if row.steps_left == most]

    def end(self, row: RowState) -> None:
        """Note that the pass with a row's last step has ended."""
        row.stepped = True
        self.unstepped -= 1

    def decoded(self) -> None:
        super().decoded()
        self._rest = None

    @property
    def own_blocks(self) -> Blocks:
        """The most that may be under way of this job."""
        ceilings, width = self.costs.ceilings, self.costs.width
        decode = self._machine.decode[self.group] if self.undecoded else None
        return Blocks(
            ceilings[width] if self.left else 0.0,
            0.0 if decode is None else decode.ceilings[decode.width],
            self.a_check_s,
            self.piece_s,
        )

    def blocked(self, by: Blocks, is_ahead: bool) -> Blocks:
        """The job's blocks after another job has entered the queue.

        Args:
            by: the other job's `own_blocks`.
            is_ahead: whether this job goes before the other one.
        """
        a_pass, decode, check, answer = self.blocks
        runs = self.encoding or self.unstepped > 0
        if self.waits and self.left:
            a_pass = max(a_pass, by.a_pass)
        if self.undecoded and runs:
            decode = max(decode, by.decode)
        if is_ahead and self.unchecked and (self.undecoded or runs):
            check = max(check, by.check)
        if is_ahead and self.unanswered and (self.unchecked or self.undecoded or runs):
            answer = max(answer, by.answer)
        return Blocks(a_pass, decode, check, answer)

    def count(self, rows: Sequence[RowState]) -> None:
        """Count a forward row of each of these rows as chosen. A row may appear twice, for two forward rows."""
        self._rest = None
        self.left -= len(rows)
        waves: dict[Wave, None] = {}
        for row in rows:
            row.wave.count(row)
            waves[row.wave] = None
        for wave in waves:
            wave.weigh(self.costs)
        self._add_up()

    def weigh(self) -> None:
        """Compute all seconds again, with the machine's present costs."""
        self.weigh_stages()
        self._weigh_passes()

    def _weigh_passes(self) -> None:
        self._rest = None
        for wave in self._waves:
            wave.weigh(self.costs)
        self._add_up()

    def _add_up(self) -> None:
        if not all(wave.rows for wave in self._waves):
            self._waves = [wave for wave in self._waves if wave.rows]
        self.seconds = sum(wave.seconds for wave in self._waves)
        self.steps = max((row.steps_left for wave in self._waves for row in wave.rows), default=0)
        self.work = self.left * self.costs.row


def job_of(rows: Sequence[Row], machine: Machine, values: tuple[int, int] | None, texts: int, uploads: int) -> Job:
    """The job of a client's request.

    Args:
        rows: of one group. Either all of them become images or none.
        values: see service.engine.requests.Encoding; None if no answer is encoded.
        texts: how many texts are encoded first.
        uploads: how many uploads are encoded first.
    """
    row = rows[0]
    is_image = row.is_decoded if machine.decode else not row.model_output
    work = StageWork(texts, uploads, bool(machine.decode) and is_image, bool(machine.check) and is_image, values)
    return Job(row.group, [row.forwards for row in rows], machine, work)


def probe_of(row: Row, machine: Machine) -> Job:
    """The job of the engine's own probe. Its image is not checked, and there is no answer."""
    work = StageWork(texts=len(row.texts), decoded=bool(machine.decode) and row.is_decoded)
    return Job(row.group, [row.forwards], machine, work)
