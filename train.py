"""How is one model trained to one or several FLOP budgets?

    python train.py --budget 1e12                                one budget
    python train.py --budget 1e11 3e11 1e12 --width 48           one run, three points of a grid
    torchrun --nproc_per_node=8 train.py --budget 1e18 ...       the same numbers on 8 devices

The learning rate is constant after the warm-up. So the run to a small budget is exactly the
beginning of the run to a larger one, and a run is one model with a rising list of budgets. At each
it evaluates, writes a record and goes on. The same command resumes a run that was interrupted.
It does nothing where everything is done. `train()`, at the end, tells the story.
"""
import contextlib
import copy
import importlib.util
import json
import math
import os
import platform
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import List, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import flow
from data import (DataConfig, about_remarks, check_flags, differences, errors_in_one_line,
                  flag, load_data, one_line, parse_flags, ranks, read_json, save_grid, seeded,
                  write_array, write_json, write_whole)
from fit import PEAK
from model import FAMILY_CONFIG, DiT, ModelConfig

try:
    import fcntl
except ImportError:  # Windows: the user takes care that no second process trains in a folder
    fcntl = None

SCHEMA = 1
MIN_STEPS, MIN_WARMUPS = 50, 5   # a shorter run says more of its start than of its budget
CHECKPOINT_SECONDS = 60          # how much work a kill -9 may cost
LOG_STEPS = 10                   # the losses of so many steps are fetched from the device at once
VALIDATION_SEED, VALIDATION_IMAGES, VALIDATION_BATCH = 0, 8192, 64
VALIDATION_TIMES = "logit_normal"   # whatever the times in training: all losses are of one kind
RAW_SHARE = 16                   # raw weights are validated on one image in so many
SAMPLES, SAMPLE_STEPS = 8, 8     # in the picture of a point
CPU_BFLOAT16_WIDTH = 128         # bfloat16 pays from here (python tests/bench/speed.py rules)
THREAD_WIDTH = 16                # a thread for less width than this brings nothing (the same)
GRAPH_WIDTH = 1024               # narrower models wait for kernel launches (not measured yet)
PRESETS = {"quick": {},
           "paper": dict(**FAMILY_CONFIG["paper"], lr=1e-4, batch=1024, micro_batches=64,
                         warmup=100, count="6nd")}

@dataclass(frozen=True)
class TrainConfig:
    """The flags of training. A new one is a line here, and its use.

    Folders that were begun before it mean its default, and `sweep.py --vary` takes it. One that
    changes no result stands in FREE: it may then differ when a run is resumed.
    """

    FREE = ("budget", "out", "preset", "device", "threads")

    budget: List[float] = flag([3e11], "training FLOPs, one or several rising numbers")
    out: Optional[str] = flag(None, "folder (default: results/train/depth.._width.._seed..)")
    preset: Literal["quick", "paper"] = flag(
        "quick", "defaults of the other flags: quick (a laptop) or paper (arXiv 2410.08184)")
    seed: int = flag(0, "of the weights, the order of the data and all noise in training")
    count: Literal["exact", "6nd"] = flag("exact", "what a budget counts: every product, or 6*N*D")
    batch: int = flag(16, "images a step, over all devices (the paper: 1024)")
    micro_batches: int = flag(
        4, "parts of the batch with their own random numbers; a multiple of the devices")
    accumulate: int = flag(1, "forward passes a step on each device, to save memory")
    lr: float = flag(0.006, "learning rate after warm-up (mup: at width 64; the paper: 1e-4)")
    warmup: int = flag(10, "steps of linear warm-up, the same for every size and budget")
    weight_decay: float = flag(0.0, "of AdamW")
    clip: float = flag(1.0, "largest norm of the gradient")
    caption_dropout: float = flag(0.1, "share of captions left out, for guidance")
    t_sampling: Literal["logit_normal", "uniform"] = flag("logit_normal", "distribution of t")
    ema_width: float = flag(0.1, "relative width of the power-function average of the weights")
    val_images: Optional[int] = flag(
        None, "validation images, the same for every run (default: 8192, or all of fewer)")
    precision: Literal["auto", "float32", "bfloat16"] = flag(
        "auto", "of the products; auto: bfloat16 where the device multiplies it "
        f"(a CPU: from width {CPU_BFLOAT16_WIDTH}), else float32")
    compile: Literal["auto", "on", "off"] = flag(
        "auto", "torch.compile; auto: on a GPU (on a CPU it takes half a minute)")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to train")
    threads: Optional[int] = flag(
        None, f"CPU threads (default: all cores, but at most width / {THREAD_WIDTH} on a CPU)")

    def __post_init__(self):
        check_flags(self, "batch micro_batches accumulate warmup threads", lambda n: n >= 1,
                    "at least 1")
        check_flags(self, "lr clip", lambda value: 0 < value < math.inf, "positive")
        check_flags(self, "weight_decay", lambda value: 0 <= value < math.inf, "0 or more")
        check_flags(self, "caption_dropout", lambda share: 0 <= share < 1, "in [0, 1)")
        check_flags(self, "val_images", lambda n: n >= 2, "2 or more, for a standard error")
        check_flags(self, "ema_width", lambda width: 0 < width < 0.28,
                    "in (0, 0.28), the widths of power functions")
        given = f"--budget {' '.join(f'{budget:g}' for budget in self.budget)}"
        if not self.budget or not all(0 < budget < math.inf for budget in self.budget):
            raise ValueError(f"{given}: needs positive numbers")
        if any(one >= two for one, two in zip(self.budget, self.budget[1:])):
            raise ValueError(f"{given}: budgets must rise")
        if len({f"{budget:.4g}" for budget in self.budget}) < len(self.budget):
            raise ValueError(f"{given}: two agree in the 4 digits that name their folders")
        if self.batch % self.micro_batches:
            raise ValueError(f"--batch {self.batch} is not divisible by "
                             f"--micro_batches {self.micro_batches}")

# ---- the device ----------------------------------------------------------------------------------

def find_device(asked):
    """-> torch.device, and its name. Raises ValueError where there is no such device.

    A GPU also becomes the current one of this thread, which is where kernels start.
    """
    if asked == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here")
    if asked == "cpu" or not torch.cuda.is_available():
        instructions = torch.backends.cpu.get_cpu_capability()
        return torch.device("cpu"), f"CPU {platform.machine()} ({instructions})"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device, torch.cuda.get_device_name(device)

def resolve_auto(config, model_config):
    """The TrainConfig with all that is "auto" chosen: precision, compile, threads.

    The choice depends on model and device alone. If it depended on the budgets, the run to a small
    budget would no longer be the beginning of the run to a larger one.
    """
    device, _ = find_device(config.device)
    threads = torch.get_num_threads()
    if device.type == "cuda":
        multiplies = torch.cuda.is_bf16_supported(including_emulation=False)
        new_enough = torch.cuda.get_device_capability(device) >= (7, 0)
        compiles = new_enough and importlib.util.find_spec("triton") is not None
    else:   # a CPU without these instructions converts to float32 and back, which is slower
        able = torch.cpu.get_capabilities() if torch.backends.mkldnn.is_available() else {}
        instructions = any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        multiplies = instructions and model_config.width >= CPU_BFLOAT16_WIDTH
        compiles = False
        threads = max(1, min(threads, model_config.width // THREAD_WIDTH))
    auto = {"precision": "bfloat16" if multiplies else "float32",
            "compile": "on" if compiles else "off"}
    chosen = {name: value for name, value in auto.items() if getattr(config, name) == "auto"}
    return replace(config, threads=config.threads or threads, **chosen)

def autocast(device, precision):
    """bfloat16 for the products; the weights and what sums many numbers stay in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")

def compiled(model, config, world=1):
    """torch.compile of the model for the one shape that training has.

    CUDA graphs (mode "reduce-overhead") save kernel launches, which rule narrow models. They are
    not for --accumulate: the next replay would overwrite gradients that are still needed. Out of
    caution they are not for several devices, where DDP reads the gradients.
    """
    on_gpu = next(model.parameters()).is_cuda
    graphs = on_gpu and model.config.width < GRAPH_WIDTH and config.accumulate == 1 and world == 1
    mode = "reduce-overhead" if graphs else "default"
    return torch.compile(model, fullgraph=True, dynamic=False, mode=mode)

def peak_flops(device_name, precision):
    """Dense peak of the products in FLOP/s, from the datasheet; None where it is not known."""
    for name in sorted(PEAK, key=len, reverse=True):   # "H100 PCIe" before "H100"
        if precision == "bfloat16" and re.search(rf"\b{name}\b", device_name):
            return PEAK[name] * 1e12

# ---- batches: every random number is a function of (seed, step, micro-batch) ---------------------

def training_batch(data, config, step, rank, world, device):
    """What this rank sees of the global batch of a step (1, 2, ...): x, eps, t, text, text_mask.

    No random number depends on the rank or on how often the run was resumed. Times are stratified
    over the whole global batch.
    """
    # 16 images in 4 micro-batches, on 2 devices: the second has micro-batches 2 and 3, which are
    # images 8 to 15 of the step.
    size = config.batch // config.micro_batches
    first = rank * config.micro_batches // world
    here = slice(first * size, first * size + config.batch // world)
    index = torch.arange((step - 1) * config.batch, step * config.batch)[here]     # (B,)
    raw, text, text_mask = data.batch("train", index)                  # text (B, S, F), mask (B, S)
    x, eps, jitter, keep = [], [], [], []
    for micro_batch, part in enumerate(raw.split(size), start=first):
        generator = seeded(config.seed, step, micro_batch, device=device)
        x.append(data.to_x(part, generator))                               # (size, C, R, R)
        eps.append(torch.randn(x[-1].shape, generator=generator, device=device))
        jitter.append(torch.rand(size, generator=generator, device=device))    # (size,)
        keep.append(torch.rand(size, generator=generator, device=device) >= config.caption_dropout)
    stratum = torch.randperm(config.batch, generator=seeded(config.seed, step))[here].to(device)
    t = flow.stratified_times(stratum, config.batch, torch.cat(jitter), config.t_sampling)   # (B,)
    # A caption without a real word is no caption: what guidance needs (Ho & Salimans 2022).
    return torch.cat(x), torch.cat(eps), t, text, text_mask & torch.cat(keep)[:, None]

def batches(state, first, last):
    """The training batches of the steps `first` to `last`.

    Where the source says so, a thread draws the next one while the device computes. A batch is a
    function of its step alone, so nothing depends on when it is drawn.
    """
    def draw(step):
        return training_batch(state.data, state.config, step, state.rank, state.world, state.device)

    if not state.data.prefetch:
        yield from map(draw, range(first, last + 1))
        return
    with ThreadPoolExecutor(1, initializer=find_device, initargs=(state.config.device,)) as reader:
        coming = reader.submit(draw, first)
        for step in range(first, last + 1):
            batch = coming.result()
            coming = reader.submit(draw, step + 1)   # of the last step for nothing
            yield batch

def validation_batches(data, images, rank=0, world=1, first=None):
    """This rank's share of the fixed validation set, or of its `first` images.

    -> (indices, (x, eps, t, text, text_mask)). All is drawn on the CPU and depends on neither the
    run's seed nor the devices, so it is the same for every run of a sweep. There is one time in
    each of `images` slices of VALIDATION_TIMES.
    """
    stratum = torch.randperm(images, generator=seeded(VALIDATION_SEED, images))
    for start in range(rank * VALIDATION_BATCH, first or images, world * VALIDATION_BATCH):
        index = torch.arange(start, min(start + VALIDATION_BATCH, images))
        raw, text, text_mask = data.batch("validation", index)
        generator = seeded(VALIDATION_SEED, images, start)
        x = data.to_x(raw, generator)                                                # (B, C, R, R)
        eps = torch.randn(x.shape, generator=generator).to(x.device)
        jitter = torch.rand(len(index), generator=generator)                         # (B,)
        t = flow.stratified_times(stratum[index], images, jitter, VALIDATION_TIMES).to(x.device)
        yield index, (x, eps, t, text, text_mask)

def validation_losses(model, data, n, precision, rank=0, world=1, first=None):
    """Loss and time of each of n validation images, (n,) float32 on the CPU, whole on every rank.

    first: only so many of them, a multiple of VALIDATION_BATCH.
    """
    both = torch.zeros(2, n)
    for index, batch in validation_batches(data, n, rank, world, first):
        with autocast(batch[0].device, precision):
            both[0, index] = flow.validation_loss(model, [batch])
        both[1, index] = batch[2].cpu()
    if world > 1:   # where another rank was at work there are zeros
        both = both.to(data.device)
        dist.all_reduce(both)
    return both.cpu()[:, :first]

def sample_data(model, data, precision, index, steps=16, guidance=3.0, seed=VALIDATION_SEED):
    """Samples x for the captions of validation images `index` (B,), like x, not clipped.

    The noise of a sample depends on (seed, index) alone.
    """
    raw, text, text_mask = data.batch("validation", index)
    shape = data.shape["channels"], data.shape["size"], data.shape["size"]
    noises = [torch.randn(shape, generator=seeded("sample", seed, i)) for i in index.tolist()]
    eps = torch.stack(noises).to(raw.device)                                        # (B, C, R, R)
    with autocast(raw.device, precision):
        return flow.sample(model, eps, text, text_mask, steps, guidance=guidance).float()

# ---- the folder of a run -------------------------------------------------------------------------

def steps_for(budget, model, config):
    """The steps whose FLOPs are nearest to the budget. Raises ValueError where they are too few."""
    step_flops = config.batch * model.flops_per_image(config.count)
    fewest = max(MIN_STEPS, MIN_WARMUPS * config.warmup)
    steps = round(budget / step_flops)
    if steps < fewest:
        raise ValueError(
            f"--budget {budget:g} gives {steps} steps of {step_flops:.3g} FLOPs; a point needs "
            f"{fewest} ({MIN_STEPS}, and {MIN_WARMUPS} times the warm-up): "
            f"the smallest possible is {fewest * step_flops:.3g}")
    return steps

def run_name(model_config, seed):
    """The folder of a run in a sweep: its size and seed, by which runs differ there."""
    return f"depth{model_config.depth:02d}_width{model_config.width:03d}_seed{seed}"

def point_folder(out, budget):
    """Where a run keeps what it measured at a budget."""
    return os.path.join(out, f"budget_{budget:.4g}")

def definition_of(model_config, data_config, config, encoders):
    """What defines a run, so what a resumed one must agree with.

    The budgets are no part of it, because nothing in a step depends on them: a schedule that did
    would have to stand here. encoders: of the data set (`data.encoders`), the weights that made its
    latents and features.
    """
    settings = {name: value for name, value in asdict(config).items()
                if name not in config.FREE}
    definition = {"schema": SCHEMA, "model": asdict(model_config), "data": asdict(data_config),
                  "train": settings}
    return {**definition, "encoders": encoders} if encoders else definition

def check_earlier_run(out, definition):
    """Refuse a folder that was begun with another definition (ValueError).

    A flag that the saved configuration does not name came later, and then meant its default. So a
    new flag never makes an old folder refuse to resume.
    """
    mend = "move it away or take another --out"
    saved = read_json(os.path.join(out, "config.json"), ("model", "data", "train", "runtime"), mend)
    if saved is None:
        return
    del saved["runtime"]
    plain = resolve_auto(TrainConfig(), ModelConfig())
    defaults = definition_of(ModelConfig(), DataConfig(), plain, {})
    current = {**definition, "train": dict(definition["train"])}
    for section in ("model", "data", "train"):
        saved[section] = {**defaults[section], **saved[section]}
    for one in (saved, current):   # so many are meant where the flag is not given
        one["train"]["val_images"] = one["train"]["val_images"] or VALIDATION_IMAGES
    if differs := differences(saved, current):
        raise ValueError(f"--out {out} belongs to another configuration ({'; '.join(differs)}): "
                         "take another --out, or the flags it was begun with")

def read_record(out, budget):
    """A point's result.json, None where it is missing or its loss is no number.

    Raises ValueError for a torn or foreign file, or another budget's.
    """
    path = os.path.join(point_folder(out, budget), "result.json")
    record = read_json(path, ("schema", "budget", "val_loss_ema"),
                       "delete it, and checkpoint.pt, to train this run again")
    if record and (record["schema"], record["budget"]) != (SCHEMA, budget):
        raise ValueError(f"{path}: is of schema {record['schema']} and budget {record['budget']!r},"
                         f" not of {SCHEMA} and {budget!r}: take another --out")
    return record if record and math.isfinite(record["val_loss_ema"]) else None

def open_log(path, step):
    """The log for appending, cut behind the last line that the checkpoint at `step` covers.

    It is locked, so that no second process trains in its folder. The system lets go of the lock
    however this process ends.
    """
    log = open(path, "a+")
    if path == os.devnull:   # of all ranks but the first
        return log
    try:
        if fcntl:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        log.close()
        raise ValueError(f"{path}: another process is training in this folder") from None
    end = 0   # of the lines to be kept, in bytes
    log.seek(0)
    with contextlib.suppress(json.JSONDecodeError):   # of the line that a kill tore
        while (line := log.readline()) and json.loads(line)["step"] <= step:
            end = log.tell()
    log.truncate(end)
    return log

# ---- the state of a run --------------------------------------------------------------------------

def ema_exponent(relative_width):
    """gamma of the power-function average whose width is this share of the training so far.

    Weight t^gamma has relative standard deviation sigma = (gamma+1)^(1/2) (gamma+2)^-1
    (gamma+3)^-(1/2) (Karras et al. 2024, arXiv 2312.02696, eq. 123); 0.1 gives 6.94. Its horizon
    grows with the run, so one run serves all its budgets.
    """
    low, high = 0.0, 1e6   # sigma falls with gamma
    for _ in range(100):
        middle = (low + high) / 2
        sigma = (middle + 1) ** 0.5 / (middle + 2) / (middle + 3) ** 0.5
        low, high = (middle, high) if sigma > relative_width else (low, middle)
    return low

def make_optimizer(model, config):
    """AdamW over the model's groups, each with its rate (mup).

    Whatever stands here must not amplify rounding: the numbers may not depend on the devices. Its
    own work is not a part of C; AdamW's is nothing beside a step.
    """
    groups = model.parameter_groups(config.lr)
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True,
                             weight_decay=config.weight_decay)

class TrainState:
    """One model on its way to its budgets: settings, data, weights, optimiser and counters.

    train_step works right after it is made: sweep.py times steps so. Nothing is written before
    `save`, whose checkpoint.pt holds what changes from step to step. Raises ValueError for what
    can't be trained.
    """

    COUNTERS = ("step", "seconds", "evaluation_seconds", "start_loss", "start_loss_expected",
                "drift")

    def __init__(self, model_config, data_config, config):
        self.rank, self.world = ranks()
        if config.micro_batches % self.world:
            raise ValueError(f"--micro_batches {config.micro_batches} is not divisible by the "
                             f"{self.world} processes of torchrun")
        mine = config.batch // self.world
        if mine % config.accumulate:
            raise ValueError(f"--accumulate {config.accumulate} does not divide the {mine} images "
                             "of a device")
        self.device, name = find_device(config.device)
        config = resolve_auto(config, model_config)
        torch.set_num_threads(config.threads)
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.data = data = load_data(data_config, config.seed, self.device)
        if data.train_images is not None and data.train_images < config.batch:
            raise ValueError(f"--batch {config.batch}: {data_config.data} has only "
                             f"{data.train_images} images to train on")
        most = data.validation_images or math.inf   # None: endless
        if (config.val_images or 0) > most:
            raise ValueError(f"--val_images {config.val_images}: {data_config.data} has only "
                             f"{most} for validation")
        # Of val_images the definition has what was asked for: so it does not depend on the data.
        self.definition = definition_of(model_config, data_config, config, data.encoders)
        val_images = config.val_images or min(VALIDATION_IMAGES, most)
        self.config = config = replace(config, val_images=val_images)
        # On these the last bits of the results depend.
        self.runtime = {"device": name, "devices": self.world, "threads": config.threads,
                        "versions": {"python": platform.python_version(),
                                     "torch": str(torch.__version__), "numpy": np.__version__}}
        self.out = config.out or f"results/train/{run_name(model_config, config.seed)}"
        torch.manual_seed(config.seed)
        self.model = DiT(model_config, **data.shape).to(self.device)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.gamma = ema_exponent(config.ema_width)
        self.optimizer = make_optimizer(self.model, config)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step_flops = config.batch * self.model.flops_per_image()
        self.network = self.model   # is called for gradients; the model itself is what is saved
        if config.compile == "on":
            self.network = compiled(self.model, config, self.world)
        if self.world > 1:
            self.network = DistributedDataParallel(self.network, gradient_as_bucket_view=True)
        self.loss = torch.zeros((), device=self.device)    # of the last step
        self.smooth = self.loss                            # averaged: the paper's training loss
        self.words = torch.zeros((), dtype=torch.long, device=self.device)   # of captions, seen
        # The counters. Seconds are of training alone: validation and checkpoints stop the clock.
        self.step = 0
        self.seconds = self.evaluation_seconds = 0.0
        self.start_loss = self.start_loss_expected = None
        self.drift = []                                    # changes of the runtime on resuming
        self.clock = self.saved_at = time.monotonic()

    def say(self, text):
        """Print above the progress bar, on the first rank."""
        if self.rank == 0:
            tqdm.write(text)

    def speed(self):
        """FLOP/s of one device, and their share of its peak (MFU), None where it is not known."""
        rate = self.step * self.step_flops / self.seconds / self.world
        peak = peak_flops(self.runtime["device"], self.config.precision)
        return rate, rate / peak if peak else None

    def about(self):
        """What a file of weights says of itself: enough to build the model again."""
        return {"definition": json.dumps(self.definition), "shape": json.dumps(self.data.shape)}

    def save(self):
        """Write checkpoint.pt, whole or not at all."""
        if self.rank == 0:
            content = {"model": self.model.state_dict(), "ema": self.ema.state_dict(),
                       "optimizer": self.optimizer.state_dict(), "loss": self.loss,
                       "smooth": self.smooth, "words": self.words, "runtime": self.runtime,
                       "state": {name: getattr(self, name) for name in self.COUNTERS},
                       **self.about()}
            path = os.path.join(self.out, "checkpoint.pt")
            write_whole(path, lambda temporary: torch.save(content, temporary))
        self.clock = self.saved_at = time.monotonic()

    def load(self):
        """Go on from checkpoint.pt where there is one. Raises ValueError for a torn or foreign one.

        Another device or version changes the last bits: that is a warning, and the record says so.
        """
        path = os.path.join(self.out, "checkpoint.pt")
        if not os.path.exists(path):
            return
        try:
            saved = torch.load(path, map_location=self.device, weights_only=True)
            for part in ("model", "ema", "optimizer"):
                getattr(self, part).load_state_dict(saved[part])
            self.loss, self.smooth, self.words = saved["loss"], saved["smooth"], saved["words"]
            for name, value in saved["state"].items():
                setattr(self, name, value)
        except Exception as error:   # torch raises many kinds; whichever, the file is of no use
            raise ValueError(f"{path}: torn, or not a checkpoint of isoflow ({one_line(error)}): "
                             "delete it to start this run over") from None
        self.say(f"{self.out}: resumed at step {self.step}")
        # Checkpoints of the first edition do not say where they were made.
        if differs := differences(saved.get("runtime", self.runtime), self.runtime):
            self.drift = [*self.drift, f"step {self.step}: {'; '.join(differs)}"]
            self.say(f"WARNING: resumed elsewhere ({'; '.join(differs)}): last bits may differ")

    def stop(self, what):
        """Raise FloatingPointError. The last checkpoint is kept."""
        raise FloatingPointError(f"{self.out}: {what} at or before step {self.step} (is --lr "
                                 f"{self.config.lr:g} too large?); the last checkpoint is kept")

# ---- a step --------------------------------------------------------------------------------------

def compute_gradients(state, batch):
    """Forward and backward of this rank's batch, in `accumulate` parts. -> its mean loss, ()."""
    loss = torch.zeros((), device=state.device)
    parts = list(zip(*(tensor.chunk(state.config.accumulate) for tensor in batch)))
    for number, part in enumerate(parts, start=1):
        # Gradients are averaged over the devices once, with the last part.
        together = state.world == 1 or number == len(parts)
        with contextlib.nullcontext() if together else state.network.no_sync():
            with autocast(state.device, state.config.precision):
                part_loss = flow.loss_per_image(state.network, *part).mean() / len(parts)
            part_loss.backward()
        loss += part_loss.detach()
    return loss

def sum_over_devices(state, tensor):
    """In place, and the same on every device afterwards."""
    if state.world > 1:
        dist.all_reduce(tensor)
    return tensor

def train_step(state, batch):
    """One step of optimiser and average. -> the norm of the gradient, a tensor on the device.

    batch: of training_batch. Nothing is fetched from the device here, but for the first step.
    """
    x, *_, text_mask = batch
    step = state.step + 1
    # Linear warm-up, then constant: only so a run to a small budget begins all larger ones.
    for group, rate in zip(state.optimizer.param_groups, state.rates):
        group["lr"] = rate * min(1.0, step / state.config.warmup)
    loss = compute_gradients(state, batch)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), state.config.clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    # The average of the weights of steps 1 to now with weight step^gamma (Karras et al., eq. 127).
    with torch.no_grad():
        share = 1 - (1 - 1 / step) ** (state.gamma + 1)
        torch._foreach_lerp_(list(state.ema.parameters()), list(state.model.parameters()), share)
    # Counters and losses, of all devices. `smooth` is the paper's training loss.
    state.loss = sum_over_devices(state, loss) / state.world
    state.smooth = state.loss if step == 1 else 0.9 * state.smooth + 0.1 * state.loss
    state.words = state.words + sum_over_devices(state, text_mask.sum())
    if step == 1:
        expected = sum_over_devices(state, flow.expected_start_loss(x)) / state.world
        state.start_loss, state.start_loss_expected = state.loss.item(), expected.item()
    state.step = step
    return norm

def log_step(state, norm, bar, log):
    """Progress bar, log line and clock. Only here a step waits for the device.

    A loss that is not finite stays so in its average, so none is missed between two calls.
    """
    if state.step == 1:
        state.say(f"loss at start {state.start_loss:.4f}; "
                  f"expected 1 + E[x^2] = {state.start_loss_expected:.4f}")
    smooth, gradient = state.smooth.item(), norm.item()
    if not (math.isfinite(smooth) and math.isfinite(gradient)):
        state.stop("the loss or its gradient is not finite")
    now = time.monotonic()
    state.seconds += now - state.clock
    state.clock = now
    C = state.step * state.step_flops
    rate, mfu = state.speed()
    bar.set_postfix_str(f"loss {smooth:.4f}, {C:.3g} FLOPs done, "
                        + (f"MFU {mfu:.1%}" if mfu else f"{rate / 1e9:.0f} GFLOP/s"))
    if state.step % LOG_STEPS == 0:
        # lr is that of all but the hidden matrices, whose rate falls with the width (mup).
        line = {"step": state.step, "C": C, "train_loss": state.loss.item(),
                "train_loss_smooth": smooth, "grad_norm": gradient,
                "lr": state.optimizer.param_groups[-1]["lr"], "seconds": round(state.seconds, 3)}
        log.write(json.dumps(line) + "\n")
        log.flush()

def warm_up_compiler(state):
    """Three passes beside the clock: the first compiles, the third records CUDA graphs."""
    began = time.monotonic()
    try:
        batch = next(batches(state, state.step + 1, state.step + 1))
        for _ in range(3):
            compute_gradients(state, batch).item()
            state.optimizer.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"torch.compile failed ({one_line(error)}): --compile off trains "
                           "without it") from None
    state.say(f"compiled in {time.monotonic() - began:.0f} s")

# ---- a point -------------------------------------------------------------------------------------

def evaluate_point(state, budget):
    """Validate the weights at a budget and write them. -> the losses, named as in a record."""
    share = state.config.precision, state.rank, state.world
    n = state.config.val_images
    losses, times = validation_losses(state.ema, state.data, n, *share)
    mean, error = flow.mean_and_standard_error(losses)
    # The raw weights are compared with the average on a part of the images: image by image the
    # difference of the two varies far less than the loss.
    part = min(n, max(1, n // RAW_SHARE // VALIDATION_BATCH) * VALIDATION_BATCH)
    raw, _ = validation_losses(state.model, state.data, n, *share, first=part)
    gap, gap_error = flow.mean_and_standard_error(raw - losses[:part])
    if not (math.isfinite(mean) and math.isfinite(gap)):
        state.stop("the validation loss is not finite")
    if state.rank == 0:
        folder = point_folder(state.out, budget)
        os.makedirs(folder, exist_ok=True)
        save_samples(state, budget, os.path.join(folder, "samples.png"))
        write_whole(os.path.join(folder, "ema.safetensors"),
                    lambda path: save_file(state.ema.state_dict(), path, state.about()))
        write_array(os.path.join(folder, "val_losses_ema.npy"), losses.numpy())
    return {"val_loss": mean + gap, "val_loss_se": math.hypot(error, gap_error),
            "val_loss_ema": mean, "val_loss_ema_se": error, "val_images": n,
            "val_loss_ema_by_time": flow.loss_by_time(losses, times)}

def save_samples(state, budget, path):
    """A picture of held-out images, each beside a sample for its caption."""
    index = torch.arange(min(SAMPLES, state.config.val_images))
    samples = sample_data(state.ema, state.data, state.config.precision, index, SAMPLE_STEPS)
    try:
        groups = [state.data.images("validation", index), state.data.to_levels(samples)]
    except ValueError as problem:   # latents without their VAE, which training does not need
        state.say(f"no samples.png: {problem}")
        return
    title = (f"{os.path.basename(state.out)}, budget {budget:g}: held-out image | sample for its "
             f"caption (EMA weights, {SAMPLE_STEPS} Heun steps, guidance 3)")
    save_grid(path, groups, state.data.captions("validation", index), title)

def make_record(state, budget, losses):
    """The record of a point, the dictionary of result.json. Losses: of evaluate_point."""
    model, config, data = state.model, state.config, state.data
    images = state.step * config.batch
    tokens = {kind: images * count for kind, count in model.tokens().items()}
    there = data.train_images   # None: endless
    rate, mfu = state.speed()
    return {
        # What was trained, ...
        "schema": SCHEMA, "arch": model.config.arch, "depth": model.config.depth,
        "width": model.config.width, "head_dim": model.config.head_dim,
        "parametrization": model.config.parametrization, "lr": config.lr, "seed": config.seed,
        **{f"N_{group}": count for group, count in model.count_parameters().items()},
        # ... with how much compute and data, ...
        "budget": budget, "count": config.count, "C": state.step * state.step_flops,
        "C_6nd": images * model.flops_per_image("6nd"), "D": sum(tokens.values()),
        **{f"D_{kind}": count for kind, count in tokens.items()},
        "D_text_real": state.words.item(), "images": images, "steps": state.step,
        "batch": config.batch, "epochs": images / there if there else None, "train_images": there,
        "images_repeated": max(0, images - there) if there else 0,
        # ... how good it became, ...
        "train_loss": state.smooth.item(), "train_loss_plain": state.loss.item(), **losses,
        "start_loss": state.start_loss, "start_loss_expected": state.start_loss_expected,
        # ... on which data, and on which machine at what speed.
        "data": data.config.data, "resolution": data.config.resolution,
        "captions": data.config.captions, **state.runtime, "precision": config.precision,
        "compile": config.compile, "drift": state.drift, "seconds": state.seconds,
        "evaluation_seconds": state.evaluation_seconds,
        "device_hours": state.seconds * state.world / 3600, "tflops": rate / 1e12, "mfu": mfu,
    }

def finish_point(state, budget):
    """Checkpoint, evaluation and record of a budget. The record comes last: then it is done."""
    state.save()
    losses = evaluate_point(state, budget)
    state.evaluation_seconds += time.monotonic() - state.clock
    record = make_record(state, budget, losses)
    if state.rank == 0:
        write_json(os.path.join(point_folder(state.out, budget), "result.json"), record)
    state.say(f"{budget:g} FLOPs: validation loss {record['val_loss_ema']:.4f} +- "
              f"{record['val_loss_ema_se']:.4f} (EMA), {record['val_loss']:.4f} (raw)")
    state.clock = time.monotonic()
    return record

# ---- the run -------------------------------------------------------------------------------------

def introduce(state, last):
    """Print the whole configuration once, and what the run will be."""
    state.say(json.dumps({**state.definition, "runtime": state.runtime}))
    N, data, images = state.model.count_parameters(), state.data, last * state.config.batch
    state.say(f"N = {N['blocks']:,} in the blocks, {N['total']:,} in all; "
              f"{state.model.flops_per_image():.4g} FLOPs an image; {last:,} steps of "
              f"{state.config.batch} images; {state.config.precision} on {state.runtime['device']}")
    if data.train_images:
        state.say(f"{data.train_images:,} training images, each seen "
                  f"{images / data.train_images:.3g} times; {about_remarks(data.remarks)}")

def train(model_config, data_config, config):
    """Train one model to every budget of config.budget. -> the list of their records.

    Raises ValueError for input that can't be used, FloatingPointError where the loss is no number.
    """
    state = TrainState(model_config, data_config, config)
    check_earlier_run(state.out, state.definition)
    # Which points are wanted, and which of them are missing: {step: budget}.
    points = {steps_for(budget, state.model, config): budget for budget in config.budget}
    if len(points) < len(config.budget):
        raise ValueError("--budget: two of them are the same number of steps; take budgets "
                         "further apart")
    records = {budget: read_record(state.out, budget) for budget in config.budget}
    points = {step: budget for step, budget in points.items() if records[budget] is None}
    if not points:
        state.say(f"{state.out}: all budgets are done ({', '.join(f'{b:g}' for b in records)})")
        return list(records.values())
    state.load()
    if state.step > min(points):   # a run goes forward only
        raise ValueError(f"--budget {points[min(points)]:g}: the checkpoint of {state.out} is at "
                         f"step {state.step}, behind it: delete checkpoint.pt to start over")
    last = max(points)
    introduce(state, last)
    if state.config.compile == "on" and state.step < last:
        warm_up_compiler(state)
    if state.rank == 0:
        os.makedirs(state.out, exist_ok=True)
        if not os.path.exists(config_file := os.path.join(state.out, "config.json")):
            write_json(config_file, {**state.definition, "runtime": state.runtime})
    log_file = os.path.join(state.out, "log.jsonl") if state.rank == 0 else os.devnull
    with (open_log(log_file, state.step) as log,
          tqdm(desc=os.path.basename(state.out), total=last, initial=state.step, unit="step",
               disable=state.rank > 0, smoothing=0.05,
               mininterval=1 if sys.stderr.isatty() else 30) as bar):
        state.clock = state.saved_at = time.monotonic()   # the first second of training
        if state.step in points:   # killed between its checkpoint and its record
            records[points[state.step]] = finish_point(state, points[state.step])
        for batch in batches(state, state.step + 1, last):
            norm = train_step(state, batch)
            bar.update()
            if state.step == 1 or state.step % LOG_STEPS == 0 or state.step in points:
                log_step(state, norm, bar, log)
            if state.step in points:
                records[points[state.step]] = finish_point(state, points[state.step])
            elif state.clock - state.saved_at > CHECKPOINT_SECONDS:
                state.save()
    return list(records.values())

def main():
    configs = parse_flags((ModelConfig, DataConfig, TrainConfig), __doc__, PRESETS)
    with errors_in_one_line("train.py"):
        try:
            train(*configs)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

if __name__ == "__main__":
    main()
