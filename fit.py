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

    N  parameters (of the blocks, unless --n total)    D  tokens seen in training: image, text, time
    C  training FLOPs                                  L  the loss that --metric names
Errors are one line on stderr. Exit status: 0 a law, 2 bad input, 3 a refusal.
"""
import argparse
import csv
import json
import math
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.polynomial import Polynomial
from scipy.optimize import least_squares, minimize_scalar, nnls
from scipy.special import stdtrit  # the quantile of Student's t; scipy.stats is slow to import
from tqdm import tqdm

# The window of a parabola: sizes within a factor WINDOW of the lowest, at least the NEAREST ones.
WINDOW, NEAREST = 4.0, 7
HUBER = 1e-3  # where the Huber loss of the parametric form turns linear (Hoffmann et al. 2022)
PAPER = {"N": (0.0009, 0.5681), "D": (186.8535, 0.4319), "loss": (2.3943, -0.0273)}  # y = k C^p
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

ONE = ("count", "arch", "data", "resolution", "captions", "train_images")  # the same in all records
RECORD = ("arch", "depth", "width", "seed", "N_blocks", "N_total", "budget", "count", "C", "C_6nd",
          "D", "data", "resolution", "captions")  # what a record must have, beside the metric

def read(paths):
    """Records (a list of dicts) from results directories, or from CSV files. Raises BadInput."""
    records = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path}: no such file or directory")
        found = read_results(path) if path.is_dir() else read_csv(path)
        if not found:
            what = "*/budget_*/result.json" if path.is_dir() else "row"
            raise BadInput(f"{path}: no {what} in it")
        records += found
    if len({"N" in record for record in records}) > 1:
        raise BadInput("a CSV file and a results directory cannot be fitted together: they count "
                       "differently")
    return records

def read_results(folder):
    """The records of a sweep's points, each with its `metrics`, {"METRIC on DATA": value}."""
    records = []
    for file in sorted(folder.glob("*/budget_*/result.json")):
        record = read_json(file)
        missing = [key for key in RECORD if key not in record]
        if missing:
            raise BadInput(f"{file}: the record lacks {', '.join(missing)}")
        record |= {"source": str(file), "run": str(file.parent.parent), "metrics": {}}
        record["conditions"] = {key: record[key] for key in ONE if key in record}
        if record["count"] == "6nd":
            record["C"] = record["C_6nd"]
        for metrics_file in sorted(file.parent.glob("metrics_*.json")):
            add_metrics(record, metrics_file)
        records.append(record)
    return records

def read_json(file):
    """The content of a file that train.py or evaluate.py wrote. Raises BadInput."""
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or content.get("schema") != 1:
        raise BadInput(f"{file}: torn, or not of schema 1; delete it and make it again")
    return content

def add_metrics(record, file):
    """The metrics of a file, and how they were measured: one law needs one way."""
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
    """Rows with columns N, D, C, loss and perhaps budget, run, run_id, seed."""
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
    """What law_of fits: arrays (n,), an element for each run and budget."""
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

    Repeated seeds stay separate points: least squares then weighs a size by its number of runs.
    """
    given = "N" in records[0]  # in a CSV file, which has one N and one loss
    columns = {"N": "N" if given else f"N_{n_kind}", "D": "D", "C": "C",
               "loss": "loss" if given else metric}
    check(records, columns, metric)
    records = without_repetitions(records, columns)
    if len(records) < 4:
        raise Refused(f"fewer than 4 points ({len(records)}): no parabola and no law")
    arrays = {key: np.array([float(record[column]) for record in records])
              for key, column in columns.items()}
    budget = budget_index(records)
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
        if not (values <= 0).any():  # such a one has no power law
            metrics[label] = values
    return Points(**arrays, budget=budget, run=np.unique(runs, return_inverse=True)[1],
                  budgets=budgets, metrics=metrics, records=records,
                  nested=shared if named else None)

def check(records, columns, metric):
    """Raises BadInput for records that do not belong together, Refused for impossible values."""
    conditions = {}
    for record in records:
        if columns["loss"] not in record:
            raise BadInput(f"--metric {metric}: {record['source']} has no such value")
        for key in (*columns.values(), "budget"):
            value = record.get(key, 1)  # a CSV may have no budget
            if not (isinstance(value, (int, float)) and 0 < value < math.inf):
                raise Refused(f"{record['source']}: {key} is {value}; a law needs positive finite "
                              "values")
        for key, value in record.get("conditions", {}).items():
            first, source = conditions.setdefault(key, (value, record["source"]))
            if value != first:
                raise BadInput(f"one law needs one {key}: it is {first} in {source} and {value} in "
                               f"{record['source']}")

def without_repetitions(records, columns):
    """The records, exact repetitions once. Refused where repetitions differ in their loss."""
    first = {}
    for record in records:
        key = [record.get(k) for k in (columns["N"], "C", "seed", "depth", "width")]
        key.append(record.get("run") if "N" in record else None)
        other = first.setdefault(tuple(key), record)
        if other[columns["loss"]] != record[columns["loss"]]:
            raise Refused(f"{other['source']} and {record['source']} are duplicates with different "
                          "losses: the same N and C, no seed to tell them apart")
    return list(first.values())

def budget_index(records):
    """(n,) index of each record's budget: its nominal one, or without that C within 10%."""
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
    """The lowest point of a budget's parabola ln loss = ln loss* + curvature (ln N - ln N*)^2."""
    C: float
    window: np.ndarray     # indices of the points that it goes through
    reason: str = None     # why there is none; None: there is one
    values: dict = field(default_factory=dict)  # "N", and read there "loss", "D" and the metrics
    curvature: float = math.nan

    def value(self, name):
        """nan where there is no vertex, or too few sizes were measured."""
        return self.values.get(name, math.nan)

def window_of(points, b):
    """Indices of the points of budget b near its lowest loss. Seeds of a size count together."""
    here = np.flatnonzero(points.budget == b)
    if not len(here):
        return here
    sizes, size = np.unique(np.log(points.N[here]), return_inverse=True)
    mean_loss = np.bincount(size, np.log(points.loss[here])) / np.bincount(size)
    distance = np.abs(sizes - sizes[mean_loss.argmin()])
    nearest = np.sort(distance)[:NEAREST].max()
    return here[(distance <= max(nearest, math.log(WINDOW)) + 1e-9)[size]]

def parabola(points, b, window=None, degree=2):
    """The Vertex of budget b: least squares of ln loss in ln N over the window.

    D and the metrics are read there from parabolas of their own; D is not computed as C/6N. Every
    FD gets its own optimum too, "N* of" it.
    """
    window = window_of(points, b) if window is None else window
    no_vertex = partial(Vertex, float(points.budgets[b]), window)
    log_N = np.log(points.N[window])
    sizes = np.unique(log_N)
    if len(sizes) < 4:
        return no_vertex(f"fewer than 4 sizes ({len(sizes)})")
    bowl = Polynomial.fit(log_N, np.log(points.loss[window]), degree)
    minima = [x.real for x in bowl.deriv().roots() if x.imag == 0 and bowl.deriv(2)(x.real) > 0]
    if not minima:
        return no_vertex("concave parabola: no minimum")
    best = minima[0]
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
    """Paths of the result.json whose points the parabolas use. Raises BadInput or Refused."""
    points = points_of(read([folder]))
    windows = [window_of(points, b) for b in range(len(points.budgets))]
    return [points.records[i]["source"] for i in sorted(np.concatenate(windows))]

# ---- 3. and 4. lines through the vertices, and the law with a floor ----------------------------

@dataclass(frozen=True)
class PowerLaw:
    """value = floor + level (C / middle)^exponent: with no floor a straight line in log-log."""
    middle: float = math.nan    # the geometric mean of the budgets: there level and exponent
    level: float = math.nan     # are independent, which they are not at C = 1
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

# What a law does not have is nan: so every question can be put to every resample's law.
NO_LAW = PowerLaw()

def line(x, y):
    """Least squares y = level + slope (x - mean x), unweighted as the paper's. -> level, slope."""
    away = x - x.mean()
    return y.mean(), (away @ y) / (away @ away)

def curve(vertices, name):
    """C and value (two arrays) at the budgets where the name could be read."""
    found = [(v.C, v.value(name)) for v in vertices if math.isfinite(v.value(name))]
    return np.array(found).reshape(-1, 2).T

def power_law(vertices, name):
    """The straight line in log-log. NO_LAW with fewer than 3 budgets."""
    C, values = curve(vertices, name)
    if len(C) < 3:
        return NO_LAW
    level, slope = line(np.log(C), np.log(values))
    return PowerLaw(math.exp(np.log(C).mean()), math.exp(level), float(slope))

def floor_law(vertices, name):
    """L_inf + K (C / middle)^-g by least squares of relative errors. NO_LAW with under 4 budgets.

    For a given g it is linear in L_inf and K, which may not be negative (nnls). So only g is
    searched (variable projection), which needs no start and cannot diverge.
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

    grid = np.linspace(math.log(0.002), math.log(5), 9)
    start, step = min(grid, key=misfit), grid[1] - grid[0]
    log_g = minimize_scalar(misfit, bounds=(start - step, start + step), method="bounded",
                            options={"xatol": 1e-9}).x
    L_inf, K = project(log_g)[0]
    return PowerLaw(middle, float(K), -math.exp(log_g), float(L_inf))

# ---- 5. the parametric form --------------------------------------------------------------------

@dataclass(frozen=True)
class Form:
    """L = E + A N^-alpha + B D^-beta, on C = kappa N D; nan where it is refused."""
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
        """N and D of the lowest loss on C = kappa N D: N = G (C / kappa)^a."""
        ratio = self.alpha * self.A / (self.beta * self.B)
        N = ratio ** (1 / (self.alpha + self.beta)) * (C / self.kappa) ** self.a
        return N, C / self.kappa / N

def descend(points, start, step=0):
    """The Form with the lowest SUM of Huber losses of ln L, from a start (a Form) and a step (5,).

    theta = ln E, ln A', ln B', ln alpha, ln beta, where A' and B' are the terms' sizes at the mean
    ln N and ln D: with centred logs level and exponent hardly correlate.
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
        E, A, B = np.exp(terms - np.logaddexp.reduce(terms))  # the share of each term
        return np.stack([E, A, B, -np.exp(theta[3]) * n * A, -np.exp(theta[4]) * d * B], 1)

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
    """Variable projection: on a grid of (alpha, beta), where E, A and B are linear. -> Form."""
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
    """The best Form from the projected start and from others within 2 log-units; or why not."""
    for name, values in (("D", points.D), ("N", points.N)):
        if len(np.unique(values)) < 2:
            return Form(refused=f"one {name} for all points: its exponent cannot be seen")
    n, B = len(points.N), len(points.budgets)
    if n < 8 or B < 3:
        return Form(refused=f"{n} points at {B} budgets are too few for its five constants (8 at 3 "
                            "at least)")
    first = projected_start(points)
    steps = np.random.default_rng(0).uniform(-2, 2, (starts, 5))
    forms = [descend(points, first, step) for step in (0, *steps)]
    forms = [form for form in forms if form.gradient_norm < 1e-8]
    if not forms:
        return Form(refused="the optimiser reached no stationary point")
    best = min(forms, key=lambda form: form.objective)
    missed = best.objective / HUBER / n  # the mean distance of ln L from the form
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

    The parametric form of a resample starts at the optimum of that, and is nan if it has none.
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
    """The points' errors about their parabolas; row 0 is of the loss, the others of the metrics."""
    fitted: np.ndarray  # (k, n) ln value on the parabola; as measured where there is none
    scale: np.ndarray   # (k, n) standard deviation of ln value at the point's budget
    mixing: np.ndarray  # (k, k) gives independent errors the residuals' correlation between rows
    correlation: float  # of two errors of one run
    nested: bool        # whether points share runs

def residual_maker(N, degree=2):
    """(n, n) matrix that takes values at sizes N to their residuals from a polynomial in ln N."""
    log_N = np.log(N)
    basis, _ = np.linalg.qr(np.vander(log_N - log_N.mean(), degree + 1))
    return np.eye(len(N)) - basis @ basis.T

def measure_noise(points, law):
    """The Noise of the points, from their residuals.

    Residuals are smaller and less correlated than errors. With r = M e for standardised residuals
    and K marking pairs of one run at two budgets, E[r' K r] = correlation tr(K M K M).
    """
    values = np.log(np.stack([points.loss, *points.metrics.values()]))  # (k, n)
    # M takes errors of ln loss to residuals, budget by budget.
    residual, scale = np.zeros_like(values), np.zeros_like(values)
    M = np.zeros((len(points.N), len(points.N)))  # (n, n)
    for vertex in law.usable():
        for row in range(len(values)):
            here = vertex.window[np.isfinite(values[row, vertex.window])]
            if len(np.unique(points.N[here])) >= 4:
                maker = residual_maker(points.N[here])
                residual[row, here] = rest = maker @ values[row, here]
                scale[row, here] = math.sqrt(rest @ rest / (len(here) - 3))
                if row == 0:
                    M[np.ix_(here, here)] = maker
    unit = residual / np.maximum(scale, 1e-300)  # in standard deviations
    same_run = points.run[:, None] == points.run
    K = (same_run & (points.budget[:, None] != points.budget)).astype(float)  # (n, n)
    along_runs = unit[0] @ K @ unit[0] / max(np.trace(K @ M @ K @ M), 1e-300)
    correlation = float(np.clip(along_runs, 0, 1))
    length = np.maximum(np.linalg.norm(unit, axis=1), 1e-300)
    unit /= length[:, None]
    between = unit @ unit.T
    np.fill_diagonal(between, 1 + 1e-9)  # two metrics that agree would make it singular
    # Of its roots the triangular one: the metrics do not change the errors of the loss.
    mixing = np.linalg.cholesky(between)
    nested = correlation > 0.25 if points.nested is None else points.nested
    return Noise(values - residual, scale, mixing, correlation, nested)

def resample(points, noise, seed):
    """Points that might as well have been measured.

    Independent points are drawn with replacement inside each budget. Points that share runs keep
    their sizes and get new errors, of the variance measured at each budget and the correlation
    measured along runs and between metrics: of nine drawn runs only six differ, and that few make
    windows of another shape, at all budgets at once.
    """
    rng = np.random.default_rng(seed)
    if not noise.nested:
        groups = [np.flatnonzero(points.budget == b) for b in range(len(points.budgets))]
        return points.take(np.concatenate([rng.choice(group, len(group)) for group in groups]))
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
    """The middle 95% of the finite answers as [lo, hi]; None where they are fewer than 20."""
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

    def interval(self, question):
        """The 95% interval of a question: a function of a Law that returns a number."""
        return interval([question(law) for law in self.draws])

    def with_interval(self, question):
        """{"value", "ci95"}: the law's own answer to a question, and its interval."""
        return {"value": float(question(self.law)), "ci95": self.interval(question)}

def fit(records, metric="val_loss_ema", n_kind="blocks", resamples=1000, seed=0):
    """Records -> Fit. Refused where neither three budgets nor the parametric form can be fitted."""
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
    return Fit(points, law, noise, draws, metric, n_kind)

def too_few(law):
    """Why there is no line."""
    return f"{len(law.usable())} usable budgets of {len(law.vertices)}, a line needs 3"

# ---- 7. what law.json tells --------------------------------------------------------------------

def summary(fitted, seed=0):
    """law.json: plain numbers, lists and words. What is missing is None, with a reason."""
    points, law, noise = fitted.points, fitted.law, fitted.noise
    reasons = {}
    if len(law.usable()) < 3:
        lost = ("N_opt", "D_opt", "loss.power", "backtest", "how_much_is_enough")
        reasons = dict.fromkeys(lost, too_few(law))
    elif len(law.usable()) == 3:
        reasons = dict.fromkeys(("backtest", "jackknife95"), "3 usable budgets: a line through the "
                                "other two proves nothing")
    labels = {label for record in points.records for label in record.get("metrics", {})}
    told = {
        "schema": 1, "metric": fitted.metric, "n_kind": fitted.n_kind,
        "c_kind": points.records[0].get("count", "as given"), "runs": int(points.run.max() + 1),
        "n_points": len(points.N), "nested": bool(noise.nested),
        "error_correlation": noise.correlation, "resamples": len(fitted.draws), "seed": seed,
        "reasons": reasons, "budgets": budget_rows(fitted), "N_opt": told_line(fitted, "N"),
        "D_opt": told_line(fitted, "D"), "loss": {
            "power": told_line(fitted, "loss"), "floor": told_floor(fitted, "loss", reasons)},
        "metrics": {label: told_metric(fitted, label, reasons) for label in sorted(labels)},
        "offsets": offsets(fitted), "parametric": told_form(fitted),
        "method_spread": method_spread(fitted), **extrapolations(fitted),
        "noise": noise_of_a_point(points, fitted.metric)}
    refusable = {"parametric": told["parametric"],
                 **{f"metrics.{name}": law for name, law in told["metrics"].items()},
                 **{f"N* of {name}": law.get("own_optimum", {})
                    for name, law in told["metrics"].items()},
                 **{f"offset of {row['metric']} on {row['data']}": row for row in told["offsets"]}}
    reasons |= {name: law["refused"] for name, law in refusable.items() if "refused" in law}
    residual = np.log(points.loss) - noise.fitted[0]
    windows = np.concatenate([vertex.window for vertex in law.vertices])
    told["points"] = [
        {"N": points.N[i], "D": points.D[i], "C": points.C[i], "loss": points.loss[i],
         "budget": points.budgets[points.budget[i]], "in_window": i in windows,
         "residual": residual[i], "source": record["source"]}
        for i, record in enumerate(points.records)]
    told["warnings"] = warnings(fitted, told)
    return told

def budget_rows(fitted):
    """What was found at every budget."""
    rows = []
    for b, vertex in enumerate(fitted.law.vertices):
        found = {key: vertex.values.get(name) for key, name in
                 (("N_opt", "N"), ("D_opt", "D"), ("loss_opt", "loss"))}
        within = fitted.interval(lambda law: law.vertices[b].value("N"))
        rows.append({"C": vertex.C, "n_points": int((fitted.points.budget == b).sum()),
                     "used": not vertex.reason, "reason": vertex.reason, **found,
                     "N_opt_ci95": None if vertex.reason else within,
                     "flags": [] if vertex.reason else flags(fitted.points, vertex)})
    return rows

def flags(points, vertex):
    """What makes the parabola of a budget doubtful, in words."""
    N, y, found = points.N[vertex.window], np.log(points.loss[vertex.window]), []
    M = residual_maker(N)
    rest, free = M @ y, len(y) - 3
    square = rest @ rest
    bent = y @ residual_maker(N, degree=1) @ y - square  # what the curvature explains
    if bent < stdtrit(free, 0.975) ** 2 * square / free:
        found.append("curvature not significant")
    low, best, high = np.log([N.min(), vertex.value("N"), N.max()])
    if abs(best - (low + high) / 2) > (high - low) / 4:
        found.append("vertex off centre")
    if len(np.unique(N)) >= 5 and free >= 2 and square > 1e-18 * free:
        # Leave one out: a point's distance from the parabola through the others, in their errors.
        room = np.maximum(np.diag(M), 1e-9)
        error = np.sqrt(np.maximum((square - rest**2 / room) / (free - 1), 1e-30) * room)
        far = np.abs(rest) > -stdtrit(free - 1, 0.025 / len(y)) * error
        found += [f"point off by {100 * math.expm1(rest[i] / room[i]):+.2g}% at N = {N[i]:.4g}"
                  for i in np.flatnonzero(far)]
    return found

def told_line(fitted, name):
    """A straight line as value = coefficient C^exponent; None with fewer than 3 budgets."""
    law_line, vertices = fitted.law.lines[name], fitted.law.vertices
    if not law_line.exists:
        return None
    C, values = curve(vertices, name)
    rest, spread = np.log(values / law_line.predict(C)).var(), np.log(values).var()
    return {"coefficient": law_line.coefficient, "exponent": law_line.exponent,
            "ci95": fitted.interval(lambda law: law.lines[name].exponent),
            "coefficient_ci95": fitted.interval(lambda law: law.lines[name].coefficient),
            "jackknife95": jackknife(vertices, name),
            "r2": float(1 - rest / spread) if spread else None}

def jackknife(vertices, name):
    """The 95% interval of the exponent from leaving out one budget after the other."""
    vertices = [vertex for vertex in vertices if math.isfinite(vertex.value(name))]
    k, exponent = len(vertices), power_law(vertices, name).exponent
    if k < 4:  # a line through two budgets says nothing
        return None
    left = [power_law(vertices[:i] + vertices[i + 1:], name).exponent for i in range(k)]
    error = stdtrit(k - 1, 0.975) * math.sqrt((k - 1) * np.var(left))
    return [exponent - error, exponent + error]

def told_floor(fitted, name, reasons):
    """The law with a floor, L_inf + coefficient C^-exponent; or None, and `reasons` says why."""
    floor = fitted.law.floors[name]
    if name != "loss" and fitted.law.lines[name].exponent > 0:
        reason = "it rises with C"
    elif not floor.exists:
        reason = f"needs 4 usable budgets, there are {len(curve(fitted.law.vertices, name)[0])}"
    elif floor.floor == 0:
        reason = "the minima show no floor: L_inf = 0 fits best, which is the pure power law"
    else:
        return {"L_inf": floor.floor, "coefficient": floor.coefficient, "exponent": -floor.exponent,
                "ci95": fitted.interval(lambda law: -law.floors[name].exponent),
                "L_inf_ci95": fitted.interval(lambda law: law.floors[name].floor)}
    reasons["loss.floor" if name == "loss" else f"metrics.{name}.floor"] = reason
    return None

def told_metric(fitted, name, reasons):
    """The law of a metric at N*; of an FD also the N best for itself."""
    if name not in fitted.points.metrics:
        values = [record.get("metrics", {}).get(name, 1) for record in fitted.points.records]
        return {"refused": f"not positive at {sum(value <= 0 for value in values)} points"}
    told = told_line(fitted, name)
    if told:
        told["floor"] = told_floor(fitted, name, reasons)
    else:
        budgets = len(curve(fitted.law.vertices, name)[0])
        told = {"refused": f"measured at 4 sizes of only {budgets} usable budgets, a line needs 3"}
    if name.startswith("fd"):
        told["own_optimum"] = own_optimum(fitted, name)
    return told

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
    if found < 3:
        return {"refused": f"{found} budgets with an optimum of its own, a line needs 3",
                "budgets": rows}
    if seen < 0.9 * draws:  # the interval of those that have one need not even hold the value
        return {"refused": f"only {seen} of {draws} resamples have an optimum of its own at 3 "
                "budgets", "budgets": rows}
    return {**told_line(fitted, own), "budgets": rows}

def offsets(fitted):
    """What metrics have more at N* on other data than on the training data: difference and ratio.

    At each budget, amid them, and the slope per decade of C (the ratio's: of its logarithm). The
    paper finds a constant difference in loss, VLB and likelihood, and a widening one in FID.
    """
    home, rows = fitted.points.records[0].get("data"), []
    for other in fitted.points.metrics:
        metric, data = other.split(" on ", 1)
        here = f"{metric} on {home}"
        if data == home or here not in fitted.points.metrics:
            continue
        budgets = [{"C": vertex.C, **{
            what: fitted.with_interval(lambda law: gap(law.vertices[b], here, other, what))
            for what in ("difference", "ratio")}}
            for b, vertex in enumerate(fitted.law.vertices)
            if math.isfinite(vertex.value(here) + vertex.value(other))]
        row = {"metric": metric, "data": data, "against": home, "budgets": budgets}
        if len(budgets) < 3:
            row["refused"] = (f"both measured at 4 sizes of only {len(budgets)} usable budgets, a "
                              "slope needs 3")
        else:
            row |= offset_line(fitted, here, other, "difference")
            row |= offset_line(fitted, here, other, "ratio")
        rows.append(row)
    return rows

def gap(vertex, here, other, what):
    """What a vertex has more of one metric than of another."""
    a, b = vertex.value(here), vertex.value(other)
    return b - a if what == "difference" else b / a

def offset_line(fitted, here, other, what):
    """Level and slope of a gap over the budgets, and a verdict on it."""
    middle = math.log(fitted.points.middle)

    def straight(law):  # level at the middle of all budgets, whichever a resample has; slope
        gaps = np.array([gap(vertex, here, other, what) for vertex in law.vertices])
        log_C = np.log([vertex.C for vertex in law.vertices])[np.isfinite(gaps)]
        if len(log_C) < 3:
            return math.nan, math.nan
        gaps = gaps[np.isfinite(gaps)]
        level, slope = line(log_C, gaps if what == "difference" else np.log(gaps))
        return level + slope * (middle - log_C.mean()), slope * math.log(10)

    level = fitted.with_interval(lambda law: straight(law)[0])
    slope = fitted.with_interval(lambda law: straight(law)[1])
    verdict = verdict_on(level, slope)
    if what == "ratio":
        level = {"value": math.exp(level["value"]),
                 "ci95": level["ci95"] and np.exp(level["ci95"]).tolist()}
    return {what: level, f"{what}_per_decade": slope, f"{what}_is": verdict}

def verdict_on(level, slope):
    """Whether a gap widens with compute, as far as the intervals can tell."""
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

def told_form(fitted):
    """The parametric form with its intervals, or why it is refused."""
    form, draws = fitted.law.form, fitted.draws
    if form.refused:
        return {"refused": form.refused}
    told = {key: value for key, value in asdict(form).items() if key != "refused"}
    return told | {
        "a": form.a, "b": 1 - form.a, "starts_discarded": form.starts - form.starts_agree,
        "ci95": {name: fitted.interval(lambda law: getattr(law.form, name))
                 for name in ("E", "alpha", "beta", "a")},
        "resamples_discarded": sum(math.isnan(law.form.E) for law in draws)}

def method_spread(fitted):
    """The exponent of N* by four methods, whose spread is often larger than the interval."""
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
    """How the law of the smallest 3, 4, 5 .. usable budgets predicts the top one, and the backtest.

    The backtest is of the last two: the top budget left out, and the top two.
    """
    used = [b for b, vertex in enumerate(fitted.law.vertices) if not vertex.reason]
    rows, backtest = [], []
    for k in range(3, len(used) + 1):
        laws = [law_through([law.vertices[b] for b in used[:k]], ["loss"], ["N"])
                for law in (fitted.law, *fitted.draws)]
        short = replace(fitted, law=laws[0], draws=laws[1:])
        tests = [prediction(short, fitted.law.vertices[b]) for b in used[k:] or used[-1:]]
        C = fitted.points.budgets[used]
        row = {"budgets": k, "beyond": C[-1] / C[k - 1]}
        for key, name in (("exponent_N", "N"), ("exponent_L", "loss")):
            row[key] = short.law.lines[name].exponent
            row[f"{key}_ci95"] = short.interval(lambda law: law.lines[name].exponent)
        rows.append(row | tests[-1])
        if len(used) - 2 <= k < len(used):
            backtest += [{"budgets_left_out": len(used) - k, **test} for test in tests]
    return {"how_much_is_enough": rows, "backtest": backtest[::-1]}

def prediction(short, vertex):
    """How a law of fewer budgets predicts a vertex: with a floor where there are 4 for one."""
    kind = "floors" if short.law.floors["loss"].exists else "lines"
    predicted = short.with_interval(lambda law: getattr(law, kind)["loss"].predict(vertex.C))
    measured, N = vertex.value("loss"), short.law.lines["N"].predict(vertex.C)
    return {"left_out": vertex.C, "law": "with floor" if kind == "floors" else "power",
            "predicted": predicted["value"], "ci95": predicted["ci95"], "measured": measured,
            "error": predicted["value"] / measured - 1, "N_error": float(N / vertex.value("N") - 1)}

def noise_of_a_point(points, metric):
    """Paired errors between neighbouring sizes, and the spread over seeds, in percent of the loss.

    All runs are validated on the same images, times and noises. So what blurs a parabola is the
    standard error of the difference between two sizes, taken image by image.
    """
    errors, variances = [], []
    for b in range(len(points.budgets)):
        before = None
        for size in np.unique(points.N[points.budget == b]):
            seeds = np.flatnonzero((points.budget == b) & (points.N == size))
            same_C = seeds[points.C[seeds] == points.C[seeds[0]]]  # a CSV's budget may hold several
            if len(same_C) > 1:
                variances.append(np.log(points.loss[same_C]).var(ddof=1))
            file = Path(points.records[seeds[0]]["source"]).with_name("val_losses_ema.npy")
            if metric == "val_loss_ema" and before and before.is_file() and file.is_file():
                errors.append(paired_error(before, file))
            before = file
    paired = {"median": float(np.median(errors)), "worst": max(errors)} if errors else None
    return {"paired_se_percent": paired, "paired_se_reason": None if errors else
            "no val_losses_ema.npy beside the records, or another metric",
            "seed_spread_percent": 100 * math.sqrt(np.mean(variances)) if variances else None,
            "seed_spread_reason": None if variances else "one seed only"}

def paired_error(one, two):
    """Standard error of the mean difference of two files of losses, in percent."""
    try:
        a, b = (np.load(file, allow_pickle=False).astype(float) for file in (one, two))
        return 100 * (a - b).std(ddof=1) / math.sqrt(len(a)) / b.mean()
    except (EOFError, ValueError):
        raise BadInput(f"{one} or its neighbour {two}: torn, or not the losses of the same images")

def warnings(fitted, told):
    """What a reader must know before using the law, in words; `told` is the summary so far."""
    law, form, top = fitted.law, told["parametric"], fitted.points.budgets.max()
    found = []
    if told["N_opt"]:
        low, high = told["N_opt"]["ci95"] or (-math.inf, math.inf)
        jack = told["N_opt"]["jackknife95"]
        decade = law.usable()[-1].C / law.usable()[0].C
        rejected = sum(not draw.lines["N"].exists for draw in fitted.draws)
        spread = np.ptp(told["method_spread"]["exponent_N"] or [0])
        if rejected:
            found.append(f"{rejected} of {len(fitted.draws)} resamples left fewer than 3 usable "
                         "budgets and are not in the intervals")
        if decade < 10:
            found.append(f"the usable budgets span only a factor {decade:.1f} in C: an exponent "
                         "from less than a decade is a guess")
        if not low <= form.get("a", low) <= high:
            found.append(f"the parametric form disagrees on N*: exponent {form['a']:.3f}, outside "
                         f"the parabolas' {low:.3f} to {high:.3f}")
        if jack and jack[1] - jack[0] > 1.5 * (high - low):
            found.append("the budgets scatter around the line of N* more than their points' noise "
                         "explains: take the jackknife's interval")
        if spread > high - low:
            found.append(f"the methods differ by {spread:.3f} in the exponent of N*, more than its "
                         "interval is wide")
    epochs = max(float(record.get("epochs") or 0) for record in fitted.points.records)
    if epochs > 1:
        found.append(f"these runs saw each image up to {epochs:.1f} times; the paper saw each "
                     "once. This is the law of a data set of this size")
    if told["loss"]["floor"]:
        gap = law.lines["loss"].predict(250 * top) / law.floors["loss"].predict(250 * top) - 1
        found.append(f"at 250 times the top budget the pure power law is {100 * abs(gap):.1f}% "
                     f"{'below' if gap < 0 else 'above'} the law with a floor: do not extrapolate "
                     "it that far")
    if fitted.points.nested is None:
        kind = "one run per N, read at several budgets" if told["nested"] else "independent runs"
        found.append("no run column: the errors of the same N at different budgets correlate "
                     f"{told['error_correlation']:.2f}, so points are taken for {kind}")
    return found

# ---- plans and comparisons ---------------------------------------------------------------------

def parse_plan(text):
    """'1.5e21', or devices:hours:MFU as '8xH100:72h:0.4' ('8x312:72h:0.4' by peak TFLOP/s).

    -> C in FLOPs, and the FLOP/s of one device or None. Raises BadInput.
    """
    try:
        C, speed = float(text), None
    except ValueError:
        C, speed = compute_of(text)
    if not 0 < C < math.inf:
        raise BadInput(f"--plan {text}: not a positive number of FLOPs")
    return C, speed

def compute_of(text):
    """FLOPs, and FLOP/s of one device, of devices:time:MFU."""
    try:
        devices, time, mfu = text.split(":")
        count, name = devices.lower().replace(" ", "").split("x", 1)
        peaks = {key.lower().replace(" ", ""): peak for key, peak in PEAK.items()}
        speed = 1e12 * float(mfu) * (peaks.get(name) or float(name))
        seconds = float(time[:-1]) * {"m": 60, "h": 3600, "d": 86400}[time[-1]]
        C = int(count) * speed * seconds
    except (IndexError, KeyError, ValueError):
        raise BadInput(f"--plan {text}: neither FLOPs (1.5e21) nor devices:hours:MFU "
                       f"(8xH100:72h:0.4); known devices: {', '.join(PEAK)}; others by their peak "
                       "TFLOP/s (8x312:72h:0.4)")
    if not 0 < float(mfu) <= 1:
        raise BadInput(f"--plan {text}: the MFU must lie in (0, 1], not {mfu}")
    return C, speed

def plan(fitted, text):
    """The run to make with a budget: its shape, cost, results, and how far beyond the data it is.

    What is not known is None, and `reason` names it.
    """
    C, speed = parse_plan(text)
    points, law, form = fitted.points, fitted.law, fitted.law.form
    batch = max(points.records, key=lambda record: record["C"]).get("batch")
    per_image = tokens_per_image(points)
    speed = speed or flops_per_second(points)

    def expected(name, kind="lines"):
        return fitted.with_interval(lambda law: getattr(law, kind)[name].predict(C))

    def cost_of_half_or_twice(law):  # ln loss is a parabola in ln N
        curvature = np.median([vertex.curvature for vertex in law.usable()] or [math.nan])
        return np.expm1(curvature * math.log(2) ** 2)

    told = {"asked": text, "C": C, "times_beyond_the_data": C / points.budgets.max(),
            "N": expected("N"), "D": expected("D"), "loss_power": expected("loss"),
            "loss_floor": expected("loss", "floors") if law.floors["loss"].floor > 0 else None,
            "loss_parametric": None,
            "metrics": {name: expected(name) for name in points.metrics if law.lines[name].exists},
            "cost_of_N_half_or_twice": fitted.with_interval(cost_of_half_or_twice)}
    if not form.refused:
        N, D = form.optimum(C)
        told |= {"loss_parametric": form.loss(N, D),
                 "cost_of_N_half_parametric": form.loss(N / 2, D * 2) / form.loss(N, D) - 1,
                 "cost_of_N_twice_parametric": form.loss(N * 2, D / 2) / form.loss(N, D) - 1}
    images = per_image and fitted.with_interval(lambda law: law.lines["D"].predict(C) / per_image)
    depth, width = nearest_shape(points, told["N"]["value"])
    # What follows from the records: how such a model was trained, and how fast.
    told |= {"batch": batch, "images": images, "depth": depth, "width": width,
             "steps": images["value"] / batch if images and batch else None,
             "device_hours": C / speed / 3600 if speed else None}
    missing = [key for key in ("images", "steps", "depth", "device_hours") if told[key] is None]
    told["reason"] = f"{', '.join(missing)} unknown: the records do not tell" if missing else None
    return told

def paper_plan(text):
    """The same from the paper's own coefficients and its family: width = 64 depth, batch 1024."""
    C, _ = parse_plan(text)
    N, D, loss = (k * C**p for k, p in PAPER.values())
    depth = round((N / 12 / PAPER_ASPECT**2) ** (1 / 3))
    return {"asked": text, "C": C, "N": N, "D": D, "train_loss": loss, "images": D / PAPER_TOKENS,
            "steps": D / PAPER_TOKENS / PAPER_BATCH, "depth": depth, "width": PAPER_ASPECT * depth}

def nearest_shape(points, N):
    """(depth, width) nearest to N in the records' family; None, None where they have none."""
    shapes = [(record.get("depth"), record.get("width")) for record in points.records]
    if not all(depth and width for depth, width in shapes):
        return None, None
    big = points.N.argmax()  # with all parameters counted the ratio drifts: take it there
    ratio = points.N[big] / shapes[big][0] / shapes[big][1] ** 2
    head, depths = points.records[0].get("head_dim") or 1, {depth for depth, _ in shapes}
    aspects = [width / depth for depth, width in shapes]
    low, high = min(aspects), max(aspects)
    if len(depths) == 1:  # a family of one depth keeps no aspect
        low, high = 0, math.inf
    else:
        depths = range(1, 513)
    widest = head + math.sqrt(2 * N / ratio)

    def distance(shape):  # in N; and of near ones the one of the usual aspect
        depth, width = shape
        unusual = abs(math.log(width / depth / np.median(aspects)))
        return abs(math.log(ratio * depth * width**2 / N)) + 0.1 * unusual

    return min(((depth, width) for depth in depths for width in range(head, int(widest), head)
                if low <= width / depth <= high), key=distance)

def tokens_per_image(points):
    """Tokens of an image with caption and time; None where the records do not tell, or differ."""
    ratios = [record["D"] / record["images"] for record in points.records if record.get("images")]
    return float(np.median(ratios)) if ratios and max(ratios) < 1.01 * min(ratios) else None

def flops_per_second(points):
    """Median speed of one device at the largest budget; None where the records do not tell."""
    speeds = [record["C"] / record["device_hours"] / 3600 for record in points.records
              if record.get("device_hours") and record["C"] > 0.9 * points.budgets.max()]
    return float(np.median(speeds)) if speeds else None

NAMES = {"N": "N*", "D": "D*", "loss": "loss"}

def side_by_side(fits):
    """Fits by name -> a row for each: exponents, and N* and loss at one C amid the data of all."""
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

    The two bootstraps are independent, so pairs of their laws are a bootstrap of the pair.
    """
    def with_interval(question):
        pairs = zip(one.draws, two.draws)
        return {"value": float(question(one.law, two.law)),
                "ci95": interval([question(a, b) for a, b in pairs])}

    # Levels are compared amid the data: at C = 1 they would be extrapolated.
    C = math.sqrt(one.points.middle * two.points.middle)
    exponents, levels = [], []
    for name, label in NAMES.items():
        a, b = one.law.lines[name], two.law.lines[name]
        exponents.append({"exponent of": label, "A": a.exponent, "B": b.exponent,
                          "B-A": with_interval(lambda a, b: b.lines[name].exponent
                                               - a.lines[name].exponent)})
        levels.append({"level of": label, "A": a.predict(C), "B": b.predict(C),
                       "B/A": with_interval(lambda a, b: b.lines[name].predict(C)
                                            / a.lines[name].predict(C))})
    told = {"A": names[0], "B": names[1], "exponents": exponents, "levels": levels, "C": C,
            "crossing": {"value": None, "ci95": None, "reason": "the loss exponents do not differ "
                         "within their interval, the curves may be parallel"}}
    if sign(exponents[2]["B-A"]):
        told["crossing"] = with_interval(crossing)
    told["multiplier"] = [
        {"C": C, **with_interval(lambda a, b: compute_multiplier(a, b, C))} for C in budgets]
    a, b = one.points.records[0], two.points.records[0]
    told["warnings"] = [f"{key} differs ({a.get(key)} and {b.get(key)}): the axes do not mean the "
                        "same" for key in ("count", "resolution") if a.get(key) != b.get(key)]
    told["reading"] = reading(a, b, sign(exponents[0]["B-A"]), sign(exponents[2]["B-A"]))
    return told

def crossing(a, b):
    """The C at which two laws have the same loss."""
    a, b = a.lines["loss"], b.lines["loss"]
    return np.float_power(a.coefficient / b.coefficient, 1 / (b.exponent - a.exponent))

def compute_multiplier(a, b, C):
    """The compute that law a needs to reach the loss of law b at C, over C."""
    a, b = a.lines["loss"], b.lines["loss"]
    return np.float_power(b.predict(C) / a.predict(C), 1 / a.exponent)

def reading(a, b, of_N, of_loss):
    """What the signs of the differences of exponents say about two records, as the paper reads it.

    On the same data a better model has the smaller exponent of N*; better data do the opposite.
    Either makes the exponent of the loss more negative.
    """
    kinds = {"the model": ("arch",), "the data": ("data", "captions", "train_images")}
    changed = [kind for kind, keys in kinds.items()
               if any(a.get(key) != b.get(key) for key in keys)]
    loss = ("These data cannot tell whose loss falls faster: the exponents agree within their "
            "interval.")
    size = ("Nor can they tell better model from better data: the exponents of N* agree within "
            "their interval.")
    if of_loss:
        loss = f"{'A' if of_loss > 0 else 'B'}'s loss falls faster with compute."
    if of_N > 0:
        size = ("N* grows faster with compute in B, which the paper reads as better data or a "
                "worse model in B.")
    if of_N < 0:
        size = ("N* grows more slowly with compute in B, which the paper reads as a better model "
                "or worse data in B.")
    changed = " and ".join(changed) or "neither model nor data"
    return f"By their records {changed} changed from A to B. {loss} {size}"

# ---- the page to read --------------------------------------------------------------------------

def show(x):
    """A number, an interval, a {"value", "ci95"}, or words; "-" for what is missing."""
    if isinstance(x, dict):
        return f"{show(x['value'])} {show(x['ci95'])}"
    if isinstance(x, list):
        return "; ".join(x) if not x or isinstance(x[0], str) else f"[{', '.join(map(show, x))}]"
    if x is None:
        return "-"
    return f"{x:.4g}" if isinstance(x, float) else str(x)

def table(rows, columns):
    """Rows (dicts) as lines of a Markdown table that is also aligned in a terminal."""
    def cell(row, column):
        x = row.get(column)
        return f"{100 * x:+.2f}%" if column.endswith("error") else show(x)

    cells = [columns, *([cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:], ""]

def page(told, reference=False):
    """law.md, which is also what the command prints: law.json as tables, columns named as there."""
    lines = [f"# The law of {told['metric']}", "",
             f"{told['n_points']} points of {told['runs']} runs at {len(told['budgets'])} budgets. "
             f"N: {told['n_kind']}; C: {told['c_kind']}. Intervals 95% from {told['resamples']} "
             "resamples; points " + (
                 f"share runs, errors correlate {told['error_correlation']:.2f} along a run."
                 if told["nested"] else "independent."), ""]
    for title, rows, columns in sections(told, reference):
        if rows:
            lines += [f"## {title}", "", *table(rows, columns)]
    for one in told.get("comparisons", ()):
        lines += [f"## A = {one['A']} against B = {one['B']}", "",
                  *table(one["exponents"], ("exponent of", "A", "B", "B-A")),
                  *table(one["levels"], ("level of", "A", "B", "B/A")),
                  f"The levels are at C = {show(one['C'])}. " + (
                      f"No crossing: {one['crossing']['reason']}." if "reason" in one["crossing"]
                      else f"The losses cross at C = {show(one['crossing'])}."), "",
                  "The compute that A needs to reach B's loss at C, over C:", "",
                  *table(one["multiplier"], ("C", "value", "ci95")),
                  one["reading"], *(f"WARNING: {warning}" for warning in one["warnings"]), ""]
    warned = [f"- {warning}" for warning in told["warnings"]] or ["none"]
    return "\n".join([*lines, "## Warnings", "", *warned, ""])

def sections(told, reference):
    """(title, rows, columns) of every table; one without rows is left out."""
    metrics, form = told["metrics"], told["parametric"]
    own = {name: law["own_optimum"] for name, law in metrics.items() if "own_optimum" in law}
    laws = {"N*": told["N_opt"], "D*": told["D_opt"], "loss": told["loss"]["power"], **metrics,
            **{f"N* of {name}": law for name, law in own.items()}}
    lines = [{"law": name, **law} for name, law in laws.items() if law and "refused" not in law]
    for row, (_, exponent) in zip(lines, PAPER.values()):
        row["the paper's exponent"] = exponent
    floors = [{"law": name, **law["floor"]} for name, law in
              {"loss": told["loss"], **metrics}.items() if law.get("floor")]
    forms = [] if "refused" in form else [
        {"constant": name, "value": form[name], "ci95": form["ci95"].get(name)}
        for name in ("E", "A", "B", "alpha", "beta", "a", "starts", "starts_agree")]
    methods = [{"method": name, "exponent of N*": a}
               for name, a in told["method_spread"]["methods"].items()]
    budgets = [{**row, "remarks": row["flags"] or row["reason"] and f"NOT USED: {row['reason']}"}
               for row in told["budgets"]]
    best = [{"C": row["C"], "N_opt": row["N_opt"]} for row in told["budgets"] if own]
    for name, law in own.items():
        for row, at_budget in zip(best, law["budgets"]):
            row[name] = at_budget["N_opt"] or at_budget["reason"]
    gaps = [f"{gap}{what}" for gap in ("difference", "ratio")
            for what in ("", "_per_decade", "_is")]
    beside = told.get("side_by_side", {"C": None, "rows": []})
    missing = told["reasons"] | told.get("not_compared", {})
    noise = told["noise"] | (told["noise"]["paired_se_percent"] or {})
    return [
        ("Lines: value = coefficient C^exponent", lines,
         ["law", "exponent", "ci95", "jackknife95", "coefficient", "r2"]
         + ["the paper's exponent"] * reference),
        ("With a floor: value = L_inf + coefficient C^-exponent", floors,
         ["law", "L_inf", "L_inf_ci95", "coefficient", "exponent", "ci95"]),
        ("Parametric: loss = E + A N^-alpha + B D^-beta, so N* ~ C^a", forms,
         ["constant", "value", "ci95"]),
        ("The exponent of N* by method", methods, ["method", "exponent of N*"]),
        ("Budgets", budgets,
         ["C", "n_points", "N_opt", "N_opt_ci95", "D_opt", "loss_opt", "remarks"]),
        ("Missing, and why", [{"what": name, "reason": why} for name, why in missing.items()],
         ["what", "reason"]),
        ("Noise of a point, % of the loss: between neighbouring sizes (paired), over seeds",
         [noise], ["median", "worst", "seed_spread_percent"]),
        ("Offsets: other data against the training data at N* (constant: the slope's interval "
         "holds 0; for a ratio of its logarithm). Intervals are for the images evaluated",
         [row for row in told["offsets"] if "refused" not in row], ["metric", "data", *gaps]),
        ("The model best for FD, beside N_opt, the best for the loss", best, ["C", "N_opt", *own]),
        ("Backtest: the top budgets left out and predicted from the rest", told["backtest"],
         ["budgets_left_out", "left_out", "law", "predicted", "ci95", "measured", "error",
          "N_error"]),
        ("How much is enough: the law from the smallest budgets, predicting the loss of the top",
         told["how_much_is_enough"],
         ["budgets", "beyond", "exponent_N", "exponent_N_ci95", "exponent_L", "exponent_L_ci95",
          "predicted", "ci95", "error"]),
        ("What a count does: the same records, N counted in two ways", told.get("n_kinds"),
         ["n_kind", "exponent", "ci95", "a_parametric"]),
        ("Plan", plan_rows(told.get("plan")), ["what", "value"]),
        ("The paper's own plan", plan_rows(told.get("paper_plan")), ["what", "value"]),
        (f"The laws side by side, at C = {show(beside['C'])}", beside["rows"],
         [*(beside["rows"] or [{}])[0]])]

def plan_rows(told):
    """A plan as rows of a table, without what is missing (its reason is one of the rows)."""
    flat = {**(told or {})}
    for name, value in flat.pop("metrics", {}).items():
        flat[f"{name} (metric)"] = value
    return [{"what": name, "value": value} for name, value in flat.items() if value is not None]

# ---- the command -------------------------------------------------------------------------------

def arguments(argv):
    """The flags, or BadInput."""
    parser = argparse.ArgumentParser(prog="fit.py", allow_abbrev=False, description="Fit a scaling "
                                     "law to results directories or CSV files.")
    parser.add_argument("paths", nargs="*", metavar="PATH", default=["results/quick"],
                        help="results directories or CSV files (default: results/quick)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: PATH/law; ./law for "
                        "a CSV, and with --plan, --compare or --reference)")
    parser.add_argument("--metric", default="val_loss_ema", help="the loss to fit (train_loss is "
                        "the paper's)")
    parser.add_argument("--n", choices=("blocks", "total"), default="blocks",
                        help="which parameters N counts")
    parser.add_argument("--bootstrap", type=int, default=1000, metavar="R",
                        help="number of resamples")
    parser.add_argument("--plan", metavar="C", help="FLOPs (1.5e21) or devices:hours:MFU "
                        "(8xH100:72h:0.4)")
    parser.add_argument("--compare", metavar="PATH", nargs="+", default=[],
                        help="other results directories or CSV files, each compared with the first")
    parser.add_argument("--reference", choices=("paper",),
                        help="draw and print the paper's laws beside ours")

    def complain(message):
        raise BadInput(message)

    parser.error = complain  # one line and our exit status, without the usage
    args = parser.parse_args(argv)
    if args.bootstrap < 20:
        raise BadInput(f"--bootstrap {args.bootstrap}: an interval needs 20 resamples")
    return args

def run(args):
    """Fit, compare, plan; write the page, the numbers and the pictures; print the page."""
    paper = paper_plan(args.plan) if args.reference and args.plan else None
    if paper and args.paths == ["results/quick"] and not Path("results/quick").exists():
        lines = table(plan_rows(paper), ["what", "value"])
        print("\n".join(["## The paper's own plan", "", *lines]))
        return
    if args.plan:
        parse_plan(args.plan)  # complain before a minute of fitting, not after
    records, first = read(args.paths), Path(args.paths[0])
    if "N" in records[0] and (args.n, args.metric) != ("blocks", "val_loss_ema"):
        raise BadInput(f"--n {args.n} --metric {args.metric}: a CSV has one N and one loss")
    fitted = fit(records, args.metric, args.n, args.bootstrap)
    told = summary(fitted)
    told["n_kinds"] = both_counts(fitted, told, records, args)
    if args.plan and not told["N_opt"]:
        raise Refused(f"--plan {args.plan}: {told['reasons']['N_opt']}")
    told |= {"plan": plan(fitted, args.plan) if args.plan else None, "paper_plan": paper}
    if args.plan and told["plan"]["times_beyond_the_data"] > 1:
        beyond = told["plan"]["times_beyond_the_data"]
        told["warnings"].append(f"the plan EXTRAPOLATES {beyond:.3g} TIMES BEYOND THE LARGEST "
                                "BUDGET MEASURED")
    fits = {}
    if args.compare:
        fits = compare_all(fitted, told, args)
    # A question put to a law leaves the folder of the law alone.
    plain = first.is_dir() and not (args.plan or args.compare or args.reference)
    out = args.out or (first / "law" if plain else Path("law"))
    out.mkdir(parents=True, exist_ok=True)
    text = page(told, bool(args.reference))
    drawn = draw_all(out, fitted, told, fits, bool(args.reference))
    write(out / "law.md", lambda file: file.write_text(text))
    numbers = json.dumps(told, indent=1, allow_nan=False)
    write(out / "law.json", lambda file: file.write_text(numbers + "\n"))
    print(f"{text}\n{out}: law.md law.json {' '.join(drawn)}")

def both_counts(fitted, told, records, args):
    """The exponent of N* with N counted in both ways, a row for each that has one."""
    if "N" in records[0]:
        return None
    rows = []
    for n_kind in (args.n, {"blocks": "total", "total": "blocks"}[args.n]):
        try:
            bare = [{**record, "metrics": {}} for record in records]
            one = fitted if n_kind == args.n else fit(bare, args.metric, n_kind, args.bootstrap)
        except Refused as reason:
            told["warnings"].append(f"with the other count of N there is no law: {reason}")
            continue
        exponent = one.with_interval(lambda law: law.lines["N"].exponent)
        if one.law.lines["N"].exists:
            rows.append({"n_kind": n_kind, "exponent": exponent["value"], "ci95": exponent["ci95"],
                         "a_parametric": None if one.law.form.refused else one.law.form.a})
    return rows

def compare_all(fitted, told, args):
    """Every path of --compare against the first. -> {name: Fit}; Refused where none has a law."""
    paths = [args.paths[0], *args.compare]
    short = [Path(path).name for path in paths]
    names = short if len(set(short)) == len(short) else paths
    if not told["N_opt"]:
        raise Refused(f"--compare needs a law of {paths[0]}: {told['reasons']['N_opt']}")
    fits, told["comparisons"], told["not_compared"] = {names[0]: fitted}, [], {}
    for k, (path, name) in enumerate(zip(paths[1:], names[1:]), 1):
        try:
            other = fit(read([path]), args.metric, args.n, args.bootstrap, seed=k)
            if not other.law.lines["N"].exists:
                raise Refused(too_few(other.law))
        except Refused as reason:  # the others can still be compared
            told["not_compared"][name] = str(reason)
            continue
        ends = [one.points.budgets[[0, -1]] for one in (fitted, other)]
        budgets = list(np.geomspace(max(end[0] for end in ends), min(end[1] for end in ends), 3))
        budgets += [told["plan"]["C"]] if args.plan else []
        told["comparisons"].append(compare(fitted, other, (paths[0], path), budgets))
        fits[name] = other
    if not told["comparisons"]:
        raise Refused("; ".join(f"{name}: {why}" for name, why in told["not_compared"].items()))
    told["side_by_side"] = side_by_side(fits)
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

def draw_all(out, fitted, told, fits, reference):
    """Draw what there is into the folder; what an older law left goes. -> names of files."""
    import matplotlib  # here and not above: it takes most of a second
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    has_metrics = any("refused" not in metric for metric in told["metrics"].values())
    figures = {"law.png": draw_law(plt, fitted, told, reference),
               "law_diagnostics.png": draw_diagnostics(plt, fitted, told),
               "curves.png": draw_curves(plt, fitted, told),
               "metrics.png": draw_metrics(plt, fitted, told) if has_metrics else None,
               "compare.png": draw_comparison(plt, fits) if fits else None}
    for name, figure in figures.items():
        if figure:
            write(out / name, lambda file: figure.savefig(file, dpi=110, format="png"))
            plt.close(figure)
        else:
            (out / name).unlink(missing_ok=True)
    return [name for name, figure in figures.items() if figure]

def log_axes(ax, xlabel, ylabel, title, fine=""):
    """Logarithmic axes; `fine` names those ("x", "y") that span only a part of a decade.

    There matplotlib's own ticks say nothing or run into each other: these get round numbers.
    """
    ax.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
    ax.set_title(title, fontsize=10)
    ax.xaxis.set_minor_formatter("")
    for letter in fine:
        axis = getattr(ax, f"{letter}axis")
        low, high = axis.get_view_interval()
        numbers = [m * 10.0**e for e in range(-6, 9) for m in (1, 2, 5)]
        step = next(number for number in numbers if (high - low) / number < 8)
        if high < 6 * low:
            numbers = np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step
        axis.set_ticks([number for number in numbers if low <= number <= high])
        axis.set_major_formatter("{x:.4g}")
        axis.set_ticks([], minor=True)

def room_for_legend(ax, share):
    """Higher by a share of what it spans, on a logarithmic axis."""
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    ax.set_ylim(low, high * (high / low) ** share)

def band(ax, fitted, kind, name, C, colour, label):
    """A law of one kind ("lines" or "floors") over C with the middle 95% of its resamples."""
    curves = np.array([getattr(law, kind)[name].predict(C) for law in fitted.draws])
    curves = curves[np.isfinite(curves).all(1)]
    ax.plot(C, getattr(fitted.law, kind)[name].predict(C), color=colour, lw=1.5, label=label)
    if len(curves) >= 20:
        low, high = np.quantile(curves, [0.025, 0.975], axis=0)
        ax.fill_between(C, low, high, color=colour, alpha=0.2, lw=0)

def dots(ax, fitted, name, colours):
    """What was found at every budget, with its interval."""
    for b, vertex in enumerate(fitted.law.vertices):
        if math.isfinite(vertex.value(name)):
            ends = fitted.interval(lambda law: law.vertices[b].value(name)) or [math.nan] * 2
            ax.plot([vertex.C] * 2, ends, color=colours[b], lw=2)
            ax.plot(vertex.C, vertex.value(name), "o", color=colours[b], ms=5)

def draw_law(plt, fitted, told, reference):
    """law.png: a parabola per budget; N*(C), D*(C) and the loss over C."""
    points, form, floor = fitted.points, fitted.law.form, told["loss"]["floor"]
    colours = plt.cm.viridis(np.linspace(0, 0.9, len(points.budgets)))
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    figure.suptitle(f"Scaling law of {fitted.metric}: {len(points.N)} points at "
                    f"{len(points.budgets)} budgets, 95% intervals")
    draw_parabolas(axes[0, 0], fitted, colours)
    grid = np.geomspace(points.budgets.min() / 1.5, points.budgets.max() * 4, 60)
    for ax, name, title, label, found in (
            (axes[0, 1], "N", "How large", f"N*, parameters ({fitted.n_kind})", told["N_opt"]),
            (axes[1, 0], "D", "On how much data", "D*, tokens", told["D_opt"]),
            (axes[1, 1], "loss", "How good", f"{fitted.metric} at N*", told["loss"]["power"])):
        if found:
            band(ax, fitted, "lines", name, grid, "tab:blue", f"{found['coefficient']:.3g} "
                 f"C^{found['exponent']:.4f} {show(found['ci95'])}")
        dots(ax, fitted, name, colours)
        if name == "loss" and floor:
            band(ax, fitted, "floors", name, grid, "tab:orange", f"{floor['L_inf']:.3g} + "
                 f"{floor['coefficient']:.3g} C^-{floor['exponent']:.4f}")
        if name != "loss" and not form.refused:
            best = dict(zip("ND", form.optimum(grid)))[name]
            ax.plot(grid, best, "--", color="gray", lw=1, label="parametric form")
        if reference:
            k, p = PAPER[name]
            ax.plot(grid, k * grid**p, "k:", label="the paper")
        title += "" if found else f": no law, {told['reasons']['N_opt']}"
        log_axes(ax, FLOPS, label, title, "y" if name == "loss" and found else "")
        device_hours(ax, flops_per_second(points))
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    return figure

def device_hours(ax, speed):
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
        all_, N, loss = points.budget == b, points.N[vertex.window], points.loss[vertex.window]
        ax.plot(points.N[all_], points.loss[all_], "o", mfc="none", color=colours[b], ms=5)
        ax.plot(N, loss, "o", color=colours[b], ms=5, label=f"{vertex.C:.2g}")
        if not vertex.reason:
            N, best = np.geomspace(N.min(), N.max(), 60), vertex.value("N")
            bowl = vertex.value("loss") * np.exp(vertex.curvature * np.log(N / best) ** 2)
            ax.plot(N, bowl, color=colours[b], lw=1)
            ax.plot(best, vertex.value("loss"), "*", color="crimson", ms=12, mec="white", zorder=5)
    inside = points.loss[np.concatenate([vertex.window for vertex in fitted.law.vertices])]
    ax.set_ylim(0.98 * points.loss.min(), inside.max())
    room_for_legend(ax, 0.3)
    log_axes(ax, f"N, parameters ({fitted.n_kind})", fitted.metric,
             "One parabola per budget (star: its vertex; hollow: not in its window)", "y")
    if len(points.budgets) <= 15:
        ax.legend(title="C, FLOPs", fontsize=8, title_fontsize=8, loc="upper center", ncols=5)

def draw_metrics(plt, fitted, told):
    """metrics.png: a panel for each metric at N* over C, a colour for each data set."""
    laws = {name: law for name, law in told["metrics"].items() if "refused" not in law}
    metrics, C = sorted({name.split(" on ")[0] for name in laws}), fitted.points.budgets
    columns, rows = min(3, len(metrics)), math.ceil(len(metrics) / 3)
    figure, axes = plt.subplots(rows, columns, squeeze=False, layout="constrained",
                                figsize=(5.5 * columns, 0.6 + 4.6 * rows))
    figure.suptitle(f"Metrics at the N* of {fitted.metric}, 95% intervals")
    grid = np.geomspace(C.min() / 1.3, C.max() * 1.3, 40)
    for ax, metric in zip(axes.flat, metrics):
        for k, name in enumerate(name for name in laws if name.split(" on ")[0] == metric):
            band(ax, fitted, "lines", name, grid, f"C{k}", f"{name.split(' on ', 1)[1]}: "
                 f"C^{laws[name]['exponent']:.4f} {show(laws[name]['ci95'])}")
            dots(ax, fitted, name, [f"C{k}"] * len(C))
        verdicts = [f"{row['data']} - {row['against']}: difference {row['difference_is']}, ratio "
                    f"{row['ratio_is']}" for row in told["offsets"]
                    if row["metric"] == metric and "refused" not in row]
        room_for_legend(ax, 0.25)
        log_axes(ax, FLOPS, metric + UNITS.get(metric, ""), "\n".join([metric, *verdicts]), "y")
        ax.legend(fontsize=8, loc="upper center")
    for ax in axes.flat[len(metrics):]:
        ax.set_visible(False)
    return figure

def draw_diagnostics(plt, fitted, told):
    """law_diagnostics.png: residuals, the clouds of the bootstrap, how much is enough."""
    points, form, rows = fitted.points, fitted.law.form, told["how_much_is_enough"]
    figure, axes = plt.subplots(2, 2, figsize=(13, 10), layout="constrained")
    figure.suptitle(f"Diagnostics of the law of {fitted.metric}")
    used = np.concatenate([vertex.window for vertex in fitted.law.usable()] or [[]]).astype(int)
    best = np.array([vertex.value("N") for vertex in fitted.law.vertices])[points.budget]
    residual = np.array([point["residual"] for point in told["points"]])
    draw_residuals(figure, axes[0, 0], points, used, np.log2(points.N / best), residual,
                   "log2 of N/N*", "Parabolas")
    if not form.refused:
        rest = np.log(points.loss / form.loss(points.N, points.D))
        draw_residuals(figure, axes[0, 1], points, slice(None), np.log10(points.N), rest,
                       "log10 of N", "Parametric form")
    clouds, forms = axes[1, 0], [law.form for law in fitted.draws]
    clouds.plot([law.lines["N"].exponent for law in fitted.draws],
                [-law.floors["loss"].exponent for law in fitted.draws], ".", ms=3, alpha=0.4,
                label="parabolas and law with floor")
    clouds.plot([one.a for one in forms], [one.alpha * one.a for one in forms], ".", ms=3,
                alpha=0.4, label="parametric form")
    clouds.set(xlabel="exponent of N*", ylabel="exponent of the loss above its floor",
               title=f"{len(fitted.draws)} bootstrap resamples")
    clouds.legend(fontsize=8)
    enough, budgets = axes[1, 1], [row["budgets"] for row in rows]
    for row in rows:
        enough.plot([row["budgets"]] * 2, row["exponent_N_ci95"] or [math.nan] * 2, "C0", lw=2)
    enough.plot(budgets, [row["exponent_N"] for row in rows], "o-", color="C0")
    enough.set(xlabel="law from the smallest k usable budgets", title="How much is enough?",
               xticks=budgets)
    enough.set_ylabel("exponent of N*", color="C0")
    error = enough.twinx()
    error.plot(budgets, [100 * row["error"] for row in rows], "s--", color="C1")
    error.set_ylabel("error of the predicted loss of the top budget, %", color="C1")
    return figure

def draw_residuals(figure, ax, points, chosen, x, residual, label, title):
    """What a fit leaves over; the colour is the budget."""
    shown = ax.scatter(x[chosen], 100 * residual[chosen], s=18, c=np.log10(points.C[chosen]))
    figure.colorbar(shown, ax=ax, label="log10 of C")
    ax.axhline(0, color="gray", lw=0.7)
    ax.set(xlabel=label, ylabel="residual, % of the loss",
           title=f"{title}: what is left over (a pattern is a misfit)")

def draw_comparison(plt, fits):
    """compare.png: loss at N*, N*, and epochs where images were repeated; a colour a law."""
    figure, axes = plt.subplots(1, 3, figsize=(19.5, 5.5), layout="constrained")
    for k, (name, fitted) in enumerate(fits.items()):
        colour = f"C{k % 10}"
        C = fitted.points.budgets
        grid = np.geomspace(C.min() / 1.2, C.max() * 1.2, 40)
        for ax, what in zip(axes, ("loss", "N")):
            exponent = fitted.with_interval(lambda law: law.lines[what].exponent)
            band(ax, fitted, "lines", what, grid, colour, f"{name}: C^{show(exponent)}")
            ax.plot(*curve(fitted.law.vertices, what), "o", color=colour, ms=5)
        per_epoch = [record["D"] / record["epochs"] for record in fitted.points.records
                     if record.get("epochs")]
        if per_epoch:
            _, D = curve(fitted.law.vertices, "D")
            _, loss = curve(fitted.law.vertices, "loss")
            axes[2].plot(D / np.median(per_epoch), loss, "o-", color=colour, ms=5, label=name)
    log_axes(axes[0], FLOPS, "loss at N*", "How good: the loss at N*", "y")
    log_axes(axes[1], FLOPS, "N*, parameters", "How large: N*")
    log_axes(axes[2], "epochs at N*", "loss at N*", "How often was an image seen", "xy")
    for ax in axes:
        if ax.lines:
            ax.legend(fontsize=8)
        else:
            ax.remove()
    return figure

def draw_curves(plt, fitted, told):
    """curves.png: why one run serves many budgets. Every run's loss over C, the best run marked."""
    points = fitted.points
    figure, ax = plt.subplots(figsize=(11, 7), layout="constrained")
    scale = plt.matplotlib.colors.LogNorm(points.N.min(), points.N.max() ** 1.02)
    for run in range(points.run.max() + 1):
        here = np.flatnonzero(points.run == run)
        here = here[np.argsort(points.C[here])]
        ax.plot(points.C[here], points.loss[here], "o-", ms=3.5, lw=1.2,
                color=plt.cm.plasma(scale(points.N[here[0]])))
    for b, C in enumerate(points.budgets):
        here = np.flatnonzero(points.budget == b)
        best = here[points.loss[here].argmin()]
        ax.axvline(C, color="gray", lw=0.7, ls="--", zorder=0)
        ax.plot(points.C[best], points.loss[best], "*", color="crimson", ms=14, mec="white",
                zorder=5)
    passes = ("A run passes through every budget on its way (dashed cuts)" if told["nested"] else
              "The loss of every size at every budget (dashed cuts)")
    log_axes(ax, FLOPS, fitted.metric, f"{passes}. Star: the lowest at a cut", "y")
    figure.colorbar(plt.cm.ScalarMappable(scale, "plasma"), ax=ax,
                    label=f"N, parameters ({fitted.n_kind})")
    return figure

if __name__ == "__main__":
    sys.exit(main())
