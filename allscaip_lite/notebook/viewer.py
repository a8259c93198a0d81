"""Interactive views: a molecule in py3Dmol, a trajectory in nglview.

Input: `ase.Atoms`, or a list of frames. Output: a `Page`, which a notebook displays and which also
works in exported HTML, or a widget of nglview. Both libraries come with the `notebooks` extra.
"""

from __future__ import annotations

import base64
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, ClassVar

from ase import Atoms

from allscaip_lite.files import store_text
from allscaip_lite.notebook.plots import import_extra, seen_from_front

VIEWER_SCRIPT = Path(sys.prefix) / "share" / "allscaip-lite" / "3Dmol-min.js"


@dataclass(frozen=True)
class Page:
    """A piece of HTML with its script. A notebook displays it; `save` writes it as a page."""

    html: str
    title: str
    head: ClassVar[str] = ""  # added to the <head> of a saved page

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<{self.title}: display it in a notebook, or save('page.html')>"

    def save(self, path: str | Path) -> Path:
        """Write a page that any browser opens, without a network."""
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head = f'<html lang="en"><meta charset="utf-8">{view}<title>{escape(self.title)}</title>'
        page = f"<!doctype html>\n{head}{self.head}\n<body>\n{self.html}\n</body></html>\n"
        store_text(path, page)
        return Path(path)


def view_molecule(atoms: Atoms) -> Page:
    """The molecule as balls and sticks in py3Dmol, which can be rotated, moved and zoomed.

    `make` puts 3Dmol.js at `VIEWER_SCRIPT` where it can. It then goes into the page, which needs no
    network. Without that file the browser downloads it.

    Raises ImportError where py3Dmol is not installed.
    """
    py3dmol = import_extra("py3Dmol", "view_molecule")
    options = {}
    if VIEWER_SCRIPT.is_file():
        script = base64.b64encode(VIEWER_SCRIPT.read_bytes()).decode()
        options["js"] = f"data:text/javascript;base64,{script}"
    view = py3dmol.view(width=600, height=400, **options)
    positions = seen_from_front(atoms)
    lines = [
        f"{symbol} {x:.4f} {y:.4f} {z:.4f}"
        for symbol, (x, y, z) in zip(atoms.symbols, positions, strict=True)
    ]
    view.addModel("\n".join([str(len(atoms)), "", *lines]), "xyz")
    view.setStyle({"stick": {"radius": 0.12}, "sphere": {"scale": 0.25}})
    view.zoomTo()
    return Page(view.write_html(), f"Molecule {atoms.get_chemical_formula()}")


def view_trajectory(frames: Sequence[Atoms]) -> Any:
    """A trajectory as a movie in nglview, which needs a running kernel.

    Raises ImportError where nglview is not installed, ValueError where there are no frames, or
    where they have different atoms.
    """
    check_frames(frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nglview imports deprecated modules
        nglview = import_extra("nglview", "view_trajectory")
    view = nglview.show_asetraj(list(frames))
    view.clear_representations()
    view.add_representation("ball+stick")
    view.layout.width, view.layout.height = "600px", "400px"
    view.center()
    return view


def check_frames(frames: Sequence[Atoms]) -> None:
    """Raise `ValueError` or `TypeError` unless all frames have the same atoms in the same order."""
    if not frames:
        raise ValueError("no frames: give one ase.Atoms or a non-empty list of them")
    for index, atoms in enumerate(frames):
        if not isinstance(atoms, Atoms):
            raise TypeError(f"frame {index} is a {type(atoms).__name__}, not an ase.Atoms")
        if atoms.numbers.tolist() != frames[0].numbers.tolist():
            raise ValueError(
                f"frame {index} ({atoms.get_chemical_formula()}) has other atoms than frame 0 "
                f"({frames[0].get_chemical_formula()}), or another order: show them separately"
            )
