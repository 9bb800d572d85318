"""CLIPText computes what transformers' CLIPTextModel computes, and so does the text encoder on its backends."""

import gc
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from model.backends import conversion, footprint
from model.backends.network import text_encoder
from model.description import ModelDescription, TextDescription
from model.nets.clip import Activation, CLIPText, CLIPTextConfig
from model.rows import Text
from model.text import ClipEncoder, choose_text_encoder
from tests.networks import fill
from tests.properties import examples
from tests.trajectories import CPU, description_of, small_text_network

Fields = dict[str, Any]

BASE: Fields = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 19,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 12,
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore torch's threads, which a choice of backend changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reference(fields: Fields) -> Any:
    """CLIPTextModel with random weights. Those of norms are near 1."""
    config: Any = transformers.CLIPTextConfig(**{**BASE, **fields}, bos_token_id=58, eos_token_id=59)
    model: Any = transformers.CLIPTextModel(config)
    fill(model)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return model


def network_of(model: Any, fields: Fields) -> CLIPText:
    network = CLIPText(CLIPTextConfig.model_validate({**BASE, **fields})).requires_grad_(False).eval()
    network.load_state_dict(model.state_dict())
    return network


def ids_of(fields: Fields, seed: int = 3) -> Tensor:
    config = {**BASE, **fields}
    shape = (1, config["max_position_embeddings"])
    return torch.randint(0, config["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def check(fields: Fields) -> None:
    """All states have the same bits. So have the contexts of every clip_skip."""
    model, ids = reference(fields), ids_of(fields)
    network = network_of(model, fields)
    expected = model(ids, output_hidden_states=True)
    embedded = network.embeddings(ids)
    states = network.encoder(embedded)
    assert torch.equal(embedded, expected.hidden_states[0])
    assert torch.equal(states, torch.stack(expected.hidden_states[1:], dim=1))
    assert states.isfinite().all()
    assert torch.equal(network(ids), expected.last_hidden_state)
    for k in range(states.shape[1]):
        assert torch.equal(network(ids, clip_skip=k), model.final_layer_norm(expected.hidden_states[-(k + 1)]))


@pytest.mark.parametrize("name", get_args(Activation))
def test_activations(name: Activation) -> None:
    check({"hidden_act": name})


def test_activations_differ() -> None:
    """So bits tell them apart, but for the two names of one."""
    ids = ids_of({})
    outs = {name: network_of(reference({}), {"hidden_act": name})(ids) for name in get_args(Activation)}
    assert torch.equal(outs["silu"], outs.pop("swish"))
    assert len({out.numpy().tobytes() for out in outs.values()}) == len(outs)


@examples(20)
@given(
    st.fixed_dictionaries(
        {
            "vocab_size": st.integers(60, 90),
            "hidden_size": st.sampled_from((4, 12, 32)),
            "intermediate_size": st.integers(1, 50),
            "num_hidden_layers": st.integers(1, 6),
            "num_attention_heads": st.sampled_from((1, 2, 4)),
            "max_position_embeddings": st.sampled_from((1, 2, 16, 77)),
            "hidden_act": st.sampled_from(("quick_gelu", "gelu")),
            "layer_norm_eps": st.sampled_from((1e-5, 1e-6, 1e-2)),
        }
    )
)
def test_any_network(fields: Fields) -> None:
    check(fields)


def test_later_tokens_change_no_earlier_state() -> None:
    network = network_of(reference({}), {})
    ids = ids_of({})
    other = ids.clone()
    other[0, 7] = (ids[0, 7] + 1) % 60
    one, two = (network(each)[0] for each in (ids, other))
    assert torch.equal(one[:7], two[:7])
    assert all(not torch.equal(one[i], two[i]) for i in range(7, 12))


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"hidden_act": "tanh"}, ("hidden_act",)),
        ({"num_hidden_layers": 0}, ("num_hidden_layers",)),
        ({"num_hidden_layers": 257}, ("num_hidden_layers",)),
        ({"hidden_size": "16"}, ("hidden_size",)),
        ({"use_attention_mask": True}, ("use_attention_mask",)),
        ({"layer_norm_eps": 0}, ("layer_norm_eps",)),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(changes: Fields, place: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        CLIPTextConfig.model_validate({**BASE, **changes})
    assert [error["loc"] for error in refused.value.errors()] == [place]


def test_heads_divide_the_width() -> None:
    with pytest.raises(ValidationError, match="num_attention_heads is 3, which does not divide hidden_size 16"):
        CLIPTextConfig.model_validate({**BASE, "num_attention_heads": 3})


# At work.


def description(fields: Fields) -> ModelDescription:
    config = {**BASE, **fields}
    text = TextDescription(config["max_position_embeddings"], config["num_hidden_layers"], 0)
    return replace(description_of(small_text_network(), (4, 8, 8)), text=text)


def encoder_of(fields: Fields, cache_dir: Path | None = None) -> ClipEncoder:
    network = network_of(reference(fields), fields)
    encoder = choose_text_encoder([network], description(fields), CPU, 1, cache_dir)
    encoder.prepare()
    return encoder


def text_of(ids: Tensor, clip_skip: int = 0) -> Text:
    return Text(tuple(ids[0].tolist()), clip_skip)


@torch.inference_mode()
def contexts(fields: Fields, ids: Tensor) -> list[Tensor]:
    """What transformers makes of a text, by clip_skip."""
    model = reference(fields)
    states = model(ids, output_hidden_states=True).hidden_states
    return [model.final_layer_norm(states[-(k + 1)])[0] for k in range(len(states) - 1)]


def test_on_torch_contexts_have_transformers_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder, ids = encoder_of({}), ids_of({})
    assert encoder.fingerprint["text_backend"] == "torch"
    for k, expected in enumerate(contexts({}, ids)):
        context = encoder.encode(text_of(ids, k)).tokens
        assert context.dtype == np.float32
        assert np.array_equal(context, expected.numpy())


@pytest.mark.parametrize("name", get_args(Activation))
def test_on_openvino_contexts_are_transformers(name: Activation) -> None:
    fields = {"hidden_act": name, "num_hidden_layers": 3}
    encoder, ids = encoder_of(fields), ids_of(fields)
    assert encoder.fingerprint["text_backend"] == "openvino"
    assert encoder.fingerprint["text_precision"] == "float32"
    found = contexts(fields, ids)
    assert len(found) == 3
    for k, expected in enumerate(found):
        context = torch.from_numpy(encoder.encode(text_of(ids, k)).tokens)
        assert context.shape == (12, 16)
        assert (context - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_text_has_its_context_after_others_too(tmp_path: Path) -> None:
    """And once the converted encoder comes from the cache. A context that was given stays as it is."""
    encoder = encoder_of({}, tmp_path)
    first, second = (text_of(ids_of({}, seed)) for seed in (1, 2))
    context = encoder.encode(first).tokens
    kept = context.copy()
    assert not np.array_equal(encoder.encode(second).tokens, context)
    assert np.array_equal(context, kept)
    assert np.array_equal(encoder.encode(first).tokens, context)
    assert len(list((tmp_path / "openvino").iterdir())) == 1
    assert np.array_equal(encoder_of({}, tmp_path).encode(first).tokens, context)
    assert len(list((tmp_path / "openvino").iterdir())) == 1


def test_the_layers_in_torch_are_freed_once_they_are_converted() -> None:
    """Embeddings and the last norm stay: they are computed outside the converted layers."""
    network = network_of(reference({}), {})
    gone = weakref.ref(network.encoder.layers[0])
    encoder = choose_text_encoder([network], description({}), CPU, 1, None)
    del network
    gc.collect()
    assert gone() is None
    assert encoder.encode(text_of(ids_of({}))).tokens.shape == (12, 16)


def test_the_memory_of_an_encoder_is_known_before_it_runs() -> None:
    network = text_encoder(network_of(reference({}), {}), description({}))
    assert network.inputs == {"x": (12, 16)}
    states = 4 * 12 * 16 * 4  # bytes of all layers' outputs
    assert states < footprint.activations(network.module, network.inputs) < 10 * states
    converted = conversion.at_size(conversion.convert(network), network.inputs)
    assert states < conversion.activations(converted) < 10 * states
