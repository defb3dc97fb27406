"""The site is built without a warning, and a page of it loads nothing from elsewhere."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_house import ROOT

ZENSICAL = Path(sys.executable).with_name("zensical")
CONFIG = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
LOADING = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src", "object": "data"}
"""Attributes whose address a browser fetches with the page."""


class Loaded(HTMLParser):
    """Collects the addresses that a page loads, and its pictures without a text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.unnamed: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        address = values.get(LOADING.get(tag, "")) or ""
        if address and values.get("rel") != "canonical":
            self.addresses.append(address)
        if tag == "img" and not values.get("alt"):
            self.unnamed.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ZENSICAL.is_file():
        pytest.skip("zensical is not installed (extra `docs`)")
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "docs", folder / "docs")
    config = CONFIG.replace("paths: [.]", f"paths: [{ROOT}]").replace(
        "site_dir: build/site", "site_dir: site"
    )
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    call = [str(ZENSICAL), "build", "--strict"]
    built = subprocess.run(call, cwd=folder, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert "No issues found" in built.stdout + built.stderr
    return folder / "site"


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 30
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in loaded.addresses if re.match(r"(https?:)?//", address)], page
        assert not loaded.unnamed, f"{page}: pictures without a text"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?https?:|@import", style.read_text(encoding="utf-8")), style


def test_pictures_are_small_and_used(site: Path) -> None:
    text = "".join(page.read_text(encoding="utf-8") for page in site.rglob("*.html"))
    for picture in (ROOT / "docs" / "pictures").iterdir():
        assert picture.stat().st_size < 300_000, picture
        assert picture.name in text, f"no page shows {picture}"


def test_every_page_is_in_the_navigation() -> None:
    nav = CONFIG.partition("\nnav:")[2]
    named = re.findall(r": (\S+\.md)$", nav, re.M)
    assert sorted(named) == sorted(
        str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")
    )
