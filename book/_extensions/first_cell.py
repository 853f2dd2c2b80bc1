"""The first cell of every chapter, which installs the library where it is missing.

It is made here and written into all chapters by `make fill`: the address and the branch or tag are those of
_config.yml, the version is the library's. What a notebook of that branch or tag needs is the library of the same one.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
MEGABYTES = 3  # what is fetched; a chapter that shows stored models fetches their weights, as it comes to them

CELL = """\
# @title Install the library where it is missing
import importlib.util
import subprocess
import sys
from pathlib import Path

at, tag, version = "{url}", "{tag}", "{version}"
sources = [
    *[".."] * Path("../sleepedu/model.py").exists(),  # the notebook's own checkout
    f"{{at}}/archive/{{tag}}.zip",
    f"{{at}}/releases/download/v{{version}}/sleepedu-{{version}}-py3-none-any.whl",
    f"sleepedu=={{version}}",
]
if importlib.util.find_spec("sleepedu") is None:
    print("Fetching sleepedu: {megabytes} MB; 2 GB more where PyTorch is missing.")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--retries=1"]
    tried = (subprocess.run([*pip, s], capture_output=True) for s in sources)
    if all(one.returncode for one in tried):
        sys.exit(f"Neither {{at}} nor PyPI has sleepedu, or there is no network.")
    importlib.invalidate_caches()"""


def settings() -> tuple[str, str]:
    """Return the repository's address, and the branch or tag."""
    config = (ROOT / "_config.yml").read_text()
    (url,), (tag,) = (re.findall(rf"^  {name}: (\S+)$", config, re.MULTILINE) for name in ("url", "branch"))
    return url, tag


def first_cell() -> str:
    """Return the cell's code."""
    url, tag = settings()
    (version,) = re.findall(r'"(.*)"', (ROOT / "sleepedu" / "_version.py").read_text())
    return CELL.format(url=url, tag=tag, version=version, megabytes=MEGABYTES)


def write(chapter: Path) -> None:
    """Put the cell in the place of a chapter's first."""
    notebook = json.loads(chapter.read_text())
    cell = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    cell["source"] = first_cell().splitlines(keepends=True)
    chapter.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    for chapter in sorted((ROOT / "book").glob("[0-9]*.ipynb")):
        write(chapter)
    project = ROOT / "pyproject.toml"
    repository = f'Repository = "{settings()[0]}"'
    project.write_text(re.sub(r'^Repository = ".*"$', repository, project.read_text(), flags=re.M))
