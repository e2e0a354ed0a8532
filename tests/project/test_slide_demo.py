"""`make slide-demo`, small and on pictures made here: all commands run, one after the other."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from dilated_attention_pytorch.models.slide.files import SlideReader

SCRIPT = Path(__file__).parents[2] / "examples" / "slide_demo.py"


@pytest.mark.slow
def test_the_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("slide_demo", SCRIPT)
    assert spec is not None and spec.loader is not None
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    rng = np.random.default_rng(0)
    made = {name: rng.random((200, 220, 3), dtype=np.float32) for name in (*demo.PICTURES, demo.STAIN)}
    monkeypatch.setattr(demo, "pictures", lambda: made)
    monkeypatch.setattr(sys, "argv", ["slide_demo.py", "--out", str(tmp_path), "--slides", "16", "--epochs", "1"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")]))
    demo.main()
    printed = capfd.readouterr().out
    assert "16 slides written" in printed and "(0 with doubts)" in printed
    assert len(list((tmp_path / "embeddings").glob("*.h5"))) == 16
    assert json.loads((tmp_path / "tuned" / "metrics.json").read_text())["patients"] == 8
    assert (tmp_path / "thumbnails" / "slide15.png").is_file()
    for ending in ("png", "html", "geojson"):
        assert (tmp_path / f"map.{ending}").stat().st_size > 1000
    with h5py.File(tmp_path / "features" / "slide00.h5") as file:
        assert file["features"].shape == (4 * demo.PIECE**2, 15)
    slide = SlideReader(in_chans=15).read(tmp_path / "features" / "slide00.h5")
    assert len(slide.coords[0].unique(dim=0)) == 400 and not slide.doubts


@pytest.mark.parametrize("name", ["coffee", "immunohistochemistry"])
def test_its_pictures_are_in_the_wheel(name: str) -> None:
    data = pytest.importorskip("skimage.data", reason="`make slide-demo` installs scikit-image")
    assert getattr(data, name)().shape[2] == 3
