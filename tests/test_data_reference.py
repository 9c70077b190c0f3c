"""Token ids against TRL itself, live."""

import json
from pathlib import Path

import pytest
from goldens import make_tokenised

pytestmark = pytest.mark.reference
GOLDEN = json.loads((Path(__file__).parent / "goldens/tokenised.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_the_golden_is_what_trl_says_today(case: dict):
    pytest.importorskip("trl")
    assert (make_tokenised.TEMPLATES[case["name"]], make_tokenised.ROWS) == (case["template"], case["rows"])
    assert make_tokenised.tokenised(case["template"], case["rows"]) == case["tokens"]
