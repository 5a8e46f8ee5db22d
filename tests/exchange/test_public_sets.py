"""The command in the head of a profile reads a folder of the published layout; tasks find their labels."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from annotated import picture
from aplsmear.cli import app
from aplsmear.data.dataset import read_data_set
from aplsmear.params import read_params
from aplsmear.workspace.profiles import read_profile

PROFILES = Path(__file__).parents[2] / "profiles"
LMU = "BAS EBO EOS KSC LYA LYT MMZ MOB MON MYB MYO NGB NGS PMB PMO"
MARROW = "ABE ART BAS BLA EBO EOS FGC HAC KSC LYI LYT MMZ MON MYB NGB NGS NIF OTH PEB PLM PMO"
MLL23 = (
    "basophil eosinophil hairy_cell lymphocyte lymphocyte_large_granular lymphocyte_neoplastic "
    "lymphocyte_reactive metamyelocyte monocyte myeloblast myelocyte neutrophil_band neutrophil_segmented "
    "normoblast plasma_cell promyelocyte promyelocyte_atypical smudge_cell"
)
PBC = {
    "basophil": ["BA"], "eosinophil": ["EO"], "erythroblast": ["ERB"], "ig": ["IG", "MMY", "MY", "PMY"],
    "lymphocyte": ["LY"], "monocyte": ["MO"], "neutrophil": ["BNE", "NEUTROPHIL", "SNE"],
    "platelet": ["PLATELET"],
}  # fmt: skip
RAABIN = ("Basophil", "Eosinophil", "Lymphocyte", "Monocyte", "Neutrophil")
GENES = ("CBFB_MYH11", "NPM1", "PML_RARA", "RUNX1_RUNX1T1", "control")
LAYOUTS = {  # profile -> the folder as published, its pictures, labels of cells that must be found
    "aml_lmu": (
        "PKG - AML-Cytomorphology_LMU",
        [f"AML-Cytomorphology/{one}/{one}_0001.tiff" for one in LMU.split()],
        "Promyelocyte",
    ),
    "marrow_mll": (
        "BM_cytomorphology_data",
        [f"{one}/{'' if one in ('ABE', 'FGC') else '0001-1000/'}{one}_00001.jpg" for one in MARROW.split()],
        "Proerythroblast",
    ),
    "mll23": ("MLL23", [f"{one}/{n:05}.TIF" for n, one in enumerate(MLL23.split())], "Atypical promyelocyte"),
    "pbc": (
        "PBC_dataset_normal_DIB",
        [f"{folder}/{one}_1001{n}.jpg" for folder, names in PBC.items() for n, one in enumerate(names)],
        "Band neutrophil",
    ),
    "raabin": (
        "Raabin-WBC",
        [
            f"{part}/{one}/20190526_1{n}_0.jpg"
            for part, classes in (("Train", RAABIN), ("TestA", RAABIN), ("TestB", RAABIN[2::2]))
            for n, one in enumerate(classes)
        ],
        "Eosinophil",
    ),
    "aml_mll": (
        "PKG - AML-Cytomorphology_MLL_Helmholtz_v1",
        [f"data/{gene}/{gene[:2]}{n}X/image_{m}.tif" for gene in GENES for n in (1, 2) for m in (0, 1)],
        "",
    ),
}  # fmt: skip
OTHERS = {  # profile -> files of the published folder that are no pictures, and what is in them
    "aml_lmu": {"annotations.dat": "BAS/BAS_0001.tiff BAS nan nan\n"},
    "aml_mll": {"data/metadata.csv": "patient_id,age,bag_label,pb_total\nCB1X,50,CBFB_MYH11,100\n"},
    "mll23": {
        "__MACOSX/basophil/._00000.TIF": "resources",
        "labels_MLL23.csv": "Labels, count\nbasophil,616\n",
    },
    "pbc": {"neutrophil/.DS_169665.jpg": "Bud1"},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_command_of_a_profile_reads_the_published_layout(name, tmp_path, monkeypatch):
    folder, names, label = LAYOUTS[name]
    for seed, each in enumerate(names):
        picture(tmp_path / folder / each, seed, (40, 40))
    for each, text in OTHERS.get(name, {}).items():
        path = tmp_path / folder / each
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    text = (PROFILES / f"{name}.yaml").read_text(encoding="utf-8")
    assert "layout from its documentation, not run on the real files" in text
    line = re.search(r"aplsmear (import (?:.*\\\n)*.*)", text)[1]
    words = shlex.split(re.sub(r"\\\n#", "", line))
    done = CliRunner().invoke(app, [word.replace("DIR", str(tmp_path / "imported")) for word in words])
    assert done.exit_code == 0, done.output
    assert "Left out" not in done.output
    (tmp_path / "params.yaml").write_text(read_profile(PROFILES, name), encoding="utf-8")
    params = read_params(tmp_path / "params.yaml")
    found = read_data_set(tmp_path / "imported", params.tasks, min_box=8, skip_bad_images=False)
    assert len(found.cells) == len(names)
    assert label == "" or label in set(found.cells["cell_type"])
    if name == "aml_mll":
        patients = found.cells.drop_duplicates("patient")["diagnosis"].value_counts()
        assert patients.to_dict() == {"aml": 6, "apl": 2, "healthy": 2}
