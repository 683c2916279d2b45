"""How good is a trained model, on any data set?

    python evaluate.py results/my-quick --data scenes scenes-ood      every point of a sweep
    python evaluate.py results/train/depth02_width032_seed0           one run: its points and its checkpoint
    python evaluate.py .../budget_1e+12/ema.safetensors --guidance 1 3

Validation loss on the fixed images, times and noises of the trainer (of raw weights too, where a checkpoint holds them),
written next to the weights as metrics_DATASET.json, and a picture of samples beside held-out images with the same captions.
Only what is missing is computed.
"""
import glob
import hashlib
import json
import os
import sys
from dataclasses import dataclass, field
from typing import List, Literal, Optional

import torch
from safetensors import safe_open
from tqdm import tqdm

import flow
import train
from data import DataConfig, load_data, save_grid
from model import DiT, ModelConfig, parse_flags


@dataclass(frozen=True)
class EvaluateConfig:
    path: str = field(default="results/my-quick", metadata={
        "help": "a results directory, a run, a point, an ema.safetensors or a checkpoint.pt"})
    data: Optional[List[str]] = field(default=None, metadata={"help": "data sets (default: the one of the training)"})
    n: Optional[int] = field(default=None, metadata={
        "help": "validation images, at most those that there are (default: as many as in the training's own records)"})
    samples: int = field(default=16, metadata={"help": "samples in the picture; 0 for no picture"})
    steps: int = field(default=16, metadata={"help": "sampling steps"})
    solver: Literal["heun", "euler"] = field(default="heun", metadata={"help": "of the samples"})
    guidance: List[float] = field(default_factory=lambda: [3.0], metadata={"help": "of the samples, side by side in the picture"})
    seed: int = field(default=0, metadata={"help": "of the samples' noise"})
    device: Literal["auto", "cpu", "cuda"] = field(default="auto", metadata={"help": "where to evaluate"})

    def __post_init__(self):
        if self.n is not None and self.n < 2:
            raise ValueError(f"--n {self.n}: a standard error needs at least 2 images")
        if self.samples < 0 or (self.n and self.samples > self.n):
            raise ValueError(f"--samples {self.samples}: must be from 0 to --n")
        if self.steps < 1:
            raise ValueError(f"--steps {self.steps}: must be at least 1")


def find_weights(path):
    """The weights at a path: a file; of a run its points and its checkpoint; of a results directory all points.

    Raises ValueError where there are none.
    """
    if os.path.isfile(path):
        return [path]
    if not os.path.isdir(path):
        raise ValueError(f"{path}: no such file or folder")
    points = glob.glob(os.path.join(glob.escape(path), "**", "ema.safetensors"), recursive=True)
    found = sorted(points) + glob.glob(os.path.join(glob.escape(path), "checkpoint.pt"))
    if not found:
        raise ValueError(f"{path}: no ema.safetensors and no checkpoint.pt in it (published results come without weights: "
                         f"make your own with python sweep.py or python train.py)")
    return found


def load_models(path, device):
    """-> {"ema": DiT, and "raw": DiT where the file is a checkpoint}, the definition of their run, the shape of their input.

    Nothing in the file is executed. Raises ValueError for a torn or foreign file.
    """
    try:
        if path.endswith(".safetensors"):
            with safe_open(path, "pt") as file:
                about = file.metadata()
                weights = {"ema": {name: file.get_tensor(name) for name in file.keys()}}
        else:
            about = torch.load(path, map_location="cpu", weights_only=True)
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


def saved_metrics(target, protocol):
    """What an earlier call wrote to metrics_DATASET.json by the same protocol, or None."""
    if not os.path.exists(target):
        return None
    try:
        with open(target) as file:
            saved = json.load(file)
        return saved["metrics"] if saved["schema"] == train.SCHEMA and saved["protocol"] == protocol else None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        raise ValueError(f"{target}: torn, or not of isoflow: delete it to have it made again") from None


def validation_metrics(models, data, definition, n):
    """{"val_loss_ema": {"value", "se", "by_time"}, and "val_loss" of raw weights}; per element, at guidance 1."""
    config = train.TrainConfig(val_images=n, precision=definition["train"]["precision"])
    metrics = {}
    for kind, model in models.items():
        losses, times = train.validation_losses(model, data, config)
        mean, error = flow.mean_and_standard_error(losses)
        metrics["val_loss_ema" if kind == "ema" else "val_loss"] = {
            "value": mean, "se": error, "by_time": flow.loss_by_time(losses, times)}
    return metrics


def save_samples(path, model, data, definition, config, title):
    """A picture of held-out images and, beside each, samples for its caption, one for each value of guidance."""
    trained = train.TrainConfig(precision=definition["train"]["precision"])
    index = torch.arange(min(config.samples, data.validation_images or config.samples))
    groups = [data.batch("validation", index)[0]]
    for guidance in config.guidance:
        groups.append(train.sample_images(model, data, trained, index, config.steps, config.solver, guidance, config.seed))
    columns = ["held-out image", *(f"sample, guidance {guidance:g}" for guidance in config.guidance)]
    save_grid(path, groups, data.captions("validation", index),
              f"{title}: {' | '.join(columns)} (EMA weights, {config.steps} {config.solver.title()} steps)")


def main():
    (config,) = parse_flags((EvaluateConfig,), __doc__, positional="path")
    try:
        device, *_ = train.find_device(config.device, "auto")
        files, sources, pictures = find_weights(config.path), {}, {}
        for path in tqdm(files, desc="evaluating", unit="model"):
            models, definition, shape = load_models(path, device)
            for dataset in config.data or [definition["data"]["data"]]:
                data_config = DataConfig(**{**definition["data"], "data": dataset})
                if data_config not in sources:
                    sources[data_config] = load_data(data_config, 0, device)
                data = sources[data_config]
                if data.shape != shape:
                    raise ValueError(f"--data {dataset} gives {data.shape}, the model takes {shape}")
                n = config.n or definition["train"]["val_images"] or train.VALIDATION_IMAGES
                n = min(n, data.validation_images or n)
                name = os.path.splitext(os.path.basename(dataset.rstrip("/")))[0]
                kind = "metrics" if path.endswith(".safetensors") else "checkpoint_metrics"
                target = os.path.join(os.path.dirname(path), f"{kind}_{name}.json")
                protocol = {"data": dataset, "weights": fingerprint(path), "n": n, "guidance": 1, "times": "logit-normal, stratified",
                            "seed": train.VALIDATION_SEED, "resolution": data_config.resolution, "captions": data_config.captions}
                metrics = saved_metrics(target, protocol)
                if metrics is None:
                    metrics = validation_metrics(models, data, definition, n)
                    train.write_json(target, {"schema": train.SCHEMA, "data": dataset, "metrics": metrics, "protocol": protocol})
                tqdm.write(f"{path} on {n} images of {name}: " + ", ".join(
                    f"{metric} {number['value']:.4f} +- {number['se']:.4f}" for metric, number in metrics.items()))
                if name not in pictures or metrics["val_loss_ema"]["value"] < pictures[name][0]:  # the best model's is wanted
                    pictures[name] = metrics["val_loss_ema"]["value"], path, models["ema"], data, definition
        for name, (_, path, model, data, definition) in pictures.items() if config.samples else ():
            target = os.path.join(os.path.dirname(path) or ".", f"samples_{name}.png")
            which = " ".join(os.path.dirname(os.path.abspath(path)).split(os.sep)[-2:])   # the run and its budget
            save_samples(target, model, data, definition, config, f"{which} on {name}")
            print(f"written: {target}")
    except (ValueError, OSError, RuntimeError) as error:
        print(f"evaluate.py: {train.one_line(error)}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ValueError) else 1)


if __name__ == "__main__":
    main()
