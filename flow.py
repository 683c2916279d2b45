"""What is learned, and how are samples, the VLB and exact likelihood computed from it?

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
import math

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


VLB_RANGE = 2 ** -8, 1.0   # t0, t1: below half a level of 8-bit pixels there is nothing to learn but their uniform noise


def sum_dims(values):
    """(B, ...) -> (B,): the sum over all but the batch, in float64."""
    return values.double().flatten(1).sum(1)


def log_likelihood(v, x, text, text_mask, steps=32, probes=1, seed=0):
    """log p(x) of the density that the sampler's ODE gives to data: nats per image (B,), its standard error from the
    probes (B,), and the number of evaluations of v.

    The instantaneous change of variables (Chen et al. 2018, arXiv 1806.07366; Grathwohl et al. 2019, arXiv 1810.01367):

        log p(x) = log N(x_1; 0, I) + int_0^1 div v(x_t, t) dt     along dx_t/dt = v from x_0 = x to t = 1.

    The sign is a plus because v points from data to noise. Heun's method (order 2) in `steps` fixed steps, equal in sqrt(t) and
    so short near the data, where v bends; an adaptive solver would chase the noise of the probes. The divergence is
    Hutchinson's estimate, the mean of e^T (dv/dx) e over `probes` vectors e of random signs, new ones at each evaluation,
    drawn on the CPU from `seed`: a single frozen e would make the same error at every step. probes=None: the exact trace,
    one product a dimension, for few dimensions.
    It is a density of x as it is given, with no guidance: for pixels give x with its uniform noise, see bits_per_dim.
    Raises ValueError for fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"{steps} step: a likelihood needs at least 2")
    generator, dims = torch.Generator().manual_seed(seed), x[0].numel()

    def slope_and_divergence(x_t, t):
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            slope = v(x_t, x_t.new_full((len(x),), t), text, text_mask)
        divergence, products = torch.zeros(len(x), dtype=torch.float64, device=x.device), probes or dims
        for k in range(products):
            if probes:
                e = torch.randint(0, 2, x.shape, generator=generator).to(x) * 2 - 1
            else:
                e = torch.zeros_like(x).flatten(1).index_fill(1, torch.tensor(k, device=x.device), 1).view_as(x)
            (e_J,) = torch.autograd.grad(slope, x_t, e.type_as(slope), retain_graph=k + 1 < products, materialize_grads=True)
            divergence += sum_dims(e_J * e)
        return slope.detach(), divergence / (probes or 1)

    grid = [(k / steps) ** 2 for k in range(steps + 1)]
    x_t, integral, variance, there_divergence = x, 0.0, 0.0, None
    for k, (t, t_next) in enumerate(zip(grid[:-1], grid[1:])):
        h, h_before, arrived = t_next - t, t - grid[max(k - 1, 0)], there_divergence
        slope, divergence = slope_and_divergence(x_t, t)
        there_slope, there_divergence = slope_and_divergence(x_t + h * slope, t_next)
        x_t = x_t + h / 2 * (slope + there_slope)
        integral = integral + h / 2 * (divergence + there_divergence)
        if k:
            # Two evaluations meet at each inner time, at states O(h^2) apart: half the square of their difference is the
            # variance of one. The single ones at t = 0 and t = 1 are taken to be as noisy as their neighbours.
            single = h_before ** 2 * (k == 1) + h ** 2 * (k == steps - 1)
            variance = variance + (arrived - divergence).square() / 2 * (h_before ** 2 + h ** 2 + single) / 4
    log_normal = -0.5 * (sum_dims(x_t.double().square()) + dims * math.log(2 * math.pi))
    return log_normal + integral, variance.sqrt() if probes else torch.zeros_like(variance), 2 * steps


@torch.no_grad()
def vlb(v, x, text, text_mask, times=64, seed=0, t0=VLB_RANGE[0], t1=VLB_RANGE[1]):
    """The variational bound on -log p(x): {"nats" (B,), its parts "prior", "diffusion", "reconstruction" (B,), "t0", "t1"}.

    -log p(x) <= prior + int_t0^t1 (1-t)/t |v_model - v|^2 dt + reconstruction (Kingma et al. 2021, arXiv 2107.00630, eq. 11-17,
    with (alpha, sigma) = (1-t, t): half of d(SNR)/dt times the squared error of x, which is t |error of v|), in nats, summed over
    dimensions. prior = KL(q(x_t1 | x) || N(0, I)); reconstruction is -log N(x; x_t0 / (1-t0), (t0 / (1-t0))^2), in expectation.
    Without it the sum depends on t0 and bounds nothing.

    It bounds the density of the reverse *SDE* that has this v, not that of the sampler's ODE (log_likelihood): the two are
    one for the exact field and two for any other, and no order between them holds in general.

    The integral is stratified in log t, one time in each of `times` slices for each image, each with its own noise, from `seed`:
    with dt = t dlog t the integrand is (1-t) |error|^2, which is tame. Training times re-weighted would never do: of the
    logit-normal 2e-6 lies below t = 0.01. Raises ValueError unless 0 < t0 < t1 <= 1.
    """
    if not 0 < t0 < t1 <= 1:
        raise ValueError(f"t0 = {t0:g}, t1 = {t1:g}: must be 0 < t0 < t1 <= 1")
    generator, dims, length = torch.Generator().manual_seed(seed), x[0].numel(), math.log(t1 / t0)
    diffusion = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for k in range(times):
        jitter = torch.rand(len(x), generator=generator, dtype=torch.float64)
        t = (t0 * torch.exp((k + jitter) / times * length)).to(x)
        eps = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        x_t = (1 - per_image(t, x)) * x + per_image(t, x) * eps
        error = v(x_t, t, text, text_mask).to(x) - (eps - x)
        diffusion += (1 - t) * sum_dims(error.square()) * length / times
    prior = 0.5 * ((1 - t1) ** 2 * sum_dims(x.square()) + dims * (t1 ** 2 - 1 - 2 * math.log(t1)))
    reconstruction = torch.full_like(prior, dims * 0.5 * (math.log(2 * math.pi * t0 ** 2 / (1 - t0) ** 2) + 1))
    return {"nats": prior + diffusion + reconstruction, "prior": prior, "diffusion": diffusion,
            "reconstruction": reconstruction, "t0": t0, "t1": t1}


def bits_per_dim(nats, dims, pixels=True):
    """-log p in nats per image -> bits per dimension; of 8-bit pixels k where x = (k + u) / 128 - 1, u ~ U[0, 1)^dims.

    Level k is a cell of side 1/128, so P(k) = int_cell p dx = 128^-dims E_u[p(x)], and by Jensen's inequality
    -log2 P(k) <= E_u[-log2 p(x)] + 7 dims: with fresh u the mean of this function is an upper bound (Theis et al. 2016, arXiv
    1511.01844). pixels=False: x is a latent with no cells; the number is a differential one, may be negative,
    depends on the scale of the latents and must not be compared with pixels'.
    """
    return nats / (dims * math.log(2)) + (7 if pixels else 0)
