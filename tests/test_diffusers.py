"""Checkpoints of the diffusers library: layouts on disk, configs, and the resulting images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.checkpoints.config import ModelConfig
from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import Checkpoint, find, load
from model.description import ModelDescription, Recommended
from model.lines import Column
from model.nets.unet2d import UNet2D
from model.rows import Forward
from model.samplers import sample_table
from model.schedule import Schedule, rescale_zero_terminal_snr
from tests.checkpoints import STEM, Json, check_line, edit, refusal, same_values, save_pipeline, small_unet
from tests.networks import fill
from tests.reference import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EMAModel,
    UNet2DModel,
    scheduler_class,
)
from tests.trajectories import labelled, runner_of

# diffusers' warning with NumPy 2.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning"),
]

SAFE = f"{STEM}.safetensors"
BIN = f"{STEM}.bin"
UNET_CONFIG = "unet/config.json"
SCHEDULER_CONFIG = "scheduler/scheduler_config.json"
SHARD = "20KB"  # a dozen shards of the small network

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def unet() -> Any:
    return small_unet()


@pytest.fixture(scope="module")
def saved(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested pipeline."""
    return save_pipeline(tmp_path_factory.mktemp("saved"), unet)


@pytest.fixture(scope="module")
def whole(saved: Path) -> Checkpoint:
    """The network loaded from its nested pipeline."""
    return load(saved)


@pytest.fixture
def pipeline(saved: Path, tmp_path: Path) -> Path:
    """A nested pipeline that the test may change."""
    return shutil.copytree(saved, tmp_path / "pipeline")


# Layouts.


def test_a_nested_pipeline_is_its_network(whole: Checkpoint, unet: Any) -> None:
    x = torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([3, 900])
    with torch.inference_mode():
        out, expected = whole.network(x, t), unet(x, t).sample
    assert isinstance(whole.network, UNet2D)
    assert (out - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not whole.network.training
    assert not any(parameter.requires_grad for parameter in whole.network.parameters())
    description = whole.description
    assert description.architecture == "unet_2d"
    assert description.image_shape == (3, 8, 8)
    assert (description.out_channels, description.first_timestep) == (3, 0)
    assert (description.num_classes, description.no_label, description.class_names) == (None, None, ())
    assert not description.needs_label
    assert description.num_parameters == sum(parameter.numel() for parameter in unet.parameters())


def nested(folder: Path, **saving: object) -> Path:
    """A nested pipeline, with weights saved in different ways."""
    save_pipeline(folder)
    (folder / "unet" / SAFE).unlink()
    small_unet().save_pretrained(folder / "unet", **saving)
    return folder


def flat(folder: Path) -> Path:
    """All files at the root, as in google/ddpm-*."""
    save_pipeline(folder)
    for part in ("unet", "scheduler"):
        for file in (folder / part).iterdir():
            file.rename(folder / file.name)
        (folder / part).rmdir()
    return folder


def flat_without_index(folder: Path) -> Path:
    (flat(folder) / "model_index.json").unlink()
    return folder


def old_key(key: str) -> str:
    """A key's name before diffusers 0.17."""
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        key = key.replace(f".{new}.", f".{old}.")
    return key


def flat_and_old(folder: Path) -> Path:
    """Like the published google/ddpm-*: flat, a pickle, and old names."""
    flat(folder)
    weights = {old_key(key): tensor for key, tensor in load_file(folder / SAFE).items()}
    assert "mid_block.attentions.0.proj_attn.weight" in weights
    torch.save(weights, folder / BIN)
    (folder / SAFE).unlink()
    return folder


def renamed(rename: Callable[[str], str]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        save_pipeline(folder)
        save_file(
            {rename(key): tensor for key, tensor in load_file(folder / "unet" / SAFE).items()}, folder / "unet" / SAFE
        )
        return folder

    return make


def with_old_frequencies(folder: Path) -> Path:
    """Old files have the fourier frequencies twice."""
    save_pipeline(folder)
    save_file({**load_file(folder / "unet" / SAFE), "time_proj.W": torch.zeros(8)}, folder / "unet" / SAFE)
    return folder


def beside(other: str, **saving: object) -> Callable[[Path], Path]:
    """A nested pipeline with a second network in a file that must be ignored."""

    def make(folder: Path) -> Path:
        save_pipeline(folder)
        small_unet(seed=1).save_pretrained(folder / "other", **saving)
        for file in (folder / "other").glob(f"{STEM}*"):
            file.rename(folder / "unet" / file.name)
        assert (folder / "unet" / other).is_file()
        shutil.rmtree(folder / "other")
        return folder

    return make


def safetensors_variant_beside_pickle(folder: Path) -> Path:
    nested(folder, variant="fp16")
    torch.save(small_unet(seed=1).state_dict(), folder / "unet" / BIN)
    return folder


def variants(folder: Path) -> Path:
    """fp16 has the network; ema has another."""
    nested(folder, variant="fp16")
    small_unet(seed=1).save_pretrained(folder / "unet", variant="ema")
    return folder


def sharded_variants(folder: Path) -> Path:
    nested(folder, variant="fp16", max_shard_size=SHARD)
    small_unet(seed=1).save_pretrained(folder / "unet", variant="ema", max_shard_size=SHARD)
    return folder


def linked(folder: Path) -> Path:
    """A link to the pipeline's folder."""
    save_pipeline(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")
    return folder


def linked_inside(folder: Path) -> Path:
    """Files that link to others in the same folder."""
    save_pipeline(folder)
    (folder / "store").mkdir()
    for name in (f"unet/{SAFE}", UNET_CONFIG, SCHEDULER_CONFIG, "model_index.json"):
        target = folder / "store" / Path(name).name
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
    return folder


def cached(folder: Path, write: Callable[[Path], object] = save_pipeline) -> Path:
    """huggingface_hub's cache: links into the repository's store of blobs."""
    repository = folder / "models--google--ddpm-tiny-8"
    snapshot = repository / "snapshots" / "0123abcd"
    write(snapshot)
    (repository / "blobs").mkdir()
    for i, file in enumerate(sorted(path for path in snapshot.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{i:040x}"
        file.rename(blob)
        up = "../" * len(file.relative_to(repository).parent.parts)
        file.symlink_to(f"{up}blobs/{blob.name}")
    return snapshot


LAYOUTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nested": (save_pipeline, ""),
    "nested, by its index": (save_pipeline, "model_index.json"),
    "nested, the U-Net's folder": (save_pipeline, "unet"),
    "nested, the U-Net's config": (save_pipeline, UNET_CONFIG),
    "nested, the U-Net's weights": (save_pipeline, f"unet/{SAFE}"),
    "flat": (flat, ""),
    "flat, its weights": (flat, SAFE),
    "flat, its config": (flat, "config.json"),
    "flat, without index": (flat_without_index, ""),
    "flat and old": (flat_and_old, ""),
    "flat and old, its weights": (flat_and_old, BIN),
    "pickle": (lambda folder: nested(folder, safe_serialization=False), ""),
    "sharded": (lambda folder: nested(folder, max_shard_size=SHARD), ""),
    "sharded, by its index": (lambda folder: nested(folder, max_shard_size=SHARD), f"unet/{SAFE}.index.json"),
    "sharded pickle": (lambda folder: nested(folder, max_shard_size=SHARD, safe_serialization=False), ""),
    "fp16": (lambda folder: nested(folder, variant="fp16"), ""),
    "fp16 pickle": (lambda folder: nested(folder, variant="fp16", safe_serialization=False), ""),
    "fp16 sharded": (lambda folder: nested(folder, variant="fp16", max_shard_size=SHARD), ""),
    "fp16 sharded pickle": (
        lambda folder: nested(folder, variant="fp16", max_shard_size=SHARD, safe_serialization=False),
        "",
    ),
    "beside a variant": (beside(f"{STEM}.fp16.safetensors", variant="fp16"), ""),
    "beside a sharded variant": (
        beside(f"{SAFE}.index.fp16.json", variant="fp16", max_shard_size=SHARD),
        "",
    ),
    "beside a pickle": (beside(BIN, safe_serialization=False), ""),
    "beside a sharded pickle": (beside(f"{BIN}.index.json", safe_serialization=False, max_shard_size=SHARD), ""),
    "variant beside a pickle": (safetensors_variant_beside_pickle, ""),
    "one of two variants": (variants, f"unet/{STEM}.fp16.safetensors"),
    "one of two sharded variants": (sharded_variants, f"unet/{SAFE}.index.fp16.json"),
    "old names": (renamed(old_key), ""),
    "of DataParallel": (renamed(lambda key: f"module.{key}"), ""),
    "of torch.compile": (renamed(lambda key: f"_orig_mod.{key}"), ""),
    "of both": (renamed(lambda key: f"_orig_mod.module.{old_key(key)}"), ""),
    "old frequencies": (with_old_frequencies, ""),
    "a link": (linked, ""),
    "links inside": (linked_inside, ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_network(layout: str, tmp_path: Path, whole: Checkpoint) -> None:
    make, name = LAYOUTS[layout]
    checkpoint = load(make(tmp_path / "pipeline") / name, allow_pickle="pickle" in layout or "old" in layout)
    assert same_values(checkpoint, whole)
    assert checkpoint.description.digest == whole.description.digest
    assert checkpoint.description.schedule.model_dump() == whole.description.schedule.model_dump()
    assert checkpoint.description.name == ("elsewhere" if layout == "a link" else "pipeline")


@pytest.mark.parametrize("name", ["", "unet", f"unet/{SAFE}", "model_index.json"])
def test_cache_of_huggingface_hub(name: str, tmp_path: Path, whole: Checkpoint) -> None:
    checkpoint = load(cached(tmp_path) / name)
    assert checkpoint.description.digest == whole.description.digest
    assert checkpoint.description.name == "google/ddpm-tiny-8"


def test_flat_cache_of_huggingface_hub(tmp_path: Path, whole: Checkpoint) -> None:
    checkpoint = load(cached(tmp_path, flat))
    assert checkpoint.description.digest == whole.description.digest
    assert checkpoint.description.name == "google/ddpm-tiny-8"


@pytest.mark.parametrize(("here", "named"), [("", "unet"), ("unet", "."), ("..", "pipeline")])
def test_relative_paths(
    here: str, named: str, pipeline: Path, whole: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pipeline / here)
    description = load(Path(named)).description
    assert (description.digest, description.name) == (whole.description.digest, "pipeline")


def test_unet_without_a_scheduler(
    tmp_path: Path, unet: Any, whole: Checkpoint, caplog: pytest.LogCaptureFixture
) -> None:
    unet.save_pretrained(tmp_path / "bare")
    checkpoint = load(tmp_path / "bare")
    assert caplog.messages == ["bare has no scheduler_config.json: using DDPMScheduler's defaults"]
    assert caplog.records[0].levelname == "WARNING"
    assert same_values(checkpoint, whole)
    assert checkpoint.description.name == "bare"
    assert checkpoint.description.schedule == Schedule()
    assert not checkpoint.description.schedule.clips_multistep
    ours = Schedule().alphas_cumprod
    np.testing.assert_allclose(ours, DDPMScheduler().alphas_cumprod, rtol=1e-6)


def test_a_scheduler_leaves_no_warning(pipeline: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(pipeline)
    assert caplog.messages == []


def test_several_variants_are_refused_by_name(tmp_path: Path) -> None:
    folder = variants(tmp_path / "pipeline")
    names = f"{STEM}.ema.safetensors, {STEM}.fp16.safetensors"
    assert refusal(folder) == f"unet: holds the variants {names}: name one of these files"


def test_several_sharded_variants_are_refused_by_name(tmp_path: Path) -> None:
    folder = sharded_variants(tmp_path / "pipeline")
    names = f"{SAFE}.index.ema.json, {SAFE}.index.fp16.json"
    assert refusal(folder) == f"unet: holds the variants {names}: name one of these files"


# Output of train_unconditional.py.


@pytest.fixture
def training(tmp_path: Path) -> Path:
    """A pipeline, and checkpoint-500 with a network and its moving average."""
    root = save_pipeline(tmp_path / "butterflies", small_unet(0), DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    step = root / "checkpoint-500"
    trained, average = small_unet(1), small_unet(2)
    trained.save_pretrained(step / "unet")
    EMAModel(
        average.parameters(), decay=0.99, use_ema_warmup=True, model_cls=UNet2DModel, model_config=average.config
    ).save_pretrained(step / "unet_ema")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (step / name).write_bytes(b"never opened")
    return root


def is_network(checkpoint: Checkpoint, seed: int) -> bool:
    """Whether a checkpoint holds small_unet(seed)."""
    key = "conv_in.weight"
    return torch.equal(checkpoint.network.state_dict()[key], small_unet(seed).state_dict()[key])


@pytest.mark.parametrize(
    ("named", "seed", "name"),
    [
        ("", 0, "butterflies"),
        ("checkpoint-500", 2, "butterflies/checkpoint-500"),
        ("checkpoint-500/unet", 1, "butterflies/checkpoint-500"),
        ("checkpoint-500/unet_ema", 2, "butterflies/checkpoint-500"),
        (f"checkpoint-500/unet/{SAFE}", 1, "butterflies/checkpoint-500"),
        ("checkpoint-500/random_states_0.pkl", 2, "butterflies/checkpoint-500"),  # stands for its folder
    ],
)
def test_training_folder(training: Path, named: str, seed: int, name: str) -> None:
    checkpoint = load(training / named, allow_pickle=True)
    assert is_network(checkpoint, seed)
    assert checkpoint.description.name == name
    assert checkpoint.description.schedule.beta_schedule == "squaredcos_cap_v2"  # the root's


def test_fields_of_the_average_change_nothing(training: Path) -> None:
    config = json.loads((training / "checkpoint-500" / "unet_ema" / "config.json").read_text())
    fields = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
    assert fields <= config.keys()
    plain, average = (find(training / "checkpoint-500" / name).config for name in ("unet", "unet_ema"))
    assert plain.model_dump() == average.model_dump()


def test_digests_tell_networks_of_one_config_apart(training: Path) -> None:
    names = ("", "checkpoint-500/unet", "checkpoint-500/unet_ema")
    assert len({load(training / name).description.digest for name in names}) == 3


def test_training_checkpoint_without_average(training: Path) -> None:
    shutil.rmtree(training / "checkpoint-500" / "unet_ema")
    assert is_network(load(training / "checkpoint-500"), 1)


def test_training_checkpoint_with_its_own_scheduler(training: Path) -> None:
    DDPMScheduler(beta_schedule="sigmoid").save_pretrained(training / "checkpoint-500" / "scheduler")
    assert load(training / "checkpoint-500").description.schedule.beta_schedule == "sigmoid"


def test_root_of_checkpoints_alone_is_refused_and_names_them(training: Path) -> None:
    for name in ("model_index.json", UNET_CONFIG, SCHEDULER_CONFIG):
        (training / name).unlink()
    shutil.copytree(training / "checkpoint-500", training / "checkpoint-2000")
    (training / "checkpoint-empty").mkdir()
    message = "is not a pipeline: name one of its folders checkpoint-2000, checkpoint-500"
    assert refusal(training) == message


# Networks.


def describe(folder: Path, network: Any, scheduler: Any = None) -> ModelDescription:
    return load(save_pipeline(folder, network, scheduler)).description


def test_image_sizes(tmp_path: Path) -> None:
    assert describe(tmp_path, small_unet(sample_size=(8, 12), in_channels=1, out_channels=1)).image_shape == (1, 8, 12)


def test_classes_have_no_label_of_their_own_for_none(tmp_path: Path) -> None:
    description = describe(tmp_path, small_unet(num_class_embeds=5))
    assert (description.num_classes, description.no_label, description.needs_label) == (5, None, True)
    assert description.class_names == ()


def test_classes_as_timesteps(tmp_path: Path) -> None:
    description = describe(tmp_path, small_unet(class_embed_type="timestep", num_class_embeds=7))
    assert (description.num_classes, description.no_label, description.needs_label) == (7, None, True)


def test_fourier_networks_are_never_asked_at_0(tmp_path: Path) -> None:
    """Fourier encodings take the timestep's logarithm, and DDPM's own grid ends at 0."""
    description = describe(tmp_path, small_unet(time_embedding_type="fourier"))
    assert description.first_timestep == 1
    recommended = description.recommended
    table = sample_table(description.schedule, recommended.sampler, recommended.num_inference_steps)
    assert recommended.sampler == "dpmpp_2m"
    assert len(table) == 50
    assert table.timesteps[-1] >= 1


def test_fourier_networks_keep_ddim_where_its_grid_ends_above_0(tmp_path: Path) -> None:
    network = small_unet(time_embedding_type="fourier")
    description = describe(tmp_path, network, DDPMScheduler(timestep_spacing="trailing"))
    recommended = description.recommended
    assert (recommended.sampler, recommended.num_inference_steps) == ("ddim", 50)
    assert sample_table(description.schedule, "ddim", 50).timesteps[-1] >= 1


def test_old_block_names(pipeline: Path, whole: Checkpoint) -> None:
    config = json.loads((pipeline / UNET_CONFIG).read_text())
    for name in ("down_block_types", "up_block_types"):
        edit(pipeline / UNET_CONFIG, {name: [f"UNetRes{kind}" for kind in config[name]]})
    assert load(pipeline).description.digest == whole.description.digest


@pytest.mark.parametrize("act_fn", ["SiLU", "swish"])
def test_activations_in_other_letters(pipeline: Path, act_fn: str) -> None:
    edit(pipeline / UNET_CONFIG, {"act_fn": act_fn})
    load(pipeline)


# Schedulers' configs.

LINEAR: Json = {}
STABLE_DIFFUSION: Json = {"beta_start": 0.00085, "beta_end": 0.012}
LATENT: Json = {**STABLE_DIFFUSION, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "DDPMScheduler": LINEAR,
    "DDPMParallelScheduler": LINEAR,
    "DDIMScheduler": LINEAR,
    "DDIMParallelScheduler": LINEAR,
    "DDIMInverseScheduler": LINEAR,
    "PNDMScheduler": LINEAR,
    "RePaintScheduler": LINEAR,
    "LMSDiscreteScheduler": LINEAR,
    "EulerDiscreteScheduler": LINEAR,
    "EulerAncestralDiscreteScheduler": LINEAR,
    "HeunDiscreteScheduler": STABLE_DIFFUSION,
    "KDPM2DiscreteScheduler": STABLE_DIFFUSION,
    "KDPM2AncestralDiscreteScheduler": STABLE_DIFFUSION,
    "DPMSolverMultistepScheduler": LINEAR,
    "DPMSolverMultistepInverseScheduler": LINEAR,
    "DPMSolverSinglestepScheduler": LINEAR,
    "DPMSolverSDEScheduler": STABLE_DIFFUSION,
    "DEISMultistepScheduler": LINEAR,
    "UniPCMultistepScheduler": LINEAR,
    "SASolverScheduler": LINEAR,
    "LCMScheduler": LATENT,
    "TCDScheduler": LATENT,
}
NOT_INSTALLABLE = {"LMSDiscreteScheduler", "DPMSolverSDEScheduler"}  # without scipy and torchsde


def config_of(folder: Path, scheduler: Json) -> ModelConfig:
    """A pipeline's config with another scheduler_config.json."""
    (folder / SCHEDULER_CONFIG).write_text(json.dumps(scheduler))
    return find(folder).config


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_with_their_own_defaults(pipeline: Path, name: str) -> None:
    config = config_of(pipeline, {"_class_name": name})
    assert config.schedule == Schedule(**SCHEDULERS[name])
    expected = Recommended("dpmpp_2m", 25) if name == "DPMSolverMultistepScheduler" else Recommended("ddim", 50)
    assert config.recommended_settings == expected


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - NOT_INSTALLABLE))
def test_schedulers_as_diffusers_saves_them(pipeline: Path, name: str) -> None:
    scheduler = scheduler_class(name)(num_train_timesteps=300, beta_start=0.0005, beta_end=0.03)
    scheduler.save_pretrained(pipeline / "scheduler")
    schedule = load(pipeline).description.schedule
    np.testing.assert_allclose(schedule.alphas_cumprod, scheduler.alphas_cumprod, rtol=1e-6)
    assert schedule.timestep_spacing == scheduler.config.get("timestep_spacing")
    assert schedule.set_alpha_to_one == scheduler.config.get("set_alpha_to_one")
    assert schedule.clip_sample == scheduler.config.get("clip_sample", True)
    assert not schedule.clips_multistep


def test_every_class_has_its_own_betas(pipeline: Path) -> None:
    """Check the table above against diffusers."""
    for name in sorted(SCHEDULERS.keys() - NOT_INSTALLABLE):
        expected = scheduler_class(name)().alphas_cumprod
        ours = config_of(pipeline, {"_class_name": name}).schedule.alphas_cumprod
        np.testing.assert_allclose(ours, expected, rtol=2e-6)


FIELDS: list[Json] = [
    {"num_train_timesteps": 77},
    {"beta_start": 0.001},
    {"beta_end": 0.05},
    *({"beta_schedule": name} for name in ("scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace", "exp")),
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
    {"prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
    {"clip_sample": False},
    {"clip_sample_range": 2.5},
    {"thresholding": True},
    {"thresholding": True, "dynamic_thresholding_ratio": 0.9},
    {"thresholding": True, "sample_max_value": 1.5},
    *({"variance_type": name} for name in ("fixed_small_log", "fixed_large", "fixed_large_log")),
    *({"timestep_spacing": name} for name in ("leading", "trailing", "linspace")),
    {"steps_offset": 1},
    {"set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_fields_that_change_sampling(pipeline: Path, fields: Json) -> None:
    schedule = config_of(pipeline, {"_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", **fields}).schedule
    assert schedule == Schedule(**fields)
    assert schedule != Schedule()


@pytest.mark.parametrize(
    ("name", "beta_schedule"),
    [
        ("DDPMScheduler", "scaled_linear"),
        ("DDPMScheduler", "squaredcos_cap_v2"),
        ("DDPMScheduler", "sigmoid"),
        ("DDPMScheduler", "laplace"),
        ("HeunDiscreteScheduler", "exp"),
    ],
)
def test_beta_schedules_are_those_of_diffusers(pipeline: Path, name: str, beta_schedule: str) -> None:
    scheduler = scheduler_class(name)(beta_schedule=beta_schedule)
    scheduler.save_pretrained(pipeline / "scheduler")
    ours, theirs = load(pipeline).description.schedule.alphas_cumprod, scheduler.alphas_cumprod.double().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("fields", "prediction_type"),
    [
        ({"predict_epsilon": False}, "sample"),
        ({"predict_epsilon": False, "prediction_type": "epsilon"}, "sample"),
        ({"predict_epsilon": False, "prediction_type": "v_prediction"}, "v_prediction"),
        ({"predict_epsilon": True}, "epsilon"),
        ({"predict_epsilon": True, "prediction_type": "sample"}, "sample"),
    ],
    ids=str,
)
def test_predict_epsilon_of_old_configs(pipeline: Path, fields: Json, prediction_type: str) -> None:
    assert config_of(pipeline, {"_class_name": "DDPMScheduler", **fields}).schedule.prediction_type == prediction_type


@pytest.mark.parametrize(
    ("fields", "clips"), [({}, True), ({"clip_sample": True}, True), ({"clip_sample": False}, False)], ids=str
)
def test_clip_sample_never_bounds_the_multistep_solver(pipeline: Path, fields: Json, clips: bool) -> None:
    """diffusers' DPM-Solver++ has no clip_sample."""
    schedule = config_of(pipeline, {"_class_name": "DDPMScheduler", "clip_sample_range": 2.0, **fields}).schedule
    assert schedule.clip_sample == clips
    assert not schedule.clips_multistep
    bounds = {name: sample_table(schedule, name, 10).lines[:, Column.BOUND] for name in ("ddpm", "ddim", "dpmpp_2m")}
    for name in ("ddpm", "ddim"):
        assert (bounds[name] == (2.0 if clips else np.inf)).all()
    assert (bounds["dpmpp_2m"] == np.inf).all()


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", None])
def test_fixed_variances(pipeline: Path, variance_type: str | None) -> None:
    schedule = config_of(pipeline, {"_class_name": "DDPMScheduler", "variance_type": variance_type}).schedule
    assert schedule.variance_type == (variance_type or "fixed_small")


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DDPMScheduler", {"variance_type": None}),
        ("DDPMScheduler", {}),
        ("DDIMScheduler", {}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned_range"}),
        ("DPMSolverMultistepScheduler", {"variance_type": "learned"}),  # ignores the variance
        ("DPMSolverMultistepScheduler", {"variance_type": None}),
    ],
    ids=str,
)
def test_twice_the_channels_are_a_learned_range(tmp_path: Path, name: str, fields: Json) -> None:
    folder = save_pipeline(tmp_path / "pipeline", small_unet(out_channels=6))
    config = config_of(folder, {"_class_name": name, **fields})
    assert config.schedule == Schedule(variance_type="learned_range")
    assert (config.channels, config.out_channels) == (3, 6)


CHANNELS = "out_channels must be in_channels, or twice that with learned_range"


@pytest.mark.parametrize(
    ("out_channels", "variance_type"),
    [(6, "fixed_small"), (6, "fixed_large"), (3, "learned_range"), (4, "fixed_small")],
)
def test_channels_that_do_not_fit_the_variance(tmp_path: Path, out_channels: int, variance_type: str) -> None:
    folder = save_pipeline(
        tmp_path / "pipeline", small_unet(out_channels=out_channels), DDPMScheduler(variance_type=variance_type)
    )
    assert refusal(folder) == (
        f"{UNET_CONFIG}: out_channels is {out_channels}, in_channels 3 and variance_type {variance_type}: {CHANNELS}"
    )


OF_BETAS = "and must be a scheduler whose noise is a schedule of betas, as DDPMScheduler and DDIMScheduler are"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        *(
            ({"_class_name": name}, f"_class_name is {name}, {OF_BETAS}")
            for name in (
                "FlowMatchEulerDiscreteScheduler",
                "EDMEulerScheduler",
                "ScoreSdeVeScheduler",
                "KarrasVeScheduler",
                "CMStochasticIterativeScheduler",
                "VQDiffusion",
            )
        ),
        ({"_class_name": ["my_code", "MyScheduler"]}, f"_class_name is ['my_code', 'MyScheduler'], {OF_BETAS}"),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True},
            "use_flow_sigmas is true, and must be false: flow matching is not supported",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"},
            "timestep_type is continuous, and must be discrete",
        ),
        (
            {"prediction_type": "flow_prediction"},
            "prediction_type is flow_prediction, and must be 'epsilon', 'v_prediction' or 'sample'",
        ),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "learned"},
            (
                "variance_type is learned, and must be learned_range: "
                "diffusers takes the network's raw output for a variance, and that may be negative"
            ),
        ),
        (
            {"variance_type": "small"},
            (
                "variance_type is small, and must be 'fixed_small', 'fixed_small_log', 'fixed_large', "
                "'fixed_large_log' or 'learned_range'"
            ),
        ),
        (
            {"beta_schedule": "cosine"},
            (
                "beta_schedule is cosine, and must be 'linear', 'scaled_linear', 'squaredcos_cap_v2', "
                "'sigmoid', 'laplace' or 'exp'"
            ),
        ),
        ({"beta_start": 0}, "beta_start is 0, and must be greater than 0"),
        ({"beta_end": float("nan")}, "beta_end is nan, and must be less than 1"),
        (
            {"timestep_spacing": "karras"},
            "timestep_spacing is karras, and must be 'leading', 'trailing' or 'linspace'",
        ),
        ({"num_train_timesteps": 2.5}, "num_train_timesteps is 2.5, and must be a valid integer"),
        (
            {"num_train_timesteps": 10**9},
            "num_train_timesteps is 1000000000, and must be less than or equal to 100000",
        ),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 values, and num_train_timesteps is 1000"),
        (
            {"trained_betas": [1.0, 0.1], "num_train_timesteps": 2},
            "trained_betas.0 is 1, and must lie between 0 and 1; the last may be 1",
        ),
        ({"clip_sample": "yes"}, "clip_sample is yes, and must be a valid boolean"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_schedulers_refused(pipeline: Path, config: Json, message: str) -> None:
    (pipeline / SCHEDULER_CONFIG).write_text(json.dumps({"_class_name": "DDPMScheduler", **config}))
    assert refusal(pipeline) == f"{SCHEDULER_CONFIG}: {message}"


# Everything that diffusers loads.


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        (SCHEDULER_CONFIG, {"beta_strat": 0.1, "two\nlines": 1}),
        (UNET_CONFIG, {"encoder_hid_dim": 8, "in_chanels": 3}),
        (UNET_CONFIG, {"num_attention_heads": 1, "time_proj_dim": 8}),  # fields of our config only
    ],
    ids=str,
)
def test_fields_that_diffusers_does_not_know_are_passed_over_and_named(
    pipeline: Path, whole: Checkpoint, part: str, changes: Json, caplog: pytest.LogCaptureFixture
) -> None:
    edit(pipeline / part, changes)
    assert load(pipeline).description.digest == whole.description.digest
    names = ", ".join(sorted(changes)).replace("\n", " ")
    assert caplog.messages == [f"{pipeline / part}: unknown fields are ignored: {names}"]


@pytest.mark.parametrize(
    "changes",
    [
        {"timesteps": 1000, "timestep_values": None},  # from the first latent diffusion
        {"timesteps": 7},
        {"thresholding": None, "rescale_betas_zero_snr": None},
        {"dynamic_thresholding_ratio": None, "sample_max_value": 0},
        {"clip_sample": True, "skip_prk_steps": True},
    ],
    ids=str,
)
def test_fields_of_schedulers_that_change_nothing(
    pipeline: Path, whole: Checkpoint, changes: Json, caplog: pytest.LogCaptureFixture
) -> None:
    edit(pipeline / SCHEDULER_CONFIG, changes)
    assert load(pipeline).description.digest == whole.description.digest
    assert caplog.messages == []


@pytest.mark.parametrize(
    "changes",
    [
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},  # diffusers checks only for null
        {"center_input_sample": None},
        {"dropout": 0.1},
    ],
    ids=str,
)
def test_fields_of_networks_that_change_nothing(
    pipeline: Path, whole: Checkpoint, changes: Json, caplog: pytest.LogCaptureFixture
) -> None:
    edit(pipeline / UNET_CONFIG, changes)
    UNet2DModel.from_pretrained(pipeline / "unet")
    caplog.clear()
    assert load(pipeline).description.digest == whole.description.digest
    assert caplog.messages == []


def test_fields_that_others_make_meaningless_do_not_matter(pipeline: Path) -> None:
    betas = [0.1, 0.2, 0.3]
    fields: Json = {"num_train_timesteps": 3, "trained_betas": betas, "clip_sample": False}
    expected = config_of(pipeline, fields)
    unread: Json = {"beta_start": 0, "beta_end": 2, "beta_schedule": "mine", "clip_sample_range": None}
    assert config_of(pipeline, fields | unread) == expected
    cosine: Json = {"beta_schedule": "squaredcos_cap_v2"}
    assert config_of(pipeline, cosine | {"beta_start": 0, "beta_end": 1}) == config_of(pipeline, cosine)


def test_a_variance_that_a_scheduler_does_not_read_does_not_matter(pipeline: Path) -> None:
    for name in ("DDIMScheduler", "PNDMScheduler"):
        config_of(pipeline, {"_class_name": name, "variance_type": "learned"})


FOR_PROMPTS = (
    "_class_name is UNet2DConditionModel, which draws for prompts: "
    "it is served as a part of its pipeline, with model_index.json"
)
COMPILED = ["torch._dynamo.eval_frame", "OptimizedModule"]


@pytest.mark.parametrize(
    "component",
    [
        COMPILED,
        ["torch.nn.parallel.distributed", "DistributedDataParallel"],
        ["torch.nn.parallel.data_parallel", "DataParallel"],
        ["accelerate.utils.operations", "ConvertOutputsToFp32"],
        ["deepspeed.runtime.engine", "DeepSpeedEngine"],
    ],
    ids=lambda component: component[1],
)
def test_what_wraps_a_part_in_the_index_is_seen_through(
    pipeline: Path, whole: Checkpoint, component: list[str]
) -> None:
    """The part's own config has its class."""
    edit(pipeline / "model_index.json", {"unet": component})
    assert load(pipeline).description.digest == whole.description.digest
    edit(pipeline / UNET_CONFIG, {"_class_name": "UNet2DConditionModel"})
    assert refusal(pipeline) == f"{UNET_CONFIG}: {FOR_PROMPTS}"


def test_where_a_part_does_not_say_its_class_the_index_does(pipeline: Path, whole: Checkpoint) -> None:
    edit(pipeline / UNET_CONFIG, {}, without="_class_name")
    edit(pipeline / SCHEDULER_CONFIG, {}, without="_class_name")
    assert load(pipeline).description.digest == whole.description.digest
    edit(pipeline / "model_index.json", {"scheduler": ["diffusers", "DPMSolverMultistepScheduler"]})
    assert load(pipeline).description.recommended == Recommended("dpmpp_2m", 25)
    edit(pipeline / "model_index.json", {"unet": COMPILED})
    assert refusal(pipeline) == f"{UNET_CONFIG}: _class_name is None, and must be UNet2DModel"


# Unused files are logged.


@pytest.mark.parametrize(
    "file",
    [
        "vae/config.json",
        "unet_ema/config.json",
        "text_encoder/config.json",
        "feature_extractor/preprocessor_config.json",
        "config.json",
        "scheduler_config.json",
        "pytorch_lora_weights.safetensors",
    ],
)
@pytest.mark.parametrize("named", ["", "unet"])
def test_a_part_that_is_not_used_is_named(
    pipeline: Path, named: str, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    (pipeline / file).parent.mkdir(exist_ok=True)
    (pipeline / file).write_text("{}")
    load(pipeline / named)
    assert caplog.messages == [f"pipeline: not used: {file}"]
    assert caplog.records[0].levelname == "WARNING"


def test_the_network_that_is_not_taken_of_a_training_checkpoint_is_named(
    training: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(training / "checkpoint-500")
    load(training / "checkpoint-500" / "unet")
    place = "butterflies/checkpoint-500"
    assert caplog.messages == [f"{place}: not used: {name}/config.json" for name in ("unet", "unet_ema")]


# Trajectories.

N = 10
SEEDS = [0, 7]
LABELS = [3, 0]
SAMPLERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp_2m": DPMSolverMultistepScheduler}


def our_steps(checkpoint: Checkpoint, sampler: str, labels: bool) -> Tensor:
    """Images and estimates of x_0 after each step, [N, 2, rows, C, H, W]."""
    description = checkpoint.description
    runner = runner_of(checkpoint.network, description.sample_shape, width=len(SEEDS))
    table = sample_table(description.schedule, sampler, N)
    slots = [
        runner.admit(labelled(table, seed, label if labels else None))
        for seed, label in zip(SEEDS, LABELS, strict=True)
    ]
    states = []
    for line in range(len(table)):
        runner.step([Forward(slot, 0, line) for slot in slots])
        states.append(list(zip(*(runner.read(slot) for slot in slots), strict=True)))
    return torch.from_numpy(np.array(states))


@torch.inference_mode()
def their_steps(network: Any, scheduler: Any, labels: bool) -> Tensor:
    """The loop of diffusers' pipelines with one generator for each image."""
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    channels, size = network.config.in_channels, network.config.sample_size
    x: Tensor = randn_tensor((len(SEEDS), channels, size, size), generator=generators)
    scheduler.set_timesteps(N)
    states = []
    for t in scheduler.timesteps:
        out = network(x, t, class_labels=torch.tensor(LABELS) if labels else None).sample
        if isinstance(scheduler, DDIMScheduler):  # has no variance argument
            out = out[:, :channels]
        step = scheduler.step(out, t, x, generator=generators)
        x = step.prev_sample
        # The multistep solver does not return its estimates of x_0.
        x0 = step.get("pred_original_sample", getattr(scheduler, "model_outputs", [None])[-1])
        states.append(torch.stack([x, x0]))
    return torch.stack(states)


def compare(folder: Path, network: Any, sampler: str, scheduler: Any, labels: bool = False) -> Tensor:
    """Compare 10 steps with diffusers'. After each: |difference| ≤ 1e-4 × max(1, max |x|). Returns ours."""
    steps, expected = our_steps(load(folder), sampler, labels), their_steps(network, scheduler, labels)
    assert steps.shape == expected.shape
    assert expected.isfinite().all()
    for step, step_expected in zip(steps.flatten(0, 1), expected.flatten(0, 1), strict=True):
        assert (step - step_expected).abs().max() <= 1e-4 * max(1, step_expected.abs().max())
    return steps


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("DDPMScheduler", {}),
        ("DDPMScheduler", {"variance_type": "fixed_large", "timestep_spacing": "trailing"}),
        ("DDPMScheduler", {"beta_schedule": "scaled_linear", "clip_sample": False}),
        ("DDPMScheduler", {"thresholding": True, "sample_max_value": 1.5, "prediction_type": "v_prediction"}),
        ("DDIMScheduler", {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195}),
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing",
                           "prediction_type": "v_prediction"}),
        ("PNDMScheduler", {}),
        ("EulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {}),
        ("DPMSolverMultistepScheduler", {"prediction_type": "sample", "num_train_timesteps": 200}),
        ("HeunDiscreteScheduler", {}),
        ("LCMScheduler", {}),
    ],
    ids=str,
)  # fmt: skip
def test_trajectories(tmp_path: Path, unet: Any, name: str, fields: Json, sampler: str) -> None:
    save_pipeline(tmp_path, unet, scheduler_class(name)(**fields))
    compare(tmp_path, unet, sampler, SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler"))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_of_the_first_latent_diffusion(tmp_path: Path, unet: Any, sampler: str) -> None:
    """Its scheduler's config has timesteps, which diffusers ignores."""
    save_pipeline(tmp_path, unet, DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False))
    edit(tmp_path / SCHEDULER_CONFIG, {"timesteps": 1000, "timestep_values": None})
    compare(tmp_path, unet, sampler, SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_trajectories_of_trained_betas_that_end_in_1(tmp_path: Path, unet: Any, sampler: str) -> None:
    """trained_betas with zero terminal SNR."""
    fields: Json = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    betas = rescale_zero_terminal_snr(Schedule().betas).tolist()
    assert betas[-1] == 1
    save_pipeline(tmp_path, unet, DDPMScheduler(trained_betas=betas, **fields))
    scheduler = SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler")
    assert scheduler.alphas_cumprod[-1] == 0
    compare(tmp_path, unet, sampler, scheduler)


def test_trained_betas_that_end_in_1_are_zero_snr_for_every_sampler() -> None:
    """Also DPM-Solver++, for which diffusers gives NaN."""
    rescaled = Schedule(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    written = Schedule(trained_betas=tuple(rescaled.betas), prediction_type="v_prediction", timestep_spacing="trailing")
    for sampler in SAMPLERS:
        ours, expected = (sample_table(schedule, sampler, N).lines for schedule in (written, rescaled))
        np.testing.assert_allclose(ours, expected, rtol=1e-9)


def test_trained_betas_beyond_the_last_timestep_do_not_matter(tmp_path: Path, unet: Any) -> None:
    betas = np.linspace(0.001, 0.03, 400)
    save_pipeline(tmp_path, unet, DDPMScheduler(num_train_timesteps=300, trained_betas=betas.tolist()))
    compare(tmp_path, unet, "ddim", DDIMScheduler.from_pretrained(tmp_path / "scheduler"))
    expected = Schedule(num_train_timesteps=300, trained_betas=tuple(betas[:300])).alphas_cumprod
    np.testing.assert_array_equal(load(tmp_path).description.schedule.alphas_cumprod, expected)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"])
def test_trajectories_of_fixed_variances(tmp_path: Path, unet: Any, variance_type: str) -> None:
    """For fixed_large_log diffusers takes the root of a negative logarithm. It means fixed_large."""
    save_pipeline(tmp_path, unet, DDPMScheduler(variance_type=variance_type))
    same = variance_type.removesuffix("_log") if variance_type == "fixed_large_log" else variance_type
    compare(tmp_path, unet, "ddpm", DDPMScheduler.from_pretrained(tmp_path / "scheduler", variance_type=same))


@pytest.mark.parametrize("beta_schedule", ["sigmoid", "laplace"])
def test_trajectories_of_schedules_that_only_ddpm_has(tmp_path: Path, unet: Any, beta_schedule: str) -> None:
    save_pipeline(tmp_path, unet, DDPMScheduler(beta_schedule=beta_schedule))
    compare(tmp_path, unet, "ddpm", DDPMScheduler.from_pretrained(tmp_path / "scheduler"))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DPMSolverMultistepScheduler"])
def test_trajectories_of_a_learned_range(tmp_path: Path, name: str, sampler: str) -> None:
    network = small_unet(out_channels=6)
    save_pipeline(tmp_path, network, scheduler_class(name)(variance_type="learned_range"))
    steps = compare(tmp_path, network, sampler, SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler"))
    other = small_unet(out_channels=6)
    other.conv_out.weight[3:] *= 2
    save_pipeline(tmp_path / "other", other, scheduler_class(name)(variance_type="learned_range"))
    varied = our_steps(load(tmp_path / "other"), sampler, labels=False)
    assert ((varied[:, 0] - steps[:, 0]).abs().max() > 0.01) == (sampler == "ddpm")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trajectories_of_classes(tmp_path: Path, sampler: str) -> None:
    network = small_unet(num_class_embeds=5)
    save_pipeline(tmp_path, network)
    scheduler = SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler")
    labelled = compare(tmp_path, network, sampler, scheduler, labels=True)
    fill(network.class_embedding, seed=9)
    save_pipeline(tmp_path, network)
    assert (our_steps(load(tmp_path), sampler, labels=True) - labelled).abs().max() > 0.01


@pytest.mark.parametrize(("sampler", "spacing"), [("dpmpp_2m", "leading"), ("ddpm", "trailing"), ("ddim", "trailing")])
def test_trajectories_of_fourier_networks(tmp_path: Path, sampler: str, spacing: str) -> None:
    network = small_unet(time_embedding_type="fourier")
    save_pipeline(tmp_path, network, DDPMScheduler(timestep_spacing=spacing))
    compare(tmp_path, network, sampler, SAMPLERS[sampler].from_pretrained(tmp_path / "scheduler"))


# Errors.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"unet": ["my_code", "MyUNet"]},
            "unet is my_code.MyUNet, and must be a class of diffusers: other code is never run",
        ),
        (
            {"scheduler": ["scheduling_mine", "DDPMScheduler"]},
            "scheduler is scheduling_mine.DDPMScheduler, and must be a class of diffusers: other code is never run",
        ),
        ({"unet": ["diffusers"]}, "unet is ['diffusers'], and must be a library and a class"),
        ({"unet": ["diffusers", 3]}, "unet is ['diffusers', 3], and must be a library and a class"),
        (
            {"text_encoder": ["transformers", "CLIP"]},
            "has the part text_encoder, and the parts must be unet, scheduler and vqvae or vae",
        ),
    ],
    ids=str,
)
def test_pipelines_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / "model_index.json", changes)
    assert refusal(pipeline) == f"model_index.json: {message}"


@pytest.mark.parametrize(
    "changes", [{"_module": "x"}, {"safety_checker": [None, None]}, {"force_zeros": True}], ids=str
)
def test_pipelines_not_refused(pipeline: Path, changes: Json) -> None:
    edit(pipeline / "model_index.json", changes)
    load(pipeline)


FIR = "belongs to NCSN++: its FIR filters are not supported"
DOWN = ["DownBlock2D", "AttnDownBlock2D"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"_class_name": "UNet2DConditionModel"},
            FOR_PROMPTS,
        ),
        ({"_class_name": None}, "_class_name is None, and must be UNet2DModel"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, f"down_block_types has SkipDownBlock2D, which {FIR}"),
        (
            {"down_block_types": [*DOWN[:1], "AttnSkipDownBlock2D"]},
            f"down_block_types has AttnSkipDownBlock2D, which {FIR}",
        ),
        ({"up_block_types": ["SkipUpBlock2D"] * 2}, f"up_block_types has SkipUpBlock2D, which {FIR}"),
        ({"up_block_types": ["UNetResAttnSkipUpBlock2D"] * 2}, f"up_block_types has AttnSkipUpBlock2D, which {FIR}"),
        (
            {"down_block_types": ["CrossAttnDownBlock2D"] * 2},
            "down_block_types has CrossAttnDownBlock2D, which attends to text, and that is not supported",
        ),
        (
            {"up_block_types": ["KUpBlock2D"] * 2},
            "up_block_types has KUpBlock2D, which belongs to the latent upscaler, and that is not supported",
        ),
        (
            {"down_block_types": ["DownBlock2D", "MyDownBlock2D"]},
            (
                "down_block_types.1 is MyDownBlock2D, and must be 'DownBlock2D', 'AttnDownBlock2D' "
                "or 'ResnetDownsampleBlock2D'"
            ),
        ),
        ({"sample_size": None}, "sample_size is None, and must be the images' size or [height, width]"),
        ({"sample_size": "8"}, "sample_size is 8, and must be the images' size or [height, width]"),
        ({"sample_size": 9}, "image size 9x9 cannot be halved 1 times: height and width must be multiples of 2"),
        ({"sample_size": [8, 9]}, "image size 8x9 cannot be halved 1 times: height and width must be multiples of 2"),
        ({"sample_size": 0}, "image_size is [0, 0], and must be from 1 to 8192"),
        ({"sample_size": 16384}, "image_size is [16384, 16384], and must be from 1 to 8192"),
        ({"sample_size": [8]}, "sample_size is [8], and must be the images' size or [height, width]"),
        ({"sample_size": [8, 8.5]}, "sample_size is [8, 8.5], and must be the images' size or [height, width]"),
        ({"sample_size": True}, "sample_size is True, and must be the images' size or [height, width]"),
        ({"block_out_channels": [8, 18]}, "norm_num_groups is 4, which does not divide a width of 18"),
        ({"block_out_channels": [8]}, "down_block_types has 2 blocks, and block_out_channels 1 widths"),
        ({"block_out_channels": [8, 32768]}, "block_out_channels.1 is 32768, and must be less than or equal to 16384"),
        ({"layers_per_block": 65}, "layers_per_block is 65, and must be less than or equal to 64"),
        ({"act_fn": "tanh"}, "act_fn is tanh, and must be 'silu', 'swish', 'mish', 'gelu' or 'relu'"),
        (
            {"time_embedding_type": "learned"},
            "num_train_timesteps is required where time_embedding_type is learned",
        ),
        (
            {"time_embedding_type": "learned", "num_train_timesteps": 999},
            "schedule.num_train_timesteps is 1000, and the learned time embedding has only 999 timesteps",
        ),
        ({"class_embed_type": "projection"}, "class_embed_type is projection, and must be 'timestep' or 'identity'"),
        ({"norm_eps": float("inf")}, "norm_eps is inf, and must be a finite number"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_networks_refused(pipeline: Path, changes: Json, message: str) -> None:
    edit(pipeline / UNET_CONFIG, changes)
    assert refusal(pipeline) == f"{UNET_CONFIG}: {message}"


def test_networks_without_a_size_are_refused(pipeline: Path) -> None:
    edit(pipeline / UNET_CONFIG, {}, without="sample_size")
    message = f"{UNET_CONFIG}: sample_size is None, and must be the images' size or [height, width]"
    assert refusal(pipeline) == message


@pytest.mark.parametrize("name", [UNET_CONFIG, SCHEDULER_CONFIG, "model_index.json"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read: Expecting value: line 1 column 1 (char 0)"),
        (b"{'_class_name': 1}", "cannot be read: Expecting property name enclosed in double quotes: line 1"),
        (b'{"_class_name": "\xff"}', "cannot be read: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
        (b"[]", "holds a list, and must hold a JSON object"),
        (b'"UNet2DModel"', "holds a str, and must hold a JSON object"),
        (b" " * (16 * 2**20 + 1), "has 16777217 bytes, and must have at most 16777216"),
    ],
    ids=["empty", "quotes", "encoding", "deep", "list", "string", "large"],
)
def test_configs_that_are_no_json_objects(pipeline: Path, name: str, text: bytes, message: str) -> None:
    (pipeline / name).write_bytes(text)
    assert refusal(pipeline).startswith(f"{name}: {message}")


def test_flat_config_that_is_no_json_object(tmp_path: Path) -> None:
    folder = flat_without_index(tmp_path / "flat")
    (folder / "config.json").write_text("[]")
    assert refusal(folder) == "config.json: holds a list, and must hold a JSON object"


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (SCHEDULER_CONFIG, {"_class_name": LONG}),
        (SCHEDULER_CONFIG, {"prediction_type": LONG, "timestep_spacing": LONG, "beta_schedule": LONG}),
        (SCHEDULER_CONFIG, {"trained_betas": [LONG] * 1000}),
        (SCHEDULER_CONFIG, {"timestep_type": LONG}),
        (UNET_CONFIG, {"_class_name": [LONG] * 9}),
        (UNET_CONFIG, {"down_block_types": [LONG] * 12}),
        (UNET_CONFIG, {"sample_size": [8] * 5000}),
        (UNET_CONFIG, {"block_out_channels": ["8"] * 12, "act_fn": LONG}),
        ("model_index.json", {LONG: ["diffusers", "CLIP"]}),
        ("model_index.json", {"unet": [LONG, LONG]}),
        ("model_index.json", {"unet": [LONG] * 3}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals_are_short_whatever_came(pipeline: Path, file: str, changes: Json) -> None:
    edit(pipeline / file, changes)
    message = refusal(pipeline)  # checks its length
    assert message.startswith(f"{file}: ")
    deep = shutil.copytree(pipeline, pipeline / "/".join(["deep"] * 60))
    with pytest.raises(CheckpointError) as error:
        load(deep)
    check_line(error.value)
    line = str(error.value)
    assert line.startswith("…")
    assert f"/{file}: {message.removeprefix(f'{file}: ')[:230]}" in line  # the path gives way


def test_missing_weights_are_refused(pipeline: Path) -> None:
    (pipeline / "unet" / SAFE).unlink()
    assert refusal(pipeline) == f"unet: holds no {SAFE}"


def test_missing_network_is_refused(pipeline: Path) -> None:
    shutil.rmtree(pipeline / "unet")
    assert refusal(pipeline) == "model_index.json: exists, but neither unet/config.json nor config.json does"


def test_folders_of_something_else_are_refused(pipeline: Path, tmp_path: Path) -> None:
    message = "is not a checkpoint, and must be config.json and model.safetensors, or a folder of the diffusers library"
    assert refusal(tmp_path) == message
    assert refusal(pipeline / "scheduler") == message
    assert refusal(tmp_path / "nowhere") == "there is no such file or folder"
