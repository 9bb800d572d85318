"""A peer: LitServe, which collects requests into a batch and runs it to its end.

    CHECKPOINT=FOLDER PORT=9101 python -m bench.peers.litserve_server

Requests with different numbers of steps cannot share a pipeline's call, so a batch is one call for each number.
"""

import base64
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import diffusers
import litserve
import torch


class Sample(litserve.LitAPI):  # type: ignore[misc]
    def setup(self, device: str) -> None:
        Pipeline: Any = diffusers.DDIMPipeline
        self.pipeline = Pipeline.from_pretrained(os.environ["CHECKPOINT"])
        self.pipeline.set_progress_bar_config(disable=True)

    def decode_request(self, request: dict[str, int]) -> tuple[int, int]:
        return request.get("num_inference_steps", 50), request.get("seed", 0)

    def predict(self, requests: Sequence[tuple[int, int]]) -> list[Any]:
        images: list[Any] = [None] * len(requests)
        groups = defaultdict(list)
        for index, (steps, seed) in enumerate(requests):
            groups[steps].append((index, seed))
        with torch.inference_mode():
            for steps, members in groups.items():
                made = self.pipeline(
                    batch_size=len(members),
                    generator=[torch.Generator().manual_seed(seed) for _, seed in members],
                    num_inference_steps=steps,
                ).images
                for (index, _), image in zip(members, made, strict=True):
                    images[index] = image
        return images

    def encode_response(self, image: Any) -> dict[str, str]:
        png = io.BytesIO()
        image.save(png, "PNG")
        return {"b64_json": base64.b64encode(png.getvalue()).decode()}


if __name__ == "__main__":
    api = Sample(max_batch_size=8, batch_timeout=0.02, api_path="/sample")
    server = litserve.LitServer(api, accelerator="cpu", timeout=600)
    server.run(port=int(os.environ["PORT"]), host="127.0.0.1", log_level="warning", generate_client_file=False)
