"""How is one model trained to one or several FLOP budgets?

    python train.py --budget 1e12                                one budget
    python train.py --budget 1e11 3e11 1e12 --width 48           one run, three points of a grid
    torchrun --nproc_per_node=8 train.py --budget 1e18 ...       the same numbers on any number of devices

The learning rate is constant after warm-up, so the run to a small budget is exactly the beginning of the run to a larger
one. A run is therefore one model and a rising list of budgets: at each it evaluates, writes its record, and goes on.
The same command resumes a run that was interrupted, and does nothing where everything is done.
"""
import contextlib
import copy
import dataclasses
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from data import (DataConfig, about_remarks, differences, load_data, one_line, parse_flags, save_grid, seeded, write_json,
                  write_whole)
from model import FAMILY_CONFIG, DiT, ModelConfig

try:
    import fcntl
except ImportError:  # Windows: that no second process trains in a folder is the user's care
    fcntl = None

SCHEMA = 1
MIN_STEPS, MIN_WARMUPS = 50, 5   # below 50 steps or 5 warm-ups a point says more of the start than of the budget
CHECKPOINT_SECONDS = 60          # how much work a kill -9 may cost
LOG_STEPS = 10                   # the losses of so many steps are fetched from the device at once
VALIDATION_SEED, VALIDATION_IMAGES, VALIDATION_BATCH = 0, 8192, 64
CPU_BFLOAT16_WIDTH = 128         # from here on in bfloat16 on CPUs that multiply it (python tests/bench/speed.py rules)
THREAD_WIDTH = 16                # a thread for less than this brings nothing (the same)
GRAPH_WIDTH = 1024               # on a GPU narrower models wait for kernel launches, which CUDA graphs replay (not measured yet)
RAW_SHARE = 16                   # raw weights are compared with their average on one validation image in so many
SAMPLES, SAMPLE_STEPS = 8, 8     # in the picture of a point
PRESETS = {
    "quick": {},
    "paper": dict(**FAMILY_CONFIG["paper"], lr=1e-4, batch=1024, micro_batches=64, warmup=100, count="6nd"),
}
# Dense bf16 peaks in FLOP/s, from the vendors' datasheets; a device that is not here gets no MFU rather than a wrong one.
PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12,
              "L4": 121e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "B200": 2250e12}


@dataclass(frozen=True)
class TrainConfig:
    budget: List[float] = field(default_factory=lambda: [3e11], metadata={
        "help": "training FLOPs, one or several rising numbers"})
    out: Optional[str] = field(default=None, metadata={"help": "folder of the run (default: results/train/depth.._width.._seed..)"})
    preset: Literal["quick", "paper"] = field(default="quick", metadata={
        "help": "defaults of the other flags: quick (a laptop) or paper (arXiv 2410.08184)"})
    seed: int = field(default=0, metadata={"help": "of the weights, the order of the data and all noise in training"})
    count: Literal["exact", "6nd"] = field(default="exact", metadata={"help": "what a budget counts: every product, or 6*N*D"})
    batch: int = field(default=16, metadata={"help": "images a step, over all devices (the paper: 1024)"})
    micro_batches: int = field(default=4, metadata={
        "help": "equal parts of the batch with their own random numbers; the number of devices must divide it"})
    accumulate: int = field(default=1, metadata={"help": "forward passes a step on each device, to save memory"})
    lr: float = field(default=0.006, metadata={"help": "learning rate after warm-up (mup: at width 64; the paper: 1e-4)"})
    warmup: int = field(default=10, metadata={"help": "steps of linear warm-up, the same for every size and budget"})
    weight_decay: float = field(default=0.0, metadata={"help": "of AdamW"})
    clip: float = field(default=1.0, metadata={"help": "largest norm of the gradient"})
    caption_dropout: float = field(default=0.1, metadata={"help": "share of captions left out, for guidance"})
    t_sampling: Literal["logit_normal", "uniform"] = field(default="logit_normal", metadata={"help": "distribution of t"})
    ema_width: float = field(default=0.1, metadata={"help": "relative width of the power-function average of the weights"})
    val_images: Optional[int] = field(default=None, metadata={
        "help": "validation images, the same for every run (default: 8192, or all where there are fewer)"})
    precision: Literal["auto", "float32", "bfloat16"] = field(default="auto", metadata={
        "help": f"of the products; auto: bfloat16 where the device multiplies it (a CPU: from width {CPU_BFLOAT16_WIDTH}), else float32"})
    compile: Literal["auto", "on", "off"] = field(default="auto", metadata={
        "help": "torch.compile the model for training; auto: on a GPU (on a CPU it takes half a minute, and saves 5 to 20% of a step)"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to train"})
    threads: Optional[int] = field(default=None, metadata={
        "help": f"CPU threads of a process (default: all cores; to train on a CPU one for each {THREAD_WIDTH} of the width at most)"})
    allow_drift: bool = field(default=False, metadata={
        "help": "resume although device, threads or versions have changed (results then differ in the last bits)"})

    def __post_init__(self):
        if not self.budget or any(not (b > 0 and math.isfinite(b)) for b in self.budget):
            raise ValueError(f"--budget {self.budget}: needs positive numbers")
        if any(b >= c for b, c in zip(self.budget, self.budget[1:])):
            raise ValueError(f"--budget {' '.join(f'{b:g}' for b in self.budget)}: budgets must rise")
        if len({f"{budget:.4g}" for budget in self.budget}) < len(self.budget):
            raise ValueError(f"--budget {' '.join(f'{b!r}' for b in self.budget)}: two are the same to 4 digits, which name their folders")
        for name in ("batch", "micro_batches", "accumulate", "warmup"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads}: must be at least 1")
        if self.batch % self.micro_batches:
            raise ValueError(f"--batch {self.batch} is not divisible by --micro_batches {self.micro_batches}")
        if self.val_images is not None and self.val_images < 2:
            raise ValueError(f"--val_images {self.val_images}: a standard error needs at least 2")
        for name in ("lr", "clip", "ema_width"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"--{name} {getattr(self, name)}: must be positive")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight_decay {self.weight_decay}: must not be negative")
        if not 0 <= self.caption_dropout < 1:
            raise ValueError(f"--caption_dropout {self.caption_dropout}: must be in [0, 1)")
        if self.ema_width >= 0.28:
            raise ValueError(f"--ema_width {self.ema_width}: a power function has a relative width below 0.28")


# ---- small parts -------------------------------------------------------------------------------------------------------

def ema_exponent(relative_width):
    """gamma of the power-function average whose width is this share of the training so far.

    Weight t^gamma has relative standard deviation sigma = (gamma+1)^(1/2) (gamma+2)^-1 (gamma+3)^-(1/2) (Karras et al. 2024,
    arXiv 2312.02696, eq. 123); 0.1 gives 6.94. Its horizon grows with the run, so one run serves all its budgets.
    """
    low, high = 0.0, 1e6  # sigma falls with gamma
    for _ in range(100):
        middle = (low + high) / 2
        sigma = (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5
        low, high = (middle, high) if sigma > relative_width else (low, middle)
    return low


def steps_for(budget, model, config):
    """Steps whose FLOPs are nearest to the budget. Raises ValueError where a point would be too short to mean anything."""
    step_flops = config.batch * model.flops_per_image(config.count)
    fewest = max(MIN_STEPS, MIN_WARMUPS * config.warmup)
    steps = round(budget / step_flops)
    if steps < fewest:
        raise ValueError(f"--budget {budget:g} gives {steps} steps of {step_flops:.3g} FLOPs; a point needs {fewest} "
                         f"({MIN_STEPS}, and {MIN_WARMUPS} times the warm-up): the smallest possible is {fewest * step_flops:.3g}")
    return steps


def read_record(path, budget):
    """A point's result.json, or None where there is none. Raises ValueError for a torn or foreign one, or another budget's."""
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            record = json.load(file)
        if record["schema"] != SCHEMA:
            raise ValueError(f"{path}: schema {record['schema']}, this version writes {SCHEMA}: move it away")
        if record["budget"] != budget:
            raise ValueError(f"{path}: is of budget {record['budget']!r}, not of {budget!r}: take another --out")
        return record if math.isfinite(record["val_loss_ema"]) else None
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
        raise ValueError(f"{path}: torn, or not a record of isoflow: delete it to have this point made again") from None


def save_array(path, array):
    with open(path, "wb") as file:  # np.save would add .npy to the temporary name
        np.save(file, array)


def autocast(device, precision):
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def training_batch(data, config, step, rank, world, device):
    """What this rank sees of the global batch of a step (1, 2, ...): x, eps, t, text, text_mask.

    Every random number depends on (seed, step, micro-batch): the same whichever rank draws it, and however often a
    run was resumed. Times are stratified over the whole global batch.
    """
    size, mine = config.batch // config.micro_batches, config.micro_batches // world
    strata = torch.randperm(config.batch, generator=seeded(config.seed, step))
    here = slice(rank * mine * size, (rank + 1) * mine * size)
    raw, text, text_mask = data.batch("train", torch.arange((step - 1) * config.batch, step * config.batch)[here])
    x, eps, jitter, keep = [], [], [], []
    for micro, part in zip(range(rank * mine, (rank + 1) * mine), raw.split(size)):
        generator = seeded(config.seed, step, micro, device=device)
        x.append(data.to_x(part, generator))
        eps.append(torch.randn(x[-1].shape, generator=generator, device=device))
        jitter.append(torch.rand(size, generator=generator, device=device))
        keep.append(torch.rand(size, generator=generator, device=device) >= config.caption_dropout)
    t = flow.stratified_times(strata[here].to(device), config.batch, torch.cat(jitter), config.t_sampling)
    return torch.cat(x), torch.cat(eps), t, text, text_mask & torch.cat(keep)[:, None]


def count_validation(data, wanted):
    """How many validation images are used. Raises ValueError where more are wanted than there are."""
    if wanted and data.validation_images and wanted > data.validation_images:
        raise ValueError(f"--val_images {wanted}: {data.config.data} has only {data.validation_images} for validation")
    return wanted or min(VALIDATION_IMAGES, data.validation_images or VALIDATION_IMAGES)


def validation_batches(data, images, rank=0, world=1, first=None):
    """This rank's share of the fixed validation set, or of its `first` images: (indices, (x, eps, t, text, text_mask)).

    Drawn on the CPU, independent of the run's seed, device and world size: images, u (or n of latents), times (one in each of `images` slices of
    the logit-normal, whatever the training times are) and noises are the same for every run of a sweep.
    """
    strata = torch.randperm(images, generator=seeded(VALIDATION_SEED, images))
    for number, start in enumerate(range(0, first or images, VALIDATION_BATCH)):
        if number % world != rank:
            continue
        index = torch.arange(start, min(start + VALIDATION_BATCH, images))
        raw, text, text_mask = data.batch("validation", index)
        generator = seeded(VALIDATION_SEED, images, start)
        x = data.to_x(raw, generator)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        t = flow.stratified_times(strata[index], images, torch.rand(len(index), generator=generator)).to(x.device)
        yield index, (x, eps, t, text, text_mask)


def validation_losses(model, data, n, precision, rank=0, world=1, first=None):
    """Loss of each validation image (n,), and its time (n,): float32 on the CPU, complete on every rank.

    first: only so many of them (the end of a batch), and n is that.
    """
    losses, times = torch.zeros(n), torch.zeros(n)
    for index, batch in validation_batches(data, n, rank, world, first):
        with autocast(batch[0].device, precision):
            losses[index] = flow.validation_loss(model, [batch])
        times[index] = batch[2].cpu()
    if world > 1:
        both = torch.stack([losses, times]).to(data.device)
        dist.all_reduce(both)
        losses, times = both.cpu()
    return losses[:first], times[:first]


def sample_data(model, data, precision, index, steps=16, solver="heun", guidance=3.0, seed=VALIDATION_SEED):
    """Samples x for the captions of validation images `index`, like x, not clipped. Noise depends on (seed, index) alone."""
    raw, text, text_mask = data.batch("validation", index)
    shape = data.shape["channels"], data.shape["size"], data.shape["size"]
    eps = torch.stack([torch.randn(shape, generator=seeded("sample", seed, i)) for i in index.tolist()]).to(raw.device)
    with autocast(raw.device, precision):
        return flow.sample(model, eps, text, text_mask, steps, solver, guidance).float()


def find_device(flag):
    """-> torch.device, and its name. Raises ValueError where there is no such device."""
    if flag == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if flag == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu"), f"CPU {platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device, torch.cuda.get_device_name(device)


def resolve_auto(config, model_config):
    """The config with all that is "auto" chosen: precision, compile, threads.

    By model and device alone, never by the budgets: the run to a small budget stays the beginning of the run to a larger one.
    """
    device, _ = find_device(config.device)
    threads = torch.get_num_threads()
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        compiles = torch.cuda.get_device_capability(device) >= (7, 0) and importlib.util.find_spec("triton") is not None
    else:   # a CPU without these instructions converts to float32 and back, and is slower than float32
        able = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
        has_bfloat16 = model_config.width >= CPU_BFLOAT16_WIDTH and any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        compiles, threads = False, max(1, min(threads, model_config.width // THREAD_WIDTH))
    chosen = {"precision": "bfloat16" if has_bfloat16 else "float32", "compile": "on" if compiles else "off"}
    return dataclasses.replace(config, threads=config.threads or threads,
                               **{name: value for name, value in chosen.items() if getattr(config, name) == "auto"})


def peak_flops(device_name, precision):
    """Dense peak of the products in FLOP/s, from the datasheet; None where it is not known."""
    peak = next((flops for part, flops in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", device_name)), None)
    return peak if precision == "bfloat16" else None


def compiled(model, config, world=1):
    """torch.compile of the model for the one shape that training has, at its first step; other shapes go to the model itself.

    CUDA graphs (mode "reduce-overhead") where launches rule, but not with --accumulate, whose gradients outlive the pass that
    made them while the next replay overwrites its memory; nor, out of caution, where DDP reads the gradients.
    """
    graphs = (next(model.parameters()).is_cuda and model.config.width < GRAPH_WIDTH and config.accumulate == 1 and world == 1)
    return torch.compile(model, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else "default")


# ---- the run -----------------------------------------------------------------------------------------------------------

def run_name(model_config, seed):
    return f"depth{model_config.depth:02d}_width{model_config.width:03d}_seed{seed}"


def point_folder(out, budget):
    return os.path.join(out, f"budget_{budget:.4g}")


def definition_of(model_config, data_config, config, encoders):
    """What defines a run, and so what a resumed one must agree with. The list of budgets is no part of it.

    encoders: of the data set (`data.encoders`): which weights made its latents and features, and the scale of the latents.
    """
    settings = dataclasses.asdict(config)
    for name in ("budget", "out", "preset", "device", "threads", "allow_drift"):
        del settings[name]
    definition = {"schema": SCHEMA, "model": dataclasses.asdict(model_config), "data": dataclasses.asdict(data_config), "train": settings}
    return {**definition, "encoders": encoders} if encoders else definition


def lock(path):
    """Hold a file so that no second process trains in the same folder; the system lets go of it however this one ends."""
    file = open(path)
    if fcntl and path != os.devnull:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            raise ValueError(f"{os.path.dirname(path)}: another process is training in this folder") from None
    return file


def check_earlier_run(out, definition, runtime=None):
    """Refuse a folder that was begun with another definition, or (where it is given) on another machine."""
    path = os.path.join(out, "config.json")
    if not os.path.exists(path):
        return
    try:
        with open(path) as file:
            saved = json.load(file)
        saved_runtime = dict(saved.pop("runtime"))
        saved["data"] = {**dataclasses.asdict(DataConfig()), **saved["data"]}   # what an earlier version did not know meant the default
        saved["train"] = {"compile": "off", **saved["train"]}
        definition = {**definition, "train": dict(definition["train"])}
        for settings in (saved["train"], definition["train"]):
            settings["val_images"] = settings["val_images"] or VALIDATION_IMAGES   # what it means when it is not given
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError, ValueError):
        raise ValueError(f"{path}: torn, or not a configuration of isoflow: move it away or take another --out") from None
    if differs := differences(saved, definition):
        raise ValueError(f"--out {out} belongs to another configuration ({'; '.join(differs)}): take another --out, or the flags it was begun with")
    if runtime and (differs := differences(saved_runtime, runtime)):
        raise ValueError(f"--out {out} was begun elsewhere ({'; '.join(differs)}), so its last bits would differ: "
                         f"take another --out, the flags it was begun with, or --allow_drift")


def read_checkpoint(path, device):
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
        saved["state"]["step"]
        return saved
    except Exception as error:  # torch raises many kinds; whichever it is, the file is of no use
        raise ValueError(f"{path}: torn, or not a checkpoint of isoflow ({one_line(error)}): "
                         f"delete it to start this run over") from None


def open_log(path, step):
    """The log for appending, without the lines that a killed run wrote after its last checkpoint."""
    kept = []
    if os.path.exists(path):
        with open(path) as file:
            for line in file:
                try:
                    if json.loads(line)["step"] <= step:
                        kept.append(line)
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # the line that the kill tore
    if path != os.devnull:
        write_whole(path, lambda temporary: Path(temporary).write_text("".join(kept)))
    return open(path, "a")


def train(model_config, data_config, config):
    """Train one model to every budget of config.budget; returns the list of records.

    Raises ValueError for input that can't be used and FloatingPointError where the loss is no longer a number.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.micro_batches % world:
        raise ValueError(f"--micro_batches {config.micro_batches} is not divisible by the {world} processes of torchrun")
    if config.batch // world % config.accumulate:
        raise ValueError(f"--accumulate {config.accumulate} does not divide the {config.batch // world} images of a device")
    device, device_name = find_device(config.device)
    config = resolve_auto(config, model_config)
    torch.set_num_threads(config.threads)
    peak = peak_flops(device_name, config.precision)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    say = print if rank == 0 else lambda *words: None

    data = load_data(data_config, config.seed, device)
    if data.train_images is not None and data.train_images < config.batch:
        raise ValueError(f"--batch {config.batch}: {data_config.data} has only {data.train_images} images to train on")
    torch.manual_seed(config.seed)
    model = DiT(model_config, **data.shape).to(device)
    ema = copy.deepcopy(model).requires_grad_(False)
    target = {budget: steps_for(budget, model, config) for budget in config.budget}
    for budget, larger in zip(config.budget, config.budget[1:]):
        if target[budget] == target[larger]:
            raise ValueError(f"--budget {budget:g} {larger:g}: both are {target[budget]} steps; take budgets further apart")

    definition = definition_of(model_config, data_config, config, data.encoders)
    config = dataclasses.replace(config, val_images=count_validation(data, config.val_images))
    runtime = {"device": device_name, "devices": world, "threads": torch.get_num_threads(), "versions": {
        "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}}
    out = config.out or os.path.join("results", "train", run_name(model_config, config.seed))
    check_earlier_run(out, definition)
    records = {budget: read_record(os.path.join(point_folder(out, budget), "result.json"), budget) for budget in config.budget}
    missing = [budget for budget in config.budget if records[budget] is None]
    if not missing:
        say(f"{out}: all budgets are done ({', '.join(f'{budget:g}' for budget in config.budget)})")
        return list(records.values())
    if not config.allow_drift:
        check_earlier_run(out, definition, runtime)
    if rank == 0:
        os.makedirs(out, exist_ok=True)
        if not os.path.exists(os.path.join(out, "config.json")):
            write_json(os.path.join(out, "config.json"), {**definition, "runtime": runtime})
        if os.path.exists(os.path.join(out, "failed.json")):
            os.remove(os.path.join(out, "failed.json"))

    N, step_flops = model.count_parameters(), config.batch * model.flops_per_image()
    weights, averages = list(model.parameters()), list(ema.parameters())
    optimizer = torch.optim.AdamW(model.parameter_groups(config.lr), betas=(0.9, 0.95),
                                  weight_decay=config.weight_decay, fused=True)
    rates, gamma = [group["lr"] for group in optimizer.param_groups], ema_exponent(config.ema_width)
    network = compiled(model, config, world) if config.compile == "on" else model
    network = DistributedDataParallel(network, gradient_as_bucket_view=True) if world > 1 else network

    # All that a run carries from one step to the next, beside weights and optimiser.
    loss = smooth = torch.zeros((), device=device)             # of the last step; exponentially averaged: the paper's
    words = torch.zeros((), dtype=torch.long, device=device)   # real caption tokens seen
    state = {"step": 0, "seconds": 0.0, "evaluation_seconds": 0.0, "start_loss": None, "start_loss_expected": None}
    checkpoint, known = os.path.join(out, "checkpoint.pt"), 0   # up to step `known` log and checkpoint are there already
    if os.path.exists(checkpoint):
        saved = read_checkpoint(checkpoint, device)
        if saved["state"]["step"] <= target[missing[0]]:
            model.load_state_dict(saved["model"])
            ema.load_state_dict(saved["ema"])
            optimizer.load_state_dict(saved["optimizer"])
            loss, smooth, words, state = (saved[name] for name in ("loss", "smooth", "words", "state"))
            say(f"{out}: resumed at step {state['step']}")
        else:  # a budget was added below one that is done; the same steps lead to it again
            known = saved["state"]["step"]
            say(f"{out}: budget {missing[0]:g} lies before the checkpoint at step {saved['state']['step']}: from the start")

    say(json.dumps({**definition, "runtime": runtime}))
    say(f"N = {N['blocks']:,} in the blocks, {N['total']:,} in all; {model.flops_per_image():.4g} FLOPs an image; "
        f"{target[missing[-1]]:,} steps of {config.batch} images; {config.precision} on {device_name}")
    if data.train_images:
        epochs = target[missing[-1]] * config.batch / data.train_images
        say(f"{data.train_images:,} training images, each seen {epochs:.3g} times"
            + (f"; {data.validation_images:,} for validation; {about_remarks(data.remarks)}" if data.validation_images else ""))
    about = {"definition": json.dumps(definition), "shape": json.dumps(data.shape)}  # so that weights say what they are
    make_batch = lambda step: training_batch(data, config, step, rank, world, device)
    coming = None   # the batch of the next step, where it is worth a thread; a function of the step, so that nothing depends on it

    def compute_gradients(batch):
        """Forward and backward of this rank's batch, in `accumulate` parts; -> its loss."""
        loss, parts = torch.zeros((), device=device), list(zip(*(tensor.chunk(config.accumulate) for tensor in batch)))
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)   # only then are gradients averaged over the devices
            with contextlib.nullcontext() if world == 1 or last else network.no_sync():
                with autocast(device, config.precision):
                    part_loss = flow.loss_per_image(network, *part).mean() / config.accumulate
                part_loss.backward()
            loss += part_loss.detach()
        return loss

    def compile_network():
        """Three passes beside the clock, which is for what a step costs: the first compiles, the third records CUDA graphs."""
        began = time.monotonic()
        try:
            for _ in range(3):
                compute_gradients(make_batch(state["step"] + 1)).item()
                optimizer.zero_grad(set_to_none=True)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if rank == 0 and not state["step"] and len(missing) == len(config.budget):
                os.remove(os.path.join(out, "config.json"))   # nothing was trained, so nothing binds the folder to this flag
            raise RuntimeError(f"torch.compile failed ({one_line(error)}): --compile off trains without it") from None
        say(f"compiled in {time.monotonic() - began:.0f} s")

    def fail(what):
        reason = f"{what} at or before step {state['step']} (is --lr {config.lr:g} too large?)"
        if rank == 0:
            write_json(os.path.join(out, "failed.json"), {"step": state["step"], "reason": reason})
        raise FloatingPointError(f"{out}: {reason}; the last checkpoint is kept")

    def save_checkpoint():
        if rank == 0 and state["step"] >= known:
            content = {"model": model.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer.state_dict(),
                       "loss": loss, "smooth": smooth, "words": words, "state": state, **about}
            write_whole(checkpoint, lambda temporary: torch.save(content, temporary))

    with (lock(os.path.join(out, "config.json") if rank == 0 else os.devnull),
          tqdm(desc=os.path.basename(out), total=target[missing[-1]], initial=state["step"], unit="step", disable=rank > 0,
               smoothing=0.05, mininterval=1 if sys.stderr.isatty() else 30) as bar,
          ThreadPoolExecutor(1, initializer=torch.cuda.set_device if device.type == "cuda" else None,
                             initargs=(device,) if device.type == "cuda" else ()) as reader,
          open_log(os.path.join(out, "log.jsonl") if rank == 0 else os.devnull, max(known, state["step"])) as log):
        if config.compile == "on" and state["step"] < target[missing[-1]]:
            compile_network()
        clock = saved_at = time.monotonic()
        for budget in missing:
            while state["step"] < target[budget]:
                step = state["step"] + 1
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * min(1.0, step / config.warmup)
                batch = coming.result() if coming else make_batch(step)
                coming = reader.submit(make_batch, step + 1) if data.prefetch and step < target[missing[-1]] else None
                loss = compute_gradients(batch)
                norm = torch.nn.utils.clip_grad_norm_(weights, config.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                # The average of the weights of steps 1 to now with weight step^gamma (Karras et al. 2024, eq. 127).
                with torch.no_grad():
                    torch._foreach_lerp_(averages, weights, 1 - (1 - 1 / step) ** (gamma + 1))
                step_words = batch[4].sum()
                start = flow.expected_start_loss(batch[0]) if step == 1 else torch.zeros((), device=device)
                if world > 1:
                    for total in (loss, step_words, start):
                        dist.all_reduce(total)
                    loss, start = loss / world, start / world
                words, smooth = words + step_words, loss if step == 1 else 0.9 * smooth + 0.1 * loss
                state["step"] = step
                bar.update()
                if step == 1:
                    state["start_loss"], state["start_loss_expected"] = loss.item(), start.item()
                    if rank == 0:
                        bar.write(f"loss at start {loss.item():.4f}; expected 1 + E[x^2] = {state['start_loss_expected']:.4f}")
                if step % LOG_STEPS == 0 or step == target[budget]:
                    # The only place where the device is waited for. A loss that is not finite stays so in its average.
                    average, gradient = smooth.item(), norm.item()
                    if not (math.isfinite(average) and math.isfinite(gradient)):
                        fail("the loss or its gradient is not finite")
                    now = time.monotonic()
                    state["seconds"], clock = state["seconds"] + now - clock, now
                    rate = step * step_flops / state["seconds"] / world
                    bar.set_postfix_str(f"loss {average:.4f}, {step * step_flops:.3g} FLOPs done, "
                                        + (f"MFU {rate / peak:.1%}" if peak else f"{rate / 1e9:.0f} GFLOP/s"))
                    if step % LOG_STEPS == 0 and step > known:
                        log.write(json.dumps({"step": step, "C": step * step_flops, "train_loss": loss.item(),
                                              "train_loss_smooth": average, "grad_norm": gradient,
                                              "lr": optimizer.param_groups[-1]["lr"], "seconds": round(state["seconds"], 3)}) + "\n")
                        log.flush()
                    if now - saved_at > CHECKPOINT_SECONDS:
                        save_checkpoint()
                        saved_at = clock = time.monotonic()

            save_checkpoint()
            bar.set_postfix_str(f"evaluating at {budget:g}")
            clock = time.monotonic()
            ema_losses, times = validation_losses(ema, data, config.val_images, config.precision, rank, world)
            val_loss_ema, val_loss_ema_se = flow.mean_and_standard_error(ema_losses)
            # The raw weights, by their difference from the average on a part of the images: it varies far less than the loss.
            part = min(config.val_images, max(1, config.val_images // RAW_SHARE // VALIDATION_BATCH) * VALIDATION_BATCH)
            raw_losses, _ = validation_losses(model, data, config.val_images, config.precision, rank, world, first=part)
            gap, gap_se = flow.mean_and_standard_error(raw_losses - ema_losses[:part])
            val_loss, val_loss_se = val_loss_ema + gap, math.hypot(val_loss_ema_se, gap_se)
            if not math.isfinite(val_loss_ema + val_loss):
                fail("the validation loss is not finite")
            if rank == 0:
                folder = point_folder(out, budget)
                os.makedirs(folder, exist_ok=True)
                index = torch.arange(min(SAMPLES, config.val_images))
                try:
                    samples = data.to_levels(sample_data(ema, data, config.precision, index, SAMPLE_STEPS))
                    save_grid(os.path.join(folder, "samples.png"), [data.images("validation", index), samples],
                              data.captions("validation", index), f"{os.path.basename(out)}, budget {budget:g}: held-out image | "
                              f"sample for its caption (EMA weights, {SAMPLE_STEPS} Heun steps, guidance 3)")
                except ValueError as problem:   # latents without their VAE: training needs it for this only
                    bar.write(f"no samples.png: {problem}")
                write_whole(os.path.join(folder, "ema.safetensors"), lambda path: save_file(ema.state_dict(), path, about))
                write_whole(os.path.join(folder, "val_losses_ema.npy"), lambda path: save_array(path, ema_losses.numpy()))
            state["evaluation_seconds"] += time.monotonic() - clock
            clock = time.monotonic()
            step, tokens = state["step"], model.tokens()
            images = step * config.batch
            rate = step * step_flops / state["seconds"] / world
            records[budget] = {
                "schema": SCHEMA, "arch": model_config.arch, "depth": model_config.depth, "width": model_config.width,
                "head_dim": model_config.head_dim, "parametrization": model_config.parametrization, "lr": config.lr,
                "seed": config.seed, **{f"N_{group}": count for group, count in N.items()},
                "budget": budget, "count": config.count, "C": step * step_flops, "C_6nd": images * model.flops_per_image("6nd"),
                "D": images * sum(tokens.values()), **{f"D_{kind}": images * count for kind, count in tokens.items()},
                "D_text_real": words.item(), "images": images, "steps": step, "batch": config.batch,
                "epochs": images / data.train_images if data.train_images else None,   # times each image was seen
                "train_images": data.train_images, "images_repeated": max(0, images - data.train_images) if data.train_images else 0,
                "train_loss": smooth.item(), "train_loss_plain": loss.item(), "val_loss": val_loss, "val_loss_se": val_loss_se,
                "val_loss_ema": val_loss_ema, "val_loss_ema_se": val_loss_ema_se, "val_images": config.val_images,
                "val_loss_ema_by_time": flow.loss_by_time(ema_losses, times),
                "start_loss": state["start_loss"], "start_loss_expected": state["start_loss_expected"],
                "data": data_config.data, "resolution": data_config.resolution, "captions": data_config.captions,
                "device": device_name, "devices": world, "threads": torch.get_num_threads(), "precision": config.precision, "compile": config.compile,
                "seconds": state["seconds"], "evaluation_seconds": state["evaluation_seconds"],
                "device_hours": state["seconds"] * world / 3600, "tflops": rate / 1e12, "mfu": rate / peak if peak else None,
                "versions": runtime["versions"],
            }
            if rank == 0:
                write_json(os.path.join(folder, "result.json"), records[budget])
                bar.write(f"{budget:g} FLOPs: validation loss {val_loss_ema:.4f} +- {val_loss_ema_se:.4f} (EMA), {val_loss:.4f} (raw)")
    return list(records.values())


def main():
    model_config, data_config, config = parse_flags((ModelConfig, DataConfig, TrainConfig), __doc__, PRESETS)
    try:
        train(model_config, data_config, config)
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"train.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
