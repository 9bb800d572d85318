"""The routes that make images: /sample, /denoise, /noise. Read → plan → draw → encode → respond.

With latent diffusion, PNGs hold pixels and .npy files hold latents. The encoder turns an uploaded PNG into latents.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from time import perf_counter
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from model.rows import Image
from service.config import Settings
from service.engine.engine import Engine
from service.engine.requests import Encoding, Finished
from service.errors import DeadlinePassed, Invalid
from service.http import openapi
from service.http.bodies import Body
from service.http.events import EventStream, Mailbox
from service.http.formats import encode_npy
from service.http.leaving import unless_client_leaves
from service.http.metrics import Metrics
from service.http.middleware import CLIENT_LEFT
from service.http.models import RequestModel
from service.http.parsing import (
    FORM,
    MAX_PLAIN_JSON,
    check_query,
    check_type,
    read_json,
    read_upload,
)
from service.http.pieces import PIECE, Bytes
from service.http.png import encode_png16, is_png
from service.http.responses import (
    EVENTS,
    JSON,
    NPY,
    PNG,
    PURE_MEDIA,
    encoding,
    etag,
    image_media,
    matches,
    negotiate,
    noise_media,
    respond,
    sample_media,
)
from service.http.uploads import decode, most_bytes
from service.plan.fields import DenoiseRequest, Drawing, Noise, NoiseRequest, SampleRequest
from service.plan.plan import Plan, noised, plan_denoise, plan_sample
from service.plan.served import Served

_VARY = {"Vary": "Accept"}
_SMALL = 2**12  # values; encoding them takes no longer than a handover to another thread
_NEVER_STORE = {"Cache-Control": "no-store", **_VARY}


Fields = TypeVar("Fields", bound=Drawing | Noise)


class Upload(NamedTuple, Generic[Fields]):
    """An uploaded image and the fields beside it.

    Attributes:
        image: [C, H, W], or latents.
        is_encoded: the image holds pixels, and the encoder turns them into latents.
    """

    fields: Fields
    image: Image
    is_encoded: bool


@dataclass(frozen=True)
class Generation:
    """The routes' dependencies.

    Attributes:
        reading: held while an upload is read. So passes share the interpreter with only one upload.
    """

    engine: Engine
    served: Served
    settings: Settings
    metrics: Metrics
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def router(self) -> APIRouter:
        router = APIRouter(tags=["images"])
        sample, denoise, noise = self._sample_model, self._denoise_model, self._noise_model
        router.add_api_route("/sample", self.sample, methods=["POST"], **openapi.sample(sample, self.served))
        router.add_api_route(
            "/sample", self.sample_by_query, methods=["GET"], **openapi.sample_by_query(sample, self.served)
        )
        router.add_api_route("/sample", self.sample_by_query, methods=["HEAD"], include_in_schema=False)
        router.add_api_route("/denoise", self.denoise, methods=["POST"], **openapi.denoise(denoise, self.served))
        router.add_api_route("/noise", self.noise, methods=["POST"], **openapi.noise(noise, self.served))
        return router

    async def sample(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), sample_media(self.served))
        fields = await self._fields(request)
        plan = plan_sample(fields, self.served, self.settings.timeout, latent=media_type == NPY)
        return await self._draw(request, plan, media_type, _NEVER_STORE)

    async def sample_by_query(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), sample_media(self.served))
        await Body.of(request).discard()  # refuses a body that is too large before the answer begins
        check_query(request.scope["query_string"])
        query = request.query_params
        wanted = query.getlist("model")
        fields = self._sample_model.from_text([item for item in query.multi_items() if item[0] != "model"])
        if any(fingerprint != self.served.fingerprint for fingerprint in wanted):
            raise Invalid.field("model", f"must be {self.served.fingerprint}, what answers here, and is {wanted[0]}")
        plan = plan_sample(fields, self.served, self.settings.timeout, latent=media_type == NPY)

        headers = dict(_NEVER_STORE)
        if fields.seed is not None and media_type in PURE_MEDIA and self.served.reproducible:
            tag = etag(plan, media_type)
            headers = {"ETag": tag, "Cache-Control": self._cache_control(immutable=bool(wanted)), **_VARY}
            if matches(", ".join(request.headers.getlist("if-none-match")), tag):
                return Response(status_code=304, headers=headers)
        if request.method == "HEAD":
            if fields.seed is not None:
                headers["X-Seed"] = str(fields.seed)
            response = Response(headers=headers, media_type=media_type)
            del response.headers["content-length"]  # unknown before the image is drawn
            return response
        return await self._draw(request, plan, media_type, headers)

    async def denoise(self, request: Request) -> Response:
        fields, image, is_encoded = await self._upload(request, self._denoise_model, lambda fields: fields.value_range)
        offers = image_media(self.served) if fields.output == "x0" else (NPY,)
        media_type = negotiate(_accept(request), offers)
        planned = partial(
            plan_denoise, fields, served=self.served, timeout=self.settings.timeout, latent=media_type == NPY
        )
        if not is_encoded:
            return await self._draw(request, planned(image), media_type, _NEVER_STORE)

        draft = planned(self._no_latents)  # refuses invalid fields before the encoding
        timeout_s = draft.timeout_s
        self.engine.check_possible(draft.rows, timeout_s)
        began = perf_counter()
        plan = planned(await self._answer(request, self.engine.encode(image), timeout_s))
        plan = replace(plan, timeout_s=timeout_s - (perf_counter() - began))
        try:
            return await self._draw(request, plan, media_type, _NEVER_STORE)
        except Invalid:  # the rest of its time is too short
            raise _passed(timeout_s) from None

    async def noise(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), noise_media(self.served))
        fields, clean, is_encoded = await self._upload(request, self._noise_model, lambda _: 1.0)
        timeout_s = self.settings.timeout
        if is_encoded:
            noised(fields, self._no_latents, self.served)  # refuses invalid fields before the encoding
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
        return self.served.model.vae is not None

    @property
    def _no_latents(self) -> Image:
        return np.zeros(self.served.model.sample_shape, np.float32)

    @cached_property
    def _sample_model(self) -> RequestModel[SampleRequest]:
        return self._model(SampleRequest)

    @cached_property
    def _denoise_model(self) -> RequestModel[DenoiseRequest]:
        return self._model(DenoiseRequest)

    @cached_property
    def _noise_model(self) -> RequestModel[NoiseRequest]:
        return self._model(NoiseRequest)

    def _model(self, request: type[Fields]) -> RequestModel[Fields]:
        return RequestModel(request, self.served.model, self.settings.max_images, self.settings.timeout)

    async def _fields(self, request: Request) -> SampleRequest:
        """The fields of POST /sample. An empty body is `{}`, whatever its type."""
        body = Body.of(request)
        if not await body.is_empty():
            check_type(_content_type(request), JSON)
        sent = await body.read()
        read = partial(read_json, sent, self._sample_model)
        if len(sent) <= PIECE:
            return read()
        async with self.reading:
            fields = await run_in_threadpool(read)
        body.let_go()
        return fields

    async def _upload(
        self, request: Request, model: RequestModel[Fields], value_range: Callable[[Fields], float]
    ) -> Upload[Fields]:
        """Read an upload, and let its bytes go.

        Args:
            value_range: tells a PNG's value range from the fields beside it.
        """
        body = Body.of(request)
        content_type = _content_type(request)
        if not await body.is_empty():
            check_type(content_type, FORM, JSON)
        latent_shapes = [self.served.model.sample_shape] if self._is_latent else []
        shapes = [self.served.model.image_shape]
        max_json = MAX_PLAIN_JSON + most_bytes(shapes, latent_shapes) * 4 // 3

        def read(sent: Bytes) -> Upload[Fields]:
            fields, data = read_upload(content_type, sent, model, max_json)
            image = decode(data, shapes, value_range(fields), latent_shapes)
            return Upload(fields, image, self._is_latent and is_png(data))

        sent = await body.read()
        async with self.reading:
            upload = await run_in_threadpool(read, sent)
        body.let_go()
        return upload

    async def _answer(self, request: Request, errand: Future[Image], timeout_s: float) -> Image:
        """Wait for an errand of the VAE.

        Raises:
            ClientDisconnect: the client left. The errand is cancelled.
            DeadlinePassed: the errand took longer than `timeout_s`.
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
        client = Body.of(request).client
        if media_type == EVENTS:
            mailbox = Mailbox(plan.preview_every, asyncio.get_running_loop())
            accepted = self.engine.submit(plan.rows, plan.timeout_s, client, mailbox)
            headers = {"X-Seed": str(plan.seeds[0]), **headers}
            return EventStream(accepted, mailbox, plan, self.served, headers, self.metrics)
        accepted = self.engine.submit(plan.rows, plan.timeout_s, client)
        finished = await unless_client_leaves(request.receive, asyncio.wrap_future(accepted.future))
        if finished is None:
            return Response(status_code=CLIENT_LEFT)
        encode = partial(_encoded, finished, encoding(plan, media_type, self.served))
        small = sum(image.size for image in finished.images) <= _SMALL
        finished = encode() if small else await run_in_threadpool(encode)
        self.metrics.encoded(finished.encode_s)
        return respond(plan, finished, media_type, self.served, headers)

    def _cache_control(self, immutable: bool) -> str:
        scope = "private, " if self.settings.api_keys else ""  # only for the holder of the key
        return scope + ("max-age=31536000, immutable" if immutable else "max-age=3600")


def _encoded(finished: Finished, how: Encoding) -> Finished:
    began = perf_counter()
    encoded = [how.image(index, image) for index, image in enumerate(finished.images)]
    body = how.whole(finished.images, encoded)
    return finished._replace(body=body, encode_s=perf_counter() - began)


def _passed(timeout_s: float) -> DeadlinePassed:
    return DeadlinePassed(f"not done within {timeout_s:g} s")


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "")


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))
