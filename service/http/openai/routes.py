"""The routes of OpenAI's Images API. Read → plan → submit → respond, as /sample's."""

import asyncio
from dataclasses import dataclass, replace

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.errors import NotBuilt
from service.http.bodies import Body
from service.http.drawing import Studio
from service.http.events import EventStream, Mailbox
from service.http.openai import answers, documents, fields
from service.http.openai.events import ImageEvents
from service.http.openai.fields import Asked
from service.http.openai.links import link
from service.http.parsing import check_type, json_object
from service.http.pieces import Bytes
from service.http.responses import JSON, PNG, headers_of, server_timing
from service.plan.plan import Plan

_NEVER_STORE = {"Cache-Control": "no-store"}


@dataclass(frozen=True)
class Images:
    """The routes' dependencies."""

    studio: Studio

    def router(self) -> APIRouter:
        router = APIRouter(prefix="/v1", tags=["openai"])
        described = documents.generations(self.studio.sample_model, self.studio.served)
        router.add_api_route("/images/generations", self.generate, methods=["POST"], **described)
        router.add_api_route("/images/edits", self.edit, methods=["POST"], include_in_schema=False)
        return router

    async def generate(self, request: Request) -> Response:
        served = self.studio.served
        if not served.draws_pictures:
            await Body.of(request).discard()
            raise NotBuilt("this model's images are no pictures: POST /sample answers them as .npy files")
        asked = await self._asked(request)
        with fields.named_as_sent(asked.sent_as):
            planned = await self.studio.planned(asked.fields)
        plan = replace(planned, warnings=(*asked.warnings, *planned.warnings))
        headers = {**headers_of(plan), **fields.ignored_header(asked.ignored), **_NEVER_STORE}
        if asked.partial_images is not None:
            return await self._stream(request, asked, plan, asked.partial_images, headers)
        how = answers.whole(plan, asked, served, self._links(request, asked, plan))
        finished = await self.studio.finished(request, await self.studio.submit(request, asked.fields, plan, how))
        return Response(finished.body, headers={**headers, **server_timing(finished, served)}, media_type=JSON)

    async def edit(self, request: Request) -> Response:
        await Body.of(request).discard()
        raise NotBuilt("this server draws from words alone, not from images: POST /v1/images/generations does")

    async def _asked(self, request: Request) -> Asked:
        body = Body.of(request)
        if not await body.is_empty():
            check_type(request.headers.get("content-type", ""), JSON)

        def parse(sent: Bytes) -> Asked:
            values = json_object(sent, self.studio.max_json)
            return fields.read(values, self.studio.sample_model, self.studio.served)

        return await self.studio.read(request, parse)

    def _links(self, request: Request, asked: Asked, plan: Plan) -> list[str | None]:
        """The address of each image, where addresses are asked for. None carries an API key, or asks for no PNG."""
        if not asked.by_url or asked.media_type != PNG or self.studio.settings.api_keys:
            return [None] * len(plan.rows)
        return [link(str(request.base_url), recipe, plan.group, self.studio.served) for recipe in plan.recipes]

    async def _stream(
        self, request: Request, asked: Asked, plan: Plan, partial_images: int, headers: dict[str, str]
    ) -> Response:
        events = ImageEvents(plan, asked, self.studio.served, partial_images)
        mailbox = Mailbox(events.preview_every, asyncio.get_running_loop())
        how = answers.each(plan, asked, self.studio.served)
        accepted = await self.studio.submit(request, asked.fields, plan, how, mailbox)
        return EventStream(accepted, mailbox, events, headers)
