"""Models whose passes take many seconds stay ready for the checks in deploy/ and the Dockerfile."""

import json
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from service.http import app
from tests.balancers import Balancer, balancing
from tests.engines import PROBE, FakeClock, FakeRunner
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, ROOT, START, needs, serving, write_weights

Check = Callable[[FakeServer], None]


def kubernetes_checks() -> list[Check]:
    """Each probe of the deployment, as the kubelet makes it. A check raises on failure."""
    deployment = yaml.safe_load((ROOT / "deploy/kubernetes/base/deployment.yaml").read_text())
    [container] = deployment["spec"]["template"]["spec"]["containers"]

    def check(probe: dict[str, dict[str, str]], timeout_s: float, server: FakeServer) -> None:
        url = server.url + probe["httpGet"]["path"]
        assert httpx.get(url, timeout=timeout_s, trust_env=False).status_code == 200

    probes = [container[name] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    return [partial(check, probe, probe["timeoutSeconds"]) for probe in probes]


def docker_checks() -> list[Check]:
    """The health check of each target, as Docker runs it, on this Python. A check raises on failure."""
    found = re.findall(r"^HEALTHCHECK (.*) \\\n +CMD (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert len(found) == 2

    def check(command: list[str], timeout_s: float, server: FakeServer) -> None:
        environment = {**os.environ, "STEPWISE_PORT": server.url.rpartition(":")[2]}
        subprocess.run([sys.executable, *command[1:]], env=environment, timeout=timeout_s, check=True)

    return [
        partial(check, json.loads(command), float(re.findall(r"--timeout=(\d+)s", shlex.join(shlex.split(options)))[0]))
        for options, command in found
    ]


@pytest.mark.parametrize("checks", [kubernetes_checks, docker_checks])
@pytest.mark.parametrize("pass_s", [4.0, 12.0])
def test_checks_succeed_while_the_model_works(
    checks: Callable[[], list[Check]], pass_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """During a pass, and during a probe's pass after a long rest. The passes outlast the checks."""
    monkeypatch.setattr(app, "_EVERY", 0.05)
    with serving_fake(FakeRunner({1: pass_s})) as server, ThreadPoolExecutor(1) as pool:
        server.runner.hold()
        answer = pool.submit(server.client.post, "/sample", json={"num_inference_steps": 1})
        server.runner.next_pass()
        server.runner.clock.now += 2 * pass_s
        for check in checks():
            check(server)
        server.runner.let_go()
        assert answer.result().status_code == 200

        server.runner.hold()
        server.runner.clock.now += 1000
        for check in checks():
            check(server)
        assert server.runner.next_pass() == PROBE
        server.runner.clock.now += 2 * pass_s
        for check in checks():
            check(server)


class RealTime(FakeClock):
    """The real clock. Work takes real time, and a test may move the clock forward."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0  # seconds ahead of the real clock

    def __call__(self) -> float:
        return self.now + time.monotonic()

    def advance(self, seconds: float) -> None:
        threading.Event().wait(seconds)


def watch_until(balancer: Balancer, done: Callable[[], bool]) -> None:
    """Check until `done` that the one replica is up."""
    looks = 0
    while not done() or not looks:
        assert balancer.states() == ["UP"]
        assert balancer.client.get("/health/ready").status_code == 200
        looks += 1


@pytest.mark.slow
@needs("haproxy")
def test_a_slow_model_is_never_down_behind_the_balancer() -> None:
    """Passes really take 4 s. HAProxy checks twice a second, and waits 1 s for each answer."""
    runner = FakeRunner({1: 4.0})
    runner.clock = RealTime()
    with (
        serving_fake(runner) as server,
        balancing(["127.0.0.1"], int(server.url.rpartition(":")[2])) as balancer,
        ThreadPoolExecutor(1) as pool,
    ):
        balancer.wait_until(up=1)
        answer = pool.submit(balancer.client.post, "/sample", json={"num_inference_steps": 2}, timeout=PATIENCE)
        watch_until(balancer, answer.done)
        assert answer.result().status_code == 200
        passes = len(runner.passes)
        runner.clock.now += 100  # nothing has run for long
        watch_until(balancer, lambda: len(runner.passes) > passes and server.engine.wait_idle(0))
        assert runner.passes[passes:] == [PROBE]
        assert balancer.client.post("/sample", json={"num_inference_steps": 1}).status_code == 200


@pytest.mark.slow
@needs("haproxy")
def test_a_slow_network_is_never_down_behind_the_balancer(tmp_path: Path) -> None:
    """A real network in its own process. A pass takes seconds."""
    weights = write_weights(
        tmp_path / "slow",
        in_channels=1,
        image_size=[512, 512],
        model_channels=128,
        channel_multipliers=[1, 2],
        norm_groups=4,
        schedule={"beta_schedule": "squaredcos_cap_v2"},
    )
    with (
        serving(WEIGHTS=weights, MAX_BATCH=1) as server,
        balancing(["127.0.0.1"], server.address[1]) as balancer,
        ThreadPoolExecutor(1) as pool,
    ):
        balancer.wait_until(up=1)
        answer = pool.submit(balancer.client.post, "/sample", json={"num_inference_steps": 3}, timeout=START)
        watch_until(balancer, answer.done)
        assert answer.result().status_code == 200
