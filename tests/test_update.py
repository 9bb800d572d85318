"""The one update: any mix of rows, each as if it were alone."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.samplers import Column, denoise_table, sample_table
from model.schedule import Schedule
from model.update import guided
from model.update import update as update_rows
from tests.reference import DDPMScheduler

SHAPE = (3, 5, 7)

# Lines of every kind: noise, two x0, raw ε, no bound, bounds, and dynamic thresholding with and without a bite.
TABLES = {
    "ddpm": sample_table(Schedule(variance_type="fixed_large"), "ddpm", 20),
    "ddim": sample_table(Schedule(clip_sample_range=0.7), "ddim", 20, eta=0.5),
    "ddim, v, no bound": sample_table(Schedule(prediction_type="v_prediction", clip_sample=False), "ddim", 20),
    "ddim, sample": sample_table(Schedule(prediction_type="sample"), "ddim", 20),
    "dpmpp_2m": sample_table(Schedule(), "dpmpp_2m", 20),
    "threshold of 1": sample_table(Schedule(thresholding=True), "ddim", 20),
    "threshold of 1.5": sample_table(Schedule(thresholding=True, sample_max_value=1.5), "ddpm", 20),
    "median as threshold": sample_table(
        Schedule(thresholding=True, dynamic_thresholding_ratio=0.5, sample_max_value=100.0), "dpmpp_2m", 20
    ),
    "one step": denoise_table(Schedule(), "ddim", 500, 1),
}
LINES = torch.cat([torch.tensor(table.lines) for table in TABLES.values()]).float()


def update(x: Tensor, out: Tensor, x0_previous: Tensor, noise: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    thresholded = lines[:, Column.QUANTILE].nonzero()[:, 0].tolist()
    return update_rows(x, out, x0_previous, noise, lines, thresholded)


class Images(NamedTuple):
    """The inputs of an update, except for its lines."""

    x: Tensor
    out: Tensor
    x0_previous: Tensor
    noise: Tensor

    def rows(self, which: list[int]) -> "Images":
        return Images(self.x[which], self.out[which], self.x0_previous[which], self.noise[which])


def images(rows: int, seed: int) -> Images:
    rng = torch.Generator().manual_seed(seed)
    x, out, x0_previous, noise = torch.randn((4, rows, *SHAPE), generator=rng)
    return Images(x, out, x0_previous, noise)


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
        x, out, x0_previous, noise = (image[0].double().numpy() for image in inputs)
        p, q, a, b, c, d, e, _, bound, quantile, maximum = line
        x0 = p * x + q * out
        if quantile:
            s = min(max(float(np.quantile(np.abs(x0), quantile)), 1.0), maximum)
            x0 = x0.clip(-s, s) / s
        x0 = x0.clip(-bound, bound)
        expected = a * x + b * x0 + c * x0_previous + d * noise + e * out
        x_next, x0_now = update(*inputs, torch.tensor(line)[None].float())
        np.testing.assert_allclose(x0_now[0], x0, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(x_next[0], expected, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_scales_the_noise_value_by_value() -> None:
    inputs = images(2, 0)
    v = images(2, 1).out
    lines = torch.from_numpy(sample_table(Schedule(variance_type="learned_range"), "ddpm", 20).lines[[3, 7]]).float()
    x_next, x0 = update(inputs.x, torch.cat([inputs.out, v], dim=1), inputs.x0_previous, inputs.noise, lines)
    scaled = inputs.noise * torch.exp(lines[:, Column.S, None, None, None] * v)
    expected, x0_expected = update(inputs.x, inputs.out, inputs.x0_previous, scaled, lines)
    torch.testing.assert_close(x_next, expected)
    assert torch.equal(x0, x0_expected)
    assert (lines[:, Column.S] > 0).all()


@given(chosen=st.lists(st.integers(0, len(LINES) - 1), min_size=1, max_size=12), seed=st.integers(0, 100))
def test_each_row_of_a_mix_equals_that_row_alone(chosen: list[int], seed: int) -> None:
    inputs = images(len(chosen), seed)
    lines = LINES[chosen]
    before = [tensor.clone() for tensor in (*inputs, lines)]
    x_next, x0 = update(*inputs, lines)
    for row in range(len(chosen)):
        alone, x0_alone = update(*inputs.rows([row]), lines[[row]])
        assert torch.equal(x_next[row], alone[0])
        assert torch.equal(x0[row], x0_alone[0])
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
    x_next, x0 = update(x, zeros, zeros, zeros, lines)
    assert x0[:, 0, 0, 0].tolist() == [1.0, -2.0, 2.5]
    assert torch.equal(x_next, x0)


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("maximum", [1.0, 1.5, 100.0])
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_dynamic_thresholding_is_that_of_diffusers(ratio: float, maximum: float, scale: float) -> None:
    theirs = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=maximum)
    x = images(4, 2).x * scale
    zeros = torch.zeros_like(x)
    _, x0 = update(x, zeros, zeros, zeros, identity_lines(4, QUANTILE=ratio, MAXIMUM=maximum))
    torch.testing.assert_close(x0, theirs._threshold_sample(x), rtol=1e-6, atol=1e-7)


def test_thresholded_rows_leave_their_neighbours_alone() -> None:
    x = images(3, 3).x * 5
    lines = identity_lines(3)
    lines[1, Column.QUANTILE], lines[1, Column.MAXIMUM] = 0.9, 50
    zeros = torch.zeros_like(x)
    _, x0 = update(x, zeros, zeros, zeros, lines)
    assert torch.equal(x0[[0, 2]], x[[0, 2]])
    assert x0[1].abs().max() == 1


def test_guidance_by_scale() -> None:
    conditional, unconditional, _, _ = images(4, 4)
    out = guided([conditional, unconditional], torch.tensor([0.0, 1.0, 2.0, 7.5]))
    assert torch.equal(out[0], unconditional[0])
    torch.testing.assert_close(out[1], conditional[1], rtol=0, atol=1e-6)
    torch.testing.assert_close(out[2], 2 * conditional[2] - unconditional[2])
    torch.testing.assert_close(out[3], 7.5 * conditional[3] - 6.5 * unconditional[3])


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
