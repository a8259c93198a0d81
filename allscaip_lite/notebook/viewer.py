"""Interactive views of molecules and trajectories, as HTML pages that need nothing else.

Input: `ase.Atoms`, or a list of frames. Output: a `Page` with its script and its data. A notebook
displays it, and it also works in exported HTML, without a kernel and without a network.
molecule_view.js draws the atoms and viewer.js plays the frames; `explorer` uses the same parts.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms
from ase.data.colors import jmol_colors

from allscaip_lite.notebook.plots import (
    arrow_scale,
    atom_labels,
    ball_radii,
    bonds,
    cell_lines,
    front,
)

FRAME_TIME = 100  # ms
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
        head = f'<html lang="en"><meta charset="utf-8">{view}<title>{self.title}</title>{self.head}'
        page = f"<!doctype html>\n{head}\n<body>\n{self.html}\n</body></html>\n"
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path


def view_molecule(
    atoms: Atoms, arrows: np.ndarray | None = None, size: tuple[int, int] = (600, 400)
) -> Page:
    """The molecule as balls and sticks, which can be rotated, moved and zoomed.

    Args:
        atoms: The structure.
        arrows: (N, 3) vectors drawn from the atoms, for example forces; the longest arrow is
            1.5 Å long.
        size: Width and height in pixels; a narrow page makes it smaller.
    """
    return _frames_page([atoms], arrows, size, f"Molecule {atoms.get_chemical_formula()}")


def view_trajectory(frames: Sequence[Atoms], size: tuple[int, int] = (600, 400)) -> Page:
    """A trajectory as a movie, with a button to play and a slider for the frame.

    Raises:
        ValueError: There are no frames, or they have different atoms.
    """
    check_frames(frames)
    title = f"Trajectory of {frames[0].get_chemical_formula()}, {len(frames)} frames"
    return _frames_page(list(frames), None, size, title)


def _frames_page(
    frames: list[Atoms], arrows: np.ndarray | None, size: tuple[int, int], title: str
) -> Page:
    scene = frames_scene(frames)
    drawn = []
    if arrows is not None:
        starts = np.array(scene["frames"][0]["positions"])
        ends = starts + np.asarray(arrows) @ front(frames[0]) * arrow_scale(arrows)
        drawn = np.stack([starts, ends], axis=1).round(3).tolist()  # (N, 2, 3)
    data = {"scene": scene, "arrows": drawn, "interval": FRAME_TIME, "title": title}
    data["markup"] = resource("viewer.html").replace("@ASPECT@", f"{size[0]}/{size[1]}")
    return Page(page_html("framesView", title, str(size[0]), resource("viewer.js"), data), title)


# --- what the explorer shares -------------------------------------------------------------------

# A notebook that is not trusted shows only the message, because it does not run the script.
_SHELL = """<div class="@CLASS@" data-view="@NAME@" role="group" aria-label="@TITLE@"
 style="max-width: @WIDTH@px">
<p data-part="message">This is the place of an interactive view, but its script has not run. In
JupyterLab: run the cell, or trust the notebook (File, Trust Notebook).</p>
</div>
<script>
(() => {
@SCRIPT@
// a notebook may show the same output twice: start each copy once
for (const root of document.querySelectorAll('[data-view="@NAME@"]')) {
  if (!root.dataset.started) { root.dataset.started = "1"; @FUNCTION@(root, @DATA@); }
}
})();
</script>"""


def page_html(function: str, title: str, width: str, script: str, data: dict[str, Any]) -> str:
    """HTML that calls a function of a script with data.

    Args:
        function: The JavaScript function; its arguments are the element and the data.
        title: What a screen reader says.
        width: The largest width in pixels.
        script: The script that defines the function; molecule_view.js is added.
        data: What goes into the page as JSON.
    """
    html = _SHELL
    for mark, value in {
        "SCRIPT": resource("molecule_view.js") + script,
        "DATA": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        "NAME": f"allscaip-{uuid.uuid4().hex[:12]}",
        "CLASS": "allscaip-frames" if function == "framesView" else "allscaip-view",
        "FUNCTION": function,
        "TITLE": title,
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
    drawn = []
    for index, atoms in enumerate(frames):
        drawn.append(
            {
                "positions": (placed[index] - middle).round(3).tolist(),
                "bonds": sorted(set(bonds(atoms)) - shared),
                "lines": (corners[index] - middle).round(3).reshape(-1, 2, 3).tolist(),
            }
        )
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
