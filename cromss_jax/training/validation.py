"""Validation of pretraining: scores on the held-back locations, pictures, the table of results."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Sequence

import jax
import ml_collections
import numpy as np
from etils import epath
from flax import nnx

from cromss_jax import files
from cromss_jax.data import input_pipeline
from cromss_jax.method import metrics
from cromss_jax.results import report
from cromss_jax.training import preemption, pretrain_step, sharding
from cromss_jax.training.state import TrainState

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Scores on the held-back locations.

    Attributes:
      loss: validation loss, averaged over samples.
      confusions: [C, C] int64 by "<modality>" (against the noisy labels), "truth/<modality>" and
        "truth/labels" (the noisy labels themselves).
      aurocs: of label confidence, by modality; empty without truth.
    """

    loss: float
    confusions: dict[str, np.ndarray]
    aurocs: dict[str, float]

    def scalars(self, class_names: Sequence[str]) -> dict[str, float]:
        """Every score by name, those of the C classes included."""
        values = {"loss": self.loss}
        values |= {f"label_confidence_auroc/{m}": v for m, v in self.aurocs.items()}
        for name, confusion in self.confusions.items():
            for key, score in metrics.scores(confusion).items():
                if np.ndim(score) == 0:
                    values[f"{name}/{key}"] = score
                    continue
                for class_name, value in zip(class_names, score, strict=True):
                    values[f"{name}/{key}/{class_name}"] = value
        return values


def evaluate(
    eval_step: Callable, state: TrainState, batches: Iterable[dict], mesh: jax.sharding.Mesh
) -> Evaluation:
    """Scores the state on batches of host arrays, without waiting between them.

    Raises:
      Preempted: between two batches, after a signal.
    """
    sums = []
    for batch in batches:
        preemption.check()
        sums.append(eval_step(state, sharding.to_devices(batch, mesh)))
        if len(sums) > 2:  # waiting batches must not fill the device's memory
            sharding.wait(sums[-3]["loss"])
    sums = jax.device_get(sums)
    samples = np.array([s["num_samples"] for s in sums], np.float64)
    total = {
        name: np.sum([np.asarray(s[name], np.int64) for s in sums], axis=0)
        for name in sums[0]
        if "/" in name
    }
    confusions = {
        name.replace("confusion_truth/", "truth/").replace("confusion/", ""): value
        for name, value in total.items()
        if name.startswith("confusion")
    }
    aurocs = {
        name.removeprefix("confidence/"): metrics.auroc(value)
        for name, value in total.items()
        if name.startswith("confidence/")
    }
    loss = float(np.average([s["loss"] for s in sums], weights=samples))
    return Evaluation(loss, confusions, aurocs)


def write_results(evaluation: Evaluation, class_names: Sequence[str], workdir: epath.Path) -> str:
    """Writes `results.md` with the scores of C classes, and returns its text."""
    scores = {}
    for name, confusion in evaluation.confusions.items():
        reference, _, subject = name.rpartition("/")
        subject = "noisy labels" if subject == "labels" else subject.upper()
        scores[f"{subject} against {reference or 'noisy labels'}"] = [metrics.scores(confusion)]
    table = report.scores_table(scores, class_names)
    table += "\nIn percent; the classes' columns are IoU. Held-back locations, all seasons.\n"
    for modality, value in evaluation.aurocs.items():
        table += (
            f"Label confidence tells wrong labels from right ones ({modality.upper()}): "
            f"AUROC {value:.3f}.\n"
        )
    files.write_whole(workdir / "results.md", table.encode())
    return table


class Validator:
    """Validates the states of a run on the locations that it holds back.

    Attributes:
      latest: the newest evaluation, None before the first.
    """

    def __init__(
        self,
        config: ml_collections.FrozenConfigDict,
        definition: nnx.GraphDef,
        dataset: input_pipeline.TileDataset,
        held_back: np.ndarray,
        num_locations: int,
        mesh: jax.sharding.Mesh,
        folder: epath.Path,
    ):
        """Prepares the compiled steps.

        Args:
          config: the configuration.
          definition: of the networks.
          dataset: where the locations are.
          held_back: [n] int, indices of the locations to validate on, at least one.
          num_locations: number of training locations.
          mesh: the devices.
          folder: of the run, for the picture.
        """
        self.latest: Evaluation | None = None
        self._config, self._dataset, self._mesh, self._folder = config, dataset, mesh, folder
        self._rows = sharding.process_rows(mesh, config.batch_size)
        self._records = input_pipeline.validation_records(dataset, held_back, config.batch_size)
        # One season of each location, another one of the next.
        seasons = np.arange(len(held_back)) % dataset.season_counts[held_back]
        self._shown = np.resize(dataset.starts[held_back] + seasons, config.batch_size)
        jit_step = functools.partial(
            sharding.jit_step, mesh=mesh, deterministic=config.deterministic
        )
        self._eval_step = jit_step(pretrain_step.make_eval_step(config, definition))
        self._picture_step = jit_step(
            pretrain_step.make_picture_step(config, definition, num_locations)
        )
        plateau = pretrain_step.make_plateau(config)

        @jax.jit
        def update_plateau(state: TrainState, loss: jax.Array) -> TrainState:
            _, new = plateau.update({}, state.plateau, value=loss)
            return dataclasses.replace(state, plateau=new)

        self._update_plateau = update_plateau

    def _read(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """This process's rows of a batch of record indices."""
        return input_pipeline.read_batch(self._dataset, self._config.modalities, batch[self._rows])

    def evaluate(self, state: TrainState) -> Evaluation:
        """Scores a state on every season of the locations."""
        self.latest = evaluate(self._eval_step, state, map(self._read, self._records), self._mesh)
        return self.latest

    def validate(self, number: int, state: TrainState, log: report.MetricLog | None) -> TrainState:
        """Scores and shows a state; the plateau schedule of the one returned knows the loss.

        Raises:
          Preempted: after a signal; nothing is logged then.
        """
        from cromss_jax.results import pictures  # takes a second that the first step need not wait

        evaluation = self.evaluate(state)
        preemption.check()  # the picture takes as long as a batch
        loss = jax.device_put(np.float32(evaluation.loss), sharding.replicated(self._mesh))
        state = self._update_plateau(state, loss)
        # By all processes, as their devices compute it together.
        batch = sharding.to_devices(self._read(self._shown), self._mesh)
        shown = jax.device_get(self._picture_step(state, batch))
        if log:
            log.scalars(number, "validation", evaluation.scalars(self._dataset.legend.names))
            picture = pictures.draw_samples(
                shown, tuple(self._config.s2_bands), self._dataset.legend
            )
            log.picture(number, "samples", picture)
            pictures.save_picture(self._folder / "samples.png", picture)
        _log.info("step %d, validation loss %.4f", number, evaluation.loss)
        return state
