"""Weights of data sources: hypergradients, loaders, and what cannot be a mixture."""

import copy
import math
import pickle
from collections import UserDict

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import midflight as mf
from midflight.errors import SpaceError
from midflight.mixture import Drawn
from midflight.tuner.trajectory import Trajectory
from weighted import Dicts, Keeper, WeightedLoop, mean_loss, per_example

SIZES = (40, 30, 20, 10)


def sources(dtype=torch.float32, sizes=SIZES):
    rng = torch.Generator().manual_seed(0)
    found = []
    for k, size in enumerate(sizes):
        x = torch.randn(size, 6, generator=rng).to(dtype)
        found.append(TensorDataset(x, (x[:, :3] + k * torch.randn(size, 3, generator=rng)).argmax(1)))
    return found


class Loop(WeightedLoop):
    """A loop on one batch of a loader, with AdamW."""

    def __init__(self, by, clip):
        torch.manual_seed(0)
        mixture = mf.Mixture(["a", "b", "c", "d"], init=[4, 3, 2, 1])
        space = mf.Space(mixture=mixture, dtype=torch.float64)
        loader = mixture.loader(sources(torch.float64), 64, by=by, generator=torch.Generator().manual_seed(1))
        batch, t2 = next(iter(loader)), next(iter(DataLoader(sources(torch.float64)[0], 40)))
        super().__init__(mixture, space, batch, t2, torch.optim.AdamW, clip)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("by", ["loss", "sampling"])
def test_hypergradients_of_the_weights_equal_central_differences(by, clip):
    loop = Loop(by, clip)
    tuner = mf.Tuner(
        loop.model, loop.optimizer, loop.space, loop.loss, [loop.batch], [loop.t2], examples=None,
        valid_loss_fn=mean_loss, schedule=1, horizon="step", hyper_optimizer=Keeper, max_grad_norm=clip,
    )  # fmt: skip
    for _ in range(3):
        loop.step()
    before = copy.deepcopy((loop.model, loop.optimizer))
    loop.step()
    tuner.detach()
    truth = loop.true_hypergradients(before).tolist()
    assert tuner.hyper_optimizer.last.tolist() == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("by", ["loss", "sampling"])
def test_the_loss_of_a_batch_has_the_mean_and_slope_of_the_mixed_loss(by):
    mixture = mf.Mixture(4, init=[4, 3, 2, 1])
    mixture.raw.requires_grad_()
    model = nn.Linear(6, 3)
    means = torch.stack([per_example(model, *data.tensors).mean() for data in sources()]).detach()
    right = mixture.value @ means
    slopes = torch.autograd.grad(right, mixture.raw)[0]
    losses = []
    torch.manual_seed(0)
    loader = mixture.loader(sources(), 1000, by=by)
    for _ in range(60):
        (x, y, drawn) = next(iter(loader))
        losses.append(mixture.loss(per_example(model, x, y).detach(), drawn))
    mean = torch.stack(losses).mean()
    found = torch.autograd.grad(mean, mixture.raw)[0]
    assert float(mean.detach()) == pytest.approx(float(right.detach()), rel=0.01)  # 60,000 examples
    assert torch.allclose(found, slopes, atol=0.05 * float(slopes.abs().max()))


@pytest.mark.parametrize(("k", "batch_size"), [(4, 1), (4, 2), (4, 3), (4, 6), (2, 3)])
def test_batches_smaller_than_the_number_of_sources_have_the_mixed_loss_on_average(k, batch_size):
    mixture = mf.Mixture(k, init=range(1, k + 1))
    mixture.raw.requires_grad_()
    of_source = torch.tensor([0.0, 3.0, -1.0, 5.0])[:k]
    torch.manual_seed(0)
    loader = mixture.loader([[0] * 3000] * k, batch_size, by="loss")
    losses = [mixture.loss(of_source[drawn.source], drawn) for _, drawn in loader]
    mean, right = torch.stack(losses).mean(), mixture.value @ of_source
    error = float(torch.stack(losses).std().detach()) / len(losses) ** 0.5
    assert abs(float((mean - right).detach())) < 4 * error
    found, slopes = (torch.autograd.grad(x, mixture.raw)[0] for x in (mean, right))
    assert torch.allclose(found, slopes, atol=0.1 * float(slopes.abs().max()))


def test_a_loader_draws_by_the_weights_of_now():
    mixture = mf.Mixture(["a", "b"], ratio=1e4, floor=0.0)
    mf.Space(mixture=mixture)
    torch.manual_seed(0)
    batches = iter(mixture.loader(sources(sizes=(500, 500)), 200))
    assert float(next(batches)[-1].source.float().mean()) == pytest.approx(0.5, abs=0.15)
    mixture.set([1, 999])
    assert float(next(batches)[-1].source.float().mean()) > 0.95


def test_each_batch_has_a_source_as_often_as_its_probability_says_up_to_one():
    mixture = mf.Mixture(4, init=[4, 3, 2, 1])
    for by, expected in (("loss", [2.5] * 4), ("sampling", [4, 3, 2, 1])):
        for _, _, drawn in mixture.loader(sources(), 10, by=by):
            counts = torch.bincount(drawn.source, minlength=4)
            assert bool(((counts - torch.tensor(expected)).abs() < 1).all())


def test_a_pass_takes_as_many_examples_as_there_are_and_each_source_in_random_order():
    mixture = mf.Mixture(4)
    loader = mixture.loader(sources(), 8, by="loss", generator=torch.Generator().manual_seed(0))
    batches = list(loader)
    assert len(loader) == len(batches) == 12
    of_first = [
        tuple(x.tolist()) for xs, _, d in batches for x, s in zip(xs, d.source, strict=True) if s == 0
    ]
    assert len(of_first) == len(set(of_first)) == 24
    assert of_first != [tuple(x.tolist()) for x in sources()[0].tensors[0][:24]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter([1.0])


def test_a_batch_of_dicts_has_the_sources_under_drawn_also_from_workers():
    mixture = mf.Mixture(2)
    batch = next(iter(mixture.loader([Dicts(), Dicts()], 6, num_workers=1)))
    assert isinstance(batch["drawn"], Drawn)
    assert batch["x"].shape == (6, 1)
    assert float(mixture.loss(torch.ones(6), batch["drawn"])) == pytest.approx(1.0)


def test_a_batch_keeps_its_own_kind_of_mapping():
    mixture = mf.Mixture(2)
    loader = mixture.loader([Dicts(), Dicts()], 6, collate_fn=lambda examples: UserDict(n=len(examples)))
    batch = next(iter(loader))
    assert isinstance(batch, UserDict)
    assert (batch["n"], type(batch["drawn"])) == (6, Drawn)


def test_the_parts_of_a_batch_move_to_a_device_alike():
    mixture = mf.Mixture(["a", "b"])
    parts = [part.to("meta") for part in next(iter(mixture.loader(sources(sizes=(9, 9)), 6)))]
    assert isinstance(parts[-1], Drawn)
    assert {part.device.type for part in (*parts[:-1], *parts[-1])} == {"meta"}
    assert parts[-1].source.dtype == torch.int64


@pytest.mark.parametrize("drawn", [None, torch.zeros(6, dtype=torch.int64)])
def test_a_loss_says_what_drawn_must_be(drawn):
    with pytest.raises(TypeError, match="the part of the batch that `loader` adds"):
        mf.Mixture(2).loss(torch.ones(6), drawn)


def test_a_validation_loss_that_fails_says_that_it_is_one():
    mixture, model = mf.Mixture(["a", "b"]), nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train = [(torch.ones(4, 3), torch.ones(4, 1), Drawn(torch.tensor([0, 1, 0, 1]), torch.full((4,), 0.5)))]

    def loss_fn(model, batch):
        x, y, drawn = batch
        return mixture.loss((model(x) - y).square(), drawn)

    mf.Tuner(model, optimizer, mf.Space(mixture=mixture), loss_fn, train, [train[0][:2]], schedule=1)
    loss_fn(model, train[0]).backward()
    with pytest.raises(ValueError, match="unpack") as caught:
        optimizer.step()
    assert any("pass a valid_loss_fn" in note for note in caught.value.__notes__)


def test_two_names_of_a_space_may_not_share_a_mixture():
    mixture = mf.Mixture(2)
    with pytest.raises(SpaceError, match="a hyperparameter of its own"):
        mf.Space(a=mixture, b=mixture)


def test_workers_that_read_ahead_give_the_chance_with_which_an_example_was_drawn():
    mixture = mf.Mixture(["a", "b"], ratio=1e4, floor=0.0)
    batches = iter(mixture.loader(sources(sizes=(500, 500)), 100, num_workers=1, prefetch_factor=2))
    next(batches)
    mixture.set([1, 999])
    drawn = [next(batches)[-1] for _ in range(4)]
    assert drawn[0].chance.tolist() == pytest.approx([0.5] * 100)
    assert float(drawn[-1].chance.max()) == pytest.approx(0.999)
    of_sources = torch.tensor([3.0, 1.0])[drawn[0].source]
    assert float(mixture.loss(of_sources, drawn[0])) == pytest.approx(
        1.002, rel=1e-3
    )  # by the weights of now


def test_a_collate_function_gets_the_examples_of_the_datasets():
    def collate(examples):
        return {"x": torch.stack([x for x, _ in examples]), "n": len(examples)}

    batch = next(iter(mf.Mixture(4).loader(sources(), 6, collate_fn=collate)))
    assert batch["x"].shape == (6, 6)
    assert batch["n"] == len(batch["drawn"].source) == 6


def test_copies_of_a_mixture_and_of_its_batches_are_equal():
    mixture = mf.Mixture(["a", "b"], init=[3, 1])
    drawn = Drawn(torch.tensor([0, 1]), torch.tensor([0.75, 0.25]))
    for copied in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
        assert copied(mixture).shares() == mixture.shares()
        assert isinstance(copied(drawn), Drawn)
        loss = copied(mixture).loss(torch.tensor([1.0, 3.0]), copied(drawn))
        assert float(loss) == float(mixture.loss(torch.tensor([1.0, 3.0]), drawn))


def run(epochs, state=None):
    """Train for some epochs, from a state if given; return the final state, the weights and the shares."""
    torch.manual_seed(0)
    mixture, model = mf.Mixture(4), nn.Linear(6, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = mixture.loader(sources(), 10, by="loss")  # by sampling, the tuner would draw by later weights
    t2 = DataLoader(sources()[0], 20, shuffle=True)

    def loss_fn(model, batch):
        return mixture.loss(per_example(model, *batch[:2]), batch[2])

    tuner = mf.Tuner(
        model, optimizer, mf.Space(mixture=mixture), loss_fn, loader, t2, schedule=3, total_steps=40,
        valid_loss_fn=mean_loss,
    )  # fmt: skip
    if state is not None:
        for thing, saved in zip((model, optimizer, tuner), state, strict=False):
            thing.load_state_dict(saved)
        torch.set_rng_state(state[-1])
    for _ in range(epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    things = model.state_dict(), optimizer.state_dict(), tuner.state_dict(), torch.get_rng_state()
    return copy.deepcopy(things), model.weight.detach(), mixture.tolist()


def test_a_resumed_run_with_a_mixture_is_the_uninterrupted_one():
    _, weights, shares = run(4)
    state, *_ = run(2)
    _, again, shares_again = run(2, state)
    assert shares_again == shares != [0.25] * 4
    assert torch.equal(again, weights)


def run_with_noise(**options):
    """Tune a source that is like T2 and one whose labels are random; return the mixture and the tuner."""
    torch.manual_seed(0)
    mixture = mf.Mixture(["like T2", "noise"])
    data = sources(sizes=(400, 1))
    wrong = TensorDataset(data[0].tensors[0], torch.randint(0, 3, (400,)))
    t2 = DataLoader(TensorDataset(*(t[:100] for t in data[0].tensors)), 50, shuffle=True)
    model = nn.Linear(6, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = mixture.loader([data[0], wrong], 32)

    def loss_fn(model, batch):
        return mixture.loss(per_example(model, *batch[:2]), batch[2])

    tuner = mf.Tuner(
        model, optimizer, mf.Space(mixture=mixture), loss_fn, loader, t2, valid_loss_fn=mean_loss,
        total_steps=200, **options,
    )  # fmt: skip
    for _ in range(8):
        for batch in loader:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    return mixture, tuner


def test_a_run_moves_to_the_source_that_the_validation_data_are_of():
    mixture, tuner = run_with_noise()
    assert mixture.shares()["like T2"] > 0.85  # the floor leaves 0.9
    assert tuner.log()["value/mixture/like T2"] == pytest.approx(mixture.shares()["like T2"])
    assert "mixture = like T2 0.88" in repr(tuner)
    assert tuner.trajectory.plot(tuner.space)


def test_effects_tell_a_source_that_is_like_the_validation_data_from_noise():
    mixture, tuner = run_with_noise(schedule=5, hyper_optimizer=Keeper)
    (best, (helps, _)), (worst, (harms, error)) = tuner.trajectory.effects(mixture).items()
    assert (best, worst) == ("like T2", "noise")
    assert helps < 0 < 2 * error < harms
    (ax,) = tuner.trajectory.plot_effects(mixture).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["like T2", "noise"]


def test_effects_are_the_derivatives_by_the_weights_minus_their_mean():
    mixture = mf.Mixture(["a", "b", "c"], init=[3, 2, 1], floor=0.1)
    space = mf.Space(mixture=mixture, dtype=torch.float64)
    slopes, trajectory = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), Trajectory()
    mixture.raw.requires_grad_()
    (slope,) = torch.autograd.grad(mixture.value @ slopes, mixture.raw)
    trajectory.record_effects(space, {"mixture": slope})
    with pytest.raises(ValueError, match="at least 2 hyper-steps"):
        trajectory.effects(mixture)
    trajectory.record_effects(space, {"mixture": 3 * slope})
    found = trajectory.effects(mixture)
    share = (mixture.value.detach() - 0.1 / 3) / 0.9
    expected = slopes - share @ slopes
    assert list(found) == ["b", "c", "a"]
    assert [found[k][0] for k in "abc"] == pytest.approx((2 * expected).tolist())
    assert [found[k][1] for k in "abc"] == pytest.approx(expected.abs().tolist())  # std 2^.5 |e|, over 2^.5


def test_a_saved_mixture_keeps_its_shares_in_another_range():
    one = mf.Space(mixture=mf.Mixture(3, init=[1, 2, 3]))
    other = mf.Space(mixture=mf.Mixture(3, ratio=50.0))
    other.load_state_dict(one.state_dict())
    assert other["mixture"].tolist() == pytest.approx([1 / 6, 1 / 3, 1 / 2], rel=1e-5)


def test_no_share_falls_below_its_part_of_the_floor():
    mixture = mf.Mixture(4, floor=0.2)
    with torch.no_grad():
        mixture.raw.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    assert min(mixture.tolist()) >= 0.05
    assert sum(mixture.tolist()) == pytest.approx(1.0)


def test_datasets_by_name_are_those_of_the_sources():
    mixture = mf.Mixture(["a", "b"])
    x, drawn = next(iter(mixture.loader({"b": [1.0] * 9, "a": [0.0] * 9}, 6)))
    assert x.tolist() == drawn.source.tolist()


@pytest.mark.parametrize("k", [8, 1000])
def test_the_shares_of_one_run_can_be_the_initial_ones_of_another(k):
    mixture = mf.Mixture(k)
    with torch.no_grad():
        mixture.raw.copy_(torch.rand(k, generator=torch.Generator().manual_seed(0)))
        mixture.raw[:2] = torch.tensor([0.0, 1.0])  # the ends, where rounding may exceed `ratio`
    again = mf.Mixture(list(mixture.shares()), init=mixture.tolist())
    assert again.tolist() == pytest.approx(mixture.tolist(), rel=1e-5)


def test_a_saved_mixture_is_refused_by_one_of_other_sources():
    saved = mf.Space(mixture=mf.Mixture(["a", "b"], init=[3, 1])).state_dict()
    with pytest.raises(SpaceError, match="mixture/a"):
        mf.Space(mixture=mf.Mixture(["b", "a"])).load_state_dict(saved)


def test_a_list_of_examples_is_one_part_of_the_batch():
    mixture = mf.Mixture(2)
    words, drawn = next(iter(mixture.loader([["x", "y"], ["z"]], 3)))
    pairs, _ = next(iter(mixture.loader(sources()[:2], 3, collate_fn=lambda examples: examples)))
    assert len(words) == len(pairs) == len(drawn.source) == 3


def test_a_clear_direction_is_not_called_random_signs():
    """The mean of the hypergradients of a softmax is 0, and in floating point of a random sign."""
    mixture, tuner = run_with_noise(schedule=4)
    assert tuner.trajectory.values(tuner.space)["mixture/noise"][-1] == pytest.approx(mixture.tolist()[1])
    assert "hypergradient/mixture" not in tuner.log()
    assert not [s for s in tuner.report() if "random signs" in s]


def test_effects_have_the_names_of_the_sources_also_in_a_space_with_long_names():
    mixture = mf.Mixture(["x/y", "z"])
    space, trajectory = mf.Space({"data/mix": mixture}), Trajectory()
    for _ in range(2):
        trajectory.record_effects(space, {"data/mix": torch.tensor([1.0, -1.0])})
    assert list(trajectory.effects(mixture)) == ["z", "x/y"]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: mf.Mixture(1), "at least two"),
        (lambda: mf.Mixture("ab"), "list of names"),
        (lambda: mf.Mixture({"a", "b"}), "list of names"),
        (lambda: mf.Mixture(3.0), "list of names"),
        (lambda: mf.Mixture(["a", "a"]), "different names"),
        (lambda: mf.Mixture(2, init=[1, 0]), "positive numbers"),
        (lambda: mf.Mixture(2, init=[1, 2, 3]), "2 positive numbers"),
        (lambda: mf.Mixture(2, init=[1, 5000]), "at most the factor 1000"),
        (lambda: mf.Mixture(2, init={"0": 1, "1": 2}), "2 positive numbers"),
        (lambda: mf.Mixture(2, init="natural"), "2 positive numbers"),
        (lambda: mf.Mixture(2, ratio="10"), "1 < ratio"),
        (lambda: mf.Mixture(2, floor=None), "floor < 1"),
        (lambda: mf.Mixture(2, ratio=1.0), "1 < ratio"),
        (lambda: mf.Mixture(2, floor=1.0), "floor < 1"),
    ],
)
def test_what_cannot_be_a_mixture_is_refused(make, said):
    with pytest.raises(SpaceError, match=said):
        make()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda m: m.loader(sources()[:1], 8), "must have one dataset"),
        (lambda m: m.loader([sources()[0], TensorDataset(torch.empty(0, 6))], 8), "1 has none"),
        (lambda m: m.loader([sources()[0], Stream()], 8), "Stream does not"),
        (lambda m: m.loader([DataLoader(d) for d in sources()[:2]], 8), "DataLoader does not"),
        (lambda m: m.loader({"0": [1], "2": [2]}, 8), "but are of"),
        (lambda m: m.loader(sources()[:2], 0), "batch_size"),
        (lambda m: m.loader(sources()[:2], 8, shuffle=True, drop_last=True), "drop_last, shuffle must be"),
        (lambda m: m.loader(sources()[:2], 8, by="luck"), "luck"),
        (lambda m: m.loss(torch.tensor(1.0), Drawn(torch.zeros(3), torch.ones(3))), "one entry for each"),
    ],
)
def test_a_mixture_refuses_other_data_than_its_sources(call, said):
    with pytest.raises(ValueError, match=said):
        call(mf.Mixture(2))


def loss_of_words(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(1)


def test_tokens_not_seen_yet_do_not_swamp_the_hypergradient():
    """At an entry without gradients so far, Adam's derivative is lr / eps; at the first gradient it is 0."""
    found = [hypergradient_with_new_tokens(eps) for eps in (1e-8, 1e-12)]
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-2, atol=1e-6)


def hypergradient_with_new_tokens(eps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(20, 4), nn.Linear(4, 1))
    words = [torch.randint(10, (60, 3)), torch.randint(20, (60, 3))]
    datasets = [TensorDataset(x, x.sum(1, keepdim=True).float()) for x in words]
    mixture = mf.Mixture(["known", "new"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=eps)
    tuner = mf.Tuner(
        model, optimizer, mf.Space(mixture=mixture),
        lambda model, batch: mixture.loss(loss_of_words(model, batch), batch[2]),
        mixture.loader(datasets, 8, generator=torch.Generator().manual_seed(1)), DataLoader(datasets[1], 60),
        valid_loss_fn=lambda model, batch: loss_of_words(model, batch).mean(),
        schedule=1, horizon="step", hyper_optimizer=Keeper, max_grad_norm=math.inf,
    )  # fmt: skip
    for _ in range(4):  # the loop's own batches have known words only
        optimizer.zero_grad()
        (model(words[0][:8]) - 1).square().mean().backward()
        optimizer.step()
    tuner.detach()
    return tuner.hyper_optimizer.last
