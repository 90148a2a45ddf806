"""State-dict names of MMDetection and of the authors, turned into ours: backbone, pyramid and parallel head."""

import re

MMDET_RULES = (
    (r"^neck\.lateral_convs\.(\d)\.conv\.", r"fpn.lateral.\1."),
    (r"^neck\.fpn_convs\.(\d)\.conv\.", r"fpn.output.\1."),
    (r"^bbox_head\.atss_cls\.", "head.cls_logits."),
    (r"^bbox_head\.atss_reg\.", "head.bbox_pred."),
    (r"^bbox_head\.atss_centerness\.", "head.quality."),  # PAA's IoU branch has this name too
    (r"^bbox_head\.scales\.", "head.scales."),
)
OFFICIAL_HEAD_RULES = (
    (r"^bbox_tower\.", "box_tower."),
    (r"^(iou_pred|centerness)\.", "quality."),
)


def from_mmdet(key: str) -> str | None:
    """Our name of an entry of an MMDetection ATSS or PAA model; None for batch norm's step counters, which we lack."""
    if key.endswith(".num_batches_tracked"):
        return None
    tower = re.match(r"^bbox_head\.(cls|reg)_convs\.(\d)\.(conv|gn)\.(\w+)$", key)
    if tower:
        kind, index, layer, last = tower.groups()
        name = {"cls": "cls_tower", "reg": "box_tower"}[kind]
        return f"head.{name}.{3 * int(index) + (layer == 'gn')}.{last}"
    return _rename(key, MMDET_RULES)


def from_official_head(key: str) -> str:
    """Our name inside the head of an entry of the authors' PAA or ATSS head."""
    return _rename(key, OFFICIAL_HEAD_RULES)


def _rename(key: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key
