"""The page of a sheet, filled in by a browser: answers survive a reload, and the exported file is scored."""

import csv

import pandas as pd
import pytest
from conftest import call_script
from judged_responses import fill, write_responses

from apps.judge.pairs import CRITERIA
from apps.judge.sheets import Key, read_sheet

TOOL, PROMPTS = "apps.judge", 4
LABELS = {"A": "Left (A)", "tie": "No difference", "B": "Right (B)"}
EVIL = '</script><img src=x onerror="document.title=\'broken\'"> & “{}”, "quoted",\n=1+1'


def vote(row: int, criterion: str) -> int:
    """The planted vote: of every value, and not the same for all criteria."""
    return (row + list(CRITERIA).index(criterion)) % 3 - 1


@pytest.fixture
def out(tmp_path):
    """The folder of `make` with one rater and responses that look like markup."""
    responses = write_responses(tmp_path / "r.csv", PROMPTS, tuned=f"after {EVIL}", base="a" * 300)
    call_script(TOOL, "make", responses, tmp_path / "out", "--prompts", PROMPTS, "--raters", 1)
    return tmp_path / "out"


@pytest.fixture
def opened(browser, out):
    """The rater's page in a window, and the list of what went wrong in it."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, accept_downloads=True)
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("requestfailed", lambda request: wrong.append(request.url))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "blob:")) else wrong.append(request.url)
    )
    page.goto((out / "sheets" / "rater_1.html").as_uri())
    yield page, wrong
    context.close()


def rows_of(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def answer(page, row: dict[str, str], criteria=tuple(CRITERIA)) -> None:
    """Answers questions about the item that is shown."""
    for name in criteria:
        question = page.get_by_role("group", name=CRITERIA[name])
        question.get_by_role("radio", name=LABELS[row[name]]).check()


def export(page, path):
    """What the page's button downloads, saved at `path`."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Export answers").click()
    assert download.value.suggested_filename == "rater_1_filled.csv"
    download.value.save_as(path)
    return path


def test_a_sheet_is_filled_in_reloaded_exported_and_scored(opened, out, tmp_path):
    page, wrong = opened
    key = Key.read(out / "key.json")
    filled = fill(rows_of(out / "sheets" / "rater_1.csv"), key, vote)
    first, *others = filled
    assert page.locator("#A").text_content() == first["A"] and page.locator("#B").text_content() == first["B"]
    turns = page.locator("#turns p").all_text_contents()
    assert [turn[:2] for turn in turns] == ["Us", "AI", "Us"] and "<b>" in turns[0]

    answer(page, first)
    page.get_by_role("button", name="Next").click()
    answer(page, filled[1], list(CRITERIA)[:3])
    page.reload()  # opens at the first question without an answer
    assert page.get_by_role("heading", level=1).text_content() == f"Item 2 of {PROMPTS}"
    assert page.locator("#answered").text_content() == f"11 of {8 * PROMPTS} questions answered"
    assert page.locator("input:checked").count() == 3
    page.get_by_role("button", name="Previous").click()
    assert page.locator("input:checked").count() == 8

    for row in others:
        page.get_by_role("button", name="Next").click()
        answer(page, row)
    assert page.get_by_role("button", name="Next").is_disabled()
    path = export(page, tmp_path / "filled.csv")
    assert rows_of(path) == filled
    printed = call_script(TOOL, "score", out / "key.json", path).stdout
    assert "1 of 1 raters" in printed and "Left out" not in printed
    table = pd.read_csv(out / "human_eval.csv").set_index("criterion")
    for name in CRITERIA:
        votes = [vote(row, name) for row in range(PROMPTS)]
        assert table.loc[name, "win"] == votes.count(1) / PROMPTS and table.loc[name, "tie"] == votes.count(0) / PROMPTS
    assert page.title() == "Sheet of rater_1" and wrong == []


def test_an_empty_export_is_the_empty_sheet_byte_for_byte_after_a_warning(opened, out, tmp_path):
    page, wrong = opened
    warnings = []
    page.once("dialog", lambda dialog: (warnings.append(dialog.message), dialog.dismiss()))
    page.get_by_role("button", name="Next").click()
    page.get_by_role("button", name="Export answers").click()  # the warning is heeded: to the first that is missing
    assert page.get_by_role("heading", level=1).text_content() == f"Item 1 of {PROMPTS}"
    page.once("dialog", lambda dialog: dialog.accept())
    path = export(page, tmp_path / "empty.csv")
    assert path.read_bytes() == (out / "sheets" / "rater_1.csv").read_bytes()
    assert warnings == [f"{8 * PROMPTS} of {8 * PROMPTS} answers are missing. Export anyway?"] and wrong == []


def test_the_keyboard_is_enough(opened, out, tmp_path):
    page, wrong = opened
    row = rows_of(out / "sheets" / "rater_1.csv")[0]
    for _ in CRITERIA:
        page.keyboard.press("Tab")  # to the next question
        page.keyboard.press("ArrowRight")  # from the left response to no difference
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "next"  # Previous is disabled
    page.keyboard.press("Enter")
    assert page.get_by_role("heading", level=1).text_content() == f"Item 2 of {PROMPTS}"
    page.once("dialog", lambda dialog: dialog.accept())
    exported = rows_of(export(page, tmp_path / "filled.csv"))
    assert exported[0] == row | dict.fromkeys(CRITERIA, "tie") and wrong == []


@pytest.mark.parametrize(("width", "side_by_side"), [(400, False), (1400, True)])
def test_it_fits_small_and_large_windows(opened, tmp_path, width, side_by_side):
    page, wrong = opened
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    left, right = (page.locator(f"#{side}").bounding_box() for side in "AB")
    assert (left["x"] < right["x"]) == side_by_side and (left["y"] < right["y"]) != side_by_side
    assert len(page.screenshot(path=tmp_path / "page.png", full_page=True)) > 20_000 and wrong == []


def test_a_browser_that_keeps_nothing_says_so_and_still_exports(opened, out, tmp_path):
    page, wrong = opened
    page.evaluate("() => { Storage.prototype.setItem = () => { throw new Error('full'); }; }")
    page.get_by_role("radio", name=LABELS["A"]).first.check()
    assert "This browser keeps no answers" in page.get_by_role("status").text_content()
    page.once("dialog", lambda dialog: dialog.accept())
    sheet = read_sheet(export(page, tmp_path / "filled.csv"), Key.read(out / "key.json"))
    assert sheet.missing == 8 * PROMPTS - 1 and wrong == []
