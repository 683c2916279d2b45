"""Train the network of `evaluate.py --features scenes` anew: python tests/bench/reader.py FILE

Four minutes on 2 cores. It learns to read scenes of both mixes, and is written in float16 (435 kB).
The network that all published numbers are measured with is results/reader/reader.safetensors: a new
one in its place is another space, so evaluate.READER_SHA256 must then be what this script prints.
"""
import argparse
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import evaluate
from data import DataConfig, Scenes, weights_digest, write_whole
from evaluate import Reader


def targets(scene):
    """What the network must tell of a scene: what its dense caption asks for, and "nothing there".

    Counts of shapes by class, like Reader.asked; the last class of a place that has no shape is 1.
    """
    counts = Reader.asked(scene, "dense")
    for name in Reader.CLASSES:
        counts[name][..., -1] = (counts[name].sum(-1) == 0).float()
    return counts


def loss_of(reader, parts):
    """Cross entropy with the classes at each place, summed over places.

    parts: [(images (B, 3, R, R) uint8, targets)]. Where several shapes are at a place, each has its
    share of the probability.
    """
    images = torch.cat([images for images, _ in parts])
    loss = 0
    for name, logits in reader.read(reader(images)).items():
        want = torch.cat([counts[name] for _, counts in parts])
        share = want / want.sum(-1, keepdim=True)
        loss = loss - (share * logits.log_softmax(-1)).sum((1, 2)).mean()
    return loss


def train(worlds, steps, batch):
    """A new Reader, trained on both worlds at once."""
    torch.manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps,
                                                   pct_start=0.1)
    for step in (bar := tqdm(range(steps), desc="reader", unit="step")):
        index = torch.arange(step * batch // 2, (step + 1) * batch // 2)
        scenes = [(world, world.describe("train", index)) for world in worlds]
        loss = loss_of(reader, [(world.draw(scene), targets(scene)) for world, scene in scenes])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
    return reader.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="where to write it")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--batch", type=int, default=256, help="images a step, half of each world")
    flags = parser.parse_args()
    worlds = [Scenes(DataConfig(data=data, resolution=Reader.SIDE), seed=1)
              for data in ("scenes", "scenes-ood")]
    reader = train(worlds, flags.steps, flags.batch)
    weights = {name: weight.half() for name, weight in reader.state_dict().items()
               if weight.is_floating_point()}
    write_whole(flags.file, lambda temporary: save_file(weights, temporary))
    reader = evaluate.load_reader(flags.file)  # as evaluate.py will have it
    for world in worlds:
        scene = world.describe("validation", torch.arange(4096))
        scores = reader.accuracy(reader(world.draw(scene)), Reader.asked(scene, "dense"))
        read = ", ".join(f"{name} {score.nanmean():.1%}" for name, score in scores.items())
        print(f"{world.config.data}: it reads {read}")
    print(f"written: {flags.file}, {os.path.getsize(flags.file):,} bytes, "
          f"READER_SHA256 {weights_digest(reader)}")


if __name__ == "__main__":
    main()
