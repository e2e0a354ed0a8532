"""What a run can be told: config, first weights, more steps, schedule, precision, packing; what it keeps, measures."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import call, fails
from test_sources import KINDS
from test_training import ALONE, TINY, Recorder, curve, interrupt, same, weights

from dilated_attention_pytorch.models import LongNetLM, load_pretrained, save_pretrained
from dilated_attention_pytorch.training import (
    Corpus,
    Interrupted,
    Trainer,
    build_corpus,
    evaluate,
    preset,
    read_settings,
    text_stream,
    trainer,
)
from dilated_attention_pytorch.training.checkpoint import steps_in
from dilated_attention_pytorch.training.evaluate import predict
from dilated_attention_pytorch.training.excerpts import document_bounds
from dilated_attention_pytorch.training.metrics import flops_per_sequence, peak_flops, read_metrics
from dilated_attention_pytorch.training.state import LossScale, learning_rate
from dilated_attention_pytorch.training.tokenizer import load_tokenizer

PLAIN = replace(TINY, dropout=0.0)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"def function_{i}(x):\n    return x + {i}\n" * (1 if i % 2 else 20))
    return build_corpus(folder, val_fraction=0.3, cache=tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    patch.setenv("COLUMNS", "200")
    yield
    patch.undo()


class TestLongerRuns:
    def test_more_steps_go_on_from_a_run_that_is_done(self, corpus: Corpus, tmp_path: Path) -> None:
        """With a rate that no end bends, three steps and three more are six."""
        constant = replace(PLAIN, schedule="constant", eval_every=6)
        Trainer(constant, corpus, tmp_path / "whole", world=ALONE).run()
        Trainer(replace(constant, steps=3), corpus, tmp_path / "parts", world=ALONE).run()
        recorder = Recorder()
        Trainer(constant, corpus, tmp_path / "parts", world=ALONE).run(recorder)
        assert recorder.steps == [4, 5, 6]
        assert [x for x in curve(tmp_path / "parts") if x[0] != 3] == [
            x for x in curve(tmp_path / "whole") if x[0] != 3
        ]
        assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
        with pytest.raises(ValueError, match=r"expected steps of at least the 6 that the run in .* has done, got 4"):
            Trainer(replace(constant, steps=4), corpus, tmp_path / "parts", world=ALONE)

    def test_first_weights_of_another_run(self, corpus: Corpus, tmp_path: Path) -> None:
        first = Trainer(PLAIN, corpus, tmp_path / "first", world=ALONE).run()
        longer = replace(PLAIN, context=128, segment_lengths=(16, 128), steps=1, warmup_steps=0, learning_rate=1e-30)
        Trainer(longer, corpus, tmp_path / "second", world=ALONE, init_from=tmp_path / "first").run()
        for name, value in first.model.state_dict().items():
            # The step is nothing but rounding.
            torch.testing.assert_close(weights(tmp_path / "second")[name], value.cpu(), rtol=1e-6, atol=0)
        other = replace(PLAIN, d_model=16)
        with pytest.raises(ValueError, match=r"expected the weights of a LongNetLM, got: .* of shape"):
            Trainer(other, corpus, tmp_path / "third", world=ALONE, init_from=tmp_path / "first")

    def test_first_weights_do_not_touch_a_run_that_goes_on(self, corpus: Corpus, tmp_path: Path) -> None:
        Trainer(PLAIN, corpus, tmp_path / "a", world=ALONE).run()
        torch.manual_seed(5)
        save_pretrained(LongNetLM(PLAIN.model_config()), tmp_path / "b")
        with pytest.raises(Interrupted):
            Trainer(PLAIN, corpus, tmp_path / "c", world=ALONE).run(Recorder(3, interrupt))
        Trainer(PLAIN, corpus, tmp_path / "c", world=ALONE, init_from=tmp_path / "b").run()
        assert same(weights(tmp_path / "c"), weights(tmp_path / "a"))


def test_schedules() -> None:
    config = replace(PLAIN, steps=100, warmup_steps=10, learning_rate=1.0, final_rate=0.1)
    for schedule in ("cosine", "constant", "warmup-stable-decay"):
        rates = [learning_rate(replace(config, schedule=schedule), step) for step in range(101)]
        assert rates[:11] == pytest.approx([0.1 * i for i in range(1, 11)] + [1.0])
        if schedule == "constant":
            assert set(rates[10:]) == {1.0}
        elif schedule == "warmup-stable-decay":
            assert set(rates[10:81]) == {1.0} and rates[90] == pytest.approx(0.55)
            falls = {round(a - b, 9) for a, b in pairwise(rates[80:])}
            assert falls == {round(0.9 / 20, 9)} and rates[100] == pytest.approx(0.1)
        else:
            assert all(a > b for a, b in pairwise(rates[10:]))
    with pytest.raises(ValueError, match="expected schedule to be one of"):
        replace(PLAIN, schedule="linear")
    with pytest.raises(ValueError, match=r"expected decay_share in \[0, 1\], got 2.0"):
        replace(PLAIN, decay_share=2.0)


class TestHalfPrecision:
    def test_fp16_trains_close_to_fp32_and_resumes_exactly(self, corpus: Corpus, tmp_path: Path) -> None:
        for precision in ("fp32", "fp16"):
            Trainer(replace(PLAIN, precision=precision), corpus, tmp_path / precision, world=ALONE).run()
        wanted, found = curve(tmp_path / "fp32"), curve(tmp_path / "fp16")
        assert found != wanted and found == [(s, n, pytest.approx(x, rel=0.02)) for s, n, x in wanted]
        half = replace(PLAIN, precision="fp16")
        with pytest.raises(Interrupted):
            Trainer(half, corpus, tmp_path / "again", world=ALONE).run(Recorder(3, interrupt))
        again = Trainer(half, corpus, tmp_path / "again", world=ALONE)
        assert again.scale.state == [65536.0, 3]
        again.run()
        assert curve(tmp_path / "again") == found

    def test_a_step_that_overflows_is_left_out(self, corpus: Corpus, tmp_path: Path) -> None:
        run = Trainer(replace(PLAIN, precision="fp16", steps=3), corpus, tmp_path, world=ALONE)
        run.scale.state = [2.0**125, 7]  # gradients of a tenth overflow in fp32 too
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        run._train_step(1e-3)
        assert same(run.model.state_dict(), before) and run.scale.state == [2.0**124, 0]
        while run.scale.state[1] == 0:
            run._train_step(1e-3)
        assert not same(run.model.state_dict(), before)

    def test_the_scale(self) -> None:
        scale = LossScale(torch.float16)
        assert all(scale.update(True) for _ in range(2000)) and scale.state == [2.0 * 65536, 0]
        assert all(scale.update(False) for _ in range(17)) and not scale.update(False)
        fixed = LossScale(torch.bfloat16)
        assert all(fixed.update(True) for _ in range(3000)) and fixed.factor == 1.0 and not fixed.update(False)
        assert PLAIN.dtype(torch.device("cpu")) is torch.float32
        assert PLAIN.dtype(torch.device("cuda")) is torch.bfloat16


class TestPacking:
    def test_bounds_of_documents(self) -> None:
        inputs = torch.tensor([[5, 0, 6, 7, 0], [0, 0, 8, 9, 1]])
        assert document_bounds(inputs, 0).tolist() == [0, 2, 5, 6, 7, 10]

    def test_each_document_is_alone(self) -> None:
        torch.manual_seed(0)
        model = LongNetLM(PLAIN.model_config()).eval()
        inputs = torch.randint(1, 256, (2, 40))
        inputs[0, [4, 5, 30]] = 0
        with torch.no_grad():
            packed = predict(model, inputs, 0)
            for row, begin, end in ((0, 0, 5), (0, 5, 6), (0, 6, 31), (0, 31, 40), (1, 0, 40)):
                alone = model(inputs[row : row + 1, begin:end])[0]
                torch.testing.assert_close(packed[row, begin:end], alone, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(packed[0, 6:31], predict(model, inputs)[0, 6:31], atol=1e-3)

    def test_a_packed_run(self, corpus: Corpus, tmp_path: Path) -> None:
        config = replace(PLAIN, packed=True, micro_batch_size=2)
        Trainer(config, corpus, tmp_path / "packed", world=ALONE).run()
        Trainer(replace(config, packed=False), corpus, tmp_path / "joined", world=ALONE).run()
        assert curve(tmp_path / "packed") != curve(tmp_path / "joined")
        with pytest.raises(ValueError, match="expected a corpus whose documents end with a token with packed=True"):
            Trainer(config, replace(corpus, end_token=None), tmp_path / "none", world=ALONE)
        with pytest.raises(ValueError, match="expected context_parallel=1 with packed=True"):
            replace(config, context_parallel=2)
        with pytest.raises(ValueError, match="expected compile=False with packed=True"):
            replace(config, compile=True)


def test_the_last_states_and_the_best_stay(corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.5])
    found = evaluate

    def judged(*args: Any, **options: Any) -> Any:
        return found(*args, **options)._replace(loss=next(losses))

    monkeypatch.setattr(trainer, "evaluate", judged)
    config = replace(PLAIN, steps=8, eval_every=2, checkpoint_every=1, keep_last=2, keep_best=True)
    Trainer(config, corpus, tmp_path, world=ALONE).run()
    assert steps_in(tmp_path) == [4, 7, 8]
    again = Trainer(replace(config, steps=10, checkpoint_every=100), corpus, tmp_path, world=ALONE)
    assert again.checkpoints.best == [1.0, 4]
    again.run()
    assert steps_in(tmp_path) == [8, 10]


def test_losses_by_position(corpus: Corpus) -> None:
    """Each token counts where as many stand before it, a short last excerpt's too."""
    torch.manual_seed(0)
    model = LongNetLM(PLAIN.model_config()).eval()
    stream = np.asarray(corpus.val)
    excerpts = [stream[:51], stream[50:101], stream[100:120]]
    found = evaluate(model, excerpts, ALONE, batch_size=2)
    sums: dict[int, list[float]] = {}
    for excerpt in excerpts:
        tokens = torch.from_numpy(excerpt.astype(np.int64))
        with torch.no_grad():
            rows = model(tokens[None, :-1])[0].double().log_softmax(-1)
        for place, token in enumerate(tokens[1:].tolist()):
            first = 0 if place == 0 else 1 << (place.bit_length() - 1)
            sums.setdefault(first, []).append(-float(rows[place, token]))
    assert found.by_position == {first: pytest.approx(sum(x) / len(x), rel=1e-5) for first, x in sums.items()}
    assert list(found.by_position) == [0, 1, 2, 4, 8, 16, 32]
    half = evaluate(model, excerpts, ALONE, bytes_per_token=4.0)
    assert half.bits_per_byte == pytest.approx(found.bits_per_byte / 4) and half.num_bytes == 4 * found.num_bytes


class TestMeasured:
    def test_flops_are_those_of_matrices_and_pairs(self) -> None:
        for config in (PLAIN, preset("demo"), replace(PLAIN, gradient_checkpointing=True)):
            shape = config.model_config()
            model = LongNetLM(shape, device="meta")
            matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)  # the embedding's is the output's
            pairs = shape.pattern.pairs(config.context, is_causal=True) * config.num_layers
            # Attention: two products forward, five backward, of a multiply and an add per element of a head.
            wanted = 6 * matrices * config.context + 14 * config.d_model // config.nhead * pairs
            assert flops_per_sequence(config) == wanted

    def test_mfu(self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trainer, "peak_flops", lambda device: 1e12)
        config = replace(PLAIN, precision="bf16")
        Trainer(config, corpus, tmp_path, world=ALONE).run()
        line = read_metrics(tmp_path / "metrics.jsonl")[0]
        flops = flops_per_sequence(config) / config.context * line["tokens_per_s"]
        assert line["mfu"] == pytest.approx(flops / 1e12, abs=1e-4) and line["mfu"] > 0

    def test_peaks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H200": 989e12}
        names |= {"NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA B200": 2250e12, "Other": None}
        for name, wanted in names.items():
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
            assert peak_flops(torch.device("cuda")) == wanted
        assert peak_flops(torch.device("cpu")) is None

    def test_weights_and_biases(self, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: list[Any] = []
        run = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("end"))
        module = SimpleNamespace(init=lambda **settings: told.append(settings) or run)
        monkeypatch.setitem(sys.modules, "wandb", module)
        Trainer(PLAIN, corpus, tmp_path / "mine", world=ALONE, wandb="project").run()
        assert told[0]["project"] == "project" and told[0]["group"] == "mine" and told[0]["config"]["steps"] == 6
        assert told[-1] == "end" and [step for step, _ in told[1:-1]] == [1, 2, 3, 3, 4, 5, 6, 6]
        assert told[1][1]["loss"] == read_metrics(tmp_path / "mine" / "metrics.jsonl")[0]["loss"]
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(ImportError, match="expected Weights & Biases, which is not installed: pip install wandb"):
            Trainer(PLAIN, corpus, tmp_path / "none", world=ALONE, wandb="project").run()


def test_settings_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("steps: 9\nlearning_rate: 1e-3\nsegment_lengths: [8, 16]\ndata:\n  field: body\n")
    found = read_settings(tmp_path / "a.yaml")
    assert found == {"steps": 9, "learning_rate": "1e-3", "segment_lengths": [8, 16], "data.field": "body"}
    found.pop("data.field")
    assert PLAIN.changed(found) == replace(PLAIN, steps=9, learning_rate=1e-3, segment_lengths=(8, 16))
    for content, message in (
        ("a: [", "expected YAML or JSON in .*, got: while parsing"),
        ("- a", "expected names and values in .*, got"),
        ("steps: é", "expected YAML or JSON in .*, got: 'utf-8' codec can't decode"),
    ):
        (tmp_path / "a.yaml").write_text(content, encoding="latin-1")
        with pytest.raises(ValueError, match=message):
            read_settings(tmp_path / "a.yaml")
    (tmp_path / "a.json").write_text(json.dumps({"learning_rate": 1e-5, "data": {"folder": None}}))
    found = read_settings(tmp_path / "a.json")
    assert found.pop("data.folder", 0) is None and PLAIN.changed(found).learning_rate == 1e-5


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_data_trains(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    rows = build_corpus(tmp_path / name, cache=tmp_path / "cache")
    Trainer(replace(PLAIN, steps=1, warmup_steps=0), rows, tmp_path / "run", world=ALONE).run()
    loss, evaluation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert 0 < loss["bpb"] < 12 and 0 < evaluation["val_bpb"] < 12


def test_tokens_that_the_model_does_not_know_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected vocab_size of the corpus's 256, got 100"):
        Trainer(replace(PLAIN, vocab_size=100), corpus, tmp_path, world=ALONE)
    unknown = replace(corpus, end_token=None)
    with pytest.raises(ValueError, match="expected vocab_size of at least the corpus's 256, got 100"):
        Trainer(replace(PLAIN, vocab_size=100), unknown, tmp_path, world=ALONE)
    Trainer(replace(PLAIN, vocab_size=300), unknown, tmp_path, world=ALONE)


def test_what_would_fail_later_is_refused_before_the_old_run_goes(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainer(PLAIN, corpus, tmp_path, world=ALONE).run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    refused: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({"context": 1 << 20}, {}, "expected at least 2097153 tokens of training text"),
        ({"vocab_size": 300}, {}, "expected vocab_size of the corpus's 256, got 300"),
        ({}, {"wandb": "project"}, "expected Weights & Biases, which is not installed: pip install wandb"),
        ({}, {"tensorboard": True}, "expected TensorBoard, which is not installed"),
    ]
    for values, options, message in refused:
        with pytest.raises((ValueError, ImportError), match=message):
            Trainer(replace(PLAIN, **values), corpus, tmp_path, world=ALONE, restart=True, **options).run()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


YAML = """
preset: demo
d_model: 32
num_layers: 1
dim_feedforward: 32
segment_lengths: [16, 64]
dilation_rates: [1, 2]
context: 64
steps: 3
warmup_steps: 1
eval_every: 2
eval_excerpts: 2
cpu_threads: 0
"""


class TestCommand:
    @pytest.mark.parametrize("number", [1, 19])
    def test_one_file_and_nineteen(self, number: int, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        for i in range(number):
            (tmp_path / "one" / f"input{i}.txt").write_text(f"a line of {i}\n" * 400)
        (tmp_path / "run.yaml").write_text(YAML)
        out = tmp_path / "run"
        arguments = ("train", "--config", tmp_path / "run.yaml", "--data", tmp_path / "one", "--out", out)
        shown = call(*arguments, "--sample-bytes", "5")
        assert f"training text in {number} files" in shown and "validation: " in shown

    def test_the_config_beside_a_run_is_the_config_of_another(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        rows = [{"body": f"row {i} of a text\n" * 30} for i in range(100)]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "run.yaml").write_text(YAML + f"data:\n  folder: {tmp_path / 'rows.jsonl'}\n")
        arguments = ("train", "--config", tmp_path / "run.yaml", "--out", tmp_path / "a")
        error = fails(capsys, monkeypatch, *arguments)
        assert "expected --field to name one of ['body'] in" in error and error.endswith("got 'text'")
        call(*arguments, "--set", "data.field=body", "--set", "seed=3", "--sample-bytes", "5")
        written = json.loads((tmp_path / "a" / "train.json").read_text())
        assert written["seed"] == 3 and written["data"]["field"] == "body"
        call("train", "--config", tmp_path / "a" / "train.json", "--out", tmp_path / "b", "--sample-bytes", "5")
        assert curve(tmp_path / "a") == curve(tmp_path / "b")
        assert json.loads((tmp_path / "b" / "train.json").read_text()) == written
        with (tmp_path / "rows.jsonl").open("a") as stream:
            stream.write(json.dumps(rows[0] | {"body": "more"}) + "\n")
        again = ("train", "--config", tmp_path / "a" / "train.json", "--out", tmp_path / "c")
        assert f"fingerprint {written['corpus']}, got " in fails(capsys, monkeypatch, *again)
        # Other data that are asked for are not held to the file's.
        call(*again, "--set", f"data.folder={tmp_path / 'rows.jsonl'}", "--sample-bytes", "5")
        assert json.loads((tmp_path / "c" / "train.json").read_text())["corpus"] != written["corpus"]
        error = fails(capsys, monkeypatch, *arguments, "--set", "data.x=1")
        assert "expected a setting of the data, got 'data.x'; known are ['data.field'," in error
        error = fails(capsys, monkeypatch, *arguments, "--set", "data.val_fraction=x")
        assert "expected a float for data.val_fraction, got 'x'" in error
        monkeypatch.setattr("dilated_attention_pytorch.training.Trainer", None)  # nothing is trained
        error = fails(capsys, monkeypatch, *arguments, "--prompt", "\udcff")
        assert "expected --prompt to be text in UTF-8, got '\\udcff'" in error

    def test_what_is_no_text_is_told(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "run.yaml").write_text(YAML)
        (tmp_path / "text").mkdir()
        (tmp_path / "text" / "café.txt").write_bytes("café\n".encode("latin-1"))
        arguments = ("train", "--config", tmp_path / "run.yaml", "--data", tmp_path / "text", "--out", tmp_path / "run")
        assert "1 Latin-1" in fails(capsys, monkeypatch, *arguments)
        (tmp_path / "text" / "a.txt").write_text("a line\n" * 400)
        shown = call(*arguments, "--sample-bytes", "5")
        assert f"left out: 1 Latin-1 ({tmp_path / 'text' / 'café.txt'}" in shown

    def test_a_finished_run_keeps_its_sample_and_samples_steer_no_terminal(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "run.yaml").write_text(YAML)
        (tmp_path / "a.txt").write_text("a line\n" * 400)
        monkeypatch.setattr("dilated_attention_pytorch.training.text_stream", lambda *_, **__: iter(["\x1b[2J", "ok"]))
        out = tmp_path / "run"
        arguments = ("train", "--config", tmp_path / "run.yaml", "--data", tmp_path / "a.txt", "--out", out)
        shown = call(*arguments)
        assert "\x1b" not in shown and (out / "sample.txt").read_text() == "def \\x1b[2Jok\n"
        (out / "sample.txt").write_text("mine")
        assert "nothing was left to train" in call(*arguments) and (out / "sample.txt").read_text() == "mine"
        call(*arguments, "--set", "steps=4")
        assert (out / "sample.txt").read_text() == "def \\x1b[2Jok\n"

    def test_a_tokenizer_from_training_to_generation(self, tmp_path: Path) -> None:
        tokenizers = pytest.importorskip("tokenizers")
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            ["some words of a text\n"], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False)
        )
        made.save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "a.txt").write_text("some words of a text\n" * 400)
        (tmp_path / "run.yaml").write_text(YAML)
        out = tmp_path / "run"
        where = ("--data", tmp_path / "a.txt", "--tokenizer", tmp_path / "tokenizer.json", "--out", out)
        shown = call("train", "--config", tmp_path / "run.yaml", *where, "--sample-bytes", "5")
        size = made.get_vocab_size() + 1  # the end of a document
        assert load_pretrained(out).config.vocab_size == size and "context 64 tokens" in shown
        assert (out / "tokenizer.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
        val = read_metrics(out / "metrics.jsonl")[-1]
        tokenizer = load_tokenizer(out)
        text = len(b"some words of a text\n") / len(tokenizer.encode([b"some words of a text\n"])[0])
        assert val["val_bpb"] == pytest.approx(val["val_loss"] / math.log(2) / text, rel=0.05)
        assert call("generate", out, "--prompt", "some ", "--bytes", "9", "--seed", "1").startswith("some ")
        call("export", out, "--out", tmp_path / "elsewhere")
        assert call("generate", tmp_path / "elsewhere", "--prompt", "some ", "--bytes", "9").startswith("some ")
        model = load_pretrained(out)
        assert isinstance(model, LongNetLM)
        texts = [list(text_stream(model, tokenizer, "some ", 20, seed=seed)) for seed in range(9)]
        assert any(texts) and all(piece for pieces in texts for piece in pieces)

    def test_tokens_train_without_a_tokenizer(self, tmp_path: Path) -> None:
        (tmp_path / "tokens").mkdir()
        for i in range(3):
            np.save(tmp_path / "tokens" / f"{i}.npy", np.arange(3000, dtype=np.uint16) % 300)
        (tmp_path / "run.yaml").write_text(YAML)
        out = tmp_path / "run"
        shown = call("train", "--config", tmp_path / "run.yaml", "--data", tmp_path / "tokens", "--out", out)
        assert "bits per token" in shown and not (out / "sample.txt").exists()
        assert load_pretrained(out).config.vocab_size == 300
