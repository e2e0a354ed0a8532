"""A run over all folds in a folder: embeddings for a probe, a trained model per fold, predictions and scores."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dilated_attention_pytorch.core.files import replace_text
from dilated_attention_pytorch.core.validation import check_int, listed
from dilated_attention_pytorch.models import weights
from dilated_attention_pytorch.models.checkpoint import save_pretrained
from dilated_attention_pytorch.models.slide.embed import EmbedOptions, SlideEmbedder, run_settings
from dilated_attention_pytorch.models.slide.encoder import SlideEncoder
from dilated_attention_pytorch.models.slide.files import Slide, SlideReader
from dilated_attention_pytorch.models.slide.formats import package
from dilated_attention_pytorch.models.slide.results import ResultFolder, hold
from dilated_attention_pytorch.models.slide.tune.config import TuneConfig
from dilated_attention_pytorch.models.slide.tune.folds import Fold, FoldResult, make_folds, summarise
from dilated_attention_pytorch.models.slide.tune.labels import Labels
from dilated_attention_pytorch.models.slide.tune.loop import BEST, STATE, FoldTrainer, Inputs, save_tensors
from dilated_attention_pytorch.models.slide.tune.model import Head, SlideModel, add_low_rank, merge_low_rank
from dilated_attention_pytorch.models.slide.work import reason, scan

SETTINGS, HEAD, TESTED, EMBEDDINGS = "tune.json", "head.safetensors", "test.safetensors", "embeddings"


class Tuner:
    """Tunes an encoder on labels in a folder; the same call goes on with a run that was interrupted.

    The folder gets `predictions.csv`, `metrics.json` and a folder per fold: `head.safetensors`, TensorBoard's events
    and, unless the encoder is frozen, the tuned encoder as `save_pretrained` writes it.

    Args:
        encoder: on the device that computes, with the dropout that training takes. It is not changed.
        reader: of the feature files, for this encoder.
        labels: of the slides.
        config: the settings.
        out: the folder.
        checkpoint: the encoder's name, for the record.
        say: is told what happens, a line each.

    Raises:
        ValueError: labels with too few patients for the folds; a layer that is not there; slides that cannot be read,
            all named; a folder with a run of other settings.
    """

    def __init__(
        self, encoder: SlideEncoder, reader: SlideReader, labels: Labels, config: TuneConfig, out: Path, *,
        checkpoint: str = "", say: Callable[[str], None] = lambda line: None,
    ) -> None:  # fmt: skip
        if config.layer is not None:
            check_int("layer", config.layer, 0, encoder.config.depth + 1)
        if not labels.task.is_separable and config.batch_size < 2:
            raise ValueError("expected batch_size of 2 or more for survival, which orders the slides of a batch, got 1")
        self.encoder, self.reader, self.labels, self.config = encoder.eval(), reader, labels, config
        self.out, self.say, self.checkpoint = out, say, checkpoint
        self.folds = make_folds(labels, config.folds, config.seed)
        found = scan(sorted(set(labels.paths)), reader)
        if found.failed:
            lines = [f"{one.name} ({one.problem})" for one in found.failed]
            raise ValueError(f"expected slides that can be read, got {len(lines)} that cannot: {listed(lines, '; ')}")
        self._found = found
        self._doubtful: set[str] = set()

    def run(self) -> dict[str, Any]:
        """Train and test every fold.

        Returns:
            What `metrics.json` holds: each score's mean over folds with its interval, and each fold's scores.
        """
        config, labels = self.config, self.labels
        facts = [labels.slides, labels.cases, labels.targets.tolist(), labels.task.strata, self.folds]
        options = EmbedOptions(dtype=config.dtype, layers=() if config.layer is None else (config.layer,))
        base = run_settings(self.encoder, self.reader, self.checkpoint, options)
        kept = asdict(config) | {"dtype": base["dtype"], "labels": hashlib.sha256(repr(facts).encode()).hexdigest()}
        devices = [self.encoder.cls_token.device] if self.encoder.cls_token.is_cuda else []
        with hold(self.out, SETTINGS, base | kept), torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "expected about one tile on each place")  # the reader has said it
            inputs = self._embedded(base, options) if config.mode == "probe" else self._slides
            tested = [self._fold(number, fold, inputs) for number, fold in enumerate(self.folds)]
            return self._write(tested)

    def _fold(self, number: int, fold: Fold, inputs: Inputs) -> FoldResult:
        """A fold's outputs: from an earlier run, or trained now."""
        folder, labels = self.out / f"fold_{number}", self.labels
        folder.mkdir(exist_ok=True)
        targets, cases = labels.targets[fold.test], [labels.cases[i] for i in fold.test]
        if (folder / TESTED).is_file():
            return FoldResult(weights.read_safetensors(folder / TESTED)["outputs"], targets, cases)
        torch.manual_seed(self.config.seed + number)
        model = self._model(fold, inputs)
        trainer = FoldTrainer(model, inputs, labels.task, labels.targets, fold, self.config, folder)
        outputs = trainer.run()
        head = getattr(model, "head", model)
        if isinstance(model, SlideModel):
            merge_low_rank(model.encoder)
            save_pretrained(model.encoder, folder)
        about = {"classes": json.dumps(labels.task.strata), "layer": json.dumps(self.config.layer)}
        save_tensors(folder / HEAD, head.state_dict(), about)
        save_tensors(folder / TESTED, {"outputs": outputs})  # the last: the fold is done
        for name in (STATE, BEST):
            (folder / name).unlink(missing_ok=True)
        scores = ", ".join(f"{name} {x:.3f}" for name, x in labels.task.scores(outputs, targets).items())
        parts = f"{len(fold.train):,} slides to train, {len(fold.val):,} to validate, {len(fold.test):,} to test"
        self.say(f"fold {number}: {parts}; best of {trainer.epoch} epochs {trainer.best_epoch}; {scores}")
        return FoldResult(outputs, targets, cases)

    def _model(self, fold: Fold, inputs: Inputs) -> nn.Module:
        """A new model for a fold."""
        config, outputs = self.config, self.labels.task.num_outputs
        if config.mode == "probe":
            ((_, (x,)),) = inputs(fold.train)
            head = Head(x.shape[1], outputs).to(x.device)
            head.standardise(x)
            return head
        encoder = copy.deepcopy(self.encoder)
        if config.mode == "lora":
            assert config.alpha is not None
            add_low_rank(encoder, config.rank, config.alpha)
        return SlideModel(encoder, outputs, config.layer)

    def _embedded(self, settings: dict[str, Any], options: EmbedOptions) -> Inputs:
        """Embeddings of all slides, written into the folder, as the probe's inputs: all that are asked for at once."""
        folder = ResultFolder(self.out / EMBEDDINGS, "npz", settings)
        with folder.held():
            for one in SlideEmbedder(self.encoder, self.reader, folder, options).run(self._found):
                if one.problem is not None:
                    raise ValueError(f"expected slides that can be read, got {one.name}: {one.problem}")
                self._doubt(one.name, one.doubts)
        rows = []
        for path in self.labels.paths:
            with np.load(folder.file(path.stem)) as arrays:
                rows.append(arrays["features"] if self.config.layer is None else arrays["layers"][0])
        table = torch.from_numpy(np.stack(rows)).to(self.encoder.cls_token.device)
        return lambda chosen: iter([(slice(0, len(chosen)), (table[list(chosen)],))])

    def _slides(self, chosen: Sequence[int]) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
        """Slides one by one, the next one read while one is computed."""
        device = self.encoder.cls_token.device
        with ThreadPoolExecutor(1) as pool:
            waiting = [pool.submit(self._read, i) for i in chosen[:1]]
            for i in range(len(chosen)):
                slide = waiting.pop().result()
                waiting += [pool.submit(self._read, j) for j in chosen[i + 1 : i + 2]]
                self._doubt(slide.name, slide.doubts)
                yield slice(i, i + 1), (slide.tiles.to(device), slide.coords.to(device))

    def _read(self, number: int) -> Slide:
        path = self.labels.paths[number]
        try:
            return self.reader.read(path)
        except Exception as error:  # half a file can raise anything
            raise ValueError(f"expected slides that can be read, got {path.stem}: {reason(error)}") from error

    def _doubt(self, name: str, doubts: Sequence[str]) -> None:
        if name not in self._doubtful:
            self._doubtful.add(name)
            for line in doubts:
                self.say(f"{name}: {line}")

    def _write(self, tested: list[FoldResult]) -> dict[str, Any]:
        pandas, task = package("pandas"), self.labels.task
        tables = []
        for number, (fold, one) in enumerate(zip(self.folds, tested, strict=True)):
            names = {"slide_id": [self.labels.slides[i] for i in fold.test], "case_id": one.cases, "fold": number}
            tables.append(pandas.DataFrame(names | task.columns(one.outputs, one.targets)))
        table = pandas.concat(tables).to_csv(index=False, float_format="%.9g")
        replace_text(self.out / "predictions.csv", table)
        summary = summarise(task, tested, self.config.bootstraps, self.config.seed)
        metrics: dict[str, Any] = {
            "scores": summary,
            "folds": [task.scores(one.outputs, one.targets) for one in tested],
        }
        metrics |= {"slides": len(self.labels.slides), "patients": len(set(self.labels.cases))}
        replace_text(self.out / "metrics.json", json.dumps(_plain(metrics), indent=1) + "\n")
        return metrics


def _plain(value: Any) -> Any:
    """With null for NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and math.isnan(value) else value
