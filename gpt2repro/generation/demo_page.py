"""The page of `gpt2repro demo`: a prompt goes in, tokens stream out, coloured by how likely the model found them.

Knows Gradio and the decode engine; which models there are is decided by the caller at start-up. From a visitor it takes
text and numbers only, checks all of them again on this side, and answers what is wrong in a sentence. Nothing on the
page comes from another host, so it works offline.
"""

import base64
import html
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gradio as gr

from gpt2repro.generation.decoder import Sampling, Step, TextStream, decoder_for, encode_prompt, room_for
from gpt2repro.options import InputError
from gpt2repro.training.plotting import draw_runs

MOST_PROMPT_CHARACTERS = 20_000  # what is worth tokenising before the model's own limit is looked at
SECONDS_BETWEEN_UPDATES = 0.04  # faster than the eye follows, slow enough for a thin connection
ALTERNATIVES = 5  # how many of the likeliest tokens a tooltip shows
# Lowest probability -> class of colour: what the model expected stays plain, what surprised it glows.
LIKELIHOODS = ((0.5, "p1", "≥ 50 %"), (0.2, "p2", "20–50 %"), (0.05, "p3", "5–20 %"), (0.01, "p4", "1–5 %"))
UNLIKELY = ("p5", "< 1 %")
HINT = '<span class="hint">The text appears here. Hover over a word to see what else the model had in mind.</span>'
CURVE_MISSING = "<p>This model was loaded without its run, so there is no loss curve to show.</p>"
EXAMPLES = ("The import statement", "Once upon a time", "In this section we")

# Keeps a tooltip inside the window; everything else about it is CSS.
HEAD = """<script>
document.addEventListener("pointerover", (event) => {
  const token = event.target.closest && event.target.closest(".tok");
  if (!token) return;
  const room = document.documentElement.clientWidth - token.getBoundingClientRect().left - 330;
  token.style.setProperty("--shift", Math.min(0, room) + "px");
});
</script>"""


@dataclass(frozen=True)
class Served:
    """A model as the page offers it. `run`: the directory whose metrics.jsonl is drawn, if there is one."""

    model: object
    tokenizer: object
    run: Path | None = None


def build(models: dict[str, Served], *, most_new_tokens: int, concurrency: int, queue: int) -> gr.Blocks:
    """The page for the named models; `launch_options` holds what it needs to be launched with."""
    names = list(models)

    def write(name, prompt, temperature, top_k, top_p, new_tokens, seed) -> Iterator[tuple[str, str]]:
        if name not in models:
            yield page(HINT), below(f"There is no model {name!r} here; choose one of the list.")
            return
        yield from answer(
            models[name],
            prompt,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            new_tokens=new_tokens,
            most_new_tokens=most_new_tokens,
            seed=seed,
        )

    with gr.Blocks(title="gpt2repro", analytics_enabled=False) as blocks:
        gr.HTML(
            '<header class="masthead"><h1>gpt2repro</h1><p>A GPT-2 at work: each word and how sure it was.</p></header>'
        )
        with gr.Tab("Write"), gr.Row():
            with gr.Column(scale=5, min_width=320):
                prompt = gr.Textbox(
                    label="Beginning",
                    lines=3,
                    max_lines=8,
                    autofocus=True,
                    placeholder="How does the text begin? Leave it empty and the model begins by itself.",
                    elem_id="prompt",
                )
                with gr.Row():
                    go = gr.Button("Write", variant="primary", elem_id="write", scale=2, min_width=100)
                    stop = gr.Button("Stop", elem_id="stop", scale=1, min_width=80)
                    clear = gr.Button("Clear", elem_id="clear", scale=1, min_width=80)
                gr.Examples([[example] for example in EXAMPLES], prompt, label="Try")
                text = gr.HTML(page(HINT), elem_id="text")
                status = gr.HTML(below(), elem_id="status")
            with gr.Column(scale=2, min_width=260):
                picker = gr.Dropdown(names, value=names[0], label="Model", elem_id="model", interactive=len(names) > 1)
                facts = gr.HTML(describe(models[names[0]]), elem_id="facts")
                temperature = gr.Slider(
                    0,
                    2,
                    0.8,
                    step=0.05,
                    label="Temperature",
                    info="0: always the likeliest word",
                    elem_id="temperature",
                )
                top_k = gr.Slider(0, 200, 50, step=1, label="Top-k", info="0: no limit", elem_id="top-k")
                top_p = gr.Slider(0.05, 1, 1, step=0.05, label="Top-p", info="1: no limit", elem_id="top-p")
                new_tokens = gr.Slider(
                    1, most_new_tokens, min(120, most_new_tokens), step=1, label="Length in tokens", elem_id="length"
                )
                seed = gr.Number(0, label="Seed", info="0: another text every time", precision=0, elem_id="seed")
        with gr.Tab("Loss curve") as curve_tab:
            curve = gr.HTML('<div class="curve"></div>', elem_id="curve")

        inputs = [picker, prompt, temperature, top_k, top_p, new_tokens, seed]
        job = {"concurrency_limit": concurrency, "concurrency_id": "decode", "api_visibility": "private"}
        small = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        running = [
            event(write, inputs, [text, status], show_progress="hidden", **job) for event in (go.click, prompt.submit)
        ]
        stop.click(None, cancels=running, **small)
        clear.click(lambda: ("", page(HINT), below()), None, [prompt, text, status], cancels=running, **small)
        picker.change(lambda name: describe(models[name]) if name in models else "", picker, facts, **small)
        gr.on(
            [curve_tab.select, picker.change],
            lambda name: loss_curve(models[name].run) if name in models else "",
            picker,
            curve,
            show_progress="hidden",
            api_visibility="private",
        )
    blocks.queue(max_size=queue, api_open=False)
    return blocks


def launch_options() -> dict:
    """How the page is launched: its looks, and no door that a visitor does not need."""
    stone = gr.themes.colors.stone
    theme = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=stone,
        radius_size=gr.themes.sizes.radius_lg,
        font=["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "DejaVu Sans", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "DejaVu Sans Mono", "monospace"],
    ).set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#131211",
        block_background_fill_dark="#1c1b1a",
        input_background_fill_dark="#131211",
        block_label_text_weight="600",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0f766e",
        button_primary_background_fill_hover_dark="#0d9488",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
    )
    return {
        "theme": theme,
        "css": Path(__file__).with_suffix(".css").read_text(encoding="utf-8"),
        "head": HEAD,
        "footer_links": [],
        "max_file_size": 1,  # bytes: nobody has anything to upload here
        "ssr_mode": False,
        "show_error": False,
        "quiet": True,
    }


def answer(
    served: Served,
    prompt: str,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    new_tokens: int,
    most_new_tokens: int,
    seed: int,
) -> Iterator[tuple[str, str]]:
    """The page's text and the line below it, again and again while the text grows; mistakes end in a kind sentence."""
    written = HINT
    try:
        sampling, ids, limit, seed = checked(
            served, prompt, temperature, top_k, top_p, new_tokens, most_new_tokens, seed
        )
        written = f'<span class="given">{html.escape(prompt)}</span>' if prompt else ""
        yield page(written), below("", note="reading the beginning …")
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
                yield page(written), below("", note=pace(count, shown_at - start))
        written += spans.rest(stream.flush())
        ended = " · the model ended its text here" if count < limit else ""
        perplexity = f" · perplexity of its own words <b>{math.exp(nats / count):.1f}</b>" if count else ""
        yield page(written), below("", note=pace(count, time.perf_counter() - start) + perplexity + ended)
    except InputError as error:
        yield page(written), below(str(error))
    except Exception:  # a visitor gets a sentence, the log gets everything
        traceback.print_exc(file=sys.stderr)
        yield page(written), below("Something went wrong on this side; the text so far is kept. Please try again.")


def checked(served, prompt, temperature, top_k, top_p, new_tokens, most_new_tokens, seed):
    """A visitor's wishes -> (sampling, prompt's ids, number of new tokens, seed). Raises: InputError, as a sentence."""
    if not isinstance(prompt, str) or len(prompt) > MOST_PROMPT_CHARACTERS:
        raise InputError(
            f"That beginning is too long for this page; please keep it under {MOST_PROMPT_CHARACTERS:,} characters."
        )
    numbers = (temperature, top_k, top_p, new_tokens, seed)
    if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
        raise InputError("One of the settings is not a number; please choose it again.")
    sampling = Sampling(float(temperature), int(top_k) or None, None if top_p == 1 else float(top_p))
    problems = sampling.problems()
    if not 1 <= new_tokens <= most_new_tokens:
        problems.append(f"the length must lie between 1 and {most_new_tokens} tokens")
    if not 0 <= seed < 2**63:
        problems.append("the seed must be 0 or a positive whole number")
    if problems:
        raise InputError("Please check the settings: " + "; ".join(problems) + ".")
    ids = encode_prompt(served.tokenizer, prompt)
    try:
        room = room_for(served.model, len(ids))
    except InputError:
        limit = served.model.config.max_position_embeddings
        raise InputError(
            f"That beginning is too long for this model: it is {len(ids):,} tokens, and the model sees {limit:,}. "
            "Please shorten it."
        ) from None
    limit = int(new_tokens) if room is None else min(int(new_tokens), room)
    return sampling, ids, limit, int(seed) or time.time_ns() % 2**32


class Spans:
    """Tokens -> spans with a colour and a tooltip; a character made of several tokens becomes one span."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokens = 0  # whose text is not shown yet
        self.probability = 1.0  # theirs together
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
        """A span for `text` with everything that is pending; "" without text."""
        if not text:
            return ""
        colour = next((name for least, name, _ in LIKELIHOODS if self.probability >= least), UNLIKELY[0])
        several = f"  ({self.tokens} tokens)" if self.tokens > 1 else ""
        tip = f"{visible(text)}  {percent(self.probability)}{several}\n\n{self.tip}"
        line_break = " break" if text.strip(" ") and not text.strip() else ""
        self.tokens, self.probability = 0, 1.0
        escaped = html.escape(tip, quote=True).replace("\n", "&#10;")
        return f'<span class="tok {colour}{line_break}" tabindex="-1" data-tip="{escaped}">{html.escape(text)}</span>'


def visible(text: str) -> str:
    """A token's text with its spaces and line ends to be seen."""
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
    """The sheet with its text. Only ever growing at its end, so that Gradio sends what is new and no more."""
    return f'<div class="page" aria-live="off">{content}'  # browsers close the div


def below(error: str = "", *, note: str = "") -> str:
    """The line under the sheet: what went wrong or how it goes, and what the colours mean."""
    colours = [(name, label) for _, name, label in LIKELIHOODS] + [UNLIKELY]
    chips = "".join(f'<span class="tok {name}">{label}</span>' for name, label in colours)
    alert = f'<div class="kind-error" role="alert">{html.escape(error)}</div>' if error else ""
    return f'<div class="below">{alert}<span>{note}</span><span class="legend">how likely: {chips}</span></div>'


def describe(served: Served) -> str:
    """A model in a line: size, depth, context."""
    config = served.model.config
    parts = [f"<b>{served.model.num_parameters() / 1e6:,.1f}M</b> parameters"]
    if layers := getattr(config, "num_hidden_layers", None):
        parts.append(f"<b>{layers}</b> layers")
    if positions := getattr(config, "max_position_embeddings", None):
        parts.append(f"sees <b>{positions:,}</b> tokens")
    parts.append(f"vocabulary <b>{config.vocab_size:,}</b>")
    return f'<p class="facts">{" · ".join(parts)}</p>'


def loss_curve(run: Path | None) -> str:
    """The run's curve as it stands now, as a picture inside the page: no path leaves the server."""
    if run is None:
        return f'<div class="curve">{CURVE_MISSING}</div>'
    try:
        with tempfile.TemporaryDirectory() as folder:
            picture = draw_runs([run], Path(folder) / "loss.png").read_bytes()
    except InputError:
        return '<div class="curve"><p>This run has not logged a loss yet.</p></div>'
    data = base64.b64encode(picture).decode()
    return f'<div class="curve"><img alt="loss over training steps" src="data:image/png;base64,{data}"></div>'
