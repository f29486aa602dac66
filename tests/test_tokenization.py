"""Tokenizers: the ids are those of the reference, whichever way they are made."""

import itertools
import json
import os
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest

from gpt2repro.data.tokenization import (
    EOT,
    Encoder,
    UnknownCharacter,
    bpe_tokenizer,
    char_tokenizer,
    fingerprint,
    gpt2_tokenizer,
    load_tokenizer,
    well_formed,
)
from gpt2repro.options import InputError

PROSE = [
    "The quick brown fox jumps over the lazy dog. It's the dog's day.\n\n",
    "def f(x):\n    return x  # naïve é\n",
] * 30

PATHOLOGICAL = [
    "",
    EOT,
    f"a{EOT}b{EOT}",
    "x" * 200_000,
    "ab1!" * 50_000,
    " " * 100_000,
    "\n" * 50_000 + "x",
    "\x00\x01\x7f\r\n\t\x85\u2028 \ufeff",
    "lone \ud800 surrogates \udfff, a pair \ud83d\ude42",
    "你好，世界 🙂 e\u0301 \u200d ' 's 'S ʼs",
]


def fuzz(count, seed=0):
    """Odd strings: letters, digits, spaces, apostrophes, controls and code points from all over Unicode."""
    rng = random.Random(seed)
    common = "etaoin 's'll \n\t 0123.,!?-_é你🙂\x00\u00a0" + EOT

    def character():
        if rng.random() < 0.8:
            return rng.choice(common)
        code = rng.randrange(0x110000)
        return chr(code) if not 0xD800 <= code < 0xE000 else "\ufffd"

    return ["".join(character() for _ in range(rng.randrange(40))) for _ in range(count)]


@pytest.fixture(scope="module")
def gpt2(shared_data):
    os.environ["TIKTOKEN_CACHE_DIR"] = str(shared_data / "tiktoken")
    return gpt2_tokenizer()


def test_gpt2_ids_equal_tiktoken_s_on_odd_strings(gpt2):
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    texts = fuzz(3000) + [text for text in PATHOLOGICAL if len(text) < 200]
    expected = [reference.encode_ordinary(text) for text in texts]
    encoded = Encoder(gpt2).encode_batch(texts)
    assert [ids.tolist() for ids in encoded] == expected
    assert all(ids.dtype == np.uint16 for ids in encoded)
    theirs = gpt2([well_formed(text) for text in texts], split_special_tokens=True)["input_ids"]
    assert theirs == expected
    assert [gpt2.decode(ids) for ids in expected] == [well_formed(text) for text in texts]
    assert (len(gpt2), gpt2.eos_token_id, gpt2.pad_token_id, gpt2.model_max_length) == (50257, 50256, 50256, 1024)
    assert gpt2(EOT)["input_ids"] == [50256]


def test_gpt2_pieces_are_cut_where_tiktoken_cuts_them(gpt2):
    import tiktoken

    reference, encoder = tiktoken.get_encoding("gpt2"), Encoder(gpt2)
    texts = ["".join(characters) for characters in itertools.product("as1!' \n\u3000", repeat=5)]
    for ids, expected in zip(encoder.encode_batch(texts), reference.encode_ordinary_batch(texts), strict=True):
        assert ids.tolist() == expected, reference.decode(expected)


@pytest.mark.parametrize(
    "fast", [pytest.param(False, id="tiktoken"), pytest.param(True, id="gigatoken", marks=pytest.mark.extra)]
)
def test_more_spaces_than_the_regex_engine_can_stack(gpt2, fast):
    """tiktoken itself raises on a run of a million spaces before a letter; the ids are the Hugging Face tokenizer's."""
    for text in (" " * 1_100_000 + "x", "\n\u3000 " * 400_000 + "\x1cy" + "\t" * 1_100_000):
        (ids,) = Encoder(gpt2, fast=fast).encode_batch([text])
        assert ids.tolist() == gpt2(text, split_special_tokens=True)["input_ids"]


@pytest.mark.extra
def test_pathological_documents_neither_hang_nor_crash(gpt2):
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    for fast in (False, True):
        encoded = Encoder(gpt2, fast=fast).encode_batch(PATHOLOGICAL)
        for text, ids in zip(PATHOLOGICAL, encoded, strict=True):
            assert ids.tolist() == reference.encode_ordinary(text), (fast, text[:20])


@pytest.mark.extra
def test_fast_tokenizer_gives_tiktoken_s_ids_where_unicode_versions_differ(gpt2):
    pytest.importorskip("gigatoken")
    plain, fast = Encoder(gpt2), Encoder(gpt2, fast=True)
    assert fast.uses_gigatoken and not plain.uses_gigatoken
    rng = random.Random(1)
    newer = [chr(code) for code in np.flatnonzero(fast._strange) if not 0xD800 <= code < 0xE000]
    texts = fuzz(5000, seed=2) + [f"a{c}'s {c}1{c}'ll {c}" for c in rng.sample(newer, 500)]
    copy = pickle.loads(pickle.dumps(fast))
    for a, b, c in zip(plain.encode_batch(texts), fast.encode_batch(texts), copy.encode_batch(texts), strict=True):
        assert np.array_equal(a, b) and np.array_equal(a, c)


@pytest.mark.parametrize("make", [char_tokenizer, lambda texts: bpe_tokenizer(texts, 300)], ids=["char", "bpe"])
def test_saved_tokenizer_loads_with_autotokenizer_and_gives_the_same_ids(tmp_path, make):
    tokenizer = make(PROSE)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer) and Encoder(loaded).kind == Encoder(tokenizer).kind
    assert len(loaded) == len(tokenizer) == loaded.eos_token_id + 1
    assert loaded.eos_token == loaded.bos_token == loaded.pad_token == loaded.unk_token == EOT
    assert loaded.model_max_length == 1024
    ids = Encoder(loaded).encode_batch(PROSE)
    assert [i.tolist() for i in ids] == tokenizer(PROSE)["input_ids"]
    assert [loaded.decode(i) for i in ids] == PROSE


def test_characters_are_numbered_as_in_nanogpt():
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n"
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
    encoder = Encoder(char_tokenizer([text]))
    assert encoder.encode_batch([text])[0].tolist() == [stoi[c] for c in text]
    assert (encoder.vocab_size, encoder.eot_id) == (len(stoi) + 1, len(stoi))


def test_unseen_characters_are_refused_or_counted():
    encoder = Encoder(char_tokenizer(["abc"]), count_unknown=True)
    assert encoder.encode_batch(["aéb🙂\ud800cé"])[0].tolist() == [0, 3, 1, 3, 3, 2, 3]
    assert encoder.unknown == {"é": 2, "🙂": 1, "\ufffd": 1}
    with pytest.raises(UnknownCharacter, match=r"the character 'é' \(U\+00E9\) behind 'cab' is not in the tokenizer's"):
        Encoder(char_tokenizer(["abc"])).encode_joined(["abc", "cabé"], [True, True])


def test_the_ids_decide_about_the_fingerprint_and_not_the_files(gpt2, shared_data, tmp_path):
    """OpenAI's own vocabulary and merges, as tiktoken caches them, are those of our rebuilt tokenizer."""
    from transformers import GPT2TokenizerFast

    by_size = sorted((shared_data / "tiktoken").iterdir(), key=lambda path: path.stat().st_size)
    merges, vocab = (path for path in by_size if path.stat().st_size > 400_000)
    pairs = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()[1:]]
    theirs = GPT2TokenizerFast(vocab=json.loads(vocab.read_text(encoding="utf-8")), merges=pairs)
    assert fingerprint(theirs) == fingerprint(gpt2)
    content = json.loads(gpt2.backend_tokenizer.to_str())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    gpt2.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert fingerprint(load_tokenizer(tmp_path)) != fingerprint(gpt2)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    tokenizer = char_tokenizer(["abc"])
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-text token is None, outside its vocabulary of 4"):
        Encoder(tokenizer)


def test_trained_bpe_encodes_every_text_and_nothing_in_it_is_special():
    tokenizer = bpe_tokenizer(PROSE, 300)
    encoder = Encoder(tokenizer)
    texts = fuzz(300) + PATHOLOGICAL
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert encoder.eot_id not in ids
        assert tokenizer.decode(ids) == well_formed(text)


def test_bpe_training_is_deterministic():
    script = f"from gpt2repro.data.tokenization import *; print(fingerprint(bpe_tokenizer({PROSE!r}, 320)))"
    run = [sys.executable, "-c", script]
    threads = [subprocess.run(run, env={**os.environ, "RAYON_NUM_THREADS": n}, capture_output=True) for n in "14"]
    assert threads[0].stdout == threads[1].stdout != b""
    assert threads[0].stdout.decode().strip() == fingerprint(bpe_tokenizer(PROSE, 320))


def test_joined_ids_are_the_batch_with_end_of_text_where_documents_end():
    encoder = Encoder(bpe_tokenizer(PROSE, 300))
    a, b = encoder.encode_batch(["one", "two"])
    joined, text_bytes = encoder.encode_joined(["one", "two", ""], [False, True, True])
    assert text_bytes == 6 and encoder.encode_joined(["é🙂\ud800"], [False])[1] == 2 + 4 + 3
    assert joined.tolist() == [*a, *b, encoder.eot_id, encoder.eot_id] and joined.dtype == encoder.dtype


def test_an_encoder_survives_the_trip_to_a_worker():
    for tokenizer in (char_tokenizer(PROSE), bpe_tokenizer(PROSE, 300)):
        encoder = Encoder(tokenizer)
        copy = pickle.loads(pickle.dumps(encoder))
        assert [i.tolist() for i in copy.encode_batch(PROSE)] == [i.tolist() for i in encoder.encode_batch(PROSE)]


def test_unreachable_vocabulary_says_what_to_do(tmp_path):
    script = "from gpt2repro.data.tokenization import gpt2_tokenizer; gpt2_tokenizer()"
    closed = "http://127.0.0.1:9"  # nothing listens on the discard port
    env = {**os.environ, "TIKTOKEN_CACHE_DIR": str(tmp_path), "HTTPS_PROXY": closed, "https_proxy": closed}
    result = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=60)
    last = result.stderr.strip().splitlines()[-1]
    assert "InputError" in last and "TIKTOKEN_CACHE_DIR" in last and "--tokenizer bpe or char" in last


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("change", ["null", "[]", "cut", '"model": 5', '"tokenizer_class": 5', "[" * 100_000])
def test_a_damaged_tokenizer_is_a_sentence_or_another_tokenizer(tmp_path, file, change):
    tokenizer = char_tokenizer(PROSE)
    tokenizer.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / file).read_text())
    if change == "cut":
        (tmp_path / file).write_text(json.dumps(whole)[:-40])
    elif ": " in change:
        (tmp_path / file).write_text(json.dumps(whole | json.loads(f"{{{change}}}")))
    else:
        (tmp_path / file).write_text(change)
    try:
        fingerprint(load_tokenizer(tmp_path))
    except InputError as error:
        assert str(error).startswith("no tokenizer could be loaded from")


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: char_tokenizer([]), "needs text, and there is none"),
        (lambda: bpe_tokenizer([], 300), "there is hardly any"),
        (lambda: bpe_tokenizer(PROSE, 256), "vocab_size=256: a byte-level vocabulary has 257"),
        (lambda: load_tokenizer("nowhere/at/all"), "no tokenizer could be loaded from nowhere"),
    ],
)
def test_bad_input_gets_a_sentence(make, sentence, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=sentence):
        make()


def test_workers_start_without_torch_and_transformers():
    script = "import sys, gpt2repro.data.tokenization; print({*sys.modules} & {'torch', 'transformers', 'tokenizers'})"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
