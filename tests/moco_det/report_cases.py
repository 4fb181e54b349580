"""Made-up run directories for the tests of the report, with predictions where asked for."""

import json
from pathlib import Path

import cv2
import numpy as np
import yaml

CLASSES = ("cat", "<b>dog|")
SIDE = 120


def write_run(path, ap=40.0, seed=0, weights="moco.pkl", config=None, steps=30, **results):
    """A fine-tuning run directory; `results` replaces entries of results.json."""
    path.mkdir(parents=True)
    tree = {"SEED": seed, "OUTPUT_DIR": str(path), "MODEL": {"WEIGHTS": weights}}
    tree["SOLVER"] = {"MAX_ITER": 20 * steps, **(config or {})}
    (path / "config.yaml").write_text(yaml.safe_dump(tree))
    lines = [
        {"iteration": 20 * i + 19, "total_loss": 3 / (i + 1), "loss_cls": 1 / (i + 1), "lr": 0.02}
        for i in range(steps)
    ]
    (path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {
        "protocol": "VOC",
        "init": "moco" if weights else "random",
        "dataset": "voc_2007_test",
        "seed": seed,
        "commit": "abc",
        "iteration": 20 * steps,
        "weights": weights,
        "deviations": [],
        "bbox": {
            "AP": ap, "AP50": ap + 20, "AP75": ap - 2, "APs": None, "APl": ap + 5,
            "per_class": {"cat": ap + 1, "<b>dog|": ap - 1},
        },
    }  # fmt: skip
    (path / "results.json").write_text(json.dumps(record | results))
    return path


def write_pretraining(path, queue=1024, steps=200):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(yaml.safe_dump({"SEED": 0, "MOCO": {"QUEUE_SIZE": queue}}))
    lines = [{"iteration": i, "loss": 7 - i / 100, "accuracy": i / 400} for i in range(steps)]
    (path / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def two_groups(root, predictions=False):
    """Three runs each of two groups; with predictions they are on own data beside them."""
    more = {"dataset": write_coco(root.parent / "data")} if predictions else {}
    for seed in range(3):
        write_run(root / f"moco-seed{seed}", 55 + 0.3 * seed, seed, **more)
        write_run(root / f"random-seed{seed}", 33 + 0.5 * seed, seed, weights="", **more)
        if predictions:
            write_predictions(root / f"moco-seed{seed}", more["dataset"], 0.9, seed)
            write_predictions(root / f"random-seed{seed}", more["dataset"], 0.4, seed)
    return sorted(root.iterdir())


def write_coco(folder, images=8, seed=0):
    """Own data with sparse ids, a crowd, and an image without objects. Returns its spec."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    content = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 9, "name": CLASSES[1]}, {"id": 4, "name": CLASSES[0]}],
    }
    for number in range(images):
        pixels = rng.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8)
        for _ in range(number % 4):
            x, y = rng.integers(0, 60, 2).tolist()
            w, h = rng.integers(15, 60, 2).tolist()
            pixels[y : y + h, x : x + w] += np.uint8(90)
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": 10 + number,
                    "category_id": int(rng.choice([4, 9])),
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(len(content["annotations"]) == 3),
                }
            )
        cv2.imwrite(str(folder / "images" / f"{number}.jpg"), pixels)
        entry = {"id": 10 + number, "file_name": f"{number}.jpg", "width": SIDE, "height": SIDE}
        content["images"].append(entry)
    (folder / "own.json").write_text(json.dumps(content))
    return f"coco:{folder / 'own.json'}:{folder / 'images'}"


def write_predictions(run, spec, skill, seed=0):
    """Finds a share of the objects, names some of them wrongly, and sees some that are not."""
    rng = np.random.default_rng(seed)
    content = json.loads(Path(spec.split(":")[1]).read_text())
    results = []
    for item in content["annotations"]:
        if rng.random() < skill:
            box = (np.array(item["bbox"]) + rng.normal(0, 3, 4)).tolist()
            label = item["category_id"] if rng.random() < skill else 13 - item["category_id"]
            found = {"image_id": item["image_id"], "category_id": label, "bbox": box}
            results.append({**found, "score": float(0.3 + 0.7 * rng.random())})
    for image in content["images"]:
        box = [*rng.uniform(0, 60, 2), *rng.uniform(10, 50, 2)]
        found = {"image_id": image["id"], "category_id": int(rng.choice([4, 9])), "bbox": box}
        results.append({**found, "score": float(0.6 * rng.random())})
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(results))
    return results
