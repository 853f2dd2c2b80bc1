"""The command line: ``python -m sleepedu train | evaluate | probe | results | reproduce | bench | export-live``.

Wrong input gives one line on stderr and exit code 2, a run that is not reproduced, or that scores differently on other
examples, exit code 1; an interrupted training run resumes with the same command.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from sleepedu import checks, distributed, files
from sleepedu.evaluation import Table, accuracy_by_depth, differing
from sleepedu.lab import benchmark, experiments, probes, reproduction
from sleepedu.lab import results as tables
from sleepedu.model import CARRIES
from sleepedu.pictures import live_model as live
from sleepedu.tasks import TASKS
from sleepedu.training import print_progress

THREADS = "CPU threads; a second one makes a step shorter on an idle machine, and many times longer on a busy one"


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = _parser().parse_args(arguments)
    try:
        threads = getattr(options, "threads", 1)
        checks.whole("threads", threads, least=1, most=1024)
        torch.set_num_threads(threads)
        code = options.command(options) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has seen enough, as in `results | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
        return _fail(files.first_line(error))
    except KeyboardInterrupt:
        if distributed.first_to_fail():
            print("\nsleepedu: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except Exception:
        if distributed.first_to_fail():
            raise
        return 2  # of another rank's error, which that rank has told
    return 0


def train(options: argparse.Namespace) -> None:
    experiment = experiments.Experiment(
        task=options.task,
        size=options.size,
        model=options.model,
        passes=options.passes,
        seed=options.seed,
        carry=options.carry,
        steps=options.steps,
        learning_rate=options.learning_rate,
    )
    watch = None if options.quiet else print_progress
    how = {"compile": options.compile, "recompute": options.recompute}
    run = experiments.run(experiment, options.device, options.runs, watch, options.examples, **how)
    if run is None:  # the first rank has the rest to do
        return
    print(f"{run.path}: {run.provenance['seconds']:.0f} s of training on {run.provenance['processor']}")
    _print_table(run.table, run.make_task().depth_name)


def evaluate(options: argparse.Namespace) -> int:
    # All runs are looked for before one is measured.
    runs = [experiments.load(run) for run in options.run] or experiments.stored_runs()
    if not runs:
        raise ValueError("there are no stored runs to measure: train one and name it")
    for run in runs:
        if options.seed == run.experiment.seed:
            raise ValueError(f"seed {options.seed} drew the examples of the stored table of {run.name}: take another")
    comparisons = sum(len(run.table) for run in runs)
    rows, apart = [], 0
    for run in runs:
        task, passes = run.make_task(), run.experiment.passes
        table = accuracy_by_depth(run.load_model(options.device), task, passes, options.examples, options.seed)
        differs = differing(table, run.table, comparisons)
        apart += len(differs)
        rows.append(
            {
                **run.row(),
                "stored": _rows(run.table),
                "seed_of_examples": options.seed,
                "depths": _rows(table),
                "differs": differs,
            }
        )
        if not options.json:
            notes = {d: f"{run.table[d].accuracy:6.3f}{'  differs' if d in differs else ''}" for d in table}
            print(run.name)
            _print_table(table, task.depth_name, {"stored": notes})
            sys.stdout.flush()
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        print(
            f"{apart or 'none'} of {comparisons} accuracies on examples of seed {options.seed} "
            f"{'differs' if apart < 2 else 'differ'} from the stored by more than chance explains"
        )
    return 1 if apart else 0


def results(options: argparse.Namespace) -> None:
    runs = experiments.stored_runs(options.runs)
    if options.json:
        print(json.dumps([run.row() for run in runs], indent=1))
        return
    print(tables.markdown(runs) if options.markdown else "\n".join(tables.lines(runs)))


def probe(options: argparse.Namespace) -> None:
    settings = probes.Settings(options.passes, options.episodes, options.seed)
    runs = [experiments.load(run) for run in options.run]  # all of them are looked for before one is probed
    shown = [probes.of(run, settings, options.runs) for run in runs]
    if options.json:
        print(f"[{','.join(found.json() for found in shown)}]")
    else:
        print("\n\n".join("\n".join(found.lines()) for found in shown))


def reproduce(options: argparse.Namespace) -> int:
    watch = None if options.quiet else print_progress
    done = reproduction.reproduce(experiments.load(options.run), options.runs, watch)
    print("\n".join(done.lines))
    return 0 if done.reproduced else 1


def bench(options: argparse.Namespace) -> None:
    device = experiments.find_device(options.device)
    figures = benchmark.bench(device, tuple(options.only), lambda line: print(line, file=sys.stderr))
    if options.json:
        print(json.dumps(figures, indent=1))
        return
    print(f"{figures['machine']['processor']}, {figures['machine']['threads']} threads; milliseconds, median of rounds")
    for part in options.only:
        print(f"\n{part}")
        for row in figures[part]:
            # A timing is its median; everything else is shown as it is, but for the spread, which --json has.
            shown = {name: value["ms"] if isinstance(value, dict) else value for name, value in row.items()}
            print("  " + "  ".join(f"{k} {v}" for k, v in shown.items() if k not in ("low", "high", "rounds")))


def export_live(options: argparse.Namespace) -> None:
    for path in live.export(options.to, options.runs):
        print(f"{path}: {path.stat().st_size:,} bytes")


def _rows(table: Table) -> dict[str, dict]:
    return {str(depth): asdict(accuracy) for depth, accuracy in table.items()}


def _print_table(table: Table, depth_name: str, more: dict[str, dict[int, str]] | None = None) -> None:
    """Print the table of a run, with further columns: their names, and a text for every depth."""
    more = more or {}
    print(f"{depth_name:>16s}  accuracy  95% interval    best constant answer", *more, sep="  ")
    for depth, a in table.items():
        told = f"{depth:16d}  {a.accuracy:8.3f}  {a.low:.3f} - {a.high:.3f}   {a.majority:<20.3f}"
        print(told.rstrip() if not more else told, *(column[depth] for column in more.values()), sep="  ")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise SystemExit(_fail(message))


def _fail(message: str) -> int:
    """Say what is wrong, of several ranks only once, and return the exit code."""
    if distributed.first_to_fail():
        print(f"sleepedu: {message}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m sleepedu", description="Train and measure language models that sleep.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("train", help="train one run, or resume it, and store it")
    command.add_argument("task", help=f"one of {', '.join(TASKS)}")
    command.add_argument("--passes", type=int, default=1, metavar="N", help="sleep passes over every window")
    command.add_argument("--size", default="laptop", help=f"one of {', '.join(experiments.SIZES)}")
    command.add_argument("--model", default="sleep", help=f"one of {', '.join(experiments.MODELS)}")
    command.add_argument(
        "--carry", default="", help=f"from pass to pass, instead of the recipe's: one of {', '.join(CARRIES)}"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--steps", type=int, default=0, help="instead of the recipe's")
    command.add_argument("--learning-rate", type=float, default=0.0, help="Muon's, instead of the recipe's")
    command.add_argument("--examples", type=int, default=2000, help="to evaluate on, at every depth")
    command.add_argument("--runs", type=Path, default=experiments.OWN, help="folder to store the run in")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--threads", type=int, default=1, help=THREADS)
    command.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, help="with torch.compile; where it pays, when absent"
    )
    command.add_argument("--recompute", action="store_true", help="much less memory for about a third more time")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(command=train)

    command = commands.add_parser("evaluate", help="measure stored runs on fresh examples and compare")
    command.add_argument("run", nargs="*", help="a run's name or folder, or several; the committed ones when absent")
    command.add_argument("--seed", type=int, default=7, help="of the examples; another than the run's own")
    command.add_argument("--examples", type=int, default=2000, help="at every depth")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--threads", type=int, default=1, help=THREADS)
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=evaluate)

    command = commands.add_parser("probe", help="measure what can be read from a stored run's S after each pass")
    command.add_argument("run", nargs="+", help="a run's name or folder, or several")
    command.add_argument("--passes", type=int, default=probes.Settings.passes, help="probe after pass 1 to this one")
    command.add_argument("--episodes", type=int, default=probes.Settings.episodes, help="to fit, choose and test with")
    command.add_argument("--seed", type=int, default=probes.Settings.seed, help="of the examples")
    command.add_argument("--runs", type=Path, default=experiments.OWN, help="folder to store the probes in")
    command.add_argument("--threads", type=int, default=1, help=THREADS)
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=probe)

    command = commands.add_parser("results", help="all stored runs in one table")
    command.add_argument("--runs", type=Path, help="folder of runs; the committed ones when absent")
    form = command.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="every run by itself, with its intervals")
    form.add_argument("--markdown", action="store_true", help="as on the book's page of results")
    command.set_defaults(command=results)

    command = commands.add_parser("reproduce", help="train a stored run again and compare")
    command.add_argument("run", help="a run's name or folder")
    command.add_argument("--runs", type=Path, help="folder to keep the new run in; it is not kept when absent")
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(command=reproduce)

    command = commands.add_parser("bench", help="measure what sleep costs on this machine")
    command.add_argument("--only", nargs="+", default=list(benchmark.PARTS), metavar="PART", help="a part or more")
    command.add_argument("--device", default="auto", help="auto, cpu or cuda")
    command.add_argument("--threads", type=int, default=1, help=THREADS)
    command.add_argument("--json", action="store_true")
    command.set_defaults(command=bench)

    command = commands.add_parser("export-live", help="write the models of the book's first page as a script")
    command.add_argument("--runs", type=Path, default=experiments.COMMITTED, help="folder of runs")
    command.add_argument("--to", type=Path, default=live.FOLDER, help=f"folder to write to; {live.FOLDER} when absent")
    command.set_defaults(command=export_live)
    return parser


if __name__ == "__main__":
    sys.exit(main())
