"""What happens when commands are killed, and when disks, memory and servers fail.

Usage: python benchmarks/faults.py [--kills N] [--seed S] [--keep DIR]

In a clone with a tiny data set, N commands are killed with all their children at a random moment: `dvc repro`
in every stage and from nothing, `dvc exp run` in the workspace and with `--temp`, and `aplsmear predict`. A
file that git tracks has uncommitted changes all the time. After each kill the same command is given again, at
once. Where it refuses and names `aplsmear mend`, this is called, and then the same command again.

Then all files except those of DVC and git must have the bytes of a run that was not disturbed, dvc.lock
included; MLflow's database and the study must open; git must be on its branch; nothing must be left to clean
up. Where something is left that no message has named, `aplsmear mend` is called too, and counted apart.

Then come the cases of benchmarks/surroundings.py: full disks, other users, flipped bits, servers that stop.

Results go to benchmarks/results/faults.json.
"""

import argparse
import json
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from record import ROOT, commit, machine

from aplsmear.files import write_json
from aplsmear.sources.drawn import draw_data_set

sys.path.insert(0, str(ROOT / "tests"))  # makes small clones, and kills in them

from surroundings import CASES, Case, NotHereError

from clones import clone
from clones import commit as commit_all
from kills import Place, forget, kill, timed
from small import make_small

RESULTS = ROOT / "benchmarks" / "results" / "faults.json"
MEMBERS = {"apl_healthy": ["blast"], "apl_aml": ["blast"]}
REPRO = ("dvc", "repro")
EXPERIMENT = ("dvc", "exp", "run", "--name", "killed", "-S", "combine.refits=21")
BESIDE = (*EXPERIMENT, "--temp")
SHARE = {"experiment": 0.14, "experiment beside": 0.06, "predict": 0.14, "from nothing": 0.08}  # of the kills
CHANGED = "README.md"  # a tracked file with uncommitted changes
DONE = "conflicts with existing experiment"  # DVC's message if the experiment had ended before the kill
TAIL = 0.7  # seconds after the end of a stage in which DVC may still be killed: it stores the outs
MEND = "aplsmear mend"
COUNTED = ("kills", "identical", "by_mend", "unnamed")


@dataclass
class Count:
    """The results of the kills of one kind."""

    kills: int = 0
    identical: int = 0  # in the end
    by_mend: int = 0  # of these, by the command that the message named
    unnamed: int = 0  # of these, by the same command, though no message named it
    notes: list[str] = field(default_factory=list)


@dataclass
class Bench:
    """A clone in which everything has run once, undisturbed."""

    place: Place
    new: Path  # patients for `aplsmear predict`
    spare: Path  # a copy of the clone
    random: np.random.Generator
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage and command
    wanted: dict[str, dict[str, str]] = field(default_factory=dict)  # files after each command
    counts: dict[str, Count] = field(default_factory=dict)

    @property
    def predict(self) -> tuple[str, ...]:
        """The command `aplsmear predict`."""
        here = ("--ensemble", "ensembles/apl_aml", "--data", str(self.new), "--overwrite")
        return ("aplsmear", "predict", *here, "--out", "new.csv", "--report", "new.html")


def make_bench(folder: Path, seed: int) -> Bench:
    """Run everything once, undisturbed; or read what an earlier run of this benchmark left in the folder."""
    place, spare, known = Place(folder / "clone", folder / "outside"), folder / "spare", folder / "known.json"
    bench = Bench(place, folder / "new", spare, np.random.Generator(np.random.Philox(seed)))
    if known.is_file():
        kept = json.loads(known.read_text(encoding="utf-8"))
        bench.seconds, bench.wanted = kept["seconds"], kept["wanted"]
        reset(bench)
        return bench
    make_small(clone(place.folder), MEMBERS)
    with (place.folder / ".gitignore").open("a") as file:
        file.write("/new.csv\n/new.html\n")
    draw_data_set(bench.new, 4, 9, size=(240, 320), cells_per_smear=8)
    bench.seconds = timed(place, *REPRO)
    bench.seconds["from nothing"] = bench.seconds.pop("")
    commit_all(place.folder)
    with (place.folder / CHANGED).open("a") as file:
        file.write("Notes.\n")
    shutil.copytree(place.folder, spare, symlinks=True)
    bench.wanted[""] = place.files()
    for name, command in (("predict", bench.predict), ("experiment", EXPERIMENT)):
        bench.seconds[name] = timed(place, *command)[""]
        bench.wanted[name] = place.files() | experiment_in(place)
        put_back(bench)
    made = {"experiment": bench.wanted["experiment"]["experiment"]}
    bench.wanted["experiment beside"] = bench.wanted[""] | made
    bench.seconds["experiment beside"] = bench.seconds["experiment"]
    known.write_text(json.dumps({"seconds": bench.seconds, "wanted": bench.wanted}), encoding="utf-8")
    return bench


def reset(bench: Bench) -> None:
    """Put a fresh copy of the undisturbed run in place of the clone."""
    shutil.rmtree(bench.place.folder, ignore_errors=True)
    shutil.copytree(bench.spare, bench.place.folder, symlinks=True)


def experiment_in(place: Place) -> dict[str, str]:
    """The tree of the experiment's commit, if there is one."""
    refs = place.run("git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    trees = [place.run("git", "rev-parse", f"{ref}^{{tree}}") for ref in refs if ref.endswith("/killed")]
    return {"experiment": " ".join(trees)} if trees else {}


def put_back(bench: Bench) -> None:
    """Undo what a command did since the undisturbed run, and delete DVC's run cache."""
    place = bench.place
    for name in ("new.csv", "new.html"):
        (place.folder / name).unlink(missing_ok=True)
    if experiment_in(place):
        place.run("dvc", "exp", "remove", "killed")
        place.run("git", "checkout", "--quiet", "--force", "main")
        shutil.copy(bench.spare / CHANGED, place.folder)
        place.run("dvc", "checkout", "--quiet", "--force")
    shutil.rmtree(place.folder / ".dvc/cache/runs", ignore_errors=True)


def wipe(place: Place) -> None:
    """Delete all outs, dvc.lock and the cache, as if nothing had ever run here."""
    place.run("git", "rm", "--quiet", "--cached", "--ignore-unmatch", "dvc.lock")
    place.run("git", "commit", "--quiet", "--allow-empty", "-m", "nothing has run")
    place.run("git", "clean", "--quiet", "--force", "-d", "-x", "--exclude=.venv")
    shutil.rmtree(place.folder / ".dvc/cache", ignore_errors=True)


def strike(bench: Bench, kind: str) -> None:
    """Kill once, give the same command again, and count the result.

    Args:
        bench: the clone and the counts.
        kind: a stage, or a key of `SHARE`.
    """
    place, count = bench.place, bench.counts.setdefault(kind, Count())
    others = {"predict": bench.predict, "experiment": EXPERIMENT, "experiment beside": BESIDE}
    command = others.get(kind, REPRO)
    after = "" if kind in SHARE else rf"Running stage '{kind}'"
    span = bench.seconds[kind] + TAIL
    while True:
        if after:
            forget(place, kind)
        elif kind == "from nothing":
            wipe(place)
        seconds = float(bench.random.uniform(0, span))
        running, printed = kill(place, command, seconds, after)
        if running:
            break
        if not re.search(after, printed):
            raise RuntimeError(f"{kind} did not run:\n{printed}")
        put_back(bench)  # it had ended: try again, with an earlier kill
        span = max(span / 2, 1.0)
    count.kills += 1
    note = f"{kind}, {seconds:.2f} s: "
    code, again = place.code(*command)
    code = 0 if DONE in again else code
    unnamed = False
    if code:
        note += f"[again: {again.strip()[-300:]}] "
        unnamed = MEND not in again
        note += f"[mend: {place.run(*MEND.split(), ok=False)}] "
        count.by_mend += not unnamed
        code, again = place.code(*command)
        code = 0 if DONE in again else code
    if left := place.leftovers():
        unnamed = True
        note += f"[left: {left}] [mend: {place.run(*MEND.split(), ok=False)}] "
    count.unnamed += unnamed
    found = place.files() | experiment_in(place)
    wanted = bench.wanted.get(kind, bench.wanted[""])
    differ = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    wrong = [*differ, *place.leftovers(), *place.unreadable(), *([again[-2000:]] if code else [])]
    count.identical += not wrong
    if wrong or "[" in note:
        count.notes.append(f"{note}{f'WRONG: {wrong}' if wrong else 'then identical'}")
        print(count.notes[-1], file=sys.stderr, flush=True)
    if wrong or kind == "from nothing":
        reset(bench)
    else:
        put_back(bench)


def plan(bench: Bench, kills: int) -> list[str]:
    """The kind of each kill, in random order; each stage gets as many as the others."""
    chosen = [kind for kind, share in SHARE.items() for _ in range(round(share * kills))]
    # The outs of `member_*` are copies of those of `tune`: DVC takes them from its cache.
    stages = sorted(kind for kind in bench.seconds.keys() - SHARE.keys() if not kind.startswith("member_"))
    chosen += [stages[place % len(stages)] for place in range(kills - len(chosen))]
    return [chosen[place] for place in bench.random.permutation(len(chosen))]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=9)
    parser.add_argument("--keep", type=Path, help="a folder to work in; a second run continues in it")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.keep or Path(temporary)
        began = time.monotonic()
        bench = make_bench(folder, asked.seed)
        print(json.dumps(bench.seconds), file=sys.stderr, flush=True)
        done = folder / "done.json"
        if done.is_file():
            kept = json.loads(done.read_text(encoding="utf-8"))
            bench.counts = {kind: Count(**each) for kind, each in kept.items()}
        before = sum(each.kills for each in bench.counts.values())
        for number, kind in list(enumerate(plan(bench, asked.kills), 1))[before:]:
            print(f"{number} of {asked.kills}: {kind}", file=sys.stderr, flush=True)
            strike(bench, kind)
            minutes = round((time.monotonic() - began) / 60, 1)
            told = {"minutes": minutes, "seed": asked.seed, "machine": machine(), "commit": commit()}
            write_json(RESULTS, summary(bench) | told)
            done.write_text(json.dumps({kind: asdict(each) for kind, each in bench.counts.items()}))
        whole = json.loads(RESULTS.read_text(encoding="utf-8")) | {
            "surroundings": surroundings(bench, folder)
        }
    write_json(RESULTS, whole)
    print(table(bench))
    for name, seen in whole["surroundings"].items():
        print(f"{name}\n    {seen}")


def surroundings(bench: Bench, folder: Path) -> dict[str, str]:
    """The result of each case."""
    found = {}
    for happens in CASES:
        name = str(happens.__doc__)
        print(name, file=sys.stderr, flush=True)
        place = folder / "case"
        place.mkdir()
        try:
            told = happens(Case(bench.spare, bench.wanted[""], place, bench.new))
            found[name] = told.replace(str(folder), "DIR")
        except NotHereError as error:
            found[name] = f"not seen: {error}"
        shutil.rmtree(place)
    return found


def summary(bench: Bench) -> dict[str, Any]:
    totals = {name: sum(getattr(each, name) for each in bench.counts.values()) for name in COUNTED}
    by_kind = {
        kind: {name: getattr(each, name) for name in COUNTED} for kind, each in sorted(bench.counts.items())
    }
    return totals | {"litter_bytes": bench.place.litter(), "by_kind": by_kind}


def table(bench: Bench) -> str:
    whole = summary(bench)
    rows = whole["by_kind"] | {"all": {name: whole[name] for name in COUNTED}}
    lines = [f"{'killed in':<28}" + "".join(f"{name:>11}" for name in COUNTED)]
    lines += [f"{kind:<28}" + "".join(f"{row[name]:>11}" for name in COUNTED) for kind, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
