"""The house stands: imports only go down, and one that went up, hidden or not, would be found."""

import house
import pytest

FLOORS = ("ground", "wing/low", "wing/__init__", "middle beside", "top", "__init__")


@pytest.fixture
def wrongs(tmp_path):
    """A function that builds a small house of empty files, but for those given, and returns what is wrong with it."""

    def look(texts, floors=FLOORS):
        for name, text in (dict.fromkeys(" ".join(FLOORS).split(), "") | texts).items():
            path = tmp_path / "castle" / f"{name}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return list(house.wrongs(house.read(tmp_path / "castle")[1], floors))

    return look


@pytest.fixture(scope="module")
def sleepedu():
    return house.read(house.PACKAGE)


def test_the_house_stands(sleepedu):
    assert list(house.wrongs(sleepedu[1])) == []


def test_the_core_can_be_read_in_one_sitting_and_the_house_stays_small(sleepedu):
    assert list(house.too_long(sleepedu[0])) == []


def test_training_a_task_imports_the_core_and_the_task_alone(sleepedu):
    assert list(house.not_needed(sleepedu[1])) == []


def test_imports_that_go_down_are_right(wrongs):
    everything = "from castle import ground, wing\nimport castle.wing.low, os\nfrom .middle import name"
    assert (
        wrongs({"top": everything, "__init__": "from castle import top", "wing/__init__": "from .low import x"}) == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "import castle.top",
        "from castle import top",
        "from castle.top import name",
        "from . import top",
        "from .top import name",
        "def later():\n    from castle import top",
        "class Hidden:\n    def later(self):\n        if self:\n            import castle.top as t",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from castle.top import Name",
    ],
)
def test_an_import_that_goes_up_is_found_wherever_it_hides(wrongs, text):
    assert wrongs({"middle": text}) == ["middle imports top, which is above it"]


def test_an_import_out_of_a_package_is_found(wrongs):
    assert wrongs({"wing/low": "from ..top import name"}) == ["wing/low imports top, which is above it"]
    assert wrongs({"wing/low": "from castle.wing import name"}) == ["wing/low imports wing/__init__, which is above it"]


def test_the_package_on_the_way_to_a_module_is_imported_too(wrongs):
    assert wrongs({"ground": "import castle.wing.low"}) == [
        "ground imports wing/__init__, which is above it",
        "ground imports wing/low, which is above it",
    ]


def test_the_face_counts_where_it_is_named(wrongs):
    assert wrongs({"top": "from castle import name"}) == ["top imports __init__, which is above it"]


def test_rooms_of_one_floor_know_nothing_of_each_other(wrongs):
    assert wrongs({"middle": "from castle import beside"}) == ["middle imports beside, which is beside it"]


def test_a_circle_is_told_in_the_order_of_its_imports(wrongs):
    (*_, circle) = wrongs(
        {"ground": "import castle.middle", "middle": "import castle.top", "top": "import castle.ground"}
    )
    assert circle.removeprefix("a circle: ") in {
        "ground imports middle imports top imports ground",
        "middle imports top imports ground imports middle",
        "top imports ground imports middle imports top",
    }


def test_files_that_only_the_package_or_the_floors_have_are_named(wrongs):
    found = wrongs({"attic": ""}, (*FLOORS, "cellar"))
    assert found == ["attic: no floor names it", "cellar: a floor names it, and there is no such file"]


def test_doors_between_wings_stay_shut():
    imports: house.Imports = {name: set() for name in " ".join(house.FLOORS).split()}
    assert list(house.wrongs(imports)) == []
    imports |= {"lab/probes": {"pictures/figures"}, "pictures/figures": {"training"}, "pictures/explorer": {"session"}}
    assert list(house.wrongs(imports)) == [
        "lab/probes imports pictures/figures: that door stays shut",
        "pictures/figures imports training: that door stays shut",
    ]


def test_what_training_does_not_need_is_found_through_any_number_of_imports():
    imports: house.Imports = {name: set() for name in " ".join(house.FLOORS).split()}
    imports |= {"training": {"model", "fast/__init__"}, "model": {"layers"}, "layers": {"intervals", "tasks/base"}}
    assert set(house.not_needed(imports)) == {
        f"training tasks/{task} imports intervals"
        for task in (name.removeprefix("tasks/") for name in imports if name.startswith("tasks/"))
        if task != "base"
    }


def test_lines_are_counted_by_room(monkeypatch):
    monkeypatch.setattr(house, "LIMITS", {"core": 1050, "total": 4200})
    lines = {
        "model": 1000,
        "tasks/base": 51,
        "tasks/graph_retrieval": 7,
        "session": 5,
        "lab/probes": 3137,
        "__main__": 1,
    }
    assert house.rooms(lines) == {
        **{"core": 1051, "beside the core": 5, "tasks": 7, "fast": 0},
        **{"lab": 3137, "pictures": 0, "face": 1, "all but fast": 4201, "pretrained": 0, "total": 4201},
    }
    assert list(house.too_long(lines)) == [
        "core: 1,051 lines, 1,050 are the most: shorten it, or say in LIMITS why it needs more",
        "total: 4,201 lines, 4,200 are the most: shorten it, or say in LIMITS why it needs more",
    ]
