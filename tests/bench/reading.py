"""How fast are data sets read, and what does `prepare` cost beside its encoders?

    python tests/bench/reading.py

Prints one table: images/s of `batch` on one thread from a warm page cache, and how many times that
is what the largest model of the quick family consumes. The latents have the size of Stable
Diffusion's at 256 pixels, with CLIP-L's features for captions that fill 77 slots (135 kB an image),
but are made by encoders of no weight.
"""
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch

import data
import flow
import tiny
from data import DataConfig, load_data
from model import DiT, ModelConfig

IMAGES, BATCH = 512, 64


def seconds_of(work, times):
    """The median time of a call, after one that warms up."""
    found = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return sorted(found[1:])[times // 2]


def training_rate(depth=4, width=64):
    """Images/s of the training step of a model, without its data."""
    source = load_data(DataConfig())
    model = DiT(ModelConfig(depth=depth, width=width), **source.shape)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3), fused=True)
    raw, text, mask = source.batch("train", torch.arange(BATCH))
    generator = torch.Generator().manual_seed(0)
    x = source.to_x(raw, generator)
    eps, t = torch.randn(x.shape, generator=generator), torch.rand(BATCH, generator=generator)

    def step():
        flow.loss_per_image(model, x, eps, t, text, mask).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return BATCH / seconds_of(step, 15)


def reading_rate(source, batches=200):
    """Images/s of `batch` on the samples of training, in order: random rows of the set."""
    for start in (0, time.perf_counter()):      # the first time to warm up
        for number in range(batches):
            source.batch("train", torch.arange(BATCH) + BATCH * number)
    return batches * BATCH / (time.perf_counter() - start)


def main(folder):
    vae = tiny.tiny_vae(f"{folder}/vae", (4, 4, 8, 8))
    clip = tiny.tiny_clip(f"{folder}/clip", width=768)
    images = [tiny.picture(k, 256, "JPEG") for k in range(IMAGES)]
    captions = [f"{k} " + "word " * 40 for k in range(IMAGES)]
    path = tiny.write_parquet(f"{folder}/a.parquet", images, captions)
    raw = DataConfig(data=path, resolution=16)
    config = DataConfig(data=path, resolution=256, text=clip)
    load_data(raw)      # datasets reads the file, which is no part of what is compared
    start = time.perf_counter()
    data.prepare(config, data.PrepareConfig(out=f"{folder}/set", vae=vae))
    prepare = IMAGES / (time.perf_counter() - start)

    network, pixels = data.VAE(vae, "cpu"), torch.zeros(16, 256, 256, 3, dtype=torch.uint8)
    encoder = data.PretrainedText(config, "cpu")
    alone = 16 / seconds_of(
        lambda: (network.moments(pixels), encoder.features(captions[:16])), 5)

    quick = training_rate()
    print(f"{'':34} {'images/s':>9} {'x a 4 x 64 model':>17}")
    sources = {"scenes, 16 pixels": load_data(DataConfig()), "images, 16 pixels": load_data(raw),
               "latents 32 x 32 x 4, 77 x 768": load_data(DataConfig(data=f"{folder}/set"))}
    rates = {name: reading_rate(source) for name, source in sources.items()}
    rates |= {"training of a 4 x 64 model": quick, "prepare, with loading its encoders": prepare,
              "these encoders alone": alone}
    for name, rate in rates.items():
        print(f"{name:34} {rate:9,.0f} {rate / quick:17.1f}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        main(temporary)
