"""`plan --model`: bytes against what autograd saves and what a GPU allocates, meshes, hours, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import call, fails

from dilated_attention_pytorch.cli.model_cost import ModelCost, meshes
from dilated_attention_pytorch.models import LongNetLM
from dilated_attention_pytorch.training import PRESETS, TrainConfig, Trainer, build_corpus
from dilated_attention_pytorch.training.distributed import World

SMALL = TrainConfig(
    d_model=64, nhead=4, num_layers=2, dim_feedforward=192, segment_lengths=(32, 128), dilation_rates=(1, 2),
    context=128, micro_batch_size=2, batch_size=4, precision="fp32",
)  # fmt: skip


def saved(config: TrainConfig, device: str = "cpu") -> int:
    """Bytes that autograd keeps from a forward, parameters left out; each storage once."""
    model = LongNetLM(config.model_config(), device=device)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    weights = {shape for p in model.parameters() if p.dim() == 2 for shape in (p.shape, p.shape[::-1])}
    kept: dict[int, Any] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        copy = x.dtype is not torch.float32 and x.shape in weights  # autocast's of a weight
        if x.dtype is not torch.int64 and not copy:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    half = config.precision != "fp32"
    tokens = torch.randint(256, (config.micro_batch_size, config.context), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast(device, torch.bfloat16, half):
        model(tokens)
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in own)


@pytest.mark.parametrize("change", [{}, {"nhead": 2, "dim_feedforward": 64}, {"segment_shift": "alternate"}])
def test_a_layer_saves_what_the_formula_says(change: dict[str, Any]) -> None:
    config = replace(SMALL, **change)
    assert saved(replace(config, num_layers=3)) - saved(config) == ModelCost(config, 1).saved_by_layer()


@pytest.mark.gpu
def test_a_layer_saves_what_the_formula_says_in_bf16() -> None:
    """Copies that autocast makes of rows count, those of weights do not."""
    config = replace(SMALL, precision="bf16", context=4096)
    found = saved(replace(config, num_layers=3), "cuda") - saved(config, "cuda")
    assert found == pytest.approx(ModelCost(config, 1).saved_by_layer(), rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("context", [8192, 65536])
def test_the_peak_of_a_gpu_is_the_planned_one(context: int, again: bool, tmp_path: Path) -> None:
    """Within 10% of `torch.cuda.max_memory_allocated`, over three steps; benchmarks/train_gpu.py has several GPUs."""
    config = replace(
        PRESETS["base"], context=context, batch_size=1, steps=3, warmup_steps=0, eval_every=3, eval_excerpts=1,
        gradient_checkpointing=again, precision="bf16",
    )  # fmt: skip
    (tmp_path / "text.txt").write_bytes(bytes(32 + i * i % 90 for i in range(6 * context)))
    corpus = build_corpus(tmp_path / "text.txt", val_fraction=0.3, cache=tmp_path / "cache")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    Trainer(config, corpus, tmp_path / "run", world=World(0, 1, torch.device("cuda", 0))).run()
    assert ModelCost(config, 1).peak() == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)


def test_shards_and_recomputation_save_what_they_are_for() -> None:
    config = replace(PRESETS["base"], gradient_checkpointing=False)
    by_mesh = {
        (c.config.context_parallel, c.config.shard_parameters, c.config.gradient_checkpointing): c
        for c in meshes(config, 8)
    }
    assert len(by_mesh) == 10
    whole, sharded, shared = by_mesh[1, False, False], by_mesh[1, True, False], by_mesh[8, True, False]
    assert whole.parameters == sum(p.numel() for p in LongNetLM(config.model_config(), device="meta").parameters())
    assert sharded.states()["optimizer"] == -(-whole.parameters // 8) * 8
    assert whole.exchange()["kept rows"] == 0 < shared.exchange()["kept rows"]
    assert shared.tokens == whole.tokens // 8
    for (shards, is_sharded, again), cost in by_mesh.items():
        assert again or by_mesh[shards, is_sharded, True].peak() < cost.peak()
    assert whole.flops == shared.flops > 6 * whole.parameters * config.batch_size * config.context
    assert [c.config.context_parallel for c in meshes(replace(config, batch_size=1), 8)] == [8, 8]


def test_the_command_finds_a_mesh(tmp_path: Path) -> None:
    def plan(*arguments: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(call("plan", "--json", "--model", *arguments))
        return found

    roomy, tight = plan("base", "--devices", "8"), plan("base", "--devices", "8", "--memory", "2")
    assert not roomy["mesh"]["shard_parameters"] and roomy["mesh"]["fits"]
    assert tight["mesh"]["context_parallel"] > 1 and tight["mesh"]["peak"] <= 2 * 2**30
    assert roomy["hours"] == pytest.approx(50_000 * 32 * 32768 / roomy["tokens_per_s"] / 3600)
    assert plan("base", "--mfu", "0.2", "--devices", "8")["hours"] == pytest.approx(2 * roomy["hours"])
    (tmp_path / "train.json").write_text(json.dumps(SMALL.to_dict() | {"corpus": "0"}))
    assert plan(str(tmp_path / "train.json"), "--set", "num_layers=3")["parameters"] > 0
    said = call("plan", "--model", "base", "--devices", "2", "--memory", "0.5")
    assert "Fits nowhere: more than 0.5 GiB per device on each mesh" in " ".join(said.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "huge"], "expected --model to be one of"),
        (["--model", "none.json"], "expected --model to be a preset or a file of settings, got 'none.json'"),
        (["--model", "demo", "--devices", "0"], "expected --devices to be at least 1, got 0"),
        (["--model", "demo", "--mfu", "2"], "expected --mfu of at most 1, got 2"),
        (["--model", "demo", "--memory", "-1"], "expected --memory above 0, got -1"),
        (["--model", "demo", "--set", "context=2", "--devices", "3"], "expected a batch_size that 3 devices can share"),
        (["--model", "demo", "--set", "depth=2"], "expected a field of the training config, got 'depth'"),
    ],
)
def test_the_command_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert message in fails(capsys, monkeypatch, "plan", *arguments)
