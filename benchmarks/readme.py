"""Run README's example with other seeds, with the tuner and without it.

    python benchmarks/readme.py            # table and docs/results/readme.json, half a minute
    python benchmarks/readme.py --table    # the stored rows

Without the tuner, the script reads the validation loss after each epoch, and keeps the last and the least.
The example was chosen on seeds 10 to 13; seeds 0 to 3 are reported.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from tasks import markdown, parser_of

from midflight._reporting.machine import machine

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs/results/readme.json"
SEEDS = range(4)


def example(seed: int) -> str:
    """Return the code of README's first example with another seed."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("torch.manual_seed(0)", f"torch.manual_seed({seed})")


def tuned(seed: int) -> float:
    """Return the validation loss of the weights that `finish` keeps."""
    names: dict[str, Any] = {}
    ended = re.sub(r"print\(\{.*", "losses = tuner.finish()", example(seed))
    exec(ended, names)
    return float(min(names["losses"].values()))


def untuned(seed: int) -> tuple[float, float]:
    """Return the validation losses of the last weights and of the best epoch."""
    losses: list[float] = []
    names: dict[str, Any] = {}

    def after_epoch() -> None:
        model = names["model"].eval()
        losses.append(float(names["loss_fn"](model, (names["x"][500:], names["y"][500:])).detach()))
        model.train()

    names["after_epoch"] = after_epoch
    plain = [c for c in example(seed).splitlines() if not c.startswith(("tuner = ", "noise = ", "print("))]
    exec("\n".join([*plain, "    after_epoch()"]), names)
    return losses[-1], min(losses)


def main() -> None:
    if not parser_of(__doc__, workers=False).parse_args().table:
        torch.set_num_threads(1)
        rows = []
        for seed in SEEDS:
            last, best = untuned(seed)
            rows.append(
                {"seed": seed, "tuned": tuned(seed), "untuned_last": last, "untuned_best_epoch": best}
            )
        OUT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")
    losses = ("tuned", "untuned_last", "untuned_best_epoch")
    head = ["seed", "with the tuner", "without, last weights", "without, best epoch"]
    rows = json.loads(OUT.read_text())["rows"]
    print(markdown(head, [[r["seed"], *(f"{r[name]:.2f}" for name in losses)] for r in rows]))


if __name__ == "__main__":
    main()
