import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import evaluate
import train

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two points, made by train.py itself."""
    folder = tmp_path_factory.mktemp("run") / "run"
    flags = ["--depth", "1", "--width", "8", "--resolution", "4", "--text_tokens", "16", "--text_dim", "8", "--batch", "8",
             "--val_images", "64", "--warmup", "3", "--out", str(folder), "--budget", "8e7", "1.6e8"]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True, capture_output=True)
    return folder


def command(*arguments):
    """evaluate.py as a user calls it; offline, so that no test waits for a hub that is not there."""
    return subprocess.run([sys.executable, ROOT / "evaluate.py", *map(str, arguments)], capture_output=True, text=True,
                          env={**os.environ, "HF_HUB_OFFLINE": "1"})


def test_the_same_protocol_gives_the_trainers_own_number(trained):
    said = command(trained, "--n", "64", "--data", "scenes", "scenes-ood", "--samples", "6", "--picture_guidance", "1", "3")
    assert said.returncode == 0, said.stderr
    record = json.loads((trained / "budget_1.6e+08" / "result.json").read_text())
    point = json.loads((trained / "budget_1.6e+08" / "metrics_scenes.json").read_text())["metrics"]
    both = json.loads((trained / "checkpoint_metrics_scenes.json").read_text())["metrics"]
    assert point["val_loss_ema"]["value"] == both["val_loss_ema"]["value"] == pytest.approx(record["val_loss_ema"], rel=1e-6)
    assert both["val_loss"]["value"] == pytest.approx(record["val_loss"], rel=1e-6)       # 64 images are one whole batch
    assert point["val_loss_ema"]["se"] == pytest.approx(record["val_loss_ema_se"], rel=1e-6)
    ood = json.loads((trained / "budget_1.6e+08" / "metrics_scenes-ood.json").read_text())["metrics"]
    assert ood["val_loss_ema"]["value"] != point["val_loss_ema"]["value"]
    pictures = sorted(trained.rglob("samples_*.png"))
    assert [p.name for p in pictures] == ["samples_scenes-ood.png", "samples_scenes.png"]
    assert all(Image.open(p).width > 3 * 112 * 3 for p in pictures)     # held-out, guidance 1 and 3, side by side

    before = (trained / "budget_1.6e+08" / "metrics_scenes.json").stat().st_mtime_ns
    assert command(trained, "--n", "64", "--samples", "0").returncode == 0
    assert (trained / "budget_1.6e+08" / "metrics_scenes.json").stat().st_mtime_ns == before     # only what is missing
    assert command(trained, "--n", "32", "--samples", "0").returncode == 0
    numbers = json.loads((trained / "budget_1.6e+08" / "metrics_scenes.json").read_text())["metrics"]
    assert numbers["val_loss_ema"]["protocol"]["n"] == 32


def test_levels_are_the_inverse_of_data():
    k = torch.arange(256)
    assert torch.equal(data.to_levels(data.to_data(k, torch.rand(256))), k.byte())
    assert data.to_levels(torch.tensor([-1.4, 1.7])).tolist() == [0, 255]


def test_numbers_of_other_weights_are_not_taken_for_these(trained, tmp_path):
    """After a run has gone on, what was written about its older weights must not be printed as current."""
    file = tmp_path / "ema.safetensors"
    values = []
    for point in ("budget_8e+07", "budget_1.6e+08"):
        shutil.copy(trained / point / "ema.safetensors", file)
        assert command(file, "--n", "64", "--samples", "0").returncode == 0
        values.append(json.loads((tmp_path / "metrics_scenes.json").read_text())["metrics"]["val_loss_ema"]["value"])
    assert values[0] != values[1]


def test_samples_depend_on_seed_and_caption_alone(trained):
    models, definition, _ = evaluate.load_models(str(trained / "budget_1.6e+08" / "ema.safetensors"), torch.device("cpu"))
    data = evaluate.load_data(evaluate.DataConfig(**definition["data"]), 0, "cpu")
    many = train.sample_data(models["ema"], data, "float32", torch.arange(4), steps=3)
    one = train.sample_data(models["ema"], data, "float32", torch.tensor([2]), steps=3)
    assert (many[2] - one[0]).abs().max() <= 1e-5
    assert not torch.equal(many, train.sample_data(models["ema"], data, "float32", torch.arange(4), steps=3, seed=1))


@pytest.mark.parametrize("arguments, named", [
    (["/no/such/place"], "no such file"), (["EMPTY"], "no ema.safetensors"), (["TORN"], "torn"), (["RUN", "--data", "/no/such"], "--data"),
    (["RUN", "--n", "1"], "--n"), (["RUN", "--samples", "5", "--n", "4"], "--samples"), (["RUN", "--gudance", "3"], "--gudance"),
    (["RUN", "--steps", "0"], "--steps"), (["RUN", "--metrics", "fid"], "--metrics"), (["RUN", "--batch", "0"], "--batch"),
    (["RUN", "--guidance", "2"], "--guidance"), (["RUN", "--metrics", "fd", "nll", "--guidance", "2"], "no density"),
    (["RUN", "--metrics", "fd", "--n", "128"], "--allow_singular"), (["RUN", "--metrics", "fd", "--features", "inception"], "--features"),
    (["RUN", "--likelihood_steps", "1"], "--likelihood_steps"), (["RUN", "--metrics", "fd", "--features", "clip:/no/such"], "--features clip:FOLDER"),
    (["RUN", "--metrics", "fd", "--features", "dinov2"], "model.safetensors"), (["NO_EMA"], "EMA"),
    (["RUN", "--metrics", "vlb", "vlb"], "each once"), (["RUN", "--data", "scenes", "other/scenes"], "same name"),
    (["RUN", "--metrics", "fd", "--save_images", "x", "--n", "200"], "one model"),
])
def test_bad_input_is_one_line(trained, tmp_path, arguments, named, monkeypatch, capsys):
    (tmp_path / "torn.safetensors").write_bytes(b"\x00\x01torn")
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    torch.save({name: part for name, part in checkpoint.items() if name != "ema"}, tmp_path / "checkpoint.pt")
    places = {"NO_EMA": tmp_path / "checkpoint.pt", "EMPTY": tmp_path / "empty", "TORN": tmp_path / "torn.safetensors", "RUN": trained}
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *(str(places.get(word, word)) for word in arguments)])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    said = capsys.readouterr().err
    assert ended.value.code == 2 and named in said
    assert len([line for line in said.strip().splitlines() if "evaluate.py: " in line]) == 1 and "Traceback" not in said


# ---- likelihoods -------------------------------------------------------------------------------------------------------

def test_all_metrics_of_a_run_are_written_with_their_protocol_and_only_once(trained, tmp_path):
    point = tmp_path / "budget_1.6e+08"
    shutil.copytree(trained / "budget_1.6e+08", point)
    flags = [point, "--metrics", "loss", "vlb", "nll", "fd", "--n", "160", "--likelihood_steps", "4", "--vlb_times", "8", "--steps", "2",
             "--samples", "0", "--data", "scenes", "scenes-ood", "--batch", "48"]   # of two ranks the second has the last batch
    said = command(*flags)
    assert said.returncode == 0, said.stderr
    for name in ("scenes", "scenes-ood"):
        metrics = json.loads((point / f"metrics_{name}.json").read_text())["metrics"]
        assert set(metrics) == {"val_loss_ema", "vlb", "nll", "vlb_minus_nll", "fd_scenes", "kid_scenes", "caption_accuracy"}
        assert all(number["protocol"]["n"] == 160 and number["se"] > 0 and number["weights"] == "ema" for number in metrics.values())
        assert metrics["vlb_minus_nll"]["value"] == pytest.approx(metrics["vlb"]["value"] - metrics["nll"]["value"])
        assert metrics["fd_scenes"]["protocol"]["features"]["sha256"] == evaluate.READER_SHA256
        assert "singular" not in metrics["fd_scenes"]
        parts = sum(metrics["vlb"][f"{part}_nats"] for part in ("prior", "diffusion", "reconstruction"))
        assert parts == pytest.approx(metrics["vlb"]["nats_per_image"]) and metrics["vlb"]["unit"] == "bits/dim"
        assert metrics["vlb"]["value"] == pytest.approx(metrics["vlb"]["nats_per_image"] / (3 * 16 * np.log(2)) + 7)
        assert 0 < metrics["nll"]["se_of_probes"] < metrics["nll"]["se"]
        assert np.load(point / f"nll_{name}.npy").mean() == pytest.approx(metrics["nll"]["nats_per_image"])
    assert metrics["nll"]["value"] == pytest.approx(metrics["nll"]["nats_per_image"] / (3 * 16 * np.log(2)) + 7)
    assert not list(point.glob("partial*"))
    before = {file: file.stat().st_mtime_ns for file in point.glob("*")}
    assert command(*flags).returncode == 0
    assert {file: file.stat().st_mtime_ns for file in point.glob("*")} == before
    ranks = tmp_path / "ranks"
    shutil.copytree(trained / "budget_1.6e+08", ranks)
    said = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--", ROOT / "evaluate.py", ranks, *map(str, flags[1:])],
                          capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for name in ("scenes", "scenes-ood"):
        one, two = (json.loads((folder / f"metrics_{name}.json").read_text())["metrics"] for folder in (point, ranks))
        for metric in one:
            assert two[metric]["value"] == pytest.approx(one[metric]["value"], rel=1e-5, abs=1e-6), metric
            assert two[metric]["protocol"] == one[metric]["protocol"]


def test_numbers_are_those_of_flow_with_fresh_noise_for_each_batch_and_seed(trained):
    """What evaluate.py writes is what flow says of (k + u) / 128 - 1, with u, times and probes that no other batch has."""
    models, definition, _ = evaluate.load_models(str(trained / "budget_1.6e+08" / "ema.safetensors"), torch.device("cpu"))
    data = evaluate.load_data(evaluate.DataConfig(**definition["data"]), 0, "cpu")
    seen = []

    def watching(x_t, t, text, text_mask):
        seen.append((x_t.clone(), t.clone()))
        return models["ema"](x_t, t, text, text_mask)
    config = evaluate.EvaluateConfig(batch=4, vlb_times=2, likelihood_steps=2)
    for seed in (0, 1):
        noises = []
        for start in (0, 4):
            x, text, mask = evaluate.with_noise(data, evaluate.EvaluateConfig(seed=seed), torch.arange(start, start + 4))
            k = data.batch("validation", torch.arange(start, start + 4))[0]
            u = (x + 1) * 128 - k
            assert u.min() >= 0 and u.max() < 1 and u.std() > 0.25                # dequantised, uniformly
            noises.append(u)
        assert not torch.equal(*noises)
    first = lambda seed: evaluate.with_noise(data, evaluate.EvaluateConfig(seed=seed), torch.arange(4))[0]
    assert not torch.equal(first(0), first(1)) and torch.equal(first(0), first(0))
    where = lambda what: str(trained / f"flow_{what}")
    evaluate.likelihood_metrics("nll", {"ema": watching}, data, "float32", config, 8, where, None)
    assert torch.equal(seen[0][0], evaluate.with_noise(data, config, torch.arange(4))[0])   # t = 0 is the noisy image itself
    seen.clear()
    evaluate.likelihood_metrics("vlb", {"ema": watching}, data, "float32", config, 8, where, None)
    assert len(seen) == 4 and not torch.equal(seen[0][1], seen[2][1])             # other times for the second batch
    reseeded = evaluate.likelihood_metrics("vlb", models, data, "float32", dataclasses.replace(config, seed=1), 8, where, None)
    again = [evaluate.likelihood_metrics("vlb", models, data, "float32", config, 8, where, None)["vlb"]["value"] for _ in range(2)]
    assert again[0] == again[1] != reseeded["vlb"]["value"]


def test_samples_are_drawn_as_the_flags_say(trained):
    """Guidance, steps, solver and seed reach the sampler, and a guided number has a name of its own."""
    models, definition, _ = evaluate.load_models(str(trained / "budget_1.6e+08" / "ema.safetensors"), torch.device("cpu"))
    data, network = evaluate.load_data(evaluate.DataConfig(**definition["data"]), 0, "cpu"), evaluate.FeatureNetwork("scenes", "cpu")
    torch.nn.init.normal_(models["ema"].head.weight, std=0.2)                     # so little training hardly hears a caption
    base = evaluate.EvaluateConfig(metrics=["fd"], steps=2)
    real = evaluate.real_images(data, network, base, 40)
    values = {}
    for change in ({}, {"guidance": 2.0}, {"steps": 3}, {"solver": "euler"}, {"seed": 1}):
        config = dataclasses.replace(base, **change)
        numbers = evaluate.distance_metrics(models, data, "float32", config, 40, None, None, network, real)
        guided = "_g2" if "guidance" in change else ""
        assert set(numbers) == {f"fd_scenes{guided}", f"kid_scenes{guided}", f"caption_accuracy{guided}"}
        values[str(change)] = numbers[f"fd_scenes{guided}"]["value"]
        assert numbers[f"fd_scenes{guided}"]["halves_of_real"] is None            # of 20 images: singular
    assert len(set(values.values())) == len(values)


def test_sparse_captions_are_asked_for_one_shape_only(tmp_path):
    flags = ["--depth", "1", "--width", "8", "--resolution", "4", "--captions", "sparse", "--text_dim", "8", "--batch", "8", "--val_images", "64",
             "--warmup", "3", "--out", str(tmp_path / "run"), "--budget", "8e7"]
    subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True, capture_output=True)
    said = command(tmp_path / "run" / "budget_8e+07", "--metrics", "fd", "--n", "160", "--steps", "1", "--samples", "0")
    assert said.returncode == 0, said.stderr
    number = json.loads((tmp_path / "run" / "budget_8e+07" / "metrics_scenes.json").read_text())["metrics"]["caption_accuracy"]
    assert set(number["real_images"]) == {"all", "kind", "colour", "size"} and 0 < number["value"] < 1


def test_data_sets_of_one_name_are_kept_apart(trained, tmp_path):
    shutil.copy(trained / "budget_1.6e+08" / "ema.safetensors", tmp_path / "ema.safetensors")
    said = command(tmp_path, "--n", "64", "--samples", "0")
    assert said.returncode == 0, said.stderr
    saved = json.loads((tmp_path / "metrics_scenes.json").read_text())
    (tmp_path / "metrics_scenes.json").write_text(json.dumps({**saved, "data": "elsewhere/scenes.parquet"}))
    said = command(tmp_path, "--n", "64", "--samples", "0")
    assert said.returncode == 2 and "same name" in said.stderr


def test_a_killed_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "PARTIAL_SECONDS", 0)
    asked = []

    def compute(index):
        asked.append(index[0].item())
        if len(asked) == 3:
            raise KeyboardInterrupt
        return torch.stack([index.double(), index.double() ** 2], 1)
    with pytest.raises(KeyboardInterrupt):
        evaluate.for_each_image(10, 2, 3, compute, str(tmp_path / "partial"), "test")
    assert [file.name for file in tmp_path.iterdir()] == ["partial_0of1.npy"]
    values = evaluate.for_each_image(10, 2, 3, compute, str(tmp_path / "partial"), "test")
    assert asked == [0, 3, 6, 6, 9]
    assert torch.equal(values, torch.stack([torch.arange(10.0), torch.arange(10.0) ** 2], 1).double())
    (tmp_path / "partial_0of1.npy").write_bytes(b"torn")
    asked[:] = [0, 0, 0]
    assert torch.equal(values, evaluate.for_each_image(10, 2, 3, compute, str(tmp_path / "partial"), "test"))


def test_numbers_that_are_none_are_refused_by_name(trained, tmp_path):
    weights = load_file(trained / "budget_1.6e+08" / "ema.safetensors")
    with evaluate.safe_open(trained / "budget_1.6e+08" / "ema.safetensors", "pt") as file:
        about = file.metadata()
    save_file({name: weight.fill_(float("nan")) for name, weight in weights.items()}, tmp_path / "ema.safetensors", about)
    said = command(tmp_path / "ema.safetensors", "--metrics", "loss", "vlb", "nll", "fd", "--n", "160", "--likelihood_steps", "2", "--steps", "1",
                   "--samples", "0")
    assert said.returncode == 0, said.stderr
    metrics = json.loads((tmp_path / "metrics_scenes.json").read_text())["metrics"]
    assert set(metrics) == {"val_loss_ema", "vlb", "nll", "fd_scenes", "kid_scenes", "caption_accuracy"}
    assert all(number["value"] is None and "160 of 160" in number["reason"] for number in metrics.values())


def test_only_points_of_the_parabolas_windows_are_evaluated(tmp_path):
    """Published records, with an empty file where each point's weights would be."""
    shutil.copytree(ROOT / "results" / "quick", tmp_path / "quick")
    for record in (tmp_path / "quick").glob("*/budget_*/result.json"):
        record.with_name("ema.safetensors").touch()
    law = json.loads((ROOT / "results" / "quick" / "law" / "law.json").read_text())
    inside = [point["source"].split("quick/")[1] for point in law["points"] if point["in_window"]]
    chosen = evaluate.find_weights(str(tmp_path / "quick"), "window")
    assert sorted(str(Path(file).relative_to(tmp_path / "quick").with_name("result.json")) for file in chosen) == sorted(inside)
    assert len(evaluate.find_weights(str(tmp_path / "quick"), "all")) == len(law["points"]) > len(inside)


# ---- distances ---------------------------------------------------------------------------------------------------------

def test_frechet_distance_is_the_closed_form():
    random = np.random.default_rng(0)
    a, b, m = random.uniform(0.1, 4, 6), random.uniform(0.1, 4, 6), random.normal(size=6)
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0]
    exact = (m @ m) + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()                       # covariances that commute
    assert evaluate.frechet_distance(m, turn * a @ turn.T, np.zeros(6), turn * b @ turn.T) == pytest.approx(exact, rel=1e-12)
    A, B = (matrix @ matrix.T for matrix in random.normal(size=(2, 6, 6)))         # and any others, by the product's square root
    exact = m @ m + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert evaluate.frechet_distance(m, A, np.zeros(6), B) == pytest.approx(exact, rel=1e-9)
    assert evaluate.frechet_distance(m, A, m, A) == pytest.approx(0, abs=1e-9)
    flat = np.diag([1.0, 2, 0, 0, 0, 0])                                           # singular, as with few images
    assert evaluate.frechet_distance(m, flat, m, flat) == pytest.approx(0, abs=1e-9)
    samples = random.normal(size=(200_000, 6)) @ np.linalg.cholesky(A).T, random.normal(size=(200_000, 6)) @ np.linalg.cholesky(B).T + m
    assert evaluate.frechet_of_features(*samples) == pytest.approx(exact, rel=0.02)


def test_kernel_distance_is_the_unbiased_one():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 3)), random.normal(size=(5, 3)) + 1
    k = lambda a, b: (a @ b / 3 + 1) ** 3
    exact = (np.mean([k(x[i], x[j]) for i in range(7) for j in range(7) if i != j])
             + np.mean([k(y[i], y[j]) for i in range(5) for j in range(5) if i != j])
             - 2 * np.mean([k(a, b) for a in x for b in y]))
    assert evaluate.kernel_distance(x, y) == pytest.approx(exact, rel=1e-12)
    same = [evaluate.kernel_distance(*random.normal(size=(2, 40, 3))) for _ in range(400)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20
    big = random.normal(size=(2500, 3))                                            # more than one block of rows
    assert evaluate.kernel_distance(big, big[::-1] + 0.5) > 0.05


@pytest.fixture(scope="module")
def world():
    """The reader, 2,000 validation scenes at 16 pixels, and what it measures of them."""
    network, data = evaluate.FeatureNetwork("scenes", "cpu"), evaluate.load_data(evaluate.DataConfig())
    images, *_ = data.batch("validation", torch.arange(2000))
    return network, data, images, evaluate.measure(images, torch.arange(2000), network, data).numpy()


def distance(world, images):
    network, _, _, truth = world
    return evaluate.frechet_of_features(truth[:, :network.width], network(images).double().numpy())


def test_the_distance_grows_with_every_damage(world):
    network, data, images, truth = world
    halves = evaluate.frechet_of_features(truth[::2, :network.width], truth[1::2, :network.width])
    others, *_ = data.batch("validation", torch.arange(2000, 4000))
    floor = distance(world, others)
    assert 0 < floor < halves                                                      # of twice as many images
    pixels, generator = images.float(), torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator)
    wrong = evaluate.load_data(evaluate.DataConfig(data="scenes-ood")).batch("validation", torch.arange(2000))[0]
    damages = {
        "noise": [(pixels + level * noise).clamp(0, 255).byte() for level in (0, 6, 12, 25, 50)],
        "blur": [torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False).lerp(pixels, 1 - share).byte() for share in (0, 0.25, 0.5, 0.75, 1)],
        "images of another world's captions": [torch.cat([wrong[:count], images[count:]]) for count in (0, 250, 500, 1000, 2000)],
    }
    for what, series in damages.items():
        distances = [distance(world, damaged) for damaged in series]
        assert all(less < more for less, more in zip(distances, distances[1:])), (what, distances)
        assert distances[-1] > 2.5 * halves, what


def test_caption_accuracy_knows_right_from_wrong(world):
    network, data, images, truth = world
    own, chance = truth[:, network.width], truth[:, network.width + 5]
    assert own.mean() > 0.6 and chance.mean() < 0.5 * own.mean()
    blank = evaluate.measure(torch.full_like(images, 128), torch.arange(2000), network, data).numpy()[:, network.width]
    assert blank.mean() < 0.5 * own.mean()
    shuffled = evaluate.measure(images.roll(-1, 0)[:1999], torch.arange(1999), network, data).numpy()[:, network.width]
    assert shuffled.mean() == pytest.approx(chance.mean(), abs=0.02)
    shares = [evaluate.measure(torch.cat([images[1:count + 1], images[count:]])[:2000], torch.arange(2000), network, data)
              .numpy()[:, network.width].mean() for count in (0, 500, 1000, 1999)]
    assert shares[0] == own.mean() and all(more > less for more, less in zip(shares, shares[1:]))


def test_what_a_caption_asks_for():
    """Counts by place, the last class for a place that is empty; a sparse caption asks for its one shape alone."""
    data = evaluate.load_data(evaluate.DataConfig(captions="sparse"))
    scene = data.describe("validation", torch.arange(300))
    dense, sparse = evaluate.Reader.asked(scene, "dense"), evaluate.Reader.asked(scene, "sparse")
    assert torch.equal(dense["kind"][..., :-1].sum((1, 2)), scene["there"].sum(1).float())
    assert (sparse["kind"][..., :-1].sum((1, 2)) == 1).all() and (sparse["ground"] == 0).all() and (dense["ground"].sum(2) == 1).all()
    for row in range(5):
        assert sparse["colour"][row, scene["place"][row, 0], scene["colour"][row, 0]] == 1


def test_other_resolutions_are_read_as_well():
    network, config = evaluate.FeatureNetwork("scenes", "cpu"), evaluate.DataConfig(resolution=32)
    data = evaluate.load_data(config)
    images, *_ = data.batch("validation", torch.arange(500))
    score = evaluate.measure(images, torch.arange(500), network, data)[:, network.width].mean()
    assert score > 0.55


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_transformers_features_for_real(kind, tmp_path):
    """Tiny random networks in the genuine formats: what is measured is what transformers itself says."""
    import transformers
    torch.manual_seed(0)
    common = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8)
    if kind == "clip":
        network = transformers.CLIPModel(transformers.CLIPConfig(vision_config=dict(intermediate_size=64, projection_dim=24, **common), projection_dim=24,
                                                                 text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                                                  num_attention_heads=2, vocab_size=50, eos_token_id=2)))
        processor = transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    else:
        network = transformers.Dinov2Model(transformers.Dinov2Config(**common))
        processor = transformers.BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, do_center_crop=True)
    network.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    features = evaluate.FeatureNetwork(f"{kind}:{tmp_path}", "cpu")
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    got = features(images)
    assert got.shape == (5, features.width) and features.width == (24 if kind == "clip" else 32)
    pixels = processor(images=[Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        network.eval()
        expected = network.visual_projection(network.vision_model(pixels).pooler_output) if kind == "clip" else network(pixels).pooler_output
    assert torch.allclose(got, expected, atol=1e-5)
    assert "32" in features.about["resize"] and len(features.about["sha256"]) == 16
    again = evaluate.FeatureNetwork(f"{kind}:{tmp_path}", "cpu")
    assert again.about == features.about


@pytest.mark.parametrize("kind", ["clip", "dinov2"])
def test_weights_of_another_kind_are_refused(kind, tmp_path):
    """transformers would make up what is missing: a distance in the space of a random network."""
    import transformers
    common = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    wrong = (transformers.Dinov2Model(transformers.Dinov2Config(**common)) if kind == "clip" else
             transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(intermediate_size=64, projection_dim=24, **common)))
    wrong.save_pretrained(tmp_path)
    transformers.CLIPImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lacks|cannot load"):
        evaluate.FeatureNetwork(f"{kind}:{tmp_path}", "cpu")


def test_the_error_of_a_distance_is_its_spread():
    """Over fresh sets of pairs that are half alike, as images and samples for the same captions are."""
    random = np.random.default_rng(0)

    def pairs():
        shared = random.normal(size=(500, 4))
        return shared + random.normal(size=(500, 4)), 1.2 * shared + random.normal(size=(500, 4)) + 0.3
    for distance in (evaluate.frechet_of_features, evaluate.kernel_distance):
        drawn = [pairs() for _ in range(60)]
        spread = np.std([distance(*pair) for pair in drawn])
        said = np.median([evaluate.bootstrap_error(distance, *pair) for pair in drawn[:10]])
        assert said == pytest.approx(spread, rel=0.4)


def test_images_are_saved_for_the_tools_of_others(trained, tmp_path):
    file = trained / "budget_1.6e+08" / "ema.safetensors"
    shutil.copy(file, tmp_path / "ema.safetensors")
    said = command(tmp_path / "ema.safetensors", "--metrics", "fd", "--n", "20", "--allow_singular", "--steps", "1", "--samples", "0",
                   "--save_images", str(tmp_path / "png"))
    assert said.returncode == 0, said.stderr
    assert json.loads((tmp_path / "metrics_scenes.json").read_text())["metrics"]["fd_scenes"]["singular"] == "20 images for 128 features"
    for kind in ("samples", "real"):
        files = sorted((tmp_path / "png" / kind).iterdir())
        assert [f.name for f in files] == [f"{k:06d}.png" for k in range(20)] and Image.open(files[0]).size == (4, 4)
    data = evaluate.load_data(evaluate.DataConfig(resolution=4, text_dim=8))
    again = command(tmp_path / "ema.safetensors", "--metrics", "fd", "--n", "20", "--allow_singular", "--samples", "0", "--save_images", str(tmp_path / "png"))
    assert again.returncode == 2 and "not empty" in again.stderr
    real = data.batch("validation", torch.arange(20))[0][7].permute(1, 2, 0).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "png" / "real" / "000007.png")), real)
