"""A TIFF of any kind is read as the pixels that were written, or refused with a reason and a fix."""

import io
import sys
from subprocess import run

import numpy as np
import pytest
import tifffile
from PIL import Image

from aplsmear.images.reading import ImageError, decode, image_size, read_image, read_picture

Y, X = np.mgrid[0 : 1 : 48 * 1j, 0 : 1 : 80 * 1j]
NOISE = np.random.default_rng(3).integers(0, 40, (48, 80, 3))
RGB = (np.stack([200 * X, 200 * Y, 40 + 120 * X * Y], axis=2).round() + NOISE).astype(np.uint8)
GREY = RGB[:, :, 1]
OTHER = np.ascontiguousarray(RGB[::-1, ::-1])
PLANES = np.ascontiguousarray(RGB.transpose(2, 0, 1))
DEEP = RGB.astype(np.uint16) * 256 + 77


def tiff(*pages: tuple[np.ndarray, dict], **options) -> bytes:
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer, **options) as writer:
        for pixels, described in pages:
            writer.write(pixels, **({"metadata": None} | described))
    return buffer.getvalue()


def one(pixels: np.ndarray, **described) -> bytes:
    return tiff(
        (
            pixels,
            {"photometric": "rgb" if 3 in (pixels.shape[-1], pixels.shape[0]) else "minisblack"} | described,
        )
    )


READ = {
    "16 bits in planes": one(PLANES.astype(np.uint16) * 256 + 77, planarconfig="separate"),
    "8 bits in planes": one(PLANES, planarconfig="separate"),
    "planes in tiles": one(PLANES, planarconfig="separate", tile=(16, 32), compression="zlib"),
    "planes, compressed, with a predictor": one(
        PLANES.astype(np.uint16) * 256, planarconfig="separate", compression="lzw", predictor=True
    ),
    "tiles": one(RGB, tile=(32, 32)),
    "tiles of 16 bits, LZW": one(DEEP, tile=(32, 32), compression="lzw", predictor=True),
    "strips of one row": one(RGB, rowsperstrip=1, compression="packbits"),
    "Zstandard": one(RGB, compression="zstd"),
    "LZMA": one(RGB, compression="lzma"),
    "BigTIFF": tiff((RGB, {"photometric": "rgb"}), bigtiff=True),
    "BigTIFF, big-endian, 16 bits": tiff((DEEP, {"photometric": "rgb"}), bigtiff=True, byteorder=">"),
    "big-endian, 16 bits": tiff((DEEP, {"photometric": "rgb"}), byteorder=">"),
    "no resolution": one(RGB, resolution=None),
    "composite of ImageJ": tiff((PLANES, {"metadata": {"axes": "CYX", "mode": "composite"}}), imagej=True),
    "composite of ImageJ, 16 bits": tiff(
        (PLANES.astype(np.uint16) * 256, {"metadata": {"axes": "CYX"}}), imagej=True
    ),
    "channels of OME": tiff((PLANES, {"metadata": {"axes": "CYX"}, "photometric": "minisblack"}), ome=True),
    "channels of OME by name, in another order": tiff(
        (PLANES[::-1], {
            "metadata": {"axes": "CYX", "Channel": {"Name": ["Blue", "Green", "Red"]}},
            "photometric": "minisblack",
        }), ome=True,
    ),
    "channels of OME by colour, in another order": tiff(
        (PLANES[[1, 0, 2]], {
            "metadata": {"axes": "CYX", "Channel": {"Color": [0x00FF00FF, -0xFFFF01, 0x0000FFFF]}},
            "photometric": "minisblack",
        }), ome=True,
    ),
    "RGB of OME": tiff((RGB, {"metadata": {"axes": "YXS"}, "photometric": "rgb"}), ome=True),
    "RGB of OME with a pyramid": tiff(
        (RGB, {"metadata": {"axes": "YXS"}, "photometric": "rgb", "subifds": 1}),
        (RGB[::2, ::2], {"photometric": "rgb", "subfiletype": 1}), ome=True,
    ),
    "three samples that call themselves grey": one(PLANES, photometric="minisblack", planarconfig="separate"),
    "a marked thumbnail first": tiff(
        (RGB[::8, ::8], {"photometric": "rgb", "subfiletype": 1}), (RGB, {"photometric": "rgb"})
    ),
    "a thumbnail first that is not marked": tiff(
        (RGB[2::4, 2::4], {"photometric": "rgb"}), (RGB, {"photometric": "rgb"})
    ),
    "a pyramid": tiff(*[(RGB[::step, ::step], {"photometric": "rgb"}) for step in (1, 2, 4)]),
    "a label of the slide, marked": tiff(
        (RGB, {"photometric": "rgb"}), (OTHER[:20, :20], {"photometric": "rgb", "subfiletype": 1})
    ),
    "12 bits in 16": one(RGB.astype(np.uint16) << 4),
    "14 bits in 16": one(RGB.astype(np.uint16) << 6),
    "10 bits in 16": one(RGB.astype(np.uint16) << 2),
    "8 bits in 16": one(RGB.astype(np.uint16)),
    "12 bits, packed": one(RGB.astype(np.uint16) << 4, bitspersample=12),
    "12 bits by MaxSampleValue": one(
        RGB.astype(np.uint16) << 4, extratags=[(281, "H", 3, (4000,) * 3, True)]
    ),
    "float from 0 to 1": one(RGB.astype(np.float32) / 255),
    "float of 64 bits from 0 to 255": one(RGB.astype(np.float64)),
    "float from 0 to 65535": one(RGB.astype(np.float32) * 257),
    "half floats, with a predictor": one(RGB.astype(np.float16) / 255),
    "32 bits": one(RGB.astype(np.uint32) * 257),
    "signed 16 bits of 12": one(RGB.astype(np.int16) << 4),
    "signed 16 bits, all used": one((RGB.astype(np.int16) << 7) + 99),
    "CMYK": one(np.dstack([255 - RGB, np.zeros_like(GREY)]), photometric="separated"),
    "CMYK of 16 bits in planes": one(
        np.concatenate([255 - PLANES, np.zeros_like(PLANES[:1])]).astype(np.uint16) * 257,
        photometric="separated", planarconfig="separate",
    ),
    "a fourth channel of no meaning": one(
        np.dstack([RGB, GREY]), extrasamples=["unspecified"], photometric="rgb"
    ),
    "opaque": one(np.dstack([RGB, np.full_like(GREY, 255)]), extrasamples=["unassalpha"], photometric="rgb"),
    "opaque, 12 bits in 16": one(
        np.dstack([RGB.astype(np.uint16) << 4, np.full(GREY.shape, 65535, np.uint16)]),
        extrasamples=["unassalpha"], photometric="rgb",
    ),
    "YCbCr, not compressed": one(np.asarray(Image.fromarray(RGB).convert("YCbCr")), photometric="ycbcr"),
}  # fmt: skip


@pytest.mark.parametrize("kind", READ)
def test_read_as_it_was_written(kind):
    found = decode(READ[kind])
    assert found.dtype == np.uint8
    off = np.abs(found.astype(int) - RGB).max()
    assert off <= (3 if "YCbCr" in kind else 0)


GREYS = {
    "a negative (MinIsWhite)": one(255 - GREY, photometric="miniswhite"),
    "a negative of 16 bits": one(65535 - (GREY.astype(np.uint16) * 257), photometric="miniswhite"),
    "a negative of 12 bits in 16": one(4095 - (GREY.astype(np.uint16) * 16 + 15), photometric="miniswhite"),
    "a palette": one(
        GREY, photometric="palette", colormap=np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, 0)
    ),
    "a palette of 8 bits": one(
        GREY, photometric="palette", colormap=np.repeat(np.arange(256, dtype=np.uint16)[None], 3, 0)
    ),
    "with opacity": one(
        np.dstack([GREY, np.full_like(GREY, 255)]), extrasamples=["unassalpha"], planarconfig="contig"
    ),
}


@pytest.mark.parametrize("kind", GREYS)
def test_grey_read_as_it_was_written(kind):
    found = decode(GREYS[kind])
    np.testing.assert_array_equal(found, np.repeat(GREY[:, :, None], 3, axis=2))


SAME = (RGB, {"photometric": "rgb"})
REFUSED = {
    "two fields": (tiff(SAME, (OTHER, SAME[1])), "2 planes of the same size"),
    "two fields of which one is smaller": (tiff(SAME, (OTHER[::2, ::2], SAME[1])), "2 different pictures"),
    "two fields, the first one smaller": (tiff((OTHER[:20], SAME[1]), SAME), "2 different pictures"),
    "three grey pages without a word": (tiff(*[(plane, {}) for plane in PLANES]), "3 planes"),
    "a stack of ImageJ": (tiff((PLANES, {"metadata": {"axes": "ZYX"}}), imagej=True), "3 heights of focus"),
    "a stack of ImageJ in one page": (
        tiff((PLANES, {"metadata": {"axes": "TYX"}, "contiguous": True}), imagej=True), "3 times"),
    "a stack of OME": (
        tiff((PLANES, {"metadata": {"axes": "TYX"}, "photometric": "minisblack"}), ome=True), "3 times"),
    "two images of OME": (tiff((RGB, {"metadata": {"axes": "YXS"}, "photometric": "rgb"}),
                               (OTHER, {"metadata": {"axes": "YXS"}, "photometric": "rgb"}), ome=True), "2 "),
    "four channels of OME": (
        tiff((PLANES[[0, 1, 2, 0]], {"metadata": {"axes": "CYX"}, "photometric": "minisblack"}), ome=True),
        "4 channels"),
    "channels of fluorescence": (
        tiff((PLANES, {"metadata": {"axes": "CYX", "Channel": {"Name": ["DAPI", "FITC", "Cy5"]}},
                       "photometric": "minisblack"}), ome=True), "DAPI, FITC, Cy5"),
    "transparent everywhere": (
        one(np.dstack([RGB, np.zeros_like(GREY)]), extrasamples=["unassalpha"], photometric="rgb"),
        "transparent everywhere"),
    "L*a*b*": (one(RGB, photometric="cielab"), "CIELAB"),
    "raw data of a camera": (one(GREY, photometric="cfa"), "CFA"),
    "negative numbers": (one(RGB.astype(np.float32) - 9), "negative"),
    "no numbers": (one(np.where(RGB > 99, np.nan, RGB).astype(np.float32)), "no numbers"),
    "complex numbers": (one(GREY.astype(np.complex64)), "complex64"),
    "large numbers": (one(RGB.astype(np.uint32) * 2**20), "above 65535"),
    "tags that contradict the pixels": (
        one(DEEP, extratags=[(281, "H", 1, 1023, True)]), "name 10 bits, but its pixels need 16"),
    "JPEG 2000": (one(RGB, compression="jpeg2000"), "compression JPEG2000"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason_and_a_fix(kind, tmp_path):
    data, said = REFUSED[kind]
    (tmp_path / "a.tif").write_bytes(data)
    with pytest.raises(ImageError, match=said) as caught:
        read_image(tmp_path / "a.tif")
    assert caught.value.fix.startswith("save ")
    assert "\n" not in str(caught.value)


SMOOTH = np.stack([255 * X, 255 * Y, 60 + 120 * X * Y], axis=2).round().astype(np.uint8)
JPEGS = {
    "full colour": {"subsampling": (1, 1)},
    "reduced colour": {"subsampling": (2, 2), "rowsperstrip": 16},
    "reduced colour in tiles": {"subsampling": (2, 2), "tile": (32, 32)},
    "halved colour in tiles": {"subsampling": (2, 1), "tile": (16, 32)},
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_in_a_tiff(kind):
    data = one(SMOOTH, compression="jpeg", compressionargs={"level": 95}, photometric="rgb", **JPEGS[kind])
    assert np.abs(decode(data).astype(int) - SMOOTH).mean() < 2


def test_jpeg_in_planes_and_of_twelve_bits():
    planes = one(
        SMOOTH.transpose(2, 0, 1),
        compression="jpeg",
        photometric="rgb",
        planarconfig="separate",
        tile=(16, 16),
    )
    assert np.abs(decode(planes).astype(int) - SMOOTH).max() <= 8
    deep = one(SMOOTH.astype(np.uint16) << 4, compression="jpeg", bitspersample=12)
    assert np.abs(decode(deep).astype(int) - SMOOTH).max() <= 8


def test_jpeg_in_a_tiff_of_pillow():
    data = io.BytesIO()
    Image.fromarray(SMOOTH).save(data, "TIFF", compression="jpeg", quality=95)
    assert np.abs(decode(data.getvalue()).astype(int) - SMOOTH).max() <= 8


def test_black_and_white_by_group_4_fax():
    data = io.BytesIO()
    Image.fromarray(GREY > 100).save(data, "TIFF", compression="group4")
    np.testing.assert_array_equal(decode(data.getvalue())[:, :, 0], np.where(GREY > 100, 255, 0))


@pytest.mark.parametrize("kind", READ)
def test_the_size_is_known_without_the_pixels(kind, tmp_path):
    (tmp_path / "a.tif").write_bytes(READ[kind])
    assert image_size(tmp_path / "a.tif") == (48, 80)


def test_each_orientation_also_with_planes(tmp_path):
    for orientation in range(1, 9):
        picture = Image.Exif()
        picture[0x0112] = orientation
        data = io.BytesIO()
        Image.fromarray(RGB).save(data, "PNG", exif=picture)
        turned = one(PLANES, planarconfig="separate", extratags=[(274, "H", 1, orientation, True)])
        (tmp_path / "a.tif").write_bytes(turned)
        found = read_image(tmp_path / "a.tif")
        np.testing.assert_array_equal(found, decode(data.getvalue()))  # as Pillow turns it
        assert image_size(tmp_path / "a.tif") == found.shape[:2]


def test_one_burnt_in_pixel_or_a_bar_decides_nothing():
    dim = RGB.astype(np.uint16) << 4
    dim[0, 0] = 65535
    dim[10:20, 30:70] = 65535
    found = decode(one(dim))
    assert (found[10:20, 30:70] == 255).all()
    np.testing.assert_array_equal(found[20:], RGB[20:])


def test_what_was_decided_is_told():
    expected = {
        "12 bits in 16": "levels of 12 of 16 bits, by its histogram",
        "12 bits by MaxSampleValue": "levels of 12 bits, by its tags",
        "float from 0 to 1": "levels of float32 from 0 to 1, by its histogram",
        "composite of ImageJ": "3 channels without names were taken as red, green and blue",
        "a thumbnail first that is not marked": "the largest of 2 pictures in its file",
        "a fourth channel of no meaning": "a channel that is neither a colour nor opacity was left aside",
    }
    for kind, note in expected.items():
        assert read_picture(READ[kind]).notes == (note,)
    assert read_picture(GREYS["a negative (MinIsWhite)"]).notes == (
        "a negative by its tags: its brightness was turned round",
    )
    for silent in ("tiles", "16 bits in planes", "BigTIFF", "channels of OME by name, in another order"):
        assert read_picture(READ[silent]).notes == ()


def test_opacity_of_half_on_white():
    half = np.full_like(GREY, 51)
    plain = one(np.dstack([RGB, half]), extrasamples=["unassalpha"], photometric="rgb")
    ready = one(np.dstack([RGB // 5, half]), extrasamples=["assocalpha"], photometric="rgb")
    for data in (plain, ready):
        assert np.abs(decode(data) - (RGB / 5 + 204)).max() <= 1


def test_parts_that_are_missing_are_no_black_areas():
    data = bytearray(one(RGB, tile=(16, 16), compression="zlib"))
    page = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0]
    tag = page.tags["TileByteCounts"]
    data[tag.valueoffset : tag.valueoffset + 2] = bytes(2)
    with pytest.raises(ImageError, match="parts are missing"):
        decode(bytes(data))


@pytest.mark.parametrize("kind", ["tiles", "strips of one row", "BigTIFF", "composite of ImageJ"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(kind, share):
    data = READ[kind]
    with pytest.raises(ImageError):
        decode(data[: int(share * len(data))])


def test_a_jpeg_larger_than_its_place_is_not_decoded():
    """A tile of 16 px could hold a JPEG of four thousand million pixels."""
    data = bytearray(one(SMOOTH[:16, :16], tile=(16, 16), compression="jpeg", photometric="ycbcr"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = b"\xfd\xe8\xfd\xe8"
    with pytest.raises(ImageError, match="larger than its place"):
        decode(bytes(data))


def test_too_many_pixels_are_refused_before_they_are_decoded():
    row = np.zeros((1, 12_500), np.uint8)
    data = bytearray(one(row))
    tag = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0].tags["ImageLength"]
    data[tag.valueoffset : tag.valueoffset + 4] = (12_500).to_bytes(4, "little")
    with pytest.raises(ImageError, match="more than 150 million pixels"):
        decode(bytes(data))


def test_a_picture_without_pixels_is_refused():
    """`make fuzz` found such a file, and a traceback."""
    data = bytearray(one(np.zeros((32, 20), np.uint8)))
    tag = tifffile.TiffFile(io.BytesIO(bytes(data))).pages[0].tags["ImageWidth"]
    data[tag.valueoffset : tag.valueoffset + 4] = bytes(4)
    with pytest.raises(ImageError, match="without pixels"):
        decode(bytes(data))


def test_no_other_file_is_opened_that_the_description_names(tmp_path):
    described = tifffile.tiffcomment(io.BytesIO(READ["channels of OME"]))
    stolen = described.replace(
        "<TiffData", '<TiffData><UUID FileName="secret.tif">urn:uuid:1</UUID></TiffData><TiffData', 1
    )
    (tmp_path / "secret.tif").write_bytes(one(OTHER))
    (tmp_path / "a.ome.tif").write_bytes(tiff((RGB, {"photometric": "rgb", "description": stolen})))
    np.testing.assert_array_equal(read_image(tmp_path / "a.ome.tif"), RGB)


def test_jpeg_and_png_need_none_of_the_modules_for_tiff(tmp_path):
    """They take a third of a second to import."""
    Image.fromarray(RGB).save(tmp_path / "a.png")
    Image.fromarray(RGB).save(tmp_path / "a.jpg")
    script = (
        "import sys; from pathlib import Path; from aplsmear.images.reading import read_image\n"
        "for name in ('a.png', 'a.jpg'): read_image(Path(name))\n"
        "print([name for name in ('tifffile', 'imagecodecs', 'PIL.ImageCms') if name in sys.modules])"
    )
    done = run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_labels_of_slices_are_not_told_because_they_may_be_names_of_patients():
    described = {"axes": "CYX", "Labels": ["Jones 1.tif", "Jones 2.tif", "Jones 3.tif"]}
    with pytest.raises(ImageError, match="three channels that are not red, green and blue") as caught:
        decode(tiff((PLANES, {"metadata": described}), imagej=True))
    assert "Jones" not in str(caught.value)


def test_a_tiff_of_very_many_tiles_is_refused_before_they_are_decoded(monkeypatch):
    """Half a million tiles took 40 seconds."""
    data = one(RGB, tile=(16, 16), compression="zlib")
    decode(data)
    monkeypatch.setattr("aplsmear.images.tiff._MOST_PARTS", 3)
    with pytest.raises(ImageError, match="more than 3 tiles or strips; save it as PNG"):
        decode(data)
