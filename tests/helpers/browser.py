"""Opens a page in a headless browser and asks it things."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome on the PATH")


def ask(path: Path, script: str, address: str = "", *options: str) -> Any:
    """What an expression gives in the page, after it was opened in a headless browser."""
    probe = path.with_name("probe.html")
    answer = (
        f"<script>{{ const said = document.createElement('pre'); said.textContent = JSON.stringify({script});"
        " document.body.replaceChildren(said); }</script></body>"
    )
    probe.write_text(path.read_text(encoding="utf-8").replace("</body>", answer), encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={path.parent / 'profile'}",
    ]
    done = subprocess.run(
        [*command, *options, "--dump-dom", f"file://{probe}{address}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found = re.search(r"<pre>(.*)</pre>", done.stdout)
    assert found, f"the script of the page failed: {done.stderr[-1000:]}"
    return json.loads(found[1].replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))
