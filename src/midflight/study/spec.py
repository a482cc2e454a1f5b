"""What a study is: its presets, its arms, and the starts that they share."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from midflight.datasets import DATASETS
from midflight.errors import MidflightError, UnknownName
from midflight.hypergrad import ESTIMATORS

DEFAULT = "default"
"""Tuned as `mf.Tuner` does when it is given no policy."""
TUNINGS = (*ESTIMATORS, DEFAULT)
"""Ways to tune a run: an estimator with the study's own settings, or `DEFAULT`."""

Kind = Literal["initial", "tuned", "rerun", "landscape"]


class SpecError(MidflightError, ValueError):
    """A study that cannot be run as it is declared."""


@dataclass(frozen=True)
class Arm:
    """One training run of a study.

    Attributes:
        network: hidden widths, such as "1000-1000-1000".
        kind: initial (fixed at the start), tuned (while it trains), rerun (fixed at the tuned
            values) or landscape (fixed at a grid point, for the background of Fig. 1).
        estimator: one of `TUNINGS`, of the tuning that this arm does or follows; "" where there is none.
        index: of the start, or of the grid point.
    """

    network: str
    kind: Kind
    estimator: str
    index: int


@dataclass(frozen=True)
class Spec:
    """Every choice of a study; two studies with equal specs give equal rows.

    Attributes:
        dataset: mnist, fashion_mnist or digits.
        train: images that update the weights (T1).
        valid: images that tune (T2).
        networks: hidden widths of the ReLU networks.
        epochs: passes over T1.
        batch: images in a training batch, and in a validation batch.
        lr: of Adam on the weights at the start.
        lr_end: what is left of lr at the end, as a fraction; the decay is exponential.
        every: training steps per hyper-step; the estimator default has a schedule of its own.
        starts: random starts, each with its own weights and order of the data.
        l2: interval of log10 of the weight decay, for starts and for tuning.
        noise: interval of the input noise's standard deviation, likewise.
        wide: the intervals of the paper's code instead of its text: l2 [-5, -1], noise [0, 0.9].
        estimator: of the hypergradient, each run from the same starts, judged right after a training step;
            or default, which is midflight as it comes and runs on a CPU only.
        hyper_optimizer: what moves the hyperparameters: sign steps or Adam, annealed linearly; the estimator
            default has its own.
        hyper_lr: its first step, as a fraction of the interval.
        landscape: grid points per axis of fixed runs behind Fig. 1; 0 for none.
        seed: of everything random.
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
    hyper_optimizer: Literal["sign", "adam"] = "sign"
    hyper_lr: float = 0.03
    landscape: int = 0
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.dataset not in DATASETS:
            raise UnknownName("dataset", self.dataset, DATASETS)
        for name in ("train", "valid", "epochs", "batch", "every", "starts"):
            _require(getattr(self, name) >= 1, f"{name} >= 1", name, getattr(self, name))
        _require(self.landscape >= 0, "landscape >= 0", "landscape", self.landscape)
        _require(self.seed >= 0, "seed >= 0", "seed", self.seed)
        for name in ("lr", "lr_end", "hyper_lr"):
            _require(0 < getattr(self, name) <= 1, f"0 < {name} <= 1", name, getattr(self, name))
        for name in ("l2", "noise"):
            low, high = getattr(self, name)
            _require(low < high, "low < high", name, (low, high))
        _require(self.noise[0] >= 0, "low >= 0", "noise", self.noise)
        _require(self.batch <= min(self.train, self.valid), "batch <= train and valid", "batch", self.batch)
        _require(bool(self.networks), "at least one network", "networks", self.networks)
        _require(bool(self.estimator), "at least one estimator", "estimator", self.estimator)
        if self.hyper_optimizer not in ("sign", "adam"):
            raise UnknownName("hyper_optimizer", self.hyper_optimizer, ("sign", "adam"))
        for network in self.networks:
            _require(bool(widths(network)), 'widths joined by "-", such as 500-500', "networks", network)
        for estimator in self.estimator:
            if estimator not in TUNINGS:
                raise UnknownName("estimator", estimator, TUNINGS)
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise UnknownName("device", self.device, ("cpu", "cuda"))
        if self.device != "cpu" and DEFAULT in self.estimator:
            others = " ".join(e for e in self.estimator if e != DEFAULT) or "one_step"
            raise SpecError(
                "device: on a GPU the runs train together, which the estimator default cannot; "
                f"use --estimator {others}, or --device cpu."
            )

    def intervals(self) -> tuple[tuple[float, float], tuple[float, float]]:
        """The intervals of (log10 L2, noise), `wide` taken into account."""
        return ((-5.0, -1.0), (0.0, 0.9)) if self.wide else (self.l2, self.noise)

    def start(self, index: int) -> tuple[float, float]:
        """(log10 L2, noise) of a start, uniform over the intervals; does not depend on `starts`."""
        rng = np.random.default_rng([self.seed, index])
        (l2_low, l2_high), (noise_low, noise_high) = self.intervals()
        return float(rng.uniform(l2_low, l2_high)), float(rng.uniform(noise_low, noise_high))

    def grid_point(self, index: int) -> tuple[float, float]:
        """(log10 L2, noise) of a point of the landscape."""
        l2, noise = (np.linspace(*interval, self.landscape) for interval in self.intervals())
        return float(l2[index % self.landscape]), float(noise[index // self.landscape])

    def arms(self) -> Iterator[Arm]:
        """Every arm, in the order in which they are run where nothing keeps them waiting."""
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
        """Training steps of one arm; an incomplete last batch is left out."""
        return self.epochs * (self.train // self.batch)

    def to_json(self) -> str:
        """The spec as text; equal specs give equal texts."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Spec":
        """The inverse of `to_json`."""
        data: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(text).items()
        }
        return cls(**data)


def widths(network: str) -> list[int]:
    """[500, 300] of "500-300"; [] if it cannot be read."""
    parts = network.split("-")
    return [int(p) for p in parts] if all(p.isdigit() and int(p) > 0 for p in parts) else []


def differences(a: Spec, b: Spec) -> list[str]:
    """The fields in which two specs differ, as "name: a -> b"."""
    return [
        f"{f.name}: {getattr(a, f.name)} -> {getattr(b, f.name)}"
        for f in fields(Spec)
        if getattr(a, f.name) != getattr(b, f.name)
    ]


def preset(name: str, **overrides: Any) -> Spec:
    """A preset with some fields replaced; raises `UnknownName` or `SpecError`."""
    if name not in PRESETS:
        raise UnknownName("preset", name, PRESETS)
    return replace(PRESETS[name], **overrides)


def _require(holds: bool, what: str, name: str, came: object) -> None:
    if not holds:
        raise SpecError(f"{name}: {what} must hold, but got {came}.")


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
