import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import DataConfig, HashText, Images, Scenes, load_data

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
    assert few.train_images == 20 and set(few.texts["train"]) < set(more.texts["train"]) < set(first.texts["train"])
    assert few.texts["validation"] == first.texts["validation"] and few.pixels["train"].shape[0] == len(few.ids["train"]) == 20
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
    import io
    buffer = io.BytesIO()
    turned.save(buffer, "PNG", exif=exif)
    assert data.to_pixels(Image.open(buffer), 8)[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("make, said", [
    (lambda folder: str(folder / "nothing"), "no such file"),
    (lambda folder: make_parquet(folder, 20, ("picture", "text")), "columns image and text"),
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
