"""The systems that bench.text compares, each in its own process: Stepwise's server, and a pipeline of diffusers."""

import itertools
import json
import os
import re
import select
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import httpx
from prometheus_client.parser import text_string_to_metric_families

from bench.peak import Held, held
from bench.servers import ROOT, Server, ended
from model.rows import Group

PATIENCE = 900.0  # seconds, for a start or a call


class Times(NamedTuple):
    """Seconds of a request of one step: of its passes by row, of its prompt, and of its decoding."""

    step: float
    text: float
    decode: float


@dataclass
class Stepwise:
    """A server that is ready.

    Attributes:
        seconds: from the start of its process to ready.
        held: its memory when it was ready.
    """

    server: Server
    client: httpx.Client
    log: Path
    seconds: float
    held: Held
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def step(self, size: Group, rows: int) -> Times:
        """Draw an image of one step with a new prompt. With guidance, the step has two rows.

        The server's own clock gives the seconds. Those of the step include noise, guidance and update.
        """
        before = self._sums()
        body = {**self._fields(size, rows), "prompt": f"a fox in the snow, number {next(self._numbers)}"}
        timings = self._post(body, "application/json").json()["timings"]
        after = self._sums()
        texts = after["text_count"] - before["text_count"]
        text = (after["text_sum"] - before["text_sum"]) / texts
        return Times(timings["denoise_s"] / rows, text, after["decode_sum"] - before["decode_sum"])

    def a_pass(self, size: Group, rows: int) -> float:
        """Seconds of one step, without decoding, with a prompt that the server knows after the first call."""
        told = self._post(self._fields(size, rows), "application/x-npy").headers["Server-Timing"]
        found = re.search(r"denoise;dur=([\d.]+)", told)
        assert found
        return float(found[1]) / 1000

    def png(self, size: Group, **fields: object) -> bytes:
        return self._post({"width": size.width, "height": size.height, **fields}, "image/png").content

    def pairs_keep_bits(self, size: Group) -> bool:
        """Whether two images that are drawn together have the latents of each alone."""
        fields = {**self._fields(size, 1), "prompt": "a fox"}
        together = self._post({**fields, "num_images": 2, "seed": 0}, "application/x-npy").content
        alone = [self._post({**fields, "seed": seed}, "application/x-npy").content for seed in range(2)]
        half = len(_values(alone[0]))
        return _values(together) == b"".join(map(_values, alone)) and half > 0

    def warnings(self) -> list[str]:
        """What the start said about passes of two rows."""
        messages = [json.loads(line)["message"] for line in self.log.read_text().splitlines()]
        return [message for message in messages if "passes of 2 rows" in message]

    def info(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.client.get("/info").raise_for_status().json()
        return found

    def _fields(self, size: Group, rows: int) -> dict[str, object]:
        return {
            "width": size.width,
            "height": size.height,
            "num_inference_steps": 1,
            "sampler": "ddim",
            "guidance_scale": 7.5 if rows == 2 else 1.0,
            "prompt": "a fox in the snow",
            "seed": 0,
        }

    def _post(self, body: Mapping[str, object], media_type: str) -> httpx.Response:
        try:
            answer = self.client.post("/sample", json=body, headers={"Accept": media_type})
        except httpx.TransportError as error:  # without an answer, the server has ended
            raise RuntimeError(self.server.why_it_ended(within=5.0) or str(error)) from error
        if answer.is_error:
            raise RuntimeError(f"{answer.status_code}: {answer.text}")
        return answer

    def _sums(self) -> dict[str, float]:
        """Seconds and numbers of what was done so far, by stage."""
        stages = ("text", "decode")
        families = text_string_to_metric_families(self.client.get("/metrics").text)
        samples = {sample.name: sample.value for family in families for sample in family.samples}
        parts = [(stage, of) for stage in stages for of in ("sum", "count")]
        return {f"{stage}_{of}": samples[f"stepwise_{stage}_seconds_{of}"] for stage, of in parts}


@contextmanager
def stepwise(weights: str, cache: Path, sizes: str | None, log: Path, **settings: str) -> Iterator[Stepwise]:
    """Start a server, and wait until it is ready.

    Args:
        weights, cache, sizes, settings: settings of the server.
        log: the file for its log.
    """
    environment = {
        "STEPWISE_WEIGHTS": weights,
        "STEPWISE_CACHE_DIR": str(cache),
        "STEPWISE_TIMEOUT": "3600",
        **({} if sizes is None else {"STEPWISE_SIZES": sizes}),
        **{f"STEPWISE_{name}": value for name, value in settings.items()},
    }
    began = perf_counter()
    server = Server("Stepwise", ["-m", "service"], environment, log=log)
    try:
        first_to_go(server.pid)
        server.wait("/health/ready", 0.05, PATIENCE)
        seconds, now = perf_counter() - began, held(server.pid)
        with httpx.Client(base_url=server.url, timeout=PATIENCE, trust_env=False) as client:
            yield Stepwise(server, client, log, seconds, now)
    finally:
        server.close()


class Diffusers:
    """A process with a pipeline: bench/peers/diffusers_text.py.

    Args:
        folder: of the pipeline.
        dtype: float32 or bfloat16.
        log: the file for its standard error.
        memory_format: of its U-Net and VAE; contiguous_format is diffusers' default.

    Attributes:
        seconds: from the start of its process until the pipeline is loaded.
        held: its memory then.
    """

    def __init__(self, folder: Path, dtype: str, log: Path, memory_format: str = "contiguous_format") -> None:
        self._log = log
        began = perf_counter()
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.peers.diffusers_text", str(folder), dtype, memory_format],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
            )
        first_to_go(self._process.pid)
        try:
            self._read()
        except BaseException:
            self.close()
            raise
        self.seconds, self.held = perf_counter() - began, held(self._process.pid)

    def __enter__(self) -> "Diffusers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(self, call: str, **fields: object) -> float:
        """Seconds of one call of the peer's CALLS."""
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"call": call, **fields}).encode() + b"\n")
        self._process.stdin.flush()
        seconds: float = self._read()["seconds"]
        return seconds

    def peak(self) -> int:
        return held(self._process.pid).peak

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        """The next line.

        Raises:
            RuntimeError: the process ended, or said nothing for PATIENCE seconds.
        """
        output = self._process.stdout
        assert output
        ready, _, _ = select.select([output], [], [], PATIENCE)
        line = output.readline() if ready else b""
        if line:
            found: dict[str, Any] = json.loads(line)
            return found
        if not ready:
            raise RuntimeError(f"no answer within {PATIENCE:.0f} s")
        raise RuntimeError(ended(self._process.wait(), self._log.read_text()))


def first_to_go(pid: int) -> None:
    """Let the system end this process before others where memory is short."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _values(npy: bytes) -> bytes:
    """The values of an .npy file, without its head."""
    return npy[10 + int.from_bytes(npy[8:10], "little") :]
