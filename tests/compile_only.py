"""Compile kernels instead of launching them: ``python compile_only.py CAPABILITY MODULE FUNCTION``, no GPU needed.

FUNCTION of MODULE calls wrappers on CPU tensors as if they ran. Prints one JSON line: [kernel, bytes of shared memory]
of every launch. Runs in a process without Triton's interpreter.
"""

import importlib
import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, type_canonicalisation_dict

OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}


def source(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ASTSource:
    """What a launch with these arguments compiles."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + type_canonicalisation_dict[str(value.dtype).removeprefix("torch.")]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if abs(value) < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def main(capability: int, module: str, function: str) -> None:
    found = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name in OPTIONS}
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source(kernel, args, kwargs), target=target, options=options)
        found.append([kernel.__name__, compiled.metadata.shared])

    JITFunction.run = run
    getattr(importlib.import_module(module), function)()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
