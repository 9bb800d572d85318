"""stepwise info: the served model, and the limits of requests."""

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepwise import DEFAULT_URL, AsyncClient, Info
from stepwise.cli import options
from stepwise.cli.connect import Server, run
from stepwise.results import RecommendedInfo


def info(
    as_json: options.Json = False,
    url: options.Url = DEFAULT_URL,
    patience: options.Patience = options.PATIENCE_S,
    local: options.Local = False,
    weights: options.Weights = None,
) -> None:
    """Show the model, what computes it, and what a request may ask for."""

    async def ask(client: AsyncClient) -> Info:
        return await client.info()

    told = run(Server(url, patience, local, weights), ask)
    if as_json:
        print(json.dumps(told, indent=2))
        return
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts(told):
        table.add_row(name, Text(value))
    Console(highlight=False).print(table)


def _steps(recommended: RecommendedInfo) -> str:
    timesteps = recommended.get("timesteps")
    if timesteps:
        return f"timesteps {', '.join(map(str, timesteps))}"
    return f"{recommended['num_inference_steps']} steps"


def facts(info: Info) -> list[tuple[str, str]]:
    """The facts of the document, for a person."""
    model, recommended, limits = info["model"], info["recommended"], info["limits"]
    is_guided = info["num_classes"] or info.get("text")
    guided = f", guidance scale {recommended['guidance_scale']:g}" if is_guided else ""
    steps = info["num_inference_steps"]
    rows = [
        ("model", f"{model['name']}: {model['architecture']}, {model['num_parameters']:,} parameters"),
        ("images", _image(info)),
        ("classes", _classes(info)),
        ("prompts", _prompts(info)),
        ("samplers", ", ".join(info["samplers"])),
        ("steps", f"{' or '.join(map(str, steps))}, which it was distilled for" if steps else ""),
        ("recommended", f"{recommended['sampler']}, {_steps(recommended)}{guided}"),
        ("trained with", f"{info['num_train_timesteps']} timesteps; predicts {info['prediction_type']}"),
        ("first stage", _first_stage(info)),
        ("text encoder", _text_encoder(info)),
        ("is told", ", ".join(info.get("embedded_fields", ()))),
        ("safety checker", "not run" if info.get("safety_checker") == "not run" else ""),
        ("computed by", f"{info['backend']} on {info['device']}, in {info['precision']}"),
        ("a step takes", _speeds(info["seconds_per_step"], "image", "images")),
        ("decoding takes", _speeds(info["seconds_per_decode"] or {}, "image", "images")),
        ("a request", f"at most {limits['max_images']} images, {limits['timeout_s']:g} s"),
        ("the queue", f"at most {limits['max_queue']} requests"),
        ("fingerprint", info["fingerprint"] + ("" if info["reproducible"] else "; not reproducible here")),
        ("version", info["version"]),
    ]
    return [(name, value) for name, value in rows if value]


def _image(info: Info) -> str:
    channels, height, width = info["image_shape"]
    colours = {1: "grey", 3: "RGB"}.get(channels, f"{channels} channels")
    sizes = [f"{size['width']}x{size['height']}" for size in info.get("sizes", ())] or [f"{width}x{height}"]
    return f"{' or '.join(sizes)}, {colours}"


def _classes(info: Info) -> str:
    if info["num_classes"] is None:
        return "none"
    names = info["class_names"]
    return ", ".join(names) if names else f"0 to {info['num_classes'] - 1}"


def _prompts(info: Info) -> str:
    text = info.get("text")
    if text is None:
        return ""
    return f"{text['max_prompt_tokens']} tokens fit, the rest is cut; at most {text['max_prompt_bytes']} bytes"


def _text_encoder(info: Info) -> str:
    text = info.get("text")
    if text is None:
        return ""
    count = text.get("encoders", 1)
    encoders = f"{count} encoders, at least " if count > 1 else ""
    return f"{encoders}{text['layers']} layers, {text['num_parameters']:,} parameters"


def _first_stage(info: Info) -> str:
    stage, latents = info["first_stage"], info["latent_shape"]
    if stage is None or latents is None:
        return ""
    return f"{stage['kind']}, latents {'x'.join(map(str, latents))}, {stage['num_parameters']:,} parameters"


def _speeds(seconds_by_width: dict[str, float], one: str, many: str) -> str:
    """Milliseconds of the narrowest and of the widest batch."""
    widths = sorted(seconds_by_width, key=int)
    ends = dict.fromkeys([widths[0], widths[-1]]) if widths else {}
    return ", ".join(f"{1000 * seconds_by_width[w]:.3g} ms of {w} {one if w == '1' else many}" for w in ends)
