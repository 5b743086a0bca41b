"""The kernels compiled for graphics cards that need not be here; run by `test_kernels.py` in its own process.

A line per kernel and architecture: registers, and the bytes that did not fit into them.
"""

import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from engine.sparse import triton_kernels as kernels

ARCHITECTURES = (80, 86, 89, 90, 120)
ONE = dict.fromkeys(("grad_feature", "x_feature"), 1)  # strides of contiguous factors, which Triton compiles in
SAMPLE = ONE | {"ENTRIES": kernels.ENTRIES, "TOKENS": kernels.TOKENS, "AT_ONCE": kernels.AT_ONCE}
REBUILD = {"MORE": True, "BLOCKS": kernels.TILE_BLOCKS, "CHANGES": kernels.CHANGES}
SIXTEENS = ("width", "grad_token", "x_token", "numel", "num_bytes")  # are multiples of it, as the weights' sizes are


def signature(kernel: Any, floats: str, index: str) -> dict[str, str]:
    """Return the types of a launch: factors and weight in `floats`, positions and sizes in `index`."""
    types = {"packed": "*u8", "absmax": "*u8", "hot_step": "i32"}
    types |= dict.fromkeys(("grad_y", "x", "out", "products", "flat"), f"*{floats}")
    types |= dict.fromkeys(("indices", "base", "shift", "place", "hot"), f"*{index}")
    types |= dict.fromkeys(("positions", "more_positions"), f"*{index}") | dict.fromkeys(("count", "tokens"), "i32")
    types |= dict.fromkeys(("starts", "more_starts"), "*i32") | dict.fromkeys(SIXTEENS, index)
    return {name: types.get(name, "*fp32") for name in kernel.arg_names}


def compiled(kernel: Any, constants: dict[str, Any], floats: str, index: str, architecture: int, **options: Any) -> Any:
    """Return the kernel compiled, as a launch would."""
    types = signature(kernel, floats, index) | dict.fromkeys(constants, "constexpr")
    even = [place for place, name in enumerate(types) if types[name].startswith("*") or name in SIXTEENS]
    source = ASTSource(kernel, types, constants, {(place,): [["tt.divisibility", 16]] for place in even})
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


def registers(cubin: bytes) -> tuple[int, int]:
    """Return registers a thread, and bytes a thread that were spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        said = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    used, stack, local = (int(re.findall(rf"{word}:(\d+)", said)[-1]) for word in ("REG", "STACK", "LOCAL"))
    return used, stack + local


def check_rebuild(code: str, floats: str) -> None:
    """Each number is rounded where the plain form rounds it, and entries are changed after the tile is stored."""
    assert "fma." not in code, "a product is not rounded before it is added"
    if floats != "fp32":
        assert re.search(rf"cvt\.rn\.{floats.replace('fp', 'f')}", code), "a number is not rounded to the nearest"
    stores = [place.start() for place in re.finditer(r"st\.global", code)]
    barrier = code.rindex("bar.sync")
    assert stores[0] < barrier < code.index("ld.global", barrier) < stores[-1], "entries do not wait for the tile"


def main() -> None:
    """Compile all, and look at the code."""
    for architecture in ARCHITECTURES:
        for floats, index in (("bf16", "i32"), ("fp16", "i64"), ("fp32", "i32")):
            known = partial(compiled, floats=floats, index=index, architecture=architecture)
            made = {
                "sample": known(kernels._sample, SAMPLE, enable_fp_fusion=True),
                "take": known(kernels._take, {"HOT": True, "TAKEN": kernels.TAKEN}, enable_fp_fusion=True),
                "write": known(kernels._write, {"TAKEN": kernels.TAKEN}, enable_fp_fusion=True),
                "rebuild": known(kernels._rebuild, REBUILD, enable_fp_fusion=False, num_stages=1),
            }
            check_rebuild(made["rebuild"].asm["ptx"], floats)
            for name, kernel in made.items():
                used, spilled = registers(kernel.asm["cubin"])
                sys.stdout.write(
                    f"{name} {floats} {index} sm_{architecture}: {used} registers, {spilled} bytes spilled\n"
                )
                assert spilled == 0


if __name__ == "__main__":
    main()
