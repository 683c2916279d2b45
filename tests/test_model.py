import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import FAMILY_CONFIG, FAMILY_INPUT, MUP_BASE_WIDTH, DiT, ModelConfig, family, model_table


def inputs(model, B=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, model.channels, model.size, model.size, generator=g)
    text = torch.randn(B, model.text_tokens, model.text_dim, generator=g)
    return x, torch.rand(B, generator=g), text, torch.rand(B, model.text_tokens, generator=g) < 0.7


def awake(model, seed=0):
    """A model whose output is not zero: at the start the head hides everything behind it."""
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.head.weight, std=0.1)
    return model


SHAPES = [
    (dict(depth=2, width=32), dict(channels=3, size=16, text_tokens=16, text_dim=64)),
    (dict(depth=3, width=48, head_dim=16, qk_norm=False), dict(channels=4, size=8, text_tokens=5, text_dim=12)),
    (dict(depth=1, width=64, patch=4, parametrization="sp"), dict(channels=1, size=28, text_tokens=1, text_dim=7)),
]


@pytest.mark.parametrize("config, shape", SHAPES)
@pytest.mark.parametrize("B", [1, 3])
def test_forward_flops_equal_torchs_counter(config, shape, B):
    model = DiT(ModelConfig(**config), **shape)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs(model, B))
    assert counter.get_total_flops() == B * sum(model.count_flops().values())
    assert model.flops_per_image() == 3 * sum(model.count_flops().values())


def test_6nd_and_exact_differ_by_attention_in_the_blocks():
    """PAPER.md: the blocks' exact count is 6ND (1 + n / (6 width)) for weights alone."""
    model = DiT(ModelConfig(depth=3, width=192, head_dim=64), **FAMILY_INPUT["paper"])
    flops, n = model.count_flops(), sum(model.tokens().values())
    blocks = 3 * sum(flops[part] for part in ("attention projections", "attention", "mlp"))
    weights = sum(p.numel() for name, p in model.blocks.named_parameters() if p.ndim == 2)
    assert blocks == pytest.approx(6 * weights * n * (1 + n / (6 * 192)), rel=1e-12)


@pytest.mark.parametrize("config, shape", SHAPES)
def test_parameters_by_group_sum_to_the_total(config, shape):
    model = DiT(ModelConfig(**config), **shape)
    N = model.count_parameters()
    assert N["blocks"] + N["embedding"] + N["head"] == N["total"] == sum(p.numel() for p in model.parameters())
    assert N["blocks"] == sum(p.numel() for p in model.blocks.parameters())


def test_the_papers_family_brackets_its_optima():
    """12 L width^2 is 0.39M at 2 layers, 36M at 9, 166M at 15, 967M at 27 (PAPER.md); biases and norms add little."""
    sizes = dict(family("paper"))
    assert sorted(sizes) == [*range(2, 16), 27]
    for depth, expected in ((2, 0.39e6), (9, 36e6), (15, 166e6), (27, 967e6)):
        with torch.device("meta"):
            N = DiT(ModelConfig(depth=depth, width=sizes[depth], **FAMILY_CONFIG["paper"]), **FAMILY_INPUT["paper"]).count_parameters()
        assert N["blocks"] == pytest.approx(expected, rel=0.02)
    assert len(model_table("paper").splitlines()) == 16


def test_output_is_zero_at_the_start():
    model = DiT(ModelConfig())
    assert model(*inputs(model)).abs().max() == 0


def test_masked_text_is_not_seen_and_unmasked_text_is():
    model = awake(DiT(ModelConfig()).double())
    x, t, text, mask = inputs(model)
    x, t, text = x.double(), t.double(), text.double()
    other = text + torch.randn_like(text)
    changed = torch.where(mask[..., None], text, other)
    assert torch.equal(model(x, t, text, mask), model(x, t, changed, mask))
    assert (model(x, t, text, mask) - model(x, t, other, mask)).abs().max() > 1e-3
    assert torch.isfinite(model(x, t, text, torch.zeros_like(mask))).all()  # unconditional


def test_time_and_place_matter():
    model = awake(DiT(ModelConfig()))
    x, t, text, mask = inputs(model)
    assert (model(x, t, text, mask) - model(x, 1 - t, text, mask)).abs().max() > 1e-3
    rolled = model(x.roll(4, -1), t, text, mask)
    assert (rolled - model(x, t, text, mask).roll(4, -1)).abs().max() > 1e-3  # patches know where they are


def test_mup_rates():
    model = DiT(ModelConfig(width=128))
    hidden, other = model.parameter_groups(0.01)
    assert hidden["lr"] == pytest.approx(0.01 * MUP_BASE_WIDTH / 128) and other["lr"] == 0.01
    fan_in = {p.shape[1] for p in hidden["params"]}
    assert fan_in == {128, 512}
    assert all(p.ndim == 1 or p.shape[1] not in (128, 512) for p in other["params"])
    assert len(hidden["params"]) + len(other["params"]) == len(list(model.parameters()))
    (everything,) = DiT(ModelConfig(width=128, parametrization="sp")).parameter_groups(0.01)
    assert everything["lr"] == 0.01


@pytest.mark.parametrize("wrong, flag", [(dict(width=30), "--head_dim"), (dict(depth=0), "--depth"), (dict(width=6, head_dim=2), "--width")])
def test_impossible_sizes_are_refused(wrong, flag):
    with pytest.raises(ValueError, match=flag):
        ModelConfig(**wrong)


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="--patch"):
        DiT(ModelConfig(patch=3))
    model = DiT(ModelConfig())
    x, t, text, mask = inputs(model)
    with pytest.raises(ValueError, match="text"):
        model(x, t, text[..., :5], mask)
    with pytest.raises(ValueError, match="text_mask"):
        model(x, t, text, mask[:, :3])
