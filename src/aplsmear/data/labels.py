"""The labels of the data set: set literals in text, clean-up rules, and what they say about the disease.

A label column holds a Python set literal, ``{'Auer rods', 'Faggot cell'}``, or nothing. The clean-up
follows the authors of the data set (Eckardt et al., BMC Cancer 2022;22:201).
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

from aplsmear.tables import SEPARATOR

MAX_LENGTH = 1000  # characters of one label text; real ones stay below 60

HEALTHY, AML, APL = "healthy", "aml", "apl"
DIAGNOSES = (HEALTHY, AML, APL)
FAB = ("m0", "m1", "m2", "m3", "m4", "m5", "m6", "m7", "not_classified")
APL_FAB = "m3"
SMEAR_LABELS = (HEALTHY, AML, *FAB)

# What cells may be expected to be called: the labels of the Kaggle set, and of bone marrow cytology at large.
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

_DEBRIS = re.compile(r"\d+x\.png|al|ap|bal|m445501")
_STRING = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_SET = re.compile(
    rf"\s*(?:set\(\s*\)|([{{\[(])\s*((?:{_STRING}\s*,\s*)*(?:{_STRING})?)\s*([}}\])]))\s*", re.DOTALL
)
_ONE = re.compile(_STRING, re.DOTALL)
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_CLOSING = {"{": "}", "[": "]", "(": ")"}
_LIKE = 0.9  # of 1; "Myeloblasts" is like "Myeloblast" (0.95), "Megaloblast" is not (0.76)


class LabelError(ValueError):
    """A label text is no set of labels."""


@dataclass(frozen=True)
class SmearLabels:
    """The labels of one smear after the clean-up.

    Attributes:
        labels: sorted, lower case, merged.
        dropped: file-name debris that was dropped, sorted.
        diagnosis: healthy, aml, apl, or '' where the labels name none.
        fab: sorted FAB classes.
    """

    labels: tuple[str, ...]
    dropped: tuple[str, ...]
    diagnosis: str
    fab: tuple[str, ...]


def parse_labels(text: str) -> tuple[str, ...]:
    """The labels in a set, list or tuple literal of strings, or in an empty text; nothing is evaluated.

    Spaces around and inside a label are tidied, empty labels and repetitions dropped.

    Returns:
        Sorted labels; the label ``None`` is a label like any other.

    Raises:
        LabelError: the text is longer than `MAX_LENGTH`, is anything else than such a literal, or a label
            holds a ``|`` or a character that cannot be printed.
    """
    if len(text) > MAX_LENGTH:
        raise LabelError(f"a label text of at most {MAX_LENGTH} characters")
    if not text.strip():
        return ()
    match = _SET.fullmatch(text)
    if match is None or (match[1] and _CLOSING[match[1]] != match[3]):
        raise LabelError("a set of labels, such as {'Auer rods', 'Faggot cell'}, or nothing")
    labels = {tidy(_ESCAPE.sub(r"\1", string[1:-1])) for string in _ONE.findall(match[2] or "")} - {""}
    if not all(label.isprintable() and SEPARATOR not in label for label in labels):
        raise LabelError(f"labels of printable characters without {SEPARATOR!r}")
    return tuple(sorted(labels))


def tidy(text: str) -> str:
    """Text without spaces at its ends, single ones within, and accents composed (Unicode NFC)."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def clean_smear_labels(labels: Iterable[str]) -> SmearLabels:
    """Clean up the labels of a smear and read the diagnosis from them.

    Lower case; ``m4...`` is m4, ``m5...`` is m5, ``notclassified`` is not_classified, ``apl`` is m3; debris
    (``50x.png``, ``al``, ``ap``, ``bal``, ``m445501``) is dropped. m3 is APL, any other FAB class is AML.

    Raises:
        LabelError: a label is unknown, or the labels contradict each other.
    """
    kept, dropped = set(), set()
    for label in (text.lower() for text in labels):
        if _DEBRIS.fullmatch(label):
            dropped.add(label)
        else:
            kept.add(_merged(label))
    unknown = sorted(kept.difference(SMEAR_LABELS))
    if unknown:
        raise LabelError(
            f"labels of smears ({', '.join(SMEAR_LABELS)}); unknown: "
            + ", ".join(f"{label!r}{_did_you_mean(label, SMEAR_LABELS)}" for label in unknown)
        )
    fab = tuple(label for label in FAB if label in kept)
    if HEALTHY in kept and len(kept) > 1:
        raise LabelError("healthy alone, or aml with a FAB class")
    if APL_FAB in fab and len(fab) > 1:
        raise LabelError("m3 (which is APL) or another FAB class, not both")
    diagnosis = APL if APL_FAB in fab else AML if fab or AML in kept else HEALTHY if kept else ""
    return SmearLabels(tuple(sorted(kept)), tuple(sorted(dropped)), diagnosis, fab)


def misspelt(label: str, known: Iterable[str]) -> str | None:
    """The known label that `label` probably means: the same but for case, or nearly the same; else None."""
    by_folded = {word.casefold(): word for word in known}
    close = difflib.get_close_matches(label.casefold(), by_folded, n=1, cutoff=_LIKE)
    return by_folded[close[0]] if close else None


def _merged(label: str) -> str:
    if re.fullmatch(r"m[45](?!\d).*", label):
        return label[:2]
    if re.fullmatch(r"not[ _-]?classified", label):
        return "not_classified"
    return APL_FAB if label == APL else label


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
