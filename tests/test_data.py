"""data.py: the drawn world, rows of all kinds, encoders, and what prepare makes of them."""
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import data
import evaluate
import tiny
import train
from data import DataConfig, PrepareConfig, PretrainedText, Scenes, hash_features, load_data
from model import ModelConfig

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "SHARD_ROWS", 16)


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {"vae": tiny.tiny_vae(folder / "vae"), "clip": tiny.tiny_clip(folder / "clip"),
            "t5": tiny.tiny_t5(folder / "t5")}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return tiny.parquet(tmp_path_factory.mktemp("source") / "a.parquet", 150)


@pytest.fixture
def prepared(tmp_path, encoders, source, prepared_once):
    """A folder of prepare: made once, copied for each test."""
    if not prepared_once.exists():
        make(prepared_once, source, encoders)
    return Path(shutil.copytree(prepared_once, tmp_path / "prepared"))


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory):
    return tmp_path_factory.mktemp("prepared") / "set"


def load(path, seed=0, **more):
    """A data set of small images."""
    return load_data(DataConfig(**{"data": str(path), "resolution": 8, **more}), seed)


def epoch(source, split="train"):
    """The numbers of all images of a split."""
    return torch.arange(source.train_images if split == "train" else source.validation_images)


def everything(source):
    """What a set holds, whatever its order: pixels and captions of each split."""
    found = {}
    for split in ("train", "validation"):
        images = source.images(split, epoch(source, split))
        captions = source.captions(split, epoch(source, split))
        found[split] = sorted(zip([image.numpy().tobytes() for image in images], captions))
    return found


def make(out, path, encoders, text="clip", **more):
    """data.py prepare in this process."""
    vae = more.pop("vae", encoders["vae"])
    config = DataConfig(**{"data": str(path), "resolution": 16, "text": encoders.get(text, text),
                           **more})
    data.prepare(config, PrepareConfig(out=str(out), vae=vae))
    return Path(out)


def run(out, *flags, budget="1e9"):
    """train.py in this process -> its records."""
    argv = ["--depth", "1", "--width", "8", "--warmup", "1", "--device", "cpu", "--threads", "1",
            "--out", str(out), "--budget", budget, *flags]
    types = ModelConfig, DataConfig, train.TrainConfig
    return train.train(*data.parse_flags(types, train.__doc__, train.PRESETS, argv=argv))


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def refused(said, action, *arguments, **more):
    """What is wrong is a ValueError of one line."""
    with pytest.raises(ValueError, match=said) as caught:
        action(*arguments, **more)
    assert "\n" not in str(caught.value)


# ---- the drawn world ---------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["scenes", "scenes-ood"])
def test_scenes_are_a_pure_function_of_seed_and_index(name):
    index = torch.tensor([5, 0, 10 ** 10, 17, 3])
    whole = load(name, seed=3).batch("train", index)
    alone = load(name, seed=3)
    for k in reversed(range(len(index))):
        one = alone.batch("train", index[k:k + 1])
        assert all(torch.equal(part[0], together[k]) for part, together in zip(one, whole))
    assert not torch.equal(load(name, seed=4).batch("train", index)[0], whole[0])
    images = load(name, resolution=16).batch("train", torch.arange(500))[0]
    assert len({image.numpy().tobytes() for image in images}) == 500


def test_scenes_are_the_same_for_everybody():
    """A checksum of pixels and captions: another world means other published numbers."""
    scenes, index = Scenes(DataConfig()), torch.arange(256)
    captions = "\n".join(scenes.captions("validation", index)).encode()
    pixels = scenes.batch("validation", index)[0].numpy().tobytes()
    assert hashlib.sha256(pixels + captions).hexdigest()[:16] == "a9f8fdb5b15030ca"


def test_validation_is_one_set_for_all_seeds_and_not_in_training():
    index = torch.arange(50)
    first, second = (Scenes(DataConfig(), seed).batch("validation", index)[0] for seed in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(Scenes(DataConfig()).batch("train", index)[0], first)


def test_captions_say_what_is_there():
    """Where one disc is alone, its middle has the colour and lies in the cell that are named."""
    scenes, index = Scenes(DataConfig(resolution=64)), torch.arange(1000)
    scene, captions = scenes.describe("train", index), scenes.captions("train", index)
    is_alone = (scene["there"].sum(1) == 1) & (scene["kind"][:, 0] == data.KINDS.index("disc"))
    is_alone &= scene["texture"][:, 0] == data.TEXTURES.index("plain")
    images = scenes.draw(scene)
    colours = torch.tensor(list(data.COLOURS.values()))
    for k in is_alone.nonzero()[:, 0].tolist():
        x, y = scene["centre"][k, 0].tolist()
        rgb = images[k, :, int(y * 64), int(x * 64)] / 255
        colour = list(data.COLOURS)[(colours - rgb).abs().sum(1).argmin()]
        assert f" {colour} disc {data.PLACES[3 * int(3 * y) + int(3 * x)]}" in captions[k]
    assert is_alone.sum() > 10
    assert captions[0] == "grey: large white bar west, checked cyan cross northwest"
    assert max(len(one.replace(":", " ").split()) for one in captions) <= 16


def test_sparse_names_one_shape_of_the_same_images():
    dense, sparse = Scenes(DataConfig()), Scenes(DataConfig(captions="sparse"))
    index = torch.arange(100)
    assert torch.equal(dense.batch("train", index)[0], sparse.batch("train", index)[0])
    for many, one in zip(dense.captions("train", index), sparse.captions("train", index)):
        assert one and "," not in one and f": {one}" in many


def test_limited_scenes_come_again_and_again():
    few, endless = Scenes(DataConfig(images=100), seed=1), Scenes(DataConfig(), seed=1)
    index = torch.arange(90, 110)
    for ours, theirs in zip(few.batch("train", index), endless.batch("train", index % 100)):
        assert torch.equal(ours, theirs)
    assert few.captions("train", index) == endless.captions("train", index % 100)
    validation = (one.batch("validation", index)[0] for one in (few, endless))  # is never limited
    assert few.train_images == 100 and torch.equal(*validation)


@pytest.mark.parametrize("captions", ["dense", "sparse"])
def test_features_of_scenes_are_those_of_their_captions(captions):
    """Scenes look their features up; hash_features makes the same of the string."""
    config, index = DataConfig(captions=captions), torch.arange(64)
    scenes = Scenes(config)
    _, text, mask = scenes.batch("train", index)
    parts = hash_features(scenes.captions("train", index), config.text_tokens, config.text_dim)
    assert mask.sum(1).tolist() == [len(part) for part in parts]
    assert torch.equal(text[mask], torch.tensor(np.concatenate(parts))) and not text[~mask].any()


@pytest.mark.parametrize("resolution", [8, 28, 64])
def test_any_resolution_shows_the_same_scene(resolution):
    images = load("scenes", resolution=resolution).batch("train", torch.arange(8))[0]
    assert images.shape == (8, 3, resolution, resolution) and images.dtype == torch.uint8
    small = torch.nn.functional.interpolate(images.float(), (8, 8), mode="area")
    assert (small - load("scenes").batch("train", torch.arange(8))[0].float()).abs().mean() < 12


def test_hash_words():
    """A word's vector is normal and depends on the lower-case word alone."""
    words, nothing, cut = hash_features(["Red, red disc", "", "a b c d e f"], 4, 64)
    assert [len(part) for part in (words, nothing, cut)] == [3, 0, 4]
    assert (words[0] == words[1]).all() and (words[0] != words[2]).any()
    many = np.concatenate(hash_features([f"word{k}" for k in range(500)], 1, 64))
    assert abs(many.mean()) < 0.02 and many.std() == pytest.approx(1, abs=0.02)


def test_uniform_bits():
    bits = data.random_bits(7, torch.arange(20000), 4).double() / 2 ** 24
    assert bits.min() >= 0 and bits.max() < 1
    assert (bits.mean(0) - 0.5).abs().max() < 0.01 and (bits.var(0) - 1 / 12).abs().max() < 0.002
    assert np.abs(np.corrcoef(bits.T.numpy()) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(bits[:-1, 0], bits[1:, 0])[0, 1]) < 0.03


# ---- any source --------------------------------------------------------------------------------

class Stripes(data.Source):
    """A new source is one class and one line in a table."""

    def batch(self, split, index):
        rows = torch.arange(self.config.resolution) * (1 + index[:, None] % 4) % 2 * 255
        images = rows.byte()[:, None, :, None].expand(-1, 3, -1, self.config.resolution)
        text = torch.zeros(len(index), self.shape["text_tokens"], self.shape["text_dim"])
        return images, text, torch.zeros(text.shape[:2], dtype=torch.bool)

    def captions(self, split, index):
        return [f"{1 + k % 4} stripes" for k in index.tolist()]


def test_a_new_source_is_one_class_and_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(data.SOURCES, "stripes", Stripes)
    (record,) = run(tmp_path / "run", "--data", "stripes", "--val_images", "8", budget="5e9")
    assert record["train_images"] is None and 0 < record["val_loss"] < record["start_loss"] * 1.1
    assert (tmp_path / "run" / "budget_5e+09" / "samples.png").exists()
    data.look(DataConfig(data="stripes"), data.LookConfig(out=str(tmp_path / "look.png")))


def test_presets_give_way_to_flags_and_errors_are_one_line(capsys):
    presets = {"small": {"resolution": 8}, "large": {"resolution": 64}}

    def resolution(*argv):
        return data.parse_flags((DataConfig, Preset), "test", presets, argv=[*argv])[0].resolution
    assert resolution() == 8 and resolution("--preset", "large") == 64
    assert resolution("--preset=large") == 64
    assert resolution("--resolution", "5", "--preset", "large") == 5
    for bad in (["--resolutio", "8"], ["--preset"], ["--captions", "none"], ["--take", "0"]):
        with pytest.raises(SystemExit) as left:
            resolution(*bad)
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.count("\n") == 1 and bad[0] in said


@data.dataclass(frozen=True)
class Preset:
    preset: str = "small"


# ---- images: which, and in which order ---------------------------------------------------------

def test_every_image_is_trained_on_once_an_epoch_in_an_order_of_the_seed(tmp_path):
    path = tiny.parquet(tmp_path / "a.parquet", 120)
    first, second = (load(path, seed) for seed in (0, 1))
    n = first.train_images
    assert n + first.validation_images == 120 and 3 <= first.validation_images <= 25
    assert first.encoders == second.encoders                # what is held out is of no seed
    assert everything(first)["validation"] == everything(second)["validation"]
    orders = [first.captions("train", epoch(first) + start) for start in (0, n)]
    orders.append(second.captions("train", epoch(first)))
    for k, order in enumerate(orders):
        assert len(set(order)) == n and set(order) == set(orders[0])
        assert order not in orders[:k]
    across = torch.arange(n - 3, n + 3)                     # a batch over the border of two epochs
    assert load(path).captions("train", across) == orders[0][-3:] + orders[1][:3]
    few, more = (load(path, images=images) for images in (20, 40))
    chosen = [set(one.captions("train", epoch(one))) for one in (few, more)]
    assert len(chosen[0]) == 20 and chosen[0] < chosen[1] < set(orders[0])
    refused("--images 1000: .* has only", load, path, images=1000)
    images, text, mask = first.batch("train", torch.tensor([4, 5]))
    assert images.shape == (2, 3, 8, 8) and text.shape == (2, 16, 64)
    assert mask.sum().item() == 12


def test_a_batch_is_the_same_in_parts(source):
    images, index = load(source, flip=True), torch.arange(130, 150)
    for whole, *parts in zip(*(images.batch("train", part)
                               for part in (index, index[:7], index[7:]))):
        assert torch.equal(whole, torch.cat(parts))


def test_every_container_gives_the_same_images(tmp_path):
    parquet, tar = tiny.parquet(tmp_path / "a.parquet"), tiny.webdataset(tmp_path / "a.tar")
    folder = tiny.imagefolder(tmp_path / "folder")
    (tmp_path / "shards").mkdir()
    tiny.parquet(tmp_path / "shards" / "part-0.parquet", 40)
    tiny.parquet(tmp_path / "shards" / "part-1.parquet", 20, 40)
    reference = load(parquet)
    expected = everything(reference)
    assert sum(map(len, expected.values())) == 60 and 2 <= len(expected["validation"]) <= 15
    ways = [dict(path=parquet, stream=True), dict(path=folder), dict(path=folder, stream=True),
            dict(path=tmp_path / "shards"), dict(path=tmp_path / "shards" / "*.parquet"),
            dict(path=tar, image_column="png", text_column="txt"),
            dict(path=tar, image_column="png", text_column="json.said", stream=True)]
    for way in ways:
        other = load(**way)
        assert everything(other) == expected, way
    assert load(**ways[0]).encoders == reference.encoders   # of the images, not of the container
    for stream in (False, True):
        taken = load(parquet, take=30, stream=stream)
        assert taken.train_images + taken.validation_images == 30
    alone = load(parquet, validation_split="train")         # an evaluation set
    assert alone.train_images == 0 and alone.validation_images == 60
    refused("all its images are for validation", alone.batch, "train", torch.arange(4))


def test_what_is_held_out_is_never_trained_on(tmp_path):
    """Copies are on one side; where validation has a split of its own, they leave training."""
    pictures = [tiny.picture(k // 3) for k in range(120)]
    captions = [f"caption {k}" for k in range(120)]
    images = load(tiny.write_parquet(tmp_path / "a.parquet", pictures, captions))
    found = everything(images)
    assert images.train_images + images.validation_images == 120
    assert not {one for one, _ in found["train"]} & {one for one, _ in found["validation"]}
    (tmp_path / "own").mkdir()
    tiny.parquet(tmp_path / "own" / "train.parquet", 40)
    tiny.parquet(tmp_path / "own" / "validation.parquet", 10, 35)
    images = load(tmp_path / "own")
    assert images.train_images == 35 and images.validation_images == 10
    assert {one for _, one in everything(images)["train"]} == {tiny.caption(k) for k in range(35)}


def test_captions_and_mirrors_are_drawn_by_seed_and_sample(tmp_path):
    texts = [[f"first {k}", f"second {k}", None, f"third {k}"] for k in range(40)]
    path = tiny.write_parquet(tmp_path / "a.parquet", [tiny.picture(k) for k in range(40)], texts,
                              pa.list_(pa.string()))
    plain, flipped = (load(path, seed=1, flip=flip) for flip in (False, True))
    index = torch.arange(60 * plain.train_images)
    captions = flipped.captions("train", index)
    for word in ("first", "second", "third"):
        share = sum(one.startswith(word) for one in captions) / len(captions)
        assert share == pytest.approx(1 / 3, abs=0.04)
    assert captions[70:90] == flipped.captions("train", torch.arange(70, 90))
    assert captions == plain.captions("train", index)
    assert captions != load(path, seed=2).captions("train", index)
    one, other = (images.batch("train", index[:1000])[0] for images in (plain, flipped))
    same, mirrored = ((one == image).flatten(1).all(1) for image in (other, other.flip(3)))
    assert (same | mirrored).all() and 0.45 < same.double().mean() < 0.55
    assert everything(plain)["validation"] == everything(flipped)["validation"]
    assert all(text.startswith("first") for _, text in everything(plain)["validation"])


def test_other_images_under_the_same_name_are_noticed(tmp_path, encoders):
    """A run, and a folder of prepare, belong to their images and not to a path."""
    path = tiny.parquet(tmp_path / "a.parquet", 64)
    first = load(path).encoders["images"]
    flags = "--data", path, "--resolution", "8", "--batch", "8"
    run(tmp_path / "run", *flags, budget="5e8")
    out = make(tmp_path / "out", path, encoders)
    kept = files(out)
    pictures = [tiny.picture(1000 + k) for k in range(64)]
    tiny.write_parquet(path, pictures, [f"another {k}" for k in range(64)])
    assert load(path).encoders["images"] != first
    refused("encoders.images.sha256", run, tmp_path / "run", *flags)
    make(out, path, encoders)                               # what is finished is left alone
    assert files(out) == kept
    (out / "stats.json").unlink()
    refused("belongs to another configuration .*rows", make, out, path, encoders)
    (out / "prepare.json").unlink()
    refused("nobody knows what made them", make, out, path, encoders)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_images():
    images = load(SHARED / "noto_emoji64-validation.parquet", resolution=16)
    assert images.train_images + images.validation_images == 193
    assert "emoji" in images.captions("train", torch.tensor([0]))[0]


# ---- rows of all kinds -------------------------------------------------------------------------

def picture_file(image, format="PNG", **more):
    file = io.BytesIO()
    image.save(file, format, **more)
    return file.getvalue()


def upside_down():
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def unusual_images():
    deep = np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    jpeg = tiny.picture(1, 40, "JPEG")
    return {
        "half": jpeg[:len(jpeg) // 2],
        "bomb": picture_file(Image.new("1", (20_000, 20_000))),
        "deep": picture_file(Image.fromarray(deep)),
        "animated": picture_file(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "clear": picture_file(Image.new("P", (20, 20), 0), transparency=0),
        "postscript": picture_file(Image.new("RGB", (16, 16), "red"), "EPS"),
    }


IMAGES = unusual_images()
ROWS = [    # image, caption, what is said of the row (None: nothing), is it used?
    (IMAGES["half"], b"cut", "(?i)truncated", False),
    (b"", b"nothing", "no image that pillow can read", False),
    (b"\0" * 500, b"zeros", "no image that pillow can read", False),
    (IMAGES["postscript"], b"a program", "no image that pillow can read", False),
    (tiny.picture(2, 1), b"dot", "too small .4 x 1 pixels", False),
    (IMAGES["bomb"], b"bomb", "(?i)too large|bomb", False),
    ("../secret.png", b"escapes", "out of the data", False),
    ("/etc/passwd", b"escapes", "out of the data", False),
    ("missing.png", b"nowhere", "leads nowhere", False),
    (None, b"no image", "no image", False),
    (tiny.picture(4), None, "no caption", False),
    (tiny.picture(7), b"\xff\xfe caption", "not UTF-8", False),
    (tiny.picture(5), b"", "empty caption", True),
    (tiny.picture(6), b"word " * 10_000, "cut to 10,000", True),
    (IMAGES["animated"], b"moves", "first frame of an animation", True),
    (IMAGES["clear"], b"palette", None, True),
    (IMAGES["deep"], b"deep", None, True),
    (tiny.picture(3, 20, "JPEG", "CMYK"), b"print", None, True),
    (tiny.picture(8, mode="L"), b"grey", None, True),
    (tiny.picture(9, mode="RGBA"), b"alpha", None, True),
    (tiny.picture(10, format="JPEG", exif=upside_down()), b"turned", None, True),
]
USED = [k for k, (*_, used) in enumerate(ROWS) if used]


@pytest.fixture
def hostile(tmp_path):
    """A parquet file of the rows above, twelve times over, beside a file that none may read."""
    (tmp_path / "secret.png").write_bytes(tiny.picture(99))
    (tmp_path / "set").mkdir()
    texts = pa.array([text for _, text, *_ in ROWS * 12], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), len(texts), texts.buffers())     # not all UTF-8
    return tiny.write_parquet(tmp_path / "set" / "a.parquet", [row[0] for row in ROWS * 12], texts)


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_is_used_or_skipped_and_says_why(tmp_path, number, hostile):
    image, text, said, used = ROWS[number]
    cells = [pa.array([tiny.cell(image)]), pa.array([text], pa.binary())]
    row = data.read_row(cells[0][0], cells[1][0], 8, [str(tmp_path / "set")])
    assert ("pixels" in row) == used
    assert re.search(said, row["remark"]) if said else row["remark"] == ""


def test_hostile_rows_are_counted_and_named_and_none_is_fatal_or_black(tmp_path, hostile, encoders):
    images = load(hostile, resolution=16, validation_split="train")
    assert images.validation_images == 12 * len(USED)
    pixels = images.images("validation", epoch(images, "validation"))
    flat = pixels[:len(USED)].flatten(1).double()
    places = {kind: USED.index([image for image, *_ in ROWS].index(content))
              for kind, content in IMAGES.items() if kind in ("clear", "deep", "animated")}
    assert (flat[places["clear"]] == 255).all()             # a clear palette is white
    assert (flat.mean(1) > 8).all()
    ramp = pixels[places["deep"], 0].double()               # 16 bits, not cut off at 255
    assert ramp[0].mean() < 10 and ramp[-1].mean() > 245 and abs(ramp.mean() - 127) < 4
    remarks = images.remarks
    for key, used in (("skipped", False), ("used", True)):
        expected = 12 * sum(row[3] == used and row[2] is not None for row in ROWS)
        assert sum(about["rows"] for about in remarks[key].values()) == expected
        for about in remarks[key].values():
            assert len(about["first"]) == min(10, about["rows"])
            for name in about["first"]:
                split, number, remark = re.fullmatch(r"(\w+) (\d+): (.*)", name).groups()
                assert split == "validation" and re.search(ROWS[int(number) % len(ROWS)][2], remark)
    assert f"{12 * (len(ROWS) - len(USED))} rows skipped (36 x no image that pillow" in \
        data.about_remarks(remarks)
    stats = json.loads((make(tmp_path / "out", hostile, encoders, validation_split="train")
                        / "stats.json").read_text())
    assert stats["remarks"] == remarks
    assert stats["counts"] == {"train": 0, "validation": 12 * len(USED)}
    data.look(DataConfig(data=hostile, validation_split="train"),
              data.LookConfig(out=str(tmp_path / "look.png")))


def test_pixels_are_cropped_upright_on_white():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    assert (data.to_pixels(wide, 8) == [0, 0, 255]).all()   # the middle square
    assert (data.to_pixels(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), 8) == 255).all()
    assert (data.to_pixels(Image.new("L", (9, 9), 7), 4) == np.full((4, 4, 3), 7)).all()
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 4, 8))
    file = picture_file(turned, exif=upside_down())
    assert data.to_pixels(Image.open(io.BytesIO(file)), 8)[0, 0].tolist() == [0, 0, 0]


def test_sixteen_bits_keep_orientation_transparency_and_light():
    levels = (np.arange(16 * 16, dtype=np.uint16) * 257).reshape(16, 16)
    file = picture_file(Image.fromarray(levels), exif=upside_down(), transparency=int(levels[0, 0]))
    read = data.to_pixels(Image.open(io.BytesIO(file)), 16)[..., 0]
    assert read[-1, -1] == 255                              # the clear one
    assert np.array_equal(read.ravel()[:-1][::-1], np.arange(1, 256))
    dim = Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16))
    assert data.to_pixels(dim, 16)[..., 0].max() == 255     # 32 bits wide, 8-bit levels


@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_a_wide_file_with_the_levels_of_a_narrow_camera_is_not_black(white):
    levels = np.linspace(0, white, 256).astype(np.uint16).reshape(16, 16)
    read = data.to_pixels(Image.open(io.BytesIO(picture_file(Image.fromarray(levels)))), 16)
    assert np.abs(read[..., 0].ravel().astype(int) - np.arange(256)).max() <= 1


def test_a_failing_disk_is_not_a_skipped_row(tmp_path, monkeypatch):
    Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(tmp_path / "a.png")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Input/output"):
        data.read_row(pa.scalar(tiny.cell("a.png")), pa.scalar("x"), 8, [str(tmp_path)])


def files_of_no_use(folder):
    tiny.parquet(folder / "a.parquet", 30)
    (folder / "torn.parquet").write_text("no parquet")
    tiny.write_parquet(folder / "none.parquet", [b"no image"] * 5, ["text"] * 5)
    tiny.write_parquet(folder / "empty.parquet", [], [])
    tiny.write_parquet(folder / "numbers.parquet", [tiny.picture(0)] * 3, [1, 2, 3], pa.int64())
    (folder / "begun").mkdir()
    (folder / "begun" / "prepare.json").write_text("{}")


@pytest.mark.parametrize("name, more, said", [
    ("nothing", {}, "no such file"),
    ("a.zip", {}, "no such file"),
    ("torn.parquet", {}, "can't read it"),
    ("empty.parquet", {}, "or it is empty"),
    ("none.parquet", {}, "none of its 5 rows can be used: .*5 x no image that pillow"),
    ("numbers.parquet", {}, "none of its 3 rows can be used: .*no text"),
    ("begun", {}, "prepare has not finished"),
    ("a.parquet", dict(text_column="caption"), "no column caption .there are image, text.: see "),
    ("a.parquet", dict(image_column="png"), "no column png .*see --image_column"),
    ("a.parquet", dict(validation_split="dev"), "no split dev .there is train."),
    ("a.parquet", dict(take=1), "too few"),
    ("a.parquet", dict(take=0), "--take 0: must be at least 1"),
    ("a.parquet", dict(text="clip:/nowhere"), "--text: cannot load /nowhere .*hf download"),
    ("a.parquet", dict(text="bert"), "--text bert: take hash, clip"),
    ("scenes", dict(flip=True), "--flip is for real images"),
    ("scenes", dict(images=0), "--images 0: must be at least 1"),
])
def test_bad_input_is_one_line(tmp_path, name, more, said):
    files_of_no_use(tmp_path)
    refused(said, lambda: load(name if name == "scenes" else tmp_path / name, **more))


def test_nothing_that_comes_with_data_or_weights_is_executed(tmp_path, encoders):
    """A loading script is not run; weights that are no safetensors are not read."""
    tiny.imagefolder(tmp_path / "set")
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    refused("--data .*scripts are no longer supported", load, tmp_path / "set")
    shutil.copytree(encoders["vae"], tmp_path / "vae")
    torch.save({}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    refused("--vae: cannot load", data.VAE, str(tmp_path / "vae"), "cpu")
    assert not (tmp_path / "ran").exists()


# ---- text encoders, of random weights in their genuine formats ---------------------------------

@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_features_are_those_of_the_encoder(encoders, kind):
    """The last hidden states that transformers itself gives for one caption alone."""
    text = PretrainedText(DataConfig(data="x", text=encoders[kind], text_tokens=12), "cpu")
    captions = ["an emoji of a mage", "", "word " * 10_000, "an emoji of a mage", "a"]
    parts = text.features(captions)
    assert [len(part) for part in parts][1:3] == [0, 12]
    for part, caption in zip(parts, captions):
        if caption:
            tokens = text.tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")
            alone = text.network(input_ids=tokens["input_ids"]).last_hidden_state[0].numpy()
            assert np.allclose(part, alone, atol=2e-3)      # float16
    assert len(text.features(["a", "b"] * 40)) == 80


def test_too_many_slots_are_refused(encoders):
    config = DataConfig(data="x", text=encoders["clip"], text_tokens=78)
    refused("--text_tokens 78: .* only 77 positions", PretrainedText, config, "cpu")


def test_pixels_with_clip_text_train_and_features_are_kept(tmp_path, encoders, monkeypatch):
    path = tiny.parquet(tmp_path / "a.parquet")
    images = load(path, text=encoders["clip"], text_tokens=20)
    text, mask = images.batch("train", torch.arange(8))[1:]
    assert images.shape == dict(channels=3, size=8, text_tokens=20, text_dim=32)
    encoder = PretrainedText(images.config, "cpu")
    parts = encoder.features(images.captions("train", torch.arange(8)))
    assert mask.sum(1).tolist() == [len(part) for part in parts]
    assert np.allclose(text[mask].numpy(), np.concatenate(parts), atol=2e-3)
    flags = ["--data", path, "--resolution", "8", "--text", encoders["clip"], "--text_tokens", "20"]
    (record,) = run(tmp_path / "run", *flags)
    assert record["train_images"] == images.train_images
    assert record["epochs"] == record["images"] / images.train_images > 1
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["encoders"] == images.encoders and config["data"]["text"] == encoders["clip"]
    # Another encoder of that name has other features; the first one's need not be made again.
    other = load(path, text=tiny.tiny_clip(tmp_path / "clip", seed=1), text_tokens=20)
    assert not torch.allclose(other.batch("train", torch.arange(8))[1], text)
    monkeypatch.setattr(PretrainedText, "features", None)
    again = load(path, text=encoders["clip"], text_tokens=20)
    assert torch.equal(again.batch("train", torch.arange(8))[1], text)


# ---- latents -----------------------------------------------------------------------------------

def test_round_trip_is_the_reconstruction_of_the_vae(prepared, encoders, source):
    """Encode, store in 16 bits, normalise and back, decode: what the VAE makes of the pixels."""
    latents, images = load_data(DataConfig(data=str(prepared))), load(source, resolution=16)
    assert latents.encoders["images"] == images.encoders["images"]
    index, pixels = epoch(images, "validation"), everything(images)["validation"]
    assert sorted(zip((one.numpy().tobytes() for one in latents.images("validation", index)),
                      latents.captions("validation", index))) == pixels
    vae = data.VAE(encoders["vae"], "cpu")
    pixels = images.batch("validation", index)[0]
    own = vae.network(pixels.float() / 127.5 - 1).sample
    own = ((own + 1) * 127.5).round().clamp(0, 255)
    raw, text, mask = latents.batch("validation", index)
    raw[:, 1] = -100                                        # the mean itself, without noise
    x = latents.to_x(raw, torch.Generator())
    assert (latents.to_levels(x).float() - own).abs().max() <= 1
    assert latents.shape == dict(channels=4, size=4, text_tokens=77, text_dim=32)
    encoder = PretrainedText(DataConfig(data="x", text=encoders["clip"]), "cpu")
    parts = encoder.features(images.captions("validation", index))
    assert np.allclose(text[mask].numpy(), np.concatenate(parts), atol=2e-3)


def test_latents_have_the_order_and_the_mirrors_of_their_images(prepared, source, encoders):
    latents = load_data(DataConfig(data=str(prepared), flip=True))
    images = load(source, resolution=16, flip=True)
    index = epoch(images)
    assert latents.captions("train", index) == images.captions("train", index)
    pixels = images.batch("train", index[:32])[0].permute(0, 2, 3, 1)
    expected = data.VAE(encoders["vae"], "cpu").moments(pixels)[:, 0]
    raw = latents.batch("train", index[:32])[0]
    assert torch.allclose(raw, expected, rtol=2e-3, atol=2e-3)
    assert latents.images("train", index[:4]).shape == (4, 3, 16, 16)


@pytest.mark.parametrize("text", ["clip", "hash"])
def test_latents_are_normalised_and_the_loss_starts_as_expected(tmp_path, encoders, source, text):
    folder = make(tmp_path / "set", source, encoders, text=text)
    latents = load_data(DataConfig(data=str(folder)))
    raw = latents.batch("train", epoch(latents))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([latents.to_x(raw, generator) for _ in range(20)])
    assert x.mean((0, 2, 3)).abs().max() < 0.02 and (x.std((0, 2, 3)) - 1).abs().max() < 0.02
    (record,) = run(tmp_path / "run", "--data", str(folder), "--batch", "128", budget="8e9")
    assert record["start_loss_expected"] == pytest.approx(2, abs=0.05)      # 1 + E[x^2]
    assert record["start_loss"] == pytest.approx(2, abs=0.1)


def fork(do):
    """A copy of this process that does something and ends (Python starts slowly): its number."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait_for(what, is_there, seconds=120):
    """Wait on what happens, not on a guess of when: the machine may be busy with other things."""
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.002)


def end_of(pid):
    """The exit status of a forked process; it is killed, and the test fails, where it hangs."""
    status = []

    def has_ended():
        status.extend(end for number, end in [os.waitpid(pid, os.WNOHANG)] if number)
        return status
    try:
        wait_for("a child", has_ended)
    except AssertionError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    return status[0]


def test_kill_9_at_ten_moments_leaves_the_shards_of_an_undisturbed_run(
        tmp_path, encoders, source, prepared):
    """Killed soon after each of the ten shards has begun, which goes on where the last one was."""
    chance, whole, folder, kills = random.Random(0), files(prepared), tmp_path / "killed", 0
    for finished in range(10):
        pid = fork(lambda: make(folder, source, encoders))
        wait_for(f"{finished} shards", lambda: len([*folder.glob("*.arrow")]) >= finished
                 and (folder / "prepare.json").exists())
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        status = end_of(pid)
        assert status in (0, signal.SIGKILL)                # 0: it got there before the signal
        kills += status == signal.SIGKILL
        assert all(whole[name] == content for name, content in files(folder).items()
                   if "tmp" not in name)
    assert kills >= 7
    make(folder, source, encoders)
    assert files(folder) == whole
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    make(folder, source, encoders)                          # nothing to do
    assert times == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


@pytest.mark.parametrize("stream", [False, True])
def test_two_ranks_make_the_shards_of_one(
        tmp_path, encoders, source, prepared, monkeypatch, stream):
    pids = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        pids.append(fork(lambda: make(tmp_path / "two", source, encoders, stream=stream)))
    assert [end_of(pid) for pid in pids] == [0, 0]
    one, two = files(prepared), files(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:        # .json says whether there was a stream
        assert one[name] == two[name] or (stream and name.endswith(".json")), name


@pytest.mark.parametrize("more, said", [
    (dict(resolution=32), "another configuration .flags.resolution: 16 -> 32"),
    (dict(text="t5"), "another configuration .flags.text: clip:"),
    (dict(vae="/nowhere"), "another configuration .flags.vae: "),
    (dict(take=9, flip=True), "another configuration .flags.take: None -> 9.:"),
])
def test_a_finished_folder_is_of_its_flags(prepared, source, encoders, more, said):
    refused(f"--out .* belongs to {said}", make, prepared, source, encoders, **more)


@pytest.mark.parametrize("more, said", [
    (dict(resolution=18), "--resolution 18: .* 4 x 4 pixels"),
    (dict(vae="/nowhere"), "--vae: cannot load /nowhere .*hf download"),
    (dict(text="clip:/nowhere"), "--text: cannot load /nowhere .*hf download"),
])
def test_encoders_that_cannot_be_used_are_refused(tmp_path, source, encoders, more, said):
    refused(said, make, tmp_path / "out", source, encoders, **more)
    assert not (tmp_path / "out").exists()


def test_a_torn_old_or_prepared_folder_is_refused(tmp_path, prepared, encoders):
    refused("is for images that are not prepared", make, tmp_path / "x", prepared, encoders)
    stats = prepared / "stats.json"
    content = stats.read_text()
    for text, said in (("{", "torn"), ("[]", "torn"),
                       (content.replace('"format": 2', '"format": 1'), "format 1, .* prepare it")):
        stats.write_text(text)
        refused(said, DataConfig, data=str(prepared))
    stats.write_text(content)
    shard = next(iter(sorted(prepared.glob("*.arrow"))))
    shard.write_bytes(b"torn")
    refused("torn, or not a shard", load_data, DataConfig(data=str(prepared)))


@pytest.mark.parametrize("flags, said", [
    (["--batch", "512", "--micro_batches", "1"], "--batch 512: .* has only 1.. images to train on"),
    (["--patch", "3"], "--patch 3 does not divide the image side 4"),
    (["--take", "5"], "is prepared already"),
    (["--resolution", "32"], "--resolution 32: .* is prepared already, with .*16"),
])
def test_latents_that_do_not_fit_are_refused(tmp_path, prepared, flags, said, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        run(tmp_path / "run", "--data", str(prepared), *flags)
    message = capsys.readouterr().err.strip() or str(caught.value)
    assert re.search(said, message.splitlines()[-1])


def test_training_from_latents_resumes_bit_for_bit_with_and_without_a_reader_thread(
        tmp_path, prepared, monkeypatch):
    flags = "--data", str(prepared), "--flip", "--val_images", "8"
    straight = run(tmp_path / "straight", *flags, budget="4e9")
    run(tmp_path / "halves", *flags, budget="2e9")
    again = run(tmp_path / "halves", *flags, budget="4e9")
    monkeypatch.setattr(data.StoredImages, "prefetch", False)
    alone = run(tmp_path / "alone", *flags, budget="4e9")
    for name in ("train_loss", "val_loss_ema", "val_loss"):
        assert len({records[-1][name] for records in (straight, again, alone)}) == 1
    picture = Image.open(tmp_path / "straight" / "budget_4e+09" / "samples.png")
    assert picture.size[0] > 500


def test_other_encoders_are_refused_in_training_and_evaluation(
        tmp_path, prepared, source, encoders):
    run(tmp_path / "run", "--data", str(prepared), "--val_images", "8")
    clip, vae = tiny.tiny_clip(tmp_path / "clip", seed=1), tiny.tiny_vae(tmp_path / "vae", seed=1)
    texts = make(tmp_path / "texts", source, encoders, text=clip)
    latents = make(tmp_path / "latents", source, encoders, vae=vae)
    model = load_data(DataConfig(data=str(prepared))).encoders
    for folder, what in ((texts, "text"), (latents, "vae")):
        other = load_data(DataConfig(data=str(folder)))
        said = f"--data .*: its {what} encoder is .* the model was trained with"
        refused(said, other.use_training_encoders, model)
        refused(said, evaluate.evaluate, evaluate.EvaluateConfig(
            path=str(tmp_path / "run"), data=[str(folder)], n=4, samples=0, device="cpu"))
    shutil.rmtree(prepared)
    shutil.move(latents, prepared)                          # a set made anew in the same place
    refused("belongs to another configuration .encoders.vae", run, tmp_path / "run",
            "--data", str(prepared), "--val_images", "8", budget="2e9")


def test_evaluation_of_latents_with_the_normalisation_of_the_training(tmp_path, prepared, encoders):
    """Another set, with a scale and shift of its own, is seen as the model was trained to."""
    path = tiny.parquet(tmp_path / "b.parquet", 132, 500)
    other = make(tmp_path / "other", path, encoders, validation_split="train")
    run(tmp_path / "run", "--data", str(prepared), "--val_images", "8")
    point = tmp_path / "run" / "budget_1e+09"
    few = dict(path=str(point), samples=2, steps=2, likelihood_steps=2, device="cpu")
    evaluate.evaluate(evaluate.EvaluateConfig(
        metrics=["loss", "vlb", "nll"], data=[str(prepared), str(other)], n=8, **few))
    tiny.tiny_vision("dinov2", tmp_path / "dinov2")
    evaluate.evaluate(evaluate.EvaluateConfig(
        metrics=["fd"], data=[str(other)], n=130, features=f"dinov2:{tmp_path / 'dinov2'}", **few))
    for name in (prepared.name, "other"):
        metrics = json.loads((point / f"metrics_{name}.json").read_text())["metrics"]
        nll = metrics["nll"]
        assert metrics["vlb"]["unit"] == nll["unit"] == "bits/latent dim"
        assert "posterior" in nll["protocol"]["dequantised"]
        assert nll["value"] == pytest.approx(nll["nats_per_image"] / (4 * 4 * 4 * np.log(2)))
    assert metrics["fd_dinov2"]["value"] > 0
    assert "own pixels" in metrics["fd_dinov2"]["protocol"]["reference"]
    ours, foreign = (load_data(DataConfig(data=str(one))) for one in (prepared, other))
    raw = foreign.batch("validation", torch.arange(4))[0]
    x = [source.to_x(raw, torch.Generator().manual_seed(0)) for source in (ours, foreign)]
    assert not torch.equal(*x)
    own = json.dumps(foreign.encoders)
    foreign.use_training_encoders(ours.encoders)
    assert json.dumps(foreign.encoders) == own              # a run records what made its set
    assert torch.equal(x[0], foreign.to_x(raw, torch.Generator().manual_seed(0)))


@pytest.mark.slow
def test_the_papers_preset_runs_on_prepared_latents(tmp_path, prepared, capsys):
    import sweep
    flags = ["--data", str(prepared), "--warmup", "1", "--batch", "16", "--micro_batches", "2",
             "--device", "cpu", "--val_images", "8"]
    assert sweep.run_sweep(sweep.SweepConfig(preset="paper", dry_run=True), flags[:2]) == 0
    assert "D (tokens)" in capsys.readouterr().out
    small = sweep.SweepConfig(preset="paper", out=str(tmp_path / "grid"), depth=[1], width=[64],
                              budget=[5e10, 1e11], window=1e12)
    assert sweep.run_sweep(small, flags) != 0       # two points of one size are no law
    records = [json.loads(path.read_text())
               for path in sorted(tmp_path.glob("grid/*/budget_*/result.json"))]
    assert len(records) == 2 and all(record["count"] == "6nd" for record in records)
    assert all(record["D_text"] == 77 * record["images"] for record in records)


# ---- the command line --------------------------------------------------------------------------

@pytest.mark.parametrize("flags, status, said", [
    (["--help"], 0, "contact sheet"),
    (["look", "--help"], 0, "--resolution"),
    (["prepare", "--help"], 0, "--vae"),
    (["look", "--data", "nowhere"], 2, "--data nowhere: no such file"),
    (["prepare"], 2, "--data scenes: prepare is for images"),
    (["loook"], 2, "unknown flag or value loook"),
])
def test_the_command_line(flags, status, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", *flags])
    with pytest.raises(SystemExit) as left:
        data.main()
    out, err = capsys.readouterr()
    assert left.value.code == status and said in (err if status else out)
    assert err.count("\n") == (1 if status else 0)


def test_look_writes_a_picture(tmp_path, prepared):
    """Without flags, of scenes, in a process of its own; of latents."""
    command = [sys.executable, ROOT / "data.py"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert Image.open(tmp_path / "look.png").size[0] > 500
    data.look(DataConfig(data=str(prepared)), data.LookConfig(out=str(tmp_path / "latents.png")))
    assert Image.open(tmp_path / "latents.png").size[0] > 500
