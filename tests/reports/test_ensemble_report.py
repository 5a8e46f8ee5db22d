"""The page for people: whole, offline, escaped, the same bytes every time, readable on a phone."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_combination import NETWORK, RIDGE, cohort

from aplsmear.ensembles.baselines import baselines_of, compare, pooled_baseline, pooled_features
from aplsmear.ensembles.combination import importance, judge, measure
from aplsmear.evaluation import curves
from aplsmear.features.store import Features
from aplsmear.params import Ensemble
from aplsmear.reports.ensemble import Findings, page, tag, wanted_cells, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
EVIL = '<script>alert("x")</script>&'


def findings(candidates=RIDGE, patient: str = "apl000", pictured: bool = True, each: int = 6) -> Findings:
    patients, members = cohort(n=each, folds=3, strength=2.0)
    name = {"apl000": patient}
    patients = patients.replace({"patient": name}).sort_values("patient", ignore_index=True)
    members = {task: table.replace({"patient": name}) for task, table in members.items()}
    verdicts = judge(patients, members, candidates, 20, 1)
    label, probability = verdicts.table["label"], verdicts.table["probability"]
    baselines = {"m0 alone": verdicts.logits[:, 0], EVIL: verdicts.logits[:, 1]}
    return Findings(
        name="apl_aml",
        ensemble=Ensemble(positive="apl", negative="aml", members=list(members), weigh_by="m0"),
        verdicts=verdicts,
        members=members,
        measured=measure(verdicts, 100, 1),
        comparison=compare(patients, probability.to_numpy(), baselines),
        importance=importance(verdicts, 5, 1),
        roc=curves.roc_curve_table(label, probability),
        band=curves.roc_band_table(label, probability, 100, 1),
        precision_recall=curves.precision_recall_table(label, probability),
        calibration=curves.calibration_table(label, probability),
        pictures={f"cell{n}": b"jpeg%d" % n for n in range(200)} if pictured else {},
        pictured_by="m1" if pictured else "",
        inputs={"splits/folds.csv": "0123abcd"},
        settings={"seed": 1, "combine": {"space": {"C": [0.1, 1.0]}}},
    )


class Reader(HTMLParser):
    """Tags with their attributes, texts, and whether every element is closed."""

    VOID = ("meta", "img")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, name, attributes) -> None:
        self.tags.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name) -> None:
        assert self.open.pop() == name

    def handle_data(self, text) -> None:
        self.texts.append(text)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def html() -> str:
    return page(findings())


def test_the_page_says_what_was_found(html) -> None:
    text = " ".join(read(html).texts)
    found = findings()
    for heading in (
        "Cohort and folds",
        "Numbers",
        "Curves and calls",
        "Every patient",
        "The most and the least certain",
        "What each member contributes",
        "Is the ensemble worth it?",
        "How the verdicts were made",
        "Versions",
        "Limits of use",
    ):
        assert heading in text
    interval = found.measured["auroc"]
    assert f"{interval['low']:.3f} to {interval['high']:.3f}" in text
    for patient in found.verdicts.table["patient"]:
        assert patient in text
    assert "Not a medical device" in text
    assert "0123abcd" in text
    assert "combine.space.C" in text
    assert "nan" not in text.lower().split()


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(html) -> None:
    reader = read(html)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object"}
    assert not any(key == "href" or key.startswith("on") for _, each in reader.tags for key in each)
    assert all(each.get("src", "data:").startswith("data:") for _, each in reader.tags)
    assert "http" not in html
    assert "url(" not in html
    assert "@import" not in html


def test_the_page_is_the_same_bytes_every_time_and_holds_no_date(html, tmp_path) -> None:
    write_page(tmp_path / "report.html", findings())
    assert (tmp_path / "report.html").read_bytes() == html.encode()
    assert re.search(r"20\d\d-\d\d|\d\d:\d\d", html) is None


def test_names_are_escaped() -> None:
    html = page(findings(patient=EVIL))
    reader = read(html)
    assert "script" not in {name for name, _ in reader.tags}
    assert "<script" not in html
    assert EVIL in reader.texts


def test_a_network_and_a_gap_have_a_page_too() -> None:
    found = findings(NETWORK)
    said = found.verdicts.logits.copy()
    said[:, 0] = np.nan
    holey = dataclasses.replace(found, verdicts=dataclasses.replace(found.verdicts, logits=said))
    text = " ".join(read(page(holey)).texts)
    assert "no cell or smear" in text
    assert "3 hidden units" in text


def test_a_card_shows_the_cells_that_speak_most_for_and_against(html) -> None:
    found = findings()
    wanted = wanted_cells(found.verdicts, "m1", found.members["m1"])
    for most, least in wanted.values():
        assert len(most) == len(least) == len({*most, *least}) / 2 == 3  # of six cells
    low = dataclasses.replace(found.verdicts, logits=-found.verdicts.logits)  # high scores speak against it
    assert wanted_cells(low, "m1", found.members["m1"]) == {
        patient: (least, most) for patient, (most, least) in wanted.items()
    }
    shown = [each["alt"] for name, each in read(html).tags if name == "img"]
    assert {f"cell {cell}" for ends in wanted.values() for end in ends for cell in end} == set(shown)
    assert "img" not in {name for name, _ in read(page(findings(pictured=False))).tags}


def test_an_element_keeps_texts_and_elements_in_their_order() -> None:
    element = tag("p", "a", tag("b", "c"), "d", "e", class_="x", text_anchor="end")
    assert "".join(element.itertext()) == "acde"
    assert element.attrib == {"class": "x", "text-anchor": "end"}


# --- comparison ------------------------------------------------------------------------------------


def test_the_ensemble_is_compared_with_members_and_plain_baselines() -> None:
    patients, members = cohort(n=12, folds=3, strength=1.5)
    baselines = baselines_of(patients, members, ["m1", "not a member"], 1)
    assert list(baselines) == ["m0 alone", "m1 alone", "m2 alone", "share of m1 cells", "plain average"]
    table = compare(
        patients, judge(patients, members, RIDGE, 0, 1).table["probability"].to_numpy(), baselines
    )
    assert table["against"].tolist() == ["the ensemble", *baselines]
    assert table.loc[0, ["difference", "p", "p_holm"]].tolist() == [0, 1, 1]
    assert np.isfinite(table.drop(columns="against").to_numpy(dtype=float)).all()
    assert (table["p_holm"] >= table["p"]).all()
    np.testing.assert_allclose(table["auroc"], table["auroc"][0] - table["difference"])


def test_holm_by_hand() -> None:
    label = pd.DataFrame({"label": [0] * 10 + [1] * 10})
    ensemble = label["label"].to_numpy() + np.linspace(0, 0.5, 20)
    random = np.random.default_rng(0)
    table = compare(label, ensemble, {name: random.random(20) for name in "ab"})
    small, large = sorted(table["p"][1:])
    assert sorted(table["p_holm"][1:]) == pytest.approx([2 * small, max(2 * small, large)])


def test_pooled_features_by_hand() -> None:
    index = pd.DataFrame({"item": ["a", "a", "b", "c"], "view": [0, 1, 0, 0]})
    layer = Features("net/layer", index, np.float16([[1, 0], [9, 9], [3, 2], [5, 5]]))
    items = pd.DataFrame({"item": ["a", "b", "c"], "patient": ["p", "p", "stranger"]})
    pooled = pooled_features([layer], items, pd.DataFrame({"patient": ["p", "q"]}))
    np.testing.assert_array_equal(pooled["net/layer"], [[2, 1], [np.nan, np.nan]])


def test_the_rival_on_pooled_features_finds_a_signal_and_no_more() -> None:
    patients, _ = cohort(n=15, folds=3)
    random = np.random.default_rng(1)
    noise = random.normal(size=(len(patients), 40))
    signal = noise + 3 * patients["label"].to_numpy()[:, None] * (np.arange(40) < 3)
    signal[0] = np.nan  # a patient without cells
    found = pooled_baseline(patients, {"a": noise, "b": signal})
    assert compare(patients, found, {})["auroc"][0] > 0.9
    turned = patients.assign(label=np.where(patients["fold"] == 1, 1 - patients["label"], patients["label"]))
    there = (patients["fold"] == 1).to_numpy()
    np.testing.assert_array_equal(pooled_baseline(turned, {"a": noise, "b": signal})[there], found[there])


# --- in a browser -----------------------------------------------------------------------------------


needs_browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no browser to look at the page with: `apt-get install chromium` brings one"
)
BARE = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
BARE += ["--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files"]


def browse(folder: Path, *arguments: str) -> str:
    """What a headless browser prints, with nothing of its own but what lies in a folder."""
    command = [CHROMIUM, *BARE, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desktop(tmp_path: Path, html: str, width: int) -> None:
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    # In a frame, since a headless window has a least width; the frame says how far its page reaches.
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
        <script>document.querySelector("iframe").onload = event => {{
          const page = event.target.contentDocument, root = page.documentElement;
          const charts = [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
          document.body.textContent = JSON.stringify({{width: root.scrollWidth, height: root.scrollHeight,
            charts: Math.min(...charts)}});
        }};</script></body>""",
        encoding="utf-8",
    )
    dom = browse(tmp_path, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    seen = json.loads(re.search(r"\{.*\}", dom).group())
    assert seen["width"] <= width
    assert seen["charts"] >= 250
    assert seen["height"] > 1500


@needs_browser
def test_a_long_list_of_patients_is_printed_whole(tmp_path: Path) -> None:
    """On a screen it scrolls in a box of its own; on paper what is cut off would be lost."""
    pages = {}
    for each in (6, 60):
        (tmp_path / "report.html").write_text(page(findings(each=each)), encoding="utf-8")
        pdf = tmp_path / f"{each}.pdf"
        browse(tmp_path, f"--print-to-pdf={pdf}", (tmp_path / "report.html").as_uri())
        pages[each] = len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))
    assert pages[60] >= pages[6] + 2
