"""A peer: what a user would write first. FastAPI around a diffusers pipeline, one request at a time.

    CHECKPOINT=FOLDER PORT=9101 python -m bench.peers.diffusers_server

A pipeline's scheduler holds the state of one run, so requests must take turns.
"""

import io
import os
import threading
from typing import Any

import diffusers
import torch
import uvicorn
from fastapi import FastAPI, Response
from pydantic import BaseModel

Pipeline: Any = diffusers.DDIMPipeline
pipeline = Pipeline.from_pretrained(os.environ["CHECKPOINT"])
pipeline.set_progress_bar_config(disable=True)
turn = threading.Lock()
app = FastAPI()


class SampleRequest(BaseModel):
    num_inference_steps: int = 50
    seed: int = 0


@app.get("/health")
def health() -> dict[str, str]:
    return {"status": "ready"}


@app.post("/sample")
def sample(request: SampleRequest) -> Response:
    with turn, torch.inference_mode():
        image = pipeline(
            batch_size=1,
            generator=torch.Generator().manual_seed(request.seed),
            num_inference_steps=request.num_inference_steps,
        ).images[0]
    png = io.BytesIO()
    image.save(png, "PNG")
    return Response(png.getvalue(), media_type="image/png")


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ["PORT"]), log_level="warning")
