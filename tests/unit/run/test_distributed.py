"""What a process finds out about the machine that it runs on."""

import math

import pytest

from geli.nets import encoder
from geli.nets.batching import CPU_TOKENS
from geli.nets.encoder import load_encoder
from geli.run.distributed import available_memory, container_memory

GIB = 1 << 30


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"memory.max": 2 * GIB}, 2 * GIB),  # cgroup v2, seen from inside a container
        ("0::/a/b\n", {"memory.max": "max", "a/memory.max": GIB, "a/b/memory.max": "max"}, GIB),
        ("0::/a\n", {"a/memory.max": "max"}, math.inf),
        ("1:cpu:/x\n4:cpu,memory:/x\n0::/\n", {"memory/x/memory.limit_in_bytes": GIB, "cpu/memory.max": 1}, GIB),
        ("4:memory:/docker/x\n", {"memory/memory.limit_in_bytes": 3 * GIB}, 3 * GIB),  # v1, seen from inside
        ("3:cpuset:/x\n", {"memory/x/memory.limit_in_bytes": GIB}, math.inf),
        (None, {"memory.max": GIB}, math.inf),  # another system than Linux
    ],
)
def test_the_limit_of_a_container(own, files, expected, tmp_path):
    if own:
        (tmp_path / "own").write_text(own)
    for name, limit in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(f"{limit}\n")
    assert container_memory(tmp_path / "own", tmp_path / "groups") == expected


def test_the_limit_bounds_what_an_encoder_takes_at_once(tiny, monkeypatch):
    assert GIB // 8 < available_memory() < math.inf
    model = load_encoder(str(tiny / "bart"))
    monkeypatch.setattr("geli.run.distributed.container_memory", lambda: 64 * model.hidden_size * 1024)
    assert available_memory() == 64 * model.hidden_size * 1024
    layers = model.model.config.num_hidden_layers
    assert model.token_budget(gradients=True) == max(model.max_length, 64 * 1024 // 4 // 96 // layers) < CPU_TOKENS
    monkeypatch.setattr(encoder, "available_memory", lambda: 1 << 50)
    assert model.token_budget(gradients=True) == 1 << 15 and model.token_budget() == CPU_TOKENS
