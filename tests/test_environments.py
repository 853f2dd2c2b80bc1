"""The lists of versions that `make environments` tries say what pyproject.toml says."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "environments"


def wanted(lines):
    """Return {name: range} of requirements such as "torch>=2.9"."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if not line.startswith("#"))


def listed(name):
    return wanted((LISTS / f"{name}.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def ranges():
    return wanted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_the_oldest_versions_are_the_lower_bounds(ranges):
    oldest = listed("oldest")
    for name, allowed in ranges.items():
        least = re.search(r">=([\d.]+)", allowed)[1].split(".")
        assert oldest[name] == "==" + ".".join([*least, "0", "0"][:3]), f"{name} {allowed}"


def test_the_newest_versions_have_the_upper_bounds_alone(ranges):
    newest = listed("newest")
    for name, allowed in ranges.items():
        assert newest[name] == "".join(re.findall(r"<[\d.]+", allowed))


def test_colabs_versions_are_whole_and_inside_the_bounds(ranges):
    colab = listed("colab")
    for name, allowed in ranges.items():
        version = [int(part) for part in re.fullmatch(r"==([\d.]+)", colab[name])[1].split(".")]
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", allowed):
            bound = [int(part) for part in bound.split(".")]
            assert version >= bound if sign == ">=" else version < bound
    assert listed("widgets7")["ipywidgets"] == colab["ipywidgets"]
