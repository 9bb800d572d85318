"""A peer: a text-to-image pipeline of diffusers on the CPU, a call at a time.

    python -m bench.peers.diffusers_text FOLDER DTYPE FORMAT

Loads the pipeline and writes a line. FORMAT is torch's memory format of the networks: contiguous_format, which is
diffusers' default, or channels_last. Then each line of standard input asks for one call, as JSON, and a line with its
seconds follows. A step is the U-Net's pass alone, without the scheduler and without guidance.
"""

import json
import sys
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from service.config import available_cores


def step(pipeline: Any, rows: int, height: int, width: int) -> Callable[[], object]:
    """A pass of the U-Net with this many rows, for images of this size."""
    unet = pipeline.unet
    shape = (rows, unet.config.in_channels, *_latents(pipeline, height, width))
    more: Mapping[str, Any] = {}
    if unet.config.addition_embed_type == "text_time":
        pooled = random(pipeline, rows, pipeline.text_encoder_2.config.projection_dim)
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * rows, dtype=pipeline.dtype)
        more = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
    x, context = random(pipeline, *shape), random(pipeline, rows, 77, unet.config.cross_attention_dim)
    return lambda: unet(x, 500, encoder_hidden_states=context, **more)


def text(pipeline: Any, prompt: str) -> Callable[[], object]:
    """A prompt through the text encoders."""
    how = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    return lambda: pipeline.encode_prompt(prompt=prompt, **how)


def decode(pipeline: Any, height: int, width: int) -> Callable[[], object]:
    """The decoding of an image."""
    z = random(pipeline, 1, pipeline.vae.config.latent_channels, *_latents(pipeline, height, width))
    return lambda: pipeline.vae.decode(z)


CALLS: Mapping[str, Callable[..., Callable[[], object]]] = {"step": step, "text": text, "decode": decode}


def random(pipeline: Any, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(pipeline.dtype)


def _latents(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    factor = pipeline.vae_scale_factor
    return height // factor, width // factor


def main() -> None:
    folder, dtype, memory_format = sys.argv[1:]
    torch.set_num_threads(available_cores())
    Pipeline: Any = DiffusionPipeline
    pipeline = Pipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype))
    for network in (pipeline.unet, pipeline.vae):
        network.to(memory_format=getattr(torch, memory_format))
    print("{}", flush=True)  # loaded
    for line in sys.stdin:
        fields = json.loads(line)
        call = CALLS[fields.pop("call")](pipeline, **fields)
        with torch.inference_mode():
            began = perf_counter()
            call()
            print(json.dumps({"seconds": perf_counter() - began}), flush=True)


if __name__ == "__main__":
    main()
