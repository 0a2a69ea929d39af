"""Checkpoints in folders of any name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cromss_jax import files
from cromss_jax.training import checkpoint
from cromss_jax.weights import folders

NAMES = [
    *("br[1]", "[!a]", "a[", "a*b", "**", "a?b", "{a,b}", "{seed}", "a#b", "a%41b", "a b", " a "),
    *("a\nb", "a\rb", "-a", "~a", "a:b", "file:", "ü", "日本", "$HOME", "a'b", 'a"b', "a&b", "@a"),
]


def state_of(step: int) -> dict:
    return {"params": {"x": jnp.full(3, step)}, "batch_stats": {"y": jnp.full(2, step)}}


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_is_read_back_whatever_its_folder_is_called(name, tmp_path):
    workdir = files.absolute(tmp_path / name / "run")
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state_of(step), {"iterator": step})
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state_of(0)
    )
    with checkpoint.Checkpoints(workdir / "checkpoints", keep=1) as checkpoints:
        state, host_state = checkpoints.restore(abstract)
    np.testing.assert_array_equal(state["params"]["x"], [2, 2, 2])
    assert host_state == {"iterator": 2}
    newest = folders.find_checkpoint(str(workdir))
    assert newest == workdir / "checkpoints" / "2"
    tree = folders.read_arrays(newest, ("batch_stats",))
    np.testing.assert_array_equal(tree["batch_stats"]["y"], [2, 2])
    assert [path.name for path in (tmp_path / name / "run" / "checkpoints").iterdir()] == ["2"]
