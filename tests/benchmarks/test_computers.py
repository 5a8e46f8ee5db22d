"""The whole chain, from smears to predictions, gives the same bytes on another processor."""

from io import StringIO

import pytest
from computers import backbones_of_profiles, cases, digests_of, identical, prepare, table
from processors import SORTS, UPDATE, can_emulate
from rich.console import Console


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.pipeline
@pytest.mark.skipif(not can_emulate(SORTS), reason=UPDATE)
def test_the_chain_gives_the_same_bytes_on_an_emulated_processor(tmp_path):
    """The short form of `make computers`: a backbone that differs with AVX-512 if its graph allows it."""
    backbone = backbones_of_profiles()["kaggle_densenet121"] | {"layer": ["pool3_relu"]}
    prepare(tmp_path / "inputs", {"net": backbone})
    every = cases(["EPYC"])
    found = digests_of(tmp_path, {name: every[name] for name in list(every)[-2:]})
    assert len(identical(found)) == 2, found
    assert {"views", "graph of net", "features of net", "heads", "ensemble", "predict"} < next(
        iter(found.values())
    ).keys()


def test_all_backbones_of_the_profiles_are_compared():
    assert {row["application"] for row in backbones_of_profiles().values()} == {
        "MobileNet", "MobileNetV2", "DenseNet121", "EfficientNetB0", "DINOv2S",
    }  # fmt: skip


def test_a_computer_with_another_digest_is_not_counted_as_identical():
    found = {"here": {"views": "a" * 64}, "there": {"views": "b" * 64}, "again": {"views": "a" * 64}}
    assert identical(found) == ["here", "again"]
    shown = StringIO()
    Console(file=shown, width=80).print(table(found))
    assert "bbbbbb" in shown.getvalue()
