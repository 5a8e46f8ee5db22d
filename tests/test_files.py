"""Files are complete or not there, also if the writer is killed."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aplsmear.files import give_back, new_array, rows_of, sha256, whole, write_arrays

SRC = str(Path(__file__).parents[1] / "src")


def test_the_file_is_there_only_after_the_block(tmp_path):
    path = tmp_path / "new" / "a.txt"
    with whole(path) as part:
        part.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail_half_way() -> None:
        with whole(path) as part:
            part.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


WRITERS = {
    "views": """
from aplsmear.images.view_store import View, view_writer
with view_writer({"cell": out / "cell.parquet", "smear": out / "smear.parquet"}) as write:
    for n in range(20):
        write({"cell": [View(str(n), 0, b"x" * 1000)], "smear": [View(str(n), 0, b"y" * 1000)]})
        may_die(n)
""",
    "features": """
import numpy as np, pandas as pd
from aplsmear.features.store import write_features
def batches():
    for n in range(20):
        may_die(n)
        yield [np.full((1, 8), n, np.float16), np.full((1, 4), n, np.float16)]
index = pd.DataFrame({"item": [str(n) for n in range(20)], "view": 0})
write_features(out, index, ["a", "b"], batches())
""",
    "table": """
import pandas as pd
from aplsmear.tables import write_table
class Cell:
    def __init__(self, n): self.n = n
    def __str__(self):
        may_die(self.n)
        return str(self.n)
write_table(out / "table.csv", pd.DataFrame({"item": [Cell(n) for n in range(20)]}, dtype=object))
""",
}


def write(kind: str, out: Path, dies_at: int) -> int:
    code = f"""
import os, signal, sys
from pathlib import Path
out = Path(sys.argv[1])
def may_die(n):
    if n == {dies_at}:
        os.kill(os.getpid(), signal.SIGKILL)
{WRITERS[kind]}"""
    environment = os.environ | {"PYTHONPATH": SRC}
    return subprocess.run([sys.executable, "-c", code, str(out)], env=environment, check=False).returncode


@pytest.mark.parametrize("kind", WRITERS)
def test_a_killed_writer_leaves_no_file_that_looks_complete_and_the_next_run_writes_it(kind, tmp_path):
    assert write(kind, tmp_path / "undisturbed", -1) == 0
    assert write(kind, tmp_path / "killed", 10) == -signal.SIGKILL
    assert not [path.name for path in (tmp_path / "killed").iterdir() if path.suffix != ".part"]
    assert write(kind, tmp_path / "killed", -1) == 0
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("undisturbed", "killed")
    ]
    assert contents[0] == contents[1]
    assert not any(name.endswith(".part") for name in contents[0])


def test_a_lock_belongs_to_one_process_until_that_closes_it_or_is_killed(tmp_path):
    path = tmp_path / "new" / "a.lock"
    code = """
import sys, time
from pathlib import Path
from aplsmear.files import hold, new_array
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""
    command = [sys.executable, "-c", code, str(path)]
    first, second = (
        subprocess.Popen(command, env=os.environ | {"PYTHONPATH": SRC}, stdout=subprocess.PIPE)
        for _ in range(2)
    )
    try:
        ready, _, _ = select.select([first.stdout, second.stdout], [], [], 60)
        assert len(ready) == 1
        holder, waiter = (first, second) if ready == [first.stdout] else (second, first)
        assert not select.select([waiter.stdout], [], [], 0.5)[0]
        holder.kill()
        assert waiter.stdout.readline() == b"held\n"
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_a_new_array_reserves_its_space_on_the_disk(tmp_path):
    """Otherwise a full disk kills the process without a message when it writes to the mapped file."""
    new_array(tmp_path / "a.npy", np.float16, (1000, 1000))
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= 2_000_000


@pytest.mark.parametrize("mapped", [False, True])
def test_rows_of_a_mapped_array_are_those_of_an_array_in_memory(mapped, tmp_path):
    values = np.arange(6000, dtype=np.float32).reshape(2000, 3)
    np.save(tmp_path / "a.npy", values)
    array = np.load(tmp_path / "a.npy", mmap_mode="r") if mapped else values
    for shape in [(0,), (1500,), (2, 5, 70)]:
        rows = np.random.default_rng(1).integers(0, 2000, shape)
        found = rows_of(array, rows)
        np.testing.assert_array_equal(found, values[rows])
        assert found.flags.writeable  # a copy


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what belongs to a process")
def test_a_mapped_file_takes_no_memory_after_it_was_read_or_written(tmp_path):
    """A file of 64 MB, all of which is read."""

    def of_files() -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("RssFile"))) / 1000

    array = new_array(tmp_path / "a.npy", np.uint8, (64000, 1000))
    before = of_files()
    array[:] = 7
    assert of_files() > before + 50
    give_back(array)
    assert of_files() < before + 5
    assert (rows_of(array, np.random.default_rng(1).permutation(64000)) == 7).all()
    assert of_files() < before + 5


def test_arrays_are_the_same_bytes_under_every_python(tmp_path):
    """The bytes that `numpy.savez` writes changed between Python 3.11.2 and 3.11.4."""
    path = tmp_path / "a.npz"
    write_arrays(path, {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "name": np.array(["relu"])})
    assert sha256(path) == "8bf46eab2bca7681448b3b03362b789159a1b2a6ff11d8b3a3fceef28201c87e"
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["kernel"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert arrays["name"].tolist() == ["relu"]
