"""The parts of documents that are made from the program: `make docs`.

docs/settings.md    the table of settings, from service/config.py
"""

from pathlib import Path

from service import config

SETTINGS = Path(__file__).parents[1] / "docs" / "settings.md"
BEGIN, END = "<!-- begin: make docs -->\n", "<!-- end: make docs -->\n"


def settings_table() -> str:
    """Every setting as a row of a Markdown table."""
    head = "| name | default | accepts | meaning |\n|---|---|---|---|\n"
    rows = (
        f"| `{setting.name}` | {setting.default} | {setting.accepts} | {setting.meaning} |\n"
        for setting in config.described()
    )
    return head + "".join(rows)


def renewed(text: str, part: str) -> str:
    """A document with `part` between its two marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError("the document lacks its marks")
    return before + begin + part + end + after


def main() -> None:
    SETTINGS.write_text(renewed(SETTINGS.read_text(), settings_table()))


if __name__ == "__main__":
    main()
