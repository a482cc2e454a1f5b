"""Optimisers that midflight has no rule for: what a package or a user may bring."""

import torch


class Stranger(torch.optim.Optimizer):
    """Calls `update(p, g, state, group)` for each weight."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)


class Belief(Stranger):
    """AdaBelief (Zhuang et al. 2020, Algorithm 2), with a number and a list in its state."""

    def update(self, p, g, state, group):
        if not state:
            state["step"], state["moments"] = 0, [torch.zeros_like(p), torch.zeros_like(p)]
        beta1, beta2 = group["betas"]
        state["step"] += 1
        m, s = state["moments"]
        m.lerp_(g, 1 - beta1)
        s.lerp_((g - m).square(), 1 - beta2).add_(group["eps"])
        m, s = m / (1 - beta1 ** state["step"]), s / (1 - beta2 ** state["step"])
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m / (s.sqrt() + group["eps"]))


class Norm(Stranger):
    """The step has the length lr in each weight, so one entry of a gradient moves all of them."""

    def update(self, p, g, state, group):
        p.sub_(group["lr"] * g / g.norm())


class Joint(Stranger):
    """The step has the length lr in all weights together."""

    def step(self, closure=None):
        every = [p.grad for group in self.param_groups for p in group["params"]]
        self.norm = torch.cat([g.reshape(-1) for g in every]).norm()
        super().step()

    def update(self, p, g, state, group):
        p.data.sub_(group["lr"] * g / self.norm)


class Noisy(Stranger):
    """Langevin dynamics: the step is random."""

    def update(self, p, g, state, group):
        p.sub_(group["lr"] * (g + torch.randn_like(g)))


class Sign(Stranger):
    """Lion (Chen et al. 2023), whose step does not change with the size of the gradient."""

    def update(self, p, g, state, group):
        m = state.setdefault("m", torch.zeros_like(p))
        beta1, beta2 = group["betas"]
        p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * m.lerp(g, 1 - beta1).sign())
        m.lerp_(g, 1 - beta2)


class Late(Stranger):
    """Elementwise in the trial with small weights, but not with weights of 40 entries and more."""

    def update(self, p, g, state, group):
        p.sub_(group["lr"] * (g / g.norm() if g.numel() > 40 else g))


class NeedsClosure(Belief):
    def step(self, closure):
        closure()
        super().step()


class Momentum(Stranger):
    """SGD with momentum, the buffer wherever a subclass puts it; int options, as many packages have them."""

    def __init__(self, params, lr=1, weight_decay=0, momentum=0.9):
        params = list(params)
        torch.optim.Optimizer.__init__(
            self, params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        )
        self.buffers = {}

    def update(self, p, g, state, group):
        buffer = self.buffer(p, state)
        buffer.mul_(group["momentum"]).add_(g + group["weight_decay"] * p)
        p.sub_(group["lr"] * buffer)

    def buffer(self, p, state):
        return state.setdefault("buffer", torch.zeros_like(p))


class OnSelf(Momentum):
    def buffer(self, p, state):
        return self.buffers.setdefault(p, torch.zeros_like(p))


class UnderAnotherKey(Momentum):
    def buffer(self, p, state):
        return self.state["all"].setdefault(tuple(p.shape), torch.zeros_like(p))


class ByCount(Momentum):
    """The length of the step depends on how many weights the group has."""

    def update(self, p, g, state, group):
        p.sub_(group["lr"] / len(group["params"]) * g)


class ByAttribute(Momentum):
    """Layer-wise learning rates, kept as an attribute of each weight."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                p.scale = 2.0

    def update(self, p, g, state, group):
        p.sub_(group["lr"] * getattr(p, "scale", 1.0) * g)


class ClipsLater(Momentum):
    """Clips the norm of each weight's gradient from the fourth step on."""

    def update(self, p, g, state, group):
        state["step"] = state.get("step", 0) + 1
        p.sub_(group["lr"] * (g * 1e-3 / g.norm() if state["step"] > 3 else g))


class Wraps(Momentum):
    def __init__(self, params, **options):
        params = list(params)
        super().__init__(params, **options)
        self.base = torch.optim.AdamW(params, lr=options["lr"])

    def step(self, closure=None):
        return self.base.step(closure)


class ThreeBetas(Belief):
    """With options of kinds that torch's optimisers do not have."""

    def __init__(self, params, lr=1e-3, weight_decay=0.0):
        super().__init__(params, lr, (0.9, 0.99, 0.5), weight_decay=weight_decay)
        for group in self.param_groups:
            group["several"] = torch.ones(3)

    def update(self, p, g, state, group):
        Belief.update(self, p, g, state, {**group, "betas": group["betas"][:2]})
