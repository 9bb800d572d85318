"""model_index.json of a pipeline of diffusers: its class, and the class of each part."""

from pathlib import Path
from typing import Any, NamedTuple

from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import read_json

MODEL_INDEX = "model_index.json"

VAES = ("vqvae", "vae")
TEXT_PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
# Parts of text pipelines that never touch the latents.
_UNUSED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")
_TEXT_PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
_OTHER_PIPELINES = (None, "DDPMPipeline", "DDIMPipeline", "PNDMPipeline", "LDMPipeline")  # of a U-Net and a scheduler
# The class that a part of a text pipeline must have. The scheduler's own reader checks its class.
_TEXT_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Libraries that wrap parts: torch.compile, parallel training. The class of a wrapped part is unknown.
_WRAPPERS = ("torch", "accelerate", "deepspeed")
_FLAX = "Flax"  # the prefix of classes in Flax branches; the parts are the same


class Index(NamedTuple):
    """A pipeline's parts.

    Attributes:
        path: of model_index.json.
        is_text: whether the pipeline is one of text-to-image.
        classes: {"_class_name": …} for each part; empty for the class of a wrapped part.
        passed_over: parts that the pipeline has and that are not used.
    """

    path: Path
    is_text: bool
    classes: dict[str, dict[str, Any]]
    passed_over: tuple[str, ...]

    @property
    def has_safety_checker(self) -> bool:
        return "safety_checker" in self.passed_over


def read_index(path: Path, root: Path) -> Index:
    """Read model_index.json.

    Raises:
        CheckpointError: naming a pipeline or a part that is not supported.
    """
    values = read_json(path, root)
    pipeline = without_flax(values.get("_class_name"))
    is_text = pipeline in _TEXT_PIPELINES
    classes: dict[str, dict[str, Any]] = {}
    passed_over = []
    for name, component in values.items():
        if name.startswith("_") or not isinstance(component, list) or component == [None, None]:
            continue
        if is_text and name in _UNUSED_PARTS:
            passed_over.append(name)
            continue
        if name not in (TEXT_PARTS if is_text else ("unet", "scheduler", *VAES)):
            raise CheckpointError(path, _foreign_part(name, pipeline, is_text))
        classes[name] = _class(path, name, component)
    if is_text:
        _check_text(path, classes)
    return Index(path, is_text, classes, tuple(passed_over))


def without_flax(name: object) -> object:
    """The name of a class without the prefix Flax."""
    return name.removeprefix(_FLAX) if isinstance(name, str) else name


def _foreign_part(name: str, pipeline: object, is_text: bool) -> str:
    if is_text:
        return f"has the part {shown(name)}, which this version does not serve in a {pipeline}"
    if pipeline in _OTHER_PIPELINES:
        return f"has the part {shown(name)}, and the parts must be unet, scheduler and vqvae or vae"
    return (
        f"_class_name is {shown(pipeline)}, which this version does not serve: it serves StableDiffusionPipeline, "
        "and pipelines of a U-Net and a scheduler, with or without a VAE"
    )


def _class(path: Path, name: str, component: list[Any]) -> dict[str, Any]:
    if len(component) != 2 or not all(isinstance(text, str) for text in component):
        raise CheckpointError(path, f"{name} is {shown(component)}, and must be a library and a class")
    library, kind = component
    own = "transformers" if name in ("text_encoder", "tokenizer") else "diffusers"
    if library == own:
        return {"_class_name": without_flax(kind)}
    if library.partition(".")[0] not in (own, *_WRAPPERS):
        raise CheckpointError(
            path, f"{name} is {shown('.'.join(component))}, and must be a class of {own}: other code is never run"
        )
    return {}


def _check_text(path: Path, classes: dict[str, dict[str, Any]]) -> None:
    for name in TEXT_PARTS:
        if name not in classes:
            raise CheckpointError(path, f"names no {name}, which a StableDiffusionPipeline needs")
        kind = classes[name].get("_class_name")
        if kind is not None and kind not in (allowed := _TEXT_CLASSES.get(name, (kind,))):
            raise CheckpointError(path, f"{name} is {shown(kind)}, and must be {' or '.join(allowed)}")
