"""A commit, `make lint` and the workflows ask for the same, and the version is the same everywhere."""

import ast
import importlib.metadata
import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

import sleepedu

yaml = pytest.importorskip("yaml", reason="PyYAML reads the settings of pre-commit and of the workflows")

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ONLY_SAYS = {"--check", "--verify"}  # what keeps a tool from mending: `make lint` asks for that, a commit does not
NOTEBOOKS = [*(ROOT / "book").glob("*.ipynb"), *(ROOT / "tests").glob("*.ipynb")]


def read_yaml(path):
    return yaml.safe_load((ROOT / path).read_text())


@pytest.fixture(scope="module")
def tools():
    """The hooks that `make lint` has too, and those that look at what git is handed."""
    return [repository["hooks"] for repository in read_yaml(".pre-commit-config.yaml")["repos"]]


def command(line):
    """Return a command as words, without the files that it is given and what keeps it from mending."""
    return [word for word in shlex.split(line) if word not in ONLY_SAYS and word != "." and "*" not in word]


def test_a_commit_is_asked_what_make_lint_asks(tools):
    rule = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[1]
    asked = [command(line.replace("$(BIN)", ".venv/bin")) for line in rule.splitlines()]
    assert [command(hook["entry"]) for hook in tools[0]] == asked


def test_every_tool_has_the_version_in_the_requirements(tools):
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["test"]
    packages = [(hook, Path(shlex.split(hook["entry"])[0]).name) for hook in tools[0]]
    packages += [(hook, "pre-commit-hooks") for hook in tools[1]]
    for hook, package in packages:
        assert hook["language"] == "unsupported" and hook["entry"].startswith(".venv/bin/"), "it has another version"
        assert package in pinned and package in extras
        assert "rev" not in hook and "additional_dependencies" not in hook


def test_the_programs_of_pre_commits_own_hooks_exist(tools):
    try:
        programs = importlib.metadata.distribution("pre-commit-hooks").entry_points.names
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pre-commit-hooks is not installed")
    assert {Path(shlex.split(hook["entry"])[0]).name for hook in tools[1]} <= programs


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_written_in_one_way_and_keeps_the_outputs_that_are_compared(path):
    text = path.read_text()
    notebook = json.loads(text)
    assert json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" == text
    for cell in notebook["cells"]:
        tags = cell["metadata"].get("tags", [])
        assert "nbval-check-output" not in tags or "keep_output" in tags, "nbstripout would take the output away"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_an_action_is_one_commit_whose_version_is_said(path):
    lines = re.findall(r"uses: (.*)", path.read_text())
    assert lines
    for line in lines:
        assert re.fullmatch(r"[\w.-]+(/[\w.-]+)+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line


def test_the_tests_are_run_by_every_python_that_is_allowed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pythons = read_yaml(".github/workflows/book.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert project["requires-python"] == f">={pythons[0]}"
    assert f"(Python {pythons[0]} to {pythons[-1]})" in (ROOT / "requirements.txt").read_text()


def test_the_version_is_the_same_everywhere():
    assert read_yaml("CITATION.cff")["version"] == sleepedu.__version__
    assert (
        re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1] == sleepedu.__version__
    )
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dynamic"] == ["version"]


def test_the_page_of_the_library_takes_no_words_for_a_type():
    """Its maker takes a colon in the first line about a property or a setting for the end of a type."""
    first_lines = []
    for path in (ROOT / "sleepedu").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        first_lines += re.findall(r"#: (.*)", text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and any("property" in ast.unparse(d) for d in node.decorator_list):
                first_lines += (ast.get_docstring(node) or "").splitlines()[:1]
    assert len(first_lines) > 20
    assert not [line for line in first_lines if re.search(r":(\s|$)", line)]
