"""TRIDENT's interface of a slide encoder over `SlideEncoder`: without flash-attn, on a CPU or any GPU.

TRIDENT asks an encoder for `enc_name`, `precision` and `embedding_dim`, and calls it with a batch and a device. Nothing
of TRIDENT is imported here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core import validation as check
from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.weights import WeightsSource


class GigaPathSlideEncoder(nn.Module):
    """Prov-GigaPath's slide encoder where TRIDENT expects its own.

    Args:
        weights: the checkpoint, as `SlideEncoder.from_pretrained` takes it; None with `pretrained=False` alone.
        pretrained: TRIDENT's argument. False makes a model at random.
        freeze: TRIDENT's argument. True takes gradients from the parameters.
        layer: the hidden state whose embedding is returned, 0 to depth; TRIDENT takes 11 of 0 to 12. None for the
            output after the encoder's own LayerNorm, the official code's default.
        precision: the dtype that TRIDENT autocasts to, or float32 for none. TRIDENT itself takes float16.
        options: those of `SlideEncoder.from_pretrained`; `global_pool` is True unless said, as TRIDENT has it.

    Raises:
        ValueError: no weights; a layer that is not there; weights of another model.

    Example:
        >>> encoder = GigaPathSlideEncoder(pretrained=False, layer=1, in_chans=8, embed_dim=16,
        ...                                depth=2, num_heads=4)
        >>> batch = {"features": torch.randn(1, 5, 8),
        ...          "coords": 512 * torch.arange(10).view(1, 5, 2)}
        >>> encoder(batch | {"attributes": {"patch_size_level0": 512}}, "cpu").shape
        torch.Size([1, 16])
    """

    enc_name = "gigapath"  # by which TRIDENT finds the patch encoder

    def __init__(
        self,
        weights: WeightsSource | None = None,
        *,
        pretrained: bool = True,
        freeze: bool = True,
        layer: int | None = 11,
        precision: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        super().__init__()
        check.check_bool("pretrained", pretrained)
        check.check_bool("freeze", freeze)
        if pretrained is (weights is None):
            got = "none" if weights is None else "weights"
            raise ValueError(
                f"expected weights, a file say, or else pretrained=False, got {got} and pretrained={pretrained}"
            )
        options = {"global_pool": True, **options}
        self.model = SlideEncoder(**options) if weights is None else SlideEncoder.from_pretrained(weights, **options)
        depth = self.model.config.depth
        if layer is not None and check.check_int("layer", layer, 0) > depth:
            raise ValueError(f"expected layer to be at most {depth}, the model's depth, got {layer}")
        if not isinstance(precision, torch.dtype) or precision not in check.FLOAT_DTYPES:
            raise TypeError(f"expected precision to be a floating dtype such as float32, got {check.shown(precision)}")
        self.layer, self.precision = layer, precision
        self.embedding_dim = self.model.config.embed_dim
        if freeze:
            self.model.requires_grad_(False)
        self.model.eval()

    def forward(self, batch: Mapping[str, Any], device: torch.device | str = "cuda") -> Tensor:
        """The embedding of one slide, `(1, embedding_dim)`.

        Args:
            batch: `"features"` `(1, N, in_chans)`; `"coords"` `(1, N, 2)`, level-0 pixels of each tile's corner; and
                `"attributes"`, whose `"patch_size_level0"` is the distance of tiles at that level.
            device: where the tensors go.

        Raises:
            ValueError: a batch without one of the three; coordinates that do not fit.
        """
        missing = [name for name in ("features", "coords", "attributes") if name not in batch]
        if missing or "patch_size_level0" not in batch["attributes"]:
            missing = missing or ["attributes['patch_size_level0']"]
            raise ValueError(f"expected a batch of TRIDENT, got none of {', '.join(missing)}")
        self.model.tile_size = batch["attributes"]["patch_size_level0"]
        features, coords = batch["features"].to(device), batch["coords"].to(device)
        if self.layer is None:
            return self.model(features, coords).pooled  # type: ignore[no-any-return]
        return self.model(features, coords, all_layer_embed=True)[self.layer]  # type: ignore[no-any-return]
