"""Audits a map on one scene: what `audit` does with --s2 and --labels, without its flags."""

import pathlib
from collections.abc import Mapping

from cromss_jax import scenes
from cromss_jax.auditing import job, scene, vectors
from cromss_jax.legend import Legend
from cromss_jax.mapping import job as mapping_job
from cromss_jax.mapping import work
from cromss_jax.pretrained import Pretrained
from data_prep import errors


def audit(
    model: Pretrained,
    network: mapping_job.Network,
    files: Mapping[str, tuple[pathlib.Path, ...]],
    legend: Legend,
    output: pathlib.Path,
    settings: job.Settings,
    *,
    s2_offset: int | None,
    batch_size: int,
    polygons: vectors.Polygons | None,
) -> None:
    """Audits a map, or goes on with it.

    What was predicted is kept in the folder `work` until the audit is finished. Labels are read and
    judged anew by a command that goes on.

    Args:
      model: whose bands and scaling are used.
      network: the same, with the classes of the map.
      files: `s2`, `s1` or both, and `labels`.
      legend: of the labels.
      output: folder to write to.
      settings: of the audit.
      s2_offset: None to find it out.
      batch_size: windows on the devices at once; 0 for what suits them.
      polygons: the parcels, if there are any.

    Raises:
      scenes.SceneError, errors.BadFileError, scene.LabelError, work.WorkError, lock.LockedError:
        each with a sentence.
    """
    found, facts = scenes.open_scene(files, "the scene", scenes.NO_DATE, model, s2_offset)
    chosen = mapping_job.Settings(batch_size=batch_size).for_devices()
    identity = mapping_job.identity_of(network, chosen, found.identity)
    dates = (found.acquisition.s2_date, found.acquisition.s1_date)
    date = next((f"{d:%Y%m%d}" for d in dates if d), "season 0")
    layers = dict.fromkeys(found.modalities, len(legend))
    size = found.height, found.width
    named = {name: "; ".join(map(str, paths)) for name, paths in files.items()}
    with work.opened(output / "work", identity, size, layers) as unfinished:
        subject = scene.LabelledScene(
            found, model.bands, legend, found.map_grid, date, unfinished, output
        )
        try:
            subject.read_labels(lambda *window: found.read_labels(*window, legend), named["labels"])
        except (scene.LabelError, errors.BadFileError):
            if not unfinished.rows_done:  # nothing that another command could go on with
                unfinished.remove()
            raise
        mapping_job.predict(found, network, chosen, unfinished, scene.to_levels)
        subject.keep_valid(named["labels"])
        told = {
            **named,
            "judged by": f"{model.source}, which judges labels that it was trained on too kindly: "
            "build a data set of these labels, and audit it with --folds=2, where each is judged "
            "by a network that never saw it",
            "locations": f"blocks of up to {subject.side} x {subject.side} pixels that hold labels,"
            " named by row and column of their first pixel",
            "windows": chosen.windows,
            **{str(name): str(value) for name, value in facts.items()},
        }
        job.audit(subject, output, settings, told, polygons)
        unfinished.remove()
