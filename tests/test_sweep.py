import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import sweep
from model import family

ROOT = Path(__file__).parent.parent
# Two sizes, three budgets, a few seconds.
SMALL = ["--depth", "1", "--width", "8", "16", "--budget", "1e8", "2e8", "4e8", "--window", "1e9"]
FLAGS = ["--resolution", "4", "--text_tokens", "4", "--text_dim", "8", "--batch", "8", "--val_images", "16", "--warmup", "5", "--head_dim", "4"]


def command(*arguments):
    return subprocess.run([sys.executable, ROOT / "sweep.py", *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)


def planned(**changes):
    return sweep.plan(sweep.SweepConfig(**{"depth": [1], "width": [8, 16], "budget": [1e8, 2e8, 4e8], "window": 1e9, **changes}), FLAGS)


def test_a_small_sweep_runs_resumes_and_skips(tmp_path):
    out = tmp_path / "small"
    first = command("--out", out, *SMALL, *FLAGS)
    records = sorted(out.glob("*/budget_*/result.json"))
    assert len(records) == 6 and all(json.loads(record.read_text())["val_loss_ema"] > 0 for record in records)
    assert first.returncode == 3, first.stdout + first.stderr       # it trains, and fit.py refuses two sizes: status 3
    assert "refus" in first.stderr + first.stdout or "fewer" in first.stderr + first.stdout
    kept = {record: record.stat().st_mtime_ns for record in records}
    last = out / "depth01_width008_seed0" / "budget_4e+08" / "result.json"
    last.unlink()
    again = command("--out", out, *SMALL, *FLAGS)
    assert "1 runs are done" in again.stdout and "keeps 2 sizes" in again.stdout
    assert last.exists() and all(record.stat().st_mtime_ns == kept[record] for record in records if record != last)
    refused = command("--out", out, *SMALL, *FLAGS, "--lr", "0.1")
    assert refused.returncode == 2 and "train.lr: 0.006 -> 0.1" in refused.stderr and len(refused.stderr.strip().splitlines()) == 1


def test_dry_run_prints_the_grid_and_writes_nothing(tmp_path):
    said = command("--dry-run", "--out", tmp_path / "none", *SMALL, *FLAGS)
    assert said.returncode == 0 and not (tmp_path / "none").exists()
    runs, _ = planned()
    for run in runs:
        for budget, steps in run.steps.items():
            assert any(run.name in line and f"{steps:,d}" in line and f"{budget:.3g}" in line for line in said.stdout.splitlines())
    total = sum(max(run.steps.values()) * run.step_flops for run in runs)
    assert f"{total:.3g} FLOPs" in said.stdout and "2 runs, 6 points" in said.stdout


def test_nested_costs_one_column():
    """A run to every budget costs what the last one costs; separate runs cost the sum."""
    (run, *_), _ = planned()
    steps = list(run.steps.values())
    assert steps == sorted(steps) and len(steps) == 3
    assert max(steps) * run.step_flops == pytest.approx(4e8, rel=0.02)
    assert sum(steps) * run.step_flops == pytest.approx(7e8, rel=0.02)


def test_the_papers_dry_run():
    said = command("--preset", "paper", "--dry-run").stdout
    assert "6e+18" in said and "depth15_width960" in said and "H100-hours" in said
    runs, left_out = sweep.plan(sweep.SweepConfig(preset="paper", dry_run=True), [])
    assert all(run.configs[2].batch == 1024 and run.configs[2].lr == 1e-4 and run.configs[2].count == "6nd" for run in runs)
    for run in runs:                                     # 6 N D is the budget, to the nearest step
        for budget, steps in run.steps.items():
            assert 6 * run.N * steps * 1024 * run.tokens == pytest.approx(budget, rel=0.51 / steps)
    assert (2, 6e18) not in {(run.configs[0].depth, budget) for run in runs for budget in run.steps}
    assert any(depth == 27 and len(reasons) == 6 for depth, _, reasons in left_out)      # the billion is for the extrapolation, not for the grid


def test_a_size_is_trained_to_its_last_useful_budget():
    runs, left_out = sweep.plan(sweep.SweepConfig(), [])
    coefficient, exponent = sweep.EXPECTED_OPTIMUM["quick"]
    for run in runs:
        assert all(1 / 6.5 <= run.N / (coefficient * budget ** exponent) <= 6.5 for budget in run.steps)
    budgets = sorted({budget for run in runs for budget in run.steps})
    middle = coefficient * (budgets[0] * budgets[-1]) ** (exponent / 2)
    assert [run.configs[2].seed for run in runs if run.N == 39472] == [0, 1]           # the seed noise is measured too
    assert len(runs) >= 9 and len(budgets) >= 6 and budgets[-1] / budgets[0] >= 10 ** 1.5 * 0.999
    assert min(run.N for run in runs) < middle / 6.5 and max(run.N for run in runs) > middle * 6.5


def test_a_failing_run_is_tried_once_more_and_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sweep, "HERE", tmp_path)   # so that this train.py is found
    (tmp_path / "train.py").write_text(
        "import os, sys\nfolder = sys.argv[sys.argv.index('--out') + 1]\n"
        "tries = len(os.listdir(folder))\nopen(os.path.join(folder, f'try{tries}'), 'w')\n"
        "print('the reason')\nsys.exit(0 if 'width016' in folder else 1)\n")
    runs, _ = planned(out=str(tmp_path / "out"))
    failed = sweep.run_all(runs, 2, 1)
    assert [run.name for run in failed] == ["depth01_width008_seed0"]
    assert sorted(os.listdir(failed[0].folder)) == ["output.txt", "try1", "try2"]
    said = capsys.readouterr()
    assert "the reason" in said.out + said.err


def test_an_ended_sweep_ends_its_runs_and_tries_none_again(tmp_path):
    (tmp_path / "train.py").write_text(
        "import os, sys, time\nfolder = sys.argv[sys.argv.index('--out') + 1]\n"
        "open(os.path.join(folder, f'try{len(os.listdir(folder))}'), 'w')\ntime.sleep(100)\n")
    script = f"import sweep, pathlib; sweep.HERE = pathlib.Path({str(tmp_path)!r}); sweep.main()"
    process = subprocess.Popen([sys.executable, "-c", script, "--out", str(tmp_path / "out"), *SMALL, *FLAGS,
                                "--jobs", "1"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out").glob("*/try1")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(30) == 143
    assert [path.name for path in (tmp_path / "out").glob("*/try*")] == ["try1"]


@pytest.mark.parametrize("aspect", [8, 16, 32])
def test_another_aspect_keeps_the_sizes_of_the_family(aspect):
    shapes = sweep.reshaped(family("quick"), aspect, 8)
    assert len(shapes) >= 9 - (aspect != 16) and all(width % 8 == 0 for _, width in shapes)
    volumes, wanted = [d * w ** 2 for d, w in shapes], [d * w ** 2 for d, w in family("quick")]
    assert all(min(abs(math.log(volume / other)) for other in wanted) < 0.3 for volume in volumes)
    assert sweep.reshaped(family("paper"), 64, 64) == family("paper")           # its own aspect changes nothing
    large = sweep.reshaped([(16, 512)], aspect, 8)[0]                            # where heads are small against the width it is met
    assert large[1] / large[0] == pytest.approx(aspect, rel=0.15) and large[0] * large[1] ** 2 == pytest.approx(16 * 512 ** 2, rel=0.1)
    runs, _ = sweep.plan(sweep.SweepConfig(), [f"--aspect={aspect}"])
    assert {(run.configs[0].depth, run.configs[0].width) for run in runs} == set(shapes)


@pytest.mark.parametrize("arch", ["cross", "mmdit"])
def test_other_archs_keep_the_sizes_of_the_family(arch):
    """Their N is 1.3 to 2.7 times that of incontext, so a window around the optimum of incontext would leave out the wrong ones."""
    plain, _ = sweep.plan(sweep.SweepConfig(), [])
    runs, _ = sweep.plan(sweep.SweepConfig(), ["--arch", arch])
    shapes = lambda runs: [(run.configs[0].depth, run.configs[0].width, run.configs[2].seed) for run in runs]
    assert shapes(runs) == shapes(plain) and all(run.configs[0].arch == arch for run in runs)
    assert all(one.N > 1.2 * two.N and set(one.steps) >= set(two.steps) for one, two in zip(runs, plain))
    for budget in plain[4].steps:
        assert sum(budget in run.steps for run in runs) >= 8


def test_vary_makes_a_grid_of_each_value_and_one_comparison(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(sweep, "run_sweep", lambda one, flags: called.append((one.out, flags, one.window, one.vary)) or 0)
    monkeypatch.setattr(sweep, "call_fit", lambda one, *arguments: called.append(arguments) or 0)
    config = sweep.SweepConfig(depth=[1], width=[8, 16], budget=[1e8, 2e8, 4e8], out=str(tmp_path / "x"), vary="images=100,1000,all")
    assert sweep.run_varied(config, FLAGS) == 0
    out = [str(tmp_path / "x" / f"images_{n}") for n in ("100", "1000", "all")]
    assert called == [(out[0], [*FLAGS, "--images=100"], 13, None), (out[1], [*FLAGS, "--images=1000"], 13, None), (out[2], FLAGS, 13, None),
                      (out[0], "--compare", out[1], out[2], "--out", str(tmp_path / "x" / "law"))]
    ((one, flags), _) = sweep.varied(sweep.SweepConfig(vary="data=a b/c.parquet,scenes"), [])
    assert one.out == "results/my-data/data_a-b-c.parquet" and flags == ["--data=a b/c.parquet"] and one.window is None
    monkeypatch.setattr(sweep, "run_sweep", lambda one, flags: 1)
    assert sweep.run_varied(config, FLAGS) == 1


@pytest.mark.parametrize("vary, named", [
    ("lr=0.003", "--vary lr=0.003"), ("lr", "--vary lr"), ("lr=0.003,", "--vary lr"), ("lr=0.003,0.003", "different"),
    ("learning_rate=1,2", "learning_rate can't be varied"), ("seed=0,1", "seed can't"), ("=1,2", "nothing can't"), ("out=a,b", "out can't"),
    ("arch=incontext,unet", "--arch"), ("captions=dense,none", "--captions"), ("resolution=4,5", "--resolution"), ("images=10,some", "--images"),
    ("text_dim=4,8", "--text_dim"), ("aspect=8,16", "--vary aspect"), ("lr=0.003,-1", "--lr"),
])
def test_what_cannot_be_varied_is_one_line(tmp_path, vary, named, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--out", str(tmp_path / "out"), *SMALL, *FLAGS, "--vary", vary])
    with pytest.raises(SystemExit) as end:
        sweep.main()
    said = capsys.readouterr().err
    assert end.value.code == 2 and named in said and len(said.strip().splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arguments, named", [
    (["--aspect", "0"], "--aspect"), (["--budget", "2e9", "1e9"], "--budget"), (["--widht", "8"], "--widht"), (["--jobs", "0"], "--jobs"),
    (["--depth", "1", "2", "--width", "8", "16", "24"], "--depth"), (["--width", "9"], "--head_dim"), (["--window", "1"], "--window"),
    (["--data", "/no/such"], "--data"), (["--budget", "1e3"], "nothing to run"), (["--seed", "3"], "--seeds"), (["--width", "32", "32"], "twice"), (["--preset", "big"], "--preset"),
    (["--preset", "paper"], "--data"),
])
def test_bad_input_is_one_line(tmp_path, arguments, named):
    said = command("--out", tmp_path / "out", *arguments)
    assert said.returncode == 2 and named in said.stderr and len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert not (tmp_path / "out").exists()
