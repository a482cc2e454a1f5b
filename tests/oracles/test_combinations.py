"""What users combine with tuning, times what they tune: measures each cell of the page combinations.md.

The truth is a central difference of the step as the loop takes it, in float64, as in `test_live_loop`. Layers
that draw random numbers draw the same in each pass, one per feature.

    python tests/oracles/test_combinations.py     # writes the table of the page
"""

import copy
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from recording import Recorder, schedule_free
from strangers import Belief
from torch import nn
from torch.utils.checkpoint import checkpoint

import midflight as mf
from midflight.errors import MidflightError
from midflight.gradcheck.oracles import derivative
from midflight.tuner.gradient import ReceivedGradient
from midflight.updates import BlackBox

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "combinations.md"
COLUMNS = {
    "weight_decay": mf.Float(1e-3, 1.0, log=True, init=0.05),
    "lr": mf.Float(1e-3, 1e-1, log=True, init=0.02),
    "noise": mf.Float(0.0, 1.0, init=0.4),
    "dropout": mf.Float(0.05, 0.8, logit=True, init=0.5),
    "label_smoothing": mf.Float(0.0, 0.5, init=0.2),
    "loss weight": mf.Float(1e-3, 1.0, log=True, init=0.05),
}
OPTIONS = ("weight_decay", "lr")
STEPS, EVERY = 6, 3
EXACT, FIRST_ORDER, SURE = 2e-6, 0.15, 1e-6
"""Relative errors: the largest of a cell "exact", and of a cell "first order"; that of the truth."""


def batch(seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(24, 8, dtype=torch.float64, generator=rng)
    return x, (x[:, :3] + 0.3 * torch.randn(24, 3, dtype=torch.float64, generator=rng)).argmax(1)


T1, T2 = batch(1), batch(2)


@contextmanager
def same_draws():
    """Let `randn_like` and `rand_like` return the same numbers each time, one per feature."""
    rng = torch.Generator().manual_seed(3)
    normal, uniform = torch.randn(64, generator=rng), torch.rand(64, generator=rng)

    def like(draws):
        return lambda x, dtype=None, **_: draws[: x.shape[-1]].to(dtype or x.dtype).expand(x.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", like(normal))
        patch.setattr(torch, "rand_like", like(uniform))
        yield


class SteadyDropout(mf.nn.Dropout):
    """Draws masks at a constant rate other than its own: the function is smooth, and no gradient is 0."""

    def _drawn_at(self, rate):
        return torch.full_like(rate, 0.3)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = self.qkv(x.unflatten(-1, (4, 4))).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v).flatten(-2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x.unflatten(-1, (4, 4)))[0].flatten(-2)


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(16, 16)

    def forward(self, x):
        return checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=False)


@dataclass
class Row:
    """One way to train.

    Attributes:
        middle: a layer between two linear ones, 16 features wide.
        optimizer: weights -> optimiser.
        wrap: model -> the model that trains.
        micro: batches that are accumulated.
        clip: the norm to which the loop clips.
        scaler: whether a GradScaler steps.
        half: whether the loss runs under autocast in bfloat16, with weights in float32.
        bias: whether linear layers have one.
        cells: what is claimed of a column, if not "exact": "first order", or the words of a refusal.
    """

    middle: Any = nn.Tanh
    optimizer: Any = torch.optim.AdamW
    wrap: Any = None
    micro: int = 1
    clip: float | None = None
    scaler: bool = False
    half: bool = False
    bias: bool = True
    cells: Any = None

    def claim(self, column):
        return (self.cells or {}).get(column, "exact")


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["first", "last"], init_lora_weights=False)
    )
    return adapted.double()


BFLOAT = "rounds its step to bfloat16"
ROWS = {
    "plain": Row(),
    "accumulation": Row(micro=4),
    "clipping by norm": Row(clip=0.05),
    "autocast, bfloat16": Row(half=True, cells=dict.fromkeys(COLUMNS, "first order")),
    "GradScaler": Row(scaler=True),
    "GradScaler and clipping": Row(scaler=True, clip=0.05),
    "torch.compile": Row(wrap=lambda model: torch.compile(model, backend="eager")),
    "attention (SDPA)": Row(Attention),
    "checkpointing": Row(Checkpointed),
    "LSTM": Row(Recurrent),
    "LoRA (peft)": Row(wrap=lora),
    "Muon": Row(
        optimizer=getattr(torch.optim, "Muon", None),
        bias=False,
        cells=dict.fromkeys([c for c in COLUMNS if c not in OPTIONS], BFLOAT),
    ),
    "schedule-free AdamW": Row(optimizer=schedule_free),
    "an optimiser of one's own": Row(optimizer=Belief),
}
PROCESSES = {
    "two processes (DDP)": "exact",
    "two processes (FSDP2)": "exact",
}
"""Rows that `tests/faults/test_sharded.py` measures, all columns at once."""
NEEDS = {"LoRA (peft)": "peft", "schedule-free AdamW": "schedulefree"}


def of(space, name, otherwise):
    return space[name] if name in set(space) else otherwise


class Network(nn.Module):
    def __init__(self, space, middle, bias):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 16, bias), middle(), nn.Linear(16, 3, bias)
        self.noise = mf.nn.GaussianNoise(of(space, "noise", 0.1))
        self.dropout = SteadyDropout(of(space, "dropout", 0.1))

    def forward(self, x):
        return self.last(self.dropout(self.middle(self.first(self.noise(x)))))


class Run:
    """A loop before its first step; a copy takes the same steps."""

    def __init__(self, row, space, half=None):
        torch.manual_seed(0)
        self.row, self.space = row, space
        self.half = row.half if half is None else half
        self.dtype = torch.float32 if self.half else torch.float64
        net = Network(space, row.middle, row.bias).to(self.dtype)
        self.net = row.wrap(net) if row.wrap else net
        weights = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = row.optimizer(weights, lr=0.02, weight_decay=0.05)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=1)

    def loss(self, model, batch):
        x, y = batch
        half = torch.autocast("cpu", torch.bfloat16) if self.half else nullcontext()
        with same_draws(), half:
            logits = model(x.to(self.dtype))
            smoothing = of(self.space, "label_smoothing", 0.0)
            loss = mf.nn.losses.cross_entropy(logits.to(self.dtype), y, label_smoothing=smoothing)
            if "loss weight" in self.space:
                loss = loss + self.space["loss weight"] * logits.to(self.dtype).square().mean()
        return loss

    def valid_loss(self, model, batch):
        return F.cross_entropy(model(batch[0].to(self.dtype)).to(self.dtype), batch[1])

    def step(self):
        self.optimizer.zero_grad()
        for micro in zip(*(array.chunk(self.row.micro) for array in T1), strict=True):
            loss = self.loss(self.net, micro) / self.row.micro
            (self.scaler.scale(loss) if self.row.scaler else loss).backward()
        if self.row.clip:
            if self.row.scaler:
                self.scaler.unscale_(self.optimizer)
            assert nn.utils.clip_grad_norm_(self.net.parameters(), self.row.clip) > self.row.clip
        if self.row.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()


def spaces(columns):
    return mf.Space({name: COLUMNS[name] for name in columns}, dtype=torch.float64)


def tuned(row, columns):
    """Return the hypergradients of the last of STEPS steps, and their truths."""
    run = Run(row, spaces(columns))
    options = {"max_grad_norm": row.clip} if row.clip else {}
    tuner = mf.Tuner(
        run.net, run.optimizer, run.space, run.loss, [T1], [T2], valid_loss_fn=run.valid_loss, schedule=EVERY,
        horizon="step", hyper_optimizer=Recorder, examples=None if row.middle is Recurrent else 24, **options,
    )  # fmt: skip
    exact = Run(row, run.space, half=False)
    for step in range(1, STEPS + 1):
        if step == STEPS:
            truths = [truth(exact, name) for name in columns]
        for taken in [run, exact] if row.half else [run]:
            taken.step()
        if not row.half:
            exact = run
    tuner.detach()
    return list(zip(tuner.hyper_optimizer.last, truths, strict=True))


def truth(run, name):
    before = run.space[name].raw.detach().clone()

    def after(shift):
        twin = copy.copy(run)
        shared = {id(run.space[name]): run.space[name] for name in run.space}
        twin.net, twin.optimizer, twin.scaler = copy.deepcopy((run.net, run.optimizer, run.scaler), shared)
        values = run.space.values({name: before + shift})
        with run.space.seeing(values):
            for option in OPTIONS:
                if option in run.space:
                    for group in twin.optimizer.param_groups:
                        group[option] = float(run.space[option].value)
            twin.step()
        with torch.no_grad():
            twin.net.eval()
            return float(twin.valid_loss(twin.net, T2))

    value, uncertainty = derivative(after)
    assert uncertainty < SURE * abs(value)
    return value


def skip_unless_possible(name):
    if ROWS[name].optimizer is None:
        pytest.skip("Muon is in torch since 2.9.")
    pytest.importorskip(NEEDS.get(name, "torch"))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ROWS)
def test_each_cell_is_as_the_page_says(name):
    skip_unless_possible(name)
    row = ROWS[name]
    found = [column for column in COLUMNS if row.claim(column) in ("exact", "first order")]
    for column, (ours, right) in zip(found, tuned(row, found), strict=True):
        most = EXACT if row.claim(column) == "exact" else FIRST_ORDER
        assert abs(ours / right - 1) < most, column
    for column in set(COLUMNS) - set(found):
        with pytest.raises(MidflightError, match=row.claim(column)):
            tuned(row, [column])


def off(name, columns):
    """By how much hypergradients are off, relative to the truth."""
    return [abs(ours / right - 1) for ours, right in tuned(ROWS[name], columns)]


def test_a_tuner_that_does_not_know_of_clipping_is_rejected(monkeypatch):
    monkeypatch.setattr(ReceivedGradient, "jacobian", lambda *_: None)
    assert min(off("clipping by norm", ["noise", "label_smoothing"])) > 0.01


def test_a_black_box_that_passes_on_v_as_plain_sgd_is_rejected(monkeypatch):
    real = BlackBox.pullback
    monkeypatch.setattr(BlackBox, "pullback", lambda self, v, *step: (-0.02 * v, real(self, v, *step)[1]))
    assert min(off("an optimiser of one's own", ["noise", "label_smoothing"])) > 0.01


def test_the_users_own_check_knows_optimisers_without_a_rule():
    run = Run(ROWS["an optimiser of one's own"], spaces(["lr", "weight_decay", "loss weight"]))
    report = mf.check(
        run.net,
        run.optimizer,
        run.space,
        run.loss,
        T1,
        T2,
        valid_loss_fn=run.valid_loss,
        estimators=["one_step"],
    )
    assert len(report.lines) == 3
    assert all(line.passed for line in report.lines), report


def test_finish_judges_a_schedule_free_optimiser_at_the_weights_that_it_evaluates():
    pytest.importorskip("schedulefree")
    run = Run(ROWS["schedule-free AdamW"], spaces(["weight_decay"]))
    tuner = mf.Tuner(
        run.net, run.optimizer, run.space, run.loss, [T1], [T2], valid_loss_fn=run.valid_loss, schedule=EVERY
    )
    for _ in range(STEPS):
        run.step()
    tuner.finish()
    ended = [p.detach().clone() for p in run.net.parameters()]
    run.optimizer.eval()
    assert all(map(torch.equal, ended, run.net.parameters()))


def page():
    lines = [f"| training | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, row in ROWS.items():
        cells = [
            c if (c := row.claim(column)) in ("exact", "first order") else "refused" for column in COLUMNS
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [f"| {name}{f' | {cell}' * len(COLUMNS)} |" for name, cell in PROCESSES.items()]
    return "\n".join(lines) + "\n"


def test_the_page_shows_this_table():
    assert page() in PAGE.read_text(), "run python tests/oracles/test_combinations.py"


if __name__ == "__main__":
    text = PAGE.read_text()
    start = text.index("| training |")
    end = text.index("\n\n", start) + 1
    PAGE.write_text(text[:start] + page() + text[end:])
