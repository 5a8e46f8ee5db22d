"""Experiments side by side: everything that differs, on one page that loads nothing."""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from aplsmear.workspace.compare_page import Compared, draw, page
from browser import EVIL, browse, needs_browser, read
from clones import commit, run

BARS = {
    "$schema": "https://vega.github.io/schema/vega-lite/v5.json",
    "data": {"values": [{"x": x, "rev": rev} for x in (1, 2) for rev in ("main", EVIL)]},
    "mark": {"type": "point", "clip": True},
    "encoding": {"x": {"field": "x", "type": "quantitative"}, "color": {"field": "rev", "type": "nominal"}},
}
PNG = b"\x89PNG\r\n"


def compared(**changed) -> Compared:
    held = {
        "revisions": ["main", "more", EVIL],
        "metrics": {
            "tuned/blast/metrics.json": {"auroc.value": [0.7, 0.65, None]},
            "ensembles/apl_aml/metrics.json": {
                "auroc.value": [0.9, 0.925, 0.9],
                "auroc.low": [0.8, 0.81, 0.8],
                "auroc.high": [0.95, 0.97, 0.95],
                "brier": [0.125, 0.125, 0.115],
                "n_patients": [40, 40, 40],
            },
        },
        "params": {"params.yaml": {"tune.trials": [12, 24, 12], "seed": [1, 1, 1], EVIL: [[1], None, EVIL]}},
        "plots": {"ROC": BARS, EVIL: BARS},
        "pictures": {"finetuned/explanations/a.png": {"main": PNG, EVIL: PNG}},
    }
    return Compared(**held | changed)


@pytest.fixture(scope="module")
def html() -> str:
    return page(compared())


def test_the_auroc_comes_first_with_its_interval_and_its_difference(html: str) -> None:
    text = " ".join(read(html).texts)
    order = [
        "AUROC",
        "ensembles/apl_aml",
        *("0.9", "0.800 to 0.950", "0.925", "0.810 to 0.970", "+0.025"),
        *("tuned/blast", "0.7", "0.65", "-0.05"),
        "Parameters that differ",
        *("tune.trials", "12", "24", "12"),
        "Other numbers that differ",
        *("ensembles/apl_aml brier", "-0.01"),
        "1 more are the same",
        "Plots",
        "Pictures",
    ]
    place = 0
    for word in order:
        assert word in text[place:], word
        place = text.index(word, place) + len(word)
    assert "seed" not in text


def test_better_is_green_whichever_way_the_number_goes() -> None:
    """A lower Brier score and a slope nearer to 1 are better; a number of patients is neither."""
    numbers = {"brier": [0.2, 0.1], "auroc.value": [0.8, 0.7], "calibration_slope": [1.4, 0.9], "n": [3, 4]}
    html = page(compared(revisions=["a", "b"], metrics={"m/metrics.json": numbers}, params={}, plots={}))
    shown = dict(re.findall(r'<th scope="row">m ?(\w*)</th>.*?<small( class="\w+")?>[+-]', html))
    assert shown == {
        "": ' class="worse"', "brier": ' class="better"', "calibration_slope": ' class="better"', "n": ""
    }  # fmt: skip


def test_numbers_of_different_tasks_are_not_subtracted() -> None:
    numbers = {"task": ["blast", "faggot", "blast"], "auroc.value": [0.7, 0.9, 0.75]}
    html = page(compared(metrics={"finetuned/metrics.json": numbers}, params={}, plots={}))
    assert "+0.2" not in html
    assert "+0.05" in html
    assert "<small>faggot</small>" in html


def test_the_page_loads_nothing_and_escapes_all_text(html: str) -> None:
    reader = read(html)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert not any(
        key in ("href", "xlink:href") or key.startswith("on") for _, each in reader.tags for key in each
    )
    assert all(each.get("src", "data:").startswith("data:") for _, each in reader.tags)
    assert reader.texts.count(EVIL) >= 6  # columns, parameter, its value, captions
    assert not re.search(r"url\(|@import|://", html)


def test_equal_values_are_counted_and_different_ones_are_listed() -> None:
    same = compared(
        revisions=["a", "b"],
        metrics={"m.json": {"x": [1, 1.00001], "y": [2, None]}},
        params={"params.yaml": {"seed": [1, 1]}},
        plots={},
        pictures={},
    )
    text = " ".join(read(page(same)).texts)
    assert "All are the same" in text
    assert "1 more are the same" in text  # x, in the digits that are shown
    assert "Plots" not in text
    assert "m.json" not in text


def drawings(html: str) -> list[str]:
    """The SVG pictures on a page."""
    found = re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    return [base64.b64decode(each).decode() for each in found]


def test_plots_are_pictures_with_all_names_in_them_that_load_nothing(html: str) -> None:
    drawn = drawings(html)
    assert len(drawn) == 2
    for svg in drawn:
        names = set(re.findall(r"<(\w+)", svg))
        assert names <= {"svg", "style", "g", "rect", "path", "line", "text", "defs", "clipPath", "title"}
        assert "&lt;script&gt;" in svg
        assert not re.search(r"url\((?!#)|@import|href|https?://(?!www\.w3\.org)", svg)
    with pytest.raises(ValueError, match=r"(?i)not allowed|denied|permi"):
        draw(BARS | {"data": {"url": "http://127.0.0.1:9/data.csv"}})


# --- through dvc --------------------------------------------------------------------------------------

MAKE = """
import json, yaml, pathlib
from PIL import Image
n = yaml.safe_load(open("params.yaml"))["n"]
pathlib.Path("shots").mkdir(exist_ok=True)
json.dump({"auroc": {"value": n / 10}}, open("metrics.json", "w"))
open("roc.csv", "w").write("fpr,tpr\\n0,0\\n0.2,%g\\n1,1\\n" % (n / 10))
Image.new("RGB", (8, 8), (n, 0, 0)).save("shots/cell.png")
"""
PIPELINE = """
stages:
  make:
    cmd: python make.py
    params: [n]
    deps: [make.py]
    outs: [shots]
    metrics: [metrics.json]
    plots: [roc.csv]
plots:
  - the ROC: {template: simple, x: fpr, y: {roc.csv: tpr}}
  - shots
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One commit and two experiments."""
    folder = tmp_path_factory.mktemp("compare") / "a clone"
    folder.mkdir()
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "git", "config", "user.name", "Test")
    run(folder, "git", "config", "user.email", "test@localhost")
    run(folder, "dvc", "init", "--quiet")
    (folder / "make.py").write_text(MAKE, encoding="utf-8")
    (folder / "dvc.yaml").write_text(PIPELINE, encoding="utf-8")
    (folder / "params.yaml").write_text("n: 5\n", encoding="utf-8")
    run(folder, "dvc", "repro", "--quiet")
    commit(folder)
    for name, n in (("better", 8), ("worse", 3)):
        run(folder, "dvc", "exp", "run", "--quiet", "--name", name, "-S", f"n={n}")
    return folder


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aplsmear.cli", "compare", *words]
    code = {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    return subprocess.run(
        command, cwd=folder, env=os.environ | code, capture_output=True, text=True, check=False
    )


def test_the_command_compares_commits_and_experiments(workspace: Path) -> None:
    done = compare(workspace, "main", "better", "worse", "--out", "pages/of three.html")
    assert done.returncode == 0, done.stderr
    assert "pages/of three.html is written" in done.stdout
    html = (workspace / "pages" / "of three.html").read_text(encoding="utf-8")
    text = " ".join(read(html).texts)
    for word in ("main / better / worse", "+0.3", "-0.2", "the ROC", "shots"):
        assert word in text, word
    assert html.count("data:image/png;base64,") == 3
    svg = drawings(html)[0]
    assert all(f">{name}</text>" in svg for name in ("main", "better", "worse"))


def test_a_workspace_without_a_difference_has_a_page_too(workspace: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(workspace), "other")
    run(tmp_path / "other", "dvc", "repro", "--quiet")
    done = compare(tmp_path / "other", "main", "workspace")
    assert done.returncode == 0, done.stderr
    html = (tmp_path / "other" / "compare.html").read_text(encoding="utf-8")
    assert "All are the same." in " ".join(read(html).texts)


def test_the_error_of_an_unknown_name_lists_the_experiments(workspace: Path) -> None:
    done = compare(workspace, "main", "bettr", "nought")
    assert (done.returncode, done.stdout) == (1, "")
    asked = "is called bettr (did you mean 'better'?) or nought."
    assert f"no experiment, branch, tag or commit {asked}" in done.stderr
    assert "better, worse" in done.stderr
    assert not (workspace / "compare.html").exists()


def test_the_error_of_missing_results_names_the_revision(workspace: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(workspace), "other")
    done = compare(tmp_path / "other", "main", "HEAD")
    assert done.returncode == 1
    assert "the results of main are not here" in done.stderr


def test_results_that_no_commit_has_are_on_the_page(workspace: Path, tmp_path: Path) -> None:
    """The first run was not committed; the user compares its commit with an experiment."""
    run(tmp_path, "cp", "-r", str(workspace), "other")
    other = tmp_path / "other"
    run(other, "git", "checkout", "--quiet", "--force", "main")
    run(other, "git", "rm", "--quiet", "dvc.lock")
    commit(other)
    run(other, "dvc", "exp", "run", "--quiet", "--name", "best", "-S", "n=9")
    run(other, "git", "restore", "params.yaml")
    run(other, "dvc", "repro", "--quiet")
    done = compare(other, "main", "best")
    assert done.returncode == 0, done.stderr
    assert "`git commit --all" in done.stdout
    assert "<h1>main / best / workspace</h1>" in (other / "compare.html").read_text(encoding="utf-8")


@pytest.mark.pipeline
def test_every_plot_of_the_pipeline_is_on_the_page(small: Path, tmp_path: Path) -> None:
    assert compare(small, "HEAD", "workspace", "--out", str(tmp_path / "compare.html")).returncode == 0
    html = (tmp_path / "compare.html").read_text(encoding="utf-8")
    shown = json.loads(run(small, "dvc", "plots", "show", "--json"))["data"]
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    pictures = {name for name in shown if name.endswith(".png")}  # under these, a caption a revision
    assert pictures
    assert {name for name, drawn in shown.items() if drawn} - pictures == set(captions) - {
        "HEAD",
        "workspace",
    }
    assert all(name in html for name in pictures)
    for name in ("ROC", "precision-recall", "calibration", "confusion"):
        assert f"apl_aml {name}" in captions


# --- in a browser -------------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desktop_without_a_network(tmp_path: Path, width: int) -> None:
    Image.new("RGB", (800, 40)).save(tmp_path / "wide.png")
    wide = (tmp_path / "wide.png").read_bytes()
    many = compared(
        revisions=["main", "an-experiment-with-a-long-name", "another-experiment-with-a-long-name"],
        plots={"ROC": BARS, "wide": BARS | {"width": 900}},
        pictures={"a": {"main": wide, "an-experiment-with-a-long-name": wide}},
    )
    (tmp_path / "compare.html").write_text(page(many), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="compare.html" style="width:{width}px;height:900px;border:0"></iframe>
        <script>document.querySelector("iframe").onload = event => {{
          const page = event.target.contentDocument, root = page.documentElement;
          const sizes = [...page.querySelectorAll("svg, img")].map(one => one.getBoundingClientRect().width);
          document.body.textContent = JSON.stringify({{width: root.scrollWidth, least: Math.min(...sizes),
            cut: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
            drawn: sizes.length, broken: [...page.images].filter(one => !one.naturalWidth).length,
            asked: event.target.contentWindow.performance.getEntriesByType("resource").length}});
        }};</script></body>""",
        encoding="utf-8",
    )
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    shown = ["--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dom = browse(tmp_path, *offline, *shown)
    seen = json.loads(re.search(r"\{.*\}", dom).group())
    assert seen["width"] <= width
    assert seen["cut"] == 0
    assert seen["least"] >= 200
    assert (seen["drawn"], seen["broken"]) == (4, 0)
