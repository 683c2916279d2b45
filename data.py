"""Where do images, captions and their features come from?

Three classes give them, behind one interface (`Source`):

    Scenes          an endless world of captioned shapes, drawn on the device; nothing to download
    StoredImages    rows that `datasets.load_dataset` reads (parquet, a folder, tars, a hub name)
    StoredLatents   the same rows as `prepare` wrote them, after a VAE has looked at them

Images are 8-bit pixels k, turned into x = (k + u) / 128 - 1 with u uniform in [0, 1). Latents are
x = (mean + std noise - shift) / scale with normal noise. u and noise are drawn anew at each use.
Captions become features by the `hash` encoder (each word is a frozen pseudo-random vector), or by
CLIP or T5. Nothing that is downloaded is executed, and no pickle is read.

    python data.py look --data PATH --out look.png       a contact sheet, before a budget is spent
    python data.py prepare --data PATH --resolution 256 --text clip --out prepared
"""
import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import sys
import textwrap
import time
import uuid
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from transformers import HfArgumentParser

# ---- small things that several files share -----------------------------------------------------

def flag(default, help):
    """A field of a configuration: one flag of the command line, with its line of --help."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})

def check_flags(config, names, test, must):
    """Raise a ValueError that names the flag where a value that is given fails the test."""
    for name in names.split():
        value = getattr(config, name)
        if value is not None and not test(value):
            raise ValueError(f"--{name} {value}: must be {must}")

def parse_flags(types, description, presets={}, positional=None, rest=False, argv=None):
    """One instance of each dataclass from the command line. Errors are one line; exit status 2.

    presets: {name: defaults that --preset NAME puts in the place of the fields' own}; the first one
    holds without the flag. A flag that is given wins over both.
    positional: the field that a first word without a flag is for.
    rest: return the words that are not understood as a last list.
    """
    argv = sys.argv[1:] if argv is None else argv
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    parser = HfArgumentParser(types, description=description.splitlines()[0], allow_abbrev=False)

    def error(message):
        print(f"{parser.prog}: {message}", file=sys.stderr)
        sys.exit(2)
    parser.error = error        # argparse's own prints all flags first
    # The preset is looked for first, because its defaults are what the parser fills in.
    preset = next(iter(presets), None)
    for word, following in zip(argv, [*argv[1:], None]):
        name, equals, value = word.partition("=")
        if name == "--preset":
            preset = value if equals else following
    parser.set_defaults(**presets.get(preset, {}))
    try:
        *configs, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    except ValueError as problem:
        error(problem)
    if rest:
        return [*configs, unknown]
    if unknown:
        error(f"unknown flag or value {' '.join(unknown)} (--help lists the flags)")
    return configs

def ranks():
    """This process among those of torchrun: (rank, world size)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

@contextlib.contextmanager
def errors_in_one_line(script):
    """Errors are one line on stderr. Exit status 2 for bad input (ValueError), else 1."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        bad_input = isinstance(error, ValueError)
        if ranks()[0] == 0 or not bad_input:    # bad input is the same for all ranks
            print(f"{script}: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if bad_input else 1)

def one_line(error):
    """The first line of an error's message, or its class's name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]

def write_whole(path, write):
    """write(temporary path), then rename: the file appears whole or not at all, kill -9 or not."""
    # A process number would not do in the name: several machines may share the disk.
    temporary = f"{path}.tmp{uuid.uuid4().hex[:12]}"
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())     # or a power cut leaves an empty file of the new name
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:    # torch.save reports a full disk as RuntimeError
        problem = one_line(error)
        raise OSError(f"{path} could not be written, is the disk full? ({problem})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)

def write_json(path, content):
    """Write JSON. A number that is not finite is an error, so that no reader meets a NaN."""
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda temporary: Path(temporary).write_text(text))

def write_array(path, array):
    """Write a NumPy array as .npy."""
    def write(temporary):
        with open(temporary, "wb") as file:     # np.save would add .npy to a temporary name
            np.save(file, array)
    write_whole(path, write)

def read_json(path, keys, remedy):
    """The dictionary in a file, None where there is no such file.

    keys: what it must hold. remedy: what to do with a torn or foreign file, for the ValueError.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path) as file:
            content = json.load(file)
        if isinstance(content, dict) and all(key in content for key in keys):
            return content
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        pass
    raise ValueError(f"{path}: torn, or not of isoflow: {remedy}")

def differences(saved, current, prefix=""):
    """The leaves in which two configurations differ, as lines "name: saved -> current"."""
    found = []
    for key in sorted(saved.keys() | current.keys()):
        old, new = saved.get(key), current.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {old} -> {new}")
    return found

# ---- the configuration --------------------------------------------------------------------------

TEXT_ENCODERS = {                       # kind: its default, its class in transformers
    "clip": ("openai/clip-vit-large-patch14", "CLIPTextModel"),
    "t5": ("google-t5/t5-base", "T5EncoderModel"),
}

@dataclass(frozen=True)
class DataConfig:
    """Which images and captions: the flags that data.py, train.py and sweep.py share."""

    data: str = flag("scenes", "scenes, scenes-ood, a folder of data.py prepare, or what datasets "
                     "reads: a file, a folder, a hub name")
    resolution: int = flag(16, "side of the square images, in pixels")
    captions: Literal["dense", "sparse"] = flag(
        "dense", "of scenes: dense names every shape, sparse only the largest")
    images: Optional[int] = flag(
        None, "train on only so many images, again and again (default: all; scenes are endless)")
    text: str = flag("hash", "hash (nothing to download), clip, t5, clip:NAME_OR_FOLDER or "
                     "t5:NAME_OR_FOLDER")
    text_tokens: Optional[int] = flag(
        None, "caption slots S; what is longer is cut (default: 16 with hash, 77 with clip, t5)")
    text_dim: Optional[int] = flag(None, "features F of a word in the hash encoder (default: 64)")
    image_column: str = flag("image", "column of the images (of webdataset tars: jpg, png)")
    text_column: str = flag("text", "column of the captions, one or a list of them (then one is "
                            "drawn each time); json.caption: a field of a column")
    split: str = flag("train", "split of the data set to train on")
    validation_split: Optional[str] = flag(
        None, "split to validate on (default: validation, val or test if there, else a tenth of "
        "--split held out by a hash); the same as --split: all of it, to evaluate on")
    flip: bool = flag(False, "mirror half of the training images; not for captions that say left "
                      "or right")
    stream: bool = flag(False, "read a remote data set as it comes, without storing its images")
    take: Optional[int] = flag(None, "only the first so many rows of each split")

    def __post_init__(self):
        # A prepared folder says itself what is in it. It says so here and not at the command line,
        # because these values are a part of a run's identity, whoever makes the configuration.
        for name, value in prepared_input(self).items():
            object.__setattr__(self, name, value)       # the class is frozen
        kind, _, source = self.text.partition(":")
        if kind not in ("hash", *TEXT_ENCODERS) or (kind == "hash" and source):
            raise ValueError(f"--text {self.text}: take hash, clip, t5, clip:NAME_OR_FOLDER or "
                             "t5:NAME_OR_FOLDER")
        if self.text_tokens is None:
            object.__setattr__(self, "text_tokens", 16 if kind == "hash" else 77)
        if self.text_dim is None and kind == "hash":
            object.__setattr__(self, "text_dim", 64)
        check_flags(self, "resolution images text_tokens text_dim take", lambda n: n >= 1,
                    "at least 1")
        for name in ("text", "flip", "stream", "take"):
            if self.data in SOURCES and getattr(self, name) != getattr(DataConfig, name):
                raise ValueError(f"--{name} is for real images, not for --data {self.data}")

def data_config_of(saved, data):
    """The configuration for `data` of a model that was trained with the saved one (a dictionary).

    For another data set than the training's, only what makes the model's input is kept: columns
    and splits are the data set's own.
    """
    same = os.path.realpath(data) == os.path.realpath(saved["data"])    # names stay different
    makes_input = ("resolution", "captions", "text", "text_tokens", "text_dim")
    kept = {name: value for name, value in saved.items() if same or name in makes_input}
    return DataConfig(**{**kept, "data": data})

# ---- random numbers that are a function of their counter ---------------------------------------
# A run that resumes, or has other ranks, must draw the same. So no state is kept between draws:
# - `seeded` starts one of torch's generators from any numbers. It serves draws on the CPU, such as
#   the noise of a micro-batch.
# - `mix` hashes integers with tensor operations. It serves what is drawn on any device (torch's
#   generators of one seed differ between CPU and CUDA), or for one sample alone (a generator would
#   have to be started for each).
# Permutations of images (`epoch_order`, --images) are `torch.randperm`, started from an integer.
# Every constant here and there stays: published numbers and runs that resume depend on it.

def seeded(*numbers, device="cpu"):
    """A torch generator of the numbers alone: (seed, step, micro-batch), never the rank."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))

def mix(h):
    """A bijection of 32-bit integers that scatters them well: int64 in, int64 out.

    The finaliser of MurmurHash3 (A. Appleby, public domain).
    """
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)

def random_bits(seed, index, draws):
    """(B,) int64 -> (B, draws) int64 of 24 random bits: a pure function of (seed, index)."""
    both_halves = mix(seed & 0xFFFFFFFF) ^ mix((seed >> 32) & 0xFFFFFFFF)
    h = mix(torch.full_like(index, both_halves ^ 0x9E3779B9))
    h = mix(mix(h ^ (index & 0xFFFFFFFF)) ^ (index >> 32))                            # (B,)
    counter = torch.arange(draws, device=index.device)
    h = mix(h[:, None] ^ ((counter * 0x9E3779B9) & 0xFFFFFFFF))                       # (B, draws)
    return mix((h + counter) & 0xFFFFFFFF) >> 8

# ---- what every data set offers ----------------------------------------------------------------

class Source:
    """What the other files know of a data set. A new one is a subclass and a line in SOURCES.

    split is "train" or "validation", index is (B,) int64 on the CPU. All that a source returns is a
    pure function of (config, seed, split, index); of the validation set not even of the seed, and
    its images never come in training. A source itself heeds --images (so many different ones in
    training) and --captions. The methods here are those of 8-bit pixels.

    config, seed, device   as given; `seed` is that of the training order
    shape                  {"channels", "size", "text_tokens", "text_dim"}: the model's input
    train_images           how many different ones there are; None: endless
    validation_images      the same
    encoders               what made this set; config.json keeps it as a part of a run's identity,
                           so it never changes: {"text" and "vae": {"name", "sha256", ...},
                           "images": {"sha256"}}, {} where nothing but the configuration made it
    remarks                which rows were skipped and why, see `collect_remarks`
    originals              sides of the images before they were resized, (n, 2), or None
    prefetch               is the next batch worth a thread of its own?
    latents                is x a latent rather than pixels? (for units and protocols)
    describes              is it a world of Scenes, whose `describe(split, index)` tells what is in
                           an image? Then evaluate.py scores captions by it.
    """

    prefetch = latents = describes = False
    train_images = validation_images = originals = None

    def __init__(self, config, seed=0, device="cpu"):
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.shape = input_shape(config)
        self.encoders, self.remarks = {}, {}

    def batch(self, split, index):
        """-> raw images (what to_x takes), text (B, S, F), text_mask (B, S), all on the device."""
        raise NotImplementedError

    def captions(self, split, index):
        """-> the captions as a list of strings."""
        raise NotImplementedError

    def images(self, split, index):
        """-> the samples as pictures, (B, 3, R, R) uint8."""
        return self.batch(split, index)[0]

    def to_x(self, raw, generator):
        """8-bit levels k -> x = (k + u) / 128 - 1, continuous in [-1, 1), as the model takes it.

        u is uniform in [0, 1), from the generator: likelihoods of levels alone are not finite.
        """
        u = torch.rand(raw.shape, generator=generator, device=generator.device)
        return (raw + u.to(raw.device)) / 128 - 1

    def to_levels(self, x):
        """x -> (B, 3, R, R) uint8, to look at and to compare with images(): to_x turned back."""
        return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)

    def use_training_encoders(self, encoders):
        """See the set as a model does whose training had data of these `encoders`.

        Raises ValueError where other networks made this set: its features mean something else then.
        """
        none = {"name": "none", "sha256": None}
        for what in ("text", "vae"):    # other images, under "images", are what evaluation is for
            ours, theirs = self.encoders.get(what, none), encoders.get(what, none)
            if ours["sha256"] != theirs["sha256"]:
                raise ValueError(f"--data {self.config.data}: its {what} encoder is {ours['name']} "
                                 f"(SHA-256 {ours['sha256']}), the model was trained with "
                                 f"{theirs['name']} (SHA-256 {theirs['sha256']})")

def input_shape(config):
    """The shape of what the model takes in (see Source), without reading any data."""
    stats = read_stats(config.data) or {"channels": 3, "size": config.resolution}
    return {"channels": stats["channels"], "size": stats["size"],
            "text_tokens": config.text_tokens, "text_dim": config.text_dim or text_dim(config)}

# ---- the embedded world ------------------------------------------------------------------------

GROUNDS = {"black": (0.05, 0.05, 0.08), "navy": (0.08, 0.12, 0.35), "grey": (0.5, 0.5, 0.5),
           "beige": (0.88, 0.84, 0.72)}
COLOURS = {"red": (0.85, 0.12, 0.12), "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2),
           "green": (0.15, 0.65, 0.2), "cyan": (0.2, 0.8, 0.85), "blue": (0.2, 0.35, 0.9),
           "purple": (0.55, 0.2, 0.7), "white": (0.97, 0.97, 0.97)}
KINDS = ("disc", "square", "triangle", "ring", "bar", "cross")
TEXTURES = ("plain", "striped", "checked")
SIZES = ("small", "medium", "large")    # captions leave the words "plain" and "medium" out
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south",
          "southeast")
# Words of a kind are neighbours, in the order of their table: `caption_words` counts on that.
VOCABULARY = ["", *GROUNDS, *SIZES, *TEXTURES, *COLOURS, *KINDS, *PLACES]
MAX_SHAPES = 3
BLOCK = 256                             # scenes drawn at once
VALIDATION_START = 1 << 40              # of seed 0, the validation set; no training gets there

def lookup_table(weights, entries=256):
    """Class indices, each as often as its weight says: a class is drawn by a look-up."""
    edges = np.round(np.cumsum(weights) / np.sum(weights) * entries).astype(int)
    return torch.tensor(np.searchsorted(edges, np.arange(entries), side="right"))

def power_law_radii(exponent, smallest, largest, entries=256):
    """A lookup table of radii (in image sides) with density r^-exponent between two of them.

    Its entries are quantiles: the inverse of the distribution function, so that u may be uniform.
    """
    u, power = (np.arange(entries) + 0.5) / entries, 1 - exponent
    low, high = smallest ** power, largest ** power
    return torch.tensor((low + u * (high - low)) ** (1 / power)).float()

def wide(value):
    """(...) -> (..., 1, 1): a number for a whole picture."""
    return value[..., None, None]

def distance_to_edge(kind, u, v):
    """How far points lie outside a shape of radius 1, negative inside: u, v (B, shapes, R, R)."""
    a, b, rho = u.abs(), v.abs(), (u * u + v * v).sqrt()
    each = torch.stack([                                            # in the order of KINDS
        rho - 1,
        torch.maximum(a, b) - 0.85,
        torch.maximum(v, 0.8660254 * a - 0.5 * v) - 0.6,
        (rho - 0.75).abs() - 0.25,
        torch.maximum(a - 1, b - 0.35),
        torch.minimum(torch.maximum(a - 1, b - 0.3), torch.maximum(b - 1, a - 0.3)),
    ])                                                              # (kinds, B, shapes, R, R)
    return each.gather(0, wide(kind).expand_as(u)[None])[0]

class Scenes(Source):
    """Captioned shapes on a ground: image and caption are a pure function of (seed, index).

    Sizes follow a power law and shapes occlude each other like fallen leaves, which is what gives
    natural images their statistics (Ruderman 1997; Lee, Mumford, Huang 2001). Larger shapes lie
    below, so that what a caption names can be seen. Only operations with one correct answer are
    used (integers, + - * /, square roots, comparisons, look-ups): CPU and GPU draw the same bits.
    `scenes-ood` is the same world with more and larger shapes and other colours.
    """

    describes = True

    def __init__(self, config, seed=0, device="cpu"):
        super().__init__(config, seed, device)
        self.train_images = config.images       # None: endless
        self.block, self.drawn = None, None     # see batch
        ood = config.data == "scenes-ood"
        radii = power_law_radii(1.5, 0.15, 0.6) if ood else power_law_radii(2, 0.12, 0.5)
        colours = [1, 2, 4, 1, 4, 1, 4, 2] if ood else [1] * len(COLOURS)
        self.counts = lookup_table([1, 2, 5] if ood else [1, 1, 1]).to(device) + 1
        self.radii, self.colours = radii.to(device), lookup_table(colours).to(device)
        turn = 2 * np.pi * np.arange(256) / 256
        self.turns = torch.tensor(np.stack([np.cos(turn), np.sin(turn)], -1)).float().to(device)
        self.ground_rgb = torch.tensor(list(GROUNDS.values()), device=device)
        self.colour_rgb = torch.tensor(list(COLOURS.values()), device=device)
        vectors = [word_vector(word, config.text_dim) for word in VOCABULARY[1:]]
        self.vectors = torch.tensor(np.stack([np.zeros_like(vectors[0]), *vectors]), device=device)

    def describe(self, split, index):
        """All attributes of the scenes: each (B,) or (B, shapes), shapes from large to small.

        Where --images limits them, every epoch has the same order, as random as the scenes are.
        """
        if self.train_images and split == "train":
            index = index % self.train_images
        seed = self.seed
        if split == "validation":
            seed, index = 0, index + VALIDATION_START
        # A draw has 24 bits. One of n equal classes is `bits * n >> 24`, which is exact in integers
        # on every device; an entry of a table of 256 is `bits >> 16`.
        of_scene, per_shape = 3, 10             # draws; their order is a part of the world
        bits = random_bits(seed, index.to(self.device), of_scene + MAX_SHAPES * per_shape)
        count, ground, light = bits[:, :of_scene].unbind(1)                        # (B,)
        shapes = bits[:, of_scene:].view(-1, MAX_SHAPES, per_shape)                # (B, shapes, 10)
        there = torch.arange(MAX_SHAPES, device=self.device) < self.counts[count >> 16][:, None]
        radius = torch.where(there, self.radii[shapes[..., 0] >> 16], 0.0)         # (B, shapes)
        order = radius.argsort(dim=1, descending=True, stable=True)
        radius = radius.gather(1, order)
        shapes = shapes.gather(1, order[..., None].expand(-1, -1, per_shape))
        _, x, y, kind, colour, texture, turn, *tint = shapes.unbind(-1)            # (B, shapes)
        centre = 0.1 + torch.stack([x, y], -1).float() * (0.8 / 2 ** 24)
        cell = (centre * 3).long().clamp(max=2)
        return {
            "there": there,     # absent shapes come last: their radius is 0
            "radius": radius,
            "centre": centre,                                                      # (B, shapes, 2)
            "ground": ground * len(GROUNDS) >> 24,
            "light": self.turns[light >> 16],                                      # (B, 2)
            "kind": kind * len(KINDS) >> 24,
            "colour": self.colours[colour >> 16],
            "texture": texture * len(TEXTURES) >> 24,
            "turn": self.turns[turn >> 16],                                        # (B, shapes, 2)
            "tint": torch.stack(tint, -1).float() * (0.16 / 2 ** 24) - 0.08,       # (B, shapes, 3)
            # Of the radii of `scenes` about a third is small, a third medium, a third large.
            "size": (radius > 0.16).long() + (radius > 0.26).long(),
            "place": 3 * cell[..., 1] + cell[..., 0],
        }

    def draw(self, scene):
        """The picture of described scenes, (B, 3, R, R) uint8, edges smoothed over one pixel."""
        R = self.config.resolution
        pixel = (torch.arange(R, device=self.device).float() + 0.5) / R
        x, y = pixel[None, None, None, :], pixel[None, None, :, None]  # columns, rows
        # u, v: each point in the frame of the shape, which has radius 1 there.
        dx, dy = x - wide(scene["centre"][..., 0]), y - wide(scene["centre"][..., 1])
        scale = 1 / scene["radius"].clamp(min=1e-3)
        cos, sin = wide(scene["turn"][..., 0] * scale), wide(scene["turn"][..., 1] * scale)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx                # (B, shapes, R, R)
        outside = distance_to_edge(scene["kind"], u, v) * wide(scene["radius"] * R)  # in pixels
        cover = (0.5 - outside).clamp(0, 1) * wide(scene["there"])
        stripe = (2 * v).floor().long() & 1
        check = ((2 * u).floor() + (2 * v).floor()).long() & 1
        texture = wide(scene["texture"])
        shade = 1 - 0.45 * (torch.where(texture == 1, stripe, check) * (texture > 0))
        # The ground is lit from one side; then the shapes, the largest first.
        light_x, light_y = scene["light"][:, 0, None, None], scene["light"][:, 1, None, None]
        light = light_x * (x[:, 0] - 0.5) + light_y * (y[:, 0] - 0.5)
        image = wide(self.ground_rgb[scene["ground"]]) + 0.15 * light[:, None]     # (B, 3, R, R)
        rgb = self.colour_rgb[scene["colour"]] + scene["tint"]                     # (B, shapes, 3)
        for k in range(MAX_SHAPES):
            image = image + cover[:, k, None] * (wide(rgb[:, k]) * shade[:, k, None] - image)
        return (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)

    def caption_words(self, scene):
        """The captions as places in VOCABULARY, (B, 1 + 5 * shapes), 0 where a word is left out."""
        first = VOCABULARY.index
        words = torch.stack([
            torch.where(scene["size"] != 1, first("small") + scene["size"], 0),
            torch.where(scene["texture"] != 0, first("plain") + scene["texture"], 0),
            first("red") + scene["colour"],
            first("disc") + scene["kind"],
            first("northwest") + scene["place"],
        ], dim=-1) * scene["there"][..., None]                                     # (B, shapes, 5)
        ground = first("black") + scene["ground"][:, None]
        if self.config.captions == "sparse":
            words, ground = words[:, :1], torch.zeros_like(ground)
        return torch.cat([ground, words.flatten(1)], dim=1)

    def batch(self, split, index):
        """-> images (B, 3, R, R) uint8, text (B, S, F), text_mask (B, S), all on the device.

        A batch takes 150 small operations, and their overhead costs more than what they compute.
        So BLOCK neighbours are drawn at once and kept for the next micro-batches.
        """
        block = int(index[0]) // BLOCK
        if (index // BLOCK != block).any():
            images, words = self.make(split, index)
        else:
            if self.block != (split, block):
                neighbours = torch.arange(block * BLOCK, (block + 1) * BLOCK)
                self.block, self.drawn = (split, block), self.make(split, neighbours)
            images, words = (drawn[(index % BLOCK).to(self.device)] for drawn in self.drawn)
        return images, self.vectors[words], words > 0

    def make(self, split, index):
        """-> images (B, 3, R, R) uint8 and their captions as places in VOCABULARY, (B, S)."""
        scene = self.describe(split, index)
        words = self.caption_words(scene)
        left_out_last = (words == 0).to(torch.uint8).argsort(dim=1, stable=True)
        words = words.gather(1, left_out_last)[:, :self.config.text_tokens]
        missing = self.config.text_tokens - words.shape[1]
        return self.draw(scene), torch.nn.functional.pad(words, (0, missing))

    def captions(self, split, index):
        """Captions as strings: "navy: large striped red disc north, small blue ring east"."""
        captions = []
        for ground, *words in self.caption_words(self.describe(split, index)).tolist():
            shapes = [" ".join(VOCABULARY[word] for word in words[start:start + 5] if word)
                      for start in range(0, len(words), 5)]
            heading = f"{VOCABULARY[ground]}: " if ground else ""
            captions.append(heading + ", ".join(filter(None, shapes)))
        return captions

# ---- stored images: which rows there are -------------------------------------------------------
# A data set of captioned images goes through four steps, whether `prepare` or a run asks for it:
#
#   open_splits    which rows there are: a Dataset of `datasets` for each split, nothing decoded
#   RowEncoder     a row of that -> a row to train on: small pixels, captions, a digest; and with
#                  encoders the features of its captions and the latent of its image
#   choose_rows    which rows are for training and which for validation
#   StoredImages   which row is sample i of the training
#
# `datasets` runs the second step and writes down what comes out: in its cache for a run, which then
# has a table of pixels; in the folder of `prepare`, which then has a table of latents. Both tables
# are memory-mapped Arrow files: only what a batch asks for is read from the disk.

READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json",
           ".arrow": "arrow", ".tar": "webdataset"}
VALIDATION_NAMES = ("validation", "val", "test")
SHARD_ROWS = 2048       # rows of a file of `prepare`; as many are done again after a kill

def locate(path):
    """What load_dataset is to open, as (name, files), and which folders paths in it may lead to."""
    import datasets         # here, since it takes a second that scenes need not spend
    import huggingface_hub
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        return os.path.abspath(path), None, [path]      # a folder "csv" is no reader of that name
    if os.path.isfile(path) or "://" in path or "*" in path:
        if suffix not in READERS:
            raise ValueError(f"--data {path}: a file of images ends in {', '.join(READERS)}")
        return READERS[suffix], path, [os.path.dirname(os.path.abspath(path))]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        caches = [huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
        return path, None, caches
    raise ValueError(f"--data {path}: no such file or folder, no hub name OWNER/NAME, and none of "
                     f"{', '.join(SOURCES)}")

def open_splits(config):
    """The rows that the flags ask for, undecoded.

    -> {"train": Dataset, "validation": Dataset}, and the folders that paths in their rows may lead
    to. An evaluation set has no "train"; without a split for it there is no "validation". Raises
    ValueError for what can't be read.
    """
    import datasets
    import huggingface_hub
    for library in (datasets, huggingface_hub):
        library.logging.set_verbosity(50)   # they log what is raised here, in many lines
    if ranks()[0]:
        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)   # see MAX_PIXELS
    name, files, roots = locate(config.data)
    files = files and {config.split: files}
    try:
        splits = datasets.load_dataset(name, data_files=files, streaming=config.stream)
    except Exception as error:      # each reader raises its own kinds; the cause often says more
        fetch = "" if files or os.path.isdir(name) else (
            "; there is no such folder here either. Without network: hf download "
            f"{name} --repo-type dataset --local-dir DIR elsewhere, then --data DIR")
        reason = one_line(error.__cause__ or error)
        raise ValueError(f"--data {config.data}: datasets can't read it, or it is empty "
                         f"({reason}){fetch}") from None
    own = [name for name in VALIDATION_NAMES if name in splits and name != config.split]
    if config.validation_split == config.split:         # an evaluation set
        wanted = {"validation": config.split}
    elif config.validation_split or own:
        wanted = {"train": config.split, "validation": config.validation_split or own[0]}
    else:                                               # encode_batch holds a tenth out
        wanted = {"train": config.split}
    for name in wanted.values():
        if name not in splits:
            raise ValueError(f"--data {config.data}: no split {name} (there is {', '.join(splits)})"
                             ": see --split and --validation_split")
    roots = [os.path.realpath(root) for root in roots]
    return {split: select_rows(splits[name], config) for split, name in wanted.items()}, roots

def select_rows(rows, config):
    """Only the columns and rows that are asked for, as Arrow tables, so that nothing is decoded."""
    first = next(iter(rows.with_format("arrow").iter(1)), None)
    if first is None:
        raise ValueError(f"--data {config.data}: split {rows.split} is empty")
    used = set()
    for name in ("image_column", "text_column"):
        wanted = getattr(config, name)
        column = wanted if wanted in first.column_names else wanted.partition(".")[0]
        if column not in first.column_names:
            raise ValueError(f"--data {config.data}: no column {wanted} (there are "
                             f"{', '.join(first.column_names)}): see --{name}")
        used.add(column)
    rows = rows.select_columns(sorted(used)).with_format("arrow")
    if config.take:
        rows = rows.take(config.take if config.stream else min(config.take, len(rows)))
    return rows

def in_parts(rows):
    """The rows of a table or of a stream, SHARD_ROWS of them at a time, as Datasets."""
    import datasets
    for number, table in enumerate(rows.iter(SHARD_ROWS)):
        memory = datasets.table.InMemoryTable(table)    # copies nothing: mapped files stay mapped
        yield datasets.Dataset(memory, fingerprint=f"part{number}").with_format("arrow")

# ---- stored images: what becomes of a row ------------------------------------------------------

# Images come from anywhere and may be torn, hostile or of any format. What is done to them stands
# here in one place, and `read_row` alone decides whether a row can be used.
#
# Pillow would hand PostScript to Ghostscript, which runs it as a program: so only these.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
MIN_SIDE, MAX_PIXELS = 8, 100_000_000   # smaller shows nothing, larger is a bomb (or a map)
MAX_CAPTION = 10_000                    # characters; no encoder has slots for more
NAMED = 10                              # rows named for each remark; all are counted
READ_BATCH, ENCODE_BATCH = 128, 16      # rows decoded at once; images or captions encoded at once
# Raise it with any change of what follows: datasets' cache then makes its tables anew.
ROW_VERSION = 2

def row_types():
    """The columns of a table to train on, whether or not a VAE has looked. null: not there."""
    from datasets import Features, List, Value
    return Features({
        # Why the row can't be used, or what was done to it: "kind (details of this row)".
        "remark": Value("string"),
        "digest": Value("uint64"),              # of the pixels; null: the row can't be used
        "validation": Value("bool"),            # is it for validation?
        "width": Value("int32"),                # of the original
        "height": Value("int32"),
        "captions": List(Value("string")),
        "text": List(Value("large_binary")),    # of each caption: (length, F) float16
        "pixels": Value("binary"),              # (R, R, 3) uint8; of latents for validation only
        "moments": Value("binary"),             # (2 mirrors, 2, C, R/f, R/f) float16
        "mean": List(Value("float64")),         # of each channel of the latent: E[x]
        "square": List(Value("float64")),       # E[x^2]
    })

def to_pixels(image, resolution):
    """Any PIL image -> (R, R, 3) uint8: its middle square, upright (EXIF), on white where it is
    transparent, in RGB, averaged over the area."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):       # 16 bits, which Pillow would cut off at 255
        levels = np.asarray(image)
        if image.mode == "F" or levels.min() < 0 or levels.max() > 65535:
            raise ValueError(f"levels of mode {image.mode} that are not 16-bit")
        # Wide files often hold the levels of 8- or 12-bit cameras, which would come out black.
        white = min(full for full in (255, 4095, 65535) if levels.max() <= full)
        is_clear = levels == image.info.get("transparency")
        levels = np.where(is_clear, 255, levels.astype(np.int64) * 255 // white)
        image = Image.fromarray(levels.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, upper, left + side, upper + side))
    # When it shrinks, Pillow widens the kernel: nothing aliases.
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.BICUBIC))

def image_file(cell, roots):
    """The bytes of a row's image: those in the cell, or those of a file inside `roots`."""
    if isinstance(cell, str):
        cell = {"path": cell}
    elif not isinstance(cell, dict):
        cell = {"bytes": cell}
    if cell.get("bytes") is not None:
        return cell["bytes"]
    path = cell.get("path")
    if not path:
        raise ValueError("no image")
    # Neither ".." nor a link may lead out: a data set from the hub must not read other files.
    real = os.path.realpath(os.path.join(roots[0], path))
    if not any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
        raise ValueError(f"its path leads out of the data ({path[:200]})")
    if not os.path.isfile(real):
        raise ValueError(f"its path leads nowhere ({path[:200]})")
    with open(real, "rb") as file:
        return file.read()

def caption_list(cell):
    """The captions of a row, one or a list of them, text or bytes -> a list of strings."""
    captions = [one for one in (cell if isinstance(cell, list) else [cell]) if one is not None]
    if not captions:
        raise ValueError("no caption")
    for one in captions:
        if not isinstance(one, (str, bytes)):
            raise ValueError(f"its caption is no text ({str(one)[:50]})")
    return [one.decode() if isinstance(one, bytes) else one for one in captions]

def read_row(image, caption, resolution, roots):
    """A row of a data set, as Arrow cells -> a row to train on, without what encoders add.

    A row that can't be used becomes a remark that says why, never an error or a black picture.
    Raised are only errors of this machine (memory, disk): rows skipped now would stay skipped.
    """
    try:
        captions = caption_list(caption.as_py())
        with Image.open(io.BytesIO(image_file(image.as_py(), roots)), formats=FORMATS) as picture:
            width, height = picture.size
            if min(width, height) < MIN_SIDE or width * height > MAX_PIXELS:
                size = "small" if min(width, height) < MIN_SIDE else "large"
                raise ValueError(f"too {size} ({width} x {height} pixels)")
            remarks = []
            if getattr(picture, "is_animated", False):
                remarks.append("the first frame of an animation")
            pixels = to_pixels(picture, resolution).tobytes()
    except Exception as error:      # Pillow and its many formats raise all kinds
        of_the_row = (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
        disk_fails = isinstance(error, OSError) and error.errno not in of_the_row
        if disk_fails or isinstance(error, MemoryError):
            raise
        known = {UnidentifiedImageError: "no image that pillow can read",
                 UnicodeDecodeError: "its caption is not UTF-8"}
        return {"remark": known.get(type(error), re.sub(" at 0x.*", "", one_line(error))[:300])}
    longest = max(map(len, captions))
    if longest > MAX_CAPTION:
        remarks.append(f"a caption cut to {MAX_CAPTION:,} characters (of {longest:,})")
    if not any(one.strip() for one in captions):
        remarks.append("an empty caption")
    digest = int.from_bytes(hashlib.blake2b(pixels, digest_size=8).digest(), "big")
    return {"remark": "; ".join(remarks), "digest": digest, "width": width, "height": height,
            "captions": [one[:MAX_CAPTION] for one in captions], "pixels": pixels}

class RowEncoder:
    """Turns rows of a data set into rows to train on, for a run and for `prepare` alike.

    vae: hub name or folder of the VAE that looks at the images. None: they stay pixels.
    splits: the rows, undecoded. encoders: which networks look at them, as in Source.
    """

    def __init__(self, config, device, vae=None):
        self.config = config
        self.splits, self.roots = open_splits(config)   # first: a wrong --data costs no download
        self.vae = VAE(vae, device) if vae else None
        self.text = None if config.text == "hash" else PretrainedText(config, device)
        networks = {"vae": self.vae, "text": self.text}
        self.encoders = {name: network.about for name, network in networks.items() if network}

    def encode(self, rows, split, **where):
        """Rows of a split, a Dataset -> rows of `row_types`. where: options of Dataset.map."""
        for_validation = split == "validation" if "validation" in self.splits else None
        # datasets names the result by a hash of all arguments, which would be of whole networks.
        made_by = [about["sha256"] for about in self.encoders.values()]
        recipe = [ROW_VERSION, rows._fingerprint, self.config.image_column, self.config.text_column,
                  self.config.resolution, self.config.text_tokens, self.roots, made_by,
                  for_validation]
        return rows.map(
            self.encode_batch, batched=True, batch_size=READ_BATCH, features=row_types(),
            remove_columns=rows.column_names, fn_kwargs={"for_validation": for_validation},
            desc=f"{split} images at {self.config.resolution} pixels",
            new_fingerprint=hashlib.sha256(repr(recipe).encode()).hexdigest()[:32], **where)

    def encode_batch(self, table, for_validation):
        """A batch of rows -> rows of `row_types`: Arrow tables.

        for_validation: whether these rows are, None where a tenth of them is.
        """
        import pyarrow.compute
        Image.init()        # or it knows no format
        cells = []
        for name in (self.config.image_column, self.config.text_column):
            # json.caption is the field caption of the column json.
            first, *fields = [name] if name in table.column_names else name.split(".")
            column = table[first]
            cells.append(pyarrow.compute.struct_field(column, fields) if fields else column)
        read = functools.partial(read_row, resolution=self.config.resolution, roots=self.roots)
        with ThreadPoolExecutor() as threads:       # Pillow decodes outside Python's lock
            rows = list(threads.map(read, *cells))
        good = [row for row in rows if "pixels" in row]
        for row in good:
            # Copies are on one side, and no seed moves an image from one to the other.
            held_out = row["digest"] % 10 == 0
            row["validation"] = held_out if for_validation is None else for_validation
        if self.text:
            features = iter(self.text.features([one for row in good for one in row["captions"]]))
            for row in good:
                row["text"] = [next(features).tobytes() for _ in row["captions"]]
        if self.vae:
            for start in range(0, len(good), ENCODE_BATCH):
                self.add_latents(good[start:start + ENCODE_BATCH])
        return pyarrow.Table.from_pylist(rows, row_types().arrow_schema)

    def add_latents(self, rows):
        """Add what the VAE makes of the pixels, which only validation keeps: see `images`."""
        R = self.config.resolution
        pixels = np.frombuffer(bytearray().join(row["pixels"] for row in rows), np.uint8)
        moments = self.vae.moments(torch.from_numpy(pixels.reshape(-1, R, R, 3)))
        for row, both in zip(rows, moments.half().cpu().numpy()):     # (2 mirrors, 2, C, R/f, R/f)
            mean, logvar = both[0].astype(np.float64)       # of the image, not of its mirror image
            row["moments"] = both.tobytes()
            row["mean"] = mean.mean((1, 2)).tolist()
            row["square"] = (mean ** 2 + np.exp(logvar)).mean((1, 2)).tolist()
            if not row["validation"]:
                del row["pixels"]

def one_table(tables):
    """{split: Dataset} -> an Arrow table of all their rows, memory-mapped as they are."""
    import datasets
    return datasets.concatenate_datasets(list(tables.values())).data.table

def choose_rows(table):
    """Which rows of a table are for what -> {"train": row numbers, "validation": row numbers}.

    An image of the validation set is never trained on, copies of it included.
    """
    usable = table["digest"].is_valid().to_numpy()
    digest = table["digest"].fill_null(0).to_numpy()
    validation = table["validation"].fill_null(False).to_numpy()
    unseen = np.isin(digest, digest[validation])
    return {"train": np.flatnonzero(usable & ~unseen), "validation": np.flatnonzero(validation)}

def identity(table):
    """Which images and captions these are: {"sha256": ...}, the same whatever they came in.

    It is of the digests of small pixels, so it knows the resolution but no container, no VAE.
    """
    content = []
    for numbers in choose_rows(table).values():
        chosen = table.select(["digest", "captions"]).take(numbers)
        digests, captions = (column.to_pylist() for column in chosen.itercolumns())
        content.append([(digest.to_bytes(8, "big"), row) for digest, row in zip(digests, captions)])
    return {"sha256": hashlib.sha256(repr(content).encode()).hexdigest()[:16]}

def collect_remarks(tables):
    """What is remarked on the rows of {split: Dataset}.

    -> {"skipped" and "used": {kind: {"rows": how many, "first": the first ten of them by name}}}
    """
    remarks = {"skipped": {}, "used": {}}
    for split, table in tables.items():
        usable = table.data["digest"].is_valid().to_pylist()
        for row, remark in enumerate(table.data["remark"].to_pylist()):
            if remark:
                kind = remark.partition(" (")[0]        # see row_types
                kinds = remarks["used" if usable[row] else "skipped"]
                about = kinds.setdefault(kind, {"rows": 0, "first": []})
                about["rows"] += 1
                if about["rows"] <= NAMED:
                    about["first"].append(f"{split} {row}: {remark}")
    return remarks

def check_usable(table, remarks, config):
    """Raise ValueError, with the remarks, where no row of the table can be used."""
    if table["digest"].null_count == len(table):
        raise ValueError(f"--data {config.data}: none of its {len(table):,} rows can be used: "
                         f"{about_remarks(remarks)}")

def about_remarks(remarks):
    """What was skipped, and what was done to rows that were not, in a line."""
    said = []
    for key, what in (("skipped", "rows skipped"), ("used", "used with a remark")):
        counts = Counter({remark: about["rows"] for remark, about in remarks.get(key, {}).items()})
        if counts:
            most = "; ".join(f"{n:,} x {remark}" for remark, n in counts.most_common(6))
            said.append(f"{counts.total():,} {what} ({most})")
    return ", ".join(said) or "no row skipped"

# ---- encoders of captions and images -----------------------------------------------------------
# A text encoder turns captions into features without padding: a list of (length, F) arrays. All
# encoders are frozen. Which weights they have is a part of a run's identity (`about`), because the
# same name may stand for other weights tomorrow.

@functools.cache
def word_vector(word, dim):
    """The frozen vector of a word: (F,) normal float32 numbers that depend on the word alone."""
    seed = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=6).digest(), "big")
    bits = random_bits(seed, torch.zeros(1, dtype=torch.long), dim)[0]
    # Quantiles of the normal distribution; the half keeps them finite.
    return torch.special.ndtri((bits.double() + 0.5) / 2 ** 24).float().numpy()

def hash_features(captions, tokens, dim):
    """The default features: each lower-case word has its `word_vector`. No download, no meaning.

    A list of strings -> a list of (length, F) float32 arrays, of at most S words each.
    """
    found = []
    for caption in captions:
        words = re.findall(r"\w+", caption.lower())[:tokens]
        vectors = [word_vector(word, dim) for word in words]
        found.append(np.array(vectors, np.float32).reshape(-1, dim))               # (length, F)
    return found

def weights_digest(network):
    """Which weights these are: a short SHA-256 of names and values, whatever folder they are in."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode() + weight.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

@contextlib.contextmanager
def errors_say_what_to_fetch(name, source, weights):
    """Errors of loading the network of --name, of many kinds, become a ValueError with a remedy."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"--{name}: cannot load {source} ({one_line(error)}). Without network: hf "
                         f"download {source} config.json {weights} --local-dir DIR elsewhere, then "
                         "name DIR in its place") from None

def find_text_encoder(config):
    """--text -> a hub name or folder, and the class of transformers that reads it."""
    import transformers             # here, since it takes seconds that others need not spend
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    kind, _, source = config.text.partition(":")
    default, network = TEXT_ENCODERS[kind]
    return source or default, getattr(transformers, network)

def text_dim(config):
    """The features F of --text, from its config.json. Raises ValueError where there is none."""
    source, network = find_text_encoder(config)
    with errors_say_what_to_fetch("text", source, PretrainedText.files):
        return network.config_class.from_pretrained(source).hidden_size

class PretrainedText:
    """A frozen CLIP or T5: the last hidden states of a caption's tokens, special ones included.

    An empty caption has no token at all and so is what the unconditional model sees. Raises
    ValueError where there are no such weights, or fewer positions than --text_tokens.
    """

    files = "model.safetensors tokenizer.json tokenizer_config.json"

    def __init__(self, config, device):
        from transformers import AutoTokenizer
        source, network = find_text_encoder(config)
        with errors_say_what_to_fetch("text", source, self.files):
            self.tokenizer = AutoTokenizer.from_pretrained(
                source, trust_remote_code=False, padding_side="right", truncation_side="right")
            network = network.from_pretrained(source, use_safetensors=True, dtype=torch.float32)
        self.network = network.to(device).eval().requires_grad_(False)
        self.tokens, dim = config.text_tokens, network.config.hidden_size
        positions = getattr(network.config, "max_position_embeddings", self.tokens)
        if self.tokens > positions:
            raise ValueError(f"--text_tokens {self.tokens}: {source} has only {positions} "
                             "positions")
        if config.text_dim not in (None, dim):
            raise ValueError(f"--text_dim {config.text_dim}: {source} gives {dim} (leave it out)")
        # The tokenizer's words count too: with others the same weights give other features.
        words = getattr(self.tokenizer, "backend_tokenizer", None)
        both = weights_digest(network) + (words.to_str() if words else "")
        sha256 = hashlib.sha256(both.encode()).hexdigest()[:16]
        self.about = {"name": source, "sha256": sha256, "tokens": self.tokens}

    @torch.no_grad()
    def features(self, captions):
        """A list of strings -> a list of (length, F) float16 arrays. Each different one is encoded
        once; the longest are cut to S tokens, the last of which is the end token."""
        different, found = list(dict.fromkeys(captions)), {}
        for start in range(0, len(different), ENCODE_BATCH):
            some = different[start:start + ENCODE_BATCH]
            # Always of one length, so that no caption's features depend on its neighbours.
            tokens = self.tokenizer(some, padding="max_length", truncation=True,
                                    max_length=self.tokens, return_tensors="pt")
            mask = tokens["attention_mask"].to(self.network.device)
            ids = tokens["input_ids"].to(self.network.device)
            text = self.network(input_ids=ids, attention_mask=mask).last_hidden_state.half()
            for caption, row, length in zip(some, text.cpu().numpy(), mask.sum(1).tolist()):
                found[caption] = row[:length if caption.strip() else 0]
        return [found[caption] for caption in captions]

def padded(parts, tokens, dim):
    """Features (length, F) of B captions -> text (B, S, F), 0 behind them, text_mask (B, S)."""
    text = np.zeros((len(parts), tokens, dim), parts[0].dtype)
    mask = np.zeros((len(parts), tokens), bool)
    for k, part in enumerate(parts):
        text[k, :len(part)] = part
        mask[k, :len(part)] = True
    return torch.from_numpy(text), torch.from_numpy(mask)

class VAE:
    """A frozen AutoencoderKL of diffusers. Raises ValueError where there are no such weights."""

    def __init__(self, source, device):
        import diffusers            # here, since it takes seconds that others need not spend
        diffusers.logging.set_verbosity_error()
        # diffusers' own call of the hub warns of itself.
        warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")
        load = functools.partial(diffusers.AutoencoderKL.from_pretrained, source,
                                 use_safetensors=True, torch_dtype=torch.float32)
        with errors_say_what_to_fetch("vae", source, "diffusion_pytorch_model.safetensors"):
            try:
                network = load()
            except OSError:         # a whole pipeline has its VAE in a folder
                network = load(subfolder="vae")
        self.network = network.to(device).eval().requires_grad_(False)
        self.channels = network.config.latent_channels
        self.factor = 2 ** (len(network.config.block_out_channels) - 1)
        name = os.path.abspath(source) if os.path.isdir(source) else source
        self.about = {"name": name, "sha256": weights_digest(network)}

    @torch.no_grad()
    def moments(self, pixels):
        """Pixels (B, R, R, 3) uint8 -> (B, 2, 2, C, R/f, R/f): for each image and its mirror image,
        mean and log variance (clamped to [-30, 20], as diffusers does) of q(latent | image)."""
        x = pixels.to(self.network.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = [self.network.encode(mirror).latent_dist for mirror in (x, x.flip(3))]
        return torch.stack([torch.stack([one.mean, one.logvar], 1) for one in found], 1)

    @torch.no_grad()
    def decode(self, latents):
        """Latents (B, C, R/f, R/f), as the VAE gives them -> (B, 3, R, R) uint8."""
        parts = latents.float().to(self.network.device).split(ENCODE_BATCH)
        pixels = torch.cat([self.network.decode(part).sample for part in parts])
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

# ---- stored images: the source -----------------------------------------------------------------

def array_of(cell, dtype, *shape):
    """The bytes of an Arrow cell as an array, without a copy: read from disk where it is mapped."""
    return np.frombuffer(cell.as_buffer(), dtype).reshape(shape)

@functools.lru_cache(2)     # a batch may lie across two epochs
def epoch_order(seed, epoch, n):
    """The order of n training images in an epoch."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(mix(seed) ^ epoch)).numpy()

class StoredImages(Source):
    """Captioned images that `datasets` reads, as pixels.

    Resized images and text features are kept by datasets in its cache ($HF_DATASETS_CACHE) and
    memory-mapped from there. Training sample i is row i % n of the permutation of epoch i // n, a
    function of (seed, epoch). Which of its captions it has, and whether it is mirrored, is a
    function of (seed, i). Validation has always the first caption, never a mirror image.

    Raises ValueError, in one line, for what can't be read.
    """

    prefetch = True

    def __init__(self, config, seed=0, device="cpu"):
        super().__init__(config, seed, device)
        self.table, self.encoders, self.remarks = self.open_table()
        self.rows = choose_rows(self.table)
        self.validation_images, n = len(self.rows["validation"]), len(self.rows["train"])
        self.train_images = config.images or n
        if self.validation_images < 2:
            raise ValueError(f"--data {config.data}: {self.validation_images} images to validate "
                             "on, too few: see --validation_split")
        if self.train_images > n:
            raise ValueError(f"--images {config.images}: {config.data} has only {n} to train on")
        if config.images:               # the same for every seed, and the fewer among the more
            kept = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:config.images]
            self.rows["train"] = self.rows["train"][kept]

    def open_table(self):
        """-> the rows to train on as an Arrow table, and `encoders` and `remarks` of Source."""
        import datasets
        encoder, tables = RowEncoder(self.config, self.device), {}
        # Image files beside a table of their paths may change without datasets' noticing.
        reusable = not self.config.data.endswith((".csv", ".json", ".jsonl"))
        for split, rows in encoder.splits.items():
            parts = in_parts(rows) if self.config.stream else [rows]    # map needs a table
            tables[split] = datasets.concatenate_datasets([
                encoder.encode(part, split, load_from_cache_file=reusable) for part in parts])
        table, remarks = one_table(tables), collect_remarks(tables)
        check_usable(table, remarks, self.config)
        return table, {**encoder.encoders, "images": identity(table)}, remarks

    def choose(self, split, index):
        """-> row numbers, which of its captions each has, which are mirrored: three lists."""
        index, n = index.cpu(), self.train_images
        if split == "validation":
            return self.rows[split][index].tolist(), [0] * len(index), [False] * len(index)
        if not n:
            raise ValueError(f"--data {self.config.data}: all its images are for validation")
        places = [epoch_order(self.seed, i // n, n)[i % n] for i in index.tolist()]
        rows = self.rows[split][places].tolist()
        captions = self.table["captions"]
        counts = torch.tensor([len(captions[row]) for row in rows])
        bits = random_bits(self.seed ^ 0x5EED, index, 2)    # any constant would do; this one stays
        mirrored = (bits[:, 1] >> 23 > 0) & self.config.flip
        return rows, (bits[:, 0] * counts >> 24).tolist(), mirrored.tolist()

    def raw_images(self, rows, mirrored):
        """-> the pixels of rows, (B, 3, R, R) uint8, on the device."""
        cells, R = self.table["pixels"], self.config.resolution
        # Cells are views of the mapped file; np.stack is what reads it.
        pixels = np.stack([array_of(cells[row], np.uint8, R, R, 3) for row in rows])
        pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)                      # (B, 3, R, R)
        is_mirrored = torch.tensor(mirrored)[:, None, None, None]
        return torch.where(is_mirrored, pixels.flip(3), pixels).to(self.device)

    def batch(self, split, index):
        """-> raw_images, text (B, S, F), text_mask (B, S), all on the device."""
        rows, picks, mirrored = self.choose(split, index)
        tokens, dim = self.shape["text_tokens"], self.shape["text_dim"]
        if self.config.text == "hash":
            parts = hash_features(self.strings(rows, picks), tokens, dim)
        else:                           # a network's features were stored with the rows
            cells = self.table["text"]
            parts = [array_of(cells[row].values[pick], np.float16, -1, dim)        # (length, F)
                     for row, pick in zip(rows, picks)]
        text, text_mask = padded(parts, tokens, dim)
        raw = self.raw_images(rows, mirrored)
        return raw, text.to(self.device).float(), text_mask.to(self.device)

    def captions(self, split, index):
        """-> the captions as a list of strings."""
        rows, picks, _ = self.choose(split, index)
        return self.strings(rows, picks)

    def strings(self, rows, picks):
        """One caption of each row."""
        cells = self.table["captions"]
        return [cells[row][pick].as_py() for row, pick in zip(rows, picks)]

    @property
    def originals(self):
        """Width and height of all images before they were resized, (n, 2)."""
        rows = np.concatenate(list(self.rows.values()))
        return np.stack([self.table[side].take(rows) for side in ("width", "height")], 1)

class StoredLatents(StoredImages):
    """Captioned images of a folder of `prepare`: x is a latent of their VAE.

    shift, scale: (C, 1, 1), what makes x of mean 0 and variance 1. They are those of the images
    that the model was trained on: the set's own until `use_training_encoders` brings others.
    """

    latents = True

    def __init__(self, config, seed=0, device="cpu"):
        super().__init__(config, seed, device)
        self.use_training_encoders(self.encoders)

    def open_table(self):
        """-> the table, `encoders` and `remarks`, all from the folder."""
        stats = read_stats(self.config.data)
        shards = open_shards(self.config.data, stats["shards"])
        return one_table(shards), stats["encoders"], stats["remarks"]

    def use_training_encoders(self, encoders):
        """See Source; takes over the training's shift and scale. `self.encoders` stays as it is."""
        super().use_training_encoders(encoders)
        shift, scale = (encoders["vae"][name] for name in ("shift", "scale"))
        self.shift = torch.tensor(shift, dtype=torch.float64, device=self.device).view(-1, 1, 1)
        self.scale = torch.tensor(scale, dtype=torch.float64, device=self.device).view(-1, 1, 1)

    @functools.cached_property
    def vae(self):
        """The VAE, read when the first latent is decoded: training needs none. Raises ValueError
        where it is gone or has other weights now."""
        about = self.encoders["vae"]
        vae = VAE(about["name"], self.device)
        if vae.about["sha256"] != about["sha256"]:
            raise ValueError(f"--data {self.config.data} was made with other weights of "
                             f"{about['name']} (SHA-256 {about['sha256']}) than are there now "
                             f"({vae.about['sha256']})")
        return vae

    def raw_images(self, rows, mirrored):
        """-> mean and log variance of the latents, (B, 2, C, R/f, R/f) float32, on the device."""
        cells, size = self.table["moments"], self.shape["size"]
        both = 2, 2, self.shape["channels"], size, size     # image, mirror; mean, log variance
        moments = np.stack([array_of(cells[row], np.float16, *both)[int(mirror)]
                            for row, mirror in zip(rows, mirrored)])
        return torch.from_numpy(moments).to(self.device).float()

    def to_x(self, raw, generator):
        """Moments -> x (B, C, R/f, R/f), normalised, its noise drawn from the generator."""
        mean, logvar = raw.unbind(1)
        noise = torch.randn(mean.shape, generator=generator, device=generator.device)
        latent = mean + torch.exp(0.5 * logvar) * noise.to(mean.device)
        return ((latent - self.shift) / self.scale).float()

    def to_levels(self, x):
        """x -> what the VAE makes of it, (B, 3, R, R) uint8. Raises ValueError, see `vae`."""
        return self.vae.decode(x * self.scale + self.shift)

    def images(self, split, index):
        """-> (B, 3, R, R) uint8: of validation the pixels that went into the VAE; of training,
        where they are not kept, what the VAE makes of the latents."""
        rows, _, mirrored = self.choose(split, index)
        if split == "validation":
            return super().raw_images(rows, mirrored)
        return self.vae.decode(self.raw_images(rows, mirrored)[:, 0])

SOURCES = {"scenes": Scenes, "scenes-ood": Scenes}      # by name; every other data set is stored

def load_data(config, seed=0, device="cpu"):
    """The source that --data names, with the training order of `seed`."""
    stored = StoredLatents if read_stats(config.data) else StoredImages
    return SOURCES.get(config.data, stored)(config, seed, device)

# ---- latents: made once by `prepare` -----------------------------------------------------------
# The folder holds
#
#   prepare.json                    flags, encoders and rows: what the shards belong to
#   train-00000.arrow ...           the shards, tables of the columns of `row_types`
#   validation-00000.arrow ...      those of a validation split of its own, if there is one
#   stats.json                      written last: counts, remarks, scale and shift of the latents
#
# A shard is there whole or not at all, so that the same command goes on after a kill.

FOLDER_FORMAT = 2

def read_stats(folder):
    """stats.json of a folder that prepare wrote; None where it is no such folder.

    Raises ValueError for a torn or unfinished one.
    """
    if folder in SOURCES:       # whatever folder of that name lies here
        return None
    path = os.path.join(folder, "stats.json")
    keys = "format", "input", "channels", "size", "encoders", "remarks", "shards"
    stats = read_json(path, keys, "delete it and run prepare again, which keeps the shards")
    if stats is None and os.path.exists(os.path.join(folder, "prepare.json")):
        raise ValueError(f"--data {folder}: prepare has not finished: the same command goes on")
    if stats and stats["format"] != FOLDER_FORMAT:
        raise ValueError(f"{path}: format {stats['format']}, this version reads {FOLDER_FORMAT}: "
                         "prepare it again, with another --out")
    return stats

def prepared_input(config):
    """What a prepared folder says of the model's input, for DataConfig: {} for any other data.

    Raises ValueError where a flag asks for something else; --text and --text_dim just give way.
    """
    stats = read_stats(config.data)
    if stats is None:
        return {}
    for name in ("resolution", "text_tokens", "stream", "take"):
        given = getattr(config, name)
        if given not in (getattr(DataConfig, name), stats["input"].get(name)):
            raise ValueError(f"--{name} {given}: {config.data} is prepared already, with "
                             f"{stats['input']}: leave the flag out")
    return stats["input"]

def open_shards(folder, names):
    """The files of prepare, memory-mapped -> {split: Dataset}."""
    import datasets
    parts = {}
    for name in names:
        path = os.path.join(folder, name)
        try:
            parts.setdefault(name.partition("-")[0], []).append(datasets.Dataset.from_file(path))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{path}: torn, or not a shard of isoflow ({one_line(error)}): delete "
                             "it and stats.json, and run prepare again") from None
    return {split: datasets.concatenate_datasets(found) for split, found in parts.items()}

def check_definition(out, definition):
    """Refuse a folder that was begun with other flags, data or encoders.

    definition: what is known so far. Raises ValueError with the names of what differs.
    """
    path = os.path.join(out, "prepare.json")
    saved = read_json(path, ["format", "flags"], "move it away or take another --out")
    if saved is None:
        return
    differs = differences({key: saved.get(key) for key in definition}, definition)
    if differs:
        raise ValueError(f"--out {out} belongs to another configuration ({'; '.join(differs)}): "
                         "take another --out")

@dataclass(frozen=True)
class LookConfig:
    """The flags of `data.py look` beside those of DataConfig."""

    out: str = flag("look.png", "what to write: the picture of look, or the folder of prepare")

@dataclass(frozen=True)
class PrepareConfig(LookConfig):
    """The flags of `data.py prepare` beside those of DataConfig."""

    vae: str = flag("stabilityai/sd-vae-ft-mse", "AutoencoderKL of diffusers, hub name or folder")

def prepare(config, settings):
    """Encode a data set once, into a folder of latents and text features.

    Ranks of torchrun share the shards. A finished folder is left as it is, an unfinished one is
    gone on with. Raises ValueError for input that can't be used.
    """
    if config.data in SOURCES or os.path.exists(os.path.join(config.data, "prepare.json")):
        raise ValueError(f"--data {config.data}: prepare is for images that are not prepared yet")
    rank, _ = ranks()
    flags = {**asdict(config), **asdict(settings)}
    for of_training in ("out", "flip", "captions", "images"):
        del flags[of_training]
    definition = {"format": FOLDER_FORMAT, "flags": flags}
    check_definition(settings.out, definition)      # before anything is loaded
    if os.path.exists(os.path.join(settings.out, "stats.json")):
        if rank == 0:
            print(f"{settings.out} is done: {read_stats(settings.out)['counts']} images")
        return
    gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"     # train.py has --device, but imports this
    encoder = RowEncoder(config, gpu if torch.cuda.is_available() else "cpu", settings.vae)
    factor = encoder.vae.factor
    if config.resolution % factor or config.resolution < 4 * factor:
        raise ValueError(f"--resolution {config.resolution}: this VAE makes one latent of "
                         f"{factor} x {factor} pixels; take a multiple of {factor}, at least "
                         f"{4 * factor}")
    definition["encoders"] = encoder.encoders
    # Which rows: datasets' own name for them changes with the files. A stream has none.
    definition["rows"] = {split: None if config.stream else f"{len(rows)}, {rows._fingerprint}"
                          for split, rows in encoder.splits.items()}
    begin_folder(settings.out, definition)
    shards = make_shards(encoder, settings.out)
    if rank == 0:
        # The other ranks are at work. Where one fails, torchrun ends this one too.
        while not all(os.path.exists(os.path.join(settings.out, name)) for name in shards):
            time.sleep(0.2)
        finish_folder(settings.out, config, encoder, shards)

def begin_folder(out, definition):
    """Make the folder of prepare and say in it what it is to hold. Raises ValueError where it
    belongs to something else."""
    check_definition(out, definition)
    path = os.path.join(out, "prepare.json")
    os.makedirs(out, exist_ok=True)
    if not os.path.exists(path):
        if any(name.endswith(".arrow") for name in os.listdir(out)):
            raise ValueError(f"--out {out}: has shards but no prepare.json, so nobody knows what "
                             "made them: take another --out")
        write_json(path, definition)

def make_shards(encoder, out):
    """Encode those shards of this rank (number modulo world size) that are not there yet.

    A shard is SHARD_ROWS rows of a split, encoded in fixed batches. So its bytes are a function of
    rows and flags alone, whoever makes it after whatever interruption. -> the names of all shards.
    """
    rank, world = ranks()
    shards = []
    for split, rows in encoder.splits.items():
        for number, part in enumerate(in_parts(rows)):
            name = f"{split}-{number:05d}.arrow"
            path = os.path.join(out, name)
            shards.append(name)
            if number % world == rank and not os.path.exists(path):
                encoder.encode(part, split, cache_file_name=f"{path}.tmp",
                               load_from_cache_file=False)
                os.replace(f"{path}.tmp", path)     # so that it is there whole or not at all
    return shards

def finish_folder(out, config, encoder, shards):
    """Write stats.json from the finished shards: with it the folder is a data set."""
    tables = open_shards(out, shards)
    table, remarks = one_table(tables), collect_remarks(tables)
    check_usable(table, remarks, config)
    rows = choose_rows(table)
    counts = {split: len(numbers) for split, numbers in rows.items()}
    # Shift and scale are of the images to train on, not mirrored; of all in an evaluation set.
    chosen = rows["train" if counts["train"] else "validation"]
    chosen = table.select(["mean", "square"]).take(chosen)
    mean, square = (np.array(column.to_pylist()).mean(0) for column in chosen.itercolumns())
    scale = np.sqrt(square - mean ** 2)                                            # (C,)
    vae = {**encoder.vae.about, "shift": mean.tolist(), "scale": scale.tolist()}
    write_json(os.path.join(out, "stats.json"), {
        "format": FOLDER_FORMAT,
        "input": {"resolution": config.resolution, "text": config.text,
                  "text_tokens": config.text_tokens, "text_dim": input_shape(config)["text_dim"]},
        "channels": encoder.vae.channels,
        "size": config.resolution // encoder.vae.factor,
        "encoders": {**encoder.encoders, "vae": vae, "images": identity(table)},
        "counts": counts,
        "remarks": remarks,
        "shards": shards,
    })
    for name in os.listdir(out):        # what a killed process left: of datasets, and of ours
        if re.search(r"^tmp\w+$|\.(arrow|json)\.tmp", name):
            os.remove(os.path.join(out, name))
    print(f"{out}: {counts['train']:,} training and {counts['validation']:,} validation images, "
          f"{about_remarks(remarks)}")

# ---- pictures ----------------------------------------------------------------------------------

def save_grid(path, groups, captions, title, columns=4, side=112):
    """Write a PNG of captioned images: each cell has the images of all groups side by side.

    groups: a list of (n, 3, R, R) uint8 tensors. The file appears whole or not at all.
    """
    font, gap = ImageFont.load_default(13), 10
    cell = len(groups) * (side + 4)
    wrapped = [textwrap.wrap(caption or "(no caption)", max(12, cell // 7)) for caption in captions]
    lines = min(max(len(text) for text in wrapped), 5)
    heading = textwrap.wrap(title, max(20, columns * (cell + gap) // 7))
    top, height = 18 * len(heading) + 2 * gap, side + 16 * lines + 2 * gap
    rows = -(-len(captions) // columns)
    page = Image.new("RGB", (columns * (cell + gap) + gap, top + rows * height), "white")
    pen = ImageDraw.Draw(page)
    pen.multiline_text((gap, gap), "\n".join(heading), "black", font)
    for k, text in enumerate(wrapped):
        left, upper = gap + k % columns * (cell + gap), top + k // columns * height
        for g, images in enumerate(groups):
            image = Image.fromarray(images[k].permute(1, 2, 0).cpu().numpy())
            image = image.resize((side, side), Image.Resampling.NEAREST)
            page.paste(image, (left + g * (side + 4), upper))
        if len(text) > lines:
            text = [*text[:lines - 1], text[lines - 1] + " …"]
        pen.multiline_text((left, upper + side + 4), "\n".join(text), "black", font)
    write_whole(path, lambda temporary: page.save(temporary, "PNG"))

def look(config, settings):
    """Write a contact sheet: the first images of a data set, their captions, their statistics."""
    data = load_data(config)
    split = "validation" if data.train_images == 0 else "train"
    n = data.validation_images if split == "validation" else data.train_images
    index = torch.arange(min(24, n or 24))
    raw, _, text_mask = data.batch(split, index)
    x = data.to_x(raw, torch.Generator().manual_seed(0)).double()
    words = text_mask.sum(1).double()
    full = (words == config.text_tokens).double().mean()
    about = [f"{config.data}, {config.resolution} pixels"]
    if data.latents:
        about[0] += ", latents {size} x {size} x {channels}".format(**data.shape)
    counts = ("endless" if count is None else f"{count:,}"
              for count in (data.train_images, data.validation_images))
    about.append("training images: {}, validation {}".format(*counts))
    about.append(f"of these {len(index)}: x has mean {x.mean():.3f}, standard deviation "
                 f"{x.std():.3f}, captions {words.mean():.1f} of {config.text_tokens} slots, "
                 f"{full:.0%} fill them all")
    if data.originals is not None:
        shorter, (width, height) = data.originals.min(1), np.median(data.originals, 0)
        about.append(f"originals: shorter side {shorter.min()} to {shorter.max()}, median "
                     f"{width:.0f} x {height:.0f}; {about_remarks(data.remarks)}")
    title = "; ".join(about)
    save_grid(settings.out, [data.images(split, index)], data.captions(split, index), title, 6)
    print(f"{title}\nwritten: {settings.out}")

COMMANDS = {    # name: (function, its own flags, its defaults of DataConfig, line of --help)
    "look": (look, LookConfig, {},
             "look (without a word too): a contact sheet of a data set. See also: prepare --help"),
    "prepare": (prepare, PrepareConfig, {"resolution": 256, "out": "prepared"},
                "prepare: encode a data set once, into a folder of latents and text features"),
}

def main():
    """data.py [look], or data.py prepare."""
    named = len(sys.argv) > 1 and sys.argv[1] in COMMANDS
    command, *argv = sys.argv[1:] if named else ["look", *sys.argv[1:]]
    run, settings, defaults, says = COMMANDS[command]
    configs = parse_flags((DataConfig, settings), says, {command: defaults}, argv=argv)
    with errors_in_one_line("data.py"):
        run(*configs)

if __name__ == "__main__":
    main()
