"""Every setting, once: name, default, help. Read from the environment, STEPWISE_*, when the program starts."""

import os
import textwrap
from pathlib import Path
from typing import Annotated, Literal

from platformdirs import user_cache_path
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from service.schemas import MAX_IMAGES

PREFIX = "STEPWISE_"

CommaSeparated = Annotated[tuple[str, ...], NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


class SettingsError(Exception):
    """A setting that cannot be used. The message is one line that names it."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True)

    weights: str = Field(
        "digits", description="a folder or a file: native weights, or a diffusers checkpoint; or a name in the box"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 for all")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="float32, bfloat16, or auto: bfloat16 where the hardware has instructions for it"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="compute threads; default: the cores that this process may use"
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="forward rows in one pass; default: 32 on CUDA; on the CPU 1 to 16, fewer for larger networks",
    )
    max_images: int = Field(64, ge=1, le=MAX_IMAGES, description="images in one request")
    max_queue: int = Field(
        256, ge=1, description="requests accepted and not finished; clients below their share get up to an eighth more"
    )
    max_body: ByteSize = Field(ByteSize(16 * 2**20), ge=1, description="bytes of a request body; 16MiB is understood")
    timeout: float = Field(300.0, gt=0, allow_inf_nan=False, description="the most seconds a request may take")
    drain_timeout: float = Field(
        30.0, ge=0, allow_inf_nan=False, description="seconds to finish what is accepted, after SIGTERM"
    )
    keep_alive: float = Field(
        75.0, gt=0, allow_inf_nan=False, description="seconds that a connection may be idle between two requests"
    )
    api_keys: Secrets = Field((), description="comma-separated; requests then need `Authorization: Bearer KEY`")
    public_metrics: bool = Field(False, description="where keys are set: 1 answers /metrics without one")
    allow_pickle: bool = Field(False, description="open .bin files, which are pickles: 1 if you trust them")
    cache_dir: Path = Field(
        default_factory=lambda: user_cache_path("stepwise"),
        description="folder for converted models; default: stepwise in the user's cache folder",
    )
    cors_origins: CommaSeparated = Field(
        (), description="comma-separated origins of pages that may call this; * for all"
    )
    root_path: str = Field("", pattern=r"^(/.*)?$", description="path that a proxy serves this under and strips")
    forwarded_allow_ips: str | None = Field(
        None, description="comma-separated proxies whose X-Forwarded-* headers are believed"
    )

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def read() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: naming each setting that cannot be used.
    """
    try:
        return Settings()
    except ValidationError as error:
        problems = (f"{PREFIX}{str(e['loc'][0]).upper()}={e['input']!s}: {e['msg']}" for e in error.errors())
        raise SettingsError("; ".join(problems)) from None


def unknown() -> list[str]:
    """Names in the environment that look like settings and are none."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    return sorted(name for name in os.environ if name.startswith(PREFIX) and name not in known)


def usage() -> str:
    """The table of settings, for --help."""
    lines = []
    for name, field in Settings.model_fields.items():
        default = "none" if field.default in (None, (), "") else field.default
        text = field.description or ""
        if "default:" not in text:
            text += f" (default: {_plain(default)})"
        lines.append(
            textwrap.fill(text, width=100, initial_indent=f"  {PREFIX + name.upper():<29}", subsequent_indent=" " * 31)
        )
    return "\n".join(lines)


def available_cores() -> int:
    """The cores that this process may use: its affinity, and the cgroup's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cores(Path("/sys/fs/cgroup"))
    return cores if quota is None else max(1, min(cores, quota))


def cgroup_cores(root: Path) -> int | None:
    """The CPU quota of cgroup v2 or v1, in cores, rounded up; None without one."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (root / quota_file).read_text().split()
            if period_file is not None:
                words += (root / period_file).read_text().split()
        except OSError:
            continue
        quota, period = words[0], words[1]
        if quota == "max" or int(quota) <= 0:
            return None
        return -(-int(quota) // int(period))
    return None


def _plain(value: object) -> str:
    if isinstance(value, ByteSize):
        return value.human_readable().removesuffix(".0MiB") + " MiB" if value % 2**20 == 0 else str(int(value))
    if isinstance(value, bool):
        return str(int(value))
    return f"{value:g}" if isinstance(value, float) else str(value)
