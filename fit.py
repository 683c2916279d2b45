"""fit.py: which law do these results obey, and how far can it be trusted?

    python fit.py                            the law of results/quick, into results/quick/law
    python fit.py results/a results/b --out law    several sweeps as one set of points
    python fit.py runs.csv                   anybody's runs: columns N, D, C, loss (budget, run ..)
    python fit.py results/quick --plan 8xH100:72h:0.4      what to train with that much compute
    python fit.py results/a --compare results/b results/c  which is better, and can the data tell
    python fit.py --reference paper --plan 1.5e21     a plan from the paper's own coefficients

The method, in the order of this file (law_of is its centre):
    1. Points: one per run and budget.
    2. A parabola of ln loss in ln N at every budget. Its vertex is the best model for that budget.
    3. Straight lines through the vertices in log-log: N*(C), D*(C), L(C), and the metrics at N*.
    4. The loss with a floor, L(C) = L_inf + K C^-g.
    5. As a second opinion the parametric form L = E + A N^-alpha + B D^-beta.
    6. The same law of resampled points, 1,000 times. An interval is the middle 95% of the answers
       that these laws give to a question.
    7. What follows: backtest, plan, comparison; then the page and the pictures.

Nearly everything is done in logarithms. A power law is a straight line there, and an error of 1% is
the same size for a loss of 0.1 and for an N* of 1e9.

    N  parameters (of the blocks, unless --n total)    D  tokens seen in training: image, text, time
    C  training FLOPs                                  L  the loss that --metric names
    *  at the optimum for a budget, as in N*, the best model for C
Errors are one line on stderr. Exit status: 0 a law, 2 bad input, 3 a refusal.
"""
import argparse
import csv
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.polynomial import Polynomial
from scipy.optimize import least_squares, minimize_scalar, nnls
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats is slow to import
from tqdm import tqdm

# The window of a parabola: sizes within a factor WINDOW of the lowest, at least the NEAREST ones.
# Wider, a loss curve is no parabola and its vertex is biased. Narrower, noise moves the vertex.
# Where sizes are far apart the count decides: in the quick grid 7 sizes span a factor of 14 to 26.
WINDOW, NEAREST = 4.0, 7
# Where the Huber loss turns linear, in ln loss: runs that are off by more count less (Hoffmann et
# al. 2022, arXiv 2203.15556, appendix D.3).
HUBER = 1e-3
# The paper's laws (arXiv 2410.08184), as k and p of k C^p.
PAPER = {"N": (0.0009, 0.5681), "D": (186.8535, 0.4319), "loss": (2.3943, -0.0273)}
# The paper's tokens an image (256 image, 77 text, 1 time: our reading), batch and width / depth.
PAPER_TOKENS, PAPER_BATCH, PAPER_ASPECT = 256 + 77 + 1, 1024, 64
# Peak dense bf16 TFLOP/s of one device, from the makers' data sheets (V100 and T4: fp16). A longer
# name stands before a shorter one that it begins with.
PEAK = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "A100": 312,
        "A10G": 70, "A10": 125, "L40S": 362, "L4": 121, "V100": 125, "T4": 65, "RTX 4090": 165,
        "RTX 3090": 71, "MI250X": 383, "MI300X": 1307, "TPUv4": 275, "TPUv5e": 197, "TPUv5p": 459}

class BadInput(Exception):
    """A file or flag that cannot be used: one line, exit status 2."""

class Refused(Exception):
    """The data allow no law: the reason in one line, exit status 3."""

# ---- 1. the points -----------------------------------------------------------------------------

# What must be the same in all records of one law: otherwise it would mix several laws.
ONE = ("count", "arch", "data", "resolution", "captions", "train_images")

def read(paths, with_metrics=True):
    """Records (a list of dicts) from results directories, or from CSV files. Raises BadInput.

    Each has a "source" (for messages) and numbers under the names that train.py or the CSV has.
    """
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or directory")
        found = read_results(path, with_metrics) if path.is_dir() else read_csv(path)
        if not found:
            what = "*/budget_*/result.json" if path.is_dir() else "row"
            raise BadInput(f"{path}: no {what} in it")
        records += found
    # A CSV has one N and one C, and does not say how they were counted.
    if len({"N" in record for record in records}) > 1:
        raise BadInput("a CSV file and a results directory cannot be fitted together")
    return records

def read_results(folder, with_metrics):
    """The records of a sweep's points, each with its `metrics`, {"METRIC on DATA": value}."""
    records = []
    for file in sorted(folder.glob("*/budget_*/result.json")):
        record = read_json(file)
        record |= {"source": str(file), "run": str(file.parent.parent), "metrics": {}}
        record["conditions"] = {key: record[key] for key in ONE if key in record}
        if record.get("count") == "6nd":  # then the budgets were of 6ND too
            record["C"] = record.get("C_6nd")
        for metrics_file in sorted(file.parent.glob("metrics_*.json")) if with_metrics else ():
            add_metrics(record, metrics_file)
        records.append(record)
    return records

def read_json(file):
    """The content (a dict) of a file that train.py or evaluate.py wrote. Raises BadInput."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise BadInput(f"{file}: torn, or not of schema 1; delete it and make it again")
    return content

def add_metrics(record, file):
    """The metrics of a file into the record, and how they were measured into its conditions.

    One law needs one way to measure: the FD of 1,000 images is not that of 10,000.
    """
    content = read_json(file)
    try:
        for name, measured in content["metrics"].items():
            if measured["value"] is None:  # refused by evaluate.py
                continue
            label = f"{name} on {content['data']}"
            record["metrics"][label] = float(measured["value"])
            for key, value in measured.get("protocol", {}).items():
                if key != "weights":  # a checksum, another one at every point
                    record["conditions"][f"{key} in the protocol of {label}"] = value
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{file}: torn, or not a metrics file of schema 1")

def read_csv(file):
    """Rows with columns N, D, C, loss and perhaps budget, run, run_id, seed. Raises BadInput.

    Any units will do, because only logarithms and ratios are used.
    """
    # utf-8-sig: Excel writes a mark first. A binary file has no such columns, and is refused.
    with open(file, newline="", encoding="utf-8-sig", errors="replace") as stream:
        rows = csv.DictReader(stream)
        missing = [key for key in ("N", "D", "C", "loss") if key not in (rows.fieldnames or ())]
        if missing:
            raise BadInput(f"{file}: no column {', '.join(missing)} (it needs N, D, C, loss)")
        records = []
        for row in rows:
            record = {key: row[key] for key in ("run", "run_id", "seed") if row.get(key)}
            record["source"] = f"{file}:{rows.line_num}"
            for key in [key for key in ("N", "D", "C", "loss", "budget") if key in row]:
                try:
                    record[key] = float(row[key])
                except (TypeError, ValueError):
                    raise BadInput(f"{record['source']}: {key} is {row[key]!r}, not a number")
            records.append(record)
    # Many files number their rows in run_id: it names runs only if an id comes back.
    ids = [record.get("run_id") for record in records]
    if None not in ids and len(set(ids)) < len(ids):
        for record in records:
            record.setdefault("run", record["run_id"])
    return records

@dataclass(frozen=True)
class Points:
    """What law_of fits: arrays (n,), an element for each run and budget.

    A resample is a Points too, so that nothing in the method knows of the bootstrap.
    """
    N: np.ndarray        # parameters
    D: np.ndarray        # tokens
    C: np.ndarray        # FLOPs as counted, near the budget
    loss: np.ndarray     # the one that --metric names
    budget: np.ndarray   # index into budgets
    run: np.ndarray      # index of the run; one run may pass through several budgets
    budgets: np.ndarray  # (B,) FLOPs, rising
    metrics: dict        # "METRIC on DATA": (n,), nan where it was not measured
    records: list        # what the points come from; empty in a resample
    nested: bool         # whether points share runs; None: the records do not tell

    @property
    def middle(self):
        """The geometric mean of the budgets: there level and slope of a line are independent."""
        return math.exp(np.log(self.budgets).mean())

    def take(self, chosen):
        """The chosen points: a mask, or indices (one that comes twice is a point twice)."""
        names = ("N", "D", "C", "loss", "budget", "run")
        arrays = {name: getattr(self, name)[chosen] for name in names}
        metrics = {name: values[chosen] for name, values in self.metrics.items()}
        return replace(self, **arrays, metrics=metrics, records=[])

def points_of(records, metric="val_loss_ema", n_kind="blocks"):
    """Records -> Points. Raises BadInput or Refused, naming the source.

    metric: the record's key of the loss; n_kind: "blocks" or "total". Repeated seeds stay separate
    points: least squares then weighs a size by its number of runs.
    """
    given = "N" in records[0]  # in a CSV file, which has one N and one loss
    columns = {"N": "N" if given else f"N_{n_kind}", "D": "D", "C": "C",
               "loss": "loss" if given else metric}
    check(records, columns)
    records = without_repetitions(records, columns)
    if len(records) < 4:
        raise Refused(f"fewer than 4 points ({len(records)}): no parabola and no law")
    arrays = {key: np.array([float(record[column]) for record in records])
              for key, column in columns.items()}
    budget = budget_index(records)
    # A run stops at the step nearest to its budget, so the counted C is the better abscissa.
    log_C = np.log(arrays["C"])  # (n,)
    budgets = np.array([np.exp(log_C[budget == b].mean()) for b in range(budget.max() + 1)])
    # Where nothing names the runs, the same N at several budgets may be one run or several.
    named = all("run" in record for record in records)
    runs = [str(record["run"] if named else (record[columns["N"]], record.get("seed")))
            for record in records]
    shared = len(set(runs)) < len(set(zip(runs, budget)))
    metrics = {}
    for label in sorted({label for record in records for label in record.get("metrics", {})}):
        values = np.array([record["metrics"].get(label, math.nan) for record in records])
        if not (values <= 0).any():  # an estimate of KID may be negative; no power law is
            metrics[label] = values
    return Points(**arrays, budget=budget, run=np.unique(runs, return_inverse=True)[1],
                  budgets=budgets, metrics=metrics, records=records,
                  nested=shared if named else None)

def check(records, columns):
    """Raises BadInput for records that do not belong together, Refused for impossible values."""
    conditions = {}
    for record in records:
        source = record["source"]
        missing = [key for key in columns.values() if key not in record]
        if missing:
            raise BadInput(f"{source}: the record lacks {', '.join(missing)} (see --metric)")
        for key in (*columns.values(), "budget"):
            value = record.get(key, 1)  # a CSV may have no budget
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise Refused(f"{source}: {key} is {value}; a law needs positive finite values")
        for key, value in record.get("conditions", {}).items():
            first, where = conditions.setdefault(key, (value, source))
            if value != first:
                raise BadInput(f"one law needs one {key}: it is {first} in {where} and {value} in "
                               f"{source}")

def without_repetitions(records, columns):
    """The records, exact repetitions once. Refused where repetitions differ in their loss.

    A file given twice must not count twice. But of two losses nobody knows which is right.
    """
    first = {}
    for record in records:
        key = [record.get(k) for k in (columns["N"], "C", "seed", "depth", "width")]
        key.append(record.get("run") if "N" in record else None)
        other = first.setdefault(tuple(key), record)
        if other[columns["loss"]] != record[columns["loss"]]:
            raise Refused(f"{other['source']} and {record['source']} are duplicates with different "
                          "losses: the same N, C and seed. If another flag differs, fit them apart")
    return list(first.values())

def budget_index(records):
    """(n,) index of each record's budget: its nominal one, or without that C within 10%.

    Within 10% of the smallest of the group, not of its neighbour: else a file of many runs at
    gliding C would become one budget.
    """
    named = all("budget" in record for record in records)
    nominal = np.array([float(record["budget" if named else "C"]) for record in records])
    index, group, smallest = np.zeros(len(records), int), -1, 0.0
    for i in np.argsort(nominal, kind="stable"):
        if nominal[i] > smallest * (1.001 if named else 1.1):
            group, smallest = group + 1, nominal[i]
        index[i] = group
    return index

# ---- 2. a parabola per budget ------------------------------------------------------------------

@dataclass(frozen=True)
class Vertex:
    """The lowest point of a budget's parabola ln loss = ln loss* + curvature (ln N - ln N*)^2.

    With C = 6ND fixed, a model that is smaller than N* learns too little from many tokens, a larger
    one sees too few (the IsoFLOP approach of Hoffmann et al. 2022).
    """
    C: float
    window: np.ndarray     # indices of the points that it goes through
    reason: str = None     # why there is none; None: there is one
    values: dict = field(default_factory=dict)  # "N", and read there "loss", "D" and the metrics
    curvature: float = math.nan

    def value(self, name):
        """nan where there is no vertex, or too few sizes were measured."""
        return self.values.get(name, math.nan)

def window_of(points, b):
    """Indices of the points of budget b near its lowest loss. Seeds of a size count together.

    It counts sizes and not points (seeds): a parabola needs sizes, whatever the number of seeds.
    """
    here = np.flatnonzero(points.budget == b)
    if not len(here):
        return here
    sizes, size = np.unique(np.log(points.N[here]), return_inverse=True)
    mean_loss = np.bincount(size, np.log(points.loss[here])) / np.bincount(size)
    distance = np.abs(sizes - sizes[mean_loss.argmin()])
    # In a grid with few sizes a factor 4 holds three or four: too few to see any noise.
    nearest = np.sort(distance)[:NEAREST].max()
    return here[(distance <= max(nearest, math.log(WINDOW)) + 1e-9)[size]]

def parabola(points, b, window=None, degree=2):
    """The Vertex of budget b: least squares of ln loss in ln N over the window.

    window: indices, other than window_of's; degree: 2, or 3 for a second opinion. D and the metrics
    are read at N* from parabolas of their own. D is not computed as C/6N: attention, which 6ND
    leaves out, makes C/ND fall with N. Every FD gets its own optimum too, "N* of" it.
    """
    window = window_of(points, b) if window is None else window
    no_vertex = partial(Vertex, float(points.budgets[b]), window)
    log_N = np.log(points.N[window])
    sizes = np.unique(log_N)
    if len(sizes) < 4:  # three sizes fit any parabola exactly
        return no_vertex(f"fewer than 4 sizes ({len(sizes)})")
    bowl = Polynomial.fit(log_N, np.log(points.loss[window]), degree)
    minima = [x.real for x in bowl.deriv().roots() if x.imag == 0 and bowl.deriv(2)(x.real) > 0]
    if not minima:
        return no_vertex("concave parabola: no minimum")
    best = minima[0]
    # A vertex outside of the sizes was not measured: it is what the parabola's form invents.
    if not sizes[0] < best < sizes[-1]:
        end = "smallest" if best <= sizes[0] else "largest"
        return no_vertex(f"no interior minimum: it still falls at the {end} model")
    values = {"N": math.exp(best), "loss": math.exp(bowl(best))}
    powers = np.vander(log_N - best, 3)  # so a parabola's value at N* is its last coefficient
    for name, column in {"D": points.D, **points.metrics}.items():
        measured = np.isfinite(column[window])
        if len(np.unique(log_N[measured])) >= 4:
            y = np.log(column[window][measured])
            values[name] = math.exp(np.linalg.lstsq(powers[measured], y)[0][-1])
        if name.startswith("fd"):
            values[f"N* of {name}"] = parabola_of_metric(points, b, name).value("N")
    return no_vertex(None, values, bowl.deriv(2)(best) / 2)

def parabola_of_metric(points, b, name):
    """The Vertex of a metric in place of the loss, from the points where it was measured."""
    measured = points.take(np.isfinite(points.metrics[name]))
    return parabola(replace(measured, loss=measured.metrics[name], metrics={}), b)

def points_in_windows(folder):
    """Paths of the result.json whose points the parabolas use. Raises BadInput or Refused.

    evaluate.py asks which points are worth the time. So metrics are not read: those of an
    evaluation that is half done may have been measured in several ways.
    """
    points = points_of(read([folder], with_metrics=False))
    windows = [window_of(points, b) for b in range(len(points.budgets))]
    return [points.records[i]["source"] for i in sorted(np.concatenate(windows))]

# ---- 3. and 4. lines through the vertices, and the law with a floor ----------------------------

@dataclass(frozen=True)
class PowerLaw:
    """value = floor + level (C / middle)^exponent: with no floor a straight line in log-log.

    Errors of level and exponent are independent at the middle. At C = 1, many decades away, the
    coefficient would only repeat the error of the exponent.
    """
    middle: float = math.nan    # the geometric mean of the budgets, FLOPs
    level: float = math.nan
    exponent: float = math.nan
    floor: float = 0.0          # L_inf

    @property
    def exists(self):
        """Whether there were enough budgets."""
        return not math.isnan(self.exponent)

    def predict(self, C):
        """The value at C, a number or an array."""
        return self.floor + self.level * np.float_power(C / self.middle, self.exponent)

    @property
    def coefficient(self):
        """That of value = floor + coefficient C^exponent."""
        return float(self.level * np.float_power(self.middle, -self.exponent))

# What a law does not have is nan. So every question can be put to every resample's law, and only
# interval() must know that some have no answer.
NO_LAW = PowerLaw()

def line(x, y):
    """Least squares y = level + slope (x - mean x) of arrays (k,), unweighted. -> level, slope.

    Weights would follow the noise of a vertex, but budgets scatter for other reasons too.
    """
    away = x - x.mean()
    return y.mean(), (away @ y) / (away @ away)

def curve(vertices, name):
    """C and value (two arrays) at the budgets where the name could be read."""
    found = [(v.C, v.value(name)) for v in vertices if math.isfinite(v.value(name))]
    return np.array(found).reshape(-1, 2).T

def power_law(vertices, name):
    """The straight line in log-log through the vertices' values. NO_LAW with under 3 budgets."""
    C, values = curve(vertices, name)
    if len(C) < 3:
        return NO_LAW
    level, slope = line(np.log(C), np.log(values))
    return PowerLaw(math.exp(np.log(C).mean()), math.exp(level), float(slope))

def floor_law(vertices, name):
    """L_inf + K (C / middle)^-g by least squares of relative errors. NO_LAW with under 4 budgets.

    Relative, because the noise of a loss is about proportional to it. For a given g the law is
    linear in L_inf and K, which may not be negative (nnls). So only g is searched (variable
    projection, Golub and Pereyra 1973), which needs no start and cannot diverge.
    """
    C, values = curve(vertices, name)
    if len(C) < 4:
        return NO_LAW
    middle = math.exp(np.log(C).mean())

    def project(log_g):
        power = np.float_power(C / middle, -math.exp(log_g))
        return nnls(np.stack([1 / values, power / values], 1), np.ones(len(C)))

    def misfit(log_g):
        return project(log_g)[1] ** 2

    # A coarse grid first: with noise the misfit may have more than one minimum.
    grid = np.linspace(math.log(0.002), math.log(5), 9)
    start, step = min(grid, key=misfit), grid[1] - grid[0]
    log_g = minimize_scalar(misfit, bounds=(start - step, start + step), method="bounded",
                            options={"xatol": 1e-9}).x
    L_inf, K = project(log_g)[0]
    return PowerLaw(middle, float(K), -math.exp(log_g), float(L_inf))

# ---- 5. the parametric form --------------------------------------------------------------------

@dataclass(frozen=True)
class Form:
    """L = E + A N^-alpha + B D^-beta, on C = kappa N D; nan where it is refused.

    Approach 3 of Hoffmann et al. 2022. It uses all points, so it works without an IsoFLOP grid; in
    return it believes that the loss has this form.
    """
    E: float = math.nan              # the loss of an infinite model and data set
    A: float = math.nan
    B: float = math.nan
    alpha: float = math.nan
    beta: float = math.nan
    kappa: float = math.nan          # 6, or more where attention counts
    objective: float = math.nan      # the sum of Huber losses
    gradient_norm: float = math.nan  # its largest component at the optimum
    starts: int = 1                  # of the optimiser
    starts_agree: int = 1            # those that ended at this optimum
    refused: str = None              # why there is none, in words

    @property
    def a(self):
        """The exponent of N*(C)."""
        return self.beta / (self.alpha + self.beta)

    def loss(self, N, D):
        """L(N, D)."""
        return self.E + self.A * N**-self.alpha + self.B * D**-self.beta

    def optimum(self, C):
        """N and D of the lowest loss on C = kappa N D: N = G (C / kappa)^a, their equation 4."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        N = ratio ** (1 / (self.alpha + self.beta)) * (C / self.kappa) ** self.a
        return N, C / self.kappa / N

def descend(points, start, step=0):
    """The Form with the lowest SUM of Huber losses of ln L, from a start (a Form) and a step (5,).

    theta = ln E, ln A', ln B', ln alpha, ln beta, where A' and B' are the terms' sizes at the mean
    ln N and ln D. With centred logs level and exponent hardly correlate, so that the optimiser sees
    no long curved valley. Logarithms keep all five constants positive. The sum and not the mean: a
    mean makes gradients so small that optimisers stop early (Besiroglu et al. 2024).
    """
    y, log_N, log_D = np.log(points.loss), np.log(points.N), np.log(points.D)
    N0, D0 = np.exp(log_N.mean()), np.exp(log_D.mean())
    n, d = log_N - log_N.mean(), log_D - log_D.mean()

    def log_terms(theta):
        e, a, b, log_alpha, log_beta = theta
        return np.stack([np.full_like(n, e), a - np.exp(log_alpha) * n, b - np.exp(log_beta) * d])

    def residuals(theta):
        return np.logaddexp.reduce(log_terms(theta)) - y

    def jacobian(theta):
        terms = log_terms(theta)
        # d ln L / d ln of a term is the share of that term in L.
        E, A, B = np.exp(terms - np.logaddexp.reduce(terms))  # (n,) each
        return np.stack([E, A, B, -np.exp(theta[3]) * n * A, -np.exp(theta[4]) * d * B], 1)  # n, 5

    theta = step + np.log([start.E, start.A * N0**-start.alpha, start.B * D0**-start.beta,
                           start.alpha, start.beta])
    with np.errstate(over="ignore"):  # of a bad start
        # With their default tolerances it would stop far from the optimum.
        found = least_squares(residuals, theta, jacobian, loss="huber", f_scale=HUBER, ftol=1e-15,
                              xtol=1e-15, gtol=1e-12, max_nfev=2000)
        E, A, B, alpha, beta = np.exp(found.x)
        return Form(float(E), float(A * N0**alpha), float(B * D0**beta), float(alpha), float(beta),
                    math.exp(np.log(points.C / points.N / points.D).mean()), float(found.cost),
                    float(found.optimality))

def projected_start(points):
    """Variable projection: on a grid of (alpha, beta), where E, A and B are linear. -> Form.

    A start from the data themselves lies so near to the optimum that few others are needed.
    """
    lowest, best = math.inf, None
    for alpha in np.geomspace(0.05, 2, 16):
        for beta in np.geomspace(0.05, 2, 16):
            terms = np.stack([np.ones_like(points.N), points.N**-alpha, points.D**-beta], 1)
            factors, misfit = nnls(terms / points.loss[:, None], np.ones_like(points.N))
            if misfit < lowest:
                # Logs will be taken: a term is at least a thousandth of the loss.
                factors = np.maximum(factors, 1e-3 * points.loss.min() / terms.mean(0))
                lowest, best = misfit, Form(*factors, alpha, beta)
    return best

def parametric_form(points, starts=8):
    """The best Form from the projected start and from others within 2 log-units; or why not.

    A number that the data do not fix looks like any other number. So each refusal is a case in
    which the optimiser did return one.
    """
    for name, values in (("D", points.D), ("N", points.N)):
        if len(np.unique(values)) < 2:
            return Form(refused=f"one {name} for all points: its exponent cannot be seen")
    n, B = len(points.N), len(points.budgets)
    if n < 8 or B < 3:
        return Form(refused=f"{n} points at {B} budgets are too few (8 at 3 at least)")
    first = projected_start(points)
    steps = np.random.default_rng(0).uniform(-2, 2, (starts, 5))
    forms = [descend(points, first, step) for step in (0, *steps)]
    forms = [form for form in forms if form.gradient_norm < 1e-8]
    if not forms:
        return Form(refused="the optimiser reached no stationary point")
    best = min(forms, key=lambda form: form.objective)
    # In its linear part the Huber loss is HUBER times the distance: so this is the mean distance of
    # ln L from the form. Half of what the median alone would miss is no description.
    missed = best.objective / HUBER / n
    log_loss = np.log(points.loss)
    if missed > 0.5 * np.abs(log_loss - np.median(log_loss)).mean():
        return Form(refused=f"it does not describe the data: it misses them by {100 * missed:.1f}% "
                            "on average")
    low, high = sorted((best.alpha, best.beta))
    if low < 0.005 or high > 5 or best.E < 1e-4 * points.loss.min():
        return Form(refused=f"the data do not fix its constants (E {best.E:.3g}, alpha "
                            f"{best.alpha:.3g}, beta {best.beta:.3g})")
    agree = sum(form.objective <= best.objective + 1e-9 for form in forms)
    return replace(best, starts=starts + 1, starts_agree=agree)

# ---- the law -----------------------------------------------------------------------------------

@dataclass(frozen=True)
class Law:
    """All that is fitted to one set of points."""
    vertices: list  # a Vertex per budget
    lines: dict     # {name: PowerLaw} of "N", "D", "loss", the metrics and each "N* of" an FD
    floors: dict    # {name: PowerLaw} of the loss and the metrics
    form: Form = Form(refused="not fitted")  # the second opinion

    def usable(self):
        """The vertices of the budgets that have one."""
        return [vertex for vertex in self.vertices if not vertex.reason]

def law_of(points, near=None):
    """The Law of a set of points. For a resample, `near` is the law of the points themselves.

    This is the whole method. The parametric form of a resample starts at the optimum of `near`,
    which is near its own, and is nan if that has none.
    """
    vertices = [parabola(points, b) for b in range(len(points.budgets))]
    own = [f"N* of {name}" for name in points.metrics if name.startswith("fd")]
    law = law_through(vertices, ["loss", *points.metrics], ["N", "D", *own])
    if near is None:
        return replace(law, form=parametric_form(points))
    if near.form.refused:
        return law
    form = descend(points, near.form)
    return replace(law, form=form) if form.gradient_norm < 1e-8 else law

def law_through(vertices, with_floor, without):
    """What of a law follows from the vertices alone: lines for all names, floors for some."""
    lines = {name: power_law(vertices, name) for name in (*without, *with_floor)}
    return Law(vertices, lines, {name: floor_law(vertices, name) for name in with_floor})

# ---- 6. resamples and intervals ----------------------------------------------------------------

@dataclass(frozen=True)
class Noise:
    """The points' errors about their parabolas; row 0 is of the loss, the others of the metrics.

    k = 1 + number of metrics. Errors are of logarithms, so they are shares of the value.
    """
    fitted: np.ndarray  # (k, n) ln value on the parabola; as measured where there is none
    scale: np.ndarray   # (k, n) standard deviation of ln value at the point's budget
    mixing: np.ndarray  # (k, k) gives independent errors the residuals' correlation between rows
    correlation: float  # of two errors of one run
    nested: bool        # whether points share runs

def residual_maker(N, degree=2):
    """(n, n) matrix M = 1 - QQ': takes values at sizes N to residuals from a polynomial in ln N.

    It depends on the sizes alone, so it also tells what a fit does to errors: it shrinks them.
    """
    log_N = np.log(N)
    basis, _ = np.linalg.qr(np.vander(log_N - log_N.mean(), degree + 1))
    return np.eye(len(N)) - basis @ basis.T

def measure_noise(points, law):
    """The Noise of the points, from their residuals about the parabolas. The model is

        ln value = parabola + scale (sqrt(rho) e_run + sqrt(1 - rho) e_point),  e normal.

    A run that is lucky at one budget is lucky at the next, because its points share weights: hence
    rho, which is measured on the loss and taken for the metrics too. Errors of loss and metrics
    correlate as their residuals do. A point outside its window, or at a budget without a vertex,
    has no residual. There the scale is 0, and a resample leaves the point as it is.
    """
    values = np.log(np.stack([points.loss, *points.metrics.values()]))  # (k, n)
    residual, scale = np.zeros_like(values), np.zeros_like(values)
    projector = np.zeros((len(points.N), len(points.N)))  # of the loss: errors to residuals
    for vertex in law.usable():
        for row in range(len(values)):
            here = vertex.window[np.isfinite(values[row, vertex.window])]
            if len(np.unique(points.N[here])) < 4:
                continue
            maker = residual_maker(points.N[here])
            residual[row, here] = maker @ values[row, here]
            # A parabola has 3 constants, which take 3 degrees of freedom.
            scale[row, here] = math.sqrt((residual[row, here] ** 2).sum() / (len(here) - 3))
            if row == 0:
                projector[np.ix_(here, here)] = maker
    unit = residual / np.maximum(scale, 1e-300)  # in standard deviations
    correlation = correlation_along_runs(points, unit[0], projector)
    nested = correlation > 0.25 if points.nested is None else points.nested
    return Noise(values - residual, scale, mixing_of(unit), correlation, nested)

def correlation_along_runs(points, unit, projector):
    """rho, the correlation of two errors of one run, from standardised residuals (n,).

    Residuals are smaller and less correlated than errors, because the parabolas follow the errors.
    With r = M e for the projector M and K marking pairs of one run at two budgets, E[r' K r] =
    rho tr(K M K M): M has no entries between budgets and K none within, so tr(K M M) = 0.
    """
    same_run = points.run[:, None] == points.run
    other_budget = points.budget[:, None] != points.budget
    pairs = (same_run & other_budget).astype(float)  # (n, n)
    expected = np.trace(pairs @ projector @ pairs @ projector)
    return float(np.clip(unit @ pairs @ unit / max(expected, 1e-300), 0, 1))

def mixing_of(unit):
    """(k, k) matrix that gives independent errors the correlation of standardised residuals (k, n).

    A point where a metric was not measured counts as a residual of 0. Of the roots of the
    correlation the triangular one: its first row is (1, 0, ...), so the errors of the loss stay
    what they are whatever metrics were evaluated.
    """
    length = np.maximum(np.linalg.norm(unit, axis=1), 1e-300)
    direction = unit / length[:, None]
    correlation = direction @ direction.T
    np.fill_diagonal(correlation, 1 + 1e-9)  # two metrics that agree would make it singular
    return np.linalg.cholesky(correlation)

def resample(points, noise, seed):
    """Points that might as well have been measured.

    Points that share runs get new errors and keep their sizes (a parametric bootstrap). To draw
    whole runs, the usual bootstrap of clusters, fails here: nine draws of nine runs hold six
    different ones, so that all budgets at once lose a third of their sizes.
    """
    rng = np.random.default_rng(seed)
    return with_new_errors(points, noise, rng) if noise.nested else drawn_again(points, rng)

def drawn_again(points, rng):
    """Independent points, drawn with replacement inside each budget (Efron 1979)."""
    groups = [np.flatnonzero(points.budget == b) for b in range(len(points.budgets))]
    return points.take(np.concatenate([rng.choice(group, len(group)) for group in groups]))

def with_new_errors(points, noise, rng):
    """The same sizes and runs, with errors of the model of measure_noise about the parabolas."""
    runs = points.run.max() + 1
    normal = rng.standard_normal((len(noise.scale), runs + len(points.N)))
    of_run, of_point = normal[:, points.run], normal[:, runs:]  # both (k, n)
    errors = math.sqrt(noise.correlation) * of_run + math.sqrt(1 - noise.correlation) * of_point
    loss, *metrics = np.exp(noise.fitted + noise.scale * (noise.mixing @ errors))
    return replace(points, loss=loss, metrics=dict(zip(points.metrics, metrics)), records=[])

def resampled_law(points, law, noise, seed):
    """One draw of the bootstrap."""
    return law_of(resample(points, noise, seed), near=law)

def interval(answers):
    """The middle 95% of the finite answers as [lo, hi]; None where they are fewer than 20.

    Quantiles need no normal distribution, and those of ln x are the logarithms of those of x.
    """
    answers = np.array(answers, float)
    answers = answers[np.isfinite(answers)]
    return np.quantile(answers, [0.025, 0.975]).tolist() if len(answers) >= 20 else None

@dataclass(frozen=True)
class Fit:
    """Points, their law, and the laws of their resamples."""
    points: Points
    law: Law      # of the points
    noise: Noise  # by which they were resampled
    draws: list   # the laws of the resamples
    metric: str   # which loss
    n_kind: str   # which parameters N counts
    seed: int     # of the resamples

    def interval(self, question):
        """The 95% interval of a question: a function of a Law that returns a number."""
        return interval([question(law) for law in self.draws])

    def with_interval(self, question):
        """{"value", "ci95"}: the law's own answer to a question, and its interval."""
        return {"value": float(question(self.law)), "ci95": self.interval(question)}

    def with_intervals(self, question):
        """The same for a question whose answer is an array (k,): a list of k answers."""
        answers = np.array([question(law) for law in (self.law, *self.draws)])  # (1 + draws, k)
        return [{"value": float(value), "ci95": interval(drawn)}
                for value, drawn in zip(answers[0], answers[1:].T)]

def fit(records, metric="val_loss_ema", n_kind="blocks", resamples=1000, seed=0):
    """Records -> Fit. Refused where neither three budgets nor the parametric form can be fitted.

    metric and n_kind as in points_of; `resamples` is the number of draws from `seed`.
    """
    points = points_of(records, metric, n_kind)
    law = law_of(points)
    if len(law.usable()) < 3 and law.form.refused:
        reasons = [f"C = {v.C:.3g}: {v.reason}" for v in law.vertices if v.reason]
        raise Refused(f"{too_few(law)} ({'; '.join(reasons[:3])}{'; ...' * (len(reasons) > 3)}); "
                      f"parametric form: {law.form.refused}")
    noise = measure_noise(points, law)
    draw = partial(resampled_law, replace(points, records=[]), law, noise)
    # A seed per resample: the same laws whatever the number of processes.
    seeds = np.random.SeedSequence(seed).spawn(resamples)
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        draws = list(tqdm(pool.map(draw, seeds, chunksize=10), "bootstrap", resamples, leave=False,
                          unit=" resamples", disable=None))
    if "N" in records[0]:
        metric, n_kind = "loss", "as given"
    return Fit(points, law, noise, draws, metric, n_kind, seed)

def too_few(law):
    """Why there is no line."""
    return f"{len(law.usable())} usable budgets of {len(law.vertices)}, a line needs 3"

# ---- 7. what law.json tells --------------------------------------------------------------------

def report_of(fitted):
    """law.json as a dict of plain numbers, lists and words. N counts parameters, D tokens, C FLOPs.

    What is missing is None; report["reasons"] says why.
    """
    points, noise, records = fitted.points, fitted.noise, fitted.points.records
    labels = sorted({label for record in records for label in record.get("metrics", {})})
    report = {
        "schema": 1, "metric": fitted.metric, "n_kind": fitted.n_kind,
        "c_kind": records[0].get("count", "as given"), "runs": int(points.run.max() + 1),
        "n_points": len(points.N), "nested": bool(noise.nested),
        "error_correlation": noise.correlation, "resamples": len(fitted.draws),
        "seed": fitted.seed, "budgets": budget_reports(fitted),
        "N_opt": line_report(fitted, "N"), "D_opt": line_report(fitted, "D"),
        "loss": {"power": line_report(fitted, "loss"), "floor": floor_report(fitted, "loss")},
        "metrics": {label: metric_report(fitted, label) for label in labels},
        "offsets": offsets(fitted), "parametric": form_report(fitted),
        "method_spread": method_spread(fitted), **extrapolations(fitted),
        "runs_left_out": runs_left_out(points) if noise.nested else [],
        "noise": noise_of_a_point(points, fitted.metric), "points": point_reports(fitted)}
    report["reasons"] = reasons(fitted.law, report)
    report["warnings"] = warnings(fitted, report)
    return report

def reasons(law, report):
    """{what is missing: why}, of all that law.json lacks."""
    found = {}
    if len(law.usable()) < 3:
        found = dict.fromkeys(("N_opt", "D_opt", "loss.power", "backtest", "how_much_is_enough"),
                              too_few(law))
    elif len(law.usable()) == 3:
        # Two points always lie on a line, so leaving one of three out tests nothing.
        found = dict.fromkeys(("backtest", "jackknife95"), "3 usable budgets: a line through the "
                              "other two proves nothing")
    for name in law.floors:
        why = why_no_floor(law, name)
        if why:
            found["loss.floor" if name == "loss" else f"metrics.{name}.floor"] = why
    parts = {"parametric": report["parametric"]}
    for name, metric in report["metrics"].items():
        parts |= {f"metrics.{name}": metric, f"N* of {name}": metric.get("own_optimum", {})}
    for row in report["offsets"]:
        parts[f"offset of {row['metric']} on {row['data']}"] = row
    return found | {name: part["refused"] for name, part in parts.items() if "refused" in part}

def point_reports(fitted):
    """A row for every point; its residual is of ln loss, 0 where its budget has no parabola."""
    points = fitted.points
    residual = np.log(points.loss) - fitted.noise.fitted[0]  # (n,)
    windows = np.concatenate([vertex.window for vertex in fitted.law.vertices])
    return [{"N": points.N[i], "D": points.D[i], "C": points.C[i], "loss": points.loss[i],
             "budget": points.budgets[points.budget[i]], "in_window": i in windows,
             "residual": residual[i], "source": record["source"]}
            for i, record in enumerate(points.records)]

def budget_reports(fitted):
    """A row for every budget: its vertex, or the reason why it has none."""
    rows = []
    for b, vertex in enumerate(fitted.law.vertices):
        # Resamples may have a minimum where the points have none: that is no interval of anything.
        within = fitted.interval(lambda law: law.vertices[b].value("N"))
        rows.append({"C": vertex.C, "n_points": int((fitted.points.budget == b).sum()),
                     "used": not vertex.reason, "reason": vertex.reason,
                     "N_opt": vertex.values.get("N"), "D_opt": vertex.values.get("D"),
                     "loss_opt": vertex.values.get("loss"),
                     "N_opt_ci95": None if vertex.reason else within,
                     "flags": [] if vertex.reason else flags(fitted.points, vertex)})
    return rows

def flags(points, vertex):
    """What makes the parabola of a budget doubtful, in words. The budget is used all the same."""
    N, y, found = points.N[vertex.window], np.log(points.loss[vertex.window]), []
    M = residual_maker(N)
    rest, free = M @ y, len(y) - 3  # residuals, degrees of freedom
    square = rest @ rest
    # Student's t test of the curvature: by how much does it lower the squares of a straight line?
    bent = y @ residual_maker(N, degree=1) @ y - square
    if bent < stdtrit(free, 0.975) ** 2 * square / free:
        found.append("curvature not significant")
    # Far from the middle of its sizes a vertex depends on the cubic term that we leave out.
    low, best, high = np.log([N.min(), vertex.value("N"), N.max()])
    if abs(best - (low + high) / 2) > (high - low) / 4:
        found.append("vertex off centre")
    if len(np.unique(N)) >= 5 and free >= 2 and square > 1e-18 * free:
        # Studentized residuals: a point's distance from the parabola through the others, in
        # standard errors. 1 - M is the leverage; / len(y) is Bonferroni's, for so many tests.
        room = np.maximum(np.diag(M), 1e-9)
        error = np.sqrt(np.maximum((square - rest**2 / room) / (free - 1), 1e-30) * room)
        far = np.abs(rest) > -stdtrit(free - 1, 0.025 / len(y)) * error
        found += [f"point off by {100 * math.expm1(rest[i] / room[i]):+.2g}% at N = {N[i]:.4g}"
                  for i in np.flatnonzero(far)]
    return found

def line_report(fitted, name):
    """A straight line as value = coefficient C^exponent; None with fewer than 3 budgets."""
    power, vertices = fitted.law.lines[name], fitted.law.vertices
    if not power.exists:
        return None
    C, values = curve(vertices, name)
    rest, spread = np.log(values / power.predict(C)).var(), np.log(values).var()
    return {"coefficient": power.coefficient, "exponent": power.exponent,
            "ci95": fitted.interval(lambda law: law.lines[name].exponent),
            "coefficient_ci95": fitted.interval(lambda law: law.lines[name].coefficient),
            "jackknife95": jackknife(vertices, name),
            "r2": float(1 - rest / spread) if spread else None}

def jackknife(vertices, name):
    """The 95% interval of the exponent from leaving out one budget after the other (Tukey 1958).

    The bootstrap sees only the noise of points. This one also sees budgets that scatter around the
    line for another reason, so it is the honest one where the two differ.
    """
    vertices = [vertex for vertex in vertices if math.isfinite(vertex.value(name))]
    k, exponent = len(vertices), power_law(vertices, name).exponent
    if k < 4:  # a line through two budgets says nothing
        return None
    left = [power_law(vertices[:i] + vertices[i + 1:], name).exponent for i in range(k)]  # (k,)
    error = stdtrit(k - 1, 0.975) * math.sqrt((k - 1) * np.var(left))
    return [exponent - error, exponent + error]

def runs_left_out(points):
    """The exponents of N*, D* and the loss without each run in turn. Which run carries the law?

    A run through many budgets bends all their parabolas at once, in the same direction. No interval
    shows that. Only for points that share runs: else every point would be a row.
    """
    points, rows = replace(points, metrics={}), []
    for run in np.unique(points.run):
        kept = points.run != run
        rest = points.take(kept)
        vertices = [parabola(rest, b) for b in range(len(points.budgets))]
        lines = law_through(vertices, [], ["N", "D", "loss"]).lines
        exponents = {f"exponent_{kind}": lines[name].exponent if lines[name].exists else None
                     for kind, name in (("N", "N"), ("D", "D"), ("L", "loss"))}
        first = points.records[np.flatnonzero(~kept)[0]]
        rows.append({"left_out": Path(str(first.get("run", points.N[~kept][0]))).name,
                     "N": float(points.N[~kept][0]),
                     "budgets": sum(not vertex.reason for vertex in vertices), **exponents})
    return rows

def why_no_floor(law, name):
    """Why the loss or a metric has no law with a floor, in words; None: it has one."""
    if name != "loss" and law.lines[name].exponent > 0:
        return "it rises with C"
    if not law.floors[name].exists:
        return f"needs 4 usable budgets, there are {len(curve(law.vertices, name)[0])}"
    if law.floors[name].floor == 0:
        return "the minima show no floor: L_inf = 0 fits best, which is the pure power law"
    return None

def floor_report(fitted, name):
    """The law with a floor as value = L_inf + coefficient C^-exponent, or None."""
    if why_no_floor(fitted.law, name):
        return None
    floor = fitted.law.floors[name]
    return {"L_inf": floor.floor, "coefficient": floor.coefficient, "exponent": -floor.exponent,
            "ci95": fitted.interval(lambda law: -law.floors[name].exponent),
            "L_inf_ci95": fitted.interval(lambda law: law.floors[name].floor)}

def metric_report(fitted, name):
    """The law of a metric at N*, or {"refused": why}; of an FD also the N best for itself.

    The model is chosen by its loss, as the paper does, and the metric read there. FD alone has an
    optimum of its own that may lie elsewhere.
    """
    if name not in fitted.points.metrics:
        values = [record.get("metrics", {}).get(name, 1) for record in fitted.points.records]
        return {"refused": f"not positive at {sum(value <= 0 for value in values)} points"}
    report = line_report(fitted, name)
    if not report:
        budgets = len(curve(fitted.law.vertices, name)[0])
        return {"refused": f"measured at 4 sizes of only {budgets} usable budgets, a line needs 3"}
    report["floor"] = floor_report(fitted, name)
    if name.startswith("fd"):
        report["own_optimum"] = own_optimum(fitted, name)
    return report

def own_optimum(fitted, name):
    """The N best for an FD itself: its line or "refused", and per budget its value or a reason.

    Only at budgets that are usable for the loss: at others the noise of the points is not known.
    """
    own, rows = f"N* of {name}", []
    for b, vertex in enumerate(fitted.law.vertices):
        reason = "not usable for the loss" if vertex.reason else (
            parabola_of_metric(fitted.points, b, name).reason)
        best = None if reason else fitted.with_interval(lambda law: law.vertices[b].value(own))
        rows.append({"C": vertex.C, "reason": reason, "N_opt": best})
    found, draws = sum(row["reason"] is None for row in rows), len(fitted.draws)
    seen = sum(law.lines[own].exists for law in fitted.draws)
    report = line_report(fitted, own)
    if found < 3:
        report = {"refused": f"{found} budgets with an optimum of its own, a line needs 3"}
    elif seen < 0.9 * draws:
        # The resamples that have one are selected: their interval need not even hold the value.
        report = {"refused": f"only {seen} of {draws} resamples have an optimum of its own"}
    return {**report, "budgets": rows}

def offsets(fitted):
    """What metrics have more at N* on other data than on the training data, as one row each.

    The paper finds a constant difference in loss, VLB and likelihood, and one in FID that widens.
    So a straight line in ln C is asked of the difference, and of the logarithm of the ratio.
    """
    home, rows = fitted.points.records[0].get("data"), []
    for other in fitted.points.metrics:
        metric, data = other.split(" on ", 1)
        here = f"{metric} on {home}"
        if data == home or here not in fitted.points.metrics:
            continue
        difference, of_difference = offset(fitted, lambda a, b: b - a, here, other)
        ratio, of_ratio = offset(fitted, lambda a, b: np.log(b / a), here, other)
        budgets = [{"C": C, "difference": difference[C], "ratio": unlogged(ratio[C])}
                   for C in difference]
        row = {"metric": metric, "data": data, "against": home, "budgets": budgets}
        if len(budgets) < 3:
            row["refused"] = f"both measured at 4 sizes of only {len(budgets)} usable budgets"
        else:
            for name, (level, slope) in (("difference", of_difference), ("ratio", of_ratio)):
                row |= {name: unlogged(level) if name == "ratio" else level,
                        f"{name}_per_decade": slope, f"{name}_is": verdict_on(level, slope)}
        rows.append(row)
    return rows

def offset(fitted, gap, here, other):
    """{C: gap} at the budgets where both metrics were measured; and (level, slope) of its line.

    The level is amid all budgets, the slope per decade of C. All as {"value", "ci95"}.
    """
    C = fitted.points.budgets
    decades = np.log10(C / fitted.points.middle)  # (B,), 0 amid the budgets

    def gaps(law):
        return gap(*np.array([(v.value(here), v.value(other)) for v in law.vertices]).T)  # (B,)

    def straight(law):
        seen = np.isfinite(gaps(law))
        if seen.sum() < 3:
            return math.nan, math.nan
        slope, level = np.polyfit(decades[seen], gaps(law)[seen], 1)
        return level, slope

    found = zip(C.tolist(), fitted.with_intervals(gaps))
    return ({budget: answer for budget, answer in found if math.isfinite(answer["value"])},
            fitted.with_intervals(straight))

def unlogged(answer):
    """A {"value", "ci95"} of a logarithm as that of the number itself."""
    return {"value": math.exp(answer["value"]),
            "ci95": answer["ci95"] and np.exp(answer["ci95"]).tolist()}

def verdict_on(level, slope):
    """Whether a gap widens with compute, as far as the intervals can tell.

    "constant" means that no slope is seen, not that there is none.
    """
    if not (level["ci95"] and slope["ci95"]):
        return "unknown"
    if sign(slope) == 0:
        return "constant"
    if sign(level) == 0:  # what may be no gap can neither widen nor shrink
        return "rises" if slope["value"] > 0 else "falls"
    return "widens" if sign(level) == sign(slope) else "shrinks"

def sign(answer):
    """+1 or -1 for a {"value", "ci95"}; 0 where the interval holds 0 or is missing."""
    low, high = answer["ci95"] or (0, 0)
    return 0 if low <= 0 <= high else math.copysign(1, low)

def form_report(fitted):
    """The parametric form with its intervals, or {"refused": why}.

    starts_discarded says how many starts ended elsewhere: with many, distrust the optimum.
    """
    form = fitted.law.form
    if form.refused:
        return {"refused": form.refused}
    constants = {key: value for key, value in asdict(form).items() if key != "refused"}
    return constants | {
        "a": form.a, "b": 1 - form.a, "starts_discarded": form.starts - form.starts_agree,
        "ci95": {name: fitted.interval(lambda law: getattr(law.form, name))
                 for name in ("E", "alpha", "beta", "a")},
        "resamples_discarded": sum(math.isnan(law.form.E) for law in fitted.draws)}

def method_spread(fitted):
    """The exponent of N* by four methods. Their spread is often larger than the interval.

    The interval is of noise alone. Another window or degree shows the bias of the parabola.
    """
    points, vertices = fitted.points, fitted.law.vertices
    everywhere = [np.flatnonzero(points.budget == b) for b in range(len(vertices))]
    wide = [parabola(points, b, window) for b, window in enumerate(everywhere)]
    cubic = [parabola(points, b, degree=3) for b in range(len(vertices)) if not vertices[b].reason]
    methods = {"parabolas": power_law(vertices, "N").exponent,
               "parabolas over all sizes": power_law(wide, "N").exponent,
               "cubics": power_law(cubic, "N").exponent, "parametric": fitted.law.form.a}
    methods = {name: a if math.isfinite(a) else None for name, a in methods.items()}
    found = [a for a in methods.values() if a is not None]
    return {"exponent_N": [min(found), max(found)] if len(found) > 1 else None, "methods": methods}

def extrapolations(fitted):
    """Laws of the smallest 3, 4, 5 .. usable budgets, and how each predicts the top one.

    The backtest is that of the last two: the top budget left out, then the top two. No interval
    can replace it. It is the only test of the straight line outside of the data.
    """
    used = [b for b, vertex in enumerate(fitted.law.vertices) if not vertex.reason]
    C, rows, backtest = fitted.points.budgets[used], [], []
    for k in range(3, len(used) + 1):
        laws = [law_through([law.vertices[b] for b in used[:k]], ["loss"], ["N"])
                for law in (fitted.law, *fitted.draws)]
        short = replace(fitted, law=laws[0], draws=laws[1:])
        tests = [prediction(short, fitted.law.vertices[b]) for b in used[k:] or used[-1:]]
        row = {"budgets": k, "beyond": C[-1] / C[k - 1]}
        for key, name in (("exponent_N", "N"), ("exponent_L", "loss")):
            row[key] = short.law.lines[name].exponent
            row[f"{key}_ci95"] = short.interval(lambda law: law.lines[name].exponent)
        rows.append(row | tests[-1])
        if len(used) - 2 <= k < len(used):
            backtest += [{"budgets_left_out": len(used) - k, **test} for test in tests]
    return {"how_much_is_enough": rows, "backtest": backtest[::-1]}

def prediction(short, vertex):
    """How a law of fewer budgets predicts a vertex: with a floor where there are 4 for one.

    Errors are shares of what was measured. vertex: one that the law has not seen, or the last.
    """
    kind = "floors" if short.law.floors["loss"].exists else "lines"
    predicted = short.with_interval(lambda law: getattr(law, kind)["loss"].predict(vertex.C))
    measured, N = vertex.value("loss"), short.law.lines["N"].predict(vertex.C)
    return {"left_out": vertex.C, "law": "with floor" if kind == "floors" else "power",
            "predicted": predicted["value"], "ci95": predicted["ci95"], "measured": measured,
            "error": predicted["value"] / measured - 1, "N_error": float(N / vertex.value("N") - 1)}

def noise_of_a_point(points, metric):
    """Paired errors between neighbouring sizes, and the spread over seeds, in percent of the loss.

    All runs are validated on the same images, times and noises. So what blurs a parabola is the
    standard error of the difference between two sizes, taken image by image. It leaves out the
    noise of training, which only runs with several seeds can tell.
    """
    errors, variances = [], []
    for b in range(len(points.budgets)):
        files = []
        for size in np.unique(points.N[points.budget == b]):
            seeds = np.flatnonzero((points.budget == b) & (points.N == size))
            same_C = seeds[points.C[seeds] == points.C[seeds[0]]]  # a CSV's budget may hold several
            if len(same_C) > 1:
                variances.append(np.log(points.loss[same_C]).var(ddof=1))
            files.append(Path(points.records[seeds[0]]["source"]).with_name("val_losses_ema.npy"))
        errors += [paired_error(one, two) for one, two in pairwise(files)
                   if metric == "val_loss_ema" and one.is_file() and two.is_file()]
    paired = {"median": float(np.median(errors)), "worst": max(errors)} if errors else None
    # Variances and not standard deviations are averaged: those of two seeds would be too small.
    spread = 100 * math.sqrt(np.mean(variances)) if variances else None
    return {"paired_se_percent": paired, "seed_spread_percent": spread,
            "paired_se_reason": None if paired else
            "no val_losses_ema.npy beside the records, or another metric",
            "seed_spread_reason": None if variances else "one seed only"}

def paired_error(one, two):
    """Standard error of the mean difference of two files of losses, in percent."""
    try:
        a, b = (np.load(file, allow_pickle=False).astype(float) for file in (one, two))  # (images,)
        return 100 * (a - b).std(ddof=1) / math.sqrt(len(a)) / b.mean()
    except (EOFError, ValueError):
        raise BadInput(f"{one} or its neighbour {two}: torn, or not the losses of the same images")

def warnings(fitted, report):
    """What a reader must know before using the law, in words. `report` is law.json so far."""
    law, points, a = fitted.law, fitted.points, fitted.law.form.a  # a: nan where it is refused
    line_of_N = report["N_opt"] or {"ci95": None, "jackknife95": None}
    low, high = line_of_N["ci95"] or (-math.inf, math.inf)
    jack = np.ptp(line_of_N["jackknife95"] or [0])
    spread = np.ptp(report["method_spread"]["exponent_N"] or [0])
    used = [vertex.C for vertex in law.usable()] or [math.nan]
    rejected = sum(not draw.lines["N"].exists for draw in fitted.draws)
    epochs = max(float(record.get("epochs") or 0) for record in points.records)
    # Of the runs the one without which the exponent of N* moves most.
    exponent = law.lines["N"].exponent
    found = [row for row in report["runs_left_out"] if row["exponent_N"] is not None]
    carrier = max(found, key=lambda row: abs(row["exponent_N"] - exponent),
                  default={"left_out": "", "exponent_N": exponent})
    far = 250 * points.budgets.max()  # the paper extrapolates that far
    gap = law.lines["loss"].predict(far) / law.floors["loss"].predict(far) - 1
    kind = "one run per N, read at several budgets" if report["nested"] else "independent runs"
    doubts = [
        (report["N_opt"] and rejected, f"{rejected} of {len(fitted.draws)} resamples left fewer "
         "than 3 usable budgets and are not in the intervals"),
        (report["N_opt"] and used[-1] < 10 * used[0], "the usable budgets span only a factor "
         f"{used[-1] / used[0]:.1f} in C: an exponent from less than a decade is a guess"),
        (a < low or a > high, f"the parametric form disagrees on N*: exponent {a:.3f}, outside the "
         f"parabolas' {low:.3f} to {high:.3f}"),
        (jack > 1.5 * (high - low), "the budgets scatter around the line of N* more than their "
         "points' noise explains: take the jackknife's interval"),
        (abs(carrier["exponent_N"] - exponent) > (high - low) / 4, f"without the run "
         f"{carrier['left_out']} the exponent of N* is {carrier['exponent_N']:.3f}, not "
         f"{exponent:.3f}: the law hangs on it more than its interval shows"),
        (spread > high - low, f"the methods differ by {spread:.3f} in the exponent of N*, more "
         "than its interval is wide"),
        (epochs > 1, f"these runs saw each image up to {epochs:.1f} times; the paper saw each "
         "once. This is the law of a data set of this size"),
        (report["loss"]["floor"], "at 250 times the top budget the pure power law is "
         f"{100 * abs(gap):.1f}% {'below' if gap < 0 else 'above'} the law with a floor: do not "
         "extrapolate it that far"),
        (points.nested is None, "no run column: the errors of the same N at different budgets "
         f"correlate {report['error_correlation']:.2f}, so points are taken for {kind}")]
    return [text for applies, text in doubts if applies]

# ---- plans and comparisons ---------------------------------------------------------------------

def parse_plan(text):
    """'1.5e21', or devices:hours:MFU as '8xH100:72h:0.4' ('8x312:72h:0.4' by peak TFLOP/s).

    -> C in FLOPs, and the FLOP/s of one device or None. Raises BadInput.
    """
    try:
        if ":" in text:
            devices, time, mfu = text.split(":")
            count, name = devices.lower().replace(" ", "").split("x", 1)
            peaks = {key.lower().replace(" ", ""): peak for key, peak in PEAK.items()}
            speed = 1e12 * float(mfu) * (peaks.get(name) or float(name))
            seconds = float(time[:-1]) * {"m": 60, "h": 3600, "d": 86400}[time[-1]]
            C = int(count) * speed * seconds
        else:
            C, speed, mfu = float(text), None, 1
    except (IndexError, KeyError, ValueError):
        raise BadInput(f"--plan {text}: neither FLOPs (1.5e21) nor devices:hours:MFU (8xH100:72h:"
                       f"0.4); devices: peak TFLOP/s (8x312:72h:0.4), or {', '.join(PEAK)}")
    if not 0 < float(mfu) <= 1:
        raise BadInput(f"--plan {text}: the MFU must lie in (0, 1], not {mfu}")
    if not 0 < C < math.inf:
        raise BadInput(f"--plan {text}: not a positive number of FLOPs")
    return C, speed

def plan(fitted, text):
    """The run to make with a budget: its shape, cost, results, and how far beyond the data it is.

    What is not known is None, and `reason` names it. Raises BadInput for a text that is no budget.
    """
    C, speed = parse_plan(text)
    points, law, form = fitted.points, fitted.law, fitted.law.form
    batch = max(points.records, key=lambda record: record["C"]).get("batch")
    speed = speed or flops_per_second(points)

    def expected(name, kind="lines"):
        return fitted.with_interval(lambda law: getattr(law, kind)[name].predict(C))

    def cost_of_half_or_twice(law):
        # ln loss is a parabola in ln N. The median, because one budget's curvature is a poor guess.
        curvature = np.median([vertex.curvature for vertex in law.usable()] or [math.nan])
        return np.expm1(curvature * math.log(2) ** 2)

    found = {"asked": text, "C": C, "times_beyond_the_data": C / points.budgets.max(),
             "N": expected("N"), "D": expected("D"), "loss_power": expected("loss"),
             "loss_floor": expected("loss", "floors") if law.floors["loss"].floor > 0 else None,
             "loss_parametric": None,
             "metrics": {name: expected(name) for name in points.metrics if law.lines[name].exists},
             "cost_of_N_half_or_twice": fitted.with_interval(cost_of_half_or_twice)}
    if not form.refused:
        N, D = form.optimum(C)
        found |= {"loss_parametric": form.loss(N, D),
                  "cost_of_N_half_parametric": form.loss(N / 2, D * 2) / form.loss(N, D) - 1,
                  "cost_of_N_twice_parametric": form.loss(N * 2, D / 2) / form.loss(N, D) - 1}
    # What follows from the records: how such a model was trained, and how fast.
    tokens = tokens_per_image(points)
    images = tokens and fitted.with_interval(lambda law: law.lines["D"].predict(C) / tokens)
    depth, width = nearest_shape(points, found["N"]["value"])
    found |= {"batch": batch, "images": images, "depth": depth, "width": width,
              "steps": images["value"] / batch if images and batch else None,
              "device_hours": C / speed / 3600 if speed else None}
    missing = [key for key in ("images", "steps", "depth", "device_hours") if found[key] is None]
    found["reason"] = f"{', '.join(missing)} unknown: the records do not tell" if missing else None
    return found

def paper_plan(text):
    """The same from the paper's own coefficients and its family: width = 64 depth, batch 1024.

    Its blocks have 12 depth width^2 parameters (attention 4, the MLP 8), so N fixes the depth.
    """
    C, _ = parse_plan(text)
    N, D, loss = (k * C**p for k, p in PAPER.values())
    depth = round((N / 12 / PAPER_ASPECT**2) ** (1 / 3))
    return {"asked": text, "C": C, "N": N, "D": D, "train_loss": loss, "images": D / PAPER_TOKENS,
            "steps": D / PAPER_TOKENS / PAPER_BATCH, "depth": depth, "width": PAPER_ASPECT * depth}

def nearest_shape(points, N):
    """(depth, width) with about N parameters and the family's aspect; None, None without shapes.

    N = ratio depth width^2, with the ratio of the largest model: where N counts all parameters the
    ratio drifts with size. Width is a multiple of the heads' width.
    """
    shapes = [(record.get("depth"), record.get("width")) for record in points.records]
    if not all(depth and width for depth, width in shapes):
        return None, None
    depth, width = shapes[points.N.argmax()]
    ratio = points.N.max() / depth / width**2
    head, depths = points.records[0].get("head_dim") or 1, {depth for depth, _ in shapes}
    aspects = [width / depth for depth, width in shapes]
    low, high = min(aspects), max(aspects)
    if len(depths) == 1:  # a family of one depth has no aspect to keep: it stays at its depth
        low, high = 0, math.inf
    else:
        depths = range(1, 513)

    def distance(shape):  # in ln N; of about equal ones the one of the usual aspect
        depth, width = shape
        strange = 10 * (not low <= width / depth <= high)
        unusual = 0.1 * abs(math.log(width / depth / np.median(aspects)))
        return abs(math.log(ratio * depth * width**2 / N)) + unusual + strange

    heads = {depth: int(math.sqrt(N / ratio / depth) / head) for depth in depths}  # rounded down
    return min(((depth, head * max(1, n)) for depth in depths
                for n in (heads[depth], heads[depth] + 1)), key=distance)

def tokens_per_image(points):
    """Tokens of an image with caption and time; None where the records do not tell, or differ."""
    ratios = [record["D"] / record["images"] for record in points.records if record.get("images")]
    return float(np.median(ratios)) if ratios and max(ratios) < 1.01 * min(ratios) else None

def flops_per_second(points):
    """Median speed of one device at the largest budget; None where the records do not tell.

    The median, because other work beside a run may have slowed it.
    """
    speeds = [record["C"] / record["device_hours"] / 3600 for record in points.records
              if record.get("device_hours") and record["C"] > 0.9 * points.budgets.max()]
    return float(np.median(speeds)) if speeds else None

NAMES = {"N": "N*", "D": "D*", "loss": "loss"}  # how the page calls the three lines

def side_by_side(fits):
    """Fits by name -> a row for each: exponents, and N* and loss at one C amid the data of all.

    Each with its own interval. Whether two differ is not for these but for compare() to say: two
    intervals may overlap and the difference still be sure.
    """
    C = math.exp(np.mean([math.log(one.points.middle) for one in fits.values()]))
    rows = []
    for results, one in fits.items():
        row = {"results": results}
        for name, label in NAMES.items():
            row[f"exponent of {label}"] = one.with_interval(lambda law: law.lines[name].exponent)
        for name in ("N", "loss"):
            row[f"{NAMES[name]} at C"] = one.with_interval(lambda law: law.lines[name].predict(C))
        rows.append(row)
    return {"C": C, "rows": rows}

def compare(one, two, names, budgets):
    """Two Fits: differences with intervals, where the losses cross, how much compute B saves.

    The two bootstraps are independent, so pairs of their laws are a bootstrap of the pair: a Fit
    whose laws are pairs of laws answers a question about both.
    """
    pair = replace(one, law=(one.law, two.law), draws=list(zip(one.draws, two.draws)))
    C = math.sqrt(one.points.middle * two.points.middle)  # amid the data; C = 1 is far outside
    exponents, levels = [], []
    for name, label in NAMES.items():
        a, b = one.law.lines[name], two.law.lines[name]
        exponents.append({"exponent of": label, "A": a.exponent, "B": b.exponent,
                          "B-A": pair.with_interval(lambda ab: ab[1].lines[name].exponent
                                                    - ab[0].lines[name].exponent)})
        levels.append({"level of": label, "A": a.predict(C), "B": b.predict(C),
                       "B/A": pair.with_interval(lambda ab: ab[1].lines[name].predict(C)
                                                 / ab[0].lines[name].predict(C))})
    a, b = one.points.records[0], two.points.records[0]
    of_N, of_loss = sign(exponents[0]["B-A"]), sign(exponents[2]["B-A"])
    # Losses of other images, or over another C, can't be ranked: their exponents can.
    unlike = [key for key in ("count", "data", "resolution") if a.get(key) != b.get(key)]
    reason = "the loss exponents do not differ within their interval, the curves may be parallel"
    if unlike:
        reason = f"the losses can't be ranked: not the same {' and '.join(unlike)}"
    meet = of_loss and not unlike
    return {"A": names[0], "B": names[1], "exponents": exponents, "C": C,
            "levels": [row for row in levels if not unlike or row["level of"] != "loss"],
            "crossing": pair.with_interval(crossing) if meet else
            {"value": None, "ci95": None, "reason": reason},
            "multiplier": [{"C": C, **pair.with_interval(partial(compute_multiplier, C=C))}
                           for C in budgets if not unlike],
            "warnings": [f"{key} differs ({a.get(key)} and {b.get(key)}): compare exponents only"
                         for key in unlike],
            "reading": reading(a, b, of_N, of_loss)}

def crossing(pair):
    """The C at which two laws have the same loss: a C^p = b C^q, so C = (a / b)^(1 / (q - p))."""
    a, b = (law.lines["loss"] for law in pair)
    return np.float_power(a.coefficient / b.coefficient, 1 / (b.exponent - a.exponent))

def compute_multiplier(pair, C):
    """The compute that the first law needs to reach the loss of the second at C, over C.

    A ratio of losses says little: where the exponent is 0.1, 5% of the loss are 40% of the compute.
    """
    a, b = (law.lines["loss"] for law in pair)
    return np.float_power(b.predict(C) / a.predict(C), 1 / a.exponent)

def reading(a, b, of_N, of_loss):
    """What the signs of the differences of exponents say about two records, as the paper reads it.

    On the same data a better model has the smaller exponent of N*; better data do the opposite.
    Either makes the exponent of the loss more negative.
    """
    kinds = {"the model": ("arch",), "the data": ("data", "captions", "train_images")}
    changed = [kind for kind, keys in kinds.items()
               if any(a.get(key) != b.get(key) for key in keys)]
    loss = {1: "A's loss falls faster with compute.", -1: "B's loss falls faster with compute.",
            0: "These data cannot tell whose loss falls faster: the exponents agree within their "
               "interval."}
    size = {1: "N* grows faster with compute in B, which the paper reads as better data or a worse "
               "model in B.",
            -1: "N* grows more slowly with compute in B, which the paper reads as a better model "
                "or worse data in B.",
            0: "Nor can they tell better model from better data: the exponents of N* agree within "
               "their interval."}
    changed = " and ".join(changed) or "neither model nor data"
    return f"By their records {changed} changed from A to B. {loss[of_loss]} {size[of_N]}"

# ---- the page to read --------------------------------------------------------------------------

def show(x):
    """A number, an interval, a {"value", "ci95"}, or words; "-" for what is missing."""
    if isinstance(x, dict):
        return x.get("reason") or f"{show(x['value'])} {show(x['ci95'])}"
    if isinstance(x, list):
        return "; ".join(x) if not x or isinstance(x[0], str) else f"[{', '.join(map(show, x))}]"
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)

def table(rows, hidden=()):
    """Rows (dicts) as lines of a Markdown table that is also aligned in a terminal.

    Columns are the keys of law.json, so that a reader finds a number there by its name.
    """
    def cell(row, column):
        x = row.get(column)
        is_share = column.endswith("error") and x is not None
        return f"{100 * x:+.2f}%" if is_share else show(x)

    columns = [key for key in dict.fromkeys(key for row in rows for key in row)
               if key not in hidden]
    cells = [columns, *([cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""]

def listed(content, prefix=""):
    """A dict as rows "what", "value"; dicts in it are unfolded, what is missing is left out."""
    rows = []
    for key, value in (content or {}).items():
        if isinstance(value, dict) and "value" not in value:
            rows += listed(value, f"{prefix}{key} ")
        elif show(value) not in ("-", ""):
            rows.append({"what": prefix + key, "value": value})
    return rows

def page(report, reference=False):
    """law.md, which is also what the command prints: law.json as tables."""
    kind = "independent"
    if report["nested"]:
        kind = f"share runs, errors correlate {report['error_correlation']:.2f} along a run"
    lines = [f"# The law of {report['metric']}", "",
             f"{report['n_points']} points of {report['runs']} runs at {len(report['budgets'])} "
             f"budgets. N: {report['n_kind']}; C: {report['c_kind']}. Intervals 95% from "
             f"{report['resamples']} resamples; points {kind}.", ""]
    # What a reader must know before the numbers stands before them.
    warned = [f"- {warning}" for warning in report["warnings"]] or ["none"]
    lines += ["## Warnings", "", *warned, ""]
    for title, rows, *hidden in sections(report, reference):
        if rows:
            lines += [f"## {title}", "", *table(rows, hidden)]
    return "\n".join(lines)

def sections(report, reference):
    """(title, rows, hidden columns ..) of every table; one without rows is left out.

    Most are parts of law.json as they are. What decides whether to trust the law comes before what
    it is good for.
    """
    metrics = report["metrics"]
    own = {name: law["own_optimum"] for name, law in metrics.items() if "own_optimum" in law}
    laws = {"N*": report["N_opt"], "D*": report["D_opt"], "loss": report["loss"]["power"],
            **metrics, **{f"N* of {name}": law for name, law in own.items()}}
    lines = [{"law": name, **law} for name, law in laws.items() if law and "refused" not in law]
    if reference:
        for row, (_, exponent) in zip(lines, PAPER.values()):
            row["the paper's exponent"] = exponent
    floors = [{"law": name, **law["floor"]} for name, law in
              {"loss": report["loss"], **metrics}.items() if law.get("floor")]
    budgets = [row | {"reason": row["reason"] and f"NOT USED: {row['reason']}"}
               for row in report["budgets"]]
    yield ("Lines: value = coefficient C^exponent", lines, "floor", "own_optimum",
           "budgets", "coefficient_ci95")
    yield ("With a floor: value = L_inf + coefficient C^-exponent", floors)
    yield ("Parametric: loss = E + A N^-alpha + B D^-beta, so N* ~ C^a",
           listed(report["parametric"]))
    yield ("The exponent of N* by method", listed(report["method_spread"]["methods"]))
    yield ("Which run carries the law? Each left out in turn", report["runs_left_out"])
    yield ("Budgets", budgets, "used")
    yield ("Missing, and why", listed(report["reasons"] | report.get("not_compared", {})))
    yield ("Noise of a point, % of the loss", listed(report["noise"]))
    yield ("Offsets at N* from the training data (constant: the slope's interval holds 0)",
           report["offsets"], "budgets", "against")
    for name, law in own.items():
        yield (f"The model best for {name}", law["budgets"])
    yield ("Backtest: the top budgets, predicted from the rest", report["backtest"])
    yield ("How much is enough: the smallest budgets predict the top one",
           report["how_much_is_enough"], "left_out", "law", "measured", "N_error")
    yield ("What a count does: N counted in two ways", report["n_kinds"])
    yield ("Plan", listed(report["plan"]))
    yield ("The paper's own plan", listed(report["paper_plan"]))
    for one in report.get("comparisons", ()):
        yield (f"A = {one['A']} against B = {one['B']}", one["exponents"])
        yield (f"Levels at C = {show(one['C'])}", one["levels"])
        yield ("The compute that A needs to reach B's loss at C, over C", one["multiplier"])
        yield ("What follows", listed({"the losses cross at C =": one["crossing"],
                                       "reading": one["reading"], "WARNING": one["warnings"]}))
    if "side_by_side" in report:
        beside = report["side_by_side"]
        yield (f"The laws side by side, at C = {show(beside['C'])}", beside["rows"])

# ---- the command -------------------------------------------------------------------------------

def arguments(argv):
    """The flags. Raises BadInput."""
    parser = argparse.ArgumentParser("fit.py", allow_abbrev=False, description="Fit a scaling law.")
    parser.add_argument("paths", nargs="*", metavar="PATH", default=["results/quick"],
                        help="results directories or CSV files (default: results/quick)")
    parser.add_argument("--out", type=Path, help="folder (default: PATH/law, or ./law for a CSV "
                        "and with --plan, --compare, --reference)")
    parser.add_argument("--metric", default="val_loss_ema", help="the loss (paper: train_loss)")
    parser.add_argument("--n", choices=("blocks", "total"), default="blocks", help="what N counts")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="R", help="resamples")
    parser.add_argument("--plan", metavar="C", help="FLOPs, or devices:hours:MFU (8xH100:72h:0.4)")
    parser.add_argument("--compare", metavar="PATH", nargs="+", default=[],
                        help="other results or CSV files, each compared with the first")
    parser.add_argument("--reference", choices=("paper",), help="show the paper's laws too")

    def complain(message):
        raise BadInput(message)

    parser.error = complain  # one line and our exit status, without the usage
    args = parser.parse_args(argv)
    if args.bootstrap < 20:
        raise BadInput(f"--bootstrap {args.bootstrap}: an interval needs 20 resamples")
    if args.plan:
        parse_plan(args.plan)  # complain before a minute of fitting, not after
    return args

def run(args):
    """Fit, compare, plan; write the page, the numbers and the pictures; print the page.

    Nothing is written before all is computed: a refusal leaves the files of an older law as they
    are. Raises BadInput and Refused.
    """
    paper = paper_plan(args.plan) if args.reference and args.plan else None
    if paper and args.paths == ["results/quick"] and not Path("results/quick").exists():
        # The paper's plan needs no results of ours, as in a fresh clone.
        print("\n".join(["## The paper's own plan", "", *table(listed(paper))]))
        return
    records, first = read(args.paths), Path(args.paths[0])
    if "N" in records[0] and (args.n, args.metric) != ("blocks", "val_loss_ema"):
        raise BadInput(f"--n {args.n} --metric {args.metric}: a CSV has one N and one loss")
    fitted = fit(records, args.metric, args.n, args.bootstrap)
    report = report_of(fitted)
    if (args.plan or args.compare) and not report["N_opt"]:
        raise Refused(f"{args.paths[0]} has no law for --plan or --compare: {too_few(fitted.law)}")
    report |= {"n_kinds": both_counts(fitted, report, records, args), "plan": None,
               "paper_plan": paper}
    if args.plan:
        report["plan"] = plan(fitted, args.plan)
        beyond = report["plan"]["times_beyond_the_data"]
        if beyond > 1:
            report["warnings"].append(f"the plan EXTRAPOLATES {beyond:.3g} TIMES BEYOND THE "
                                      "LARGEST BUDGET MEASURED")
    fits = compare_all(fitted, report, args) if args.compare else {}
    # A question put to a law leaves the folder of the law alone.
    plain = first.is_dir() and not (args.plan or args.compare or args.reference)
    out = args.out or (first / "law" if plain else Path("law"))
    out.mkdir(parents=True, exist_ok=True)
    text, numbers = page(report, args.reference), json.dumps(report, indent=1, allow_nan=False)
    drawn = draw_all(out, fitted, report, fits, args.reference)
    write(out / "law.md", lambda file: file.write_text(text))
    write(out / "law.json", lambda file: file.write_text(numbers + "\n"))
    print(f"{text}\n{out}: law.md law.json {' '.join(drawn)}")

def both_counts(fitted, report, records, args):
    """The exponent of N* with N counted in both ways, a row for each that has one.

    Embedding and head are a large share of a small model and a small one of a large model. So
    whether N counts them tilts the line (Porian et al. 2024); a reader should see by how much.
    """
    if "N" in records[0]:
        return None
    rows = []
    for n_kind in (args.n, {"blocks": "total", "total": "blocks"}[args.n]):
        try:
            bare = [{**record, "metrics": {}} for record in records]  # they would only take time
            one = fitted if n_kind == args.n else fit(bare, args.metric, n_kind, args.bootstrap)
        except Refused as reason:
            report["warnings"].append(f"with the other count of N there is no law: {reason}")
            continue
        exponent = one.with_interval(lambda law: law.lines["N"].exponent)
        if one.law.lines["N"].exists:
            rows.append({"n_kind": n_kind, "exponent": exponent["value"], "ci95": exponent["ci95"],
                         "a_parametric": None if one.law.form.refused else one.law.form.a})
    return rows

def compare_all(fitted, report, args):
    """Every path of --compare against the first, into the report. -> {name: Fit}.

    One without a law is named and passed over. Refused where none has one.
    """
    paths = [args.paths[0], *args.compare]
    short = [Path(path).name for path in paths]
    names = short if len(set(short)) == len(short) else paths
    fits, comparisons, without = {names[0]: fitted}, [], {}
    for k, (path, name) in enumerate(zip(paths[1:], names[1:]), 1):
        try:
            # Another seed: two bootstraps with the same draws would not be independent.
            other = fit(read([path]), args.metric, args.n, args.bootstrap, seed=k)
            if not other.law.lines["N"].exists:
                raise Refused(too_few(other.law))
        except Refused as reason:
            without[name] = str(reason)
            continue
        low, high = zip(*(one.points.budgets[[0, -1]] for one in (fitted, other)))
        budgets = list(np.geomspace(max(low), min(high), 3))  # those that both have measured
        budgets += [report["plan"]["C"]] if args.plan else []
        comparisons.append(compare(fitted, other, (paths[0], path), budgets))
        fits[name] = other
    if not comparisons:
        raise Refused("; ".join(f"{name}: {why}" for name, why in without.items()))
    report |= {"comparisons": comparisons, "not_compared": without,
               "side_by_side": side_by_side(fits)}
    return fits

def write(file, save):
    """A file appears whole or not at all."""
    torn = file.with_name(f"{file.name}.tmp")
    save(torn)
    os.replace(torn, file)

def main(argv=None):
    """The command line. -> exit status: 0, 2 for bad input, 3 for a refusal."""
    try:
        run(arguments(argv))
        return 0
    except BadInput as error:
        print(f"fit.py: {error}", file=sys.stderr)
        return 2
    except Refused as error:
        print(f"fit.py: refused: {error}", file=sys.stderr)
        return 3
    except OSError as error:  # a full disk, a folder that may not be written
        print(f"fit.py: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2

# ---- the pictures ------------------------------------------------------------------------------

UNITS = {"vlb": ", bits/dim", "nll": ", bits/dim", "vlb_minus_nll": ", bits/dim",
         "caption_accuracy": ", share of captions"}
FLOPS = "C, training FLOPs"

def draw_all(out, fitted, report, fits, reference):
    """Draw what there is into the folder; what an older law left goes. -> names of files."""
    metrics = [name for name, law in report["metrics"].items() if "refused" not in law]
    figures = {"law.png": draw_law(fitted, report, reference),
               "law_diagnostics.png": draw_diagnostics(fitted, report),
               "curves.png": draw_curves(fitted),
               "metrics.png": draw_metrics(fitted, report, metrics) if metrics else None,
               "compare.png": draw_comparison(fits) if fits else None}
    for name, figure in figures.items():
        if figure:
            write(out / name, lambda file: figure.savefig(file, dpi=110, format="png"))
        else:
            (out / name).unlink(missing_ok=True)
    return [name for name, figure in figures.items() if figure]

def new_figure(rows, columns, size, title=None):
    """A figure of size (width, height) inches and its axes (rows, columns).

    Without pyplot, which would look for a screen and keep every figure alive.
    """
    from matplotlib.figure import Figure  # takes most of a second: not for every import of fit
    figure = Figure(size, layout="constrained")
    figure.suptitle(title)
    return figure, figure.subplots(rows, columns, squeeze=False)

def colour_scale(values, name):
    """A logarithmic colour map over positive values; its last tenth is too light to be read."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    low, high = min(values), max(values)
    return ScalarMappable(LogNorm(low, high * (high / low) ** (1 / 9)), name)

def log_axes(ax, xlabel, ylabel, title, fine=""):
    """Labels, a legend and logarithmic axes, after all is drawn. Hides axes with nothing on them.

    `fine` names axes ("x", "y") that span only a part of a decade. There matplotlib's own ticks say
    nothing or run into each other: these get round numbers.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
    ax.set_title(title, fontsize=10)
    if not ax.has_data():
        ax.axis("off")
        return
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.xaxis.set_minor_formatter("")
    for letter in fine:
        axis = getattr(ax, f"{letter}axis")
        low, high = axis.get_view_interval()
        axis.set_major_locator(MaxNLocator(8, steps=[1, 2, 5, 10]) if high < 6 * low else
                               LogLocator(subs=[1, 2, 5]))
        axis.set_major_formatter("{x:.4g}")
        axis.set_minor_locator(NullLocator())
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=8)

def draw_band(ax, fitted, kind, name, C, colour, label):
    """A law of one kind ("lines" or "floors") over C with the middle 95% of its resamples.

    At each C on its own: so the band widens away from the data, as it should.
    """
    curves = np.array([getattr(law, kind)[name].predict(C) for law in fitted.draws])
    curves = curves[np.isfinite(curves).all(1)]
    ax.plot(C, getattr(fitted.law, kind)[name].predict(C), color=colour, lw=1.5, label=label)
    if len(curves) >= 20:
        low, high = np.quantile(curves, [0.025, 0.975], axis=0)
        ax.fill_between(C, low, high, color=colour, alpha=0.2, lw=0)

def draw_line(ax, fitted, name, colour, label, dots=None, reach=1.3):
    """A straight line with its band, and what was found at every budget, with its interval.

    dots: (B, 4) their colours, if other than the line's. reach: how far beyond the budgets.
    """
    line, C = fitted.law.lines[name], fitted.points.budgets
    if line.exists:
        exponent = fitted.interval(lambda law: law.lines[name].exponent)
        draw_band(ax, fitted, "lines", name, np.geomspace(C.min() / 1.3, C.max() * reach, 60),
                  colour, f"{label} C^{line.exponent:.4f} {show(exponent)}")
    for b, vertex in enumerate(fitted.law.vertices):
        if math.isfinite(vertex.value(name)):
            ends = fitted.interval(lambda law: law.vertices[b].value(name)) or [math.nan] * 2
            one = colour if dots is None else dots[b]
            ax.plot([vertex.C] * 2, ends, color=one, lw=2)
            ax.plot(vertex.C, vertex.value(name), "o", color=one, ms=5)

def draw_law(fitted, report, reference):
    """law.png: a parabola per budget; N*(C), D*(C) and the loss over C."""
    points, law, floor = fitted.points, fitted.law, report["loss"]["floor"]
    colours = colour_scale(points.budgets, "viridis").to_rgba(points.budgets)
    figure, axes = new_figure(2, 2, (13, 10), f"Scaling law of {fitted.metric}: {len(points.N)} "
                              f"points at {len(points.budgets)} budgets, 95% intervals")
    draw_parabolas(axes[0, 0], fitted, colours)
    C = np.geomspace(points.budgets.min() / 1.3, points.budgets.max() * 4, 60)
    for ax, name, title, label in (
            (axes[0, 1], "N", "How large", f"N*, parameters ({fitted.n_kind})"),
            (axes[1, 0], "D", "On how much data", "D*, tokens"),
            (axes[1, 1], "loss", "How good", f"{fitted.metric} at N*")):
        line = law.lines[name]
        draw_line(ax, fitted, name, "tab:blue", f"{line.coefficient:.3g}", colours, reach=4)
        if name == "loss" and floor:
            draw_band(ax, fitted, "floors", name, C, "tab:orange", f"{floor['L_inf']:.3g} + "
                      f"{floor['coefficient']:.3g} C^-{floor['exponent']:.4f}")
        if name != "loss" and not law.form.refused:
            best = dict(zip("ND", law.form.optimum(C)))[name]
            ax.plot(C, best, "--", color="gray", lw=1, label="parametric form")
        if reference:
            coefficient, exponent = PAPER[name]
            ax.plot(C, coefficient * C**exponent, "k:", label="the paper")
        title += "" if line.exists else f": no law, {too_few(law)}"
        log_axes(ax, FLOPS, label, title, "y" if name == "loss" else "")
        add_device_hours(ax, flops_per_second(points))
    return figure

def add_device_hours(ax, speed):
    """A second axis above one of C, where the records tell the speed of a device."""
    if speed:
        hours = (lambda C: C / speed / 3600, lambda hours: hours * speed * 3600)
        top = ax.secondary_xaxis("top", functions=hours)
        top.set_xlabel("device-hours", fontsize=8)
        top.tick_params(labelsize=8)
        top.xaxis.set_minor_formatter("")

def draw_parabolas(ax, fitted, colours):
    """Loss over N: a parabola per budget, its vertex a star; hollow points are in no window."""
    points = fitted.points
    for b, vertex in enumerate(fitted.law.vertices):
        here, N, loss = points.budget == b, points.N[vertex.window], points.loss[vertex.window]
        ax.plot(points.N[here], points.loss[here], "o", mfc="none", color=colours[b], ms=5)
        ax.plot(N, loss, "o", color=colours[b], ms=5, label=f"{vertex.C:.2g}")
        if not vertex.reason:
            N, best = np.geomspace(N.min(), N.max(), 60), vertex.value("N")
            bowl = vertex.value("loss") * np.exp(vertex.curvature * np.log(N / best) ** 2)
            ax.plot(N, bowl, color=colours[b], lw=1)
            ax.plot(best, vertex.value("loss"), "*", color="crimson", ms=12, mec="white", zorder=5)
    # Points far from the optimum may be cut off: they would flatten the parabolas.
    inside = points.loss[np.concatenate([vertex.window for vertex in fitted.law.vertices])]
    low, high = 0.98 * points.loss.min(), inside.max()
    ax.set_ylim(low, high * (high / low) ** 0.3)  # the legend goes above
    log_axes(ax, f"N, parameters ({fitted.n_kind})", fitted.metric,
             "One parabola per budget (star: its vertex; hollow: not in its window)", "y")
    legend = ax.legend(title="C, FLOPs", fontsize=8, loc="upper center", ncols=5)
    legend.set_visible(len(points.budgets) <= 15)

def draw_metrics(fitted, report, names):
    """metrics.png: a panel for each metric at N* over C, a colour for each data set.

    names: of the metrics that have a law, as "METRIC on DATA".
    """
    metrics = sorted({name.split(" on ")[0] for name in names})
    rows, columns = math.ceil(len(metrics) / 3), min(3, len(metrics))
    figure, axes = new_figure(rows, columns, (5.5 * columns, 0.6 + 4.6 * rows),
                              f"Metrics at the N* of {fitted.metric}, 95% intervals")
    for ax, metric in zip(axes.flat, metrics):
        for k, name in enumerate(name for name in names if name.split(" on ")[0] == metric):
            draw_line(ax, fitted, name, f"C{k}", f"{name.split(' on ', 1)[1]}:")
        verdicts = [f"{row['data']} - {row['against']}: difference {row['difference_is']}, ratio "
                    f"{row['ratio_is']}" for row in report["offsets"]
                    if row["metric"] == metric and "refused" not in row]
        ax.set_yscale("log")
        ax.margins(y=0.2)  # for the legend
        log_axes(ax, FLOPS, metric + UNITS.get(metric, ""), "\n".join([metric, *verdicts]), "y")
    for ax in axes.flat[len(metrics):]:
        ax.set_visible(False)
    return figure

def draw_diagnostics(fitted, report):
    """law_diagnostics.png: residuals, the clouds of the bootstrap, how much is enough."""
    points, law, draws = fitted.points, fitted.law, fitted.draws
    figure, axes = new_figure(2, 2, (13, 10), f"Diagnostics of the law of {fitted.metric}")
    # Residuals are 0, which says nothing, where a budget has no parabola or a point is outside.
    used = np.concatenate([vertex.window for vertex in law.usable()] or [[]]).astype(int)
    best = np.array([vertex.value("N") for vertex in law.vertices])[points.budget]  # (n,)
    missed = np.log(points.loss) - fitted.noise.fitted[0]  # (n,)
    draw_residuals(axes[0, 0], points.take(used), np.log2(points.N / best)[used], missed[used],
                   "log2 of N/N*", "Parabolas")
    missed = np.log(points.loss / law.form.loss(points.N, points.D))  # nan without a form
    draw_residuals(axes[0, 1], points, np.log10(points.N), missed, "log10 of N", "Parametric form")
    clouds = {"parabolas and law with floor": [(draw.lines["N"].exponent,
                                                -draw.floors["loss"].exponent) for draw in draws],
              "parametric form": [(draw.form.a, draw.form.alpha * draw.form.a) for draw in draws]}
    for name, cloud in clouds.items():
        axes[1, 0].plot(*np.transpose(cloud), ".", ms=3, alpha=0.4, label=name)
    axes[1, 0].set(xlabel="exponent of N*", ylabel="exponent of the loss above its floor",
                   title=f"{len(draws)} bootstrap resamples")
    axes[1, 0].legend(fontsize=8)
    draw_how_much(axes[1, 1], report["how_much_is_enough"])
    return figure

def draw_how_much(ax, rows):
    """The exponent of N* from the smallest budgets, and how well they predict the top one."""
    ax.set_title("How much is enough?")
    if not rows:
        ax.axis("off")
        return
    budgets = [row["budgets"] for row in rows]
    for row in rows:
        ax.plot([row["budgets"]] * 2, row["exponent_N_ci95"] or [math.nan] * 2, "C0", lw=2)
    ax.plot(budgets, [row["exponent_N"] for row in rows], "o-", color="C0")
    ax.set(xlabel="law from the smallest k usable budgets", xticks=budgets)
    ax.set_ylabel("exponent of N*", color="C0")
    error = ax.twinx()
    error.plot(budgets, [100 * row["error"] for row in rows], "s--", color="C1")
    error.set_ylabel("error of the predicted loss of the top budget, %", color="C1")

def draw_residuals(ax, points, x, residual, label, title):
    """What a fit leaves over of ln loss, (n,) over x; the colour is the budget."""
    ax.set_title(f"{title}: what is left over (a pattern is a misfit)")
    if not np.isfinite(residual).any():
        ax.axis("off")
        return
    shown = ax.scatter(x, 100 * residual, s=18, c=np.log10(points.C))
    ax.figure.colorbar(shown, ax=ax, label="log10 of C")
    ax.axhline(0, color="gray", lw=0.7)
    ax.set(xlabel=label, ylabel="residual, % of the loss")

def draw_comparison(fits):
    """compare.png: loss at N*, N*, and epochs where images were repeated; a colour a law."""
    repeated = any(record.get("epochs") for one in fits.values() for record in one.points.records)
    figure, axes = new_figure(1, 2 + repeated, (6.5 * (2 + repeated), 5.5))
    for k, (name, fitted) in enumerate(fits.items()):
        for ax, what in zip(axes[0], ("loss", "N")):
            draw_line(ax, fitted, what, f"C{k % 10}", f"{name}:")
        per_epoch = [record["D"] / record["epochs"] for record in fitted.points.records
                     if record.get("epochs")]
        if per_epoch:
            D, loss = (curve(fitted.law.vertices, what)[1] for what in ("D", "loss"))
            axes[0, 2].plot(D / np.median(per_epoch), loss, "o-", color=f"C{k % 10}", label=name)
    log_axes(axes[0, 0], FLOPS, "loss at N*", "How good: the loss at N*", "y")
    log_axes(axes[0, 1], FLOPS, "N*, parameters", "How large: N*")
    if repeated:
        log_axes(axes[0, 2], "epochs at N*", "loss at N*", "How often was an image seen", "xy")
    return figure

def draw_curves(fitted):
    """curves.png: why one run serves many budgets. Every run's loss over C, the best run marked."""
    points, scale = fitted.points, colour_scale(fitted.points.N, "plasma")
    figure, ((ax,),) = new_figure(1, 1, (11, 7))
    faint = ""
    for run in range(points.run.max() + 1):
        here = np.flatnonzero(points.run == run)
        here = here[np.argsort(points.C[here])]
        colour = scale.to_rgba(points.N[here[0]])
        ax.plot(points.C[here], points.loss[here], "o-", ms=3.5, lw=1.2, color=colour)
        C, loss = training_curve(points.records[here[0]])
        ax.plot(C, loss, color=colour, lw=0.6, alpha=0.35, zorder=1)
        faint = " (faint: training loss)" if len(C) else faint
    # The first steps have far higher losses: they are cut off.
    ax.set(xscale="log", xlim=(points.C.min() / 2.5, points.C.max() * 1.4), yscale="log",
           ylim=(points.loss.min() / 1.05, points.loss.max() * 1.1))
    for b, C in enumerate(points.budgets):
        here = np.flatnonzero(points.budget == b)
        best = here[points.loss[here].argmin()]
        ax.axvline(C, color="gray", lw=0.7, ls="--", zorder=0)
        ax.plot(points.C[best], points.loss[best], "*", color="crimson", ms=14, mec="white",
                zorder=5)
    passes = ("A run passes through every budget on its way (dashed cuts)" if fitted.noise.nested
              else "The loss of every size at every budget (dashed cuts)")
    log_axes(ax, FLOPS, fitted.metric + faint, f"{passes}. Star: the lowest at a cut", "y")
    figure.colorbar(scale, ax=ax, label=f"N, parameters ({fitted.n_kind})")
    return figure

def training_curve(record):
    """(2, steps) C and smoothed training loss of a record's run, as far as its log can be read."""
    rows, log = [], Path(record.get("run", "")) / "log.jsonl"
    with suppress(OSError, ValueError, KeyError):  # the last line of a killed run is torn
        for text in log.read_text().splitlines():
            row = json.loads(text)
            rows.append((row["C"], row["train_loss_smooth"]))
    return np.array(rows).reshape(-1, 2).T

if __name__ == "__main__":
    sys.exit(main())
