"""A slide gives fields of one sharp layer of cells; one that cannot be read says so, and the way round."""

import re
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pandas as pd
import pytest
import tifffile
from pylibCZIrw import czi
from slides import KINDS, TILE, draw
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.data.dataset import read_data_set
from aplsmear.images.reading import read_image
from aplsmear.sources.slide import SlideError, open_slide

MPP = 0.25
PIXELS = np.random.default_rng(4).integers(0, 256, (40, 56, 3)).astype(np.uint8).repeat(16, 0).repeat(16, 1)
OME = {"PhysicalSizeX": 250, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25, "PhysicalSizeYUnit": "µm"}
COARSE = (1e4, 1e4)  # px per cm


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A drawn slide, and the kind of each of its tiles."""
    path = tmp_path_factory.mktemp("slides") / "S1.tif"
    return path, draw(path)


def run(*typed: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["fields", *map(str, typed)])
    return result.exit_code, " ".join(result.output.split())


def tiled(path: Path, pixels: np.ndarray = PIXELS, described: dict | None = None, **options: object) -> Path:
    """A TIFF with two levels; the second is every fourth pixel of the first."""
    small = pixels[:, ::4, ::4] if pixels.shape[0] == 3 else pixels[::4, ::4]
    options = {"tile": (128, 128), "photometric": "rgb"} | options
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        writer.write(pixels, subifds=1 if described else None, metadata=described, **options)
        writer.write(small, subfiletype=1, metadata=None, **options)
    return path


def test_fields_lie_where_cells_are_sharp_and_in_one_layer_and_no_others_make_up_the_number(
    slide, tmp_path
) -> None:
    path, kinds = slide
    code, said = run(path, "--to", tmp_path / "out", "--size", TILE, "--fields", 40)
    assert code == 0, said
    fields = pd.read_csv(tmp_path / "out" / "fields.csv")
    taken = [KINDS[kinds[y // TILE, x // TILE]] for x, y in zip(fields["x"], fields["y"], strict=True)]
    there = int((kinds == KINDS.index("one layer")).sum())
    assert set(taken) == {"one layer"}
    assert 0.75 * there <= len(taken) <= there
    for what in ("out of focus", "several layers", f"only these {len(taken)}", "each slide counts as one"):
        assert what in said


def test_pictures_show_the_place_that_the_table_names_and_the_folder_is_a_data_set(slide, tmp_path) -> None:
    path, _ = slide
    typed = (path, "--size", 256, "--fields", 3, "--mpp", 0.5, "--patient", "P7", "--diagnosis", "apl")
    for folder in ("out", "again"):
        code, said = run(*typed, "--to", tmp_path / folder)
        assert code == 0, said
    first, *others = pd.read_csv(tmp_path / "out" / "fields.csv").itertuples()
    shown = read_image(tmp_path / "out" / "wsi" / first.imgName).astype(int)
    with tifffile.TiffFile(path) as file:
        there = file.pages[0].asarray()[first.y : first.y + first.side, first.x : first.x + first.side]
    halved = there.reshape(256, 2, 256, 2, 3).mean(axis=(1, 3))
    assert (first.side, first.mpp, len(others)) == (512, 0.5, 2)
    assert np.abs(shown - halved).mean() < 1
    smears = read_data_set(tmp_path / "out", {}, min_box=1, skip_bad_images=False, labelled=False).smears
    assert set(smears["patient"]) == {"P7"}
    assert "m3" in (tmp_path / "out" / "wsi.csv").read_text()
    assert read_image(tmp_path / "out" / "S1.png").shape == (1200, 1600, 3)
    files = sorted(one.relative_to(tmp_path / "out") for one in (tmp_path / "out").rglob("*.*"))
    assert len(files) == 6
    for file in files:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_a_slide_of_empty_glass_has_no_fields(tmp_path) -> None:
    noise = np.random.default_rng(1).normal(0, 2, (1024, 1024, 3))
    glass = np.clip(235 + noise, 0, 255).astype(np.uint8)
    path = tiled(tmp_path / "glass.tif", glass, resolution=(4e4, 4e4), resolutionunit="CENTIMETER")
    code, said = run(path, "--to", tmp_path / "out", "--size", 512)
    assert code == 1
    assert "empty 4" in said
    assert not (tmp_path / "out").exists()


def write_czi(path: Path, pixels: np.ndarray = PIXELS, how: str = "zstd1:ExplicitLevel=2") -> Path:
    with czi.create_czi(str(path), compression_options=how) as file:
        file.write(data=np.ascontiguousarray(pixels[..., ::-1]), plane={"C": 0}, location=(-30, 7))
        file.write_metadata("", scale_x=2.5e-7, scale_y=2.5e-7)
    return path


def write_jpeg_xr(path: Path) -> Path:
    """A CZI as scanners of Zeiss write it. libCZI only reads this compression, so its data are put in."""
    data = write_czi(path, how="uncompressed:").read_bytes()
    plain = np.ascontiguousarray(PIXELS[..., ::-1]).tobytes()
    rgb24 = bytes.fromhex(
        "24C3DD6F034EFE4BB1853D77768DC90D"
    )  # the name of its kind of pixels; BGR ends with 0C
    packed = imagecodecs.jpegxr_encode(PIXELS, level=1.0).replace(rgb24, rgb24[:-1] + b"\x0c")
    changed = bytearray(data.replace(plain, packed.ljust(len(plain), b"\0")))
    entries = [match.start() for match in re.finditer(b"DV\3\0\0\0", bytes(changed))]
    for start in entries:
        changed[start + 18] = 4  # the compression that an entry of the directory names
    path.write_bytes(changed)
    assert len(entries) == 2
    return path


PLANES = np.ascontiguousarray(PIXELS.transpose(2, 0, 1))
APERIO = "Aperio Image Library v12\r\n896x640 (128x128)|AppMag = 40|MPP = 0.25"
SLIDES = {
    "aperio.svs": lambda path: tiled(path, description=APERIO),
    "plain.tif": lambda path: tiled(path, resolution=(4e4, 4e4), resolutionunit="CENTIMETER"),
    "chunky.ome.tif": lambda path: tiled(path, described={"axes": "YXS"} | OME),
    "planar.ome.tif": lambda path: tiled(path, PLANES, {"axes": "SYX"} | OME, planarconfig="separate"),
    "pages.ome.tif": lambda path: tiled(path, PLANES, {"axes": "CYX"} | OME, photometric="minisblack"),
    "zeiss.czi": write_czi,
    "jpeg-xr.czi": write_jpeg_xr,
}


@pytest.mark.parametrize("name", SLIDES)
def test_each_format_gives_the_pixels_that_were_written(name, tmp_path) -> None:
    with open_slide(SLIDES[name](tmp_path / name)) as opened:
        assert opened.mpp == pytest.approx(MPP)
        assert opened.size == (896, 640)
        part, level = opened.region(100, 50, 333, 222, (222, 333))
        assert level == 0
        assert np.array_equal(part, PIXELS[50:272, 100:433])
        coarse, level = opened.region(64, 32, 512, 256, (64, 128))
        assert level > 0
        assert np.array_equal(coarse, PIXELS[32:288:4, 64:576:4])
        outside, _ = opened.region(800, 600, 128, 128, (128, 128))
        assert np.array_equal(outside[:40, :96], PIXELS[600:, 800:])
        assert (outside[40:] == 255).all()


def test_a_large_part_is_read_in_pieces_with_the_same_pixels(tmp_path, monkeypatch) -> None:
    with open_slide(SLIDES["chunky.ome.tif"](tmp_path / "a.ome.tif")) as opened:
        whole, _ = opened.region(0, 0, 896, 640, (320, 448))
        monkeypatch.setattr("aplsmear.sources.slide._AT_ONCE", 10_000)
        parts, _ = opened.region(0, 0, 896, 640, (320, 448))
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("name", ["a.tif", "a.ome.tif"])
def test_damaged_pixels_are_named_by_their_place(name, tmp_path) -> None:
    noise = np.random.default_rng(1).integers(0, 256, PIXELS.shape).astype(np.uint8)
    path = tiled(tmp_path / name, noise, {"axes": "YXS"} | OME, compression="zlib")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 5000] = bytes(5000)
    path.write_bytes(data)
    with open_slide(path, MPP) as opened, pytest.raises(SlideError, match="near column 0, row 0 are damaged"):
        opened.region(0, 0, 896, 640, (640, 896))


def test_without_a_resolution_a_slide_needs_one_and_more_than_was_scanned_is_refused(tmp_path) -> None:
    screen = tiled(tmp_path / "screen.tif", resolution=(72, 72), resolutionunit="INCH")
    for path, what in ((tiled(tmp_path / "none.tif"), "names no resolution"), (screen, "names 352.8 micro")):
        code, said = run(path, "--to", tmp_path / "out")
        assert code == 1
        assert what in said
        assert "--slide-mpp" in said
        with open_slide(path, 0.5) as slide:
            assert slide.mpp == 0.5
    code, said = run(screen, "--to", tmp_path / "out", "--slide-mpp", 0.5, "--mpp", 0.25)
    assert code == 1
    assert "No slide can show more than was scanned" in said


def grey_czi(path: Path) -> Path:
    return write_czi(path, PIXELS[:, :, :1])


def as_text(path: Path) -> Path:
    path.write_text("no slide")
    return path


def cut_off(path: Path) -> Path:
    tiled(path, resolution=COARSE, resolutionunit="CENTIMETER")
    path.write_bytes(path.read_bytes()[:3000])
    return path


def striped(path: Path) -> Path:
    tifffile.imwrite(path, PIXELS, photometric="rgb", metadata=OME)
    return path


REFUSED = {
    "olympus.vsi": (as_text, "VSI of Olympus"),
    "unknown.abc": (as_text, "ends with .abc"),
    "damaged.svs": (as_text, "bfconvert"),
    "cut.tif": (cut_off, "Copy it again from the scanner"),
    "text.czi": (as_text, "CZI of Zeiss cannot be read"),
    "text.ome.tif": (as_text, "OME-TIFF cannot be read"),
    "grey.czi": (grey_czi, "8-bit colour"),
    "deep.ome.tif": (lambda path: tiled(path, PIXELS.astype(np.uint16), {"axes": "YXS"} | OME), "uint16"),
    "strips.ome.tif": (striped, "vips tiffsave"),
    "away.svs": (lambda path: path, "no such file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_slide_that_cannot_be_read_says_its_format_and_the_way_round(name, tmp_path) -> None:
    make, said = REFUSED[name]
    with pytest.raises(SlideError, match=said), open_slide(make(tmp_path / name)):
        pass


def test_all_slides_are_looked_at_before_the_work(slide, tmp_path) -> None:
    path, _ = slide
    bad = [as_text(tmp_path / name) for name in ("one.vsi", "two.kfb")]
    code, said = run(path, *bad, "--to", tmp_path / "out")
    assert code == 1
    assert "one.vsi" in said
    assert "two.kfb" in said
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    code, said = run(path, "--to", tmp_path / "full")
    assert code == 1
    assert "is not empty" in said
    code, said = run(path, path, "--to", tmp_path / "out")
    assert code == 1
    assert "the same name" in said


def test_without_the_extra_the_command_names_it(slide, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    with pytest.raises(SlideError, match=r"aplsmear\[slides\]"), open_slide(slide[0]):
        pass
