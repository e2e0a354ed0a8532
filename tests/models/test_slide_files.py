"""Slides from files: every producer's layout against the official rule, damaged files, and what a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import official_rules
import pytest
import slide_files as write
import torch

from dilated_attention_pytorch.models import SlideEncoder, save_pretrained
from dilated_attention_pytorch.models.slide.files import Slide, SlideReader, find_slides, pad_slides
from dilated_attention_pytorch.models.slide.grid import neighbour_distance, spacing_of
from dilated_attention_pytorch.testing import relative_norm

# What equality with the official rule in fp32 means in all tests of the encoder.
CLOSE = 1e-5


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> SlideEncoder:
    return write.checkpoint(tmp_path_factory.mktemp("encoder"))


def assert_official(encoder: SlideEncoder, slide: Slide, x: np.ndarray, at: np.ndarray) -> None:
    """The encoder on what was read is the official rule on tiles at columns and rows `at`."""
    state = {key: value.double() for key, value in encoder.state_dict().items()}
    tiles, coords = torch.from_numpy(x).double(), 256 * torch.from_numpy(np.asarray(at, np.int64))
    want, hidden = official_rules.encode(state, tiles, coords, write.BRANCHES, 4)
    with torch.inference_mode():
        out = encoder(slide.tiles, slide.coords)
    assert relative_norm(out.pooled[0].double(), want) <= CLOSE
    for mine, theirs in zip(out.layers, hidden, strict=True):
        assert relative_norm(mine[0].double(), theirs) <= CLOSE


class TestLayouts:
    x, at = write.features(333), write.tissue(333)

    @pytest.mark.parametrize("magnification", [20, 40])
    @pytest.mark.parametrize("batched", [False, True])
    def test_trident(self, encoder: SlideEncoder, tmp_path: Path, magnification: int, batched: bool) -> None:
        size = 256 * magnification // 20
        stored = self.x[None] if batched else self.x
        write.trident(tmp_path / "a.h5", stored, self.at * size, magnification=magnification)
        slide = SlideReader.of(encoder.config).read(tmp_path / "a.h5")
        assert not slide.doubts and slide.tile_size == size
        assert slide.said == f"TRIDENT: 256 pixels at 20x, level 0 at {magnification}x; divided by {size}"
        assert_official(encoder, slide, self.x, self.at)

    @pytest.mark.parametrize("magnification", [20, 40])
    def test_trident_with_overlap(self, encoder: SlideEncoder, tmp_path: Path, magnification: int) -> None:
        """By the tile, as TRIDENT divides, or by the stride; the file's stride is 192 pixels of 20x."""
        stride, size = 192 * magnification // 20, 256 * magnification // 20
        path = tmp_path / "a.h5"
        write.trident(path, self.x, self.at * stride, magnification=magnification, overlap=64)
        slide = SlideReader.of(encoder.config).read(path)
        (doubt,) = slide.doubts
        assert "333 tiles share" in doubt and "the grid 'stride' gives each a place" in doubt
        assert_official(encoder, slide, self.x, self.at * stride // size)
        slide = SlideReader.of(encoder.config, grid="stride").read(path)
        assert not slide.doubts and slide.said.endswith(f"; divided by {stride}")
        assert_official(encoder, slide, self.x, self.at)

    @pytest.mark.parametrize("downsample", [1, 2])
    @pytest.mark.parametrize("part", ["h5_files", "pt_files"])
    def test_clam(self, encoder: SlideEncoder, tmp_path: Path, downsample: int, part: str) -> None:
        """CLAM's contours start anywhere, so corners are no multiples of the size."""
        corners = self.at * 256 * downsample + [37, 101]
        write.clam(tmp_path, "a.b", self.x, corners, downsample=downsample)
        (path,) = find_slides(tmp_path / part)
        slide = SlideReader.of(encoder.config).read(path)
        assert slide.name == "a.b" and not slide.doubts
        assert slide.said == f"CLAM: 256 pixels, downsampled {downsample} times; divided by {256 * downsample}"
        assert_official(encoder, slide, self.x, self.at)
        (tmp_path / "patches").rename(tmp_path / "elsewhere")
        elsewhere = SlideReader.of(encoder.config, coords_folder=tmp_path / "elsewhere").read(path)
        assert torch.equal(elsewhere.coords, slide.coords)

    def test_patches_of_another_slide(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        write.clam(tmp_path, "a", self.x, self.at * 256, downsample=1)
        write.clam(tmp_path / "other", "a", self.x, self.at * 256 + 1, downsample=1)
        reader = SlideReader.of(encoder.config, coords_folder=tmp_path / "other" / "patches")
        with pytest.raises(ValueError, match=r"expected the coordinates of .*patches/a.h5, got others"):
            reader.read(tmp_path / "h5_files" / "a.h5")

    def test_stamp_is_rounded(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        """A float32 multiple of 113.12 um lies below its column as often as above."""
        write.stamp(tmp_path / "a.h5", self.x, self.at)
        slide = SlideReader.of(encoder.config).read(tmp_path / "a.h5")
        assert not slide.doubts and slide.tiles.dtype == torch.float16
        assert slide.said == "STAMP: micrometres; divided by 113.12; features in float16"
        assert_official(encoder, slide, self.x.astype(np.float16).astype(np.float32), self.at)
        assert (np.floor((self.at * 113.12).astype(np.float32).astype(float) / 113.12) != self.at).any()

    def test_slide2vec(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        path = write.slide2vec(tmp_path, "a", self.x, self.at * 461 + 7, 461)
        assert_official(encoder, SlideReader.of(encoder.config).read(path), self.x, self.at)

    def test_slide2vec_2(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        for part in ("features", "coordinates"):
            (tmp_path / part).mkdir()
        torch.save(torch.from_numpy(self.x), tmp_path / "features" / "a.pt")
        table = np.zeros(333, [("x", "i8"), ("y", "i8"), ("tile_size_lv0", "i8")])
        table["x"], table["y"], table["tile_size_lv0"] = *(self.at * 512).T, 512
        np.save(tmp_path / "coordinates" / "a.npy", table)
        slide = SlideReader.of(encoder.config).read(tmp_path / "features" / "a.pt")
        assert_official(encoder, slide, self.x, self.at)

    @pytest.mark.parametrize("name", ["a1", "[a]"])
    def test_slide2vec_tells_each_slide_its_own_size(self, encoder: SlideEncoder, tmp_path: Path, name: str) -> None:
        reader = SlideReader.of(encoder.config)
        write.slide2vec(tmp_path, "a10", self.x, self.at * 512, 512)
        path = write.slide2vec(tmp_path, name, self.x, self.at * 461, 461)
        assert reader.read(path).tile_size == 461
        (tmp_path / "tiles" / f"{name}.coordinates.meta.json").unlink()
        with pytest.raises(ValueError, match="expected attributes that tell a tile's size"):
            reader.read(path)

    def test_what_differs_from_tile_to_tile_is_not_the_first_ones(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        reader = SlideReader.of(encoder.config)
        levels = np.arange(333)[:, None] % 2 + 15.0
        np.save(tmp_path / "a.npy", np.concatenate((levels, self.at, self.x), 1))  # Owkin's
        with pytest.raises(ValueError, match=r"expected tiles of one level.*, got 15\.0, 16\.0"):
            reader.read(tmp_path / "a.npy")
        (tmp_path / "tiles").mkdir()
        table = np.zeros(333, [("x", "i8"), ("y", "i8"), ("tile_size_lv0", "i8")])  # slide2vec's
        table["x"], table["y"], table["tile_size_lv0"] = *(self.at * 512).T, 512
        table["tile_size_lv0"][0] = 256
        np.save(tmp_path / "tiles" / "b.npy", table)
        torch.save(torch.from_numpy(self.x), tmp_path / "b.pt")
        boxes = np.concatenate((self.at * 512, self.at * 512 + 512), 1)  # tiatoolbox's, the first cut by the border
        boxes[0, 2] -= 100
        np.savez(tmp_path / "c.npz", features=self.x, coords=boxes)
        for path, folder in ((tmp_path / "b.pt", tmp_path / "tiles"), (tmp_path / "c.npz", None)):
            with pytest.raises(
                ValueError, match=r"expected attributes that tell a tile's size.*\(neighbours stand 512"
            ):
                SlideReader.of(encoder.config, coords_folder=folder).read(path)
            slide = SlideReader.of(encoder.config, coords_folder=folder, patch_size_level0=512).read(path)
            assert_official(encoder, slide, self.x, self.at)

    def test_dictionaries_and_archives(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        at, size = torch.from_numpy(self.at * 300), {"patch_size_level0": 300}
        torch.save({"features": torch.from_numpy(self.x)[None], "coords": at, **size}, tmp_path / "a.pt")
        np.savez(tmp_path / "b.npz", features=self.x, coords=at.numpy(), **size)
        np.savez_compressed(tmp_path / "c.npz", features=self.x, coords=at.numpy())
        np.save(tmp_path / "d.npy", np.concatenate((np.zeros((333, 1)), self.at, self.x), 1))  # Owkin's
        reader = SlideReader.of(encoder.config, patch_size_level0=300)
        for path in find_slides(tmp_path):
            slide = reader.read(path)
            assert reader.count(path) == 333
            expected = ("the file's own tile size was taken, 1, not 300",) if path.suffix == ".npy" else ()
            assert slide.doubts == expected
            assert_official(encoder, slide, self.x, self.at)

    def test_numbers_that_are_tensors(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        """A file that tells its tile's size is believed, however it wraps the number; a gradient is left behind."""
        x, at = torch.from_numpy(self.x).requires_grad_(), torch.from_numpy(self.at * 300.0).requires_grad_()
        torch.save({"features": x, "coords": at, "patch_size_level0": torch.tensor([300])}, tmp_path / "a.pt")
        np.savez(tmp_path / "b.npz", features=self.x, coords=self.at * 300, patch_size_level0=np.array([300]))
        for path in find_slides(tmp_path):
            slide = SlideReader.of(encoder.config, patch_size_level0=256).read(path)
            assert slide.doubts == ("the file's own tile size was taken, 300, not 256",)
            assert_official(encoder, slide, self.x, self.at)

    @pytest.mark.parametrize(
        ("other", "message"),
        [
            ({"features": [1.0, 2.0]}, "expected features to be an array, got list"),
            ({"features": torch.zeros(333, 12).to_sparse()}, "expected features to be a dense tensor"),
            ({"features": torch.empty(333, 12, device="meta")}, "expected features with values"),
            ({"coords": torch.zeros(333, 2, dtype=torch.bfloat16)}, "expected coordinates of int32, .*, got float16"),
        ],
    )
    def test_what_is_no_plain_array_is_named(self, tmp_path: Path, other: dict[str, object], message: str) -> None:
        known = {"features": torch.from_numpy(self.x), "coords": torch.from_numpy(self.at), "patch_size_level0": 1}
        torch.save(known | other, tmp_path / "a.pt")
        with pytest.raises((ValueError, TypeError), match=message):
            SlideReader().read(tmp_path / "a.pt")

    @pytest.mark.parametrize("name", ["features", "coords"])
    def test_a_group_is_no_array(self, tmp_path: Path, name: str) -> None:
        with h5py.File(tmp_path / "a.h5", "w") as file:
            arrays = {"features": self.x, "coords": self.at}
            file[f"{name}/a"] = arrays.pop(name)
            for other, x in arrays.items():
                file[other] = x
        with pytest.raises(ValueError, match=rf"expected an array under one of \['{name}'.*, got a group"):
            SlideReader().read(tmp_path / "a.h5")

    def test_torch_before_1_6(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        """Its files are no archives, which cannot be mapped into memory."""
        stored = {"features": torch.from_numpy(self.x), "coords": torch.from_numpy(self.at * 256)}
        torch.save(stored | {"patch_size_level0": 256}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
        slide = SlideReader.of(encoder.config).read(tmp_path / "a.pt")
        assert_official(encoder, slide, self.x, self.at)

    @pytest.mark.filterwarnings("ignore")  # of what their own code will do one day
    def test_anndata_and_zarr(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        anndata, zarr = pytest.importorskip("anndata"), pytest.importorskip("zarr")
        pandas = pytest.importorskip("pandas")
        if hasattr(anndata.settings, "allow_write_nullable_strings"):
            anndata.settings.allow_write_nullable_strings = True  # pandas 3 gives it such strings
        table = anndata.AnnData(self.x, obsm={"spatial": self.at * 512})
        table.write_h5ad(tmp_path / "a.h5ad")
        group = zarr.open_group(tmp_path / "b.zarr", mode="w")
        group["features"], group["coordinates"] = self.x, np.concatenate((self.at * 512, self.at * 512 + 512), 1)
        # LazySlide's: the table's rows in another order than the shapes'.
        root = zarr.open_group(tmp_path / "c.zarr", mode="w")
        root.attrs["tile_spec"] = {"tiles": {"width": 256, "base_downsample": 2.0}}
        order = np.random.default_rng(0).permutation(333)
        tiles = anndata.AnnData(self.x, obs={"tile_id": np.arange(333)})
        tiles.write_zarr(tmp_path / "c.zarr" / "tables" / "uni_tiles")
        (tmp_path / "c.zarr" / "shapes" / "tiles").mkdir(parents=True)
        shapes = pandas.DataFrame({"tile_id": order, "x": self.at[order, 0] * 512, "y": self.at[order, 1] * 512})
        shapes.to_parquet(tmp_path / "c.zarr" / "shapes" / "tiles" / "shapes.parquet")
        reader = SlideReader.of(encoder.config, patch_size_level0=512)
        for path in find_slides(tmp_path):
            assert reader.count(path) == 333
            assert_official(encoder, reader.read(path), self.x, self.at)

    def test_without_a_reader(self, encoder: SlideEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "a.zarr").mkdir()
        monkeypatch.setitem(__import__("sys").modules, "zarr", None)
        with pytest.raises(ImportError, match="expected zarr, which this needs, found none: pip install zarr"):
            SlideReader.of(encoder.config).read(tmp_path / "a.zarr")


class TestGrid:
    def test_attributes_of_older_tools(self) -> None:
        older = {"patch_size": 256, "level0_magnification": 40, "target_magnification": 15, "overlap": "None"}
        spacing = spacing_of(older)
        assert spacing is not None and (spacing.size, spacing.stride) == (682, 683)  # a pixel apart, as TRIDENT has it
        clam = {"patch_size": np.int64(256), "downsample": np.array([4.0001, 4.0001]), "custom_downsample": 2}
        spacing = spacing_of(clam)
        assert spacing is not None and spacing.size == 2048
        assert spacing_of({"name": "a", "patch_size": 256}) is None

    def test_the_pixel_between_size_and_stride_is_no_doubt(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        at = write.tissue(100)
        write.trident(tmp_path / "a.h5", write.features(100), at * 683, magnification=40, target=15)
        assert not SlideReader.of(encoder.config).read(tmp_path / "a.h5").doubts

    def test_neighbours(self) -> None:
        assert neighbour_distance(np.array([[0, 0], [512, 0], [1024, 0], [5000, 512], [5000, 1024]])) == 512
        assert neighbour_distance(np.array([[0, 0], [1, 5]])) is None

    def test_level_0_of_a_40x_slide_taken_for_20x(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        """The mistake that gave an embedding 72% off: it is asked for, and a wrong answer is doubted."""
        at, x = write.tissue(200), write.features(200)
        np.savez(tmp_path / "a.npz", features=x, coords=at * 512)
        with pytest.raises(ValueError, match=r"give patch_size_level0 \(neighbours stand 512 apart\)"):
            SlideReader.of(encoder.config).read(tmp_path / "a.npz")
        wrong = SlideReader.of(encoder.config, patch_size_level0=256).read(tmp_path / "a.npz")
        assert wrong.doubts == ("most neighbours stand 512 apart, where 256 was expected",)
        with pytest.raises(
            ValueError, match="expected nothing doubtful, as strict asks, got: most neighbours stand 512 apart"
        ):
            SlideReader.of(encoder.config, patch_size_level0=256, strict=True).read(tmp_path / "a.npz")

    def test_the_encoders_own_tile_size(self, tmp_path: Path) -> None:
        at, x = write.tissue(60), write.features(60)
        write.trident(tmp_path / "a.h5", x, at * 512, magnification=40)
        for size in (224, 256):
            encoder = write.checkpoint(tmp_path / "encoder", tile_size=size)
            assert_official(encoder, SlideReader.of(encoder.config).read(tmp_path / "a.h5"), x, at)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected grid to be one of \['tile', 'stride'\], got 'hex'"):
        SlideReader(grid="hex")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected patch_size_level0 above 0"):
        SlideReader(patch_size_level0=0)
    with pytest.raises(ValueError, match="expected coords_folder to be a folder"):
        SlideReader(coords_folder=tmp_path / "none")
    with pytest.raises(ValueError, match=r"found none$"):
        find_slides(tmp_path)
    write.clam(tmp_path, "a", write.features(4), write.tissue(4), downsample=1)
    with pytest.raises(ValueError, match=r"found none; there are some in .*h5_files"):
        find_slides(tmp_path)


@pytest.mark.parametrize("strict", [False, True])
def test_forty_odd_files(encoder: SlideEncoder, tmp_path: Path, strict: bool) -> None:
    for name, (message, is_doubt) in write.odd_files(tmp_path).items():
        path = next(tmp_path.glob(f"{name}.*"))
        reader = SlideReader.of(encoder.config, strict=strict)
        if is_doubt and not strict:
            assert any(message in doubt for doubt in reader.read(path).doubts), name
            continue
        with pytest.raises(Exception) as caught:
            reader.read(path)
        assert message in f"{type(caught.value).__name__}: {caught.value}", name


class TestArrays:
    """The encoder takes what a reader gives, and NumPy arrays."""

    def test_numpy(self, encoder: SlideEncoder) -> None:
        x, coords = write.features(50)[None], (write.tissue(50) * 256)[None]
        want = encoder(torch.from_numpy(x), torch.from_numpy(coords))
        for array in (x, coords):
            array.flags.writeable = False
        assert torch.equal(encoder(x, coords).pooled, want.pooled)
        mask = np.arange(50)[None] < 40
        assert torch.equal(encoder(x, coords, mask).pooled, encoder(*map(torch.from_numpy, (x.copy(), coords.copy())),
                           torch.from_numpy(mask)).pooled)  # fmt: skip
        assert torch.equal(
            encoder.attention_map(x, coords, layer=0).tiles,
            encoder.attention_map(torch.from_numpy(x.copy()), torch.from_numpy(coords.copy()), layer=0).tiles,
        )
        with pytest.raises(TypeError, match="expected tiles of a dtype that torch has, got an array of object"):
            encoder(x.astype(object), coords)
        with pytest.raises(TypeError, match="expected tiles of a floating dtype"):
            encoder(coords, coords)

    def test_a_padded_batch(self, encoder: SlideEncoder, tmp_path: Path) -> None:
        reader, slides = SlideReader.of(encoder.config), []
        for count in (30, 77):
            write.trident(tmp_path / "a.h5", write.features(count), write.tissue(count) * 256, magnification=20)
            slides.append(reader.read(tmp_path / "a.h5"))
        together = encoder(*pad_slides(slides)).pooled
        for i, slide in enumerate(slides):
            assert relative_norm(together[i], encoder(*pad_slides([slide])).pooled[0]) <= CLOSE


class TestHub:
    """`hf-hub:` without a network: huggingface_hub's own cache, laid out as it lays it out."""

    def put(self, cache: Path, repository: str, files: dict[str, Path]) -> None:
        folder = cache / f"models--{repository.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("0" * 40)
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        for name, source in files.items():
            (snapshot / name).write_bytes(source.read_bytes())

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        constants = pytest.importorskip("huggingface_hub.constants")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        return tmp_path / "cache"

    def test_a_checkpoint_and_a_folder(self, encoder: SlideEncoder, tmp_path: Path, cache: Path) -> None:
        torch.save({"model": encoder.state_dict()}, tmp_path / "slide_encoder.pth")
        save_pretrained(encoder, tmp_path / "saved")
        (tmp_path / "other.json").write_text('{"architecture": "vit_giant"}')  # of the tile encoder beside it
        official = {"slide_encoder.pth": tmp_path / "slide_encoder.pth", "config.json": tmp_path / "other.json"}
        self.put(cache, "org/official", official)
        self.put(cache, "org/ours", {path.name: path for path in (tmp_path / "saved").iterdir()})
        shape: dict[str, Any] = {key: write.TINY[key] for key in ("num_heads", "segment_lengths", "dilation_rates")}
        found = [
            SlideEncoder.from_pretrained("hf-hub:org/official", **shape),
            SlideEncoder.from_pretrained("hf-hub:org/ours"),
            SlideEncoder.from_pretrained("hf-hub:org/ours@main"),
        ]
        for one in found:
            assert one.config == encoder.config
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), encoder.parameters(), strict=True))

    def test_what_is_not_there(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(FileNotFoundError, match="in hf-hub:org/none, got: "):
            SlideEncoder.from_pretrained("hf-hub:org/none")
        for name in ("hf-hub:org", "hf-hub:a/b/c", "hf-hub:"):
            with pytest.raises(ValueError, match="expected hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION, got"):
                SlideEncoder.from_pretrained(name)
        monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
        with pytest.raises(ImportError, match="expected huggingface_hub, which hf-hub: needs"):
            SlideEncoder.from_pretrained("hf-hub:org/none")


def test_the_writers_write_what_h5py_reads(tmp_path: Path) -> None:
    write.trident(tmp_path / "a.h5", write.features(5), write.tissue(5), magnification=40)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file["coords"].attrs["patch_size_level0"] == 512 and file["features"].shape == (5, 12)
