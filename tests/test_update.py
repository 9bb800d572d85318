"""The one update: any mix of rows, each as if it were alone."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.lines import Column
from model.samplers import denoise_table, sample_table
from model.schedule import Schedule
from model.update import guided, remembered, rescaled
from model.update import update as update_rows
from tests.reference import DDPMScheduler, rescale_noise_cfg

SHAPE = (3, 5, 7)

# Lines of every kind: noise, memories, raw ε, no bound, bounds, and dynamic thresholding with and without a bite.
TABLES = {
    "ddpm": sample_table(Schedule(variance_type="fixed_large"), "ddpm", 20),
    "ddim": sample_table(Schedule(clip_sample_range=0.7), "ddim", 20, eta=0.5),
    "ddim, v, no bound": sample_table(Schedule(prediction_type="v_prediction", clip_sample=False), "ddim", 20),
    "ddim, sample": sample_table(Schedule(prediction_type="sample"), "ddim", 20),
    "dpmpp_2m": sample_table(Schedule(), "dpmpp_2m", 20),
    "pndm": sample_table(Schedule(), "pndm", 6),
    "pndm, v": sample_table(Schedule(prediction_type="v_prediction"), "pndm", 5),
    "euler": sample_table(Schedule(), "euler", 7),
    "euler_a": sample_table(Schedule(), "euler_a", 7),
    "lcm": sample_table(Schedule(), "lcm", 4),
    "heun": sample_table(Schedule(timestep_spacing="trailing"), "heun", 4),
    "unipc": sample_table(Schedule(), "unipc", 6),
    "dpmpp_2m_sde": sample_table(Schedule(), "dpmpp_2m_sde", 6),
    "tcd": sample_table(Schedule(), "tcd", 4, eta=0.3),
    "threshold of 1": sample_table(Schedule(thresholding=True), "ddim", 20),
    "threshold of 1.5": sample_table(Schedule(thresholding=True, sample_max_value=1.5), "ddpm", 20),
    "median as threshold": sample_table(
        Schedule(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=100.0), "dpmpp_2m", 20
    ),
    "one step": denoise_table(Schedule(), "ddim", 500, 1),
}
LINES = torch.cat([torch.tensor(table.lines) for table in TABLES.values()]).float()


def update(x: Tensor, out: Tensor, memories: Tensor, noise: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    thresholded = lines[:, Column.QUANTILE].nonzero()[:, 0].tolist()
    return update_rows(x, out, memories.unbind(), noise, lines, thresholded)


class Images(NamedTuple):
    """The inputs of an update, except for its lines."""

    x: Tensor
    out: Tensor
    memories: Tensor  # [3, rows, …]
    noise: Tensor

    def rows(self, which: list[int]) -> "Images":
        return Images(self.x[which], self.out[which], self.memories[:, which], self.noise[which])


def images(rows: int, seed: int) -> Images:
    rng = torch.Generator().manual_seed(seed)
    x, out, m_1, noise, m_2, m_3 = torch.randn((6, rows, *SHAPE), generator=rng)
    return Images(x, out, torch.stack([m_1, m_2, m_3]), noise)


NOTHING = torch.zeros((0, 1, *SHAPE))  # no memories


def identity_lines(rows: int, **columns: float) -> Tensor:
    """Lines whose x0 is x, and whose next x is x0."""
    lines = torch.zeros((rows, len(Column)))
    lines[:, [Column.P, Column.B]] = 1
    lines[:, Column.BOUND] = torch.inf
    for name, value in columns.items():
        lines[:, Column[name]] = value
    return lines


@pytest.mark.parametrize("name", TABLES)
def test_a_line_by_hand(name: str) -> None:
    table = TABLES[name]
    for step in range(len(table)):
        line = table.lines[step]
        inputs = images(1, step)
        x, out, noise = (image[0].double().numpy() for image in (inputs.x, inputs.out, inputs.noise))
        m_1, m_2, m_3 = inputs.memories[:, 0].double().numpy()
        p, q, a, b, d, e, _, bound, c_1, c_2, c_3, r_x, r_0, r_e, quantile, maximum = line
        x0 = p * x + q * out
        if quantile:
            s = min(max(float(np.quantile(np.abs(x0), quantile)), 1.0), maximum)
            x0 = x0.clip(-s, s) / s
        x0 = x0.clip(-bound, bound)
        expected = a * x + b * x0 + c_1 * m_1 + c_2 * m_2 + c_3 * m_3 + d * noise + e * out
        row = torch.tensor(line)[None].float()
        x_next, x0_now = update(*inputs, row)
        memory = remembered(inputs.x, x0_now, inputs.out, row)
        np.testing.assert_allclose(memory[0], r_x * x + r_0 * x0 + r_e * out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x0_now[0], x0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x_next[0], expected, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_scales_the_noise_value_by_value() -> None:
    inputs = images(2, 0)
    v = images(2, 1).out
    lines = torch.from_numpy(sample_table(Schedule(variance_type="learned_range"), "ddpm", 20).lines[[3, 7]]).float()
    x_next, x0 = update(inputs.x, torch.cat([inputs.out, v], dim=1), inputs.memories, inputs.noise, lines)
    scaled = inputs.noise * torch.exp(lines[:, Column.S, None, None, None] * v)
    expected, x0_expected = update(inputs.x, inputs.out, inputs.memories, scaled, lines)
    left = remembered(inputs.x, x0, torch.cat([inputs.out, v], dim=1), identity_lines(2, R_E=1))
    assert torch.equal(left, inputs.out)  # v is no prediction
    torch.testing.assert_close(x_next, expected)
    assert torch.equal(x0, x0_expected)
    assert (lines[:, Column.S] > 0).all()


@given(chosen=st.lists(st.integers(0, len(LINES) - 1), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_each_row_of_a_mix_equals_that_row_alone(chosen: list[int], seed: int) -> None:
    inputs = images(len(chosen), seed)
    lines = LINES[chosen]
    before = [tensor.clone() for tensor in (*inputs, lines)]
    x_next, x0 = update(*inputs, lines)
    left = remembered(inputs.x, x0, inputs.out, lines)
    for row in range(len(chosen)):
        alone, x0_alone = update(*inputs.rows([row]), lines[[row]])
        assert torch.equal(x_next[row], alone[0])
        assert torch.equal(x0[row], x0_alone[0])
        one = inputs.rows([row])
        assert torch.equal(left[row], remembered(one.x, x0_alone, one.out, lines[[row]])[0])
    assert all(torch.equal(a, b) for a, b in zip((*inputs, lines), before, strict=True))  # nothing done in place


@given(st.permutations(range(len(TABLES))))
def test_order_of_rows_does_not_matter(order: list[int]) -> None:
    lines = torch.stack([torch.tensor(table.lines[0]) for table in TABLES.values()]).float()
    inputs = images(len(lines), 1)
    x_next, x0 = update(*inputs, lines)
    moved, x0_moved = update(*inputs.rows(order), lines[order])
    assert torch.equal(moved, x_next[order])
    assert torch.equal(x0_moved, x0[order])


def test_bounds_bite_row_by_row() -> None:
    x = torch.full((3, *SHAPE), 2.5) * torch.tensor([1, -1, 1])[:, None, None, None]
    lines = identity_lines(3)
    lines[:, Column.BOUND] = torch.tensor([1.0, 2.0, torch.inf])
    zeros = torch.zeros_like(x)
    x_next, x0 = update(x, zeros, NOTHING, zeros, lines)
    assert x0[:, 0, 0, 0].tolist() == [1.0, -2.0, 2.5]
    assert torch.equal(x_next, x0)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("maximum", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_dynamic_thresholding_is_that_of_diffusers(ratio: float, maximum: float, scale: float) -> None:
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum)
    x = images(4, 2).x * scale
    zeros = torch.zeros_like(x)
    _, x0 = update(x, zeros, NOTHING, zeros, identity_lines(4, QUANTILE=ratio, MAXIMUM=maximum))
    torch.testing.assert_close(x0, theirs._threshold_sample(x), rtol=1e-6, atol=1e-7)


def test_thresholded_rows_leave_their_neighbours_alone() -> None:
    x = images(3, 3).x * 5
    lines = identity_lines(3)
    lines[1, Column.QUANTILE], lines[1, Column.MAXIMUM] = 0.9, 50
    zeros = torch.zeros_like(x)
    _, x0 = update(x, zeros, NOTHING, zeros, lines)
    assert torch.equal(x0[[0, 2]], x[[0, 2]])
    assert x0[1].abs().max() == 1


def test_guidance_by_scale() -> None:
    conditional, unconditional, _, _ = images(4, 4)
    out = guided([conditional, unconditional], torch.tensor([0.0, 1.0, 2.0, 7.5]))
    assert torch.equal(out[0], unconditional[0])
    torch.testing.assert_close(out[1], conditional[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[2], 2 * conditional[2] - unconditional[2])
    torch.testing.assert_close(out[3], 7.5 * conditional[3] - 6.5 * unconditional[3])


@pytest.mark.parametrize("shape", [SHAPE, (1, 2, 2), (4, 64, 64)])
def test_rescaling_is_that_of_diffusers(shape: tuple[int, int, int]) -> None:
    own, out = (
        torch.randn((2, 4, *shape), generator=torch.Generator().manual_seed(0))
        * torch.tensor([1, 3])[:, None, None, None, None]
    )
    factors = [0.1, 0.7, 1.0, 0.0]
    ours = rescaled(out, own, torch.tensor(factors))
    for row, factor in enumerate(factors):
        alone = rescale_noise_cfg(out[[row]], own[[row]], factor)
        torch.testing.assert_close(ours[[row]], alone, rtol=1e-6, atol=1e-6)
        assert torch.equal(ours[[row]], rescaled(out[[row]], own[[row]], torch.tensor([factor])))
    assert torch.equal(ours[3], out[3])
    torch.testing.assert_close(ours[2].std(), own[2].std())


def test_memories_that_a_line_does_not_read_may_be_left_out() -> None:
    inputs = images(2, 6)
    lines = identity_lines(2, C_1=0.5, C_2=-2)
    some, none = (update(inputs.x, inputs.out, inputs.memories[:n], inputs.noise, lines)[0] for n in (2, 0))
    assert torch.equal(some, update(*inputs, lines)[0])
    assert torch.equal(none, inputs.x)


def test_guidance_of_equal_predictions_is_that_prediction() -> None:
    out, _, _, _ = images(4, 5)
    assert torch.equal(guided([out, out], torch.tensor([1.0, 1.5, 3.0, 20.0])), out)


def test_each_prediction_is_the_last_of_those_before_it() -> None:
    """With equal predictions at the end, three are guided as two."""
    a, b, _, _ = images(4, 4)
    scale = torch.tensor([0.0, 1.0, 2.0, 7.5])
    assert torch.equal(guided([a, b, b], scale), guided([a, b], scale))
    torch.testing.assert_close(guided([a, a, b], scale), guided([a, b], scale))


def test_three_predictions_are_combined_by_their_differences() -> None:
    own, other, none = (torch.full((1, 1, 2, 2), value) for value in (5.0, 3.0, 2.0))
    assert guided([own, other, none], torch.tensor([4.0])).eq(2 + 4 * (3 - 2) + 4 * (5 - 3)).all()


def test_one_prediction_is_itself() -> None:
    out, _, _, _ = images(4, 5)
    assert torch.equal(guided([out], torch.tensor([1.0, 1.5, 3.0, 20.0])), out)
