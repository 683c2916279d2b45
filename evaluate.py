"""How good is a trained model, on any data set?

    python evaluate.py results/my-quick --metrics loss vlb nll fd --data scenes scenes-ood
    python evaluate.py results/my-quick/RUN/budget_1e+12 --metrics fd --guidance 2
    torchrun --nproc_per_node=2 -- evaluate.py ...    the same numbers, the images shared out
                                (without `--` torchrun would take our --n for one of its own flags)

    loss   validation loss on the trainer's fixed images, times and noises
    vlb    variational bound, bits per dimension of 8-bit pixels
    nll    exact likelihood of the sampler's ODE, in the same unit; with vlb also vlb_minus_nll
    fd     Frechet distance between samples and the real images with the same captions; from the
           same samples kid (kernel distance) and, on scenes, caption_accuracy

Numbers go to metrics_DATASET.json beside the weights, each with the protocol it was measured by.
A number that is there with the same protocol is not measured again, so the same command resumes. A
killed one repeats one of the --metrics of one model. Samples of the best model, the lowest in the
first of --metrics, go to samples_DATASET.png.

A new distance between samples and real images is a function and a line in DISTANCES. What needs
other computations is a protocol, a function and a line in GROUPS.
"""
import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import List, Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

import fit
import flow
import train
from data import (COLOURS, GROUNDS, KINDS, MAX_SHAPES, PLACES, SIZES, check_flags, data_config_of,
                  errors_in_one_line, errors_say_what_to_fetch, flag, load_data, one_line,
                  parse_flags, ranks, read_json, save_grid, seeded, weights_digest, write_array,
                  write_json)
from model import DiT, ModelConfig

METRICS = "loss", "vlb", "nll", "fd"   # what --metrics takes
VLB_TIMES = 64            # noised versions of each image
PICTURE_GUIDANCE = 1, 3   # side by side in the picture of samples
READER = Path(__file__).parent / "results" / "reader" / "reader.safetensors"
READER_SHA256 = "80fb16e0ba8bd504"
PRETRAINED = {            # --features: its default, its class in transformers, which output it is
    "clip": ("openai/clip-vit-large-patch14", "CLIPVisionModelWithProjection", "image_embeds"),
    "dinov2": ("facebook/dinov2-large", "Dinov2Model", "pooler_output")}

@dataclass(frozen=True)
class EvaluateConfig:
    path: str = flag("results/my-quick", "a sweep (its points in fit.py's parabolas), a run, a "
                     "point or a file of weights")
    metrics: List[str] = flag(["loss"], "some of loss, vlb, nll and fd; with fd come kid "
                              "and, on scenes, caption_accuracy")
    data: Optional[List[str]] = flag(None, "data sets (default: the one of the training)")
    n: Optional[int] = flag(None, "images (default: loss as in training, vlb 500, nll 250, "
                            "fd 2000; the paper: 10000)")
    steps: int = flag(16, "Heun steps of a sample")
    guidance: float = flag(1.0, "of the samples of fd")
    features: str = flag("scenes", "of fd: scenes (measures nothing else), clip, dinov2, or "
                         "other weights: clip:FOLDER, dinov2:HUB_NAME")
    save_images: Optional[str] = flag(None, "folder for samples and real images of fd as PNG files")
    likelihood_steps: int = flag(32, "Heun steps of nll")
    samples: int = flag(16, "samples in the picture; 0: no picture")
    seed: int = flag(0, "of all noise but that of the loss")
    batch: int = flag(64, "images at once")
    device: Literal["auto", "cpu", "cuda"] = flag("auto", "where to evaluate")

    def __post_init__(self):
        check_flags(self, "steps batch", lambda number: number >= 1, "at least 1")
        check_flags(self, "n likelihood_steps", lambda number: number >= 2, "at least 2")
        check_flags(self, "samples", lambda number: number >= 0, "at least 0")
        for name in set(self.metrics) - set(METRICS):
            raise ValueError(f"--metrics {name}: take some of {', '.join(METRICS)}")
        if self.guidance != 1 and set(self.metrics) != {"fd"}:
            raise ValueError(f"--guidance {self.guidance:g}: a guided model has no density; take "
                             f"--metrics fd alone")

# ---- the models ----------------------------------------------------------------------------------

def find_weights(path):
    """The files of weights at a path; of a sweep, only the points that its law is fitted to.

    Raises ValueError where there are none.
    """
    folder = Path(path)
    if folder.is_file():
        return [folder]
    found = [*sorted(folder.rglob("ema.safetensors")), *folder.glob("checkpoint.pt")]
    if any(folder.glob("*/budget_*")):
        try:
            used = {Path(record).parent.resolve() for record in fit.points_in_windows(folder)}
            found = [file for file in found if file.parent.resolve() in used]
        except (fit.BadInput, fit.Refused) as reason:
            print(f"{path}: no parabolas yet ({reason}), so all points are evaluated")
    if not found:
        raise ValueError(f"{path}: no such file, or no ema.safetensors and no checkpoint.pt in it "
                         f"(published results come without weights: make your own)")
    return found

def load_models(path, device):
    """-> {"ema": DiT}, and "raw" of a checkpoint; the definition of the run; its input's shape.

    Nothing in the file is executed. Raises ValueError for a torn or foreign file.
    """
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                about = file.metadata()
            weights = {"ema": load_file(path)}
        else:
            about = torch.load(path, map_location="cpu", weights_only=True)
            weights = {"ema": about["ema"], "raw": about["model"]}
        definition, shape = json.loads(about["definition"]), json.loads(about["shape"])
        models = {kind: DiT(ModelConfig(**definition["model"]), **shape) for kind in weights}
        for kind, model in models.items():
            model.load_state_dict(weights[kind])
            model.to(device).requires_grad_(False)
        return models, definition, shape
    except Exception as error:  # each reader raises its own kinds; whichever, the file is of no use
        raise ValueError(f"{path}: torn, or not a model of isoflow with averaged weights (ema): "
                         f"{one_line(error)}") from None

@dataclass
class Subject:
    """A trained model on a data set: what a metric is measured on."""
    config: EvaluateConfig
    path: Path          # of the weights
    models: dict        # {"ema": DiT}, and "raw" of a checkpoint
    weights: str        # their digest: a number is of these weights alone
    definition: dict    # of the run: the configurations of model, data and training
    precision: str      # of the products: the same as in training
    data: object        # a source of data.py
    network: object     # images -> features (load_network); None where no metric needs it

    def file(self, what, suffix):
        """A file beside the weights about this data set, metrics_scenes.json for instance."""
        prefix = "" if self.path.suffix == ".safetensors" else "checkpoint_"
        dataset = Path(self.data.config.data).stem
        return self.path.with_name(f"{prefix}{what}_{dataset}{suffix}")

    def samples(self, index, guidance):
        """Samples x for the captions of validation images `index` (B,)."""
        return train.sample_data(self.models["ema"], self.data, self.precision, index,
                                 self.config.steps, guidance, self.config.seed)

# ---- feature networks: the spaces in which images are compared -----------------------------------

class Reader(nn.Module):
    """A small network that reads scenes at 16 x 16 pixels: --features scenes.

    It tells the ground, and at each of the 9 places the kind, colour and size of what is there.
    """

    SIDE = 16
    CLASSES = {"kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES)}

    def __init__(self):
        super().__init__()
        self.width = 128
        self.about = {"network": "results/reader/reader.safetensors", "sha256": READER_SHA256,
                      "resize": "antialiased bilinear to 16 pixels where the side differs"}
        layers = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1),
                                        (64, 48, 2)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1, stride=stride, bias=False),
                       nn.BatchNorm2d(outputs), nn.GELU()]
        self.see = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * 16, self.width))
        answers = sum(classes + 1 for classes in self.CLASSES.values())  # one more: nothing there
        self.tell = nn.Linear(self.width, len(GROUNDS) + len(PLACES) * answers)

    def forward(self, images):
        """Images (B, 3, R, R) uint8 -> features (B, 128)."""
        x = images.to(self.tell.weight.device).float() / 127.5 - 1
        if x.shape[-1] != self.SIDE:
            x = F.interpolate(x, size=(self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        return self.see(x)

    def read(self, features):
        """Features (B, 128) -> logits {"ground": (B, 1, 4), "kind": (B, 9, 7), ...}.

        The last class of a place is that nothing is there.
        """
        logits = self.tell(F.gelu(features))
        places = logits[:, len(GROUNDS):].unflatten(1, (len(PLACES), -1))
        parts = places.split([classes + 1 for classes in self.CLASSES.values()], dim=-1)
        return {"ground": logits[:, None, :len(GROUNDS)], **dict(zip(self.CLASSES, parts))}

    @classmethod
    def asked(cls, scene, captions):
        """What captions ask for: the number of shapes of each class at each place, as in read().

        scene: of data.describe. Sparse captions name the largest shape, and no ground.
        """
        named = scene["there"].clone()                                           # (B, shapes)
        counts = {"ground": F.one_hot(scene["ground"], len(GROUNDS))[:, None]}   # (B, 1, 4)
        if captions == "sparse":
            named[:, 1:] = False
            counts["ground"].zero_()
        place = F.one_hot(scene["place"], len(PLACES)) * named[..., None]        # (B, shapes, 9)
        for name, classes in cls.CLASSES.items():
            of_class = F.one_hot(scene[name], classes + 1)                       # (B, shapes, K+1)
            counts[name] = torch.einsum("bsp,bsk->bpk", place.float(), of_class.float())
        return counts

    def accuracy(self, features, asked):
        """The share of what captions ask for that images show, {"all", "ground", ...: (B,)}.

        Where a caption asks for m kinds at a place (mostly one), the image shows a kind if it is
        among the network's m most likely. nan where a caption asks for nothing of the sort.
        """
        shown, wanted = {}, {}
        for name, logits in self.read(features).items():
            want = asked[name] > 0
            # The rank of each class, 0 for the most likely: its place in the sorted order.
            rank = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
            hit = want & (rank < want.sum(-1, keepdim=True))
            shown[name] = hit.sum((1, 2)).double()
            wanted[name] = want.sum((1, 2)).double()
        shares = {"all": sum(shown.values()) / sum(wanted.values())}
        return shares | {name: shown[name] / wanted[name] for name in shown}

def load_reader(path):
    """The Reader in a file, to be used."""
    reader = Reader()
    # The file leaves out BatchNorm's counters of batches, which only training needs.
    reader.load_state_dict(reader.state_dict() | load_file(path))
    return reader.eval().requires_grad_(False)

class PretrainedFeatures:
    """CLIP's image embeddings (the paper's choice) or DINOv2's pooled output, by transformers.

    Raises ValueError where `source`, a hub name or a folder ("": the default), has no such weights.
    """

    def __init__(self, kind, source, device):
        import transformers  # here, since it takes seconds that scenes need not spend
        transformers.logging.set_verbosity_error()
        default, network, self.output = PRETRAINED[kind]
        network, source = getattr(transformers, network), source or default
        weights = "preprocessor_config.json model.safetensors"
        with errors_say_what_to_fetch("features", source, weights):
            self.network, loaded = network.from_pretrained(source, use_safetensors=True,
                                                           output_loading_info=True)
            self.processor = transformers.AutoImageProcessor.from_pretrained(source)
            missing = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
            if missing:  # transformers would fill them with random numbers
                raise ValueError(f"a {network.__name__} has {len(missing)} weights that it lacks")
        self.network.to(device).eval().requires_grad_(False)
        config = self.network.config
        self.width = config.projection_dim if kind == "clip" else config.hidden_size
        self.about = {"network": source, "sha256": weights_digest(self.network),
                      "resize": f"{type(self.processor).__name__}: {self.processor.size}, "
                                f"resample {self.processor.resample}"}

    def __call__(self, images):
        """Images (B, 3, R, R) uint8 -> features (B, width)."""
        pictures = list(images.permute(0, 2, 3, 1).cpu().numpy())
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return self.network(pixels.to(self.network.device))[self.output]

def load_network(features, device):
    """What --features names: a network of images (B, 3, R, R) uint8 -> features (B, width).

    It has two attributes: `width`, and `about`, its part of the protocol. Raises ValueError where
    there is no such network.
    """
    kind, _, source = features.partition(":")
    if kind in PRETRAINED:
        return PretrainedFeatures(kind, source, device)
    if features != "scenes":
        raise ValueError(f"--features {features}: take scenes, or one of {', '.join(PRETRAINED)} "
                         f"with :HUB_NAME or :FOLDER for other weights of that kind")
    reader = load_reader(READER)
    if weights_digest(reader) != READER_SHA256:
        raise ValueError(f"{READER}: not the network of everybody else ({READER_SHA256}): "
                         f"git checkout it, or give other --features")
    return reader.to(device)

# ---- parts that metrics share --------------------------------------------------------------------

def for_each_image(n, batch, compute, what):
    """compute(index (b,)) -> (b, ...), of images 0 to n - 1: (n, ...) float64 on every rank's CPU.

    Batches are dealt in turns to the ranks of torchrun.
    """
    rank, world = ranks()
    batches = torch.arange(n).split(batch)
    values = [None] * len(batches)
    for number in tqdm(range(rank, len(batches), world), f"{what}, {n} images", leave=False,
                       disable=rank > 0):
        values[number] = compute(batches[number]).double().cpu()
    if world > 1:  # everybody gets everybody's list, with None where others were at work
        parts = [None] * world
        dist.all_gather_object(parts, values)
        values = [parts[number % world][number] for number in range(len(batches))]
    return torch.cat(values)

def refusal(values):
    """{"value": None, "se": None, "reason"} if rows of values (n, ...) are not finite, else None.

    So a number is refused by name: a mean over the rest would look right.
    """
    bad = (~torch.isfinite(values)).view(len(values), -1).any(1).nonzero()[:, 0].tolist()
    if bad:
        reason = f"not finite for {len(bad)} of {len(values)} images, first {bad[:5]}"
        return {"value": None, "se": None, "reason": reason}

def mean_number(values):
    """{"value", "se"}: the mean of values (n,) and its standard error, or a refusal."""
    mean, error = flow.mean_and_standard_error(values)
    return refusal(values) or {"value": mean, "se": error}

def common_protocol(subject, images):
    """What every number depends on. images: how many without --n, or all where there are fewer.

    Raises ValueError where --n is more than there are.
    """
    data, n = subject.data, subject.config.n
    there = data.validation_images or math.inf  # scenes are endless
    if n and n > there:
        raise ValueError(f"--n {n}: {data.config.data} has only {there} for validation")
    about = {"weights": subject.weights, "precision": subject.precision, "data": data.config.data,
             "resolution": data.config.resolution, "captions": data.config.captions,
             "n": n or min(images, there), "guidance": 1}
    if "images" in data.encoders:
        about["images"] = data.encoders["images"]["sha256"]
    return about

# ---- loss and likelihoods: groups of metrics that need no samples --------------------------------

def loss_protocol(subject):
    """The trainer's own noises and times, so that the number is that of its record."""
    images = subject.definition["train"]["val_images"] or train.VALIDATION_IMAGES
    return {**common_protocol(subject, images), "seed": train.VALIDATION_SEED,
            "times": "logit-normal, stratified"}   # stored and compared: never reword a protocol

def measure_loss(subject, protocol):
    """{"loss"}, and "raw_loss" of raw weights: as the trainer computes them, per element."""
    numbers = {}
    for kind, model in subject.models.items():
        losses, times = train.validation_losses(model, subject.data, protocol["n"],
                                                subject.precision, *ranks())
        number = {**mean_number(losses), "weights": kind}
        if number["value"] is not None:
            number["by_time"] = flow.loss_by_time(losses, times)
        numbers["loss" if kind == "ema" else "raw_loss"] = number
    return numbers

def likelihood_protocol(subject, images):
    """What vlb and nll have in common. Their noises, times and probes are drawn by the batch."""
    noise = "drawn from the posterior of the VAE, normalised" if subject.data.latents else "uniform"
    return {**common_protocol(subject, images), "seed": subject.config.seed,
            "batch": subject.config.batch, "dequantised": noise}

def vlb_protocol(subject):
    """Times and noises from the seed, and the range of times that is integrated."""
    return {**likelihood_protocol(subject, 500), "t0": flow.VLB_START, "t1": 1.0,
            "times": f"{VLB_TIMES} an image, stratified in log t"}

def nll_protocol(subject):
    """How the ODE is solved and its divergence estimated."""
    return {**likelihood_protocol(subject, 250), "solver": "heun, equal in sqrt(t)",
            "steps": subject.config.likelihood_steps,
            "probes": "1 of random signs, new at each evaluation"}

def likelihood_of_images(subject, protocol, metric, measure):
    """measure(x, text, text_mask, seed) -> (b, columns), of all images: columns of (n,) each.

    The first column must be nats. They are kept in METRIC_DATASET.npy, so that models can be
    compared image by image. x has its uniform noise (latents: are drawn from the VAE's posterior).
    """
    data = subject.data

    def compute(index):
        raw, text, text_mask = data.batch("validation", index)
        first = index[0].item()
        x = data.to_x(raw, seeded("u", protocol["seed"], first))
        # flow.py starts generators of its own, so it is given a number.
        seed = seeded(metric, protocol["seed"], first).initial_seed()
        with train.autocast(x.device, subject.precision):
            return measure(x, text, text_mask, seed)
    columns = for_each_image(protocol["n"], protocol["batch"], compute, metric).T
    if ranks()[0] == 0:
        write_array(subject.file(metric, ".npy"), columns[0].numpy())
    if ranks()[1] > 1:
        dist.barrier()  # every rank will read the file for vlb_minus_nll
    return columns

def bits_number(subject, nats, pixels):
    """The number of nats (n,) in bits per dimension; pixels: of a density of 8-bit pixels."""
    dims = subject.data.shape["channels"] * subject.data.shape["size"] ** 2
    return {**mean_number(flow.bits_per_dim(nats, dims, pixels)), "weights": "ema",
            "unit": "bits/latent dim" if subject.data.latents else "bits/dim",
            "nats_per_image": mean_number(nats)["value"]}

def measure_vlb(subject, protocol):
    """{"vlb"}: the bound on -log p of the reverse SDE (flow.vlb), and its parts in nats."""
    def measure(x, text, text_mask, seed):
        bound = flow.vlb(subject.models["ema"], x, text, text_mask, VLB_TIMES, seed)
        return torch.stack([bound["nats"], bound["diffusion"], bound["reconstruction"]], dim=1)
    nats, diffusion, reconstruction = likelihood_of_images(subject, protocol, "vlb", measure)
    return {"vlb": {**bits_number(subject, nats, pixels=not subject.data.latents),
                    "prior_nats": 0.0,  # at t1 = 1, where x_t is noise alone
                    "diffusion_nats": mean_number(diffusion)["value"],
                    "reconstruction_nats": mean_number(reconstruction)["value"]}}

def measure_nll(subject, protocol):
    """{"nll"}: -log p of the sampler's ODE (flow.log_likelihood).

    se_of_probes: what the random probes alone leave of uncertainty in the mean.
    """
    def measure(x, text, text_mask, seed):
        log_p, error, _ = flow.log_likelihood(subject.models["ema"], x, text, text_mask,
                                              protocol["steps"], seed=seed)
        return torch.stack([-log_p, flow.bits_per_dim(error, x[0].numel(), pixels=False)], dim=1)
    nats, errors = likelihood_of_images(subject, protocol, "nll", measure)
    number = bits_number(subject, nats, pixels=not subject.data.latents)
    if number["value"] is not None:
        number["se_of_probes"] = errors.square().sum().sqrt().item() / len(errors)
    return {"nll": number}

def measure_vlb_minus_nll(subject, protocol):
    """{"vlb_minus_nll"}: their difference, image by image, over the images of nll (vlb has more).

    It varies far less than either, since both have the same images and noises.
    """
    vlb, nll = (np.load(subject.file(metric, ".npy")) for metric in ("vlb", "nll"))
    gap = torch.from_numpy(vlb[:len(nll)] - nll)
    # Not as pixels: the 7 bits that this would add are in both, and cancel.
    return {"vlb_minus_nll": bits_number(subject, gap, pixels=False)}

# ---- samples -------------------------------------------------------------------------------------

def fd_protocol(subject):
    """How the samples are drawn, in which space they are compared, and with what.

    Raises ValueError for images that the network can't tell apart, and for no more images than
    features: a covariance would be singular.
    """
    config, network, data = subject.config, subject.network, subject.data
    if config.features == "scenes" and not data.describes:
        raise ValueError(f"--features scenes: reads coloured shapes, so it measures nothing on "
                         f"--data {data.config.data}; take --features clip or dinov2")
    about = common_protocol(subject, 2000)
    if about["n"] <= network.width:
        raise ValueError(f"--n {about['n']}: {config.features} has {network.width} features, so "
                         f"the covariance of {about['n']} images is singular: take more")
    reference = f"validation images 0 to {about['n'] - 1}, whose captions the samples have"
    if data.latents:
        vae = data.encoders["vae"]["sha256"]
        reference += f"; their own pixels, not what VAE {vae} makes of them"
    return {**about, "seed": config.seed, "solver": "heun", "steps": config.steps,
            "guidance": config.guidance, "features": network.about, "reference": reference}

@functools.cache  # they are the same for all models
def real_features(network, data, n, batch):
    """Of the validation images 0 to n - 1: (n, width) float64."""
    return for_each_image(n, batch, lambda index: network(data.images("validation", index)),
                          "real images")

def frechet_distance(one, two):
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)) of features (n, d) and (m, d).

    m and S are their means and covariances (Dowson & Landau 1982; Heusel et al. 2017 on Inception
    features). tr (S1 S2)^(1/2) is the sum of the roots of the eigenvalues of S1^(1/2) S2 S1^(1/2),
    a symmetric matrix with none below zero but for rounding: nothing complex comes up.
    """
    S1, S2 = np.cov(one, rowvar=False), np.cov(two, rowvar=False)
    values, vectors = np.linalg.eigh(S1)
    root = vectors * np.sqrt(values.clip(min=0))  # root root^T = S1
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ S2 @ root).clip(min=0)).sum()
    gap = one.mean(0) - two.mean(0)
    return float(gap @ gap + np.trace(S1) + np.trace(S2) - 2 * cross)

def kernel_distance(one, two):
    """KID (Binkowski et al. 2018, arXiv 1801.01401) of features (n, d) and (m, d).

    The unbiased estimate of the squared maximum mean discrepancy under the kernel (x.y / d + 1)^3:
    around 0 for independent sets of one distribution, so negative half the time.
    """
    def total(a, b):
        blocks = np.array_split(a, -(-len(a) // 1000))  # the whole matrix may be large
        return sum(((block @ b.T / a.shape[1] + 1) ** 3).sum() for block in blocks)

    def own(a):
        diagonal = (((a * a).sum(1) / a.shape[1] + 1) ** 3).sum()
        return (total(a, a) - diagonal) / (len(a) * (len(a) - 1))
    return float(own(one) + own(two) - 2 * total(one, two) / (len(one) * len(two)))

def bootstrap_error(distance, real, samples, resamples=30):
    """The standard error of a distance between two sets of n, from resamples of the n pairs.

    Pairs, since an image and the sample for its caption are alike. The mean of the resamples is of
    no use: they have fewer different images, and distances grow with that.
    """
    random = np.random.default_rng(0)
    drawn = [random.integers(len(real), size=len(real)) for _ in range(resamples)]
    return float(np.std([distance(real[rows], samples[rows]) for rows in drawn], ddof=1))

def save_pngs(folder, kind, images, index):
    """PNG files in folder/kind that clean-fid and torch-fidelity read, one an image."""
    target = Path(folder) / kind
    target.mkdir(parents=True, exist_ok=True)
    for number, image in zip(index.tolist(), images.permute(0, 2, 3, 1).cpu().numpy()):
        Image.fromarray(image).save(target / f"{number:06d}.png")

# Functions of features of real images and of samples, (n, d) arrays -> float: one metric each.
DISTANCES = {"fd": frechet_distance, "kid": kernel_distance}

def distance_number(distance, real, samples):
    """The number of one of DISTANCES. Beside it, as a yardstick, between two halves of real images.

    A perfect model falls below it: its samples have the captions of what they are compared with.
    """
    halves = real[::2], real[1::2]
    singular = len(halves[1]) <= real.shape[1]
    return {"value": distance(real, samples), "se": bootstrap_error(distance, real, samples),
            "halves_of_real": None if singular else distance(*halves)}

def measure_fd(subject, protocol):
    """{"fd", "kid", "caption_accuracy"}, all from the same samples; the last where it applies."""
    config, data, network, n = subject.config, subject.data, subject.network, protocol["n"]

    def features_of_samples(index):
        x = subject.samples(index, config.guidance)
        images = data.to_levels(x.nan_to_num())
        if config.save_images:
            save_pngs(config.save_images, "samples", images, index)
            save_pngs(config.save_images, "real", data.images("validation", index), index)
        finite = torch.isfinite(x).flatten(1).all(1, keepdim=True)
        return torch.where(finite, network(images), torch.nan)  # so that the number is refused
    samples = for_each_image(n, config.batch, features_of_samples, "samples")   # (n, width)
    real = real_features(network, data, n, config.batch)                        # (n, width)
    numbers = {metric: refusal(samples) or distance_number(distance, real.numpy(), samples.numpy())
               for metric, distance in DISTANCES.items()}
    if "caption_accuracy" in keys_of("fd", subject):
        numbers["caption_accuracy"] = refusal(samples) or caption_accuracy(subject, real, samples)
    return {metric: {**number, "weights": "ema"} for metric, number in numbers.items()}

def caption_accuracy(subject, real, samples):
    """The share of what captions ask for that the Reader finds in samples, from features (n, d).

    Beside it the shares in real images and, which is what chance gives, in samples for the caption
    of the next image.
    """
    data = subject.data

    def shares(features, index):
        asked = Reader.asked(data.describe("validation", index), data.config.captions)
        return subject.network.accuracy(features.float().to(data.device), asked)

    def means(shares):
        values = {name: share.nanmean().item() for name, share in shares.items()}
        # What no caption asks for has no mean: a sparse one names no ground.
        return {name: round(value, 5) for name, value in values.items() if not math.isnan(value)}
    index = torch.arange(len(samples))
    own = shares(samples, index)
    return {**mean_number(own["all"]), "samples": means(own),
            "real_images": means(shares(real, index)),
            "samples_for_other_captions": means(shares(samples, index + 1))}

# ---- the command ---------------------------------------------------------------------------------

# A group is measured at once, because its metrics look at the same images or samples. It has
#     protocol(subject) -> all that its numbers depend on, a dictionary
#     measure(subject, protocol) -> {metric: {"value", "se", "weights", ...}}, lower is better
GROUPS = {
    "loss": (loss_protocol, measure_loss),
    "vlb": (vlb_protocol, measure_vlb),
    "nll": (nll_protocol, measure_nll),
    "vlb_minus_nll": (nll_protocol, measure_vlb_minus_nll),  # comes with vlb and nll
    "fd": (fd_protocol, measure_fd),
}

def keys_of(group, subject):
    """{metric: the name of its number in the file}, of all metrics of a group that apply.

    fit.py makes a law of each name. So a loss has the name that it has in a record, a distance
    names its features, and what guided samples are measured by names the guidance.
    """
    if group == "loss":
        raw = {"raw_loss": "val_loss"} if "raw" in subject.models else {}
        return {"loss": "val_loss_ema", **raw}
    if group != "fd":
        return {group: group}
    config, data = subject.config, subject.data.config
    keys = {metric: f"{metric}_{config.features.partition(':')[0]}" for metric in DISTANCES}
    # Captions that may have been cut don't ask for all that their images show.
    words = 5 if data.captions == "sparse" else 1 + 5 * MAX_SHAPES
    if config.features == "scenes" and data.text_tokens >= words:
        keys["caption_accuracy"] = "caption_accuracy"
    guided = "" if config.guidance == 1 else f"_g{config.guidance:g}"
    return {metric: key + guided for metric, key in keys.items()}

def read_saved(subject):
    """The numbers in metrics_DATASET.json, {} where it is not there.

    Raises ValueError for a torn or foreign file, and for one about another data set.
    """
    path, dataset = subject.file("metrics", ".json"), subject.data.config.data
    content = read_json(path, ("schema", "data", "metrics"), "delete it to have it made again")
    if content is None or content["schema"] != train.SCHEMA:
        return {}
    if content["data"] != dataset:
        raise ValueError(f"{path}: holds numbers of --data {content['data']}, and --data {dataset} "
                         f"has the same name: rename one of them")
    return content["metrics"]

def say(subject, key, number):
    """Print a number, of how many images it is, and its protocol."""
    said, protocol = f"refused, {number.get('reason')}", number["protocol"]
    if number["value"] is not None:
        said = f"{number['value']:.4f} +- {number['se']:.4f}"
    tqdm.write(f"{subject.path} on {subject.data.config.data}: {key} {said} ({protocol['n']} images"
               f"); {', '.join(f'{name} {value}' for name, value in protocol.items())}")

def evaluate_model(subject):
    """Measure what is missing, write it and print all. -> the value of the first of --metrics."""
    config, saved, asked = subject.config, read_saved(subject), set(subject.config.metrics)
    if {"vlb", "nll"} <= asked:
        asked.add("vlb_minus_nll")
    # All protocols first: what can't be measured is refused before hours are spent on the rest.
    protocols = {group: GROUPS[group][0](subject) for group in GROUPS if group in asked}
    for group, protocol in protocols.items():
        keys = keys_of(group, subject)
        wanted = {key: {"metric": metric, **protocol} for metric, key in keys.items()}
        there = all(key in saved and saved[key]["protocol"] == wanted[key] for key in wanted)
        if not there or config.save_images:  # which wants the samples themselves
            numbers = GROUPS[group][1](subject, protocol)
            for metric, key in keys.items():
                saved[key] = {**numbers[metric], "protocol": wanted[key]}
            content = {"schema": train.SCHEMA, "data": subject.data.config.data, "metrics": saved}
            if ranks()[0] == 0:
                write_json(subject.file("metrics", ".json"), content)
        if ranks()[0] == 0:
            for key in wanted:
                say(subject, key, saved[key])
    # The main metric of a group has the group's name.
    first = config.metrics[0]
    return saved[keys_of(first, subject)[first]]["value"]

def save_picture(subject):
    """A picture of held-out images and, beside each, samples for its caption."""
    data, config = subject.data, subject.config
    # Another model's scale and shift of the latents may have come in between.
    data.use_training_encoders(subject.definition.get("encoders", {}))
    index = torch.arange(min(config.samples, data.validation_images or config.samples))
    groups, title = [data.images("validation", index)], "held-out image"
    for guidance in PICTURE_GUIDANCE:
        groups.append(data.to_levels(subject.samples(index, guidance)))
        title += f" | sample, guidance {guidance}"
    dataset = Path(data.config.data).stem
    target = subject.path.with_name(f"samples_{dataset}.png")
    save_grid(target, groups, data.captions("validation", index),
              f"{' '.join(target.resolve().parts[-3:-1])} on {dataset}: {title} "
              f"(EMA weights, {config.steps} Heun steps)")
    print(f"written: {target}")

def check_image_folder(config, files):
    """Raises ValueError where --save_images would mix images of several models or calls."""
    folder = Path(config.save_images)
    if len(files) > 1 or len(config.data or [""]) > 1 or config.metrics != ["fd"]:
        raise ValueError(f"--save_images {folder}: takes --metrics fd of one model on one data set")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--save_images {folder}: not empty, so other images would be among these")

def evaluate(config):
    """All metrics of all models on all data sets, and a picture of the best model's samples."""
    rank, world = ranks()
    files = find_weights(config.path)
    if config.save_images:
        check_image_folder(config, files)
    device, _ = train.find_device(config.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    network = load_network(config.features, device) if "fd" in config.metrics else None
    load_once = functools.cache(load_data)  # data sets are the same for all models
    best = {}  # of each data set: the lowest value, and whose it is
    for path in tqdm(files, desc="evaluating", unit="model", disable=rank > 0):
        models, definition, shape = load_models(path, device)
        precision = definition["train"]["precision"]
        weights = "+".join(weights_digest(model) for model in models.values())
        for dataset in config.data or [definition["data"]["data"]]:
            data = load_once(data_config_of(definition["data"], dataset), 0, device)
            data.use_training_encoders(definition.get("encoders", {}))
            if data.shape != shape:
                raise ValueError(f"--data {dataset} gives {data.shape}, the model takes {shape}")
            subject = Subject(config, path, models, weights, definition, precision, data, network)
            value = evaluate_model(subject)
            # A refused number is None, and so never the best.
            if value is not None and (dataset not in best or value < best[dataset][0]):
                best[dataset] = value, subject
    if config.samples and rank == 0:
        for _, subject in best.values():
            save_picture(subject)

def main():
    (config,) = parse_flags((EvaluateConfig,), __doc__, positional="path")
    try:
        with errors_in_one_line("evaluate.py"):
            evaluate(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

if __name__ == "__main__":
    main()
