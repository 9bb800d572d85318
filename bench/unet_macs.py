"""Count a U-Net's multiply-accumulates (MACs) by resolution, in the encoder, the middle and the decoder.

    python -m bench.unet_macs [--figure docs/unet.png]

Prints Markdown tables for the Diffusion U-Net, the original U-Net at the same widths, and DDPM's CIFAR-10 network.
docs/unet.md discusses them. Nothing is computed: the networks run on PyTorch's meta device, which has shapes and no
numbers.

Counts convolutions, linear layers and the two products of attention, Q·Kᵀ and weights·V. Every MAC belongs to the
resolution of its layer's output: the lower one for a strided convolution, the higher one for an Upsample or a
transposed convolution. Padding counts like pixels. Norms, activations, additions, pooling and biases are left out.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.nets.unet import DiffusionUNet

WIDTHS = (128, 256, 512, 1024)
SIZE = 32

# Resampling layers count separately from the blocks between them.
PARTS = ("encoder", "Downsample", "middle", "decoder", "Upsample")
DECODER = ("decoder", "Upsample")
PART_OF_CLASS = {
    **dict.fromkeys(("Downsample", "Downsample2D"), "Downsample"),
    **dict.fromkeys(("Upsample", "Upsample2D", "ConvTranspose2d"), "Upsample"),
}
PART_OF_ATTRIBUTE = {
    **dict.fromkeys(("time_embed", "input_conv", "downs", "down_attentions"), "encoder"),
    **dict.fromkeys(("middle", "middle_attention"), "middle"),
    **dict.fromkeys(("ups", "up_attentions", "final_conv"), "decoder"),
    # diffusers' names
    **dict.fromkeys(("time_embedding", "conv_in", "down_blocks"), "encoder"),
    "mid_block": "middle",
    **dict.fromkeys(("up_blocks", "conv_out"), "decoder"),
}
TIME = 0  # resolution of layers on the time embedding, which have none


class ConvBlock(nn.Sequential):
    """Two 3×3 convolutions, each followed by ReLU."""

    def __init__(self, in_ch: int, out_ch: int) -> None:
        super().__init__(
            nn.Conv2d(in_ch, out_ch, 3, padding=1), nn.ReLU(), nn.Conv2d(out_ch, out_ch, 3, padding=1), nn.ReLU()
        )


class UNet(nn.Module):
    """The original U-Net: ConvBlock → MaxPool on the way down, UpConv → Concat → ConvBlock on the way up.

    Ronneberger et al. 2015 (arXiv:1505.04597), adapted for a fair comparison. The convolutions are padded; the paper's
    lose a border. Each width is one level that ends in a pool, so four widths give four pools, as in the paper, and the
    resolutions of the Diffusion U-Net. The middle keeps the lowest level's width, as in the Diffusion U-Net; the paper
    doubles it (`middle_ch`). There is no time embedding.
    """

    def __init__(self, in_ch: int, widths: Sequence[int], middle_ch: int | None = None) -> None:
        super().__init__()
        self.downs = nn.ModuleList()
        ch = in_ch
        for width in widths:
            self.downs.append(ConvBlock(ch, width))
            ch = width
        self.middle = ConvBlock(ch, middle_ch or ch)
        ch = middle_ch or ch
        self.ups = nn.ModuleList()
        for width in reversed(widths):
            self.ups.append(nn.ConvTranspose2d(ch, width, 2, stride=2))
            self.ups.append(ConvBlock(2 * width, width))
            ch = width
        self.final_conv = nn.Conv2d(ch, in_ch, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, C, H, W] to [B, C, H, W]."""
        skips = []
        for block in self.downs:
            x = block(x)
            skips.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.middle(x)
        for up, block in zip(self.ups[::2], self.ups[1::2], strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        out: Tensor = self.final_conv(x)
        return out


def diffusion_unet(widths: Sequence[int] = WIDTHS, *, input_skip: bool = False) -> DiffusionUNet:
    """The Diffusion U-Net, by default the bare skeleton."""
    return DiffusionUNet(3, widths[0], [width // widths[0] for width in widths], input_skip=input_skip)


def original_unet(widths: Sequence[int] = WIDTHS, middle_ch: int | None = None) -> UNet:
    """The original U-Net."""
    return UNet(3, widths, middle_ch)


def ddpm_cifar10(widths: Sequence[int] = (128, 256, 256, 256), size: int = SIZE) -> nn.Module:
    """The network of Ho et al. 2020 for CIFAR-10 (diffusers' google/ddpm-cifar10-32)."""
    import diffusers

    from bench.architectures import CIFAR10

    build: Any = diffusers.UNet2DModel
    network: nn.Module = build(**{**CIFAR10, "sample_size": size, "block_out_channels": tuple(widths)})
    return network


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "Diffusion U-Net": diffusion_unet,
    "Original U-Net": original_unet,
    "DDPM, CIFAR-10": ddpm_cifar10,
}
VARIANTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "Diffusion U-Net": (diffusion_unet, 32),
    "Diffusion U-Net with `input_skip`": (partial(diffusion_unet, input_skip=True), 32),
    "Original U-Net": (original_unet, 32),
    "Original U-Net, the middle doubled to 2048": (partial(original_unet, middle_ch=2048), 32),
    "DDPM, CIFAR-10": (ddpm_cifar10, 32),
    "Diffusion U-Net, all levels 128 wide": (partial(diffusion_unet, (128,) * 4), 32),
    "Original U-Net, all levels 128 wide": (partial(original_unet, (128,) * 4), 32),
    "Diffusion U-Net at 64×64": (diffusion_unet, 64),
    "Original U-Net at 64×64": (original_unet, 64),
    "DDPM, CIFAR-10, at 64×64": (ddpm_cifar10, 64),
}


@dataclass
class Work:
    """The MACs of one image by (part, resolution), the counted layers' weights by resolution, and all parameters."""

    macs: Counter[tuple[str, int]] = field(default_factory=Counter)
    weights: Counter[int] = field(default_factory=Counter)
    params: int = 0

    def sum(self, parts: Sequence[str] = PARTS, side: int | None = None) -> int:
        """The sum of the MACs of some parts, at one resolution or at all."""
        return sum(n for (part, s), n in self.macs.items() if part in parts and side in (None, s))

    def sides(self) -> list[int]:
        """The resolutions, highest first. The time embedding comes last."""
        return sorted({side for _, side in self.macs}, reverse=True)


def run(network: nn.Module, size: int, device: str = "cpu") -> Tensor:
    """Run the network on one image."""
    x = torch.zeros(1, 3, size, size, device=device)
    t = torch.zeros(1, dtype=torch.int64, device=device)
    with torch.no_grad():
        out = network(x) if isinstance(network, UNet) else network(x, t)
    result: Tensor = out if isinstance(out, Tensor) else out.sample
    return result


def count(build: Callable[[], nn.Module], size: int = SIZE) -> Work:
    """Build a network on the meta device, run it there and count."""
    with torch.device("meta"):
        network = build()
    work = Work(params=sum(p.numel() for p in network.parameters()))

    def hook(part: str, layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        side = _side(out)
        if isinstance(layer, nn.ConvTranspose2d):
            macs = args[0][0, 0].numel() * layer.weight.numel()  # each input pixel meets the whole kernel
        elif isinstance(layer, nn.Conv2d):
            macs = out[0, 0].numel() * layer.weight.numel()  # each output pixel meets the whole kernel
        elif isinstance(layer, nn.Linear):
            macs = out[..., 0].numel() * layer.weight.numel()
        else:  # attention over N positions, whatever the number of heads: N²·C for Q·Kᵀ and N²·C for weights·V
            macs = 2 * side**4 * out.shape[1]
        work.macs[part, side] += macs
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            work.weights[side] += layer.weight.numel()

    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) or type(layer).__name__ == "Attention":
            layer.register_forward_hook(partial(hook, _part(network, name)))
    run(network, size, "meta")
    return work


def _side(out: Tensor) -> int:
    """The resolution of a square output."""
    if out.ndim == 4:
        return out.shape[-1]
    return isqrt(out.shape[1]) if out.ndim == 3 else TIME  # [B, H·W, C] in attention, [B, C] on the time embedding


def _part(network: nn.Module, name: str) -> str:
    """The part with the layer of this name."""
    path = name.split(".")
    for length in range(len(path), 0, -1):
        kind = type(network.get_submodule(".".join(path[:length]))).__name__
        if kind in PART_OF_CLASS:
            return PART_OF_CLASS[kind]
    return PART_OF_ATTRIBUTE[path[0]]


def report() -> str:
    """The tables of docs/unet.md."""
    tables = [_table(name, count(build)) for name, build in NETWORKS.items()]
    lines = [
        "| | MACs, M | decoder's share | at full size: all | decoder | at a quarter or less: all | decoder |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, (build, size) in VARIANTS.items():
        work = count(build, size)
        low = [side for side in work.sides() if TIME < side <= size // 4]
        total, decoder = work.sum(), work.sum(DECODER)
        shares = [
            decoder / total,
            work.sum(side=size) / total,
            work.sum(DECODER, size) / decoder,
            sum(work.sum(side=side) for side in low) / total,
            sum(work.sum(DECODER, side) for side in low) / decoder,
        ]
        lines.append(f"| {name} | {total / 1e6:,.0f} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n\n".join([*tables, "\n".join(lines)])


def _table(name: str, work: Work) -> str:
    total, weights = work.sum(), work.weights.total()
    lines = [
        f"| {name}: million MACs | " + " | ".join(PARTS) + " | all | share | weights |",
        "|---|" + "--:|" * (len(PARTS) + 3),
    ]
    for side in work.sides():
        cells = [f"{work.macs[part, side] / 1e6:,.1f}" if work.macs[part, side] else "" for part in PARTS]
        at_side = work.sum(side=side)
        cells += [f"{at_side / 1e6:,.1f}", f"{at_side / total:.1%}", f"{work.weights[side] / weights:.1%}"]
        lines.append(f"| {'time embedding' if side == TIME else f'{side}×{side}'} | " + " | ".join(cells) + " |")
    parts = [work.sum([part]) for part in PARTS]
    lines.append("| all | " + " | ".join(f"{n / 1e6:,.1f}" for n in [*parts, total]) + f" | | {work.params:,} |")
    lines.append("| share | " + " | ".join(f"{n / total:.1%}" for n in parts) + " | 100% | | |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Draw the tables: resolutions from top to bottom, the encoder on the left, the decoder on the right."""
    from matplotlib.figure import Figure

    left = {"encoder": "#4477aa", "Downsample": "#99bbdd"}
    right = {"middle": "#999999", "decoder": "#bb5511", "Upsample": "#f2b880"}
    names = {"encoder": "encoder blocks", "decoder": "decoder blocks", "Upsample": "Upsample, UpConv"}
    figure = Figure(figsize=(9.5, 8), layout="constrained", facecolor="white")
    panels = figure.subplots(len(NETWORKS), 1, sharex=True)
    for axes, (title, build) in zip(panels, NETWORKS.items(), strict=True):
        work = count(build)
        sides = [side for side in work.sides() if side != TIME]
        rows = range(len(sides))
        for colours, sign in ((left, -1), (right, 1)):
            start = [0.0] * len(sides)
            for part, colour in colours.items():
                shares = [100 * work.macs[part, side] / work.sum() for side in sides]
                widths = [sign * share for share in shares]
                bars = axes.barh(rows, widths, 0.72, left=start, color=colour, label=names.get(part, part))
                texts = [f"{share:.0f}%" if share >= 1.5 else "" for share in shares]
                ink = "white" if part in ("encoder", "decoder") else "black"
                axes.bar_label(bars, texts, label_type="center", color=ink)
                start = [at + width for at, width in zip(start, widths, strict=True)]
        size = f"{work.sum() / 1e9:.2f} G multiply-accumulates, {work.params / 1e6:.0f} M parameters"
        axes.set_title(f"{title}: {size}", loc="left", fontsize=11)
        axes.set_yticks(rows, [f"{side}×{side}" for side in sides])
        axes.invert_yaxis()
        axes.set_ylabel("resolution")
        axes.axvline(0, color="black", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("share of the network's multiply-accumulates (left: encoder; right: middle and decoder)")
    panels[-1].xaxis.set_major_formatter(lambda value, _: f"{abs(value):.0f}%")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print the tables, and draw the figure if a path is given."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--figure", type=Path, help="where to write the figure: a .png or .svg path; needs matplotlib")
    args = parser.parse_args()
    print(report())
    if args.figure:
        draw(args.figure)


if __name__ == "__main__":
    main()
