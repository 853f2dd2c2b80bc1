"""The Triton kernels as machine code for GPUs that are not here: prints registers and spilled bytes as JSON.

    python tests/gpu_machine_code.py [75 80 90]

A spilled register is memory that every thread goes to instead, where the kernel was made to stay out of memory.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sleepedu.fast import gpu

KERNELS = (gpu.forward_kernel, gpu.writes_kernel, gpu.inputs_kernel)
SIZES = (16, 32, 64, 128)
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"


def machine_code(kernel, architecture: int, size: int, precision: str) -> dict[str, int]:
    """Return a thread's registers, its spilled bytes, and the program's shared memory."""
    constants = gpu.sizes_of(size, size, precision)
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
    whole = [name for name in kernel.arg_names if name in ("length", "heads") or name.endswith("_next")]
    types = {name: "i32" if name in whole else "*fp32" for name in kernel.arg_names}
    source = ASTSource(kernel, signature=types | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run([BINARIES / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", said).groups())
    return {"registers": registers, "spilled": stack, "shared": made.metadata.shared}


if __name__ == "__main__":
    for architecture in map(int, sys.argv[1:] or (75, 80, 90)):
        for precision in ("ieee",) if architecture < 80 else ("tf32", "tf32x3"):
            for size in SIZES:
                for kernel in KERNELS:
                    row = {"sm": architecture, "precision": precision, "size": size, "kernel": kernel.__name__}
                    print(json.dumps(row | machine_code(kernel, architecture, size, precision)), flush=True)
