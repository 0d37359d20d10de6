"""The C library's heap while passes run: kept inside, set back after, left alone where it is not ours to set."""

import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import tiny_trainers as tiny
import torch

from fastppo.models import heap
from fastppo.ops import logit_memory
from fastppo.trainers import update

CPU = torch.device("cpu")
IS_GLIBC = hasattr(ctypes.CDLL(None), "malloc_trim")
PAGES = """
import resource
from pathlib import Path
import torch
from fastppo.models.heap import heap_kept

def faults_of_passes(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        kept = [torch.ones(2 ** 21) for _ in range(20)]  # 160 MB, as activations are taken and freed
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

outside = faults_of_passes(6)
with heap_kept(torch.device("cpu")):
    faults_of_passes(2)
    inside = faults_of_passes(6)
    top = torch.ones(2 ** 18)  # what lies at the top of the heap keeps glibc from looking below
    most = resident()
print(outside, inside, most - resident())
"""


@pytest.fixture
def calls(monkeypatch):
    made = []
    glibc = SimpleNamespace(
        mallopt=lambda *arguments: made.append(arguments), malloc_trim=lambda pad: made.append(("trim", pad))
    )
    monkeypatch.setattr(heap, "_glibc", lambda: glibc)
    return made


def test_it_is_set_once_and_set_back_once(calls):
    with heap.heap_kept(CPU), heap.heap_kept(CPU):
        assert calls == [(-3, 2**25), (-1, 2**31 - 1)]
        calls.clear()
    assert calls == [(-1, 2**26), ("trim", 0)]


def test_it_is_set_back_after_an_error(calls):
    with pytest.raises(KeyError), heap.heap_kept(CPU):
        raise KeyError
    assert calls[-2:] == [(-1, 2**26), ("trim", 0)]
    assert heap._depth == 0


def test_other_devices_leave_it_alone(calls):
    with heap.heap_kept(torch.device("meta")):
        pass
    assert not calls


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_what_a_user_has_set_stays(monkeypatch, name):
    monkeypatch.setenv(name, "65536")
    heap._glibc.cache_clear()
    try:
        assert heap._glibc() is None
    finally:
        monkeypatch.undo()
        heap._glibc.cache_clear()


def test_a_step_keeps_the_heap_its_logits_and_its_gradients(calls, monkeypatch):
    places, gradients, room, settle = [], [], logit_memory.room, update.GradientMemory.settle

    def noted_room(*arguments):
        places.append(logit_memory._kept.memory is not None)
        return room(*arguments)

    def noted_settle(memory):
        settle(memory)
        gradients.append([None if p.grad is None else p.grad.data_ptr() for p in trainer.model.parameters()])

    trainer = tiny.trainer(tiny.policy("llama"), mini_batch_size=2, ppo_epochs=2)
    monkeypatch.setattr("fastppo.ops.chunks.room", noted_room)
    monkeypatch.setattr(update.GradientMemory, "settle", noted_settle)
    trainer.step(*tiny.batch())
    assert calls[-2:] == [(-1, 2**26), ("trim", 0)]
    assert calls.count((-1, 2**31 - 1)) >= 2  # to evaluate and to optimise
    assert places
    assert all(places)
    assert len(gradients) == 4  # two epochs of two minibatches
    assert all(each == gradients[0] for each in gradients)
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


@pytest.mark.skipif(not IS_GLIBC, reason="another C library")
def test_memory_freed_inside_is_taken_again_without_the_kernel_and_given_back_after_it():
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PAGES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    outside, inside, given_back = map(int, done.stdout.split())
    assert inside < outside / 3
    assert given_back > 100 * 2**20
