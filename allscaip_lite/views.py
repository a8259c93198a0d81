"""Pictures for notebooks and papers: molecules, trajectories, and who attends to whom.

In: `ase.Atoms`, and attention weights from `attention_maps`. Out: things that a notebook displays.
`show_attention` is a page of its own, alive also in exported HTML and without a network;
`plot_attention` and `plot_molecule` are matplotlib figures; `view_molecule` is py3Dmol's and
`view_trajectory` nglview's, which need the `notebooks` extra.

`python -m allscaip_lite.views molecule.xyz picture.png` draws the README's picture.
"""

from __future__ import annotations

import argparse
import base64
import importlib
import json
import sys
import uuid
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from torch import Tensor

from allscaip_lite.attention_maps import AttentionMaps, attention_maps
from allscaip_lite.model import AllScAIP

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINK_COLOR = "#d6217f"
VIEWER_SCRIPT = Path(sys.prefix) / "share" / "allscaip-lite" / "3Dmol-min.js"


def _import(module: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f"{purpose} needs {package}: pip install 'allscaip-lite[notebooks]'", name=error.name
        ) from error


# --- what is drawn ------------------------------------------------------------------------------


def atom_labels(numbers: Atoms | Tensor | Sequence[int]) -> list[str]:
    """Element and index of each atom: C0, C1, H2 …"""
    numbers = numbers.numbers if isinstance(numbers, Atoms) else numbers
    return [f"{chemical_symbols[int(z)]}{index}" for index, z in enumerate(numbers)]


def bonds(atoms: Atoms) -> list[tuple[int, int]]:
    """Pairs i < j nearer than 1.2 times the sum of their covalent radii; images are not drawn."""
    radii = covalent_radii[atoms.numbers]
    distances = np.linalg.norm(atoms.positions[:, None] - atoms.positions, axis=-1)
    first, second = np.nonzero(np.triu(distances < 1.2 * (radii[:, None] + radii), 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def front(atoms: Atoms) -> np.ndarray:
    """(3, 3) rotation R: `vectors @ R` shows the widest side across x and y, z points at us."""
    axes = np.linalg.svd(atoms.positions - atoms.positions.mean(0), full_matrices=True)[2]
    axes[2] *= np.linalg.det(axes)  # a rotation, never a mirror image
    return axes.T


def seen_from_front(atoms: Atoms) -> np.ndarray:
    """(N, 3) positions in Å, centred and turned by `front`."""
    return (atoms.positions - atoms.positions.mean(0)) @ front(atoms)


def ball_radii(atoms: Atoms) -> np.ndarray:
    """(N,) radii of the balls in Å."""
    return 0.16 + 0.3 * covalent_radii[atoms.numbers]


def node_weights(maps: AttentionMaps, block: int, head: int | None) -> np.ndarray:
    """(N, N) node attention of one head, or with None the mean over heads.

    Raises `ValueError` for a model without node attention, `IndexError` for a block or head that
    the model does not have.
    """
    if maps.node is None:
        raise ValueError("this model has no node attention to show (config.node_attention=False)")
    for name, index, count in (("block", block, maps.num_blocks), ("head", head, maps.num_heads)):
        if index is not None and not -count <= index < count:
            raise IndexError(f"{name} {index}: this model has {name}s 0 to {count - 1}")
    weights = maps.node[block]  # (h, N, N)
    return (weights.mean(0) if head is None else weights[head]).double().numpy()


# --- attention on the molecule, in a page -------------------------------------------------------


@dataclass(frozen=True)
class Page:
    """A piece of HTML with its script inside. A notebook shows it; `save` writes it as a page."""

    html: str
    title: str

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        return f"<{self.title}: display it in a notebook, or save('page.html')>"

    def save(self, path: str | Path) -> Path:
        """Write a page that any browser opens, without a network."""
        head = f'<html lang="en"><meta charset="utf-8"><title>{self.title}</title>'
        page = f"<!doctype html>\n{head}\n<body>\n{self.html}\n</body></html>\n"
        path = Path(path)
        path.write_text(page, encoding="utf-8")
        return path


_PAGE = """<div data-view="@NAME@" style="display: inline-block; max-width: 100%; padding: 8px; \
background: #fff; color: #222; border: 1px solid #ccc; border-radius: 6px; \
font: 13px/1.5 sans-serif">
<div>node attention of <select data-part="query"></select>
block <select data-part="block"></select> head <select data-part="head"></select></div>
<canvas data-part="canvas" width="@WIDTH@" height="@HEIGHT@" style="display: block; \
width: @WIDTH@px; max-width: 100%; aspect-ratio: @WIDTH@/@HEIGHT@; touch-action: none"></canvas>
<div data-part="text" style="width: @WIDTH@px; max-width: 100%; min-height: 3em"></div>
<div style="color: #666">Drag to turn, click an atom to ask it.</div>
</div>
<script>
(() => {
@SCRIPT@
// a notebook may show the same output twice: each copy is started once
for (const root of document.querySelectorAll('[data-view="@NAME@"]')) {
  if (!root.dataset.started) { root.dataset.started = "1"; attentionView(root, @DATA@); }
}
})();
</script>"""


def show_attention(
    model_or_maps: AllScAIP | AttentionMaps,
    atoms: Atoms,
    query: int = 0,
    block: int = -1,
    head: int | None = None,
    size: tuple[int, int] = (600, 400),
) -> Page:
    """The node attention of one atom, on the molecule, to be turned and clicked.

    Links run from the query atom to those it takes from; width and opacity follow the weight, the
    widest being the largest. The ring around the query is what it takes from itself, on the same
    scale up to the widest link. `head` None is the mean over heads. `size` in pixels. Raises what
    `attention_maps` and `node_weights` raise, `IndexError` for a query that is no atom,
    `ValueError` for maps of another structure.
    """
    maps = model_or_maps
    if not isinstance(maps, AttentionMaps):
        maps = attention_maps(model_or_maps, atoms)
    _check_same(maps, atoms)
    node_weights(maps, block, head)
    if not -len(atoms) <= query < len(atoms):
        raise IndexError(f"query {query}: the structure has atoms 0 to {len(atoms) - 1}")
    weights = (maps.node.double().numpy() * 65535).round().astype("<u2")  # (L, h, N, N)
    data = {
        "scene": {
            "positions": seen_from_front(atoms).round(3).tolist(),
            "radii": ball_radii(atoms).round(3).tolist(),
            "colors": jmol_colors[atoms.numbers].round(3).tolist(),
            "labels": atom_labels(atoms),
            "bonds": bonds(atoms),
            "linkColor": LINK_COLOR,
        },
        "blocks": maps.num_blocks,
        "heads": maps.num_heads,
        "query": query % len(atoms),
        "block": block % maps.num_blocks,
        "head": -1 if head is None else head % maps.num_heads,
        "weights": base64.b64encode(weights.tobytes()).decode(),
    }
    script = resources.files("allscaip_lite").joinpath("molecule_view.js").read_text("utf-8")
    html = _PAGE
    for mark, value in {
        "SCRIPT": script,
        "DATA": json.dumps(data, separators=(",", ":")),
        "NAME": f"allscaip-{uuid.uuid4().hex[:12]}",
        "WIDTH": str(size[0]),
        "HEIGHT": str(size[1]),
    }.items():
        html = html.replace(f"@{mark}@", value)
    return Page(html, f"Node attention of {atoms.get_chemical_formula()}")


def _check_same(maps: AttentionMaps, atoms: Atoms) -> None:
    if maps.atomic_numbers.tolist() != atoms.numbers.tolist():
        raise ValueError(
            f"these maps belong to another structure than {atoms.get_chemical_formula()}: "
            "make them with attention_maps(model, atoms)"
        )


# --- figures ------------------------------------------------------------------------------------


def plot_attention(
    maps: AttentionMaps, block: int = -1, head: int | None = None, axes: Axes | None = None
) -> Axes:
    """Node attention as a matrix: a row is the query, a column the atom it takes from.

    `head` None is the mean over heads. Raises what `node_weights` raises.
    """
    weights = node_weights(maps, block, head)
    n = len(weights)
    if axes is None:
        pyplot = _import("matplotlib.pyplot", "plot_attention")
        side = min(9.0, 2.5 + 0.17 * n)
        axes = pyplot.subplots(figsize=(side + 0.8, side), layout="constrained")[1]
    image = axes.imshow(weights, cmap="magma_r", vmin=0)
    axes.figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    every = -(-n // 40)  # no more labels than fit
    labels = atom_labels(maps.atomic_numbers)
    font = 9 if n <= 16 else 7
    axes.set_xticks(range(0, n, every), labels[::every], rotation=90, fontsize=font)
    axes.set_yticks(range(0, n, every), labels[::every], fontsize=font)
    axes.set_xlabel("key: the atom taken from")
    axes.set_ylabel("query: the atom that asks")
    heads = "mean over heads" if head is None else f"head {head % maps.num_heads}"
    axes.set_title(f"block {block % maps.num_blocks}, {heads}", fontsize=10)
    return axes


def plot_molecule(
    atoms: Atoms,
    arrows: np.ndarray | None = None,
    links: tuple[int, np.ndarray] | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The molecule from its widest side, as a flat picture.

    `arrows` (N, 3) are drawn from the atoms, forces for example; the longest is drawn 1.5 Å long.
    `links` is a query atom and the (N,) weights it gives, drawn as curves from it.
    """
    patches = _import("matplotlib.patches", "plot_molecule")
    if axes is None:
        pyplot = _import("matplotlib.pyplot", "plot_molecule")
        axes = pyplot.subplots(figsize=(6, 4), layout="constrained")[1]
    positions, radii = seen_from_front(atoms), ball_radii(atoms)
    flat = positions[:, :2]
    layer = 3 * positions[:, 2].argsort().argsort()  # (N,) what is nearer covers what is farther
    for i, j in bonds(atoms):
        axes.plot(*flat[[i, j]].T, color="0.6", linewidth=4, zorder=min(layer[i], layer[j]) + 1)
    for i, label in enumerate(atom_labels(atoms)):
        color = jmol_colors[atoms.numbers[i]]
        look = {"facecolor": color, "edgecolor": "0.3", "zorder": layer[i] + 2}
        axes.add_patch(patches.Circle(flat[i], radii[i], **look))
        ink = "0.1" if color @ [0.3, 0.6, 0.1] > 0.5 else "white"
        font = {"fontsize": 6.5, "ha": "center", "va": "center", "zorder": layer[i] + 2}
        axes.text(*flat[i], label, color=ink, **font)
    above = 3 * len(atoms) + 3
    if links is not None:
        query, weights = links[0], np.asarray(links[1])
        largest = np.delete(weights, query).max(initial=1e-9)  # a large own share hides no link
        strength = (weights / largest).clip(max=1)
        for j in np.flatnonzero(strength > 0.02):
            if j == query:
                look = {"edgecolor": LINK_COLOR, "linewidth": 1 + 3 * strength[j]}
                shape = patches.Circle(flat[j], radii[j] + 0.08, fill=False, zorder=above, **look)
            else:  # thin at the query, wide at the other end, off the bonds
                shape = patches.FancyArrowPatch(
                    flat[j],
                    flat[query],
                    arrowstyle=f"wedge,tail_width={0.5 * strength[j]},shrink_factor=0.5",
                    mutation_scale=14,
                    connectionstyle="arc3,rad=0.2",
                    shrinkA=8,
                    shrinkB=8,
                    color=LINK_COLOR,
                    linewidth=0,
                    alpha=0.2 + 0.6 * strength[j],
                    zorder=above,
                )
            axes.add_patch(shape)
    if arrows is not None:
        across = (np.asarray(arrows) @ front(atoms))[:, :2] * _arrow_scale(arrows)
        look = {"color": LINK_COLOR, "width": 0.006, "zorder": above}
        axes.quiver(*flat.T, *across.T, angles="xy", scale_units="xy", scale=1, **look)
    margin = 0.9
    axes.set_xlim(flat[:, 0].min() - margin, flat[:, 0].max() + margin)
    axes.set_ylim(flat[:, 1].min() - margin, flat[:, 1].max() + margin)
    axes.set_aspect("equal")
    axes.axis("off")
    return axes


def _arrow_scale(arrows: np.ndarray) -> float:
    """What makes the longest arrow 1.5 Å long."""
    longest = np.linalg.norm(arrows, axis=1).max()
    return 1.5 / longest if longest > 0 else 0.0


# --- other people's viewers ---------------------------------------------------------------------


def view_molecule(
    atoms: Atoms, arrows: np.ndarray | None = None, size: tuple[int, int] = (600, 400)
) -> Page | Axes:
    """The molecule as balls and sticks in py3Dmol, to be turned; `arrows` as in `plot_molecule`.

    3Dmol.js goes into the page where the set-up has put it at `VIEWER_SCRIPT`, so that no network
    is needed; otherwise the browser fetches it. Without py3Dmol the answer is `plot_molecule`'s.
    """
    try:
        import py3Dmol
    except ImportError:
        return plot_molecule(atoms, arrows)
    options = {}
    if VIEWER_SCRIPT.is_file():
        script = base64.b64encode(VIEWER_SCRIPT.read_bytes()).decode()
        options["js"] = f"data:text/javascript;base64,{script}"
    view = py3Dmol.view(width=size[0], height=size[1], **options)
    positions = seen_from_front(atoms)
    lines = [
        f"{symbol} {x:.4f} {y:.4f} {z:.4f}"
        for symbol, (x, y, z) in zip(atoms.symbols, positions, strict=True)
    ]
    view.addModel("\n".join([str(len(atoms)), "", *lines]), "xyz")
    view.setStyle({"stick": {"radius": 0.12}, "sphere": {"scale": 0.25}})
    if arrows is not None:
        ends = positions + np.asarray(arrows) @ front(atoms) * _arrow_scale(arrows)
        for start, end in zip(positions.tolist(), ends.tolist(), strict=True):
            spec = {"start": dict(zip("xyz", start, strict=True))}
            spec |= {"end": dict(zip("xyz", end, strict=True))}
            view.addArrow({**spec, "radius": 0.07, "color": LINK_COLOR})
    view.zoomTo()
    return Page(view.write_html(), f"Molecule {atoms.get_chemical_formula()}")


def view_trajectory(frames: Sequence[Atoms], size: tuple[int, int] = (600, 400)) -> Any:
    """A trajectory that plays, in nglview; it needs a running kernel. Raises `ImportError`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports are deprecated ones
        nglview = _import("nglview", "view_trajectory")
    view = nglview.show_asetraj(list(frames))
    view.clear_representations()
    view.add_representation("ball+stick")
    view.layout.width, view.layout.height = f"{size[0]}px", f"{size[1]}px"
    view.center()
    return view


# --- the README's picture -----------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw a molecule with the attention of one atom, and the matrix it is a row of."""
    parser = argparse.ArgumentParser(prog="python -m allscaip_lite.views", description=main.__doc__)
    parser.add_argument("molecule", help="a file that ASE reads; its first frame is drawn")
    parser.add_argument("picture", help="the file to write; its ending says the format")
    parser.add_argument("--model", default="lite", help="name or path (default: lite)")
    parser.add_argument("--query", type=int, default=0, help="the atom that asks (default: 0)")
    parser.add_argument("--block", type=int, default=-1, help="default: the last")
    parser.add_argument("--head", type=int, default=None, help="default: the mean over heads")
    args = parser.parse_args(arguments)

    import ase.io
    from matplotlib.figure import Figure

    from allscaip_lite.checkpoint import load_model

    atoms = ase.io.read(args.molecule, index=0)
    maps = attention_maps(load_model(args.model), atoms)
    weights = node_weights(maps, args.block, args.head)
    figure = Figure(figsize=(10.5, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    plot_molecule(atoms, links=(args.query, weights[args.query]), axes=left)
    plot_attention(maps, args.block, args.head, axes=right)
    Path(args.picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=120, bbox_inches="tight")
    return 0


if __name__ == "__main__":
    sys.exit(main())
