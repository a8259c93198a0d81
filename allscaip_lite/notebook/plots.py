"""The style of the course's figures, and figures of molecules and of attention weights.

Input: `ase.Atoms`, and attention weights from `attention_maps`. Output: matplotlib axes, which need
the `notebooks` extra. `viewer` and `explorer` make interactive views. A lesson begins with
`plt.rcParams.update(STYLE)`, takes colours from `PALETTE` or whole lines from `LINES`, and ends
each figure with `show("what a reader who cannot see it has to know")` in place of `plt.show()`.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols, covalent_radii
from ase.data.colors import jmol_colors
from ase.neighborlist import neighbor_list
from torch import Tensor

from allscaip_lite.notebook.attention_maps import KINDS, AttentionMaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, Color Universal Design (2008): distinct for colour-blind readers too. In this order
# neighbours also differ in lightness. Their yellow is left out, for it is too pale on white.
PALETTE = {
    "blue": "#0072b2",
    "orange": "#e69f00",
    "vermilion": "#d55e00",
    "sky": "#56b4e9",
    "green": "#009e73",
    "black": "#000000",
    "purple": "#cc79a7",
}
_DASHES = ["-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2)), "-", (0, (2, 2))]
_MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
# Keywords of `plot` for the n-th line of a figure: a colour, a dash and a marker of its own. A line
# of many points takes `markevery=0.1` too, or `marker=""`.
LINES: tuple[dict[str, Any], ...] = tuple(
    {"color": color, "linestyle": dash, "marker": marker}
    for color, dash, marker in zip(PALETTE.values(), _DASHES, _MARKERS, strict=True)
)
SEQUENTIAL = "magma_r"  # a colour map for 0 and more; also in grey a larger value is darker
DIVERGING = "PuOr"  # a colour map for both signs: purple positive, orange negative
# Settings of matplotlib for the figures of the course. They have their own white background, so
# that they can be read on a page of any colour. Lines get the colours and dashes of `LINES`.
STYLE: dict[str, Any] = {
    "axes.prop_cycle": f"cycler(color={[*PALETTE.values()]!r}, linestyle={_DASHES!r})",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "image.cmap": SEQUENTIAL,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "lines.markersize": 5,
}
LINK_COLOR = PALETTE["vermilion"]
MARK_COLOR = PALETTE["blue"]
TILT = np.deg2rad((-24.0, 16.0))  # view of a cell: about the vertical axis, then from above


def import_extra(module: str, purpose: str) -> Any:
    """A module of the `notebooks` extra, or an ImportError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".", maxsplit=1)[0]
        raise ImportError(
            f"{purpose} needs {package}: pip install 'allscaip-lite[notebooks]'", name=error.name
        ) from error


def show(alt: str) -> None:
    """Show the current figure in a notebook, with a text for readers who cannot see it.

    The text says what the figure says: its kind, its axes, what is to be seen. The figure is twice
    as sharp as the screen needs, on white, and closed afterwards. Logarithmic axes of less than
    three decades get numbers such as 20 and 50 in place of 2 × 10¹ and none.

    Raises ValueError where the text is empty, or nothing was drawn.
    """
    pyplot = import_extra("matplotlib.pyplot", "show")
    display = import_extra("IPython.display", "show").display
    alt = " ".join(alt.split())
    if not alt:
        raise ValueError("a figure needs a text for readers who cannot see it: show('…')")
    if not pyplot.get_fignums():
        raise ValueError("there is no figure to show: draw one first")
    figure, buffer = pyplot.gcf(), io.BytesIO()
    plain_numbers(figure)
    figure.savefig(buffer, format="png", dpi=200, facecolor="white", bbox_inches="tight")
    pyplot.close(figure)
    data = buffer.getvalue()
    width = int.from_bytes(data[16:20]) // 2  # of the picture, in a PNG's first block
    style = f"width: {width}px; max-width: 100%; background: white; border-radius: 4px"
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    picture = f'<img alt="{html.escape(alt)}" src="{source}" style="{style}">'
    display({"text/html": picture, "text/plain": alt}, raw=True)


def plain_numbers(figure: Figure) -> None:
    """Ticks of logarithmic axes at 1, 2, 5, 10, …, more within a decade, none from three decades
    on; ticks that were set are the only ones.
    """
    ticker = import_extra("matplotlib.ticker", "plain_numbers")
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = axis.get_view_interval()
        if axis.get_scale() != "log":
            continue
        if isinstance(axis.get_major_locator(), ticker.FixedLocator):
            axis.set_minor_locator(ticker.NullLocator())
        elif low >= 1e-3 and high <= 1e5 and high < 1e3 * low:
            subs = (1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)
            axis.set_major_locator(ticker.LogLocator(subs=subs))
            axis.set_major_formatter(lambda value, _: f"{value:,g}")
            axis.set_minor_locator(ticker.NullLocator())


# --- geometry and weights -----------------------------------------------------------------------


def atom_labels(numbers: Atoms | Tensor | Sequence[int]) -> list[str]:
    """Element and index of each atom, such as C0, C1, H2."""
    numbers = numbers.numbers if isinstance(numbers, Atoms) else numbers
    return [f"{chemical_symbols[int(z)]}{index}" for index, z in enumerate(numbers)]


def bonds(atoms: Atoms) -> list[tuple[int, int]]:
    """Pairs i < j nearer than 1.2 times the sum of their covalent radii, without images."""
    radii = covalent_radii[atoms.numbers]
    distances = np.linalg.norm(atoms.positions[:, None] - atoms.positions, axis=-1)
    first, second = np.nonzero(np.triu(distances < 1.2 * (radii[:, None] + radii), 1))
    return list(zip(first.tolist(), second.tolist(), strict=True))


def image_bonds(atoms: Atoms) -> list[tuple[int, int, int, int, int]]:
    """Bonds (i, j, a, b, c) that leave the cell: from atom i to the image (a, b, c) of atom j.

    The image is in lattice vectors. The criterion is that of `bonds`. Each bond is listed twice,
    once from each end.
    """
    if not atoms.pbc.any():
        return []
    first, second, shift = neighbor_list("ijS", atoms, 1.2 * covalent_radii[atoms.numbers])
    outside = shift.any(1)
    found = np.column_stack([first, second, shift])[outside]
    return sorted(map(tuple, found.tolist()))


def front(atoms: Atoms) -> np.ndarray:
    """(3, 3) rotation R for a good view: in `vectors @ R` the z axis points at the viewer.

    The two longest directions of a molecule are along x and y. A periodic structure has its own z
    axis upwards, is rotated a little, and is seen from above.
    """
    if atoms.pbc.any():
        (c, d), (s, t) = np.cos(TILT), np.sin(TILT)
        upright = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]])
        about_vertical = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
        from_above = np.array([[1, 0, 0], [0, d, t], [0, -t, d]])
        return upright @ about_vertical @ from_above
    axes = np.linalg.svd(atoms.positions - atoms.positions.mean(0), full_matrices=True)[2]
    axes[2] *= np.linalg.det(axes)  # a rotation, never a mirror image
    return axes.T


def cell_lines(atoms: Atoms) -> np.ndarray:
    """(n, 2, 3) ends of the cell's edges along its periodic directions, Å; n = 12, 4, 1 or 0."""
    axes = np.flatnonzero(atoms.pbc)
    lines = []
    for axis in axes:
        others = atoms.cell.array[[k for k in axes if k != axis]]
        for corner in itertools.product((0.0, 1.0), repeat=len(others)):
            start = np.array(corner) @ others
            lines.append([start, start + atoms.cell.array[axis]])
    return np.reshape(lines, (-1, 2, 3))


def seen_from_front(atoms: Atoms) -> np.ndarray:
    """(N, 3) positions in Å, centred and turned by `front`."""
    return (atoms.positions - atoms.positions.mean(0)) @ front(atoms)


def ball_radii(atoms: Atoms) -> np.ndarray:
    """(N,) radii of the drawn atoms in Å."""
    return 0.16 + 0.3 * covalent_radii[atoms.numbers]


def attention_matrix(
    maps: AttentionMaps, kind: str, query: int, block: int, head: int | None
) -> np.ndarray:
    """Weights as a matrix; rows are queries, columns are keys, and each row sums to one.

    Args:
        maps: All weights of a structure.
        kind: "node", "source" or "destination".
        query: An atom; not used for "node".
        block: A block; negative numbers count from the last.
        head: A head, or None for the mean over heads.

    Returns:
        For "node" (N, N) over atoms. Otherwise (c, c) over the c edges of atom `query`, in the
        order of its slots; `edge_labels` gives their names.

    Raises:
        ValueError: Another kind, or one that the model does not have.
        IndexError: There is no such atom, block or head.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is not one of {KINDS}")
    if kind == "node" and maps.node is None:
        raise ValueError("this model has no node attention to show (config.node_attention=False)")
    atoms = len(maps.atomic_numbers)
    if not -atoms <= query < atoms:
        raise IndexError(f"query {query}: the structure has atoms 0 to {atoms - 1}")
    for name, index, count in (("block", block, maps.num_blocks), ("head", head, maps.num_heads)):
        if index is not None and not -count <= index < count:
            raise IndexError(f"{name} {index}: this model has {name}s 0 to {count - 1}")
    weights = getattr(maps, kind)[block]  # (h, N, N) or (h, N, K, K)
    if kind != "node":
        count = int((maps.neighbor[query] >= 0).sum())
        weights = weights[:, query, :count, :count]  # (h, c, c)
    return (weights.mean(0) if head is None else weights[head]).double().numpy()


def edge_labels(maps: AttentionMaps, query: int, kind: str = "source") -> list[str]:
    """Names of the rows and columns of atom `query`, such as self, C0→H4, C0→O2 (+1, 0, 0).

    The periodic image of the neighbour is in brackets. With `kind` "destination" the edges are
    those that arrive at the atom.
    """
    labels = atom_labels(maps.atomic_numbers)
    names = []
    for j, image in zip(maps.neighbor[query].tolist(), maps.image[query].tolist(), strict=True):
        if j < 0:
            break  # empty slots are last
        shift = ", ".join(f"{x:+d}" if x else "0" for x in image)
        end = labels[j] + (f" ({shift})" if any(image) else "")
        ends = [labels[query], end]
        names.append("→".join(reversed(ends) if kind == "destination" else ends))
    return ["self", *names[1:]]


# --- figures ------------------------------------------------------------------------------------


def plot_attention(
    maps: AttentionMaps,
    block: int = -1,
    head: int | None = None,
    axes: Axes | None = None,
    *,
    kind: str = "node",
    query: int = 0,
    row: int | None = None,
) -> Axes:
    """Attention as a matrix: rows are queries, columns are keys.

    Args:
        maps: All weights of a structure.
        block: A block.
        head: A head, or None for the mean over heads.
        axes: Where to draw; None makes a new figure.
        kind: "node" for attention among all atoms, "source" or "destination" for neighbourhood
            attention among the edges of atom `query`.
        query: An atom; not used for "node".
        row: A row to mark with a frame.

    Raises:
        ValueError, IndexError: As `attention_matrix`.
    """
    weights = attention_matrix(maps, kind, query, block, head)
    n = len(weights)
    if axes is None:
        pyplot = import_extra("matplotlib.pyplot", "plot_attention")
        side = min(9.0, 2.5 + 0.17 * n)
        axes = pyplot.subplots(figsize=(side + 0.8, side), layout="constrained")[1]
    image = axes.imshow(weights, cmap=SEQUENTIAL, vmin=0)
    axes.figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    every = -(-n // 40)  # at most 40 labels
    atoms = atom_labels(maps.atomic_numbers)
    labels = atoms if kind == "node" else edge_labels(maps, query, kind)
    font = 9 if n <= 16 else 7
    axes.set_xticks(range(0, n, every), labels[::every], rotation=90, fontsize=font)
    axes.set_yticks(range(0, n, every), labels[::every], fontsize=font)
    where = f" {'leaving' if kind == 'source' else 'arriving at'} {atoms[query]}"
    what = "atom" if kind == "node" else "edge"
    axes.set_xlabel(f"key ({what})")
    axes.set_ylabel(f"query ({what})")
    if row is not None:
        style: dict[str, Any] = {"fill": False, "edgecolor": MARK_COLOR, "linewidth": 1.5}
        patches = import_extra("matplotlib.patches", "plot_attention")
        axes.add_patch(patches.Rectangle((-0.5, row % n - 0.5), n, 1, **style))
    heads = "mean over heads" if head is None else f"head {head % maps.num_heads}"
    edges = "" if kind == "node" else f", edges{where}"
    axes.set_title(f"block {block % maps.num_blocks}, {heads}{edges}", fontsize=10)
    return axes


def plot_links(
    maps: AttentionMaps,
    atoms: Atoms,
    query: int = 0,
    *,
    kind: str = "node",
    edge: int = 0,
    block: int = -1,
    head: int | None = None,
    axes: Axes | None = None,
) -> Axes:
    """The molecule with one row of attention weights drawn as links.

    Node attention: links go from the `query` atom to the other atoms. Neighbourhood attention: the
    query is one edge of that atom, marked by a dashed line, and links go along the other edges;
    periodic images are pale.

    Args:
        maps: All weights of the structure.
        atoms: The structure.
        query: An atom.
        kind: "node", "source" or "destination".
        edge: For neighbourhood attention the slot of the query edge; 0 is the self-edge.
        block: A block.
        head: A head, or None for the mean over heads.
        axes: Where to draw; None makes a new figure.

    Raises:
        ValueError: The maps belong to another structure, or as `attention_matrix`.
        IndexError: There is no such edge, or as `attention_matrix`.
    """
    check_same_atoms(maps, atoms)
    weights = attention_matrix(maps, kind, query, block, head)
    query %= len(atoms)
    if kind == "node":
        return plot_molecule(atoms, links=(query, weights[query]), axes=axes)
    if not -len(weights) <= edge < len(weights):
        raise IndexError(f"edge {edge}: atom {query} has edges 0 to {len(weights) - 1}")
    neighbor, image = maps.neighbor[query].tolist(), maps.image[query].tolist()
    images: list[tuple[int, tuple[int, ...]]] = []
    ends = []
    for j, shift in zip(neighbor[: len(weights)], image, strict=False):
        ends.append(len(atoms) + len(images) if any(shift) else j)
        if any(shift):
            images.append((j, tuple(shift)))
    drawn = np.zeros(len(atoms) + len(images))
    drawn[ends] = weights[edge]
    axes = plot_molecule(atoms, links=(query, drawn), axes=axes, images=images)
    if edge % len(weights):
        points = _with_images(atoms, images)[[query, ends[edge]], :2]
        axes.plot(*points.T, color=MARK_COLOR, linewidth=2.5, linestyle=(0, (3, 1.5)), zorder=1e6)
    return axes


def check_same_atoms(maps: AttentionMaps, atoms: Atoms) -> None:
    """Raise `ValueError` if the maps were made for other atoms."""
    if maps.atomic_numbers.tolist() != atoms.numbers.tolist():
        raise ValueError(
            f"these maps belong to another structure than {atoms.get_chemical_formula()}: "
            "compute them with attention_maps(model, atoms)"
        )


def _with_images(atoms: Atoms, images: Sequence[tuple[int, Sequence[int]]]) -> np.ndarray:
    """(N + n, 3) positions in Å of the atoms and of n images, in the frame of `seen_from_front`."""
    which = [j for j, _ in images]
    shift = np.array([shift for _, shift in images], dtype=float).reshape(-1, 3)
    moved = atoms.positions[which] + shift @ atoms.cell.array
    points = np.concatenate([atoms.positions, moved])
    return (points - atoms.positions.mean(0)) @ front(atoms)


def plot_molecule(
    atoms: Atoms,
    arrows: np.ndarray | None = None,
    links: tuple[int, np.ndarray] | None = None,
    axes: Axes | None = None,
    images: Sequence[tuple[int, Sequence[int]]] = (),
) -> Axes:
    """The molecule from its widest side, as a matplotlib figure.

    Args:
        atoms: The structure.
        arrows: (N, 3) vectors drawn from the edges of the atoms, for example forces; the longest
            arrow is 1.5 Å long.
        links: A query atom and its (N,) weights, drawn as curves from it.
        axes: Where to draw; None makes a new figure.
        images: n periodic images, each an atom and (3,) lattice vectors; they are pale. `links`
            then has N + n weights.
    """
    patches = import_extra("matplotlib.patches", "plot_molecule")
    if axes is None:
        pyplot = import_extra("matplotlib.pyplot", "plot_molecule")
        axes = pyplot.subplots(figsize=(6, 4), layout="constrained")[1]
    n = len(atoms)
    kinds = np.array([*range(n), *(j for j, _ in images)])
    positions, radii = _with_images(atoms, images), ball_radii(atoms)[kinds]
    labels = atom_labels(atoms)
    flat = positions[:, :2]
    layer = 3 * positions[:, 2].argsort().argsort()  # nearer atoms are drawn on top
    above = 3 * len(positions) + 3  # of links and arrows; marks (1e6) and labels are above them
    for i, j in bonds(atoms):
        zorder = min(layer[i], layer[j]) + 1
        axes.plot(*flat[[i, j]].T, "-", color="0.6", linewidth=4, zorder=zorder)
    corners = (cell_lines(atoms) - atoms.positions.mean(0)) @ front(atoms)  # (n, 2, 3)
    for line in corners[:, :, :2]:
        axes.plot(*line.T, "-", color="0.7", linewidth=0.8, zorder=0)
    for i, kind in enumerate(kinds):
        color = jmol_colors[atoms.numbers[kind]]
        fill = color if i < n else 0.35 * color + 0.65
        style = {"facecolor": fill, "edgecolor": "0.3" if i < n else "0.7", "zorder": layer[i] + 2}
        axes.add_patch(patches.Circle(flat[i], radii[i], **style))
        nearer = layer > layer[i]
        reach = radii[nearer] + 0.6 * radii[i]  # a label fills more than half of its atom
        if (np.linalg.norm(flat[nearer] - flat[i], axis=1) < reach).any():
            continue  # its label would be on the atom in front of it
        text_color = "0.1" if fill @ [0.3, 0.6, 0.1] > 0.5 else "white"
        font: dict[str, Any] = {"fontsize": 6.5, "ha": "center", "va": "center"}
        axes.text(
            flat[i, 0],
            flat[i, 1],
            labels[kind] + ("" if i < n else "′"),
            color=text_color,
            **font,
            zorder=2e6,
        )
    if links is not None:
        query, weights = links[0], np.asarray(links[1])
        largest = np.delete(weights, query).max(initial=1e-9)  # without the query's own weight
        strength = (weights / largest).clip(max=1)
        for j in np.flatnonzero(strength > 0.02).tolist():
            if j == query:
                style = {"edgecolor": LINK_COLOR, "linewidth": 1 + 3 * strength[j]}
                shape = patches.Circle(flat[j], radii[j] + 0.08, fill=False, zorder=above, **style)
            else:  # thin at the query, wide at the other end; curved, to be apart from the bonds
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
        longest = np.linalg.norm(arrows, axis=1).max(initial=1e-9)
        flat_arrows = 1.5 / longest * (np.asarray(arrows) @ front(atoms))[:, :2]
        length = np.linalg.norm(flat_arrows, axis=1, keepdims=True)
        starts = flat[:n] + radii[:n, None] * flat_arrows / np.where(length > 0, length, 1)
        style = {"color": LINK_COLOR, "width": 0.006, "zorder": above}
        axes.quiver(*starts.T, *flat_arrows.T, angles="xy", scale_units="xy", scale=1, **style)
    shown, margin = np.concatenate([flat, corners.reshape(-1, 3)[:, :2]]), 0.9
    axes.set_xlim(shown[:, 0].min() - margin, shown[:, 0].max() + margin)
    axes.set_ylim(shown[:, 1].min() - margin, shown[:, 1].max() + margin)
    axes.set_aspect("equal")
    axes.axis("off")
    return axes


def plot_harmonics(harmonics: Callable[[np.ndarray], np.ndarray], degree: int) -> Figure:
    """Real spherical harmonics as colours on spheres: a row for each l, in it m = -l … l.

    `harmonics` makes of unit vectors (E, 3) their harmonics (E, (degree + 1)²), in the order of l
    and m, with Σ_m Y_lm² = 2l + 1.
    """
    pyplot = import_extra("matplotlib.pyplot", "plot_harmonics")
    figure: Figure = pyplot.figure(figsize=(1.25 * (2 * degree + 1), 1.35 * (degree + 1)))
    figure.set_layout_engine("none")
    colors = import_extra("matplotlib", "plot_harmonics").colormaps[DIVERGING]
    theta, phi = np.mgrid[0 : np.pi : 25j, 0 : 2 * np.pi : 49j]
    x, y, z = np.sin(theta) * np.sin(phi), np.cos(theta), np.sin(theta) * np.cos(phi)
    corners = np.stack([x, y, z], axis=-1)  # (25, 49, 3); y is the polar axis
    patches = (corners[:-1, :-1] + corners[1:, 1:]).reshape(-1, 3)  # a direction for each patch
    values = harmonics(patches / np.linalg.norm(patches, axis=1, keepdims=True))
    width, height = 1 / (2 * degree + 1), 1 / (degree + 1)
    for index in range((degree + 1) ** 2):
        l = math.isqrt(index)
        m = index - l * l - l
        left, bottom = (degree + m) * width, 1 - (l + 1) * height
        place = (left, bottom + 0.2 * height, width, 0.8 * height)
        axes: Any = figure.add_axes(place, projection="3d")
        strength = np.reshape(values[:, index], (24, 48)) / math.sqrt(2 * l + 1)  # -1 to 1
        paint = {"facecolors": colors(0.5 + strength / 2.2), "rstride": 1, "cstride": 1}
        axes.plot_surface(z, x, y, **paint, shade=False)
        axes.set_box_aspect((1, 1, 1), zoom=1.6)
        axes.view_init(elev=22, azim=30)
        axes.set_axis_off()
        text = f"$l={l},\\ m={m}$"
        figure.text(left + width / 2, bottom + 0.06 * height, text, ha="center", fontsize=9)
    return figure
