"""Bytes of tokens: golden counts of the real tokenizer, and odd Unicode under odd vocabularies."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from golfbook.data.tokenizer import (
    Tokenizer,
    audit_documents,
    check_documents,
    describe_changes,
    to_utf8,
    train_tokenizer,
)
from golfbook.errors import ByteAccountingError, DataError

HERE = Path(__file__).parent
DOCUMENTS = [json.loads(line)["text"] for line in (HERE / "data/fineweb_docs_100.jsonl").read_text().splitlines()]
ODD = [
    *("", " ", "  ", "\n", "\r\n", "\t", "\x00", "\ufffd", "\u2581", "\u2581a", " a", "a ", "a  b", "a\u2581\u2581b"),
    *(
        "😀",
        "👩‍👩‍👧",
        "é",
        "e\u0301",
        "ﬁ",
        "½",
        "\u3000x",
        "\xa0x",
        "\u200b",
        "\ufeffx",
        "\u2028",
        "\u2047",
        "<s>a</s>",
    ),
    *(
        "<unk>",
        "<pad>",
        "<0x41>",
        "  two  spaces  ",
        "a\r\nb\r\n",
        "\n\n\n x",
        "中文 字",
        "a\ufffdb",
        "𝒳",
        "\U0010ffff",
    ),
]
texts = st.lists(
    st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=12)), max_size=8
).map("".join)

VARIANTS = {
    "dummy_prefix": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "collapsing": {"add_dummy_prefix": True, "remove_extra_whitespaces": True},
    "collapsing_without_prefix": {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    "pieces_across_words": {"split_by_whitespace": False, "add_dummy_prefix": False, "remove_extra_whitespaces": False},
    "nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "whitespace_pieces": {
        "allow_whitespace_only_pieces": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
}


def sentencepiece_model(documents: list[str], **options: object) -> Tokenizer:
    model = io.BytesIO()
    settings_ = {
        **{"model_type": "bpe", "vocab_size": 1024, "byte_fallback": True, "normalization_rule_name": "identity"},
        **{"num_threads": 1, "minloglevel": 2},
    }
    lines = (line for text in documents for line in text.splitlines())
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(settings_ | options))
    return Tokenizer(model.getvalue(), Path("variant.model"))


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    return Tokenizer.load(HERE / "data/fineweb_1024_bpe.model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(train_tokenizer(DOCUMENTS[:60], 1024, tmp_path_factory.mktemp("t") / "t.model"))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Tokenizer:
    return sentencepiece_model(DOCUMENTS[:40], **VARIANTS[request.param])


def table_bytes(tokenizer: Tokenizer, text: str) -> int:
    return int(tokenizer.token_bytes(tokenizer.encode_document(text)).sum(dtype=np.int64))


def test_golden_bytes_of_50_documents(published: Tokenizer) -> None:
    golden = np.load(HERE / "golden/bytes_first50docs.npz")
    audit = audit_documents(published, DOCUMENTS[:50], "golden")
    np.testing.assert_array_equal(audit.tokens, golden["stream"])
    np.testing.assert_array_equal(published.token_bytes(audit.tokens), golden["token_bytes"])
    np.testing.assert_array_equal(published.byte_table.base, golden["base_bytes_lut"])
    np.testing.assert_array_equal(published.byte_table.leading_space, golden["has_leading_space"])
    np.testing.assert_array_equal(published.byte_table.boundary, golden["is_boundary"])
    assert audit.tokens.size == 148_343
    assert int(published.token_bytes(audit.tokens).sum(dtype=np.int64)) == audit.decoded_bytes.sum() == 351_287
    assert audit.original_bytes.sum() == 351_305


def test_published_table_has_the_specified_properties(published: Tokenizer) -> None:
    table = published.byte_table
    assert published.sha256.startswith("4f5e8adb")
    assert (published.vocab_size, published.bos_id) == (1024, 1)
    assert np.flatnonzero(table.boundary).tolist() == [0, 1, 2, 3]
    assert (table.base[4:260] == 1).all()
    assert (table.leading_space.sum(), table.base.sum(), table.base.max()) == (325, 2330, 11)
    assert published.piece(939) == "\u2581" and table.base[939] == 0 and table.leading_space[939]


def test_trained_model_decodes_real_text_to_itself(trained: Tokenizer) -> None:
    audit = audit_documents(trained, DOCUMENTS, "all")  # 40 of them unseen in training
    assert audit.changed_characters.sum() == 0 and set(audit.examples) == {""}
    np.testing.assert_array_equal(audit.original_bytes, audit.decoded_bytes)
    assert [trained.piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert trained.vocab_size == 1024
    assert audit.tokens.size < 0.45 * audit.original_bytes.sum()


def test_training_repeats_byte_for_byte(tmp_path: Path, trained: Tokenizer) -> None:
    again = train_tokenizer(iter(DOCUMENTS[:60]), 1024, tmp_path / "again.model")
    assert Tokenizer.load(again).sha256 == trained.sha256


@pytest.mark.parametrize("text", ODD)
def test_odd_texts_keep_every_byte_under_our_model(trained: Tokenizer, text: str) -> None:
    expected = text.replace("\u2581", " ")  # the one change SentencePiece makes: its own space symbol
    assert trained.decode(trained.encode_document(text)) == expected
    assert table_bytes(trained, text) == len(expected.encode())


@settings(max_examples=200, deadline=None)
@given(texts)
def test_our_model_is_lossless(trained: Tokenizer, text: str) -> None:
    expected = text.replace("\u2581", " ")
    assert trained.decode(trained.encode(text)) == expected
    assert table_bytes(trained, text) == len(expected.encode())


@settings(max_examples=200, deadline=None)
@given(st.lists(texts, min_size=1, max_size=4))
def test_published_table_equals_what_is_decoded(published: Tokenizer, documents: list[str]) -> None:
    audit = audit_documents(published, documents, "x")
    per_target = published.token_bytes(audit.tokens)
    assert int(per_target.sum(dtype=np.int64)) == audit.decoded_bytes.sum()
    assert per_target[audit.tokens[1:] == published.bos_id].sum() == 0
    assert audit.original_bytes.tolist() == [len(d.encode()) for d in documents]
    assert audit.lengths.sum() == audit.tokens.size


@settings(max_examples=60, deadline=None)
@given(texts)
def test_odd_vocabularies_are_counted_right(variant: Tokenizer, text: str) -> None:
    for document in (text, "plain words", *ODD):
        try:
            audit = audit_documents(variant, [document], "x")
        except ByteAccountingError:
            # decoders that collapse blanks swallow a literal U+2581 that the encoder had kept: exact, or refused
            assert "\u2581" in document
            continue
        assert int(variant.token_bytes(audit.tokens).sum(dtype=np.int64)) == audit.decoded_bytes.sum()
        assert audit.original_bytes.sum() == len(document.encode())


def test_inner_space_of_a_piece_is_one_byte() -> None:
    tokenizer = sentencepiece_model(DOCUMENTS[:40], **VARIANTS["pieces_across_words"])
    inner = [i for i in range(tokenizer.vocab_size) if "\u2581" in tokenizer.piece(i)[1:]]
    assert inner, "the variant has no piece that spans words"
    for i in inner:
        assert tokenizer.byte_table.base[i] + tokenizer.byte_table.leading_space[i] == len(tokenizer.piece(i))


def test_space_at_the_start_of_a_document(published: Tokenizer, trained: Tokenizer) -> None:
    assert published.decode(published.encode(" In")) == "In"  # swallowed, so BOS is a boundary
    assert table_bytes(published, " In") == 2
    assert trained.decode(trained.encode(" In")) == " In"  # kept, so it counts
    assert table_bytes(trained, " In") == 3


def test_without_a_piece_for_the_space_bytes_of_the_text_still_count() -> None:
    tokenizer = sentencepiece_model(["abcabdabe"] * 20, vocab_size=270, add_dummy_prefix=False)
    assert "\u2581" not in [tokenizer.piece(i) for i in range(tokenizer.vocab_size)]
    audit = audit_documents(tokenizer, ["a b"], "x")
    assert audit.decoded_bytes.tolist() == [5]  # U+2581 as three bytes: what the table says, and what is decoded ...
    assert audit.original_bytes.tolist() == [3]  # ... but never what the score divides by


def test_how_sentencepiece_decodes_fragments(published: Tokenizer) -> None:
    byte = {b: published.encode("😀").tolist()[0] - 0xF0 + b for b in range(256)}
    assert published.decode([byte[0xE2]]) == "\ufffd"
    assert published.decode([byte[0xE2], byte[0x82]]) == "\ufffd\ufffd"  # one for each stray byte
    assert published.decode([byte[b] for b in "é€😀".encode()]) == "é€😀"
    assert published.decode([byte[b] for b in b"\xef\xbf\xbd"]) == "\ufffd"  # a real one: three bytes, three tokens
    assert published.decode([]) == published.decode([published.bos_id]) == ""
    assert published.encode("").size == 0
    assert published.encode_document("").tolist() == [published.bos_id]


def test_fragments_in_a_stream_are_refused(published: Tokenizer) -> None:
    lone = published.encode("😀")[:2]
    stream = np.concatenate([np.array([1], np.uint16), published.encode("In"), lone])
    with pytest.raises(
        ByteAccountingError,
        match=r"val document 7, which begins 'In.*': the byte table .* gives 4 bytes, .* decode to 8",
    ):
        check_documents(published, [stream], "val", 7)


def test_unknown_token_is_named() -> None:
    tokenizer = sentencepiece_model(DOCUMENTS[:40], byte_fallback=False)
    message = (
        r"training document 1, which begins 'an unseen sign.*id \d+ '<unk>', .*U\+1234.* use a tokenizer with byte fall"
    )
    with pytest.raises(ByteAccountingError, match=message):
        audit_documents(tokenizer, ["plain words", "an unseen sign: \u1234 here"], "training")


def test_a_document_cut_inside_a_character_is_called_that(published: Tokenizer) -> None:
    whole = published.encode_document("a smile 😀")
    with pytest.raises(ByteAccountingError, match=r"has the bytes f0 9f 98, no whole character") as caught:
        check_documents(published, [whole[:-1]], "shard")
    assert "cut between characters" in str(caught.value) and "byte fallback" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "text", "pairs"),
    [
        ({"normalization_rule_name": "nmt_nfkc_cf"}, "An ODD", [("A", "a"), ("O", "o"), ("D", "d"), ("D", "d")]),
        ({"normalization_rule_name": "nmt_nfkc"}, "½ of it…", [("½", "1⁄2"), ("…", "...")]),  # longer, not shorter
        ({"normalization_rule_name": "nfkc"}, "cafe\u0301 \ufb01ne", [("e\u0301", "é"), ("\ufb01", "fi")]),
        ({}, "  two  spaces ", [("  ", ""), (" ", ""), (" ", "")]),
        ({}, "a\u2581b", [("\u2581", " ")]),
        ({}, "   ", [("   ", "")]),
    ],
)  # fmt: skip
def test_what_a_tokenizer_changes(options: dict[str, Any], text: str, pairs: list[tuple[str, str]]) -> None:
    tokenizer = sentencepiece_model(DOCUMENTS[:40], **options)
    assert tokenizer.differences(text, tokenizer.decode(tokenizer.encode(text))) == pairs


@settings(max_examples=60, deadline=None)
@given(texts)
def test_what_is_not_changed_is_kept(variant: Tokenizer, text: str) -> None:
    decoded = variant.decode(variant.encode(text))
    pairs = variant.differences(text, decoded)
    assert bool(pairs) == (text != decoded)
    assert len(text) - sum(len(a) for a, _ in pairs) == len(decoded) - sum(len(b) for _, b in pairs)


def test_changes_of_equal_length_are_told_in_words() -> None:
    tokenizer = sentencepiece_model(DOCUMENTS[:40], normalization_rule_name="nmt_nfkc_cf")
    audit = audit_documents(tokenizer, ["no change", "AN Ant", "Be", ""], "x")
    assert audit.original_bytes.sum() == audit.decoded_bytes.sum()  # which is why bytes do not show it
    assert audit.changed_characters.tolist() == [0, 3, 1, 0]
    words = describe_changes(audit.changed_characters, audit.examples)
    assert words == "4 characters in 2 of 4 documents decode to something else, for example 'A' became 'a'"


def test_changes_that_the_normaliser_does_not_tell_are_found_all_the_same(trained: Tokenizer) -> None:
    assert trained.differences("one two three", "one 2 three") == [("two", "2")]
    assert trained.differences("same", "same") == []


def test_a_wrong_table_is_found(published: Tokenizer) -> None:
    tokenizer = Tokenizer.load(published.path)
    wrong = int(tokenizer.encode("In")[0])
    tokenizer.byte_table.base[wrong] += 1
    with pytest.raises(ByteAccountingError, match=rf"id {wrong} '{tokenizer.piece(wrong)}'"):
        audit_documents(tokenizer, [DOCUMENTS[1], "In In In"], "x")


def test_surrogates_and_foreign_ids(published: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"lone surrogate U\+D800 at character 1"):
        published.encode("a\ud800")
    assert to_utf8("é") == b"\xc3\xa9"
    with pytest.raises(DataError, match="token id 1024 is outside"):
        published.token_bytes(np.array([1, 1024], np.uint16))
    with pytest.raises(DataError, match="token id 5000 is outside"):
        published.decode([5, 5000])


def test_unusable_models(tmp_path: Path) -> None:
    for name, content in (("empty.model", b""), ("text.model", b"not a model" * 50)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is no SentencePiece model"):
            Tokenizer.load(tmp_path / name)
    with pytest.raises(DataError, match="cannot read tokenizer"):
        Tokenizer.load(tmp_path / "missing.model")
    with pytest.raises(DataError, match="no BOS piece"):
        sentencepiece_model(DOCUMENTS[:10], bos_id=-1)


def test_training_says_what_to_change(tmp_path: Path) -> None:
    target = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"too small for a vocabulary of 5000 pieces \(at most \d+\)"):
        train_tokenizer(["a few words only"], 5000, target)
    with pytest.raises(DataError, match=r"set model.vocab_size to \d+ or more"):
        train_tokenizer(DOCUMENTS[:3], 100, target)
    for nothing in ([], ["", "\n"]):
        with pytest.raises(DataError, match="no text to train"):
            train_tokenizer(nothing, 300, target)
    assert not target.exists()


def test_training_takes_long_lines_and_control_characters(tmp_path: Path) -> None:
    odd = ["x" * 100_000, "a\tb\r\nc\x00d\n" * 50, "\ufffd \u2581 \u2585 " * 10, DOCUMENTS[0]]
    tokenizer = Tokenizer.load(train_tokenizer(odd, 512, tmp_path / "t.model"))
    for text in odd:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_a_first_piece_of_two_spaces_does_not_hide_that_the_decoder_swallows_one(tmp_path: Path) -> None:
    """With a space put before each document, the first piece that begins with one may be two spaces: one remains."""
    texts = ["  ".join(["tone", "rust", "a sun"]) + f" {i}" for i in range(40)]
    tokenizer = Tokenizer.load(train_tokenizer(texts, 290, tmp_path / "prefix.model", dummy_prefix=True))
    first = next(i for i in range(290) if tokenizer.byte_table.leading_space[i] and tokenizer.byte_table.base[i])
    assert tokenizer.piece(first) == "\u2581\u2581"
    assert tokenizer.byte_table.boundary[tokenizer.bos_id]
    audit = audit_documents(tokenizer, texts, "x")
    np.testing.assert_array_equal(audit.decoded_bytes, audit.original_bytes)


def test_documents_of_a_stream(trained: Tokenizer) -> None:
    stream = np.concatenate([[260], *(trained.encode_document(text) for text in ["a b", "", "c"])]).astype(np.uint16)
    assert trained.decode_documents(stream) == ["a b", "", "c"]
    assert trained.decode_documents(stream, 1) == ["a b"]
    assert trained.decode_documents(stream[:1]) == []
