"""The warm-up: checks that the model works, and measures the costs of its passes. Each call may also compile."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from model.rows import VAE, Forward, Group, Image, Row, Runner, Text, TextEncoder
from service.engine.check import CheckImage
from service.engine.costs import Costs, Machine, PerValue, Speed
from service.engine.health import CHECKING, DECODING, ENCODING, PASSES
from service.engine.requests import Clock
from service.engine.stage_health import FIRST_TIME, StageHealth
from service.errors import ComputationFailed

_MEASURED = 3  # calls of each width
_FEWEST = 2
_ENOUGH = 2.0  # seconds of all calls of a width
_AT_MOST = 10.0  # seconds for the passes of one group, beyond two passes


class Model(NamedTuple):
    """What works for the engine. See service.engine.engine.Engine."""

    runners: Mapping[Group, Runner]
    probes: Mapping[Group, Row]
    vaes: Mapping[Group, VAE]
    text_encoder: TextEncoder | None
    check: CheckImage | None


def measure(model: Model, stages: Mapping[str, StageHealth], clock: Clock) -> Machine:
    """Check that the model works in each group, and measure what its work costs.

    Args:
        stages: the health of each thread, by its work.

    Raises:
        ComputationFailed: the image or the context of a probe is not finite.
    """
    speed, decode_speed, encode_speed, check_speed = Speed(), Speed(), Speed(), Speed()
    passes: dict[Group, Costs] = {}
    decode: dict[Group, Costs] = {}
    encode: dict[Group, Costs] = {}
    check: dict[Group, Costs] = {}
    text: Costs | None = None
    largest = 0
    if model.text_encoder is not None:
        [probed, *_] = (one.text for probe in model.probes.values() for one in probe.branches if one.text is not None)
        text = Costs(measure_texts(model.text_encoder, probed, stages[ENCODING], clock), encode_speed)
    for group, runner in model.runners.items():
        x, drawing = draw_probe(runner, model.probes[group], stages[PASSES], clock)
        image = x
        if (vae := model.vaes.get(group)) is not None:
            image, first = decode_probe(vae, x, stages[DECODING], clock)
            encoding = measure_encoding(vae, image, stages[ENCODING], clock)
            decoding = measure_decoding(vae, x, stages[DECODING], clock, [first])
            encode[group] = Costs(encoding, encode_speed)
            decode[group] = Costs(decoding, decode_speed, vae.widths)
        if model.check is not None:
            check[group] = Costs(measure_checks(model.check, image, stages[CHECKING], clock), check_speed)
        largest = max(largest, image.size)
        measured = measure_passes(runner, model.probes[group], stages[PASSES], clock, drawing)
        passes[group] = Costs(measured, speed, runner.widths)
    return Machine(passes, decode, encode, PerValue(largest=largest), text, check)


def measure_texts(encoder: TextEncoder, text: Text, health: StageHealth, clock: Clock) -> dict[int, float]:
    """The seconds to encode a text, which is the only width. All texts take as long.

    Raises:
        ComputationFailed: the context is not finite.
    """

    def seconds(_: int) -> float:
        began = clock()
        context = encoder.encode(text)
        taken = clock() - began
        if not context.is_finite:
            raise ComputationFailed("the probe's encoded text is not finite")
        return taken

    return by_width(seconds, [1], health, clock)


def measure_checks(check: CheckImage, image: Image, health: StageHealth, clock: Clock) -> dict[int, float]:
    """The seconds to check an image, which is the only width. The probe's image may be refused.

    The first check may load a model, which no `prepare` has loaded. So it does not count, however long it takes.
    """

    def seconds(_: int) -> float:
        began = clock()
        check(image)
        return clock() - began

    health.beat(FIRST_TIME)
    check(image)
    return by_width(seconds, [1], health, clock)


def draw_probe(runner: Runner, probe: Row, health: StageHealth, clock: Clock) -> tuple[Image, list[float]]:
    """Run the probe alone. Return its image, and the seconds of each pass.

    Raises:
        ComputationFailed: the image is not finite.
    """
    health.beat(FIRST_TIME)
    slot = runner.admit(probe)
    taken = []
    for line in range(len(probe.table)):
        health.beat(FIRST_TIME)
        began = clock()
        runner.step([Forward(slot, 0, line)])
        taken.append(clock() - began)
    health.beat(FIRST_TIME)
    image = runner.read(slot).x
    runner.release(slot)
    health.rest()
    return _finite(image), taken


def measure_passes(
    runner: Runner, probe: Row, health: StageHealth, clock: Clock, before: Sequence[float] = ()
) -> dict[int, float]:
    """The seconds of a pass with copies of the probe, by width; of some widths on a slow machine.

    Args:
        before: the seconds of passes that drew the probe.
    """

    def seconds(rows: int) -> float:
        slots = [runner.admit(probe) for _ in range(rows)]
        began = clock()
        runner.step([Forward(slot, 0, 0) for slot in slots])
        taken = clock() - began
        for slot in slots:
            runner.release(slot)
        return taken

    return by_width(seconds, runner.widths, health, clock, before)


def decode_probe(vae: VAE, latents: Image, health: StageHealth, clock: Clock) -> tuple[Image, float]:
    """Decode the probe's latents. Return the image, and the seconds that this took.

    Raises:
        ComputationFailed: the image is not finite.
    """
    health.beat(FIRST_TIME)
    began = clock()
    [image] = vae.decode([latents])
    taken = clock() - began
    health.rest()
    return _finite(image), taken


def measure_decoding(
    vae: VAE, latents: Image, health: StageHealth, clock: Clock, before: Sequence[float] = ()
) -> dict[int, float]:
    """The seconds to decode a batch with copies of these latents, by width; of some widths on a slow machine.

    Args:
        before: the seconds in which they were decoded alone.
    """

    def seconds(images: int) -> float:
        began = clock()
        vae.decode([latents] * images)
        return clock() - began

    return by_width(seconds, vae.widths, health, clock, before)


def measure_encoding(vae: VAE, image: Image, health: StageHealth, clock: Clock) -> dict[int, float]:
    """The seconds to encode an image, which is the only width."""

    def seconds(_: int) -> float:
        began = clock()
        vae.encode(image)
        return clock() - began

    return by_width(seconds, [1], health, clock)


def by_width(
    seconds: Callable[[int], float],
    widths: Sequence[int],
    health: StageHealth,
    clock: Clock,
    before: Sequence[float] = (),
) -> dict[int, float]:
    """The seconds of a batch, by its width.

    On a slow machine some widths are left out, so that measuring takes about 10 s, or one batch if that takes longer.
    One row is measured first, then the widest batch that there is time for, then the widths that halve the gaps.

    Args:
        before: the seconds of calls with the first width that were made already.
    """
    measured: dict[int, float] = {}
    began = clock()
    for width in by_importance(widths):
        left = _AT_MOST - (clock() - began)
        a_row = max((taken / width for width, taken in measured.items()), default=0.0)
        calls = min(1 + _MEASURED, int(left / (a_row * width))) if a_row else 1 + _MEASURED
        if calls >= _FEWEST or not measured:
            taken = [] if measured else [*before]
            call = partial(seconds, width)
            measured[width] = _fewest(call, taken, health, calls, lambda more: clock() - began + more <= _AT_MOST)
    health.rest()
    return measured


def by_importance(widths: Sequence[int]) -> list[int]:
    """The order in which widths are measured: the ends first, then the middle of each gap.

    Args:
        widths: rising.
    """
    order = [widths[0], widths[-1]]
    gaps = [(0, len(widths) - 1)]
    for low, high in gaps:  # grows
        if high - low > 1:
            middle = (low + high) // 2
            order.append(widths[middle])
            gaps += [(low, middle), (middle, high)]
    return list(dict.fromkeys(order))


def _fewest(
    seconds: Callable[[], float],
    taken: list[float],
    health: StageHealth,
    calls: int,
    is_time: Callable[[float], bool],
) -> float:
    """The fewest seconds of a few calls; of fewer where they take long.

    The first may be slower and does not count, unless it is the only one. Backends compile before (Backend.prepare), so
    a first call that takes long is not much slower.

    Args:
        taken: the seconds of calls that were made already.
    """
    while sum(taken) < _ENOUGH and (len(taken) < _FEWEST or (len(taken) < calls and is_time(taken[-1]))):
        health.beat(FIRST_TIME)
        taken.append(seconds())
    return min(taken[1:] or taken)


def _finite(image: Image) -> Image:
    if not np.isfinite(image).all():
        raise ComputationFailed("the probe's image is not finite")
    return image
