"""Put recorded figures into the documents.

    python -m bench.documents

A mark in a document shows a figure, a table, or the source of both, from a record (bench/record.py):

    <!-- figure: cost; images; digits; 16 -->413<!-- / -->
    <!-- figure: cost; images; digits; 16; {:.0f} ms -->413 ms<!-- / -->
    <!-- table: cost; images --> … <!-- / -->
    <!-- source: cost --> … <!-- / -->

The parts are the record, its table, the row, the column, and optionally another format than the column's. This command
writes the text between the two halves of each mark. Nothing is measured here.
"""

import re
from pathlib import Path

from bench import record

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "bench").glob("*.md"))]
_MARK = re.compile(r"(<!-- (figure|table|source): (.*?) -->).*?(<!-- / -->)", re.DOTALL)
_LINE_START = re.compile(r"^ *<!-- figure:", re.MULTILINE)


class MarkError(Exception):
    """A mark whose figure is not recorded, or that Markdown would not show."""


def filled(text: str) -> str:
    """A document with the figures of the records.

    Raises:
        MarkError: for a mark that cannot be filled.
    """
    if _LINE_START.search(text):
        raise MarkError("a figure stands at the start of a line, where Markdown takes the whole line for a comment")
    return _MARK.sub(lambda mark: mark[1] + _asked(mark[2], mark[3].split("; ")) + mark[4], text)


def names(text: str) -> set[str]:
    """The names of the records that a document uses."""
    return {mark[3].split("; ")[0] for mark in _MARK.finditer(text)}


def _asked(kind: str, parts: list[str]) -> str:
    """The text between the two halves of a mark."""
    try:
        match kind, record.read(parts[0]), parts[1:]:
            case "figure", found, [table, *where]:
                return found.tables[table].cell(*where)
            case "table", found, [table]:
                return f"\n\n{found.tables[table].markdown()}\n\n"
            case "source", found, []:
                return f"\n{found.source}\n"
    except (FileNotFoundError, KeyError, ValueError, IndexError, TypeError) as error:
        raise MarkError(f"no record has the {kind} `{'; '.join(parts)}`: {error!r}") from error
    raise MarkError(f"a {kind} is not asked for by `{'; '.join(parts)}`")


def main() -> None:
    for path in DOCUMENTS:
        text = path.read_text()
        new = filled(text)
        if new != text:
            path.write_text(new)
            print(f"figures written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
