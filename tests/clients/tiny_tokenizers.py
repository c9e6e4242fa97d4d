"""Tokenizers made offline: a vocabulary of a few words, in the files that real repositories carry.

Each function writes the source files of its kind (`vocab.json` and `merges.txt`, or `spiece.model`) and lets
transformers read them, so the result is an ordinary tokenizer of the ordinary class. The files depend on
nothing but this module: two builds write the same bytes.
"""

import io
import json
from pathlib import Path

from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

PROMPT = "a small cat on the red sand"

# The longest first piece of a merge must exist before it is used, hence one letter more at a time.
_MERGED_WORDS = ("small", "cat", "on", "the", "red", "sand")

_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
_QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    "{%- if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
)


def clip_tokenizer(scratch: Path) -> CLIPTokenizer:
    """A CLIP BPE tokenizer; `scratch` must not exist and receives `vocab.json` and `merges.txt`."""
    alphabet = _byte_alphabet()
    # CLIP marks a word's last piece, so every byte exists twice.
    pieces = [*alphabet, *(f"{letter}</w>" for letter in alphabet)]
    _write_bpe(scratch, pieces, _merges(end_of_word="</w>"), ("<|startoftext|>", "<|endoftext|>"))
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(scratch, model_max_length=77)
    return tokenizer


def qwen_tokenizer(scratch: Path) -> Qwen2Tokenizer:
    """A Qwen byte-level BPE tokenizer with a chat template that knows `enable_thinking`."""
    _write_bpe(scratch, _byte_alphabet(), _merges(end_of_word=""), _QWEN_SPECIAL)
    tokenizer: Qwen2Tokenizer = Qwen2Tokenizer.from_pretrained(
        scratch, model_max_length=512, chat_template=_QWEN_CHAT_TEMPLATE
    )
    return tokenizer


def t5_tokenizer(scratch: Path) -> T5Tokenizer:
    """A T5 tokenizer over a sentencepiece model trained on a handful of sentences."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PROMPT, "the sand is red", "a cat sat on a small mat", "cats and sand"] * 4),
        model_writer=written,
        vocab_size=48,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        # More threads may sum the expectations in another order.
        num_threads=1,
        minloglevel=2,
    )
    scratch.mkdir(parents=True)
    (scratch / "spiece.model").write_bytes(written.getvalue())
    tokenizer: T5Tokenizer = T5Tokenizer.from_pretrained(scratch, extra_ids=4, model_max_length=77)
    return tokenizer


def _byte_alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def _merges(*, end_of_word: str) -> list[tuple[str, str]]:
    merges: dict[tuple[str, str], None] = {}
    for word in _MERGED_WORDS:
        letters = [*word[:-1], word[-1] + end_of_word]
        left = letters[0]
        for right in letters[1:]:
            merges[left, right] = None
            left += right
    return list(merges)


def _write_bpe(folder: Path, pieces: list[str], merges: list[tuple[str, str]], special: tuple[str, ...]) -> None:
    tokens = [*pieces, *(left + right for left, right in merges), *special]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
