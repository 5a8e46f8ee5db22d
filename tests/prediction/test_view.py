"""The page of one patient shows the scores of a cell on a click, by the keys, and loads nothing."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from aplsmear.cli import app
from aplsmear.errors import UserError
from aplsmear.prediction.view import cells_of, read_cells, view_page
from aplsmear.tables import write_table
from browser import EVIL, browse, needs_browser, read


def cells(patient: str = "P1", count: int = 6) -> pd.DataFrame:
    """Of two smears, the first cell with the least evidence; one cell has a picture of its own."""
    rows = [
        {
            "patient": patient, "smear": str(n % 2), "cell": f"c{n}", "image": f"wsi/{n % 2}.jpg",
            "y0": 20 * n, "x0": 30 * n, "y1": 20 * n + 40, "x1": 30 * n + 40,
            "score_blast": n / 10, "evidence_apl_aml": 0.1 * n - 0.25,
        }
        for n in range(count)
    ]  # fmt: skip
    rows[-1] |= {"smear": "", "image": "wsi/alone.jpg", "y0": 0, "x0": 0, "y1": 60, "x1": 60}
    return pd.DataFrame(rows)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    random = np.random.default_rng(1)
    for name, (height, width) in {"0": (240, 320), "1": (240, 320), "alone": (60, 60)}.items():
        path = tmp_path / "data" / "wsi" / f"{name}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (height, width, 3)).astype(np.uint8)).save(path)
    return tmp_path / "data"


def content(page: str) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL).group(1))


def test_the_page_has_all_cells_with_their_numbers_and_no_address(root: Path) -> None:
    page = view_page(cells(EVIL), root, "apl_aml", "apl")
    shown = content(page)
    assert [each["name"] for each in shown["fields"]] == ["0.jpg", "1.jpg"]
    assert sorted(each["name"] for each in shown["cells"]) == [f"c{n}" for n in range(6)]
    assert [each["field"] for each in shown["cells"] if each["name"] == "c5"] == [-1]
    assert shown["columns"] == ["evidence apl_aml", "score blast"]
    assert EVIL not in page
    tags = read(page).tags
    assert [name for name, _ in tags if name == "script"] == ["script"] * 2
    assert not [value for _, each in tags for name, value in each.items() if name in ("src", "href")]
    assert "https://" not in page


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_a_click_on_a_cell_shows_its_scores_and_keys_go_through_the_cells(root, tmp_path, width) -> None:
    (tmp_path / "view.html").write_text(view_page(cells(), root, "apl_aml", "apl"), encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="view.html" style="width:{width}px;height:900px;border:0"></iframe>
        <script>document.querySelector("iframe").onload = event => {{
          const window = event.target.contentWindow, page = event.target.contentDocument;
          const scores = () => [...page.getElementById("scores").children].map(one => one.textContent);
          const press = key => page.body.dispatchEvent(
            new window.KeyboardEvent("keydown", {{key, bubbles: true}}));
          const near = () => page.getElementById("picture").classList.contains("near");
          const seen = {{width: page.documentElement.scrollWidth, first: scores()}};
          page.querySelectorAll("#list button")[2].click();
          seen.clicked = scores();
          press("ArrowRight"); seen.next = scores();
          press("Enter"); seen.near = near();
          press("Escape"); seen.far = near();
          page.querySelector("#picture rect").dispatchEvent(new window.MouseEvent("click"));
          seen.box = scores();
          seen.asked = window.performance.getEntriesByType("resource").filter(
            one => !one.name.startsWith("data:")).length;
          document.body.textContent = JSON.stringify(seen);
        }};</script></body>""",
        encoding="utf-8",
    )
    offline = ["--host-resolver-rules=MAP * ~NOTFOUND", "--proxy-server=127.0.0.1:9"]
    shown = ["--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri()]
    seen = json.loads(re.search(r"\{.*\}", browse(tmp_path, *offline, *shown)).group())
    assert seen["first"] == ["cell c5", "evidence apl_aml: +0.250", "score blast: 0.500"]
    assert seen["clicked"] == ["cell c3", "evidence apl_aml: +0.050", "score blast: 0.300"]
    assert seen["next"][0] == "cell c2"
    assert (seen["near"], seen["far"]) == (True, False)
    assert seen["box"][0] in ("cell c0", "cell c2", "cell c4")
    assert seen["asked"] == 0
    assert seen["width"] <= width


def test_a_patient_who_is_not_there_is_named_and_a_table_without_evidence_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no patient P2.*such as P1"):
        cells_of(cells(), "P2")
    write_table(tmp_path / "cells.csv", cells().drop(columns="evidence_apl_aml"))
    with pytest.raises(UserError, match="no column evidence_ENSEMBLE"):
        read_cells(tmp_path / "cells.csv")
    assert CliRunner().invoke(app, ["view", "P1", "--ensemble", str(tmp_path)]).exit_code == 1


def test_under_pseudonyms_the_message_says_how_to_show_a_patient(tmp_path, monkeypatch) -> None:
    demo = (Path(__file__).parents[2] / "profiles" / "demo.yaml").read_text(encoding="utf-8")
    (tmp_path / "params.yaml").write_text(demo.replace("pseudonymise: false", "pseudonymise: true"))
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["view", "P1"])
    assert done.exit_code == 1
    assert "--cells CSV --data DIR" in " ".join(done.output.split())


def test_the_pictures_of_a_large_patient_are_reduced(root: Path, monkeypatch) -> None:
    whole = content(view_page(cells(), root, "apl_aml", "apl"))["fields"][0]["src"]
    monkeypatch.setattr("aplsmear.prediction.view._FIELD_BYTES", 2000)
    monkeypatch.setattr("aplsmear.prediction.view._FIELD_SIDES", (320, 160, 80, 40))
    small = content(view_page(cells(), root, "apl_aml", "apl"))["fields"][0]["src"]
    assert len(small) < 2000 * 4 / 3 + 40 < len(whole)
