"""A cohort of the study equals its arms run alone, noise apart, which it draws for all members together."""

import pytest
import torch
from torch import nn

from midflight.errors import NoCompiler
from midflight.nn import GaussianNoise
from midflight.study import arm as arms_of_a_study
from midflight.study.arm import cohorts, prepare, run_arm, run_cohort, space_of
from midflight.study.run import run_study
from midflight.study.spec import Arm, preset
from midflight.study.store import Store
from midflight.tuner import Population

SPEC = preset(
    "smoke", train=200, valid=100, epochs=3, networks=("16-16",), starts=3, landscape=2, batch=25, every=1,
    estimator=("one_step", "t1t2"),
)  # fmt: skip
"""A hyper-step at every step, and batches no larger than its examples: the tuner sees the loop's batches."""
NETWORK = SPEC.networks[0]


def without_draws(self, x):
    """The level in place of a draw: the same in a cohort and alone, and still differentiable."""
    return self.std.value.to(x) * torch.cos(torch.arange(x.shape[-1], dtype=x.dtype, device=x.device))


@pytest.mark.parametrize(
    ("kind", "estimator", "hyper_optimizer"),
    [
        ("initial", "", "sign"),
        ("landscape", "", "sign"),
        ("tuned", "one_step", "sign"),
        ("tuned", "t1t2", "sign"),
        ("tuned", "one_step", "adam"),
        ("tuned", "paper", "adam"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_cohort_equals_its_arms_run_alone(kind, estimator, hyper_optimizer, device, monkeypatch):
    monkeypatch.setattr(GaussianNoise, "noise", without_draws)
    monkeypatch.setattr(
        torch, "randn", lambda shape, **kind: torch.arange(shape[-1], **kind).cos()
    )  # of paper
    spec = preset("smoke", **{**vars(SPEC), "hyper_optimizer": hyper_optimizer, "device": device})
    arms = [Arm(NETWORK, kind, estimator, i) for i in range(3)]
    starts = [spec.grid_point(i) if kind == "landscape" else spec.start(i) for i in range(3)]
    data, told = prepare(spec), []
    together = run_cohort(spec, arms, starts, data, told.append)
    for arm, start, row in zip(arms, starts, together, strict=True):
        alone = run_arm(spec, arm, start, data, lambda *_: None).result
        assert row.arm == arm
        assert row.result.start == start
        assert row.result.valid_errors == pytest.approx(alone.valid_errors, abs=0.011)  # one image of 100
        assert row.result.valid_loss == pytest.approx(alone.valid_loss, rel=1e-3)  # float32, 12 steps of Adam
        assert row.result.end == pytest.approx(alone.end, abs=1e-3)
        assert (row.result.test_error is None) == (kind == "landscape")
        if kind != "landscape":
            assert row.result.test_error == pytest.approx(alone.test_error, abs=0.006)
        assert len(row.result.trajectory) == len(alone.trajectory)
        for ours, theirs in zip(row.result.trajectory, alone.trajectory, strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
        last = [done for done in told if done.arm == arm][-1]
        assert (last.epoch, last.valid_error) == (3, row.result.valid_error)
        assert last.point == pytest.approx(row.result.end, abs=1e-6)


def test_without_a_compiler_a_cohort_runs_uncompiled(monkeypatch):
    asked = []

    def population(*args, compile=False, **options):
        asked.append(compile)
        if compile:
            raise NoCompiler("no g++ here")
        return Population(*args, **options)

    monkeypatch.setattr(arms_of_a_study, "Population", population)
    spec = preset("smoke", **{**vars(SPEC), "epochs": 1})
    arms, data = [Arm(NETWORK, "tuned", "one_step", 0)], prepare(spec)
    run_cohort(spec, arms, [spec.start(0)], data, lambda *_: None)
    assert asked == [False]
    with pytest.warns(UserWarning, match=r"without compilation, so it is slower: no g\+\+ here"):
        arms_of_a_study._compiled_if_possible(
            preset("smoke", **{**vars(SPEC), "device": "cuda"}), 1, lambda space: nn.Linear(4, 3),
            space_of(spec, spec.start(0)), torch.optim.Adam, loss_fn=None, valid_loader=[0],
        )  # fmt: skip
    assert asked == [False, True, False]


def test_a_study_in_cohorts_is_whole_resumes_and_reruns_follow_their_tuned_twin(tmp_path):
    with Store(tmp_path / "s.sqlite") as store:
        store.open_run("r", SPEC, "here")
        seen = []

        def stop_half_way(row):
            seen.append(row)
            if len(seen) == 8:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run_study(SPEC, store, "r", 1, on_row=stop_half_way, together=True)
        assert len(store.rows("r")) == 8
        run_study(SPEC, store, "r", 1, on_row=seen.append, together=True)
        rows = {row.arm: row for row in store.rows("r")}
        assert len(seen) == len(rows) == len(list(SPEC.arms()))
        for arm, row in rows.items():
            if arm.kind == "rerun":
                tuned = rows[Arm(NETWORK, "tuned", arm.estimator, arm.index)]
                assert row.result.start == row.result.end == tuned.result.end
        run_study(SPEC, store, "r", 1, on_row=lambda row: pytest.fail("ran twice"), together=True)


def test_tf32_is_for_the_length_of_a_study_on_a_gpu(tmp_path, monkeypatch):
    seen = []

    def interrupted(*_):
        seen.append(torch.get_float32_matmul_precision())
        raise KeyboardInterrupt

    monkeypatch.setattr("midflight.study.run.prepare", lambda spec: prepare(SPEC))
    monkeypatch.setattr("midflight.study.run.cohorts", interrupted)
    with Store(tmp_path / "s.sqlite") as store:
        for device in ("cuda", "cpu"):
            spec = preset("smoke", **{**vars(SPEC), "device": device})
            store.open_run(device, spec, "here")
            with pytest.raises(KeyboardInterrupt):
                run_study(spec, store, device, 1, together=True)
            assert torch.get_float32_matmul_precision() == "highest"
    assert seen == ["high", "highest"]


def test_cohorts_hold_one_kind_and_estimator_each_and_no_more_members_than_fit(monkeypatch):
    arms = list(SPEC.arms())
    groups = list(cohorts(SPEC, arms, 64))
    assert sorted(str(arm) for group in groups for arm in group) == sorted(map(str, arms))
    assert [(g[0].kind, g[0].estimator, len(g)) for g in groups] == [
        ("initial", "", 3), ("tuned", "one_step", 3), ("tuned", "t1t2", 3),
        ("rerun", "one_step", 3), ("rerun", "t1t2", 3), ("landscape", "", 3), ("landscape", "", 1),
    ]  # fmt: skip
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda device: (4 * 16 * (64 * 16 + 16 * 27 + 42) * 2.6, 0)
    )
    on_gpu = preset("smoke", **{**vars(SPEC), "device": "cuda"})
    assert [len(g) for g in cohorts(on_gpu, arms, 64)][:2] == [2, 1]
