"""Which path a CPU takes, from descriptions as Linux writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from mecq_cli.export.cpu import cpu_path


@pytest.mark.parametrize(
    ("flags", "machine", "name"),
    [
        ("fpu avx2 avx512f avx512_vnni", "x86_64", "vnni"),
        ("fpu avx2 avx_vnni", "AMD64", "vnni"),
        ("fpu avx2 fma avx512f", "x86_64", "no-vnni"),
        ("fpu avx2", "aarch64", "unknown"),
        ("", "x86_64", "unknown"),
        (None, "x86_64", "unknown"),
    ],
)
def test_the_path_follows_from_the_flags(
    tmp_path: Path, flags: str | None, machine: str, name: str
) -> None:
    file = tmp_path / "cpuinfo"
    if flags is not None:
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\nvmx flags\t: vnmi\n")
    found = cpu_path(file, machine)
    assert found.name == name
    assert "\n" not in found.text


def test_this_machine() -> None:
    assert cpu_path().name in ("vnni", "no-vnni", "unknown")
