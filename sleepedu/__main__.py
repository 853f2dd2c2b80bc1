"""The command line: ``python -m sleepedu train | evaluate | probe | results | reproduce | bench | finetune``.

Wrong input gives one line on stderr and exit code 2, a run that is not reproduced, or that scores differently on other
examples, exit code 1; an interrupted training run resumes with the same command.
"""

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields, replace
from pathlib import Path
from typing import Any

import torch

from sleepedu import checks, storage
from sleepedu.evaluation import BATCH, accuracy_by_depth
from sleepedu.intervals import differing
from sleepedu.lab import benchmark, experiments, probes, run_store
from sleepedu.lab.results import aligned, beside_stored, in_lines
from sleepedu.lab.together import run_together
from sleepedu.pretrained import finetuning
from sleepedu.progress import ProgressBar

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--compile": {"action": argparse.BooleanOptionalAction, "help": "with torch.compile; where it pays, when absent"},
    "--device": {"default": "auto", "help": "auto, cpu or cuda"},
    "--examples": {"type": int, "default": 2000, "help": "to measure on, at every depth"},
    "--json": {"action": "store_true", "help": "for a program to read"},
    "--only": {"nargs": "+", "default": list(benchmark.PARTS), "choices": list(benchmark.PARTS), "help": "parts of it"},
    "--quiet": {"action": "store_true", "help": "show no progress"},
    "--recompute": {"action": argparse.BooleanOptionalAction, "help": "less memory, a third more time; has a default"},
    "--runs": {"type": Path, "help": "folder to take runs from, or to store them in"},
    "--seed": {"type": int, "help": "of the examples; another than the run's own"},
    "--together": {"type": int, "default": 1, "help": "runs at once, of this seed and those after it; for a GPU"},
    "--threads": {"type": int, "default": 1, "help": "of the CPU; more are slower on a busy machine"},
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8")  # what goes into a file need not suit the console
    try:
        checks.whole("threads", options.threads, least=1, most=1024)
        torch.set_num_threads(options.threads)
        code = options.command(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough, as in `results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ConnectionError:  # another rank has failed, and says why
        return 2
    except (ValueError, FloatingPointError, ImportError) as error:
        if experiments.torchrun_rank():
            time.sleep(60)  # torchrun ends every rank when one ends: not before the first one has said why
        return _fail(storage.first_line(error))
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "memory" not in str(error):  # a full CPU's has no kind of its own
            raise
        return _fail(storage.first_line(error), on_every_rank=True)
    except KeyboardInterrupt:
        one = options.command in (train, finetune, reproduce) and getattr(options, "together", 1) == 1
        resumes = one and options.runs is not None  # where reproduce keeps nothing, there is nothing to go on from
        _fail("stopped" + "; the same command goes on from the last checkpoint" * resumes)
        return 130


def train(options: argparse.Namespace) -> None:
    watch = None if options.quiet else ProgressBar()
    how = {"compile": options.compile, "recompute": options.recompute}
    experiment = _chosen(experiments.Experiment, options)
    checks.whole("together", options.together, least=1, most=1000)
    if options.together > 1:
        if any(choice is not None for choice in how.values()):
            raise ValueError("compile and recompute are chosen for single runs: leave them out beside --together")
        seeds, start = range(experiment.seed, experiment.seed + options.together), experiment.trained_from
        own = f"-seed{experiment.seed}"  # where the run to go on from has it, each goes on from the run of its own
        starts = [f"{start.removesuffix(own)}-seed{s}" if start.endswith(own) else start for s in seeds]
        alike = [replace(experiment, seed=s, trained_from=one) for s, one in zip(seeds, starts, strict=True)]
        runs: list[Any] = run_together(alike, options.device, options.runs, watch, options.examples)
    else:
        runs = [experiments.run(experiment, options.device, options.runs, watch, options.examples, **how)]
    for run in filter(None, runs):  # of torchrun's ranks the first one has it
        print(f"{run.path}: {run.provenance['seconds']:.0f} s of training on {run.provenance['processor']}")
        print(*aligned([{run.make_task().depth_name: d, **asdict(a)} for d, a in run.table.items()]), sep="\n")


def evaluate(options: argparse.Namespace) -> int:
    runs: list[Any] = [finetuning.load_any(run) for run in options.run] or run_store.stored_runs()  # before any work
    if not runs:
        raise ValueError("there are no stored runs to measure: train one and name it")
    for run in runs:
        if options.seed == run.experiment.seed:
            raise ValueError(f"seed {options.seed} drew the examples of the stored table of {run.name}: take another")
    measured, apart, comparisons = [], 0, sum(len(run.table) for run in runs)
    for run in runs:
        model, batch = run.load_model(options.device), getattr(run.experiment, "batch", BATCH)
        table = accuracy_by_depth(model, run.make_task(), run.experiment.passes, options.examples, options.seed, batch)
        differs = differing(table, run.table, comparisons)
        apart += len(differs)
        if options.json:
            row, again = run.row(), {"depths": run_store.plain_table(table), "differs": differs}
            measured.append({**row, "seed_of_examples": options.seed, "stored": row["depths"], **again})
        else:
            print(run.name, *beside_stored(table, run, differs), sep="\n", flush=True)
    if options.json:
        print(json.dumps(measured, indent=1))
    else:
        print(f"{apart or 'none'} of {comparisons} accuracies on examples of seed {options.seed}", end=" ")
        print(f"{'differs' if apart < 2 else 'differ'} from the stored by more than chance explains")
    return 1 if apart else 0


def probe(options: argparse.Namespace) -> None:
    settings = _chosen(probes.Settings, options)
    runs = [run_store.load_run(run) for run in options.run]  # all of them are looked for before one is probed
    found = [probes.probe_run(run, settings, options.runs) for run in runs]
    if options.json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    for one in found:
        print(f"{one.run}, examples: {', '.join(f'{count:,} to {part}' for part, count in one.examples.items())}")
        for what, shares in (("labels right", one.each), ("whole examples right", one.whole)):
            passes = [(reader, n, row) for reader, rows in shares.items() for n, row in enumerate(rows, start=1)]
            rows = [{what: f"{reader}, pass {n}"} | dict(zip(one.steps, row, strict=True)) for reader, n, row in passes]
            print("\n".join(["", *aligned(rows)]))


def results(options: argparse.Namespace) -> None:
    runs = run_store.stored_runs(options.runs)
    print(json.dumps([run.row() for run in runs], indent=1) if options.json else "\n".join(in_lines(runs)))


def reproduce(options: argparse.Namespace) -> int:
    watch = None if options.quiet else ProgressBar()
    lines, reproduced = experiments.reproduce(run_store.load_run(options.run[0]), options.runs, watch)
    print("\n".join(lines))
    return 0 if reproduced else 1


def bench(options: argparse.Namespace) -> None:
    device = run_store.find_device(options.device)
    figures: dict[str, Any] = {"machine": run_store.machine(device)}
    for part in options.only:
        print(f"measuring: {part}", file=sys.stderr)
        figures[part] = list(benchmark.PARTS[part](device))
    if options.json:
        print(json.dumps(figures, indent=1))
    else:
        print(figures["machine"]["processor"], figures["machine"]["threads"], "threads; milliseconds (median)")
        print(*("\n".join(["", part, *aligned(figures[part])]) for part in options.only), sep="\n")


def finetune(options: argparse.Namespace) -> None:
    watch = None if options.quiet else ProgressBar()
    settings = _chosen(finetuning.FineTuning, options)
    recompute = options.recompute is not False
    made = finetuning.finetune(settings, options.device, options.runs, watch, options.examples, recompute)
    print(f"{made.path}: {made.provenance['seconds']:.0f} s of training on {made.provenance['processor']}")
    print(*aligned([{"operations": d, **asdict(a)} for d, a in made.table.items()]), sep="\n")


def _fail(message: str, on_every_rank: bool = False) -> int:
    """Say what is wrong and return the exit code; what every rank of torchrun finds alike the first one says."""
    if on_every_rank or not experiments.torchrun_rank():
        print(f"sleepedu: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(_fail(message))


def _chosen(settings: type, options: argparse.Namespace) -> Any:
    return settings(**{field.name: getattr(options, field.name) for field in fields(settings)})


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sleepedu", description="Train and measure language models that sleep.")
    parser.set_defaults(threads=1)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable, what: str, *names: str, run: Any = 0, settings: Any = None, **defaults: Any) -> None:
        """Add a command with these arguments, how many runs it takes and every field of a class of settings."""
        command = commands.add_parser(function.__name__, help=what)
        if run:
            command.add_argument("run", nargs=run, help="a run's name or folder")
        for name in names:
            command.add_argument(name, **ARGUMENTS[name])
        for field in fields(settings) if settings else ():
            flag, default = f"--{field.name.replace('_', '-')}", field.default
            if default is MISSING:  # it has to be given, by its place
                flag, default = field.name, None
            command.add_argument(flag, type=field.type, default=default, help=field.metadata["help"])
        command.set_defaults(command=function, **defaults)

    how = ("--runs", "--recompute", "--quiet", "--examples", "--device", "--threads")
    runs: dict[str, Any] = {"runs": run_store.OWN}
    more = ("--together", "--compile", *how)
    add(train, "train one run, or resume it, and store it", *more, settings=experiments.Experiment, **runs)
    add(evaluate, "measure stored runs anew and compare", "--seed", "--examples", "--json", *how[4:], run="*", seed=7)
    probed = ("--runs", "--json", "--threads")
    add(probe, "measure what can be read from S after each pass", *probed, run="+", settings=probes.Settings, **runs)
    add(results, "all stored runs in one table", "--runs", "--json")
    add(reproduce, "train a stored run again and compare", "--runs", "--quiet", run=1)
    add(bench, "measure what sleep costs on this machine", "--only", "--json", *how[4:])
    add(finetune, "teach a pretrained model to sleep", *how, settings=finetuning.FineTuning, examples=400, **runs)
    return parser


if __name__ == "__main__":
    sys.exit(main())
