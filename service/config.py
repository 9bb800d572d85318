"""Every setting, once: name, default, help. The program reads STEPWISE_* from the environment when it starts."""

import math
import os
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from platformdirs import user_cache_path
from pydantic import ByteSize, Field, SecretStr, ValidationError, field_validator
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model.backends import cgroups
from model.rows import Group
from service.plan.fields import MAX_IMAGES
from service.plan.recommended import EXAMPLE, Wanted, parse

PREFIX = "STEPWISE_"

# Settings of the HTTP contract for features that are not built yet. The server accepts them without effect.
PLANNED = frozenset({"LORA", "EMBEDDINGS", "TINY_VAE", "LOG_LEVEL"})

_ROOT_PATH = r"^(/|(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+/?)?$"  # RFC 3986: segments of a path
_MAX_SECONDS = 1e8  # three years; the system's timers end at 292 years
_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})", re.ASCII)
_FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
# A misspelt name of one of these would open what its owner wants closed.
_CLOSING = {
    "API_KEYS": re.compile("KEY|TOKEN|SECRET|PASSW|AUTH"),
    "RECIPE_PROMPTS": re.compile("RECIPE|PROMPT"),
    "CHECK": re.compile("CHECK(?!POINT)|SAFETY|MODERAT"),
}

_EXAMPLES = {"sizes": "sizes: 32x32,64x48", "recommended": f"as `{EXAMPLE}`", "check": "module:function"}

CommaSeparated = Annotated[tuple[str, ...], NoDecode]
Sizes = Annotated[tuple[Group, ...], NoDecode]
Recommendation = Annotated[Wanted | None, NoDecode]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode]


class SettingsError(Exception):
    """A setting that cannot be used. The message is one line that names the setting."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, env_ignore_empty=True)

    weights: str = Field(
        "digits", description="a name in the box, or the path of a checkpoint: native weights, or diffusers'"
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0 is all addresses")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    sizes: Sizes = Field(
        (),
        description="sizes of images, WIDTHxHEIGHT, with commas; the first is the default size; "
        "default: the size that the weights were trained for, and on a GPU, for models with text, its usual aspects",
    )
    recommended: Recommendation = Field(
        None,
        description="sampler, steps and guidance of requests that name none; each may be left out; "
        "timesteps=999/749/499/249 takes the place of steps; "
        "default: what the weights' files tell",
    )
    recipe_prompts: bool = Field(
        True, description="0: recipes have the SHA-256 of prompts in place of the prompts; for models with text"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="float32, bfloat16, or auto: bfloat16 where the hardware has instructions for it, "
        "else float32, or float16 for a U-Net with text on a GPU",
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="compute threads; default: the cores that this process may use"
    )
    max_batch: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="the most forward rows in one pass; on CUDA fewer are taken where a row costs as little; "
        "default: 32 on CUDA; on the CPU 1 to 16, fewer for larger networks",
    )
    max_images: int = Field(64, ge=1, le=MAX_IMAGES, description="images in one request")
    max_queue: int = Field(
        256,
        ge=1,
        description="requests that are accepted and not finished; clients below their share get up to an eighth more",
    )
    max_body: ByteSize = Field(ByteSize(16 * 2**20), ge=1, description="bytes of a request body")
    timeout: float = Field(
        300.0, gt=0, le=_MAX_SECONDS, description="seconds that a request may take, waiting included"
    )
    drain_timeout: float = Field(
        30.0, ge=0, le=_MAX_SECONDS, description="seconds after SIGTERM in which accepted requests are finished"
    )
    keep_alive: float = Field(
        75.0, gt=0, allow_inf_nan=False, description="seconds that a connection may be idle between two requests"
    )
    api_keys: Secrets = Field(
        (),
        description="keys, with commas; with any, requests need `Authorization: Bearer KEY`, "
        "or HTTP Basic with a key as the password",
    )
    public_metrics: bool = Field(False, description="1: /metrics needs no key, where keys are set")
    allow_pickle: bool = Field(False, description="1: open .bin files, which are pickles; only if you trust them")
    cache_dir: Path = Field(
        default_factory=lambda: user_cache_path("stepwise"),
        description="folder for converted networks; default: stepwise in the user's cache folder",
    )
    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65535,
        description="a second port, only for /metrics, which then needs no key; 0 takes a free one",
    )
    cors_origins: CommaSeparated = Field(
        (), description="origins, with commas, of pages that may send requests from a browser; * is all"
    )
    root_path: str = Field(
        "", pattern=_ROOT_PATH, description="path at which a proxy serves this server; the proxy takes it off"
    )
    forwarded_allow_ips: str | None = Field(
        None, description="addresses of proxies, with commas, whose X-Forwarded-* headers are believed"
    )
    check: str | None = Field(None, description="a function of Python that may refuse prompts and images")

    @field_validator("cache_dir")
    @classmethod
    def _at_home(cls, value: Path) -> Path:
        try:
            return value.expanduser()
        except RuntimeError:
            raise ValueError("there is no such user") from None

    @field_validator("sizes", mode="before")
    @classmethod
    def _read_sizes(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        sizes: list[Group] = []
        for text in map(str.strip, value.split(",")):
            found = _SIZE.fullmatch(text)
            if found is None:
                raise ValueError(
                    f"must be sizes as 64x48, width x height, with commas between them; {text[:20]!r} is none"
                )
            size = Group(height=int(found[2]), width=int(found[1]))
            if size in sizes:
                raise ValueError(f"must name each size once, and names {size} twice")
            sizes.append(size)
        return tuple(sizes)

    @field_validator("check")
    @classmethod
    def _names_a_function(cls, value: str | None) -> str | None:
        if value is not None and _FUNCTION.fullmatch(value) is None:
            raise ValueError("must name a function of Python, as my_checks:check")
        return value

    @field_validator("recommended", mode="before")
    @classmethod
    def _read_recommended(cls, value: object) -> object:
        return parse(value) if isinstance(value, str) else value

    @field_validator("api_keys", "cors_origins", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value


def read() -> Settings:
    """Read the environment.

    Raises:
        SettingsError: names each setting that cannot be used.
    """
    try:
        return Settings()
    except ValidationError as error:
        raise SettingsError("; ".join(map(_problem, error.errors()))) from None


def refuse_open(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse an environment that asks for a closed server, and would start an open one.

    Raises:
        SettingsError: API_KEYS, CHECK or RECIPE_PROMPTS is set and empty, or a name looks like a misspelt one of these.
            The message never shows a value, which may be a key.
    """
    named = {name.upper(): value for name, value in environ.items()}
    if not any(key.strip() for key in named.get(f"{PREFIX}API_KEYS", "unset").split(",")):
        raise SettingsError(
            f"{PREFIX}API_KEYS is set, but holds no key, so everyone could send requests; "
            "for a server without keys, do not set it"
        )
    if not named.get(f"{PREFIX}CHECK", "unset"):
        raise SettingsError(
            f"{PREFIX}CHECK is set, but names no function, so nothing would be checked; "
            "for a server without a check, do not set it"
        )
    if not named.get(f"{PREFIX}RECIPE_PROMPTS", "unset"):
        raise SettingsError(
            f"{PREFIX}RECIPE_PROMPTS is set, but is empty, so PNGs would have prompts; set it to 0, or do not set it"
        )
    if f"{PREFIX}API_KEY" in named:
        raise SettingsError(f"{PREFIX}API_KEY is a setting of the client; the keys of a server are {PREFIX}API_KEYS")
    for name in unknown(named):
        for meant, looks in _CLOSING.items():
            if looks.search(name.removeprefix(PREFIX)):
                raise SettingsError(
                    f"{name} is no setting, and looks like a misspelt {PREFIX}{meant}; unset or rename it"
                )


def unknown(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names in the environment that begin with STEPWISE_ and are no settings."""
    known = {PREFIX + name for name in (*map(str.upper, Settings.model_fields), *PLANNED)}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)


def without_effect(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Settings in the environment whose features are not built yet."""
    return sorted({PREFIX + name for name in PLANNED} & environ.keys())


class Described(NamedTuple):
    """A setting, described for people."""

    name: str
    default: str
    accepts: str
    meaning: str


def described() -> list[Described]:
    """Every setting, described. --help and docs/settings.md are made from this."""
    settings = []
    for name, schema in Settings.model_json_schema()["properties"].items():
        meaning, _, default = schema["description"].partition("; default: ")
        default = default or _plain(Settings.model_fields[name].default)
        settings.append(Described(PREFIX + name.upper(), default, _accepts(name, schema), meaning))
    return settings


def usage() -> str:
    """The table of settings, for --help."""
    return "\n".join(
        textwrap.fill(
            f"{setting.meaning} (default: {setting.default})",
            width=100,
            initial_indent=f"  {setting.name:<29}",
            subsequent_indent=" " * 31,
        )
        for setting in described()
    )


def available_cores() -> int:
    """The cores that this process may use: its affinity, limited by the quota of its cgroups, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.cores()
    return cores if quota is None else max(1, min(cores, math.ceil(quota)))


def _problem(error: ErrorDetails) -> str:
    """The message for an invalid setting, on one line."""
    name = f"{PREFIX}{str(error['loc'][0]).upper()}"
    return " ".join(f"{name}={str(error['input'])[:200]}: {error['msg'].removeprefix('Value error, ')}".split())


def _accepts(name: str, schema: dict[str, Any]) -> str:
    """The values that a setting accepts, in words, from its JSON schema."""
    if Settings.model_fields[name].annotation is ByteSize:
        return "bytes, or a number with a unit: 16MiB"
    if name in _EXAMPLES:
        return _EXAMPLES[name]
    schema = next((one for one in schema.get("anyOf", ()) if one["type"] != "null"), {}) | schema
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", _MAX_SECONDS)
    match schema["type"]:
        case "boolean":
            return "0 or 1"
        case "integer":
            return f"an integer, {least} to {most}" if most != _MAX_SECONDS else f"an integer, at least {least}"
        case "number":
            return f"a number, {'more than' if 'exclusiveMinimum' in schema else 'at least'} {least}"
        case "string" if "enum" in schema:
            return "one of these"
    return "a path" if schema.get("format") == "path" else "text"


def _plain(default: object) -> str:
    """A default as the environment would have it."""
    if isinstance(default, ByteSize):
        return f"{default // 2**20} MiB"
    if isinstance(default, bool):
        return str(int(default))
    if default in (None, (), ""):
        return "none"
    return f"{default:g}" if isinstance(default, float) else str(default)
