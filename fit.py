"""fit.py: which law do these results obey, and how far can it be trusted?

    python fit.py                                    the law of results/quick, into results/quick/law
    python fit.py results/a results/b --out law      several sweeps as one set of points
    python fit.py runs.csv                           anybody's runs: columns N, D, C, loss (also budget, run, seed)
    python fit.py results/quick --plan 8xH100:72h:0.4      what to train with that much compute
    python fit.py results/a --compare results/b results/c  which is better, from which budget on, and can the data tell
    python fit.py --reference paper --plan 1.5e21    the same from the paper's own coefficients

Read from top to bottom: read the points; a parabola of ln loss in ln N at every budget (its vertex is the best model for
that budget); straight lines through the vertices in log-log; the loss with and without a floor; the parametric form
L = E + A N^-alpha + B D^-beta as second opinion; resampling of everything; then what follows from it (plan, comparison,
backtest) and the page and pictures that tell it. Metrics that evaluate.py left beside the points are read at the same
vertices and get the same laws. Exit status: 0 a law, 2 bad input, 3 a refusal.

    N  parameters of the model (of its blocks, unless --n total)      D  tokens seen in training: image, text and time
    C  training FLOPs                                                 L  the loss that --metric names
"""
import argparse
import csv
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats would cost a second at every start
from tqdm import tqdm

WINDOW, NEAREST = 4.0, 7  # the parabola's window: sizes within 4x of the lowest, but never fewer than the 7 nearest
HUBER = 1e-3              # width of the Huber loss on ln L, in the parametric fit (Hoffmann et al. 2022)
PAPER = {"N": (0.0009, 0.5681), "D": (186.8535, 0.4319), "L": (2.3943, -0.0273)}  # y = k C^p (arXiv 2410.08184)
PAPER_TOKENS, PAPER_BATCH, PAPER_ASPECT = 256 + 77 + 1, 1024, 64  # per image: image, text, time; the paper prints no split
# Peak dense bf16 TFLOP/s of one device, from the makers' data sheets (V100 and T4: fp16).
PEAK = {"V100": 125, "T4": 65, "A100": 312, "A10": 125, "L4": 121, "L40S": 362, "RTX3090": 71, "RTX4090": 165, "H100": 989,
        "H200": 989, "B200": 2250, "MI250X": 383, "MI300X": 1307, "TPUv4": 275, "TPUv5e": 197, "TPUv5p": 459}


class BadInput(Exception):
    """A file or flag that cannot be used: one line, exit status 2."""


class Refused(Exception):
    """The data allow no law: the reason in one line, exit status 3."""


# ---------------------------------------------------------------------------------------------------- reading the points

RECORD = ("arch", "depth", "width", "seed", "N_blocks", "N_total", "budget", "count", "C", "C_6nd", "D", "data", "resolution",
          "captions")  # what a record must have; the metric is looked for when it is known


def read(paths):
    """Records (a list of dicts) from results directories, or from CSV files. Raises BadInput naming the file."""
    records = []
    for path in map(Path, paths):
        if path.is_dir():
            records += read_results(path)
        elif path.is_file():
            records += read_csv(path)
        else:
            raise BadInput(f"{path}: no such file or directory")
    if len({"N" in r for r in records}) > 1:
        raise BadInput("a CSV file and a results directory cannot be fitted together: their counts differ")
    return records


def read_results(folder):
    """The result.json of every point under a sweep's folder: results/NAME/RUN/budget_*/result.json."""
    records, protocols = [], {}
    for file in sorted(folder.glob("*/budget_*/result.json")):
        try:
            record = json.loads(file.read_text())
        except ValueError:
            raise BadInput(f"{file}: torn or not JSON; delete it and run the sweep again")
        if not isinstance(record, dict) or record.get("schema") != 1:
            raise BadInput(f"{file}: not a record of schema 1")
        missing = [k for k in RECORD if k not in record]
        if missing:
            raise BadInput(f"{file}: the record lacks {', '.join(missing)}")
        record |= {"source": str(file), "run": str(file.parent.parent)}
        record["C"] = record["C_6nd"] if record["count"] == "6nd" else record["C"]
        for extra in sorted(file.parent.glob("metrics_*.json")):
            try:
                found = json.loads(extra.read_text())
                if found["schema"] != 1:
                    raise ValueError
                for name, m in found["metrics"].items():
                    if m["value"] is not None:  # null where evaluate.py refused the metric
                        label, how = f"{name} on {found['data']}", {k: x for k, x in m.get("protocol", {}).items() if k != "weights"}
                        record.setdefault("metrics", {})[label] = float(m["value"])
                        first, its = protocols.setdefault(label, (extra, how))
                        if its != how:
                            differs = ", ".join(k for k in its.keys() | how.keys() if its.get(k) != how.get(k))
                            raise BadInput(f"{extra}: {label} was measured by another protocol than in {first} ({differs}): "
                                           "run evaluate.py on all points with the same flags")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise BadInput(f"{extra}: torn or not a metrics file of schema 1")
        records.append(record)
    if not records:
        raise BadInput(f"{folder}: no */budget_*/result.json in it")
    return records


def read_csv(file):
    """Rows of a CSV with columns N, D, C, loss and perhaps budget, run, seed; other columns are ignored."""
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as f:  # Excel's mark; a binary file has no such columns
        rows = csv.DictReader(f)
        missing = [k for k in ("N", "D", "C", "loss") if k not in (rows.fieldnames or ())]
        if missing:
            raise BadInput(f"{file}: no column {', '.join(missing)} (it needs N, D, C, loss)")
        records = []
        for row in rows:
            record = {"source": f"{file}:{rows.line_num}"}
            for k in ("N", "D", "C", "loss", "budget"):
                if k in row:
                    try:
                        record[k] = float(row[k])
                    except (TypeError, ValueError):
                        raise BadInput(f"{file}:{rows.line_num}: {k} is {row[k]!r}, not a number")
            record |= {k: row[k] for k in ("run", "run_id", "seed") if row.get(k)}
            records.append(record)
    # Many files number their rows in run_id: only an id that comes back at another budget tells of a nested run.
    ids = [r.pop("run_id", None) for r in records]
    if None not in ids and len(set(ids)) < len(ids):
        for r, i in zip(records, ids):
            r.setdefault("run", i)
    if not records:
        raise BadInput(f"{file}: no row in it")
    return records


def points(records, metric="val_loss_ema", n_kind="blocks"):
    """Records -> arrays over points: N, D, C, loss (n,), budget (n,) index into budgets (B,), run (n,) index.

    Repeated seeds stay separate points: least squares then weighs a size by its number of runs, which is right while
    the noise is the seed's, and the resampling sees the seeds' spread. Raises BadInput or Refused, naming the source.
    """
    for key in ("count", "arch", "data", "resolution", "captions", "train_images"):
        values = sorted({str(r[key]) for r in records if key in r})
        if len(values) > 1:
            raise BadInput(f"one law needs one {key}, these records have {' and '.join(values)}")
    columns = {"N": "N" if "N" in records[0] else f"N_{n_kind}", "D": "D", "C": "C",
               "loss": "loss" if "N" in records[0] else metric}
    unknown = next((r for r in records if columns["loss"] not in r), None)
    if unknown:
        raise BadInput(f"--metric {metric}: {unknown['source']} has no such value")
    for r in records:
        for name in (*columns.values(), *(["budget"] if "budget" in r else [])):
            if not (isinstance(r[name], (int, float)) and 0 < r[name] < math.inf):
                raise Refused(f"{r['source']}: {name} is {r[name]}; a law needs positive finite values")
    seen, kept, dropped = {}, [], 0
    for r in records:
        key = (r[columns["N"]], r["C"], *(r.get(k) for k in ("seed", "depth", "width")), "N" in r and r.get("run"))
        other = seen.setdefault(key, r)
        if other is not r and other[columns["loss"]] != r[columns["loss"]]:
            raise Refused(f"{other['source']} and {r['source']} are duplicates with different losses: the same N and C, "
                          "no seed to tell them apart")
        dropped += other is not r
        kept += [r] if other is r else []
    P = {k: np.array([float(r[c]) for r in kept]) for k, c in columns.items()}
    if len(kept) < 4:
        raise Refused(f"fewer than 4 points ({len(kept)}): no parabola and no law")
    # Without a budget column, C within 10% of the smallest of its group is one budget.
    nominal = np.array([float(r.get("budget", r["C"])) for r in kept])
    order, start, group = np.argsort(nominal, kind="stable"), None, np.zeros(len(kept), int)
    for i in order:
        width = 1.001 if "budget" in kept[i] else 1.1
        if start is None or nominal[i] > nominal[start] * width:
            start, group[i] = i, group.max() + (start is not None)
        else:
            group[i] = group[start]
    P["budget"] = group
    P["budgets"] = np.array([np.exp(np.log(P["C"][group == b]).mean()) for b in range(group.max() + 1)])
    # Where nothing names the runs, the same N at several budgets may be one run read at each: quality() lets the data tell.
    named = all("run" in r for r in kept)
    names = [str(r["run"] if named else (r[columns["N"]], r.get("seed"))) for r in kept]
    P["run"] = np.unique(names, return_inverse=True)[1]
    P["nested"] = len(set(names)) < len(set(zip(names, group))) if named else None
    P["x0"] = float(np.log(P["budgets"]).mean())  # lines are fitted in ln C - x0, where level and slope are independent
    P["records"], P["dropped"] = kept, dropped
    labels = sorted({k for r in kept for k in r.get("metrics", {})})
    measured = {k: np.array([r.get("metrics", {}).get(k, np.nan) for r in kept]) for k in labels}  # nan: not at this point
    P["not_positive"] = {k: int((y <= 0).sum()) for k, y in measured.items() if (y <= 0).any()}    # such have no power law
    P["metrics"] = [k for k in labels if k not in P["not_positive"]]
    P["lines"] = ["N", "D", "L", *P["metrics"], *(f"N* of {k}" for k in P["metrics"] if k.startswith("fd"))]
    P["Y"] = {k: np.log(y)[None] for k, y in {"L": P["loss"], "D": P["D"], **{k: measured[k] for k in P["metrics"]}}.items()}
    P["kappa"] = float(np.exp(np.log(P["C"] / P["N"] / P["D"]).mean()))  # C = kappa N D: 6, or more where attention counts
    return P


# ------------------------------------------------------------------- the law, for R weightings or disturbed losses at once

def quadratic(z, w, y, degree=2):
    """Weighted least squares of y on 1, z, z^2 (.., z^degree), for R rows at once: w, y (R, p), z (p,) -> (R, degree+1)."""
    X = z[:, None] ** np.arange(degree + 1)
    A = np.einsum("rp,pi,pj->rij", w, X, X)
    A[(w > 0).sum(1) <= degree] = np.eye(degree + 1)  # too few points: any answer, the caller does not use it
    return np.linalg.solve(A + 1e-13 * np.eye(degree + 1), np.einsum("rp,rp,pi->ri", w, y, X)[..., None])[..., 0]


def parabolas(P, W, Y, factor=WINDOW):
    """The vertex of a parabola of ln loss in ln N at each budget, for R variants of the data at once.

    W (R, n) weights of the points (0 leaves one out, 2 counts it twice); Y[name] (R, n) or (1, n) the logs of "L" and of
    what is read at the vertex, the loss-optimal N: "D", not computed as C/6N, and the metrics. The window is chosen anew
    in every variant. Returns (R, B): N, L, D and metrics (logs, at the vertex), curvature, usable; "N* of" each FD, where its own
    parabola has its vertex, nan where it has none; and window (R, n).
    """
    R, B = len(W), len(P["budgets"])
    out = {k: np.full((R, B), np.nan) for k in ("N", "curvature", *Y)}
    out |= {"usable": np.zeros((R, B), bool), "window": np.zeros((R, len(P["N"])), bool)}
    for b in range(B):
        i = np.flatnonzero(P["budget"] == b)
        x, w, y = np.log(P["N"][i]), W[:, i].astype(float), np.broadcast_to(Y["L"], W.shape)[:, i]
        sizes, of = np.unique(x, return_inverse=True)
        onto = np.eye(len(sizes))[of]                                       # (p, sizes): seeds of a size count together
        weight = w @ onto                                                   # (R, sizes)
        mean = np.where(weight > 0, (w * y) @ onto / np.maximum(weight, 1e-300), np.inf)
        far = np.where(weight > 0, np.abs(sizes - sizes[mean.argmin(1)][:, None]), np.inf)
        seventh = np.sort(far, 1)[:, min(NEAREST, len(sizes)) - 1]          # inf where fewer are left: then all of them
        inside = np.isfinite(far) & (far <= np.maximum(seventh, math.log(factor))[:, None] + 1e-9)
        w = w * inside[:, of]
        z0 = x.mean()
        c = quadratic(x - z0, w, y)
        with np.errstate(divide="ignore", invalid="ignore"):
            z = -c[:, 1] / (2 * c[:, 2])
        low, high = np.where(inside, sizes, np.inf).min(1) - z0, np.where(inside, sizes, -np.inf).max(1) - z0
        out["usable"][:, b] = (inside.sum(1) >= 4) & (c[:, 2] > 0) & (low < z) & (z < high)
        out["window"][:, i] = inside[:, of] & (W[:, i] > 0)
        out["N"][:, b], out["L"][:, b], out["curvature"][:, b] = z + z0, c[:, 0] + c[:, 1] * z / 2, c[:, 2]
        for name in Y.keys() - {"L"}:
            value = np.broadcast_to(Y[name], W.shape)[:, i]
            there = w * np.isfinite(value)                                  # nan: not measured at this point
            d = quadratic(x - z0, there, np.nan_to_num(value))
            out[name][:, b] = np.where((there @ onto > 0).sum(1) >= 4, d[:, 0] + z * (d[:, 1] + z * d[:, 2]), np.nan)
    for name in (k for k in Y if k.startswith("fd")):
        own = alone(P, W, Y[name])
        out[f"N* of {name}"] = np.where(own["usable"] & out["usable"], own["N"], np.nan)
    return out


def points_in_windows(folder):
    """The result.json files of a results directory whose points the parabolas of the loss use. Raises BadInput or Refused."""
    P = points(read_results(folder))
    window = parabolas(P, np.ones((1, len(P["N"]))), P["Y"])["window"][0]
    return [record["source"] for record, used in zip(P["records"], window) if used]


def alone(P, W, y):
    """parabolas() of a metric in place of the loss, at the points that have it; y (R, n) or (1, n), nan where they do not."""
    return parabolas(P, W * np.isfinite(y), {"L": np.nan_to_num(y)})


def line(x, y, use):
    """Least squares y = p + q x over the budgets in use; x (B,), y and use (R, B) -> (R, 2). Unweighted, as the paper's."""
    use = use & np.isfinite(y)
    n = np.maximum(use.sum(1), 1)
    y = np.where(use, y, 0)
    mx, my = (use * x).sum(1) / n, y.sum(1) / n
    dx = use * (x - mx[:, None])
    q = (dx * y).sum(1) / np.maximum((dx * dx).sum(1), 1e-300)
    return np.stack([my - q * mx, q], 1)


def floor_law(x, y, use):
    """L = L_inf + K exp(-g x) through the minima exp(y), least squares of relative errors; (R, 3): L_inf, K, g.

    For a given g it is linear in (L_inf, K): so only g is searched, on a grid in ln g that zooms in around its best point.
    That needs no start and cannot diverge. L_inf < 0 is no floor: then L_inf = 0. nan with fewer than 4 budgets.
    """
    use = use & np.isfinite(y)
    some = use.any(0)
    x, y, use = x[some], y[:, some], use[:, some]
    u = np.where(use, np.exp(-np.where(use, y, 0)), 0)[:, None, :]         # 1/L, so that residuals are relative (R, 1, B)
    centre, half = np.full(len(y), math.log(0.1)), 4.0                     # g from 0.002 to 5
    rows = np.arange(len(y))
    for _ in range(9):
        lg = centre[:, None] + np.linspace(-half, half, 33)                # (R, G)
        h = np.exp(-np.exp(lg)[..., None] * x) * u
        uu, uh, hh, su, sh = (u * u).sum(2), (u * h).sum(2), (h * h).sum(2), u.sum(2), h.sum(2)
        with np.errstate(divide="ignore", invalid="ignore"):
            det = uu * hh - uh**2
            L, K = (su * hh - sh * uh) / det, (sh * uu - su * uh) / det
        none = ~(L > 0) | ~(K > 0) | ~(det > 1e-14 * uu * hh)
        L, K = np.where(none, 0, L), np.where(none, sh / np.maximum(hh, 1e-300), K)
        error = ((L[..., None] * u + K[..., None] * h - use[:, None, :]) ** 2 * use[:, None, :]).sum(2)
        best = error.argmin(1)
        centre, half = lg[rows, best], half / 8
    out = np.stack([L[rows, best], K[rows, best], np.exp(centre)], 1)
    out[use.sum(1) < 4] = np.nan
    return out


def laws(P, v, keep=None, names=("N", "D", "L")):
    """Straight lines through the vertices v, and "NAME floor", the laws with a floor of loss and metrics; keep (B,) leaves budgets
    out. Arrays over R, nan with fewer than 3 budgets."""
    x = np.log(P["budgets"]) - P["x0"]
    use = v["usable"] & (True if keep is None else keep)
    out = {k: np.where((use & np.isfinite(v[k])).sum(1)[:, None] >= 3, line(x, v[k], use), np.nan) for k in names}
    floors = {f"{k} floor": floor_law(x, v[k], use) for k in names if k == "L" or k in P["metrics"]}
    return out | floors | {"enough": use.sum(1) >= 3}


def at(law, name, x):
    """A law's value at x = ln C - x0: 'N', 'D', 'L' from the straight lines, 'L floor' from L_inf + K exp(-g x); so for metrics."""
    if name.endswith(" floor"):
        L, K, g = law[name].T
        return L + K * np.exp(-g * x)
    return np.exp(np.clip(law[name][:, 0] + law[name][:, 1] * x, -700, 700))  # a wild resample must not overflow


# ------------------------------------------------------------------------------ the second opinion: E + A N^-alpha + B D^-beta

def parametric_terms(theta, n, d, y, w):
    """Sum of Huber losses of ln(E + A N^-alpha + B D^-beta) - ln L, its gradient (R, 5) and Hessian (R, 5, 5).

    theta (R, 5) = ln E, ln A', ln B', ln alpha, ln beta, where A' and B' are the terms' sizes at the mean ln N and ln D: with
    centred logs level and exponent hardly correlate. The SUM, because with the mean an optimiser's usual tolerances are
    met at its starting point (the known trap). n, d (n,) centred logs; y = ln L and weights w (R, n).
    """
    e, a, b, la, lb = theta.T[..., None]
    sn, sd = -np.exp(la) * n, -np.exp(lb) * d                              # of ln A N^-alpha: derivative to ln alpha
    terms = np.stack([e + 0 * n, a + sn, b + sd])
    top = terms.max(0)
    f = top + np.log(np.exp(terms - top).sum(0))
    p = np.exp(terms - f)                                                  # the share of each term
    r = f - y
    size = np.abs(r)
    value = (w * np.where(size < HUBER, r * r / 2, HUBER * (size - HUBER / 2))).sum(1)
    slope, bend = w * np.clip(r, -HUBER, HUBER), w * (size < HUBER)        # Huber's first and second derivative
    J = np.stack([*p, p[1] * sn, p[2] * sd], 1)                            # (R, 5, n)
    gradient = (J @ slope[..., None])[..., 0]
    H = (J * (bend - slope)[:, None]) @ J.swapaxes(1, 2)                   # the Hessian of f: p G G' summed, minus J J'
    s = slope * p
    for i, j, h in ((0, 0, s[0]), (1, 1, s[1]), (2, 2, s[2]), (1, 3, s[1] * sn), (2, 4, s[2] * sd),
                    (3, 3, s[1] * sn * (sn + 1)), (4, 4, s[2] * sd * (sd + 1))):
        H[:, i, j] += h.sum(1)
        H[:, j, i] += h.sum(1) if i != j else 0
    M = (J * (w * np.minimum(1, HUBER / np.maximum(size, 1e-300)))[:, None]) @ J.swapaxes(1, 2)
    return value, gradient, H, M


def descend(theta, n, d, y, w, steps=300):
    """Minimise from R starts at once, damped Newton: steps (H + damping M)^-1 gradient, where M (reweighted least squares)
    is never indefinite and bounds the Huber loss from above, so that enough damping always goes down.
    Returns theta (R, 5), objective (R,), gradient norm (R,)."""
    theta, w, y = theta.copy(), np.broadcast_to(w, (len(theta), len(n))), np.broadcast_to(y, (len(theta), len(n)))
    value, gradient, H, M = parametric_terms(theta, n, d, y, w)
    damping = np.ones(len(theta))
    live = np.arange(len(theta))
    for _ in range(steps):
        live = live[(np.linalg.norm(gradient[live], axis=1) > 1e-11) & (damping[live] < 1e12)]
        if not len(live):
            break
        m = M[live] + 1e-9 * np.trace(M[live], axis1=1, axis2=2)[:, None, None] * np.eye(5) + 1e-14 * np.eye(5)
        step = -np.linalg.solve(H[live] + damping[live, None, None] * m, gradient[live][..., None])[..., 0]
        trial = theta[live] + np.clip(step, -1, 1)                         # one log-unit at most
        new = parametric_terms(trial, n, d, y[live], w[live])
        better = new[0] <= value[live]
        now = live[better]
        theta[now], value[now], gradient[now], H[now], M[now] = trial[better], *(a[better] for a in new)
        damping[live] = np.where(better, damping[live] / 5, damping[live] * 4 + 1e-12)
    return theta, value, np.linalg.norm(gradient, axis=1)


def projected_start(n, d, y):
    """Variable projection: for every (alpha, beta) of a grid E, A', B' are linear and solved for; the best positive triple."""
    best, start = math.inf, None
    for alpha in np.geomspace(0.05, 2, 16):
        for beta in np.geomspace(0.05, 2, 16):
            X = np.stack([np.ones_like(n), np.exp(-alpha * n), np.exp(-beta * d)], 1) / np.exp(y)[:, None]
            c = np.maximum(np.linalg.lstsq(X, np.ones_like(y), rcond=None)[0], 1e-3 * np.exp(y.min()))
            error = ((X @ c - 1) ** 2).sum()
            if error < best:
                best, start = error, np.log([*c, alpha, beta])
    return start


def parametric(P, seed=0, starts=20):
    """The parametric law from its variable-projection start and from `starts` more, within 2 log-units of that.

    Returns a dict of E, A, B, alpha, beta, a = beta/(alpha+beta), b = alpha/(alpha+beta) (the exponents of N* and D* that
    follow on C = kappa N D), objective, gradient_norm and what became of the starts; or {"refused": reason}.
    """
    N, D = np.log(P["N"]), np.log(P["D"])
    for name in ("D", "N"):
        if len(np.unique(P[name])) < 2:
            return {"refused": f"one {name} for all points: its exponent cannot be seen"}
    if len(N) < 8 or len(P["budgets"]) < 3:
        return {"refused": f"{len(N)} points at {len(P['budgets'])} budgets are too few for its five constants (8 at 3 at least)"}
    n, d, y = N - N.mean(), D - D.mean(), np.log(P["loss"])
    first = projected_start(n, d, y)
    random = first + np.random.default_rng(seed).uniform(-2, 2, (starts, 5))
    theta, value, norm = descend(np.vstack([first, random]), n, d, y, np.ones((1, len(n))))
    good = norm < 1e-8
    if not good.any():
        return {"refused": "the optimiser reached no stationary point"}
    best = np.flatnonzero(good)[value[good].argmin()]
    missed = value[best] / HUBER / len(y)  # the mean distance of ln L from the law, and from a constant
    if missed > 0.5 * np.abs(y - np.median(y)).mean():
        return {"refused": f"it does not describe the data: it misses them by {100 * missed:.1f}% on average"}
    agree = int((good & (value <= value[best] + 1e-9)).sum())
    e, a, b, la, lb = theta[best]
    alpha, beta = math.exp(la), math.exp(lb)
    if max(alpha, beta) > 5 or min(alpha, beta) < 0.005 or math.exp(e) < 1e-4 * P["loss"].min():
        return {"refused": f"the data do not fix its constants (E {math.exp(e):.3g}, alpha {alpha:.3g}, beta {beta:.3g})"}
    return {"E": math.exp(e), "A": math.exp(a + alpha * N.mean()), "B": math.exp(b + beta * D.mean()), "alpha": alpha,
            "beta": beta, "a": beta / (alpha + beta), "b": alpha / (alpha + beta), "kappa": P["kappa"],
            "objective": float(value[best]), "gradient_norm": float(norm[best]), "starts": starts + 1, "starts_agree": agree,
            "starts_discarded": starts + 1 - agree, "_theta": theta[best], "_n": n, "_d": d}


def parametric_loss(p, N, D):
    return p["E"] + p["A"] * N ** -p["alpha"] + p["B"] * D ** -p["beta"]


def parametric_optimum(p, C):
    """N and D that minimise it on C = kappa N D: N = (alpha A / beta B)^(1/(alpha+beta)) (C/kappa)^a."""
    N = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"])) * (C / p["kappa"]) ** p["a"]
    return N, C / p["kappa"] / N


# -------------------------------------------------------------------------------------------- how good is each budget's fit

def unusable(P, v, b, what):
    """Why `what` has no vertex at budget b, in words; None where it has one. v from parabolas(), R = 1."""
    sizes = np.unique(np.log(P["N"][(P["budget"] == b) & v["window"][0]]))
    if len(sizes) < 4:
        return f"fewer than 4 sizes ({len(sizes)})"
    if not v["curvature"][0, b] > 0:
        return "concave parabola: no minimum"
    if not sizes[0] < v["N"][0, b] < sizes[-1]:
        return f"no interior minimum: {what} still falls at the {'smallest' if v['N'][0, b] <= sizes[0] else 'largest'} model"


def quality(P, v):
    """Per budget: the reason if it is not used, flags in words, the cubic's vertex. Per point: residual and leverage.

    And the noise of loss and metrics, for resample(): scale[name] (n,) its standard deviation at each point's budget, and rho, the
    correlation of two errors of one run. With r = M e the loss's standardised residuals and K marking pairs of one run at two
    budgets, E[r' K r] = rho tr(K M K M): solved for rho, so that residuals being smaller and less correlated than errors is paid
    for. mix (k, k) turns independent errors of loss and metrics into errors correlated as their residuals are.
    """
    n, names = len(P["N"]), (*P["metrics"], "L")
    M, unit = np.zeros((n, n)), {k: np.zeros(n) for k in names}
    q = {"residual": np.zeros(n), "reason": [], "flags": [], "cubic": []}
    q |= {"fitted": {k: P["Y"][k][0].copy() for k in names}, "scale": {k: np.zeros(n) for k in names}}
    for b in range(len(P["budgets"])):
        i = np.flatnonzero((P["budget"] == b) & v["window"][0])
        x, y, best, curved = np.log(P["N"][i]), P["Y"]["L"][0, i], v["N"][0, b], v["curvature"][0, b]
        sizes, flags, reason, cubic = np.unique(x), [], unusable(P, v, b, "the loss"), math.nan
        if not reason:
            for k in names:  # the loss comes last: what follows the loop is about its X, G, r and error
                j = i[np.isfinite(P["Y"][k][0, i])]
                if len(np.unique(P["N"][j])) < 4:
                    continue
                X, free = (np.log(P["N"][j]) - np.log(P["N"][j]).mean())[:, None] ** np.arange(4), len(j) - 3
                G = np.linalg.inv(X[:, :3].T @ X[:, :3])
                m = np.eye(len(j)) - X[:, :3] @ G @ X[:, :3].T
                r = m @ P["Y"][k][0, j]
                error = math.sqrt(r @ r / free)
                q["fitted"][k][j] -= r
                unit[k][j], q["scale"][k][j] = r / max(error, 1e-300), error
            M[np.ix_(i, i)], q["residual"][i], h = m, r, 1 - np.diag(m)
            if curved < stdtrit(free, 0.975) * error * math.sqrt(G[2, 2]):
                flags.append("curvature not significant")
            if abs(best - (sizes[0] + sizes[-1]) / 2) > 0.25 * (sizes[-1] - sizes[0]):
                flags.append("vertex off centre")
            if len(sizes) >= 5:
                c = np.linalg.lstsq(X, y, rcond=None)[0]
                inner = c[2] ** 2 - 3 * c[1] * c[3]
                if inner > 0 and c[2] > 0:  # the cubic's minimum, written so that a vanishing c3 gives the parabola's
                    cubic = x.mean() - c[1] / (c[2] + math.sqrt(inner))
                if not abs(cubic - best) < math.log(1.25):
                    flags.append(f"cubic disagrees (N* x{math.exp(cubic - best):.2f})" if cubic == cubic else "cubic has no minimum")
                if free >= 2 and error > 1e-9:
                    # Leave one out: a point's distance from the parabola through the others, in the errors of that parabola.
                    room = np.maximum(1 - h, 1e-9)
                    t = r / np.sqrt(np.maximum((r @ r - r**2 / room) / (free - 1), 1e-30) * room)
                    flags += [f"point off by {100 * math.expm1(r[j] / room[j]):+.2g}% at N = {math.exp(x[j]):.4g}"
                              for j in np.flatnonzero(np.abs(t) > -stdtrit(free - 1, 0.025 / len(x)))]
        q["reason"].append(reason)
        q["flags"].append(flags)
        q["cubic"].append(cubic)
    K = (P["run"][:, None] == P["run"]) & (P["budget"][:, None] != P["budget"])
    KM = K @ M
    q["rho"] = float(np.clip(unit["L"] @ K @ unit["L"] / max((KM * KM.T).sum(), 1e-300), 0, 1))
    q["nested"] = P["nested"] if P["nested"] is not None else q["rho"] > 0.25
    u = np.stack([unit[k] for k in ("L", *P["metrics"])])
    norms = np.sqrt(u**2 @ (u != 0).T)                                     # over the points that have both metrics of a pair
    correlation = u @ u.T / np.maximum(norms * norms.T, 1e-300)
    np.fill_diagonal(correlation, 1)
    values, vectors = np.linalg.eigh(correlation)                          # taken pairwise it may have negative ones: cut off
    # Of its square roots the triangular one: the loss's error is the first alone, and the metrics' are drawn given it.
    root = np.linalg.qr((vectors * np.sqrt(np.maximum(values, 0))).T)[1].T
    q["mix"] = root / np.linalg.norm(root, axis=1, keepdims=True) * [np.sign(root[0, 0]), *np.ones(len(u) - 1)]
    return q


# --------------------------------------------------------------------------------------------------- intervals by resampling

def resample(P, q, R, rng):
    """R variants of the data: weights W (R, n) and logs Y[name] (R, n), as parabolas() takes them.

    Independent points are drawn with replacement inside each budget. Points that share runs have correlated errors, and
    drawing whole runs leaves five or six of nine sizes at every budget at once: windows of another shape, and intervals far
    too wide. So nested points keep their sizes and get new errors, of the variance measured at each budget and the
    correlation measured along runs. Share of intervals that cover, and their width over that of the t interval of the
    log-log line, for a true correlation of 0.7 and 6 budgets over 1.5 decades (200 to 400 data sets a cell). The t interval
    is too narrow here; `needed` is the width that an interval of constant width must have to cover 95%:

        sizes, noise            whole runs     residuals, one sign a run     this           the t interval    needed
         9 over +-8x,  0.3%     .98   2.3      .89   1.4                     .90   1.3      .74               1.4
         9 over +-8x,  0.1%    1.00   3.5      .92   1.6                     .91   1.4      .75               1.4
        11 over +-12x, 0.2%                    .92   1.3                     .92   1.3      .78               1.5

    (Widening it by Student's t for the few runs gave .91 and 1.5.) Independent points, drawn: .98 and 1.0 (9 sizes over
    +-4x, 0.3%), 1.00 and 1.2 (+-8x, 0.1%).

    Errors of loss and metrics correlate as their residuals do, since in a difference of two metrics what they share cancels: the
    slope of a constant offset is covered .89 to .99 (with one error for all of them .57, and 1.00 at three times the width with
    errors of their own). The metrics' generator is a child of the loss's, whose law they so leave as it is to the bit.
    """
    n, names = len(P["N"]), ("L", *P["metrics"])
    if q["nested"]:
        errors = []
        for g in (rng, *rng.spawn(1) * len(P["metrics"])):
            shared = g.standard_normal((R, P["run"].max() + 1))[:, P["run"]]
            errors.append(math.sqrt(q["rho"]) * shared + math.sqrt(1 - q["rho"]) * g.standard_normal((R, n)))
        errors = np.einsum("kj,jrn->krn", q["mix"], errors)
        return np.ones((R, n)), {k: q["fitted"][k] + q["scale"][k] * e for k, e in zip(names, errors)} | {"D": P["Y"]["D"]}
    W = np.zeros((R, n))
    for b in range(len(P["budgets"])):
        i = np.flatnonzero(P["budget"] == b)
        W[:, i] = rng.multinomial(len(i), np.full(len(i), 1 / len(i)), R)
    return W, P["Y"]


def interval(draws):
    """The middle 95% of the finite draws as [lo, hi]; None where fewer than 20 are left to tell."""
    draws = draws[np.isfinite(draws)]
    return [float(e) for e in np.quantile(draws, [0.025, 0.975])] if len(draws) >= 20 else None


def bootstrap(P, q, second, R, seed, bar):
    """Every step repeated on R resamples, a hundred at once: windows, parabolas, lines, floor, parametric (warm-started).

    Returns the vertices (R, B) of parabolas(), "laws" as from laws() but nan where fewer than 3 budgets were usable, and
    "theta" (R, 5), nan where the parametric form did not converge.
    """
    rng, vertices, thetas = np.random.default_rng(seed), [], []
    with tqdm(total=R, desc="bootstrap", unit=" resamples", disable=None if bar else True, leave=False) as progress:
        for start in range(0, R, 100):
            W, Y = resample(P, q, min(100, R - start), rng)
            vertices.append(parabolas(P, W, Y))
            theta, norm = np.full((len(W), 5), np.nan), np.zeros(len(W))
            if "refused" not in second:
                theta, _, norm = descend(np.tile(second["_theta"], (len(W), 1)), second["_n"], second["_d"], Y["L"], W)
            thetas.append(np.where(norm[:, None] < 1e-8, theta, np.nan))
            progress.update(len(W))
    draws = {k: np.concatenate([v[k] for v in vertices]) for k in vertices[0] if k != "window"}
    found = laws(P, draws, names=P["lines"])
    draws["laws"] = {k: np.where(found["enough"][:, None], a, np.nan) for k, a in found.items() if k != "enough"}
    return draws | {"enough": found["enough"], "theta": np.concatenate(thetas)}


# ------------------------------------------------------------------------------------------------------------- the whole fit

def fit(records, metric="val_loss_ema", n_kind="blocks", resamples=1000, seed=0, bar=False):
    """Records -> the law: a dict with the keys of law.json, and the arrays that plans and pictures need under "_".

    Raises Refused when neither three budgets nor the parametric form can be fitted, BadInput when the records do not match.
    """
    P = points(records, metric, n_kind)
    W = np.ones((1, len(P["N"])))
    v = parabolas(P, W, P["Y"])
    q, base = quality(P, v), laws(P, v, names=P["lines"])
    usable, second = v["usable"][0], parametric(P, seed)
    few = f"{usable.sum()} usable budgets of {len(usable)}, a line needs 3"
    if usable.sum() < 3 and "refused" in second:
        named = [f"C = {C:.3g}: {r}" for C, r in zip(P["budgets"], q["reason"]) if r]
        raise Refused(f"{few} ({'; '.join(named[:3])}{'; ...' * (len(named) > 3)}); parametric form: {second['refused']}")
    draws = bootstrap(P, q, second, resamples, seed, bar)
    single, kept = "N" in P["records"][0], P["records"]
    law = {"schema": 1, "metric": "loss" if single else metric, "n_kind": "as given" if single else n_kind,
           "c_kind": kept[0].get("count", "as given"), "runs": int(P["run"].max() + 1), "n_points": len(kept),
           "nested": bool(q["nested"]), "error_correlation": q["rho"], "resamples": resamples, "seed": seed,
           "reasons": {}, "_": {"P": P, "v": v, "q": q, "base": base, "draws": draws, "second": second}}
    law["budgets"] = []
    for b, used in enumerate(usable):
        at_b = lambda name: float(np.exp(v[name][0, b])) if used else None
        law["budgets"].append({"C": float(P["budgets"][b]), "n_points": int((P["budget"] == b).sum()), "used": bool(used),
                               "reason": q["reason"][b], "N_opt": at_b("N"), "D_opt": at_b("D"), "loss_opt": at_b("L"), "N_opt_ci95":
                               used and interval(np.exp(draws["N"][draws["usable"][:, b], b])) or None, "flags": q["flags"][b]})
    law |= {"N_opt": straight(law, "N"), "D_opt": straight(law, "D"), "loss": {"power": straight(law, "L"), "floor": floor_of(law, "L")}}
    law["metrics"] = {k: {"refused": f"not positive at {count} points"} for k, count in P["not_positive"].items()}
    for k in P["metrics"]:
        there = (usable & np.isfinite(v[k][0])).sum()
        law["metrics"][k] = straight(law, k) or {"refused": f"measured at 4 sizes of only {there} usable budgets, a line needs 3"}
        law["metrics"][k] |= {"floor": floor_of(law, k)} if there >= 3 else {}
        law["metrics"][k] |= {"own_optimum": own_optimum(law, k)} if f"N* of {k}" in P["lines"] else {}
    law["offsets"] = offsets(P, v, draws)
    law["parametric"] = {k: x for k, x in second.items() if k[0] != "_"}
    if "refused" not in second:
        E, alpha, beta = np.exp(draws["theta"][:, [0, 3, 4]].T)
        law["parametric"]["ci95"] = {"E": interval(E), "alpha": interval(alpha), "beta": interval(beta),
                                     "a": interval(beta / (alpha + beta))}
        law["parametric"]["resamples_discarded"] = int(np.isnan(E).sum())
    x, every = np.log(P["budgets"]) - P["x0"], parabolas(P, W, P["Y"], factor=math.inf)
    slope = lambda N, use: float(line(x, N, use)[0, 1]) if (use & np.isfinite(N)).sum() >= 3 else None
    methods = {"parabolas": slope(v["N"], v["usable"]), "parabolas over all sizes": slope(every["N"], every["usable"]),
               "cubics": slope(np.array([q["cubic"]]), v["usable"]), "parametric": second.get("a")}
    told = [a for a in methods.values() if a is not None]
    law["method_spread"] = {"exponent_N": [min(told), max(told)] if len(told) > 1 else None, "methods": methods}
    law["how_much_is_enough"], law["backtest"] = extrapolations(law)
    law["noise"] = noise(P, metric)
    if usable.sum() < 3:
        law["reasons"] |= dict.fromkeys(("N_opt", "D_opt", "loss.power", "backtest", "how_much_is_enough"), few)
    elif usable.sum() == 3:
        law["reasons"] |= dict.fromkeys(("backtest", "jackknife95"), "3 usable budgets: a line through the other two proves nothing")
    law["points"] = [{"N": float(P["N"][i]), "D": float(P["D"][i]), "C": float(P["C"][i]), "loss": float(P["loss"][i]),
                      "budget": float(P["budgets"][P["budget"][i]]), "in_window": bool(v["window"][0, i]),
                      "residual": float(q["residual"][i]), "source": r["source"]} for i, r in enumerate(kept)]
    law["warnings"] = warnings(law)
    return law


def straight(law, name):
    """A line of the log-log as value = coefficient C^exponent, with its two intervals; None with fewer than 3 budgets."""
    P, v, base, d = (*(law["_"][k] for k in ("P", "v", "base")), law["_"]["draws"]["laws"][name])
    on = v["usable"][0] & np.isfinite(v[name][0])
    if on.sum() < 3:
        return None
    (p, s), y, k = base[name][0], v[name][0, on], int(on.sum())
    rest = y - p - s * (np.log(P["budgets"][on]) - P["x0"])
    left = np.array([laws(P, v, np.arange(len(on)) != b, (name,))[name][0, 1] for b in np.flatnonzero(on)])
    error = stdtrit(k - 1, 0.975) * math.sqrt((k - 1) / k * ((left - left.mean()) ** 2).sum())
    return {"coefficient": float(at(base, name, -P["x0"])[0]), "exponent": float(s), "ci95": interval(d[:, 1]),
            "coefficient_ci95": interval(at({name: d}, name, -P["x0"])),
            "jackknife95": [float(s - error), float(s + error)] if k > 3 else None,  # a line through 2 says nothing
            "r2": float(1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum())}


def floor_of(law, name):
    """The law with a floor of the loss, "L", or of a metric for law.json, or None with the reason noted."""
    P, v, base, d = (*(law["_"][k] for k in ("P", "v", "base")), law["_"]["draws"]["laws"][f"{name} floor"])
    L, K, g = base[f"{name} floor"][0]
    rises = name != "L" and base[name][0, 1] > 0
    if rises or not L > 0:
        law["reasons"]["loss.floor" if name == "L" else f"metrics.{name}.floor"] = (
            "it rises with C" if rises else "the minima show no floor: L_inf = 0 fits best, which is the pure power law" if L == 0 else
            f"needs 4 usable budgets, there are {(v['usable'] & np.isfinite(v[name])).sum()}")
        return None
    return {"L_inf": float(L), "coefficient": float(K * np.exp(g * P["x0"])), "exponent": float(g), "ci95": interval(d[:, 2]),
            "L_inf_ci95": interval(d[:, 0])}


def own_optimum(law, name):
    """The N best for an FD itself: its line, or "refused", and per budget its value or the reason why there is none. Only at
    budgets that are usable for the loss: at others the noise of the points is not known."""
    P, v, draws, line_of, rows = (*(law["_"][k] for k in ("P", "v", "draws")), f"N* of {name}", [])
    own = alone(P, np.ones((1, len(P["N"]))), P["Y"][name])
    for b, (C, best) in enumerate(zip(P["budgets"], v[line_of][0])):
        reason = unusable(P, own, b, "it") if v["usable"][0, b] else "not usable for the loss"
        rows.append({"C": float(C), "reason": reason, "N_opt": None if reason else told(np.exp([best, *draws[line_of][:, b]]))})
    found, seen = int(np.isfinite(v[line_of]).sum()), np.isfinite(draws["laws"][line_of][:, 0])
    if found < 3:
        return {"refused": f"{found} budgets with an optimum of its own, a line needs 3", "budgets": rows}
    if seen.mean() < 0.9:  # an interval from those that happen to have a minimum need not even hold the value
        return {"refused": f"only {seen.sum()} of {len(seen)} resamples have an optimum of its own at 3 budgets", "budgets": rows}
    return straight(law, line_of) | {"budgets": rows}


def told(d):
    """{"value", "ci95"} of d (1 + R,): first the fit, then its resamples."""
    return {"value": float(d[0]), "ci95": interval(d[1:])}


def offsets(P, v, draws):
    """What metrics have more at N* on other data than on the training data, a list of dicts: difference, and ratio, amid the
    budgets and at each, their slope per decade of C (the ratio's: of its logarithm), and a verdict on each.

    "constant" where the interval of the slope holds 0, else the gap "shrinks" or "widens" (or "rises" or "falls", where its own
    interval holds 0). The paper (arXiv 2410.08184)
    finds a constant difference in loss, VLB and likelihood, and a widening one in FID.
    """
    x, home, out = np.log(P["budgets"]) - P["x0"], P["records"][0].get("data"), []
    for other in P["metrics"]:
        name, data = other.split(" on ", 1)
        if data == home or f"{name} on {home}" not in P["metrics"]:
            continue
        a, b, usable = (np.vstack([v[k], draws[k]]) for k in (f"{name} on {home}", other, "usable"))
        use = usable & np.isfinite(a + b)
        row = {"metric": name, "data": data, "against": home, "budgets": [{"C": float(C)} for C in P["budgets"][use[0]]]}
        out.append(row)
        if use[0].sum() < 3:
            row["refused"] = f"both measured at 4 sizes of only {use[0].sum()} usable budgets, a slope needs 3"
            continue
        for what, gap, scale in (("difference", np.exp(b) - np.exp(a), lambda y: y), ("ratio", b - a, np.exp)):
            level, slope = np.where(use.sum(1) >= 3, line(x, gap, use).T, np.nan)
            row[what], row[f"{what}_per_decade"] = told(scale(level)), told(slope * math.log(10))
            ends = row[f"{what}_per_decade"]["ci95"]
            around = interval(level[1:])   # a gap that may be none has no sign, so it can neither widen nor shrink
            row[f"{what}_is"] = ("unknown" if not (ends and around) else "constant" if ends[0] <= 0 <= ends[1] else
                                 ("rises" if slope[0] > 0 else "falls") if around[0] <= 0 <= around[1] else
                                 "widens" if level[0] * slope[0] > 0 else "shrinks")
            for at_b, i in zip(row["budgets"], np.flatnonzero(use[0])):
                at_b[what] = told(np.where(use, scale(gap), np.nan)[:, i])
    return out


def extrapolations(law):
    """The law from the smallest 3, 4, 5 ... usable budgets, and how it predicts the rest: (rows on the top budget, backtest).

    The backtest is the last two of these laws: the top budget left out, and the top two. With floor from 4 budgets on.
    """
    P, v, draws, rows, tests = (*(law["_"][k] for k in ("P", "v", "draws")), [], [])
    used = np.flatnonzero(v["usable"][0])
    for k in range(3, len(used) + 1):
        keep = np.isin(np.arange(len(P["budgets"])), used[:k])
        few, some, name = laws(P, v, keep), laws(P, draws, keep), "L floor" if k >= 4 else "L"
        some = {key: a[some["enough"]] for key, a in some.items()}
        for b in used[k:] if k < len(used) else used[-1:]:
            x, measured = math.log(P["budgets"][b]) - P["x0"], math.exp(v["L"][0, b])
            predicted, N = float(at(few, name, x)[0]), float(at(few, "N", x)[0])
            one = {"law": "with floor" if k >= 4 else "power", "predicted": predicted, "ci95": interval(at(some, name, x)),
                   "measured": measured, "error": predicted / measured - 1, "N_error": N / math.exp(v["N"][0, b]) - 1}
            if len(used) - 2 <= k < len(used):
                tests.append({"left_out": float(P["budgets"][b]), "budgets_left_out": len(used) - k} | one)
        rows.append({"budgets": k, "beyond": float(P["budgets"][used[-1]] / P["budgets"][used[k - 1]]), "exponent_N": float(
            few["N"][0, 1]), "exponent_N_ci95": interval(some["N"][:, 1]), "exponent_L": float(few["L"][0, 1]),
            "exponent_L_ci95": interval(some["L"][:, 1])} | one)
    return rows, tests[::-1]


def noise(P, metric):
    """How noisy is a point: the standard error of the paired difference between neighbouring sizes, and the spread over seeds.

    All runs are validated on the same images, times and noises, so what blurs a parabola is the error of the difference
    between two sizes, taken image by image; in percent of the loss, like the standard deviation of ln loss over seeds.
    """
    errors, spread = [], []
    for b in range(len(P["budgets"])):
        i = np.flatnonzero(P["budget"] == b)
        sizes = [i[P["N"][i] == size] for size in np.unique(P["N"][i])]
        seeds = [s[P["C"][s] == P["C"][s[0]]] for s in sizes]  # without a budget column C may differ within a budget
        spread += [P["Y"]["L"][0, s].var(ddof=1) for s in seeds if len(s) > 1]
        files = [Path(P["records"][s[0]]["source"]).with_name("val_losses_ema.npy") for s in sizes]
        for pair in zip(files, files[1:]) if metric == "val_loss_ema" else ():
            if all(f.is_file() for f in pair):
                try:
                    one, two = (np.load(f, allow_pickle=False).astype(float) for f in pair)
                    errors.append(100 * (one - two).std(ddof=1) / math.sqrt(len(one)) / two.mean())
                except (ValueError, EOFError):
                    raise BadInput(f"{pair[0]} or its neighbour {pair[1]}: torn, or not the losses of the same images")
    return {"paired_se_percent": {"median": float(np.median(errors)), "worst": float(max(errors))} if errors else None,
            "paired_se_reason": None if errors else "no val_losses_ema.npy beside the records, or another metric",
            "seed_spread_percent": 100 * math.sqrt(float(np.mean(spread))) if spread else None,
            "seed_spread_reason": None if spread else "one seed only"}


def warnings(law):
    """What a reader must know before using the law, in words."""
    w, P, base, draws = [], *(law["_"][k] for k in ("P", "base", "draws"))
    used, rejected = [b for b in law["budgets"] if b["used"]], int((~draws["enough"]).sum())
    if P["dropped"]:
        w.append(f"{P['dropped']} points given twice with the same loss: counted once")
    if len(used) < len(law["budgets"]):
        w.append(f"{len(law['budgets']) - len(used)} of {len(law['budgets'])} budgets are not used, for the reasons beside them")
    if rejected and used:
        w.append(f"{rejected} of {law['resamples']} resamples left fewer than 3 usable budgets and are not in the intervals")
    flat = sum("curvature not significant" in b["flags"] for b in used)
    if flat:
        w.append(f"at {flat} budgets the parabola's curvature is not significant: more sizes or less noise would help there")
    if law["N_opt"]:
        decade = used[-1]["C"] / used[0]["C"]
        if decade < 10:
            w.append(f"the usable budgets span only a factor {decade:.1f} in C: an exponent from less than a decade is a guess")
        a, (lo, hi) = law["parametric"].get("a"), law["N_opt"]["ci95"] or (-math.inf, math.inf)
        if a and not lo <= a <= hi:
            w.append(f"the parametric form disagrees on N*: exponent {a:.3f}, outside the parabolas' {lo:.3f} to {hi:.3f}")
        jack = law["N_opt"]["jackknife95"]
        if jack and jack[1] - jack[0] > 1.5 * (hi - lo):
            w.append("the budgets scatter around the line of N* more than their points' noise explains: take the jackknife's interval")
        spread = law["method_spread"]["exponent_N"]
        if spread and spread[1] - spread[0] > hi - lo:
            w.append(f"the methods differ by {spread[1] - spread[0]:.3f} in the exponent of N*, more than its interval is wide")
    epochs = max(float(record.get("epochs") or 0) for record in P["records"])
    if epochs > 1:
        w.append(f"these runs saw each image up to {epochs:.1f} times; the paper saw each once. Repeated images teach less, so the best N and "
                 "the loss at large budgets are those of a data set of this size")
    if law["loss"]["floor"]:
        x = math.log(250 * P["budgets"].max()) - P["x0"]
        gap = 100 * float(at(base, "L", x)[0] / at(base, "L floor", x)[0] - 1)
        w.append(f"at 250 times the top budget the pure power law is {abs(gap):.1f}% {'below' if gap < 0 else 'above'} the law with "
                 "a floor: do not extrapolate it that far")
    if P["nested"] is None:
        w.append(f"no run column: the errors of the same N at different budgets correlate {law['error_correlation']:.2f}, so points are "
                 "taken for " + ("one run per N, read at several budgets" if law["nested"] else "independent runs"))
    return w


# -------------------------------------------------------------------------------------------------- what follows from the law

def parse_plan(text):
    """'1.5e21', or devices x hours x MFU as '8xH100:72h:0.4' (an unknown device by its peak TFLOP/s, '8x312:72h:0.4')
    -> C in FLOPs, and the FLOP/s of one device or None."""
    try:
        if ":" not in text:
            C, speed = float(text), None
        else:
            devices, hours, mfu = text.split(":")
            count, name = devices.split("x", 1)
            peak = {k.lower(): p for k, p in PEAK.items()}.get(name.lower()) or float(name)
            if not 0 < float(mfu) <= 1:
                raise BadInput(f"--plan {text}: the MFU must lie in (0, 1], not {mfu}")
            speed = peak * 1e12 * float(mfu)
            C = int(count) * speed * float(hours[:-1]) * {"h": 3600, "d": 86400, "m": 60}[hours[-1]]
        if not 0 < C < math.inf:
            raise ValueError
        return C, speed
    except (ValueError, KeyError, IndexError):
        raise BadInput(f"--plan {text}: neither FLOPs (1.5e21) nor devices:hours:MFU (8xH100:72h:0.4); known devices: "
                       f"{', '.join(PEAK)}; others by their peak TFLOP/s (8x312:72h:0.4)")


def plan(law, text):
    """The run to make with a budget, every number as {"value", "ci95"}: N and D with what they mean in depth, width, images, steps
    and device-hours, loss and metrics to expect, the price of another N, and how far this lies beyond the data."""
    C, speed = parse_plan(text)
    P, base, second, draws = (law["_"][k] for k in ("P", "base", "second", "draws"))
    x, records = math.log(C) - P["x0"], P["records"]
    both = lambda name, per=1: {"value": float(at(base, name, x)[0]) / per, "ci95": interval(at(draws["laws"], name, x) / per)}
    out = {"asked": text, "C": C, "times_beyond_the_data": C / float(P["budgets"].max()), "N": both("N"), "D": both("D"),
           "loss_power": both("L"), "loss_floor": both("L floor") if law["loss"]["floor"] else None, "loss_parametric": None,
           "metrics": {k: both(k) for k, m in law["metrics"].items() if "refused" not in m}}
    # At a fixed budget ln L is a parabola in ln N, so half or twice the best N costs curvature (ln 2)^2.
    cost = lambda v: np.expm1(np.nanmedian(np.where(v["usable"], v["curvature"], np.nan)[v["usable"].any(1)], 1) * math.log(2) ** 2)
    out["cost_of_N_half_or_twice"] = {"value": float(cost(law["_"]["v"])[0]), "ci95": interval(cost(draws))}
    if "refused" not in second:
        loss = lambda f: parametric_loss(second, *(n * g for n, g in zip(parametric_optimum(second, C), (f, 1 / f))))
        out |= {"loss_parametric": loss(1), "cost_of_N_half_parametric": loss(0.5) / loss(1) - 1,
                "cost_of_N_twice_parametric": loss(2) / loss(1) - 1}
    per_image, out["batch"] = tokens_per_image(P), max(records, key=lambda r: r["C"]).get("batch")
    out["images"] = both("D", per_image) if per_image else None
    out["steps"] = out["images"]["value"] / out["batch"] if per_image and out["batch"] else None
    out["depth"], out["width"] = family(P, out["N"]["value"])
    speed = speed or flops_per_second(P)
    out["device_hours"] = C / speed / 3600 if speed else None
    missing = [k for k in ("images", "steps", "depth", "device_hours") if out[k] is None]
    out["reason"] = f"{', '.join(missing)} unknown: the records do not tell" if missing else None
    return out


def paper_plan(text):
    """The same from the paper's own coefficients and its family: width = 64 depth, batch 1024."""
    C, _ = parse_plan(text)
    N, D, L = (k * C**p for k, p in (PAPER[name] for name in "NDL"))
    depth = round((N / 12 / PAPER_ASPECT**2) ** (1 / 3))
    return {"asked": text, "C": C, "N": N, "D": D, "train_loss": L, "images": D / PAPER_TOKENS,
            "steps": D / PAPER_TOKENS / PAPER_BATCH, "depth": depth, "width": PAPER_ASPECT * depth}


def family(P, N):
    """(depth, width) of the records' family nearest to N, as N ~ depth width^2; (None, None) where they have no depth."""
    records = P["records"]
    if not all(r.get("depth") and r.get("width") for r in records):
        return None, None
    big = int(P["N"].argmax())  # with all parameters counted the ratio drifts: take it where the plan is nearest
    ratio = P["N"][big] / records[big]["depth"] / records[big]["width"] ** 2
    head, depths = records[0].get("head_dim") or 1, {r["depth"] for r in records}
    aspects = [r["width"] / r["depth"] for r in records]
    if len(depths) == 1:
        return min(((d, w * head) for d in depths for w in range(1, 4096)), key=lambda c: abs(math.log(ratio * c[0] * c[1] ** 2 / N)))
    # Of the shapes within the family's aspects the one nearest in N, and of near ones the one of the usual aspect.
    choices = [(d, w * head) for d in range(1, 513) for w in range(max(1, int(min(aspects) * d / head)), int(max(aspects) * d / head) + 2)
               if min(aspects) <= w * head / d <= max(aspects)]
    return min(choices, key=lambda c: abs(math.log(ratio * c[0] * c[1] ** 2 / N)) + 0.1 * abs(math.log(c[1] / c[0] / np.median(aspects))))


def tokens_per_image(P):
    """Tokens of one image with its caption and time; None where the records do not count images, or differ."""
    ratios = [r["D"] / r["images"] for r in P["records"] if r.get("images")]
    return float(np.median(ratios)) if ratios and max(ratios) < 1.01 * min(ratios) else None


def flops_per_second(P):
    """Median speed of one device over the points of the largest budget; None where the records do not tell."""
    speeds = [r["C"] / r["device_hours"] / 3600 for r in P["records"]
              if r.get("device_hours") and r["C"] > 0.9 * P["budgets"].max()]
    return float(np.median(speeds)) if speeds else None


def side_by_side(laws_):
    """Laws by name -> a row for each: its exponents, and N* and loss at one C amid the data of all, each with its interval."""
    C, rows = math.exp(np.mean([law["_"]["P"]["x0"] for law in laws_.values()])), []
    for name, law in laws_.items():
        drawn, base, x = law["_"]["draws"]["laws"], law["_"]["base"], math.log(C) - law["_"]["P"]["x0"]
        rows.append({"results": name, **{f"exponent of {label}": {"value": float(base[k][0, 1]), "ci95": interval(drawn[k][:, 1])}
                                         for k, label in (("N", "N*"), ("D", "D*"), ("L", "loss"))},
                     **{f"{label} at C": {"value": float(at(base, k, x)[0]), "ci95": interval(at(drawn, k, x))}
                        for k, label in (("N", "N*"), ("L", "loss"))}})
    return {"C": C, "rows": rows}


def compare(one, two, names, budgets):
    """Two laws side by side: differences with intervals, where the losses cross, how much compute B saves, the paper's reading.

    The two bootstraps are independent, so differences of their draws are a bootstrap of the difference.
    """
    for law, name in zip((one, two), names):
        if not law["N_opt"]:
            raise Refused(f"--compare needs the laws of N*, D* and loss on both sides, {name} has none: {law['reasons']['N_opt']}")
    x0 = [law["_"]["P"]["x0"] for law in (one, two)]
    m = min(len(law["_"]["draws"]["enough"]) for law in (one, two))
    both = [{k: np.vstack([law["_"]["base"][k], law["_"]["draws"]["laws"][k][:m]]) for k in "NDL"} for law in (one, two)]
    amid = math.exp(sum(x0) / 2)  # levels are compared amid the data: at C = 1 they would be an extrapolation
    out = {"A": names[0], "B": names[1], "exponents": [], "levels": [], "C": amid}
    for k, label in (("N", "N*"), ("D", "D*"), ("L", "loss")):
        a, b = (law[k][:, 1] for law in both)
        out["exponents"].append({"exponent of": label, "A": float(a[0]), "B": float(b[0]), "B-A": told(b - a)})
        a, b = (at(law, k, math.log(amid) - x) for law, x in zip(both, x0))
        out["levels"].append({"level of": label, "A": float(a[0]), "B": float(b[0]), "B/A": told(b / a)})
    (pa, qa), (pb, qb) = (law["L"].T for law in both)
    pa, pb = pa - qa * x0[0], pb - qb * x0[1]  # ln loss = p + q ln C
    # +1, -1, or 0 where the interval of the difference holds 0: then the data cannot tell
    n, _, steeper = (0 if not c or c[0] <= 0 <= c[1] else math.copysign(1, c[0])
                     for c in (d["B-A"]["ci95"] for d in out["exponents"]))
    if steeper:
        meet = np.exp(np.clip((pa - pb) / (qb - qa), -300, 300))
        out["crossing"] = told(meet)
    else:
        out["crossing"] = {"value": None, "ci95": None,
                           "reason": "the loss exponents do not differ within their interval, the curves may be parallel"}
    out["multiplier"] = [{"C": float(C)} | told(np.exp((pb + qb * math.log(C) - pa) / qa - math.log(C))) for C in budgets]
    ra, rb = (law["_"]["P"]["records"][0] for law in (one, two))
    out["warnings"] = [f"{k} differs ({ra.get(k)} and {rb.get(k)}): the axes do not mean the same" for k in ("count", "resolution")
                       if ra.get(k) != rb.get(k)]
    # The paper: on the same data a better model has the smaller N exponent and the larger D exponent; better data do the
    # opposite; either makes the exponent of the loss more negative.
    changed = [word for word, keys in (("the model", ["arch"]), ("the data", ["data", "captions", "train_images"]))
               if any(ra.get(k) != rb.get(k) for k in keys)]
    better = {1: "A", -1: "B"}.get(steeper)
    out["reading"] = (f"By their records {' and '.join(changed) or 'neither model nor data'} changed from A to B. " +
                      (f"{better}'s loss falls faster with compute. " if better else
                       "These data cannot tell whose loss falls faster: the exponents agree within their interval. ") +
                      (f"N* grows {'faster' if n > 0 else 'more slowly'} with compute in B, which the paper reads as "
                       f"{'better data or a worse model' if n > 0 else 'a better model or worse data'} in B." if n else
                       "Nor can they tell better model from better data: the exponents of N* agree within their interval."))
    return out


# ---------------------------------------------------------------------------------------------------------- the page to read

def show(x):
    """A number, an interval, a {"value", "ci95"}, or a list of words, for a reader; "-" for what is missing."""
    if isinstance(x, dict):
        return f"{show(x['value'])} {show(x['ci95'])}"
    if isinstance(x, (list, tuple)):
        return "; ".join(x) if not x or isinstance(x[0], str) else f"[{', '.join(show(e) for e in x)}]"
    return "-" if x is None else f"{x:.4g}" if isinstance(x, float) else str(x)


def table(rows, *names):
    """Rows (dicts) as a Markdown table of these columns, padded so that it also reads well in a terminal. Errors in percent."""
    cell = lambda row, k: f"{100 * row[k]:+.2f}%" if k.endswith("error") else show(row.get(k))
    cells = [list(names), *[[cell(row, k) for k in names] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:], ""] if rows else []


def page(law, reference=False):
    """law.md, which is also what the command prints. Columns are named as in law.json."""
    f, s, n = law["loss"]["floor"], law["parametric"], law["noise"]
    laws_ = {"N*": law["N_opt"], "D*": law["D_opt"], "loss": law["loss"]["power"]} | law["metrics"]
    own = {k: m["own_optimum"] for k, m in law["metrics"].items() if "own_optimum" in m}
    laws_ |= {f"N* of {k}": o for k, o in own.items()}
    rows = [{"law": k} | m for k, m in laws_.items() if m and "refused" not in m]
    for row, (_, exponent) in zip(rows, (PAPER[k] for k in "NDL") if reference else ()):
        row["the paper's exponent"] = exponent
    out = [f"# The law of {law['metric']}", "",
           f"{law['n_points']} points of {law['runs']} runs at {len(law['budgets'])} budgets. N: {law['n_kind']}; C: {law['c_kind']}. "
           f"Intervals 95% from {law['resamples']} resamples; " + (
               f"points share runs, errors correlate {law['error_correlation']:.2f} along a run." if law["nested"] else
               "points independent."), "", "value = coefficient C^exponent:", ""]
    out += table(rows, "law", "exponent", "ci95", "jackknife95", "coefficient", "r2", *["the paper's exponent"] * reference)
    out += [f"No line: {law['reasons']['N_opt']}."] if not law["N_opt"] else []
    out += [f"{k}: no law, {m['refused']}." for k, m in laws_.items() if m and "refused" in m]
    out += [f"{o['metric']} on {o['data']}: no offset, {o['refused']}." for o in law["offsets"] if "refused" in o]
    out.append(f"With floor: loss = {show(f['L_inf'])} {show(f['L_inf_ci95'])} + {show(f['coefficient'])} C^-{show(f['exponent'])} "
               f"{show(f['ci95'])}." if f else f"With floor: none, {law['reasons']['loss.floor']}.")
    out.append(f"Parametric: refused, {s['refused']}." if "refused" in s else
               f"Parametric: loss = {show(s['E'])} + {show(s['A'])} N^-{show(s['alpha'])} + {show(s['B'])} D^-{show(s['beta'])}, so N* ~ "
               f"C^{show(s['a'])} {show(s['ci95']['a'])}; {s['starts_agree']} of {s['starts']} starts agree.")
    paired, seeds = n["paired_se_percent"], n["seed_spread_percent"]
    out += ["Exponent of N* by method: " + ", ".join(f"{k} {show(a)}" for k, a in law["method_spread"]["methods"].items()) + ".",
            "Noise, % of the loss: paired standard error between neighbouring sizes " +
            (f"{show(paired['median'])} in the median, {show(paired['worst'])} at worst" if paired else
             f"unknown ({n['paired_se_reason']})") + "; spread over seeds " + (show(seeds) if seeds else f"unknown ({n['seed_spread_reason']})") + ".", ""]
    scraps = [b for b in law["budgets"] if (b["reason"] or "").startswith("fewer than 4")]
    out += table([b | {"remarks": b["flags"] if b["used"] else f"NOT USED: {b['reason']}"} for b in law["budgets"] if b not in scraps],
                 "C", "n_points", "N_opt", "N_opt_ci95", "D_opt", "loss_opt", "remarks")
    if scraps:
        out += [f"NOT USED: {len(scraps)} budgets from C = {show(scraps[0]['C'])} to {show(scraps[-1]['C'])}, fewer than 4 sizes.", ""]
    both = [f"{what}{k}" for what in ("difference", "ratio") for k in ("", "_per_decade", "_is")]
    for title, rows, names in (
            ("Metrics with a floor: value = L_inf + coefficient C^-exponent", [
                {"law": k} | m["floor"] for k, m in law["metrics"].items() if m.get("floor")],
             ("law", "L_inf", "L_inf_ci95", "coefficient", "exponent", "ci95")),
            ("Offsets: other data against the training data at N* (constant: the slope's interval holds 0; for a ratio of its logarithm). All "
             "intervals are for the images evaluated: the standard error that these leave is in the records",
             [o for o in law["offsets"] if "refused" not in o], ("metric", "data", *both)),
            ("The model best for FD, beside N_opt, the best for the loss", [
                {"C": b["C"], "N_opt": b["N_opt"]} | {k: o["budgets"][i]["reason"] or o["budgets"][i]["N_opt"] for k, o in own.items()}
                for i, b in enumerate(law["budgets"])] if own else None, ("C", "N_opt", *own)),
            ("Backtest: the top budgets left out and predicted from the rest", law["backtest"],
             ("budgets_left_out", "left_out", "law", "predicted", "ci95", "measured", "error", "N_error")),
            ("How much is enough: the law from the smallest budgets, predicting the loss of the top one", law["how_much_is_enough"],
             ("budgets", "beyond", "exponent_N", "exponent_N_ci95", "exponent_L", "exponent_L_ci95", "predicted", "ci95", "error")),
            ("What a count does: the same records, N counted in two ways", law.get("n_kinds"),
             ("n_kind", "exponent", "ci95", "a_parametric")),
            ("Plan", plan_rows(law.get("plan")), ("what", "value")),
            ("The paper's own plan", plan_rows(law.get("paper_plan")), ("what", "value"))):
        out += [f"## {title}", "", *table(rows, *names)] if rows else []
    if "side_by_side" in law:
        rows = law["side_by_side"]["rows"]
        out += [f"## The laws side by side, at C = {show(law['side_by_side']['C'])}", "", *table(rows, *rows[0])]
        out += [*(f"{name}: not compared, {reason}." for name, reason in law["not_compared"].items()), ""]
    for c in law.get("comparisons", ()):
        out += [f"## A = {c['A']} against B = {c['B']}", "", *table(c["exponents"], "exponent of", "A", "B", "B-A"),
                f"At C = {show(c['C'])}:", "", *table(c["levels"], "level of", "A", "B", "B/A"),
                "The compute that A needs to reach B's loss at C, over C:", "", *table(c["multiplier"], "C", "value", "ci95"),
                f"The losses cross at C = {show(c['crossing'])}." if c["crossing"]["value"] else f"No crossing: {c['crossing']['reason']}.",
                "", c["reading"], *[f"WARNING: {w}" for w in c["warnings"]], ""]
    return "\n".join(out + ["## Warnings", ""] + ([f"- {w}" for w in law["warnings"]] or ["none"])) + "\n"


def plan_rows(plan):
    """A plan as rows of a table, without what is missing (its reason is one of the rows)."""
    flat = plan and plan | {f"{k} (metric)": m for k, m in plan.get("metrics", {}).items()}
    return [{"what": k, "value": x} for k, x in flat.items() if x is not None and k != "metrics"] if plan else []


# ------------------------------------------------------------------------------------------------------------- the pictures

def loss_axis(axis, lo, hi):
    """A logarithmic axis with round numbers: a loss spans a fraction of a decade, where matplotlib's own ticks say nothing."""
    round_numbers = [m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5)]
    step = next(s for s in round_numbers if (hi - lo) / s < 8)
    even = np.arange(math.ceil(lo / step), math.floor(hi / step) + 1) * step
    axis.set_ticks([t for t in (even if hi < 6 * lo else round_numbers) if t > 0 and lo <= t <= hi])
    axis.set_major_formatter(lambda x, _: f"{x:.4g}")
    axis.set_ticks([], minor=True)


def band(ax, law, name, C, colour, label=None):
    """A law over C with the middle 95% of its resamples."""
    P, draws = law["_"]["P"], law["_"]["draws"]["laws"]
    curves = np.array([at(draws, name, math.log(c) - P["x0"]) for c in C])
    ax.plot(C, [at(law["_"]["base"], name, math.log(c) - P["x0"])[0] for c in C], color=colour, lw=1.5, label=label)
    curves = curves[:, np.isfinite(curves).all(0)]
    if curves.shape[1] >= 20:
        ax.fill_between(C, *np.quantile(curves, [0.025, 0.975], axis=1), color=colour, alpha=0.2, lw=0)


def draw_law(plt, law, file, reference):
    """law.png: loss over N with a parabola per budget and its vertex; N*(C); D*(C); the loss over C."""
    P, v, draws = (law["_"][k] for k in ("P", "v", "draws"))
    usable, C, inside = v["usable"][0], P["budgets"], v["window"][0]
    colours = plt.cm.viridis(np.linspace(0, 0.9, len(C)))
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    figure.suptitle(f"Scaling law of {law['metric']}: {law['n_points']} points at {len(C)} budgets, 95% intervals")
    ax = axes[0, 0]
    for b, colour in enumerate(colours):
        i = P["budget"] == b
        ax.plot(P["N"][i & inside], P["loss"][i & inside], "o", color=colour, ms=5, label=f"{C[b]:.2g}")
        ax.plot(P["N"][i & ~inside], P["loss"][i & ~inside], "o", mfc="none", color=colour, ms=5)
        if usable[b]:
            N = np.geomspace(P["N"][i & inside].min(), P["N"][i & inside].max(), 60)
            ax.plot(N, np.exp(v["L"][0, b] + v["curvature"][0, b] * (np.log(N) - v["N"][0, b]) ** 2), color=colour, lw=1)
            ax.plot(np.exp(v["N"][0, b]), np.exp(v["L"][0, b]), "*", color="crimson", ms=12, mec="white", mew=0.6, zorder=5)
    lo, hi = P["loss"].min(), P["loss"][inside].max()
    ax.set(xscale="log", yscale="log", ylim=(lo * (lo / hi) ** 0.05, hi * (hi / lo) ** 0.3), ylabel=law["metric"],
           xlabel=f"N, parameters ({law['n_kind']})", title="One parabola per budget (star: its vertex; hollow: not in its window)")
    loss_axis(ax.yaxis, *ax.get_ylim())
    if len(C) <= 15:
        ax.legend(title="C, FLOPs", fontsize=8, title_fontsize=8, loc="upper center", ncols=5)  # ylim leaves room for it
    grid, hours, images = np.geomspace(C.min() / 1.5, C.max() * 4, 60), flops_per_second(P), tokens_per_image(P)
    for ax, name, label in ((axes[0, 1], "N", f"N*, parameters ({law['n_kind']})"), (axes[1, 0], "D", "D*, tokens"),
                            (axes[1, 1], "L", f"{law['metric']} at N*")):
        one = law["loss"]["power"] if name == "L" else law[f"{name}_opt"]
        if one:
            band(ax, law, name, grid, "tab:blue", f"{one['coefficient']:.3g} C^{one['exponent']:.4f} {show(one['ci95'])}")
        for b in np.flatnonzero(usable):
            ends = interval(np.exp(draws[name][draws["usable"][:, b], b]))
            ax.plot([C[b]] * 2, ends or [np.nan] * 2, color=colours[b], lw=2)
            ax.plot(C[b], np.exp(v[name][0, b]), "o", color=colours[b], ms=6)
        if name in "ND" and "refused" not in law["parametric"]:
            best = parametric_optimum(law["parametric"], grid)["ND".index(name)]
            ax.plot(grid, best, "--", color="gray", lw=1, label="parametric form")
        if reference:
            ax.plot(grid, PAPER[name][0] * grid ** PAPER[name][1], "k:", label="the paper")
        title = {"N": "How large", "D": "On how much data", "L": "How good"}[name]
        ax.set(xscale="log", yscale="log", xlabel="C, training FLOPs", ylabel=label,
               title=title if one else f"{title}: no law, {law['reasons']['N_opt']}")
        if name == "L" and one:
            if law["loss"]["floor"]:
                band(ax, law, "L floor", grid, "tab:orange", "{L_inf:.3g} + {coefficient:.3g} C^-{exponent:.4f}".format_map(law["loss"]["floor"]))
            loss_axis(ax.yaxis, *ax.get_ylim())
        if not ax.has_data():
            ax.set(xscale="linear", yscale="linear", xticks=[], yticks=[])
            continue
        # Within two decades matplotlib labels ticks between the powers of ten, and they run into each other.
        ax.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        if hours:
            top = ax.secondary_xaxis("top", functions=(lambda c: c / hours / 3600, lambda h: h * hours * 3600))
            top.set_xlabel("device-hours", fontsize=8)
            top.tick_params(labelsize=8)
            top.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        if name == "D" and images:
            ax.secondary_yaxis("right", functions=(lambda d: d / images, lambda i: i * images)).set_ylabel("images")
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    save(figure, file)


UNITS = {"vlb": ", bits/dim", "nll": ", bits/dim", "vlb_minus_nll": ", bits/dim", "caption_accuracy": ", share of captions"}


def draw_metrics(plt, law, file):
    """metrics.png: a panel for each metric at the loss-optimal N over C, a colour for each data set, the training data's first."""
    P, v, draws = (law["_"][k] for k in ("P", "v", "draws"))
    home, C, usable = P["records"][0].get("data"), P["budgets"], v["usable"][0]
    names = sorted({k.split(" on ", 1)[0] for k, m in law["metrics"].items() if "refused" not in m})
    columns, rows = min(3, len(names)), -(-len(names) // 3)
    figure = plt.figure(layout="constrained", figsize=(5.5 * columns, 0.6 + 4.6 * rows))
    figure.suptitle(f"Metrics at the N* of {law['metric']}, 95% intervals")
    grid = np.geomspace(C[usable].min() / 1.3, C[usable].max() * 1.3, 40)
    for i, name in enumerate(names):
        ax = figure.add_subplot(rows, columns, i + 1)
        labels = sorted((k for k in law["metrics"] if k.split(" on ", 1)[0] == name), key=lambda k: (k != f"{name} on {home}", k))
        for k, colour in zip(labels, ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple")):
            m, data = law["metrics"][k], k.split(" on ", 1)[1]
            if "refused" in m:
                ax.plot([], [], " ", label=f"{data}: {m['refused']}")
                continue
            band(ax, law, k, grid, colour, f"{data}: C^{m['exponent']:.4f} {show(m['ci95'])}")
            for b in np.flatnonzero(usable & np.isfinite(v[k][0])):
                ax.plot([C[b]] * 2, interval(np.exp(draws[k][draws["usable"][:, b], b])) or [np.nan] * 2, color=colour, lw=2)
                ax.plot(C[b], np.exp(v[k][0, b]), "o", color=colour, ms=5)
        verdicts = [f"{o['data']} - {o['against']}: difference {o['difference_is']}, ratio {o['ratio_is']}"
                    for o in law["offsets"] if o["metric"] == name and "refused" not in o]
        ax.set_title("\n".join([name, *verdicts]), fontsize=9)
        ax.set(xscale="log", yscale="log", xlabel="C, training FLOPs", ylabel=name + UNITS.get(name, ""))
        lo, hi = ax.get_ylim()
        ax.set_ylim(lo, hi * (hi / lo) ** 0.25)  # room for the legend
        loss_axis(ax.yaxis, *ax.get_ylim())
        ax.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        ax.legend(fontsize=8, loc="upper center")
    save(figure, file)


def draw_diagnostics(plt, law, file):
    """law_diagnostics.png: what the parabolas and the parametric form leave over, the bootstrap clouds, how much is enough."""
    P, v, q, draws, second = (law["_"][k] for k in ("P", "v", "q", "draws", "second"))
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    figure.suptitle(f"Diagnostics of the law of {law['metric']}")
    shade, inside = np.log10(P["budgets"])[P["budget"]], v["window"][0] & v["usable"][0, P["budget"]]
    away = (np.log(P["N"]) - v["N"][0, P["budget"]]) / math.log(2)
    panels = [(axes[0, 0], inside, away, q["residual"], "log2 of N/N*", "Parabolas")]
    if "refused" not in second:
        rest = P["Y"]["L"][0] - np.log(parametric_loss(second, P["N"], P["D"]))
        panels.append((axes[0, 1], np.ones_like(inside), np.log10(P["N"]), rest, "log10 of N", "Parametric form"))
    for ax, some, x, rest, label, title in panels:
        dots = ax.scatter(x[some], 100 * rest[some], c=shade[some], vmin=shade.min(), vmax=shade.max(), s=18)
        figure.colorbar(dots, ax=ax, label="log10 of C")
        ax.axhline(0, color="gray", lw=0.7)
        ax.set(xlabel=label, ylabel="residual, % of the loss", title=f"{title}: what is left over (a pattern is a misfit)")
    ax, alpha, beta = axes[1, 0], *np.exp(draws["theta"][:, 3:].T)
    ax.plot(draws["laws"]["N"][:, 1], draws["laws"]["L floor"][:, 2], ".", ms=3, alpha=0.4, label="parabolas and law with floor")
    ax.plot(beta / (alpha + beta), alpha * beta / (alpha + beta), ".", ms=3, alpha=0.4, label="parametric form")
    ax.set(xlabel="exponent of N*", ylabel="exponent of the loss above its floor", title=f"{law['resamples']} bootstrap resamples")
    ax.legend(fontsize=8)
    ax, rows = axes[1, 1], law["how_much_is_enough"]
    for r in rows:
        ax.plot([r["budgets"]] * 2, r["exponent_N_ci95"] or [np.nan] * 2, color="tab:blue", lw=2)
    ax.plot([r["budgets"] for r in rows], [r["exponent_N"] for r in rows], "o-", color="tab:blue")
    ax.set(xlabel="law from the smallest k usable budgets", ylabel="exponent of N*", title="How much is enough?",
           xticks=[r["budgets"] for r in rows])
    ax.yaxis.label.set_color("tab:blue")
    right = ax.twinx()
    right.plot([r["budgets"] for r in rows], [100 * r["error"] for r in rows], "s--", color="tab:orange")
    right.set_ylabel("error of the predicted loss of the top budget, %", color="tab:orange")
    axes[0, 0].set_visible(inside.any())  # with no line, nothing to show: law.md tells why
    axes[0, 1].set_visible(len(panels) > 1)
    ax.set_visible(bool(rows)), right.set_visible(bool(rows))
    save(figure, file)


def draw_comparison(plt, laws_, file):
    """compare.png: loss at N* over C, N* over C and, where images were repeated, the loss over epochs; a colour for each law."""
    epochs = {name: np.median([r["D"] / r["epochs"] for r in law["_"]["P"]["records"] if r.get("epochs")] or [np.nan])
              for name, law in laws_.items()}    # tokens of an epoch; nan where every image was new
    panels = 2 + any(np.isfinite(list(epochs.values())))
    figure, axes = plt.subplots(1, panels, figsize=(6.5 * panels, 5.5), layout="constrained")
    for (name, law), colour in zip(laws_.items(), plt.cm.tab10(np.arange(len(laws_)) % 10)):
        P, v = law["_"]["P"], law["_"]["v"]
        on = v["usable"][0]
        C, grid = P["budgets"][on], np.geomspace(P["budgets"][on].min() / 1.2, P["budgets"][on].max() * 1.2, 40)
        for ax, k in zip(axes, "LN"):
            straight_ = law["loss"]["power"] if k == "L" else law["N_opt"]
            band(ax, law, k, grid, colour, f"{name}: C^{straight_['exponent']:.3f} {show(straight_['ci95'])}")
            ax.plot(C, np.exp(v[k][0, on]), "o", color=colour, ms=5)
        if np.isfinite(epochs[name]):
            axes[2].plot(np.exp(v["D"][0, on]) / epochs[name], np.exp(v["L"][0, on]), "o-", color=colour, ms=5, label=name)
    for ax, title, label in zip(axes, ("How good: the loss at N*", "How large: N*", "How often was an image seen"), ("loss at N*", "N*, parameters", "loss at N*")):
        ax.set(xscale="log", yscale="log", xlabel="C, training FLOPs", ylabel=label, title=title)
        ax.xaxis.set_minor_formatter(plt.matplotlib.ticker.NullFormatter())
        ax.legend(fontsize=8)
    loss_axis(axes[0].yaxis, *axes[0].get_ylim())
    if panels == 3:
        axes[2].set_xlabel("epochs at N*")
        loss_axis(axes[2].yaxis, *axes[2].get_ylim())
        loss_axis(axes[2].xaxis, *axes[2].get_xlim())
    save(figure, file)


def draw_curves(plt, law, file):
    """curves.png, why one run serves many budgets: the loss of every run over C, cut at the budgets, the best run marked."""
    P, logN = law["_"]["P"], np.log(law["_"]["P"]["N"])
    figure, ax = plt.subplots(figsize=(11, 7), layout="constrained")
    colours, faint = plt.cm.plasma(0.9 * (logN - logN.min()) / max(np.ptp(logN), 1e-9)), False
    for run in range(P["run"].max() + 1):
        i = np.flatnonzero(P["run"] == run)
        i = i[np.argsort(P["C"][i])]
        log = Path(P["records"][i[0]]["source"]).parent.parent / "log.jsonl"
        C, loss = training_curve(log) if "N" not in P["records"][0] and log.is_file() else ((), ())
        ax.plot(C, loss, color=colours[i[0]], lw=0.6, alpha=0.35)
        ax.plot(P["C"][i], P["loss"][i], "o-", color=colours[i[0]], lw=1.2, ms=3.5)
        faint |= len(C) > 0
    for b, C in enumerate(P["budgets"]):
        i = np.flatnonzero(P["budget"] == b)
        best = i[P["loss"][i].argmin()]
        ax.axvline(C, color="gray", lw=0.7, ls="--", zorder=0)
        ax.plot(P["C"][best], P["loss"][best], "*", color="crimson", ms=14, mec="white", mew=0.7, zorder=5)
    lo, hi = P["loss"].min(), P["loss"].max()
    ax.set(xscale="log", yscale="log", ylim=(lo * (lo / hi) ** 0.05, hi * (hi / lo) ** 0.05),
           xlim=(P["C"].min() / 2.5, P["C"].max() * 1.4), xlabel="C, training FLOPs", ylabel=law["metric"] + (" (faint: smoothed training loss)" if faint else ""),
           title=("A run passes through every budget on its way (dashed cuts)" if law["nested"] else
                  "The loss of every size at every budget (dashed cuts)") + ". Star: the lowest at a cut")
    loss_axis(ax.yaxis, *ax.get_ylim())
    scale = plt.matplotlib.colors.LogNorm(P["N"].min(), P["N"].max() * (P["N"].max() / P["N"].min()) ** (1 / 9))
    figure.colorbar(plt.cm.ScalarMappable(scale, "plasma"), ax=ax, label=f"N, parameters ({law['n_kind']})")
    save(figure, file)


def training_curve(log):
    """C and smoothed training loss of a run from its log.jsonl, as far as it can be read: a killed run's last line is torn."""
    rows = []
    for line in log.read_text().splitlines():
        try:
            row = json.loads(line)
            rows.append((row["C"], row["train_loss_smooth"]))
        except (ValueError, KeyError, TypeError):
            pass
    return tuple(zip(*rows)) or ((), ())


def save(figure, file):
    """A picture appears whole or not at all."""
    import matplotlib.pyplot as plt
    figure.savefig(f"{file}.tmp", dpi=110, format="png")
    os.replace(f"{file}.tmp", file)
    plt.close(figure)


# ------------------------------------------------------------------------------------------------------------- the command

def arguments(argv):
    p = argparse.ArgumentParser(prog="fit.py", description="Fit a scaling law to results directories or CSV files.", allow_abbrev=False)
    p.add_argument("paths", nargs="*", metavar="PATH", help="results directories or CSV files (default: results/quick)")
    p.add_argument("--out", type=Path, help="folder to write to (default: PATH/law; ./law for a CSV, and with --plan, --compare or --reference)")
    p.add_argument("--metric", default="val_loss_ema", help="the loss of the records to fit (train_loss is the paper's)")
    p.add_argument("--n", choices=("blocks", "total"), default="blocks", help="which parameters N counts")
    p.add_argument("--seed", type=int, default=0, help="of the resampling")
    p.add_argument("--bootstrap", type=int, default=1000, metavar="R", help="number of resamples")
    p.add_argument("--plan", metavar="C", help="FLOPs (1.5e21) or devices:hours:MFU (8xH100:72h:0.4)")
    p.add_argument("--compare", metavar="PATH", nargs="+", help="other results directories or CSV files, each compared with the first")
    p.add_argument("--reference", choices=("paper",), help="draw and print the paper's laws beside ours")

    def complain(message):
        raise BadInput(message)

    p.error = complain  # one line and our exit status, without the usage
    args = p.parse_args(argv)
    if args.bootstrap < 20 or args.seed < 0:
        raise BadInput(f"--bootstrap {args.bootstrap} --seed {args.seed}: an interval needs 20 resamples, a seed is not negative")
    return args


def short_names(paths):
    """The last part of each path, or the whole paths where two have the same."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else paths


def run(args):
    """Fit, write the page, the numbers and the pictures, and print the page."""
    paper = paper_plan(args.plan) if args.reference and args.plan else None
    if paper and not args.paths and not Path("results/quick").exists():
        print("\n".join(["## The paper's own plan", "", *table(plan_rows(paper), "what", "value")]))  # needs no results of ours
        return
    if args.plan:
        parse_plan(args.plan)  # complain before minutes of fitting, not after
    first = Path((args.paths or ["results/quick"])[0])
    records = read(args.paths or [first])
    if "N" in records[0] and (args.n, args.metric) != ("blocks", "val_loss_ema"):
        raise BadInput(f"--n {args.n} --metric {args.metric}: a CSV has one N and one loss to choose from")
    try:
        law = fit(records, args.metric, args.n, args.bootstrap, args.seed, bar=True)
    except Refused as e:
        raise Refused(f"{first}: {e}" if args.compare else str(e))
    if "N" not in records[0]:
        try:
            other = fit(records, args.metric, {"blocks": "total", "total": "blocks"}[args.n], args.bootstrap, args.seed, bar=True)
        except Refused as e:
            law["warnings"].append(f"with the other count of N there is no law: {e}")
            other = {"N_opt": None}
        law["n_kinds"] = [{"n_kind": one["n_kind"], "exponent": one["N_opt"]["exponent"], "ci95": one["N_opt"]["ci95"],
                           "a_parametric": one["parametric"].get("a")} for one in (law, other) if one["N_opt"]]
    if args.plan and not law["N_opt"]:
        raise Refused(f"--plan {args.plan}: {law['reasons']['N_opt']}")
    law["plan"], law["paper_plan"] = plan(law, args.plan) if args.plan else None, paper
    if args.plan and law["plan"]["times_beyond_the_data"] > 1:
        beyond = law["plan"]["times_beyond_the_data"]
        law["warnings"].append(f"the plan EXTRAPOLATES {beyond:.3g} TIMES BEYOND THE LARGEST BUDGET MEASURED")
    if args.compare:
        law["comparisons"], law["not_compared"], short = [], {}, short_names([str(first), *args.compare])
        laws_ = {short[0]: law}
        for k, (path, name) in enumerate(zip(args.compare, short[1:]), 1):
            try:
                other = fit(read([path]), args.metric, args.n, args.bootstrap, args.seed + k, bar=True)
                ends = [one["_"]["P"]["budgets"][[0, -1]] for one in (law, other)]
                law["comparisons"].append(compare(law, other, (str(first), path), [
                    *np.geomspace(max(e[0] for e in ends), min(e[1] for e in ends), 3), *([law["plan"]["C"]] if args.plan else [])]))
                laws_[name] = other
            except Refused as e:  # the others can still be compared
                law["not_compared"][name] = str(e)
        if len(laws_) == 1:
            raise Refused("; ".join(f"{name}: {reason}" for name, reason in law["not_compared"].items()))
        law["side_by_side"] = side_by_side(laws_)
    plain = first.is_dir() and not (args.plan or args.compare or args.reference)  # a question asked of a law leaves it alone
    out, text = args.out or (first / "law" if plain else Path("law")), page(law, bool(args.reference))
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # here and not above, because it costs most of a second
    out.mkdir(parents=True, exist_ok=True)
    draw_law(plt, law, out / "law.png", bool(args.reference))
    draw_diagnostics(plt, law, out / "law_diagnostics.png")
    draw_curves(plt, law, out / "curves.png")
    drawn = any("refused" not in m for m in law["metrics"].values())
    draw_metrics(plt, law, out / "metrics.png") if drawn else (out / "metrics.png").unlink(missing_ok=True)  # none of an older law
    draw_comparison(plt, laws_, out / "compare.png") if args.compare else (out / "compare.png").unlink(missing_ok=True)
    numbers = json.dumps({k: x for k, x in law.items() if k != "_"}, indent=1, allow_nan=False)
    for name, content in (("law.md", text), ("law.json", numbers + "\n")):
        (out / f"{name}.tmp").write_text(content)
        os.replace(out / f"{name}.tmp", out / name)
    print(f"{text}\n{out}: law.md law.json law.png law_diagnostics.png curves.png{' metrics.png' * drawn}{' compare.png' * bool(args.compare)}")


def main(argv=None):
    """The command line; returns the exit status: 0, 2 for bad input, 3 for a refusal, each with one line on stderr."""
    try:
        run(arguments(argv))
        return 0
    except (BadInput, Refused) as e:
        print(f"fit.py: {'refused: ' if isinstance(e, Refused) else ''}{e}", file=sys.stderr)
        return 3 if isinstance(e, Refused) else 2
    except OSError as e:  # a full disk, a folder that may not be written
        print(f"fit.py: {e.filename or 'writing'}: {e.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
