"""Tiny random folders of pipelines of text-to-image, as diffusers and transformers write them, and how they are drawn.

An image is 64x64 at the default VAE factor 8: latents are 8x8. All weights are random, deterministic by seed, and exact
in float16. transformers takes seconds to import, so functions import it.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from tests.reference import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel, scheduler_class

Json = dict[str, Any]

SEED = 0
MERGES = ("t h", "i n", "a n", "th e</w>", "in g</w>", "o x</w>", "f ox</w>", "s n")
START, END = "<|startoftext|>", "<|endoftext|>"

# Fields of all published scheduler_config.json.
_SCHEDULE: Json = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_PNDM: Json = {**_SCHEDULE, "set_alpha_to_one": False, "skip_prk_steps": True}
_DDIM: Json = {**_SCHEDULE, "set_alpha_to_one": False, "clip_sample": False}

_UNET: Json = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 2,
    "norm_num_groups": 8,
    "attention_head_dim": 2,
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
_TEXT: Json = {
    "vocab_size": 512 + len(MERGES) + 2,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 2,  # as in the published files: it is not the id of END
    "pad_token_id": 1,
}

# As published for SDXL, with fields of other classes.
_EULER: Json = {
    "class": "EulerDiscreteScheduler",
    **_SCHEDULE,
    "num_train_timesteps": 1000,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "use_karras_sigmas": False,
    "trained_betas": None,
    "clip_sample": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
}
_LCM: Json = {"class": "LCMScheduler", **_DDIM, "original_inference_steps": 50}

# SDXL: two text encoders, whose widths and layers differ.
_XL: dict[str, Json] = {
    "unet": {
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "cross_attention_dim": 80,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 72,  # 6 · 8 + 24
    },
    "vae": {"scaling_factor": 0.13025, "force_upcast": True},
    "text_2": {"hidden_size": 48, "num_hidden_layers": 3, "hidden_act": "gelu", "projection_dim": 24},
    "scheduler": _EULER,
    "tokenizer_2": {"pad": "!"},
    "index": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "add_watermarker": False,
    },
}
_XL_OF_THREE_LEVELS: Json = {
    **_XL["unet"],
    "block_out_channels": (16, 16, 32),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 2, 4),
}

# What the kinds have otherwise, by component.
_KINDS: dict[str, dict[str, Json]] = {
    "sd1": {"scheduler": {"class": "PNDMScheduler", **_PNDM}},
    "sd2": {
        "unet": {"attention_head_dim": [2, 4], "use_linear_projection": True, "cross_attention_dim": 40},
        "text": {"hidden_size": 40, "num_hidden_layers": 3, "hidden_act": "gelu"},
        "scheduler": {
            "class": "DDIMScheduler",
            **_DDIM,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        "tokenizer": {"pad": "!"},
    },
    "tiny_sd": {
        "unet": {
            "block_out_channels": (16, 32, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3,
            "mid_block_type": None,
            "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        },
        "scheduler": {"class": "PNDMScheduler", **_PNDM},
    },
    "small_sd": {
        "unet": {
            "block_out_channels": (16, 16, 32),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        },
        "scheduler": {"class": "PNDMScheduler", **_PNDM},
    },
    "xl": _XL,
    "xl_turbo": {
        **_XL,
        "scheduler": {"class": "EulerAncestralDiscreteScheduler", **_SCHEDULE, "timestep_spacing": "trailing"},
    },
    "lcm_xl": {**_XL, "unet": {**_XL["unet"], "time_cond_proj_dim": 16}, "scheduler": _LCM},
    "ssd1b": {
        **_XL,
        "unet": {
            **_XL_OF_THREE_LEVELS,
            "transformer_layers_per_block": (1, (2, 2), (4, 4)),
            "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        },
    },
    "vega": {
        **_XL,
        "unet": {
            **_XL_OF_THREE_LEVELS,
            "transformer_layers_per_block": (1, (1, 1), (2, 2)),
            "reverse_transformer_layers_per_block": ((2, 2, 2), (1, 1, 1), 1),
        },
    },
    "sd_inpaint": {
        "unet": {"in_channels": 9},
        "scheduler": {"class": "DDIMScheduler", **_DDIM},
        "index": {"_class_name": "StableDiffusionInpaintPipeline"},
    },
    "xl_inpaint": {
        **_XL,
        "unet": {**_XL["unet"], "in_channels": 9},
        "index": {**_XL["index"], "_class_name": "StableDiffusionXLInpaintPipeline"},
    },
    "lcm": {
        "unet": {"time_cond_proj_dim": 16},
        "scheduler": _LCM,
        "index": {"_class_name": "LatentConsistencyModelPipeline"},
    },
}
KINDS = ("sd1", "sd2", "tiny_sd", "small_sd")  # of StableDiffusionPipeline


def write_pipeline(
    folder: Path,
    kind: str = "sd1",
    seed: int = SEED,
    *,
    unet: Json | None = None,
    vae: Json | None = None,
    text: Json | None = None,
    text_2: Json | None = None,
    scheduler: str | None = None,
    scheduler_config: Json | None = None,
    factor: int = 8,
    sample_size: int | list[int] = 8,
    tokenizer: str = "files",
    pad: str | None = None,
    index: Json | None = None,
    **saving: Any,
) -> Path:
    """Write a pipeline of one of the kinds, and return its folder.

    Args:
        seed: of the weights.
        unet, vae, text, text_2: fields of the networks' configs. If `text` has a hidden_size, `cross_attention_dim`
            follows it.
        scheduler: another class. Its config is then the published one without what belongs to the kind's class.
        scheduler_config: fields of its config.
        factor: of the VAE: 2, 4 or 8.
        sample_size: of latents, one side or [height, width].
        tokenizer: "files" (vocab.json and merges.txt), or "json" (tokenizer.json, as transformers 5 writes it).
        pad: the padding token.
        index: entries of model_index.json.
        saving: arguments of save_pretrained of the networks, as `variant` and `max_shard_size`.
    """
    parts = _KINDS[kind]
    texts = [{**_TEXT, **parts.get("text", {}), **(text or {})}]
    if "text_2" in parts:
        texts.append({**_TEXT, **parts["text_2"], **(text_2 or {})})
    condition = {
        **_UNET,
        "sample_size": sample_size,
        **parts.get("unet", {}),
        **({"cross_attention_dim": text["hidden_size"]} if text and "hidden_size" in text else {}),
        **(unet or {}),
    }
    settings = dict(parts["scheduler"])
    kind_class = settings.pop("class")
    name = scheduler or kind_class
    config = {**(settings if name == kind_class else _SCHEDULE), **(scheduler_config or {})}

    folder.mkdir(parents=True, exist_ok=True)
    networks = {
        "unet": condition_network(seed, **condition),
        "vae": vae_network(seed + 1, factor, **{**parts.get("vae", {}), **(vae or {})}),
        "text_encoder": text_network(seed + 2, **texts[0]),
    }
    if len(texts) > 1:
        networks["text_encoder_2"] = text_network(seed + 3, "CLIPTextModelWithProjection", **texts[1])
    for part, network in networks.items():
        network.save_pretrained(folder / part, **saving)
    with _quiet():
        scheduler_class(name).from_config(config).save_pretrained(folder / "scheduler")
    write_tokenizer(folder / "tokenizer", tokenizer, pad or parts.get("tokenizer", {}).get("pad", END))
    entries = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", name],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if len(texts) > 1:
        write_tokenizer(folder / "tokenizer_2", tokenizer, parts["tokenizer_2"]["pad"])
        entries |= {
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
        del entries["safety_checker"], entries["requires_safety_checker"]
    _write_json(folder / "model_index.json", {**entries, **parts.get("index", {}), **(index or {})})
    return folder


def condition_network(seed: int = SEED, **fields: Any) -> Any:
    """diffusers' UNet2DConditionModel with random weights; by default that of sd1."""
    return _filled(UNet2DConditionModel(**{**_UNET, **fields}), seed)


def vae_network(seed: int = SEED, factor: int = 8, **fields: Any) -> Any:
    """diffusers' AutoencoderKL with random weights."""
    levels = factor.bit_length()
    config = {
        "block_out_channels": (16,) * levels,
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
    }
    return _filled(AutoencoderKL(**{**config, **fields}), seed)


def text_network(seed: int = SEED, kind: str = "CLIPTextModel", **fields: Any) -> Any:
    """transformers' CLIPTextModel, or the class of another name, with random weights; by default that of sd1."""
    import transformers

    config = transformers.CLIPTextConfig(**{**_TEXT, **fields})
    return _filled(getattr(transformers, kind)(config), seed)


def write_tokenizer(folder: Path, form: str = "files", pad: str = END, merges: tuple[str, ...] = MERGES) -> Path:
    """Write a CLIP tokenizer: 256 letters of bytes, the same at the end of a word, merges, and two special tokens."""
    vocabulary = _vocabulary(merges)
    folder.mkdir(parents=True, exist_ok=True)
    if form == "json":
        import transformers

        pairs = [tuple(merge.split()) for merge in merges]
        tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad, model_max_length=77)
        tokenizer.save_pretrained(folder)
        return folder
    special = {"bos_token": _token(START), "eos_token": _token(END), "unk_token": _token(END)}
    _write_json(folder / "vocab.json", vocabulary)
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges), "utf-8")
    _write_json(folder / "special_tokens_map.json", {**special, "pad_token": pad})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "pad_token": pad,
            "tokenizer_class": "CLIPTokenizer",
            **{name: {"__type": "AddedToken", **token} for name, token in special.items()},
        },
    )
    return folder


def load_pipeline(folder: Path, kind: Any = DiffusionPipeline, **arguments: Any) -> Any:
    """diffusers' pipeline of a folder, in float32, without a progress bar.

    Args:
        kind: its class; by default that of model_index.json.
    """
    checker = {} if (folder / "text_encoder_2").exists() else {"safety_checker": None}
    settings = {"torch_dtype": torch.float32, "low_cpu_mem_usage": False, **checker, **arguments}
    with _quiet():
        pipeline = kind.from_pretrained(folder, **settings)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any, prompt: str | None, seed: int = 0, **arguments: Any) -> NDArray[np.float32]:
    """The pipeline's one image, [H, W, 3] in 0 … 1; its latents [C, h, w] with output_type="latent".

    Args:
        prompt: None where the arguments have embeddings.
    """
    rng = torch.Generator().manual_seed(seed)
    settings = {"output_type": "np", **arguments}
    with _quiet():
        image = pipeline(prompt, generator=rng, **settings).images[0]
    return np.asarray(image)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' advice on old files, and NumPy's on Euler schedulers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _filled(network: Any, seed: int) -> Any:
    """Random values that float16 represents; the weights of norms are about 1."""
    rng = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in network.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            if id(parameter) in embeddings:
                values = noise
            elif parameter.ndim > 1:
                values = noise / parameter[0].numel() ** 0.5
            else:
                values = 0.1 * noise + name.endswith("weight")
            parameter.copy_(values.half())
    return network.requires_grad_(False).eval()


def _vocabulary(merges: tuple[str, ...]) -> dict[str, int]:
    """Each byte has a printable letter. `!` is 0, as in the published files."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {word: n for n, word in enumerate([*words, START, END])}


def _token(content: str) -> Json:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _write_json(path: Path, values: Json) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")
