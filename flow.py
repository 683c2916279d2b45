"""What is learned, and how are samples and the validation loss computed from it?

Rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022). The glossary of the whole project:

    x             data, in [-1, 1]
    eps           noise, N(0, I)
    t             time: t = 0 is data, t = 1 is noise
    x_t           (1 - t) x + t eps
    v             dx_t/dt = eps - x, what the network predicts; so x = x_t - t v and eps = x_t + (1 - t) v
    text          caption features (B, S, F); text_mask: which of them are real (B, S). No real one: unconditional
    B T S W H     batch, tokens in the sequence, text tokens, width, heads
    N D C         parameters, tokens seen, training FLOPs
    guidance s    v_uncond + s (v_cond - v_uncond) on all channels; s = 1 is the conditional model
    loss          mean over elements of (v_model - v)^2

This file never sees an architecture: `v` below is any callable v(x_t, t, text, text_mask) -> like x_t, t of shape (B,).
Sampling integrates t from 1 to 0.
"""
import torch
from einops import reduce


def per_image(t, x):
    """(B,) -> (B, 1, 1, ...), to multiply a batch like x."""
    return t.view(-1, *[1] * (x.ndim - 1))


def loss_per_image(v, x, eps, t, text, text_mask):
    """Rectified-flow loss of each image, (B,): the mean over its elements of (v_model - (eps - x))^2, in float32.

    x, eps (B, ...), t (B,), text (B, S, F), text_mask (B, S).
    """
    x_t = (1 - per_image(t, x)) * x + per_image(t, x) * eps
    error = v(x_t, t, text, text_mask).float() - (eps - x)
    return reduce(error.square(), "b ... -> b", "mean")


def expected_start_loss(x):
    """The loss of a network whose output is zero: E[(eps - x)^2] = 1 + E[x^2] (mean over elements)."""
    return 1 + x.square().mean()


def stratified_times(stratum, strata, jitter, sampling="logit_normal"):
    """Times for a batch, (B,): one from each of `strata` slices of equal probability, float32.

    stratum (B,): which slice; jitter (B,) in [0, 1): where in it. "logit_normal": t = sigmoid(n), n ~ N(0, 1), the
    density of Esser et al. 2024 (arXiv 2403.03206) with m = 0, s = 1; "uniform": t ~ U(0, 1). A batch whose strata are
    a permutation of all slices covers the distribution evenly, which takes noise out of the loss and its gradient.
    """
    u = (stratum.double() + jitter.double()) / strata
    if sampling == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u))  # n = ndtri(u) is a normal number
    return u.float()


def validation_loss(v, batches):
    """The loss of each image of a fixed set, with fixed times and noises: (n,) float32 on the CPU.

    batches: an iterable of (x, eps, t, text, text_mask). The same for all models of a sweep, so that in the
    difference of two models the luck of the draw cancels.
    """
    with torch.no_grad():
        return torch.cat([loss_per_image(v, *batch).float().cpu() for batch in batches])


def mean_and_standard_error(values):
    """(n,) -> the mean and the standard error of the mean, in float64."""
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5


def loss_by_time(losses, t, bins=10):
    """Mean loss in equal bins of t, a list of `bins` numbers (None where no image falls): where the model errs."""
    which = (t * bins).long().clamp(max=bins - 1)
    return [losses[which == k].double().mean().item() if (which == k).any() else None for k in range(bins)]


def guided(v, guidance):
    """Classifier-free guidance (Ho & Salimans 2022): a new v that follows the captions `guidance` times as much.

    All channels are guided. guidance = 1 is v itself, to the bit. One call of the new v is one call of v on 2B images.
    """
    if guidance == 1:
        return v

    def guided_v(x_t, t, text, text_mask):
        masks = torch.cat([text_mask, torch.zeros_like(text_mask)])
        conditional, unconditional = v(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, text]), masks).float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)
    return guided_v


@torch.no_grad()
def sample(v, eps, text, text_mask, steps=16, solver="heun", guidance=1.0):
    """Draw data from noise by integrating dx_t/dt = v from t = 1 to 0 in `steps` equal steps: like eps, not clipped.

    solver: "euler" (order 1, one evaluation a step) or "heun" (order 2, two evaluations). eps (B, ...).
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: take 'euler' or 'heun'")
    v = guided(v, guidance)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x_t = eps
    for t, t_next in zip(times[:-1], times[1:]):
        slope = v(x_t, eps.new_full((len(eps),), t), text, text_mask)
        if solver == "heun":
            there = v(x_t + (t_next - t) * slope, eps.new_full((len(eps),), t_next), text, text_mask)
            slope = (slope + there) / 2
        x_t = x_t + (t_next - t) * slope
    return x_t
