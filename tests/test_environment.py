"""What NVML tells of a device, with a stand-in for NVML and for CUDA."""

import sys
from types import SimpleNamespace

import pytest
import torch

from attn_impls.harness import environment, topology


class NVMLError(Exception):
    pass


def refuse(*_):
    raise NVMLError("not supported")


HERE = b"GPU-of-cuda-device-1"
CARD = {
    "nvmlSystemGetDriverVersion": lambda: b"575.57",
    "nvmlDeviceGetEccMode": lambda _: [1, 1],
    "nvmlDeviceGetEnforcedPowerLimit": lambda _: 700_000,
    "nvmlDeviceGetComputeRunningProcesses": lambda _: [SimpleNamespace(pid=-1)],
    "nvmlDeviceGetClockInfo": lambda *_: 1500,
    "nvmlDeviceGetMaxClockInfo": lambda *_: 1980,
    "nvmlDeviceGetNvLinkState": lambda _, link: int(link < 4) if link < 6 else refuse(),
}
STATE = {"sm_mhz": 1500, "max_sm_mhz": 1980, "power_cap_w": 700.0, "ecc": True, "other_processes": 1}


@pytest.fixture
def nvml(monkeypatch):
    """pynvml of a machine with one card, which is CUDA's device 1."""
    fake = SimpleNamespace(**CARD, NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_NVLINK_MAX_LINKS=8, nvmlInit=lambda: None)
    fake.nvmlDeviceGetHandleByUUID = lambda uuid: uuid if uuid == HERE else refuse()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: SimpleNamespace(uuid=f"of-cuda-device-{n}"))
    return fake


def test_the_device_is_found_by_its_uuid(nvml):
    assert environment.nvml_device(1) == (nvml, HERE)
    assert environment.nvml_device(0) is None
    assert environment.state("cuda") == STATE
    assert topology._links() == "2 GPUs a node, 4 NVLinks each, peer access to 1"


def test_what_the_card_does_not_tell_is_none(nvml):
    for name in CARD:
        setattr(nvml, name, refuse)
    assert environment.state("cuda") == dict.fromkeys(STATE)
    assert topology._links().startswith("2 GPUs a node, 0 NVLinks each")


@pytest.mark.parametrize("missing", ["pynvml", "driver", "device"])
def test_the_numbers_stand_without_nvml(nvml, monkeypatch, missing):
    if missing == "pynvml":
        monkeypatch.setitem(sys.modules, "pynvml", None)
    else:
        setattr(nvml, {"driver": "nvmlInit", "device": "nvmlDeviceGetHandleByUUID"}[missing], refuse)
    assert environment.nvml_device(1) is None
    assert environment.state("cuda") == {}
    assert topology._links() == "2 GPUs a node, NVLinks unknown each, peer access to 1"


def test_the_highest_clock_is_asked_until_it_is_told(nvml, monkeypatch):
    monkeypatch.setattr(environment, "_max_sm_mhz", 0.0)
    nvml.nvmlDeviceGetMaxClockInfo = refuse
    assert environment.max_sm_mhz() == 0.0
    nvml.nvmlDeviceGetMaxClockInfo = lambda *_: 1980
    assert environment.max_sm_mhz() == 1980
    nvml.nvmlDeviceGetMaxClockInfo = refuse
    assert environment.max_sm_mhz() == 1980
