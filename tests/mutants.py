"""Break the code on purpose, once per oracle, and see its test fail.

    python tests/mutants.py            all of them
    python tests/mutants.py adam       those whose file or change mentions "adam"

Each mutant is one replacement in a copy of src/; it is caught when the named tests fail.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ORACLES, PARITY, PROPERTY = "tests/oracles", "tests/parity", "tests/property/test_space.py"
STUDY, CHECK = "tests/e2e/test_study.py::test_", "tests/e2e/test_check.py"
TUNER, HORIZON, ROLLBACK, SCHEDULE, MIXED, ROTATION, TRAJECTORY, DIAGNOSTICS, POPULATION, ALIVE = (
    f"tests/tuner/test_{name}.py"
    for name in (
        "tuner", "horizon", "rollback", "schedule", "mixed_partial", "rotation", "trajectory", "diagnostics",
        "population", "alive",
    )
)  # fmt: skip
SPACES, ONLINE = "tests/search/test_search_space.py", "tests/search/test_online.py"
RESUME = "tests/search/test_resume.py::test_"
BITS = RESUME + "an_interrupted_trial_continues_bit_for_bit"
PROMOTED = RESUME + "a_promoted_trial_continues_bit_for_bit"
WORKERS = RESUME + "ten_killed_workers_of_four_lose_and_repeat_nothing"
KINDS = "tests/oracles/test_kinds.py"
COMPILED, COHORT = "tests/oracles/test_compiled.py", "tests/parity/test_cohort.py"
COST, BINDING = "tests/e2e/test_cost.py", "tests/faults/test_binding.py"
RAY = "tests/search/test_ray.py::test_"
MLP, AUTO, PARTS = (f"tests/automl/test_{name}.py::test_" for name in ("online_mlp", "auto", "parts"))
KILLS = "ten_kills_at_random_moments_lose_and_repeat_nothing"
PAIRED = "paired_arms_share_their_start_and_reruns_begin_where_tuning_ended"

MUTANTS = [
    ("updates/adam.py", 'scale * (1 - o["beta1"])', "scale", ORACLES),
    ("updates/adam.py", 'correction = (1 - o["beta2"] ** t) ** 0.5', "correction = 1.0", ORACLES),
    ("updates/adam.py", "safe_sqrt(s) / (1 - beta2**t) ** 0.5", "safe_sqrt(s)", PARITY),
    ("updates/adam.py", '(v, -o["lr"]) if o["decoupled_weight_decay"]', "(w, 1.0) if False", ORACLES),
    ("updates/adam.py", ".clamp_min_(torch.finfo(root.dtype).tiny)", "", ORACLES),
    ("updates/base.py", "torch.where(positive, x, 1).sqrt() * positive", "x.sqrt()", ORACLES),
    ("updates/sgd.py", "scale = 1 + momentum * passed if", "scale = passed if", ORACLES),
    ("updates/sgd.py", '(1 - options["dampening"]) * total', "total", PARITY),
    ("updates/base.py", 'total = -grad if options.get("maximize", False) else grad', "total = grad", PARITY),
    ("updates/base.py", "if decoupled:", "if False:", PARITY),
    ("updates/base.py", "total + decay * param", "total + decay * param.detach() * 0", PARITY),
    ("updates/nadam.py", "1 - product * mu_next", "1 - product", PARITY),
    ("updates/nadam.py", "mu_next / (1", "mu / (1", PARITY),
    ("updates/nadam.py", "product = plain(mu_product)", "product = mu_product.detach()", ORACLES),
    ("updates/radam.py", "rho <= 5", "rho <= 4", PARITY),
    ("updates/radam.py", "b = beta2.double()", "b = beta2.detach().double()", ORACLES),
    ("updates/adamax.py", 'total.abs() + options["eps"]', "total.abs()", PARITY),
    ("updates/adamax.py", "torch.maximum(beta2 *", "torch.maximum(float(beta2) *", ORACLES),
    ("updates/rmsprop.py", "s = s - average * average", "pass", PARITY),
    ("updates/rmsprop.py", "direction = momentum *", "direction = float(momentum) *", ORACLES),
    ("updates/rmsprop.py", "safe_sqrt(s)", "s.sqrt()", ORACLES),
    ("updates/adagrad.py", 'rate = options["lr"] / (1 + (t - 1)', 'rate = options["lr"] / (1 + t', PARITY),
    ("updates/adagrad.py", "safe_sqrt(s)", "s.sqrt()", ORACLES),
    ("updates/adadelta.py", "(1 - rho) * delta * delta", "(1 - rho) * total * total", PARITY),
    ("updates/adadelta.py", "(a + eps).sqrt()", "(a + eps).sqrt().detach()", ORACLES),
    ("updates/adafactor.py", ".clamp(min=eps2)", "", PARITY),
    ("updates/adafactor.py", "(_rms(u) /", "(_rms(u).detach() /", ORACLES),
    ("updates/adafactor.py", "norm: Tensor = x.norm()", "norm: Tensor = (x * x).sum().sqrt()", ORACLES),
    ("updates/asgd.py", "average + mu * (new - average)", "average + (new - average)", PARITY),
    ("updates/asgd.py", "eta * (lambd * param", "eta * (float(lambd) * param", ORACLES),
    ("updates/muon.py", "_lerp(total, buffer, momentum)", "_lerp(buffer, total, momentum)", PARITY),
    ("updates/muon.py", "direction.detach().bfloat16()", "direction.detach()", PARITY),
    ("updates/__init__.py", "if kind in REFUSED:", "if False:", PARITY),
    ("hypergrad/one_step.py", 'if self.place == "next"', "if False", ORACLES),
    ("hypergrad/t1t2.py", "pullback(replace(step, updates=plain), v)", "pullback(step, v)", ORACLES),
    ("hypergrad/paper.py", '-_number(u.options["lr"]) * along', "-along", ORACLES),
    ("hypergrad/paper.py", "torch.randn(", "torch.rand(", ORACLES),
    ("updates/blocks.py", "derivative if before is None else before[1] + derivative", "derivative", ORACLES),
    ("problem.py", "if missing:", "if False:", ORACLES),
    ("testing/oracles.py", "(12 * h)", "(11 * h)", ORACLES),
    ("transforms.py", "math.log(self.high / self.low) * raw", "2 * raw", PROPERTY),
    ("levels.py", ".clamp(min=0).detach()", ".clamp(min=0)", PROPERTY),
    ("levels.py", "0.05 * level.spec.high", "0.0 * level.spec.high", PROPERTY),
    ("nn/noise.py", "x + self.noise(x) if self.training else x", "x + self.noise(x)", KINDS),
    ("nn/noise.py", "x * (1 + self.noise(x))", "x + self.noise(x)", KINDS),
    ("nn/dropout.py", "(2 * at * (1 - at))", "(at * (1 - at))", KINDS),
    ("nn/dropout.py", ">= at) / (1 - at)", ">= at) / 1", KINDS),
    ("nn/dropout.py", "constant(self.rate, rate.detach())", "rate", KINDS),
    ("nn/augment.py", 'sx=amounts["shear"].deg2rad()', 'sx=amounts["shear"]', KINDS),
    ("nn/augment.py", "mean + self._amount", "self._amount", KINDS),
    ("nn/augment.py", 'amounts["scale"].exp()', "(zero + 1)", KINDS),
    ("losses.py", "torch.where(top, others.logsumexp(1, keepdim=True), ", "(", KINDS),
    ("losses.py", ".clamp(min=torch.finfo(logits.dtype).min)", "", KINDS),
    ("losses.py", "else w[target]", "else size", KINDS),
    ("losses.py", "losses = a * losses", "losses, size = a * losses, a * size", ALIVE),
    ("losses.py", "y + of_y * (y[order] - y)", "y", KINDS),
    ("penalties.py", "torch.where(squares > 0, squares, 1).sqrt() * (squares > 0)", "squares.sqrt()", KINDS),
    ("penalties.py", ".sum() / 2", ".sum()", KINDS),
    ("penalties.py", "w @ w.T if len(w) <= w.shape[1] else w.T @ w", "w @ w.T", KINDS),
    ("testing/cases.py", "return torch.full_like(rate, 0.3)", "return rate.detach()", KINDS),
    ("tuner/hyper_optimizer.py", "max(0.0, 1 - done)", "1.0", TUNER),
    ("tuner/hyper_optimizer.py", "m * m.abs()", "m", TUNER),
    ("tuner/hyper_optimizer.py", ' / (1 - self.MEMORY ** state["step"])', "", TUNER),
    ("tuner/finish.py", "(math.isnan(item[1]), item[1])", "-item[1]", TUNER),
    ("tuner/finish.py", "tensors[name].copy_(value)", "pass", TUNER),
    ("tuner/tuner.py", 'state["steps"], state["hypersteps"]', '0, state["hypersteps"]', TUNER),
    ("tuner/live.py", "params[name].data = data", "pass", TUNER),
    ("tuner/live.py", "module.training = mode", "module.training = True", TUNER),
    ("tuner/data.py", 'for _ in range(state["used"]):', "for _ in ():", TUNER),
    ("tuner/data.py", 'self._randomness.rewind(restored(state["states"]))', "pass", TUNER),
    ("tuner/live.py", "for place in places[id(known[name])]", 'for place in ["model." + name]', MIXED),
    ("tuner/live.py", "everywhere, (), tie_weights=False", "everywhere, ()", MIXED),
    ("tuner/hyper_optimizer.py", "raw.clamp_(0, 1)", "pass", TUNER),
    (
        "tuner/tuner.py",
        "if all(map(math.isfinite, losses)) and all_finite(look.hypergradients.values()):",
        "if True:",
        TUNER,
    ),
    ("tuner/rollback.py", "self.shrink /= 2", "pass", ROLLBACK),
    ("tuner/tuner.py", "self._move.shrink(self._guard.shrink)", "pass", ROLLBACK),
    ("tuner/rollback.py", "self.shrink = min(1.0, 2 * self.shrink)", "pass", ROLLBACK),
    (
        "tuner/rollback.py",
        "optimizer.load_state_dict(_copy(state))",
        "optimizer.load_state_dict(state)",
        ROLLBACK,
    ),
    (
        "tuner/rollback.py",
        '"model": _copy(self._model.state_dict())',
        '"model": self._model.state_dict()',
        ROLLBACK,
    ),
    ("tuner/rollback.py", "optimizer.zero_grad(set_to_none=True)", "pass", ROLLBACK),
    ("tuner/diagnostics.py", "(raw > 0) & (raw < 1)", "raw > 2", DIAGNOSTICS),
    ("tuner/diagnostics.py", "SIGNIFICANT * error", "0.0 * error", DIAGNOSTICS),
    ("tuner/diagnostics.py", "if t3 - t2 <=", "if t2 - t3 <=", DIAGNOSTICS),
    ("tuner/trajectory.py", "before = max(0, after - 1)", "before = after", TRAJECTORY),
    ("tuner/trajectory.py", "self._stride *= 2", "pass", TRAJECTORY),
    ("tuner/trajectory.py", "            self._steps += 1", "            pass", TRAJECTORY),
    ("tuner/rotation.py", "if self._rotation.fold != fold:", "if False:", ROTATION),
    ("tuner/rotation.py", "if self._turns:", "if True:", ROTATION),
    (
        "tuner/hyperstep.py",
        "steering = self._binding.steering if self.horizon.looks else []",
        "steering = []",
        HORIZON,
    ),
    ("tuner/binding.py", "(key in known and key not in used)", "False", TUNER),
    (
        "study/store.py",
        "INSERT OR IGNORE INTO arms",
        "INSERT OR REPLACE INTO arms",
        STUDY + "a_row_that_does_not_fit_is_an_error_and_leaves_the_others",
    ),
    (
        "study/store.py",
        "if owner != _APPLICATION_ID:",
        "if False:",
        STUDY + "a_store_that_cannot_be_one_is_refused_and_left_alone",
    ),
    ("processes.py", "threading.Thread(target=_end_with_parent, daemon=True).start()", "pass", STUDY + KILLS),
    (
        "study/run.py",
        "if arm not in done]",
        "]",
        STUDY + PAIRED,
    ),
    (
        "study/run.py",
        "return done[_tuned_twin(arm)].result.end",
        "return spec.start(arm.index)",
        STUDY + PAIRED,
    ),
    ("study/arm.py", "torch.manual_seed(seed)", "pass", STUDY + KILLS),
    ("tuner/horizon.py", "self.caution).to(p)", "0.0).to(p)", HORIZON),
    ("tuner/horizon.py", "torch.promote_types(p.dtype, torch.float32)", "p.dtype", HORIZON),
    ("tuner/horizon.py", "(_window(progress) * steps)", "steps", HORIZON),
    ("tuner/horizon.py", "min(1.0, (1 - progress) / LAST)", "1.0", HORIZON),
    ("tuner/horizon.py", "(WINDOW - LAST_WINDOW) * left", "WINDOW * left", HORIZON),
    (
        "tuner/tuner.py",
        "            self._hyperstep.params(), self.steps, self._progress()",
        "            self._hyperstep.params(), self.steps, None",
        HORIZON,
    ),
    ("tuner/horizon.py", "steps >= self._steps + max(SAMPLED, window / SAMPLES)", "True", HORIZON),
    ("tuner/horizon.py", "(1 - RECENT) * self._looks", "0", HORIZON),
    ("tuner/horizon.py", "STEADY * self.calm", "STEADY", HORIZON),
    ("tuner/horizon.py", "share = 1 / self._weight", "share = 1.0", HORIZON),
    ("tuner/hyperstep.py", "if all_finite(found.values()):", "if True:", ROLLBACK),
    ("tuner/tuner.py", "set_calm(self.horizon.calm)", "set_calm(1.0)", HORIZON),
    ("tuner/horizon.py", "if c2 <= self._best_loss:", "if True:", HORIZON),
    (
        "tuner/horizon.py",
        '"mean": {name: g.clone() for name, g in self._mean.items()}',
        '"mean": {}',
        HORIZON,
    ),
    ("tuner/horizon.py", "math.sqrt(progress)", "0.0", HORIZON),
    (
        "tuner/horizon.py",
        '"average": {name: a.clone() for name, a in self._average.items()}',
        '"average": {}',
        HORIZON,
    ),
    (
        "tuner/hyperstep.py",
        "self.horizon.place(here.params, lambda: self._estimator.at(here))",
        "self._estimator.at(here)",
        HORIZON,
    ),
    ("tuner/hyperstep.py", "with weights_at(params, self.horizon.average()):", "if True:", HORIZON),
    ("space.py", "(raw >= 1).sum()", "(raw >= 2).sum()", PROPERTY),
    ("tuner/schedule.py", "(self._taken + 1) ** 2", "(self._taken + 1) * planned", SCHEDULE),
    ("tuner/schedule.py", "min(self.AHEAD, early)", "math.exp(early)", SCHEDULE),
    ("tuner/schedule.py", "due = self._tuned - once", "due = -once", SCHEDULE),
    ("tuner/schedule.py", "once * (1 - 1 / early)", "once", SCHEDULE),
    ("tuner/schedule.py", "once * (1 - 1 / early)", "0", SCHEDULE),
    ("tuner/schedule.py", "        elif hyper:", "        if hyper:", SCHEDULE),
    ("tuner/schedule.py", "self.REACH)))", "0.5)))", SCHEDULE),
    ("tuner/schedule.py", "return min(longest, max(shortest, ", "return min(9.0, max(0.0, ", SCHEDULE),
    ("tuner/schedule.py", "steps = (self._hyper.value - plain)", "steps = self._hyper.value", SCHEDULE),
    ("tuner/tuner.py", "self._guard.shrink * self.schedule.step_scale", "self._guard.shrink", SCHEDULE),
    (
        "tuner/hyper_optimizer.py",
        "self.ALONE if agreement is None",
        "self.AVERAGED if agreement is None",
        TUNER,
    ),
    ("tuner/hyper_optimizer.py", "calm * (self.AVERAGED", "(self.AVERAGED", TUNER),
    ("tuner/schedule.py", "took = alike.value", "pass", SCHEDULE),
    ("tuner/schedule.py", "self._tuned += took - usual", "self._tuned += usual", SCHEDULE),
    ("tuner/schedule.py", "self._since > self.AFTERMATH and not busy", "not hyper", SCHEDULE),
    ("tuner/schedule.py", "self._since > self.AFTERMATH and not busy", "not busy and not hyper", SCHEDULE),
    (
        "updates/compiled_adam.py",
        "map(flat[i].of, _moving",
        "map(lambda t: t.reshape(flat[i]._rows, -1), _moving",
        POPULATION,
    ),
    ("updates/flat.py", "kept=int(rows > 1)", "kept=0", COMPILED),
    (
        "updates/compiled_adam.py",
        "return Adam if _rows(options) == 1 else UpdateRule",
        "return Adam",
        POPULATION,
    ),
    ("updates/compiled_adam.py", 'bool(many - {"weight_decay"})', "False", POPULATION),
    (
        "updates/compiled_adam.py",
        "alike.setdefault((float(step_number(state)), *_numbers(state, options)), [])",
        "alike.setdefault((1.0, *_numbers(state, options)), [])",
        COMPILED,
    ),
    (
        "updates/compiled_adam.py",
        "return shrink * p - a * m / (s.sqrt() + e), m, s",
        "return shrink * p - a * m / (s.sqrt() + e), m, m",
        COMPILED,
    ),
    ("hypergrad/paper.py", ".sum_to_size(decay.shape)", ".sum()", COHORT),
    ("hypergrad/paper.py", "members = 0 if step.members is None else 1", "members = 0", COHORT),
    (
        "tuner/data.py",
        "torch.Generator().manual_seed(seed) for seed in seeds",
        "torch.Generator() for seed in seeds",
        COHORT,
    ),
    ("tuner/population.py", "values[h].reshape(-1, *[1] * dims)", "values[h].mean()", POPULATION),
    ("tuner/population.py", 'randomness="different"', 'randomness="same"', POPULATION),
    (
        "tuner/population.py",
        "order[:count], order.flip(0)",
        "order[1 : count + 1], order.flip(0)",
        POPULATION,
    ),
    ("tuner/population.py", "*self.state.values(), *histories", "*histories", POPULATION),
    ("tuner/population.py", "*self.state.values(), *histories", "*self.state.values()", POPULATION),
    ("tuner/population.py", 'nan_to_num(nan=float("inf"))', "nan_to_num(0.0)", POPULATION),
    (
        "tuner/population.py",
        '"move": self._move_raws.state_dict()',
        '"move": Move(self.raws, SignSteps, lambda: 0.0).state_dict()',
        POPULATION,
    ),
    ("updates/blocks.py", "if len(self.names) == 1:  #", "if False:  #", POPULATION),
    (
        "updates/blocks.py",
        "all(t.stride() == first.stride() for t in others)",
        "bool(others or True)",
        "tests/oracles/test_blocks.py",
    ),
    ("updates/blocks.py", "if isinstance(x, Tensor) and x.ndim > 0}", "if False}", POPULATION),
    ("tuner/population.py", "if not self._rule.elementwise:", "if False:", POPULATION),
    ("tuner/population.py", "if any(True for _ in self._model.buffers()):", "if False:", POPULATION),
    ("tuner/population.py", "torch.stack(self._seen).mean(0)", "self._seen[0][:1]", POPULATION),
    (
        "tuner/population.py",
        "zip(*self.loaders, strict=False)",
        "zip(*self.loaders[:1] * 3, strict=False)",
        POPULATION,
    ),
    ("study/figures.py", "figure.get_figwidth() > 2 * PANEL", "True", "tests/test_report.py"),
    ("study/cohort.py", "except NoCompiler as error:", "except ZeroDivisionError as error:", COHORT),
    (
        "automl/limit.py",
        "torch.set_grad_enabled(grad)",
        "pass",
        PARTS + "a_time_limit_leaves_gradients_on",
    ),
    ("updates/blocks.py", "lies_whole(first) and", "", "tests/oracles/test_blocks.py"),
    (
        "trees.py",
        "t.clone() if shared[t.untyped_storage().data_ptr()] > 1 or",
        "t.clone() if",
        "tests/oracles/test_blocks.py",
    ),
    ("trees.py", " or 0 in t.stride()", "", "tests/oracles/test_blocks.py"),
    (
        "tuner/population.py",
        "keep_freed_memory(self.params.values())",
        "pass",
        "tests/property/test_memory.py",
    ),
    ("memory.py", 'w.device.type == "cpu"', "True", "tests/property/test_memory.py"),
    ("memory.py", "31 * 2**20", "2**20", "tests/property/test_memory.py"),
    ("study/run.py", "torch.set_float32_matmul_precision(before)", "pass", COHORT),
    ("study/cohort.py", "[seed + 1 for seed in seeds]", "[1 for seed in seeds]", COHORT),
    ("study/cohort.py", "seeds=seeds", "seeds=None", COHORT),
    ("study/cohort.py", 'group["lr"] *= spec.lr_end', 'group["lr"] *= 1.0', COHORT),
    ("study/cohort.py", "sorted(arms, key=kind), kind", "arms, kind", COHORT),
    ("study/cohort.py", "if tuned else spec.steps() + 1", "if True else 0", COHORT),
    ("study/cohort.py", "len(y) * population.evaluate", "population.evaluate", COHORT),
    (
        "search/engines/ray.py",
        'os.environ.setdefault("RAY_worker_niceness", "0")',
        "",
        RAY + "workers_have_the_priority_of_any_process",
    ),
    (
        "search/engines/ray.py",
        '"token authentication" in str(error.__cause__)',
        "False",
        RAY + "the_command_runs_on_a_given_cluster_and_says_what_one_with_a_token_wants",
    ),
    (
        "search/engines/ray.py",
        'self.search.became(job.number, result["chosen"])',
        "pass",
        RAY + "population_based_training_clones_what_is_good_and_moves_only_floats",
    ),
    (
        "search/engines/ray.py",
        "return {}",
        "return self.__dict__",
        RAY + "asha_on_ray_ends_most_trials_early_and_the_ledger_holds_them_all",
    ),
    (
        "search/engines/ray.py",
        "elif 0 < epoch < job.epochs:",
        "elif False:",
        RAY + "asha_on_ray_ends_most_trials_early_and_the_ledger_holds_them_all",
    ),
    (
        "search/engines/ray.py",
        "if isinstance(spec, Float):",
        "if isinstance(value, int):",
        RAY + "population_based_training_clones_what_is_good_and_moves_only_floats",
    ),
    ("study/cohort.py", "members[i : i + most]", "members[i:]", COHORT),
    ("study/run.py", "for arm in spec.arms() if arm not in done]", "for arm in spec.arms()]", COHORT),
    ("updates/compiled_adam.py", "raise NoCompiler(", "raise RuntimeError(", COMPILED),
    ("updates/compiled_adam.py", "return shrink * p - a", "return p - a", COMPILED),
    ("updates/compiled_adam.py", "m * total / both - (1 - beta1)", "m * total / both - 1.0", COMPILED),
    ("updates/compiled_adam.py", '-options["lr"] * v_theta', "-options['lr'] * w_theta", COMPILED),
    ("updates/compiled_adam.py", "return not state or", "return not state and", COMPILED),
    ("updates/blocks.py", "BLOCK = 2**16", "BLOCK = 2**12", COST),
    ("updates/adam.py", "denom = root + eps\n        w", "denom = (root + eps).clone()\n        w", COST),
    (
        "tuner/hyperstep.py",
        "found = self._estimator(here, v)",
        "self._estimator(here, {n: g.clone() for n, g in v.items()}); found = self._estimator(here, v)",
        COST,
    ),
    (
        "automl/network.py",
        "step - best_step <= recipe.patience * recipe.steps",
        "True",
        MLP + "training_ends_once_t2_has_had_no_new_best_for_long_enough",
    ),
    (
        "automl/network.py",
        "max(steps, round(passes * run.pass_steps))",
        "steps",
        MLP + "following_equals_a_loop_written_by_hand",
    ),
    (
        "automl/network.py",
        "step, step / total",
        "step",
        MLP + "following_shortens_its_average_towards_the_end",
    ),
    (
        "automl/network.py",
        "params[name].copy_(value)",
        "pass",
        MLP + "following_equals_a_loop_written_by_hand",
    ),
    (
        "automl/network.py",
        "        run.step()\n        step += 1",
        "        tuner.detach()\n        run.step()\n        step += 1",
        MLP + "the_three_move_from_their_starts_and_stay_in_their_ranges",
    ),
    (
        "automl/online_mlp.py",
        "with torch.random.fork_rng(devices=[]):",
        "if True:",
        MLP + "equal_seeds_give_equal_networks_and_leave_the_global_generator_alone",
    ),
    (
        "automl/online_mlp.py",
        "followed(rows, outputs",
        "followed(rows[~t2], outputs",
        MLP + "the_second_training_follows_the_first_on_all_rows",
    ),
    (
        "automl/validation.py",
        "chosen[order[np.unique(y[order], return_index=True)[1]]] = False",
        "pass",
        MLP + "t2_is_stratified_and_leaves_one_row_of_each_class",
    ),
    (
        "automl/validation.py",
        'order[np.argsort(y[order], kind="stable")]',
        "order",
        PARTS + "few_rows_make_five_stratified_folds_that_hold_each_row_once",
    ),
    (
        "automl/validation.py",
        "FEW_PER_SECOND * seconds",
        "math.inf",
        PARTS + "many_rows_for_the_time_are_held_out_once_and_sampled",
    ),
    ("automl/validation.py", "np.finfo(np.float32).eps", "0.0", PARTS + "losses_equal_those_of_scikit_learn"),
    (
        "automl/ensemble.py",
        "not losses[n] < best - ROUNDING * abs(best)",
        "False",
        PARTS + "copies_of_one_model_do_not_help",
    ),
    (
        "automl/ensemble.py",
        "enumerate(parts) if i != k]",
        "enumerate(parts)]",
        PARTS + "what_helps_only_where_it_was_chosen_does_not_help",
    ),
    (
        "automl/limit.py",
        "signal.signal(signal.SIGALRM, before)",
        "pass",
        PARTS + "time_runs_out_in_the_middle_of_a_loop_and_the_alarm_is_given_back",
    ),
    (
        "automl/limit.py",
        "and signal.getitimer(signal.ITIMER_REAL)[0] == 0",
        "",
        PARTS + "an_alarm_of_somebody_else_is_not_touched",
    ),
    (
        "automl/limit.py",
        "signal.setitimer(signal.ITIMER_REAL, AGAIN)",
        "pass",
        PARTS + "the_alarm_rings_again_if_it_was_not_heard",
    ),
    (
        "automl/columns.py",
        '"" if gap else str(v)',
        "str(v)",
        PARTS + "categories_become_text_and_a_gap_is_one_of_them",
    ),
    (
        "automl/columns.py",
        "np.where(self.empty_, 0.0, ",
        "(",
        AUTO + "each_family_learns_from_numbers_categories_and_gaps",
    ),
    (
        "automl/auto.py",
        "X.isetitem(column, of_column)",
        "pass",
        AUTO + "pandas_own_types_and_their_gaps_are_read",
    ),
    (
        "automl/families.py",
        "early_stopping=False",
        "max_bins=16",
        AUTO + "the_best_equals_its_row_built_by_hand",
    ),
    (
        "automl/judge.py",
        'row.state = "behind"',
        'row.state = "complete"',
        AUTO + "defaults_come_first_in_the_order_of_the_table_and_the_leaderboard_is_sorted",
    ),
    (
        "automl/judge.py",
        "row.loss += self.best.loss - fmean(self.best.fold_losses[:n])",
        "pass",
        AUTO + "a_configuration_that_falls_behind_is_given_up_and_its_loss_estimated",
    ),
    (
        "automl/judge.py",
        "with limit(allowed):",
        "if True:",
        AUTO + "a_learner_that_hangs_does_not_break_the_time",
    ),
    (
        "automl/judge.py",
        "expected = (self._clock() - began) * growth",
        "expected = 0.0",
        AUTO + "a_family_that_would_take_too_long_on_all_rows_is_skipped_after_a_fit_on_a_few",
    ),
    (
        "automl/judge.py",
        "(order.index(row.state), row.loss)",
        "row.number",
        AUTO + "defaults_come_first_in_the_order_of_the_table_and_the_leaderboard_is_sorted",
    ),
    (
        "automl/auto.py",
        "except KeyboardInterrupt:",
        "except ZeroDivisionError:",
        AUTO + "ctrl_c_leaves_the_best_so_far",
    ),
    (
        "automl/auto.py",
        "axis=0, weights=weights",
        "axis=0",
        AUTO + "the_ensemble_predicts_the_weighted_mean_of_its_members",
    ),
    (
        "automl/auto.py",
        "first=[default_of(name) for name in names],",
        "",
        AUTO + "defaults_come_first_in_the_order_of_the_table_and_the_leaderboard_is_sorted",
    ),
    (
        "search/engines/smac.py",
        ' or "fixed_params" in trial.system_attrs',
        "",
        PARTS + "smac_is_told_the_loss_of_each_configuration_that_was_tried",
    ),
    ("search/space.py", "1.0 if (name in a) != (name in b)", "0.0 if (name in a) != (name in b)", SPACES),
    ("search/space.py", "config[parent] in values", "True", SPACES),
    ("search/space.py", "if not both:", "if False:", SPACES),
    (
        "search/engines/optuna.py",
        "suggest_int(name, spec.low, spec.high, log=spec.log)",
        "suggest_int(name, spec.low, spec.high)",
        SPACES,
    ),
    (
        "search/engines/smac.py",
        "terms[0] if len(terms) == 1 else ConfigSpace.AndConjunction(*terms)",
        "terms[0]",
        SPACES,
    ),
    ("search/engines/smac.py", "return spec.choices[int(value)]", "return int(value)", SPACES),
    (
        "search/engines/smac.py",
        "self._tell(study.get_trials(deepcopy=False))",
        "pass",
        RESUME + "smac_is_told_what_an_earlier_process_found",
    ),
    (
        "search/checkpoint.py",
        '"torch": torch.get_rng_state()',
        '"torch": torch.Generator().get_state()',
        BITS,
    ),
    ("search/trial.py", "checkpoint.set_random_state(saved.random_state)", "pass", BITS),
    ("search/problems.py", 'optimizer.load_state_dict(state["optimizer"])', "pass", BITS),
    ("search/problems.py", 'batches.generator.set_state(state["batches"])', "pass", BITS),
    ("search/problems.py", 'tuner.load_state_dict(state["tuner"])', "pass", BITS),
    ("search/search.py", "starts = earlier[0].starts", "pass", "tests/search/test_engines.py"),
    (
        "search/search.py",
        'trial.set_user_attr("root", earlier[0].root if earlier else trial.number)',
        'trial.set_user_attr("root", trial.number)',
        PROMOTED,
    ),
    ("search/search.py", "self._to_continue.appendleft(trial)", "pass", WORKERS),
    (
        "search/trial.py",
        "self._tell(saved.points)",
        "pass",
        RESUME + "a_report_that_was_saved_but_not_heard_is_told_when_the_trial_goes_on",
    ),
    (
        "search/search.py",
        "if deaths >= DEATHS:",
        "if deaths > DEATHS:",
        RESUME + "a_trial_that_kills_its_worker_three_times_is_failed_and_the_search_goes_on",
    ),
    (
        "search/ledger.py",
        "if not self._is_cared_for(trial, owners, others_live)",
        "if False",
        RESUME + "every_storage_holds_the_same_and_resumes",
    ),
    (
        "search/ledger.py",
        'return owner == self.owner or _lives(owners.get(owner, {"seen": 0.0}))',
        "return owner == self.owner",
        RESUME + "two_processes_share_one_study",
    ),
    ("search/problems.py", "evaluate(model, test)[1]} if ends else {}", "evaluate(model, test)[1]}", ONLINE),
    ("search/search.py", "good = tuned[: len(tuned) // 2]", "good = tuned", ONLINE),
    ("search/search.py", "space.distance(config, r.config), r.loss", "r.loss, r.loss", ONLINE),
    ("search/search.py", "point.loss if math.isfinite(point.loss) else math.inf", "point.loss", ONLINE),
    (
        "search/ledger.py",
        "            if had_trials:",
        "            if study.get_trials(deepcopy=False):",
        RESUME + "a_process_may_begin_the_study_between_two_looks_of_another",
    ),
    (
        "search/ledger.py",
        "            if had_trials:",
        "            if False:",
        RESUME + "a_study_that_is_not_of_midflight_is_left_alone",
    ),
    ("search/ledger.py", 'ended = [r for r in good if r.state == "complete"]', "ended = good", ONLINE),
    ("space.py", " and not isinstance(bound, bool)", "", PROPERTY),
    ("space.py", "not math.isfinite(bound)", "False", PROPERTY),
    ("space.py", "if not isinstance(name, str) or not name:", "if False:", PROPERTY),
    ("space.py", "if not (math.isfinite(high) and low < high):", "if False:", PROPERTY),
    ("space.py", "if saved is None or tuple(saved) == _range(spec):", "if True:", PROPERTY),
    ("space.py", "if raw.shape != spec.shape:", "if False:", PROPERTY),
    ("space.py", "numbers.Number.register(Hyperparameter)", "pass", PROPERTY),
    ("space.py", "__array_priority__ = 1000", "_unused = 1000", PROPERTY),
    ("levels.py", "return value if _held is None else _held.setdefault(what, value)", "return value", CHECK),
    ("checking.py", "self._randomness.rewind(self._draws)", "pass", CHECK),
    ("tuner/binding.py", "_HOLDERS[optimizer] = WeakMethod(detach)", "pass", BINDING),
    ("tuner/binding.py", "self._left[key, option] = own, written", "pass", BINDING),
    ("tuner/binding.py", "if not stepped or known == now:", "if True:", BINDING),
    ("tuner/binding.py", "if (key, option) in self._left:", "if False:", BINDING),
    ("tuner/hooks.py", "hooks.move_to_end(self._first[id(o)].id, last=False)", "pass", BINDING),
    ("tuner/hyperstep.py", "self._binding.require_unread(read)", "pass", BINDING),
    ("tuner/hyperstep.py", "self.received.end()", "pass", BINDING),
    ("tuner/optimizers.py", 'partition(".")[0] not in WRAPPERS', 'partition(".")[0] in ""', BINDING),
    ("tuner/mixed_partial.py", "self._randomness.rewind(after)", "pass", MIXED),
    (
        "tuner/binding.py",
        "found[place.option] = value if factor == 1 else value * factor",
        "found[place.option] = value",
        TUNER,
    ),
    (
        "tuner/hooks.py",
        "self._begin(optimizer)\n            return loss",
        "return loss",
        TUNER,
    ),
]


def caught(file: str, old: str, new: str, tests: str) -> bool:
    """Whether `tests` fail once `old` is `new`."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "src", Path(folder) / "src")
        path = Path(folder) / "src/midflight" / file
        text = path.read_text()
        if text.count(old) != 1:
            raise SystemExit(
                f"{file} must hold {old!r} once, but holds it {text.count(old)} times; mend MUTANTS."
            )
        path.write_text(text.replace(old, new))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
        environment = {**os.environ, "PYTHONPATH": str(Path(folder) / "src")}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True).returncode == 1


def main() -> int:
    """Exit code 1 if a mutant survived."""
    chosen = [m for m in MUTANTS if len(sys.argv) < 2 or sys.argv[1] in " ".join(m)]
    survived = 0
    for mutant in chosen:
        found = caught(*mutant)
        survived += not found
        print("caught  " if found else "SURVIVED", mutant[0], "|", mutant[1], "->", mutant[2], flush=True)
    print(f"{len(chosen) - survived} caught, {survived} survived")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
