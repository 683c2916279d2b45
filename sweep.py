"""Which models and budgets make a law, and how is the grid run?

    python sweep.py                        the quick grid on this machine, from nothing to law.png
    python sweep.py --dry-run              what it would do: models, steps, FLOPs, time
    python sweep.py --preset paper --dry-run
    python sweep.py --data PATH --out results/mine --budget 1e11 1e12 --width 16 32 64
    python sweep.py --vary arch=incontext,cross,mmdit       a grid for each value, laws compared

A sweep takes any flag of train.py and hands it to every run. It is nothing more than those
commands: one run for each model and seed, to the last budget at which the size is useful, then
`fit.py` on the results. --vary takes any of those flags: captions=dense,sparse, lr=0.003,0.006,
resolution=16,32, aspect=8,16,32 (depth against width at the same N), images=1000,10000,all.
"""
import contextlib
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, fields, replace
from pathlib import Path
from queue import SimpleQueue
from typing import List, Literal, Optional

import torch
from tqdm import tqdm

import train
from data import (DataConfig, check_flags, errors_in_one_line, flag, input_shape,
                  load_data, parse_flags, read_stats)
from fit import PEAK, WINDOW
from model import FAMILY_CONFIG, FAMILY_INPUT, DiT, ModelConfig, family

# The expected law N*(C) = coefficient * C^exponent. It only leaves out sizes that are of no use at
# a budget. paper: its own law. quick: that of the sweep before results/quick.
EXPECTED_OPTIMUM = {"paper": (0.0009, 0.5681), "quick": (0.029, 0.512)}
BUDGETS = {"paper": [1e17, 3e17, 6e17, 1e18, 3e18, 6e18],
           "quick": [6.4e10, 1.28e11, 2.56e11, 5.12e11, 1.024e12, 2.048e12]}
# Sizes within this factor of the expected optimum are trained, 6.5 as it is: fit.py's window, and
# room for the optimum to lie elsewhere. Whoever changes NEAREST there looks at the dry run here.
TRAINED = 1.625 * WINDOW
SEED_REPEATS = {(2, 40): [1]}   # the quick grid repeats its middle size, to measure seed noise
# Not for --vary: what a sweep sets for each run itself, and what changes no law.
NOT_VARIED = ("depth", "width", "seed", *train.TrainConfig.FREE)
H100_FLOPS = 0.4e12 * PEAK["H100"]   # what can't be timed is stated in H100-hours at 40% MFU
FAR = "far from the expected optimum (--window)"   # why most cells are left out
HERE = Path(__file__).resolve().parent

@dataclass(frozen=True)
class SweepConfig:
    preset: Literal["quick", "paper"] = flag("quick", "family, budgets and training defaults")
    out: Optional[str] = flag(None, "folder of the sweep (default: results/my-PRESET)")
    budget: Optional[List[float]] = flag(None, "training FLOPs, rising (default: the preset's)")
    depth: Optional[List[int]] = flag(None, "depths; one for all widths, or one for each")
    width: Optional[List[int]] = flag(
        None, "widths (default: aspect * depth, or the preset's sizes)")
    seeds: Optional[List[int]] = flag(
        None, "seeds of each size (default: 0, and in the quick grid 1 too for the middle size)")
    window: Optional[float] = flag(
        None, f"train a size where the expected optimum is within this factor (default: {TRAINED},"
        f" and {2 * TRAINED:g} where --arch, --resolution or --images leave what it was measured"
        " with)")
    vary: Optional[str] = flag(
        None, "KEY=A,B[,C]: a grid for each value of a flag of train.py, in OUT/KEY_A and so on, "
        "and a comparison in OUT/law")
    jobs: Optional[int] = flag(None, "runs side by side (default: one a GPU, or one a CPU core)")
    dry_run: bool = flag(False, "print the grid and the total, and stop")

    def __post_init__(self):
        check_flags(self, "window", lambda window: window > 1, "above 1")
        check_flags(self, "jobs", lambda jobs: jobs >= 1, "at least 1")
        if self.width and self.depth and len(self.depth) not in (1, len(self.width)):
            raise ValueError(f"--depth has {len(self.depth)} numbers and --width "
                             f"{len(self.width)}: give one depth, or one for each width")

    def folder(self):
        return self.out or f"results/my-{self.preset}"

@dataclass
class Run:
    """One train.py: its command line, and what it costs."""
    name: str
    folder: str
    arguments: list        # the flags of train.py
    configs: list          # what they mean: ModelConfig, DataConfig, TrainConfig
    N: int                 # parameters in the blocks
    steps: dict            # {budget: steps}, rising
    step_flops: float      # in the exact count, which is what takes time
    tokens: int            # of an image
    step_seconds: Optional[float] = None   # where a step was timed

    def last_step(self):
        return max(self.steps.values())

# ---- the plan ------------------------------------------------------------------------------------

def given(flags, name):
    """The value of a flag of train.py on the command line, a string; None where it is not there.

    Once the flags are parsed, a value that was given looks like a default.
    """
    for one, following in zip(flags, [*flags[1:], ""]):
        if one == f"--{name}":
            return following
        if one.startswith(f"--{name}="):
            return one.split("=", 1)[1]

def reshaped(sizes, aspect, head_dim):
    """The sizes with a width near aspect * depth, at the N that they have.

    depth * width^2 stays, as nearly as whole heads allow: a law compares shapes at equal N.
    """
    step = math.lcm(4, head_dim)
    found = []
    for depth, width in sizes:
        volume = depth * width ** 2

        def distance(shape):   # in ln; to miss N costs twice what it costs to miss the aspect
            d, w = shape
            return abs(math.log(w / d / aspect)) + 2 * abs(math.log(d * w ** 2 / volume))
        shapes = [(d, step * max(1, round(math.sqrt(volume / d) / step))) for d in range(1, 129)]
        found.append(min(shapes, key=distance))
    return list(dict.fromkeys(found))   # two sizes may have become one

def sizes_and_seeds(sweep, flags):
    """[(depth, width or None, seed)] of the grid, from --depth, --width, --seeds or the family.

    width None: train.py takes aspect * depth. Raises ValueError for an aspect that is no number.
    """
    if sweep.width:
        depths = sweep.depth or [2]
        sizes = list(zip(depths * len(sweep.width) if len(depths) == 1 else depths, sweep.width))
    elif sweep.depth:
        sizes = [(depth, None) for depth in sweep.depth]
    else:
        sizes = family(sweep.preset)
        if aspect := given(flags, "aspect"):
            usual = FAMILY_CONFIG[sweep.preset].get("head_dim", ModelConfig.head_dim)
            head_dim = given(flags, "head_dim") or usual
            try:
                sizes = reshaped(sizes, int(aspect), int(head_dim))
            except (ValueError, ZeroDivisionError):
                raise ValueError(f"--aspect {aspect} --head_dim {head_dim}: must be whole numbers "
                                 "above 0") from None
    grid = [(*size, seed) for size in sizes for seed in sweep.seeds or [0]]
    # Only the grid that is published repeats a size. What a user chooses is taken as it is.
    if sweep.preset == "quick" and not (sweep.budget or sweep.depth or sweep.width or sweep.seeds):
        grid += [(*size, seed) for size in SEED_REPEATS if size in sizes
                 for seed in SEED_REPEATS[size]]
    return grid

def useful_steps(sweep, configs, model, shape):
    """-> {budget: steps} where a size is of use, and {budget: reason} where it is left out.

    A size is of use where it lies within the window around the expected optimum. That is the
    optimum of incontext models. So a model of another arch is judged by the N of the incontext
    model of its depth and width, which costs about as much, in a wider window.
    """
    model_config, data_config, config = configs
    with torch.device("meta"):   # shapes without memory
        plain = DiT(replace(model_config, arch="incontext"), **shape)
    size = plain.count_parameters()["blocks"]
    # The expected optimum was measured with this arch and resolution, and with endless images.
    measured_with = "incontext", FAMILY_INPUT[sweep.preset]["size"], None
    as_measured = (model_config.arch, shape["size"], data_config.images) == measured_with
    window = sweep.window or (TRAINED if as_measured else 2 * TRAINED)
    coefficient, exponent = EXPECTED_OPTIMUM[sweep.preset]
    steps, left_out = {}, {}
    for budget in config.budget:
        if not 1 / window <= size / (coefficient * budget ** exponent) <= window:
            left_out[budget] = FAR
            continue
        try:
            steps[budget] = train.steps_for(budget, model, config)
        except ValueError as problem:
            left_out[budget] = str(problem)
    return steps, left_out

def plan(sweep, flags):
    """-> the runs of a sweep, and [(depth, width, {budget: reason})] of what is left out.

    A size is trained to the last budget where it is of use. The budgets before come free, because
    they are on the way. Raises ValueError for what can't be run.
    """
    if given(flags, "seed") is not None:
        raise ValueError("--seed is a flag of one run: give the seeds of a sweep as --seeds")
    # The paper's grid can be planned before its latents are there.
    latents_to_come = sweep.preset == "paper" and given(flags, "data") is None
    if latents_to_come and not sweep.dry_run:
        raise ValueError("--preset paper is the grid of a cluster, for prepared images: give them "
                         "as --data, or look at it with --dry-run")
    budgets = [repr(budget) for budget in sweep.budget or BUDGETS[sweep.preset]]   # all digits
    runs, left_out = [], []
    for depth, width, seed in sizes_and_seeds(sweep, flags):
        arguments = ["--preset", sweep.preset, *flags, "--depth", str(depth), "--seed", str(seed)]
        arguments += ["--width", str(width)] if width else []
        configs = parse_flags((ModelConfig, DataConfig, train.TrainConfig), __doc__, train.PRESETS,
                              argv=[*arguments, "--budget", *budgets])
        shape = FAMILY_INPUT["paper"] if latents_to_come else input_shape(configs[1])
        with torch.device("meta"):
            model = DiT(configs[0], **shape)
        steps, reasons = useful_steps(sweep, configs, model, shape)
        left_out.append((depth, configs[0].width, reasons))
        if not steps:
            continue
        name = train.run_name(configs[0], seed)
        folder = os.path.join(sweep.folder(), name)
        if folder in [run.folder for run in runs]:
            raise ValueError(f"{name} is asked for twice (see --width, --depth, --seeds)")
        arguments += ["--budget", *map(repr, steps), "--out", folder]
        # The command line, and the same as configurations: the sweep asks these, the run that.
        configs[2] = replace(configs[2], budget=list(steps), out=folder)
        runs.append(Run(name, folder, arguments, configs, model.count_parameters()["blocks"], steps,
                        configs[2].batch * model.flops_per_image(), sum(model.tokens().values())))
    if not runs:
        reasons = sorted({reason for *_, reasons in left_out for reason in reasons.values()})
        raise ValueError(f"nothing to run (see --budget, --width, --window): {'; '.join(reasons)}")
    return runs, left_out

# ---- what it costs -------------------------------------------------------------------------------

def time_steps(runs, threads):
    """Fill in the seconds of a step of each size, measured on this machine.

    The step is not compiled, since compiling takes longer than the estimate is worth. Steps that
    would take minutes, as those of the paper's grid on a laptop, are not measured.
    """
    before = torch.get_num_threads()
    timed = {}
    for run in tqdm(runs, desc="timing a step of each size", leave=False):
        model_config, data_config, config = run.configs
        on_gpu = train.find_device(config.device)[0].type == "cuda"
        if run.step_flops > (1e15 if on_gpu else 1e11):
            continue
        size = model_config.depth, model_config.width
        if size not in timed:
            if not read_stats(data_config.data):   # a step costs the same on any pixels
                data_config = DataConfig(resolution=data_config.resolution,
                                         text_tokens=data_config.text_tokens,
                                         text_dim=input_shape(data_config)["text_dim"])
            plain = replace(config, compile="off", threads=config.threads or threads,
                            val_images=None)
            state = train.TrainState(model_config, data_config, plain)
            if state.step_flops != run.step_flops:   # of latents that are not there yet
                continue
            seconds = []
            for batch in train.batches(state, 1, 5):
                start = time.perf_counter()
                train.train_step(state, batch).item()
                seconds.append(time.perf_counter() - start)
            timed[size] = statistics.median(seconds)   # the first ones allocate memory
        run.step_seconds = timed[size]
    torch.set_num_threads(before)

def cost_of(run):
    """Seconds of a run to its end: of this machine where a step was timed, else of an H100."""
    return run.last_step() * (run.step_seconds or run.step_flops / H100_FLOPS)

def print_plan(runs):
    """The grid as a table, a line a point. FLOPs and time are what its budget adds to the last."""
    heads = ("budget", "D (tokens)", "images", "steps", "FLOPs added", "time added")
    print(f"{'model':>24} {'N':>11}", *(f"{head:>12}" for head in heads))
    separate = 0
    for run in runs:
        before = 0   # the steps of the budget before, through which the run passes on its way
        for budget, steps in run.steps.items():
            added = steps - before
            hours = added * run.step_flops / H100_FLOPS / 3600
            timed = run.step_seconds is not None
            spent = f"{added * run.step_seconds:.0f} s" if timed else f"{hours:.3g} H100-h"
            images = steps * run.configs[2].batch
            print(f"{run.name:>24} {run.N:11,d} {budget:12.3g} {images * run.tokens:12.4g} "
                  f"{images:12,d} {steps:12,d} {added * run.step_flops:12.3e} {spent:>12}")
            separate += steps * run.step_flops
            before = steps
    total = sum(run.last_step() * run.step_flops for run in runs)
    points = sum(len(run.steps) for run in runs)
    print(f"total: {len(runs)} runs, {points} points, {total:.3g} FLOPs ({total / separate:.0%} of "
          f"the {separate:.3g} of separate runs)")

def print_left_out(runs, left_out):
    """A line for each size that is not read at every budget, and for each budget of few sizes."""
    lines = {}   # a size may stand there twice, with two seeds
    for depth, width, reasons in left_out:
        for budget, reason in reasons.items():
            short = reason if reason == FAR else "too few steps"
            lines.setdefault((depth, width, short), {})[f"{budget:.3g}"] = None
    for (depth, width, reason), budgets in lines.items():
        print(f"left out: depth {depth}, width {width} at {', '.join(budgets)}: {reason}")
    for budget in sorted({budget for run in runs for budget in run.steps}):
        sizes = len({run.N for run in runs if budget in run.steps})
        if sizes < 4:
            print(f"budget {budget:.3g} keeps {sizes} size{'s' * (sizes > 1)}: "
                  "fit.py needs 4 to use it")

def estimate(todo, jobs, threads):
    """A line: how long these runs will take, side by side."""
    if any(run.step_seconds is None for run in todo):
        return f"estimated time: {sum(map(cost_of, todo)) / 3600:,.0f} H100-hours at 40% MFU"
    costs = [cost_of(run) for run in todo]
    # The jobs share the work evenly, but no sweep ends before its longest run.
    longest = max([sum(costs) / jobs, *costs]) / 60
    return (f"estimated time: {longest:.0f} minutes of training, {jobs} jobs of {threads} "
            f"thread{'s' * (threads > 1)}; validation and pictures add about a fifth")

# ---- running it ----------------------------------------------------------------------------------

def is_done(run, encoders):
    """Are all its records there? Raises ValueError for a folder of another configuration."""
    model_config, data_config, config = run.configs
    config = train.resolve_auto(config, model_config)
    definition = train.definition_of(model_config, data_config, config, encoders)
    train.check_earlier_run(run.folder, definition)
    # A list, not a generator: each record is read, so that a torn one is named now.
    return all([train.read_record(run.folder, budget) for budget in run.steps])

def progress(run):
    """Steps that a run has done, from the last whole line of its log; 0 where there is none yet."""
    with contextlib.suppress(OSError, IndexError, ValueError):   # not begun, or just being written
        with open(os.path.join(run.folder, "log.jsonl"), "rb") as log:
            log.seek(max(0, os.path.getsize(log.name) - 1000))   # a line has fewer bytes than that
            return json.loads(log.read().split(b"\n")[-2])["step"]
    return 0

def train_one(run, gpus, threads, running, stopping):
    """Run train.py on the next free GPU, and once more if it fails. -> None, or why it failed.

    What it prints goes to output.txt in its folder. A second try mends a machine's passing trouble;
    for bad input (status 2) there is none, nor where the sweep is `stopping` (an Event).
    running: {folder: process}, for whoever must end them.
    """
    os.makedirs(run.folder, exist_ok=True)
    gpu = gpus.get()
    # A run is one process, also where the sweep was started by a launcher of many.
    environment = {name: value for name, value in os.environ.items()
                   if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = str(threads)
    environment |= {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}   # its only one: cuda:0
    command = [sys.executable, str(HERE / "train.py"), *run.arguments]
    if given(run.arguments, "threads") is None:
        command += ["--threads", str(threads)]
    for _ in range(2):
        with open(os.path.join(run.folder, "output.txt"), "a+", errors="replace") as output:
            with subprocess.Popen(command, stdout=output, stderr=output, env=environment) as child:
                running[run.folder] = child
                status = child.wait()
            output.seek(0)
            said = output.read().strip().splitlines() or ["no output"]
        del running[run.folder]
        if status in (0, 2) or stopping.is_set():
            break
    gpus.put(gpu)
    if status and not stopping.is_set():
        tqdm.write(f"{run.name} failed (exit {status}): {said[-1]}")
        return said[-1]

def run_all(runs, jobs, threads):
    """Train all runs, the longest first, `jobs` at a time. -> those that failed."""
    # A queue of GPU names, one for each job (None on a CPU): a run takes one and gives it back.
    gpus, running, stopping = SimpleQueue(), {}, threading.Event()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpu_count(runs))))
    devices = visible.split(",") if gpu_count(runs) else [None]
    for job in range(jobs):
        gpus.put(devices[job % len(devices)])
    total = sum(map(cost_of, runs))
    # A long run that starts last would leave the other jobs idle at the end.
    waiting = sorted(runs, key=cost_of, reverse=True)
    pool = ThreadPoolExecutor(jobs)
    futures = {pool.submit(train_one, run, gpus, threads, running, stopping): run
               for run in waiting}
    with tqdm(total=100, desc="grid", unit="%", smoothing=0.02,
              mininterval=0.5 if sys.stderr.isatty() else 30,
              bar_format="{l_bar}{bar}| {elapsed}, {remaining} to go{postfix}") as bar:
        try:
            pending = futures
            while pending:
                _, pending = wait(pending, timeout=0.5)
                # The bar counts cost, not runs: so its time to go holds while runs differ.
                spent = sum(cost_of(run) * progress(run) / run.last_step() for run in runs)
                names = ", ".join(os.path.basename(folder) for folder in list(running))
                bar.set_postfix_str(f"{len(runs) - len(pending)} of {len(runs)} runs done, "
                                    f"now {names}", refresh=False)
                bar.update(min(100, 100 * spent / total) - bar.n)
        finally:   # an interrupted sweep ends its runs, which go on with the same command
            stopping.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(running.values()):
                child.terminate()
    return [run for future, run in futures.items() if future.result()]

def gpu_count(runs):
    """How many GPUs these runs may use."""
    return 0 if runs[0].configs[2].device == "cpu" else torch.cuda.device_count()

def run_sweep(sweep, flags):
    """Plan, check, run and fit. -> exit status: that of fit.py, or 1 where a run failed."""
    runs, left_out = plan(sweep, flags)
    # On a cluster a process may have been given a part of the cores.
    schedulable = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))
    cores = len(schedulable(0))
    jobs = min(sweep.jobs or gpu_count(runs) or cores, len(runs))
    threads = max(1, cores // jobs)
    todo = runs
    if not sweep.dry_run:
        # What is wrong with the data fails here rather than in every run.
        data = load_data(runs[0].configs[1])
        todo = [run for run in runs if not is_done(run, data.encoders)]
    time_steps(todo, threads)
    if sweep.dry_run:
        print_plan(runs)
        print_left_out(runs, left_out)
        print(estimate(todo, jobs, threads))
        return 0
    print_left_out(runs, left_out)
    print(f"{sweep.folder()}: {len(runs)} runs, {sum(len(run.steps) for run in runs)} points; "
          f"{len(runs) - len(todo)} runs are done")
    failed = []
    if todo:
        print(estimate(todo, jobs, threads))
        began = time.monotonic()
        failed = run_all(todo, jobs, threads)
        print(f"trained in {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        print(f"sweep.py: failed: {', '.join(run.name for run in failed)} (see output.txt in their "
              "folders); the same command tries them again. The law of the others:",
              file=sys.stderr)
    status = call_fit(sweep, sweep.folder())
    return 1 if failed else status

def varied(sweep, flags):
    """--vary KEY=A,B -> (SweepConfig, flags) of the grid of each value. Raises ValueError."""
    key, _, values = sweep.vary.partition("=")
    values = values.split(",")
    known = [one.name for config in (ModelConfig, DataConfig, train.TrainConfig)
             for one in fields(config) if one.name not in NOT_VARIED]
    if key not in known:
        raise ValueError(f"--vary {sweep.vary}: {key or 'nothing'} can't be varied, these can: "
                         f"{', '.join(known)}")
    # Names that no shell stumbles over.
    folders = [re.sub(r"[^\w.+-]+", "-", f"{key}_{value}") for value in values]
    if len(values) < 2 or "" in values or len(set(folders)) < len(folders):
        raise ValueError(f"--vary {sweep.vary}: needs two or more different values, as in "
                         "--vary lr=0.003,0.006")
    if given(flags, key) is not None:
        raise ValueError(f"--vary {key} gives its own --{key} to each grid: leave that one out")
    if key == "aspect" and (sweep.depth or sweep.width):
        raise ValueError("--vary aspect gives its own --depth and --width to each grid")
    out = sweep.out or f"results/my-{key}"
    # One window for all values, to compare like with like: the wider where some need it.
    wide = 2 * TRAINED if key in ("arch", "resolution", "images") else None
    grids = []
    for folder, value in zip(folders, values):
        one = replace(sweep, vary=None, out=os.path.join(out, folder),
                                  window=sweep.window or wide)
        extra = [] if (key, value) == ("images", "all") else [f"--{key}={value}"]
        grids.append((one, [*flags, *extra]))
    return grids

def run_varied(sweep, flags):
    """A grid for each value of --vary, then their laws side by side. -> exit status."""
    grids = varied(sweep, flags)
    for one, its_flags in grids:   # what is wrong with the last shows before the first is trained
        runs, _ = plan(one, its_flags)
        if not sweep.dry_run:
            load_data(runs[0].configs[1])
    statuses = []
    for one, its_flags in grids:
        print(f"\n{one.out}: {its_flags[-1] if its_flags != flags else 'all images'}")
        statuses.append(run_sweep(one, its_flags))
    if sweep.dry_run:
        return 0
    first, *others = [one.out for one, _ in grids]
    law = os.path.join(os.path.dirname(first), "law")
    status = call_fit(sweep, first, "--compare", *others, "--out", law)
    return 1 if 1 in statuses else status

def call_fit(sweep, *arguments):
    """Run fit.py as a user would. -> its exit status."""
    metric = ["--metric", "train_loss"] if sweep.preset == "paper" else []
    return subprocess.call([sys.executable, str(HERE / "fit.py"), *arguments, *metric])

def main():
    sweep, flags = parse_flags((SweepConfig,), __doc__, rest=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))   # so that the runs are ended too
    with errors_in_one_line("sweep.py"):
        try:
            sys.exit((run_varied if sweep.vary else run_sweep)(sweep, flags))
        except KeyboardInterrupt:
            print("sweep.py: interrupted; the same command goes on", file=sys.stderr)
            sys.exit(130)

if __name__ == "__main__":
    main()
