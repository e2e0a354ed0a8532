"""Compares `SlideEncoder` with the official package, where someone has it installed (it needs a GPU and flash-attn).

    python benchmarks/official_parity.py [--checkpoint slide_encoder.pth] [--max-wsi-size 262144]

The official model is built as its own `gigapath_slide_enc12l768d`, at random or with the checkpoint, and its state dict
is loaded here, strictly. The official attention runs in half precision alone, so both are judged by this package in
fp32: the official result, and its gradients, may be twice as far from that as this package's own under the same
autocast. Lengths that do not divide are among those compared: there a wrong rule differs by a third, not by rounding.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.testing import relative_norm

TILES = (4, 1023, 1068, 5791, 10_006, 23_170)


def official(max_wsi_size: int, checkpoint: Path | None) -> Any:
    try:
        from gigapath.slide_encoder import LongNetViT
    except ImportError as error:
        sys.exit(
            f"expected the official package, found none ({error}): clone prov-gigapath/prov-gigapath from GitHub, and "
            "pip install it with its flash-attn, fairscale, timm and einops. "
            "tests/models/test_official_parity.py compares with a plain re-statement of its rules on any machine."
        )
    model = LongNetViT(
        embed_dim=768,
        depth=12,
        mlp_ratio=4,
        max_wsi_size=max_wsi_size,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    if checkpoint is not None:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state))
    return model.cuda().eval()


def results(model: Any, tiles: Tensor, coords: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The last output, those of all layers, and the gradient of everything."""
    model.zero_grad()
    with torch.autocast("cuda", torch.float16, enabled=autocast):
        if isinstance(model, SlideEncoder):
            out = model(tiles, coords)
            last, every = out.pooled, out.layers
        else:
            with torch.no_grad():
                every = torch.stack(model(tiles, coords, all_layer_embed=True))
            (last,) = model(tiles, coords)
    last.float().sum().backward()
    names = sorted(name for name, p in model.named_parameters() if p.grad is not None)
    found = dict(model.named_parameters())
    return {
        "last": last.detach(),
        "every layer": every.detach(),
        "gradients": torch.cat([found[name].grad.float().flatten() for name in names]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="slide_encoder.pth; random weights without it")
    parser.add_argument("--max-wsi-size", type=int, default=262_144)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    theirs = official(arguments.max_wsi_size, arguments.checkpoint)
    state = theirs.state_dict()
    ours = SlideEncoder.from_pretrained(state, arguments.max_wsi_size, mixing_gradient="detached", device="cuda")
    assert {name for name, _ in theirs.named_parameters()} == {name for name, _ in ours.named_parameters()}
    wrong = 0
    for n in TILES:
        generator = torch.Generator().manual_seed(n)
        tiles = torch.randn(1, n, 1536, generator=generator).cuda()
        coords = (256 * torch.randint(0, 1000, (1, n, 2), generator=generator)).cuda()
        truth = results(ours, tiles, coords, False)
        half, there = results(ours, tiles, coords, True), results(theirs, tiles, coords, True)
        for part, want in truth.items():
            mine, other = relative_norm(half[part], want), relative_norm(there[part], want)
            verdict = "equal to rounding" if other <= 2 * mine else "DIFFERENT"
            wrong += other > 2 * mine
            print(f"{n:>6,} tiles, {part:<12} official {other:.1e} from fp32, ours in fp16 {mine:.1e}: {verdict}")
    if wrong:
        sys.exit(f"{wrong} results differ by more than rounding")


if __name__ == "__main__":
    main()
