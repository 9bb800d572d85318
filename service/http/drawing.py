"""From a request's fields to finished images: plan → the operator's check → the engine. All APIs draw through this."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from typing import TypeVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from model.rows import Prompt, Tokens
from service.config import Settings
from service.engine.engine import Engine
from service.engine.requests import Accepted, Encoding, Finished, Upload, Watcher
from service.errors import NotBuilt
from service.http.bodies import Body
from service.http.checks import PromptCheck, prompts_of
from service.http.leaving import unless_client_leaves
from service.http.models import RequestModel
from service.http.parsing import MAX_PLAIN_JSON, check_type
from service.http.pictures import Attached, picture_of
from service.http.pieces import PIECE, Bytes, rest
from service.plan.fields import DenoiseRequest, Drawing, Noise, NoiseRequest, SampleRequest
from service.plan.pictures import INPAINTS, Picture
from service.plan.plan import Plan, plan_sample
from service.plan.served import Served
from service.plan.shared_fields import MAX_PROMPT
from service.plan.texts import length_of

_ESCAPED = 3  # bytes of JSON for a byte of UTF-8: "é" may be \u00e9, and an emoji two escapes
_SHORT_PROMPTS = 2**10  # characters of a request's prompts that become tokens in the event loop

Fields = TypeVar("Fields", bound=Drawing | Noise)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Studio:
    """What all routes that draw share.

    Attributes:
        prompts: the operator's check; None without one.
        reading: held while an upload, long JSON or long prompts are read. So passes share the interpreter with one.
    """

    engine: Engine
    served: Served
    settings: Settings
    prompts: PromptCheck | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def refusal(self, from_image: str | None = None) -> NotBuilt | None:
        """Why an API of other programs has nothing to draw with: the model draws no pictures, or none without an image.

        Args:
            from_image: the path of what draws from an image; None if the request itself does.
        """
        if not self.served.draws_pictures:
            return NotBuilt("this model's images are no pictures: POST /sample answers them as .npy files")
        if from_image is not None and self.served.model.inpaints:
            return NotBuilt(f"{INPAINTS}: POST {from_image} draws, with an image and a mask")
        return None

    async def check_model(self, request: Request, from_image: str | None = None) -> None:
        """Raise the refusal if there is one. The body is then not read."""
        if refusal := self.refusal(from_image):
            await Body.of(request).discard()
            raise refusal

    async def read(self, request: Request, parse: Callable[[Bytes], Result]) -> Result:
        """Read the whole body and parse it. A long body is parsed in a thread, one at a time."""
        body = Body.of(request)
        sent = await body.read()
        if len(sent) <= PIECE:
            return parse(sent)
        async with self.reading:
            parsed = await run_in_threadpool(parse, sent)
        body.let_go()
        return parsed

    async def read_pictured(
        self, request: Request, parse: Callable[[Bytes], tuple[Result, Attached | None]]
    ) -> tuple[Result, Picture | None]:
        """Read the whole body, parse it, and decode its images. A long body is parsed in a thread, one at a time.

        Images are decoded there, too, however short the body is: a small file may have many pixels.
        """
        body = Body.of(request)
        sent = await body.read()
        parsed = parse(sent) if len(sent) <= PIECE else None
        if parsed is not None and parsed[1] is None:
            return parsed[0], None

        def read() -> tuple[Result, Picture | None]:
            value, attached = parsed or parse(sent)
            return value, None if attached is None else picture_of(attached, self.served)

        async with self.reading:
            pictured = await run_in_threadpool(read)
        body.let_go()
        return pictured

    async def planned(self, fields: SampleRequest, latent: bool = False, picture: Picture | None = None) -> Plan:
        """The plan of /sample. Images are read, and long prompts become tokens, in a thread, one request at a time.

        Args:
            latent: the answer is latents, if the model denoises latents.
            picture: what is drawn anew.
        """
        plan = partial(plan_sample, fields, timeout=self.settings.timeout, latent=latent, picture=picture)
        if picture is None and length_of(fields) <= _SHORT_PROMPTS:
            return plan(self.served)
        async with self.reading:
            return await run_in_threadpool(plan, self.for_one_request())

    async def submit(
        self,
        request: Request,
        fields: Drawing | Noise,
        plan: Plan,
        how: Encoding,
        watcher: Watcher | None = None,
        upload: Upload | None = None,
    ) -> Accepted:
        """Check the prompts and give the plan to the engine.

        Args:
            how: the images become the answer's body.
            upload: is encoded first. A plan of images that rows begin from makes its own.

        Raises:
            ClientDisconnect: the client left during the check.
            ServiceError: the check or the engine refuses the request.
        """
        timeout_s = plan.timeout_s
        if self.prompts is not None and self.served.model.text is not None:
            prompts = [*prompts_of(fields, len(plan.rows)), *plan.drawn_prompts]
            check = self.prompts.check(prompts, timeout_s)
            timeout_s = await unless_client_leaves(request.receive, asyncio.ensure_future(check))
        if plan.to_encode:
            upload = Upload(plan.to_encode, lambda latents: (plan.begun(latents), how))
        return self.engine.submit(plan.rows, timeout_s, Body.of(request).client, how, watcher, upload)

    async def finished(self, request: Request, accepted: Accepted) -> Finished:
        """Wait for the images. A client that leaves takes its request out.

        Raises:
            ClientDisconnect: the client left.
            ServiceError: the request failed.
        """
        return await unless_client_leaves(request.receive, asyncio.wrap_future(accepted.future))

    @cached_property
    def max_json(self) -> int:
        """Bytes of the JSON of a request's fields: two lists of the longest prompts fit."""
        prompts = 0 if self.served.model.text is None else 2 * self.settings.max_images
        return MAX_PLAIN_JSON + prompts * MAX_PROMPT * _ESCAPED

    def for_one_request(self) -> Served:
        """`served`, with a tokenizer that remembers the request's prompts and rests before each of them.

        So passes get the interpreter. The event loop's thread must not call this tokenizer: it rests.
        """
        tokenize = self.served.tokenize
        if tokenize is None:
            return self.served

        @cache
        def tokens(prompt: Prompt) -> Tokens:
            rest()
            return tokenize(prompt)

        return replace(self.served, tokenize=tokens)

    @cached_property
    def sample_model(self) -> RequestModel[SampleRequest]:
        return self._model(SampleRequest)

    @cached_property
    def denoise_model(self) -> RequestModel[DenoiseRequest]:
        return self._model(DenoiseRequest)

    @cached_property
    def noise_model(self) -> RequestModel[NoiseRequest]:
        return self._model(NoiseRequest)

    def _model(self, request: type[Fields]) -> RequestModel[Fields]:
        return RequestModel(request, self.served, self.settings.max_images, self.settings.timeout)


async def type_of_body(request: Request, *read: str) -> str:
    """The Content-Type of a request. If there is a body, this must be one of these types.

    Raises:
        UnsupportedMedia: it is another one.
    """
    content_type = request.headers.get("content-type", "")
    if not await Body.of(request).is_empty():
        check_type(content_type, *read)
    return content_type
