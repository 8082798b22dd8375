"""What holds for every test."""

import sys

import pytest
import torch
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

pytest.register_assert_rewrite("mohawk_nas.testing")

# The tests' tensors are too small to share.
torch.set_num_threads(1)

_OURS = ("mohawk_nas", "mohawk_nas_plugin")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no GPU"))


@pytest.fixture(autouse=True)
def global_state():
    """Leave torch and transformers as they were."""
    dtype = torch.get_default_dtype()
    tables = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    before = [dict(table) for table in tables]
    yield
    torch.set_default_dtype(dtype)
    for table, entries in zip(tables, before, strict=True):
        # New names stay: a module registers once, when it is first imported.
        table.update(entries)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill what our own code takes for uninitialised memory with NaN."""

    def poison(make):
        def poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.split(".")[0] in _OURS and tensor.is_floating_point():
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return poisoned

    # torch notes which functions take a device when a `with torch.device` first needs to know; it
    # must not note ours.
    with torch.device("cpu"):
        torch.empty(0)
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))
