"""Arguments and options that several commands have, each once."""

from typing import Annotated, Literal

import typer

PATIENCE_S = 120.0

_SERVER = "Which server"
DRAWING = "What is drawn"
OUTPUT = "Where it goes"

Url = Annotated[
    str,
    typer.Option(
        envvar="STEPWISE_URL",
        help="The server's. Its API key, where it wants one, is read from STEPWISE_API_KEY.",
        rich_help_panel=_SERVER,
    ),
]
Patience = Annotated[
    float,
    typer.Option(
        metavar="SECONDS",
        min=0,
        help="How long to ask again while the server is full or loading.",
        rich_help_panel=_SERVER,
    ),
]
Timeout = Annotated[
    float | None,
    typer.Option(metavar="SECONDS", help="Have the server give up after so long.", rich_help_panel=_SERVER),
]
Local = Annotated[
    bool,
    typer.Option(
        "--local",
        help="Compute in this process, without a server. What STEPWISE_* settings say of one holds here.",
        rich_help_panel=_SERVER,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="With --local: a name in the box, a folder or a file. Default: STEPWISE_WEIGHTS, or digits.",
        rich_help_panel=_SERVER,
    ),
]

Seed = Annotated[
    int | None,
    typer.Option("--seed", "-s", metavar="N", help="Of the noise. Drawn where none is given.", rich_help_panel=DRAWING),
]
Label = Annotated[
    str | None,
    typer.Option("--class-label", "-c", metavar="CLASS", help="By name or index.", rich_help_panel=DRAWING),
]
Guidance = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale",
        "-g",
        metavar="SCALE",
        help="Classifier-free guidance, 1 to 20; 1 is off.",
        rich_help_panel=DRAWING,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--num-inference-steps", "--steps", metavar="N", help="How many.", rich_help_panel=DRAWING),
]
Sampler = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="As ddim, ddpm, dpmpp_2m: see stepwise info.", rich_help_panel=DRAWING),
]
Eta = Annotated[
    float | None, typer.Option(metavar="ETA", help="Noise in the steps of ddim, 0 to 1.", rich_help_panel=DRAWING)
]
Timestep = Annotated[
    int,
    typer.Option(
        "--timestep",
        "-t",
        metavar="T",
        help="How noisy: 0 is all but clean, the last all but noise.",
        rich_help_panel=DRAWING,
    ),
]
Scaling = Annotated[
    Literal["variance_preserving", "additive"],
    typer.Option(
        help="Of image and noise: √ᾱ·x_0 + √(1−ᾱ)·ε, as diffusion has it; or x_0 + σ·ε, as cameras do.",
        rich_help_panel=DRAWING,
    ),
]
ReadRange = Annotated[
    float | None,
    typer.Option(
        metavar="R",
        help="A noisy PNG's values stand for −R … R. Default: 4 where it has 16 bits, as those of stepwise noise; "
        "1 where it has 8, as ordinary images.",
        rich_help_panel=DRAWING,
    ),
]

Force = Annotated[bool, typer.Option("--force", help="Write over other files.", rich_help_panel=OUTPUT)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", rich_help_panel=OUTPUT)]
