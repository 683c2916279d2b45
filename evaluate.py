"""How good is a trained model, on any data set?

    python evaluate.py results/my-quick --metrics loss vlb nll fd --data scenes scenes-ood
    python evaluate.py results/my-quick/RUN/budget_1e+12 --metrics fd --guidance 2
    torchrun --nproc_per_node=2 -- evaluate.py ...    the same numbers, the images shared out

    loss   validation loss on the trainer's fixed images, times and noises
    vlb    variational bound, bits per dimension of 8-bit pixels
    nll    exact likelihood of the sampler's ODE, in the same unit
    fd     Frechet distance between samples and the real images with the same captions;
           with it kid and, on scenes, caption_accuracy, which look at the same samples

Numbers go to metrics_DATASET.json beside the weights, each with the protocol it was measured by,
and the best model's samples to samples_DATASET.png. A number that is there with the same protocol
is not measured again, so the same command resumes. A killed one repeats one metric of one model.
To add a metric, write a function and a line in METRICS.
"""
import functools
import hashlib
import json
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
                  errors_in_one_line, flag, load_data, one_line, parse_flags, ranks, read_json,
                  save_grid, seeded, write_array, write_json)
from model import DiT, ModelConfig

VLB_TIMES = 64            # noised versions of each image
PICTURE_GUIDANCE = 1, 3   # side by side in the picture of samples
READER = Path(__file__).parent / "results" / "reader" / "reader.safetensors"
READER_SHA256 = "c39e39aac6aa1f2c"
HUB_NAMES = {"clip": "openai/clip-vit-large-patch14", "dinov2": "facebook/dinov2-large"}

@dataclass(frozen=True)
class EvaluateConfig:
    path: str = flag("results/my-quick", "a sweep (its points in fit.py's parabolas), a run, a "
                     "point or a file of weights")
    metrics: List[str] = flag(["loss"], "of loss, vlb, nll and fd; with fd come kid and "
                              "caption_accuracy")
    data: Optional[List[str]] = flag(None, "data sets (default: the one of the training)")
    n: Optional[int] = flag(None, "images (default: loss as in training, vlb 500, nll 250, "
                            "fd 2000; the paper: 10000)")
    steps: int = flag(16, "Heun steps of a sample")
    guidance: float = flag(1.0, "of the samples of fd")
    features: str = flag("scenes", "of fd: scenes, clip, dinov2, or other weights: clip:FOLDER, "
                         "dinov2:HUB_NAME")
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
        for name in self.metrics:
            if name not in METRICS:
                raise ValueError(f"--metrics {name}: take some of {', '.join(METRICS)}")
            if self.guidance != 1 and METRICS[name][1] is not sample_protocol:
                raise ValueError(f"--guidance {self.guidance:g}: a guided model has no density, so "
                                 f"{name} is at guidance 1; take --metrics fd alone")

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
        models = {}
        for kind in weights:
            models[kind] = DiT(ModelConfig(**definition["model"]), **shape)
            models[kind].load_state_dict(weights[kind])
            models[kind].to(device).requires_grad_(False)
        return models, definition, shape
    except Exception as error:  # each reader raises its own kinds; whichever, the file is of no use
        raise ValueError(f"{path}: torn, or not a model of isoflow with averaged weights (ema): "
                         f"{one_line(error)}") from None

def fingerprint(*modules):
    """SHA-256 of their tensors by name, shortened: which weights these are.

    Not of a file, since safetensors orders its metadata at random.
    """
    digest = hashlib.sha256()
    # An averaged and a raw model have the same names, so the order of the modules counts.
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]

@dataclass(eq=False)  # hashed by identity, for the cache of paired_features
class Subject:
    """A trained model on a data set: what a metric is measured on."""
    config: EvaluateConfig
    path: Path          # of the weights
    models: dict        # {"ema": DiT}, and "raw" where the file is a checkpoint
    weights: str        # their fingerprint
    definition: dict    # of the run: the configurations of model, data and training
    data: object        # a source of data.py
    network: object     # images -> features (load_network); None where no metric needs it

    @property
    def precision(self):
        """Of the products: the same as in training."""
        return self.definition["train"]["precision"]

    @property
    def dims(self):
        """Numbers in an x."""
        return self.data.shape["channels"] * self.data.shape["size"] ** 2

    def file(self, what, suffix):
        """A file beside the weights about this data set, metrics_scenes.json for instance."""
        prefix = "" if self.path.suffix == ".safetensors" else "checkpoint_"
        dataset = Path(self.data.config.data).stem
        return self.path.with_name(f"{prefix}{what}_{dataset}{suffix}")

    def samples(self, index, guidance):
        """Samples x for the captions of validation images `index` (B,)."""
        return train.sample_data(self.models["ema"], self.data, self.precision, index,
                                 self.config.steps, "heun", guidance, self.config.seed)

# ---- feature networks: the spaces in which images are compared -----------------------------------

class Reader(nn.Module):
    """A small network that reads scenes at 16 x 16 pixels: --features scenes.

    It tells the ground, and at each of the 9 places the kind, colour and size of what is there.
    """

    SIDE = 16
    CLASSES = {"kind": len(KINDS), "colour": len(COLOURS), "size": len(SIZES)}
    width = 128
    about = {"network": "results/reader/reader.safetensors", "sha256": READER_SHA256,
             "resize": f"antialiased bilinear to {SIDE} pixels where the side differs"}

    def __init__(self):
        super().__init__()
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
            rank = logits.argsort(dim=-1, descending=True).argsort(dim=-1)
            hit = want & (rank < want.sum(-1, keepdim=True))
            shown[name] = hit.sum((1, 2)).double()
            wanted[name] = want.sum((1, 2)).double()
        shares = {"all": sum(shown.values()) / sum(wanted.values())}
        return shares | {name: shown[name] / wanted[name] for name in shown}

def load_reader(path):
    """The Reader in a file, to be used."""
    reader = Reader()
    weights = {name: weight.float() for name, weight in load_file(path).items()}
    # The file lacks BatchNorm's counters of batches; a fingerprint tells if it lacks anything else.
    reader.load_state_dict(weights, strict=False)
    return reader.eval().requires_grad_(False)

class PretrainedFeatures:
    """CLIP's image embeddings (the paper's choice) or DINOv2's pooled output, by transformers.

    Raises ValueError where `source`, a hub name or a folder, has no such weights.
    """

    def __init__(self, kind, source, device):
        import transformers  # here, since it takes seconds that scenes need not spend
        transformers.logging.set_verbosity_error()
        network, self.output, width = {
            "clip": (transformers.CLIPVisionModelWithProjection, "image_embeds", "projection_dim"),
            "dinov2": (transformers.Dinov2Model, "pooler_output", "hidden_size")}[kind]
        try:
            self.network, loaded = network.from_pretrained(source, use_safetensors=True,
                                                           output_loading_info=True)
            self.processor = transformers.AutoImageProcessor.from_pretrained(source)
            missing = [*loaded["missing_keys"], *loaded["mismatched_keys"]]
            if missing:  # transformers would fill them with random numbers
                raise ValueError(f"a {network.__name__} has {len(missing)} weights that it lacks")
        except Exception as error:  # transformers and the hub raise many kinds
            raise ValueError(
                f"--features {kind}: cannot load {source} ({one_line(error)}). Without network: "
                f"fetch config.json, preprocessor_config.json and model.safetensors of "
                f"{HUB_NAMES[kind]} elsewhere, then --features {kind}:FOLDER") from None
        self.network.to(device).eval().requires_grad_(False)
        self.width = getattr(self.network.config, width)
        self.about = {"network": source, "sha256": fingerprint(self.network),
                      "resize": f"{type(self.processor).__name__}: {self.processor.size}, "
                                f"resample {self.processor.resample}"}

    def __call__(self, images):
        """Images (B, 3, R, R) uint8 -> features (B, width)."""
        pictures = [to_picture(image) for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        return self.network(pixels.to(self.network.device))[self.output]

def load_network(features, device):
    """What --features names: a network of images (B, 3, R, R) uint8 -> features (B, width).

    It has two attributes: `width`, and `about`, its part of the protocol. Raises ValueError where
    there is no such network.
    """
    kind, _, source = features.partition(":")
    if kind in HUB_NAMES:
        return PretrainedFeatures(kind, source or HUB_NAMES[kind], device)
    if features != "scenes":
        raise ValueError(f"--features {features}: take scenes, or one of {', '.join(HUB_NAMES)} "
                         f"with :HUB_NAME or :FOLDER for other weights of that kind")
    reader = load_reader(READER)
    if fingerprint(reader) != READER_SHA256:
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
    for number in tqdm(range(rank, len(batches), world), what, leave=False, disable=rank > 0):
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

def summary(values):
    """{"value", "se"}: the mean of values (n,) and its standard error, or a refusal."""
    mean, error = flow.mean_and_standard_error(values)
    return refusal(values) or {"value": mean, "se": error}

def common_protocol(subject, images):
    """What every number depends on. images: how many without --n, or all where there are fewer.

    Raises ValueError where --n is more than there are.
    """
    data, n = subject.data, subject.config.n
    there = data.validation_images or float("inf")  # scenes are endless
    if n and n > there:
        raise ValueError(f"--n {n}: {data.config.data} has only {there} for validation")
    about = {"weights": subject.weights, "precision": subject.precision, "data": data.config.data,
             "resolution": data.config.resolution, "captions": data.config.captions,
             "n": n or min(images, there), "guidance": 1}
    if "images" in data.encoders:
        about["images"] = data.encoders["images"]["sha256"]
    return about

# ---- loss ----------------------------------------------------------------------------------------

def loss_protocol(subject):
    """The trainer's own noises and times, so that the number is that of its record."""
    images = subject.definition["train"]["val_images"] or train.VALIDATION_IMAGES
    return {**common_protocol(subject, images), "seed": train.VALIDATION_SEED,
            "times": "logit-normal, stratified"}

def loss(subject, protocol):
    """{"val_loss_ema"}, and "val_loss" of raw weights: as the trainer computes it, per element."""
    numbers = {}
    for kind, model in subject.models.items():
        losses, times = train.validation_losses(model, subject.data, protocol["n"],
                                                subject.precision, *ranks())
        number = {**summary(losses), "weights": kind}
        if number["value"] is not None:
            number["by_time"] = flow.loss_by_time(losses, times)
        numbers["val_loss_ema" if kind == "ema" else "val_loss"] = number
    return numbers

# ---- likelihoods ---------------------------------------------------------------------------------

def likelihood_protocol(subject, images):
    """What vlb and nll have in common. Their noises, times and probes are drawn by the batch."""
    noise = "drawn from the posterior of the VAE, normalised" if subject.data.latents else "uniform"
    return {**common_protocol(subject, images), "seed": subject.config.seed,
            "batch": subject.config.batch, "dequantised": noise}

def vlb_protocol(subject):
    """Times and noises from the seed, and the range of times that is integrated."""
    return {**likelihood_protocol(subject, 500), "t0": flow.VLB_RANGE[0], "t1": flow.VLB_RANGE[1],
            "times": f"{VLB_TIMES} an image, stratified in log t"}

def nll_protocol(subject):
    """How the ODE is solved and its divergence estimated."""
    return {**likelihood_protocol(subject, 250), "solver": "heun, equal in sqrt(t)",
            "steps": subject.config.likelihood_steps,
            "probes": "1 of random signs, new at each evaluation"}

def likelihood_of_images(subject, protocol, measure):
    """The number of measure(x, text, text_mask, seed) -> (b, columns), nats first; other columns.

    x has its uniform noise (of latents: is drawn from the VAE's posterior). The nats of each image
    are kept in METRIC_DATASET.npy, so that models can be compared image by image.
    """
    data, metric = subject.data, protocol["metric"]

    def compute(index):
        raw, text, text_mask = data.batch("validation", index)
        first = index[0].item()
        x = data.to_x(raw, seeded("u", protocol["seed"], first))
        seed = seeded(metric, protocol["seed"], first).initial_seed()
        with train.autocast(x.device, subject.precision):
            return measure(x, text, text_mask, seed)
    nats, *columns = for_each_image(protocol["n"], protocol["batch"], compute, metric).T
    if ranks()[0] == 0:
        write_array(subject.file(metric, ".npy"), nats.numpy())
    return bits_per_dim(subject, nats, pixels=not data.latents), columns

def bits_per_dim(subject, nats, pixels):
    """The number of nats (n,) in bits per dimension; pixels: of a density of 8-bit pixels."""
    return {**summary(flow.bits_per_dim(nats, subject.dims, pixels)), "weights": "ema",
            "unit": "bits/latent dim" if subject.data.latents else "bits/dim",
            "nats_per_image": summary(nats)["value"]}

def vlb(subject, protocol):
    """{"vlb"}: the bound on -log p of the reverse SDE (flow.vlb), and its parts in nats."""
    names = "prior", "diffusion", "reconstruction"

    def measure(x, text, text_mask, seed):
        bound = flow.vlb(subject.models["ema"], x, text, text_mask, VLB_TIMES, seed)
        return torch.stack([bound[name] for name in ("nats", *names)], dim=1)
    number, columns = likelihood_of_images(subject, protocol, measure)
    for name, column in zip(names, columns):
        number[f"{name}_nats"] = summary(column)["value"]
    return {"vlb": number}

def nll(subject, protocol):
    """{"nll"}: -log p of the sampler's ODE (flow.log_likelihood).

    se_of_probes: what the random probes alone leave of uncertainty in the mean.
    """
    def measure(x, text, text_mask, seed):
        nats, error, _ = flow.log_likelihood(subject.models["ema"], x, text, text_mask,
                                             protocol["steps"], seed=seed)
        return torch.stack([-nats, error], dim=1)
    number, (errors,) = likelihood_of_images(subject, protocol, measure)
    if number["value"] is not None:
        error = errors.square().mean().sqrt() / len(errors) ** 0.5
        number["se_of_probes"] = flow.bits_per_dim(error, subject.dims, pixels=False).item()
    return {"nll": number}

def vlb_minus_nll(subject, protocol):
    """{"vlb_minus_nll"}: their difference, image by image, over the images of nll.

    {} where no vlb of the same weights, images and noise is saved, or it is of fewer images.
    """
    saved = read_saved(subject)
    if ranks()[0] > 0 or "vlb" not in saved:  # rank 0 alone has written the files
        return {}
    of_vlb = saved["vlb"]["protocol"]
    shared = of_vlb.keys() & protocol.keys() - {"metric", "n"}
    if any(of_vlb[key] != protocol[key] for key in shared) or of_vlb["n"] < protocol["n"]:
        return {}
    vlb, nll = (np.load(subject.file(metric, ".npy")) for metric in ("vlb", "nll"))
    gap = torch.from_numpy(vlb[:len(nll)] - nll)
    return {"vlb_minus_nll": bits_per_dim(subject, gap, pixels=False)}

# ---- samples -------------------------------------------------------------------------------------

def sample_protocol(subject):
    """How the samples are drawn, in which space they are compared, and with what.

    Raises ValueError for no more images than features: a covariance would be singular.
    """
    config, network, data = subject.config, subject.network, subject.data
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

@functools.cache  # the same for all models
def real_features(network, data, n, batch, folder):
    """Of the validation images 0 to n - 1, which also go to PNG files in a folder: (n, width)."""
    def compute(index):
        images = data.images("validation", index)
        save_images(folder, "real", images, index)
        return network(images)
    return for_each_image(n, batch, compute, "real images")

@functools.lru_cache(maxsize=1)  # fd, kid and caption_accuracy look at the same samples
def paired_features(subject, n):
    """Of real images and of samples for their captions, nan of samples that are not finite.

    Two (n, width) float64.
    """
    config, data, network = subject.config, subject.data, subject.network

    def compute(index):
        x = subject.samples(index, config.guidance)
        images = data.to_levels(x.nan_to_num())
        save_images(config.save_images, "samples", images, index)
        finite = torch.isfinite(x).flatten(1).all(1, keepdim=True)
        return torch.where(finite, network(images), torch.nan)
    samples = for_each_image(n, config.batch, compute, "samples")
    return real_features(network, data, n, config.batch, config.save_images), samples

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

def of_features(distance):
    """The metric of a distance between two sets of features, (n, d) arrays -> float.

    halves_of_real, the distance between two halves of the real images, is a yardstick. A perfect
    model falls below it: its samples have the captions of the images that they are compared with.
    """
    def measure(subject, protocol):
        real, samples = paired_features(subject, protocol["n"])
        number = refusal(samples)
        if number is None:
            real, samples = real.numpy(), samples.numpy()
            halves = real[::2], real[1::2]
            singular = len(halves[1]) <= subject.network.width
            number = {"value": distance(real, samples),
                      "se": bootstrap_error(distance, real, samples),
                      "halves_of_real": None if singular else distance(*halves), "weights": "ema"}
        return {f"{protocol['metric']}_{subject.config.features.partition(':')[0]}": number}
    return measure

def caption_accuracy(subject, protocol):
    """{"caption_accuracy"}: the share of what captions ask for that the Reader finds in samples.

    Beside it the shares in real images and, which is what chance gives, in samples for the caption
    of the next image. {} where nothing describes the images, or captions are cut.
    """
    data = subject.data
    words = 5 if data.config.captions == "sparse" else 1 + 5 * MAX_SHAPES
    if subject.config.features != "scenes" or not data.describes or data.config.text_tokens < words:
        return {}

    def shares(features, index):
        asked = Reader.asked(data.describe("validation", index), data.config.captions)
        return subject.network.accuracy(features.float().to(data.device), asked)

    def means(shares):  # without what no caption asks for
        values = {name: share.nanmean().item() for name, share in shares.items()}
        return {name: round(value, 5) for name, value in values.items() if value == value}
    real, samples = paired_features(subject, protocol["n"])
    index = torch.arange(len(samples))
    own = shares(samples, index)
    return {"caption_accuracy": refusal(samples) or {
        **summary(own["all"]), "weights": "ema", "samples": means(own),
        "real_images": means(shares(real, index)),
        "samples_for_other_captions": means(shares(samples, index + 1))}}

# name: (function(subject, protocol) -> {key in the file: number}, function(subject) -> protocol).
# A number is {"value", "se", ...}. A metric that does not apply to the data gives {}. Who asks for
# one gets all with its protocol: they look at the same images, and samples are what costs.
METRICS = {
    "loss": (loss, loss_protocol),
    "vlb": (vlb, vlb_protocol),
    "nll": (nll, nll_protocol),
    "vlb_minus_nll": (vlb_minus_nll, nll_protocol),
    "fd": (of_features(frechet_distance), sample_protocol),
    "kid": (of_features(kernel_distance), sample_protocol),
    "caption_accuracy": (caption_accuracy, sample_protocol),
}

# ---- pictures ------------------------------------------------------------------------------------

def to_picture(image):
    """(3, R, R) uint8 -> a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())

def save_images(folder, kind, images, index):
    """PNG files that clean-fid and torch-fidelity read, one an image; none where folder is None."""
    if folder:
        target = Path(folder) / kind
        target.mkdir(parents=True, exist_ok=True)
        for number, image in zip(index.tolist(), images):
            to_picture(image).save(target / f"{number:06d}.png")

def save_samples(subject):
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

# ---- the command ---------------------------------------------------------------------------------

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
    """Print a number with its protocol."""
    said = f"refused, {number.get('reason')}"
    if number["value"] is not None:
        said = f"{number['value']:.4f} +- {number['se']:.4f}"
    protocol = ", ".join(f"{name} {value}" for name, value in number["protocol"].items())
    tqdm.write(f"{subject.path} on {subject.data.config.data}: {key} {said}; {protocol}")

def evaluate_point(subject):
    """Measure and write what is missing, print all. -> the value of the first number.

    By it models are ranked: the first metrics of METRICS are better where they are lower.
    """
    config, saved, values = subject.config, read_saved(subject), []
    wanted = {METRICS[name][1] for name in config.metrics}
    protocols = {name: {"metric": name, **protocol_of(subject)}
                 for name, (_, protocol_of) in METRICS.items() if protocol_of in wanted}
    for name, protocol in protocols.items():
        numbers = {key: number for key, number in saved.items() if number["protocol"] == protocol}
        if not numbers or config.save_images:
            # A guided number has a name of its own, and so a law of its own.
            suffix = "" if protocol["guidance"] == 1 else f"_g{protocol['guidance']:g}"
            for key, number in METRICS[name][0](subject, protocol).items():
                numbers[key + suffix] = {**number, "protocol": protocol}
            saved |= numbers
            if numbers and ranks()[0] == 0:
                write_json(subject.file("metrics", ".json"), {
                    "schema": train.SCHEMA, "data": subject.data.config.data, "metrics": saved})
        if not numbers and name in config.metrics and ranks()[0] == 0:
            raise ValueError(f"--metrics {name}: can't be measured on {subject.data.config.data}")
        for key, number in numbers.items():
            values.append(number["value"])
            if ranks()[0] == 0:
                say(subject, key, number)
    return values[0]

def check_image_folder(config, files):
    """Raises ValueError where --save_images would mix images of several models or calls."""
    if len(files) > 1 or len(config.data or [""]) > 1 or config.metrics != ["fd"]:
        raise ValueError(f"--save_images {config.save_images}: takes --metrics fd of one model "
                         f"on one data set")
    folder = Path(config.save_images)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"--save_images {folder}: not empty, so other images would be among these")

def evaluate(config):
    """All metrics of all models on all data sets, and a picture of the best model's samples.

    Raises ValueError for input that can't be used.
    """
    rank, world = ranks()
    files = find_weights(config.path)
    if config.save_images:
        check_image_folder(config, files)
    device, _ = train.find_device(config.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    of_samples = any(METRICS[name][1] is sample_protocol for name in config.metrics)
    network = load_network(config.features, device) if of_samples else None
    load_once = functools.cache(load_data)
    best = {}  # of each data set the lowest value, and whose it is
    for path in tqdm(files, desc="evaluating", unit="model", disable=rank > 0):
        models, definition, shape = load_models(path, device)
        weights = fingerprint(*models.values())
        for dataset in config.data or [definition["data"]["data"]]:
            data = load_once(data_config_of(definition["data"], dataset), 0, device)
            data.use_training_encoders(definition.get("encoders", {}))
            if data.shape != shape:
                raise ValueError(f"--data {dataset} gives {data.shape}, the model takes {shape}")
            subject = Subject(config, path, models, weights, definition, data, network)
            value = evaluate_point(subject)
            if value is not None and (dataset not in best or value < best[dataset][0]):
                best[dataset] = value, subject
    if config.samples and rank == 0:
        for _, subject in best.values():
            save_samples(subject)

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
