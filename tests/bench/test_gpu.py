"""What the GPU bench computes beside times: PyTorch's side, sums over kernels, made-up data."""

import jax
import numpy as np
import pytest

from configs import pretrain
from cromss_jax import sensors
from cromss_jax.data import input_pipeline, preprocess
from tests.bench import records
from tests.bench.gpu import kernels

CROP, BATCH = 32, 6


def test_pytorch_makes_the_same_examples():
    pytest.importorskip("segmentation_models_pytorch")
    import torch

    from tests.bench.gpu import pytorch

    made = records.make_records(BATCH, CROP)
    margin = made["labels"].shape[-1] - CROP
    augmentation = pretrain.get_config().augmentation
    augmentation.rotation_probability = 0.5
    geometry = pytorch.draw(np.random.default_rng(1), BATCH, margin, augmentation)
    assert 0 < np.count_nonzero(geometry["angle"]) < BATCH
    ours = jax.jit(
        lambda r, g: preprocess.examples(
            r,
            preprocess.Geometry(**g),
            modalities=sensors.MODALITIES,
            s2_bands=sensors.S2_BANDS,
            crop_size=CROP,
            num_classes=9,
            prior_kind="ts",
        )
    )(made, geometry)
    make = pytorch.Examples(
        pytorch.tiles_at_10m(made), made["labels"], made["season"], CROP, torch.device("cpu")
    )
    images, labels, priors = make(geometry)
    for name, found in {**images, "prior": priors}.items():
        expected = np.asarray(ours[name])
        # Our upsampled bands are not rounded to integers, here or where they are rotated.
        tolerance = 1e-5 if name == "prior" else 1 / 255 + 1e-5
        np.testing.assert_allclose(found.permute(0, 2, 3, 1), expected, atol=tolerance)
    # Nearest pixels, but for ties.
    assert np.mean(np.asarray(ours["labels"]) != labels.numpy()) < 1e-3


def test_thresholds_by_sorting_are_those_of_the_oracle():
    pytest.importorskip("segmentation_models_pytorch")
    import torch

    from tests import torch_oracle
    from tests.bench.gpu import pytorch

    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand((2, 16, 16), generator=generator)
    labels = torch.randint(0, 8, (2, 16, 16), generator=generator)  # class 8 is absent
    labels[0, 0, 0] = 8
    for keep in (1.0, 0.73, 0.5):
        expected = torch_oracle.selection_weights(confidence, labels, keep)
        torch.testing.assert_close(pytorch.weights_by_sort(confidence, labels, keep), expected)


def test_kernels_are_counted_and_told_apart():
    made = [
        ("loop_fusion_3", "", 0, 4e6),  # of a CUDA graph
        ("cudnn", "conv.1", 2e6, 4e6),  # on another stream, 2 ms of it beside the first
        ("cudnn", "conv.1", 8e6, 2e6),
        ("copy", "elsewhere", 10e6, 1000),
    ]
    program = """HloModule a
ENTRY %main (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %loop_fusion.3 = f32[] fusion(%p), kind=kLoop, metadata={op_name="jit(f)/prior/add"}
  %conv.1 = f32[] convolution(%p), metadata={op_name="jit(f)/transpose(jvp(encoder))/conv"}
  ROOT %copy.2 = f32[] copy(%conv.1)
}
"""
    parts = kernels.part_names(program)
    assert parts["copy.2"] == "encoder"  # that of its operand
    found = kernels.summarise([kernels.Kernel(*event) for event in made], 2, parts)
    assert found["kernels"] == 2
    assert found["below_5_microseconds"] == 0.5
    assert found["kernel_milliseconds"] == 5.0
    assert found["idle_share"] == pytest.approx(2 / 10.001, abs=1e-4)
    assert found["parts"] == [["encoder", 1.0, 3.0], ["prior", 0.5, 2.0], ["unknown", 0.5, 0.0005]]
    assert found["longest"][0] == ["cudnn (encoder)", 1.0, 3.0]


def test_a_made_up_data_set_is_read_as_any(tmp_path):
    folder = records.write_dataset(tmp_path, CROP, num_locations=5, num_seasons=2, num_workers=1)
    dataset = input_pipeline.open_dataset(folder, "made_up")
    assert (dataset.num_locations, len(dataset.source)) == (5, 10)
    batch = input_pipeline.read_batch(dataset, sensors.MODALITIES, np.array([0, 9]))
    made = records.make_records(2, CROP)
    assert {n: (x.shape[2:], x.dtype) for n, x in batch.items() if n in made} == {
        n: (x.shape[2:], x.dtype) for n, x in made.items()
    }
    assert batch["season"].tolist() == [0, 1]
