"""The routes of AUTOMATIC1111's API under /sdapi/v1. Read → translate → plan → submit → answer."""

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from model.rows import Image
from service.engine.requests import Progress
from service.errors import NotBuilt
from service.http.a1111 import documents, facts, img2img
from service.http.a1111.fields import Txt2Img, read
from service.http.a1111.info import Answer
from service.http.a1111.running import Job, Running
from service.http.a1111.translation import Translated, its_names, translated
from service.http.bodies import Body
from service.http.drawing import Studio
from service.http.leaving import unless_client_leaves
from service.http.parsing import check_type, json_object
from service.http.pictures import Attached
from service.http.pieces import Bytes
from service.http.png import encode_png
from service.http.responses import JSON, headers_of, server_timing
from service.plan.fields import SampleRequest
from service.plan.pictures import INPAINTS, Picture
from service.plan.served import Served

_PREFIX = "/sdapi/v1"
_NOTHING = Progress(0, 0, 0.0, 0, 0, 0.0)
_MAX_JSON = 2**22  # bytes; decoding holds the interpreter for about 1.5 ms a MiB
_NEVER_STORE = {"Cache-Control": "no-store"}

Read = TypeVar("Read")


class Words(NamedTuple):
    """What a request says beside its images.

    Attributes:
        ignored: names of fields that were sent and have no effect.
        told: on the way to the fields of /sample.
        fields: those of /sample.
    """

    asked: Txt2Img
    ignored: tuple[str, ...]
    told: Translated
    fields: SampleRequest


@dataclass(frozen=True)
class WebUI:
    """The routes' dependencies."""

    studio: Studio
    running: Running = field(default_factory=Running)

    def router(self) -> APIRouter:
        router = APIRouter(prefix=_PREFIX, tags=["a1111"])
        txt2img = documents.txt2img(self.studio.sample_model, self.served)
        from_images = documents.img2img(self.studio.sample_model, self.served)
        set_options = documents.set_options(self.studio.sample_model, self.served)
        router.add_api_route("/txt2img", self.txt2img, methods=["POST"], **txt2img)
        router.add_api_route("/img2img", self.img2img, methods=["POST"], **from_images)
        router.add_api_route("/interrupt", self.interrupt, methods=["POST"], **documents.interrupt())
        router.add_api_route("/options", self.set_options, methods=["POST"], **set_options)
        model = self.served.model
        lists = {
            "options": facts.options(model),
            "sd-models": facts.models(model),
            "samplers": facts.sampler_list(model),
            "schedulers": facts.scheduler_list(model),
            **facts.EMPTY,
        }
        gets: dict[str, Callable[..., Awaitable[Response]]] = {
            "progress": self.progress,
            **{name: _telling(fact) for name, fact in lists.items()},
        }
        for name, tell in gets.items():
            router.add_api_route(f"/{name}", tell, methods=["GET"], **documents.get(name))
            router.add_api_route(f"/{name}", tell, methods=["HEAD"], include_in_schema=False)
        return router

    async def txt2img(self, request: Request) -> Response:
        await self._check_pictures(request)
        if self.served.model.inpaints:
            await Body.of(request).discard()
            raise NotBuilt(f"{INPAINTS}: POST {_PREFIX}/img2img draws, with an image and a mask")

        def parse(body: Bytes) -> Words:
            return self._words(*read(json_object(body, self._max_json), self.served.model.name, Txt2Img))

        return await self._draw(request, await self._json(request, parse))

    async def img2img(self, request: Request) -> Response:
        await self._check_pictures(request)
        await self._check_json(request)

        def parse(body: Bytes) -> tuple[Words, Attached]:
            asked, ignored, files = img2img.read(body, self._max_json, self.served.model.name)
            words = self._words(asked, ignored, img2img.beginning(asked, files))
            return words, files.attached(words.fields)

        words, picture = await self.studio.read_pictured(request, parse)
        return await self._draw(request, words, picture)

    async def _check_pictures(self, request: Request) -> None:
        if not self.served.draws_pictures:
            await Body.of(request).discard()
            raise NotBuilt("this model's images are no pictures: POST /sample answers them as .npy files")

    def _words(self, asked: Txt2Img, ignored: tuple[str, ...], begun: Mapping[str, object] | None = None) -> Words:
        """What a request asks for, in the fields of /sample.

        Args:
            begun: the fields about an image.
        """
        with its_names():
            told = translated(asked, self.served, self.studio.settings.max_images)
            return Words(asked, ignored, told, self.studio.sample_model.validated({**told.values, **(begun or {})}))

    async def _draw(self, request: Request, words: Words, picture: Picture | None = None) -> Response:
        asked, ignored, told, fields = words
        with its_names():
            plan = await self.studio.planned(fields, picture=picture)
        plan = replace(plan, warnings=(*told.warnings, *plan.warnings))
        answer = Answer(asked, told, plan, self.served, ignored)
        call = "txt2img" if picture is None else "img2img"
        job = Job(asked.force_task_id, call, len(plan.rows), len(plan.rows[0].table))
        with self.running.of(Body.of(request).client, job):
            accepted = await self.studio.submit(request, fields, plan, answer.encoding, job)
            finished = await unless_client_leaves(request.receive, asyncio.ensure_future(job.result(accepted)))
        headers = {**headers_of(plan), **_NEVER_STORE}
        if finished is None:
            return Response(await run_in_threadpool(answer.interrupted, job.images), headers=headers, media_type=JSON)
        return Response(finished.body, headers={**headers, **server_timing(finished, self.served)}, media_type=JSON)

    async def progress(self, request: Request) -> Response:
        """How far the caller's request is."""
        job = self._job(request)
        x0 = None if job is None or _is_true(request.query_params.get("skip_current_image")) else job.latest_preview
        image = None if x0 is None else await run_in_threadpool(self._preview, x0)
        said = _progress_of(job)
        return _answer({**said, "current_image": image, "textinfo": None})

    async def interrupt(self, request: Request) -> Response:
        """Stop the caller's request."""
        await Body.of(request).discard()
        if job := self._job(request):
            job.interrupt()
        return _answer({})

    async def set_options(self, request: Request) -> Response:
        """Options cannot be set. The answer names those that were to change."""
        values = await self._json(request, lambda body: json_object(body, self._max_json))
        names = facts.not_set(values, self.served.model)
        return _answer({"ignored": names} if names else None)

    @property
    def served(self) -> Served:
        return self.studio.served

    async def _json(self, request: Request, parse: Callable[[Bytes], Read]) -> Read:
        await self._check_json(request)
        return await self.studio.read(request, parse)

    async def _check_json(self, request: Request) -> None:
        if not await Body.of(request).is_empty():
            check_type(request.headers.get("content-type", ""), JSON)

    @property
    def _max_json(self) -> int:
        """Bytes. Programs send images for scripts, which are ignored, so JSON may be larger than /sample's."""
        return max(_MAX_JSON, self.studio.max_json)

    def _job(self, request: Request) -> Job | None:
        """The caller's oldest request, or the oldest with the id in the query."""
        query = request.query_params
        return self.running.oldest(Body.of(request).client, query.get("id_task", query.get("force_task_id")))

    def _preview(self, x0: Image) -> str | None:
        """A preview as a PNG in base64. None for values of a request that is about to fail."""
        if not np.isfinite(x0).all():
            return None
        rough = self.served.preview
        return base64.b64encode(encode_png(x0 if rough is None else rough(x0), {})).decode()


def _telling(fact: object) -> Callable[[], Awaitable[Response]]:
    """A route that tells a fact."""

    async def tell() -> Response:
        return _answer(fact)

    return tell


def _answer(content: object) -> Response:
    """JSON in ASCII, because names that clients send may be no Unicode."""
    return Response(json.dumps(content), headers=_NEVER_STORE, media_type=JSON)


def _progress_of(job: Job | None) -> dict[str, object]:
    """How far a request is, as AUTOMATIC1111 says it. Its jobs are our images."""
    said = _NOTHING if job is None else job.latest
    state = {
        "skipped": False,
        "interrupted": job is not None and job.is_interrupted,
        "stopping_generation": False,
        "job": "" if job is None else job.name,
        "job_count": said.images,
        "job_timestamp": "0" if job is None else job.began,
        "job_no": said.images_done,
        "sampling_step": said.step,
        "sampling_steps": said.steps,
    }
    return {"progress": said.fraction, "eta_relative": said.eta_s, "state": state}


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1", "yes", "on")
