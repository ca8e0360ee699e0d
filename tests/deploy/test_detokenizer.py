import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from kvferry.deploy.detokenizer import Detokenizer, TokenTexts

VOCAB_SIZE = 49152
TEXTS = [
    "Hello, world!",
    "🤖👩‍👩‍👧‍👦🇩🇪 emoji 🎉",
    "汉字与假名かな、한국어",
    "naïve café — “quotes” …",
    "  spaces \n\n\ttabs",
    "𐍈𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "a\ufffdb",
]

slow = settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=150)


def full(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces(tokenizer, pushes, context=()):
    detokenizer = Detokenizer(tokenizer, context)
    return [*(detokenizer.push(push) for push in pushes), detokenizer.finish()]


@pytest.fixture(scope="module")
def byte_ids(tokenizer):
    """Tokens of a single byte, by byte."""
    vocab = tokenizer.get_vocab()
    return {byte: vocab[character] for byte, character in bytes_to_unicode().items() if character in vocab}


@pytest.fixture(scope="module")
def sentencepiece_like():
    """Metaspace and byte fallback, as Llama 2 and Mistral have."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for piece in ["▁", "▁Hello", "▁world", "Hello", "world", "!", "▁▁", "你", "s"]:
        vocab[piece] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizer, text):
    token_ids = tokenizer.encode(text)
    parts = pieces(tokenizer, [[t] for t in token_ids])
    assert "".join(parts) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in part for part in parts)


def test_a_character_comes_with_its_last_token(tokenizer):
    token_ids = tokenizer.encode("🤖")
    assert len(token_ids) > 1
    assert pieces(tokenizer, [[t] for t in token_ids]) == [*[""] * (len(token_ids) - 1), "🤖", ""]


@slow
@given(data=st.data())
def test_random_tokens_join_to_the_full_decode(tokenizer, data):
    token_ids = data.draw(st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=80))
    pushes = []
    rest = list(token_ids)
    while rest:
        size = data.draw(st.integers(1, 12))
        pushes.append(rest[:size])
        rest = rest[size:]
    assert "".join(pieces(tokenizer, pushes)) == full(tokenizer, token_ids)


@slow
@given(st.lists(st.integers(0, 255), max_size=120))
def test_random_bytes_join_to_the_full_decode(tokenizer, byte_ids, data):
    token_ids = [byte_ids[byte] for byte in data if byte in byte_ids]
    assert "".join(pieces(tokenizer, [[t] for t in token_ids])) == full(tokenizer, token_ids)


@slow
@given(st.lists(st.sampled_from([0x80, 0xB8, 0xAD, 0xE4, 0xF0, 0x9F]), max_size=150))
def test_long_runs_of_invalid_bytes_join_to_the_full_decode(tokenizer, byte_ids, data):
    token_ids = [byte_ids[byte] for byte in data]
    assert "".join(pieces(tokenizer, [[t] for t in token_ids])) == full(tokenizer, token_ids)


def test_a_character_goes_on_after_tokens_without_text(tokenizer, byte_ids):
    token_ids = [byte_ids[0xE4], *[60000] * 20, byte_ids[0xB8], byte_ids[0xAD]]
    assert "".join(pieces(tokenizer, [[t] for t in token_ids])) == "中"


@slow
@given(st.text(max_size=60))
def test_random_text_survives(tokenizer, text):
    token_ids = tokenizer.encode(text)
    parts = pieces(tokenizer, [[t] for t in token_ids])
    assert "".join(parts) == full(tokenizer, token_ids)


@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xF0])
def test_endless_invalid_bytes_are_emitted_and_cost_little(tokenizer, byte_ids, byte):
    token_id = byte_ids[byte]
    counter = CountingDecoder(tokenizer)
    detokenizer = Detokenizer(counter)
    text = ""
    for _ in range(2000):
        text += detokenizer.push([token_id])
    assert len(text) > 1900
    assert text + detokenizer.finish() == "\ufffd" * 2000
    assert counter.num_tokens < 2000 * 60


def test_cost_does_not_grow_with_the_answer(tokenizer):
    token_ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 200)
    counter = CountingDecoder(tokenizer)
    detokenizer = Detokenizer(counter)
    for token_id in token_ids:
        detokenizer.push([token_id])
    assert counter.num_tokens <= 3 * len(token_ids)


def test_special_tokens_are_no_text(tokenizer):
    token_ids = [1, *tokenizer.encode(" a"), 2, 2, *tokenizer.encode(" b"), 0]
    assert "".join(pieces(tokenizer, [[t] for t in token_ids])) == " a b"


def test_ids_outside_the_vocabulary_are_no_text_and_cost_little(tokenizer):
    a, b = tokenizer.encode(" a"), tokenizer.encode(" b")
    counter = CountingDecoder(tokenizer)
    assert "".join(pieces(counter, [a, *[[60000]] * 500, b])) == " a b"
    assert counter.num_tokens < 500 * 4


def test_sentencepiece_spaces(sentencepiece_like):
    ids = sentencepiece_like.convert_tokens_to_ids
    answer = ids(["▁Hello", "▁world", "!", "▁", "▁▁", "▁Hello"])
    assert "".join(pieces(sentencepiece_like, [[t] for t in answer])) == "Hello world!    Hello"
    assert "".join(pieces(sentencepiece_like, [[t] for t in answer], ids(["▁Hello"]))).startswith(" Hello world")
    assert "".join(pieces(sentencepiece_like, [[ids("</s>")], [ids("▁world")]], ids(["!"]))) == " world"


def test_sentencepiece_byte_fallback(sentencepiece_like):
    ids = sentencepiece_like.convert_tokens_to_ids
    emoji = ids([f"<0x{byte:02X}>" for byte in "🤖🎉".encode()])
    parts = pieces(sentencepiece_like, [[t] for t in [*ids(["▁Hello"]), *emoji, *ids(["▁world"])]])
    assert parts == ["Hello", "", "", "", "🤖", "", "", "", "🎉", " world", ""]


def test_sentencepiece_random_pieces(sentencepiece_like):
    rng = random.Random(0)
    words = sentencepiece_like.convert_tokens_to_ids(["▁Hello", "▁world", "!", "你", "s", "▁▁"])
    emoji = sentencepiece_like.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "🤖".encode()])
    for _ in range(200):
        token_ids = [t for _ in range(20) for t in rng.choice([emoji, *([w] for w in words)])]
        assert "".join(pieces(sentencepiece_like, [[t] for t in token_ids])) == full(sentencepiece_like, token_ids)


def test_prompt_that_ends_inside_a_character(tokenizer):
    first, *rest = tokenizer.encode("🤖")
    text = "".join(pieces(tokenizer, [[t] for t in rest], [first]))
    assert "\ufffd" in text


def test_token_texts_keep_leading_spaces(tokenizer, sentencepiece_like):
    texts = TokenTexts(tokenizer)
    assert [texts.text(t) for t in tokenizer.encode(" a b")] == [" a", " b"]
    assert texts.text(2) == "<|im_end|>"
    texts = TokenTexts(sentencepiece_like)
    assert texts.text(sentencepiece_like.convert_tokens_to_ids("▁world")) == " world"


class CountingDecoder:
    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.added_tokens_decoder = tokenizer.added_tokens_decoder
        self.num_tokens = 0

    def decode(self, token_ids, **options):
        self.num_tokens += len(token_ids)
        return self._tokenizer.decode(token_ids, **options)
