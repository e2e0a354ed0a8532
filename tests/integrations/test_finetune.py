"""Trainer, LoRA, packing, gradient checkpointing and compilation together: `examples/finetune_trainer.py`."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.testing import relative_norm

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

EXAMPLES = Path(__file__).parents[2] / "examples"


class Gradients(transformers.TrainerCallback):
    """Keeps the gradients of each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **rest: Any) -> None:
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.norm() > 0.0 for grad in grads)
        self.steps.append(torch.cat([grad.flatten() for grad in grads]))


@pytest.mark.filterwarnings(
    "ignore:.*deprecated and will be removed in v6:FutureWarning"
)  # the old name is in 5.17 too
def test_a_training_step_under_compile_equals_eager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of three steps in fp32, to 1e-5 of their size; two graphs serve rows of three lengths."""
    monkeypatch.syspath_prepend(EXAMPLES)
    for name in ("text", "convert_llama", "finetune_trainer"):  # other examples have a module `text` too
        monkeypatch.delitem(sys.modules, name, raising=False)
    example, llama = importlib.import_module("finetune_trainer"), importlib.import_module("convert_llama")
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 120, (28,), generator=generator).tolist()
    data = [{"input_ids": torch.randint(256, (n,), generator=generator).tolist()} for n in lengths]
    losses, kept = [], []
    for compiles in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        model = example.adapted(llama.small_llama(32, 128), 128)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # they begin at 0, where the other factors have no gradient
                torch.nn.init.normal_(p, std=0.1)
        compiler = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiles else {}
        # With Adam the size of a step does not follow the gradient's, and rounding would grow from step to step.
        run = example.trainer(
            model, data, str(tmp_path), max_steps=3, use_cpu=True, optim="sgd", max_grad_norm=0.0, **compiler
        )
        run.add_callback(found := Gradients())
        losses.append(run.train().training_loss)
        kept.append(found.steps)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert (0 < graphs <= 2) if compiles else graphs == 0
    assert len(kept[0]) == len(kept[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for eager, compiled in zip(*kept, strict=True):
        assert relative_norm(compiled, eager) < 1e-5
