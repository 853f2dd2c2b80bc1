"""Try the library and the book with other versions of what they need: `make environments`, about an hour.

For each list of versions beside this file: a fresh environment, the library in it from a wheel (where Colab is played,
by a chapter's first cell, as there), the library's tests and every chapter. Ends with one line for each. An environment
takes the Python that goes with its versions where there is one, else that which runs this.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "_build" / "environments"
PYTHONS = {"oldest": ("python3.11",), "colab": ("python3.13", "python3.12"), "newest": ("python3.13", "python3.12")}
SHOWN = ("torch", "numpy", "matplotlib", "pillow", "einops", "ipywidgets", "ipython")
LEFT_OUT = {
    "test_pages.py": "it looks at the built book in a browser, and the book is built in the pinned environment",
    "test_live.py": "it reads what the pages say by Sphinx, which builds the book in the pinned environment",
    "test_jupyterlab.py": "it has a browser and an environment of its own",
    "test_widget_versions.py": "it puts another ipywidgets before the one that is tried here",
}
TESTS = ["tests", *(f"--ignore=tests/{file}" for file in LEFT_OUT)]
CHAPTERS = ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=600", "--dist", "loadscope", "book"]
FROM_WHEEL = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(FOLDER)}
PLAY_COLAB = (  # in one line, as a .pth has it
    'import sys, types, importlib.machinery; colab = sys.modules["google.colab"] = types.ModuleType("google.colab"); '
    'colab.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)\n'
)


class Failed(Exception):
    """What went wrong in an environment, in one line."""


def run(name: str, step: str, *command: str | Path, **variables: str) -> str:
    """Run a command from the environment's own folder or the checkout, keep what it says in a file, and return it."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "SOAK")}
    clean |= {"OMP_NUM_THREADS": "1", "SLEEPEDU_RUNS": str(ROOT / "book" / "runs")} | variables
    where = ROOT if step in ("tests", "chapters") else FOLDER
    done = subprocess.run(list(map(str, command)), cwd=where, env=clean, stdout=-1, stderr=subprocess.STDOUT, text=True)
    log = FOLDER / f"{name}-{step}.log"
    log.write_text(done.stdout)
    if done.returncode:
        raise Failed(f"{step} failed: {summary(done.stdout)}; see {log.relative_to(ROOT)}")
    return done.stdout


def summary(output: str) -> str:
    """Return the counts of pytest's last line, or whatever the last line is."""
    last = (output.strip().splitlines() or ["nothing was said"])[-1]
    return ", ".join(re.findall(r"\d+ (?:passed|failed|skipped|deselected|errors?)", last)) or last


def copy_source() -> Path:
    """Copy what goes into a package, since a build leaves folders beside what it builds; return where."""
    copy = FOLDER / "source"
    shutil.rmtree(copy, ignore_errors=True)
    for part in ("sleepedu", "book/runs"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / part, copy)
    return copy


def build_wheel() -> None:
    """Build the library's wheel."""
    for old in FOLDER.glob("sleepedu-*.whl"):
        old.unlink()
    pip = (sys.executable, "-m", "pip")
    run("all", "wheel", *pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", FOLDER, copy_source())


def install_as_on_colab(name: str, python: Path) -> None:
    """Let the first cell of a chapter install the library. Raises Failed if it changes anything else."""
    packages = next(python.parent.parent.glob("lib/python*/site-packages"))
    (packages / "colab.pth").write_text(PLAY_COLAB)
    freeze = (python, "-m", "pip", "freeze", "--exclude", "sleepedu")
    before = run(name, "before", *freeze)
    chapter = json.loads(next((ROOT / "book").glob("01_*.ipynb")).read_text())
    cell = next("".join(cell["source"]) for cell in chapter["cells"] if cell["cell_type"] == "code")
    there = re.sub(r'"https://[^"]*"', f'"{FOLDER}"', cell)  # where only the package index has something: the wheel
    run(name, "cell", python, "-m", "IPython", "-c", there, **FROM_WHEEL)
    if run(name, "after", *freeze) != before:
        raise Failed("a chapter's first cell changed what Colab brings")


def find_python(name: str) -> str:
    """Return the interpreter for an environment."""
    for path in filter(None, map(shutil.which, PYTHONS[name])):
        if subprocess.run([path, "-c", "import ensurepip"], capture_output=True).returncode == 0:
            return path
    return sys.executable


def attempt(name: str) -> str:
    """Make one environment, run everything there, and return its versions and counts. Raises Failed."""
    run(name, "environment", find_python(name), "-m", "venv", "--clear", FOLDER / name)
    python = FOLDER / name / "bin" / "python"
    pip = (python, "-m", "pip")
    run(name, "versions", *pip, "install", "--quiet", "--requirement", HERE / f"{name}.txt")
    if name == "colab":
        install_as_on_colab(name, python)
    else:
        run(name, "library", *pip, "install", "--quiet", "--no-deps", "sleepedu", **FROM_WHEEL)
    found = "import sleepedu, sys; assert sleepedu.__file__.startswith(sys.prefix), sleepedu.__file__"
    run(name, "import", python, "-c", found)
    listed = {p["name"].lower(): p["version"] for p in json.loads(run(name, "list", *pip, "list", "--format", "json"))}
    version = run(name, "python", python, "--version").strip()
    versions = ", ".join([version, *(f"{package} {listed[package]}" for package in SHOWN)])
    print(f"{name}: {versions}", flush=True)
    pytest = (python, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2")
    counts, failed = [], []
    for step, what, variables in (("tests", TESTS, {}), ("chapters", CHAPTERS, FROM_WHEEL if name == "colab" else {})):
        try:
            counts.append(f"{step} {summary(run(name, step, *pytest, *what, **variables))}")
        except Failed as error:  # the other still says something
            failed.append(str(error))
    if failed:
        raise Failed("; ".join(failed))
    return f"{'; '.join(counts)} (cells); {versions}"


def main(names: list[str]) -> int:
    if unknown := set(names) - set(PYTHONS):
        sys.exit(f"no such environment: {', '.join(sorted(unknown))}; there are {', '.join(PYTHONS)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    build_wheel()
    results = {}
    for name in names or PYTHONS:
        try:
            results[name] = attempt(name)
        except Failed as failed:
            results[name] = f"FAILED, {failed}"
    for file, reason in LEFT_OUT.items():
        print(f"left out {file}: {reason}")
    for name, result in results.items():
        print(f"{name:7s}: {result}")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
