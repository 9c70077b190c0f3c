"""Pairs parted into train, valid and test, near-duplicates all on one side."""

import hashlib
from collections import defaultdict
from collections.abc import Sequence

from mlx_dpo.data.audit.copies import Encode, groups, same
from mlx_dpo.data.examples import Example
from mlx_dpo.data.reading import Splits
from mlx_dpo.refusal import Refusal


def parted(pairs: Sequence[Example], valid: float, test: float, seed: int, encode: Encode | None = None) -> Splits:
    """About the shares `valid` and `test` of the pairs, drawn by groups of near-duplicates, the others as train.

    Which groups go depends on the seed and the prompts alone; each side keeps the order of the rows. Raises Refusal
    for shares that leave nothing to learn from.
    """
    if valid < 0 or test < 0 or valid + test >= 1:
        raise Refusal(
            f"--valid {valid:g} and --test {test:g} leave nothing to learn: give shares of together less than 1."
        )
    prompts = [pair.prompt[-1]["content"] for pair in pairs]
    members: defaultdict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(groups(prompts, encode)):
        members[group].append(row)
    drawn = sorted(members.values(), key=lambda rows: _lot(prompts[rows[0]], seed))
    sides: dict[str, set[int]] = {"valid": set(), "test": set()}
    for side, share in (("test", test), ("valid", valid)):
        wanted = round(share * len(pairs))
        for rows in drawn:
            taken = sides["valid"] | sides["test"]
            if taken.isdisjoint(rows) and len(sides[side]) + len(rows) <= wanted:
                sides[side].update(rows)
    rest = set(range(len(pairs))) - sides["valid"] - sides["test"]
    train, *others = ([pairs[i] for i in sorted(rows)] for rows in (rest, sides["valid"], sides["test"]))
    return Splits(train, *others)


def _lot(prompt: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}\n{same(prompt)}".encode()).hexdigest()
