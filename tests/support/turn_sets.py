"""Turns and trajectories made by hand, without files."""

from data_utils import SignalOptions, Trajectory, TurnSet
from geli.data.candor import FACES, NEUTRAL, Conversation, Turn


def conversation(name: str, faces: list[str], no_faces: str = "") -> Conversation:
    """A conversation in which `u` and `v` take turns, `u` first; `faces`: the listener's, one for each turn."""
    turns = tuple(
        Turn(
            str(i), "uv"[i % 2], 2.0 * i, 2.0 * i + 1, f"{name} turn {i}", 6, FACES.index(face), float(face == FACES[4])
        )
        for i, face in enumerate(faces)
    )
    return Conversation(name, ("u", "v"), turns, {}, frozenset({"overall_affect"}), no_faces=no_faces)


def trajectory(name: str, score: float, faces: list[str], no_faces: str = "") -> Trajectory:
    """The trajectory in which `u` rates `score` points and `v` speaks once for each of `faces`."""
    every = [face for agents in faces for face in (FACES[NEUTRAL], agents)]
    turns = tuple(range(1, len(every), 2))
    return Trajectory(conversation(name, every, no_faces), False, "u", "v", score, score / 10, turns)


def turn_set(*trajectories: Trajectory, **signal) -> TurnSet:
    """The agent turns of these trajectories, with one turn of context."""
    return TurnSet.from_trajectories(list(trajectories), 1, SignalOptions(**signal))
