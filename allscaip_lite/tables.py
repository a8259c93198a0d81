"""Tables in Markdown, and their places in pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from allscaip_lite.errors import InputError
from allscaip_lite.files import store_text

MARKS = ("<!-- table: written by run.py -->", "<!-- end of the table -->")


def markdown_table(
    head: Sequence[str], rows: Iterable[Sequence[object]], align: str | None = None
) -> str:
    """The lines of a table in Markdown, without a line break at the end.

    `align` has "l" or "r" for each column; by default all but the first are aligned to the right.
    """
    align = align or "l" + "r" * (len(head) - 1)
    rule = "|" + "|".join("---:" if side == "r" else "---" for side in align) + "|"
    head_line, *lines = (
        " ".join(["|", *(f"{cell} |" if cell != "" else "|" for cell in cells)])
        for cells in (head, *rows)
    )
    return "\n".join([head_line, rule, *lines])


def insert_table(page: Path, text: str) -> None:
    """Put a table into a page, between the two lines of `MARKS`; the rest of the page stays.

    A page that does not exist gets the marks and the table. Raises `InputError` for a page without
    marks.
    """
    old = page.read_text() if page.exists() else "\n".join(MARKS) + "\n"
    begin, end = (old.find(mark) for mark in MARKS)
    if begin < 0 or end < begin:
        raise InputError(
            f"{page} has no place for a table: write the lines {MARKS[0]} and {MARKS[1]} into it"
        )
    store_text(page, f"{old[: begin + len(MARKS[0])]}\n\n{text.rstrip()}\n\n{old[end:]}")
