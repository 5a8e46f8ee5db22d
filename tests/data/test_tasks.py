"""Which items are positive, which are negative, and which take no part."""

import pandas as pd

from aplsmear.data.tasks import meets, task_labels
from aplsmear.params import Task

CELLS = pd.DataFrame(
    {
        "cell_type": ["Myeloblast", "Promyelocyte", "", "Lymphocyte"],
        "special_characteristics": ["Auer rods|Bilobed", "None", "", "Faggot cell|Auer rods"],
        "diagnosis": ["aml", "apl", "healthy", "apl"],
    }
)


def labels(positive: dict, negative: dict) -> list[int]:
    return task_labels(CELLS, Task(level="cell", positive=positive, negative=negative)).tolist()


def test_one_of_several_labels_is_enough_and_unlabelled_cells_take_no_part():
    characteristic = "special_characteristics"
    assert labels({characteristic: ["Auer rods"]}, {characteristic: ["*"]}) == [1, 0, -1, 1]
    assert labels({characteristic: ["Faggot cell"]}, {characteristic: ["*"]}) == [0, 0, -1, 1]


def test_none_is_a_label_and_a_part_of_a_label_is_not():
    assert meets(CELLS, {"special_characteristics": ["None"]}).tolist() == [False, True, False, False]
    assert not meets(CELLS, {"special_characteristics": ["Auer"]}).any()


def test_an_item_that_meets_both_conditions_is_positive():
    assert labels({"diagnosis": ["apl"]}, {"diagnosis": ["apl", "aml"]}) == [0, 1, -1, 1]


def test_a_condition_on_several_columns_needs_all_of_them():
    immature_of_apl = {"cell_type": ["Myeloblast", "Promyelocyte"], "diagnosis": ["apl"]}
    both = labels(immature_of_apl, {"diagnosis": ["healthy"]})
    of_apl = labels({"diagnosis": ["apl"]}, {"diagnosis": ["healthy"]})
    typed = labels({"cell_type": ["Myeloblast", "Promyelocyte"]}, {"diagnosis": ["healthy"]})
    assert [label == 1 for label in both] == [a == b == 1 for a, b in zip(of_apl, typed, strict=True)]
    assert 1 in both
    assert both.count(1) < min(of_apl.count(1), typed.count(1))


def test_a_table_without_rows_has_no_labels():
    task = Task(level="cell", positive={"diagnosis": ["apl"]}, negative={"diagnosis": ["aml"]})
    assert task_labels(CELLS[:0], task).shape == (0,)
