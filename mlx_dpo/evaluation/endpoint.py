"""Answers from an endpoint that speaks OpenAI's protocol, asked only because its URL was given."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from mlx_dpo.data.templates import Message
from mlx_dpo.refusal import Refusal

_PATIENCE = 300  # seconds for an answer
_KEY = "OPENAI_API_KEY"


def answer(url: str, model: str, messages: Sequence[Message], max_tokens: int) -> str:
    """The likeliest answer of `model` at `url` (which ends in /v1 as a rule), with the key in OPENAI_API_KEY if any.

    Raises Refusal where there is no answer.
    """
    body = {"model": model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(_KEY):
        headers["Authorization"] = f"Bearer {key}"
    place = f"{url.rstrip('/')}/chat/completions"
    request = urllib.request.Request(place, data=json.dumps(body).encode(), headers=headers, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as reply:
            found: Any = json.load(reply)
        return str(found["choices"][0]["message"]["content"]).strip()
    except urllib.error.HTTPError as fault:
        raise Refusal(f"{place} answered with status {fault.code} ({fault.reason}): see URL, model and key.") from None
    except OSError as fault:
        raise Refusal(f"{place} cannot be reached ({fault}): start it, or leave --endpoint away.") from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise Refusal(f"{place} gave no answer in OpenAI's form: give the URL of its API, as …/v1.") from None
