"""Jobs, as the scheduler sees them: the rows of a request, and what is left of their work. Pure Python.

A job's work is a chain of pieces: its upload is encoded; each row takes its steps in passes; each row is decoded; each
image is encoded for the answer, and then the answer as a whole. A job may lack any of these.
"""

from collections.abc import Iterable, Sequence
from math import inf
from typing import NamedTuple

from model.rows import Group
from service.engine.costs import Costs, Machine
from service.engine.waves import RowState, Wave

Batch = list[tuple[RowState, int]]  # the forward rows of a pass, each as row and branch


class StageWork(NamedTuple):
    """The work of a job outside of passes.

    Attributes:
        encoded: whether an upload is encoded before the rows can run.
        decoded: whether each row is decoded after its last step.
        values: how many values the answer encodes, for each image and for the whole; None if no answer is encoded.
    """

    encoded: bool = False
    decoded: bool = False
    values: tuple[int, int] | None = None


class Blocks(NamedTuple):
    """The most work that may be under way, of other jobs when a job reaches a stage, or of the job itself.

    In seconds at speed 1.

    Attributes:
        a_pass: a pass, when the job's upload is encoded and its rows may run.
        decode: a batch of decoding, when its rows have taken their steps.
        answer: a piece of an answer, when its images are finished.
    """

    a_pass: float = 0.0
    decode: float = 0.0
    answer: float = 0.0

    def at_least(self, answer: float) -> "Blocks":
        """The same blocks, with at least `answer` seconds for the answer."""
        return self if answer <= self.answer else self._replace(answer=answer)


class Rest(NamedTuple):
    """What is left of a job, as estimates see it.

    Attributes:
        costs: of its passes.
        left: forward rows.
        decode: the costs of decoding; None if its rows are not decoded.
        image_s, whole_s: seconds to encode an image for the answer, and the whole.
        waves: for each wave the number of rows, the forward rows of one step of all of them, and the forward rows left.
    """

    costs: Costs
    left: int
    decode: Costs | None
    image_s: float
    whole_s: float
    waves: list[tuple[int, int, float]]


class Job:
    """The rows of a request.

    Args:
        group: of its rows.
        rows: for each row, the forward rows of each line of its table. A row without lines takes no steps.
        machine: what work costs.
        stages: its work outside of passes.

    Attributes:
        costs: of passes of its group.
        rows: all rows of the job.
        encoding: whether its upload is still to be encoded. Until then, no row may run.
        unstepped: rows that have not ended their last step.
        undecoded: rows still to be decoded, with those that have steps left.
        unanswered: pieces of the answer still to be encoded: each image, and the whole.
        promise: the time by which the answer is ready.
        number: in the order of arrival; infinite before the job enters the queue.
        size: forward rows of the whole job.
        left: forward rows that are not chosen yet.
        steps: the most steps left of one row.
        work: the seconds of the forward rows left, in full passes at speed 1. The least work goes first.
        seconds: an upper bound for the passes of the job alone, at speed 1. Its waves run one after the other.
        encode_s, answer_s: seconds of these stages left, at speed 1.
        piece_s: the most seconds of one piece of the answer that is left.
        free_by: while the upload is still to be encoded, the time by which the rows can run.
        blocks: what may be under way of other jobs when this job gets to its next stages.
    """

    __slots__ = (
        "_machine",
        "_rest",
        "_shown",
        "_waves",
        "answer_s",
        "blocks",
        "costs",
        "encode_s",
        "encoding",
        "free_by",
        "group",
        "left",
        "number",
        "piece_s",
        "promise",
        "rows",
        "seconds",
        "size",
        "stages",
        "steps",
        "unanswered",
        "undecoded",
        "unstepped",
        "work",
    )

    def __init__(
        self, group: Group, rows: Iterable[tuple[int, ...]], machine: Machine, stages: StageWork | None = None
    ) -> None:
        self.group = group
        self.stages = StageWork() if stages is None else stages
        self.promise = self.number = self.free_by = inf
        self.rows: list[RowState] = []
        self.costs = costs = machine.passes[group]
        self._machine = machine
        self._rest: Rest | None = None
        tables = list(rows)
        most = max(max(forwards, default=1) for forwards in tables)
        together = max(1, costs.width // most)
        self._waves: list[Wave] = []
        for index, forwards in enumerate(tables):
            if index % together == 0:
                self._waves.append(Wave())
            self.rows.append(RowState(self, index, self._waves[-1], forwards))
            self._waves[-1].add(self.rows[-1])
        self.encoding = self.stages.encoded
        self.unstepped = sum(not row.stepped for row in self.rows)
        self.undecoded = len(self.rows) if self.stages.decoded else 0
        self.unanswered = 0 if self.stages.values is None else len(self.rows) + 1
        self.size = self.left = sum(wave.left for wave in self._waves)
        self._shown = 0.0
        self.blocks = Blocks()
        self.weigh()

    def on(self, machine: Machine) -> "Job":
        """The same job on another machine, before its first piece of work."""
        return Job(self.group, (row.forwards for row in self.rows), machine, self.stages)

    @property
    def is_done(self) -> bool:
        """Whether no work is left but that of the present pass."""
        return not (self.left or self.undecoded or self.unanswered or self.encoding)

    @property
    def kind(self) -> tuple[Group, int, StageWork]:
        """What equal jobs have in common. Of equal jobs, the first to come gets the earliest promise."""
        return self.group, self.size, self.stages

    @property
    def fraction(self) -> float:
        """The share of the job's seconds in all stages that is done, 0 … 1. It never falls."""
        if self.is_done:
            return 1.0
        machine, rows, row_s, image_s, upload_s = self._machine, len(self.rows), self.costs.row, 0.0, 0.0
        if self.stages.encoded:
            upload_s = machine.encode[self.group].ceilings[1]
        if self.stages.decoded:
            image_s = machine.decode[self.group].row
        pieces, values = (0, 0) if self.stages.values is None else (rows + 1, self._all_values)
        all_s = upload_s + self.size * row_s + rows * image_s + machine.answer.seconds(values, pieces)
        done_s = (self.size - self.left) * row_s
        done_s += machine.answer.seconds(values - self.unanswered_values, pieces - self.unanswered)
        done_s += (rows - self.undecoded) * image_s
        done_s += 0.0 if self.encoding else upload_s
        self._shown = max(self._shown, done_s / all_s)
        return self._shown

    @property
    def rest(self) -> Rest:
        """What is left of the job. The result is kept until the job changes, because each admission asks many jobs."""
        if self._rest is None:
            waves = [(len(wave.rows), wave.at_once, float(wave.left)) for wave in self._waves]
            decode = self._machine.decode[self.group] if self.undecoded else None
            image_s = whole_s = 0.0
            if self.stages.values is not None:
                image_s, whole_s = map(self._machine.answer.seconds, self.stages.values)
            self._rest = Rest(self.costs, self.left, decode, image_s, whole_s, waves)
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

    def encoded(self) -> None:
        """Note that the upload is encoded."""
        self.encoding, self.encode_s, self._rest = False, 0.0, None

    def decoded(self) -> None:
        """Note that a row is decoded."""
        self.undecoded -= 1
        self._rest = None

    def answered(self) -> None:
        """Note that a piece of the answer is encoded."""
        self.unanswered -= 1
        self._weigh_answer()

    @property
    def own_blocks(self) -> Blocks:
        """The most that may be under way of this job."""
        ceilings, width = self.costs.ceilings, self.costs.width
        decode = self._machine.decode[self.group] if self.undecoded else None
        return Blocks(
            ceilings[width] if self.left else 0.0,
            0.0 if decode is None else decode.ceilings[decode.width],
            self.piece_s,
        )

    def blocked(self, by: Blocks, is_ahead: bool) -> Blocks:
        """The job's blocks after another job has entered the queue.

        Args:
            by: the other job's `own_blocks`.
            is_ahead: whether this job goes before the other one.
        """
        a_pass, decode, answer = self.blocks
        runs = self.encoding or self.unstepped > 0
        if self.encoding and self.left:
            a_pass = max(a_pass, by.a_pass)
        if self.undecoded and runs:
            decode = max(decode, by.decode)
        if is_ahead and self.unanswered and (self.undecoded or runs):
            answer = max(answer, by.answer)
        return Blocks(a_pass, decode, answer)

    @property
    def decoding(self) -> int:
        """How many rows wait for their decoding now, or are being decoded."""
        return 0 if self.encoding else max(0, self.undecoded - self.unstepped)

    @property
    def ready(self) -> tuple[int, int]:
        """The pieces of the answer that wait to be encoded now, and their values."""
        if self.stages.values is None or not self.unanswered or self.encoding:
            return 0, 0
        of_image, of_whole = self.stages.values
        images = self.unanswered - 1 - max(self.unstepped, self.undecoded)
        return (images, images * of_image) if self.unanswered > 1 else (1, of_whole)

    @property
    def _all_values(self) -> int:
        of_image, of_whole = self.stages.values or (0, 0)
        return len(self.rows) * of_image + of_whole

    @property
    def unanswered_values(self) -> int:
        """The values that the answer still encodes."""
        if self.stages.values is None or not self.unanswered:
            return 0
        of_image, of_whole = self.stages.values
        return (self.unanswered - 1) * of_image + of_whole

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
        self._rest = None
        for wave in self._waves:
            wave.weigh(self.costs)
        self.encode_s = self._machine.encode[self.group].ceilings[1] if self.encoding else 0.0
        self._weigh_answer()
        self._add_up()

    def _weigh_answer(self) -> None:
        seconds, values = self._machine.answer.seconds, self.stages.values
        self.answer_s = self.piece_s = 0.0
        if values is not None and self.unanswered:
            of_image, of_whole = values
            self.answer_s = seconds(self.unanswered_values, self.unanswered)
            self.piece_s = seconds(max(of_image, of_whole) if self.unanswered > 1 else of_whole)

    def _add_up(self) -> None:
        if not all(wave.rows for wave in self._waves):
            self._waves = [wave for wave in self._waves if wave.rows]
        self.seconds = sum(wave.seconds for wave in self._waves)
        self.steps = max((row.steps_left for wave in self._waves for row in wave.rows), default=0)
        self.work = self.left * self.costs.row
