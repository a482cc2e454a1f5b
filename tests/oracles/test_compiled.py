"""The compiled rule is the rule."""

import pytest
import torch

import midflight as mf
from midflight import updates
from midflight.updates import Update, read_options, rule_for, step_ahead, step_pullback
from midflight.updates.adam import Adam
from midflight.updates.compiled_adam import CompiledAdam, _compiled

SHAPES = [(70_000,), (300, 7), (5,), (1,), ()]  # the first is cut into blocks unless the rule is compiled


@pytest.fixture(scope="module")
def compiled():
    try:
        return CompiledAdam(torch.device("cpu"))
    except mf.errors.NoCompiler as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"eps": 1e-3}], ids=str)
def test_step_and_pullback_equal_those_of_the_plain_rule(compiled, kind, options):
    torch.manual_seed(0)
    params = {str(i): torch.randn(s, dtype=torch.float64) for i, s in enumerate(SHAPES)}
    optimizer = kind(params.values(), lr=1e-2, weight_decay=0.3, **options)
    for _ in range(3):
        for p in params.values():
            p.grad = torch.randn(p.shape, dtype=p.dtype)
        optimizer.step()
    grads = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in params.items()}
    v = {n: torch.randn(p.shape, dtype=p.dtype) for n, p in params.items()}
    states = {n: optimizer.state[p] for n, p in params.items()}
    decay = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found = []
    for rule in (rule_for(optimizer), compiled):
        updates = dict.fromkeys(
            params, Update(rule, {**read_options(optimizer.param_groups[0]), "weight_decay": decay})
        )
        w, [(_, derivative)] = step_pullback(
            {n: t.clone() for n, t in v.items()}, params, grads, states, updates
        )
        found.append((step_ahead(params, grads, states, updates), w, derivative))
    for ours, plain in zip(found[1][:2], found[0][:2], strict=True):
        for n in params:
            torch.testing.assert_close(ours[n], plain[n], rtol=1e-11, atol=1e-13)
    assert float(found[1][2]) == pytest.approx(float(found[0][2]), rel=1e-11)


@pytest.fixture
def no_program_yet():
    """torch runs what it has compiled for eight kinds of shapes as it is."""
    torch.compiler.reset()


@pytest.mark.usefixtures("no_program_yet")
@pytest.mark.parametrize(
    ("kind", "options", "many"),
    [
        (torch.optim.Adam, {}, False),
        (torch.optim.AdamW, {}, False),
        (torch.optim.Adam, {}, True),
        pytest.param(torch.optim.AdamW, {}, True, marks=pytest.mark.slow),  # compiles for seconds
        (torch.optim.AdamW, {"amsgrad": True}, True),
    ],
    ids=str,
)
def test_a_step_of_all_weights_equals_a_step_of_each(compiled, kind, options, many):
    torch.manual_seed(0)
    params = [torch.randn(4, *shape, dtype=torch.float64) for shape in ((300, 7), (5,), ())]
    optimizer = kind(params, lr=1e-2, **options)
    rule, plain, states = compiled, rule_for(optimizer), [{} for _ in params]
    decay = torch.rand(4, dtype=torch.float64) if many else torch.rand((), dtype=torch.float64)
    of_each = [
        {
            **read_options(optimizer.param_groups[0]),
            "weight_decay": decay.reshape(-1, *[1] * (p.ndim - 1)) if many else decay,
            "lr": 1e-2 / (i + 1),
        }
        for i, p in enumerate(params)
    ]
    for _ in range(3):
        grads = [torch.randn_like(p) for p in params]
        grads[0] = grads[0][0].expand_as(params[0])  # lies alike for all rows
        weights = list(zip(params, grads, states, of_each, strict=True))
        found, expected = rule.step_all(weights), [plain.step(*weight) for weight in weights]
        for (new, state), (new_by_plain, state_by_plain) in zip(found, expected, strict=True):
            torch.testing.assert_close(new, new_by_plain, rtol=1e-11, atol=1e-13)
            assert state.keys() == state_by_plain.keys()
            for key, t in state.items():
                torch.testing.assert_close(t, state_by_plain[key], rtol=1e-11, atol=1e-13, check_dtype=False)
        params, states = [list(tensors) for tensors in zip(*found, strict=True)]


def test_a_missing_compiler_is_told_in_a_sentence(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no g++ here\nand more")

    _compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(mf.errors.NoCompiler, match=r"C\+\+ compiler .* no g\+\+ here; install"):
        updates.compiled(Adam(), torch.device("cpu"))
    _compiled.cache_clear()


def test_rules_without_a_compiled_form_stay_as_they_are():
    rule = rule_for(torch.optim.SGD([torch.zeros(1)], lr=0.1))
    assert updates.compiled(rule, torch.device("cpu")) is rule
