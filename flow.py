"""What is learned, and how are samples, the VLB and exact likelihood computed from it?

Rectified flow (Liu et al. 2022, arXiv 2209.03003; Lipman et al. 2022). The glossary of the project:

    x             data, in [-1, 1]
    eps           noise, N(0, I)
    t             time: t = 0 is data, t = 1 is noise
    x_t           (1 - t) x + t eps
    v             dx_t/dt = eps - x, what the network predicts: x = x_t - t v, eps = x_t + (1 - t) v
    text          caption features (B, S, F); text_mask: which are real (B, S). None: unconditional
    B T S W H     batch, tokens in the sequence, text tokens, width, heads
    N D C         parameters, tokens seen, training FLOPs
    guidance s    v_uncond + s (v_cond - v_uncond) on all channels; s = 1 is the conditional model
    loss          mean over elements of (v_model - v)^2

This file never sees an architecture: `v` below is any callable v(x_t, t, text, text_mask) -> like
x_t, t of shape (B,). Sampling integrates t from 1 to 0.
"""
import math

import torch
from einops import reduce

def per_image(t, x):
    """(B,) -> (B, 1, 1, ...), to multiply a batch like x."""
    return t.view(-1, *[1] * (x.ndim - 1))

def loss_per_image(v, x, eps, t, text, text_mask):
    """Rectified-flow loss of each image, (B,): mean of (v_model - (eps - x))^2, float32. t (B,)."""
    x_t = (1 - per_image(t, x)) * x + per_image(t, x) * eps
    error = v(x_t, t, text, text_mask).float() - (eps - x)
    return reduce(error.square(), "b ... -> b", "mean")

def expected_start_loss(x):
    """The loss of a network whose output is zero: E[(eps - x)^2] = 1 + E[x^2]."""
    return 1 + x.square().mean()

def stratified_times(stratum, strata, jitter, sampling="logit_normal"):
    """Times for a batch, (B,): one from each of `strata` slices of equal probability, float32.

    stratum (B,): which slice; jitter (B,) in [0, 1): where in it. A batch whose strata are a
    permutation of all covers the distribution evenly: less noise in the loss and its gradient.
    "logit_normal": the density of Esser et al. 2024 (arXiv 2403.03206) with mean 0 and width 1.
    """
    u = (stratum.double() + jitter.double()) / strata
    if sampling == "logit_normal":
        u = torch.sigmoid(torch.special.ndtri(u))   # ndtri(u) is a normal number
    return u.float()

def validation_loss(v, batches):
    """The loss of each image of batches (x, eps, t, text, text_mask): (n,) float32 on the CPU.
    They are the same for all models of a sweep, so in a difference the luck of the draw cancels."""
    with torch.no_grad():
        return torch.cat([loss_per_image(v, *batch).float().cpu() for batch in batches])

def mean_and_standard_error(values):
    """(n,) -> the mean and the standard error of the mean, in float64."""
    values = values.double()
    return values.mean().item(), values.std().item() / len(values) ** 0.5

def loss_by_time(losses, t, bins=10):
    """Mean loss in equal bins of t, a list of `bins` numbers (None where no image falls)."""
    bin_of = (t * bins).long().clamp(max=bins - 1)
    groups = [losses[bin_of == k].double() for k in range(bins)]
    return [group.mean().item() if len(group) else None for group in groups]

def guided(v, guidance):
    """Classifier-free guidance (Ho & Salimans 2022) on all channels: a new v; of 1 v, to the bit.
    One call of the new v is one call of v on 2B images."""
    if guidance == 1:
        return v

    def guided_v(x_t, t, text, text_mask):
        masks = torch.cat([text_mask, torch.zeros_like(text_mask)])
        both = v(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([text, text]), masks)
        conditional, unconditional = both.float().chunk(2)
        return unconditional + guidance * (conditional - unconditional)
    return guided_v

@torch.no_grad()
def sample(v, eps, text, text_mask, steps=16, solver="heun", guidance=1.0):
    """Draw data from noise: integrate dx_t/dt = v from t = 1 to 0. Like eps (B, ...), not clipped.

    solver, in `steps` equal steps: "euler" (order 1, one evaluation of v) or "heun" (2, two).
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"unknown solver {solver!r}: take 'euler' or 'heun'")
    v = guided(v, guidance)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()
    x_t = eps
    for t, t_next in zip(times[:-1], times[1:]):
        slope = v(x_t, eps.new_full((len(eps),), t), text, text_mask)
        if solver == "heun":
            x_next = x_t + (t_next - t) * slope
            slope = (slope + v(x_next, eps.new_full((len(eps),), t_next), text, text_mask)) / 2
        x_t = x_t + (t_next - t) * slope
    return x_t

# t0 of the bound. Levels of 8-bit pixels are 1/128 apart: below t0 = 2^-8, half of that, an image
# differs from its noised version by less than the uniform noise inside a level.
VLB_START = 2 ** -8

def sum_dims(values):
    """(B, ...) -> (B,): the sum over all but the batch, in float64."""
    return values.double().flatten(1).sum(1)

def slope_and_divergence(v, x_t, t, text, text_mask, probes, generator):
    """v(x_t, t) and div v, (B,) float64, at one t for all images.

    Hutchinson's estimate: the mean of e^T (dv/dx) e over `probes` vectors e of random signs. None:
    the exact trace, one product a dimension, for few dimensions.
    """
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        slope = v(x_t, x_t.new_full((len(x_t),), t), text, text_mask)
    divergence = torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)
    for k in range(probes or x_t[0].numel()):
        if probes:
            e = torch.randint(0, 2, x_t.shape, generator=generator).to(x_t) * 2 - 1
        else:
            e = x_t.new_zeros(x_t.shape)
            e.view(len(e), -1)[:, k] = 1
        (e_J,) = torch.autograd.grad(slope, x_t, e.type_as(slope), retain_graph=True,
                                     materialize_grads=True)
        divergence += sum_dims(e_J * e)
    return slope.detach(), divergence / (probes or 1)

def variance_of_probes(steps):
    """The variance that the probes add to Heun's integral of the divergence, (B,).

    steps: [(width, divergence (B,) at its start, at its end), ...]. Two evaluations meet at each
    inner time, at states O(h^2) apart: half the square of their difference is the variance of one.
    The single ones at t = 0 and t = 1 are taken to be as noisy as their neighbours.
    """
    variance = 0.0
    for k in range(1, len(steps)):
        (h_before, _, arrived), (h, departed, _) = steps[k - 1], steps[k]
        single = h_before ** 2 * (k == 1) + h ** 2 * (k == len(steps) - 1)
        weight = (h_before ** 2 + h ** 2 + single) / 4
        variance = variance + (arrived - departed).square() / 2 * weight
    return variance

def log_likelihood(v, x, text, text_mask, steps=32, probes=1, seed=0):
    """log p(x) of the density that the sampler's ODE gives to data: nats per image (B,), its
    standard error from the probes (B,), and the number of evaluations of v.

    The instantaneous change of variables (Chen et al. 2018, arXiv 1806.07366; Grathwohl et al.
    2019, arXiv 1810.01367), with a plus, because v points from data to noise:
        log p(x) = log N(x_1; 0, I) + int_0^1 div v(x_t, t) dt   along dx_t/dt = v from x_0 = x.
    Heun's method (order 2) in `steps` fixed steps, equal in sqrt(t) and so short near the data,
    where v bends; an adaptive solver would chase the noise of the probes. They are drawn on the CPU
    from `seed`, new ones at each evaluation: a frozen one would make the same error at every step.
    A density of x as it is, with no guidance: give pixels with their noise (see bits_per_dim).
    Raises ValueError for fewer than 2 steps.
    """
    if steps < 2:
        raise ValueError(f"{steps} step: a likelihood needs at least 2")
    generator = torch.Generator().manual_seed(seed)
    times = [(k / steps) ** 2 for k in range(steps + 1)]
    x_t, integral, taken = x, 0.0, []
    given = text, text_mask, probes, generator
    for t, t_next in zip(times[:-1], times[1:]):
        h = t_next - t
        slope, start = slope_and_divergence(v, x_t, t, *given)
        slope_there, end = slope_and_divergence(v, x_t + h * slope, t_next, *given)
        x_t = x_t + h / 2 * (slope + slope_there)
        integral = integral + h / 2 * (start + end)
        taken.append((h, start, end))
    log_normal = -0.5 * (sum_dims(x_t.double().square()) + x[0].numel() * math.log(2 * math.pi))
    variance = variance_of_probes(taken) if probes else torch.zeros_like(integral)
    return log_normal + integral, variance.sqrt(), 2 * steps

@torch.no_grad()
def vlb(v, x, text, text_mask, times=64, seed=0, t0=VLB_START):
    """The variational bound on -log p(x): {"nats" (B,), and its two parts, "diffusion" (B,) and
    "reconstruction" (B,)}, in nats, summed over dimensions.

    -log p(x) <= int_t0^1 (1-t)/t |v_model - v|^2 dt + reconstruction (Kingma et al. 2021, arXiv
    2107.00630, eq. 11-17, with (alpha, sigma) = (1-t, t): half of d(SNR)/dt times the squared error
    of x, which is t |error of v|). Their third part, the prior KL(q(x_1 | x) || N(0, I)), is 0: x_1
    is noise alone. reconstruction is -log N(x; x_t0 / (1-t0), (t0 / (1-t0))^2), in expectation:
    without it the sum depends on t0 and bounds nothing. It bounds the density of the reverse *SDE*
    that has this v, not that of the sampler's ODE (log_likelihood): they agree for the exact field,
    and no order holds in general.

    The integral is stratified in log t, one time in each of `times` slices for each image, each
    with its own noise, from `seed`: with dt = t dlog t the integrand is (1-t) |error|^2, which is
    tame. Training times re-weighted would never do: of the logit-normal 2e-6 lies below t = 0.01.
    Raises ValueError unless 0 < t0 < 1.
    """
    if not 0 < t0 < 1:
        raise ValueError(f"t0 = {t0:g}: must be in (0, 1)")
    generator, length = torch.Generator().manual_seed(seed), math.log(1 / t0)
    diffusion = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for k in range(times):
        jitter = torch.rand(len(x), generator=generator, dtype=torch.float64)
        t = (t0 * torch.exp((k + jitter) / times * length)).to(x)
        eps = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
        x_t = (1 - per_image(t, x)) * x + per_image(t, x) * eps
        error = v(x_t, t, text, text_mask).to(x) - (eps - x)
        diffusion += (1 - t) * sum_dims(error.square()) * length / times
    per_dim = 0.5 * (math.log(2 * math.pi * t0 ** 2 / (1 - t0) ** 2) + 1)
    reconstruction = torch.full_like(diffusion, x[0].numel() * per_dim)
    return {"nats": diffusion + reconstruction, "diffusion": diffusion,
            "reconstruction": reconstruction}

def bits_per_dim(nats, dims, pixels=True):
    """-log p in nats per image -> bits per dimension; of 8-bit pixels k if x = (k + u) / 128 - 1.

    Level k is a cell of side 1/128: P(k) = int_cell p dx = 128^-dims E_u[p(x)], u ~ U[0, 1)^dims.
    By Jensen's inequality -log2 P(k) <= E_u[-log2 p(x)] + 7 dims: with fresh u the mean of this is
    an upper bound (Theis et al. 2016, arXiv 1511.01844). pixels=False: x is a latent with no cells;
    the number is a differential one, may be negative, depends on the scale of the latents and must
    not be compared with pixels'.
    """
    return nats / (dims * math.log(2)) + (7 if pixels else 0)
