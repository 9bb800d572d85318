"""config.json of diffusers' VQModel and AutoencoderKL → AutoencoderConfig.

Missing fields take diffusers' defaults, except VQModel's scaling_factor. Like diffusers, this ignores unknown fields,
with a warning.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from model.checkpoints.diffusers_config import known_fields
from model.checkpoints.errors import CheckpointError, shown
from model.checkpoints.files import invalid
from model.nets.autoencoder import AutoencoderConfig

_KINDS: dict[str, Literal["kl", "vq"]] = {"VQModel": "vq", "AutoencoderKL": "kl"}
# Defaults that AutoencoderConfig lacks or has otherwise. VQModel's scaling_factor is 0.18215 in diffusers. Published
# configs without the field (ldm-celebahq-256) are older than the field, and their latents were never scaled. diffusers
# since 0.22 divides by its default all the same, and so decodes them wrongly (its issue 6725).
_DEFAULTS: dict[Literal["kl", "vq"], dict[str, Any]] = {
    "vq": {"latent_channels": 3, "num_vq_embeddings": 256, "scaling_factor": 1.0},
    "kl": {"latent_channels": 4, "scaling_factor": 0.18215},
}
# Fields about tiling, float16, and latents given as code numbers. None changes a result here.
_IGNORED = {"sample_size", "force_upcast", "lookup_from_codebook"}
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}
_CHANNELS = ("in_channels", "out_channels")
_OTHER_SCALES = ("shift_factor", "latents_mean", "latents_std")
# Fields that this module reads and AutoencoderConfig does not have.
_READ: dict[Literal["kl", "vq"], set[str]] = {
    "vq": {*_CHANNELS, *_BLOCKS, "norm_type"},
    "kl": {*_CHANNELS, *_BLOCKS, *_OTHER_SCALES},
}
# Fields of AutoencoderConfig that diffusers' class lacks.
_OURS: dict[Literal["kl", "vq"], set[str]] = {
    "vq": {"kind", "image_channels", "use_quant_conv", "use_post_quant_conv"},
    "kl": {"kind", "image_channels", "num_vq_embeddings", "vq_embed_dim"},
}


def read_autoencoder(path: Path, values: dict[str, Any]) -> AutoencoderConfig:
    """Read the config.json of a VQModel or an AutoencoderKL.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _KINDS:
        raise CheckpointError(path, f"_class_name is {shown(name)}, and must be {' or '.join(_KINDS)}")
    kind = _KINDS[name]
    known = known_fields(path, values, AutoencoderConfig, _IGNORED | _READ[kind], lacks=_OURS[kind])
    fields = {**_DEFAULTS[kind], **known}
    read = {field: values[field] for field in _READ[kind] & values.keys()}
    for field in _OTHER_SCALES:
        if read.get(field) is not None:
            raise CheckpointError(
                path, f"{field} is {shown(read[field])}, and must be null: other scales of latents are not supported"
            )
    norm_type = read.get("norm_type", "group")
    if norm_type != "group":
        raise CheckpointError(path, f"norm_type is {shown(norm_type)}, and must be group")
    channels, out_channels = (read.get(field, 3) for field in _CHANNELS)
    if type(channels) is not int or channels != out_channels:
        raise CheckpointError(
            path,
            f"in_channels is {shown(channels)} and out_channels {shown(out_channels)}, "
            "and they must be the same number",
        )
    if isinstance(fields.get("act_fn"), str):
        fields["act_fn"] = fields["act_fn"].lower()
    try:
        config = AutoencoderConfig.model_validate({"kind": kind, "image_channels": channels, **fields})
    except ValidationError as error:
        raise invalid(path, error) from error
    for field, only in _BLOCKS.items():
        _check_blocks(path, field, read.get(field, [only]), levels=len(config.block_out_channels))
    return config


def _check_blocks(path: Path, field: str, types: object, levels: int) -> None:
    """Refuse other block types, and another number of blocks than of block_out_channels."""
    if not isinstance(types, list) or any(block != _BLOCKS[field] for block in types):
        raise CheckpointError(path, f"{field} is {shown(types)}, and must be a list of {_BLOCKS[field]} alone")
    if len(types) != levels:
        raise CheckpointError(path, f"{field} has {len(types)} blocks, and block_out_channels {levels} widths")
