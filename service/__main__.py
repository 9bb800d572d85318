"""python -m service: what build.py made → app → uvicorn. Settings come from the environment alone."""

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

import uvicorn

import service
from service import config, logs
from service.app import create_app
from service.build import START_ERRORS, StartError, build
from service.config import Settings
from service.connections import Connection
from service.engine import Engine
from service.served import Served

log = logging.getLogger("service")

FAREWELL_S = 2.0  # in which an engine beyond help is told to whoever asks, before the process ends
CLIENT_PATIENCE_S = 60.0  # a client that takes in nothing for so long has left


class Server(uvicorn.Server):
    """uvicorn, but a signal first lets the engine finish what it has, while the server goes on listening."""

    def __init__(self, uvicorn_config: uvicorn.Config, engine: Engine, drain_timeout: float) -> None:
        super().__init__(uvicorn_config)
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._draining = False
        self._until = math.inf  # when draining ends
        self._farewell: float | None = None  # when an engine beyond help was noticed

    async def on_tick(self, counter: int) -> bool:
        """Leave also where only a new process helps."""
        if self._engine.beyond_help is not None:
            self._farewell = self._farewell or time.monotonic()
            if time.monotonic() - self._farewell >= FAREWELL_S:
                self.config.timeout_graceful_shutdown = math.ceil(FAREWELL_S)
                self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, args=(signal.Signals(sig).name,), name="drain", daemon=True).start()
        elif sig == signal.SIGINT:  # Ctrl-C once more: wait for nobody
            self._until = time.monotonic()
            threading.Thread(target=self._engine.close, name="hurry", daemon=True).start()

    def _drain(self, signal_name: str) -> None:
        self._engine.drain()
        self._until = time.monotonic() + self._drain_timeout
        log.info("%s: draining", signal_name)
        if not self._engine.wait_idle(self._drain_timeout):
            log.warning("not all requests were done within %g s", self._drain_timeout)
        self._engine.close()
        # What is left is for answers on their way, and for clients that have not sent all of a request.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(self._until - time.monotonic()))
        self.should_exit = True


def main() -> None:
    _read_arguments()
    try:
        serve()
    except START_ERRORS as error:
        sys.exit(f"stepwise: {error}")


def serve(when_ready: Callable[[str], None] = lambda _: None) -> NoReturn:
    """Serve as the environment says, until a signal ends the process with exit code 0, or an engine beyond help with 1.

    Args:
        when_ready: is called with the server's URL, on a thread of its own, once requests are served.

    Raises:
        START_ERRORS: for what cannot be served.
    """
    began = time.monotonic()
    logs.configure()
    for early in (signal.SIGINT, signal.SIGTERM):  # before the server takes them, and after
        signal.signal(early, _leave)
    settings = config.read()
    refuse_workers()
    for name in config.unknown():
        log.warning("%s is set, and is no setting", name)
    with listen(settings) as listener:
        engine, served, metrics = build(settings)
        uvicorn_config = uvicorn.Config(
            create_app(engine, served, settings, metrics),
            http=Connection,
            log_config=None,
            access_log=False,
            server_header=False,
            workers=1,  # else uvicorn reads WEB_CONCURRENCY
            root_path=settings.root_path.rstrip("/"),
            timeout_keep_alive=75,
            proxy_headers=settings.forwarded_allow_ips is not None,
            forwarded_allow_ips=settings.forwarded_allow_ips,
        )
        url = _url(*listener.getsockname()[:2])
        threading.Thread(target=_announce, args=(engine, served, url, began, when_ready), daemon=True).start()
        Server(uvicorn_config, engine, settings.drain_timeout).run(sockets=[listener])
    if engine.beyond_help is not None:
        if engine.scheduler is None:
            raise StartError(engine.beyond_help)
        logging.shutdown()
        os._exit(1)  # a thread that is stuck in the device's driver would keep the process
    _leave()


def _leave(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one changes nothing, however late
    sys.exit(0)


def refuse_workers() -> None:
    """Refuse what makes uvicorn start several processes.

    Raises:
        StartError: where WEB_CONCURRENCY asks for more than one.
    """
    if os.environ.get("WEB_CONCURRENCY", "1") not in ("", "1"):
        raise StartError(f"WEB_CONCURRENCY={os.environ['WEB_CONCURRENCY']}: {_ONE_PROCESS}")


def listen(settings: Settings) -> socket.socket:
    """Bind the address now, so that a taken port is told before the weights are loaded.

    Raises:
        StartError: where it cannot be bound.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # Only where the protocol is named does asyncio switch Nagle's algorithm off, which costs each answer 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # of all its connections; Linux has it
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * CLIENT_PATIENCE_S))
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return listener


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(engine: Engine, served: Served, url: str, began: float, when_ready: Callable[[str], None]) -> None:
    engine.wait_loaded()
    if engine.status == "ready":
        took = time.monotonic() - began
        log.info("ready at %s, serving %s on %s, %.1f s after the start", url, served.model.name, served.device, took)
        when_ready(url)


_ONE_PROCESS = (
    "one process owns one device, so several workers are refused: "
    "run one process a device behind a load balancer, each with its own STEPWISE_PORT"
)


def _read_arguments() -> None:
    """Answer --help and --version; there are no other arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m service",
        description="Serve a diffusion U-Net over HTTP. Settings come from the environment alone; "
        "`stepwise serve` has options for the commonest, and `stepwise --help` more commands.",
        epilog=f"settings, and their defaults:\n{config.usage()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepwise {service.__version__}")
    _, unknown = parser.parse_known_args()
    if unknown[:1] == ["convert"]:
        parser.error("`stepwise convert SOURCE TARGET` converts weights")
    if any(argument.startswith("--workers") for argument in unknown):
        parser.error(_ONE_PROCESS)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}: settings come from the environment, see --help")


if __name__ == "__main__":
    main()
