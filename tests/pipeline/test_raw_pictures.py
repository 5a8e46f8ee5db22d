"""No raw picture or table of patients reaches a git remote or a DVC remote, wherever the data set lies."""

import shutil
import subprocess
import time
from pathlib import Path

import pytest

from aplsmear.sources.drawn import draw_data_set
from clones import clone, commit, run

pytestmark = pytest.mark.pipeline

RUN = ("dvc", "exp", "run", "--name")
NAMES = ("profile", "skipped", "setting", "hand", "temp", "queued")
WINDOW, STEP = 48, 997  # bytes that are searched for together, and from one search to the next


def held(place: Path) -> bytes:
    """All that the git remote and the DVC remote beside a clone hold, decompressed."""
    git = place.parent / "git"
    listed = run(git, "git", "cat-file", "--batch-all-objects", "--batch-check").splitlines()
    blobs = "".join(f"{line.split()[0]}\n" for line in listed if " blob " in line).encode()
    command = ("git", "cat-file", "--batch")
    stored = subprocess.run(command, cwd=git, input=blobs, capture_output=True, check=True).stdout
    shared = [path.read_bytes() for path in (place.parent / "aplsmear-shared").rglob("*") if path.is_file()]
    return b"".join([stored, *shared])


def test_no_byte_of_a_raw_picture_is_pushed_from_wherever_the_data_set_lies(tmp_path: Path) -> None:
    place, raw = clone(tmp_path / "clone"), tmp_path / "outside"
    draw_data_set(raw, 6, 1, size=(240, 320), cells_per_smear=30)
    table = raw / "wsi.csv"
    table.write_text(table.read_text().replace("P00", "Meyer-"))  # unlike the table of the demo
    for folder in ("our_smears", "docs/smears"):
        shutil.copytree(raw, place / folder)
    (place / "linked").symlink_to(raw)
    run(tmp_path, "git", "init", "--quiet", "--bare", "git")
    run(place, "git", "remote", "add", "lab", str(tmp_path / "git"))

    run(place, "aplsmear", "profile", "demo", "dataset.root=our_smears")
    run(place, *RUN, "profile", "download")
    run(place, *RUN, "skipped", "-S", "seed=2", "download")  # DVC adds the inputs of skipped stages, too
    run(place, *RUN, "setting", "-S", "dataset.root=docs/smears", "download")
    params = place / "params.yaml"
    params.write_text(params.read_text().replace("root: docs/smears", "root: linked"))
    run(place, *RUN, "hand", "download")
    run(place, *RUN, "temp", "--temp", "-C", "our_smears", "-S", "dataset.root=our_smears", "download")
    run(place, *RUN, "queued", "--queue", "-S", f"dataset.root={raw}", "download")
    # `dvc exp run --run-all` can wait for ever for a worker that has ended its work
    run(place, "dvc", "queue", "start")
    until = time.monotonic() + 300
    while "/queued\n" not in run(place, "git", "for-each-ref", "--format=%(refname)", "refs/exps"):
        assert time.monotonic() < until, run(place, "dvc", "queue", "status")
        time.sleep(1)
    run(place, "dvc", "queue", "stop", "--kill", ok=False)

    run(place, "dvc", "exp", "push", "lab", *NAMES)
    commit(place)  # `git add --all`
    run(place, "dvc", "push")
    run(place, "git", "push", "--quiet", "lab", "main")
    refs = run(tmp_path / "git", "git", "for-each-ref", "--format=%(refname)")
    assert all(f"/{name}\n" in refs for name in NAMES)

    found = held(place)
    assert b"# All parameters of the pipeline" in found
    assert not any(path.read_bytes() in found for path in raw.rglob("*.csv"))
    for picture in (path.read_bytes() for path in raw.glob("wsi/*")):
        for start in range(STEP, len(picture) - WINDOW, STEP):  # JPEG files begin alike
            assert picture[start : start + WINDOW] not in found
