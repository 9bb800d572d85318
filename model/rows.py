"""What the engine and a runner say to each other. Nothing here needs torch.

A row is one image on its way. Each step of it takes one forward row through the network, or two with guidance.
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
    """One image to make.

    Attributes:
        table: its steps.
        seed: of its own generator. The first draw is the image of pure noise that it starts from.
        start: what it starts from instead, [C, H, W], an image or latents; the first draw is then thrown away.
        label: its class; None for no label.
        guidance_scale: of classifier-free guidance; 1 is off.
        model_output: what is wanted is not the image but the network's prediction at the last step.
        latent: of latent diffusion: what is wanted is not the image but its latents.
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
        """Whether latents are decoded, where the network denoises latents."""
        return not (self.model_output or self.latent)

    @property
    def forwards_per_step(self) -> int:
        return 1 if self.guidance_scale == 1.0 else 2


class Forward(NamedTuple):
    """One row of a forward pass.

    Attributes:
        slot: where the runner holds the row.
        branch: 0 is with the row's own label; 1, of a guided row only, is without.
        line: of the row's step table, for the step that is to be taken.
    """

    slot: int
    branch: int
    line: int


class Reading(NamedTuple):
    """The state of a row: the image, and the last estimate of x_0, [C, H, W] each.

    For a row that wants the network's prediction and is done, `x` holds that instead, [out_channels, H, W].
    """

    x: Image
    x0: Image


class VAE(Protocol):
    """Images ↔ latents. No two calls at once."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that decoding really runs at, rising. The last is the most images of one batch."""

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        """Map latents as the network has them, [c, h, w] each, to images, [C, H, W] each. At most the last width.

        The same latents give the same bits in any company.
        """

    def encode(self, image: Image) -> Image:
        """Map an image, [C, H, W], to the mean of its latents, [c, h, w]."""

    def preview(self, latents: Image) -> Image:
        """A rough image of latents, [C, H, W], at next to no cost. May be called from any thread, at any time."""


class Runner(Protocol):
    """Owns the network and the state of the rows in flight. All calls come from one thread."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes that forward passes really run at, rising. The last is the most rows of one pass."""

    def admit(self, row: Row) -> int:
        """Give a row a slot, and return it. A row holds its slot also while others go first."""

    def step(self, forwards: Sequence[Forward]) -> None:
        """Run one forward pass. A row whose branches have all run takes its step; they may come in several passes.

        The runner does not know how far a row is: each forward row says which line of its table is to be taken.

        If the network raises, no row has changed, and the same rows can be run again.
        """

    def read(self, slot: int) -> Reading:
        """Copy out the state of a row."""

    def release(self, slot: int) -> None:
        """Free a slot, whatever its row's state."""
