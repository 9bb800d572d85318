"""AUTOMATIC1111's API: what its programs send is drawn or told, and each caller sees its own requests alone."""

import base64
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.description import Distilled, ModelDescription
from model.samplers import SAMPLERS
from service.errors import Invalid, UnknownSampler
from service.http import app
from service.http.a1111 import samplers
from service.http.a1111.fields import DEFAULTS, Txt2Img, read
from service.http.a1111.translation import translated
from service.http.models import RequestModel
from service.plan.fields import SampleRequest
from tests.local import FakeServer, serving_fake
from tests.servers import PATIENCE, Json, Reachable, ServerProcess, eventually, read_parameters, read_png
from tests.test_picture_calls import PHOTO
from tests.test_responses import MODEL, SERVED
from tests.texts import LCM, TEXT, XL, serving_text

HOME = "/sdapi/v1"
JSON = {"Accept": "application/json"}
PNG = {"Accept": "image/png"}


def asked(body: Json, model: str = "digits") -> tuple[Txt2Img, tuple[str, ...]]:
    return read(body, model, Txt2Img)


def drawn(server: Reachable, body: Json) -> Json:
    """The answer to txt2img, with its `info` read."""
    answer = server.client.post(f"{HOME}/txt2img", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.headers["cache-control"] == "no-store"
    document: Json = answer.json()
    assert document.keys() == {"images", "parameters", "info"}
    return {**document, "info": json.loads(document["info"])}


def pngs(document: Json) -> list[bytes]:
    return [base64.b64decode(image, validate=True) for image in document["images"]]


# What is drawn


def test_what_was_drawn_is_drawn_again_by_its_seed(server: ServerProcess) -> None:
    body = {"prompt": "A photo of a Dog!", "batch_size": 2, "n_iter": 2, "steps": 6, "cfg_scale": 3.5, "seed": -1}
    body |= {"sampler_name": "k_euler_a", "negative_prompt": "cats"}
    first = drawn(server, body)
    info = first["info"]
    assert info["all_seeds"] == [info["seed"] + i for i in range(4)]
    assert first["images"] == drawn(server, {**body, "seed": info["seed"]})["images"]
    for seed, png in zip(info["all_seeds"], pngs(first), strict=True):
        request = {"class_label": "dog", "seed": seed, "num_inference_steps": 6, "guidance_scale": 3.5}
        answer = server.client.post("/sample", json={**request, "sampler": "euler_a"}, headers=PNG)
        assert answer.content == png
        assert read_parameters(png)["seed"] == seed
    assert (info["steps"], info["cfg_scale"], info["sampler_name"]) == (6, 3.5, "Euler a")
    assert info["all_prompts"] == [body["prompt"]] * 4
    assert info["ignored"] == ["negative_prompt"]
    said = (
        f"Steps: 6, Sampler: Euler a, Schedule type: Automatic, CFG scale: 3.5, Seed: {info['seed'] + 1}, Size: 16x16"
    )
    assert info["infotexts"][1].splitlines()[2].startswith(said)


def test_what_is_absent_or_null_is_the_weights_recommendation(server: ServerProcess) -> None:
    foreign = {"url": "http://here", "auth": "", "s_tmax": None, "save_images": True, "hr_scale": 2}
    document = drawn(server, {**dict.fromkeys(DEFAULTS), **foreign})
    info, parameters = document["info"], document["parameters"]
    recommended = {"sampler_name": "DPM++ 2M", "steps": 4, "cfg_scale": 1.0, "width": 16, "height": 16}
    assert recommended.items() <= info.items()
    assert parameters == {**DEFAULTS, **recommended}
    assert (info["ignored"], info["warnings"], info["interrupted"]) == ([], [], False)
    [png] = pngs(document)
    assert read_png(png).shape == (16, 16)
    assert drawn(server, {})["info"].keys() == info.keys()


def test_a_size_that_is_not_served_is_the_nearest_and_told(rgb_server: ServerProcess) -> None:
    answer = rgb_server.client.post(f"{HOME}/txt2img", json={"prompt": "a fox", "width": 1024, "cfg_scale": 7})
    info = json.loads(answer.json()["info"])
    assert (info["width"], info["height"], info["cfg_scale"]) == (16, 8, 1)
    assert info["ignored"] == ["prompt", "cfg_scale"]  # this model draws without words and guidance
    assert "1024x8" in info["warnings"][0]
    assert answer.headers["x-warnings"] == info["warnings"][0]


def test_prompts_have_emphasis_and_clip_skip() -> None:
    with serving_text() as server:
        body = {"prompt": "a (b:1.5)", "negative_prompt": "[c]", "cfg_scale": 5, "seed": 3}
        body |= {"override_settings": {"CLIP_stop_at_last_layers": 2, "sd_vae": "x", "sd_model_checkpoint": "fake"}}
        document = drawn(server, body)
        same = {"prompt": "a (b:1.5)", "negative_prompt": "[c]", "emphasis": "original", "guidance_scale": 5}
        answer = server.client.post("/sample", json={**same, "clip_skip": 1, "seed": 3}, headers=PNG)
        assert [answer.content] == pngs(document)
        assert document["info"]["clip_skip"] == 2
        assert document["info"]["ignored"] == ["override_settings.sd_vae"]
        [text] = document["info"]["infotexts"]
        assert text.startswith("a (b:1.5)\nNegative prompt: [c]\nSteps: 4, Sampler: DDIM, ")
        assert "Clip skip: 2" in text
        waits = drawn(server, {"prompt": "a [b|c]"})
        assert any("[a|b]" in sentence for sentence in waits["info"]["warnings"])
        refusal = server.client.post(f"{HOME}/txt2img", json={"prompt": "a <lora:b:1>"})
        assert refusal.status_code == 422
        assert "LoRA" in refusal.json()["detail"]


def test_an_answer_may_have_no_images(server: ServerProcess) -> None:
    document = drawn(server, {"send_images": False, "seed": 5})
    assert document["images"] == []
    assert document["info"]["all_seeds"] == [5]
    assert "send_images" in document["info"]["warnings"][0]


# From its fields to ours


@pytest.mark.parametrize(
    ("body", "ignored"),
    [
        ({"enable_hr": False, "styles": [], "subseed": 7, "subseed_strength": 0, "s_noise": 1, "tiling": None}, ()),
        ({"enable_hr": True, "hr_scale": 2}, ("enable_hr",)),
        (
            {"restore_faces": True, "script_name": "x/y/z plot", "s_noise": 0},
            ("restore_faces", "s_noise", "script_name"),
        ),
        ({"alwayson_scripts": {"ADetailer": {"args": [False]}}}, ("alwayson_scripts.ADetailer",)),
        ({"override_settings": {"sd_model_checkpoint": "digits", "sd_vae": "Automatic", "x": None}}, ()),
        (
            {"override_settings": {"sd_model_checkpoint": "other", "eta_noise_seed_delta": 31337}},
            ("override_settings.sd_model_checkpoint", "override_settings.eta_noise_seed_delta"),
        ),
        ({"anything": {"else": [1]}, "do_not_save_grid": 3}, ()),
    ],
)
def test_what_would_change_a_picture_is_listed(body: Json, ignored: tuple[str, ...]) -> None:
    assert asked(body)[1] == ignored


def values(body: Json, model: ModelDescription = MODEL, **more: Any) -> tuple[Json, list[str], list[str]]:
    """The values of our fields, what is ignored, and warnings. The values are valid."""
    served = replace(SERVED, model=model, **more)
    told = translated(asked(body)[0], served, max_images=8)
    RequestModel(SampleRequest, served, 8, 300.0).validated(told.values)
    return {name: value for name, value in told.values.items() if value is not None}, told.ignored, told.warnings


EVERYTHING = {"prompt": "one", "negative_prompt": "two", "cfg_scale": 7, "steps": 22, "seed": 5}
NOT_GUIDED = replace(MODEL, num_classes=None, no_label=None, class_names=())
DISTILLED = replace(MODEL, distilled=Distilled("ddim", (1, 2, 4)))


@pytest.mark.parametrize(
    ("model", "expected", "ignored"),
    [
        (MODEL, {"class_label": 1, "guidance_scale": 7, "num_inference_steps": 22}, ["negative_prompt"]),
        (NOT_GUIDED, {"num_inference_steps": 22}, ["prompt", "negative_prompt", "cfg_scale"]),
        (
            replace(MODEL, no_label=None),
            {"class_label": 1, "num_inference_steps": 22},
            ["negative_prompt", "cfg_scale"],
        ),
        (DISTILLED, {"class_label": 1, "guidance_scale": 7, "num_inference_steps": 4}, ["negative_prompt"]),
        (
            TEXT.model,
            {"prompt": "one", "negative_prompt": "two", "guidance_scale": 7, "num_inference_steps": 22},
            [],
        ),
        (LCM.model, {"prompt": "one", "guidance_scale": 7, "num_inference_steps": 22}, ["negative_prompt"]),
    ],
)
def test_each_kind_of_model_is_told_what_it_can_use(
    model: ModelDescription, expected: Json, ignored: list[str]
) -> None:
    given, unused, warnings = values(EVERYTHING, model)
    emphasis = {} if model.text is None else {"emphasis": "original"}
    assert given == {"num_images": 1, "seed": 5, **expected, **emphasis}
    assert unused == ignored
    assert bool(warnings) is (model is DISTILLED)


def test_an_empty_prompt_names_no_class_and_has_no_guidance() -> None:
    given, unused, _ = values({"prompt": " ", "cfg_scale": 7})
    assert not {"class_label", "guidance_scale"} & given.keys()
    assert unused == ["cfg_scale"]


def test_clip_skip_counts_from_one_and_is_not_for_sdxl() -> None:
    def skipping(layers: int) -> Json:
        return {"override_settings": {"CLIP_stop_at_last_layers": layers}}

    assert [values(skipping(n), TEXT.model)[0].get("clip_skip") for n in (0, 1, 2, 4)] == [None, None, 1, 3]
    given, unused, _ = values(skipping(2), XL.model)
    assert "clip_skip" not in given
    assert unused == ["override_settings.CLIP_stop_at_last_layers"]
    with pytest.raises(Invalid, match=r"override_settings.CLIP_stop_at_last_layers: must be 1 to 4, .* and is 5"):
        values(skipping(5), TEXT.model)


def test_eta_is_ddims_and_for_others_what_they_do_anyway() -> None:
    """webuiapi always sends 1."""
    assert values({"eta": 1.0, "sampler_name": "DDIM"})[0]["eta"] == 1.0
    for name, eta, ignored in (("Euler a", 1, []), ("Euler a", 0.5, ["eta"]), ("Euler", 0.5, [])):
        given, unused, _ = values({"eta": eta, "sampler_name": name})
        assert ("eta" in given, unused) == (False, ignored)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"batch_size": 3, "n_iter": 3}, "batch_size: must make, times n_iter, at most 8 images, and makes 9"),
        ({"steps": 0}, "steps: must be greater than or equal to 1, and is 0"),
        ({"steps": "20"}, "steps: must be a valid integer, and is "),
        ({"width": -8}, "width: "),
        ({"seed": -2}, "seed: "),
        ({"prompt": 7}, "prompt: must be a valid string$"),
        ({"prompt": "zero or one"}, "prompt: must name one class, and names several"),
        ({"override_settings": []}, "override_settings: "),
    ],
)
def test_what_is_wrong_is_named_as_its_programs_name_it(body: Json, complaint: str) -> None:
    with pytest.raises(Invalid, match=complaint):
        values(body)


# Samplers and schedulers


def test_every_sampler_has_a_name() -> None:
    assert {one.ours for one in samplers.served_samplers(MODEL)} == SAMPLERS.keys()
    assert [one.ours for one in samplers.served_samplers(DISTILLED)] == ["ddim"]
    assert [one.name for one in samplers.served_schedulers(DISTILLED)] == ["automatic"]


SPELLINGS = [
    (one, spelling) for one in samplers.served_samplers(MODEL) for spelling in (one.name, *one.aliases, one.ours)
]
SUFFIXES = [name for one in samplers.served_schedulers(MODEL) for name in (one.name, one.label)]


@given(st.sampled_from(SPELLINGS), st.sampled_from(["", *SUFFIXES]), st.sampled_from([str, str.lower, str.upper]))
def test_a_name_may_end_with_a_schedulers(spelt: tuple[samplers.Sampler, str], suffix: str, case: Any) -> None:
    one, spelling = spelt
    together = samplers.chosen(case(f"{spelling} {suffix}".strip()), None, MODEL)
    assert together.sampler == one.ours
    assert together == samplers.chosen(one.name, suffix, MODEL)
    assert together == samplers.chosen(f"{one.name} {suffix}".strip(), "Exponential" if suffix else None, MODEL)


def test_a_scheduler_is_taken_or_told() -> None:
    for one in samplers.served_samplers(MODEL):
        for scheduler in ("karras", "Exponential", "uniform", "Normal", "SGM Uniform", "no such", "automatic", None):
            chosen = samplers.chosen(one.name, scheduler, MODEL)
            is_own = scheduler in ("automatic", None)
            assert bool(chosen.warnings) is (not is_own and chosen.label == samplers.AUTOMATIC)
            if chosen.sigma_schedule in ("karras", "exponential"):
                assert chosen.sigma_schedule in SAMPLERS[one.ours].sigma_schedules


@pytest.mark.parametrize("name", ["LMS", "LMS Karras", "DPM++ SDE Karras", "no such"])
def test_a_sampler_that_is_not_served_is_refused_with_those_that_are(server: ServerProcess, name: str) -> None:
    answer = server.client.post(f"{HOME}/txt2img", json={"sampler_index": name})
    assert answer.status_code == 404
    told = answer.json()
    assert told["detail"].startswith(f'Sampler not found: "{name}". The samplers are DPM++ 2M, ')
    assert told["error"] == "Not Found"
    with pytest.raises(UnknownSampler):
        samplers.chosen("Euler a", None, DISTILLED)


# Progress and interruption


def password(key: str) -> str:
    return f"Basic {base64.b64encode(f'someone:{key}'.encode()).decode()}"


KEYS = "Bearer alpha", password("beta"), "Bearer gamma"


@pytest.fixture(scope="module")
def locked() -> Iterator[FakeServer]:
    """A server with two keys, and without a health check, so the engine runs no probe between a test's passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(app, "_EVERY", PATIENCE)
        with serving_fake(api_keys="alpha, beta, gamma", timeout=10_000) as server:
            yield server


class Caller:
    """A client with one key, whose requests run on threads."""

    def __init__(self, server: FakeServer, authorization: str, pool: ThreadPoolExecutor) -> None:
        headers = {"Authorization": authorization}
        self.client = httpx.Client(base_url=server.url + HOME, headers=headers, timeout=PATIENCE, trust_env=False)
        self._pool = pool

    def draw(self, name: str = "txt2img", **body: object) -> Future[Json]:
        def call() -> Json:
            answer = self.client.post(f"/{name}", json=body)
            assert answer.status_code == 200, answer.text
            document: Json = answer.json()
            return {**document, "info": json.loads(document["info"])}

        return self._pool.submit(call)

    def progress(self, query: str = "") -> Json:
        document: Json = self.client.get(f"/progress{query}").json()
        assert document.keys() == {"progress", "eta_relative", "state", "current_image", "textinfo"}
        return document

    def wait_for(self, steps: int, query: str = "") -> Json:
        """Wait until a request of this many steps is known."""
        return eventually(
            lambda: next((p for p in [self.progress(query)] if p["state"]["sampling_steps"] == steps), None)
        )

    def interrupt(self, query: str = "") -> None:
        assert self.client.post(f"/interrupt{query}").json() == {}


@pytest.fixture
def callers(locked: FakeServer) -> Iterator[tuple[Caller, Caller, Caller]]:
    """Callers with different keys. At the end the server is idle."""
    with ThreadPoolExecutor(4) as pool:
        alpha, beta, gamma = (Caller(locked, key, pool) for key in KEYS)
        yield alpha, beta, gamma
        locked.runner.let_go()
        assert locked.engine.wait_idle(PATIENCE)
    for caller in (alpha, beta, gamma):
        caller.client.close()


def test_callers_see_and_interrupt_their_own_requests_alone(
    locked: FakeServer, callers: tuple[Caller, Caller, Caller]
) -> None:
    alpha, beta, gamma = callers
    locked.runner.hold()
    first = alpha.draw(steps=20, batch_size=2)
    alpha.wait_for(20)
    second = beta.draw(steps=30)
    beta.wait_for(30)
    assert alpha.progress()["state"]["job_count"] == 2
    idle = gamma.progress()
    assert (idle["progress"], idle["eta_relative"], idle["state"]["job_count"]) == (0, 0, 0)
    gamma.interrupt()
    beta.interrupt("?id_task=nothing")
    alpha.interrupt()
    interrupted = first.result(PATIENCE)
    assert (interrupted["images"], interrupted["info"]["all_seeds"]) == ([], [])
    assert interrupted["info"]["interrupted"]
    assert "interrupted: 0 of 2 images were done" in interrupted["info"]["warnings"]
    assert alpha.progress()["state"]["job_count"] == 0
    assert beta.progress()["eta_relative"] > 0
    locked.runner.let_go()
    assert not second.result(PATIENCE)["info"]["interrupted"]
    assert beta.progress() == idle


def test_one_key_is_one_caller_however_it_comes(locked: FakeServer, callers: tuple[Caller, ...]) -> None:
    alpha = callers[0]
    locked.runner.hold()
    drawing = alpha.draw(steps=20)
    alpha.wait_for(20)
    state = alpha.progress()["state"]
    alpha.client.headers["Authorization"] = password("alpha")
    assert alpha.progress()["state"] == state
    alpha.interrupt()
    assert drawing.result(PATIENCE)["info"]["interrupted"]


def test_img2img_is_seen_and_interrupted_likewise(locked: FakeServer, callers: tuple[Caller, ...]) -> None:
    alpha, beta, _ = callers
    locked.runner.hold()
    drawing = alpha.draw("img2img", init_images=[base64.b64encode(PHOTO).decode()], steps=20, denoising_strength=0.5)
    assert alpha.wait_for(10)["state"]["job"] == "img2img"
    beta.interrupt()
    assert beta.progress()["state"]["job_count"] == 0
    alpha.interrupt()
    assert drawing.result(PATIENCE)["info"]["interrupted"]


def test_a_task_has_a_name(locked: FakeServer, callers: tuple[Caller, ...]) -> None:
    alpha = callers[0]
    locked.runner.hold()
    older = alpha.draw(steps=20)
    alpha.wait_for(20)
    named = alpha.draw(steps=30, force_task_id="task(x)")
    state = alpha.wait_for(30, "?id_task=task(x)")["state"]
    assert (state["job"], alpha.progress()["state"]["job"]) == ("task(x)", "txt2img")
    alpha.interrupt("?id_task=task(x)")
    assert named.result(PATIENCE)["info"]["interrupted"]
    assert alpha.progress()["state"]["sampling_steps"] == 20
    locked.runner.let_go()
    assert len(older.result(PATIENCE)["images"]) == 1


def test_an_interrupted_request_answers_with_the_images_that_are_done(
    locked: FakeServer, callers: tuple[Caller, ...]
) -> None:
    """Six images, of which four fit into a pass."""
    alpha = callers[0]
    whole = alpha.draw(steps=2, batch_size=6, seed=40).result(PATIENCE)
    locked.runner.hold()
    drawing = alpha.draw(steps=2, batch_size=6, seed=40)
    alpha.wait_for(2)
    locked.runner.next_pass()
    while not 0 < alpha.progress()["state"]["job_no"] < 6:
        locked.runner.next_pass()
        eventually(lambda: alpha.progress()["state"]["sampling_steps"] == 2 or None)
    alpha.interrupt()
    document = drawing.result(PATIENCE)
    info = document["info"]
    assert 0 < len(document["images"]) < 6
    assert len(info["infotexts"]) == len(info["all_prompts"]) == len(document["images"])
    by_seed = dict(zip(whole["info"]["all_seeds"], whole["images"], strict=True))
    assert document["images"] == [by_seed[seed] for seed in info["all_seeds"]]
    assert info["seed"] == 40


def test_a_preview_is_shown_to_who_wants_it(locked: FakeServer, callers: tuple[Caller, ...]) -> None:
    alpha = callers[0]
    locked.runner.hold()
    drawing = alpha.draw(steps=12, seed=3)
    alpha.wait_for(12)
    assert alpha.progress()["current_image"] is None
    for _ in range(11):
        locked.runner.next_pass()
    state = eventually(lambda: next((p for p in [alpha.progress()] if p["state"]["sampling_step"] == 10), None))
    assert 0 < state["progress"] < 1
    assert read_png(base64.b64decode(state["current_image"])).shape == (1, 2)
    assert alpha.progress("?skip_current_image=true")["current_image"] is None
    locked.runner.let_go()
    assert len(drawing.result(PATIENCE)["images"]) == 1


# What its programs ask at connect, and errors


def test_what_programs_ask_at_connect(server: ServerProcess) -> None:
    def ask(name: str) -> Any:
        answer = server.client.get(f"{HOME}/{name}")
        assert answer.status_code == server.client.head(f"{HOME}/{name}").status_code == 200
        return answer.json()

    [model] = ask("sd-models")
    options = ask("options")
    assert options["sd_model_checkpoint"] == model["title"] == model["model_name"] == "grey"
    assert options["sd_checkpoint_hash"] == model["sha256"]
    assert model["sha256"].startswith(model["hash"])
    assert {"name": "Euler a", "aliases": ["k_euler_a", "k_euler_ancestral"], "options": {}} in ask("samplers")
    assert ask("schedulers")[0]["label"] == "Automatic"
    for name in ("upscalers", "latent-upscale-modes", "sd-vae", "sd-modules", "loras"):
        assert ask(name) == []
    assert ask("embeddings") == {"loaded": {}, "skipped": {}}

    def change(**values: object) -> Any:
        answer = server.client.post(f"{HOME}/options", json=values)
        assert answer.status_code == 200
        return answer.json()

    assert change(**options) is None
    assert change(**options, sd_lora="x") == {"ignored": ["sd_lora"]}
    assert change(sd_model_checkpoint="other") == {"ignored": ["sd_model_checkpoint"]}
    assert ask("options") == options
    no_unicode = server.client.post(
        f"{HOME}/options", content=b'{"\\ud800": 1}', headers={"Content-Type": JSON["Accept"]}
    )
    assert no_unicode.json() == {"ignored": ["\ud800"]}


def test_errors_are_problem_documents_with_what_its_programs_read(
    server: ServerProcess, strict_server: ServerProcess
) -> None:
    wrong = server.client.post(f"{HOME}/txt2img", json={"steps": 2000, "cfg_scale": 2, "prompt": "cat"})
    assert wrong.status_code == 422
    assert wrong.json()["error"] == wrong.json()["title"]
    assert wrong.json()["errors"][0]["loc"] == ["steps"]
    assert wrong.json()["detail"].startswith("steps: must be 1 to 1000")
    assert server.client.get(f"{HOME}/nothing").json()["detail"] == f"there is nothing at {HOME}/nothing"
    assert server.client.post(f"{HOME}/txt2img", content=b"x").status_code == 422
    with httpx.Client(base_url=strict_server.url, trust_env=False) as stranger:
        refusal = stranger.post(f"{HOME}/txt2img", json={})
        allowed = stranger.get(f"{HOME}/options", auth=("any", "alpha"))
    assert (refusal.status_code, allowed.status_code) == (401, 200)
    assert refusal.json()["detail"].startswith("this server needs an API key")
    assert refusal.json()["error"] == "Unauthorized"


def test_karras_draws_as_sigma_schedule_does(server: ServerProcess) -> None:
    document = drawn(server, {"prompt": "cat", "sampler_name": "Euler Karras", "steps": 5, "cfg_scale": 1, "seed": 9})
    request = {"class_label": "cat", "sampler": "euler", "sigma_schedule": "karras", "num_inference_steps": 5}
    answer = server.client.post("/sample", json={**request, "guidance_scale": 1, "seed": 9}, headers=PNG)
    assert pngs(document) == [answer.content]
    assert "Sampler: Euler, Schedule type: Karras, " in document["info"]["infotexts"][0]
