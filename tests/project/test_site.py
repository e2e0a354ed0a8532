"""The built site in a headless browser: no code is wider than its column, no page wider than a phone."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import BROWSER, needs_browser

ROOT = Path(__file__).parents[2]
# Of each page in a frame: its name, how far it is wider than the frame, and the code blocks wider than their column.
MEASURE = """<script>addEventListener("load", () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, wide = page.documentElement;
    const code = [...page.querySelectorAll("pre > code")].filter(x => x.scrollWidth > x.clientWidth + 1);
    return [frame.title, wide.scrollWidth - wide.clientWidth, code.map(x => x.innerText.slice(0, 80))];
  });
  document.body.innerHTML = "<pre></pre>";
  document.querySelector("pre").textContent = JSON.stringify(found);
})</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    return out


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit(site: Path, width: int, tmp_path: Path) -> None:
    """Frames, since a browser's own window is at least 500 pixels wide."""
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("index.html"))
    frames = "".join(
        f'<iframe title="{page}" src="{page}" style="width:{width}px;height:800px"></iframe>' for page in pages
    )
    (site / "frames.html").write_text(f"<body>{frames}{MEASURE}</body>", encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path}", "--timeout=60000", "--dump-dom"]
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{site / 'frames.html'}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    answer = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert answer, done.stderr[-1000:]
    found = json.loads(answer[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
    assert len(found) == len(pages) > 20
    assert not [name for name, wider, _ in found if wider > 0]
    if width > 1000:  # on a phone code scrolls, and a shadow says so
        assert not [(name, code) for name, _, code in found if code]
