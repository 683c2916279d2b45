import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import flow
import train
from data import DataConfig, load_data
from model import DiT, ModelConfig

ROOT = Path(__file__).parent.parent
TINY = ["--depth", "1", "--width", "8", "--resolution", "4", "--text_tokens", "4", "--text_dim", "8", "--batch", "8",
        "--val_images", "16", "--threads", "1", "--device", "cpu", "--warmup", "3"]
STEP = 8 * DiT(ModelConfig(depth=1, width=8), size=4, text_tokens=4, text_dim=8).flops_per_image()   # FLOPs of a step

# At a width of 8 the mup rate is so high that rounding grows; what is claimed is claimed for sizes that people train.
LARGER_STEP = 16 * DiT(ModelConfig(depth=2, width=32), size=8, text_tokens=4, text_dim=8).flops_per_image()
LARGER = ["--depth", "2", "--width", "32", "--resolution", "8", "--batch", "16", "--budget", repr(20 * LARGER_STEP)]


@pytest.fixture(autouse=True)
def short_runs_allowed(monkeypatch):
    monkeypatch.setattr(train, "MIN_STEPS", 1)
    monkeypatch.setattr(train, "MIN_WARMUPS", 0)


def run(out, *steps, flags=()):
    """train.py's own main, to budgets of so many steps. -> folder"""
    sys.argv = ["train.py", *TINY, "--out", str(out), "--budget", *(repr(n * STEP) for n in steps), *flags]
    train.main()
    return Path(out)


def refused(out, *steps, flags=(), status=2, capsys=None):
    """What main says to bad input: one line, and the exit status."""
    with pytest.raises(SystemExit) as stop:
        run(out, *steps, flags=flags)
    said = capsys.readouterr().err.strip()
    assert stop.value.code == status, said
    if status == 1:                                    # a run that had begun: the line stands below its progress bar
        said = said.splitlines()[-1]
    assert said.startswith("train.py: ") and len(said.splitlines()) == 1, said
    return said


def point(folder, steps):
    return folder / f"budget_{steps * STEP:.4g}"


def assert_same_point(one, two):
    """Bit for bit: weights, losses of single images, and all of the record that is not time."""
    a, b = load_file(one / "ema.safetensors"), load_file(two / "ema.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert np.array_equal(np.load(one / "val_losses_ema.npy"), np.load(two / "val_losses_ema.npy"))
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    timed = {"seconds", "evaluation_seconds", "device_hours", "tflops", "mfu"}
    assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}


def test_a_nested_run_is_separate_runs_bit_for_bit(tmp_path):
    nested = run(tmp_path / "nested", 7, 13, 24)
    for steps in (7, 13, 24):
        assert_same_point(point(nested, steps), point(run(tmp_path / f"alone{steps}", steps), steps))


def test_ten_and_resume_and_ten_is_twenty_bit_for_bit(tmp_path):
    straight = run(tmp_path / "straight", 20)
    halves = run(run(tmp_path / "halves", 10), 20)
    assert_same_point(point(straight, 20), point(halves, 20))
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (straight, halves))
    for kind in ("model", "ema"):
        assert all(torch.equal(a[kind][name], b[kind][name]) for name in a[kind])
    assert [json.loads(line)["train_loss"] for line in open(straight / "log.jsonl")] == \
           [json.loads(line)["train_loss"] for line in open(halves / "log.jsonl")]


def test_a_budget_below_the_checkpoint_is_refused(tmp_path, capsys):
    folder = run(tmp_path / "run", 20)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert "delete checkpoint.pt" in refused(folder, 9, 20, capsys=capsys)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "checkpoint.pt").unlink()
    run(folder, 9, 20)
    assert_same_point(point(folder, 9), point(run(tmp_path / "alone", 9), 9))


def test_kill_9_changes_no_result(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train\ntrain.MIN_STEPS, train.MIN_WARMUPS, "
                      f"train.CHECKPOINT_SECONDS, train.LOG_STEPS = 1, 0, 0, 5\ntrain.main()\n")
    command = [sys.executable, script, *TINY, "--out", tmp_path / "killed", "--budget", repr(100 * STEP), repr(800 * STEP)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        time.sleep(0.01)
        assert process.poll() is None
    time.sleep(0.2)
    process.kill()
    process.wait()
    assert not point(tmp_path / "killed", 800).exists()     # it was killed on the way
    subprocess.run(command, check=True, capture_output=True)
    other = [*command[:-5], "--out", tmp_path / "whole", *command[-3:]]
    subprocess.run(other, check=True, capture_output=True)
    for steps in (100, 800):
        assert_same_point(point(tmp_path / "killed", steps), point(tmp_path / "whole", steps))
    assert [json.loads(line)["step"] for line in open(tmp_path / "killed" / "log.jsonl")] == list(range(5, 801, 5))


@pytest.mark.parametrize("processes, arch, compile", [(2, "incontext", "off"), (2, "cross", "off"), (4, "mmdit", "off"),
                                                      pytest.param(2, "incontext", "on", marks=pytest.mark.slow)])
def test_world_size_does_not_matter(tmp_path, processes, arch, compile):
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train\n"
                      f"train.MIN_STEPS, train.MIN_WARMUPS = 1, 0\ntrain.main()\n")
    one = run(tmp_path / "one", 20, flags=[*LARGER, "--arch", arch, "--compile", compile])
    # In parts too: gradients are summed over the parts, then averaged over the processes.
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", script, *TINY,
                    "--out", tmp_path / "many", *LARGER, "--arch", arch, "--compile", compile, "--accumulate", "2"], check=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (one, tmp_path / "many"))
    difference = sum((a[name] - b[name]).square().sum() for name in a).sqrt() / sum(a[name].square().sum() for name in a).sqrt()
    # Behind gates that start at zero the first gradients are tiny, and Adam enlarges their rounding with them.
    assert difference <= (1e-6 if arch == "incontext" else 5e-6)
    r, s = (json.loads((folder / f"budget_{20 * LARGER_STEP:.4g}" / "result.json").read_text()) for folder in (one, tmp_path / "many"))
    for key in ("val_loss", "val_loss_ema", "train_loss", "start_loss", "start_loss_expected"):
        assert r[key] == pytest.approx(s[key], rel=1e-5)
    assert r["D_text_real"] == s["D_text_real"] and s["devices"] == processes


def test_so_many_scenes_are_seen_again_and_again(tmp_path, capsys):
    out = run(tmp_path / "run", 10, flags=["--images", "20"])
    record = json.loads((point(out, 10) / "result.json").read_text())
    assert (record["train_images"], record["epochs"], record["images_repeated"]) == (20, 4, 60)
    assert "20 training images, each seen 4 times" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["incontext", "cross", "mmdit"])
def test_captions_are_followed(tmp_path, arch):
    """Half a minute of training on one core: with the caption of another image the validation loss is higher by far more than 10 standard errors."""
    config = train.TrainConfig(budget=[1.28e11], val_images=1024, threads=1, device="cpu", out=str(tmp_path))
    model_config, data_config = ModelConfig(arch, depth=2, width=32), DataConfig()
    (record,) = train.train(model_config, data_config, config)
    model, data = DiT(model_config, **load_data(data_config).shape), load_data(data_config)
    model.load_state_dict(load_file(tmp_path / f"budget_{1.28e11:.4g}" / "ema.safetensors"))
    worse = []
    for _, (x, eps, t, text, mask) in train.validation_batches(data, 1024):
        with torch.no_grad():
            worse.append(flow.loss_per_image(model, x, eps, t, text.roll(1, 0), mask.roll(1, 0)) - flow.loss_per_image(model, x, eps, t, text, mask))
    mean, error = flow.mean_and_standard_error(torch.cat(worse))
    print(f"{arch}: start {record['start_loss']:.4f} (expected {record['start_loss_expected']:.4f}), train {record['train_loss']:.4f}, validation "
          f"{record['val_loss_ema']:.4f}, {record['seconds']:.0f} s; captions shuffled: +{mean:.4f} +- {error:.4f}")
    assert record["start_loss"] == pytest.approx(record["start_loss_expected"], rel=0.05)
    assert record["val_loss_ema"] < 0.4 and mean > 10 * error


def test_accumulation_changes_nothing_but_rounding(tmp_path):
    a = torch.load(run(tmp_path / "a", 20, flags=LARGER) / "checkpoint.pt", weights_only=True)["model"]
    b = torch.load(run(tmp_path / "b", 20, flags=[*LARGER, "--accumulate", "4"]) / "checkpoint.pt", weights_only=True)["model"]
    difference = sum((a[name] - b[name]).square().sum() for name in a).sqrt() / sum(a[name].square().sum() for name in a).sqrt()
    assert difference <= 1e-6


def test_random_numbers_of_a_step_depend_on_neither_rank_nor_world():
    config, data = train.TrainConfig(batch=8, micro_batches=4), load_data(DataConfig(resolution=4))
    whole = train.training_batch(data, config, 5, 0, 1, torch.device("cpu"))
    for world in (2, 4):
        parts = [train.training_batch(data, config, 5, rank, world, torch.device("cpu")) for rank in range(world)]
        assert all(torch.equal(torch.cat(part), all_) for part, all_ in zip(zip(*parts), whole))
    x, eps, t, *_ = whole
    assert x.min() >= -1 and x.max() < 1
    slices = (torch.special.ndtr(torch.logit(t.double())) * 8).floor().sort().values
    assert torch.equal(slices, torch.arange(8.0).double())                           # one time in each slice of the batch
    after = train.training_batch(data, config, 6, 0, 1, torch.device("cpu"))
    assert not torch.equal(after[1], eps) and not torch.equal(after[0], x)


def test_eight_bits_are_dequantised_with_fresh_noise():
    """x = (k + u) / 128 - 1: the level comes back from x, u is uniform, and another step draws another."""
    config, data = train.TrainConfig(batch=64, micro_batches=4), load_data(DataConfig())
    k, *_ = data.batch("train", torch.arange(64))
    x, *_ = train.training_batch(data, config, 1, 0, 1, torch.device("cpu"))
    assert (((x.double() + 1) * 128).floor() != k).double().mean() < 1e-4            # where float32 rounds u up to 1
    u = (x.double() + 1) * 128 - k
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.var().item() == pytest.approx(1 / 12, abs=0.002)
    batches = dict((int(index[0]), batch) for index, batch in train.validation_batches(data, 128))
    assert torch.equal(batches[64][0], dict((int(i[0]), b) for i, b in train.validation_batches(data, 128))[64][0])   # fixed


def test_start_loss_and_record(tmp_path):
    folder = run(tmp_path / "run", 12)
    record = json.loads((point(folder, 12) / "result.json").read_text())
    model = DiT(ModelConfig(depth=1, width=8), size=4, text_tokens=4, text_dim=8)
    assert record["start_loss"] == pytest.approx(record["start_loss_expected"], rel=0.2)   # 8 images of 48 numbers
    assert record["C"] == 12 * STEP and record["steps"] == 12 and record["images"] == 96
    assert record["D"] == 96 * (4 + 4 + 1) == record["D_image"] + record["D_text"] + record["D_time"]
    assert record["C_6nd"] == 6 * record["N_blocks"] * record["D"]
    assert 0 < record["D_text_real"] < record["D_text"]
    assert record["N_total"] == record["N_blocks"] + record["N_embedding"] + record["N_head"] == sum(p.numel() for p in model.parameters())
    losses = np.load(point(folder, 12) / "val_losses_ema.npy")
    assert record["val_loss_ema"] == pytest.approx(losses.mean(), rel=1e-6)
    assert record["val_loss_se"] > record["val_loss_ema_se"]
    assert record["val_loss_ema_se"] == pytest.approx(losses.std(ddof=1) / 4, rel=1e-5)
    assert record["mfu"] is None and record["tflops"] > 0 and record["epochs"] is None
    assert (point(folder, 12) / "samples.png").stat().st_size > 1000


def test_the_loss_at_start_is_one_plus_the_second_moment():
    """Over enough images: the difference is within four standard errors of nothing."""
    data = load_data(DataConfig())
    losses, _ = train.validation_losses(DiT(ModelConfig(), **data.shape), data, 512, "float32")
    expected = np.mean([1 + b[0].square().mean().item() for _, b in train.validation_batches(data, 512)])
    assert losses.mean().item() == pytest.approx(expected, abs=4 * losses.std().item() / 512 ** 0.5)
    assert losses.std().item() / 512 ** 0.5 < 0.02


def test_validation_does_not_depend_on_the_world_and_not_on_the_seed():
    first, second = (load_data(DataConfig(resolution=4), seed=s) for s in (0, 1))
    whole = {int(i): x for index, b in train.validation_batches(first, 300) for i, x in zip(index, b[1])}
    shared = {int(i): x for rank in range(3) for index, b in train.validation_batches(second, 300, rank, 3) for i, x in zip(index, b[1])}
    assert whole.keys() == shared.keys() == set(range(300))
    assert all(torch.equal(whole[i], shared[i]) for i in whole)


def test_power_function_average(tmp_path, monkeypatch):
    assert train.ema_exponent(0.1) == pytest.approx(6.94, abs=0.01) and train.ema_exponent(0.05) == pytest.approx(16.97, abs=0.01)
    seen = []
    real = train.validation_losses
    monkeypatch.setattr(train, "validation_losses", lambda model, *rest, **first: (
        seen.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()])), real(model, *rest, **first))[1])
    run(tmp_path / "run", *range(1, 13))
    ema, raw = seen[0::2], seen[1::2]
    gamma = train.ema_exponent(0.1)
    # Weights of the steps up to T that the recursion of beta = (1 - 1/k)^(gamma+1) implies: about k^gamma.
    for T in (1, 5, 12):
        weights = [(1 - (1 - 1 / k) ** (gamma + 1)) * math.prod((1 - 1 / j) ** (gamma + 1) for j in range(k + 1, T + 1)) for k in range(1, T + 1)]
        assert sum(weights) == pytest.approx(1)
        torch.testing.assert_close(ema[T - 1], sum(w * x for w, x in zip(weights, raw)), rtol=1e-5, atol=1e-7)
    T = 5000
    weights = [k ** gamma for k in range(1, T + 1)]
    mean = sum(w * k for k, w in enumerate(weights, 1)) / sum(weights)
    width = (sum(w * (k - mean) ** 2 for k, w in enumerate(weights, 1)) / sum(weights)) ** 0.5 / T
    assert width == pytest.approx(0.1, abs=1e-3)


def test_steps_are_nearest_to_the_budget_and_never_too_few(monkeypatch):
    model, config = DiT(ModelConfig(depth=1, width=8), size=4, text_tokens=4, text_dim=8), train.TrainConfig(batch=8, warmup=20)
    assert train.steps_for(100.4 * STEP, model, config) == 100 and train.steps_for(100.6 * STEP, model, config) == 101
    monkeypatch.undo()
    assert (train.MIN_STEPS, train.MIN_WARMUPS) == (50, 5)
    with pytest.raises(ValueError, match=f"--budget.*needs 100.*{re.escape(f'{100 * STEP:.3g}')}"):
        train.steps_for(60 * STEP, model, config)
    assert train.steps_for(60 * STEP, model, train.TrainConfig(batch=8, warmup=10)) == 60
    six = train.TrainConfig(batch=8, count="6nd")
    assert train.steps_for(8 * model.flops_per_image("6nd") * 70, model, six) == 70


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    folder = run(tmp_path / "run", 10)
    good = (folder / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    original = train.training_batch
    monkeypatch.setattr(train, "training_batch", lambda *a: (lambda b: (b[0] * math.nan if a[2] == 13 else b[0], *b[1:]))(original(*a)))
    said = refused(tmp_path / "run", 10, 30, status=1, capsys=capsys)
    assert "not finite" in said and "--lr" in said
    assert (folder / "checkpoint.pt").read_bytes() == good
    assert not point(folder, 30).exists()
    monkeypatch.setattr(train, "training_batch", original)
    run(tmp_path / "run", 10, 30)
    assert point(folder, 30).exists()


BAD = [
    (["--budg", "1e12"], "--budg"),
    (["--width", "20"], "--head_dim 8"),
    (["--patch", "3"], "--patch 3"),
    (["--budget", "2e9", "1e9"], "must rise"),
    (["--budget", "nan"], "--budget"),
    (["--budget", "many"], "--budget"),
    (["--batch", "10"], "--micro_batches"),
    (["--accumulate", "3"], "--accumulate"),
    (["--data", "/no/such/file"], "--data"),
    (["--arch", "unet"], "--arch"),
    (["--preset", "huge"], "--preset"),
    (["--device", "cuda"], "--device"),
    (["--ema_width", "0.5"], "--ema_width"),
    (["--lr", "-1"], "--lr"),
    (["--caption_dropout", "1"], "--caption_dropout"),
    (["--threads", "0"], "--threads"), (["--weight_decay", "-1"], "--weight_decay"), (["--lr", "inf"], "--lr"), (["--preset"], "--preset"),
    (["--budget", "1e9", "1.00001e9"], "4 digits"),
    (["--val_images", "1"], "--val_images"),
]


@pytest.mark.parametrize("flags, named", BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else "")
def test_bad_input_is_one_line_that_names_the_flag(tmp_path, capsys, flags, named):
    if flags[0] == "--device" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert named in refused(tmp_path / "run", 10, flags=flags, capsys=capsys)
    assert not (tmp_path / "run").exists()


def test_too_small_a_budget_says_how_small_is_possible(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "MIN_STEPS", 50)
    assert f"the smallest possible is {50 * STEP:.3g}" in refused(tmp_path / "run", 10, capsys=capsys)


def test_a_world_that_does_not_divide_the_micro_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "--micro_batches 4 is not divisible by the 3" in refused(tmp_path / "run", 10, capsys=capsys)


def test_another_configuration_is_refused_and_the_differences_named(tmp_path, capsys):
    folder = run(tmp_path / "run", 10)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    capsys.readouterr()
    said = refused(folder, 10, 20, flags=["--lr", "0.5", "--captions", "sparse"], capsys=capsys)
    assert "train.lr: 0.006 -> 0.5" in said and "data.captions: dense -> sparse" in said
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_run_resumed_elsewhere_warns_and_its_record_says_so(tmp_path, capsys):
    folder = run(tmp_path / "run", 10)
    saved = torch.load(folder / "checkpoint.pt", weights_only=True)
    saved["runtime"]["versions"]["torch"] = "1.0"
    torch.save(saved, folder / "checkpoint.pt")
    capsys.readouterr()
    run(folder, 10, 20)
    assert "WARNING: resumed elsewhere (versions.torch: 1.0 -> " in capsys.readouterr().out
    drift = [json.loads((point(folder, steps) / "result.json").read_text())["drift"] for steps in (10, 20)]
    assert drift[0] == [] and drift[1][0].startswith("step 10: versions.torch: 1.0 -> ")


def test_a_new_flag_never_makes_an_old_folder_refuse(tmp_path, capsys, monkeypatch):
    """The three configurations of an old folder lack a flag that the new ones have."""
    folder = run(tmp_path / "run", 10)
    config = json.loads((folder / "config.json").read_text())
    for section, name in (("model", "qk_norm"), ("data", "flip"), ("train", "clip"), ("train", "compile")):
        del config[section][name]
    (folder / "config.json").write_text(json.dumps(config))
    run(folder, 10, 20)
    assert point(folder, 20).exists()
    capsys.readouterr()
    assert "train.clip: 1.0 -> 2.0" in refused(folder, 10, 20, flags=["--clip", "2"], capsys=capsys)


@pytest.mark.parametrize("name, content", [("result.json", '{"schema": 1, "val_lo'), ("result.json", '{"schema": 99}'),
                                           ("result.json", "[]"), ("checkpoint.pt", "PK torn"), ("checkpoint.pt", ""), ("config.json", "{"),
                                           ("config.json", "[]"), ("config.json", '{"runtime": null}')])
def test_a_torn_or_foreign_file_is_named_and_kept(tmp_path, capsys, name, content):
    folder = run(tmp_path / "run", 10)
    file = (point(folder, 10) if name == "result.json" else folder) / name
    file.write_text(content)
    capsys.readouterr()
    assert str(file) in refused(folder, 10, 20, capsys=capsys)
    assert file.read_text() == content


def test_a_full_disk_is_one_line_and_nothing_half_written_stays(tmp_path):
    """A limit on the size of a file stands for the full disk: the write fails in the same place."""
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport resource, signal, train\n"
                      f"signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
                      f"train.MIN_STEPS, train.MIN_WARMUPS = 1, 0\ntrain.main()\n")
    failed = subprocess.run([sys.executable, script, *TINY, "--width", "64", "--out", tmp_path / "run", "--budget", "1e9"],
                            capture_output=True, text=True)
    assert failed.returncode == 1
    said = [line for line in failed.stderr.splitlines() if line.startswith("train.py: ")]
    assert len(said) == 1 and "checkpoint.pt" in said[0] and "Traceback" not in failed.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "log.jsonl"]


def test_done_is_done(tmp_path, capsys):
    folder = run(tmp_path / "run", 10)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    run(folder, 10)
    assert "done" in capsys.readouterr().out and {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_second_process_in_the_same_folder_is_refused(tmp_path, capsys):
    folder = run(tmp_path / "run", 10)
    capsys.readouterr()
    with train.open_log(folder / "log.jsonl", 10):
        assert "another process" in refused(folder, 10, 20, capsys=capsys)
    run(folder, 10, 20)


def test_the_average_carries_no_graph(tmp_path, monkeypatch):
    """An average updated with autograd on would grow a graph by a node a step."""
    kept = []
    real = train.validation_losses
    monkeypatch.setattr(train, "validation_losses", lambda model, *rest, **first: (kept.append(model), real(model, *rest, **first))[1])
    run(tmp_path / "run", 10)
    ema, model = kept
    assert not any(p.requires_grad or p.grad_fn for p in ema.parameters()) and all(p.requires_grad for p in model.parameters())


def test_preset_paper_is_the_papers(capsys):
    from data import parse_flags
    model, _, config = parse_flags((ModelConfig, DataConfig, train.TrainConfig), "x", train.PRESETS, argv=["--preset", "paper", "--depth", "9"])
    assert (model.width, model.head_dim, model.qk_norm, model.parametrization) == (576, 64, False, "sp")
    assert (config.batch, config.lr, config.count) == (1024, 1e-4, "6nd")
    _, _, config = parse_flags((ModelConfig, DataConfig, train.TrainConfig), "x", train.PRESETS, argv=["--preset", "paper", "--lr", "1"])
    assert config.lr == 1 and config.batch == 1024                                      # a flag wins over the preset
