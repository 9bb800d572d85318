"""The interface between the engine and a runner. Nothing here needs torch.

A row is one image in flight. Each step takes one forward row through the network for each branch of the row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from model.samplers import StepTable

Image = NDArray[np.float32]


class Group(NamedTuple):
    """What rows must have in common to share a pass. Outside `model`, this is only a key.

    Attributes:
        height, width: of an image, in pixels.
    """

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Fragment(NamedTuple):
    """A part of a prompt, with the weight of its tokens."""

    text: str
    weight: float = 1.0

    def __repr__(self) -> str:
        """Tells nothing of the prompt, because an error with a fragment in it may reach the log."""
        return f"Fragment({len(self.text)} characters)"


class Text(NamedTuple):
    """A prompt, ready for the text encoder. Equal texts have equal contexts.

    Attributes:
        ids: tokens, as many as the encoder takes.
        clip_skip: how many of each encoder's last layers are left out.
        ids_2: tokens for the second encoder; empty if there is none.
        weights: what the context of each token is multiplied by; empty if all are 1.
        weights_2: the same for the second encoder, which may have other tokens.
    """

    ids: tuple[int, ...]
    clip_skip: int = 0
    ids_2: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    weights_2: tuple[float, ...] = ()

    def __repr__(self) -> str:
        """Tells nothing of the prompt, because an error with a text in it may reach the log."""
        return f"Text({len(self.ids)} tokens)"


class Tokens(NamedTuple):
    """The tokens of a prompt.

    Attributes:
        ids: as many as the encoder takes, with its special tokens.
        cut: how many tokens of the prompt did not fit. With two encoders, the larger of both numbers.
        ids_2: for the second encoder; empty if there is none.
        weights, weights_2: of the tokens of each encoder; empty if all are 1.
    """

    ids: tuple[int, ...]
    cut: int
    ids_2: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    weights_2: tuple[float, ...] = ()

    def text(self, clip_skip: int = 0) -> Text:
        """The prompt, ready for the text encoders."""
        return Text(self.ids, clip_skip, self.ids_2, self.weights, self.weights_2)

    def __repr__(self) -> str:
        """Tells nothing of the prompt, as for `Text`."""
        return f"Tokens({len(self.ids)} tokens)"


# A prompt as it was written, or in fragments: each fragment becomes tokens alone.
Prompt = str | tuple[Fragment, ...]
Tokenize = Callable[[Prompt], Tokens]


class Context(NamedTuple):
    """What the text encoders make of a text.

    Attributes:
        tokens: float32 [tokens, channels].
        pooled: the text as one vector, float32 [channels]; None for networks that take none.
    """

    tokens: Image
    pooled: Image | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(np.isfinite(values).all()) for values in self if values is not None)

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum(values.nbytes for values in self if values is not None)


@dataclass(frozen=True, slots=True)
class Condition:
    """What the network is given beside x and the timestep, the same at each step of a row.

    Attributes:
        label: the class; None for no label.
        text: the prompt; None for no prompt: a network with text is then given zeros.
        context: what the text encoders make of `text`; None until then.
        time_ids: for networks that are told sizes (SDXL), in pixels: original height and width, top and left of the
            crop, target height and width. None for others.
        w: for networks that have guidance embedded (LCM), guidance_scale − 1. None for others.
    """

    label: int | None = None
    text: Text | None = None
    context: Context | None = field(default=None, compare=False, repr=False)
    time_ids: tuple[int, ...] | None = None
    w: float | None = None


class Moments(NamedTuple):
    """What a VAE's encoder makes of an image: a normal distribution of latents, scaled for the U-Net.

    Attributes:
        mean: [c, h, w].
        std: of each value, [c, h, w]. None if there is nothing to draw: for a VAE of kind vq, and where images are
            their own latents.
    """

    mean: Image
    std: Image | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(np.isfinite(values).all()) for values in self if values is not None)


@dataclass(frozen=True, eq=False)
class Source:
    """What a row begins from beside noise.

    A row's generator draws, in diffusers' order: latents of `image`, if there are moments to draw from; the first
    noise; with a mask, latents of the masked image, even where nothing uses them; then the noise of the steps.

    Attributes:
        image: None where only the masked image is needed.
        mask: of latents, bool [h, w]. True is drawn anew. None draws all of them anew.
        masked: of the image without what is drawn anew, for networks that inpaint (ModelDescription.inpaints). None for
            others: what the mask keeps is blended into their rows after each line.
        from_noise: whether the row begins from the first noise alone, as an inpainted one does at strength 1. Other
            rows begin from the image and the first noise, at the first of their table's levels.
    """

    image: Moments | None = None
    mask: NDArray[np.bool_] | None = None
    masked: Moments | None = None
    from_noise: bool = False

    @classmethod
    def of_nothing(cls, shape: tuple[int, int, int]) -> "Source":
        """A source that keeps nothing of an image, for networks that inpaint. `shape` is that of latents."""
        return cls(mask=np.ones(shape[1:], bool), masked=Moments(np.zeros(shape, np.float32)), from_noise=True)


@dataclass(frozen=True, eq=False)
class Row:
    """An image to make.

    Attributes:
        table: its steps. A row whose table has no lines goes to no runner. Only the stages beside denoising work on it.
        seed: of the row's own generator. The first draw is the pure noise that the row starts from.
        group: of the row. The row goes to the runner of this group.
        start: the image or latents to start from instead, [C, H, W]. The first draw is then dropped.
        source: what the row begins from beside noise; None for noise alone.
        branches: the conditions of the predictions that guidance combines. The first is the row's own, the last is the
            negative one, such as "no label". A row without guidance has one branch.
        guidance_scale: of classifier-free guidance; unused with one branch.
        guidance_rescale: φ of Lin et al. 2023, arXiv:2305.08891, section 3.4: how far the standard deviation of a
            guided prediction moves to that of the row's own prediction; unused with one branch.
        guidance_interval: from and to, in 0 … 1. Line i of N lines is guided if from <= i/N < to. The other lines use
            the first branch alone.
        model_output: return the network's prediction at the last step instead of the image.
        latent: in latent diffusion, return the latents instead of the image.
        finish: maps the finished image, [C, H, W], to the image that is checked and answered; None changes nothing.
    """

    table: StepTable
    seed: int
    group: Group
    start: Image | None = None
    source: Source | None = None
    branches: tuple[Condition, ...] = (Condition(),)
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    model_output: bool = False
    latent: bool = False
    finish: Callable[[Image], Image] | None = None

    @property
    def is_decoded(self) -> bool:
        """Whether the result is decoded, if the network denoises latents."""
        return not (self.model_output or self.latent)

    @property
    def texts(self) -> list[Text]:
        """The texts that are still to be encoded, each once."""
        waiting = (one.text for one in self.branches if one.text is not None and one.context is None)
        return list(dict.fromkeys(waiting))

    def with_contexts(self, contexts: Mapping[Text, Context]) -> "Row":
        """The row with the contexts of its texts."""
        return replace(
            self,
            branches=tuple(
                one if one.text is None or one.context is not None else replace(one, context=contexts[one.text])
                for one in self.branches
            ),
        )

    def without_contexts(self) -> "Row":
        """The row as it was before its texts were encoded."""
        return replace(self, branches=tuple(replace(one, context=None) for one in self.branches))

    @cached_property
    def forwards(self) -> tuple[int, ...]:
        """The forward rows of each line: the number of branches where the line is guided, else 1."""
        N, (begin, end) = len(self.table), self.guidance_interval
        return tuple(len(self.branches) if begin <= i / N < end else 1 for i in range(N))


class Forward(NamedTuple):
    """One row of a forward pass.

    Attributes:
        slot: the row's slot in the runner.
        branch: index of a condition in the row's branches, below the row's `forwards` of this line.
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
    """Maps images of one group to latents and back.

    Calls of `decode` must not overlap each other, and calls of `encode` neither. One of each may run at once.
    """

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes at which decoding runs, rising. A batch has at most the last number of images."""

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        """Map at most the last width of latents, as the network has them, [c, h, w] each, to images, [C, H, W] each.

        The same latents give the same bits in any batch.
        """

    def encode(self, image: Image) -> Moments:
        """Map an image, [C, H, W], to its latents."""

    def preview(self, latents: Image) -> Image:
        """A rough image of latents, [C, H, W], at almost no cost. Any thread may call this at any time."""


class TextEncoder(Protocol):
    """Maps texts to contexts. Calls must not overlap each other."""

    def encode(self, text: Text) -> Context:
        """Map a text to its context. The same text gives the same bits."""


class Runner(Protocol):
    """Owns the network and the state of rows in flight, all of one group. All calls come from one thread."""

    @property
    def widths(self) -> Sequence[int]:
        """The batch sizes at which forward passes run, rising. A pass has at most the last number of rows."""

    def admit(self, row: Row) -> int:
        """Give a row a slot, and return the slot. A row keeps its slot while others overtake it."""

    def step(self, forwards: Sequence[Forward]) -> None:
        """Run one forward pass.

        A row takes its step at a line when all branches have run that its `forwards` counts, in one pass or in several.
        The runner does not track progress: each forward row names its line.

        If the network raises, no row has changed, and the same rows can run again.
        """

    def read(self, slot: int) -> Reading:
        """Copy out the state of a row."""

    def release(self, slot: int) -> None:
        """Free a slot, whatever the state of its row."""
