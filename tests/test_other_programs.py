"""Other people's programs connect, draw, and read the answer. Their requests: tests/other_programs.py."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.other_programs import PROGRAMS, LangChain, Program, sdk_message, told_seeds
from tests.pipelines import write_pipeline
from tests.servers import Json, Reachable, ServerProcess, read_parameters, serving, side_by_side

COOKED_BY = ("model", "fingerprint")  # what a recipe says beside the request
BOTH = {"digits": "a 7", "text": "a fox in the snow"}  # prompts
KEY = "alpha"

each_program = pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)


def again(server: Reachable, png: bytes) -> bytes:
    """The image that /sample draws by the recipe in a PNG."""
    recipe = {name: value for name, value in read_parameters(png).items() if name not in COOKED_BY}
    answer = server.client.post("/sample", json=recipe)
    assert answer.status_code == 200, answer.text
    return answer.content


def draws(program: Program, server: Reachable, prompt: str) -> list[Json]:
    """Let a program draw, and check the seeds that it is told. Returns the images' recipes."""
    with anonymous(server) as client:
        answer = program.draw(prompt).send(client)
        images = program.read(answer, client)
    assert images
    recipes = [read_parameters(png) for png in images]
    if not isinstance(program, LangChain):  # a link is fetched
        assert [recipe["seed"] for recipe in recipes] == told_seeds(answer)[: len(images)]
    assert [again(server, png) for png in images] == images
    return recipes


def anonymous(server: Reachable) -> httpx.Client:
    """A client that sends nothing of its own accord but what HTTP needs."""
    client = httpx.Client(base_url=server.url, timeout=30, trust_env=False)
    client.headers.clear()
    return client


@each_program
def test_it_draws_and_what_it_drew_is_drawn_again(program: type[Program], server: ServerProcess) -> None:
    for recipe in draws(program(), server, "a dog"):
        assert recipe["class_label"] == 1


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, ServerProcess]]:
    """Servers of the digits and of a tiny Stable Diffusion."""
    text: Path = write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny")
    with side_by_side(serving(WEIGHTS="digits"), serving(WEIGHTS=text, SIZES="64x64,96x64")) as servers:
        yield dict(zip(BOTH, servers, strict=True))


@pytest.mark.slow
@each_program
@pytest.mark.parametrize("weights", BOTH)
def test_it_connects_and_draws(program: type[Program], weights: str, both: dict[str, ServerProcess]) -> None:
    with anonymous(both[weights]) as client:
        program().connect(client)
    for recipe in draws(program(), both[weights], BOTH[weights]):
        told = recipe["prompt"] if weights == "text" else str(recipe["class_label"])
        assert told in BOTH[weights]


@pytest.mark.slow
@each_program
def test_it_shows_why_nothing_was_drawn(program: type[Program], both: dict[str, ServerProcess]) -> None:
    with anonymous(both["digits"]) as client:
        answer = program().draw("a fox in the snow").send(client)
    assert answer.status_code == 422
    assert answer.reason_phrase.startswith("Unprocessable")
    assert program().shown(answer)
    assert "must name one class" in answer.text


@pytest.mark.slow
@each_program
def test_with_keys_it_draws_by_its_own_and_is_told_without(
    program: type[Program], strict_server: ServerProcess
) -> None:
    is_openai = program().draw("").path.startswith("/v1/")
    with anonymous(strict_server) as client:
        answer = program().draw("a cat").send(client)
        assert answer.status_code == 401
        assert program().shown(answer)
        if "authorization" not in {name.lower() for name in program(KEY).draw("").headers} or not (
            len(program(KEY).draw("").headers["Authorization"]) > len("Bearer none")
        ):
            return  # a program that sends no key
        keyed = program(KEY if is_openai else f"anyone:{KEY}")
        keyed.connect(client)
        images = keyed.read(keyed.draw("a cat").send(client), client)
    assert [again(strict_server, png) for png in images] == images


@pytest.mark.slow
@each_program
def test_edits_are_told_that_they_wait(program: type[Program], both: dict[str, ServerProcess]) -> None:
    server = both["text"]
    png = server.client.get("/sample?seed=1&num_inference_steps=1").content
    edit = program().edit("a fox in the snow", png)
    if edit is None:
        return
    with anonymous(server) as client:
        answer = edit.send(client)
    assert answer.status_code == 501
    assert program().shown(answer)
    assert "/v1/images/edits" in sdk_message(answer)
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.slow
@pytest.mark.parametrize("authorization", ["", " ", "Basic", "Basic ", "Basic Og==", "Bearer", "Bearer none"])
def test_without_keys_whatever_a_program_sends_as_its_key_is_welcome(
    authorization: str, both: dict[str, ServerProcess]
) -> None:
    """Open WebUI and SillyTavern send an empty one, and a blank after `Basic`."""
    with both["digits"].raw_request("GET", "/sdapi/v1/options", {"Authorization": authorization}) as connection:
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")
