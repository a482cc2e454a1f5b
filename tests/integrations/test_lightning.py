"""Tuning in Lightning: equal to the same loop by hand, saved with the trainer, gone after a failure."""

import math
import signal

import pytest
import torch
import torch.nn.functional as F
from comparing import STOPS, assert_detached, at_call, same, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import midflight as mf

pl = pytest.importorskip("lightning.pytorch")

from midflight.integrations.lightning import Tune  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Lightning's own: workers, devices, loggers
DATA = torch.Generator().manual_seed(0)
X = torch.randn(96, 6, generator=DATA)
Y = X[:, :1] * 2 + 0.3 * torch.randn(96, 1, generator=DATA)
T1, T2 = TensorDataset(X[:64], Y[:64]), TensorDataset(X[64:], Y[64:])
EPOCHS = 6


class Module(pl.LightningModule):
    def __init__(self, returns="loss", manual=False):
        super().__init__()
        torch.manual_seed(1)
        self.space = mf.Space(
            lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3), l2=mf.Float(1e-4, 1.0, log=True, init=1e-2)
        )
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))
        self.returns, self.automatic_optimization = returns, not manual

    def loss(self, batch):
        loss = F.mse_loss(self.net(batch[0]), batch[1])
        penalty = sum(p.square().sum() for p in self.parameters())
        return loss + self.space["l2"] * penalty if self.training else loss

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return {"loss": loss} if self.returns == "dict" else loss

    def validation_step(self, batch, index, dataloader_idx=0):
        self.log("valid", self.loss(batch))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
        if not self.automatic_optimization:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Numbers(pl.loggers.Logger):
    name, version = "numbers", 0

    def __init__(self):
        self.seen = []

    def log_metrics(self, metrics, step=None):
        self.seen.append((step, metrics))

    def log_hyperparams(self, *args):
        pass


def loaders():
    return DataLoader(T1, 16), DataLoader(T2, 16)


def trainer(folder, *callbacks, epochs=EPOCHS, **options):
    settings = {"logger": False, "enable_checkpointing": False, **options}
    return pl.Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **settings,
    )  # fmt: skip


def by_hand(clip=None, accumulate=1):
    module = Module()
    module.log = lambda *_, **__: None
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    train_loader, valid_loader = loaders()
    tuner = mf.Tuner(
        module, optimizer, module.space, lambda m, b: m.loss(b), train_loader, valid_loader, schedule=3,
        total_steps=EPOCHS * len(train_loader) // accumulate,
    )  # fmt: skip
    for _ in range(EPOCHS):
        for n, batch in enumerate(train_loader):
            (module.loss(batch) / accumulate).backward()
            if (n + 1) % accumulate == 0:
                if clip:
                    nn.utils.clip_grad_norm_(module.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    tuner.finish()
    return module


@pytest.mark.parametrize("returns", ["loss", "dict"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_tunes_as_the_same_loop_by_hand(tmp_path, returns, clip, accumulate):
    module, tune = Module(returns), Tune(lambda: module.space, schedule=3)
    options = {"gradient_clip_val": clip, "accumulate_grad_batches": accumulate}
    trainer(tmp_path, tune, **options).fit(module, *loaders())
    assert tune.tuner.steps == EPOCHS * 4 // accumulate
    assert tune.tuner.log()["hypersteps"] >= 3
    expected = by_hand(clip, accumulate)
    assert same(state(module, module.space), state(expected, expected.space))


def test_manual_optimisation_needs_a_loss_and_then_works(tmp_path):
    module = Module(manual=True)
    with pytest.raises(mf.errors.InvalidLoss, match="pass loss_fn="):
        trainer(tmp_path, Tune(module.space, schedule=3)).fit(module, *loaders())
    module = Module(manual=True)
    tune = Tune(module.space, loss_fn=lambda m, batch: m.loss(batch), schedule=3)
    trainer(tmp_path, tune).fit(module, *loaders())
    assert module.space.as_dict() != Module().space.as_dict()


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path):
    whole = Module()
    trainer(tmp_path, Tune(whole.space, schedule=3)).fit(whole, *loaders())
    first = Module()
    half = trainer(tmp_path, Tune(first.space, schedule=3, total_steps=EPOCHS * 4, finish=False), epochs=3)
    half.fit(first, *loaders())
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = Module()
    tune = Tune(second.space, schedule=3)
    trainer(tmp_path, tune).fit(second, *loaders(), ckpt_path=tmp_path / "half.ckpt")
    assert tune.tuner.steps == EPOCHS * 4
    assert same(state(second, second.space), state(whole, whole.space))


def test_loggers_get_the_numbers_and_the_module_keeps_its_log(tmp_path):
    module, numbers = Module(), Numbers()
    trainer(tmp_path, Tune(module.space, schedule=3), logger=numbers, log_every_n_steps=1).fit(
        module, *loaders()
    )
    ours = [(step, m) for step, m in numbers.seen if "tune/value/l2" in m]
    assert len(ours) >= 4
    assert any("loss" in m for _, m in numbers.seen)
    assert "log" not in vars(module)


def test_an_exception_in_validation_leaves_no_hook(tmp_path):
    module = Module()
    calls = []

    def fails(batch, batch_idx):
        index = batch_idx
        calls.append(index)
        if len(calls) > 4:
            raise ArithmeticError

    module.validation_step = fails
    tune = Tune(module.space, schedule=3)
    runner = trainer(tmp_path, tune)
    with pytest.raises(ArithmeticError):
        runner.fit(module, *loaders())
    optimizer = tune.tuner._controller._hyperstep._optimizers[0]
    assert tune.tuner.steps > 0
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Tune(Module().space, shedule=3), TypeError, "shedule"),
        (lambda: Tune({"lr": 1}), TypeError, "space must be a Space"),
    ],
)
def test_a_wrong_argument_is_refused_at_once(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_without_validation_data_it_says_so(tmp_path):
    module = Module()
    with pytest.raises(mf.errors.UnusableLoader, match="validation data"):
        trainer(tmp_path, Tune(module.space)).fit(module, DataLoader(T1, 16))
    with pytest.raises(mf.errors.UnusableLoader, match="has 2"):
        trainer(tmp_path, Tune(module.space)).fit(module, DataLoader(T1, 16), [DataLoader(T2, 16)] * 2)


def test_validating_between_two_fits_leaves_the_second_as_a_first(tmp_path):
    module, tune = Module(), Tune(lambda: module.space, schedule=3)
    first = trainer(tmp_path, tune)
    first.fit(module, *loaders())
    expected = state(module, module.space)
    first.save_checkpoint(tmp_path / "end.ckpt")
    first.validate(module, loaders()[1], ckpt_path=tmp_path / "end.ckpt", verbose=False)
    module = Module()
    trainer(tmp_path, tune).fit(module, *loaders())
    assert tune.tuner.steps == EPOCHS * 4
    assert same(state(module, module.space), expected)


def test_batches_pass_through_the_hooks_of_the_module(tmp_path):
    class Nested(Module):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            return {"x": batch[0], "y": batch[1]}

        def loss(self, batch):
            return super().loss((batch["x"], batch["y"]))

        def training_step(self, batch):  # without an index, as Lightning allows
            return self.loss(batch)

    module, plain = Nested(), Module()
    trainer(tmp_path, Tune(module.space, schedule=3)).fit(module, *loaders())
    trainer(tmp_path, Tune(plain.space, schedule=3)).fit(plain, *loaders())
    assert same(state(module, module.space), state(plain, plain.space))


def test_of_two_optimisers_that_step_in_turn_one_is_chosen(tmp_path):
    class Pair(Module):
        def __init__(self):
            super().__init__(manual=True)
            self.other = nn.Linear(6, 1)

        def loss(self, batch):
            loss, weights = F.mse_loss(self.net(batch[0]), batch[1]), self.net.parameters()
            return loss + self.space["l2"] * sum(p.square().sum() for p in weights) if self.training else loss

        def training_step(self, batch, index):
            losses = self.loss(batch), F.mse_loss(self.other(batch[0]), batch[1])
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()

        def configure_optimizers(self):
            return [torch.optim.AdamW(net.parameters(), lr=3e-3) for net in (self.net, self.other)]

    module = Pair()
    tune = Tune(module.space, optimizer=0, loss_fn=lambda m, batch: m.loss(batch), schedule=3)
    trainer(tmp_path, tune).fit(module, *loaders())
    assert tune.tuner.steps == EPOCHS * 4
    assert tune.tuner.log()["hypersteps"] == EPOCHS * 4 // 3
    assert tune.tuner._total is None


def test_a_tuner_that_comes_later_knows_how_many_steps_are_left(tmp_path):
    module = Module()
    first = trainer(tmp_path, epochs=2)
    first.fit(module, *loaders())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = Module()
    tune = Tune(module.space, schedule=3)
    trainer(tmp_path, tune).fit(module, *loaders(), ckpt_path=tmp_path / "half.ckpt")
    assert tune.tuner.steps == tune.tuner._total == (EPOCHS - 2) * 4


class Stops(Module):
    """Calls a function at each call of `training_step`, those of hyper-steps included."""

    def __init__(self, at_each_call):
        super().__init__()
        self.at_each_call = at_each_call

    def training_step(self, batch, index):
        self.at_each_call()
        return super().training_step(batch, index)


@pytest.fixture
def control_c():
    """Lightning ignores Ctrl-C once it was pressed."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("control_c")
@pytest.mark.parametrize("at", [27, 28])  # in the loop, in a hyper-step
@pytest.mark.parametrize("do", STOPS)
def test_what_stops_a_training_leaves_no_hook_and_the_tuned_options(tmp_path, do, at):
    module, optimizers = Stops(at_call(at, do)), []
    tune = Tune(module.space, schedule=3)
    with pytest.raises((SystemExit, ArithmeticError)):
        trainer(tmp_path, tune, Takes(optimizers)).fit(module, *loaders())
    steps = tune.tuner.steps
    assert 0 < steps < EPOCHS * 4
    assert_detached(optimizers[0], module.space, factor=0.5 * (1 + math.cos(math.pi * steps / 100)))
    trainer(tmp_path, tune).fit(module, *loaders())
    assert tune.tuner.steps == EPOCHS * 4


class Takes(pl.Callback):
    def __init__(self, optimizers):
        self.optimizers = optimizers

    def on_train_start(self, trainer, module):
        self.optimizers += trainer.optimizers


class StopsAt(pl.Callback):
    def __init__(self, do, step):
        self.do, self.step = do, step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            self.do()


@pytest.mark.usefixtures("control_c")
@pytest.mark.parametrize("do", STOPS)
def test_a_training_that_was_stopped_goes_on_bit_for_bit(tmp_path, do):
    step = 8  # the end of an epoch: in the midst of one, Lightning itself reads other batches
    whole, first, second = Module(), Module(), Module()
    tune = [Tune(module.space, schedule=3) for module in (whole, first, second)]
    trainer(tmp_path, tune[0]).fit(whole, *loaders())
    saves = pl.callbacks.OnExceptionCheckpoint(tmp_path)
    saves.teardown = lambda *_, **__: None  # keeps the file
    with pytest.raises((SystemExit, ArithmeticError)):
        trainer(tmp_path, tune[1], StopsAt(do, step), saves, enable_checkpointing=True).fit(first, *loaders())
    trainer(tmp_path, tune[2]).fit(second, *loaders(), ckpt_path=saves.ckpt_path)
    assert same(state(second, second.space), state(whole, whole.space))


def test_a_training_after_a_resumed_one_that_failed_begins_anew(tmp_path):
    module = Module()
    first = trainer(tmp_path, Tune(module.space, schedule=3), epochs=3)
    first.fit(module, *loaders())
    first.save_checkpoint(tmp_path / "half.ckpt")
    module = Module()
    tune = Tune(module.space, schedule=3)
    with pytest.raises(mf.errors.UnusableLoader):
        trainer(tmp_path, tune).fit(module, loaders()[0], ckpt_path=tmp_path / "half.ckpt")
    trainer(tmp_path, tune).fit(module, *loaders())
    assert tune.tuner.steps == EPOCHS * 4
