"""The same picture in two files, and the same cell in two rows.

A picture that was saved in another format, compressed, resized, cut at its edges, turned, mirrored or made a
negative is found in steps, each of which leaves fewer pairs:

1. Magnitudes of the cosine transform, which no turn changes, are alike.
2. Perceptual hashes of one picture, and of the other without some of its edges, are alike.
3. Details correlate, first at small shifts in the turn of the hashes, then at any shift. Single cells on a
   plain ground have nearly the same hashes, so that many pairs end here.
4. Two small versions are laid over each other, and their details are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count

import cv2
import joblib
import numpy as np
import numpy.typing as npt
from scipy.fft import dct, irfft2, rfft2
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from aplsmear.images.reading import Rgb

Grey = npt.NDArray[np.uint8]

_SIDE = 64  # px, of the small version of a picture
_CUTS = np.array(  # px of the small version, from top, left, bottom and right: to find pictures that were cut
    [(each,) * 4 for each in (0, 3, 6)]
    + [(6, 0, 0, 0), (0, 6, 0, 0), (0, 0, 6, 0), (0, 0, 0, 6), (6, 0, 6, 0), (0, 6, 0, 6)]
    + [(3, 0, 3, 0), (0, 3, 0, 3)]
    + [(5, 5, 0, 0), (5, 0, 0, 5), (0, 5, 5, 0), (0, 0, 5, 5)]
)
_LOW = 8  # cosine coefficients of each side that are kept
_FOLDED = np.nonzero(np.triu(np.add.outer(range(_LOW), range(_LOW)) > 2))  # the lowest are those of any cell
_NEAR = 1 - 0.42**2 / 2  # cosine of magnitudes: their distance is below 0.40 in the true pairs of real cells
_BLOCK = 64  # pictures that are transformed, and compared with all others, at once
_NEAREST = 5  # pictures that are compared in detail with each picture
_FARTHEST = 14  # of 64 bits; copies that were cut: 12 at most; 1 to 5 of 100 other pairs: 14 or fewer
_LIKE, _SHIFT = 0.4, 4  # correlation at a shift of so many px of 32; copies: 0.46 and more; most others: less
_SIMILAR_DETAILS = 0.45  # correlation at the best shift; copies: 0.58 and more; 95 of 100 other cells: less
_SAME_DETAILS = 0.75  # correlation; copies: 0.94 and more, with a frame 0.78; other pictures: 0.70 at most
_WINDOW = cv2.createHanningWindow((_SIDE, _SIDE), cv2.CV_32F)
_ODD = np.where(np.arange(8) % 2, -1.0, 1.0)
_SCALED, _SHIFTED = 0.3, 14.0  # largest change of scale, and shift in px, of a copy that was cut
_FLAT = 1.0  # of 255; a picture with a smaller standard deviation has no details to compare
_SAME_BOX = 0.7  # intersection over union; real neighbours: 0.5 at most


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a picture to compare it with others: 4 KB."""

    pixels: str  # `pixel_hash`
    small: Grey  # the picture in grey, uint8, shape (64, 64)


def pixel_hash(rgb: Rgb) -> str:
    """SHA-256 of size and pixels of a picture: uint8, shape (height, width, 3)."""
    digest = hashlib.sha256(f"{rgb.shape}".encode())
    digest.update(np.ascontiguousarray(rgb).data)
    return digest.hexdigest()


def fingerprint(rgb: Rgb) -> Fingerprint:
    """The fingerprint of a picture: uint8, shape (height, width, 3)."""
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)
    return Fingerprint(pixel_hash(rgb), np.asarray(small, dtype=np.uint8))


def _part(picture: Grey, cut: npt.NDArray[np.int64]) -> Grey:
    """A small version without its edges: a row of `_CUTS`."""
    top, left, bottom, right = cut.tolist()
    return picture[top : _SIDE - bottom, left : _SIDE - right]


def _shrunk(picture: Grey) -> Grey:
    return np.asarray(cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _side(before: int, after: int) -> npt.NDArray[np.float64]:
    """The matrix, shape (8, 64), that cuts one side of a picture, shrinks it to 32 px and transforms it."""
    edges = np.linspace(before, _SIDE - after, 33)[:, None]
    pixel = np.arange(_SIDE)
    covered = np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)
    return np.asarray(dct(np.clip(covered, 0, None), axis=0)[:_LOW])


_ROWS = np.stack([_side(top, bottom) for top, _, bottom, _ in _CUTS.tolist()])
_COLUMNS = np.stack([_side(left, right).T for _, left, _, right in _CUTS.tolist()])


def _transforms(pictures: Sequence[Fingerprint], cuts: int = len(_CUTS)) -> npt.NDArray[np.float64]:
    """Low coefficients of the cosine transform of the first `cuts` parts of pictures: (n, cuts, 8, 8)."""
    small = np.stack([one.small for one in pictures]).astype(np.float64)
    rows = _ROWS[:cuts].reshape(-1, _SIDE) @ small
    return np.asarray(rows.reshape(len(small), cuts, _LOW, _SIDE) @ _COLUMNS[:cuts])


def _turns(low: np.ndarray) -> np.ndarray:
    """Cosine transforms, shape (n, 8, 8), of pictures in each of the turns of `_turned`: (8, n, 8, 8).

    A turn of the picture transposes its cosine transform or changes signs in it, so that one is enough.
    """
    turned = []
    for each in (low, low * _ODD):
        aside = each.transpose(0, 2, 1)
        turned += [each, aside * _ODD[:, None], each * _ODD * _ODD[:, None], aside * _ODD]
    return np.stack(turned)


def _hashes(low: np.ndarray) -> npt.NDArray[np.uint64]:
    """The perceptual hashes (Zauner 2010) of pictures with these cosine transforms, shape (..., 8, 8)."""
    flat = low.reshape(*low.shape[:-2], -1)
    bits = flat > np.median(flat, axis=-1, keepdims=True)
    return np.packbits(bits, axis=-1).view(np.uint64)[..., 0]


def _magnitudes(low: np.ndarray) -> npt.NDArray[np.float32]:
    """Magnitudes of cosine transforms, shape (..., 8, 8), equal in all turns: (..., 32), each of length 1."""
    squares = low**2
    folded = np.sqrt(squares + squares.swapaxes(-1, -2))[..., *_FOLDED]
    length = np.maximum(np.linalg.norm(folded, axis=-1, keepdims=True), 1e-9)
    return np.asarray(folded / length, dtype=np.float32)


def same_pictures(
    first: Sequence[Fingerprint], second: Sequence[Fingerprint] | None = None
) -> list[tuple[int, int]]:
    """Pairs of pictures that show the same.

    Time grows with the product of the numbers of pictures: 18,000 pictures take about 20 s of one core.

    Args:
        first: pictures.
        second: other pictures, to compare with `first`; None: pairs within `first`.

    Returns:
        Positions in `first` and `second`, sorted. Of many copies of one picture, not all pairs are returned,
        but each copy is in a pair.
    """
    if second is None:
        return sorted({(min(pair), max(pair)) for pair in _parts_of(first, first)})
    return sorted(_parts_of(first, second) | {pair[::-1] for pair in _parts_of(second, first)})


def _parts_of(wholes: Sequence[Fingerprint], others: Sequence[Fingerprint]) -> set[tuple[int, int]]:
    """Pictures, and others that show the same or a part of it. Both may be one list."""
    if not wholes or not others:
        return set()
    same = wholes is others
    starts = range(0, len(others), _BLOCK)
    low = np.concatenate([_transforms(others[at : at + _BLOCK], 1)[:, 0] for at in starts])
    turns, magnitudes = _hashes(_turns(low)), _magnitudes(low).T
    flat = np.array([_is_flat(one) for one in others])
    by_pixels = {one.pixels: place for place, one in reversed(list(enumerate(others)))}

    def copies_of(place: int, parts: np.ndarray, like: np.ndarray) -> list[tuple[int, int]]:
        one = wholes[place]
        copy = by_pixels.get(one.pixels, place if same else None)
        if copy is not None and not (same and copy == place):
            return [(place, copy)]
        if _is_flat(one):
            return []
        like = like[~flat[like] & ~(same & (like == place))]
        bits = np.bitwise_count(parts[:, None, None] ^ turns[:, like])
        bits = bits.reshape(len(parts) * len(turns), len(like))
        distance = np.minimum(bits.min(axis=0), 64 - bits.max(axis=0))  # all bits of a negative differ
        close = np.flatnonzero(distance <= _FARTHEST)
        near = close[np.argsort(distance[close], kind="stable")[:_NEAREST]]
        return [(place, int(like[each])) for each in near if _copied(one, others[like[each]], bits[:, each])]

    def copies_of_block(start: int) -> list[tuple[int, int]]:
        low = _transforms(wholes[start : start + _BLOCK])
        likeness = np.full((len(low), len(others)), -1, dtype=np.float32)
        room = np.empty_like(likeness)
        for part in _magnitudes(low).swapaxes(0, 1):
            np.maximum(likeness, np.matmul(part, magnitudes, out=room), out=likeness)
        rows = zip(count(start), _hashes(low), likeness > _NEAR, strict=False)
        return [pair for place, parts, row in rows for pair in copies_of(place, parts, np.flatnonzero(row))]

    with ThreadPoolExecutor(joblib.cpu_count()) as pool:  # NumPy and OpenCV leave the other threads free
        blocks = pool.map(copies_of_block, range(0, len(wholes), _BLOCK))
        return {pair for pairs in blocks for pair in pairs}


def _is_flat(one: Fingerprint) -> bool:
    return bool(cv2.meanStdDev(one.small)[1].item() < _FLAT)


def _copied(one: Fingerprint, other: Fingerprint, bits: npt.NDArray[np.uint8]) -> bool:
    """Whether a picture shows the same as another one, or a part of it: in the turn and cut of the hashes.

    `bits`, shape (120,), differ between the hash of each part of `one` and of each turn of `other`.
    """
    best = int(np.minimum(bits, 64 - bits).argmin())
    cut, turn = divmod(best, 8)
    moved = _turned(other.small, turn)
    moved = 255 - moved if bits[best] > 32 else moved
    part = _part(one.small, _CUTS[cut])
    return (
        _likeness(part, moved) >= _LIKE
        and _similar_details(one.small, part, moved)
        and _same_details(one.small, moved, _CUTS[cut])
    )


def _likeness(part: Grey, moved: Grey) -> float:
    """The correlation of two pictures without their uneven light, at the best of small shifts."""
    fixed, other = (_details(_shrunk(one), 2) for one in (part, moved))
    core = other[_SHIFT:-_SHIFT, _SHIFT:-_SHIFT]
    return float(cv2.matchTemplate(fixed, core, cv2.TM_CCOEFF_NORMED).max())


def _turned(picture: Grey, turn: int) -> Grey:
    """A square picture in one of four turns (0 to 3), or mirrored in one of four (4 to 7)."""
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if turn >= 4 else picture, turn % 4))


def _spectrum(picture: Grey) -> npt.NDArray[np.complex64]:
    """The Fourier transform of the details of a picture, scaled to a length of 1."""
    exact = picture.astype(np.float32)
    details = _WINDOW * (cv2.GaussianBlur(exact, (0, 0), 0.7) - cv2.GaussianBlur(exact, (0, 0), 2))
    details -= details.mean()
    return np.asarray(rfft2(details / max(float(np.linalg.norm(details)), 1e-6)))


def _similar_details(whole: Grey, part: Grey, moved: Grey) -> bool:
    """Whether details correlate at some shift with those of a picture, or of a part of it."""
    other = _spectrum(moved).conj()
    shown = (cv2.resize(one, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR) for one in (whole, part))
    return any(float(irfft2(_spectrum(one) * other).max()) >= _SIMILAR_DETAILS for one in shown)


def _same_details(fixed: Grey, moved: Grey, cut: npt.NDArray[np.int64]) -> bool:
    """Whether details agree after one picture was laid over the other (Evangelidis & Psarakis 2008).

    `moved` may be `fixed` without its edges; the search for its place begins at `cut`, a row of `_CUTS`.
    """
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-4)
    top, left, bottom, right = cut.tolist()
    wide, high = _SIDE / (_SIDE - left - right), _SIDE / (_SIDE - top - bottom)
    start = np.array([[wide, 0, -left * wide], [0, high, -top * high]], dtype=np.float32)
    try:
        _, warp = cv2.findTransformECC(fixed, moved, start, cv2.MOTION_AFFINE, stop, None, 5)
    except cv2.error:  # the search did not converge: the pictures have nothing in common
        return False
    back = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(_details(moved), warp, fixed.shape, flags=back)
    inside = cv2.warpAffine(np.ones_like(moved), warp, fixed.shape, flags=back) > 0
    if np.abs(warp[:, :2] - np.eye(2)).max() > _SCALED or np.abs(warp[:, 2]).max() > _SHIFTED:
        return False
    a, b = _details(fixed)[inside], laid[inside]
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return scale > 0 and float(a @ b) / scale >= _SAME_DETAILS


def _details(picture: Grey, blur: float = 1.5) -> npt.NDArray[np.float32]:
    exact = picture.astype(np.float32)
    return np.asarray(exact - cv2.GaussianBlur(exact, (0, 0), blur), dtype=np.float32)


def groups(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the group of each of `count` items, of which `pairs` belong together: shape (count,)."""
    joined = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    links = coo_array(
        (np.ones(len(joined), dtype=np.int8), (joined[:, 0], joined[:, 1])), shape=(count, count)
    )
    return np.asarray(connected_components(links, directed=False)[1])


def same_boxes(boxes: np.ndarray, smear: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of nearly the same box in one smear: more than 0.7 of what both cover is in both.

    `boxes` are y0, x0, y1, x1 in px, shape (n, 4), `smear` is that of each. Each box is compared with the
    four that are nearest to it. Returns positions, sorted.
    """
    if len(boxes) < 2:
        return []
    _, number = np.unique(np.asarray(smear, dtype=str), return_inverse=True)
    keys, first, where = np.unique(
        np.column_stack([number, boxes]), axis=0, return_index=True, return_inverse=True
    )
    pairs = [(place, int(first[key])) for place, key in enumerate(where.ravel()) if first[key] != place]
    apart = np.array([4.0 * (boxes.max() - boxes.min() + 1), 1, 1, 1, 1])  # no two smears are near each other
    _, near = cKDTree(keys * apart).query(keys * apart, k=min(5, len(keys)))
    near = near.reshape(len(keys), -1)
    links = np.stack([np.repeat(np.arange(len(keys)), near.shape[1]), near.ravel()], axis=1)
    links = np.unique(np.sort(links, axis=1), axis=0)
    links = links[(links[:, 0] < links[:, 1]) & (keys[links[:, 0], 0] == keys[links[:, 1], 0])]
    one, other = keys[links[:, 0], 1:], keys[links[:, 1], 1:]
    sides = np.minimum(one[:, 2:], other[:, 2:]) - np.maximum(one[:, :2], other[:, :2])
    both = np.clip(sides, 0, None).prod(axis=1)
    either = (one[:, 2:] - one[:, :2]).prod(axis=1) + (other[:, 2:] - other[:, :2]).prod(axis=1) - both
    pairs += [(int(first[a]), int(first[b])) for a, b in links[both > _SAME_BOX * either]]
    return sorted({(min(pair), max(pair)) for pair in pairs})
