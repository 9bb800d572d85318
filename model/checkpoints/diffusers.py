"""Checkpoints of the diffusers library: a U-Net and a scheduler, with or without a VAE, or with text-to-image's parts.

This module finds pipelines, nested (unet/, scheduler/) or flat, a U-Net's folder alone, and the checkpoint-N folders of
train_unconditional.py. Other parts are used if model_index.json names them. A class name in a config selects code of
ours; it never imports anything.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from model.checkpoints.diffusers_autoencoder import read_autoencoder
from model.checkpoints.diffusers_config import DEFAULT_SCHEDULER, read_scheduler, read_unet
from model.checkpoints.diffusers_files import (
    CONDITION_NAMING,
    NAMING,
    PROJECTION_NAMING,
    STEMS,
    TEXT_NAMING,
    TEXT_STEMS,
    variant_of,
    weights,
)
from model.checkpoints.diffusers_index import Index
from model.checkpoints.diffusers_layout import CONFIG, SCHEDULER_CONFIG, Layout, find_layout
from model.checkpoints.diffusers_pipelines import TextPipeline
from model.checkpoints.diffusers_text import read_condition_unet, read_text_encoder, read_text_scheduler
from model.checkpoints.errors import listed
from model.checkpoints.source import Part, Source
from model.checkpoints.tensors import Naming
from model.nets.autoencoder import AutoencoderConfig
from model.nets.clip import CLIPTextConfig, CLIPTextWithProjectionConfig

log = logging.getLogger(__name__)

# Of the first text encoder, and of the second.
_TEXT_CONFIGS: tuple[type[CLIPTextConfig], ...] = (CLIPTextConfig, CLIPTextWithProjectionConfig)
_TEXT_NAMINGS = (TEXT_NAMING, PROJECTION_NAMING)


def find(path: Path) -> Source | None:
    """The diffusers checkpoint at a path, which is its folder or a file of it; None if it is not one.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    layout = find_layout(path)
    if layout is None:
        return None
    match layout.model_index, layout.vae, layout.scheduler:
        case Index(text=TextPipeline() as pipeline) as index, Path() as vae, Path() as scheduler:
            source = _text_to_image(layout, index, pipeline, vae, scheduler)
        case _:
            source = _unconditional(layout)
    if layout.unused:
        log.warning("%s: not used: %s", layout.name, listed(layout.unused, most=10))
    return source


def _unconditional(layout: Layout) -> Source:
    """A U-Net and a scheduler, with or without a VAE."""
    config_path = layout.unet / CONFIG
    if layout.scheduler is None:
        log.warning("%s has no %s: using DDPMScheduler's defaults", layout.name, SCHEDULER_CONFIG)
        scheduler = DEFAULT_SCHEDULER
    else:
        scheduler = read_scheduler(layout.scheduler, layout.config(layout.scheduler, "scheduler"))
    vae = None if layout.vae is None else _autoencoder(layout, layout.vae)
    return Source(
        name=layout.name,
        root=layout.root,
        config=read_unet(config_path, layout.config(config_path, "unet"), scheduler, vae),
        network=_part(layout, layout.unet),
        autoencoder=None if layout.vae is None else _part(layout, layout.vae),
    )


def _text_to_image(layout: Layout, index: Index, pipeline: TextPipeline, vae: Path, scheduler: Path) -> Source:
    """A pipeline that draws for prompts."""
    config_path = layout.unet / CONFIG
    config = read_condition_unet(
        config_path,
        layout.config(config_path, "unet"),
        pipeline,
        read_text_scheduler(scheduler, layout.config(scheduler, "scheduler", index_first=True), pipeline),
        _autoencoder(layout, vae),
        [
            read_text_encoder(folder / CONFIG, layout.config(folder / CONFIG, folder.name), kind)
            for folder, kind in zip(layout.text_encoders, _TEXT_CONFIGS, strict=False)
        ],
        force_zeros_for_empty_prompt=index.force_zeros_for_empty_prompt,
    )
    if index.has_safety_checker:
        log.warning("%s: the safety checker of this pipeline is not run: see docs/security.md", layout.name)
    return Source(
        name=layout.name,
        root=layout.root,
        config=config,
        network=_part(layout, layout.unet, CONDITION_NAMING),
        autoencoder=_part(layout, vae),
        text_encoders=tuple(
            _part(layout, folder, naming, TEXT_STEMS)
            for folder, naming in zip(layout.text_encoders, _TEXT_NAMINGS, strict=False)
        ),
        tokenizers=layout.tokenizers,
        safety_checker="not run" if index.has_safety_checker else "none",
    )


def _autoencoder(layout: Layout, folder: Path) -> AutoencoderConfig:
    return read_autoencoder(folder / CONFIG, layout.config(folder / CONFIG, folder.name))


def _part(layout: Layout, folder: Path, naming: Naming = NAMING, stems: Mapping[str, str] = STEMS) -> Part:
    files = weights(folder, stems, layout.root, layout.named_for(folder), variant_of(layout.named))
    return Part(folder / CONFIG, files, naming)
