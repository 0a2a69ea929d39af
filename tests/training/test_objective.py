"""The whole training loss: the published code's numbers, and an oracle written from the paper."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import pretrain
from cromss_jax.training import objective

pytestmark = pytest.mark.numeric

C = 9
GOLDEN_TOLERANCE = 1e-5  # what the numbers of the published code must be matched to
KINDS = {"c": "cross_entropy", "d": "dice"}
NAMES = {"s1": "1", "s2": "2"}


def loss_and_gradients(config, logits, batch, epoch):
    """The loss, its gradient with respect to the logits, and what is reported, as of a step."""
    (loss, report), grads = jax.jit(
        jax.value_and_grad(
            lambda logits: objective.training_loss(config, logits, batch, jnp.int32(epoch)),
            has_aux=True,
        )
    )(logits)
    assert report["loss"] == loss
    return loss, grads, report


@pytest.mark.parametrize("name", ["paper_e40", "paper_e80_skew", "kl", "noselect", "nocons_d"])
def test_golden_losses(shared, name):
    case = json.loads((shared / "golden/loss_cases.json").read_text())[name]
    golden = dict(np.load(shared / f"golden/loss_{name}.npz"))
    config = pretrain.get_config()
    prior_weight, uniform_weight = case["ls"] or (0.0, 0.0)
    config.update_from_flattened_dict(
        {
            "loss.segmentation": tuple(KINDS[letter] for letter in case["loss_type"]),
            "loss.consistency": case["cl"],
            "loss.consistency_weight": case["w"],
            "loss.prior_weight": prior_weight,
            "loss.uniform_weight": uniform_weight,
            "selection.enabled": case["ss"],
            "selection.confidence": {"ce": "entropy", "gini": "gini"}[case["ctype"]],
            "selection.final_keep_fraction": case["prop"],
            "selection.ramp": case["rm"],
            "selection.ramp_epochs": case["nep"],
        }
    )
    batch = {"labels": jnp.asarray(golden["labels"])}
    if objective.prior_kind(config):
        batch["prior"] = jnp.asarray(golden["smooth_prior"])
    logits = {m: jnp.asarray(golden[f"logits_{d}"]) for m, d in NAMES.items()}
    loss, grads, report = loss_and_gradients(config, logits, batch, case["epoch"])
    np.testing.assert_allclose(loss, golden["total_loss"], rtol=GOLDEN_TOLERANCE)
    for m, d in NAMES.items():
        scale = np.abs(golden[f"grad_logits_{d}"]).max()
        np.testing.assert_allclose(
            grads[m] / scale, golden[f"grad_logits_{d}"] / scale, atol=GOLDEN_TOLERANCE
        )
        means = {"label_confidence": "label_confidence", "selection_weight": "label_weight"}
        for ours, theirs in means.items():
            if f"{theirs}_{d}" in golden:
                np.testing.assert_allclose(
                    report[f"{ours}/{m}"], golden[f"{theirs}_{d}"].mean(), rtol=GOLDEN_TOLERANCE
                )


# By the names of our configuration and of the oracle's arguments.
SETTINGS = {
    "gini": {"selection.confidence": "gini", "sure_by": "gini"},
    "mse": {"loss.consistency": "mse", "consistency": "mse"},
    "kl": {"loss.consistency": "kl", "consistency": "kl"},
    "keep 0.2": {"selection.final_keep_fraction": 0.2, "keep": 0.2},
    "keep 0.8": {"selection.final_keep_fraction": 0.8, "keep": 0.8},
    "half consistency": {"loss.consistency_weight": 0.5, "consistency_weight": 0.5},
    "one factor": {"loss.uniform_weight": 0.0, "uniform_weight": 0.0},
    "focal": {
        "loss.segmentation": ("focal", "cross_entropy"),
        "kinds": ("focal", "cross_entropy"),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_an_oracles(name):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e .[torch]")
    from tests import torch_oracle

    config = pretrain.get_config()
    ours = {key: value for key, value in SETTINGS[name].items() if "." in key}
    theirs = {key: value for key, value in SETTINGS[name].items() if "." not in key}
    config.update_from_flattened_dict(ours)
    rng = np.random.default_rng(0)
    shape, epoch = (2, 12, 11), 60
    labels = rng.integers(0, C, shape)
    labels[rng.random(shape) < 0.2] = 255
    prior = rng.dirichlet(np.ones(C), shape).astype(np.float32)
    logits = {m: (2 * rng.normal(size=(*shape, C))).astype(np.float32) for m in NAMES}
    loss, grads, _ = loss_and_gradients(
        config, logits, {"labels": jnp.asarray(labels), "prior": jnp.asarray(prior)}, epoch
    )
    channels_first = {m: torch.tensor(np.moveaxis(x, -1, 1)).double() for m, x in logits.items()}
    for x in channels_first.values():
        x.requires_grad_()
    expected = torch_oracle.total_loss(
        channels_first,
        torch.tensor(labels),
        torch.tensor(np.moveaxis(prior, -1, 1)).double(),
        epoch,
        **theirs,
    )
    expected.backward()
    # float32 against float64: sums of 264 pixels and 9 classes.
    np.testing.assert_allclose(loss, expected.item(), rtol=2e-6)
    for m, x in channels_first.items():
        found, expected_grad = np.moveaxis(grads[m], -1, 1), x.grad.numpy()
        scale = np.abs(expected_grad).max()
        np.testing.assert_allclose(found / scale, expected_grad / scale, atol=1e-5)


def test_a_single_modality_is_neither_entangled_nor_taught():
    config = pretrain.get_config("modality=s1")
    log_probs = jnp.log(jnp.array([[[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]]]))
    labels = jnp.array([[[0, 1]]])
    with config.unlocked():
        config.network.num_classes = 3
    confidences = objective.label_confidences({"s1": log_probs}, labels)
    np.testing.assert_allclose(confidences["s1"], [[[0.5, 0.2]]], rtol=1e-6)
    assert objective.entangled(confidences)["s1"] is confidences["s1"]
    weights = objective.consistency_weights(config, {"s1": log_probs}, jnp.float32(1.0))
    assert objective.consistency_losses(config, {"s1": log_probs}, weights) == {}


def test_what_is_reported_by_hand():
    """Three pixels of five are labelled, one of them wrongly, one without truth."""
    config = pretrain.get_config()
    with config.unlocked():
        config.network.num_classes = 3
    config.loss.prior_weight = config.loss.uniform_weight = 0.0
    config.selection.enabled = False
    probs = [[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]
    logits = jnp.log(jnp.array([[probs]]))
    labels, truth = jnp.array([[[0, 1, 255, 3, 1]]]), jnp.array([[[0, 2, 1, 2, 255]]])
    batch = {"labels": labels, "truth": truth}
    _, report = objective.training_loss(config, {"s1": logits, "s2": logits}, batch, jnp.int32(80))
    for m in NAMES:
        np.testing.assert_allclose(report[f"accuracy/{m}"], 2 / 3, rtol=1e-6)
        np.testing.assert_allclose(report[f"label_confidence/{m}"], 1.4 / 3, rtol=1e-6)
        np.testing.assert_allclose(report[f"selection_weight/{m}"], 1.0)
        np.testing.assert_allclose(report[f"wrong_labels_selected/{m}"], 0.5)
    assert report["ramp"] == 1
    config.loss.segmentation, config.loss.consistency = ("cross_entropy",), "none"
    loss, _ = objective.training_loss(config, {"s1": logits}, batch, jnp.int32(80))
    np.testing.assert_allclose(loss, (np.log(2) + np.log(5) - np.log(0.7)) / 3, rtol=1e-6)


def test_a_prior_is_needed_where_labels_are_smoothed():
    config = pretrain.get_config()
    assert objective.prior_kind(config) == "ts"
    config.loss.uniform_weight = 0.0
    assert objective.prior_kind(config) == "ts"
    config.loss.prior_weight = 0.0
    assert objective.prior_kind(config) is None
    config.loss.uniform_weight = 0.05
    assert objective.prior_kind(config) == "ts"
