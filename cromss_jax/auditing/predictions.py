"""What a network says of the records of a data set."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from cromss_jax import sensors
from cromss_jax.data import input_pipeline, preprocess
from cromss_jax.mapping import forward
from cromss_jax.mapping.job import Network
from cromss_jax.method import smoothing
from cromss_jax.training import sharding


class Predictor:
    """A network on whole tiles, without crop."""

    def __init__(
        self,
        dataset: input_pipeline.TileDataset,
        network: Network,
        bands: Mapping[str, Sequence[str]],
        batch_size: int,
    ):
        """Compiles nothing yet.

        Args:
          dataset: whose records are read.
          network: that predicts.
          bands: its bands by modality, in its order.
          batch_size: records on the devices at once, a multiple of their number.
        """
        self._dataset, self._bands, self._batch_size = dataset, dict(bands), batch_size
        mesh = sharding.make_mesh()
        self._forward = forward.make_forward(network.module, network.stride, mesh, augment=False)
        s2_bands = tuple(bands.get("s2", sensors.S2_BANDS))
        self._stack = jax.jit(
            lambda records: {
                m: preprocess.stack_bands(records, m, s2_bands, bands=dataset.bands).astype(
                    jnp.uint8
                )
                for m in self._bands
            }
        )
        num_classes = len(network.legend)
        self._prior = jax.jit(
            lambda labels, own: smoothing.smoothing_prior(labels, own, num_classes, "ts")
        )

    def location(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Reads and predicts all seasons of a location.

        Args:
          index: of the location.

        Returns:
          Probabilities [S, T, T, C] by modality; and `labels` [S, T, T], `prior` [S, T, T, C], and
          `truth` [S, T, T] where the data set has it.
        """
        start, count = self._dataset.starts[index], self._dataset.season_counts[index]
        records = start + np.arange(count)
        padded = np.concatenate([records, np.full(-count % self._batch_size, -1)])
        probs: dict[str, list] = {m: [] for m in self._bands}
        labels, truths, priors = [], [], []
        for rows in padded.reshape(-1, self._batch_size):
            batch = input_pipeline.read_batch(self._dataset, tuple(self._bands), rows)
            season = batch["season"]
            own = np.take_along_axis(batch["labels"], season[:, None, None, None], axis=1)[:, 0]
            images = {k: v for k, v in batch.items() if k.startswith(("s1", "s2"))}
            grey = jax.device_get(self._stack(images))
            real = batch["is_real"]
            for modality, values in self._forward(grey).items():
                probs[modality].append(np.asarray(values)[real])
            priors.append(np.asarray(self._prior(batch["labels"], own))[real])
            labels.append(own[real])
            if "truth" in batch:
                truths.append(batch["truth"][real])
        found = {"labels": np.concatenate(labels), "prior": np.concatenate(priors)}
        if truths:
            found["truth"] = np.concatenate(truths)
        return {m: np.concatenate(values) for m, values in probs.items()}, found
