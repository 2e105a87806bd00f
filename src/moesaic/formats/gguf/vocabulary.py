"""A tokenizer as GGUF has it: byte-level BPE (`gpt2`) or SentencePiece's BPE (`llama`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf

from ...errors import InputError
from ...files import read_json

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
ENDINGS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
THREE_DIGITS = CONTRACTIONS + r"\p{N}{1,3}" + ENDINGS
SPLITS = {
    CONTRACTIONS + r"\p{N}" + ENDINGS: "qwen2",
    THREE_DIGITS: "llama-bpe",
    CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
"""llama.cpp's name of what a regular expression in `tokenizer.json` does: it has its own code for each."""


def write_vocabulary(writer: gguf.GGUFWriter, folder: Path, tokenizer: Any, size: int) -> None:
    """Add `folder`'s tokenizer, padded to `size` tokens, with special tokens and chat template.

    Raises:
        InputError: a tokenizer that llama.cpp does not have, or that this module does not know.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise InputError(f"'{folder}' has no tokenizer.json, which GGUF's vocabulary is made from")
    spec = read_json(file)
    model = spec["model"]
    if model["type"] != "BPE":
        raise InputError(f"the tokenizer of '{folder}' is {model['type']}; only BPE ones are written to GGUF")
    sentencepiece = bool(model.get("byte_fallback"))
    written = tokenizer.chat_template or ""
    if beyond := [token for token, n in tokenizer.get_vocab().items() if n >= size and token in str(written)]:
        raise InputError(
            f"the chat template of '{folder}' writes {beyond[0]!r}, which the model has no embedding for; take it out, "
            "or resize the model (resize_token_embeddings) and train it"
        )
    tokens, types = token_list(tokenizer, size, sentencepiece)
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(scores(tokens, model["merges"]))
        writer.add_add_space_prefix(prepends_space(spec))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre_tokenizer(spec["pre_tokenizer"] or {}, bool(model.get("ignore_merges"))))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(folder, load_merges=not sentencepiece, n_vocab=size)
    special.add_special_token = adds(tokenizer)
    special.add_to_gguf(writer, quiet=True)


def adds(tokenizer: Any) -> dict[str, bool]:
    """Tell whether text gets a `bos` in front and an `eos` behind; always said, since llama.cpp's guess may differ."""
    ids, plain = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    extra = len(ids) - len(plain)
    first, last = (ids[0], ids[-1]) if extra else (None, None)
    return {
        "bos": extra > 0 and first == tokenizer.bos_token_id,
        "eos": extra > 0 and last == tokenizer.eos_token_id,
    }


def pre_tokenizer(spec: dict[str, Any], ignore_merges: bool) -> str:
    """Find llama.cpp's name for the way a byte-level BPE cuts text before merging.

    Args:
        spec: `pre_tokenizer` of tokenizer.json.
        ignore_merges: whether a whole piece that is a token stays one, without merging.

    Raises:
        InputError: none is known.
    """
    parts = spec.get("pretokenizers", [spec])
    kinds = [part.get("type") for part in parts]
    patterns = [part["pattern"].get("Regex") for part in parts if part.get("type") == "Split"]
    if not any(part.get("add_prefix_space") for part in parts):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and parts[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and patterns[0] in SPLITS:
            # llama.cpp's `dbrx` cuts as its `llama-bpe` does and always merges
            return "dbrx" if patterns[0] == THREE_DIGITS and not ignore_merges else SPLITS[patterns[0]]
    raise InputError(
        f"llama.cpp cuts text by rules it knows by name, and none is known for this tokenizer's {kinds} "
        f"{patterns or ''}; export to glm4_moe and let llama.cpp's own converter try"
    )


def token_list(tokenizer: Any, size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """List (tokens, their `gguf.TokenType`) by id; ids without a token are unused."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number)
        if token is None:
            token, kind = f"[PAD{number}]", gguf.TokenType.UNUSED
        elif sentencepiece and token == tokenizer.unk_token:
            kind = gguf.TokenType.UNKNOWN
        elif number in added:
            kind = gguf.TokenType.CONTROL if added[number].special else gguf.TokenType.USER_DEFINED
        elif sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            kind = gguf.TokenType.BYTE
        else:
            kind = gguf.TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def scores(tokens: list[str], merges: list[Any]) -> list[float]:
    """Give tokens SentencePiece's scores: minus the rank of the first merge that makes it, so early merges win."""
    rank: dict[str, int] = {}
    for number, merge in enumerate(merges):
        rank.setdefault("".join(merge) if isinstance(merge, list) else merge.replace(" ", "", 1), number)
    return [-float(rank.get(token, len(merges))) for token in tokens]


def prepends_space(spec: dict[str, Any]) -> bool:
    """Tell whether text gets a space in front, as Llama 2's does."""
    normalizer, pre = spec.get("normalizer") or {}, spec.get("pre_tokenizer") or {}
    prepended = any(part.get("type") == "Prepend" for part in normalizer.get("normalizers", [normalizer]))
    return prepended or pre.get("prepend_scheme") in ("first", "always")
