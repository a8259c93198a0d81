"""Interactive views: a molecule in py3Dmol, a trajectory in nglview, and the page of the explorer.

Input: `ase.Atoms`, or a list of frames. Output: a `Page`, which a notebook displays and which also
works in exported HTML, or a widget of nglview. Both libraries come with the `notebooks` extra.
"""

from __future__ import annotations

import base64
import json
import sys
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.data.colors import jmol_colors

from allscaip_lite.files import store_text
from allscaip_lite.notebook.plots import (
    atom_labels,
    ball_radii,
    bonds,
    cell_lines,
    front,
    import_extra,
    seen_from_front,
)

VIEWER_SCRIPT = Path(sys.prefix) / "share" / "allscaip-lite" / "3Dmol-min.js"
IMAGE_BORDER = 1.5  # Å around a cell, for the periodic images


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


# --- what the explorer shares -------------------------------------------------------------------


def page_html(title: str, width: str, script: str, data: dict[str, Any]) -> str:
    """HTML that calls `attentionView` of a script with data, in the frame of view.html.

    A notebook that is not trusted shows only the frame's message, because it does not run scripts.

    Args:
        title: What a screen reader says.
        width: The largest width in pixels.
        script: The script that defines `attentionView(element, data)`; molecule_view.js is added.
        data: What goes into the page as JSON.
    """
    html = resource("view.html").strip()
    for mark, value in {
        "SCRIPT": resource("molecule_view.js") + script,
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "NAME": f"allscaip-{uuid.uuid4().hex[:12]}",
        "TITLE": escape(title, quote=True),
        "WIDTH": width,
    }.items():
        html = html.replace(f"@{mark}@", value)
    return html


def resource(name: str) -> str:
    """A text file of this package."""
    return resources.files("allscaip_lite.notebook").joinpath(name).read_text("utf-8")


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


def frames_scene(frames: Sequence[Atoms]) -> dict[str, Any]:
    """Positions, bonds and cells of all frames, in the frame of the first view, centred at 0.

    The frames of a molecule are aligned at the mean of their positions.
    """
    first = frames[0]
    shared = set(bonds(first)).intersection(*map(bonds, frames[1:]))
    rotation = front(first)
    placed, corners = [], []
    for atoms in frames:
        center = 0.0 if atoms.pbc.any() else atoms.positions.mean(0)
        placed.append((atoms.positions - center) @ rotation)  # (N, 3)
        corners.append(cell_lines(atoms).reshape(-1, 3) @ rotation)
    points = np.concatenate([*placed, *corners])
    middle = (points.min(0) + points.max(0)) / 2
    points, radii = points - middle, ball_radii(first)
    border = IMAGE_BORDER if first.pbc.any() else 0.0
    drawn = [
        {
            "positions": (positions - middle).round(3).tolist(),
            "bonds": sorted(set(bonds(atoms)) - shared),
            "lines": (ends - middle).round(3).reshape(-1, 2, 3).tolist(),
        }
        for atoms, positions, ends in zip(frames, placed, corners, strict=True)
    ]
    reach = max(1.5, float(np.linalg.norm(points, axis=1).max() + radii.max()))
    nearer = 6 * reach / (6 * reach - points[:, 2:])  # viewer of molecule_view.js: at 6 reach
    across = (np.abs(points[:, :2]) * nearer).max(0) + radii.max() + border
    return {
        "labels": atom_labels(first),
        "radii": radii.round(3).tolist(),
        "colors": jmol_colors[first.numbers].round(3).tolist(),
        "bonds": sorted(shared),
        "frames": drawn,
        "size": {
            "reach": round(reach, 3),
            "width": round(max(1.5, float(across[0])), 3),
            "height": round(max(1.5, float(across[1])), 3),
        },
    }
