"""Where does a training step's time go? python tests/bench/step.py [width ...]

Prints, for models of depth 2 on scenes (one thread, as a run of the quick grid), the median milliseconds of each part of
a step over 60 steps, its share, the rate by our exact FLOP count, and the resident memory of the process.
"""
import copy
import json
import os
import resource
import sys
import time

import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]
import flow
import train
from data import DataConfig, load_data
from model import DiT, ModelConfig

torch.set_num_threads(1)
PARTS = ("data", "forward", "backward", "clip", "optimiser", "average", "log")
print(f"{'width':>6}", *(f"{part:>16}" for part in PARTS), f"{'step':>10} {'rate':>12}")
for width in map(int, sys.argv[1:] or (24, 40, 64)):
    config, data = train.TrainConfig(), load_data(DataConfig())
    model = DiT(ModelConfig(depth=2, width=width), **data.shape)
    weights, averages = list(model.parameters()), list(copy.deepcopy(model).requires_grad_(False).parameters())
    optimizer = train.make_optimizer(model, config)
    spent = {part: [] for part in PARTS}
    with open(os.devnull, "w") as log:
        for step in range(1, 81):
            marks = [time.perf_counter()]
            batch = train.training_batch(data, config, step, 0, 1, torch.device("cpu"))
            marks.append(time.perf_counter())
            loss = flow.loss_per_image(model, *batch).mean()
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            torch.nn.utils.clip_grad_norm_(weights, config.clip)
            marks.append(time.perf_counter())
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            marks.append(time.perf_counter())
            torch._foreach_lerp_(averages, weights, 0.01)
            marks.append(time.perf_counter())
            if step % train.LOG_STEPS == 0:
                log.write(json.dumps({"step": step, "train_loss": loss.item()}) + "\n")
                log.flush()
            marks.append(time.perf_counter())
            if step > 20:
                for part, start, end in zip(PARTS, marks, marks[1:]):
                    spent[part].append(end - start)
    # Means where work is done only at some steps (a block of scenes, a line of the log), medians elsewhere.
    typical = {part: sum(t) / len(t) if part in ("data", "log") else sorted(t)[len(t) // 2] for part, t in spent.items()}
    total = sum(typical.values())
    print(f"{width:6d}", *(f"{1e3 * typical[part]:6.2f} ms ({typical[part] / total:4.1%})" for part in PARTS),
          f"{1e3 * total:7.1f} ms {model.flops_per_image() * config.batch / total / 1e9:5.1f} GFLOP/s")
print(f"resident memory at most {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")
