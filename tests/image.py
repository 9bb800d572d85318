"""Build the CPU image, start it like a container engine, and draw a digit with it.

    python -m tests.image [--cache FOLDER] [--mirror URL]

Needs neither a container engine nor a registry. debootstrap makes a replacement for debian:12-slim, once. buildah
builds in a chroot. unshare makes namespaces for mounts and processes. The service uses the machine's network, and
listens only on loopback. The build uses this machine's pip settings (index, certificates, wheels), and no layer keeps
them. Of the CUDA image, only the stages before torch are built. The rest would be gigabytes, and is only resolved.
"""

import argparse
import errno
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np

import service
from service.build import BOX
from tests.servers import ROOT, Reachable, read_parameters, read_png

UID = 10001
BASE = "localhost/stand-in"
SUITE = "bookworm"
TOOLS = ("buildah", "debootstrap", "unshare", "chroot", "mount")
PATIENCE = 120.0  # seconds; much longer than a start takes
COMPILERS = re.compile(r"(.*-)?(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|tcc|cpp|ld|as)(-[\d.]+)?")
PIP_SETTINGS = ("index-url", "extra-index-url", "trusted-host", "proxy", "default-timeout", "timeout", "retries")

# The equivalent of `docker run --read-only --tmpfs /tmp --tmpfs /cache`. The service is process 1.
START = """
set -e
root=$1; cache=$2; shift 2
mount --bind "$root" "$root"
mount -o remount,bind,ro "$root"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t tmpfs tmpfs "$root/tmp"
if [ "$cache" = writable ]; then mount -t tmpfs -o mode=1777 tmpfs "$root/cache"; fi
exec chroot "$@"
"""


class Failed(Exception):
    """The image is wrong, or cannot be built. The message says why."""


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Print how long the block took."""
    began = time.monotonic()
    yield
    print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def run(*command: str | Path) -> str:
    """Run a command and return its output. If it fails, the error has the end of its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if not line.startswith("WARNING: Loc")]
        raise Failed("\n".join([f"{shlex.join(map(str, command))}: exit code {done.returncode}", *lines[-30:]]))
    return done.stdout


class Builder:
    """buildah with its own storage, apart from the system's."""

    def __init__(self, work: Path, build_options: Sequence[str]) -> None:
        self._storage = ("--root", str(work / "root"), "--runroot", str(work / "run"), "--storage-driver", "vfs")
        self._build_options = build_options

    def run(self, *arguments: str | Path) -> str:
        return run("buildah", *self._storage, *arguments)

    def build(self, target: str, **build_arguments: str) -> str:
        """Build a target of the Dockerfile, and return the image's name."""
        name = f"localhost/{target}"
        given = [f"--build-arg={key}={value}" for key, value in build_arguments.items()]
        # Docker's format has health checks; OCI's has none.
        options = ("--isolation=chroot", "--format=docker", "--pull-never", f"--target={target}", f"--tag={name}")
        self.run("bud", *options, *self._build_options, *given, str(ROOT))
        return name

    def mount(self, image: str) -> Path:
        """The image's files, in a writable folder."""
        container = self.run("from", "--pull-never", image).split()[-1]
        return Path(self.run("mount", container).split()[-1])

    def inspect(self, image: str) -> dict[str, Any]:
        inspected: dict[str, Any] = json.loads(self.run("inspect", "--type=image", image))
        return inspected


def stand_in(builder: Builder, cache: Path, mirror: str, work: Path) -> None:
    """Make the base image, from an archive in the cache if there is one."""
    archive = cache / f"{SUITE}.tar"
    if not archive.exists():
        with stage(f"debootstrap of {SUITE}"):
            run("debootstrap", "--variant=minbase", SUITE, work / SUITE, mirror)
            for package in (work / SUITE / "var/cache/apt/archives").glob("*.deb"):
                package.unlink()
            made = work / archive.name
            run("tar", "--create", "--directory", work / SUITE, "--file", made, ".")
            made.rename(archive)
            shutil.rmtree(work / SUITE)
    with stage("base image"):
        (work / "base").mkdir()
        (work / "base" / "Dockerfile").write_text(f"FROM scratch\nADD {archive.name} /\n")
        shutil.copy(archive, work / "base")
        builder.run("bud", "--isolation=chroot", "--format=docker", f"--tag={BASE}", work / "base")
        shutil.rmtree(work / "base")


def pip_settings() -> dict[str, str]:
    """This machine's pip settings, by name. The environment's take precedence, as in pip."""
    listed = re.findall(
        r"^(global|install|:env:)\.(\S+?)='(.*)'$", run(sys.executable, "-m", "pip", "config", "list"), re.M
    )
    order = ("global", "install", ":env:")
    return {name: value for _, name, value in sorted(listed, key=lambda found: order.index(found[0]))}


def hand_over_pip(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Write pip's settings to a folder that the build sees at /mnt. Return buildah's options and build arguments."""
    folder.mkdir()
    here = pip_settings()
    handed = {name: here[name] for name in PIP_SETTINGS if name in here}
    if "extra-index-url" in handed:
        handed["extra-index-url"] = " ".join(u for u in handed["extra-index-url"].split() if not u.startswith("file:"))
    if "cert" in here:
        shutil.copy(here["cert"], folder / "ca.pem")
        handed["cert"] = "/mnt/ca.pem"
    links = []
    for link in here.get("find-links", "").split():
        if Path(link).is_dir():
            for wheel in Path(link).glob("*.whl"):
                shutil.copy(wheel, folder)
            links.append("/mnt")
        else:
            links.append(link)
    handed["find-links"] = " ".join(links)
    lines = [f"{name} = {value}\n" for name, value in handed.items() if value]
    (folder / "pip.conf").write_text("".join(["[global]\n", *lines]))
    options = [f"--volume={folder}:/mnt:ro", f"--secret=id=pip,src={folder / 'pip.conf'}"]
    # If a wheel of the CPU build is here, the build uses only pip's index.
    at_hand = any(folder.glob("torch-*+cpu-*.whl"))
    return options, {"TORCH_INDEX": handed.get("index-url", "https://pypi.org/simple")} if at_hand else {}


def check_files(root: Path) -> None:
    """Check which files the image has and lacks."""
    programs = [
        path.name for folder in ("usr/bin", "usr/local/bin", "opt/venv/bin") for path in (root / folder).iterdir()
    ]
    compilers = [name for name in programs if COMPILERS.fullmatch(name)]
    require(not compilers, f"compilers are in the image: {compilers}")

    unwanted, of_the_user = [], []
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            shown = f"/{path.relative_to(root)}"
            if name in ("pip", ".cache") or path.suffix in (".whl", ".deb"):
                unwanted.append(shown)
            if path.lstat().st_uid == UID:
                of_the_user.append(shown)
    for left in ("etc/pip.conf", "run/secrets", "requirements"):
        unwanted += [f"/{left}"] if (root / left).exists() else []
    for emptied in ("mnt", "tmp", "var/lib/apt/lists"):
        unwanted += [f"/{emptied}/{path.name}" for path in (root / emptied).iterdir()]
    require(not unwanted, f"left in the image: {unwanted}")
    require(of_the_user == ["/cache"], f"the user owns {of_the_user}")

    for folder, share in (
        ("app", 1.0),
        ("opt/venv", 0.99),
    ):  # packages have files for other versions of Python
        sources = list((root / folder).rglob("*.py"))
        compiled = [path for path in sources if list((path.parent / "__pycache__").glob(f"{path.stem}.cpython-*.pyc"))]
        require(len(compiled) >= share * len(sources) > 0, f"/{folder}: {len(compiled)} of {len(sources)} are compiled")
    boxes = [
        {path.parent.name for path in folder.glob("*/model.safetensors")} for folder in (root / "app/weights", BOX)
    ]
    require(boxes[0] == boxes[1] != set(), f"the weights in the image are {boxes[0]}; in the box are {boxes[1]}")
    require(not list((root / "app/weights").rglob("*.py")), "the recipe of the weights is in the image")


def check_configuration(config: Mapping[str, Any], revision: str) -> None:
    """Check the configuration that engines read."""
    labels = {name.rpartition(".")[2]: value for name, value in config["Labels"].items()}
    wanted = {"title": "stepwise", "licenses": "Apache-2.0", "version": service.__version__, "revision": revision}
    require(wanted.items() <= labels.items(), f"labels: {labels}")
    require(bool(labels.get("description")), "no description")
    require(config["User"] == f"{UID}:{UID}", f"user: {config['User']}")
    require(config["StopSignal"] == "SIGTERM", f"stop signal: {config['StopSignal']}")
    require(list(config["ExposedPorts"]) == ["8000/tcp"], f"ports: {config['ExposedPorts']}")
    require(config["Healthcheck"]["Test"][0] == "CMD", f"health check: {config['Healthcheck']}")


class Container(Reachable):
    """Runs the image's entry point in its own namespaces, with the image's user and environment and read-only files."""

    def __init__(self, root: Path, config: Mapping[str, Any], cache: str, log: Path) -> None:
        super().__init__()
        self._root, self._config, self._log = root, config, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        service_command = self._in_chroot(config["Entrypoint"], STEPWISE_HOST="127.0.0.1", STEPWISE_PORT=str(self.port))
        namespaces = ("--mount", "--pid", "--fork", "--ipc")
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", START, "start", str(root), cache, *service_command],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
        )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def lines(self) -> list[dict[str, Any]]:
        """The log so far."""
        return [json.loads(line) for line in self._log.read_text().splitlines() if line.startswith("{")]

    def wait_for_process(self) -> int:
        """The service's process id outside the namespace, once it exists. Its ancestors are unshare and tini."""
        found: list[int] = []

        def has_come() -> bool:
            found[:] = [grandchild for child in children(self._process.pid) for grandchild in children(child)]
            return len(found) == 1 and uids(found[0]) == {UID}

        self._wait(has_come, "there is no process")
        return found[0]

    def wait_ready(self) -> None:
        def is_ready() -> bool:
            try:
                return self.client.get("/health/ready").is_success
            except httpx.TransportError:
                return False

        self._wait(is_ready, "not ready")

    def is_healthy(self, port: int) -> bool:
        """Run the image's health check for the service at a port."""
        command = self._in_chroot(self._config["Healthcheck"]["Test"][1:], STEPWISE_PORT=str(port))
        return subprocess.run(["chroot", *command], capture_output=True).returncode == 0

    def stop(self, within: float) -> int:
        """Send SIGTERM to process 1, like engines, and return the exit code."""
        for number_one in children(self._process.pid):
            os.kill(number_one, signal.SIGTERM)
        try:
            return self._process.wait(within)
        except subprocess.TimeoutExpired:
            raise Failed(f"{within:g} s after SIGTERM it still runs\n{self._log.read_text()}") from None

    def close(self) -> None:
        self.hang_up()
        if self._process.poll() is None:
            for number_one in children(self._process.pid):  # ends everything in its namespace
                os.kill(number_one, signal.SIGKILL)
            self._process.kill()
            self._process.wait()

    def _in_chroot(self, command: Sequence[str], **changes: str) -> list[str]:
        """chroot's arguments to run a command with the image's configuration."""
        environment = dict(variable.split("=", 1) for variable in self._config["Env"]) | {"HOME": "/cache"} | changes
        given = [f"{name}={value}" for name, value in environment.items()]
        user = ("--groups=", f"--userspec={self._config['User']}", str(self._root))
        return [*user, "/usr/bin/env", "-i", f"--chdir={self._config['WorkingDir']}", *given, *command]

    def _wait(self, until: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not until():
            over = self._process.poll() is not None
            require(not over and time.monotonic() < deadline, f"{otherwise}\n{self._log.read_text()}")
            time.sleep(0.05)


@contextmanager
def started(root: Path, config: Mapping[str, Any], cache: str, log: Path) -> Iterator[Container]:
    """Start the image. If `writable`, the cache is a tmpfs."""
    container = Container(root, config, cache, log)
    try:
        yield container
    finally:
        container.close()


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:  # has ended meanwhile
        return []


def uids(pid: int) -> set[int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {int(uid) for uid in status["Uid"].split()}


def draw(container: Container) -> bytes:
    """Draw a seven and check it."""
    answer = container.client.get("/sample", params={"seed": 7, "class_label": 7})
    require(answer.status_code == 200, answer.text)
    png = answer.content
    pixels = read_png(png)
    parameters = read_parameters(png)
    require(pixels.shape == (32, 32), f"the image is {pixels.shape}")
    require(parameters["seed"] == 7, f"the image says {parameters}")
    frame = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    ink = float((pixels > 127).mean())
    require(frame.max() < 64 and pixels.max() > 200 and 0.04 < ink < 0.4, f"that is no digit: {pixels.tolist()}")
    require(container.client.get("/sample", params={"seed": 7, "class_label": 7}).content == png, "other bytes")
    return png


def show(png: bytes) -> None:
    """The digit as text. Each line of text shows two lines of pixels."""
    for row in read_png(png).astype(int).reshape(16, 2, 32).mean(axis=1):
        print("  " + "".join(" .:*#"[min(4, int(value) // 52)] for value in row).rstrip())


def check_read_only(pid: int) -> None:
    """Try to write as root in the service's namespace."""
    for folder in ("", "app", "opt/venv", "etc", "weights", "usr/bin", "var/tmp"):
        try:
            Path(f"/proc/{pid}/root", folder, "written").touch()
        except OSError as error:
            require(error.errno == errno.EROFS, f"/{folder}: {error}")
        else:
            raise Failed(f"/{folder} can be written")


def check_service(root: Path, config: Mapping[str, Any], work: Path) -> None:
    """Start the image with a cache, without a cache, and once to stop it at once."""
    with stage("start, digit, stop"), started(root, config, "writable", work / "log") as container:
        pid = container.wait_for_process()
        container.wait_ready()
        png = draw(container)
        show(png)
        require("<title>Stepwise" in container.client.get("/").text, "there is no playground")
        require(uids(pid) == {UID}, f"it runs as {uids(pid)}")
        check_read_only(pid)
        require(any(Path(f"/proc/{pid}/root/cache").iterdir()), "nothing is in the cache")
        require(container.is_healthy(container.port), "the health check fails")
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            require(not container.is_healthy(silent.getsockname()[1]), "the health check is content with no service")
        code = container.stop(within=30.0)
        require(code == 0, f"after SIGTERM the exit code is {code}")
        require(all(line["level"] == "info" for line in container.lines), f"the log: {container.lines}")
        print(next(line["message"] for line in container.lines if line["message"].startswith("ready at")))

    with stage("the same without a cache"), started(root, config, "read-only", work / "log") as container:
        container.wait_ready()
        require(draw(container) == png, "without a cache, it draws other bytes")
        require(container.stop(within=30.0) == 0, "the exit code is not 0")
        warnings = [line["message"] for line in container.lines if line["level"] != "info"]
        require(len(warnings) == 1 and "Read-only file system" in warnings[0], f"its warnings: {warnings}")

    with stage("SIGTERM at once"), started(root, config, "writable", work / "log") as container:
        container.wait_for_process()
        code = container.stop(within=5.0)
        require(code == 128 + signal.SIGTERM, f"after SIGTERM the exit code is {code}")


def check_cuda(builder: Builder) -> None:
    """Build the stages of the CUDA image before torch, and resolve the rest."""
    with stage("cuda, as far as the stage cuda-locked"):
        builder.build("cuda-locked", BASE_IMAGE=BASE)
    locks = [f"--requirement=requirements/{name}.lock" for name in ("service", "cuda")]
    with stage("cuda, resolved for Python 3.12 on x86_64"):
        uv = Path(sys.executable).with_name("uv")
        options = ("--dry-run", "--require-hashes", "--only-binary=:all:", "--python-version=3.12")
        with tempfile.TemporaryDirectory() as nowhere:
            where = ("--python-platform=x86_64-manylinux_2_28", "--python", sys.executable, "--target", nowhere)
            resolved = run(uv, "pip", "install", *options, *where, *locks)
    found = re.search(r"Would install (\d+) packages", resolved)
    require(found is not None, resolved)
    print(f"  {found and found[1]} packages fit together, with the locked hashes and by what their metadata say.")
    print("  Not done: torch's CUDA build was not downloaded or installed, and nothing ran on a GPU;")
    print(f"  the base was {BASE}, not that of the Dockerfile.")


def size(root: Path) -> float:
    """The size of the files, in MB."""
    return sum(path.lstat().st_size for path in root.rglob("*") if path.is_symlink() or path.is_file()) / 1e6


def missing() -> str | None:
    """Why this cannot run here."""
    tools = [tool for tool in TOOLS if shutil.which(tool) is None]
    if tools:
        return f"{', '.join(tools)} not found: apt-get install buildah debootstrap"
    if os.geteuid() != 0:
        return "this needs root"
    if subprocess.run(["unshare", "--mount", "--pid", "--ipc", "--fork", "true"], capture_output=True).returncode:
        return "no namespaces can be made here"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.image",
        description="Build the image for the CPU, start it, draw with it. Skips, and says why, where that cannot be.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    default = Path("~/.cache/stepwise/image-test").expanduser()
    parser.add_argument("--cache", type=Path, default=default, help="folder for the base's archive; work is done there")
    parser.add_argument("--mirror", default="http://deb.debian.org/debian", help="where debootstrap gets Debian")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"skipped: {reason}")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # runs the clean-up
    cache: Path = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    revision = run("git", "rev-parse", "HEAD").strip()
    try:
        with stage("all"), tempfile.TemporaryDirectory(prefix="work-", dir=cache) as folder:
            work = Path(folder)
            options, torch_index = hand_over_pip(work / "pip")
            builder = Builder(work, options)
            stand_in(builder, cache, arguments.mirror, work)
            with stage("cpu"):
                image = builder.build(
                    "cpu", CPU_BASE_IMAGE=BASE, VERSION=service.__version__, REVISION=revision, **torch_index
                )
            with stage("look into it"):
                root = builder.mount(image)
                config = builder.inspect(image)["Docker"]["config"]
                check_files(root)
                check_configuration(config, revision)
            print(f"  {size(root):.0f} MB unpacked; {size(root / 'opt/venv'):.0f} MB of them are packages")
            check_service(root, config, work)
            check_cuda(builder)
    except Failed as failure:
        sys.exit(f"failed: {failure}")


if __name__ == "__main__":
    main()
