"""How fast is a training step, beside the device's matrix products, its peers and its own products? python tests/bench/speed.py [names ...]

    family   the paper's family in the three architectures: images/s, MFU, memory, where the time of a step goes
    peers    our three against diffusers' DiT, PixArt and SD3 of the same size: the same whole step, in turns
    scenes   scenes drawn a second, beside what the smallest quick model trains on
    bare     (CPU) our step against a bare loop over the same products
    rules    (CPU) a step by width, precision, threads and torch.compile: what the constants of train.resolve_auto rest on

Without names all of them, on a GPU the first three. A step is the trainer's: loss, backward, clip, fused AdamW, average of the weights,
on one batch of random numbers, in the precision and with the torch.compile that train.resolve_auto chooses. Compilation and warm-up
are beside the clock, rates are medians. With the environment variable OUT each row is also a JSON line of $OUT/speed.json.
On a GPU a name, an --arch or a --depth at a time keeps a call short: torch.compile takes a minute for a deep model.
"""
import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]
import flow
import train
from data import DataConfig, load_data
from model import FAMILY_CONFIG, FAMILY_INPUT, DiT, ModelConfig, attend, family

ARCHS = ("incontext", "cross", "mmdit")
PARTS = ("forward", "backward", "clip", "optimiser", "average")
THREADS = torch.get_num_threads()   # before any row sets its own
PAPER_DEPTHS = [2, 3, 4, 6, 9, 12, 15, 27]   # of model.family("paper"); width 64 * depth
LATENTS, SCENES = FAMILY_INPUT["paper"], FAMILY_INPUT["quick"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# ---- the clock, the table, the device ----------------------------------------------------------------------------------

def mark(device):
    """A point in time of the device: on a GPU an event in its queue, so that nothing waits until the times are read."""
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(first, second):
    """Seconds from one mark to the next."""
    if isinstance(first, float):
        return second - first
    second.synchronize()
    return first.elapsed_time(second) / 1000


def free():
    """Give back what the models of the last row held: memory, compiled code, CUDA graphs."""
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Table:
    """Rows printed as they are measured. columns: {heading: format}, text to the left ("<9") and numbers to the right ("9.1f")."""

    def __init__(self, name, title, columns, total=None):
        self.name, self.columns = name, columns
        self.widths = {heading: max(len(heading), len(format("" if form[0] == "<" else 0, form))) for heading, form in columns.items()}
        tqdm.write(f"\n{name}: {title}\n" + self.line({heading: heading for heading in columns}))
        self.bar = tqdm(total=total, desc=name, leave=False, disable=total is None, mininterval=1 if sys.stderr.isatty() else 30)

    def line(self, cells):
        return "  ".join(cells.get(heading, "-").ljust(width) if self.columns[heading][0] == "<" else cells.get(heading, "-").rjust(width)
                         for heading, width in self.widths.items()).rstrip()

    def row(self, values, remark=""):
        """values: {heading: number or text}; what is not there or None is a dash. remark: what went wrong."""
        cells = {heading: format(values[heading], form) for heading, form in self.columns.items() if values.get(heading) is not None}
        tqdm.write(self.line(cells) + (f"   {remark}" if remark else ""))
        sys.stdout.flush()
        self.bar.update()
        if out := os.environ.get("OUT"):
            with open(os.path.join(out, f"{Path(sys.argv[0]).stem}.json"), "a") as file:
                file.write(json.dumps({"table": self.name, **values, **({"remark": remark} if remark else {})}) + "\n")

    def end(self, note=""):
        self.bar.close()
        if note:
            tqdm.write(note)


class Machine:
    """The device, its name, and the rate of one large product in each precision, FLOP/s: what a model can hope for."""

    def __init__(self, flag, n=None):
        self.device, self.name = train.find_device(flag)
        self.n = n or (8192 if self.device.type == "cuda" else 2048)
        self.rates = {}
        table = Table("matrix", f"a product of {self.n} x {self.n} on {self.name}, {THREADS} threads",
                      {"precision": "<9", "TFLOP/s": "9.3f", "datasheet": "9.0f", "share": "7.1%"})
        for precision, dtype in DTYPES.items():
            a, b = (torch.randn(self.n, self.n, device=self.device).to(dtype) for _ in range(2))
            marks = [mark(self.device)]
            for _ in range(100 if self.device.type == "cuda" else 10):   # long enough for the clock of a GPU to settle
                a @ b
                marks.append(mark(self.device))
            seconds = [between(*pair) for pair in zip(marks, marks[1:])]
            self.rates[precision] = rate = 2 * self.n ** 3 / statistics.median(seconds[3:])
            peak = train.peak_flops(self.name, precision)
            table.row({"precision": precision, "TFLOP/s": rate / 1e12, "datasheet": peak and peak / 1e12, "share": peak and rate / peak})
        table.end()

    def settled(self, model_config, **changes):
        torch.set_num_threads(THREADS)   # train.resolve_auto chooses among these
        return train.resolve_auto(train.TrainConfig(lr=1e-4, device=self.device.type, **changes), model_config)


# ---- a step ------------------------------------------------------------------------------------------------------------

def random_batch(shape, images, device):
    """x, eps, t, text, text_mask with captions of every length: a step costs the same on any numbers."""
    pixels = images, shape["channels"], shape["size"], shape["size"]
    lengths = torch.randint(1, shape["text_tokens"] + 1, (images, 1), device=device)
    return (torch.randn(pixels, device=device), torch.randn(pixels, device=device), torch.rand(images, device=device),
            torch.randn(images, shape["text_tokens"], shape["text_dim"], device=device),
            torch.arange(shape["text_tokens"], device=device) < lengths)


class Step:
    """The trainer's step of `model`, which is v(x_t, t, text, text_mask), on one batch."""

    def __init__(self, model, config, batch):
        self.config, self.batch, self.device = config, batch, batch[0].device
        torch.set_num_threads(config.threads)
        self.weights, self.averages = list(model.parameters()), list(copy.deepcopy(model).requires_grad_(False).parameters())
        ours = hasattr(model, "parameter_groups")   # and not a peer of diffusers
        groups = model.parameter_groups(config.lr) if ours else self.weights
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True)
        self.network, start = train.compiled(model, config) if config.compile == "on" else model, time.perf_counter()
        self.run(3)   # compiles, records CUDA graphs at the third, makes the moments
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.warm_up_seconds = time.perf_counter() - start

    def run(self, steps):
        """-> seconds of each part of each step: steps lists like PARTS."""
        torch.set_num_threads(self.config.threads)
        marks = []
        for _ in range(steps):
            ours = [mark(self.device)]
            with train.autocast(self.device, self.config.precision):
                loss = flow.loss_per_image(self.network, *self.batch).mean()
            ours.append(mark(self.device))
            loss.backward()
            ours.append(mark(self.device))
            torch.nn.utils.clip_grad_norm_(self.weights, self.config.clip)
            ours.append(mark(self.device))
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            ours.append(mark(self.device))
            with torch.no_grad():
                torch._foreach_lerp_(self.averages, self.weights, 0.01)
            ours.append(mark(self.device))
            marks.append(ours)
        return [[between(*pair) for pair in zip(ours, ours[1:])] for ours in marks]

    def seconds(self, steps):
        """Of one step, the median of so many."""
        return statistics.median(sum(parts) for parts in self.run(steps))


def in_turns(runners, turns, steps, bar):
    """Seconds of a step of each of the runners, one list of `turns` each: A, B, C, A, B, C, ...: other processes come and go."""
    seconds = [[] for _ in runners]
    for _ in range(turns):
        for runner, found in zip(runners, seconds):
            found.append(runner.seconds(steps))
            bar.refresh()
    return seconds


# ---- family ------------------------------------------------------------------------------------------------------------

def bytes_by_hand(model, precision, images):
    """What a step needs at its peak.

    20 bytes a parameter: weights, gradients, two moments, average, in float32. And what is kept for the backward pass of each block, eager,
    for each token and unit of width, with a bytes a number (bfloat16: 2): the inputs of the two norms, in float32 (8 bytes); what the norms
    give (2a), q, k, v (3a), the attended values (a), the MLP before and after its activation (8a). adaLN keeps besides the tokens
    that it scales (8) and the branches that it gates (2a); cross its own stream, query and attended values (4 + 3a) and the keys and
    values of the text (2a). torch.compile makes some of it anew in the backward pass; small things are left out.
    """
    a, arch, tokens = 2 if precision == "bfloat16" else 4, model.config.arch, model.tokens()
    n = {"incontext": sum(tokens.values()), "cross": tokens["image"], "mmdit": tokens["image"] + tokens["text"]}[arch]
    kept = n * (8 + 14 * a + (0 if arch == "incontext" else 8 + 2 * a))
    if arch == "cross":
        kept += tokens["image"] * (4 + 3 * a) + tokens["text"] * 2 * a
    return 20 * model.count_parameters()["total"] + images * model.config.depth * model.config.width * kept


def bench_family(machine, archs=ARCHS, depths=None, batch=None, compile="auto", steps=None):
    gpu = machine.device.type == "cuda"
    depths, batch, steps = depths or (PAPER_DEPTHS if gpu else [2]), batch or (256 if gpu else 8), steps or (20 if gpu else 5)
    table = Table("family", f"a step of {batch} latents of 4 x 32 x 32 with {LATENTS['text_tokens']} words of {LATENTS['text_dim']}, median of "
                  f"{steps}; GB allocated, reserved (CUDA graphs keep theirs there), and by hand (20 bytes a parameter + activations)",
                  {"arch": "<9", "depth": "5d", "width": "5d", "N": "13,d", "precision": "<9", "compile": "<7", "warm-up s": "9.1f", "images/s": "9,.1f",
                   "TFLOP/s": "8.3f", "MFU": "6.1%", "of matrix": "9.1%", "GB alloc": "8.2f", "GB reserved": "11.2f", "GB by hand": "10.2f",
                   **{part: "9.1%" for part in PARTS}}, len(archs) * len(depths))
    for arch in archs:
        for depth in depths:
            model_config = ModelConfig(arch, depth, **FAMILY_CONFIG["paper"])
            config = machine.settled(model_config, compile=compile)
            values = {"arch": arch, "depth": depth, "width": model_config.width, "precision": config.precision, "compile": config.compile, "batch": batch}
            try:
                table.row({**values, **family_row(machine, model_config, config, batch, steps)})
            except RuntimeError as error:   # of one size; the others are still of interest
                table.row(values, remark(error))
            free()
    table.end()


def remark(error):
    return "out of memory" if isinstance(error, torch.OutOfMemoryError) else train.one_line(error)[:200]


def family_row(machine, model_config, config, batch, steps):
    model = DiT(model_config, **LATENTS).to(machine.device)
    step, gpu = Step(model, config, random_batch(LATENTS, batch, machine.device)), machine.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats()   # what the compiler tried out is no part of a step
    spent = step.run(steps)
    parts = [statistics.median(part) for part in zip(*spent)]
    seconds = statistics.median(map(sum, spent))
    rate, peak = batch * model.flops_per_image() / seconds, train.peak_flops(machine.name, config.precision)
    return {"N": model.count_parameters()["total"], "warm-up s": step.warm_up_seconds, "images/s": batch / seconds, "TFLOP/s": rate / 1e12,
            "MFU": peak and rate / peak, "of matrix": rate / machine.rates[config.precision],
            "GB alloc": torch.cuda.max_memory_allocated() / 1e9 if gpu else None, "GB reserved": torch.cuda.max_memory_reserved() / 1e9 if gpu else None,
            "GB by hand": bytes_by_hand(model, config.precision, batch) / 1e9, **{part: spent / sum(parts) for part, spent in zip(PARTS, parts)}}


# ---- peers -------------------------------------------------------------------------------------------------------------

class Peer(nn.Module):
    """The transformer of diffusers that is nearest to an architecture of ours, at the same size, as our v(x_t, t, text, text_mask).

    DiT reads a class and no text, and makes the time anew in each block; PixArt takes the mask; SD3 knows none, and reads pooled text.
    """
    NAMES = {"incontext": "DiT", "cross": "PixArt", "mmdit": "SD3"}

    def __init__(self, config, shape):
        super().__init__()
        import diffusers
        size = dict(num_attention_heads=config.width // config.head_dim, attention_head_dim=config.head_dim, num_layers=config.depth,
                    in_channels=shape["channels"], out_channels=shape["channels"], sample_size=shape["size"], patch_size=config.patch)
        self.config = config   # train.compiled asks for the width
        if config.arch == "incontext":
            self.model = diffusers.DiTTransformer2DModel(**size)
        elif config.arch == "cross":
            self.model = diffusers.PixArtTransformer2DModel(**size, cross_attention_dim=config.width, caption_channels=shape["text_dim"])
        else:
            self.model = diffusers.SD3Transformer2DModel(**size, joint_attention_dim=shape["text_dim"], caption_projection_dim=config.width,
                                                         pooled_projection_dim=shape["text_dim"], pos_embed_max_size=shape["size"] // config.patch)

    def forward(self, x_t, t, text, text_mask):
        settings = dict(timestep=1000 * t, return_dict=False)   # times go from 0 to 1000 there
        if self.config.arch == "incontext":
            settings["class_labels"] = text_mask.sum(1)         # any number below 1000 is a class
        else:
            settings["encoder_hidden_states"] = text
        if self.config.arch == "cross":
            settings["encoder_attention_mask"] = text_mask
        if self.config.arch == "mmdit":
            settings["pooled_projections"] = text.mean(1)
        return self.model(x_t, **settings)[0]

    def flops_per_image(self, batch):
        """3 times those of a forward pass of one image, as torch counts them where attention is two plain products."""
        x, _, t, text, text_mask = (part[:1] for part in batch)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            self(x, t, text, text_mask)
        return 3 * counter.get_total_flops()


def bench_peers(machine, archs=ARCHS, depth=12, width=None, text_tokens=None, batch=None, compile="auto", turns=5, steps=None):
    try:
        import diffusers
    except ImportError as problem:
        tqdm.write(f"\npeers: skipped, diffusers is not installed here ({problem})")
        return
    gpu = machine.device.type == "cuda"
    width, batch, steps = width or (768 if gpu else 384), batch or (128 if gpu else 8), steps or (10 if gpu else 1)
    shape = {**LATENTS, "text_tokens": text_tokens or (LATENTS["text_tokens"] if gpu else 16)}
    table = Table("peers", f"depth {depth}, width {width}, heads of 64, 256 image tokens, {shape['text_tokens']} words (DiT: a class in their place), "
                  f"{batch} images; median of {turns} turns of {steps}, diffusers {diffusers.__version__}; ours/it: images/s of ours over those of "
                  "the row, and the range of that over the turns",
                  {"arch": "<9", "model": "<34", "precision": "<9", "compile": "<7", "N": "12,d", "GFLOP/image": "11.2f", "images/s": "9,.2f",
                   "TFLOP/s": "8.3f", "of matrix": "9.1%", "ours/it": "7.2f", "lowest": "7.2f", "highest": "7.2f"}, 3 * len(archs))
    for arch in archs:
        try:
            with warnings.catch_warnings(action="ignore"):   # what diffusers finds deprecated in itself
                for values in peer_rows(machine, ModelConfig(arch, depth, width, **FAMILY_CONFIG["paper"]), shape, batch, compile, turns, steps, table.bar):
                    table.row(values)
        except RuntimeError as error:
            table.row({"arch": arch}, remark(error))
        free()
    table.end()


def peer_rows(machine, model_config, shape, batch, compile, turns, steps, bar):
    config = machine.settled(model_config, compile=compile)
    as_it_comes = machine.settled(model_config, precision="float32", compile="off")
    data, name = random_batch(shape, batch, machine.device), f"diffusers {Peer.NAMES[model_config.arch]}"
    made = [("ours", DiT(model_config, **shape), config), (f"{name}, as a user gets it", Peer(model_config, shape), as_it_comes),
            (f"{name}, with ours offered", Peer(model_config, shape), config)]
    flops = [made[0][1].flops_per_image(), *(model.to(machine.device).flops_per_image(data) for _, model, _ in made[1:])]
    seconds = in_turns([Step(model.to(machine.device), its_config, data) for _, model, its_config in made], turns, steps, bar)
    for (what, model, its_config), one, its_seconds in zip(made, flops, seconds):
        typical, ratios = statistics.median(its_seconds), [theirs / ours for theirs, ours in zip(its_seconds, seconds[0])]
        rate = batch * one / typical
        yield {"arch": model_config.arch, "model": what, "precision": its_config.precision, "compile": its_config.compile,
               "N": sum(weight.numel() for weight in model.parameters()), "GFLOP/image": one / 1e9, "images/s": batch / typical, "TFLOP/s": rate / 1e12,
               "of matrix": rate / machine.rates[its_config.precision], "ours/it": typical / statistics.median(seconds[0]),
               "lowest": min(ratios), "highest": max(ratios), "batch": batch, "seconds": its_seconds}


# ---- scenes ------------------------------------------------------------------------------------------------------------

def bench_scenes(machine, batches=(16, 256), blocks=2):
    depth, width = family("quick")[0]
    model_config = ModelConfig(depth=depth, width=width)
    table = Table("scenes", f"the smallest quick model (depth {depth}, width {width}) and its data",
                  {"batch": "5d", "threads": "7d", "drawn images/s": "14,.0f", "trained images/s": "16,.0f", "drawn/trained": "13.2f"}, len(batches))
    for batch in batches:
        config = machine.settled(model_config, batch=batch)
        torch.set_num_threads(config.threads)
        data, steps = load_data(DataConfig(), 0, machine.device), max(1, 256 * blocks // batch)   # whole blocks of 256, which are drawn at once
        train.training_batch(data, config, 10 ** 4, 0, 1, machine.device)
        start = mark(machine.device)
        for step in range(1, steps + 1):
            train.training_batch(data, config, step, 0, 1, machine.device)
        drawn = steps * batch / between(start, mark(machine.device))
        model = DiT(model_config, **SCENES).to(machine.device)
        trained = batch / Step(model, config, random_batch(SCENES, batch, machine.device)).seconds(20)
        table.row({"batch": batch, "threads": config.threads, "drawn images/s": drawn, "trained images/s": trained, "drawn/trained": drawn / trained})
        free()
    table.end()


# ---- bare --------------------------------------------------------------------------------------------------------------

def products(model_config, shape, images):
    """The products of a forward pass: linear layers [(rows, in, out, whether the input needs a gradient)], and the shapes that
    `attend` is given [(q, k, mask)]."""
    linears, attentions = [], []

    def note(layer, inputs, _):
        linears.append((inputs[0].numel() // layer.in_features, layer.in_features, layer.out_features, inputs[0].requires_grad))

    def noting(q, k, v, mask=None):
        attentions.append((q.shape, k.shape, None if mask is None else mask.shape))
        return attend(q, k, v, mask)
    x, _, *rest = random_batch(shape, images, torch.device("meta"))   # shapes without memory
    with torch.device("meta"), mock.patch("model.attend", noting):
        model = DiT(model_config, **shape)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(note)
        model(x, *rest)
    return linears, attentions


class Linear:
    """One linear layer, forward and backward, alone."""

    def __init__(self, rows, inputs, outputs, input_gradient, dtype, device):
        make = lambda *shape: torch.randn(shape, device=device).to(dtype)
        self.x, self.weight, self.gradient = make(rows, inputs), make(outputs, inputs).requires_grad_(), make(rows, outputs)
        self.wanted = [self.weight, self.x.requires_grad_()] if input_gradient else [self.weight]
        self.flops = 2 * rows * inputs * outputs * (1 + len(self.wanted))

    def __call__(self):
        torch.autograd.grad(F.linear(self.x, self.weight), self.wanted, self.gradient)


class Attend:
    """model.attend, forward and backward, alone."""

    def __init__(self, q, k, mask, dtype, device):
        self.heads = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in (q, k, k)]
        self.mask = None if mask is None else torch.ones(mask, dtype=torch.bool, device=device)
        self.gradient = torch.randn(q[0], q[2], q[1] * q[3], device=device).to(dtype)

    def __call__(self):
        torch.autograd.grad(attend(*self.heads, self.mask), self.heads, self.gradient)


class Bare:
    """All products of a step one after another: no norms, activations, residuals, biases, casts or optimiser."""

    def __init__(self, model_config, shape, config, images, device):
        linears, attentions = products(model_config, shape, images)
        dtype, self.config, self.device = DTYPES[config.precision], config, device
        self.calls = [Linear(*one, dtype, device) for one in linears] + [Attend(*one, dtype, device) for one in attentions]

    def seconds(self, steps):
        """Of one pass, the median of so many."""
        torch.set_num_threads(self.config.threads)
        found = []
        for _ in range(steps):
            start = mark(self.device)
            for call in self.calls:
                call()
            found.append(between(start, mark(self.device)))
        return statistics.median(found)


def bench_bare(machine, sizes=((128, 8), (128, 32), (256, 8), (256, 32)), depth=3, batch=16, turns=5, steps=5):
    table = Table("bare", f"our whole step against a bare loop over its products; depth {depth}, {batch} scenes of 81 tokens, "
                  f"median of {turns} turns of {steps}",
                  {"width": "5d", "heads of": "8d", "precision": "<9", "threads": "7d", "ours images/s": "13,.1f", "bare images/s": "13,.1f",
                   "ours/bare": "9.1%", "lowest": "7.1%", "highest": "7.1%", "ours TFLOP/s": "12.3f"}, len(sizes))
    for width, head_dim in sizes:
        model_config = ModelConfig(depth=depth, width=width, head_dim=head_dim)
        config, model = machine.settled(model_config), DiT(model_config, **SCENES)
        runners = Step(model, config, random_batch(SCENES, batch, machine.device)), Bare(model_config, SCENES, config, batch, machine.device)
        runners[1].seconds(2)
        ours, bare = in_turns(runners, turns, steps, table.bar)
        ratios, typical = [b / a for a, b in zip(ours, bare)], statistics.median(ours)
        table.row({"width": width, "heads of": head_dim, "precision": config.precision, "threads": config.threads, "ours images/s": batch / typical,
                   "bare images/s": batch / statistics.median(bare), "ours/bare": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
                   "ours TFLOP/s": batch * model.flops_per_image() / typical / 1e12})
    table.end()


# ---- rules -------------------------------------------------------------------------------------------------------------

def bench_rules(machine, widths=(16, 64, 128, 256, 384), compiled=(64, 256), depth=2, batch=16, turns=5, steps=5):
    variants = [(precision, threads) for precision in DTYPES for threads in sorted({1, THREADS})]
    headings = {variant: f"{variant[0]} x {variant[1]}" for variant in variants}
    table = Table("rules", f"ms of a step; depth {depth}, {batch} scenes, heads of 8 below width 128 and 32 from there; precision x threads, median of {turns} "
                  f"turns of {steps}. compiled: as the rule says but with --compile on, and after how many steps that has paid for itself",
                  {"width": "5d", "N": "9,d", **{heading: "13.1f" for heading in headings.values()}, "train.resolve_auto": "<12", "its": "6.1f", "costs": "6.0%",
                   "compiled": "8.1f", "compile s": "9.0f", "pays after": "10,d"}, len(widths))
    for width in widths:
        model_config = ModelConfig(depth=depth, width=width, head_dim=8 if width < 128 else 32)
        rule, data = machine.settled(model_config), random_batch(SCENES, batch, machine.device)
        make = lambda **changes: Step(DiT(model_config, **SCENES), machine.settled(model_config, **changes), data)
        tried = list(dict.fromkeys([*variants, (rule.precision, rule.threads)]))
        runners = [make(precision=precision, threads=threads) for precision, threads in tried]
        if width in compiled:
            # The compiler's own cache on the disk would hide what a first run waits for.
            with torch._inductor.config.patch(force_disable_caches=True):
                runners.append(make(compile="on"))
        found = dict(zip([*tried, "compiled"], map(statistics.median, in_turns(runners, turns, steps, table.bar))))
        chosen, values = found[rule.precision, rule.threads], {}
        if width in compiled:
            values = {"compiled": 1e3 * found["compiled"], "compile s": runners[-1].warm_up_seconds}
            if found["compiled"] < chosen:
                values["pays after"] = round(runners[-1].warm_up_seconds / (chosen - found["compiled"]))
        table.row({"width": width, "N": sum(weight.numel() for weight in runners[0].weights), **{headings[v]: 1e3 * found[v] for v in variants},
                   "train.resolve_auto": f"{rule.precision[:1]}{rule.precision[-2:]} x {rule.threads}",
                   "its": 1e3 * chosen, "costs": chosen / min(found[v] for v in tried) - 1, **values})
        free()
    table.end("its: the step in the precision and threads that train.resolve_auto chooses; costs: how much longer it takes than the fastest of these")


def main():
    tables = {"family": bench_family, "peers": bench_peers, "scenes": bench_scenes, "bare": bench_bare, "rules": bench_rules}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="names", help=f"which tables: {', '.join(tables)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--arch", choices=ARCHS, nargs="+", default=ARCHS, help="of family and peers")
    parser.add_argument("--depth", type=int, nargs="+", help=f"of family (default: {PAPER_DEPTHS} on a GPU, 2 on a CPU)")
    parser.add_argument("--batch", type=positive, help="of family and peers (default: 256 and 128 on a GPU, 8 on a CPU)")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="of family and peers, as in train.py")
    parser.error = refuse
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in tables]:
        parser.error(f"{', '.join(unknown)}: no table of mine, these are: {', '.join(tables)}")
    settings = {"family": dict(archs=args.arch, depths=args.depth, batch=args.batch, compile=args.compile),
                "peers": dict(archs=args.arch, batch=args.batch, compile=args.compile)}
    try:
        device, _ = train.find_device(args.device)
        cpu_only = {"bare", "rules"} if device.type == "cuda" else set()
        if refused := cpu_only & set(args.names):
            refuse(f"{', '.join(sorted(refused))}: for a CPU, give --device cpu")
        machine = Machine(device.type)
        for name in args.names or [name for name in tables if name not in cpu_only]:
            tables[name](machine, **settings.get(name, {}))
    except ValueError as error:
        refuse(train.one_line(error))


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return int(text)


def refuse(message):
    print(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
