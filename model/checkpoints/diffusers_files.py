"""The files of weights in the folder of a part of a pipeline, and the keys in them."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from model.checkpoints.errors import CheckpointError, listed, shown
from model.checkpoints.files import read_json
from model.checkpoints.tensors import Naming, Stored

FORMATS = (".safetensors", ".bin")  # in order of preference
_OTHER_FORMATS = (".msgpack", ".onnx", ".h5", ".ckpt", ".gguf")

# Names of weights without variant and format, by format.
STEMS = dict.fromkeys(FORMATS, "diffusion_pytorch_model")
TEXT_STEMS = {".safetensors": "model", ".bin": "pytorch_model"}  # of parts of transformers
# A file, or the index of its shards, with its variant. Indexes have had two spellings.
_WEIGHTS = re.compile(
    r"(?P<stem>\w+)(\.(?P<variant>\w+))?(?P<suffix>\.safetensors|\.bin)"
    r"|(?P<index_stem>\w+)(?P<index_suffix>\.safetensors|\.bin)(\.index(\.(?P<index_variant>\w+))?"
    r"|\.(?P<old_variant>\w+)\.index)\.json"
)


def weights(folder: Path, stems: Mapping[str, str], root: Path, named: Path | None, variant: str) -> Sequence[Path]:
    """The files of a part's tensors: the one that the user named, or the best in the folder.

    Args:
        stems: STEMS or TEXT_STEMS.
        named: the file that the user named for this part.
        variant: of the file that the user named for some part.

    Raises:
        CheckpointError: if there are none, or several that are as good.
    """
    file = named if named is not None else _best(folder, stems, variant)
    if file.suffix != ".json":
        return [file]
    weight_map = read_json(file, root).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            file, f"weight_map is {shown(weight_map)}, and must be an object that names the file of each key"
        )
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix not in FORMATS:
            raise CheckpointError(
                file, f"weight_map has {shown(repr(name))}, which is not the plain name of a .safetensors or .bin file"
            )
    return [file.parent / name for name in sorted(set(weight_map.values()))]


def variant_of(file: Path | None) -> str:
    """The variant in the name of a weights file or index; empty for none."""
    match = _WEIGHTS.fullmatch(file.name) if file else None
    return (match["variant"] or match["index_variant"] or match["old_variant"] or "") if match else ""


def _best(folder: Path, stems: Mapping[str, str], variant: str) -> Path:
    """The file of weights, or the index of its shards.

    safetensors is better than pickles. `variant` is better than no variant, and that is better than other variants
    (fp16, non_ema).
    """
    there: dict[tuple[str, str], list[Path]] = {}  # by suffix and variant; whole files first, then indexes
    for child in sorted(folder.iterdir(), key=lambda child: child.suffix == ".json"):
        if match := _WEIGHTS.fullmatch(child.name):
            suffix = match["suffix"] or match["index_suffix"]
            if (match["stem"] or match["index_stem"]) == stems[suffix]:
                there.setdefault((suffix, variant_of(child)), []).append(child)
    for suffix in FORMATS:
        for wanted in (variant, ""):
            if files := there.get((suffix, wanted)):
                return files[0]
        variants = [children[0] for (other, _), children in sorted(there.items()) if other == suffix]
        if len(variants) == 1:
            return variants[0]
        if variants:
            names = listed([child.name for child in variants], most=2)
            raise CheckpointError(folder, f"holds the variants {names}: name one of these files")
    others = [child.name for child in sorted(folder.iterdir()) if child.suffix in _OTHER_FORMATS]
    raise CheckpointError(
        folder,
        f"holds no {stems['.safetensors']}.safetensors"
        + (f", and {listed(others, most=1)} cannot be read" if others else ""),
    )


_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # added by parallel training and torch.compile
_OLD_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)")
_PRESENT = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # since diffusers 0.17


def _canonical(key: str) -> str | None:
    """The current name of a key; None for the second copy of the fourier frequencies in old files."""
    key = _PREFIXES.sub("", key)
    if match := _OLD_ATTENTION.fullmatch(key):
        return f"{match[1]}.{_PRESENT[match[2]]}.{match[3]}"
    return None if key == "time_proj.W" else key


_LAYERS = re.compile(r"(.*\.(?:resnets|downsamplers|upsamplers)\.\d+)\.(time_mlp|shortcut)\.(weight|bias)")
_ATTENTION = re.compile(r"(.*\.attentions\.\d+)\.(norm|qkv|proj)\.(weight|bias)")


def _stored(key: str, shape: tuple[int, ...]) -> Sequence[Stored]:
    """diffusers' tensors for a parameter of UNet2D or Autoencoder. Linear layers of ours are 1×1 convolutions there."""
    if match := _ATTENTION.fullmatch(key):
        names = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}[match[2]]
        part = (shape[0] // len(names), *shape[1:2])
        return [Stored(f"{match[1]}.{name}.{match[3]}", part) for name in names]
    return _stored_condition(key, shape)


def _stored_condition(key: str, shape: tuple[int, ...]) -> Sequence[Stored]:
    """diffusers' tensor for a parameter of UNet2DCondition."""
    if match := _LAYERS.fullmatch(key):
        name = {"time_mlp": "time_emb_proj", "shortcut": "conv_shortcut"}[match[2]]
        return [Stored(f"{match[1]}.{name}.{match[3]}", shape)]
    return [Stored(key, shape)]


_PROJECTION = "text_projection.weight"  # of CLIPTextModelWithProjection


def _canonical_with_projection(key: str) -> str | None:
    """CLIPText's name of a key of transformers; None for the position numbers that old files hold.

    Keys of CLIPTextModelWithProjection have a prefix. Before transformers 5.6 those of CLIPTextModel had it, too.
    """
    key = _PREFIXES.sub("", key).removeprefix("text_model.")
    return None if key == "embeddings.position_ids" else key


def _canonical_of_text(key: str) -> str | None:
    """The same for an encoder without a projection; None also for the projection that some files hold nevertheless."""
    canonical = _canonical_with_projection(key)
    return None if canonical == _PROJECTION else canonical


NAMING = Naming(_stored, _canonical)  # of UNet2D and Autoencoder
CONDITION_NAMING = Naming(_stored_condition, _canonical)  # of UNet2DCondition
TEXT_NAMING = Naming(canonical=_canonical_of_text)  # of CLIPText
PROJECTION_NAMING = Naming(canonical=_canonical_with_projection)  # of CLIPText with a projection
