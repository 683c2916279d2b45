"""How good is a trained model, on any data set?

    python evaluate.py results/my-quick --metrics loss vlb nll fd --data scenes scenes-ood     a sweep
    python evaluate.py results/train/depth02_width032_seed0                          one run: its points and its checkpoint
    python evaluate.py .../budget_1e+12/ema.safetensors --metrics fd --guidance 2    one point
    torchrun --nproc_per_node=2 -- evaluate.py ...                                   the same numbers, the images shared out

    loss   validation loss on the fixed images, times and noises of the trainer (of raw weights too, where a checkpoint has them)
    vlb    the variational bound, and nll, the exact likelihood of the sampler's ODE: bits per dimension of 8-bit pixels
    fd     the Frechet distance between samples and real images with the same captions, KID, and on scenes caption accuracy

Numbers go next to the weights, to metrics_DATASET.json, each with the protocol that it was measured by, and the best model's
samples beside held-out images to samples_DATASET.png. Only what is missing is computed; the same command resumes.
The network of `--features scenes` is in results/reader; `--train_reader FILE` is the command that made it.
"""
import glob
import hashlib
import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import List, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import flow
import train
from data import (COLOURS, GROUNDS, KINDS, MAX_SHAPES, PLACES, SIZES, DataConfig, Scenes, data_config_of, load_data,
                  parse_flags, save_grid, seeded)
from model import DiT, ModelConfig

IMAGES = {"vlb": 500, "nll": 250, "fd": 2000}   # of a quick grid; the paper's protocol is --n 10000
PARTIAL_SECONDS = 60                            # how much work a kill -9 may cost
READER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "reader", "reader.safetensors")
READER_SHA256 = "6717a203182b4d94"
HUB_NAMES = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-large"}


@dataclass(frozen=True)
class EvaluateConfig:
    path: str = field(default="results/my-quick", metadata={
        "help": "a results directory, a run, a point, an ema.safetensors or a checkpoint.pt"})
    metrics: List[str] = field(default_factory=lambda: ["loss"], metadata={"help": "of loss, vlb, nll and fd"})
    data: Optional[List[str]] = field(default=None, metadata={"help": "data sets (default: the one of the training)"})
    n: Optional[int] = field(default=None, metadata={
        "help": "images (default: loss as many as the training's own records, vlb 500, nll 250, fd 2000; the paper: 10000)"})
    points: Literal["window", "all"] = field(default="window", metadata={
        "help": "of a results directory: those that the parabolas of fit.py use, or all"})
    steps: int = field(default=16, metadata={"help": "sampling steps"})
    solver: Literal["heun", "euler"] = field(default="heun", metadata={"help": "of the samples"})
    guidance: float = field(default=1.0, metadata={"help": "of the samples of fd; loss, vlb and nll have none"})
    features: str = field(default="scenes", metadata={
        "help": "of fd: scenes, clip, dinov2, or clip:FOLDER, dinov2:NAME for other weights of that kind"})
    allow_singular: bool = field(default=False, metadata={"help": "fd from fewer images than features, marked in the record"})
    save_images: Optional[str] = field(default=None, metadata={"help": "folder for the samples and the real images of fd as PNG files"})
    likelihood_steps: int = field(default=32, metadata={"help": "Heun steps of nll"})
    vlb_times: int = field(default=64, metadata={"help": "times an image of vlb"})
    samples: int = field(default=16, metadata={"help": "samples in the picture; 0 for no picture"})
    picture_guidance: List[float] = field(default_factory=lambda: [1.0, 3.0], metadata={"help": "of the picture, side by side"})
    seed: int = field(default=0, metadata={"help": "of noises, times and probes (of the loss: the trainer's own)"})
    batch: int = field(default=64, metadata={"help": "images at once"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to evaluate"})
    train_reader: Optional[str] = field(default=None, metadata={
        "help": "train the network of --features scenes anew, write it to this file and stop"})

    def __post_init__(self):
        if not self.metrics or not set(self.metrics) <= {"loss", *IMAGES} or len(set(self.metrics)) < len(self.metrics):
            raise ValueError(f"--metrics {' '.join(self.metrics)}: take some of loss, {', '.join(IMAGES)}, each once")
        if self.data and len(set(map(name_of, self.data))) < len(self.data):
            raise ValueError(f"--data {' '.join(self.data)}: two of the same name, which is that of their files")
        if self.guidance != 1 and set(self.metrics) != {"fd"}:
            raise ValueError(f"--guidance {self.guidance:g} with --metrics {' '.join(self.metrics)}: a guided model has no density, "
                             f"so loss, vlb and nll are at guidance 1; take --metrics fd alone")
        if self.features.split(":")[0] not in ("clip", "dinov2") and self.features != "scenes":
            raise ValueError(f"--features {self.features}: take scenes, clip, dinov2, clip:NAME_OR_FOLDER or dinov2:NAME_OR_FOLDER")
        if self.n is not None and self.n < 2:
            raise ValueError(f"--n {self.n}: a standard error needs at least 2 images")
        if self.samples < 0 or (self.n and self.samples > self.n):
            raise ValueError(f"--samples {self.samples}: must be from 0 to --n")
        for name in ("steps", "vlb_times", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)}: must be at least 1")
        if self.likelihood_steps < 2:
            raise ValueError(f"--likelihood_steps {self.likelihood_steps}: must be at least 2")


def name_of(dataset):
    """What the files about a data set are called after."""
    return os.path.splitext(os.path.basename(dataset.rstrip("/")))[0]


# ---- the models --------------------------------------------------------------------------------------------------------

def find_weights(path, points="all"):
    """The weights at a path: a file; of a run its points and its checkpoint; of a results directory its points.

    points="window": of a results directory only those in the windows of fit.py's parabolas, since the others are in no law.
    Raises ValueError where there are none.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such file or folder")
    found = sorted(glob.glob(os.path.join(glob.escape(path), "**", "ema.safetensors"), recursive=True))
    if points == "window" and glob.glob(os.path.join(glob.escape(path), "*", "budget_*")):
        import fit
        try:
            P = fit.points(fit.read_results(Path(path)))
            window = fit.parabolas(P, np.ones((1, len(P["N"]))), P["Y"])["window"][0]
            inside = {os.path.realpath(os.path.dirname(record["source"])) for record, used in zip(P["records"], window) if used}
            found = [file for file in found if os.path.realpath(os.path.dirname(file)) in inside]
        except (fit.BadInput, fit.Refused) as reason:
            print(f"{path}: no parabolas yet ({reason}), so all points are evaluated")
    found += glob.glob(os.path.join(glob.escape(path), "checkpoint.pt"))
    if not found:
        raise ValueError(f"{path}: no ema.safetensors and no checkpoint.pt in it (published results come without weights: "
                         f"make your own with python sweep.py or python train.py)")
    return found


def load_models(path, device):
    """-> {"ema": DiT, and "raw": DiT where the file is a checkpoint}, the definition of their run, the shape of their input.

    Nothing in the file is executed. Raises ValueError for a torn or foreign file, or a checkpoint without averaged weights.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                about = file.metadata()
                weights = {"ema": {name: file.get_tensor(name) for name in file.keys()}}
        else:
            about = torch.load(path, map_location="cpu", weights_only=True)
            if "model" in about and "ema" not in about:
                raise ValueError("it has no averaged weights (EMA), of which all numbers are")
            weights = {"ema": about["ema"], "raw": about["model"]}
        definition, shape = json.loads(about["definition"]), json.loads(about["shape"])
        models = {kind: DiT(ModelConfig(**definition["model"]), **shape).to(device).requires_grad_(False) for kind in weights}
        for kind, model in models.items():
            model.load_state_dict(weights[kind])
        return models, definition, shape
    except Exception as error:  # each reader raises its own kinds; whichever it is, the file is of no use
        raise ValueError(f"{path}: torn, or not a model of isoflow ({train.one_line(error)})") from None


def fingerprint(path):
    """Which weights these are: the SHA-256 of their file, shortened."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# ---- features: the spaces in which images are compared --------------------------------------------------------------

class Reader(nn.Module):
    """A small network that reads a scene at 16 x 16 pixels: the ground, and for each of the 9 places the kind, colour and size of
    what is there, or that nothing is. Its 128 features are the space of our Frechet distance."""

    SIDE, GROUPS = 16, {"kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES)}

    def __init__(self):
        super().__init__()
        def convolution(inputs, outputs, stride=1):
            return [nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(outputs), nn.GELU()]
        self.see = nn.Sequential(*convolution(3, 32), *convolution(32, 32), *convolution(32, 64, 2), *convolution(64, 64),
                                 *convolution(64, 48, 2), nn.Flatten(), nn.Linear(48 * 16, 128))
        self.tell = nn.Linear(128, len(GROUNDS) + len(PLACES) * (sum(self.GROUPS.values()) + len(self.GROUPS)))

    def features(self, images):
        """Images (B, 3, R, R) uint8 -> (B, 128). Other sides than 16 are resized, bilinear with antialiasing."""
        x = images.float() / 127.5 - 1
        if x.shape[-1] != self.SIDE:
            x = F.interpolate(x, size=(self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        return self.see(x)

    def read(self, features):
        """-> {"ground": (B, 1, 4), "kind": (B, 9, 7), ...}: logits at each place, the last class for nothing there."""
        logits = self.tell(F.gelu(features))
        ground, places = logits[:, :len(GROUNDS)], logits[:, len(GROUNDS):].view(len(logits), len(PLACES), -1)
        parts = places.split([count + 1 for count in self.GROUPS.values()], dim=-1)
        return {"ground": ground[:, None], **dict(zip(self.GROUPS, parts))}

    @classmethod
    def asked(cls, scene, captions):
        """What captions ask for: how many shapes of each class at each place, shaped as the logits of read().

        Sparse captions name the largest shape and no ground. Nothing is ever asked to be absent: the last class of a place
        counts only where no shape is there, and is for training.
        """
        named = scene["there"].clone()
        ground = F.one_hot(scene["ground"], len(GROUNDS)).float()[:, None]
        if captions == "sparse":
            named[:, 1:], ground = False, torch.zeros_like(ground)
        place = F.one_hot(scene["place"], len(PLACES)) * named[..., None]                               # (B, shapes, 9)
        counts = {"ground": ground}
        for name, classes in cls.GROUPS.items():
            of_class = torch.einsum("bsp,bsk->bpk", place.float(), F.one_hot(scene[name], classes + 1).float())
            of_class[..., classes] = (of_class.sum(-1) == 0).float()
            counts[name] = of_class                                                                     # (B, 9, classes + 1)
        return counts

    def accuracy(self, features, asked):
        """The share of what each caption asks for that its image shows, {"all", "ground", "kind", ...: (B,)}, nan if nothing.

        A place where the caption asks for m kinds (mostly one) shows a kind if it is among the network's m most likely.
        """
        shown, wanted = {}, {}
        for name, logits in self.read(features).items():
            want = asked[name] > 0
            if name != "ground":
                want[..., -1] = False   # nobody asks for nothing
            rank = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
            hit = want & (rank < want.sum(-1, keepdim=True))
            shown[name], wanted[name] = hit.sum((1, 2)).double(), want.sum((1, 2)).double()
        total = {"all": sum(shown.values()) / sum(wanted.values())}
        return {**total, **{name: shown[name] / wanted[name] for name in shown}}


def read_reader(path):
    """The network in a file, to be used."""
    reader = Reader().eval().requires_grad_(False)
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    counters = {name: count for name, count in reader.state_dict().items() if name.endswith("num_batches_tracked")}  # of no use here
    reader.load_state_dict({**counters, **weights})
    return reader


def train_reader(path, steps=2400, batch=256):
    """Train the Reader on scenes of both mixes and write it, in float16: minutes on 2 cores, 500 kB at most."""
    torch.manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    worlds = [Scenes(DataConfig(data=data, resolution=Reader.SIDE), seed=1) for data in ("scenes", "scenes-ood")]
    for step in (bar := tqdm(range(steps), desc="reader", unit="step")):
        parts = []
        for world in worlds:
            scene = world.describe("train", torch.arange(step * batch // 2, (step + 1) * batch // 2))
            parts.append((world.draw(scene), Reader.asked(scene, "dense")))
        images = torch.cat([images for images, _ in parts])
        loss = 0
        for name, logits in reader.read(reader.features(images)).items():
            want = torch.cat([asked[name] for _, asked in parts])
            loss = loss - (want / want.sum(-1, keepdim=True) * logits.log_softmax(-1)).sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    weights = {name: weight.half() for name, weight in reader.eval().state_dict().items() if weight.is_floating_point()}
    train.write_whole(path, lambda temporary: save_file(weights, temporary))
    reader = read_reader(path)
    for world in worlds:
        scene = world.describe("validation", torch.arange(4096))
        with torch.no_grad():
            scores = reader.accuracy(reader.features(world.draw(scene)), Reader.asked(scene, "dense"))
        print(f"{world.config.data}: it reads " + ", ".join(f"{name} {score.nanmean():.1%}" for name, score in scores.items()))
    print(f"written: {path}, {os.path.getsize(path):,} bytes, SHA-256 {fingerprint(path)}")


class FeatureNetwork:
    """images (B, 3, R, R) uint8 -> features (B, d) float32. `about`: the network, its checksum and how images are resized.

    spec: "scenes", "clip" (the paper's; image embeddings of ViT-L/14) or "dinov2" (pooled output), the latter two with ":NAME" or
    ":FOLDER" for other weights of their kind. Raises ValueError where there are none.
    """

    def __init__(self, spec, device):
        self.device = device
        self.name, _, source = spec.partition(":")
        if self.name == "scenes":
            if not os.path.exists(READER) or fingerprint(READER) != READER_SHA256:
                raise ValueError(f"{READER}: not there, or not the network of everybody else (its SHA-256 does not begin with "
                                 f"{READER_SHA256}): git checkout it, or give other --features")
            self.network = read_reader(READER).to(device)
            self.width = self.network.tell.in_features
            self.about = {"network": "results/reader/reader.safetensors", "sha256": READER_SHA256,
                          "resize": f"antialiased bilinear to {Reader.SIDE} pixels where the side differs"}
            return
        import transformers  # here, since it takes seconds that scenes need not spend
        transformers.logging.set_verbosity_error()
        source = source or HUB_NAMES[self.name]
        kind = transformers.CLIPVisionModelWithProjection if self.name == "clip" else transformers.Dinov2Model
        try:
            self.network, about = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            if missing := [*about["missing_keys"], *about["mismatched_keys"]]:   # transformers would fill them with random numbers
                raise ValueError(f"not a {kind.__name__}: it lacks {len(missing)} of its weights")
            self.network.to(device).eval().requires_grad_(False)
            self.processor = transformers.AutoImageProcessor.from_pretrained(source)
        except Exception as error:  # transformers and the hub raise many kinds
            raise ValueError(f"--features {spec}: cannot load {source} ({train.one_line(error)}). Without network: fetch "
                             f"huggingface.co/{HUB_NAMES[self.name]} (config.json, preprocessor_config.json, model.safetensors) "
                             f"elsewhere and give --features {self.name}:FOLDER") from None
        self.width = self.network.config.projection_dim if self.name == "clip" else self.network.config.hidden_size
        digest = hashlib.sha256()
        for name, weight in sorted(self.network.state_dict().items()):
            digest.update(name.encode() + weight.cpu().float().numpy().tobytes())
        self.about = {"network": source, "sha256": digest.hexdigest()[:16],
                      "resize": f"{type(self.processor).__name__}: {getattr(self.processor, 'size', None)}, resample {self.processor.resample}"}

    def reads(self, data):
        """Can it tell whether an image of this data set shows what its caption says, of which no word was cut?"""
        words = 1 + 5 * MAX_SHAPES if isinstance(data, Scenes) and data.config.captions == "dense" else 5
        return self.name == "scenes" and isinstance(data, Scenes) and data.config.text_tokens >= words

    def columns(self, data):
        """Of measure(): the features, and caption accuracies."""
        return self.width + (2 * (2 + len(Reader.GROUPS)) if self.reads(data) else 0)

    @torch.no_grad()
    def __call__(self, images):
        if self.name == "scenes":
            return self.network.features(images.to(self.device))
        pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        out = self.network(self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device))
        return out.image_embeds if self.name == "clip" else out.pooler_output


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """|mean1 - mean2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Dowson & Landau 1982; used on Inception features by Heusel et al. 2017.

    means (d,), covariances (d, d), float64. tr (S1 S2)^(1/2) is the sum of the square roots of the eigenvalues of
    S1^(1/2) S2 S1^(1/2), a symmetric matrix with none below zero but for rounding: nothing complex comes up.
    """
    values, vectors = np.linalg.eigh(covariance1)
    root = vectors * np.sqrt(values.clip(min=0))                                           # root root^T = S1
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ covariance2 @ root).clip(min=0)).sum()
    return float(((mean1 - mean2) ** 2).sum() + np.trace(covariance1) + np.trace(covariance2) - 2 * cross)


def frechet_of_features(one, two):
    """The same from features (n, d) and (m, d)."""
    return frechet_distance(one.mean(0), np.cov(one, rowvar=False), two.mean(0), np.cov(two, rowvar=False))


def kernel_distance(one, two):
    """KID (Binkowski et al. 2018, arXiv 1801.01401): the unbiased estimate of the squared maximum mean discrepancy under the
    kernel (x.y / d + 1)^3, from features (n, d), (m, d). Around 0 for independent sets of one distribution, so negative half the time."""
    def total(a, b):
        return sum(((rows @ b.T / a.shape[1] + 1) ** 3).sum() for rows in np.array_split(a, -(-len(a) // 1000)))

    def own(a):
        return (total(a, a) - (((a * a).sum(1) / a.shape[1] + 1) ** 3).sum()) / (len(a) * (len(a) - 1))
    return float(own(one) + own(two) - 2 * total(one, two) / (len(one) * len(two)))


def bootstrap_error(distance, real, samples, resamples=30):
    """The standard error of a distance between two sets of n, from resamples of the n pairs of one caption.

    Pairs, since an image and the sample for its caption are alike. The mean of the resamples is of no use: a resample has
    fewer different images, and both distances grow with that.
    """
    random = np.random.default_rng(0)
    drawn = [random.integers(len(real), size=len(real)) for _ in range(resamples)]
    return float(np.std([distance(real[rows], samples[rows]) for rows in drawn], ddof=1))


# ---- the metrics -------------------------------------------------------------------------------------------------------

def ranks():
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def for_each_image(n, columns, batch, compute, partial, what):
    """compute(index (b,)) -> (b, columns), over images 0 to n - 1 in batches: (n, columns) float64, complete on every rank.

    The batches are dealt to the ranks of torchrun in turns. What is done is kept in files `partial`, one a rank (None: nowhere),
    so that a killed evaluation goes on; who has written the result removes them.
    """
    rank, world = ranks()
    kept = os.devnull if partial is None else f"{partial}_{rank}of{world}.npy"
    values, saved_at = np.zeros((n, columns + 1)), time.monotonic()
    if partial and os.path.exists(kept):
        try:
            found = np.load(kept, allow_pickle=False)
            values = found if found.shape == values.shape else values
        except (ValueError, EOFError):
            pass  # torn: a minute of work
    mine = [start for start in range(0, n, batch) if start // batch % world == rank]
    for start in tqdm(mine, desc=what, unit="batch", leave=False, disable=rank > 0):
        here = slice(start, min(start + batch, n))
        if values[here, 0].all():   # the first column says what is done
            continue
        values[here, 1:] = compute(torch.arange(here.start, here.stop)).double().cpu()
        values[here, 0] = 1
        if partial and time.monotonic() - saved_at > PARTIAL_SECONDS:
            train.write_whole(kept, lambda path: train.save_array(path, values))
            saved_at = time.monotonic()
    total = torch.from_numpy(values[:, 1:].copy())   # all_reduce needs it in one piece
    if world > 1:
        total = total.to("cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(total)   # of each row only one rank has not zeros
    return total.cpu()


def summary(values):
    """{"value", "se"} of the mean of values (n,); where some are not finite {"value": None, "reason"}: a metric refused."""
    bad = (~torch.isfinite(values)).nonzero()[:, 0].tolist()
    if bad:
        return {"value": None, "se": None, "reason": f"not finite for {len(bad)} of {len(values)} images, first {bad[:5]}"}
    mean, error = flow.mean_and_standard_error(values)
    return {"value": mean, "se": error}


def with_noise(data, config, index):
    """Validation images with their uniform noise (latents: drawn from the VAE's posterior), fixed by (seed, first image): x (B, C, R, R), text, text_mask."""
    raw, text, text_mask = data.batch("validation", index)
    return data.to_x(raw, seeded("u", config.seed, index[0].item())), text, text_mask


def bits(nats, data):
    """Nats per image -> bits per dimension of 8-bit pixels, an upper bound on what the levels cost; of latents a differential number,
    which depends on their scale (flow.bits_per_dim)."""
    return flow.bits_per_dim(nats, data.shape["channels"] * data.shape["size"] ** 2, pixels=not data.latents)


def loss_metrics(models, data, precision, config, n, where, partial):
    """The validation loss as the trainer computes it, per element: {"val_loss_ema", and "val_loss" of raw weights}."""
    metrics = {}
    for kind, model in models.items():
        losses, times = train.validation_losses(model, data, n, precision, *ranks())
        number = {**summary(losses), "weights": kind}
        if number["value"] is not None:
            number["by_time"] = flow.loss_by_time(losses, times)
        metrics["val_loss_ema" if kind == "ema" else "val_loss"] = number
    return metrics


def likelihood_metrics(metric, models, data, precision, config, n, where, partial):
    """{"vlb"} or {"nll"}: the bound on -log p of the reverse SDE, or -log p of the sampler's ODE, in bits per dimension.

    The nats of each image are kept in METRIC_DATASET.npy, so that models, or the two metrics, can be compared image by image.
    """
    def compute(index):
        x, text, text_mask = with_noise(data, config, index)
        seed = seeded(metric, config.seed, index[0].item()).initial_seed()
        with train.autocast(x.device, precision):
            if metric == "vlb":
                bound = flow.vlb(models["ema"], x, text, text_mask, config.vlb_times, seed)
                return torch.stack([bound[part] for part in ("nats", "prior", "diffusion", "reconstruction")], 1)
            nats, error, _ = flow.log_likelihood(models["ema"], x, text, text_mask, config.likelihood_steps, seed=seed)
            return torch.stack([-nats, error, error, error], 1)
    nats, *parts = for_each_image(n, 4, config.batch, compute, partial, metric).T
    if ranks()[0] == 0:
        train.write_whole(where(metric) + ".npy", lambda path: train.save_array(path, nats.numpy()))
    number = {**summary(bits(nats, data)), "unit": "bits/latent dim" if data.latents else "bits/dim", "nats_per_image": summary(nats)["value"], "weights": "ema"}
    if metric == "vlb":
        number |= {f"{name}_nats": summary(part)["value"] for name, part in zip(("prior", "diffusion", "reconstruction"), parts)}
    elif number["value"] is not None:   # what the probes alone would leave of uncertainty, in the mean over images
        number["se_of_probes"] = (bits(parts[0].square().mean().sqrt(), data) - bits(torch.tensor(0.0), data)).item() / n ** 0.5
    return {metric: number}


def vlb_minus_nll(saved, data, where):
    """The difference of the two in bits per dimension, image by image, over those that both were measured on; None where they
    are not both there, of the same weights, images and noise."""
    vlb, nll = saved.get("vlb"), saved.get("nll")
    shared = ("weights", "data", "resolution", "captions", "seed", "batch")
    if not (vlb and nll) or None in (vlb["value"], nll["value"]) or any(vlb["protocol"][key] != nll["protocol"][key] for key in shared):
        return None
    n = min(vlb["protocol"]["n"], nll["protocol"]["n"])
    nats = [torch.from_numpy(np.load(where(metric) + ".npy", allow_pickle=False)) for metric in ("vlb", "nll")]
    return {**summary(bits(nats[0][:n], data) - bits(nats[1][:n], data)), "unit": saved["vlb"]["unit"], "weights": "ema",
            "protocol": {key: vlb["protocol"][key] for key in shared} | {"n": n}}


def measure(images, index, network, data):
    """What the feature network says of images (B, 3, R, R) uint8 that stand for the validation captions `index`: (B, columns) float64.

    Its d features; then, from the reader of scenes on scenes, the share of what the caption asks for that the image shows: of
    everything, of the ground, kind, colour and size; then the same for the next image's caption, which is what chance gives.
    """
    features = network(images)
    columns = [features.double()]
    for captions in (index, index + 1) if network.reads(data) else ():
        asked = Reader.asked(data.describe("validation", captions), data.config.captions)
        columns.append(torch.stack(list(network.network.accuracy(features, asked).values()), 1))
    return torch.cat(columns, 1)


def real_images(data, network, config, n):
    """measure() of the validation images 0 to n - 1, to which samples are compared."""
    def compute(index):
        images = data.images("validation", index)
        if config.save_images:
            save_images(os.path.join(config.save_images, "real"), images, index)
        return measure(images, index, network, data)
    return for_each_image(n, network.columns(data), config.batch, compute, None, "real images")


def distance_metrics(models, data, precision, config, n, where, partial, network, real):
    """{"fd_FEATURES", "kid_FEATURES", and on scenes "caption_accuracy"} of samples against `real`, from real_images().

    The real images are those with the samples' own captions, as is usual on COCO, so a perfect model is nearer to them than other
    real images would be. halves_of_real, the distance between two halves of them, is of n/2 images and of different captions: a
    yardstick that a perfect model would fall below.
    """
    def compute(index):
        x = train.sample_data(models["ema"], data, precision, index, config.steps, config.solver,
                              config.guidance, config.seed)
        levels = data.to_levels(x.nan_to_num())
        if config.save_images:
            save_images(os.path.join(config.save_images, "samples"), levels, index)
        return torch.cat([torch.isfinite(x).flatten(1).all(1, keepdim=True), measure(levels, index, network, data)], 1)
    table = for_each_image(n, 1 + network.columns(data), config.batch, compute, partial, "fd")
    finite, values, guided = table[:, 0], table[:, 1:], f"_g{config.guidance:g}" if config.guidance != 1 else ""
    metrics = dict.fromkeys([f"fd_{network.name}{guided}", f"kid_{network.name}{guided}"] + [f"caption_accuracy{guided}"] * network.reads(data))
    if not finite.all():
        bad = (finite == 0).nonzero()[:, 0].tolist()
        reason = f"{len(bad)} of {n} samples are not finite, first {bad[:5]}"
        return {name: {"value": None, "se": None, "reason": reason} for name in metrics}
    truth, features = real[:, :network.width].numpy(), values[:, :network.width].numpy()
    for name, distance in zip(metrics, (frechet_of_features, kernel_distance)):
        metrics[name] = {"value": distance(truth, features), "se": bootstrap_error(distance, truth, features),
                         "halves_of_real": distance(truth[::2], truth[1::2]) if n // 2 > network.width else None, "weights": "ema"}
        if n <= network.width:
            metrics[name]["singular"] = f"{n} images for {network.width} features"
    if network.reads(data):
        names = ("all", "ground", *Reader.GROUPS)
        score = lambda table, first: {name: round(mean, 5) for name, mean in zip(names, torch.nanmean(
            table[:, network.width + first:network.width + first + len(names)], 0).tolist()) if mean == mean}   # nan: never asked for
        metrics[f"caption_accuracy{guided}"] = {
            **summary(values[:, network.width]), "weights": "ema", "samples": score(values, 0),
            "real_images": score(real, 0), "samples_for_other_captions": score(values, len(names))}
    return metrics


def save_images(folder, levels, index):
    """PNG files that clean-fid and torch-fidelity read, one an image."""
    os.makedirs(folder, exist_ok=True)
    for image, number in zip(levels, index.tolist()):
        Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(os.path.join(folder, f"{number:06d}.png"))


def save_samples(path, model, data, precision, config, title):
    """A picture of held-out images and, beside each, samples for its caption, one for each value of guidance."""
    index = torch.arange(min(config.samples, data.validation_images or config.samples))
    groups = [data.images("validation", index)]
    for guidance in config.picture_guidance:
        groups.append(data.to_levels(train.sample_data(model, data, precision, index, config.steps,
                                                       config.solver, guidance, config.seed)))
    columns = ["held-out image", *(f"sample, guidance {guidance:g}" for guidance in config.picture_guidance)]
    save_grid(path, groups, data.captions("validation", index),
              f"{title}: {' | '.join(columns)} (EMA weights, {config.steps} {config.solver.title()} steps)")


# ---- the command -------------------------------------------------------------------------------------------------------

def read_saved(target, dataset):
    """The metrics that earlier calls wrote to metrics_DATASET.json, each with its protocol."""
    if not os.path.exists(target):
        return {}
    try:
        with open(target) as file:
            saved = json.load(file)
        if saved["data"] != dataset:
            raise ValueError(f"{target}: holds numbers of --data {saved['data']}, and --data {dataset} has the same name: rename one of them")
        return {name: number for name, number in saved["metrics"].items() if saved["schema"] == train.SCHEMA and number["protocol"]}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{target}: torn, or not of isoflow: delete it to have it made again") from None


def protocol_of(metric, config, data, n, path, network):
    """All that a number depends on, beside the code: printed and stored with it, and what decides if it is missing."""
    about = {"weights": fingerprint(path), "data": data.config.data, "resolution": data.config.resolution,
             "captions": data.config.captions, "n": n, "guidance": 1, **({"images": data.encoders["images"]["sha256"]} if "images" in data.encoders else {})}
    if metric == "loss":
        return {**about, "seed": train.VALIDATION_SEED, "times": "logit-normal, stratified"}
    about |= {"seed": config.seed} | ({"batch": config.batch} if metric != "fd" else {})   # their noise is drawn by the batch
    noise = "drawn from the posterior of the VAE, normalised" if data.latents else "uniform"
    if metric == "vlb":
        return {**about, "times": f"{config.vlb_times} an image, stratified in log t", "t0": flow.VLB_RANGE[0], "t1": flow.VLB_RANGE[1],
                "dequantised": noise}
    if metric == "nll":
        return {**about, "solver": "heun, equal in sqrt(t)", "steps": config.likelihood_steps,
                "probes": "1 of random signs, new at each evaluation", "dequantised": noise}
    return {**about, "solver": config.solver, "steps": config.steps, "guidance": config.guidance, "features": network.about,
            "reference": f"validation images 0 to {n - 1}, whose captions the samples have"
                         + (f"; their own pixels, not what VAE {data.encoders['vae']['sha256']} makes of them" if data.latents else "")}


def count_images(metric, config, data, definition):
    """How many images a metric takes. Raises ValueError where there are not so many."""
    there = data.validation_images
    if config.n and there and config.n > there:
        raise ValueError(f"--n {config.n}: {data.config.data} has only {there} for validation")
    wanted = config.n or IMAGES.get(metric) or definition["train"]["val_images"] or train.VALIDATION_IMAGES
    return min(wanted, there or wanted)


def evaluate(config):
    """All metrics of all models on all data sets; raises ValueError for input that can't be used."""
    rank, world = ranks()
    device, _ = train.find_device(config.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    network = FeatureNetwork(config.features, device) if "fd" in config.metrics else None
    files, sources, real, pictures = find_weights(config.path, config.points), {}, {}, {}
    if config.save_images and (len(files) > 1 or len(config.data or [""]) > 1 or config.metrics != ["fd"]):
        raise ValueError(f"--save_images {config.save_images}: takes --metrics fd of one model on one data set")
    if config.save_images and os.path.exists(config.save_images) and os.listdir(config.save_images):
        raise ValueError(f"--save_images {config.save_images}: not empty, so other images would be among these")
    for path in tqdm(files, desc="evaluating", unit="model", disable=rank > 0):
        models, definition, shape = load_models(path, device)
        precision = definition["train"]["precision"]
        for dataset in config.data or [definition["data"]["data"]]:
            data_config = data_config_of(definition["data"], dataset)
            if data_config not in sources:
                sources[data_config] = load_data(data_config, 0, device)
            data = sources[data_config]
            data.use_training_encoders(definition.get("encoders", {}))
            if data.shape != shape:
                raise ValueError(f"--data {dataset} gives {data.shape}, the model takes {shape}")
            name = name_of(dataset)
            prefix = "" if path.endswith(".safetensors") else "checkpoint_"
            where = lambda what: os.path.join(os.path.dirname(path), f"{prefix}{what}_{name}")
            for metric in config.metrics:
                n = count_images(metric, config, data, definition)
                if metric == "fd" and n <= network.width and not config.allow_singular:
                    raise ValueError(f"--n {n}: {network.name} has {network.width} features, so the covariance of {n} images is singular: "
                                     f"take more, or --allow_singular")
                protocol, saved = protocol_of(metric, config, data, n, path, network), read_saved(where("metrics") + ".json", dataset)
                numbers = {key: number for key, number in saved.items() if number["protocol"] == protocol}
                if not numbers or config.save_images:
                    partial = where(f"partial_{metric}_{hashlib.sha256(json.dumps(protocol).encode()).hexdigest()[:12]}")
                    common = models, data, precision, config, n, where, partial
                    if metric == "loss":
                        numbers = loss_metrics(*common)
                    elif metric == "fd":
                        if (data_config, n) not in real:
                            real[data_config, n] = real_images(data, network, config, n)
                        numbers = distance_metrics(*common, network, real[data_config, n])
                    else:
                        numbers = likelihood_metrics(metric, *common)
                    numbers = {key: {**number, "protocol": protocol} for key, number in numbers.items()}
                    if rank == 0:
                        train.write_json(where("metrics") + ".json", {"schema": train.SCHEMA, "data": dataset, "metrics": {**saved, **numbers}})
                        for done in glob.glob(glob.escape(partial) + "*"):
                            os.remove(done)
                if rank == 0:
                    tqdm.write(f"{path} on {name}: " + ", ".join(
                        f"{key} refused, {number['reason']}" if number["value"] is None else f"{key} {number['value']:.4f} +- {number['se']:.4f}"
                        for key, number in numbers.items()) + "; " + ", ".join(f"{key} {value}" for key, value in protocol.items()))
                ranked = numbers.get("val_loss_ema", next(iter(numbers.values())))["value"]   # the picture is of the best model
                if ranked is not None and (name not in pictures or ranked < pictures[name][0]) and metric == config.metrics[0]:
                    pictures[name] = ranked, path, models["ema"], data, precision, definition
            if rank == 0 and {"vlb", "nll"} & set(config.metrics):
                saved = read_saved(where("metrics") + ".json", dataset)
                gap = vlb_minus_nll(saved, data, where)
                if gap and gap != saved.get("vlb_minus_nll"):
                    train.write_json(where("metrics") + ".json", {"schema": train.SCHEMA, "data": dataset, "metrics": {**saved, "vlb_minus_nll": gap}})
                    tqdm.write(f"{path} on {name}: vlb - nll {gap['value']:.4f} +- {gap['se']:.4f} {gap['unit']}, {gap['protocol']['n']} images")
    for name, (_, path, model, data, precision, definition) in pictures.items() if config.samples and rank == 0 else ():
        target = os.path.join(os.path.dirname(path) or ".", f"samples_{name}.png")
        which = " ".join(os.path.dirname(os.path.abspath(path)).split(os.sep)[-2:])   # the run and its budget
        data.use_training_encoders(definition.get("encoders", {}))   # the next model's scale and shift may have come in between
        save_samples(target, model, data, precision, config, f"{which} on {name}")
        print(f"written: {target}")


def main():
    (config,) = parse_flags((EvaluateConfig,), __doc__, positional="path")
    try:
        if config.train_reader:
            train_reader(config.train_reader)
        else:
            evaluate(config)
    except (ValueError, OSError, RuntimeError) as error:
        if ranks()[0] == 0 or not isinstance(error, ValueError):   # bad input is the same for all ranks
            print(f"evaluate.py: {train.one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
