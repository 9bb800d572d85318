"""python -m service: settings → weights → runner → engine → app → uvicorn."""

import argparse
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
import uvicorn

import service
from model.backends.choose import choose, choose_first_stage
from model.backends.network import denoiser
from model.checkpoints import native
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import convert, load
from model.description import ModelDescription
from model.noise import first_draw
from model.rows import Row
from model.runner import SlotRunner
from model.samplers import denoise_table
from service import config, logs
from service.app import create_app
from service.config import Settings, SettingsError
from service.connections import Connection
from service.engine import Engine
from service.metrics import Metrics
from service.places import Places
from service.served import Served, fingerprint_parts

log = logging.getLogger("service")

BOX = Path(__file__).parent.parent / "weights"  # the weights in the box
CLIENT_PATIENCE_S = 60.0  # a client that takes in nothing for so long has left


class StartError(Exception):
    """The program cannot start. The message is one line for the operator."""


class Server(uvicorn.Server):
    """uvicorn, but a signal first lets the engine finish what it has, while the server goes on listening."""

    def __init__(self, uvicorn_config: uvicorn.Config, engine: Engine, drain_timeout: float) -> None:
        super().__init__(uvicorn_config)
        self._engine = engine
        self._drain_timeout = drain_timeout
        self._draining = False
        self._until = math.inf  # when draining ends

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
    began = time.monotonic()
    arguments = _arguments()
    if "target" in arguments:
        _convert(arguments.source, arguments.target)
        return
    logs.configure()
    for early in (signal.SIGINT, signal.SIGTERM):  # before the server takes them, and after
        signal.signal(early, _leave)
    try:
        settings = config.read()
        refuse_workers()
        for name in config.unknown():
            log.warning("%s is set, and is no setting", name)
        listener = listen(settings)
        engine, served, metrics = build(settings)
    except (SettingsError, StartError, CheckpointError) as error:
        sys.exit(f"stepwise: {error}")
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
    host, port = listener.getsockname()[:2]
    threading.Thread(target=_announce, args=(engine, served, host, port, began), daemon=True).start()
    Server(uvicorn_config, engine, settings.drain_timeout).run(sockets=[listener])
    _leave()


def _convert(source: str, target: Path) -> None:
    try:
        settings = config.read()
        converted = convert(find_weights(source), target, settings.allow_pickle).description
    except (SettingsError, StartError, CheckpointError, OSError) as error:
        sys.exit(f"stepwise: {error}")
    shape = "x".join(map(str, converted.image_shape[1:]))
    print(f"{target}: {converted.name}, {converted.num_parameters:,} parameters, draws images of {shape}")
    print(f"serve it with STEPWISE_WEIGHTS={target}")


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


def build(settings: Settings) -> tuple[Engine, Served, Metrics]:
    """Load the weights and put the engine together.

    Raises:
        StartError, CheckpointError: for what cannot be served.
    """
    device = choose_device(settings.device)
    threads = settings.threads or config.available_cores()
    torch.set_num_threads(threads)
    checkpoint = load(find_weights(settings.weights), settings.allow_pickle)
    model = checkpoint.description
    if model.image_shape[0] not in (1, 3):
        raise StartError(f"weights {model.name}: in_channels is {model.image_shape[0]}; a PNG has 1 (grey) or 3 (RGB)")

    how = device, settings.precision, threads
    backend = choose(denoiser(checkpoint.network, model), *how, settings.max_batch, settings.cache_dir)
    first_stage = None
    if checkpoint.autoencoder is not None:
        first_stage = choose_first_stage(checkpoint.autoencoder, model, *how, settings.cache_dir)
    no_label = 0 if model.no_label is None else model.no_label  # 0 where the network has no classes, or only those
    runner = SlotRunner(backend, model.sample_shape, no_label, slots=backend.widths[-1])

    computing = backend.fingerprint if first_stage is None else {**backend.fingerprint, **first_stage.fingerprint}
    served = Served(
        model=model,
        device=str(device),
        fingerprint_parts=fingerprint_parts(model, computing, torch.__version__),
        reproducible=backend.reproducible and (first_stage is None or first_stage.reproducible),
        first_draw=first_draw,
        preview=None if first_stage is None else first_stage.preview,
    )
    metrics = Metrics()
    places = Places(settings.max_queue, clients=max(1, len(settings.api_keys)))
    engine = Engine(runner, probe_row(model), places, metrics, first_stage=first_stage)
    metrics.watch(engine, served)
    return engine, served, metrics


def probe_row(model: ModelDescription) -> Row:
    """A row of few steps that shows that the model works."""
    t = model.schedule.num_train_timesteps // 2
    return Row(denoise_table(model.schedule, "ddim", t, min(2, max(1, t))), seed=0)


def choose_device(name: str) -> torch.device:
    """The device of a DEVICE setting.

    Raises:
        StartError: for a CUDA device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise StartError(f"STEPWISE_DEVICE={name}: this machine, or this build of torch, has no CUDA device")
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        raise StartError(f"STEPWISE_DEVICE={name}: the CUDA devices are cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


def find_weights(name: str) -> Path:
    """The path of a WEIGHTS setting: a name in the box, or that of a folder or a file.

    Raises:
        StartError: where there is none.
    """
    in_the_box = sorted(path.parent.name for path in BOX.glob(f"*/{native.WEIGHTS}"))
    if name in in_the_box:
        return BOX / name
    path = Path(name).expanduser()
    if path.exists():
        return path
    raise StartError(
        f"STEPWISE_WEIGHTS={name} is neither a file nor a folder; in the box: {', '.join(in_the_box) or 'nothing'}"
    )


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


def _announce(engine: Engine, served: Served, host: str, port: int, began: float) -> None:
    engine.wait_loaded()
    if engine.status == "ready":
        shown = f"[{host}]" if ":" in host else host
        log.info(
            "ready at http://%s:%d, serving %s on %s, %.1f s after the start",
            shown,
            port,
            served.model.name,
            served.device,
            time.monotonic() - began,
        )


_ONE_PROCESS = (
    "one process owns one device, so several workers are refused: "
    "run one process a device behind a load balancer, each with its own STEPWISE_PORT"
)


def _arguments() -> argparse.Namespace:
    """Read the command line: `convert` with its two arguments, or nothing at all, which serves."""
    if sys.argv[1:2] == ["convert"]:
        converter = argparse.ArgumentParser(
            prog="python -m service convert",
            description="Write a checkpoint as native weights, config.json and model.safetensors. They load alone, are "
            "safe to open and draw the same bytes. Pickles are opened only with STEPWISE_ALLOW_PICKLE=1.",
        )
        converter.add_argument("source", metavar="SOURCE", help="a folder or a file, as STEPWISE_WEIGHTS")
        converter.add_argument("target", metavar="TARGET", type=Path, help="the folder to write, new or empty")
        return converter.parse_args(sys.argv[2:])
    parser = argparse.ArgumentParser(
        prog="python -m service",
        usage="python -m service [-h] [--version]\n       python -m service convert SOURCE TARGET",
        description="Serve a diffusion U-Net over HTTP, or convert a checkpoint to native weights. "
        "Settings come from the environment.",
        epilog=f"settings, and their defaults:\n{config.usage()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"stepwise {service.__version__}")
    arguments, unknown = parser.parse_known_args()
    if any(argument.startswith("--workers") for argument in unknown):
        parser.error(_ONE_PROCESS)
    if unknown:
        parser.error(f"unknown argument {unknown[0]}: settings come from the environment, see --help")
    return arguments


if __name__ == "__main__":
    main()
