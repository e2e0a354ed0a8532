"""Documents packed into one row give what each gives alone, however it is said where they end; compiled too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from hf_models import CLOSE, NEAR, make, tokens
from transformers import DataCollatorWithFlattening, DynamicCache, Trainer, TrainingArguments

from dilated_attention_pytorch.integrations.transformers import register, use_dilated_attention

register()
DOCUMENTS = [37, 1, 60, 22]
TOTAL = sum(DOCUMENTS)
POSITIONS = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]


def collated(**options: Any) -> dict[str, Any]:
    features = [{"input_ids": part.tolist()} for part in tokens(1, TOTAL)[0].split(DOCUMENTS)]
    batch = dict(DataCollatorWithFlattening(**options)(features))
    del batch["labels"]
    return batch


def alone(model: Any) -> Tensor:
    return torch.cat([model(part[None]).logits for part in tokens(1, TOTAL)[0].split(DOCUMENTS)], 1)


WAYS: dict[str, Any] = {
    "the default cache": lambda: {"input_ids": tokens(1, TOTAL), "position_ids": POSITIONS},
    "no cache": lambda: {"input_ids": tokens(1, TOTAL), "position_ids": POSITIONS, "use_cache": False},
    "a mask of ones": lambda: {
        "input_ids": tokens(1, TOTAL), "position_ids": POSITIONS, "attention_mask": torch.ones(1, TOTAL),
    },
    "a cache of the caller's": lambda: {
        "input_ids": tokens(1, TOTAL), "position_ids": POSITIONS, "past_key_values": DynamicCache(),
    },
    "the collator": lambda: collated(),
    "all that the collator has": lambda: collated(return_flash_attn_kwargs=True, return_seq_idx=True),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "llama4", "qwen2_moe"])
def test_packed_documents_equal_each_alone(name: str, way: str) -> None:
    """Local layers keep the documents apart as well: windows and chunks begin anew."""
    model = make(name)
    torch.testing.assert_close(model(**WAYS[way]()).logits, alone(model), **(CLOSE if name == "llama" else NEAR))


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_bounds_without_positions(name: str) -> None:
    """Positions run through the row, so rotary embeddings, which are relative, are those of each document to 1e-5."""
    batch = collated(return_flash_attn_kwargs=True, return_position_ids=False)
    assert "position_ids" not in batch
    model = make(name)
    torch.testing.assert_close(model(**batch).logits, alone(model), **NEAR)
    with pytest.raises(ValueError, match="expected one packed row, without a cache"):
        model(**{**batch, "input_ids": tokens(2, TOTAL)})
    # Chunks would have to begin anew, and only positions say so to transformers.
    with pytest.raises(ValueError, match="for attention in chunks"):
        make("llama4")(**batch)


@torch.no_grad()
def test_several_packed_rows_and_padding_between_documents() -> None:
    model, x = make("llama"), tokens(2, 40)
    positions = torch.tensor([[*range(15), *range(25)], [*range(30), *[0] * 10]])
    real = torch.ones(2, 40)
    real[1, 30:] = 0
    got = model(x, position_ids=positions, attention_mask=real).logits
    for row, here in ((0, slice(0, 15)), (0, slice(15, 40)), (1, slice(0, 30))):
        torch.testing.assert_close(got[row, here], model(x[row : row + 1, here]).logits[0], **CLOSE)
    with pytest.raises(ValueError, match="hides no token inside a document"):
        real[0, 3] = 0
        model(x, position_ids=positions, attention_mask=real)


@torch.no_grad()
def test_tokens_that_fill_a_row_up() -> None:
    """As TRL's `pad_to_multiple_of` has it: each is a document."""
    x, fill = tokens(1, TOTAL), 10
    positions = torch.cat([POSITIONS, torch.zeros(1, fill, dtype=torch.int64)], 1)
    model = make("llama")
    got = model(torch.cat([x, torch.zeros_like(x[:, :fill])], 1), position_ids=positions).logits[:, :TOTAL]
    torch.testing.assert_close(got, alone(model), **CLOSE)


def compiled(model: Any, counter: list[int]) -> Any:
    """Traced whole, forward and backward, and run as traced; counts the graphs."""
    from torch._dynamo.backends.debugging import aot_eager

    def backend(graph: Any, inputs: Any) -> Any:
        counter.append(1)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4"])
def test_compiled_packing(name: str) -> None:
    """A graph serves any documents, a row without any included, and trains as eager does."""
    model, graphs, x = make(name).train(), [], tokens(1, TOTAL)
    traced = compiled(model, graphs)
    for positions in (POSITIONS, torch.arange(TOTAL)[None], torch.arange(TOTAL)[None] % 30):
        losses, gradients = [], []
        for run in (model, traced):
            model.zero_grad()
            loss = run(x, position_ids=positions, labels=x, use_cache=False).loss
            loss.backward()
            losses.append(loss)
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(losses[1], losses[0], **NEAR)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    # Three kinds of rows, and no graph per kind; Gemma 3 is traced twice.
    assert len(graphs) <= (2 if name == "gemma3" else 1)


@torch.no_grad()
def test_compiled_without_packing() -> None:
    """Nothing says where documents end, so there is one per row; padding is kept too."""
    model, x = make("llama"), tokens(2, 50)
    real = torch.ones(2, 50, dtype=torch.int64)
    real[0, :20] = 0
    for given in (
        {},
        {"use_cache": False},
        {"attention_mask": real, "position_ids": (real.cumsum(1) - 1).clamp(min=0)},
    ):
        want, got = model(x, **given).logits, compiled(model, [])(x, **given).logits
        seen = given.get("attention_mask", torch.ones(2, 50)).bool()
        torch.testing.assert_close(got[seen], want[seen], **CLOSE)
    with pytest.raises(RuntimeError, match="hides no token inside a document"):
        real[1, 5] = 0
        compiled(model, [])(x, attention_mask=real)


def test_a_compiled_trainer(tmp_path: Path) -> None:
    """The same losses as without compilation, on packed rows."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": tokens(1, n)[0].tolist()} for n in (20, 31, 12, 25, 9, 40, 33, 10)]
    losses = []
    for compiles in (False, True):
        torch._dynamo.reset()
        model = make("llama").float().train()
        arguments = TrainingArguments(
            tmp_path / str(compiles), torch_compile=compiles, torch_compile_backend="aot_eager" if compiles else None,
            max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy="no",
            logging_steps=1, disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, data_collator=DataCollatorWithFlattening())
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 2
    # fp32 sums in another order; the log rounds to four digits.
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)


@torch.no_grad()
def test_nothing_changes_for_other_attention() -> None:
    """The hook looks at dilated models alone."""
    sdpa, x = make("llama", "sdpa"), tokens(1, TOTAL)
    assert torch.equal(
        sdpa(x, position_ids=POSITIONS).logits,
        sdpa(x, position_ids=POSITIONS, attention_mask=torch.ones(1, TOTAL)).logits,
    )
    switched = make("llama", "sdpa")
    use_dilated_attention(switched, [4096], [1])
    apart = sdpa(x, position_ids=POSITIONS, use_cache=False).logits
    torch.testing.assert_close(switched(x, position_ids=POSITIONS).logits, apart, **CLOSE)
    assert (sdpa(x, position_ids=POSITIONS).logits - apart).abs().max() > 1e-2, (
        "sdpa mixes them, or nothing was compared"
    )
