"""Schemathesis checks running servers against their /openapi.json.

The checks are Schemathesis's own. Valid data must be accepted, except for the documented 431 of long addresses, 503 and
504, and for a 422 that no schema can express. Such a 422 must be documented and must apply to the request.

Schemathesis runs as a program, which imports this file for its hooks.
"""

import base64
import collections
import itertools
import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import strategies as st
from PIL import Image as PillowImage
from schemathesis.core.failures import AcceptedNegativeData, Failure
from schemathesis.core.transport import Response
from schemathesis.openapi.checks import RejectedPositiveData

from model.samplers import SAMPLERS
from model.schedule import Schedule
from service.http.a1111.options import CLIP_SKIP
from service.plan.shared_fields import MAX_PROMPT, MAX_SEED
from tests.checkpoints import save_latent_pipeline
from tests.engines import FakeRunner
from tests.reference import DDIMScheduler
from tests.servers import ROOT, Json, Reachable, serving, side_by_side
from tests.test_pictures import file
from tests.texts import like_xl, serving_text, tokenize_twice

MOST_IMAGES = 3  # in one request
LONG = 5  # seconds, enough for any request here
FEWEST = 19  # steps that every sampler can take from 20 timesteps
NUM_CASES = 1050  # per server, at least
NAMES = ("digits-4step", "rgb", "latent", "text")

MEDIA_TYPES = (
    *("image/png", "image/webp", "image/jpeg", "application/zip", "application/x-npy"),
    *("text/event-stream", "application/problem+json"),
)
PROGRAM = Path(sys.executable).with_name("schemathesis")
OPTIONS = ("--continue-on-failure", "--no-color", "--report", "ndjson")
CONFIG = """
[generation]
deterministic = true
database = "none"

[phases.stateful]
enabled = false

[phases.fuzzing]
generation.max-examples = 120

[checks]
not_a_server_error.expected-statuses = ["2xx", "304", "4xx", "503", "504"]
positive_data_acceptance.expected-statuses = ["2xx", "304", "431", "503", "504"]
negative_data_rejection.expected-statuses = ["404", "406", "415", "422", "431"]
"""


IMAGES = ("image", "mask_image")
CLEAR = base64.b64encode(file(PillowImage.new("LA", (4, 4)))).decode()  # all of it is transparent
FILES: dict[str, str] = {}  # an image of the server's size, once the document is loaded

Case = schemathesis.Case[Any]

# Hooks.


@schemathesis.hook
def before_load_schema(context: schemathesis.HookContext, raw_schema: Json) -> None:
    """A file in a form is an image, the document's own example."""
    body = raw_schema["paths"]["/noise"]["post"]["requestBody"]
    image = FILES["base64"] = body["content"]["application/json"]["example"]["image"]
    schemathesis.openapi.format("binary", st.just(base64.b64decode(image)))


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: Case, kwargs: Json) -> None:
    """Base64 in JSON is the same image. Each media type is requested in turn."""
    definition = case.operation.definition.raw
    if case.media_type == "application/json" and isinstance(case.body, dict):
        case.body |= {name: FILES["base64"] for name in IMAGES if is_base64(case.body.get(name))}
        case.body |= {name: CLEAR for name in ("mask",) if case.body.get(name) and is_base64(case.body[name])}
        if isinstance(listed := case.body.get("init_images"), list):
            case.body["init_images"] = [FILES["base64"] if is_base64(one) else one for one in listed]
    media_types = list(definition["responses"]["200"]["content"])
    choice = zlib.crc32(repr((case.query, case.body)).encode()) % len(media_types)
    # WebP and JPEG are for clients that do not take a PNG by a wildcard.
    case.headers["Accept"] = f"{media_types[choice]}, image/png;q=0.2, */*;q=0.1"


@schemathesis.hook
def filter_failure(context: schemathesis.HookContext, failure: Failure, case: Case, response: Response) -> bool:
    if isinstance(failure, AcceptedNegativeData):
        if isinstance(case.body, bytes) and not case.body.strip():
            return False  # blanks alone are an empty body
        return not (case.media_type == "multipart/form-data" and isinstance(case.body, dict) and has_nothing(case.body))
    return not (isinstance(failure, RejectedPositiveData) and is_beyond_the_schema(case, response))


def has_nothing(form: Mapping[str, object]) -> bool:
    """An empty list in a form is sent as nothing, which Schemathesis takes for invalid data."""
    return [] in form.values()


def is_base64(text: object) -> bool:
    if not isinstance(text, str):
        return False
    try:
        base64.b64decode("".join(text.rpartition(";base64,")[2].split()), validate=True)
    except ValueError:
        return False
    return True


def read(value: object) -> object:
    """The value of a query's text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value


def given(fields: Mapping[str, Any], name: str, default: Any) -> Any:
    value = fields.get(name)
    return default if value is None else value


def no_label(fields: Mapping[str, Any]) -> bool:
    labels = fields.get("class_label")
    return all(label is None for label in (labels if isinstance(labels, list) else [labels]))


def falls(timesteps: Any) -> bool:
    listed = timesteps if isinstance(timesteps, list) else [timesteps]
    return all(before > after for before, after in itertools.pairwise(listed))


def is_too_much_text(fields: Mapping[str, Any], name: str) -> bool:
    """More bytes than are allowed, or a list that is not as long as the images."""
    texts = fields[name] if isinstance(fields[name], list) else [fields[name]]
    return any(len(str(text).encode()) > MAX_PROMPT for text in texts) or (
        texts is fields[name] and len(texts) != given(fields, "num_images", 1)
    )


def is_falling(interval: Any) -> bool:
    begin, end = (float(share) for share in (interval.split(",") if isinstance(interval, str) else interval))
    return begin > end


# Documented rules that no schema can express, by the field that the 422 names.
BEYOND_THE_SCHEMA: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "guidance_scale": lambda f: f["guidance_scale"] > 1 and no_label(f),
    "prompt": lambda f: is_too_much_text(f, "prompt"),
    "negative_prompt": lambda f: is_too_much_text(f, "negative_prompt"),
    "class_label": lambda f: isinstance(f["class_label"], list) and len(f["class_label"]) != given(f, "num_images", 1),
    "seed": lambda f: f["seed"] + given(f, "num_images", 1) > MAX_SEED + 1,
    "preview_every": lambda f: f["preview_every"] > given(f, "num_inference_steps", 1),
    "eta": lambda f: f["eta"] != 0 and given(f, "sampler", "ddim") != "ddim",
    "num_inference_steps": lambda f: (
        given(f, "num_inference_steps", 20) > max(1, f.get("timestep", FEWEST))
        or (given(f, "num_inference_steps", 20) == 1 and given(f, "sampler", "ddim") in ("euler", "euler_a", "heun"))
        or given(f, "sampler", "ddim") in ("lcm", "tcd")  # have 50 steps of their own, more than the timesteps
    ),
    "timeout_s": lambda f: f["timeout_s"] < LONG,
    "strength": lambda f: f.get("image") is None or given(f, "num_inference_steps", 1) * given(f, "strength", 0.8) < 1,
    "mask": lambda f: f.get("mask") is not None,  # nothing in it is transparent
    "fit": lambda f: f.get("image") is None,
    "paste_original": lambda f: f["paste_original"] is True,  # without a mask, or where latents are answered
    "mask_image": lambda f: f.get("image") is None,
    "sigma_schedule": lambda f: (
        f["sigma_schedule"] not in SAMPLERS[given(f, "sampler", "ddim")].sigma_schedules
        or f.get("timesteps") is not None
    ),
    "guidance_interval": lambda f: is_falling(f["guidance_interval"]),
    "timesteps": lambda f: (
        given(f, "num_inference_steps", 0) > 0
        or not falls(f["timesteps"])
        or SAMPLERS[given(f, "sampler", "ddim")].through is None
    ),
}


# The same for txt2img and img2img of AUTOMATIC1111's API.
BEYOND_ITS_SCHEMA: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "prompt": lambda f: has_brackets(f["prompt"]) or is_too_much_text(f, "prompt"),
    "negative_prompt": lambda f: has_brackets(f["negative_prompt"]) or is_too_much_text(f, "negative_prompt"),
    "batch_size": lambda f: given(f, "batch_size", 1) * given(f, "n_iter", 1) > MOST_IMAGES,
    "seed": lambda f: f["seed"] + given(f, "batch_size", 1) * given(f, "n_iter", 1) > MAX_SEED + 1,
    "steps": lambda f: given(f, "steps", 20) > FEWEST or f["steps"] == 1 or names_lcm_or_tcd(f),
    "denoising_strength": lambda f: given(f, "steps", 1) * given(f, "denoising_strength", 0.75) < 1,
    f"override_settings.{CLIP_SKIP}": lambda f: f["override_settings"][CLIP_SKIP] > 1,
}


def names_lcm_or_tcd(fields: Mapping[str, Any]) -> bool:
    """These have 50 steps of their own, more than the timesteps."""
    names = (str(given(fields, name, "")).upper() for name in ("sampler_name", "sampler_index"))
    return any("LCM" in name or "TCD" in name for name in names)


def has_brackets(prompt: str) -> bool:
    """Whether its emphasis may be such that it cannot be read."""
    return any(mark in prompt for mark in "([<")


def names_no_class(error: Json) -> bool:
    """The prompts of one of the servers name a class."""
    return bool(error["loc"] == ["prompt"] and error["msg"].startswith(("must name one class", "must be 0 to")))


def is_beyond_its_schema(case: Case, response: Response) -> bool:
    assert isinstance(case.body, dict)
    if response.status_code == 404:
        return bool(case.body.get("sampler_name") or case.body.get("sampler_index"))
    return response.status_code == 422 and all(
        error["loc"][0] in BEYOND_ITS_SCHEMA
        and (BEYOND_ITS_SCHEMA[error["loc"][0]](case.body) or names_no_class(error))
        for error in json.loads(response.content)["errors"]
    )


def is_beyond_the_schema(case: Case, response: Response) -> bool:
    if case.path in ("/sdapi/v1/txt2img", "/sdapi/v1/img2img"):
        return is_beyond_its_schema(case, response)
    fields = case.body if isinstance(case.body, dict) else {name: read(text) for name, text in case.query.items()}
    if response.status_code != 422:
        return False
    document = json.loads(response.content)
    if "error" in document:
        return is_beyond_openai_s(fields, document["error"])
    return all(
        error["loc"][0] in BEYOND_THE_SCHEMA and (BEYOND_THE_SCHEMA[error["loc"][0]](fields) or is_of_distilled(error))
        for error in document["errors"]
    )


def is_beyond_openai_s(fields: Mapping[str, Any], error: Json) -> bool:
    """The same for OpenAI's API, where null is no value, and a prompt may have to name a class."""
    name, message = error["param"], error["message"].removeprefix(f"{error['param']}: ")
    ours = {known: value for known, value in {**fields, "num_images": fields.get("n")}.items() if value is not None}
    if name == "prompt" and re.match("must (name one class|be 0 to)", message):
        return True
    loc = {"loc": [name], "msg": message.partition("; ")[0]}
    return (
        (name in ours or name in ("strength", "num_inference_steps"))
        and name in BEYOND_THE_SCHEMA
        and (BEYOND_THE_SCHEMA[name](ours) or is_of_distilled(loc))
    )


def is_of_distilled(error: Json) -> bool:
    """Distilled weights, which one of the servers has, take no `timesteps`."""
    return bool(error["loc"] == ["timesteps"] and error["msg"].endswith("were distilled for"))


# The test.


@pytest.fixture(scope="module")
def contracted(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, Reachable]]:
    """Four servers: with classes and at most four steps, without classes and at most twenty, latent, and like SDXL."""
    schedule = DDIMScheduler(num_train_timesteps=20, beta_start=0.01, beta_end=0.3, clip_sample=False)
    paths = (
        "digits-4step",
        weights / "rgb",
        save_latent_pipeline(tmp_path_factory.mktemp("latent"), None, None, schedule),
    )
    fast = FakeRunner(dict.fromkeys((1, 2, 4), 1e-3))
    few = Schedule(num_train_timesteps=20, beta_start=0.01, beta_end=0.3)
    with (
        side_by_side(
            *(serving(WEIGHTS=path, MAX_IMAGES=MOST_IMAGES, TIMEOUT=20, MAX_BATCH=4) for path in paths)
        ) as running,
        serving_text(tokenize_twice, few, runner=fast, like=like_xl, max_images=MOST_IMAGES, timeout=20) as text,
    ):
        yield dict(zip(NAMES, [*running, text], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_service_does_as_its_document_says(contracted: Mapping[str, Reachable], tmp_path: Path, name: str) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    report = tmp_path / "report.ndjson"
    ended = subprocess.run(
        [PROGRAM, "run", f"{contracted[name].url}/openapi.json", *OPTIONS, "--report-ndjson-path", report],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.test_contract"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    seen = count(report)
    assert seen["cases"] >= NUM_CASES, seen
    # Each server gets a fair share, so that the checks of each mean something.
    assert min(seen["valid, taken"], seen["invalid, refused"]) >= NUM_CASES / 5, seen
    assert all(seen[media_type] for media_type in MEDIA_TYPES), seen


def count(report: Path) -> collections.Counter[str]:
    """The number of calls by outcome."""
    seen: collections.Counter[str] = collections.Counter()
    for line in report.read_text().splitlines():
        recorder = json.loads(line).get("ScenarioFinished", {}).get("recorder", {})
        for name, interaction in recorder.get("interactions", {}).items():
            response = interaction["response"]
            mode = recorder["cases"][name]["value"]["meta"]["generation"]["mode"]
            seen["cases"] += 1
            seen["valid, taken"] += mode == "positive" and response["status_code"] == 200
            seen["invalid, refused"] += mode == "negative" and response["status_code"] == 422
            seen.update(kind.partition(";")[0] for kind in response["headers"].get("content-type", []))
            seen[recorder["label"]] += 1
            seen[str(response["status_code"])] += 1
    return seen
