"""tokenizer.json and tokenizer_config.json, written for a tokenizer that was rebuilt here."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import Tokenizer, processors

from mlx_dpo.refusal import Refusal

_NO_LIMIT = 10**30  # how transformers writes that a tokenizer has no longest input


class Special(NamedTuple):
    """The tokens with a part to play, and whether an encoded text begins or ends with one."""

    bos: str | None = None
    eos: str | None = None
    unk: str | None = None
    pad: str | None = None
    add_bos: bool = False
    add_eos: bool = False


def write_tokenizer(folder: Path, tokenizer: Tokenizer, special: Special, settings: dict[str, Any]) -> None:
    """Write both files to `folder`; `settings` are further entries of tokenizer_config.json, like the chat template."""
    before = f"{special.bos} " if special.add_bos and special.bos else ""
    after = f" {special.eos}" if special.add_eos and special.eos else ""
    if before or after:
        used = [token for token in (before.strip(), after.strip()) if token]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}",
            pair=f"{before}$A{after} {before}$B{after}",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in used],
        )
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    named = {"bos_token": special.bos, "eos_token": special.eos, "unk_token": special.unk, "pad_token": special.pad}
    written = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": special.add_bos,
        "add_eos_token": special.add_eos,
        "clean_up_tokenization_spaces": False,
        "model_max_length": _NO_LIMIT,
    }
    written |= {key: token for key, token in named.items() if token is not None} | settings
    text = json.dumps(written, indent=2, ensure_ascii=False)
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def token_at(tokens: list[str], place: int | None, what: str, where: str) -> str | None:
    """The token with an id, None without one; Refusal where the id lies outside the vocabulary."""
    if place is None:
        return None
    if not 0 <= place < len(tokens):
        raise Refusal(f"{where} names token {place} as {what}, and has {len(tokens)} tokens: fetch the file again.")
    return tokens[place]
