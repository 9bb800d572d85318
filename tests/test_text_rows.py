"""Rows with prompts share passes, and no bit of a row depends on the prompts of its company."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.backends.backend import Precision
from model.nets.unet_condition import UNet2DCondition
from model.rows import Condition, Context, Forward, Group, Image, Row, Text
from model.samplers import sample_table
from model.schedule import Schedule
from tests.properties import examples
from tests.trajectories import TOKENS, runner_of, small_text_network, trajectory

SHAPE = (4, 8, 8)
NETWORK = small_text_network()
MAPPED = small_text_network(encoder_hid_dim=9)  # maps contexts once more
TIMESTEPS = (900, 500, 100)


def a_context(number: int, channels: int = 12) -> Context:
    return Context(np.random.default_rng(number).standard_normal((TOKENS, channels), np.float32))


def a_condition(number: int, channels: int = 12) -> Condition:
    return Condition(text=Text((number,)), context=a_context(number, channels))


def a_row(seed: int, prompt: int, negative: int | None = None, scale: float = 7.5) -> Row:
    branches = tuple(a_condition(number) for number in (prompt, negative) if number is not None)
    return Row(sample_table(Schedule(), "ddim", TIMESTEPS), seed, Group(8, 8), branches=branches, guidance_scale=scale)


def crowded(rows: Sequence[Row], precision: Precision) -> list[Image]:
    """The images of rows that all step together, in passes of four forward rows."""
    runner = runner_of(NETWORK, SHAPE, 4, precision=precision)
    slots = [runner.admit(row) for row in rows]
    for line in range(len(TIMESTEPS)):
        due = [Forward(slot, i, line) for slot, row in zip(slots, rows, strict=True) for i in range(row.forwards[line])]
        for first in range(0, len(due), 4):
            runner.step(due[first : first + 4])
    return [runner.read(slot).x for slot in slots]


prompts = st.integers(0, 3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@examples(10)
@given(rows=st.lists(st.tuples(prompts, st.none() | prompts, st.sampled_from((1.5, 7.5))), min_size=2, max_size=5))
def test_no_bit_of_a_row_depends_on_other_prompts(
    precision: Precision, rows: list[tuple[int, int | None, float]]
) -> None:
    asked = [a_row(seed, *prompt) for seed, prompt in enumerate(rows)]
    for row, image in zip(asked, crowded(asked, precision), strict=True):
        alone = crowded([row], precision)[0]
        assert image.tobytes() == alone.tobytes()


@pytest.mark.parametrize(("network", "channels"), [(NETWORK, 12), (MAPPED, 9)], ids=["as it is", "mapped"])
def test_a_row_is_what_the_network_makes_of_its_prompt(network: UNet2DCondition, channels: int) -> None:
    table = sample_table(Schedule(), "ddim", (500,))
    row = Row(table, 7, Group(8, 8), branches=(a_condition(2, channels),), model_output=True)
    [reading] = trajectory(runner_of(network, SHAPE, 1), row)
    start = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        whole = network(start, torch.tensor([500.0]), torch.from_numpy(a_context(2, channels).tokens)[None])
    assert reading.x == pytest.approx(whole[0].numpy(), abs=1e-5)


def test_other_prompts_draw_other_images() -> None:
    images = crowded([a_row(1, 0), a_row(1, 1), a_row(1, 0, 1), a_row(1, 0, 2)], "float32")
    for i, image in enumerate(images):
        assert not any(np.allclose(image, other) for other in images[:i])
