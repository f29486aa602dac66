"""Foreign checkpoints, written here in their own formats, compute what their own (out, in) matrices say they should."""

import pickle
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from gpt2repro.commands import import_checkpoint
from gpt2repro.options import InputError, run_main
from gpt2repro.publishing.importers import read_checkpoint

T, L, H, C = 32, 2, 4, 32


def linear_state(vocab_size: int, *, bias: bool = True, seed: int = 0) -> dict[str, torch.Tensor]:
    """A random state dict in nanoGPT's names and (out, in) layout; every number differs from its neighbours."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def add(name, *shape, around=0.0):
        state[name] = around + 0.2 * torch.randn(shape, generator=generator)

    def norm(name):
        add(f"{name}.weight", C, around=1.0)
        if bias:
            add(f"{name}.bias", C)

    def linear(name, outs, ins):
        add(f"{name}.weight", outs, ins)
        if bias:
            add(f"{name}.bias", outs)

    add("transformer.wte.weight", vocab_size, C)
    add("transformer.wpe.weight", T, C)
    for layer in range(L):
        block = f"transformer.h.{layer}"
        norm(f"{block}.ln_1")
        linear(f"{block}.attn.c_attn", 3 * C, C)
        linear(f"{block}.attn.c_proj", C, C)
        norm(f"{block}.ln_2")
        linear(f"{block}.mlp.c_fc", 4 * C, C)
        linear(f"{block}.mlp.c_proj", C, 4 * C)
    norm("transformer.ln_f")
    state["lm_head.weight"] = state["transformer.wte.weight"]
    return state


def reference_logits(state: dict, ids: torch.Tensor, gelu: str) -> torch.Tensor:
    """The forward pass of nanoGPT's family in float64, straight from the foreign tensors. (B, T) -> (B, T, V)"""
    state = {name: tensor.double() for name, tensor in state.items()}

    def norm(x, name):
        return F.layer_norm(x, (C,), state[f"{name}.weight"], state.get(f"{name}.bias"), 1e-5)

    def linear(x, name):
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    batch, time = ids.shape
    x = state["transformer.wte.weight"][ids] + state["transformer.wpe.weight"][:time]
    for layer in range(L):
        block = f"transformer.h.{layer}"
        qkv = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn").view(batch, time, 3, H, C // H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, T, 3, H, D) -> 3 x (B, H, T, D)
        scores = (q @ k.transpose(-1, -2)) / (C // H) ** 0.5
        scores = scores.masked_fill(torch.ones(time, time).triu(1).bool(), -torch.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, time, C), f"{block}.attn.c_proj")
        hidden = F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"), approximate=gelu)
        x = x + linear(hidden, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ state["transformer.wte.weight"].T


def sizes(vocab_size: int) -> dict:
    return {"block_size": T, "vocab_size": vocab_size, "n_layer": L, "n_head": H, "n_embd": C}


def write_nanogpt(path, state, vocab_size, bias=True, prefix=""):
    model_args = {**sizes(vocab_size), "bias": bias, "dropout": 0.1}
    model = {prefix + name: tensor for name, tensor in state.items()}
    model[f"{prefix}transformer.h.0.attn.bias"] = torch.ones(1, 1, T, T).tril()  # the mask of its slow attention
    optimizer = {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 6e-4}]}
    checkpoint = {"model": model, "optimizer": optimizer, "model_args": model_args, "iter_num": 7}
    torch.save({**checkpoint, "best_val_loss": torch.tensor(3.1), "config": {"dataset": "x"}}, path)


def write_build_nanogpt(path, state, vocab_size, monkeypatch, prefix="_orig_mod.", module="__main__"):
    @dataclass
    class GPTConfig:
        block_size: int = T
        vocab_size: int = 50257
        n_layer: int = L
        n_head: int = H
        n_embd: int = C

    GPTConfig.__module__, GPTConfig.__qualname__ = module, "GPTConfig"
    monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    sys.modules[module].GPTConfig = GPTConfig  # where pickle looks while writing, as in the script that trained
    model = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({"model": model, "config": GPTConfig(vocab_size=vocab_size), "step": 19072, "val_loss": 3.0585}, path)
    monkeypatch.undo()  # whoever reads the file has no such class


def write_llmc(path, state, vocab_size, *, version=3, padded=None):
    padded = padded or -(-vocab_size // 128) * 128
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, version, T, vocab_size, L, H, C, padded
    order = ["ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight"]
    order += ["attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias"]
    order += ["mlp.c_proj.weight", "mlp.c_proj.bias"]
    names = ["wte.weight", "wpe.weight", *(f"h.{i}.{name}" for name in order for i in range(L))]
    with path.open("wb") as file:
        file.write(header.tobytes())
        for name in [*names, "ln_f.weight", "ln_f.bias"]:
            tensor = state[f"transformer.{name}"]
            if name == "wte.weight":
                tensor = F.pad(tensor, (0, 0, 0, padded - vocab_size))
            bits = tensor.float() if version == 3 else tensor.bfloat16().view(torch.int16)
            file.write(bits.numpy().tobytes())


def imported_logits(directory_or_imported, ids):
    model = import_checkpoint.build_model(directory_or_imported).double()
    with torch.inference_mode():
        return model(ids).logits


def ids_below(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (2, 20), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
def test_nanogpt_logits_are_those_of_its_own_forward_pass(tmp_path, bias):
    state = linear_state(97, bias=bias)
    write_nanogpt(tmp_path / "ckpt.pt", state, 97, bias=bias, prefix="_orig_mod.")
    imported = read_checkpoint("nanogpt", tmp_path / "ckpt.pt")
    torch.testing.assert_close(imported_logits(imported, ids_below(97)), reference_logits(state, ids_below(97), "none"))
    assert (imported.config["activation_function"], imported.config["resid_pdrop"]) == ("gelu", 0.1)
    assert any("biases are absent" in note for note in imported.notes) == (not bias)


@pytest.mark.parametrize(("prefix", "module"), [("_orig_mod.", "__main__"), ("module._orig_mod.", "train_gpt2_8A100")])
def test_build_nanogpt_and_shallowu_logits_are_those_of_their_own_forward_pass(tmp_path, monkeypatch, prefix, module):
    state = linear_state(50304)
    write_build_nanogpt(tmp_path / "model_19072.pt", state, 50304, monkeypatch, prefix, module)
    imported = read_checkpoint("build-nanogpt", tmp_path / "model_19072.pt")
    expected = reference_logits(state, ids_below(50257), "tanh")[..., :50257]
    torch.testing.assert_close(imported_logits(imported, ids_below(50257)), expected)
    assert imported.notes == [
        "47 padding rows of the vocabulary were dropped: 50304 -> 50257",
        "the file says: step 19072, val_loss 3.0585",
    ]


@pytest.mark.parametrize("version", [3, 5])
def test_llmc_logits_are_those_of_its_own_matrices(tmp_path, version):
    state = linear_state(97)
    if version == 5:
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    write_llmc(tmp_path / "model.bin", state, 97, version=version)
    imported = read_checkpoint("llm.c", tmp_path / "model.bin")
    assert imported.tensors["transformer.wte.weight"].dtype == (torch.float32 if version == 3 else torch.bfloat16)
    torch.testing.assert_close(imported_logits(imported, ids_below(97)), reference_logits(state, ids_below(97), "tanh"))


def test_the_command_writes_a_directory_that_transformers_loads(tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    state = linear_state(97)
    write_llmc(tmp_path / "model.bin", state, 97)
    out = tmp_path / "imported"
    arguments = ["--format", "llm.c", "--input", str(tmp_path / "model.bin"), "--out", str(out)]
    assert run_main(import_checkpoint.main, arguments) == 0
    said = capsys.readouterr().out
    assert "31 padding rows" in said and "forward pass:" in said and "no tokenizer" in said
    model = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True).double()
    with torch.inference_mode():
        logits = model(ids_below(97)).logits
    torch.testing.assert_close(logits, reference_logits(state, ids_below(97), "tanh"))
    assert run_main(import_checkpoint.main, arguments) == 2  # the directory is not overwritten
    assert "not an empty directory" in capsys.readouterr().err


def test_nanogpt_characters_come_with_their_tokenizer(tmp_path, capsys):
    from transformers import AutoTokenizer

    characters = sorted(set("\n !abcdefghijklmnopqrstuvwxyz"))
    with (tmp_path / "meta.pkl").open("wb") as file:
        itos = dict(enumerate(characters))
        stoi = {character: id for id, character in itos.items()}
        pickle.dump({"vocab_size": len(itos), "itos": itos, "stoi": stoi}, file)
    write_nanogpt(tmp_path / "ckpt.pt", linear_state(len(characters)), len(characters))
    arguments = ["--format", "nanogpt", "--input", tmp_path / "ckpt.pt", "--meta", tmp_path / "meta.pkl"]
    assert run_main(import_checkpoint.main, [*map(str, arguments), "--out", str(tmp_path / "out")]) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("to be\n").input_ids == [stoi[character] for character in "to be\n"]
    assert tokenizer("tØ").input_ids == [stoi["t"], stoi[" "]]
    assert tokenizer.decode(tokenizer("to be\nor not").input_ids) == "to be\nor not"
    assert "worse than chance" in capsys.readouterr().out  # random weights: said, not hidden


def test_gpt2s_own_vocabulary_comes_with_gpt2s_tokenizer(tmp_path, monkeypatch, shared_data, capsys):
    from transformers import AutoTokenizer

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    write_nanogpt(tmp_path / "ckpt.pt", linear_state(50304), 50304)
    arguments = ["--format", "nanogpt", "--input", str(tmp_path / "ckpt.pt"), "--out", str(tmp_path / "out")]
    assert run_main(import_checkpoint.main, arguments) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("Hello world").input_ids == [15496, 995]


class Malicious:
    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", ["nanogpt", "build-nanogpt"])
def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path, kind, zipped):
    victim = tmp_path / "executed"
    bad = {"model": linear_state(97), "model_args": sizes(97), "config": Malicious(victim)}
    torch.save(bad, tmp_path / "bad.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match="open"):
        read_checkpoint(kind, tmp_path / "bad.pt")
    assert not victim.exists()


def test_a_malicious_meta_is_refused_and_not_executed(tmp_path, capsys):
    victim = tmp_path / "executed"
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": Malicious(victim)}))
    write_nanogpt(tmp_path / "ckpt.pt", linear_state(97), 97)
    arguments = ["--format", "nanogpt", "--input", tmp_path / "ckpt.pt", "--meta", tmp_path / "meta.pkl"]
    assert run_main(import_checkpoint.main, [*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
    assert "only plain data is read" in capsys.readouterr().err
    assert not victim.exists() and not (tmp_path / "out").exists()


def test_damaged_and_foreign_files_are_refused_in_a_sentence(tmp_path):
    path = tmp_path / "file"

    def refused(kind, pattern):
        with pytest.raises(InputError, match=pattern) as caught:
            read_checkpoint(kind, path)
        assert "\n" not in str(caught.value)

    refused("nanogpt", "no such file")
    path.write_bytes(b"GIF89a" + bytes(2000))
    refused("nanogpt", "not a readable PyTorch checkpoint")
    refused("llm.c", "begins with .*not llm.c's")
    path.write_bytes(b"short")
    refused("llm.c", "less than llm.c's header")
    torch.save({"state_dict": {}}, path)
    refused("nanogpt", "has 'model' and 'model_args', found a dict with \\['state_dict'\\]")
    torch.save({"model": linear_state(97), "model_args": {**sizes(97), "n_layer": "2"}}, path)
    refused("nanogpt", "lack a positive n_layer")
    torch.save({"model": linear_state(97), "model_args": {**sizes(97), "n_layer": 10**9}}, path)
    refused("nanogpt", "too few for its n_layer")
    state = linear_state(97)
    torch.save({"model": {**state, "lm_head.weight": state["lm_head.weight"] + 1}, "model_args": sizes(97)}, path)
    refused("nanogpt", "GPT-2 ties them")
    torch.save({"model": {k: v for k, v in state.items() if "1.mlp.c_fc.w" not in k}, "model_args": sizes(97)}, path)
    refused("nanogpt", "lacks transformer.h.1.mlp.c_fc.weight")
    torch.save({"model": {**state, "transformer.rope": torch.ones(2)}, "model_args": sizes(97)}, path)
    refused("nanogpt", "has transformer.rope, which a GPT-2")
    torch.save({"model": state, "model_args": {**sizes(97), "n_embd": 64}}, path)
    refused("nanogpt", "wte.weight has shape")
    write_llmc(path, state, 97, version=2)
    refused("llm.c", "version 2; 3 .fp32. and 5 .bf16. can be read")
    write_llmc(path, state, 97)
    path.write_bytes(path.read_bytes()[:-4])
    refused("llm.c", "its header promises")
    np.array([20240520, 1] + [0] * 254, dtype="<i4").tofile(path)
    refused("llm.c", "training tokens")


@pytest.mark.parametrize("name", ["transformer.wpe.weight", "transformer.ln_f.weight", "lm_head.weight"])
@pytest.mark.parametrize("kind", ["sparse", "csr", "fp8", "meta", "scalar", "integers", "nested", "a list"])
def test_tensors_that_are_no_dense_rows_of_numbers_are_refused_in_a_sentence(tmp_path, kind, name):
    state = linear_state(97)
    tensor = state[name]
    change = {
        "sparse": lambda: tensor.to_sparse(),
        "csr": lambda: tensor.view(-1, 8).to_sparse_csr(),
        "fp8": lambda: tensor.to(torch.float8_e4m3fn),
        "meta": lambda: tensor.to("meta"),
        "scalar": lambda: torch.tensor(1.0),
        "integers": lambda: tensor.to(torch.int8),
        "nested": lambda: torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[:2]]),
        "a list": lambda: [1.0],
    }
    state[name] = change[kind]()
    torch.save({"model": state, "model_args": sizes(97)}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=f"{name} is not a tensor of floating-point numbers") as caught:
        read_checkpoint("nanogpt", tmp_path / "odd.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"n_layer": True}, {"vocab_size": True}, {"dropout": "x"}, {"dropout": 5}])
def test_sizes_that_are_none_are_refused_in_a_sentence(tmp_path, change):
    torch.save({"model": linear_state(97), "model_args": {**sizes(97), **change}}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match="the model's"):
        read_checkpoint("nanogpt", tmp_path / "odd.pt")


@pytest.mark.parametrize("val_loss", ["y", [1], torch.zeros(3), 10**400, None])
def test_what_a_file_says_of_itself_may_be_anything(tmp_path, val_loss):
    torch.save({"model": linear_state(97), "model_args": sizes(97), "step": 5, "val_loss": val_loss}, tmp_path / "a.pt")
    assert not [note for note in read_checkpoint("nanogpt", tmp_path / "a.pt").notes if "the file says" in note]


def test_weights_that_are_not_numbers_are_refused(tmp_path, capsys):
    state = linear_state(97)
    state["transformer.ln_f.weight"][3] = torch.nan
    write_llmc(tmp_path / "model.bin", state, 97)
    arguments = ["--format", "llm.c", "--input", str(tmp_path / "model.bin"), "--out", str(tmp_path / "out")]
    assert run_main(import_checkpoint.main, arguments) == 2
    assert "NaN" in capsys.readouterr().err and not (tmp_path / "out").exists()
