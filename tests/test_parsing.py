"""Request bodies in many spellings: how they are read, and the messages of refusals."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import Invalid
from service.http import pieces
from service.http.forms import read_form
from service.http.models import RequestModel
from service.http.parsing import read_upload
from service.plan.fields import NoiseRequest
from service.plan.shared_fields import MAX_SEED
from tests.servers import Json, ServerProcess, invalid, problem, write_npy
from tests.test_responses import SERVED

JSON = "application/json"
GREY = np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32)
FILE = write_npy(GREY)
TEXT = base64.b64encode(FILE).decode()
NOISE = RequestModel(NoiseRequest, SERVED, max_images=1, timeout=1)
SEEDS = f"must be an integer from 0 to {MAX_SEED}, and is"


def post(server: ServerProcess, path: str, content: Any, content_type: str | None = JSON) -> httpx.Response:
    headers = {} if content_type is None else {"Content-Type": content_type}
    return server.client.post(path, content=content, headers=headers)


def upload(image: str, **fields: object) -> bytes:
    return json.dumps({"image": image, "timestep": 5, "seed": 1, **fields}).encode()


def read_image(image: str) -> bytes:
    _, data = read_upload(JSON, upload(image), NOISE, max_json=2**20)
    return bytes(data)


def complaint(content_type: str, body: bytes) -> str:
    with pytest.raises(Invalid) as refusal:
        read_upload(content_type, body, NOISE, max_json=2**20)
    return str(refusal.value)


# Content-Encoding


@pytest.mark.parametrize("path", ["/sample", "/denoise", "/noise", "/nowhere"])
@pytest.mark.parametrize("coding", ["gzip", "br", "Deflate", "identity, zstd", "x-unknown"])
def test_an_encoded_body_is_refused_and_the_coding_named(server: ServerProcess, path: str, coding: str) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": coding}
    for content in (b"{}", iter([b"{}"])):
        answer = server.client.post(path, content=content, headers=headers)
        assert coding.lower().removeprefix("identity, ") in problem(answer, 415)["detail"]
        assert answer.headers["accept-encoding"] == "identity"


def test_an_encoded_body_is_refused_unread(server: ServerProcess) -> None:
    headers = {"Content-Encoding": "gzip", "Content-Length": "1000"}
    with server.raw_request("POST", "/sample", headers) as connection:
        assert connection.recv(12) == b"HTTP/1.1 415"


@pytest.mark.parametrize("coding", ["identity", "Identity", ""])
def test_identity_is_no_encoding(server: ServerProcess, coding: str) -> None:
    headers = {"Content-Type": JSON, "Content-Encoding": coding}
    assert server.client.post("/sample", content=b"{}", headers=headers).status_code == 200


# Empty bodies


@pytest.mark.parametrize(
    "content_type",
    [None, JSON, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "nonsense"],
)
def test_an_empty_body_is_an_empty_object_whatever_its_type(server: ServerProcess, content_type: str | None) -> None:
    for content in (b"", iter([b""]), iter([b"", b""])):
        assert post(server, "/sample", content, content_type).status_code == 200
    if content_type != "multipart/form-data; boundary=x":
        for content in (b"", iter([b""])):
            assert "is required" in invalid(post(server, "/denoise", content, content_type), "image")


def test_a_body_of_another_type_is_refused_as_soon_as_it_comes(server: ServerProcess) -> None:
    headers = {"Content-Type": "text/plain", "Transfer-Encoding": "chunked"}
    with server.raw_request("POST", "/sample", headers, b"1\r\n{\r\n") as connection:
        assert connection.recv(12) == b"HTTP/1.1 415"


# JSON


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (b'{"seed": 1, "seed": 2}', "seed"),
        (b'{"seed": 1, "seed": 1}', "seed"),
        (rb'{"seed": 1, "s\u0065ed": 2}', "seed"),
        (b'{"class_label": [{"deep": {"a": 1, "b": 2, "a": 3}}]}', "a"),
        (b'{"class_label": [[{"": 1, "": 1}]]}', ""),
        ('{"é": 1, "é": 1}'.encode(), "é"),
        (rb'{"\ud800": 1, "\ud800": 1}', r"\ud800"),  # a lone surrogate
    ],
)
def test_a_key_that_is_given_twice_is_refused_and_named(server: ServerProcess, body: bytes, key: str) -> None:
    assert invalid(post(server, "/sample", body), key) == "is given twice"


def test_json_is_in_utf_8(server: ServerProcess) -> None:
    body = '{"class_label": "cat"}'
    for content_type in (JSON, f"{JSON}; charset=utf-8", f"{JSON};charset=latin-1"):
        assert post(server, "/sample", body.encode(), content_type).status_code == 200
    assert post(server, "/sample", b"\xef\xbb\xbf" + body.encode()).status_code == 200  # a byte order mark is allowed
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        assert "is not valid JSON" in invalid(post(server, "/sample", body.encode(encoding)), "body")
    assert "not in UTF-8" in invalid(post(server, "/sample", '{"class_label": "é"}'.encode("latin-1")), "body")


@pytest.mark.parametrize("body", ["[]", "[{}]", '"seed"', "7", "null", "true"])
def test_json_is_an_object(server: ServerProcess, body: str) -> None:
    assert invalid(post(server, "/sample", body.encode()), "body") == "must be a JSON object"


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_is_no_number_of_json_is_told_the_range(server: ServerProcess, number: str) -> None:
    message = invalid(post(server, "/sample", f'{{"seed": {number}}}'.encode()), "seed")
    assert message.startswith(f"{SEEDS} ")


def test_very_long_json_is_refused_and_blanks_do_not_count(server: ServerProcess) -> None:
    label = {"class_label": "x" * 2**19}
    assert "may have at most 524288" in invalid(post(server, "/sample", json.dumps(label).encode()), "body")
    assert post(server, "/sample", b"{}".ljust(2**20)).status_code == 200
    assert "bytes of JSON" in invalid(post(server, "/denoise", upload("A" * 2**21)), "body")
    assert post(server, "/denoise", upload(TEXT).ljust(2**22, b"\n")).status_code == 200


def test_a_number_without_end_is_refused(server: ServerProcess) -> None:
    for digits in ("9" * 5000, "-" + "9" * 100_000):
        message = invalid(post(server, "/sample", f'{{"seed": {digits}}}'.encode()), "body")
        assert "digits" in message
        assert "sys." not in message


# Numbers


RANGES: Mapping[str, str] = {
    "seed": f"an integer from 0 to {MAX_SEED}",
    "num_images": "an integer from 1 to 64",
    "num_inference_steps": "an integer from 1 to 1000",
    "preview_every": "an integer from 0 to 1000",
    "eta": "a number from 0 to 1",
    "guidance_scale": "a number from 0 to 30",
    "timeout_s": "a number of more than 0 and at most 300",
}
OF_UPLOADS: Mapping[str, str] = {
    "timestep": "an integer from 0 to 999",
    "value_range": "a number from 1 to 16",
    "seed": f"an integer from 0 to {MAX_SEED}",
}


@pytest.mark.parametrize("value", ["seven", "", True, [], {}, "7"], ids=repr)
def test_a_value_of_a_wrong_type_is_told_the_range(server: ServerProcess, value: object) -> None:
    for field, words in RANGES.items():
        message = invalid(server.client.post("/sample", json={field: value}), field)
        assert message == f"must be {words}, and is {json.dumps(value)}"
        if isinstance(value, str) and value != "7":
            message = invalid(server.client.get("/sample", params={field: value}), field)
            assert message == f"must be {words}, and is {json.dumps(value)}"
    for field, words in OF_UPLOADS.items():
        message = invalid(post(server, "/denoise", upload(TEXT, **{field: value})), field)
        assert message == f"must be {words}, and is {json.dumps(value)}"
        if isinstance(value, str) and value != "7":
            fields = {"timestep": "5", field: value}
            message = invalid(server.client.post("/noise", files={"image": FILE}, data=fields), field)
            assert message == f"must be {words}, and is {json.dumps(value)}"


def test_a_fraction_or_null_of_an_integer_is_told_the_range(server: ServerProcess, rgb_server: ServerProcess) -> None:
    assert invalid(server.client.post("/sample", json={"seed": 1.5}), "seed") == f"{SEEDS} 1.5"
    assert invalid(server.client.get("/sample?seed=1.5"), "seed") == f"{SEEDS} 1.5"
    assert "from 1 to 64, and is null" in invalid(
        server.client.post("/sample", json={"num_images": None}), "num_images"
    )
    asked = rgb_server.client.post("/sample", json={"num_inference_steps": "x"})  # the model has 20 timesteps
    assert "an integer from 1 to 20, and is" in invalid(asked, "num_inference_steps")


# Base64


@pytest.mark.parametrize(
    "prefix", ["", "data:application/x-npy;base64,", "data:;base64,", "DATA:application/octet-stream;a=b;BASE64,"]
)
@pytest.mark.parametrize("width", [0, 64, 76, 3])
def test_base64_may_have_a_prefix_and_line_breaks(server: ServerProcess, prefix: str, width: int) -> None:
    plain = post(server, "/denoise", upload(TEXT))
    lines = [TEXT[begin : begin + width] for begin in range(0, len(TEXT), width)] if width else [TEXT]
    for between in ("\r\n", "\n", " \t"):
        written = post(server, "/denoise", upload(prefix + between.join([*lines, ""])))
        assert written.status_code == 200, written.text
        assert written.content == plain.content


@pytest.mark.parametrize(
    ("image", "named"),
    [
        ("data:image/jpeg;base64," + TEXT, 'must be a PNG or .npy file, and is "image/jpeg"'),
        ("data:text/plain;base64," + TEXT, 'is "text/plain"'),
        ("data:image/png," + TEXT, "must be in base64, and begins with"),
        ("data:image/png;base64" + TEXT, "must be in base64, and begins with"),
        ("data:image/png;base64,", "is empty"),
        (TEXT + "=", "is not valid base64"),
        (TEXT[:-1], "is not valid base64"),
        ("QQ==" + TEXT, "is not valid base64"),
        (TEXT.replace("A", "-"), "is not valid base64"),
        ("é" + TEXT, "is not valid base64"),
        (TEXT[:9] + "\v" + TEXT[9:], "is not valid base64"),
    ],
)
def test_other_texts_are_refused_and_told_why(server: ServerProcess, image: str, named: str) -> None:
    assert named in invalid(post(server, "/denoise", upload(image)), "image")


@given(st.binary(max_size=200), st.integers(0, 3), st.data())
def test_base64_is_read_in_pieces_as_in_one(data: bytes, times: int, draw: st.DataObject) -> None:
    data = data * 10 ** (2 * times % 5)
    text = base64.b64encode(data).decode()
    for _ in range(draw.draw(st.integers(0, 5))):
        place = draw.draw(st.integers(0, len(text)))
        text = text[:place] + draw.draw(st.sampled_from(["\n", "\r\n", " ", "\t" * 70_000])) + text[place:]
    assert read_image(text) == data


@pytest.mark.parametrize("size", [2**16, 2**16 - 4, 2**16 + 4])
@pytest.mark.parametrize("more", ["A", "AA==", "AAAA", "="])
def test_nothing_follows_the_padding_of_base64(size: int, more: str) -> None:
    text = "A" * (size - 2) + "=="
    assert len(read_image(text)) == size // 4 * 3 - 2
    assert "is not valid base64" in complaint(JSON, upload(text + more))


# Forms


def form(*parts: tuple[str, bytes], end: bytes = b"--B--\r\n") -> bytes:
    lines = [b"--B\r\nContent-Disposition: form-data; %b\r\n\r\n%b\r\n" % (head.encode(), data) for head, data in parts]
    return b"".join(lines) + end


TYPE = "multipart/form-data; boundary=B"
TIMESTEP = ('name="timestep"', b"5")
IMAGE = 'name="image"'


def test_a_file_needs_no_filename_where_its_bytes_tell_what_it_is(server: ServerProcess) -> None:
    with_name = post(server, "/noise", form((IMAGE + '; filename="a"', FILE), TIMESTEP, ('name="seed"', b"3")), TYPE)
    without = post(server, "/noise", form((IMAGE, FILE), TIMESTEP, ('name="seed"', b"3")), TYPE)
    assert without.status_code == 200
    assert without.content == with_name.content
    large = form((IMAGE, FILE + bytes(70_000)), TIMESTEP)  # longer than a field may be
    assert "must be an .npy with 1024 bytes" in invalid(post(server, "/noise", large, TYPE), "image")


def test_text_in_place_of_a_file_is_told_so(server: ServerProcess) -> None:
    answer = post(server, "/noise", form((IMAGE, b"@seven.png"), TIMESTEP), TYPE)
    assert "without a filename" in invalid(answer, "image")


def test_no_other_file_is_passed_over(server: ServerProcess) -> None:
    other = ('name="mask"; filename="m"', FILE)
    assert "'mask'" in invalid(post(server, "/noise", form((IMAGE, FILE), other, TIMESTEP), TYPE), "image")


def test_fields_are_in_utf_8(server: ServerProcess) -> None:
    answer = post(server, "/denoise", form((IMAGE, FILE), TIMESTEP, ('name="class_label"', b"\xe9")), TYPE)
    assert invalid(answer, "class_label") == "must be text in UTF-8"


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (form((IMAGE, b"\r\n--Bx" * 100_000)), "goes on, at byte"),
        (form((IMAGE, b"\r\n--B \r\n" * 3)), "goes on, at byte"),
        (form((IMAGE, FILE), end=b"--B" + b" " * 1_000_000 + b"\r\n--B--"), "goes on, at byte"),
        (form(*[('name="a"', b"")] * 200_000), "Too many fields"),
        (form((IMAGE + ";" * 4000, FILE)), "more than 32 parameters"),
        (form((IMAGE + "; a=" + "b" * 9000, FILE)), "header size"),
        (form((IMAGE + "".join(f"\r\nX-{i}: y" for i in range(50)), FILE)), "header count"),
        (b"--Bx\r\n" + form((IMAGE, FILE)), "first line"),
        (b"\r\n" * 1_000_000, "lacks its end"),
    ],
    ids=range(9),
)
def test_what_a_parser_of_forms_loops_over_is_bounded(body: bytes, named: str) -> None:
    assert named in complaint(TYPE, body)


def test_a_long_type_of_a_form_is_refused() -> None:
    assert "Content-Type" in complaint("multipart/form-data; boundary=B" + ";" * 60_000, form((IMAGE, FILE)))


@given(st.lists(st.binary(max_size=40).map(lambda data: data * 3000) | st.binary(max_size=40), max_size=5), st.data())
def test_a_form_has_the_parts_that_were_put_into_it(contents: list[bytes], draw: st.DataObject) -> None:
    ends = [draw.draw(st.sampled_from([b"", b"\r", b"\r\n", b"\r\n-", b"--", b"\n--B"])) for _ in contents]
    whole = [content + end for content, end in zip(contents, ends, strict=True)]
    whole = [data for data in whole if b"\r\n--" not in data]  # a CR and the end may make a boundary
    parts = [(f'name="image"; filename="{i}"' if i == 0 else IMAGE, data) for i, data in enumerate(whole)]
    read = read_form(TYPE, form(*parts))
    assert [bytes(part.data) for part in read] == whole
    assert [part.filename for part in read] == ["0", *[None] * (len(read) - 1)][: len(read)]


# Queries and headers


def test_a_query_of_very_many_fields_is_refused(server: ServerProcess) -> None:
    assert "more than 8192 fields" in invalid(server.client.get("/sample?" + "a&" * 9000), "query")
    labels = "&".join(["class_label=1"] * 4000)
    assert "is 4000" in invalid(server.client.get(f"/sample?{labels}"), "class_label")


def test_a_very_long_accept_is_refused_in_few_words(server: ServerProcess) -> None:
    answer = server.client.get("/sample", headers={"Accept": "a/b," * 10_000 + "*/*"})
    assert "may have 4096" in problem(answer, 406)["detail"]
    assert len(answer.content) < 500
    assert server.client.get("/sample", headers={"Accept": "a/b," * 1000 + "*/*"}).status_code == 200


def test_numbers_have_ranges_that_hold(server: ServerProcess) -> None:
    """The messages have the ranges of /openapi.json."""
    schema: Json = server.client.get("/openapi.json").json()["paths"]["/sample"]["post"]["requestBody"]["content"]
    fields = schema[JSON]["schema"]["properties"]
    for name in RANGES:
        limits = {key: value for kind in (fields[name], *fields[name].get("anyOf", [])) for key, value in kind.items()}
        assert f" {limits['maximum']:g}" in RANGES[name] or math.isclose(limits["maximum"], MAX_SEED)


def test_passes_get_the_interpreter_between_pieces_of_an_upload(monkeypatch: pytest.MonkeyPatch) -> None:
    rests: list[None] = []
    monkeypatch.setattr(pieces, "rest", lambda: rests.append(None))
    size = 16 * pieces.PIECE
    long = form((IMAGE + '; filename="a"', bytes(size)), TIMESTEP)
    read_upload(TYPE, long, NOISE, max_json=0)
    assert len(rests) >= 2 * 16  # once to find boundaries, and once to split the form
    rests.clear()
    read_image("A" * (size // 2))
    assert len(rests) >= 2 * 7
    rests.clear()
    read_image("A" * 400)
    assert rests == []  # small forms do not wait
