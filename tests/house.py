"""How the house stands: `make house` prints every file of sleepedu with its floor and lines, then what is wrong.

Imports only go down. All are read: those in functions, those for the type checker alone, and the packages that Python
runs on the way to a module. Only the face, which every import runs, counts no more than where it is named.
"""

import ast
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "sleepedu"
FLOORS = (  # from the ground up; the rooms of one floor know nothing of each other
    "checks storage _version",
    "intervals",
    "tasks/random_streams",
    "tasks/base",
    "tasks/batches tasks/cellular_automaton tasks/graph_retrieval tasks/math_reasoning",
    "tasks/__init__",
    "fast_weights",
    "fast/cpp fast/gpu fast/memory",
    "fast/operator",
    "fast/__init__",
    "fast/compiling fast/muon fast/precision fast/recording",
    "layers",
    "model",
    "sleep_loop",
    "settling trace",
    "training evaluation session",
    "checkpoint progress",
    "pictures/explorer pictures/figures pictures/tables",
    "pictures/examples",
    "pictures/__init__",
    "lab/compute",
    "lab/recipes",
    "lab/run_store",
    "lab/results",
    "lab/experiments",
    "lab/together",
    "lab/benchmark lab/probes",
    "lab/__init__",
    "pretrained/blocks",
    "pretrained/loading",
    "pretrained/text",
    "pretrained/finetuning",
    "pretrained/__init__",
    "__init__",
    "__main__",
)
# Doors that the floors would leave open.
SHUT = {"pictures": ("training", "lab"), "lab": ("pictures",), "pretrained": ("pictures",)}
CORE = {"fast_weights", "layers", "model", "sleep_loop", "training", "tasks/base"}
ROOMS = ("core", "beside the core", "tasks", "fast", "lab", "pictures", "face", "all but fast", "pretrained", "total")
FACE = {"__init__", "__main__"}
GROUND = {"checks"}  # what every room may stand on
NEEDED = {"core", "fast", "tasks"}  # the rooms that training a task may enter
# Lines; what is fast has a naive form elsewhere, and nothing else needs what is pretrained.
LIMITS = {"core": 1050, "all but fast": 5000, "fast": 812, "pretrained": 785}
Lines = dict[str, int]  # of every file
Imports = dict[str, set[str]]


def room(name: str) -> str:
    """Return what a file's lines are counted under."""
    if name in CORE or name in FACE:
        return "core" if name in CORE else "face"
    return name.split("/")[0] if "/" in name else "beside the core"


def read(package: Path) -> tuple[Lines, Imports]:
    """Return for every file of a package how many lines it has and which files it imports, by their paths in there."""
    texts = {path.relative_to(package).with_suffix("").as_posix(): path.read_text() for path in package.rglob("*.py")}
    imports = {name: set(_imports(name, text, texts, package.name)) for name, text in texts.items()}
    return {name: text.count("\n") for name, text in texts.items()}, imports


def _imports(name: str, text: str, files: Container[str], package: str) -> Iterator[str]:
    here = [package, *name.split("/")]
    for node in ast.walk(ast.parse(text)):
        named = []
        if isinstance(node, ast.Import):
            named = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):  # what a package is asked for may be a module
            start = [*(here[: -node.level] if node.level else []), *(node.module.split(".") if node.module else [])]
            named = [[*start, alias.name] for alias in node.names]
        for first, *parts in named:
            paths = ["/".join(parts[: end + 1]) + tail for end in range(len(parts)) for tail in ("", "/__init__")]
            *on_the_way, last = [path for path in paths if path in files] or ["__init__"]
            if first == package:
                yield from (last, *(path for path in on_the_way if not name.startswith(path.removesuffix("__init__"))))


def wrongs(imports: Imports, floors: Sequence[str] = FLOORS) -> Iterator[str]:
    """Say which files only the package or the floors have, which imports do not go down, and what goes in a circle."""
    floor = {name: number for number, names in enumerate(floors) for name in names.split()}
    yield from (f"{name}: no floor names it" for name in sorted(imports.keys() - floor))
    yield from (f"{name}: a floor names it, and there is no such file" for name in sorted(floor.keys() - imports))
    for name, other in sorted((name, other) for name, others in imports.items() for other in others):
        if floor.get(other, -1) >= floor.get(name, len(floors)):
            yield f"{name} imports {other}, which is {'above' if floor[other] > floor[name] else 'beside'} it"
        if other.split("/")[0] in SHUT.get(name.split("/")[0], ()):
            yield f"{name} imports {other}: that door stays shut"
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        yield "a circle: " + " imports ".join(reversed(error.args[1]))


def not_needed(imports: Imports) -> Iterator[str]:
    """Say what training a task imports beside the core, what is fast and the tasks' own files."""
    for task in sorted(name for name in imports if room(name) == "tasks"):
        seen, new = set(), {"training", task}
        while new:
            seen |= new
            new = set().union(*(imports[name] for name in new)) - seen
        yield from (f"training {task} imports {name}" for name in sorted(seen - GROUND) if room(name) not in NEEDED)


def rooms(lines: Lines) -> Counter[str]:
    """Return the lines of every room and the total."""
    counts = Counter(dict.fromkeys(ROOMS, 0))
    for name, number in lines.items():
        counts.update({room(name): number, "total": number})
        counts.update({"all but fast": number if room(name) not in ("fast", "pretrained") else 0})
    return counts


def too_long(lines: Lines) -> Iterator[str]:
    """Say what has more lines than it may have."""
    for name, most in LIMITS.items():
        if rooms(lines)[name] > most:
            more = "shorten it, or say in LIMITS why it needs more"
            yield f"{name}: {rooms(lines)[name]:,} lines, {most:,} are the most: {more}"


def main() -> int:
    lines, imports = read(PACKAGE)
    for number, names in enumerate(FLOORS):
        print(*(f"{number:5}  {lines[name]:6,}  {name}\n" for name in names.split() if name in lines), sep="", end="")
    print(*(f"{number:13,}  {name}" for name, number in rooms(lines).items()), sep="\n")
    wrong = [*wrongs(imports), *too_long(lines), *not_needed(imports)]
    print(*(wrong or ["The house stands."]), sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
