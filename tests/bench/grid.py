"""What does a sweep cost, beside separate runs and beside what its FLOPs need? python tests/bench/grid.py [FOLDER]

    paper    (dry run) the FLOPs of the paper's grid, each model trained once, over those of a run for each of its points
    grid     a small quick grid trained now into a temporary folder, by 1 job and by one a core (on a GPU: 1, 2, 4 and 8 jobs
             on it); then the same points as separate runs, packed in the same way
    ideal    the training seconds of its runs over the seconds that their FLOPs need

With FOLDER, an existing sweep such as results/quick: only the last, of its records; nothing is trained. The sweep must be of this machine.

ideal: all FLOPs of a size at the rate of the best of its linear layers, forward and backward, alone, with the threads of a job and in
as many processes at once as the sweep has jobs. floor: the same for its linear layers, and for attention the time of model.attend alone,
which with heads of 8 is far below the rate of a matrix product. Both know nothing of norms, data, the optimiser or Python.
With the environment variable OUT each row is also a JSON line of $OUT/grid.json. Two to four minutes on two cores.
"""
import argparse
import dataclasses
import json
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.multiprocessing

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]
import sweep
import train
from speed import DTYPES, THREADS, Attend, Linear, Table, between, mark, positive, products, refuse
from data import DataConfig, input_shape
from model import DiT, ModelConfig

MEASURED_SECONDS = 0.15   # for each product, after a warm-up
# On a GPU larger budgets, whose training is not lost beside start-up and torch.compile, and more models than any number of jobs.
GRIDS = {"cpu": dict(depth=[1, 1, 2, 2], width=[16, 24, 24, 32], budget=[1.6e10, 3.2e10, 6.4e10]),
         "cuda": dict(depth=[1, 1, 2, 2, 2, 2, 3, 3], width=[16, 24, 24, 32, 40, 48, 48, 64], budget=[1.28e11, 2.56e11, 5.12e11])}


# ---- paper -------------------------------------------------------------------------------------------------------------

def nested_and_separate(runs):
    """FLOPs of the runs, and of a run from the start for each of their points."""
    return (sum(max(run.steps.values()) * run.step_flops for run in runs), sum(sum(run.steps.values()) * run.step_flops for run in runs))


def bench_paper():
    runs, _ = sweep.plan(sweep.SweepConfig(preset="paper", dry_run=True), [])
    sizes = {budget: sum(budget in run.steps for run in runs) for run in runs for budget in run.steps}
    for run in runs:   # fit.py reads a budget that has 4 sizes; what no parabola uses saves nothing
        run.steps = {budget: steps for budget, steps in run.steps.items() if sizes[budget] >= 4}
    runs = [run for run in runs if run.steps]
    table = Table("paper", "FLOPs of the paper's grid, at the points that its law uses: each model trained once, and a run for each point",
                  {"model": "<24", "N": "13,d", "budgets": "<36", "once": "9.2e", "separate": "9.2e", "once/separate": "13.1%"}, len(runs) + 1)
    for run in runs:
        once, separate = nested_and_separate([run])
        table.row({"model": run.name, "N": run.N, "budgets": " ".join(f"{budget:.3g}" for budget in run.steps), "once": once, "separate": separate,
                   "once/separate": once / separate})
    once, separate = nested_and_separate(runs)
    table.row({"model": f"all {len(runs)}", "once": once, "separate": separate, "once/separate": once / separate})
    table.end()


# ---- grid --------------------------------------------------------------------------------------------------------------

def planned(grid, out, flags):
    return sweep.plan(sweep.SweepConfig(**grid, window=math.inf, out=str(out)), flags)[0]


def trained(runs, jobs):
    """Run them side by side as sweep.py does; -> seconds on the wall, of training, and of validation and pictures. Raises ValueError where one fails."""
    start = time.perf_counter()
    if failed := sweep.run_all(runs, jobs, max(1, THREADS // jobs)):
        raise ValueError(f"{failed[0].name} failed: {(Path(failed[0].folder) / 'output.txt').read_text().strip().splitlines()[-1]}")
    wall = time.perf_counter() - start
    last = [last_record(run.folder) for run in runs]
    return wall, sum(record["seconds"] for record in last), sum(record["evaluation_seconds"] for record in last)


def last_record(folder):
    """The record of the largest budget that a run has reached. Raises ValueError where there is none."""
    records = [json.loads(path.read_text()) for path in Path(folder).glob("budget_*/result.json")]
    if not records:
        raise ValueError(f"{folder}: no budget_*/result.json in it")
    return max(records, key=lambda record: record["steps"])


def bench_grid(folder, grid, jobs, flags=("--val_images", "256")):
    """-> the folder of the nested runs with the most jobs."""
    table = Table("grid", f"{len(grid['width'])} sizes at {len(grid['budget'])} budgets ({grid['budget'][0]:.3g} to {grid['budget'][-1]:.3g}), "
                  f"{THREADS} threads in all; job seconds of all runs: training, validation and pictures, and the rest (start of Python, torch.compile)",
                  {"runs": "<12", "jobs": "4d", "number": "6d", "FLOPs": "9.2e", "wall s": "7.1f", "training s": "10.1f", "validation s": "12.1f",
                   "rest s": "7.1f", "GFLOP/s": "8.1f"})   # the bar is sweep.py's

    def add(what, runs, n):
        flops = sum(max(run.steps.values()) * run.step_flops for run in runs)
        wall, training, validation = trained(runs, n)
        values = {"runs": what, "jobs": n, "number": len(runs), "FLOPs": flops, "wall s": wall, "training s": training, "validation s": validation,
                  "rest s": wall * min(n, len(runs)) - training - validation, "GFLOP/s": flops / wall / 1e9}
        table.row(values)
        return values
    for n in jobs:
        runs = planned(grid, f"{folder}/nested{n}", list(flags))
        nested = add("nested", runs, n)
    alone = [run for budget in grid["budget"] for run in planned({**grid, "budget": [budget]}, f"{folder}/separate{budget:g}", list(flags))]
    separate = add("separate", alone, jobs[-1])
    table.end("nested/separate with the same jobs: " + ", ".join(f"{name} {nested[name] / separate[name]:.1%}" for name in ("FLOPs", "wall s", "training s")))
    return f"{folder}/nested{jobs[-1]}"


# ---- ideal -------------------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Size:
    """What the products of a step depend on."""
    model: ModelConfig
    shape: tuple           # of the input, items of a dict
    batch: int
    precision: str
    threads: int
    device: str


def typical(call, device):
    """Median seconds of a call, warm."""
    found, began = [], time.perf_counter()
    while len(found) < 5 or time.perf_counter() - began < MEASURED_SECONDS:
        start = mark(device)
        call()
        found.append(between(start, mark(device)))
    return statistics.median(found[2:])


barrier = None   # of the processes that measure at once


def take(shared):
    global barrier
    barrier = shared


def measure(sizes):
    """[(best rate of a linear layer in FLOP/s, seconds of the attention of a step)] of the sizes, in this process."""
    if barrier:
        barrier.wait()   # all processes at once, one task each
    found = []
    for size in sizes:
        torch.set_num_threads(size.threads)
        device, dtype = torch.device(size.device), DTYPES[size.precision]
        linears, attentions = products(size.model, dict(size.shape), size.batch)
        rates = []
        for one in sorted(set(linears)):
            layer = Linear(*one, dtype, device)
            rates.append(layer.flops / typical(layer, device))
        times = {one: typical(Attend(*one, dtype, device), device) for one in set(attentions)}
        found.append((max(rates), sum(times[one] for one in attentions)))
    return found


def measured_together(sizes, jobs):
    """`measure` in so many processes at once: the median of each number over them."""
    if jobs == 1:
        return measure(sizes)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(jobs, take, (context.Barrier(jobs),)) as pool:
        found = pool.map(measure, [sizes] * jobs, chunksize=1)
    return [tuple(map(statistics.median, zip(*numbers))) for numbers in zip(*found)]


def bench_ideal(folder, jobs):
    """The table of the runs in a folder. Raises ValueError where there are none, or they are of another device."""
    device, name = train.find_device("auto")
    names = sorted(path.parent.name for path in Path(folder).glob("*/config.json"))
    if not names:
        raise ValueError(f"{folder}: no runs in it (folders with a config.json)")
    runs = []
    for one in names:
        settings, record = json.loads(Path(folder, one, "config.json").read_text()), last_record(Path(folder, one))
        if record["device"] != name:
            raise ValueError(f"{folder}/{one} was trained on {record['device']}, this is {name}: the ideal is of the machine it is measured on")
        shape = input_shape(DataConfig(**settings["data"]))
        runs.append((one, record, Size(ModelConfig(**settings["model"]), tuple(shape.items()), record["batch"], record["precision"],
                                       record["threads"], device.type)))
    sizes, jobs = list(dict.fromkeys(size for *_, size in runs)), min(jobs, len(runs))
    table = Table("ideal", f"the runs of {folder} on {name}, {jobs} jobs; seconds of training to the last budget",
                  {"model": "<24", "N": "9,d", "steps": "7,d", "GFLOP/s": "8.1f", "best layer": "10.1f", "attention": "9.1f", "real s": "8.1f", "ideal s": "8.1f",
                   "floor s": "8.1f", "real/ideal": "10.2f", "real/floor": "10.2f"}, len(runs) + 1)
    found, total = dict(zip(sizes, measured_together(sizes, jobs))), dict.fromkeys(("real s", "ideal s", "floor s", "flops"), 0.0)
    for one, record, size in runs:
        with torch.device("meta"):
            model = DiT(size.model, **dict(size.shape))
        _, attentions = products(size.model, dict(size.shape), size.batch)
        attention_flops = 3 * sum(4 * q.numel() * k[2] for q, k, _ in attentions)   # of a step
        flops = attention_flops, record["batch"] * model.flops_per_image()
        best, attention = found[size]
        spent = {"real s": record["seconds"], "ideal s": record["steps"] * flops[1] / best,
                 "floor s": record["steps"] * ((flops[1] - flops[0]) / best + attention), "flops": record["steps"] * flops[1]}
        total = {what: total[what] + spent[what] for what in total}
        table.row({"model": one, "N": record["N_blocks"], "steps": record["steps"], **rates(spent), "best layer": best / 1e9, "attention": flops[0] / attention / 1e9})
    table.row({"model": f"all {len(runs)}", **rates(total)})
    table.end("GFLOP/s: of the training, of the best linear layer, and of model.attend alone")


def rates(spent):
    return {**{what: spent[what] for what in ("real s", "ideal s", "floor s")}, "GFLOP/s": spent["flops"] / spent["real s"] / 1e9,
            "real/ideal": spent["real s"] / spent["ideal s"], "real/floor": spent["real s"] / spent["floor s"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", help="an existing sweep, e.g. results/quick")
    parser.add_argument("--jobs", type=positive, nargs="+", help="runs side by side, rising (default: 1 and one a core; on a GPU 1 2 4 8; FOLDER: one a core)")
    parser.error = refuse
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = args.jobs or ([1, 2, 4, 8] if device == "cuda" else sorted({1, cores}))
    try:
        if args.folder:
            bench_ideal(args.folder, jobs[-1])
        else:
            bench_paper()
            with tempfile.TemporaryDirectory() as temporary:
                bench_ideal(bench_grid(temporary, GRIDS[device], jobs), jobs[-1])
    except (ValueError, OSError) as error:
        refuse(train.one_line(error))


if __name__ == "__main__":
    main()
