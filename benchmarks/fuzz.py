"""Damaged tables and pictures must give a data set or a list of problems, in limited time and memory.

Usage: python benchmarks/fuzz.py [PART]... [--tables N] [--images N] [--seed S] [--keep DIR]

Every file is read by `aplsmear.data.dataset.read_data_set`, as in `aplsmear check`, `download` and `predict`,
in a process of its own with limited memory; the problems are rendered as the table that users see. A file
that reaches an arc (from line to line) of the parsers for the first time is kept and mutated again, as in
coverage-guided fuzzers (Zalewski's AFL, 2013; the present version of atheris has no build for Python 3.11).
Then come bombs: small files that are made to need much time or memory. Files with any other outcome are kept
in DIR.

The results are written to benchmarks/results/fuzz.json.
"""

import argparse
import contextlib
import csv
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import traceback
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import PIL
import tifffile
from PIL import Image, PngImagePlugin
from record import ROOT, commit, machine
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import aplsmear
from aplsmear.compute.engine import Here
from aplsmear.data.dataset import DataSetError, read_data_set, render_problems
from aplsmear.files import write_json
from aplsmear.params import Task

RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
PARTS = ("tables", "images", "bombs")
SECONDS, GIGABYTES = 60.0, 4.0  # most CPU time and memory that a file may need; the limit is twice that
SILENCE = 600.0  # s without an answer after which a process counts as hanging
LEARNING = 400  # data sets that are all traced for new arcs; later one in ten
LARGEST = 200_000  # bytes of a mutated file; larger ones are bombs

DATA_SET, REFUSED = "data sets", "refused"  # the two correct outcomes
DIED = "killed its process, or hung"
TASKS = {
    "rods": Task(
        level="cell",
        positive={"special_characteristics": ["Auer rods"]},
        negative={"special_characteristics": ["*"]},
    ),
    "apl": Task(level="smear", positive={"diagnosis": ["apl"]}, negative={"diagnosis": ["aml"]}),
}
SMEARS = b"""id,imgName,label,patient,site
1,a.png,{'healthy'},P1,A
2,b.png,"{'aml', 'm2'}",P2,B
3,c.png,"{'aml', 'm3'}",P3,A
10,d.png,"{'aml', 'm3'}",P3,B
"""
CELLS = b"""\
id,segmentationSetId,wsi,cellType,segmentationQuality,specialCharacteristics,objectType,bbox,extent
1,1,1,,,,,"[2, 4, 30, 40]",0.79
2,1,3,{'Promyelocyte'},{'Good'},{'None'},{'Cell'},"[2, 4, 30, 40]",0.78
11,1,3,{'Promyelocyte'},{'Good'},"{'Auer rods', 'Faggot cell'}",{'Cell'},"[10, 20, 40, 60]",0.77
12,1,10,{'Myeloblast'},{'Bad'},{'None'},{'Cell'},"[20, 44, 48, 64]",0.76
"""
CELLS_CSV = "labeled_cells.csv"
TABLES = {"wsi.csv": SMEARS, CELLS_CSV: CELLS}
PICTURES = [f"wsi/{name}.png" for name in "abcd"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help="tables, images or bombs; default: all")
    parser.add_argument("--tables", type=int, default=20_000, help="number")
    parser.add_argument("--images", type=int, default=5_000, help="number")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--keep", type=Path, default=Path("fuzz-found"), help="folder for files with another outcome"
    )
    asked = parser.parse_args()
    figures = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    failed = False
    for part in asked.parts or PARTS:
        if part not in PARTS:
            parser.error(f"{part!r} is none of {', '.join(PARTS)}")
        tally = all_bombs() if part == "bombs" else many(part, getattr(asked, part), asked.seed, asked.keep)
        figures[part] = tally.figures() | {"seed": asked.seed, "machine": machine(), "commit": commit()}
        write_json(RESULTS, figures, digits=3)
        failed |= bool(tally.wrong)
        for text in tally.wrong:
            print(f"{part} {text}", file=sys.stderr)
    show({part: figures[part] for part in PARTS if part in figures})
    sys.exit(failed)


@dataclass
class Outcome:
    """The outcome of one file: `end` is DATA_SET, REFUSED or the name of an unwanted outcome."""

    number: int
    end: str
    seconds: float
    text: str = ""
    files: int = 1  # number of mutated files
    arcs: int = 0
    memory: float = 0.0  # most memory of the process so far, GB


@dataclass
class Tally:
    """The outcomes of many files."""

    files: int = 0
    ends: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    peak_memory_gb: float = 0.0
    arcs: int = 0
    cpu_s: float = 0.0
    wrong: list[str] = field(default_factory=list)

    def add(self, one: Outcome) -> None:
        end = (
            "too slow" if one.seconds > SECONDS else "too much memory" if one.memory > GIGABYTES else one.end
        )
        self.files += one.files
        self.ends[end] += 1
        self.slowest_s = max(self.slowest_s, one.seconds)
        self.cpu_s += one.seconds
        self.arcs = max(self.arcs, one.arcs)
        self.peak_memory_gb = max(self.peak_memory_gb, one.memory)
        if end not in (DATA_SET, REFUSED):
            self.wrong.append(f"{one.number}: {end} after {one.seconds:.1f} s\n{one.text}")

    def figures(self) -> dict[str, Any]:
        counts = {end.replace(" ", "_"): count for end, count in sorted(self.ends.items())}
        others = {key: value for key, value in asdict(self).items() if key not in ("files", "ends", "wrong")}
        return {"files": self.files, "wrong": len(self.wrong)} | counts | others


# --- mutated tables --------------------------------------------------------------------------------

NASTY = [
    b'', b' ', b',', b';', b'\t', b'"', b"'", b'\r', b'\n', b'\r\n', b'\x00', b'\xff', b'\xef\xbb\xbf',
    b'\xff\xfe', b'\xe2\x80\xae', b'\xc2\xa0', b'\xcc\x81', b'\xf0\x9f\xa9\xb8', b'\x1b[31m', b'|',
    b'..', b'/', b'\\', b'C:\\a.png', b'../../a.png', b'/etc/passwd', b'a.png', b'b.png', b'nul', b'nan',
    b'None', b'inf', b'-1', b'0', b'1.0', b'1e309', b'99999999999999999999', b'=1+1', b'@SUM(A1)',
    b'<script>', b'$(id)', b'`id`', b'${IFS}', b"{'healthy'}", b"{'aml', 'm3'}", b"{'aml'}",
    b"{'m2', 'm3'}", b"{'Auer rods'}", b"{'Auer rod'}", b'{', b'}', b"{'", b'set()', b"['a', 'b']",
    b"{'a': 1}", b"__import__('os')", b"{'a\\'b'}", b"{'a|b'}", b'[0, 0, 30, 30]', b'[-9, 1, 20, 99]',
    b'[1, 1, 2, 2]', b'[0,0,0', b'(1.0, 2.0, 30.00, 40.)', b'[999999999, 0, 1, 1]', b'id', b'wsi',
    b'imgName', b'label', b'patient', b'bbox', b'ID ',
]  # fmt: skip


def mutated_table(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to eight changes of bytes, fields, rows or of the whole file."""
    for _ in range(2 ** rng.randrange(4)):
        data = rng.choice((_bytes, _bytes, _field, _field, _field, _rows, _whole))(rng, data, other)[:LARGEST]
    return data


def _bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + int(rng.expovariate(0.1)))
    kind = rng.randrange(5)
    if kind == 0 and data:
        start = min(start, len(data) - 1)
        return data[:start] + bytes([data[start] ^ 1 << rng.randrange(8)]) + data[start + 1 :]
    if kind == 1:
        return data[:start] + rng.choice(NASTY) + data[end:]
    if kind == 2:
        return data[:start] + data[start:end] * rng.choice((0, 2, 3, 200)) + data[end:]
    if kind == 3:
        cut = rng.randrange(len(other) + 1)
        return data[:start] + other[cut : cut + int(rng.expovariate(0.02))] + data[end:]
    return data[:start] + rng.randbytes(rng.randrange(8)) + data[end:]


def _field(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Replace a field of the table by one from a list, by another field, or by a long one."""
    try:
        rows = list(csv.reader(io.StringIO(data.decode("utf-8", "replace").replace("\0", ""), newline="")))
    except csv.Error:  # an earlier change made a field too long for this reader
        return data
    rows = [row for row in rows if row]
    if not rows:
        return data
    row = rng.choice(rows)
    new = rng.choice([*NASTY, *(rng.choice(rng.choice(rows)).encode() for _ in range(20))])
    if rng.randrange(20) == 0:
        new *= rng.choice((50, 1000, 100_000 // max(1, len(new))))
    row[rng.randrange(len(row))] = new.decode("utf-8", "replace")
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=rng.choice(",,,,;\t"), lineterminator=rng.choice(("\n", "\r\n"))).writerows(
        rows
    )
    return text.getvalue().encode("utf-8", "replace")


def _rows(rng: random.Random, data: bytes, other: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    head, rest = lines[:1], lines[1:]
    kind = rng.randrange(4)
    if kind == 0:
        rng.shuffle(rest)
    elif kind == 1 and rest:
        rest += [rng.choice(rest)] * rng.choice((1, 2, 300))
    elif kind == 2 and rest:
        rest.pop(rng.randrange(len(rest)))
    else:
        head = []
    return b"".join(head + rest)


def _whole(rng: random.Random, data: bytes, other: bytes) -> bytes:
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: data[: rng.randrange(len(data) + 1)],
            lambda: b"",
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode("utf-16"),
            lambda: text.encode("utf-16")[:-1],
            lambda: text.encode("latin-1", "replace"),
            lambda: data.replace(b",", b";"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: other,
        )
    )()


# --- mutated pictures ------------------------------------------------------------------------------

EDGES = (
    0, 1, 2, 7, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 12_247, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF,
)  # fmt: skip


def seed_pictures() -> list[bytes]:
    """One picture of each kind that Pillow and cameras write."""
    noise = Image.frombytes("RGB", (48, 32), random.Random(1).randbytes(48 * 32 * 3))
    turned = Image.Exif()
    turned[0x0112] = 6
    again = {"save_all": True, "append_images": [noise, noise.convert("L")]}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        ("RGB", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}), ("RGB", "JPEG", {"exif": turned}),
        ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("1", "PNG", {}),
        ("P", "PNG", {"transparency": 3}), ("I;16", "PNG", {}), ("RGB", "TIFF", {}), ("RGB", "TIFF", again),
        ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "TIFF", {"compression": "jpeg"}),
        ("RGB", "TIFF", {"compression": "tiff_adobe_deflate", "exif": turned}), ("CMYK", "TIFF", {}),
        ("1", "TIFF", {"compression": "group4"}),
    ]  # fmt: skip
    return [_saved(_as_mode(noise, mode), kind, **options) for mode, kind, options in kinds] + _seed_tiffs(
        noise
    )


def _seed_tiffs(noise: Image.Image) -> list[bytes]:
    """TIFF that only microscopes and programs for them write, and a PNG of 16 bits in colour."""
    rgb = np.asarray(noise)
    planes, deep = np.ascontiguousarray(rgb.transpose(2, 0, 1)), rgb.astype(np.uint16) << 4
    channels, colour = {"photometric": "minisblack", "metadata": {"axes": "CYX"}}, {"photometric": "rgb"}
    kinds: list[tuple[dict[str, Any], Any, dict[str, Any]]] = [
        ({}, planes, colour | {"planarconfig": "separate"}), ({"bigtiff": True}, deep, colour),
        ({"imagej": True}, planes, {"metadata": {"axes": "CYX"}}), ({"ome": True}, planes, channels),
        ({}, deep, colour | {"bitspersample": 12}), ({}, deep, colour | {"compression": "lzw"}),
        ({}, rgb, colour | {"tile": (16, 16), "compression": "jpeg"}),
        ({"byteorder": ">"}, rgb.astype(np.float32), colour | {"compression": "zlib", "predictor": 3}),
        ({}, rgb[:, :, 0], {"photometric": "miniswhite", "compression": "packbits", "rowsperstrip": 4}),
        ({}, rgb, colour | {"compression": "zstd", "predictor": 2, "tile": (32, 16)}),
        ({}, rgb[:, :, 0], {"photometric": "palette", "colormap": np.full((3, 256), 999, np.uint16)}),
    ]  # fmt: skip
    found = [imagecodecs.png_encode(deep)]
    for file, pixels, page in kinds:
        buffer = io.BytesIO()
        with tifffile.TiffWriter(buffer, **file) as writer:
            writer.write(pixels, **page)
        found.append(buffer.getvalue())
    return found


def _as_mode(picture: Image.Image, mode: str) -> Image.Image:
    return picture.convert("L").convert(mode) if mode == "I;16" else picture.convert(mode)


def _saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def mutated_picture(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One to eight changes of bytes or numbers; the checksums of a PNG are mostly corrected."""
    for _ in range(2 ** rng.randrange(4)):
        data = rng.choice((_bytes, _number, _number, _number, _cut))(rng, data, other)[:LARGEST]
    return _with_sums(data) if rng.randrange(4) else data


def _number(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Replace a number of 2 or 4 bytes, mostly at the start or end, by one at the limit of a range."""
    size = rng.choice((2, 4))
    reach = rng.choice((64, 400, len(data)))
    start = rng.randrange(max(1, min(reach, len(data))))
    if rng.randrange(3) == 0:
        start = max(0, len(data) - 1 - start)
    value = rng.choice(EDGES) & (256**size - 1)
    return data[:start] + value.to_bytes(size, rng.choice(("big", "little"))) + data[start + size :]


def _cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)] if rng.randrange(3) == 0 else data


def _with_sums(data: bytes) -> bytes:
    """A PNG with correct checksums, as far as its chunks can be followed; another file unchanged."""
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data
    parts, place = [data[:8]], 8
    while place + 12 <= len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        body = data[place + 4 : place + 8 + length]
        parts.append(data[place : place + 4] + body + struct.pack(">I", zlib.crc32(body)))
        place += 12 + length
    return b"".join(parts) + data[place:]


# --- bombs -----------------------------------------------------------------------------------------


def bombs() -> dict[str, Callable[[Path], object]]:
    """Name -> function that writes it into a data set: small files made to need much time or memory."""
    many = 100_000

    def table(name: str, head: str, row: Callable[[int], str], count: int = many) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_text(head + "".join(map(row, range(count))))

    def picture(make: Callable[[], bytes]) -> Callable[[Path], object]:
        return lambda folder: (folder / PICTURES[0]).write_bytes(make())

    def large(mode: str, kind: str, **options: Any) -> Callable[[Path], object]:
        side = 12_247  # the largest square that is accepted
        return picture(lambda: _saved(Image.new(mode, (side, side)), kind, **options))

    def typo(number: int) -> str:
        return "Promyelocyte" + chr(0x4E00 + number // 400) + chr(0x4E00 + number % 400)

    smears, cells = "id,imgName,label,patient\n", "id,wsi,bbox,cellType\n"
    box, tiny = '"[2, 4, 30, 40]"', Image.new("RGB", (8, 8))
    quotes = "{" * 400 + "'" * 400
    return {
        "a field of 50 MB": table(CELLS_CSV, cells, lambda _: f"1,1,{box},{'x' * 50_000_000}\n", 1),
        "a quote that is never closed": table(CELLS_CSV, cells, lambda n: f'{n},1,"[2, 4\n'),
        "a million columns": table(CELLS_CSV, cells + "," * 10**6, lambda _: "\n1", 1),
        "a million empty rows": table(CELLS_CSV, cells, lambda _: ",,,\n", 10**6),
        "labels that are all misspelt": table(CELLS_CSV, cells, lambda n: f"{n},1,{box},{{'{typo(n)}'}}\n"),
        "labels that are unknown": table(CELLS_CSV, cells, lambda n: f"{n},1,{box},{{'{n:x} thing {n}'}}\n"),
        "one patient with two diagnoses in every row": table(
            "wsi.csv", smears, lambda n: f"{n},a{n}.png,{{'{('healthy', 'aml')[n % 2]}'}},P\n", 20_000
        ),
        "one id in every row": table(CELLS_CSV, cells, lambda _: f"1,1,{box},\n"),
        "one picture in every row": table(
            "wsi.csv", smears, lambda n: f"{n},{'./' * (n % 50)}a.png,{{'healthy'}},P{n}\n", 5_000
        ),
        "brackets within a label": table(CELLS_CSV, cells, lambda n: f'{n},1,{box},"{quotes}"\n', 5_000),
        "PNG, 150 million pixels in 18 kB": large("1", "PNG"),
        "PNG, 150 million pixels with transparency": large("LA", "PNG"),
        "PNG, a palette of 150 million transparent pixels": large("P", "PNG", transparency=0),
        "PNG, 16 bits, 150 million pixels": large("I;16", "PNG"),
        "PNG, text that unpacks to 200 MB": picture(lambda: _saved_with_text(200 * 10**6)),
        "PNG, a colour profile that unpacks to 200 MB": picture(
            lambda: _saved(tiny, "PNG", icc_profile=bytes(200 * 10**6))
        ),
        "TIFF, deflate, 150 million pixels": large("RGB", "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, CMYK, 150 million pixels": large("CMYK", "TIFF", compression="tiff_lzw"),
        "TIFF, float, 150 million pixels": large("F", "TIFF", compression="tiff_adobe_deflate"),
        "TIFF, 150 million pixels in tiles of 16": picture(lambda: _tiled_tiff((12_240, 12_240), (16, 16))),
        "TIFF, planes of 16 bits, 150 million pixels": picture(
            lambda: _tiled_tiff((3, 12_240, 12_240), (80, 80))
        ),
        "TIFF, a million pictures in one file": picture(lambda: _many_pages(10**6)),
        "TIFF, an OME stack of 10 thousand million planes": picture(_ome_stack),
        "TIFF, a tile with a JPEG of 4 thousand million pixels": picture(_jpeg_in_tile),
        "TIFF, 1,000 pictures in one file": picture(
            lambda: _saved(tiny, "TIFF", save_all=True, append_images=[tiny] * 999)
        ),
        "TIFF, directories in a circle": picture(_circular_tiff),
        "JPEG, 20,000 scans of 25 million pixels": picture(lambda: many_scans(20_000)),
        "JPEG, 150 million pixels": large("RGB", "JPEG"),
    }  # fmt: skip


def _saved_with_text(size: int) -> bytes:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "a" * size, zip=True)
    return _saved(Image.new("RGB", (8, 8)), "PNG", pnginfo=notes)


def _tiled_tiff(shape: tuple[int, ...], tile: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    kind = {"photometric": "rgb", "planarconfig": "separate"} if len(shape) > 2 else {}
    pixels = np.broadcast_to(np.uint16(4000), shape)
    tifffile.imwrite(buffer, pixels, tile=tile, compression="zlib", metadata=None, **kind)
    return buffer.getvalue()


def _many_pages(count: int) -> bytes:
    """A chain of directories, each of one tag only."""
    page = struct.Struct("<HHHIII")
    return (
        b"II*\0"
        + struct.pack("<I", 8)
        + b"".join(
            page.pack(1, 256, 4, 1, 8, 8 + page.size * (number + 1) if number + 1 < count else 0)
            for number in range(count)
        )
    )


def _ome_stack() -> bytes:
    along = '<Value><M><ModuloAlongZ Type="lifetime" Start="0" Step="1" End="1e10"/></M></Value>'
    notes = f'<XMLAnnotation ID="A" Namespace="a/modulo">{along}</XMLAnnotation>'
    text = f'<?xml version="1.0"?><OME><StructuredAnnotations>{notes}</StructuredAnnotations></OME>'
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((8, 8), np.uint8), description=text, metadata=None)
    return buffer.getvalue()


def _jpeg_in_tile() -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, np.zeros((16, 16), np.uint8), tile=(16, 16), compression="jpeg", metadata=None)
    data = bytearray(buffer.getvalue())
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = b"\xfd\xe8\xfd\xe8"
    return bytes(data)


def _circular_tiff() -> bytes:
    data = bytearray(_saved(Image.new("L", (8, 8)), "TIFF"))
    start = struct.unpack("<I", data[4:8])[0]
    end = start + 2 + 12 * struct.unpack("<H", data[start : start + 2])[0]
    data[end : end + 4] = struct.pack("<I", start)
    return bytes(data)


def many_scans(count: int, side: int = 5_000) -> bytes:
    """A progressive JPEG with many repetitions of its last scan; each needs a pass over all pixels."""
    data = _saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


# --- running ---------------------------------------------------------------------------------------


def many(kind: str, count: int, seed: int, keep: Path) -> Tally:
    """Mutate and read `count` files; a process that dies or hangs is replaced."""
    tally, number = Tally(), 0
    with tempfile.TemporaryDirectory() as name, tqdm(total=count, unit=f" {kind}", mininterval=5) as bar:
        folder = Path(name) / "set"
        while tally.files < count:
            for outcome in _answers(one_of_many, kind, seed, range(number, number + count), folder, keep):
                tally.add(outcome)
                number = outcome.number + 1
                bar.update(outcome.files)
                if tally.files >= count:
                    break
            else:
                tally.add(Outcome(number, DIED, 0.0))
                shutil.copytree(folder, keep / f"{kind}-{number}", dirs_exist_ok=True)
                number += 1
    return tally


def all_bombs() -> Tally:
    """Read each bomb in a process of its own."""
    tally = Tally()
    for number, (name, make) in enumerate(bombs().items()):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "set"
            sound(folder)
            make(folder)
            answers = list(_answers(one_bomb, folder))
            outcome = answers[0] if answers else Outcome(number, DIED, 0.0)
            tally.add(replace(outcome, number=number, text=f"{name}\n{outcome.text}"))
            print(f"{name}: {outcome.end}, {outcome.seconds:.1f} s, {outcome.memory:.2f} GB", file=sys.stderr)
    return tally


def _answers(target: Callable[..., None], *arguments: object) -> Iterator[Any]:
    """The answers of a process of its own, until it ends, dies or sends nothing for too long."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(*arguments, there), daemon=True)
    process.start()
    there.close()
    try:
        while here.poll(SILENCE):
            yield here.recv()
    except EOFError:
        pass
    finally:
        process.kill()
        process.join()


def show(figures: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the figures as a table."""
    table = Table("", *figures)
    for row in dict.fromkeys(key for column in figures.values() for key in column):
        values = [column.get(row, 0) for column in figures.values()]
        if all(isinstance(value, int | float) for value in values):
            shown = (f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)
            table.add_row(row.replace("_", " "), *shown)
    Console().print(table)


class Guide:
    """The arcs of the parsers that were reached so far, and the files that reached a new one."""

    def __init__(self, seeds: list[bytes]) -> None:
        own, pillow = Path(aplsmear.__file__).parent, Path(PIL.__file__).parent
        parsers = [
            own / "data" / f"{name}.py"
            for name in ("csvfile", "labels", "schema", "dataset", "pictures", "quality")
        ]
        parsers += [pillow / f"{name}ImagePlugin.py" for name in ("Png", "Jpeg")]
        parsers += [own / "images" / f"{name}.py" for name in ("reading", "pixels", "tiff")]
        parsers.append(Path(tifffile.__file__).with_name("tifffile.py"))
        if not all(path.is_file() for path in parsers):  # else a moved module would be traced no more
            raise FileNotFoundError(f"not all of {parsers} exist: correct the list in {__file__}")
        self.watched = set(map(str, parsers))
        self.arcs: set[tuple[object, int, int]] = set()
        self.corpus = seeds

    @contextlib.contextmanager
    def watching(self, files: Iterable[bytes]) -> Iterator[None]:
        before = len(self.arcs)
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(None)
        if len(self.arcs) > before:
            self.corpus.extend(files)

    def _call(self, frame: Any, event: str, argument: object) -> Any:
        code, last = frame.f_code, 0
        if code.co_filename not in self.watched:
            return None

        def line(frame: Any, event: str, argument: object) -> Any:
            nonlocal last
            if event == "line":
                self.arcs.add((code, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


def sound(folder: Path) -> None:
    """Write a correct data set into a folder, which may contain another one."""
    (folder / "wsi").mkdir(parents=True, exist_ok=True)
    for name, data in TABLES.items():
        (folder / name).write_bytes(data)
    for shade, name in enumerate("abcd"):
        (folder / "wsi" / f"{name}.png").write_bytes(
            _saved(Image.new("RGB", (64, 48), (shade, 90, 150)), "PNG")
        )


def judged(folder: Path, number: int) -> Outcome:
    """Read a data set as the pipeline does, and render its problems as users see them."""
    start = time.process_time()
    text = ""
    try:
        read_data_set(
            folder,
            TASKS if number % 2 else {},
            min_box=8,
            skip_bad_images=number % 3 == 0,
            engine=Here(1),
            labelled=number % 5 > 0,
        )
        end = DATA_SET
    except DataSetError as error:
        end = REFUSED if error.problems else "refused without a reason"
        Console(file=io.StringIO()).print(render_problems(error.problems))
        str(error)
    except BaseException as error:  # every other error is an unwanted outcome
        end, text = type(error).__name__, traceback.format_exc()
    return Outcome(number, end, time.process_time() - start, text)


def damaged(kind: str, seed: int, number: int, corpus: Sequence[bytes]) -> dict[str, bytes]:
    """The mutated files of one data set: one table or both, or all pictures."""
    rng = random.Random(f"{seed}/{kind}/{number}")
    if kind == "images":
        return {place: mutated_picture(rng, rng.choice(corpus), rng.choice(corpus)) for place in PICTURES}
    files = {}
    for place in rng.choice([[one] for one in TABLES] + [[*TABLES]] * 2):
        before = TABLES[place] if rng.randrange(2) else rng.choice(corpus)
        files[place] = mutated_table(rng, before, rng.choice(corpus))
    return files


def one_of_many(kind: str, seed: int, numbers: range, folder: Path, keep: Path, answers: Connection) -> None:
    """Mutate and read in this process; if it dies, the file that killed it is in the folder."""
    _limited()
    sound(folder)
    whole = {name: (folder / name).read_bytes() for name in (*TABLES, *PICTURES)}
    start = _peak()
    guide = Guide([*TABLES.values()] if kind == "tables" else seed_pictures())
    for number in numbers:
        files = damaged(kind, seed, number, guide.corpus)
        for place, data in (whole | files).items():
            (folder / place).write_bytes(data)
        learning = number < LEARNING or number % 10 == 0  # tracing doubles the time
        with guide.watching(files.values()) if learning else contextlib.nullcontext():
            outcome = judged(folder, number)
        found = replace(outcome, files=len(files), arcs=len(guide.arcs), memory=_peak() - start)
        if found.end not in (DATA_SET, REFUSED):
            shutil.copytree(folder, keep / f"{kind}-{number}", dirs_exist_ok=True)
        answers.send(found)


def one_bomb(folder: Path, answers: Connection) -> None:
    """Read one bomb in this process; answer with the outcome and the memory that it needed."""
    _limited()
    start = _peak()
    outcome = judged(folder, 1)
    answers.send(replace(outcome, memory=_peak() - start))


def _limited() -> None:
    most = int(2 * GIGABYTES * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # no progress bars and warnings of libtiff


def _peak() -> float:
    """The most memory that this process has used, in GB."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the memory of the parent
        kilobytes = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(kilobytes.split()[1]) * 1024 / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


if __name__ == "__main__":
    main()
