"""Run all chapters afresh, several at once, into the cache the book is built from.

A chapter keeps one core busy. What it prints depends on the library and the stored
runs as well as on its code, so nothing that an earlier run left is used.
"""

import logging
import sys
from pathlib import Path

from jupyter_cache import get_cache
from jupyter_cache.executors import load_executor

ROOT = Path(__file__).resolve().parent.parent
# The longest first, so that no worker is left alone with one at the end; each with
# a short one, as a worker takes two at a time.
ORDER = ("04", "08", "01", "12", "11", "13", "03", "10", "05", "14", "07", "09")


def main(root: Path = ROOT) -> int:
    cache = get_cache(root / "_build" / ".jupyter_cache")
    cache.clear_cache()
    paths = sorted(root.glob("book/[0-9]*.ipynb"))
    chapters = {path.name[:2]: path for path in paths}
    for number in sorted(chapters, key=lambda n: (*ORDER, n).index(n)):
        cache.add_nb_to_project(chapters[number])
    logger = logging.getLogger("chapters")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    ran = load_executor("local-parallel", cache, logger).run_and_cache(timeout=600)
    for record in cache.list_project_records():
        if record.traceback:
            print(record.uri, record.traceback, sep="\n", file=sys.stderr)
    return int(bool(ran.excepted or ran.errored))


if __name__ == "__main__":
    sys.exit(main())
