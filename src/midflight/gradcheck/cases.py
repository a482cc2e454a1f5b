"""Define the conformance table: every update rule with every kind of hyperparameter, on a small network.

To add a rule or a kind of hyperparameter, add one row to `OPTIMIZERS` or `KINDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midflight._tensors import Tensors, detach
from midflight.hypergrad.problem import Problem
from midflight.nn import Augment, Dropout, GaussianNoise, MultiplicativeNoise, losses, penalties
from midflight.space import Float, Hyperparameter, Space, default_range
from midflight.tuner.optimizers import trained_parameters
from midflight.updates import State, Update, read_option, read_options, rule_for

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]

OPTIMIZERS: dict[str, Optimizer] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1),
    "SGD Nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.5), amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, betas=(0.9, 0.95)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9),
    "RMSprop centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, lr_decay=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.1),
    "Muon": lambda p: torch.optim.Muon([x for x in p if x.ndim == 2], lr=0.02),
}

FEATURES, HIDDEN, CLASSES, EXAMPLES = 12, 16, 3, 24


@dataclass(frozen=True)
class Batch:
    """The weights and data from which a training loss is computed.

    Attributes:
        weights: theta, name -> tensor.
        x: inputs, (EXAMPLES, FEATURES).
        y: class indices, (EXAMPLES,).
    """

    weights: Tensors
    x: Tensor
    y: Tensor

    def logits(self, x: Tensor | None = None, layer: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
        """Return the logits at x, with `layer` after the first nonlinearity; (EXAMPLES, CLASSES)."""
        return self._linear(2, self._linear(1, layer(self.hidden(x))).tanh())

    def hidden(self, x: Tensor | None = None) -> Tensor:
        """Return the first layer's activations, (EXAMPLES, HIDDEN)."""
        return self._linear(0, self.x if x is None else x).tanh()

    def loss(self, x: Tensor | None = None, layer: Callable[[Tensor], Tensor] = lambda h: h) -> Tensor:
        """Return the plain cross entropy."""
        return F.cross_entropy(self.logits(x, layer), self.y)

    def matrices(self) -> list[Tensor]:
        """Return the weights that are not biases."""
        return [w for w in self.weights.values() if w.ndim == 2]

    def _linear(self, layer: int, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{layer}.weight"], self.weights[f"{layer}.bias"])


Loss = Callable[[Hyperparameter, Batch], Tensor]


def _unread(h: Hyperparameter, b: Batch) -> Tensor:
    """Return a noisy loss that does not read h: h is an option, so it enters by the update."""
    return b.loss(GaussianNoise(0.1)(b.x))


@dataclass(frozen=True)
class Kind:
    """Describe a kind of hyperparameter and how it enters the training step.

    Attributes:
        spec: its range, shape and initial value.
        option: the optimiser's option that it is bound to, if any.
        loss: the training loss as a function of it and a batch.
        needs: a package that the row needs, if any.
    """

    spec: Float
    option: str | None = None
    loss: Loss = _unread
    needs: str | None = None


class _SteadyMasks(Dropout):
    """Draw dropout masks at a constant rate, so that the differentiated function is smooth.

    A separate test of the derivative enumerates all masks.
    """

    def _drawn_at(self, rate: Tensor) -> Tensor:
        return torch.full_like(rate, 0.3)


def _mixed(h: Hyperparameter, b: Batch) -> Tensor:
    x, y = losses.mixup(b.x, F.one_hot(b.y, CLASSES).to(b.x), h)
    return F.cross_entropy(b.logits(x), y)


def _bound(option: str, init: float) -> Kind:
    return Kind(default_range(option, init=init), option)


def _layer(kind: str, layer: Callable[[Hyperparameter], nn.Module], **changes: Any) -> Kind:
    """Return the kind for a layer after the first nonlinearity."""
    return Kind(default_range(kind, **changes), loss=lambda h, b: b.loss(layer=layer(h)))


def _penalty(kind: str, penalty: Callable[[Batch], Tensor], init: float = 1e-2) -> Kind:
    return Kind(default_range(kind, init=init), loss=lambda h, b: b.loss() + h.value * penalty(b))


def _option(kind: str, name: str, **changes: Any) -> Kind:
    """Return the kind for an option of `losses.cross_entropy`."""
    return Kind(
        default_range(kind, **changes),
        loss=lambda h, b: losses.cross_entropy(b.logits(), b.y, **{name: h}),  # type: ignore[arg-type]
    )


def _augmented(kind: str, magnitude: str | None = None) -> Kind:
    """Return the kind for a magnitude of `Augment`."""

    def loss(h: Hyperparameter, b: Batch) -> Tensor:
        augment = Augment(**{magnitude or kind: h})  # type: ignore[arg-type]
        return b.loss(augment(b.x.reshape(-1, 1, 3, 4)).flatten(1))

    return Kind(default_range(kind), loss=loss, needs="kornia")


KINDS: dict[str, Kind] = {
    "weight_decay": _bound("weight_decay", 1e-2),
    "lr": _bound("lr", 1e-2),
    "momentum": _bound("momentum", 0.8),
    "beta1": _bound("beta1", 0.8),
    "beta2": _bound("beta2", 0.99),
    "eps": _bound("eps", 1e-3),
    "l1": _penalty("l1", lambda b: penalties.l1(b.matrices()), init=1e-3),
    "l2": _penalty("l2", lambda b: penalties.l2(b.matrices())),
    "activation_l2": _penalty("activation_l2", lambda b: penalties.activation_l2(b.hidden()), init=0.1),
    "max_norm": _penalty("max_norm", lambda b: penalties.max_norm(b.weights["1.weight"], 0.5)),
    "max_norm_limit": Kind(
        default_range("max_norm_limit", init=0.55),
        loss=lambda h, b: b.loss() + penalties.max_norm(b.weights["1.weight"], h),
    ),
    "orthogonality": _penalty("orthogonality", lambda b: penalties.orthogonality(b.weights["0.weight"])),
    "noise": Kind(default_range("noise", init=0.3), loss=lambda h, b: b.loss(GaussianNoise(h)(b.x))),
    "noise_per_feature": Kind(
        default_range("noise", init=0.3, shape=(FEATURES,)), loss=lambda h, b: b.loss(GaussianNoise(h)(b.x))
    ),
    "hidden_noise": _layer("noise", GaussianNoise),
    "multiplicative_noise": _layer("multiplicative_noise", MultiplicativeNoise),
    "dropout": _layer("dropout", _SteadyMasks, init=0.3),
    "label_smoothing": _option("label_smoothing", "label_smoothing"),
    "focal_gamma": _option("focal_gamma", "focal_gamma"),
    "temperature": _option("temperature", "temperature", init=1.5),
    "class_weight": _option("class_weight", "class_weight", shape=(CLASSES,)),
    "example_weight": _option("example_weight", "example_weight", shape=(EXAMPLES,)),
    "loss_weight": Kind(
        default_range("loss_weight", init=0.1),
        loss=lambda h, b: b.loss() + h.value * (b.logits().sum(1) - 1).square().mean(),
    ),
    "mixup": Kind(default_range("mixup"), loss=_mixed),
    "rotation": _augmented("rotation"),
    "translation": _augmented("translation"),
    "scale": _augmented("scale"),
    "shear": _augmented("shear"),
    "brightness": _augmented("brightness"),
    "contrast": _augmented("contrast"),
    "pixel_noise": _augmented("pixel_noise", "noise"),
}
"""Name of a hyperparameter -> its kind."""


@dataclass(frozen=True)
class Case:
    """Hold a problem with weights and optimiser state in the middle of training, in float64.

    Attributes:
        optimizer: the row of `OPTIMIZERS`.
        hyperparameter: the row of `KINDS`.
        hparams: its raw coordinate, name -> tensor.
    """

    optimizer: str
    hyperparameter: str
    problem: Problem
    params: Tensors
    hparams: Tensors
    state: dict[str, State]


def why_skipped(optimizer: str, hyperparameter: str) -> str | None:
    """Return the reason why a row of `OPTIMIZERS` has no case with a row of `KINDS`; None if it has one."""
    kind = KINDS[hyperparameter]
    if kind.needs and not find_spec(kind.needs):
        return f"{kind.needs} is not installed."
    optim = OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(1, 1))])
    if kind.option is None:
        why = rule_for(optim).why_not_differentiable
        return f"{type(optim).__name__} {why}, so what the loss reads has no derivative." if why else None
    if kind.option not in rule_for(optim).tunable:
        return f"{type(optim).__name__} has no option {kind.option} that can be tuned."
    if kind.option == "momentum" and read_option(optim.param_groups[0], "momentum") == 0:
        return "At momentum 0 torch keeps no buffer, so the step is not continuous in momentum."
    return None


def make_case(optimizer: str, hyperparameter: str, seed: int = 0, steps: int = 20) -> Case:
    """Build the case of a row of `OPTIMIZERS` and a row of `KINDS`, after `steps` steps of training.

    Raises:
        ValueError: `why_skipped` gives a reason.
    """
    reason = why_skipped(optimizer, hyperparameter)
    if reason is not None:
        raise ValueError(
            f"there must be a case of {hyperparameter} for {optimizer}, but there is none: {reason}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _trained(optimizer, hyperparameter, steps, seed)


def _trained(optimizer_name: str, name: str, steps: int, seed: int) -> Case:
    kind = KINDS[name]
    space = Space({name: kind.spec}, dtype=torch.float64)
    sizes = ((FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES))
    model = nn.ModuleList(nn.Linear(*size) for size in sizes).double()
    everything: Tensors = dict(model.named_parameters())
    teacher = nn.Linear(FEATURES, CLASSES).double()
    x_train, x_valid = torch.randn(2, EXAMPLES, FEATURES, dtype=torch.float64)
    y_train, y_valid = (teacher(x).argmax(1) for x in (x_train, x_valid))
    optimizer = OPTIMIZERS[optimizer_name](list(everything.values()))
    weights = trained_parameters(model, optimizer)
    rule = rule_for(optimizer)
    options = read_options(optimizer.param_groups[0])
    for _ in range(steps):
        optimizer.zero_grad()
        kind.loss(space[name], Batch(everything, x_train, y_train)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    def train_loss(params: Tensors, hparams: Tensors) -> Tensor:
        with torch.random.fork_rng(devices=[]), space.seeing(space.values(hparams)):
            torch.default_generator.manual_seed(seed)  # `torch.manual_seed` goes through every device
            return kind.loss(space[name], Batch({**everything, **params}, x_train, y_train))

    def valid_loss(params: Tensors) -> Tensor:
        return Batch({**everything, **params}, x_valid, y_valid).loss()

    def updates(hparams: Tensors) -> dict[str, Update]:
        tuned = {} if kind.option is None else {kind.option: space.values(hparams)[name]}
        return {weight: Update(rule, {**options, **tuned}) for weight in weights}

    return Case(
        optimizer_name,
        name,
        Problem(train_loss, valid_loss, updates),
        detach(weights),
        detach(space.raws),
        {weight: optimizer.state.get(p, {}) for weight, p in weights.items()},
    )
