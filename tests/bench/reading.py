"""How fast are prepared latents read, and what does `prepare` cost beside its encoders? python tests/bench/reading.py [folder]

First table: random rows of synthetic shards (32 x 32 x 4 latents of both mirrors, 77 x 768 CLIP features, float16; written to
`folder` or a temporary one, 0.9 GB) from a warm page cache, by one reader and by two side by side: images/s, bytes read an image,
GB/s; and how many times what the quick model of width 40 consumes on one thread. Second: `prepare` on 512 images with a small
VAE and a small CLIP of random weights, beside a loop that does nothing but encode the same pixels and captions.
"""
import json
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(HERE)), os.path.dirname(HERE), HERE]
import data
import flow
import tiny
import train
from data import DataConfig, Latents, PrepareConfig
from model import DiT, ModelConfig

torch.set_num_threads(1)
BATCH, ROWS, SHARDS, S, F, SIZE = 64, 1024, 6, 77, 768, 32


class NoVAE:
    channels = 4


def write_synthetic(folder):
    """Shards in the format of prepare, of random numbers, with captions that fill all slots: the most there is to read."""
    random = np.random.default_rng(0)
    names = [f"train-{k:05d}.arrow" for k in range(SHARDS)]
    for k, name in enumerate(names):
        moments = random.standard_normal((ROWS, 2, 2, 4, SIZE, SIZE), np.float32).astype(np.float16)
        text = random.standard_normal((S, F), np.float32).astype(np.float16)
        good = {"row": list(range(ROWS)), "validation": [row < 8 for row in range(ROWS)], "digest": [random.bytes(8) for _ in range(ROWS)],
                "width": [256] * ROWS, "height": [256] * ROWS, "moments": [row.tobytes() for row in moments], "captions": [["caption"]] * ROWS,
                "text": [[(text + k).tobytes()] for _ in range(ROWS)], "image": [None] * ROWS}
        data.write_shard(os.path.join(folder, name), [{"rows": ROWS, "remarks": [], "good": good}], PrepareConfig(), NoVAE, "train")
    stats = {"format": 1, "input": {"resolution": 256, "text": "clip", "text_tokens": S, "text_dim": F}, "channels": 4, "size": SIZE,
             "store": "float16", "text_store": "features", "shift": [0.0] * 4, "scale": [1.0] * 4, "shards": names,
             "encoders": {"vae": {"name": "none", "sha256": "0"}}, "remarks": {"rows": []}}
    Path(folder, "stats.json").write_text(json.dumps(stats))


def quick_speed():
    """Images/s of a training step of the quick model of width 40, one thread, without its data."""
    config, source = train.TrainConfig(), data.load_data(DataConfig())
    model = DiT(ModelConfig(depth=2, width=40), **source.shape)
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-3), fused=True)
    batch, seconds = train.training_batch(source, config, 1, 0, 1, torch.device("cpu")), []
    for _ in range(60):
        start = time.perf_counter()
        flow.loss_per_image(model, *batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return config.batch / sorted(seconds)[30]


def bench_reading(folder):
    quick = quick_speed()
    print(f"the quick model of width 40 consumes {quick:,.0f} images/s on one thread\n")
    bytes_read = 2 * 4 * SIZE * SIZE * 2 + S * F * 2
    print(f"{'reading':>34} {'readers':>8} {'images/s':>10} {'bytes/image':>12} {'GB/s':>6} {'x quick model':>14}")
    for what, work in (("rows of the shards", lambda source, index: gather(source, index)),
                       ("batch(): padded, float32, mask", lambda source, index: source.batch("train", index)),
                       ("batch() and x from its moments", lambda source, index: source.to_x(source.batch("train", index)[0], torch.Generator().manual_seed(0)))):
        for readers in (1, 2):
            sources = [Latents(DataConfig(data=folder, flip=True), seed) for seed in range(readers)]

            def read(source, batches):
                for k in range(batches):
                    work(source, torch.arange(k * BATCH, (k + 1) * BATCH))
            per_epoch = sources[0].train_images // BATCH
            with ThreadPoolExecutor(readers) as pool:
                list(pool.map(read, sources, [per_epoch] * readers))   # warms the cache
                start = time.perf_counter()
                list(pool.map(read, sources, [2 * per_epoch] * readers))
                rate = 2 * per_epoch * BATCH * readers / (time.perf_counter() - start)
            print(f"{what:>34} {readers:8d} {rate:10,.0f} {bytes_read:12,d} {rate * bytes_read / 1e9:6.2f} {rate / quick:14.1f}")


def gather(source, index):
    """The part of batch() that touches the shards: random rows, one mirror, one caption, into one piece of memory."""
    chosen = source.choose("train", index)
    data.padded([shard.text_of(row, caption).view(np.float16).reshape(-1, F) for shard, row, caption, _ in chosen], S, F)
    moments = np.empty((len(chosen), 2 * 4 * SIZE * SIZE * 2), np.uint8)
    for out, (shard, row, _, mirror) in zip(moments, chosen):
        out[:] = shard.moments[row, mirror]


def bench_prepare(folder, images=512, resolution=64):
    vae, clip = tiny.tiny_vae(f"{folder}/vae", (16, 32, 32)), tiny.tiny_clip(f"{folder}/clip")
    path = tiny.write_parquet(f"{folder}/a.parquet", [tiny.picture(k, 96, "JPEG") for k in range(images)], [tiny.caption(k) for k in range(images)])
    config, settings = DataConfig(data=path, resolution=resolution, text=clip), PrepareConfig(out=f"{folder}/out", vae=vae, device="cpu")
    source, network, text = data.Images(config), data.VAE(vae, "cpu"), data.PretrainedText(config, "cpu")
    pixels = torch.cat(list(source.pixels.values()))[:images]
    captions = [caption for texts in source.texts.values() for caption in texts]
    print(f"\n{'prepare, ' + str(images) + ' images':>34} {'seconds':>8} {'CPU seconds':>12} {'images/s':>10}")
    bare, own = [], []   # (seconds, CPU seconds of all threads)
    for repeat in range(3):   # in turns, and the best of each: other processes come and go
        start = time.perf_counter(), time.process_time()
        for k in range(0, images, settings.batch):
            network.moments(pixels[k:k + settings.batch])
            text.features(text.encode(captions[k:k + settings.batch]))
        bare.append((time.perf_counter() - start[0], time.process_time() - start[1]))
        marks = {}
        settings = PrepareConfig(out=f"{folder}/out{repeat}", vae=vae, device="cpu")
        encode = data.encode_batch

        def timed(*arguments):
            marks.setdefault("start", (time.perf_counter(), time.process_time()))
            return encode(*arguments)
        data.encode_batch = timed
        data.prepare(config, settings)
        data.encode_batch = encode
        own.append((time.perf_counter() - marks["start"][0], time.process_time() - marks["start"][1]))   # without loading the networks, which a large set spends once
    best = [[min(values) for values in zip(*times)] for times in (bare, own)]
    for what, (seconds, cpu) in zip(("the encoders alone", "prepare, after loading them"), best):
        print(f"{what:>34} {seconds:8.2f} {cpu:12.2f} {images / seconds:10,.0f}")
    print(f"overhead {best[1][0] / best[0][0] - 1:.1%} of the time, {best[1][1] / best[0][1] - 1:.1%} of the CPU time (decoding, PNG and writing are on other threads)")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = sys.argv[1] if len(sys.argv) > 1 else temporary
        os.makedirs(folder, exist_ok=True)
        write_synthetic(folder)
        bench_reading(folder)
        bench_prepare(temporary)
