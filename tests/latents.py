"""A server of latent diffusion without a model, with the fake runner and VAE of tests.engines.

Latents are [1, 1, 2], and images [3, 2, 4]. Each latent becomes a grey square of 2x2 pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from model.description import VAEDescription
from model.rows import Group, Image, Moments, Row
from tests.engines import FakeRunner, FakeVAE, undisturbed
from tests.local import MODEL, SERVED, FakeServer, locally, no_complaints
from tests.servers import PATIENCE

SCALE = np.float32(16)  # the runner's first latents are then valid image values


def enlarged(latents: Image) -> Image:
    """Map latents [1, 1, 2] to an image [3, 2, 4]."""
    return np.broadcast_to(latents.repeat(2, 1).repeat(2, 2) / SCALE, (3, 2, 4))


def shrunk(image: Image) -> Image:
    """Map an image [3, 2, 4] to latents [1, 1, 2], by means."""
    means: Image = image.reshape(3, 2, 2, 2).mean(axis=(0, 1, 3), dtype=np.float32)[None, None]
    return means * SCALE


def decoded(latents: Image) -> Image:
    return enlarged(latents + np.array([0.0, 0.5], np.float32))


def encoded(image: Image) -> Image:
    return shrunk(image) - np.array([0.0, 0.5], np.float32)


def rough(latents: Image) -> Image:
    """A preview, which no decoded image equals."""
    return enlarged(-latents)


class Enlarging(FakeVAE):
    """A fake VAE that computes `decoded` and `encoded`."""

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        return [enlarged(image) for image in super().decode(latents)]

    def encode(self, image: Image) -> Moments:
        return Moments(*super().encode(shrunk(image)))

    def preview(self, latents: Image) -> Image:
        return rough(latents)


class Remembering(FakeRunner):
    """Remembers its rows."""

    def __init__(self, pass_s: float) -> None:
        super().__init__(dict.fromkeys((1, 2, 4), pass_s))
        self.given: list[Row] = []

    def admit(self, row: Row) -> int:
        self.given.append(row)
        return super().admit(row)


LATENT = replace(
    SERVED,
    model=replace(MODEL, image_shape=(3, 2, 4), vae=VAEDescription("kl", 2, 0.5, 7)),
    groups=(Group(2, 4),),
    preview=rough,
)


class LatentServer(FakeServer):
    """Serves LATENT. A test may hold passes and decoding.

    Args:
        pass_s: seconds of a pass on the runner's clock.
    """

    def __init__(self, pass_s: float = 1.0, **settings: Any) -> None:
        self.remembering = Remembering(pass_s)
        self.vae = Enlarging({1: 1.0, 4: 2.0}, self.remembering.clock)
        super().__init__(self.remembering, LATENT, self.vae, **settings)

    def stop(self) -> None:
        self.vae.let_go()
        super().stop()
        assert self.vae.complaints == []

    @property
    def row(self) -> Row:
        """The row that the runner admitted last."""
        return self.remembering.given[-1]


@contextmanager
def serving_latents(pass_s: float = 1.0, **settings: Any) -> Iterator[LatentServer]:
    server = LatentServer(pass_s, **settings)
    with no_complaints(), undisturbed(), locally(server):
        assert server.engine.wait_loaded(PATIENCE)
        server.vae.calls.clear()
        yield server
