"""Replicas behind a real HAProxy. No request is lost, whatever happens to one replica."""

import base64
import operator
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

from tests.balancers import MAX_BODY, QUEUE, Balancer, Replica, balanced
from tests.servers import Json, Reachable, eventually, needs, problem, write_npy
from tests.test_denoise import GREY
from tests.test_events import told, watched, watching
from tests.test_server import LONG, post, send_long, wait_until_idle, wait_until_running

pytestmark = [
    pytest.mark.slow,
    needs("haproxy"),
]

REPLICAS = 3
T = TypeVar("T")


@pytest.fixture(scope="module")
def behind(weights: Path) -> Iterator[tuple[Balancer, list[Replica]]]:
    """HAProxy and its replicas of `grey`. Each test leaves all of them ready and idle."""
    with balanced(weights / "grey", REPLICAS) as both:
        yield both


@pytest.fixture
def fleet(behind: tuple[Balancer, list[Replica]]) -> Iterator[list[Replica]]:
    balancer, replicas = behind
    yield replicas
    for replica in replicas:
        if replica.server.process.poll() is not None:  # the next test needs every replica, even if this test failed
            replica.start_again()
        wait_until_idle(replica.server)
    balancer.wait_until(up=REPLICAS)
    balancer.wait_until_idle()


@pytest.fixture
def balancer(behind: tuple[Balancer, list[Replica]]) -> Balancer:
    return behind[0]


def upload(balancer: Reachable, size: int | None = None, **fields: object) -> httpx.Response:
    """POST /denoise with an image in JSON, padded with blanks to a size."""
    image = base64.b64encode(write_npy(GREY)).decode()
    with balancer.new_client() as client:
        request = client.build_request("POST", "/denoise", json={"image": image, "timestep": 900, **fields})
        body = request.content if size is None else request.content.ljust(size)
        return client.post("/denoise", content=body, headers={"Content-Type": "application/json"})


def mixed(balancer: Reachable, i: int) -> bytes:
    """A request of a mix, long or short. Its image differs from those of all others."""
    if i % 4 == 0:
        answer = upload(balancer, seed=i, num_inference_steps=100 + 100 * (i % 3))
    else:
        sampler = ("ddim", "ddpm", "dpmpp_2m")[i % 3]
        steps = (5, 60, 200)[i % 3]
        answer = post(balancer, {"seed": i, "sampler": sampler, "num_inference_steps": steps, "num_images": 1 + i % 2})
    assert answer.status_code == 200, answer.text
    return answer.content


@contextmanager
def at_once(balancer: Balancer, numbers: Sequence[int]) -> Iterator[list[Future[bytes]]]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        yield [pool.submit(mixed, balancer, i) for i in numbers]


def revive(balancer: Balancer, replica: Replica) -> None:
    replica.start_again()
    assert replica.server.url
    balancer.wait_until(up=REPLICAS)


def one_each(balancer: Balancer, fleet: Sequence[Replica], send: Callable[[int], T]) -> list[T]:
    """Send a long request to each replica. Of requests that arrive at once, HAProxy may send two to one replica."""
    balancer.wait_until_idle()
    sent = []
    for i in range(len(fleet)):
        sent.append(send(i))
        eventually(lambda: len(_running(fleet)) == len(sent) or None)
    return sent


def test_a_replica_that_is_killed_costs_no_request(balancer: Balancer, fleet: list[Replica]) -> None:
    """The answers have the same bytes: another replica draws the lost images again."""
    numbers = range(36)
    with at_once(balancer, numbers) as undisturbed:
        pass
    with at_once(balancer, numbers) as answers:
        for replica in fleet:
            wait_until_running(replica.server)
        fleet[0].kill()
    assert fleet[0].server.process.wait() == -9
    assert [one.result() for one in answers] == [one.result() for one in undisturbed]
    assert fleet[1].server.metric("stepwise_images_total") > 0
    revive(balancer, fleet[0])


def test_a_rolling_restart_costs_no_request(balancer: Balancer, fleet: list[Replica]) -> None:
    """Each replica in turn gets SIGTERM and comes back, while clients send requests without a pause."""
    alone = [mixed(balancer, i) for i in range(12)]
    restarted = threading.Event()

    def ask_on(client: int) -> int:
        rounds = 0
        while not restarted.is_set() or rounds == 0:
            for i in range(client, 12, 4):
                assert mixed(balancer, i) == alone[i]
            rounds += 1
        return rounds

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(ask_on, client) for client in range(4)]
        try:
            for replica in fleet:
                wait_until_running(replica.server)
                replica.server.terminate()
                assert replica.server.wait() == 0
                revive(balancer, replica)
        finally:
            restarted.set()
    assert all(client.result() >= 1 for client in clients)


def test_a_draining_replica_finishes_what_it_has_and_gets_nothing_new(balancer: Balancer, fleet: list[Replica]) -> None:
    with ThreadPoolExecutor(REPLICAS) as pool:
        long = one_each(balancer, fleet, lambda i: pool.submit(post, balancer, {**LONG, "seed": i, "num_images": 16}))
        drained = fleet[0].server
        drained.terminate()
        balancer.wait_until(up=REPLICAS - 1)
        assert [post(balancer, {"seed": i, "num_inference_steps": 1}).status_code for i in range(10)] == [200] * 10
        assert [answer.result().status_code for answer in long] == [200] * REPLICAS
    assert drained.wait() == 0
    done = drained.wait_for_line(lambda line: line.get("path") == "/sample" and line.get("duration_ms", 0) > 0)
    assert not [line for line in drained.lines if line.get("path") == "/sample" and line.get("status") == 503]
    assert done["status"] == 200
    revive(balancer, fleet[0])


def test_what_a_hung_replica_had_is_drawn_elsewhere(balancer: Balancer, fleet: list[Replica]) -> None:
    """HAProxy notices the hang after two checks, a second each. Then the replica gets no more requests."""
    bodies: list[Json] = [{**LONG, "seed": i} for i in range(REPLICAS)]
    alone = [post(balancer, body).content for body in bodies]
    before = _accepted(fleet)
    with ThreadPoolExecutor(REPLICAS) as pool, ExitStack() as stack:
        # Long requests, so that no replica finishes before one of them hangs.
        one_each(balancer, fleet, lambda _: stack.enter_context(send_long(balancer, 64)))
        long = [pool.submit(post, balancer, {**body, "num_images": 1}) for body in bodies]
        eventually(lambda: sum(_accepted(fleet)) == sum(before) + 2 * REPLICAS or None)
        hung = next(one for one, n, then in zip(fleet, _accepted(fleet), before, strict=True) if n >= then + 2)
        hung.hang()
        balancer.wait_until(up=REPLICAS - 1, down=1)
        assert [post(balancer, {"seed": i}).status_code for i in range(10)] == [200] * 10
        assert [answer.result().content for answer in long] == alone
        hung.go_on()
        balancer.wait_until(up=REPLICAS)
        assert hung.server.wait_for_line(lambda line: line.get("status") == 499)  # the client has disconnected


def test_when_all_are_full_the_client_is_told_when_to_come_again(balancer: Balancer, fleet: list[Replica]) -> None:
    with ExitStack() as stack:
        for _ in range(REPLICAS * QUEUE):
            stack.enter_context(send_long(balancer))
        for replica in fleet:
            replica.server.wait_for_metric("stepwise_outstanding_row_steps", lambda steps: steps > 2900 * QUEUE)
        refused = post(balancer, {})
        assert f"all {QUEUE} places" in problem(refused, 503)["detail"]
        assert re.fullmatch(r"[1-9]\d*", refused.headers["retry-after"])
        assert balancer.client.get("/health/ready").status_code == 200  # a full replica is still ready
    for replica in fleet:
        wait_until_idle(replica.server)
    assert post(balancer, {}).status_code == 200


def test_a_client_that_leaves_frees_its_rows(balancer: Balancer, fleet: list[Replica]) -> None:
    left = [replica.server.metric("stepwise_cancelled_total", reason="disconnect") for replica in fleet]
    with ExitStack() as stack:
        one_each(balancer, fleet, lambda _: stack.enter_context(send_long(balancer, 64)))
    for replica, before in zip(fleet, left, strict=True):
        known = partial(operator.eq, before + 1)
        replica.server.wait_for_metric("stepwise_cancelled_total", known, reason="disconnect")
        wait_until_idle(replica.server)


def test_the_largest_upload_is_asked_for_again_too(balancer: Balancer, fleet: list[Replica]) -> None:
    fields: Json = {"num_inference_steps": 800, "sampler": "ddpm", "seed": 5}
    alone = upload(balancer, MAX_BODY, **fields)
    assert alone.status_code == 200
    problem(upload(balancer, MAX_BODY + 1, **fields), 413)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(upload, balancer, MAX_BODY, **fields)
        [busy] = eventually(lambda: _running(fleet) or None)
        busy.kill()
        assert answer.result().content == alone.content
    revive(balancer, busy)


def _running(fleet: Sequence[Replica]) -> list[Replica]:
    """The replicas that run something."""
    return [one for one in fleet if one.server.metric("stepwise_rows_running") > 0]


def _accepted(fleet: Sequence[Replica]) -> list[float]:
    """How many requests each replica has accepted."""
    return [one.server.metric("stepwise_accepted_total") for one in fleet]


def test_streams_flow_through(balancer: Balancer, fleet: list[Replica]) -> None:
    body = {"seed": 3, "num_inference_steps": 20, "sampler": "ddpm", "preview_every": 5}
    assert told(watched(balancer, body), steps=20)["image"]
    with watching(balancer, {**LONG, "num_images": 64}) as events:
        assert next(events).name == "queued"
        assert next(event.data["step"] for event in events if event.name == "progress") < 1000  # nothing is buffered


def test_replicas_know_the_client_and_the_balancers_id(balancer: Balancer, fleet: list[Replica]) -> None:
    """Headers that a client forges have no effect."""
    with balancer.new_client(source="127.0.0.77") as client:
        answer = client.post("/sample", json={}, headers={"X-Forwarded-For": "8.8.8.8"})
    line = _logged(fleet, answer.headers["x-request-id"])
    assert line["client"] == "127.0.0.77"
    assert re.fullmatch(r"[0-9a-f-]{36}", line["request_id"])  # HAProxy's format
    own = balancer.client.post("/sample", json={}, headers={"X-Request-ID": "mine"})
    assert own.headers["x-request-id"] == "mine"


def _logged(fleet: Sequence[Replica], request_id: str) -> Json:
    """The log line of a request from one of the replicas. A client may have its answer before the line is written."""

    def look() -> Json | None:
        lines = [line for one in fleet for line in tuple(one.server.lines)]
        return next((line for line in lines if line.get("request_id") == request_id), None)

    return eventually(look)


def test_the_balancer_has_no_metrics_of_a_replica(balancer: Balancer, fleet: list[Replica]) -> None:
    answer = balancer.client.get("/metrics")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == 404


def test_without_replicas_the_balancer_says_so(balancer: Balancer, fleet: list[Replica]) -> None:
    for replica in fleet:
        replica.server.terminate()
    for replica in fleet:
        assert replica.server.wait() == 0
    balancer.wait_until(up=0, nolb=0)
    answer = post(balancer, {})
    assert answer.status_code == 503
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["retry-after"] == "2"
    assert answer.json()["detail"] == "no server is ready"
    for replica in fleet:
        replica.start_again()
