"""The warm-up: checks that the model works, and measures the costs of its passes. Each call may also compile."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from model.rows import VAE, Forward, Image, Row, Runner
from service.engine.costs import Costs
from service.engine.requests import Clock
from service.engine.stage_health import FIRST_TIME, StageHealth
from service.errors import ComputationFailed

_MEASURED = 3  # calls of each width
_FEWEST = 2
_AT_MOST = 10.0  # seconds for the passes of one group, beyond two passes


def draw_probe(runner: Runner, probe: Row, health: StageHealth) -> Image:
    """Run the probe alone, and return its image.

    Raises:
        ComputationFailed: the image is not finite.
    """
    health.beat(FIRST_TIME)
    slot = runner.admit(probe)
    for line in range(len(probe.table)):
        health.beat(FIRST_TIME)
        runner.step([Forward(slot, 0, line)])
    health.beat(FIRST_TIME)
    image = runner.read(slot).x
    runner.release(slot)
    health.rest()
    return _finite(image)


def measure_passes(runner: Runner, probe: Row, health: StageHealth, clock: Clock) -> dict[int, float]:
    """The seconds of a pass with copies of the probe, by width.

    On a slow machine some widths are left out, so that measuring takes about 10 s, or two passes if these take longer.
    One row is measured first, then the widest pass that there is time for, then the widths that halve the gaps.
    """

    def seconds(rows: int) -> float:
        slots = [runner.admit(probe) for _ in range(rows)]
        began = clock()
        runner.step([Forward(slot, 0, 0) for slot in slots])
        taken = clock() - began
        for slot in slots:
            runner.release(slot)
        return taken

    measured: dict[int, float] = {}
    began = clock()
    for width in by_importance(runner.widths):
        left = _AT_MOST - (clock() - began)
        a_row = max((seconds / width for width, seconds in measured.items()), default=0.0)
        calls = min(1 + _MEASURED, int(left / (a_row * width))) if a_row else 1 + _MEASURED
        if calls >= _FEWEST or not measured:
            measured[width] = _fewest(seconds, width, health, calls, lambda more: clock() - began + more <= _AT_MOST)
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


class VAECosts(NamedTuple):
    """The costs of decoding, and the seconds to encode one image."""

    decoding: Costs
    encode_s: float


def measure_vae(vae: VAE, latents: Image, health: StageHealth, clock: Clock) -> VAECosts:
    """Measure decoding and encoding.

    Raises:
        ComputationFailed: the image of these latents is not finite.
    """
    health.beat(FIRST_TIME)
    image = _finite(vae.decode([latents])[0])
    health.beat(FIRST_TIME)
    began = clock()
    vae.encode(image)
    encode_s = clock() - began

    def seconds(images: int) -> float:
        began = clock()
        vae.decode([latents] * images)
        return clock() - began

    measured = {width: _fewest(seconds, width, health, 1 + _MEASURED, lambda more: True) for width in vae.widths}
    health.rest()
    return VAECosts(Costs(measured), encode_s)


def _fewest(
    seconds: Callable[[int], float], rows: int, health: StageHealth, calls: int, is_time: Callable[[float], bool]
) -> float:
    """The fewest seconds of a few calls, at least two. The first call may compile, and does not count."""
    taken: list[float] = []
    while len(taken) < _FEWEST or (len(taken) < calls and is_time(taken[-1])):
        health.beat(FIRST_TIME)
        taken.append(seconds(rows))
    return min(taken[1:])


def _finite(image: Image) -> Image:
    if not np.isfinite(image).all():
        raise ComputationFailed("the probe's image is not finite")
    return image
