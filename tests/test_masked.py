"""What masks add to torch's optimizers: they hold whatever happens to weights, and travel with the state."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparselth import masked
from sparselth.masks import MaskError, Masks
from sparselth.optim import MaskedAdam, MaskedAdamW, MaskedSGD

OPTIONS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sgd": (MaskedSGD, torch.optim.SGD, {"lr": 0.1}),
    "momentum": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "dampening": (MaskedSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}),
    "adam": (MaskedAdam, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.01}),
    "amsgrad": (MaskedAdam, torch.optim.Adam, {"lr": 1e-2, "amsgrad": True}),
    "adamw": (MaskedAdamW, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
}
every = pytest.mark.parametrize("name", OPTIONS)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 12), nn.Linear(12, 5))


def some(net: nn.Module, keep: float = 0.3) -> Masks:
    draw = torch.Generator().manual_seed(1)
    found = {n: torch.rand(p.shape, generator=draw) < keep for n, p in net.named_parameters() if p.ndim > 1}
    return Masks(found, net)


def backward(net: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    F.cross_entropy(net(torch.randn(4, 3, 6, 6, generator=draw)), torch.arange(4)).backward()


def awake(net: nn.Module, masks: Masks) -> int:
    """Pruned weights that are not 0."""
    return sum(int(net.get_parameter(name)[~mask].count_nonzero()) for name, mask in masks.items())


def check_state(optimizer: torch.optim.Optimizer, net: nn.Module, masks: Masks) -> None:
    for name, mask in masks.items():
        for key, t in optimizer.state[net.get_parameter(name)].items():
            assert key == "step" or not t[~mask].any(), key


def numpys(net: nn.Module) -> None:
    for p in net.parameters():
        p.detach().numpy()[...] = 0.5


def assigned(net: nn.Module) -> None:
    for p in net.parameters():
        p.data = torch.ones(p.shape)


WRITES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda net: net.load_state_dict(network(7).state_dict()),
    "reset_parameters": lambda net: [m.reset_parameters() for m in net if hasattr(m, "reset_parameters")],
    "init": lambda net: [nn.init.normal_(p) for p in net.parameters()],
    "one weight": lambda net: net[3].weight.detach()[5, 6:9].fill_(3.0),
    "data": assigned,
    "data.copy_": lambda net: [p.data.copy_(torch.full(p.shape, 0.3)) for p in net.parameters()],
    "data.uniform_": lambda net: [p.data.uniform_(-1, 1) for p in net.parameters()],
    "numpy": numpys,
    "channels_last": lambda net: (net.to(memory_format=torch.channels_last), nn.init.ones_(net[0].weight)),
    "cast and back": lambda net: (net.to(torch.bfloat16), assigned(net), net.to(torch.float32)),
    "vector": lambda net: nn.utils.vector_to_parameters(
        torch.ones(sum(p.numel() for p in net.parameters())), net.parameters()
    ),
}


@every
@pytest.mark.parametrize("way", WRITES)
def test_a_step_holds_the_mask_whatever_was_written_since(name: str, way: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    for step in range(3):
        for p in [p for p in net.parameters() if p.grad is not None]:
            p.grad = None if step else p.grad
        WRITES[way](net)
        assert awake(net, masks)
        backward(net, step)
        optimizer.step()
        assert not awake(net, masks)
        check_state(optimizer, net, masks)
        backward(net, step)
        optimizer.step()
        assert not awake(net, masks)


def test_written_live_weights_take_torchs_steps() -> None:
    for ours, theirs, options in OPTIONS.values():
        net, rival = network(), network()
        masks = some(net)
        optimizers = ours(net.parameters(), masks=masks, **options), theirs(rival.parameters(), **options)
        for step in range(4):
            for n, o in zip((net, rival), optimizers, strict=True):
                n.load_state_dict(network(step).state_dict())
                n[0].to(memory_format=torch.channels_last)
                if n is rival:
                    for key, mask in masks.items():
                        n.get_parameter(key).data.mul_(mask)
                for p in n.parameters():
                    p.grad = torch.empty_like(p).copy_(torch.linspace(-1, 1, p.numel()).view(p.shape))
                if n is rival:
                    for key, mask in masks.items():
                        n.get_parameter(key).grad.mul_(mask)
                o.step()
        for p, q in zip(net.parameters(), rival.parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)


@every
def test_parameters_without_gradient_are_held_too(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    net[3].requires_grad_(False)
    for step in range(2):
        net.load_state_dict(network(7).state_dict())
        backward(net, step)
        optimizer.step()
        assert not awake(net, masks)


def test_a_single_weight_written_behind_torch_s_back_is_held_in_time() -> None:
    net = network()
    masks = some(net, keep=0.9)
    optimizer = MaskedSGD(net.parameters(), masks=masks)
    backward(net)
    optimizer.step()
    i = int((~masks["3.weight"]).flatten().nonzero()[len(masks)])
    net[3].weight.data.view(-1)[i] = 1.0
    for _ in range(masked.LOOKS + 1):
        optimizer.step()
    assert not awake(net, masks)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_steps_that_nothing_disturbs_read_no_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _, options = OPTIONS[name]
    net, held = network(), []
    optimizer = ours(net.parameters(), masks=some(net), **options)
    hold = type(optimizer)._hold
    monkeypatch.setattr(type(optimizer), "_hold", lambda self, p: (held.append(p), hold(self, p)))
    for step in range(9):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
    assert len(held) == 3  # in the first step
    net[0].weight.data.fill_(1.0)
    optimizer.step()
    assert len(held) == 6


@every
@pytest.mark.parametrize("bad", [False, True])
def test_a_scaler_s_skipped_step_holds_the_mask(name: str, bad: bool) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    optimizer, scaler = ours(net.parameters(), masks=masks, **options), torch.amp.GradScaler("cpu")
    for step in range(3):
        optimizer.zero_grad()
        net.load_state_dict(network(7).state_dict())
        scaler.scale(net(torch.randn(4, 3, 6, 6)).square().mean()).backward()
        scaler.unscale_(optimizer)
        if bad and step == 1:
            net[4].bias.grad.fill_(torch.inf)
            assert awake(net, masks)
        scaler.step(optimizer)
        scaler.update()
        assert not awake(net, masks) or (bad and step == 1 and name in ("sgd", "momentum", "dampening"))
    assert not awake(net, masks)


def test_masks_by_name_by_model_and_as_numbers() -> None:
    net = network()
    masks = some(net)
    for given, params in (
        (masks, net.parameters()),
        (masks, net.named_parameters()),
        (dict(masks), net.named_parameters()),
        ({name: mask.float() for name, mask in masks.items()}, net.named_parameters()),
        ({net.get_parameter(name): mask.long() for name, mask in masks.items()}, net.parameters()),
        (masks, nn.DataParallel(net).parameters()),
        (masks, [{"params": [net[0].weight]}, {"params": [net[3].weight, net[4].weight], "lr": 0.1}]),
    ):
        net.load_state_dict(network().state_dict())
        optimizer = MaskedAdamW(params, masks=given)
        assert not awake(net, masks)
        for name, mask in masks.items():
            assert torch.equal(optimizer.mask(net.get_parameter(name)), mask)
    stranger = network()
    part = MaskedSGD(net[3].parameters(), masks=masks)
    assert part.mask(net[0].weight) is None
    assert part.mask(net[3].weight) is not None
    for given, says in (
        (dict(masks), "'0.weight': parameters without names"),
        (some(stranger), "made for a Sequential none of whose parameters is given here"),
        ({"0.wait": masks["0.weight"]}, "parameters without names"),
    ):
        with pytest.raises(MaskError, match=says):
            MaskedAdam(net.parameters(), masks=given)
    with pytest.raises(MaskError, match=r"did you mean '0.weight'"):
        MaskedAdam(net.named_parameters(), masks={"0.wait": masks["0.weight"]})
    with pytest.raises(ValueError, match="expected a mask bool"):
        MaskedAdam(net.parameters()).set_mask(net[0].weight, torch.rand(8, 3, 3, 3))


def test_tied_weights_have_one_mask() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    net[2].weight = net[0].weight
    mask = torch.rand(6, 6) < 0.4
    for masks in (Masks({"2.weight": mask}, net), Masks({"0.weight": mask}, net)):
        optimizer = MaskedAdam(net.parameters(), masks=masks)
        net(torch.randn(5, 6)).square().mean().backward()
        optimizer.step()
        assert not net[0].weight[~mask].any()


@every
def test_gradients_of_pruned_weights_can_be_left_out_of_a_norm(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net, rival = network(), network()
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    rival.load_state_dict(net.state_dict())
    backward(net)
    backward(rival)
    for key, mask in masks.items():
        net.get_parameter(key).grad.masked_fill_(~mask, torch.nan)
        rival.get_parameter(key).grad.mul_(mask)
    optimizer.mask_gradients()
    norm = nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert torch.allclose(norm, nn.utils.clip_grad_norm_(rival.parameters(), 0.1))
    for p, q in zip(net.parameters(), rival.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad)


@every
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("how", ["in memory", "on disk"])
def test_distributed_checkpoints_carry_masks(name: str, flat: bool, how: str, tmp_path: Path) -> None:
    ours, _, options = OPTIONS[name]
    flags = StateDictOptions(flatten_optimizer_state_dict=flat)
    net, twin = network(), network(3)
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    backward(net)
    optimizer.step()
    # other groups: states travel by the parameter's name
    groups = [{"params": [p for p in twin.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
    # flattened, a state comes with what the optimizer's own state holds, which is no mask
    other = ours(twin.parameters(), masks=Masks(masks, twin), **options) if flat else ours(groups, **options)
    if not flat:
        groups = [{"params": [p for p in net.parameters() if (p.ndim > 1) is wide]} for wide in (True, False)]
        optimizer = ours(groups, masks=masks, **options)
        optimizer.zero_grad()
        backward(net)
        optimizer.step()
    twin.load_state_dict(net.state_dict())
    found = copy.deepcopy(get_optimizer_state_dict(net, optimizer, options=flags))
    if how == "on disk":
        dcp.save({"optimizer": found}, checkpoint_id=tmp_path / "x")
        into = {"optimizer": copy.deepcopy(found)}
        for value in torch.utils._pytree.tree_leaves(into):
            if isinstance(value, Tensor):
                value.zero_()
        dcp.load(into, checkpoint_id=tmp_path / "x")
        found = into["optimizer"]
    set_optimizer_state_dict(twin, other, found, options=flags)
    for key, mask in masks.items():
        assert torch.equal(other.mask(twin.get_parameter(key)), mask)
    for step in (1, 2):
        for n, o in ((net, optimizer), (twin, other)):
            o.zero_grad()
            backward(n, step)
            o.step()
            assert not awake(n, masks)
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@every
def test_a_distributed_checkpoint_without_masks_is_refused(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net, twin, flags = network(), network(3), StateDictOptions(flatten_optimizer_state_dict=True)
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    backward(net)
    optimizer.step()
    found = get_optimizer_state_dict(net, optimizer, options=flags)
    others = {name: ~mask for name, mask in masks.items()}
    for given in (None, Masks(others, twin), Masks({"0.weight": masks["0.weight"]}, twin)):
        other = ours(twin.parameters(), masks=given, **options)
        with pytest.raises(ValueError, match="saved under masks that are gone") as error:
            set_optimizer_state_dict(twin, other, found, options=flags)
        assert "\n" not in str(error.value)


def test_a_checkpoint_that_lost_a_mask_is_refused() -> None:
    net = network()
    masks = some(net)
    optimizer = MaskedAdam(net.parameters(), masks=masks)
    backward(net)
    optimizer.step()
    state = optimizer.state_dict()
    del state["masks"]
    MaskedAdam(net.parameters()).load_state_dict(state)  # the states have them
    del state["state"][0]["mask"]
    fresh = MaskedAdam(net.parameters())
    with pytest.raises(ValueError, match="masks that are gone, it holds 2: give"):
        fresh.load_state_dict(state)
    assert not fresh.state
    optimizer.load_state_dict(state)


@every
def test_torch_s_own_optimizer_takes_a_state_and_gives_it_back(name: str) -> None:
    ours, theirs, options = OPTIONS[name]
    net, rival = network(), network()
    masks = some(net)
    for steps in (0, 1):
        optimizer = ours(net.parameters(), masks=masks, **options)
        for _ in range(steps):
            backward(net)
            optimizer.step()
        other = theirs(rival.parameters(), **options)
        other.load_state_dict(optimizer.state_dict())
        rival.zero_grad()
        backward(rival)
        other.step()
        back = ours(net.parameters(), masks=None if steps else masks, **options)
        back.load_state_dict(other.state_dict())
        for key, mask in masks.items():
            assert torch.equal(back.mask(net.get_parameter(key)), mask)
        check_state(back, net, masks)


@pytest.mark.host
@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_compiled_call_of_step_takes_steps(name: str) -> None:
    ours, theirs, options = OPTIONS[name]
    theirs([nn.Parameter(torch.ones(2))])
    net, calls = network(), []
    masks = some(net)
    optimizer = ours(net.parameters(), masks=masks, **options)
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    start = net[0].weight.detach().clone()
    for call in (torch.compile(lambda: optimizer.step()), torch.compile(optimizer.step), optimizer.step):
        optimizer.zero_grad()
        net.load_state_dict(network(5).state_dict())
        backward(net)
        call()
        scheduler.step()
        assert not awake(net, masks)
    assert len(calls) == 3
    assert not torch.equal(start, net[0].weight)
    twin = copy.deepcopy((net, optimizer))[1]
    twin.step()


def test_an_average_of_the_weights_keeps_zeros() -> None:
    net = network()
    masks = some(net)
    optimizer = MaskedAdamW(net.parameters(), masks=masks)
    averages = [AveragedModel(net), AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))]
    for step in range(5):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()
        for average in averages:
            average.update_parameters(net)
            assert not awake(average.module, masks)


PROCESS = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
import sparselth

rank, file = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
torch.manual_seed(0)
inner = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 4))
start = sparselth.snapshot(inner)
model = nn.parallel.DistributedDataParallel(inner)
masks = sparselth.prune(model, 0.8)
sparselth.rewind(model, masks, start)
optimizer = sparselth.MaskedAdamW(model.parameters(), lr=0.01, masks=masks)

def step():
    optimizer.zero_grad()
    model(torch.randn(8, 20, generator=draw)).square().mean().backward()
    optimizer.step()
    for name, mask in masks.items():
        assert not inner.get_parameter(name)[~mask].any()
    weights = torch.cat([p.detach().flatten() for p in inner.parameters()])
    both = [torch.empty_like(weights) for _ in range(2)]
    dist.all_gather(both, weights)
    assert torch.equal(*both)

draw = torch.Generator().manual_seed(rank)
for i in range(5):
    step()
state = get_optimizer_state_dict(model, optimizer)
optimizer = sparselth.MaskedAdamW(model.parameters(), lr=0.01)
set_optimizer_state_dict(model, optimizer, state)
inner.load_state_dict(start)
for i in range(5):
    step()

shards = nn.Linear(8, 8)
fully_shard(shards, mesh=dist.init_device_mesh("cpu", (2,)))
for call in (lambda: sparselth.prune(shards, 0.5), lambda: sparselth.MaskedSGD(shards.parameters())):
    try:
        call()
    except ValueError as error:
        assert "shard" in str(error) and "\\n" not in str(error), error
    else:
        raise AssertionError("a shard is no whole parameter")
dist.destroy_process_group()
print("fine")
"""


@pytest.mark.host
@pytest.mark.whole
def test_two_processes_keep_the_same_masked_weights(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, str(tmp_path / "process.py")]
    both = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    for process in both:
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert said.endswith("fine\n")


@every
def test_a_checkpoint_from_before_pruning_leaves_the_masks(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    optimizer = ours(net.parameters(), **options)
    backward(net)
    optimizer.step()
    early = optimizer.state_dict()
    masks = some(net)
    optimizer = ours(net.parameters(), **options, masks=masks)
    for state in (early, {key: value for key, value in early.items() if key != "masks"}):
        optimizer.load_state_dict(state)
        backward(net)
        optimizer.step()
        assert not awake(net, masks)
        check_state(optimizer, net, masks)


@every
def test_parameters_that_are_added_later_have_their_masks(name: str) -> None:
    ours, _, options = OPTIONS[name]
    net = network()
    masks = some(net)
    optimizer = ours(net[3:].parameters(), **options, masks=masks)
    optimizer.add_param_group({"params": [*net[0].parameters()], "lr": 1e-3})
    backward(net)
    optimizer.step()
    assert not awake(net, masks)
    assert net[0].weight.grad is not None
