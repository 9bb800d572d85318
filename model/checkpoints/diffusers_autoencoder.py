"""What config.json of diffusers' VQModel and AutoencoderKL says, in our terms.

Missing fields take diffusers' defaults, but for one. Fields that change nothing here are passed over, by name; others
are refused.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from model.autoencoder import AutoencoderConfig
from model.checkpoints.errors import CheckpointError
from model.checkpoints.files import invalid

_KINDS: dict[str, Literal["kl", "vq"]] = {"VQModel": "vq", "AutoencoderKL": "kl"}
# Where AutoencoderConfig has none, or another. A VQModel's scaling_factor is 0.18215 in diffusers, too, but published
# configs without the field (ldm-celebahq-256) are older than it, of latents that were never scaled. Since diffusers
# 0.22 divides by its default all the same, what it makes of them is not what they were trained for (its issue 6725).
_DEFAULTS: dict[Literal["kl", "vq"], dict[str, Any]] = {
    "vq": {"latent_channels": 3, "num_vq_embeddings": 256, "scaling_factor": 1.0},
    "kl": {"latent_channels": 4, "scaling_factor": 0.18215},
}
# Of tiles, of float16, and of latents that are codes' numbers; none of them changes what is computed here.
_IGNORED = {"sample_size", "force_upcast", "lookup_from_codebook", "tensor_format"}
# Fields of AutoencoderConfig that diffusers' classes lack, and so would pass over.
_OURS = ("kind", "image_channels")
_OTHER_SCALES = ("shift_factor", "latents_mean", "latents_std")
_BLOCKS = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def read_autoencoder(path: Path, values: dict[str, Any]) -> AutoencoderConfig:
    """Read the config.json of a VQModel or an AutoencoderKL.

    Raises:
        CheckpointError: naming the file, the field and what was expected.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in _KINDS:
        raise CheckpointError(path, f"_class_name: must be {' or '.join(_KINDS)}, and is {name}")
    kind = _KINDS[name]
    fields = {**_DEFAULTS[kind], **{k: v for k, v in values.items() if k[:1] != "_" and k not in _IGNORED}}
    for field in _OURS:
        if field in fields:
            raise CheckpointError(path, f"{field}: there is no such field")
    for field in _OTHER_SCALES:
        if fields.pop(field, None) is not None:
            raise CheckpointError(path, f"{field}: must be null: LDMPipeline would pass it over")
    norm_type = fields.pop("norm_type", "group")
    if norm_type != "group":
        raise CheckpointError(path, f"norm_type: must be group, and is {norm_type}")
    channels, out_channels = fields.pop("in_channels", 3), fields.pop("out_channels", 3)
    if type(channels) is not int or channels != out_channels:
        raise CheckpointError(
            path, f"in_channels and out_channels must be the same number, and are {channels} and {out_channels}"
        )
    blocks = {field: fields.pop(field, [only]) for field, only in _BLOCKS.items()}
    if isinstance(fields.get("act_fn"), str):
        fields["act_fn"] = fields["act_fn"].lower()
    try:
        config = AutoencoderConfig.model_validate({"kind": kind, "image_channels": channels, **fields})
    except ValidationError as error:
        raise invalid(path, error) from error
    for field, types in blocks.items():
        _check_blocks(path, field, types, levels=len(config.block_out_channels))
    return config


def _check_blocks(path: Path, field: str, types: object, levels: int) -> None:
    """Refuse other blocks than the one that there is, and other numbers of them than of widths."""
    if not isinstance(types, list) or any(block != _BLOCKS[field] for block in types):
        raise CheckpointError(path, f"{field}: must be a list of {_BLOCKS[field]} alone, and is {str(types)[:80]}")
    if len(types) != levels:
        raise CheckpointError(path, f"{field} has {len(types)} blocks, and block_out_channels {levels} widths")
