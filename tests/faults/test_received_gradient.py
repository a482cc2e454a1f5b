"""What loops do to the gradient between `backward` and `step`: the tuner takes the derivative of the whole
step."""

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loops import EXACT, Loop, data, found, noisy_loop, nothing, take_step, truth
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import midflight as mf

pytestmark = pytest.mark.usefixtures("double")

WEIGHT_DECAY = {"weight_decay": mf.Float(1e-4, 1e-1, log=True, init=1e-2)}
OPTIMIZERS = [torch.optim.SGD, torch.optim.Adam]


def weights(loop: Loop) -> list[Tensor]:
    return list(loop.model.parameters())


def clip(loop: Loop, norm: float = 0.1) -> None:
    clip_grad_norm_(weights(loop), norm)


def multiply(loop: Loop, factor: float) -> None:
    for p in weights(loop):
        p.grad *= factor


# --- what can be told ---------------------------------------------------------------------------------------


def clip_some(loop: Loop) -> None:
    clip_grad_norm_(weights(loop)[:2], 0.05)


def clip_each(loop: Loop) -> None:
    for p in weights(loop):
        clip_grad_norm_([p], 0.03)


def clip_halves(loop: Loop, second: float) -> None:
    clip_grad_norm_(weights(loop)[:2], 0.05)
    clip_grad_norm_(weights(loop)[2:], second)


def normalise(loop: Loop) -> None:
    norm = torch.stack([p.grad.norm() for p in weights(loop)]).norm()
    multiply(loop, 1 / norm)


def scale_layers(loop: Loop) -> None:
    for i, p in enumerate(weights(loop)):
        p.grad *= 0.5**i


def scale_and_clip(loop: Loop) -> None:
    multiply(loop, 2)
    clip(loop)


def clip_and_scale(loop: Loop) -> None:
    clip(loop)
    multiply(loop, 2)


def zero_a_layer(loop: Loop) -> None:
    weights(loop)[0].grad.zero_()


def drop_a_layer(loop: Loop) -> None:
    weights(loop)[0].grad = None


def copy_gradients(loop: Loop) -> None:
    for p in weights(loop):
        p.grad = p.grad.clone()
    clip(loop)


KNOWN: dict[str, Callable[[Loop], None]] = {
    "nothing": nothing,
    "clipped by norm": clip,
    "a norm that is never reached": partial(clip, norm=100.0),
    "clipped by value": lambda loop: clip_grad_value_(weights(loop), 0.05),
    "some weights clipped": clip_some,
    "each weight clipped alone": clip_each,
    "two halves clipped apart": partial(clip_halves, second=0.07),
    "two halves clipped to one norm": partial(clip_halves, second=0.05),
    "normalised": normalise,
    "tripled": partial(multiply, factor=3.0),
    "halved": partial(multiply, factor=0.5),
    "each layer by its own factor": scale_layers,
    "scaled and clipped": scale_and_clip,
    "clipped and scaled": clip_and_scale,
    "a layer's set to zero": zero_a_layer,
    "a layer's taken away": drop_a_layer,
    "copied and clipped": copy_gradients,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KNOWN)
def test_the_hypergradient_is_that_of_the_gradient_which_the_optimiser_gets(kind, optimizer):
    build = partial(noisy_loop, optimizer, KNOWN[kind], **WEIGHT_DECAY)
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_norm_that_the_user_names_is_right_from_the_first_hyperstep(momentum):
    build = partial(noisy_loop, between=clip, options={"momentum": momentum})
    assert found(build, steps=1, max_grad_norm=0.1) == pytest.approx(truth(build, steps=1), rel=EXACT)


def test_clipping_is_seen_with_momentum_that_has_built_up():
    build = partial(noisy_loop, between=clip, options={"momentum": 0.9})
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad])
def test_clipping_is_seen_under_other_optimisers_too(optimizer):
    build = partial(noisy_loop, optimizer, clip, lr=mf.Float(1e-4, 1, log=True, init=0.01))
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


# --- what cannot be told ------------------------------------------------------------------------------------


def centre(loop: Loop) -> None:
    for p in weights(loop):
        if p.ndim > 1:
            p.grad -= p.grad.mean(1, keepdim=True)


def signs(loop: Loop) -> None:
    for p in weights(loop):
        p.grad.sign_()


def noise(loop: Loop) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in weights(loop):
        p.grad += 0.01 * torch.randn(p.shape, generator=generator)


def decay(loop: Loop) -> None:
    for p in weights(loop):
        p.grad += 0.1 * p.detach()


def mask(loop: Loop) -> None:
    weights(loop)[0].grad[0] = 0


def mask_last(loop: Loop) -> None:
    weights(loop)[0].grad[-1] = 0  # not among the entries that are compared one by one


def mask_largest(loop: Loop) -> None:
    grad = weights(loop)[0].grad
    grad.view(-1)[grad.abs().argmax()] = 0


def clip_to_the_weights(loop: Loop) -> None:
    for p in weights(loop):
        p.grad *= min(1.0, float(0.01 * p.detach().norm() / p.grad.norm()))


UNKNOWN: dict[str, Callable[[Loop], None]] = {
    "clipped by the largest entry": lambda loop: clip_grad_norm_(weights(loop), 0.02, math.inf),
    "centred": centre,
    "signs": signs,
    "noise added": noise,
    "weight decay added by hand": decay,
    "the first row masked": mask,
    "the last row masked": mask_last,
    "the largest entry masked": mask_largest,
    "clipped to a share of the weights": clip_to_the_weights,
    "turned round": partial(multiply, factor=-1.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", UNKNOWN)
def test_what_cannot_be_told_is_refused_in_a_sentence(kind, optimizer):
    torch.manual_seed(0)
    loop = noisy_loop(optimizer, UNKNOWN[kind]).attach()
    with pytest.raises(mf.errors.UnknownGradient, match="between backward and step"):
        loop.run(12)
    assert loop.tuner.log()["undecided"] == 10
    assert not loop.tuner.hyper_optimizer.given  # and nothing has moved by a wrong one


def test_options_of_the_optimiser_can_be_tuned_whatever_happens_to_the_gradient():
    build = partial(noisy_loop, torch.optim.Adam, centre, **WEIGHT_DECAY)

    def options_only() -> Loop:
        loop = build()
        loop.space = mf.Space(**WEIGHT_DECAY)
        loop.loss_fn = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loop

    assert found(options_only) == pytest.approx(truth(options_only), rel=EXACT)


# --- kinds of steps -----------------------------------------------------------------------------------------


def halves(batch: Any) -> list[Any]:
    return [tuple(t[:6] for t in batch), tuple(t[6:] for t in batch)]


def accumulate(loop: Loop, batch: Any, each: float = 0.5, after: float = 1.0, norm: float = 0.0) -> None:
    loop.optimizer.zero_grad()
    for part in halves(batch):
        (each * loop.loss_fn(loop.model, part)).backward()
    if after != 1:
        multiply(loop, after)
    if norm:
        clip(loop, norm)
    loop.optimizer.step()


def with_closure(loop: Loop, batch: Any, by_name: bool = False, norm: float = 0.0) -> None:
    def closure() -> Tensor:
        loop.optimizer.zero_grad()
        loss = loop.loss_fn(loop.model, batch)
        loss.backward()
        if norm:
            clip(loop, norm)
        return loss

    loop.optimizer.step(closure=closure) if by_name else loop.optimizer.step(closure)


def in_two_backwards(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    loss = loop.loss_fn(loop.model, batch)
    (0.3 * loss).backward(retain_graph=True)
    (0.7 * loss).backward()
    loop.optimizer.step()


def written_by_hand(loop: Loop, batch: Any) -> None:
    grads = torch.autograd.grad(loop.loss_fn(loop.model, batch), weights(loop))
    for p, g in zip(weights(loop), grads, strict=True):
        p.grad = g
    loop.between(loop)
    loop.optimizer.step()


def for_each_example(loop: Loop, batch: Any) -> None:
    """As private learning does, with torch.func."""

    class Functional:
        training = True

        def __init__(self, params: dict[str, Tensor]) -> None:
            self.params = params

        def __call__(self, x: Tensor) -> Tensor:
            return functional_call(loop.model, self.params, (x,))

    def loss(params: dict[str, Tensor], *example: Tensor) -> Tensor:
        return loop.loss_fn(Functional(params), tuple(part[None] for part in example))

    params = {name: p.detach() for name, p in loop.model.named_parameters()}
    grads = vmap(grad(loss), (None, 0, 0, 0))(params, *batch)
    for name, p in loop.model.named_parameters():
        p.grad = grads[name].mean(0)
    loop.optimizer.step()


def keep_zeros(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad(set_to_none=False)
    loop.loss_fn(loop.model, batch).backward()
    loop.optimizer.step()


def zero_afterwards(loop: Loop, batch: Any) -> None:
    loop.loss_fn(loop.model, batch).backward()
    loop.optimizer.step()
    loop.model.zero_grad()


def leave_half(loop: Loop, batch: Any) -> None:
    """Half of each gradient stays for the next step."""
    loop.loss_fn(loop.model, batch).backward()
    loop.optimizer.step()
    multiply(loop, 0.5)


def with_scaler(
    loop: Loop, batch: Any, norm: float = 0.0, parts: int = 1, growth: int = 2000, enabled: bool = True
) -> None:
    if not hasattr(loop, "scaler"):
        loop.scaler = torch.amp.GradScaler("cpu", 256.0, growth_interval=growth, enabled=enabled)
    loop.optimizer.zero_grad()
    for part in halves(batch) if parts == 2 else [batch]:
        loop.scaler.scale(loop.loss_fn(loop.model, part) / parts).backward()
    if norm:
        loop.scaler.unscale_(loop.optimizer)
        clip(loop, norm)
    loop.scaler.step(loop.optimizer)
    loop.scaler.update()


def with_hook_before_step(loop: Loop, batch: Any) -> None:
    if not hasattr(loop, "hook"):
        loop.hook = loop.optimizer.register_step_pre_hook(lambda *_: clip(loop))
    take_step(loop, batch)


def with_hooks_on_weights(loop: Loop, batch: Any, change: Callable[[Tensor], Tensor]) -> None:
    if not hasattr(loop, "hooks"):
        loop.hooks = [p.register_hook(change) for p in weights(loop)]
    take_step(loop, batch)


def with_hooks_after_accumulation(loop: Loop, batch: Any) -> None:
    def halve(p: Tensor) -> None:
        p.grad /= 2

    if not hasattr(loop, "hooks"):
        loop.hooks = [p.register_post_accumulate_grad_hook(halve) for p in weights(loop)]
    take_step(loop, batch)


STEPS: dict[str, Callable[[Loop, Any], None]] = {
    "accumulated as a mean": accumulate,
    "accumulated, then divided": partial(accumulate, each=1.0, after=0.5),
    "accumulated and clipped": partial(accumulate, norm=0.1),
    "closure": with_closure,
    "closure by name that clips": partial(with_closure, by_name=True, norm=0.1),
    "two backward passes": in_two_backwards,
    "zeros kept": keep_zeros,
    "zeroed afterwards": zero_afterwards,
    "part of the last gradient": leave_half,
    "scaler": with_scaler,
    "scaler and clipping": partial(with_scaler, norm=0.1),
    "scaler, accumulation and clipping": partial(with_scaler, norm=0.1, parts=2, growth=2),
    "scaler that grows each time": partial(with_scaler, growth=1),
    "scaler switched off": partial(with_scaler, enabled=False),
    "clipped in a hook of the step": with_hook_before_step,
    "tripled by hooks on weights": partial(with_hooks_on_weights, change=lambda g: 3 * g),
    "clipped by hooks on weights": partial(with_hooks_on_weights, change=lambda g: g.clamp(-0.02, 0.02)),
    "masked by hooks on weights": partial(with_hooks_on_weights, change=lambda g: g * (g > 0)),
    "halved by hooks after accumulation": with_hooks_after_accumulation,
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", STEPS)
def test_the_hypergradient_is_that_of_the_step_however_it_is_taken(kind, optimizer):
    build = partial(noisy_loop, optimizer, step=STEPS[kind], **WEIGHT_DECAY)
    assert found(build, steps=5) == pytest.approx(truth(build, steps=5), rel=EXACT)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("step", [written_by_hand, for_each_example])
def test_a_gradient_that_is_written_by_hand_is_right_if_the_user_says_that_nothing_is_done_to_it(
    step, optimizer
):
    build = partial(noisy_loop, optimizer, step=step, **WEIGHT_DECAY)
    assert found(build, steps=5, max_grad_norm=math.inf) == pytest.approx(truth(build, steps=5), rel=EXACT)


def cut_off(loop: Loop) -> None:
    for p in weights(loop):
        p.grad.clamp_(-0.02, 0.02)


def bend(loop: Loop) -> None:
    for p in weights(loop):
        p.grad /= p.grad.norm() + 0.01


def one_by_hand(loop: Loop, batch: Any) -> None:
    """The gradients of all weights but one come from `backward`."""
    first, *others = weights(loop)
    loop.optimizer.zero_grad()
    loss = loop.loss_fn(loop.model, batch)
    first.grad = torch.autograd.grad(loss, first, retain_graph=True)[0].clamp(-0.02, 0.02)
    loss.backward(inputs=others)
    loop.optimizer.step()


@pytest.mark.parametrize(
    ("between", "step"),
    [(nothing, written_by_hand), (clip, written_by_hand), (cut_off, written_by_hand), (bend, written_by_hand),
     (nothing, for_each_example), (nothing, one_by_hand)],
)  # fmt: skip
def test_a_gradient_that_is_written_by_hand_is_refused_in_a_sentence(between, step):
    loop = noisy_loop(between=between, step=step).attach()
    with pytest.raises(mf.errors.UnknownGradient, match="must come from backward"):
        loop.run(12)
    assert not loop.tuner.hyper_optimizer.given


def sharpness_aware(loop: Loop, batch: Any) -> None:
    """The gradient is of the weights a little uphill (Foret et al. 2021)."""
    loop.optimizer.zero_grad()
    loop.loss_fn(loop.model, batch).backward()
    uphill = [0.3 * p.grad / p.grad.norm() for p in weights(loop)]
    with torch.no_grad():
        for p, e in zip(weights(loop), uphill, strict=True):
            p.add_(e)
    loop.optimizer.zero_grad()
    loop.loss_fn(loop.model, batch).backward()
    with torch.no_grad():
        for p, e in zip(weights(loop), uphill, strict=True):
            p.sub_(e)
    loop.optimizer.step()


@torch.no_grad()
def decay_by_hand(loop: Loop) -> None:
    for p in weights(loop):
        p.mul_(0.99)


def decay_by_data(loop: Loop) -> None:
    """`.data` leaves no trace in the version of a tensor."""
    for p in weights(loop):
        p.data.mul_(0.99)


def sharpness_aware_by_data(loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    loop.loss_fn(loop.model, batch).backward()
    before = [p.data.clone() for p in weights(loop)]
    for p in weights(loop):
        p.data.add_(0.3 * p.grad / p.grad.norm())
    loop.optimizer.zero_grad()
    loop.loss_fn(loop.model, batch).backward()
    for p, old in zip(weights(loop), before, strict=True):
        p.data = old
    loop.optimizer.step()


@pytest.mark.parametrize(
    ("between", "step"),
    [(nothing, sharpness_aware), (decay_by_hand, take_step), (nothing, sharpness_aware_by_data),
     (decay_by_data, take_step)],
)  # fmt: skip
def test_weights_that_move_between_backward_and_step_are_refused_in_a_sentence(between, step):
    loop = noisy_loop(between=between, step=step).attach()
    with pytest.raises(mf.errors.UnknownGradient, match="weights must stand still between backward and step"):
        loop.run(12)
    assert not loop.tuner.hyper_optimizer.given


def in_each_pass(do: Callable[[Loop], Any], loop: Loop, batch: Any) -> None:
    loop.optimizer.zero_grad()
    for part in halves(batch):
        (loop.loss_fn(loop.model, part) / 2).backward()
        do(loop)
    loop.optimizer.step()


@torch.no_grad()
def clamp_weights(loop: Loop) -> None:
    for p in weights(loop):
        p.clamp_(-0.05, 0.05)


def normalise_rows(loop: Loop) -> None:
    first = weights(loop)[0]
    first.data /= first.data.norm(dim=1, keepdim=True)


def look_at_an_average(loop: Loop) -> None:
    for p in weights(loop):
        own, p.data = p.data, p.data.lerp(torch.zeros_like(p), 0.5)
        p.data = own * 3 / 3  # put back up to rounding


def and_then(after: Callable[[Loop], None], loop: Loop, batch: Any) -> None:
    take_step(loop, batch)
    after(loop)


@pytest.mark.parametrize("after", [clamp_weights, normalise_rows])
def test_weights_that_are_changed_after_a_step_are_said_once(after):
    with pytest.warns(UserWarning, match="changed between two optimiser steps") as said:
        found(partial(noisy_loop, step=partial(and_then, after)), steps=6)
    assert len([w for w in said if w.category is UserWarning]) == 1  # torch says that parts of it are old


def test_weights_that_are_exchanged_and_put_back_are_no_change():
    found(partial(noisy_loop, step=partial(and_then, look_at_an_average)), steps=6)


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.05}])
@pytest.mark.parametrize("do", [clip, cut_off])
def test_gradients_that_change_between_two_passes_are_refused_in_a_sentence(do, options):
    loop = noisy_loop(step=partial(in_each_pass, do)).attach(**options)
    with pytest.raises(mf.errors.UnknownGradient, match="between the passes that are accumulated"):
        loop.run(20)
    assert not loop.tuner.hyper_optimizer.given


def accumulate_after_a_step_left_out(loop: Loop, batch: Any) -> None:
    """The passes of a bad batch do not count."""
    loop.optimizer.zero_grad()
    for part in halves(batch):
        loop.loss_fn(loop.model, part).backward()
    clip_now_and_then(loop, batch)


def test_the_passes_of_a_step_that_was_left_out_do_not_count():
    build = partial(noisy_loop, step=accumulate_after_a_step_left_out, **WEIGHT_DECAY)
    assert found(build, steps=5) == pytest.approx(truth(build, steps=5), rel=EXACT)


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x).tanh()
        return self.first(hidden), self.second(hidden)


def two_tasks() -> Loop:
    """The second task has weight 0, so that its head has the gradient 0, and is clipped with the others."""
    space = mf.Space(a=mf.Float(0, 1, init=0.0))

    def loss(a: Any, model: nn.Module, batch: Any) -> Tensor:
        first, second = model(batch[0])
        return nn.functional.cross_entropy(first, batch[1]) + a * nn.functional.cross_entropy(
            second, (batch[1] + 1) % 3
        )

    model = TwoHeads().double()
    return Loop(
        model, space, torch.optim.SGD(model.parameters(), lr=0.1), partial(loss, space["a"]), [data(12, 1)],
        [data(20, 2)], clip, valid_loss_fn=partial(loss, 1.0),
    )  # fmt: skip


def test_weights_whose_gradient_is_zero_are_clipped_with_the_others():
    assert found(two_tasks) == pytest.approx(truth(two_tasks), rel=EXACT)


def clip_by_sum(loop: Loop) -> None:
    nn.utils.clip_grad_norm_(weights(loop), 0.05, norm_type=1)


def test_clipping_by_another_norm_is_not_taken_for_the_2_norm():
    """In steady training the 2-norm of what is clipped by the sum of sizes hardly changes."""
    loop = noisy_loop(between=clip_by_sum).attach()
    with pytest.raises(mf.errors.UnknownGradient):
        loop.run(30)
    assert not loop.tuner.hyper_optimizer.given


def each_steps_at_once(loop: Loop, batch: Any) -> None:
    for optimizer in loop.optimizers:
        optimizer.zero_grad()
        loop.loss_fn(loop.model, batch).backward()
        optimizer.step()


def test_optimisers_that_step_on_gradients_of_their_own_are_refused_in_a_sentence():
    loop = two_optimisers()
    loop.between, loop.step = nothing, each_steps_at_once
    with pytest.raises(mf.errors.UnknownGradient, match="before the first optimiser"):
        loop.attach().run(20)


def clip_now_and_then(loop: Loop, batch: Any) -> None:
    """Summed up, divided, and clipped to a norm that is not always reached."""
    loop.count = getattr(loop, "count", 0) + 1
    accumulate(loop, batch, each=1.0, after=0.5, norm=100.0 if loop.count == 2 else 0.05)


def test_a_sum_that_is_divided_and_clipped_is_right_once_it_was_seen_without_a_clip():
    build = partial(noisy_loop, step=clip_now_and_then, **WEIGHT_DECAY)
    assert found(build, steps=5, max_grad_norm=0.05) == pytest.approx(truth(build, steps=5), rel=EXACT)


def clip_by_half_once(loop: Loop, batch: Any) -> None:
    """Averaged by the losses; once the clip happens to divide by the number of passes."""
    loop.count = getattr(loop, "count", 0) + 1
    each = 0.5
    if loop.count == 2:
        grads = torch.autograd.grad(loop.loss_fn(loop.model, batch), weights(loop))
        each *= 2 * 0.05 / float(torch.cat([g.flatten() for g in grads]).norm())
    accumulate(loop, batch, each=each, norm=0.05)


def test_a_clip_that_happens_to_divide_by_the_passes_is_no_division():
    build = partial(noisy_loop, step=clip_by_half_once, **WEIGHT_DECAY)
    assert found(build, steps=5, max_grad_norm=0.05) == pytest.approx(truth(build, steps=5), rel=EXACT)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_model_is_copied_and_saved_at_any_moment(copied):
    loop = noisy_loop().attach().run(1)
    x = loop.train[0][0]
    loop.loss_fn(loop.model, loop.train[0]).backward()
    other = copied(loop.model)
    assert torch.equal(other(x), loop.model(x))


def own_scale(loop: Loop, batch: Any, scale: float = 1024.0, norm: float = 0.0) -> None:
    loop.optimizer.zero_grad()
    (scale * loop.loss_fn(loop.model, batch)).backward()
    multiply(loop, 1 / scale)
    if norm:
        clip(loop, norm)
    loop.optimizer.step()


SCALED: dict[str, tuple[Callable[[Loop, Any], None], float]] = {
    "accumulated as a sum": (partial(accumulate, each=1.0), 2),
    "accumulated as a sum and clipped": (partial(accumulate, each=1.0, norm=0.1), 2),
    "loss scaled by hand": (own_scale, 1),
}


@pytest.mark.parametrize("kind", SCALED)
def test_where_loop_and_loss_fn_differ_by_a_factor_the_hypergradient_does_too(kind):
    step, factor = SCALED[kind]
    build = partial(noisy_loop, step=step, **WEIGHT_DECAY)
    right = truth(build)
    assert found(build) == pytest.approx({**right, "noise": right["noise"] / factor}, rel=EXACT)


def test_a_hook_of_the_user_that_clips_may_come_after_the_tuner():
    def build() -> Loop:
        loop = noisy_loop(**WEIGHT_DECAY)
        loop.arguments = {"max_grad_norm": 0.1}
        return loop

    torch.manual_seed(0)
    loop = build().attach()
    loop.optimizer.register_step_pre_hook(lambda *_: clip(loop))
    loop.run(1)
    assert loop.tuner.hyper_optimizer.given == []  # what the clipping will do is not known yet
    loop.run(3)

    def clipping() -> Loop:
        other = build()
        other.between = clip
        return other

    assert loop.hypergradients() == pytest.approx(truth(clipping, steps=4), rel=EXACT)


def test_a_loss_scaled_by_hand_and_clipped_is_refused_in_a_sentence():
    with pytest.raises(mf.errors.UnknownGradient, match=r"[0-9]+ times as long as that of loss_fn"):
        found(partial(noisy_loop, step=partial(own_scale, norm=0.1)), steps=30)


def test_a_gradient_unscaled_by_a_scaler_that_does_not_call_the_optimiser_is_right():
    """Adam and its weight decay mix both gradients: one of them at the scale of the other would be seen."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def step(loop: Loop, batch: Any) -> None:
        loop.optimizer.zero_grad()
        scaler.scale(loop.loss_fn(loop.model, batch)).backward()
        scaler.unscale_(loop.optimizer)
        scaler._per_optimizer_states.clear()
        loop.optimizer.step()

    build = partial(noisy_loop, torch.optim.Adam, step=step, **WEIGHT_DECAY)
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def test_a_sum_over_accumulated_batches_is_right_if_loss_fn_says_so():
    def build() -> Loop:
        loop = noisy_loop(**WEIGHT_DECAY)
        mean, loop.loss_fn = loop.loss_fn, lambda model, batch: 2 * mean(model, batch)
        loop.valid_loss_fn = mean
        loop.step = partial(accumulate, each=0.5, norm=0.1)
        return loop

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def test_a_run_with_a_scaler_is_the_run_without():
    """A power of two scales without rounding."""

    def run(step: Callable[[Loop, Any], None]) -> tuple[list[Tensor], dict[str, Any]]:
        torch.manual_seed(0)
        loop = (
            noisy_loop(step=step, **WEIGHT_DECAY).attach(hyper_optimizer=mf.SignSteps, horizon="run").run(30)
        )
        assert loop.tuner.log()["hypersteps"] == 30
        return [p.detach() for p in weights(loop)], loop.space.as_dict()

    (plain, values), (scaled, same) = run(take_step), run(with_scaler)
    assert all(map(torch.equal, plain, scaled))
    assert values == same


def test_a_step_that_the_scaler_leaves_out_moves_nothing():
    def overflow(loop: Loop, batch: Any) -> None:
        loop.overflows = getattr(loop, "overflows", 0) + 1
        if loop.overflows != 3:
            return with_scaler(loop, batch)
        loop.optimizer.zero_grad()
        loop.scaler.scale(loop.loss_fn(loop.model, batch) * math.inf).backward()
        loop.scaler.step(loop.optimizer)
        loop.scaler.update()

    build = partial(noisy_loop, step=overflow, **WEIGHT_DECAY)
    loop = build().attach().run(5)
    assert loop.tuner.steps == 4
    assert len(loop.tuner.hyper_optimizer.given) == 4
    assert found(build, steps=5) == pytest.approx(truth(build, steps=5), rel=EXACT)


def test_autocast_around_the_whole_step_gives_what_it_gives_without_a_cache():
    """The cache of casts goes by the weights' identity, and they hold other values for a while."""

    def step(loop: Loop, batch: Any, cached: bool) -> None:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cached):
            loop.optimizer.zero_grad()
            loop.loss_fn(loop.model, batch).backward()
            loop.optimizer.step()

    torch.set_default_dtype(torch.float32)

    def build(cached: bool) -> Loop:
        loop = noisy_loop(step=partial(step, cached=cached), lr=mf.Float(0.01, 10, log=True, init=1.0))
        loop.train, loop.valid = ([tuple(t.float() if t.is_floating_point() else t for t in b) for b in bs]
                                  for bs in (loop.train, loop.valid))  # fmt: skip
        return loop

    assert found(lambda: build(True)) == found(lambda: build(False))


# --- groups, schedules, several optimisers ------------------------------------------------------------------


def grouped(decays: list[float], space: mf.Float, **options: Any) -> Loop:
    loop = noisy_loop(torch.optim.SGD, options=options, weight_decay=space)
    w = weights(loop)
    groups = [{"params": w[i : i + 1], "weight_decay": d} for i, d in enumerate(decays)]
    loop.optimizer = torch.optim.SGD(
        [*groups, {"params": w[len(decays) :], "weight_decay": decays[-1]}], lr=0.1
    )
    return loop


@pytest.mark.parametrize("bind", [None, ["weight_decay"]])
def test_a_group_without_decay_is_left_alone(bind):
    build = partial(grouped, [0.1, 0.0, 0.1, 0.0], mf.Float(1e-3, 1, log=True, init=0.1))
    assert found(build, bind=bind) == pytest.approx(truth(build), rel=EXACT)
    loop = build().attach(hyper_optimizer=mf.SignSteps, bind=bind).run(6)
    seen = []
    loop.optimizer.register_step_pre_hook(
        lambda o, *_: seen.extend(g["weight_decay"] for g in o.param_groups)
    )
    loop.run(2)
    tuned, standing = {seen[0], seen[2]}, {seen[1], seen[3], seen[4]}
    assert standing == {0.0}
    assert len(tuned) == 1
    assert tuned != {0.1}
    assert [g["weight_decay"] for g in loop.optimizer.param_groups] == [0.1, 0.0, 0.1, 0.0, 0.0]


def test_groups_keep_the_ratio_of_their_options():
    def build() -> Loop:
        loop = grouped([0.1, 0.02], mf.Float(1e-3, 1, log=True, init=0.1))

        def options(loop: Loop) -> None:
            for group, share in zip(loop.optimizer.param_groups, (1, 0.2, 0.2), strict=True):
                group["weight_decay"] = share * float(loop.space["weight_decay"])

        loop.options = options
        return loop

    assert found(build) == pytest.approx(truth(build), rel=EXACT)


def scheduled(make: Callable[[torch.optim.Optimizer], Any], before: bool = True) -> Loop:
    """A loop whose scheduler is made before the tuner or after it."""
    loop = noisy_loop(torch.optim.SGD, lr=mf.Float(1e-3, 10, log=True, init=0.1))
    base = loop.optimizer.param_groups[0]["lr"]

    def step(loop: Loop, batch: Any) -> None:
        if not hasattr(loop, "scheduler"):
            loop.scheduler = make(loop.optimizer)
        take_step(loop, batch)
        loop.scheduler.step()

    if before:
        loop.scheduler = make(loop.optimizer)

    def options(loop: Loop) -> None:
        """lr x factor, where the factor is what an untouched scheduler says over the first lr."""
        if not hasattr(loop, "scheduler"):
            return
        ratio = float(loop.space["lr"]) / base
        loop.scheduler.base_lrs = [ratio * base]
        for group in loop.optimizer.param_groups:
            factor = group["lr"] / getattr(loop, "last_ratio", 1.0)
            group["lr"] = ratio * factor
            loop.last_ratio = ratio

    loop.step, loop.options = step, options
    return loop


SCHEDULES: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 6),
    "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: min(1.0, (n + 1) / 3)),
    "steps": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_tuned_learning_rate_is_multiplied_by_the_scheduler_factor(kind, before):
    build = partial(scheduled, SCHEDULES[kind], before)
    assert found(build) == pytest.approx(truth(build), rel=EXACT)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_scheduler_reads_its_own_numbers(kind):
    """Chainable schedulers multiply what they find in the groups."""

    def rates(tuned: bool) -> tuple[list[float], list[float]]:
        """What the scheduler says after each step, and what the weights were moved by."""
        loop = scheduled(SCHEDULES[kind])
        if tuned:
            loop.attach(hyper_optimizer=mf.SignSteps)
        told, used, bias = [], [], weights(loop)[-1]
        for _ in range(6):
            before = bias.detach().clone()
            loop.run(1)
            used.append(float((before - bias.detach())[0] / bias.grad[0]))
            told.append(loop.optimizer.param_groups[0]["lr"])
        return told, used

    untouched, untouched_used = rates(False)
    told, used = rates(True)
    assert told == untouched
    assert used[0] == pytest.approx(untouched_used[0])
    assert used[3] != pytest.approx(untouched_used[3])


def two_optimisers() -> Loop:
    loop = noisy_loop()
    layers = [loop.model[0], loop.model[2]]
    loop.optimizer = [
        torch.optim.SGD(layers[0].parameters(), lr=0.1, momentum=0.9),
        torch.optim.Adam(layers[1].parameters(), lr=0.05),
    ]
    loop.between = clip
    return loop


def alternating() -> Loop:
    loop, taken = two_optimisers(), [0]

    def step(loop: Loop, batch: Any) -> None:
        for optimizer in loop.optimizers:
            optimizer.zero_grad()
        loop.loss_fn(loop.model, batch).backward()
        taken[0] += 1
        loop.optimizers[0].step()
        if taken[0] % 2 == 0:
            loop.optimizers[1].step()

    loop.step = step
    return loop


def test_training_steps_of_all_optimisers_count_and_others_are_said_once():
    with pytest.warns(UserWarning, match="all optimisers must step once") as said:
        assert found(alternating) == pytest.approx(truth(alternating), rel=EXACT)
    assert len(said) == 1


def test_two_optimisers_of_one_model_are_tuned_together():
    assert found(two_optimisers) == pytest.approx(truth(two_optimisers), rel=EXACT)


def test_an_optimiser_that_the_tuner_is_not_told_of_is_said_once():
    loop = two_optimisers()
    both, loop.optimizer = loop.optimizer, loop.optimizer[0]
    loop.attach()

    def step(loop: Loop, batch: Any) -> None:
        both[1].zero_grad()
        take_step(loop, batch)
        both[1].step()

    loop.step = step
    with pytest.warns(UserWarning, match="pass all optimisers as a list") as said:
        loop.run()
    assert len(said) == 1
    assert said[0].filename.endswith("loops.py")  # the line of the step, not one of midflight or torch


def test_muon_is_refused_for_what_the_loss_reads():
    loop = noisy_loop()
    matrices = [p for p in loop.model.parameters() if p.ndim == 2]
    loop.optimizer = torch.optim.Muon(matrices, lr=0.02)
    with pytest.raises(mf.errors.UnsupportedOptimizer, match="bfloat16"):
        loop.attach()


def test_what_was_learned_of_a_clipping_loop_is_saved_and_loaded_by_torch(tmp_path):
    """`torch.load` takes plain containers only."""
    first = noisy_loop(between=clip).attach().run(4)
    torch.save(first.tuner.state_dict(), tmp_path / "tuner.pt")
    again = noisy_loop(between=clip).attach()
    again.model.load_state_dict(first.model.state_dict())
    again.tuner.load_state_dict(torch.load(tmp_path / "tuner.pt"))
    again.run(1)
    assert len(again.tuner.hyper_optimizer.given) == 1  # it knows the norm at once
