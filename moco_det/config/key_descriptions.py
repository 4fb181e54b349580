"""Descriptions of groups of config keys, and of the effect of changing them.

``train_net --explain``, ``results.json`` and the report all use these sentences.
"""

from dataclasses import dataclass

from detectron2.config import CfgNode

from moco_det.config.protocols import HOUSEKEEPING, deviations, get_protocol, split_name


@dataclass(frozen=True)
class Meaning:
    """The description of a group of keys.

    Attributes:
        keys: the keys of the group; one that ends in ``*`` stands for all keys with that prefix.
            The longest match applies.
        decides: what the keys determine.
        changed: the effect of a value that differs from the protocol's.
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
        "The images for training and testing, and what is annotated in them.",
        "The data differ: results are comparable with other runs on these data, but not with "
        "published numbers.",
    ),
    Meaning(
        ("DATASETS.LABEL_SHARE", "DATASETS.LABEL_SEED"),
        "The number of training images used, sampled by class and identical in every run.",
        "The set of labels differs: fewer labels lower AP, and favour good weights over random "
        "ones.",
    ),
    Meaning(
        ("SOLVER.IMS_PER_BATCH",),
        "The number of images per step, over all processes.",
        "The batch size differs: with learning rate and length scaled accordingly, as many images "
        "are seen, and AP stays the same unless a process has fewer than two images, which give "
        "poor BN statistics.",
    ),
    Meaning(
        ("SOLVER.ACCUMULATION_STEPS",),
        "The number of forward passes per step, for a batch that does not fit into memory.",
        "The gradients are the same, except that BN sees one pass at a time.",
    ),
    Meaning(
        ("SOLVER.BASE_LR", "SOLVER.WARMUP_ITERS", "SOLVER.WARMUP_FACTOR", "SOLVER.GAMMA"),
        "The learning rate, its warm-up and its decay.",
        "The learning rate differs, not in proportion to the batch: AP changes by whole points, "
        "and by more for some kinds of weights than for others.",
    ),
    Meaning(
        ("SOLVER.MAX_ITER", "SOLVER.STEPS"),
        "The length of the run, and the iterations at which the learning rate falls.",
        "The length differs: a shorter run widens the gap between good and random weights, a "
        "longer one closes it.",
    ),
    Meaning(
        ("SOLVER.*",),
        "The optimisation of the weights.",
        "The optimiser differs: compare only with runs that share it.",
    ),
    Meaning(
        ("SOLVER.AMP.*",),
        "Half precision in the forward and backward passes.",
        "The precision differs: half precision is faster on a GPU, and AP is the same within its "
        "spread.",
    ),
    Meaning(
        (
            "MODEL.RESNETS.DEPTH",
            "MODEL.RESNETS.NUM_GROUPS",
            "MODEL.RESNETS.WIDTH_PER_GROUP",
            "MODEL.RESNETS.STEM_OUT_CHANNELS",
            "MODEL.RESNETS.RES2_OUT_CHANNELS",
        ),
        "The depth and width of the backbone, taken from the weights file.",
        "The backbone is not a ResNet-50: compare with runs of the same backbone.",
    ),
    Meaning(
        (
            "MODEL.PIXEL_MEAN",
            "MODEL.PIXEL_STD",
            "INPUT.FORMAT",
            "MODEL.RESNETS.STRIDE_IN_1X1",
        ),
        "The layout that the weights were trained in: colour order, pixel scale, position of the "
        "stride.",
        "The layout is taken from the weights file, as it must be: a wrong one lowers AP without "
        "an error.",
    ),
    Meaning(
        (
            "MODEL.RESNETS.NORM",
            "MODEL.FPN.NORM",
            "MODEL.ROI_BOX_HEAD.NORM",
            "MODEL.ROI_MASK_HEAD.NORM",
            "MODEL.SEM_SEG_HEAD.NORM",
        ),
        "The normalisation layers, and the images they are computed over.",
        "The normalisation differs: self-supervised weights depend on BN being trained, "
        "synchronised and recomputed before evaluation.",
    ),
    Meaning(
        ("TEST.PRECISE_BN.*",),
        "The recomputation of BN statistics before an evaluation, from NUM_ITER batches of "
        "training images. NUM_ITER follows the batch size, so that the number of images stays "
        "the same.",
        "The BN statistics come from a different number of images: from fewer images they are "
        "noisier, and AP with them; without any, they lag behind the weights.",
    ),
    Meaning(
        ("MODEL.BACKBONE.FREEZE_AT",),
        "The number of stages of the backbone, from the stem on, that are frozen with their BN.",
        "Frozen layers favour supervised weights, for which freezing was introduced. With few "
        "labels they save time and memory; with many they cost AP.",
    ),
    Meaning(
        ("SOLVER.STAGE_LR_FACTORS",),
        "The learning rates of the backbone's stages, relative to SOLVER.BASE_LR.",
        "The stages learn at rates of their own: low ones keep more of the initial weights, which "
        "favours weights that fit the data already. Compare with runs of the same factors.",
    ),
    Meaning(
        ("INPUT.*",),
        "The size of the images and their augmentation.",
        "The images differ: smaller ones lower AP, most of all that of small objects.",
    ),
    Meaning(
        ("MODEL.RPN.*", "MODEL.PROPOSAL_GENERATOR.*", "MODEL.ANCHOR_GENERATOR.*"),
        "The proposals: their anchors, and how many are sampled and kept.",
        "The proposals differ: fewer are faster, but lower recall.",
    ),
    Meaning(
        ("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "MODEL.ROI_HEADS.POSITIVE_FRACTION"),
        "The regions that the heads are trained on.",
        "The regions differ: fewer per image are faster, but make the gradients noisier.",
    ),
    Meaning(
        ("MODEL.*",),
        "The network.",
        "The network differs: a change of the heads alone moves the AP of all kinds of weights, so "
        "it needs its own baselines.",
    ),
    Meaning(
        ("DATALOADER.*",),
        "The sampling of the training images.",
        "Images are sampled in different proportions, which affects rare classes most.",
    ),
    Meaning(
        ("TEST.BEST_METRIC", "TEST.PATIENCE"),
        "The evaluation whose weights are kept as model_best.pth, and the number of evaluations "
        "without a better one after which the run stops.",
        "A run that stops early is shorter than the protocol's, and the best of several "
        "evaluations on the test set is optimistic: choose on validation data.",
    ),
    Meaning(
        ("SOLVER.EMA_DECAY",),
        "A moving average of the weights that is evaluated beside them.",
        "The weights and their AP stay the same. That of the average is given in addition, as "
        "bbox_ema; published numbers are without one.",
    ),
    Meaning(
        ("TEST.*",),
        "The evaluation of the model.",
        "The evaluation differs: results are not comparable with published numbers.",
    ),
    Meaning(
        tuple(sorted(HOUSEKEEPING)),
        "How and where a run is executed, not what it measures.",
        "The protocol stays the same.",
    ),
)
STARTS = {
    "moco": "self-supervised weights (a converted file)",
    "supervised": "weights trained on ImageNet's labels (Detectron's ResNet-50)",
    "random": "random weights in the same network",
}
BATCH = "SOLVER.IMS_PER_BATCH"
OTHER = Meaning(("*",), "A key of Detectron2.", "The value differs from the protocol's.")


def meaning(key: str) -> Meaning:
    """Return the group of a key: the one with the longest match."""

    def exactness(pattern: str) -> int:
        if pattern == key:
            return len(key) + 1
        return len(pattern) if pattern.endswith("*") and key.startswith(pattern[:-1]) else 0

    best = max(MEANINGS, key=lambda group: max(map(exactness, group.keys)))
    return best if max(map(exactness, best.keys)) else OTHER


def explanation(cfg: CfgNode) -> list[str]:
    """Describe a resolved config: protocol, initialisation, source, one line per kind of deviation.

    The list is empty for a config that follows no protocol.
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
        return [*said, "The run follows the protocol in every setting."]
    return [*said, *(f"{', '.join(lines)}: {group.changed}" for group, lines in groups.items())]


def _follow_the_batch(cfg: CfgNode) -> set[str]:
    """Return the keys of the schedule and PreciseBN whose values are scaled with the batch."""
    protocol = get_protocol(cfg.PROTOCOL)
    solver, reference = cfg.SOLVER, protocol.SOLVER
    ratio = solver.IMS_PER_BATCH / reference.IMS_PER_BATCH

    def scaled(new: float, old: float) -> bool:
        return bool(abs(new * ratio - old) <= max(1.0, ratio))  # iterations are whole numbers

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
    whole = 0 <= -missing < solver.IMS_PER_BATCH  # the number of batches is rounded up
    return keys | ({"TEST.PRECISE_BN.NUM_ITER"} if whole else set())


def end_sentence(text: str) -> str:
    """Append a full stop unless the text already ends a sentence."""
    return text if text.endswith((".", "!", "?")) else text + "."
