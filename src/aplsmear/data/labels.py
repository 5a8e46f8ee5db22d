"""The labels of the data set: how they are written, corrected, and turned into a diagnosis.

A label column contains a Python set literal, ``{'Auer rods', 'Faggot cell'}``, or is empty. The corrections
are those of the authors of the data set (Eckardt et al., BMC Cancer 2022;22:201).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import get_args

from aplsmear.params import Diagnosis
from aplsmear.tables import SEPARATOR
from aplsmear.words import nearest

MAX_LENGTH = 1000  # characters of one label text; real ones stay below 60

HEALTHY, AML, APL = "healthy", "aml", "apl"
DIAGNOSES: tuple[Diagnosis, ...] = get_args(Diagnosis)
FAB = ("m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "not_classified")
APL_FAB = "m3"
SMEAR_LABELS = (HEALTHY, AML, *FAB)

# Known labels of cells: those of the Kaggle data set, and other terms of bone marrow cytology.
CELL_TYPES = (
    "Promyelocyte", "Myeloblast", "Erythroblast", "Myelocyte", "Metamyelocyte", "Granulocyte", "Lymphocyte",
    "Lymphoblast", "Monoblast", "Monocyte", "Promonocyte", "Plasma cell", "Erythrocyte", "erythrocyte",
    "Blast", "Neutrophil", "Band neutrophil", "Segmented neutrophil", "Eosinophil", "Basophil", "Mast cell",
    "Macrophage", "Histiocyte", "Megakaryocyte", "Megakaryoblast", "Promegakaryocyte", "Thrombocyte",
    "Platelet", "Proerythroblast", "Normoblast", "Megaloblast", "Reticulocyte", "Smudge cell", "Artefact",
)  # fmt: skip
CHARACTERISTICS = ("Auer rods", "Faggot cell", "Bilobed", "Mitosis", "None")
OBJECT_TYPES = ("Cell", "Smudge", "Not recognizeable", "Thrombocyte", "Artefact", "Artifact")
QUALITIES = ("Good", "Mediocre", "Bad")

_FILE_NAME_PARTS = re.compile(r"\d+x\.png|al|ap|bal|m445501")
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_SET = re.compile(
    rf"\s*(?:set\(\s*\)|([{{\[(])\s*((?:{_STRING}\s*,\s*)*(?:{_STRING})?)\s*([}}\])]))\s*", re.DOTALL
)
_ONE = re.compile(_STRING, re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_CLOSING = {"{": "}", "[": "]", "(": ")"}
LIKE = 0.9  # similarity to "Myeloblast": "Myeloblasts" 0.95 (misspelt), "Megaloblast" 0.76 (another word)


class LabelError(ValueError):
    """A text is not a set of labels; the message says what is expected."""


@dataclass(frozen=True)
class SmearLabels:
    """The corrected labels of one smear."""

    labels: tuple[str, ...]  # sorted, lower case, merged
    dropped: tuple[str, ...]  # parts of file names among the labels, which were dropped; sorted
    diagnosis: str  # healthy, aml, apl, or '' if the labels give none
    fab: tuple[str, ...]  # sorted FAB classes


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels in a set, list or tuple literal of strings, or in an empty text; sorted.

    The text is matched with a pattern, never evaluated. Spaces around and inside a label are tidied. Empty
    labels and repetitions are dropped. The label ``None`` is a label like any other.

    Raises:
        LabelError: the text is longer than `MAX_LENGTH` or is not such a literal, or a label contains a ``|``
            or a character that cannot be printed.
    """
    if len(text) > MAX_LENGTH:
        raise LabelError(f"a label text of at most {MAX_LENGTH} characters")
    if not text.strip():
        return ()
    match = _SET.fullmatch(text)
    if match is None or (match[1] and _CLOSING[match[1]] != match[3]):
        raise LabelError("a set of labels, such as {'Auer rods', 'Faggot cell'}, or an empty field")
    labels = {tidy(_ESCAPE.sub(r"\1", string[1:-1])) for string in _ONE.findall(match[2] or "")} - {""}
    if not all(label.isprintable() and SEPARATOR not in label for label in labels):
        raise LabelError(f"labels of printable characters without {SEPARATOR!r}")
    return tuple(sorted(labels))


def tidy(text: str) -> str:
    """Text without spaces at its ends, single ones within, and accents composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def clean_smear_labels(labels: Iterable[str]) -> SmearLabels:
    """Correct the labels of a smear and derive the diagnosis.

    Labels become lower case. ``m4...`` becomes m4, ``m5...`` m5, ``apl`` m3, and ``notclassified``
    not_classified. Parts of file names (``50x.png``, ``al``, ``ap``, ``bal``, ``m445501``) are dropped. m3 is
    APL, every other FAB class is AML.

    Raises:
        LabelError: a label is unknown, or the labels contradict each other.
    """
    kept, dropped = set(), set()
    for label in (text.lower() for text in labels):
        if _FILE_NAME_PARTS.fullmatch(label):
            dropped.add(label)
        else:
            kept.add(_merged(label))
    unknown = sorted(kept.difference(SMEAR_LABELS))
    if unknown:
        raise LabelError(
            f"labels of smears ({', '.join(SMEAR_LABELS)}); unknown: "
            + ", ".join(f"{label!r}{nearest(label, SMEAR_LABELS)}" for label in unknown)
        )
    fab = tuple(label for label in FAB if label in kept)
    if HEALTHY in kept and len(kept) > 1:
        raise LabelError("healthy alone, or aml with a FAB class, not both")
    if APL_FAB in fab and len(fab) > 1:
        raise LabelError("m3 (which is APL) or another FAB class, not both")
    diagnosis = APL if APL_FAB in fab else AML if fab or AML in kept else HEALTHY if kept else ""
    return SmearLabels(tuple(sorted(kept)), tuple(sorted(dropped)), diagnosis, fab)


def _merged(label: str) -> str:
    if re.fullmatch(r"m[45](?!\d).*", label):
        return label[:2]
    if re.fullmatch(r"not[ _-]?classified", label):
        return "not_classified"
    return APL_FAB if label == APL else label
