"""The lists of versions that `make environments` tries say what pyproject.toml says; `make soak` tries them too."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import soak

ROOT = Path(__file__).resolve().parent.parent
LISTS = ROOT / "tests" / "environments"


def wanted(lines):
    """Return {name: range} of requirements such as "torch>=2.9"."""
    return dict(re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in lines if not line.startswith("#"))


def listed(name):
    return wanted((LISTS / f"{name}.txt").read_text().splitlines())


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def ranges(project):
    return wanted(project["dependencies"])


@pytest.fixture(scope="module")
def all_ranges(project, ranges):
    """With those of pretrained models, which Colab has of its own."""
    return ranges | wanted(project["optional-dependencies"]["pretrained"])


def test_the_oldest_versions_are_the_lower_bounds(all_ranges):
    oldest = listed("oldest")
    for name, allowed in all_ranges.items():
        least = re.search(r">=([\d.]+)", allowed)[1].split(".")
        assert oldest[name] == "==" + ".".join([*least, "0", "0"][:3]), f"{name} {allowed}"


def test_the_newest_versions_have_the_upper_bounds_alone(all_ranges):
    newest = listed("newest")
    for name, allowed in all_ranges.items():
        assert newest[name] == "".join(re.findall(r"<[\d.]+", allowed))


def test_colabs_versions_are_whole_and_inside_the_bounds(ranges):
    colab = listed("colab")
    for name, allowed in ranges.items():
        version = [int(part) for part in re.fullmatch(r"==([\d.]+)", colab[name])[1].split(".")]
        for sign, bound in re.findall(r"(>=|<)([\d.]+)", allowed):
            bound = [int(part) for part in bound.split(".")]
            assert version >= bound if sign == ">=" else version < bound
    assert listed("widgets7")["ipywidgets"] == colab["ipywidgets"]


@pytest.mark.skipif(not soak.SOAK, reason="an hour: make soak, or make environments")
def test_all_tests_and_chapters_pass_with_other_versions(capfd):
    done = subprocess.run([sys.executable, LISTS / "campaign.py"], cwd=ROOT)
    shown = capfd.readouterr().out
    lines = [line for line in shown.splitlines() if re.match(r"\w+ *: tests ", line)]
    for line in lines:
        soak.COUNTS[f"list of versions: {line}"] += 1
    assert done.returncode == 0 and len(lines) == 3, shown
