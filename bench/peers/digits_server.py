"""A peer for the digits: FastAPI around a plain torch loop with diffusers' scheduler, one request at a time.

PORT=9101 python -m bench.peers.digits_server
"""

import io
import os
import threading
from typing import Any

import diffusers
import torch
import uvicorn
from fastapi import FastAPI, Response
from PIL import Image
from pydantic import BaseModel

from model.checkpoints.load import load
from service.build import BOX

checkpoint = load(BOX / "digits")
description = checkpoint.description
network = checkpoint.network
turn = threading.Lock()
app = FastAPI()


class SampleRequest(BaseModel):
    num_inference_steps: int = description.recommended.num_inference_steps
    seed: int = 0
    class_label: int = 0


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/sample")
def sample(request: SampleRequest) -> Response:
    with turn, torch.inference_mode():
        pixels = draw(request)
    png = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")


def draw(request: SampleRequest) -> torch.Tensor:
    Scheduler: Any = diffusers.DPMSolverMultistepScheduler
    schedule = description.schedule
    scheduler = Scheduler(beta_schedule=schedule.beta_schedule, prediction_type=schedule.prediction_type)
    scheduler.set_timesteps(request.num_inference_steps)
    x = torch.randn((1, *description.image_shape), generator=torch.Generator().manual_seed(request.seed))
    labels = torch.tensor([request.class_label, description.no_label])
    for t in scheduler.timesteps:
        own, none = network(torch.cat([x, x]), t.repeat(2), labels).chunk(2)
        out = none + description.recommended.guidance_scale * (own - none)
        x = scheduler.step(out, t, x).prev_sample
    return ((x[0, 0] / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
