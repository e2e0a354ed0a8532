"""Each row of the tables in docs/migration.md: what stands on the left runs, and gives what the right says."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import dilated_attention_pytorch as package
from dilated_attention_pytorch import models
from dilated_attention_pytorch._old.names import BY_PLACE

GUIDE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
# What the placeholders of the guide stand for.
MEANT: dict[str, Any] = {
    "lengths": [64, 256], "rates": [1, 4], "dim": 64, "heads": 4, "d_model": 64, "nhead": 4, "num_tokens": 20,
    "dropout": 0.1, "attention_dropout": 0.1, "softmax_scale": 0.25, "attention_scale": 0.25, "op": None,
    "F": torch.nn.functional, "process_group": None,
    "config": package.RingAttentionConfig(segment_lengths=[64, 256], dilation_rates=[1, 4]),
}  # fmt: skip
# The arguments of names whose call the guide leaves open; "lengths, rates" for all others.
_MULTIHEAD = dict.fromkeys(
    ("RingMultiheadDilatedAttentionHybrid", "ring_distributed_dilated_attention.RingDistributedDilatedAttention",
     "DistributedImprovedMultiheadDilatedAttention", "RingMultiheadDilatedAttentionV3",
     "create_ring_multihead_attention_hybrid"), "dim, heads, lengths, rates",
)  # fmt: skip
MORE = _MULTIHEAD | {
    "transformer.DilatedTransformerEncoderLayer": "d_model, nhead, lengths, rates",
    "transformer.DilatedTransformerDecoderLayer": "d_model, nhead, lengths, rates",
    "ImprovedMultiheadDilatedAttention": "dim, heads, rates, lengths",
    "multihead_dilated_attention.MultiheadDilatedAttention": "dim, heads, rates, lengths",
    "create_production_ring_attention": "lengths, rates",
    "ring_attention.production_hilbert.RingDilatedAttentionHilbert": "config, grid=(4, 8)",
    "MultiheadConfig": "dim, heads",
    "LongNet": "768, 12, activation=F.relu",
    "LongNetLM": "num_tokens, 768, 12",
}
# Rows whose left side is a way of calling, which other tests hold: masks, pairs, arguments of `forward`.
HOW_TO_CALL = ("attention(", "key_padding_mask", "attention_mask", "lm(tokens", "heads in", "lengths that")


def rows(section: str) -> list[tuple[str, str]]:
    """The cells of a section's first table."""
    text = GUIDE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines]
    assert cells and all(len(pair) == 2 for pair in cells)
    return cells  # type: ignore[return-value]


def codes(cell: str) -> list[str]:
    """The code in a cell; `...V2` stands for the name before it with another end."""
    found: list[str] = []
    for code in re.findall(r"`([^`]+)`", cell):
        found.append(re.sub(r"V2.*|$", code[3:], found[0], count=1) if code.startswith("...") else code)
    return found


def named(dotted: str) -> Any:
    """What an old name is, at the path that the guide gives or at whichever place has it."""
    place, _, name = dotted.rpartition(".")
    places = [place] if place else ["", *BY_PLACE]
    for one in places:
        if name in BY_PLACE.get(one, {}):
            module = __import__(f"{package.__name__}.{one}".rstrip("."), fromlist=[name])
            return getattr(module, name)
    return getattr(package, dotted)


ROWS = [
    pytest.param(code, right, id=code[:60])
    for section in ("From 0.1", "From 0.2")
    for left, right in rows(section)
    for code in codes(left)
    if not right.startswith(("none", "refused")) and not left.strip("*`").startswith(HOW_TO_CALL)
]


@pytest.mark.parametrize(("code", "right"), ROWS)
def test_what_stands_on_the_left_gives_what_the_right_says(code: str, right: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if code.startswith("from "):
            exec(code, {})
            exec(codes(right)[0], {})
            return
        name, _, arguments = code.removesuffix(")").partition("(")
        old = named(name)
        arguments = MORE.get(name) or re.sub(r"(, )?\.\.\.", "", arguments) or "lengths, rates"
        with torch.device("meta" if name.startswith("LongNet") else "cpu"):  # the paper's sizes need no memory
            made = eval(f"old({arguments})", {**MEANT, "old": old})
    classes = [code.partition("(")[0].rpartition(".")[2] for code in codes(right)]
    kinds = [getattr(package, one, None) or getattr(models.layers, one, None) for one in classes if one[:1].isupper()]
    assert right == "arguments of the modules" or isinstance(made, tuple(kind for kind in kinds if kind)), type(made)


@pytest.mark.parametrize(
    "right", [right for section in ("From 0.1", "From 0.2") for _, right in rows(section) if "`" in right]
)
def test_what_stands_on_the_right_is_there(right: str) -> None:
    for code in codes(right):
        name = code.partition("(")[0].rpartition(".")[2]
        if name[:1].isupper() and not name.startswith("Tr"):
            found = getattr(package, name, None) or getattr(models.layers, name)
            keywords = re.findall(r"(\w+)=", code.partition("(")[2])
            owner = package.LongNetConfig if name.startswith("LongNet") else found
            parameters = inspect.signature(owner).parameters
            nested = inspect.signature(package.RingAttentionConfig).parameters
            assert all(one in parameters or one in nested or one in ("activation", "vocab_size") for one in keywords)


def test_options_of_the_official_package_are_arguments_here() -> None:
    parameters = inspect.signature(package.MultiheadDilatedAttention).parameters
    for _, right in rows("From the official package"):
        for code in codes(right):
            name = code.partition("=")[0].partition(" ")[0]
            if name != "h" and name != "key_padding_mask":
                assert name in parameters, name
