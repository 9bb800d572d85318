"""An engine with fake runners, a fake clock, and perhaps fake VAEs, a fake text encoder and a fake check, for tests.

All of them, and encodings, can stop inside a call, so that a test decides what happens meanwhile. Nothing here sleeps.
"""

import itertools
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pytest

from model.lines import Column
from model.rows import Condition, Context, Forward, Group, Image, Moments, Reading, Row, Text
from model.samplers import StepTable
from service.engine import trials, warm_up
from service.engine.costs import Machine
from service.engine.denoising import Phase
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.engine.requests import Accepted, Encoding, Finished, Progress, Upload, Watcher
from service.engine.scheduler import Scheduler
from service.engine.stage import Name
from service.errors import ComputationFailed, Failed
from tests.servers import eventually

PATIENCE = 60.0  # seconds; longer than anything takes, so that a hang fails
LONG = 1e9  # seconds of the fake clock
ENDLESS = 10**6  # steps
GROUP = Group(1, 2)  # the size of FakeRunner's images, which is the default
OTHER = Group(3, 4)
PROBE_SEED = 0
PROBE_SEEDS = PROBE_SEED, 1000  # of both groups
PROBE = [(PROBE_SEED, 0)]  # its pass
PROBE_TOKEN = 0  # of its text
WARM_UP_PASSES = 4  # for each width; those of the probe count

T = TypeVar("T")


class FakeClock:
    """Moves only when told."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Thread-safe."""
        with self._lock:
            self.now += seconds


class Gate(Generic[T]):
    """Blocks threads that enter while it is closed.

    Attributes:
        entered: everything that has entered, blocked or not.
    """

    def __init__(self) -> None:
        self.entered: list[T] = []
        self._changed = threading.Condition()
        self._closed = False
        self._seen = 0  # entries that the test has seen
        self._let_through = 0  # entries that may pass while the gate is closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._seen = self._let_through = len(self.entered)

    def open(self) -> None:
        with self._changed:
            self._closed = False
            self._changed.notify_all()

    def next(self) -> T:
        """Let the blocked entry pass, wait for the next entry, and return it."""
        with self._changed:
            self._let_through = self._seen
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: len(self.entered) > self._seen, PATIENCE), "nothing has come"
            self._seen += 1
            return self.entered[self._seen - 1]

    def enter(self, what: T) -> bool:
        """Return False if the entry was blocked and then abandoned."""
        with self._changed:
            self.entered.append(what)
            number = len(self.entered)
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._closed or number <= self._let_through, PATIENCE)


class Held(Generic[T]):
    """Calls that a test can hold inside.

    Args:
        gate: of another fake, which then shares its record of calls.

    Attributes:
        calls: the started calls.
    """

    def __init__(self, gate: Gate[T] | None = None) -> None:
        self._gate: Gate[T] = Gate() if gate is None else gate
        self.calls = self._gate.entered

    def hold(self) -> None:
        """From now on each call stops inside until next_call or let_go."""
        self._gate.close()

    def next_call(self) -> T:
        """Let the held call end, wait for the next one, and return it."""
        return self._gate.next()

    def let_go(self) -> None:
        """Stop holding calls."""
        self._gate.open()


@dataclass
class FakeRow:
    row: Row
    steps: int = 0
    forwards: int = 0  # in the current step


class FakeRunner:
    """Counts steps instead of making images. Records calls that break the Runner protocol.

    The image of a row is [seed, steps taken], with shape [1, 1, 2]. Its estimate of x_0 is [seed, -steps taken].

    Args:
        like: a runner of another group, which shares its clock and its record of passes.

    Attributes:
        widths: see model.rows.Runner.
        clock: each pass advances it by `seconds[width]`.
        passes: the forward rows of each started pass, as (seed, branch).
        rows: the rows in flight, by slot.
        admitted: seeds of all rows that were admitted.
        refused, breaking, poisoned: seeds of rows whose admission raises, whose passes raise, or whose image is NaN.
        unreadable, unreleased: seeds of rows whose reading or release raises.
        faults: number of next passes that raise, whatever their rows.
        complaints: calls that break the rules.
        during: is called inside each call, by the engine's thread, with its name: admit, pass, read or release.
    """

    def __init__(self, seconds: Mapping[int, float], like: "FakeRunner | None" = None) -> None:
        self.widths: Sequence[int] = list(seconds)
        self.clock: FakeClock = FakeClock() if like is None else like.clock
        self.seconds = dict(seconds)
        self._gate: Gate[list[tuple[int, int]]] = Gate() if like is None else like._gate
        self.passes = self._gate.entered
        self.rows: dict[int, FakeRow] = {}
        self.admitted: list[int] = []
        self.refused: set[int] = set()
        self.breaking: set[int] = set()
        self.poisoned: set[int] = set()
        self.unreadable: set[int] = set()
        self.unreleased: set[int] = set()
        self.faults = 0
        self.complaints: list[str] = []
        self.during: Callable[[str], None] = lambda call: None
        self._threads: set[int] = set()

    # For tests.

    def hold(self) -> None:
        """From now on each pass stops inside until next_pass or let_go."""
        self._gate.close()

    def next_pass(self) -> list[tuple[int, int]]:
        """Let the held pass end, wait for the next one, and return its forward rows."""
        return self._gate.next()

    def let_go(self) -> None:
        """Stop holding passes."""
        self._gate.open()

    # For the engine.

    def admit(self, row: Row) -> int:
        self._called("admit")
        if row.texts:
            self.complaints.append(f"seed {row.seed} came without its contexts")
        if row.seed in self.refused:
            raise RuntimeError("this row is refused")
        slot = next(slot for slot in itertools.count() if slot not in self.rows)
        self.rows[slot] = FakeRow(row)
        self.admitted.append(row.seed)
        return slot

    def step(self, forwards: Sequence[Forward]) -> None:
        if not 1 <= len(forwards) <= self.widths[-1] or len(set(forwards)) < len(forwards):
            self.complaints.append(f"a pass of {forwards}")
        seeds = [self.rows[forward.slot].row.seed for forward in forwards]
        if not self._gate.enter([(seed, forward.branch) for seed, forward in zip(seeds, forwards, strict=True)]):
            self.complaints.append("a held pass was forgotten")
        self._called("pass")
        self.clock.advance(self.seconds[next(width for width in self.widths if width >= len(forwards))])
        if self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of the device")
        if self.breaking & set(seeds):
            raise RuntimeError("this pass breaks")
        for forward in forwards:
            state = self.rows[forward.slot]
            turn = forward.branch == state.forwards and forward.line == state.steps
            if not turn or state.steps == len(state.row.table):
                self.complaints.append(f"{forward} of seed {state.row.seed} out of turn")
            state.forwards += 1
            if state.forwards == state.row.forwards[forward.line]:
                state.steps, state.forwards = state.steps + 1, 0

    def read(self, slot: int) -> Reading:
        self._called("read")
        state = self.rows[slot]
        if state.row.seed in self.unreadable:
            raise RuntimeError("this row cannot be read")
        value = math.nan if state.row.seed in self.poisoned else state.row.seed
        return Reading(*(np.array([[[value, steps]]], dtype=np.float32) for steps in (state.steps, -state.steps)))

    def release(self, slot: int) -> None:
        self._called("release")
        if (state := self.rows.pop(slot, None)) is None:
            self.complaints.append(f"slot {slot} was released twice")
        elif state.row.seed in self.unreleased:
            raise RuntimeError("this row cannot be released")

    def _called(self, call: str) -> None:
        self._threads.add(threading.get_ident())
        if len(self._threads) > 1:
            self.complaints.append("a second thread")
        try:
            self.during(call)
        except Exception as error:  # the engine must not mistake it for the runner's
            self.complaints.append(repr(error))


class Call(NamedTuple):
    """A call of the VAE: decode or encode, and the seeds of its rows."""

    name: str
    seeds: list[int]


class FakeVAE(Held[Call]):
    """A fake VAE: decoding adds a half to the steps, encoding subtracts it. Records calls that break the protocol.

    Args:
        like: the VAE of another group, which shares its record of calls.

    Attributes:
        widths: see model.rows.VAE.
        clock: each call advances it by `seconds[width]`; encoding counts as width 1.
        calls: the started calls.
        breaking, poisoned: seeds of images whose decoding raises, or which are NaN.
        faults: number of next calls that raise, whatever their images.
        forgetful: whether it returns one image too many.
        complaints: calls that break the rules.
        during: is called inside each call, by its thread, with its name: decode or encode.
    """

    def __init__(self, seconds: Mapping[int, float], clock: FakeClock, like: "FakeVAE | None" = None) -> None:
        super().__init__(None if like is None else like._gate)
        self.widths: Sequence[int] = list(seconds)
        self.clock = clock
        self.seconds = dict(seconds)
        self.breaking: set[int] = set()
        self.poisoned: set[int] = set()
        self.faults = 0
        self.forgetful = False
        self.complaints: list[str] = []
        self.during: Callable[[str], None] = lambda call: None
        self._at_work = {"decode": threading.Lock(), "encode": threading.Lock()}

    # For tests.

    def next_batch(self) -> list[int]:
        """The same for a call that must be decode. Returns the seeds."""
        name, seeds = self.next_call()
        assert name == "decode"
        return seeds

    # For the engine.

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        if not 1 <= len(latents) <= self.widths[-1]:
            self.complaints.append(f"a batch of {len(latents)}")
        return self._call("decode", latents, 0.5)

    def encode(self, image: Image) -> Moments:
        [latents] = self._call("encode", [image], -0.5)
        return Moments(latents, np.zeros_like(latents))

    def preview(self, latents: Image) -> Image:
        return latents

    def _call(self, name: str, images: Sequence[Image], more: float) -> list[Image]:
        if not self._at_work[name].acquire(blocking=False):
            self.complaints.append(f"two calls of {name} at once")
        try:
            seeds = [int(image.flat[0]) for image in images]
            if not self._gate.enter(Call(name, seeds)):
                self.complaints.append("a held call was forgotten")
            try:
                self.during(name)
            except Exception as error:  # the engine must not mistake it for the VAE's
                self.complaints.append(repr(error))
            self.clock.advance(self.seconds[next(width for width in self.widths if width >= len(images))])
            if self.faults:
                self.faults -= 1
                raise RuntimeError("a fault of the device")
            if self.breaking & set(seeds):
                raise RuntimeError("this batch breaks")
            images = [*images, images[0]] if self.forgetful else images
            seeds = [int(image.flat[0]) for image in images]
            made = np.array([0.0, more], np.float32)
            return [
                image + (math.nan if seed in self.poisoned else made) for image, seed in zip(images, seeds, strict=True)
            ]
        finally:
            self._at_work[name].release()


class FakeTextEncoder(Held[int]):
    """A fake text encoder: a context is filled with the first token. Records calls that break the protocol.

    Attributes:
        seconds: of a call, on the clock.
        calls: the first token of each started call.
        breaking, poisoned: tokens of texts whose encoding raises, or whose context is NaN.
        faults: number of next calls that raise, whatever their texts.
        complaints: calls that break the rules.
        during: is called inside each call, by its thread, with "text".
    """

    def __init__(self, seconds: float, clock: FakeClock) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock = clock
        self.breaking: set[int] = set()
        self.poisoned: set[int] = set()
        self.faults = 0
        self.complaints: list[str] = []
        self.during: Callable[[str], None] = lambda call: None
        self._at_work = threading.Lock()

    def encode(self, text: Text) -> Context:
        token = text.ids[0]
        if not self._at_work.acquire(blocking=False):
            self.complaints.append("two calls at once")
        try:
            if not self._gate.enter(token):
                self.complaints.append("a held call was forgotten")
            try:
                self.during("text")
            except Exception as error:  # the engine must not mistake it for the encoder's
                self.complaints.append(repr(error))
            self.clock.advance(self.seconds)
            if self.faults:
                self.faults -= 1
                raise RuntimeError("a fault of the device")
            if token in self.breaking:
                raise RuntimeError("this text breaks")
            return Context(np.full((3, 2), math.nan if token in self.poisoned else token, np.float32))
        finally:
            self._at_work.release()


class FakeCheck(Held[int]):
    """A fake check of images.

    Attributes:
        seconds: of a call, on the clock.
        calls: the seed of the image of each started call.
        refusing: seeds of images that are refused.
        failing, breaking: seeds of images for which a ServiceError is raised, or another error.
        during: is called inside each call, by its thread, with "check".
    """

    def __init__(self, seconds: float, clock: FakeClock) -> None:
        super().__init__()
        self.seconds = seconds
        self.clock = clock
        self.refusing: set[int] = set()
        self.failing: set[int] = set()
        self.breaking: set[int] = set()
        self.during: Callable[[str], None] = lambda call: None

    def __call__(self, image: Image) -> str | None:
        seed = int(image.flat[0])
        self._gate.enter(seed)
        self.during("check")
        self.clock.advance(self.seconds)
        if seed in self.failing:
            raise ComputationFailed("the check of an image failed")
        if seed in self.breaking:
            raise RuntimeError("this check breaks")
        return f"image {seed} is not nice" if seed in self.refusing else None


class FakeEncoding(Held[int]):
    """Encodes images as JSON, and the whole as a list of them. Implements service.engine.requests.Encoding.

    Attributes:
        values: as the engine is told.
        calls: the started calls: an image's index, or -1 for the whole.
        breaking: calls that raise.
        faults: number of next calls that raise, whatever they are.
        during: is called inside each call, by its thread.
    """

    def __init__(self, of_image: int = 1, of_whole: int = 0) -> None:
        super().__init__()
        self.values = of_image, of_whole
        self.breaking: set[int] = set()
        self.faults = 0
        self.during: Callable[[int], None] = lambda index: None

    def image(self, index: int, image: Image) -> bytes:
        self._call(index)
        return json.dumps(image.tolist()).encode()

    def whole(self, images: Sequence[Image], encoded: Sequence[bytes]) -> bytes:
        if self.values[1]:
            self._call(-1)
        if self.values[0]:
            return b"[" + b", ".join(encoded) + b"]"
        return json.dumps([image.tolist() for image in images]).encode()

    def _call(self, index: int) -> None:
        self._gate.enter(index)
        self.during(index)
        if self.faults:
            self.faults -= 1
            raise RuntimeError("a fault of the encoder")
        if index in self.breaking:
            raise RuntimeError("this cannot be encoded")


class Recorder:
    """An observer that records the engine's calls."""

    def __init__(self) -> None:
        self.told_of_pass = threading.Condition()
        self.batches: list[tuple[Name, int, float]] = []
        self.failed_batches: list[Name] = []
        self.phases: list[tuple[Phase, float]] = []
        self.passes: list[tuple[int, float]] = []
        self.failed_passes = 0
        self.accepted = 0
        self.refused: list[str] = []
        self.started: list[float] = []
        self.finished: list[tuple[Finished, bool, float, float]] = []
        self.ended: list[str | int] = []  # a reason, or the number of images
        self.encoded_texts: list[float] = []  # seconds
        self.known_texts = 0

    def phase_done(self, phase: Phase, seconds: float) -> None:
        self.phases.append((phase, seconds))

    def pass_done(self, rows: int, seconds: float) -> None:
        with self.told_of_pass:
            self.passes.append((rows, seconds))
            self.told_of_pass.notify_all()

    def pass_failed(self) -> None:
        with self.told_of_pass:
            self.failed_passes += 1
            self.told_of_pass.notify_all()

    def batch_done(self, stage: Name, pieces: int, seconds: float) -> None:
        with self.told_of_pass:
            self.batches.append((stage, pieces, seconds))
            self.told_of_pass.notify_all()

    def batch_failed(self, stage: Name) -> None:
        with self.told_of_pass:
            self.failed_batches.append(stage)
            self.told_of_pass.notify_all()

    def text_encoded(self, seconds: float) -> None:
        self.encoded_texts.append(seconds)

    def text_known(self) -> None:
        self.known_texts += 1

    @property
    def calls_of_vae(self) -> int:
        """How many have ended, if there is no text encoder."""
        ended = [*(stage for stage, _, _ in self.batches), *self.failed_batches]
        return ended.count("encode") + ended.count("decode")

    def batches_of(self, stage: Name) -> list[tuple[int, float]]:
        return [batch[1:] for batch in self.batches if batch[0] == stage]

    def request_accepted(self) -> None:
        self.accepted += 1

    def request_refused(self, reason: str) -> None:
        self.refused.append(reason)

    def request_started(self, queue_s: float) -> None:
        self.started.append(queue_s)

    def request_finished(self, finished: Finished, kept: bool, eta_s: float, taken_s: float) -> None:
        self.finished.append((finished, kept, eta_s, taken_s))
        self.ended.append(len(finished.images))

    def request_cancelled(self, reason: str) -> None:
        self.ended.append(reason)


class Diary:
    """Records the engine's calls in order. Implements service.engine.requests.Watcher."""

    def __init__(self, preview_every: int = 0) -> None:
        self.preview_every = preview_every
        self.entries: list[tuple[Any, ...]] = []
        self.told: list[Progress] = []
        self.future: Future[Finished] | None = None  # of the watched request
        self.was_done: list[bool] = []  # whether `future` was done, at each image
        self._changed = threading.Condition()

    def progress(self, progress: Progress) -> None:
        with self._changed:
            self.entries.append(("progress", progress.step, progress.steps))
            self.told.append(progress)
            self._changed.notify_all()

    def wait_for(self, is_it: Callable[[Progress], bool]) -> Progress:
        """Wait for such progress, and return it."""
        with self._changed:
            assert self._changed.wait_for(lambda: any(map(is_it, self.told)), PATIENCE), "such progress is not told"
            return next(filter(is_it, self.told))

    def preview(self, index: int, step: int, x0: Image) -> None:
        self.entries.append(("preview", index, step, x0.tolist()))

    def image(self, index: int, encoded: bytes) -> None:
        self.entries.append(("image", index, json.loads(encoded)))
        if self.future is not None:
            self.was_done.append(self.future.done())

    @property
    def etas(self) -> list[float]:
        return [progress.eta_s for progress in self.told]

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry[1:] for entry in self.entries if entry[0] == kind]


def a_row(seed: int, steps: int = 1, guided: bool = False, latent: bool = False, group: Group = GROUP) -> Row:
    table = StepTable(np.broadcast_to(np.int64(0), steps), np.broadcast_to(0.0, (steps, len(Column))))
    branches = (Condition(1), Condition()) if guided else (Condition(1),)
    return Row(table, seed, group, branches=branches, guidance_scale=2.0, latent=latent)


def a_text_row(seed: int, *tokens: int, steps: int = 1, latent: bool = False, group: Group = GROUP) -> Row:
    """A row with a branch for each of these texts, by their first tokens."""
    branches = tuple(Condition(text=a_text(token)) for token in tokens)
    return replace(a_row(seed, steps, latent=latent, group=group), branches=branches)


def a_text(token: int) -> Text:
    return Text((token, token + 1, token + 2))


def a_context(token: int) -> Context:
    return Context(np.full((3, 2), token, np.float32))


def a_start(seed: int, second: float, latent: bool = False) -> Row:
    """A row without steps."""
    return replace(a_row(seed, 0, latent=latent), start=pixels(seed, second))


def pixels(seed: float, second: float) -> Image:
    return np.array([[[seed, second]]], np.float32)


def an_image(seed: int, steps: float) -> list[list[list[float]]]:
    return [[[seed, steps]]]


def a_decoded(seed: int, steps: int) -> list[list[list[float]]]:
    return an_image(seed, steps + 0.5)


def an_estimate(seed: int, steps: int) -> list[list[list[float]]]:
    return an_image(seed, -steps)


def images_of(future: Future[Finished]) -> list[list[list[list[float]]]]:
    return [image.tolist() for image in future.result(PATIENCE).images]


def error_of(future: Future[Finished]) -> BaseException | None:
    return future.exception(PATIENCE)


def status_of(engine: Engine) -> str:
    return engine.status


def elsewhere(act: Callable[[], T]) -> T:
    """Call this on another thread, like clients, and wait for it."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(act())
        except Exception as error:
            done.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return done.result(PATIENCE)


class Setting(NamedTuple):
    """A warm engine and its parts."""

    engine: Engine
    runner: FakeRunner
    clock: FakeClock
    observer: Recorder
    places: Places
    decoder: FakeVAE | None = None
    text_encoder: FakeTextEncoder | None = None
    image_check: FakeCheck | None = None

    @property
    def fakes(self) -> "list[FakeVAE | FakeTextEncoder | FakeCheck]":
        """Those beside the runner."""
        return [fake for fake in (self.decoder, self.text_encoder, self.image_check) if fake is not None]

    @property
    def texts(self) -> FakeTextEncoder:
        assert self.text_encoder is not None
        return self.text_encoder

    @property
    def check(self) -> FakeCheck:
        assert self.image_check is not None
        return self.image_check

    @property
    def vae(self) -> FakeVAE:
        assert self.decoder is not None
        return self.decoder

    def accept(
        self,
        *rows: Row,
        timeout_s: float = LONG,
        client: str = "alice",
        watcher: Watcher | None = None,
        encoding: Encoding | None = None,
        upload: Upload | None = None,
    ) -> Accepted:
        """By default only watched requests have an encoding."""
        if watcher is not None and encoding is None:
            encoding = FakeEncoding()
        return self.engine.submit(rows, timeout_s, client, encoding, watcher, upload)

    def submit(
        self, *rows: Row, timeout_s: float = LONG, client: str = "alice", encoding: Encoding | None = None
    ) -> Future[Finished]:
        return self.accept(*rows, timeout_s=timeout_s, client=client, encoding=encoding).future

    def upload(self, seed: int, second: float, *rows: Row, **more: Any) -> Future[Finished]:
        """Ask for rows that start from an uploaded image's latents. Without rows, the latents are the answer."""
        return self.accept_upload(seed, second, *rows, **more).future

    def accept_upload(self, seed: int, second: float, *rows: Row, **more: Any) -> Accepted:
        draft = rows or (a_start(seed, 0, latent=True),)

        def then(latents: Sequence[Moments]) -> tuple[list[Row], Encoding | None]:
            return [replace(row, start=latents[0].mean) for row in draft], more.get("encoding")

        return self.accept(*draft, upload=Upload([pixels(seed, second)], then), **more)

    def keep_busy(self) -> None:
        """Hold the engine in a pass of the probe, so that requests submitted meanwhile arrive together."""
        self.runner.hold()
        self.engine.probe()
        assert self.runner.next_pass() == PROBE

    def settle(self) -> None:
        """Wait until all started passes have ended."""
        told, began = self.observer, len(self.runner.passes)
        with told.told_of_pass:
            over = told.told_of_pass.wait_for(lambda: len(told.passes) + told.failed_passes >= began, PATIENCE)
        assert over, "a pass does not end"

    def settle_decoding(self) -> None:
        """Wait until all started calls of the VAE have ended."""
        told, calls = self.observer, self.vae.calls
        with told.told_of_pass:
            over = told.told_of_pass.wait_for(lambda: told.calls_of_vae >= len(calls), PATIENCE)
        assert over, "a batch does not end"

    def wait_alive(self) -> None:
        """Wait until nothing is stuck. No callback says so, so this polls."""
        for _ in range(int(PATIENCE / 0.001)):
            if self.engine.alive:
                return
            threading.Event().wait(0.001)
        raise AssertionError("something is stuck")

    def take_all_steps(self) -> None:
        """Wait until no row has steps left, and all finished latents wait for decoding."""
        while self.line.outstanding:
            self.engine.probe().result(PATIENCE)
        self.engine.probe().result(PATIENCE)  # its pass began afterwards

    @property
    def line(self) -> Scheduler:
        assert self.engine.scheduler is not None
        return self.engine.scheduler

    @property
    def machine(self) -> Machine:
        return self.line.machine

    @property
    def counters(self) -> tuple[int, int, int]:
        """The numbers of running and waiting rows, and of forward rows left."""
        return self.line.running, self.line.waiting, self.line.outstanding

    @property
    def to_decode(self) -> tuple[int, int]:
        """The number of images to decode, and how many of them have taken all steps."""
        return self.line.work.images.total(), self.line.decoding

    @property
    def to_encode(self) -> tuple[int, int]:
        """The number of texts and uploads to encode, and of pieces of answers."""
        return self.line.work.texts + self.line.work.uploads.total(), self.line.work.pieces

    @property
    def to_check(self) -> tuple[int, int]:
        """The number of images to check, and how many of them are finished."""
        return self.line.work.unchecked.total(), self.line.work.checking.total()

    @property
    def in_flight(self) -> list[int]:
        """The seeds of rows that have a slot."""
        return sorted(state.row.seed for state in self.runner.rows.values())

    def is_empty(self) -> bool:
        """Whether no trace of a request is left."""
        counted = (*self.counters, *self.to_decode, *self.to_encode, *self.to_check, self.places.taken)
        return not any(counted) and not self.runner.rows and self.engine.wait_idle(0)


def a_setting(
    runner: FakeRunner,
    max_queue: int = 16,
    observer: Recorder | None = None,
    decode_seconds: Mapping[int, float] | None = None,
    other: FakeRunner | None = None,
    text_seconds: float | None = None,
    check_seconds: float | None = None,
) -> Setting:
    """An engine that has not started. `other` runs a second group.

    With `decode_seconds` it has a fake VAE, with `text_seconds` a fake text encoder, with `check_seconds` a fake check.
    """
    places, told, clock = Places(max_queue), observer or Recorder(), runner.clock
    runners = {GROUP: runner} if other is None else {GROUP: runner, OTHER: other}
    probes = {group: a_row(seed, group=group) for group, seed in zip(runners, PROBE_SEEDS, strict=False)}
    if text_seconds is not None:
        branch = Condition(text=a_text(PROBE_TOKEN), context=a_context(PROBE_TOKEN))
        probes = {group: replace(probe, branches=(branch,)) for group, probe in probes.items()}
    vae, vaes = None, None
    if decode_seconds is not None:
        vae = FakeVAE(decode_seconds, clock)
        vaes = {group: vae if group == GROUP else FakeVAE(decode_seconds, clock, like=vae) for group in runners}
    texts = None if text_seconds is None else FakeTextEncoder(text_seconds, clock)
    check = None if check_seconds is None else FakeCheck(check_seconds, clock)
    engine = Engine(runners, probes, places, told, clock, vaes=vaes, text_encoder=texts, check=check)
    return Setting(engine, runner, clock, told, places, vae, texts, check)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let warm-ups measure every width, though passes take seconds of a fake clock. Let no pass be a trial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm_up, "_AT_MOST", LONG)
        patch.setattr(trials, "SHARE", 0.0)
        yield


@contextmanager
def started(s: Setting) -> Iterator[Setting]:
    """Start the engine, and join its thread at the end. The records of the warm-up are cleared."""
    try:
        with undisturbed():
            s.engine.start()
            assert s.engine.wait_loaded(PATIENCE)
            s.runner.passes.clear()
            s.runner.admitted.clear()
            for fake in s.fakes:
                fake.calls.clear()
            yield s
    finally:
        s.runner.let_go()
        for fake in s.fakes:
            fake.let_go()
        s.engine.close()
    assert s.runner.complaints == []
    assert s.decoder is None or s.decoder.complaints == []
    assert s.text_encoder is None or s.text_encoder.complaints == []


@contextmanager
def warm(*widths: int, seconds: float = 1.0, max_queue: int = 16) -> Iterator[Setting]:
    """A warm engine whose passes take the same time at all these widths."""
    with started(a_setting(FakeRunner(dict.fromkeys(widths, seconds)), max_queue)) as s:
        yield s


@contextmanager
def warm_latent(
    *widths: int,
    seconds: float = 1.0,
    decode_seconds: Mapping[int, float] | None = None,
    max_queue: int = 16,
    observer: Recorder | None = None,
) -> Iterator[Setting]:
    """The same for latent diffusion. By default four images are decoded as fast as one."""
    runner = FakeRunner(dict.fromkeys(widths, seconds))
    decode_seconds = {4: 1.0} if decode_seconds is None else decode_seconds
    with started(a_setting(runner, max_queue, observer, decode_seconds)) as s:
        yield s


@contextmanager
def warm_text(
    *widths: int,
    text_seconds: float = 0.5,
    check_seconds: float | None = None,
    decode_seconds: Mapping[int, float] | None = None,
    max_queue: int = 16,
) -> Iterator[Setting]:
    """A warm engine with a text encoder, and perhaps a VAE and a check."""
    runner = FakeRunner(dict.fromkeys(widths, 1.0))
    setting = a_setting(
        runner, max_queue, decode_seconds=decode_seconds, text_seconds=text_seconds, check_seconds=check_seconds
    )
    with started(setting) as s:
        yield s


@contextmanager
def warm_checked(
    *widths: int,
    check_seconds: float = 0.25,
    decode_seconds: Mapping[int, float] | None = None,
    observer: Recorder | None = None,
) -> Iterator[Setting]:
    """A warm engine with a check of images, and perhaps a VAE."""
    runner = FakeRunner(dict.fromkeys(widths, 1.0))
    setting = a_setting(runner, 16, observer, decode_seconds, check_seconds=check_seconds)
    with started(setting) as s:
        yield s


def check_that_probes_tell(
    s: Setting, faulty: FakeRunner | FakeVAE | FakeTextEncoder, fault: str, row: Row | None = None
) -> None:
    """After a failed request, the probe decides whether the engine has failed.

    Args:
        row: of the request; its seed or its token is 1.
    """
    setattr(faulty, fault, {PROBE_SEED, 1})
    assert isinstance(error_of(s.submit(row or a_row(1))), ComputationFailed)
    assert s.engine.in_doubt
    assert status_of(s.engine) == "ready"
    assert isinstance(error_of(s.engine.probe()), ComputationFailed)
    s.engine.check_health()
    assert s.engine.in_doubt
    assert status_of(s.engine) == "failed"
    assert s.engine.alive
    setattr(faulty, fault, set())
    error_of(s.engine.probe())  # may have begun earlier
    s.engine.probe().result(PATIENCE)
    assert not s.engine.in_doubt
    assert status_of(s.engine) == "ready"


def check_that_it_gives_up(
    s: Setting, faulty: FakeRunner | FakeVAE | FakeTextEncoder, fault: str, row: Row | None = None
) -> None:
    """The engine gives up after five failed probes in a row, if nothing succeeds in between.

    Args:
        row: of a request that fails, too; its seed or its token is 1.
    """
    setattr(faulty, fault, {PROBE_SEED, 1})
    assert isinstance(error_of(s.submit(row or a_row(1))), ComputationFailed)
    for _ in range(5):
        assert isinstance(error_of(s.engine.probe()), ComputationFailed)
        assert s.engine.beyond_help is None
    assert s.engine.alive
    s.engine.check_health()
    check_beyond_help(s, "fails whatever it is given")


def check_that_nothing_but_a_hang_does_harm(s: Setting) -> None:
    """Check that the idle engine works as if new, or has given up after a hang and dropped all requests."""
    if s.engine.beyond_help is not None:
        check_beyond_help(s, "has not returned for")
        return
    s.wait_alive()  # the hanging call has returned; its thread will report it
    s.engine.probe().exception(PATIENCE)  # perhaps one that began before a failure

    def is_certain() -> bool:
        s.engine.probe().result(PATIENCE)
        return not s.engine.in_doubt

    eventually(lambda: is_certain() or None)  # a call for a request that has left may still fail
    assert status_of(s.engine) == "ready"
    assert s.engine.alive
    assert s.engine.wait_idle(PATIENCE)
    assert s.is_empty()


def check_beyond_help(s: Setting, why: str) -> None:
    """All requests are refused for good."""
    assert why in (s.engine.beyond_help or "")
    assert status_of(s.engine) == "failed"
    assert not s.engine.alive
    with pytest.raises(Failed, match="the engine has stopped"):
        s.submit(a_row(99))
    with pytest.raises(Failed, match="the engine has stopped"):
        s.engine.probe()
    s.engine.check_health()  # changes nothing
    assert s.engine.wait_idle(0)
    assert s.places.taken == 0
