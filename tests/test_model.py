import dataclasses
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import flow
from model import (ARCHITECTURES, FAMILY_CONFIG, FAMILY_INPUT, MUP_BASE_WIDTH, DiT, ModelConfig,
                   family)

ARCHS = tuple(ARCHITECTURES)
ROOT = Path(__file__).parent.parent
each_arch = pytest.mark.parametrize("arch", ARCHS)


def inputs(model, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, model.channels, model.size, model.size, generator=g)
    text = torch.randn(B, model.text_tokens, model.text_dim, generator=g)
    t = torch.rand(B, generator=g)
    return x, t, text, torch.rand(B, model.text_tokens, generator=g) < 0.7


def awake(model, seed=0):
    """A model without zeros: at the start the head hides all behind it, the gates every branch."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def without_memory(arch, name, depth, width):
    with torch.device("meta"):
        config = ModelConfig(arch, depth, width, **FAMILY_CONFIG[name])
        return DiT(config, **FAMILY_INPUT[name])


def far(one, other):
    return (one - other).abs().max() > 1e-3


# ---- counts --------------------------------------------------------------------------------------

SHAPES = [
    (dict(depth=2, width=32), dict(channels=3, size=16, text_tokens=16, text_dim=64)),
    (dict(depth=3, width=48, head_dim=16, qk_norm=False),
     dict(channels=4, size=8, text_tokens=5, text_dim=12)),
    (dict(depth=1, width=64, patch=4, parametrization="sp"),
     dict(channels=1, size=28, text_tokens=1, text_dim=7)),
]


@each_arch
@pytest.mark.parametrize("config, shape", SHAPES)
@pytest.mark.parametrize("B, real", [(1, None), (3, None), (2, True), (2, False)])
def test_flops_are_those_of_a_forward_pass_whatever_the_captions(arch, config, shape, B, real):
    """real: which words of the captions are: some, all or none."""
    model = DiT(ModelConfig(arch, **config), **shape)
    x, t, text, mask = inputs(model, B)
    mask = mask if real is None else torch.full_like(mask, real)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x, t, text, mask)
    assert model.flops_per_image() * B == 3 * counter.get_total_flops()
    tokens = sum(model.tokens().values())
    assert model.flops_per_image("6nd") == 6 * model.count_parameters()["blocks"] * tokens


@pytest.mark.parametrize("arch, name, depth, width, flops", [
    ("incontext", "quick", 1, 16, 3024576), ("incontext", "quick", 4, 64, 116812800),
    ("incontext", "paper", 2, 128, 1182707712), ("incontext", "paper", 27, 1728, 2001963174912),
    ("cross", "quick", 1, 16, 2689536), ("cross", "quick", 4, 64, 108208128),
    ("cross", "paper", 2, 128, 1049395200), ("cross", "paper", 27, 1728, 1856734617600),
    ("mmdit", "quick", 1, 16, 2775552), ("mmdit", "quick", 4, 64, 112754688),
    ("mmdit", "paper", 2, 128, 1112927232), ("mmdit", "paper", 27, 1728, 1989146149632),
])
def test_flops_are_the_numbers_counted_by_hand(arch, name, depth, width, flops):
    """By the formulas of the first edition. A budget means the same with every version of torch."""
    before = torch.get_rng_state()
    assert without_memory(arch, name, depth, width).flops_per_image() == flops
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("arch", ["incontext", "cross", "mmdit"])
def test_published_records_have_our_counts(arch):
    runs = sorted((ROOT / f"results/arch/arch_{arch}").glob("depth*_seed0"))
    assert len(runs) >= 5
    for run in runs:
        saved = json.loads((run / "config.json").read_text())["model"]
        with torch.device("meta"):
            model = DiT(ModelConfig(**saved), **FAMILY_INPUT["quick"])
        N, exact, rough = model.count_parameters(), *map(model.flops_per_image, ("exact", "6nd"))
        for point in run.glob("budget_*/result.json"):
            record = json.loads(point.read_text())
            assert record["C"] == record["images"] * exact
            assert record["C_6nd"] == record["images"] * rough
            assert (record["N_blocks"], record["N_total"]) == (N["blocks"], N["total"])


def test_6nd_and_exact_differ_by_attention_in_the_blocks():
    """PAPER.md: the blocks' exact count is 6ND (1 + n / (6 width)) for weights alone."""
    W, depth = 192, 3
    model = DiT(ModelConfig(depth=depth, width=W, head_dim=64), **FAMILY_INPUT["paper"])
    n, (I, S, _) = sum(model.tokens().values()), model.tokens().values()
    weights = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    ends = I * 4 * 4 * W * 2 + S * 768 * W + 256 * W + W * W    # patches in and out, words, time
    blocks = model.flops_per_image() - 6 * ends
    assert blocks == pytest.approx(6 * weights * n * (1 + n / (6 * W)), rel=1e-12)


@each_arch
@pytest.mark.parametrize("config, shape", SHAPES)
def test_parameters_by_group_sum_to_the_total(arch, config, shape):
    model = DiT(ModelConfig(arch, **config), **shape)
    N = model.count_parameters()
    assert N["blocks"] + N["embedding"] + N["head"] == N["total"]
    assert N["total"] == sum(p.numel() for p in model.parameters())
    assert N["blocks"] == sum(p.numel() for p in model.blocks.parameters())


def by_part(block, parts):
    """Parameters of a block by part: the first of {part: words} with a word in the name."""
    counts = dict.fromkeys(parts, 0)
    for name, parameter in block.named_parameters():
        part = next(part for part, words in parts.items() if any(word in name for word in words))
        counts[part] += parameter.numel()
    return counts


PARTS = {
    "cross": ({"modulation": ["table"], "cross": ["cross_attention"], "attention": ["attention"],
               "MLP": ["mlp"]},
              {"modulation": ["table"], "cross": ["attn2"], "attention": ["attn1"], "MLP": ["ff"]}),
    "mmdit": ({"modulation": ["modulation"], "QK-norm": ["q_norm", "k_norm"],
               "attention": ["attention"], "MLP": ["mlp"]},
              {"modulation": ["norm1"], "QK-norm": ["norm_"],
               "attention": ["attn"], "MLP": ["ff"]}),
}


@pytest.mark.parametrize("arch, qk_norm", [("cross", False), ("mmdit", False), ("mmdit", True)])
def test_block_stacks_equal_those_of_the_reference_designs(arch, qk_norm):
    """PixArt-alpha's 28 layers of width 1152 and SD3's 24 of width 1536 (SD3 normalises queries and
    keys from 3.5 on), part by part. Beyond the blocks the designs differ."""
    diffusers = pytest.importorskip("diffusers")
    depth, width, head_dim = {"cross": (28, 1152, 72), "mmdit": (24, 1536, 64)}[arch]
    size = dict(num_layers=depth, num_attention_heads=width // head_dim,
                attention_head_dim=head_dim)
    with torch.device("meta"):
        config = ModelConfig(arch, depth, width, head_dim=head_dim, qk_norm=qk_norm)
        ours = DiT(config, channels=4, size=32, text_tokens=120, text_dim=4096)
        if arch == "cross":
            theirs = diffusers.PixArtTransformer2DModel(**size)
        else:
            theirs = diffusers.SD3Transformer2DModel(
                **size, caption_projection_dim=width, qk_norm="rms_norm" if qk_norm else None)
    assert len(theirs.transformer_blocks) == depth
    for block, reference in zip(ours.blocks, theirs.transformer_blocks):
        assert by_part(block, PARTS[arch][0]) == by_part(reference, PARTS[arch][1])
    if arch == "cross":    # PixArt's one modulation, not in a block
        shared = sum(p.numel() for p in theirs.adaln_single.linear.parameters())
        assert shared == sum(p.numel() for p in ours.modulation.parameters())


def test_the_papers_family_brackets_its_optima():
    """12 L width^2 is 0.39M at 2 layers, 36M at 9, 166M at 15, 967M at 27 (PAPER.md); biases and
    norms add little."""
    sizes = dict(family("paper"))
    assert sorted(sizes) == [*range(2, 16), 27]
    for depth, expected in ((2, 0.39e6), (9, 36e6), (15, 166e6), (27, 967e6)):
        N = without_memory("incontext", "paper", depth, sizes[depth]).count_parameters()
        assert N["blocks"] == pytest.approx(expected, rel=0.02)


# ---- what it computes ----------------------------------------------------------------------------

@each_arch
def test_it_starts_at_the_expected_loss(arch):
    """The output is zero at the start, so the loss is E[(eps - x)^2] = 1 + E[x^2]."""
    model = DiT(ModelConfig(arch, depth=1, width=16), size=8)
    x, t, text, mask = inputs(model, 256)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert model(x, t, text, mask).abs().max() == 0
        loss = flow.loss_per_image(model, 0.5 * x, eps, t, text, mask).mean()
    assert loss == pytest.approx(1.25, rel=0.03)
    assert loss == pytest.approx(flow.expected_start_loss(0.5 * x).item(), rel=0.03)


@each_arch
@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_parameter_is_trained(arch, bfloat16):
    """All have a gradient (else DistributedDataParallel waits for it in vain), and it is zero only
    where SD3's is too."""
    model = awake(DiT(ModelConfig(arch)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        model(*inputs(model)).square().mean().backward()
    idle = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert idle == (["blocks.1.text.attention.q_norm.weight"] if arch == "mmdit" else [])


@each_arch
def test_a_padded_caption_is_the_unpadded_one(arch):
    short, long = (awake(DiT(ModelConfig(arch), text_tokens=S)) for S in (5, 16))
    long.load_state_dict(short.state_dict())
    x, t, text, _ = inputs(short)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    padded = torch.cat([text, torch.full((2, 11, 32), float("nan"))], dim=1)
    with torch.no_grad():
        one = short(x, t, text, mask)
        two = long(x, t, padded, torch.nn.functional.pad(mask, (0, 11)))
    assert one.std() > 0.01 and (one - two).abs().max() < 1e-5


@each_arch
def test_captions_are_told_apart(arch):
    """After a few steps on random images, other captions, or none, give other outputs; in a batch
    each image has its own."""
    torch.manual_seed(0)
    model = DiT(ModelConfig(arch, depth=1, width=32), size=8)
    x, t, text, mask = inputs(model, 16)
    optimizer = torch.optim.AdamW(model.parameter_groups(0.01))
    for _ in range(6):
        (model(x, t, text, mask) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        v = model(x, t, text, mask)
        none = model(x, t, text, torch.zeros_like(mask))
        others = model(x, t, text.roll(1, 0), mask.roll(1, 0))
        alone = model(x[:1], t[:1], text[:1], mask[:1])
    assert torch.isfinite(none).all()
    assert min((v - v_other).abs().mean() for v_other in (none, others)) > 1e-3 * v.abs().mean()
    assert (alone - v[:1]).abs().max() < 1e-5


@each_arch
def test_masked_text_is_not_seen_and_unmasked_text_is(arch):
    model = awake(DiT(ModelConfig(arch)).double())
    x, t, text, mask = inputs(model)
    x, t, text = x.double(), t.double(), text.double()
    other = text + torch.randn_like(text)
    changed = torch.where(mask[..., None], text, other)
    v = model(x, t, text, mask)
    assert torch.equal(v, model(x, t, changed, mask)) and far(v, model(x, t, other, mask))
    # No real token: the unconditional model, whatever the text was.
    none = torch.zeros_like(mask)
    unconditional = model(x, t, text, none)
    assert torch.isfinite(unconditional).all() and far(unconditional, v)
    assert torch.equal(unconditional, model(x, t, other, none))


@each_arch
def test_time_and_place_matter(arch):
    model = awake(DiT(ModelConfig(arch)))
    x, t, text, mask = inputs(model)
    v = model(x, t, text, mask)
    assert far(v, model(x, 1 - t, text, mask))
    assert far(v.roll(4, -1), model(x.roll(4, -1), t, text, mask))  # patches know where they are


# ---- roles and rates -----------------------------------------------------------------------------

@each_arch
def test_mup_rates(arch):
    model = DiT(ModelConfig(arch, width=128))
    hidden, other = model.parameter_groups(0.01)
    assert hidden["lr"] == pytest.approx(0.01 * MUP_BASE_WIDTH / 128) and other["lr"] == 0.01
    assert {parameter.shape[1] for parameter in hidden["params"]} == {128, 512}
    # By rule, not by name: a matrix is hidden where a model of twice the width has more inputs.
    wide = dict(DiT(ModelConfig(arch, width=256)).named_parameters())
    grows = {id(p) for name, p in model.named_parameters()
             if p.ndim == 2 and "table" not in name and wide[name].shape[1] > p.shape[1]}
    assert {id(p) for p in hidden["params"]} == grows
    assert len(hidden["params"]) + len(other["params"]) == len(list(model.parameters()))
    config = dataclasses.replace(model.config, parametrization="sp")
    (everything,) = DiT(config).parameter_groups(0.01)
    assert everything["lr"] == 0.01


@each_arch
@pytest.mark.parametrize("parametrization", ["mup", "sp"])
@pytest.mark.parametrize("where, stray, name", [
    ("", torch.nn.Linear(8, 8), "gadget.weight"),
    ("", torch.nn.Parameter(torch.zeros(3)), "gadget"),
    ("blocks.0", torch.nn.LayerNorm(8), "blocks.0.gadget.weight"),
    ("blocks.1", torch.nn.Parameter(torch.zeros(3)), "blocks.1.gadget"),
])
def test_a_parameter_of_unknown_role_is_an_error(arch, parametrization, where, stray, name):
    model = DiT(ModelConfig(arch, parametrization=parametrization))
    setattr(model.get_submodule(where), "gadget", stray)
    for asks in (lambda: model.parameter_groups(0.01), model.initialise):
        with pytest.raises(ValueError, match=f"parameter {name} has no role"):
            asks()
    if not where:
        with pytest.raises(ValueError, match=f"parameter {name}: GROUPS"):
            model.count_parameters()


def output_of(out):
    return (out[0] if isinstance(out, tuple) else out).detach()


def changes(arch, parametrization, width, seed=0, steps=8, lr=0.006):
    """How far Adam moves activations on one fixed random batch, as the root mean square of
    now - start: {part: [after each step]}.

    The parts are the output of each block and of the head; numbers at which nothing has moved yet
    (the head starts at zero, so for a step nothing behind it learns) are left out.
    """
    torch.manual_seed(seed)
    config = ModelConfig(arch, 2, width, parametrization=parametrization)
    model = DiT(config, size=8, text_tokens=8)
    x, t, text, mask = inputs(model, 8, seed=1)
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    parts = {"block 1": model.blocks[0], "block 2": model.blocks[1], "head": model.head}
    now, found = {}, {name: [] for name in parts}
    for name, module in parts.items():
        module.register_forward_hook(
            lambda module, given, out, name=name: now.update({name: output_of(out)}))
    optimizer = torch.optim.AdamW(model.parameter_groups(lr), betas=(0.9, 0.95), weight_decay=0)
    for step in range(steps + 1):
        loss = flow.loss_per_image(model, x, eps, t, text, mask).mean()
        if step == 0:
            start = dict(now)
        for name in parts:
            moved = (now[name] - start[name]).square().mean().sqrt().item()
            if moved:
                found[name].append(moved)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


def slopes(arch, parametrization, widths, seeds=(0, 1)):
    """d ln(change) / d ln(width), fitted over the widths: {part: [after each step]}."""
    runs = {width: [changes(arch, parametrization, width, seed) for seed in seeds]
            for width in widths}
    x = torch.tensor(widths, dtype=torch.float64).log()
    x = x - x.mean()
    found = {}
    for part in runs[widths[0]][0]:
        logs = torch.tensor([[run[part] for run in runs[width]] for width in widths]).double().log()
        found[part] = (x @ logs.mean(1) / (x @ x)).tolist()
    return found


@pytest.mark.parametrize("widths", [
    (32, 64, 128, 256), pytest.param((32, 64, 128, 256, 512), marks=pytest.mark.slow)],
    ids=["256", "512"])
@each_arch
def test_coordinate_check(arch, widths):
    """Under mup the first steps change activations by the same at every width; at one rate for all
    they grow with it.

    The first change is exact theory: slope 0 under mup, 1 at one rate. Later the models, which
    learn at their own speeds, part a little.
    """
    mup, sp = slopes(arch, "mup", widths), slopes(arch, "sp", widths)
    for values in mup.values():
        assert abs(values[0]) < 0.1 and max(map(abs, values)) < 0.25, mup
    assert all(values[0] > 0.6 for values in sp.values()), sp


# ---- refusals ------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, flag", [
    (dict(arch="unet"), "--arch unet: is none of incontext, cross, mmdit"),
    (dict(width=30), "--head_dim"), (dict(depth=0), "--depth"), (dict(aspect=0), "--aspect"),
    (dict(patch=0), "--patch"), (dict(head_dim=0), "--head_dim"), (dict(width=-8), "--width"),
    (dict(width=6, head_dim=2), "--width"), (dict(patch=3), "--patch"),
])
def test_impossible_sizes_are_refused(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        DiT(ModelConfig(**wrong))


@each_arch
def test_wrong_input_is_refused(arch):
    model = DiT(ModelConfig(arch))
    x, t, text, mask = inputs(model)
    for wrong_text, wrong_mask in ((text[..., :5], mask), (text[:, :5], mask[:, :5]),
                                   (text, mask[:, :3]), (text, mask[:1])):
        with pytest.raises(ValueError, match="text .* text_mask"):
            model(x, t, wrong_text, wrong_mask)


@pytest.mark.parametrize("given, status, said", [
    ("--help", None, "python model.py [ARCH ...]"), ("cross", None, "   2   128     529,152"),
    ("unet", 2, "model.py: unet: is none of incontext, cross, mmdit\n")])
def test_the_command_prints_the_families(given, status, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["model.py", given])
    try:
        runpy.run_path(str(ROOT / "model.py"), run_name="__main__")
        assert status is None
    except SystemExit as stop:
        assert stop.code == status
    out, err = capsys.readouterr()
    assert said == err if status == 2 else said in out
