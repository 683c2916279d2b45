import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import evaluate
import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two points, made by train.py itself."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = ["--depth", "1", "--width", "8", "--resolution", "4", "--text_tokens", "4", "--text_dim", "8", "--batch", "8",
             "--val_images", "64", "--warmup", "3", "--out", str(folder), "--budget", "4e7", "8e7"]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True, capture_output=True)
    return folder


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, arguments)], capture_output=True, text=True)


def test_the_same_protocol_gives_the_trainers_own_number(trained):
    said = command(trained, "--n", "64", "--data", "scenes", "scenes-ood", "--samples", "6", "--guidance", "1", "3")
    assert said.returncode == 0, said.stderr
    record = json.loads((trained / "budget_8e+07" / "result.json").read_text())
    point = json.loads((trained / "budget_8e+07" / "metrics_scenes.json").read_text())["metrics"]
    both = json.loads((trained / "checkpoint_metrics_scenes.json").read_text())["metrics"]
    assert point["val_loss_ema"]["value"] == both["val_loss_ema"]["value"] == pytest.approx(record["val_loss_ema"], rel=1e-6)
    assert both["val_loss"]["value"] == pytest.approx(record["val_loss"], rel=1e-6)       # 64 images are one whole batch
    assert point["val_loss_ema"]["se"] == pytest.approx(record["val_loss_ema_se"], rel=1e-6)
    ood = json.loads((trained / "budget_8e+07" / "metrics_scenes-ood.json").read_text())["metrics"]
    assert ood["val_loss_ema"]["value"] != point["val_loss_ema"]["value"]
    pictures = sorted(trained.rglob("samples_*.png"))
    assert [p.name for p in pictures] == ["samples_scenes-ood.png", "samples_scenes.png"]
    assert all(Image.open(p).width > 3 * 112 * 3 for p in pictures)     # held-out, guidance 1 and 3, side by side

    before = (trained / "budget_8e+07" / "metrics_scenes.json").stat().st_mtime_ns
    assert command(trained, "--n", "64", "--samples", "0").returncode == 0
    assert (trained / "budget_8e+07" / "metrics_scenes.json").stat().st_mtime_ns == before     # only what is missing
    assert command(trained, "--n", "32", "--samples", "0").returncode == 0
    assert json.loads((trained / "budget_8e+07" / "metrics_scenes.json").read_text())["protocol"]["n"] == 32


def test_numbers_of_other_weights_are_not_taken_for_these(trained, tmp_path):
    """After a run has gone on, what was written about its older weights must not be printed as current."""
    file = tmp_path / "ema.safetensors"
    values = []
    for point in ("budget_4e+07", "budget_8e+07"):
        shutil.copy(trained / point / "ema.safetensors", file)
        assert command(file, "--n", "64", "--samples", "0").returncode == 0
        values.append(json.loads((tmp_path / "metrics_scenes.json").read_text())["metrics"]["val_loss_ema"]["value"])
    assert values[0] != values[1]


def test_samples_depend_on_seed_and_caption_alone(trained):
    models, definition, _ = evaluate.load_models(str(trained / "budget_8e+07" / "ema.safetensors"), torch.device("cpu"))
    data = evaluate.load_data(evaluate.DataConfig(**definition["data"]), 0, "cpu")
    config = train.TrainConfig(precision="float32")
    many = train.sample_images(models["ema"], data, config, torch.arange(4), steps=3)
    one = train.sample_images(models["ema"], data, config, torch.tensor([2]), steps=3)
    assert (many[2].int() - one[0].int()).abs().max() <= 1 and many.dtype == torch.uint8
    assert not torch.equal(many, train.sample_images(models["ema"], data, config, torch.arange(4), steps=3, seed=1))


@pytest.mark.parametrize("arguments, named", [
    (["/no/such/place"], "no such file"), (["EMPTY"], "no ema.safetensors"), (["TORN"], "torn"), (["RUN", "--data", "/no/such"], "--data"),
    (["RUN", "--n", "1"], "--n"), (["RUN", "--samples", "5", "--n", "4"], "--samples"), (["RUN", "--gudance", "3"], "--gudance"),
    (["RUN", "--steps", "0"], "--steps"),
])
def test_bad_input_is_one_line(trained, tmp_path, arguments, named):
    (tmp_path / "torn.safetensors").write_bytes(b"\x00\x01torn")
    places = {"EMPTY": tmp_path / "empty", "TORN": tmp_path / "torn.safetensors", "RUN": trained}
    (tmp_path / "empty").mkdir()
    said = command(*[places.get(word, word) for word in arguments])
    assert said.returncode == 2 and named in said.stderr
    assert len([line for line in said.stderr.strip().splitlines() if "evaluate.py: " in line]) == 1 and "Traceback" not in said.stderr
