"""Imports point down only."""

import ast
from pathlib import Path

import mlx_dpo

ROOT = Path(mlx_dpo.__file__).parent
# From the ground up: a room may import from rooms below it, never from one above or beside it.
FLOORS = [
    {"refusal", "machine", "storage", "whole", "prose", "journal"},
    {"models", "care"},
    {"data"},
    {"convert"},
    {"align"},
    {"chat", "evaluation"},
    {"train", "fuse", "curation"},
    {"stages"},
    {"console", "misuse"},
    {"findings"},
    {"demo", "data_commands"},
    {"cli"},
    {"__main__"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def _room(path: Path) -> str:
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def _imported_rooms(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("mlx_dpo.")}
    return rooms & FLOOR_OF.keys()


def test_every_module_stands_on_a_floor():
    rooms = {_room(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR_OF) & rooms


def test_imports_point_down_only():
    wrong = [
        f"{path.relative_to(ROOT)} imports {room}"
        for path in ROOT.rglob("*.py")
        if (own := _room(path)) != "__init__"
        for room in _imported_rooms(path)
        if room != own and FLOOR_OF[room] >= FLOOR_OF[own] and FLOOR_OF[own] != 0
    ]
    assert wrong == []


def test_torch_is_never_imported_by_the_package():
    users = [p for p in ROOT.rglob("*.py") if "import torch" in p.read_text()]
    assert users == []
