"""Choose a learner, with the network that tunes itself among them
===============================================================

Compare a default random forest, a network that tunes itself, and a search over families of learners::

    python examples/automl.py             # about half a minute; needs midflight[automl]
    python examples/automl.py --quick

Data: scikit-learn's wine table, 178 rows of 13 measurements, three classes. The network tunes its weight
decay, noise and dropout during training. The search covers eight families.
"""

import argparse
from typing import Any

import torch
from sklearn.datasets import load_wine
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

import midflight as mf


def main(quick: bool = False) -> dict[str, Any]:
    X, y = load_wine(return_X_y=True)
    X, held_out_X, y, held_out_y = train_test_split(X, y, test_size=0.5, stratify=y, random_state=0)

    forest = RandomForestClassifier(random_state=0).fit(X, y)
    network = mf.OnlineMLPClassifier(max_steps=500 if quick else None, random_state=0).fit(X, y)
    print("tuned during training:", {name: f"{value:.3g}" for name, value in network.values_.items()})

    auto = mf.AutoClassifier(seconds=3 if quick else 30, random_state=0).fit(X, y)
    for row in auto.leaderboard_[:8]:
        print(f"{row['loss']:.4f}  weight {row['weight']}  {row['family']:12} {row['config']}")

    models = {"fixed": forest, "network": network, "tuned": auto}
    losses = {
        name: float(log_loss(held_out_y, model.predict_proba(held_out_X))) for name, model in models.items()
    }
    print("held-out log loss", "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items()))
    return {"valid": losses}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a shortened run")
    torch.set_num_threads(1)  # faster for small tables
    main(**vars(parser.parse_args()))
