from sklearn.utils.estimator_checks import parametrize_with_checks
from midflight.automl import *
small = dict(seconds=None, trials=2, families=["linear", "tree"], ensemble=1, random_state=0)
@parametrize_with_checks([OnlineMLPClassifier(max_steps=300, random_state=0), OnlineMLPRegressor(max_steps=300, random_state=0), AutoClassifier(**small), AutoRegressor(**small)])
def test_e(estimator, check):
    check(estimator)
