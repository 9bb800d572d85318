"""The process: how it starts, how it shares its time, how it leaves."""

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import service
from service.__main__ import listen, main
from service.config import Settings
from tests.servers import PATIENCE, ROOT, Json, ServerProcess, environment, problem, serving, write_npy
from tests.test_denoise import GREY, RGB

# Requests that are long by the number of their steps.
LONG = {"sampler": "ddpm", "num_inference_steps": 1000}


@contextmanager
def in_background(call: Callable[[], httpx.Response]) -> Iterator[Future[httpx.Response]]:
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(call)


def post(server: ServerProcess, body: Json) -> httpx.Response:
    """POST /sample on a connection of its own."""
    with server.new_client() as client:
        return client.post("/sample", json=body)


def wait_until_running(server: ServerProcess) -> None:
    server.wait_for_metric("stepwise_rows_running", lambda rows: rows > 0)


def wait_until_idle(server: ServerProcess) -> None:
    server.wait_for_metric("stepwise_rows_running", lambda rows: rows == 0)
    server.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 0)


def send_long(server: ServerProcess, num_images: int = 3) -> socket.socket:
    """A connection whose request runs for long."""
    body = b'{"sampler": "ddpm", "num_inference_steps": 1000, "num_images": %d}' % num_images
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
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


def test_a_failing_request_leaves_its_neighbours_alone(strict_server: ServerProcess) -> None:
    neighbour = {"seed": 1, "sampler": "ddpm", "num_inference_steps": 150}
    alone = post(strict_server, neighbour).content
    with in_background(lambda: post(strict_server, neighbour)) as answer:
        wait_until_running(strict_server)
        problem(post(strict_server, {"class_label": "dog", "num_inference_steps": 1}), 500)
    assert answer.result().content == alone


def test_a_full_queue_is_refused(strict_server: ServerProcess) -> None:
    with send_long(strict_server), send_long(strict_server):
        strict_server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > 3000)
        refused = post(strict_server, {})
        assert "queue" in problem(refused, 503)["detail"]
        assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
        assert strict_server.client.get("/health/ready").status_code == 200  # overload is not unreadiness
        assert (
            strict_server.client.get("/sample", headers={"If-None-Match": "*"}, params={"seed": 1}).status_code == 304
        )
        assert strict_server.client.head("/sample?seed=1").status_code == 200
    wait_until_idle(strict_server)
    assert post(strict_server, {}).status_code == 200


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
    """It used to be logged as one, with two stack traces."""
    form = {"Content-Type": "multipart/form-data; boundary=B", "Content-Length": "100", "X-Request-ID": "left-form"}
    with server.raw_request("POST", "/denoise", form, b"--B\r\n"):
        pass
    assert server.wait_for_line(lambda line: line.get("request_id") == "left-form")["status"] == 499
    body = {"Content-Type": "application/json", "Content-Length": "100", "X-Request-ID": "left-json"}
    with server.raw_request("POST", "/sample", body, b"{"):
        pass
    assert server.wait_for_line(lambda line: line.get("request_id") == "left-json")["status"] == 499


@pytest.mark.parametrize("timeout_s", [1e-6, 0.01])
def test_a_deadline_that_passes_is_a_504(server: ServerProcess, timeout_s: float) -> None:
    cancelled = server.metric("stepwise_cancelled_total", reason="timeout")
    response = post(server, {**LONG, "num_images": 64, "timeout_s": timeout_s})
    assert f"{timeout_s:g} s" in problem(response, 504)["detail"]
    samples = server.metrics()
    assert samples["stepwise_cancelled_total", frozenset({("reason", "timeout")})] == cancelled + 1
    assert samples["stepwise_rows_running", frozenset()] == 0
    assert samples["stepwise_outstanding_row_steps", frozenset()] == 0
    assert post(server, {}).status_code == 200


# Leaving.


def test_sigterm_lets_what_runs_finish(weights: Path) -> None:
    body = {**LONG, "seed": 1, "num_images": 2}
    with serving(WEIGHTS=weights / "grey", MAX_BATCH=2, DRAIN_TIMEOUT=PATIENCE) as server:
        with in_background(lambda: post(server, body)) as running:
            wait_until_running(server)
            server.terminate()
            server.wait_for_line(lambda line: "draining" in line["message"])
            with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:  # it still listens
                unready = client.get("/health/ready")
                assert unready.status_code == 503
                assert unready.json()["status"] == "draining"
                assert client.get("/health").json()["status"] == "draining"
                assert client.get("/health/live").status_code == 200
                for refused in (
                    client.post("/sample", json={}),
                    client.get("/sample"),
                    client.post("/denoise", files={"image": write_npy(GREY)}, data={"timestep": "5"}),
                ):
                    problem(refused, 503)
                    assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
                server.terminate()  # changes nothing
                assert client.get("/health/live").status_code == 200
            assert not running.done()
            assert running.result().status_code == 200
        while server.process.poll() is None:  # nor does another, at any time
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.process.wait(0.02)
        assert server.wait() == 0
    assert [line for line in server.lines if line["level"] == "error"] == []


def test_sigterm_waits_no_longer_than_the_drain_timeout(weights: Path) -> None:
    with serving(WEIGHTS=weights / "grey", MAX_BATCH=2, DRAIN_TIMEOUT=0.1) as server:
        half = {"Content-Type": "application/json", "Content-Length": "100"}
        with (
            server.raw_request("POST", "/sample", half, b"{") as never_sent,
            in_background(lambda: post(server, {**LONG, "num_images": 64})) as running,
        ):
            wait_until_running(server)
            server.terminate()
            refused = running.result()
            assert "shut down" in problem(refused, 503)["detail"]
            assert refused.headers["retry-after"]
            assert server.wait() == 0
            assert never_sent.recv(20).startswith(b"HTTP/1.1 503")


def test_ctrl_c_twice_waits_for_nobody(weights: Path) -> None:
    with serving(WEIGHTS=weights / "grey", MAX_BATCH=2, DRAIN_TIMEOUT=PATIENCE) as server:
        with in_background(lambda: post(server, {**LONG, "num_images": 64})) as running:
            wait_until_running(server)
            server.process.send_signal(signal.SIGINT)
            server.wait_for_line(lambda line: "draining" in line["message"])
            server.process.send_signal(signal.SIGINT)
            problem(running.result(), 503)
        assert server.wait() == 0
    assert [line for line in server.lines if line["level"] == "error"] == []


# Starting.

Ended = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def starts(weights: Path, taken_port: int, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """How starts that cannot succeed end, by name. They run side by side."""
    grey = weights / "grey"
    broken = tmp_path_factory.mktemp("broken")
    (broken / "config.json").write_bytes((grey / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((grey / "model.safetensors").read_bytes()[:-1000])
    settings: dict[str, dict[str, object]] = {
        "bad settings": {"WEIGHTS": grey, "PORT": "http", "TIMEOUT": -1, "PRECISION": "int8", "DEVICE": "tpu"},
        "no weights": {"WEIGHTS": weights / "nothing"},
        "broken weights": {"WEIGHTS": broken},
        "a taken port": {"WEIGHTS": grey, "PORT": taken_port},
        "no cuda": {"WEIGHTS": grey, "DEVICE": "cuda"},
    }
    environments = {name: environment(**values) for name, values in settings.items()}
    environments["workers"] = {**environment(WEIGHTS=grey), "WEB_CONCURRENCY": "2"}

    def run(env: dict[str, str]) -> Ended:
        return subprocess.run(
            [sys.executable, "-m", "service"],
            cwd=ROOT,
            env={**env, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(environments, pool.map(run, environments.values()), strict=True))


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (
            "bad settings",
            ["STEPWISE_PORT=http", "STEPWISE_TIMEOUT=-1", "STEPWISE_PRECISION=int8", "STEPWISE_DEVICE=tpu"],
        ),
        ("no weights", ["STEPWISE_WEIGHTS=", "nothing", "in the box"]),
        ("broken weights", ["model.safetensors", "cannot be read"]),
        ("a taken port", ["127.0.0.1", "in use"]),
        ("no cuda", ["STEPWISE_DEVICE=cuda", "no CUDA device"]),
        ("workers", ["WEB_CONCURRENCY=2", "one process"]),
    ],
)
def test_what_cannot_start_says_why_in_one_line(starts: dict[str, Ended], name: str, named: list[str]) -> None:
    ended = starts[name]
    assert ended.returncode not in (0, -15)
    assert len(ended.stderr.strip().splitlines()) == 1
    assert ended.stderr.startswith("stepwise: ")
    assert all(words in ended.stderr for words in named)
    assert "Traceback" not in ended.stdout + ended.stderr


def test_answers_are_not_held_back() -> None:
    """asyncio sets TCP_NODELAY only where a socket names its protocol; without, each answer took 40 ms longer."""
    with listen(Settings(port=0)) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_a_taken_port_is_named(starts: dict[str, Ended], taken_port: int) -> None:
    assert f"127.0.0.1:{taken_port}" in starts["a taken port"].stderr


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the program in this process, up to what its arguments alone decide."""

    def run(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["service", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        assert isinstance(code, int)
        return Ended(arguments, code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(("arguments", "named"), [(["--workers", "2"], "one process"), (["--port=80"], "environment")])
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
        "DEVICE": "auto",
        "PRECISION": "auto",
        "THREADS": "the cores that this process may use",
        "MAX_BATCH": "32 on CUDA; on the CPU 1 to 8, fewer for larger networks",
        "MAX_IMAGES": "64",
        "MAX_QUEUE": "256",
        "MAX_BODY": "16 MiB",
        "TIMEOUT": "300",
        "DRAIN_TIMEOUT": "30",
        "API_KEYS": "none",
        "ALLOW_PICKLE": "0",
        "CACHE_DIR": "stepwise in the user's cache folder",
        "CORS_ORIGINS": "none",
        "ROOT_PATH": "none",
        "FORWARDED_ALLOW_IPS": "none",
    }
    assert described.keys() == {f"STEPWISE_{name}" for name in defaults}
    for name, default in defaults.items():
        assert f"default: {default}" in described[f"STEPWISE_{name}"]


def test_the_app_knows_nothing_of_torch() -> None:
    code = "import service.app, sys; sys.exit('torch' in sys.modules)"
    ended: Any = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=PATIENCE, check=False)
    assert ended.returncode == 0
