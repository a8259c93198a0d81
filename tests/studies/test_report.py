"""What studies share: a page keeps what is not its table."""

from __future__ import annotations

import pytest

from allscaip_lite.errors import InputError
from docs.studies.report import MARKS, insert_table


def test_a_page_keeps_what_stands_around_its_table(tmp_path):
    page = tmp_path / "docs" / "page.md"
    insert_table(page, "| one |\n")
    assert page.read_text() == f"{MARKS[0]}\n\n| one |\n\n{MARKS[1]}\n"
    page.write_text("Before.\n" + page.read_text() + "After.\n")
    insert_table(page, "| two |")
    text = page.read_text()
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    assert "| two |" in text and "| one |" not in text
    page.write_text("no marks")
    with pytest.raises(InputError, match="no place for a table"):
        insert_table(page, "")
