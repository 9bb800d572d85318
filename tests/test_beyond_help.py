"""A process that cannot recover ends with an exit code, so that Docker or Kubernetes starts it again."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.servers import PATIENCE, ROOT, Json, environment

pytestmark = pytest.mark.slow

# `python -m service` with a runner that fails for seed 13. Its clock runs 30 times as fast as real time, so a hang is
# found and given up on within seconds.
PROGRAM = """
import sys, threading, time
from service import __main__ as program
from service.engine.engine import Engine
from service.http.metrics import Metrics
from service.engine.fairness import Places
from tests.engines import GROUP, PROBE_SEED, FakeRunner, a_row
from tests.local import SERVED

FAULT = sys.argv.pop()

class Fast:
    def __call__(self): return 30 * time.monotonic()
    def advance(self, seconds): pass

class Faulty(FakeRunner):
    def step(self, forwards):
        if 13 in (self.rows[slot].row.seed for slot, *_ in forwards):
            if FAULT == "hangs": threading.Event().wait()
            if FAULT == "works no longer": self.breaking = set(range(100))
        super().step(forwards)

runner = Faulty({1: 0.5})
runner.clock = Fast()
runner.unreleased = {13} if FAULT == "dies" else set()
runner.breaking = {PROBE_SEED} if FAULT == "never works" else set()
metrics = Metrics()
engine = Engine({GROUP: runner}, {GROUP: a_row(PROBE_SEED)}, Places(8), metrics, runner.clock)
program.build = lambda settings: (engine, SERVED, metrics)
program.main()
"""


@contextmanager
def started(fault: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), fault]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("fault", "status", "why"),
    [
        ("dies", 503, "denoising has died"),
        ("works no longer", 500, "the model fails whatever it is given, time after time"),
        ("hangs", 503, "a forward pass has not returned for"),
    ],
)
def test_a_process_beyond_help_answers_everybody_says_why_and_ends(fault: str, status: int, why: str) -> None:
    with started(fault) as process:
        assert process.stdout
        ready = json.loads(process.stdout.readline())["message"]
        url = ready.split()[2].rstrip(",")
        answer = httpx.post(f"{url}/sample", json={"seed": 13}, timeout=PATIENCE, trust_env=False)
        assert answer.status_code == status, answer.text
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert errors == ""
        lines: list[Json] = [json.loads(line) for line in output.splitlines()]
        [last] = [line for line in lines if line["level"] == "critical"]
        assert last["message"].startswith(why)
        assert last["message"].endswith(": only a new process helps")


def test_a_model_that_cannot_be_warmed_up_says_so_in_one_line() -> None:
    with started("never works") as process:
        output, errors = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert output == ""
        assert errors == "stepwise: the model could not be warmed up: RuntimeError('this pass breaks')\n"
