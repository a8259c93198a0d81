"""The attention explorer: who attends to whom, on the molecule and as a matrix, to be touched.

In: a model, or its `AttentionMaps`, and one `ase.Atoms` or the frames of a path. Out: a page with
its script and its data inside, which a notebook shows and which lives on in exported HTML, without
a kernel and without a network. What it looks like is in explorer.html, what it does in explorer.js,
and molecule_view.js draws the atoms.
"""

from __future__ import annotations

import base64
import io
import json
import uuid
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase import Atoms
from ase.data.colors import jmol_colors
from tqdm import tqdm

from allscaip_lite.model import AllScAIP
from allscaip_lite.notebook.attention_maps import KINDS, AttentionMaps, attention_maps
from allscaip_lite.notebook.plots import (
    Page,
    atom_labels,
    attention_matrix,
    ball_radii,
    bonds,
    cell_lines,
    check_same_atoms,
    front,
    image_bonds,
    plot_attention,
    plot_links,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("matrix", "row", "one")
COMFORTABLE = 5_000_000  # bytes; up to here a page keeps its weights in 16 bits, then in 8
LIMIT = 30_000_000  # bytes; notebooks and browsers grow slow beyond
FRAME_TIME = 450  # ms
IMAGE_BORDER = 1.5  # Å left around a cell, where periodic images are drawn


@dataclass(frozen=True)
class Explorer(Page):
    """What `explore_attention` returns: a notebook displays it; `save` writes it as a file.

    maps, atoms and the choice (kind, query, edge, block, head) are those of the opening picture.
    """

    head: ClassVar[str] = '<meta name="color-scheme" content="light dark">'

    maps: AttentionMaps
    atoms: Atoms
    choice: dict[str, Any]
    note: str

    @property
    def nbytes(self) -> int:
        """Bytes of the page."""
        return len(self.html.encode())

    def __repr__(self) -> str:
        return (
            f"<{self.title}, {self.nbytes / 1e6:.1f} MB, {self.note}: display it in a notebook, or "
            "save('page.html') for a browser, save('picture.png') for a picture>"
        )

    def _repr_png_(self) -> bytes | None:
        """The opening picture, for where no browser shows the page: a notebook as PDF, for one."""
        buffer = io.BytesIO()
        try:
            self.figure().savefig(buffer, dpi=80)
        except ImportError:  # without matplotlib there is the page alone
            return None
        return buffer.getvalue()

    def figure(self) -> Figure:
        """The opening picture in matplotlib: the molecule with its links, and the matrix."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        plot_links(self.maps, self.atoms, axes=left, **self.choice)
        choice = {name: value for name, value in self.choice.items() if name != "edge"}
        row = self.choice["query" if self.choice["kind"] == "node" else "edge"]
        plot_attention(self.maps, axes=right, row=row, **choice)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the page (.html), or the opening picture where the ending says so (.png, .pdf)."""
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            self.figure().savefig(path, dpi=150, bbox_inches="tight")
            return path
        return super().save(path)


def explore_attention(
    model: AllScAIP | AttentionMaps | Sequence[AttentionMaps],
    atoms: Atoms | Sequence[Atoms],
    *,
    kind: str | None = None,
    query: int = 0,
    edge: int = 0,
    block: int = -1,
    head: int | None = None,
    frame: int = 0,
    threshold: float = 0.05,
    scale: str = "matrix",
    kinds: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    matrix: bool = True,
    size: tuple[int, int] | None = None,
    limit: float = LIMIT,
) -> Explorer:
    """Attention on the molecule and as a matrix, to be turned, clicked and played.

    `atoms` is one structure or the frames of a path or trajectory: the same atoms in the same
    order. `model` may also be the maps made of them beforehand, one a frame.

    What is open at first: the `kind` of attention, "node" where the model has it, or "source" or
    "destination", the two layouts of the neighbourhood; the `query` atom; for neighbourhood
    attention its `edge`, a slot of `AttentionMaps`, 0 being the self-edge; `block`; `head`, None
    being the mean over heads; and `frame`. Links weaker than `threshold` times the strongest of the
    row are not drawn. The colours' `scale` ends at the largest weight of the shown "matrix" or
    "row", own shares apart, or at "one".

    `kinds` are the kinds that go into the page (default: all that the model has), `names` a word on
    each frame; `matrix` False leaves the matrix out; `size` is the molecule's, in pixels (default:
    as wide as the page, up to 1100 with the matrix).

    The weights are embedded with 16 bits each (to 1e-5) while that takes less than 5 MB, else
    with 8 bits (to 0.002), compressed; the page says which. One beyond `limit` bytes is refused
    with `ValueError`, which says what to leave out. Raises what `attention_maps` raises,
    `ValueError` for frames of different atoms, for maps of other structures and for a kind that
    the model does not have, `IndexError` for a query, edge, block, head or frame that is not there.
    """
    frames = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    if isinstance(model, AllScAIP):
        progress = tqdm(frames, desc="attention maps", disable=len(frames) < 10)
        each: Iterable[AttentionMaps] = (attention_maps(model, one) for one in progress)
        _check_frames(frames, None, names)
    else:
        each = [model] if isinstance(model, AttentionMaps) else list(model)
        _check_frames(frames, each, names)
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} is a part of the scale: give 0 to 1")
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {SCALES}")
    if not -len(frames) <= frame < len(frames):
        raise IndexError(f"frame {frame}: there are frames 0 to {len(frames) - 1}")
    frame %= len(frames)

    for index, maps in enumerate(each):
        if index == 0:
            kind = kind or ("source" if maps.node is None else "node")
            packed = _Packed.empty(maps, _kinds(maps, kinds, kind), len(frames))
        packed.add(maps)
        packed.check(limit, index + 1, len(frames))
        if index == frame:
            opening = maps
    kind = str(kind)
    choice: dict[str, Any] = {
        "kind": kind,
        "query": query,
        "edge": edge,
        "block": block,
        "head": head,
    }
    attention_matrix(opening, kind, query, block, head)  # raises for what is not there
    slots = int((opening.neighbor[query] >= 0).sum())
    if kind != "node" and not -slots <= edge < slots:
        raise IndexError(f"edge {edge}: atom {query} has edges 0 to {slots - 1} in this frame")

    first = frames[0]
    formula = first.get_chemical_formula()
    title = f"Attention explorer of {formula}"
    counts = f"{len(first)} atoms, " + (f"{len(frames)} frames, " if len(frames) > 1 else "")
    counts += f"{opening.num_blocks} blocks of {opening.num_heads} heads"
    precision, weights = packed.finish()
    data = {
        "scene": _scene(frames, packed.energies, names),
        "kinds": packed.kinds,
        "blocks": opening.num_blocks,
        "heads": opening.num_heads,
        "kind": kind,
        "query": query % len(first),
        "edge": edge % slots if kind != "node" else 0,
        "block": block % opening.num_blocks,
        "head": -1 if head is None else head % opening.num_heads,
        "frame": frame,
        "threshold": threshold,
        "scale": scale,
        "matrix": matrix,
        "interval": FRAME_TIME,
        "graphs": packed.graphs,
        **weights,
    }
    script = "".join(_resource(name) for name in ("molecule_view.js", "explorer.js"))
    width, aspect = ("1100", "5/4") if size is None else (str(size[0]), f"{size[0]}/{size[1]}")
    data["markup"] = _resource("explorer.html").replace("@ASPECT@", aspect)
    total = len(script) + len(json.dumps(data))
    note = f"{counts}, weights to ±{precision}"
    data["note"] = f"{formula}: {note}; {total / 1e6:.1f} MB."
    html = _SHELL
    for mark, value in {
        "SCRIPT": script,
        "DATA": json.dumps(data, separators=(",", ":")).replace("</", "<\\/"),
        "NAME": f"allscaip-{uuid.uuid4().hex[:12]}",
        "TITLE": title,
        "WIDTH": width,
    }.items():
        html = html.replace(f"@{mark}@", value)
    return Explorer(html, title, opening, frames[frame], choice, note)


# What is here without the script is all that a notebook shows of a page that it does not trust.
_SHELL = """<div class="allscaip-view" data-view="@NAME@" role="group" aria-label="@TITLE@"
 style="max-width: @WIDTH@px">
<p data-part="message">An attention explorer belongs here, and its script has not run. In
JupyterLab: run the cell, or trust the notebook (File, Trust Notebook).</p>
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


def _resource(name: str) -> str:
    return resources.files("allscaip_lite.notebook").joinpath(name).read_text("utf-8")


def _check_frames(
    frames: list[Atoms], maps: list[AttentionMaps] | None, names: Sequence[str] | None
) -> None:
    if not frames:
        raise ValueError("no frames: give one ase.Atoms or a non-empty list of them")
    for index, atoms in enumerate(frames):
        if not isinstance(atoms, Atoms):
            raise TypeError(f"frame {index} is a {type(atoms).__name__}, not an ase.Atoms")
        if atoms.numbers.tolist() != frames[0].numbers.tolist():
            raise ValueError(
                f"frame {index} ({atoms.get_chemical_formula()}) has other atoms than frame 0 "
                f"({frames[0].get_chemical_formula()}), or another order: explore them apart"
            )
    for what, given in (("maps", maps), ("names", names)):
        if given is not None and len(given) != len(frames):
            raise ValueError(f"{len(given)} {what} for {len(frames)} frames: give one a frame")
    for index, made in enumerate(maps or []):
        if not isinstance(made, AttentionMaps):
            raise TypeError(f"a model or AttentionMaps is needed, not a {type(made).__name__}")
        check_same_atoms(made, frames[index])


def _kinds(maps: AttentionMaps, kinds: Sequence[str] | None, kind: str) -> list[str]:
    """The kinds of attention that go into the page, in the order of `KINDS`."""
    wanted = list(kinds) if kinds is not None else list(KINDS)
    if kinds is None and maps.node is None and kind != "node":
        wanted.remove("node")
    for name in {*wanted, kind}:
        if name not in KINDS:
            raise ValueError(f"kind {name!r} is not one of {KINDS}")
    if maps.node is None and "node" in wanted:
        raise ValueError(
            "this model has no node attention to show (config.node_attention=False): "
            'ask for kind="source" or kind="destination"'
        )
    if kind not in wanted:
        raise ValueError(f"kind {kind!r} is to open, but not among kinds={wanted}")
    return [name for name in KINDS if name in wanted]


# --- what is drawn ------------------------------------------------------------------------------


def _scene(
    frames: list[Atoms], energies: list[float], names: Sequence[str] | None
) -> dict[str, Any]:
    """Positions, bonds and cells of all frames, seen from where the view begins, around (0, 0, 0).

    Frames of a molecule are put on top of each other at the mean of their positions.
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
        entry = {
            "positions": (placed[index] - middle).round(3).tolist(),
            "bonds": sorted(set(bonds(atoms)) - shared),
            "imageBonds": image_bonds(atoms),
            "lines": (corners[index] - middle).round(3).reshape(-1, 2, 3).tolist(),
            "energy": round(energies[index], 5),
            "name": str(names[index]) if names is not None else "",
            "cell": None,
        }
        if atoms.pbc.any():
            cell = atoms.cell.complete().array @ rotation
            entry["cell"] = cell.round(4).tolist()
            entry["inverse"] = np.linalg.inv(cell).round(6).tolist()
            entry["pbc"] = atoms.pbc.tolist()
        drawn.append(entry)
    reach = max(1.5, float(np.linalg.norm(points, axis=1).max() + radii.max()))
    nearer = 6 * reach / (6 * reach - points[:, 2:])  # molecule_view.js looks from 6 reaches away
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


# --- what is embedded ---------------------------------------------------------------------------


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


@dataclass
class _Packed:
    """Weights of all frames, kept as small integers so that many frames fit into memory.

    bits is 16 where all frames together stay comfortable, to judge by the first one, else 8.
    shrink is what compression leaves of the first frame, a kind.
    """

    kinds: list[str]
    frames: int
    bits: int
    weights: dict[str, list[np.ndarray]]
    graphs: list[dict[str, str]]
    energies: list[float]
    shrink: dict[str, float]

    @classmethod
    def empty(cls, maps: AttentionMaps, kinds: list[str], frames: int) -> _Packed:
        slots = (maps.neighbor >= 0).sum(1)
        cells = {kind: int((slots**2).sum()) for kind in KINDS}
        cells["node"] = len(slots) ** 2
        count = frames * maps.num_blocks * maps.num_heads * sum(cells[kind] for kind in kinds)
        bits = 16 if count * 2 * 4 / 3 < COMFORTABLE else 8
        return cls(kinds, frames, bits, {kind: [] for kind in kinds}, [], [], {})

    def add(self, maps: AttentionMaps) -> None:
        whole = 2**self.bits - 1
        dtype = "<u2" if self.bits == 16 else "u1"
        occupied = maps.neighbor >= 0
        in_use = occupied.unsqueeze(2) & occupied.unsqueeze(1)  # (N, K, K)
        for kind in self.kinds:
            weights = getattr(maps, kind)
            weights = weights.flatten() if kind == "node" else weights[:, :, in_use].flatten()
            packed = (weights.double().numpy() * whole).round().astype(dtype)
            self.weights[kind].append(packed)
            if kind not in self.shrink:
                raw = packed.tobytes()
                self.shrink[kind] = len(zlib.compress(raw)) / len(raw) if self.bits == 8 else 1.0
        self.energies.append(maps.energy)
        self.graphs.append(
            {
                "counts": _text(occupied.sum(1).numpy().astype("<u2")),
                "neighbor": _text(maps.neighbor[occupied].numpy().astype("<u2")),
                "image": _text(maps.image[occupied].numpy().astype("i1")),
                "envelope": _text((255 * maps.envelope[occupied].numpy()).round().astype("u1")),
            }
        )

    def check(self, limit: float, done: int, frames: int) -> None:
        """Raise `ValueError` where the page would pass `limit` bytes, as early as that is known."""
        sizes = {kind: self._size(kind) * frames / done for kind in self.kinds}
        if sum(sizes.values()) <= limit:
            return
        advice = ['fewer kinds, for example kinds=["node"]'] if len(self.kinds) > 1 else []
        advice = ["fewer frames, for example atoms[::2]"] * (frames > 1) + advice
        advice += ["a smaller structure", "a larger limit="]
        listed = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sizes.items())
        raise ValueError(
            f"the page would take about {sum(sizes.values()) / 1e6:.0f} MB ({listed}), more than "
            f"limit={limit / 1e6:.0f} MB: browsers grow slow. Give {', or '.join(advice)}"
        )

    def _size(self, kind: str) -> float:
        """Bytes of base64 so far, about."""
        return sum(part.nbytes for part in self.weights[kind]) * self.shrink[kind] * 4 / 3

    def finish(self) -> tuple[str, dict[str, Any]]:
        """Precision in words, and the weights as the script reads them."""
        arrays = {kind: np.concatenate(parts).tobytes() for kind, parts in self.weights.items()}
        if self.bits == 8:
            arrays = {kind: zlib.compress(raw, 9) for kind, raw in arrays.items()}
        texts = {kind: base64.b64encode(raw).decode() for kind, raw in arrays.items()}
        if "node" in texts:
            texts["weights"] = texts.pop("node")
        precision = "0.00001" if self.bits == 16 else "0.002"
        return precision, {"bits": self.bits, "deflated": self.bits == 8, **texts}
