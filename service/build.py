"""Builds the engine: settings → weights → runners → engine. No other module of service/ imports torch."""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from model.backends.backend import Backend, host
from model.backends.choose import choose
from model.backends.network import denoiser
from model.checkpoints import native
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load
from model.conditions import Conditions
from model.description import ModelDescription
from model.noise import first_draw
from model.rows import Condition, Group, Image, Row, Source, Tokenize
from model.runner import SlotRunner
from model.samplers import denoise_table
from model.text import ClipEncoder, choose_text_encoder
from model.vae import VAE, choose_vae
from service import config
from service.config import Settings, SettingsError
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.fitting import fitting
from service.http import checks
from service.http.formats import image_encoder
from service.http.metrics import Metrics
from service.http.problems import one_line
from service.plan import micro_conditions
from service.plan import sizes as sizes_of
from service.plan.recommended import Wanted, applied, doubt
from service.plan.served import Served, fingerprint_parts

log = logging.getLogger(__name__)

_OUT_OF_MEMORY = re.compile(
    "out of memory|bad_alloc|not enough memory|can't allocate|cannot allocate|STATUS_ALLOC_FAILED", re.IGNORECASE
)

BOX = Path(__file__).parent.parent / "weights"  # the weights in the box: a checkout and the image have them
_NO_BOX = "this installation has no weights in the box: name a folder or a file, or use a checkout or the image"


class StartError(Exception):
    """The program cannot start. The message is one line for the operator."""


START_ERRORS = (SettingsError, StartError, CheckpointError)  # each message is one line for the operator

_THREADS_A_CORE = 8  # more threads only wait for each other
_LEFT = 0.05  # of a GPU's memory, after the sizes that are served by default
_SHOWN = 200  # characters of a setting's value, or of a library's message


@contextmanager
def starting(what_fails: str) -> Iterator[None]:
    """Turn any error of torch, OpenVINO, safetensors or the system into one line.

    Raises:
        StartError: the message begins with `what_fails`. The original error is the cause, and is logged at level debug.
    """
    try:
        yield
    except START_ERRORS:
        raise
    except Exception as error:
        log.debug("the start failed", exc_info=True)
        raise StartError(f"{what_fails}: {told(error)}") from error


def told(error: BaseException) -> str:
    """A library's error in a few words, on one line."""
    text = getattr(error, "strerror", None) or str(error)
    if _is_of_memory(error):
        what = "not enough memory"
    elif isinstance(error, OSError):
        return shown(text)
    else:
        what = type(error).__name__
    return f"{what} ({shown(text)})" if text else what


def _is_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or bool(_OUT_OF_MEMORY.search(str(error)))


def shown(text: str) -> str:
    """Text on one line, cut to _SHOWN characters."""
    return one_line(text, _SHOWN)


def build(settings: Settings) -> tuple[Engine, Served, Metrics]:
    """Load the weights and build the engine.

    Raises:
        StartError, CheckpointError: these settings or weights cannot be served.
    """
    check = None if settings.check is None else checks.load(settings.check)
    with starting(f"STEPWISE_DEVICE={settings.device} cannot be used"):
        device = choose_device(settings.device)
        threads = choose_threads(settings.threads)
        torch.set_num_threads(threads)
    with starting(f"STEPWISE_WEIGHTS={shown(settings.weights)} cannot be loaded"):
        checkpoint = load(find_weights(settings.weights), settings.allow_pickle)
    model = recommend(settings.recommended, checkpoint.description)
    if (sentence := doubt(model, settings.recommended)) is not None:
        log.warning("%s", sentence)
    is_recommended = model.recommended != checkpoint.description.recommended
    if check is not None and model.image_shape[0] not in checks.CHANNELS:
        raise StartError(
            f"STEPWISE_CHECK={settings.check}: images of {model.name} are no pictures, and cannot be checked"
        )
    wanted = choose_groups(settings.sizes, model, device)
    how = device, settings.precision, threads
    embedder = checkpoint.network.embedder
    with starting(f"{model.name} cannot be made ready on {device}"):
        denoises = choose(denoiser(checkpoint.network, model), *how, settings.max_batch, settings.cache_dir)
        autoencoder, clips, tokenize = checkpoint.autoencoder, checkpoint.text_encoders, checkpoint.tokenizer
        vae_of = None if autoencoder is None else choose_vae(autoencoder, model, *how, settings.cache_dir)
        texts = choose_text_encoder(clips, model, device, threads, settings.cache_dir) if clips else None
    del checkpoint, autoencoder, clips  # the backends have the weights

    must = settings.sizes or wanted[:1]

    def make(group: Group, like: OfGroup | None) -> OfGroup | None:
        try:
            with starting(f"{model.name} cannot be made ready for images of {group} on {device}"):
                backend = denoises(model.input_shape_of(group))
                text_length = None if model.text is None else model.text.length
                conditions = like.conditions if like else Conditions(embedder, backend, model.no_label, text_length)
                shape, slots = model.sample_shape_of(group), backend.widths[-1]
                runner = SlotRunner(backend, shape, conditions, slots, model.inpaints)
                vae = None if vae_of is None else vae_of(group, like.vae if like else None)
        except StartError as error:
            if group in must or not _is_of_memory(error.__cause__):
                raise
            return None
        return OfGroup(backend, conditions, runner, vae) if group in must or has_room(device) else None

    made = fitting(wanted, make)
    torch.cuda.empty_cache()  # a group that did not fit has left memory there
    groups = tuple(made)
    runners = {group: one.runner for group, one in made.items()}
    backends = {group: one.backend for group, one in made.items()}
    vaes = {group: one.vae for group, one in made.items() if one.vae is not None}
    # Now that each group has what it cannot do without, more may be compiled. No pass compiles later: promises hold.
    with starting(f"{model.name} cannot be made ready on {device}"):
        for backend in backends.values():
            backend.prepare()
        for its_vae in vaes.values():
            its_vae.prepare()
        if texts is not None:
            texts.prepare()
        condition = nothing(texts, tokenize)

    served = Served(
        model=model,
        device=str(device),
        fingerprint_parts=fingerprint_parts(
            model,
            groups[0],
            {**computing(backends, vaes, texts), **({} if tokenize is None else tokenize.fingerprint)},
            host(),
            image_encoder(),
            recommended=model.recommended if is_recommended else None,
            recipe_prompts=settings.recipe_prompts,
        ),
        reproducible=all(backend.reproducible for backend in backends.values())
        and all(vae.reproducible for vae in vaes.values()),
        first_draw=first_draw,
        groups=groups,
        preview=rough(vaes, model),
        tokenize=tokenize,
        recipe_prompts=settings.recipe_prompts,
        checks_images=check is not None,
    )
    metrics = Metrics()
    places = Places(settings.max_queue, clients=max(1, len(settings.api_keys)))
    probes = {group: probe_row(model, group, condition) for group in groups}
    of_images = None if check is None else checks.of_images(check, metrics.check_done)
    engine = Engine(runners, probes, places, metrics, vaes=vaes or None, text_encoder=texts, check=of_images)
    return engine, served, metrics


class OfGroup(NamedTuple):
    """What works on the rows of one group. All groups have the same conditions."""

    backend: Backend
    conditions: Conditions
    runner: SlotRunner
    vae: VAE | None


def has_room(device: torch.device) -> bool:
    """Whether a GPU has memory left for what work takes beside the graphs."""
    if device.type != "cuda":
        return True
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return free >= _LEFT * total


def computing(
    backends: Mapping[Group, Backend], vaes: Mapping[Group, VAE], texts: ClipEncoder | None
) -> dict[str, str | int]:
    """The fingerprints of all groups' backends and VAEs, and of the text encoder, by name.

    Later groups add only parts that differ.
    """
    found: dict[str, str | int] = {}
    for group, backend in backends.items():
        parts = {**backend.fingerprint, **(vaes[group].fingerprint if group in vaes else {})}
        own = {f"{name} {group}": value for name, value in parts.items() if found.get(name) != value}
        found |= own if found else parts
    return found if texts is None else {**found, **texts.fingerprint}


def nothing(texts: ClipEncoder | None, tokenize: Tokenize | None) -> Condition:
    """The condition of a row that asks for nothing: the empty prompt with its context, if the model has text."""
    if texts is None or tokenize is None:
        return Condition()
    text = tokenize("").text()
    return Condition(text=text, context=texts.encode(text))


def recommend(wanted: Wanted | None, model: ModelDescription) -> ModelDescription:
    """The model with the recommendations of a RECOMMENDED setting.

    Raises:
        StartError: the model cannot draw so.
    """
    if wanted is None:
        return model
    try:
        return applied(model, wanted)
    except ValueError as error:
        raise StartError(f"STEPWISE_RECOMMENDED: for {model.name}, {error}") from None


def choose_groups(sizes: Sequence[Group], model: ModelDescription, device: torch.device) -> tuple[Group, ...]:
    """The groups of a SIZES setting, the default first. Without sizes, the size that the weights were trained for.

    On CUDA, where all sizes share the weights, its usual aspects come after it.

    Raises:
        StartError: names a size that the networks cannot draw.
    """
    for group in sizes:
        try:
            model.check_size(group)
        except ValueError as error:
            raise StartError(f"STEPWISE_SIZES={group}: for {model.name}, {error}") from None
    return tuple(sizes) or (sizes_of.usual(model) if device.type == "cuda" else (model.group,))


def rough(vaes: Mapping[Group, VAE], model: ModelDescription) -> Callable[[Image], Image] | None:
    """A function that makes a rough image from latents of any group; None where rows are images."""
    previews = {model.sample_shape_of(group): vae.preview for group, vae in vaes.items()}
    return (lambda latents: previews[latents.shape](latents)) if previews else None


def probe_row(model: ModelDescription, group: Group, condition: Condition) -> Row:
    """A row of at most two steps that shows that the model works."""
    t = model.schedule.num_train_timesteps // 2
    table = denoise_table(model.schedule, "ddim", t, min(2, max(1, t)))
    source = Source.of_nothing(model.sample_shape_of(group)) if model.inpaints else None
    condition = replace(
        condition,
        time_ids=micro_conditions.of_image(group).time_ids if model.embeds_sizes else None,
        w=0.0 if model.embeds_guidance else None,
    )
    return Row(table, seed=0, group=group, source=source, branches=(condition,))


def choose_device(name: str) -> torch.device:
    """The device of a DEVICE setting.

    Raises:
        StartError: the machine lacks this CUDA device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise StartError(f"STEPWISE_DEVICE={name}: this machine, or this build of torch, has no CUDA device")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise StartError(f"STEPWISE_DEVICE={name}: the CUDA devices are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def choose_threads(wanted: int | None, cores: int | None = os.cpu_count()) -> int:
    """The compute threads of a THREADS setting. Default: the cores that this process may use.

    Raises:
        StartError: so many threads that a pass takes seconds, or that the system may end the process.
    """
    if wanted is None:
        return config.available_cores()
    if cores is not None and wanted > _THREADS_A_CORE * cores:
        most = f"{_THREADS_A_CORE} threads a core are the most, {_THREADS_A_CORE * cores} on this machine"
        raise StartError(f"STEPWISE_THREADS={wanted}: {most}")
    return wanted


def find_weights(name: str) -> Path:
    """The path of a WEIGHTS setting: a name in the box, a folder or a file.

    Raises:
        StartError: there is no such path.
    """
    in_the_box = sorted(path.parent.name for path in BOX.glob(f"*/{native.WEIGHTS}"))
    if name in in_the_box:
        return BOX / name
    try:
        path = Path(name).expanduser()
        path.stat()
    except FileNotFoundError:
        why = "is neither a file nor a folder"
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: the home of an unknown user
        why = f"cannot be opened: {told(error)}"
    else:
        return path
    box = f"in the box: {', '.join(in_the_box)}" if in_the_box else _NO_BOX
    raise StartError(f"STEPWISE_WEIGHTS={shown(name)} {why}; {box}")
