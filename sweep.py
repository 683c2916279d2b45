"""Which models and budgets make a law, and how is the grid run?

    python sweep.py                        the quick grid on this machine, from nothing to law.png
    python sweep.py --dry-run              what it would do: models, steps, FLOPs, time
    python sweep.py --preset paper --dry-run
    python sweep.py --data PATH --out results/mine --budget 1e11 1e12 --width 16 32 64
    python sweep.py --vary arch=incontext,cross,mmdit       an experiment: a grid for each value, and their laws compared

Any flag of train.py can be given, and goes to every run. A sweep is nothing more than those commands: one run
per model and seed, each to the last budget at which its size is useful, then `fit.py` on the results. --vary takes any of
those flags: captions=dense,sparse, lr=0.003,0.006,0.012, resolution=16,32, t_sampling=logit_normal,uniform, aspect=8,16,32
(depth against width at the same N) and images=1000,10000,all (so many training images, seen again and again).
"""
import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import List, Literal, Optional

import torch
from tqdm import tqdm

import flow
import train
from data import DataConfig, input_shape, load_data, parse_flags, read_stats
from model import FAMILY_CONFIG, FAMILY_INPUT, DiT, ModelConfig, family

# Where the law is expected, N*(C) = coefficient * C^exponent, only to leave out sizes that are of no use at a budget:
# paper, its own law; quick, that of the sweep before results/quick (which then measured 0.022 and 0.523).
EXPECTED_OPTIMUM = {"paper": (0.0009, 0.5681), "quick": (0.029, 0.512)}
BUDGETS = {"paper": [1e17, 3e17, 6e17, 1e18, 3e18, 6e18], "quick": [6.4e10, 1.28e11, 2.56e11, 5.12e11, 1.024e12, 2.048e12]}
WINDOW = 6.5  # a size is read where it is within this factor of the expected optimum, or twice that where little is known of it
SEED_REPEATS = {(2, 40): [1]}  # the quick grid measures its own seed noise on the size in the middle
# Not for --vary: what a sweep itself sets for each run, and what changes no law.
NOT_VARIED = ("depth", "width", "budget", "seed", "out", "preset", "device", "threads", "allow_drift")
# Models of fewer parameters leave most of a GPU idle, however their launches are saved: so many train side by side on one.
# Not yet measured on a GPU: `python tests/bench/grid.py` is the measurement.
SMALL_ON_GPU, PACKED = 1e7, 4
H100_FLOPS = 989e12 * 0.4  # a dry run on a laptop states the paper's grid in hours of this device at 40% MFU


@dataclass(frozen=True)
class SweepConfig:
    preset: Literal["quick", "paper"] = field(default="quick", metadata={"help": "the family, budgets and training defaults"})
    out: Optional[str] = field(default=None, metadata={"help": "folder of the sweep (default: results/my-PRESET)"})
    budget: Optional[List[float]] = field(default=None, metadata={"help": "training FLOPs, rising (default: the preset's)"})
    depth: Optional[List[int]] = field(default=None, metadata={"help": "depths; one for all widths, or one for each"})
    width: Optional[List[int]] = field(default=None, metadata={"help": "widths (default: aspect * depth, or the preset's sizes)"})
    seeds: Optional[List[int]] = field(default=None, metadata={
        "help": "each size is run with each of these seeds (default: 0, and in the quick grid the middle size also with 1)"})
    window: Optional[float] = field(default=None, metadata={
        "help": "read a size only at the budgets whose expected optimum is within this factor of it (default: 6.5, and 13 where "
                "--arch, --resolution or --images are others than those that it was measured with)"})
    vary: Optional[str] = field(default=None, metadata={
        "help": "KEY=A,B[,C]: a grid for each value of a flag of train.py, in OUT/KEY_A and so on, and a comparison in OUT/law"})
    jobs: Optional[int] = field(default=None, metadata={"help": f"runs side by side (default: one a CPU core; on a GPU {PACKED} of fewer than {SMALL_ON_GPU:.0e} parameters, or one larger)"})
    dry_run: bool = field(default=False, metadata={"help": "print the grid and the total, and stop"})

    def __post_init__(self):
        if self.budget is not None and any(b >= c for b, c in zip(self.budget, self.budget[1:])):
            raise ValueError(f"--budget {' '.join(f'{b:g}' for b in self.budget)}: budgets must rise")
        if self.window is not None and self.window <= 1:
            raise ValueError(f"--window {self.window:g}: must be above 1")
        if self.jobs is not None and self.jobs < 1:
            raise ValueError(f"--jobs {self.jobs}: must be at least 1")
        if self.width and self.depth and len(self.depth) not in (1, len(self.width)):
            raise ValueError(f"--depth has {len(self.depth)} numbers and --width {len(self.width)}: give one depth, or one for each")


@dataclass
class Run:
    """One train.py: its command line, what it will cost, how it goes."""
    name: str
    folder: str
    arguments: list        # the flags of train.py
    configs: tuple         # ModelConfig, DataConfig, TrainConfig
    N: int
    steps: dict            # {budget: steps}
    step_flops: float      # exact count, the one that takes time
    tokens: int
    shape: dict            # of the input: channels, size, text_tokens, text_dim
    step_seconds: Optional[float] = None
    process: Optional[subprocess.Popen] = None
    places: int = 1        # of those that a device has, how many the run takes
    device: int = 0        # which GPU (0 on a CPU)
    tries: int = 0
    status: str = "waiting"


def given(flags, name):
    """The value that a flag of train.py has on the command line, a string; None where it is not there."""
    for flag, following in zip(flags, [*flags[1:], ""]):
        if flag == f"--{name}" or flag.startswith(f"--{name}="):
            return following if flag == f"--{name}" else flag.split("=", 1)[1]


def reshaped(sizes, aspect, head_dim):
    """The sizes with width near aspect * depth at the N that they have: depth * width^2 stays, as nearly as heads allow."""
    found, step = [], math.lcm(4, head_dim)
    for depth, width in sizes:
        volume = depth * width ** 2
        shapes = [(d, step * max(1, round(math.sqrt(volume / d) / step))) for d in range(1, 129)]
        found.append(min(shapes, key=lambda shape: abs(math.log(shape[1] / shape[0] / aspect))
                         + 2 * abs(math.log(shape[0] * shape[1] ** 2 / volume))))
    return list(dict.fromkeys(found))


def plan(sweep, flags):
    """The runs of a sweep, and the cells that are left out with the reason. Raises ValueError for what can't be run.

    A size is read at the budgets whose expected optimum is within a factor `window` of its N, so it is trained to the last
    of them and no further; all others come free, because they are on the way. A cell of too few steps is left out. The
    optimum is one of incontext models: of another arch a size is judged by the N of the incontext model of its depth and
    width, which costs about as much, and the window is wider.
    """
    budgets = sweep.budget or BUDGETS[sweep.preset]
    if sweep.width:
        depths = sweep.depth or [2]
        sizes = list(zip(depths * len(sweep.width) if len(depths) == 1 else depths, sweep.width))
    else:
        sizes = [(depth, None) for depth in sweep.depth] if sweep.depth else family(sweep.preset)
        if (aspect := given(flags, "aspect")) and not sweep.depth:
            head_dim = given(flags, "head_dim") or FAMILY_CONFIG[sweep.preset].get("head_dim", ModelConfig.head_dim)
            if not (aspect.isdigit() and str(head_dim).isdigit() and int(aspect) and int(head_dim)):
                raise ValueError(f"--aspect {aspect} --head_dim {head_dim}: must be whole numbers above 0")
            sizes = reshaped(sizes, int(aspect), int(head_dim))
    grid = [(*size, seed, budgets) for size in sizes for seed in sweep.seeds or [0]]
    if sweep.preset == "quick" and not (sweep.budget or sweep.depth or sweep.width or sweep.seeds):
        grid += [(*size, seed, budgets) for size, seeds in SEED_REPEATS.items() if size in sizes for seed in seeds]
    has_data = given(flags, "data") is not None
    if given(flags, "seed") is not None:
        raise ValueError("--seed is a flag of one run: give the seeds of a sweep as --seeds")
    if sweep.preset == "paper" and not has_data and not sweep.dry_run:
        raise ValueError("--preset paper is the grid of a cluster, for prepared images: give them as --data, or look at it with --dry-run")
    coefficient, exponent = EXPECTED_OPTIMUM[sweep.preset]
    runs, left_out = [], []
    for depth, width, seed, budgets in grid:
        arguments = ["--preset", sweep.preset, *flags, "--depth", str(depth), *(["--width", str(width)] if width else []),
                     "--seed", str(seed), "--budget", *map(repr, budgets)]
        configs = parse_flags((ModelConfig, DataConfig, train.TrainConfig), __doc__, train.PRESETS, argv=arguments)
        model_config, data_config, config = configs
        shape = FAMILY_INPUT["paper"] if sweep.preset == "paper" and not has_data else input_shape(data_config)
        with torch.device("meta"):
            models = {arch: DiT(dataclasses.replace(model_config, arch=arch), **shape) for arch in {model_config.arch, "incontext"}}
        N, model, steps = {arch: one.count_parameters()["blocks"] for arch, one in models.items()}, models[model_config.arch], {}
        as_measured = (model_config.arch, shape["size"], data_config.images) == ("incontext", FAMILY_INPUT[sweep.preset]["size"], None)
        window = sweep.window or (WINDOW if as_measured else 2 * WINDOW)
        for budget in budgets:
            optimum = coefficient * budget ** exponent
            if not optimum / window <= N["incontext"] <= optimum * window:
                left_out.append((model_config, budget, f"the optimum is near {optimum:.2g} parameters"))
                continue
            try:
                steps[budget] = train.steps_for(budget, model, config)
            except ValueError as problem:
                left_out.append((model_config, budget, str(problem)))
        if not steps:
            continue
        name = train.run_name(model_config, seed)
        folder = os.path.join(sweep.out or f"results/my-{sweep.preset}", name)
        arguments = arguments[:arguments.index("--budget")] + ["--budget", *map(repr, steps), "--out", folder]
        runs.append(Run(name, folder, arguments, configs, N[model_config.arch], steps, config.batch * model.flops_per_image(),
                        sum(model.tokens().values()), shape))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is asked for twice (see --width, --depth, --seeds)")
    if not runs:
        raise ValueError(f"nothing to run (see --budget, --width, --window): {'; '.join(sorted({reason for *_, reason in left_out}))}")
    return runs, left_out


def time_steps(runs, threads):
    """Seconds of a training step of each size, by taking a few on this machine, not compiled. None where a step is too large to try."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    timed = {}
    for run in tqdm(runs, desc="timing a step of each size", leave=False):
        model_config, data_config, config = run.configs
        device, _ = train.find_device(config.device)
        # A step costs the same on any pixels; prepared latents are read as they come.
        scenes = DataConfig(resolution=data_config.resolution, text_tokens=data_config.text_tokens, text_dim=data_config.text_dim or 64)
        data = load_data(data_config if read_stats(data_config.data) else scenes, 0, device)
        if run.step_flops > (1e15 if device.type == "cuda" else 1e11) or run.shape != data.shape:
            continue
        if (model_config.depth, model_config.width) not in timed:
            model = DiT(model_config, **data.shape).to(device)
            optimizer = torch.optim.AdamW(model.parameter_groups(config.lr), fused=True)
            seconds = []
            for step in range(1, 6):
                start = time.perf_counter()
                batch = train.training_batch(data, config, step, 0, 1, device)
                with train.autocast(device, train.resolve_auto(config, model_config).precision):
                    loss = flow.loss_per_image(model, *batch).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            timed[model_config.depth, model_config.width] = sorted(seconds)[2]
        run.step_seconds = timed[model_config.depth, model_config.width]
    torch.set_num_threads(before)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()   # the runs need it


def print_plan(runs, left_out, jobs, threads):
    """The grid as a table, a line a cell; FLOPs and time of a line are what its budget adds to the one before."""
    print(f"{'model':>24} {'N':>11} {'budget':>9} {'D (tokens)':>11} {'images':>11} {'steps':>8} {'FLOPs added':>12} {'time added':>11}")
    total = separate = 0
    for run in runs:
        before = 0
        for budget, steps in run.steps.items():
            added = (steps - before) * run.step_flops
            spent = f"{(steps - before) * run.step_seconds:9.0f} s" if run.step_seconds else f"{added / H100_FLOPS / 3600:7.3g} H100-h"
            images = steps * run.configs[2].batch
            print(f"{run.name:>24} {run.N:11,d} {budget:9.3g} {images * run.tokens:11.4g} {images:11,d} {steps:8,d} {added:12.3e} {spent:>11}")
            separate += steps * run.step_flops
            before = steps
        total += before * run.step_flops
    print_left_out(runs, left_out)
    cells = sum(len(run.steps) for run in runs)
    print(f"total: {len(runs)} runs, {cells} points, {total:.3g} FLOPs ({total / separate:.0%} of the {separate:.3g} of separate runs)")
    print(estimate(runs, jobs, threads))


def print_left_out(runs, left_out):
    """A line for each size that is not read at every budget, and one for each budget with too few sizes for a parabola."""
    sizes = {}
    for config, budget, reason in left_out:
        far = reason.startswith("the optimum")
        sizes.setdefault((config.depth, config.width, "far from the expected optimum (--window)" if far else "too few steps"), []).append(budget)
    for (depth, width, reason), budgets in sizes.items():
        print(f"left out: depth {depth}, width {width} at {', '.join(f'{budget:.3g}' for budget in sorted(set(budgets)))}: {reason}")
    for budget in sorted({budget for run in runs for budget in run.steps}):
        count = len({run.N for run in runs if budget in run.steps})
        if count < 4:
            print(f"budget {budget:.3g} keeps {count} size{'s' * (count > 1)}: fit.py needs 4 to use it")


def estimate(runs, jobs, threads):
    """A line: how long the runs that wait will take, from the timed steps, or in H100-hours where no step could be timed."""
    if any(run.step_seconds is None for run in runs if run.status == "waiting"):
        hours = sum(max(run.steps.values()) * run.step_flops for run in runs) / H100_FLOPS / 3600
        return f"estimated time: {hours:,.0f} H100-hours at 40% MFU"
    seconds = [max(run.steps.values()) * run.step_seconds for run in runs if run.status == "waiting"]
    shares = [run.places * its for run, its in zip([run for run in runs if run.status == "waiting"], seconds)]
    return (f"estimated time: {max([sum(shares) / jobs, *seconds]) / 60:.0f} minutes of training, {jobs} jobs of {threads} "
            f"thread{'s' * (threads > 1)}; validation and pictures add about a fifth")


def check_folder(run, encoders):
    """Raises ValueError where the folder belongs to another configuration or holds a torn record. -> all budgets done?"""
    definition = train.definition_of(*run.configs[:2], train.resolve_auto(run.configs[2], run.configs[0]), encoders)
    train.check_earlier_run(run.folder, definition)
    return all([train.read_record(os.path.join(train.point_folder(run.folder, budget), "result.json"), budget) is not None
                for budget in run.steps])


def progress(run):
    """Steps that a run has done, from the last whole line of its log."""
    if run.status == "done":
        return max(run.steps.values())
    try:
        with open(os.path.join(run.folder, "log.jsonl"), "rb") as file:
            file.seek(max(0, os.path.getsize(file.name) - 1000))
            return json.loads(file.read().split(b"\n")[-2])["step"]
    except (OSError, IndexError, json.JSONDecodeError, KeyError, TypeError):
        return 0


def start(run, device, threads):
    """Start train.py for a run on a device (the number of a GPU); what it prints goes to output.txt in its folder."""
    os.makedirs(run.folder, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = str(threads)
    if torch.cuda.is_available():
        gpus = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = gpus if gpus != [""] else [str(number) for number in range(torch.cuda.device_count())]
        environment["CUDA_VISIBLE_DEVICES"] = gpus[device]
    command = [sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "train.py"), *run.arguments]
    if not any(argument.split("=")[0] == "--threads" for argument in run.arguments):
        command += ["--threads", str(threads)]
    with open(os.path.join(run.folder, "output.txt"), "a") as output:
        run.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    run.device, run.tries, run.status = device, run.tries + 1, "running"


def free_device(run, running, devices, places):
    """The least busy device with room for the run, or None. A device has `places`; a run takes one of them, or all."""
    taken = [sum(other.places for other in running if other.device == device) for device in range(devices)]
    return min((device for device in range(devices) if taken[device] + run.places <= places), key=taken.__getitem__, default=None)


def run_all(runs, jobs, threads, devices=1, places=None):
    """Run the grid, the longest first, at most `jobs` at a time; a run that fails is tried once more. -> the runs that failed."""
    todo = [run for run in runs if run.status == "waiting"]
    if not todo:
        return []
    timed = all(run.step_seconds for run in todo)   # then the bar counts time, else FLOPs
    cost = {run.name: run.step_seconds if timed else run.step_flops for run in todo}
    total = sum(max(run.steps.values()) * cost[run.name] for run in todo)
    share = lambda: min(100, 100 * sum(progress(run) * cost[run.name] for run in todo) / total)
    waiting = sorted(todo, key=lambda run: -max(run.steps.values()) * cost[run.name])
    running, failed = [], []
    with tqdm(total=100, initial=share(), desc="grid", unit="%", smoothing=0.02, mininterval=0.5 if sys.stderr.isatty() else 30,
              bar_format="{l_bar}{bar}| {elapsed}, {remaining} to go{postfix}") as bar:
        try:
            while waiting or running:
                # Only the first in line may start, or small ones would keep a large one waiting for ever.
                while waiting and len(running) < jobs and (device := free_device(waiting[0], running, devices, places or jobs)) is not None:
                    run = waiting.pop(0)
                    start(run, device, threads)
                    running.append(run)
                time.sleep(0.5)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    if run.process.returncode == 0:
                        run.status = "done"
                        continue
                    with open(os.path.join(run.folder, "output.txt"), errors="replace") as output:
                        reason = (output.read().strip().splitlines() or ["no output"])[-1]
                    again = run.tries < 2 and run.process.returncode != 2   # 2: bad input, which no second try mends
                    bar.write(f"{run.name} failed (exit {run.process.returncode}): {reason}" + ("; trying once more" if again else ""))
                    run.status = "waiting" if again else "failed"
                    (waiting if again else failed).append(run)
                finished = sum(run.status == "done" for run in runs)
                bar.set_postfix_str(f"{finished} of {len(runs)} runs done" + (", now " if running else "")
                                    + ", ".join(run.name for run in running), refresh=False)
                bar.update(share() - bar.n)
        finally:
            for run in running:
                run.process.terminate()
    return failed


def run_sweep(sweep, flags):
    """Plan, check, run and fit; -> exit status: that of fit.py, or 1 where a run failed."""
    out = sweep.out or f"results/my-{sweep.preset}"
    runs, left_out = plan(sweep, flags)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = torch.cuda.device_count() if runs[0].configs[2].device != "cpu" else 0
    devices = min(gpus or 1, sweep.jobs or len(runs))
    jobs = min(sweep.jobs or (devices * PACKED if gpus else cores), len(runs))
    places = math.ceil(jobs / devices)
    for run in runs:
        run.places = places if gpus and not sweep.jobs and run.N >= SMALL_ON_GPU else 1
    threads = max(1, cores // jobs)
    if not sweep.dry_run:
        data = load_data(runs[0].configs[1])  # fails here rather than in every run, and leaves real images in the cache of datasets
        train.count_validation(data, runs[0].configs[2].val_images)
        for run in runs:
            run.status = "done" if check_folder(run, data.encoders) else "waiting"
    time_steps([run for run in runs if run.status == "waiting"], threads)
    if sweep.dry_run:
        print_plan(runs, left_out, jobs, threads)
        return 0
    print_left_out(runs, left_out)
    print(f"{out}: {len(runs)} runs, {sum(len(run.steps) for run in runs)} points; "
          f"{sum(run.status == 'done' for run in runs)} runs are done\n{estimate(runs, jobs, threads)}")
    began = time.monotonic()
    failed = run_all(runs, jobs, threads, devices, places)
    hours = (time.monotonic() - began) / 3600
    print(f"trained in {60 * hours:.1f} minutes" + (f", {hours * devices:.2f} device-hours" if gpus else ""))
    if failed:
        print(f"sweep.py: failed: {', '.join(run.name for run in failed)} (see output.txt in their folders); "
              f"the same command tries them again. The law of the others:", file=sys.stderr)
    status = call_fit(sweep, out)
    return 1 if failed else status


def varied(sweep, flags):
    """--vary KEY=A,B,... -> (SweepConfig, flags) of the grid of each value. Raises ValueError for what can't be varied."""
    key, _, values = sweep.vary.partition("=")
    values = values.split(",")
    fields = [f.name for config in (ModelConfig, DataConfig, train.TrainConfig) for f in dataclasses.fields(config)]
    known = [name for name in fields if name not in NOT_VARIED]
    if key not in known:
        raise ValueError(f"--vary {sweep.vary}: {key or 'nothing'} can't be varied, these can: {', '.join(known)}")
    folders = [re.sub(r"[^\w.+-]+", "-", f"{key}_{value}") for value in values]   # names that no shell stumbles over
    if len(values) < 2 or "" in values or len(set(folders)) < len(folders):
        raise ValueError(f"--vary {sweep.vary}: needs two or more different values, as in --vary lr=0.003,0.006")
    if given(flags, key) is not None or key == "aspect" and (sweep.depth or sweep.width):
        raise ValueError(f"--vary {key}: gives its own --{key} to each grid" + ", and its own depths and widths" * (key == "aspect"))
    out = sweep.out or f"results/my-{key}"
    # One window for all values, to compare like with like: the wider where some of them need it.
    window = sweep.window or (2 * WINDOW if key in ("arch", "resolution", "images") else None)
    return [(dataclasses.replace(sweep, vary=None, out=os.path.join(out, folder), window=window),
             [*flags, *([] if (key, value) == ("images", "all") else [f"--{key}={value}"])]) for folder, value in zip(folders, values)]


def run_varied(sweep, flags):
    """A grid for each value of --vary, then their laws side by side; -> exit status: that of the comparison, or 1 where a run failed."""
    grids = varied(sweep, flags)
    for one, its_flags in grids:   # what is wrong with the last of them is better known before the first is trained
        runs, _ = plan(one, its_flags)
        if not sweep.dry_run:
            load_data(runs[0].configs[1])
    statuses = []
    for one, its_flags in grids:
        print(f"\n{one.out}: {its_flags[-1] if its_flags != flags else 'all images'}")
        statuses.append(run_sweep(one, its_flags))
    if sweep.dry_run:
        return 0
    folders = [one.out for one, _ in grids]
    status = call_fit(sweep, folders[0], "--compare", *folders[1:], "--out", os.path.join(os.path.dirname(folders[0]), "law"))
    return 1 if 1 in statuses else status


def call_fit(sweep, *arguments):
    metric = ["--metric", "train_loss"] if sweep.preset == "paper" else []
    return subprocess.call([sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "fit.py"), *arguments, *metric])


def main():
    sweep, flags = parse_flags((SweepConfig,), __doc__, rest=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the runs are ended too
    try:
        sys.exit((run_varied if sweep.vary else run_sweep)(sweep, flags))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"sweep.py: {train.one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    except KeyboardInterrupt:
        print("sweep.py: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
