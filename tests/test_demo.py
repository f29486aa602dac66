"""The page of `gpt2repro demo`: its answers without a browser, then the whole of it in a real headless Chromium."""

import contextlib
import http.client
import json
import math
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
import torch

from gpt2repro.commands import demo
from gpt2repro.data.tokenization import bpe_tokenizer
from gpt2repro.options import InputError
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

TEXT = "The import statement binds a name. A <tag> & “quotes”, 中文 and 🙂 too.\n" * 30
SETTINGS = {
    "temperature": 0.8, "top_k": 50, "top_p": 1, "new_tokens": 40, "seed": 3,
}  # fmt: skip


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = """--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync""".split()


def make_model():
    tokenizer = bpe_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    config = GPT2ReproConfig(
        vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return GPT2ReproForCausalLM(config).eval(), tokenizer


@pytest.fixture(scope="module")
def served():
    pytest.importorskip("gradio", reason="the page is the extra `demo`")
    from gpt2repro.generation.demo_page import Served

    return Served(*make_model())


def last_answer(served, prompt: str, **settings) -> tuple[str, str]:
    from gpt2repro.generation.demo_page import answer

    return list(answer(served, {"prompt": prompt, **SETTINGS, **settings}, most_new_tokens=100))[-1]


def shown_text(page: str) -> str:
    import html

    return html.unescape(re.sub(r"<[^>]*>", "", page))


@pytest.mark.extra
def test_page_shows_the_prompt_and_the_tokens_each_with_its_probability(served):
    prompt = "The <b>import</b> & ${1+1} {{x}}"
    page, below = last_answer(served, prompt)
    assert shown_text(page).startswith(prompt)
    assert "<b>import" not in page, "what a visitor writes is text, not HTML"
    assert 20 < page.count('class="tok ') <= 40
    assert "tokens/s" in below and "alert" not in below
    assert last_answer(served, prompt)[0] == page
    assert last_answer(served, prompt, seed=4)[0] != page


@pytest.mark.extra
def test_shown_probability_is_the_models_own(served):
    page, _ = last_answer(served, "The import", new_tokens=1, temperature=0)
    ids = served.tokenizer("The import", return_tensors="pt")["input_ids"]
    probability = served.model(ids).logits[0, -1].softmax(-1).max().item()
    shown = re.search(r'data-tip="[^"]*?(\d+\.\d) %', page)
    assert math.isclose(float(shown[1]), 100 * probability, abs_tol=0.051)


@pytest.mark.extra
def test_character_of_several_tokens_becomes_one_span(served):
    from gpt2repro.generation.decoder import Step
    from gpt2repro.generation.demo_page import Spans
    from gpt2repro.generation.prompts import TextStream

    ids = served.tokenizer("🙃", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    stream, spans = TextStream(served.tokenizer), Spans(served.tokenizer)
    logits = torch.zeros(1, len(served.tokenizer))
    found = [spans.add(Step(torch.tensor([token]), logits), stream.push(token)) for token in ids]
    assert [span for span, _ in found[:-1]] == [""] * (len(ids) - 1)
    assert shown_text(found[-1][0]) == "🙃" and f"({len(ids)} tokens)" in found[-1][0]
    assert math.isclose(found[0][1], math.log(len(served.tokenizer)), rel_tol=1e-5)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("prompt", "settings", "sentence"),
    [
        ("long " * 3000, {}, "the model sees 256 and needs room for at least one more; shorten the prompt"),
        ("x" * 30_000, {}, "prompt: String should have at most 20000 characters"),
        ("\ud800", {}, "unable to parse raw data as a unicode string"),
        ("a", {"temperature": -1}, "temperature: should be greater than or equal to 0"),
        ("a", {"temperature": math.nan}, "temperature: should be a finite number"),
        ("a", {"top_p": 7}, "top_p: should be less than or equal to 1"),
        ("a", {"top_k": None}, "top_k: should be a valid integer"),
        ("a", {"new_tokens": 0}, "new_tokens: should be greater than or equal to 1"),
        ("a", {"seed": -5}, "seed: should be greater than or equal to 0"),
        (["/etc/passwd"], {}, "prompt: should be a valid string"),
    ],
)
def test_what_a_visitor_gets_wrong_is_said_in_a_sentence(served, prompt, settings, sentence):
    _, below = last_answer(served, prompt, **settings)
    assert 'role="alert"' in below and sentence in shown_text(below)


@pytest.mark.extra
def test_failure_on_our_side_is_a_sentence_for_the_visitor_and_a_traceback_for_the_log(served, monkeypatch, capsys):
    monkeypatch.setattr("gpt2repro.generation.demo_page.decoder_for", lambda *_, **__: 1 / 0)
    _, below = last_answer(served, "The")
    assert "Something went wrong on this side" in below and "ZeroDivision" not in below
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.extra
def test_the_length_is_cut_to_what_the_model_sees_and_the_page_says_so(served):
    page, below = last_answer(served, "a" * 230, new_tokens=100, temperature=0)
    room = 256 - len(served.tokenizer("a" * 230)["input_ids"])
    assert f"cut at {room}: there is no room for 100" in shown_text(below)
    assert page.count('class="tok ') == room


@pytest.mark.extra
def test_the_first_word_is_reached_by_tab_and_the_others_from_there(served):
    page, _ = last_answer(served, "The import")
    assert page.count('tabindex="0"') == 1 and page.index('tabindex="0"') < page.index('tabindex="-1"')


@pytest.fixture
def door(served, free_port, monkeypatch):
    """A served page whose text never ends: (address, what a browser sends for it, an event: the text was given up)."""
    import gradio

    from gpt2repro.generation import demo_page

    given_up = threading.Event()

    def endless(*_, **__):
        try:
            while True:
                time.sleep(0.02)
                yield demo_page.page("x"), demo_page.below(writing=True)
        finally:
            given_up.set()

    monkeypatch.setattr(demo_page, "answer", endless)
    monkeypatch.setattr(demo_page, "SECONDS_UNHEARD", 0.5)
    blocks, how = demo_page.build({"model": served}, most_new_tokens=100, concurrency=1, queue=2)
    write = next(index for index, fn in blocks.fns.items() if fn.name == "write")
    job = {"data": ["model", "The", 0.8, 50, 1, 40, 3], "fn_index": write, "session_hash": "visitor"}
    blocks.launch(server_port=free_port, prevent_thread_lock=True, **how)
    yield f"http://127.0.0.1:{free_port}/", job, given_up
    blocks.close()
    gradio.close_all()


def post(url: str, body: dict):
    data = json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=10)


@pytest.mark.extra
def test_a_text_ends_when_nobody_listens(door):
    address, job, given_up = door
    post(address + "gradio_api/queue/join", job).close()
    assert given_up.wait(20), "nobody ever listened"

    given_up.clear()
    job["session_hash"] = "listener"
    post(address + "gradio_api/queue/join", job).close()
    with urllib.request.urlopen(address + "gradio_api/queue/data?session_hash=listener", timeout=10) as stream:
        start = time.monotonic()
        while time.monotonic() - start < 1.5:
            assert stream.readline() is not None
        assert not given_up.is_set(), "somebody listens"
    assert given_up.wait(20), "the listener has gone"


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_stop_stands_where_write_stood_and_stops(door):
    address, _, given_up = door
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS).new_page(
            viewport={"width": 390, "height": 844}
        )
        page.goto(address)
        write, stop, clear = (page.locator(f"#{name}") for name in ("write", "stop", "clear"))
        assert not page.locator("#model").is_visible(), "one model is a line, nothing to choose"
        write.click()
        stop.wait_for()
        assert not write.is_visible() and not clear.is_visible()
        stop.click()
        write.wait_for()
        assert given_up.wait(20)
        page.locator("#status", has_text="stopped").wait_for()
        assert not stop.is_visible() and clear.is_visible()
        width, sheet = page.evaluate("[innerWidth, document.querySelector('#text').getBoundingClientRect().width]")
        assert page.evaluate("document.documentElement.scrollWidth") <= width and sheet >= width - 32


@pytest.mark.extra
def test_large_requests_and_the_monitoring_page_are_refused(door):
    address, *_ = door
    for name, value in (("Content-Length", str(10**6)), ("Transfer-Encoding", "chunked")):
        connection = http.client.HTTPConnection(address.split("/")[2], timeout=10)
        connection.putrequest("POST", "/gradio_api/queue/join")
        connection.putheader(name, value)
        connection.endheaders()  # it answers without waiting for the body
        assert connection.getresponse().status == 413
        connection.close()
    for path in ("monitoring", "gradio_api/monitoring", "gradio_api/monitoring/summary"):
        with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
            urllib.request.urlopen(address + path, timeout=10)


@pytest.mark.extra
def test_a_port_that_is_taken_and_a_machine_that_cannot_reach_itself_are_said_in_a_sentence(
    free_port, tmp_path, monkeypatch
):
    pytest.importorskip("gradio")
    model, tokenizer = make_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    arguments = ["--model", str(tmp_path), "--port", str(free_port), "--device", "cpu"]
    with (
        socket.create_server(("127.0.0.1", free_port)),
        pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1:\d+ \([^()]+\); choose"),
    ):
        demo.main(arguments)
    with pytest.raises(InputError, match=r"cannot listen on no\.such\.host"):
        demo.main([*arguments, "--host", "no.such.host"])
    monkeypatch.setattr("gradio.networking.url_ok", lambda url: False)  # what Gradio finds behind some proxies
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(InputError, match=r"the page does not answer at http://127.0.0.1.*connect to itself"):
        demo.main(arguments)


@pytest.mark.parametrize("arguments", [["--model"], ["--model", ""], ["--model", "a", ""], []])
def test_a_model_has_to_be_named(arguments):
    with pytest.raises(InputError, match=r"--model (needs a run|is required)"):
        demo.main(arguments)


def test_missing_gradio_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=re.escape('pip install "gpt2repro[demo]"')):
        demo.main(["--model", "anything"])


def test_labels_show_no_more_of_a_path_than_tells_models_apart(tmp_path):
    for name in ("a/run", "b/run"):
        (tmp_path / name).mkdir(parents=True)
    assert demo.labels([str(tmp_path / "a" / "run"), "user/name"]) == ["run", "user/name"]
    assert demo.labels([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]) == ["a/run", "b/run"]
    with pytest.raises(InputError, match="named twice"):
        demo.labels(["user/name", "user/name"])


# ------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture
def address(tmp_path, free_port, root):
    """A running `gpt2repro demo` with a run (two models to choose from), as a user would start it."""
    model, tokenizer = make_model()
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step_000002"
    for place in (checkpoint, tmp_path / "other"):
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0}\n')
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "gpt2repro", "demo", "--model", str(run), str(tmp_path / "other")]
    command += ["--port", str(free_port), "--device", "cpu", "--max_new_tokens", "200"]
    process = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{free_port}/"
    try:
        for _ in range(240):
            with contextlib.suppress(urllib.error.URLError):
                urllib.request.urlopen(url, timeout=5).close()
                break
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait(30)
        log.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_real_browser(address):
    pytest.importorskip("gradio")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page()
        requests, failures = [], []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: failures.append(str(error)))
        prompt, write, tokens = page.locator("#prompt textarea"), page.locator("#write"), page.locator("#text .tok")
        done = page.locator("#status", has_text="perplexity of its own words")

        # type, click, see tokens stream: more and more of them, until the line below says it is done
        for _ in range(5):  # by chance a text ends after a few words, too soon to be seen growing
            page.goto(address)
            prompt.fill("The import statement")
            page.locator("#length input[type=number]").fill("200")
            page.evaluate(
                "window.counts = new Set(); new MutationObserver("
                "() => window.counts.add(document.querySelectorAll('#text .tok').length)"
                ").observe(document.body, {subtree: true, childList: true})"
            )
            write.click()
            done.wait_for()
            if pieces := len(page.evaluate("[...window.counts].filter(count => count > 0)")) > 1:
                break
        assert pieces, "it came in one piece"
        assert page.locator("#text .given").inner_text() == "The import statement"

        # Enter writes, Shift+Enter breaks the line; an example is written at once
        page.locator("#clear").click()
        page.locator("#text .hint").wait_for()
        assert not page.locator("#clear").is_visible() and not page.locator("#stop").is_visible()
        prompt.fill("A")
        prompt.press("Shift+Enter")
        page.keyboard.type("B")
        assert prompt.input_value() == "A\nB" and page.locator("#text .hint").is_visible()
        prompt.press("Enter")
        done.wait_for()
        assert page.locator("#text .given").inner_text() == "A\nB"
        page.get_by_text("Once upon a time").click()
        page.locator("#text .given", has_text="Once upon a time").wait_for()
        done.wait_for()

        # keyboard: Tab reaches the first word, the arrow keys walk on
        place = "[...document.querySelectorAll('#text .tok')].indexOf(document.activeElement)"
        page.locator("#text .tok[tabindex='0']").focus()
        for key, expected in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("Home", 0), ("Escape", -1)):
            page.keyboard.press(key)
            assert page.evaluate(place) == expected

        # hover: what else the model had in mind
        tokens.nth(3).hover()
        tip = page.evaluate("getComputedStyle(document.querySelectorAll('#text .tok')[3], '::after').content")
        assert len(re.findall(r"\d %", tip)) == 6, "its own probability and those of the five likeliest"

        # change a slider: at temperature 0 and length 7 the text is the same again and 7 tokens long
        slider = page.locator("#temperature input[type=range]")
        slider.focus()
        page.keyboard.press("Home")
        assert page.locator("#temperature input[type=number]").input_value() == "0"
        page.locator("#length input[type=number]").fill("7")
        texts = []
        for _ in range(2):
            page.locator("#clear").click()
            page.locator("#text .hint").wait_for()
            prompt.fill("The import statement")
            write.click()
            done.wait_for()
            texts.append(page.locator("#text .page").inner_text())
        assert texts[0] == texts[1] and 1 <= tokens.count() <= 7

        # choose the other model, which has no run; then back, whose curve is drawn
        page.locator("#model input").click()
        page.get_by_role("option", name="other").click()
        page.get_by_role("tab", name="Loss curve").click()
        page.get_by_text("there is no loss curve to show").wait_for()
        page.get_by_role("tab", name="Write").click()
        page.locator("#model input").click()
        page.get_by_role("option", name="run").click()
        page.get_by_role("tab", name="Loss curve").click()
        page.locator("#curve img").wait_for()
        page.get_by_role("tab", name="Write").click()

        # a mistake is answered kindly, and the page goes on
        prompt.fill("long " * 2000)
        write.click()
        alert = page.locator("#status [role=alert]")
        alert.wait_for()
        assert "shorten the prompt" in alert.inner_text()
        prompt.fill("A")
        write.click()
        done.wait_for()

        assert not failures
        strangers = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
        assert not strangers, "the page asks other hosts for something"
        browser.close()

    # no door beside the page: nothing can be uploaded, no file of this machine is served
    upload = urllib.request.Request(
        address + "gradio_api/upload",
        data=b'--b\r\nContent-Disposition: form-data; name="files"; filename="x.txt"\r\n\r\nhello\r\n--b--\r\n',
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    for request in (upload, address + "gradio_api/file=" + __file__):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            urllib.request.urlopen(request, timeout=10)
        assert 400 <= refusal.value.code < 500
