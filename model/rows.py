"""The interface between the engine and a runner. Nothing here needs torch.

A row is one image in flight. Each step takes one forward row through the network, or two with guidance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.samplers import StepTable

Image = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """An image to make.

    Attributes:
        table: its steps.
        seed: of the row's own generator. The first draw is the pure noise that the row starts from.
        start: the image or latents to start from instead, [C, H, W]. The first draw is then dropped.
        label: the row's class; None for no label.
        guidance_scale: of classifier-free guidance; 1 is off.
        model_output: return the network's prediction at the last step instead of the image.
        latent: in latent diffusion, return the latents instead of the image.
    """

    table: StepTable
    seed: int
    start: Image | None = None
    label: int | None = None
    guidance_scale: float = 1.0
    model_output: bool = False
    latent: bool = False

    @property
    def is_decoded(self) -> bool:
        """Whether the result is decoded, if the network denoises latents."""
        return not (self.model_output or self.latent)

    @property
    def forwards_per_step(self) -> int:
        return 1 if self.guidance_scale == 1.0 else 2


class Forward(NamedTuple):
    """One row of a forward pass.

    Attributes:
        slot: the row's slot in the runner.
        branch: 0 has the row's own label; 1, only of a guided row, has none.
        line: index of the step to take, in the row's step table.
    """

    slot: int
    branch: int
    line: int


class Reading(NamedTuple):
    """The state of a row: the image, and the last estimate of x_0, [C, H, W] each.

    For a finished `model_output` row, `x` holds the network's prediction, [out_channels, H, W], instead of the image.
    """

    x: Image
    x0: Image


class VAE(Protocol):
    """Maps images to latents and back. Calls must not overlap."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes at which decoding runs, rising. A batch has at most the last number of images."""

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        """Map at most the last width of latents, as the network has them, [c, h, w] each, to images, [C, H, W] each.

        The same latents give the same bits in any batch.
        """

    def encode(self, image: Image) -> Image:
        """Map an image, [C, H, W], to the mean of its latents, [c, h, w]."""

    def preview(self, latents: Image) -> Image:
        """A rough image of latents, [C, H, W], at almost no cost. Any thread may call this at any time."""


class Runner(Protocol):
    """Owns the network and the state of rows in flight. All calls come from one thread."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes at which forward passes run, rising. A pass has at most the last number of rows."""

    def admit(self, row: Row) -> int:
        """Give a row a slot, and return the slot. A row keeps its slot while others overtake it."""

    def step(self, forwards: Sequence[Forward]) -> None:
        """Run one forward pass. A row takes its step once all its branches have run, in one pass or in several.

        The runner does not track progress: each forward row has the line to take.

        If the network raises, no row has changed, and the same rows can run again.
        """

    def read(self, slot: int) -> Reading:
        """Copy out the state of a row."""

    def release(self, slot: int) -> None:
        """Free a slot, whatever the state of its row."""
