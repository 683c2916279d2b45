"""Does one learning rate serve all sizes? Two pictures, into results/mup.

    python tests/bench/mup.py coordinates    how far the first steps move activations, over the
                                             width, for all three architectures (a minute)
    python tests/bench/mup.py transfer       the loss over the base learning rate at widths 32 to
                                             256 of one depth, and along the quick family: 80 short
                                             runs of train.py, 15 to 20 minutes on two idle cores
    python tests/bench/mup.py transfer --parametrization sp         one rate for all matrices
    python tests/bench/mup.py transfer --arch mmdit --steps 1000    another one, longer runs

Runs that are done are kept in results/mup/runs and not made again. The best rate is the vertex of a
parabola of ln loss in ln rate through the lowest point and its neighbours; where the lowest lies at
an end of the rates, it is only a bound and is marked so.
"""
import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from data import DataConfig
from model import DiT, ModelConfig
from test_model import ARCHS, changes
from train import TrainConfig, point_folder

FOLDER = ROOT / "results/mup"
FAMILY = [(1, 16), (2, 32), (3, 48), (4, 64)]   # of the quick family, every second size


def coordinates(args):
    """coordinates.png and a table: the change of the last block's output and of the head's."""
    figure, axes = plt.subplots(2, len(ARCHS), figsize=(13, 7.5), sharex=True, sharey=True,
                                layout="constrained")
    for row, parametrization in enumerate(("mup", "sp")):
        for column, arch in enumerate(ARCHS):
            draw_changes(axes[row, column], arch, parametrization, args)
    figure.supxlabel("width")
    figure.supylabel("root mean square change of the activations")
    save(figure, "coordinates.png")


def draw_changes(ax, arch, parametrization, args):
    """One panel: a line over the width for each part after 1, 2, 4 and 8 steps."""
    found = {width: [changes(arch, parametrization, width, seed) for seed in range(args.seeds)]
             for width in args.widths}
    colours = plt.cm.viridis(np.linspace(0, 0.9, 4))
    # Behind a head of zeros nothing moves in the first step.
    for part, style, first in (("block 2", "-", 2), ("head", "--", 1)):
        for step, colour in zip((1, 2, 4, 8), colours):
            if step < first:
                continue
            logs = [[math.log(run[part][step - first]) for run in found[width]]
                    for width in args.widths]
            y = np.exp(np.mean(logs, axis=1))
            slope = np.polyfit(np.log(args.widths), np.log(y), 1)[0]
            ax.plot(args.widths, y, style, marker="o", ms=4, color=colour,
                    label=f"{part}, step {step}: slope {slope:+.2f}")
            numbers = " ".join(f"{value:8.4f}" for value in y)
            print(f"{arch:10} {parametrization:3} {part:8} step {step}: {numbers}"
                  f"   slope {slope:+.2f}")
    ax.set(xscale="log", yscale="log", title=f"{arch}, {parametrization}", xticks=args.widths,
           xticklabels=args.widths)
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.legend(fontsize=7)
    ax.label_outer()


def job_of(args, depth, width, lr, seed):
    """A run of train.py: its flags, the file of its record, and its FLOPs."""
    data = DataConfig()
    with torch.device("meta"):
        model = DiT(ModelConfig(args.arch, depth, width), size=data.resolution,
                    text_tokens=data.text_tokens, text_dim=data.text_dim)
    flops = args.steps * model.flops_per_image()
    budget = float(f"{TrainConfig().batch * flops:.6g}")
    name = f"{args.arch}_{args.parametrization}_depth{depth}_width{width}_lr{lr:g}_seed{seed}"
    out = str(FOLDER / "runs" / name)
    flags = dict(arch=args.arch, parametrization=args.parametrization, depth=depth, width=width,
                 lr=lr, seed=seed, budget=repr(budget), val_images=1024, threads=1, out=out)
    return flags, os.path.join(point_folder(out, budget), "result.json"), flops


def run(job):
    """The validation loss of a run, which is made if it isn't there. A run that diverged: inf."""
    flags, record, _ = job
    if not os.path.exists(record):
        command = [sys.executable, str(ROOT / "train.py")]
        command += [f"--{key}={value}" for key, value in flags.items()]
        done = subprocess.run(command, capture_output=True, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        if not os.path.exists(record):
            said = done.stderr.strip().splitlines() or ["?"]
            print(f"{os.path.basename(flags['out'])}: {said[-1]}", file=sys.stderr)
            return math.inf
    with open(record) as file:
        return json.load(file)["val_loss_ema"]


def losses(args, sizes):
    """{(depth, width): (rates, seeds) array of validation losses}, all after args.steps steps."""
    jobs = [job_of(args, *size, lr, seed)
            for size, lr, seed in itertools.product(sizes, args.lr, range(args.seeds))]
    # The longest first, so that the last ones are short.
    order = sorted(range(len(jobs)), key=lambda k: -jobs[k][2])
    with ThreadPoolExecutor(args.jobs) as pool:
        values = pool.map(run, [jobs[k] for k in order])
        values = list(tqdm(values, total=len(jobs), desc="runs", mininterval=10))
    done = dict(zip(order, values))
    table = np.array([done[k] for k in range(len(jobs))])
    return dict(zip(sizes, table.reshape(len(sizes), len(args.lr), args.seeds)))


def best_rate(rates, loss):
    """Vertex of the parabola through the lowest and its neighbours; whether that is at an end."""
    k = int(np.argmin(loss))
    if k in (0, len(rates) - 1) or not np.isfinite(loss[k - 1:k + 2]).all():
        return rates[k], True
    curve = np.polyfit(np.log(rates[k - 1:k + 2]), np.log(loss[k - 1:k + 2]), 2)
    return math.exp(-curve[1] / 2 / curve[0]), False


def transfer(args):
    """transfer_ARCH_PARAMETRIZATION.png and a table: loss over base rate, one curve a size."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    widths = f"depth {args.depth}, widths {args.widths[0]} to {args.widths[-1]}"
    draw_transfer(axes[0], args, widths, [(args.depth, width) for width in args.widths])
    draw_transfer(axes[1], args, "along the quick family", FAMILY)
    figure.suptitle(f"Learning-rate transfer: {args.arch}, {args.parametrization}, {args.steps} "
                    f"steps of 16 images, seeds: {args.seeds}")
    save(figure, f"transfer_{args.arch}_{args.parametrization}.png")


def draw_transfer(ax, args, title, sizes):
    """One panel, its minima marked, and its rows of the table."""
    print(f"\n{args.arch}, {args.parametrization}, {title}, {args.steps} steps, "
          f"means of {args.seeds} seeds")
    print(" " * 16 + "".join(f"{lr:>10g}" for lr in args.lr) + f"{'best rate':>12}")
    best, colours = {}, plt.cm.viridis(np.linspace(0, 0.9, len(sizes)))
    for (size, runs), colour in zip(losses(args, sizes).items(), colours):
        depth, width = size
        loss = np.exp(np.log(runs).mean(1))
        best[size], at_end = best_rate(args.lr, loss)
        numbers = "".join(f"{value:10.4f}" for value in loss)
        print(f"depth {depth} width {width:<4}{numbers}{best[size]:12.4f}"
              + " (an end of the rates)" * at_end)
        label = f"{depth} x {width}: best {best[size]:.4f}" + " (end)" * at_end
        ax.plot(args.lr, loss / loss.min(), "o-", color=colour, ms=4, label=label)
        ax.plot(args.lr, runs / loss.min(), ".", color=colour, ms=3, alpha=0.5)
        ax.axvline(best[size], color=colour, lw=0.8, ls=":")
    spread = max(best.values()) / min(best.values())
    print(f"largest over smallest best rate: {spread:.2f}")
    ax.set(xscale="log", ylim=(0.98, 1.5), xlabel="base learning rate",
           ylabel="loss over the lowest of its size",
           title=f"{title}: best rates within {spread:.2f}x")
    ax.set_xticks(args.lr, [f"{lr:g}" for lr in args.lr])
    ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    ax.legend(fontsize=8, title="depth x width", title_fontsize=8)


def save(figure, name):
    FOLDER.mkdir(parents=True, exist_ok=True)
    figure.savefig(FOLDER / name, dpi=100)
    print(f"written: results/mup/{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("what", choices=("coordinates", "transfer"))
    parser.add_argument("--arch", choices=ARCHS, default="incontext")
    parser.add_argument("--parametrization", choices=("mup", "sp"), default="mup")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128, 256])
    parser.add_argument("--lr", type=float, nargs="+", default=[0.0015, 0.003, 0.006, 0.012, 0.024])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.what == "coordinates":
        coordinates(args)
    else:
        transfer(args)
