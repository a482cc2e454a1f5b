"""What only a GPU can show: its random states, its kernels without a second derivative, half precision.

The table of tests/oracles/test_live_loop.py and the populations run on a GPU as well where there is one.
"""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import midflight as mf
from midflight.gradcheck.oracles import derivative
from once_only import Fused

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parents[2] / "examples/train_gpt.py"
FEATURES, CLASSES, EXAMPLES = 16, 4, 32


class Still(torch.optim.Optimizer):
    """A hyper-optimiser that moves nothing and keeps what it was given."""

    def __init__(self, raws):
        super().__init__(raws, {"lr": 1.0})
        self.given = []

    def step(self, closure=None):
        self.given.append([float(p.grad) for p in self.param_groups[0]["params"]])


class KnownNoise(nn.Module):
    """x + level z with the same z at each call: what a central difference can follow."""

    def __init__(self, level, shape):
        super().__init__()
        self.level = level
        self.register_buffer("z", torch.randn(shape))

    def forward(self, x):
        return x + self.level * self.z.to(x.dtype) if self.training else x


def batches(*shape, dtype=torch.float32):
    x = torch.randn(2, *shape, device="cuda", dtype=dtype)
    return [(part, torch.randint(0, CLASSES, (shape[0],), device="cuda")) for part in x]


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def noise(dtype=torch.float32):
    return mf.Space({"noise": mf.Float(0.0, 1.0, init=0.4)}, dtype=dtype)


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(FEATURES, 8, batch_first=True), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    """Causal attention with one kernel and no other; only the plain one has a second derivative."""

    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel
        self.qkv, self.head = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, FEATURES // 2)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(self.kernel):
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(attended.transpose(1, 2).flatten(2)[:, -1])


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        self.use_reentrant = use_reentrant
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(6 * FEATURES, 32), nn.Tanh(), nn.Linear(32, CLASSES)
        )

    def forward(self, x):
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=self.use_reentrant)


MODELS = {
    "cuDNN LSTM": Lstm,
    "plain attention": lambda: Attention(SDPBackend.MATH),
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_hypergradient_goes_through_the_layer(name):
    space = noise(torch.float64)
    level = space["noise"]
    model = nn.Sequential(KnownNoise(level, (EXAMPLES, 6, FEATURES)), MODELS[name]())
    model = model.to("cuda", torch.float64)
    train, valid = batches(EXAMPLES, 6, FEATURES, dtype=torch.float64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)

    def step(model, optimizer):
        optimizer.zero_grad()
        cross_entropy(model, train).backward()
        optimizer.step()

    def after(shift):
        twin = copy.deepcopy((model, optimizer), {id(level): level})
        with space.seeing(space.values({"noise": space["noise"].raw + shift})):
            step(*twin)
        with torch.no_grad():
            return float(cross_entropy(twin[0].eval(), valid))

    tuner = mf.Tuner(
        model, optimizer, space, cross_entropy, [train], [valid], schedule=1, horizon="step",
        hyper_optimizer=Still, examples=EXAMPLES,
    )  # fmt: skip
    step(model, optimizer)
    truth, _ = derivative(after)
    step(model, optimizer)
    assert tuner.hyper_optimizer.given[-1][0] == pytest.approx(truth, rel=1e-5)


def of_attention(kernel, dtype, middle=nn.Tanh, model=Attention, examples=256):
    """(hypergradients of noise over seeds, how they were found), after 20 steps of Adam."""
    found = []
    for seed in range(4):
        torch.manual_seed(seed)
        space = noise()
        layers = model(kernel) if kernel else model(), middle(), nn.Linear(CLASSES, CLASSES)
        model_ = nn.Sequential(KnownNoise(space["noise"], (examples, 6, FEATURES)), *layers).cuda()
        train, valid = batches(examples, 6, FEATURES)
        optimizer = torch.optim.Adam(model_.parameters(), lr=0.01)

        def loss(model, batch):
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                return cross_entropy(model, batch)

        tuner = mf.Tuner(
            model_, optimizer, space, loss, [train], [valid], schedule=20, horizon="step",
            hyper_optimizer=Still, examples=examples,
        )  # fmt: skip
        for _ in range(20):
            optimizer.zero_grad()
            loss(model_, train).backward()
            optimizer.step()
        found.append(tuner.hyper_optimizer.given[-1][0])
    return torch.tensor(found), tuner.mixed_partial


def relative_error(found, truth):
    return float((found - truth).norm() / truth.norm())


@pytest.mark.parametrize("kernel", [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
def test_a_kernel_on_which_the_model_insists_is_replaced(kernel):
    """In half precision; beside the plain kernel in float32."""
    found, method = of_attention(kernel, torch.bfloat16)
    truth, _ = of_attention(SDPBackend.MATH, torch.float32)
    print(kernel, method, relative_error(found, truth))
    assert method == "double backward"
    assert relative_error(found, truth) < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tf32", [False, True])
def test_differences_are_right_in_the_precision_of_the_loop(dtype, tf32, monkeypatch):
    truth, _ = of_attention(SDPBackend.MATH, torch.float32)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", tf32)
    found, method = of_attention(SDPBackend.MATH, dtype, Fused)
    print(dtype, tf32, relative_error(found, truth))
    assert method == "difference"
    assert relative_error(found, truth) < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recurrent_layers_of_cudnn_are_right_in_the_precision_of_the_loop(dtype):
    found, method = of_attention(None, dtype, model=Lstm)
    with torch.backends.cudnn.flags(enabled=False):
        truth, exact = of_attention(None, torch.float32, model=Lstm)
    print(dtype, method, exact, relative_error(found, truth))
    assert exact == "double backward"
    assert relative_error(found, truth) < 0.15


def stochastic_run(attach, **options):
    torch.manual_seed(3)
    space = mf.Space(
        noise=mf.Float(0.0, 1.0, init=0.3), weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3)
    )
    layers = nn.Linear(FEATURES, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, CLASSES)
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3, **options)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    train, valid = batches(EXAMPLES, FEATURES)
    if attach:
        mf.Tuner(
            model, optimizer, space, cross_entropy, [train], [valid], schedule=2, total_steps=12,
            hyper_optimizer=Still,
        )  # fmt: skip
    else:
        space.requires_grad_(False)
    for _ in range(12):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model, train)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    state = [*model.state_dict().values(), torch.cuda.get_rng_state(), torch.get_rng_state()]
    return [t.cpu() for t in state if t.dim()]


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True}, {"foreach": False}])
def test_a_tuner_that_cannot_move_changes_no_bit(options):
    with_tuner = stochastic_run(attach=True, **options)
    without = stochastic_run(attach=False, **options)
    shapes = [t.shape for t in without]
    with_tuner = [t for t in with_tuner if t.shape in shapes]
    assert len(with_tuner) == len(without)
    assert all(torch.equal(a, b) for a, b in zip(with_tuner, without, strict=True))


def test_a_step_that_overflows_in_half_precision_moves_nothing():
    space = mf.Space(weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3))
    model = nn.Linear(FEATURES, CLASSES).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)  # overflows float16
    train, valid = batches(EXAMPLES, FEATURES)
    tuner = mf.Tuner(model, optimizer, space, cross_entropy, [train], [valid], schedule=1, horizon="step")
    before, skipped, moved = space.as_dict(), 0, 0
    for _ in range(40):
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = cross_entropy(model, train)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            assert space.as_dict() == before
            skipped += 1
        else:
            moved += space.as_dict() != before
        before = space.as_dict()
    assert skipped >= 5
    assert moved >= 5
    assert tuner.log()["skipped"] >= 0


@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_a_compiled_model_in_half_precision_is_tuned(mode):
    space = mf.Space(
        dropout=mf.Float(0.0, 0.6, init=0.2), weight_decay=mf.Float(1e-4, 1.0, log=True, init=0.01)
    )
    layers = nn.Linear(FEATURES, 64), nn.GELU(), mf.nn.Dropout(space["dropout"]), nn.Linear(64, CLASSES)
    model = torch.compile(nn.Sequential(*layers).cuda(), mode=mode)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    train, valid = batches(EXAMPLES, FEATURES)

    def loss_fn(model, batch):
        with torch.autocast("cuda", torch.bfloat16):
            return cross_entropy(model, batch)

    start = space.as_dict()
    tuner = mf.Tuner(model, optimizer, space, loss_fn, [train], [valid], schedule=5, total_steps=60)
    for _ in range(60):
        optimizer.zero_grad()
        loss_fn(model, train).backward()
        optimizer.step()
    assert tuner.log()["hypersteps"] >= 5
    assert all(space.as_dict()[name] != start[name] for name in space)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_unchanged_script_is_tuned_with_flash_attention_and_inductor(dtype):
    options = ["--tune", "--steps", "60", "--dtype", dtype]
    ran = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    print(found)
    assert found["hypersteps"] >= 2
    assert found["undecided"] == found["skipped"] == 0
    assert found["weight_decay"] != pytest.approx(0.1)


def peak(attach, horizon="run"):
    """Bytes at the peak of eight steps, over what lies there before them."""
    torch.manual_seed(0)
    space = mf.Space(
        noise=mf.Float(0.0, 1.0, init=0.3), weight_decay=mf.Float(1e-5, 1e-1, log=True, init=1e-3)
    )
    space.requires_grad_(attach)
    layers = nn.Linear(784, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 10)
    model = nn.Sequential(mf.nn.GaussianNoise(space["noise"]), *layers).cuda()
    optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-3, fused=True)
    x = [(torch.rand(100, 784, device="cuda"), torch.randint(0, 10, (100,), device="cuda")) for _ in range(2)]
    torch.cuda.synchronize()
    if attach:
        mf.Tuner(model, optimizer, space, cross_entropy, x[:1], x[1:], schedule=2, horizon=horizon)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(8):
        optimizer.zero_grad()
        cross_entropy(model, x[0]).backward()
        optimizer.step()
    return torch.cuda.max_memory_allocated()


def test_memory_of_a_tuned_run():
    peak(False)
    plain, tuned, step = peak(False), peak(True), peak(True, "step")
    print(f"memory: plain {plain / 2**20:.1f} MiB, run {tuned / plain:.3f}, step {step / plain:.3f}")
    assert tuned < 2.2 * plain
