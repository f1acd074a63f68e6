"""Small tokenizers of both kinds that have tokens within characters."""

from __future__ import annotations

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from cluster.frontend.generation.tokenizer import Tokenizer

WORDS = ("Hello", "world", "caf", "é", "日", "本", "a", "b", "▁▁", "▁", "▁Hello", "▁world", "▁a", "▁日")
SPECIAL = ("<unk>", "<s>", "</s>", "<|tool|>")


def byte_fallback() -> Tokenizer:
    """As Llama 2 and Mixtral have it: `▁` is a space, the first one is stripped, rare characters are bytes."""
    names = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {name: index for index, name in enumerate(names)}
    merges = [("▁", "a"), ("▁", "日"), ("▁", "▁")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, None, origin="byte fallback")


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: every token is bytes. Merges cut characters in the middle."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("ð", "Ł"), ("Ġ", "ð"), ("h", "i"), ("Ġ", "a"), ("æ", "Ĺ"), ("¥", "æ")]
    names = [*SPECIAL, *alphabet, *("".join(pair) for pair in merges)]
    vocab = {name: index for index, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, None, origin="byte level")


def spaced_words() -> Tokenizer:
    """As BERT has it: lower case, and a space between any two tokens that the vocabulary does not join."""
    names = [*SPECIAL, "hello", "world", "##ly", "!", "cafe"]
    backend = tokenizers.Tokenizer(
        models.WordPiece({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens(list(SPECIAL))
    return Tokenizer(backend, None, origin="words")
