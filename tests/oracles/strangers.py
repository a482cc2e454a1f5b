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
