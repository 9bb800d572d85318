"""STEPWISE_CHECK: a function of the operator that may refuse prompts and images.

The function gets the prompts of a request before the request is accepted, and each finished image before it is encoded.
It returns None, or the reason for a refusal. docs/security.md has its contract and an example.

Prompts are secret: neither they nor the function's own messages, which may quote them, go to a log.
"""

import asyncio
import importlib
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Literal

from PIL import Image as PillowImage

from model.rows import Image
from service.config import PREFIX, SettingsError
from service.errors import ComputationFailed, DeadlinePassed, QueueFull, Refused
from service.http.logs import trace_without_messages
from service.http.png import to_uint8
from service.http.problems import one_line, printable
from service.plan.fields import Denoise, Drawing, Noise, Sample

log = logging.getLogger(__name__)

Outcome = Literal["passed", "refused", "failed"]
Count = Callable[[Outcome], None]
Prompts = tuple[str, str | None]  # a prompt and its negative prompt
Function = Callable[..., object]

CHANNELS = (1, 3)  # of images that can be checked
_MOST_REASON = 200  # characters
_NO_REASON = "a check of this server says no"
_KEYWORDS: Sequence[dict[str, object]] = ({"prompt": "", "negative_prompt": None}, {"image": None})  # the two calls


def load(name: str) -> Function:
    """The function of a CHECK setting, `module:function`.

    Raises:
        SettingsError: there is no such function, or it cannot be called as it will be.
    """
    module_name, _, function_name = name.partition(":")
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the module runs when it is imported, and may raise anything
        raise _unusable(name, f"cannot be loaded: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise _unusable(name, "is no function")
    if inspect.iscoroutinefunction(function):
        raise _unusable(name, "is an async function, and must be a plain one: it runs in a thread")
    try:
        for keywords in _KEYWORDS:
            inspect.signature(function).bind(**keywords)
    except TypeError:
        raise _unusable(name, "must take prompt, negative_prompt and image by keyword, each with a default") from None
    except ValueError:  # some functions of C have no signature
        pass
    checked: Function = function
    return checked


def of_images(function: Function, count: Count) -> Callable[[Image], str | None]:
    """The check of finished images, [C, H, W] with one channel or three: gives the reason for a refusal, or None.

    Raises:
        ComputationFailed: the function failed. The log has its trace.
    """

    def check(image: Image) -> str | None:
        pixels = to_uint8(image)
        picture = PillowImage.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).convert("RGB")
        reason = _asked(function, count, "an image", {"image": picture})
        return None if reason is None else f"the image is refused: {reason}"

    return check


def prompts_of(request: Drawing | Noise, num_images: int) -> list[Prompts]:
    """The prompt and the negative prompt of each image of a request that is planned; none for /noise."""
    if not isinstance(request, Sample | Denoise):
        return []
    given = (request.prompt, request.negative_prompt)
    prompts, negatives = ([one] * num_images if isinstance(one, str | None) else one for one in given)
    return [(prompt or "", negative) for prompt, negative in zip(prompts, negatives, strict=True)]


class PromptCheck:
    """Checks the prompts of requests, in a thread of its own, one request after the other.

    The thread is a daemon: a function that never returns does not keep the process alive.

    Args:
        function: of the operator.
        count: hears of each outcome.
        most_waiting: how many requests may wait for their check.
    """

    def __init__(self, function: Function, count: Count, most_waiting: int) -> None:
        self._function = function
        self._count = count
        self._most_waiting = most_waiting
        self._line = SimpleQueue[tuple[Future[str | None], Sequence[Prompts]] | None]()
        self._thread = Thread(target=self._run, name="checking prompts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Let the thread end after the check that is running."""
        self._line.put(None)

    async def check(self, prompts: Iterable[Prompts], timeout_s: float) -> float:
        """Check a request's prompts, each pair once. Returns the seconds that are left.

        Raises:
            Refused: with the function's reason.
            ComputationFailed: the function failed. The log has its trace.
            DeadlinePassed: the check took longer than timeout_s.
            QueueFull: too many requests wait for their check.
        """
        if self._line.qsize() >= self._most_waiting:  # counts those that have left, too: the line holds their prompts
            raise QueueFull(f"{self._most_waiting} requests wait for the check of their prompts")
        began, reason = time.monotonic(), Future[str | None]()
        self._line.put((reason, tuple(dict.fromkeys(prompts))))
        try:
            found = await asyncio.wait_for(asyncio.wrap_future(reason), timeout_s)
        except TimeoutError:
            raise DeadlinePassed(f"the check of the prompt was not done within {timeout_s:g} s") from None
        if found is not None:
            raise Refused(f"the prompt is refused: {found}")
        return max(0.0, timeout_s - (time.monotonic() - began))

    def _run(self) -> None:
        while (waiting := self._line.get()) is not None:
            reason, prompts = waiting
            if not reason.set_running_or_notify_cancel():  # the client has left
                continue
            try:
                reason.set_result(self._reason(prompts))
            except ComputationFailed as error:
                reason.set_exception(error)

    def _reason(self, pairs: Sequence[Prompts]) -> str | None:
        for prompt, negative in pairs:
            keywords = {"prompt": prompt, "negative_prompt": negative}
            reason = _asked(self._function, self._count, "a prompt", keywords)
            if reason is not None:
                return reason
        return None


def _asked(function: Function, count: Count, what: str, keywords: dict[str, Any]) -> str | None:
    """Call the function. Gives its reason, on one line, or None.

    Raises:
        ComputationFailed: the function raised, or returned neither text nor None.
    """
    try:
        reason = function(**keywords)
    except BaseException as error:  # asyncio.CancelledError, too, would end the thread, and all later checks with it
        why = trace_without_messages(error)
    else:
        if reason is None:
            count("passed")
            return None
        if isinstance(reason, str):
            count("refused")
            return one_line(reason, _MOST_REASON) or _NO_REASON
        why = f"it returned {type(reason).__name__}, and must return a text or None"
    count("failed")
    log.error("the check of %s failed: %s", what, why)
    raise ComputationFailed(f"the check of {what} failed")


def _unusable(name: str, why: str) -> SettingsError:
    return SettingsError(f"{PREFIX}CHECK={name}: {printable(' '.join(why.split()))[:_MOST_REASON]}")
