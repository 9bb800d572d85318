"""STEPWISE_CHECK: what the operator's function is given, what it decides, and what happens when it fails."""

import asyncio
import logging
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PillowImage

from model.rows import Image
from service.build import StartError, build
from service.config import Settings, SettingsError
from service.errors import ComputationFailed, DeadlinePassed, QueueFull, Refused
from service.http import checks
from service.http.checks import Function, Outcome, PromptCheck, Prompts, load
from service.http.png import to_uint8
from tests.servers import PATIENCE, ROOT, write_weights

SECRET = "a fox called Reynard"


def a_module(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write an importable module, and return its name. No two tests share a name, because Python keeps modules."""
    name = re.sub(r"\W", "_", f"checks_of_{folder.name}")
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return name


class Asked:
    """A function of an operator. It keeps what it was given, and returns `answer`."""

    def __init__(self, answer: object = None) -> None:
        self.answer = answer
        self.prompts: list[Prompts] = []
        self.images: list[PillowImage.Image] = []

    def __call__(
        self,
        *,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        image: PillowImage.Image | None = None,
    ) -> object:
        if image is not None:
            self.images.append(image)
        if prompt is not None:
            self.prompts.append((prompt, negative_prompt))
        return self.answer


def checked(function: Function, *prompts: Prompts) -> Counter[Outcome]:
    """Check the prompts of one request. Returns the outcomes."""
    outcomes = Counter[Outcome]()

    async def run() -> None:
        check = PromptCheck(function, lambda outcome: outcomes.update([outcome]), most_waiting=8)
        check.start()
        try:
            left = await check.check(prompts, PATIENCE)
            assert 0 < left <= PATIENCE
        finally:
            check.close()

    asyncio.run(run())
    return outcomes


def an_image(channels: int) -> Image:
    return np.random.default_rng(0).uniform(-1.1, 1.1, (channels, 3, 4)).astype(np.float32)


# The example


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Function:
    """The function of the example in docs/security.md."""
    [code] = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs/security.md").read_text(), re.MULTILINE | re.DOTALL)
    return load(f"{a_module(tmp_path, code, monkeypatch)}:check")


def test_the_example_lets_pass_and_refuses(example: Function) -> None:
    assert checked(example, ("a fox", None), ("a fox", "forbidden")) == {"passed": 2}
    with pytest.raises(Refused, match=r"^the prompt is refused: this server does not draw that$"):
        checked(example, ("a Forbidden fox", None))
    judge = checks.of_images(example, lambda _: None)
    assert judge(an_image(3)) is None
    assert judge(-np.ones((1, 3, 4), np.float32)) == "the image is refused: it is all black"


# Loading


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("", "cannot be loaded: AttributeError: "),
        ("1 / 0", "cannot be loaded: ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all", "cannot be loaded: ModuleNotFoundError: No module named "),
        ("def check(:", "cannot be loaded: SyntaxError: "),
        ("check = 3", "is no function"),
        ("async def check(**_): ...", "is an async function, "),
        ("def check(): ...", "must take prompt, negative_prompt and image by keyword, each with a default"),
        ("def check(prompt, image): ...", "must take "),
        ("def check(*, prompt=None, image=None): ...", "must take "),
        ("def check(*, prompt=None, negative_prompt=None, image): ...", "must take "),
        ("raise ValueError('two\\nlines' + 'x' * 1000)", "cannot be loaded: ValueError: two lines"),
    ],
)
def test_what_cannot_check_stops_the_start_with_one_line(
    code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{a_module(tmp_path, code, monkeypatch)}:check"
    with pytest.raises(SettingsError) as error:
        build(Settings(check=name))
    assert str(error.value).startswith(f"STEPWISE_CHECK={name}: {why}")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "code",
    [
        "def check(prompt=None, negative_prompt=None, image=None): ...",
        "def check(*, image=None, **others): ...",
        "def check(**given): ...",
        "class Check:\n    def __call__(self, **given): ...\ncheck = Check()",
    ],
)
def test_what_can_check(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert checked(load(f"{a_module(tmp_path, code, monkeypatch)}:check"), ("a fox", None)) == {"passed": 1}


def test_a_model_without_pictures_has_no_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that cannot check what it was told to check does not start."""
    name = f"{a_module(tmp_path, 'def check(**given): ...', monkeypatch)}:check"
    sizes = {"in_channels": 2, "model_channels": 8, "channel_multipliers": [1], "image_size": [8, 8], "norm_groups": 4}
    folder = write_weights(tmp_path / "spectra", **sizes, schedule={})
    with pytest.raises(
        StartError, match=r"^STEPWISE_CHECK=.*: images of spectra are no pictures, and cannot be checked$"
    ):
        build(Settings(weights=str(folder), check=name, device="cpu"))


# Prompts


def test_each_pair_of_prompts_is_checked_once() -> None:
    asked = Asked()
    assert checked(asked, ("a fox", None), ("a dog", "blurry"), ("a fox", None), ("a fox", "")) == {"passed": 3}
    assert asked.prompts == [("a fox", None), ("a dog", "blurry"), ("a fox", "")]
    assert asked.images == []


def test_a_reason_refuses_and_ends_the_check() -> None:
    asked = Asked("not here")
    with pytest.raises(Refused, match=r"^the prompt is refused: not here$"):
        checked(asked, ("a fox", None), ("a dog", None))
    assert asked.prompts == [("a fox", None)]


@pytest.mark.parametrize(
    ("reason", "told"),
    [
        ("", "a check of this server says no"),
        (" \n ", "a check of this server says no"),
        ("two\nlines\x1b[31m\x00", "two lines\\x1b[31m\\x00"),
        ("x" * 201, "x" * 200 + "…"),
        ("y" * 200, "y" * 200),
    ],
)
def test_a_reason_is_one_line_of_bounded_length(reason: str, told: str) -> None:
    with pytest.raises(Refused) as refused:
        checked(Asked(reason), ("a fox", None))
    assert str(refused.value) == f"the prompt is refused: {told}"


def raises(error: BaseException) -> Function:
    def function(**given: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (raises(ValueError(f"do not like {SECRET}")), "ValueError"),
        (raises(SystemExit(3)), "SystemExit"),
        (raises(asyncio.CancelledError()), "CancelledError"),
        (Asked(False), "it returned bool, and must return a text or None"),
        (Asked(True), "it returned bool"),
        (Asked({"flagged": True}), "it returned dict"),
    ],
)
def test_a_check_that_fails_is_a_refusal_and_the_log_has_no_prompt(
    function: Function, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcomes: list[Outcome] = []

    async def run() -> None:
        check = PromptCheck(function, outcomes.append, most_waiting=8)
        check.start()
        for _ in range(2):  # the thread goes on
            with pytest.raises(ComputationFailed, match=r"^the check of a prompt failed$"):
                await check.check([(SECRET, None)], PATIENCE)
        check.close()

    asyncio.run(run())
    with pytest.raises(ComputationFailed, match=r"^the check of an image failed$"):
        checks.of_images(function, outcomes.append)(an_image(3))
    assert outcomes == ["failed"] * 3
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert all(why in record.getMessage() for record in caplog.records)
    assert SECRET not in caplog.text


class Held(Asked):
    """A function that lasts until a test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.began, self._go = threading.Event(), threading.Event()

    def __call__(self, **given: object) -> object:
        self.began.set()
        assert self._go.wait(PATIENCE)
        return super().__call__(**given)  # type: ignore[arg-type]

    def let_go(self) -> None:
        self._go.set()


def with_held(test: Callable[[PromptCheck, Held], Awaitable[None]], most_waiting: int = 8) -> None:
    async def run() -> None:
        held = Held()
        check = PromptCheck(held, lambda _: None, most_waiting)
        check.start()
        try:
            await test(check, held)
        finally:
            held.let_go()
            check.close()

    asyncio.run(run())


def test_the_event_loop_goes_on_during_a_check_and_the_deadline_holds() -> None:
    async def test(check: PromptCheck, held: Held) -> None:
        first = asyncio.ensure_future(check.check([("a fox", None)], PATIENCE))
        assert await asyncio.to_thread(held.began.wait, PATIENCE)
        with pytest.raises(DeadlinePassed, match=r"^the check of the prompt was not done within 0\.01 s$"):
            await check.check([("a dog", None)], 0.01)
        assert not first.done()
        held.let_go()
        await first
        await check.check([("a cat", None)], PATIENCE)
        assert [prompt for prompt, _ in held.prompts] == ["a fox", "a cat"]  # nobody waits for the dog

    with_held(test)


def test_only_so_many_requests_wait() -> None:
    async def test(check: PromptCheck, held: Held) -> None:
        first = asyncio.ensure_future(check.check([("a fox", None)], PATIENCE))
        assert await asyncio.to_thread(held.began.wait, PATIENCE)
        waiting = [asyncio.ensure_future(check.check([(f"{i}", None)], PATIENCE)) for i in range(2)]
        await asyncio.sleep(0)  # both begin to wait
        with pytest.raises(QueueFull, match=r"^2 requests wait for the check of their prompts$"):
            await check.check([("a fox", None)], PATIENCE)
        held.let_go()
        await asyncio.gather(first, *waiting)
        await check.check([("a fox", None)], PATIENCE)

    with_held(test, most_waiting=2)


def test_while_a_check_does_not_return_the_prompts_of_those_who_leave_do_not_pile_up() -> None:
    async def test(check: PromptCheck, held: Held) -> None:
        first = asyncio.ensure_future(check.check([("a fox", None)], PATIENCE))
        assert await asyncio.to_thread(held.began.wait, PATIENCE)
        for _ in range(2):
            with pytest.raises(DeadlinePassed):
                await check.check([("a dog", None)], 0.01)
        with pytest.raises(QueueFull, match=r"^2 requests wait "):
            await check.check([("a dog", None)], 0.01)
        held.let_go()
        await first

    with_held(test, most_waiting=2)


def test_whoever_leaves_is_not_checked() -> None:
    async def test(check: PromptCheck, held: Held) -> None:
        first, second = (asyncio.ensure_future(check.check([(name, None)], PATIENCE)) for name in ("fox", "dog"))
        assert await asyncio.to_thread(held.began.wait, PATIENCE)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        held.let_go()
        await first
        await check.check([("cat", None)], PATIENCE)
        assert [prompt for prompt, _ in held.prompts] == ["fox", "cat"]

    with_held(test)


# Images


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_as_the_pixels_of_their_png_in_rgb(channels: int) -> None:
    asked, outcomes, image = Asked(), Counter[Outcome](), an_image(channels)
    assert checks.of_images(asked, lambda outcome: outcomes.update([outcome]))(image) is None
    [picture] = asked.images
    assert picture.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(picture), np.broadcast_to(to_uint8(image), (3, 4, 3)))
    assert outcomes == {"passed": 1}


def test_an_image_is_refused_with_the_reason() -> None:
    outcomes = Counter[Outcome]()
    reason = checks.of_images(Asked("it shows\nsomething"), lambda outcome: outcomes.update([outcome]))(an_image(3))
    assert reason == "the image is refused: it shows something"
    assert outcomes == {"refused": 1}
