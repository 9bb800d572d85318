"""The first stage at work: latents → images and back, each on a backend of its own."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.backend import Backend
from model.backends.choose import Choice, choose
from model.backends.network import decoder, encoder
from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder
from model.rows import Image

_PLACES = 1024  # of latents, that a preview is fitted to
_RCOND = 1e-4  # channels that follow from others, but for rounding, tell nothing
_SCALES = (1, 2, 4, 8, 16)  # of the colours in an image that it is fitted with, in places across


class FirstStage:
    """Runs an autoencoder. Implements model.rows.FirstStage.

    Args:
        unscaled: what is decoded of latents, Autoencoder.unscaled: in float32, whatever backends compute in.
        decoder, encoder: the autoencoder's halves.
        image_shape: (C, H, W) of images.
    """

    def __init__(
        self,
        unscaled: Callable[[Tensor], Tensor],
        decoder: Backend,
        encoder: Backend,
        image_shape: tuple[int, int, int],
    ) -> None:
        self._unscaled = unscaled
        self._decoder = decoder
        self._encoder = encoder
        cuda = decoder.device.type == "cuda"
        self._stream = torch.cuda.Stream(decoder.device) if cuda else None  # type: ignore[no-untyped-call]
        self._preview = fitted(self.encode, image_shape)

    @property
    def widths(self) -> Sequence[int]:
        return self._decoder.widths

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """All of decoding that can move a bit of an image, by name: on a GPU also how wide a pass has room."""
        return {f"decoder_{name}": value for name, value in self._decoder.fingerprint.items()}

    @property
    def reproducible(self) -> bool:
        """Whether an image was seen to have the same bits alone and among others."""
        return self._decoder.reproducible

    @torch.inference_mode()
    def decode(self, latents: Sequence[Image]) -> list[Image]:
        with self._on_its_stream():
            z = self._decoder.send(torch.stack([torch.from_numpy(one) for one in latents]))
            images = _run(self._decoder, self._unscaled(z))
        return [image.numpy().copy() for image in images]

    @torch.inference_mode()
    def encode(self, image: Image) -> Image:
        with self._on_its_stream():
            [latents] = _run(self._encoder, self._encoder.send(torch.from_numpy(image)[None]))
        found: Image = latents.numpy().copy()
        return found

    def preview(self, latents: Image) -> Image:
        return self._preview.of(latents)

    def _on_its_stream(self) -> AbstractContextManager[object]:
        """So that a GPU's next pass does not wait for what is done here."""
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)


def choose_first_stage(
    autoencoder: Autoencoder,
    model: ModelDescription,
    device: torch.device,
    precision: Choice,
    threads: int,
    cache_dir: Path | None,
) -> FirstStage:
    """The best backends for an autoencoder. Arguments are as those of `choose`."""
    decodes = choose(decoder(autoencoder, model), device, precision, threads, None, cache_dir)
    encodes = choose(encoder(autoencoder, model), device, precision, threads, 1, cache_dir)
    return FirstStage(autoencoder.unscaled, decodes, encodes, model.image_shape)


def _run(backend: Backend, x: Tensor) -> Tensor:
    """A pass of a network that knows neither timesteps nor labels. The output on the CPU."""
    nothing = torch.zeros(len(x), dtype=torch.int64, device=backend.device)
    return backend.start(x, nothing, nothing)().cpu()


class Preview(NamedTuple):
    """A linear map of latents to colours.

    Attributes:
        weight, bias: [C, c] and [C], of latents with c channels and images with C.
        image_shape: (C, H, W).
    """

    weight: Tensor
    bias: Tensor
    image_shape: tuple[int, int, int]

    def of(self, latents: Image) -> Image:
        """Map latents [c, h, w] to a blurred image, [C, H, W]."""
        z = torch.from_numpy(latents)
        small = (self.weight[:, :, None, None] * z).sum(dim=1) + self.bias[:, None, None]
        image: Image = F.interpolate(small[None], self.image_shape[1:], mode="bilinear")[0].numpy()
        return image


def fitted(encode: Callable[[Image], Image], image_shape: tuple[int, int, int]) -> Preview:
    """The map that comes closest, in the least squares, to the mean colour of each latent's part of an image.

    It is fitted with random clouds of colour, for at the start of a server there are no other images.
    """
    rng = torch.Generator().manual_seed(0)
    latents: list[Tensor] = []
    colours: list[Tensor] = []
    while sum(len(part) for part in latents) < _PLACES:
        image = _clouds(image_shape, rng)
        z = torch.from_numpy(encode(image.numpy()))
        latents.append(z.flatten(1).T)
        colours.append(F.adaptive_avg_pool2d(image, (z.shape[1], z.shape[2])).flatten(1).T)
    z = torch.cat(latents)
    if not z.isfinite().all():  # broken weights, of which the engine's warm-up tells; there is nothing to fit
        z = torch.zeros_like(z)
    known = torch.cat([z, torch.ones(len(z), 1)], dim=1)
    # torch's own choice of a driver, gelsy, reads memory that nobody has written. What is left in last bits is of where
    # memory lies: float32 does not hold those of float64.
    wanted = torch.cat(colours).double()
    solution = torch.linalg.lstsq(known.double(), wanted, rcond=_RCOND, driver="gelsd").solution.float()
    return Preview(solution[:-1].T.contiguous(), solution[-1], image_shape)


def _clouds(shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """An image [C, H, W] of random colours at several scales, many of them as bright or as dark as they can be."""
    channels, *size = shape
    layers = [torch.randn((1, channels, scale, scale), generator=rng) for scale in _SCALES]
    return sum(1.6 * F.interpolate(layer, size, mode="bilinear") for layer in layers)[0].clamp(-1, 1)  # type: ignore[index]
