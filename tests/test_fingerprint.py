"""The fingerprint covers exactly what affects the bytes. The location and format of the weights do not."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import pytest
from PIL import Image as PillowImage

from model.backends.backend import host
from model.checkpoints.load import convert, load
from model.noise import first_draw
from model.rows import Group
from service.http.formats import image_encoder
from service.http.responses import PNG, etag
from service.plan import served as served_module
from service.plan.fields import SampleRequest
from service.plan.plan import Parameters, plan_sample
from service.plan.served import Served, fingerprint_parts
from tests.checkpoints import STEM, edit, save_latent_pipeline, save_pipeline, small_unet
from tests.servers import write_weights
from tests.test_responses import MODEL


def write_native(folder: Path) -> Path:
    sizes = {"in_channels": 1, "model_channels": 8, "channel_multipliers": [1, 2], "image_size": [8, 8]}
    return write_weights(folder, **sizes, schedule={})


def write_named(folder: Path) -> Path:
    edit(write_native(folder) / "config.json", {"name": "mine"})
    return folder


def write_half(folder: Path) -> Path:
    """The same values in another file and another format."""
    save_pipeline(folder)
    (folder / "unet" / f"{STEM}.safetensors").unlink()
    small_unet().save_pretrained(folder / "unet", variant="fp16", max_shard_size="20KB")
    return folder


KINDS: dict[str, Callable[[Path], Path]] = {
    "native": write_native,
    "native, named": write_named,
    "diffusers": save_pipeline,
    "latent": save_latent_pipeline,
}


class Told(NamedTuple):
    """Everything about served weights that affects the bytes of a PNG."""

    fingerprint: str
    recipe: Parameters
    etag: str


def told(path: Path) -> Told:
    model = load(path).description
    parts = fingerprint_parts(model, model.group, {"backend": "none"}, host(), image_encoder())
    served = Served(model, "cpu", parts, reproducible=True, first_draw=first_draw, groups=(model.group,))
    plan = plan_sample(SampleRequest(seed=7), served, timeout=1)
    return Told(served.fingerprint, plan.recipes[0], etag(plan, PNG))


@pytest.mark.parametrize("kind", KINDS)
def test_moving_renaming_and_converting_change_nothing(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "mine")
    before = told(folder)
    cached = tmp_path / "models--owner--name" / "snapshots" / "0123abcd"
    for elsewhere in (tmp_path / "yours", tmp_path / "deeper" / "mine", cached):
        shutil.copytree(folder, elsewhere)
        assert told(elsewhere) == before
    (tmp_path / "link").symlink_to(folder)
    assert told(tmp_path / "link") == before
    convert(folder, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    assert told(tmp_path / "once") == told(tmp_path / "twice") == before
    assert "mine" not in json.dumps(before.recipe) or kind == "native, named"


def test_the_same_values_in_other_files_change_nothing(tmp_path: Path) -> None:
    assert told(write_half(tmp_path / "half")) == told(save_pipeline(tmp_path / "whole"))


def test_a_declared_name_is_in_recipes_and_so_in_the_fingerprint(tmp_path: Path) -> None:
    undeclared, declared = told(write_native(tmp_path / "a")), told(write_named(tmp_path / "b"))
    digest = load(tmp_path / "a").description.digest
    assert load(tmp_path / "b").description.digest == digest
    assert undeclared.recipe["model"] == f"diffusion_unet-{digest[:8]}"
    assert declared.recipe["model"] == "mine"
    assert undeclared.fingerprint != declared.fingerprint
    assert undeclared.etag != declared.etag


def test_the_weights_in_the_box_declare_their_names() -> None:
    for config in sorted((Path(served_module.__file__).parent.parent / "weights").glob("*/config.json")):
        assert json.loads(config.read_text())["name"] == config.parent.name


def test_the_parts_name_all_that_draws_and_writes() -> None:
    parts = fingerprint_parts(MODEL, MODEL.group, {"backend": "none"}, host(), image_encoder())
    for name in ("arithmetic", "stepwise", "model", "weights", "torch", "instructions", "libc", "numpy", "python"):
        assert parts[name]
    assert cv2.__version__ in str(parts["image_encoder"])
    assert parts == fingerprint_parts(
        replace(MODEL, name="elsewhere"), MODEL.group, {"backend": "none"}, host(), image_encoder()
    )


def test_the_default_size_is_a_part_if_it_is_not_that_of_the_weights() -> None:
    """Requests that name no size get it, so servers of other defaults must not share a fingerprint."""

    def parts(default: Group) -> dict[str, str | int]:
        return fingerprint_parts(MODEL, default, {"backend": "none"}, host(), image_encoder())

    assert "size" not in parts(MODEL.group)
    assert parts(Group(8, 16)) == {**parts(MODEL.group), "size": "16x8"}


def test_another_compression_of_pngs_is_another_fingerprint(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenCV compresses with the system's zlib, which has forks."""
    parts = fingerprint_parts(MODEL, MODEL.group, {}, host(), image_encoder())
    encode = cv2.imencode
    monkeypatch.setattr(cv2, "imencode", lambda kind, pixels: encode(kind, pixels, [cv2.IMWRITE_PNG_COMPRESSION, 9]))
    other = fingerprint_parts(MODEL, MODEL.group, {}, host(), image_encoder())
    assert {name for name in parts if parts[name] != other[name]} == {"image_encoder"}


@pytest.mark.parametrize("kind", ["WEBP", "JPEG"])
def test_other_encoders_of_webp_and_jpeg_are_another_fingerprint(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = fingerprint_parts(MODEL, MODEL.group, {}, host(), image_encoder())
    save = PillowImage.Image.save

    def changed(image: PillowImage.Image, file: Any, as_kind: str, quality: int, **more: Any) -> None:
        save(image, file, as_kind, quality=quality - (as_kind == kind), **more)

    monkeypatch.setattr(PillowImage.Image, "save", changed)
    other = fingerprint_parts(MODEL, MODEL.group, {}, host(), image_encoder())
    assert {name for name in parts if parts[name] != other[name]} == {"image_encoder"}


@pytest.mark.parametrize(
    "name",
    [
        "ATEN_CPU_CAPABILITY",
        "ONEDNN_MAX_CPU_ISA",
        "MKL_CBWR",
        "GLIBC_TUNABLES",
        "OV_CPU_MAX_ISA",
        "NVIDIA_TF32_OVERRIDE",
    ],
)
def test_variables_that_choose_kernels_are_in_the_fingerprint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    before = host()
    monkeypatch.setenv(name, "x")
    monkeypatch.setenv("STEPWISE_HOST", "127.0.0.1")
    assert f"{name}=x" in host()["environment"].split()
    monkeypatch.delenv(name)
    assert host() == before


@pytest.mark.slow
def test_the_instructions_that_draw_noise_are_in_the_fingerprint_of_every_backend() -> None:
    code = (
        "import hashlib, json; from model.backends.backend import host; from model.noise import first_draw;"
        "print(json.dumps([hashlib.sha256(first_draw(7, (3, 32, 32)).tobytes()).hexdigest(), host()]))"
    )
    noises, hosts = [], []
    for capability in ("default", "avx2"):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
        noise, its_host = json.loads(ended.stdout)
        noises.append(noise)
        hosts.append({**its_host, "environment": ""})  # torch's behaviour shows it, not only the variable
    assert noises[0] == noises[1] or hosts[0] != hosts[1]
