"""The report of an ensemble: complete, offline, escaped, the same bytes every time, readable on a phone."""

import dataclasses
import json
import re
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import pytest
from test_combination import NETWORK, RIDGE, cohort

from aplsmear.ensembles.baselines import Baselines, compare
from aplsmear.ensembles.cell_curve import cell_curve
from aplsmear.ensembles.combination import importance, judge, measure, measure_alarm
from aplsmear.ensembles.run import Inputs, Results
from aplsmear.evaluation.curves import curve_tables
from aplsmear.params import Ensemble
from aplsmear.reports import pages
from aplsmear.reports.ensemble import cards, page
from browser import EVIL, browse, needs_browser, read

PICTURES = {f"cell{n}": b"jpeg%d" % n for n in range(200)}


def findings(candidates=RIDGE, patient: str = "apl000", pictured: bool = True, each: int = 6) -> Results:
    patients, members = cohort(n=each, folds=3, strength=2.0)
    name = {"apl000": patient}
    patients = patients.replace({"patient": name}).sort_values("patient", ignore_index=True)
    members = {task: table.replace({"patient": name}) for task, table in members.items()}
    verdicts = judge(patients, members, candidates, 20, 1)
    label, probability = verdicts.table["label"], verdicts.table["probability"]
    baselines = {"m0 alone": verdicts.logits[:, 0], EVIL: verdicts.logits[:, 1]}
    # Of each patient six cells, half of them with evidence for APL.
    values = np.tile(range(-5, 6, 2), len(patients))
    evidence = pd.DataFrame({"patient": patients["patient"].repeat(6), "evidence_apl_aml": values})
    evidence["cell"] = [f"cell{n}" for n in range(len(evidence))]
    inputs = Inputs(
        name="apl_aml",
        ensemble=Ensemble(positive="apl", negative="aml", members=list(members), weigh_by="m0"),
        levels={},
        everyone=patients,
        patients=patients,
        members=members,
        weighing=members["m0"],
        items={
            "smear": pd.DataFrame({"patient": patients["patient"], "site": "Dresden"}),
            "cell": pd.DataFrame({"patient": [*patients["patient"], "of another ensemble"]}),
        },
        features={},
        heads={},
        scores={},
        md5={"splits/folds.csv": "0123abcd"},
        left_out={"cells_without_box": {"count": 4}, "smears_with_bad_image": {"count": 0}},
    )
    return Results(
        inputs=inputs,
        verdicts=verdicts,
        logits=patients,
        measured=measure(verdicts.table, 100, 1) | {"alarm": measure_alarm(verdicts.table)},
        comparison=compare(patients, probability.to_numpy(), baselines),
        baselines=Baselines({}, None),
        importance=importance(verdicts, 5, 1),
        cells=cell_curve(verdicts, {}, np.array([]), 1, draws=5),
        curves=curve_tables(label, probability, 100, 1),
        evidence=evidence if pictured else evidence[["patient", "cell"]],
        settings={"seed": 1, "combine": {"space": {"C": [0.1, 1.0]}}},
    )


@pytest.fixture(scope="module")
def html() -> str:
    return page(findings(), PICTURES)


def test_the_page_has_every_section_number_and_patient(html) -> None:
    text = " ".join(read(html).texts)
    found = findings()
    for heading in (
        "Cohort and folds",
        "The study in short",
        "Numbers",
        "Curves and calls",
        "Every patient",
        "The most and the least certain",
        "An alarm with a promise",
        "How many cells are enough",
        "What each member contributes",
        "Is the ensemble worth it?",
        "How the members are combined",
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


def test_each_patient_has_the_thresholds_of_the_own_fold(html) -> None:
    verdicts = findings().verdicts
    (rows,) = re.findall(r"<h2>Every patient</h2>(.*?)</section>", html, re.DOTALL)
    assert "balanced point</span>" in rows
    for patient, fold in verdicts.table[["patient", "fold"]].itertuples(index=False):
        (lane,) = re.findall(rf'<span class="who">{patient}</span>\n(.*)', rows)
        for name, threshold in verdicts.combinations[fold].thresholds.items():
            assert f'<u class="{name}" style="left:{100 * threshold:.1f}%"></u>' in lane


def test_no_rate_stands_without_the_other_that_it_is_bought_with(html) -> None:
    keys = re.findall(r'<div class="key"><span>(.*?)</span>', html)
    assert keys == [
        "AUROC",
        *(f"sensitivity / specificity, {name} point" for name in ("balanced", "sensitive")),
    ]


def test_only_patients_have_the_colours_of_the_classes(html) -> None:
    (rows,) = re.findall(r"<h2>What each member contributes</h2>(.*?)</section>", html, re.DOTALL)
    assert set(re.findall(r'class="lane (\w+)"', rows)) == {"neutral"}


def test_the_page_has_no_script_and_loads_only_the_figure_of_other_cohorts(html) -> None:
    reader = read(html)
    names = {name for name, _ in reader.tags}
    assert not names & {"script", "link", "iframe"}
    assert [each["data"] for name, each in reader.tags if name == "object"] == [
        "../../prepared/cohorts/apl_aml.svg"
    ]
    assert not any(key == "href" or key.startswith("on") for _, each in reader.tags for key in each)
    assert all(each.get("src", "data:").startswith("data:") for _, each in reader.tags)
    assert "://" not in html
    assert "url(" not in html
    assert "@import" not in html
    policy = next(each["content"] for _, each in reader.tags if each.get("http-equiv"))
    own = "object-src 'self'; frame-src 'self'"
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; {own}"


def test_a_name_that_a_template_lacks_is_an_error() -> None:
    with pytest.raises(jinja2.UndefinedError, match="positive"):
        pages.render("reports/templates/ensemble.html.j2")


def test_the_page_has_the_same_bytes_every_time_and_no_date(html, tmp_path) -> None:
    pages.write(tmp_path / "report.html", page(findings(), PICTURES))
    assert (tmp_path / "report.html").read_bytes() == html.encode()
    assert re.search(r"20\d\d-\d\d|\d\d:\d\d", html) is None


def test_patient_names_are_escaped() -> None:
    html = page(findings(patient=EVIL), PICTURES)
    reader = read(html)
    assert "script" not in {name for name, _ in reader.tags}
    assert "<script" not in html
    assert EVIL in reader.texts


def test_the_page_can_show_a_network_and_a_member_without_scores() -> None:
    found = findings(NETWORK)
    logits = found.verdicts.logits.copy()
    logits[:, 0] = np.nan
    incomplete = dataclasses.replace(found, verdicts=dataclasses.replace(found.verdicts, logits=logits))
    text = " ".join(read(page(incomplete, PICTURES)).texts)
    assert "no cell or smear" in text
    assert "2 hidden units" in text


def test_a_card_shows_the_cells_that_count_most_for_and_against_the_diagnosis(html) -> None:
    found = findings()
    wanted = [(each["most"], each["least"]) for shown in cards(found).values() for each in shown]
    evidence = found.evidence.set_index("cell")["evidence_apl_aml"]
    for most, least in wanted:
        assert evidence[most].tolist() == [5, 3, 1]
        assert evidence[least].tolist() == [-5, -3, -1]
    shown = [each["alt"] for name, each in read(html).tags if name == "img"]
    assert {f"cell {cell}" for ends in wanted for end in ends for cell in end} == set(shown)
    assert "img" not in {name for name, _ in read(page(findings(pictured=False), PICTURES)).tags}


# --- in a browser -----------------------------------------------------------------------------------


@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_a_phone_and_a_desktop(tmp_path: Path, html: str, width: int) -> None:
    (tmp_path / "report.html").write_text(html, encoding="utf-8")
    # In a frame, because a headless window has a minimum width. The script measures the page in it.
    (tmp_path / "frame.html").write_text(
        f"""<body><iframe src="report.html" style="width:{width}px;height:900px;border:0"></iframe>
        <script>document.querySelector("iframe").onload = event => {{
          const page = event.target.contentDocument, root = page.documentElement;
          const charts = [...page.querySelectorAll("svg")].map(one => one.getBoundingClientRect().width);
          document.body.textContent = JSON.stringify({{width: root.scrollWidth, height: root.scrollHeight,
            cut: [...page.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth).length,
            charts: Math.min(...charts)}});
        }};</script></body>""",
        encoding="utf-8",
    )
    dom = browse(tmp_path, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    seen = json.loads(re.search(r"\{.*\}", dom).group())
    assert seen["width"] <= width
    assert seen["cut"] == 0  # a P-value, say
    assert seen["charts"] >= 250
    assert seen["height"] > 1500


@needs_browser
def test_the_page_shows_the_cohorts_that_were_judged_and_names_the_others(tmp_path: Path, html: str) -> None:
    figure = pages.render("reports/templates/cohorts.svg.j2", cohorts=["dresden", "leipzig"])
    shown = {
        "ensembles/apl_aml/report.html": html,
        "alone/there/report.html": html.replace("prepared/cohorts", "nowhere"),
        "prepared/cohorts/apl_aml.svg": figure,
        "evaluated/dresden/summary.svg": "<svg xmlns='http://www.w3.org/2000/svg'>AUROC 0.9</svg>",
        "frame.html": """<body><iframe src="ensembles/apl_aml/report.html"></iframe>
        <iframe src="alone/there/report.html"></iframe><script>onload = () => {
          const found = [...document.querySelectorAll("iframe")].map(frame => {
            const seen = frame.contentDocument.querySelector("object").contentDocument;
            return seen && [...seen.querySelectorAll("object")].map(
              one => one.contentDocument ? one.contentDocument.documentElement.textContent : one.textContent);
          });
          document.body.textContent = JSON.stringify({found});
        };</script></body>""",
    }
    for name, text in shown.items():
        pages.write(tmp_path / name, text)
    dom = browse(tmp_path, "--virtual-time-budget=3000", "--dump-dom", (tmp_path / "frame.html").as_uri())
    seen = json.loads(re.search(r"\{.*\}", dom).group())
    assert seen["found"] == [["AUROC 0.9", "No numbers yet: dvc repro evaluate@leipzig"], None]


@needs_browser
def test_a_long_list_of_patients_is_printed_whole(tmp_path: Path) -> None:
    """On a screen the list scrolls in its own box; on paper, hidden rows would be lost."""
    pages = {}
    for each in (6, 60):
        (tmp_path / "report.html").write_text(page(findings(each=each), PICTURES), encoding="utf-8")
        pdf = tmp_path / f"{each}.pdf"
        browse(tmp_path, f"--print-to-pdf={pdf}", (tmp_path / "report.html").as_uri())
        pages[each] = len(re.findall(rb"/Type /Page\b", pdf.read_bytes()))
    assert pages[60] >= pages[6] + 2
