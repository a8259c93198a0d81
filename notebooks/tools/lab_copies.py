"""The lessons as a student gets them: copies without solutions, which keep the student's work.

In: the notebooks of the course. Out: a folder (`lab/`, which git ignores) with a student copy of
each, and the files that lessons read. `make lab` calls this each time, so that a copy is renewed
when its lesson changes. A copy that was edited or run is never touched: the newer version of its
lesson is put beside it, as `01_graph-2.ipynb`, and a line says so. A copy that is deleted is made
again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from notebooks.tools.class_copies import COURSE, LESSON_FILES, read_notebook, student_copy

RECORD = ".copies.json"  # the fingerprint of each copy as it was written


def write_lab(course: Path, out: Path) -> list[str]:
    """Make or renew the student copies of a course.

    Args:
        course: the folder with the notebooks and the files that they read.
        out: the folder of the copies; it is made where it is missing.

    Returns:
        A line for each lesson whose newer version was put beside a copy with someone's work.

    Raises:
        ClassroomError: a notebook's exercises are not in order.
    """
    record_file = out / RECORD
    written = json.loads(record_file.read_text("utf-8")) if record_file.exists() else {}
    said = []
    for path, content in _files(course):
        name = path.relative_to(course).as_posix()
        place = _place(out, name, content, written)
        if place is None:
            continue
        target = out / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        written[place] = _fingerprint(content)
        if place != name:
            said.append(
                f"{out / name} holds your work and is kept; the lesson has changed since, and its "
                f"new version is {target}"
            )
    out.mkdir(parents=True, exist_ok=True)
    record_file.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return said


def _files(course: Path) -> Iterator[tuple[Path, bytes]]:
    """Each file that a student gets, and its content: notebooks, and what they read."""
    for path in sorted(course.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(course).parts)
        if hidden or not path.is_file():
            continue
        if path.suffix == ".ipynb" and path.parent == course:
            copy = student_copy(read_notebook(path))
            yield path, (json.dumps(copy, indent=1, ensure_ascii=False) + "\n").encode()
        elif path.suffix in LESSON_FILES:
            yield path, path.read_bytes()


def _place(out: Path, name: str, content: bytes, written: dict[str, str]) -> str | None:
    """The name under which this content is to be written; None where it need not be.

    A file that differs from what was written there holds someone's work. If that work began from
    this same content nothing is new, else the next name is tried.
    """
    first, new = Path(name), _fingerprint(content)
    place, version = name, 1
    while True:
        target = out / place
        if not target.exists():
            return place
        if _fingerprint(target.read_bytes()) == written.get(place):
            return place if written[place] != new else None
        if written.get(place) == new:
            return None
        version += 1
        place = first.with_name(f"{first.stem}-{version}{first.suffix}").as_posix()


def _fingerprint(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    """Make or renew the student copies of the course; work in them is kept."""
    parser = argparse.ArgumentParser(
        prog="python -m notebooks.tools.lab_copies", description=main.__doc__
    )
    parser.add_argument("--out", type=Path, default=Path("lab"), help="default: lab")
    args = parser.parse_args(arguments)
    for line in write_lab(COURSE, args.out):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
