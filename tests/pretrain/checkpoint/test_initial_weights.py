"""A run starts from any project's weights: all its encoders hold them; misfits are named."""

import hashlib
import shutil

import pytest
import torch
import torchvision
from torch import nn

from moco_common.errors import UserError
from pretrain.checkpoint import format as checkpoint
from pretrain.checkpoint.initial_weights import read_initial_weights, start_from
from pretrain.engine.train_loop import train
from pretrain.methods import METHODS
from pretrain.modeling.resnet import PIXEL_MEAN, PIXEL_STD, Normalize, ResNet
from tests.moco_det.conversion.test_layouts import BODY, LAYOUTS
from tests.moco_det.convert_cases import backbone, linear, prefixed, reference_conversion, same
from tests.moco_det.convert_cases import state_dict as narrow
from tests.pretrain import tiny
from tests.pretrain.runs import TINY, assert_equal_checkpoints, run, write_photographs
from tools.pretrain import main

WIDE = "MODEL.DEPTH 50 MODEL.GROUPS 32 MODEL.WIDTH 1 MODEL.WIDTH_PER_GROUP 4,"
EIGHTH = ("MODEL.WIDTH", 0.125)  # of the cases of the converter's tests


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    return write_photographs(tmp_path_factory.mktemp("photographs"))


def saved(tmp_path, tree, name="weights.pth"):
    torch.save(tree, tmp_path / name)
    return tmp_path / name


def encoders(method):
    return [module for module in method.modules() if isinstance(module, ResNet)]


def body(encoder):
    return backbone(encoder.state_dict())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_encoders_start_from_the_encoder_of_every_layout(tmp_path, layout):
    source, role, make = LAYOUTS[layout]
    weights = read_initial_weights(saved(tmp_path, make()))
    method = tiny.build("moco", *EIGHTH)[0].float()
    lines = start_from(weights, method, take_head=False)
    assert (weights.record()["source"], weights.record()["encoder"]) == (source, role)
    assert len(encoders(method)) == 2
    assert all(same(body(encoder), BODY) for encoder in encoders(method))
    assert f"{len(BODY)} taken" in lines[1]
    assert len(weights.encoder.entries) == len(weights.encoder.originals)


@pytest.mark.parametrize("name", METHODS)
def test_every_encoder_of_every_method_starts_from_the_file_and_its_head_is_new(tmp_path, name):
    weights = read_initial_weights(saved(tmp_path, BODY))
    method = tiny.build(name, *EIGHTH)[0].float()
    before = {key: x.clone() for key, x in method.state_dict().items() if ".fc." in key}
    start_from(weights, method, take_head=False)
    assert all(same(body(encoder), BODY) for encoder in encoders(method))
    assert all(torch.equal(method.state_dict()[key], x) for key, x in before.items())


def test_features_of_a_run_with_learning_rate_0_are_those_of_torchvisions_network(
    photographs, tmp_path
):
    torch.manual_seed(5)
    theirs = torchvision.models.resnet18()
    path = saved(tmp_path, theirs.state_dict())
    words = ("MODEL.WIDTH", "1", "MODEL.WEIGHTS", str(path), "SOLVER.BASE_LR", "0")
    cfg = tiny.recipe("moco-v2", photographs, tmp_path / "run", *words)
    train(cfg, quiet=True)
    state = checkpoint.load(tmp_path / "run" / checkpoint.LAST)["state_dict"]
    theirs.fc = nn.Identity()
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    for name in ("encoder_q.", "encoder_k."):
        ours = ResNet(18)
        own = {key.removeprefix(name): x for key, x in state.items() if key.startswith(name)}
        ours.load_state_dict(backbone(own))
        with torch.no_grad():  # both by the statistics of the batch: those of the run have moved
            expected, features = theirs(Normalize()(images)), ours.forward_features(images)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_a_resumed_run_is_bit_exact_without_the_file_and_records_its_fingerprint(
    photographs, tmp_path
):
    path = saved(tmp_path, narrow(width=1 / 16))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    words = ["--data", photographs, *TINY, "MODEL.WEIGHTS", path]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    code, text = run("--output-dir", whole, *words)
    assert code == 0, text
    assert f"{path} (SHA-256 {digest[:12]}...): ResNet-18, width x0.0625, the backbone" in text
    assert "encoder_q and encoder_k start from them, with new heads; the learning rate's" in text
    assert f"{len(BODY)} taken, 2 dropped (2 classification layer (fc))" in text
    broken.mkdir()
    shutil.copy(whole / "checkpoint_00000003.pth", broken / checkpoint.LAST)
    path.unlink()
    code, text = run("--output-dir", broken, "--resume", *words)
    assert code == 0, text
    assert_equal_checkpoints(whole / checkpoint.LAST, broken / checkpoint.LAST)
    record = {"path": str(path), "sha256": digest}
    for folder in (whole, broken):
        recorded = checkpoint.load(folder / checkpoint.LAST)["weights"]
        assert recorded == record | {"source": "torchvision / timm", "encoder": "backbone"}
    code, text = run("--output-dir", tmp_path / "new", *words)
    assert code == 1
    assert "error: " in text
    assert f"{path} does not exist" in text


def test_a_start_that_was_restarted_before_its_first_checkpoint_still_reads_the_file(
    photographs, tmp_path
):
    path = saved(tmp_path, narrow(width=1 / 16))
    words = ["--data", photographs, *TINY, "SOLVER.MAX_ITER", 3, "MODEL.WEIGHTS", path]
    for folder, more in (("a", ()), ("b", ("--resume",))):
        code, text = run("--output-dir", tmp_path / folder, *more, *words)
        assert code == 0, text
    assert_equal_checkpoints(*(tmp_path / folder / checkpoint.LAST for folder in "ab"))


@pytest.mark.parametrize("method", ["moco-v2", "byol", "swav"])
def test_a_finished_run_continues_with_all_it_has_learned(photographs, tmp_path, method):
    train(tiny.recipe(method, photographs, tmp_path / "first"), quiet=True)
    last = tmp_path / "first" / checkpoint.LAST
    words = ("MODEL.WEIGHTS", str(last), "MODEL.TAKE_HEAD", "True", "SOLVER.BASE_LR", "0")
    cfg = tiny.recipe(method, photographs, tmp_path / "second", *words)
    train(cfg, quiet=True)
    before, after = (
        checkpoint.load(tmp_path / run / checkpoint.LAST)["state_dict"]
        for run in ("first", "second")
    )
    learned = [
        name
        for name in before
        if name.startswith(("encoder_q.", "predictor.", "prototypes."))
        and not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    ]
    assert any(name.startswith("encoder_q.fc.") for name in learned)
    for name in learned:
        if name.startswith("prototypes."):  # SwAV normalises them before each step
            expected = nn.functional.normalize(before[name], dim=1)
            torch.testing.assert_close(after[name], expected, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(after[name], before[name]), name
    if "queue" in before and before["queue"].numel():
        assert not torch.equal(before["queue"], after["queue"])


def test_a_head_is_taken_where_it_fits_and_else_the_difference_is_named(tmp_path):
    head = linear("fc.0", 64, 64) | linear("fc.2", 8, 64)
    state = prefixed("module.encoder_q.", BODY | head)
    state |= prefixed("module.encoder_k.", BODY | linear("fc.0", 64, 64) | linear("fc.2", 8, 64))
    weights = read_initial_weights(saved(tmp_path, {"state_dict": state, "arch": "resnet18"}))
    method = tiny.build("moco", *EIGHTH, "MOCO.MLP", True)[0].float()
    lines = start_from(weights, method, take_head=True)
    for encoder in encoders(method):  # both from the query encoder
        assert same(prefixed("fc.", encoder.fc.state_dict()), head)
    assert f"{len(BODY) + 4} taken" in lines[1]
    assert "encoder_q.fc and encoder_k.fc included" in lines[2]
    other = tiny.build("moco", *EIGHTH)[0].float()
    with pytest.raises(UserError, match=r"weight is missing in the file and \(8, 64\) in this"):
        start_from(weights, other, take_head=True)
    classes = read_initial_weights(saved(tmp_path, narrow()))
    with pytest.raises(UserError, match=r"weight is \(10, 64\) in the file and \(8, 64\) in this"):
        start_from(classes, other, take_head=True)


def test_another_architecture_is_refused_with_the_keys_to_set(tmp_path):
    for name, width, keys in (
        ("resnet34", 0.125, "MODEL.DEPTH 34,"),
        ("resnet18", 0.25, "MODEL.WIDTH 0.25,"),
        (
            "resnext50_32x4d",
            1,
            WIDE,
        ),
    ):
        weights = read_initial_weights(saved(tmp_path, narrow(name, width)))
        method = tiny.build("moco", *EIGHTH)[0].float()
        with pytest.raises(UserError, match=f"this run trains a ResNet-18.*: set {keys}"):
            start_from(weights, method, take_head=False)
        words = keys.rstrip(",").split()
        pairs = zip(words[::2], words[1::2], strict=True)
        values = {key: float(text) if key[6:] == "WIDTH" else int(text) for key, text in pairs}
        values = {"MODEL.DEPTH": 18, "MODEL.WIDTH": 0.125} | values
        fitting = tiny.build("moco", *(word for pair in values.items() for word in pair))[0].float()
        start_from(weights, fitting, take_head=False)


def converted(**stated):
    """What the converter writes for Detectron2, of a narrow ResNet-50 with these settings."""
    metadata = {"pixel_mean": list(PIXEL_MEAN), "pixel_std": list(PIXEL_STD), "format": "RGB"}
    metadata |= {"stride_in_1x1": False, "source_sha256": "0" * 64} | stated
    model = reference_conversion(backbone(narrow("resnet50")))
    return {"model": model, "__author__": "x", "metadata": metadata}


def test_msras_strides_and_other_pixel_means_are_refused(tmp_path):
    with pytest.raises(UserError, match="strides in its first 1x1 convolutions"):
        read_initial_weights(saved(tmp_path, converted(stride_in_1x1=True)))
    with pytest.raises(UserError, match=r"pixels with the RGB mean \[0\.0, 0\.0, 0\.0\]"):
        read_initial_weights(saved(tmp_path, converted(pixel_mean=[0.0, 0.0, 0.0])))
    caffe2 = {"res2_0_branch2a_w": torch.ones(1), "conv1_w": torch.ones(1)}
    with pytest.raises(UserError, match=r"^MODEL\.WEIGHTS: .*scheme, of MSRA's networks"):
        read_initial_weights(saved(tmp_path, caffe2))
    config = f"MODEL:\n  PIXEL_MEAN: {list(PIXEL_MEAN)}\n  PIXEL_STD: {list(PIXEL_STD)}\n"
    config += "  RESNETS:\n    STRIDE_IN_1X1: true\nINPUT:\n  FORMAT: RGB\n"
    (tmp_path / "config.yaml").write_text(config)
    detector = {"model": prefixed("backbone.", reference_conversion(backbone(narrow("resnet50"))))}
    with pytest.raises(UserError, match="strides in its first 1x1 convolutions"):
        read_initial_weights(saved(tmp_path, detector))


def test_a_network_for_bgr_pixels_computes_the_same_on_rgb_ones(tmp_path):
    settings = {"format": "BGR", "pixel_mean": list(PIXEL_MEAN[::-1]), "pixel_std": [1.0, 2.0, 3.0]}
    weights = read_initial_weights(saved(tmp_path, converted(**settings)))
    ours, theirs = ResNet(50, width=0.125), ResNet(50, width=0.125)
    ours.load_state_dict(weights.tensors)
    theirs.load_state_dict(backbone(narrow("resnet50")))
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    bgr = images.flip(1).float() - torch.tensor(PIXEL_MEAN[::-1]).view(1, 3, 1, 1)
    bgr /= torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    with torch.no_grad():
        expected, features = theirs.forward_features(bgr), ours.forward_features(images)
    torch.testing.assert_close(features, expected, rtol=2e-3, atol=1e-3)
    assert any(
        "BGR images and the pixel deviation [3.0, 2.0, 1.0]" in note for note in weights.notes
    )


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (
            {"a": torch.ones(3)},
            r"^MODEL\.WEIGHTS: .*no ResNet found among .* Or convert the file first",
        ),
        (
            BODY | {"layer1.0.extra": torch.ones(3)},
            "extra, neither .* Or convert the file",
        ),
        (BODY | {"conv1.weight": BODY["conv1.weight"] * float("nan")}, "conv1.weight that are not"),
        ({k: x for k, x in BODY.items() if k != "bn1.bias"}, r"requires bn1\.bias .* Or convert"),
    ],
)
def test_a_file_that_cannot_be_taken_whole_is_refused(tmp_path, tree, message):
    with pytest.raises(UserError, match=message):
        read_initial_weights(saved(tmp_path, tree))


def test_explain_names_file_fingerprint_tensors_and_what_does_not_fit(tmp_path, capsys):
    path = saved(tmp_path, BODY)
    words = ["--config", "continue", "--explain", "MODEL.WEIGHTS", str(path), "MODEL.DEPTH", "18"]
    assert main([*words, "MODEL.WIDTH", "0.125"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Reed et al. 2022" in told
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"starts from {path} (SHA-256 {digest[:12]}...): ResNet-18" in told
    assert f"{len(BODY)} read, {len(BODY)} taken, 0 dropped. The head is new." in told
    assert main(words) == 1
    assert "set MODEL.WIDTH 0.125" in capsys.readouterr().err


def test_the_recipe_that_continues_asks_for_the_file(photographs, tmp_path, capsys):
    assert main(["--config", "continue", "--data", str(photographs)]) == 1
    assert "continue starts from weights: add MODEL.WEIGHTS FILE" in capsys.readouterr().err
