"""Embeds slides from files: longest first, batched by tokens, over ranks, and on from where a run was stopped.

A batch is decided by all slides that can be read, done or not, so an interrupted run computes the same sums in the same
order and leaves the same files.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import platform
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch.core.validation import check_bool, check_instance, check_int, quoted
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder
from dilated_attention_pytorch.models.slide.files import Slide, SlideReader, pad_slides
from dilated_attention_pytorch.models.slide.results import Embedding, ResultFolder
from dilated_attention_pytorch.models.slide.work import Batch, Outcome, Ranks, Scan, batches_of, deal, reason

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights_digest(encoder: SlideEncoder) -> str:
    """A hash of an encoder's weights, which tells checkpoints of one name apart."""
    digest = hashlib.sha256()
    for name, x in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def tokens_that_fit(encoder: SlideEncoder, dtype: torch.dtype) -> int | None:
    """About how many tokens a forward pass has room for on the encoder's device; None on a CPU.

    A layer holds its rows, q, k, v, out and two tensors of the inner width; tiles come in fp32.
    """
    device, config = encoder.cls_token.device, encoder.config
    if device.type != "cuda":
        return None
    each = dtype.itemsize * (2 * config.ffn_dim + 10 * config.embed_dim) + 4 * (config.in_chans + 2 * config.embed_dim)
    return int(0.8 * torch.cuda.mem_get_info(device)[0] / each)


@dataclass(frozen=True, kw_only=True)
class EmbedOptions:
    """How slides are embedded.

    Args:
        dtype: of the computation: fp32, or bf16 and fp16 under autocast.
        layers: hidden states to write, 0 (the embeddings) to the encoder's `depth`.
        tiles: whether to write each tile's output.
        batch_tokens: most tokens of a batch.
        ring_above: slides of more tiles are shared by all ranks; by default those that no device has room for.

    Raises:
        ValueError: another dtype; a number out of range.
    """

    dtype: torch.dtype = torch.float32
    layers: tuple[int, ...] = ()
    tiles: bool = False
    batch_tokens: int = 16_384
    ring_above: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dtype, torch.dtype) or self.dtype not in _DTYPES:
            raise ValueError(f"expected dtype to be one of {list(_DTYPES)}, got {quoted(self.dtype)}")
        check_instance("layers", self.layers, tuple, list)
        check_bool("tiles", self.tiles)
        for name in ("batch_tokens", "ring_above"):
            if getattr(self, name) is not None or name != "ring_above":
                object.__setattr__(self, name, check_int(name, getattr(self, name), 1))


def run_settings(encoder: SlideEncoder, reader: SlideReader, checkpoint: str, options: EmbedOptions) -> dict[str, Any]:
    """Everything that decides a run's numbers, in types that JSON has."""
    from dilated_attention_pytorch import __version__

    numpy = importlib.import_module("numpy").__version__
    versions = {"dilated_attention_pytorch": __version__, "torch": str(torch.__version__), "numpy": numpy}
    return {
        "checkpoint": checkpoint,
        "weights": weights_digest(encoder),
        "config": encoder.config.to_dict(),
        "dtype": str(options.dtype).removeprefix("torch."),
        "layers": list(options.layers),
        "tiles": options.tiles,
        "batch_tokens": options.batch_tokens,
        "grid": reader.grid,
        "patch_size_level0": reader.patch_size_level0,
        "coords_folder": None if reader.coords_folder is None else str(reader.coords_folder.resolve()),
        "device": encoder.cls_token.device.type,
        "versions": versions | {"python": platform.python_version()},
    }


class SlideEmbedder:
    """Embeds the slides of files into a folder.

    Args:
        encoder: in evaluation mode, on the device that computes.
        reader: of the files, for this encoder.
        folder: where results go.
        options: how; `EmbedOptions()` by default.
        ranks: the processes that share the work.

    Raises:
        ValueError: a layer that is not there; an encoder in training mode.
    """

    def __init__(
        self,
        encoder: SlideEncoder,
        reader: SlideReader,
        folder: ResultFolder,
        options: EmbedOptions | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        check_instance("encoder", encoder, SlideEncoder)
        check_instance("reader", reader, SlideReader)
        check_instance("folder", folder, ResultFolder)
        check_instance("options", options, EmbedOptions, type(None))
        check_instance("ranks", ranks, Ranks, type(None))
        if encoder.training:
            raise ValueError("expected an encoder in evaluation mode, got one in training: call eval() first")
        self.options, self.ranks = options or EmbedOptions(), ranks or Ranks()
        for layer in self.options.layers:
            check_int("layers", layer, 0, encoder.config.depth + 1)
        self.encoder, self.reader, self.folder = encoder, reader, folder
        # Ranks with less memory than others decide: all have to agree.
        fits = self.ranks.gather(self.options.ring_above or tokens_that_fit(encoder, self.options.dtype))
        self._ring_above = None if self.ranks.size == 1 or None in fits else min(fits)
        self._over_ranks: SlideEncoder | None = None

    def run(self, found: Scan) -> Iterator[Outcome]:
        """Embed what has no result yet, and give an outcome for each slide of this rank: also for those that are there.

        The first rank gives those that the scan could not read. Every rank has to go through to the end.
        """
        sizes, first = found.sizes, self.ranks.rank == 0
        done = set(self.ranks.from_first([path for path in sizes if self.folder.has(*self.reader.sources(path))]))
        yield from found.failed if first else ()
        yield from (Outcome(path.stem, sizes[path], was_there=True) for path in sizes if path in done and first)
        most = max(sizes.values(), default=0) if self._ring_above is None else self._ring_above
        tokens = min(self.options.batch_tokens, most + 1)
        alone = {path: tiles for path, tiles in sizes.items() if tiles <= most}
        for path in sizes:
            if path not in alone and path not in done:
                yield from self._shared(path, sizes[path])
        left = [batch for batch in batches_of(alone, tokens) if not done.issuperset(batch)]
        mine = deal(left, sizes, self.ranks.size)[self.ranks.rank]
        for batch, slides in self._ahead(mine):
            yield from self._batch(batch, slides, sizes, done)

    def _ahead(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, list[Slide | str]]]:
        """Batches as they are read, one ahead of what is computed."""
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(self._read, batch) for batch in batches[:1]]
            for i, batch in enumerate(batches):
                slides = waiting.pop().result()
                waiting += [pool.submit(self._read, following) for following in batches[i + 1 : i + 2]]
                yield batch, slides

    def _read(self, batch: Batch) -> list[Slide | str]:
        """Each slide, or why it cannot be read."""
        found: list[Slide | str] = []
        for path in batch:
            try:
                found.append(self.reader.read(path))
            except Exception as error:  # half a file can raise anything
                found.append(reason(error))
        return found

    def _batch(
        self, batch: Batch, slides: list[Slide | str], sizes: dict[Path, int], done: set[Path]
    ) -> Iterator[Outcome]:
        good: list[Slide] = []
        for path, slide in zip(batch, slides, strict=True):
            if isinstance(slide, Slide):
                good.append(slide)
            elif path not in done:
                yield Outcome(path.stem, sizes[path], slide)
        if not good:
            return
        there = {path.stem for path in done}
        new = [(i, slide) for i, slide in enumerate(good) if slide.name not in there]
        try:
            pooled, layers, tiles = self._encode(self.encoder, *pad_slides(good))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            yield from (Outcome(slide.name, slide.tiles.shape[1], reason(error)) for _, slide in new)
        else:
            for i, slide in new:
                own = None if tiles is None else tiles[i, : slide.tiles.shape[1]]
                yield self._written(slide, pooled[i], layers[:, i], own)

    def _shared(self, path: Path, num_tiles: int) -> Iterator[Outcome]:
        """One slide over all ranks; the first writes it."""
        (slide,) = self._read((path,))
        problem = next((one for one in self.ranks.gather(slide if isinstance(slide, str) else None) if one), None)
        result: Any = None
        if problem is None and isinstance(slide, Slide):
            if self._over_ranks is None:
                import torch.distributed as dist

                self._over_ranks = copy.deepcopy(self.encoder)
                assert dist.group.WORLD is not None
                self._over_ranks.shard_context(dist.group.WORLD)
            size = -(-num_tiles // self.ranks.size)
            mine = slice(self.ranks.rank * size, (self.ranks.rank + 1) * size)
            try:
                result = self._encode(self._over_ranks, slide.tiles[:, mine], slide.coords[:, mine], None)
            except (ValueError, RuntimeError, NotImplementedError) as error:
                problem = reason(error)
            problem = next((one for one in self.ranks.gather(problem) if one), None)
        if problem is None and self.options.tiles:
            parts = self.ranks.gather(result[2])
            result = (*result[:2], torch.cat(parts, 1))
        if self.ranks.rank == 0:
            if problem is not None or not isinstance(slide, Slide):
                yield Outcome(path.stem, num_tiles, problem)
            else:
                pooled, layers, tiles = result
                yield self._written(slide, pooled[0], layers[:, 0], None if tiles is None else tiles[0])

    @torch.inference_mode()
    def _encode(
        self, encoder: SlideEncoder, tiles: Tensor, coords: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Embeddings `(B, D)`, layers `(n, B, D)` and tiles `(B, L, D)` on the CPU, in fp32."""
        device = encoder.cls_token.device
        cast = nullcontext() if self.options.dtype == torch.float32 else torch.autocast(device.type, self.options.dtype)
        with cast, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "expected about one tile on each place")  # the reader has said it
            given = [None if x is None else x.to(device) for x in (tiles, coords, mask)]
            out = encoder(*given)
        layers = out.layers[list(self.options.layers)] if self.options.layers else out.layers[:0]
        own = out.tiles.float().cpu() if self.options.tiles else None
        return out.pooled.float().cpu(), layers.float().cpu(), own

    def _written(self, slide: Slide, pooled: Tensor, layers: Tensor, tiles: Tensor | None) -> Outcome:
        count = slide.tiles.shape[1]
        if not all(bool(x.isfinite().all()) for x in (pooled, layers)):
            return Outcome(slide.name, count, f"expected a finite embedding, got NaN or inf in {self.options.dtype}")
        about = {"slide": slide.name, "num_tiles": count, "tile_size": slide.tile_size, "read_as": slide.said}
        corners = None if tiles is None else slide.corners
        try:
            self.folder.write(slide.name, Embedding(pooled, layers, tiles, corners, about))
        except OSError as error:
            return Outcome(slide.name, count, reason(error))
        return Outcome(slide.name, count, said=slide.said, doubts=slide.doubts)
