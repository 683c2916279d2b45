"""The benchmarks at a size where they say nothing, so that they can't rot, and the arithmetic in them."""
import json

import pytest

import grid
import speed
from model import FAMILY_CONFIG, DiT, ModelConfig

PAPER = FAMILY_CONFIG["paper"]


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """-> a function: the rows that the tables have written so far."""
    monkeypatch.setenv("OUT", str(tmp_path))
    return lambda table: [row for line in next(tmp_path.glob("*.json")).read_text().splitlines() if (row := json.loads(line))["table"] == table]


@pytest.mark.parametrize("arch", speed.ARCHS)
def test_the_products_are_all_that_is_counted(arch):
    config = ModelConfig(arch, 2, 64, **PAPER)
    linears, attentions = speed.products(config, speed.LATENTS, images=1)
    flops = sum(2 * rows * inputs * outputs for rows, inputs, outputs, _ in linears) + sum(4 * q.numel() * k[2] for q, k, _ in attentions)
    assert 3 * flops == DiT(config, **speed.LATENTS).flops_per_image()
    # Pixels, words and times need no gradient; all else does.
    assert sum(not needs_gradient for *_, needs_gradient in linears) == (4 if arch == "mmdit" else 3)


def test_tables_of_speed(rows):
    machine = speed.Machine("cpu", n=64)
    speed.bench_family(machine, depths=[1], batch=1, steps=1)
    speed.bench_scenes(machine, batches=(16,), blocks=1)
    speed.bench_bare(machine, sizes=((16, 8),), depth=1, batch=2, turns=1, steps=1)
    speed.bench_rules(machine, widths=(16,), compiled=(), depth=1, batch=2, turns=1, steps=1)
    assert [row["arch"] for row in rows("family")] == list(speed.ARCHS)
    assert all(sum(row[part] for part in speed.PARTS) == pytest.approx(1) and row["images/s"] > 0 for row in rows("family"))
    assert rows("scenes")[0]["drawn/trained"] > 0.1 and 0.05 < rows("bare")[0]["ours/bare"] < 1.5 and rows("rules")[0]["train.resolve_auto"] == "f32 x 1"


def test_peers_are_of_our_size_and_a_failing_row_does_not_end_a_table(rows, monkeypatch):
    machine = speed.Machine("cpu", n=64)
    speed.bench_peers(machine, depth=2, width=64, text_tokens=4, batch=1, turns=1)
    found = rows("peers")
    assert len(found) == 9 and all(row["images/s"] > 0 for row in found)
    for ours, theirs, _ in zip(*[iter(found)] * 3):   # DiT has no tokens of text and time, but 12 times the modulation
        assert theirs["GFLOP/image"] == pytest.approx(ours["GFLOP/image"], rel=0.1)

    def full(*_):
        raise speed.torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(speed, "family_row", full)
    speed.bench_family(machine, archs=["cross"], depths=[1, 2], batch=1, steps=1)
    assert [row["remark"] for row in rows("family")] == ["out of memory"] * 2


def test_the_papers_grid_saves_two_fifths(rows):
    grid.bench_paper()
    assert rows("paper")[-1]["once/separate"] <= 0.6


def test_tables_of_bench_sweep(rows, tmp_path):
    flags = ["--resolution", "4", "--text_tokens", "4", "--text_dim", "8", "--batch", "8", "--val_images", "16", "--warmup", "5", "--head_dim", "4"]
    folder = grid.bench_grid(tmp_path, dict(depth=[1], width=[8], budget=[1e8, 2e8]), [2], flags)
    grid.bench_ideal(folder, 1)
    nested, separate = rows("grid")
    assert (nested["number"], separate["number"]) == (1, 2) and nested["FLOPs"] < 0.7 * separate["FLOPs"]
    assert rows("ideal")[-1]["real/ideal"] > 1 and rows("ideal")[0]["floor s"] > 0
    with pytest.raises(ValueError, match="no runs in it"):
        grid.bench_ideal(tmp_path / "nowhere", 1)
