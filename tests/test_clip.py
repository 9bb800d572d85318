"""CLIPText computes what transformers' CLIPTextModel computes, and so do the text encoders on their backends."""

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
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
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from model.backends import conversion, footprint
from model.backends.backend import Inputs
from model.backends.network import text_encoder
from model.description import ModelDescription, TextDescription
from model.nets.clip import Activation, CLIPText, CLIPTextConfig, CLIPTextWithProjectionConfig, Pooler
from model.rows import Text
from model.text import Clip, ClipEncoder, choose_text_encoder
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
EOS = 59
SECOND: Fields = {  # SDXL's second encoder, beside BASE
    "hidden_size": 24,
    "num_hidden_layers": 6,
    "hidden_act": "gelu",
    "projection_dim": 10,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Restore torch's threads, which a choice of backend changes."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def reference(fields: Fields) -> Any:
    """CLIPTextModel, or the one with a projection, with random weights. Those of norms are near 1."""
    config: Any = transformers.CLIPTextConfig(**{**BASE, "bos_token_id": 58, "eos_token_id": EOS, **fields})
    model: Any = (CLIPTextModelWithProjection if "projection_dim" in fields else transformers.CLIPTextModel)(config)
    fill(model)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter += 1
    return model


def network_of(model: Any, fields: Fields) -> CLIPText:
    config = CLIPTextWithProjectionConfig if "projection_dim" in fields else CLIPTextConfig
    network = CLIPText(config.model_validate({**BASE, **fields})).requires_grad_(False).eval()
    network.load_state_dict({key.removeprefix("text_model."): values for key, values in model.state_dict().items()})
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


# Pooled texts.


def ended(*places: int) -> Tensor:
    """Tokens with the end of the text at these places, below a larger token at place 1."""
    ids = ids_of({}) % EOS
    ids[0, 1] = EOS + 1
    for place in places:
        ids[0, place] = EOS
    return ids


@pytest.mark.parametrize(
    ("eos_token_id", "ids", "place"),
    [
        (EOS, ended(5, 8, 11), 5),  # the first one: the token may pad texts, too
        (EOS, ended(0), 0),
        (EOS, ended(), 0),
        (2, ended(5, 8), 1),  # of older files: the first of the largest
        (2, torch.tensor([[58, 2, 3, EOS, EOS, 2, 0, 0, 0, 0, 0, 0]]), 3),
        (2, torch.full((1, 12), 7), 0),
    ],
)
@torch.inference_mode()
def test_the_place_where_a_text_is_pooled(eos_token_id: int, ids: Tensor, place: int) -> None:
    fields = {**SECOND, "vocab_size": 62, "eos_token_id": eos_token_id}
    model = reference(fields)
    network = network_of(model, fields)
    state = network.encoder(network.embeddings(ids))[:, -1]
    assert network.pooler is not None
    pooled = network.pooler(state, ids)
    assert pooled.shape == (1, 10)
    assert torch.equal(pooled, model(ids).text_embeds)
    assert torch.equal(pooled, model.text_projection(model.text_model.final_layer_norm(state)[:, place]))
    others = [model.text_projection(model.text_model.final_layer_norm(state)[:, other]) for other in range(12)]
    assert all(torch.equal(pooled, other) == (i == place) for i, other in enumerate(others))


@examples(20)
@given(
    st.fixed_dictionaries(
        {
            "hidden_size": st.sampled_from((4, 12)),
            "num_hidden_layers": st.integers(1, 3),
            "projection_dim": st.integers(1, 20),
            "eos_token_id": st.sampled_from((2, 7, EOS)),
        }
    ),
    st.lists(st.integers(0, EOS), min_size=12, max_size=12),
)
@torch.inference_mode()
def test_any_pooled_text(fields: Fields, ids: list[int]) -> None:
    """Several texts at once have theirs, too."""
    model = reference(fields)
    network, texts = network_of(model, fields), torch.tensor([ids, ids[::-1]])
    expected = model(texts, output_hidden_states=True)
    states = network.encoder(network.embeddings(texts))
    assert torch.equal(states, torch.stack(expected.hidden_states[1:], dim=1))
    assert network.pooler is not None
    assert torch.equal(network.pooler(states[:, -1], texts), expected.text_embeds)


def test_an_encoder_without_a_projection_pools_nothing() -> None:
    network = network_of(reference({}), {})
    assert network.pooler is None
    assert not any("projection" in key for key in network.state_dict())


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
        ({"projection_dim": 8}, ("projection_dim",)),
        ({"eos_token_id": 2}, ("eos_token_id",)),
    ],
    ids=str,
)
def test_a_refusal_names_the_field(changes: Fields, place: tuple[str, ...]) -> None:
    with pytest.raises(ValidationError) as refused:
        CLIPTextConfig.model_validate({**BASE, **changes})
    assert [error["loc"] for error in refused.value.errors()] == [place]


@pytest.mark.parametrize(
    "changes",
    [
        {"projection_dim": None},
        {"projection_dim": 0},
        {"eos_token_id": None},
        {"eos_token_id": [2, 3]},
        {"eos_token_id": 2**70},  # too large to be compared with tokens
    ],
    ids=str,
)
def test_a_refusal_of_a_projection_names_the_field(changes: Fields) -> None:
    with pytest.raises(ValidationError) as refused:
        CLIPTextWithProjectionConfig.model_validate({**BASE, **SECOND, **changes})
    assert [error["loc"] for error in refused.value.errors()] == [(name,) for name in changes]


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


def encoders_of(cache_dir: Path | None = None) -> ClipEncoder:
    """SDXL's two."""
    clips = [network_of(reference(fields), fields) for fields in ({}, SECOND)]
    encoder = choose_text_encoder(clips, description({}), CPU, 1, cache_dir)
    encoder.prepare()
    return encoder


def text_of(ids: Tensor, clip_skip: int = 0, ids_2: Tensor | None = None) -> Text:
    return Text(tuple(ids[0].tolist()), clip_skip, () if ids_2 is None else tuple(ids_2[0].tolist()))


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


@torch.inference_mode()
def contexts_of_two(ids: Tensor, ids_2: Tensor) -> tuple[list[Tensor], Tensor]:
    """What SDXL's pipeline makes of a text, by clip_skip; and the pooled text."""
    one, two = (
        reference(fields)(its_ids, output_hidden_states=True) for fields, its_ids in (({}, ids), (SECOND, ids_2))
    )
    skips = range(BASE["num_hidden_layers"])
    tokens = [torch.cat([each.hidden_states[-(2 + k)] for each in (one, two)], dim=-1)[0] for k in skips]
    return tokens, two.text_embeds[0]


def check_two(tolerance: float) -> ClipEncoder:
    encoder, ids, ids_2 = encoders_of(), ids_of({}), ids_of({}, 4)
    found, pooled = contexts_of_two(ids, ids_2)
    assert len(found) == 4
    for k, expected in enumerate(found):
        context = encoder.encode(text_of(ids, k, ids_2))
        assert context.pooled is not None
        for its, their in ((context.tokens, expected), (context.pooled, pooled)):
            assert its.dtype == np.float32
            assert its.shape == their.shape
            assert np.abs(its - their.numpy()).max() <= tolerance * their.abs().max()
    return encoder


def test_on_torch_two_encoders_have_transformers_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the clip_skip that leaves only the embeddings of the first. The pooled text does not depend on it."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder = check_two(tolerance=0)
    assert encoder.fingerprint["text_backend"] == "torch"


def test_on_openvino_two_encoders_are_transformers() -> None:
    encoder = check_two(tolerance=1e-5)
    assert encoder.fingerprint["text_backend"] == "openvino"
    assert not any(name.startswith("text_2") for name in encoder.fingerprint)  # they differ in nothing


def weighted(context: Tensor, weights: tuple[float, ...]) -> Tensor:
    """A context, [N, C], as AUTOMATIC1111 weighs it: then its mean is restored."""
    heavier = torch.stack([weight * values for weight, values in zip(weights, context, strict=True)])
    return heavier * (context.mean() / heavier.mean())


WEIGHTS = (1.0, 1.1, 1.1, 0.5, 0.0, -0.25, 3.0, *[1.0] * 5)
OTHERS = (1.0, 0.9, *[1.0] * 10)


def test_weights_are_on_contexts_whose_mean_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the last norm, whatever clip_skip is."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder, ids = encoder_of({}), ids_of({})
    for k, plain in enumerate(contexts({}, ids)):
        text = text_of(ids, k)
        expected = weighted(plain, WEIGHTS)
        found = encoder.encode(text._replace(weights=WEIGHTS)).tokens
        assert found.dtype == np.float32
        assert np.abs(found - expected.numpy()).max() <= 1e-5 * expected.abs().max()
        ones = encoder.encode(text._replace(weights=(1.0,) * 12)).tokens
        assert np.array_equal(ones, encoder.encode(text).tokens)


def test_each_of_two_encoders_has_its_own_weights_and_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pooled text has none."""
    monkeypatch.setitem(sys.modules, "openvino", None)
    encoder, ids, ids_2 = encoders_of(), ids_of({}), ids_of({}, 4)
    text = text_of(ids, ids_2=ids_2)
    plain = encoder.encode(text)
    found = encoder.encode(text._replace(weights=WEIGHTS, weights_2=OTHERS))
    first, second = (torch.from_numpy(part) for part in np.split(plain.tokens, [BASE["hidden_size"]], axis=1))
    expected = torch.cat([weighted(first, WEIGHTS), weighted(second, OTHERS)], dim=1).numpy()
    assert np.abs(found.tokens - expected).max() <= 1e-5 * np.abs(expected).max()
    assert plain.pooled is not None
    assert found.pooled is not None
    assert np.array_equal(found.pooled, plain.pooled)
    only_first = encoder.encode(text._replace(weights=WEIGHTS)).tokens
    assert np.array_equal(only_first[:, -1], plain.tokens[:, -1])


@pytest.mark.parametrize("second", [-1.0, -0.9999999, 0.0])
def test_a_mean_that_cannot_be_restored_makes_no_context(second: float) -> None:
    """Tokens 10 and 10 of the scripted encoder have the same context."""
    encoder = ClipEncoder([Clip(Numbers(1), Scripted(1))], nn.Identity())
    found = encoder.encode(Text((10, 10), weights=(1.0 if second else 0.0, second)))
    assert not found.is_finite
    assert encoder.encode(Text((10, 10), weights=(1.0, -0.9))).is_finite


class Scripted:
    """A backend whose layers add 1 to what they get. Implements model.backends.backend.Backend."""

    device = CPU
    widths = (1,)
    reproducible = True

    def __init__(self, layers: int, **fingerprint: str | int) -> None:
        self.layers = layers
        self.fingerprint: dict[str, str | int] = fingerprint
        self.prepared = False

    def prepare(self) -> None:
        self.prepared = True

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, inputs: Inputs) -> Callable[[], Tensor]:
        return lambda: torch.stack([inputs["x"] + 1 + i for i in range(self.layers)], dim=1)


def test_each_encoder_reads_its_own_tokens_and_is_in_the_fingerprint() -> None:
    """A text's second tokens go to the second encoder. What both encoders have in common is named once."""
    backends = Scripted(2, precision="float32", width=1), Scripted(4, precision="float32", width=3)
    clips = [Clip(Numbers(channels), backend) for channels, backend in zip((1, 2), backends, strict=True)]
    encoder = ClipEncoder(clips, Pooler(nn.Identity(), nn.Identity(), eos_token_id=7))
    assert encoder.fingerprint == {"text_precision": "float32", "text_width": 1, "text_2_width": 3}
    encoder.prepare()
    assert all(backend.prepared for backend in backends)
    context = encoder.encode(Text((10, 20), ids_2=(30, 7)))
    assert context.tokens.tolist() == [[11, 33, 33], [21, 10, 10]]
    assert context.pooled is not None
    assert context.pooled.tolist() == [11, 11]
    assert encoder.encode(Text((10, 20), 1, (30, 7))).tokens.tolist() == [[10, 32, 32], [20, 9, 9]]


class Numbers(nn.Module):
    """Embeds a token as its number."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, ids: Tensor) -> Tensor:
        return ids[..., None].float().expand(*ids.shape, self.channels)


def test_two_encoders_are_kept_apart_in_the_cache(tmp_path: Path) -> None:
    """Even if they are as large as each other: a second start finds both."""
    fields = {**SECOND, "hidden_size": 16}
    clips = [network_of(reference(each), each) for each in ({}, fields)]
    text = text_of(ids_of({}), 0, ids_of({}, 4))
    context = choose_text_encoder(clips, description({}), CPU, 1, tmp_path).encode(text)
    kept = sorted((tmp_path / "openvino").iterdir())
    assert len(kept) == 2
    again = choose_text_encoder(clips, description({}), CPU, 1, tmp_path).encode(text)
    assert sorted((tmp_path / "openvino").iterdir()) == kept
    assert np.array_equal(again.tokens, context.tokens)
    assert context.pooled is not None
    assert again.pooled is not None
    assert np.array_equal(again.pooled, context.pooled)
    assert not np.array_equal(context.tokens[:, :16], context.tokens[:, 16:])


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
