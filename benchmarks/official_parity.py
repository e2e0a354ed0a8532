"""Compares `SlideEncoder` with the official package, where someone has it installed.

    python benchmarks/official_parity.py [--checkpoint slide_encoder.pth] [--device cpu] [--tiles 4,1023,1068]

It needs a checkout of github.com/prov-gigapath/prov-gigapath on the import path (PYTHONPATH), and timm, fairscale,
einops, huggingface_hub and numpy; on a GPU flash-attn besides. What is missing is named, all of it.

The official model is built as its own `gigapath_slide_enc12l768d`, at random or with the checkpoint, and its state dict
is loaded here, strictly. Its table of positions is not in checkpoints, so a grid of `--grid` columns is as good as one
of 1,000, whose table takes 3 GB. Lengths that do not divide are among those compared: there a wrong rule differs by a
third, not by rounding.

On a CPU the official code has no attention, because flash-attn has none: torch's own takes that one place, and both
models are compared in fp32. On a GPU the official attention runs in half precision alone, so both are judged by this
package in fp32: the official result, and its gradients, may be twice as far from that as this package's own under the
same autocast.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.testing import relative_norm

TILES = {"cpu": (4, 1023, 1068), "cuda": (4, 1023, 1068, 5791, 10_006, 23_170)}
LIMIT = 1e-5  # relative norm in fp32; a wrong rule shows as 1e-2 or more


def check_needs(device: str) -> None:
    """Exits with the name of every module that is missing."""
    needs = ["gigapath", "timm", "fairscale", "einops", "huggingface_hub", "numpy"]
    needs += ["flash_attn"] if device == "cuda" else []
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"expected {', '.join(needs)} to compare with, found no {', '.join(missing)}: gigapath is a checkout of "
            "github.com/prov-gigapath/prov-gigapath on PYTHONPATH, the others are packages. "
            "tests/models/test_official_parity.py compares with a plain re-statement of the official rules without them"
        )


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, bias: Any = None, scale: Any = None, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """What the official code asks of flash-attn: `(B, N, H, D)` to the same, and the log-sum-exp `(B, H, N)`."""
    assert bias is None and scale is None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, dropout, is_causal)
    return out.transpose(1, 2), lse


def official(arguments: argparse.Namespace) -> Any:
    """The official model, in evaluation mode."""
    import numpy
    from gigapath.slide_encoder import LongNetViT

    numpy.set_printoptions(legacy="1.25")  # it evaluates the text of a list of NumPy's ints, which NumPy 2 changed
    if arguments.device == "cpu":
        importlib.import_module("torchscale.component.multihead_attention").flash_attn_func = plain_attention
    model = LongNetViT(
        embed_dim=768,
        depth=12,
        mlp_ratio=4,
        slide_ngrids=arguments.grid,
        max_wsi_size=arguments.max_wsi_size,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    if arguments.checkpoint is not None:
        state = torch.load(arguments.checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("model", state))
    return model.to(arguments.device).eval()


def results(model: Any, tiles: Tensor, coords: Tensor, autocast: bool) -> dict[str, Tensor]:
    """The last output, those of all layers, and the gradient of everything; both models are called alike."""
    model.zero_grad()
    with torch.autocast(tiles.device.type, torch.float16, enabled=autocast):
        with torch.no_grad():
            every = torch.stack(model(tiles, coords, all_layer_embed=True))
        last = model(tiles, coords)[-1]
    last.float().sum().backward()
    names = sorted(name for name, p in model.named_parameters() if p.grad is not None)
    found = dict(model.named_parameters())
    return {
        "last": last.detach(),
        "every layer": every.detach(),
        "gradients": torch.cat([found[name].grad.float().flatten() for name in names]),
    }


def compare(ours: Any, theirs: Any, tiles: Tensor, coords: Tensor) -> int:
    """Prints how far the results are from each other; how many differ by more than rounding."""
    wrong, n = 0, tiles.shape[1]
    truth = results(ours, tiles, coords, False)
    on_cpu = tiles.device.type == "cpu"
    half = truth if on_cpu else results(ours, tiles, coords, True)
    there = results(theirs, tiles, coords, not on_cpu)
    for part, want in truth.items():
        mine, other = relative_norm(half[part], want), relative_norm(there[part], want)
        limit = LIMIT if on_cpu else 2 * mine
        wrong += not other <= limit
        verdict = "equal to rounding" if other <= limit else "DIFFERENT"
        half_text = "" if on_cpu else f", ours in fp16 {mine:.1e}"
        print(f"{n:>6,} tiles, {part:<12} official {other:.1e} from ours in fp32{half_text}: {verdict}", flush=True)
    return wrong


def main() -> None:
    """Compare at each number of tiles; exit code 1 where a result differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="slide_encoder.pth; random weights without it")
    parser.add_argument("--max-wsi-size", type=int, default=262_144)
    parser.add_argument("--device", choices=list(TILES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiles", help="numbers of tiles with commas between them")
    parser.add_argument("--grid", type=int, default=200, help="side of the grid of positions, in tiles")
    arguments = parser.parse_args()
    check_needs(arguments.device)
    torch.manual_seed(0)
    theirs = official(arguments)
    options: dict[str, Any] = {"mixing_gradient": "detached", "slide_ngrids": arguments.grid}
    ours = SlideEncoder.from_pretrained(theirs.state_dict(), arguments.max_wsi_size, device=arguments.device, **options)
    assert {name for name, _ in theirs.named_parameters()} == {name for name, _ in ours.named_parameters()}
    counts = TILES[arguments.device] if arguments.tiles is None else map(int, arguments.tiles.split(","))
    wrong = 0
    for n in counts:
        generator = torch.Generator().manual_seed(n)
        places = torch.randperm(arguments.grid**2, generator=generator)[:n]
        coords = 256 * torch.stack((places // arguments.grid, places % arguments.grid), 1)[None]
        tiles = torch.randn(1, n, 1536, generator=generator)
        wrong += compare(ours, theirs, tiles.to(arguments.device), coords.to(arguments.device))
    if wrong:
        sys.exit(f"{wrong} results differ by more than rounding")


if __name__ == "__main__":
    main()
