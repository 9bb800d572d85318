"""A client of Stepwise: images, streams of events, denoising and noise, over HTTP.

    client.py           Client and AsyncClient
    flows.py            the steps of a call and its tries, without sending
    requests.py         each call of the API, once
    events.py           parses the events of a stream
    results.py          answers as values
    answers.py          parses answers
    shapes.py           checks that an answer has the shape in docs/api.md
    way.py              proxies and certificates from the environment
    errors.py           the tree of errors
    recipe.py           the recipe in a PNG
    unet.py             a server as the U-Net of a diffusers pipeline; needs torch, so it is not imported here
    cli/                the command line

The client needs httpx and NumPy.
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
from stepwise.results import (
    Done,
    Drawn,
    DrawnArray,
    Event,
    Image,
    ImageDone,
    Info,
    Noisy,
    NoisyArray,
    Picture,
    Preview,
    Progress,
    Queued,
)

__all__ = [
    "DEFAULT_URL",
    "ApiError",
    "AsyncClient",
    "BadRequest",
    "Client",
    "DeadlinePassed",
    "Done",
    "Drawn",
    "DrawnArray",
    "Event",
    "FieldError",
    "Image",
    "ImageDone",
    "Info",
    "Invalid",
    "Noisy",
    "NoisyArray",
    "Picture",
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
