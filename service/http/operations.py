"""The routes for operators: health, metrics, facts."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

import service
from model.rows import Group
from model.samplers import SAMPLERS
from service.config import Settings
from service.engine.costs import Costs
from service.engine.engine import Engine
from service.http import openapi
from service.http.metrics import CONTENT_TYPE, Metrics, exposition
from service.plan.conditions import embedded_fields
from service.plan.served import Served
from service.plan.texts import prompt_limits

_SIGMA_SCHEDULES = {name: sampler.sigma_schedules for name, sampler in SAMPLERS.items() if sampler.sigma_schedules}


@dataclass(frozen=True, slots=True)
class Operations:
    """The routes' dependencies."""

    engine: Engine
    served: Served
    settings: Settings
    metrics: Metrics

    def router(self) -> APIRouter:
        return _routed(
            ("/health/live", self.live, openapi.LIVE),
            ("/health/ready", self.ready, openapi.READY),
            ("/health", self.ready, openapi.HEALTH),
            ("/info", self.info, openapi.INFO),
        )

    def metrics_router(self) -> APIRouter:
        return _routed(("/metrics", self.read_metrics, openapi.METRICS))

    async def live(self) -> Response:
        """200 while the process can serve at all: the engine's threads run, and no call of the model is stuck."""
        self.engine.asked()
        alive = self.engine.alive or (self.engine.status == "draining" and self.engine.beyond_help is None)
        status, code = ("live", 200) if alive else ("failed", 503)
        return JSONResponse({"status": status}, code, {"Cache-Control": "no-store"})

    async def ready(self) -> Response:
        """200 while a request would be served. The answer comes at once, from what is known."""
        self.engine.asked()
        status = self.engine.status
        return JSONResponse(
            {"status": status, "model": self.served.model.name, "version": service.__version__},
            200 if status == "ready" else 503,
            {"Cache-Control": "no-store"} | ({} if status == "ready" else {"Retry-After": "2"}),
        )

    async def read_metrics(self) -> Response:
        """Prometheus text."""
        return Response(exposition(self.metrics, self.engine, self.served), media_type=CONTENT_TYPE)

    async def info(self) -> Response:
        """The model, what computes it, and what a request may ask for."""
        served, model, settings = self.served, self.served.model, self.settings
        distilled, parts = model.distilled, served.fingerprint_parts
        vae = model.vae
        default = served.groups[0]
        return JSONResponse(
            {
                "version": service.__version__,
                "model": {
                    "name": model.name,
                    "digest": model.digest,
                    "architecture": model.architecture,
                    "num_parameters": model.num_parameters,
                },
                "prediction_type": model.schedule.prediction_type,
                "num_train_timesteps": model.schedule.num_train_timesteps,
                "image_shape": list(served.model.image_shape_of(default)),
                "latent_shape": None if vae is None else list(served.model.sample_shape_of(default)),
                "sizes": [self._size(group) for group in served.groups],
                "first_stage": None if vae is None else asdict(vae),
                "preview": None if served.preview is None else "linear",
                "text": None if model.text is None else {**asdict(model.text), **prompt_limits(model.text)},
                "embedded_fields": embedded_fields(model),
                "safety_checker": model.safety_checker,
                "inpaints": model.inpaints,
                "out_channels": model.out_channels,
                "num_classes": model.num_classes,
                "class_names": list(model.class_names) or None,
                "samplers": [distilled.sampler] if distilled else list(SAMPLERS),
                "sigma_schedules": {} if distilled else _SIGMA_SCHEDULES,
                "num_inference_steps": list(distilled.num_inference_steps) if distilled else None,
                "recommended": asdict(model.recommended),
                "limits": {
                    "max_images": settings.max_images,
                    "max_batch": max(self.engine.widths),
                    "max_queue": settings.max_queue,
                    "max_body": int(settings.max_body),
                    "timeout_s": settings.timeout,
                },
                "device": served.device,
                "backend": parts["backend"],
                "precision": parts["precision"],
                "fingerprint": served.fingerprint,
                "fingerprint_parts": dict(parts),
                "reproducible": served.reproducible,
                **self._seconds(default),
            },
            headers={"Cache-Control": "no-store"},
        )

    def _size(self, group: Group) -> dict[str, Any]:
        return {"width": group.width, "height": group.height, **self._seconds(group)}

    def _seconds(self, group: Group) -> dict[str, dict[str, float] | None]:
        """What passes and decodings of a size cost."""
        machine = None if self.engine.scheduler is None else self.engine.scheduler.machine
        passes = None if machine is None else machine.passes[group]
        decode = None if machine is None else machine.decode.get(group)
        decoding = None if self.served.model.vae is None else _by_width(decode)
        return {"seconds_per_step": _by_width(passes), "seconds_per_decode": decoding}


def _routed(*endpoints: tuple[str, Callable[[], Awaitable[Response]], dict[str, Any]]) -> APIRouter:
    """Routes for GET and HEAD. Each endpoint has a path, a function and documentation."""
    router = APIRouter(tags=["operations"])
    for path, endpoint, documentation in endpoints:
        router.add_api_route(path, endpoint, methods=["GET"], **documentation)
        router.add_api_route(path, endpoint, methods=["HEAD"], include_in_schema=False)
    return router


def _by_width(costs: Costs | None) -> dict[str, float]:
    """Seconds of a batch by its width. Empty while the costs are unknown."""
    return {} if costs is None else {str(width): seconds for width, seconds in costs.by_width.items()}
