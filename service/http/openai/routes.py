"""The routes of OpenAI's Images API. Read → plan → submit → respond, as /sample's."""

import asyncio
from dataclasses import dataclass, replace
from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.errors import NotBuilt
from service.http.bodies import Body
from service.http.drawing import Studio
from service.http.events import EventStream, Mailbox
from service.http.openai import answers, documents, fields
from service.http.openai.edits import MASK, read_edit
from service.http.openai.events import ImageEvents
from service.http.openai.fields import Asked
from service.http.openai.links import link
from service.http.parsing import FORM, check_type, json_object
from service.http.pieces import Bytes
from service.http.responses import JSON, PNG, headers_of, server_timing
from service.plan.pictures import INPAINTS
from service.plan.plan import Plan

_NEVER_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Images:
    """The routes' dependencies."""

    studio: Studio

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        model, served = self.studio.sample_model, self.studio.served
        for name, draw, described in (
            ("generations", self.generate, documents.generations(model, served)),
            ("edits", self.edit, documents.edits(model, served)),
        ):
            router.add_api_route(f"/images/{name}", draw, methods=["POST"], **described)
        return router

    async def generate(self, request: Request) -> Response:
        await self._check_pictures(request)
        if self.studio.served.model.inpaints:
            await Body.of(request).discard()
            raise NotBuilt(f"{INPAINTS}: POST /v1/images/edits draws, with an image and a mask")
        await self._check_type(request, JSON)

        def parse(sent: Bytes) -> Asked:
            values = json_object(sent, self.studio.max_json)
            return fields.read(values, self.studio.sample_model, self.studio.served)

        asked = await self.studio.read(request, parse)
        with fields.named_as_sent(asked.sent_as):
            plan = await self.studio.planned(asked.fields)
        return await self._draw(request, "image_generation", asked, plan)

    async def edit(self, request: Request) -> Response:
        await self._check_pictures(request)
        content_type = await self._check_type(request, FORM, JSON)
        read = partial(
            read_edit,
            content_type,
            model=self.studio.sample_model,
            served=self.studio.served,
            max_json=self.studio.max_json,
        )
        asked, picture = await self.studio.read_pictured(request, read)
        with fields.named_as_sent({"mask_image": MASK, **asked.sent_as}):
            plan = await self.studio.planned(asked.fields, picture=picture)
        return await self._draw(request, "image_edit", asked, plan)

    async def _check_pictures(self, request: Request) -> None:
        if not self.studio.served.draws_pictures:
            await Body.of(request).discard()
            raise NotBuilt("this model's images are no pictures: POST /sample answers them as .npy files")

    async def _check_type(self, request: Request, *read: str) -> str:
        content_type = request.headers.get("content-type", "")
        if not await Body.of(request).is_empty():
            check_type(content_type, *read)
        return content_type

    async def _draw(self, request: Request, kind: str, asked: Asked, planned: Plan) -> Response:
        """Draw, and answer or stream.

        Args:
            kind: of the stream's events.
        """
        served = self.studio.served
        plan = replace(planned, warnings=(*asked.warnings, *planned.warnings))
        headers = {**headers_of(plan), **fields.ignored_header(asked.ignored), **_NEVER_STORE}
        if asked.partial_images is not None:
            events = ImageEvents(kind, plan, asked, served, asked.partial_images)
            mailbox = Mailbox(events.preview_every, asyncio.get_running_loop())
            how = answers.each(plan, asked, served)
            accepted = await self.studio.submit(request, asked.fields, plan, how, mailbox)
            return EventStream(accepted, mailbox, events, headers)
        how = answers.whole(plan, asked, served, self._links(request, asked, plan))
        finished = await self.studio.finished(request, await self.studio.submit(request, asked.fields, plan, how))
        return Response(finished.body, headers={**headers, **server_timing(finished, served)}, media_type=JSON)

    def _links(self, request: Request, asked: Asked, plan: Plan) -> list[str | None]:
        """The address of each image, where addresses are asked for. None carries an API key, or asks for no PNG."""
        if not asked.by_url or asked.media_type != PNG or self.studio.settings.api_keys:
            return [None] * len(plan.rows)
        return [link(str(request.base_url), recipe, plan.group, self.studio.served) for recipe in plan.recipes]
