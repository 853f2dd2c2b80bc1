"""A chapter's first cell, in an empty environment, against a folder that stands for the repository's address."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import first_cell
import pytest

import sleepedu

ROOT = Path(__file__).resolve().parent.parent
VERSION = sleepedu.__version__
WHEEL = f"sleepedu-{VERSION}-py3-none-any.whl"
# What builds the archive: nothing has to be fetched for it.
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
BACKEND = f"""
import shutil
def build_wheel(folder, *_):
    shutil.copy("{WHEEL}", folder)
    return "{WHEEL}"
"""
PLAY_COLAB = 'import sys, types; sys.modules["google.colab"] = types.ModuleType("google.colab")\n'


def make_wheel(path, origin):
    """A package of a line, which says where it came from."""
    about = f"Metadata-Version: 2.1\nName: sleepedu\nVersion: {VERSION}\n"
    files = {
        "sleepedu/__init__.py": f"origin = {origin!r}\n",
        f"sleepedu-{VERSION}.dist-info/METADATA": about,
        f"sleepedu-{VERSION}.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    record = f"sleepedu-{VERSION}.dist-info/RECORD"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in (files | {record: "".join(f"{name},,\n" for name in [*files, record])}).items():
            wheel.writestr(name, text)


def put_archive(at):
    make_wheel(at / "build" / WHEEL, "the archive of the branch or tag")
    with zipfile.ZipFile(at / "archive" / "main.zip", "w") as archive:
        archive.write(at / "build" / WHEEL, f"sleepedu-main/{WHEEL}")
        archive.writestr("sleepedu-main/backend.py", BACKEND)
        archive.writestr("sleepedu-main/pyproject.toml", PROJECT)


def put_wheel(at):
    make_wheel(at / "releases" / "download" / f"v{VERSION}" / WHEEL, "the wheel of the release")


def put_index(at):
    make_wheel(at / "index" / WHEEL, "the index")


@pytest.fixture(scope="module")
def empty(tmp_path_factory):
    """The Python of an environment with nothing but pip, where Colab is played."""
    folder = tmp_path_factory.mktemp("empty")
    made = subprocess.run([sys.executable, "-m", "venv", folder], capture_output=True)
    if made.returncode:
        pytest.skip("this Python cannot make an environment with pip")
    next(folder.glob("lib/python*/site-packages")).joinpath("colab.pth").write_text(PLAY_COLAB)
    return folder / "bin" / "python"


@pytest.fixture
def run_cell(empty, tmp_path):
    """A function that runs the cell where a chapter would be opened alone, and says whence the library is."""
    at = tmp_path / "address"
    for folder in ("archive", "index"):
        (at / folder).mkdir(parents=True)
    (tmp_path / "opened").mkdir()
    cell = first_cell.first_cell()
    address, tag = re.search(r'"(https://.*?)", "(.*?)"', cell).groups()
    cell = cell.replace(address, at.as_uri()).replace(f'"{tag}"', '"main"')
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(at / "index"), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(*present, folder=tmp_path / "opened"):
        for put in present:
            put(at)
        code = f"{cell}\nimport sleepedu\nprint('installed from', sleepedu.origin)"
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
        return subprocess.run([empty, "-c", code], cwd=folder, env=clean | pip, capture_output=True, text=True)

    yield run
    subprocess.run([empty, "-m", "pip", "uninstall", "--quiet", "--yes", "sleepedu"], capture_output=True)


@pytest.mark.parametrize(
    ("present", "origin"),
    [
        ((put_archive, put_wheel, put_index), "the archive of the branch or tag"),
        ((put_wheel, put_index), "the wheel of the release"),
        ((put_index,), "the index"),
    ],
    ids=["archive", "wheel", "index"],
)
def test_the_library_comes_from_the_first_place_that_has_it_and_once(run_cell, present, origin):
    first, again = run_cell(*present), run_cell()
    assert f"{first_cell.MEGABYTES} MB" in first.stdout and f"installed from {origin}" in first.stdout, first.stderr
    assert again.stdout == f"installed from {origin}\n", "where the library is, nothing is fetched"


def test_a_checkout_around_the_notebook_comes_first(run_cell, tmp_path):
    put_archive(tmp_path / "address")
    checkout = tmp_path / "checkout"
    (checkout / "sleepedu").mkdir(parents=True)
    (checkout / "sleepedu" / "model.py").touch()
    (checkout / "book").mkdir()
    make_wheel(checkout / WHEEL, "the checkout")
    (checkout / "backend.py").write_text(BACKEND)
    (checkout / "pyproject.toml").write_text(PROJECT)
    assert "installed from the checkout" in run_cell(folder=checkout / "book").stdout


def test_where_there_is_nothing_one_sentence_says_so(run_cell):
    done = run_cell()
    assert done.returncode == 1 and "installed from" not in done.stdout
    (sentence,) = done.stderr.splitlines()
    assert re.fullmatch(r"Neither file://\S+ nor PyPI has sleepedu, or there is no network\.", sentence)


def test_it_says_how_much_is_fetched():
    """The archive of a branch or tag leaves out the weights: .gitattributes."""
    packed = subprocess.run(["git", "archive", "--format=zip", "HEAD"], cwd=ROOT, capture_output=True)
    if packed.returncode:
        pytest.skip("this is no checkout with git")
    assert abs(len(packed.stdout) / 1e6 - first_cell.MEGABYTES) < 0.6


def test_the_package_fetches_weights_from_the_same_address():
    assert f'Repository = "{first_cell.settings()[0]}"' in (ROOT / "pyproject.toml").read_text(), "make fill"
