"""The storage of tensors that have gaps without memory: elastic ones of several rows, slots, and block pools."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from elastikv.errors import InvalidArgument


class GappedStorage(torch.UntypedStorage):
    """Serves the tensor and its views, and refuses whatever reads or shares a storage as a whole.

    Its bytes reach from the first row or block to the end of the last, with reserved addresses between: a read there is
    a fault. So pickling, torch.save, copy.deepcopy, share_memory_ and the like raise InvalidArgument. A dense copy,
    `tensor.clone()`, can do all of these.
    """

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InvalidArgument(
            "this tensor's storage has gaps without memory, between its rows or at blocks that are free, and can't be "
            "copied, pickled, saved or shared as a whole; do that with a dense copy of what has memory, such as "
            "tensor.clone()"
        )


# By assignment and not by `def`, as each stands for one method of torch's. `_cdata` is what torch.save asks for first.
for _name in (
    *("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getitem__", "__setitem__", "__iter__"),
    *(
        "clone",
        "copy_",
        "fill_",
        "tolist",
        "cpu",
        "cuda",
        "hpu",
        "to",
        "byteswap",
        "resize_",
        "pin_memory",
        "_write_file",
    ),
    *("share_memory_", "_share_memory_lock_protected", "_share_fd_cpu_", "_share_filename_cpu_", "_share_cuda_"),
    *("bool", "byte", "char", "short", "int", "long", "half", "float", "double", "bfloat16"),
    *("complex_double", "complex_float"),
):
    setattr(GappedStorage, _name, GappedStorage._refuse)
GappedStorage._cdata = property(GappedStorage._refuse)
