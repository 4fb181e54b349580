"""The published recipes, and what a mistake in a configuration says."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from moco_common.errors import UserError
from pretrain.config.defaults import get_defaults, load_config, recipe_names, split_specs
from pretrain.methods.automatic import resolve
from pretrain.solver.schedules import learning_rate, total_steps, warmup_steps

ROOT = Path(__file__).parents[3]
SHARED = {
    "MODEL.DEPTH": 50,
    "MOCO.DIM": 128,
    "MOCO.QUEUE_SIZE": 65536,
    "MOCO.MOMENTUM": 0.999,
    "SOLVER.BATCH_SIZE": 256,
    "SOLVER.BASE_LR": 0.03,
    "SOLVER.MOMENTUM": 0.9,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.EPOCHS": 200,
    "INPUT.CROP_SIZE": 224,
    "INPUT.MIN_SCALE": 0.2,
}
V1 = {
    "MOCO.TEMPERATURE": 0.07,
    "MOCO.MLP": False,
    "SOLVER.SCHEDULE": "step",
    "SOLVER.MILESTONES": [0.6, 0.8],
    "INPUT.AUGMENTATION": "moco-v1",
}
V2 = {
    "MOCO.TEMPERATURE": 0.2,
    "MOCO.MLP": True,
    "MOCO.MLP_BN": False,
    "SOLVER.SCHEDULE": "cosine",
    "INPUT.AUGMENTATION": "moco-v2",
}
V2_800 = {**V2, "SOLVER.EPOCHS": 800}
INSTAGRAM = {
    **V1,
    "SOLVER.BATCH_SIZE": 1024,
    "SOLVER.BASE_LR": 0.12,
    "SOLVER.EPOCHS": 0,
    "SOLVER.MAX_ITER": 1_250_000,
    "SOLVER.SCHEDULE": "exponential",
    "SOLVER.GAMMA": 0.9,
    "SOLVER.DECAY_PERIOD": 62_500,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [("moco-v1", V1), ("moco-v2", V2), ("moco-v2-800ep", V2_800), ("instagram-1b", INSTAGRAM)],
)
def test_recipes_are_the_papers(name, own):
    cfg = resolve(load_config(name), images=1_281_167)
    for key, expected in {**SHARED, **own}.items():
        node = cfg
        for part in key.split("."):
            node = node[part]
        assert node == expected, key


@pytest.mark.parametrize(
    ("name", "images", "iterations", "rates"),
    [
        # 200 and 800 epochs of ImageNet-1M; v1 falls at epochs 120 and 160.
        ("moco-v1", 1_281_167, 1_000_912, {0: 0.03, 600_548: 0.003, 800_730: 0.0003}),
        ("moco-v2", 1_281_167, 1_000_912, {0: 0.03, 500_456: 0.015}),
        ("moco-v2-800ep", 1_281_167, 4_003_647, {0: 0.03, 2_001_824: 0.015}),
        # "1.25M iterations (~1.4 epochs of IG-1B)", He et al. 2020, Section 4.
        ("instagram-1b", 940_000_000, 1_250_000, {62_499: 0.12, 62_500: 0.108, 125_000: 0.0972}),
    ],
)
def test_the_papers_runs_have_their_length_and_learning_rates(name, images, iterations, rates):
    solver = load_config(name).SOLVER
    total = total_steps(
        images, batch_size=solver.BATCH_SIZE, epochs=solver.EPOCHS, max_iter=solver.MAX_ITER
    )
    assert total == iterations
    for step, expected in rates.items():
        rate = learning_rate(
            step,
            total,
            base=solver.BASE_LR,
            schedule=solver.SCHEDULE,
            milestones=solver.MILESTONES,
            gamma=solver.GAMMA,
            decay_period=solver.DECAY_PERIOD,
        )
        assert rate == pytest.approx(expected, rel=1e-5)


def test_every_recipe_loads_and_a_resolved_config_loads_to_itself(tmp_path):
    assert {"moco-v1", "moco-v2"} <= set(recipe_names())
    for name in recipe_names():
        cfg = load_config(name, ["SOLVER.BATCH_SIZE", "64"])
        file = tmp_path / f"{name}.yaml"
        file.write_text(cfg.dump())
        assert load_config(str(file)) == cfg


def test_a_command_line_is_checked_without_importing_torch():
    code = (
        "import sys\nfrom pretrain.config.defaults import load_config\n"
        "load_config('swav', ['SWAV.PROTOTYPES', '9'])\nsys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_default_can_be_changed_through_a_configuration():
    load_config("moco-v1").SOLVER.MILESTONES.append(0.9)
    assert load_config("moco-v1").SOLVER.MILESTONES == [0.6, 0.8]
    get_defaults().DATA.append("x")
    assert get_defaults().DATA == []


def test_learning_rate_follows_the_batch_unless_it_is_given():
    assert load_config("moco-v1", ["SOLVER.BATCH_SIZE", "128"]).SOLVER.BASE_LR == 0.015
    given = ["SOLVER.BATCH_SIZE", "128", "SOLVER.BASE_LR", "0.06"]
    assert load_config("moco-v1", given).SOLVER.BASE_LR == 0.06


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["SOLVER.BATHC_SIZE", "64"], r"did you mean SOLVER\.BATCH_SIZE"),
        (["SOLVER", "64"], "which is not a key"),
        (["SOLVER.BATCH_SIZE", "many"], "takes a whole number such as 256"),
        (["MOCO.MLP", "1"], "takes True or False[.]"),
        (["SEED"], "has no partner"),
    ],
)
def test_a_wrong_override_names_key_and_mend(overrides, message):
    with pytest.raises(UserError, match=message):
        load_config("moco-v1", overrides)


def test_an_unknown_recipe_proposes_the_nearest():
    with pytest.raises(UserError, match="did you mean moco-v2"):
        load_config("moco_v2")


def test_yaml_with_python_tags_is_refused_and_nothing_runs(tmp_path):
    trap = tmp_path / "trap.yaml"
    proof = tmp_path / "executed"
    trap.write_text(f"SEED: !!python/object/apply:os.mkdir ['{proof}']\n")
    with pytest.raises(UserError, match="not plain YAML"):
        load_config(str(trap))
    assert not proof.exists()


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("SOLVER:\n  WEIGHT_DECAY: 1e-5\n  BASE_LR: 1\n")
    assert yaml.safe_load(file.read_text())["SOLVER"]["WEIGHT_DECAY"] == "1e-5"
    cfg = load_config(str(file))
    assert (cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.BASE_LR) == (1e-5, 1.0)


def test_overrides_may_follow_the_data_specs(tmp_path):
    folder = tmp_path / "SOLVER.EPOCHS"  # a folder of that name is a folder
    folder.mkdir()
    values = ["photos", str(folder), "SOLVER.EPOCHS", "2", "SEED", "1"]
    assert split_specs(values) == (values[:2], values[2:])
    assert split_specs(["photos", "MOCO.NONSENSE", "1"])[1] == ["MOCO.NONSENSE", "1"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("METHOD: moco\nSOLVER:\n  BATHC_SIZE: 4\n", r"line 3, sets SOLVER\.BATHC_SIZE"),
        ("SOLVER:\n\n  EPOCHS: many\n", r"line 3, sets SOLVER\.EPOCHS to 'many': it takes a whole"),
        (
            "SEED: 1\nSOLVER: {EPOCHS: 1}\nSEED: 2\n",
            r"line 3, states SEED again \(first in line 1\)",
        ),
        ("SEED: 1\nMODEL: [1, 2\n", r"is not plain YAML .*: line 3: "),
        ("- SEED\n", "must hold KEY: VALUE pairs, not a list"),
        ("# nothing\n", "contains no keys"),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_line(tmp_path, text, message):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_config(str(file))


def test_a_warm_up_is_told_in_epochs_or_in_iterations():
    images = 1_281_167
    for name in ("simclr", "byol", "swav"):  # 10 epochs of ImageNet at batch 4,096, in each paper
        solver = load_config(name).SOLVER
        told = {"iterations": solver.WARMUP_ITERS, "epochs": solver.WARMUP_EPOCHS}
        assert warmup_steps(images, batch_size=solver.BATCH_SIZE, **told) == 3128
    assert load_config("swav", ["SOLVER.WARMUP_ITERS", "20"]).SOLVER.WARMUP_EPOCHS == 0
    assert load_config("small-data", ["SOLVER.WARMUP_EPOCHS", "2"]).SOLVER.WARMUP_ITERS == 0
    both = ["SOLVER.WARMUP_EPOCHS", "2", "SOLVER.WARMUP_ITERS", "20"]
    solver = load_config("small-data", both).SOLVER
    with pytest.raises(UserError, match="WARMUP_ITERS is 20 and SOLVER.WARMUP_EPOCHS 2: set one"):
        warmup_steps(
            images, batch_size=64, iterations=solver.WARMUP_ITERS, epochs=solver.WARMUP_EPOCHS
        )
