"""`slide tune`: that it learns what is there, what it writes, that it goes on after a kill, and how it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import slide_files as write
import torch
from command import call, fails

from dilated_attention_pytorch.models import SlideEncoder
from dilated_attention_pytorch.models.slide.files import SlideReader
from dilated_attention_pytorch.models.slide.tune import loop
from dilated_attention_pytorch.models.slide.tune.config import TuneConfig
from dilated_attention_pytorch.models.slide.tune.folds import FoldResult, make_folds, summarise
from dilated_attention_pytorch.models.slide.tune.labels import read_labels
from dilated_attention_pytorch.models.slide.tune.loop import FoldTrainer
from dilated_attention_pytorch.models.slide.tune.model import SlideModel, add_low_rank, parameter_groups
from dilated_attention_pytorch.models.slide.tune.run import Tuner
from dilated_attention_pytorch.models.slide.tune.tasks import Classification, Survival
from dilated_attention_pytorch.models.slide.work import scan

CLOSE = 1e-5
TUNED = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


class Made:
    """Slides of two classes: in one, a quarter of the tiles are moved along a direction. Two slides per patient."""

    def __init__(self, folder: Path, slides: int, seed: int = 0) -> None:
        self.features, self.table, self.checkpoint = folder / "features", folder / "labels.csv", folder / "checkpoint"
        self.features.mkdir(parents=True)
        self.encoder = write.checkpoint(self.checkpoint, padding="none", dropout=0.1)
        rng = np.random.default_rng(seed)
        sick = np.arange(slides) // 2 % 2
        for i in range(slides):
            count = int(rng.integers(12, 40))
            x = rng.standard_normal((count, write.WIDTH)).astype(np.float32)
            x[: count // 4, :3] += 3 * sick[i]
            write.trident(self.features / f"s{i}.h5", x, write.tissue(count) * 512, magnification=40)
        days = rng.exponential(100, slides) * np.exp(-2.5 * sick) + 1
        names = {"slide_id": [f"s{i}" for i in range(slides)], "case_id": [f"p{i // 2}" for i in range(slides)]}
        shuffled = rng.permutation(sick[::2]).repeat(2)
        columns = {"label": np.where(sick, "tumour", "normal"), "shuffled": shuffled, "days": days}
        pd.DataFrame(names | columns | {"dead": rng.random(slides) < 0.7}).replace({True: 1, False: 0}).to_csv(
            self.table, index=False
        )

    def tuner(self, out: Path, *, label: str = "label", survival: bool = False, **settings: Any) -> Tuner:
        columns = {"time": "days", "event": "dead"} if survival else {"label": label}
        labels = read_labels(self.table, self.features, **columns)
        config = TuneConfig(**{"folds": 3, "bootstraps": 20} | settings)
        return Tuner(self.encoder, SlideReader.of(self.encoder.config), labels, config, out)

    def command(self, out: Path, *more: object, table: Path | None = None) -> tuple[object, ...]:
        where = ("--features", self.features, "--checkpoint", self.checkpoint, "--out", out, "--device", "cpu")
        return ("slide", "tune", table or self.table, *where, "--bootstraps", 20, *more)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"), 32)


@pytest.mark.slow
def test_a_planted_signal_is_learned_and_shuffled_labels_are_not(tmp_path: Path) -> None:
    planted, shuffled = [], []
    for seed in range(3):
        made = Made(tmp_path / str(seed), 96, seed)
        for label, found in (("label", planted), ("shuffled", shuffled)):
            run = made.tuner(tmp_path / f"{label}{seed}", label=label, epochs=40, seed=seed)
            found.append(run.run()["scores"]["auroc"]["mean"])
    assert min(planted) > 0.9, planted
    # Of n sick and n well slides, the AUROC of chance has the variance (2n + 1) / 12n^2. Slides of a patient have one
    # label, so a fold counts as its 16 patients, n = 8; this is the mean of nine. Four deviations.
    allowed = 4 * (17 / (12 * 64) / 9) ** 0.5
    assert abs(sum(shuffled) / 3 - 0.5) < allowed < 0.2, shuffled


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_encoder_is_tuned_and_saved(made: Made, tmp_path: Path, mode: str) -> None:
    """The tuned encoder of a fold's folder, with the head beside it, gives the predictions of the fold."""
    settings = {"mode": mode, "folds": 2, "epochs": 6, "batch_size": 4, "learning_rate": 5e-3}
    metrics = made.tuner(tmp_path, **settings).run()
    assert metrics["scores"]["auroc"]["mean"] > 0.9
    table, reader = pd.read_csv(tmp_path / "predictions.csv"), SlideReader.of(made.encoder.config)
    for number in range(2):
        folder = tmp_path / f"fold_{number}"
        assert not list(folder.glob("*.pt")) and list(folder.glob("tensorboard/events*"))
        encoder = SlideEncoder.from_pretrained(folder)
        from safetensors.torch import load_file

        head = load_file(folder / "head.safetensors")
        mine = table[table["fold"] == number]
        for name, chance in zip(mine["slide_id"], mine["probability_tumour"], strict=True):
            slide = reader.read(made.features / f"{name}.h5")
            with torch.inference_mode():
                pooled = encoder(slide.tiles, slide.coords).pooled
            logits = (pooled - head["mean"]) / head["scale"] @ head["linear.weight"].T + head["linear.bias"]
            assert float(logits.softmax(-1)[0, 1]) == pytest.approx(chance, abs=CLOSE)
        before, after = made.encoder.state_dict(), encoder.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        adapted = {name for name in before if name.rpartition(".")[0].endswith(TUNED) and name.endswith("weight")}
        assert changed == adapted if mode == "lora" else changed > adapted


def test_a_probe_leaves_the_encoder_and_takes_the_layer_asked_for(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "run"
    printed = call(*made.command(out, "--folds", 2, "--epochs", 3, "--layer", 1))
    assert "32 slides of 16 patients, 2 folds" in printed and "fold 1: " in printed and "auroc" in printed
    assert not list(out.glob("fold_*/model.safetensors"))
    labels = read_labels(made.table, made.features)
    tuner = made.tuner(tmp_path / "again", folds=2, epochs=3, layer=1)
    with np.load(out / "embeddings" / "s3.npz") as found:
        slide = tuner.reader.read(labels.paths[3])
        want = made.encoder.eval()(slide.tiles, slide.coords).layers[1, 0]
        np.testing.assert_allclose(found["layers"][0], want.detach(), atol=CLOSE, rtol=CLOSE)
    table = pd.read_csv(out / "predictions.csv")
    assert sorted(table["slide_id"]) == sorted(labels.slides)  # each tested once
    assert json.loads((out / "metrics.json").read_text())["patients"] == 16


def test_survival(made: Made, tmp_path: Path) -> None:
    """Hazards are learned; by the whole encoder the gradient is that of all outputs at once."""
    scores = made.tuner(tmp_path, survival=True, epochs=40).run()["scores"]["c_index"]
    # Half of the pairs are of one class, where the order is chance; of the others nearly all are told.
    assert scores["mean"] > 0.6
    assert list(pd.read_csv(tmp_path / "predictions.csv"))[3:] == ["time", "event", "risk"]
    tuner = made.tuner(tmp_path / "lora", survival=True, mode="lora", folds=2)
    model = tuner._model(tuner.folds[0], tuner._slides)
    torch.nn.init.normal_(model.head.linear.weight)  # zeros give the encoder no gradient
    labels, chosen = tuner.labels, tuner.folds[0].train[:6]
    trainer = FoldTrainer(model, tuner._slides, labels.task, labels.targets, tuner.folds[0], tuner.config, tmp_path)
    seeds = list(range(6))
    model.train()
    trainer._gradients(chosen, seeds)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    outputs = torch.cat([trainer._forward(x, seed) for (_, x), seed in zip(tuner._slides(chosen), seeds, strict=True)])
    labels.task.loss(outputs, labels.targets[chosen]).backward()
    wanted = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert sum(float(x.abs().sum()) for x in wanted.values()) > 0
    for name, x in wanted.items():
        torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize("settings", [{}, {"mode": "lora", "epochs": 2}, {"mode": "full", "epochs": 2}], ids=str)
def test_a_run_that_breaks_off_anywhere_ends_the_same(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """Broken off at every few of its writes, again and again, in one folder."""
    options = {"folds": 2, "epochs": 4, "batch_size": 8} | settings
    made.tuner(tmp_path / "whole", **options).run()
    left, real, stops = [0], loop.replace_file, 0

    def failing(path: Path, write_: Any, mode: Any = None) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(path, write_, mode)

    monkeypatch.setattr(loop, "replace_file", failing)
    while stops < 20:  # more would be one that never ends
        left[0] = 3
        try:
            made.tuner(tmp_path / "broken", **options).run()
            break
        except KeyboardInterrupt:
            stops += 1
    assert 3 <= stops < 20
    for name in ("predictions.csv", "metrics.json"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_a_killed_run_ends_the_same(made: Made, tmp_path: Path) -> None:
    options = ("--mode", "lora", "--folds", 2, "--epochs", 6, "--batch-size", 8)
    call(*made.command(tmp_path / "whole", *options))
    command = [
        sys.executable,
        "-m",
        "dilated_attention_pytorch.cli",
        *map(str, made.command(tmp_path / "cut", *options)),
    ]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (tmp_path / "cut" / "fold_0" / "state.pt").exists() and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it had not finished
    call(*made.command(tmp_path / "cut", *options))
    assert (tmp_path / "cut/predictions.csv").read_bytes() == (tmp_path / "whole/predictions.csv").read_bytes()


def test_mistakes_in_labels(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line each, before anything is made."""
    good = pd.read_csv(made.table, dtype=str)

    def bad(message: str, *more: object, **columns: Any) -> None:
        table = tmp_path / "labels.csv"
        good.assign(**columns).drop(columns=[k for k, v in columns.items() if v is None]).to_csv(table, index=False)
        line = fails(capsys, monkeypatch, *made.command(tmp_path / "out", *more, table=table))
        assert message in line, line
        assert not (tmp_path / "out").exists()

    def at(row: int, column: str, value: Any) -> dict[str, Any]:
        changed = good[column].copy()
        changed[row] = value
        return {column: changed}

    bad("expected a column slide_id or slide or FILENAME in", slide_id=None)
    bad("expected a column grade in", "--label", "grade")
    bad("got slide_id, case_id, label, shuffled, days, dead", "--label", "grade")
    bad("expected a value in every row of column label, got none for s3 (line 5)", **at(3, "label", None))
    bad("expected a value in every row of column case_id, got none for s0 (line 2)", **at(0, "case_id", ""))
    bad("expected a value in every row of column label, got none for s0 (line 2)", **at(0, "label", "  "))
    bad("expected a row per slide, got several for s1", **at(0, "slide_id", "s1"))
    bad("got none of 1: unknown; --skip-missing leaves them out", **at(0, "slide_id", "unknown"))
    bad("expected at least two classes in column label, got tumour alone", label="tumour")
    bad("expected classes in column days, got 32 values of 32 slides", "--label", "days")
    bad(
        "expected numbers above 0 in column days, got -1 for s2",
        "--time",
        "days",
        "--event",
        "dead",
        **at(2, "days", "-1"),
    )
    bad("got soon for s2", "--time", "days", "--event", "dead", **at(2, "days", "soon"))
    bad("expected 0 or 1 in column dead, got 2 for s2", "--time", "days", "--event", "dead", **at(2, "dead", "2"))
    bad("got censored slides alone", "--time", "days", "--event", "dead", dead="0")
    bad("expected --event, which 'days' needs, got none", "--time", "days")
    bad("expected 9 patients or more of each, for as many folds, got 8 of normal, 8 of tumour", "--folds", 9)
    bad("expected each patient in one part of fold_0, got p0 in train and test",
        fold_0=["train", "test"] * 16)  # fmt: skip
    bad("expected each patient in one part of fold, got p0 in 0 and 1", fold=["0", "1"] * 16)
    bad("expected train, val or test in column fold_0, got testing", fold_0=["train", "testing"] * 16)
    bad("expected all of normal, tumour in the validation part of fold 0",
        fold_0=["val", "val", *["train"] * 20, *["test"] * 10])  # fmt: skip
    bad("expected slides in the test part of fold 0, got none", fold_0="train")
    bad("expected --mode to be one of ['probe', 'lora', 'full'], got 'deep'", "--mode", "deep")
    bad("expected --layer to be below 3, got 3", "--layer", 3)
    bad("expected --batch-size of 2 or more for survival", "--time", "days", "--event", "dead", "--batch-size", 1)
    (tmp_path / "labels.csv").write_bytes(b"")
    assert "to hold a table, got:" in fails(
        capsys, monkeypatch, *made.command(tmp_path / "out", table=tmp_path / "labels.csv")
    )
    assert "expected a file of labels" in fails(capsys, monkeypatch, *made.command(tmp_path / "out", table=tmp_path))


def test_slides_that_cannot_be_read(made: Made, tmp_path: Path) -> None:
    """A file of another width is named before the run begins; NaN where it is met, and a doubt is said once."""
    table, features = pd.read_csv(made.table, dtype=str), tmp_path / "features"
    features.mkdir()
    for path in made.features.iterdir():
        (features / path.name).write_bytes(path.read_bytes())
    labels = read_labels(made.table, features)
    reader = SlideReader.of(made.encoder.config)
    write.trident(features / "s0.h5", write.features(40, 13), write.tissue(40) * 512, magnification=40)
    with pytest.raises(
        ValueError, match=r"expected slides that can be read, got 1 that cannot: s0 \(expected features 12"
    ):
        Tuner(made.encoder, reader, labels, TuneConfig(folds=2), tmp_path / "out")
    assert scan(labels.paths, reader).failed and not (tmp_path / "out").exists()
    spoiled = write.features(40)
    spoiled[3] = np.nan
    write.trident(features / "s0.h5", spoiled, write.tissue(40) * 512, magnification=40)
    for mode in ("probe", "lora"):
        with pytest.raises(ValueError, match="expected slides that can be read, got s0: expected finite features"):
            Tuner(made.encoder, reader, labels, TuneConfig(folds=2, mode=mode), tmp_path / mode).run()
    said: list[str] = []
    write.trident(features / "s0.h5", write.features(40), write.tissue(40) * 1024, magnification=40)
    config = TuneConfig(folds=2, mode="lora", epochs=2, bootstraps=5)
    Tuner(made.encoder, reader, labels, config, tmp_path / "doubt", say=said.append).run()
    assert len([line for line in said if line.startswith("s0: most neighbours stand 1024 apart")]) == 1
    assert len(table) == 32


def test_other_settings_or_labels_are_refused(made: Made, tmp_path: Path) -> None:
    made.tuner(tmp_path, epochs=1, folds=2).run()
    with pytest.raises(ValueError, match=r"which has batch_size 16 \(now 8\)"):
        made.tuner(tmp_path, epochs=1, folds=2, batch_size=8).run()
    with pytest.raises(ValueError, match="which has labels"):
        made.tuner(tmp_path, epochs=1, folds=2, label="shuffled").run()


def test_columns_as_others_name_them(made: Made, tmp_path: Path) -> None:
    rows = [f"s{i}.svs\tp{i // 2}\t{1 + i // 2 % 2}\t{int(i < 4)}" for i in range(8)]
    (tmp_path / "a.tsv").write_text("FILENAME\tPATIENT\tlabel\tcensorship\n" + "\n".join(rows))
    labels = read_labels(tmp_path / "a.tsv", made.features)
    assert labels.cases[:3] == ["p0", "p0", "p1"] and labels.paths[1] == made.features / "s1.h5"
    assert labels.task.strata == ("1", "2") and labels.targets.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    labels = read_labels(tmp_path / "a.tsv", made.features, time="label", event="censorship")
    assert isinstance(labels.task, Survival) and labels.targets[:, 1].tolist() == [0.0] * 4 + [1.0] * 4
    rows = [f"s{i},{(2, 10, 9)[i % 3]}" for i in range(6)]
    (tmp_path / "b.csv").write_text("slide_id,label\n" + "\n".join(rows) + "\nx,2\n")
    labels = read_labels(tmp_path / "b.csv", made.features, skip_missing=True)
    assert labels.cases == labels.slides == [f"s{i}" for i in range(6)]
    assert labels.task.strata == ("2", "9", "10")  # numbers in their order


def test_folds_keep_patients_together_and_follow_the_table(made: Made, tmp_path: Path) -> None:
    labels = read_labels(made.table, made.features)
    folds = make_folds(labels, 4, seed=1)
    assert sorted(i for fold in folds for i in fold.test) == list(range(32))
    for fold in folds:
        assert sorted(fold.train + fold.val + fold.test) == list(range(32))
        cases = [{labels.cases[i] for i in part} for part in fold]
        assert not cases[0] & cases[1] and not cases[0] & cases[2] and not cases[1] & cases[2]
        assert float(labels.targets[fold.test].double().mean()) == 0.5
    assert folds == make_folds(labels, 4, seed=1) != make_folds(labels, 4, seed=2)
    table = pd.read_csv(made.table, dtype=str)
    parts = [["train", "val", "test", ""][i // 8] for i in range(32)]
    table.assign(fold_0=parts, fold_1=parts[::-1]).to_csv(tmp_path / "given.csv", index=False)
    given = make_folds(read_labels(tmp_path / "given.csv", made.features), 5, seed=0)
    assert [fold.test for fold in given] == [list(range(16, 24)), list(range(8, 16))]
    assert given[0].train == list(range(8)) and given[0].val == list(range(8, 16))
    table.assign(fold=[i // 2 % 4 // 2 for i in range(32)]).to_csv(tmp_path / "number.csv", index=False)
    numbered = make_folds(read_labels(tmp_path / "number.csv", made.features), 5, seed=0)
    assert [len(fold.test) for fold in numbered] == [16, 16] and numbered[0].test[:4] == [0, 1, 2, 3]


def test_scores_and_intervals() -> None:
    """Means over folds; slides of a patient are drawn together, so that copies of slides narrow nothing."""
    torch.manual_seed(0)
    task = Classification(("a", "b", "c"))
    targets, outputs = torch.arange(30) % 3, torch.randn(30, 3) + 1.5 * torch.eye(3)[torch.arange(30) % 3]
    cases = [f"p{i}" for i in range(30)]
    one = FoldResult(outputs, targets, cases)
    chances = outputs.softmax(-1)
    pairs = [chances[targets == c, c][:, None] > chances[targets != c, c] for c in range(3)]
    want = sum(float(x.double().mean()) for x in pairs) / 3
    assert task.scores(outputs, targets)["auroc"] == pytest.approx(want)
    summary = summarise(task, [one, one], 50, seed=0)
    assert summary["auroc"]["mean"] == pytest.approx(want)
    assert summary["auroc"]["low"] < want < summary["auroc"]["high"]
    copied = FoldResult(outputs.repeat(2, 1), targets.repeat(2), cases * 2)
    assert summarise(task, [copied, copied], 50, seed=0)["auroc"] == pytest.approx(summary["auroc"])
    alone = task.scores(outputs[targets == 0], targets[targets == 0])
    assert np.isnan(alone["auroc"]) and 0 <= alone["balanced_accuracy"] <= 1


def test_cox_loss_by_its_formula_and_ties() -> None:
    task, risk = Survival(), torch.tensor([[0.3], [-1.0], [0.8], [0.1]], requires_grad=True)
    targets = torch.tensor([[5.0, 1], [2, 1], [9, 0], [4, 1]])
    order = targets[:, 0]
    terms = [risk[i, 0] - risk[order >= order[i], 0].logsumexp(0) for i in (0, 1, 3)]
    torch.testing.assert_close(task.loss(risk, targets), -sum(terms) / 3)
    task.loss(risk, torch.tensor([[5.0, 1], [5, 1], [9, 0], [4, 0]])).backward()  # no warning of ties
    assert float(task.loss(risk.detach(), torch.tensor([[5.0, 0]] * 4))) == 0.0
    assert np.isnan(task.scores(risk, torch.tensor([[5.0, 0], [5, 1], [5, 0], [4, 0]]))["c_index"])


def test_learning_rates_by_layer_and_epoch() -> None:
    encoder = SlideEncoder(**write.TINY)
    model, config = SlideModel(encoder, 2, None), TuneConfig(mode="full", epochs=5)
    groups = parameter_groups(model, config)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (group["scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert len(found) == len(names)
    assert found["encoder.encoder.layers.0.ffn.fc1.weight"] == (0.95**2, 0.05)
    assert found["encoder.encoder.layers.1.ffn.fc1.bias"] == (0.95, 0.0)
    assert found["encoder.cls_token"] == (0.95**3, 0.0)
    for name in ("encoder.patch_embed.proj.weight", "head.linear.weight"):
        assert found[name] == (1.0, 0.05)
    assert config.rate(0.5) == pytest.approx(1.25e-4) and config.rate(1) == pytest.approx(2.5e-4)
    assert config.rate(3) == pytest.approx((2.5e-4 + 1e-6) / 2) and config.rate(5) == pytest.approx(1e-6)
    add_low_rank(encoder, 4, 8.0)
    groups = parameter_groups(model, TuneConfig(mode="lora"))
    assert {group["scale"] for group in groups} == {1.0}
    trained = sum(p.numel() for group in groups for p in group["params"])
    wide, inner = write.TINY["embed_dim"], write.TINY["ffn_dim"]
    assert trained == 2 * 4 * (4 * 2 * wide + 2 * (wide + inner)) + 2 * wide + 2
