"""Text piece by piece: never half a character, and in the end the whole text."""

import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mmbridge.replies import Writing


def byte_level(folder):
    tiny.llama(folder, words=["Здравствуй, мир! 你好 🌍🌍 naïve café"])
    return AutoTokenizer.from_pretrained(folder)


def byte_fallback(folder):
    """As SentencePiece has it: words with their space, and bytes one by one for all else."""
    words = ["▁Hello", "▁red", ",", ".", "é", "▁", "a"]
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    ids = {token: number for number, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_pieces_joined_are_the_text(make, tmp_path):
    tokenizer = make(tmp_path)
    draw = random.Random(0)
    earth = tokenizer("🌍 naïve", add_special_tokens=False)["input_ids"]
    spans = [[draw.randrange(3, len(tokenizer)) for _ in range(draw.randrange(1, 30))] for _ in range(40)]
    for tokens in [earth, [*earth, *earth[:2]], *spans]:
        writing, told = Writing(tokenizer), ""
        for token in tokens:
            assert not writing.write(token)
            told += writing.piece()
            whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
            assert whole.startswith(told)
        told += writing.close()
        assert told == writing.reply.text == whole


def test_half_a_character_waits_for_the_rest(tmp_path):
    tokenizer = byte_level(tmp_path)
    writing = Writing(tokenizer)
    tokens = [token for byte in "€!".encode() for token in tokenizer.convert_tokens_to_ids([chr_of(byte)])]
    pieces = []
    for token in tokens:
        writing.write(token)
        pieces.append(writing.piece())
    assert pieces == ["", "", "€", "!"]


def chr_of(byte):
    """The character by which byte-level tokenizers spell a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return chr(byte) if byte in printable else chr(256 + sorted(set(range(256)) - set(printable)).index(byte))


def test_text_after_a_medium_is_set_apart_as_in_the_whole_text(tmp_path):
    tokenizer = byte_level(tmp_path)
    writing, told = Writing(tokenizer), ""
    for words in (" one", " two "):
        for token in tokenizer(words, add_special_tokens=False)["input_ids"]:
            writing.write(token)
            told += writing.piece()
        told += writing.close()
    assert told == writing.reply.text == "one two"


@pytest.mark.parametrize(
    ("words", "said"), [("a #red# star\n###Human: b", "a #red# star"), ("###", ""), ("a ##", "a ##")]
)
def test_a_stop_ends_the_reply_and_is_never_told(tmp_path, words, said):
    tokenizer = byte_level(tmp_path)
    writing, told = Writing(tokenizer, stop="###"), ""
    for token in tokenizer(words, add_special_tokens=False)["input_ids"]:
        if writing.write(token):
            break
        told += writing.piece()
    assert said.startswith(told)
    told += writing.close()
    assert told == writing.reply.text == said
