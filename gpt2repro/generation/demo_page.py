"""The page of `gpt2repro demo`: it streams the text behind a prompt, each token coloured by its probability.

Knows Gradio and the decode engine; the caller chooses the models at start-up. A visitor sends text and numbers only;
the server checks all of them and answers a wrong one in a sentence. The page loads nothing from another host, so it
works offline.
"""

import base64
import html
import math
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr
from pydantic import BaseModel, Field, ValidationError

from gpt2repro.generation.decoder import Step, decoder_for
from gpt2repro.generation.prompts import TextStream, encode_prompt, room_for
from gpt2repro.generation.sampling import Sampling
from gpt2repro.options import InputError
from gpt2repro.training.plotting import draw_runs

MOST_PROMPT_CHARACTERS = 20_000  # a longer prompt is refused before it is tokenised
MOST_BODY_BYTES = 1 << 18  # of a request: the longest prompt with every character escaped, and the settings
SECONDS_BETWEEN_UPDATES = 0.04  # faster than the eye follows, slow enough for a thin connection
SECONDS_UNHEARD = 3  # the text ends when its visitor has been gone for so long
ALTERNATIVES = 5  # how many of the likeliest tokens a tooltip shows
# (lowest probability, CSS class, label): an expected token stays plain, a surprising one is coloured.
LIKELIHOODS = ((0.5, "p1", "≥ 50 %"), (0.2, "p2", "20–50 %"), (0.05, "p3", "5–20 %"), (0.01, "p4", "1–5 %"))
LIKELIHOODS += ((0.0, "p5", "< 1 %"),)
HINT = (
    '<span class="hint">The text appears here. Point at a word, tap it, or walk with Tab and the arrow keys, '
    "to see what else the model had in mind.</span>"
)
MOTTO = "A GPT-2 at work: each word and how sure it was."
PLACEHOLDER = "How does the text begin? Leave it empty and the model begins by itself."
EXAMPLES = ("The import statement", "Once upon a time", "In this section we")


@dataclass(frozen=True)
class Served:
    """A model that the page offers. `run` is the run's directory, whose curve the page draws; None: no curve."""

    model: object
    tokenizer: object
    run: Path | None = None


class Wishes(BaseModel, allow_inf_nan=False):
    """A visitor's input, within its limits."""

    prompt: str = Field(max_length=MOST_PROMPT_CHARACTERS)
    temperature: float = Field(ge=0, le=100)
    top_k: int = Field(ge=0, lt=2**31)  # 0: no limit
    top_p: float = Field(gt=0, le=1)
    new_tokens: int = Field(ge=1, lt=2**31)
    seed: int = Field(ge=0, lt=2**63)  # 0: another one every time


class Door:
    """ASGI middleware: limits the body of every request, and counts the open streams of each session."""

    def __init__(self, app, listeners: Counter):
        self.app, self.listeners = app, listeners

    async def __call__(self, scope, receive, send) -> None:
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or int(length) > MOST_BODY_BYTES:  # the server has checked that it is digits
            await send({"type": "http.response.start", "status": 413})
            await send({"type": "http.response.body", "body": b"this request is too large"})
            return
        session = None
        if scope.get("path", "").endswith("/queue/data"):  # the stream of an answer
            session = scope["query_string"].decode("latin-1").partition("session_hash=")[2].partition("&")[0]
        self.listeners[session] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.listeners[session] -= 1
            self.listeners += Counter()  # drops those that are gone


def build(models: dict[str, Served], *, most_new_tokens: int, concurrency: int, queue: int) -> tuple[gr.Blocks, dict]:
    """The page for the named models, and the arguments of its `launch`."""
    names = list(models)
    listeners: Counter = Counter()  # session -> its open streams

    def write(request: gr.Request, name, *wishes):
        if name not in models:
            yield page(HINT), below(f"There is no model {name!r} here; choose one of the list.")
            return
        heard = time.monotonic()
        named = dict(zip(Wishes.model_fields, wishes, strict=True))
        for shown in answer(models[name], named, most_new_tokens=most_new_tokens):
            if listeners[request.session_hash]:
                heard = time.monotonic()
            elif time.monotonic() - heard > SECONDS_UNHEARD:
                return
            yield shown

    def length_of(name: str) -> dict:
        """The length slider's range for a model."""
        sees = getattr(models[name].model.config, "max_position_embeddings", None)
        most = min(most_new_tokens, sees - 1) if sees else most_new_tokens
        info = f"in tokens; room for {sees:,}, beginning included" if sees else "in tokens"
        return {"maximum": most, "value": min(120, most), "info": info}

    def show_model(name):
        return (describe(name, models[name]), gr.Slider(**length_of(name))) if name in models else ("", gr.skip())

    def show_curve(name):
        return loss_curve(models[name].run) if name in models else ""

    def slider(label: str, **range_and_info) -> gr.Slider:
        return gr.Slider(label=label, elem_id=label.lower(), **range_and_info)

    with gr.Blocks(title="gpt2repro", analytics_enabled=False) as blocks:
        gr.HTML(f'<header class="masthead"><h1>gpt2repro</h1><p>{MOTTO}</p></header>')
        with gr.Tab("Write"), gr.Row():
            with gr.Column(scale=5, min_width=300):
                # One line, since with more Gradio lets Enter break the line; the style sheet makes it higher.
                words = {"info": "Enter writes, Shift+Enter breaks the line", "placeholder": PLACEHOLDER}
                prompt = gr.Textbox(label="Beginning", max_lines=8, autofocus=True, elem_id="prompt", **words)
                with gr.Row(elem_id="buttons"):
                    go = gr.Button("Write", variant="primary", elem_id="write", min_width=100)
                    stop = gr.Button("Stop", variant="stop", elem_id="stop", min_width=100)
                    clear = gr.Button("Clear", elem_id="clear", min_width=80)
                examples = gr.Examples([[example] for example in EXAMPLES], prompt, label="Try")
                text = gr.HTML(page(HINT), elem_id="text")
                status = gr.HTML(below(), elem_id="status")
            with gr.Column(scale=2, min_width=260, elem_id="settings"):
                picker = gr.Dropdown(names, value=names[0], label="Model", elem_id="model", visible=len(names) > 1)
                facts = gr.HTML(describe(names[0], models[names[0]]), elem_id="facts")
                heat = slider("Temperature", maximum=2, value=0.8, step=0.05, info="0: always the likeliest word")
                top_k = slider("Top-k", maximum=200, value=50, step=1, info="0: no limit")
                top_p = slider("Top-p", minimum=0.05, maximum=1, value=1, step=0.05, info="1: no limit")
                new_tokens = slider("Length", minimum=1, step=1, **length_of(names[0]))
                seed = gr.Number(0, label="Seed", info="0: another text every time", precision=0, elem_id="seed")
        with gr.Tab("Loss curve", visible=any(served.run for served in models.values())) as curve_tab:
            curve = gr.HTML('<div class="curve"></div>', elem_id="curve")

        inputs = [picker, prompt, heat, top_k, top_p, new_tokens, seed]
        job = {"concurrency_limit": concurrency, "concurrency_id": "decode", "show_progress": "hidden"}
        small = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        running = [
            event(write, inputs, [text, status], api_visibility="private", **job)
            for event in (go.click, prompt.submit, examples.load_input_event.then)
        ]
        # Only after the cancellation, or a last piece of the text would follow it.
        stop.click(None, cancels=running).then(lambda: below(note="stopped"), None, status, **small)
        clear.click(lambda: ("", page(HINT), below()), None, [prompt, text, status], **small)
        picker.change(show_model, picker, [facts, new_tokens], **small)
        gr.on([curve_tab.select, picker.change], show_curve, picker, curve, **{**small, "queue": True})
    blocks.queue(max_size=queue, api_open=False)
    return blocks, launch_options(listeners)


def launch_options(listeners: Counter) -> dict[str, object]:
    """The arguments of `launch`: the page's style, and no feature that a visitor does not need."""
    files, colours = Path(__file__), gr.themes.colors
    fonts = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Base(primary_hue=colours.teal, neutral_hue=colours.stone, **fonts)
    return {
        "theme": theme,
        "css": files.with_suffix(".css").read_text(encoding="utf-8"),
        "head": f"<script>{files.with_suffix('.js').read_text(encoding='utf-8')}</script>",
        "footer_links": [],
        "app_kwargs": {"middleware": [(Door, (), {"listeners": listeners})]},
        "max_file_size": 1,  # bytes: nobody has anything to upload here
        "enable_monitoring": False,
        "ssr_mode": False,
        "show_error": False,
        "quiet": True,
    }


def answer(served: Served, wishes: dict, *, most_new_tokens: int) -> Iterator[tuple[str, str]]:
    """Yield the page's text and the line below it while the text grows; a mistake ends it with a sentence."""
    written = HINT
    try:
        sampling, ids, limit, seed = checked(served, wishes, most_new_tokens)
        written = f'<span class="given">{html.escape(wishes["prompt"])}</span>' if wishes["prompt"] else ""
        yield page(written), below(note="reading the beginning …", writing=True)
        stream, spans = TextStream(served.tokenizer), Spans(served.tokenizer)
        count, nats, start = 0, 0.0, time.perf_counter()
        shown_at = start
        end_token = served.tokenizer.eos_token_id
        decoder = decoder_for(served.model, batch_size=1, length=len(ids) + limit)
        steps = decoder.tokens([ids], max_new_tokens=limit, sampling=sampling, end_token=end_token, seed=seed)
        for step in steps:
            if step.tokens.item() == end_token:
                break
            count += 1
            span, nats_of_token = spans.add(step, stream.push(step.tokens.item()))
            written += span
            nats += nats_of_token
            if time.perf_counter() - shown_at > SECONDS_BETWEEN_UPDATES:
                shown_at = time.perf_counter()
                yield page(written), below(note=pace(count, shown_at - start), writing=True)
        written += spans.rest(stream.flush())
        note = pace(count, time.perf_counter() - start)
        note += f" · perplexity of its own words <b>{math.exp(nats / count):.1f}</b>" if count else ""
        if count < limit:
            note += " · the model ended its text here"
        elif limit < wishes["new_tokens"]:
            note += f" · cut at <b>{limit}</b>: there is no room for {wishes['new_tokens']:,.0f} behind this beginning"
        yield page(written), below(note=note)
    except InputError as error:
        yield page(written), below(str(error))
    except Exception:  # a visitor gets a sentence, the log gets everything
        traceback.print_exc(file=sys.stderr)
        yield page(written), below("Something went wrong on this side; the text so far is kept. Please try again.")


def checked(served: Served, wishes: dict, most_new_tokens: int) -> tuple[Sampling, list[int], int, int]:
    """A visitor's wishes -> (sampling, prompt's ids, number of new tokens, seed). Raises: InputError, as a sentence."""
    try:
        wish = Wishes(**wishes)
    except ValidationError as error:
        wrong = [f"{found['loc'][0]}: {found['msg'].removeprefix('Input ')}" for found in error.errors()]
        raise InputError("Please check what you chose: " + "; ".join(wrong) + ".") from None
    ids = encode_prompt(served.tokenizer, wish.prompt)
    room = room_for(served.model, len(ids))
    limit = min(wish.new_tokens, most_new_tokens, room or most_new_tokens)
    sampling = Sampling(wish.temperature, wish.top_k or None, None if wish.top_p == 1 else wish.top_p)
    return sampling, ids, limit, wish.seed or time.time_ns() % 2**32


class Spans:
    """Tokens -> spans with a colour and a tooltip; a character made of several tokens becomes one span."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.reached_by_tab = "0"  # only the first span; from there the arrow keys lead to the others
        self.tokens = 0  # tokens without a span yet
        self.probability = 1.0  # the product of their probabilities
        self.tip = ""

    def add(self, step: Step, text: str) -> tuple[str, float]:
        """The span that a token completes ("" while a character is unfinished), and its surprise in nats.

        Probabilities are the model's own, before temperature, top-k and top-p.
        """
        probs = step.logits[0].float().softmax(-1)
        chosen = step.tokens.item()
        probability = probs[chosen].item()
        best, ids = (part.tolist() for part in probs.topk(min(ALTERNATIVES, len(probs))))
        if not self.tokens:
            self.tip = "\n".join(
                f"{'▸' if token == chosen else ' '} {visible(self.tokenizer.decode([token])):13.13} "
                f"{bar(share):12} {percent(share):>6}"
                for share, token in zip(best, ids, strict=True)
            )
        self.tokens += 1
        self.probability *= probability
        return (self.rest(text) if text else ""), -math.log(max(probability, 1e-30))

    def rest(self, text: str) -> str:
        """A span for `text` and all tokens without a span; "" without text."""
        if not text:
            return ""
        colour = next((name for least, name, _ in LIKELIHOODS if self.probability >= least), "p5")
        several = f"  ({self.tokens} tokens)" if self.tokens > 1 else ""
        tip = f"{visible(text)}  {percent(self.probability)}{several}\n\n{self.tip}"
        line_break = " break" if text.strip(" ") and not text.strip() else ""
        tab, self.reached_by_tab = self.reached_by_tab, "-1"
        self.tokens, self.probability = 0, 1.0
        escaped = html.escape(tip, quote=True).replace("\n", "&#10;")
        attributes = f'class="tok {colour}{line_break}" tabindex="{tab}" data-tip="{escaped}"'
        return f"<span {attributes}>{html.escape(text)}</span>"


def visible(text: str) -> str:
    """A token's text with signs for its spaces, tabs and line ends."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def bar(share: float) -> str:
    """A share of 1 as up to twelve blocks, in eighths."""
    whole, eighths = divmod(round(96 * share), 8)
    return "█" * whole + ("", *"▏▎▍▌▋▊▉")[eighths]


def percent(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 else "<0.1 %"


def pace(tokens: int, seconds: float) -> str:
    return f"<b>{tokens}</b> tokens · <b>{tokens / max(seconds, 1e-9):,.0f}</b> tokens/s"


def page(content: str) -> str:
    """The page's text. It grows only at its end, so that Gradio sends only the new part."""
    return f'<div class="page" aria-live="off">{content}'  # browsers close the div


def below(error: str = "", *, note: str = "", writing: bool = False) -> str:
    """The line under the text: an error or the progress, and the meaning of the colours.

    The style sheet shows the Stop button while `writing` is true.
    """
    chips = "".join(f'<span class="tok {name}">{label}</span>' for _, name, label in LIKELIHOODS)
    alert = f'<div class="kind-error" role="alert">{html.escape(error)}</div>' if error else ""
    legend = f'<span class="legend">how likely: {chips}</span>'
    return f'<div class="below{" writing" * writing}">{alert}<span>{note}</span>{legend}</div>'


def describe(name: str, served: Served) -> str:
    """A model in a line: name, size, layers, context, vocabulary."""
    config = served.model.config
    parts = [f"<b>{html.escape(name)}</b>", f"<b>{served.model.num_parameters() / 1e6:,.1f}M</b> parameters"]
    if layers := getattr(config, "num_hidden_layers", None):
        parts.append(f"<b>{layers}</b> layers")
    if positions := getattr(config, "max_position_embeddings", None):
        parts.append(f"sees <b>{positions:,}</b> tokens")
    parts.append(f"vocabulary <b>{config.vocab_size:,}</b>")
    return f'<p class="facts">{" · ".join(parts)}</p>'


def loss_curve(run: Path | None) -> str:
    """The run's curve so far, as a picture inside the page: no path leaves the server."""
    shown = "<p>This model was loaded without its run, so there is no loss curve to show.</p>"
    if run is not None:
        try:
            with tempfile.TemporaryDirectory() as folder:
                picture = draw_runs([run], Path(folder) / "loss.png").read_bytes()
            data = base64.b64encode(picture).decode()
            shown = f'<img alt="loss over training steps" src="data:image/png;base64,{data}">'
        except InputError:
            shown = "<p>This run has not logged a loss yet.</p>"
    return f'<div class="curve">{shown}</div>'
