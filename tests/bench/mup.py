"""Does one learning rate serve all sizes? Two pictures, into results/mup.

    python tests/bench/mup.py coordinates      how far the first steps move activations, over the width, for all three archs (a minute)
    python tests/bench/mup.py transfer         the loss over the base learning rate at widths 32 to 256 of one depth, and along the
                                               quick family: 80 short runs of train.py, 15 to 20 minutes on two idle cores
    python tests/bench/mup.py transfer --parametrization sp          the same with one rate for all matrices
    python tests/bench/mup.py transfer --arch mmdit --steps 1000     another architecture, longer runs

Runs that are done are kept in results/mup/runs and not made again. The best rate is the vertex of a parabola of ln loss in ln rate
through the lowest point and its neighbours; where the lowest lies at an end of the rates, it is only a bound and is marked so.
"""
import argparse
import json
import math
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from data import DataConfig
from model import DiT, ModelConfig
from test_model import ARCHS, changes
from train import TrainConfig, point_folder

FAMILY = [(1, 16), (2, 32), (3, 48), (4, 64)]   # of the quick family, every second size


def coordinates(args):
    """coordinates.png and a table: the change of the last block's output and of the head's after 1, 2, 4 and 8 steps."""
    figure, axes = plt.subplots(2, len(ARCHS), figsize=(13, 7.5), sharex=True, sharey=True, layout="constrained")
    for (row, parametrization), (column, arch) in ((r, c) for r in enumerate(("mup", "sp")) for c in enumerate(ARCHS)):
        found = {width: [changes(arch, parametrization, width, seed) for seed in range(args.seeds)] for width in args.widths}
        ax = axes[row, column]
        for part, style in (("block 2", "-"), ("head", "--")):
            first = 2 if part == "block 2" else 1   # behind a head of zeros nothing moves in the first step
            for step, colour in zip((1, 2, 4, 8), plt.cm.viridis(np.linspace(0, 0.9, 4))):
                if step < first:
                    continue
                y = [np.exp(np.mean([math.log(run[part][step - first]) for run in found[width]])) for width in args.widths]
                slope = np.polyfit(np.log(args.widths), np.log(y), 1)[0]
                ax.plot(args.widths, y, style, marker="o", ms=4, color=colour, label=f"{part}, step {step}: slope {slope:+.2f}")
                print(f"{arch:10} {parametrization:3} {part:8} step {step}: " + " ".join(f"{v:8.4f}" for v in y) + f"   slope {slope:+.2f}")
        ax.set(xscale="log", yscale="log", title=f"{arch}, {parametrization}", xticks=args.widths, xticklabels=args.widths)
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.legend(fontsize=7)
        ax.label_outer()
    figure.supxlabel("width")
    figure.supylabel("root mean square change of the activations")
    save(figure, "coordinates.png")


def losses(args, sizes):
    """{(depth, width): (rates, seeds) array of validation losses} after the same number of steps, of runs of train.py."""
    data, config = DataConfig(), TrainConfig()
    jobs = []
    for (depth, width), lr, seed in ((size, lr, seed) for size in sizes for lr in args.lr for seed in range(args.seeds)):
        with torch.device("meta"):
            model = DiT(ModelConfig(args.arch, depth, width), 3, data.resolution, data.text_tokens, data.text_dim)
        budget = float(f"{args.steps * config.batch * model.flops_per_image():.6g}")
        out = os.path.join(ROOT, "results/mup/runs", f"{args.arch}_{args.parametrization}_depth{depth}_width{width}_lr{lr:g}_seed{seed}")
        flags = dict(arch=args.arch, parametrization=args.parametrization, depth=depth, width=width, lr=lr, seed=seed, budget=repr(budget),
                     val_images=1024, threads=1, out=out)
        jobs.append((flags, os.path.join(point_folder(out, budget), "result.json"), args.steps * model.flops_per_image()))

    def run(job):
        flags, record, _ = job
        if not os.path.exists(record):
            done = subprocess.run([sys.executable, os.path.join(ROOT, "train.py"), *(f"--{key}={value}" for key, value in flags.items())],
                                  capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if not os.path.exists(record):
                print(f"{os.path.basename(flags['out'])}: {(done.stderr.strip().splitlines() or ['?'])[-1]}", file=sys.stderr)
                return math.inf   # diverged: a loss that is no number
        with open(record) as file:
            return json.load(file)["val_loss_ema"]

    with ThreadPoolExecutor(args.jobs) as pool:   # the longest first, so that the last ones are short
        order = sorted(range(len(jobs)), key=lambda k: -jobs[k][2])
        done = dict(zip(order, tqdm(pool.map(lambda k: run(jobs[k]), order), total=len(jobs), desc="runs", mininterval=10)))
    return dict(zip(sizes, np.array([done[k] for k in range(len(jobs))]).reshape(len(sizes), len(args.lr), args.seeds)))


def best_rate(rates, loss):
    """Vertex of the parabola through the lowest and its two neighbours, and whether the lowest lies at an end."""
    k = int(np.argmin(loss))
    if k in (0, len(rates) - 1) or not np.isfinite(loss[k - 1:k + 2]).all():
        return rates[k], True
    curve = np.polyfit(np.log(rates[k - 1:k + 2]), np.log(loss[k - 1:k + 2]), 2)
    return math.exp(-curve[1] / 2 / curve[0]), False


def transfer(args):
    """transfer_ARCH_PARAMETRIZATION.png and a table: loss over base rate, one curve a size, its minimum marked."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for ax, (title, sizes) in zip(axes, ((f"depth {args.depth}, widths {args.widths[0]} to {args.widths[-1]}", [(args.depth, w) for w in args.widths]),
                                         ("along the quick family", FAMILY))):
        found, best = losses(args, sizes), {}
        print(f"\n{args.arch}, {args.parametrization}, {title}, {args.steps} steps, means of {args.seeds} seeds\n"
              f"{'':16}" + "".join(f"{lr:>10g}" for lr in args.lr) + f"{'best rate':>12}")
        for (size, runs), colour in zip(found.items(), plt.cm.viridis(np.linspace(0, 0.9, len(sizes)))):
            loss = np.exp(np.log(runs).mean(1))
            best[size], end = best_rate(args.lr, loss)
            print(f"depth {size[0]} width {size[1]:<4}" + "".join(f"{v:10.4f}" for v in loss) + f"{best[size]:12.4f}" + " (an end of the rates)" * end)
            low = loss.min()
            ax.plot(args.lr, loss / low, "o-", color=colour, ms=4, label=f"{size[0]} x {size[1]}: best {best[size]:.4f}" + " (end)" * end)
            ax.plot(args.lr, runs / low, ".", color=colour, ms=3, alpha=0.5)
            ax.axvline(best[size], color=colour, lw=0.8, ls=":")
        spread = max(best.values()) / min(best.values())
        print(f"largest over smallest best rate: {spread:.2f}")
        ax.set(xscale="log", ylim=(0.98, 1.5), xlabel="base learning rate", ylabel="loss over the lowest of its size", title=f"{title}: best rates within {spread:.2f}x")
        ax.set_xticks(args.lr, [f"{lr:g}" for lr in args.lr])
        ax.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        ax.legend(fontsize=8, title="depth x width", title_fontsize=8)
    figure.suptitle(f"Learning-rate transfer: {args.arch}, {args.parametrization}, {args.steps} steps of 16 images, seeds: {args.seeds}")
    save(figure, f"transfer_{args.arch}_{args.parametrization}.png")


def save(figure, name):
    os.makedirs(os.path.join(ROOT, "results/mup"), exist_ok=True)
    figure.savefig(os.path.join(ROOT, "results/mup", name), dpi=100)
    print(f"written: results/mup/{name}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
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
    {"coordinates": coordinates, "transfer": transfer}[args.what](args)
