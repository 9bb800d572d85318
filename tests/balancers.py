"""The real HAProxy, configured by deploy/haproxy.cfg.template, in front of real servers."""

import os
import random
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import IO

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from tests.servers import PATIENCE, ROOT, Reachable, ServerProcess, eventually

TEMPLATE = ROOT / "deploy" / "haproxy.cfg.template"
RETRIED_BODY = 262_144  # the template's default of STEPWISE_RETRIED_BODY
MAX_BODY = RETRIED_BODY - 65_536  # of the replicas, as the template requires
QUEUE = 20  # the replicas' setting


class Replica:
    """A server at its own address, which can be restarted there after any failure."""

    def __init__(self, weights: Path, host: str, port: int) -> None:
        self.host = host
        self._settings: dict[str, object] = {
            "WEIGHTS": weights,
            "HOST": host,
            "PORT": port,
            "MAX_BODY": MAX_BODY,
            "MAX_QUEUE": QUEUE,
            "FORWARDED_ALLOW_IPS": "127.0.0.1",
            "DRAIN_TIMEOUT": PATIENCE,
        }
        self.server = ServerProcess(None, self._settings)

    def start_again(self) -> None:
        """Start the ended server again."""
        self.server.wait()
        self.server.hang_up()
        self.server = ServerProcess(None, self._settings)

    def kill(self) -> None:
        self.server.process.kill()

    def hang(self) -> None:
        self.server.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.server.process.send_signal(signal.SIGCONT)

    def end(self) -> None:
        if self.server.process.poll() is None:
            self.go_on()
            self.kill()
        self.server.wait()
        self.server.hang_up()


class Balancer(Reachable):
    """HAProxy. It resolves the replicas at `names`, and writes one line per request to `log`, if given."""

    def __init__(self, names: "Names", port: int, log: IO[bytes] | None = None) -> None:
        super().__init__()
        self._clients, self._metrics = (socket.create_server(("127.0.0.1", 0), backlog=1024) for _ in range(2))
        environment = {
            "STEPWISE_BIND": f"fd@{self._clients.fileno()}",
            "STEPWISE_METRICS_BIND": f"fd@{self._metrics.fileno()}",
            "STEPWISE_REPLICAS": f"replicas:{port}",
            "STEPWISE_DNS": "{}:{}".format(*names.address),
        }
        self.process = subprocess.Popen(
            ["haproxy", "-db", "-f", TEMPLATE],
            env={**os.environ, **environment},
            pass_fds=(self._clients.fileno(), self._metrics.fileno()),
            stdout=log or subprocess.DEVNULL,
        )

    @cached_property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._clients.getsockname()[1]}"

    @property
    def metrics_address(self) -> tuple[str, int]:
        """Host and port of HAProxy's own metrics."""
        host, port = self._metrics.getsockname()
        return host, port

    @cached_property
    def _monitor(self) -> httpx.Client:
        return httpx.Client(base_url="http://{}:{}".format(*self.metrics_address), trust_env=False)

    def wait_until(self, **wanted: int) -> None:
        """Wait until the given numbers of replicas are `up`, `down` or `nolb` (alive but not ready)."""

        def reached() -> bool:
            states = self.states()
            return all(states.count(state.upper()) == count for state, count in wanted.items())

        eventually(lambda: reached() or None)

    def wait_until_idle(self) -> None:
        """Wait until HAProxy counts no request at any replica. It balances by this count."""
        eventually(lambda: all(one.value == 0 for one in self._samples("haproxy_server_current_sessions")) or None)

    def states(self) -> list[str]:
        """Each replica's state: UP, DOWN or NOLB."""
        return [one.labels["state"] for one in self._samples("haproxy_server_status") if one.value]

    def _samples(self, name: str) -> list[Sample]:
        """HAProxy's statistics of each replica."""
        text = self._monitor.get("/metrics?scope=server&no-maint").text
        families = text_string_to_metric_families(text)
        return [sample for family in families if family.name == name for sample in family.samples]

    def end(self) -> None:
        self.hang_up()
        if "_monitor" in vars(self):
            self._monitor.close()
        self.process.kill()
        self.process.wait(PATIENCE)
        self._clients.close()
        self._metrics.close()


class Names:
    """A name server that resolves every name to the same addresses, like Docker's for a service's replicas."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._answer_all)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()
        return host, port

    def _answer_all(self) -> None:
        while True:
            query, client = self._socket.recvfrom(8192)
            if not query:  # the end
                return
            self._socket.sendto(self._answer(query), client)

    def _answer(self, query: bytes) -> bytes:
        """RFC 1035, section 4.1: the question, then an A record for each address, named by a pointer to byte 12."""
        end = query.index(0, 12) + 5
        [kind] = struct.unpack(">H", query[end - 4 : end - 2])
        addresses = self._addresses if kind == 1 else ()
        header = query[:2] + struct.pack(">HHHHH", 0x8180, 1, len(addresses), 0, 0)
        records = (struct.pack(">HHHIH", 0xC00C, 1, 1, 1, 4) + socket.inet_aton(address) for address in addresses)
        return header + query[12:end] + b"".join(records)

    def end(self) -> None:
        self._socket.sendto(b"", self.address)
        self._thread.join(PATIENCE)
        self._socket.close()


@contextmanager
def balancing(hosts: Sequence[str], port: int, log: IO[bytes] | None = None) -> Iterator[Balancer]:
    """HAProxy in front of replicas at these addresses."""
    with ExitStack() as stack:
        names = Names(hosts)
        stack.callback(names.end)
        balancer = Balancer(names, port, log)
        stack.callback(balancer.end)
        yield balancer


@contextmanager
def balanced(weights: Path, replicas: int) -> Iterator[tuple[Balancer, list[Replica]]]:
    """HAProxy in front of ready replicas."""
    hosts = [f"127.0.0.{2 + i}" for i in range(replicas)]
    port = _free_port(hosts)
    with ExitStack() as stack:
        fleet = [Replica(weights, host, port) for host in hosts]
        for replica in fleet:
            stack.callback(replica.end)
        balancer = stack.enter_context(balancing(hosts, port))
        for replica in fleet:
            assert replica.server.url
        balancer.wait_until(up=replicas)
        yield balancer, fleet


def _free_port(hosts: Sequence[str]) -> int:
    """A port that is free at all these addresses and outside the system's range of ephemeral ports."""
    [lowest, _] = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    for port in random.sample(range(1025, lowest), 1000):  # random, because another run of these tests may be active
        with ExitStack() as stack, suppress(OSError):
            for host in hosts:
                stack.enter_context(socket.create_server((host, port)))
            return port
    raise AssertionError("no port is free")
