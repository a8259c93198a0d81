"""The attention explorer: an interactive view of the attention weights of a structure.

Input: a model, or its `AttentionMaps`, and one `ase.Atoms` or the frames of a path. Output: a page
with its script and its data. A notebook displays it, and it also works in exported HTML, without a
kernel and without a network. explorer.html is the layout of the page, explorer.js its behaviour,
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
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from ase import Atoms
from ase.data.colors import jmol_colors
from tqdm import tqdm

from allscaip_lite.errors import check_kind
from allscaip_lite.files import atomic_write
from allscaip_lite.model import AllScAIP
from allscaip_lite.notebook.attention_maps import KINDS, AttentionMaps, attention_maps
from allscaip_lite.notebook.plots import (
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
from allscaip_lite.notebook.viewer import Page, check_frames

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCALES = ("matrix", "row", "one")
SIXTEEN_BIT_LIMIT = 5_000_000  # bytes; a page with more weights than this stores them in 8 bits
LIMIT = 30_000_000  # bytes; larger pages make notebooks and browsers slow
FRAME_TIME = 450  # ms
IMAGE_BORDER = 1.5  # Å around a cell, for the periodic images


@dataclass(frozen=True)
class Explorer(Page):
    """The result of `explore_attention`: a notebook displays it; `save` writes it as a file.

    `maps`, `atoms` and `choice` (kind, query, edge, block, head) belong to the first picture.
    """

    head: ClassVar[str] = '<meta name="color-scheme" content="light dark">'

    maps: AttentionMaps
    atoms: Atoms
    choice: dict[str, Any]
    note: str

    @property
    def nbytes(self) -> int:
        """Size of the page in bytes."""
        return len(self.html.encode())

    def __repr__(self) -> str:
        return (
            f"<{self.title}, {self.nbytes / 1e6:.1f} MB, {self.note}: display it in a notebook, or "
            "save('page.html') for a browser, save('picture.png') for a picture>"
        )

    def _repr_png_(self) -> bytes | None:
        """The first picture, for output without a browser, for example a notebook as PDF."""
        buffer = io.BytesIO()
        try:
            self.figure().savefig(buffer, dpi=80, bbox_inches="tight")
        except ImportError:  # without matplotlib there is no picture, only the page
            return None
        return buffer.getvalue()

    def figure(self) -> Figure:
        """The first picture as a matplotlib figure: the molecule with links, and the matrix."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        plot_links(self.maps, self.atoms, axes=left, **self.choice)
        choice = {name: value for name, value in self.choice.items() if name != "edge"}
        row = self.choice["query" if self.choice["kind"] == "node" else "edge"]
        plot_attention(self.maps, axes=right, row=row, **choice)
        return figure

    def save(self, path: str | Path) -> Path:
        """Write the page (.html), or for another suffix (.png, .pdf) the first picture."""
        path = Path(path)
        if path.suffix.lower() not in (".html", ".htm"):
            with atomic_write(path) as unfinished:
                self.figure().savefig(unfinished, dpi=150, bbox_inches="tight")
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
    """An interactive view of attention, on the molecule and as a matrix.

    The weights are stored with 16 bits each (error 1e-5) if that takes less than 5 MB, otherwise
    with 8 bits (error 0.002), compressed; the page says which.

    Args:
        model: A model, or the maps of the structures, one for each frame.
        atoms: One structure, or the frames of a path or trajectory, with the same atoms in the
            same order.
        kind: The kind of attention at the start: "node", "source" or "destination" (the two
            layouts of the neighbourhood). Default: "node" if the model has it, else "source".
        query: The query atom at the start.
        edge: For neighbourhood attention the query edge at the start, a slot of `AttentionMaps`;
            0 is the self-edge.
        block: The block at the start.
        head: The head at the start; None is the mean over heads.
        frame: The frame at the start.
        threshold: Links weaker than this fraction of the strongest link of the row are not drawn.
        scale: The upper end of the colour scale: the largest weight of the "matrix" or of the
            "row", without the weights of queries on themselves, or "one".
        kinds: The kinds that the page contains (default: all that the model has).
        names: A label for each frame.
        matrix: False omits the matrix.
        size: Width and height of the molecule in pixels (default: the width of the page, at most
            1100 with the matrix).
        limit: The largest allowed size of the page, bytes.

    Returns:
        The page.

    Raises:
        ValueError: The page would be larger than `limit` (the message says what to omit), the
            frames have different atoms, the maps belong to other structures, or the model does
            not have this kind of attention.
        IndexError: There is no such query, edge, block, head or frame.
        StructureError: The model does not support a structure.
    """
    frames = [atoms] if isinstance(atoms, Atoms) else list(atoms)
    if isinstance(model, AllScAIP):
        progress = tqdm(frames, desc="attention maps", disable=len(frames) < 10)
        each: Iterable[AttentionMaps] = (attention_maps(model, one) for one in progress)
        check_frames(frames)
    else:
        each = [model] if isinstance(model, AttentionMaps | str) else list(model)
        check_frames(frames)
        _check_maps(each, frames)
    if names is not None and len(names) != len(frames):
        raise ValueError(f"{len(names)} names for {len(frames)} frames: give one for each frame")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} must be a fraction, 0 to 1")
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {SCALES}")
    if not -len(frames) <= frame < len(frames):
        raise IndexError(f"frame {frame}: there are frames 0 to {len(frames) - 1}")
    frame %= len(frames)

    for index, maps in enumerate(each):
        if index == 0:
            kind = kind or ("source" if maps.node is None else "node")
            packed = _Packed(maps, _kinds(maps, kinds, kind), len(frames))
        packed.add(maps)
        packed.check(limit, index + 1, len(frames))
        if index == frame:
            selected = maps
    kind, first = str(kind), frames[0]
    attention_matrix(selected, kind, query, block, head)  # raises IndexError
    slots = int((selected.neighbor[query] >= 0).sum())
    if kind != "node" and not -slots <= edge < slots:
        raise IndexError(f"edge {edge}: atom {query} has edges 0 to {slots - 1} in this frame")

    choice = {
        "kind": kind,
        "query": query % len(first),
        "edge": edge % slots if kind != "node" else 0,
        "block": block % selected.num_blocks,
        "head": None if head is None else head % selected.num_heads,
    }
    formula = first.get_chemical_formula()
    title = f"Attention explorer of {formula}"
    counts = f"{len(first)} atoms, " + (f"{len(frames)} frames, " if len(frames) > 1 else "")
    counts += f"{selected.num_blocks} blocks of {selected.num_heads} heads"
    precision, weights = packed.finish()
    scene = _scene(frames, packed.energies, names)
    if first.pbc.any():
        _make_room_for_images(scene, frame, selected)
    data = {
        "scene": scene,
        "kinds": packed.kinds,
        "blocks": selected.num_blocks,
        "heads": selected.num_heads,
        **choice,
        "head": -1 if head is None else choice["head"],
        "frame": frame,
        "threshold": threshold,
        "scale": scale,
        "matrix": matrix,
        "interval": FRAME_TIME,
        "graphs": packed.graphs,
        **weights,
    }
    script = _resource("explorer.js")
    width, aspect = ("1100", "5/4") if size is None else (str(size[0]), f"{size[0]}/{size[1]}")
    data["markup"] = _resource("explorer.html").replace("@ASPECT@", aspect)
    total = len(_resource("molecule_view.js")) + len(script) + len(json.dumps(data))
    note = f"{counts}, weights to ±{precision}"
    data["note"] = f"{formula}: {note}; {total / 1e6:.1f} MB."
    html = _page(title, width, script, data)
    return Explorer(html, title, selected, frames[frame], choice, note)


def _check_maps(maps: Sequence[AttentionMaps], frames: Sequence[Atoms]) -> None:
    for one in maps:
        check_kind(one, AttentionMaps, "a model, such as load_model('lite'), or AttentionMaps")
    if len(maps) != len(frames):
        raise ValueError(f"{len(maps)} maps for {len(frames)} frames: give one for each frame")
    for one, atoms in zip(maps, frames, strict=True):
        check_same_atoms(one, atoms)


def _kinds(maps: AttentionMaps, kinds: Sequence[str] | None, kind: str) -> list[str]:
    """The kinds of attention that the page contains, in the order of `KINDS`."""
    wanted = list(kinds) if kinds is not None else list(KINDS)
    if kinds is None and maps.node is None and kind != "node":
        wanted.remove("node")
    for name in {*wanted, kind}:
        if name not in KINDS:
            raise ValueError(f"kind {name!r} is not one of {KINDS}")
    if maps.node is None and "node" in wanted:
        raise ValueError(
            "this model has no node attention to show (config.node_attention=False): "
            'use kind="source" or kind="destination"'
        )
    if kind not in wanted:
        raise ValueError(f"kind {kind!r} is selected, but not among kinds={wanted}")
    return [name for name in KINDS if name in wanted]


def _scene(
    frames: Sequence[Atoms], energies: Sequence[float], names: Sequence[str] | None
) -> dict[str, Any]:
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
        entry = {
            "positions": (placed[index] - middle).round(3).tolist(),
            "bonds": sorted(set(bonds(atoms)) - shared),
            "imageBonds": image_bonds(atoms),
            "lines": (corners[index] - middle).round(3).reshape(-1, 2, 3).tolist(),
            "energy": round(energies[index], 5),
            "name": "" if names is None else str(names[index]),
            "cell": None,
        }
        if atoms.pbc.any():
            cell = atoms.cell.complete().array @ rotation
            entry["cell"] = cell.round(4).tolist()
            entry["inverse"] = np.linalg.inv(cell).round(6).tolist()
            entry["pbc"] = atoms.pbc.tolist()
        drawn.append(entry)
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


def _page(title: str, width: str, script: str, data: dict[str, Any]) -> str:
    """HTML that calls `attentionView` of a script with data, in the frame of view.html.

    A notebook that is not trusted shows only the frame's message, because it does not run scripts.

    Args:
        title: What a screen reader says.
        width: The largest width in pixels.
        script: The script that defines `attentionView(element, data)`; molecule_view.js is added.
        data: What goes into the page as JSON.
    """
    html = _resource("view.html").strip()
    for mark, value in {
        "SCRIPT": _resource("molecule_view.js") + script,
        "DATA": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "NAME": f"allscaip-{uuid.uuid4().hex[:12]}",
        "TITLE": escape(title, quote=True),
        "WIDTH": width,
    }.items():
        html = html.replace(f"@{mark}@", value)
    return html


def _resource(name: str) -> str:
    """A text file of this package."""
    return resources.files("allscaip_lite.notebook").joinpath(name).read_text("utf-8")


def _make_room_for_images(scene: dict[str, Any], frame: int, maps: AttentionMaps) -> None:
    """Enlarge a scene, so that all periodic images to which a frame attends are in it."""
    entry, size, used = scene["frames"][frame], scene["size"], maps.neighbor >= 0
    atoms, images = maps.neighbor[used].numpy(), maps.image[used].numpy()
    points = np.array(entry["positions"])[atoms] + images @ np.array(entry["cell"])  # Å
    eye = 6 * size["reach"]  # of molecule_view.js, which draws near atoms larger
    across = np.abs(points[:, :2]) * eye / np.maximum(eye / 6, eye - points[:, 2:])
    for name, longest in zip(("width", "height"), across.max(0), strict=True):
        size[name] = max(size[name], round(float(longest) + max(scene["radii"]), 3))


# --- weights as integers ------------------------------------------------------------------------


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


class _Packed:
    """Weights of all frames, stored as small integers to save memory.

    bits: 16 if all frames together are smaller than `SIXTEEN_BIT_LIMIT`, estimated from the first
    frame, else 8. compression: for each kind, compressed / uncompressed size of the first frame.
    """

    def __init__(self, maps: AttentionMaps, kinds: list[str], frames: int) -> None:
        slots = (maps.neighbor >= 0).sum(1)
        cells = {kind: int((slots**2).sum()) for kind in KINDS}
        cells["node"] = len(slots) ** 2
        count = frames * maps.num_blocks * maps.num_heads * sum(cells[kind] for kind in kinds)
        self.kinds = kinds
        self.bits = 16 if count * 2 * 4 / 3 < SIXTEEN_BIT_LIMIT else 8
        self.weights: dict[str, list[np.ndarray]] = {kind: [] for kind in kinds}
        self.graphs: list[dict[str, str]] = []
        self.energies: list[float] = []
        self.compression: dict[str, float] = {}

    def add(self, maps: AttentionMaps) -> None:
        largest = 2**self.bits - 1
        dtype = "<u2" if self.bits == 16 else "u1"
        occupied = maps.neighbor >= 0
        in_use = occupied.unsqueeze(2) & occupied.unsqueeze(1)  # (N, K, K)
        for kind in self.kinds:
            weights = getattr(maps, kind)
            weights = weights.flatten() if kind == "node" else weights[:, :, in_use].flatten()
            packed = (weights.double().numpy() * largest).round().astype(dtype)
            self.weights[kind].append(packed)
            if kind not in self.compression:
                raw = packed.tobytes()
                self.compression[kind] = (
                    len(zlib.compress(raw)) / len(raw) if self.bits == 8 else 1.0
                )
        self.energies.append(maps.energy)
        self.graphs.append(
            {
                "counts": _base64(occupied.sum(1).numpy().astype("<u2")),
                "neighbor": _base64(maps.neighbor[occupied].numpy().astype("<u2")),
                "image": _base64(maps.image[occupied].numpy().astype("i1")),
                "envelope": _base64((255 * maps.envelope[occupied].numpy()).round().astype("u1")),
            }
        )

    def check(self, limit: float, done: int, frames: int) -> None:
        """Raise `ValueError` as early as possible if the page will be larger than `limit` bytes."""
        sizes = {kind: self._size(kind) * frames / done for kind in self.kinds}
        if sum(sizes.values()) <= limit:
            return
        advice = ['fewer kinds, for example kinds=["node"]'] if len(self.kinds) > 1 else []
        advice = ["fewer frames, for example atoms[::2]"] * (frames > 1) + advice
        advice += ["a smaller structure", "a larger limit="]
        listed = ", ".join(f"{kind} {size / 1e6:.0f} MB" for kind, size in sizes.items())
        raise ValueError(
            f"the page would take about {sum(sizes.values()) / 1e6:.0f} MB ({listed}), more than "
            f"limit={limit / 1e6:.0f} MB, which makes browsers slow. Use {', or '.join(advice)}"
        )

    def _size(self, kind: str) -> float:
        """Approximate size in base64 so far, bytes."""
        return sum(part.nbytes for part in self.weights[kind]) * self.compression[kind] * 4 / 3

    def finish(self) -> tuple[str, dict[str, Any]]:
        """The precision as text, and the weights in the format of the script."""
        arrays = {kind: np.concatenate(parts).tobytes() for kind, parts in self.weights.items()}
        if self.bits == 8:
            arrays = {kind: zlib.compress(raw, 9) for kind, raw in arrays.items()}
        texts = {kind: base64.b64encode(raw).decode() for kind, raw in arrays.items()}
        if "node" in texts:
            texts["weights"] = texts.pop("node")
        precision = "0.00001" if self.bits == 16 else "0.002"
        return precision, {"bits": self.bits, "deflated": self.bits == 8, **texts}
