"""Shares of scores on disk, and which trajectories they fit."""

import numpy as np
import pytest
from turn_sets import trajectory, turn_set

from data_utils import fingerprint, split_by_shares
from geli.data.shares import COLUMNS, TrajectoryShares, read_shares
from geli.run.errors import UserError

FIRST, SECOND = trajectory("a", 80.0, ["happiness", "neutral"]), trajectory("b", 40.0, ["neutral"])


def rows(of, *shares):
    """A line for each agent turn of a trajectory."""
    turns = [of.conversation.turns[i].turn_id for i in of.agent_turns]
    return [
        f"{of.conversation.id},{int(of.flip)},{turn},{share},answered,9.0,0.5,{fingerprint([of])}"
        for turn, share in zip(turns, shares, strict=False)
    ]


def read(folder, rows):
    """What is read of a file with these lines."""
    path = folder / "shares.csv"
    path.write_text("\n".join([",".join(COLUMNS), *rows, ""]))
    return read_shares(path)


def test_shares_are_read_from_the_file_and_turns_get_t_times_theirs(tmp_path):
    found = read(tmp_path, [*rows(FIRST, 30.0, 50.0), *rows(SECOND, 40.0)])
    assert found["a/0"] == TrajectoryShares(fingerprint([FIRST]), {"1": 30.0, "3": 50.0})
    assert split_by_shares([FIRST, SECOND], found) == ([FIRST, SECOND], {})
    turns = turn_set(SECOND, FIRST).with_shares(found)
    assert turns.shares.tolist() == [40.0, 60.0, 100.0] and turns.shares.dtype == np.float32


def test_trajectories_that_shares_do_not_fit_are_named(tmp_path):
    changed = trajectory("b", 50.0, ["neutral"])  # another score
    shares = read(tmp_path, [*rows(FIRST, 80.0), *rows(changed, 40.0)])  # FIRST has two turns
    kept, dropped = split_by_shares([FIRST, SECOND, trajectory("c", 1.0, ["neutral"])], shares)
    assert kept == [] and list(dropped) == ["a/0", "b/0", "c/0"]
    assert [reason.split()[0] for reason in dropped.values()] == ["turns", "has", "no"]


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "conversation_id,turn_id,reward\na,1,0.5\n",
        "{header}\na,0,1,half,answered,1,1,f\n",
        "{header}\na,0,1,nan,answered,1,1,f\n",
        "{header}\na,0,1\n",
        "\0\xff",
    ],
)
def test_another_file_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "shares.csv"
    if content is not None:
        header = "conversation_id,flip,turn_id,share,status,tokens,seconds,data"
        path.write_text(content.replace("{header}", header), encoding="latin-1")
    with pytest.raises(UserError, match=r"apps/llm_shares"):
        read_shares(path)
