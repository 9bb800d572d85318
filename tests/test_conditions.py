"""Embeddings of timesteps and conditions, and contexts: computed alone, kept once, in bounded memory."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model.conditions import Conditions, Shelf
from model.nets.embedder import Embedder
from model.nets.unet2d import UNet2D, UNet2DConfig
from model.rows import Condition, Context, Forward, Group, Row, Text
from model.samplers import sample_table
from model.schedule import Schedule
from tests.networks import fill
from tests.properties import examples
from tests.trajectories import (
    CPU,
    inputs_of,
    runner_of,
    runner_on,
    small_network,
    small_text_network,
    torch_backend,
    trajectory,
)

SHAPE = (3, 8, 8)
TOKENS = 3


class Nothing:
    """A backend that only copies numbers. Implements what Conditions needs of model.backends.backend.Backend."""

    device = CPU
    widths = (1,)
    fingerprint: dict[str, str | int] = {}  # noqa: RUF012
    reproducible = True

    def prepare(self) -> None:
        """Nothing is to be compiled."""

    def send(self, values: Tensor) -> Tensor:
        return values

    def start(self, inputs: object) -> Callable[[], Tensor]:
        raise AssertionError("nothing runs here")


def fourier() -> UNet2D:
    network = UNet2D(
        UNet2DConfig(
            time_embedding_type="fourier",
            block_out_channels=(8, 16),
            layers_per_block=1,
            norm_num_groups=4,
            attention_head_dim=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )
    fill(network)
    return network


def conditions_of(embedder: Embedder, no_label: int | None = 5, text_length: int | None = None) -> Conditions:
    return Conditions(embedder, Nothing(), no_label, text_length)


def emb(conditions: Conditions, timesteps: Sequence[float], told: list[Condition]) -> Tensor:
    """The embeddings of a pass's rows."""
    held = conditions.hold(told)
    times = [(t, condition.w) for t, condition in zip(timesteps, told, strict=True)]
    inputs, _ = conditions.inputs(torch.tensor(conditions.times(times)), torch.tensor(held))
    conditions.drop(told)
    return inputs["emb"]


@examples(50)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 999) | st.floats(0, 999), st.none() | st.integers(0, 4)), min_size=1, max_size=12
    )
)
def test_no_bit_of_an_embedding_depends_on_company(rows: list[tuple[float, int | None]]) -> None:
    """Timesteps may be fractions."""
    embedder = small_network().embedder
    timesteps, told = [t for t, _ in rows], [Condition(label) for _, label in rows]
    together = emb(conditions_of(embedder), timesteps, told)
    for i, (t, label) in enumerate(rows):
        alone = emb(conditions_of(embedder), [t], [Condition(label)])[0]
        assert torch.equal(together[i], alone)
        numbers = torch.tensor([t], dtype=torch.float32), torch.tensor([5 if label is None else label])
        assert embedder.of_label is not None
        assert torch.equal(alone, (embedder.of_time(numbers[0], None) + embedder.of_label(numbers[1]))[0])


def test_a_network_without_no_label_is_told_nothing_of_a_row_without_a_label() -> None:
    embedder = small_network().embedder
    [without] = emb(conditions_of(embedder, no_label=None), [7], [Condition()])
    assert torch.equal(without, embedder.of_time(torch.tensor([7.0]), None)[0])


def test_each_timestep_and_each_condition_is_embedded_once() -> None:
    told: Counter[tuple[str, float]] = Counter()

    def counted(what: str) -> Callable[..., Tensor]:
        def embedded(numbers: Tensor, w: Tensor | None = None) -> Tensor:
            told.update((what, number) for number in numbers.tolist())
            return numbers.float()[:, None].expand(-1, 4)

        return embedded

    conditions = conditions_of(Embedder(4, counted("t"), counted("label")))
    for _ in range(3):
        emb(conditions, [999, 0.5, 999], [Condition(1), Condition(2), Condition(1)])
    assert told == {("t", 999): 1, ("t", 0.5): 1, ("label", 1): 1, ("label", 2): 1}


def test_a_condition_that_cannot_be_embedded_is_not_held() -> None:
    def embedded(labels: Tensor) -> Tensor:
        if labels[0] == 3:
            raise RuntimeError("no memory")
        return labels.float()[:, None]

    conditions = conditions_of(Embedder(1, lambda t, _: t[:, None], embedded))
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no memory"):
            conditions.hold([Condition(1), Condition(3)])
    assert conditions.hold([Condition(1)]) == [0]
    conditions.drop([Condition(1)])
    with pytest.raises(KeyError):
        conditions.drop([Condition(1)])


# Guidance, pooled texts and sizes.

XL = small_text_network(
    addition_embed_type="text_time",
    addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=31,  # 7 of the pooled text
    time_cond_proj_dim=6,
    num_class_embeds=6,
    encoder_hid_dim=9,
)


def an_xl_prompt(number: int | None, time_ids: tuple[int, ...], w: float | None, label: int | None = None) -> Condition:
    if number is None:
        return Condition(label, time_ids=time_ids, w=w)
    rng = np.random.default_rng(number)
    context = Context(rng.standard_normal((TOKENS, 9), np.float32), rng.standard_normal(7, np.float32))
    return Condition(label, Text((number,)), context, time_ids, w)


sizes = st.tuples(*[st.integers(0, 4096)] * 6)


@examples(50)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 999) | st.floats(0, 999),
            st.builds(
                an_xl_prompt, st.none() | st.integers(0, 3), sizes, st.none() | st.floats(0, 29), st.integers(0, 5)
            ),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_guidance_pooled_texts_and_sizes_are_embedded_alone(rows: list[tuple[float, Condition]]) -> None:
    """No bit depends on company. All that a row is told is in its embedding and its context."""
    embedder, told = XL.embedder, [condition for _, condition in rows]
    assert embedder.of_label is not None
    assert embedder.of_added is not None
    assert embedder.of_text is not None
    conditions = conditions_of(embedder, 5, TOKENS)
    times = [(t, condition.w) for t, condition in rows]
    given, _ = conditions.inputs(torch.tensor(conditions.times(times)), torch.tensor(conditions.hold(told)))
    for i, (t, one) in enumerate(rows):
        alone = conditions_of(embedder, 5, TOKENS)
        assert torch.equal(given["emb"][i], emb(alone, [t], [one])[0])
        context = one.context or Context(np.zeros((TOKENS, 9), np.float32), np.zeros(7, np.float32))
        assert context.pooled is not None
        pooled = torch.from_numpy(context.pooled)[None]
        of_label, of_added = embedder.of_label, embedder.of_added
        of_condition = of_label(torch.tensor([one.label])) + of_added(pooled, torch.tensor([one.time_ids]))
        of_time = embedder.of_time(torch.tensor([t]).float(), None if one.w is None else torch.tensor([one.w]).float())
        assert torch.equal(given["emb"][i], (of_time + of_condition)[0])
        assert torch.equal(given["context"][i], embedder.of_text(torch.from_numpy(context.tokens)[None])[0])


def test_each_timestep_is_embedded_once_for_each_w() -> None:
    told: Counter[tuple[float, float | None]] = Counter()

    def of_time(t: Tensor, w: Tensor | None) -> Tensor:
        told[t.item(), None if w is None else w.item()] += 1
        return t[:, None].expand(-1, 4)

    conditions = conditions_of(Embedder(4, of_time), None)
    for _ in range(3):
        emb(conditions, [999, 0.5, 999, 999, 0.5], [Condition(w=w) for w in (6.5, 6.5, 6.5, None, 0)])
    assert told == {(999, 6.5): 1, (0.5, 6.5): 1, (999, None): 1, (0.5, 0): 1}


def test_rows_of_one_prompt_and_size_share_what_does_not_depend_on_w() -> None:
    conditions = conditions_of(XL.embedder, 5, TOKENS)
    square, tall = (64, 64, 0, 0, 64, 64), (96, 64, 0, 0, 96, 64)
    told = [an_xl_prompt(1, square, w) for w in (0.5, 7.0)]
    first, second, other, nothing = conditions.hold(
        [*told, an_xl_prompt(1, tall, 0.5), an_xl_prompt(None, square, 0.5)]
    )
    assert first == second
    assert len({first, other, nothing}) == 3
    conditions.drop([told[1]])
    assert conditions.hold([told[1]]) == [first]


@pytest.mark.parametrize(
    ("told", "lacks"),
    [
        (Condition(text=Text((1,)), time_ids=(0,) * 6), "context"),
        (
            Condition(text=Text((1,)), context=Context(np.zeros((TOKENS, 9), np.float32)), time_ids=(0,) * 6),
            "pooled text",
        ),
        (Condition(), "time_ids"),
    ],
)
def test_a_condition_without_what_the_network_takes_is_not_held(told: Condition, lacks: str) -> None:
    conditions = conditions_of(XL.embedder, 5, TOKENS)
    with pytest.raises(ValueError, match=f"a condition has no {lacks}"):
        conditions.hold([told])
    with pytest.raises(KeyError):
        conditions.drop([told])


@pytest.mark.parametrize("network", [small_network(), small_text_network(), fourier()], ids=lambda n: type(n).__name__)
def test_a_network_without_guidance_in_it_is_told_none(network: UNet2D) -> None:
    """A w that such a network would not hear is a mistake of ours."""
    conditions = conditions_of(network.embedder, None, None)
    with pytest.raises(ValueError, match="the network has no guidance embedded, and is given w"):
        conditions.times([(3.0, 1.5)])


# Shelves.


@examples(200)
@given(
    most=st.sampled_from((1, 3, 8)),
    asked=st.lists(st.tuples(st.integers(0, 12), st.booleans(), st.booleans()), max_size=60),
)
def test_a_shelf_is_bounded_and_keeps_what_is_in_use(most: int, asked: list[tuple[int, bool, bool]]) -> None:
    """Each ask puts a key if it is not there, and then holds it or lets it go."""
    shelf = Shelf[int]({"one": (1,), "two": (2, 2)}, CPU, most)
    in_use: set[int] = set()
    peak = 0  # of vectors in use; the shelf never shrinks
    for key, hold, renew in asked:
        if shelf.find(key) is None:
            shelf.put(key, {"one": torch.full((1,), float(key)), "two": torch.full((2, 2), -float(key))}, in_use)
        (in_use.add if hold else in_use.discard)(key)
        if renew:
            shelf.renew(key)
        for used in {key, *in_use}:
            index = shelf.find(used)
            assert index is not None
            assert shelf.values["one"][index].tolist() == [used]
            assert shelf.values["two"][index].tolist() == [[-used] * 2] * 2
        peak = max(peak, len(in_use))
        assert {len(values) for values in shelf.values.values()} == {shelf.places}
        assert len(shelf) <= shelf.places <= max(most, 2 * (peak + 1))


def test_the_vector_that_was_renewed_least_recently_makes_room() -> None:
    shelf, given = Shelf[str]({"one": (1,)}, CPU, most=3), {"one": torch.zeros(1)}
    for key in "abc":
        shelf.put(key, given, set())
    shelf.renew("a")
    shelf.put("d", given, {"b"})  # b is the oldest, but in use
    assert [key for key in "abcd" if shelf.find(key) is not None] == ["a", "b", "d"]


def test_a_conditions_place_is_free_once_no_row_holds_it() -> None:
    """Many more labels than the shelf has places: memory grows only while rows hold them."""
    wide = 2**17  # so that a shelf has 64 places

    def embedded(numbers: Tensor, w: Tensor | None = None) -> Tensor:
        return numbers.float()[:, None].expand(-1, wide)

    conditions = conditions_of(Embedder(wide, embedded, embedded))
    for label in range(200):
        [index] = conditions.hold([Condition(label)])
        assert index < 64
        conditions.drop([Condition(label)])


@pytest.mark.parametrize(
    ("shape", "places"), [((512,), 64), ((77, 768), 4), ((77, 1024), 3), ((77, 2048), 1), ((2**20,), 1)]
)
def test_a_new_shelf_takes_no_more_than_a_mebibyte_or_one_place(shape: tuple[int, ...], places: int) -> None:
    assert len(Shelf[int]({"one": shape}, CPU).values["one"]) == places


# Contexts.


def text_embedder(of_text: Callable[[Tensor], Tensor] | None = None, labels: bool = False) -> Embedder:
    of_label = (lambda labels: labels.float()[:, None].expand(-1, 4)) if labels else None
    return Embedder(4, lambda t, _: t[:, None].expand(-1, 4), of_label, context_dim=2, of_text=of_text)


def a_prompt(number: int, label: int | None = None) -> Condition:
    return Condition(label, Text((number,)), Context(np.full((TOKENS, 2), number, np.float32)))


def contexts(conditions: Conditions, told: list[Condition]) -> list[float]:
    """The contexts of a pass's rows, each by its first number."""
    held = conditions.hold(told)
    inputs, _ = conditions.inputs(torch.tensor(conditions.times([(1.0, None)] * len(told))), torch.tensor(held))
    conditions.drop(told)
    assert inputs["context"].shape == (len(told), TOKENS, 2)
    return inputs["context"][:, 0, 0].tolist()


@examples(50)
@given(st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=6), min_size=1, max_size=20))
def test_each_row_is_given_its_own_context(passes: list[list[int]]) -> None:
    conditions = conditions_of(text_embedder(), None, TOKENS)
    for numbers in passes:
        assert contexts(conditions, [a_prompt(number) for number in numbers]) == numbers


def test_a_context_of_a_row_in_flight_stays_whatever_others_bring() -> None:
    """Many more prompts than the device keeps of this size."""
    wide = 2**17
    embedder = Embedder(4, lambda t, _: t[:, None].expand(-1, 4), context_dim=wide)
    conditions = conditions_of(embedder, None, 1)

    def a_wide_prompt(number: int) -> Condition:
        return Condition(None, Text((number,)), Context(np.full((1, wide), number, np.float32)))

    [first] = conditions.hold([a_wide_prompt(7)])
    for number in range(100, 200):
        conditions.drop([a_wide_prompt(number)] if conditions.hold([a_wide_prompt(number)]) else [])
    inputs, _ = conditions.inputs(torch.tensor(conditions.times([(1.0, None)])), torch.tensor([first]))
    assert inputs["context"][0, 0, :2].tolist() == [7.0, 7.0]


def test_what_a_network_makes_of_a_context_is_made_once_a_prompt() -> None:
    told: list[float] = []

    def of_text(context: Tensor) -> Tensor:
        assert context.shape == (1, TOKENS, 2)
        told.append(context[0, 0, 0].item())
        return 10 * context

    conditions = conditions_of(text_embedder(of_text), None, TOKENS)
    for _ in range(3):
        assert contexts(conditions, [a_prompt(1), a_prompt(2), a_prompt(1)]) == [10, 20, 10]
    assert told == [1, 2]


def test_a_network_with_labels_and_text_is_given_both() -> None:
    conditions = conditions_of(text_embedder(labels=True), 9, TOKENS)
    told = [a_prompt(1, 5), a_prompt(1), a_prompt(2, 5)]
    assert contexts(conditions, told) == [1, 1, 2]
    assert emb(conditions, [100.0] * 3, told)[:, 0].tolist() == [105, 109, 105]


def test_a_row_without_its_context_is_not_held() -> None:
    conditions = conditions_of(text_embedder(), None, TOKENS)
    with pytest.raises(ValueError, match="no context"):
        conditions.hold([a_prompt(1), Condition(text=Text((2,)))])
    with pytest.raises(KeyError):
        conditions.drop([a_prompt(1)])


@pytest.mark.parametrize("of_text", [None, lambda context: context + 7], ids=["as it is", "mapped"])
def test_no_prompt_is_zeros_and_goes_the_way_of_a_prompt(of_text: Callable[[Tensor], Tensor] | None) -> None:
    """As in diffusers, where a layer ahead of the context maps zeros, too."""
    conditions = conditions_of(replace(text_embedder(of_text), text_dim=2), None, TOKENS)
    assert contexts(conditions, [a_prompt(3), Condition()]) == ([3, 0] if of_text is None else [10, 7])


def test_the_hosts_contexts_are_let_go() -> None:
    conditions, prompt = conditions_of(text_embedder(), None, TOKENS), a_prompt(1)
    conditions.hold([prompt])
    assert prompt.context is not None
    context = weakref.ref(prompt.context.tokens)
    del prompt
    assert context() is None


def test_a_network_without_text_is_given_no_context() -> None:
    conditions = conditions_of(Embedder(4, lambda t, _: t[:, None].expand(-1, 4)), None)
    inputs, _ = conditions.inputs(
        torch.tensor(conditions.times([(1.0, None)])), torch.tensor(conditions.hold([Condition()]))
    )
    assert inputs.keys() == {"emb"}


# The network's output divided by the timestep.


@pytest.mark.parametrize("timestep", [1, 257, 999])
def test_the_output_is_divided_by_the_timestep_itself(timestep: int) -> None:
    """bfloat16 has no 257 and no 999. The division is done outside the network, in float32."""
    network = fourier()
    backend = torch_backend(network, SHAPE, "bfloat16", 1)
    runner = runner_on(backend, SHAPE, 1, network)
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    table = sample_table(Schedule(), "ddim", (timestep,))
    row = Row(table, 0, Group(8, 8), start=start.numpy(), model_output=True)
    [reading] = trajectory(runner, row)
    inputs = inputs_of(network, start[None], torch.tensor([float(timestep)]), torch.tensor([0]))
    [whole] = backend.start(inputs)()
    assert torch.equal(torch.from_numpy(reading.x), whole / timestep)


def test_rows_of_a_fourier_network_are_divided_by_their_own_timesteps() -> None:
    network = fourier()
    table = sample_table(Schedule(), "ddpm", (900, 30, 7, 2))
    row = Row(table, 3, Group(8, 8))
    alone = [reading.x for reading in trajectory(runner_of(network, SHAPE, 2), row)]
    crowd = runner_of(network, SHAPE, 2)
    early, late = crowd.admit(row), crowd.admit(row)
    crowd.step([Forward(early, 0, 0)])
    for line in range(1, 4):
        crowd.step([Forward(early, 0, line), Forward(late, 0, line - 1)])
        assert (crowd.read(early).x == alone[line]).all()
        assert (crowd.read(late).x == alone[line - 1]).all()
