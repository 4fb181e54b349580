"""What the keys of a config decide, and what it costs to change them: one sentence a group.

The same sentences stand in ``train_net --explain``, in ``results.json`` and in the report.
"""

from dataclasses import dataclass

from detectron2.config import CfgNode

from moco_det.config.protocols import HOUSEKEEPING, deviations, get_protocol, split_name


@dataclass(frozen=True)
class Meaning:
    """What a group of keys decides, and what it means that a run has changed one of them.

    A key that ends in ``*`` stands for all that begin like it; the longest match counts.
    """

    keys: tuple[str, ...]
    decides: str
    changed: str


MEANINGS = (
    Meaning(
        (
            "DATASETS.TRAIN",
            "DATASETS.TEST",
            "MODEL.ROI_HEADS.NUM_CLASSES",
            "MODEL.SEM_SEG_HEAD.NUM_CLASSES",
            "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
            "INPUT.MASK_FORMAT",
            "TEST.KEYPOINT_OKS_SIGMAS",
        ),
        "Which images are trained and tested on, and what is annotated in them.",
        "Other data: comparable with other runs on these data, with no published number.",
    ),
    Meaning(
        ("DATASETS.LABEL_SHARE", "DATASETS.LABEL_SEED"),
        "How many of the training images are used, drawn by class and the same in every run.",
        "Another set of labels: fewer labels cost AP, and favour good weights over random ones.",
    ),
    Meaning(
        ("SOLVER.IMS_PER_BATCH",),
        "Images in one step, over all processes.",
        "Another batch: with learning rate and length scaled along, as many images are seen, and "
        "AP stays unless a process has fewer than two images, of which BN makes poor statistics.",
    ),
    Meaning(
        ("SOLVER.ACCUMULATION_STEPS",),
        "How many forward passes a step is made of, where the batch does not fit at once.",
        "The same gradients up to BN, which sees one pass at a time.",
    ),
    Meaning(
        ("SOLVER.BASE_LR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.GAMMA"),
        "The learning rate and how it begins and falls.",
        "Another learning rate, which does not follow the batch: AP moves by points, and by more "
        "for one kind of weights than for another.",
    ),
    Meaning(
        ("SOLVER.MAX_ITER", "SOLVER.STEPS"),
        "How long the run is, and when the learning rate falls.",
        "Another length: a shorter run leaves a larger gap between good and random weights, a "
        "longer one closes it.",
    ),
    Meaning(
        ("SOLVER.*",),
        "How the weights are optimised.",
        "Another optimiser: only runs that share it can be compared.",
    ),
    Meaning(
        ("SOLVER.AMP.*",),
        "Half precision in forward and backward.",
        "Faster on a GPU, the same AP within its spread.",
    ),
    Meaning(
        (
            "MODEL.RESNETS.DEPTH",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
        ),
        "The backbone's depth and width, taken from the weights file.",
        "Another backbone than ResNet-50: compare it with runs of the same backbone.",
    ),
    Meaning(
        (
            "MODEL.PIXEL_MEAN",
            "MODEL.PIXEL_STD",
            "INPUT.FORMAT",
            "MODEL.RESNETS.STRIDE_IN_1X1",
        ),
        "The layout that the weights were trained in: colour order, pixel scale, where the stride "
        "is.",
        "Taken from the weights file, as it must be: wrong statistics cost AP without an error.",
    ),
    Meaning(
        (
            "MODEL.RESNETS.NORM",
            "MODEL.FPN.NORM",
            "MODEL.ROI_BOX_HEAD.NORM",
            "MODEL.ROI_MASK_HEAD.NORM",
            "MODEL.SEM_SEG_HEAD.NORM",
        ),
        "Which layers are normalised, over which images.",
        "Another normalisation: self-supervised weights depend on BN being tuned, synchronised "
        "and recomputed before evaluation.",
    ),
    Meaning(
        ("TEST.PRECISE_BN.*",),
        "Over how many training images BN's statistics are taken anew before an evaluation: "
        "NUM_ITER batches. With another batch NUM_ITER follows, so that the images stay as many.",
        "Other images under BN's statistics: of fewer the statistics are noisier, and AP with "
        "them; without any they lag behind the weights.",
    ),
    Meaning(
        ("MODEL.BACKBONE.FREEZE_AT",),
        "How much of the backbone is frozen.",
        "Frozen layers favour supervised weights, for which freezing was found.",
    ),
    Meaning(
        ("INPUT.*",),
        "The size of the images and their augmentation.",
        "Other images: smaller ones cost AP, of small objects most.",
    ),
    Meaning(
        ("MODEL.RPN.*", "MODEL.PROPOSAL_GENERATOR.*", "MODEL.ANCHOR_GENERATOR.*"),
        "The proposals: anchors, how many are sampled and kept.",
        "Other proposals: fewer are faster and cost recall.",
    ),
    Meaning(
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.POSITIVE_FRACTION"),
        "Which regions the heads are trained on.",
        "Fewer regions an image: faster, and noisier gradients.",
    ),
    Meaning(
        ("MODEL.*",),
        "The network.",
        "Another network: its heads alone move the AP of every kind of weights, so it needs its "
        "own baselines.",
    ),
    Meaning(
        ("DATALOADER.*",),
        "Which images come how often.",
        "Images come in other proportions; rare classes feel it most.",
    ),
    Meaning(
        ("TEST.*",),
        "How the model is evaluated.",
        "Another evaluation of the same model: not comparable with published numbers.",
    ),
    Meaning(
        tuple(sorted(HOUSEKEEPING)),
        "How and where a run is done, not what is measured.",
        "Nothing of the protocol.",
    ),
)
STARTS = {
    "moco": "self-supervised weights, from a converted file",
    "supervised": "weights trained on ImageNet's labels (Detectron's ResNet-50)",
    "random": "random weights, in the same network",
}
BATCH = "SOLVER.IMS_PER_BATCH"
OTHER = Meaning(("*",), "A key of Detectron2.", "It is not as the protocol has it.")


def meaning(key: str) -> Meaning:
    """The group that a key belongs to: the one that names it most exactly."""

    def exactness(pattern: str) -> int:
        if pattern == key:
            return len(key) + 1
        return len(pattern) if pattern.endswith("*") and key.startswith(pattern[:-1]) else 0

    best = max(MEANINGS, key=lambda group: max(map(exactness, group.keys)))
    return best if max(map(exactness, best.keys)) else OTHER


def explanation(cfg: CfgNode) -> list[str]:
    """A resolved run in sentences: protocol, start, source, then one for each kind of deviation.

    Without a protocol there is nothing to explain: an empty list.
    """
    if not cfg.PROTOCOL:
        return []
    name, start = split_name(cfg.PROTOCOL)
    said = [
        f"Protocol {name}, from {STARTS[start]}.",
        f"Source: {end_sentence(cfg.SOURCE or 'not stated')}",
    ]
    groups: dict[Meaning, list[str]] = {}
    followers = _follow_the_batch(cfg)
    for line in deviations(cfg):
        key = line.split(" ", 1)[0]
        groups.setdefault(meaning(BATCH if key in followers else key), []).append(line)
    if not groups:
        return [*said, "It follows the protocol in everything."]
    return [*said, *(f"{', '.join(lines)}: {group.changed}" for group, lines in groups.items())]


def _follow_the_batch(cfg: CfgNode) -> set[str]:
    """The keys of schedule and PreciseBN, where they are the protocol's scaled with the batch."""
    protocol = get_protocol(cfg.PROTOCOL)
    solver, reference = cfg.SOLVER, protocol.SOLVER
    ratio = solver.IMS_PER_BATCH / reference.IMS_PER_BATCH

    def scaled(new: float, old: float) -> bool:
        return bool(abs(new * ratio - old) <= max(1.0, ratio))  # iterations are whole

    fits = (
        abs(solver.BASE_LR - reference.BASE_LR * ratio) <= 1e-6 * reference.BASE_LR
        and len(solver.STEPS) == len(reference.STEPS)
        and all(
            map(scaled, (solver.MAX_ITER, *solver.STEPS), (reference.MAX_ITER, *reference.STEPS))
        )
    )
    keys = {f"SOLVER.{key}" for key in ("BASE_LR", "MAX_ITER", "STEPS", "WARMUP_ITERS") if fits}
    images = cfg.TEST.PRECISE_BN.NUM_ITER * solver.IMS_PER_BATCH
    missing = protocol.TEST.PRECISE_BN.NUM_ITER * reference.IMS_PER_BATCH - images
    whole = 0 <= -missing < solver.IMS_PER_BATCH  # batches, rounded up
    return keys | ({"TEST.PRECISE_BN.NUM_ITER"} if whole else set())


def end_sentence(text: str) -> str:
    """The text with a full stop, unless it ends a sentence already."""
    return text if text.endswith((".", "!", "?")) else text + "."
