"""A server of latent diffusion without a model: the runner and the first stage of tests.engines, in shapes of its own.

The runner's latents are [1, 1, 2], and images [3, 2, 4]: each latent is a grey square of 2x2 pixels.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from model.description import FirstStageDescription
from model.rows import Image, Row
from tests.engines import FakeFirstStage, FakeRunner
from tests.local import MODEL, SERVED, FakeServer, locally, no_complaints
from tests.servers import PATIENCE

SCALE = np.float32(16)  # so that the runner's first latents are in the range of an image


def enlarged(latents: Image) -> Image:
    """[1, 1, 2] → [3, 2, 4]"""
    return np.broadcast_to(latents.repeat(2, 1).repeat(2, 2) / SCALE, (3, 2, 4))


def shrunk(image: Image) -> Image:
    """[3, 2, 4] → [1, 1, 2], by the mean."""
    means: Image = image.reshape(3, 2, 2, 2).mean(axis=(0, 1, 3), dtype=np.float32)[None, None]
    return means * SCALE


def decoded(latents: Image) -> Image:
    return enlarged(latents + np.array([0.0, 0.5], np.float32))


def encoded(image: Image) -> Image:
    return shrunk(image) - np.array([0.0, 0.5], np.float32)


def rough(latents: Image) -> Image:
    """No image of the decoder's, so that a test can tell them apart."""
    return enlarged(-latents)


class Enlarging(FakeFirstStage):
    """Computes `decoded` and `encoded`."""

    def decode(self, latents: Sequence[Image]) -> list[Image]:
        return [enlarged(image) for image in super().decode(latents)]

    def encode(self, image: Image) -> Image:
        return super().encode(shrunk(image))

    def preview(self, latents: Image) -> Image:
        return rough(latents)


class Remembering(FakeRunner):
    """Keeps the rows that it was given."""

    def __init__(self, pass_s: float) -> None:
        super().__init__(dict.fromkeys((1, 2, 4), pass_s))
        self.given: list[Row] = []

    def admit(self, row: Row) -> int:
        self.given.append(row)
        return super().admit(row)


LATENT = replace(
    SERVED,
    model=replace(MODEL, image_shape=(3, 2, 4), first_stage=FirstStageDescription("kl", 2, 0.5, 7)),
    preview=rough,
)


class LatentServer(FakeServer):
    """Serves LATENT. A test may hold both passes and decoding.

    Args:
        pass_s: what a pass takes on the runner's clock.
    """

    def __init__(self, pass_s: float = 1.0, **settings: Any) -> None:
        self.remembering = Remembering(pass_s)
        self.first_stage = Enlarging({1: 1.0, 4: 2.0}, self.remembering.clock)
        super().__init__(self.remembering, LATENT, self.first_stage, **settings)

    def stop(self) -> None:
        self.first_stage.let_go()
        super().stop()
        assert self.first_stage.complaints == []

    @property
    def row(self) -> Row:
        """The one that was last given to the runner."""
        return self.remembering.given[-1]


@contextmanager
def serving_latents(pass_s: float = 1.0, **settings: Any) -> Iterator[LatentServer]:
    server = LatentServer(pass_s, **settings)
    with no_complaints(), locally(server):
        assert server.engine.wait_loaded(PATIENCE)
        server.first_stage.calls.clear()
        yield server
