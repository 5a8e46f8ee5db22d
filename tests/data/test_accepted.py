"""Every data set that is accepted runs through `split` and `augment`; every other one gives a report."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import joblib
import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from aplsmear.data.dataset import DataSetError, read_data_set
from aplsmear.errors import UserError
from aplsmear.evaluation.splits import make_folds
from aplsmear.images.views import view_multipliers
from aplsmear.params import Sides, read_params
from made_views import all_views

T = TypeVar("T")
PARAMS = read_params(Path(__file__).parents[2] / "profiles" / "demo.yaml")
SETTINGS = PARAMS.augment.model_copy(update={"size": Sides(cell=16, smear=24), "views": 1})
SIDES = (40, 50)  # px, height and width of the images

labels = st.sampled_from(
    ["{'healthy'}", "{'aml', 'm3'}", "{'aml', 'm2'}", "{'AML', 'M4eo'}", "{'aml', '50x.png'}", "{'al'}", ""]
)
edges = st.integers(-12, 62)
boxes = st.one_of(
    st.tuples(edges, edges, edges, edges).map(lambda box: str(list(box))),
    st.tuples(st.integers(0, 25), st.integers(0, 25)).map(lambda at: str([*at, at[0] + 12, at[1] + 12])),
    st.sampled_from(["", "[0, 0, 1, 1]", "[0,0,40,50]", "nonsense"]),
)
smears = st.fixed_dictionaries(
    {
        "label": labels,
        "patient": st.sampled_from(["A", "B", "C", "ä ö", "5"]),
        "mode": st.sampled_from(["RGB", "L", "RGBA", "P"]),
    }
)
cells = st.fixed_dictionaries(
    {
        "wsi": st.integers(1, 4),
        "cellType": st.sampled_from(
            ["", "{'Myeloblast'}", "{'Promyelocyte', 'Bilobed'}", "{'Unknown cell'}"]
        ),
        "specialCharacteristics": st.sampled_from(["", "{'None'}", "{'Auer rods', 'Faggot cell'}"]),
        "bbox": boxes,
    }
)


def write(folder: Path, smear_rows: list[dict], cell_rows: list[dict]) -> None:
    (folder / "wsi").mkdir()
    random = np.random.default_rng(0)
    for number, row in enumerate(smear_rows, 1):
        picture = Image.fromarray(random.integers(0, 255, (*SIDES, 3), dtype=np.uint8))
        picture.convert(row["mode"]).save(folder / "wsi" / f"{number}.png")
    table = pd.DataFrame(smear_rows).drop(columns="mode")
    numbers = range(1, len(table) + 1)
    table.assign(id=numbers, imgName=[f"{n}.png" for n in numbers]).to_csv(folder / "wsi.csv", index=False)
    columns = ["id", "wsi", "cellType", "specialCharacteristics", "bbox"]
    frame = pd.DataFrame(cell_rows, columns=columns[1:])
    frame.assign(id=range(1, len(frame) + 1))[columns].to_csv(folder / "labeled_cells.csv", index=False)


def outcome(action: Callable[[], T], refusal: type[UserError]) -> T | UserError:
    """The result of the action, or its refusal; any other exception fails the test."""
    try:
        return action()
    except refusal as error:
        return error


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(smears, min_size=1, max_size=4), st.lists(cells, max_size=6))
def test_a_data_set_is_accepted_and_can_be_used_or_has_its_problems_reported(
    smear_rows: list[dict], cell_rows: list[dict]
) -> None:
    with tempfile.TemporaryDirectory() as name, joblib.parallel_config(backend="sequential"):
        folder = Path(name)
        write(folder, smear_rows, cell_rows)
        found = outcome(lambda: read_data_set(folder, {}, min_box=8, skip_bad_images=False), DataSetError)
        if isinstance(found, DataSetError):
            assert found.problems
            return
        folds = outcome(lambda: make_folds(found.smears, 3, seed=1), UserError)
        if isinstance(folds, UserError):
            assert "folds" in str(folds)
        else:
            assert set(folds["patient"]) == set(found.smears["patient"])
        made = list(all_views(folder, found.smears, found.cells, SETTINGS, seed=1))
        assert (
            sum(len(each["smear"]) for each in made)
            == (1 + view_multipliers(found.smears, SETTINGS.extra_views)).sum()
        )
        assert (
            sum(len(each["cell"]) for each in made)
            == (1 + view_multipliers(found.cells, SETTINGS.extra_views)).sum()
        )
