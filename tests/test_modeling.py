"""The Hub pair against transformers' own GPT-2, and as other people's programs will use it."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from configuration_gpt2repro import GPT2ReproConfig
from modeling_gpt2repro import GPT2ReproForCausalLM, GPT2ReproModel, PaddedHead

SIZES = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
ENDS = {"bos_token_id": 96, "eos_token_id": 96}


@pytest.fixture
def reference() -> GPT2LMHeadModel:
    """transformers' GPT-2 with random weights, biases and layer norms included."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES, **NO_DROPOUT, **ENDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def twin(reference: GPT2LMHeadModel, **options) -> GPT2ReproForCausalLM:
    """Ours with the reference's weights and dtype."""
    model = GPT2ReproForCausalLM(GPT2ReproConfig(**SIZES, **ENDS, **options))
    model.load_state_dict(reference.state_dict())
    return model.to(reference.dtype)


def token_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, SIZES["vocab_size"], (batch, length), generator=torch.Generator().manual_seed(seed))


def test_compiled_training_leaves_the_causal_mask_to_sdpa(reference):
    """A mask that is written out keeps SDPA from its flash kernels; transformers writes one under torch.compile."""
    calls = []

    def look(graph, inputs):
        calls.extend(node.kwargs for node in graph.graph.nodes if node.target is F.scaled_dot_product_attention)
        return graph.forward

    ids = token_ids(2, 16)
    step = torch.compile(twin(reference), fullgraph=True, dynamic=False, backend=look)
    step(ids, shift_labels=ids, use_cache=False, output_logits=False).loss.backward()
    assert len(calls) == SIZES["n_layer"]
    assert all(call["attn_mask"] is None and call["is_causal"] for call in calls)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{"use_cache": False}, {}], ids=str)  # the default makes a cache
def test_documents_whose_positions_start_again_do_not_see_each_other(reference, attention, options):
    """Also in a row that is longer than n_positions."""
    model = twin(reference).double().eval()
    model.set_attn_implementation(attention)
    documents = [token_ids(1, length, seed=length) for length in (7, 50, 1, 60)]
    packed, targets = torch.cat(documents, dim=1), torch.cat([document.roll(-1) for document in documents], dim=1)
    positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]
    together = model(packed, position_ids=positions, shift_labels=targets, **options)
    alone = torch.cat([model(ids).logits for ids in documents], dim=1)
    assert (together.logits - alone).abs().max() < 1e-12
    assert abs(together.loss - F.cross_entropy(alone[0], targets[0])) < 1e-12


def test_given_positions_are_not_read_in_a_graph(reference):
    """Reading them would break it, and on a GPU wait for it at every token."""
    model = twin(reference).double()
    packed, positions = token_ids(1, 80), (torch.arange(80) % 40)[None]
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    compiled = step(packed, position_ids=positions, use_cache=False).logits
    assert (compiled - model(packed, position_ids=positions).logits).abs().max() < 1e-12


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_logits_loss_and_gradients_equal_transformers(reference, attention, dtype, tolerance):
    reference = reference.to(dtype)
    model = twin(reference)
    model.set_attn_implementation(attention)
    reference.set_attn_implementation(attention)
    ids = token_ids(3, 40)
    ours, theirs = model(ids, labels=ids), reference(ids, labels=ids)
    # transformers rounds logits to fp32 before its loss; in fp64 the loss of its logits is compared instead
    exact = F.cross_entropy(theirs.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert (ours.logits - theirs.logits).abs().max() <= tolerance
    assert abs(ours.loss.item() - exact.item()) <= tolerance
    assert abs(ours.loss.item() - theirs.loss.item()) <= 1e-5
    ours.loss.backward()
    exact.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - gradients[name].grad).abs().max() <= tolerance, name


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_generation_equals_transformers_token_by_token(reference, options, padded):
    model, reference = twin(reference).eval(), reference.eval()
    ids = token_ids(2, 9)
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0
    common = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False, "pad_token_id": 96}
    expected = reference.generate(ids, **common, **{k: v for k, v in options.items() if k == "num_beams"})
    assert torch.equal(model.generate(ids, **common, **options), expected)


def test_left_padding_changes_nothing_for_the_tokens_behind_it(reference):
    model = twin(reference.double())
    ids = token_ids(1, 10)
    padded = torch.cat([torch.full((1, 6), 96), ids], dim=1)
    mask = (torch.arange(16) >= 6).long()[None]
    difference = model(padded, attention_mask=mask).logits[:, 6:] - model(ids).logits
    assert difference.abs().max() < 1e-12


def test_cached_steps_equal_one_pass(reference):
    model = twin(reference.double()).eval()
    ids = token_ids(2, 12)
    cache, pieces = None, []
    for piece in ids.split([5, 1, 1, 5], dim=1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    assert (torch.cat(pieces, dim=1) - model(ids).logits).abs().max() < 1e-12


def test_gradient_checkpointing_and_chunked_loss_change_no_gradient(reference):
    ids, targets = token_ids(2, 20), token_ids(2, 20, seed=2)
    expected = twin(reference.double()).train()
    expected(ids, shift_labels=targets).loss.backward()
    model = twin(reference.double()).train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()  # renamed in 5.23
    loss = model(ids, shift_labels=targets, output_logits=False, loss_chunk_tokens=7, use_cache=False).loss
    loss.backward()
    for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-9, name  # chunks round their fp32 losses in another order


def test_shift_labels_are_not_shifted_again_and_ignored_ones_do_not_count(reference):
    model = twin(reference)
    ids = token_ids(2, 20)
    shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert torch.equal(model(ids, shift_labels=shifted).loss, model(ids, labels=ids).loss)
    logits = model(ids).logits[:, :-1].reshape(-1, 97)
    assert torch.allclose(model(ids, labels=ids).loss, F.cross_entropy(logits, ids[:, 1:].reshape(-1)))


def test_shift_labels_win_over_labels(reference):
    """Sequence parallelism passes both: the labels, and their share of them shifted across the borders of the ranks."""
    model, ids, targets = twin(reference), token_ids(2, 20), token_ids(2, 20, seed=2)
    both = model(ids, labels=ids, shift_labels=targets).loss
    assert torch.equal(both, model(ids, shift_labels=targets).loss)
    assert not torch.equal(both, model(ids, labels=ids).loss)


def with_padded_head(model: GPT2ReproForCausalLM) -> GPT2ReproForCausalLM:
    """What training on a GPU makes of the model."""
    model.pad_head()
    assert type(model.lm_head) is PaddedHead
    return model


@pytest.mark.parametrize("loss_chunk_tokens", [None, 7])
def test_padded_head_changes_neither_loss_nor_gradients(reference, loss_chunk_tokens):
    plain, padded = twin(reference.double()), with_padded_head(twin(reference.double()))
    ids, targets = token_ids(2, 20), token_ids(2, 20, seed=2)
    targets[0, :3] = -100
    options = {"output_logits": False, "use_cache": False, "loss_chunk_tokens": loss_chunk_tokens}
    losses = [model(ids, shift_labels=targets, **options).loss for model in (plain, padded)]
    assert abs(losses[0] - losses[1]) < 1e-12
    for loss in losses:
        loss.backward()
    for (name, ours), theirs in zip(padded.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 1e-12, name


def test_only_the_loss_sees_padded_columns(reference):
    model, ids = with_padded_head(twin(reference)), token_ids(2, 8)
    hidden_states = model.transformer(ids).last_hidden_state
    assert model.lm_head(hidden_states, padded=True).shape == (2, 8, 128)
    assert model.lm_head(hidden_states).shape == model(ids).logits.shape == (2, 8, 97)
    seen = []
    model.cross_entropy = lambda logits, *rest: seen.append(logits.shape) or type(model).cross_entropy(logits, *rest)
    model(ids, labels=ids, output_logits=False)
    model(ids, labels=ids)  # these logits are the caller's
    assert seen == [(16, 128), (16, 97)]


def test_padded_head_stays_tied_and_is_stored_as_any_other(reference, tmp_path):
    model, ids = with_padded_head(twin(reference)), token_ids(1, 4)
    assert model.lm_head.weight is model.transformer.wte.weight
    model.resize_token_embeddings(101)
    assert model.lm_head.weight is model.transformer.wte.weight and model(ids).logits.shape == (1, 4, 101)
    model.save_pretrained(tmp_path)
    again = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert type(again.lm_head) is torch.nn.Linear
    assert torch.allclose(again(ids, labels=ids).loss, model(ids, labels=ids, output_logits=False).loss)
    assert type(copy.deepcopy(model).lm_head) is type(model.lm_head)


def test_whole_graph_takes_a_padded_head(reference):
    model = with_padded_head(twin(reference).double())
    ids, options = token_ids(2, 16), {"use_cache": False, "output_logits": False}
    step = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
    assert torch.equal(step(ids, shift_labels=ids, **options).loss, model(ids, shift_labels=ids, **options).loss)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantisation_finds_the_head_and_the_loss_calls_what_it_put_there(reference):
    model, ids = twin(reference).eval(), token_ids(2, 16)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)
    quantised.pad_head()  # not a head of ours any more: left alone
    assert type(quantised.lm_head) is torch.ao.nn.quantized.dynamic.Linear
    exact = model(ids, labels=ids, output_logits=False).loss
    assert 0 < abs(quantised(ids, labels=ids, output_logits=False).loss - exact) < 0.05


def test_micro_batches_with_num_items_in_batch_add_up_to_the_mean_of_the_whole_batch(reference):
    model = twin(reference.double())
    ids, targets = token_ids(4, 16), token_ids(4, 16, seed=2)
    targets[1, 3:] = -100  # unequal micro-batches: averaging averages would be wrong
    count = (targets != -100).sum()
    parts = [model(ids[i : i + 2], shift_labels=targets[i : i + 2], num_items_in_batch=count).loss for i in (0, 2)]
    assert torch.allclose(sum(parts), model(ids, shift_labels=targets).loss)


def test_no_logits_leave_the_graph_when_only_the_loss_is_wanted(reference):
    ids = token_ids(2, 8)
    output = twin(reference)(ids, shift_labels=ids, output_logits=False)
    assert output.logits is None
    with pytest.raises(ValueError, match="nothing to return"):
        twin(reference)(ids, output_logits=False)


def test_bf16_residual_stays_close_and_is_off_by_default(reference):
    model, ids = twin(reference), token_ids(2, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = {
            name: model.transformer(ids, output_hidden_states=True, **options).hidden_states[1]
            for name, options in {"default": {}, "bf16": {"residual_dtype": torch.bfloat16}}.items()
        }
    assert hidden["default"].dtype == torch.float32
    assert hidden["bf16"].dtype == torch.bfloat16
    assert (hidden["default"] - hidden["bf16"]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("124M", 124_439_808), ("350M", 354_823_168), ("774M", 774_030_080), ("1558M", 1_557_611_200)],
)
def test_presets_have_the_published_number_of_parameters(preset, parameters):
    import yaml

    path = Path(__file__).parent.parent / "gpt2repro" / "presets" / f"{preset}.yaml"
    sizes = {k: v for k, v in yaml.safe_load(path.read_text()).items() if k in ("n_layer", "n_head", "n_embd")}
    with torch.device("meta"):
        model = GPT2ReproForCausalLM(GPT2ReproConfig(**sizes))
    assert sum(p.numel() for p in model.parameters()) == parameters  # the tied head counts once


def test_initial_weights_follow_the_paper():
    torch.manual_seed(0)
    model = GPT2ReproForCausalLM(GPT2ReproConfig(vocab_size=512, n_positions=256, n_embd=128, n_layer=8, n_head=4))
    state = model.state_dict()
    for name, tensor in state.items():
        if name.endswith("bias"):
            assert tensor.count_nonzero() == 0, name
        elif "ln_" in name:
            assert torch.all(tensor == 1), name
        else:
            expected = 0.02 / math.sqrt(2 * 8) if name.endswith("c_proj.weight") else 0.02
            assert abs(tensor.std().item() / expected - 1) < 0.05, name
    assert state["lm_head.weight"].data_ptr() == state["transformer.wte.weight"].data_ptr()


def test_resized_vocabulary_keeps_the_head_tied_and_survives_a_reload(reference, tmp_path):
    model = twin(reference)
    model.resize_token_embeddings(101)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model(token_ids(1, 4)).logits.shape == (1, 4, 101)
    model.save_pretrained(tmp_path)
    again = GPT2ReproForCausalLM.from_pretrained(tmp_path)
    assert again.config.vocab_size == 101
    assert torch.equal(again(token_ids(1, 4)).logits, model(token_ids(1, 4)).logits)


def openai_directory(reference: GPT2LMHeadModel, directory: Path) -> Path:
    """A checkpoint in the layout of openai-community/gpt2: no prefix, causal masks as buffers, no head, old config."""
    tensors = {
        k.removeprefix("transformer."): v for k, v in reference.state_dict().items() if not k.startswith("lm_head")
    }
    for layer in range(SIZES["n_layer"]):
        tensors[f"h.{layer}.attn.bias"] = torch.tril(torch.ones(1, 1, 64, 64))
    directory.mkdir()
    save_file(
        {k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors", metadata={"format": "pt"}
    )
    config = {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 96,
        "embd_pdrop": 0.1, "eos_token_id": 96, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2", "n_ctx": 64, "resid_pdrop": 0.1, "summary_activation": None,
        "summary_first_dropout": 0.1, "summary_proj_to_labels": True, "summary_type": "cls_index",
        "summary_use_proj": True, "task_specific_params": {"text-generation": {"do_sample": True}}, **SIZES,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_openai_layout_loads_straight_into_the_class(reference, tmp_path):
    model, report = GPT2ReproForCausalLM.from_pretrained(
        openai_directory(reference, tmp_path / "gpt2"), output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = token_ids(2, 12)
    assert torch.allclose(model.eval()(ids).logits, reference.eval()(ids).logits, atol=1e-6)
    assert model.config.model_type == "gpt2repro" and model.config.resid_pdrop == 0.1
    model.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert saved["model_type"] == "gpt2repro" and not any(name.startswith("summary") for name in saved)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("add_cross_attention", True),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("activation_function", "relu"),
        ("n_head", 5),
        ("n_layer", 0),
        ("resid_pdrop", 1.5),
    ],
)
def test_configurations_of_other_architectures_are_refused_by_name(option, value):
    with pytest.raises(ValueError, match=option):
        GPT2ReproConfig(**{**SIZES, option: value})


def test_too_many_tokens_are_refused_with_both_numbers(reference):
    model = twin(reference)
    with pytest.raises(ValueError, match=r"65 tokens.*n_positions=64"):
        model(token_ids(1, 65))
    cache = model(token_ids(1, 60), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"65 tokens.*n_positions=64"):
        model(token_ids(1, 5), past_key_values=cache)
    with pytest.raises(ValueError, match=r"position 64.*n_positions=64"):
        model(token_ids(1, 3), position_ids=torch.tensor([[62, 63, 64]]))


WAYS_OF_DECODING = [{}, {"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}]


@pytest.mark.parametrize("options", WAYS_OF_DECODING, ids=str)
def test_decoding_past_the_last_position_ends_with_a_sentence(reference, options):
    model, ids = twin(reference).eval(), token_ids(2, 9)
    common = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 96, "eos_token_id": None}
    assert model.generate(ids, max_length=64, **common, **options).shape == (2, 64)
    with pytest.raises(ValueError, match=r"position 64.*n_positions=64.*generate fewer tokens"):
        model.generate(ids, max_length=70, **common, **options)


def test_left_padding_does_not_use_up_positions(reference):
    model = twin(reference).eval()
    ids = torch.cat([torch.full((1, 30), 96), token_ids(1, 10)], dim=1)
    mask = (torch.arange(40) >= 30).long()[None]
    options = {"max_length": 80, "do_sample": False, "pad_token_id": 96, "eos_token_id": None}
    padded = model.generate(ids, attention_mask=mask, **options)  # 80 tokens, of which 50 have positions
    assert torch.equal(padded[:, 30:], model.generate(ids[:, 30:], **{**options, "max_length": 50}))


@pytest.mark.parametrize("helper", ["prompt lookup", "assistant"])
def test_assisted_decoding_writes_what_greedy_decoding_writes(reference, helper):
    model, ids = twin(reference.double()).eval(), token_ids(1, 9)
    options = {"max_length": 40, "do_sample": False, "pad_token_id": 96}
    options["attention_mask"] = torch.ones_like(ids)
    torch.manual_seed(3)
    assistant = GPT2ReproForCausalLM(GPT2ReproConfig(**{**SIZES, "n_layer": 1}, **ENDS)).double().eval()
    help_with = {"prompt_lookup_num_tokens": 3} if helper == "prompt lookup" else {"assistant_model": assistant}
    assert torch.equal(model.generate(ids, **options, **help_with), model.generate(ids, **options))


def test_default_length_of_a_short_model_fits_its_context(reference):
    assert twin(reference).generation_config.max_length == 64
    with torch.device("meta"):
        assert GPT2ReproForCausalLM(GPT2ReproConfig(n_layer=1)).generation_config.max_length is None  # as in GPT-2's


def test_attention_implementation_can_be_changed_and_eager_shows_its_weights(reference):
    model, ids = twin(reference), token_ids(1, 6)
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == 3 and attentions[0].shape == (1, 4, 6, 6)
    assert torch.allclose(attentions[0].sum(-1), torch.ones(1, 4, 6))
    assert attentions[0].triu(1).count_nonzero() == 0


IN_A_CLEAN_PROCESS = """
import sys, torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
directory, again = sys.argv[1:]
ids = torch.arange(10)[None] % 97
for _ in range(2):  # save -> load -> save -> load
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)
    base = AutoModel.from_pretrained(directory, trust_remote_code=True)
    print(config.model_type, type(model).__name__, type(base).__name__, model(ids).logits.double().sum().item())
    model.save_pretrained(again)
    tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)  # it needs none
    tokenizer.save_pretrained(again)
    directory, again = again, again + "2"
write = pipeline("text-generation", model=directory, tokenizer=directory, trust_remote_code=True)
print(repr(write("ab", max_new_tokens=5, do_sample=False)[0]["generated_text"][:2]))
"""


def test_hub_copy_loads_from_an_empty_directory(reference, tmp_path):
    from gpt2repro.data.tokenization import bpe_tokenizer

    model = twin(reference)
    model.resize_token_embeddings(300)
    saved, empty = tmp_path / "saved", tmp_path / "empty"
    empty.mkdir()
    model.save_pretrained(saved)
    bpe_tokenizer(["ab abc abcd" * 20], 300).save_pretrained(saved)
    assert {"configuration_gpt2repro.py", "modeling_gpt2repro.py"} <= {path.name for path in saved.iterdir()}
    assert "lm_head.weight" not in load_file(saved / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CLEAN_PROCESS, str(saved), str(tmp_path / "again")],
        cwd=empty, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) == 3, done.stdout
    first, second, text = done.stdout.strip().splitlines()
    assert first == second  # nothing is lost on the second round
    kind, lm, base, logit_sum = first.split()
    assert (kind, lm, base) == ("gpt2repro", "GPT2ReproForCausalLM", "GPT2ReproModel")
    ids = torch.arange(10)[None] % 97
    assert math.isclose(float(logit_sum), model.eval()(ids).logits.double().sum().item(), rel_tol=1e-5)
    assert text == "'ab'"


def test_base_model_alone_gives_hidden_states(reference):
    model = twin(reference)
    base = GPT2ReproModel(model.config)
    base.load_state_dict(model.transformer.state_dict())
    ids = token_ids(1, 5)
    assert torch.equal(base(ids).last_hidden_state, model(ids, output_hidden_states=True).hidden_states[-1])
