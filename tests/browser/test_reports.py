"""The page of each stage in a real browser: nothing fails, every figure is visible, readable on phone and screen."""

import pytest
from conftest import call_script

pytestmark = pytest.mark.slow

SIZES = {"phone": 400, "screen": 1400}


@pytest.fixture(scope="module")
def reports(sample, tiny, tmp_path_factory):
    """The pages of a LI, a GELI and a PPO run, by stage."""
    out = tmp_path_factory.mktemp("reports")
    common = ["--data_dir", sample, "--output_dir", out, "--context_turns", 2, "--val"]
    heads = [*common, "--small_model_shrink", "--epochs", 1, "--learning_rate", 1e-3]
    ppo = ["--train", "--model_name", tiny / "llama", "--batch_size", 6, "--steps", 2, "--val_prompts", 6]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "disabled")
        call_script("train_reward_LI_only.py", *heads, "--lang_model_path", tiny / "bart", "--run_name", "li")
        call_script("train_reward_GELI.py", *heads, "--train", "--affect_path", "li", "--run_name", "geli")
        call_script("train_rl_GELI.py", *common, *ppo, "--reward_path", "geli")
    names = {1: "report_li.html", 2: "report_geli.html", 3: "GELI_llama_report.html"}
    return {stage: next(out.glob(f"*/{name}")) for stage, name in names.items()}


@pytest.fixture
def opened(browser):
    """Opens a page at a width; what goes wrong in it is collected."""
    contexts = []

    def open_page(path, width):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}))
        page, wrong = contexts[-1].new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("requestfailed", lambda request: wrong.append(request.url))
        page.on("request", lambda request: wrong.append(request.url) if request.url.startswith("http") else None)
        page.goto(path.as_uri())
        return page, wrong

    yield open_page
    for context in contexts:
        context.close()


@pytest.mark.parametrize("width", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_page_is_whole_and_fits(reports, opened, stage, width):
    page, wrong = opened(reports[stage], width)
    assert wrong == []
    figures = page.locator("figure img")
    assert figures.count() == {1: 4, 2: 4, 3: 2}[stage]
    for i in range(figures.count()):
        shown = figures.nth(i)
        shown.scroll_into_view_if_needed()
        assert shown.is_visible() and shown.evaluate("image => image.naturalWidth") > 300
        assert shown.get_attribute("alt")
        assert shown.bounding_box()["width"] <= max(width, 34 * 16)  # a wide one is scrolled on a phone
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert page.locator("h1").inner_text().startswith(f"Stage {stage}")


def test_links_lead_from_the_policy_to_stage_1(reports, opened):
    page, wrong = opened(reports[3], 1400)
    page.get_by_role("link", name="stage 2: run geli").click()
    assert page.locator("h1").inner_text() == "Stage 2 (GELI, RRD): run geli"
    page.get_by_role("link", name="stage 1: run li").click()
    assert page.locator("h1").inner_text() == "Stage 1 (LI): run li" and wrong == []
