"""Multilayer perceptrons for scikit-learn that tune their regularisation during training."""

from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from midflight.automl.network import Loss, Recipe, followed, plain_torch, space_at, tuned
from midflight.automl.validation import Array, Classifies, held_out
from midflight.datasets import Split
from midflight.tuner import Trajectory


class _OnlineMLP(BaseEstimator):
    """The common part of classifier and regressor."""

    def __init__(
        self,
        hidden: tuple[int, ...] = (64, 64),
        lr: float = 3e-3,
        batch_size: int | None = None,
        max_steps: int | None = None,
        patience: float = 0.3,
        validation_fraction: float = 0.2,
        weight_decay: float = 1e-4,
        noise: float = 0.2,
        dropout: float = 0.1,
        refit: bool = True,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.hidden = hidden
        self.lr = lr
        self.batch_size = batch_size
        self.max_steps = max_steps
        self.patience = patience
        self.validation_fraction = validation_fraction
        self.weight_decay = weight_decay
        self.noise = noise
        self.dropout = dropout
        self.refit = refit
        self.random_state = random_state

    def _train(self, x: Array, target: Array, outputs: int, loss: Loss, classes: bool) -> None:
        recipe = self._recipe(len(x))
        self.mean_, deviation = x.mean(0), x.std(0)
        self.scale_ = np.where(deviation > 0, deviation, 1.0)
        with plain_torch():
            rows = Split(self._standardised(x).float(), torch.from_numpy(target))
            t2 = held_out(target.reshape(len(x)), self.validation_fraction, recipe.seed, classes)
            if t2.any():
                run = tuned(rows[~t2], rows[t2], outputs, loss, recipe)
                self.network_, self.trajectory_ = run.network, run.trajectory
                self.values_, self.valid_losses_ = run.values, run.losses
                passes, stop = run.passes, run.best_passes
            else:
                space = space_at(recipe.starts)
                self.trajectory_ = Trajectory()
                self.trajectory_.record(0, space)
                self.values_, self.valid_losses_ = space.as_dict(), {}
                passes = stop = float(recipe.steps)  # a pass is one batch
            if self.refit or not t2.any():
                self.network_ = followed(rows, outputs, loss, recipe, self.trajectory_, passes, stop)
        # in float32, the prediction of a row would depend on the other rows of the batch
        self.network_.double()

    def _recipe(self, n: int) -> Recipe:
        """Check the arguments; return the recipe for n rows."""
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(f"0 < validation_fraction <= 0.5 must hold, but got {self.validation_fraction}.")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(
                f"hidden must give the units of each layer, each at least 1, but got {self.hidden}."
            )
        batch = self.batch_size or min(256, max(16, n // 50))
        steps = self.max_steps or max(2000, 20 * n // batch)
        starts = {"weight_decay": self.weight_decay, "noise": self.noise, "dropout": self.dropout}
        seed = int(check_random_state(self.random_state).randint(2**31 - 4))
        return Recipe(tuple(self.hidden), self.lr, batch, steps, self.patience, starts, seed)

    def _standardised(self, x: Array) -> torch.Tensor:
        """Scale each column to mean 0 and standard deviation 1, as in `fit`."""
        return torch.from_numpy((x - self.mean_) / self.scale_)

    def _outputs(self, x: Any) -> torch.Tensor:
        """Return the outputs of the network, shape (n, outputs)."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False)
        with torch.no_grad():
            outputs: torch.Tensor = self.network_(self._standardised(x))
        return outputs


class OnlineMLPClassifier(Classifies, _OnlineMLP):
    """A multilayer perceptron that tunes its weight decay, input noise and dropout during training.

    The rows are split into T1 and a stratified T2. A first training on T1 tunes the three hyperparameters by
    the gradient of the log loss on T2. T2 also stops the training early and chooses the weights. A second
    training on all rows follows the trajectory of the hyperparameters. Columns are standardised, training is
    in float32, and torch's global random state is unchanged.

    Args:
        hidden: units of each hidden layer, with ReLU.
        lr: learning rate of Adam.
        batch_size: rows per batch; None: n / 50, between 16 and 256.
        max_steps: maximal number of steps of the first training; None: the larger of 2,000 and 20 passes.
        patience: share of `max_steps` without a new lowest loss on T2 after which the training ends.
        validation_fraction: share of T2, in (0, 0.5]. With fewer than 10 rows, T2 is empty and nothing is
            tuned.
        weight_decay: initial L2 penalty, in [1e-6, 0.1].
        noise: initial standard deviation of the noise on the standardised inputs, in [0, 0.8].
        dropout: initial dropout rate of the hidden layers, in [0.01, 0.8].
        refit: whether to train again on all rows, which takes at most as long as the first training. If
            false, the network of the first training is kept.
        random_state: seed; the same int gives the same network on the same machine.

    Attributes:
        classes_: the classes, sorted, shape (classes,).
        network_: the trained `torch.nn.Sequential`, which maps standardised inputs to logits.
        values_: final values of weight_decay, noise and dropout.
        trajectory_: their `midflight.Trajectory`.
        valid_losses_: log losses on T2 of the last, averaged and earlier weights of the first training, the
            lowest first; empty if T2 is.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Tune and train on finite X, shape (n, features), and y, shape (n,), with at least two classes."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        target = self._codes(y)
        self._train(X, target, len(self.classes_), F.cross_entropy, classes=True)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Return the probability of each class, shape (n, classes)."""
        probabilities: Array = self._outputs(X).softmax(1).numpy()
        return probabilities


class OnlineMLPRegressor(RegressorMixin, _OnlineMLP):
    """A multilayer perceptron that tunes its weight decay, input noise and dropout during training.

    Like `OnlineMLPClassifier`, with squared error in place of log loss. The target is standardised, and T2 is
    stratified by the sorted target.

    All arguments are those of `OnlineMLPClassifier`.

    Attributes:
        network_: the trained `torch.nn.Sequential`, from standardised inputs to the standardised target.
        values_, trajectory_: as for `OnlineMLPClassifier`.
        valid_losses_: as for `OnlineMLPClassifier`, squared errors in units of the target's variance.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Tune and train on finite X, shape (n, features), and y, shape (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        self.target_mean_, deviation = y.mean(), y.std()
        self.target_scale_ = deviation if deviation > 0 else 1.0
        target = ((y - self.target_mean_) / self.target_scale_).astype(np.float32)
        self._train(X, target[:, None], 1, F.mse_loss, classes=False)
        return self

    def predict(self, X: Any) -> Array:
        """Return the expected target, shape (n,)."""
        standardised = self._outputs(X)[:, 0].numpy()
        predicted: Array = self.target_mean_ + self.target_scale_ * standardised
        return predicted
