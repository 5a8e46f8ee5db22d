"""The same picture in two files, and the same cell in two rows.

A picture that was saved in another format, compressed, resized, cut at its edges, turned or mirrored is found
in three steps. Perceptual hashes name the pictures that are most like each picture. Those whose details do
not correlate at any shift are removed: single cells on a plain ground have nearly the same hashes. Two small
versions are then laid over each other, and their details are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import cv2
import joblib
import numpy as np
import numpy.typing as npt
from scipy.fft import dctn, irfft2, rfft2
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from aplsmear.images.reading import Rgb

Grey = npt.NDArray[np.uint8]

_SIDE = 64  # px, of the small version of a picture
_INNER = 3  # px, cut from each edge for a second hash: finds pictures that were cut
_NEAREST = 5  # pictures that are compared in detail with each picture
_FARTHEST = (
    16  # of 64 bits; cut by 5 % on two sides: 18 at most; unrelated fields: 16 or fewer in 1 of 1,000 pairs
)
_SIMILAR_DETAILS = 0.45  # correlation at the best shift; copies: 0.58 and more; 95 of 100 other cells: less
_SAME_DETAILS = 0.7  # correlation; copies: 0.76 and more; other pictures: 0.58 at most (docs/safety.md)
_WINDOW = cv2.createHanningWindow((_SIDE, _SIDE), cv2.CV_32F)
_ODD = np.where(np.arange(8) % 2, -1.0, 1.0)
_SCALED, _SHIFTED = 0.12, 10.0  # largest change of scale, and shift in px, of a copy that was cut
_FLAT = 1.0  # of 255; a picture with a smaller standard deviation has no details to compare
_SAME_BOX = 0.7  # intersection over union; real neighbours: 0.5 at most


@dataclass(frozen=True)
class Fingerprint:
    """What is kept of a picture to compare it with others: 4 KB.

    Attributes:
        pixels: SHA-256 of size and pixels.
        small: the picture in grey, uint8, shape (64, 64).
        hashes: 64-bit perceptual hashes, uint64, shape (2, 8): of the picture, and of it without its edges;
            each as it is, in three other turns, and all of them mirrored.
    """

    pixels: str
    small: Grey
    hashes: npt.NDArray[np.uint64]


def fingerprint(rgb: Rgb) -> Fingerprint:
    """The fingerprint of a picture: uint8, shape (height, width, 3)."""
    pixels = hashlib.sha256(f"{rgb.shape}".encode())
    pixels.update(np.ascontiguousarray(rgb).data)
    grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = np.asarray(cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA), dtype=np.uint8)
    inner = small[_INNER:-_INNER, _INNER:-_INNER]
    hashes = np.stack([_hashes(small), _hashes(inner)])
    return Fingerprint(pixels.hexdigest(), small, hashes)


def _hashes(picture: Grey) -> npt.NDArray[np.uint64]:
    """The perceptual hash (Zauner 2010) of a square picture in each of the turns of `_turned`: shape (8,).

    A turn of the picture transposes its cosine transform or changes signs in it, so that one is enough.
    """
    shrunk = cv2.resize(picture, (32, 32), interpolation=cv2.INTER_AREA)
    low = dctn(shrunk.astype(np.float64))[:8, :8]
    turned = []
    for each in (low, low * _ODD):
        turned += [each, each.T * _ODD[:, None], each * _ODD * _ODD[:, None], each.T * _ODD]
    bits = [each > np.median(each) for each in turned]
    return np.packbits(np.array(bits).reshape(8, 64), axis=1).view(np.uint64)[:, 0]


def same_pictures(
    first: Sequence[Fingerprint], second: Sequence[Fingerprint] | None = None
) -> list[tuple[int, int]]:
    """Pairs of pictures that show the same.

    Time grows with the product of the numbers of pictures: 1,300 pictures take seconds, 18,000 a minute.

    Args:
        first: pictures.
        second: other pictures, to compare with `first`; None: pairs within `first`.

    Returns:
        Positions in `first` and `second`, sorted. Of many copies of one picture, not all pairs are returned,
        but each copy is in a pair.
    """
    others = first if second is None else second
    if not first or not others:
        return []
    hashes = np.stack([one.hashes for one in others], axis=-1)
    flat = np.array([one.small.std() < _FLAT for one in others])
    by_pixels = {one.pixels: place for place, one in reversed(list(enumerate(others)))}

    def copies_of(place: int) -> list[tuple[int, int]]:
        one = first[place]
        copy = by_pixels.get(one.pixels, place if second is None else None)
        if copy is not None and (second is not None or copy != place):
            return [(place, copy)]
        if one.small.std() < _FLAT:
            return []
        turned = _distances(one.hashes, hashes)
        distance = np.where(flat, 65, turned.min(axis=0)).astype(np.uint8)
        if second is None:
            distance[place] = 65
        near = [
            each for each in np.argsort(distance, kind="stable")[:_NEAREST] if distance[each] <= _FARTHEST
        ]
        spectra = [_spectrum(one.small), _spectrum(_without_edges(one.small))] if near else []
        moved = {int(each): _turned(others[each].small, int(turned[:, each].argmin())) for each in near}
        similar = [each for each, other in moved.items() if _similar_details(spectra, other)]
        return [(place, each) for each in similar if _same_details(one.small, moved[each])]

    with ThreadPoolExecutor(joblib.cpu_count()) as pool:  # NumPy and OpenCV leave the other threads free
        found = {pair for pairs in pool.map(copies_of, range(len(first))) for pair in pairs}
    return sorted({(min(pair), max(pair)) for pair in found} if second is None else found)


def _distances(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Bits that differ between a picture, (2, 8), and each turn of others, (2, 8, n): shape (8, n)."""
    whole = np.bitwise_count(hashes[0, 0] ^ others).min(axis=0)
    return np.asarray(np.minimum(whole, np.bitwise_count(hashes[1, 0] ^ others[0])))


def _turned(picture: Grey, turn: int) -> Grey:
    """A square picture in one of four turns (0 to 3), or mirrored in one of four (4 to 7)."""
    return np.ascontiguousarray(np.rot90(picture[:, ::-1] if turn >= 4 else picture, turn % 4))


def _without_edges(picture: Grey) -> Grey:
    inner = picture[_INNER:-_INNER, _INNER:-_INNER]
    return np.asarray(cv2.resize(inner, (_SIDE, _SIDE), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _spectrum(picture: Grey) -> npt.NDArray[np.complex64]:
    """The Fourier transform of the details of a picture, scaled to a length of 1."""
    exact = picture.astype(np.float32)
    details = _WINDOW * (cv2.GaussianBlur(exact, (0, 0), 0.7) - cv2.GaussianBlur(exact, (0, 0), 2))
    details -= details.mean()
    return np.asarray(rfft2(details / max(float(np.linalg.norm(details)), 1e-6)))


def _similar_details(spectra: Sequence[npt.NDArray[np.complex64]], moved: Grey) -> bool:
    """Whether details correlate at some shift with one of the pictures of these spectra."""
    other = _spectrum(moved).conj()
    return any(float(irfft2(one * other).max()) >= _SIMILAR_DETAILS for one in spectra)


def _same_details(fixed: Grey, moved: Grey) -> bool:
    """Whether details agree after one picture was laid over the other (Evangelidis & Psarakis 2008)."""
    stop = (cv2.TERM_CRITERIA_COUNT | cv2.TERM_CRITERIA_EPS, 30, 1e-4)
    try:
        _, warp = cv2.findTransformECC(
            fixed, moved, np.eye(2, 3, dtype=np.float32), cv2.MOTION_AFFINE, stop, None, 5
        )
    except cv2.error:  # the search did not converge: the pictures have nothing in common
        return False
    back = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    laid = cv2.warpAffine(_details(moved), warp, fixed.shape, flags=back)
    inside = cv2.warpAffine(np.ones_like(moved), warp, fixed.shape, flags=back) > 0
    if np.abs(warp - np.eye(2, 3)).max(axis=0)[:2].max() > _SCALED or np.abs(warp[:, 2]).max() > _SHIFTED:
        return False
    a, b = _details(fixed)[inside], laid[inside]
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return scale > 0 and float(a @ b) / scale >= _SAME_DETAILS


def _details(picture: Grey) -> npt.NDArray[np.float32]:
    exact = picture.astype(np.float32)
    return np.asarray(exact - cv2.GaussianBlur(exact, (0, 0), 1.5), dtype=np.float32)


def groups(count: int, pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """The number of the group of each of `count` items, of which `pairs` belong together: shape (count,)."""
    joined = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    links = coo_array(
        (np.ones(len(joined), dtype=np.int8), (joined[:, 0], joined[:, 1])), shape=(count, count)
    )
    return np.asarray(connected_components(links, directed=False)[1])


def same_boxes(boxes: np.ndarray, smear: Sequence[str]) -> list[tuple[int, int]]:
    """Pairs of nearly the same box in one smear: more than 0.7 of what both cover is in both.

    Each box is compared with the four that are nearest to it.

    Args:
        boxes: y0, x0, y1, x1 in px, shape (n, 4).
        smear: of each box.

    Returns:
        Positions, sorted.
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
