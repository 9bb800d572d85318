"""The same seed gives the same bytes: alone, in any crowd, at any batch width, in any process of the same fingerprint.

PNGs have eight bits a value. Answers of /denoise are compared as .npy, which shows every bit of float32.
"""

import base64
import hashlib
import io
import itertools
import operator
import os
import socket
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from starlette.testclient import TestClient

from model import samplers
from model.backends.backend import host
from model.backends.openvino import computes_bfloat16
from model.noise import first_draw
from model.rows import Condition
from service.build import probe_row
from service.config import Settings
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.http.app import create_app
from service.http.formats import image_encoder
from service.http.metrics import Metrics
from service.plan.served import Served, fingerprint_parts
from tests.servers import PATIENCE, Json, ServerProcess, read_parameters, read_png, serving, write_npy
from tests.test_responses import MODEL
from tests.test_runner import MixesRows
from tests.trajectories import runner_on, torch_backend

PNG, ZIP, NPY = "image/png", "application/zip", "application/x-npy"
SAMPLERS = tuple(samplers.SAMPLERS)
CLIENTS = 24

# The servers take seconds to start.
pytestmark = pytest.mark.slow

needs_bfloat16 = pytest.mark.skipif(not computes_bfloat16(), reason="this processor has no bfloat16")


class Asked(NamedTuple):
    """A request."""

    path: str
    accept: str
    body: Json


def a_sample(i: int) -> Asked:
    """One image, of 2 to 20 steps. The first 60 all differ."""
    sampler, label = SAMPLERS[i % len(SAMPLERS)], None if i % 4 == 0 else i % 10
    body: Json = {
        "seed": i * 2**47,
        "sampler": sampler,
        "num_inference_steps": 2 + 7 * i % 19,
        "eta": i % 5 / 4 if samplers.SAMPLERS[sampler].takes_eta else 0,
        "class_label": label,
        "guidance_scale": 1 if label is None else [None, 1, 4.5][i % 7 % 3],
    }
    return Asked("/sample", PNG, body)


def a_noisy_image(seed: int) -> str:
    """An .npy file in base64."""
    image = np.random.default_rng(seed).normal(0, 0.7, (1, 32, 32)).astype(np.float32)
    return base64.b64encode(write_npy(image)).decode()


def a_denoise(i: int) -> Asked:
    """An estimate in one step, several steps, the first of several steps, or the network's prediction."""
    label = None if i % 3 == 0 else i % 10
    body: Json = {
        "image": a_noisy_image(i),
        "timestep": 150 + 97 * i % 800,
        "seed": i,
        "sampler": SAMPLERS[i % len(SAMPLERS)],
        "num_inference_steps": [1, 6, 5, 1][i % 4],
        "output": ["x0", "x0", "previous", "model_output"][i % 4],
        "class_label": label,
        "guidance_scale": 1 if label is None else 1 + i % 2 * 2.5,
    }
    return Asked("/denoise", NPY, body)


def another(rng: Random) -> Asked:
    """A short request of another kind."""
    if rng.random() < 0.3:
        timestep, label = rng.randrange(10, 1000), rng.randrange(10)
        steps = {"timestep": timestep, "num_inference_steps": rng.randint(1, 3), "seed": rng.randrange(2**40)}
        kind = {"sampler": rng.choice(SAMPLERS), "output": rng.choice(["x0", "previous", "model_output"])}
        guidance = {"class_label": label, "guidance_scale": rng.choice([1, 2])}
        return Asked("/denoise", NPY, {"image": a_noisy_image(timestep), **steps, **kind, **guidance})
    sampler, n = rng.choice(SAMPLERS), rng.choice([1, 1, 1, 1, 2, 3, 6])
    labels = [rng.choice([None, rng.randrange(10)]) for _ in range(n)]
    body: Json = {
        "num_images": n,
        "seed": rng.choice([i * 2**47 for i in range(40)]),  # seeds of the compared requests
        "sampler": sampler,
        "num_inference_steps": rng.randint(2, 3),  # one step of linspace would leave all of the noise
        "eta": rng.choice([0, 0.5]) if sampler == "ddim" else 0,
        "class_label": labels,
        "guidance_scale": None if labels.count(None) == n else rng.choice([1, 2]),
    }
    return Asked("/sample", rng.choice([PNG, ZIP]), body)


SAMPLES = [a_sample(i) for i in range(40)]
WATCHED = SAMPLES + [a_denoise(i) for i in range(12)]
OTHERS = [another(rng) for rng in [Random(0)] for _ in range(200)]


def answer(server: ServerProcess, asked: Asked) -> bytes:
    response = server.client.post(asked.path, json=asked.body, headers={"Accept": asked.accept})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == asked.accept
    return response.content


def sha256(server: ServerProcess, asked: Asked) -> str:
    return hashlib.sha256(answer(server, asked)).hexdigest()


def alone(server: ServerProcess, requests: Sequence[Asked]) -> list[str]:
    """The checksums of answers to requests that run one at a time."""
    before = server.metrics()
    sums = [sha256(server, asked) for asked in requests]
    assert len(set(sums)) == len(sums)
    passes, no_more_than_one_image = (
        server.metric(name, **labels) - before[name, frozenset(labels.items())]
        for name, labels in (("stepwise_batch_rows_count", {}), ("stepwise_batch_rows_bucket", {"le": "2.0"}))
    )
    assert passes == no_more_than_one_image > 0
    return sums


def crowded(server: ServerProcess, requests: Sequence[Asked], order: int) -> list[str]:
    """The checksums of answers to requests that run together, in random order, while another client comes and goes."""
    places = list(range(len(requests)))
    Random(order).shuffle(places)
    names = ("stepwise_batch_rows_sum", "stepwise_batch_rows_count")
    width = server.client.get("/info").json()["limits"]["max_batch"]
    begun = long_stream(server)
    while b"progress" not in begun.recv(2**16):
        pass
    before = server.metrics()
    with ThreadPoolExecutor(CLIENTS) as pool:
        restless = pool.submit(come_and_go, server, begun, times=5)
        by_place = dict(zip(places, pool.map(lambda i: sha256(server, requests[i]), places), strict=True))
        restless.result()
    rows, passes = (server.metric(name) - before[name, frozenset()] for name in names)
    assert width == 1 or rows / passes > 1.5  # the requests did run together
    return [by_place[i] for i in range(len(requests))]


def long_stream(server: ServerProcess) -> socket.socket:
    """Send a long request."""
    body = b'{"sampler": "ddpm", "num_inference_steps": 1000, "class_label": 3, "guidance_scale": 2}'
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Accept": "text/event-stream"}
    return server.raw_request("POST", "/sample", headers, body)


def come_and_go(server: ServerProcess, begun: socket.socket, times: int) -> None:
    """Leave in the middle of a long request, then a few times while a long request waits."""
    left = server.metric("stepwise_cancelled_total", reason="disconnect")
    begun.close()
    for gone in range(1, times + 1):
        server.wait_for_metric("stepwise_cancelled_total", partial(operator.eq, left + gone), reason="disconnect")
        if gone < times:
            with long_stream(server) as waiting:
                assert b"queued" in waiting.recv(2**16) + waiting.recv(2**16)


def info(server: ServerProcess) -> Json:
    facts: Json = server.client.get("/info").json()
    assert facts["reproducible"] is True
    return facts


def differing(requests: Sequence[Asked], sums: Sequence[str], others: Sequence[str]) -> list[Asked]:
    return [asked for asked, a, b in zip(requests, sums, others, strict=True) if a != b]


def serving_digits(**settings: Any) -> AbstractContextManager[ServerProcess]:
    """A server of the weights in the box. By default eight rows wide, in float32, on two threads."""
    ours: dict[str, Any] = {"DEVICE": "cpu", "THREADS": 2, "MAX_BATCH": 8}
    return serving(None, "tests.steady", WEIGHTS="digits", **(ours | settings))


@pytest.fixture(scope="module")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH that hides OpenVINO."""
    folder = tmp_path_factory.mktemp("hiding")
    (folder / "sitecustomize.py").write_text('import sys\nsys.modules["openvino"] = None\n')
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="module")
def running(hiding: str) -> Iterator[dict[str, ServerProcess]]:
    """Servers of the weights in the box, by backend and precision. They start side by side."""
    with ExitStack() as stack:

        def start(**settings: object) -> ServerProcess:
            return stack.enter_context(serving_digits(**settings))

        servers = {"float32": start(), "one thread": start(THREADS=1)}
        if computes_bfloat16():
            servers["bfloat16"] = start(PRECISION="bfloat16")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", hiding)
            servers |= {"torch": start(MAX_BATCH=4), "torch again": start(MAX_BATCH=4)}
        yield servers
    for server in servers.values():
        assert [line for line in server.lines if line["level"] == "error"] == []


# The same bytes.


@pytest.mark.parametrize(
    ("precision", "widths"), [("float32", [3]), pytest.param("bfloat16", [5], marks=needs_bfloat16)]
)
def test_the_same_seed_gives_the_same_bytes(
    running: dict[str, ServerProcess], precision: str, widths: list[int]
) -> None:
    requests = WATCHED + OTHERS
    first = running[precision]
    expected = alone(first, WATCHED)
    crowds = [crowded(first, requests, order=0)]
    prints = [info(first)["fingerprint"]]
    with ExitStack() as stack:
        others = [stack.enter_context(serving_digits(PRECISION=precision, MAX_BATCH=width)) for width in widths]
        for order, server in enumerate(others, 1):
            assert (info(server)["backend"], info(server)["precision"]) == ("openvino", precision)
            prints.append(info(server)["fingerprint"])
            crowds.append(crowded(server, requests, order))
    assert len(set(prints)) == 1
    for crowd in crowds:
        assert differing(WATCHED, crowd[: len(WATCHED)], expected) == []
        assert differing(requests, crowd, crowds[0]) == []
    for server in others:
        assert [line for line in server.lines if line["level"] == "error"] == []


def test_an_image_of_a_larger_request_has_the_bytes_of_its_own(running: dict[str, ServerProcess]) -> None:
    common: Json = {"sampler": "ddpm", "num_inference_steps": 3, "guidance_scale": 2}
    labels = [i % 10 for i in range(16)]
    archive = answer(
        running["float32"], Asked("/sample", ZIP, {"seed": 100, "num_images": 16, "class_label": labels, **common})
    )
    pngs = {
        f"{100 + i}.png": answer(
            running["float32"], Asked("/sample", PNG, {"seed": 100 + i, "class_label": i % 10, **common})
        )
        for i in range(16)
    }
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        assert {name: file.read(name) for name in file.namelist()} == pngs
    assert len(set(pngs.values())) == 16


def test_previews_move_no_bit(running: dict[str, ServerProcess]) -> None:
    server = running["float32"]
    for asked in SAMPLES[:6]:
        steps = asked.body["num_inference_steps"]
        without = answer(server, asked)
        for preview_every in {1, steps}:
            body = {**asked.body, "preview_every": preview_every}
            assert answer(server, asked._replace(body=body)) == without
    query = "/sample?seed=3&num_inference_steps=2"
    plain, with_previews = (server.client.get(query + more) for more in ("", "&preview_every=1"))
    assert plain.headers["etag"] == with_previews.headers["etag"]
    assert plain.content == with_previews.content


# Fingerprints.


def test_another_runtime_has_another_fingerprint(running: dict[str, ServerProcess]) -> None:
    facts = {name: info(server) for name, server in running.items()}
    prints = {name: one["fingerprint"] for name, one in facts.items()}
    assert prints.pop("torch again") == prints["torch"]
    assert len(set(prints.values())) == len(prints)
    for server in running.values():
        png = answer(server, SAMPLES[1])
        assert read_parameters(png)["fingerprint"] == info(server)["fingerprint"]
    for name in prints.keys() & {"one thread", "bfloat16"}:
        changed = {"one thread": "threads", "bfloat16": "precision"}[name]
        ours, its = facts["float32"]["fingerprint_parts"], facts[name]["fingerprint_parts"]
        assert {part for part in ours if ours[part] != its[part]} == {changed}


def test_where_bytes_differ_fingerprints_do(running: dict[str, ServerProcess]) -> None:
    """Arrays, because PNGs would hide most of the difference."""
    requests = [asked for asked in WATCHED if asked.path == "/denoise"]
    answers = {name: [answer(server, asked) for asked in requests] for name, server in running.items()}
    prints = {name: info(server)["fingerprint"] for name, server in running.items()}
    for one, other in itertools.combinations(running, 2):
        assert answers[one] == answers[other] or prints[one] != prints[other], (one, other)
    assert answers["torch"] == answers["torch again"]
    assert answers["torch"] != answers["float32"]  # so there was a difference to find


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ATEN_CPU_CAPABILITY", "default"),
        ("ONEDNN_MAX_CPU_ISA", "AVX2"),
        ("DNNL_MAX_CPU_ISA", "AVX2"),
        ("ONEDNN_DEFAULT_FPMATH_MODE", "BF16"),
        ("MKL_CBWR", "COMPATIBLE"),
        ("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
        ("OMP_THREAD_LIMIT", "1"),
        ("OV_CPU_MAX_ISA", "AVX2"),
        ("NPY_DISABLE_CPU_FEATURES", "AVX512_ICL X86_V4"),
        ("OPENBLAS_CORETYPE", "Haswell"),
        ("GLIBC_TUNABLES", "glibc.cpu.hwcaps=-AVX2,-FMA,-AVX512F"),
    ],
)
@pytest.mark.parametrize("backend", ["float32", "torch"])
def test_where_the_environment_moves_bytes_fingerprints_differ(
    running: dict[str, ServerProcess],
    hiding: str,
    backend: str,
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such variables choose the libraries' kernels, and other kernels round differently."""
    monkeypatch.setenv(name, value)
    if backend == "torch":
        monkeypatch.setenv("PYTHONPATH", hiding)
    requests = [*WATCHED[:6], *WATCHED[-6:]]
    with serving_digits(PRECISION="float32", MAX_BATCH=4 if backend == "torch" else 8) as server:
        answers = [[answer(where, asked) for asked in requests] for where in (running[backend], server)]
        facts = [info(where) for where in (running[backend], server)]
    assert [fact["backend"] for fact in facts] == ["openvino" if backend == "float32" else "torch"] * 2
    assert answers[0] == answers[1] or facts[0]["fingerprint"] != facts[1]["fingerprint"]


@needs_bfloat16
def test_bfloat16_draws_other_pixels(running: dict[str, ServerProcess]) -> None:
    ours, its = (read_png(answer(running[name], SAMPLES[1])) for name in ("float32", "bfloat16"))
    assert (ours != its).any()


# Without OpenVINO.


def test_without_openvino_torch_computes_and_one_warning_says_so(running: dict[str, ServerProcess]) -> None:
    assert info(running["torch"])["backend"] == "torch"
    assert info(running["float32"])["backend"] == "openvino"
    for name, warnings in (("torch", 1), ("float32", 0)):
        said = [line for line in running[name].lines if "OpenVINO is not installed" in line["message"]]
        assert [line["level"] for line in said] == ["warning"] * warnings


def test_torch_keeps_the_promise_too(running: dict[str, ServerProcess]) -> None:
    watched = [*SAMPLES[:10], *WATCHED[-4:]]
    requests = watched + OTHERS[:20]
    expected = alone(running["torch"], watched)
    crowds = [crowded(running[name], requests, order) for order, name in enumerate(("torch", "torch again"))]
    for crowd in crowds:
        assert differing(watched, crowd[: len(watched)], expected) == []
        assert differing(requests, crowd, crowds[0]) == []


# On a GPU.


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: there is no GPU here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_cuda_keeps_the_promise_too(precision: str) -> None:
    requests = WATCHED + OTHERS
    with ExitStack() as stack:
        one, another = (
            stack.enter_context(serving_digits(DEVICE="cuda", PRECISION=precision, MAX_BATCH=2)) for _ in range(2)
        )
        assert (info(one)["backend"], info(one)["precision"]) == ("torch-cuda", precision)
        assert info(one)["fingerprint"] == info(another)["fingerprint"]
        expected = alone(one, WATCHED)
        crowds = [crowded(server, requests, order) for order, server in enumerate((one, another))]
    for crowd in crowds:
        assert differing(WATCHED, crowd[: len(WATCHED)], expected) == []
        assert differing(requests, crowd, crowds[0]) == []


# A network that breaks the promise.


@pytest.fixture
def broken_promise() -> Iterator[TestClient]:
    """A client of an app whose network mixes rows, so an image depends on other rows of its pass."""
    backend = torch_backend(MixesRows(), MODEL.image_shape, "float32", 4)
    served = Served(
        model=MODEL,
        device="cpu",
        fingerprint_parts=fingerprint_parts(MODEL, MODEL.group, backend.fingerprint, host(), image_encoder()),
        reproducible=backend.reproducible,
        first_draw=first_draw,
        groups=(MODEL.group,),
    )
    runner = runner_on(backend, MODEL.image_shape, 4, MixesRows())
    metrics = Metrics()
    engine = Engine(
        {MODEL.group: runner}, {MODEL.group: probe_row(MODEL, MODEL.group, Condition())}, Places(4), metrics
    )
    with TestClient(create_app(engine, served, Settings(), metrics)) as client:
        assert engine.wait_loaded(PATIENCE)
        yield client


def test_where_bytes_depend_on_others_info_says_so_and_nothing_is_kept(broken_promise: TestClient) -> None:
    client = broken_promise
    assert client.get("/info").json()["reproducible"] is False
    wanted = client.get("/info").json()["fingerprint"]
    for query in ("seed=1", f"seed=1&model={wanted}"):
        for method in ("GET", "HEAD"):
            response = client.request(method, f"/sample?{query}", headers={"If-None-Match": "*"})
            assert response.status_code == 200
            assert "etag" not in response.headers
            assert response.headers["cache-control"] == "no-store"
    assert read_png(client.get("/sample?seed=1").content).shape == (4, 4)
