"""Rows that begin from an image: what their generators draw, what masks keep, and what networks that inpaint see."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from model.conditions import Conditions
from model.rows import Condition, Forward, Group, Image, Moments, Row, Source
from model.runner import SlotRunner
from model.samplers import SAMPLERS, sample_table
from model.schedule import Schedule
from tests.trajectories import Told, runner_of, small_network, torch_backend, trajectory

SHAPE = (3, 8, 8)
GROUP = Group(8, 8)
RNG = np.random.default_rng(3)
IMAGE: Image = RNG.uniform(-1, 1, SHAPE).astype(np.float32)
STD: Image = RNG.uniform(0.1, 1, SHAPE).astype(np.float32)
MASK = RNG.random((8, 8)) < 0.5
MOMENTS = Moments(IMAGE, STD)
TABLE = sample_table(Schedule(), "ddpm", 6, begin=2)


def draws(seed: int, number: int) -> list[Image]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn((1, *SHAPE), generator=rng)[0].numpy() for _ in range(number)]


def row_of(source: Source | None, **fields: Any) -> Row:
    return Row(**{"table": TABLE, "seed": 5, "group": GROUP, "source": source, **fields})


# What is drawn, in the order of diffusers.


class Silent(Told):
    """Predicts nothing, and remembers its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return torch.zeros_like(x[:, :3])


def begun(source: Source, **fields: Any) -> Image:
    runner = runner_of(Silent(), SHAPE, width=1)
    return runner.read(runner.admit(row_of(source, **fields))).x


def noisy(image: Image, noise: Image) -> Image:
    signal, deviation = TABLE.levels[0].tolist()
    found: Image = np.float32(signal) * image + np.float32(deviation) * noise
    return found


def test_an_image_is_drawn_before_the_first_noise() -> None:
    first, second, _ = draws(5, 3)
    np.testing.assert_allclose(begun(Source(MOMENTS)), noisy(IMAGE + STD * first, second), rtol=0, atol=1e-6)


def test_of_an_image_without_a_distribution_nothing_is_drawn() -> None:
    """So is it in models of pixels."""
    [first] = draws(5, 1)
    np.testing.assert_allclose(begun(Source(Moments(IMAGE))), noisy(IMAGE, first), rtol=0, atol=1e-6)


def test_at_full_strength_a_masked_row_begins_from_noise_alone() -> None:
    _, second = draws(5, 2)
    assert np.array_equal(begun(Source(MOMENTS, MASK, from_noise=True)), second)
    table = sample_table(Schedule(timestep_spacing="linspace"), "euler", 6)
    assert table.init < 1
    scaled = second * np.float32(table.init)
    assert np.array_equal(begun(Source(MOMENTS, MASK, from_noise=True), table=table), scaled)


@pytest.mark.parametrize(
    ("mask", "moments", "drawn"), [(None, MOMENTS, 2), (MASK, MOMENTS, 3), (MASK, Moments(IMAGE), 1)]
)
def test_the_noise_of_steps_follows_what_is_drawn_of_images(mask: Any, moments: Moments, drawn: int) -> None:
    """With a mask the pipelines draw latents of the masked image, too, and do not use them."""
    runner = runner_of(Silent(), SHAPE, width=1)
    one = next(trajectory(runner, row_of(Source(moments, mask)))).x
    noise = draws(5, drawn + 1)[drawn]
    x = begun(Source(moments, mask))
    line = dict(zip(("p", "q", "a", "b", "d"), TABLE.lines[0], strict=False))
    expected = line["a"] * x + line["b"] * np.clip(line["p"] * x, -1, 1) + line["d"] * noise
    anew = np.ones(SHAPE, bool) if mask is None else np.broadcast_to(mask, SHAPE)
    np.testing.assert_allclose(one[anew], expected[anew], rtol=0, atol=1e-5)


# What masks keep.


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_a_mask_keeps_is_the_image_at_each_level(sampler: str) -> None:
    """After the last line it is the image, bit for bit."""
    table = sample_table(Schedule(), sampler, 5)
    source = Source(MOMENTS, MASK, from_noise=True)
    readings = list(trajectory(runner_of(small_network(), SHAPE, 1), row_of(source, table=table)))
    first, second = draws(5, 2)
    image = IMAGE + STD * first
    keeps = np.broadcast_to(~MASK, SHAPE)
    for reading, (signal, deviation) in zip(readings, table.levels[1:], strict=True):
        expected = np.float32(signal) * image + np.float32(deviation) * second
        np.testing.assert_allclose(reading.x[keeps], expected[keeps], rtol=0, atol=1e-6)
    assert np.array_equal(readings[-1].x[keeps], image[keeps])
    assert not np.isclose(readings[-1].x[~keeps], image[~keeps]).any()


# Networks that inpaint.


def inpainting(network: Told) -> SlotRunner:
    backend = torch_backend(network, (7, 8, 8), "float32", 4)
    return SlotRunner(backend, SHAPE, Conditions(network.embedder, backend, 5), slots=1, inpaints=True)


class Cheap(Told):
    """Its prediction depends on all that it is given."""

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        return (x[:, :3] + x[:, 3:4] * x[:, 4:]).sin() + (t / 1000 + labels)[:, None, None, None]


def test_rows_of_a_network_that_inpaints_have_their_own_bytes_in_a_crowd() -> None:
    """Each has its own mask, also where the runner adds slots."""
    table = sample_table(Schedule(clip_sample=False), "euler_a", 4)
    rows = [
        row_of(Source(MOMENTS, MASK, MOMENTS), table=table),
        row_of(Source(MOMENTS, ~MASK, Moments(-IMAGE, STD)), table=table, seed=6),
        row_of(Source(mask=MASK, masked=Moments(-IMAGE), from_noise=True), table=table),
    ]
    crowd = inpainting(Cheap())
    slots = [crowd.admit(row) for row in rows]
    for line in range(len(table)):
        crowd.step([Forward(slot, 0, line) for slot in slots])
    ends = [crowd.read(slot).x for slot in slots]
    for row, end in zip(rows, ends, strict=True):
        *_, alone = trajectory(inpainting(Cheap()), row)
        assert np.array_equal(end, alone.x)
    assert len({end.tobytes() for end in ends}) == len(rows)


def test_a_network_that_inpaints_sees_the_mask_and_the_masked_image_in_both_branches() -> None:
    network = Silent()
    runner = inpainting(network)
    sources = [
        Source(mask=MASK, masked=MOMENTS, from_noise=True),
        Source(MOMENTS, ~MASK, Moments(np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32))),
    ]
    first, second, third = draws(5, 3)
    masked = [IMAGE + STD * second, third]
    for source, mask, latents in zip(sources, (MASK, ~MASK), masked, strict=True):
        row = row_of(source, branches=(Condition(1), Condition()), guidance_scale=3.0)
        network.seen.clear()
        starts = first if source.image is None else noisy(IMAGE + STD * first, second)
        slot = runner.admit(row)
        np.testing.assert_allclose(runner.read(slot).x, starts, rtol=0, atol=1e-6)
        runner.release(slot)
        for _ in trajectory(runner, row):
            pass
        assert len(network.seen) >= len(TABLE)
        for x in network.seen:
            for one in x[:2]:
                assert np.array_equal(one[3].numpy(), mask)
                np.testing.assert_allclose(one[4:].numpy(), latents, rtol=0, atol=1e-6)


def test_a_network_that_inpaints_takes_no_row_without_a_mask() -> None:
    runner = inpainting(Silent())
    with pytest.raises(ValueError, match="the row has no masked image"):
        runner.admit(row_of(Source(MOMENTS)))
    runner.admit(row_of(Source.of_nothing(SHAPE)))
