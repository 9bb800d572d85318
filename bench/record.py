"""Results of a benchmark: tables of numbers in bench/figures/NAME.json. bench/documents.py puts them into documents.

A record has the command, the date and the machine:

    {
     "command": "python -m bench.cost",
     "date": "2026-11-27",
     "machine": "2 cores of …",
     "rounds": 5,
     "tables": {
      "images": {
       "corner": "images",
       "columns": {"1": "{:.3g}", "2": "{:.3g}"},
       "rows": {
        "digits": [44.9, 69.4]
       }
      }
     }
    }

A column has a head and the format of its numbers, a Python format string.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
_LIST = re.compile(r"\[(?:[^][]|\[[^][]*\])*\]")  # of cells, which may be lists themselves
NOT_YET = "not measured yet"  # instead of a date

Cell = float | str | Sequence[float] | None  # a number, a text, several numbers in one cell, or nothing


@dataclass(frozen=True)
class Table:
    """A table of numbers.

    Attributes:
        corner: the head of the row names.
        columns: heads, each with the format of its cells.
        rows: by name, with a cell for each column.
    """

    corner: str
    columns: Mapping[str, str]
    rows: Mapping[str, Sequence[Cell]]

    def cell(self, row: str, column: str, form: str | None = None) -> str:
        """A cell as text, in the column's format or another.

        Raises:
            KeyError: if the table lacks the row or the column.
        """
        return written(self.rows[row][list(self.columns).index(column)], form or self.columns[column])

    def markdown(self) -> str:
        lines = [f"| {self.corner} | {' | '.join(self.columns)} |", f"|{'---|' * (1 + len(self.columns))}"]
        for name, cells in self.rows.items():
            texts = [written(cell, form) for cell, form in zip(cells, self.columns.values(), strict=True)]
            lines.append(f"| {name} | {' | '.join(texts)} |")
        return "\n".join(lines)


def written(cell: Cell, form: str) -> str:
    """A cell as text. Documents have "97 %" instead of Python's "97%"."""
    if cell is None or isinstance(cell, str):
        return cell or ""
    numbers = cell if isinstance(cell, Sequence) else [cell]
    return form.format(*numbers).replace("%", " %")


@dataclass(frozen=True)
class Record:
    """The results of one run of a command.

    Attributes:
        date: of the run, or NOT_YET.
        rounds: number of measurements of each case; figures are medians.
    """

    command: str
    date: str
    machine: str
    rounds: int
    tables: Mapping[str, Table]

    @property
    def source(self) -> str:
        """The source of the figures, in one line."""
        if self.date == NOT_YET:
            return f"`{self.command}`: {NOT_YET}."
        rounds = f"medians of {self.rounds}" if self.rounds > 1 else "one run"
        return f"`{self.command}`, {self.date}, {rounds}. {self.machine}."

    def markdown(self) -> str:
        return "\n\n".join([self.source, *(f"{name}\n\n{table.markdown()}" for name, table in self.tables.items())])


def save(name: str, machine: str, rounds: int, tables: Mapping[str, Table]) -> None:
    """Write the record of `python -m bench.NAME` with today's date, and print it."""
    record = Record(f"python -m bench.{name}", f"{datetime.now(UTC):%Y-%m-%d}", machine, rounds, tables)
    (FOLDER / f"{name}.json").write_text(to_json(record))
    print(record.markdown())


def to_json(record: Record) -> str:
    """JSON with each table row on one line."""
    return (
        _LIST.sub(lambda cells: " ".join(cells[0].split()), json.dumps(asdict(record), indent=1, ensure_ascii=False))
        + "\n"
    )


def read(name: str) -> Record:
    """The record of this name.

    Raises:
        FileNotFoundError: if there is no record of this name.
    """
    return from_json((FOLDER / f"{name}.json").read_text())


def from_json(text: str) -> Record:
    fields = json.loads(text)
    tables = {key: Table(**table) for key, table in fields.pop("tables").items()}
    return Record(**fields, tables=tables)
