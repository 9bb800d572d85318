"""The results of bench.text as tables."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from bench import record
from bench.pairs import quartiles
from model.rows import Group

Found = Mapping[str, Sequence[float] | str]  # values by what was measured; "failed" has a reason instead

DTYPES = ("float32", "bfloat16")
FORMATS = ("contiguous_format", "channels_last")  # of torch; the first is diffusers' default
_SPREAD = "{0:.3g} ({1:.3g} to {2:.3g})"


class Key(NamedTuple):
    """A case: a model, a part, a system, and the size of images."""

    model: str
    part: str
    system: str
    size: str

    def __str__(self) -> str:
        return "; ".join(self)


Results = Mapping[Key, Found]


class Model(NamedTuple):
    """A model of the tables: its title, and its sizes, the larger one first."""

    title: str
    sizes: tuple[Group, Group]


def several(values: Sequence[float]) -> record.Cell:
    """Median and quartiles, or the only value."""
    return list(quartiles(list(values))) if len(values) > 1 else f"{values[0]:.3g}"


def cells(found: Found | None, names: Sequence[str], scale: Mapping[str, float] | None = None) -> list[record.Cell]:
    """A row: a cell for each name. Where the case failed, the first cell says why."""
    if found is None:
        return ["not run", *[None] * (len(names) - 1)]
    if "failed" in found:
        return [str(found["failed"]), *[None] * (len(names) - 1)]
    return [_cell(found.get(name), (scale or {}).get(name, 1.0)) for name in names]


def _cell(values: Sequence[float] | str | None, scale: float) -> record.Cell:
    if values is None or isinstance(values, str):
        return values
    return several([scale * value for value in values])


def _rows(
    results: Results,
    keys: Iterable[tuple[str, Key]],
    names: Sequence[str],
    scale: Mapping[str, float] | None = None,
) -> dict[str, Sequence[record.Cell]]:
    return {title: cells(results.get(key), names, scale) for title, key in keys}


def start(results: Results, models: Mapping[str, Model]) -> record.Table:
    """Seconds and memory of starts."""
    keys = []
    for name, (title, (large, small)) in models.items():
        for system, size in (("first", large), ("later", large), ("later", small)):
            keys.append((f"{title}, Stepwise, {system} start, {size}", Key(name, "start", system, str(size))))
        keys += [(f"{title}, diffusers, {dtype}", Key(name, "start", dtype, "")) for dtype in DTYPES]
    names = {"seconds": 1.0, "peak": 1e-9, "resident": 1e-9, "mapped": 1e-9}
    columns = ("ready after, s", "peak, GB", "resident, GB", "of it mapped files, GB")
    return record.Table("", dict.fromkeys(columns, _SPREAD), _rows(results, keys, list(names), names))


def memory(results: Results, models: Mapping[str, Model]) -> record.Table:
    """What a ready server of one size and one width holds for its weights, by comparison with the weights' own size.

    A server holds its program, weights, and activations. The program is what a server of the smallest weights holds.
    Activations grow with the pixels: a line through the servers of two sizes says what is held at no pixels.
    """
    rows: dict[str, list[record.Cell]] = {}
    empty = results.get(Key("empty", "start", "later", ""))
    for name, (title, sizes) in models.items():
        held = [results.get(Key(name, "start", "later", str(size))) for size in sizes]
        own = results.get(Key(name, "weights", "", ""))
        needed = [empty, own, *held]
        if any(found is None or "failed" in found for found in needed):
            rows[title] = ["not all was measured", *[None] * 5]
            continue
        program, weights, large, small = (_median(found, "resident") for found in needed if found is not None)
        pixels = [size.width * size.height for size in sizes]
        a_pixel = (large - small) / (pixels[0] - pixels[1])
        above = large - a_pixel * pixels[0] - program
        rows[title] = [
            *(value / 1e9 for value in (program, large, a_pixel * pixels[0], above, weights)),
            above / weights,
        ]
    columns = {
        "an empty server, GB": "{:.2f}",
        "resident, GB": "{:.2f}",
        "of it activations, GB": "{:.2f}",
        "left for weights, GB": "{:.2f}",
        "U-Net and VAE in bfloat16, encoders in float32, GB": "{:.2f}",
        "times": "{:.2f}",
    }
    return record.Table("", columns, rows)


def _median(found: Found, name: str) -> float:
    values = found[name]
    assert not isinstance(values, str)
    return statistics.median(values)


def steps(results: Results, models: Mapping[str, Model]) -> record.Table:
    """Seconds of steps, prompts and decodings."""
    keys = [
        (f"{title}, {size}, {system}", Key(name, "steps", system, str(size)))
        for name, (title, sizes) in models.items()
        for size in reversed(sizes)
        for system in ("Stepwise", *(f"diffusers, {dtype}" for dtype in DTYPES))
    ]
    columns = {
        "a row's step at one row, s": _SPREAD,
        "at two rows, s": _SPREAD,
        "a prompt, s": _SPREAD,
        "decoding, s": _SPREAD,
        "passes of two rows": "{}",
    }
    return record.Table("", columns, _rows(results, keys, ("one row", "two rows", "text", "decode", "bits")))


def ratio(results: Results, models: Mapping[str, Model]) -> record.Table:
    """Stepwise relative to diffusers' bfloat16, pair by pair, with two rows."""
    keys = [
        (f"{title}, {size}, {memory_format}", Key(name, "ratio", memory_format, str(size)))
        for name, (title, sizes) in models.items()
        for size in reversed(sizes)
        for memory_format in FORMATS
        if name == "sd15"
    ]
    columns = {
        "Stepwise, s": _SPREAD,
        "diffusers, bfloat16, s": _SPREAD,
        "Stepwise takes, of its time": _SPREAD,
        "pairs": "{}",
    }
    rows = {}
    for title, key in keys:
        found = results.get(key)
        cell = cells(found, ("ours", "theirs", "ratio"))
        values = [] if found is None else found.get("ratio", [])
        rows[title] = [*cell, len(values) if values else None]
    return record.Table("a row's step, two rows", columns, rows)


def precision(results: Results, models: Mapping[str, Model]) -> record.Table:
    """Images in bfloat16 beside those in float32, by seed."""
    columns = {
        "mean difference, levels": "{:.2f}",
        "largest": "{:.0f}",
        "PSNR, dB": "{:.1f}",
        "values beyond one level": "{:.2%}",
    }
    names = ("mean", "largest", "psnr", "beyond one")
    found = results.get(Key("sd15", "precision", "", str(models["sd15"].sizes[1])))
    if found is None or "failed" in found:
        return record.Table("seed", columns, {"all": cells(found, names)})
    values = [_numbers(found, name) for name in names]
    rows: dict[str, Sequence[record.Cell]] = {str(seed): row for seed, row in enumerate(zip(*values, strict=True))}
    return record.Table("seed", columns, rows)


def _numbers(found: Found, name: str) -> list[float]:
    values = found[name]
    assert not isinstance(values, str)
    return list(values)


def tables(results: Results, models: Mapping[str, Model]) -> dict[str, record.Table]:
    return {
        "start": start(results, models),
        "memory": memory(results, models),
        "steps": steps(results, models),
        "ratio": ratio(results, models),
        "precision": precision(results, models),
    }
