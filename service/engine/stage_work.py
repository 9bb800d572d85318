"""What is left of a job in the stages beside passes. Pure Python."""

from math import inf
from typing import NamedTuple

from model.rows import Group
from service.engine.costs import Machine


class StageWork(NamedTuple):
    """The work of a job outside of passes.

    Attributes:
        texts: how many texts are encoded before the rows can run.
        uploads: how many uploaded images are encoded before the rows can run.
        decoded: whether each row is decoded after its last step.
        checked: whether each image is checked.
        values: how many values the answer encodes, for each image and for the whole; None if no answer is encoded.
    """

    texts: int = 0
    uploads: int = 0
    decoded: bool = False
    checked: bool = False
    values: tuple[int, int] | None = None


class Blocks(NamedTuple):
    """The most work that may be under way, of other jobs when a job reaches a stage, or of the job itself.

    In seconds at speed 1.

    Attributes:
        a_pass: a pass, when the job's texts and uploads are encoded and its rows may run.
        decode: a batch of decoding, when its rows have taken their steps.
        check: a check of an image, when its images are finished.
        answer: a piece of an answer, when its images are checked.
    """

    a_pass: float = 0.0
    decode: float = 0.0
    check: float = 0.0
    answer: float = 0.0

    def at_least(self, check: float, answer: float) -> "Blocks":
        """The same blocks, with at least so many seconds for a check and for a piece of an answer."""
        if check <= self.check and answer <= self.answer:
            return self
        return self._replace(check=max(check, self.check), answer=max(answer, self.answer))

    def followed(self, before: "Blocks", now: "Blocks") -> "Blocks":
        """The same blocks. Those that had room for the largest pieces `before` have room for the largest ones `now`."""
        pairs = zip(self, before, now, strict=True)
        return Blocks(*(max(own, after) if 0 < then <= own else own for own, then, after in pairs))

    def exceed(self, other: "Blocks") -> bool:
        """Whether any of these is longer than in the other blocks."""
        return (
            self.answer > other.answer
            or self.check > other.check
            or self.decode > other.decode
            or self.a_pass > other.a_pass
        )


def largest_pieces(machine: Machine) -> Blocks:
    """The largest pieces of work that a job of any group may have under way, as far as they are known."""
    return Blocks(
        max(costs.ceilings[costs.width] for costs in machine.passes.values()),
        max((costs.ceilings[costs.width] for costs in machine.decode.values()), default=0.0),
        max((costs.ceilings[1] for costs in machine.check.values()), default=0.0),
        machine.answer.seconds(machine.answer.largest),
    )


class Behind(NamedTuple):
    """Where a job's large pieces wait for jobs ahead that have no room for them.

    In each place, the jobs up to this promise go first. Without any, the promise is −∞.

    Attributes:
        a_pass: the job's passes wait until the rows of those jobs may run.
        decode, check, answer: the job's pieces wait until those jobs have no work left in the stage.
    """

    a_pass: float = -inf
    decode: float = -inf
    check: float = -inf
    answer: float = -inf


class Staged:
    """A job, as the stages see it.

    Args:
        group: of its rows.
        images: their number.
        unstepped: how many of them have steps to take.
        machine: what work costs.
        stages: its work outside of passes.

    Attributes:
        texts, uploads: how many texts and uploaded images are still to be encoded.
        encoding: whether anything is still to be encoded. Until then, no row may run.
        waits: whether the rows may not run yet, because of what is to be encoded here or in a job ahead.
        unstepped: rows that have not ended their last step.
        undecoded: rows still to be decoded, with those that have steps left.
        unchecked: images still to be checked, with those that are not finished.
        unanswered: pieces of the answer still to be encoded: each image, and the whole.
        encode_s, check_s, answer_s: seconds of these stages left, at speed 1.
        piece_s: the most seconds of one piece of the answer that is left.
        free_by: while the job `waits`, the time by which the rows can run.
        blocks: what may be under way of other jobs when this job gets to its next stages.
        behind: where pieces of this job wait for jobs ahead.
        done_by: the time by which a job is done whose pieces wait behind others in a stage; −∞ for any other job.
    """

    __slots__ = (
        "_images",
        "_machine",
        "answer_s",
        "behind",
        "blocks",
        "check_s",
        "done_by",
        "encode_s",
        "encoding",
        "free_by",
        "group",
        "piece_s",
        "stages",
        "texts",
        "unanswered",
        "unchecked",
        "undecoded",
        "unstepped",
        "uploads",
        "waits",
    )

    def __init__(self, group: Group, images: int, unstepped: int, machine: Machine, stages: StageWork) -> None:
        self.group = group
        self.stages = stages
        self.unstepped = unstepped
        self.free_by = inf
        self.blocks = Blocks()
        self.behind = Behind()
        self.done_by = -inf
        self._machine = machine
        self._images = images
        self.texts, self.uploads = stages.texts, stages.uploads
        self.undecoded = images if stages.decoded else 0
        self.unchecked = images if stages.checked else 0
        self.unanswered = 0 if stages.values is None else images + 1
        self.weigh_stages()

    # Of work that is done

    def text_encoded(self) -> None:
        """Note that one of the texts is encoded."""
        self.texts -= 1
        self._weigh_encoding()

    def upload_encoded(self) -> None:
        """Note that one of the uploads is encoded."""
        self.uploads -= 1
        self._weigh_encoding()

    def decoded(self) -> None:
        """Note that a row is decoded."""
        self.undecoded -= 1

    def checked(self) -> None:
        """Note that an image is checked."""
        self.unchecked -= 1
        self._weigh_checks()

    def answered(self) -> None:
        """Note that a piece of the answer is encoded."""
        self.unanswered -= 1
        self._weigh_answer()

    # What waits

    def wait_behind(self, behind: Behind) -> None:
        """Let pieces wait for jobs ahead."""
        self.behind = behind
        self.waits = self.encoding or behind.a_pass > -inf

    def let_run(self) -> None:
        """Let the passes wait for no other job."""
        self.wait_behind(self.behind._replace(a_pass=-inf))

    @property
    def is_staged(self) -> bool:
        """Whether stages have work left."""
        return bool(self.undecoded or self.unchecked or self.unanswered or self.encoding)

    @property
    def decoding(self) -> int:
        """How many rows wait for their decoding now, or are being decoded."""
        return 0 if self.encoding else max(0, self.undecoded - self.unstepped)

    @property
    def checking(self) -> int:
        """How many images wait for their check now, or are being checked."""
        return 0 if self.encoding else max(0, self.unchecked - max(self.unstepped, self.undecoded))

    @property
    def ready(self) -> tuple[int, int]:
        """The pieces of the answer that wait to be encoded now, and their values."""
        if self.stages.values is None or not self.unanswered or self.encoding:
            return 0, 0
        of_image, of_whole = self.stages.values
        images = self.unanswered - 1 - max(self.unstepped, self.undecoded, self.unchecked)
        return (images, images * of_image) if self.unanswered > 1 else (1, of_whole)

    @property
    def unanswered_values(self) -> int:
        """The values that the answer still encodes."""
        if self.stages.values is None or not self.unanswered:
            return 0
        of_image, of_whole = self.stages.values
        return (self.unanswered - 1) * of_image + of_whole

    # Seconds

    @property
    def a_check_s(self) -> float:
        """The seconds of one check at speed 1; 0 if none is left."""
        return self._machine.check[self.group].ceilings[1] if self.unchecked else 0.0

    @property
    def seconds_of_stages(self) -> tuple[float, float]:
        """The seconds at speed 1 of all work of the stages, and of what is done of it."""
        machine, group, n, stages = self._machine, self.group, self._images, self.stages
        seconds = machine.encode_s(group, stages.texts, stages.uploads)
        done = seconds - self.encode_s
        if stages.decoded:
            an_image = machine.decode[group].row
            seconds += n * an_image
            done += (n - self.undecoded) * an_image
        if stages.checked:
            a_check = machine.check[group].row
            seconds += n * a_check
            done += (n - self.unchecked) * a_check
        if stages.values is not None:
            of_image, of_whole = stages.values
            values = n * of_image + of_whole
            seconds += machine.answer.seconds(values, n + 1)
            done += machine.answer.seconds(values - self.unanswered_values, n + 1 - self.unanswered)
        return seconds, done

    def weigh_stages(self) -> None:
        """Compute the seconds of all stages again, with the machine's present costs."""
        self._weigh_encoding()
        self._weigh_checks()
        self._weigh_answer()

    def _weigh_encoding(self) -> None:
        self.encoding = self.uploads > 0 or self.texts > 0
        self.waits = self.encoding or self.behind.a_pass > -inf
        self.encode_s = self._machine.encode_s(self.group, self.texts, self.uploads) if self.encoding else 0.0

    def _weigh_checks(self) -> None:
        self.check_s = self.unchecked * self.a_check_s

    def _weigh_answer(self) -> None:
        seconds, values = self._machine.answer.seconds, self.stages.values
        self.answer_s = self.piece_s = 0.0
        if values is not None and self.unanswered:
            of_image, of_whole = values
            self.answer_s = seconds(self.unanswered_values, self.unanswered)
            self.piece_s = seconds(max(of_image, of_whole) if self.unanswered > 1 else of_whole)
