"""`gpt2repro bench tokenize` compares equals, and says so in its record."""

import json

import pytest

from gpt2repro.commands.bench import tokenize
from gpt2repro.commands.bench.harness import NotEqual

pytest.importorskip("pyarrow")
pytest.importorskip("psutil")


@pytest.fixture
def small(shared_data, monkeypatch, tmp_path):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared_data / "tiktoken"))
    monkeypatch.setattr(tokenize, "PACKAGES", ())
    monkeypatch.setattr(tokenize, "python_docs", lambda: ["It's a text, né?\n\n  Two lines. <|endoftext|>\n" * 300, ""])
    monkeypatch.setattr(tokenize, "peak_memory_gib", lambda call: call() or 0.1)  # no further process
    return ["--megabytes", "1", "--rounds", "1", "--workers", "2", "--shard_tokens", "50000", "--out", str(tmp_path)]


def test_all_candidates_write_the_same_tokens_and_the_record_says_how_fast(small, tmp_path):
    assert tokenize.main(small) == 0
    (path,) = tmp_path.glob("tokenize-*.json")
    results = json.loads(path.read_text())["results"]
    assert results["text"]["bytes"] >= 10**6 and results["text"]["tokens"] > 10**5
    assert [row["goal"] for row in results["headlines"]][:2] == [2.5, 1.8]


def test_other_tokens_are_never_timed(small, monkeypatch):
    right = tokenize.read_back
    calls = []

    def second_differs(out):
        calls.append(out)
        return right(out)[len(calls) - 1 :]

    monkeypatch.setattr(tokenize, "read_back", second_differs)
    monkeypatch.setattr(tokenize.harness.Record, "compare", lambda *arguments, **options: pytest.fail("was timed"))
    with pytest.raises(NotEqual, match="wrote other tokens"):
        tokenize.main(small)
