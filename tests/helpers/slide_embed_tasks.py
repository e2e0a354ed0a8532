"""What the workers of test_slide_command.py run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.slide.embed import EmbedOptions, SlideEmbedder, run_settings
from dilated_attention_pytorch.models.slide.files import SlideReader, find_slides
from dilated_attention_pytorch.models.slide.results import ResultFolder
from dilated_attention_pytorch.models.slide.work import Outcome, Ranks, scan


def embed(groups: Any, folder: str, checkpoint: str, out: str, ring_above: int | None) -> list[Outcome]:
    """Every slide of a folder; the outcomes of this rank."""
    ranks = Ranks(dist.get_rank(), dist.get_world_size()) if groups else Ranks()
    encoder = SlideEncoder.from_pretrained(checkpoint)
    reader = SlideReader.of(encoder.config)
    how = EmbedOptions(layers=(1,), tiles=True, batch_tokens=200, ring_above=ring_above)
    results = ResultFolder(Path(out), "npz", run_settings(encoder, reader, "tiny", how))
    embedder = SlideEmbedder(encoder, reader, results, how, ranks)
    if ranks.rank == 0:
        with results.held():
            pass
    found = ranks.from_first(scan(find_slides(Path(folder)), reader))
    return list(embedder.run(found))
