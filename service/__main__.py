"""python -m service: runs the app on uvicorn. Only the environment gives settings."""

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import FrameType
from typing import NoReturn

import uvicorn
from starlette.types import ASGIApp

import service
from service import config
from service.build import START_ERRORS, StartError, build
from service.config import Settings
from service.engine.engine import Engine
from service.http import logs
from service.http.app import ByPort, create_app, create_metrics_app
from service.http.connections import Connection
from service.http.metrics import Metrics
from service.plan.served import Served
from service.slow import too_slow

log = logging.getLogger("service")

FAREWELL_S = 2.0  # how long health checks report an engine beyond help before the process ends
CLIENT_PATIENCE_S = 60.0  # a client that receives nothing for this long has left


class Server(uvicorn.Server):
    """uvicorn with a drain: after a signal, the engine finishes its requests while the server still listens."""

    def __init__(self, app: ASGIApp, engine: Engine, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",  # with an installed WebSocket library, uvicorn would bypass `Connection`
                log_config=None,
                access_log=False,
                server_header=False,
                workers=1,  # else uvicorn reads WEB_CONCURRENCY
                root_path=settings.root_path.rstrip("/"),
                timeout_keep_alive=settings.keep_alive,  # type: ignore[arg-type]  # fractions of a second work
                proxy_headers=settings.forwarded_allow_ips is not None,
                forwarded_allow_ips=settings.forwarded_allow_ips,
            )
        )
        self._engine = engine
        self._drain_timeout = settings.drain_timeout
        self._draining = False
        self._until = math.inf  # when draining ends
        self._connections_drain = False
        self._farewell: float | None = None  # when the server noticed an engine beyond help

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if not self._draining:
            self._draining = True
            threading.Thread(target=self._drain, args=(signal.Signals(sig).name,), name="drain", daemon=True).start()
        elif sig == signal.SIGINT:  # a second Ctrl-C waits for no request
            self._until = time.monotonic()
            threading.Thread(target=self._engine.close, name="hurry", daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """Close idle connections while draining, and stop when the engine is beyond help.

        uvicorn calls this ten times a second.
        """
        if self._engine.status == "draining" and not self._connections_drain:
            self._connections_drain = True
            for connection in list(self.server_state.connections):
                assert isinstance(connection, Connection)
                connection.drain()
        if self._engine.beyond_help is not None:
            self._farewell = self._farewell or time.monotonic()
            if time.monotonic() - self._farewell >= FAREWELL_S:
                self.config.timeout_graceful_shutdown = math.ceil(FAREWELL_S)
                self.should_exit = True
        return await super().on_tick(counter)

    def _drain(self, signal_name: str) -> None:
        self._engine.drain()
        self._until = time.monotonic() + self._drain_timeout
        log.info("%s: draining", signal_name)
        if not self._engine.wait_idle(self._drain_timeout):
            log.warning("not all requests were done within %g s", self._drain_timeout)
        self._engine.close()
        # uvicorn uses the remaining time to send answers, and to receive unfinished requests.
        self.config.timeout_graceful_shutdown = max(1, math.ceil(self._until - time.monotonic()))
        self.should_exit = True


def main() -> None:
    _read_arguments()
    try:
        serve()
    except START_ERRORS as error:
        sys.exit(f"stepwise: {error}")


def serve(when_ready: Callable[[str], None] = lambda _: None) -> NoReturn:
    """Serve with the settings of the environment.

    A signal ends the process with exit code 0. An engine beyond help ends the process with exit code 1.

    Args:
        when_ready: called with the server's URL on its own thread, once the server accepts requests.

    Raises:
        START_ERRORS: the server cannot start.
    """
    began = time.monotonic()
    logs.configure()
    for early in (signal.SIGINT, signal.SIGTERM):  # before there is a server
        signal.signal(early, _leave)
    config.refuse_open()
    settings = config.read()
    refuse_workers()
    for name in config.unknown():
        log.warning("%s is set, and is no setting", name)
    if planned := config.without_effect():
        log.warning("not built yet, so without effect: %s", ", ".join(planned))
    with ExitStack() as stack:
        listeners = [stack.enter_context(listener) for listener in listen_all(settings)]
        engine, served, metrics = build(settings)
        app = make_app(engine, served, settings, metrics, listeners)
        url, *more = (_url(*listener.getsockname()[:2]) for listener in listeners)
        for metrics_url in more:
            log.info("metrics at %s/metrics", metrics_url)
        announced = engine, served, settings, url, began, when_ready
        threading.Thread(target=_announce, args=announced, daemon=True).start()
        server = Server(app, engine, settings)
        for late in (signal.SIGINT, signal.SIGTERM):  # uvicorn restores these handlers, and then closes its loop
            signal.signal(late, server.handle_exit)
        server.run(sockets=listeners)
    if engine.beyond_help is not None:
        if engine.scheduler is None:
            raise StartError(engine.beyond_help)
        logging.shutdown()
        os._exit(1)  # a thread that hangs in the device's driver would keep the process alive
    if not server.started:
        raise StartError("the server could not start; its log says why")
    _leave()


def _leave(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second SIGTERM changes nothing
    sys.exit(0)


def refuse_workers() -> None:
    """Refuse an environment that makes uvicorn start several processes.

    Raises:
        StartError: WEB_CONCURRENCY asks for more than one process.
    """
    if os.environ.get("WEB_CONCURRENCY", "1") not in ("", "1"):
        raise StartError(f"WEB_CONCURRENCY={os.environ['WEB_CONCURRENCY']}: {_ONE_PROCESS}")


def listen_all(settings: Settings) -> list[socket.socket]:
    """The main listener, and the listener of METRICS_PORT if the setting is set.

    Raises:
        StartError: an address cannot be bound. All listeners are closed.
    """
    main = listen(settings)
    if settings.metrics_port is None:
        return [main]
    try:
        return [main, _listen(settings.host, settings.metrics_port, f"{config.PREFIX}METRICS_PORT: ")]
    except StartError:
        main.close()
        raise


def listen(settings: Settings) -> socket.socket:
    """Bind the address before the weights are loaded, so that a taken port is reported early.

    Raises:
        StartError: the address cannot be bound.
    """
    return _listen(settings.host, settings.port)


def _listen(host: str, port: int, whose: str = "") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio disables Nagle's algorithm only if the protocol is named. The algorithm delays each answer by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux; all connections inherit the option
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * CLIENT_PATIENCE_S))
    try:
        listener.bind((host, port))
        listener.listen()  # two servers can bind one port, but only one can listen
    except (OSError, ValueError) as error:  # ValueError: an impossible host name
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise StartError(f"{whose}cannot listen on {host}:{port}: {reason}") from None
    return listener


def make_app(
    engine: Engine, served: Served, settings: Settings, metrics: Metrics, listeners: Sequence[socket.socket]
) -> ASGIApp:
    """The app for all listeners of `listen_all`."""
    app = create_app(engine, served, settings, metrics)
    if settings.metrics_port is None:
        return app
    metrics_port = listeners[1].getsockname()[1]
    return ByPort(app, metrics_port, create_metrics_app(engine, served, settings, metrics))


def _url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _announce(
    engine: Engine,
    served: Served,
    settings: Settings,
    url: str,
    began: float,
    when_ready: Callable[[str], None],
) -> None:
    engine.wait_loaded()
    if engine.status == "ready" and engine.scheduler is not None:
        took = time.monotonic() - began
        log.info("ready at %s, serving %s on %s, %.1f s after the start", url, served.model.name, served.device, took)
        if (warning := too_slow(engine.scheduler.machine, served, settings)) is not None:
            log.warning("%s", warning)
        when_ready(url)


_ONE_PROCESS = (
    "one process owns one device, so several workers are refused: "
    "run one process a device behind a load balancer, each with its own STEPWISE_PORT"
)


def _read_arguments() -> None:
    """Answer --help and --version, and refuse all other arguments."""
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
