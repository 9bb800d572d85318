"""Servers in this process, with a model or with the fake runner and clock of tests.engines."""

import gc
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np

from model.description import Recommended
from model.rows import VAE, Group, Image
from service.__main__ import Server, listen_all, make_app
from service.build import build
from service.config import Settings
from service.engine.engine import Engine
from service.engine.fairness import Places
from service.http.checks import load, of_images
from service.http.metrics import Metrics
from service.plan.served import Served
from tests import test_responses
from tests.engines import (
    PROBE_SEED,
    PROBE_TOKEN,
    FakeRunner,
    FakeTextEncoder,
    a_context,
    a_row,
    a_text,
    a_text_row,
    undisturbed,
)
from tests.servers import CACHE, PATIENCE, Reachable

MODEL = replace(
    test_responses.MODEL,
    name="fake",
    architecture="none",
    image_shape=(1, 1, 2),  # FakeRunner's
    sample_shape=(1, 1, 2),
    factor=1,
    recommended=Recommended(num_inference_steps=4),
)


TEXT_S = 0.125  # seconds to encode a text, on the fake clock


def first_draw(seed: int, shape: tuple[int, int, int]) -> Image:
    return np.full(shape, seed, np.float32)


SERVED = Served(
    MODEL,
    "cpu",
    {"model": MODEL.recipe_name, "weights": MODEL.digest, "backend": "fake", "precision": "float32"},
    reproducible=True,
    first_draw=first_draw,
    groups=(Group(1, 2),),
)


class LocalServer(Reachable):
    """uvicorn on a thread."""

    def __init__(self, engine: Engine, served: Served, settings: Settings, metrics: Metrics) -> None:
        super().__init__()
        self.engine = engine
        self._listeners = listen_all(settings)  # from now on clients can connect, and wait
        self._listener = self._listeners[0]
        self._port, *more = (listener.getsockname()[1] for listener in self._listeners)
        self.metrics_url = f"http://127.0.0.1:{more[0]}" if more else None
        app = make_app(engine, served, settings, metrics, self._listeners)
        self._server = Server(app, engine, settings)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": self._listeners})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        self._thread.start()

    def signal(self, number: signal.Signals) -> None:
        """Do what the process does on a signal."""
        self._server.handle_exit(number, None)

    def wait_until_deaf(self) -> None:
        """Wait until the server takes no new connection."""
        with suppress(OSError):
            while True:
                socket.create_connection(self.address, PATIENCE).close()

    def wait(self) -> None:
        """Wait for the end."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def stop(self) -> None:
        self.hang_up()
        self._server.should_exit = True
        self.wait()
        for listener in self._listeners:
            listener.close()


class FakeServer(LocalServer):
    """A server without a model. Each pass takes a second of the runner's clock, and lasts until the test ends it."""

    def __init__(
        self,
        runner: FakeRunner | None = None,
        served: Served = SERVED,
        vae: VAE | None = None,
        **settings: Any,
    ) -> None:
        self.runner = runner or FakeRunner({1: 1.0, 2: 1.0, 4: 1.0})
        read = Settings(port=0, **settings)
        metrics = Metrics()
        places = Places(read.max_queue, max(1, len(read.api_keys)))
        [group] = served.groups
        has_text = served.model.text is not None
        probe = a_text_row(PROBE_SEED, PROBE_TOKEN, group=group) if has_text else a_row(PROBE_SEED, group=group)
        engine = Engine(
            {group: self.runner},
            {group: probe.with_contexts({a_text(PROBE_TOKEN): a_context(PROBE_TOKEN)})},
            places,
            metrics,
            self.runner.clock,
            vaes=None if vae is None else {group: vae},
            text_encoder=FakeTextEncoder(TEXT_S, self.runner.clock) if has_text else None,
            check=None if read.check is None else of_images(load(read.check), metrics.check_done),
        )
        served = replace(served, checks_images=read.check is not None)
        super().__init__(engine, served, read, metrics)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # for tests of slow readers

    def stop(self) -> None:
        self.runner.let_go()
        super().stop()
        assert self.runner.complaints == []


class _Complaints(logging.Handler):
    """Records logged errors."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "timeout graceful shutdown exceeded" not in record.getMessage():  # caused by the client
            self.texts.append(logging.Formatter().format(record))


@contextmanager
def no_complaints() -> Iterator[None]:
    """Check that asyncio and uvicorn log no errors, such as a lost exception or a task that nobody awaits."""
    complaints = _Complaints()
    loggers = [logging.getLogger(name) for name in ("asyncio", "uvicorn.error")]
    for logger in loggers:
        logger.addHandler(complaints)
    try:
        yield
        gc.collect()  # lost tasks are logged when they are collected
    finally:
        for logger in loggers:
            logger.removeHandler(complaints)
    assert complaints.texts == []


@contextmanager
def locally(server: LocalServer) -> Iterator[None]:
    """Run a server."""
    server.start()
    try:
        yield
    finally:
        server.stop()


@contextmanager
def serving_fake(runner: FakeRunner | None = None, **settings: Any) -> Iterator[FakeServer]:
    """Serve without a model, with these settings."""
    server = FakeServer(runner, **settings)
    with no_complaints(), undisturbed(), locally(server):
        assert server.engine.wait_loaded(PATIENCE)
        yield server


@contextmanager
def serving_here(**settings: Any) -> Iterator[LocalServer]:
    """Serve a model from this process, which is faster than a new process."""
    read = Settings(port=0, threads=1, precision="float32", cache_dir=CACHE, **settings)
    engine, served, metrics = build(read)
    server = LocalServer(engine, served, read, metrics)
    with locally(server):
        assert engine.wait_loaded(PATIENCE)
        yield server
