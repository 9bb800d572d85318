"""A client of Stepwise: images, streams of events, denoising and noise, over HTTP.

    client.py           Client and AsyncClient
    flows.py            what they send, and when again, without sending it
    requests.py         what can be asked for, once
    events.py           event streams, read
    results.py          what is answered, as values
    answers.py          what is answered, read
    shapes.py           whether an answer has the shape that docs/api.md says
    way.py              what the environment says of proxies and certificates
    errors.py           the tree of errors
    recipe.py           the recipe in a PNG
    unet.py             a server in the place of a diffusers pipeline's U-Net; needs torch, so it is not imported here
    cli/                the command line

It needs httpx and NumPy.
"""

from stepwise.client import DEFAULT_URL, AsyncClient, Client
from stepwise.errors import (
    ApiError,
    BadRequest,
    DeadlinePassed,
    FieldError,
    Invalid,
    ServerFailed,
    StepwiseError,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unreachable,
)
from stepwise.recipe import read_recipe
from stepwise.results import Done, Drawn, Event, Image, ImageDone, Info, Noisy, NoisyArray, Preview, Progress, Queued

__all__ = [
    "DEFAULT_URL",
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Client",
    "DeadlinePassed",
    "Done",
    "Drawn",
    "Event",
    "FieldError",
    "Image",
    "ImageDone",
    "Info",
    "Invalid",
    "Noisy",
    "NoisyArray",
    "Preview",
    "Progress",
    "Queued",
    "ServerFailed",
    "StepwiseError",
    "TooManyRequests",
    "Unauthorized",
    "Unavailable",
    "Unreachable",
    "read_recipe",
]
