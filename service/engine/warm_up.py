"""The warm-up: checks that the model works, and measures the costs of its passes. Each call may also compile."""

from collections.abc import Callable, Mapping

import numpy as np

from model.rows import VAE, Forward, Group, Image, Row, Runner
from service.engine.costs import Costs, Machine, Speed
from service.engine.health import DECODING, ENCODING, PASSES
from service.engine.requests import Clock
from service.engine.stage_health import FIRST_TIME, StageHealth
from service.errors import ComputationFailed

_MEASURED = 3  # calls of each width


def measure(
    runners: Mapping[Group, Runner],
    probes: Mapping[Group, Row],
    vaes: Mapping[Group, VAE] | None,
    stages: Mapping[str, StageHealth],
    clock: Clock,
) -> Machine:
    """Check that the model works in each group, and measure what its work costs.

    Args:
        stages: the health of each thread, by its work.

    Raises:
        ComputationFailed: the image of a probe is not finite.
    """
    speed, decode_speed, encode_speed = Speed(), Speed(), Speed()
    passes: dict[Group, Costs] = {}
    decode: dict[Group, Costs] = {}
    encode: dict[Group, Costs] = {}
    for group, runner in runners.items():
        x = draw_probe(runner, probes[group], stages[PASSES])
        if vaes is not None:
            image = decode_probe(vaes[group], x, stages[DECODING])
            encode[group] = Costs({1: measure_encoding(vaes[group], image, stages[ENCODING], clock)}, encode_speed)
            decode[group] = Costs(measure_decoding(vaes[group], x, stages[DECODING], clock), decode_speed)
        measured = measure_passes(runner, probes[group], stages[PASSES], clock)
        passes[group] = Costs(measured, speed, runner.widths)
    return Machine(passes, decode, encode)


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
    """The seconds of a pass with copies of the probe, by width."""

    def seconds(rows: int) -> float:
        slots = [runner.admit(probe) for _ in range(rows)]
        began = clock()
        runner.step([Forward(slot, 0, 0) for slot in slots])
        taken = clock() - began
        for slot in slots:
            runner.release(slot)
        return taken

    return {width: _fewest(seconds, width, health) for width in runner.widths}


def decode_probe(vae: VAE, latents: Image, health: StageHealth) -> Image:
    """Decode the probe's latents, and return the image.

    Raises:
        ComputationFailed: the image is not finite.
    """
    health.beat(FIRST_TIME)
    [image] = vae.decode([latents])
    health.rest()
    return _finite(image)


def measure_decoding(vae: VAE, latents: Image, health: StageHealth, clock: Clock) -> dict[int, float]:
    """The seconds to decode a batch with copies of these latents, by width."""

    def seconds(images: int) -> float:
        began = clock()
        vae.decode([latents] * images)
        return clock() - began

    measured = {width: _fewest(seconds, width, health) for width in vae.widths}
    health.rest()
    return measured


def measure_encoding(vae: VAE, image: Image, health: StageHealth, clock: Clock) -> float:
    """The seconds to encode an image."""

    def seconds(_: int) -> float:
        began = clock()
        vae.encode(image)
        return clock() - began

    measured = _fewest(seconds, 1, health)
    health.rest()
    return measured


def _fewest(seconds: Callable[[int], float], rows: int, health: StageHealth) -> float:
    """The fewest seconds of a few calls. The first call may compile, and does not count."""
    taken = []
    for _ in range(1 + _MEASURED):
        health.beat(FIRST_TIME)
        taken.append(seconds(rows))
    return min(taken[1:])


def _finite(image: Image) -> Image:
    if not np.isfinite(image).all():
        raise ComputationFailed("the probe's image is not finite")
    return image
