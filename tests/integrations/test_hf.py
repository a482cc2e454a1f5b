"""Tuning in Hugging Face's Trainer: equal to the same loop by hand, saved with its checkpoints."""

import copy
import math
from collections import defaultdict

import pytest
import torch
from comparing import STOPS, assert_detached, at_call, same, state
from torch import nn

import midflight as mf

transformers = pytest.importorskip("transformers")

from midflight.integrations.hf import FILE, Tune  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of Transformers' own: devices, pinned memory
STEPS = 24


class Rows(torch.utils.data.Dataset):
    def __init__(self, first, count):
        draws = torch.Generator().manual_seed(0)
        start = torch.randint(0, 12, (200, 1), generator=draws)
        self.rows = (start + torch.arange(8) * (1 + start % 2)) % 12
        self.rows = self.rows[first : first + count]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def model():
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=12, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def space():
    return mf.Space(
        lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3),
        weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2),
    )


def trainer(folder, net, cls=None, steps=STEPS, **options):
    settings = {
        "max_steps": steps, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8,
        "learning_rate": 3e-3, "weight_decay": 1e-2, "lr_scheduler_type": "cosine", "report_to": "none",
        "use_cpu": True, "disable_tqdm": True, "logging_steps": 4, "save_strategy": "no",
        "train_sampling_strategy": "sequential", **options,
    }  # fmt: skip
    fields = {f.name for f in transformers.TrainingArguments.__dataclass_fields__.values()}
    args = transformers.TrainingArguments(str(folder), **{k: v for k, v in settings.items() if k in fields})
    return (cls or transformers.Trainer)(net, args, train_dataset=Rows(0, 64), eval_dataset=Rows(64, 32))


def tuned(folder, *, steps=STEPS, resume=None, cls=None, tune=None, **options):
    net, values = model(), space()
    runner = trainer(folder, net, cls, steps, **options)
    callback = Tune(runner, values, schedule=3, **(tune or {}))
    runner.add_callback(callback)
    runner.train(resume_from_checkpoint=resume)
    return net, values, runner, callback


def test_it_tunes_logs_and_finishes(tmp_path):
    _, values, runner, callback = tuned(tmp_path)
    assert callback.tuner.steps == STEPS
    assert values.as_dict() != space().as_dict()
    logged = [entry for entry in runner.state.log_history if "tune/value/lr" in entry]
    assert len(logged) == callback.tuner.log()["hypersteps"] >= 4
    optimizer = runner.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_trainer_tunes_as_the_same_loop_by_hand(tmp_path, accumulate):
    steps = STEPS // accumulate
    net, values, *_ = tuned(tmp_path, steps=steps, max_grad_norm=0.5, gradient_accumulation_steps=accumulate)
    other, own = model(), space()
    by_hand = trainer(tmp_path / "b", other, steps=steps)
    by_hand.create_optimizer_and_scheduler(steps)
    optimizer, schedule = by_hand.optimizer, by_hand.lr_scheduler
    batches = by_hand.get_train_dataloader()

    def loss_fn(net, batch):
        return net(**batch).loss

    tuner = mf.Tuner(
        other, optimizer, own, loss_fn, batches, by_hand.get_eval_dataloader(), schedule=3, total_steps=steps
    )
    taken = [batch for _ in range(5) for batch in batches][: steps * accumulate]
    other.train()
    for n, batch in enumerate(taken):
        (loss_fn(other, batch) / accumulate).backward()
        if (n + 1) % accumulate == 0:
            nn.utils.clip_grad_norm_(other.parameters(), 0.5)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    tuner.finish()
    assert own.as_dict() == pytest.approx(values.as_dict(), rel=1e-4)
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


def test_a_resumed_training_goes_on_bit_for_bit(tmp_path):
    net, values, *_ = tuned(tmp_path / "whole", save_strategy="steps", save_steps=12)
    folder = tmp_path / "whole" / "checkpoint-12"
    assert (folder / FILE).is_file()
    again, others, _, callback = tuned(tmp_path / "whole", resume=str(folder))
    assert callback.tuner.steps == STEPS
    assert same(state(again, others), state(net, values))


def test_a_checkpoint_elsewhere_is_named_or_missed_aloud(tmp_path):
    net, values, *_ = tuned(tmp_path / "whole", save_strategy="steps", save_steps=12)
    moved = tmp_path / "moved"
    (tmp_path / "whole" / "checkpoint-12").rename(moved)
    again, others, *_ = tuned(tmp_path / "other", resume=str(moved), tune={"resume_from": moved})
    assert same(state(again, others), state(net, values))
    with pytest.raises(FileNotFoundError, match="resume_from="):
        tuned(tmp_path / "other", resume=str(moved))


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"label_smoothing_factor": 0.1}, {"group_by_length": False}]
)
def test_options_of_the_trainer_work(tmp_path, options):
    _, values, _, callback = tuned(tmp_path, **options)
    assert callback.tuner.log()["hypersteps"] >= 4
    assert values.as_dict() != space().as_dict()


class Stops(transformers.Trainer):
    """Calls a function at each loss, those of hyper-steps and of the validation included."""

    def compute_loss(self, *args, **kwargs):
        self.at_each_loss()
        return super().compute_loss(*args, **kwargs)


# in a batch, in a hyper-step, in the validation
@pytest.mark.parametrize(("at", "do"), list(zip((45, 40, 55), STOPS, strict=True)))
def test_what_stops_a_training_leaves_no_hook_and_the_tuned_options_and_it_goes_on(tmp_path, at, do):
    options = {"save_strategy": "steps", "save_steps": 6, "eval_strategy": "steps", "eval_steps": 12}
    net, values, *_ = tuned(tmp_path / "whole", **options)
    stopped_net, stopped_values = model(), space()
    runner = trainer(tmp_path / "stopped", stopped_net, Stops, **options)
    runner.at_each_loss = at_call(at, do)
    tune = Tune(runner, stopped_values, schedule=3)
    runner.add_callback(tune)
    with pytest.raises((KeyboardInterrupt, ArithmeticError)):
        runner.train()
    steps = tune.tuner.steps
    assert 6 < steps < STEPS
    factor = 0.5 * (1 + math.cos(math.pi * steps / STEPS))
    assert_detached(runner.optimizer.optimizer, stopped_values, factor)
    runner.train(resume_from_checkpoint=True)
    assert tune.tuner.steps == STEPS
    assert same(state(stopped_net, stopped_values), state(net, values))
    runner.train()
    assert tune.tuner.steps == STEPS


def test_a_training_after_a_resumed_one_that_failed_begins_anew(tmp_path):
    tuned(tmp_path, save_strategy="steps", save_steps=12)
    runner = trainer(tmp_path, model())
    valid, runner.eval_dataset = runner.eval_dataset, None
    tune = Tune(runner, space(), schedule=3)
    runner.add_callback(tune)
    with pytest.raises(mf.errors.UnusableLoader):
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    runner.eval_dataset = valid
    runner.train()
    assert tune.tuner.steps == STEPS


def test_without_validation_data_it_says_so(tmp_path):
    net = model()
    runner = trainer(tmp_path, net)
    runner.eval_dataset = None
    runner.add_callback(Tune(runner, space()))
    with pytest.raises(mf.errors.UnusableLoader, match="validation data"):
        runner.train()


def test_the_loss_of_a_trainer_is_called_as_the_trainer_calls_it(tmp_path):
    class Logs(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**inputs).loss * inputs["labels"][..., 1:].numel() / num_items_in_batch
            self.log({"own": float(loss)})
            return loss

    _, values, runner, _ = tuned(tmp_path, cls=Logs)
    assert values.as_dict() != space().as_dict()
    assert sum("own" in entry for entry in runner.state.log_history) == STEPS
    assert "log" not in vars(runner)


def test_what_a_trainer_counts_by_itself_is_as_without_a_tuner(tmp_path):
    class Counts(transformers.Trainer):  # as TRL's do
        losses, seen = 0, None

        def compute_loss(self, model, *args, **kwargs):
            self.seen = self.seen or {"train": defaultdict(list), "eval": defaultdict(list)}
            self.losses += 1
            self.seen["train" if model.training else "eval"]["losses"].append(self.losses)
            return super().compute_loss(model, *args, **kwargs)

        def log(self, logs, *args, **kwargs):
            super().log({**logs, **self.seen["train"]}, *args, **kwargs)
            self.seen["train"].clear()

    untouched = trainer(tmp_path, model(), Counts)
    untouched.train()
    *_, runner, callback = tuned(tmp_path, cls=Counts)
    assert callback.tuner.log()["hypersteps"] >= 4
    of_both = [[e["losses"] for e in t.state.log_history if "losses" in e] for t in (untouched, runner)]
    assert of_both[0] == of_both[1] == [list(range(n + 1, n + 5)) for n in range(0, STEPS, 4)]
    assert untouched.seen == runner.seen


def test_own_loaders_need_no_length_and_a_later_start_is_known(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(list(Rows(0, 64)))

    net, values = model(), space()
    trainer(tmp_path, net, steps=12, save_strategy="steps", save_steps=12).train()
    runner = trainer(tmp_path, net)
    callback = Tune(runner, values, train_loader=torch.utils.data.DataLoader(Stream(), 8), schedule=3)
    runner.add_callback(callback)
    with pytest.warns(UserWarning, match="tuning begins anew"):
        runner.train(resume_from_checkpoint=str(tmp_path / "checkpoint-12"))
    assert callback.tuner.steps == callback.tuner._total == STEPS - 12


def test_a_copy_of_a_trainer_trains_itself(tmp_path):
    runner = trainer(tmp_path, model())
    runner.add_callback(Tune(runner, space(), schedule=3))
    other = copy.deepcopy(runner)
    other.train()
    assert (runner.state.global_step, other.state.global_step) == (0, STEPS)
