"""Where do images, captions and their features come from?

Three sources, with the same methods (`batch`, `captions`, `images`, `to_x`, `to_levels`, `shape`):

    scenes, scenes-ood   an endless world of captioned shapes, drawn on the device; nothing to download
    PATH or HUB/NAME     anything that `datasets.load_dataset` reads: parquet, a folder with metadata, webdataset tars, a hub name
    DIR of prepare       latents of a VAE and features of a text encoder, made once from such a data set, memory-mapped

Images are 8-bit pixels, turned into x = (k + u) / 128 - 1 with u uniform in [0, 1), fresh at each draw; latents are
x = (mean + std n - shift) / scale with n normal, fresh at each draw. Captions become features by the `hash` encoder (every word
is a frozen pseudo-random vector), or by CLIP or T5. Nothing that is downloaded is ever executed, no pickle is read.

    python data.py look --data PATH --out look.png        a contact sheet, to check before a budget is spent
    python data.py prepare --data PATH --resolution 256 --vae stabilityai/sd-vae-ft-mse --text clip --out prepared
"""
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import os
import re
import sys
import textwrap
import time
import uuid
import warnings
from argparse import ArgumentParser
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Literal, Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from tqdm import tqdm
from transformers import HfArgumentParser

TEXT_HUB_NAMES = {"clip": "openai/clip-vit-large-patch14", "t5": "google-t5/t5-base"}  # both come as safetensors


@dataclass(frozen=True)
class DataConfig:
    data: str = field(default="scenes", metadata={
        "help": "scenes, scenes-ood, a folder written by data.py prepare, or what datasets reads: a file, a folder, a hub name"})
    resolution: int = field(default=16, metadata={"help": "side of the square images, in pixels"})
    captions: Literal["dense", "sparse"] = field(default="dense", metadata={
        "help": "of scenes: dense names every shape, sparse only the largest"})
    images: Optional[int] = field(default=None, metadata={
        "help": "train on only so many images, again and again (default: all there are; scenes are endless)"})
    text: str = field(default="hash", metadata={
        "help": "text encoder: hash (nothing to download), clip or t5, or clip:NAME_OR_FOLDER, t5:NAME_OR_FOLDER"})
    text_tokens: Optional[int] = field(default=None, metadata={
        "help": "caption slots S; longer captions are cut, shorter masked (default: 16 with hash, 77 with clip and t5)"})
    text_dim: Optional[int] = field(default=None, metadata={"help": "features F of a word in the hash encoder (default: 64)"})
    image_column: str = field(default="image", metadata={"help": "column of the images (of webdataset tars: jpg, png)"})
    text_column: str = field(default="text", metadata={
        "help": "column of the captions, one or a list of them (then one is drawn each time); json.caption: a field of a column"})
    split: str = field(default="train", metadata={"help": "split of the data set to train on"})
    validation_split: Optional[str] = field(default=None, metadata={
        "help": "split to validate on (default: validation, val or test if there, else a tenth of --split held out by a hash); "
                "the same as --split: all of it, to evaluate on"})
    flip: bool = field(default=False, metadata={
        "help": "mirror half of the training images, at random; not for captions that say left or right"})
    stream: bool = field(default=False, metadata={"help": "read a remote data set as it comes, without storing it"})
    take: Optional[int] = field(default=None, metadata={"help": "only the first so many rows of each split"})

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        stats = read_stats(self.data)
        for name, value in stats["input"].items() if stats else ():   # a prepared folder says itself what is in it
            if name in ("resolution", "text_tokens") and getattr(self, name) not in (type(self).__dataclass_fields__[name].default, value):
                raise ValueError(f"--{name} {getattr(self, name)}: {self.data} was prepared with {value}; leave the flag out")
            put(name, value)
        kind, _, source = self.text.partition(":")
        if kind not in ("hash", *TEXT_HUB_NAMES) or (kind == "hash" and source):
            raise ValueError(f"--text {self.text}: take hash, clip, t5, clip:NAME_OR_FOLDER or t5:NAME_OR_FOLDER")
        if self.text_tokens is None:
            put("text_tokens", 16 if kind == "hash" else 77)
        if self.text_dim is None and kind == "hash":
            put("text_dim", 64)
        for name in ("resolution", "images", "text_tokens", "text_dim", "take"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        foreign = [flag for flag in ("text", "flip", "stream", "take") if getattr(self, flag) not in ("hash", False, None)]
        if self.data in ("scenes", "scenes-ood") and foreign:
            raise ValueError(f"--{foreign[0]} is for real images, not for --data {self.data}")
        if stats and (self.stream or self.take):
            raise ValueError(f"--stream and --take are for data.py prepare; --data {self.data} is prepared already")


def data_config_of(saved, data):
    """The configuration for `data` of a model that was trained with the saved one (a dictionary).

    Of another data set than the training's only what makes the model's input is kept: its columns and splits are its own.
    """
    same = data == saved["data"] or (os.path.exists(data) and os.path.realpath(data) == os.path.realpath(saved["data"]))
    kept = saved if same else {
        name: saved[name] for name in ("resolution", "captions", "text", "text_tokens", "text_dim") if name in saved}
    return DataConfig(**{**kept, "data": data})


# ---- flags ------------------------------------------------------------------------------------------------------------

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
    """One instance of each dataclass from the command line. What is wrong is one line, and exit status 2.

    presets: {name: defaults that --preset name puts in the place of the fields' own}; a flag given wins over both.
    positional: the field that a first word without a flag is for. rest: return what is not understood as a last list.
    """
    argv = sys.argv[1:] if argv is None else argv
    if positional and argv and not argv[0].startswith("-"):
        argv = [f"--{positional}", *argv]
    parser = HfArgumentParser(types, description=description.splitlines()[0], allow_abbrev=False)

    def error(message):
        print(f"{parser.prog}: {message}", file=sys.stderr)
        sys.exit(2)
    parser.error = error
    if presets:
        first = ArgumentParser(add_help=False, allow_abbrev=False)
        first.add_argument("--preset", default=next(iter(presets)))
        first.error = error
        parser.set_defaults(**presets.get(first.parse_known_args(argv)[0].preset, {}))
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
    """This process among those of torchrun: its number, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def errors_in_one_line(script):
    """Errors are one line on stderr. Exit status 2 for bad input (ValueError), 1 for all else that may go wrong."""
    try:
        yield
    except (ValueError, FloatingPointError, OSError, RuntimeError) as error:
        if ranks()[0] == 0 or not isinstance(error, ValueError):   # bad input is the same for all ranks
            print(f"{script}: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


# ---- files -------------------------------------------------------------------------------------------------------------

def one_line(error):
    """The first line of an error's message, or its name where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def write_whole(path, write):
    """write(temporary path), then rename: the file appears whole or not at all, also after kill -9 or on a full disk."""
    temporary = f"{path}.tmp{uuid.uuid4().hex[:12]}"   # a process number would not do for several machines on one disk
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save tells a full disk as a RuntimeError about positions
        raise OSError(f"{path} could not be written, is the disk full? ({one_line(error)})") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, content):
    """JSON in which a number that is not finite is an error, never a NaN that a reader stumbles over."""
    text = json.dumps(content, indent=1, allow_nan=False)

    def write(temporary):
        with open(temporary, "w") as file:
            file.write(text + "\n")
    write_whole(path, write)


def write_array(path, array):
    def write(temporary):
        with open(temporary, "wb") as file:  # np.save would add .npy to the temporary name
            np.save(file, array)
    write_whole(path, write)


def read_json(path, keys, mend):
    """The dictionary in a file, None where there is no such file.

    keys: what it must hold. mend: what to do with a torn or foreign file, the end of the ValueError's line.
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
    raise ValueError(f"{path}: torn, or not of isoflow: {mend}")


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


# ---- random numbers that are a function of their counter -------------------------------------------------------------

def mix(h):
    """A bijection of 32-bit integers that scatters them well (the finaliser of MurmurHash3, A. Appleby, public domain).

    Integer arithmetic is the same on every device, which the generators of torch are not. int64 in, int64 out.
    """
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    return h ^ (h >> 16)


def random_bits(seed, index, draws):
    """`draws` random 24-bit integers for each index, (B,) int64 -> (B, draws) int64, a pure function of (seed, index)."""
    h = mix(torch.full_like(index, mix(seed & 0xFFFFFFFF) ^ mix((seed >> 32) & 0xFFFFFFFF) ^ 0x9E3779B9))
    h = mix(mix(h ^ (index & 0xFFFFFFFF)) ^ (index >> 32))
    counter = torch.arange(draws, device=index.device)
    return mix(mix(h[:, None] ^ (counter * 0x9E3779B9 & 0xFFFFFFFF)) + counter & 0xFFFFFFFF) >> 8


def seeded(*numbers, device="cpu"):
    """A generator that depends on the numbers alone: (seed, step, micro-batch), never on the rank."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


# ---- captions ------------------------------------------------------------------------------------------------------

class HashText:
    """The default text encoder: each lower-case word gets a vector of F normal numbers that depends on the word alone.

    Works for any caption in any order of training, needs no download; knows nothing of meaning. Id 0 is no word.
    """

    def __init__(self, tokens, dim):
        self.tokens, self.dim = tokens, dim
        self.ids, self.table = {}, torch.zeros(1, dim)

    def encode(self, captions):
        """Captions -> word ids, (n, S) int64, 0 behind the last word. Captions of more than S words are cut."""
        words = [re.findall(r"\w+", caption.lower())[:self.tokens] for caption in captions]
        new = sorted({word for caption in words for word in caption} - self.ids.keys())
        if new:
            seeds = [int.from_bytes(hashlib.blake2b(word.encode(), digest_size=6).digest(), "big") for word in new]
            bits = torch.cat([random_bits(seed, torch.zeros(1, dtype=torch.long), self.dim) for seed in seeds])
            normal = torch.special.ndtri((bits.double() + 0.5) / 2 ** 24).float()
            self.ids.update({word: len(self.table) + k for k, word in enumerate(new)})
            self.table = torch.cat([self.table, normal.to(self.table.device)])
        ids = torch.zeros(len(captions), self.tokens, dtype=torch.long)
        for row, caption in zip(ids, words):
            row[:len(caption)] = torch.tensor([self.ids[word] for word in caption], dtype=torch.long)
        return ids

    def features(self, ids):
        """Word ids (B, S) -> text (B, S, F), text_mask (B, S)."""
        self.table = self.table.to(ids.device)
        return self.table[ids], ids > 0


# ---- pixels --------------------------------------------------------------------------------------------------------------

def to_data(k, u):
    """8-bit levels k (B, C, R, R) and u uniform in [0, 1) -> x = (k + u) / 128 - 1, a continuous variable in [-1, 1)."""
    return (k + u) / 128 - 1


def to_levels(x):
    """x -> the nearest 8-bit levels, (B, C, R, R) uint8: the inverse of to_data."""
    return ((x + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


class Source:
    """What all data sets share."""

    def use_training_encoders(self, encoders):
        """See a data set as the model does that was trained on latents or features of `encoders`: checks that the set's are the
        same networks, and takes over the scale and shift of the training set. Raises ValueError where they are others."""
        for what in ("text", "vae"):
            its, models = self.encoders.get(what, {}), encoders.get(what, {})
            if its.get("sha256") != models.get("sha256"):
                name = lambda about: f"{about['name']} (SHA-256 {about['sha256']})" if about else "none"
                raise ValueError(f"--data {self.config.data}: its {what} encoder is {name(its)}, the model was trained with {name(models)}")
        if "vae" in encoders:
            self.normalise(encoders["vae"]["shift"], encoders["vae"]["scale"])


class Pixels(Source):
    """What all sources of 8-bit images share. `encoders`: which networks made the data, {} for none; `prefetch`: whether the
    next batch is worth a thread of its own; `latents`: whether x is a latent rather than pixels."""

    encoders, prefetch, latents, remarks = {}, False, False, []

    def to_x(self, k, generator):
        """What batch() gave -> x, like the model's input; what is random in it comes from the generator."""
        return to_data(k, torch.rand(k.shape, generator=generator, device=generator.device).to(k.device))

    def to_levels(self, x):
        """x -> (B, 3, R, R) uint8, to look at and to compare with images()."""
        return to_levels(x)

    def images(self, split, index):
        """The samples `index` (B,) as pictures, (B, 3, R, R) uint8."""
        return self.batch(split, index)[0]


# ---- the embedded world ------------------------------------------------------------------------------------------------

GROUNDS = {"black": (0.05, 0.05, 0.08), "navy": (0.08, 0.12, 0.35), "grey": (0.5, 0.5, 0.5), "beige": (0.88, 0.84, 0.72)}
COLOURS = {"red": (0.85, 0.12, 0.12), "orange": (0.95, 0.55, 0.1), "yellow": (0.95, 0.9, 0.2), "green": (0.15, 0.65, 0.2),
           "cyan": (0.2, 0.8, 0.85), "blue": (0.2, 0.35, 0.9), "purple": (0.55, 0.2, 0.7), "white": (0.97, 0.97, 0.97)}
KINDS = ("disc", "square", "triangle", "ring", "bar", "cross")
TEXTURES = ("plain", "striped", "checked")
SIZES = ("small", "medium", "large")  # the words "plain" and "medium" go without saying
PLACES = ("northwest", "north", "northeast", "west", "centre", "east", "southwest", "south", "southeast")
MAX_SHAPES = 3
BLOCK = 256  # scenes drawn at once
VALIDATION_START = 1 << 40  # validation images are those of seed 0 from this index on; no training run gets there


def quantiles(weights, entries=256):
    """A table of `entries` class indices in which each class has its share: a draw is a look-up, equal on all devices."""
    edges = np.round(np.cumsum(weights) / np.sum(weights) * entries).astype(int)
    return torch.tensor(np.searchsorted(edges, np.arange(entries), side="right"))


def power_law_radii(exponent, smallest, largest, entries=256):
    """Quantiles of the density r^-exponent between two radii (in image sides), as float32."""
    u, power = (np.arange(entries) + 0.5) / entries, 1 - exponent
    return torch.tensor((smallest ** power + u * (largest ** power - smallest ** power)) ** (1 / power)).float()


class Scenes(Pixels):
    """Captioned shapes on a ground: image and caption are a pure function of (seed, index), on every device.

    Sizes follow a power law and shapes occlude each other like fallen leaves, which is what gives natural images their
    statistics (Ruderman 1997; Lee, Mumford, Huang 2001); larger ones lie below, so that what a caption names can be
    seen. Only operations with one correct answer are used (integers, + - * /, square roots, comparisons, look-ups),
    so CPU and GPU draw the same bits. `scenes-ood` is the same world with more and larger shapes and other colours.
    """

    def __init__(self, config, seed=0, device="cpu"):
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.train_images, self.validation_images = config.images, None  # None: endless
        self.block, self.drawn = None, None
        ood = config.data == "scenes-ood"
        self.counts = quantiles([1, 2, 5] if ood else [1, 1, 1]).to(device) + 1
        self.radii = (power_law_radii(1.5, 0.15, 0.6) if ood else power_law_radii(2, 0.12, 0.5)).to(device)
        self.colours = quantiles([1, 2, 4, 1, 4, 1, 4, 2] if ood else [1] * len(COLOURS)).to(device)
        turn = 2 * np.pi * np.arange(256) / 256
        self.turns = torch.tensor(np.stack([np.cos(turn), np.sin(turn)], -1)).float().to(device)
        self.ground_rgb = torch.tensor(list(GROUNDS.values()), device=device)
        self.colour_rgb = torch.tensor(list(COLOURS.values()), device=device)
        self.text = HashText(config.text_tokens, config.text_dim)
        self.vocabulary = ["", *GROUNDS, *SIZES, *TEXTURES, *COLOURS, *KINDS, *PLACES]
        self.word_ids = torch.stack([torch.zeros(config.text_tokens, dtype=torch.long),
                                     *self.text.encode(self.vocabulary[1:])])[:, 0].to(device)  # place in vocabulary -> id

    @property
    def shape(self):
        return dict(channels=3, size=self.config.resolution,
                    text_tokens=self.config.text_tokens, text_dim=self.config.text_dim)

    def describe(self, split, index):
        """All attributes of the scenes `index` (B,), each (B,) or (B, shapes); shapes sorted from large to small.

        Where --images limits them, every epoch has the same order, which is as random as the scenes are.
        """
        index = index % self.train_images if self.train_images and split == "train" else index
        seed, index = (0, index + VALIDATION_START) if split == "validation" else (self.seed, index)
        per_shape = 10
        bits = random_bits(seed, index.to(self.device), 3 + MAX_SHAPES * per_shape)               # (B, draws)
        shapes = bits[:, 3:].view(-1, MAX_SHAPES, per_shape)                                      # (B, shapes, 10)
        count = self.counts[bits[:, 0] >> 16]                                                     # (B,)
        there = torch.arange(MAX_SHAPES, device=self.device) < count[:, None]                     # (B, shapes)
        radius = torch.where(there, self.radii[shapes[..., 0] >> 16], 0.0)
        order = radius.argsort(dim=1, descending=True, stable=True)
        shapes = shapes.gather(1, order[..., None].expand(-1, -1, per_shape))
        centre = 0.1 + shapes[..., 1:3].float() * (0.8 / 2 ** 24)                                 # (B, shapes, 2): x, y
        cell = (centre * 3).long().clamp(max=2)
        radius = radius.gather(1, order)
        return {
            "there": there, "radius": radius, "centre": centre,
            "ground": bits[:, 1] * len(GROUNDS) >> 24, "light": self.turns[bits[:, 2] >> 16],
            "kind": shapes[..., 3] * len(KINDS) >> 24, "colour": self.colours[shapes[..., 4] >> 16],
            "texture": shapes[..., 5] * len(TEXTURES) >> 24, "turn": self.turns[shapes[..., 6] >> 16],
            "tint": shapes[..., 7:10].float() * (0.16 / 2 ** 24) - 0.08,                          # (B, shapes, 3)
            "size": (radius > 0.16).long() + (radius > 0.26).long(), "place": 3 * cell[..., 1] + cell[..., 0],
        }

    def draw(self, scene):
        """The picture of described scenes, (B, 3, R, R) uint8. Edges are smoothed over one pixel."""
        R = self.config.resolution
        pixel = (torch.arange(R, device=self.device).float() + 0.5) / R
        x, y = pixel[None, None, None, :], pixel[None, None, :, None]                             # columns, rows
        wide = lambda value: value[..., None, None]
        dx, dy = x - wide(scene["centre"][..., 0]), y - wide(scene["centre"][..., 1])             # (B, shapes, R, R)
        scale = 1 / scene["radius"].clamp(min=1e-3)
        cos, sin = wide(scene["turn"][..., 0] * scale), wide(scene["turn"][..., 1] * scale)
        u, v = cos * dx + sin * dy, cos * dy - sin * dx                   # in the frame of the shape, radius 1
        a, b, rho = u.abs(), v.abs(), (u * u + v * v).sqrt()
        outside = torch.stack([                                           # distance to the edge, negative inside
            rho - 1,
            torch.maximum(a, b) - 0.85,
            torch.maximum(v, 0.8660254 * a - 0.5 * v) - 0.6,
            (rho - 0.75).abs() - 0.25,
            torch.maximum(a - 1, b - 0.35),
            torch.minimum(torch.maximum(a - 1, b - 0.3), torch.maximum(b - 1, a - 0.3)),
        ]).gather(0, wide(scene["kind"]).expand_as(u)[None])[0]
        cover = (0.5 - outside * wide(scene["radius"] * R)).clamp(0, 1) * wide(scene["there"])   # (B, shapes, R, R)
        stripe, check = (2 * v).floor().long() & 1, ((2 * u).floor() + (2 * v).floor()).long() & 1
        dark = torch.where(wide(scene["texture"]) == 1, stripe, check) * (wide(scene["texture"]) > 0)
        shade = 1 - 0.45 * dark                                                                   # (B, shapes, R, R)
        light = scene["light"][:, 0, None, None] * (x[:, 0] - 0.5) + scene["light"][:, 1, None, None] * (y[:, 0] - 0.5)
        image = wide(self.ground_rgb[scene["ground"]]) + 0.15 * light[:, None]                    # (B, 3, R, R)
        rgb = self.colour_rgb[scene["colour"]] + scene["tint"]                                    # (B, shapes, 3)
        for k in range(MAX_SHAPES):
            image = image + cover[:, k, None] * (wide(rgb[:, k]) * shade[:, k, None] - image)
        return (image * 255 + 0.5).floor().clamp(0, 255).to(torch.uint8)

    def caption_words(self, scene):
        """The caption as places in the vocabulary, (B, 1 + 5 * shapes), 0 where a word is left out."""
        first = {}  # where each list of words begins in the vocabulary
        for words in (GROUNDS, SIZES, TEXTURES, COLOURS, KINDS, PLACES):
            first[next(iter(words))] = self.vocabulary.index(next(iter(words)))
        words = torch.stack([
            torch.where(scene["size"] != 1, first["small"] + scene["size"], 0),
            torch.where(scene["texture"] != 0, first["plain"] + scene["texture"], 0),
            first["red"] + scene["colour"], first["disc"] + scene["kind"], first["northwest"] + scene["place"],
        ], dim=-1) * scene["there"][..., None]                                                    # (B, shapes, 5)
        ground = first["black"] + scene["ground"][:, None]
        if self.config.captions == "sparse":
            words, ground = words[:, :1], torch.zeros_like(ground)
        return torch.cat([ground, words.flatten(1)], dim=1)

    def batch(self, split, index):
        """index (B,) int64 -> images (B, 3, R, R) uint8, text (B, S, F), text_mask (B, S), all on the device.

        A scene takes some 150 small operations, so a few cost as much as many: neighbours are drawn with it and kept.
        """
        block = int(index[0]) // BLOCK
        if (index // BLOCK != block).any():
            images, ids = self.make(split, index)
        else:
            if self.block != (split, block):
                self.block, self.drawn = (split, block), self.make(split, torch.arange(block * BLOCK, (block + 1) * BLOCK))
            images, ids = (drawn[(index % BLOCK).to(self.device)] for drawn in self.drawn)
        return images, *self.text.features(ids)

    def make(self, split, index):
        """index (B,) -> images (B, 3, R, R) uint8 and word ids (B, S)."""
        scene = self.describe(split, index)
        words = self.caption_words(scene)
        words = words.gather(1, (words == 0).to(torch.uint8).argsort(dim=1, stable=True))        # left-out words last
        ids = self.word_ids[words[:, :self.config.text_tokens]]
        if ids.shape[1] < self.config.text_tokens:
            ids = torch.nn.functional.pad(ids, (0, self.config.text_tokens - ids.shape[1]))
        return self.draw(scene), ids

    def captions(self, split, index):
        """The same captions as strings: "navy: large striped red disc north, small blue ring east"."""
        rows = self.caption_words(self.describe(split, index)).tolist()
        captions = []
        for ground, *words in rows:
            shapes = [" ".join(self.vocabulary[w] for w in words[k:k + 5] if w) for k in range(0, len(words), 5)]
            captions.append((f"{self.vocabulary[ground]}: " if ground else "") + ", ".join(filter(None, shapes)))
        return captions


# ---- real images: what datasets reads --------------------------------------------------------------------------------------

READERS = {".parquet": "parquet", ".csv": "csv", ".json": "json", ".jsonl": "json", ".arrow": "arrow", ".tar": "webdataset"}
VALIDATION_NAMES = ("validation", "val", "test")
MIN_SIDE, MAX_PIXELS = 8, 100_000_000   # smaller shows nothing, larger is a bomb (or a map)
MAX_CAPTION = 10_000                    # characters; no encoder has slots for more
READING = 2                             # version of what follows: datasets keeps the results of another one apart


def open_splits(config):
    """-> {"train": data set, "validation": where it has its own} of `datasets`, in Arrow format so that nothing is decoded, and the
    folders that paths in it may lead to. Raises ValueError, in one line, for what can't be read."""
    import datasets               # here, since it takes a second that scenes need not spend
    import huggingface_hub
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)   # what can't be read is said below, in one line
    huggingface_hub.logging.set_verbosity(huggingface_hub.logging.CRITICAL)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)   # refused or not, by MAX_PIXELS
    path, more = config.data, ""
    suffix = os.path.splitext(path)[1].lower()
    if os.path.isdir(path):
        kind, files, roots = os.path.abspath(path), None, [path]   # a folder "csv" is no reader of that name
    elif os.path.isfile(path) or "://" in path or "*" in path:   # a file, a bucket, or several files
        if suffix not in READERS:
            raise ValueError(f"--data {path}: a file of captioned images ends in {', '.join(READERS)}")
        kind, files, roots = READERS[suffix], {config.split: path}, [os.path.dirname(os.path.abspath(path))]
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", path):
        kind, files, roots = path, None, [huggingface_hub.constants.HF_HUB_CACHE, datasets.config.HF_DATASETS_CACHE]
        more = (f". There is no such folder here either. Without network: hf download {path} --repo-type dataset --local-dir DIR elsewhere, "
                f"then --data DIR")
    else:
        raise ValueError(f"--data {path}: no such file or folder (or say scenes, scenes-ood, or a hub name OWNER/NAME)")
    try:
        splits = datasets.load_dataset(kind, data_files=files, streaming=config.stream)
    except Exception as error:  # each reader raises its own kinds, the cause of which often says more
        raise ValueError(f"--data {path}: datasets can't read it, or it is empty ({one_line(error.__cause__ or error)}){more}") from None
    other = config.validation_split or next((name for name in VALIDATION_NAMES if name in splits and name != config.split), None)
    names = {"train": config.split, "validation": other} if other else {"train": config.split}
    if other == config.split:
        del names["train"]   # an evaluation set
    found = {}
    for split, name in names.items():
        if name not in splits:
            raise ValueError(f"--data {path}: no split {name} (there is {', '.join(splits)}): see --split and --validation_split")
        rows = splits[name]
        first = next(iter(rows.with_format("arrow").iter(1)), None)
        columns = rows.column_names or (first.column_names if first else [])   # a stream may not know them yet
        for flag, column in (("image_column", config.image_column), ("text_column", config.text_column)):
            if column not in columns and column.partition(".")[0] not in columns:
                raise ValueError(f"--data {path}: no column {column} (there are {', '.join(columns)}): see --{flag}")
        used = {column if column in columns else column.partition(".")[0] for column in (config.image_column, config.text_column)}
        rows = rows.select_columns(sorted(used)).with_format("arrow")
        if not config.stream and config.take:
            rows = rows.select(range(min(config.take, len(rows))))
        found[split] = rows.take(config.take) if config.take and config.stream else rows
    return found, [os.path.realpath(root) for root in roots]


def column_of(table, name):
    """A column of an Arrow table; "json.caption" is the field caption of the column json."""
    import pyarrow.compute as pc
    first, *fields = [name] if name in table.column_names else name.split(".")
    return pc.struct_field(table.column(first), fields) if fields else table.column(first)


def as_bytes(kind):
    """The Arrow type of text (or of lists of text), with bytes in place of strings: so a row that is no UTF-8 does no harm."""
    import pyarrow as pa
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return pa.list_(as_bytes(kind.value_type))
    if pa.types.is_null(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        return pa.large_binary() if pa.types.is_large_string(kind) else pa.binary()
    raise ValueError(f"it holds {kind}, no text")


def to_pixels(image, resolution):
    """Any PIL image -> (R, R, 3) uint8: upright (EXIF), on white where transparent, RGB, centre crop, area-averaging resize."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):   # more than 8 bits: pillow would cut 16 bits off at 255
        levels, transparent = np.asarray(image), image.info.get("transparency")
        if levels.min() < 0 or levels.max() > 65535 or image.mode == "F":
            raise ValueError(f"levels of mode {image.mode} that are not 16-bit")
        if image.mode == "I" and levels.max() <= 255:   # 32 bits wide, but 8-bit levels
            levels, transparent = levels * 257, transparent if transparent is None else transparent * 257
        image = Image.fromarray(np.where(levels == transparent, 255, levels // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, upper, left + side, upper + side))
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.BICUBIC))  # pillow's averages over the area


def picture_formats():
    """Which formats are read: of pictures only. Pillow would hand PostScript to Ghostscript, which runs it as a program."""
    Image.init()
    return [name for name in ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO") if name in Image.OPEN]


def read_image(cell, roots, resolution):
    """An image of a row -> (R, R, 3) uint8, its width and height, a remark or "". Raises any kind of error, for any kind of rubbish."""
    content, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(content, str):
        content, path = None, content
    if content is None:
        if not path:
            raise ValueError("no image")
        real = os.path.realpath(os.path.join(roots[0], path))
        if not any(real.startswith(root.rstrip(os.sep) + os.sep) for root in roots):
            raise ValueError(f"its path leads out of the data ({path[:200]})")
        if not os.path.isfile(real):
            raise ValueError(f"its path leads nowhere ({path[:200]})")
        with open(real, "rb") as file:
            content = file.read()
    with Image.open(io.BytesIO(content), formats=picture_formats()) as image:
        width, height = image.size
        if width * height > MAX_PIXELS or min(width, height) < MIN_SIDE:
            raise ValueError(f"too {'small' if min(width, height) < MIN_SIDE else 'large'} ({width} x {height} pixels)")
        remark = "the first frame of an animation" if getattr(image, "is_animated", False) else ""
        return to_pixels(image, resolution), width, height, remark


def read_captions(cell):
    """The captions of a row, from bytes or a list of them -> a list of strings, not empty, and a remark or ""."""
    captions = [one for one in (cell if isinstance(cell, list) else [cell]) if one is not None]
    if not captions:
        raise ValueError("no caption")
    try:
        captions = [one.decode() for one in captions]
    except UnicodeDecodeError:
        raise ValueError("its caption is not UTF-8") from None
    longest = max(map(len, captions))
    remark = (f"a caption cut to {MAX_CAPTION:,} characters (of {longest:,})" if longest > MAX_CAPTION
              else "" if any(map(str.strip, captions)) else "an empty caption")
    return [one[:MAX_CAPTION] for one in captions], remark


def read_rows(table, image_column, text_column, resolution, roots, version=READING):
    """Rows of an Arrow table -> a dictionary of columns. A row that can't be used has no pixels and says why in `remark`; it is
    never fatal and never a black picture. A remark on a row with pixels says what was done to it.

    pixels: R * R * 3 bytes or None; captions: list of strings; digest: of the pixels, 8 bytes; width, height: of the original.
    """
    texts = column_of(table, text_column)
    try:
        texts = texts.cast(as_bytes(texts.type))
    except ValueError as problem:
        raise ValueError(f"--text_column {text_column}: {problem}") from None
    found = {"pixels": [], "captions": [], "digest": [], "width": [], "height": [], "remark": []}
    for image, text in zip(column_of(table, image_column), texts):
        try:
            captions, about_text = read_captions(text.as_py())
            pixels, width, height, remark = read_image(image.as_py(), roots, resolution)
            pixels, remark = pixels.tobytes(), "; ".join(filter(None, (remark, about_text)))
            digest = hashlib.blake2b(pixels, digest_size=8).digest()
        except MemoryError:
            raise
        except Exception as error:   # pillow and its many formats raise all kinds
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP):
                raise   # a disk that fails is no fault of the row: what is skipped now would stay skipped
            pixels, captions, digest, width, height = None, [], b"", 0, 0
            remark = ("no image that pillow can read" if isinstance(error, UnidentifiedImageError)
                      else re.sub(r" at 0x\w+", "", one_line(error))[:300])
        for name, value in zip(found, (pixels, captions, digest, width, height, remark)):
            found[name].append(value)
    return found


def held_out(digest):
    """Is an image of this digest in the tenth that is held out? Copies are on the same side, and no seed ever moves one."""
    return int.from_bytes(digest, "big") % 10 == 0


class Ordered:
    """The order of real images. Training sample i is row i % n of the permutation of epoch i // n, a pure function of (seed, epoch);
    which of its captions it has, and whether it is mirrored, is a function of (seed, i). Validation is always as it is."""

    def set_sizes(self, train, validation):
        wanted = self.config.images
        if wanted and wanted > train:
            raise ValueError(f"--images {wanted}: {self.config.data} has only {train} to train on")
        # Of all only `wanted`: the same ones for every seed, and the fewer among the more.
        self.kept = torch.randperm(train, generator=torch.Generator().manual_seed(0))[:wanted] if wanted else None
        self.train_images, self.validation_images = wanted or train, validation
        self.epoch, self.order = None, None
        if validation < 2:
            raise ValueError(f"--data {self.config.data}: {validation} images to validate on, too few: see --validation_split")

    def rows(self, split, index):
        """Which rows the samples `index` (B,) are."""
        if split == "validation":
            return index
        n = self.train_images
        if not n:
            raise ValueError(f"--data {self.config.data}: no image to train on, all are for validation")
        rows = torch.empty_like(index)
        for epoch in (index // n).unique().tolist():
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(mix(self.seed) ^ epoch)
                self.epoch, self.order = epoch, torch.randperm(n, generator=generator)
            here = index // n == epoch
            rows[here] = self.order[index[here] % n]
        return rows if self.kept is None else self.kept[rows]

    def picks(self, split, index, counts):
        """Which of its `counts` (B,) captions each sample has, and whether it is mirrored: (B,) int64, (B,) bool."""
        if split == "validation":
            return torch.zeros_like(index), torch.zeros_like(index, dtype=torch.bool)
        bits = random_bits(self.seed ^ 0x5EED, index, 2)
        return bits[:, 0] * counts >> 24, (bits[:, 1] >> 23 > 0) & self.config.flip


class Images(Ordered, Pixels):
    """Captioned images, resized once (datasets keeps the result on disk) and held in memory as 8-bit pixels.

    Validation: its own split, else one image in ten by a hash of its pixels; an image of the validation set is never trained on.
    Raises ValueError, in one line, for what can't be read.
    """

    def __init__(self, config, seed=0, device="cpu"):
        self.config, self.seed, self.device = config, seed, torch.device(device)
        self.text = text_encoder(config, device)
        self.encoders = {"text": self.text.about} if isinstance(self.text, PretrainedText) else {}
        self.shape = dict(channels=3, size=config.resolution, text_tokens=self.text.tokens, text_dim=self.text.dim)
        splits, roots = open_splits(config)
        self.remarks, total, chosen = [], 0, {"train": [], "validation": []}
        for split, source in splits.items():
            for row, (pixels, captions, digest, width, height, remark) in enumerate(every_row(source, config, roots, split)):
                total += 1
                if remark:
                    self.remarks.append((split, row, remark, pixels is not None))
                if pixels is not None:
                    here = "validation" if "validation" not in splits and held_out(digest) else split
                    chosen[here].append((pixels, captions, digest, (width, height)))
        if not any(chosen.values()):
            raise nothing_to_use(config.data, total, self.remarks)
        unseen = {digest for _, _, digest, _ in chosen["validation"]}
        chosen["train"] = [row for row in chosen["train"] if row[2] not in unseen]
        self.set_sizes(len(chosen["train"]), len(chosen["validation"]))
        stack = lambda rows: np.frombuffer(b"".join(row[0] for row in rows), np.uint8).reshape(-1, config.resolution, config.resolution, 3)
        self.pixels = {split: torch.from_numpy(stack(rows).copy()) for split, rows in chosen.items()}
        self.originals = {split: [row[3] for row in rows] for split, rows in chosen.items()}
        # All captions of a split in one list; those of a row are first[row] to first[row + 1] - 1.
        self.texts = {split: [text for row in rows for text in row[1]] for split, rows in chosen.items()}
        self.first = {split: torch.tensor([0, *(len(row[1]) for row in rows)]).cumsum(0) for split, rows in chosen.items()}
        identity = hashlib.sha256(repr([[(row[2], row[1]) for row in chosen[split]] for split in ("train", "validation")]).encode())
        self.encoders["images"] = {"sha256": identity.hexdigest()[:16]}
        if isinstance(self.text, PretrainedText):
            self.parts = {split: self.text.cached(texts) for split, texts in self.texts.items()}
        else:
            self.ids = {split: self.text.encode(texts) for split, texts in self.texts.items()}

    def choose(self, split, index):
        """-> rows (B,), the places of their captions in self.texts (B,), which are mirrored (B,)."""
        index, first = index.cpu(), self.first[split]
        rows = self.rows(split, index)
        caption, mirrored = self.picks(split, index, first[rows + 1] - first[rows])
        return rows, first[rows] + caption, mirrored

    def batch(self, split, index):
        """index (B,) int64 -> images (B, 3, R, R) uint8, text (B, S, F), text_mask (B, S), all on the device."""
        rows, captions, mirrored = self.choose(split, index)
        images = self.pixels[split][rows].permute(0, 3, 1, 2)
        if mirrored.any():
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        if isinstance(self.text, PretrainedText):
            text, text_mask = padded([self.parts[split][k] for k in captions.tolist()], self.text.tokens, self.text.dim)
            return images.to(self.device), text.to(self.device).float(), text_mask.to(self.device)
        return images.to(self.device), *self.text.features(self.ids[split][captions].to(self.device))

    def captions(self, split, index):
        return [self.texts[split][k] for k in self.choose(split, index)[1].tolist()]


def how_to_read(config, roots):
    """The arguments of read_rows, beside the table."""
    return dict(image_column=config.image_column, text_column=config.text_column, resolution=config.resolution, roots=roots)


def every_row(rows, config, roots, split):
    """The rows of a split, each as the values of read_rows. Those of a data set on disk are read once and then kept by `datasets`."""
    import datasets
    reading = how_to_read(config, roots)
    if config.stream:
        batches = (read_rows(table, **reading) for table in rows.iter(100))
    else:
        binary, whole, word = datasets.Value("binary"), datasets.Value("int64"), datasets.Value("string")
        kinds = dict(pixels=binary, captions=datasets.List(word), digest=binary, width=whole, height=whole, remark=word)
        by_path = config.data.endswith((".csv", ".json", ".jsonl"))   # of files that datasets does not watch
        rows = rows.map(read_rows, batched=True, batch_size=100, remove_columns=rows.column_names, features=datasets.Features(kinds),
                        fn_kwargs={**reading, "version": READING}, load_from_cache_file=not by_path, desc=f"{split} images at {config.resolution} pixels")
        batches = (table.to_pydict() for table in rows.iter(1000))
    for batch in batches:
        yield from zip(*batch.values())


def count_remarks(remarks, used):
    """How often each was made of rows that are (not) used; what is in brackets differs from row to row."""
    return Counter(remark.partition(" (")[0] for *_, remark, is_used in remarks if is_used == used).most_common()


def nothing_to_use(data, rows, remarks):
    reasons = count_remarks(remarks, False)
    return ValueError(f"--data {data}: " + (f"none of its {rows:,} rows can be used, mostly: {reasons[0][0]}" if reasons else "an empty set"))


def about_remarks(remarks):
    """What was skipped, and what was done to rows that were not, in a line."""
    said = [f"{sum(n for _, n in counts):,} {what} ({'; '.join(f'{n:,} x {remark}' for remark, n in counts[:6])})"
            for used, what in ((False, "rows skipped"), (True, "used with a remark")) if (counts := count_remarks(remarks, used))]
    return ", ".join(said) or "no row skipped"


def load_data(config, seed=0, device="cpu"):
    """The source that --data names, with the training order of `seed`."""
    kind = Scenes if config.data in ("scenes", "scenes-ood") else Latents if read_stats(config.data) else Images
    return kind(config, seed, device)


def input_shape(config):
    """Channels and size of x, slots and width of the text, without reading any data: what the model is built for."""
    stats = read_stats(config.data)
    channels, size = (stats["channels"], stats["size"]) if stats else (3, config.resolution)
    return dict(channels=channels, size=size, text_tokens=config.text_tokens, text_dim=text_dim(config))


# ---- text encoders -----------------------------------------------------------------------------------------------------------

def weights_digest(network):
    """Which weights these are: a SHA-256 over names and values, shortened. The same for a copy in another folder."""
    digest = hashlib.sha256()
    for name, weight in sorted(network.state_dict().items()):
        digest.update(name.encode() + weight.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def cannot_load(flag, spec, name, error, files):
    return ValueError(f"--{flag} {spec}: cannot load {name} ({one_line(error)}). Without network: hf download {name} {files} --local-dir DIR "
                      f"elsewhere, then --{flag} {spec.partition(':')[0] + ':' if flag == 'text' else ''}DIR")


class PretrainedText:
    """The text encoder of a CLIP or a T5, frozen: the last hidden states of a caption's tokens, its special ones included.

    An empty caption has no token at all and so is what the unconditional model sees. Raises ValueError where there are no such
    weights, or fewer positions than --text_tokens.
    """

    def __init__(self, config, device):
        import transformers  # here, since it takes seconds that others need not spend
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        kind, _, source = config.text.partition(":")
        source = source or TEXT_HUB_NAMES[kind]
        try:
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            self.network = getattr(transformers, {"clip": "CLIPTextModel", "t5": "T5EncoderModel"}[kind]).from_pretrained(
                source, use_safetensors=True, dtype=torch.float32).to(device).eval().requires_grad_(False)
        except Exception as error:  # transformers and the hub raise many kinds
            raise cannot_load("text", config.text, source, error, "config.json model.safetensors tokenizer.json tokenizer_config.json") from None
        self.tokens, self.dim = config.text_tokens, self.network.config.hidden_size
        most = getattr(self.network.config, "max_position_embeddings", None)
        if most and self.tokens > most:
            raise ValueError(f"--text_tokens {self.tokens}: {source} has only {most} positions")
        if config.text_dim not in (None, self.dim):
            raise ValueError(f"--text_dim {config.text_dim}: {source} gives {self.dim} features (leave the flag out)")
        words = getattr(self.tokenizer, "backend_tokenizer", None)   # other words for the same weights are another encoder
        both = weights_digest(self.network) + (words.to_str() if words else "")
        self.about = {"name": source, "sha256": hashlib.sha256(both.encode()).hexdigest()[:16], "tokens": self.tokens}

    def encode(self, captions):
        """Captions -> token ids plus one, (n, S) int64, 0 behind the last: captions are cut to S tokens, the last being the end."""
        ids = torch.zeros(len(captions), self.tokens, dtype=torch.long)
        if not captions:
            return ids
        for row, caption, tokens in zip(ids, captions, self.tokenizer(captions, truncation=True, max_length=self.tokens)["input_ids"]):
            if caption.strip():
                row[:len(tokens)] = torch.tensor(tokens) + 1
        return ids

    @torch.no_grad()
    def features(self, ids):
        """Ids (B, S) -> text (B, S, F), text_mask (B, S)."""
        mask = ids > 0
        text = self.network(input_ids=(ids - 1).clamp(min=0), attention_mask=mask.long()).last_hidden_state
        return torch.where(mask[..., None], text, 0.0), mask   # where nothing is attended to it may be no number

    def parts(self, captions, batch=64):
        """Captions -> a list of their features without padding, (length, F) float16 arrays. Each different one is encoded once."""
        different = list(dict.fromkeys(captions))
        place, found = {caption: k for k, caption in enumerate(different)}, []
        for start in tqdm(range(0, len(different), batch), desc="captions", disable=len(different) < 20 * batch):
            ids = self.encode(different[start:start + batch]).to(self.network.device)
            text, mask = self.features(ids)
            found += [row[:length].cpu().numpy() for row, length in zip(text.half(), mask.sum(1).tolist())]
        return [found[place[caption]] for caption in captions]

    def cached(self, captions):
        """The same, computed once for a list of captions and kept in $ISOFLOW_CACHE (~/.cache/isoflow), memory-mapped."""
        from safetensors.numpy import save_file
        from safetensors import safe_open
        different = sorted(set(captions))
        key = hashlib.sha256(json.dumps([self.about["sha256"], self.tokens, different]).encode()).hexdigest()[:32]
        folder = os.environ.get("ISOFLOW_CACHE") or os.path.expanduser("~/.cache/isoflow")
        path = os.path.join(folder, f"text-{key}.safetensors")
        if not os.path.exists(path):
            parts = self.parts(different)
            os.makedirs(folder, exist_ok=True)
            content = {"features": np.concatenate(parts or [np.zeros((0, self.dim), np.float16)]),
                       "ends": np.cumsum([len(part) for part in parts], dtype=np.int64)}
            write_whole(path, lambda temporary: save_file(content, temporary))
        with safe_open(path, "pt") as file:
            features, ends = file.get_tensor("features").numpy(), file.get_tensor("ends").tolist()
        spans = {caption: features[start:end] for caption, start, end in zip(different, [0, *ends], ends)}
        return [spans[caption] for caption in captions]


def text_encoder(config, device):
    """The encoder that --text names."""
    return HashText(config.text_tokens, config.text_dim) if config.text == "hash" else PretrainedText(config, device)


def text_dim(config):
    """F, from the encoder's config.json where it is not known. Raises ValueError where there is no such encoder."""
    if config.text_dim:
        return config.text_dim
    import transformers
    kind, _, source = config.text.partition(":")
    source = source or TEXT_HUB_NAMES[kind]
    try:
        return (transformers.CLIPTextConfig if kind == "clip" else transformers.T5Config).from_pretrained(source).hidden_size
    except Exception as error:
        raise cannot_load("text", config.text, source, error, "config.json model.safetensors tokenizer.json tokenizer_config.json") from None


def padded(parts, tokens, dim, pin=False):
    """Features (length, F) float16 of B captions -> text (B, S, F) float16, 0 where nothing is, text_mask (B, S)."""
    text = torch.empty(len(parts), tokens, dim, dtype=torch.float16, pin_memory=pin)
    lengths, rows = [len(part) for part in parts], text.numpy()
    for row, part, length in zip(rows, parts, lengths):
        row[:length] = part
        row[length:] = 0
    return text, torch.arange(tokens) < torch.tensor(lengths)[:, None]


# ---- latents: made once by `prepare`, then memory-mapped ---------------------------------------------------------------------

FORMAT = 1
NAMED = 300                         # skipped rows that stats.json names; all are counted
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def read_stats(folder):
    """stats.json of a folder that prepare wrote; None where it is no such folder. Raises ValueError for a torn or unfinished one."""
    path = os.path.join(folder, "stats.json")
    if folder in ("scenes", "scenes-ood"):   # the embedded worlds, whatever lies here
        return None
    if not os.path.exists(path):
        if os.path.exists(os.path.join(folder, "prepare.json")):
            raise ValueError(f"--data {folder}: prepare has not finished here: the same command goes on")
        return None
    try:
        with open(path) as file:
            stats = json.load(file)
        if stats["format"] != FORMAT:
            raise ValueError(f"{path}: format {stats['format']}, this version reads {FORMAT}: prepare it again")
        stats["input"], stats["encoders"]["vae"], stats["shards"], stats["channels"], stats["size"]
        return stats
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: torn, or not of isoflow's prepare: delete it and run prepare again, which keeps the shards") from None


class VAE:
    """A frozen AutoencoderKL of diffusers. Raises ValueError where there are no such weights."""

    def __init__(self, source, device):
        import diffusers  # here, since it takes seconds that others need not spend
        diffusers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks")   # diffusers' own call of the hub, no business of the user
        load = lambda **more: diffusers.AutoencoderKL.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32, **more)
        try:
            if os.path.isdir(source):
                self.network = load() if os.path.exists(os.path.join(source, "config.json")) else load(subfolder="vae")
            else:
                try:
                    self.network = load()
                except OSError:   # a whole pipeline has it in a folder
                    self.network = load(subfolder="vae")
        except Exception as error:  # diffusers and the hub raise many kinds
            raise cannot_load("vae", source, source, error, "config.json diffusion_pytorch_model.safetensors") from None
        self.network = self.network.to(device).eval().requires_grad_(False)
        self.channels = self.network.config.latent_channels
        self.factor = 2 ** (len(self.network.config.block_out_channels) - 1)
        self.about = {"name": os.path.abspath(source) if os.path.isdir(source) else source, "sha256": weights_digest(self.network)}

    @torch.no_grad()
    def moments(self, pixels):
        """Pixels (B, R, R, 3) uint8 -> (B, 2, 2, C, R/f, R/f): of each image and of its mirror image the mean and the log variance
        (clamped to [-30, 20], as diffusers does) of q(latent | image)."""
        x = pixels.to(self.network.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        found = [self.network.encode(mirror).latent_dist for mirror in (x, x.flip(3))]
        return torch.stack([torch.stack([one.mean, one.logvar], 1) for one in found], 1)

    @torch.no_grad()
    def decode(self, latents, batch=8):
        """Latents (B, C, R/f, R/f), as the VAE gives them -> (B, 3, R, R) uint8."""
        pixels = torch.cat([self.network.decode(part.to(self.network.device)).sample for part in latents.float().split(batch)])
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


class Shard:
    """A file of prepare, memory-mapped: what is read from disk is what is asked for.

    Columns: row (of the split of the data set), validation, digest (of the pixels), width, height (of the original), moments (both
    mirrors, mean and log variance), captions, text (an item a caption: features without padding, float16, or token ids, int32),
    image (PNG, only where validation). What was skipped and the sums for scale and shift are in the metadata.
    """

    def __init__(self, path):
        import pyarrow as pa
        try:
            with pa.memory_map(path) as file:
                reader = pa.ipc.open_file(file)
                self.about = json.loads(reader.schema.metadata[b"isoflow"])
                batch = reader.get_batch(0)
        except (pa.ArrowException, KeyError, TypeError, ValueError, OSError) as error:
            raise ValueError(f"{path}: torn, or not a shard of isoflow ({one_line(error)}): delete it and run prepare again") from None
        self.batch = batch
        self.validation, self.digest, self.captions = (batch.column(name) for name in ("validation", "digest", "captions"))
        bytes_of = lambda array, k: np.frombuffer(array.buffers()[k] or b"", np.uint8)
        self.moments = bytes_of(batch.column("moments"), 1).reshape(len(batch), 2, batch.schema.field("moments").type.byte_width // 2)
        text = batch.column("text")
        self.first = np.asarray(text.offsets)                                            # captions of a row: from, to
        self.text_ends = np.frombuffer(text.values.buffers()[1] or bytes(8), np.int64)
        self.text = bytes_of(text.values, 2)

    def __len__(self):
        return len(self.batch)

    def text_of(self, row, caption):
        k = self.first[row] + caption
        return self.text[self.text_ends[k]:self.text_ends[k + 1]]


class Latents(Ordered, Source):
    """Prepared latents and text features. x = (mean + std n - shift) / scale: a fresh n for each use in training, mean 0 and
    standard deviation 1 in each channel. An image of the validation set is never trained on, copies included."""

    prefetch, latents = True, True

    def __init__(self, config, seed=0, device="cpu"):
        self.config, self.seed, self.device, self.stats = config, seed, torch.device(device), read_stats(config.data)
        self.shape = input_shape(config)
        self.shards = [Shard(os.path.join(config.data, name)) for name in self.stats["shards"]]
        place = np.concatenate([np.stack([np.full(len(shard), k), np.arange(len(shard))], 1) for k, shard in enumerate(self.shards)])
        validation = np.concatenate([np.asarray(shard.validation.to_pylist(), bool) for shard in self.shards])
        digest = np.concatenate([np.frombuffer(shard.digest.buffers()[1] or b"", np.int64, len(shard)) for shard in self.shards])
        copies = ~validation & np.isin(digest, digest[validation])
        self.identity = hashlib.sha256(digest.tobytes() + validation.tobytes()).hexdigest()[:16]   # which images these are
        self.place = {"train": place[~validation & ~copies], "validation": place[validation]}   # (n, 2): shard, row in it
        self.set_sizes(*map(len, self.place.values()))
        self.remarks = [tuple(remark) for remark in self.stats["remarks"]["rows"]]
        self.normalise(self.stats["shift"], self.stats["scale"])
        self.text, self.vae = None, None
        if self.stats["text_store"] == "ids":
            self.text = PretrainedText(config, device)
            self.check("text", self.text)

    @property
    def encoders(self):
        """Which networks made this, and the normalisation: what a run depends on, beside its flags."""
        values = {"shift": self.shift.flatten().tolist(), "scale": self.scale.flatten().tolist()}
        return {"images": {"sha256": self.identity}} | {name: {**about, **(values if name == "vae" else {})} for name, about in self.stats["encoders"].items()}

    def normalise(self, shift, scale):
        self.shift, self.scale = (torch.tensor(values, dtype=torch.float64, device=self.device)[:, None, None] for values in (shift, scale))

    def check(self, what, encoder):
        made = self.stats["encoders"][what]
        if encoder.about["sha256"] != made["sha256"]:
            raise ValueError(f"--data {self.config.data} was made with other weights of {made['name']} (SHA-256 {made['sha256']}) "
                             f"than are there now ({encoder.about['sha256']})")

    def choose(self, split, index):
        """-> for each sample its shard, the row in it, which of its captions it has, which mirror: lists."""
        index = index.cpu()
        place = self.place[split][self.rows(split, index).numpy()]
        counts = [self.shards[shard].first[row + 1] - self.shards[shard].first[row] for shard, row in place]
        caption, mirrored = self.picks(split, index, torch.tensor(counts, dtype=torch.long))
        return list(zip((self.shards[shard] for shard, _ in place), place[:, 1].tolist(), caption.tolist(), mirrored.long().tolist()))

    def batch(self, split, index):
        """index (B,) int64 -> moments (B, 2, C, size, size) float32, text (B, S, F), text_mask (B, S), all on the device."""
        pin = self.device.type == "cuda"
        chosen, shape, dtype = self.choose(split, index), self.shape, DTYPES[self.stats["store"]]
        moments = torch.empty(len(chosen), 2, shape["channels"], shape["size"], shape["size"], dtype=dtype, pin_memory=pin)
        rows = moments.view(torch.int16).numpy().view(np.uint8).reshape(len(chosen), -1)
        for out, (shard, row, _, mirror) in zip(rows, chosen):
            out[:] = shard.moments[row, mirror]
        texts = [shard.text_of(row, caption) for shard, row, caption, _ in chosen]
        put = lambda tensor: tensor.to(self.device, non_blocking=pin)
        if self.text:
            ids = torch.zeros(len(chosen), shape["text_tokens"], dtype=torch.long)
            for out, text in zip(ids, texts):
                out[:len(text) // 4] = torch.from_numpy(text.view(np.int32).astype(np.int64))
            text, text_mask = self.text.features(put(ids))
        else:
            text, text_mask = padded([text.view(np.float16).reshape(-1, shape["text_dim"]) for text in texts],
                                     shape["text_tokens"], shape["text_dim"], pin)
        return put(moments).float(), put(text).float(), put(text_mask)

    def captions(self, split, index):
        return [shard.captions[row].as_py()[caption] for shard, row, caption, _ in self.choose(split, index)]

    def to_x(self, moments, generator):
        mean, logvar = moments.unbind(1)
        n = torch.randn(mean.shape, generator=generator, device=generator.device).to(mean.device)
        return ((mean + torch.exp(0.5 * logvar) * n - self.shift) / self.scale).float()

    def to_levels(self, x):
        """x -> (B, 3, R, R) uint8, by the VAE that made the latents. Raises ValueError where it is not there."""
        if self.vae is None:
            vae = VAE(self.stats["encoders"]["vae"]["name"], self.device)
            self.check("vae", vae)
            self.vae = vae
        return self.vae.decode(x * self.scale + self.shift)

    def images(self, split, index):
        """Of the validation set the images themselves, as they went into the VAE; of training what the VAE makes of their latents."""
        if split == "train":
            moments, *_ = self.batch(split, index)
            return self.to_levels((moments[:, 0] - self.shift) / self.scale)
        pictures = [Image.open(io.BytesIO(shard.batch.column("image")[row].as_py())) for shard, row, *_ in self.choose(split, index)]
        return torch.stack([torch.from_numpy(np.array(picture)) for picture in pictures]).permute(0, 3, 1, 2).to(self.device)


@dataclass(frozen=True)
class PrepareConfig:
    command: Literal["prepare"] = field(default="prepare", metadata={"help": "encode a data set once: latents and text features"})
    out: str = field(default="prepared", metadata={"help": "the folder to write"})
    vae: str = field(default="stabilityai/sd-vae-ft-mse", metadata={"help": "AutoencoderKL of diffusers, a hub name or a folder"})
    store: Literal["float16", "bfloat16"] = field(default="float16", metadata={"help": "numbers of the latents on disk"})
    text_store: Literal["features", "ids"] = field(default="features", metadata={
        "help": "ids: only token ids, from which training makes the features anew (of clip and t5; for large sets)"})
    shard_rows: int = field(default=2048, metadata={"help": "rows of the data set a file; as much is redone after a kill"})
    batch: int = field(default=16, metadata={"help": "images at once in the encoders"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to encode"})

    def __post_init__(self):
        for name in ("batch", "shard_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.shard_rows % self.batch:
            raise ValueError(f"--shard_rows {self.shard_rows} is not divisible by --batch {self.batch}")


def prepare(config, settings):
    """Encode a data set into settings.out; a finished folder is left as it is.

    Shard i holds the rows [i, i + 1) * shard_rows of a split, encoded in fixed batches, so its bytes are a function of the rows and
    the flags alone: whoever makes it, after whatever interruption. Rank r of torchrun makes the shards r, r + world, ...
    Raises ValueError for input that can't be used.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    place = lambda name: os.path.join(settings.out, name)
    if config.data in ("scenes", "scenes-ood") or os.path.exists(os.path.join(config.data, "prepare.json")):
        raise ValueError(f"--data {config.data}: prepare is for real images that are not prepared yet")
    if settings.text_store == "ids" and config.text == "hash":
        raise ValueError("--text_store ids is for clip and t5: the words of hash have no ids that last")
    flags = {name: value for name, value in {**asdict(config), **asdict(settings)}.items()
             if name not in ("command", "out", "device", "flip", "captions")}
    definition = {"format": FORMAT, "flags": flags}
    check_definition(settings.out, definition, ("format", "flags"))
    if os.path.exists(place("stats.json")):
        return None if rank else print(f"{settings.out} is done: {read_stats(settings.out)['counts']} images")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if settings.device != "cpu" and torch.cuda.is_available() else torch.device("cpu")
    if settings.device == "cuda" and device.type == "cpu":
        raise ValueError("--device cuda: torch finds no GPU here")
    splits, roots = open_splits(config)
    vae, text = VAE(settings.vae, device), text_encoder(config, device)
    if config.resolution % vae.factor or config.resolution < 4 * vae.factor:
        raise ValueError(f"--resolution {config.resolution}: this VAE makes one latent of {vae.factor} x {vae.factor} pixels; take a multiple of "
                         f"{vae.factor}, at least {4 * vae.factor}")
    definition["encoders"] = {"vae": vae.about, **({"text": text.about} if config.text != "hash" else {})}
    # Which rows: datasets' own name for them changes with the files. A stream has none.
    definition["rows"] = {split: None if config.stream else f"{len(rows)}, {rows._fingerprint}" for split, rows in splits.items()}
    check_definition(settings.out, definition, definition)
    if glob.glob(os.path.join(glob.escape(settings.out), "*.arrow")) and not os.path.exists(place("prepare.json")):
        raise ValueError(f"--out {settings.out}: has shards but no prepare.json, so nobody knows what made them: take another --out")
    os.makedirs(settings.out, exist_ok=True)
    if not os.path.exists(place("prepare.json")):
        write_json(place("prepare.json"), definition)

    names, began = [], time.monotonic()
    name_of = lambda split, shard: f"{split}-{shard:05d}.arrow"
    wanted = lambda split, shard: shard % world == rank and not os.path.exists(place(name_of(split, shard)))
    total = None if config.stream else sum(
        min(settings.shard_rows, len(rows) - first) for split, rows in splits.items() for first in range(0, len(rows), settings.shard_rows)
        if wanted(split, first // settings.shard_rows))
    with (tqdm(total=total, desc=f"{settings.out}", unit="img", disable=rank > 0, mininterval=1 if sys.stderr.isatty() else 30) as bar,
          ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1)) as readers, ThreadPoolExecutor(1) as writer):
        written = []
        for split, rows in splits.items():
            own = "validation" in splits   # else a tenth is held out by its hash
            seen = []   # the shards of this split, whoever makes them
            jobs = ((shard, readers.submit(read_batch, table, start, config, roots, split, own)) for shard, start, table in
                    tables(rows, config.stream, settings.batch, settings.shard_rows, lambda shard: wanted(split, shard), seen))
            for shard, group in itertools.groupby(ahead(jobs, 2 * (os.cpu_count() or 1)), key=lambda job: job[0]):
                parts = []
                for _, job in group:
                    found = job.result()
                    parts.append(encode_batch(found, vae, text, settings))
                    bar.update(found["rows"])
                while len(written) > 1:   # the disk may lag by one shard, not by all
                    written.pop(0).result()
                written.append(writer.submit(write_shard, place(name_of(split, shard)), parts, settings, vae, split))
            names += [name_of(split, shard) for shard in range(max(seen, default=-1) + 1)]
        for job in written:
            job.result()
    if rank:
        return
    while not all(os.path.exists(place(name)) for name in names):   # the other ranks are at work
        time.sleep(0.2)
    finish(config, settings, definition, vae, names, time.monotonic() - began)


def check_definition(out, definition, parts):
    """Refuse a folder that was begun with other flags, data or encoders."""
    path = os.path.join(out, "prepare.json")
    if not os.path.exists(path):
        return
    try:
        with open(path) as file:
            saved = json.load(file)
        differs = differences({part: saved[part] for part in parts}, {part: definition[part] for part in parts})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path}: torn, or not of isoflow's prepare: move it away or take another --out") from None
    if differs:
        raise ValueError(f"--out {out} belongs to another configuration ({'; '.join(differs)}): take another --out")


def tables(rows, stream, batch, shard_rows, wanted, seen):
    """The rows of the shards that are wanted, as (shard, first row, Arrow table of up to `batch` rows); all shards go into `seen`."""
    if stream:   # has no length and no places: everything is read, and most of it passed over
        for k, table in enumerate(rows.iter(batch)):
            seen.append(k * batch // shard_rows)
            if wanted(seen[-1]):
                yield seen[-1], k * batch, table
        return
    for first in range(0, len(rows), shard_rows):
        seen.append(first // shard_rows)
        if wanted(seen[-1]):
            for start in range(first, min(first + shard_rows, len(rows)), batch):
                yield seen[-1], start, rows[start:min(start + batch, first + shard_rows)]


def ahead(jobs, depth):
    """The jobs of an iterable, which begin when they are taken from it, in order, with up to `depth` of them begun."""
    waiting = deque()
    for job in jobs:
        waiting.append(job)
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


def read_batch(table, start, config, roots, split, own):
    """What a reader's thread does of a batch: decode, crop, resize, hash; PNG files of what is for validation."""
    found = read_rows(table, **how_to_read(config, roots))
    good = [k for k, pixels in enumerate(found["pixels"]) if pixels is not None]
    remarks = [(split, start + k, remark, found["pixels"][k] is not None) for k, remark in enumerate(found["remark"]) if remark]
    rows = {name: [values[k] for k in good] for name, values in found.items()}
    rows |= {"row": [start + k for k in good], "validation": [split == "validation" if own else held_out(digest) for digest in rows["digest"]]}
    R = config.resolution
    rows["pixels"] = np.stack([np.frombuffer(pixels, np.uint8).reshape(R, R, 3) for pixels in rows["pixels"]]) if good else None
    rows["image"] = [None] * len(good)
    for k, validation in enumerate(rows["validation"]):
        if validation:
            file = io.BytesIO()
            Image.fromarray(rows["pixels"][k]).save(file, "PNG", compress_level=1)
            rows["image"][k] = file.getvalue()
    return {"rows": len(table), "good": rows, "remarks": remarks}


def encode_batch(found, vae, text, settings):
    """What the encoders make of a batch: bytes of moments and of each caption's text, in place of the pixels."""
    rows = found["good"]
    if rows["pixels"] is None:
        return {**found, "good": {**rows, "moments": [], "text": []}}
    moments = vae.moments(torch.from_numpy(rows["pixels"])).to(DTYPES[settings.store]).cpu().contiguous().view(torch.int16).numpy()
    captions = [caption for row in rows["captions"] for caption in row]
    if settings.text_store == "ids":
        parts = [row[row > 0].numpy().astype(np.int32) for row in text.encode(captions)]
    elif isinstance(text, HashText):
        features, mask = text.features(text.encode(captions))
        parts = [row[:length].numpy() for row, length in zip(features.half(), mask.sum(1).tolist())]
    else:
        parts = text.parts(captions)   # nothing is kept from one batch to the next: the last bits would depend on what came before
    parts = iter(parts)
    return {**found, "good": {**rows, "pixels": None, "moments": [row.tobytes() for row in moments],
                              "text": [[next(parts).tobytes() for _ in row] for row in rows["captions"]]}}


def write_shard(path, parts, settings, vae, split):
    """One Arrow IPC file, whole or not at all, its bytes a function of `parts`."""
    import pyarrow as pa
    columns = {name: [value for part in parts for value in part["good"][name]]
               for name in ("row", "validation", "digest", "width", "height", "moments", "captions", "text", "image")}
    length = len(columns["moments"][0]) if columns["moments"] else 1
    types = {"row": pa.int64(), "validation": pa.bool_(), "digest": pa.binary(8), "width": pa.int32(), "height": pa.int32(),
             "moments": pa.binary(length), "captions": pa.list_(pa.string()), "text": pa.list_(pa.large_binary()), "image": pa.large_binary()}
    sums = {}   # over the images as they are, not their mirror images
    for name, chosen in (("train", False), ("validation", True)):
        content = b"".join(row[:length // 2] for row, validation in zip(columns["moments"], columns["validation"]) if validation == chosen)
        if content:
            moments = torch.frombuffer(bytearray(content), dtype=DTYPES[settings.store]).double().numpy()
            mean, logvar = np.moveaxis(moments.reshape(-1, 2, vae.channels, length // 8 // vae.channels), 1, 0)   # (n, C, places)
            sums[name] = {"images": len(mean), "mean": mean.mean(-1).sum(0).tolist(),
                          "square": (mean ** 2 + np.exp(logvar)).mean(-1).sum(0).tolist()}
    about = {"rows": sum(part["rows"] for part in parts), "sums": sums, "remarks": [remark for part in parts for remark in part["remarks"]]}
    schema = pa.schema(list(types.items()), metadata={"isoflow": json.dumps(about)})
    batch = pa.record_batch([pa.array(columns[name], kind) for name, kind in types.items()], schema=schema)

    def write(temporary):
        with pa.ipc.new_file(temporary, schema) as file:
            file.write_batch(batch)
    write_whole(path, write)


def finish(config, settings, definition, vae, names, seconds):
    """stats.json, from what the shards say of themselves."""
    abouts = {name: Shard(os.path.join(settings.out, name)).about for name in names}
    remarks = [remark for about in abouts.values() for remark in about["remarks"]]
    rows = sum(about["rows"] for about in abouts.values())
    sums = {split: [about["sums"][split] for about in abouts.values() if split in about["sums"]] for split in ("train", "validation")}
    if not any(sums.values()):
        raise nothing_to_use(config.data, rows, remarks)
    counts = {split: sum(part["images"] for part in parts) for split, parts in sums.items()}
    which = "train" if sums["train"] else "validation"
    mean, square = (np.sum([part[name] for part in sums[which]], 0) / counts[which] for name in ("mean", "square"))
    skipped = [remark for remark in remarks if not remark[3]]
    write_json(os.path.join(settings.out, "stats.json"), {
        "format": FORMAT, "input": {"resolution": config.resolution, "text": config.text, "text_tokens": config.text_tokens,
                                    "text_dim": text_dim(config)},
        "channels": vae.channels, "size": config.resolution // vae.factor, "store": settings.store, "text_store": settings.text_store,
        "shift": mean.tolist(), "scale": np.sqrt(square - mean ** 2).tolist(), "measured_on": f"the {which} images, not mirrored",
        "encoders": definition["encoders"], "rows": rows, "counts": counts, "skipped": len(skipped),
        "remarks": {"skipped": dict(count_remarks(remarks, False)), "used": dict(count_remarks(remarks, True)),   # rows: split, row, what, used?
                    "rows": (skipped + [remark for remark in remarks if remark[3]])[:NAMED]},
        "shards": names, "flags": definition["flags"]})
    for name in os.listdir(settings.out):
        if ".arrow.tmp" in name:   # of a process that was killed
            os.remove(os.path.join(settings.out, name))
    print(f"{settings.out}: {counts['train']:,} training and {counts['validation']:,} validation images, "
          + about_remarks(remarks) + f"; {rows:,} rows in {seconds:.0f} s (a resumed run: what was left)")


# ---- pictures ----------------------------------------------------------------------------------------------------------

def save_grid(path, groups, captions, title, columns=4, side=112):
    """Write a PNG of captioned images: in each cell the images of all `groups` side by side, the caption below.

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
            page.paste(image.resize((side, side), Image.Resampling.NEAREST), (left + g * (side + 4), upper))
        shown = text[:lines] if len(text) <= lines else [*text[:lines - 1], text[lines - 1] + " …"]
        pen.multiline_text((left, upper + side + 4), "\n".join(shown), "black", font)
    write_whole(path, lambda temporary: page.save(temporary, "PNG"))


@dataclass(frozen=True)
class LookConfig:
    command: Literal["look"] = field(default="look", metadata={"help": "what to do: look writes a contact sheet, prepare makes latents"})
    out: str = field(default="look.png", metadata={"help": "the picture to write"})


def look(config, settings):
    """A contact sheet of the first training images (of an evaluation set: of the validation images), with captions and statistics."""
    data = load_data(config)
    split = "train" if data.train_images is None or data.train_images else "validation"
    index = torch.arange(min(24, (data.train_images if split == "train" else data.validation_images) or 24))
    raw, _, text_mask = data.batch(split, index)
    note = ""
    try:
        images = data.images(split, index)
    except ValueError as problem:   # the VAE is not here
        split, note = "validation", f" The pictures are of the validation set: {problem}."
        index = index[:data.validation_images]
        images = data.images(split, index)
    x = data.to_x(raw, torch.Generator().manual_seed(0)).double()
    size = data.shape["size"]
    words = text_mask.sum(1).double()
    title = (f"{config.data}, {config.resolution} pixels" + (f", latents {size} x {size} x {data.shape['channels']}" if data.latents else "")
             + f"; training images: {'endless' if data.train_images is None else f'{data.train_images:,}'}"
             + (f", validation {data.validation_images:,}" if data.validation_images else "")
             + f"; of these {len(index)}: x has mean {x.mean():.3f}, standard deviation {x.std():.3f}, captions {words.mean():.1f} of "
             f"{config.text_tokens} slots, {(words == config.text_tokens).double().mean():.0%} fill them all")
    if isinstance(data, Images):
        sides = np.array(data.originals["train"] + data.originals["validation"])
        (least, most), middle = (np.sort(sides.min(1))[[0, -1]], np.median(sides, 0).astype(int))
        title += f"; originals: shorter side {least} to {most}, median {middle[0]} x {middle[1]}"
    title += f"; {about_remarks(data.remarks)}." * (data.train_images is not None) + note
    save_grid(settings.out, [images], data.captions(split, index), title, columns=6)
    print(f"{title}\nwritten: {settings.out}")


def main():
    preparing = sys.argv[1:2] == ["prepare"]
    config, settings = parse_flags((DataConfig, PrepareConfig if preparing else LookConfig), __doc__, positional="command",
                                   presets={"prepare": {"resolution": 256}} if preparing else {})
    try:
        (prepare if preparing else look)(config, settings)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"data.py: {one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
