"""Fit AutoGluon, or predict with it, in an interpreter of its own; `cash.py` calls this.

python benchmarks/autogluon_worker.py fit FOLDER SECONDS      # reads FOLDER/train.npz
python benchmarks/autogluon_worker.py predict FOLDER          # reads test.npz, writes found.npy
"""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from autogluon.tabular import TabularPredictor


def table(file: Path) -> pd.DataFrame:
    arrays = np.load(file)
    found = pd.DataFrame(arrays["x"], columns=[f"x{i}" for i in range(arrays["x"].shape[1])])
    return found.assign(y=arrays["y"]) if "y" in arrays else found


def main() -> None:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    if verb == "fit":
        data = table(folder / "train.npz")
        kind = (
            "regression" if data.y.dtype.kind == "f" else "multiclass" if data.y.nunique() > 2 else "binary"
        )
        metric = "root_mean_squared_error" if kind == "regression" else "log_loss"
        predictor = TabularPredictor(
            "y", problem_type=kind, eval_metric=metric, path=str(folder / "model"), verbosity=0
        )
        predictor.fit(data, time_limit=float(sys.argv[3]), num_cpus=1)
        return
    predictor = TabularPredictor.load(str(folder / "model"))
    data = table(folder / "test.npz")
    values = (
        predictor.predict(data) if predictor.problem_type == "regression" else predictor.predict_proba(data)
    )
    np.save(folder / "found.npy", values.to_numpy())


if __name__ == "__main__":
    main()
