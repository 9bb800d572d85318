"""The VAE at work: encodes and decodes, each on its own backend, and makes previews."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backends.backend import Backend, own_stream
from model.backends.choose import Choice, choose
from model.backends.network import decoder, encoder
from model.description import ModelDescription
from model.nets.autoencoder import Autoencoder
from model.rows import Group, Image, Moments

_POSITIONS = 1024  # latent positions that the preview is fitted to, at least
_RCOND = 1e-4  # ignores channels that, but for rounding, depend on other channels
_SCALES = (1, 2, 4, 8, 16)  # sizes of the random colour grids in an image


class VAE:
    """Runs an autoencoder on images of one size. Implements model.rows.VAE.

    Args:
        unscaled: Autoencoder.unscaled, in float32 whatever the backends' precision.
        decoder, encoder: the backends of the autoencoder's halves.
        image_shape: (C, H, W) of images.
        like: the VAE of another size, which makes the same previews; None fits them.
    """

    def __init__(
        self,
        unscaled: Callable[[Tensor], Tensor],
        decoder: Backend,
        encoder: Backend,
        image_shape: tuple[int, int, int],
        like: "VAE | None" = None,
    ) -> None:
        self._unscaled = unscaled
        self._decoder = decoder
        self._encoder = encoder
        self._on_its_stream = own_stream(decoder.device)
        self._preview: Preview = (
            fitted(lambda image: self.encode(image).mean, image_shape) if like is None else like._preview
        )

    @property
    def widths(self) -> Sequence[int]:
        return self._decoder.widths

    @property
    def fingerprint(self) -> dict[str, str | int]:
        """Everything in decoding that can change a bit of an image, by name."""
        return {f"decoder_{name}": value for name, value in self._decoder.fingerprint.items()}

    @property
    def reproducible(self) -> bool:
        """Whether an image had the same bits alone and in a full pass, when this was tried."""
        return self._decoder.reproducible

    def prepare(self) -> None:
        """Compile what is not compiled yet. See model.backends.backend.Backend.prepare."""
        self._decoder.prepare()
        self._encoder.prepare()

    @torch.inference_mode()
    def decode(self, latents: Sequence[Image]) -> list[Image]:
        with self._on_its_stream():
            z = self._decoder.send(torch.stack([torch.from_numpy(one) for one in latents]))
            images = _run(self._decoder, self._unscaled(z))
        return [image.numpy().copy() for image in images]

    @torch.inference_mode()
    def encode(self, image: Image) -> Moments:
        with self._on_its_stream():
            [latents] = _run(self._encoder, self._encoder.send(torch.from_numpy(image)[None]))
        return Moments(*latents.numpy().copy())

    def preview(self, latents: Image) -> Image:
        return self._preview.of(latents)


def choose_vae(
    autoencoder: Autoencoder,
    model: ModelDescription,
    device: torch.device,
    precision: Choice,
    threads: int,
    cache_dir: Path | None,
) -> Callable[[Group, VAE | None], VAE]:
    """Choose the best backends for the VAE. The arguments, and errors of the returned function, are those of `choose`.

    Returns:
        A function that makes the VAE of a group. Its second argument is VAE's `like`.
    """
    decodes = choose(decoder(autoencoder, model), device, precision, threads, None, cache_dir)
    encodes = choose(encoder(autoencoder, model), device, precision, threads, 1, cache_dir)
    unscaled = autoencoder.unscaled

    def make(group: Group, like: VAE | None) -> VAE:
        image_shape = model.image_shape_of(group)
        return VAE(unscaled, decodes(model.sample_shape_of(group)), encodes(image_shape), image_shape, like)

    return make


def _run(backend: Backend, x: Tensor) -> Tensor:
    """Run a pass. The output is on the CPU."""
    return backend.start({"x": x})().cpu()


class Preview(NamedTuple):
    """A linear map from latent channels to colours.

    Attributes:
        weight, bias: [C, c] and [C], for latents with c channels and images with C.
        factor: image height divided by latent height; the same for widths.
    """

    weight: Tensor
    bias: Tensor
    factor: int

    def of(self, latents: Image) -> Image:
        """Map latents [c, h, w] to a blurred image [C, factor·h, factor·w]."""
        z = torch.from_numpy(latents)
        small = (self.weight[:, :, None, None] * z).sum(dim=1) + self.bias[:, None, None]
        size = [side * self.factor for side in latents.shape[1:]]
        image: Image = F.interpolate(small[None], size, mode="bilinear")[0].numpy()
        return image


def fitted(encode: Callable[[Image], Image], image_shape: tuple[int, int, int]) -> Preview:
    """The least-squares fit from each latent to the mean colour of its part of the image.

    The images are random colours, because a starting server has no others.
    """
    rng = torch.Generator().manual_seed(0)
    latents: list[Tensor] = []
    colours: list[Tensor] = []
    while sum(len(part) for part in latents) < _POSITIONS:
        image = _colours(image_shape, rng)
        z = torch.from_numpy(encode(image.numpy()))
        factor = image_shape[1] // z.shape[1]
        latents.append(z.flatten(1).T)
        colours.append(F.adaptive_avg_pool2d(image, (z.shape[1], z.shape[2])).flatten(1).T)
    z = torch.cat(latents)
    if not z.isfinite().all():  # broken weights: nothing to fit, and the engine's warm-up reports them
        z = torch.zeros_like(z)
    known = torch.cat([z, torch.ones(len(z), 1)], dim=1)
    # torch's default driver, gelsy, reads uninitialised memory. gelsd's last bits depend on memory alignment, and
    # rounding from float64 to float32 drops them.
    wanted = torch.cat(colours).double()
    solution = torch.linalg.lstsq(known.double(), wanted, rcond=_RCOND, driver="gelsd").solution.float()
    return Preview(solution[:-1].T.contiguous(), solution[-1], factor)


def _colours(shape: tuple[int, int, int], rng: torch.Generator) -> Tensor:
    """An image [C, H, W] of random colours at several scales. Many values are clipped at −1 or 1."""
    channels, *size = shape
    layers = [torch.randn((1, channels, scale, scale), generator=rng) for scale in _SCALES]
    return sum(1.6 * F.interpolate(layer, size, mode="bilinear") for layer in layers)[0].clamp(-1, 1)  # type: ignore[index]
