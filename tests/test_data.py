import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

import data
import tiny
import train
from data import DataConfig, HashText, Images, PrepareConfig, PretrainedText, Scenes, load_data

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("name", ["scenes", "scenes-ood"])
def test_scenes_are_a_pure_function_of_seed_and_index(name):
    index = torch.tensor([5, 0, 10 ** 10, 17, 3])
    images, text, mask = Scenes(DataConfig(data=name), seed=3).batch("train", index)
    alone = Scenes(DataConfig(data=name), seed=3)
    for k in reversed(range(len(index))):
        one = alone.batch("train", index[k:k + 1])
        assert torch.equal(one[0][0], images[k]) and torch.equal(one[1][0], text[k]) and torch.equal(one[2][0], mask[k])
    assert not torch.equal(Scenes(DataConfig(data=name), seed=4).batch("train", index)[0], images)
    assert len({image.numpy().tobytes() for image in Scenes(DataConfig()).batch("train", torch.arange(500))[0]}) == 500


def test_scenes_are_the_same_for_everybody():
    """A checksum over pixels and captions: a change of the world is a change of every published number."""
    import hashlib
    scenes = Scenes(DataConfig())
    index = torch.arange(256)
    digest = hashlib.sha256(scenes.batch("validation", index)[0].numpy().tobytes() + "\n".join(scenes.captions("validation", index)).encode())
    assert digest.hexdigest()[:16] == "a9f8fdb5b15030ca"


def test_validation_is_one_set_for_all_seeds_and_not_in_training():
    index = torch.arange(50)
    first, second = (Scenes(DataConfig(), seed=s).batch("validation", index)[0] for s in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(Scenes(DataConfig(), seed=0).batch("train", index)[0], first)


def test_captions_say_what_is_there():
    """Where one shape is alone, the pixel in its middle has its colour, and its place is in the cell that is named."""
    scenes = Scenes(DataConfig(resolution=64))
    index = torch.arange(2000)
    scene, images, captions = scenes.describe("train", index), scenes.draw(scenes.describe("train", index)), scenes.captions("train", index)
    checked = 0
    for k in range(len(index)):
        kind, texture = data.KINDS[scene["kind"][k, 0]], data.TEXTURES[scene["texture"][k, 0]]
        if scene["there"][k].sum() == 1 and kind == "disc" and texture == "plain":
            x, y = (scene["centre"][k, 0] * 64).long().tolist()
            rgb = images[k, :, y, x].float() / 255
            nearest = min(data.COLOURS, key=lambda c: (rgb - torch.tensor(data.COLOURS[c])).abs().sum())
            column, row = (int(3 * c) for c in scene["centre"][k, 0].tolist())
            assert f" {nearest} disc {data.PLACES[3 * row + column]}" in captions[k]
            checked += 1
    assert checked > 10
    assert captions[0] == "grey: large white bar west, checked cyan cross northwest"


def test_sparse_names_one_shape_of_the_same_images():
    dense, sparse = Scenes(DataConfig()), Scenes(DataConfig(captions="sparse"))
    index = torch.arange(100)
    assert torch.equal(dense.batch("train", index)[0], sparse.batch("train", index)[0])
    for many, one in zip(dense.captions("train", index), sparse.captions("train", index)):
        assert one and "," not in one and f": {one}" in many


def test_limited_scenes_come_again_and_again():
    few, all_ = Scenes(DataConfig(images=100), seed=1), Scenes(DataConfig(), seed=1)
    index = torch.arange(90, 110)
    images, text, mask = few.batch("train", index)
    again = all_.batch("train", index % 100)
    assert torch.equal(images, again[0]) and torch.equal(text, again[1]) and torch.equal(mask, again[2])
    assert few.captions("train", index) == all_.captions("train", index % 100) and few.train_images == 100
    assert torch.equal(few.batch("validation", index)[0], all_.batch("validation", index)[0])   # those are never limited
    with pytest.raises(ValueError, match="--images 0"):
        DataConfig(images=0)


@pytest.mark.parametrize("captions", ["dense", "sparse"])
def test_features_of_scenes_are_those_of_their_captions(captions):
    """Scenes make their features from numbers; anybody can make the same from the string."""
    config = DataConfig(captions=captions)
    scenes, text = Scenes(config), HashText(config.text_tokens, config.text_dim)
    _, features, mask = scenes.batch("train", torch.arange(64))
    again, mask_again = text.features(text.encode(scenes.captions("train", torch.arange(64))))
    assert torch.equal(mask, mask_again)
    assert torch.equal(features * mask[..., None], again * mask_again[..., None])


def test_dense_captions_fit_their_slots():
    assert max(len(c.replace(":", " ").split()) for c in Scenes(DataConfig()).captions("train", torch.arange(3000))) <= 16


@pytest.mark.parametrize("resolution", [8, 28, 64])
def test_any_resolution(resolution):
    images, *_ = Scenes(DataConfig(resolution=resolution)).batch("train", torch.arange(8))
    assert images.shape == (8, 3, resolution, resolution) and images.dtype == torch.uint8
    small = torch.nn.functional.interpolate(images.float(), (8, 8), mode="area")
    reference = Scenes(DataConfig(resolution=8)).batch("train", torch.arange(8))[0].float()
    assert (small - reference).abs().mean() < 12  # the same scene, out of 255


def test_hash_words():
    text = HashText(4, 64)
    features, mask = text.features(text.encode(["Red, red disc", "", "a b c d e f"]))
    assert mask.sum(1).tolist() == [3, 0, 4]
    assert torch.equal(features[0, 0], features[0, 1]) and not torch.equal(features[0, 0], features[0, 2])
    other = HashText(4, 64)
    other.encode(["zebra"])                                    # an earlier word changes nothing
    assert torch.equal(other.features(other.encode(["red"]))[0][0, 0], features[0, 0])
    many = HashText(1, 64)
    table = many.features(many.encode([f"word{k}" for k in range(500)]))[0][:, 0]
    assert table.mean().abs() < 0.02 and table.std() == pytest.approx(1, abs=0.02)


def test_uniform_bits():
    bits = data.random_bits(7, torch.arange(20000), 4).double() / 2 ** 24
    assert bits.min() >= 0 and bits.max() < 1
    assert (bits.mean(0) - 0.5).abs().max() < 0.01 and (bits.var(0) - 1 / 12).abs().max() < 0.002
    assert np.abs(np.corrcoef(bits.T.numpy()) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(bits[:-1, 0], bits[1:, 0])[0, 1]) < 0.03


def make_parquet(folder, n=200, columns=("image", "text")):
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature
    rng = np.random.default_rng(0)
    rows = {columns[0]: [Image.fromarray(rng.integers(0, 255, (20 + k % 5, 24, 3), dtype=np.uint8)) for k in range(n)],
            columns[1]: [f"picture number {k}" for k in range(n)]}
    features = Features({columns[0]: ImageFeature(), columns[1]: Value("string")})
    Dataset.from_dict(rows, features=features).to_parquet(folder / "images.parquet")
    return str(folder / "images.parquet")


@pytest.fixture(autouse=True)
def cache_of_datasets(tmp_path, monkeypatch):
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("ISOFLOW_CACHE", str(tmp_path / "features"))


def test_images_of_a_parquet_file(tmp_path):
    path = make_parquet(tmp_path)
    first, second = (Images(DataConfig(data=path, resolution=8), seed=s) for s in (0, 1))
    assert set(first.texts["validation"]).isdisjoint(first.texts["train"])
    assert first.texts["validation"] == second.texts["validation"]               # the hold-out is of no seed
    n = first.train_images
    assert n + len(first.texts["validation"]) == 200 and 5 <= len(first.texts["validation"]) <= 40
    epoch = torch.arange(n)
    assert sorted(first.captions("train", epoch)) == sorted(first.texts["train"])  # each image once an epoch
    assert first.captions("train", epoch) != first.captions("train", epoch + n)   # in a new order
    assert first.captions("train", epoch) != second.captions("train", epoch)
    across = torch.arange(n - 3, n + 3)                                           # a batch over the border of two epochs
    assert first.captions("train", across)[3:] == Images(DataConfig(data=path, resolution=8)).captions("train", across[3:])
    few, more = (Images(DataConfig(data=path, resolution=8, images=n)) for n in (20, 40))
    assert few.train_images == 20 and set(few.captions("train", torch.arange(20))) < set(more.captions("train", torch.arange(40))) < set(first.texts["train"])
    assert few.texts["validation"] == first.texts["validation"]
    with pytest.raises(ValueError, match="--images 1000: .* has only"):
        Images(DataConfig(data=path, resolution=8, images=1000))
    images, text, mask = first.batch("train", torch.tensor([4, 5]))
    assert images.shape == (2, 3, 8, 8) and mask.sum().item() == 6


def test_pixels_are_cropped_upright_on_white():
    wide = Image.new("RGB", (40, 20), "red")
    wide.paste("blue", (10, 0, 30, 20))
    assert (data.to_pixels(wide, 8) == [0, 0, 255]).all()                       # the middle square
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (data.to_pixels(clear, 8) == 255).all()
    assert data.to_pixels(Image.new("L", (9, 9), 7), 4).tolist() == [[[7] * 3] * 4] * 4
    turned = Image.new("RGB", (8, 8), "black")
    turned.paste("white", (0, 0, 4, 8))
    exif = turned.getexif()
    exif[0x0112] = 3                                                              # upside down
    turned.info["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert data.to_pixels(Image.open(buffer), 8)[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("make, said", [
    (lambda folder: str(folder / "nothing"), "no such file"),
    (lambda folder: make_parquet(folder, 20, ("picture", "text")), "no column image .there are picture, text."),
    (lambda folder: [(folder / "bad.parquet").write_text("no parquet"), str(folder / "bad.parquet")][1], "can't read"),
])
def test_unreadable_data_is_refused_in_one_line(tmp_path, make, said):
    with pytest.raises(ValueError, match=said) as caught:
        load_data(DataConfig(data=make(tmp_path), resolution=8))
    assert "--data" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.skipif(not SHARED.exists(), reason="../shared/data is not here")
def test_real_images():
    images = Images(DataConfig(data=str(SHARED / "noto_emoji64-validation.parquet"), resolution=16))
    assert images.train_images + len(images.texts["validation"]) == 193
    assert "emoji" in images.captions("train", torch.tensor([0]))[0]


def test_look_writes_a_picture(tmp_path):
    out = tmp_path / "look.png"
    subprocess.run([sys.executable, ROOT / "data.py", "look", "--out", out], check=True, capture_output=True)
    assert Image.open(out).size[0] > 500
    failed = subprocess.run([sys.executable, ROOT / "data.py", "look", "--data", "nowhere"], capture_output=True, text=True)
    assert failed.returncode == 2 and failed.stderr.count("\n") == 1 and "--data" in failed.stderr


# ---- real images, whatever they come in ----------------------------------------------------------------------------------

def everything(images):
    """What a set of Images holds, whatever its order: pixels and captions of each split."""
    return {split: sorted(zip((image.numpy().tobytes() for image in images.pixels[split]), images.texts[split])) for split in images.pixels}


def test_every_container_gives_the_same_images(tmp_path):
    config = lambda path, **more: DataConfig(data=path, resolution=8, **more)
    expected = everything(Images(config(tiny.parquet(tmp_path / "a.parquet"))))
    assert len(expected["train"]) + len(expected["validation"]) == 60 and 2 <= len(expected["validation"]) <= 15
    tar = tiny.webdataset(tmp_path / "a.tar")
    os.makedirs(tmp_path / "shards")
    tiny.parquet(tmp_path / "shards" / "part-0.parquet", 40)
    tiny.parquet(tmp_path / "shards" / "part-1.parquet", 20, 40)
    for other in (config(str(tmp_path / "a.parquet"), stream=True), config(tiny.imagefolder(tmp_path / "folder")), config(str(tmp_path / "shards")),
                  config(str(tmp_path / "shards" / "*.parquet")), config(tar, image_column="png", text_column="txt"),
                  config(tar, image_column="png", text_column="json.said", stream=True), config(str(tmp_path / "folder"), stream=True)):
        assert everything(Images(other)) == expected, other
    taken = Images(config(str(tmp_path / "a.parquet"), take=30, stream=True))
    assert taken.train_images + taken.validation_images == 30
    alone = Images(config(str(tmp_path / "a.parquet"), validation_split="train"))   # an evaluation set
    assert alone.train_images == 0 and alone.validation_images == 60
    with pytest.raises(ValueError, match="no image to train on"):
        alone.batch("train", torch.arange(4))


def test_what_is_held_out_is_never_trained_on(tmp_path):
    """Copies of an image with other captions are on the same side; with a validation split of its own they leave the training."""
    pictures = [tiny.picture(k // 3) for k in range(120)]
    images = Images(DataConfig(data=tiny.write_parquet(tmp_path / "a.parquet", pictures, [f"caption {k}" for k in range(120)]), resolution=8))
    pixels = {split: {image.numpy().tobytes() for image in images.pixels[split]} for split in images.pixels}
    assert images.train_images + images.validation_images == 120 and not pixels["train"] & pixels["validation"]
    os.makedirs(tmp_path / "own")
    tiny.parquet(tmp_path / "own" / "train.parquet", 40)
    tiny.parquet(tmp_path / "own" / "validation.parquet", 10, 35)
    images = Images(DataConfig(data=str(tmp_path / "own"), resolution=8))
    assert images.train_images == 35 and images.validation_images == 10
    assert {tiny.caption(k) for k in range(35)} == set(images.texts["train"])


def test_one_of_several_captions_and_the_mirror_are_drawn_by_seed_and_sample(tmp_path):
    import pyarrow as pa
    path = tiny.write_parquet(tmp_path / "a.parquet", [tiny.picture(k) for k in range(40)],
                              [[f"first {k}", f"second {k}", None, f"third {k}"] for k in range(40)], pa.list_(pa.string()))
    plain, images = (Images(DataConfig(data=path, resolution=8, flip=flip), seed=1) for flip in (False, True))
    index = torch.arange(60 * images.train_images)
    captions = images.captions("train", index)
    shares = [sum(caption.startswith(word) for caption in captions) / len(captions) for word in ("first", "second", "third")]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.04)
    assert captions[70:90] == images.captions("train", torch.arange(70, 90))   # of the sample alone
    assert captions == plain.captions("train", index)
    assert captions != Images(DataConfig(data=path, resolution=8), seed=2).captions("train", index)
    assert all(caption.startswith("first") for caption in images.captions("validation", torch.arange(images.validation_images)))
    one, other = plain.batch("train", index[:1000])[0], images.batch("train", index[:1000])[0]
    same, mirrored = (one == other).flatten(1).all(1), (one == other.flip(3)).flatten(1).all(1)
    assert (same | mirrored).all() and 0.45 < same.double().mean() < 0.55
    whole = torch.arange(images.validation_images)
    assert torch.equal(plain.batch("validation", whole)[0], images.batch("validation", whole)[0])


def hostile_rows():
    """200 rows: (image, caption, part of what is said of it or None, is it used?)."""
    exif = Image.Exif()
    exif[0x0112] = 3
    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 400).reshape(20, 20).astype(np.uint16)).save(deep, "PNG")
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    clear = io.BytesIO()
    Image.new("P", (20, 20), 0).save(clear, "PNG", transparency=0)
    jpeg = tiny.picture(1, 40, "JPEG")
    kinds = [
        (jpeg[:len(jpeg) // 2], b"cut", "(?i)truncated", False), (b"", b"nothing", "no image that pillow can read", False),
        (b"\0" * 500, b"zeros", "no image that pillow can read", False), (tiny.picture(2, 1), b"dot", "too small .4 x 1 pixels", False),
        (bomb.getvalue(), b"bomb", "(?i)too large|bomb", False), (tiny.picture(3, 20, "JPEG", "CMYK"), b"print", None, True),
        (clear.getvalue(), b"palette", None, True), (deep.getvalue(), b"deep", None, True), (animated.getvalue(), b"moves", "animation", True),
        (tiny.picture(4), None, "no caption", False), (tiny.picture(5), b"", "empty caption", True),
        (tiny.picture(6), b"word " * 10_000, "cut to 10,000", True), (tiny.picture(7), b"\xff\xfe caption", "not UTF-8", False),
        ("../secret.png", b"escapes", "out of the data", False), ("/etc/passwd", b"escapes", "out of the data", False),
        (None, b"no image", "no image", False), ("missing.png", b"nowhere", "leads nowhere", False), (tiny.picture(8, mode="L"), b"grey", None, True),
        (tiny.picture(9, mode="RGBA"), b"alpha", None, True), (tiny.picture(10, format="JPEG", exif=exif), b"turned", None, True)]
    return [kinds[k % len(kinds)] for k in range(200)]


def write_hostile(folder):
    import pyarrow as pa
    rows = hostile_rows()
    tiny.write_parquet(folder / "secret.png", [], [])   # what an escaping path would find
    (folder / "secret.png").write_bytes(tiny.picture(99))
    texts = pa.array([text for _, text, *_ in rows], pa.binary())
    (folder / "set").mkdir()
    table = tiny.write_parquet(folder / "set" / "a.parquet", [image for image, *_ in rows], pa.Array.from_buffers(pa.string(), len(texts), texts.buffers()))
    return rows, table


def test_hostile_rows_are_counted_and_named_and_none_is_fatal_or_black(tmp_path, encoders):
    rows, path = write_hostile(tmp_path)
    images = Images(DataConfig(data=path, resolution=16, validation_split="train"))
    said = {row: (what, used) for _, row, what, used in images.remarks}
    for row, (_, _, what, used) in enumerate(rows):
        assert (row in said) == (what is not None), (row, said.get(row))
        if what:
            assert re.search(what, said[row][0]) and said[row][1] == used, said[row]
    assert images.validation_images == sum(used for *_, used in rows) == 90
    pixels = images.pixels["validation"]
    assert (pixels.flatten(1).double().std(1) > 0).sum() == 80          # all but the clear palette, which is white
    assert not (pixels.flatten(1) < 8).all(1).any()
    assert (pixels[3 * 1 - 2] == 255).all()                              # a clear palette is white
    ramp = pixels[2, :, :, 0].double()
    assert ramp[0].mean() < 10 and ramp[-1].mean() > 245 and ramp.mean() == pytest.approx(127, abs=4)   # 16 bits, not cut off at 255
    assert "110 rows skipped" in data.about_remarks(images.remarks)
    out = make(tmp_path / "out", path, encoders, validation_split="train")
    stats = json.loads((out / "stats.json").read_text())
    assert stats["rows"] == 200 and stats["skipped"] == 110 and stats["counts"] == {"train": 0, "validation": 90}
    assert {(row, what) for _, row, what, _ in stats["remarks"]["rows"]} == {(row, what) for row, (what, _) in said.items()}
    assert sum(stats["remarks"]["skipped"].values()) == 110 and sum(stats["remarks"]["used"].values()) == 30


def test_nothing_to_use_and_other_bad_input_is_one_line(tmp_path):
    import pyarrow as pa
    path = tiny.parquet(tmp_path / "a.parquet", 30)
    none = tiny.write_parquet(tmp_path / "none.parquet", [b"no image"] * 5, ["text"] * 5)
    empty = tiny.write_parquet(tmp_path / "empty.parquet", [], [])
    numbers = tiny.write_parquet(tmp_path / "numbers.parquet", [tiny.picture(0)] * 3, [1, 2, 3], pa.int64())
    for more, said in ((dict(data=none), "none of its 5 rows can be used, mostly: no image that pillow"), (dict(data=empty), "or it is empty"),
                       (dict(data=numbers), "--text_column text: it holds int64, no text"),
                       (dict(data=path, text_column="caption"), "no column caption .there are image, text.: see --text_column"),
                       (dict(data=path, validation_split="dev"), "no split dev .there is train."), (dict(data=path, take=1), "too few"),
                       (dict(data=path, text="clip:/nowhere"), "--text clip:/nowhere: cannot load /nowhere .*hf download"),
                       (dict(data=path, text="bert"), "--text bert: take hash, clip"), (dict(data="scenes", flip=True), "--flip is for real images"),
                       (dict(data=str(tmp_path / "a.zip")), "no such file")):
        with pytest.raises(ValueError, match=said) as caught:
            Images(DataConfig(**{"resolution": 8, **more}))
        assert "\n" not in str(caught.value)


# ---- text encoders, of random weights in their genuine formats ------------------------------------------------------------

@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoders")
    return {"vae": tiny.tiny_vae(folder / "vae"), "clip": tiny.tiny_clip(folder / "clip"), "t5": tiny.tiny_t5(folder / "t5")}


@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_features_are_those_of_the_encoder(encoders, kind, tmp_path):
    """The last hidden states that transformers itself gives for one caption alone, of its real tokens."""
    text = PretrainedText(DataConfig(data="x", text=encoders[kind], text_tokens=12), "cpu")
    captions = ["an emoji of a mage", "", "word " * 10_000, "an emoji of a mage", "a"]
    features, mask = text.features(text.encode(captions))
    for k, caption in enumerate(captions):
        tokens = text.tokenizer([caption], truncation=True, max_length=12, return_tensors="pt")["input_ids"]
        length = tokens.shape[1] if caption else 0
        assert mask[k].tolist() == [True] * length + [False] * (12 - length)
        if length:
            alone = text.network(input_ids=tokens).last_hidden_state[0]
            assert torch.allclose(features[k, :length], alone, atol=1e-5)
    assert mask.sum(1).tolist()[1:3] == [0, 12] and torch.isfinite(features).all() and not features[1].any()
    parts = text.cached(captions)
    assert [part.shape for part in parts] == [(length, text.dim) for length in mask.sum(1).tolist()]
    padded, again = data.padded(parts, 12, text.dim)
    assert torch.equal(again, mask) and torch.allclose(padded.float(), features, atol=2e-3)
    text.network = None                                                    # what is kept needs no encoder
    assert all((one == other).all() for one, other in zip(text.cached(captions), parts))
    assert len(os.listdir(tmp_path / "features")) == 1


def test_too_many_slots_are_refused(encoders):
    with pytest.raises(ValueError, match="--text_tokens 78: .* only 77 positions"):
        PretrainedText(DataConfig(data="x", text=encoders["clip"], text_tokens=78), "cpu")


def test_pixels_with_clip_text_train(tmp_path, encoders):
    path = tiny.parquet(tmp_path / "a.parquet")
    images = Images(DataConfig(data=path, resolution=8, text=encoders["clip"], text_tokens=20))
    _, text, mask = images.batch("train", torch.arange(8))
    assert text.shape == (8, 20, 32) and images.shape == dict(channels=3, size=8, text_tokens=20, text_dim=32) and mask.any(1).all()
    (record,) = run(tmp_path / "run", "--data", path, "--resolution", "8", "--text", encoders["clip"], "--text_tokens", "20")
    assert record["train_images"] == images.train_images and record["epochs"] == record["images"] / images.train_images > 1
    assert record["images_repeated"] == record["images"] - images.train_images
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["encoders"]["text"]["sha256"] == images.encoders["text"]["sha256"] and config["data"]["text"] == encoders["clip"]


# ---- latents ---------------------------------------------------------------------------------------------------------------

def make(out, path, encoders, text="clip", **more):
    """data.py prepare in this process."""
    settings = {name: more.pop(name) for name in ("store", "text_store", "shard_rows", "batch", "vae") if name in more}
    text = encoders[text] if text != "hash" else text
    data.prepare(DataConfig(**{"data": str(path), "resolution": 16, "text": text, **more}),
                 PrepareConfig(out=str(out), **{"vae": encoders["vae"], "shard_rows": 16, "batch": 8, "device": "cpu", **settings}))
    return out


def run(out, *flags, budget="1e9"):
    """train.py in this process -> its records."""
    from data import parse_flags
    from model import ModelConfig
    configs = parse_flags((ModelConfig, DataConfig, train.TrainConfig), train.__doc__, train.PRESETS, argv=[
        "--depth", "1", "--width", "8", "--warmup", "1", "--device", "cpu", "--threads", "1", "--out", str(out), "--budget", budget, *flags])
    return train.train(*configs)


def files(folder):
    return {name: (Path(folder) / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture(scope="session")
def source(tmp_path_factory):
    return tiny.parquet(tmp_path_factory.mktemp("source") / "a.parquet", 150)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory, encoders, source):
    return make(tmp_path_factory.mktemp("prepared") / "set", source, encoders)


def test_round_trip_is_the_reconstruction_of_the_vae(prepared, encoders, source):
    """Encode, store in 16 bits, normalise, denormalise, decode: what the VAE itself makes of the pixels, to a level."""
    latents, images = load_data(DataConfig(data=str(prepared))), Images(DataConfig(data=source, resolution=16))
    assert (latents.train_images, latents.validation_images) == (images.train_images, images.validation_images)
    index = torch.arange(images.validation_images)
    pixels = images.batch("validation", index)[0]
    assert torch.equal(latents.images("validation", index), pixels) and latents.captions("validation", index) == images.captions("validation", index)
    vae = data.VAE(encoders["vae"], "cpu")
    with torch.no_grad():
        own = vae.network(pixels.float() / 127.5 - 1).sample
    own = ((own + 1) * 127.5).round().clamp(0, 255)
    moments, text, mask = latents.batch("validation", index)
    x = (moments[:, 0] - latents.shift) / latents.scale
    assert (latents.to_levels(x).float() - own).abs().max() <= 1
    assert latents.shape == dict(channels=4, size=4, text_tokens=77, text_dim=32) and text.shape[1:] == (77, 32)
    direct = PretrainedText(DataConfig(data="x", text=encoders["clip"]), "cpu")
    features, again = direct.features(direct.encode(images.captions("validation", index)))
    assert torch.equal(mask, again) and torch.allclose(text, features, atol=2e-3)
    order = torch.arange(images.train_images)                       # the same order, and a mirror image is that of the mirrored pixels
    assert latents.captions("train", order) == images.captions("train", order)
    flipped = load_data(DataConfig(data=str(prepared), flip=True))
    turned = Images(DataConfig(data=source, resolution=16, flip=True))
    expected = vae.moments(turned.batch("train", order[:32])[0].permute(0, 2, 3, 1))[:, 0]
    assert torch.allclose(flipped.batch("train", order[:32])[0], expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("store, text_store", [("float16", "features"), ("bfloat16", "ids")])
def test_latents_are_normalised_and_the_loss_starts_at_what_the_shards_say(tmp_path, encoders, source, prepared, store, text_store):
    folder = prepared if store == "float16" else make(tmp_path / "set", source, encoders, store=store, text_store=text_store)
    latents = load_data(DataConfig(data=str(folder)))
    moments = latents.batch("train", torch.arange(latents.train_images))[0]
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([latents.to_x(moments, generator) for _ in range(20)])
    assert x.mean((0, 2, 3)).abs().max() < 0.02 and (x.std((0, 2, 3)) - 1).abs().max() < 0.02
    mean, variance = moments[:, 0].double(), moments[:, 1].double().exp()
    square = (((mean - latents.shift) ** 2 + variance) / latents.scale ** 2).mean().item()    # E[x^2] from the shards
    assert square == pytest.approx(1, abs=0.02)
    (record,) = run(tmp_path / "run", "--data", str(folder), "--batch", "128", budget="8e9")
    assert record["start_loss_expected"] == pytest.approx(1 + square, abs=0.05)
    assert record["start_loss"] == pytest.approx(1 + square, abs=0.1)
    same = [load_data(DataConfig(data=str(one))).batch("validation", torch.arange(4))[1:] for one in (folder, prepared)]
    assert torch.equal(same[0][1], same[1][1]) and torch.allclose(same[0][0], same[1][0], atol=2e-3)   # features, or made anew from ids


def fork(do):
    """A copy of this process that does something and ends: -> its number. (To start Python anew takes seconds.)"""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            tqdm.set_lock(threading.RLock())   # tqdm's own is shared over forks: killed while it is held, it would never come back
            do()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def test_kill_9_at_ten_moments_leaves_the_shards_of_an_undisturbed_run(tmp_path, encoders, source, prepared):
    chance, whole, folder, moments = random.Random(0), files(prepared), tmp_path / "killed", []
    began = time.monotonic()
    assert os.waitpid(fork(lambda: make(tmp_path / "timed", source, encoders)), 0)[1] == 0
    seconds = time.monotonic() - began
    for attempt in range(60):
        pid = fork(lambda: make(folder, source, encoders))
        time.sleep(seconds * chance.uniform(0.2, 1))
        os.kill(pid, signal.SIGKILL)
        status, now = os.waitpid(pid, 0)[1], files(folder) if folder.exists() else {}
        assert status in (0, signal.SIGKILL)
        assert all(whole[name] == content for name, content in now.items() if ".tmp" not in name)
        moments += [len([name for name in now if name.endswith(".arrow")])] if status else []
        if len(moments) == 10:
            break
        if "stats.json" in now:                                            # it got there: from the start
            shutil.rmtree(folder)
    assert len(moments) == 10 and any(0 < finished < 10 for finished in moments), moments   # of the 10 shards, at each kill
    make(folder, source, encoders)
    assert files(folder) == whole
    times = {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)}
    make(folder, source, encoders)                                             # nothing to do
    assert times == {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)}


@pytest.mark.parametrize("stream", [False, True])
def test_two_ranks_make_the_shards_of_one(tmp_path, encoders, source, prepared, monkeypatch, stream):
    pids = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        pids.append(fork(lambda: make(tmp_path / "two", source, encoders, stream=stream)))
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    one, two = files(prepared), files(tmp_path / "two")
    assert one.keys() == two.keys()
    for name in one:
        assert one[name] == two[name] or (stream and name.endswith(".json")), name


def test_the_same_folder_for_something_else_is_refused(prepared, source, encoders, tmp_path):
    for more, said in ((dict(resolution=32), "flags.resolution: 16 -> 32"), (dict(store="bfloat16"), "flags.store: float16 -> bfloat16"),
                       (dict(text="t5"), "flags.text: clip:")):
        with pytest.raises(ValueError, match=f"--out .* belongs to another configuration .{said}"):
            make(prepared, source, encoders, **more)
    with pytest.raises(ValueError, match="--data .* is for real images that are not prepared"):
        make(tmp_path / "x", prepared, encoders)
    for more, said in ((dict(resolution=18), "--resolution 18: .* 4 x 4 pixels"), (dict(vae="/nowhere"), "--vae /nowhere: cannot load .*hf download"),
                       (dict(text="hash", text_store="ids"), "--text_store ids")):
        with pytest.raises(ValueError, match=said) as caught:
            make(tmp_path / "y", source, encoders, **more)
        assert "\n" not in str(caught.value)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "prepare.json").write_text("{}")
    with pytest.raises(ValueError, match="prepare has not finished"):
        DataConfig(data=str(tmp_path / "torn"))


def test_training_from_latents_resumes_bit_for_bit_and_on_any_number_of_devices(tmp_path, prepared, monkeypatch):
    flags = "--data", str(prepared), "--flip", "--val_images", "8"
    straight = run(tmp_path / "straight", *flags, budget="4e9")
    run(tmp_path / "halves", *flags, budget="2e9")
    again = run(tmp_path / "halves", *flags, budget="4e9")
    monkeypatch.setattr(data.Latents, "prefetch", False)
    alone = run(tmp_path / "alone", *flags, budget="4e9")
    for other in (again, alone):
        assert [other[-1][name] for name in ("train_loss", "val_loss_ema", "val_loss")] == [straight[-1][name] for name in ("train_loss", "val_loss_ema", "val_loss")]
    latents, config = load_data(DataConfig(data=str(prepared), flip=True), 0), train.TrainConfig()
    whole = train.training_batch(latents, config, 7, 0, 1, torch.device("cpu"))
    parts = [train.training_batch(latents, config, 7, rank, 2, torch.device("cpu")) for rank in range(2)]
    assert all(torch.equal(one, torch.cat(two)) for one, two in zip(whole, zip(*parts)))
    assert Image.open(tmp_path / "straight" / "budget_4e+09" / "samples.png").size[0] > 500


def test_other_encoders_are_refused_by_training_and_evaluation(tmp_path, prepared, source, encoders, capsys):
    import evaluate
    run(tmp_path / "run", "--data", str(prepared), "--val_images", "8")
    other = {**encoders, "clip": tiny.tiny_clip(tmp_path / "clip", seed=1), "vae": tiny.tiny_vae(tmp_path / "vae", seed=1)}
    texts = make(tmp_path / "texts", source, {**encoders, "clip": other["clip"]})
    latents = make(tmp_path / "latents", source, {**encoders, "vae": other["vae"]}, shard_rows=8)
    for folder, what in ((texts, "text"), (latents, "vae")):
        with pytest.raises(ValueError, match=f"--data .*: its {what} encoder is .* the model was trained with"):
            evaluate.evaluate(evaluate.EvaluateConfig(path=str(tmp_path / "run"), data=[str(folder)], n=4, samples=0, device="cpu"))
    os.rename(prepared, tmp_path / "kept")
    try:
        os.rename(latents, prepared)                                           # a set made anew in the same place
        with pytest.raises(ValueError, match="belongs to another configuration .encoders.vae"):
            run(tmp_path / "run", "--data", str(prepared), "--val_images", "8", budget="2e9")
    finally:
        os.rename(prepared, latents)
        os.rename(tmp_path / "kept", prepared)


def test_evaluation_of_latents_with_the_normalisation_of_the_training(tmp_path, prepared, encoders):
    """Another data set, with its own scale and shift in its stats.json, is seen as the model was trained to."""
    import evaluate
    other = make(tmp_path / "other", tiny.parquet(tmp_path / "b.parquet", 40, 500), encoders, validation_split="train")
    run(tmp_path / "run", "--data", str(prepared), "--val_images", "8")
    evaluate.evaluate(evaluate.EvaluateConfig(
        path=str(tmp_path / "run" / "budget_1e+09"), metrics=["loss", "vlb", "nll", "fd"], data=[str(prepared), str(other)], n=8, samples=2,
        steps=2, likelihood_steps=2, vlb_times=2, allow_singular=True, device="cpu"))
    name = os.path.basename(prepared)
    numbers = [json.loads((tmp_path / "run" / "budget_1e+09" / f"metrics_{one}.json").read_text())["metrics"] for one in (name, "other")]
    for metrics in numbers:
        assert metrics["vlb"]["unit"] == metrics["nll"]["unit"] == "bits/latent dim" and "posterior" in metrics["nll"]["protocol"]["dequantised"]
        assert metrics["nll"]["value"] == pytest.approx(metrics["nll"]["nats_per_image"] / (4 * 4 * 4 * np.log(2)))
        assert metrics["fd_scenes"]["value"] > 0 and "own pixels" in metrics["fd_scenes"]["protocol"]["reference"]
    latents, foreign = (load_data(DataConfig(data=str(one))) for one in (prepared, other))
    assert not torch.equal(latents.shift, foreign.shift)
    foreign.use_training_encoders(latents.encoders)
    assert torch.equal(latents.shift, foreign.shift) and torch.equal(latents.scale, foreign.scale)


def test_look_of_latents_and_of_hostile_rows(tmp_path, prepared):
    data.look(DataConfig(data=str(prepared)), data.LookConfig(out=str(tmp_path / "look.png")))
    assert Image.open(tmp_path / "look.png").size[0] > 500
    _, path = write_hostile(tmp_path)
    data.look(DataConfig(data=path, validation_split="train"), data.LookConfig(out=str(tmp_path / "hostile.png")))


@pytest.mark.parametrize("flags, said", [
    (["--batch", "512", "--micro_batches", "1"], "--batch 512: .* has only 1.. images to train on"),
    (["--patch", "3"], "--patch 3 does not divide the image side 4"), (["--take", "5"], "is prepared already"),
])
def test_latents_that_do_not_fit_are_refused(tmp_path, prepared, flags, said, capsys):
    try:
        run(tmp_path / "run", "--data", str(prepared), *flags)
    except ValueError as error:
        message = str(error)
    except SystemExit as exit:
        assert exit.code == 2
        message = capsys.readouterr().err.strip()
    assert re.search(said, message) and "\n" not in message


@pytest.mark.slow
def test_the_papers_preset_runs_on_prepared_latents(tmp_path, prepared, capsys):
    import sweep
    flags = ["--data", str(prepared), "--warmup", "1", "--batch", "16", "--micro_batches", "2", "--device", "cpu", "--val_images", "8"]
    assert sweep.run_sweep(sweep.SweepConfig(preset="paper", dry_run=True), flags[:2]) == 0
    assert "D (tokens)" in capsys.readouterr().out
    status = sweep.run_sweep(sweep.SweepConfig(preset="paper", out=str(tmp_path / "grid"), depth=[1], width=[64], budget=[5e10, 1e11], window=1e12), flags)
    assert status != 0                                                     # two points of one size are no law, and fit.py says so
    records = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("grid/*/budget_*/result.json"))]
    assert len(records) == 2 and all(record["count"] == "6nd" and record["D_text"] == 77 * record["images"] for record in records)


def test_nothing_that_comes_with_data_or_weights_is_executed(tmp_path, encoders):
    """A loading script beside the data is not run, weights that are no safetensors are not read."""
    tiny.imagefolder(tmp_path / "set")
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="--data .*scripts are no longer supported"):
        Images(DataConfig(data=str(tmp_path / "set"), resolution=8))
    shutil.copytree(encoders["vae"], tmp_path / "vae")
    torch.save({}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    os.remove(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="--vae .*cannot load"):
        data.VAE(str(tmp_path / "vae"), "cpu")
    assert not (tmp_path / "ran").exists()


def test_other_images_under_the_same_name_are_noticed(tmp_path, encoders):
    """A run, and a folder of prepare, belong to their images and not to a path."""
    path = tiny.parquet(tmp_path / "a.parquet", 64)
    first = Images(DataConfig(data=path, resolution=8)).encoders["images"]
    assert first == Images(DataConfig(data=path, resolution=8), seed=1).encoders["images"]
    out = make(tmp_path / "out", path, encoders)
    kept = files(out)
    (record,) = run(tmp_path / "run", "--data", path, "--resolution", "8", "--batch", "8", budget="5e8")
    tiny.write_parquet(path, [tiny.picture(1000 + k) for k in range(64)], [f"another {k}" for k in range(64)])
    assert Images(DataConfig(data=path, resolution=8)).encoders["images"] != first
    with pytest.raises(ValueError, match="encoders.images.sha256"):
        run(tmp_path / "run", "--data", path, "--resolution", "8", "--batch", "8", budget="1e9")
    make(out, path, encoders)                                              # what is finished is left alone
    assert files(out) == kept
    (out / "stats.json").unlink()
    with pytest.raises(ValueError, match="belongs to another configuration .*rows"):
        make(out, path, encoders)
    (out / "prepare.json").unlink()
    with pytest.raises(ValueError, match="nobody knows what made them"):
        make(out, path, encoders)


def test_postscript_is_no_picture(tmp_path):
    """Pillow would have Ghostscript run it."""
    script = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(script, "EPS")
    path = tiny.write_parquet(tmp_path / "a.parquet", [tiny.picture(k) for k in range(40)] + [script.getvalue()], ["text"] * 41)
    assert [(row, what) for _, row, what, _ in Images(DataConfig(data=path, resolution=8)).remarks] == [(40, "no image that pillow can read")]


def test_a_failing_disk_is_not_a_skipped_row(tmp_path, monkeypatch):
    Image.fromarray(np.full((16, 16, 3), 77, np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr("builtins.open", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    import pyarrow as pa
    table = pa.table({"image": [{"bytes": None, "path": "a.png"}], "text": ["x"]})
    with pytest.raises(OSError, match="Input/output"):
        data.read_rows(table, "image", "text", 8, [str(tmp_path)])


def test_sixteen_bits_keep_orientation_transparency_and_light():
    levels = (np.arange(16 * 16, dtype=np.uint16) * 257).reshape(16, 16)
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 3                                                       # upside down
    Image.fromarray(levels).save(file, "PNG", exif=exif, transparency=int(levels[0, 0]))
    read = data.to_pixels(Image.open(file), 16)[..., 0]
    assert read[-1, -1] == 255 and np.array_equal(read.ravel()[:-1][::-1], np.arange(1, 256))
    dim = Image.fromarray(np.arange(256, dtype=np.int32).reshape(16, 16))  # 32 bits wide, 8-bit levels: no black picture
    assert data.to_pixels(dim, 16)[..., 0].max() == 255
