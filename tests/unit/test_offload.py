# SPDX-License-Identifier: Apache-2.0
"""Offloaded weights are what they were, although the transfer to the host ends after `Module.to` has returned; and if
some are not, the first upload says so."""

import subprocess
import sys

import pytest
import torch
import verl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from verl.utils import fsdp_utils

from verl_gndpo.verl_patches import offload

# One process plays rank 7 of 8. Each asynchronous copy returns host memory full of NaN, which gets its values when the
# device is waited for, as with a busy accelerator.
SCRIPT = """
import sys
import torch, torch.distributed as dist
import verl
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from verl.utils import device, fsdp_utils
from verl_gndpo.verl_patches import describe

dist.init_process_group("fake", store=FakeStore(), rank=7, world_size=8)
# 60 rows over 8 ranks are uneven, 64 are even.
model = torch.nn.Sequential(torch.nn.Linear(16, 60), torch.nn.Linear(16, 64))
mesh = init_device_mesh("cpu", (8,))
for layer in model:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
for parameter in model.parameters():
    parameter._local_tensor.fill_(1.0)
pending, waits = [], []

def copy(tensor):
    host = torch.full_like(tensor._local_tensor, float("nan"))
    pending.append((host, tensor._local_tensor.clone()))
    return DTensor.from_local(
        host, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride(), run_check=False
    )

def wait():
    waits.append(len(pending))
    while pending:
        host, values = pending.pop()
        host.copy_(values)

torch.cpu.synchronize = wait
def to(device, non_blocking=False):
    assert non_blocking
    model._apply(copy)

model.to = to
offload = fsdp_utils.offload_fsdp2_model_to_cpu
if sys.argv[1] == "stock":
    offload = offload.__closure__[[c for c in offload.__code__.co_freevars].index("original")].cell_contents
with torch.no_grad():
    offload(model, empty_cache=False)
patched_waits = len(waits)
wait()
wrong = [name for name, p in model.named_parameters() if not (p._local_tensor == 1).all()]
state = next(row["state"] for row in describe() if row["name"] == "fsdp2_offload")
print(state, patched_waits, *wrong)
"""


@pytest.mark.parametrize("which", ["stock", "patched"])
def test_uneven_shards_arrive_before_they_are_padded(which):
    done = subprocess.run([sys.executable, "-c", SCRIPT, which], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    state, waits, *wrong = done.stdout.split()[-4 if which == "stock" else -2 :]
    assert state == "applied"
    if which == "stock" and verl.__version__ == "0.9.0":
        # It does not take the way that loses them here, whatever it does on an accelerator.
        pytest.skip("verl 0.9.0 offloads in another way")
    if which == "stock":
        # The test can see the fault: both parameters of the uneven layer are lost.
        assert waits == "0" and wrong == ["0.weight", "0.bias"]
    else:
        # Even shards are not waited for.
        assert wrong == [] and waits == "2"


class Poisoned(torch.nn.Sequential):
    """A model of which a value changes whenever it moves to the host."""

    poison: tuple[str, int] | None = None

    def to(self, *args, **kwargs):
        if args[0] == "cpu" and self.poison is not None:
            name, place = self.poison
            with torch.no_grad():
                # The last bit of one number.
                self.get_parameter(name).view(-1).view(torch.int16)[place] += 1
        return super().to(*args, **kwargs)


def round_trip(model):
    fsdp_utils.offload_fsdp_model_to_cpu(model)
    fsdp_utils.load_fsdp_model_to_gpu(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("poison", [("0.weight", 0), ("1.weight", 23), ("1.bias", -1)])
def test_one_changed_bit_is_noticed_at_the_first_upload(monkeypatch, dtype, poison):
    monkeypatch.setattr(offload, "CHECKED_AT_A_TIME", 7)
    model = Poisoned(torch.nn.Linear(6, 4), torch.nn.Linear(4, 6)).to(dtype)
    model.poison = poison
    fsdp_utils.offload_fsdp_model_to_cpu(model)
    with pytest.raises(RuntimeError, match=rf"1 of 4 parameters of Poisoned on rank 0 .*first of them {poison[0]}: "):
        fsdp_utils.load_fsdp_model_to_gpu(model)


def test_only_the_first_round_trip_is_checked(monkeypatch):
    """Later ones cost nothing, and weights may change between them."""
    taken = []
    monkeypatch.setattr(offload, "checksums", lambda model, real=offload.checksums: taken.append(1) or real(model))
    model = Poisoned(torch.nn.Linear(6, 4))
    round_trip(model)
    assert len(taken) == 2
    with torch.no_grad():
        model[0].weight.add_(1)
    round_trip(model)
    assert len(taken) == 2
    # Each model is checked for itself.
    round_trip(Poisoned(torch.nn.Linear(2, 2)))
    assert len(taken) == 4


def test_checksums_of_nothing():
    """A shard may be empty, and so may a model."""
    assert offload.checksums(torch.nn.Module()).tolist() == []
    assert offload.checksums(torch.nn.Linear(0, 2, bias=False)).tolist() == [0]


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_saved_weights_are_not_those_that_an_update_changes(mesh):
    """verl's own function returns the live ones where they are on the host."""
    model = torch.nn.Linear(4, 3)
    fully_shard(model, mesh=mesh)
    before = {name: parameter.full_tensor().clone() for name, parameter in model.named_parameters()}
    saved, spec = fsdp_utils.fsdp2_sharded_save_to_cpu(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for name, (weight, _) in saved.items():
        assert torch.equal(weight, before[name])
    fsdp_utils.fsdp2_sharded_load_from_cpu(model, saved, spec)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.full_tensor(), before[name])
