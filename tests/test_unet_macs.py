"""The counts of bench/unet_macs.py agree with PyTorch's own counter, with counts by hand, and with docs/unet.md."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.unet_macs import NETWORKS, TIME, VARIANTS, count, ddpm_cifar10, diffusion_unet, original_unet, report, run
from model.nets.unet import DiffusionUNet

ATTENTION = partial(DiffusionUNet, 3, 8, (1, 2), attention_levels=(1,), middle_attention=True)


@pytest.mark.parametrize(("build", "size"), [*VARIANTS.values(), (ATTENTION, 16)], ids=[*VARIANTS, "our attention"])
def test_total_agrees_with_torch_flop_counter(build: Callable[[], nn.Module], size: int) -> None:
    with torch.device("meta"):
        network = build()
    with FlopCounterMode(display=False) as counter:
        run(network, size, "meta")
    assert 2 * count(build, size).sum() == counter.get_total_flops()  # one MAC is two operations


@pytest.mark.parametrize(
    ("network", "size"),
    [(diffusion_unet((4, 8, 16, 32)), 16), (original_unet((4, 8, 16, 32)), 16), (ddpm_cifar10((32,) * 4, 16), 16)],
    ids=list(NETWORKS),
)
def test_networks_run(network: nn.Module, size: int) -> None:
    out = run(network, size)
    assert out.shape == (1, 3, size, size)
    assert out.isfinite().all()


def test_parts_and_resolutions_of_a_diffusion_unet_counted_by_hand() -> None:
    assert count(lambda: diffusion_unet((2,)), 4).macs == {
        ("encoder", 4): 16 * 9 * (3 * 2 + 2 * 2 + 2 * 2),
        ("Downsample", 2): 4 * 9 * (2 * 2),
        ("middle", 2): 4 * 9 * (2 * 2 + 2 * 2),
        ("decoder", 2): 4 * 9 * (4 * 2 + 2 * 2) + 4 * (4 * 2),
        ("Upsample", 4): 16 * 9 * (2 * 2),
        ("decoder", 4): 16 * 9 * (2 * 3),
        ("encoder", TIME): 2 * 8 + 8 * 8 + 8 * 2,
        ("middle", TIME): 8 * 2,
        ("decoder", TIME): 8 * 2,
    }


def test_parts_and_resolutions_of_an_original_unet_counted_by_hand() -> None:
    assert count(lambda: original_unet((2,)), 4).macs == {
        ("encoder", 4): 16 * 9 * (3 * 2 + 2 * 2),
        ("middle", 2): 4 * 9 * (2 * 2 + 2 * 2),
        ("Upsample", 4): 4 * 4 * (2 * 2),
        ("decoder", 4): 16 * 9 * (4 * 2 + 2 * 2) + 16 * (2 * 3),
    }


def test_ddpm_is_the_network_of_the_paper() -> None:
    assert count(ddpm_cifar10).params == 35_746_307  # google/ddpm-cifar10-32; the paper says 35.7 million


def test_docs_show_the_report() -> None:
    assert report() in (Path(__file__).parents[1] / "docs" / "unet.md").read_text(encoding="utf-8")
