"""Rows with prompts share passes, and no bit of a row depends on the prompts of its company."""

from collections.abc import Sequence
from dataclasses import replace

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
XL = small_text_network(  # as SDXL, told sizes
    addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=29
)
LCM = small_text_network(time_cond_proj_dim=6)  # told guidance
BOTH = small_text_network(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=29,
    time_cond_proj_dim=6,
    encoder_hid_dim=9,
)
TIMESTEPS = (900, 500, 100)


def a_context(number: int, channels: int = 12) -> Context:
    rng = np.random.default_rng(number)
    return Context(rng.standard_normal((TOKENS, channels), np.float32), rng.standard_normal(5, np.float32))


def a_condition(number: int, channels: int = 12) -> Condition:
    return Condition(text=Text((number,)), context=a_context(number, channels))


def a_row(seed: int, prompt: int, negative: int | None = None, scale: float = 7.5) -> Row:
    branches = tuple(a_condition(number) for number in (prompt, negative) if number is not None)
    return Row(sample_table(Schedule(), "ddim", TIMESTEPS), seed, Group(8, 8), branches=branches, guidance_scale=scale)


def crowded(rows: Sequence[Row], precision: Precision, network: UNet2DCondition = NETWORK) -> list[Image]:
    """The images of rows that all step together, in passes of four forward rows."""
    runner = runner_of(network, SHAPE, 4, precision=precision)
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


def told(prompt: int | None, time_ids: tuple[int, ...] | None, w: float | None, channels: int = 12) -> Condition:
    """What a branch is told. Without a prompt: zeros."""
    return replace(Condition() if prompt is None else a_condition(prompt, channels), time_ids=time_ids, w=w)


sizes = st.tuples(*[st.integers(0, 4096)] * 6)
scales = st.floats(0, 29)
none = st.none()
of_xl = st.builds(told, prompts, sizes, none)
BRANCHES = {  # of rows, by the network
    "SDXL": (XL, st.tuples(of_xl) | st.tuples(of_xl, st.builds(told, none | prompts, sizes, none))),
    "LCM": (LCM, st.tuples(st.builds(told, prompts, none, scales))),
    "both": (BOTH, st.tuples(st.builds(told, none | prompts, sizes, none | scales, st.just(9)))),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("network", "branches"), BRANCHES.values(), ids=BRANCHES)
@examples(10)
@given(data=st.data())
def test_no_bit_of_a_row_depends_on_the_sizes_and_the_guidance_of_others(
    network: UNet2DCondition,
    branches: st.SearchStrategy[tuple[Condition, ...]],
    precision: Precision,
    data: st.DataObject,
) -> None:
    """Rows that are told sizes, guidance, or no prompt. Their timesteps may be fractions."""
    table = sample_table(Schedule(), "ddim", TIMESTEPS)
    asked = [
        Row(replace(table, timesteps=table.timesteps + later), i, Group(8, 8), branches=told, guidance_scale=5.0)
        for i, (later, told) in enumerate(
            data.draw(st.lists(st.tuples(st.sampled_from((0.0, 0.25)), branches), min_size=2, max_size=4))
        )
    ]
    for row, image in zip(asked, crowded(asked, precision, network), strict=True):
        assert image.tobytes() == crowded([row], precision, network)[0].tobytes()


@pytest.mark.parametrize(("network", "channels"), [(NETWORK, 12), (MAPPED, 9)], ids=["as it is", "mapped"])
def test_a_row_is_what_the_network_makes_of_its_prompt(network: UNet2DCondition, channels: int) -> None:
    table = sample_table(Schedule(), "ddim", (500,))
    row = Row(table, 7, Group(8, 8), branches=(a_condition(2, channels),), model_output=True)
    [reading] = trajectory(runner_of(network, SHAPE, 1), row)
    start = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        whole = network(start, torch.tensor([500.0]), torch.from_numpy(a_context(2, channels).tokens)[None])
    assert reading.x == pytest.approx(whole[0].numpy(), abs=1e-5)


@pytest.mark.parametrize("prompt", [2, None])
def test_a_row_is_what_the_network_makes_of_all_that_it_is_told(prompt: int | None) -> None:
    """Of no prompt the context and the pooled text are zeros."""
    table = sample_table(Schedule(), "ddim", (500,))
    branch = told(prompt, (96, 64, 3, 4, 128, 72), 6.5, channels=9)
    row = Row(table, 7, Group(8, 8), branches=(branch,), model_output=True)
    [reading] = trajectory(runner_of(BOTH, SHAPE, 1), row)
    start = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(7))
    zeros = Context(np.zeros((TOKENS, 9), np.float32), np.zeros(5, np.float32))
    context = zeros if prompt is None else a_context(prompt, 9)
    assert context.pooled is not None
    tokens, pooled = (torch.from_numpy(values)[None] for values in context if values is not None)
    added = pooled, torch.tensor([branch.time_ids])
    with torch.inference_mode():
        whole = BOTH(start, torch.tensor([500.0]), tokens, w=torch.tensor([6.5]), added=added)
    assert reading.x == pytest.approx(whole[0].numpy(), abs=1e-5)


def are_different(images: Sequence[Image]) -> bool:
    return not any(np.allclose(image, other) for i, image in enumerate(images) for other in images[:i])


def test_other_prompts_draw_other_images() -> None:
    assert are_different(crowded([a_row(1, 0), a_row(1, 1), a_row(1, 0, 1), a_row(1, 0, 2)], "float32"))


def test_other_sizes_and_guidance_draw_other_images() -> None:
    small, large = (64, 64, 0, 0, 64, 64), (64, 64, 0, 0, 64, 128)
    table = sample_table(Schedule(), "ddim", TIMESTEPS)

    def drawn(network: UNet2DCondition, *branches: Condition) -> list[Image]:
        rows = [Row(table, 1, Group(8, 8), branches=(branch,)) for branch in branches]
        return crowded(rows, "float32", network)

    assert are_different(drawn(XL, told(1, small, None), told(1, large, None), told(None, small, None)))
    assert are_different(drawn(LCM, told(1, None, 0.0), told(1, None, 7.0), told(1, None, None)))
