"""What of a set does not fit a recipe: told before training, with the setting to change."""

NEEDS_MASKS = (
    "these annotations have boxes and no masks, which a Mask R-CNN learns from; train a detector that needs none"
)
