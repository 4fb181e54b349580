"""Tables: checkpoint layouts by project, reasons to drop tensors, and networks to refuse.

A file is first flattened: nested keys are joined by dots, and components inserted by wrappers
(``module`` by DistributedDataParallel, ``_orig_mod`` by torch.compile) are removed. Each prefix of
a ResNet's blocks is then looked up in :data:`SOURCES`, which is ordered from the most specific
layout to the most general one. To add a project, add an entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moco_common.backbone.architecture import from_detectron2, from_sequential, from_torchvision


@dataclass(frozen=True)
class Source:
    """The checkpoint layout of a project.

    Attributes:
        name: name of the project.
        encoders: role -> regular expression of the encoder's whole prefix, without containers such
            as "state_dict." and "model."; the first role is the default.
        marks: regular expressions, each of which must match in the name of a tensor or in a
            top-level string of the file, written "key=value".
        naming: the only naming scheme of the layout ("torchvision", "sequential" or "detectron2"),
            or "" for any.
        head: description of ``fc`` next to the backbone.
    """

    name: str
    encoders: Mapping[str, str]
    marks: tuple[str, ...] = ()
    naming: str = ""
    head: str = "projection head"


@dataclass(frozen=True)
class Naming:
    """A naming scheme of ResNet tensors, identified by a tensor called ``probe``."""

    probe: str
    canonical: Callable[[str], str | None]


NAMINGS = {
    "torchvision": Naming("layer1.0.conv1.weight", from_torchvision),
    "sequential": Naming("4.0.conv1.weight", from_sequential),
    "detectron2": Naming("res2.0.conv1.weight", from_detectron2),
}
_BYOL = (
    r"{0}_encoder\.(net\.|encoder\.)?|{0}_net(work)?(_state_dict)?\.(encoder\.|0\.)?"
    r"|{0}\.((encoder|net|backbone)\.)?"
)
SOURCES = (
    Source(
        "moco-det",
        {
            "query": r"(encoder_q|encoder|online|backbone)\.(encoder\.|backbone\.)?",
            "key": r"(encoder_k|momentum_encoder|target)\.(encoder\.|backbone\.)?",
        },
        marks=(r"^format=moco-det/",),
    ),
    Source("MoCo v3", {"base": r"base_encoder\.", "momentum": r"momentum_encoder\."}),
    Source("MoCo", {"query": r"encoder_q\.", "key": r"encoder_k\."}),
    Source(
        "DINO",
        {"teacher": r"teacher\.(backbone\.)?", "student": r"student\.(backbone\.)?"},
    ),
    Source("VISSL", {"trunk": r"([\w.]*\.)?_feature_blocks\."}),
    Source(
        "PixPro",
        {"query": r"encoder\.", "key": r"encoder_k\."},
        marks=(r"(^|\.)projector_k\.|value_transform",),
    ),
    Source("SimSiam", {"encoder": r"encoder\."}, marks=(r"(^|\.)predictor\.", r"encoder\.fc\.")),
    Source(
        "BYOL",
        {
            "online": _BYOL.format("online"),
            "target": _BYOL.format("target"),
        },
    ),
    Source(
        "Barlow Twins", {"backbone": r"backbone\."}, marks=(r"(^|\.)bn\.running_mean$", "projector")
    ),
    Source("VICReg", {"backbone": r"backbone\."}, marks=(r"^model\.projector\.",)),
    Source(
        "lightly",
        {"online": r"backbone\.", "momentum": r"(backbone_momentum|momentum_backbone)\."},
        naming="sequential",
    ),
    Source(
        "lightly",
        {  # in its benchmarks, "backbone" is the moving average of a query or student
            "backbone": r"backbone\.",
            "momentum": r"(backbone_momentum|momentum_backbone|teacher_backbone|key_backbone)\.",
            "query": r"query_backbone\.",
            "student": r"student_backbone\.",
        },
        marks=(r"(^|\.)(\w+_)?(projection|prediction)_head\w*\.layers\.",),
    ),
    Source(
        "solo-learn",
        {"online": r"(backbone|encoder)\.", "momentum": r"momentum_(backbone|encoder)\."},
        marks=(
            r"(^|\.)(momentum_)?classifier\.",
            r"(^|\.)(momentum_)?(projector|predictor|prototypes|head)\.",
        ),
    ),
    Source(
        "DenseCL / DetCo / mmselfsup",
        {
            "backbone": r"backbone\.|encoder_q\.0\.|online_net\.0\.",
            "key": r"encoder_k\.0\.|target_net\.0\.",
        },
        marks=(r"(^|\.)(neck|queue2|encoder_[qk]|online_net|target_net)(\.|$)",),
    ),
    Source("SwAV", {"backbone": ""}, marks=(r"(^|\.)(prototypes|projection_head)\.",)),
    Source(
        "Detectron2", {"backbone": r"(backbone\.(bottom_up\.)?)?"}, naming="detectron2"
    ),
    Source("torchvision / timm", {"backbone": ""}, head="classification layer (fc)"),
    Source("Lightning", {"backbone": r".+"}, marks=(r"^pytorch-lightning_version=",)),
    Source("unnamed project", {"backbone": r".+"}),
)  # fmt: skip
# Reasons to drop a tensor outside the encoder; the first pattern that matches its name applies.
REASONS = (
    (r"(^|\.)(\w*optim\w*|opt|momentum_buffer|exp_avg\w*|larc?s?)(\.|$)", "optimiser"),
    (r"(^|\.)(proposal_generator|roi_heads|sem_seg_head|mask_head|keypoint_head)\.",
     "detection head"),
    (r"(^|\.)(fpn_\w+|top_block|anchor_generator)\.", "feature pyramid"),
    (r"(^|\.)(\w*rng\w*|generator)(\.|$)", "random state"),
    (r"(^|\.)ranks\.", "state of the ranks"),
    (r"(^|\.)(\w*scaler|amp\w*|\w*scheduler\w*|trainer|meters|loops|callbacks|hooks|hyper_parameters"
     r"|metrics?|\w*logger)(\.|$)", "training state"),
    (r"(^|\.)(acc\d*|auc|\w*(accuracy|_acc\d*|metric|auroc|f1|precision|recall|jaccard)\w*)(\.|$)"
     r"|(^|\.)([tf][pn]|confmat|correct|total)$", "training state"),
    (r"(^|\.)(queue\w*|memory(_bank)?|feature_bank|bank)(\.|$)", "queue"),
    (r"prototypes", "prototypes"),
    (r"(^|\.)(\w*momentum\w*|\w*_ema|ema\w*|\w*target\w*|\w*teacher\w*|\w+_k|encoder_k|key_\w+)\.",
     "momentum encoder"),
    (r"predictor|prediction_head|(^|\.)pred\.", "prediction head"),
    (r"project|(^|\.)(neck|mlp\d*|value_transform)(\.|$)", "projection head"),
    (r"(^|\.)(data_preprocessor\.\w+|pixel_mean|pixel_std|mean|std)$", "pixel statistics"),
    (r"(^|\.)(\w*classifier\w*|linear\w*|cls_head|logits|online_eval\w*|lin)\.",
     "classification layer (fc)"),
    (r"(^|\.)(\w*head\w*|fc\w*)\.", "head"),
    (r"(^|\.)(\w*loss\w*|\w*criterion\w*|center)(\.|$)", "loss"),
    (r"(^|\.)bn\.(running_mean|running_var|num_batches_tracked|weight|bias)$", "projection head"),
)  # fmt: skip
# Other networks, identified by a name that no ResNet has.
OTHER_NETWORKS = (
    (r"relative_position_bias_table", "a Swin Transformer"),
    (r"(^|\.)(cls_token|class_token|patch_embed|pos_embed)(\.|$)|encoder_layer_0\.",
     "a Vision Transformer (ViT)"),
    (r"block1-0\.|(^|\.)s1\.b1\.conv1|trunk_output", "a RegNet"),
    (r"dwconv|layer_scale|(^|\.)stages\.0\.(blocks\.)?0\.gamma|stages\.0\.blocks\.0\.conv_dw",
     "a ConvNeXt"),
    (r"denseblock1", "a DenseNet"),
    (r"conv_stem|_conv_stem|\.conv_pwl?\.|features\.1\.(conv\.0|0\.block)\.", "a mobile network "
     "(EfficientNet or MobileNet)"),
    (r"stages\.0\.blocks\.0\.norm1|(^|\.)block1\.unit01", "a pre-activation ResNet (V2, BiT)"),
    (r"Mixed_5b", "an Inception network"),
    (r"(^|\.)features\.0\.(weight|0\.weight)", "a VGG, AlexNet or MobileNet"),
)  # fmt: skip
# Parts of ResNet variants that a plain ResNet lacks, searched for under the encoder's prefix.
OTHER_RESNETS = (
    (r"^(conv1|stem)\.\d+\.", "a deep stem (ResNet-C, -D)"),
    (r"\.se(_module)?\.|\.attn\.|\.channel_conv", "channel attention (SE-ResNet and relatives)"),
    (r"\.downsample\.\d\.(conv|bn)\.|\.downsample\.2\.", "average-pooled shortcuts (ResNet-D)"),
    (r"attnpool", "attention pooling (CLIP)"),
    (r"\.convs\.\d", "hierarchical convolutions (Res2Net)"),
    (r"\.gn\d\.|\.norm\d\.", "GroupNorm or another norm than batch normalisation"),
    (r"conv2_offset", "deformable convolutions"),
    (r"\.conv\d\.bias$|^conv1\.bias$", "biases in its convolutions (folded norms?)"),
)  # fmt: skip
