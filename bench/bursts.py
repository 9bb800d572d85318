"""Bursts that keep a server full: many requests at once, one image each, all with the same number of steps."""

from dataclasses import dataclass, field
from pathlib import Path

from bench.architectures import SMALL, write
from bench.load import Fields, closed_loop
from bench.servers import Server
from service.build import BOX


@dataclass(frozen=True)
class Burst:
    """A model and the requests to it.

    Attributes:
        name: of the model.
        images: number of images.
        clients: number of requests in flight.
        sampler, steps, guidance_scale: of each image.
        fields: further fields of each request.
    """

    name: str
    images: int
    clients: int
    sampler: str
    steps: int
    guidance_scale: float = 1.0
    fields: Fields = field(default_factory=dict)

    @property
    def rows_per_step(self) -> int:
        """Forward rows of an image's step: two with guidance."""
        return 1 if self.guidance_scale == 1 else 2

    @property
    def rows_per_image(self) -> int:
        return self.steps * self.rows_per_step

    def requests(self, seed: int) -> list[Fields]:
        asked: Fields = {"sampler": self.sampler, "num_inference_steps": self.steps, **self.fields}
        if self.guidance_scale != 1:
            asked = {**asked, "guidance_scale": self.guidance_scale}
        return [{**asked, "seed": seed + i} for i in range(self.images)]

    def images_per_s(self, server: Server, seed: int) -> float:
        """The server's images a second. The server sleeps before and afterwards."""
        with server.awake():
            return self.images / closed_loop(server.url, self.requests(seed), self.clients)


BURSTS = (
    Burst("small", 32, 32, "ddim", 20),
    Burst("digits", 128, 32, "dpmpp_2m", 15, 1.3, {"class_label": 3}),
    Burst("digits-4step", 512, 32, "ddim", 4, fields={"class_label": 3}),
)


def weights_of(burst: Burst, work: Path) -> Path:
    """The folder of a burst's weights. Weights that are not in the box are written into `work`."""
    if burst.name != "small":
        return BOX / burst.name
    folder = work / burst.name
    if not folder.exists():
        write(folder, SMALL)
    return folder
