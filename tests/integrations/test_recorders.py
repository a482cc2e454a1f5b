"""Loggers take `Tuner.log` as it is; what was written is read back."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import midflight as mf

DRAWS = torch.Generator().manual_seed(0)
X, Y = torch.randn(64, 4, generator=DRAWS), torch.randn(64, 1, generator=DRAWS)


def run(on_hyperstep):
    """Return what the recorder was given, step -> name -> number."""
    seen = {}

    def noted(step, numbers):
        seen[step] = numbers
        on_hyperstep(step, numbers)

    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    space = mf.Space(
        lr=mf.Float(1e-3, 1.0, log=True, init=0.05), weight_decay=mf.default_range("weight_decay")
    )
    loss_fn = lambda model, batch: F.mse_loss(model(batch[0]), batch[1])  # noqa: E731
    parts = [(X[:32], Y[:32])], [(X[32:], Y[32:])]
    tuner = mf.Tuner(model, optimizer, space, loss_fn, *parts, schedule=4, total_steps=40, on_hyperstep=noted)
    for _ in range(40):
        optimizer.zero_grad()
        loss_fn(model, (X[:32], Y[:32])).backward()
        optimizer.step()
    tuner.detach()
    assert len(seen) > 5
    return seen


def of_name(name, seen):
    return pytest.approx({step: numbers[name] for step, numbers in seen.items()}, rel=1e-6)


NAMES = ("value/lr", "option/weight_decay", "valid_loss", "hypergradient/lr")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(tmp_path) as writer:
        seen = run(lambda step, numbers: [writer.add_scalar(k, x, step) for k, x in numbers.items()])
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    for name in NAMES:
        assert {e.step: e.value for e in found.Scalars(name)} == of_name(name, seen)


def records_of_wandb(data):
    """Yield the records of a log in LevelDB's format, whose blocks of 32 KiB hold parts of records.

    A part has a header of 7 bytes: checksum (4), length (2), 1 (whole), 2 (first), 3 (middle) or 4 (last).
    """
    record, place = b"", 7  # after wandb's own header
    while place + 7 <= len(data):
        if (room := -place % 32768 or 32768) < 7:
            place += room
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""


@pytest.mark.filterwarnings("ignore")  # of wandb's own
def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    with wandb.init(mode="offline", project="midflight") as writer:
        seen = run(lambda step, numbers: writer.log(numbers, step=step))
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    found = {}
    for data in records_of_wandb(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            found[items["_step"]] = items
    for name in NAMES:
        assert {step: items[name] for step, items in found.items()} == of_name(name, seen)


@pytest.mark.filterwarnings("ignore")  # of MLflow's own
def test_mlflow_on_sqlite(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.create_experiment("tuning", artifact_location=str(tmp_path))
    mlflow.set_experiment("tuning")
    with mlflow.start_run() as writer:
        seen = run(lambda step, numbers: mlflow.log_metrics(numbers, step=step))
    client = mlflow.MlflowClient()
    for name in NAMES:
        found = client.get_metric_history(writer.info.run_id, name)
        assert {metric.step: metric.value for metric in found} == of_name(name, seen)


@pytest.mark.filterwarnings("ignore")  # of Trackio's own
def test_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    trackio.init(project="midflight", name="tuned")
    seen = run(lambda step, numbers: trackio.log(numbers, step=step))
    trackio.finish()
    rows = SQLiteStorage.get_logs("midflight", "tuned")
    for name in NAMES:
        assert {row["step"]: row[name] for row in rows} == of_name(name, seen)
