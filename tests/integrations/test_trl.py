"""`hf.Tune` serves TRL's trainers, which are Trainers of Transformers. Loaders may read `datasets`."""

import pytest
import torch

import midflight as mf

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own
STEPS = 24
LETTERS = "abcdefgh"


def texts(count, stride):
    rows = [[LETTERS[(i * stride + j) % 8] for j in range(4 + i % 3)] for i in range(count)]
    return datasets.Dataset.from_dict({"text": [" ".join(row) for row in rows]})


def tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(("<pad>", "<eos>", "<unk>", *LETTERS))}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def sft(folder):
    trl = pytest.importorskip("trl")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1,
        pad_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    args = trl.SFTConfig(
        str(folder), max_steps=STEPS, per_device_train_batch_size=8, per_device_eval_batch_size=8,
        learning_rate=3e-3, weight_decay=1e-2, report_to="none", use_cpu=True, bf16=False, logging_steps=4,
        save_strategy="steps", save_steps=12, max_length=16, disable_tqdm=True,
    )  # fmt: skip
    return trl.SFTTrainer(
        transformers.GPT2LMHeadModel(config), args, train_dataset=texts(64, 1), eval_dataset=texts(32, 3),
        processing_class=tokenizer(),
    )  # fmt: skip


def tuned(folder, resume=None):
    from midflight.integrations.hf import Tune

    space = mf.Space(
        lr=mf.Float(1e-4, 1e-1, log=True, init=3e-3), weight_decay=mf.Float(1e-4, 1.0, log=True, init=1e-2)
    )
    runner = sft(folder)
    tune = Tune(runner, space, schedule=3)
    runner.add_callback(tune)
    runner.train(resume_from_checkpoint=resume)
    return runner, tune, space


def test_a_supervised_fine_tuning_is_tuned_and_resumed_and_keeps_its_own_numbers(tmp_path):
    untouched = sft(tmp_path / "untouched")
    untouched.train()
    runner, tune, space = tuned(tmp_path / "tuned")
    assert tune.tuner.steps == STEPS
    assert tune.tuner.log()["hypersteps"] >= 4
    assert float(space["lr"]) != pytest.approx(3e-3)
    assert any("tune/value/lr" in entry for entry in runner.state.log_history)
    name = "num_tokens"  # what its compute_loss counts
    own = [[e[name] for e in t.state.log_history if name in e] for t in (untouched, runner)]
    assert own[0] == own[1]
    again, tune, _ = tuned(tmp_path / "tuned", resume=str(tmp_path / "tuned" / "checkpoint-12"))
    assert tune.tuner.steps == STEPS
    for p, q in zip(runner.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dataset_of_hugging_face_is_read_as_any(streamed):
    draws = torch.Generator().manual_seed(0)
    rows = {
        "x": torch.randn(32, 3, generator=draws).tolist(),
        "y": torch.randn(32, 1, generator=draws).tolist(),
    }
    data = datasets.Dataset.from_dict(rows).with_format("torch")
    data = data.to_iterable_dataset() if streamed else data
    loader = torch.utils.data.DataLoader(data, 8)
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    space = mf.Space(lr=mf.Float(1e-3, 1.0, log=True, init=0.1))
    loss_fn = lambda model, batch: (model(batch["x"]) - batch["y"]).square().mean()  # noqa: E731
    with mf.Tuner(model, optimizer, space, loss_fn, loader, loader, schedule=2, total_steps=8) as tuner:
        for batch in [batch for _ in range(2) for batch in loader]:
            optimizer.zero_grad()
            loss_fn(model, batch).backward()
            optimizer.step()
    assert tuner.log()["hypersteps"] >= 2
