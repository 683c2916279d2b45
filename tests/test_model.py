import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flow
from model import FAMILY_CONFIG, FAMILY_INPUT, MUP_BASE_WIDTH, DiT, ModelConfig, family, model_table

ARCHS = ("incontext", "cross", "mmdit")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def inputs(model, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, model.channels, model.size, model.size, generator=g)
    text = torch.randn(B, model.text_tokens, model.text_dim, generator=g)
    return x, torch.rand(B, generator=g), text, torch.rand(B, model.text_tokens, generator=g) < 0.7


def awake(model, seed=0):
    """A model without zeros: at the start the head hides everything behind it, and the gates every branch."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


SHAPES = [
    (dict(depth=2, width=32), dict(channels=3, size=16, text_tokens=16, text_dim=64)),
    (dict(depth=3, width=48, head_dim=16, qk_norm=False), dict(channels=4, size=8, text_tokens=5, text_dim=12)),
    (dict(depth=1, width=64, patch=4, parametrization="sp"), dict(channels=1, size=28, text_tokens=1, text_dim=7)),
]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("config, shape", SHAPES)
@pytest.mark.parametrize("B, real", [(1, None), (3, None), (2, True), (2, False)])   # masks: some words, all, none
def test_forward_flops_equal_torchs_counter(arch, config, shape, B, real):
    model = DiT(ModelConfig(arch, **config), **shape)
    x, t, text, mask = inputs(model, B)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, text, mask if real is None else torch.full_like(mask, real))
    assert counter.get_total_flops() == B * sum(model.count_flops().values())
    assert model.flops_per_image() == 3 * sum(model.count_flops().values())
    assert model.flops_per_image("6nd") == 6 * model.count_parameters()["blocks"] * sum(model.tokens().values())


def test_6nd_and_exact_differ_by_attention_in_the_blocks():
    """PAPER.md: the blocks' exact count is 6ND (1 + n / (6 width)) for weights alone."""
    model = DiT(ModelConfig(depth=3, width=192, head_dim=64), **FAMILY_INPUT["paper"])
    flops, n = model.count_flops(), sum(model.tokens().values())
    blocks = 3 * sum(flops[part] for part in ("attention projections", "attention", "mlp"))
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert blocks == pytest.approx(6 * weights * n * (1 + n / (6 * 192)), rel=1e-12)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("config, shape", SHAPES)
def test_parameters_by_group_sum_to_the_total(arch, config, shape):
    model = DiT(ModelConfig(arch, **config), **shape)
    N = model.count_parameters()
    assert N["blocks"] + N["embedding"] + N["head"] == N["total"] == sum(p.numel() for p in model.parameters())
    assert N["blocks"] == sum(p.numel() for p in model.blocks.parameters())


def by_part(block, parts):
    """Parameters of a block (or layer) by part: the first of {part: words} of which one is in the parameter's name."""
    counts = dict.fromkeys(parts, 0)
    for name, parameter in block.named_parameters():
        counts[next(part for part, words in parts.items() if any(word in name for word in words))] += parameter.numel()
    return counts


@pytest.mark.parametrize("qk_norm", [False, True])
def test_block_stacks_equal_those_of_the_reference_designs(qk_norm):
    """PixArt-alpha's 28 layers of width 1152 and SD3's 24 of width 1536 (SD3 normalises queries and keys from 3.5 on): no difference.

    Beyond the blocks the designs differ, in what embeds captions and sizes of image. `pytest -s` shows the table.
    """
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        models = {
            "cross": (DiT(ModelConfig("cross", 28, 1152, head_dim=72, qk_norm=False), 4, 32, 120, 4096),
                      diffusers.PixArtTransformer2DModel(num_layers=28, num_attention_heads=16, attention_head_dim=72)),
            "mmdit": (DiT(ModelConfig("mmdit", 24, 1536, head_dim=64, qk_norm=qk_norm), 16, 128, 154, 4096),
                      diffusers.SD3Transformer2DModel(num_layers=24, num_attention_heads=24, attention_head_dim=64,
                                                      caption_projection_dim=1536, qk_norm="rms_norm" if qk_norm else None)),
        }
    parts = {"cross": ({"modulation": ["table"], "cross-attention": ["cross_attention"], "attention": ["attention"], "MLP": ["mlp"]},
                       {"modulation": ["table"], "cross-attention": ["attn2"], "attention": ["attn1"], "MLP": ["ff"]}),
             "mmdit": ({"modulation": ["modulation"], "QK-norm": ["q_norm", "k_norm"], "attention": ["attention"], "MLP": ["mlp"]},
                       {"modulation": ["norm1"], "QK-norm": ["norm_"], "attention": ["attn"], "MLP": ["ff"]})}
    for arch, (ours, theirs) in models.items():
        pairs = [[by_part(block, words) for block, words in zip(layer, parts[arch])] for layer in zip(ours.blocks, theirs.transformer_blocks)]
        print(f"\n{arch:16} {'ours':>13} {'reference':>13}")
        for part in parts[arch][0]:
            print(f"{part:16} {sum(p[0][part] for p in pairs):13,d} {sum(p[1][part] for p in pairs):13,d}")
        assert len(pairs) == len(theirs.transformer_blocks) and all(one == two for one, two in pairs)
        assert ours.count_parameters()["blocks"] == sum(p.numel() for p in theirs.transformer_blocks.parameters())
    shared = sum(p.numel() for p in models["cross"][1].adaln_single.linear.parameters())
    assert shared == sum(p.numel() for p in models["cross"][0].modulation.parameters())   # PixArt's one modulation, not in a block


def test_the_papers_family_brackets_its_optima():
    """12 L width^2 is 0.39M at 2 layers, 36M at 9, 166M at 15, 967M at 27 (PAPER.md); biases and norms add little."""
    sizes = dict(family("paper"))
    assert sorted(sizes) == [*range(2, 16), 27]
    for depth, expected in ((2, 0.39e6), (9, 36e6), (15, 166e6), (27, 967e6)):
        with torch.device("meta"):
            N = DiT(ModelConfig(depth=depth, width=sizes[depth], **FAMILY_CONFIG["paper"]), **FAMILY_INPUT["paper"]).count_parameters()
        assert N["blocks"] == pytest.approx(expected, rel=0.02)
    assert len(model_table("paper").splitlines()) == 16


@pytest.mark.parametrize("arch", ARCHS)
def test_it_starts_at_the_expected_loss(arch):
    """The output is zero at the start, so the loss is E[(eps - x)^2] = 1 + E[x^2]."""
    model = DiT(ModelConfig(arch, depth=1, width=16), size=8)
    x, t, text, mask = inputs(model, 256)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert model(x, t, text, mask).abs().max() == 0
        loss = flow.loss_per_image(model, 0.5 * x, eps, t, text, mask).mean()
    assert loss == pytest.approx(1.25, rel=0.03) and loss == pytest.approx(flow.expected_start_loss(0.5 * x).item(), rel=0.03)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_parameter_is_trained(arch, bfloat16):
    """All have a gradient (else DistributedDataParallel waits for it in vain), and it is zero only where SD3's is too."""
    model = awake(DiT(ModelConfig(arch)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model(*inputs(model)).square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert idle == (["blocks.1.text.attention.q_norm.weight"] if arch == "mmdit" else [])


@pytest.mark.parametrize("arch", ARCHS)
def test_a_padded_caption_is_the_unpadded_one(arch):
    short, long = (awake(DiT(ModelConfig(arch), text_tokens=S)) for S in (5, 16))
    long.load_state_dict(short.state_dict())
    x, t, text, _ = inputs(short)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    padded = torch.cat([text, torch.full((2, 11, 32), float("nan") if arch != "incontext" else 9.0)], dim=1)
    with torch.no_grad():
        one, two = short(x, t, text, mask), long(x, t, padded, torch.nn.functional.pad(mask, (0, 11)))
    assert one.std() > 0.01 and (one - two).abs().max() < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_captions_are_told_apart(arch):
    """After a few steps on random images, other captions, or none, give other outputs; in a batch each image has its own."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(arch, depth=1, width=32), size=8)
    x, t, text, mask = inputs(model, 16)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01))
    for _ in range(6):
        (model(x, t, text, mask) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        v, none = model(x, t, text, mask), model(x, t, text, torch.zeros_like(mask))
        assert (v - model(x, t, text.roll(1, 0), mask.roll(1, 0))).abs().mean() > 1e-3 * v.abs().mean()
        assert torch.isfinite(none).all() and (v - none).abs().mean() > 1e-3 * v.abs().mean()
        alone = model(x[:1], t[:1], text[:1], mask[:1])
    assert (alone - v[:1]).abs().max() < 1e-5


@pytest.mark.parametrize("arch", ARCHS)
def test_masked_text_is_not_seen_and_unmasked_text_is(arch):
    model = awake(DiT(ModelConfig(arch)).double())
    x, t, text, mask = inputs(model)
    x, t, text = x.double(), t.double(), text.double()
    other = text + torch.randn_like(text)
    changed = torch.where(mask[..., None], text, other)
    assert torch.equal(model(x, t, text, mask), model(x, t, changed, mask))
    assert (model(x, t, text, mask) - model(x, t, other, mask)).abs().max() > 1e-3
    none = torch.zeros_like(mask)                          # no real token: the unconditional model, whatever the text was
    assert torch.isfinite(model(x, t, text, none)).all() and torch.equal(model(x, t, text, none), model(x, t, other, none))
    assert (model(x, t, text, none) - model(x, t, text, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("arch", ARCHS)
def test_time_and_place_matter(arch):
    model = awake(DiT(ModelConfig(arch)))
    x, t, text, mask = inputs(model)
    assert (model(x, t, text, mask) - model(x, 1 - t, text, mask)).abs().max() > 1e-3
    rolled = model(x.roll(4, -1), t, text, mask)
    assert (rolled - model(x, t, text, mask).roll(4, -1)).abs().max() > 1e-3  # patches know where they are


@pytest.mark.parametrize("arch", ARCHS)
def test_mup_rates(arch):
    model = DiT(ModelConfig(arch, width=128))
    hidden, other = model.parameter_groups(0.01)
    assert hidden["lr"] == pytest.approx(0.01 * MUP_BASE_WIDTH / 128) and other["lr"] == 0.01
    fan_in = {p.shape[1] for p in hidden["params"]}
    assert fan_in == {128, 512}
    # By rule, not by name: a matrix is hidden where a model of twice the width has twice the inputs there.
    wide = dict(DiT(ModelConfig(arch, width=256)).named_parameters())
    grows = {name for name, p in model.named_parameters() if p.ndim == 2 and "table" not in name and wide[name].shape[1] > p.shape[1]}
    assert {id(p) for p in hidden["params"]} == {id(p) for name, p in model.named_parameters() if name in grows}
    assert len(hidden["params"]) + len(other["params"]) == len(list(model.parameters()))
    (everything,) = DiT(ModelConfig(arch, width=128, parametrization="sp")).parameter_groups(0.01)
    assert everything["lr"] == 0.01


def changes(arch, parametrization, width, seed=0, steps=8, lr=0.006):
    """How far Adam moves activations on one fixed random batch: {part: root mean square of now - start, after each step}.

    The parts are the output of each block and of the head; numbers at which nothing has moved yet (the head starts at zero, so
    for a step nothing behind it learns) are left out.
    """
    torch.manual_seed(seed)
    model = DiT(ModelConfig(arch, 2, width, parametrization=parametrization), size=8, text_tokens=8)
    x, t, text, mask = inputs(model, 8, seed=1)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    now, found = {}, {}
    for name, module in [*((f"block {k + 1}", block) for k, block in enumerate(model.blocks)), ("head", model.head)]:
        module.register_forward_hook(lambda module, given, out, name=name: now.update({name: (out[0] if isinstance(out, tuple) else out).detach()}))
    optimizer = torch.optim.AdamW(model.parameter_groups(lr), betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps + 1):
        loss = flow.loss_per_image(model, x, eps, t, text, mask).mean()
        start = dict(now) if step == 0 else start
        for name in now:
            moved = (now[name] - start[name]).square().mean().sqrt().item()
            found.setdefault(name, []).extend([moved] if moved else [])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def slopes(arch, parametrization, widths, seeds=(0, 1)):
    """d ln(change) / d ln(width) for each part and step, fitted over the widths: {part: [slope after each step]}."""
    logs = [[changes(arch, parametrization, width, seed) for seed in seeds] for width in widths]
    x = torch.tensor([math.log(width) for width in widths], dtype=torch.float64)
    x = x - x.mean()
    return {name: [float(x @ torch.tensor([sum(math.log(run[name][k]) for run in runs) / len(runs) for runs in logs], dtype=torch.float64) / (x @ x))
                   for k in range(len(logs[0][0][name]))] for name in logs[0][0]}


@pytest.mark.parametrize("widths", [(32, 64, 128, 256), pytest.param((32, 64, 128, 256, 512), marks=pytest.mark.slow)], ids=["256", "512"])
@pytest.mark.parametrize("arch", ARCHS)
def test_coordinate_check(arch, widths):
    """Under mup the first steps change activations by the same at every width; at one rate for all they grow with it.

    The first change is exact theory: slope 0 under mup, 1 at one rate. Later the models, which learn at their own speeds, part a little.
    """
    mup, sp = slopes(arch, "mup", widths), slopes(arch, "sp", widths)
    assert all(abs(values[0]) < 0.1 and max(map(abs, values)) < 0.25 for values in mup.values()), mup
    assert all(values[0] > 0.6 for values in sp.values()), sp


@pytest.mark.parametrize("wrong, flag", [(dict(width=30), "--head_dim"), (dict(depth=0), "--depth"), (dict(width=6, head_dim=2), "--width")])
def test_impossible_sizes_are_refused(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        ModelConfig(**wrong)


def test_the_family_of_an_unknown_arch_is_refused():
    assert len({model_table("quick", arch) for arch in ARCHS}) == 3
    wrong = subprocess.run([sys.executable, "model.py", "unet"], capture_output=True, text=True, cwd=ROOT)
    assert wrong.returncode == 2 and wrong.stderr == "model.py: unet: is none of incontext, cross, mmdit\n"


@pytest.mark.parametrize("arch", ARCHS)
def test_wrong_input_is_refused(arch):
    with pytest.raises(ValueError, match="--arch unet"):
        ModelConfig("unet")
    with pytest.raises(ValueError, match="--patch"):
        DiT(ModelConfig(patch=3))
    model = DiT(ModelConfig(arch))
    x, t, text, mask = inputs(model)
    with pytest.raises(ValueError, match="text"):
        model(x, t, text[..., :5], mask)
    with pytest.raises(ValueError, match="text"):
        model(x, t, text[:, :5], mask[:, :5])
    with pytest.raises(ValueError, match="text_mask"):
        model(x, t, text, mask[:, :3])
    with pytest.raises(ValueError, match="text_mask"):
        model(x, t, text, mask[:1])
