"""The routes that make images: /sample, /denoise, /noise. Read → plan → draw → encode → respond.

Of latent diffusion, PNGs are pixels and .npy files are latents. A PNG that is uploaded goes through the encoder first.
"""

import asyncio
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from time import perf_counter

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from model.rows import Image
from service import openapi
from service.answers import EVENTS, JSON, NPY, PNG, ZIP, encode, etag, matches, negotiate, respond
from service.config import Settings
from service.engine import Engine
from service.errors import DeadlinePassed, Invalid
from service.events import EventStream, Mailbox
from service.images import decode, encode_npy, encode_png16, is_png
from service.leaving import unless_client_leaves
from service.metrics import Metrics
from service.middleware import CLIENT_LEFT
from service.places import household
from service.planning import Plan, noised, plan_denoise, plan_sample
from service.reading import read_json, read_text, read_upload
from service.schemas import DenoiseRequest, NoiseRequest, SampleRequest
from service.served import Served

_SAMPLE_MEDIA = (PNG, JSON, ZIP, EVENTS)
_KEPT_MEDIA = (PNG, ZIP)  # the same bytes each time
_VARY = {"Vary": "Accept"}
_SMALL = 2**12  # values; encoding so few takes no longer than handing them to another thread
_NEVER_STORE = {"Cache-Control": "no-store", **_VARY}


@dataclass(frozen=True, slots=True)
class Generation:
    """The routes' dependencies."""

    engine: Engine
    served: Served
    settings: Settings
    metrics: Metrics

    def router(self) -> APIRouter:
        router = APIRouter(tags=["images"])
        router.add_api_route("/sample", self.sample, methods=["POST"], **openapi.sample(self.served, self.settings))
        router.add_api_route(
            "/sample", self.sample_by_query, methods=["GET"], **openapi.sample_by_query(self.served, self.settings)
        )
        router.add_api_route("/sample", self.sample_by_query, methods=["HEAD"], include_in_schema=False)
        router.add_api_route("/denoise", self.denoise, methods=["POST"], **openapi.denoise(self.served, self.settings))
        router.add_api_route("/noise", self.noise, methods=["POST"], **openapi.noise(self.served, self.settings))
        return router

    async def sample(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), _SAMPLE_MEDIA)
        body = await read_json(request, SampleRequest)
        plan = plan_sample(body, self.served, self.settings.max_images, self.settings.timeout)
        return await self._draw(request, plan, media_type, _NEVER_STORE)

    async def sample_by_query(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), _SAMPLE_MEDIA)
        await request.body()  # there should be none; one that is too large is refused here, and not amid the answer
        query = request.query_params
        wanted = query.getlist("model")
        fields = read_text([item for item in query.multi_items() if item[0] != "model"], SampleRequest)
        if any(fingerprint != self.served.fingerprint for fingerprint in wanted):
            raise Invalid.field("model", f"must be {self.served.fingerprint}, what answers here, and is {wanted[0]}")
        plan = plan_sample(fields, self.served, self.settings.max_images, self.settings.timeout)

        headers = dict(_NEVER_STORE)
        if fields.seed is not None and media_type in _KEPT_MEDIA and self.served.reproducible:
            tag = etag(plan, media_type)
            headers = {"ETag": tag, "Cache-Control": self._cache_control(immutable=bool(wanted)), **_VARY}
            if matches(", ".join(request.headers.getlist("if-none-match")), tag):
                return Response(status_code=304, headers=headers)
        if request.method == "HEAD":
            if fields.seed is not None:
                headers["X-Seed"] = str(fields.seed)
            response = Response(headers=headers, media_type=media_type)
            del response.headers["content-length"]  # known only once the image is drawn
            return response
        return await self._draw(request, plan, media_type, headers)

    async def denoise(self, request: Request) -> Response:
        fields, upload = await read_upload(request, DenoiseRequest)
        offers = (PNG, JSON, NPY, EVENTS) if fields.output == "x0" else (NPY,)
        media_type = negotiate(_accept(request), offers)
        image = await self._read(upload, fields.value_range)
        planned = partial(
            plan_denoise, fields, served=self.served, timeout=self.settings.timeout, latent=media_type == NPY
        )
        if not self._is_encoded(upload):
            return await self._draw(request, planned(image), media_type, _NEVER_STORE)

        draft = planned(self._no_latents)  # what is wrong is refused here, and not after the encoding
        timeout_s = draft.timeout_s
        self.engine.check_possible(draft.rows, timeout_s)
        began = perf_counter()
        plan = planned(await self._answer(request, self.engine.encode(image), timeout_s))
        plan = replace(plan, timeout_s=timeout_s - (perf_counter() - began))
        try:
            return await self._draw(request, plan, media_type, _NEVER_STORE)
        except Invalid:  # what is left of its time is too short
            raise _passed(timeout_s) from None

    async def noise(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), (PNG, NPY))
        fields, upload = await read_upload(request, NoiseRequest)
        clean = await self._read(upload, value_range=1.0)
        timeout_s = self.settings.timeout
        if self._is_encoded(upload):
            noised(fields, self._no_latents, self.served)  # what is wrong is refused here, and not after the encoding
            clean = await self._answer(request, self.engine.encode(clean), timeout_s)
        noisy, seed = await run_in_threadpool(noised, fields, clean, self.served)
        headers = {"X-Seed": str(seed), **_NEVER_STORE}
        if media_type == NPY:
            return Response(await run_in_threadpool(encode_npy, noisy), headers=headers, media_type=NPY)
        if self._is_latent:
            noisy = await self._answer(request, self.engine.decode(noisy), timeout_s)
        png, clipped = await run_in_threadpool(encode_png16, noisy, fields.value_range)
        return Response(png, headers={**headers, "X-Clipped": f"{clipped:.6g}"}, media_type=PNG)

    @property
    def _is_latent(self) -> bool:
        return self.served.model.first_stage is not None

    @property
    def _no_latents(self) -> Image:
        return np.zeros(self.served.model.sample_shape, np.float32)

    async def _read(self, upload: bytes, value_range: float) -> Image:
        model = self.served.model
        latent_shape = model.sample_shape if self._is_latent else None
        return await run_in_threadpool(decode, upload, model.image_shape, value_range, latent_shape)

    def _is_encoded(self, upload: bytes) -> bool:
        """Whether an upload goes through the encoder, and is latents only then."""
        return self._is_latent and is_png(upload)

    async def _answer(self, request: Request, errand: Future[Image], timeout_s: float) -> Image:
        """Wait for an answer of the first stage.

        Raises:
            ClientDisconnect: where the client leaves, which cancels it.
            DeadlinePassed: where it takes longer than `timeout_s`.
        """
        waiting = asyncio.ensure_future(asyncio.wait_for(asyncio.wrap_future(errand), timeout_s))
        try:
            image = await unless_client_leaves(request.receive, waiting)
        except TimeoutError:
            raise _passed(timeout_s) from None
        if image is None:
            raise ClientDisconnect
        return image

    async def _draw(self, request: Request, plan: Plan, media_type: str, headers: Mapping[str, str]) -> Response:
        client = self._client(request)
        if media_type == EVENTS:
            mailbox = Mailbox(plan.preview_every, asyncio.get_running_loop())
            accepted = self.engine.submit(plan.rows, plan.timeout_s, client, mailbox)
            headers = {"X-Seed": str(plan.seeds[0]), **headers}
            return EventStream(accepted, mailbox, plan, self.served, headers, self.metrics)
        accepted = self.engine.submit(plan.rows, plan.timeout_s, client)
        finished = await unless_client_leaves(request.receive, asyncio.wrap_future(accepted.future))
        if finished is None:
            return Response(status_code=CLIENT_LEFT)
        encode_it = partial(encode, plan, finished, media_type, self.served, perf_counter)
        small = sum(image.size for image in finished.images) <= _SMALL
        encoded = encode_it() if small else await run_in_threadpool(encode_it)
        self.metrics.encoded(encoded.encode_s)
        return respond(plan, finished, encoded, self.served, headers)

    def _client(self, request: Request) -> str:
        """Who shares the queue: a key, or an address where there are no keys."""
        if self.settings.api_keys:
            return request.headers["authorization"].partition(" ")[2].strip()  # "bearer KEY" is no other client
        return household(request.client.host) if request.client else "unknown"

    def _cache_control(self, immutable: bool) -> str:
        scope = "private, " if self.settings.api_keys else ""  # for the one who has the key
        return scope + ("max-age=31536000, immutable" if immutable else "max-age=3600")


def _passed(timeout_s: float) -> DeadlinePassed:
    return DeadlinePassed(f"not done within {timeout_s:g} s")


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))
