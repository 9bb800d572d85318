"""Bursts that keep a server full: so many requests of one image at once, all with the same number of steps."""

from dataclasses import dataclass, field
from pathlib import Path

from bench.architectures import SMALL, write
from bench.load import Fields, closed_loop
from bench.servers import Server
from service.build import BOX


@dataclass(frozen=True)
class Burst:
    """A model and what it is asked for.

    Attributes:
        name: of the model.
        images: how many.
        clients: how many of them are asked for at a time.
        sampler, steps, guidance_scale: of each image.
        fields: what else a request has.
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
        """Rows of passes that a step of an image takes: two with guidance."""
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
        """What a server draws, which sleeps before and afterwards."""
        with server.awake():
            return self.images / closed_loop(server.url, self.requests(seed), self.clients)


BURSTS = (
    Burst("small", 32, 32, "ddim", 20),
    Burst("digits", 128, 32, "dpmpp_2m", 15, 1.3, {"class_label": 3}),
    Burst("digits-4step", 512, 32, "ddim", 4, fields={"class_label": 3}),
)


def weights_of(burst: Burst, work: Path) -> Path:
    """The folder of a burst's weights. Those that are not in the box are written into `work`."""
    if burst.name != "small":
        return BOX / burst.name
    folder = work / burst.name
    if not folder.exists():
        write(folder, SMALL)
    return folder
