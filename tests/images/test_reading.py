"""Pictures of any kind become upright RGB of 8 bits, or one clear error."""

import io
import struct
import zlib
from contextlib import contextmanager
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from aplsmear.images.reading import (
    MAX_BYTES,
    ImageError,
    decode,
    decode_jpeg,
    encode_jpeg,
    image_bytes,
    image_size,
    is_picture_name,
    read_image,
    read_picture,
)


def picture(height=24, width=40) -> np.ndarray:
    """Smooth, with another colour in each corner, so that no flip goes unseen."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    return np.stack([255 * x, 255 * y, 60 + 120 * x * y], axis=2).round().astype(np.uint8)


@contextmanager
def most_pixels(most: int):
    """Pictures of more pixels than `most` are too large."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("aplsmear.images.pixels.MAX_PIXELS", most)
        yield


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def jpeg_of_12_bits() -> bytes:
    return imagecodecs.jpeg_encode(RGB.astype(np.uint16) * 16, bitspersample=12)


RGB = picture()
GREY = np.asarray(Image.fromarray(RGB).convert("L"))


def test_png_and_tiff_keep_every_pixel(tmp_path):
    for kind, options in (("PNG", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"})):
        path = tmp_path / f"a.{kind}"
        path.write_bytes(saved(Image.fromarray(RGB), kind, **options))
        found = read_image(path)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, RGB)
        found[0] = 0  # the caller's own to draw on
        assert image_size(path) == (24, 40)


def test_jpeg_comes_back_nearly_as_it_was_and_as_the_same_bytes():
    data = encode_jpeg(RGB)
    assert data == encode_jpeg(RGB.copy(order="F"))
    assert np.abs(decode(data).astype(int) - RGB).max() <= 6


@given(
    height=st.integers(1, 70), width=st.integers(1, 70), grain=st.integers(0, 120), seed=st.integers(0, 99)
)
@settings(max_examples=50, deadline=None)
def test_encoder_and_decoder_give_the_bytes_and_pixels_of_pillow(height, width, grain, seed):
    noise = np.random.default_rng(seed).normal(0, grain, (height, width, 3))
    rgb = (picture(height, width) + noise).clip(0, 255).astype(np.uint8)
    data = encode_jpeg(rgb)
    assert data == saved(Image.fromarray(rgb), "JPEG", quality=95, subsampling=0)
    np.testing.assert_array_equal(decode_jpeg(data), decode(data))


def test_the_quick_decoder_refuses_what_is_no_picture():
    with pytest.raises(ImageError, match="damaged"):
        decode_jpeg(encode_jpeg(RGB)[:100])


def test_jpeg_keeps_thin_coloured_lines():
    """Chroma is stored at full resolution: an Auer rod is a pixel or two wide."""
    lines = np.full((32, 32, 3), (200, 180, 210), np.uint8)
    lines[:, ::2] = (150, 60, 160)
    assert np.abs(decode(encode_jpeg(lines)).astype(int) - lines).max() <= 12


def test_encode_refuses_what_is_not_rgb():
    with pytest.raises(ValueError, match="uint8"):
        encode_jpeg(np.zeros((4, 4), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_grey_is_the_same_in_all_channels(kind):
    found = decode(saved(Image.fromarray(GREY), kind))
    assert (found == found[:, :, :1]).all()
    assert np.abs(found[:, :, 0].astype(int) - GREY).max() <= (3 if kind == "JPEG" else 0)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_upper_eight_bits(kind):
    deep = GREY.astype(np.uint16) * 256 + 77
    found = decode(saved(Image.fromarray(deep), kind))
    np.testing.assert_array_equal(found[:, :, 1], GREY)


def test_sixteen_bit_colour_keeps_its_upper_eight_bits():
    deep = RGB.astype(np.uint16)[:, :, ::-1] * 256 + 77  # OpenCV writes BGR
    import cv2

    for kind in (".png", ".tif"):
        done, data = cv2.imencode(kind, deep)
        assert done
        np.testing.assert_array_equal(decode(data.tobytes()), RGB)


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_fewer_bits_stored_as_sixteen_are_read_as_bright_as_they_were(bits, channels):
    alpha = np.full_like(GREY, 255)
    pixels = {1: GREY, 2: np.dstack([GREY, alpha]), 3: RGB, 4: np.dstack([RGB, alpha])}[channels]
    data = imagecodecs.png_encode(pixels.astype(np.uint16) << (bits - 8))
    found = read_picture(data)
    np.testing.assert_array_equal(found.pixels, RGB if channels > 2 else np.repeat(GREY[:, :, None], 3, 2))
    assert found.levels == f"{bits} of 16 bits"


def with_chunk(png: bytes, name: bytes, data: bytes) -> bytes:
    """A PNG with one more chunk behind its header."""
    whole = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return png[:33] + whole + png[33:]


def test_sixteen_bits_with_a_transparent_colour():
    deep = RGB.astype(np.uint16) * 256
    deep[3, 4] = (9, 8, 7)
    data = with_chunk(imagecodecs.png_encode(deep), b"tRNS", struct.pack(">HHH", 9, 8, 7))
    found = decode(data)
    assert (found[3, 4] == 255).all()
    np.testing.assert_array_equal(found[4:], RGB[4:])


@pytest.mark.parametrize("kind", ["8 bits", "16 bits", "a palette"])
def test_the_gamma_of_a_png_is_that_of_its_light(kind):
    light = ((RGB / 255) ** 2.2 * 255).round().astype(np.uint8)
    few = Image.fromarray(light).quantize(200)
    data = {
        "8 bits": saved(Image.fromarray(light), "PNG"),
        "16 bits": imagecodecs.png_encode(((RGB / 255) ** 2.2 * 65535).round().astype(np.uint16)),
        "a palette": saved(few, "PNG"),
    }[kind]
    linear = with_chunk(data, b"gAMA", struct.pack(">I", 100_000))
    found = read_picture(linear)
    expected = np.asarray(few.convert("RGB")) / 255 if kind == "a palette" else (RGB / 255) ** 2.2
    bright = RGB > 100  # eight bits of light are few in the dark
    assert np.abs(found.pixels - 255 * expected ** (1 / 2.2))[bright].max() <= 2
    assert found.notes[-1] == "brightness was converted by its gamma"
    for number in (45_455, 0):  # that of screens; without a meaning
        np.testing.assert_array_equal(
            decode(with_chunk(data, b"gAMA", struct.pack(">I", number))), decode(data)
        )
    np.testing.assert_array_equal(decode(with_chunk(linear, b"sRGB", b"\0")), decode(data))


def test_a_colour_profile_is_applied_where_it_changes_colours():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(srgb)  # red and green exchange their primaries
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(decode(saved(Image.fromarray(RGB), kind, icc_profile=srgb)), RGB)
        found = read_picture(saved(Image.fromarray(RGB), kind, icc_profile=bytes(swapped)))
        assert np.abs(found.pixels.astype(int) - RGB[:, :, [1, 0, 2]]).max() <= 3
        assert found.notes == ("its colour profile was converted to sRGB",)
        broken = read_picture(saved(Image.fromarray(RGB), kind, icc_profile=b"no profile"))
        np.testing.assert_array_equal(broken.pixels, RGB)
        assert broken.notes == ("a colour profile that cannot be read was left aside",)
    grey = saved(Image.fromarray(GREY), "PNG", icc_profile=bytes(swapped))  # for other channels than it has
    np.testing.assert_array_equal(decode(grey)[:, :, 0], GREY)


def test_transparent_everywhere_is_no_white_picture():
    nothing = np.zeros_like(GREY)
    for pixels in (np.dstack([RGB, nothing]), np.dstack([GREY, nothing])):
        deep = imagecodecs.png_encode(pixels.astype(np.uint16) * 257)
        for data in (saved(Image.fromarray(pixels), "PNG"), deep):
            with pytest.raises(ImageError, match="transparent everywhere") as caught:
                decode(data)
            assert caught.value.fix == "save it without transparency, as RGB"


def test_an_animation_is_refused_and_a_preview_in_a_jpeg_is_not_read():
    first, other = Image.fromarray(RGB), Image.fromarray(RGB[::-1])
    with pytest.raises(ImageError, match="2 pictures in one file"):
        decode(saved(first, "PNG", save_all=True, append_images=[other]))
    with pytest.raises(ImageError, match="2 pictures in one file"):
        decode(saved(first, "MPO", save_all=True, append_images=[other]))
    preview = saved(first, "MPO", save_all=True, append_images=[other.resize((10, 6))], quality=95)
    found = read_picture(preview)
    assert np.abs(found.pixels.astype(int) - RGB).max() <= 20
    assert found.notes == ("the largest of 2 pictures in its file",)


def test_one_bit_and_palette():
    black_white = Image.fromarray(GREY > 100)
    found = decode(saved(black_white, "PNG"))
    np.testing.assert_array_equal(found[:, :, 2] == 255, GREY > 100)
    few = Image.fromarray(RGB // 128 * 128).quantize(16)
    np.testing.assert_array_equal(decode(saved(few, "PNG")), np.asarray(few.convert("RGB")))


def test_transparent_pixels_become_white():
    alpha = np.where(GREY > 100, 255, 0).astype(np.uint8)
    found = decode(saved(Image.fromarray(np.dstack([RGB, alpha])), "PNG"))
    np.testing.assert_array_equal(found[alpha == 255], RGB[alpha == 255])
    assert (found[alpha == 0] == 255).all()
    grey_alpha = decode(saved(Image.fromarray(np.dstack([GREY, alpha]), "LA"), "PNG"))
    assert (grey_alpha[alpha == 0] == 255).all()
    palette = Image.fromarray(GREY // 64).convert("P")
    assert (decode(saved(palette, "PNG", transparency=0))[GREY // 64 == 0] == 255).all()
    opaque = Image.fromarray(RGB).convert("RGBA")
    np.testing.assert_array_equal(decode(saved(opaque, "TIFF")), RGB)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_not_a_negative(kind):
    found = decode(saved(Image.fromarray(RGB).convert("CMYK"), kind))
    assert np.abs(found.astype(int) - RGB).mean() < 6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    path = tmp_path / "a"
    path.write_bytes(saved(Image.fromarray(np.ascontiguousarray(back(RGB))), kind, exif=exif))
    assert np.abs(read_image(path).astype(int) - RGB).mean() < 3
    assert image_size(path) == (24, 40)


def test_of_a_pyramid_the_first_level_counts():
    levels = [Image.fromarray(RGB), Image.fromarray(RGB[::2, ::2])]
    found = decode(saved(levels[0], "TIFF", save_all=True, append_images=levels[1:]))
    np.testing.assert_array_equal(found, RGB)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda _: None, "no such file"),
        (lambda path: path.mkdir(), "not a file"),
        (lambda path: path.write_bytes(b""), "empty file"),
        (lambda path: path.write_text("not a picture"), "not a PNG, JPEG or TIFF"),
        (lambda path: path.write_bytes(saved(Image.fromarray(RGB), "GIF")), "not a PNG, JPEG or TIFF"),
        (lambda path: path.write_bytes(b"\0\x05\x16\x07\0\x02\0\0Mac OS X"), "macOS keeps beside one"),
        (lambda path: path.write_bytes(jpeg_of_12_bits()), "a JPEG of 12 bits"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(make, said, tmp_path):
    path = tmp_path / "a.png"
    make(path)
    with pytest.raises(ImageError, match=said) as caught:
        read_image(path)
    assert caught.value.path == path
    assert caught.value.fix


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_picture_is_refused(kind, share, tmp_path):
    noise = np.random.default_rng(1).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    data = saved(Image.fromarray(noise), kind)
    path = tmp_path / "a"
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ImageError):
        read_image(path)


def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path):
    path = tmp_path / "bomb.png"
    small = saved(Image.new("1", (1, 1)), "PNG")
    for side in (12_500, 13_000, 60_000):  # above the limit, then above each of Pillow's own
        head = b"IHDR" + struct.pack(">II", side, side) + small[24:29]
        path.write_bytes(small[:12] + head + struct.pack(">I", zlib.crc32(head)) + small[33:])
        for read in (read_image, image_size):
            with pytest.raises(ImageError, match="million pixels"):
                read(path)
    with most_pixels(24 * 40 - 1), pytest.raises(ImageError, match="million pixels"):
        decode(saved(Image.fromarray(RGB), "PNG"))


def test_a_slide_is_refused_by_its_name_with_the_command_that_takes_its_fields(tmp_path):
    for name in ("a.svs", "a.NDPI", "a.czi"):
        (tmp_path / name).write_bytes(saved(Image.fromarray(RGB), "TIFF"))
        for read in (read_image, image_size, image_bytes):
            with pytest.raises(ImageError, match="a slide of a scanner") as caught:
                read(tmp_path / name)
            assert "aplsmear fields" in caught.value.fix


def test_a_file_larger_than_any_picture_is_refused_unread(tmp_path):
    path = tmp_path / "endless.png"
    path.write_bytes(saved(Image.fromarray(RGB), "PNG"))
    with path.open("rb+") as file:
        file.truncate(MAX_BYTES + 1)  # takes no place on the disk
    for read in (read_image, image_size, image_bytes):
        with pytest.raises(ImageError, match="more than 2 GiB"):
            read(path)


SMALL = {
    kind: saved(Image.fromarray(RGB), kind, **options)
    for kind, options in (
        ("JPEG", {}),
        ("PNG", {}),
        ("TIFF", {"compression": "tiff_adobe_deflate", "exif": Image.Exif()}),
    )
}


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(sorted(SMALL)),
    st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=4)), max_size=4),
    st.floats(0, 1),
)
def test_damaged_bytes_give_an_error_or_a_picture(kind, changes, keep):
    data = bytearray(SMALL[kind])
    for place, new in changes:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    try:
        with most_pixels(10**6):
            found = decode(bytes(data[: int(np.ceil(keep * len(data)))]))
    except ImageError:
        return
    assert found.dtype == np.uint8
    assert found.ndim == 3
    assert found.shape[2] == 3


def test_reading_changes_no_setting_of_pillow():
    before = Image.MAX_IMAGE_PIXELS
    decode(SMALL["PNG"])
    assert before == Image.MAX_IMAGE_PIXELS


def test_a_name_that_no_file_can_have_is_an_image_error():
    for name in ("a" * 5000, "a\0b"):
        with pytest.raises(ImageError):
            read_image(Path(name))


def test_files_that_systems_put_beside_pictures_are_no_pictures():
    for name in ("a.png", "b.JPG", "c.Tiff", "d e.jpeg", "f.1.tif"):
        assert is_picture_name(name)
    for name in (
        "._a.jpg",
        ".DS_Store",
        "Thumbs.db",
        "desktop.ini",
        "ehthumbs.db",
        ".a.png",
        "a.png.xml",
        "png",
    ):
        assert not is_picture_name(name)
