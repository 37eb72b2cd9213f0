"""The stages' steps on a device without float64, as Apple's."""

import pytest
from conftest import run_script


@pytest.mark.slow
def test_no_float64_tensor_is_made_on_an_accelerator(tmp_path):
    done = run_script("tests/support/pretended_device.py", tmp_path)
    assert done.stdout.splitlines()[-3:] == ["ppo has run", "stage_1 has run", "stage_2 has run"]
