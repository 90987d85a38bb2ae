"""Two repairs of the interpreter of Triton 3.6; a test module that runs kernels calls ``repair()`` when imported.

- A loop over ``tl.range`` fails with NumPy from 2.4 on, which makes no integer of an array of one element.
- Conversions to bfloat16 truncate; the hardware rounds to nearest, ties to even.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair() -> None:
    """Patch the interpreter, once."""
    if getattr(interpreter, "_kvtier_repaired", False):
        return
    patch_tensor, convert = interpreter._patch_lang_tensor, interpreter._convert_float

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def convert_rounding(x: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target == tl.bfloat16:
            bits = np.ascontiguousarray(x).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            return np.where(np.isnan(x), 0x7FC0, rounded).astype(np.uint16).reshape(x.shape)
        if source == tl.bfloat16 and target == tl.float32:
            return (np.ascontiguousarray(x).view(np.uint16).astype(np.uint32) << np.uint32(16)).reshape(x.shape)
        return convert(x, source, target, rounding_mode)

    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter._convert_float = convert_rounding
    interpreter._kvtier_repaired = True
