"""Ranges of a model's memory in other processes."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

import elastikv


def in_other_process(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sys, torch, elastikv\n" + textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def exported(shared, model, page_size):
    """A tensor of three pages, and the offset of its second half page from the model's base."""
    tensor = elastikv.zeros((3 * page_size,), torch.uint8, model)
    tensor.copy_(torch.arange(3 * page_size) % 251)
    if shared.device != "cpu":
        torch.cuda.synchronize(shared.device)
    return tensor, tensor.data_ptr() - model.base_address + page_size // 2


@pytest.mark.parametrize("read_only", [False, True])
def test_another_process_reads_and_writes_a_range(model, page_size, exported, read_only):
    tensor, offset = exported
    export = model.export(offset, 2 * page_size, read_only=read_only)
    assert (export.size, export.read_only) == (2 * page_size, read_only)
    code = """
        view = elastikv.import_(sys.argv[1])
        seen = view.tensor(torch.uint8)
        assert seen.numel() == view.size and seen.data_ptr() == view.address
        assert str(seen.device) == view.device
        print(int(seen.long().sum()), view.read_only)
        if not view.read_only:
            seen[:100] = 7
            if seen.is_cuda: torch.cuda.synchronize()
    """
    done = in_other_process(code, export.handle)
    assert done.returncode == 0, done.stderr
    begin = page_size // 2
    before = (torch.arange(3 * page_size) % 251)[begin : begin + 2 * page_size]
    assert done.stdout.split() == [str(int(before.sum())), str(read_only)]
    if read_only:
        assert torch.equal(tensor[begin : begin + 2 * page_size].long().cpu(), before)
    else:
        assert (tensor[begin : begin + 100] == 7).all()
        assert torch.equal(tensor[begin + 100 : begin + 2 * page_size].long().cpu(), before[100:])


def test_writing_to_a_read_only_range_faults(model, page_size, exported):
    _, offset = exported
    export = model.export(offset, page_size, read_only=True)
    code = """
        seen = elastikv.import_(sys.argv[1]).tensor(torch.uint8)
        seen.fill_(1)
        if seen.is_cuda: torch.cuda.synchronize()
    """
    assert in_other_process(code, export.handle).returncode != 0


def test_a_range_lives_on_where_it_was_imported(shared, model, page_size, exported):
    tensor, offset = exported
    export = model.export(offset, page_size)
    view = elastikv.import_(export.handle).tensor(torch.uint8)
    expected = tensor[page_size // 2 : page_size // 2 + page_size].clone()
    handle = export.handle
    del export
    with pytest.raises(elastikv.HandoffFailed):
        elastikv.import_(handle)
    del tensor, exported
    assert torch.equal(view, expected)


def test_bad_ranges_and_handles(model, page_size, exported):
    _, offset = exported
    with pytest.raises(elastikv.NotMapped):
        model.export(offset, 64 * page_size)
    with pytest.raises(elastikv.InvalidSize):
        model.export(offset, 0)
    with pytest.raises(elastikv.InvalidOffset):
        model.export(-1, 1)
    export = model.export(offset, 2 * page_size + 1)
    head, rest = export.handle.split(":", 1)
    bad = ["", "elastikv-range-9:" + rest, head, head + ":x:0:1:", export.handle.replace(":rw:", ":rw:99"), "cuda-ipc"]
    for handle in bad:
        with pytest.raises(elastikv.InvalidArgument):
            elastikv.import_(handle)
    with pytest.raises(elastikv.InvalidArgument, match="whole elements"):
        elastikv.import_(export.handle).tensor(torch.float32)
