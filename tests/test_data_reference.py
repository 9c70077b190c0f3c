"""Token ids, and the two answers of a pair, against TRL itself, live."""

import json
from pathlib import Path

import pytest
from goldens import make_tokenised

from mlx_dpo.data.examples import Example, example, thumbs

pytestmark = pytest.mark.reference
GOLDEN = json.loads((Path(__file__).parent / "goldens/tokenised.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["name"])
def test_the_golden_is_what_trl_says_today(case: dict):
    pytest.importorskip("trl")
    assert (make_tokenised.TEMPLATES[case["name"]], make_tokenised.ROWS) == (case["template"], case["rows"])
    assert make_tokenised.tokenised(case["template"], case["rows"]) == case["tokens"]


@pytest.mark.reference
def test_a_pair_is_parted_into_what_trl_parts_it_into():
    unpair_preference_dataset = pytest.importorskip("trl.data_utils").unpair_preference_dataset
    Dataset = pytest.importorskip("datasets").Dataset  # noqa: N806

    rows = [{"prompt": f"p {number}", "chosen": f"c {number}", "rejected": f"r {number}"} for number in range(3)]
    theirs = [example(row, "", kind="thumbs") for row in unpair_preference_dataset(Dataset.from_list(rows))]
    pairs = [made for row in rows if isinstance(made := example(row, "", kind="thumbs"), Example)]
    assert theirs == thumbs(pairs)
