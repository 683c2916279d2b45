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
