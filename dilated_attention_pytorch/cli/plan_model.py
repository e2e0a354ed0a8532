"""`plan --model`: whether a training run fits some devices, on which mesh, and how long it takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dilated_attention_pytorch.cli.options import console, human_bytes, human_count, print_table
from dilated_attention_pytorch.core.validation import check_above_zero, check_positive_int, quoted


def plan_model(
    name: str, settings: dict[str, str], *, devices: int, memory: float, tflops: float, mfu: float, as_json: bool
) -> None:
    """Print what a run costs on `devices` devices of `memory` GiB and `tflops` TFLOP/s, of which a share is reached."""
    from dilated_attention_pytorch.cli.model_cost import ModelCost, meshes
    from dilated_attention_pytorch.training import preset, read_settings

    check_positive_int("devices", devices)
    for option, value in (("memory", memory), ("tflops", tflops), ("mfu", mfu)):
        check_above_zero(option, value)
    if mfu > 1:
        raise ValueError(f"expected mfu of at most 1, got {mfu}")
    given: dict[str, Any] = {}
    if name.endswith((".json", ".yaml", ".yml")):
        if not Path(name).is_file():
            raise ValueError(f"expected --model to be a preset or a file of settings, got {quoted(name)}")
        given = {k: v for k, v in read_settings(Path(name)).items() if k != "corpus" and not k.startswith("data.")}
        name = given.pop("preset", None) or "demo"
    config = preset(name).changed(given | settings)
    found, limit = [describe(cost, limit=int(memory * 2**30)) for cost in meshes(config, devices)], memory
    if not found:
        raise ValueError(
            f"expected a batch_size that {devices} devices can share, got {config.batch_size} in sequences of "
            f"micro_batch_size {config.micro_batch_size}"
        )
    best: dict[str, Any] = next((one for one in found if one["fits"]), found[-1])
    cost = ModelCost(config.changed({k: best[k] for k in _MESH}), devices)
    tokens_per_s = devices * tflops * 1e12 * mfu * config.batch_size * config.context / cost.flops
    whole = {
        "parameters": cost.parameters, "flops_per_step": cost.flops, "tokens_per_s": tokens_per_s,
        "hours": config.steps * config.batch_size * config.context / tokens_per_s / 3600, "mesh": best, "meshes": found,
    }  # fmt: skip
    if as_json:
        print(json.dumps(whole, indent=1))
        return
    rows = []
    for one in found:
        activations = f"{human_bytes(one['kept activations'])}{', again' if one['gradient_checkpointing'] else ''}"
        states = sum(one[part] for part in ("parameters", "optimizer", "gradients", "gathered parameters"))
        sizes = (human_bytes(states), activations, human_bytes(one["logits"]), human_bytes(one["per step"]))
        rows.append((_mesh(one, devices), *sizes, human_bytes(one["peak"]), "yes" if one["fits"] else "no"))
    columns = ("mesh", "states", "activations", "logits", "exchanged a step", "peak", f"fits {limit:g} GiB")
    print_table(f"bytes per device, {devices} devices, context {config.context:,}", columns, rows, left=1)
    parts = {name: human_bytes(best[name]) for name in best if name not in (*_MESH, "fits")}
    print_table(f"per device: {_mesh(best, devices)}", ("", ""), parts.items(), left=1)
    costs = {
        "parameters": human_count(cost.parameters),
        "FLOPs per step": human_count(cost.flops),
        f"tokens per second at {mfu:.0%} of {devices} x {tflops:g} TFLOP/s": f"{tokens_per_s:,.0f}",
        f"hours for {config.steps:,} steps of {config.batch_size * config.context:,} tokens": f"{whole['hours']:,.1f}",
    }
    print_table("the run", ("", ""), costs.items(), left=1)
    if not best["fits"]:
        console.print(
            f"Fits nowhere: more than {limit:g} GiB per device on each mesh. More devices help, or a smaller "
            "micro_batch_size.",
            soft_wrap=True,
        )


_MESH = ("context_parallel", "shard_parameters", "gradient_checkpointing")


def describe(cost: Any, *, limit: int) -> dict[str, Any]:
    """A mesh and its bytes per device."""
    found: dict[str, Any] = {name: getattr(cost.config, name) for name in _MESH}
    found |= cost.states() | cost.activations() | cost.exchange()
    return found | {"peak": cost.peak(), "fits": cost.peak() <= limit}


def _mesh(found: dict[str, Any], devices: int) -> str:
    shards = found["context_parallel"]
    if devices == 1:
        name = "one device"
    elif not found["shard_parameters"]:
        name = f"{devices} x DDP"
    else:
        name = f"{devices // shards} x {shards} FSDP2, context" if shards > 1 else f"{devices} x FSDP2"
    return f"{name}, checkpointed" if found["gradient_checkpointing"] else name
