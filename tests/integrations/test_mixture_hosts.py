"""A mixture in other libraries' loops: batches keep where their examples come from, and the weights move."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import midflight as mf
from midflight.mixture import Drawn

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own
WIDTH = 6


def table(seed, noisy=False):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(256, WIDTH, generator=rng)
    return x, torch.randint(0, 3, (256,), generator=rng) if noisy else x[:, :3].argmax(1)


RIGHT, WRONG, T2 = table(0), table(1, noisy=True), table(2)


class Dicts(Dataset):
    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data[0])

    def __getitem__(self, i):
        return {"x": self.data[0][i], "labels": self.data[1][i]}


def losses(model, x, y):
    return F.cross_entropy(model(x), y, reduction="none")


def moved(mixture):
    return mixture.shares()["right"] > 0.8


def test_hugging_face_trains_on_a_mixture(tmp_path):
    transformers = pytest.importorskip("transformers")
    from midflight.integrations.hf import Tune

    mixture = mf.Mixture(["right", "wrong"])
    space = mf.Space(mixture=mixture)

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            data = [Dicts(RIGHT), Dicts(WRONG)]
            return mixture.loader(data, 32, collate_fn=transformers.default_data_collator)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            found = losses(model, inputs["x"], inputs["labels"])
            return mixture.loss(found, inputs["drawn"]) if "drawn" in inputs else found.mean()

    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=200, learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer = Trainer(nn.Linear(WIDTH, 3), args, train_dataset=Dicts(RIGHT), eval_dataset=Dicts(T2))
    trainer.add_callback(Tune(trainer, space))
    trainer.train()
    assert moved(mixture)


def test_accelerate_keeps_a_mixture():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state()
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(0)
    mixture, model = mf.Mixture(["right", "wrong"]), nn.Linear(WIDTH, 3)
    made = mixture.loader([TensorDataset(*RIGHT), TensorDataset(*WRONG)], 32)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    t2 = DataLoader(TensorDataset(*T2), 64, shuffle=True)
    model, optimizer, loader, t2 = accelerator.prepare(model, optimizer, made, t2)
    assert len(loader) == len(made) == 16

    def loss_fn(model, batch):
        return mixture.loss(losses(model, *batch[:2]), batch[2])

    mf.Tuner(
        model, optimizer, mf.Space(mixture=mixture), loss_fn, loader, t2, total_steps=200,
        valid_loss_fn=lambda model, batch: losses(model, *batch).mean(),
    )  # fmt: skip
    for _ in range(13):
        for batch in loader:
            assert isinstance(batch[2], Drawn)
            optimizer.zero_grad()
            accelerator.backward(loss_fn(model, batch))
            optimizer.step()
    assert moved(mixture)


def test_a_shard_of_accelerate_follows_the_weights():
    accelerate = pytest.importorskip("accelerate")
    mixture = mf.Mixture(["right", "wrong"], init=[3, 1])
    batches = mixture.loader([TensorDataset(*RIGHT), TensorDataset(*WRONG)], 32).batch_sampler
    found = list(accelerate.data_loader.BatchSamplerShard(batches, 2, 1))
    assert len(found) == 8
    assert all(sum(source == 0 for source, *_ in places) == 24 for places in found)


class Module(pytest.importorskip("lightning.pytorch").LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.mixture = nn.Linear(WIDTH, 3), mf.Mixture(["right", "wrong"])

    def training_step(self, batch):
        found = losses(self.net, *batch[:2])
        return self.mixture.loss(found, batch[2]) if len(batch) == 3 else found.mean()

    def validation_step(self, batch):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return self.mixture.loader([TensorDataset(*RIGHT), TensorDataset(*WRONG)], 32)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*T2), 64, shuffle=True)


def test_lightning_trains_on_a_mixture():
    import lightning.pytorch as pl

    from midflight.integrations.lightning import Tune

    torch.manual_seed(0)
    module = Module()
    tune = Tune(mf.Space(mixture=module.mixture))
    pl.Trainer(
        max_steps=200, accelerator="cpu", callbacks=[tune], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(module)  # fmt: skip
    assert moved(module.mixture)


def test_lightning_refuses_to_replace_the_sampler_and_says_what_to_pass():
    from lightning.pytorch.utilities.data import _update_dataloader
    from torch.utils.data import SequentialSampler

    loader = Module().train_dataloader()
    with pytest.raises(TypeError, match="use_distributed_sampler=False"):
        _update_dataloader(loader, SequentialSampler(loader.dataset))
