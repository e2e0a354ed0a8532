"""LongNet's models among those of transformers: packing, compilation, export, Trainer, PEFT, resized embeddings.

All models are tiny and randomly initialised; nothing is downloaded.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # before the import, which reads it
transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    DataCollatorWithFlattening,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from dilated_attention_pytorch.integrations.transformers import (  # noqa: E402
    LongNetForCausalLM,
    LongNetForMaskedLM,
    LongNetForSequenceClassification,
    LongNetHFConfig,
    register,
    use_dilated_attention,
)

VOCAB = 99
# The models compute in fp64, where another order of the same sums leaves logits of order 1 alike to 1e-10.
CLOSE = {"rtol": 0.0, "atol": 1e-10}
CAUSAL, MASKED, CLASSIFIER = LongNetForCausalLM, LongNetForMaskedLM, LongNetForSequenceClassification
AUTO = {
    CAUSAL: AutoModelForCausalLM,
    MASKED: AutoModelForMaskedLM,
    CLASSIFIER: AutoModelForSequenceClassification,
}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()
    torch._dynamo.reset()


def quantized() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that they will go
        return torch.quantize_per_tensor(torch.ones(1, 5), 0.1, 0, torch.qint8)


def build(kind: type[PreTrainedModel] = CAUSAL, **changes: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "d_model": 32, "nhead": 4, "num_decoder_layers": 2, "dim_feedforward": 64}
    settings = {"segment_lengths": [16, 40, 96], "dilation_rates": [1, 2, 4], "pad_token_id": 0, **changes}
    return kind(LongNetHFConfig(**sizes, **settings)).double().eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, VOCAB, shape, generator=torch.Generator().manual_seed(7))


def padded(lengths: list[int], side: str) -> tuple[Tensor, Tensor, list[slice]]:
    """A padded batch, its mask, and where each row's tokens lie."""
    longest = max(lengths)
    rows = [slice(longest - n, longest) if side == "left" else slice(0, n) for n in lengths]
    batch, real = torch.zeros(2, len(lengths), longest, dtype=torch.int64)
    for b, here in enumerate(rows):
        batch[b, here], real[b, here] = tokens(len(lengths), longest)[b, : here.stop - here.start], 1
    return batch, real, rows


def in_one_graph(model: PreTrainedModel) -> Any:
    return torch.compile(model, fullgraph=True, backend="eager")  # whether it is one graph is Dynamo's to say


DOCUMENTS = [tokens(4, 33)[i, :n].tolist() for i, n in enumerate((7, 33, 1, 20))]
COLLATORS: dict[str, dict[str, Any]] = {
    "positions": {},
    "positions from 2": {"position_ids_start": 2},
    "bounds": {"return_flash_attn_kwargs": True, "return_position_ids": False},
    "numbers": {"return_seq_idx": True, "return_position_ids": False},
    "all": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


class TestPacking:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("kind", "collator", "masked", "compiled"),
        [
            *(
                (kind, name, masked, False)
                for kind in (CAUSAL, MASKED)
                for name in COLLATORS
                for masked in (True, False)
            ),
            (CAUSAL, "positions", True, True),
            (CAUSAL, "bounds", False, True),
            (MASKED, "positions", False, True),
        ],
    )
    def test_each_document_alone(self, kind: Any, collator: str, masked: bool, compiled: bool) -> None:
        """In evaluation, where a cache is the default, and with a mask that hides nothing."""
        model = build(kind)
        batch = DataCollatorWithFlattening(**COLLATORS[collator])([{"input_ids": ids} for ids in DOCUMENTS])
        del batch["labels"]
        if masked:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        out = (in_one_graph(model) if compiled else model)(**batch)
        alone = [model(torch.tensor([ids])).logits[0] for ids in DOCUMENTS]
        torch.testing.assert_close(out.logits[0], torch.cat(alone), **CLOSE)
        assert out.get("past_key_values") is None

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("kind", "side", "compiled"),
        [*((kind, side, False) for kind in (CAUSAL, MASKED) for side in ("left", "right")), (MASKED, "left", True)],
    )
    def test_padded_rows_of_documents(self, kind: Any, side: str, compiled: bool) -> None:
        model = build(kind)
        batch, real, rows = padded([50, 31], side)
        positions = torch.zeros_like(batch)
        for b, here in enumerate(rows):
            positions[b, here] = torch.cat((torch.arange(20), torch.arange(here.stop - here.start - 20)))
        out = (in_one_graph(model) if compiled else model)(batch, attention_mask=real, position_ids=positions).logits
        for b, here in enumerate(rows):
            for part in (slice(here.start, here.start + 20), slice(here.start + 20, here.stop)):
                torch.testing.assert_close(out[b, part], model(batch[b : b + 1, part]).logits[0], **CLOSE)

    def test_training_step_compiled_equals_eager(self) -> None:
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([{"input_ids": ids} for ids in DOCUMENTS])
        results = []
        for compiled in (False, True):
            model = build().train()
            run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
            loss = run(**batch).loss
            loss.backward()
            results.append([loss.double(), *(p.grad for p in model.parameters())])
        torch.testing.assert_close(*results, rtol=0.0, atol=1e-6)  # transformers takes the loss in fp32
        # The loss is the mean over documents: no label stands at a document's first token.
        losses = [build()(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1) for ids in DOCUMENTS]
        want = sum(loss for loss in losses if loss.isfinite()) / sum(len(ids) - 1 for ids in DOCUMENTS)
        torch.testing.assert_close(results[0][0], want.double(), rtol=0.0, atol=1e-6)

    @torch.no_grad()
    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"position_ids": torch.tensor([[0, 1, 2, 0, 1]]), "use_cache": True}, "packed position_ids"),
            ({"cu_seq_lens_q": torch.tensor([0, 3, 5]), "use_cache": True}, "got cu_seq_lens_q or seq_idx"),
            ({"seq_idx": torch.tensor([[0, 0, 0, 1, 1]]), "attention_mask": torch.eye(5)[:1]}, "expected no 0 in an"),
            ({"cu_seq_lens_k": torch.tensor([0, 3, 5])}, "expected cu_seq_lens_q with cu_seq_lens_k"),
            ({"position_ids": torch.arange(4)[None]}, r"expected position_ids of shape \(1, 5\), got \(1, 4\)"),
        ],
    )
    def test_what_does_not_go_together(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            build()(tokens(1, 5), **given)

    @torch.no_grad()
    def test_checks_are_in_the_graph(self) -> None:
        model = in_one_graph(build())
        with pytest.raises(RuntimeError, match="packed position_ids"):
            model(tokens(1, 5), position_ids=torch.tensor([[0, 1, 2, 0, 1]]), use_cache=True)
        torch._dynamo.reset()
        with pytest.raises(RuntimeError, match="padding on the left alone"):
            model(tokens(1, 5), attention_mask=torch.tensor([[1, 1, 1, 1, 0]]), use_cache=True)

    def test_several_rows_have_no_bounds(self) -> None:
        with pytest.raises(ValueError, match="expected one row with cu_seq_lens_q, got 2"):
            build()(tokens(2, 5), cu_seq_lens_q=torch.tensor([0, 5, 10]))
        with pytest.raises(ValueError, match=r"got \['position_ids'\], which it does not have"):
            build(CLASSIFIER)(tokens(1, 5), position_ids=torch.tensor([[0, 1, 0, 1, 2]]))


class TestGraphs:
    @torch.no_grad()
    @pytest.mark.parametrize(
        ("kind", "side"), [(CAUSAL, None), (CAUSAL, "left"), (CAUSAL, "right"), (MASKED, "right"), (CLASSIFIER, "left")]
    )
    def test_one_graph(self, kind: Any, side: str | None) -> None:
        model, (batch, real, _) = build(kind), padded([50, 31], side or "right")
        given = {} if side is None else {"attention_mask": real}
        got, want = in_one_graph(model)(batch, **given).logits, model(batch, **given).logits
        if got.dim() == 3 and side is not None:
            got, want = got[real.bool()], want[real.bool()]
        torch.testing.assert_close(got, want, **CLOSE)

    @torch.no_grad()
    @pytest.mark.parametrize("names", ["", "attention_mask", "attention_mask position_ids"])
    def test_export_with_any_length(self, names: str) -> None:
        def call(n: int) -> dict[str, Tensor]:
            batch, real, _ = padded([n, n - 2], "left")
            positions = (real.cumsum(1) - 1).clamp(min=0)
            every = {"input_ids": batch, "attention_mask": real, "position_ids": positions}
            return {name: every[name] for name in ("input_ids", *names.split())}

        model, length = build(), torch.export.Dim("length", min=3, max=512)
        program = torch.export.export(model, (), call(50), dynamic_shapes={key: {1: length} for key in call(50)})
        for n in (5, 50, 131):
            here = call(n).get("attention_mask", torch.ones(2, n)).bool()
            got, want = program.module()(**call(n)).logits, model(**call(n)).logits
            torch.testing.assert_close(got[here], want[here], **CLOSE)


class TestInputsAndOutputs:
    @pytest.mark.parametrize("kind", AUTO)
    def test_embeddings_in_place_of_tokens(self, kind: Any) -> None:
        model, x = build(kind), tokens(2, 30)
        embeds = model.get_input_embeddings()(x)
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(x).logits, **CLOSE)
        for wrong in ({}, {"input_ids": x, "inputs_embeds": embeds}):
            with pytest.raises(ValueError, match="expected either input_ids or inputs_embeds"):
                model(**wrong)
        with pytest.raises(ValueError, match=r"expected input_ids of shape \(B, T\), got \(30,\)"):
            model(x[0])

    @pytest.mark.parametrize("packed", [False, True])
    @pytest.mark.parametrize("kind", [CAUSAL, MASKED])
    def test_hidden_states(self, kind: Any, packed: bool) -> None:
        """Embeddings, then each layer's output, the last one normed: what gives the logits."""
        model, x = build(kind), tokens(1, 30)
        given = {"position_ids": torch.cat((torch.arange(10), torch.arange(20)))[None]} if packed else {}
        assert model(x, **given).hidden_states is None
        out = model(x, **given, output_hidden_states=True)
        first, middle, last = out.hidden_states
        layer = model.model.decoder.layers[1]
        torch.testing.assert_close(first, model.get_input_embeddings()(x) * 32**0.5, **CLOSE)
        torch.testing.assert_close(model.model.logits(last), out.logits, **CLOSE)
        if not packed:
            again = model.model.decoder.layer_norm(layer(middle, is_causal=kind is CAUSAL))
            torch.testing.assert_close(again, last, **CLOSE)
        model.config.output_hidden_states = True
        assert len(model(x, **given).hidden_states) == 3

    def test_logits_to_keep(self) -> None:
        model, x = build(), tokens(2, 30)
        whole = model(x).logits
        for keep, rows in ((0, slice(None)), (3, slice(-3, None)), (torch.tensor([2, 5]), [2, 5])):
            torch.testing.assert_close(model(x, logits_to_keep=keep).logits, whole[:, rows], **CLOSE)

    @torch.no_grad()
    def test_a_row_of_nothing_but_padding(self) -> None:
        model, x = build(), tokens(2, 20)
        real = torch.ones_like(x)
        real[1] = 0
        settings = {"max_new_tokens": 5, "do_sample": False}
        new = model.generate(x, attention_mask=real, **settings)
        assert torch.equal(new[:1], model.generate(x[:1], **settings))
        cached, plain = model(x, attention_mask=real), model(x, attention_mask=real, use_cache=False)
        assert cached.past_key_values is not None and cached.logits.isfinite().all()
        torch.testing.assert_close(cached.logits[0], plain.logits[0], **CLOSE)
        assert build(CLASSIFIER)(x, attention_mask=real).logits.isfinite().all()

    @pytest.mark.parametrize("tie_weights", [False, True])
    @pytest.mark.parametrize("kind", AUTO)
    @pytest.mark.parametrize("size", [120, 60])
    def test_resized_embeddings(self, kind: Any, tie_weights: bool, size: int, tmp_path: Path) -> None:
        model, x = build(kind, tie_weights=tie_weights), tokens(2, 10) % 60
        before = model(x).logits
        model.resize_token_embeddings(size)
        after = model(x).logits
        if kind is CLASSIFIER:
            assert torch.equal(before, after)
        else:
            assert after.shape[-1] == size
            torch.testing.assert_close(after[..., :60], before[..., :60], **CLOSE)
        with pytest.raises(ValueError, match=rf"expected tokens in \[0, {size}\), got {size} to {size}"):
            model(torch.full((1, 3), size))
        model.save_pretrained(tmp_path)
        assert torch.equal(AUTO[kind].from_pretrained(tmp_path).double()(x).logits, after)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input_ids": "tokens"}, "input_ids to be a Tensor, got str"),
        ({"attention_mask": 1}, "attention_mask to be a Tensor, got int"),
        ({"position_ids": "all"}, "position_ids to be a Tensor, got str"),
        ({"labels": 0.5}, "labels to be a Tensor, got float"),
        ({"logits_to_keep": "all"}, "logits_to_keep to be an int, got str"),
        ({"logits_to_keep": torch.ones(2)}, "logits_to_keep of dtype int32 or int64, got torch.float32"),
        (
            {"logits_to_keep": torch.tensor(1, device="meta")},
            "logits_to_keep with values to look at, got a meta tensor",
        ),
        ({"labels": torch.zeros(1, 5, dtype=torch.int64, device="meta")}, "labels with values to look at, got a meta"),
        ({"attention_mask": quantized()}, r"attention_mask to be a dense tensor, got a quantized one; call dequantize"),
        ({"use_cache": torch.ones(2)}, "use_cache to be of bool or NoneType, got Tensor"),
        ({"past_key_values": 1}, "past_key_values to be of Cache or NoneType, got int 1"),
        ({"past_key_values": 1, "attention_mask": torch.ones(1, 5)}, "past_key_values to be of Cache or NoneType"),
        ({"past_key_values": 1, "input_ids": torch.ones(1, 1).long()}, "past_key_values to be of Cache or NoneType"),
    ],
)
def test_what_is_no_tensor_is_named(given: dict[str, Any], message: str) -> None:
    model = build()
    with torch.no_grad(), pytest.raises(TypeError, match=f"^expected {message}"):
        model(**{"input_ids": torch.arange(5)[None], **given})
    with pytest.raises(TypeError, match=r"^expected model to be of Module, got int 3"):
        use_dilated_attention(3, [8], [1])


@pytest.mark.parametrize("kind", [CAUSAL, MASKED, CLASSIFIER])
def test_a_mask_of_another_shape_is_named(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected attention_mask of shape \(1, 5\), got \(1, 6\)"):
        build(kind)(torch.arange(5)[None], attention_mask=torch.ones(1, 6))


@pytest.mark.parametrize("labels", [torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 5)])
def test_labels_of_another_kind_are_named(labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected labels of torch.int64 and shape \(1, 5\), got torch"):
        build()(torch.arange(5)[None], labels=labels)
    with pytest.raises(ValueError, match=r"^expected labels of torch.int64 or floating, of shape \(1,"):
        build(CLASSIFIER, num_labels=3)(torch.arange(5)[None], labels=labels)


def test_embeddings_of_another_width_are_named() -> None:
    for shape in ((1, 5, 0), (1, 5, 33), (1, 5, 2, 32)):
        with pytest.raises(ValueError, match=r"^expected inputs_embeds of 3 dimensions, the last of 32, got \(1, 5, "):
            build(MASKED)(inputs_embeds=torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [-1, VOCAB])
def test_what_is_out_of_range_is_named(wrong: int) -> None:
    x = torch.arange(5)[None]
    for kind in (CAUSAL, MASKED):
        with pytest.raises(
            ValueError, match=rf"^expected labels in \[0, {VOCAB}\), or -100, got {min(wrong, 1)} to {max(wrong, 3)}"
        ):
            build(kind)(x, labels=torch.tensor([[-100, 1, wrong, 2, 3]]))
    with pytest.raises(ValueError, match=rf"^expected labels in \[0, 3\), or -100, got {wrong} to {wrong}"):
        build(CLASSIFIER, num_labels=3)(x, labels=torch.tensor([wrong]))
    with pytest.raises(ValueError, match=r"^expected logits_to_keep in \[0, 5\), got 2 to 99"):
        build()(x, logits_to_keep=torch.tensor([2, 99]))


def test_a_config_holds_ints_of_other_kinds_as_ints(tmp_path: Path) -> None:
    class Index:
        def __index__(self) -> int:
            return 4

    model = CAUSAL(LongNetHFConfig(
        nhead=Index(), num_decoder_layers=np.int64(1), d_model=np.int32(32), dim_feedforward=Index(), vocab_size=VOCAB,
        segment_lengths=[Index(), 8], dilation_rates=[1, 2],
    ))  # fmt: skip
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(model.config.num_attention_heads) is type(model.config.hidden_size) is int
    assert config.num_attention_heads == config.segment_lengths[0] == 4 and config.num_hidden_layers == 1
    read, written = (x.to_dict() | {"_name_or_path": ""} for x in (config, model.config))
    assert read == written


def test_a_mask_of_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        mask = torch.tensor([[0, 1, 1, 1, 1]]).bool()
    assert bool(build()(torch.arange(5)[None], attention_mask=mask).logits.isfinite().all())


class TestConfig:
    def test_sizes_have_both_names(self) -> None:
        ours = {"d_model": 32, "nhead": 4, "num_kv_heads": 2, "num_decoder_layers": 3, "dim_feedforward": 48}
        theirs = {
            "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 3,
            "intermediate_size": 48,
        }  # fmt: skip
        for names in (ours, theirs):
            config = LongNetHFConfig(**names)
            assert {name: getattr(config, name) for name in ours} == ours
            assert theirs.items() <= config.to_dict().items()
            assert config.core().to_dict().items() >= ours.items()
        assert LongNetHFConfig(nhead=4, d_model=32).num_key_value_heads == 4
        with pytest.raises(ValueError, match="expected tie_weights=True"):
            LongNetHFConfig(tie_word_embeddings=True)


class TestEncoders:
    @torch.no_grad()
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("kind", [MASKED, CLASSIFIER])
    def test_padded_rows_equal_each_sequence_alone(self, kind: Any, side: str) -> None:
        model, (batch, real, rows) = build(kind), padded([37, 120, 1], side)
        together = model(batch, attention_mask=real).logits
        for b, here in enumerate(rows):
            alone = model(batch[b : b + 1, here]).logits[0]
            torch.testing.assert_close(together[b, here] if kind is MASKED else together[b], alone, **CLOSE)

    @torch.no_grad()
    @pytest.mark.parametrize("kind", [MASKED, CLASSIFIER])
    def test_they_see_both_ways(self, kind: Any) -> None:
        model, x = build(kind), tokens(1, 30)
        changed = x.clone()
        changed[:, -1] = x[:, -1] % 60 + 1
        assert not torch.equal(model(x).logits.flatten()[:3], model(changed).logits.flatten()[:3])

    @pytest.mark.parametrize(("num_labels", "labels"), [(3, [0, 2]), (1, [0.5, -1.0])])
    def test_classes_and_regression(self, num_labels: int, labels: list[Any]) -> None:
        model, x = build(CLASSIFIER, num_labels=num_labels), tokens(2, 30)
        out = model(x, labels=torch.tensor(labels, dtype=torch.int64 if num_labels > 1 else torch.float64))
        assert out.logits.shape == (2, num_labels)
        want = (
            torch.nn.functional.cross_entropy(out.logits, torch.tensor(labels))
            if num_labels > 1
            else torch.nn.functional.mse_loss(out.logits[:, 0], torch.tensor(labels).double())
        )
        torch.testing.assert_close(out.loss, want, **CLOSE)

    def test_loss_of_masked_tokens(self) -> None:
        model, x = build(MASKED), tokens(2, 30)
        labels = torch.where(torch.arange(30) % 5 == 0, x, -100)
        out = model(x, labels=labels)
        want = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        torch.testing.assert_close(out.loss.double(), want, rtol=1e-6, atol=0.0)  # transformers takes it in fp32

    @pytest.mark.parametrize("kind", AUTO)
    def test_auto_classes_round_trip(self, kind: Any, tmp_path: Path) -> None:
        model, x = build(kind), tokens(2, 30)
        model.save_pretrained(tmp_path)
        assert AutoConfig.from_pretrained(tmp_path).core() == model.config.core()
        again = AUTO[kind].from_pretrained(tmp_path).double()
        assert type(again) is kind and torch.equal(again(x).logits, model(x).logits)

    def test_a_classifier_starts_from_a_masked_model(self, tmp_path: Path) -> None:
        model = build(MASKED)
        model.save_pretrained(tmp_path)
        classifier = CLASSIFIER.from_pretrained(tmp_path)
        kept = dict(model.model.named_parameters())
        del kept["output_projection.weight"]
        assert dict(classifier.model.named_parameters()).keys() == kept.keys()
        assert all(torch.equal(p.double(), kept[name]) for name, p in classifier.model.named_parameters())
        assert classifier.classifier.weight.std() > 0.1  # 32 ** -0.5 = 0.18

    @pytest.mark.parametrize("kind", AUTO)
    def test_gradient_checkpointing_changes_no_gradient(self, kind: Any) -> None:
        x, results = tokens(2, 30), []
        for again in (False, True):
            model = build(kind).train()
            if again:
                # Renamed in transformers 5.20 or so; older ones know the old name alone.
                getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
                assert model.model.gradient_checkpointing
            model(x, labels=torch.tensor([0, 1]) if kind is CLASSIFIER else x).loss.backward()
            results.append({name: p.grad for name, p in model.named_parameters()})
        assert all(grad is not None and torch.equal(grad, results[1][name]) for name, grad in results[0].items())


class TestTrainer:
    def trainer(self, model: Any, folder: Path, data: list[Any], collator: Any = None, **settings: Any) -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, per_device_eval_batch_size=4, use_cpu=True,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, learning_rate=1e-2, **settings,
        )  # fmt: skip
        return Trainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)

    @pytest.mark.parametrize("kind", AUTO)
    def test_it_trains_and_evaluates(self, kind: Any, tmp_path: Path) -> None:
        model, data = build(kind).float(), []
        for ids in tokens(8, 20):
            data.append({"input_ids": ids, "attention_mask": torch.ones(20, dtype=torch.int64), "labels": ids})
            if kind is CLASSIFIER:
                data[-1]["labels"] = ids[0] % 2
        trainer = self.trainer(model, tmp_path, data, num_train_epochs=3)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < 0.9 * before
        shape = trainer.predict(data).predictions.shape
        assert shape == ((8, 2) if kind is CLASSIFIER else (8, 20, VOCAB))

    @pytest.mark.slow
    def test_packed_checkpointed_and_compiled(self, tmp_path: Path) -> None:
        """All at once and none give the same parameters after three steps."""
        data = [{"input_ids": ids, "labels": ids} for ids in DOCUMENTS * 3]
        packed = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
        fields, results = TrainingArguments.__dataclass_fields__, []
        # Renamed in transformers 5.20 or so; older ones know the old name alone.
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        for settings in ({}, {checkpointing: True, "torch_compile": True, "torch_compile_backend": "aot_eager"}):
            model = build().float()
            self.trainer(model, tmp_path, data, packed, max_steps=3, **settings).train()
            results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            torch._dynamo.reset()
        start = torch.cat([p.detach().flatten() for p in build().float().parameters()])
        for got in results[1:]:
            # Adam's steps have the size of the learning rate whatever the gradient's; signs of gradients that are
            # rounding alone (a key's bias) may differ.
            assert (got - results[0]).norm() < 0.05 * (results[0] - start).norm()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT 0.21 asks for it
class TestAdapters:
    @pytest.mark.parametrize("kind", AUTO)
    def test_lora_on_every_linear(self, kind: Any) -> None:
        """Each adapter alone changes the output, and all learn."""
        peft = pytest.importorskip("peft")
        x = tokens(2, 30)
        model = build(kind)
        linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=linears, init_lora_weights=False, r=2))
        out = adapted(x).logits
        out.square().sum().backward()
        factors = {name: p for name, p in adapted.named_parameters() if "lora_" in name}
        assert len(factors) == 2 * len(linears)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in factors.values())
        with torch.no_grad():
            for name, p in factors.items():
                if "lora_B" not in name or "k_proj" in name:  # softmax does not see all of a key's changes
                    continue
                kept = p.clone()
                p.zero_()
                assert not torch.equal(adapted(x).logits, out), name
                p.copy_(kept)

    @pytest.mark.parametrize("kind", AUTO)
    def test_all_linear_and_prompts_read_the_sizes(self, kind: Any) -> None:
        peft = pytest.importorskip("peft")
        task, x = {CAUSAL: "CAUSAL_LM", MASKED: None, CLASSIFIER: "SEQ_CLS"}[kind], tokens(2, 30)
        adapted = peft.get_peft_model(build(kind), peft.LoraConfig(task_type=task, target_modules="all-linear"))
        assert adapted(input_ids=x).logits.isfinite().all()
        if kind is CAUSAL:
            prompted = peft.get_peft_model(build(), peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3))
            config = prompted.peft_config["default"]
            assert (config.token_dim, config.num_layers, config.num_attention_heads) == (32, 2, 4)
            prompted.double()(input_ids=x, labels=x).loss.backward()
            assert prompted.prompt_encoder.default.embedding.weight.grad.abs().sum() > 0
