"""The benchmarks measure what they claim, and documents show the recorded figures. Nothing is measured here."""

import json
import re
from collections import Counter
from pathlib import Path

import httpx
import pytest

from bench import record
from bench.bursts import BURSTS
from bench.documents import DOCUMENTS, MarkError, filled, names
from bench.load import Fields, closed_loop
from bench.pairs import Pairs
from bench.record import NOT_YET, Record, Table
from bench.servers import Server, frozen
from bench.versions import STEADY
from tests.local import serving_fake
from tests.servers import ROOT

RECORDS = sorted(path.stem for path in record.FOLDER.glob("*.json"))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_show_the_figures_of_the_records(path: Path) -> None:
    text = path.read_text()
    assert filled(text) == text, "run `python -m bench.documents`"


def test_every_record_is_shown() -> None:
    shown = set().union(*(names(path.read_text()) for path in DOCUMENTS))
    assert shown == set(RECORDS)


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_can_be_measured_again(name: str) -> None:
    found = record.read(name)
    for module in re.findall(r"python -m ([\w.]+)", found.command):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()
    assert found.date == NOT_YET or re.fullmatch(r"\d{4}-\d\d-\d\d", found.date)


TABLE = Table(
    "rows",
    {"ms": "{:.1f}", "range": "{:.0f} ({:.0f} to {:.0f})", "share": "{:.0%}"},
    {"one": [1.25, [2, 1, 4], 0.97], "two": [None, "none", 1.5]},
)
RECORD = Record("python -m bench.cost", "2026-11-30", "2 cores", 15, {"a table": TABLE, "another": TABLE})


def test_a_table_as_markdown() -> None:
    assert TABLE.markdown().splitlines() == [
        "| rows | ms | range | share |",
        "|---|---|---|---|",
        "| one | 1.2 | 2 (1 to 4) | 97 % |",
        "| two |  | none | 150 % |",
    ]


def test_a_record_is_read_as_it_was_written() -> None:
    text = record.to_json(RECORD)
    assert record.from_json(text) == RECORD
    assert len(text.splitlines()) < 40  # each row of a table is one line


def test_marks_are_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "FOLDER", tmp_path)
    (tmp_path / "cost.json").write_text(record.to_json(RECORD))
    figure = "It is <!-- figure: cost; a table; one; share -->96 %<!-- / -->, not"
    assert filled(figure) == "It is <!-- figure: cost; a table; one; share -->97 %<!-- / -->, not"
    other_form = "is <!-- figure: cost; a table; one; range; {2:.2f} s --><!-- / -->"
    assert filled(other_form) == "is <!-- figure: cost; a table; one; range; {2:.2f} s -->4.00 s<!-- / -->"
    table = f"<!-- table: cost; a table -->\n\n{TABLE.markdown()}\n\n<!-- / -->"
    assert filled("<!-- table: cost; a table -->\nold\n<!-- / -->") == table
    assert filled(table) == table
    source = "<!-- source: cost -->\n`python -m bench.cost`, 2026-11-30, medians of 15. 2 cores.\n<!-- / -->"
    assert filled("<!-- source: cost --><!-- / -->") == source


@pytest.mark.parametrize(
    "mark",
    [
        "figure: nothing; widths; digits; 1",
        "figure: cost; nothing; digits; 1",
        "figure: cost; widths; nothing; 1",
        "figure: cost; widths; digits; 3",
        "figure: cost; widths; digits",
        "figure: cost; widths; digits; 1; {:.3d}",
        "table: cost",
        "source: cost; widths",
    ],
)
def test_a_mark_for_what_no_record_has_is_refused(mark: str) -> None:
    with pytest.raises(MarkError, match=re.escape(f"`{mark.partition(': ')[2]}`")):
        filled(f"is <!-- {mark} --><!-- / -->")


def test_a_figure_at_the_start_of_a_line_is_refused() -> None:
    """Markdown would show such a line as a comment."""
    with pytest.raises(MarkError, match="start of a line"):
        filled("it is\n<!-- figure: cost; widths; digits; 1 --><!-- / --> ms")


def test_pairs_take_turns_and_compare_within_a_pair() -> None:
    calls = ""
    rates = {"a": iter([10.0, 20.0, 40.0]), "b": iter([5.0, 20.0, 30.0])}

    def rate(name: str) -> float:
        nonlocal calls
        calls += name
        return next(rates[name])

    pairs = Pairs()
    for _ in range(3):
        pairs.measure(lambda: rate("a"), lambda: rate("b"))
    assert calls == "abbaab"
    assert pairs.ratios == (0.75, 0.625, 0.875)


def test_a_closed_loop_sends_each_request_once() -> None:
    requests: list[Fields] = [{"num_inference_steps": 1, "seed": seed} for seed in range(100, 112)]
    with serving_fake() as server:
        assert closed_loop(server.url, requests, clients=3) > 0
    seeds = Counter(server.runner.admitted)
    assert [seeds[seed] for seed in range(100, 112)] == [1] * 12


def test_a_closed_loop_fails_where_a_request_is_refused() -> None:
    with serving_fake() as server, pytest.raises(RuntimeError, match="422"):
        closed_loop(server.url, [{"num_images": 0}], clients=1)


def test_bursts_ask_for_images_with_seeds_of_their_own() -> None:
    for burst in BURSTS:
        seeds = [request["seed"] for request in burst.requests(1000)]
        assert seeds == list(range(1000, 1000 + burst.images))
    assert [burst.rows_per_image for burst in BURSTS] == [20, 30, 4]


@pytest.mark.slow
def test_a_server_runs_on_given_costs() -> None:
    """bench.versions gives two checkouts the same costs. Otherwise a noisy start decides which one is faster."""
    given = {width: 0.5 + 0.001 * width for width in range(1, 17)}
    settings = {"STEPWISE_WEIGHTS": "digits-4step", "COSTS": json.dumps(given), "STEPWISE_THREADS": "1"}
    with frozen(Server("steady", ["-c", STEADY], settings)) as server, server.awake():
        told = httpx.get(f"{server.url}/info", trust_env=False).json()["seconds_per_step"]
    assert {int(width): seconds for width, seconds in told.items()} == pytest.approx(given)
