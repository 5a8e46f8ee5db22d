"""`dvc plots show` needs no network and puts plots into groups; its templates have diagonals and numbers."""

import json
import re
from pathlib import Path

import pytest
import yaml
from dvc_render.html import HTML
from dvc_render.vega import VegaRenderer

from aplsmear.workspace.compare_page import draw
from aplsmear.workspace.plots_page import plots_page
from browser import browse, needs_browser

ROOT = Path(__file__).parents[2]
CURVE = [{"rev": "main", "x": 0.0, "y": 0.0}, {"rev": "main", "x": 0.4, "y": 1.0}]
CALLS = [
    {"rev": "main", "x": x, "y": y}
    for x, y in (("apl", "apl"), ("apl", "apl"), ("aml", "apl"), ("apl", "aml"))
]


def drawn(template: str, name: str, rows: list[dict]) -> VegaRenderer:
    folder = str(ROOT / ".dvc" / "plots")
    return VegaRenderer(rows, name, template=template, template_dir=folder, x="x", y="y", title="A plot")


@needs_browser
def test_plots_are_drawn_without_a_network_in_groups(tmp_path: Path) -> None:
    page = HTML(plots_page())
    for name in ("tuned/blast/roc.csv", "apl_aml ROC", "tuned/blast/trials.csv", "finetuned/roc.csv"):
        plot = drawn("roc", name, CURVE)
        page.with_scripts(plot.SCRIPTS).with_element(plot.generate_html())
    (tmp_path / "index.html").write_text(page.embed(), encoding="utf-8")
    assert "<script src" not in page.template
    shown = browse(tmp_path, "--virtual-time-budget=20000", "--dump-dom", f"file://{tmp_path}/index.html")
    groups = re.findall(r"<details[^>]*><summary>([^<]*)</summary>", shown)
    assert groups == ["ensemble apl_aml", "finetuned", "task blast"]
    assert shown.count('class="marks"') == 4


@pytest.mark.parametrize("template", ["roc", "calibration"])
def test_a_curve_in_the_unit_square_has_its_diagonal(template: str) -> None:
    specification = drawn(template, "a", CURVE).get_filled_template()
    assert 'stroke-dasharray="4,4"' in draw(specification)


def test_a_confusion_matrix_has_its_numbers_and_the_positive_class_in_the_same_corner() -> None:
    svg = draw(drawn("confusion_numbers", "a", CALLS).get_filled_template())
    numbers = [part.split("<")[0] for part in svg.split('font-size="20px"')[1:]]
    assert sorted(number.split(">")[1] for number in numbers) == ["0", "1", "1", "2"]
    assert svg.index(">apl</text>") < svg.index(">aml</text>")


def test_every_template_that_dvc_yaml_names_exists() -> None:
    text = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    own = {path.stem for path in (ROOT / ".dvc" / "plots").glob("*.json")}
    named = {line.split(":")[1].strip() for line in text.splitlines() if "template:" in line}
    assert named - own <= {"simple", "linear"}
    assert own <= named
    assert all(json.loads(path.read_text()) for path in (ROOT / ".dvc" / "plots").glob("*.json"))
    assert yaml.safe_load(text)
