"""Elastic tensors: in place, zeroed, charged, and safe in any order of death."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import textwrap
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import elastikv
from conftest import settled_usage


def test_grow_and_shrink_in_place(shared, model, page_size):
    row = page_size // 4
    tensor = elastikv.empty((1, row), (256, row), torch.uint8, model)
    pointer, storage = tensor.data_ptr(), tensor.untyped_storage().data_ptr()
    same = tensor
    tensor.fill_(7)
    for length in (2, 5, 40):
        assert elastikv.grow_(tensor, length) is tensor
        assert tensor.shape == same.shape == (length, row)
        assert (tensor.data_ptr(), tensor.untyped_storage().data_ptr()) == (pointer, storage)
        assert tensor.untyped_storage().nbytes() == length * row
        assert tensor[0].eq(7).all() and tensor[1:].eq(0).all()
    elastikv.shrink_(tensor, 1)
    assert tensor.shape == (1, row) and tensor.data_ptr() == pointer and tensor.eq(7).all()
    assert tensor.untyped_storage().nbytes() == row


def test_physical_memory_follows(shared, model, page_size):
    tensor = elastikv.empty((0, page_size), (64, page_size), torch.uint8, model)
    assert tensor.untyped_storage().data_ptr() >= model.base_address
    assert shared.global_stats().physical_usage == 0
    for length in range(1, 9):
        elastikv.grow_(tensor, length, exact=True)
        assert elastikv.resident_bytes(tensor) == length * page_size == shared.global_stats().physical_usage
    elastikv.shrink_(tensor, 3)
    assert settled_usage(shared, model) == 3 * page_size
    del tensor
    assert settled_usage(shared, model) == 0


def test_open_ended_growth_overshoots_by_an_eighth_at_most(shared, model, page_size):
    tensor = elastikv.empty((0, page_size), (64, page_size), torch.uint8, model)
    for length in range(1, 51):
        elastikv.grow_(tensor, length)
        assert length * page_size <= shared.global_stats().physical_usage <= max(length, length * 1.125) * page_size
    assert model.stats().extents < 50
    elastikv.grow_(tensor, 64, exact=True)
    assert shared.global_stats().physical_usage == 64 * page_size


def test_older_views_stay_valid(model, page_size):
    tensor = elastikv.empty((2, page_size), (64, page_size), torch.uint8, model)
    view = tensor[1]
    tensor.fill_(3)
    elastikv.grow_(tensor, 60)
    assert view.shape == (page_size,) and view.eq(3).all()
    view.fill_(4)
    assert tensor[1].eq(4).all() and tensor[0].eq(3).all()


def test_memory_that_was_shrunk_away_comes_back_zeroed(shared, model, page_size):
    tensor = elastikv.empty((8, page_size), (64, page_size), torch.uint8, model)
    tensor.fill_(255)
    elastikv.shrink_(tensor, 1)
    elastikv.grow_(tensor, 8)
    assert tensor[0].eq(255).all() and tensor[1:].eq(0).all()


def test_scrub_off_stays_within_the_model(device, page_size):
    limit = 4 * page_size
    with elastikv.SharedMemoryPool(limit, device, park_limit=limit) as shared:
        one, two = (shared.register_model(name, 16 * page_size) for name in ("one", "two"))
        first = elastikv.empty((4, page_size), (4, page_size), torch.uint8, one)
        first.fill_(85)
        del first
        one.drain()
        again = elastikv.empty((4, page_size), (4, page_size), torch.uint8, one, scrub=False)
        assert again.eq(85).all()  # parked, and its own
        del again
        one.drain()
        other = elastikv.empty((4, page_size), (4, page_size), torch.uint8, two, scrub=False)
        assert other.eq(0).all()


def test_growing_a_dimension_behind_others(shared, model, page_size):
    tensor = elastikv.empty((3, 0, 5), (3, 4 * page_size, 5), torch.int16, model)
    elastikv.grow_(tensor, 10)
    assert shared.global_stats().physical_usage == 3 * page_size
    values = torch.arange(150, dtype=torch.int16).view(3, 10, 5)
    tensor.copy_(values)
    elastikv.grow_(tensor, page_size)
    assert tensor[:, :10].cpu().eq(values).all() and tensor[:, 10:].eq(0).all()
    assert all(tensor[slot].data_ptr() % page_size == 0 for slot in range(3))
    elastikv.shrink_(tensor, 10)
    assert tensor.cpu().eq(values).all()
    del tensor
    assert settled_usage(shared, model) == 0


def test_dim_is_inferred_or_given(model):
    assert elastikv.empty((2, 0), (2, 9), torch.float32, model).shape == (2, 0)
    same = elastikv.empty((2, 9), (2, 9), torch.float32, model, dim=-1)
    elastikv.shrink_(same, 4)
    assert same.shape == (2, 4)


@pytest.mark.parametrize(
    ("shape", "max_shape", "dim", "message"),
    [
        ((1, 2), (4,), None, "same number of dimensions"),
        ((), (), None, "at least 1"),
        ((5,), (4,), None, "between 0 and max_shape"),
        ((-1,), (4,), None, "between 0 and max_shape"),
        ((1, 1), (4, 4), None, "one dimension only"),
        ((0,), (0,), None, "at least 1"),
        ((1, 4), (4, 4), 1, "not in the growing one"),
        ((1, 4), (4, 4), 2, "not a dimension"),
    ],
)
def test_shapes_that_do_not_fit(shared, model, shape, max_shape, dim, message):
    with pytest.raises(elastikv.InvalidArgument, match=message):
        elastikv.empty(shape, max_shape, torch.float32, model, dim=dim)
    assert shared.global_stats().physical_usage == 0


def test_more_addresses_than_there_are(shared, model):
    for max_shape in ((1 << 62, 1 << 62), (1 << 60,), (1 << 41,)):
        with pytest.raises(elastikv.OutOfVirtualMemory):
            elastikv.empty((0, *max_shape[1:]), max_shape, torch.float32, model)


def test_lengths_that_do_not_fit(shared, model, page_size):
    tensor = elastikv.empty((2, page_size), (4, page_size), torch.uint8, model)
    for call, message in (
        (lambda: elastikv.grow_(tensor, 5), "beyond max_shape's 4"),
        (lambda: elastikv.grow_(tensor, 1), "use shrink_"),
        (lambda: elastikv.grow_(tensor, -1), "use shrink_"),
        (lambda: elastikv.shrink_(tensor, 3), "between 0 and the present 2"),
        (lambda: elastikv.shrink_(tensor, -1), "between 0"),
    ):
        with pytest.raises(elastikv.InvalidArgument, match=message):
            call()
    assert tensor.shape == (2, page_size)
    assert elastikv.resident_bytes(tensor) == 2 * page_size


def test_foreign_tensors_dtypes_and_devices(model):
    with pytest.raises(elastikv.InvalidArgument, match=r"elastikv\.empty"):
        elastikv.grow_(torch.zeros(3), 4)
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        elastikv.grow_([1, 2], 4)
    with pytest.raises(TypeError, match=r"torch\.dtype"):
        elastikv.empty((1,), (2,), "float32", model)
    with pytest.raises(elastikv.InvalidArgument, match="no plain elements"):
        elastikv.empty((1,), (2,), torch.qint8, model)
    other = "meta" if model.device.startswith("cuda") else "cuda"
    with pytest.raises(elastikv.InvalidArgument, match="is on"):
        elastikv.empty((1,), (2,), torch.float32, model, device=other)


def test_views_are_not_grown(model, page_size):
    tensor = elastikv.empty((2, 8), (4, 8), torch.float32, model)
    for view in (tensor[1:], tensor[:, :4], tensor.t(), tensor.view(-1)):
        with pytest.raises(elastikv.InvalidArgument, match="itself"):
            elastikv.grow_(view, 3)


def test_shrinking_under_a_live_view_is_refused(model, page_size):
    tensor = elastikv.empty((8, page_size), (8, page_size), torch.uint8, model)
    view = tensor[7]
    with pytest.raises(elastikv.InvalidArgument, match="share the storage"):
        elastikv.shrink_(tensor, 4)
    assert tensor.shape[0] == 8 and view.eq(0).all()
    del view
    tensor.untyped_storage()  # the storage object itself is no view
    elastikv.shrink_(tensor, 4)


def test_out_of_memory_leaves_the_tensor_as_it_was(shared, model, page_size):
    tensor = elastikv.empty((3, 2, page_size), (3, 40, page_size), torch.uint8, model)
    tensor.fill_(1)
    before = shared.global_stats().physical_usage
    with pytest.raises(torch.OutOfMemoryError):
        elastikv.grow_(tensor, 40)
    assert tensor.shape == (3, 2, page_size) and tensor.eq(1).all()
    assert settled_usage(shared, model) == before
    elastikv.grow_(tensor, 12)
    assert tensor[:, 2:].eq(0).all()


def test_the_last_view_frees(shared, model, page_size):
    tensor = elastikv.empty((4, page_size), (8, page_size), torch.uint8, model)
    view = tensor[1:3]
    del tensor
    assert settled_usage(shared, model) == 4 * page_size
    view.fill_(1)
    del view
    assert settled_usage(shared, model) == 0


def test_tensor_outlives_its_model_and_pool(device, page_size):
    shared = elastikv.SharedMemoryPool(16 * page_size, device, park_limit=0)
    model = shared.register_model("model", 64 * page_size)
    tensor = elastikv.empty((4, page_size), (8, page_size), torch.uint8, model)
    tensor.fill_(6)
    shared.unregister_model("model")
    assert tensor.eq(6).all()
    assert shared.global_stats().physical_usage == 4 * page_size
    with pytest.raises(elastikv.ModelNotFound):
        elastikv.grow_(tensor, 8)
    assert tensor.shape[0] == 4
    shared.close()
    del shared, model
    gc.collect()
    assert tensor.eq(6).all()


def test_prefetch_then_grow_maps_nothing_more(model, page_size):
    tensor = elastikv.empty((1, page_size), (32, page_size), torch.uint8, model)
    elastikv.prefetch(tensor, 16)
    model.drain()
    before = model.stats().driver_calls
    elastikv.grow_(tensor, 16, exact=True)
    after = model.stats().driver_calls
    assert all(after[kind].count == before[kind].count for kind in ("create", "map", "set_access"))
    assert tensor.eq(0).all()


def test_torch_does_not_resize_it_away(model):
    tensor = elastikv.empty((2, 8), (4, 8), torch.float32, model)
    with pytest.raises(RuntimeError, match="not resizable"):
        tensor.resize_(1000, 8)


def test_works_like_any_tensor(model, device):
    tensor = elastikv.empty((4, 8), (16, 8), torch.float32, model)
    values = torch.randn(4, 8, device=device)
    tensor.copy_(values)
    torch.testing.assert_close(tensor @ tensor.t(), values @ values.t())
    torch.testing.assert_close(tensor.clone(), values)
    assert elastikv.is_elastic(tensor[1:]) and not elastikv.is_elastic(values)
    assert elastikv.model_of(tensor).name == "model"


WHOLE_READS = {
    "deepcopy": copy.deepcopy,
    "deepcopy of a view": lambda tensor: copy.deepcopy(tensor[1:3]),
    "pickle": pickle.dumps,
    "save": lambda tensor: torch.save(tensor, io.BytesIO()),
    "save of a view": lambda tensor: torch.save(tensor[1:], io.BytesIO()),
    "legacy save": lambda tensor: torch.save(tensor, io.BytesIO(), _use_new_zipfile_serialization=False),
    "share_memory_": lambda tensor: tensor.share_memory_(),
    "storage clone": lambda tensor: tensor.untyped_storage().clone(),
    "storage item": lambda tensor: tensor.untyped_storage()[100],
    "storage list": lambda tensor: tensor.untyped_storage().tolist(),
    "multiprocessing": ForkingPickler.dumps,
}


@pytest.mark.parametrize("read", WHOLE_READS)
def test_invariant_6_whole_reads_of_a_storage_with_gaps_are_refused(model, read, page_size):
    tensor = elastikv.empty((4, 10, 8), (4, 4 * page_size, 8), torch.float32, model)
    tensor.fill_(2)
    if read == "share_memory_" and tensor.is_cuda:
        pytest.skip("torch does nothing there: CUDA memory is shared already")
    gc.collect()
    with pytest.raises(elastikv.InvalidArgument, match=r"tensor\.clone\(\)"):
        WHOLE_READS[read](tensor)
    assert copy.deepcopy(tensor.clone()).eq(2).all()
    assert tensor.eq(2).all()


def test_a_tensor_of_one_row_is_copied_and_saved_like_any(model, page_size):
    tensor = elastikv.empty((3, 8), (4 * page_size, 8), torch.float32, model)
    tensor.fill_(2)
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    assert torch.load(file).eq(2).all()
    assert copy.deepcopy(tensor).eq(2).all()


def test_a_view_of_another_dtype_is_not_grown(model):
    tensor = elastikv.empty((2048,), (1 << 20,), torch.int8, model)
    with pytest.raises(elastikv.InvalidArgument, match="itself"):
        elastikv.grow_(tensor.view(torch.int64), 2048)


def test_shrinking_under_an_export_is_refused(model):
    tensor = elastikv.empty((64,), (1 << 20,), torch.float32, model)
    other = torch.from_dlpack(tensor)
    with pytest.raises(elastikv.InvalidArgument, match="exports"):
        elastikv.shrink_(tensor, 0)
    assert other.eq(0).all()
    del other
    elastikv.shrink_(tensor, 0)


def test_lengths_that_no_tensor_has(model):
    tensor = elastikv.empty((1,), (8,), torch.float32, model)
    for call in (elastikv.grow_, elastikv.shrink_, elastikv.prefetch):
        with pytest.raises(elastikv.InvalidArgument, match="64 bits"):
            call(tensor, 1 << 64)
        with pytest.raises(TypeError, match="integer"):
            call(tensor, 1.5)


def test_zeros_is_a_plain_tensor_on_the_models_memory(shared, model, device, page_size):
    tensor = elastikv.zeros((3, page_size // 4), torch.float32, model)
    assert tensor.is_contiguous() and tensor.eq(0).all() and str(tensor.device) == device
    assert shared.global_stats().physical_usage == 3 * page_size
    assert (tensor + 1).sum() == tensor.numel()
    assert not elastikv.is_elastic(tensor)
    with pytest.raises(elastikv.InvalidArgument, match=r"elastikv\.empty"):
        elastikv.grow_(tensor, 4)
    with pytest.raises(torch.OutOfMemoryError, match="'model'"):
        elastikv.zeros((64, page_size), torch.uint8, model)
    assert elastikv.zeros((0, 5), torch.float32, model).shape == (0, 5)
    for shape, error in (((-1,), elastikv.InvalidArgument), ((1 << 62, 8), elastikv.OutOfVirtualMemory)):
        with pytest.raises(error):
            elastikv.zeros(shape, torch.float32, model)
    del tensor
    assert settled_usage(shared, model) == 0


@pytest.mark.parametrize("leave", ["tensor", "pool", "both", "cycle"])
def test_interpreter_exit_in_any_order(device, leave):
    script = f"""
        import sys, torch, elastikv
        shared = elastikv.SharedMemoryPool(1 << 28, "{device}")
        model = shared.register_model("model", 1 << 32)
        tensor = elastikv.empty((1 << 20,), (1 << 22,), torch.uint8, model)
        tensor.fill_(1)
        elastikv.prefetch(tensor, 1 << 22)
        if "{leave}" == "tensor": del shared, model
        if "{leave}" == "pool": del tensor
        if "{leave}" == "cycle":
            class Node: pass
            node = Node(); node.self = node; node.tensor = tensor; node.pool = shared
            sys.modules["kept"] = node
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
