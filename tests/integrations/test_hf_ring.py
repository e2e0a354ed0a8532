"""A switched model over ranks that share each sequence: equal to one process, and what it refuses."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
transformers = pytest.importorskip("transformers")

from dilated_attention_pytorch.integrations.transformers import ShardingCollator, use_dilated_attention  # noqa: E402
from dilated_attention_pytorch.integrations.transformers.sharding import set_group  # noqa: E402
from dilated_attention_pytorch.integrations.transformers.switch import attention_layers  # noqa: E402
from dilated_attention_pytorch.testing import relative_norm  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
# Three steps of the example by SGD, whose change of the weights is the sum of the gradients; then rows with padding.
WORKER = """
import sys
sys.path.insert(0, sys.argv[1])
import torch, torch.distributed as dist
import context_parallel_llama as example
from dilated_attention_pytorch.integrations.transformers import ShardingCollator
from dilated_attention_pytorch.training.distributed import complete, join
torch.set_num_threads(1)
with join("cpu") as world:
    model = example.shared(32, 96, world)
    start = {name: complete(p.detach()).clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    losses = example.train(model, optimizer, 96, 3, world)
    moved = {name: complete(p.detach()) - start[name] for name, p in model.named_parameters()}
    tokens = torch.arange(2 * 96).view(2, 96) * 7 % 256
    mask = torch.ones_like(tokens)
    mask[1, 40:] = 0
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": tokens.masked_fill(mask == 0, -100)}
    if world.size > 1:
        batch = ShardingCollator(dist.group.WORLD, lambda whole: whole)(batch)
    padded = model(**batch)
    loss = float(world.sum(padded.loss.detach().clone())) / world.size
    if world.is_main:
        torch.save({"losses": [*losses, loss], "moved": moved, "logits": padded.logits.detach()}, sys.argv[2])
"""


def run(processes: int, out: Path) -> dict[str, Any]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port}
        env = os.environ | {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, "-c", WORKER, str(EXAMPLES), str(out)]
        started.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return torch.load(out, weights_only=True)


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """Losses and gradients in fp32, whose sums have another order: to 1e-5 of their size."""
    one, two = (run(processes, tmp_path / f"{processes}.pt") for processes in (1, 2))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for name, moved in one["moved"].items():
        assert moved.norm() > 0 and relative_norm(two["moved"][name], moved) < 1e-5 * 96**0.5, name
    assert relative_norm(two["logits"], one["logits"][:, :48]) < 1e-4  # of weights that differ by rounding


def group(rank: int, size: int) -> Any:
    return SimpleNamespace(rank=lambda: rank, size=lambda: size, group_name="none")


def test_the_collator_shifts_labels_before_the_cut() -> None:
    tokens = torch.arange(12)[None]
    whole = {"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)}
    parts = [ShardingCollator(group(rank, 3), dict)(whole) for rank in range(3)]
    assert [part["input_ids"].tolist()[0] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [part["position_ids"].tolist()[0] for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [part["shift_labels"].tolist()[0] for part in parts] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, -100]]
    assert all(part["num_items_in_batch"] == 11 / 3 and "attention_mask" not in part for part in parts)
    assert set(whole) == {"input_ids", "labels", "attention_mask"}
    unlabelled = ShardingCollator(group(0, 2), dict)({"input_ids": tokens})
    assert set(unlabelled) == {"input_ids", "position_ids"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": torch.zeros(1, 11)}, "expected a length that is a multiple of 2 ranks, got 11: .*multiple_of=2"),
        ({"attention_mask": torch.tensor([[0] + [1] * 11])}, "expected padding on the right alone"),
        ({"pixel_values": torch.zeros(1, 3, 4)}, r"expected pixel_values of shape \(B, 12\), got \(1, 3, 4\)"),
        ({"texts": ["a"]}, r"expected texts of shape \(B, 12\), got list"),
    ],
)
def test_the_collator_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShardingCollator(group(0, 2), dict)({"input_ids": torch.zeros(1, 12, dtype=torch.long)} | change)


def test_what_a_shard_cannot_have_is_refused() -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.randint(64, (1, 12))
    with pytest.raises(TypeError, match="expected process_group to be a ProcessGroup, a DeviceMesh or None, got int"):
        use_dilated_attention(model, [8, 16], [1, 2], process_group=2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected a DeviceMesh with mesh_dim='context', got NoneType"):
        use_dilated_attention(model, [8, 16], [1, 2], mesh_dim="context")
    assert model.config._attn_implementation != "dilated"
    use_dilated_attention(model, [8, 16], [1, 2])
    wanted = model(tokens).logits
    layers = attention_layers(model)
    set_group(layers, group(0, 2))
    with pytest.raises(ValueError, match=r"expected whole sequences, padded on the right .*, got packed documents"):
        model(tokens, position_ids=torch.tensor([[*range(5), *range(7)]]))
    cache = transformers.DynamicCache()
    set_group(layers, None)
    model(tokens, past_key_values=cache, use_cache=True)
    set_group(layers, group(0, 2))
    with pytest.raises(ValueError, match="got a cache, 1 queries over 13 keys"):
        model(tokens[:, :1], past_key_values=cache, use_cache=True)
    set_group(layers, None)
    assert torch.equal(model(tokens).logits, wanted)
