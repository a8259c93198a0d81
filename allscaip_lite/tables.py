"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


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
