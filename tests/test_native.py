"""Native weights: writing and reading them back, the defaults of configs, and the errors of bad ones."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

from model.checkpoints.errors import CheckpointError
from model.checkpoints.load import load as load_checkpoint
from model.checkpoints.native import CONFIG, WEIGHTS, find, parse
from model.description import ModelDescription, Recommended
from model.nets.unet import DiffusionUNet
from model.samplers import SAMPLERS
from model.schedule import Schedule
from tests.checkpoints import refusal
from tests.networks import fill

BARE: dict[str, Any] = {
    "architecture": "diffusion_unet",
    "in_channels": 1,
    "model_channels": 4,
    "channel_multipliers": [1, 2],
    "image_size": [8, 12],
    "schedule": {},
}
FULL: dict[str, Any] = {
    **BARE,
    "norm_groups": 2,
    "attention_levels": [1],
    "middle_attention": True,
    "input_skip": True,
    "channel_multipliers": [3, 2],
    "num_classes": 3,
    "class_names": ["a", "b", "c"],
    "schedule": {
        "num_train_timesteps": 40,
        "trained_betas": [0.01] * 40,
        "prediction_type": "v_prediction",
        "clip_sample": True,
        "timestep_spacing": "trailing",
    },
    "recommended": {"sampler": "dpmpp_2m", "num_inference_steps": 8, "guidance_scale": 2},
}

BECAUSE = "without input_skip, final_conv takes model_channels channels"
NO_GRID = "1000 steps would repeat a timestep of 0 to 999; dpmpp_2m takes 1 to 999 here"

Weights = dict[str, Tensor]


def write(folder: Path, config: dict[str, Any], weights: Weights | None = None) -> Path:
    """Write native weights, random unless given."""
    if weights is None:
        network = parse(folder, config).build()
        fill(network)
        weights = network.state_dict()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, folder / WEIGHTS)
    return folder


def tensors_of(folder: Path) -> Weights:
    return load_tensors((folder / WEIGHTS).read_bytes())


def load(folder: Path) -> tuple[DiffusionUNet, ModelDescription]:
    checkpoint = load_checkpoint(folder)
    assert isinstance(checkpoint.network, DiffusionUNet)
    return checkpoint.network, checkpoint.description


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return write(tmp_path / "bare", BARE)


def output(network: DiffusionUNet) -> Tensor:
    x = torch.randn((2, 1, 8, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        out: Tensor = network(x, torch.tensor([3, 900]))
    return out


def test_round_trip(tmp_path: Path) -> None:
    written = DiffusionUNet(
        1, 4, (3, 2), norm_groups=2, attention_levels=(1,), middle_attention=True, num_classes=3, input_skip=True
    )
    fill(written)
    folder = write(tmp_path / "my weights", FULL, written.state_dict())
    assert find(folder) is not None
    network, description = load(folder)
    assert torch.equal(output(network), output(written))
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert description.name == "my weights"
    assert description.architecture == "diffusion_unet"
    assert description.image_shape == (1, 8, 12)
    assert description.num_classes == 3
    assert description.class_names == ("a", "b", "c")
    assert description.num_parameters == sum(parameter.numel() for parameter in written.parameters())
    assert description.schedule == Schedule(**FULL["schedule"])
    assert description.schedule.clips_multistep
    assert description.recommended == Recommended("dpmpp_2m", 8, 2.0)


def test_bare_config_is_the_bare_skeleton_and_the_defaults(bare: Path) -> None:
    network, description = load(bare)
    assert network.state_dict().keys() == DiffusionUNet(1, 4, (1, 2)).state_dict().keys()
    assert description.num_classes is None
    assert description.class_names == ()
    assert description.schedule == Schedule()
    assert not description.schedule.clips_multistep
    assert description.recommended == Recommended("ddim", 50, 1.0)


def test_short_schedule_recommends_all_of_its_steps(tmp_path: Path) -> None:
    _, description = load(write(tmp_path / "short", {**BARE, "schedule": {"num_train_timesteps": 20}}))
    assert description.recommended.num_inference_steps == 20


def test_float64_loads_as_float32(bare: Path) -> None:
    weights = {key: tensor.double() for key, tensor in tensors_of(bare).items()}
    save_file(weights, bare / WEIGHTS)
    network, _ = load(bare)
    for key, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, weights[key].float())
    assert output(network).dtype == torch.float32


def test_network_outlives_its_file(bare: Path) -> None:
    """Overwriting the files of a served model must not change its answers."""
    network, _ = load(bare)
    before = output(network)
    with (bare / WEIGHTS).open("r+b") as file:
        file.write(bytes((bare / WEIGHTS).stat().st_size))
    assert torch.equal(output(network), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"interpolation_type": "log_linear"},
        {"sigma_min": 0.1},
        {"sigma_max": 9.0},
        {"final_sigmas_type": "sigma_min"},
        {"original_inference_steps": 100},
        {"timestep_scaling": 1.0},
        {"set_alpha_to_one": False},
    ],
    ids=str,
)
def test_the_levels_of_a_schedule_are_in_the_digest(bare: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    other = write(tmp_path / "other", {**BARE, "schedule": changes})
    assert load(other)[1].digest != load(bare)[1].digest


def test_digest_is_of_config_and_weights(bare: Path, tmp_path: Path) -> None:
    digest = load(bare)[1].digest
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert load(write(tmp_path / "another name", BARE))[1].digest == digest
    other_config = write(tmp_path / "config", {**BARE, "recommended": {"sampler": "ddpm"}})
    assert load(other_config)[1].digest != digest
    weights = tensors_of(bare)
    weights["final_conv.bias"] += 1
    assert load(write(tmp_path / "weights", BARE, weights))[1].digest != digest


def test_find(bare: Path, tmp_path: Path) -> None:
    assert find(bare) is not None
    assert find(bare / CONFIG) is not None
    assert find(bare / WEIGHTS) is not None
    assert find(tmp_path) is None
    assert find(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "unet"}, "architecture is unet, and must be one of diffusion_unet, unet_2d"),
        ({"in_chanels": 1}, "in_chanels: there is no such field"),
        ({"two\nlines": 1}, "two lines: there is no such field"),
        ({"schedule": {"beta": 1}}, "schedule.beta: there is no such field"),
        ({"recommended": {"steps": 5}}, "recommended.steps: there is no such field"),
        ({"in_channels": "3"}, "in_channels is 3, and must be a valid integer"),
        ({"in_channels": True}, "in_channels is True, and must be a valid integer"),
        ({"in_channels": 0}, "in_channels is 0, and must be greater than or equal to 1"),
        ({"middle_attention": "yes"}, "middle_attention is yes, and must be a valid boolean"),
        ({"model_channels": 2**20}, "model_channels is 1048576, and must be less than or equal to 4096"),
        ({"model_channels": 5}, "model_channels is 5, and must be even, for its sines and cosines"),
        ({"channel_multipliers": [1, 2.5]}, "channel_multipliers.1 is 2.5, and must be a valid integer"),
        ({"channel_multipliers": [1, 65]}, "channel_multipliers has 65, and must be at most 64"),
        ({"channel_multipliers": [1, 0]}, "channel_multipliers is [1, 0], and must be one or more positive integers"),
        ({"channel_multipliers": [2, 2]}, f"the first of channel_multipliers is 2, and must be 1: {BECAUSE}"),
        ({"norm_groups": 3}, "norm_groups is 3, which does not divide a width of 8 channels"),
        ({"attention_levels": [2]}, "attention_levels names level 2; the levels are 0 to 1"),
        (
            {"image_size": [8, 10]},
            "image size 8x10 cannot be halved 2 times: height and width must be multiples of 4",
        ),
        ({"image_size": [8]}, "image_size.1: is required"),
        ({"image_size": [-8, 8]}, "image_size is [-8, 8], and must be from 1 to 8192"),
        ({"image_size": [0, 8]}, "image_size is [0, 8], and must be from 1 to 8192"),
        ({"image_size": [8, 8196]}, "image_size is [8, 8196], and must be from 1 to 8192"),
        ({"class_names": ["a"]}, "class_names has 1 names, and num_classes is None"),
        ({"num_classes": 3, "class_names": ["a", "b"]}, "class_names has 2 names, and num_classes is 3"),
        ({"num_classes": 2, "class_names": ["a", "a"]}, "class_names names a class twice"),
        (
            {"schedule": {"prediction_type": "eps"}},
            "schedule.prediction_type is eps, and must be 'epsilon', 'v_prediction' or 'sample'",
        ),
        (
            {"schedule": {"trained_betas": [0.1] * 3}},
            "schedule: trained_betas has 3 values, and num_train_timesteps is 1000",
        ),
        (
            {"recommended": {"sampler": "magic"}},
            f"recommended.sampler is magic, and must be one of {', '.join(SAMPLERS)}",
        ),
        (
            {"recommended": {"num_inference_steps": 2000}},
            "recommended.num_inference_steps is 2000, and schedule.num_train_timesteps only 1000",
        ),
        (
            {"recommended": {"sampler": "dpmpp_2m", "num_inference_steps": 1000}},
            f"recommended.num_inference_steps: {NO_GRID}",
        ),
        (
            {"distilled": {"sampler": "magic", "num_inference_steps": [4]}},
            f"distilled.sampler is magic, and must be one of {', '.join(SAMPLERS)}",
        ),
        (
            {"distilled": {"sampler": "ddim", "num_inference_steps": [4, 2000]}},
            "distilled.num_inference_steps is 2000, and schedule.num_train_timesteps only 1000",
        ),
        (
            {"distilled": {"sampler": "ddim", "num_inference_steps": [0]}},
            "distilled.num_inference_steps.0 is 0, and must be greater than 0",
        ),
        (
            {"distilled": {"sampler": "ddim", "num_inference_steps": [4]}},
            "recommended is ddim with 50 steps, and must be among what distilled allows",
        ),
        (
            {"recommended": {"guidance_scale": 0.5}},
            "recommended.guidance_scale is 0.5, and must be greater than or equal to 1",
        ),
        ({"in_channels": "3", "x": 1}, "in_channels is 3, and must be a valid integer; x: there is no such field"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_configs_refused(bare: Path, changes: dict[str, Any], message: str) -> None:
    (bare / CONFIG).write_text(json.dumps({**BARE, **changes}), encoding="utf-8")
    assert refusal(bare) == f"{CONFIG}: {message}"


@pytest.mark.parametrize("field", BARE)
def test_fields_without_a_default(bare: Path, field: str) -> None:
    config = {name: value for name, value in BARE.items() if name != field}
    (bare / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    assert refusal(bare) == f"{CONFIG}: {field}: is required"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "cannot be read: Expecting value"),
        (b"{'architecture': 1}", "cannot be read: Expecting property name"),
        (b'{"architecture": "diffusion_unet"', "cannot be read: Expecting ',' delimiter"),
        (b'{"architecture": "\xff"}', "cannot be read: 'utf-8' codec can't decode"),
        (b"[" * 100_000, "cannot be read: maximum recursion depth exceeded"),
        (b"[]", "holds a list, and must hold a JSON object"),
        (b"null", "holds a NoneType, and must hold a JSON object"),
        (b" " * (16 * 2**20 + 1), "has 16777217 bytes, and must have at most 16777216"),
    ],
    ids=["empty", "quotes", "cut short", "encoding", "deep", "list", "null", "large"],
)
def test_files_that_are_no_config(bare: Path, text: bytes, message: str) -> None:
    (bare / CONFIG).write_bytes(text)
    assert refusal(bare).startswith(f"{CONFIG}: {message}")


def without(key: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: tensor for name, tensor in weights.items() if name != key}


def with_tensor(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[Weights], Weights]:
    return lambda weights: {**weights, key: change(weights.get(key, torch.zeros(2)))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("middle.conv1.weight"), "lacks the key middle.conv1.weight, [8, 8, 3, 3]"),
        (
            with_tensor("middle.conv3.weight", torch.clone),
            "has the key middle.conv3.weight, which the network of config.json lacks",
        ),
        (
            with_tensor("ups.2.conv1.weight", lambda tensor: tensor[:, :11].contiguous()),
            "ups.2.conv1.weight is [4, 11, 3, 3], and must be [4, 12, 3, 3]",
        ),
        (
            with_tensor("final_conv.bias", lambda tensor: tensor[0].clone()),
            "final_conv.bias is [], and must be [1]",
        ),
        (
            with_tensor("input_conv.bias", lambda tensor: tensor.to(torch.int64)),
            "input_conv.bias is I64, and must be floating point",
        ),
        (lambda weights: {}, "lacks the key time_embed.0.weight, [16, 4]"),
    ],
    ids=["missing", "extra", "shape", "scalar", "integers", "none"],
)
def test_tensors_refused(bare: Path, change: Callable[[Weights], Weights], message: str) -> None:
    save_file(change(tensors_of(bare)), bare / WEIGHTS)
    assert refusal(bare) == f"{WEIGHTS}: {message}"


def test_weights_of_another_config_are_refused(bare: Path) -> None:
    (bare / CONFIG).write_text(json.dumps({**BARE, "norm_groups": 2}), encoding="utf-8")
    assert refusal(bare) == f"{WEIGHTS}: lacks the key downs.0.norm1.weight, [4]"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_weights_cut_short_are_refused(bare: Path, share: float) -> None:
    whole = (bare / WEIGHTS).read_bytes()
    (bare / WEIGHTS).write_bytes(whole[: int(len(whole) * share)])
    assert refusal(bare).startswith(f"{WEIGHTS}: cannot be read: ")


def test_weights_that_are_not_safetensors_are_refused(bare: Path) -> None:
    torch.save(tensors_of(bare), bare / WEIGHTS)
    assert refusal(bare).startswith(f"{WEIGHTS}: cannot be read: ")


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files_are_named(bare: Path, name: str) -> None:
    (bare / name).unlink()
    message = refusal(bare)
    assert message.startswith(f"{name}: cannot be read: ")
    assert "No such file" in message


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such file or folder"):
        load(tmp_path / "nowhere")


# Architecture unet_2d.

UNET_2D: dict[str, Any] = {
    "architecture": "unet_2d",
    "network": {
        "block_out_channels": [8, 8],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": 4,
    },
    "num_classes": 4,
    "image_size": [8, 16],
    "schedule": {},
}


CLASSES = "and network.num_class_embeds 4: num_classes must be the same, or one less where the last stands for no label"


def changed(**network: object) -> dict[str, Any]:
    return {**UNET_2D, "network": {**UNET_2D["network"], **network}}


def test_unet_2d_round_trip(tmp_path: Path) -> None:
    folder = write(tmp_path / "it", UNET_2D)
    checkpoint = load_checkpoint(folder)
    state = checkpoint.network.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in tensors_of(folder).items())
    assert state.keys() == tensors_of(folder).keys()
    model = checkpoint.description
    assert (model.architecture, model.image_shape, model.out_channels) == ("unet_2d", (3, 8, 16), 3)
    assert (model.num_classes, model.no_label, model.needs_label) == (4, None, True)


def test_the_last_class_can_stand_for_no_label(tmp_path: Path) -> None:
    config = {**UNET_2D, "num_classes": 3, "class_names": ["a", "b", "c"], "name": "named"}
    model = load_checkpoint(write(tmp_path / "it", config)).description
    assert (model.num_classes, model.no_label, model.needs_label) == (3, 3, False)
    assert model.name == "named"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**UNET_2D, "num_classes": 2}, f"num_classes is 2, {CLASSES}"),
        ({**UNET_2D, "num_classes": None}, f"num_classes is None, {CLASSES}"),
        (changed(num_class_embeds=None), "num_classes is 4, and the network has no classes"),
        (changed(class_embed_type="identity"), "num_classes is 4, and the network has no classes"),
        (
            {**changed(num_class_embeds=None, class_embed_type="timestep"), "num_classes": None},
            "num_classes is required where network.class_embed_type is timestep",
        ),
        (
            changed(time_embedding_type="learned", num_train_timesteps=999),
            "schedule.num_train_timesteps is 1000, and the learned time embedding has only 999 timesteps",
        ),
        (
            changed(out_channels=6),
            (
                "out_channels is 6, in_channels 3 and variance_type fixed_small: "
                "out_channels must be in_channels, or twice that with learned_range"
            ),
        ),
        (
            {**UNET_2D, "schedule": {"variance_type": "learned_range"}},
            (
                "out_channels is 3, in_channels 3 and variance_type learned_range: "
                "out_channels must be in_channels, or twice that with learned_range"
            ),
        ),
        (
            changed(time_embedding_type="fourier"),
            "recommended.sampler: ddim ends at timestep 0, and the network takes its logarithm",
        ),
        (
            {**UNET_2D, "recommended": {"guidance_scale": 1.5}},
            "recommended.guidance_scale is 1.5, and must be 1 for a network trained only with labels",
        ),
        (changed(layers=2), "network.layers: there is no such field"),
        (changed(norm_num_groups=3), "network: norm_num_groups is 3, which does not divide a width of 8"),
        (
            {**UNET_2D, "image_size": [8, 9]},
            "image size 8x9 cannot be halved 1 times: height and width must be multiples of 2",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_unet_2d_configs_refused(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    save_file({}, tmp_path / WEIGHTS)
    assert refusal(tmp_path) == f"{CONFIG}: {message}"


def test_a_vae_that_the_config_does_not_know_is_named(bare: Path, caplog: pytest.LogCaptureFixture) -> None:
    (bare / "autoencoder.safetensors").write_bytes(b"never opened")
    load(bare)
    assert caplog.messages == [f"{bare.name}: autoencoder.safetensors is not used: config.json has no autoencoder"]
