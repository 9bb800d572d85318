"""Other people's programs connect, draw, and read the answer. Their requests: tests/other_programs.py."""

import base64
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.local import serving_fake
from tests.other_programs import (
    PROGRAMS,
    LibreChat,
    LiteLLM,
    LobeChat,
    N8n,
    OpenWebUI,
    OpenWebUIAutomatic1111,
    Program,
    SillyTavern,
    told_seeds,
)
from tests.servers import PATIENCE, Json, Reachable, ServerProcess, eventually, read_parameters
from tests.test_pictures import RGB, file

NO_FIELDS = ("model", "fingerprint", "image_sha256", "mask_sha256")  # what a recipe says beside the request
BOTH = {"digits": "a 7", "text": "a fox in the snow"}  # prompts


def programs(*some: type[Program]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("program", some, ids=lambda program: program.__name__)


each_program = programs(*PROGRAMS)


def again(server: Reachable, png: bytes, **files: str) -> bytes:
    """The image that /sample draws by the recipe in a PNG, and by the files that it was drawn from."""
    recipe = {name: value for name, value in read_parameters(png).items() if name not in NO_FIELDS}
    answer = server.client.post("/sample", json={**recipe, **files})
    assert answer.status_code == 200, answer.text
    return answer.content


def draws(program: Program, server: Reachable, prompt: str) -> list[Json]:
    """Let a program draw, and check the seeds that it is told. Returns the images' recipes."""
    with anonymous(server) as client:
        answer = program.draw(prompt).send(client)
        images = program.read(answer, client)
    assert images
    recipes = [read_parameters(png) for png in images]
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


@pytest.mark.slow
@each_program
@pytest.mark.parametrize("weights", BOTH)
def test_it_connects_and_draws(program: type[Program], weights: str, digits_and_text: dict[str, ServerProcess]) -> None:
    with anonymous(digits_and_text[weights]) as client:
        program().connect(client)
    for recipe in draws(program(), digits_and_text[weights], BOTH[weights]):
        told = recipe["prompt"] if weights == "text" else str(recipe["class_label"])
        assert told in BOTH[weights]


@pytest.mark.slow
@each_program
def test_it_shows_why_nothing_was_drawn(program: type[Program], digits_and_text: dict[str, ServerProcess]) -> None:
    with anonymous(digits_and_text["digits"]) as client:
        answer = program().draw("a fox in the snow").send(client)
    assert answer.status_code == 422
    assert answer.reason_phrase.startswith("Unprocessable")
    assert program().shown(answer)
    assert "must name one class" in answer.text


@pytest.mark.slow
@each_program
def test_without_its_key_it_is_told(program: type[Program], strict_server: ServerProcess) -> None:
    with anonymous(strict_server) as client:
        answer = program().draw("a cat").send(client)
    assert answer.status_code == 401
    assert program().shown(answer)


@pytest.mark.slow
@programs(*(one for one in PROGRAMS if one.sends_key))
def test_it_sends_its_key_as_this_server_reads_keys(program: type[Program], strict_server: ServerProcess) -> None:
    keyed = program(program.credentials("alpha"))
    with anonymous(strict_server) as client:
        keyed.connect(client)
        images = keyed.read(keyed.draw("a cat").send(client), client)
    assert [again(strict_server, png) for png in images] == images


@pytest.mark.slow
@programs(OpenWebUI, LibreChat, LobeChat, N8n, LiteLLM)
@pytest.mark.parametrize("weights", BOTH)
def test_it_edits_and_what_it_drew_is_drawn_again(
    program: type[Program], weights: str, digits_and_text: dict[str, ServerProcess]
) -> None:
    server = digits_and_text[weights]
    photo = file(RGB.resize((40, 30)))
    edit = program().edit(BOTH[weights], photo)
    assert edit is not None
    with anonymous(server) as client:
        answer = edit.send(client)
        images = program().read(answer, client)
    sent = {"image": base64.b64encode(photo).decode()}
    assert [again(server, png, **sent) for png in images] == images
    assert [read_parameters(png)["seed"] for png in images] == told_seeds(answer)
    assert {read_parameters(png)["strength"] for png in images} == {0.8}


@pytest.mark.slow
@pytest.mark.parametrize("authorization", ["", " ", "Basic", "Basic ", "Basic Og==", "Bearer", "Bearer none"])
def test_without_keys_whatever_a_program_sends_as_its_key_is_welcome(
    authorization: str, digits_and_text: dict[str, ServerProcess]
) -> None:
    """Open WebUI and SillyTavern send an empty one, and a blank after `Basic`."""
    with digits_and_text["digits"].raw_request(
        "GET", "/sdapi/v1/options", {"Authorization": authorization}
    ) as connection:
        assert connection.recv(2**16).startswith(b"HTTP/1.1 200 ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "wanted"),
    [
        (OpenWebUI(params={"num_inference_steps": 3, "guidance_scale": 2.5, "seed": 5}), {"seed": 5, "steps": 3}),
        (LobeChat(params={"seed": 5, "steps": 3, "width": 96, "height": 64}), {"seed": 5, "steps": 3, "width": 96}),
        (OpenWebUIAutomatic1111(params={"steps": None}), {"steps": 50}),
        (SillyTavern(params={"seed": 5, "enable_hr": True}), {"seed": 5, "steps": 9}),
        (LiteLLM(params={"seed": 5, "num_inference_steps": 3}), {"seed": 5, "steps": 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_its_user_adds_is_honoured(
    program: Program, wanted: Json, digits_and_text: dict[str, ServerProcess]
) -> None:
    """`steps` of null are those that the weights recommend."""
    [first, *_] = draws(program, digits_and_text["text"], BOTH["text"])
    drawn = {"seed": first["seed"], "steps": first["num_inference_steps"], "width": first.get("width")}
    assert drawn | wanted == drawn


@pytest.mark.slow
def test_what_has_no_effect_is_listed(digits_and_text: dict[str, ServerProcess]) -> None:
    with anonymous(digits_and_text["text"]) as client:
        told = SillyTavern(params={"enable_hr": True}).draw("a fox").send(client).json()
        headers = N8n().draw("a fox").send(client).headers
    assert "enable_hr" in json.loads(told["info"])["ignored"]
    assert sorted(headers["x-ignored-fields"].split(", ")) == ["model", "quality", "style"]


@pytest.mark.slow
def test_a_page_that_is_closed_interrupts_its_own_drawing_alone() -> None:
    """SillyTavern interrupts when its page is closed. Programs at other addresses go on, and see nothing of it."""
    silly, open_webui = SillyTavern(), OpenWebUIAutomatic1111()
    with (
        serving_fake() as server,
        server.new_client(source="127.0.0.1") as ours,
        server.new_client(source="127.0.0.2") as theirs,
        server.new_client(source="127.0.0.3") as nobodys,
        ThreadPoolExecutor() as pool,
    ):
        server.runner.hold()
        closed = pool.submit(silly.draw("one").send, ours)
        other = pool.submit(open_webui.draw("two").send, theirs)
        states = ("stepwise_rows_running", "stepwise_rows_waiting")  # the held pass may have one of them alone
        eventually(lambda: sum(map(server.metric, states)) == 3 or None)
        counts = [silly.progress().send(one).json()["state"]["job_count"] for one in (ours, theirs, nobodys)]
        assert counts == [1, 2, 0]
        for caller in (nobodys, ours):
            assert silly.interrupt().send(caller).status_code == 200
        said = closed.result(PATIENCE).json()
        assert said["images"] == []
        assert json.loads(said["info"])["interrupted"] is True
        server.runner.let_go()
        assert len(open_webui.read(other.result(PATIENCE), theirs)) == 2
