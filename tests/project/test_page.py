"""The page of a pattern: its data are the pattern's, it loads nothing, and its script says the same in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from browser import ask, needs_browser

from dilated_attention_pytorch import DilatedPattern
from dilated_attention_pytorch.viz import receptive_field, save_page
from dilated_attention_pytorch.viz.page import page_data
from dilated_attention_pytorch.viz.pattern import keys_by_branch

PATTERNS = {
    "not nesting": DilatedPattern((6, 16, 40), (1, 2, 5), num_heads=4),
    "blocked": DilatedPattern((8, 24, 100), (1, 2, 4), num_heads=6, offsets="blocked"),
    "rate above length": DilatedPattern((2, 1, 40), (5, 1, 3), num_heads=8),
    "eight branches": DilatedPattern([4 << i for i in range(8)], [1 << i for i in range(8)], num_heads=2),
}
N = 45


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_the_data_hold_the_keys_of_each_query(name: str, is_causal: bool) -> None:
    pattern = PATTERNS[name]
    data = page_data(pattern, N, is_causal=is_causal)
    counts = []
    for head in range(pattern.num_heads):
        for query in range(N):
            found = []
            for branch in data["branches"]:
                segments = [range(*s) for s in branch["segments"][branch["groups"][head]]]
                mine = [s for s in segments if query in s]
                assert len(mine) <= 1
                found.append([m for s in mine for m in s if m <= query or not is_causal])
            assert [keys for keys in found if keys] == [
                list(keys) for keys in pattern.keys_of(query, head, N, is_causal=is_causal)
            ]
            if head == 0:
                counts.append(sum(map(len, found)))
    assert counts[data["query"]] == max(counts)
    assert len({pair for branch in data["branches"] for pair in branch["colors"]}) >= len(pattern.branches)


def test_the_file_is_whole_and_loads_nothing(tmp_path: Path) -> None:
    path = save_page(PATTERNS["blocked"], N, tmp_path / "made" / "x.html", head=2, is_causal=True)
    text = path.read_text(encoding="utf-8")
    (kept,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text)
    wanted = page_data(PATTERNS["blocked"], N, head=2, is_causal=True)
    assert json.loads(kept) == json.loads(json.dumps(wanted))
    assert not re.search(r"https?:|//\w+\.|\bsrc=|\bhref=|@import|url\(|fetch\(|import\(", text)
    assert len(re.findall(r"(?s)\"use strict\".*</script>", text)[0].splitlines()) < 200
    assert [p.name for p in path.parent.iterdir()] == ["x.html"]


def test_bad_input_writes_nothing(tmp_path: Path) -> None:
    pattern = PATTERNS["blocked"]
    with pytest.raises(ValueError, match=r"expected path to end in \.html, got 'x\.png'"):
        save_page(pattern, N, tmp_path / "x.png")
    with pytest.raises(ValueError, match="expected seq_len to be below 16385, got 20000"):
        save_page(pattern, 20_000, tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"expected head in \[0, 6\), got 6"):
        save_page(pattern, N, tmp_path / "x.html", head=6)
    with pytest.raises(ValueError, match="expected num_heads to be below 129, got 200"):
        save_page(DilatedPattern((4,), (1,), num_heads=200), N, tmp_path / "x.html")
    assert not list(tmp_path.iterdir())


@needs_browser
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["not nesting", "eight branches"])
def test_the_script_says_what_the_pattern_says(name: str, is_causal: bool, tmp_path: Path) -> None:
    pattern = PATTERNS[name]
    path = save_page(pattern, N, tmp_path / "x.html", is_causal=is_causal)
    every = f"Array.from({{length: {N}}}, (_, q) => q)"
    keys, times, reach = ask(
        path,
        f"[{every}.map(q => keysOf(q, 1)), {every}.map(q => [...timesOf(keysOf(q, 1))]), "
        f"{every}.map(q => [...reachOf(q, 3)])]",
    )
    for query in range(N):
        want = dict(keys_by_branch(pattern, query, 1, N, is_causal=is_causal))
        assert [keys[query][i] and range(*keys[query][i]) for i in range(len(pattern.branches))] == [
            want.get(i) for i in range(len(pattern.branches))
        ]
        assert times[query] == [sum(m in part for part in want.values()) for m in range(N)]
        fields = torch.from_numpy(receptive_field(pattern, N, query=query, num_layers=3, is_causal=is_causal))
        assert reach[query] == torch.where(fields.any(0), fields.int().argmax(0), -1).tolist()


@needs_browser
def test_a_query_is_chosen_by_address_slider_number_and_pointer(tmp_path: Path) -> None:
    path = save_page(PATTERNS["not nesting"], N, tmp_path / "x.html")
    script = """(() => {
      const said = () => [at("summary").textContent, at("reached").textContent, location.hash];
      const found = {address: said()};
      const set = (id, value, event) => {
        at(id).value = value;
        at(id).dispatchEvent(new Event(event));
        return said();
      };
      found.slider = set("query", 12, "input");
      found.number = set("number", 999, "change");
      found.head = set("head", 3, "input");
      found.layers = set("layers", 1, "input");
      const canvas = document.querySelector("canvas"), box = canvas.getBoundingClientRect();
      const over = {clientX: box.left + 1.5 * box.width / columns, clientY: box.top + 0.5 * box.height / rows};
      canvas.dispatchEvent(new PointerEvent("pointermove", over));
      found.hover = said();
      canvas.dispatchEvent(new PointerEvent("pointerleave"));
      found.left = said();
      canvas.dispatchEvent(new MouseEvent("click", over));
      found.click = said();
      const [x, y] = [over.clientX - box.left, over.clientY - box.top];
      found.drawn = [canvas.width > 100, canvas.getContext("2d").getImageData(x, y, 1, 1).data[3]];
      found.wide = document.documentElement.scrollWidth <= window.innerWidth;
      found.rows = [...document.querySelectorAll("tbody tr")].map(row => row.textContent);
      return found;
    })()"""
    found = ask(path, script, "#query=40&head=2&layers=2", "--window-size=500,900")
    assert found["address"][0].startswith("Query 40, head 2: ")
    assert found["slider"][0].startswith("Query 12, head 2: ") and found["slider"][2] == "#query=12&head=2&layers=2"
    assert found["number"][0].startswith(f"Query {N - 1}, head 2: ")
    assert found["head"][0].startswith(f"Query {N - 1}, head 3: ")
    assert found["layers"][1].startswith("After 1 layer: ")
    assert found["hover"][0].startswith("Query 1, head 3: ") and found["hover"][2] == found["layers"][2]
    assert found["left"] == found["layers"]
    assert found["click"][0] == found["hover"][0] and found["click"][2] == "#query=1&head=3&layers=1"
    assert found["drawn"] == [True, 255] and found["wide"]
    assert [text.split(",")[0] for text in found["rows"]] == ["w = 6", "w = 16", "w = 40"]
    assert "not a member" in found["rows"][2]
