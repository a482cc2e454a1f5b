"""Everything in a training process that a hyper-step must leave as it was, and a loop that has all of it."""

import hashlib
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from loops import Still
from torch import Tensor, nn
from torch.nn import functional as F

import midflight as mf

STEPS = 4
"""Of a run; the tuner makes a hyper-step at each from the second on."""


class Own(nn.Module):
    """A layer with all that a layer may keep: attributes, a generator, containers, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.last, self.history = 0, None, ()
        self.generator = np.random.default_rng(5)
        self.torch_generator = torch.Generator().manual_seed(5)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.history = (*self.history, self.calls)
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.last = x.detach()
            x = x + 0.01 * self.generator.random() + 0.01 * torch.rand(1, generator=self.torch_generator)
        return x * (1 + 0.001 * self.calls)


class World:
    """A loop with BatchNorm, dropout, a frozen layer, a layer in eval mode, momentum, and numbers drawn
    everywhere."""

    def __init__(
        self, tuned: bool, wrap: Callable[[str, Any], Any] = lambda name, f: f, **arguments: Any
    ) -> None:
        """`wrap(name, function)` may replace each function that is the user's."""
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        noise, decay = mf.Float(0, 1, init=0.3), mf.Float(1e-3, 1, log=True, init=1e-2)
        self.space = mf.Space(noise=noise, weight_decay=decay, lr=mf.Float(1e-3, 1, log=True, init=0.1))
        self.model = nn.Sequential(
            mf.nn.GaussianNoise(self.space["noise"]), nn.Linear(4, 6), nn.BatchNorm1d(6), Own(), nn.Tanh(),
            nn.Dropout(0.2), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3),
        )  # fmt: skip
        self.model[6].requires_grad_(False)
        self.model[7].eval()
        self.calls_of_hook = 0
        self.model[1].register_forward_hook(self._hook)
        weights = [p for p in self.model.parameters() if p.requires_grad]
        options = {name: float(self.space[name]) for name in ("lr", "weight_decay")}  # rounded to float32
        self.optimizer = torch.optim.SGD(weights, momentum=0.9, **options)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, 0.5)
        generator = torch.Generator().manual_seed(1)
        self.batches = [
            (torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator))
            for _ in range(3)
        ]
        self.stage = "begun"
        self.taken = 0
        self.tuner: mf.Tuner | None = None
        if tuned:
            valid = arguments.pop("valid_loader", list(self.batches))
            callback = wrap("on_hyperstep", lambda steps, log: None)
            self.tuner = mf.Tuner(
                self.model, self.optimizer, self.space, wrap("loss_fn", loss_fn), self.batches, valid,
                valid_loss_fn=wrap("valid_loss_fn", valid_loss_fn), on_hyperstep=callback,
                **{"schedule": 1, "hyper_optimizer": Still, **arguments},
            )  # fmt: skip

    def _hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.calls_of_hook += module.training

    def run(self, steps: int) -> "World":
        for _ in range(steps):
            self.step()
        return self

    def step(self) -> None:
        self.forward_and_backward()
        self.optimizer.step()
        self.after_step()

    def forward_and_backward(self) -> None:
        batch = self.batches[self.taken % 3]
        self.optimizer.zero_grad()
        (loss_fn(self.model, batch) * (1 + 0 * (np.random.rand() + random.random()))).backward()

    def after_step(self) -> None:
        self.scheduler.step()
        self.taken += 1

    def state(self) -> dict[str, str]:
        """Name -> a fingerprint of it."""
        own, options = self.model[3], self.optimizer.state_dict()["param_groups"]
        modules = list(self.model.modules())
        found: dict[str, Any] = {
            "modes": [m.training for m in modules],
            "requires_grad": [p.requires_grad for p in self.model.parameters()],
            "hooks of layers": [_theirs(m._forward_hooks) + _theirs(m._forward_pre_hooks) for m in modules],
            "attributes": [own.calls, own.history, own.last, sorted(vars(own))],
            "generators of layers": [own.generator.bit_generator.state, own.torch_generator.get_state()],
            "grad mode": torch.is_grad_enabled(),
            "autocast cache": torch.is_autocast_cache_enabled(),
            "cuDNN": torch.backends.cudnn.enabled,
            "default dtype": torch.get_default_dtype(),
            "handlers": [repr(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGALRM, signal.SIGUSR1)],
            "options": options,
            "raw coordinates": [(r.detach(), r.requires_grad, r.grad) for r in self.space.raws.values()],
            "grad": [p.grad for p in self.model.parameters()],
            "random numbers of torch": torch.get_rng_state(),
            "random numbers of numpy": np.random.get_state(legacy=True),
            "random numbers of Python": random.getstate(),
        }  # fmt: skip
        found |= {f"weight {name}": p for name, p in self.model.named_parameters()}
        found |= {f"buffer {name}": b for name, b in self.model.named_buffers()}
        found |= {
            f"momentum {n}": self.optimizer.state.get(p, {}).get("momentum_buffer")
            for n, p in enumerate(self.model.parameters())
        }
        return {name: fingerprint(part) for name, part in found.items()}


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """Another loop may be run within the block."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    yield
    for restore, state in zip(
        (torch.set_rng_state, np.random.set_state, random.setstate), states, strict=True
    ):
        restore(state)


def _theirs(hooks: Any) -> list[str]:
    return [_name(hook) for hook in (hooks or {}).values() if not _is_ours(hook)]


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _is_ours(hook: Any) -> bool:
    return hook.__module__.startswith("midflight") or "midflight" in _name(hook)


def hooks_of_the_tuner(world: World) -> list[str]:
    """Those that hang on layers, weights or the optimiser now."""
    layers = [h for m in world.model.modules() for h in (m._forward_hooks, m._forward_pre_hooks)]
    weights = [p._post_accumulate_grad_hooks for p in world.model.parameters()]
    steps = [world.optimizer._optimizer_step_pre_hooks, world.optimizer._optimizer_step_post_hooks]
    found = [*layers, *weights, *steps, world.optimizer._optimizer_state_dict_pre_hooks]
    return [_name(hook) for hooks in found for hook in (hooks or {}).values() if _is_ours(hook)]


def loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def valid_loss_fn(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) + 0.0


def fingerprint(part: Any) -> str:
    if isinstance(part, Tensor):
        return hashlib.sha1(part.detach().numpy().tobytes()).hexdigest()
    if isinstance(part, np.ndarray):
        return hashlib.sha1(part.tobytes()).hexdigest()
    if isinstance(part, dict):
        return repr({key: fingerprint(value) for key, value in part.items()})
    return repr([fingerprint(x) for x in part]) if isinstance(part, list | tuple) else repr(part)


def differences(a: dict[str, str], b: dict[str, str], but: tuple[str, ...] = ()) -> list[str]:
    """Names of what differs."""
    return [name for name in a if a[name] != b[name] and not name.startswith(but or ("-",))]
