"""Build what is released and run a chapter from it: `make wheel`, some minutes, most of them for PyTorch.

Leaves the source archive and the wheel in _build/dist. The wheel is built from the archive, as pip would do it, and the
chapter runs where there is nothing but the wheel, what that asks for, and what runs notebooks.
"""

import shutil
import sys
import time

from campaign import FOLDER, ROOT, Failed, copy_source, run

DIST = ROOT / "_build" / "dist"
CHAPTER = "09_inside_a_sleep.ipynb"  # trains nothing, and needs stored weights, the rule in C++, probes and figures


def main() -> None:
    """Do all that. Raises Failed."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for old in (DIST, FOLDER / "chapter"):
        shutil.rmtree(old, ignore_errors=True)
    builder, empty = FOLDER / "builder", FOLDER / "wheel"
    for environment in (builder, empty):
        run("wheel", "environment", sys.executable, "-m", "venv", "--clear", environment)
    pinned = ("--constraint", ROOT / "requirements.txt")
    run("wheel", "builder", builder / "bin" / "pip", "install", "--quiet", *pinned, "build")
    run("wheel", "build", builder / "bin" / "python", "-m", "build", "--outdir", DIST, copy_source())
    (wheel,) = DIST.glob("*.whl")
    run("wheel", "install", empty / "bin" / "pip", "install", "--quiet", wheel, "ipykernel", "nbclient")
    (FOLDER / "chapter").mkdir()
    chapter = shutil.copy(ROOT / "book" / CHAPTER, FOLDER / "chapter")
    start = time.monotonic()
    run("wheel", "chapter", empty / "bin" / "jupyter", "execute", "--timeout=600", chapter)
    print(f"{CHAPTER} ran from {wheel.name} in {time.monotonic() - start:.0f} s")
    for file in sorted(DIST.iterdir()):
        print(f"{file.stat().st_size / 1e6:6.1f} MB  {file.relative_to(ROOT)}")


if __name__ == "__main__":
    try:
        main()
    except Failed as failed:
        sys.exit(str(failed))
