"""What is written of slides: a file each, or a table of all; a folder that one run with one set of settings fills."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.core.files import check_path, lock, remove_leftovers, replace_file, replace_text
from dilated_attention_pytorch.core.validation import check_choice, check_instance, quoted
from dilated_attention_pytorch.models.slide.formats import package

Format = Literal["h5", "pt", "npz", "csv", "parquet"]
TABLES = ("csv", "parquet")
SETTINGS, TABLE, PARTS = "embed.json", "embeddings", "slides"
# Settings that change how numbers are rounded, at most.
_FREE = ("versions", "device", "checkpoint")


class Embedding(NamedTuple):
    """A slide's result, on the CPU, in fp32.

    Attributes:
        features: `(D,)`, the slide's embedding.
        layers: `(n, D)`, the same of the layers asked for.
        tiles: `(L, D)`, each tile's output; None unless asked for.
        coords: `(L, 2)`, the tiles' corners as the file had them; None without `tiles`.
        about: name, number of tiles and what was done with the coordinates.
    """

    features: Tensor
    layers: Tensor
    tiles: Tensor | None
    coords: Tensor | None
    about: dict[str, Any]

    def arrays(self) -> dict[str, Tensor]:
        """What is written, by name."""
        named = {"features": self.features, "layers": self.layers, "tiles": self.tiles, "coords": self.coords}
        return {key: x for key, x in named.items() if x is not None and x.numel()}


@contextlib.contextmanager
def hold(folder: Path, name: str, settings: dict[str, Any]) -> Iterator[None]:
    """Make a run's folder, or find that it holds the same run by the file `name` of its settings, and keep others from
    writing to it.

    Raises:
        ValueError: a folder with a run of other settings; the message names what differs.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"expected a folder for results, got the file {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder):
        remove_leftovers(folder)
        file, now = folder / name, json.loads(json.dumps(settings))  # as a file has them
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else now
        names = [key for key in sorted({*now, *kept} - {*_FREE}) if now.get(key) != kept.get(key)]
        if names:
            differences = ", ".join(f"{key} {quoted(kept.get(key))} (now {quoted(now.get(key))})" for key in names)
            raise ValueError(
                f"expected the settings that {folder} was begun with, which has {differences}; give those, or "
                "another folder"
            )
        if not file.is_file():
            replace_text(file, json.dumps(settings, indent=1) + "\n")
        yield


class ResultFolder:
    """The folder of a run.

    Args:
        path: made if need be.
        format: of the files.
        settings: of the run, plain values; written into every file.

    Raises:
        ValueError: a folder with a run of other settings; the message names what differs.
        ImportError: the format's package is not installed.
    """

    def __init__(self, path: Path, format: Format, settings: dict[str, Any]) -> None:
        path = check_path("path", path)
        check_choice("format", format, Format)
        check_instance("settings", settings, dict)
        for name in {"h5": ["h5py"], "csv": ["pandas"], "parquet": ["pandas", "pyarrow"]}.get(format, []):
            package(name)
        self.path, self.format, self.settings = path, format, settings
        self._ending = "npz" if format in TABLES else format
        self._slides = path / PARTS if format in TABLES else path

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, or find that it holds the same run, and keep others from writing to it."""
        with hold(self.path, SETTINGS, self.settings | {"format": self.format}):
            self._slides.mkdir(exist_ok=True)
            remove_leftovers(self._slides)
            yield

    def file(self, name: str) -> Path:
        """The file of a slide."""
        return self._slides / f"{name}.{self._ending}"

    def has(self, *sources: Path) -> bool:
        """Whether the result of a feature file, the first of a slide's sources, is there and no older than any."""
        file = self.file(sources[0].stem)
        return file.is_file() and file.stat().st_mtime >= max(source.stat().st_mtime for source in sources)

    def write(self, name: str, result: Embedding) -> None:
        """Write a slide's file, whole or not at all; the same bytes for the same result."""
        content = _CONTENT[self._ending](result.arrays(), result.about | {"settings": self.settings})
        replace_file(self.file(name), lambda path: path.write_bytes(content))

    def write_problems(self, problems: dict[str, str]) -> None:
        """Write `problems.csv`, a line per slide that has no result, or remove it where there is none."""
        target = self.path / "problems.csv"
        if not problems:
            target.unlink(missing_ok=True)
            return
        text = io.StringIO(newline="")
        csv.writer(text).writerows([("slide", "problem"), *sorted(problems.items())])
        replace_text(target, text.getvalue())

    def write_table(self, names: Iterable[str]) -> Path | None:
        """Write the table of slides that have a file, a row for each and for each of its layers."""
        if self.format not in TABLES:
            return None
        pandas, keys, rows = package("pandas"), [], []
        for name in sorted(names):
            with np.load(self.file(name)) as archive:
                about = json.loads(str(archive["about"]))
                keys.append((name, about["num_tiles"], "pooled"))
                rows.append(archive["features"])
                for layer, row in zip(self.settings["layers"], archive.get("layers", []), strict=True):
                    keys.append((name, about["num_tiles"], str(layer)))
                    rows.append(row)
        values = np.stack(rows) if rows else np.zeros((0, 0), np.float32)
        table = pandas.DataFrame(keys, columns=["slide", "num_tiles", "layer"])
        table = pandas.concat(
            (table, pandas.DataFrame(values, columns=[f"f{i}" for i in range(values.shape[1])])), axis=1
        )
        target = self.path / f"{TABLE}.{self.format}"
        settings = json.dumps(self.settings)
        if self.format == "csv":
            replace_text(target, f"# {settings}\n" + table.to_csv(index=False))
            return target
        arrow = package("pyarrow").Table.from_pandas(table, preserve_index=False)
        arrow = arrow.replace_schema_metadata((arrow.schema.metadata or {}) | {b"dilated_attention": settings.encode()})
        replace_file(target, lambda path: package("pyarrow.parquet").write_table(arrow, path))
        return target


def _h5(arrays: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with package("h5py").File(buffer, "w") as file:  # without times, so that equal results are equal bytes
        for key, x in arrays.items():
            file.create_dataset(key, data=x.numpy(), track_times=False)
        for key, value in about.items():
            file.attrs[key] = json.dumps(value) if isinstance(value, dict | list) else value
    return buffer.getvalue()


def _pt(arrays: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save({key: x.clone() for key, x in arrays.items()} | about, buffer)
    return buffer.getvalue()


def _npz(arrays: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    named: dict[str, Any] = {key: x.numpy() for key, x in arrays.items()}
    np.savez(buffer, **named, about=np.array(json.dumps(about)))
    return buffer.getvalue()


_CONTENT = {"h5": _h5, "pt": _pt, "npz": _npz}
