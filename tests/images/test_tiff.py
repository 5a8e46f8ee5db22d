"""A TIFF of any kind is read as the pixels that were written, or refused with a reason and a fix."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

from aplsmear.images.reading import ImageError, decode, read_image

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
    "a stack of ImageJ": (tiff((PLANES, {"metadata": {"axes": "ZYX"}}), imagej=True), "3 along Z"),
    "a stack of ImageJ in one page": (
        tiff((PLANES, {"metadata": {"axes": "TYX"}, "contiguous": True}), imagej=True), "3 along T"),
    "a stack of OME": (
        tiff((PLANES, {"metadata": {"axes": "TYX"}, "photometric": "minisblack"}), ome=True), "3 along T"),
    "two images of OME": (tiff((RGB, {"metadata": {"axes": "YXS"}, "photometric": "rgb"}),
                               (OTHER, {"metadata": {"axes": "YXS"}, "photometric": "rgb"}), ome=True), "2 "),
    "four channels of OME": (
        tiff((PLANES[[0, 1, 2, 0]], {"metadata": {"axes": "CYX"}, "photometric": "minisblack"}), ome=True),
        "4 along C"),
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
