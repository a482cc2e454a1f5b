"""Declare a study: its presets, its arms, and the starts that the arms share."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from midflight.datasets import DATASETS
from midflight.errors import MidflightError, UnknownName
from midflight.hypergrad import ESTIMATORS

DEFAULT = "default"
"""Tune with `mf.Tuner` and no options of its own."""
TUNINGS = (*ESTIMATORS, DEFAULT)
"""Ways to tune a run: an estimator with the paper's settings, or `DEFAULT`."""
COUNTS = dict.fromkeys(("train", "valid", "epochs", "batch", "every", "starts"), 1) | {
    "landscape": 0,
    "seed": 0,
}
"""Field -> its least value."""
MOST_WEIGHTS = 10**9
MOST_ARMS = 10**6
"""A report holds all arms in memory, at about 10 kB each."""

Kind = Literal["initial", "tuned", "rerun", "landscape"]


class SpecError(MidflightError, ValueError):
    """The declaration of a study is invalid."""


@dataclass(frozen=True)
class Arm:
    """One training run of a study.

    Attributes:
        network: hidden widths, such as "1000-1000-1000".
        kind: how the hyperparameters behave.
            initial: fixed at the start.
            tuned: tuned during training.
            rerun: fixed at the final values of the tuned arm.
            landscape: fixed at a grid point, for the background of Fig. 1.
        estimator: one of `TUNINGS` for tuned and rerun; "" otherwise.
        index: number of the start or of the grid point.
    """

    network: str
    kind: Kind
    estimator: str
    index: int


@dataclass(frozen=True)
class Spec:
    """All settings of a study; equal specs give equal rows.

    Attributes:
        dataset: mnist, fashion_mnist or digits.
        train: number of images that train the weights (T1).
        valid: number of images that tune the hyperparameters (T2).
        networks: hidden widths of the ReLU networks, such as 500-300.
        epochs: passes over T1.
        batch: images per training batch and per validation batch.
        lr: initial learning rate of Adam on the weights.
        lr_end: final learning rate as a fraction of lr; the decay is exponential.
        every: training steps per hyperparameter step. The estimator default has its own schedule.
        starts: number of random starts, each with its own initial weights and data order.
        l2: interval of log10 of the weight decay, for starts and for tuning.
        noise: interval of the standard deviation of the input noise, for starts and for tuning.
        wide: use the intervals of the paper's code, l2 [-5, -1] and noise [0, 0.9], in place of its text's.
        estimator: hypergradient estimators; each runs from the same starts with a horizon of one step.
            default: midflight's own defaults, on a CPU only.
        hyper_optimizer: optimiser of the hyperparameters: sign (sign steps) or adam; its step size falls
            linearly to 0. The estimator default has its own.
        hyper_lr: first step of the hyperparameters, as a fraction of the interval.
        landscape: grid points per axis of the fixed runs behind Fig. 1; 0: none.
        seed: seed of all random numbers.
        device: cpu or cuda.
    """

    dataset: str = "mnist"
    train: int = 55_000
    valid: int = 5_000
    networks: tuple[str, ...] = ("1000-1000-1000",)
    epochs: int = 50
    batch: int = 100
    lr: float = 1e-3
    lr_end: float = 0.1
    every: int = 10
    starts: int = 100
    l2: tuple[float, float] = (-5.5, -2.5)
    noise: tuple[float, float] = (0.0, 0.8)
    wide: bool = False
    estimator: tuple[str, ...] = ("one_step",)
    hyper_optimizer: str = "sign"
    hyper_lr: float = 0.03
    landscape: int = 0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dataset", self.dataset, DATASETS),
            ("hyper_optimizer", self.hyper_optimizer, ("sign", "adam")),
            ("device", self.device.split(":")[0], ("cpu", "cuda")),
            *(("estimator", estimator, TUNINGS) for estimator in self.estimator),
        ):
            if value not in known:
                raise UnknownName(name, value, known)
        for name, least in COUNTS.items():
            value = getattr(self, name)
            self._require(name, type(value) is int and value >= least, f"{name} >= {least}")
        for name in ("lr", "lr_end", "hyper_lr"):
            self._require(name, 0 < getattr(self, name) <= 1, f"0 < {name} <= 1")
        for name, (lowest, highest) in {"l2": (-37.0, 38.0), "noise": (0.0, 1e38)}.items():  # of float32
            low, high = getattr(self, name)
            self._require(name, high - low >= 1e-6, "high - low >= 1e-6")
            self._require(
                name, lowest <= low and high <= highest, f"low >= {lowest:g} and high <= {highest:g}"
            )
        for name in ("networks", "estimator"):
            values = getattr(self, name)
            whole = type(values) is tuple and 0 < len(values) == len(set(values))
            self._require(name, whole, "at least one, and none twice,")
        self._require("networks", all(map(widths, self.networks)), 'widths joined by "-", such as 500-500,')
        heavy = f"at most {MOST_WEIGHTS:,} weights, which take 16 GB with the state of Adam,"
        self._require("networks", max(map(products, self.networks)) <= MOST_WEIGHTS, heavy)
        self._require("batch", self.batch <= min(self.train, self.valid), "batch <= train and valid")
        most = DATASETS[self.dataset][0]
        if self.train + self.valid > most:
            raise SpecError(
                f"train + valid must be at most {most} for {self.dataset}, "
                f"but got {self.train} + {self.valid}."
            )
        runs = len(self.networks) * (self.starts * (1 + 2 * len(self.estimator)) + self.landscape**2)
        if runs > MOST_ARMS:
            raise SpecError(f"starts and landscape must give at most {MOST_ARMS:,} runs, but give {runs:,}.")
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise SpecError(f"device must be cpu, cuda or cuda:NUMBER, but got {self.device!r}.")
        if self.device != "cpu" and DEFAULT in self.estimator:
            others = " ".join(e for e in self.estimator if e != DEFAULT) or "one_step"
            raise SpecError(
                "device=cpu must hold for the estimator default, because a GPU trains all runs together, but "
                f"got {self.device}; use --estimator {others}, or --device cpu."
            )

    def _require(self, name: str, holds: bool, condition: str) -> None:
        if not holds:
            raise SpecError(f"{name}: {condition} must hold, but got {getattr(self, name)}.")

    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """Return the intervals of (log10 L2, noise); `wide` overrides `l2` and `noise`."""
        return ((-5.0, -1.0), (0.0, 0.9)) if self.wide else (self.l2, self.noise)

    def start(self, index: int) -> tuple[float, float]:
        """Return (log10 L2, noise) of a start, uniform over the intervals; independent of `starts`."""
        rng = np.random.default_rng([self.seed, index])
        (l2_low, l2_high), (noise_low, noise_high) = self.intervals()
        return float(rng.uniform(l2_low, l2_high)), float(rng.uniform(noise_low, noise_high))

    def grid_point(self, index: int) -> tuple[float, float]:
        """Return (log10 L2, noise) of a point of the landscape."""
        l2, noise = (np.linspace(*interval, self.landscape) for interval in self.intervals())
        return float(l2[index % self.landscape]), float(noise[index // self.landscape])

    def arms(self) -> Iterator[Arm]:
        """Yield every arm in the order of running; a re-run may have to wait for its tuned arm."""
        for network in self.networks:
            for index in range(self.starts):
                yield Arm(network, "initial", "", index)
                for estimator in self.estimator:
                    yield Arm(network, "tuned", estimator, index)
                for estimator in self.estimator:
                    yield Arm(network, "rerun", estimator, index)
            for index in range(self.landscape**2):
                yield Arm(network, "landscape", "", index)

    def steps(self) -> int:
        """Return the training steps of one arm; an incomplete last batch is dropped."""
        return self.epochs * (self.train // self.batch)

    def to_json(self) -> str:
        """Return the spec as JSON; equal specs give equal texts."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """Invert `to_json`."""
        values: dict[str, Any] = json.loads(text)
        lists = {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
        return cls(**values | lists)


def widths(network: str) -> list[int]:
    """Return [500, 300] for "500-300", and [] for a malformed text."""
    whole = re.fullmatch(r"0*[1-9]\d{0,8}(-0*[1-9]\d{0,8})*", network, re.ASCII)
    return [int(width) for width in network.split("-")] if whole else []


def products(network: str) -> int:
    """Return the multiply-adds of a forward pass on one image of 784 pixels; biases are left out."""
    return sum(m * n for m, n in pairwise([784, *widths(network), 10]))


def changed_fields(a: Spec, b: Spec) -> list[str]:
    """Return the names of the fields that differ."""
    return [f.name for f in fields(Spec) if getattr(a, f.name) != getattr(b, f.name)]


def preset(name: str, **overrides: Any) -> Spec:
    """Return a preset with some fields replaced; raises `UnknownName` or `SpecError`."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return replace(PRESETS[name], **overrides)


PRESETS: dict[str, Spec] = {
    "smoke": Spec(
        dataset="digits",
        train=1000,
        valid=437,
        networks=("64-64",),
        epochs=20,
        batch=50,
        every=5,
        starts=4,
        estimator=("one_step", "paper", DEFAULT),
        landscape=3,
    ),
    "quick": Spec(
        train=5_000,
        valid=2_000,
        networks=("300-300-300",),
        epochs=40,
        starts=12,
        estimator=("one_step", "paper", DEFAULT),
        landscape=5,
    ),
    "paper": Spec(
        networks=("1000-1000-1000", "2000-1000-1000-500", "4000-2000-1000-500-250"),
        hyper_optimizer="adam",
        hyper_lr=0.01,
        estimator=("one_step", "paper"),
    ),
}
