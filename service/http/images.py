"""The routes that make images: /sample, /denoise, /noise. Read → plan → submit → respond.

With latent diffusion, PNGs hold pixels and .npy files hold latents. The engine encodes an uploaded PNG into latents, as
it does all other work, and its last stage makes the body of the answer.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from model.rows import Group, Image, Moments, Row
from service.engine.requests import Encoding, Upload
from service.errors import Invalid
from service.http import openapi
from service.http.bodies import Body
from service.http.drawing import Studio, type_of_body
from service.http.events import EventStream, Mailbox
from service.http.models import RequestModel
from service.http.parsing import (
    FILES,
    FORM,
    MAX_PLAIN_JSON,
    check_query,
    read_sample,
    read_upload,
)
from service.http.pieces import Bytes
from service.http.png import is_png
from service.http.responses import (
    EVENTS,
    JSON,
    NPY,
    PNG,
    PURE_MEDIA,
    Deep,
    encoding,
    etag,
    headers_of,
    image_media,
    matches,
    negotiate,
    noise_media,
    respond,
    sample_media,
)
from service.http.sample_events import SampleEvents
from service.http.uploads import decode, most_bytes
from service.plan.fields import DenoiseRequest, Drawing, Noise, NoiseRequest
from service.plan.plan import Plan, plan_denoise, plan_noise
from service.plan.served import Served

_VARY = {"Vary": "Accept"}
_NEVER_STORE = {"Cache-Control": "no-store", **_VARY}


Fields = TypeVar("Fields", bound=Drawing | Noise)


class Sent(NamedTuple, Generic[Fields]):
    """An uploaded image and the fields beside it.

    Attributes:
        image: [C, H, W], or latents.
        is_encoded: the image holds pixels, which must be encoded into latents.
    """

    fields: Fields
    image: Image
    is_encoded: bool


@dataclass(frozen=True)
class Generation:
    """The routes' dependencies."""

    studio: Studio

    def router(self) -> APIRouter:
        router = APIRouter(tags=["images"])
        sample, denoise, noise = self.studio.sample_model, self.studio.denoise_model, self.studio.noise_model
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
        content_type = await type_of_body(request, JSON, FORM)
        read = partial(read_sample, content_type, model=self.studio.sample_model, max_json=self.studio.max_json)
        fields, picture = await self.studio.read_pictured(request, read)
        plan = await self.studio.planned(fields, media_type == NPY, picture)
        how = encoding(plan, media_type, self.served)
        return await self._draw(request, fields, plan, how, media_type, _NEVER_STORE)

    async def sample_by_query(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), sample_media(self.served))
        await Body.of(request).discard()  # refuses a body that is too large before the answer begins
        check_query(request.scope["query_string"])
        query = request.query_params
        for name in FILES:
            if name in query:
                raise Invalid.field(name, "is too long for a query: send it with POST")
        wanted = query.getlist("model")
        fields = self.studio.sample_model.from_text([item for item in query.multi_items() if item[0] != "model"])
        if any(fingerprint != self.served.fingerprint for fingerprint in wanted):
            raise Invalid.field("model", f"must be {self.served.fingerprint}, what answers here, and is {wanted[0]}")
        plan = await self.studio.planned(fields, latent=media_type == NPY)
        headers = dict(_NEVER_STORE)
        if fields.seed is not None and media_type in PURE_MEDIA and self.served.reproducible:
            tag = etag(plan, media_type)
            headers = {"ETag": tag, "Cache-Control": self._cache_control(immutable=bool(wanted)), **_VARY}
            if matches(", ".join(request.headers.getlist("if-none-match")), tag):
                return Response(status_code=304, headers=headers)
        if request.method == "HEAD":
            known = headers_of(plan)
            if fields.seed is None:
                del known["X-Seed"]  # each request draws another
            response = Response(headers={**known, **headers}, media_type=media_type)
            del response.headers["content-length"]  # unknown before the image is drawn
            return response
        return await self._draw(request, fields, plan, encoding(plan, media_type, self.served), media_type, headers)

    async def denoise(self, request: Request) -> Response:
        sent = await self._upload(request, self.studio.denoise_model, lambda fields: fields.value_range)
        offers = image_media(self.served) if sent.fields.output == "x0" else (NPY,)
        media_type = negotiate(_accept(request), offers)

        served = self.studio.for_one_request()

        def plan(fields: DenoiseRequest, image: Image) -> Plan:
            return plan_denoise(fields, image, served, self.studio.settings.timeout, latent=media_type == NPY)

        def encoded(planned: Plan) -> Encoding:
            return encoding(planned, media_type, self.served)

        return await self._draw_upload(request, sent, plan, encoded, media_type)

    async def noise(self, request: Request) -> Response:
        media_type = negotiate(_accept(request), noise_media(self.served))
        sent = await self._upload(request, self.studio.noise_model, lambda _: 1.0)
        pngs: list[Deep] = []

        def plan(fields: NoiseRequest, image: Image) -> Plan:
            return plan_noise(fields, image, self.served, self.studio.settings.timeout, latent=media_type == NPY)

        def encoded(planned: Plan) -> Encoding:
            if media_type != PNG:
                return encoding(planned, media_type, self.served)
            pngs.append(Deep(planned, sent.fields.value_range, self.served))
            return pngs[-1]

        response = await self._draw_upload(request, sent, plan, encoded, media_type)
        if pngs and pngs[-1].clipped is not None:
            response.headers["X-Clipped"] = f"{pngs[-1].clipped:.6g}"
        return response

    async def _draw_upload(
        self,
        request: Request,
        sent: Sent[Fields],
        plan: Callable[[Fields, Image], Plan],
        encoded: Callable[[Plan], Encoding],
        media_type: str,
    ) -> Response:
        """Draw rows that start from an uploaded image, or from its latents.

        Args:
            plan: makes a plan from the fields, and from the image or its latents.
            encoded: makes the encoding of a plan's answer.
        """
        if not sent.is_encoded:
            planned = await run_in_threadpool(plan, sent.fields, sent.image)
            return await self._draw(request, sent.fields, planned, encoded(planned), media_type, _NEVER_STORE)

        group = Group(*sent.image.shape[1:])
        blank = np.zeros(self.served.model.sample_shape_of(group), np.float32)
        draft = await run_in_threadpool(plan, sent.fields, blank)
        fields = replace(sent.fields, seed=draft.seeds[0])

        def then(latents: Sequence[Moments]) -> tuple[list[Row], Encoding]:
            [encoded_image] = latents
            planned = plan(fields, encoded_image.mean)
            return planned.rows, encoded(planned)

        upload = Upload([sent.image], then)
        return await self._draw(request, fields, draft, encoded(draft), media_type, _NEVER_STORE, upload)

    @property
    def served(self) -> Served:
        return self.studio.served

    @property
    def _is_latent(self) -> bool:
        return self.served.model.vae is not None

    async def _upload(
        self, request: Request, model: RequestModel[Fields], value_range: Callable[[Fields], float]
    ) -> Sent[Fields]:
        """Read an upload, and let its bytes go.

        Args:
            value_range: tells a PNG's value range from the fields beside it.
        """
        content_type = await type_of_body(request, FORM, JSON)
        groups = self.served.groups
        shapes = [self.served.model.image_shape_of(group) for group in groups]
        latent_shapes = [self.served.model.sample_shape_of(group) for group in groups] if self._is_latent else []
        max_json = MAX_PLAIN_JSON + most_bytes(shapes, latent_shapes) * 4 // 3

        def read(sent: Bytes) -> Sent[Fields]:
            fields, data = read_upload(content_type, sent, model, max_json)
            image = decode(data, shapes, value_range(fields), latent_shapes)
            return Sent(fields, image, self._is_latent and is_png(data))

        body = Body.of(request)
        sent = await body.read()
        async with self.studio.reading:
            upload = await run_in_threadpool(read, sent)
        body.let_go()
        return upload

    async def _draw(
        self,
        request: Request,
        fields: Drawing | Noise,
        plan: Plan,
        how: Encoding,
        media_type: str,
        headers: Mapping[str, str],
        upload: Upload | None = None,
    ) -> Response:
        if media_type == EVENTS:
            mailbox = Mailbox(plan.preview_every, asyncio.get_running_loop())
            accepted = await self.studio.submit(request, fields, plan, how, mailbox, upload)
            telling = SampleEvents(plan, self.served)
            return EventStream(accepted, mailbox, telling, {**headers_of(plan), **headers})
        accepted = await self.studio.submit(request, fields, plan, how, upload=upload)
        finished = await self.studio.finished(request, accepted)
        return respond(plan, finished, media_type, self.served, headers)

    def _cache_control(self, immutable: bool) -> str:
        scope = "private, " if self.studio.settings.api_keys else ""  # only for the holder of the key
        return scope + ("max-age=31536000, immutable" if immutable else "max-age=3600")


def _accept(request: Request) -> str:
    return ", ".join(request.headers.getlist("accept"))
