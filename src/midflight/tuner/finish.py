"""Choose the best among the weights that a run can end with."""

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from midflight._tensors import Tensors
from midflight.errors import warn
from midflight.tuner.data import examples_of
from midflight.tuner.distributed import Processes
from midflight.tuner.hyperstep import HyperStep
from midflight.tuner.live import signals_wait, weights_at
from midflight.tuner.sharded import part


def choose(hyperstep: HyperStep, candidates: Mapping[str, Tensors]) -> dict[str, float]:
    """Give the model the weights and buffers with the least validation loss.

    All candidates are evaluated on the same batches of T2, in the same order. A batch is weighted by its
    number of examples. A batch on which no candidate has a finite loss is left out. If a candidate's loss is
    not finite on a batch where another's is finite, this counts against the candidate.

    Args:
        hyperstep: the hyper-step of the run, with its model and T2.
        candidates: name -> weights and buffers. The model's present weights take part too, as "last".

    Returns:
        name -> validation loss, the best first.
    """
    live = hyperstep.live
    candidates = {name: at for name, at in candidates.items() if _fits(at, hyperstep.weights())}
    tensors = {**dict(live.model.named_buffers()), **hyperstep.params()}
    with hyperstep.processes.together():
        losses = _losses(hyperstep, {"last": {}, **candidates}, tensors)
    ranked = dict(sorted(losses.items(), key=lambda item: (math.isnan(item[1]), item[1])))
    best = next(iter(ranked))
    if math.isnan(ranked[best]):
        warn(
            "no weights of this run have a finite validation loss, and the model keeps its last ones; lower "
            "the learning rate, or look for the step at which the loss became NaN.",
        )
    with signals_wait(), torch.no_grad():
        for name, value in candidates.get(best, {}).items():
            part(tensors[name]).copy_(value)
    return ranked


def _losses(hyperstep: HyperStep, candidates: Mapping[str, Tensors], tensors: Tensors) -> dict[str, float]:
    """Return each candidate's validation loss with its values in place of `tensors`."""
    live = hyperstep.live
    found: dict[str, list[tuple[float, int]]] = {}
    batches = None if hyperstep.t2.repeats else list(hyperstep.t2.whole_pass())
    with hyperstep.randomness.borrowed():
        states = hyperstep.randomness.snapshot()
    for name, at in candidates.items():
        with live.borrowed(), weights_at(tensors, at):
            hyperstep.randomness.rewind(states)
            stream = hyperstep.t2.whole_pass() if batches is None else batches
            found[name] = [
                (live.number(partial(live.valid_loss, hyperstep.valid_loss, batch)), examples)
                for batch, examples in _in_step(stream, hyperstep.processes)
            ]
    return _means(found, hyperstep.processes)


def _in_step(stream: Iterable[Any], processes: Processes) -> Iterator[tuple[Any, int]]:
    """Yield each batch with its number of examples; if weights are sharded, equally often in all processes.

    A pass of FSDP needs all of them. So a process without further batches repeats its last one, with 0
    examples.
    """
    batch, batches = None, iter(stream)
    while True:
        following = next(batches, _END)
        here = following is not _END
        if not processes.parts.any([here])[0]:
            return
        batch = following if here else batch
        yield batch, (examples_of(batch) or 1) if here else 0


_END = object()


def _fits(candidate: Tensors, params: Tensors) -> bool:
    """Return whether a candidate has all present weights; layers may have been pruned or replaced since."""
    return all(name in candidate and candidate[name].shape == p.shape for name, p in params.items())


def _means(found: Mapping[str, list[tuple[float, int]]], processes: Processes) -> dict[str, float]:
    """Return each candidate's mean loss over the examples of batches that are finite for some candidate."""
    columns: list[Any] = list(zip(*found.values(), strict=False))
    kept = [
        n for n, column in enumerate(columns) if any(math.isfinite(loss) and size for loss, size in column)
    ]
    means = {}
    for name, losses in found.items():
        chosen = [losses[n] for n in kept]
        pair = sum(loss * size for loss, size in chosen), sum(size for _, size in chosen)
        whole, total = processes.sum_of(pair)
        means[name] = whole / total if total else math.nan
    return means
