import math

import pytest
import torch

import flow


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gaussian_field(s):
    """The optimal v for data N(0, s^2): E[eps - x | x_t] (PAPER.md)."""
    def v(x_t, t, text=None, text_mask=None):
        t = flow.per_image(t, x_t)
        return (t - (1 - t) * s * s) / ((1 - t) ** 2 * s * s + t * t) * x_t
    return v


# ---- loss and times ------------------------------------------------------------------------------

@pytest.mark.parametrize("s, sampling, floor", [
    (1, "logit_normal", 1.7413), (0.5, "logit_normal", 0.8111),
    (1, "uniform", math.pi / 2), (0.5, "uniform", 0.7854)])
def test_loss_of_the_optimal_field_is_the_closed_form(s, sampling, floor):
    n = 200_000
    x, eps = s * normal(n, 4), normal(n, 4, seed=1)
    jitter = torch.rand(n, generator=torch.Generator().manual_seed(2))
    t = flow.stratified_times(torch.arange(n), n, jitter, sampling)
    losses = flow.loss_per_image(gaussian_field(s), x, eps, t, None, None)
    mean, error = flow.mean_and_standard_error(losses)
    assert error < 0.006
    assert mean == pytest.approx(floor, abs=4 * error)
    # and the expectation itself, without noise: s^2 / V(t)
    middle = flow.stratified_times(torch.arange(n), n, torch.full((n,), 0.5), sampling).double()
    exact = s * s / ((1 - middle) ** 2 * s * s + middle ** 2)
    assert exact.mean().item() == pytest.approx(floor, abs=1e-4)


def test_a_wrong_field_is_worse():
    batch = normal(50_000, 4), normal(50_000, 4, seed=1), torch.rand(50_000), None, None
    right = flow.loss_per_image(gaussian_field(1), *batch).mean()
    wrong = flow.loss_per_image(lambda *given: -gaussian_field(1)(*given), *batch).mean()
    assert wrong > right + 0.1


def test_loss_of_a_zero_output_is_one_plus_the_second_moment():
    x = 0.3 + 0.5 * normal(4000, 3, 8, 8)    # not of mean zero
    eps = normal(*x.shape, seed=1)
    losses = flow.loss_per_image(
        lambda x_t, *_: torch.zeros_like(x_t), x, eps, torch.rand(4000), None, None)
    mean, error = flow.mean_and_standard_error(losses)
    assert mean == pytest.approx(flow.expected_start_loss(x).item(), abs=4 * error)
    assert flow.expected_start_loss(x).item() == pytest.approx(1 + 0.09 + 0.25, abs=0.01)


def test_times_are_stratified_and_logit_normal():
    n = 1000
    t = flow.stratified_times(torch.randperm(n), n, torch.rand(n))
    uniform = torch.special.ndtr(torch.logit(t.double())).sort().values       # where each was drawn
    assert ((uniform - (torch.arange(n) + 0.5) / n).abs() <= 0.51 / n).all()  # one in each slice
    assert torch.logit(t.double()).mean().abs() < 0.01
    assert torch.logit(t.double()).std() == pytest.approx(1, abs=0.02)
    edges = flow.stratified_times(torch.tensor([0, n - 1]), n, torch.tensor([0.0, 1.0]))
    assert torch.isfinite(edges).all() and edges.min() >= 0 and edges.max() <= 1


def test_loss_by_time():
    losses, t = torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.05, 0.01, 1.0])
    assert flow.loss_by_time(losses, t, bins=10) == [2.0] + [None] * 8 + [5.0]


def test_standard_error_is_that_of_the_mean():
    found = [flow.mean_and_standard_error(normal(100, seed=seed)) for seed in range(400)]
    means, errors = torch.tensor(found).T
    assert means.std().item() == pytest.approx(errors.mean().item(), rel=0.1)


# ---- sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("solver, order, close", [("euler", 1, 0.1), ("heun", 2, 0.005)])
def test_samplers_converge_at_their_order(solver, order, close):
    """For Gaussian data the flow multiplies noise by s; the error falls as 2^-order."""
    s, eps = 0.5, normal(64, 3, 2, 2, dtype=torch.float64)
    errors = []
    for steps in (32, 64):
        x = flow.sample(gaussian_field(s), eps, None, None, steps, solver)
        errors.append((x - s * eps).abs().max().item())
    assert errors[1] < close
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.25)


def conditional(x_t, t, text, text_mask):
    said = text.mean((1, 2)) * text_mask.any(1)
    return x_t * 0.1 + flow.per_image(said, x_t) * torch.arange(1.0, 5.0).view(1, 4, 1, 1)


def test_guidance_on_every_channel():
    x, t, text = normal(3, 4, 2, 2), torch.rand(3), normal(3, 5, 6, seed=1)
    mask = torch.ones(3, 5, dtype=torch.bool)
    one = flow.guided(conditional, 1)(x, t, text, mask)
    assert torch.equal(one, conditional(x, t, text, mask))    # to the bit, on all channels
    unconditional = conditional(x, t, text, torch.zeros_like(mask))
    for s in (0.0, 3.0):
        guided = flow.guided(conditional, s)(x, t, text, mask)
        torch.testing.assert_close(guided, unconditional + s * (one - unconditional))
    assert ((guided - one).abs().amax((0, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("refused, call", [
    ("rk99", lambda v, x: flow.sample(v, x, None, None, solver="rk99")),
    ("1 step", lambda v, x: flow.log_likelihood(v, x, None, None, steps=1)),
    ("t0", lambda v, x: flow.vlb(v, x, None, None, t0=0)),
])
def test_impossible_arguments_are_refused(refused, call):
    with pytest.raises(ValueError, match=refused):
        call(gaussian_field(1), normal(1, 3))


# ---- exact likelihood ----------------------------------------------------------------------------

def log_normal(x, s):
    """log N(x; 0, s^2), (B,)."""
    constant = math.log(s) + 0.5 * math.log(2 * math.pi)
    return -0.5 * (x.square().sum(1) / s ** 2) - x.shape[1] * constant


@pytest.mark.parametrize("dims, s", [(1, 0.3), (6, 0.75), (16, 0.5)])
@pytest.mark.parametrize("probes", [None, 1])
def test_likelihood_of_gaussians_is_exact_and_of_order_two(dims, s, probes):
    """A linear field's probes have no noise: one will do. The sign of the divergence decides."""
    x = s * normal(5, dims, seed=dims, dtype=torch.float64)
    exact, errors = log_normal(x, s), []
    for steps in (64, 128, 256):
        nats, standard_error, evaluations = flow.log_likelihood(
            gaussian_field(s), x, None, None, steps, probes)
        assert nats.shape == standard_error.shape == (5,) and evaluations == 2 * steps
        errors.append((nats - exact).abs().max().item())
    assert errors[0] / errors[1] > 3.5 and errors[1] / errors[2] > 3.5
    assert errors[2] < 1e-4 * dims
    # x / s is where the exact flow takes x. With a minus sign the answer would be this, far away.
    minus = log_normal(x / s, 1) + dims * math.log(s)
    assert (minus - exact).abs().max() > 0.4 * dims


def curved_field(x_t, t, text=None, text_mask=None):
    """A field whose Jacobian is full, not symmetric and depends on x: so is its divergence."""
    mix = torch.linspace(-1, 1, 64, dtype=x_t.dtype).view(8, 8).sin() + torch.eye(8).to(x_t)
    return torch.tanh(x_t @ mix.T) * x_t.flip(1) + flow.per_image(t, x_t) * x_t


@pytest.mark.parametrize("steps, probes, scale", [
    (16, 1, 1), (16, 4, 1), (3, 1, 0.25)], ids=["one", "four", "few steps: the ends count"])
def test_probes_are_unbiased_and_say_how_noisy_they_are(steps, probes, scale):
    """Each of three points 400 times in one batch: every copy has probes of its own."""
    x = scale * normal(3, 8, dtype=torch.float64)
    exact, no_noise, _ = flow.log_likelihood(curved_field, x, None, None, steps, probes=None)
    nats, error, _ = flow.log_likelihood(curved_field, x.repeat(400, 1), None, None, steps, probes)
    values, said = nats.view(400, 3), error.view(400, 3)
    spread = values.std(0)
    assert (no_noise == 0).all() and spread.min() > 0.001 * scale
    assert ((values.mean(0) - exact).abs() < 3 * spread / 400 ** 0.5).all()
    assert said.square().mean(0).sqrt() == pytest.approx(spread, rel=0.25)
    again, other = (flow.log_likelihood(curved_field, x, None, None, steps, probes, seed)[0]
                    for seed in (0, 1))
    assert torch.equal(again, flow.log_likelihood(curved_field, x, None, None, steps, probes)[0])
    assert not torch.equal(again, other)


def test_the_divergence_of_the_curved_field_depends_on_x():
    def field(x):
        return curved_field(x[None], torch.zeros(1))[0]
    x = normal(3, 8, dtype=torch.float64)
    traces = [torch.autograd.functional.jacobian(field, one).trace() for one in x]
    assert min(abs(a - b) for a, b in zip(traces, traces[1:])) > 0.1


def test_a_fresh_probe_beats_a_frozen_one():
    """PAPER.md: a 64-dimensional linear field, 44 evaluations: standard deviation 1.2, against 8 to
    10 with one frozen probe."""
    A = normal(64, 64, dtype=torch.float64) / 8
    x = normal(1, 64, seed=1, dtype=torch.float64).repeat(100, 1)
    nats, *_ = flow.log_likelihood(lambda x_t, *_: x_t @ A.T, x, None, None, 22)
    symmetric = (A + A.T) / 2
    # of e^T A e for one e, at all times
    frozen = (2 * (symmetric.square().sum() - symmetric.diag().square().sum())).sqrt()
    assert nats.std() < frozen / 3 and frozen > 5


MEANS = torch.tensor([(-0.8, 0.1), (0.5, 0.6), (0.4, -0.7)], dtype=torch.float64)
WEIGHTS, SPREAD = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64), 0.25


def mixture_field(x_t, t, text=None, text_mask=None):
    """The optimal v for a mixture of Gaussians: the mean of the components' own fields, by how
    likely each made x_t."""
    t = t[:, None]
    V = (1 - t) ** 2 * SPREAD ** 2 + t * t                                         # (B, 1)
    away = x_t[:, None] - (1 - t)[:, None] * MEANS                                 # (B, 3, 2)
    share = (WEIGHTS.log() - away.square().sum(2) / (2 * V)).softmax(1)[..., None]
    field = (t - (1 - t) * SPREAD ** 2)[:, None] / V[:, None] * away - MEANS
    return (share * field).sum(1)


def test_the_likelihood_of_a_mixture_integrates_to_one():
    side, edge = 81, 2.0
    axis = torch.linspace(-edge, edge, side, dtype=torch.float64)
    x = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    nats, *_ = flow.log_likelihood(mixture_field, x, None, None, 64, probes=None)
    cell = (2 * edge / (side - 1)) ** 2
    assert (nats.exp().sum() * cell).item() == pytest.approx(1, abs=0.005)
    squares = (x[:, None] - MEANS).square().sum(2) / SPREAD ** 2
    exact = torch.logsumexp(WEIGHTS.log() - squares / 2, 1) - math.log(2 * math.pi * SPREAD ** 2)
    assert (nats - exact)[exact > -8].abs().max() < 0.05


# ---- the VLB -------------------------------------------------------------------------------------

def even_normal(shape, generator=None, dtype=torch.float64):
    """In the place of torch.randn: normal numbers (n, 1) of exactly the right distribution over the
    first half of a batch, in random order, and their negatives over the second: with the same x in
    both halves, products with x cancel."""
    half = shape[0] // 2
    order = torch.randperm(half, generator=generator).to(dtype)
    eps = torch.special.ndtri((order + 0.5) / half)[:, None]
    return torch.cat([eps, -eps]) / eps.square().mean().sqrt()


@pytest.mark.parametrize("s, entropy", [(0.3, 0.214966), (1, 1.418939), (1.7, 1.949567)])
def test_vlb_of_the_optimal_field_is_the_entropy(s, entropy, monkeypatch):
    """PAPER.md, per dimension, at t0 = 1e-4, to 1e-4: even draws of x and eps have hardly noise."""
    monkeypatch.setattr(torch, "randn", even_normal)
    x = s * even_normal((20_000, 1)).abs()    # halves alike; the bound sees x^2 only
    bound = flow.vlb(gaussian_field(s), x, None, None, times=1024, t0=1e-4)
    assert bound["nats"].mean().item() == pytest.approx(entropy, abs=1e-4)
    assert torch.equal(bound["diffusion"] + bound["reconstruction"], bound["nats"])
    wrong = flow.vlb(lambda x_t, t, *_: gaussian_field(s)(x_t, t) + 0.3, x, None, None, t0=1e-4)
    assert wrong["nats"].mean() > entropy + 0.5


def test_the_vlb_does_not_bound_the_likelihood_of_the_ode():
    """PAPER.md's counterexample: s = 0.5, the optimal field plus 0.5 x for t in [0.8, 1]. The field
    is linear, so both are closed integrals: E[-log p_ODE] - entropy = 0.0107 lies above
    VLB - entropy = 0.0044."""
    s = 0.5

    def v(x_t, t, text=None, text_mask=None):
        return gaussian_field(s)(x_t, t) + 0.5 * x_t * (flow.per_image(t, x_t) >= 0.8)
    x = s * even_normal((4000, 1), torch.Generator())
    nats, *_ = flow.log_likelihood(v, x, None, None, 2000, probes=None)
    entropy = 0.5 * math.log(2 * math.pi * math.e * s * s)
    assert -nats.mean().item() - entropy == pytest.approx(0.0107, abs=3e-4)
    optimal, wrong = (flow.vlb(field, x, None, None, times=2048, t0=1e-4)["nats"]
                      for field in (gaussian_field(s), v))   # the same times and noises
    gap, error = flow.mean_and_standard_error(wrong - optimal)
    assert error < 2e-4 and gap == pytest.approx(0.0044, abs=4 * error + 5e-5)


def test_bits_per_dim_bounds_the_bits_of_the_levels():
    """A uniform density over the 256 levels costs 8 bits a dimension; where p varies within a cell,
    more than its levels do."""
    nats = torch.tensor(12 * math.log(2.0))    # p = 2^-1 on [-1, 1)
    assert flow.bits_per_dim(nats, 12).item() == pytest.approx(8)
    assert flow.bits_per_dim(nats, 12, pixels=False).item() == pytest.approx(1)
    edges = torch.special.ndtr((torch.arange(257).double() / 128 - 1) / 0.02)
    of_levels = (edges[1:] - edges[:-1]) / (edges[-1] - edges[0])
    u = torch.rand(2000, 256, generator=torch.Generator().manual_seed(0)).double()
    x = ((torch.arange(256) + u) / 128 - 1).reshape(-1, 1)
    bits = flow.bits_per_dim(-log_normal(x, 0.02), 1).view(2000, 256).mean(0)
    real = of_levels > 1e-6
    exact = -of_levels[real].log2()
    assert (bits[real] > exact - 1e-3).all()
    assert (of_levels[real] * (bits[real] - exact)).sum() > 0.005
