"""Attention maps are what the model computes, and figures and pages show these numbers."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from allscaip_lite import AllScAIP, AllScAIPConfig
from allscaip_lite.graph import build_graph
from allscaip_lite.kernels import choose
from allscaip_lite.notebook import plots, viewer
from allscaip_lite.notebook.attention_maps import attention_maps
from allscaip_lite.notebook.explorer import Explorer, explore_attention
from allscaip_lite.structures import structures_from_atoms

SMALL = AllScAIPConfig(hidden_size=32, num_heads=2, num_layers=2, angular_channels=(6, 4, 2, 2, 2))


def show_attention(model, atoms, query=0, block=-1, head=None) -> Explorer:
    """The node attention of one atom, without the matrix, as lesson 00 shows it."""
    view = {"scale": "row", "threshold": 0.02, "matrix": False, "size": (600, 400)}
    return explore_attention(
        model, atoms, kind="node", kinds=["node"], query=query, block=block, head=head, **view
    )


def random_model(**changes) -> AllScAIP:
    """A small model in which every part has an effect: random biases, scales, rotary weights."""
    torch.manual_seed(0)
    model = AllScAIP(SMALL.replace(**changes)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def singlet(atoms: Atoms) -> Atoms:
    atoms.info.update(charge=0, spin=1)
    return atoms


ETHANOL = singlet(molecule("CH3CH2OH"))
SALT = singlet(bulk("NaCl", "rocksalt", 5.6) * (2, 1, 1))
FAR_APART = singlet(molecule("H2O"))
FAR_APART += Atoms("He", [[9.0, 0.0, 0.0]])
STRUCTURES = {"ethanol": ETHANOL, "salt": SALT, "far apart": FAR_APART}


@pytest.fixture(scope="module")
def model() -> AllScAIP:
    return random_model()


@pytest.fixture(scope="module")
def maps(model):
    return attention_maps(model, ETHANOL)


@pytest.fixture
def figure():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    figure.subplots()
    return figure


# --- attention maps -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRUCTURES)
def test_rows_sum_to_one_and_empty_slots_hold_nothing(model, name):
    maps = attention_maps(model, STRUCTURES[name])
    one = torch.ones((), dtype=torch.float64)
    assert maps.node.shape == (2, 2, len(STRUCTURES[name]), len(STRUCTURES[name]))
    torch.testing.assert_close(maps.node.sum(-1), one.expand(maps.node.shape[:-1]))
    occupied = maps.neighbor >= 0
    for weights in (maps.source, maps.destination):
        assert weights.shape == (2, 2, *occupied.shape, occupied.shape[1])
        torch.testing.assert_close(weights.sum(-1), occupied.double().expand(weights.shape[:-1]))
        assert not weights[..., ~occupied.unsqueeze(1).expand(weights.shape[2:])].any()
    if name == "far apart":
        assert (~occupied).any(), "no empty slot: this structure tests nothing"


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_plain_pass_reproduces_the_energy(model, name):
    atoms = STRUCTURES[name]
    result = model.predict(atoms)
    assert attention_maps(model, atoms).energy == pytest.approx(result.energy, abs=1e-9)


@pytest.mark.parametrize("kind", ["source", "destination", "node"])
def test_faster_kernels_mix_values_with_these_weights(model, maps, kind):
    """Weights times values, computed here, against the input of a faster pass's output layer."""
    seen = {}
    block = model.blocks[0]
    layer = getattr(block, f"{kind}_attention")
    hooks = [
        getattr(block, f"{kind}_norm").register_forward_hook(
            lambda module, inputs, output: seen.update(states=output)
        ),
        layer.output.register_forward_pre_hook(lambda module, inputs: seen.update(mixed=inputs[0])),
    ]
    try:
        with torch.no_grad():
            model.features(
                structures_from_atoms(ETHANOL, torch.float64), choose("torch", "cpu", torch.float64)
            )
    finally:
        for hook in hooks:
            hook.remove()
    heads, n = maps.num_heads, len(ETHANOL)
    values = layer.value(seen["states"]).unflatten(1, (heads, -1)).transpose(0, 1)  # (h, R, D)
    if kind == "node":
        mixed = (maps.node[0] @ values).transpose(0, 1).flatten(1)  # (N, H)
    else:
        weights = getattr(maps, kind)[0]  # (h, N, K, K)
        slots, state = slots_and_states(model, kind)  # (M,), (N, K)
        mixed = (weights @ values[:, state]).flatten(1, 2)  # (h, N·K, D)
        mixed = mixed[:, slots].transpose(0, 1).flatten(1)  # (M, H)
    torch.testing.assert_close(seen["mixed"], mixed)
    assert (maps.node[0] - 1 / n).abs().max() > 1e-3, "weights all equal: this tests nothing"


def slots_and_states(model: AllScAIP, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) slot of each state of ethanol, (N, K) state of each slot; empty slots say 0."""
    graph = build_graph(structures_from_atoms(ETHANOL, torch.float64), model.config)
    slots = getattr(graph, f"{layout}_slot")
    states = torch.zeros(graph.log_weight.numel(), dtype=torch.long)
    states[slots] = torch.arange(len(slots))
    return slots, states.view(graph.log_weight.shape)


def test_slots_name_their_neighbours_and_images(model):
    maps = attention_maps(model, SALT)
    positions, occupied = SALT.positions, (maps.neighbor >= 0).numpy()
    assert maps.neighbor[:, 0].tolist() == list(range(len(SALT)))
    assert maps.image.abs().max() >= 1
    j, image = maps.neighbor.numpy(), maps.image.numpy()
    vectors = positions[j] + image @ SALT.cell.array - positions[:, None]  # (N, K, 3)
    distances = np.linalg.norm(vectors, axis=-1)
    assert np.allclose(distances[:, 0], 0)
    assert (distances[:, 1:][occupied[:, 1:]] > 2.7).all()  # half a lattice constant
    assert (distances[occupied] < model.config.cutoff).all()
    edges = {(i, j[i, s], *image[i, s]) for i, s in zip(*np.nonzero(occupied), strict=True)}
    assert len(edges) == occupied.sum(), "an edge stands in two slots"
    assert all((j, i, -a, -b, -c) in edges for i, j, a, b, c in edges)
    envelope = maps.envelope.numpy()
    assert (envelope[:, 0] == 1).all() and (np.diff(envelope, axis=1) <= 1e-12).all()
    assert (envelope[~occupied] == 0).all()


def test_maps_leave_the_model_as_it_was():
    model = random_model(attention_dropout=0.3).train()
    first, second = (attention_maps(model, ETHANOL) for _ in range(2))
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(first.node, second.node) and first.energy == second.energy


def test_one_structure_at_a_time(model):
    with pytest.raises(TypeError, match="one ase.Atoms"):
        attention_maps(model, [ETHANOL])


def test_a_model_without_node_attention_says_so():
    maps = attention_maps(random_model(node_attention=False), ETHANOL)
    assert maps.node is None and maps.source.shape[0] == 2
    with pytest.raises(ValueError, match="no node attention"):
        show_attention(maps, ETHANOL)


# --- geometry of the pictures -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CH4", "C6H6", "CO2", "H", "H2"])
def test_front_is_a_rotation_that_shows_the_widest_side(name):
    atoms = molecule(name)
    rotation = plots.front(atoms)
    assert np.allclose(rotation @ rotation.T, np.eye(3)) and np.linalg.det(rotation) > 0
    spread = plots.seen_from_front(atoms).std(0)
    assert spread[0] >= spread[1] - 1e-9 and spread[1] >= spread[2] - 1e-9


def test_bonds():
    assert len(plots.bonds(molecule("CH4"))) == 4
    assert len(plots.bonds(molecule("C6H6"))) == 12
    assert plots.bonds(FAR_APART) == [(0, 1), (0, 2)]
    assert plots.atom_labels(FAR_APART) == ["O0", "H1", "H2", "He3"]


# --- the page -----------------------------------------------------------------------------------


def page_data(html: str) -> dict:
    return json.loads(re.search(r"attentionView\(root, (\{.*\})\);", html)[1])


def test_the_page_holds_the_maps_and_needs_nothing_else(model, maps, tmp_path):
    page = show_attention(maps, ETHANOL, query=-1, block=0, head=1)
    data = page_data(page.html)
    assert (data["query"], data["block"], data["head"]) == (len(ETHANOL) - 1, 0, 1)
    weights = np.frombuffer(base64.b64decode(data["weights"]), "<u2").reshape(maps.node.shape)
    assert np.abs(weights / 65535 - maps.node.numpy()).max() < 1e-5
    assert data["scene"]["bonds"] == [list(pair) for pair in plots.bonds(ETHANOL)]
    text = page.save(tmp_path / "view.html").read_text()
    assert page.html in text and page._repr_html_() == page.html
    assert not re.search(r"https?:|<link|\bsrc=|\bimport\b|\brequire\b|@[A-Z]+@", text)
    assert page_data(show_attention(model, ETHANOL, -1, 0, 1).html) == data


def test_two_views_on_one_page_do_not_share_a_name(maps):
    pages = [show_attention(maps, ETHANOL).html for _ in range(2)]
    names = [set(re.findall(r'data-view="([^"]+)"', html)) for html in pages]
    assert all(len(found) == 1 for found in names) and names[0] != names[1]


@pytest.mark.parametrize(
    "choice, error, words",
    [
        ({"query": 9}, IndexError, "atoms 0 to 8"),
        ({"block": 2}, IndexError, "blocks 0 to 1"),
        ({"head": -3}, IndexError, "heads 0 to 1"),
    ],
)
def test_what_is_not_there_cannot_be_shown(maps, choice, error, words):
    with pytest.raises(error, match=words):
        show_attention(maps, ETHANOL, **choice)


def test_maps_of_another_structure_are_refused(maps):
    with pytest.raises(ValueError, match="another structure"):
        show_attention(maps, SALT)


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
PLAY = """<script>
const root = document.querySelector("[data-view]"), canvas = root.querySelector("canvas");
const tell = name => document.body.append(Object.assign(document.createElement("pre"),
  {className: name, textContent: JSON.stringify([root.dataset.query, root.dataset.block,
    root.dataset.head, canvas.toDataURL().length,
    root.querySelector("[data-part=text]").textContent])}));
const pointer = (kind, x, y) => canvas.dispatchEvent(
  new PointerEvent("pointer" + kind, {clientX: x, clientY: y, pointerId: 1}));
canvas.setPointerCapture = () => {};
tell("start");
for (const [part, value] of [["block", "0"], ["head", "-1"]]) {
  const choice = root.querySelector(`[data-part=${part}]`);
  choice.value = value;
  choice.dispatchEvent(new Event("change"));
}
tell("chosen");
const box = canvas.getBoundingClientRect(), before = root.dataset.query;
for (let x = 0; x < box.width && root.dataset.query === before; x += 10)
  for (let y = 0; y < box.height && root.dataset.query === before; y += 10)
    for (const kind of ["down", "up"]) pointer(kind, box.left + x, box.top + y);
tell("clicked");
pointer("down", box.left + 5, box.top + 5);
pointer("move", box.left + 60, box.top + 90);
pointer("up", box.left + 60, box.top + 90);
tell("turned");
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_draws_and_follows_the_mouse(maps, tmp_path):
    page = show_attention(maps, ETHANOL, query=2, block=1, head=0)
    path = tmp_path / "view.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{page.html}{PLAY}</body>")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--dump-dom"]
    options.append(f"--user-data-dir={tmp_path / 'profile'}")
    run = subprocess.run(
        [CHROMIUM, *options, path.as_uri()], check=False, capture_output=True, timeout=120
    )
    found = re.findall(r'<pre class="(\w+)">(.*?)</pre>', run.stdout.decode())
    seen = {name: json.loads(text) for name, text in found}
    assert seen.keys() == {"start", "chosen", "clicked", "turned"}, run.stderr.decode()[-2000:]
    assert seen["start"][:3] == ["2", "1", "0"]
    assert seen["chosen"][:3] == ["2", "0", "-1"]
    assert seen["clicked"][0] != "2" and seen["turned"][:3] == seen["clicked"][:3]
    pictures = [values[3] for values in seen.values()]
    assert min(pictures) > 5000, "an empty canvas"
    assert len(set(pictures)) == 4, "a picture did not change"
    # the text names what the maps hold: the largest weight of oxygen's mean row in block 0
    row = maps.node[0, :, 2].mean(0)
    best = plots.atom_labels(ETHANOL)[int(row.argmax())]
    assert re.search(rf"O2 attends most to {best}( \(itself\))? {row.max():.3f}", seen["chosen"][4])


# --- figures and other viewers ------------------------------------------------------------------


def test_the_matrix_is_the_map(maps, figure):
    axes = plots.plot_attention(maps, block=0, axes=figure.axes[0])
    (image,) = axes.get_images()
    assert np.allclose(image.get_array(), maps.node[0].mean(0))
    assert [label.get_text() for label in axes.get_yticklabels()] == plots.atom_labels(ETHANOL)
    assert axes.get_title() == "block 0, mean over heads"


def test_the_flat_picture_has_every_atom_link_and_arrow(maps, figure):
    forces = np.random.default_rng(0).normal(size=(len(ETHANOL), 3))
    weights = np.zeros(len(ETHANOL))
    weights[[0, 1, 4]] = 0.5, 0.3, 0.2
    figure.axes[0].set_prop_cycle(linestyle=[":", "--"])  # the cycle of a lesson's style
    axes = plots.plot_molecule(ETHANOL, forces, (0, weights), figure.axes[0])
    kinds = [type(patch).__name__ for patch in axes.patches]
    assert kinds.count("Circle") == len(ETHANOL) + 1  # with the ring around the query
    assert kinds.count("FancyArrowPatch") == 2
    (arrows,) = [c for c in axes.collections if type(c).__name__ == "Quiver"]
    assert len(ETHANOL) == arrows.N
    flat, radii = plots.seen_from_front(ETHANOL)[:, :2], plots.ball_radii(ETHANOL)
    assert np.allclose(np.linalg.norm(arrows.XY - flat, axis=1), radii)
    assert all(label.get_zorder() > arrows.get_zorder() for label in axes.texts)
    assert {line.get_linestyle() for line in axes.lines} == {"-"}, "a bond is dashed"


def test_an_atom_behind_another_has_no_label(figure):
    pair = Atoms("OHH", [[0, 0, 0], [0, 3, 0], [2, 0.1, 0]])
    assert len(plots.plot_molecule(pair, axes=figure.axes[0]).texts) == 3
    figure.axes[0].clear()
    hidden = Atoms("OHHHH", [[0, 0, 0], [0, 0, 0.8], [3, 0, 0], [0, 2, 0], [-3, -2, 0]])
    labels = {text.get_text() for text in plots.plot_molecule(hidden, axes=figure.axes[0]).texts}
    assert len(labels & {"O0", "H1"}) == 1 and len(labels) == 4
    figure.axes[0].clear()
    hidden.positions[1, 0] = 0.4  # the oxygen's radius is 0.36 Å: the label is cut
    labels = {text.get_text() for text in plots.plot_molecule(hidden, axes=figure.axes[0]).texts}
    assert len(labels & {"O0", "H1"}) == 1 and len(labels) == 4


def test_spheres_have_a_row_for_each_degree_and_colours_for_signs():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    seen = []

    def harmonics(directions):
        seen.append(directions)
        values = np.zeros((len(directions), 4))
        values[:, 1], values[:, 3] = np.sqrt(3), -np.sqrt(3)
        return values

    figure = plots.plot_harmonics(harmonics, 1)
    pyplot.close(figure)
    assert np.allclose(np.linalg.norm(seen[0], axis=1), 1)
    assert [text.get_text() for text in figure.texts] == [
        f"$l={l},\\ m={m}$" for l, m in ((0, 0), (1, -1), (1, 0), (1, 1))
    ]
    spheres = [axes.get_position() for axes in figure.axes]
    bottoms = [text.get_position()[1] for text in figure.texts]
    assert all(low < place.y0 for low, place in zip(bottoms, spheres, strict=True))
    positive, negative = (figure.axes[i].collections[0].get_facecolor() for i in (1, 3))
    assert (positive[:, 2] > positive[:, 0]).all(), "positive is purple: more blue than red"
    assert (negative[:, 0] > negative[:, 2]).all(), "negative is orange"


def luminance(color: str) -> float:
    """WCAG's relative luminance, 0 to 1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def test_lines_can_be_told_apart_without_colour():
    pairs = {(str(line["linestyle"]), line["marker"]) for line in plots.LINES}
    assert len(pairs) == len(plots.LINES)
    light = [luminance(line["color"]) for line in plots.LINES]
    assert max(light) < 0.5, "too pale on white"
    assert min(np.abs(np.diff(light))) > 0.08, "two neighbours are one grey"


def test_the_style_is_what_matplotlib_takes():
    matplotlib = pytest.importorskip("matplotlib")
    with matplotlib.rc_context(plots.STYLE):
        first = next(iter(matplotlib.rcParams["axes.prop_cycle"]))
    assert first["color"] == plots.PALETTE["blue"]


def test_a_figure_is_shown_with_its_text(monkeypatch):
    pytest.importorskip("IPython")
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    seen = []
    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: seen.append(bundle))
    plt.figure(figsize=(3, 2))
    plt.plot([0, 1], [2, 3])
    plots.show('A line that rises,\n  from 2 to <3> "units".')
    assert not plt.get_fignums()
    (bundle,) = seen
    assert bundle["text/plain"] == 'A line that rises, from 2 to <3> "units".'
    assert 'alt="A line that rises, from 2 to &lt;3&gt; &quot;units&quot;."' in bundle["text/html"]
    data = base64.b64decode(re.search(r"base64,([^\"]+)", bundle["text/html"])[1])
    assert data.startswith(b"\x89PNG")
    style = re.search(r'style="width: (\d+)px', bundle["text/html"])  # the data may hold "62px" too
    assert 200 < int(style[1]) < 350
    with pytest.raises(ValueError, match="no figure"):
        plots.show("nothing")
    with pytest.raises(ValueError, match="needs a text"):
        plots.show("  ")


@pytest.mark.parametrize(
    "values, numbers",
    [([3, 150], "5 10 20 50 100"), ([600, 2100], "700 1,000 1,500 2,000"), ([1e-9, 1], None)],
)
def test_numbers_on_logarithmic_axes_are_plain(monkeypatch, values, numbers):
    pytest.importorskip("IPython")
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr("IPython.display.display", lambda bundle, raw: None)
    axes = plt.subplots()[1]
    axes.loglog([2, 6], values)
    axes.set_ylim(values)
    axes.set_xticks([2, 6], ["two", "six"])
    plots.show("Two logarithmic axes, one of them with ticks that were set.")
    axes.figure.canvas.draw()
    ticks = axes.xaxis.get_ticklabels(which="both")
    assert [text.get_text() for text in ticks] == ["two", "six"]
    low, high = axes.get_ylim()
    ticks = [(axes.yaxis.get_ticklabels()[i], y) for i, y in enumerate(axes.get_yticks())]
    found = [text.get_text() for text, y in ticks if low <= y <= high]
    assert found == numbers.split() if numbers else "mathdefault" in found[0]


def test_3dmol_goes_into_the_page_where_it_was_fetched(monkeypatch, tmp_path):
    pytest.importorskip("py3Dmol")
    script = tmp_path / "3Dmol-min.js"
    script.write_text("/* the library */")
    monkeypatch.setattr(viewer, "VIEWER_SCRIPT", script)
    html = viewer.view_molecule(ETHANOL).html
    assert base64.b64encode(script.read_bytes()).decode() in html
    assert not re.search(r"https?://[^\s'\"]*3Dmol", html)
    monkeypatch.setattr(viewer, "VIEWER_SCRIPT", tmp_path / "absent.js")
    assert re.search(r"https?://[^\s'\"]*3Dmol", viewer.view_molecule(ETHANOL).html)


def test_a_trajectory_keeps_its_frames():
    pytest.importorskip("nglview")
    frames = [ETHANOL.copy() for _ in range(3)]
    frames[2].positions += 1
    view = viewer.view_trajectory(frames)
    assert view.max_frame == 2
    assert np.allclose(view._trajlist[0].get_coordinates(2), frames[2].positions)
    with pytest.raises(ValueError, match="no frames"):
        viewer.view_trajectory([])
    with pytest.raises(ValueError, match=r"frame 1 \(H2O\) has other atoms"):
        viewer.view_trajectory([ETHANOL, molecule("H2O")])


@pytest.mark.parametrize(
    ("library", "view"),
    [("py3Dmol", viewer.view_molecule), ("nglview", lambda atoms: viewer.view_trajectory([atoms]))],
)
def test_a_missing_viewer_names_the_extra(monkeypatch, library, view):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError, match=r"allscaip-lite\[notebooks\]"):
        view(ETHANOL)
