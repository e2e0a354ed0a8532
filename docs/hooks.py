"""MkDocs hooks: the newest speed chart as `img/gpu.png`, and formulas as MathML while the site is built.

Browsers draw MathML themselves, so a page loads no script and no font from anywhere, and a formula can be selected and
read aloud. The pages keep plain TeX between dollar signs, which code hosts show as well.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

# What pymdownx.arithmatex writes in its generic mode.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def _mathml(match: re.Match[str]) -> str:
    display = "block" if match.group(2) == "[" else "inline"
    tex = html.unescape(match.group(3)).strip()
    mathml = convert(tex, display=display)
    # The converter passes on what it does not know; an alignment sign or a command left over would be shown as it is.
    if "\\" in mathml or "<mi>&</mi>" in mathml:
        raise PluginError(f"a formula that cannot be written as MathML: {tex}")
    return f'<{match.group(1)} class="formula">{mathml}</{match.group(1)}>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by MkDocs with the files of the site."""
    (chart,) = (Path(__file__).parents[1] / "benchmarks/results").glob("gpu_*.png")
    files.append(File.generated(config, "img/gpu.png", abs_src_path=str(chart)))
    return files


def on_page_content(content: str, **_: Any) -> str:
    """Called by MkDocs with each page's HTML."""
    return FORMULA.sub(_mathml, content)
