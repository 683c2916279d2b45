"""The fast paths give the numbers of the plain one, and are chosen by model and device alone."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import flow
import model
import train
from data import DataConfig, load_data
from model import DiT, ModelConfig
from test_train import assert_same_point, point, run, short_runs_allowed  # noqa: F401 (a fixture)


@pytest.mark.parametrize("width, able, precision", [(64, True, "float32"), (256, True, "bfloat16"), (256, False, "float32")])
def test_precision_compile_and_threads_follow_from_model_and_device(width, able, precision, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    chosen = [train.resolve_auto(train.TrainConfig(device="cpu", budget=budget), ModelConfig(width=width)) for budget in ([1e9], [1e11, 1e15])]
    assert [(one.precision, one.compile, one.threads) for one in chosen] == 2 * [(precision, "off", 4 if width == 64 else 6)]
    asked = train.resolve_auto(train.TrainConfig(device="cpu", precision="float32", compile="on", threads=2), ModelConfig(width=width))
    assert (asked.precision, asked.compile, asked.threads) == ("float32", "on", 2)


def test_cuda_graphs_are_for_narrow_models_whose_gradients_die_with_the_step(monkeypatch):
    modes = []
    monkeypatch.setattr(torch, "compile", lambda network, **how: modes.append((how["mode"], how["fullgraph"], how["dynamic"])))
    on_gpu = lambda width: SimpleNamespace(parameters=lambda: iter([SimpleNamespace(is_cuda=True)]), config=SimpleNamespace(width=width))
    train.compiled(on_gpu(128), train.TrainConfig())
    train.compiled(on_gpu(1728), train.TrainConfig())
    train.compiled(on_gpu(128), train.TrainConfig(accumulate=2))
    train.compiled(on_gpu(128), train.TrainConfig(), world=2)
    train.compiled(DiT(ModelConfig(depth=1, width=16)), train.TrainConfig())
    assert modes == [("reduce-overhead", True, False)] + 4 * [("default", True, False)]


@pytest.mark.parametrize("arch", ["incontext", *(pytest.param(arch, marks=pytest.mark.slow) for arch in ("cross", "mmdit"))])
def test_a_compiled_run_resumes_bit_for_bit_and_agrees_with_the_plain_one(arch, tmp_path):
    whole = run(tmp_path / "whole", 6, 12, flags=["--compile", "on", "--arch", arch])
    run(tmp_path / "parts", 6, flags=["--compile", "on", "--arch", arch])
    parts = run(tmp_path / "parts", 6, 12, flags=["--compile", "on", "--arch", arch])
    plain = run(tmp_path / "plain", 6, 12, flags=["--arch", arch])
    losses = []
    for steps in (6, 12):
        assert_same_point(point(whole, steps), point(parts, steps))
        losses.append([json.loads((point(out, steps) / "result.json").read_text())["val_loss_ema"] for out in (whole, plain)])
    assert all(one == pytest.approx(two, rel=1e-4) for one, two in losses)


def test_a_failing_compiler_names_the_way_out_and_leaves_it_open(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda *batch: (_ for _ in ()).throw(RuntimeError("no C++ compiler")))
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", 6, flags=["--compile", "on"])
    assert stop.value.code == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "train.py: torch.compile failed (no C++ compiler): --compile off trains without it"
    run(tmp_path / "run", 6, flags=["--compile", "off"])


def test_a_run_does_not_go_on_on_another_path(tmp_path, capsys):
    run(tmp_path / "run", 6, flags=["--compile", "off"])
    with pytest.raises(SystemExit):
        run(tmp_path / "run", 12, flags=["--compile", "on"])
    assert "compile" in capsys.readouterr().err


@pytest.mark.parametrize("masked", [False, True])
def test_attention_by_hand_in_bfloat16_is_attention(masked):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 20, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    mask = (torch.rand(2, 1, 1, 20) < 0.7) if masked else None
    ours = model.attend(q, k, v, mask)
    in_float32 = [one.detach().float().requires_grad_() for one in (q, k, v)]
    exact = F.scaled_dot_product_attention(*in_float32, attn_mask=mask).transpose(1, 2).flatten(2)
    gradient = torch.randn_like(exact)
    ours.backward(gradient.bfloat16())
    exact.backward(gradient)
    assert ours.dtype == torch.bfloat16 and torch.allclose(ours.float(), exact, atol=0.02)
    for one, reference in zip((q, k, v), in_float32):
        assert torch.allclose(one.grad.float(), reference.grad, atol=0.05)
    if masked:   # what no token sees has no influence
        unseen = ~mask[:, 0, 0, :]
        assert v.grad.transpose(1, 2)[unseen].abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("depth, width", [(1, 24), (2, 40), (2, 96)])
def test_500_steps_on_the_fast_path_end_within_seed_noise_of_the_plain_one(depth, width):
    """bfloat16 and torch.compile against float32 without; the noise is what another seed of the weights and data changes."""
    data, device, curves = load_data(DataConfig()), torch.device("cpu"), {}
    for name, seed, precision, compile in (("plain", 0, "float32", "off"), ("fast", 0, "bfloat16", "on"), ("seed", 1, "float32", "off")):
        config = train.TrainConfig(seed=seed, precision=precision, compile=compile)
        torch.manual_seed(seed)
        network = DiT(ModelConfig(depth=depth, width=width), **data.shape)
        optimizer = train.make_optimizer(network, config)
        called = train.compiled(network, config) if compile == "on" else network
        losses = []
        for step in range(1, 501):
            for group, rate in zip(optimizer.param_groups, network.parameter_groups(config.lr)):
                group["lr"] = rate["lr"] * min(1, step / config.warmup)
            with train.autocast(device, precision):
                loss = flow.loss_per_image(called, *train.training_batch(data, config, step, 0, 1, device)).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.clip)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves[name] = torch.tensor(losses).view(10, 50).mean(1)   # means of 50 steps
    fast, seed = ((curves[name] - curves["plain"]).abs() / curves["plain"] for name in ("fast", "seed"))
    print(f"depth {depth}, width {width}: fast path {fast.mean():.2%} (at most {fast.max():.2%}), seed {seed.mean():.2%} (at most {seed.max():.2%})")
    assert fast.mean() < seed.mean() and fast.max() < seed.max()
