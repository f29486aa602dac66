"""The decode engine against transformers' `generate` and warpers, streaming text, and `gpt2repro generate`."""

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch.nn.utils import prune
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MambaConfig,
)
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt2repro import models
from gpt2repro.commands import generate
from gpt2repro.commands.bench import generate as bench
from gpt2repro.commands.bench.harness import NotEqual
from gpt2repro.data.tokenization import bpe_tokenizer, char_tokenizer
from gpt2repro.generation.decoder import Decoder, GPT2Decoder, complete, decoder_for
from gpt2repro.generation.prompts import TextStream, encode_prompt, room_for
from gpt2repro.generation.sampling import Sampling, choose, pick, probabilities, uniforms
from gpt2repro.options import InputError
from modeling_gpt2repro import GPT2ReproConfig, GPT2ReproForCausalLM

PROMPTS = [[5, 6, 7], [9], [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
GREEDY = Sampling(temperature=0)
TEXT = "To be, or not to be: that is the question. Ob's edler im Gemüt — 是的, 生存还是毁灭 🙂🙃.\n" * 20


@torch.no_grad()
def roughen(model) -> None:
    """Large random matrices and positions, and no zero biases: every weight has its say in the greedy text."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.4 if parameter.dim() > 1 else 0.1))


@pytest.fixture(scope="module")
def reference() -> GPT2LMHeadModel:
    """transformers' GPT-2 with weights large enough that greedy text is neither constant nor a matter of rounding."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    roughen(model)
    return model


@pytest.fixture(scope="module")
def ours(reference) -> GPT2ReproForCausalLM:
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=97, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    model.load_state_dict(reference.state_dict())
    return model


def padded(prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def generated_by_transformers(model, prompts: list[list[int]], max_new_tokens: int, **options) -> torch.Tensor:
    ids, mask = padded(prompts)
    options = {"do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options)[:, ids.size(1) :]


def decoded(
    decoder: Decoder, prompts: list[list[int]], max_new_tokens: int, sampling=GREEDY, **options
) -> torch.Tensor:
    options = {"end_token": None, **options}
    steps = decoder.tokens(prompts, max_new_tokens=max_new_tokens, sampling=sampling, **options)
    return torch.stack([step.tokens for step in steps], dim=1).cpu()


def test_greedy_decoding_of_left_padded_prompts_equals_transformers_generate(reference, ours):
    expected = generated_by_transformers(reference, PROMPTS, 50)
    assert len(expected.unique()) > 20
    for model in (reference, ours):
        decoder = decoder_for(model, batch_size=3, length=61)
        assert isinstance(decoder, GPT2Decoder)
        assert torch.equal(decoded(decoder, PROMPTS, 50), expected)
        assert torch.equal(decoded(decoder, PROMPTS, 50), expected), "a decoder that was used before"


def test_decoding_one_unpadded_prompt_equals_transformers_generate(reference):
    decoder = decoder_for(reference, batch_size=1, length=43)
    assert torch.equal(decoded(decoder, PROMPTS[:1], 40), generated_by_transformers(reference, PROMPTS[:1], 40))


def test_step_of_fixed_shapes_as_a_gpu_captures_it_equals_the_step_that_grows(reference):
    decoder = GPT2Decoder(reference, batch_size=3, length=64)
    decoder.fixed_shapes = True
    assert torch.equal(decoded(decoder, PROMPTS, 50), generated_by_transformers(reference, PROMPTS, 50))


@pytest.mark.slow
def test_compiled_step_equals_transformers_generate(reference):
    decoder = GPT2Decoder(reference, batch_size=3, length=64, compiled=True)
    assert torch.equal(decoded(decoder, PROMPTS, 50), generated_by_transformers(reference, PROMPTS, 50))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_step_on_a_gpu_equals_transformers_generate(reference, compiled):
    expected = generated_by_transformers(reference, PROMPTS, 50)
    model = GPT2LMHeadModel(reference.config).eval()
    model.load_state_dict(reference.state_dict())
    decoder = GPT2Decoder(model.cuda(), batch_size=3, length=64, compiled=compiled)
    assert torch.equal(decoded(decoder, PROMPTS, 50), expected)


def test_another_architecture_is_decoded_by_its_own_forward():
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    roughen(model)
    decoder = decoder_for(model, batch_size=3, length=41)
    assert type(decoder) is Decoder
    assert torch.equal(decoded(decoder, PROMPTS, 30), generated_by_transformers(model, PROMPTS, 30))


class Rotated(GPT2ReproForCausalLM):
    """A GPT-2 whose positions are not what the embeddings say: in place of RoPE, they count backwards."""

    def forward(self, input_ids=None, position_ids=None, **kwargs):
        return super().forward(input_ids, position_ids=63 - position_ids, **kwargs)


def double_the_output(module, args, output):
    return output * 2


class LoRA(torch.nn.Module):
    """A linear layer and a change of rank 2, as adapters put it in the layer's place."""

    def __init__(self, linear):
        super().__init__()
        self.base = linear
        self.a, self.b = (torch.nn.Parameter(torch.randn(shape)) for shape in ((linear.nx, 2), (2, linear.nf)))

    def forward(self, x):
        return self.base(x) + x @ self.a @ self.b


def with_a_quantised_head(model):
    model.lm_head = torch.nn.Linear(32, 97, bias=False)
    model.lm_head.weight = model.transformer.wte.weight
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)


def with_a_head_of_its_own_class(model):
    class Louder(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x).sin()

    model.lm_head.__class__ = Louder
    return model


class Half(torch.nn.Module):
    def forward(self, weight):
        return weight * 0.5


def edited(attribute: str, value):
    def edit(model):
        owner, _, name = attribute.rpartition(".")
        setattr(model.get_submodule(owner), name, value)
        return model

    return edit


def mended(edit):
    """An edit that returns what it made of the model's insides, as one that returns the model."""

    def apply(model):
        edit(model)
        return model

    return apply


EDITS = {
    "LoRA": mended(
        lambda model: setattr(model.transformer.h[0].attn, "c_attn", LoRA(model.transformer.h[0].attn.c_attn))
    ),
    "int8": with_a_quantised_head,
    "a layer of another class": with_a_head_of_its_own_class,
    "a patched forward": mended(lambda model: setattr(model.transformer.h[0].mlp, "forward", torch.sin)),
    "a hook": mended(lambda model: model.transformer.h[0].mlp.register_forward_hook(double_the_output)),
    "a hook before": mended(
        lambda model: model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].sin(),))
    ),
    "a hook of the model itself": mended(
        lambda model: model.register_forward_hook(
            lambda module, args, output: (setattr(output, "logits", output.logits.sin()), output)[1]
        )
    ),
    "a parametrisation": mended(
        lambda model: torch.nn.utils.parametrize.register_parametrization(
            model.transformer.h[1].mlp.c_fc, "weight", Half()
        )
    ),
    "pruning": mended(lambda model: prune.l1_unstructured(model.transformer.h[0].mlp.c_fc, "weight", 0.5)),
    "another epsilon": edited("transformer.h.0.ln_1.eps", 10.0),
    "another GELU": mended(
        lambda model: [setattr(block.mlp, "gelu_approximation", "none") for block in model.transformer.h]
    ),
    "another scale of attention": edited("transformer.h.0.attn.scaling", 1.0),
    "one block less": mended(lambda model: model.transformer.h.pop(1)),
    "training mode with dropout 0": mended(lambda model: model.train()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("theirs", [False, True], ids=["ours", "transformers"])
def test_an_edited_model_writes_what_it_writes_by_itself_not_what_the_unedited_one_wrote(edit, theirs, reference, ours):
    if theirs and edit in ("another GELU", "training mode with dropout 0"):
        pytest.skip("named or set otherwise there")
    original = reference if theirs else ours
    model = EDITS[edit](copy.deepcopy(original))
    decoder = decoder_for(model, batch_size=3, length=61)
    assert type(decoder) is Decoder
    expected = generated_by_transformers(model, PROMPTS, 50)
    assert torch.equal(decoded(decoder, PROMPTS, 50), expected)
    if edit not in ("another GELU", "training mode with dropout 0"):  # too small to be seen in 50 tokens
        assert not torch.equal(expected, generated_by_transformers(original, PROMPTS, 50)), "the edit has no effect"


def test_a_subclass_and_a_remote_code_copy_are_decoded_by_their_own_forward(ours, tmp_path):
    model = Rotated(ours.config).eval()
    model.load_state_dict(ours.state_dict())
    decoder = decoder_for(model, batch_size=3, length=61)
    assert type(decoder) is Decoder
    expected = generated_by_transformers(model, PROMPTS, 50)
    assert torch.equal(decoded(decoder, PROMPTS, 50), expected)
    assert not torch.equal(expected, generated_by_transformers(ours, PROMPTS, 50))

    ours.save_pretrained(tmp_path)
    code = tmp_path / "modeling_gpt2repro.py"
    assert code.exists()
    assert "hidden_states + self.mlp(" in code.read_text()
    code.write_text(code.read_text().replace("hidden_states + self.mlp(", "hidden_states - self.mlp("))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert type(model).__name__ == "GPT2ReproForCausalLM"
    decoder = decoder_for(model, batch_size=3, length=61)
    assert type(decoder) is Decoder
    assert torch.equal(decoded(decoder, PROMPTS, 50), generated_by_transformers(model, PROMPTS, 50))


def test_hooks_of_all_modules_and_exchanged_code_of_a_class_are_seen(reference, monkeypatch):
    def writes_what_generate_writes() -> bool:
        decoder = decoder_for(reference, batch_size=3, length=61)
        assert torch.equal(decoded(decoder, PROMPTS, 50), generated_by_transformers(reference, PROMPTS, 50))
        return type(decoder) is Decoder

    assert not writes_what_generate_writes()
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: output.sin() if isinstance(module, torch.nn.Linear) else None
    ):
        assert writes_what_generate_writes()
    monkeypatch.setattr(type(reference.transformer.h[0].mlp), "forward", lambda self, x: x.sin())
    assert writes_what_generate_writes()
    monkeypatch.undo()
    assert not writes_what_generate_writes()


def test_a_head_that_its_own_model_padded_is_still_plain(ours):
    model = copy.deepcopy(ours)
    if not hasattr(model, "pad_head"):
        pytest.skip("this model pads no head")
    model.pad_head()
    decoder = decoder_for(model, batch_size=3, length=61)
    assert isinstance(decoder, GPT2Decoder)
    assert torch.equal(decoded(decoder, PROMPTS, 50), generated_by_transformers(ours, PROMPTS, 50))


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None),
        MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, bos_token_id=None, eos_token_id=None),
    ],
    ids=lambda config: config.model_type,
)
def test_models_without_positions_or_without_a_cache_of_keys_are_decoded(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    roughen(model)
    decoder = decoder_for(model, batch_size=3, length=41)
    assert torch.equal(decoded(decoder, PROMPTS, 30), generated_by_transformers(model, PROMPTS, 30))


def test_rows_end_at_the_end_token_and_decoding_stops_when_all_have_ended(reference):
    free = generated_by_transformers(reference, PROMPTS, 50)
    end = next(token for token in free[0].tolist() if all((row == token).any() for row in free))
    expected = generated_by_transformers(reference, PROMPTS, 50, eos_token_id=end, pad_token_id=end)
    found = decoded(decoder_for(reference, batch_size=3, length=64), PROMPTS, 50, end_token=end)
    assert torch.equal(found, expected)
    assert found.size(1) < 50

    texts = dict(complete(reference, PROMPTS, max_new_tokens=50, sampling=GREEDY, end_token=end))
    assert texts == {row: tokens[: tokens.index(end)] for row, tokens in enumerate(expected.tolist())}


def test_text_may_fill_the_last_position_and_more_is_refused_with_a_sentence(reference):
    expected = generated_by_transformers(reference, PROMPTS, 53)  # 11 + 53 = 64 = n_positions
    assert torch.equal(decoded(decoder_for(reference, batch_size=3, length=64), PROMPTS, 53), expected)
    with pytest.raises(InputError, match="65 tokens, the model sees 64"):
        decoder_for(reference, batch_size=3, length=65)
    assert room_for(reference, 60) == 4
    with pytest.raises(InputError, match="the prompt has 64 tokens, the model sees 64"):
        room_for(reference, 64)


def test_seed_and_row_decide_the_text_whatever_the_batch(reference):
    options = {"max_new_tokens": 30, "sampling": Sampling(0.9, top_k=40), "end_token": None}
    prompts = PROMPTS + PROMPTS[:1]
    together = dict(complete(reference, prompts, seed=7, **options))
    assert dict(complete(reference, prompts, seed=7, batch_size=3, **options)) == together
    assert dict(complete(reference, prompts, seed=8, **options)) != together
    assert together[0] != together[3], "the same prompt twice is two samples"


def test_chance_of_a_row_does_not_depend_on_the_others():
    assert torch.equal(uniforms(3, [5], 10)[:, 0], uniforms(3, [4, 5], 20)[:10, 1])
    numbers = uniforms(0, range(100), 1000)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.double().mean() - 0.5) < 0.005  # 5 standard errors are 0.0046


@pytest.mark.parametrize(
    "sampling", [Sampling(0.7), Sampling(1.0, top_k=5), Sampling(1.3, top_p=0.8), Sampling(0.9, top_k=20, top_p=0.6)]
)
def test_probabilities_equal_those_of_transformers_warpers(sampling):
    logits = torch.randn(16, 97, generator=torch.Generator().manual_seed(0)) * 3
    warped = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k is not None:
        warped = TopKLogitsWarper(sampling.top_k)(None, warped)
    if sampling.top_p is not None:
        warped = TopPLogitsWarper(sampling.top_p)(None, warped)
    probs, ids = probabilities(logits, sampling)
    found = probs if ids is None else torch.zeros_like(logits).scatter(1, ids, probs)
    torch.testing.assert_close(found / found.sum(-1, keepdim=True), warped.softmax(-1))


def test_picks_follow_the_distribution_and_never_the_impossible():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3, 0.0])
    evenly = (torch.arange(10_000) + 0.5) / 10_000
    shares = torch.bincount(pick(probs.expand(10_000, -1), evenly), minlength=6) / 10_000
    torch.testing.assert_close(shares, probs, atol=2e-4, rtol=0)
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert pick(probs.expand(2, -1), edges).tolist() == [1, 4]


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_streamed_text_never_shows_half_a_character_and_adds_up_to_the_whole(kind):
    tokenizer = bpe_tokenizer(["plain ascii only "] * 5, 260) if kind == "bpe" else char_tokenizer([TEXT])
    text = " naïve 中文 🙂👩‍🚀 end"
    text = text if kind == "bpe" else TEXT[:120]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + stream.flush() == text


def test_streamed_text_shows_invalid_bytes_in_the_end_and_drops_special_tokens():
    tokenizer = bpe_tokenizer(["plain ascii only "] * 5, 260)
    half = tokenizer("中", add_special_tokens=False)["input_ids"][:2]
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    for ids in (half, half + letters, letters + half + half + letters, [tokenizer.eos_token_id, *letters]):
        stream = TextStream(tokenizer)
        shown = "".join(stream.push(token) for token in ids) + stream.flush()
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """A checkpoint directory of ours whose copied model code must never run: it raises."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = bpe_tokenizer([TEXT], 300)
    torch.manual_seed(0)
    config = GPT2ReproConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2ReproForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "modeling_gpt2repro.py").write_text("raise RuntimeError('remote code ran')\n")
    return str(path)


def test_generate_prints_the_prompt_and_what_follows_and_the_seed_decides(checkpoint, capsys):
    arguments = ["--model", checkpoint, "--prompt", "To be", "--max_new_tokens", "20", "--device", "cpu"]
    assert generate.main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("To be") and len(first) > 10
    assert generate.main(arguments) == 0
    assert capsys.readouterr().out == first
    assert generate.main([*arguments, "--seed", "5"]) == 0
    assert capsys.readouterr().out != first
    assert generate.main([*arguments, "--num_samples", "2"]) == 0
    captured = capsys.readouterr()
    assert first.strip() in captured.out and "--- sample 2 of 2" in captured.out
    assert "tokens/s" in captured.err


def test_generate_fits_the_text_into_the_model_saying_so(checkpoint, capsys):
    generate.main(["--model", checkpoint, "--prompt", "To be", "--max_new_tokens", "1000", "--device", "cpu"])
    assert "room for" in capsys.readouterr().err
    with pytest.raises(InputError, match="shorten the prompt"):
        generate.main(["--model", checkpoint, "--prompt", "to be or " * 50, "--device", "cpu"])


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_prompts_file_becomes_samples_in_its_own_order(checkpoint, tmp_path, suffix):
    prompts = ["A much longer question that is", "To", "or not"]
    lines = prompts if suffix == ".txt" else [json.dumps({"prompt": prompt}) for prompt in prompts]
    file, out = tmp_path / f"prompts{suffix}", tmp_path / "deep" / "samples.jsonl"
    file.write_text("\n\n".join(lines), encoding="utf-8")
    arguments = ["--model", checkpoint, "--prompts_file", str(file), "--out", str(out), "--max_new_tokens", "8"]
    assert generate.main([*arguments, "--num_samples", "2", "--batch_size", "4", "--device", "cpu"]) == 0
    records = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [record["prompt"] for record in records] == [prompt for prompt in prompts for _ in range(2)]
    assert [record["sample"] for record in records] == [0, 1] * 3
    assert records[0]["text"] != records[1]["text"]
    assert all(0 < record["tokens"] <= 8 for record in records)


def test_interactive_answers_every_line_and_survives_a_prompt_that_is_too_long(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("To be\n" + "to be or " * 50 + "\nThat is\n\nnever read\n"))
    assert generate.main(["--model", checkpoint, "--interactive", "--max_new_tokens", "5", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("To be") and "That is" in captured.out and "never" not in captured.out
    assert "shorten the prompt" in captured.err


def test_generate_reports_all_bad_options_at_once_before_loading_anything():
    with pytest.raises(InputError) as error:
        generate.main(
            ["--model", "none", "--prompt", "x", "--interactive", "--out", "o", "--temperature", "-1", "--top_p", "2",
             "--num_samples", "3", "--top_k", "0"]
        )  # fmt: skip
    message = str(error.value)
    for part in ("exactly one of", "--out belongs to", "--temperature: ", "--top_p: ", "--top_k: ", "num_samples=3"):
        assert part in message


@pytest.mark.parametrize("option", ["num_samples", "max_new_tokens", "batch_size"])
def test_absurd_numbers_are_refused_by_the_options(option):
    with pytest.raises(InputError, match=f"--{option}: should be less than or equal to"):
        generate.main(["--model", "none", "--prompt", "x", f"--{option}", str(10**10)])


def test_out_is_checked_before_a_model_is_loaded(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n")
    before = sorted(tmp_path.iterdir())
    for out, said in (
        (tmp_path, "no file"),
        ("/dev/null", "no file"),
        ("/dev/null/x", "cannot write /dev/null/x"),
        (prompts, "is --prompts_file"),
    ):
        with pytest.raises(InputError, match=said):
            generate.main(["--model", "no/such/model", "--prompts_file", str(prompts), "--out", str(out)])
    with pytest.raises(InputError, match="there is no model"):
        generate.main(["--model", "no/such/model", "--prompts_file", str(prompts), "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match="more than 1,000,000 samples"):
        generate.main(["--model", "none", "--prompts_file", str(prompts), "--out", "o", "--num_samples", "600000"])
    assert sorted(tmp_path.iterdir()) == before, "nothing is left behind"


def test_half_a_character_in_a_prompt_is_refused_whatever_door_it_comes_through(
    checkpoint, tmp_path, monkeypatch, capsys
):
    model = ["--model", checkpoint, "--device", "cpu", "--max_new_tokens", "4"]
    with pytest.raises(InputError, match="character 3 is half of one"):
        generate.main([*model, "--prompt", "To\udcff"])
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "fine"}\n{"prompt": "To\\ud800"}\n')
    with pytest.raises(InputError, match=r"prompt 2 of .*prompts.jsonl: .*character 3 is half of one"):
        generate.main([*model, "--prompts_file", str(prompts), "--out", str(tmp_path / "out.jsonl")])
    assert not (tmp_path / "out.jsonl").exists()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"To\xff\nTo be\n"), encoding="utf-8"))
    assert generate.main([*model, "--interactive"]) == 0
    captured = capsys.readouterr()
    assert "character 3 is half of one" in captured.err and captured.out.startswith("To be")


def test_a_prompt_in_a_file_may_hold_the_line_separators_of_unicode(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert generate.read_prompts(file) == ["a\u2028b\u0085c"]
    file.with_suffix(".txt").write_text("a\u2028b\n\nc\n", encoding="utf-8")
    assert generate.read_prompts(file.with_suffix(".txt")) == ["a\u2028b", "c"]


@pytest.mark.parametrize("temperature", [1e-45, 1e-300])
def test_a_temperature_that_no_logit_can_be_divided_by_is_greedy(temperature):
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert choose(logits, Sampling(temperature), torch.tensor([0.5])).tolist() == [1]


def test_wrong_line_of_a_prompts_file_is_named(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"prompts.jsonl line 2: expected \{\"prompt\": \"text\"\}"):
        generate.read_prompts(file)
    with pytest.raises(InputError, match="cannot read prompts"):
        generate.read_prompts(tmp_path / "absent.txt")


def test_code_of_another_architecture_runs_only_if_the_user_says_so(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}})
    )
    (tmp_path / "strange.py").write_text("raise RuntimeError('remote code ran')\n")
    monkeypatch.setattr(
        "gpt2repro.checkpoint.reader.resolve_model", lambda name, **options: str(tmp_path)
    )  # as if it came from the Hub
    with pytest.raises(InputError, match="--trust_remote_code"):
        models.load_model("user/strange", device=torch.device("cpu"), dtype=None)


def test_damaged_or_unreachable_models_are_named_in_a_sentence(checkpoint, tmp_path):
    cpu = torch.device("cpu")
    incomplete = Path(shutil.copytree(checkpoint, tmp_path / "incomplete"))
    tensors = safetensors.torch.load_file(incomplete / "model.safetensors")
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    safetensors.torch.save_file(tensors, incomplete / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors are missing, such as transformer\.h\.1\.mlp\.c_fc\.bias"):
        models.load_model(str(incomplete), device=cpu, dtype=None)
    stranger = shutil.copytree(checkpoint, tmp_path / "stranger")
    bpe_tokenizer([TEXT], 320).save_pretrained(stranger)
    with pytest.raises(InputError, match="they do not belong together"):
        models.load_model(str(stranger), device=cpu, dtype=None)
    with pytest.raises(InputError, match="there is no model"):
        models.load_model(str(tmp_path / "absent"), device=cpu, dtype=None)
    with pytest.raises(InputError, match="cannot load a causal language model from user/absent"):
        models.load_model("user/absent", device=cpu, dtype=None)  # the tests are offline
    with pytest.raises(InputError, match="device 'nonsense' is not usable"):
        models.pick_device("nonsense")


def test_benchmark_refuses_a_model_that_writes_something_else_and_records_the_speed_of_one_that_does_not(
    tmp_path, monkeypatch
):
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "vocab_size": 97}
    monkeypatch.setitem(bench.SIZES, "small", shape)
    reference, ours = (build(shape).eval() for build in (bench.baselines.transformers_gpt2, bench.baselines.our_gpt2))
    bench.check_greedy(reference, ours)
    with torch.no_grad():
        ours.transformer.ln_f.bias.add_(1)
    with pytest.raises(NotEqual, match="greedy text differs"):
        bench.check_greedy(reference, ours)
    few = ["--size", "small", "--batch", "2", "--prompt_tokens", "3", "--new_tokens", "4", "--rounds", "1"]
    assert bench.main([*few, "--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.glob("generate-*.json")).read_text())
    assert record["results"]["measured"][0]["times"][bench.OURS]["per_second"] > 0
    with pytest.raises(InputError, match="exceed 1024 positions"):
        bench.main(["--new_tokens", "1000"])


def test_empty_prompt_starts_a_new_document():
    tokenizer = char_tokenizer([TEXT])
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
