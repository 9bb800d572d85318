"""Health, metrics, /info, the documentation, errors, keys and logs on running servers, as API.md specifies them."""

import asyncio
import base64
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest

import service
from model.samplers import SAMPLERS
from service.http import app
from service.plan.entries import table
from service.plan.fields import SampleRequest
from service.plan.micro_conditions import NOTHING
from tests.engines import PROBE, PROBE_SEED, FakeRunner, a_setting
from tests.latents import LatentServer, serving_latents
from tests.local import FakeServer, locally, no_complaints, serving_fake
from tests.servers import PATIENCE, Json, Reachable, ServerProcess, problem, serving, write_npy
from tests.test_denoise import GREY, JSON

# Health.


def test_a_server_that_would_serve_is_ready(server: ServerProcess) -> None:
    for path in ("/health/ready", "/health"):
        response = server.client.get(path)
        assert response.status_code == 200
        assert response.json()["status"] == "ready"
        assert response.headers["cache-control"] == "no-store"
        assert server.client.head(path).status_code == 200
    assert server.client.get("/health/live").status_code == 200


def health(server: Reachable) -> tuple[int, int, str]:
    """The status codes of /health/live and /health/ready, and the status that the latter names."""
    live, ready = (server.client.get(f"/health/{path}") for path in ("live", "ready"))
    assert live.json() == {"status": "live" if live.status_code == 200 else "failed"}
    assert ready.json().keys() == {"status", "model", "version"}
    assert ("retry-after" in ready.headers) is (ready.status_code == 503)
    return live.status_code, ready.status_code, ready.json()["status"]


def refused(response: httpx.Response) -> str:
    """The detail of a 503 with Retry-After."""
    assert re.fullmatch(r"[1-9]\d*", response.headers["retry-after"])
    detail: str = problem(response, 503)["detail"]
    return detail


def test_while_the_model_is_loaded_the_server_is_alive_and_unready() -> None:
    runner = FakeRunner({1: 1.0, 2: 1.0})
    runner.hold()
    server = FakeServer(runner)
    with no_complaints(), locally(server):
        runner.next_pass()
        assert health(server) == (200, 503, "loading")
        for path, headers in (("/sample", {}), ("/sample", {"Accept": "text/event-stream"})):
            assert "being loaded" in refused(server.client.post(path, json={}, headers=headers))
        assert server.client.get("/sample?seed=1", headers={"If-None-Match": "*"}).status_code == 304
        assert server.client.get("/info").json()["seconds_per_step"] == {}
        assert server.metric("stepwise_refused_total", reason="loading") == 2
        assert server.metric("stepwise_rows_running") == 0
        runner.let_go()
        assert server.engine.wait_loaded(PATIENCE)
        assert health(server) == (200, 200, "ready")
        assert server.client.post("/sample", json={}).status_code == 200


def test_what_decoding_costs_is_not_known_while_the_model_is_loaded() -> None:
    server = LatentServer()
    server.runner.hold()
    with no_complaints(), locally(server):
        server.runner.next_pass()
        assert server.client.get("/info").json()["seconds_per_decode"] == {}
        server.runner.let_go()
        assert server.engine.wait_loaded(PATIENCE)


def test_a_pass_that_does_not_return_fails_all_that_waits_and_the_server() -> None:
    with serving_fake() as server, ThreadPoolExecutor(2) as pool:
        server.runner.hold()
        running = pool.submit(server.client.post, "/sample", json={})
        server.runner.next_pass()
        waiting = pool.submit(server.client.get, "/sample?seed=1")
        server.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 1)
        server.runner.clock.now += 31
        for answer in (running, waiting):
            assert "does not return" in refused(answer.result())
        assert health(server) == (503, 503, "failed")
        assert "does not return" in refused(server.client.post("/sample", json={}))
        assert server.metric("stepwise_refused_total", reason="failed") == 1
        assert server.metric("stepwise_cancelled_total", reason="failed") == 2
        server.runner.let_go()  # the pass returns after all
        server.wait_for_metric("stepwise_step_seconds_count", lambda passes: passes == 1)
        assert health(server) == (200, 200, "ready")
        assert server.client.post("/sample", json={}).status_code == 200


def wait_for_health(server: Reachable, wanted: tuple[int, int, str]) -> None:
    """Poll the health endpoints, as balancers do."""
    for _ in range(20_000):
        if (found := health(server)) == wanted:
            return
    raise AssertionError(f"the health stays {found}")


def test_an_engine_that_died_is_told_and_then_the_server_ends() -> None:
    runner = FakeRunner({1: 1.0, 2: 1.0})
    with serving_fake(runner) as server:
        runner.unreleased = {13}
        assert "has stopped" in refused(server.client.post("/sample", json={"seed": 13}))
        assert health(server) == (503, 503, "failed")
        assert "has stopped" in refused(server.client.post("/sample", json={}))
        assert server.metric("stepwise_cancelled_total", reason="failed") == 1
        assert server.metric("stepwise_refused_total", reason="failed") == 1
        server.wait()


def test_a_device_that_works_no_longer_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_EVERY", 0.05)
    with serving_fake() as server:
        server.runner.breaking = {7, PROBE_SEED}
        problem(server.client.post("/sample", json={"seed": 7}), 500)
        assert server.metric("stepwise_pass_failures_total") >= 2  # with others, then alone; probes may follow
        wait_for_health(server, (503, 503, "failed"))
        assert "has stopped" in refused(server.client.post("/sample", json={}))
        server.wait()


def test_a_server_is_unready_while_its_probes_fail_and_serves_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_EVERY", PATIENCE)  # only the test checks the engine
    with serving_fake() as server:
        server.runner.breaking = {7, PROBE_SEED}
        problem(server.client.post("/sample", json={"seed": 7}), 500)
        assert health(server) == (200, 200, "ready")  # the request itself may be the cause
        assert server.engine.probe().exception(PATIENCE)
        server.engine.check_health()
        assert health(server) == (200, 503, "failed")
        server.runner.breaking = {7}
        assert server.client.post("/sample", json={"seed": 1}).status_code == 200
        assert health(server) == (200, 200, "ready")


@pytest.mark.parametrize("fault", ["breaking", "poisoned", "refused", "unreadable"])
def test_requests_that_fail_make_no_server_unready(fault: str) -> None:
    with serving_fake() as server:
        for seed in range(1, 40):
            setattr(server.runner, fault, {seed})
            problem(server.client.post("/sample", json={"seed": seed}), 500)
            assert health(server) == (200, 200, "ready")


def test_a_server_that_was_idle_runs_one_probe_however_many_ask() -> None:
    """All of them are answered at once, from the known state."""
    with serving_fake() as server:
        passes = len(server.runner.passes)
        assert health(server) == (200, 200, "ready")
        assert len(server.runner.passes) == passes
        server.runner.hold()
        server.runner.clock.now += 21
        for _ in range(250):
            assert health(server) == (200, 200, "ready")
        assert server.runner.next_pass() == PROBE
        for _ in range(250):
            assert health(server) == (200, 200, "ready")
        server.runner.let_go()
        assert server.engine.wait_idle(PATIENCE)
        assert health(server) == (200, 200, "ready")
        assert len(server.runner.passes) == passes + 1
        assert server.metric("stepwise_images_total") == 0  # the probe's image does not count
        assert server.metric("stepwise_promises_total", outcome="kept") == 0


def test_a_server_whose_passes_take_long_is_ready_idle_and_busy() -> None:
    """A pass takes 12 s, longer than any balancer waits for a health check."""
    with serving_fake(FakeRunner({1: 12.0})) as server, ThreadPoolExecutor(1) as pool:
        server.runner.hold()
        answer = pool.submit(server.client.post, "/sample", json={"num_inference_steps": 3})
        for _ in range(3):
            server.runner.next_pass()
            for _ in range(10):
                assert health(server) == (200, 200, "ready")
                server.runner.clock.now += 1.2
        server.runner.let_go()
        assert answer.result().status_code == 200
        server.runner.hold()
        for _ in range(30):
            assert health(server) == (200, 200, "ready")
            server.runner.clock.now += 12
        assert server.runner.next_pass() == PROBE
        assert health(server) == (200, 200, "ready")


def test_a_server_goes_on_looking_after_its_engine_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_EVERY", 0.05)
    with serving_fake() as server, monkeypatch.context() as patch:
        looked = threading.Semaphore(0)

        def fail() -> None:
            looked.release()
            raise RuntimeError("a mistake in the watch")

        patch.setattr(server.engine, "check_health", fail)
        for _ in range(2):
            assert looked.acquire(timeout=PATIENCE)
        patch.undo()
        server.runner.hold()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(server.client.post, "/sample", json={})
            server.runner.next_pass()
            server.runner.clock.now += 31
            assert "does not return" in refused(running.result())


def test_a_process_that_stood_still_gives_its_passes_until_the_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second check is skipped, as if all were late."""
    monkeypatch.setattr(app, "_EVERY", 0)
    monkeypatch.setattr(app, "_LATE", -1)
    looks: list[int] = []

    async def watch() -> None:
        watching = asyncio.create_task(app._watch(engine))
        for turn in range(8):
            before = len(looks)
            await asyncio.sleep(0)
            looks[before:] = [turn] * (len(looks) - before)
        watching.cancel()

    engine = a_setting(FakeRunner({1: 1.0})).engine
    monkeypatch.setattr(engine, "check_health", lambda: looks.append(-1))
    asyncio.run(watch())
    assert len(looks) >= 3
    assert all(later - earlier == 2 for earlier, later in pairwise(looks))


# Metrics.

LABELS: dict[str, dict[str, set[str]]] = {
    "stepwise_cancelled_total": {"reason": {"disconnect", "timeout", "failed", "refused", "draining"}},
    "stepwise_refused_total": {"reason": {"impossible", "late", "share", "full", "loading", "draining", "failed"}},
    "stepwise_promises_total": {"outcome": {"kept", "missed"}},
    "stepwise_engine_seconds_total": {"phase": {"idle", "schedule", "admit", "pass", "advance"}},
    "stepwise_stage_seconds_total": {"stage": {"encode", "decode", "check", "answer"}},
    "stepwise_stage_failures_total": {"stage": {"encode", "decode", "check", "answer"}},
    "stepwise_texts_total": {"source": {"encoder", "cache"}},
    "stepwise_checks_total": {"outcome": {"passed", "refused", "failed"}},
}
NAMES = {
    **{name: set(labels) for name, labels in LABELS.items()},
    "stepwise_requests_total": {"endpoint", "code"},
    "stepwise_request_seconds_count": {"endpoint"},
    "stepwise_request_seconds_sum": {"endpoint"},
    "stepwise_queue_seconds_count": set(),
    "stepwise_denoise_seconds_count": set(),
    "stepwise_encode_seconds_count": set(),
    "stepwise_images_total": set(),
    "stepwise_rows_running": set(),
    "stepwise_rows_waiting": set(),
    "stepwise_backlog_seconds": set(),
    "stepwise_outstanding_row_steps": set(),
    "stepwise_step_seconds_count": set(),
    "stepwise_step_cost_seconds": {"rows", "size"},
    "stepwise_batch_rows_count": set(),
    "stepwise_accepted_total": set(),
    "stepwise_preemptions_total": set(),
    "stepwise_pass_failures_total": set(),
    "stepwise_eta_error_ratio_count": set(),
}


def test_every_metric_is_there(server: ServerProcess) -> None:
    server.client.post("/sample", json={})
    samples = server.metrics()
    for name, labels in NAMES.items():
        assert any(sample == name and {key for key, _ in pairs} == labels for sample, pairs in samples), name
    assert all(name.startswith(("stepwise_", "process_")) for name, _ in samples)
    assert samples["process_resident_memory_bytes", frozenset()] > 0
    assert server.client.get("/metrics").headers["content-type"].startswith("text/plain; version=")


def test_the_backlog_is_the_seconds_of_work_that_is_left() -> None:
    with serving_fake() as server:
        assert server.metric("stepwise_backlog_seconds") == pytest.approx(0)
        server.runner.hold()
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(server.client.post, "/sample", json={"num_images": 4, "num_inference_steps": 6})
            server.runner.next_pass()  # of a second, on the runner's clock
            server.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 0)
            assert 4 <= server.metric("stepwise_backlog_seconds") <= 6
            server.runner.let_go()
            assert asked.result().status_code == 200
        server.wait_for_metric("stepwise_backlog_seconds", lambda seconds: abs(seconds) < 1e-6)


def test_every_label_is_there_from_the_start() -> None:
    with serving_fake() as server:
        samples = server.metrics()
    for name, labels in LABELS.items():
        for label, values in labels.items():
            assert {dict(pairs)[label] for sample, pairs in samples if sample == name} == values
    assert not any(value for (name, _), value in samples.items() if name in LABELS and "engine" not in name)


def test_model_info_tells_the_model(server: ServerProcess) -> None:
    info = server.client.get("/info").json()
    [labels] = [dict(pairs) for name, pairs in server.metrics() if name == "stepwise_model_info"]
    assert labels["name"] == "grey"
    assert labels["digest"] == info["model"]["digest"]
    assert labels["fingerprint"] == info["fingerprint"]


def test_metrics_count_what_was_asked(server: ServerProcess) -> None:
    def read() -> list[float]:
        samples = server.metrics()
        return [
            samples.get((name, frozenset(labels)), 0.0)
            for name, labels in (
                ("stepwise_images_total", []),
                ("stepwise_requests_total", [("endpoint", "/sample"), ("code", "200")]),
                ("stepwise_requests_total", [("endpoint", "/sample"), ("code", "422")]),
                ("stepwise_request_seconds_count", [("endpoint", "/sample")]),
                ("stepwise_queue_seconds_count", []),
                ("stepwise_step_seconds_count", []),
                ("stepwise_batch_rows_sum", []),
            )
        ]

    before = read()
    for _ in range(2):
        server.client.post("/sample", json={"num_images": 3, "num_inference_steps": 2, "class_label": 0})
    server.client.post("/sample", json={"num_images": 0})
    images, answered, refused, timed, queued, passes, rows = (b - a for a, b in zip(before, read(), strict=True))
    assert (images, answered, refused, timed, queued) == (6, 2, 1, 3, 2)
    assert rows == 2 * 3 * 2 * 2  # requests, images, steps, and two forward rows with guidance
    assert rows / 4 <= passes < rows


def changes(server: Reachable, act: Callable[[], object]) -> dict[str, float]:
    """The changes of samples during a call, by name with the values of the labels."""
    before = server.metrics()
    act()
    return {
        " ".join([name.removeprefix("stepwise_"), *(value for _, value in sorted(labels))]): value
        - before[name, labels]
        for (name, labels), value in server.metrics().items()
        if name.startswith("stepwise_") and (name, labels) in before and value != before[name, labels]
        if not name.endswith(("_bucket", "_created"))
    }


def test_a_request_moves_its_metrics() -> None:
    """Three images of four steps each. A pass has four rows, and takes a second."""
    with serving_fake() as server:
        moved = changes(server, lambda: server.client.post("/sample", json={"num_images": 3, "class_label": 1}))
        assert moved.pop("promises_total kept") == 1
        assert moved.pop("eta_error_ratio_sum") < 0.01  # the estimate was right, but for the encoding
        assert {name: count for name, count in moved.items() if "request" not in name} == {
            "accepted_total": 1,
            "images_total": 3,
            "queue_seconds_count": 1,
            "denoise_seconds_count": 1,
            "denoise_seconds_sum": 4,
            "encode_seconds_count": 1,
            "step_seconds_count": 4,
            "step_seconds_sum": 4,
            "batch_rows_count": 4,
            "batch_rows_sum": 12,
            "engine_seconds_total pass": 4,
            "eta_error_ratio_count": 1,
        }
        costs = {dict(pairs)["rows"]: value for (name, pairs), value in server.metrics().items() if "step_cost" in name}
        assert costs == {"1": 1.0, "2": 1.0, "4": 1.0}
        assert server.client.get("/info").json()["seconds_per_step"] == costs


def test_a_stream_moves_the_same_metrics() -> None:
    with serving_fake() as server:
        events = {"Accept": "text/event-stream"}
        moved = changes(server, lambda: server.client.post("/sample", json={}, headers=events))
        assert (moved["images_total"], moved["encode_seconds_count"], moved["promises_total kept"]) == (1, 1, 1)
        server.runner.poisoned = {7}
        moved = changes(server, lambda: server.client.post("/sample", json={"seed": 7}, headers=events))
        assert moved["cancelled_total failed"] == 1
        assert not moved.keys() & {"images_total", "encode_seconds_count", "promises_total kept"}


def test_a_promise_that_is_missed_and_a_bad_estimate_are_counted() -> None:
    with serving_fake() as server, ThreadPoolExecutor(1) as pool:

        def act() -> None:
            server.runner.hold()
            answer = pool.submit(server.client.post, "/sample", json={})
            server.runner.next_pass()
            server.runner.clock.now += 16  # 20 s instead of 4 s
            server.runner.let_go()
            assert answer.result().status_code == 200

        moved = changes(server, act)
        assert moved["promises_total missed"] == 1
        assert moved["eta_error_ratio_sum"] == pytest.approx(16 / 20, rel=0.01)
        assert moved["engine_seconds_total pass"] == 20
        assert "promises_total kept" not in moved


def test_an_image_that_has_to_wait_for_shorter_ones_is_counted() -> None:
    with serving_fake() as server, ThreadPoolExecutor(2) as pool:

        def act() -> None:
            server.runner.hold()
            answers = [pool.submit(server.client.post, "/sample", json={"seed": 1, "num_inference_steps": 50})]
            assert server.runner.next_pass() == [(1, 0)]
            answers.append(pool.submit(server.client.post, "/sample", json={"num_images": 4, "num_inference_steps": 1}))
            server.wait_for_metric("stepwise_rows_waiting", lambda rows: rows == 4)
            assert len(server.runner.next_pass()) == 4
            server.runner.let_go()
            assert [answer.result().status_code for answer in answers] == [200, 200]

        assert changes(server, act)["preemptions_total"] == 1


def test_the_engines_time_is_told_by_what_it_does(server: ServerProcess) -> None:
    moved = changes(server, lambda: server.client.post("/sample", json={"num_images": 8}))
    phases = {name.split()[1]: seconds for name, seconds in moved.items() if name.startswith("engine_seconds_total")}
    assert phases.keys() == LABELS["stepwise_engine_seconds_total"]["phase"]
    assert min(phases.values()) > 0
    assert phases["pass"] == max(phases[phase] for phase in phases if phase != "idle")


def test_paths_that_are_nowhere_share_one_label(server: ServerProcess) -> None:
    before = server.metric("stepwise_requests_total", endpoint="other", code="404")
    for path in ("/nowhere", "/nowhere/else"):
        server.client.get(path)
    assert server.metric("stepwise_requests_total", endpoint="other", code="404") == before + 2


def test_nothing_runs_when_nothing_is_asked(server: ServerProcess) -> None:
    server.wait_until_idle()


# /info.


def test_info_of_latent_diffusion() -> None:
    with serving_latents() as latents:
        info = latents.client.get("/info").json()
        document = latents.client.get("/openapi.json").json()
    assert (info["image_shape"], info["latent_shape"]) == ([3, 2, 4], [1, 1, 2])
    costs = {name: info[name] for name in ("seconds_per_step", "seconds_per_decode")}
    assert info["sizes"] == [{"width": 4, "height": 2, **costs}]
    assert info["first_stage"] == {"kind": "kl", "factor": 2, "scaling_factor": 0.5, "num_parameters": 7}
    assert info["preview"] == "linear"
    assert info["seconds_per_decode"] == {"1": 1.0, "4": 2.0}
    described = document["paths"]["/info"]["get"]["responses"]["200"]["content"][JSON]["schema"]
    assert set(described["required"]) == described["properties"].keys() == info.keys()


def test_info_of_pixels_has_no_latents(server: ServerProcess) -> None:
    info = server.client.get("/info").json()
    assert [info[name] for name in ("latent_shape", "first_stage", "preview", "seconds_per_decode")] == [None] * 4


def test_info_has_all_facts(server: ServerProcess, weights: Path) -> None:
    info = server.client.get("/info").json()
    config = json.loads((weights / "grey" / "config.json").read_text())
    assert info["version"] == service.__version__
    assert info["model"]["name"] == "grey"
    assert re.fullmatch(r"[0-9a-f]{64}", info["model"]["digest"])
    assert info["model"]["architecture"] == "diffusion_unet"
    assert info["prediction_type"] == "v_prediction"
    assert info["num_train_timesteps"] == 1000
    assert info["image_shape"] == [1, 16, 16]
    [size] = info["sizes"]
    assert (size["width"], size["height"], size["seconds_per_decode"]) == (16, 16, None)
    assert size["seconds_per_step"].keys() == info["seconds_per_step"].keys()
    assert info["num_classes"] == 3
    assert info["class_names"] == ["cat", "dog", "7"]
    assert info["samplers"] == list(SAMPLERS)
    assert info["sigma_schedules"]["heun"] == ["karras", "exponential", "normal"]
    assert {*info["sigma_schedules"]} == {name for name, sampler in SAMPLERS.items() if sampler.sigma_schedules}
    assert info["num_inference_steps"] is None
    assert info["recommended"] == {**config["recommended"], "timesteps": None}
    assert info["device"] == "cpu"
    assert info["backend"]
    assert info["precision"] == "float32"
    assert re.fullmatch(r"[0-9a-f]{8,64}", info["fingerprint"])
    assert info["fingerprint_parts"]["weights"] == info["model"]["digest"]
    assert info["fingerprint_parts"]["precision"] == info["precision"]
    assert info["reproducible"] is True
    assert info["seconds_per_step"]
    assert all(int(width) >= 1 and seconds > 0 for width, seconds in info["seconds_per_step"].items())


def test_info_of_a_model_without_classes(rgb_server: ServerProcess) -> None:
    info = rgb_server.client.get("/info").json()
    assert info["num_classes"] is None
    assert info["class_names"] is None
    assert info["image_shape"] == [3, 8, 16]
    assert info["recommended"] == {
        "sampler": "ddim",
        "num_inference_steps": 5,
        "guidance_scale": 1.0,
        "timesteps": None,
    }


def test_the_limits_of_info_are_the_settings(server: ServerProcess, strict_server: ServerProcess) -> None:
    assert server.client.get("/info").json()["limits"] == {
        "max_images": 64,
        "max_batch": 4,
        "max_queue": 256,
        "max_body": 16 * 2**20,
        "timeout_s": 300.0,
    }
    assert strict_server.client.get("/info").json()["limits"] == {
        "max_images": 3,
        "max_batch": 2,
        "max_queue": 4,
        "max_body": 20_000,
        "timeout_s": 250.0,
    }


def test_runtimes_that_differ_have_other_fingerprints(
    server: ServerProcess, rgb_server: ServerProcess, strict_server: ServerProcess
) -> None:
    infos = [where.client.get("/info").json() for where in (server, rgb_server, strict_server)]
    assert len({info["fingerprint"] for info in infos}) == 3
    assert len({info["model"]["digest"] for info in infos}) == 3


def test_limits_follow_the_settings(strict_server: ServerProcess) -> None:
    post = strict_server.client.post
    assert "1 to 3, and is 4" in problem(post("/sample", json={"num_images": 4}), 422)["detail"]
    assert "at most 250, and is 251" in problem(post("/sample", json={"timeout_s": 251}), 422)["detail"]
    assert post("/sample", json={"num_images": 3, "num_inference_steps": 1}).status_code == 200


# The documentation.


def test_the_documentation_needs_no_other_host(server: ServerProcess) -> None:
    page = server.client.get("/docs")
    assert page.status_code == 200
    assert page.headers["content-type"].startswith("text/html")
    assert re.search(r"https?://|[\"']//", page.text) is None
    assets = set(re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']", page.text))
    [description] = re.findall(r"url: [\"']([^\"']+)[\"']", page.text)
    assert len(assets) >= 3
    for asset in [*assets, description]:
        answer = server.client.get(urljoin("/docs", asset))
        assert answer.status_code == 200
        assert answer.content
    assert server.client.get(urljoin("/docs", description)).json() == server.client.get("/openapi.json").json()


def test_the_documentation_is_found_behind_a_proxy(strict_server: ServerProcess) -> None:
    """The page's references have the proxy's prefix, which the proxy strips."""
    page = strict_server.client.get("/docs").text
    paths = re.findall(r"(?:src|href)=[\"']([^\"']+)[\"']", page) + re.findall(r"url: [\"']([^\"']+)[\"']", page)
    assert len(paths) >= 4
    for path in paths:
        assert path.startswith("/under/")
        assert strict_server.client.get(path.removeprefix("/under")).status_code == 200
    assert strict_server.client.get("/openapi.json").json()["servers"] == [{"url": "/under"}]
    asked = strict_server.metric("stepwise_requests_total", endpoint="/info", code="200")
    strict_server.client.get("/info")
    assert strict_server.metric("stepwise_requests_total", endpoint="/info", code="200") == asked + 1


def test_the_playground_leads_to_the_documentation(server: ServerProcess) -> None:
    links = re.findall(r'href="([^"#]+)"', server.client.get("/").text)
    assert {"docs", "info"} <= set(links)
    for link in links:
        assert server.client.get(urljoin("/", link)).status_code == 200


def references(value: Any) -> list[str]:
    """All `$ref` values in a document."""
    if isinstance(value, dict):
        own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
        return own + [reference for item in value.values() for reference in references(item)]
    if isinstance(value, list):
        return [reference for item in value for reference in references(item)]
    return []


@pytest.fixture(scope="module")
def description(server: ServerProcess) -> Json:
    document: Json = server.client.get("/openapi.json").json()
    return document


A1111 = (
    *("embeddings", "img2img", "interrupt", "latent-upscale-modes", "loras", "options", "progress", "samplers"),
    *("schedulers", "sd-models", "sd-modules", "sd-vae", "txt2img", "upscalers"),
)


def test_every_route_is_described(description: Json) -> None:
    assert description["openapi"].startswith("3.")
    assert description["info"]["version"] == service.__version__
    paths = description["paths"]
    assert paths.keys() == {
        "/sample",
        "/denoise",
        "/noise",
        *(f"/sdapi/v1/{name}" for name in A1111),
        "/v1/images/edits",
        "/v1/images/generations",
        "/v1/models",
        "/v1/models/{model}",
        "/health/live",
        "/health/ready",
        "/health",
        "/metrics",
        "/info",
    }
    assert paths["/sample"].keys() == {"get", "post"}
    operations = [operation for methods in paths.values() for operation in methods.values()]
    identifiers = [operation["operationId"] for operation in operations]
    assert len(set(identifiers)) == len(identifiers)
    assert all(operation["summary"] for operation in operations)
    for reference in references(description):
        assert reference.startswith("#/")
        target = description
        for key in reference[2:].split("/"):
            target = target[key]


def test_every_field_is_described(description: Json) -> None:
    paths = description["paths"]
    content = paths["/sample"]["post"]["requestBody"]["content"]
    sample, form = content["application/json"]["schema"], content["multipart/form-data"]["schema"]
    fields, files = table(SampleRequest).keys(), {"image", "mask_image"}
    assert sample["properties"].keys() == fields | files
    for schema in (sample, form):
        assert "required" not in schema
        assert schema["additionalProperties"] is False
    parameters = paths["/sample"]["get"]["parameters"]
    of_others = {"prompt", "negative_prompt", *NOTHING}  # this model takes only null, which no text can express
    assert {parameter["name"] for parameter in parameters} == {*fields, "model"} - of_others
    assert form["properties"].keys() == {*fields, *files} - of_others
    assert all(parameter["in"] == "query" for parameter in parameters)
    denoise = {"image", "value_range", "timestep", "scaling", "num_inference_steps", "output"}
    denoise |= {"sampler", "eta", "seed", "class_label", "guidance_scale", "guidance_interval", "timeout_s"}
    denoise |= {"guidance_rescale", "clip_skip", *of_others}
    for path, names in (("/denoise", denoise), ("/noise", {"image", "value_range", "timestep", "seed", "scaling"})):
        content = paths[path]["post"]["requestBody"]["content"]
        assert content.keys() == {"multipart/form-data", "application/json"}
        for media_type, body in content.items():
            assert body["schema"]["properties"].keys() == (names if media_type == JSON else names - of_others)
            assert set(body["schema"]["required"]) == {"image", "timestep"}
    for schema in (sample, form, *(body["schema"] for body in content.values())):
        assert all(field["description"] for field in schema["properties"].values())


PICTURES = ("image/png", "image/webp", "image/jpeg")


@pytest.mark.parametrize(
    ("path", "method", "media_types", "codes"),
    [
        (
            "/sample",
            "post",
            {*PICTURES, "application/json", "application/zip", "application/x-npy", "text/event-stream"},
            {401, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504},
        ),
        (
            "/sample",
            "get",
            {*PICTURES, "application/json", "application/zip", "application/x-npy", "text/event-stream"},
            {304, 401, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504},
        ),
        (
            "/denoise",
            "post",
            {*PICTURES, "application/json", "application/x-npy", "text/event-stream"},
            {401, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504},
        ),
        ("/noise", "post", {"image/png", "application/x-npy"}, {401, 406, 408, 413, 415, 422, 429, 431, 500, 503, 504}),
        ("/health/live", "get", {"application/json"}, {503}),
        ("/health/ready", "get", {"application/json"}, {503}),
        ("/health", "get", {"application/json"}, {503}),
        ("/metrics", "get", {"text/plain"}, {401}),
        ("/info", "get", {"application/json"}, {401}),
    ],
)
def test_every_answer_is_described(
    description: Json, path: str, method: str, media_types: set[str], codes: set[int]
) -> None:
    responses = description["paths"][path][method]["responses"]
    assert {int(code) for code in responses} == codes | {200}
    assert responses["200"]["content"].keys() == media_types
    for code in codes - {304, 503}:
        assert responses[str(code)]["content"].keys() == {"application/problem+json"}


def fields_of(server: Reachable, path: str, media_type: str = JSON) -> Json:
    """The documented fields of a path's body."""
    document = server.client.get("/openapi.json").json()
    fields: Json = document["paths"][path]["post"]["requestBody"]["content"][media_type]["schema"]["properties"]
    return fields


def test_the_limits_of_the_model_are_described(server: ServerProcess, rgb_server: ServerProcess) -> None:
    grey, rgb = fields_of(server, "/sample"), fields_of(rgb_server, "/sample")
    names = list(SAMPLERS)
    assert grey["sampler"]["anyOf"] == [{"type": "string", "enum": names}, {"type": "null"}]
    assert [one["num_inference_steps"]["anyOf"][0]["maximum"] for one in (grey, rgb)] == [1000, 20]
    index, text, *others = grey["class_label"]["anyOf"]
    assert (index["minimum"], index["maximum"]) == (0, 2)
    assert text["enum"] == ["cat", "dog", "7", "0", "1", "2"]
    assert others[0] == {"type": "null"}
    assert others[1]["maxItems"] == grey["num_images"]["maximum"] == 64
    seconds = grey["timeout_s"]["anyOf"][0]
    assert (seconds["exclusiveMinimum"], seconds["maximum"]) == (0, 300)
    assert rgb["class_label"]["anyOf"][0] == {"type": "null"}
    assert rgb["guidance_scale"]["anyOf"][0]["maximum"] == 1  # guidance needs a label
    interval, _ = grey["guidance_interval"]["anyOf"]
    assert (interval["minItems"], interval["maxItems"]) == (2, 2)
    assert (interval["items"]["minimum"], interval["items"]["maximum"]) == (0, 1)
    assert rgb["guidance_interval"]["anyOf"] == [{"type": "null"}]
    sizes = [rgb[name]["anyOf"][0] for name in ("height", "width")]
    assert sizes == [{"type": "integer", "enum": [8]}, {"type": "integer", "enum": [16]}]
    for path in ("/denoise", "/noise"):
        timestep = fields_of(rgb_server, path)["timestep"]
        assert (timestep["minimum"], timestep["maximum"]) == (0, 19)


def test_distilled_weights_are_described() -> None:
    with serving(WEIGHTS="digits-4step", MAX_IMAGES=3, TIMEOUT=20) as student:
        sample, denoise = fields_of(student, "/sample"), fields_of(student, "/denoise")
    assert sample["num_images"]["maximum"] == 3
    assert sample["timeout_s"]["anyOf"][0]["maximum"] == 20
    assert sample["sampler"]["anyOf"][0]["enum"] == ["ddim"]
    assert sample["num_inference_steps"]["enum"] == [1, 2, 4, None]
    assert denoise["num_inference_steps"]["enum"] == [1, 2, 4]


def test_latent_diffusion_is_described() -> None:
    with serving_latents() as latents:
        document = latents.client.get("/openapi.json").json()
        for path in ("/sample", "/denoise", "/noise"):
            example = document["paths"][path]["post"]["requestBody"]["content"][JSON]["example"]
            answer = latents.client.post(path, json=example, headers={"Accept": f"{JSON}, */*;q=0.1"})
            assert answer.status_code == 200
            described = document["paths"][path]["post"]["responses"]["200"]
            if path != "/noise":
                timings = described["content"][JSON]["schema"]["properties"]["timings"]["properties"]
                assert timings.keys() == answer.json()["timings"].keys()
                assert "decoding" in described["headers"]["Server-Timing"]["description"]
        fields = fields_of(latents, "/denoise")
        form = fields_of(latents, "/denoise", "multipart/form-data")
    assert "latents" in form["image"]["description"]
    assert fields.keys() == form.keys() | {"prompt", "negative_prompt", *NOTHING}  # only null for this model


def test_text_fields_have_no_null(server: ServerProcess, rgb_server: ServerProcess) -> None:
    """In queries and forms an unset field is left out. `seed=` and `seed=null` are errors."""
    for where in (server, rgb_server):
        document = where.client.get("/openapi.json").json()["paths"]
        parameters = {one["name"]: one["schema"] for one in document["/sample"]["get"]["parameters"]}
        assert parameters["model"]["enum"] == [where.client.get("/info").json()["fingerprint"]]
        assert ("class_label" in parameters) is (where is server)
        for text in (parameters, fields_of(where, "/denoise", "multipart/form-data")):
            assert '{"type": "null"}' not in json.dumps(text)


def test_the_examples_are_answered(rgb_server: ServerProcess, description: Json) -> None:
    document = rgb_server.client.get("/openapi.json").json()
    for path in ("/sample", "/denoise", "/noise"):
        example = document["paths"][path]["post"]["requestBody"]["content"][JSON]["example"]
        assert rgb_server.client.post(path, json=example).status_code == 200


def test_base64_and_events_are_described_so_that_a_reader_can_check_them(server: ServerProcess) -> None:
    pattern = fields_of(server, "/noise")["image"]["pattern"]
    for text in ("", "QQ==", "QUE=", "QUFB", "+/+/", "QU\r\nFB", "data:image/png;base64,QUFB", "data:;base64,"):
        assert re.search(pattern, text)
    for text in ("Q", "QQ", "QQ=", "QUFB\u00c9", "QU-_", "Q=Q=", "data:image/jpeg;base64,QUFB"):
        assert not re.search(pattern, text)
    document = server.client.get("/openapi.json").json()
    event = document["paths"]["/sample"]["post"]["responses"]["200"]["content"]["text/event-stream"]["schema"]
    assert set(event["properties"]["event"]["enum"]) == {"queued", "progress", "preview", "image", "done", "error"}


def test_headers_are_described_and_sent(server: ServerProcess, strict_server: ServerProcess) -> None:
    paths = server.client.get("/openapi.json").json()["paths"]
    assert paths["/sample"]["post"]["responses"]["503"]["headers"]["Retry-After"]["required"] is True
    assert paths["/sample"]["post"]["responses"]["429"]["headers"]["Retry-After"]["required"] is True
    assert paths["/info"]["get"]["responses"]["401"]["headers"]["WWW-Authenticate"]["required"] is True
    with httpx.Client(base_url=strict_server.url, trust_env=False) as stranger:
        refusal = stranger.get("/info")
    drawn = server.client.get("/sample?seed=1")
    for answer, operation in ((drawn, paths["/sample"]["get"]), (refusal, paths["/info"]["get"])):
        headers = operation["responses"][str(answer.status_code)]["headers"]
        assert {name for name, header in headers.items() if header["required"] and name not in answer.headers} == set()


def test_the_described_facts_are_the_real_ones(server: ServerProcess, description: Json) -> None:
    described = description["paths"]["/info"]["get"]["responses"]["200"]["content"][JSON]["schema"]
    info = server.client.get("/info").json()
    assert set(described["required"]) == described["properties"].keys() == info.keys()
    for name in ("model", "recommended", "limits"):
        assert set(described["properties"][name]["required"]) == info[name].keys()


def test_the_described_problem_is_the_real_one(server: ServerProcess, description: Json) -> None:
    refusal = description["paths"]["/sample"]["post"]["responses"]["422"]
    described = refusal["content"]["application/problem+json"]["schema"]
    document = problem(server.client.post("/sample", json={"seed": -1}), 422)
    assert document.keys() == described["properties"].keys()


# Errors.


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("GET", "/nowhere", {}, b"", 404),
        ("GET", "/docs/nothing", {}, b"", 404),
        ("GET", "/docs/../../../../etc/passwd", {}, b"", 404),
        ("GET", "/docs/%2e%2e/%2e%2e/core.py", {}, b"", 404),
        ("PUT", "/sample", {}, b"", 405),
        ("GET", "/denoise", {}, b"", 405),
        ("POST", "/info", {}, b"", 405),
        ("GET", "/sample", {"Accept": "text/html"}, b"", 406),
        ("POST", "/sample", {"Accept": "text/html"}, b"{}", 406),
        ("POST", "/sample", {"Content-Type": "text/plain"}, b"{}", 415),
        ("POST", "/denoise", {"Content-Type": "text/plain"}, b"{}", 415),
        ("POST", "/noise", {"Content-Type": "multipart/form-data"}, b"{}", 422),
        ("POST", "/sample", {}, b"{", 422),
        ("POST", "/denoise", {}, b"{}", 422),
    ],
)
def test_errors_are_problem_documents(
    server: ServerProcess, method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    response = server.client.request(method, path, headers=headers, content=body)
    document = problem(response, status)
    assert ("errors" in document) == (status == 422)
    assert str(Path(service.__file__).parent) not in response.text
    assert "site-packages" not in response.text


def test_405_names_all_methods_of_the_path(server: ServerProcess) -> None:
    for path, methods in (("/sample", {"GET", "HEAD", "POST"}), ("/denoise", {"POST"}), ("/info", {"GET", "HEAD"})):
        response = server.client.delete(path)
        problem(response, 405)
        assert set(response.headers["allow"].split(", ")) == methods


def test_what_can_be_got_has_a_head(server: ServerProcess) -> None:
    for path in ("/health/live", "/health/ready", "/health", "/metrics", "/info", "/sample", "/docs", "/openapi.json"):
        head = server.client.head(path)
        assert head.status_code == 200
        assert head.content == b""


def test_values_that_are_not_finite_are_this_requests_failure(strict_server: ServerProcess) -> None:
    response = strict_server.client.post("/sample", json={"class_label": "dog"})
    assert "not finite" in problem(response, 500)["detail"]
    assert strict_server.client.post("/sample", json={"class_label": "cat"}).status_code == 200
    assert strict_server.client.get("/health/ready").status_code == 200
    strict_server.wait_until_idle()


# Keys and origins.


@pytest.fixture
def stranger(strict_server: ServerProcess) -> Any:
    with httpx.Client(base_url=strict_server.url, timeout=100, trust_env=False) as client:
        yield client


def basic(credentials: bytes) -> str:
    """An Authorization header of HTTP Basic."""
    return f"Basic {base64.b64encode(credentials).decode()}"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/sample"),
        ("GET", "/sample"),
        ("POST", "/denoise"),
        ("POST", "/noise"),
        ("GET", "/info"),
        ("GET", "/metrics"),
        ("GET", "/docs"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
    ],
)
def test_a_key_is_needed(stranger: httpx.Client, method: str, path: str) -> None:
    keys = [
        None,
        "Bearer",
        "Bearer gamma",
        "Bearer alph",
        "Bearer alphaa",
        "Basic alpha",
        basic(b"alpha"),
        basic(b"alpha:"),
        basic(b"anyone:alph"),
        basic(b"anyone:alpha") + "*",
        "Digest alpha",
        "alpha",
        "Bearer é",
    ]
    for key in keys:
        headers = {} if key is None else {b"Authorization": key.encode()}
        response = stranger.request(method, path, headers=headers)
        problem(response, 401)
        bearer, login = response.headers.get_list("www-authenticate")
        assert bearer == "Bearer"
        assert login.startswith("Basic realm=")


def test_the_page_asks_for_the_key_itself(stranger: httpx.Client) -> None:
    """A browser would ask, too, on an answer to the page's own requests that offers Basic."""
    response = stranger.get("/info", headers={"Sec-Fetch-Dest": "empty"})
    problem(response, 401)
    assert response.headers.get_list("www-authenticate") == ["Bearer"]


def test_each_key_opens(stranger: httpx.Client) -> None:
    by_password = [basic(f"{name}:{key}".encode()) for name in ("", "user", "ü") for key in ("alpha", "beta-ü")]
    for key in (
        "Bearer alpha",
        "bearer alpha",
        "Bearer beta-ü",
        *by_password,
        by_password[0].replace("Basic", "basic"),
    ):
        assert stranger.get("/info", headers={b"Authorization": key.encode()}).status_code == 200


def test_health_needs_no_key(stranger: httpx.Client) -> None:
    for path in ("/health/live", "/health/ready", "/health"):
        assert stranger.get(path).status_code == 200


def test_behind_a_key_only_the_client_may_keep_images(strict_server: ServerProcess) -> None:
    get = strict_server.client.get
    fingerprint = get("/info").json()["fingerprint"]
    assert get("/sample?seed=1").headers["cache-control"] == "private, max-age=3600"
    kept = get(f"/sample?seed=1&model={fingerprint}")
    assert kept.headers["cache-control"] == "private, max-age=31536000, immutable"
    assert get("/sample").headers["cache-control"] == "no-store"


def test_pages_of_the_named_origins_may_call(stranger: httpx.Client, strict_server: ServerProcess) -> None:
    preflight = {
        "Origin": "https://b.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type",
    }
    allowed = stranger.options("/sample", headers=preflight)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://b.example"
    assert "POST" in allowed.headers["access-control-allow-methods"]
    assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
    answer = strict_server.client.get("/sample?seed=1", headers={"Origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "https://a.example"
    exposed = answer.headers["access-control-expose-headers"].lower()
    assert {"etag", "x-seed", "server-timing", "x-request-id"} <= set(exposed.split(", "))
    assert {"accept", "origin"} <= {name.strip().lower() for name in answer.headers["vary"].split(",")}
    refused = stranger.get("/info", headers={"Origin": "https://a.example"})  # an error that the page can read
    assert refused.headers["access-control-allow-origin"] == "https://a.example"


def test_other_pages_may_not_call(stranger: httpx.Client, strict_server: ServerProcess, server: ServerProcess) -> None:
    preflight = {"Origin": "https://c.example", "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in stranger.options("/sample", headers=preflight).headers
    for where in (strict_server, server):
        answer = where.client.get("/info", headers={"Origin": "https://c.example"})
        assert "access-control-allow-origin" not in answer.headers


# Ids and logs.


@pytest.mark.parametrize("sent", ["a", "abc-123_X.y:z/1+2=@", "x" * 128, "00-4bf92f3577b34da6-00f067aa0ba902b7-01"])
def test_a_sane_request_id_is_echoed(server: ServerProcess, sent: str) -> None:
    for response in (
        server.client.get("/health/live", headers={"X-Request-ID": sent}),
        server.client.get("/nowhere", headers={"X-Request-ID": sent}),
        server.client.post("/sample", json={}, headers={"X-Request-ID": sent}),
    ):
        assert response.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "a b", "x" * 129, 'a"b', "a\tb", "é", "<script>", "a;b", "{}"])
def test_another_request_id_is_replaced(server: ServerProcess, sent: str) -> None:
    response = server.client.get("/health/live", headers={b"X-Request-ID": sent.encode()})
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])


def test_each_request_is_one_line_of_the_log(server: ServerProcess) -> None:
    requests = [
        ("GET", "/info", {}, None, 200),
        ("POST", "/sample", {}, b"{}", 200),
        ("POST", "/sample", {}, b"{", 422),
        ("HEAD", "/sample", {}, None, 200),
        ("GET", "/nowhere%22%0a", {}, None, 404),
        ("POST", "/denoise", {"Content-Type": "text/plain"}, b"x", 415),
    ]
    for i, (method, path, headers, body, status) in enumerate(requests):
        sent = server.client.request(method, path, headers={"X-Request-ID": f"log-{i}", **headers}, content=body)
        assert sent.status_code == status
    server.wait_for_line(lambda line: line.get("request_id") == f"log-{len(requests) - 1}")
    for i, (method, path, _, _, status) in enumerate(requests):
        [line] = [line for line in server.lines if line.get("request_id") == f"log-{i}"]
        assert line["level"] == "info"
        assert line["method"] == method
        assert line["path"] == path.replace("%22%0a", "…")
        assert line["status"] == status
        assert line["duration_ms"] >= 0
        assert line["client"] == "127.0.0.1"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_no_log_line_has_a_key(strict_server: ServerProcess) -> None:
    strict_server.client.get("/info", headers={"X-Request-ID": "with-a-key"})
    strict_server.wait_for_line(lambda line: line.get("request_id") == "with-a-key")
    assert "alpha" not in json.dumps(strict_server.lines)


def test_a_setting_that_is_none_is_warned_of(strict_server: ServerProcess) -> None:
    line = strict_server.wait_for_line(lambda line: line["level"] == "warning")
    assert "STEPWISE_NO_SUCH_SETTING" in line["message"]


# Bodies beyond the limit.


def read_answer(connection: Any) -> tuple[int, Json]:
    """Status and problem document of an answer on a raw connection."""
    with connection, connection.makefile("rb") as answer:
        status = int(answer.readline().split()[1])
        headers = dict(line.decode().strip().lower().split(": ", 1) for line in iter(answer.readline, b"\r\n"))
        return status, json.loads(answer.read(int(headers["content-length"])))


@pytest.mark.parametrize("path", ["/sample", "/denoise", "/noise"])
def test_too_large_a_length_is_refused_unread(strict_server: ServerProcess, path: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "20001"}
    status, document = read_answer(strict_server.raw_request("POST", path, headers, b"{"))
    assert status == 413
    assert "20000 bytes" in document["detail"]


@pytest.mark.parametrize("endpoint", ["POST /sample", "GET /sample", "POST /denoise", "POST /noise"])
@pytest.mark.parametrize("accept", ["*/*", "text/event-stream"])
def test_too_large_a_stream_is_refused_before_its_end(strict_server: ServerProcess, endpoint: str, accept: str) -> None:
    """The body of a GET once did not end the request, and sometimes raised an error in the middle of the answer."""
    method, path = endpoint.split()
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked", "Accept": accept}
    body = b"3e9\r\n" + b" " * 1001 + b"\r\n"
    status, document = read_answer(strict_server.raw_request(method, path, headers, body * 20))
    assert status == (406 if path == "/noise" and accept != "*/*" else 413)
    assert document["title"]


def test_a_client_that_sends_on_gets_its_answer(strict_server: ServerProcess) -> None:
    """The server once closed the connection immediately. The client often lost the answer."""
    headers = {"Content-Type": "application/json", "Content-Length": "10000000"}
    status, _ = read_answer(strict_server.raw_request("POST", "/sample", headers, bytes(10_000_000)))
    assert status == 413
    chunk = b"186a0\r\n" + bytes(100_000) + b"\r\n"
    headers = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    status, _ = read_answer(strict_server.raw_request("POST", "/sample", headers, chunk * 100 + b"0\r\n\r\n"))
    assert status == 413


def test_a_form_that_is_too_large_is_refused(strict_server: ServerProcess) -> None:
    response = strict_server.client.post("/denoise", files={"image": bytes(20_000)}, data={"timestep": "5"})
    problem(response, 413)


def test_a_body_of_just_the_limit_is_read(strict_server: ServerProcess) -> None:
    body = b"{" + b" " * 19_998 + b"}"
    response = strict_server.client.post("/sample", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 200
    response = strict_server.client.post("/sample", content=body + b" ", headers={"Content-Type": "application/json"})
    problem(response, 413)


def test_default_limits_take_large_images(server: ServerProcess) -> None:
    """Libraries limit spooled forms and other input to 1 MiB by default."""
    response = server.client.post(
        "/denoise", files={"image": write_npy(GREY) + bytes(3_000_000)}, data={"timestep": "5"}
    )
    assert "1024 bytes" in problem(response, 422)["detail"]
