import json
import subprocess
import sys
from pathlib import Path

import pytest

import sweep

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
    records[0].unlink()
    again = command("--out", out, *SMALL, *FLAGS)
    assert "1 runs are done" in again.stdout and "keeps 2 sizes" in again.stdout
    assert records[0].exists() and all(record.stat().st_mtime_ns == kept[record] for record in records[1:])
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
    assert any(config.depth == 27 for config, *_ in left_out)      # the billion is for the extrapolation, not for the grid


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
    monkeypatch.setattr(sweep.os.path, "abspath", lambda path: str(tmp_path / "sweep.py"))   # so that start() finds this one
    (tmp_path / "train.py").write_text(
        "import os, sys\nfolder = sys.argv[sys.argv.index('--out') + 1]\n"
        "tries = len(os.listdir(folder))\nopen(os.path.join(folder, f'try{tries}'), 'w')\n"
        "print('the reason')\nsys.exit(0 if 'width016' in folder else 1)\n")
    runs, _ = planned(out=str(tmp_path / "out"))
    failed = sweep.run_all(runs, 2, 1)
    assert [run.name for run in failed] == ["depth01_width008_seed0"] and failed[0].tries == 2
    said = capsys.readouterr()
    assert "the reason" in said.out + said.err


@pytest.mark.parametrize("arguments, named", [
    (["--budget", "2e9", "1e9"], "--budget"), (["--widht", "8"], "--widht"), (["--jobs", "0"], "--jobs"),
    (["--depth", "1", "2", "--width", "8", "16", "24"], "--depth"), (["--width", "9"], "--head_dim"), (["--window", "1"], "--window"),
    (["--data", "/no/such"], "--data"), (["--budget", "1e3"], "nothing to run"), (["--seed", "3"], "--seeds"), (["--width", "32", "32"], "twice"), (["--preset", "big"], "--preset"),
    (["--preset", "paper"], "--data"),
])
def test_bad_input_is_one_line(tmp_path, arguments, named):
    said = command("--out", tmp_path / "out", *arguments)
    assert said.returncode == 2 and named in said.stderr and len(said.stderr.strip().splitlines()) == 1, said.stderr
    assert not (tmp_path / "out").exists()
