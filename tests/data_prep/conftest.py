"""A folder with a small scene."""

import pytest

from tests.data_prep import scene_files


@pytest.fixture
def folder(tmp_path):
    scene_files.write_s2(tmp_path)
    scene_files.write_s1(tmp_path)
    scene_files.write_labels(tmp_path)
    return tmp_path
