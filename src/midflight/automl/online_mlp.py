"""Multilayer perceptrons for scikit-learn that tune their own regularisation while they train."""

from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from midflight.automl.network import Loss, Recipe, followed, space_at, tuned
from midflight.automl.validation import held_out
from midflight.datasets import Split
from midflight.tuner import Trajectory

Array = np.ndarray[Any, Any]


class _OnlineMLP(BaseEstimator):
    """What the two have in common: all but the target."""

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
        self._refuse()
        x = self._standardised(x, fit=True)
        recipe = self._recipe(len(x))
        rows = Split(torch.from_numpy(x).float(), torch.from_numpy(target))
        t2 = held_out(target.reshape(len(x)), self.validation_fraction, recipe.seed, classes)
        with torch.random.fork_rng(devices=[]):
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
        # in float32 a row's prediction would depend on which rows are predicted with it
        self.network_.double()

    def _refuse(self) -> None:
        if not 0 < self.validation_fraction <= 0.5:
            raise ValueError(f"0 < validation_fraction <= 0.5 must hold, but got {self.validation_fraction}.")
        if not self.hidden or min(self.hidden) < 1:
            raise ValueError(f"hidden must name the units of each layer, at least 1, but is {self.hidden}.")

    def _recipe(self, n: int) -> Recipe:
        batch = self.batch_size or min(256, max(16, n // 50))
        steps = self.max_steps or max(2000, 20 * n // batch)
        starts = {"weight_decay": self.weight_decay, "noise": self.noise, "dropout": self.dropout}
        seed = int(check_random_state(self.random_state).randint(2**31 - 4))
        return Recipe(tuple(self.hidden), self.lr, batch, steps, self.patience, starts, seed)

    def _standardised(self, x: Array, fit: bool = False) -> Array:
        """By the mean and standard deviation of the columns."""
        if fit:
            self.mean_, deviation = x.mean(0), x.std(0)
            self.scale_ = np.where(deviation > 0, deviation, 1.0)
        standardised: Array = (x - self.mean_) / self.scale_
        return standardised

    def _outputs(self, x: Any) -> torch.Tensor:
        """Of the network, shape (n, outputs)."""
        check_is_fitted(self)
        x = validate_data(self, x, dtype=np.float64, reset=False)
        with torch.no_grad():
            outputs: torch.Tensor = self.network_(torch.from_numpy(self._standardised(x)))
        return outputs


class OnlineMLPClassifier(ClassifierMixin, _OnlineMLP):
    """A multilayer perceptron that tunes its weight decay, input noise and dropout while it trains.

    One training finds them: part of the rows is held out (T2), evenly over the classes, and
    `midflight.Tuner` moves the three along the gradient of its log loss. T2 also ends the training early and
    chooses the weights. Then a second training follows the trajectory of the three on all rows. Columns
    are standardised, training is in float32, and torch's global random state is left as it was.

    Args:
        hidden: units of each hidden layer, with ReLU.
        lr: learning rate of Adam.
        batch_size: rows of a step; a fiftieth of all, between 16 and 256, if None.
        max_steps: of the first training; 2,000, or 20 passes if that is more, if None.
        patience: share of `max_steps` after which a training without a new best on T2 ends.
        validation_fraction: share of the rows that tunes, in (0, 0.5]. With fewer than 10 rows nothing is
            held out, and the three stay at their starts.
        weight_decay: start of the L2 penalty, in [1e-6, 0.1].
        noise: start of the standard deviation of the noise on the standardised inputs, in [0, 0.8].
        dropout: start of the dropout rate of the hidden layers, in [0.01, 0.8].
        refit: train again on all rows, which takes as long as the first training at most. Without
            it the network is the one trained on T1.
        random_state: seed; the same int gives the same network on the same machine.

    Attributes:
        classes_: shape (classes,).
        network_: the trained `torch.nn.Sequential`, of standardised inputs to logits.
        values_: weight_decay, noise and dropout where tuning ended.
        trajectory_: their way there, a `midflight.Trajectory`.
        valid_losses_: log loss on T2 of the last, the averaged and the earlier weights of the first training,
            the best first; empty if nothing was held out.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Tune and train on X, shape (n, features), finite, and y, shape (n,), of two classes or more."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must hold at least two classes, but got one class, {self.classes_[0]}.")
        self._train(X, target, len(self.classes_), F.cross_entropy, classes=True)
        return self

    def predict_proba(self, X: Any) -> Array:
        """Probability of each class, shape (n, classes)."""
        probabilities: Array = self._outputs(X).softmax(1).numpy()
        return probabilities

    def predict(self, X: Any) -> Array:
        """The most probable class, shape (n,)."""
        most_probable = self._outputs(X).argmax(1).numpy()
        predicted: Array = self.classes_[most_probable]
        return predicted


class OnlineMLPRegressor(RegressorMixin, _OnlineMLP):
    """A multilayer perceptron that tunes its weight decay, input noise and dropout while it trains.

    As `OnlineMLPClassifier`, with the squared error in place of the log loss. The target is standardised,
    too, and T2 is spread evenly over it.

    Args:
        hidden, lr, batch_size, max_steps, patience, validation_fraction, weight_decay, noise, dropout, refit,
            random_state: as for `OnlineMLPClassifier`.

    Attributes:
        network_: the trained `torch.nn.Sequential`, of standardised inputs to the standardised target.
        values_, trajectory_: as for `OnlineMLPClassifier`.
        valid_losses_: squared error on T2, in units of the target's variance.
    """

    def fit(self, X: Any, y: Any) -> Self:
        """Tune and train on X, shape (n, features), finite numbers, and y, shape (n,)."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        self.target_mean_, deviation = y.mean(), y.std()
        self.target_scale_ = deviation if deviation > 0 else 1.0
        target = ((y - self.target_mean_) / self.target_scale_).astype(np.float32)
        self._train(X, target[:, None], 1, F.mse_loss, classes=False)
        return self

    def predict(self, X: Any) -> Array:
        """Expected target, shape (n,)."""
        standardised = self._outputs(X)[:, 0].numpy()
        predicted: Array = self.target_mean_ + self.target_scale_ * standardised
        return predicted
