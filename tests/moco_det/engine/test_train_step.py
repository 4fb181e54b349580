"""Several passes make one step: equal to the large batch, and to as many processes."""

import copy
import math
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from moco_common.errors import UserError
from moco_det.config.protocols import load_config
from moco_det.data.register import register
from moco_det.engine.train_step import TrainStep, precision
from moco_det.engine.trainer import build_trainer
from moco_det.modeling.detector import build_detector
from tests.conftest import NARROW, QUICK
from tests.moco_det.ranks import on_ranks


class Toy(nn.Module):
    """Losses that are means over images, as the RPN's are; a norm that sees the batch, if any."""

    def __init__(self, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), norm or nn.Identity(), nn.ReLU())
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, batch):
        x = self.head(self.body(torch.stack([image["image"] for image in batch])))
        a, b = x.abs().mean(dim=(2, 3)).mean(0)
        return {"loss_a": a, "loss_b": 3 * b}


def image(number, value=None):
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64)
    if value is not None:
        pixels[0, 0, 0] = value
    return {"image": pixels, "file_name": f"{number}.jpg"}


def steps(model, passes, per_pass, iterations=3, memory_format=torch.contiguous_format):
    """Train on images 0, 1, 2, ...; the parameters after it, and what was reported."""
    model = copy.deepcopy(model).double().to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def batches(first, last):
        for number in range(first * passes, last * passes):
            yield number, [image(number * per_pass + i) for i in range(per_pass)]

    step = TrainStep(model, batches, optimizer, passes=passes, seed=1)
    step.start(0, iterations)
    reported = [step(iteration) for iteration in range(iterations)]
    return model, [{k: v for k, v in r.items() if k != "data_time"} for r in reported]


def equal(a, b):
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in pairs)


def test_accumulated_passes_are_the_large_batch_where_losses_are_means_over_images():
    large, losses = steps(Toy(), passes=1, per_pass=8)
    for passes in (2, 8):
        small, found = steps(Toy(), passes=passes, per_pass=8 // passes)
        assert equal(small, large)
        assert [list(r) for r in found] == [["total_loss", "loss_a", "loss_b"]] * 3
        for r, expected in zip(found, losses, strict=True):
            assert r == pytest.approx(expected, rel=1e-5)


def test_batch_norm_is_what_tells_passes_from_a_large_batch():
    norm = nn.BatchNorm2d(4)
    assert not equal(steps(Toy(norm), 1, 8)[0], steps(Toy(norm), 2, 4)[0])
    norm = nn.BatchNorm2d(4).eval()
    assert equal(steps(Toy(norm), 1, 8)[0], steps(Toy(norm), 2, 4)[0])


def test_channels_last_gives_the_same_numbers():
    last, losses = steps(Toy(), 1, 4, memory_format=torch.channels_last)
    assert last.body[0].weight.is_contiguous(memory_format=torch.channels_last)
    plain, expected = steps(Toy(), 1, 4)
    assert equal(last, plain)
    assert losses[-1] == pytest.approx(expected[-1])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_iteration_and_images_and_changes_nothing(value):
    model = Toy().double()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    passes = [[image(0), image(1)], [image(2), image(3, value)]]
    step = TrainStep(model, lambda *_: iter(enumerate(passes)), optimizer, passes=2, seed=1)
    step.start(0, 1)
    with pytest.raises(UserError) as error:
        step(41)
    assert "in iteration 42 (loss_a " in str(error.value)
    assert "on the images 2.jpg, 3.jpg;" in str(error.value)
    assert not optimizer.state
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_precision_is_what_the_device_can_do():
    cfg = load_config("VOC", ["MODEL.DEVICE", "cpu"])
    assert precision(cfg) is None
    cfg.SOLVER.AMP.ENABLED = True
    with pytest.raises(UserError, match="float16 needs a GPU: use bfloat16"):
        precision(cfg)
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    assert precision(cfg) is torch.bfloat16
    cfg.SOLVER.AMP.PRECISION = "float8"
    with pytest.raises(UserError, match="'float8' is unknown: choose float16 or bfloat16"):
        precision(cfg)


def trained(config, spec, output_dir, world_size=1):
    """Parameters of the narrow detector after two iterations of the trainer itself."""
    cfg = load_config(
        "VOC-random",
        [
            *(*NARROW, *QUICK, "MODEL.RESNETS.NORM", "BN", "TEST.PRECISE_BN.ENABLED", "False"),
            *("SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.01", *config),
        ],
    )
    cfg.OUTPUT_DIR = str(output_dir)
    Path(output_dir).mkdir(exist_ok=True)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.DATASETS.TRAIN = (register(spec, None),)
    cfg.DATASETS.TEST = ()
    torch.manual_seed(0)
    model = build_detector(cfg)
    trainer = build_trainer(cfg, model)
    trainer.fit()
    assert all(p.isfinite().all() for p in model.parameters())
    return dict(model.named_parameters())


def on_a_rank(rank, spec, output_dir):
    found = {k: v.detach() for k, v in trained([], spec, output_dir).items()}

    # One rank's loss is not finite: both stop, with the same words.
    model = Toy().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp = nn.parallel.DistributedDataParallel(model)
    batch = [image(rank, math.nan if rank == 1 else None)]
    step = TrainStep(ddp, lambda *_: iter([(rank, batch)]), optimizer, seed=1)
    step.start(0, 1)
    try:
        step(0)
    except UserError as error:
        return found, str(error)
    return found, "went on"


def test_passes_of_one_process_are_processes_of_one_pass(voc_dir, tmp_path):
    """The whole detector with plain BN, its sampling and augmentations included: two processes,
    two passes of one, and of 1-image passes as many as there are images."""
    spec = f"voc:{voc_dir}:trainval"
    (both, said), (other, also) = on_ranks(2, on_a_rank, spec, str(tmp_path / "ranks"))
    assert said == also
    assert "on the images 1.jpg;" in said
    with EventStorage():
        passes = trained(["SOLVER.ACCUMULATION_STEPS", "2"], spec, tmp_path / "passes")
        whole = trained([], spec, tmp_path / "whole")
    for name, value in passes.items():
        assert torch.equal(both[name], other[name])
        torch.testing.assert_close(both[name], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(
        whole["backbone.res4.0.conv1.weight"], passes["backbone.res4.0.conv1.weight"], atol=1e-5
    )


def test_bfloat16_and_channels_last_train_on_a_cpu(voc_dir, tmp_path):
    config = ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.PRECISION", "bfloat16"]
    config += ["SOLVER.CHANNELS_LAST", "True", "SOLVER.MAX_ITER", "1"]
    found = trained(config, f"voc:{voc_dir}:trainval", tmp_path)
    weight = found["backbone.res4.0.conv2.weight"]
    assert weight.dtype is torch.float32
    assert weight.is_contiguous(memory_format=torch.channels_last)
