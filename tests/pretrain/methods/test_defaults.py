"""A method built by hand and one built from an empty configuration have the same settings."""

import inspect

import pytest
import torch
from torch import nn

from moco_common.errors import UserError
from pretrain.config.defaults import get_defaults
from pretrain.methods import METHODS, build_method, declaration, method_class
from pretrain.methods.automatic import resolve
from pretrain.methods.base import Run
from pretrain.modeling.batch_norm import SplitBatchNorm1d
from tests.pretrain import tiny


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_is_configured_and_its_default_is_that_of_its_key(name, monkeypatch):
    chosen = method_class(name)
    parameters = inspect.signature(chosen.__init__).parameters
    passed = {}

    def record(self, *args, **kwargs):
        passed.update(kwargs)

    monkeypatch.setattr(chosen, "__init__", record)
    cfg = resolve(get_defaults(), images=10**6)  # what is automatic is the papers' at this size
    chosen.from_config(cfg, Run(num_images=10**6, total_steps=9, bn_groups=1))
    settings = {n: p.default for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert passed.keys() == settings.keys()
    defaults = {n: value for n, value in settings.items() if value is not inspect.Parameter.empty}
    assert defaults == {n: passed[n] for n in defaults}


def test_a_method_whose_file_does_not_exist_is_named(monkeypatch):
    monkeypatch.setitem(METHODS, "absent", "pretrain.methods.absent:Absent")
    with pytest.raises(ModuleNotFoundError, match="names the module pretrain.methods.absent"):
        declaration("absent")


LIMITS = {  # the extreme values that are allowed, and the nearest that are not
    ("byol", "BYOL.MOMENTUM"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("moco", "MOCO.MOMENTUM"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("moco", "MOCO.QUEUE_SIZE"): ([1], [0]),
    ("dense-cl", "DENSECL.WEIGHT"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("pixpro", "PIXPRO.MOMENTUM"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("pixpro", "PIXPRO.SHARPNESS"): ([1.0], [0.999]),
    ("pixpro", "PIXPRO.INSTANCE_WEIGHT"): ([0.0], [-1e-9]),
    ("slot-con", "SLOTCON.MOMENTUM"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("slot-con", "SLOTCON.GROUP_WEIGHT"): ([0.0, 1.0], [-1e-9, 1 + 1e-9]),
    ("slot-con", "SLOTCON.SLOTS"): ([2], [1]),
    ("memory-bank", "BANK.MOMENTUM"): ([0.0, 1 - 1e-9], [-1e-9, 1.0]),
    ("swav", "SWAV.EPSILON"): ([0.025], [0.0249]),
    ("swav", "SWAV.SINKHORN_ITERS"): ([1], [0]),
    ("swav", "SWAV.PROTOTYPES"): ([1], [0]),
    ("swav", "SWAV.QUEUE_SIZE"): ([0, 1], [-1]),
}


@pytest.mark.parametrize(("name", "key"), LIMITS)
def test_a_setting_is_allowed_up_to_its_limits(name, key):
    allowed, refused = LIMITS[name, key]
    for value in allowed:
        tiny.build(name, key, value)
    for value in refused:
        with pytest.raises(UserError, match=key.partition(".")[2]):
            tiny.build(name, key, value)


@pytest.mark.parametrize("name", ["moco", "memory-bank"])
def test_initial_noise_depends_on_the_seed_and_on_nothing_else(name):
    def noise(state, seed):
        torch.manual_seed(state)
        method = build_method(tiny.config(name, "SEED", seed), num_images=40, total_steps=3)
        return method.queue if name == "moco" else method.bank.shard

    assert torch.equal(noise(1, 0), noise(2, 0))
    assert not torch.equal(noise(1, 0), noise(1, 1))


@pytest.mark.parametrize(
    ("name", "overrides", "layers"),
    [
        ("moco", ["MOCO.MLP", True], 0),
        ("moco", ["MOCO.MLP", True, "MOCO.MLP_BN", True], 2),
        ("simclr", [], 2),
        ("byol", [], 1),
        ("swav", [], 1),
    ],
)
def test_a_head_has_the_papers_batch_norm_in_the_groups_of_the_run(name, overrides, layers):
    built, _ = tiny.build(name, "MODEL.BN_GROUPS", 2, *overrides)
    norms = [m for m in built.encoder_q.fc.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [type(norm) for norm in norms] == [SplitBatchNorm1d] * layers
    assert [norm.groups for norm in norms] == [2] * layers
