"""A Llama switched to dilated attention and fine-tuned with transformers' Trainer: all of its savings at once.

    python examples/finetune_trainer.py                       # trains its own small Llama first, on the CPU
    python examples/finetune_trainer.py --model some/folder   # any causal model of transformers that lies in a folder

- LoRA (PEFT): the weights stay, and small factors beside every linear layer learn.
- Packing: documents of any length lie one after the other in a row, without padding; none sees another.
- Gradient checkpointing: layers are computed again in the backward.
- torch.compile: after the first batch, one graph serves documents of any lengths.

The small Llama learns Python's standard library with dense attention, in excerpts; the documents are its functions and
classes. Held-out losses, in nats a byte, are printed before and after.

Needs: pip install '.[examples]'
"""

from __future__ import annotations

import argparse
import re
import tempfile

import torch
from convert_llama import small_llama, train
from peft import LoraConfig, PeftModel, get_peft_model
from text import standard_library
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, PreTrainedModel, Trainer, TrainingArguments

from dilated_attention_pytorch.integrations.transformers import use_dilated_attention


def documents(text: Tensor, longest: int) -> list[dict[str, list[int]]]:
    """The functions and classes of a text, and what stands between them; of each the first `longest` bytes."""
    parts = re.split(rb"\n(?=def |class )", text.numpy().tobytes())
    return [{"input_ids": list(part[:longest])} for part in parts if len(part) > 1]


def adapted(model: PreTrainedModel, longest: int) -> PeftModel:
    """The model with dilated attention, near neighbours in full and farther ones more sparsely, and LoRA to learn."""
    use_dilated_attention(model, [longest // 8, longest // 2, longest], [1, 2, 4])
    model.config.use_cache = False
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear"))
    model.gradient_checkpointing_enable()  # not by TrainingArguments, which would do so after the next line
    # It lets the frozen embeddings ask for gradients. Only reentrant checkpointing needs that, and no graph can do it.
    model.disable_input_require_grads()
    return model


def trainer(model: PeftModel, data: list[dict[str, list[int]]], folder: str, **settings: object) -> Trainer:
    """A Trainer whose rows are packed documents, the last twentieth of which is held out."""
    seen = len(data) * 19 // 20
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=8, per_device_eval_batch_size=8, learning_rate=5e-3, report_to=[],
        save_strategy="no", logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        **settings,
    )  # fmt: skip
    packed = DataCollatorWithFlattening()  # a batch becomes one row, whose position_ids begin again with each document
    return Trainer(model, arguments, train_dataset=data[:seen], eval_dataset=data[seen:], data_collator=packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a folder that from_pretrained reads; its tokens must be bytes")
    parser.add_argument("--longest", type=int, default=1024, help="documents are cut to so many bytes")
    parser.add_argument("--steps", type=int, default=100, help="of the dense training")
    parser.add_argument("--fine-tune-steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=128)
    # On a CPU inductor compiles for minutes; without it the graphs are the same.
    fastest = "inductor" if torch.cuda.is_available() else "aot_eager"
    parser.add_argument("--compiler", default=fastest, help="torch.compile's backend")
    parser.add_argument("--text", type=int, default=1_000_000, help="bytes of it")
    options = parser.parse_args()
    torch.manual_seed(0)
    text = standard_library(options.text)
    if options.model:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    else:
        model = small_llama(options.width, options.longest)
        train(model, text, options.longest // 4, 2 * options.longest, options.steps, seed=0)

    model = adapted(model, options.longest)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        tuned = trainer(
            model, documents(text, options.longest), folder, max_steps=options.fine_tune_steps, torch_compile=True,
            torch_compile_backend=options.compiler, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        before = tuned.evaluate()["eval_loss"]
        print(f"dilated, before fine-tuning: {before:.3f}", flush=True)
        tuned.train()
        after = tuned.evaluate()["eval_loss"]
    print(f"dilated, after fine-tuning: {after:.3f}")
    if not after < before:
        raise SystemExit("the loss has not fallen")


if __name__ == "__main__":
    main()
