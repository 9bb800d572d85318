"""The process: start, fair sharing, and shutdown."""

import errno
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import httpx
import pytest
import torch
from safetensors import SafetensorError

import service
import service.build
from model.backends.backend import Backend
from model.backends.choose import choose
from model.rows import Group
from service.__main__ import listen, listen_all, main, refuse_workers
from service.build import StartError, build, choose_groups, choose_threads, computing, find_weights, starting
from service.config import Settings, available_cores
from service.fitting import fitting
from tests.checkpoints import save_pipeline, small_unet
from tests.local import FakeServer, serving_fake
from tests.servers import (
    CACHE,
    PATIENCE,
    ROOT,
    Json,
    Reachable,
    ServerProcess,
    environment,
    invalid,
    problem,
    serving,
    side_by_side,
    write_npy,
)
from tests.test_denoise import GREY, RGB
from tests.test_events import EVENTS, failed, told, watching
from tests.test_responses import MODEL
from tests.texts import TEXT
from tests.trajectories import CPU

# Requests that take long because of their many steps.
LONG: Json = {"sampler": "ddpm", "num_inference_steps": 1000}
ENDLESS: Json = {**LONG, "num_images": 64}


@contextmanager
def in_background(call: Callable[[], httpx.Response]) -> Iterator[Future[httpx.Response]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def post(server: Reachable, body: Json) -> httpx.Response:
    """POST /sample on a new connection."""
    with server.new_client() as client:
        return client.post("/sample", json=body)


def wait_until_running(server: ServerProcess) -> None:
    server.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)


def wait_until_idle(server: ServerProcess) -> None:
    server.wait_for_metric("stepwise_rows_running", lambda rows: rows == 0)
    server.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 0)


def send_long(server: Reachable, num_images: int = 3, **headers: str) -> socket.socket:
    """A connection that has sent a long request."""
    body = b'{"sampler": "ddpm", "num_inference_steps": 1000, "num_images": %d}' % num_images
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    return server.raw_request("POST", "/sample", headers, body)


# Sharing.


def test_forty_requests_at_once_draw_what_they_draw_alone(server: ServerProcess, rgb_server: ServerProcess) -> None:
    samplers = ["ddim", "ddpm", "dpmpp_2m"]
    bodies: list[Json] = [
        {
            "seed": i,
            "sampler": samplers[i % 3],
            "num_inference_steps": 1 + i % 7,
            "class_label": [None, 0, "dog", "7"][i % 4],
            "eta": i / 40 if i % 3 == 0 else 0,
            "num_images": 1 + i % 5 // 3,
        }
        for i in range(25)
    ]

    def sample(i: int) -> bytes:
        return post(server, bodies[i]).content

    def denoise(i: int) -> bytes:
        where, image, t = (server, GREY, 400 + i) if i % 2 else (rgb_server, RGB, 5 + i)
        fields = {"timestep": t, "num_inference_steps": 1 + i % 4, "seed": i, "sampler": samplers[i % 3]}
        with where.new_client() as client:
            answer = client.post(
                "/denoise",
                files={"image": write_npy(image)},
                data={name: str(value) for name, value in fields.items()},
                headers={"Accept": "application/x-npy"},
            )
        assert answer.status_code == 200
        return answer.content

    calls = [(sample, i) for i in range(25)] + [(denoise, i) for i in range(15)]
    alone = [call(i) for call, i in calls]
    with ThreadPoolExecutor(len(calls)) as pool:
        crowd = list(pool.map(lambda call: call[0](call[1]), reversed(calls)))
    assert crowd[::-1] == alone
    assert len(set(alone)) == len(alone)


def test_failing_requests_leave_their_neighbours_alone(strict_server: ServerProcess) -> None:
    neighbours: list[Json] = [
        {"seed": 1, "sampler": "ddpm", "num_inference_steps": 150},
        {"seed": 2, "num_images": 2, "class_label": ["cat", "7"], "num_inference_steps": 60},
    ]
    alone = [post(strict_server, body).content for body in neighbours]
    before = strict_server.metric("stepwise_accepted_total")
    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(post, strict_server, body) for body in neighbours]
        strict_server.wait_for_metric("stepwise_accepted_total", lambda accepted: accepted >= before + 2)
        for steps in (1, 2, 5):
            poisoned = {"seed": 3, "class_label": "dog", "num_inference_steps": steps}
            assert "not finite" in problem(post(strict_server, poisoned), 500)["detail"]
            assert strict_server.client.get("/health/ready").status_code == 200
        assert [answer.result().content for answer in answers] == alone


def test_who_fills_the_queue_is_refused_and_others_are_served(strict_server: ServerProcess) -> None:
    refused = strict_server.metric("stepwise_refused_total", reason="share")
    with ExitStack() as stack, strict_server.new_client(key="beta-ü") as other:
        for scheme in ("Bearer", "bearer", "BEARER", "Bearer "):  # the key is the same
            stack.enter_context(send_long(strict_server, Authorization=f"{scheme} alpha"))
        strict_server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > 9000)
        answer = post(strict_server, {})
        assert "your share" in problem(answer, 429)["detail"]
        assert re.fullmatch(r"[1-9]\d*", answer.headers["retry-after"])
        problem(strict_server.client.get("/sample?seed=1", headers={"Authorization": "bEaReR alpha"}), 429)
        assert other.post("/sample", json={"num_images": 2}).status_code == 200
        assert strict_server.client.get("/health/ready").status_code == 200  # a full server is still ready
        assert strict_server.client.get("/sample?seed=1", headers={"If-None-Match": "*"}).status_code == 304
        assert strict_server.client.head("/sample?seed=1").status_code == 200
    wait_until_idle(strict_server)
    assert post(strict_server, {}).status_code == 200
    assert strict_server.metric("stepwise_refused_total", reason="share") == refused + 2


def test_without_keys_the_queue_is_shared_by_addresses() -> None:
    with serving_fake(max_queue=2) as server, ExitStack() as stack:
        server.runner.hold()
        clients = [stack.enter_context(server.new_client(source=f"127.0.0.{i}")) for i in (1, 2, 3)]
        pool = stack.enter_context(ThreadPoolExecutor(3))

        def begin(client: httpx.Client) -> Future[httpx.Response]:
            before = server.metric("stepwise_outstanding_row_steps")
            answer = pool.submit(client.post, "/sample", json={})
            server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > before)
            return answer

        begun = [begin(clients[0]), begin(clients[0])]
        full = clients[0].post("/sample", json={})  # a lone client shares with nobody
        assert "all 2 places" in problem(full, 503)["detail"]
        begun.append(begin(clients[1]))  # accepted all the same
        share = clients[0].post("/sample", json={})
        assert "your share" in problem(share, 429)["detail"]
        crowded = clients[2].post("/sample", json={})
        assert "all 3 places" in problem(crowded, 503)["detail"]
        for refused in (full, share, crowded):
            assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
        server.runner.let_go()
        assert [answer.result().status_code for answer in begun] == [200] * 3
        assert clients[0].post("/sample", json={}).status_code == 200


def test_a_client_that_leaves_costs_nothing_more(server: ServerProcess) -> None:
    cancelled = server.metric("stepwise_cancelled_total", reason="disconnect")
    drawn = server.metric("stepwise_images_total")
    with send_long(server, 64):
        wait_until_running(server)
    wait_until_idle(server)
    samples = server.metrics()
    assert samples["stepwise_outstanding_row_steps", frozenset()] == 0
    assert samples["stepwise_cancelled_total", frozenset({("reason", "disconnect")})] == cancelled + 1
    assert samples["stepwise_images_total", frozenset()] == drawn
    assert post(server, {}).status_code == 200
    left = server.wait_for_line(lambda line: line.get("status") == 499)
    assert left["path"] == "/sample"


def test_a_client_that_leaves_in_mid_request_is_no_error(server: ServerProcess) -> None:
    """The server once logged this as an error, with two stack traces."""
    form = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": "100", "X-Request-ID": "left-form"}
    with server.raw_request("POST", "/denoise", form, b"--B\r\n"):
        pass
    assert server.wait_for_line(lambda line: line.get("request_id") == "left-form")["status"] == 499
    body = {"Content-Type": "application/json", "Content-Length": "100", "X-Request-ID": "left-json"}
    with server.raw_request("POST", "/sample", body, b"{"):
        pass
    assert server.wait_for_line(lambda line: line.get("request_id") == "left-json")["status"] == 499


def test_what_could_not_be_done_in_time_is_refused_at_once(server: ServerProcess) -> None:
    """Whatever the present load."""
    refused = server.metric("stepwise_refused_total", reason="impossible")
    for timeout_s in (1e-6, 0.01):
        answer = post(server, {**LONG, "timeout_s": timeout_s})
        assert invalid(answer, "timeout_s").endswith(f"even on an idle server, and is {timeout_s:g}")
    assert server.metric("stepwise_refused_total", reason="impossible") == refused + 2


def test_what_cannot_be_done_in_time_now_is_refused_and_may_come_again() -> None:
    """A job of four steps takes four seconds of the fake clock, and is promised within five and the time of a PNG."""
    with serving_fake() as server:
        server.runner.hold()
        with in_background(lambda: server.client.post("/sample", json={"timeout_s": 5.1})) as first:
            server.runner.next_pass()
            late = server.client.post("/sample", json={"timeout_s": 5.1})
            assert "within 5.1 s now, but within " in problem(late, 503)["detail"]
            assert re.fullmatch(r"[1-9]\d*", late.headers["retry-after"])
            server.runner.let_go()
        assert first.result().status_code == 200
        server.runner.clock.now += 1
        assert server.client.post("/sample", json={"timeout_s": 5.1}).status_code == 200


def test_a_deadline_that_passes_is_a_504() -> None:
    with serving_fake() as server:
        server.runner.hold()
        with in_background(lambda: server.client.post("/sample", json={"num_images": 2, "timeout_s": 6})) as answer:
            server.runner.next_pass()
            server.runner.clock.now += 10  # this pass is much slower than all earlier ones
            server.runner.let_go()
        assert problem(answer.result(), 504)["detail"] == "not done within 6 s"
        samples = server.metrics()
        assert samples["stepwise_cancelled_total", frozenset({("reason", "timeout")})] == 1
        assert samples["stepwise_promises_total", frozenset({("outcome", "missed")})] == 1
        assert samples["stepwise_rows_running", frozenset()] == 0
        assert samples["stepwise_outstanding_row_steps", frozenset()] == 0
        assert server.client.post("/sample", json={}).status_code == 200


# Leaving.


def test_sigterm_lets_what_runs_finish(weights: Path) -> None:
    body = {**LONG, "seed": 1}
    with (
        side_by_side(serving(WEIGHTS=weights / "grey", MAX_BATCH=2, DRAIN_TIMEOUT=PATIENCE)) as [server],
        watching(server, body) as events,
        in_background(lambda: post(server, body)) as running,
    ):
        come = [next(events)]
        server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > 1000)  # both are in line
        server.terminate()
        server.wait_for_line(lambda line: "draining" in line["message"])
        with server.new_client() as client:  # the server still listens
            unready = client.get("/health/ready")
            assert unready.status_code == 503
            assert unready.json()["status"] == "draining"
            assert client.get("/health").json()["status"] == "draining"
            assert client.get("/health/live").status_code == 200
            for refused in (
                client.post("/sample", json={}),
                client.get("/sample"),
                client.get("/sample", headers=EVENTS),
                client.post("/denoise", files={"image": write_npy(GREY)}, data={"timestep": "5"}),
            ):
                problem(refused, 503)
                assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
            server.terminate()  # changes nothing
            assert client.get("/health/live").status_code == 200
            assert 'stepwise_refused_total{reason="draining"} 4.0' in client.get("/metrics").text
        assert not running.done()
        told([*come, *events], steps=1000)
        assert running.result().status_code == 200
        while server.process.poll() is None:  # further signals change nothing either
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(0.02)
        assert server.wait() == 0


@contextmanager
def held(drain_timeout: float) -> Iterator[tuple[FakeServer, threading.Event]]:
    """A server whose passes are held, and an event that is set when its engine is being closed."""
    closing = threading.Event()
    with serving_fake(timeout=1e6, drain_timeout=drain_timeout) as server, pytest.MonkeyPatch.context() as patch:
        close = server.engine.close

        def close_and_say() -> None:
            closing.set()
            close()

        patch.setattr(server.engine, "close", close_and_say)
        server.runner.hold()
        yield server, closing


def test_sigterm_waits_no_longer_than_the_drain_timeout() -> None:
    half = {"Content-Type": "application/json", "Content-Length": "100"}
    with (
        held(drain_timeout=0.1) as (server, closing),
        server.raw_request("POST", "/sample", half, b"{") as never_sent,
        watching(server, ENDLESS) as events,
        in_background(lambda: post(server, ENDLESS)) as running,
    ):
        come = [next(events)]
        server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > 64_000)  # both are in line
        server.signal(signal.SIGTERM)
        assert closing.wait(PATIENCE)
        server.runner.let_go()
        refused = running.result()
        assert "shutting down" in problem(refused, 503)["detail"]
        assert refused.headers["retry-after"]
        assert "shutting down" in failed([*come, *events], 503)
        server.wait()
        assert never_sent.recv(20).startswith(b"HTTP/1.1 503")


def test_ctrl_c_twice_waits_for_nobody() -> None:
    with held(drain_timeout=PATIENCE) as (server, closing), in_background(lambda: post(server, ENDLESS)) as running:
        server.runner.next_pass()
        server.signal(signal.SIGINT)
        problem(server.client.post("/sample", json={}), 503)
        assert not closing.is_set()
        server.signal(signal.SIGINT)
        assert closing.wait(PATIENCE)
        server.runner.let_go()
        problem(running.result(), 503)
        server.wait()


# Starting.

Ended = subprocess.CompletedProcess[str]


def test_what_cannot_start_says_why_in_one_line(weights: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((weights / "grey" / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((weights / "grey" / "model.safetensors").read_bytes()[:-1000])
    command = [sys.executable, "-m", "service"]
    env = environment(WEIGHTS=tmp_path)
    ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.returncode == 1
    [line] = ended.stderr.splitlines()
    assert line.startswith(f"stepwise: {tmp_path}/model.safetensors: cannot be read")
    assert ended.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("command", [["service"], ["stepwise", "serve"]], ids=" ".join)
@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"API_KEYS": ","}, "STEPWISE_API_KEYS is set, but holds no key"),
        ({"API_KEYS": ""}, "STEPWISE_API_KEYS is set, but holds no key"),
        ({"API_KEY": "open-sesame"}, "STEPWISE_API_KEY is a setting of the client"),
        ({"WEIGHTS": "~no-such-user/x"}, "STEPWISE_WEIGHTS=~no-such-user/x cannot be opened"),
        ({"CACHE_DIR": "~no-such-user/x"}, "STEPWISE_CACHE_DIR=~no-such-user/x: there is no such user"),
        ({"THREADS": 1_000_000}, "STEPWISE_THREADS=1000000: "),
        ({"SIZES": "32x32,32"}, "STEPWISE_SIZES=32x32,32: must be sizes as 64x48"),
        ({"SIZES": "32x32,32x30"}, "STEPWISE_SIZES=32x30: for digits, height must be a multiple of "),
        ({"PORT": "TAKEN"}, "cannot listen on 127.0.0.1:"),
        ({"METRICS_PORT": "TAKEN"}, "STEPWISE_METRICS_PORT: cannot listen on 127.0.0.1:"),
    ],
    ids=str,
)
def test_a_start_that_fails_is_one_line_and_an_exit_code(
    command: list[str], settings: dict[str, object], line: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        env = environment(**{name: port if value == "TAKEN" else value for name, value in settings.items()})
        ended = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
    assert ended.returncode in (1, 2)
    [said] = ended.stderr.splitlines()
    assert said.startswith(f"stepwise: {line}")
    assert "sesame" not in said
    assert ended.stdout == ""


def test_weights_that_are_nowhere_are_named() -> None:
    box = "digits, digits-4step, emoji"
    with pytest.raises(StartError, match=rf"^STEPWISE_WEIGHTS=nowhere/at all is .*; in the box: {box}$"):
        build(Settings(weights="nowhere/at all"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("~no-such-user/model", "home directory"),
        ("a" * 5000, "File name too long"),
        ("a/" * 2500, "File name too long"),
        ("a\0b", "null byte"),
        ("two\nlines", "is neither a file nor a folder"),
        ("/dev/null/model", "Not a directory"),
        (" ", "is neither a file nor a folder"),
    ],
)
def test_a_path_that_is_none_is_told_in_one_short_line(name: str, reason: str) -> None:
    with pytest.raises(StartError, match=r"^STEPWISE_WEIGHTS=") as error:
        find_weights(name)
    message = str(error.value)
    assert reason in message
    assert message.isprintable()
    assert len(message) < 400


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "not enough memory"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            "not enough memory (CUDA out of memory.",
        ),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory:\nyou tried"), "not enough memory (DefaultCPU"),
        (RuntimeError("Exception from src/inference: std::bad_alloc"), "not enough memory (Exception"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), "not enough memory (CUDA error"),
        (RuntimeError("first line\n\n  second line"), "RuntimeError (first line second line)"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory (Cannot allocate memory)"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/model"), "Permission denied"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "UnicodeDecodeError ("),
        (SafetensorError("header too large"), "SafetensorError (header too large)"),
        (KeyError("conv.weight"), "KeyError ('conv.weight')"),
        (AssertionError(), "AssertionError"),
        (ValueError("x" * 5000), f"ValueError ({'x' * 200}…)"),
    ],
)
def test_an_error_of_any_library_is_told_in_one_line(error: Exception, told: str) -> None:
    with pytest.raises(StartError) as raised, starting("the weights cannot be loaded"):
        raise error
    message = str(raised.value)
    assert message.startswith(f"the weights cannot be loaded: {told}")
    assert message.isprintable()
    assert len(message) < 300
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "what",
    [
        "service.build.load",
        "service.build.choose",
        "service.build.SlotRunner",
        "service.build.torch.set_num_threads",
        "model.backends.openvino.OpenVINOBackend.prepare",  # so all is compiled before the server is up
    ],
)
def test_whatever_fails_at_the_start_is_one_line(what: str, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise MemoryError

    monkeypatch.setattr(what, fail)
    with pytest.raises(StartError, match=r"^.* cannot be .*: not enough memory$"):
        build(Settings(weights=str(weights / "grey"), threads=1, device="cpu"))


def test_threads_are_as_many_as_cores_can_use() -> None:
    assert choose_threads(None) == available_cores()
    assert choose_threads(3, cores=2) == 3
    assert choose_threads(1024, cores=None) == 1024
    most = "8 threads a core are the most, 16 on this machine"
    with pytest.raises(StartError, match=f"^STEPWISE_THREADS=17: {most}$"):
        choose_threads(17, cores=2)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Group(32, 33), "width must be a multiple of 8, from 8 to 8192, and is 33"),
        (Group(4, 32), "height must be a multiple of 8, from 8 to 8192, and is 4"),
        (Group(8200, 32), "height must be a multiple of 8, from 8 to 8192, and is 8200"),
    ],
)
def test_a_size_that_the_network_cannot_take_is_refused_in_plain_words(size: Group, said: str) -> None:
    model = replace(MODEL, factor=8)
    with pytest.raises(StartError) as refused:
        choose_groups([Group(32, 32), size], model, CPU)
    assert str(refused.value) == f"STEPWISE_SIZES={size}: for {model.name}, {said}"


def test_without_sizes_the_size_of_the_weights_is_served() -> None:
    assert choose_groups([], MODEL, CPU) == (Group(*MODEL.image_shape[1:]),)
    assert choose_groups([Group(8, 8), Group(4, 4)], MODEL, CPU) == (Group(8, 8), Group(4, 4))


@pytest.mark.parametrize(
    ("side", "others"),
    [
        (512, "576x448 448x576 640x384 384x640 768x512 512x768"),
        (768, "896x640 640x896 1024x576 576x1024"),
        (1024, "1152x896 896x1152 1216x832 832x1216 1344x768 768x1344"),
        (64, ""),
        (96, ""),  # no multiple of 64
    ],
)
def test_on_a_gpu_models_with_text_have_the_usual_aspects_too(side: int, others: str) -> None:
    """The native size is the first, and so the default."""
    native, gpu = Group(side, side), torch.device("cuda")
    model = replace(TEXT.model, image_shape=(3, side, side), factor=8)
    assert [str(group) for group in choose_groups([], model, gpu)] == [str(native), *others.split()]
    assert choose_groups([], model, CPU) == (native,)
    assert choose_groups([], replace(model, text=None), gpu) == (native,)
    assert choose_groups([Group(64, 64)], model, gpu) == (Group(64, 64),)


def test_sizes_that_do_not_fit_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    """From the first one on: those after it are about as large."""
    sizes = [Group(side, side) for side in (8, 16, 24, 32)]
    tried: list[tuple[Group, str | None]] = []

    def make(group: Group, like: str | None) -> str | None:
        tried.append((group, like))
        return None if group == sizes[2] else f"for {group}"

    assert fitting(sizes, make) == {sizes[0]: "for 8x8", sizes[1]: "for 16x16"}
    assert tried == [(sizes[0], None), (sizes[1], "for 8x8"), (sizes[2], "for 16x16")]
    [message] = caplog.messages
    assert message.startswith("left out for want of memory: 24x24, 32x32; STEPWISE_SIZES")


@pytest.mark.parametrize(
    ("largest", "settings", "served"),
    [(32, {}, [32]), (32, {"sizes": "32x32,64x64"}, None), (16, {}, None)],
)
def test_only_sizes_that_were_not_asked_for_may_be_left_out(
    largest: int, settings: dict[str, str], served: list[int] | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A machine whose memory ends at a size, and weights that are served at two sizes by default, as on a GPU."""
    save_pipeline(tmp_path, small_unet(sample_size=32))
    both = Group(32, 32), Group(64, 64)

    def choose_until(*how: Any) -> Callable[[tuple[int, ...]], Backend]:
        make = choose(*how)

        def made(shape: tuple[int, ...]) -> Backend:
            if shape[1] > largest:
                raise torch.OutOfMemoryError(f"no memory for {shape}")
            return make(shape)

        return made

    monkeypatch.setattr(service.build, "choose", choose_until)
    monkeypatch.setattr(service.build, "choose_groups", lambda sizes, model, device: tuple(sizes) or both)
    read = Settings.model_validate({"weights": str(tmp_path), "device": "cpu", **settings})
    if served is None:
        with pytest.raises(StartError, match=r"images of (\d+)x\1 on cpu: not enough memory"):
            build(read)
        return
    engine, facts, _ = build(read)
    engine.close()
    assert facts.groups == tuple(Group(side, side) for side in served)


def test_images_of_any_number_of_channels_can_be_served(tmp_path: Path) -> None:
    save_pipeline(tmp_path, small_unet(in_channels=5, out_channels=5))
    engine, served, _ = build(Settings(weights=str(tmp_path), device="cpu", threads=1, cache_dir=CACHE))
    assert served.model.image_shape[0] == 5
    engine.start()
    try:
        assert engine.wait_loaded(PATIENCE)
        assert engine.status == "ready"
    finally:
        engine.close()


def test_a_size_without_memory_for_it_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("model.backends.choose.available", lambda: 2.0**28)
    with pytest.raises(
        StartError,
        match=r"^digits cannot be made ready for images of 4096x2048 on cpu: "
        r"not enough memory \(its denoiser needs \d+\.\d GiB, and 0\.2 GiB are left\)$",
    ):
        build(
            Settings(
                weights="digits", sizes=(Group(32, 32), Group(2048, 4096)), device="cpu", threads=1, cache_dir=CACHE
            )
        )


class Width(NamedTuple):
    """A backend that has only a width."""

    width: int

    @property
    def fingerprint(self) -> dict[str, str | int]:
        return {"backend": "a kind", "width": self.width}


def test_a_group_adds_to_the_fingerprint_what_it_has_otherwise() -> None:
    """On CUDA, groups have their own widths. A group that computes as the first one leaves the fingerprint alone."""
    small, large, wide = Group(32, 32), Group(64, 64), Group(32, 64)
    backends: Any = {small: Width(8), large: Width(2), wide: Width(8)}
    assert computing(backends, {}, None) == {"backend": "a kind", "width": 8, "width 64x64": 2}


def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    with pytest.raises(StartError, match=r"^STEPWISE_DEVICE=cuda: .* no CUDA device$"):
        build(Settings(device="cuda"))
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(StartError, match=r"^STEPWISE_DEVICE=cuda:2: the CUDA devices are cuda:0 to cuda:1$"):
        build(Settings(device="cuda:2"))


def test_several_workers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "2")
    with pytest.raises(StartError, match=r"^WEB_CONCURRENCY=2: one process "):
        refuse_workers()
    for one in ("1", ""):
        monkeypatch.setenv("WEB_CONCURRENCY", one)
        refuse_workers()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(StartError, match=rf"^cannot listen on 127\.0\.0\.1:{port}: .*in use$"):
            listen_all(Settings(port=port))
        with pytest.raises(
            StartError, match=rf"^STEPWISE_METRICS_PORT: cannot listen on 127\.0\.0\.1:{port}: .*in use$"
        ):
            listen_all(Settings(port=0, metrics_port=port))


def test_two_servers_cannot_start_on_one_port() -> None:
    """Both once bound the port. One died with a traceback after loading its weights."""
    with listen(Settings(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(StartError, match=r"in use$"):
            listen(Settings(port=port))
    with listen(Settings(port=port)):  # possible as soon as the first has ended
        pass
    with pytest.raises(StartError, match=rf"^STEPWISE_METRICS_PORT: cannot listen on 127\.0\.0\.1:{port}: .*in use$"):
        listen_all(Settings(port=port, metrics_port=port))


@pytest.mark.parametrize("host", ["no such host", "a..b", f"{'a' * 70}.x", "::1::1", " "])
def test_an_address_that_is_none_is_named(host: str) -> None:
    with pytest.raises(StartError, match=r"^cannot listen on ") as error:
        listen(Settings(host=host, port=0))
    assert str(error.value).startswith(f"cannot listen on {host}:0: ")
    assert "\n" not in str(error.value)


def test_answers_are_not_held_back() -> None:
    """asyncio sets TCP_NODELAY only if the socket names its protocol. Without it, each answer took 40 ms longer."""
    with listen(Settings(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the program in this process, up to the checks of its arguments."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(arguments, code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--workers", "2"], "one process"),
        (["--port=80"], "environment"),
        (["convert", "a", "b"], "`stepwise convert SOURCE TARGET`"),
    ],
)
def test_there_are_no_other_arguments(run: Callable[..., Ended], arguments: list[str], named: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2
    assert named in ended.stderr


def test_version(run: Callable[..., Ended]) -> None:
    ended = run("--version")
    assert ended.returncode == 0
    assert ended.stdout == f"stepwise {service.__version__}\n"


def test_help_lists_every_setting_with_its_default(run: Callable[..., Ended]) -> None:
    ended = run("--help")
    assert ended.returncode == 0
    assert ended.stderr == ""
    parts = re.split(r"^  (STEPWISE_\w+) +", ended.stdout, flags=re.MULTILINE)
    described = dict(zip(parts[1::2], (" ".join(text.split()) for text in parts[2::2]), strict=True))
    assert described.keys() == {f"STEPWISE_{name.upper()}" for name in Settings.model_fields}
    defaults = {
        "WEIGHTS": "digits",
        "HOST": "127.0.0.1",
        "PORT": "8000",
        "SIZES": "the size that the weights were trained for",
        "DEVICE": "auto",
        "PRECISION": "auto",
        "THREADS": "the cores that this process may use",
        "MAX_BATCH": "32 on CUDA; on the CPU 1 to 16, fewer for larger networks",
        "MAX_IMAGES": "64",
        "MAX_QUEUE": "256",
        "MAX_BODY": "16 MiB",
        "TIMEOUT": "300",
        "DRAIN_TIMEOUT": "30",
        "KEEP_ALIVE": "75",
        "API_KEYS": "none",
        "PUBLIC_METRICS": "0",
        "ALLOW_PICKLE": "0",
        "CACHE_DIR": "stepwise in the user's cache folder",
        "METRICS_PORT": "none",
        "CORS_ORIGINS": "none",
        "ROOT_PATH": "none",
        "FORWARDED_ALLOW_IPS": "none",
        "RECOMMENDED": "what the weights' files tell",
        "RECIPE_PROMPTS": "1",
        "CHECK": "none",
    }
    assert described.keys() == {f"STEPWISE_{name}" for name in defaults}
    for name, default in defaults.items():
        assert f"default: {default}" in described[f"STEPWISE_{name}"]


def test_the_app_knows_nothing_of_torch() -> None:
    code = "import service.http.app, sys; sys.exit('torch' in sys.modules)"
    ended: Any = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE, check=False)
    assert ended.returncode == 0
