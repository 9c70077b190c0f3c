"""What is shipped: one top-level package, with its data."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    out = tmp_path_factory.mktemp("wheel")
    tree = tmp_path_factory.mktemp("source") / "tree"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            target = tree / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(tree)]
    subprocess.run(command, check=True, capture_output=True)
    (built,) = out.glob("*.whl")
    return zipfile.ZipFile(built).namelist()


def test_the_wheel_holds_one_top_level_package(wheel: list[str]):
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"mlx_dpo"}


def test_the_wheel_holds_every_module_and_its_data(wheel: list[str]):
    kept = {".py", ".toml", ".jsonl", ".txt", ".typed", ".md"}
    tree = {str(p.relative_to(ROOT)) for p in (ROOT / "mlx_dpo").rglob("*") if p.suffix in kept or p.name == "py.typed"}
    assert tree == {name for name in wheel if name.startswith("mlx_dpo/")}


def test_the_rooms_are_linked_where_people_look_for_them():
    for room in ("models", "convert", "demo"):
        assert (ROOT / room).resolve() == ROOT / "mlx_dpo" / room
