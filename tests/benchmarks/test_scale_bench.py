"""The scale benchmark: what it says of a command, and that cells of mirrored fields are where it says."""

import json
import sys
from pathlib import Path
from types import ModuleType

import cv2
import numpy as np
import pytest

from aplsmear.data.dataset import read_data_set

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture
def scale(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scale

    return scale


def test_time_and_memory_are_those_of_all_processes_of_a_command(scale, tmp_path):
    """A process that a process starts holds 150 MB and computes for a second."""
    inner = """
import time
held = bytearray(b"x") * 150_000_000
while time.process_time() < 1:
    pass
"""
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    found = scale.watched([sys.executable, "-c", outer], tmp_path)
    assert 1 < found.cpu_seconds < 3
    assert found.wall_seconds > 1
    assert 0.14 < found.private_memory_gb <= found.peak_memory_gb < 0.3
    assert 0.7 / scale.CORES < found.cores_wanted <= 1
    assert not found.tensorflow


def test_a_command_that_fails_ends_the_benchmark(scale, tmp_path):
    with pytest.raises(SystemExit, match="failed"):
        scale.watched([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


@pytest.mark.parametrize("copy", range(1, 9))
def test_a_cell_lies_where_the_box_of_a_mirrored_field_says(copy, scale, tmp_path):
    field = np.full((60, 80, 3), 220, np.uint8)
    field[10:22, 50:66] = (120, 40, 90)
    cv2.imwrite(str(tmp_path / "a.png"), field)
    scale.copy_field(tmp_path / "a.png", tmp_path / "b.jpg", copy)
    y0, x0, y1, x1 = json.loads(scale.turned("[10, 50, 22, 66]", copy, scale.Form(60, 80)))
    image = cv2.imread(str(tmp_path / "b.jpg")).astype(int)
    assert (y1 - y0, x1 - x0) == (12, 16)
    assert image[y0 + 2 : y1 - 2, x0 + 2 : x1 - 2, 1].max() < 70
    image[y0 - 3 : y1 + 3, x0 - 3 : x1 + 3] = 220
    assert image[..., 1].min() > 170


@pytest.mark.parametrize("patients", [3, 5])
def test_a_set_with_mirrored_fields_has_no_problems(patients, scale, tmp_path):
    """Three patients are drawn: of five, two have mirrored fields, which are declared as distinct."""
    form = scale.Form(200, 300, 30)
    scale.make_set(tmp_path / "base", tmp_path / "whole", patients, 3, form)
    scale.first_patients(tmp_path / "whole", tmp_path / "first", patients)
    found = read_data_set(tmp_path / "first", {}, min_box=8, skip_bad_images=False)
    assert found.smears["patient"].nunique() == patients
