"""bench.text: what it makes of its measurements, and that a run goes on. Nothing is measured here."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bench import text_tables, text_weights
from bench.peak import held
from bench.servers import Server
from bench.text import Bench, Cases, reason, repeated
from bench.text_precision import compared, draw
from bench.text_systems import Stepwise
from bench.text_tables import Found, Key, Model
from bench.text_weights import Architecture
from model.checkpoints.load import find
from model.rows import Group
from tests.local import serving_fake
from tests.servers import eventually

SIZES = Group(512, 512), Group(256, 256)
MODELS = {"sd15": Model("tiny", SIZES)}
TINY = replace(  # images of 64x64
    text_weights.SD15,
    unet={
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    vae={**text_weights.SD15.vae, "block_out_channels": (16,) * 4, "norm_num_groups": 8, "layers_per_block": 1},
    texts=(
        {
            **text_weights.SD15.texts[0],
            "vocab_size": 514,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    ),
)
TINY_XL = replace(  # images of 64x64 to 128x128
    text_weights.SDXL,
    unet={
        **text_weights.SDXL.unet,
        "sample_size": 8,
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (2, 2, 2),
        "transformer_layers_per_block": (1, 1, 2),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,  # six sizes of 8, and 32 of the pooled text
    },
    vae=TINY.vae,
    texts=(TINY.texts[0], {**TINY.texts[0], "projection_dim": 32, "hidden_act": "gelu"}),
)


def of_a_start(resident: Sequence[float]) -> Found:
    return {"seconds": [1.0], "peak": [9e9], "resident": resident, "mapped": [0.0]}


def test_memory_for_weights_is_what_is_left_of_program_and_activations() -> None:
    results = {
        Key("empty", "start", "later", ""): of_a_start([0.5e9]),
        Key("sd15", "start", "later", "512x512"): of_a_start([4.2e9, 4.1e9, 4.6e9]),  # the median counts
        Key("sd15", "start", "later", "256x256"): of_a_start([3.6e9]),  # 0.6 for three quarters of the pixels
        Key("sd15", "weights", "", ""): {"resident": [2e9]},
    }
    [cells] = text_tables.memory(results, MODELS).rows.values()
    assert cells == pytest.approx([0.5, 4.2, 0.8, 2.9, 2.0, 1.45])


def test_memory_is_not_told_where_a_start_failed() -> None:
    results = {
        Key("empty", "start", "later", ""): of_a_start([0.5e9]),
        Key("sd15", "start", "later", "512x512"): {"failed": "no memory"},
        Key("sd15", "start", "later", "256x256"): of_a_start([3.6e9]),
        Key("sd15", "weights", "", ""): {"resident": [2e9]},
    }
    assert text_tables.memory(results, MODELS).cell("tiny", "an empty server, GB") == "not all was measured"


def test_a_table_shows_quartiles_single_values_failures_and_what_was_not_run() -> None:
    results: dict[Key, Found] = {
        Key("sd15", "start", "first", "512x512"): {
            "seconds": [60.0],
            "peak": [9e9],
            "resident": [8e9],
            "mapped": [0.0],
        },
        Key("sd15", "start", "later", "512x512"): {"failed": "failed: no memory"},
        Key("sd15", "start", "later", "256x256"): {
            "seconds": [30.0, 34.0, 32.0],
            "peak": [7e9] * 3,
            "resident": [6e9] * 3,
            "mapped": [1e9] * 3,
        },
    }
    assert text_tables.start(results, MODELS).markdown().splitlines()[2:] == [
        "| tiny, Stepwise, first start, 512x512 | 60 | 9 | 8 | 0 |",
        "| tiny, Stepwise, later start, 512x512 | failed: no memory |  |  |  |",
        "| tiny, Stepwise, later start, 256x256 | 32 (31 to 33) | 7 (7 to 7) | 6 (6 to 6) | 1 (1 to 1) |",
        "| tiny, diffusers, float32 | not run |  |  |  |",
        "| tiny, diffusers, bfloat16 | not run |  |  |  |",
    ]


def test_the_other_tables() -> None:
    found = text_tables.tables(
        {
            Key("sd15", "steps", "Stepwise", "256x256"): {
                "one row": [0.25],
                "two rows": [0.2, 0.3, 0.2],
                "text": [0.03],
                "decode": [0.7],
                "bits": "keep their bits",
            },
            Key("sd15", "ratio", "contiguous_format", "256x256"): {
                "ours": [1.0, 2.0],
                "theirs": [2.0, 2.0],
                "ratio": [0.5, 1.0],
            },
            Key("sd15", "precision", "", "256x256"): {
                "mean": [1.0, 2.0],
                "largest": [9.0, 8.0],
                "psnr": [40.0, 41.0],
                "beyond one": [0.25, 0.5],
            },
        },
        MODELS,
    )
    assert found.keys() == {"start", "memory", "steps", "ratio", "precision"}
    assert found["steps"].markdown().splitlines()[2] == (
        "| tiny, 256x256, Stepwise | 0.25 | 0.2 (0.2 to 0.25) | 0.03 | 0.7 | keep their bits |"
    )
    assert found["ratio"].markdown().splitlines()[2:] == [
        "| tiny, 256x256, contiguous_format | 1.5 (1.25 to 1.75) | 2 (2 to 2) | 0.75 (0.625 to 0.875) | 2 |",
        "| tiny, 256x256, channels_last | not run |  |  |  |",
        "| tiny, 512x512, contiguous_format | not run |  |  |  |",
        "| tiny, 512x512, channels_last | not run |  |  |  |",
    ]
    assert found["precision"].markdown().splitlines()[2:] == [
        "| 0 | 1.00 | 9 | 40.0 | 25.00 % |",
        "| 1 | 2.00 | 8 | 41.0 | 50.00 % |",
    ]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    key, other = Key("sd15", "steps", "Stepwise", "256x256"), Key("sd15", "weights", "", "")
    calls: list[str] = []

    def measure(name: str, fails: bool) -> Found:
        calls.append(name)
        if fails:
            raise RuntimeError("Stepwise ended:\nno | memory")
        return {"seconds": [1.0]}

    first = Cases(tmp_path / "text.json", seconds=inf)
    first.run(key, measure, "a", fails=True)
    first.run(other, measure, "b", fails=False)
    assert first.results == {key: {"failed": "failed: no / memory"}, other: {"seconds": [1.0]}}

    second = Cases(tmp_path / "text.json", seconds=inf)
    assert second.results == first.results
    second.run(key, measure, "c", fails=False)
    second.run(other, measure, "d", fails=False)
    assert calls == ["a", "b", "c"]
    assert second.results[key] == {"seconds": [1.0]}


def test_no_case_begins_after_the_end(tmp_path: Path) -> None:
    cases, key = Cases(tmp_path / "text.json", seconds=-1.0), Key("sd15", "weights", "", "")
    cases.run(key, lambda: {"resident": [1.0]})
    assert cases.results[key] == {"failed": "there was no time left"}


def test_an_error_without_words_has_a_reason() -> None:
    assert reason(MemoryError()) == "failed: MemoryError"


@pytest.mark.parametrize(("seconds", "found"), [(inf, [1, 2, 3]), (0.0, [0])])
def test_the_first_of_several_rounds_does_not_count(seconds: float, found: list[int]) -> None:
    numbers = iter(range(10))
    assert repeated(lambda: next(numbers), 3, seconds) == found


def test_images_are_compared_in_levels_and_decibels(tmp_path: Path) -> None:
    exact = np.zeros((2, 2, 3), np.uint8)
    rough = exact.copy()
    rough[0, 0] = 1, 2, 3
    found = compared(exact, rough)
    assert found["mean"] == pytest.approx(6 / 12)
    assert found["largest"] == 3
    assert found["beyond one"] == pytest.approx(2 / 12)
    assert found["psnr"] == pytest.approx(10 * np.log10(255**2 / (14 / 12)))
    assert compared(rough, exact) == found
    assert compared(exact, exact)["psnr"] == inf
    draw([(exact, rough), (rough, exact)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").is_file()


def test_random_weights_are_a_file_of_safetensors(tmp_path: Path) -> None:
    with torch.device("meta"):
        network = nn.ModuleDict(
            {"words": nn.Embedding(100, 8), "norm": nn.GroupNorm(2, 64), "wide": nn.Linear(512, 64)}
        )
    text_weights.write_random(network, tmp_path / "model.safetensors", torch.Generator().manual_seed(0))
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        name: parameter.shape for name, parameter in network.named_parameters()
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    spread = {name: tensor.float().std().item() for name, tensor in tensors.items()}
    assert spread["wide.weight"] == pytest.approx(512**-0.5, rel=0.1)
    assert spread["words.weight"] == pytest.approx(0.02, rel=0.1)
    assert tensors["norm.weight"].float().mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("architecture", "millions"),
    [(text_weights.SD15, [859.5, 83.7, 123.1]), (text_weights.SDXL, [2567.5, 83.7, 123.1, 694.7])],
    ids=lambda one: getattr(one, "title", ""),
)
def test_networks_have_the_published_sizes(architecture: Architecture, millions: list[float]) -> None:
    networks = text_weights.networks(architecture).values()
    sizes = [sum(parameter.numel() for parameter in network.parameters()) / 1e6 for network in networks]
    assert [round(size, 1) for size in sizes] == millions


@pytest.mark.parametrize("architecture", [TINY, TINY_XL], ids=lambda one: one.title)
def test_a_written_pipeline_is_found(tmp_path: Path, architecture: Architecture) -> None:
    text_weights.write(tmp_path, architecture)
    found = find(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == architecture.pipeline
    assert found.config.image_size == (64, 64)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.safetensors")]
    assert len(sizes) == 2 + len(architecture.texts)
    assert sum(sizes) < text_weights.published_bytes(tmp_path) < 2 * sum(sizes)


@pytest.fixture
def dead() -> Iterator[Server]:
    server = Server("Stepwise", ["-c", "raise SystemExit('no memory')"], {})
    status = Path(f"/proc/{server.pid}/status")
    eventually(lambda: "State:\tZ" in status.read_text() or None)
    yield server
    server.close()


def test_a_start_that_fails_says_why(dead: Server) -> None:
    with pytest.raises(RuntimeError, match=r"^Stepwise ended: no memory$"):
        dead.wait()


def test_a_server_that_ends_says_why(dead: Server, tmp_path: Path) -> None:
    with (
        httpx.Client(base_url=dead.url, trust_env=False) as client,
        pytest.raises(RuntimeError, match=r"^no memory$"),
    ):
        Stepwise(dead, client, tmp_path / "log", 0.0, held()).a_pass(SIZES[1], 1)


def test_a_refusal_is_the_servers_answer(dead: Server, tmp_path: Path) -> None:
    with (
        serving_fake() as server,
        httpx.Client(base_url=server.url, trust_env=False) as client,
        pytest.raises(RuntimeError, match=r"^422: .*seed.*must be"),
    ):
        Stepwise(dead, client, tmp_path / "log", 0.0, held()).png(SIZES[1], seed=-1)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [TINY, TINY_XL], ids=lambda one: one.title)
def test_both_systems_are_measured(tmp_path: Path, architecture: Architecture) -> None:
    small = Group(64, 64)
    cases = Cases(tmp_path / "text.json", inf)
    bench = Bench("sd15", Model("tiny", (small, small)), tmp_path, cases, tmp_path / "picture.png")
    bench.write(architecture)
    bench.steps()
    table = text_tables.steps(bench.cases.results, {"sd15": bench.model})
    assert [None not in row[:4] for row in table.rows.values()] == [True] * 3
    assert table.rows["tiny, 64x64, Stepwise"][4] == "keep their bits"
    for found in bench.cases.results.values():
        assert "failed" not in found


@pytest.mark.slow
def test_precisions_are_compared(tmp_path: Path) -> None:
    small, picture = Group(64, 64), tmp_path / "picture.png"
    bench = Bench("sd15", Model("tiny", (small, small)), tmp_path, Cases(tmp_path / "text.json", inf), picture)
    bench.write(TINY)
    bench.precision()
    [found] = (found for key, found in bench.cases.results.items() if key.part == "precision")
    assert found.keys() == {"mean", "largest", "psnr", "beyond one"}
    assert picture.is_file()
