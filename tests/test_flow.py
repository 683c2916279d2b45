import math

import pytest
import torch

import flow


def gaussian_field(s):
    """The optimal v for data N(0, s^2): E[eps - x | x_t] (PAPER.md)."""
    def v(x_t, t, text=None, text_mask=None):
        t = flow.per_image(t, x_t)
        return (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t * t) * x_t
    return v


@pytest.mark.parametrize("s, sampling, floor", [(1, "logit_normal", 1.7413), (0.5, "logit_normal", 0.8111),
                                                (1, "uniform", math.pi / 2), (0.5, "uniform", 0.7854)])
def test_loss_of_the_optimal_field_is_the_closed_form(s, sampling, floor):
    n, g = 200_000, torch.Generator().manual_seed(0)
    x, eps = s * torch.randn(n, 4, generator=g), torch.randn(n, 4, generator=g)
    t = flow.stratified_times(torch.arange(n), n, torch.rand(n, generator=g), sampling)
    losses = flow.loss_per_image(gaussian_field(s), x, eps, t, None, None)
    mean, error = flow.mean_and_standard_error(losses)
    assert error < 0.006
    assert mean == pytest.approx(floor, abs=4 * error)
    # and the expectation itself, without noise: s^2 / V(t)
    middle = flow.stratified_times(torch.arange(n), n, torch.full((n,), 0.5), sampling).double()
    assert (s * s / ((1 - middle) ** 2 * s * s + middle ** 2)).mean().item() == pytest.approx(floor, abs=1e-4)


def test_a_wrong_field_is_worse():
    n, g = 50_000, torch.Generator().manual_seed(0)
    x, eps, t = torch.randn(n, 4, generator=g), torch.randn(n, 4, generator=g), torch.rand(n, generator=g)
    right = flow.loss_per_image(gaussian_field(1), x, eps, t, None, None).mean()
    wrong = flow.loss_per_image(lambda *a: -gaussian_field(1)(*a), x, eps, t, None, None).mean()
    assert wrong > right + 0.1


def test_loss_of_a_zero_output_is_one_plus_the_second_moment():
    g = torch.Generator().manual_seed(0)
    x = 0.3 + 0.5 * torch.randn(4000, 3, 8, 8, generator=g)  # not of mean zero
    losses = flow.loss_per_image(lambda x_t, *_: torch.zeros_like(x_t), x, torch.randn(x.shape, generator=g), torch.rand(4000), None, None)
    mean, error = flow.mean_and_standard_error(losses)
    assert mean == pytest.approx(flow.expected_start_loss(x).item(), abs=4 * error)
    assert flow.expected_start_loss(x).item() == pytest.approx(1 + 0.09 + 0.25, abs=0.01)


def test_times_are_stratified_and_logit_normal():
    n = 1000
    t = flow.stratified_times(torch.randperm(n), n, torch.rand(n))
    uniform = torch.special.ndtr(torch.logit(t.double())).sort().values       # back to where each was drawn
    assert ((uniform - (torch.arange(n) + 0.5) / n).abs() <= 0.51 / n).all()  # one in each slice
    assert torch.logit(t.double()).mean().abs() < 0.01 and torch.logit(t.double()).std() == pytest.approx(1, abs=0.02)
    edges = flow.stratified_times(torch.tensor([0, n - 1]), n, torch.tensor([0.0, 1.0]))
    assert torch.isfinite(edges).all() and edges.min() >= 0 and edges.max() <= 1


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_samplers_converge_at_their_order(solver, order):
    """For Gaussian data the flow multiplies noise by s; the error must fall as 2^-order when steps double."""
    s, eps = 0.5, torch.randn(64, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = [(flow.sample(gaussian_field(s), eps, None, None, steps, solver) - s * eps).abs().max().item() for steps in (32, 64)]
    assert errors[1] < (0.1 if solver == "euler" else 0.005)
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="rk99"):
        flow.sample(gaussian_field(1), torch.randn(1, 3, 2, 2), None, None, solver="rk99")


def conditional(x_t, t, text, text_mask):
    return x_t * 0.1 + (text.mean((1, 2)) * text_mask.any(1))[:, None, None, None] * torch.arange(1.0, 5.0).view(1, 4, 1, 1)


def test_guidance_on_every_channel():
    g = torch.Generator().manual_seed(0)
    x, t, text = torch.randn(3, 4, 2, 2, generator=g), torch.rand(3, generator=g), torch.randn(3, 5, 6, generator=g)
    mask = torch.ones(3, 5, dtype=torch.bool)
    one = flow.guided(conditional, 1)(x, t, text, mask)
    assert torch.equal(one, conditional(x, t, text, mask))                 # to the bit, on all channels
    uncond = conditional(x, t, text, torch.zeros_like(mask))
    for s in (0.0, 3.0):
        torch.testing.assert_close(flow.guided(conditional, s)(x, t, text, mask), uncond + s * (one - uncond))
    assert ((flow.guided(conditional, 3.0)(x, t, text, mask) - one).abs().amax((0, 2, 3)) > 1e-3).all()


def test_loss_by_time():
    assert flow.loss_by_time(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.05, 0.01, 1.0]), bins=10) == [2.0] + [None] * 8 + [5.0]


def test_standard_error_is_that_of_the_mean():
    g = torch.Generator().manual_seed(0)
    means = torch.tensor([flow.mean_and_standard_error(torch.randn(100, generator=g)) for _ in range(400)])
    assert means[:, 0].std().item() == pytest.approx(means[:, 1].mean().item(), rel=0.1)


# ---- exact likelihood and the VLB --------------------------------------------------------------------------------------

def log_normal(x, s):
    """log N(x; 0, s^2), (B,)."""
    return -0.5 * (x.square().sum(1) / s ** 2) - x.shape[1] * (math.log(s) + 0.5 * math.log(2 * math.pi))


@pytest.mark.parametrize("dims, s", [(1, 0.3), (6, 0.75), (64, 0.5)])
@pytest.mark.parametrize("probes", [None, 1])
def test_likelihood_of_gaussians_is_exact_and_of_order_two(dims, s, probes):
    """A linear field's probes have no noise, so one will do; the sign of the divergence decides all."""
    x = s * torch.randn(5, dims, generator=torch.Generator().manual_seed(dims), dtype=torch.float64)
    exact, errors = log_normal(x, s), []
    for steps in (64, 128, 256):
        nats, standard_error, evaluations = flow.log_likelihood(gaussian_field(s), x, None, None, steps, probes)
        assert nats.shape == standard_error.shape == (5,) and evaluations == 2 * steps
        errors.append((nats - exact).abs().max().item())
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5 and errors[2] < 1e-4 * dims
    x_1 = x / s   # where the exact flow takes x; with a minus sign the answer would be this, far away
    assert (log_normal(x_1, 1) + dims * math.log(s) - exact).abs().max() > 0.4 * dims


def curved_field(x_t, t, text=None, text_mask=None):
    """A field whose Jacobian is full, not symmetric and depends on x: so is its divergence."""
    mix = torch.linspace(-1, 1, 64, dtype=x_t.dtype).view(8, 8).sin() + torch.eye(8, dtype=x_t.dtype)
    return torch.tanh(x_t @ mix.T) * x_t.flip(1) + flow.per_image(t, x_t) * x_t


def test_probes_are_unbiased_and_say_how_noisy_they_are():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact, none, _ = flow.log_likelihood(curved_field, x, None, None, 16, probes=None)
    traces = [torch.autograd.functional.jacobian(lambda y: curved_field(y[None], torch.zeros(1))[0], one).trace() for one in x]
    assert (none == 0).all() and min(abs(a - b) for a, b in zip(traces, traces[1:])) > 0.1       # the divergence depends on x
    for probes in (1, 4):
        drawn = [flow.log_likelihood(curved_field, x, None, None, 16, probes, seed)[:2] for seed in range(200)]
        values, said = torch.stack([nats for nats, _ in drawn]), torch.stack([error for _, error in drawn])
        spread = values.std(0)
        assert spread.min() > 0.01
        assert ((values.mean(0) - exact).abs() < 3 * spread / 200 ** 0.5).all()
        assert said.square().mean(0).sqrt() == pytest.approx(spread, rel=0.25)
    drawn = [flow.log_likelihood(curved_field, x / 4, None, None, 3, 1, seed)[:2] for seed in range(400)]   # few steps: the ends count
    values, said = torch.stack([nats for nats, _ in drawn]), torch.stack([error for _, error in drawn])
    assert said.square().mean(0).sqrt() == pytest.approx(values.std(0), rel=0.25)
    one, two = (flow.log_likelihood(curved_field, x, None, None, 16, 1, seed)[0] for seed in (0, 0))
    assert torch.equal(one, two)


def test_a_fresh_probe_beats_a_frozen_one():
    """PAPER.md: a 64-dimensional linear field, 44 evaluations: standard deviation 1.2, against 8 to 10 with one frozen probe."""
    g = torch.Generator().manual_seed(0)
    A = torch.randn(64, 64, generator=g, dtype=torch.float64) / 8

    def linear(x_t, t, text=None, text_mask=None):
        return x_t @ A.T
    x = torch.randn(1, 64, generator=g, dtype=torch.float64)
    fresh = torch.stack([flow.log_likelihood(linear, x, None, None, 22, 1, seed)[0] for seed in range(60)]).std()
    symmetric = (A + A.T) / 2
    frozen = (2 * (symmetric.square().sum() - symmetric.diag().square().sum())).sqrt()   # of e^T A e for one e, at all times
    assert fresh < frozen / 3 and frozen > 5


def mixture_field(x_t, t, text=None, text_mask=None, means=((-0.8, 0.1), (0.5, 0.6), (0.4, -0.7)), weights=(0.5, 0.2, 0.3), s=0.25):
    """The optimal v for a mixture of Gaussians: the mean of the components' own fields, by how likely each made x_t."""
    means, t = torch.tensor(means, dtype=x_t.dtype), t[:, None]
    V = (1 - t) ** 2 * s * s + t * t                                                         # (B, 1)
    away = x_t[:, None] - (1 - t)[:, None] * means                                           # (B, components, 2)
    share = (torch.tensor(weights, dtype=x_t.dtype).log() - away.square().sum(2) / (2 * V)).softmax(1)[..., None]
    field = (t - (1 - t) * s * s)[:, None] / V[:, None] * away - means
    return (share * field).sum(1)


def test_the_likelihood_of_a_mixture_integrates_to_one():
    side, edge = 81, 2.0
    axis = torch.linspace(-edge, edge, side, dtype=torch.float64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    nats, *_ = flow.log_likelihood(mixture_field, x, None, None, 64, probes=None)
    assert (nats.exp().sum() * (2 * edge / (side - 1)) ** 2).item() == pytest.approx(1, abs=0.005)
    means, weights = torch.tensor([(-0.8, 0.1), (0.5, 0.6), (0.4, -0.7)]).double(), torch.tensor([0.5, 0.2, 0.3]).double()
    squares = (x[:, None] - means).square().sum(2) / 0.25 ** 2
    exact = torch.logsumexp(weights.log() - squares / 2, 1) - math.log(2 * math.pi * 0.25 ** 2)
    likely = exact > -8
    assert (nats - exact)[likely].abs().max() < 0.05


def even_normal(shape, generator, dtype):
    """In the place of torch.randn: normal numbers (n, 1) of exactly the right distribution over the first half of a batch, in
    random order, and their negatives over the second: with the same x in both halves, products with x cancel."""
    half = shape[0] // 2
    eps = torch.special.ndtri((torch.randperm(half, generator=generator).to(dtype) + 0.5) / half)[:, None]
    return torch.cat([eps, -eps]) / eps.square().mean().sqrt()


@pytest.mark.parametrize("s, entropy", [(0.3, 0.214966), (1, 1.418939), (1.7, 1.949567)])
def test_vlb_of_the_optimal_field_is_the_entropy(s, entropy, monkeypatch):
    """PAPER.md, per dimension, at t0 = 1e-4, to 1e-4: with even draws of x and eps, which leave hardly any noise."""
    monkeypatch.setattr(torch, "randn", even_normal)
    n = 20_000
    x = s * even_normal((n, 1), torch.Generator().manual_seed(0), torch.float64).abs()   # halves alike; the bound sees x^2 only
    bound = flow.vlb(gaussian_field(s), x, None, None, times=1024, t0=1e-4)
    assert bound["nats"].mean().item() == pytest.approx(entropy, abs=1e-4)
    assert (bound["prior"] == 0).all() and (bound["t0"], bound["t1"]) == (1e-4, 1.0)
    assert torch.allclose(bound["prior"] + bound["diffusion"] + bound["reconstruction"], bound["nats"])
    early = flow.vlb(gaussian_field(s), x, None, None, times=1024, t0=1e-4, t1=0.9)     # the prior takes over what is cut
    assert (early["prior"] > 0).any() and entropy < early["nats"].mean() < entropy + 0.02
    wrong = flow.vlb(lambda x_t, t, *_: gaussian_field(s)(x_t, t) + 0.3, x, None, None, t0=1e-4)
    assert wrong["nats"].mean() > entropy + 0.5
    with pytest.raises(ValueError, match="t0"):
        flow.vlb(gaussian_field(s), x, None, None, t0=0)


def test_the_vlb_does_not_bound_the_likelihood_of_the_ode():
    """PAPER.md's counterexample: s = 0.5, the optimal field plus 0.5 x for t in [0.8, 1]. The field is linear, so both are
    closed integrals: E[-log p_ODE] - entropy = 0.0107 lies above VLB - entropy = 0.0044."""
    s = 0.5

    def v(x_t, t, text=None, text_mask=None):
        return gaussian_field(s)(x_t, t) + 0.5 * x_t * (flow.per_image(t, x_t) >= 0.8)
    n, entropy = 4000, 0.5 * math.log(2 * math.pi * math.e * s * s)
    x = s * even_normal((n, 1), torch.Generator(), torch.float64)
    nats, *_ = flow.log_likelihood(v, x, None, None, 2000, probes=None)
    assert -nats.mean().item() - entropy == pytest.approx(0.0107, abs=3e-4)
    optimal = flow.vlb(gaussian_field(s), x, None, None, times=2048, t0=1e-4)
    wrong = flow.vlb(v, x, None, None, times=2048, t0=1e-4)                              # the same times and noises
    gap, error = flow.mean_and_standard_error(wrong["nats"] - optimal["nats"])
    assert error < 2e-4 and gap == pytest.approx(0.0044, abs=4 * error + 5e-5)


def test_bits_per_dim_bounds_the_bits_of_the_levels():
    """A uniform density over the 256 levels costs 8 bits a dimension; where p varies within a cell, more than its levels do."""
    assert flow.bits_per_dim(torch.tensor(12 * math.log(2.0)), 12).item() == pytest.approx(8)       # p = 2^-1 on [-1, 1)
    assert flow.bits_per_dim(torch.tensor(12 * math.log(2.0)), 12, pixels=False).item() == pytest.approx(1)
    k = torch.arange(256).double()
    edges = torch.special.ndtr((torch.arange(257).double() / 128 - 1) / 0.02)
    of_levels = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    u = torch.rand(2000, 256, generator=torch.Generator().manual_seed(0)).double()
    x = ((k + u) / 128 - 1).reshape(-1, 1)
    bits = flow.bits_per_dim(-log_normal(x, 0.02), 1).view(2000, 256).mean(0)
    real = of_levels > 1e-6
    exact = -of_levels[real].log2()
    assert (bits[real] > exact - 1e-3).all() and (of_levels[real] * (bits[real] - exact)).sum() > 0.005
