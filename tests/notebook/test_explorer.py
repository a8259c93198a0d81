"""The Python part of the explorer: the page contains the numbers of the maps; clear errors."""

from __future__ import annotations

import base64
import json
import re
import sys
import zlib

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from allscaip_lite.graph import build_graph
from allscaip_lite.kernels import choose
from allscaip_lite.notebook import explorer, plots
from allscaip_lite.notebook.attention_maps import KINDS, attention_maps
from allscaip_lite.notebook.explorer import explore_attention
from allscaip_lite.notebook.viewer import Page
from allscaip_lite.structures import structures_from_atoms


def singlet(atoms: Atoms) -> Atoms:
    atoms.info.update(charge=0, spin=1)
    return atoms


def stretched(factor: float) -> Atoms:
    atoms = singlet(molecule("CH3CH2OH"))
    atoms.positions *= factor
    return atoms


PATH = [stretched(factor) for factor in (1.0, 1.2, 1.6)]
ETHANOL = PATH[0]


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def model_of_atoms_alone(make_model):
    return make_model(node_attention=False)


def page_data(page: Page) -> dict:
    return json.loads(re.search(r"attentionView\(root, (\{.*\})\);", page.html)[1])


def unpack(text: str, dtype: str, deflated: bool = False) -> np.ndarray:
    raw = base64.b64decode(text)
    return np.frombuffer(zlib.decompress(raw) if deflated else raw, dtype)


def weights_of(data: dict, kind: str) -> np.ndarray:
    dtype, whole = ("<u2", 65535) if data["bits"] == 16 else ("u1", 255)
    text = data["weights" if kind == "node" else kind]
    return unpack(text, dtype, data["deflated"]) / whole


def read_page(data: dict) -> list[dict]:
    """Data of each frame of a page: node (L, h, N, N), edges, and (L, h, c, c) for each atom."""
    n, layers = len(data["scene"]["labels"]), (data["blocks"], data["heads"])
    flat = {kind: weights_of(data, kind) for kind in data["kinds"]}
    frames = []
    for graph in data["graphs"]:
        frame = {"edges": [], "source": [], "destination": []}
        counts = unpack(graph["counts"], "<u2")
        neighbor = np.split(unpack(graph["neighbor"], "<u2"), counts.cumsum()[:-1])
        image = np.split(unpack(graph["image"], "i1").reshape(-1, 3), counts.cumsum()[:-1])
        envelope = np.split(unpack(graph["envelope"], "u1") / 255, counts.cumsum()[:-1])
        frame["edges"] = list(zip(neighbor, image, envelope, strict=True))
        for kind in data["kinds"]:
            cells = [n * n] if kind == "node" else [int(c) ** 2 for c in counts]
            layer = np.prod(layers, dtype=int) * sum(cells)
            parts, flat[kind] = flat[kind][:layer].reshape(*layers, -1), flat[kind][layer:]
            pieces = np.split(parts, np.cumsum(cells)[:-1], axis=2)
            sides = [int(np.sqrt(size)) for size in cells]
            squares = [
                piece.reshape(*layers, side, side)
                for piece, side in zip(pieces, sides, strict=True)
            ]
            frame[kind] = squares[0] if kind == "node" else squares
        frames.append(frame)
    assert all(len(rest) == 0 for rest in flat.values())
    return frames


# --- what the page holds ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["path", "crystal", "slab"])
@pytest.mark.parametrize("comfortable, error", [(5_000_000, 1e-5), (0, 2.1e-3)])
def test_the_page_holds_the_maps(model, crystal, slab, monkeypatch, name, comfortable, error):
    monkeypatch.setattr(explorer, "SIXTEEN_BIT_LIMIT", comfortable)
    frames = {"path": PATH, "crystal": [crystal], "slab": [slab]}[name]
    data = page_data(explore_attention(model, frames))
    assert data["bits"] == (16 if comfortable else 8)
    read = read_page(data)
    assert len(read) == len(frames)
    for atoms, frame in zip(frames, read, strict=True):
        maps = attention_maps(model, atoms)
        assert np.abs(frame["node"] - maps.node.numpy()).max() < error
        for i in range(len(atoms)):
            occupied = (maps.neighbor[i] >= 0).numpy()
            count = occupied.sum()
            neighbor, image, envelope = frame["edges"][i]
            assert neighbor.tolist() == maps.neighbor[i, :count].tolist()
            assert image.tolist() == maps.image[i, :count].tolist()
            assert np.abs(envelope - maps.envelope[i, :count].numpy()).max() < 0.003
            for kind in ("source", "destination"):
                expected = getattr(maps, kind)[:, :, i, :count, :count].numpy()
                assert np.abs(frame[kind][i] - expected).max() < error
    if name != "path":
        assert any(image.any() for frame in read for _, image, _ in frame["edges"])


def test_frames_lie_on_top_of_each_other(model):
    data = page_data(explore_attention(model, PATH, names=["a", "b", "c"]))
    scene = data["scene"]
    assert [frame["name"] for frame in scene["frames"]] == ["a", "b", "c"]
    for atoms, frame in zip(PATH, scene["frames"], strict=True):
        drawn = np.array(frame["positions"])
        distances = np.linalg.norm(drawn[:, None] - drawn, axis=-1)
        assert np.abs(distances - atoms.get_all_distances()).max() < 3e-3
        assert frame["energy"] == pytest.approx(model.predict(atoms).energy, abs=1e-4)
        assert np.abs(drawn[:, 0]).max() <= scene["size"]["width"]
        assert np.abs(drawn[:, 1]).max() <= scene["size"]["height"]
        together = sorted([*scene["bonds"], *frame["bonds"]])
        assert together == [list(pair) for pair in plots.bonds(atoms)]
    means = [np.mean(frame["positions"], axis=0) for frame in scene["frames"]]
    assert np.ptp(means, axis=0).max() < 2e-3
    assert scene["frames"][0]["bonds"] and not scene["frames"][2]["bonds"]  # stretched apart


@pytest.mark.parametrize("name, edges", [("crystal", 12), ("slab", 4)])
def test_the_cell_and_the_images(model, crystal, slab, name, edges):
    atoms = {"crystal": crystal, "slab": slab}[name]
    (frame,) = page_data(explore_attention(model, atoms, kinds=["node"]))["scene"]["frames"]
    lines, cell = np.array(frame["lines"]), np.array(frame["cell"])
    assert lines.shape == (edges, 2, 3)
    lengths = sorted(np.linalg.norm(lines[:, 1] - lines[:, 0], axis=1))
    periodic = atoms.cell.lengths()[atoms.pbc]
    assert lengths == pytest.approx(sorted(np.repeat(periodic, edges // len(periodic))), abs=2e-3)
    assert np.abs(cell @ np.array(frame["inverse"]) - np.eye(3)).max() < 1e-3
    assert np.abs(cell @ cell.T - atoms.cell.array @ atoms.cell.array.T).max() < 1e-2
    bonds = {tuple(bond) for bond in frame["imageBonds"]}
    assert bonds and all((j, i, -a, -b, -c) in bonds for i, j, a, b, c in bonds)
    for i, j, *shift in bonds:
        vector = atoms.positions[j] + shift @ atoms.cell.array - atoms.positions[i]
        drawn = np.array(frame["positions"])
        assert np.linalg.norm(drawn[j] + shift @ cell - drawn[i]) == pytest.approx(
            np.linalg.norm(vector), abs=3e-3
        )


def test_the_images_that_atoms_attend_to_are_inside_of_the_view(model, crystal):
    data = page_data(explore_attention(model, crystal))
    scene, (graph,) = data["scene"], read_page(data)
    positions, cell = (np.array(scene["frames"][0][name]) for name in ("positions", "cell"))
    outermost = max(
        np.abs(positions[neighbor] + image @ cell)[:, :2].max()
        for neighbor, image, _ in graph["edges"]
    )
    assert max(scene["size"]["width"], scene["size"]["height"]) > outermost + 0.2
    reached = np.abs(np.concatenate([frame["lines"] for frame in scene["frames"]])).max()
    assert outermost > reached + 1.0  # Å: far outside of the cell, so the test says something


def test_what_is_open_at_first(model):
    choice = {"kind": "destination", "query": -2, "edge": -1, "block": -1, "head": 1, "frame": -1}
    data = page_data(explore_attention(model, PATH, **choice, threshold=0.3, scale="row"))
    slots = int((attention_maps(model, PATH[-1]).neighbor[-2] >= 0).sum())
    assert {name: data[name] for name in choice} == {
        "kind": "destination",
        "query": 7,
        "edge": slots - 1,
        "block": 1,
        "head": 1,
        "frame": 2,
    }
    assert (data["threshold"], data["scale"]) == (0.3, "row")


def test_a_name_does_not_end_or_begin_a_script(model):
    name = "<!--<script>alert(1)</script>"
    page = explore_attention(model, PATH, names=[name, "a", "b"])
    assert page_data(page)["scene"]["frames"][0]["name"] == name
    inside = page.html[page.html.index("attentionView(root") :].partition("</script>")[0]
    assert "<" not in inside.partition(");")[0] and "alert(1)" in inside


def test_maps_may_be_given_instead_of_the_model(model):
    maps = [attention_maps(model, atoms) for atoms in PATH]
    assert page_data(explore_attention(maps, PATH)) == page_data(explore_attention(model, PATH))
    one = page_data(explore_attention(maps[1], PATH[1]))
    assert one == page_data(explore_attention(model, PATH[1]))


def test_a_model_without_node_attention_opens_on_the_neighbourhood(model_of_atoms_alone):
    data = page_data(explore_attention(model_of_atoms_alone, ETHANOL))
    assert data["kinds"] == ["source", "destination"] and data["kind"] == "source"
    with pytest.raises(ValueError, match='kind="source"'):
        explore_attention(model_of_atoms_alone, ETHANOL, kind="node")


def test_a_single_atom_can_be_explored(model):
    atoms = singlet(Atoms("He"))
    for kind in KINDS:
        assert page_data(explore_attention(model, atoms, kind=kind))["kind"] == kind


# --- the page -----------------------------------------------------------------------------------


def test_the_page_needs_nothing_else(model, tmp_path):
    page = explore_attention(model, PATH)
    text = page.save(tmp_path / "view.html").read_text()
    assert page.html in text and page._repr_html_() == page.html
    assert not re.search(r"https?:|<link|\bsrc=|\bimport\b|\brequire\b|@[A-Z]+@", text)
    assert f"{page.nbytes / 1e6:.1f} MB" in repr(page)
    names = [re.findall(r'data-view="([^"]+)"', view.html) for view in (page, page)]
    assert len(set(names[0])) == 1
    other = explore_attention(model, PATH)
    assert set(re.findall(r'data-view="([^"]+)"', other.html)) != set(names[0])


def test_the_page_says_its_size(model):
    page = explore_attention(model, PATH)
    said = float(re.search(r"([\d.]+) MB\.$", page_data(page)["note"])[1])
    assert said == pytest.approx(page.nbytes / 1e6, abs=0.06)


def test_without_a_browser_it_is_a_picture(model, crystal, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    page = explore_attention(model, crystal, kind="source", query=1, edge=2)
    left, right, _ = page.figure().axes
    maps = attention_maps(model, crystal)
    (image,) = right.get_images()
    count = int((maps.neighbor[1] >= 0).sum())
    expected = maps.source[-1, :, 1, :count, :count].mean(0)
    assert np.allclose(image.get_array(), expected)
    assert len(left.patches) > len(crystal)  # images and links too
    picture = page.save(tmp_path / "view.png")
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 20_000
    assert page._repr_png_().startswith(b"\x89PNG")  # for a notebook that becomes a PDF
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert page._repr_png_() is None


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "choice, error, words",
    [
        ({"query": 9}, IndexError, "atoms 0 to 8"),
        ({"block": 2}, IndexError, "blocks 0 to 1"),
        ({"head": 5}, IndexError, "heads 0 to 1"),
        ({"frame": 3}, IndexError, "frames 0 to 2"),
        ({"kind": "source", "edge": 99}, IndexError, "edges 0 to"),
        ({"kind": "edges"}, ValueError, "not one of"),
        ({"kinds": ["node", "self"]}, ValueError, "not one of"),
        ({"kind": "source", "kinds": ["node"]}, ValueError, "not among"),
        ({"threshold": 2}, ValueError, "0 to 1"),
        ({"scale": "log"}, ValueError, "not one of"),
        ({"names": ["a"]}, ValueError, "1 names for 3 frames"),
    ],
)
def test_what_is_not_there_cannot_be_shown(model, choice, error, words):
    with pytest.raises(error, match=words):
        explore_attention(model, PATH, **choice)


def test_frames_must_be_one_structure(model):
    with pytest.raises(ValueError, match=r"frame 1 \(H2O\) has other atoms"):
        explore_attention(model, [ETHANOL, singlet(molecule("H2O"))])
    with pytest.raises(ValueError, match="no frames"):
        explore_attention(model, [])
    with pytest.raises(TypeError, match="frame 0 is a str"):
        explore_attention(model, ["H2O"])
    with pytest.raises(TypeError, match="give a model, such as load_model.*, not 'lite'"):
        explore_attention("lite", ETHANOL)
    with pytest.raises(ValueError, match="another structure"):
        explore_attention(attention_maps(model, ETHANOL), singlet(molecule("H2O")))
    with pytest.raises(ValueError, match="1 maps for 3 frames"):
        explore_attention(attention_maps(model, ETHANOL), PATH)


def test_too_large_a_page_is_refused_early(model, monkeypatch):
    asked = []
    original = explorer.attention_maps
    monkeypatch.setattr(
        explorer, "attention_maps", lambda *args: asked.append(1) or original(*args)
    )
    with pytest.raises(ValueError, match=r"MB.*atoms\[::2\].*kinds=\[\"node\"\].*limit=") as error:
        explore_attention(model, PATH * 10, limit=30_000)
    assert len(asked) == 1, "all frames were computed before the refusal"
    assert "node" in str(error.value) and "destination" in str(error.value)
    page = explore_attention(model, PATH, limit=200_000, kinds=["node"])
    assert page_data(page)["kinds"] == ["node"]


def test_many_frames_are_thinned_to_eight_bits_and_say_so(model, monkeypatch):
    fine = explore_attention(model, PATH)
    monkeypatch.setattr(explorer, "SIXTEEN_BIT_LIMIT", 0)
    coarse = explore_attention(model, PATH)
    assert coarse.nbytes < fine.nbytes
    assert "±0.002" in repr(coarse) and "±0.00001" in repr(fine)


# --- figures for papers -------------------------------------------------------------------------


def test_neighbourhood_attention_as_a_figure(model, crystal):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    maps = attention_maps(model, crystal)
    choice = {"kind": "destination", "query": 3, "block": 0, "head": 1}
    axes = plots.plot_attention(maps, axes=figure.subplots(), row=2, **choice)
    (image,) = axes.get_images()
    weights = np.asarray(image.get_array())
    assert np.allclose(weights.sum(1), 1)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[0] == "self" and all(label.endswith("→Na3") for label in labels[1:])
    assert any(re.fullmatch(r"\w+ \([+-]?\d, [+-]?\d, [+-]?\d\)→Na3", label) for label in labels)
    assert len(labels) == len(set(labels)), "two edges of one name"
    assert "arriving at Na3" in axes.get_title()
    assert len(axes.patches) == 1


def test_links_of_an_edge_end_at_its_neighbours_and_images(model, crystal):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    maps = attention_maps(model, crystal)
    axes = plots.plot_links(maps, crystal, 0, kind="source", edge=3, axes=figure.subplots())
    images = int((maps.image[0].any(1) & (maps.neighbor[0] >= 0)).sum())
    row = plots.attention_matrix(maps, "source", 0, -1, None)[3]
    visible = int((row[1:] > 0.02 * row[1:].max()).sum())
    kinds = [type(patch).__name__ for patch in axes.patches]
    rings = 1  # what the self-edge gets
    assert kinds.count("Circle") == len(crystal) + images + rings
    assert kinds.count("FancyArrowPatch") == visible
    with pytest.raises(IndexError, match="has edges 0 to"):
        plots.plot_links(maps, crystal, 0, kind="source", edge=99)


# --- the weights are those of the faster kernels --------------------------------------------------


def watched(model, atoms: Atoms, block: int, kind: str, kernels: str) -> dict[str, torch.Tensor]:
    """What enters an attention of a pass (rows, H), and what its mixing hands on (rows, H)."""
    seen, part = {}, model.blocks[block]
    hooks = [
        getattr(part, f"{kind}_norm").register_forward_hook(
            lambda module, inputs, output: seen.update(states=output)
        ),
        getattr(part, f"{kind}_attention").output.register_forward_pre_hook(
            lambda module, inputs: seen.update(mixed=inputs[0])
        ),
    ]
    try:
        with torch.no_grad():
            model.features(
                structures_from_atoms(atoms, torch.float64), choose(kernels, "cpu", torch.float64)
            )
    finally:
        for hook in hooks:
            hook.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", [0, 1])
def test_the_weights_mix_what_faster_kernels_mix(model, crystal, kind, block):
    """Values times these weights are what faster kernels hand to the output layer.

    The last block asks only from the self-edges in the destination layout.
    """
    maps, n = attention_maps(model, crystal), len(crystal)
    states = watched(model, crystal, block, kind, "plain")["states"]
    layer = getattr(model.blocks[block], f"{kind}_attention")
    with torch.no_grad():
        values = layer.value(states).unflatten(1, (maps.num_heads, -1))  # (rows, h, D)
    if kind == "node":
        expected = torch.einsum("hij,jhd->ihd", maps.node[block], values)
    else:
        expected = torch.full_like(values, torch.nan)
        graph = build_graph(structures_from_atoms(crystal, torch.float64), model.config)
        place = {(i, i, 0, 0, 0): i for i in range(n)}  # row of each edge i→j
        edges = zip(
            graph.source.tolist(), graph.target.tolist(), graph.shift.long().tolist(), strict=True
        )
        place |= {(i, j, *shift): n + row for row, (i, j, shift) in enumerate(edges)}
        for i in range(n):
            count = int((maps.neighbor[i] >= 0).sum())
            ends = zip(
                maps.neighbor[i, :count].tolist(), maps.image[i, :count].tolist(), strict=True
            )
            if kind == "source":
                rows = [place[i, j, *image] for j, image in ends]
            else:  # the edge j→i, as seen from j
                rows = [place[j, i, *(-x for x in image)] for j, image in ends]
            weights = getattr(maps, kind)[block, :, i, :count, :count]  # (h, c, c)
            expected[rows] = torch.einsum("hst,thd->shd", weights, values[rows])
    found = watched(model, crystal, block, kind, "torch")
    gap, same = torch.cdist(found["states"], states).min(1)
    assert gap.max() < 1e-6 and len(same.unique()) == len(states)
    only_atoms = kind == "destination" and block == maps.num_blocks - 1
    assert len(found["mixed"]) == (n if only_atoms else len(states))
    torch.testing.assert_close(found["mixed"], expected.flatten(1)[same[: len(found["mixed"])]])
