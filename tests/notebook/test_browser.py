"""The explorer in a real browser: as an exported page with the network off, and in JupyterLab.

Needs Playwright and a Chromium, the system's or Playwright's own. Without a Chromium these tests
are skipped, or fail where REQUIRE_BROWSER is set, as .ci/run does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from allscaip_lite.notebook.attention_maps import AttentionMaps, attention_maps
from allscaip_lite.notebook.explorer import explore_attention
from allscaip_lite.notebook.plots import atom_labels, attention_matrix, edge_labels

playwright = pytest.importorskip(
    "playwright.sync_api", reason="Playwright is not installed: pip install playwright"
)

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
OPTIONS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser() -> Iterator[playwright.Browser]:
    with playwright.sync_playwright() as started:
        own = started.chromium.executable_path
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        found = found or (own if Path(own).exists() else None)
        if found is None:
            missing = pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip
            missing(f"no Chromium on this machine: looked for {', '.join(BROWSERS)}")
        browser = started.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


# --- an explorer on a page ----------------------------------------------------------------------


class View:
    """One explorer on a page, used as a reader would: with the mouse, the keys and the choices."""

    def __init__(self, page: playwright.Page, index: int = 0) -> None:
        self.page = page
        self.root = page.locator(".allscaip-view").nth(index)
        self.part("body").wait_for(state="visible", timeout=20_000)
        self.root.scroll_into_view_if_needed()

    def part(self, name: str) -> playwright.Locator:
        return self.root.locator(f"[data-part={name}]")

    def state(self, name: str) -> str:
        return self.root.get_attribute(f"data-{name}")

    def picture(self, name: str = "canvas") -> str:
        """A fingerprint of what a canvas shows."""
        return hashlib.sha1(self.part(name).evaluate("c => c.toDataURL()").encode()).hexdigest()

    def ink(self) -> float:
        """Part of the molecule's canvas that is drawn on."""
        return self.part("canvas").evaluate(
            """c => {
                const data = c.getContext("2d").getImageData(0, 0, c.width, c.height).data;
                let drawn = 0;
                for (let i = 3; i < data.length; i += 4) drawn += data[i] > 0;
                return 4 * drawn / data.length;
            }"""
        )

    def choose(self, name: str, label: str) -> None:
        self.part(name).select_option(label=label)

    def slide(self, name: str, value: float) -> None:
        self.part(name).evaluate(
            "(e, value) => { e.value = value; e.dispatchEvent(new Event('input')); }", str(value)
        )

    def tip(self) -> str:
        tip = self.part("tip")
        return "" if tip.is_hidden() else tip.inner_text()

    def hover(self, name: str, x: float, y: float) -> str:
        """Move the mouse to a place of a canvas, in parts of its width and height; the tip."""
        box = self.part(name).bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
        return self.tip()

    def find(self, wanted: Callable[[str], bool]) -> str:
        """Search the molecule with the mouse until the tip under it is wanted; returns the tip."""
        self.part("canvas").scroll_into_view_if_needed()
        for y in np.linspace(0.06, 0.94, 20):
            for x in np.linspace(0.06, 0.94, 28):
                tip = self.hover("canvas", x, y)
                if tip and wanted(tip):
                    return tip
        raise AssertionError("no such atom under the mouse")

    def click_here(self) -> None:
        self.page.mouse.down()
        self.page.mouse.up()

    def table(self, column: int = 1) -> dict[str, float]:
        """The row as the page tells it in its table: name and weight, or with 2 the distance."""
        if not self.part("details").evaluate("e => e.open"):
            self.part("details").locator("summary").click()
        self.part("table").locator("td").first.wait_for()
        rows = self.part("table").evaluate(
            "t => [...t.rows].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        return {row[0].removesuffix(" (itself)"): float(row[column]) for row in rows[1:]}

    def check_numbers(self, maps: AttentionMaps) -> None:
        """The table, and the sentence, against the maps."""
        kind, query = self.state("kind"), int(self.state("query"))
        head = int(self.state("head"))
        weights = attention_matrix(
            maps, kind, query, int(self.state("block")), None if head < 0 else head
        )
        row = weights[query if kind == "node" else int(self.state("edge"))]
        names = atom_labels(maps.atomic_numbers)
        if kind != "node":
            own = f"self-edge of {names[query]}"
            names = [own, *(name.replace("-", "−") for name in edge_labels(maps, query, kind)[1:])]
        table = self.table()
        assert table.keys() == set(names)
        assert [table[name] for name in names] == pytest.approx(row.tolist(), abs=1.1e-4)
        text = self.part("text").inner_text()
        assert f"attends most to {names[int(row.argmax())]}" in text
        assert f"{row.max():.3f}" in text


def changed(view: View, action: Callable[[], object], canvas: str = "canvas") -> None:
    """Do something, and see that the picture is another one afterwards."""
    before = view.picture(canvas)
    action()
    assert view.picture(canvas) != before, "the picture did not change"


def touch(view: View) -> None:
    """What must work wherever an explorer stands: click an atom, change the head."""
    assert view.ink() > 0.02, "nothing is drawn"
    old = view.state("query")
    before = view.picture()
    here = view.part("query").evaluate("e => e.selectedOptions[0].text")

    def another(tip: str) -> bool:  # an atom that is not the query, and no periodic image
        key = tip.split("\n", maxsplit=1)[0].split("attends to ")[1]
        return "(" not in key and set(re.findall(r"[A-Z][a-z]?\d+", key)) != {here}

    tip = view.find(another)
    view.click_here()
    assert view.state("query") != old, "the click chose no atom"
    chosen = view.part("query").evaluate("e => e.selectedOptions[0].text")
    assert chosen in tip
    view.hover("canvas", 0.0, 0.0)
    assert view.picture() != before
    changed(view, view.root.locator("[data-step=head]").last.click)


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


@pytest.fixture(scope="module")
def path() -> list[Atoms]:
    """Ethanol, and the same with a longer C-O bond."""
    first = molecule("CH3CH2OH")
    first.info.update(charge=0, spin=1)
    second = first.copy()
    second.positions[[2, 3]] += (0.5, 0.3, 0.1)
    return [first, second]


@pytest.fixture
def offline(browser) -> Iterator[Callable[[Path], playwright.Page]]:
    """Open a file with the network off; any error of the page, or request of it, is a failure."""
    context = browser.new_context(
        viewport={"width": 1100, "height": 900}, offline=True, color_scheme="light"
    )
    context.set_default_timeout(20_000)
    problems = []

    def start(file: Path, allowed: str = "file:") -> playwright.Page:
        page = context.new_page()
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(("file:", "data:", "blob:", allowed))
                or problems.append(request.url)
            ),
        )
        page.goto(file.as_uri(), wait_until="domcontentloaded")
        return page

    yield start
    context.close()
    assert not problems


def test_an_exported_page_follows_every_choice(model, path, offline, tmp_path):
    maps = [attention_maps(model, atoms) for atoms in path]
    file = explore_attention(maps, path, query=0, head=0, block=0).save(tmp_path / "view.html")
    view = View(offline(file))
    view.check_numbers(maps[0])
    touch(view)
    view.check_numbers(maps[0])

    changed(view, lambda: view.choose("query", "O2"))
    changed(view, lambda: view.choose("head", "mean"))
    changed(view, lambda: view.choose("block", "1"))
    assert [view.state(name) for name in ("query", "block", "head")] == ["2", "1", "-1"]
    view.check_numbers(maps[0])

    changed(view, lambda: view.choose("kind", "neighbourhood, source"))
    assert (view.state("kind"), view.state("edge")) == ("source", "0")
    view.check_numbers(maps[0])
    changed(view, lambda: view.choose("edge", "O2→C0"))
    assert maps[0].neighbor[2, int(view.state("edge"))] == 0
    view.check_numbers(maps[0])
    changed(view, lambda: view.choose("kind", "neighbourhood, destination"))
    assert view.part("edge").evaluate("e => e.selectedOptions[0].text") == "C0→O2"
    view.check_numbers(maps[0])

    # an edge keeps its neighbour from frame to frame, whatever its slot
    changed(view, lambda: view.slide("frame", 1))
    assert view.state("frame") == "1" and "2 of 2" in view.part("caption").inner_text()
    slot = int(view.state("edge"))
    assert maps[1].neighbor[2, slot] == 0
    view.check_numbers(maps[1])
    difference = maps[1].energy - maps[0].energy
    assert f"{abs(difference):.3f} eV" in view.part("caption").inner_text()
    view.part("play").click()
    view.page.wait_for_function("e => e.dataset.frame === '0'", arg=view.root.element_handle())
    view.part("play").click()

    view.choose("kind", "node")
    view.hover("canvas", 0.0, 0.0)
    full = view.ink()
    changed(view, lambda: view.slide("threshold", 1))
    assert view.ink() < full, "no link went away"
    assert float(view.part("least").inner_text()) > 0
    changed(view, lambda: view.choose("scale", "1"), "matrix")
    assert view.part("top").inner_text() == "1.000"


def test_clicks_choose_edges_and_the_matrix_tells_its_numbers(model, path, offline, tmp_path):
    maps = attention_maps(model, path[0])
    page = explore_attention(maps, path[0], kind="source", query=2)
    view = View(offline(page.save(tmp_path / "view.html")))
    view.root.locator("[data-picks=edge]").click()
    tip = view.find(lambda tip: "attends to O2→" in tip)
    changed(view, view.click_here)
    (name,) = re.findall(r"attends to (O2→\w+)", tip)
    slot = edge_labels(maps, 2).index(name)
    assert (view.state("query"), view.state("edge")) == ("2", str(slot))
    view.check_numbers(maps)

    weights = attention_matrix(maps, "source", 2, -1, None)
    tip = changed_tip(view, "matrix", 0.9, 0.6)
    row, column = named(tip, "O2", edge_labels(maps, 2))
    assert float(re.search(r"\n([\d.]+)", tip)[1]) == pytest.approx(weights[row, column], abs=1e-4)
    distance = np.linalg.norm(path[0].positions[maps.neighbor[2, column]] - path[0].positions[2])
    assert f"{distance:.2f} Å" in tip
    view.click_here()
    assert view.state("edge") == str(row)

    view.choose("kind", "node")
    tip = changed_tip(view, "matrix", 0.5, 0.8)
    labels = atom_labels(path[0])
    row, column = (labels.index(label) for label in re.findall(r"[A-Z]\w*\d", tip)[:2])
    assert float(re.search(r"\n([\d.]+)", tip)[1]) == pytest.approx(
        float(maps.node[-1].mean(0)[row, column]), abs=1e-4
    )
    view.click_here()
    assert view.state("query") == str(row)


def changed_tip(view: View, canvas: str, x: float, y: float) -> str:
    tip = view.hover(canvas, x, y)
    assert "attends to" in tip
    return tip


def named(tip: str, atom: str, edges: list[str]) -> tuple[int, int]:
    """Row and column that a tip of neighbourhood attention speaks of."""
    first = tip.split("\n", maxsplit=1)[0]
    query, key = (name.removesuffix(" (itself)") for name in first.split(" attends to "))
    names = [f"self-edge of {atom}", *edges[1:]]
    return names.index(query), names.index(key)


def test_keys_and_mouse_turn_and_choose(model, path, offline, tmp_path):
    maps = [attention_maps(model, atoms) for atoms in path]
    view = View(offline(explore_attention(maps, path).save(tmp_path / "view.html")))
    page, canvas = view.page, view.part("canvas")
    canvas.focus()
    for key, name, value in [
        ("ArrowRight", "query", "1"),
        ("ArrowLeft", "query", "0"),
        ("ArrowDown", "head", "0"),
        ("Shift+ArrowDown", "block", "0"),
        ("k", "kind", "source"),
        ("Shift+ArrowRight", "edge", "1"),
        (".", "frame", "1"),
    ]:
        changed(view, lambda key=key: page.keyboard.press(key))
        assert view.state(name) == value, key
    view.check_numbers(maps[1])
    canvas.focus()
    for key in ("a", "s", "+", "0", "c"):
        changed(view, lambda key=key: page.keyboard.press(key))
    page.keyboard.press("0")

    def drag(button: str) -> None:
        box = canvas.bounding_box()
        page.mouse.move(box["x"] + 5, box["y"] + box["height"] - 5)
        page.mouse.down(button=button)
        page.mouse.move(box["x"] + 70, box["y"] + box["height"] - 60, steps=3)
        page.mouse.up(button=button)

    for button in ("left", "right"):
        changed(view, lambda button=button: drag(button))
    changed(view, lambda: (page.mouse.wheel(0, 200), page.wait_for_timeout(200)))
    changed(view, lambda: view.root.locator("[data-tool=reset]").click())

    light = view.picture("matrix")
    assert view.state("theme") == "light"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("e => e.dataset.theme === 'dark'", arg=view.root.element_handle())
    assert view.picture("matrix") != light

    for width in (800, 420):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(200)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert canvas.evaluate("c => c.width / c.clientWidth") >= 1.9
        touch(view)


def test_the_gallery_shows_every_head(model, path, offline, tmp_path):
    page = explore_attention(model, path[0], block=0, head=None)
    view = View(offline(page.save(tmp_path / "view.html")))
    view.part("gallery").locator("summary").click()
    heads = view.part("heads").locator("button")
    heads.first.wait_for()
    assert heads.count() == 4
    pictures = heads.locator("canvas").evaluate_all("all => all.map(c => c.toDataURL())")
    assert len(set(pictures)) == 4
    changed(view, lambda: heads.nth(3).click(), "matrix")
    assert (view.state("block"), view.state("head")) == ("1", "1")
    assert heads.nth(3).get_attribute("aria-pressed") == "true"


def test_fingers_turn_zoom_and_choose(browser, model, path, tmp_path):
    file = explore_attention(model, path[0]).save(tmp_path / "view.html")
    context = browser.new_context(
        viewport={"width": 420, "height": 900}, has_touch=True, is_mobile=True, offline=True
    )
    page = context.new_page()
    page.goto(file.as_uri())
    view, session = View(page), context.new_cdp_session(page)
    box = view.part("canvas").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)

    def swipe(*fingers: tuple[float, float]) -> None:
        """Each finger goes outwards from the middle, from half of its way to all of it."""
        for kind, part in (("touchStart", 0.5), ("touchMove", 0.75), ("touchMove", 1.0)):
            points = [{"x": middle[0] + part * x, "y": middle[1] + part * y} for x, y in fingers]
            event = {"type": kind, "touchPoints": points}
            session.send("Input.dispatchTouchEvent", event)
        session.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})

    changed(view, lambda: swipe((80, 30)))
    before = view.ink()
    changed(view, lambda: swipe((-120, 0), (120, 0)))
    assert view.ink() > 1.3 * before, "two fingers apart must enlarge"
    view.root.locator("[data-tool=reset]").tap()
    old = view.state("query")
    for x in range(-150, 151, 15):
        for y in range(-110, 111, 15):
            if view.state("query") == old:
                page.touchscreen.tap(middle[0] + x, middle[1] + y)
    assert view.state("query") != old
    context.close()


def test_periodic_images_can_be_clicked(model, crystal, offline, tmp_path):
    maps = attention_maps(model, crystal)
    page = explore_attention(maps, crystal, kind="destination", query=3)
    view = View(offline(page.save(tmp_path / "view.html")))
    tip = view.find(lambda tip: re.search(r"attends to \w+ \([^)]*\)→", tip))
    changed(view, view.click_here)
    name = re.search(r"attends to (.*)\n", tip)[1].replace("−", "-")
    assert edge_labels(maps, 3, "destination")[int(view.state("edge"))] == name
    assert view.state("query") == "3"
    view.check_numbers(maps)

    distances, cell = view.table(column=2), crystal.cell.array
    names = (name.replace("-", "−") for name in edge_labels(maps, 3, "destination")[1:])
    for slot, name in enumerate(names, start=1):
        end = crystal.positions[maps.neighbor[3, slot]] + maps.image[3, slot].numpy() @ cell
        expected = np.linalg.norm(end - crystal.positions[3])
        assert distances[name] == pytest.approx(expected, abs=0.011)
    view.choose("kind", "node")
    nearest = dict(
        zip(atom_labels(crystal), crystal.get_distances(3, range(7), mic=True), strict=True)
    )
    assert view.table(column=2) == pytest.approx(nearest, abs=0.011)


def test_eight_bits_are_unpacked(model, path, offline, tmp_path, monkeypatch):
    monkeypatch.setattr("allscaip_lite.notebook.explorer.SIXTEEN_BIT_LIMIT", 0)
    maps = [attention_maps(model, atoms) for atoms in path]
    page = explore_attention(maps, path, kind="source", query=1, edge=2, head=1, frame=1)
    view = View(offline(page.save(tmp_path / "view.html")))
    expected = maps[1].source[-1, 1, 1, 2]
    table, names = view.table(), edge_labels(maps[1], 1)
    shown = [table[name] for name in ["self-edge of C1", *names[1:]]]
    assert shown == pytest.approx(expected[: len(names)].tolist(), abs=2.6e-3)


def test_nbconvert_s_page_works_offline(model, path, offline, tmp_path):
    nbformat, nbconvert = (pytest.importorskip(name) for name in ("nbformat", "nbconvert"))
    view = explore_attention(model, path)
    output = nbformat.v4.new_output("display_data", {"text/html": view.html})
    cell = nbformat.v4.new_code_cell("explore_attention(model, path)", outputs=[output, output])
    notebook = nbformat.v4.new_notebook(cells=[cell])
    text, _ = nbconvert.HTMLExporter().from_notebook_node(notebook)
    file = tmp_path / "notebook.html"
    file.write_text(text, encoding="utf-8")
    # the exporter's own page asks for the mathematics' typesetter; ours asks for nothing
    page = offline(file, allowed="https://cdnjs.")
    for index in (0, 1):  # the same output twice: both live
        touch(View(page, index))


# --- JupyterLab ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """A JupyterLab of its own, without anybody's settings; `root` is the folder it shows."""
    pytest.importorskip("jupyterlab")
    place = tmp_path_factory.mktemp("lab")
    root, settings = place / "notebooks", place / "settings"
    shutil.copytree(NOTEBOOKS, root)  # it saves what it runs
    notes = settings / "@jupyterlab/apputils-extension/notification.jupyterlab-settings"
    notes.parent.mkdir(parents=True)
    notes.write_text(json.dumps({"fetchNews": "false", "checkForUpdates": False}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    command += ["--IdentityProvider.token=test", "--LabApp.expose_app_in_browser=True"]
    if hasattr(os, "getuid") and os.getuid() == 0:
        command.append("--allow-root")
    environment = os.environ | {
        "JUPYTER_CONFIG_DIR": str(place / "config"),
        "JUPYTER_DATA_DIR": str(place / "data"),
        "JUPYTER_RUNTIME_DIR": str(place / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        "JUPYTERLAB_WORKSPACES_DIR": str(place / "workspaces"),
        "IPYTHONDIR": str(place / "ipython"),
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOKS.parent), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    log = place / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=subprocess.STDOUT, cwd=root
        )
    try:
        began = time.monotonic()
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()[-3000:]
                assert time.monotonic() - began < 120, log.read_text()[-3000:]
                time.sleep(0.3)
        yield SimpleNamespace(root=root, url=f"http://127.0.0.1:{port}")
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


RUN_ALL = """async () => {
  window.finished = null;
  const commands = window.jupyterapp.commands;
  commands.execute("notebook:run-all-cells").then(
    () => { window.finished = "done"; }, error => { window.finished = String(error); });
}"""
ERRORS = """() => {
  const found = [];
  for (const cell of window.jupyterapp.shell.currentWidget.content.widgets) {
    if (cell.model.type !== "code") continue;
    for (const output of cell.model.outputs.toJSON()) {
      if (output.output_type === "error") found.push(output.ename + ": " + output.evalue);
    }
  }
  return found;
}"""


def run_in_lab(browser, lab: SimpleNamespace, notebook: str, limit: float) -> playwright.Page:
    """Open a notebook of the lab's folder, run all its cells, and see that none failed.

    `limit` is in seconds. The page is the caller's to close.
    """
    page = browser.new_page(viewport={"width": 1200, "height": 1000})
    page.set_default_timeout(90_000)
    page.goto(f"{lab.url}/lab/tree/{notebook}?token=test&reset", wait_until="domcontentloaded")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
    page.wait_for_function(
        """() => {
          const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget;
          const kernel = panel && panel.sessionContext && panel.sessionContext.session?.kernel;
          return kernel && kernel.status === "idle";
        }""",
        polling=300,
    )
    page.evaluate(RUN_ALL)
    page.wait_for_function("() => window.finished", timeout=1000 * limit, polling=300)
    assert page.evaluate("window.finished") == "done"
    assert not page.evaluate(ERRORS)
    return page


TINY = """\
from ase.io import read
from allscaip_lite import load_model
from allscaip_lite.notebook.explorer import explore_attention

frames = read("molecules/caffeine.xyz", index=":")
explore_attention(load_model("lite"), frames, query=3)
"""


@pytest.fixture
def tiny(lab) -> str:
    """A notebook with one explorer in it."""
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(TINY)])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, lab.root / "tiny.ipynb")
    return "tiny.ipynb"


def test_the_explorer_lives_in_jupyterlab(browser, lab, tiny):
    page = run_in_lab(browser, lab, tiny, limit=120)
    try:
        view = View(page)
        touch(view)
        changed(view, lambda: view.choose("kind", "neighbourhood, source"))
        changed(view, lambda: view.slide("frame", 1))

        # keys are the explorer's, not the notebook's: D twice would delete the cell there
        view.part("canvas").click(position={"x": 3, "y": 3})
        old = view.state("query")
        page.keyboard.press("ArrowRight")
        assert view.state("query") != old
        for _ in range(2):
            changed(view, lambda: page.keyboard.press("d"))
        page.keyboard.press("b")
        view.part("play").focus()
        page.keyboard.press("b")
        assert page.locator(".jp-Notebook .jp-CodeCell").count() == 1

        for theme in ("Dark", "Light"):
            name = {"theme": f"JupyterLab {theme}"}
            page.evaluate("a => jupyterapp.commands.execute('apputils:change-theme', a)", name)
            page.wait_for_function(
                "([e, theme]) => e.dataset.theme === theme",
                arg=[view.root.element_handle(), theme.lower()],
            )
    finally:
        page.close()


FORMULA = re.compile(r"\$\$.+?\$\$|(?<!\\)\$(?:\\.|[^$\\])+?\$", re.DOTALL)


def test_every_formula_of_the_lessons_is_set_without_an_error(browser, lab):
    """By JupyterLab's MathJax, all texts as one cell: cells out of sight are not rendered."""
    nbformat = pytest.importorskip("nbformat")
    texts = [
        re.sub(r"```.*?```|`[^`\n]*`", "code", cell.source, flags=re.DOTALL)
        for path in sorted(NOTEBOOKS.glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "markdown"
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("\n\n".join(texts))])
    nbformat.write(notebook, lab.root / "formulas.ipynb")
    expected = sum(len(FORMULA.findall(text)) for text in texts)
    page = browser.new_page()
    try:
        page.goto(f"{lab.url}/lab/tree/formulas.ipynb?token=test&reset", timeout=90_000)
        set_by_now = "document.querySelectorAll('.jp-Notebook mjx-container').length"
        page.wait_for_function(f"() => {set_by_now} >= {expected}", timeout=300_000, polling=500)
        assert page.evaluate(set_by_now) == expected > 500
        red = "mjx-merror, [data-mjx-error], mjx-mtext[style*='red']"
        assert page.locator(red).all_text_contents() == []
    finally:
        page.close()


# Notebooks with an explorer: what they may take in seconds, and how many explorers they show.
LESSONS = [("00_tour.ipynb", 300.0, 1), ("07_attention_maps.ipynb", 300.0, 4)]


@pytest.mark.parametrize("notebook, limit, explorers", LESSONS)
def test_lessons_run_in_jupyterlab_and_live_on_as_pages(
    browser, lab, offline, tmp_path, notebook, limit, explorers
):
    nbconvert = pytest.importorskip("nbconvert")
    page = run_in_lab(browser, lab, notebook, limit)
    try:
        touch(View(page))
        page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    finally:
        page.close()
    text, _ = nbconvert.HTMLExporter().from_filename(str(lab.root / notebook))
    file = tmp_path / "lesson.html"
    file.write_text(text, encoding="utf-8")
    # the exporter's own page asks for the typesetter of formulas and for widgets; ours for nothing
    exported = offline(file, allowed="https://cdn")
    assert exported.locator(".allscaip-view").count() == explorers
    for index in range(explorers):
        touch(View(exported, index))
