"""The table of fields is complete: each entry appears everywhere, and no other place lists the fields."""

import ast
import base64
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from service.errors import Invalid
from service.http.models import RequestModel
from service.plan import micro_conditions, pictures
from service.plan.entries import Entry, Field, deciding, table
from service.plan.fields import DenoiseRequest, NoiseRequest, Sample, SampleRequest
from stepwise import Client, Unreachable, requests
from stepwise.cli import app, options
from tests.local import MODEL as FAKE
from tests.local import FakeServer, serving_fake
from tests.servers import ROOT, Json, problem, write_npy
from tests.test_responses import SERVED, planned
from tests.texts import like_xl, serving_text, tokenize_twice

REQUESTS = {"/sample": SampleRequest, "/denoise": DenoiseRequest, "/noise": NoiseRequest}
FIELDS = [(path, row) for path, request in REQUESTS.items() for row in table(request).values()]
EVERY_FIELD = pytest.mark.parametrize(("path", "row"), FIELDS, ids=[f"{path} {row.name}" for path, row in FIELDS])
NAMES = {row.name for _, row in FIELDS}
IMAGE = write_npy(np.zeros(FAKE.image_shape, np.float32))
UPLOAD = {"image": base64.b64encode(IMAGE).decode(), "timestep": 5}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeServer]:
    with serving_fake() as serving:
        yield serving


def complaint(answer: Any, name: str) -> str:
    """The message about a wrong value of a field. It shows that the service knows the field."""
    [error] = problem(answer, 422)["errors"]
    assert error["loc"][0] == name
    assert "there is no such field" not in error["msg"]
    return str(error["msg"])


@EVERY_FIELD
def test_a_field_is_read_from_json_queries_and_forms(server: FakeServer, path: str, row: Field) -> None:
    sent = {} if path == "/sample" else UPLOAD
    said = [complaint(server.client.post(path, json={**sent, row.name: {}}), row.name)]
    if path == "/sample":
        said.append(complaint(server.client.get(path, params={row.name: "?"}), row.name))
    else:
        form = {"timestep": "5", row.name: "?"}
        said.append(complaint(server.client.post(path, data=form, files={"image": IMAGE}), row.name))
    if isinstance(row.entry.le, int):
        assert all(f"{row.entry.le:g}" in one or str(row.entry.le) in one for one in said)


@pytest.fixture(scope="module")
def text_server() -> Iterator[FakeServer]:
    with serving_text(tokenize_twice, like=like_xl) as serving:
        yield serving


@EVERY_FIELD
def test_a_field_is_described(server: FakeServer, text_server: FakeServer, path: str, row: Field) -> None:
    """Where the model can use it: a model of classes, or one like SDXL."""
    server = server if row.name == "class_label" else text_server
    document: Json = server.client.get("/openapi.json").json()["paths"][path]
    schemas = [body["schema"]["properties"][row.name] for body in document["post"]["requestBody"]["content"].values()]
    if path == "/sample":
        [parameter] = [one for one in document["get"]["parameters"] if one["name"] == row.name]
        schemas.append(parameter["schema"])
    assert {schema["description"] for schema in schemas} == {row.entry.help}
    assert len(schemas) == (3 if path == "/sample" else 2)


@EVERY_FIELD
def test_a_field_is_an_argument_of_the_client(path: str, row: Field) -> None:
    methods: dict[str, Any] = {"/sample": Client.stream, "/denoise": Client.denoise_array, "/noise": Client.noise}
    method = methods[path]
    argument = inspect.signature(method).parameters[row.name]
    assert (argument.annotation, argument.default) == (
        row.annotation,
        row.default if not row.is_required else argument.empty,
    )
    assert row.entry.help in " ".join(str(method.__doc__).split())


def test_arguments_have_types() -> None:
    """mypy reports an unused `ignore`."""
    with Client("http://127.0.0.1:9", patience_s=0) as client:
        with pytest.raises(TypeError, match="sede"):
            client.sample(sede=5)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="timestep"):
            client.denoise(image=IMAGE)  # type: ignore[call-arg]
        with pytest.raises(Unreachable):
            client.sample(seed="seven")  # type: ignore[arg-type]


@EVERY_FIELD
def test_a_field_is_an_option_of_the_command_line(path: str, row: Field) -> None:
    said = CliRunner().invoke(app, [path[1:], "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    known = {word.rstrip(",") for word in re.split(r"[\s,│]+", said)}
    if row.name == "preview_every":  # a terminal shows no previews
        assert "--preview-every" not in known
    else:
        assert {*(row.entry.flags or [f"--{row.name.replace('_', '-')}"])} <= known


@EVERY_FIELD
def test_a_field_is_documented(path: str, row: Field) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    section = text[text.index(f"## POST {path}") :].partition("\n## ")[0]
    assert f"`{row.name}`" in section


def test_recipes_and_etags_have_the_fields_that_the_table_says() -> None:
    plan = planned(num_images=2)
    names = {row.name for row in deciding(Sample, "image") if not row.entry.is_optional}
    assert {*plan.recipes[1]} == names | {"model", "fingerprint"}
    assert {*plan.canonical} == names | {"num_images", "model", "fingerprint"}
    of_others = {"timesteps", "sigma_schedule", "prompt", "negative_prompt", "emphasis", "clip_skip"}
    of_others |= {*micro_conditions.NOTHING, *pictures.NOTHING}
    assert plan.parameters.keys() == table(SampleRequest).keys() - of_others


# A made-up field.


@dataclass(frozen=True, kw_only=True)
class FutureRequest(SampleRequest):
    """With one more field of each kind."""

    rescale: Annotated[float, Entry(help="A share.", ge=0, le="timeout")] = 0.5
    stages: Annotated[Sequence[int] | None, Entry(help="Some.", ge=2, le=8)] = None
    flavour: Annotated[str | None, Entry(help="Which.", flags=("--flavour", "-f"))] = None


FUTURE = RequestModel(FutureRequest, SERVED, max_images=4, timeout=9)


def test_a_new_field_needs_its_entry_alone() -> None:
    values: Json = {"rescale": 1, "flavour": "x", "stages": [3, 2.0]}
    assert FUTURE.validated(values) == FutureRequest(rescale=1.0, flavour="x", stages=[3, 2])
    for text in ([("stages", "3,2")], [("stages", "3"), ("stages", "2")], [("stages", "3, 2")]):
        expected = FutureRequest(rescale=0.25, flavour="7", stages=[3, 2])
        assert FUTURE.from_text([("rescale", "0.25"), ("flavour", "7"), *text]) == expected
    assert FUTURE.schema["properties"]["rescale"]["maximum"] == 9


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rescale": 10}, "rescale: must be 0 to 9, and is 10"),
        ({"stages": 3}, "stages: must be a list of integers from 2 to 8, and is 3"),
        ({"stages": []}, "stages: must be a list of integers from 2 to 8, and is []"),
        ({"stages": [3, 9]}, "stages.1: must be 2 to 8, and is 9"),
        ({"stages": [True]}, "stages.0: must be an integer from 2 to 8, and is true"),
    ],
)
def test_a_new_field_is_refused_in_words(values: Json, said: str) -> None:
    with pytest.raises(Invalid) as refused:
        FUTURE.validated(values)
    assert str(refused.value) == said


def test_a_new_field_is_an_argument_and_an_option() -> None:

    @requests.asked(FutureRequest)
    def asked(given: Any) -> Any:
        """Ask."""
        return given

    assert asked(rescale=2.0, stages=range(3, 1, -1)) == {"rescale": 2.0, "stages": [3, 2]}
    assert "flavour: Which." in str(asked.__doc__)
    got: list[Any] = []

    @options.of(FutureRequest)
    def command(given: options.Given) -> None:
        got.append(given)

    program = typer.Typer()
    program.command()(command)
    ended = CliRunner().invoke(program, ["--rescale", "0.5", "-f", "sweet", "-c", "1", "-c", "2", "--stages", "3"])
    assert ended.exit_code == 0, ended.output
    assert got == [{"rescale": 0.5, "flavour": "sweet", "class_label": ["1", "2"], "stages": [3]}]


# No other place lists the fields.

# Exceptions: an example request, the fields that a model narrows, what /info says is recommended, and the fields of
# AUTOMATIC1111's API, some of which have the same names.
MAY_NAME_SOME = {"service/http/openapi.py", "service/http/schemas.py", "service/plan/fields.py", "service/plan/plan.py"}
MAY_NAME_SOME |= {f"service/http/a1111/{name}.py" for name in ("documents", "fields", "translation")}
MANY = 4


def listed(node: ast.AST) -> set[str]:
    """The field names in a literal: a list, tuple or set, or the keys of a mapping."""
    match node:
        case ast.List() | ast.Tuple() | ast.Set():
            parts: list[Any] = node.elts
        case ast.Dict():
            parts = node.keys
        case ast.Call():
            return {word.arg for word in node.keywords if word.arg} & NAMES
        case _:
            return set()
    return {str(part.value) for part in parts if isinstance(part, ast.Constant)} & NAMES


def test_no_other_place_lists_the_fields() -> None:
    folders = ("service", "stepwise")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {
        str(path.relative_to(ROOT))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if len(listed(node)) >= MANY
    }
    assert found - MAY_NAME_SOME == set()
    assert len(files) > 50
