import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import data
import evaluate
import flow
import reader
import tiny
import train

ROOT = Path(__file__).parent.parent
TINY = ["--depth", "1", "--width", "8", "--resolution", "4", "--text_tokens", "16",
        "--text_dim", "8", "--batch", "8", "--val_images", "64", "--warmup", "3"]
EVERYTHING = ["--metrics", "loss", "vlb", "nll", "fd", "--n", "160", "--likelihood_steps", "4",
              "--steps", "2", "--samples", "0", "--batch", "48"]


def call(main, *arguments):
    """A command in this process, offline, so that no test waits for a hub that is not there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        main()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two points, made by train.py itself."""
    folder = tmp_path_factory.mktemp("run") / "run"
    call(train.main, *TINY, "--out", folder, "--budget", "8e7", "1.6e8")
    return folder


@pytest.fixture
def point(trained, tmp_path):
    """A copy of the weights of its last point."""
    return shutil.copy(trained / "budget_1.6e+08" / "ema.safetensors", tmp_path)


def saved(folder, dataset="scenes", prefix=""):
    return json.loads((Path(folder) / f"{prefix}metrics_{dataset}.json").read_text())["metrics"]


def subject_of(point, **flags):
    """What evaluate.evaluate hands to a metric."""
    models, definition, _ = evaluate.load_models(Path(point), torch.device("cpu"))
    source = data.load_data(data.DataConfig(**definition["data"]))
    return evaluate.Subject(evaluate.EvaluateConfig(**flags), Path(point), models, "weights",
                            definition, "float32", source,
                            evaluate.load_network("scenes", "cpu"))


def measure(group, subject):
    protocol_of, function = evaluate.GROUPS[group]
    return function(subject, protocol_of(subject))[group]


# ---- the command ---------------------------------------------------------------------------------

def test_the_same_protocol_gives_the_trainers_own_number(trained):
    call(evaluate.main, trained, "--n", "64", "--data", "scenes", "scenes-ood", "--samples", "6")
    folder = trained / "budget_1.6e+08"
    record = json.loads((folder / "result.json").read_text())
    number, both = saved(folder)["val_loss_ema"], saved(trained, prefix="checkpoint_")
    assert number["value"] == both["val_loss_ema"]["value"]
    assert number["value"] == pytest.approx(record["val_loss_ema"], rel=1e-6)
    assert number["se"] == pytest.approx(record["val_loss_ema_se"], rel=1e-6)
    assert both["val_loss"]["value"] == pytest.approx(record["val_loss"], rel=1e-6)
    assert saved(folder, "scenes-ood")["val_loss_ema"]["value"] != number["value"]
    pictures = sorted(trained.rglob("samples_*.png"))
    assert [path.name for path in pictures] == ["samples_scenes-ood.png", "samples_scenes.png"]
    for path in pictures:
        assert Image.open(path).width > 3 * 112 * 3  # held-out, guidance 1 and 3, side by side
    call(evaluate.main, folder, "--n", "32", "--samples", "0")
    assert saved(folder)["val_loss_ema"]["protocol"]["n"] == 32


def test_a_number_is_of_its_weights_and_measured_once(trained, tmp_path):
    """Whatever the order of the file's metadata; other weights in its place are measured anew."""
    file, table = tmp_path / "ema.safetensors", tmp_path / "metrics_scenes.json"

    def evaluated(budget, backwards=False):
        weights = trained / budget / "ema.safetensors"
        with safe_open(weights, "pt") as opened:
            about = opened.metadata()
        content = file.read_bytes() if file.exists() else b""
        while backwards and file.read_bytes() == content:   # until the order is another one
            save_file(load_file(weights), file, dict(reversed(about.items())))
        if not backwards:
            shutil.copy(weights, file)
        call(evaluate.main, file, "--n", "64", "--samples", "0")
        return saved(tmp_path)["val_loss_ema"]["value"]
    first = evaluated("budget_8e+07")
    second = evaluated("budget_1.6e+08")
    assert first != second
    written = table.stat().st_mtime_ns
    assert evaluated("budget_1.6e+08", backwards=True) == second
    assert table.stat().st_mtime_ns == written


@pytest.mark.parametrize("arguments, named", [
    (["/no/such/place"], "no such file"), (["EMPTY"], "no ema.safetensors"), (["TORN"], "torn"),
    (["NO_EMA"], "ema"), (["RUN", "--data", "/no/such"], "--data"), (["RUN", "--n", "1"], "--n"),
    (["RUN", "--samples", "-1"], "--samples"), (["RUN", "--gudance", "3"], "--gudance"),
    (["RUN", "--steps", "0"], "--steps"), (["RUN", "--metrics", "fid"], "--metrics"),
    (["RUN", "--batch", "0"], "--batch"), (["RUN", "--guidance", "2"], "--guidance"),
    (["RUN", "--metrics", "fd", "nll", "--guidance", "2"], "no density"),
    (["RUN", "--metrics", "fd", "--n", "128"], "singular"),
    (["RUN", "--metrics", "fd", "--features", "inception"], "--features"),
    (["RUN", "--metrics", "kid"], "--metrics kid: take some of loss, vlb, nll, fd"),
    (["RUN", "--metrics", "fd", "--features", "clip:/no/such"], "--features: cannot load /no/such"),
    (["RUN", "--metrics", "fd", "--features", "dinov2"], "model.safetensors"),
    (["RUN", "--likelihood_steps", "1"], "--likelihood_steps"),
    (["RUN", "--metrics", "fd", "--save_images", "x", "--n", "200"], "one model"),
])
def test_bad_input_is_one_line(trained, tmp_path, arguments, named, capsys):
    places = {"EMPTY": tmp_path / "empty", "TORN": tmp_path / "torn.safetensors", "RUN": trained,
              "NO_EMA": tmp_path / "checkpoint.pt"}
    places["EMPTY"].mkdir()
    places["TORN"].write_bytes(b"\x00\x01torn")
    checkpoint = torch.load(trained / "checkpoint.pt", weights_only=True)
    del checkpoint["ema"]
    torch.save(checkpoint, places["NO_EMA"])
    with pytest.raises(SystemExit) as ended:
        call(evaluate.main, *(places.get(word, word) for word in arguments))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and named in said and "Traceback" not in said
    assert len([line for line in said.splitlines() if ".py: " in line]) == 1


@pytest.mark.parametrize("change, said", [
    (lambda content: json.dumps({**content, "data": "elsewhere/scenes.parquet"}), "same name"),
    (lambda content: json.dumps(content)[:40], "torn")])
def test_numbers_of_others_are_not_overwritten(point, tmp_path, change, said, capsys):
    call(evaluate.main, point, "--n", "64", "--samples", "0")
    table = tmp_path / "metrics_scenes.json"
    foreign = change(json.loads(table.read_text()))
    table.write_text(foreign)
    with pytest.raises(SystemExit):
        call(evaluate.main, point, "--n", "64", "--samples", "0")
    assert said in capsys.readouterr().err and table.read_text() == foreign


def test_only_points_of_the_parabolas_windows_are_evaluated(tmp_path):
    """Published records, with an empty file where each point's weights would be."""
    quick = tmp_path / "quick"
    shutil.copytree(ROOT / "results" / "quick", quick)
    for record in quick.glob("*/budget_*/result.json"):
        record.with_name("ema.safetensors").touch()
    law = json.loads((quick / "law" / "law.json").read_text())
    inside = [row["source"].split("quick/")[1] for row in law["points"] if row["in_window"]]
    chosen = [file.with_name("result.json") for file in evaluate.find_weights(quick)]
    assert sorted(str(file.relative_to(quick)) for file in chosen) == sorted(inside)
    assert len(inside) < len(law["points"])
    run = next(quick.glob("*_seed0"))
    (run / "checkpoint.pt").touch()
    assert len(evaluate.find_weights(run)) == len([*run.glob("budget_*")]) + 1


def test_all_metrics_on_one_process_and_on_two(point, tmp_path):
    flags = [*EVERYTHING, "--data", "scenes", "scenes-ood"]
    call(evaluate.main, point, *flags)
    other = tmp_path / "ranks"
    other.mkdir()
    shutil.copy(point, other)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--"]
    said = subprocess.run([*torchrun, ROOT / "evaluate.py", other, *flags],
                          capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    for dataset in ("scenes", "scenes-ood"):
        numbers, of_two = saved(tmp_path, dataset), saved(other, dataset)
        assert set(numbers) == {"val_loss_ema", "vlb", "nll", "vlb_minus_nll", "fd_scenes",
                                "kid_scenes", "caption_accuracy"}
        for key, number in numbers.items():
            assert number["se"] > 0 and number["weights"] == "ema"
            protocol = number["protocol"]
            assert (protocol["n"], protocol["precision"]) == (160, "float32")
            assert of_two[key]["protocol"] == protocol
            assert of_two[key]["value"] == pytest.approx(number["value"], rel=1e-5, abs=1e-6), key
        vlb, nll, gap = (numbers[key] for key in ("vlb", "nll", "vlb_minus_nll"))
        for number in (vlb, nll):
            bits = number["nats_per_image"] / (3 * 16 * np.log(2)) + 7
            assert number["value"] == pytest.approx(bits) and number["unit"] == "bits/dim"
        assert gap["value"] == pytest.approx(vlb["value"] - nll["value"])
        parts = sum(vlb[f"{part}_nats"] for part in ("prior", "diffusion", "reconstruction"))
        assert parts == pytest.approx(vlb["nats_per_image"])
        assert 0 < nll["se_of_probes"] < nll["se"]
        of_images = np.load(tmp_path / f"nll_{dataset}.npy")
        assert of_images.mean() == pytest.approx(nll["nats_per_image"])
        assert numbers["fd_scenes"]["protocol"]["features"]["sha256"] == evaluate.READER_SHA256


def test_a_killed_evaluation_repeats_one_metric(point, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(flow, "log_likelihood", killed)
        with pytest.raises(KeyboardInterrupt):
            call(evaluate.main, point, *EVERYTHING)
    before = saved(tmp_path)
    assert set(before) == {"val_loss_ema", "vlb"}
    monkeypatch.setattr(flow, "vlb", killed)  # is not called again
    call(evaluate.main, point, *EVERYTHING)
    after = saved(tmp_path)
    assert len(after) == 7 and {key: after[key] for key in before} == before


def test_a_new_distance_is_measured_on_old_folders(point, tmp_path, monkeypatch):
    """It takes a function and a line in DISTANCES."""
    flags = ["--metrics", "fd", "--n", "130", "--steps", "1", "--samples", "0"]
    call(evaluate.main, point, *flags)
    monkeypatch.setitem(evaluate.DISTANCES, "shift",
                        lambda one, two: float(np.square(one.mean(0) - two.mean(0)).sum()))
    before = saved(tmp_path)
    call(evaluate.main, point, *flags)
    after = saved(tmp_path)
    assert after.keys() - before.keys() == {"shift_scenes"} and after["shift_scenes"]["se"] > 0
    assert {key: after[key] for key in before} == before


def test_models_are_ranked_by_the_first_metric(trained, capsys):
    """It comes first in --metrics: here the vlb. Its best model has the picture."""
    call(evaluate.main, trained, "--metrics", "vlb", "loss", "--n", "32", "--samples", "2",
         "--steps", "1", "--batch", "32")
    points = {path: saved(path) for path in trained.glob("budget_*")}
    points[trained] = saved(trained, prefix="checkpoint_")
    lowest = min(numbers["vlb"]["value"] for numbers in points.values())
    said = capsys.readouterr().out
    (written,) = [line for line in said.splitlines() if line.startswith("written: ")]
    chosen = Path(written.removeprefix("written: ")).parent
    assert points[chosen]["vlb"]["value"] == lowest
    assert "(32 images)" in said.splitlines()[0]


def test_photographs_are_compared_by_clip_or_dinov2_only(point, tmp_path, capsys):
    """The reader of scenes sees nothing in them. That is said before anything is measured."""
    photos = tiny.parquet(tmp_path / "photos.parquet", 400)
    flags = [point, "--data", photos, "--samples", "0", "--steps", "1"]
    with pytest.raises(SystemExit):
        call(evaluate.main, *flags, "--metrics", "loss", "fd", "--n", "30")
    said = capsys.readouterr().err
    assert "--features scenes" in said and "take --features clip or dinov2" in said
    assert not (tmp_path / "metrics_photos.json").exists()
    tiny.tiny_vision("clip", tmp_path / "clip")
    call(evaluate.main, *flags, "--metrics", "fd", "--n", "30", "--features",
         f"clip:{tmp_path / 'clip'}")
    assert set(saved(tmp_path, "photos")) == {"fd_clip", "kid_clip"}


def test_numbers_that_are_none_are_refused_by_name(point, tmp_path, capsys):
    with safe_open(point, "pt") as file:
        about = file.metadata()
    weights = {name: weight.fill_(float("nan")) for name, weight in load_file(point).items()}
    save_file(weights, point, about)
    call(evaluate.main, point, *EVERYTHING)
    numbers = saved(tmp_path)
    assert len(numbers) == 7
    for number in numbers.values():
        assert number["value"] is None and "160 of 160" in number["reason"]
    assert "fd_scenes refused" in capsys.readouterr().out


# ---- noises and samples --------------------------------------------------------------------------

def test_each_batch_and_seed_has_noise_of_its_own(point):
    """flow sees (k + u) / 128 - 1, with u and times that no other batch or seed has."""
    seen = []

    def noises_and_times(metric, seed):
        subject = subject_of(point, n=8, batch=4, likelihood_steps=2, seed=seed)
        model = subject.models["ema"]

        def watching(x_t, t, text, text_mask):
            seen.append((x_t.detach(), t))
            return model(x_t, t, text, text_mask)
        seen.clear()
        subject.models["ema"] = watching
        value = measure(metric, subject)["value"]
        return value, [x for x, t in seen if not t.any()], [t for _, t in seen]
    source = subject_of(point).data
    levels = source.batch("validation", torch.arange(8))[0].split(4)
    first, images, _ = noises_and_times("nll", 0)
    noises = [(x + 1) * 128 - k for x, k in zip(images, levels)]
    for u in noises:
        assert u.min() >= 0 and u.max() < 1 and u.std() > 0.25
    assert len(noises) == 2 and not torch.equal(*noises)
    again, others, _ = noises_and_times("nll", 1)
    assert again != first == noises_and_times("nll", 0)[0] and not torch.equal(images[0], others[0])
    first, _, times = noises_and_times("vlb", 0)
    assert len(times) == 2 * evaluate.VLB_TIMES
    assert not torch.equal(times[0], times[evaluate.VLB_TIMES])
    assert noises_and_times("vlb", 1)[0] != first == noises_and_times("vlb", 0)[0]


def test_samples_depend_on_seed_and_caption_alone(point):
    subject = subject_of(point, steps=3)
    many, one = subject.samples(torch.arange(4), 1), subject.samples(torch.tensor([2]), 1)
    assert (many[2] - one[0]).abs().max() <= 1e-5
    assert not torch.equal(many, subject_of(point, steps=3, seed=1).samples(torch.arange(4), 1))


def test_samples_are_drawn_as_the_flags_say(point):
    base = subject_of(point, metrics=["fd"], n=130, steps=2)
    torch.nn.init.normal_(base.models["ema"].head.weight, std=0.2)  # it hardly hears a caption yet
    values = set()
    for change in ({}, {"guidance": 2.0}, {"steps": 3}, {"seed": 1}):
        config = dataclasses.replace(base.config, **change)
        number = measure("fd", dataclasses.replace(base, config=config))
        assert number["halves_of_real"] is None  # of 65 images: singular
        values.add(number["value"])
    assert len(values) == 4


def test_a_guided_number_has_its_own_name_and_images_are_saved_for_others(point, tmp_path, capsys):
    flags = ["--metrics", "fd", "--n", "130", "--steps", "1", "--samples", "0", "--guidance", "2",
             "--save_images", tmp_path / "png"]
    call(evaluate.main, point, *flags)
    assert set(saved(tmp_path)) == {"fd_scenes_g2", "kid_scenes_g2", "caption_accuracy_g2"}
    for kind in ("samples", "real"):
        files = sorted((tmp_path / "png" / kind).iterdir())
        assert [file.name for file in files] == [f"{k:06d}.png" for k in range(130)]
    real = subject_of(point).data.batch("validation", torch.arange(130))[0]
    assert np.array_equal(np.asarray(Image.open(files[7])), real[7].permute(1, 2, 0))
    with pytest.raises(SystemExit):
        call(evaluate.main, point, *flags)
    assert "not empty" in capsys.readouterr().err


def test_sparse_captions_are_asked_for_one_shape_only(tmp_path):
    call(train.main, *TINY, "--captions", "sparse", "--out", tmp_path / "run", "--budget", "8e7")
    call(evaluate.main, tmp_path / "run" / "budget_8e+07", *EVERYTHING[5:], "--metrics", "fd",
         "--n", "160")
    number = saved(tmp_path / "run" / "budget_8e+07")["caption_accuracy"]
    assert set(number["real_images"]) == {"all", "kind", "colour", "size"}
    assert 0 < number["value"] < 1


def test_captions_that_were_cut_have_no_accuracy(tmp_path):
    call(train.main, *TINY, "--text_tokens", "8", "--out", tmp_path / "run", "--budget", "8e7")
    flags = [tmp_path / "run" / "budget_8e+07", "--n", "160", "--steps", "1", "--samples", "0"]
    call(evaluate.main, *flags, "--metrics", "fd")
    assert set(saved(flags[0])) == {"fd_scenes", "kid_scenes"}


# ---- distances -----------------------------------------------------------------------------------

def whitened(random, n, covariance, mean):
    """n rows whose sample mean and covariance are exactly these."""
    rows = random.normal(size=(n, len(mean)))
    rows -= rows.mean(0)
    unit = rows @ np.linalg.inv(np.linalg.cholesky(np.cov(rows, rowvar=False))).T
    values, vectors = np.linalg.eigh(covariance)
    return unit @ (vectors * np.sqrt(values.clip(min=0))).T + mean


def test_frechet_distance_is_the_closed_form():
    random = np.random.default_rng(0)
    a, b, m = random.uniform(0.1, 4, 6), random.uniform(0.1, 4, 6), random.normal(size=6)
    turn = np.linalg.qr(random.normal(size=(6, 6)))[0]
    A, B = (matrix @ matrix.T for matrix in random.normal(size=(2, 6, 6)))
    flat = np.diag([1.0, 2, 0, 0, 0, 0])

    def distance(one, two, shift):
        return evaluate.frechet_distance(whitened(random, 50, one, shift),
                                         whitened(random, 70, two, np.zeros(6)))
    commuting = m @ m + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert distance(turn * a @ turn.T, turn * b @ turn.T, m) == pytest.approx(commuting, rel=1e-9)
    any_others = m @ m + np.trace(A + B - 2 * scipy.linalg.sqrtm(A @ B).real)
    assert distance(A, B, m) == pytest.approx(any_others, rel=1e-9)
    assert distance(A, A, 0 * m) == pytest.approx(0, abs=1e-9)
    assert distance(flat, flat, 0 * m) == pytest.approx(0, abs=1e-6)  # singular


def test_kernel_distance_is_the_unbiased_one():
    random = np.random.default_rng(0)
    x, y = random.normal(size=(7, 3)), random.normal(size=(5, 3)) + 1

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    def own(rows):
        return np.mean([kernel(a, b) for a in rows for b in rows if a is not b])
    exact = own(list(x)) + own(list(y)) - 2 * np.mean([kernel(a, b) for a in x for b in y])
    assert evaluate.kernel_distance(x, y) == pytest.approx(exact, rel=1e-12)
    same = [evaluate.kernel_distance(*random.normal(size=(2, 40, 3))) for _ in range(400)]
    assert abs(np.mean(same)) < 3 * np.std(same) / 20
    big = random.normal(size=(1500, 3))  # more than one block of rows
    products = kernel(big, big.T)
    own_of_big = (products.sum() - products.trace()) / (1500 * 1499)
    expected = 2 * own_of_big - 2 * products.sum() / 1500 ** 2
    assert evaluate.kernel_distance(big, big[::-1]) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("distance", [evaluate.frechet_distance, evaluate.kernel_distance])
def test_the_error_of_a_distance_is_its_spread(distance):
    """Over fresh sets of pairs that are half alike, as images and samples of one caption are."""
    random = np.random.default_rng(0)

    def pairs(n=250):
        shared, one, two = random.normal(size=(3, n, 4))
        return shared + one, 1.2 * shared + two + 0.3
    drawn = [pairs() for _ in range(80)]
    spread = np.std([distance(*pair) for pair in drawn])
    said = np.median([evaluate.bootstrap_error(distance, *pair) for pair in drawn[:12]])
    assert said == pytest.approx(spread, rel=0.4)


# ---- feature networks ----------------------------------------------------------------------------

@pytest.fixture(scope="module")
def world():
    """The reader, validation scenes at 16 pixels, and their features."""
    network, source = evaluate.load_network("scenes", "cpu"), data.load_data(data.DataConfig())
    images = source.images("validation", torch.arange(1000))
    return network, source, images, network(images)


def test_the_distance_grows_with_every_damage(world):
    network, source, images, features = world
    truth = features.double().numpy()
    halves = evaluate.frechet_distance(truth[::2], truth[1::2])

    def distance(damaged):
        return evaluate.frechet_distance(truth, network(damaged).double().numpy())
    floor = distance(source.images("validation", torch.arange(1000, 2000)))
    assert 0 < floor < halves  # of twice as many images
    pixels = images.float()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    blurred = torch.nn.functional.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False)
    wrong = data.load_data(data.DataConfig(data="scenes-ood")).images("validation",
                                                                      torch.arange(1000))
    shares = (0, 0.25, 0.5, 1)
    series = {"noise": [(pixels + 50 * share * noise).clamp(0, 255).byte() for share in shares],
              "blur": [pixels.lerp(blurred, share).byte() for share in shares],
              "another world": [torch.cat([wrong[:int(1000 * share)], images[int(1000 * share):]])
                                for share in shares]}
    for what, damages in series.items():
        distances = [distance(damaged) for damaged in damages]
        assert distances == sorted(set(distances)), (what, distances)
        assert distances[-1] > 2.5 * floor, what


def test_caption_accuracy_knows_right_from_wrong(world):
    network, source, images, features = world

    def accuracy(features, first=0):
        scene = source.describe("validation", torch.arange(first, first + len(features)))
        asked = evaluate.Reader.asked(scene, "dense")
        return network.accuracy(features, asked)["all"].mean().item()
    own, chance = accuracy(features), accuracy(features, 1)
    assert own > 0.6 and chance < 0.5 * own
    assert accuracy(network(torch.full_like(images, 128))) < 0.5 * own
    parts = [accuracy(torch.cat([features[1:k + 1], features[k:]])[:1000])
             for k in (0, 300, 600, 999)]
    assert parts[0] == own and parts == sorted(set(parts), reverse=True)
    large = data.load_data(data.DataConfig(resolution=32))  # is resized
    assert accuracy(network(large.images("validation", torch.arange(500)))) > 0.55


def test_what_a_caption_asks_for(world):
    """Counts by place, none of nothing; a sparse caption asks for its one shape alone."""
    scene = world[1].describe("validation", torch.arange(300))
    dense, sparse = (evaluate.Reader.asked(scene, captions) for captions in ("dense", "sparse"))
    assert torch.equal(dense["kind"].sum((1, 2)), scene["there"].sum(1).float())
    assert (dense["kind"][..., -1] == 0).all() and (dense["ground"].sum(2) == 1).all()
    assert (sparse["kind"].sum((1, 2)) == 1).all() and (sparse["ground"] == 0).all()
    for row in range(5):
        assert sparse["colour"][row, scene["place"][row, 0], scene["colour"][row, 0]] == 1


def test_as_many_kinds_are_read_at_a_place_as_are_asked_for():
    """A reader that sees class 0 everywhere, then class 1, whatever the image."""
    network = evaluate.Reader().requires_grad_(False)
    network.tell.weight.zero_()
    parts = [len(data.GROUNDS)] + 9 * [classes + 1 for classes in network.CLASSES.values()]
    network.tell.bias.copy_(-torch.cat([torch.arange(count) for count in parts]).float())
    zeros = torch.zeros(3, 3, dtype=torch.long)
    scene = dict(place=zeros, colour=zeros, size=zeros, ground=torch.tensor([0, 1, 0]),
                 kind=torch.tensor([[1, 0, 0], [1, 0, 0], [1, 2, 0]]),
                 there=torch.arange(3) < torch.tensor([[1], [2], [2]]))
    shares = network.accuracy(torch.zeros(3, 128), network.asked(scene, "dense"))
    assert shares["ground"].tolist() == [1, 0, 1]
    assert shares["kind"].tolist() == [0, 1, 0.5]   # 1; 0 and 1; 1 and 2
    assert shares["all"].tolist() == [3 / 4, 4 / 5, 4 / 5]


def test_the_reader_is_trained_by_its_script(tmp_path):
    """A few steps: the file loads, and its weights are not those of results/reader."""
    call(reader.main, tmp_path / "reader.safetensors", "--steps", "3", "--batch", "16")
    trained = evaluate.load_reader(tmp_path / "reader.safetensors")
    assert data.weights_digest(trained) != evaluate.READER_SHA256
    assert trained(torch.zeros(2, 3, 8, 8, dtype=torch.uint8)).shape == (2, trained.width)


@pytest.mark.parametrize("kind, other, width", [("clip", "dinov2", 24), ("dinov2", "clip", 32)])
def test_transformers_features_for_real(kind, other, width, tmp_path):
    """What is measured is what transformers itself says; weights of another kind are refused."""
    network, processor = tiny.tiny_vision(kind, tmp_path)
    features = evaluate.load_network(f"{kind}:{tmp_path}", "cpu")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        out = network(processor(images=pictures, return_tensors="pt")["pixel_values"])
    expected = out.image_embeds if kind == "clip" else out.pooler_output
    assert torch.allclose(features(images), expected, atol=1e-5) and features.width == width
    assert "32" in features.about["resize"] and len(features.about["sha256"]) == 16
    assert evaluate.load_network(f"{kind}:{tmp_path}", "cpu").about == features.about
    with pytest.raises(ValueError, match="lacks|cannot load"):  # transformers would make them up
        evaluate.load_network(f"{other}:{tmp_path}", "cpu")


def test_levels_are_the_inverse_of_data():
    source = data.load_data(data.DataConfig())
    levels = torch.arange(256, dtype=torch.uint8)
    x = source.to_x(levels, torch.Generator().manual_seed(0))
    assert torch.equal(source.to_levels(x), levels)
    assert source.to_levels(torch.tensor([-1.4, 1.7])).tolist() == [0, 255]
