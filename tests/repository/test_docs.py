"""What a newcomer reads: its size, its example, its links, and pages that a command writes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("data/*/README.md")),
    *sorted(ROOT.glob("allscaip_lite/**/*.md")),
]


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


# --- README -------------------------------------------------------------------------------------


def test_the_readme_is_short_enough_to_be_read():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(len(line.split()) for line in lines) <= 1300
    assert [line for line in lines if len(line) > 100] == []


def test_the_readme_s_example_prints_what_it_says(tmp_path):
    text = README.read_text(encoding="utf-8")
    example, recipes = blocks(text, "python")
    (promised,) = blocks(text, "text")
    # a process of its own: ASE prints to what was standard output when it was imported
    printed = subprocess.run(
        [sys.executable, "-c", example + recipes],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.startswith(promised)
    assert "Zero-point energy" in printed
    assert (tmp_path / "ethanol.xyz").exists()
    assert "attentionView(root" in (tmp_path / "ethanol.html").read_text(encoding="utf-8")


def test_the_moving_picture_moves_and_is_not_large():
    from PIL import Image

    (name,) = re.findall(r"!\[[^]]+\]\((\S+)\)", README.read_text(encoding="utf-8"))
    picture = ROOT / name
    assert picture.stat().st_size < 1.5e6
    assert getattr(Image.open(picture), "n_frames", 1) > 10


# --- pages --------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page):
    text = re.sub(
        r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    local = [unquote(urlsplit(t).path) for t in targets if not urlsplit(t).scheme]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing


def test_the_page_of_commands_is_what_the_parser_says():
    made = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))
    assert made["PAGE"].read_text(encoding="utf-8") == made["page"](), (
        "write it anew: python docs/make_commands.py"
    )


def test_commands_in_the_pages_exist():
    """Every option after `allscaip-lite NAME` in a page is one of that command."""
    made = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))
    known: dict[str, set[str]] = {}
    for section in made["page"]().split("\n## `allscaip-lite ")[1:]:
        name, _, rest = section.partition("`")
        known[name] = set(re.findall(r"^- .*?(--[\w-]+)", rest, re.MULTILINE))
    wrong = []
    for page in PAGES:
        if page.name in ("CHANGELOG.md", "commands.md"):
            continue
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"allscaip-lite ((?:[a-z][\w-]*) [^\n`]*)", text):
            words = line.split(" #")[0].split()
            name = " ".join(words[:2]) if words[0] == "data" else words[0]
            if name not in known:
                continue
            options = {word.split("=")[0] for word in words if word.startswith("--")}
            wrong += [f"{page.name}: {name} {o}" for o in options - known[name] - {"--help"}]
    assert not wrong


# --- the site -----------------------------------------------------------------------------------


class Links(HTMLParser):
    """What a page links to, what it loads, and the names that can be linked to in it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.loads: list[str] = []
        self.names = {""}
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {key: value or "" for key, value in attrs}
        self.names.add(found.get("id", ""))
        if tag == "a" and "href" in found:
            self.targets.append(found["href"])
        elif "src" in found:
            self.loads.append(found["src"])
        elif tag == "link" and found.get("rel") in ("stylesheet", "preload", "icon"):
            self.loads.append(found["href"])


@pytest.mark.slow
def test_the_site_builds_and_needs_nothing_from_outside(tmp_path):
    pytest.importorskip("sphinx", reason="the site extra is not installed")
    pytest.importorskip("myst_nb", reason="the site extra is not installed")
    pytest.importorskip("furo", reason="the site extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-c", "docs"]
    environment = {key: value for key, value in os.environ.items() if key != "SITE_EXECUTE"}
    run = subprocess.run(
        [*command, "-d", str(tmp_path / "doctrees"), ".", str(tmp_path / "site")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]

    pages = {path: Links(path) for path in (tmp_path / "site").rglob("*.html")}
    site = {page.relative_to(tmp_path / "site").as_posix() for page in pages}
    assert {"index.html", "README.html", "docs/api/model.html", "docs/accuracy.html"} <= site
    lessons = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert lessons == sorted(Path(page).stem for page in site if page.startswith("notebooks/"))

    outside = {load for links in pages.values() for load in links.loads if urlsplit(load).netloc}
    assert not outside
    missing = set()
    for page, links in pages.items():
        for target in links.targets + links.loads:
            address = urlsplit(target)
            if address.scheme or address.netloc:
                continue
            file = (page.parent / unquote(address.path)).resolve() if address.path else page
            fragment = unquote(address.fragment)
            named = file not in pages or fragment in pages[file].names
            if not file.exists() or not named:
                missing.add(f"{page.name}: {target}")
    assert not missing

    # a solution is there, folded
    text = (tmp_path / "site" / "notebooks" / "01_graph.html").read_text(encoding="utf-8")
    assert "Solution" in text and "<details" in text
    assert "<math" in text and "$$" not in text


def test_the_reference_has_every_module_of_the_model_and_every_package():
    package = ROOT / "allscaip_lite"
    model = (ROOT / "docs" / "api" / "model.md").read_text(encoding="utf-8")
    modules = {path.stem for path in package.glob("[!_]*.py")} - {"cli"}
    assert set(re.findall(r"automodule:: allscaip_lite\.(\w+)$", model, re.MULTILINE)) == modules
    packages = {path.parent.name for path in package.glob("*/__init__.py")}
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert packages == pages - {"index", "model"}
