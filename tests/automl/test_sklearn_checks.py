"""scikit-learn's own contract, for all four estimators."""

from sklearn.utils.estimator_checks import parametrize_with_checks

import midflight as mf

SMALL = {"hidden": (8,), "lr": 3e-2, "max_steps": 24, "random_state": 0}
CHEAP = {"seconds": None, "trials": 2, "families": ["tree"], "random_state": 0}


@parametrize_with_checks(
    [
        mf.OnlineMLPClassifier(**SMALL),
        mf.OnlineMLPRegressor(**SMALL),
        mf.AutoClassifier(**CHEAP),
        mf.AutoRegressor(**CHEAP),
    ]
)
def test_an_estimator_keeps_the_contract_of_scikit_learn(estimator, check):
    check(estimator)
