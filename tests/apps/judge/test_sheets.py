"""Blinded sheets: what they must not tell, what comes back unblinded, and which sheets are refused."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from judged_responses import fill

from apps.judge.page import render_page
from apps.judge.pairs import CRITERIA, Pair
from apps.judge.sheets import COLUMNS, Key, make_sheets, read_sheet, read_sheets, sheet_csv, write_sheets
from geli.run.errors import UserError

PAIRS = [Pair(row, f"User: hello {row}", f"one {row}", f"two {row}") for row in range(0, 60, 2)]


class Opposite(random.Random):
    """Draws as `random.Random`, but takes the other one of two sides."""

    def choice(self, seq):
        return seq[1 - seq.index(super().choice(seq))]


# ---------------------------------------------------------------------------------------------------------------------
# Blinding


def test_exchanging_the_policies_and_the_sides_gives_the_same_files(tmp_path):
    """So nothing in them, their names or their order depends on which response is whose, but the side it is on."""
    exchanged = [pair._replace(first=pair.second, second=pair.first) for pair in PAIRS]
    sheets, _ = make_sheets(PAIRS, 2, ["tuned", "base"], random.Random(5))
    others, _ = make_sheets(exchanged, 2, ["base", "tuned"], Opposite(5))
    assert sheets == others
    for folder, made in {"a": sheets, "b": others}.items():
        write_sheets(tmp_path / folder, made, Key(["x", "y"], "", [], {}))
    files = {path.name: path.read_bytes() for path in (tmp_path / "a" / "sheets").iterdir()}
    assert sorted(files) == ["rater_1.csv", "rater_1.html", "rater_2.csv", "rater_2.html"]
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b" / "sheets").iterdir()}


def test_sides_are_even_and_go_with_nothing_that_a_rater_sees():
    many = [Pair(row, "", f"one {row}", f"two {row}") for row in range(1_000)]
    sheets, _ = make_sheets(many, 2, ["tuned", "base"], random.Random(0))
    rows, others = sheets.values()
    for sheet in (rows, others):
        side = np.array([row["A"].startswith("one") for row in sheet], float)
        assert 0.45 < side.mean() < 0.55
        seen = [np.arange(1_000), [int(row["item"], 16) / 2**64 for row in sheet], [int(row["A"][4:]) for row in sheet]]
        assert max(abs(np.corrcoef(side, what)[0, 1]) for what in seen) < 0.1
    left = {row["A"][4:]: row["A"] for row in others}
    same = np.mean([left[row["A"][4:]] == row["A"] for row in rows])
    assert 0.45 < same < 0.55  # two raters have sides of their own
    assert [row["A"][4:] for row in rows] != [row["A"][4:] for row in others]  # and orders of their own


def test_ids_are_random_tokens_of_one_length():
    sheets, key = make_sheets(PAIRS, 3, ["tuned", "base"])
    ids = [row["item"] for rows in sheets.values() for row in rows] + list(key.sheets)
    assert {len(token) for token in ids} == {16} and len(set(ids)) == len(ids) == 93
    again, _ = make_sheets(PAIRS, 3, ["tuned", "base"])  # with the system's randomness
    assert [row["A"] for row in again["rater_1"]] != [row["A"] for row in sheets["rater_1"]]
    assert not {row["item"] for row in again["rater_1"]} & set(ids)


def test_sheets_hold_nothing_of_the_key(tmp_path):
    sheets, key = make_sheets(PAIRS, 2, ["tuned", "base"])
    paths = write_sheets(tmp_path / "out", sheets, key)
    assert Key.read(paths[0]) == key and paths[0] == tmp_path / "out" / "key.json"
    secrets = [key.secret, "first_is", "tuned", "base"]
    secrets += [item["seal"] for sheet in key.sheets.values() for item in sheet["items"].values()]
    for path in paths[1:]:
        assert not [word for word in secrets if word in path.read_text()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (*paths, tmp_path / "out"))


def test_a_key_is_never_overwritten(tmp_path):
    sheets, key = make_sheets(PAIRS, 1, ["tuned", "base"])
    write_sheets(tmp_path, sheets, key)
    with pytest.raises(UserError, match="expected a new or empty folder"):
        write_sheets(tmp_path, sheets, key)


def test_the_page_shows_texts_and_never_markup():
    row = dict.fromkeys(COLUMNS, "") | {"A": "</script><script>alert(1)</script>", "B": "<!-- <img src=x> & 'quoted'"}
    page = render_page("rater_1", COLUMNS, [row])
    assert "alert(1)</script>" not in page and "<img" not in page and page.count("</script>") == 2
    data = page.partition('<script type="application/json" id="sheet">')[2].partition("</script>")[0]
    assert json.loads(data)["rows"] == [row]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.fixture
def made():
    """(rows of the first rater's filled sheet, those of the second, key)."""
    sheets, key = make_sheets(PAIRS, 2, ["tuned", "base"], random.Random(1))
    votes = {pair.row: np.sign(pair.row - 30) for pair in PAIRS}
    return *(fill(rows, key, lambda row, _: votes[row]) for rows in sheets.values()), key


def written(path, rows):
    path.write_text(sheet_csv(rows), encoding="utf-8", newline="")
    return path


def test_planted_votes_come_back(made, tmp_path):
    rows, _, key = made
    sheet = read_sheet(written(tmp_path / "a.csv", rows), key)
    expected = np.tile(np.sign(np.array(key.rows) - 30)[:, None], len(CRITERIA))
    assert (sheet.votes == expected).all() and (sheet.rater, sheet.missing, sheet.unreadable) == ("rater_1", 0, 0)
    assert Counter(row["overall quality"] for row in rows).keys() == {"A", "B", "tie"}  # of either side


def test_what_spreadsheet_programs_change_is_no_tampering(made, tmp_path):
    rows, _, key = made
    votes = read_sheet(written(tmp_path / "a.csv", rows), key).votes
    resorted = sorted(({**row, "note": "hm"} for row in rows), key=lambda row: row["A"])
    changed = [row | {"positivity": f" {row['positivity'].lower()} ", "A": f"{row['A']}\n "} for row in resorted]
    names = [*reversed(COLUMNS), "note"]  # columns in another order, and one more
    lines = [",".join(f'"{row[name]}"' for name in names) for row in [dict(zip(names, names, strict=True)), *changed]]
    (tmp_path / "b.csv").write_text("\n".join(lines))  # without the mark at the beginning
    assert (read_sheet(tmp_path / "b.csv", key).votes == votes).all()


TAMPERED = {
    "changed": lambda rows, _: [rows[0] | {"A": rows[0]["A"] + "!"}, *rows[1:]],
    "changed ": lambda rows, _: [rows[0] | {"A": rows[0]["B"], "B": rows[0]["A"]}, *rows[1:]],
    "changed  ": lambda rows, _: [rows[0] | {"item": rows[1]["item"]}, rows[1] | {"item": rows[0]["item"]}, *rows[2:]],
    "2 items are missing": lambda rows, _: rows[2:],
    "repeated": lambda rows, _: [*rows, rows[3]],
    "unknown": lambda rows, _: [*rows, rows[0] | {"item": "0" * 16}],
    "unknown ": lambda rows, others: [*rows, others[0] | {"sheet": rows[0]["sheet"]}],
    "expected a sheet of this key": lambda rows, others: [*rows, *others],
    "expected a sheet of this key, ": lambda rows, _: [row | {"sheet": "f" * 16} for row in rows],
    "expected a sheet of this key, found the sheet ids []": lambda rows, _: [],
}


@pytest.mark.parametrize("message", TAMPERED)
def test_a_sheet_that_was_tampered_with_is_refused_by_name(made, tmp_path, message):
    rows, others, key = made
    path, good = written(tmp_path / "bad.csv", TAMPERED[message](rows, others)), written(tmp_path / "good.csv", others)
    sheets, left_out = read_sheets([path, good], key)
    assert [sheet.rater for sheet in sheets] == ["rater_2"]
    assert len(left_out) == 1 and left_out[0].startswith(f"{path}: ") and message.strip() in left_out[0]


def test_a_sheet_that_is_no_table_of_this_form_is_refused_by_name(made, tmp_path):
    rows, _, key = made
    (tmp_path / "a.csv").write_text(sheet_csv(rows).replace('","', '";"'))
    (tmp_path / "b.csv").write_bytes(b"PK\x03\x04\xff\xff")  # a spreadsheet's own format
    (tmp_path / "c.csv").write_text(sheet_csv(rows)[:-200])  # half a download
    paths = [tmp_path / name for name in ("a.csv", "b.csv", "c.csv")]
    sheets, left_out = read_sheets(paths, key)
    assert not sheets and [reason.partition(": ")[0] for reason in left_out] == list(map(str, paths))


def test_missing_and_unreadable_answers_are_counted_and_are_no_votes(made, tmp_path):
    rows, _, key = made
    rows[0] |= {"positivity": "", "overall quality": "both", "fluent": "  "}
    sheet = read_sheet(written(tmp_path / "a.csv", rows), key)
    assert (sheet.missing, sheet.unreadable, int(np.isnan(sheet.votes).sum())) == (2, 1, 3)
    assert sheet.answered == pytest.approx(1 - 3 / 240)


def test_a_sheet_with_less_than_half_of_its_answers_is_left_out(made, tmp_path):
    rows, others, key = made
    empty = dict.fromkeys(CRITERIA, "")
    half = written(tmp_path / "half.csv", [row | empty if i < 15 else row for i, row in enumerate(rows)])
    less = [row | empty if i < 15 else row | {"fluent": ""} for i, row in enumerate(others)]
    sheets, left_out = read_sheets([half, written(tmp_path / "less.csv", less)], key)
    assert [sheet.rater for sheet in sheets] == ["rater_1"]
    assert left_out == [f"{tmp_path / 'less.csv'}: 44% of its questions have an answer, less than half"]


def test_the_same_answers_twice_count_once(made, tmp_path):
    rows, others, key = made
    paths = [written(tmp_path / f"{n}.csv", r) for n, r in {"a": rows, "b": others, "c": rows[::-1]}.items()]
    sheets, left_out = read_sheets([*paths, paths[0]], key)
    assert [sheet.rater for sheet in sheets] == ["rater_1", "rater_2"]
    assert len(left_out) == 2 and all("the same answers of rater_1 as in" in reason for reason in left_out)
    assert str(paths[0]) in left_out[0] and str(paths[2]) in left_out[0]


def test_different_answers_of_one_rater_are_left_out_with_both_names(made, tmp_path):
    rows, others, key = made
    other = [rows[0] | {"fluent": "B" if rows[0]["fluent"] == "A" else "A"}, *rows[1:]]
    paths = [written(tmp_path / f"{n}.csv", r) for n, r in {"a": rows, "b": other, "c": others}.items()]
    for order in (paths, paths[::-1]):  # in whichever order they are given
        sheets, left_out = read_sheets(order, key)
        assert [sheet.rater for sheet in sheets] == ["rater_2"] and len(left_out) == 1
        assert str(paths[0]) in left_out[0] and str(paths[1]) in left_out[0]


@pytest.mark.parametrize("content", ["{}", "[]", "no json", '{"compare": [], "more": 1}'])
def test_what_is_no_key_is_refused(tmp_path, content):
    (tmp_path / "key.json").write_text(content)
    with pytest.raises(UserError, match=r"key\.json: expected the key\.json that `make` wrote"):
        Key.read(tmp_path / "key.json")
