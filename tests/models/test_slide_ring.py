"""A slide over two real processes is the slide on one, gradients included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import slide_tasks
import torch
from ring_pool import Pool
from slide_tasks import model, objective, slides

from dilated_attention_pytorch.testing import relative_norm


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(2, [2], "slide_tasks")
    yield pool
    pool.close()


# Cuts anywhere; in the second only the first rank's shard changes, in the fourth one rank has the cls token alone.
BOUNDS = [[0, 30, 61], [0, 25, 56], [0, 25, 61], [0, 0, 40]]


@pytest.mark.parametrize(("masked", "padding"), [(False, "none"), (True, "none"), (False, "zero_keys")])
@pytest.mark.parametrize("global_pool", [False, True])
def test_shards_are_the_whole(pool: Pool, global_pool: bool, masked: bool, padding: str) -> None:
    options: dict[str, Any] = {"global_pool": global_pool, "drop_path": 0.0, "padding": padding}
    shards = pool.run("encode", BOUNDS, masked, options, masked)
    encoder = model(**options)
    for i, cuts in enumerate(BOUNDS):
        tiles, coords, mask = slides(cuts[-1], masked)
        want = encoder(tiles, coords, mask)
        encoder.zero_grad()
        objective(want.pooled, want.layers).backward()
        for rank, found in enumerate(one[i] for one in shards):
            assert relative_norm(found["pooled"], want.pooled) < 1e-12
            assert relative_norm(found["layers"], want.layers) < 1e-12
            mine = want.tiles[:, cuts[rank] : cuts[rank + 1]]
            assert found["tiles"].shape == mine.shape
            if mine.numel():
                assert relative_norm(found["tiles"], mine) < 1e-12
            whole = torch.cat([p.grad.flatten() for p in encoder.parameters()]).norm()
            for name, parameter in encoder.named_parameters():
                assert (found[name] - parameter.grad).norm() <= 1e-12 * whole, name


def test_ranks_drop_the_same_paths(pool: Pool) -> None:
    first, second = pool.run("drop_alike")
    assert len(first) == 8 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert len({tuple(f.flatten().tolist()) for f in first}) > 1


def test_what_ring_attention_does_not_have(tmp_path: Any) -> None:
    import torch.distributed as dist

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="for a sequence over several ranks"):
            model(mixing_gradient="detached").shard_context(dist.group.WORLD)
        official = model(padding="zero_keys")
        official.shard_context(dist.group.WORLD)
        with pytest.raises(ValueError, match="expected no mask with padding='zero_keys' on a sharded model"):
            official(*slides(30, True))
        encoder = model().eval()
        tiles, coords, _ = slides(30, False)
        want = encoder(tiles, coords)
        encoder.shard_context(dist.group.WORLD)
        got = encoder(tiles, coords)
        assert torch.equal(got.pooled, want.pooled) and torch.equal(got.tiles, want.tiles)
        with pytest.raises(ValueError, match="not sharded for an attention map"):
            encoder.attention_map(tiles[:1], coords[:1], layer=0)
    finally:
        dist.destroy_process_group()


def test_the_tasks_have_branches_that_cross_the_cut() -> None:
    lengths = slide_tasks.TINY["segment_lengths"]
    assert any(w > 30 for w in lengths) and any(w < 30 and 31 % w for w in lengths)
