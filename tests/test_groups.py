"""Images of several sizes: one runner a group, with the weights and the conditions of all."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from model.backends.choose import Choice, choose
from model.backends.network import denoiser
from model.checkpoints.load import load
from model.conditions import Conditions
from model.description import ModelDescription
from model.rows import Condition, Forward, Group, Image, Row
from model.runner import SlotRunner
from model.samplers import sample_table
from model.vae import choose_vae
from service.build import BOX
from service.http.png import to_uint8
from tests.checkpoints import save_pipeline, small_unet
from tests.reference import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler
from tests.servers import CACHE
from tests.trajectories import CPU

# diffusers' warning with NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore torch's threads, which `choose` changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Runners(NamedTuple):
    """A runner for each group of one model."""

    by_group: Mapping[Group, SlotRunner]
    model: ModelDescription


def runners_of(folder: Path, groups: list[Group], precision: Choice, max_batch: int) -> Runners:
    checkpoint = load(folder)
    model = checkpoint.description
    make = choose(denoiser(checkpoint.network, model), CPU, precision, 1, max_batch, None)
    backends = {group: make(model.sample_shape_of(group)) for group in groups}
    conditions = Conditions(checkpoint.network.embedder, backends[groups[0]], model.no_label)
    runners = {
        group: SlotRunner(backend, model.sample_shape_of(group), conditions, slots=4)
        for group, backend in backends.items()
    }
    return Runners(runners, model)


def drawn(runners: Runners, rows: list[Row], random: Random | None = None) -> list[Image]:
    """The images of rows that are in flight together.

    Each pass has rows of one group. Without `random`, groups take turns; with it, passes have any forward rows in any
    order.
    """
    slots = [runners.by_group[row.group].admit(row) for row in rows]
    lines = [0] * len(rows)
    pending: list[set[int]] = [set(range(row.forwards[0])) for row in rows]
    turn = 0
    while any(pending):
        waiting = {row.group for row, left in zip(rows, pending, strict=True) if left}
        going = [group for group in runners.by_group if group in waiting]
        group = going[turn % len(going)] if random is None else random.choice(going)
        turn += 1
        runner = runners.by_group[group]
        due = [(i, branch) for i, row in enumerate(rows) if row.group == group for branch in sorted(pending[i])]
        most = runner.widths[-1]
        chosen = due[:most] if random is None else random.sample(due, min(len(due), random.randint(1, most)))
        runner.step([Forward(slots[i], branch, lines[i]) for i, branch in chosen])
        for i, branch in chosen:
            pending[i].discard(branch)
        for i in {i for i, _ in chosen if not pending[i]}:
            lines[i] += 1
            if lines[i] < len(rows[i].table):
                pending[i] = set(range(rows[i].forwards[lines[i]]))
    images = [runners.by_group[row.group].read(slot).x for row, slot in zip(rows, slots, strict=True)]
    for row, slot in zip(rows, slots, strict=True):
        runners.by_group[row.group].release(slot)
    return images


# The same images as diffusers.


@pytest.mark.parametrize(
    ("pipeline", "scheduler", "sampler", "call"),
    [
        (DDPMPipeline, DDPMScheduler, "ddpm", {}),
        pytest.param(DDIMPipeline, DDIMScheduler, "ddim", {"eta": 0.0}, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_images_of_two_sizes_are_those_of_pipelines_at_these_sizes(
    pipeline: Any, scheduler: Any, sampler: str, call: dict[str, float], tmp_path: Path
) -> None:
    """Rows of two sizes in flight together, pass by pass in turns."""
    steps, seeds, groups = 12, [0, 7], [Group(16, 16), Group(24, 8)]
    unet = small_unet()
    save_pipeline(tmp_path, unet, scheduler())
    runners = runners_of(tmp_path, groups, "float32", 2)
    table = sample_table(runners.model.schedule, sampler, steps)
    rows = [Row(table, seed, group) for seed in seeds for group in groups]
    images = dict(zip([(row.group, row.seed) for row in rows], drawn(runners, rows), strict=True))
    for group in groups:
        unet.register_to_config(sample_size=[group.height, group.width])
        pipe = pipeline(unet, scheduler())
        pipe.set_progress_bar_config(disable=True)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        theirs = pipe(batch_size=2, generator=rngs, num_inference_steps=steps, output_type="np", **call).images
        for seed, expected in zip(seeds, theirs, strict=True):
            image = images[group, seed]
            assert image.shape == (3, group.height, group.width)
            ours = np.clip(image.transpose(1, 2, 0) / 2 + 0.5, 0, 1)
            assert np.abs(ours - expected).max() <= 1e-4
            assert len(np.unique(to_uint8(image))) > 50  # not a flat colour


# The same bytes.


@pytest.mark.slow
def test_in_mixed_crowds_of_two_sizes_each_image_has_its_own_bytes() -> None:
    """40 of 40 images: with and without guidance, guided in a part of the steps, with and without noise."""
    runners = runners_of(BOX / "digits", [Group(32, 32), Group(24, 56)], "auto", 4)
    schedule = runners.model.schedule
    samplers = ("ddim", 3), ("ddpm", 2), ("dpmpp_2m", 3)
    tables = [sample_table(schedule, sampler, steps) for sampler, steps in samplers]
    rows = []
    for seed in range(40):
        own, scale = Condition(seed % 10), (1.0, 3.0)[seed % 2]
        rows.append(
            Row(
                tables[seed % 3],
                seed,
                [*runners.by_group][seed % 5 < 2],
                branches=(own,) if scale == 1 else (own, Condition()),
                guidance_scale=scale,
                guidance_interval=(0.3, 1.0) if seed % 4 == 1 else (0.0, 1.0),
            )
        )
    assert {len(set(row.forwards)) for row in rows} == {1, 2}
    alone = [drawn(runners, [row])[0] for row in rows]
    together = drawn(runners, rows, Random(0))
    assert sum(np.array_equal(a, b) for a, b in zip(alone, together, strict=True)) == 40
    assert len({image.tobytes() for image in alone}) == 40


# Guidance in a part of the steps.


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_line_outside_the_interval_has_the_bits_of_a_step_without_guidance(precision: Choice) -> None:
    runners = runners_of(BOX / "digits", [Group(32, 32)], precision, 2)
    [(group, runner)] = runners.by_group.items()
    table = sample_table(runners.model.schedule, "ddim", 6)
    branches = Condition(3), Condition()
    guided = Row(table, 1, group, branches=branches, guidance_scale=4.0)
    partly = Row(table, 1, group, branches=branches, guidance_scale=4.0, guidance_interval=(0.3, 0.7))
    plain = Row(table, 1, group, branches=branches[:1])
    assert partly.forwards == (1, 1, 2, 2, 2, 1)

    def states(first: Row, then: Row, change: int) -> list[bytes]:
        """The image after each line, with the steps of another row from one line on."""
        found: list[bytes] = []
        slot, row = runner.admit(first), first
        for line in range(len(table)):
            if line == change:
                other = runner.admit(
                    Row(table, 1, group, start=runner.read(slot).x, branches=then.branches, guidance_scale=4.0)
                )
                runner.release(slot)
                slot, row = other, then
            runner.step([Forward(slot, branch, line) for branch in range(row.forwards[line])])
            found.append(runner.read(slot).x.tobytes())
        runner.release(slot)
        return found

    whole = states(partly, partly, -1)
    assert whole[:2] == states(plain, plain, -1)[:2]
    assert whole[2:5] == states(plain, guided, 2)[2:5]
    assert whole[5] == states(partly, plain, 5)[5]
    assert whole[2] != states(plain, plain, -1)[2]


# The VAE.


def test_each_group_has_a_vae_and_all_have_the_same_previews() -> None:
    checkpoint = load(BOX / "emoji")
    model = checkpoint.description
    assert checkpoint.autoencoder is not None
    make = choose_vae(checkpoint.autoencoder, model, CPU, "float32", 1, CACHE)
    native, large = Group(32, 32), Group(64, 48)
    first = make(native, None)
    other = make(large, first)
    for vae, group in ((first, native), (other, large)):
        image = np.ones(model.image_shape_of(group), np.float32)
        latents = vae.encode(image).mean
        assert latents.shape == model.sample_shape_of(group)
        [decoded] = vae.decode([latents])
        assert decoded.shape == image.shape
        assert np.abs(decoded - image).mean() < 0.2
        assert vae.preview(latents).shape == image.shape
        assert np.array_equal(first.preview(latents), other.preview(latents))


# What a model says of sizes.


@pytest.mark.parametrize(
    ("weights", "group", "message"),
    [
        ("digits", Group(30, 32), "height must be a multiple of 8, from 8 to 8192, and is 30"),
        ("digits", Group(32, 0), "width must be a multiple of 8, from 8 to 8192, and is 0"),
        ("digits", Group(32, 8200), "width must be a multiple of 8, from 8 to 8192, and is 8200"),
        ("emoji", Group(36, 32), "height must be a multiple of "),
    ],
)
def test_a_size_that_the_networks_cannot_halve_is_refused(weights: str, group: Group, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(BOX / weights).description.check_size(group)


def test_a_model_says_the_shapes_of_a_group() -> None:
    model = load(BOX / "emoji").description
    assert model.vae is not None
    factor = model.vae.factor
    model.check_size(model.group)
    assert model.image_shape_of(model.group) == model.image_shape
    assert model.sample_shape_of(model.group) == model.sample_shape
    group = Group(height=2 * model.factor, width=3 * model.factor)
    model.check_size(group)
    assert model.image_shape_of(group) == (3, group.height, group.width)
    assert model.sample_shape_of(group) == (model.sample_shape[0], group.height // factor, group.width // factor)
