"""Write the table of docs/settings.md from service/config.py.

python -m bench.settings
"""

from pathlib import Path

from service import config

DOCUMENT = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN, END = "<!-- settings -->\n\n", "\n<!-- / -->\n"


def table() -> str:
    """A Markdown table with a line for every setting."""
    head = "| name | default | accepts | meaning |\n|---|---|---|---|\n"
    rows = (
        f"| `{setting.name}` | {setting.default} | {setting.accepts} | {setting.meaning} |\n"
        for setting in config.described()
    )
    return head + "".join(rows)


def renewed(text: str) -> str:
    """The document with the present table between its two marks.

    Raises:
        ValueError: the document lacks a mark.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{DOCUMENT.name} lacks a mark")
    return before + begin + table() + end + after


def main() -> None:
    DOCUMENT.write_text(renewed(DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
