"""model_index.json of a pipeline of diffusers: its class, and the class of each part."""

from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoints.diffusers_pipelines import TEXT_PIPELINES, TextPipeline
from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import read_json

MODEL_INDEX = "model_index.json"

VAES = ("vqvae", "vae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
# Parts of text pipelines that never touch the latents.
_UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_OTHER_PIPELINES = (None, "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline")  # of a U-Net and a scheduler
# The class that a part of a text pipeline must have. The scheduler's own reader checks its class.
_TEXT_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    **dict.fromkeys(TOKENIZERS, ("CLIPTokenizer", "CLIPTokenizerFast")),
}
_REFINER = "this is SDXL's refiner, which only redraws the images of a base model: name the base model"
# Libraries that wrap parts: torch.compile, parallel training. The class of a wrapped part is unknown.
_WRAPPERS = ("torch", "accelerate", "deepspeed")
_FLAX = "Flax"  # the prefix of classes in Flax branches; the parts are the same


class Index(NamedTuple):
    """A pipeline's parts.

    Attributes:
        path: of model_index.json.
        text: what the class decides of a pipeline of text-to-image; None for others.
        classes: {"_class_name": …} for each part; empty for the class of a wrapped part.
        passed_over: parts that the pipeline has and that are not used.
        force_zeros_for_empty_prompt: of a pipeline of SDXL, else False.
    """

    path: Path
    text: TextPipeline | None
    classes: dict[str, dict[str, Any]]
    passed_over: tuple[str, ...]
    force_zeros_for_empty_prompt: bool = False

    @property
    def has_safety_checker(self) -> bool:
        return "safety_checker" in self.passed_over


def read_index(path: Path, root: Path) -> Index:
    """Read model_index.json.

    Raises:
        CheckpointError: naming a pipeline or a part that is not supported.
    """
    values = read_json(path, root)
    name = without_flax(values.get("_class_name"))
    pipeline = TEXT_PIPELINES.get(name) if isinstance(name, str) else None
    parts = ("unet", "scheduler", *VAES) if pipeline is None else pipeline.parts
    classes: dict[str, dict[str, Any]] = {}
    passed_over = []
    for part, component in values.items():
        if part.startswith("_") or not isinstance(component, list) or component == [None, None]:
            continue
        if pipeline is not None and part in _UNUSED_PARTS:
            passed_over.append(part)
            continue
        if part not in parts:
            raise CheckpointError(path, _foreign_part(part, name, pipeline))
        classes[part] = _class(path, part, component)
    if pipeline is None:
        return Index(path, None, classes, tuple(passed_over))
    force_zeros = pipeline.embeds_sizes and _xl_flags(path, values, classes)
    _check_text(path, pipeline, classes)
    return Index(path, pipeline, classes, tuple(passed_over), force_zeros)


def without_flax(name: object) -> object:
    """The name of a class without the prefix Flax."""
    return name.removeprefix(_FLAX) if isinstance(name, str) else name


def _foreign_part(part: str, name: object, pipeline: TextPipeline | None) -> str:
    if pipeline is not None:
        return f"has the part {shown(part)}, which this version does not serve in a {pipeline.name}"
    if name in _OTHER_PIPELINES:
        return f"has the part {shown(part)}, and the parts must be unet, scheduler and vqvae or vae"
    return (
        f"_class_name is {shown(name)}, and must be a pipeline of Stable Diffusion, SDXL or LCM, or of a "
        "U-Net and a scheduler, with or without a VAE"
    )


def _xl_flags(path: Path, values: dict[str, Any], classes: dict[str, dict[str, Any]]) -> bool:
    """Refuse the refiner. Returns force_zeros_for_empty_prompt."""
    flags = {"requires_aesthetics_score": False, "force_zeros_for_empty_prompt": True}
    for flag, default in flags.items():
        value = values.get(flag, default)
        if value is not None and type(value) is not bool:
            raise CheckpointError(path, f"{flag} is {shown(value)}, and must be true or false")
        flags[flag] = bool(value)  # null counts as false, as in diffusers
    if flags["requires_aesthetics_score"]:
        raise CheckpointError(path, f"requires_aesthetics_score is true: {_REFINER}")
    if "text_encoder" not in classes and "text_encoder_2" in classes:
        raise CheckpointError(path, f"names text_encoder_2 and no text_encoder: {_REFINER}")
    return flags["force_zeros_for_empty_prompt"]


def _class(path: Path, name: str, component: list[Any]) -> dict[str, Any]:
    if len(component) != 2 or not all(isinstance(text, str) for text in component):
        raise CheckpointError(path, f"{name} is {shown(component)}, and must be a library and a class")
    library, kind = component
    own = "transformers" if name in (*TEXT_ENCODERS, *TOKENIZERS) else "diffusers"
    if library == own:
        return {"_class_name": without_flax(kind)}
    if library.partition(".")[0] not in (own, *_WRAPPERS):
        raise CheckpointError(
            path, f"{name} is {shown('.'.join(component))}, and must be a class of {own}: other code is never run"
        )
    return {}


def _check_text(path: Path, pipeline: TextPipeline, classes: dict[str, dict[str, Any]]) -> None:
    for name in pipeline.parts:
        if name not in classes:
            raise CheckpointError(path, f"names no {name}, which a {pipeline.name} needs")
        kind = classes[name].get("_class_name")
        if kind is not None and kind not in (allowed := _TEXT_CLASSES.get(name, (kind,))):
            raise CheckpointError(path, f"{name} is {shown(kind)}, and must be {' or '.join(allowed)}")
