"""Where do images, captions and their features come from?

Two sources, with the same three methods (`batch`, `captions`, `shape`):

    scenes, scenes-ood   an endless world of captioned shapes, drawn on the device; nothing to download
    PATH                 a parquet file or a folder that `datasets.load_dataset` reads, with columns image and text

Images are 8-bit everywhere; the trainer turns level k into x = (k + u) / 128 - 1, u uniform in [0, 1), fresh at each
draw. Captions become features by the `hash` encoder: every word is a frozen pseudo-random vector.

    python data.py look --data PATH --out look.png        a contact sheet, to check before a budget is spent
"""
import hashlib
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field
from typing import Literal, Optional

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps


@dataclass(frozen=True)
class DataConfig:
    data: str = field(default="scenes", metadata={
        "help": "scenes, scenes-ood, or a parquet file or a folder with columns image and text"})
    resolution: int = field(default=16, metadata={"help": "side of the square images, in pixels"})
    captions: Literal["dense", "sparse"] = field(default="dense", metadata={
        "help": "of scenes: dense names every shape, sparse only the largest"})
    images: Optional[int] = field(default=None, metadata={
        "help": "train on only so many images, again and again (default: all there are; scenes are endless)"})
    text_tokens: int = field(default=16, metadata={"help": "caption slots S; longer captions are cut, shorter masked"})
    text_dim: int = field(default=64, metadata={"help": "features F of a word in the hash encoder"})

    def __post_init__(self):
        for name in ("resolution", "images", "text_tokens", "text_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")


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


class Scenes:
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


# ---- real images -------------------------------------------------------------------------------------------------------

def to_pixels(image, resolution):
    """Any PIL image -> (R, R, 3) uint8: upright (EXIF), on white where transparent, RGB, centre crop, area-averaging resize."""
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    side = min(image.size)
    left, upper = (image.width - side) // 2, (image.height - side) // 2
    square = image.convert("RGB").crop((left, upper, left + side, upper + side))
    return np.asarray(square.resize((resolution, resolution), Image.Resampling.BICUBIC))  # pillow's averages over the area


class Images:
    """Captioned images of a parquet file or a folder, resized once and held in memory as 8-bit pixels.

    Order: in every epoch a new permutation, a pure function of (seed, epoch). Validation: the split of that name (or
    "val", "test"), else one image in ten is held out by a hash of its pixels and caption, so that
    copies of an image are on the same side and no seed ever moves it. Raises ValueError, in one line, for what can't be read.
    """

    def __init__(self, config, seed=0, device="cpu"):
        from datasets import load_dataset, logging  # here, since it takes a second that scenes need not spend
        logging.set_verbosity(logging.CRITICAL)     # what can't be read is said below, in one line
        self.config, self.seed, self.device = config, seed, torch.device(device)
        path = config.data
        if not os.path.exists(path):
            raise ValueError(f"--data {path}: no such file or folder (or say scenes, scenes-ood)")
        try:
            splits = load_dataset(path) if os.path.isdir(path) else load_dataset("parquet", data_files={"train": path})
        except Exception as error:  # each reader raises its own kinds
            raise ValueError(f"--data {path}: datasets can't read it ({(str(error).splitlines() or [type(error).__name__])[0]})") from None
        self.text = HashText(config.text_tokens, config.text_dim)
        self.pixels, self.texts, self.ids = {}, {}, {}
        held_out = next((name for name in ("validation", "val", "test") if name in splits), None)
        if "train" not in splits:
            raise ValueError(f"--data {path}: no split train (there is {', '.join(splits)})")
        for split, source in {"train": "train", **({"validation": held_out} if held_out else {})}.items():
            columns = splits[source].column_names
            if not {"image", "text"} <= set(columns):
                raise ValueError(f"--data {path}: needs columns image and text (there are {', '.join(columns)})")
            try:
                table = splits[source].map(
                    read_row, fn_kwargs={"resolution": config.resolution}, remove_columns=columns,
                    desc=f"{split} images at {config.resolution} pixels")  # cached on disk by datasets
            except (AttributeError, OSError, SyntaxError) as error:  # no picture, or one that pillow can't read
                raise ValueError(f"--data {path}: an image of {source} can't be read ({(str(error).splitlines() or ['?'])[0]})") from None
            pixels = np.frombuffer(b"".join(table["pixels"]), np.uint8)
            self.pixels[split] = torch.from_numpy(pixels.reshape(len(table), config.resolution, config.resolution, 3).copy())
            self.texts[split] = list(table["caption"])
        if not held_out:
            digests = [hashlib.blake2b(self.pixels["train"][k].numpy().tobytes() + self.texts["train"][k].encode(), digest_size=4)
                       for k in range(len(self.texts["train"]))]
            out = torch.tensor([int.from_bytes(digest.digest(), "big") % 10 == 0 for digest in digests])
            for split, chosen in (("validation", out), ("train", ~out)):
                self.pixels[split] = self.pixels["train"][chosen]
                self.texts[split] = [text for text, c in zip(self.texts["train"], chosen.tolist()) if c]
        for split in ("train", "validation"):
            if not self.texts[split]:
                raise ValueError(f"--data {path}: no image to use for {split}")
            self.ids[split] = self.text.encode(self.texts[split])
        if config.images:  # the same ones for every seed, and the fewer among the more
            if config.images > len(self.texts["train"]):
                raise ValueError(f"--images {config.images}: {path} has only {len(self.texts['train'])} to train on")
            kept = torch.randperm(len(self.texts["train"]), generator=torch.Generator().manual_seed(0))[:config.images]
            self.pixels["train"], self.ids["train"] = self.pixels["train"][kept], self.ids["train"][kept]
            self.texts["train"] = [self.texts["train"][row] for row in kept.tolist()]
        self.train_images, self.validation_images = len(self.texts["train"]), len(self.texts["validation"])
        self.epoch, self.order = None, None

    @property
    def shape(self):
        return dict(channels=3, size=self.config.resolution,
                    text_tokens=self.config.text_tokens, text_dim=self.config.text_dim)

    def rows(self, split, index):
        """Which rows the samples `index` (B,) are: in training sample i is row i % n of the permutation of epoch i // n."""
        n = len(self.texts[split])
        if split == "validation":
            return index
        rows = torch.empty_like(index)
        for epoch in (index // n).unique().tolist():
            if epoch != self.epoch:
                generator = torch.Generator().manual_seed(mix(self.seed) ^ epoch)
                self.epoch, self.order = epoch, torch.randperm(n, generator=generator)
            here = index // n == epoch
            rows[here] = self.order[index[here] % n]
        return rows

    def batch(self, split, index):
        """index (B,) int64 -> images (B, 3, R, R) uint8, text (B, S, F), text_mask (B, S), all on the device."""
        rows = self.rows(split, index.cpu())
        images = self.pixels[split][rows].permute(0, 3, 1, 2)
        return images.to(self.device), *self.text.features(self.ids[split][rows].to(self.device))

    def captions(self, split, index):
        return [self.texts[split][row] for row in self.rows(split, index.cpu()).tolist()]


def read_row(row, resolution):
    return {"pixels": to_pixels(row["image"], resolution).tobytes(), "caption": str(row["text"])}


def load_data(config, seed=0, device="cpu"):
    """The source that --data names, with the training order of `seed`."""
    return (Scenes if config.data in ("scenes", "scenes-ood") else Images)(config, seed, device)


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
    try:
        page.save(f"{path}.tmp", "PNG")
        os.replace(f"{path}.tmp", path)
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


@dataclass(frozen=True)
class LookConfig:
    command: Literal["look"] = field(default="look", metadata={"help": "what to do: look writes a contact sheet"})
    out: str = field(default="look.png", metadata={"help": "the picture to write"})


def main():
    from model import parse_flags  # the only thing of ours that this file uses, and only as a script
    config, look = parse_flags((DataConfig, LookConfig), __doc__, positional="command")
    try:
        data = load_data(config)
        index = torch.arange(min(24, data.train_images or 24))
        images, _, text_mask = data.batch("train", index)
        x = images.double() / 127.5 - 1
        title = (f"{config.data}, {config.resolution} pixels, training images: {data.train_images or 'endless'}; "
                 f"of these {len(index)}: mean {x.mean():.3f}, standard deviation {x.std():.3f}, "
                 f"{text_mask.sum(1).double().mean():.1f} words a caption")
        save_grid(look.out, [images], data.captions("train", index), title, columns=6)
    except (ValueError, OSError) as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    print(f"{title}\nwritten: {look.out}")


if __name__ == "__main__":
    main()
