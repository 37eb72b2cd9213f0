"""What the tests of this folder share."""

import pytest


@pytest.fixture(scope="session")
def face_clips():
    """The folder of two real clips; skips where a package or the clips are missing."""
    for package in ("av", "cv2", "ai_edge_litert"):
        pytest.importorskip(package, reason=f"needs {package} (pip install -r apps/calls/requirements.txt)")
    from face_clips import clips_or_skip

    return clips_or_skip()
